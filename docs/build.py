"""Make the documentation's site of the pages as they stand in this checkout: `make docs`.

The pages link one another, and files beside them, by paths of the checkout, as a person or a forge follows them. They
are gathered in a folder with the same paths, together with every file that they link; a link that leads nowhere, or to
a heading that is not there, ends the build. Nothing of the site is fetched when it is looked at.
"""

import argparse
import logging
import re
import shutil
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)\s#]+)(#[^)\s]*)?\)")
MERMAID = re.compile(r"```mermaid\n(.*?)```", re.DOTALL)
FROM_ELSEWHERE = re.compile(r"""<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=["']?(https?:)?//""")
PUBLIC = {
    "Fields": ["dmir.fields"],
    "Losses": ["dmir.losses"],
    "Scores": ["dmir.metrics"],
    "Methods": ["dmir.methods"],
    "Networks": ["dmir.networks"],
    "Images": ["dmir.volumes"],
    "Structures": ["dmir.structures"],
    "Errors": ["dmir.errors"],
}
API = "# API\n\nWhat is public, from its docstrings. [From Python](docs/python.md) has the first lines to write.\n"


def pages() -> list[Path]:
    """Return the pages of the checkout, by their paths in it."""
    folders = ("docs", "config", "profiles", "resources", "benchmarks")
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.md"))]
    return [
        path.relative_to(ROOT) for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *found)
    ]


def gather(folder: Path) -> list[str]:
    """Copy pages and what they link into a folder; return what is wrong with their links."""
    problems = []
    for page in pages():
        text = (ROOT / page).read_text(encoding="utf-8")
        for _, target, _ in LINK.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            if not re.match(r"\w+:", target):
                problems += _linked(page, target, folder)
        place = folder / ("index.md" if page == Path("README.md") else page)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(_for_site(page, text), encoding="utf-8")
    shutil.copy(ROOT / "docs" / "site.css", folder / "docs")
    parts = [f"\n## {title}\n\n" + "".join(f"::: {name}\n" for name in names) for title, names in PUBLIC.items()]
    (folder / "api.md").write_text(API + "".join(parts), encoding="utf-8")
    return problems


def _linked(page: Path, target: str, folder: Path) -> list[str]:
    """Copy what a page links, if it is no page itself."""
    path = (ROOT / page.parent / target).resolve()
    if not path.exists() or not path.is_relative_to(ROOT):
        return [f"{page}: {target} is not there"]
    if path.is_file() and path.suffix != ".md":
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return []


def _for_site(page: Path, text: str) -> str:
    """Return a page's text with links as the site has its pages, and the graph drawn."""

    def link(match: re.Match) -> str:
        sign, target, anchor = match[1], match[2], match[3] or ""
        path = (ROOT / page.parent / target).resolve()
        if re.match(r"\w+:", target) or sign or not path.exists():
            return match[0]
        if path.is_dir():  # a forge shows its README; here that is the page
            target = f"{target.rstrip('/')}/README.md" if (path / "README.md").is_file() else target
        if path == ROOT / "README.md":
            target = target.replace("README.md", "index.md")
        return match[0].replace(f"({match[2]}{anchor})", f"({target}{anchor})")

    return MERMAID.sub(lambda match: "```text\n" + _as_lines(match[1]) + "```", LINK.sub(link, text))


def _as_lines(graph: str) -> str:
    """Return a graph's arrows as lines, a line a box: its script would have to be fetched."""
    following: dict[str, list[str]] = {}
    for line in graph.splitlines():
        names = [re.sub(r"^\|[^|]*\||[\[({].*", "", part.strip()).strip() for part in line.split("-->")]
        for first, second in pairwise(names):
            following.setdefault(first, []).append(second)
    width = max(map(len, following), default=0)
    return "".join(f"{name:<{width}} -> {', '.join(after)}\n" for name, after in following.items())


def build(site: Path) -> list[str]:
    """Build the site, strictly; return what is wrong."""
    from mkdocs.commands.build import build as build_site
    from mkdocs.config import load_config
    from mkdocs.exceptions import MkDocsException

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "pages")
        folder.mkdir()
        problems = gather(folder)
        settings = (ROOT / "docs" / "mkdocs.yml").read_text(encoding="utf-8").replace("SOURCES", str(ROOT / "src"))
        configuration = Path(name, "mkdocs.yml")
        configuration.write_text(settings, encoding="utf-8")
        try:
            config = load_config(str(configuration), docs_dir=str(folder), site_dir=str(site), strict=True)
            build_site(config)
        except (MkDocsException, SystemExit) as error:
            problems.append(f"mkdocs: {error}")
    fetched = [path for path in site.rglob("*.html") if FROM_ELSEWHERE.search(path.read_text(encoding="utf-8"))]
    return [*problems, *(f"{path.relative_to(site)} fetches something from elsewhere" for path in fetched)]


def main() -> int:
    """Build into ``site/``, or with ``--check`` into nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="build, and keep nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "site")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with tempfile.TemporaryDirectory() as scratch:
        site = Path(scratch, "site") if options.check else options.out
        problems = build(site)
    for problem in problems:
        print(f"Error: {problem}", file=sys.stderr)
    if not problems and not options.check:
        print(f"The site is {site / 'index.html'}: open it in a browser. Its search wants a server, if only")
        print(f"{Path(sys.executable).name} -m http.server --directory {site}")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
