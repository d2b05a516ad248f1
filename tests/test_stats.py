"""The hierarchical bootstrap against loops that copy rows, by coverage, and at its degenerate points."""

import numpy as np
import pytest
import scipy.stats

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


def test_draws_are_kept_as_the_least_integers_that_hold_them(monkeypatch):
    rng = np.random.default_rng(np.random.SeedSequence([3, 500]))
    expected = [np.bincount(rng.integers(0, 500, 500), minlength=500) for _ in range(20)]
    counts = stats.draw_counts(500, 20, 3)
    assert counts.dtype == np.uint8 and np.array_equal(counts, expected)

    class Same:
        """Draws that chance will not give: one unit each time."""

        def integers(self, low, high, size):
            return np.zeros(size, dtype=np.int64)

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Same())
    for size, kind in ((255, np.uint8), (256, np.uint16)):
        counts = stats.draw_counts.__wrapped__(size, 3, 0)
        assert counts.dtype == kind and (counts == np.eye(1, size) * size).all()


@pytest.mark.parametrize("users", [5, 3000, 70_000])
def test_blocks_of_resamples_give_what_one_multiplication_would(users):
    rng = np.random.default_rng(users)
    sums, sizes = rng.normal(size=(3, users)), rng.integers(1, 4, users).astype(float)
    seed_counts, counts = rng.multinomial(3, [1 / 3] * 3, 150), rng.poisson(1.0, (150, users)).astype(np.uint8)
    per_seed = (counts.astype(float) @ sums.T) / (counts.astype(float) @ sizes)[:, None]
    expected = (seed_counts * per_seed).sum(axis=1) / 3
    found = stats.resampled_means(sums, sizes, seed_counts, counts)
    assert found == pytest.approx(expected, rel=0, abs=1e-14)


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


def test_a_difference_is_not_cut_where_its_p_value_reaches():
    """Three users, all of whom gain: too few to say so, and the interval says as much."""
    gains = np.array([[0.1, 0.1, 0.5]])
    found = stats.paired(gains, np.zeros_like(gains), np.arange(3))
    assert found.p > 0.05 and found.low < 0 < 0.5 < found.high
    assert found.high - found.mean == pytest.approx(found.mean - found.low)
    assert stats.interval(gains, np.arange(3)).low == 0.1  # a mean lies among its values


@pytest.mark.parametrize("seeds", [1, 3])
def test_one_user_alone_shows_no_difference(seeds):
    """Nothing is known of how users, or seeds, differ: no interval, and p is 1."""
    values, baseline, ids = np.full((seeds, 4), 0.7), np.full((seeds, 4), 0.1), np.zeros(4)
    found = stats.paired(values, baseline, ids)
    assert found.mean == pytest.approx(0.6) and np.isnan([found.low, found.high]).all() and found.p == 1.0
    assert np.isnan(stats.interval(values, ids)[1:]).all()
    assert stats.equivalence(values, values - 1, values + 1, ids) == 1.0
    line = stats.slope(values, [0, 0, 1, 2], ids)
    assert np.isnan([line.low, line.high]).all() and line.p == 1.0


def test_a_group_of_one_user_and_one_seed_has_no_slope_to_speak_of():
    values, _, ids = grouped(seeds=1)
    found = stats.slope(values, (ids == 7).astype(int), ids)
    assert np.isfinite(found.mean) and np.isnan([found.low, found.high]).all() and found.p == 1.0


def test_one_user_under_seeds_that_differ_is_students_over_seeds():
    values = np.array([[0.5, 0.6], [0.7, 0.6], [0.9, 0.8]])
    found = stats.paired(values, np.zeros_like(values), np.zeros(2))
    assert np.isfinite(found).all() and found.low < found.mean < found.high


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


def test_families_are_corrected_by_themselves():
    rows = [
        {"method": "a", "baseline": "x", "p": 0.01, "p_equivalent": 0.5},
        {"method": "b", "baseline": "y", "p": 0.02, "p_equivalent": 0.4},
        {"method": "c", "baseline": "x", "p": 0.04, "p_equivalent": 0.3},
    ]
    found = stats.with_holm(rows)
    assert [row["p_holm"] for row in found] == pytest.approx([0.02, 0.02, 0.04])
    assert [row["p_equivalent_holm"] for row in found] == pytest.approx([0.6, 0.4, 0.6])
    assert "p_holm" not in rows[0] and stats.with_holm([]) == []
    alone = stats.with_holm([{"baseline": "x", "p": 0.3}])
    assert alone == [{"baseline": "x", "p": 0.3, "p_holm": 0.3}]


# Slopes


def grouped(seed=0, seeds=3, users=40, examples=400):
    """Values (seeds, N), positions 0 ... 4 and users, in no order."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(seeds, examples)), rng.integers(0, 5, examples), rng.integers(0, users, examples)


def test_slope_is_that_of_the_line_through_the_groups_means():
    values, positions, ids = grouped()
    means = [values[:, positions == g].mean() for g in range(5)]
    found = stats.slope(values, positions, ids)
    assert found.mean == pytest.approx(np.polyfit(range(5), means, 1)[0])
    assert found.low < found.mean < found.high
    kept = positions != 2  # a group without examples leaves its position out
    expected = np.polyfit([0, 1, 3, 4], np.delete(means, 2), 1)[0]
    assert stats.slope(values[:, kept], positions[kept], ids[kept]).mean == pytest.approx(expected)


def test_slope_of_differences_is_the_difference_of_slopes():
    values, positions, ids = grouped()
    baseline = values + positions * 0.25
    found = stats.slope(values - baseline, positions, ids)
    assert found.mean == pytest.approx(
        stats.slope(values, positions, ids).mean - stats.slope(baseline, positions, ids).mean
    )
    assert found == pytest.approx((-0.25, -0.25, -0.25, 0.0), abs=1e-12)


def test_slope_resamples_whole_users_over_all_groups():
    """Each user raises all their examples, in every group alike: the means move together, the slope does not."""
    ids = np.repeat(np.arange(50), 5)
    positions = np.tile(np.arange(5), 50)
    person = np.random.default_rng(1).normal(size=50)[ids][None]
    assert stats.interval(person, ids).high > 0.05
    assert stats.slope(person, positions, ids)[:3] == pytest.approx((0.0, 0.0, 0.0), abs=1e-12)


@pytest.mark.parametrize(("seeds", "between", "at_most"), [(1, 0.0, 0.98), (3, 0.0, 1.0), (3, 0.1, 0.98)])
def test_slope_covers_the_truth_at_about_its_level(seeds, between, at_most):
    """Where the seeds' noise is all there is between them, three seeds cover more than they promise: up to 99 %."""
    rng = np.random.default_rng(3)
    covered, trials = 0, 150
    for trial in range(trials):
        _, positions, ids = grouped(trial)
        truth = 0.1 * positions + rng.normal(0, 0.5, 40)[ids]
        tilt = rng.normal(0, between, (seeds, 1)) * positions
        noise = rng.normal(size=(seeds, 400))
        found = stats.slope(truth + tilt + noise, positions, ids, resamples=200, seed=trial)
        covered += found.low <= 0.1 <= found.high
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)
    assert 0.9 <= covered / trials <= at_most


@pytest.mark.parametrize("positions", [np.zeros(400), np.arange(3)])
def test_slope_needs_two_groups_and_all_positions(positions):
    values, _, ids = grouped()
    with pytest.raises(ValueError, match="a slope needs"):
        stats.slope(values, positions, ids)


def test_a_group_of_one_user_may_be_missing_from_a_resample():
    values, _, ids = grouped()
    positions = (ids == 7).astype(int)
    found = stats.slope(values, positions, ids)
    assert np.isfinite(found).all() and found.low < found.mean < found.high


# Equivalence


def test_equivalence_is_rare_at_the_margin_and_certain_far_inside():
    """At the margin itself at most 5 % may pass; that is what the test promises."""
    rng = np.random.default_rng(8)
    passed, trials = 0, 200
    for trial in range(trials):
        ids = np.arange(80)
        baseline = rng.normal(1.0, 0.5, (3, 80))
        values = baseline + 0.1 + rng.normal(0, 0.2, (3, 80)) + rng.normal(0, 0.3, 80)
        passed += stats.equivalence(values, baseline - 0.1, baseline + 0.1, ids, resamples=200, seed=trial) <= 0.05
    assert passed / trials <= 0.08
    assert stats.equivalence(baseline + 0.01, baseline - 0.1, baseline + 0.1, ids) == 0.0
    assert stats.equivalence(values - 0.1, baseline - 1, baseline + 1, ids) < 0.001


def test_equivalence_agrees_with_an_interval_of_90_percent():
    rng = np.random.default_rng(2)
    ids = np.arange(60)
    for centre in (0.0, 0.1, 0.2, 0.25, 0.3):
        values = rng.normal(centre, 1.0, (1, 60))
        low, high = scipy.stats.t.interval(0.9, 59, values.mean(), values.std() / 60**0.5)
        p = stats.equivalence(values, np.full_like(values, -0.4), np.full_like(values, 0.4), ids)
        assert abs(low + 0.4) > 0.02 and abs(high - 0.4) > 0.02  # clear of resampling noise
        assert (p < 0.05) == (low > -0.4 and high < 0.4)


def test_equivalence_of_a_ratio_counts_the_baselines_uncertainty():
    ids = np.arange(400)
    baseline = np.random.default_rng(0).random((3, 400))
    assert stats.equivalence(1.02 * baseline, 0.9 * baseline, 1.1 * baseline, ids) < 0.001
    assert stats.equivalence(1.2 * baseline, 0.9 * baseline, 1.1 * baseline, ids) > 0.9
    nothing = np.zeros((3, 400))  # no hit anywhere shows nothing, least of all equality
    assert stats.equivalence(nothing, 0.9 * nothing, 1.1 * nothing, ids) == 1.0


@pytest.mark.parametrize(
    ("p", "p_equivalent", "word"),
    [
        (0.5, 0.01, "equivalent"),
        (0.01, 0.01, "equivalent"),
        (0.01, 0.5, "different"),
        (0.5, 0.5, "undecided"),
        (np.nan, np.nan, "undecided"),
        (0.05, 0.06, "different"),
        (0.06, 0.05, "equivalent"),
    ],
)
def test_outcomes(p, p_equivalent, word):
    assert stats.outcome(p, p_equivalent) == word


# Hits


def test_mcnemar_has_its_hand_value():
    """8 examples hit by the one alone, 2 by the other: 2 (C(10,0) + C(10,1) + C(10,2)) / 2^10 = 112 / 1024."""
    hits = np.array([1] * 8 + [0] * 2 + [1] * 5 + [0] * 5)
    other = np.array([0] * 8 + [1] * 2 + [1] * 5 + [0] * 5)
    assert stats.mcnemar(hits, other) == stats.mcnemar(other, hits) == pytest.approx(112 / 1024)
    assert stats.mcnemar(hits, hits) == 1.0
    assert stats.mcnemar([hits] * 3, [other] * 3) == pytest.approx(2 * 112 / 1024)
    for bad in (np.full(20, 0.5), np.full(20, 2.0)):
        with pytest.raises(ValueError, match="0 or 1"):
            stats.mcnemar(bad, other)
    with pytest.raises(ValueError, match="not paired"):
        stats.mcnemar(hits, other[:5])


def test_mcnemar_is_near_the_paired_test_where_its_assumptions_hold():
    rng = np.random.default_rng(0)
    baseline = (rng.random((1, 2000)) < 0.1).astype(float)
    hits = np.where(rng.random((1, 2000)) < 0.03, 1 - baseline, baseline)
    exact, bootstrap = stats.mcnemar(hits, baseline), stats.paired(hits, baseline, np.arange(2000)).p
    assert exact < 0.01 and bootstrap < 0.01
    assert np.log10(exact) == pytest.approx(np.log10(bootstrap), abs=1.5)


def test_one_hit():
    assert stats.one_hit(1000) == 0.001
    with pytest.raises(ValueError, match="needs an example"):
        stats.one_hit(0)


# Sets of lists


def test_seed_interval_is_students():
    low, high = scipy.stats.t.interval(0.95, 2, 0.4, np.std([0.3, 0.4, 0.5], ddof=1) / 3**0.5)
    assert stats.seed_interval([0.3, 0.4, 0.5]) == pytest.approx((0.4, low, high))
    assert stats.seed_interval([0.4, 0.4]) == pytest.approx((0.4, 0.4, 0.4))
    alone = stats.seed_interval([0.4])
    assert alone.mean == 0.4 and np.isnan(alone.low) and np.isnan(alone.high)
    with pytest.raises(ValueError, match="one number per seed"):
        stats.seed_interval([])
