"""The simulator: reproducible, as confounded as it says, and honest about its own truth."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from causaldpo_lib.data import load_dataset
from causaldpo_lib.data.simulated import LEXICONS
from causaldpo_lib.errors import StudyError


@pytest.fixture(scope="module")
def confounded():
    return load_dataset("simulated")


@pytest.fixture(scope="module")
def unconfounded():
    return load_dataset("simulated", strength=0.0)


def probabilities_of_choices(data, truth) -> tuple[np.ndarray, np.ndarray]:
    """(N, I) probabilities of each choice among the items its user had not chosen; (N,) chosen columns."""
    table = data.table
    user, item = table["user"].to_numpy() - 1, table["item"].to_numpy() - 1
    cube = np.stack([[truth.choice_probabilities(e, r) for e in range(len(truth.boosted[r]))] for r in range(2)])
    probabilities = cube[table["regime"], table["environment"], user]
    for row in range(1, len(table)):
        if user[row] == user[row - 1]:
            probabilities[row, probabilities[row - 1] == 0] = 0
            probabilities[row, item[row - 1]] = 0
    return probabilities / probabilities.sum(axis=1, keepdims=True), item


def z_score_of_boosted_choices(data, truth) -> float:
    """Standardised excess of choices of boosted items over what ``truth`` expects; N(0, 1) if it is right.

    Choices depend on earlier ones, but given them the excess of each has mean zero: a martingale, so that
    variances add up.
    """
    probabilities, item = probabilities_of_choices(data, truth)
    boosted = data.truth.boosted[data.table["regime"], data.table["environment"]]
    expected = (probabilities * boosted).sum(axis=1)
    chosen = boosted[np.arange(len(item)), item]
    return float((chosen - expected).sum() / np.sqrt((expected * (1 - expected)).sum()))


def test_same_seed_same_data_other_seed_other_data(confounded):
    again, other = load_dataset("simulated"), load_dataset("simulated", seed=1)
    pd.testing.assert_frame_equal(confounded.table, again.table)
    pd.testing.assert_frame_equal(confounded.items, again.items)
    pd.testing.assert_frame_equal(confounded.truth.interventional(), again.truth.interventional())
    assert not confounded.table["item"].equals(other.table["item"])
    assert not confounded.items["title"].equals(other.items["title"])


def test_strength_changes_choices_only(confounded, unconfounded):
    pd.testing.assert_frame_equal(confounded.items, unconfounded.items)
    pd.testing.assert_series_equal(confounded.table["environment"], unconfounded.table["environment"])
    np.testing.assert_array_equal(confounded.truth.taste, unconfounded.truth.taste)
    assert not confounded.table["item"].equals(unconfounded.table["item"])


def test_confounder_is_visible_at_the_set_strength(confounded):
    without = replace(confounded.truth, strength=0.0)
    assert z_score_of_boosted_choices(confounded, without) > 30  # far more than taste explains ...
    assert abs(z_score_of_boosted_choices(confounded, confounded.truth)) < 3.5  # ... as many as strength 2 does
    assert z_score_of_boosted_choices(confounded, replace(confounded.truth, strength=1.5)) > 5
    assert z_score_of_boosted_choices(confounded, replace(confounded.truth, strength=2.5)) < -5


def test_confounder_is_absent_at_strength_zero(unconfounded):
    assert abs(z_score_of_boosted_choices(unconfounded, unconfounded.truth)) < 3.5


def test_choices_follow_the_stated_probabilities_item_by_item(confounded):
    probabilities, item = probabilities_of_choices(confounded, confounded.truth)
    counts = np.bincount(item, minlength=probabilities.shape[1])
    expected = probabilities.sum(axis=0)
    z = (counts - expected) / np.sqrt((probabilities * (1 - probabilities)).sum(axis=0))
    assert np.abs(z).max() < 5
    assert 0.8 < z.std() < 1.2


def test_history_reveals_the_environment(confounded, unconfounded):
    def hit_rate(data) -> float:
        """How often the environment whose items lead among the last five choices is the present one."""
        table = data.table[data.table["regime"] == 0]
        of_item = data.truth.boosted[0][:, table["item"].to_numpy() - 1].T.astype(float)
        past = pd.DataFrame(of_item, index=table.index).groupby(table["user"]).rolling(5).sum().droplevel(0)
        past = past.groupby(table["user"]).shift(1).dropna()
        leads = past.max(axis=1) > 0
        return float((past.idxmax(axis=1) == table["environment"].reindex(past.index))[leads].mean())

    most_frequent = confounded.truth.environment_frequency[0].max()
    assert hit_rate(confounded) > most_frequent + 0.1
    assert hit_rate(unconfounded) < 0.35  # the four sets are equally large


def test_environments_persist_and_are_unevenly_frequent(confounded):
    table = confounded.table
    same = table["user"].eq(table["user"].shift()) & table["regime"].eq(table["regime"].shift())
    stays = table["environment"].eq(table["environment"].shift())[same].mean()
    by_chance = (confounded.truth.environment_frequency[0] ** 2).sum()
    assert stays == pytest.approx(0.9 + 0.1 * by_chance, abs=0.01)
    for regime, frequency in enumerate(confounded.truth.environment_frequency):
        found = table[table["regime"] == regime]["environment"].value_counts(normalize=True).sort_index()
        np.testing.assert_allclose(found, frequency, atol=0.05)
        assert frequency.max() > 4 * frequency.min()


def test_the_shift_changes_frequencies_and_boosts_but_neither_taste_nor_popularity(confounded):
    truth = confounded.truth
    np.testing.assert_array_equal(truth.environment_frequency[0], truth.environment_frequency[1][::-1])
    assert not (truth.boosted[0] & truth.boosted[1]).any()
    assert (truth.boosted.sum(axis=1) <= 1).all()  # no item in two environments of a regime
    np.testing.assert_array_equal(truth.boosted.sum(axis=2), 30)
    unboosted = replace(truth, strength=0.0)
    np.testing.assert_allclose(unboosted.choice_probabilities(0, regime=0), unboosted.choice_probabilities(3, regime=1))


def test_interventional_preference_is_the_backdoor_mixture(confounded, unconfounded):
    truth = confounded.truth
    preference = truth.interventional()
    assert preference.shape == (600, 300)
    np.testing.assert_allclose(preference.sum(axis=1), 1)
    by_hand = sum(truth.environment_frequency[0][e] * truth.choice_probabilities(e, 0)[41] for e in range(4))
    np.testing.assert_allclose(preference.loc[42], by_hand)
    assert not np.allclose(preference, truth.interventional(regime=1))
    np.testing.assert_allclose(unconfounded.truth.interventional(regime=0), unconfounded.truth.interventional(regime=1))


def test_popularity_is_long_tailed(confounded):
    counts = confounded.table["item"].value_counts()
    assert counts.iloc[:60].sum() > 0.4 * counts.sum()  # a fifth of the catalogue
    assert counts.iloc[0] > 8 * counts.iloc[-1]


def test_times_are_increasing_integers_and_the_regimes_do_not_overlap(confounded):
    table = confounded.table
    assert table["time"].dtype == np.int64
    assert (table.groupby("user")["time"].diff().dropna() > 0).all()
    assert table[table["regime"] == 0]["time"].max() < table[table["regime"] == 1]["time"].min()
    assert table["regime"].mean() == pytest.approx(0.2, abs=0.01)
    assert table.groupby("user").size().mean() == pytest.approx(30, rel=0.1)
    assert table.groupby("user").size().std() > 5
    assert not table.duplicated(["user", "item"]).any()


@pytest.mark.parametrize("items", [300, 4000])
def test_titles_are_short_ascii_and_distinct(items):
    titles = load_dataset("simulated", users=5, items=items).items["title"]
    assert titles.is_unique
    assert titles.map(str.isascii).all()
    assert titles.str.split().str.len().between(2, 4).all()


def test_a_title_reveals_its_genre():
    words = [word for pair in LEXICONS.values() for text in pair for word in text.split()]
    assert len(words) == len(set(words))


def test_default_size_is_generated_in_seconds():
    start = time.perf_counter()
    load_dataset("simulated", seed=3)
    assert time.perf_counter() - start < 3


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"item": 3}, "did you mean 'items'"),
        ({"users": "600"}, "'users'"),
        ({"users": 0}, "'users'"),
        ({"items": 10_000}, "'items'"),
        ({"genres": 11}, "'genres'"),
        ({"boosted_share": 0.5}, "'boosted_share'"),
        ({"persistence": 1.5}, "'persistence'"),
        ({"strength": True}, "'strength'"),
        ({"seed": -1}, "'seed'"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(options, word):
    with pytest.raises(StudyError, match=word) as raised:
        load_dataset("simulated", **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "options",
    [
        {"environments": 1, "boosted_share": 0.5},
        {"environments": 9},
        {"shifted_share": 0.0},
        {"persistence": 1.0},
        {"length": 3},
        {"items": 10, "genres": 10},
        {"popularity_exponent": 0, "taste_weight": 0},
    ],
)
def test_extreme_options_still_make_sound_data(options):
    data = load_dataset("simulated", **{"users": 20, "items": 60} | options)
    np.testing.assert_allclose(data.truth.interventional().sum(axis=1), 1)
    assert set(data.table["user"]) == set(range(1, 21))
