"""The record of each pair: what both ways of registering a shard write down, and the pairs that are left out of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the process of a classical pair would count pandas as its method's memory
    import pandas as pd

MEASURED = ("seconds", "read_seconds", "write_seconds", "peak_memory_mb", "inverse_mean", "inverse_worst")
COLUMNS = ("cohort", "method", "model", "moving", "fixed", "status", "reason", *MEASURED, "device", "threads")
PairOfFiles = tuple[str, Path, str, Path]


def divide_pairs(
    pairs: Iterable[Sequence[str]], images: Iterable[str | Path], flagged: Mapping[str, str]
) -> tuple[list[PairOfFiles], list[dict[str, str]]]:
    """Divide a shard into the pairs to register, with their files, and the records of those that are left out.

    Parameters
    ----------
    pairs
        (moving, fixed) names.
    images
        Preprocessed images, each in a folder of its scan's name.
    flagged
        Why a scan is left out, by scan.

    Returns
    -------
    registered
        (moving name, moving image, fixed name, fixed image).
    left_out
        ``moving, fixed, status, reason``: a pair without a field is a row with its reason, never a smaller number.
    """
    files = {Path(path).parent.name: Path(path) for path in images}
    registered, left_out = [], []
    for moving, fixed in pairs:
        reasons = [f"{scan} is flagged: {flagged[scan]}" for scan in (moving, fixed) if scan in flagged]
        if reasons:
            record = {"moving": moving, "fixed": fixed, "status": "left out", "reason": "; ".join(reasons)}
            left_out.append(record)
        else:
            registered.append((moving, files[moving], fixed, files[fixed]))
    return registered, left_out


def planes_of(image: str | Path) -> list[list[float]]:
    """Return the planes at which the brain of a preprocessed image is cut off, as its ``quality.json`` has them."""
    path = Path(image).with_name("quality.json")
    if not path.is_file():  # any other image
        return []
    from dmir.tables import read_record

    planes: list[list[float]] = read_record(path).get("cut_planes", [])
    return planes


def write_records(
    path: str | Path, records: pd.DataFrame, left_out: Sequence[Mapping[str, str]], **run_as: str
) -> None:
    """Write the records of a shard as .csv, all at once; ``run_as`` (cohort, method, model) holds for all rows."""
    import pandas as pd

    from dmir.volumes import atomic_path

    table = pd.concat([records, pd.DataFrame(left_out)]) if left_out else records
    with atomic_path(path) as temporary:
        table.assign(**run_as)[list(COLUMNS)].to_csv(temporary, index=False)
