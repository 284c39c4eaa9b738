"""What FreeSurfer's warps say of themselves, in the tags behind an MGH file's voxels or in a NIfTI extension."""

from __future__ import annotations

import struct

import numpy as np

from dmir.volumes import Grid

FORMATS = ("voxels-absolute", "voxels", "spm", "ras")  # abs-crs, disp-crs, abs-ras, disp-ras
FOOTER = 20  # bytes behind an MGH file's voxels before its tags: the scan's parameters
WARP = 3  # the intent in an MGH file's version
GEOMETRY, META = 10, 13  # tags: of the moving and of the fixed image, and of the kind of vectors
OF_FIXED_LENGTH = {GEOMETRY: 2 * 588}  # tags that come without a length in an MGH file
UNREADABLE = {1, 2, 11, 12, 20}  # tags whose length is told within them; no warp has them


def of_mgh(behind: bytes) -> tuple[str, Grid | None] | None:
    """Return convention and moving grid of what lies behind the voxels of an MGH warp; None where it does not say."""
    return _found(behind[FOOTER:], OF_FIXED_LENGTH)


def of_extension(content: bytes) -> tuple[str, Grid | None] | None:
    """Return convention and moving grid of FreeSurfer's extension of a NIfTI header; None where it does not say."""
    return _found(content[4:], {})


def _found(content: bytes, lengths: dict[int, int]) -> tuple[str, Grid | None] | None:
    moving: Grid | None = None
    kind: int | None = None
    at = 0
    while at + 4 <= len(content):
        tag = struct.unpack_from(">i", content, at)[0]
        at += 4
        if tag == 0 or tag in UNREADABLE or (tag not in lengths and at + 8 > len(content)):
            break
        if tag in lengths:
            length = lengths[tag]
        else:
            length = struct.unpack_from(">q", content, at)[0]
            at += 8
        if length < 0 or at + length > len(content):
            break
        if tag == GEOMETRY:
            moving = _grid(content[at : at + length])
        elif tag == META and length >= 4:
            kind = struct.unpack_from(">i", content, at)[0]
        at += length
    return (FORMATS[kind], moving) if kind is not None and 0 <= kind < len(FORMATS) else None


def _grid(content: bytes) -> Grid | None:
    """Return the first grid of a tag, the moving image's; None where it is not valid."""
    if len(content) < 76:
        return None
    valid, depth, height, width = struct.unpack_from(">4i", content)
    numbers = np.frombuffer(content, ">f4", count=15, offset=16).astype(np.float64)
    affine = np.eye(4)
    affine[:3, :3] = numbers[3:12].reshape(3, 3).T * numbers[:3]
    affine[:3, 3] = numbers[12:] - affine[:3, :3] @ (np.array([depth, height, width]) / 2)
    usable = valid and np.isfinite(affine).all() and min(depth, height, width) > 0
    return Grid((depth, height, width), affine) if usable and abs(np.linalg.det(affine)) > 1e-9 else None
