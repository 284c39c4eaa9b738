"""Every path under the folder of results, each written once: of one file, or with wildcards, of all of a kind.

The stage comes first, then the cohort. What is not named is its wildcard: ``Paths("results").scans("oasis")`` is a file
and ``Paths("results").scans()`` the pattern of all such files.
"""

from __future__ import annotations

from dataclasses import dataclass

COHORT, SCAN, METHOD, MODEL, SHARD = "{cohort}", "{scan}", "{method}", "{model}", "{shard}"
MOVING, FIXED = "{moving}", "{fixed}"


@dataclass(frozen=True)
class Paths:
    """The paths below one folder of results.

    Attributes
    ----------
    results
        The folder; in rules Snakemake's own name for it, ``"<results>"``.
    """

    results: str

    def made(self, file: str, cohort: str = COHORT, scan: str = SCAN) -> str:
        """A file of a scan that a job makes."""
        return f"{self.results}/cohorts/{cohort}/{scan}/{file}"

    def scans(self, cohort: str = COHORT) -> str:
        """The table of a cohort's scans."""
        return f"{self.results}/cohorts/{cohort}/scans.csv"

    def preprocessed(self, file: str, cohort: str = COHORT, scan: str = SCAN) -> str:
        """A file of a scan on the grid: an image, labels, its affine, its quality."""
        return f"{self.results}/preprocessed/{cohort}/{scan}/{file}"

    def quality(self, cohort: str = COHORT) -> str:
        """The table of the quality of a cohort's scans."""
        return f"{self.results}/preprocessed/{cohort}/quality.csv"

    def contact_sheet(self, cohort: str = COHORT) -> str:
        """All preprocessed scans of a cohort on one sheet."""
        return f"{self.results}/preprocessed/{cohort}/contact_sheet.png"

    def packed(self, file: str, cohort: str = COHORT) -> str:
        """A file of the scans that the trainings of a cohort share."""
        return f"{self.results}/models/{cohort}/packed/{file}"

    def model(self, file: str, cohort: str = COHORT, method: str = METHOD, model: str = MODEL) -> str:
        """A file of a trained model: its weights, its history, what was measured."""
        return f"{self.results}/models/{cohort}/{method}/{model}/{file}"

    def fields(self, cohort: str = COHORT, method: str = METHOD, model: str = MODEL, shard: str = SHARD) -> str:
        """The folder of a shard's displacement fields."""
        return f"{self.results}/registered/{cohort}/{method}/{model}/{shard}"

    def records(self, cohort: str = COHORT, method: str = METHOD, model: str = MODEL, shard: str = SHARD) -> str:
        """The table of what registering a shard took, and of what failed."""
        return f"{self.fields(cohort, method, model, shard)}.csv"

    def examples(self, cohort: str = COHORT, method: str = METHOD, model: str = MODEL, shard: str = SHARD) -> str:
        """The folder of a shard's registered pairs that are kept to be drawn; mostly there is none in it."""
        return f"{self.results}/registered/{cohort}/{method}/{model}/examples-{shard}"

    def scores_of_shard(self, kind: str, run: str = f"{COHORT}/{METHOD}/{MODEL}/{SHARD}") -> str:
        """The scores of a shard, ``kind`` being ``structures`` or ``pairs``."""
        return f"{self.results}/scores/{run}.{kind}.parquet"

    def scores(self, file: str, study: str = "") -> str:
        """A table of all scores: of the methods that are compared, or of a study's."""
        return f"{self.results}/scores/{study}{'.' if study else ''}{file}"

    def provenance(self, study: str = "") -> str:
        """The record of what the scores depend on."""
        return f"{self.results}/provenance/{study or 'run'}.json"

    def table(self, file: str) -> str:
        """A file of a table."""
        return f"{self.results}/tables/{file}"

    def figure(self, file: str) -> str:
        """A file of a figure."""
        return f"{self.results}/figures/{file}"

    def product(self, file: str) -> str:
        """A file of a table or figure, its folder named."""
        return f"{self.results}/{file}"

    def report(self) -> str:
        """The report."""
        return f"{self.results}/report.html"

    def snakemake_report(self) -> str:
        """Snakemake's own report."""
        return f"{self.results}/snakemake-report.html"

    def configuration(self) -> str:
        """The configuration as it was last used, command line included."""
        return f"{self.results}/configuration.yaml"
