"""Methods: whatever turns a pair of images into a displacement field, behind one call.

``register(moving, fixed, method="syn")``. The methods of this folder look at physical space alone: the moving image
may lie on a grid of its own, and the field takes a point of the fixed world to one of the moving world, counted in
voxels of the fixed grid (:func:`dmir.fields.onto_moving_grid` counts it in the moving image's). To add one: a new file
beside this one with a ``TITLE``, its ``Settings``, a function ``register(moving, fixed, *, ...)`` and, if it likes,
``cost``, ``PAPER``, ``COLOUR``, the names of the ``LIBRARIES`` that it imports when called. docs/own-method.md tells it
all, and how a method comes from elsewhere (:mod:`dmir.registry`).
"""

from __future__ import annotations

from dmir.methods.calling import NETWORK, describe, load_libraries, register, surroundings

__all__ = ["NETWORK", "describe", "load_libraries", "register", "surroundings"]
