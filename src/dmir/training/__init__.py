"""Training: :func:`train` a network on a cohort, its weights on disk, and the device it runs on."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "train": "loop",
    "TrainingResult": "loop",
    "TrainingSettings": "settings",
    "TrainingDiverged": "module",
    "failure_kept": "failure",
    "Scan": "pack",
    "pack_scans": "pack",
    "open_pack": "pack",
    "fingerprint": "resume",
    "save_weights": "weights",
    "load_weights": "weights",
    "read_metadata": "weights",
    "choose_device": "devices",
    "choose_devices": "devices",
    "lease_cards": "devices",
    "set_threads": "devices",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    # Loaded when asked for: Lightning takes seconds and memory that registering does not have to pay, and a GPU is
    # leased without torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
