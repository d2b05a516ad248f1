"""What a notebook shows: no noise, no table too wide to read, links that hold, no result typed by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_repo import NOTEBOOKS, PAGES, ROOT, headings, links, relative

from causaldpo_lib import book

COLUMNS = 12  # of a displayed table; more do not fit any page
NOISE = re.compile(
    r"\r|\d+%\|"  # a progress bar
    r"|\bit/s\b|\bs/it\b"
    r"|\b\w*Warning\b|Traceback \(most recent call last\)"
)
# Decimals, percentages and amounts: what a result looks like.
RESULT = re.compile(r"(?<![\w.@])(?:\d+(?:\.\d+)?\s?(?:%|(?:points|nats)\b)|\d+\.\d+(?![\w.]*\w))")
# What is no result: code, formulas, addresses; numbers of papers and of their parts; levels of intervals and tests.
ASIDE = re.compile(
    r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)"
    r"|arXiv\s[\d., ]*\d"
    r"|\b(?:Eqs?|Figs?|Tables?|Sections?|Appendix|Appendices|Propositions?|Theorems?|Lemmas?)\.?\s[A-Z\d][\w.]*"
    r"|\b95\s%|\b0\.05\b",
    re.S,
)
# Figures quoted from elsewhere, or settings; everything that this study measured is computed where it is shown.
QUOTED = {
    "08_results_tables": {"90 %"},  # coverage of the intervals, from the simulation in stats.py
    "10_published_numbers": {"0.23", "0.28", "0.005 points"},  # 1 / log2(21), 1 / log2(12); half a printed digit
    "13_dynamicpo": {"0.85 %", "100 %"},  # hours that the paper adds; all of a group
    "14_environment_recovery": {"0.5"},  # DBSCAN's radius in the released code
    "15_ablations": {"0.001"},  # lambda in the released code
    "21_dpo4rec_results": {"3.92 %", "1.45 %"},  # the paper's gains
}


def content(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf8"))


def outputs(notebook: dict) -> Iterator[dict]:
    for cell in notebook["cells"]:
        yield from cell.get("outputs", [])


def text_of(output: dict, kind: str = "text/plain") -> str:
    """An output's text: of a stream, or of a display in one format."""
    return "".join(output.get("text", output.get("data", {}).get(kind, "")))


def noise(notebook: dict) -> list[str]:
    """Outputs that a reader should be spared: warnings, progress bars, widgets, which are empty without a kernel."""
    found = []
    for output in outputs(notebook):
        widget = "application/vnd.jupyter.widget-view+json" in output.get("data", {})
        stderr = output.get("name") == "stderr"
        match = NOISE.search(text_of(output)) if output["output_type"] == "stream" else None
        if widget or stderr or match:
            found.append("widget" if widget else text_of(output)[:80] if stderr else match[0])
    return found


def unreadable_tables(notebook: dict, columns: int = COLUMNS) -> list[str]:
    """Displayed tables with more columns than that, or from which pandas left out rows or columns."""
    found = []
    for output in outputs(notebook):
        html = text_of({"data": output.get("data", {})}, "text/html")
        widest = max((row.count("<td") for row in re.findall(r"<tr.*?</tr>", html, re.S)), default=0)
        cut = re.search(r"<p>\d+ rows × \d+ columns</p>", html)
        if widest > columns or cut:
            found.append(cut[0] if cut else f"{widest} columns")
    return found


def typed_results(notebook: dict) -> list[str]:
    """Numbers in Markdown cells that look like results."""
    prose = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    found = [match[0] for text in prose for match in RESULT.finditer(ASIDE.sub(" ", text))]
    return [re.sub(r"\s", " ", figure) for figure in found]


def prose(notebook: dict) -> str:
    """All Markdown of a notebook, written and displayed."""
    written = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown"]
    return "\n\n".join([*written, *(text_of(output, "text/markdown") for output in outputs(notebook))])


def broken_links(page: Path, shown: str, tracked: set[Path]) -> list[str]:
    """Relative links of a page to what is not tracked, or to a heading that its target does not have."""
    broken = []
    for link in links(shown):
        name, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:|//", link):
            continue
        target = (page.parent / name).resolve() if name else page
        there = target in tracked or any(target in path.parents for path in tracked)
        if there and anchor and target.suffix in (".md", ".ipynb"):
            text = prose(content(target)) if target.suffix == ".ipynb" else target.read_text("utf8")
            there = anchor in headings(text)
        if not there:
            broken.append(link)
    return broken


@pytest.fixture(params=NOTEBOOKS, ids=relative)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(scope="module")
def tracked() -> set[Path]:
    from test_repo import FILES

    return set(FILES)


def test_outputs_are_free_of_noise(path: Path):
    assert not noise(content(path))


def test_tables_can_be_read(path: Path):
    assert not unreadable_tables(content(path))


def test_links_of_a_notebook_hold(path: Path, tracked: set[Path]):
    assert not broken_links(path, prose(content(path)), tracked)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_of_pages_into_notebooks_hold(page: Path, tracked: set[Path]):
    assert not broken_links(page, page.read_text("utf8"), tracked)


def test_results_are_computed_not_typed(path: Path):
    if book.group(path) in ("start", "read"):
        assert set(typed_results(content(path))) <= QUOTED.get(path.stem, set())


def test_quoted_figures_are_still_quoted():
    for stem, figures in QUOTED.items():
        assert figures <= set(typed_results(content(ROOT / "notebooks" / f"{stem}.ipynb"))), stem


def test_the_readme_lists_every_notebook():
    page = (ROOT / "README.md").read_text("utf8")
    assert not [relative(path) for path in NOTEBOOKS if f"]({relative(path)})" not in page]


# The checks


def made(*found: dict, markdown: str = "") -> dict:
    """A notebook of one Markdown cell and one cell with these outputs."""
    return {"cells": [{"cell_type": "markdown", "source": [markdown]}, {"cell_type": "code", "outputs": list(found)}]}


def stream(text: str, name: str = "stdout") -> dict:
    return {"output_type": "stream", "name": name, "text": [text]}


def shown(**data: str) -> dict:
    return {"output_type": "display_data", "data": {key.replace("_", "/", 1): value for key, value in data.items()}}


def test_noise_is_found():
    bar, warning = stream(" 40%|████      | 2/5 [00:01<00:02]"), stream("x.py:3: FutureWarning: gone soon\n")
    widget = {"output_type": "display_data", "data": {"application/vnd.jupyter.widget-view+json": {}}}
    assert noise(made(bar, warning, stream("anything", "stderr"), widget)) == [
        *(" 40%|"[1:], "FutureWarning", "anything", "widget")
    ]
    assert not noise(made(stream("step 3 of 5, 40 % done, 2 s left"), shown(text_markdown="no Warning here")))


def test_wide_and_shortened_tables_are_found():
    row = "<tr><th>0</th>{}</tr>"
    wide, narrow = (row.format("<td>1</td>" * count) for count in (COLUMNS + 1, COLUMNS))
    cut = narrow + "<p>99 rows × 3 columns</p>"
    assert unreadable_tables(made(shown(text_html=wide), shown(text_html=narrow), shown(text_html=cut))) == [
        *(f"{COLUMNS + 1} columns", "<p>99 rows × 3 columns</p>")
    ]


@pytest.mark.parametrize("typed", ["0.42", "12 %", "12%", "3 points", "0.1 nats", "rises from 1.5 to 2.5, say"])
def test_typed_results_are_found(typed: str):
    assert typed_results(made(markdown=f"HR is {typed}."))


@pytest.mark.parametrize(
    "spared",
    [
        *("arXiv 2603.22335, Fig. 2 and Section 3.7", "[arXiv 2603.22335](https://arxiv.org/abs/2603.22335)"),
        *("brackets hold 95 % intervals", "p of at most 0.05", "`lambda = 0.5`", "$\\beta = 0.1$", "$$x = 1.5$$"),
        *("Table 8, Appendix B.3", "groups G1 to G5, 3 seeds, top-10", "HR@10 points up"),
    ],
)
def test_what_is_no_result_is_spared(spared: str):
    assert not typed_results(made(markdown=spared))


def test_broken_links_are_found(tmp_path: Path):
    page, other = tmp_path / "a.ipynb", tmp_path / "b.ipynb"
    other.write_text(json.dumps(made(markdown="# Title\n\n## Some part")))
    text = "[1](b.ipynb) [2](b.ipynb#some-part) [3](c.ipynb) ![4](x/y.png) [5](b.ipynb#other) [6](https://example.org)"
    assert broken_links(page, text, {page, other}) == ["c.ipynb", "x/y.png", "b.ipynb#other"]
