"""What a vector image's header and values prove of its convention; what they leave open is asked for.

Headers tell little: that vectors are FNIRT's, that a program wrote an extension, a name. Values tell a place from a
step, and no more: the linear part of the map that they would be is near the identity under one reading and nowhere
near it under another. RAS or LPS, millimetres or voxels cannot be seen in a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmir.errors import InputError
from dmir.transforms import freesurfer
from dmir.transforms.conventions import CONVENTIONS, Convention, map_of
from dmir.volumes import Grid, StoredArray

SAMPLES = 12  # places along each axis at which the linear part of a map is looked at
LIKELY = (np.log(1.6), np.radians(50))  # of the linear part of a registration: log of a scale, and a rotation
POSSIBLE = (np.log(2.6), np.radians(75))  # beyond these it is none
LEAST_SHARE = 0.3  # of the fixed image in the moving one, beside the best reading's
FIELDS = tuple(name for name in CONVENTIONS if name not in ("npz", "learn2reg"))  # that any vector image can be in
FNIRT_FIELD, COEFFICIENTS = 2006, {2007, 2008, 2009, 2016}  # intents; 2016 is topup's
DISPVECT, VECTOR = 1006, 1007
AFNI, FREESURFER = 4, 14  # codes of extensions
NIFTYREG = {0: "spm", 1: "ras"}  # intent_p1 of NREG_TRANS; the others are splines and velocities
MARK = "dmir: "  # how the description of a field that this project wrote begins


@dataclass(frozen=True)
class Claims:
    """What a header says of the kind of its vectors; ``freesurfer``: a convention, and the moving image's grid."""

    intent: int = 0
    intent_name: str = ""
    parameter: float = 0.0
    description: str = ""
    extensions: frozenset[int] = frozenset()
    freesurfer: tuple[str, Grid | None] | None = None

    @classmethod
    def of(cls, stored: StoredArray) -> Claims:
        """Take them from a file; a header that has none of these fields claims nothing."""
        header = stored.header
        if "version" in header:  # MGH
            warp = int(header["version"]) >> 8 == freesurfer.WARP
            return cls(freesurfer=freesurfer.of_mgh(stored.behind()) if warp else None)
        extensions = {int(one.get_code()): bytes(one.content) for one in getattr(header, "extensions", ())}

        def text(name: str) -> str:
            return bytes(header[name]).rstrip(b"\0 ").decode("latin-1") if name in header else ""

        return cls(
            intent=int(header["intent_code"]) if "intent_code" in header else 0,
            intent_name=text("intent_name"),
            parameter=float(header["intent_p1"]) if "intent_p1" in header else 0.0,
            description=text("descrip"),
            extensions=frozenset(extensions),
            freesurfer=freesurfer.of_extension(extensions[FREESURFER]) if FREESURFER in extensions else None,
        )


def candidates(claims: Claims, path: Path, fifth: bool) -> tuple[tuple[str, ...], str]:
    """Return the conventions that a header allows, and what it says.

    Parameters
    ----------
    fifth
        Whether the vectors lie along a fifth axis, as NIfTI's standard has it, not along the fourth.

    Raises
    ------
    InputError
        The file holds something else than displacements or places.
    """
    said = claims.description
    own = said.removeprefix(MARK).split(";")[0] if said.startswith(MARK) else ""
    if own in FIELDS and (own != "itk" or (fifth and claims.intent == VECTOR)):
        return (own,), f"its description, '{said}'"
    if claims.intent in COEFFICIENTS:
        raise _no_field(
            path,
            f"spline coefficients (intent {claims.intent})",
            "Make a field of them: fnirtfileutils --in=COEFFICIENTS --ref=FIXED --out=FIELD --withaff",
        )
    if any(word in said.lower() for word in ("flow field", "velocity")):
        raise _no_field(path, f"a velocity field ('{said}')", "Integrate it first (SPM: Deformations, Save as y_).")
    if claims.intent_name == "NREG_TRANS":
        kind = NIFTYREG.get(int(claims.parameter))
        if kind is None:
            raise _no_field(
                path,
                f"NiftyReg's splines or velocities (type {claims.parameter:g})",
                "Make a field of it: reg_transform -ref FIXED -def FILE FIELD",
            )
        return (kind,), f"NiftyReg's type {claims.parameter:g}"
    if claims.intent == FNIRT_FIELD:
        return ("fsl", "fsl-absolute"), "FNIRT's intent code"
    if claims.freesurfer is not None:
        return (claims.freesurfer[0],), "what FreeSurfer's warp says of itself"
    if AFNI in claims.extensions:
        return ("afni",), "AFNI's extension"
    if fifth and claims.intent == DISPVECT:
        return ("ras",), "NIfTI's intent of a displacement, which is RAS to ITK 5.3, ANTs and FreeSurfer"
    if fifth and claims.intent == VECTOR:
        if said.lower().startswith("deformation"):
            return ("spm",), f"a vector image that describes itself as '{said}'"
        return ("itk", "spm"), "a vector image with five axes"
    return FIELDS, "no intent code, name or extension that says what they are"


def _no_field(path: Path, found: str, remedy: str) -> InputError:
    return InputError(path, found=found, expected="a displacement field, a vector a voxel", remedy=remedy)


def fitting(vectors: np.ndarray, names: Sequence[str], fixed: Grid, moving: Grid | None) -> tuple[list[str], list[str]]:
    """Return which conventions make a likely registration of the vectors, and which ones no impossible one.

    Steps read as places, or places as steps, have a linear part that is far from the identity, or they take most of
    the fixed image out of the moving one, where that is known.
    """
    maps = {name: _seen(vectors, CONVENTIONS[name], fixed, moving) for name in names}
    possible = [name for name, (stretch, angle, _) in maps.items() if stretch < POSSIBLE[0] and angle < POSSIBLE[1]]
    likely = [name for name in possible if maps[name][0] < LIKELY[0] and maps[name][1] < LIKELY[1]]
    inside = max((maps[name][2] for name in likely), default=0.0)
    likely, possible = ([name for name in some if maps[name][2] >= LEAST_SHARE * inside] for some in (likely, possible))
    return likely, possible


def proven(vectors: np.ndarray, names: Sequence[str], said: str, path: Path, fixed: Grid, moving: Grid | None) -> str:
    """Return the one convention that header and values leave.

    Raises
    ------
    InputError
        There are several, or none: names them.
    """
    likely, possible = fitting(vectors, names, fixed, moving)
    if len(likely) == 1 and possible == likely:
        return likely[0]
    options = possible if len(possible) > 1 else fitting(vectors, FIELDS, fixed, moving)[1] or FIELDS
    listed = "; ".join(f"{name} = {CONVENTIONS[name].title}" for name in options)
    doubtful = len(possible) > 1
    found = f"vectors of which nothing proves the kind ({said})" if doubtful else f"vectors that do not fit {said}"
    raise InputError(
        path,
        found=found,
        expected=f"to be told which of these they are: {listed}",
        remedy=f"Name it with --from (convention= in Python), for instance --from {options[0]}.",
    )


def _seen(vectors: np.ndarray, convention: Convention, fixed: Grid, moving: Grid | None) -> tuple[float, float, float]:
    """Return what a convention would make of the vectors.

    Returns
    -------
    stretch, angle, inside
        Of the map's linear part, in the world, the largest logarithm of a scale, up or down, and the rotation
        (radians); and the share of the fixed image that lands in the moving one, 1 where that is not known.
    """
    place = np.stack(
        np.meshgrid(*(np.unique(np.linspace(0, n - 1, SAMPLES).round()) for n in vectors.shape[1:]), indexing="ij")
    ).astype(int)
    sample = vectors[:, place[0], place[1], place[2]].reshape(3, -1).astype(np.float64)
    place = place.reshape(3, -1)
    if not np.isfinite(sample).all():
        return 0.0, 0.0, 1.0  # refused elsewhere
    linear, slope, shift = map_of(convention, fixed, moving or fixed)
    target = place + linear @ sample + slope @ place + shift[:, None]
    fit = np.linalg.lstsq(np.vstack([place, np.ones(place.shape[1])]).T, target.T, rcond=None)[0][:3].T
    axes = np.asarray(fixed.affine)[:3, :3]
    left, scales, right = np.linalg.svd(axes @ fit @ np.linalg.inv(axes))
    if scales[-1] < 1e-6 or np.linalg.det(left @ right) < 0:
        return np.inf, np.pi, 0.0
    cosine = np.clip((np.trace(left @ right) - 1) / 2, -1, 1)
    share = 1.0
    if moving is not None:
        there = np.linalg.inv(moving.affine) @ fixed.affine
        voxel = there[:3, :3] @ target + there[:3, 3:]
        share = float(((voxel > -1) & (voxel < np.reshape(moving.shape, (3, 1)))).all(axis=0).mean())
    return float(np.abs(np.log(scales)).max()), float(np.arccos(cosine)), share
