"""Scores: one number about one pair, or about one structure of it."""

from __future__ import annotations

from dmir.metrics.endpoint import endpoint_error, inverse_consistency_error
from dmir.metrics.folding import measure_folding, nondiffeomorphic_volume, nonpositive_jacobian, sdlogj
from dmir.metrics.overlap import dice, volume_ratio
from dmir.metrics.score import score_pair
from dmir.metrics.surface import hd95
from dmir.metrics.topology import betti_numbers, fold_free_part

__all__ = [
    "betti_numbers",
    "dice",
    "endpoint_error",
    "fold_free_part",
    "hd95",
    "inverse_consistency_error",
    "measure_folding",
    "nondiffeomorphic_volume",
    "nonpositive_jacobian",
    "score_pair",
    "sdlogj",
    "volume_ratio",
]
