"""What preprocessing cost and how well it went: one row a cohort."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

STEPS = ("skull_strip", "denoise", "bias_field", "affine", "resample")


def preprocessing_table(qualities: Mapping[str, pd.DataFrame], left_out: Mapping[str, bool]) -> pd.DataFrame:
    """Summarise the quality of every cohort's scans.

    Parameters
    ----------
    qualities
        From :func:`dmir.preprocess.files.quality_table`, by cohort.
    left_out
        Whether a cohort's flagged scans are left out of what follows.

    Returns
    -------
    DataFrame
        A row a cohort: cohort, scans, flagged, warned (something about its files is doubtful), mask_overlap (median)
        and mask_overlap_min (Dice with the reference's brain after the affine), scan_seconds (median over scans of the
        wall time, files not included), ``<step>_seconds`` for the steps that ran, and peak_memory_mb (the highest).
    """
    rows: list[dict[str, Any]] = []
    for cohort, quality in qualities.items():
        row: dict[str, Any] = {
            "cohort": cohort,
            "scans": len(quality),
            "flagged": int((~quality["ok"]).sum()),
            "warned": int(quality["warnings"].fillna("").astype(bool).sum()),
            "mask_overlap": quality["mask_overlap"].median(),
            "mask_overlap_min": quality["mask_overlap"].min(),
            "scan_seconds": quality["seconds"].median(),
        }
        for step in STEPS:
            if f"seconds_{step}" in quality:
                row[f"{step}_seconds"] = quality[f"seconds_{step}"].median()
        rows.append({**row, "peak_memory_mb": quality["peak_memory_mb"].max()})
    table = pd.DataFrame(rows)
    steps = [name for name in (f"{step}_seconds" for step in STEPS) if name in table]
    table = table[[*table.columns.drop([*steps, "peak_memory_mb"]), *steps, "peak_memory_mb"]]
    told = [cohort for cohort, leaves in left_out.items() if leaves]
    flagged = f"flagged scans of {', '.join(told)} are left out" if told else "flagged scans are used like all others"
    table.attrs["note"] = (
        "Overlap is the Dice of the brain masks after the affine alignment. Seconds are the median over scans, one "
        f"thread each, reading and writing not included; memory is the highest peak. {flagged.capitalize()}. "
        "What is doubtful about the files of a scan, and what was done about it, stands in quality.csv."
    )
    return table
