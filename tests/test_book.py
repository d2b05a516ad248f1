"""The book: it builds without a warning, its links hold, it needs no network, and no notebook is missing from it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from causaldpo_lib import book
from causaldpo_lib.errors import StudyError

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|//")  # a scheme, or a host
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """What the checks need of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.links: list[str] = []  # where its references lead, inside the book or out of it
        self.loads: list[str] = []  # what a browser fetches to show it
        self.anchors: set[str] = set()
        self.prose: list[str] = []  # text outside code and formulas
        self.contents: dict[str, list[str]] = {}  # caption -> links of the contents
        self.math = 0
        self._open: list[tuple[str, str]] = []
        self._caption = ""
        self.feed(html)

    def _inside(self, *names: str) -> bool:
        return any(tag in names or set(names) & set(kind.split()) for tag, kind in self._open)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.anchors |= {found[name] for name in ("id", "name") if name in found}
        self.math += "math" in found.get("class", "").split()
        for name in {"href", "src"} & set(found):
            self.links.append(found[name])
            if tag not in ("a", "area"):
                self.loads.append(found[name])
        if tag == "a" and self._inside("toctree-wrapper"):
            self.contents.setdefault(self._caption, []).append(found["href"])
        if tag not in VOID:
            self._open.append((tag, found.get("class", "")))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._inside("toctree-wrapper") and self._inside("caption-text"):
            self._caption = data
        if not self._inside("script", "style", "pre", "code", "math"):
            self.prose.append(data)


def pages(folder: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text("utf8")) for path in sorted(folder.rglob("*.html"))}


def broken_links(found: dict[Path, Page]) -> list[str]:
    """Links to a file that is not there, or to a place that its page does not have."""
    broken = []
    for path, page in found.items():
        for link in page.links:
            name, _, anchor = link.partition("#")
            if ELSEWHERE.match(link):
                continue
            target = (path.parent / unquote(name.partition("?")[0])).resolve() if name else path
            there = found[target].anchors if target in found else {anchor}
            if not target.is_file() or (anchor and unquote(anchor) not in there):
                broken.append(f"{path.name}: {link}")
    return broken


def foreign(found: dict[Path, Page], folder: Path) -> list[str]:
    """Scripts, styles, fonts and images that a browser would fetch from elsewhere."""
    loads = [f"{path.name}: {link}" for path, page in found.items() for link in page.loads if ELSEWHERE.match(link)]
    styles = {path: path.read_text("utf8") for path in folder.rglob("*.css")}
    named = re.compile(r"(?:url\(|@import )[\"']?((?:https?:)?//[^\"')]+)")
    loads = [link for link in loads if not re.search(r": data:", link)]
    return loads + [f"{path.name}: {link}" for path, text in styles.items() for link in named.findall(text)]


def raw_formulas(found: dict[Path, Page]) -> list[str]:
    """Formulas that a reader would see as LaTeX."""
    left = re.compile(r"\$\$|\$[^$\s][^$\n]*\$|\\begin\{|\\(?:frac|mathrm|sum|lambda)\b")
    return [f"{path.name}: {text.strip()}" for path, page in found.items() for text in page.prose if left.search(text)]


def build(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """As `make book` does it."""
    options = ["-n", "-W", "--keep-going", "-q", "-b", "html", "-d", str(target / "doctrees"), "-c", str(ROOT / "book")]
    command = [sys.executable, "-m", "sphinx", *options, str(source), str(target / "html")]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The book of this repository."""
    target = tmp_path_factory.mktemp("book")
    done = build(ROOT, target)
    assert done.returncode == 0, done.stderr
    return target / "html"


@pytest.fixture(scope="module")
def found(html: Path) -> dict[Path, Page]:
    return pages(html)


# The book


def test_every_link_leads_somewhere(found: dict[Path, Page]):
    assert not broken_links(found)


def test_nothing_comes_from_elsewhere(found: dict[Path, Page], html: Path):
    assert not foreign(found, html)


def test_formulas_are_rendered_by_the_book_s_own_mathjax(found: dict[Path, Page], html: Path):
    assert not raw_formulas(found)
    with_math = [page for page in found.values() if page.math]
    assert with_math and all(any("tex-svg.js" in link for link in page.loads) for page in with_math)
    assert (html / "_static" / "mathjax-license.txt").read_text("utf8").count("Apache License")


def test_the_contents_name_every_notebook_once_in_its_group(found: dict[Path, Page], html: Path):
    contents = found[html / "index.html"].contents
    expected = {book.GROUPS[name]: [] for name in book.GROUPS}
    for path in book.in_order():
        expected[book.GROUPS[book.group(path)]].append(f"notebooks/{path.stem}.html")
    assert {**contents, "About": []} == {**{name: links for name, links in expected.items() if links}, "About": []}
    assert [caption for caption in contents if caption != "About"] == [name for name in expected if expected[name]]


def test_titles_carry_the_numbers_by_which_pages_call_them(found: dict[Path, Page], html: Path):
    for path in book.in_order():
        page = (html / "notebooks" / f"{path.stem}.html").read_text("utf8")
        assert f"<h1>{path.stem[:2]} " in page


# The checks


def test_the_checks_find_what_is_broken(tmp_path: Path):
    (tmp_path / "b.html").write_text('<h1 id="here">B</h1>')
    (tmp_path / "s.css").write_text('@font-face { src: url("https://fonts.example/f.woff") } p { src: url(x.png) }')
    (tmp_path / "a.html").write_text(
        '<a href="b.html#here">good</a><a href="https://example.org">good</a><a href="missing.html">1</a>'
        '<a href="b.html#there">2</a><a href="#nowhere">3</a><img src="missing.png"><br>'
        '<img src="data:image/png;base64,">'
        '<script src="https://cdn.example/x.js"></script><link rel="stylesheet" href="//cdn.example/y.css">'
        "<p>as $$x^2$$ or $x$ or \\frac{1}{2}</p><code>$HOME and $PATH</code><p>for $5 or more</p>"
        '<span class="math">\\(x\\) and $y$</span>'
    )
    found = pages(tmp_path)
    assert broken_links(found) == [
        *("a.html: missing.html", "a.html: b.html#there", "a.html: #nowhere", "a.html: missing.png")
    ]
    assert foreign(found, tmp_path) == [
        *("a.html: https://cdn.example/x.js", "a.html: //cdn.example/y.css", "s.css: https://fonts.example/f.woff")
    ]
    assert raw_formulas(found) == ["a.html: as $$x^2$$ or $x$ or \\frac{1}{2}"]


def notebook(*markdown: str, tables: bool = False) -> str:
    """A notebook's JSON: its Markdown cells, then the parameters."""
    cells = [{"cell_type": "markdown", "id": f"m{i}", "metadata": {}, "source": s} for i, s in enumerate(markdown)]
    source = 'tables = "x"' if tables else "seed = 1"
    parameters = {"tags": ["parameters"]}
    code = {"cell_type": "code", "id": "c", "metadata": parameters, "source": source}
    cells.append({**code, "outputs": [], "execution_count": 1})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return json.dumps({"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5})


def test_broken_links_of_a_notebook_stop_the_build(tmp_path: Path):
    source = tmp_path / "source"
    (source / "notebooks").mkdir(parents=True)
    for name in ("CONTRIBUTING", "CHANGELOG"):
        (source / f"{name}.md").write_text(f"# {name}\n")
    (source / "README.md").write_text("# Front page\n\nIntro.\n\n## Part\n\n[20](notebooks/20_b.ipynb#here)\n")
    (source / "notebooks" / "20_b.ipynb").write_text(notebook("# B", "## Here"))
    links = "[1](20_b.ipynb#here) [2](missing.ipynb) [3](20_b.ipynb#nowhere) ![4](../figures/missing.png)"
    (source / "notebooks" / "19_a.ipynb").write_text(notebook("# A", links))
    done = build(source, tmp_path)
    warnings = [line for line in done.stderr.splitlines() if "WARNING" in line]
    assert done.returncode != 0 and len(warnings) == 3
    for word in ("missing.ipynb", "nowhere", "missing.png"):
        assert any(word in line and "19_a.ipynb" in line for line in warnings)


# Groups and navigation


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, tables in (("00_start_here", False), ("01_data_and_shifts", False), ("06_b", True), ("11_c", False)):
        (tmp_path / f"{name}.ipynb").write_text(notebook(f"# {name}", tables=tables))
    return tmp_path


def test_groups_are_read_off_the_notebooks(folder: Path):
    assert [book.group(path) for path in book.in_order(folder)] == ["start", "compute", "read", "understand"]
    (folder / "12_d.ipynb").write_text("{}")
    with pytest.raises(StudyError, match=r"12_d\.ipynb is missing or not a notebook"):
        book.contents(folder)


def test_navigation_leads_to_the_neighbours_and_the_contents(folder: Path):
    lines = [book.navigation(path, book.in_order(folder)) for path in book.in_order(folder)]
    assert lines == [
        "[01 data and shifts →](01_data_and_shifts.ipynb)",
        "[← 00 start here](00_start_here.ipynb) · [contents](00_start_here.ipynb) · [06 b →](06_b.ipynb)",
        "[← 01 data and shifts](01_data_and_shifts.ipynb) · [contents](00_start_here.ipynb) · [11 c →](11_c.ipynb)",
        "[← 06 b](06_b.ipynb) · [contents](00_start_here.ipynb)",
    ]


def test_renewing_adds_one_cell_and_changes_no_other(folder: Path):
    before = {path: json.loads(path.read_text("utf8"))["cells"] for path in book.in_order(folder)}
    assert book.renew(folder) == list(before)
    for path, cells in before.items():
        *rest, last = json.loads(path.read_text("utf8"))["cells"]
        assert rest == cells and (last["id"], last["cell_type"]) == (book.CELL, "markdown")
    assert not book.renew(folder)
    (folder / "06_b.ipynb").unlink()
    assert [path.stem for path in book.stale(folder)] == ["01_data_and_shifts", "11_c"]
    book.renew(folder)
    assert "06_b" not in "".join(path.read_text("utf8") for path in book.in_order(folder))


def test_a_notebook_alone_gets_no_navigation(tmp_path: Path):
    (tmp_path / "01_a.ipynb").write_text(notebook("# A"))
    assert not book.renew(tmp_path)


def test_navigation_of_the_notebooks_is_up_to_date():
    found = [path.name for path in book.stale()]
    assert not found, "run `python -m causaldpo_lib.book`"
