"""The stages end to end on a small simulated dataset, with another architecture than the embedded one."""

import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import execute, small_model

from causaldpo_lib import stages
from causaldpo_lib.backbone import load_checkpoint, train_tokenizer
from causaldpo_lib.catalogue import read_catalogue
from causaldpo_lib.causal import Backdoor
from causaldpo_lib.errors import StudyError
from causaldpo_lib.metrics import ndcg_at_k
from causaldpo_lib.ranking import recommend


@pytest.fixture(scope="module")
def data(root):
    options = {"users": 60, "items": 40, "length": 12}
    sizes = {"test_examples": 30, "validation_examples": 20}
    return execute("data", root / "simulated-environment" / "data", dataset_options=options, **sizes)


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
    counts = examples["split"].value_counts()
    assert counts[["iid_test", "ood_test"]].max() <= 30 and counts["validation"] <= 20
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
    assert 0 < run.summary["scalars"]["environment_information"] < np.log(len(mixture.prior))
    ranked = execute("rank", root / "backdoor-rank", data=str(data.folder), checkpoint=str(run.folder))
    table = pd.read_parquet(ranked.folder / "predictions.parquet")
    assert np.isfinite(table["target_logp"]).all() and all(len(set(items)) == 20 for items in table["items"])


@pytest.mark.parametrize("bf16", [False, True])
def test_negatives_matched_to_environments_use_the_trainers_own_memberships(root, data, sft, monkeypatch, bf16):
    """What the sampler is given before there is a trainer equals what the trainer finds, row by row."""
    monkeypatch.setattr(stages, "_in_bfloat16", lambda: bf16)
    given = {}
    sampler = stages.pairs.NEGATIVES["environment_matched"]

    def listening(examples, *arguments, **options):
        given["rows"] = np.stack(examples["memberships"].tolist())
        return sampler(examples, *arguments, **options)

    monkeypatch.setitem(stages.pairs.NEGATIVES, "environment_matched", listening)
    inputs = {"data": str(data.folder), "sft": str(sft.folder), "train_examples": 64, "mmd_weight": 0.0}
    for kind in ("inferred", "shuffled", "oracle_environment"):
        options = {"negatives": "environment_matched", "memberships": kind, "method": kind}
        run = execute("align", root / f"matched-{kind}-{bf16}", **inputs, **options)
        found = pd.read_parquet(run.folder / "memberships.parquet").filter(like="environment_").to_numpy()
        np.testing.assert_allclose(given["rows"], found, atol=2e-3)


@pytest.fixture(scope="module")
def sequential(root, data):
    return execute("sasrec", root / "sasrec", data=str(data.folder), epochs=3)


def test_a_sasrec_is_ranked_by_its_own_scores(root, data, sft, sequential):
    inputs = {"data": str(data.folder), "list_length": 20}
    ranked = execute("rank", root / "sasrec-rank", **inputs, checkpoint=str(sequential.folder), ranker="sasrec")
    table = pd.read_parquet(ranked.folder / "predictions.parquet")
    logps = np.stack(table["catalogue_logps"])
    items = pd.read_parquet(data.folder / "items.parquet")["item"].tolist()
    own = logps[np.arange(len(table)), [items.index(target) for target in table["target"]]]
    assert table["target_logp"].to_numpy() == pytest.approx(own, abs=1e-6)
    assert (table["rank"] == (logps >= own[:, None]).sum(1) - 1).all()
    for number, (run, ranker) in enumerate(((sequential, "beam"), (sft, "sasrec"))):
        with pytest.raises(StudyError, match="'sasrec' ranks by SASRec runs"):
            execute("rank", root / f"mismatch-{number}", **inputs, checkpoint=str(run.folder), ranker=ranker)


def test_labels_are_smoothed_by_the_assistants_doubts(root, data, sft, sequential, monkeypatch):
    seen = {}
    init = stages.trainers.CausalDPOTrainer.__init__

    def listening(self, *arguments, **options):
        init(self, *arguments, **options)
        seen["smoothing"], seen["rows"] = self.smoothing, options["train_dataset"]

    monkeypatch.setattr(stages.trainers.CausalDPOTrainer, "__init__", listening)
    inputs = {"data": str(data.folder), "sft": str(sft.folder), "assistant": str(sequential.folder)}
    run = execute("align", root / "rose", **inputs, method="rose", loss="rose_po", mmd_weight=0.0, train_examples=64)
    items = pd.read_parquet(data.folder / "items.parquet")
    examples = pd.read_parquet(data.folder / "examples.parquet").set_index("example")
    rows = pd.read_parquet(run.folder / "memberships.parquet")["example"]
    logps = stages._sequential_logps(str(sequential.folder), examples.loc[rows].reset_index(), items)
    place = {f" {title}": index for index, title in enumerate(items["title"])}
    for row, doubt, own in zip(seen["rows"], seen["smoothing"].tolist(), logps, strict=True):
        gap = own[place[row["rejected"][0]]] - own[place[row["chosen"]]]
        assert doubt == pytest.approx(min(1 / (1 + np.exp(-gap)), 0.49), abs=1e-5)
    assert run.summary["scalars"]["smoothing_mean"] == pytest.approx(float(seen["smoothing"].mean()), abs=1e-6)
    with pytest.raises(StudyError, match="the rows smooth their labels, but loss 'dpo' does not take it"):
        execute("align", root / "dpo-smoothed", **inputs, method="dpo", train_examples=8)


def test_a_boosts_strength_is_the_best_on_validation(root, data, sft, sequential):
    inputs = {"data": str(data.folder), "checkpoint": str(sft.folder), "assistant": str(sequential.folder)}
    boost = {"boost": "assistant", "ranker": "beam"}
    validation = {}
    for strength in (0.0, 0.3, 0.6):
        run = execute("rank", root / f"d3-{strength}", **inputs, **boost, strengths=[strength])
        table = pd.read_parquet(run.folder / "predictions.parquet")
        validation[strength] = ndcg_at_k(table.loc[table["split"] == "validation", "rank"].to_numpy(), 10)
    chosen = execute("rank", root / "d3", **inputs, **boost, strengths=[0.0, 0.3, 0.6])
    assert chosen.summary["scalars"]["strength"] == max(validation, key=validation.get)
    best = pd.read_parquet(root / f"d3-{chosen.summary['scalars']['strength']}" / "predictions.parquet")
    assert pd.read_parquet(chosen.folder / "predictions.parquet")["rank"].equals(best["rank"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"boost": "assistant", "strengths": [0.1], "assistant": ""}, "needs the run folder of a SASRec"),
        ({"boost": "assistant", "strengths": []}, "has no strengths to choose from"),
        ({"strengths": [0.1]}, "strengths are those of a boost"),
        ({"boost": "popularity", "strengths": [0.1]}, "unknown boost of ranker 'beam' 'popularity'"),
        ({"boost": "popularity", "strengths": [1.0], "ranker": "likelihood"}, "unknown ranker into which something"),
    ],
)
def test_a_boost_that_cannot_be_is_refused(root, data, sft, sequential, change, sentence):
    inputs = {"data": str(data.folder), "checkpoint": str(sft.folder), "assistant": str(sequential.folder)}
    folder = root / f"refused-{len(str(change))}-{len(sentence)}"
    with pytest.raises(StudyError, match=sentence):
        execute("rank", folder, **{**inputs, **change})


def test_fine_tuning_can_be_left_out(root, data):
    run = execute("sft", root / "pretrained", data=str(data.folder), backbone="tiny-small", epochs=0.0)
    assert set(pd.read_csv(run.folder / "log.csv")["part"]) == {"pretraining"}
    with pytest.raises(StudyError, match="epochs = 0 leaves nothing to train"):
        execute("sft", root / "untouched", data=str(data.folder), backbone="tiny-small", epochs=0.0, pretrain_epochs=0)


def test_a_round_may_fine_tune_before_it_aligns(root, data, sft):
    inputs = {"data": str(data.folder), "sft": str(sft.folder), "method": "sprec", "mmd_weight": 0.0}
    options = {"negatives": "self_generated", "train_examples": 48, "learning_rate": 5e-3, "lora_rank": 4}
    run = execute("align", root / "sprec", **inputs, **options, round_epochs=1.0)
    log = pd.read_csv(run.folder / "log.csv")
    assert log["margin"].iloc[0] == pytest.approx(0.0, abs=1e-4)  # the reference is the fine-tuned model
    plain = pd.read_csv(execute("align", root / "own", **inputs, **options).folder / "log.csv")
    assert log["chosen_logp"].iloc[0] > plain["chosen_logp"].iloc[0]


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


def test_checkpoints_that_are_not_whole_are_refused_by_name(root, sft, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(root / "qwen2", tmp_path / "part")
    weights = tmp_path / "part" / "model.safetensors"
    tensors = load_file(weights)
    lost = next(name for name in tensors if "mlp" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != lost}, weights, {"format": "pt"})
    with pytest.raises(StudyError, match=rf"part' has no weights for {lost} \(1 missing\)"):
        load_checkpoint(tmp_path / "part")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(StudyError, match=r"no causal language model could be loaded from .*part"):
        load_checkpoint(tmp_path / "part")
    (tmp_path / "catalogue.csv").write_text("id,name\n1,a\n")
    with pytest.raises(StudyError, match=r"catalogue\.csv is no table of item and title"):
        read_catalogue(tmp_path)


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
