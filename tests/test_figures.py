"""Published figures are those that the published tables give: each csv beside a png is drawn again, without ink."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from causaldpo_lib import plots, recovery, workflow
from causaldpo_lib.paths import FIGURES, NOTEBOOKS, PARAMS, RESULTS
from causaldpo_lib.study import load_study

STUDIES = sorted(
    path.stem
    for path in (PARAMS / "studies").glob("*.yaml")
    # one of these is there once a study is published
    if any((FIGURES / path.stem / f"{table}.csv").exists() for table in ("metrics", "datasets", "reranking"))
)


def inkless(function):
    """A stand-in for a function that draws: nothing is drawn, and what it returns takes any call."""
    returns = str(inspect.signature(function).return_annotation)
    if function is plots.panels:
        return function  # as many axes as notebooks loop over
    if not any(name in returns for name in ("Axes", "Figure", "Image")) and returns != "None":
        return function  # a name or a number, which captions need
    return lambda *arguments, **options: MagicMock()


def redraw(notebook: Path, tables: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a reading notebook's code on ``tables``; of its figures only the plotted values are written."""

    def save(fig: object, stem: str, data: pd.DataFrame, folder: str | Path) -> Path:
        if Path(folder) != target:  # of a further study that the notebook shows beside this one, which has its own
            assert Path(folder).parent == RESULTS / "figures"
            return Path(folder) / f"{stem}.png"
        data.to_csv(target / f"{stem}.csv", index=False, float_format="%.6g")
        return target / f"{stem}.png"

    for name, function in inspect.getmembers(plots, inspect.isfunction):
        monkeypatch.setattr(plots, name, inkless(function))
    monkeypatch.setattr(plots, "save", save)
    monkeypatch.setattr(plt, "close", lambda figure=None: None)  # which takes no stand-in
    monkeypatch.setattr("IPython.display.display", lambda *shown, **options: None)
    monkeypatch.setattr("builtins.print", lambda *words, **options: None)
    space = {"__name__": notebook.stem}
    monkeypatch.setitem(sys.modules, notebook.stem, MagicMock())
    monkeypatch.chdir(NOTEBOOKS)
    for cell in json.loads(notebook.read_text("utf8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{notebook.name}, cell {cell['id']}", "exec"), space)
            if "parameters" in cell["metadata"].get("tags", []):
                space |= {"tables": str(tables), "figures": str(target)}


def differences(published: Path, drawn: Path, tables: set[str]) -> dict[str, str]:
    """The csv files of figures that only one folder has, or that differ; ``tables`` are the study's own."""
    names = [{path.stem for path in folder.glob("*.csv")} - tables for folder in (published, drawn)]
    found = {name: "not drawn by any notebook" for name in names[0] - names[1]}
    found |= {name: "not published" for name in names[1] - names[0]}
    for name in names[0] & names[1]:
        values = [pd.read_csv(folder / f"{name}.csv") for folder in (published, drawn)]
        try:
            pd.testing.assert_frame_equal(*values, rtol=1e-5)  # six digits are written
        except AssertionError as error:
            found[name] = str(error).splitlines()[0]
    return found


@pytest.mark.parametrize("name", STUDIES)
def test_published_figures_show_the_published_tables(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    study = load_study(name)
    notebooks, tables = [*workflow.reading(study)], {*workflow.tables_of(study)}
    if (FIGURES / name / "recovery.csv").exists():  # of a command of its own
        notebooks, tables = [*notebooks, "14_environment_recovery"], tables | {*recovery.TABLES}
    with monkeypatch.context() as patch:
        for notebook in notebooks:
            redraw(NOTEBOOKS / f"{notebook}.ipynb", FIGURES / name, tmp_path, patch)
    plt.close("all")
    found = differences(FIGURES / name, tmp_path, tables)
    assert not found, f"run `make publish STUDY={name}`"
    pictures = {path.stem for path in (FIGURES / name).glob("*.png")}
    assert pictures == {path.stem for path in tmp_path.glob("*.csv")}


def test_a_stale_a_missing_and_a_left_over_figure_are_found(tmp_path: Path):
    for folder, stems in (("published", ["same", "stale", "left", "table"]), ("drawn", ["same", "stale", "new"])):
        (tmp_path / folder).mkdir()
        for stem in stems:
            value = 2 if (folder, stem) == ("drawn", "stale") else 1
            pd.DataFrame({"x": [value]}).to_csv(tmp_path / folder / f"{stem}.csv", index=False)
    found = differences(tmp_path / "published", tmp_path / "drawn", {"table"})
    assert set(found) == {"stale", "left", "new"} and "different" in found["stale"]
