"""Studies of re-rankers: their jobs, and their tables by hand and from small runs of every method."""

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from causaldpo_lib import costs, knowledge, pipeline, reranking, stages, stats, study, workflow
from causaldpo_lib.errors import StudyError
from causaldpo_lib.paths import PARAMS
from causaldpo_lib.rerankers import RERANKERS
from causaldpo_lib.study import jobs, load_method, load_study

SMALL = {
    "settings": [{"dataset": "simulated", "shift": "environment"}],
    "methods": ["dlcm", "prm", "set_rank"],
    "seeds": [1, 2],
    "data": {"dataset_options": {"users": 40, "items": 40, "length": 14}},
    "dpo4rec": {
        **{"users": 0, "list_size": 8, "pool": 20, "training_lists": 2, "initial_epochs": 2, "samples": 2, "rounds": 1},
        **{"teaching_texts": 2, "teaching_epochs": 1.0, "teaching_learning_rate": 3e-3, "max_new_tokens": 24},
        **{"reranking_epochs": 2, "embedding": 8, "hidden": 8},
    },
}


def written(folder, **change):
    (folder / "small.yaml").write_text(yaml.safe_dump({**SMALL, **change}))
    return load_study(folder / "small.yaml")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The small study's jobs, all of them run."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        for module in (pipeline, study):
            patch.setattr(module, "RESULTS", root)
        small = written(root)
        for job in jobs(small):
            stages.execute(job.stage, {**job.parameters, "run": ""})
        yield small


# --- the study ---


def test_there_is_a_method_for_every_reranker():
    methods = [load_method(path.stem) for path in (PARAMS / "methods").glob("*.yaml")]
    assert {method.overrides["dpo4rec"]["reranker"] for method in methods if method.reranks} == set(RERANKERS)


def test_a_study_of_rerankers_is_data_and_one_run_per_method_and_seed(tmp_path):
    found = written(tmp_path)
    assert [(job.stage, job.method, job.seed) for job in jobs(found)] == [
        ("data", None, None),
        *(("dpo4rec", method, seed) for seed in (1, 2) for method in ("dlcm", "prm", "set_rank")),
    ]
    assert {job.parameters["reranker"] for job in jobs(found)[1:]} == set(RERANKERS)
    assert len({str({**job.parameters, "method": 0, "reranker": 0, "seed": 0}) for job in jobs(found)[1:]}) == 1
    assert workflow.writer(found) == "reranking" and workflow.tables_of(found) == workflow.RERANKING_TABLES
    assert set(workflow.RERANKING_TABLES) == set(reranking.TABLES)
    assert workflow._belongs(found, "reranking_rounds") and not workflow._belongs(found, "metrics")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"methods": ["prm", "dpo"]}, "prm is a re-ranker and dpo is not: give each kind a study of its own"),
        ({"comparisons": [["prm", "dlcm"]]}, "re-rankers are compared row by row in their own tables"),
        (
            {"sweeps": [{"method": "prm", "stage": "align", "key": "epochs", "values": [1.0]}]},
            "prm-epochs-1.0 is a re-ranker without a stage align: remove its section",
        ),
        ({"dpo4rec": {"reranker_": "prm"}}, r"dpo4rec: unknown parameter 'reranker_' \(did you mean"),
        ({"dpo4rec": {"method": "x"}}, "dpo4rec: method comes from the study's settings"),
    ],
)
def test_a_bad_study_of_rerankers_is_refused(tmp_path, change, sentence):
    with pytest.raises(StudyError, match=sentence) as caught:
        written(tmp_path, **change)
    assert "small.yaml" in str(caught.value)


def test_a_sweep_of_a_reranker_is_a_method_of_its_own(tmp_path):
    sweep = {"method": "prm", "stage": "dpo4rec", "key": "loss_options.beta", "values": [0.1, 1.0]}
    found = jobs(written(tmp_path, methods=["prm"], sweeps=[sweep], seeds=[1]))
    assert [job.parameters["loss_options"] for job in found[1:]] == [{"beta": 0.1}, {"beta": 0.1}, {"beta": 1.0}]
    assert [job.method for job in found[1:]] == ["prm", "prm-beta-0.1", "prm-beta-1.0"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo4rec", "dpo4rec-paper"])
def test_the_studies_can_be_planned(name):
    steps = workflow.plan(load_study(name))
    found = load_study(name)
    after = {f"{last} of {name}" for last in ("tables", *workflow.reading(found))}
    assert {step.label for step in steps} <= {job.label for job in jobs(found)} | after
    assert len(jobs(found)) == len(found.settings) * (1 + 9)


# --- the tables ---


def test_every_method_runs_and_has_its_rows(finished):
    tables = reranking.collect(finished)
    assert set(tables) == set(reranking.TABLES)
    rows = {"initial", "backbone", "kar", "knowledge", "dpo4rec_1", "shuffled"}
    metrics = {f"{name}@{k}" for name in ("ndcg", "map") for k in (1, 3, 5, 10)}
    levels = tables["reranking"]
    assert len(levels) == 3 * len(rows) * len(metrics) * 3
    assert set(levels["row"]) == rows and set(levels["metric"]) == metrics and set(levels["seeds"]) == {2}
    assert ((levels["low"] <= levels["mean"]) & (levels["mean"] <= levels["high"])).all()
    # The initial order knows no seed and no re-ranker: lists are common to all.
    same = levels[levels["row"] == "initial"].groupby(["split", "metric"])["mean"].nunique()
    assert (same == 1).all()
    assert set(tables["costs"]["stage"]) == {"data", "dpo4rec"}
    rounds = tables["reranking_rounds"]
    assert set(rounds["metric"]) == {"reward", "reward_gain", "validation", "validation_gain"}
    assert (rounds.loc[(rounds["round"] == 0) & rounds["metric"].str.endswith("gain"), "mean"] == 0).all()


def test_tables_survive_writing_and_are_shown(finished, capsys, monkeypatch):
    files = reranking.write(finished)
    assert {path.stem for path in files} == set(reranking.TABLES)
    text = reranking.summary_text(finished.folder)
    assert "simulated-environment, OOD test: " in text and "2 seeds" in text
    assert "SetRank NDCG@5 %" in text and "+ DPO4Rec, round 1" in text and "nan" not in text
    page = reranking.markdown_table(finished.folder, "simulated-environment", "iid_test")
    assert page.startswith("| row | DLCM NDCG@5 % |") and "| + KAR | " in page
    assert reranking.main([str(finished.path)]) == 0
    assert "reranking_paired.csv" in capsys.readouterr().out


def test_a_run_that_is_missing_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "RESULTS", tmp_path)
    written(tmp_path)
    assert reranking.main([str(tmp_path / "small.yaml")]) == 1
    assert "does not exist: give a finished run of stage dpo4rec" in capsys.readouterr().err


def made(values, users, split="ood_test"):
    """A run's lists: values by row, the same in every metric of the table."""
    parts = [pd.DataFrame({"row": row, "split": split, "user": users, "ndcg@5": own}) for row, own in values.items()]
    return pd.concat(parts, ignore_index=True)


USERS = np.arange(30)
NOISE = np.random.default_rng(0).random((2, 30)) / 10


def test_differences_are_paired_and_corrected_by_baseline():
    base = np.random.default_rng(1).random((2, 30)) / 2
    gains = {"backbone": 0.0, "kar": 0.1, "knowledge": 0.0, "dpo4rec_1": 0.2, "dpo4rec_2": 0.2, "shuffled": 0.05}
    runs = [made({row: base[s] + gain + NOISE[s] * (gain > 0) for row, gain in gains.items()}, USERS) for s in (0, 1)]
    values, users = reranking.by_row(runs, "ood_test", "x")
    found = pd.DataFrame(reranking.paired_rows({"setting": "x"}, values, users)).set_index(["row", "baseline"])
    assert list(found.index) == [
        *((row, "backbone") for row in ("kar", "knowledge", "dpo4rec_1", "dpo4rec_2", "shuffled")),
        *((row, base) for base in ("kar", "knowledge") for row in ("dpo4rec_1", "dpo4rec_2")),
        *(("knowledge", "shuffled"), ("dpo4rec_2", "shuffled")),
    ]
    assert found.loc[("kar", "backbone"), "difference"] == pytest.approx(0.1 + NOISE.mean())
    assert found.loc[("knowledge", "backbone"), "p"] == 1.0
    assert found.loc[("dpo4rec_2", "shuffled"), "difference"] == pytest.approx(0.15)
    for baseline in ("backbone", "kar", "knowledge", "shuffled"):
        family = found.xs(baseline, level="baseline")
        assert family["p_holm"].tolist() == pytest.approx(stats.holm(family["p"].tolist()))
    numbers = stats.paired(values["ndcg@5"]["kar"], values["ndcg@5"]["backbone"], users)
    assert found.loc[("kar", "backbone"), ["low", "high"]].tolist() == pytest.approx([numbers.low, numbers.high])


def test_seeds_with_other_lists_are_not_paired():
    one, other = ({"backbone": np.zeros(30)} for _ in range(2))
    with pytest.raises(StudyError, match="x, ood_test: the seeds' runs have lists of different users"):
        reranking.by_row([made(one, USERS), made(other, USERS[::-1])], "ood_test", "x")


def test_the_learning_curve_is_of_sampled_texts_and_paired_by_user(tmp_path):
    folders = [tmp_path / str(seed) for seed in (1, 2)]
    rng = np.random.default_rng(0)
    levels = rng.random((2, 20))
    for seed, folder in enumerate(folders):
        folder.mkdir()
        rows = [
            {
                "round": t,
                "user": user,
                "number": n,
                "reward": levels[seed, user] + 0.1 * t + shift,
                "validation": np.nan,
            }
            for t in (0, 1)
            for user in range(20)
            for n, shift in ((-1, 5.0), (0, 0.02), (1, -0.02))  # the greedy text does not count
        ]
        pd.DataFrame(rows).to_parquet(folder / "texts.parquet")
        counts = {name: [seed, 2 + seed] for name in reranking.COUNTED}
        pd.DataFrame({"round": [0, 1], **counts}).to_csv(folder / "rounds.csv", index=False)
    found = pd.DataFrame(reranking.round_rows({"setting": "x", "method": "prm"}, folders))
    assert list(found["metric"]) == ["reward", "reward_gain"] * 2  # nobody has a validation list
    assert found["mean"].tolist() == pytest.approx([levels.mean(), 0.0, levels.mean() + 0.1, 0.1])
    assert found["low"].iloc[3] == pytest.approx(0.1) == found["high"].iloc[3]
    assert found["pairs"].tolist() == [0.5, 0.5, 2.5, 2.5]


def test_a_stage_has_its_costs(finished):
    rows = pd.DataFrame(costs.cost_rows(jobs(finished)))
    assert set(rows.loc[rows["stage"] == "dpo4rec", "runs"]) == {2}


def test_what_a_generator_is_taught_is_whole_and_what_breaks_off_is_not():
    values = {
        "genre": [("Sci-Fi", "Children's"), ("Film-Noir",), ("War",)],
        "popularity": [("widely known",), ("known",), ("little known",)],
    }
    shares = knowledge.usual_shares(values, np.array([3, 2, 1]))
    rng = np.random.default_rng(0)
    taught = {knowledge.summary(rng.integers(3, size=4).tolist(), values, shares, rng) for _ in range(100)}
    assert len(taught) > 10 and all(map(reranking.well_formed, taught))
    broken = (
        "genre unusually often Comedy,,; popularity mostly known",
        "genre mostlyB",
        "genre unusually often\ufffd",
        "",
    )
    broken += ("popularity mostly widely known,", "genre mostly Horror, ", "y period mostly 1990s", "mostly known")
    assert not any(map(reranking.well_formed, broken))


def test_broken_texts_are_counted_by_round():
    def shown(*rounds):
        texts = [[{"number": n - 1, "text": text, "reward": 0.0} for n, text in enumerate(texts)] for texts in rounds]
        return {"reranking_example": reranking.example_rows({"rounds": [{"pair": [], "texts": t} for t in texts]})}

    said = reranking.broken_texts(shown(["genre mostly War", ""], ["genre mostlyB", "genre mostly War,"]))
    assert "1 of 2 in round 0, 2 of 2 in round 1 are broken" in said
    assert reranking.broken_texts(shown(["The user likes quiet films."])) == ""  # in its own words
    assert reranking.broken_texts({"reranking_example": reranking.example_rows({})}) == ""
