"""Preprocessing: every scan of a cohort on its atlas's grid, stripped, corrected, aligned, on one grey scale."""

from __future__ import annotations

from dmir.preprocess.affine import estimate_affine, read_affine, write_affine
from dmir.preprocess.bias_field import correct_bias
from dmir.preprocess.denoise import denoise
from dmir.preprocess.native import native_files, to_native
from dmir.preprocess.normalise import match_histogram, normalise
from dmir.preprocess.quality import assess
from dmir.preprocess.resample import resample
from dmir.preprocess.scan import Preprocessed, preprocess_atlas, preprocess_scan, read_preprocessed
from dmir.preprocess.skull_strip import brain_mask
from dmir.preprocess.truth import truth_on_grid

__all__ = [
    "Preprocessed",
    "assess",
    "brain_mask",
    "correct_bias",
    "denoise",
    "estimate_affine",
    "match_histogram",
    "native_files",
    "normalise",
    "preprocess_atlas",
    "preprocess_scan",
    "read_affine",
    "read_preprocessed",
    "resample",
    "to_native",
    "truth_on_grid",
    "write_affine",
]
