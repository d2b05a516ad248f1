"""SASRec: what a state may depend on, the same from torch's own attention, and what training owes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from causaldpo_lib.errors import StudyError
from causaldpo_lib.sasrec import (
    SASREC_LOSSES,
    SHAPE_FILE,
    WEIGHTS_FILE,
    SASRec,
    catalogue_logps,
    encode_histories,
    fit_sasrec,
    load_sasrec,
    save_sasrec,
)

ITEMS, LENGTH = 20, 5
IDS = np.array([f"film {number}" for number in range(ITEMS)])
SETTINGS = {"epochs": 3, "patience": 9, "learning_rate": 1e-2, "batch_size": 64, "weight_decay": 0.0, "seed": 0}


def sasrec(seed: int = 0, **shape) -> SASRec:
    torch.manual_seed(seed)
    return SASRec(ITEMS, **{"length": LENGTH, "hidden": 16, **shape})


def scattered(seed: int = 0, **shape) -> SASRec:
    """A model in evaluation whose every weight matters: none is at its starting value of 0 or 1."""
    model = sasrec(seed, **shape).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape))
        model.items.weight[0] = 0.0
    return model


def walks(step: int, count: int = 400, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Walks round the circle of items in steps of ``step``, of one to five items, and the item that follows."""
    rng = np.random.default_rng(seed)
    targets = rng.integers(ITEMS, size=count)
    rows = [[IDS[(t - step * back) % ITEMS] for back in range(rng.integers(1, 6), 0, -1)] for t in targets]
    return encode_histories(rows, IDS, LENGTH), torch.from_numpy(targets)


def weights_of(model: SASRec) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in model.parameters()])


# --- what a state may depend on ---


def test_padding_changes_nothing():
    model = scattered()
    short = torch.tensor([[3, 1, 4], [2, 7, 18]])
    padded = nn.functional.pad(short, (LENGTH - 3, 0))
    expected = model(short)
    torch.testing.assert_close(model(padded)[:, -3:], expected)
    with torch.no_grad():
        model.items.weight[0] = 100.0
    torch.testing.assert_close(model(padded)[:, -3:], expected)


def test_later_items_change_no_earlier_state_and_order_changes_the_last():
    model = scattered()
    states = model(torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 9, 8], [2, 1, 3, 4, 5]]))
    torch.testing.assert_close(states[0, :3], states[1, :3])
    assert (states[0, 3:] - states[1, 3:]).abs().max() > 0.1
    assert (states[0, -1] - states[2, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("history", [[3, 1, 4, 20], [0]], ids=["four items", "none"])
def test_scores_are_those_of_torchs_own_attention(heads, history):
    """The paper's equations once more, position by position and without padding, around nn.MultiheadAttention."""
    model = scattered(heads=heads)
    x = torch.stack([4.0 * model.items.weight[item] for item in history])  # 4 = sqrt(16)
    x = x + model.positions[LENGTH - len(history) :]
    for block in model.blocks:
        attention = nn.MultiheadAttention(16, heads, batch_first=True)
        attention.in_proj_weight, attention.in_proj_bias = block.query_key_value.weight, block.query_key_value.bias
        attention.out_proj = block.output
        y = block.attention_norm(x)
        x = x + torch.cat([attention(y[t : t + 1], y[: t + 1], y[: t + 1])[0] for t in range(len(history))])
        first, second = block.feed[0], block.feed[3]
        x = x + second(first(block.feed_norm(x)).clamp(min=0))
    last = nn.functional.layer_norm(x[-1], [16], model.norm.weight, model.norm.bias)
    expected = torch.stack([last @ model.items.weight[number] for number in range(1, ITEMS + 1)])
    histories = nn.functional.pad(torch.tensor([history]), (LENGTH - len(history), 0))
    torch.testing.assert_close(model.logits(histories)[0], expected, atol=1e-4, rtol=1e-4)
    logps = catalogue_logps(model, histories.repeat(5, 1), batch_size=2)
    assert logps.shape == (5, ITEMS) and logps.dtype == np.float32
    np.testing.assert_allclose(logps[4], torch.log_softmax(expected, 0).detach(), atol=1e-4)


def test_log_probabilities_are_without_dropout():
    model, (histories, _) = sasrec(dropout=0.5).train(), walks(1)
    np.testing.assert_array_equal(catalogue_logps(model, histories), catalogue_logps(model.train(), histories))


# --- histories and losses ---


def test_histories_keep_their_latest_items_on_the_right():
    ids = np.array([50, 70, 90])
    rows = [[70], [], np.array([90, 50, 70, 90])]
    assert encode_histories(rows, ids, 3).tolist() == [[0, 0, 2], [0, 0, 0], [1, 2, 3]]


def test_softmax_loss_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0], [math.log(2.0), 0.0, 0.0]])
    value = SASREC_LOSSES["softmax"](logits, torch.tensor([1, 0]), torch.Generator())
    assert value.item() == pytest.approx((math.log(3.0) + math.log(2.0)) / 2)


@pytest.mark.parametrize("target", [0, 1, 3])
def test_bce_draws_every_item_but_the_target(target):
    """A negative's loss log(1 + e^r) tells which item it was, and the mean how often."""
    scores = torch.tensor([1.0, 2.0, 4.0, 8.0])
    others = [math.log1p(math.exp(r)) for item, r in enumerate(scores.tolist()) if item != target]
    logits, targets = scores.expand(20_000, 4), torch.full((20_000,), target)
    value = SASREC_LOSSES["bce"](logits, targets, torch.Generator().manual_seed(0)).item()
    assert value - math.log1p(math.exp(-scores[target].item())) == pytest.approx(np.mean(others), abs=0.05)


# --- training ---


@pytest.mark.parametrize("loss", list(SASREC_LOSSES))
def test_learns_a_deterministic_chain(loss):
    model, train, unseen = sasrec(hidden=32), walks(1, 2000), walks(1, 300, seed=1)
    train[0][:20] = 0  # empty histories read the padding, whose embedding stays 0 even so
    rows = fit_sasrec(model, train, unseen, loss=loss, **{**SETTINGS, "epochs": 20})
    found = catalogue_logps(model, unseen[0])
    assert (found.argmax(axis=1) == unseen[1].numpy()).mean() > 0.95
    assert rows[-1]["loss"] < rows[0]["loss"] / 3
    assert (model.items.weight[0] == 0).all()


def test_a_model_to_which_all_items_are_the_same_hits_nothing():
    """Ties stand before the target; and means are over rows, whatever the batches."""
    model = sasrec()
    nn.init.zeros_(model.items.weight)
    settings = {**SETTINGS, "epochs": 1, "learning_rate": 0.0}
    (row,) = fit_sasrec(model, walks(1), walks(1), loss="softmax", **settings)
    assert row["validation_ndcg10"] == 0
    assert row["loss"] == pytest.approx(math.log(ITEMS)) and row["validation_logp"] == pytest.approx(-row["loss"])


@pytest.mark.parametrize("loss", list(SASREC_LOSSES))
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_seed_decides_and_nothing_else(loss, dropout):
    found = []
    for noise, seed in ((1, 0), (2, 0), (3, 7)):
        model = sasrec(dropout=dropout)
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        fit_sasrec(model, walks(1), walks(1), loss=loss, **{**SETTINGS, "seed": seed})
        assert torch.equal(torch.get_rng_state(), before)
        found.append(weights_of(model))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_stops_early_with_the_weights_of_the_best_epoch():
    """The validation walks go the other way round, so that what is learned makes them worse."""
    model, validation = sasrec(), walks(-1)
    rows = fit_sasrec(model, walks(1, 2000), validation, loss="softmax", **{**SETTINGS, "epochs": 50, "patience": 3})
    curve = [row["validation_ndcg10"] for row in rows]
    best = int(np.argmax(curve))
    assert len(rows) == best + 1 + 3 and [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    logps = catalogue_logps(model, validation[0])
    own = logps[np.arange(len(logps)), validation[1]]
    ranks = (logps > own[:, None]).sum(axis=1)
    assert np.where(ranks < 10, 1 / np.log2(ranks + 2), 0).mean() == pytest.approx(curve[best])
    assert own.mean() == pytest.approx(rows[best]["validation_logp"]) and curve[-1] < curve[best] - 0.01


# --- on disk ---


@pytest.mark.parametrize(
    "ids", [IDS, IDS.astype(object), np.arange(100, 100 + ITEMS)], ids=["texts", "objects", "ints"]
)
def test_saved_and_loaded_is_the_same(ids, tmp_path):
    model = scattered(heads=2, blocks=1, dropout=0.25)
    save_sasrec(model, ids, tmp_path / "new" / "folder")
    loaded, found = load_sasrec(tmp_path / "new" / "folder")
    assert found.tolist() == ids.tolist() and loaded.shape == model.shape and not loaded.training
    histories, _ = walks(1)
    np.testing.assert_array_equal(catalogue_logps(loaded, histories), catalogue_logps(model, histories))


@pytest.mark.parametrize("name", [SHAPE_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("damage", ["missing", "cut off", "of another shape"])
def test_damaged_files_are_named(name, damage, tmp_path):
    save_sasrec(sasrec(), IDS, tmp_path)
    file = tmp_path / name
    if damage == "missing":
        file.unlink()
    elif damage == "cut off":
        file.write_bytes(file.read_bytes()[:-40])
    elif name == SHAPE_FILE:
        file.write_text(json.dumps({"ids": [1, 2], "width": 3}))
    else:
        save_sasrec(sasrec(hidden=8), IDS, tmp_path / "other")
        (tmp_path / "other" / WEIGHTS_FILE).rename(file)
    with pytest.raises(StudyError, match=f"{name} is missing or damaged") as caught:
        load_sasrec(tmp_path)
    assert "\n" not in str(caught.value)


# --- errors ---


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"loss": "sofmax"}, r"unknown SASRec loss 'sofmax' \(did you mean 'softmax'\?\)"),
        ({"epochs": 0}, "0 epochs of 400 training"),
        ({"learning_rate": float("inf")}, r"diverges in epoch 1 \(loss nan, .* nan\): lower learning_rate = inf"),
        ({"learning_rate": float("inf"), "batch_size": 400}, r"epoch 1 \(loss 3.*, validation log-probability nan\)"),
    ],
)
def test_training_refuses_in_one_sentence(change, sentence):
    with pytest.raises(StudyError, match=sentence):
        fit_sasrec(sasrec(), walks(1), walks(1), **{"loss": "softmax", **SETTINGS, **change})


def test_other_input_is_refused_in_one_sentence():
    with pytest.raises(StudyError, match="item 60 of a history is not in the catalogue"):
        encode_histories([[50], np.array([50, 60])], np.array([50, 70]), 3)
    with pytest.raises(StudyError, match="16 cannot be cut into 3 heads"):
        sasrec(heads=3)
    with pytest.raises(StudyError, match="histories have 6 items, but this SASRec reads 5"):
        sasrec()(torch.ones(1, 6, dtype=torch.long))
