"""The columns of the tables: header with unit, rounding, and which value is best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Better = Literal["higher", "lower", "one", ""]


@dataclass(frozen=True)
class Column:
    """How one column is shown.

    Attributes
    ----------
    header
        With its unit; ``{labels}`` stands for the interpolation of the warped labels.
    short
        The header where room is scarce.
    digits
        Decimals; None for three significant digits.
    better
        Which value is best: the higher, the lower, the one nearest to 1, or none.
    least
        What is smaller shows as ``<least``: a clock's noise is no result.
    rounds
        Whether it is rounded; a published number shows with the digits that were published.
    """

    header: str
    short: str = ""
    digits: int | None = None
    better: Better = ""
    least: float = 0.0
    rounds: bool = True


COLUMNS: dict[str, Column] = {
    "cohort": Column("Cohort"),
    "method": Column("Method"),
    "models": Column("Models"),
    "n": Column("n (pairs)", "n"),
    "failed": Column("Failed (pairs)", "failed"),
    "labels": Column("Labels"),
    "dice": Column("Dice ({labels}) ↑", "Dice ↑", 3, "higher"),
    "dice_seed_sd": Column("Dice, sd over seeds", "", 4),
    "dice_nearest": Column("Dice (nearest) ↑", "Dice (nearest) ↑", 3, "higher"),
    "dice_linear": Column("Dice (linear) ↑", "Dice (linear) ↑", 3, "higher"),
    "hd95": Column("HD95 ({labels}), mm ↓", "HD95 mm ↓", 2, "lower"),
    "nonpositive_jacobian_forward": Column("|J|≤0, forward, % ↓", "|J|≤0 % ↓", 3, "lower"),
    "nonpositive_jacobian_central": Column("|J|≤0, central, % ↓", "", 3, "lower"),
    "nondiffeomorphic_volume": Column("Non-diffeomorphic volume, % ↓", "NDV % ↓", 3, "lower"),
    "sdlogj": Column("SDlogJ ↓", "", 3, "lower"),
    "tc": Column("TC ({labels}), best 1", "", 3, "one"),
    "tc_deviation": Column("|TC−1| ({labels}), mean ↓", "", 3, "lower"),
    "structures_scored": Column("Structures scored"),
    # changes of topology are not ranked: what moves least changes least, and resampling alone changes most of it
    "topology_change": Column("Topology change ({labels}), a pair", "", 1),
    "topology_floor": Column("Topology change, floor", "", 1),
    "components_change": Column("Components changed", "", 1),
    "tunnels_change": Column("Tunnels changed", "", 1),
    "cavities_change": Column("Cavities changed", "", 1),
    "topology_change_structures": Column("Structures changed ({labels}), a pair", "", 1),
    "topology_floor_structures": Column("Structures changed, floor", "", 1),
    "labels_vanished": Column("Structures vanished ({labels}), a pair", "", 2),
    "endpoint_error": Column("Endpoint error, mm ↓", "error mm ↓", 2, "lower"),
    "inverse_consistency_error": Column("Inverse consistency error, mm", "", 2),  # who never moves anything has 0
    "seconds": Column("Time (median), s a pair ↓", "s/pair ↓", None, "lower", 0.001),
    "peak_memory_mb": Column("Peak memory, MB", "", 0),  # main memory and a GPU's own are not to be ranked together
    "dice_gain": Column("Gain over affine ↑", "", 3, "higher"),
    "own_dice": Column("Dice, own cohort ↑", "", 3, "higher"),
    "own_dice_gain": Column("Gain, own cohort ↑", "", 3, "higher"),
    "gain_kept": Column("Gain kept, %", "", 0),
    "published_dice": Column("Dice, published", rounds=False),
    "published_hd95": Column("HD95, published"),
    "published_nonpositive_jacobian": Column("|J|≤0, published, %"),
    "published_sdlogj": Column("SDlogJ, published"),
    "published_nondiffeomorphic_volume": Column("Non-diffeomorphic volume, published, %"),
    "published_source": Column("Source"),
    "dataset": Column("Data set"),
    "dice_gain_over_none": Column("Gain over none, points", "", 2),
    "dice_loss_without": Column("Loss without, points", "", 2),
    "published_dice_gain": Column("Published effect (IDA-230692), % of Dice", "", 1),
    "scans": Column("Scans"),
    "flagged": Column("Flagged"),
    "warned": Column("Warned of"),
    "mask_overlap": Column("Mask overlap, median", "", 3),
    "mask_overlap_min": Column("Lowest", "", 3),
    "scan_seconds": Column("Time, s a scan", "", 1),
    "skull_strip_seconds": Column("Strip, s", "", 1),
    "denoise_seconds": Column("Denoise, s", "", 1),
    "bias_field_seconds": Column("N4, s", "", 1),
    "affine_seconds": Column("Affine, s", "", 1),
    "resample_seconds": Column("Resample, s", "", 1),
    "network": Column("Network"),
    "regularisation": Column("λ", "", None),
    "parameters": Column("Parameters"),
    "model": Column("Model"),
    "moving": Column("Moving scan"),
    "fixed": Column("Fixed scan"),
    "reason": Column("Reason"),
    "steps": Column("Steps"),
    "val_dice_before": Column("Val. Dice before", "", 3),
    "val_dice": Column("Val. Dice ↑", "", 3, "higher"),
    "kept_step": Column("Kept step"),
    "seconds_a_step": Column("Time, s a step ↓", "", None, "lower"),
    "training_seconds": Column("Training, s", "", 0),
    "waited_percent": Column("Waiting for images, %", "", 2),
    "training_memory_mb": Column("Training memory, MB", "", 0),
    "score": Column("Score"),
    "subjects": Column("n (subjects)"),
    "mean": Column("Mean", "", None),
    "mean_low": Column("95 % from", "", None),
    "mean_high": Column("95 % to", "", None),
    "mean_seed_sd": Column("Mean, sd over seeds", "", None),
    "subjects_both": Column("n (both)"),
    "difference": Column("Difference", "", None),
    "difference_low": Column("95 % from", "", None),
    "difference_high": Column("95 % to", "", None),
    "rank_biserial": Column("Rank-biserial r", "", 2),
    "p": Column("p", "", None),
    "p_holm": Column("p (Holm)", "", None),
    "smallest_p": Column("Smallest p", "", None),
    "smallest_p_holm": Column("Smallest p (Holm)", "", None),
    "structure": Column("Id"),
    "name": Column("Structure"),
    "left": Column("Left (id)"),
    "right": Column("Right (id)"),
    "both": Column("Midline or both (id)"),
}


def score_name(score: str, labels: str) -> str:
    """Return what a score is called where it names a row: its header without the arrow.

    Examples
    --------
    >>> score_name("hd95", "nearest")
    'HD95 (nearest), mm'
    """
    return COLUMNS[score].header.replace("{labels}", labels).rstrip(" ↑↓")
