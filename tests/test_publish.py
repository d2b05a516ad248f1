"""Publishing copies what the present study names, renews the README and the notebooks, and refuses what is stale."""

import pandas as pd
import pytest
from fabricated import setting

from causaldpo_lib import study as studies
from causaldpo_lib import tables, workflow
from causaldpo_lib.errors import StudyError

ORDER = ["01_a.ipynb", "02_b.ipynb", "00_start_here.ipynb"]  # the overview shows what the others took


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A repository of its own with a finished study ``quick``; notebooks are noted instead of executed."""
    for name in ("figures/quick", "notebooks", "results/quick"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("02_b", "01_a", "00_start_here"):
        (tmp_path / "notebooks" / f"{name}.ipynb").write_text('{"cells": []}')
    found = tables.collect_jobs(setting(tmp_path / "runs", "simulated-environment", truth=True))
    for name, table in found.items():
        table.to_csv(tmp_path / "results" / "quick" / f"{name}.csv", index=False)
    (tmp_path / "README.md").write_text("top\n<!-- quick results -->\n<!-- end -->\nbottom\n")
    executed = []
    monkeypatch.setattr(studies, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(workflow, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(workflow, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(workflow, "ROOT", tmp_path)
    monkeypatch.setattr(workflow, "smoke_folder", lambda stage: tmp_path / "runs" / stage)
    monkeypatch.setattr(workflow, "execute_in_place", lambda path: executed.append(path.name))
    monkeypatch.setattr(workflow, "plan", lambda study: [])
    return tmp_path, executed


def test_publish_replaces_the_study_s_files_and_renews_what_quotes_them(place):
    root, executed = place
    made_apart = {"recovery.csv", "recovery_probe.csv", "recovery_batch.csv", "recovery-strength.png"}
    names = {"shares-mass-simulated-environment.png", "shares-mass-removed-setting.png", "tables.log.txt"}
    for name in names | made_apart:
        (root / "results" / "quick" / name).write_text("new")
    (root / "figures" / "quick" / "stale.png").write_text("old")
    workflow.publish(studies.load_study("quick"))
    copied = {path.name for path in (root / "figures" / "quick").iterdir()}
    assert {"metrics.csv", "paired.csv", "shares.csv", "groups.csv", "diagnostics.csv"} <= copied
    assert {"shares-mass-simulated-environment.png", *made_apart} <= copied
    assert not copied & {"stale.png", "shares-mass-removed-setting.png", "tables.log.txt"}
    assert "**simulated-environment, OOD test**" in (root / "README.md").read_text()
    assert executed == ORDER
    for name in made_apart:
        (root / "results" / "quick" / name).unlink()
    workflow.publish(studies.load_study("quick"))  # by someone who has not run that command: what is there stays
    assert made_apart <= {path.name for path in (root / "figures" / "quick").iterdir()}


def test_publish_links_the_notebooks_and_keeps_their_times(place):
    root, _ = place
    workflow.publish(studies.load_study("quick"))
    assert "[02 b →](02_b.ipynb)" in (root / "notebooks" / "01_a.ipynb").read_text()
    times = pd.read_csv(root / "figures" / "notebooks.csv")
    assert times["notebook"].tolist() == ["01_a", "02_b"] and (times["seconds"] >= 0).all()


def test_a_study_of_data_alone_publishes_its_tables_and_figures(place):
    root, executed = place
    folder = root / "results" / "datasets"
    folder.mkdir()
    names = ["datasets.csv", "datasets_summary.csv", "datasets-time.png", "datasets-time.csv"]
    for name in (*names, "snakemake.log", "older-popularity.png"):
        (folder / name).write_text("new")
    workflow.publish(studies.load_study("datasets"))
    assert {path.name for path in (root / "figures" / "datasets").iterdir()} == set(names)
    assert executed == ORDER


def test_figures_of_a_setting_whose_name_ends_like_another_s_stay_behind(place):
    root, _ = place
    (root / "results" / "quick" / "shares-mass-notsimulated-environment.png").write_text("old")
    workflow.publish(studies.load_study("quick"))
    assert not list((root / "figures" / "quick").glob("*notsimulated*"))


def test_a_stale_study_is_refused_and_nothing_touched(place, monkeypatch):
    root, executed = place
    (root / "figures" / "quick" / "kept.png").write_text("old")
    monkeypatch.setattr(workflow, "plan", lambda study: [workflow.Step("rank dpo seed 1", "its result is missing")])
    with pytest.raises(StudyError, match=r"quick is not up to date .*: run `make study STUDY=quick`"):
        workflow.publish(studies.load_study("quick"))
    assert (root / "figures" / "quick" / "kept.png").exists() and not executed
