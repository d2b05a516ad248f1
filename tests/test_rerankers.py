"""Re-rankers: losses by hand, what a score may depend on, known right orders that are learned, and what is refused."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from causaldpo_lib.errors import StudyError
from causaldpo_lib.metrics import list_ndcg
from causaldpo_lib.rerankers import (
    ADAPTORS,
    PAPER_LOSSES,
    RERANKERS,
    RERANKING_LOSSES,
    Features,
    Lists,
    Reranker,
    fit_reranker,
    list_scores,
    ranked_labels,
    text_scores,
)

ITEMS, PLACES, TASTES = 24, 8, 4
SHAPE = {"adaptor": "linear", "embedding": 8, "hidden": 16, "dropout": 0.0}
TRAINING = {"epochs": 25, "patience": 9, "learning_rate": 2e-2, "weight_decay": 0.0, "batch_size": 32, "seed": 0}


def some_lists(count: int, seed: int, places: int = PLACES) -> tuple[Lists, Tensor]:
    """Random lists of as many users with tastes (N,): an item's label is whether its number mod 4 is the user's taste.

    The initial order knows nothing of it.
    """
    rng = np.random.default_rng(seed)
    items = np.stack([rng.permutation(ITEMS)[:places] for _ in range(2 * count)])
    tastes = rng.integers(TASTES, size=2 * count)
    labels = items % TASTES == tastes[:, None]
    kept = np.flatnonzero(labels.any(axis=1))[:count]
    scores = -np.sort(rng.exponential(size=(count, places)))
    lists = Lists(
        torch.arange(count),
        torch.from_numpy(items[kept]),
        torch.from_numpy(labels[kept]).float(),
        torch.from_numpy(scores).float(),
    )
    return lists, torch.from_numpy(tastes[kept])


def told(tastes: Tensor) -> Tensor:
    """Knowledge that reveals the tastes, beside a large component that all texts share, as encoders' vectors have."""
    return 5.0 + nn.functional.one_hot(tastes, TASTES).float()


def some_features(count: int, seed: int = 0, item_knowledge: bool = True) -> Features:
    generator = torch.Generator().manual_seed(seed)
    histories = torch.randint(-1, ITEMS, (count, 5), generator=generator)
    histories[0] = -1
    about_items = torch.randn(ITEMS, TASTES, generator=generator) if item_knowledge else None
    return Features(histories, torch.randn(count, TASTES, generator=generator), about_items)


def no_features(count: int) -> Features:
    return Features(torch.full((count, 3), -1))


def scattered(kind: str, lists: Lists, features: Features, **change) -> Reranker:
    """A model in evaluation whose every weight matters: none is at its starting value of 0 or 1."""
    torch.manual_seed(0)
    model = Reranker(lists, features, kind=kind, **{**SHAPE, **change}).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape))
        model.items.weight[0] = 0.0
    return model


def in_float64(lists: Lists, features: Features) -> tuple[Lists, Features]:
    tables = {f"{name}_knowledge": table.double() for name, table in features.knowledge().items()}
    return replace(lists, scores=lists.scores.double()), replace(features, **tables)


def padded(lists: Lists, places: int) -> Lists:
    """The same lists with ``places`` more, whose scores are no numbers."""
    fill = {"items": -1, "labels": 0.0, "scores": math.nan}
    more = {name: nn.functional.pad(getattr(lists, name), (0, places), value=value) for name, value in fill.items()}
    return replace(lists, **more)


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([weight.detach().cpu().flatten() for weight in model.parameters()])


def fit(lists: Lists, features: Features, validation=None, kind: str = "set_rank", **change):
    settings = {"loss": PAPER_LOSSES.get(kind, "softmax"), **SHAPE, **TRAINING, **change}
    return fit_reranker(lists, features, validation, kind=kind, **settings)


def ndcg(model: Reranker, lists: Lists, features: Features) -> float:
    return float(list_ndcg(ranked_labels(list_scores(model, lists, features), lists.labels), 5).mean())


# --- losses ---

LN = math.log
HAND_WORKED = {  # of the lists (s = 0, ln 2; y = 0, 1) and (s = 0, 0, ln 2; y = 1, 1, 0)
    "bce": (LN(3) / 2, LN(12) / 3),
    "attention_rank": (2 * LN(3 / 2), LN(32 / 3)),
    "softmax": (LN(3 / 2), LN(4)),
}


def test_every_loss_has_a_hand_worked_value_and_every_reranker_the_loss_of_its_paper():
    assert set(HAND_WORKED) == set(RERANKING_LOSSES)
    assert set(PAPER_LOSSES) == set(RERANKERS) and set(PAPER_LOSSES.values()) <= set(RERANKING_LOSSES)


@pytest.mark.parametrize("name", RERANKING_LOSSES)
@pytest.mark.parametrize("filler", [-math.inf, 7.0])
def test_losses_by_hand_whatever_stands_in_the_padding(name, filler):
    scores = torch.tensor([[0.0, LN(2), filler, filler], [0.0, 0.0, LN(2), filler]], dtype=torch.float64)
    labels = torch.tensor([[0.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    first, second = HAND_WORKED[name]
    assert RERANKING_LOSSES[name](scores, labels, mask).item() == pytest.approx((first + second) / 2)
    assert RERANKING_LOSSES[name](scores[1:], labels[1:], mask[1:]).item() == pytest.approx(second)


@pytest.mark.parametrize("name", RERANKING_LOSSES)
@pytest.mark.parametrize("size", [1.0, 200.0])
def test_gradients_are_finite_for_a_single_place_and_large_scores(name, size):
    scores = (size * torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 1.0]])).requires_grad_()
    mask = torch.tensor([[True, False, False], [True, True, True]])
    value = RERANKING_LOSSES[name](scores, torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), mask)
    value.backward()
    assert value.isfinite() and scores.grad.isfinite().all()
    assert (scores.grad[0, 1:] == 0).all() and scores.grad[1, 0] < 0 < scores.grad[1, 1]


# --- what a network reads ---


def test_a_place_is_described_as_documented():
    lists = Lists(
        torch.tensor([1, 0]),
        torch.tensor([[3, 0, 2, -1], [2, 3, -1, -1]]),
        torch.zeros(2, 4),
        torch.tensor([[-1.0, -2.0, -3.0, 0.0], [-4.0, -4.0, 0.0, 0.0]]),
    )
    features = Features(
        torch.tensor([[-1, -1, -1], [2, -1, 3]]),
        torch.tensor([[3.0, 1.0], [1.0, 1.0]]),
        torch.tensor([[1.0], [9.0], [0.0], [2.0]]),
    )
    model = scattered("dlcm", lists, features, embedding=2)
    read = []
    model.network.register_forward_pre_hook(lambda network, given: read.append(given[0]))
    scores = model(lists, features)
    e = dict(zip([0, 2, 3], model.items.weight[1:], strict=True))
    of_user, of_items = model.adaptor["user"], model.adaptor["item"]
    for (row, place), z, rank, history, user, item in (
        # Knowledge: users 3 and 1 (and a constant 1) have centre 2 (and 1), mean square 1/2 over both dimensions;
        # items 1, 2 and 2 (once a place, without the 0 of the item that says nothing) have 5/3 and sqrt(2)/3.
        ((0, 0), math.sqrt(1.5), 1, (e[2] + e[3]) / 2, [-math.sqrt(2), 0.0], [1 / math.sqrt(2)]),
        ((0, 1), 0.0, 1 / 2, (e[2] + e[3]) / 2, [-math.sqrt(2), 0.0], [-math.sqrt(2)]),
        ((0, 2), -math.sqrt(1.5), 1 / 3, (e[2] + e[3]) / 2, [-math.sqrt(2), 0.0], [0.0]),
        ((1, 1), 0.0, 1, torch.zeros(2), [math.sqrt(2), 0.0], [1 / math.sqrt(2)]),
    ):
        own = e[int(lists.items[row, place])]
        knowledge = of_user(torch.tensor(user)), of_items(torch.tensor(item))
        expected = torch.cat([own, torch.tensor([z, rank]), history, *knowledge])
        torch.testing.assert_close(read[0][row, place], expected)
    assert (read[0][~lists.mask] == 0).all() and (scores[~lists.mask] == -math.inf).all()


def test_what_training_did_not_show_has_no_embedding():
    lists, _ = some_lists(1, 0)
    model = scattered("set_rank", lists, no_features(1))
    unseen = [item for item in range(ITEMS) if item not in lists.items]
    known = lists.items[0, :4].tolist()
    first, second = (
        replace(lists, items=torch.tensor([known + others])) for others in (unseen[:4], [*unseen[4:7], ITEMS + 50])
    )
    assert torch.equal(model(first, no_features(1)), model(second, no_features(1)))
    third = replace(lists, items=torch.tensor([unseen[:4] + unseen[:4]]))
    assert not torch.equal(model(third, no_features(1)), model(second, no_features(1)))


@pytest.mark.parametrize("adaptor", ADAPTORS)
def test_adaptors_map_each_table_and_share_only_what_hybrid_experts_share(adaptor):
    torch.manual_seed(0)
    module = ADAPTORS[adaptor]({"user": 6, "item": 6}, 3)
    tables = {"user": torch.randn(2, 6), "item": torch.randn(4, 5, 6)}
    found = module(tables)
    assert {name: value.shape for name, value in found.items()} == {"user": (2, 3), "item": (4, 5, 3)}
    found["user"].sum().backward()
    alone = {name for name, weight in module.named_parameters() if weight.grad is None}
    assert alone and all("item" in name for name in alone)
    assert any("user" not in name for name, _ in module.named_parameters() if name not in alone) == (
        adaptor == "hybrid_experts"
    )


def test_hybrid_experts_are_a_gated_sum():
    torch.manual_seed(0)
    module = ADAPTORS["hybrid_experts"]({"user": 6, "item": 6}, 3)
    table = torch.randn(4, 6)
    for name in ("user", "item"):
        experts = [*module.shared, *module.specific[name]]
        odds = module.gates[name](table).exp()
        expected = sum(odds[:, [e]] * expert(table) for e, expert in enumerate(experts)) / odds.sum(1, keepdim=True)
        torch.testing.assert_close(module({name: table})[name], expected)
    assert len(module.shared) == 2 and len(module.specific["user"]) == len(module.specific["item"]) == 5


def test_dlcm_is_its_equation():
    """Once more with torch's cell for one step, list by list and without padding."""
    torch.manual_seed(0)
    network = RERANKERS["dlcm"](6, 10, PLACES, 0.0).eval()
    cell = nn.GRUCell(6, 10)
    for name, weight in network.read.named_parameters():
        setattr(cell, name.removesuffix("_l0"), weight)
    places = torch.randn(2, 5, 6)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    for row, size in enumerate((5, 3)):
        states = [torch.zeros(1, 10)]
        for i in range(size):
            states.append(cell(places[row, i : i + 1], states[-1]))
        o = nn.functional.layer_norm(torch.cat(states[1:]), [10])
        phi = o * torch.tanh(network.context(o[-1]))
        torch.testing.assert_close(network(places, mask)[row, :size], network.score(phi)[:, 0])


@pytest.mark.parametrize(("kind", "heads"), [("prm", 1), ("set_rank", 2)])
def test_prm_and_set_rank_are_their_equations(kind, heads):
    """A transformer encoder's layer once more, head by head, between what each network does before and after it."""
    torch.manual_seed(0)
    network = RERANKERS[kind](6, 10, PLACES, 0.0).eval()
    places, block = torch.randn(5, 6), network.block
    x = network.project(places)
    if kind == "prm":
        x = x + network.positions[:5]
    query, key, value = (x @ block.self_attn.in_proj_weight.T + block.self_attn.in_proj_bias).split(10, dim=1)
    size = 10 // heads
    parts = [slice(head * size, (head + 1) * size) for head in range(heads)]
    read = [(query[:, h] @ key[:, h].T / math.sqrt(size)).softmax(dim=1) @ value[:, h] for h in parts]
    x = nn.functional.layer_norm(x + block.self_attn.out_proj(torch.cat(read, dim=1)), [10])
    assert block.linear1.out_features == 20
    x = nn.functional.layer_norm(x + block.linear2(block.linear1(x).clamp(min=0)), [10])
    found = network(places[None], torch.ones(1, 5, dtype=torch.bool))[0]
    torch.testing.assert_close(found, network.score(x)[:, 0])


# --- what a score may depend on ---


@pytest.mark.parametrize("kind", RERANKERS)
@pytest.mark.parametrize("knows", [True, False], ids=["knowledge", "none"])
def test_only_set_rank_gives_a_permuted_list_permuted_scores(kind, knows):
    lists, _ = some_lists(6, 0)
    features = some_features(6) if knows else no_features(6)
    model = scattered(kind, lists, features).double()
    lists, features = in_float64(lists, features)
    lists.scores[:, 3] = lists.scores[:, 2]  # a tie has no order to betray
    order = torch.randperm(PLACES, generator=torch.Generator().manual_seed(1))
    turned = replace(lists, **{name: getattr(lists, name)[:, order] for name in ("items", "labels", "scores")})
    change = (model(turned, features) - model(lists, features)[:, order]).abs().max().item()
    assert change < 1e-12 if kind == "set_rank" else change > 1e-3


@pytest.mark.parametrize("kind", RERANKERS)
def test_padding_and_other_lists_have_no_effect(kind):
    lists, _ = some_lists(6, 0)
    features = some_features(6)
    model = scattered(kind, lists, features).double()
    lists, features = in_float64(lists, features)
    short = Lists(lists.users, *(getattr(lists, name)[:, :5] for name in ("items", "labels", "scores")))
    expected = model(short, features)
    found = model(padded(short, 3), features)
    assert (found[:, 5:] == -math.inf).all()
    torch.testing.assert_close(found[:, :5], expected, atol=1e-12, rtol=0)
    for mode in (model.train(), model.eval()):  # dropout is 0
        torch.testing.assert_close(mode(short.rows([4]), features), expected[[4]], atol=1e-12, rtol=0)
    torch.testing.assert_close(list_scores(model, padded(short, 3), features, batch_size=4)[:, :5], expected.detach())


@pytest.mark.parametrize("kind", RERANKERS)
def test_scores_depend_on_every_feature(kind):
    lists, _ = some_lists(6, 0)
    features = some_features(6)
    model = scattered(kind, lists, features)
    before = model(lists, features)
    for changed in (
        (replace(lists, scores=lists.scores.flip(1)), features),
        (replace(lists, items=lists.items.flip(1)), features),
        (lists, replace(features, histories=features.histories.flip(0))),
        (lists, replace(features, user_knowledge=features.user_knowledge.flip(0))),
        (lists, replace(features, item_knowledge=features.item_knowledge.flip(0))),
    ):
        assert (model(*changed) - before).abs().max() > 1e-3


@pytest.mark.parametrize("kind", RERANKERS)
@pytest.mark.parametrize("adaptor", ADAPTORS)
def test_many_texts_at_once_are_the_same_as_one_by_one(kind, adaptor):
    lists, _ = some_lists(5, 0)
    features = some_features(7)
    lists = replace(lists, users=torch.tensor([6, 2, 2, 0, 5]))
    model = scattered(kind, lists, features, adaptor=adaptor)
    texts = torch.randn(7, 3, TASTES, generator=torch.Generator().manual_seed(3))
    texts[2, 1] = 0.0
    found = text_scores(model, lists, features, texts, batch_size=4)
    assert found.shape == (5, 3, PLACES)
    for which in range(3):
        alone = list_scores(model, lists, replace(features, user_knowledge=texts[:, which]))
        torch.testing.assert_close(found[:, which], alone)
    assert (found[:, 0] - found[:, 2]).abs().max() > 1e-3


def test_equal_scores_keep_the_initial_order_and_padding_comes_last():
    scores = torch.tensor([[1.0, 3.0, 1.0, 3.0, -math.inf], [0.0, 0.0, 0.0, 0.0, 0.0]])
    labels = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0, 1.0]])
    assert ranked_labels(scores, labels).tolist() == [[0, 1, 1, 0, 0], [0, 1, 0, 0, 1]]
    several = torch.stack([scores, -scores], dim=1)  # two rankings of each list
    assert ranked_labels(several, labels[:, None])[0].tolist() == [[0, 1, 1, 0, 0], [0, 1, 0, 0, 1]]


# --- training ---


@pytest.mark.parametrize("kind", RERANKERS)
@pytest.mark.parametrize("loss", RERANKING_LOSSES)
def test_a_known_right_order_is_learned(kind, loss):
    """All users have taste 0. Lists of training are of unequal lengths."""
    train, unseen = (
        replace(lists, labels=(lists.items % TASTES == 0).float())
        for lists in (padded(some_lists(150, 1, places=6)[0], 2), some_lists(150, 2)[0])
    )
    train, unseen = (lists.rows(lists.labels.any(dim=1)) for lists in (train, unseen))
    features = no_features(150)
    model, rows = fit(train, features, kind=kind, loss=loss)
    assert list_ndcg(unseen.labels, 5).mean() < 0.6
    assert ndcg(model, unseen, features) > 0.95
    assert rows[-1]["loss"] < rows[0]["loss"] and [row["epoch"] for row in rows] == list(range(1, 26))
    assert not model.training and (model.items.weight[0] == 0).all()


@pytest.mark.parametrize("kind", RERANKERS)
@pytest.mark.parametrize("adaptor", ADAPTORS)
def test_knowledge_that_reveals_the_answer_helps_and_shuffled_knowledge_does_not(kind, adaptor):
    (train, train_tastes), (unseen, tastes) = some_lists(300, 1), some_lists(150, 2)
    found = {}
    for name, mixed in (("right", False), ("shuffled", True)):
        tables = [told(each) for each in (train_tastes, tastes)]
        if mixed:
            tables = [table[torch.randperm(len(table), generator=torch.Generator().manual_seed(5))] for table in tables]
        first, second = (Features(no_features(len(table)).histories, table) for table in tables)
        found[name] = ndcg(fit(train, first, kind=kind, adaptor=adaptor, learning_rate=1e-2)[0], unseen, second)
    chance = list_ndcg(unseen.labels, 5).mean()
    assert found["right"] > 0.9 and found["shuffled"] < chance + 0.1 < 0.6


def test_knowledge_of_items_ranks_items_that_training_never_showed():
    train, unseen = some_lists(200, 1)[0], some_lists(100, 2)[0]
    unseen = replace(unseen, items=unseen.items + ITEMS)
    train, unseen = (replace(each, labels=(each.items % TASTES == 0).float()) for each in (train, unseen))
    train, unseen = (lists.rows(lists.labels.any(dim=1)) for lists in (train, unseen))
    features = replace(no_features(200), item_knowledge=told(torch.arange(2 * ITEMS) % TASTES))
    assert ndcg(fit(train, features)[0], unseen, features) > 0.95
    assert ndcg(fit(train, no_features(200))[0], unseen, no_features(200)) < 0.7


@pytest.mark.parametrize("kind", RERANKERS)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_seed_decides_and_nothing_else(kind, dropout):
    lists, features = some_lists(40, 0)[0], some_features(40)
    found = []
    for noise, seed in ((1, 0), (2, 0), (3, 7)):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        model, _ = fit(lists, features, kind=kind, dropout=dropout, seed=seed, epochs=2)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(weights_of(model))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("kind", RERANKERS)
def test_weights_come_from_the_training_lists_and_their_users_alone(kind):
    """Other users' histories and texts, and texts of items in no list, may say anything."""
    lists, features = some_lists(20, 0)[0], some_features(30)
    lists = replace(lists, items=lists.items % 12)
    lists = replace(lists, items=torch.where(lists.items == 5, 4, lists.items))
    other = copy.deepcopy(features)
    other.histories[20:] = torch.randint(ITEMS, (10, 5))
    other.user_knowledge[20:] = 99.0
    other.item_knowledge[[5, *range(12, ITEMS)]] = -99.0
    plain, changed = (fit(lists, each, kind=kind, epochs=3)[0] for each in (features, other))
    assert torch.equal(weights_of(plain), weights_of(changed))
    other.user_knowledge[3] = 99.0
    assert not torch.equal(weights_of(plain), weights_of(fit(lists, other, kind=kind, epochs=3)[0]))


def test_stops_early_with_the_weights_of_the_best_epoch():
    """Validation wants the opposite of what is learned, so that training makes it worse."""
    lists, features = some_lists(150, 1)[0], no_features(150)
    lists = replace(lists, labels=(lists.items < ITEMS // 2).float())
    lists = lists.rows(lists.labels.any(dim=1))
    other = replace(lists, labels=1.0 - lists.labels)
    other = other.rows(other.labels.any(dim=1))
    model, rows = fit(lists, features, (other, features), patience=3, learning_rate=1e-3)
    curve = [row["validation_ndcg5"] for row in rows]
    best = int(np.argmax(curve))
    assert len(rows) == best + 1 + 3 and curve[-1] < curve[best]
    assert ndcg(model, other, features) == pytest.approx(curve[best])
    assert "validation_ndcg5" not in fit(lists, features, epochs=1)[1][0]


def test_a_row_of_the_log_is_the_mean_over_lists_with_the_dropout_of_training():
    lists, features = some_lists(20, 0)[0], some_features(20)
    settings = {"learning_rate": 0.0, "batch_size": 7, "epochs": 2}
    model, rows = fit(lists, features, (lists, features), **settings)
    scores = list_scores(model, lists, features)
    value = RERANKING_LOSSES[PAPER_LOSSES["set_rank"]](scores, lists.labels, lists.mask).item()
    assert [row["loss"] for row in rows] == pytest.approx([value, value])
    model, rows = fit(lists, features, (lists, features), **settings, dropout=0.3)
    assert all(abs(row["loss"] - value) > 1e-4 for row in rows)
    assert torch.equal(list_scores(model, lists, features), list_scores(model.train(), lists, features))


def test_the_seed_orders_the_lists_anew_in_each_epoch(monkeypatch):
    lists, seen = some_lists(40, 0)[0], []

    def watched(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        seen.append(labels.cpu())
        return scores.sum()

    monkeypatch.setitem(RERANKING_LOSSES, "watched", watched)
    for seed in (0, 7):
        fit(lists, no_features(40), loss="watched", epochs=2, batch_size=40, seed=seed)
    assert not any(torch.equal(seen[0], other) for other in [*seen[1:], lists.labels])


def test_weight_decay_makes_weights_smaller():
    lists, features = some_lists(40, 0)[0], no_features(40)
    sizes = [weights_of(fit(lists, features, weight_decay=decay)[0]).square().sum() for decay in (0.0, 1.0)]
    assert sizes[1] < sizes[0] / 2


def test_validation_leaves_the_weights_of_an_epoch_as_they_are():
    lists, features = some_lists(40, 0)[0], some_features(40)
    with_, without = (fit(lists, features, each, epochs=1, dropout=0.2)[0] for each in ((lists, features), None))
    assert torch.equal(weights_of(with_), weights_of(without))


def test_texts_that_are_all_the_same_or_empty_are_no_obstacle():
    lists = some_lists(30, 0)[0]
    for table in (torch.full((30, 3), 0.1), torch.zeros(30, 3)):
        features = replace(no_features(30), user_knowledge=table)
        model, rows = fit(lists, features, epochs=2)
        assert all(math.isfinite(row["loss"]) for row in rows)
        assert model.user_scale == 1
    texts = torch.stack([torch.zeros(30, 3), table], dim=1)
    found = text_scores(model, lists, features, texts)
    assert torch.equal(found[:, 0], found[:, 1])


def test_tables_of_any_precision_serve():
    lists, features = some_lists(20, 0)[0], some_features(20)
    plain, _ = fit(lists, features, epochs=2)
    doubled = replace(in_float64(lists, features)[0], labels=lists.labels.long()), in_float64(lists, features)[1]
    other, _ = fit(*doubled, epochs=2)
    assert torch.equal(list_scores(other, *doubled), list_scores(plain, lists, features))


@pytest.mark.parametrize("kind", RERANKERS)
def test_no_lists_have_no_scores(kind):
    lists, features = some_lists(3, 0)[0], some_features(3)
    model = scattered(kind, lists, features)
    assert list_scores(model, lists.rows([]), features).shape == (0, PLACES)
    assert text_scores(model, lists.rows([]), features, torch.zeros(3, 2, TASTES)).shape == (0, 2, PLACES)


# --- errors ---

_LISTS, _FEATURES = some_lists(12, 0)[0], some_features(12)


def _with(name: str, row: int, place: int, value: float, lists: Lists = _LISTS) -> Lists:
    table = getattr(lists, name).clone()
    table[row, place] = value
    return replace(lists, **{name: table})


@pytest.mark.parametrize(
    ("lists", "sentence"),
    [
        (replace(_LISTS, labels=_LISTS.labels * (torch.arange(12) != 7)[:, None]), "training list 7 has no positive"),
        (replace(_LISTS, items=torch.full_like(_LISTS.items, -1)), "training list 0 has no items"),
        (_with("items", 3, 2, -1), r"training list 3 has padding \(-1\) before an item"),
        (_with("items", 4, 2, ITEMS), f"training list 4 has an item outside the {ITEMS} rows of item knowledge"),
        (_with("scores", 5, 1, math.nan), "training list 5 has a score that is not finite"),
        (_with("labels", 6, 0, 0.5), "training list 6 has a label other than 0 and 1"),
        (_with("labels", 8, 8, 1.0, padded(_LISTS, 1)), "training list 8 has .* a positive in its padding"),
        (replace(_LISTS, users=torch.arange(12) + 1), "training list 11 is of a user outside the 12 rows of features"),
        (_LISTS.rows([]), "25 epochs of 0 lists fit nothing"),
    ],
)
def test_lists_are_refused_with_their_row(lists, sentence):
    with pytest.raises(StudyError, match=sentence):
        fit(lists, _FEATURES)


def test_lists_of_validation_are_checked_and_scored_ones_need_no_positive():
    bare = replace(_LISTS, labels=torch.zeros_like(_LISTS.labels))
    with pytest.raises(StudyError, match="validation list 0 has no positive"):
        fit(_LISTS, _FEATURES, (bare, _FEATURES))
    model, _ = fit(_LISTS, _FEATURES, epochs=1)
    assert torch.equal(list_scores(model, bare, _FEATURES), list_scores(model, _LISTS, _FEATURES))
    with pytest.raises(StudyError, match=r"scored list 3 has padding \(-1\) before an item"):
        list_scores(model, _with("items", 3, 2, -1), _FEATURES)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kind": "prn"}, r"unknown re-ranker 'prn' \(did you mean 'prm'\?\)"),
        ({"loss": "sofmax"}, r"unknown re-ranking loss 'sofmax' \(did you mean 'softmax'\?\)"),
        ({"adaptor": "linaer"}, r"unknown adaptor 'linaer' \(did you mean 'linear'\?\)"),
        ({"epochs": 0}, "0 epochs of 12 lists fit nothing"),
        ({"hidden": 15}, "15 cannot be cut into 2 heads"),
        ({"learning_rate": float("inf")}, "diverges in epoch 2: lower learning_rate = inf"),
    ],
)
def test_training_refuses_in_one_sentence(change, sentence):
    with pytest.raises(StudyError, match=sentence):
        fit(_LISTS, _FEATURES, **{"batch_size": 99, **change})


def test_what_does_not_fit_together_is_refused():
    wide = replace(_FEATURES, item_knowledge=torch.randn(ITEMS, 9))
    with pytest.raises(StudyError, match=r"one width of knowledge, not 4 \(user\) and 9 \(item\)"):
        fit(_LISTS, wide, adaptor="hybrid_experts")
    with pytest.raises(StudyError, match="knowledge of 13 users, but histories of 12"):
        fit(_LISTS, replace(_FEATURES, user_knowledge=torch.zeros(13, TASTES)))
    model, _ = fit(_LISTS, _FEATURES, kind="prm", epochs=1)
    with pytest.raises(StudyError, match="trained with user and item knowledge, not item: give it what it was"):
        list_scores(model, _LISTS, replace(_FEATURES, user_knowledge=None))
    with pytest.raises(StudyError, match="lists have 9 places, but this PRM was trained on 8"):
        list_scores(model, padded(_LISTS, 1), _FEATURES)
    with pytest.raises(StudyError, match="texts of 11 users, but histories of 12"):
        text_scores(model, _LISTS, _FEATURES, torch.zeros(11, 2, TASTES))
    with torch.no_grad():
        model.network.score.weight.fill_(math.nan)
    with pytest.raises(StudyError, match="scores are not finite"):
        list_scores(model, _LISTS, _FEATURES)
