"""The stages end to end on a small simulated dataset, with another architecture than the embedded one."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import small_model

from causaldpo_lib import pipeline, stages
from causaldpo_lib.backbone import train_tokenizer
from causaldpo_lib.causal import Backdoor
from causaldpo_lib.errors import StudyError
from causaldpo_lib.ranking import recommend


def execute(stage, folder, **overrides):
    return stages.execute(stage, pipeline.resolve(stage, {"run": str(folder), **overrides}))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def data(root):
    options = {"users": 60, "items": 40, "length": 12}
    return execute("data", root / "simulated-environment" / "data", dataset_options=options, test_examples=30)


@pytest.fixture(scope="module")
def sft(root, data):
    """Fine-tuned from a random Qwen2 checkpoint on disk, with adapters: what a user's own model goes through."""
    titles = pd.read_parquet(data.folder / "items.parquet")["title"]
    tokenizer = train_tokenizer(titles)
    small_model("qwen2", len(tokenizer)).save_pretrained(root / "qwen2")
    tokenizer.save_pretrained(root / "qwen2")
    return execute(
        "sft", root / "sft", data=str(data.folder), backbone=str(root / "qwen2"), lora_rank=4, epochs=1.0, batch_size=32
    )


@pytest.fixture(scope="module")
def aligned(root, data, sft):
    def run(name, **overrides):
        inputs = {"data": str(data.folder), "sft": str(sft.folder)}
        return execute("align", root / name, **inputs, method=name, train_examples=64, **overrides)

    return {
        "dpo": run("dpo", mmd_weight=0.0),
        "causal_dpo": run("causal_dpo", mmd_weight=100.0),
        "shuffled": run("shuffled", mmd_weight=100.0, memberships="shuffled"),
    }


def test_data_stage_writes_what_the_others_read(data):
    examples = pd.read_parquet(data.folder / "examples.parquet")
    items = pd.read_parquet(data.folder / "items.parquet")
    truth = pd.read_parquet(data.folder / "truth.parquet")
    assert examples["split"].value_counts()[["iid_test", "ood_test", "validation"]].max() <= 30
    assert examples["history"].map(len).between(1, 10).all() and examples["example"].is_unique
    assert {"item", "title", "genres", "train_count", "group_mass", "group_items"} <= set(items)
    assert truth.groupby("user")["preference"].sum().to_numpy() == pytest.approx(1.0)
    assert len(data.summary["scalars"]["interactions_sha256"]) == 64


def test_lists_are_ranked_for_every_method(root, data, sft, aligned):
    found = {}
    for name, run in {"sft": sft, **aligned}.items():
        ranked = execute(
            "rank", root / f"{name}-rank", data=str(data.folder), checkpoint=str(run.folder), list_length=20
        )
        found[name] = pd.read_parquet(ranked.folder / "predictions.parquet")
    for table in found.values():
        assert set(table["split"]) == {"validation", "iid_test", "ood_test"} and table["rank"].between(0, 40).all()
        assert np.isfinite(table["target_logp"]).all() and (table["target_logp"] < 0).all()
        assert all(len(set(items)) == 20 for items in table["items"])
        hit = table[table["rank"] < 20]
        assert all(row.items[row.rank] == row.target for row in hit.itertuples())
    assert not np.allclose(found["sft"]["target_logp"], found["dpo"]["target_logp"])
    for first, second in (("dpo", "causal_dpo"), ("causal_dpo", "shuffled")):
        assert not np.array_equal(found[first]["target_logp"], found[second]["target_logp"])


def test_methods_of_a_seed_share_examples_and_the_control_only_shuffles(aligned):
    tables = {name: pd.read_parquet(run.folder / "memberships.parquet") for name, run in aligned.items()}
    assert tables["dpo"].equals(tables["causal_dpo"])
    assert tables["shuffled"]["example"].equals(tables["causal_dpo"]["example"])
    rows = {name: sorted(table.filter(like="environment_").to_numpy().tolist()) for name, table in tables.items()}
    assert rows["shuffled"] == rows["causal_dpo"] and not tables["shuffled"].equals(tables["causal_dpo"])


def test_predictions_on_simulated_data_hold_the_whole_catalogue(root, data, sft):
    ranked = execute("rank", root / "sft-rank", data=str(data.folder), checkpoint=str(sft.folder), list_length=20)
    table = pd.read_parquet(ranked.folder / "predictions.parquet")
    items = pd.read_parquet(data.folder / "items.parquet")["item"].tolist()
    logps = np.stack(table["catalogue_logps"])
    assert logps.shape == (len(table), len(items))
    assert np.exp(logps).sum(1) == pytest.approx(1.0, abs=1e-4)


def test_masked_histories_are_not_recommended(root, data, sft):
    inputs = {"data": str(data.folder), "checkpoint": str(sft.folder)}
    ranked = execute("rank", root / "masked-rank", **inputs, ranker="likelihood", mask_history=True, list_length=20)
    table = pd.read_parquet(ranked.folder / "predictions.parquet").set_index("example")
    histories = pd.read_parquet(data.folder / "examples.parquet").set_index("example")["history"].loc[table.index]
    assert not any(set(row) & set(history) for row, history in zip(table["items"], histories, strict=True))
    with pytest.raises(StudyError, match="unset mask_history"):
        execute("rank", root / "no", **inputs, ranker="candidates", mask_history=True)


@pytest.mark.parametrize("kind", stages.ORACLES)
def test_oracle_environments_are_the_named_groups(root, data, sft, kind):
    inputs = {"data": str(data.folder), "sft": str(sft.folder)}
    run = execute("align", root / kind, **inputs, method=kind, train_examples=64, memberships=kind)
    rows = pd.read_parquet(run.folder / "memberships.parquet").set_index("example")
    examples = pd.read_parquet(data.folder / "examples.parquet").set_index("example").loc[rows.index]
    labels = stages.ORACLES[kind](examples, pd.read_parquet(data.folder / "items.parquet"))
    assert (rows.max(axis=1) == 1).all()
    assert (pd.factorize(pd.Series(labels), sort=True)[0] == rows.to_numpy().argmax(1)).all()
    assert run.summary["scalars"]["environment_method"] == "given"


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_rounds_contrast_with_what_the_last_policy_lists(root, data, sft, lora_rank):
    inputs = {"data": str(data.folder), "sft": str(sft.folder), "lora_rank": lora_rank, "learning_rate": 5e-3}
    shared = {"train_examples": 48, "mmd_weight": 0.0, "negatives": "self_generated", "negatives_per_prompt": 2}
    once, twice = (
        execute("align", root / f"rounds-{n}-{lora_rank}", **inputs, method="own", iterations=n, **shared)
        for n in (1, 2)
    )
    logs = [pd.read_csv(run.folder / "log.csv") for run in (once, twice)]
    assert set(logs[0]["iteration"]) == {0} and set(logs[1]["iteration"]) == {0, 1}
    first = logs[1][logs[1]["iteration"] == 0].reset_index(drop=True)
    columns = ["loss", "margin", "chosen_logp"]
    pd.testing.assert_frame_equal(first[columns], logs[0][columns])
    again = logs[1][logs[1]["iteration"] == 1]
    assert again["margin"].iloc[0] == pytest.approx(0.0, abs=1e-4)  # the new reference is the policy itself


def test_a_policy_given_the_environment_is_averaged_over_environments(root, data, sft):
    inputs = {"data": str(data.folder), "sft": str(sft.folder)}
    options = {"method": "backdoor", "train_examples": 48, "mmd_weight": 0.0, "tokens_per_environment": 2}
    run = execute("align", root / "backdoor", **inputs, **options, lora_rank=0)
    mixture = Backdoor.load(run.folder / "checkpoint")
    assert sum(mixture.prior) == pytest.approx(1.0) and all(len(ids) == 2 for ids in mixture.tokens)
    ranked = execute("rank", root / "backdoor-rank", data=str(data.folder), checkpoint=str(run.folder))
    table = pd.read_parquet(ranked.folder / "predictions.parquet")
    assert np.isfinite(table["target_logp"]).all() and all(len(set(items)) == 20 for items in table["items"])


def test_recommend_serves_a_trained_checkpoint(aligned, data):
    titles = pd.read_parquet(data.folder / "items.parquet")["title"].tolist()
    items, scores = recommend(aligned["causal_dpo"].folder / "checkpoint", titles[:2], k=5)
    assert len(items) == 5 and scores == sorted(scores, reverse=True)


def test_finished_runs_are_not_repeated(root, data, sft):
    before = (sft.folder / "summary.json").stat().st_mtime_ns
    again = execute(
        "sft", root / "sft", data=str(data.folder), backbone=str(root / "qwen2"), lora_rank=4, epochs=1.0, batch_size=32
    )
    assert again.summary == sft.summary and (sft.folder / "summary.json").stat().st_mtime_ns == before


def test_bad_input_is_one_sentence_and_finished_runs_stay(root, data, sft):
    inputs = {"data": str(data.folder)}
    with pytest.raises(StudyError, match=r"no causal language model could be loaded from .*nowhere"):
        execute("sft", root / "other", **inputs, backbone=str(root / "nowhere"))
    with pytest.raises(StudyError, match="set lora_rank: 0"):
        execute("sft", root / "another", **inputs, lora_rank=4)
    with pytest.raises(StudyError, match="choose another folder"):
        execute("sft", sft.folder, **inputs)
    with pytest.raises(StudyError, match="unknown negative sampler 'unifrom'"):
        execute("align", root / "bad", **inputs, sft=str(sft.folder), negatives="unifrom", train_examples=8)
    for number, unusable in enumerate(({"iterations": 0}, {"iterations": 2, "tokens_per_environment": 2})):
        with pytest.raises(StudyError, match=r"iterations(: | = )[01]"):
            execute("align", root / f"unusable-{number}", **inputs, sft=str(sft.folder), **unusable)
    assert sft.complete


def test_history_genres_and_groups_name_the_typical_item():
    items = pd.DataFrame(
        {"item": [1, 2, 3], "genres": ["drama|war", "comedy", "comedy"], "group_mass": ["G1", "G3", "G5"]}
    )
    examples = pd.DataFrame({"history": [[1], [2, 1], [2, 3, 1]]})
    assert stages.history_genres(examples, items).tolist() == ["drama", "comedy", "comedy"]
    assert stages.history_groups(examples, items).tolist() == ["G1", "G3", "G3"]
