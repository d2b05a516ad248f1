"""What runs cost: medians of finished ones, what an estimate takes from whom, and that it is printed and honest."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest
import yaml

from causaldpo_lib import costs, pipeline, workflow
from causaldpo_lib.errors import StudyError
from causaldpo_lib.paths import PARAMS
from causaldpo_lib.study import jobs, load_study

QUICK = yaml.safe_load((PARAMS / "studies" / "quick.yaml").read_text())
HERE = "simulated-environment"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Empty results and figures, in which runs would be."""
    monkeypatch.setattr(pipeline, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(costs, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(costs, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(costs, "BESIDE", 0.0)
    return tmp_path


def study(folders, **change):
    """Two methods and two seeds of the quick study, with something changed."""
    content = {**QUICK, "methods": ["sft", "dpo"], "sweeps": [], "comparisons": [], "seeds": [1, 2], **change}
    (folders / "mine.yaml").write_text(yaml.safe_dump(content))
    return load_study(folders / "mine.yaml")


def named(found, label):
    """The one job whose label begins so."""
    [job] = [job for job in found if job.label.startswith(label + " ")]
    return job


def finish(job, seconds, **content):
    """Leave the summary that a run of this job would leave; ``content`` says what is otherwise."""
    job.folder.mkdir(parents=True, exist_ok=True)
    summary = {
        "stage": job.stage,
        "setting": job.folder.parent.name,
        "name": job.folder.name,
        "parameters": dict(job.parameters),
        "device": "cpu",
        "wall_seconds": seconds,
    }
    (job.folder / "summary.json").write_text(json.dumps({**summary, **content}))


def publish(folders, name, *rows):
    """A published costs.csv with these (setting, stage, method, seconds)."""
    path = folders / "figures" / name / "costs.csv"
    path.parent.mkdir(parents=True)
    rows = [(*row[:3], 1, row[3], "cpu") for row in rows]
    pd.DataFrame(rows, columns=costs.COLUMNS).to_csv(path, index=False)
    return path


def table(*rows):
    """Known costs of these (setting, stage, method, seconds)."""
    rows = [(*row[:3], 1, row[3], "cpu", "a.csv") for row in rows]
    return pd.DataFrame(rows, columns=[*costs.COLUMNS, "source"])


def seconds_of(known):
    return {(row.setting, row.stage, row.method): row.seconds for row in known.itertuples()}


# --- measured ---


def test_a_row_is_the_median_of_the_finished_seeds_under_the_study_s_name_of_the_setting(folders):
    found = jobs(study(folders, settings=[{**QUICK["settings"][0], "name": "mine"}], seeds=[1, 2, 3, 4]))
    for seed, seconds in ((1, 10.0), (2, 80.0), (3, 30.0)):
        finish(named(found, f"align dpo seed {seed}"), seconds)
    finish(named(found, "sft seed 2"), 7.5, device="NVIDIA H100")
    (named(found, "sft seed 1").folder).mkdir()
    assert costs.cost_rows(found) == [
        {"setting": "mine", "stage": "align", "method": "dpo", "runs": 3, "seconds": 30.0, "device": "cpu"},
        {"setting": "mine", "stage": "sft", "method": "", "runs": 1, "seconds": 7.5, "device": "NVIDIA H100"},
    ]


def test_no_finished_run_no_row(folders):
    assert costs.cost_rows(jobs(study(folders))) == []


# --- known ---


def test_runs_of_another_seed_are_known_and_those_of_other_parameters_are_not(folders):
    found = jobs(study(folders))
    finish(named(jobs(study(folders, seeds=[9])), "align dpo seed 9"), 40.0)
    finish(named(jobs(study(folders, seeds=[8])), "rank dpo seed 8"), 6.0)
    trial = jobs(study(folders, align={**QUICK["align"], "batch_size": 3}))
    finish(named(trial, "align dpo seed 1"), 1.0)
    other_data = jobs(study(folders, data={**QUICK["data"], "test_examples": 3}))
    finish(named(other_data, "sft seed 1"), 2.0)
    assert seconds_of(costs.known_costs(found)) == {
        (HERE, "align", "dpo"): 40.0,
        (HERE, "rank", "dpo"): 6.0,  # not that of sft, whose ranking has the same parameters
        (HERE, "align", costs.ELSE): 1.0,
        (HERE, "sft", costs.ELSE): 2.0,
    }


def test_a_run_precedes_the_study_s_published_costs_and_these_others(folders):
    found = jobs(study(folders))
    finish(named(found, "align dpo seed 2"), 40.0)
    rows = [(HERE, "align", "dpo", 1.0), (HERE, "sft", "", 2.0), (HERE, "data", "", 3.0)]
    publish(folders, "another", *rows)
    own = publish(folders, "mine", *((*row[:3], 10 * row[3]) for row in rows[:2]))
    known = costs.known_costs(found, "mine")
    assert seconds_of(known) == {(HERE, "align", "dpo"): 40.0, (HERE, "sft", ""): 20.0, (HERE, "data", ""): 3.0}
    assert known.source.tolist() == [
        (folders / "results/runs").as_posix(),
        own.as_posix(),
        f"{folders}/figures/another/costs.csv",
    ]


def test_what_is_written_is_what_is_read(folders):
    found = jobs(study(folders))
    finish(named(found, "sft seed 1"), 3.25)
    finish(named(found, "rank dpo seed 1"), 4.0)
    rows = costs.cost_rows(found)
    path = publish(folders, "mine")
    pd.DataFrame(rows).to_csv(path, index=False)
    known = costs.known_costs([], "mine")
    assert known[known.source == path.as_posix()][costs.COLUMNS].to_dict("records") == rows


def test_a_run_without_a_time_or_with_a_damaged_summary_is_passed_over(folders):
    found = jobs(study(folders))
    for seed, text in ((1, json.dumps({"stage": "sft"})), (2, "{ not json")):
        folder = named(found, f"sft seed {seed}").folder
        folder.mkdir(parents=True)
        (folder / "summary.json").write_text(text)
    assert costs.cost_rows(found) == []
    assert costs.known_costs(found).empty


@pytest.mark.parametrize(
    "text", ["", "setting,stage\na,b\n", "setting,stage,method,runs,seconds,device\na,b,,1,soon,cpu\n"]
)
def test_a_file_that_is_no_table_of_costs_is_named(folders, text):
    publish(folders, "another").write_text(text)
    with pytest.raises(StudyError, match=r"figures/another/costs\.csv is no table of costs: .*, or delete it"):
        costs.known_costs([])


# --- estimated ---


def test_a_time_comes_from_the_nearest_runs_that_have_one(folders, monkeypatch):
    job = named(jobs(study(folders)), "align dpo seed 1")
    rows = [
        ("yelp-temporal", "align", "dpo", 1000.0),
        ("simulated-iid", "align", "dpo", 100.0),
        (HERE, "align", "ipo", 10.0),
        (HERE, "align", "kto", 30.0),
        (HERE, "align", "dpo", 1.0),
    ]
    for kept, seconds, known in ((5, 1.0, 1), (4, 20.0, 0), (2, 100.0, 0), (1, 1000.0, 0)):
        found = costs.estimate([job], table((HERE, "rank", "dpo", 5e6), *rows[:kept]))
        assert (found.seconds, found.known, found.guessed, found.unknown) == (seconds, known, 1 - known, 0)
        assert found.sources == (("a.csv",) if known else ())
    found = costs.estimate([job], table((HERE, "rank", "dpo", 5e6)))
    assert (found.seconds, found.known, found.guessed, found.unknown) == (0.0, 0, 0, 1)
    monkeypatch.setattr(costs, "BESIDE", 4.0)
    assert costs.estimate([job, job], table(*rows)).seconds == 2 * (1.0 + 4.0)


def test_settings_of_a_study_count_by_their_names(folders):
    first = QUICK["settings"][0]
    settings = [{**first, "name": "weak"}, {**first, "name": "strong", "data": {"test_examples": 9}}]
    found = [job for job in jobs(study(folders, settings=settings)) if job.stage == "data"]
    both = costs.estimate(found, table(("weak", "data", "", 1.0), ("strong", "data", "", 100.0)))
    assert (both.seconds, both.known) == (101.0, 2)
    elsewhere = [("simulated-iid", "data", "", 5e6), ("yelp-iid", "data", "", 6e6)]
    one = costs.estimate(found, table(("weak", "data", "", 1.0), (HERE, "data", costs.ELSE, 7.0), *elsewhere))
    assert (one.seconds, one.known, one.guessed) == (8.0, 1, 1)
    none = costs.estimate(found[1:], table(("strong", "data", costs.ELSE, 9.0), *elsewhere))
    assert (none.seconds, none.known, none.guessed) == (9.0, 0, 1)


def test_runs_that_wait_for_each_other_cannot_share_the_time(folders):
    times = [
        ("data", "", 60.0),
        ("sft", "", 600.0),
        ("align", "dpo", 6000.0),
        ("rank", "sft", 6.0),
        ("rank", "dpo", 60.0),
    ]
    known = table(*((HERE, *row) for row in times), (HERE, "environments", "", 0.0))
    every = jobs(study(folders))
    found = costs.estimate(every, known)
    assert found.seconds == 60 + 2 * (600 + 6000 + 6 + 60)
    assert found.longest == 60 + 600 + 6000 + 60
    assert costs.sentence(found, 1).startswith("estimated 3 h 43 min on 1 core")  # 13,392 s
    assert costs.sentence(found, 64).startswith("estimated 1 h 52 min on 64 cores")  # 6,720 s
    assert costs.sentence(found, 2, threads=2).startswith("estimated 3 h 43 min on 2 cores")
    # inputs that are there already are not waited for
    left = [named(every, "align dpo seed 1"), named(every, "rank dpo seed 1")]
    assert costs.estimate(left, known).longest == 6060


FOUND = costs.Estimate(6720.0, 60.0, 312, 312, 0, 0, ("figures/baselines/costs.csv", "results/runs"), ("cpu",))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {},
            "estimated 56 min on 2 cores (312 runs; times of 312 known from figures/baselines/costs.csv and"
            " results/runs; measured on cpu)",
        ),
        (
            {"known": 208, "guessed": 80, "unknown": 24, "devices": ("NVIDIA H100", "cpu"), "sources": ("a.csv",)},
            "estimated 56 min on 2 cores (312 runs; times of 208 known from a.csv; 80 guessed from other runs of their"
            " stage, whatever their model; 24 of unknown time left out; measured on NVIDIA H100 and cpu)",
        ),
        (
            {"known": 0, "guessed": 312, "sources": (), "seconds": 8.0, "longest": 1.0},
            "estimated 1 min on 2 cores (312 runs; 312 guessed from other runs of their stage, whatever their model;"
            " measured on cpu)",
        ),
        (
            {"known": 0, "unknown": 312, "seconds": 0.0, "longest": 0.0, "sources": (), "devices": ()},
            "no estimate of the time: nothing like the 312 runs was timed before",
        ),
    ],
)
def test_the_sentence_says_what_it_rests_on(change, sentence):
    assert costs.sentence(replace(FOUND, **change), 2) == sentence


# --- printed ---


def steps(*labels):
    return [workflow.Step(label, "Missing output files: x") for label in labels]


def test_a_plan_ends_with_the_cost_of_what_is_left(folders, monkeypatch, capsys):
    mine = study(folders)
    found = jobs(mine)
    publish(folders, "mine", (HERE, "align", "dpo", 600.0), (HERE, "rank", "dpo", 60.0), (HERE, "sft", "", 6e6))
    publish(folders, "another", (HERE, "align", "dpo", 5e6))
    left = [named(found, "align dpo seed 2").label, named(found, "rank dpo seed 2").label, "tables of mine"]
    monkeypatch.setattr(workflow, "plan", lambda study: steps(*left))
    monkeypatch.setattr(workflow, "machine_cores", lambda: 3)
    workflow.show_plan(mine)
    said = capsys.readouterr()
    assert said.out.splitlines() == [
        *(f"{label}: its result is missing" for label in left),
        "study mine: 3 steps would run",
    ]
    source = (folders / "figures/mine/costs.csv").as_posix()
    assert said.err == f"estimated 11 min on 3 cores (2 runs; times of 2 known from {source}; measured on cpu)\n"
    workflow.show_plan(mine, cores=8)
    assert "on 8 cores" in capsys.readouterr().err


@pytest.mark.parametrize("left", [(), ("tables of mine", "08_results_tables of mine")])
def test_a_plan_without_runs_has_no_cost(folders, monkeypatch, capsys, left):
    monkeypatch.setattr(workflow, "plan", lambda study: steps(*left))
    workflow.show_plan(study(folders))
    assert capsys.readouterr().err == ""


def test_runs_that_share_a_folder_are_one_run(folders, monkeypatch, capsys):
    usual = {**pipeline.declared("rank"), **QUICK.get("rank", {})}["beam_width"]
    sweeps = [{"method": "sft", "stage": "rank", "key": "beam_width", "values": [usual]}]
    mine = study(folders, methods=["sft"], sweeps=sweeps, seeds=[1])
    ranked = [job for job in jobs(mine) if job.stage == "rank"]
    assert len(ranked) == 2 and ranked[0].folder == ranked[1].folder
    publish(folders, "mine", (HERE, "rank", "sft", 600.0), (HERE, "rank", ranked[1].method, 600.0))
    monkeypatch.setattr(workflow, "plan", lambda study: steps(ranked[1].label))  # as Snakemake calls the two
    workflow.show_plan(mine, cores=1)
    assert capsys.readouterr().err.startswith("estimated 10 min on 1 core (1 run; times of 1 known")


def test_a_run_says_its_cost_before_it_starts(folders, monkeypatch, capsys):
    mine = study(folders)
    found = jobs(mine)
    labels = [named(found, f"sft seed {seed}").label for seed in (1, 2)]
    publish(folders, "mine", (HERE, "sft", "", 600.0))

    def execute(*_):
        print("working")
        return [("data", "  error: enough")]

    monkeypatch.setattr(workflow, "RESULTS", folders / "results")
    monkeypatch.setattr(workflow, "plan", lambda study: steps(*labels))
    monkeypatch.setattr(workflow, "_execute", execute)
    with pytest.raises(StudyError, match="1 step of study mine failed"):
        workflow.run(mine, cores=4, threads=4)
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("estimated 20 min on 4 cores (2 runs; times of 2 known from ")
    assert second == "working"
