"""DPO4Rec: lists, cross-fitted rewards, pairs, and the loop end to end on a small simulated setting."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import execute, small_model
from sklearn.metrics import ndcg_score

from causaldpo_lib import dpo4rec, knowledge, rerankers, sasrec, trainers
from causaldpo_lib.backbone import load_checkpoint, train_tokenizer
from causaldpo_lib.errors import StudyError

SMALL = {
    "users": 0,
    "list_size": 8,
    "positives": 3,
    "pool": 20,
    "training_lists": 2,
    "initial_epochs": 3,
    "generator": "tiny-small",
    "teaching_texts": 3,
    "teaching_epochs": 8.0,
    "teaching_learning_rate": 3e-3,
    "samples": 3,
    "max_new_tokens": 32,
    "reranking_epochs": 3,
    "embedding": 8,
    "hidden": 8,
    "rounds": 2,
    "epochs": 5.0,
    "learning_rate": 1e-3,
}
RANKING = {
    **{"kind": "prm", "loss": "softmax", "adaptor": "linear", "embedding": 8, "hidden": 8, "epochs": 2, "patience": 2},
    **{"learning_rate": 1e-3, "weight_decay": 0.0, "batch_size": 16, "dropout": 0.0},
}


@pytest.fixture(scope="module")
def data(root):
    return execute("data", root / "data", dataset_options={"users": 60, "items": 48, "length": 16})


@pytest.fixture(scope="module")
def tables(data):
    return pd.read_parquet(data.folder / "items.parquet"), pd.read_parquet(data.folder / "split.parquet")


LISTS = {"size": 8, "positives": 3, "pool": 20, "copies": 2, "users": 0, "epochs": 2, "seed": 0}


@pytest.fixture(scope="module")
def material(tables):
    return dpo4rec.make_material(*tables, **LISTS)[0]


@pytest.fixture(scope="module")
def whole(root, data):
    """The loop without an interruption."""
    return execute("dpo4rec", root / "whole", data=str(data.folder), **SMALL)


def exchanged(split, items):
    """The split with every held-out interaction moved to another item, one that the user has nothing to do with."""
    rng, found = np.random.default_rng(0), split.copy()
    for _, rows in split.groupby("user"):
        free = np.setdiff1d(items["item"], rows["item"])
        held_out = rows.index[rows["split"] != "train"]
        found.loc[held_out, "item"] = rng.choice(free, len(held_out), replace=False)
    return found


# --- lists ---


@pytest.mark.parametrize(("count", "early"), [(1, 1), (2, 1), (5, 3), (60, 30), (200, 30)])
def test_the_early_part_is_half_and_at_most_thirty(count, early):
    assert dpo4rec.early_part(range(count)) == early


def test_lists_hold_what_their_split_says(material, tables):
    items, split = tables
    position = pd.Index(items["item"])
    of_user = {
        name: {user: position.get_indexer(rows["item"]).tolist() for user, rows in part.groupby("user")}
        for name, part in split.groupby("split")
    }
    for name, lists in material.lists.items():
        for user, places, labels, scores in zip(
            material.users[lists.users], lists.items.tolist(), lists.labels, lists.scores, strict=True
        ):
            training = of_user["train"][user]
            early = material.histories[list(material.users).index(user)]
            assert early == training[: len(early)] and len(early) == (len(training) + 1) // 2
            rows = split[split["user"] == user]
            end = rows.loc[rows["split"] == "train", "time"].iloc[len(early) - 1]
            own = position.get_indexer(rows.loc[(rows["split"] == name) & (rows["time"] > end), "item"]).tolist()
            positive = [item for item, label in zip(places, labels, strict=True) if label]
            negative = [item for item, label in zip(places, labels, strict=True) if not label]
            assert 1 <= len(positive) <= 3 and set(positive) <= set(own) and len(set(places)) == 8
            known = training if name == "train" else [item for part in of_user.values() for item in part.get(user, [])]
            assert not set(negative) & set(known) and not set(places) & set(early)
            assert scores.tolist() == sorted(scores.tolist(), reverse=True)
        users = lists.users.tolist()
        assert users == sorted(users) and len(users) == (2 if name == "train" else 1) * len(set(users))
        assert material.left_out[name] == len(material.users) - len(set(users))
    first, second = (material.lists["train"].items[start::2] for start in (0, 1))
    assert not torch.equal(first, second)


def test_negatives_are_the_initial_rankers_own(tables):
    """With a pool as long as the list, a list is the ranker's top."""
    seen = {}

    def fit(model, train, validation, **options):
        seen["stopping"] = len(validation[1])
        seen["targets"] = [*train[1].tolist(), *validation[1].tolist()]
        seen["windows"] = [row[row > 0].tolist() for row in (*train[0], *validation[0])]
        return [{"validation_ndcg10": 0.0}]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sasrec, "fit_sasrec", fit)
        order = np.arange(48)[::-1].copy()
        patch.setattr(
            sasrec, "catalogue_logps", lambda model, histories: np.tile(-order.astype(np.float32), (len(histories), 1))
        )
        found, _ = dpo4rec.make_material(*tables, **{**LISTS, "pool": 8, "copies": 1})
    early = [item for history in found.histories for item in history]
    # One window each of a tenth of the 60 users stops it.
    assert seen["stopping"] == 6
    # No positive of any list was a target of the ranker, or in its windows: each user's early items are all it sees.
    assert sorted(seen["targets"]) == sorted(item for history in found.histories for item in history[1:])
    assert {number - 1 for window in seen["windows"] for number in window} <= set(early)
    lists = found.lists["ood_test"]
    assert len(lists)
    for row, user in enumerate(lists.users.tolist()):
        known = set(tables[1].loc[tables[1]["user"] == found.users[user], "item"])
        ids = tables[0]["item"].to_numpy()
        listed = ids[lists.items[row].numpy()]
        own = tables[1][(tables[1]["user"] == found.users[user]) & (tables[1]["split"] == "ood_test")]["item"]
        best = [item for item in ids[::-1] if item not in known or item in set(own)][:8]
        assert set(listed) <= set(best)
        assert set(listed[lists.labels[row].bool().numpy()]) <= set(own)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"pool": 7}, "lists of 8 places cannot hold up to 3 positives and be drawn from a pool of 7"),
        ({"positives": 8}, "positives < list_size <= pool"),
        ({"positives": 0}, "positives < list_size <= pool"),
        ({"copies": 0}, "training_lists = 0 leaves nothing to learn from"),
    ],
)
def test_impossible_lists_are_refused(tables, change, sentence):
    with pytest.raises(StudyError, match=sentence):
        dpo4rec.make_material(*tables, **{**LISTS, **change})


def test_users_without_a_late_interaction_have_no_list_and_are_counted(tables):
    items, split = tables
    single = split[split["split"] == "train"].groupby("user").head(1)
    users = single["user"].iloc[:3]
    few = split[(split["split"] != "train") | ~split["user"].isin(users)]
    few = pd.concat([few, single[single["user"].isin(users)]]).sort_values(["user", "time"], kind="stable")
    nobody = few[(few["split"] != "train") | (few["user"] != split["user"].iloc[-1])]
    found = dpo4rec.make_material(items, nobody, **LISTS)[0]
    assert found.left_out["early"] == 1 and split["user"].iloc[-1] not in found.users
    rows = np.flatnonzero(np.isin(found.users, users))
    assert len(rows) == 3 and not set(rows) & set(found.lists["train"].users.tolist())
    assert found.left_out["train"] >= 3
    with pytest.raises(StudyError, match="none of 60 users has a late training interaction"):
        dpo4rec.make_material(items, pd.concat([single, split[split["split"] != "train"]]), **{**LISTS, "epochs": 1})


def test_users_are_drawn_once(tables):
    found = [dpo4rec.make_material(*tables, **{**LISTS, "users": 20, "epochs": 1})[0].users for _ in range(2)]
    assert len(found[0]) == 20 and np.array_equal(*found)


# --- rewards and pairs ---


def test_a_judge_never_saw_the_users_it_judges(material, monkeypatch):
    fitted, scored = [], []
    fit, score = rerankers.fit_reranker, rerankers.text_scores

    def spy_fit(lists, features, validation, **options):
        model, log = fit(lists, features, validation, **options)
        users = {user // 3 for part in (lists, validation[0]) for user in part.users.tolist()}  # of three texts each
        shown = [(user // 3, user % 3) for user in lists.users.tolist()]
        fitted.append((model, users, shown, {tuple(row) for row in lists.items.tolist()}))
        return model, log

    def spy_score(model, lists, *rest):
        scored.append((model, set(lists.users.tolist()), {tuple(row) for row in lists.items.tolist()}))
        return score(model, lists, *rest)

    monkeypatch.setattr(rerankers, "fit_reranker", spy_fit)
    monkeypatch.setattr(rerankers, "text_scores", spy_score)
    texts = torch.randn(len(material.users), 3, 4, generator=torch.Generator().manual_seed(0))
    items = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))
    judges = dpo4rec.fit_judges(material, texts, items, folds=3, seed=1, reranking=RANKING)
    found = dpo4rec.rewards(judges, material, texts, items)
    assert len(fitted) == len(scored) == 3
    for (model, users, shown, lists), (judge, judged, own) in zip(fitted, scored, strict=True):
        assert judge is model and not users & judged and not lists & own
        # Two lists and three texts: a user is shown three times, with each text once.
        assert len(shown) == len(set(shown)) and {number for _, number in shown} == {0, 1, 2}
    everyone = set(material.lists["train"].users.tolist())
    assert set().union(*(judged for _, judged, _ in scored)) == everyone
    assert np.array_equal(np.flatnonzero(~np.isnan(found[:, 0])), sorted(everyone))
    held_out = dpo4rec.rewards(judges, material, texts, items, "validation")
    assert set(np.flatnonzero(~np.isnan(held_out[:, 0]))) == set(material.lists["validation"].users.tolist())
    with pytest.raises(StudyError, match="cannot be cut into folds = 1"):
        dpo4rec.fit_judges(material, texts, items, folds=1, seed=1, reranking=RANKING)


def test_a_reward_is_the_mean_ndcg_of_the_users_lists(material, monkeypatch):
    """Against scikit-learn, with scores that the text alone decides."""
    lists = material.lists["train"]
    texts = torch.rand(len(material.users), 2, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(rerankers, "text_scores", lambda model, lists, features, texts: texts[lists.users])
    judges = dpo4rec.Judges(np.arange(len(material.users)) % 2, [None, None], [])
    found = dpo4rec.rewards(judges, material, texts, torch.zeros(48, 1))
    for user in set(lists.users.tolist()):
        for number in range(2):
            labels = lists.labels[lists.users == user].numpy()
            scores = texts[user, number].expand(len(labels), -1).numpy()
            own = [ndcg_score(labels[row][None], scores[row][None], k=5) for row in range(len(labels))]
            assert found[user, number] == pytest.approx(np.mean(own), abs=1e-9)


def test_pairs_are_the_best_and_the_worst_and_the_rest_is_counted():
    texts = [["a", "b", "c"], ["a", "b", "c"], ["a", "", "c"], ["", "b", ""], ["a", "b", "c"], ["a", "b", "c"]]
    values = np.array(
        [
            [0.2, 0.9, 0.1],
            [0.5, 0.5, 0.5 + 1e-12],  # a rounding error is no preference
            [0.3, 1.0, 0.3],  # what differs is no text
            [0.1, 0.2, 0.3],
            [np.nan, np.nan, np.nan],  # no list
            [0.7, 0.1, 0.1],
        ]
    )
    found = dpo4rec.best_and_worst(texts, values)
    assert found.table.to_dict("list") == {"user": [0, 5], "chosen": [1, 0], "rejected": [2, 1]}
    assert (found.tied, found.unusable) == (2, 1)
    nothing = dpo4rec.best_and_worst([["a", "b"]], np.array([[0.5, 0.5]]))
    assert nothing.table.empty and list(nothing.table) == ["user", "chosen", "rejected"]


# --- the loop ---


def test_the_loop_end_to_end(whole, data):
    rounds = pd.read_csv(whole.folder / "rounds.csv").set_index("round")
    assert list(rounds.index) == [0, 1, 2]
    assert (rounds["pairs"] + rounds["tied"] + rounds["unusable"] == rounds["users"]).all()
    assert (rounds["pairs"] >= dpo4rec.FEWEST_PAIRS).all() and (rounds["gap"] > 0).all()
    texts = pd.read_parquet(whole.folder / "texts.parquet")
    pairs = pd.read_parquet(whole.folder / "pairs.parquet")
    assert set(texts["number"]) == {-1, 0, 1, 2}
    keyed = texts.set_index(["round", "user", "number"])
    for row in pairs.itertuples():
        own = keyed.loc[(row.round, row.user)].drop(-1)
        own = own[own["text"] != ""]["reward"]
        assert (own[row.chosen], own[row.rejected]) == (own.max(), own.min()) == (row.best, row.worst)
        assert row.best > row.worst
    log = pd.read_csv(whole.folder / "log.csv")
    assert set(log["round"]) == {1, 2} and log["preference_loss"].notna().all()
    lists = pd.read_parquet(whole.folder / "lists.parquet")
    rows = ["initial", "backbone", "kar", "knowledge", "dpo4rec_1", "dpo4rec_2", "shuffled"]
    assert list(lists["row"].unique()) == rows
    assert lists.filter(regex="@").apply(lambda column: column.between(0, 1)).all().all()
    sizes = lists.groupby(["split", "row"]).size().unstack()
    assert (sizes.nunique(axis=1) == 1).all() and set(sizes.index) == {"validation", "iid_test", "ood_test"}
    example = json.loads((whole.folder / "example.json").read_text())
    assert len(example["rounds"]) == 3 and example["rounds"][0]["pair"] and example["history"]
    assert not (whole.folder / ".rounds").exists()
    load_checkpoint(whole.folder / "checkpoint")


def test_alignment_moves_the_policy_towards_the_chosen_texts(whole):
    log = pd.read_csv(whole.folder / "log.csv")
    last = log[log["round"] == 1].iloc[-1]
    assert last["margin"] > 0
    texts = pd.read_parquet(whole.folder / "texts.parquet")
    greedy = texts[texts["number"] == -1].pivot(index="user", columns="round", values="text")
    assert (greedy[0] != greedy[2]).any()


def same_files(one, other, names):
    for name in names:
        read = pd.read_parquet if name.endswith("parquet") else pd.read_csv
        left, right = read(one / name), read(other / name)
        timed = [column for column in left if "second" in column]
        pd.testing.assert_frame_equal(left.drop(columns=timed), right.drop(columns=timed), check_exact=True)


def test_an_interrupted_run_goes_on_to_the_same_result(root, data, whole, monkeypatch):
    """Killed while round 2 aligns; what was done before is not done again."""
    done = []
    real = {kind: kind.train for kind in (trainers.SupervisedTrainer, trainers.CausalDPOTrainer)}

    def counting(self, *args, **kwargs):
        done.append(type(self).__name__)
        if done == ["SupervisedTrainer", "CausalDPOTrainer", "CausalDPOTrainer"]:
            raise KeyboardInterrupt
        return real[type(self)](self, *args, **kwargs)

    for kind in real:
        monkeypatch.setattr(kind, "train", counting)
    folder = root / "apart" / "interrupted"  # from the taught backbones, too
    with pytest.raises(KeyboardInterrupt):
        execute("dpo4rec", folder, data=str(data.folder), **SMALL)
    assert not (folder / "summary.json").exists()
    (folder / ".rounds" / "of-other-code").mkdir()
    torch.manual_seed(99)
    execute("dpo4rec", folder, data=str(data.folder), **SMALL)
    assert done[3:] == ["CausalDPOTrainer"]
    same_files(folder, whole.folder, ["texts.parquet", "pairs.parquet", "lists.parquet", "rounds.csv", "log.csv"])
    weights = [(place / "checkpoint" / "model.safetensors").read_bytes() for place in (folder, whole.folder)]
    assert weights[0] == weights[1]
    assert not (folder / ".rounds").exists()


def test_what_is_held_out_decides_neither_rewards_nor_pairs(root, data, whole, tables):
    folder = root / "simulated-environment" / data.folder.name
    shutil.copytree(data.folder, folder)
    items, split = tables
    other = exchanged(split, items)
    moved = other["item"] != split["item"]
    assert moved.equals(split["split"] != "train")
    other.to_parquet(folder / "split.parquet")
    again = execute("dpo4rec", root / "leak", data=str(folder), **SMALL)
    assert again.folder != whole.folder
    left, right = (pd.read_parquet(run.folder / "texts.parquet") for run in (again, whole))
    assert left.drop(columns="validation").equals(right.drop(columns="validation"))
    assert not left["validation"].equals(right["validation"])
    same_files(again.folder, whole.folder, ["pairs.parquet", "log.csv", "initial.csv"])
    assert not pd.read_parquet(again.folder / "lists.parquet").equals(pd.read_parquet(whole.folder / "lists.parquet"))


def test_generations_that_never_end_are_reported_and_nothing_is_aligned(root, data, capsys):
    run = execute("dpo4rec", root / "long", data=str(data.folder), **{**SMALL, "max_new_tokens": 1, "rounds": 1})
    rounds = pd.read_csv(run.folder / "rounds.csv")
    assert (rounds["over_long"] + rounds["empty"] == rounds["texts"]).all() and (rounds["over_long"] > 0).all()
    assert (rounds["pairs"] == 0).all() and (rounds["unusable"] == rounds["users"]).all()
    assert "round 1: 0 pairs are too few to align on" in capsys.readouterr().out
    assert rounds["reward"][0] == pytest.approx(rounds["blank_reward"][0])
    assert (pd.read_parquet(run.folder / "texts.parquet")["text"] == "").all()
    assert pd.read_csv(run.folder / "log.csv").empty
    assert json.loads((run.folder / "example.json").read_text()) == {}
    load_checkpoint(run.folder / "checkpoint")


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_a_model_from_disk_needs_no_teaching(root, data, tables, architecture, monkeypatch):
    tokenizer = train_tokenizer(tables[0]["title"], vocabulary=270)  # an end among few tokens, so that texts do end
    small_model(architecture, len(tokenizer)).save_pretrained(root / architecture)
    tokenizer.save_pretrained(root / architecture)
    monkeypatch.setattr(trainers.SupervisedTrainer, "train", lambda *_: pytest.fail("taught"))
    change = {
        **{"generator": str(root / architecture), "lora_rank": 2, "factors": ["genre", "director"], "rounds": 1},
        **{"max_new_tokens": 150, "generation_batch_size": 16, "mmd_weight": 1.0, "loss": "simpo", "loss_options": {}},
    }
    run = execute("dpo4rec", root / f"{architecture}-run", data=str(data.folder), **{**SMALL, **change})
    rounds = pd.read_csv(run.folder / "rounds.csv")
    assert (rounds["over_long"] > 0).all() and rounds["pairs"][0] >= dpo4rec.FEWEST_PAIRS
    log = pd.read_csv(run.folder / "log.csv")
    assert log["mmd2_debiased"].notna().all()
    before = load_checkpoint(root / architecture)[0].state_dict()
    after = load_checkpoint(run.folder / "checkpoint")[0].state_dict()
    assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)


def test_the_control_has_everybodys_text_at_somebody_else(material, monkeypatch):
    seen = {}
    real = rerankers.fit_reranker

    def spy(lists, features, validation, **options):
        seen[len(seen)] = (features, options)
        assert lists is material.lists["train"] and validation[0] is material.lists["validation"]
        return real(lists, features, validation, **options)

    monkeypatch.setattr(rerankers, "fit_reranker", spy)
    count = len(material.users)
    greedy = [torch.arange(count).float()[:, None] + shift for shift in (1.0, 2.0)]
    items = torch.ones(48, 1)
    reranking = {name: value for name, value in RANKING.items() if name != "adaptor"}
    dpo4rec.evaluate(material, greedy, items, adaptor="mlp", seed=1, reranking=reranking)
    features = [found for found, _ in seen.values()]
    assert [options["adaptor"] for _, options in seen.values()] == ["mlp", "hybrid_experts", "mlp", "mlp", "mlp"]
    assert len({options["seed"] for _, options in seen.values()}) == 1
    assert features[0].user_knowledge is None and features[0].item_knowledge is None
    assert torch.equal(features[1].user_knowledge, greedy[0]) and torch.equal(features[3].user_knowledge, greedy[1])
    assert sorted(features[4].user_knowledge.tolist()) == greedy[1].tolist()
    assert not (features[4].user_knowledge == greedy[1]).any()
    assert all(torch.equal(found.item_knowledge, items) for found in features[1:])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rounds": 0}, "rounds = 0 aligns nothing"),
        ({"reranker": "prmm"}, r"unknown re-ranker 'prmm' \(did you mean 'prm'"),
        ({"factors": ["genree"]}, "unknown factor 'genree'"),
        ({"folds": 1, "teaching_epochs": 0.1}, "cannot be cut into folds = 1"),
    ],
)
def test_bad_parameters_are_refused(tmp_path, data, change, sentence):
    with pytest.raises(StudyError, match=sentence):
        execute("dpo4rec", tmp_path / "bad", data=str(data.folder), **{**SMALL, **change})


def test_factors_that_only_a_large_model_knows_are_not_taught():
    values = knowledge.factor_values(pd.DataFrame({"item": [1], "title": ["A"]}), np.array([1]), ["genre", "theme"])
    assert values == {}
