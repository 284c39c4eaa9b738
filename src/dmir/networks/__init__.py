"""The networks: each turns a moving and a fixed image into a displacement field.

A network is built by name, ``build("caml", shape=(160, 192, 224), channels=(16, 32, 64), ...)``, and called as
``network(moving, fixed) -> displacement``: (B, 1, D, H, W) twice, float32 in [0, 1], to (B, 3, D, H, W), float32, in
voxels. To add one: a new file beside this one, whose class has a ``TITLE`` (and, if it likes, ``PAPER``, ``COLOUR``);
docs/own-method.md tells of networks that stay elsewhere.
"""

from __future__ import annotations

from dmir.networks.building import Shape, build, hyperparameter_names, network_names

__all__ = ["Shape", "build", "hyperparameter_names", "network_names"]
