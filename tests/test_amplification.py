"""Shares over settings: every number is a row of paired.csv, and the sentences follow the numbers."""

import inspect

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import pytest
import yaml

from causaldpo_lib import amplification, pipeline, plots
from causaldpo_lib import study as studies
from causaldpo_lib.data.simulated import simulate
from causaldpo_lib.evaluation import share_metric

UP, DOWN, NOTHING = (0.1, 0.05, 0.15, 0.006), (-0.1, -0.15, -0.05, 0.006), (0.01, -0.02, 0.04, 0.6)


def tables(**settings):
    """The paired differences of settings: for each, what `dpo - sft` and `popularity_negatives - sft` are."""
    rows = []
    for setting, changes in settings.items():
        for method, numbers in zip(("dpo", "popularity_negatives"), changes, strict=False):
            for split in ("iid_test", "ood_test"):
                found = dict(zip(("difference", "low", "high", "p_holm"), numbers, strict=True))
                found["low"] -= 1e-9 * len(setting)  # two settings never have the same numbers
                key = {"setting": setting.replace("_", "-"), "split": split, "metric": share_metric("mass", "G1")}
                rows.append({**key, "method": method, "baseline": "sft", **found})
    paired = pd.DataFrame(rows)
    return {"paired": paired, "metrics": paired.drop(columns="method").assign(method="sft")}


def test_strengths_come_from_the_study_s_file():
    known = {"simulated-none": 0.0, "simulated-weak": 1.5, "simulated-strong": 3.0}
    assert amplification.strengths("simulated") == known
    assert amplification.strengths("baselines") == {} == amplification.strengths("no such study")


def test_strengths_may_stand_in_the_study_s_own_section(tmp_path, monkeypatch):
    settings = [
        {"dataset": "simulated", "shift": "iid"},
        {"dataset": "simulated", "shift": "temporal", "data": {"test_examples": 5}},
        {"dataset": "simulated", "shift": "popularity", "data": {"dataset_options": {"strength": 0.5}}},
        {"dataset": "simulated", "shift": "environment", "data": {"dataset_options": {}}},
    ]
    content = {"settings": settings, "methods": [], "seeds": [], "data": {"dataset_options": {"strength": 2.5}}}
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies" / "mine.yaml").write_text(yaml.safe_dump(content))
    for module in (amplification, studies):
        monkeypatch.setattr(module, "PARAMS", tmp_path)
    own = amplification.strength_of({})
    assert list(amplification.strengths("mine").values()) == [2.5, 2.5, 0.5, own]
    jobs = studies.jobs(studies.load_study("mine"))
    laid_out = {job.setting: amplification.strength_of(job.parameters["dataset_options"]) for job in jobs}
    assert amplification.strengths("mine") == laid_out
    del content["data"]  # what is left is the notebook's
    (tmp_path / "studies" / "mine.yaml").write_text(yaml.safe_dump(content))
    declared = amplification.strength_of(pipeline.declared("data")["dataset_options"])
    assert list(amplification.strengths("mine").values()) == [declared, declared, 0.5, own]


def test_changes_are_in_points_and_a_setting_of_two_studies_is_that_of_the_first():
    studies = {"one": tables(a=[UP]), "simulated": tables(a=[DOWN], simulated_none=[DOWN, NOTHING])}
    found = amplification.share_changes(studies)
    assert len(found) == 2 + 4
    assert found.loc[found["setting"] == "a", ["mean", "low", "high"]].drop_duplicates().values.tolist() == [
        [pytest.approx(10), pytest.approx(5), pytest.approx(15)]
    ]
    assert found.set_index("setting")["strength"].drop_duplicates().fillna(-1).tolist() == [-1, 0]
    assert found["word"].tolist() == ["raised"] * 2 + ["lowered"] * 2 + ["no detectable change"] * 2


@pytest.mark.parametrize(
    ("none", "strong", "says", "not_said"),
    [
        (
            UP,
            UP,
            ["needs no confounder", "of 3 settings raised in 3 (", "so adds +0.0 points [-7.1, +7.1]"],
            ["lowered in 1"],
        ),
        (
            DOWN,
            UP,
            ["raised in 2 (", "lowered in 1 (simulated-none (-10.0", "so adds +20.0 points [+12.9, +27.1]"],
            ["needs no"],
        ),
        (NOTHING, NOTHING, ["raised in 1 (a", "lowered in none", "without any confounding"], ["needs no"]),
    ],
)
def test_the_cause_is_read_off_the_setting_without_confounding(none, strong, says, not_said):
    studies = {"other": tables(a=[UP]), "simulated": tables(simulated_none=[none], simulated_strong=[strong])}
    said = amplification.causes_takeaway(amplification.share_changes(studies))
    assert all(text in said for text in says)
    assert not any(text in said for text in not_said)


def test_without_known_strengths_or_steps_nothing_is_said_about_them():
    said = amplification.causes_takeaway(amplification.share_changes({"other": tables(a=[UP])}))
    assert "confound" not in said and "strength" not in said and "popularity-proportional" not in said
    assert said.count("\n- ") == 1


def test_the_takeaway_answers_for_causaldpo_and_its_control():
    studies = {"one": tables(a=[UP])}
    paired = studies["one"]["paired"]
    more = [paired.assign(method=method, baseline="dpo") for method in ("causal_dpo", "shuffled")]
    studies["one"]["paired"] = pd.concat([paired, *more])
    said = amplification.causes_takeaway(amplification.share_changes(studies)).splitlines()
    assert said[3].startswith("- CausalDPO against DPO: of 1 settings raised in 1 (a (+10.0")
    assert said[4].startswith("- Its shuffled control against DPO: of 1 settings raised in 1") and len(said) == 5
    assert amplification.changes_caption(amplification.share_changes({"other": tables(a=[UP])})).endswith("users.*")


def test_every_setting_has_its_row_in_every_panel():
    studies = {"other": tables(a=[UP, DOWN]), "simulated": tables(simulated_none=[NOTHING])}
    changes = amplification.share_changes(studies)
    fig = plots.share_changes(changes, "points", "title")
    assert len(fig.axes) == 2
    for ax, name in zip(fig.axes, ("DPO − SFT", "Popularity negatives − SFT"), strict=True):
        rows = changes[changes["name"] == name]
        drawn = sorted(
            float(line.get_xdata()[0]) for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata())
        )
        assert drawn == pytest.approx(sorted(rows["mean"]))
    assert [text.get_text() for text in fig.axes[0].get_yticklabels()] == ["a", "simulated-none"]
    plt.close(fig)


def test_the_same_runs_under_another_name_count_once():
    studies = {"one": tables(a=[UP, DOWN]), "two": tables(b=[UP, DOWN], simulated_none=[UP, DOWN])}
    found = amplification.share_changes(studies)
    assert found["setting"].unique().tolist() == ["a", "simulated-none"] and len(found) == 8


def test_strength_is_the_simulator_s_own_unless_it_is_set():
    assert amplification.strength_of({"strength": 0}) == 0
    assert amplification.strength_of({}) == inspect.signature(simulate).parameters["strength"].default
