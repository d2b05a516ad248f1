"""Every file of params/methods runs: two steps on a small simulated setting, then a ranking."""

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from causaldpo_lib import pipeline, stages
from causaldpo_lib.environments import MEMBERSHIPS
from causaldpo_lib.losses import LOSSES
from causaldpo_lib.pairs import NEGATIVES
from causaldpo_lib.paths import PARAMS
from causaldpo_lib.ranking import RANKERS
from causaldpo_lib.study import jobs, load_method, load_study

FILES = sorted(path.stem for path in (PARAMS / "methods").glob("*.yaml"))
METHODS = [name for name in FILES if not load_method(name).reranks]  # re-rankers: test_reranking.py
SMALL = {
    "settings": [{"dataset": "simulated", "shift": "environment"}],
    "methods": METHODS,
    "seeds": [1],
    "data": {
        "dataset_options": {"users": 60, "items": 40, "length": 12},
        "test_examples": 10,
        "validation_examples": 10,
    },
    "sft": {"backbone": "tiny-small", "pretrain_epochs": 1, "epochs": 0.2},
    "sasrec": {"epochs": 2},
    "align": {"train_examples": 32, "batch_size": 16, "loss_options": {"beta": 1.0}},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The jobs of a study of all methods, by method, in a results folder of their own."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("methods")
    (root / "small.yaml").write_text(yaml.safe_dump(SMALL))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "RESULTS", root)
        yield jobs(load_study(root / "small.yaml"))


@pytest.mark.filterwarnings("ignore:DBSCAN found:UserWarning")  # Algorithm 1 on 16 states
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_trained_and_ranks(found, name):
    by_folder = {job.folder: job for job in reversed(found)}
    [last] = [job for job in found if job.stage == "rank" and job.method == name]

    def run(job):
        for upstream in job.inputs.values():
            run(by_folder[upstream])
        return stages.execute(job.stage, {**job.parameters, "run": ""})

    table = pd.read_parquet(run(last).folder / "predictions.parquet")
    assert set(table["split"]) == {"validation", "iid_test", "ood_test"} and len(table) == 30
    assert all(len(set(items)) == 20 for items in table["items"])
    assert np.isfinite(table["target_logp"]).all() and (table["target_logp"] < 0).all()
    assert np.exp(np.stack(table["catalogue_logps"])).sum(1) == pytest.approx(1.0, abs=1e-3)
    trained = by_folder[last.inputs["checkpoint"]]
    assert trained.stage == load_method(name).trained
    if trained.stage == "align":
        log = pd.read_csv(trained.folder / "log.csv")
        assert log["step"].max() == 2 and log["preference_loss"].notna().all()


def test_the_registries_and_the_files_agree():
    methods = {name: load_method(name) for name in METHODS}
    aligned = [method.overrides["align"] for method in methods.values() if "align" in method.overrides]
    assert {options["loss"] for options in aligned} == set(LOSSES)
    assert {options.get("negatives", "uniform") for options in aligned} == set(NEGATIVES) - {"candidates"}
    kinds = {options.get("memberships", "inferred") for options in aligned}
    assert kinds == {*MEMBERSHIPS, *stages.ORACLES} - {"given"}
    ranked = {method.overrides.get("rank", {}).get("ranker", "beam") for method in methods.values()}
    assert ranked <= {*RANKERS, "sasrec"}
    labels = [method.label for method in methods.values()]
    assert len(set(labels)) == len(labels)


def test_every_method_stands_in_a_study_or_is_a_variant_of_a_loss():
    studied = {method.name for path in (PARAMS / "studies").glob("*.yaml") for method in load_study(path).methods}
    assert set(METHODS) - studied <= {"ipo", "cdpo", "rdpo", "orpo", "oracle_period", "oracle_environment"}
