"""Tables and figures from the scores.

Tables: :mod:`~dmir.report.tables` (the numbers and the notes that go with them) and :mod:`~dmir.report.writing` (CSV,
Markdown, LaTeX, terminal). Figures: :mod:`~dmir.report.boxplot`, :mod:`~dmir.report.tradeoffs`,
:mod:`~dmir.report.curves`, :mod:`~dmir.report.qualitative`, each saved by :func:`dmir.report.style.save_figure`.
What there is stands in :mod:`~dmir.report.products`, how each is made from files in :mod:`~dmir.report.making`.
Nothing is imported here: a table should not wait for a plotting library.
"""
