"""Ranking metrics against hand values, loops, and identities that hold for any ranks."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy
from sklearn.metrics import ndcg_score

from causaldpo_lib import metrics

some_ranks = st.lists(st.integers(min_value=0, max_value=40), min_size=1, max_size=60)
CUTOFFS = (1, 3, 10, 20)


HAND_VALUES = [(0, 1.0), (1, 0.630930), (4, 0.386853), (9, 0.289065), (10, 0.0)]


@pytest.mark.parametrize(("rank", "value"), HAND_VALUES)
def test_ndcg_of_one_example_has_the_published_value(rank, value):
    assert metrics.ndcg_at_k([rank], 10) == pytest.approx(value, abs=5e-7)


def test_hit_rate_counts_a_rank_equal_to_k_as_a_miss():
    assert metrics.hit_rate_at_k([0, 9, 10, 25], 10) == 0.5
    assert metrics.hit_rate_at_k([0, 9, 10, 25], 20) == 0.75
    assert metrics.hit_rate_at_k([math.inf], 20) == 0.0


@given(some_ranks, st.sampled_from(CUTOFFS))
def test_metrics_equal_a_loop(ranks, k):
    hit = gain = 0.0
    for rank in ranks:
        if rank < k:
            hit += 1
            gain += 1 / math.log2(rank + 2)
    assert metrics.hit_rate_at_k(ranks, k) == pytest.approx(hit / len(ranks))
    assert metrics.ndcg_at_k(ranks, k) == pytest.approx(gain / len(ranks))


@given(some_ranks, st.sampled_from(CUTOFFS))
def test_ndcg_lies_between_its_bounds(ranks, k):
    hit, gain = metrics.hit_rate_at_k(ranks, k), metrics.ndcg_at_k(ranks, k)
    assert hit / math.log2(k + 1) - 1e-12 <= gain <= hit + 1e-12


@given(some_ranks)
def test_ndcg_at_20_exceeds_ndcg_at_10_by_what_the_extra_hits_are_worth(ranks):
    extra_hits = metrics.hit_rate_at_k(ranks, 20) - metrics.hit_rate_at_k(ranks, 10)
    extra_gain = metrics.ndcg_at_k(ranks, 20) - metrics.ndcg_at_k(ranks, 10)
    assert extra_hits / math.log2(21) - 1e-12 <= extra_gain <= extra_hits / math.log2(12) + 1e-12


@given(some_ranks)
def test_means_are_the_means_of_the_examples(ranks):
    assert metrics.hit_rate_at_k(ranks, 10) == pytest.approx(np.mean(metrics.hits(ranks, 10)))
    assert metrics.ndcg_at_k(ranks, 10) == pytest.approx(np.mean(metrics.gains(ranks, 10)))


@pytest.mark.parametrize("function", [metrics.hit_rate_at_k, metrics.ndcg_at_k])
@pytest.mark.parametrize(
    ("ranks", "k", "says"),
    [
        ([0, math.nan], 10, "NaN"),
        ([0, -1], 10, "negative"),
        ([0], 0, "k must be"),
        ([0], True, "k must be"),
        ([0], 2.5, "k must be"),
        ([], 10, "no example"),
    ],
)
def test_bad_input_is_refused(function, ranks, k, says):
    with pytest.raises(ValueError, match=says):
        function(ranks, k)


def test_causal_ndcg_of_a_hand_worked_list():
    preferences = [[0.5, 0.3, 0.2]]
    best = 0.5 + 0.3 / math.log2(3)
    swapped = (0.2 + 0.5 / math.log2(3)) / best
    assert metrics.causal_ndcg_at_k([[0.2, 0.5]], preferences, 2) == pytest.approx(swapped)
    assert metrics.causal_ndcg_at_k([[0.5, 0.3]], preferences, 2) == pytest.approx(1.0)


@given(st.integers(0, 10_000), st.integers(1, 8))
def test_causal_ndcg_equals_a_loop_and_never_exceeds_the_ideal_order(seed, k):
    rng = np.random.default_rng(seed)
    everything = rng.dirichlet(np.ones(8), size=5)
    lists = np.stack([rng.permutation(8) for _ in range(5)])
    expected = []
    for row, items in zip(everything, lists, strict=True):
        dcg = sum(row[item] / math.log2(r + 2) for r, item in enumerate(items[:k]))
        ideal = sum(p / math.log2(r + 2) for r, p in enumerate(sorted(row, reverse=True)[:k]))
        expected.append(dcg / ideal)
    found = metrics.causal_ndcg_at_k(np.take_along_axis(everything, lists, 1), everything, k)
    assert found == pytest.approx(np.mean(expected))
    assert 0 <= found <= 1 + 1e-12


def test_causal_ndcg_refuses_what_has_no_value():
    with pytest.raises(ValueError, match="no positive preference"):
        metrics.causal_ndcg_at_k([[0.0]], [[0.0, 0.0]], 1)
    with pytest.raises(ValueError, match="finite and not negative"):
        metrics.causal_ndcg_at_k([[-0.1]], [[0.5]], 1)
    with pytest.raises(ValueError, match="1 recommended lists but 2"):
        metrics.causal_ndcg_at_k([[0.1]], [[0.5], [0.5]], 1)


def test_group_slots_count_the_first_k():
    groups = {1: "G1", 2: "G1", 3: "G2", 4: "G3"}
    found = metrics.group_slots([[1, 3, 4], [2, 1, 4]], groups, 2)
    assert {name: shares.tolist() for name, shares in found.items()} == {
        "G1": [0.5, 1.0],
        "G2": [0.5, 0.0],
        "G3": [0.0, 0.0],
    }


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_group_slots_sum_to_one_at_every_example(seed, k):
    rng = np.random.default_rng(seed)
    items = np.stack([rng.permutation(12)[:6] for _ in range(7)])
    groups = {item: f"G{item % 5 + 1}" for item in range(12)}
    assert np.allclose(sum(metrics.group_slots(items, groups, k).values()), 1.0)


def test_group_slots_refuse_short_lists_and_items_without_a_group():
    with pytest.raises(ValueError, match="at least k = 3"):
        metrics.group_slots([[1, 2]], {1: "G1", 2: "G1"}, 3)
    with pytest.raises(ValueError, match="the first is 9"):
        metrics.group_slots([[1, 9]], {1: "G1"}, 2)


def test_gini_of_equal_and_of_concentrated_counts():
    assert metrics.gini([3, 3, 3, 3]) == pytest.approx(0.0)
    assert metrics.gini([0, 0, 0, 5]) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="not all 0"):
        metrics.gini([0, 0])


@given(st.lists(st.integers(0, 30), min_size=2, max_size=15).filter(any))
def test_gini_is_half_the_relative_mean_difference(counts):
    pairs = sum(abs(a - b) for a in counts for b in counts)
    assert metrics.gini(counts) == pytest.approx(pairs / (2 * len(counts) * sum(counts)))


def test_coverage_counts_different_items_once():
    assert metrics.coverage([[1, 2, 9], [2, 3, 8]], 10, 2) == 0.3
    with pytest.raises(ValueError, match="cannot show"):
        metrics.coverage([[1, 2]], 1, 2)


@given(some_ranks, st.sampled_from(CUTOFFS))
def test_mrr_equals_a_loop_and_lies_below_ndcg(ranks, k):
    expected = sum(1 / (rank + 1) for rank in ranks if rank < k) / len(ranks)
    assert metrics.mrr_at_k(ranks, k) == pytest.approx(expected)
    assert metrics.mrr_at_k(ranks, k) <= metrics.ndcg_at_k(ranks, k) + 1e-12
    assert metrics.mrr_at_k(ranks, k) >= metrics.hit_rate_at_k(ranks, k) / k - 1e-12


@given(some_ranks)
def test_a_longer_list_never_loses(ranks):
    for metric in (metrics.hit_rate_at_k, metrics.ndcg_at_k, metrics.mrr_at_k):
        values = [metric(ranks, k) for k in CUTOFFS]
        assert values == sorted(values)
        assert metric(ranks, 1) == pytest.approx(metrics.hit_rate_at_k(ranks, 1))


# What a set of lists looks like

LISTS = [[1, 2, 3, 9], [1, 2, 4, 9], [1, 5, 6, 9]]


def test_or_ratio_counts_the_slots_of_the_three_most_shown_items():
    assert metrics.or_ratio(LISTS, 3) == pytest.approx((3 + 2 + 1) / 9)
    assert metrics.or_ratio(LISTS, 1) == 1.0


def test_or_ratio_of_a_longer_list_starts_from_scratch():
    """The published evaluator carries its count of slots on, so that the same three items count half at 2 k."""
    same = np.tile(np.arange(20), (7, 1))
    assert metrics.or_ratio(same, 10) == pytest.approx(3 / 10)
    assert metrics.or_ratio(same, 20) == pytest.approx(3 / 20)
    assert metrics.or_ratio(np.zeros((7, 20)), 20) == 1.0


@given(st.integers(0, 10_000), st.integers(1, 6))
def test_ratios_equal_loops_and_know_their_limits(seed, k):
    lists = np.stack([np.random.default_rng(seed + row).permutation(9)[:6] for row in range(4)])
    counts: dict[int, int] = {}
    for row in lists.tolist():
        for item in row[:k]:
            counts[item] = counts.get(item, 0) + 1
    assert metrics.or_ratio(lists, k) == pytest.approx(sum(sorted(counts.values())[-3:]) / (4 * k))
    assert metrics.div_ratio(lists, k) == pytest.approx(len(counts) / (4 * k))
    assert metrics.coverage(lists, 9, k) * 9 == pytest.approx(metrics.div_ratio(lists, k) * 4 * k)
    assert min(3, len(counts)) / len(counts) - 1e-12 <= metrics.or_ratio(lists, k) <= 1


@pytest.mark.parametrize("function", [metrics.or_ratio, metrics.div_ratio])
def test_list_ratios_refuse_short_and_absent_lists(function):
    with pytest.raises(ValueError, match="at least k = 3"):
        function([[1, 2]], 3)
    with pytest.raises(ValueError, match="at least k = 1"):
        function(np.empty((0, 2)), 1)


def test_popularity_lift_of_hand_worked_lists():
    shown = [[40, 20, 1000], [10, 10, 0]]
    assert metrics.popularity_lifts(shown, [10, 30], 2).tolist() == pytest.approx([0.5, -0.5])
    assert metrics.popularity_lifts(shown, [10, 30], 3).tolist() == pytest.approx([1060 / 60 - 1, 20 / 60 - 1])
    for profiles in ([10], [0, 0], [[10, 30]]):
        with pytest.raises(ValueError, match="2 lists need"):
            metrics.popularity_lifts(shown, profiles, 2)


# Periods


def test_periods_of_hand_worked_times():
    times = [0, 1, 2, 3, 100]
    assert metrics.periods(times).tolist() == ["T1", "T2", "T3", "T4", "T5"]
    assert metrics.periods(times, "length").tolist() == ["T1", "T1", "T1", "T1", "T5"]
    assert metrics.periods([20, 40, 60, 80, 100, 0], "length").tolist() == ["T2", "T3", "T4", "T5", "T5", "T1"]
    assert set(metrics.periods([7, 7, 7])) == set(metrics.periods([7.5, 7.5], "length")) == {"T1"}


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.sampled_from(["count", "length"]))
def test_periods_follow_time_and_keep_equal_times_together(times, by):
    found = dict(zip(times, metrics.periods(times, by).tolist(), strict=True))
    assert [found[time] for time in times] == metrics.periods(times, by).tolist()
    ordered = [found[time] for time in sorted(found)]
    assert ordered == sorted(ordered) and ordered[0] == "T1"


def test_periods_by_count_are_equal_where_times_differ():
    times = np.random.default_rng(0).permutation(103) * 86400.0
    sizes = np.unique(metrics.periods(times), return_counts=True)[1]
    assert len(sizes) == 5 and sizes.max() - sizes.min() <= 1


@pytest.mark.parametrize(
    ("times", "by", "says"),
    [([1.0, math.nan], "count", "finite"), ([], "count", "finite"), ([1, 2], "weeks", "not by 'weeks'")],
)
def test_periods_refuse_what_has_no_order(times, by, says):
    with pytest.raises(ValueError, match=says):
        metrics.periods(times, by)


# Eq. 3


def test_interventional_error_agrees_with_scipy():
    rng = np.random.default_rng(0)
    truth, model = rng.dirichlet(np.ones(6), 5), rng.dirichlet(np.ones(6), 5)
    truth[0, :3] = 0.0
    expected = [entropy(p, q) for p, q in zip(truth, model, strict=True)]  # it rescales both to sum 1
    found = metrics.interventional_kl(np.log(0.3 * model), 7 * truth)
    assert found == pytest.approx(expected)
    assert metrics.interventional_kl(np.log(0.3 * model), truth, renormalise=False) == pytest.approx(
        np.array(expected) - math.log(0.3)
    )


@given(st.integers(0, 10_000))
def test_interventional_error_is_zero_only_at_the_truth(seed):
    rng = np.random.default_rng(seed)
    truth = rng.dirichlet(np.ones(5), 3)
    assert metrics.interventional_kl(np.log(truth), truth) == pytest.approx(np.zeros(3), abs=1e-12)
    assert (metrics.interventional_kl(np.log(rng.permuted(truth, axis=1)), truth) >= -1e-12).all()


def test_interventional_error_at_its_edges():
    assert metrics.interventional_kl([[0.0, -np.inf]], [[1.0, 0.0]]).tolist() == [0.0]
    assert metrics.interventional_kl([[-np.inf, 0.0]], [[0.5, 0.5]]).tolist() == [np.inf]
    for logps, truth, says in (
        ([[0.0]], [[0.5, 0.5]], "shape"),
        ([[np.nan, 0.0]], [[0.5, 0.5]], "NaN"),
        ([[-np.inf, -np.inf]], [[0.5, 0.5]], "whole catalogue"),
        ([[0.0, 0.0]], [[0.0, 0.0]], "no positive preference"),
    ):
        with pytest.raises(ValueError, match=says):
            metrics.interventional_kl(logps, truth)


# Lists with many positives

# Of labels 0 1 0 1: DCG 1/log2(3) + 1/log2(5), the best order's 1 + 1/log2(3); precisions 1/2 and 2/4.
SECOND, FOURTH = 1 / math.log2(3), 1 / math.log2(5)


@pytest.mark.parametrize(
    ("k", "ndcg", "precision"),
    [(1, 0.0, 0.0), (2, SECOND / (1 + SECOND), 0.25), (4, (SECOND + FOURTH) / (1 + SECOND), 0.5), (9, 0.650921, 0.5)],
)
def test_list_metrics_of_a_hand_worked_list(k, ndcg, precision):
    for labels in ([0, 1, 0, 1], [0, 1, 0, 1, 0, 0, 0]):
        assert metrics.list_ndcg(labels, k) == pytest.approx(ndcg, abs=5e-7)
        assert metrics.list_average_precision([labels], k) == pytest.approx([precision])


def test_a_positive_beyond_the_cutoff_still_counts_in_the_ideal_but_only_up_to_k_of_them():
    labels = [1, 0, 0, 1, 1, 1]
    assert metrics.list_ndcg(labels, 3) == pytest.approx(1 / (1 + SECOND + 0.5))
    assert metrics.list_average_precision(labels, 3) == pytest.approx(1 / 3)
    assert metrics.list_average_precision(labels, 1) == metrics.list_ndcg(labels, 1) == 1.0


def test_ndcg_of_graded_labels_has_exponential_gains():
    """Gains 2^y - 1: 1, 7, 3 against 7, 3, 1."""
    assert metrics.list_ndcg([1, 3, 2], 3) == pytest.approx((1 + 7 * SECOND + 1.5) / (7 + 3 * SECOND + 0.5))


@given(st.integers(0, 10_000), st.sampled_from((1, 3, 5, 10)))
def test_list_metrics_agree_with_scikit_learn_and_a_loop(seed, k):
    rng = np.random.default_rng(seed)
    lists = rng.random((5, 7)) < rng.random()
    ndcg, precision = metrics.list_ndcg(lists, k), metrics.list_average_precision(lists, k)
    for labels, value, average in zip(lists, ndcg, precision, strict=True):
        if not labels.any():
            assert math.isnan(value) and math.isnan(average)
            continue
        assert value == pytest.approx(ndcg_score([labels], [-np.arange(7.0)], k=k))
        found = [labels[: i + 1].mean() for i in range(min(k, 7)) if labels[i]]
        assert average == pytest.approx(sum(found) / min(k, labels.sum()))
        assert 0 <= average <= 1 and 0 <= value <= 1 + 1e-12


@given(st.integers(0, 20), st.sampled_from(CUTOFFS))
def test_with_one_positive_list_metrics_are_those_of_its_rank(rank, k):
    labels = np.arange(21) == rank
    assert metrics.list_ndcg(labels, k) == pytest.approx(metrics.ndcg_at_k([rank], k))
    assert metrics.list_average_precision(labels, k) == pytest.approx(metrics.mrr_at_k([rank], k))


@pytest.mark.parametrize("function", [metrics.list_ndcg, metrics.list_average_precision])
def test_list_metrics_refuse_what_is_no_label(function):
    for labels, k, says in (
        ([0, math.nan], 5, ">= 0"),
        ([[0, -1]], 5, ">= 0"),
        (1, 5, "lists of numbers"),
        ([0, 1], 0, "whole number"),
    ):
        with pytest.raises(ValueError, match=says):
            function(labels, k)
    with pytest.raises(ValueError, match="labels 0 and 1"):
        metrics.list_average_precision([0, 2], 5)
