"""Code hashes: what a job's result depends on of this package, so that a change reruns what it concerns and no more."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, cached_property
from typing import Any

from dmir import registry
from dmir.cohorts import SOURCES
from dmir.config import Refinement
from dmir.provenance import code_hash, code_record
from dmir.workflow.facts import Facts, Wildcards

TRAINING = ("dmir.training.loop", "dmir.training.follower")  # the second is started by its name, on several GPUs


class Code(Facts):
    """The code of the jobs that depend on which source, network or method they are of."""

    def making_code(self, cohort: str) -> str:
        """Return the hash of what making a cohort's scans depends on."""
        return code_hash(SOURCES[self.source_of(cohort)])

    def network_code(self, wildcards: Wildcards) -> str:
        """Return the hash of what a training depends on: the training itself and the one network."""
        return code_hash(*TRAINING, *registry.modules(self.method(wildcards.method).algorithm))

    def method_code(self, wildcards: Wildcards) -> str:
        """Return the hash of what a registration depends on."""
        return self.code_of_method(wildcards.method)

    @cached_property
    def code_of_method(self) -> Callable[[str], str]:
        """The same by a method's name, found once for its hundreds of jobs."""
        return cache(self._code_of)

    def _code_of(self, method: str) -> str:
        name = self.network_of(method)
        if name is None:
            state = registry.state(self.method(method).algorithm, self.parameters_of(method))
            return code_hash("dmir.methods.isolated", *self.modules_of(method)) + state
        refined = isinstance(self.method(method), Refinement)
        refinement = ["dmir.methods.refinement"] if refined else []
        return code_hash("dmir.methods.network", *registry.modules(self.method(name).algorithm), *refinement)

    def modules_of(self, method: str) -> list[str]:
        """Return the modules of a method without weights: of a refinement, those of what it refines too."""
        settings = self.method(method)
        own = registry.modules(settings.algorithm)
        return [*own, *self.modules_of(settings.of)] if isinstance(settings, Refinement) else own

    def scoring_code(self, wildcards: Wildcards) -> dict[str, Any]:
        """Return the modules that made scores, from the scans to the numbers, with their hash."""
        methods, networks = self.scored_methods(wildcards), self.scored_networks(wildcards)
        modules = {
            *("dmir.preprocess.files", "dmir.metrics"),
            *(SOURCES[self.source_of(cohort)] for cohort in self.cohorts),
            *(part for name in methods if self.network_of(name) is None for part in self.modules_of(name)),
            *("dmir.methods.refinement" for name in methods if isinstance(self.method(name), Refinement)),
            *(part for name in networks for part in registry.modules(self.method(name).algorithm)),
            *([*TRAINING, "dmir.methods.network"] if networks else []),
        }
        return code_record(*sorted(modules))
