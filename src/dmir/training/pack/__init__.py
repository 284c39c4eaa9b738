"""The preprocessed scans of a cohort in one file that every training of it opens in no time: :func:`pack_scans`.

A compressed volume of 160x192x224 voxels costs a fifth of a second of a core to read, each time a training starts; the
same voxels in a plain array cost a copy. So the scans are packed once, as ``images.npy`` and ``labels.npy``: plain
numpy files that anything can map into memory. All trainings that read them share one copy, the kernel's page cache.
"""

from __future__ import annotations

from dmir.training.pack.opening import IMAGES, LABELS, RECORD, Pack, Scan, SourceFile, open_pack
from dmir.training.pack.packing import pack_scans
from dmir.training.pack.precision import PRECISIONS, quantise, require_precision

__all__ = [
    "IMAGES",
    "LABELS",
    "PRECISIONS",
    "RECORD",
    "Pack",
    "Scan",
    "SourceFile",
    "open_pack",
    "pack_scans",
    "quantise",
    "require_precision",
]
