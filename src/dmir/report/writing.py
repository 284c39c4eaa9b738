"""Tables on disk and on the terminal: CSV, Markdown, LaTeX, HTML and plain text."""

from __future__ import annotations

from dataclasses import replace
from html import escape
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from dmir.report.columns import score_name
from dmir.report.layout import Mark, Sheet, lay_out
from dmir.report.names import method_name
from dmir.report.origin import Origin, write_sidecar
from dmir.volumes import atomic_path

TERMINAL_COLUMNS = (
    "method",
    "n",
    "failed",
    "dice",
    "hd95",
    "nonpositive_jacobian_forward",
    "nondiffeomorphic_volume",
    "endpoint_error",
    "seconds",
)
STYLE = (
    "body{font:15px sans-serif;margin:1.5em;background:#fff;color:#111}table{border-collapse:collapse}"
    "th,td{padding:.35em .8em;border-bottom:1px solid #ccc}td{white-space:nowrap}"
    "th{border-bottom:2px solid #333;vertical-align:bottom}"
    "tr:hover td{background:#f2f2f2}.right{text-align:right}.left{text-align:left}p{max-width:60em}"
)
TEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "[": "{[}",  # after the \\ of a row a bracket or a star would be its argument
    "]": "{]}",
    "*": "{*}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "≤": r"$\leq$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "→": r"$\rightarrow$",
    "−": r"$-$",
    "×": r"$\times$",
    "λ": r"$\lambda$",
    "–": "--",
    "…": r"\ldots{}",
    "✓": r"$\checkmark$",
    "†": r"\textsuperscript{\dag}",
}


def tex_escape(text: str) -> str:
    """Return the text with everything that LaTeX would interpret written out, and mathematical signs as commands."""
    return "".join(TEX.get(character, character) for character in text)


def to_markdown(sheet: Sheet, caption: str = "", note: str = "") -> str:
    """Return a pipe table, aligned in the source too; the best of each group in bold."""

    def bold(text: str, mark: Mark) -> str:
        return f"**{text}**" if mark == "best" else text

    cells = [
        [bold(text, mark).replace("|", r"\|") for text, mark in zip(line, marks, strict=True)]
        for line, marks in zip(sheet.cells, sheet.marks, strict=True)
    ]
    body = tabulate(
        cells,
        headers=[header.replace("|", r"\|") for header in sheet.headers],
        tablefmt="pipe",
        disable_numparse=True,
        colalign=["right" if numeric else "left" for numeric in sheet.numeric],
    )
    return "\n\n".join(part for part in (caption, body, note) if part) + "\n"


def to_tex(sheet: Sheet, caption: str = "", note: str = "", label: str = "") -> str:
    """Return a booktabs table (packages amssymb, booktabs and graphicx): best in bold, second underlined."""
    commands: dict[Mark, str] = {"best": r"\textbf{%s}", "second": r"\underline{%s}", "": "%s"}
    lines = ["% needs \\usepackage{amssymb,booktabs,graphicx}", r"\begin{table*}", r"\centering"]
    if caption:
        lines.append(rf"\caption{{{tex_escape(caption)}}}")
    if label:
        lines.append(rf"\label{{tab:{label}}}")
    lines += [
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%",
        rf"\begin{{tabular}}{{{''.join('r' if numeric else 'l' for numeric in sheet.numeric)}}}",
        r"\toprule",
        " & ".join(_stacked(header, numeric) for header, numeric in zip(sheet.headers, sheet.numeric, strict=True))
        + r" \\",
        r"\midrule",
    ]
    for i, (cells, marks) in enumerate(zip(sheet.cells, sheet.marks, strict=True)):
        if i in sheet.breaks:
            lines.append(r"\midrule")
        texts = [commands[mark] % tex_escape(text) for text, mark in zip(cells, marks, strict=True)]
        lines.append(" & ".join(texts) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}}"]
    if note:
        lines += [r"\par\smallskip", r"\begin{minipage}{\linewidth}\footnotesize"]
        lines += [tex_escape(paragraph) + r"\par" for paragraph in note.splitlines() if paragraph]
        lines += [r"\end{minipage}"]
    return "\n".join([*lines, r"\end{table*}", ""])


def to_html(sheet: Sheet, caption: str = "", note: str = "") -> str:
    """Return a page of its own with the table: the best of each group in bold, the second underlined."""
    tags: dict[Mark, str] = {"best": "<b>{}</b>", "second": "<u>{}</u>", "": "{}"}
    sides = ["right" if numeric else "left" for numeric in sheet.numeric]

    def line(tag: str, texts: list[str]) -> str:
        return "<tr>" + "".join(f'<{tag} class="{s}">{t}</{tag}>' for s, t in zip(sides, texts, strict=True)) + "</tr>"

    rows = [
        line("td", [tags[mark].format(escape(text)) for text, mark in zip(texts, marks, strict=True)])
        for texts, marks in zip(sheet.cells, sheet.marks, strict=True)
    ]
    notes = "".join(f"<p>{escape(part)}</p>" for part in note.split("\n\n") if part)
    head = line("th", [escape(header) for header in sheet.headers])
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(caption)}</title>'
        f"<style>{STYLE}</style></head><body>\n<p>{escape(caption)}</p>\n<table><thead>{head}</thead>\n<tbody>\n"
        + "\n".join(rows)
        + f"\n</tbody></table>\n{notes}</body></html>\n"
    )


def _stacked(header: str, numeric: bool) -> str:
    """Break a header at its commas, so that the numbers and not their headers make a column wide."""
    lines = r"\\".join(tex_escape(line) for line in header.split(", "))
    return rf"\shortstack[{'r' if numeric else 'l'}]{{{lines}}}" if ", " in header else tex_escape(header)


def _sheet(table: pd.DataFrame, across: bool) -> Sheet:
    """Lay a table out: scores that name rows by their names, a rule between them, and a † where the table has one."""
    shown = table.drop(columns=table.attrs.get("only_in_csv", []))
    breaks: set[int] = set()
    if "score" in shown:
        scores = [str(score) for score in shown["score"]]
        breaks = {i for i in range(1, len(scores)) if scores[i] != scores[i - 1]}
        names = [score_name(score, str(labels)) for score, labels in zip(scores, shown["labels"], strict=True)]
        shown = shown.assign(score=names)
    sheet = lay_out(shown, across=across)
    cells = [list(line) for line in sheet.cells]
    marked = {column: rows for column, rows in table.attrs.get("daggers", {}).items() if rows}
    for column, rows in marked.items():
        # laid out alone, the column has the header that it has in the table
        alone = lay_out(shown.filter(items=[column, f"{column}_sd", "labels"]), across=across)
        place = sheet.headers.index(alone.headers[0])
        for i in rows:
            cells[i][place] += " †"
    return replace(sheet, cells=cells, breaks=sheet.breaks | breaks)


def write_table(
    table: pd.DataFrame,
    path: str | Path,
    caption: str = "",
    note: str = "",
    *,
    across: bool | None = None,
    origin: Origin | None = None,
) -> list[Path]:
    """Write a table as .csv (full precision), .md, .tex and .html (rounded), each all at once.

    Parameters
    ----------
    table
        What :func:`comparison_table` and its like return; notes that travel with it (``table.attrs["note"]``) are
        written below it, before ``note``; so do the cells that are marked with a † (``table.attrs["daggers"]``,
        column -> positions of rows) and the columns that only the .csv has (``table.attrs["only_in_csv"]``).
    path
        Without a suffix.
    caption, note
        One line above and paragraphs below, plain text.
    across
        Rank along rows instead of down columns; by default what the table itself says.
    origin
        What the table was made from: a line in each file but the .csv, and a sidecar ``.json`` for all four.

    Returns
    -------
    list of Path
        The files, in this order.
    """
    path = Path(path)
    across = bool(table.attrs.get("across", False)) if across is None else across
    note = "\n\n".join(part for part in (str(table.attrs.get("note", "")), note) if part)
    sheet = _sheet(table, across)
    texts = {
        ".csv": table.to_csv(index=False, lineterminator="\n"),
        ".md": to_markdown(sheet, caption, note),
        ".tex": to_tex(sheet, caption, note, label=path.name),
        ".html": to_html(sheet, caption, note),
    }
    written = []
    for suffix, text in texts.items():
        target = path.with_name(path.name + suffix)
        with atomic_path(target) as temporary:
            temporary.write_text(text + _told(origin, suffix), encoding="utf-8")
        written.append(target)
    return written if origin is None else [*written, write_sidecar(origin, path, written)]


def _told(origin: Origin | None, suffix: str) -> str:
    """Return the origin as a comment of a format; a CSV has no comments."""
    comments = {".md": "\n<!-- {} -->\n", ".tex": "% {}\n", ".html": "<!-- {} -->\n"}
    return "" if origin is None or suffix not in comments else comments[suffix].format(origin.line())


def format_for_terminal(table: pd.DataFrame) -> str:
    """Return a comparison table as compact plain text: a block a cohort, ``*`` after the best of each column."""
    groups = [("", table)] if "cohort" not in table else list(table.groupby("cohort", sort=False))
    blocks = []
    for cohort, part in groups:
        names = [name for name in TERMINAL_COLUMNS if name in part]
        spreads = [name + "_sd" for name in names if name + "_sd" in part]
        sheet = lay_out(part[[*names, *spreads, *(["labels"] if "labels" in part else [])]], short=True)
        cells = [
            [f"{text}{'*' if mark == 'best' else ' '}" for text, mark in zip(texts, marks, strict=True)]
            for texts, marks in zip(sheet.cells, sheet.marks, strict=True)
        ]
        body = _plain([f"{header} " for header in sheet.headers], cells, sheet.numeric)
        schemes = "/".join(sorted(set(part["labels"].dropna().astype(str)))) if "labels" in part else ""
        title = f"{cohort}: mean ± sd over pairs" + (f", labels warped by {schemes} interpolation" if schemes else "")
        blocks.append(f"{title}\n{body}")
    legend = "* best of the column (ties share it; Affine only is the starting point and not ranked)"
    return "\n\n".join([*blocks, legend]) + "\n"


def format_statistics(table: pd.DataFrame, reference: str, score: str = "dice") -> str:
    """Return what a table of statistics says of one score as compact plain text: a block a cohort."""
    blocks = []
    shown = ["method", "subjects", "mean", "mean_low", "mean_high", "difference", "difference_low", "difference_high"]
    for cohort, part in table[table["score"] == score].groupby("cohort", sort=False):
        sheet = lay_out(part[[*shown, "p", "p_holm"]], short=True)
        title = f"{cohort}: {score_name(score, str(part['labels'].iloc[0]))} over subjects, difference from "
        title += f"{method_name(reference, short=True)} (Wilcoxon, Holm)"
        blocks.append(f"{title}\n{_plain(sheet.headers, sheet.cells, sheet.numeric)}")
    return "\n\n".join(blocks) + "\n"


def _plain(headers: list[str], cells: list[list[str]], numeric: list[bool]) -> str:
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    lines = [headers, ["-" * width for width in widths], *cells]
    return "\n".join(
        " ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )
