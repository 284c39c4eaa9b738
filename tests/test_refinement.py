"""Refinement: never a higher loss, the truth approached, and a row of its own in configuration, pipeline and report."""

from __future__ import annotations

import copy
import inspect
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy.ndimage import gaussian_filter

from dmir import networks
from dmir.config import Network, Refinement, parse_config
from dmir.config.base import ConfigError
from dmir.errors import InputError
from dmir.fields import integrate, jacobian_determinant, load_field, warp
from dmir.losses import diffusion, lncc
from dmir.methods import refinement, register
from dmir.methods.network import register_pairs
from dmir.methods.refinement import refine
from dmir.report.names import method_name
from dmir.report.style import METHOD_COLOURS, method_colours, method_markers
from dmir.training.objective import Objective
from dmir.training.weights import save_weights
from dmir.volumes import Grid, Volume, write_volume

ROOT = Path(__file__).parents[1]
SHAPE = (20, 24, 22)
OPTIONS = {"window": 5, "regularisation": 0.2}


def smooth(seed, sigma, shape=SHAPE):
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), sigma)
    return (noise / noise.std()).astype(np.float32)


@pytest.fixture(scope="module")
def pair():
    """A textured image, the same warped by exp(v), and exp(-v), which brings the first back onto the second."""
    fixed = torch.from_numpy(np.clip(0.5 + 0.2 * smooth(1, 1.2) + 0.1 * smooth(2, 2.5), 0, 1))[None, None]
    velocity = torch.from_numpy(np.stack([smooth(10 + k, 4.0) for k in range(3)]))[None] * 0.8
    return warp(fixed, integrate(velocity), padding="border"), fixed, integrate(-velocity)


@pytest.fixture(scope="module")
def start(pair):
    """What a network might give: two thirds of the truth, roughened."""
    rough = torch.from_numpy(np.stack([smooth(30 + k, 2.0) for k in range(3)]))[None]
    return pair[2] * 0.66 + 0.1 * rough


def loss(pair, displacement, **options):
    objective = Objective(**{"similarity": "lncc", **OPTIONS, **options})
    return float(objective(pair[1], warp(pair[0], displacement), displacement)[0])


def error(pair, displacement):
    """Mean endpoint error away from the border, voxels."""
    inside = (slice(None), *(slice(3, -3),) * 3)
    return float((displacement - pair[2]).square().sum(dim=1).sqrt()[inside].mean())


def test_the_truth_is_approached_without_folding(pair, start):
    refined = refine(*pair[:2], start, **OPTIONS)
    assert refined.shape == start.shape and refined.dtype == torch.float32
    assert error(pair, start) > 0.3
    assert error(pair, refined) < 0.6 * error(pair, start)
    assert (jacobian_determinant(refined) > 0).all()


@pytest.mark.parametrize("similarity", ["lncc", "mse", "mutual_information"])
def test_the_loss_is_lower_than_at_the_start(similarity, pair, start):
    refined = refine(*pair[:2], start, steps=4, similarity=similarity, **OPTIONS)
    assert loss(pair, refined, similarity=similarity) < loss(pair, start, similarity=similarity)


@pytest.mark.parametrize("learning_rate", [0.1, 3.0, 1e4])
@pytest.mark.parametrize("steps", [1, 5])
def test_the_loss_is_never_higher_however_long_the_steps(steps, learning_rate, pair, start):
    refined = refine(*pair[:2], start, steps=steps, learning_rate=learning_rate, **OPTIONS)
    assert loss(pair, refined) <= loss(pair, start)
    if learning_rate == 1e4:
        assert torch.equal(refined, start)  # no step was any good


def test_no_step_is_no_change(pair, start):
    assert torch.equal(refine(*pair[:2], start, steps=0), start)


def test_the_same_bits_every_time_and_inputs_untouched(pair, start):
    before = start.clone()
    first = refine(*pair[:2], start, steps=3, **OPTIONS)
    assert torch.equal(first, refine(*pair[:2], start, steps=3, **OPTIONS))
    assert torch.equal(start, before) and not first.requires_grad


def test_it_works_on_what_inference_mode_made(pair, start):
    expected = refine(*pair[:2], start, steps=2, **OPTIONS)
    with torch.inference_mode():
        made = [tensor.clone() for tensor in (*pair[:2], start)]
        assert torch.equal(refine(*made, steps=2, **OPTIONS), expected)
    assert torch.equal(refine(*made, steps=2, **OPTIONS), expected)


def test_the_first_step_goes_down_the_finite_differences(pair, start, monkeypatch):
    """The gradient at one parameter, as Adam is given it, against differences of the loss in float64."""
    given = []
    step = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam,
        "step",
        lambda self: (given.append(self.param_groups[0]["params"][0].grad.clone()), step(self)),
    )
    refine(*pair[:2], start, steps=1, **OPTIONS)
    gradient = given[0]
    place = tuple(int(i) for i in np.unravel_index(int(gradient.abs().argmax()), gradient.shape))
    moving, fixed, u = pair[0].double(), pair[1].double(), start.double()
    spread = [refinement._spreading(n, 2, 1.0).double() for n in SHAPE]
    values = []
    for change in (-1e-3, 1e-3):
        correction = torch.zeros(gradient.shape, dtype=torch.float64)
        correction[place] = change
        moved = u + refinement._upsampled(correction, spread)
        # the objective itself is float32: its two terms, in float64
        values.append(float(-lncc(fixed, warp(moving, moved), 5) + 0.2 * diffusion(moved)))
    assert float(gradient[place]) == pytest.approx((values[1] - values[0]) / 2e-3, rel=1e-2)


@pytest.mark.parametrize(
    ("length", "downsampling", "smoothing"), [(20, 2, 1.0), (21, 3, 0.0), (7, 8, 2.0), (5, 1, 0.5)]
)
def test_a_shift_stays_a_shift_and_without_smoothing_points_keep_their_values(length, downsampling, smoothing):
    matrix = refinement._spreading(length, downsampling, smoothing)
    assert torch.allclose(matrix.sum(dim=1), torch.ones(length), atol=1e-6)
    assert (matrix >= 0).all()
    if smoothing == 0:
        line = torch.linspace(0, 1, matrix.shape[1])
        assert torch.allclose(matrix @ line, torch.linspace(0, 1, length), atol=1e-6)


def test_a_smoother_correction_is_smoother(pair, start):
    rough, even = (
        refine(*pair[:2], start, steps=3, smoothing=sigma, window=5, regularisation=0.0) - start for sigma in (0.5, 2.0)
    )
    roughness = [float(u.diff(dim=2).square().mean() / u.square().mean()) for u in (rough, even)]
    assert roughness[1] < 0.5 * roughness[0]


# --- as a method ---


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    built = networks.build("voxelmorph", (16, 16, 16), encoder=[4, 4], decoder=[4, 4, 4], integration_steps=0)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    training = {"similarity": "mse", "window": 5, "regularisation": 0.01}
    save_weights(
        path, built, name="voxelmorph", hyperparameters=built.hyperparameters, grid=Grid((16, 16, 16), np.eye(4)),
        seed=1, extra={"training": training},
    )  # fmt: skip
    return path


def test_two_volumes_are_registered_and_refined_with_the_objective_of_the_training(pair, weights):
    moving, fixed = (Volume(image[0, 0].numpy(), np.eye(4)) for image in pair[:2])
    plain = register(moving, fixed, str(weights), device="cpu")
    refined = register(moving, fixed, "refinement", weights=weights, steps=5, device="cpu")
    own = {"similarity": "mse", "regularisation": 0.01}
    expected = refine(*pair[:2], torch.from_numpy(plain)[None], steps=5, window=5, **own)[0].numpy()
    assert np.array_equal(refined, expected)
    assert not np.array_equal(refined, plain)
    with pytest.raises(InputError, match="'refinement' without weights"):
        register(moving, fixed, "refinement")


def test_pairs_of_files_are_refined_and_their_seconds_are_of_both(pair, weights, tmp_path):
    for name, image in zip(("moving", "fixed"), pair[:2], strict=True):
        write_volume(tmp_path / f"{name}.nii.gz", Volume(image[0, 0].numpy(), np.eye(4)))
    files = [("m", tmp_path / "moving.nii.gz", "f", tmp_path / "fixed.nii.gz")]
    calls = []

    def watched(*tensors):
        calls.append([tuple(tensor.shape) for tensor in tensors])
        return refine(*tensors, steps=3, similarity="mse", regularisation=0.01)

    plain = register_pairs(files, tmp_path / "plain", weights, device="cpu")
    records = register_pairs(files, tmp_path / "refined", weights, device="cpu", refine=watched)
    assert (records.status == "ok").all() and (plain.status == "ok").all()
    assert calls == [[(1, 1, *SHAPE), (1, 1, *SHAPE), (1, 3, *SHAPE)]] * 2  # once to warm up
    before, after = (
        torch.from_numpy(load_field(tmp_path / name / "m__f.nii")[0])[None] for name in ("plain", "refined")
    )
    own = {"similarity": "mse", "regularisation": 0.01}
    assert loss(pair, after, **own) < loss(pair, before, **own)


# --- in the configuration and the report ---


def configuration(**settings):
    values = copy.deepcopy(yaml.safe_load((ROOT / "config" / "config.yaml").read_text()))
    values["settings"] |= settings
    values["methods"] = [*values["methods"], *(name for name in settings if name not in values["methods"])]
    return parse_config(values, "mine.yaml")


def test_a_refinement_uses_the_weights_and_the_objective_of_its_network():
    given = configuration(fine={"algorithm": "refinement", "of": "caml", "regularisation": 3.0})
    settings, network = given.method("fine"), given.method("caml")
    assert isinstance(settings, Refinement) and isinstance(network, Network)
    assert (settings.similarity, settings.window) == ("lncc", network.training["window"])
    assert settings.regularisation == 3.0
    assert given.network_of("fine") == given.network_of("caml") == "caml"
    assert given.network_of("syn") is None
    assert "fine" not in given.networks() and given.networks().count("caml") == 1


def test_a_network_that_is_there_to_be_refined_alone_is_trained():
    given = configuration(wide={"algorithm": "voxelmorph"}, fine={"algorithm": "refinement", "of": "wide"})
    alone = parse_config({**given.model_dump(mode="json"), "methods": ["affine", "fine"]}, "mine.yaml")
    assert alone.networks() == ["wide"]


def test_a_row_of_a_study_can_be_refined():
    study = {"algorithm": "refinement", "of": "caml-without-carsc"}
    values = configuration().model_dump(mode="json")
    values |= {"methods": ["caml-without-carsc", "fine"], "settings": {**values["settings"], "fine": study}}
    assert parse_config(values, "mine.yaml").networks() == ["caml-without-carsc"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"of": "camll"}, "settings.fine: of: found 'camll', no network of this configuration. Did you mean 'caml'?"),
        ({"of": "syn"}, "no network"),
        ({"of": "caml-refined"}, "found 'caml-refined', a refinement itself; expected a network"),
        ({"of": "fine"}, "a refinement itself"),
        ({}, "settings.fine.of: found nothing; this key is required"),
        ({"of": "caml", "step": 3}, "settings.fine.step: found an unknown key. Did you mean 'steps'?"),
        ({"of": "caml", "window": 6}, "settings.fine.window: found 6; expected an odd number"),
        ({"of": "caml", "steps": -1}, "settings.fine.steps"),
    ],
)
def test_a_mistake_is_told_with_its_key(settings, words):
    with pytest.raises(ConfigError) as told:
        configuration(fine={"algorithm": "refinement", **settings})
    assert len(told.value.problems) == 1
    assert words in told.value.problems[0]


def test_a_study_trains_networks_alone():
    values = configuration().model_dump(mode="json")
    values["lambda_study"] = {"methods": ["caml-refined"]}
    with pytest.raises(ConfigError, match="lambda_study: 'caml-refined' is no network"):
        parse_config(values, "mine.yaml")


@pytest.mark.parametrize("function", [refine, refinement.register])
def test_the_keys_of_the_configuration_are_parameters_with_the_same_defaults(function):
    keywords = {p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    fields = {key: field.default for key, field in Refinement.model_fields.items() if key not in ("algorithm", "of")}
    assert set(fields) == set(keywords)
    inherited = ("similarity", "window", "regularisation") if function is refine else ()
    assert {k: v for k, v in fields.items() if k not in inherited} == {
        k: v for k, v in keywords.items() if k not in inherited
    }
    given = configuration().method("caml-refined").model_dump(mode="json", exclude={"algorithm", "of"})
    partial(refine, **given)(torch.rand(1, 1, 8, 8, 8), torch.rand(1, 1, 8, 8, 8), torch.zeros(1, 3, 8, 8, 8))


@pytest.mark.parametrize("name", ["config.yaml", "paper.yaml"])
def test_the_committed_configurations_refine_the_proposed_network(name):
    given = parse_config(yaml.safe_load((ROOT / "config" / name).read_text()), name)
    assert "caml-refined" in given.methods and given.network_of("caml-refined") == "caml"


def test_its_row_has_a_name_a_colour_and_a_marker_of_its_own():
    assert method_name("caml-refined") == method_name("caml-refined", short=True) == "Proposed + refinement"
    assert method_name("voxelmorph-refined") == "VoxelMorph + refinement"
    assert method_name("mine-refined") == "mine-refined"
    assert method_colours(["caml", "caml-refined"])["caml-refined"] == METHOD_COLOURS["caml-refined"]
    markers = method_markers(["caml", "caml-refined", "a", "b", "c", "d", "e"])
    assert list(markers.values()).count(markers["caml-refined"]) == 1
