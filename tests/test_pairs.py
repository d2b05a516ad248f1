"""Negative samplers: what each of ``NEGATIVES`` owes, and the distribution or the list that it draws from."""

from __future__ import annotations

import time
from collections import Counter

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import TfidfVectorizer

from causaldpo_lib.errors import StudyError
from causaldpo_lib.pairs import NEGATIVES, _drawn_by_row, preference_pairs

WORDS = ("comet", "comets", "harbor", "harbour", "crown", "crowned", "tiger", "tigers")


def catalogue(size: int = 30, text_ids: bool = False) -> pd.DataFrame:
    """Long-tailed counts, the last three never trained on; titles in families that share a word."""
    ids = np.arange(100, 100 + size)
    counts = (200 / np.arange(1, size + 1)).astype(int)
    counts[-3:] = 0
    titles = [f"The {WORDS[i % len(WORDS)]} of part {i // len(WORDS)}" for i in range(size)]
    table = pd.DataFrame({"item": ids, "title": titles, "train_count": counts})
    return table.astype({"item": str}) if text_ids else table


def examples_of(items: pd.DataFrame, count: int = 40, seed: int = 0, longest: int = 6) -> pd.DataFrame:
    """Histories of different lengths, one of them empty, with the lists that two samplers read."""
    rng = np.random.default_rng(seed)
    rows = []
    for row in range(count):
        picked = rng.permutation(items["item"].to_numpy()).tolist()
        length = row % (longest + 1)
        listed = [*picked[: length + 9], picked[length + 3]]  # the target is in it, and an item twice
        memberships = rng.dirichlet([0.5, 0.5, 0.5])
        lists = rng.permutation(listed).tolist(), rng.permutation(picked)
        rows.append((picked[length], picked[:length], *lists, memberships))
    columns = ["item", "history", "candidates", "ranked", "memberships"]
    return pd.DataFrame(rows, columns=columns).set_axis(range(7, 7 + count))


def arrow(examples: pd.DataFrame) -> pd.DataFrame:
    """The same with Arrow lists of ids, as a parquet file gives them back."""
    kind = pa.string() if isinstance(examples["item"].iloc[0], str) else pa.int64()
    lists = pd.ArrowDtype(pa.list_(kind))
    columns = ("history", "candidates", "ranked")
    return examples.assign(**{c: pd.Series(examples[c].map(list), dtype=lists) for c in columns})


@pytest.fixture(params=[False, True], ids=["numbers", "texts"])
def items(request) -> pd.DataFrame:
    return catalogue(text_ids=request.param)


@pytest.fixture(params=list(NEGATIVES))
def name(request) -> str:
    return request.param


# --- what all of them owe ---


def test_negatives_are_distinct_and_neither_target_nor_history(name, items):
    examples = examples_of(items)
    drawn = preference_pairs(examples, items, name, 3, seed=0)
    assert drawn.shape == (len(examples), 3) and drawn.dtype == items["item"].to_numpy().dtype
    for row, (_, example) in zip(drawn.tolist(), examples.iterrows(), strict=True):
        assert len({*row, example["item"], *example["history"]}) == 4 + len(example["history"])
        assert set(row) <= set(items["item"])


def test_the_seed_decides(name, items):
    examples = examples_of(items)
    first, again, other = (preference_pairs(examples, items, name, 2, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    # a model's ranking holds no chance
    assert np.array_equal(first, other) == (name == "self_generated")


def test_histories_may_come_from_a_file(name, items):
    examples = examples_of(items)
    np.testing.assert_array_equal(
        preference_pairs(examples, items, name, 2, 0), preference_pairs(arrow(examples), items, name, 2, 0)
    )


def test_the_last_ones_left_are_found_and_one_more_is_refused(name):
    """Seven items, three in the history and one the target: three are left, and 3 negatives are exactly they."""
    items = catalogue(10).iloc[:7]
    ids = items["item"].tolist()
    examples = pd.DataFrame({"item": [ids[0]] * 50, "history": [ids[4:]] * 50})
    examples = examples.assign(candidates=[ids] * 50, ranked=[ids] * 50, memberships=[[0.2, 0.8]] * 50)
    assert {frozenset(row) for row in preference_pairs(examples, items, name, 3, 0).tolist()} == {frozenset(ids[1:4])}
    with pytest.raises(StudyError, match="lower negatives_per_prompt") as caught:
        preference_pairs(examples, items, name, 4, 0)
    assert "\n" not in str(caught.value)


@settings(max_examples=25, deadline=None)
@given(
    size=st.integers(12, 40), count=st.integers(1, 4), seed=st.integers(0, 99), sampler=st.sampled_from([*NEGATIVES])
)
def test_any_size_any_seed(size, count, seed, sampler):
    items = catalogue(size)
    examples = examples_of(items, 15, seed, longest=2)
    drawn = preference_pairs(examples, items, sampler, count, seed)
    for row, item, history in zip(drawn.tolist(), examples["item"], examples["history"], strict=True):
        assert len({*row, item, *history}) == count + 1 + len(history)


@pytest.mark.parametrize(
    ("change", "sampler", "count", "sentence"),
    [
        ({}, "unifrom", 1, r"unknown negative sampler 'unifrom' \(did you mean 'uniform'\?\)"),
        ({}, "uniform", 0, "negatives_per_prompt is 0"),
        ({"item": 5}, "uniform", 1, "target 5 is not in the catalogue"),
        ({"candidates": None}, "candidates", 1, "a column 'candidates', which the examples lack"),
        ({"ranked": None}, "self_generated", 1, "a column 'ranked', which the examples lack"),
        ({"memberships": None}, "environment_matched", 1, "a column 'memberships', which the examples lack"),
        ({"ranked": [[100, 5]] * 40}, "self_generated", 1, "item of column 'ranked' 5 is not in the catalogue"),
        ({"candidates": [[]] * 40}, "candidates", 1, "leaves 0 items .* of example 7, not 1"),
    ],
)
def test_bad_input_is_one_sentence(change, sampler, count, sentence):
    items = catalogue()
    examples = examples_of(items).assign(**{key: value for key, value in change.items() if value is not None})
    examples = examples.drop(columns=[key for key, value in change.items() if value is None])
    with pytest.raises(StudyError, match=sentence) as caught:
        preference_pairs(examples, items, sampler, count, 0)
    assert "\n" not in str(caught.value)
    with pytest.raises(StudyError, match="there are no examples"):
        preference_pairs(examples.iloc[:0], items, "uniform", 1, 0)


# --- what each draws from ---


def drawn_shares(sampler: str, items: pd.DataFrame, history: list, rows: int = 20_000) -> tuple[dict, dict]:
    """Shares of first and second negatives of one example, repeated."""
    target = items["item"].iloc[2]
    examples = pd.DataFrame({"item": [target] * rows, "history": [history] * rows})
    drawn = preference_pairs(examples, items, sampler, 2, seed=3)
    return tuple({item: n / rows for item, n in Counter(drawn[:, place].tolist()).items()} for place in (0, 1))


@pytest.mark.parametrize("sampler", ["uniform", "popularity"])
def test_frequencies_are_those_of_drawing_without_replacement(sampler):
    items = catalogue(12)
    ids = items["item"].tolist()
    weight = dict(zip(ids, [1.0] * 12 if sampler == "uniform" else items["train_count"], strict=True))
    for taken in (ids[0], ids[7], ids[2]):
        weight[taken] = 0.0
    total = sum(weight.values())
    first = {i: w / total for i, w in weight.items() if w}
    second = {i: sum(first[j] * w / (total - weight[j]) for j in first if j != i) for i, w in weight.items() if w}
    for found, expected in zip(drawn_shares(sampler, items, [ids[0], ids[7]]), (first, second), strict=True):
        assert set(found) == set(expected)
        chi2 = sum(20_000 * (found[i] - p) ** 2 / p for i, p in expected.items())
        assert chi2 < 3 * len(expected)  # its mean is one less than their number, its deviation about 4


def test_popular_items_are_drawn_when_the_history_holds_most_of_the_mass():
    items = catalogue(12).assign(train_count=[10**6, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0])
    examples = pd.DataFrame({"item": [101] * 20, "history": [[]] * 20})
    drawn = preference_pairs(examples, items, "popularity", 3, 0)
    assert {frozenset(row) for row in drawn.tolist()} == {frozenset([100, 102, 103])}
    untrained = examples.assign(history=[[104, 105]] * 20)  # takes nothing away from what can be drawn
    assert np.isin(preference_pairs(untrained, items, "popularity", 3, 0), [100, 102, 103]).all()
    behind = examples.assign(history=[[100]] * 20)
    assert {frozenset(row) for row in preference_pairs(behind, items, "popularity", 2, 0).tolist()} == {
        frozenset([102, 103])
    }


def test_candidates_are_drawn_evenly_however_often_they_are_listed():
    items = catalogue(12)
    rows = 20_000
    examples = pd.DataFrame({"item": [102] * rows, "history": [[103]] * rows})
    examples = examples.assign(candidates=[[102, 103, 104, 104, 105, 106]] * rows)
    found = Counter(preference_pairs(examples, items, "candidates", 1, 0)[:, 0].tolist())
    assert set(found) == {104, 105, 106}
    assert max(abs(n / rows - 1 / 3) for n in found.values()) < 0.015


def test_semantic_negatives_are_the_nearest_titles():
    items = catalogue(40)
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True).fit_transform(items["title"])
    vectors = vectors.toarray()
    for target in (0, 17, 33):
        history = [100 + (target + 8) % 40, 100 + (target + 16) % 40]
        near = {i: round(float(vectors[target] @ vectors[i]), 12) for i in range(40)}
        ranked = sorted((i for i in near if i != target and 100 + i not in history), key=lambda i: (-near[i], i))
        examples = pd.DataFrame({"item": [100 + target] * 400, "history": [history] * 400})
        longer = pd.DataFrame({"item": [100], "history": [list(range(110, 130))]})
        both = pd.concat([examples, longer], ignore_index=True)
        drawn = NEGATIVES["semantic"](both, items, 2, np.random.default_rng(0), neighbours=5)[:400]
        assert {item - 100 for item in drawn.ravel().tolist()} == set(ranked[:5])
        found = Counter(drawn.ravel().tolist())
        assert max(abs(n / 800 - 1 / 5) for n in found.values()) < 0.06


def test_self_generated_negatives_are_the_first_of_the_ranking():
    items = catalogue(12)
    examples = pd.DataFrame(
        {
            "item": [102, 105],
            "history": [[100], []],
            "ranked": [[100, 104, 102, 104, 111, 101], [105, 101, 100]],
        }
    )
    drawn = preference_pairs(examples, items, "self_generated", 2, 0)
    assert drawn.tolist() == [[104, 111], [101, 100]]


def test_drawing_is_much_faster_than_a_loop():
    items = catalogue(2000)
    examples = examples_of(catalogue(200), 400, longest=9)[["item", "history"]]
    examples = pd.concat([examples] * 5, ignore_index=True)
    preference_pairs(examples[:50], items, "uniform", 3, 0)
    start = time.perf_counter()
    preference_pairs(examples, items, "uniform", 3, 0)
    middle = time.perf_counter()
    rng, ids = np.random.default_rng(0), items["item"].to_numpy()
    for history, item in zip(examples["history"], examples["item"], strict=True):
        allowed = np.setdiff1d(ids, [*history, item])
        rng.choice(allowed, 3, replace=False)
    assert time.perf_counter() - middle > 5 * (middle - start)


# --- environment-matched negatives ---


def matched(memberships: list[list[float]], chosen: list[int], count: int, **options) -> pd.DataFrame:
    """Many draws of one negative for prompts with these memberships and chosen items, no histories."""
    items = catalogue(8)
    rows = [(items["item"].iloc[place], [], row) for place, row in zip(chosen, memberships, strict=True)]
    examples = pd.DataFrame(rows, columns=["item", "history", "memberships"])
    examples = pd.concat([examples] * count, ignore_index=True)
    drawn = preference_pairs(examples, items, "environment_matched", 1, 0, **options)[:, 0]
    places = pd.Index(items["item"]).get_indexer(drawn)
    return pd.DataFrame({"prompt": np.tile(np.arange(len(chosen)), count), "place": places})


def test_environment_matched_negatives_are_drawn_from_the_mixture_of_the_environments_choices():
    """q(y|x) = sum_k p(k|x) (1/V + sum_i p_ik 1[y_i = y]) / (1 + sum_i p_ik), by loops, without the target."""
    memberships = [[1.0, 0.0], [0.9, 0.1], [0.3, 0.7], [0.0, 1.0], [0.2, 0.8]]
    chosen, size, count = [0, 1, 1, 2, 3], 8, 4000
    found = matched(memberships, chosen, count)
    for prompt, row in enumerate(memberships):
        q = np.zeros(size)
        for k in (0, 1):
            mass = count * sum(each[k] for each in memberships)
            for y in range(size):
                votes = count * sum(each[k] for each, item in zip(memberships, chosen, strict=True) if item == y)
                q[y] += row[k] * (1 / size + votes) / (1 + mass)
        q[chosen[prompt]] = 0
        shares = np.bincount(found.loc[found["prompt"] == prompt, "place"], minlength=size) / count
        assert shares == pytest.approx(q / q.sum(), abs=0.03)


def test_the_first_of_a_block_are_those_of_the_whole_order():
    """Draws one by one against a full stable sort of the same perturbed log-weights."""
    items, count = catalogue(60), 5
    examples = examples_of(items, 1100)  # three blocks
    weights = np.random.default_rng(1).random((len(examples), len(items))) + 0.01
    found = _drawn_by_row(examples, items, lambda rows: weights[rows], count, np.random.default_rng(2))
    rng, ids = np.random.default_rng(2), items["item"].to_numpy()
    for start in range(0, len(examples), 512):
        block = weights[start : start + 512]
        keys = np.log(block) + rng.gumbel(size=block.shape)
        for row, key in enumerate(keys, start=start):
            example = examples.iloc[row]
            free = ~np.isin(ids, [*example["history"], example["item"]])
            order = [place for place in np.argsort(-key, kind="stable") if free[place]]
            assert found[row].tolist() == ids[order[:count]].tolist()


def test_one_environment_is_the_popularity_among_the_chosen():
    found = matched([[1.0]] * 5, [0, 0, 0, 1, 2], 4000)
    other = found[found["prompt"] == 4]["place"].value_counts(normalize=True)
    assert other[0] == pytest.approx(3 / 4, abs=0.03) and other[1] == pytest.approx(1 / 4, abs=0.03)


def test_tempering_goes_from_uniform_to_the_sampler():
    shares = {}
    for tempering in (0.0, 0.5, 1.0):
        found = matched([[1.0]] * 5, [0, 0, 0, 1, 2], 4000, tempering=tempering)
        shares[tempering] = (found.loc[found["prompt"] == 4, "place"] == 0).mean()
    assert shares[0.0] == pytest.approx(1 / 7, abs=0.02)  # the target is left out
    assert shares[0.0] < shares[0.5] < shares[1.0]


def test_popularity_is_tempered_too():
    items = catalogue(8).assign(train_count=[16, 4, 1, 0, 0, 0, 0, 0])
    examples = pd.DataFrame({"item": [items["item"].iloc[7]] * 6000, "history": [[]] * 6000})
    drawn = preference_pairs(examples, items, "popularity", 1, 0, tempering=0.5)[:, 0]
    shares = pd.Series(drawn).map(dict(zip(items["item"], range(8), strict=True))).value_counts(normalize=True)
    assert shares.sort_index().tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=0.03)


def test_popularity_without_weight_is_uniform_over_trained_items():
    items = catalogue(8).assign(train_count=[16, 4, 1, 0, 0, 0, 0, 0])
    examples = pd.DataFrame({"item": [items["item"].iloc[7]] * 6000, "history": [[]] * 6000})
    drawn = preference_pairs(examples, items, "popularity", 1, 0, tempering=0.0)[:, 0]
    shares = pd.Series(drawn).map(dict(zip(items["item"], range(8), strict=True))).value_counts(normalize=True)
    assert shares.sort_index().to_dict() == pytest.approx({0: 1 / 3, 1: 1 / 3, 2: 1 / 3}, abs=0.03)
    with pytest.raises(StudyError, match="the 3 that can be drawn here"):
        preference_pairs(examples[:1], items, "popularity", 4, 0, tempering=0.0)


@pytest.mark.parametrize(("sampler", "tempering"), [("uniform", 0.5), ("popularity", 1.5)])
def test_a_tempering_that_means_nothing_is_refused(sampler, tempering):
    items = catalogue()
    with pytest.raises(StudyError, match="negatives_tempering"):
        preference_pairs(examples_of(items), items, sampler, 1, 0, tempering)


def test_dpo_reaches_the_optimum_that_each_sampler_predicts():
    r"""A table of logits trained on the expected DPO loss reaches ref (p / q)^(1 / beta), and with the true
    environments' choices as negatives that optimum has lost what the environments added.

    Two environments boost one item each, whoever the user is; two prompts per environment differ in taste. Chosen
    items have p(y|x, e) ~ taste(x, y) boost(e, y), the reference is p itself, as after fine-tuning.
    """
    torch.manual_seed(0)
    taste = torch.tensor([[4.0, 1.0, 1.0, 1.0, 2.0], [1.0, 4.0, 1.0, 2.0, 1.0]], dtype=torch.float64)
    boost = torch.ones(2, 5, dtype=torch.float64)
    boost[0, 2] = boost[1, 3] = 8.0
    p = torch.stack([taste[t] * boost[e] for e in (0, 1) for t in (0, 1)])
    p = p / p.sum(1, keepdim=True)
    environment, beta = torch.tensor([0, 0, 1, 1]), 2.0
    within = torch.stack([p[environment == e].mean(0) for e in (0, 1)])[environment]
    samplers = {"uniform": torch.full_like(p, 0.2), "popularity": p.mean(0).expand(4, 5), "matched": within}
    optimum = {}
    for name, q in samplers.items():
        logits = p.log().clone().requires_grad_(True)
        optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

        def loss(logits=logits, q=q):
            h = torch.log_softmax(logits, 1) - p.log()
            margins = beta * (h[:, :, None] - h[:, None, :])  # chosen y, rejected y'
            return -(p[:, :, None] * q[:, None, :] * torch.nn.functional.logsigmoid(margins)).sum()

        def closure(optimizer=optimizer, loss=loss):
            optimizer.zero_grad()
            value = loss()
            value.backward()
            return value

        optimizer.step(closure)
        predicted = p * (p / q) ** (1 / beta)
        optimum[name] = torch.softmax(logits.detach(), 1)
        torch.testing.assert_close(optimum[name], predicted / predicted.sum(1, keepdim=True), atol=1e-4, rtol=1e-3)
    own, others = p[:, 2][:2], {name: table[:2, 2] for name, table in optimum.items()}
    assert (others["uniform"] > own).all()  # the boosted item gains, with no environment in sight
    assert (others["matched"] < others["popularity"]).all() and (others["popularity"] < others["uniform"]).all()
    # What is left is taste alone: no boost stands in it but through the prompts' normalisation Z.
    lifted = (optimum["matched"] / p) ** beta
    z = torch.stack([taste[t] * boost[e] for e in (0, 1) for t in (0, 1)]).sum(1)
    for row, (e, t) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        left = taste[t] / sum(taste[other] / z[2 * e + other] for other in (0, 1))
        torch.testing.assert_close(lifted[row] / lifted[row].sum(), left / left.sum(), atol=1e-3, rtol=1e-2)
