"""The notebooks as a book: their order and groups, and the line in each that leads to its neighbours.

    python -m causaldpo_lib.book [--check]     write that line into every notebook (or name those that lack it)

Nothing is executed and no output changes. ``book/conf.py`` takes the table of contents from here.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from causaldpo_lib.errors import StudyError
from causaldpo_lib.parameters import declared_in
from causaldpo_lib.paths import NOTEBOOKS
from causaldpo_lib.pipeline import STAGES
from causaldpo_lib.records import shown

START = "00_start_here"
CELL = "navigation"  # id of the cell; ids are unique in a notebook
# In the order of the book. A notebook's group is read off it: see ``group``.
GROUPS = {
    "start": "Start",
    "compute": "Compute: one step of a study each",
    "read": "Read: what finished studies found",
    "understand": "Understand: the method taken apart",
}


def in_order(folder: Path = NOTEBOOKS) -> list[Path]:
    """The numbered notebooks of a folder, in the order of their numbers."""
    return sorted(folder.glob("[0-9]*.ipynb"))


def group(notebook: Path) -> str:
    """A key of ``GROUPS``: stages of a study compute, what declares ``tables`` reads, all others explain.

    Raises:
        StudyError: the notebook's parameters cannot be read.
    """
    if notebook.stem == START:
        return "start"
    if notebook.stem in {stage.notebook for stage in STAGES.values()}:
        return "compute"
    return "read" if "tables" in declared_in(notebook) else "understand"


def contents(folder: Path = NOTEBOOKS) -> str:
    """The table of contents as MyST Markdown for a page beside ``folder``: a list a group, empty ones left out."""
    found: dict[str, list[str]] = {name: [] for name in GROUPS}
    for notebook in in_order(folder):
        found[group(notebook)].append(f"/{folder.name}/{notebook.stem}")
    parts = [
        "\n".join(["```{toctree}", f":caption: {GROUPS[name]}", ":maxdepth: 1", "", *pages, "```"])
        for name, pages in found.items()
        if pages
    ]
    return "\n\n".join(parts)


def numbered(source: str, name: str) -> str:
    """A notebook's JSON with its number before its title, as other pages call it: ``06 Popularity amplification``."""
    content = json.loads(source)
    first = content["cells"][0]
    number = name.partition("_")[0]
    first["source"] = re.sub(r"\A# ", f"# {number} ", "".join(first["source"]))
    return json.dumps(content)


def navigation(notebook: Path, notebooks: Sequence[Path]) -> str:
    """One line of links: the notebook before, the contents, the notebook after; what does not exist is left out.

    Links are relative file names, which GitHub, JupyterLab and the book all follow.
    """
    place = notebooks.index(notebook)
    parts = [_link(f"← {_label(path)}", path) for path in notebooks[:place][-1:]]
    parts += [_link("contents", path) for path in notebooks if path.stem == START != notebook.stem]
    parts += [_link(f"{_label(path)} →", path) for path in notebooks[place + 1 :][:1]]
    return " · ".join(parts)


def _label(path: Path) -> str:
    return path.stem.replace("_", " ")


def _link(text: str, path: Path) -> str:
    return f"[{text}]({path.name})"


def with_navigation(content: dict[str, Any], line: str) -> dict[str, Any]:
    """A notebook's JSON that ends with the cell of ``line``; an earlier one is replaced, wherever it stands."""
    cells = [cell for cell in content["cells"] if cell.get("id") != CELL]
    cell = {"cell_type": "markdown", "id": CELL, "metadata": {}, "source": [line]}
    return {**content, "cells": [*cells, cell] if line else cells}


def stale(folder: Path = NOTEBOOKS) -> dict[Path, dict[str, Any]]:
    """The notebooks whose navigation is missing or out of date, with the content that they should have."""
    notebooks = in_order(folder)
    found = {}
    for path in notebooks:
        content = json.loads(path.read_text(encoding="utf-8"))
        renewed = with_navigation(content, navigation(path, notebooks))
        if renewed != content:
            found[path] = renewed
    return found


def renew(folder: Path = NOTEBOOKS) -> list[Path]:
    """Write the navigation of every notebook of a folder that needs it; returns those that changed."""
    changed = stale(folder)
    for path, content in changed.items():  # laid out as nbformat does
        text = json.dumps(content, indent=1, ensure_ascii=False, sort_keys=True)
        path.write_text(text + "\n", encoding="utf-8")
    return list(changed)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line (see the module's text); returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m causaldpo_lib.book", description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a notebook lacks it")
    options = parser.parse_args(arguments)
    try:
        found = list(stale()) if options.check else renew()
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for path in found:
        print(f"{'out of date' if options.check else 'renewed'}: {shown(path)}")
    return int(options.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
