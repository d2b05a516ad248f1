"""The hierarchical bootstrap against loops that copy rows, by coverage, and at its degenerate points."""

import numpy as np
import pytest

from causaldpo_lib import stats


def example(seed=0, seeds=3, users=7):
    """Values (seeds, N) with 1 to 4 examples per user, in shuffled order."""
    rng = np.random.default_rng(seed)
    ids = rng.permutation(np.repeat(np.arange(users) * 10, rng.integers(1, 5, users)))
    return rng.normal(size=(seeds, len(ids))), ids


def test_mean_under_given_draws_equals_copying_rows():
    values, ids = example()
    names = np.unique(ids)
    rng = np.random.default_rng(5)
    drawn_seeds = rng.integers(0, 3, (20, 3))
    drawn_users = rng.integers(0, len(names), (20, len(names)))
    expected = []
    for seeds, users in zip(drawn_seeds, drawn_users, strict=True):
        rows = np.concatenate([np.flatnonzero(ids == names[u]) for u in users])
        expected.append(np.mean([values[s, rows].mean() for s in seeds]))
    found = stats.resampled_means(
        np.array([[row[ids == name].sum() for name in names] for row in values]),
        np.array([(ids == name).sum() for name in names], dtype=float),
        np.stack([np.bincount(row, minlength=3) for row in drawn_seeds]),
        np.stack([np.bincount(row, minlength=len(names)) for row in drawn_users]),
    )
    assert np.allclose(found, expected)


def test_mean_is_the_plain_mean_and_lies_inside():
    values, ids = example()
    found = stats.interval(values, ids)
    assert found.mean == pytest.approx(values.mean())
    assert found.low < found.mean < found.high


@pytest.mark.parametrize(("seeds", "between"), [(1, 0.0), (3, 0.0), (3, 0.1), (3, 0.3), (3, 1.0), (8, 0.3), (8, 1.0)])
def test_interval_covers_the_truth_at_about_its_level(seeds, between):
    """From no variance between seeds to ten times the users' standard error (about 0.1), three seeds included."""
    rng = np.random.default_rng(20)
    covered, trials, users = 0, 300, 100
    for trial in range(trials):
        ids = np.repeat(np.arange(users), 2)
        noise = rng.normal(0, 1.0, users)[ids] + rng.normal(0, 1.0, (seeds, len(ids)))
        found = stats.interval(rng.normal(0, between, (seeds, 1)) + noise, ids, resamples=200, seed=trial)
        covered += found.low <= 0 <= found.high
    assert 0.9 <= covered / trials <= 0.985


def test_examples_of_a_user_stay_together():
    """Copying every user's examples tenfold adds no information, so the interval may not shrink."""
    values, ids = example(seeds=1, users=40)
    once = stats.interval(values, ids)
    tenfold = stats.interval(np.tile(values, 10), np.tile(ids, 10))
    assert tenfold == pytest.approx(once)


def test_one_seed_resamples_users_only():
    values, ids = example(seeds=1, users=30)
    assert stats.interval(values, ids) == stats.interval(values[0], ids)
    assert stats.interval(np.tile(values, (3, 1)), ids) == pytest.approx(stats.interval(values, ids))
    constant = stats.interval(np.ones(len(ids)), ids)
    assert constant == (1.0, 1.0, 1.0)


def test_seeds_that_disagree_widen_the_interval():
    _, ids = example(users=30)
    flat = np.zeros((3, len(ids)))
    spread = flat + np.array([[-1.0], [0.0], [1.0]])
    assert stats.interval(flat, ids) == (0.0, 0.0, 0.0)
    assert stats.interval(spread, ids).high > 0.5


def test_same_seed_same_interval_other_seed_another():
    values, ids = example()
    assert stats.interval(values, ids, seed=1) == stats.interval(values, ids, seed=1)
    assert stats.interval(values, ids, seed=1) != stats.interval(values, ids, seed=2)


def test_draws_hold_each_unit_as_often_as_chance_would():
    counts = stats.draw_counts(6, 4000, 0)
    assert (counts.sum(axis=1) == 6).all()
    assert np.allclose(counts.mean(axis=0), 1.0, atol=0.06)
    assert counts.var() == pytest.approx(1 - 1 / 6, rel=0.06)


def test_paired_is_the_interval_of_the_differences():
    values, ids = example(users=30)
    baseline = np.random.default_rng(9).normal(size=values.shape)
    found = stats.paired(values, baseline, ids)
    assert found[:3] == stats.interval(values - baseline, ids)
    swapped = stats.paired(baseline, values, ids)
    assert swapped.mean == pytest.approx(-found.mean)
    assert swapped.p == found.p


def test_p_value_of_a_clear_and_of_no_difference():
    values, ids = example(users=30)
    noise = np.random.default_rng(4).normal(size=values.shape)
    assert stats.paired(values + 5 + noise, values, ids).p < 0.01
    assert stats.paired(values, values, ids).p == 1.0


def test_p_value_agrees_with_the_interval():
    rng = np.random.default_rng(3)
    ids = np.arange(60)
    for shift in (0.0, 0.1, 0.2, 0.3, 0.5):
        values = rng.normal(shift, 1.0, (3, 60))
        found = stats.paired(values, np.zeros_like(values), ids)
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)


def test_shares_stay_between_0_and_1():
    values = np.zeros((3, 50))
    values[0, :2] = 1.0
    found = stats.interval(values, np.arange(50))
    assert found.low == 0.0 and 0.0 < found.high <= 1.0


@pytest.mark.parametrize(
    ("values", "users", "says"),
    [
        ([[1.0, np.nan]], [1, 2], "NaN"),
        ([[]], [], "non-empty"),
        ([[1.0, 2.0]], [1], "2 examples"),
    ],
)
def test_bad_values_are_refused(values, users, says):
    with pytest.raises(ValueError, match=says):
        stats.interval(values, users)


def test_unpaired_values_are_refused():
    with pytest.raises(ValueError, match="not paired"):
        stats.paired([[1.0, 2.0]], [[1.0]], [1, 2])


def test_holm_has_its_hand_values():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert stats.holm([0.2]) == pytest.approx([0.2])
    assert len(stats.holm([])) == 0


@pytest.mark.parametrize("p", [[0.1, np.nan], [1.2], [-0.1]])
def test_holm_refuses_what_is_no_probability(p):
    with pytest.raises(ValueError, match="between 0 and 1"):
        stats.holm(p)
