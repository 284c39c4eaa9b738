"""The report: one page that needs nothing beside it: tables, figures, pairs to look at, and what all was made from.

:mod:`~dmir.report.page.summary` says what was found, :mod:`~dmir.report.page.contents` reads tables and figures,
:mod:`~dmir.report.page.viewer` packs volumes, :mod:`~dmir.report.page.times` adds up benchmarks,
:mod:`~dmir.report.page.surroundings` tells machine and versions, :mod:`~dmir.report.page.document` joins them.
"""

from dmir.report.page.document import ASSETS, write_page

__all__ = ["ASSETS", "write_page"]
