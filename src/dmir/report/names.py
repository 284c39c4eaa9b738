"""What methods and structures are called in tables and figures."""

from __future__ import annotations

import re

from dmir import registry

ROWS = {
    "descent-fast": "Descent, fast",
    "greedy": "greedy",
    "convexadam": "ConvexAdam",
    "fireants": "FireANTs",
    "caml-refined": "Proposed + refinement",
}
"""Rows of the committed configurations that are no method of their own name."""
METHOD_NAMES = {**{name: told.title for name, told in registry.built_in_facts().items()}, **ROWS}
SHORT_METHOD_NAMES = {**METHOD_NAMES, **{name: told.short_title for name, told in registry.built_in_facts().items()}}
REFERENCE_METHODS = frozenset({"affine"})  # the starting point of the others: shown, never ranked

_HEMISPHERES = {"left", "right", "lh", "rh"}


def method_name(method: str, *, short: bool = False) -> str:
    """Return the name that readers know; ``short`` for figures. A method that is not known shows as it is.

    Examples
    --------
    >>> method_name("caml-without-rbsc-carsc")
    'Proposed without RBSC, CARSC'
    >>> method_name("voxelmorph-lambda-0.5")
    'VoxelMorph, λ = 0.5'
    >>> method_name("voxelmorph-refined")
    'VoxelMorph + refinement'
    """
    names = SHORT_METHOD_NAMES if short else METHOD_NAMES
    for mark, joined in (("-without-", " without "), ("-lambda-", ", λ = ")):
        base, found, rest = method.partition(mark)
        if found and base in names:
            return (
                SHORT_METHOD_NAMES[base] + joined + (rest.upper().replace("-", ", ") if mark == "-without-" else rest)
            )
    refined = method.removesuffix("-refined")
    if refined != method and refined in names:
        return f"{SHORT_METHOD_NAMES[refined]} + refinement"
    return names.get(method) or registry.title(method, short=short) or method


def structure_group(name: str) -> str:
    """Return a structure's name without its hemisphere, so that left and right fall into one group.

    Examples
    --------
    >>> structure_group("Left-Cerebral-White-Matter")
    'Cerebral white matter'
    >>> structure_group("right superior frontal gyrus") == structure_group("L superior frontal gyrus")
    True
    >>> structure_group("Brain-Stem")
    'Brain stem'
    """
    words = [word.strip("(),.") for word in re.split(r"[\s_-]+", name.strip())]
    kept = [
        word
        for place, word in enumerate(words)
        # a lone L or R stands for the hemisphere only at an end: "R insula", "insula L"
        if word.lower() not in _HEMISPHERES and not (word in ("L", "R") and place in (0, len(words) - 1))
    ]
    # "White" -> "white", while "CSF", "DC" and "VentralDC" stay as they are
    group = " ".join(word.lower() if word[1:].islower() else word for word in kept if word)
    return group[:1].upper() + group[1:] if group else name
