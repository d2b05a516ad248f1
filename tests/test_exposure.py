"""The factorisation against dense algebra, what it may not see, and both ways to even out exposure."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from test_splits import DATA, interactions

from causaldpo_lib import exposure
from causaldpo_lib.data import load_dataset
from causaldpo_lib.errors import StudyError
from causaldpo_lib.exposure import DAMPING, expose, fit_ratings, impute_positives
from causaldpo_lib.paths import data_folder
from causaldpo_lib.splits import histories, make_split


def low_rank(users: int = 150, items: int = 60, noise: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Dense ratings of users' and items' biases and two factors, and which of them are known."""
    rng = np.random.default_rng(0)
    factors = rng.normal(0, 0.8, (users, 2)) @ rng.normal(0, 0.8, (2, items))
    values = 3 + rng.normal(0, 0.4, (users, 1)) + rng.normal(0, 0.4, (1, items)) + factors
    return values + rng.normal(0, noise, values.shape), rng.random(values.shape) < 0.4


def known_part(values: np.ndarray, known: np.ndarray) -> sparse.csr_array:
    return sparse.csr_array((values[known], known.nonzero()), shape=values.shape)


# --- The factorisation ---


def test_model_is_damped_means_and_the_best_low_rank_rest():
    values, known = low_rank(users=12, items=8)
    model = fit_ratings(known_part(values, known), 3, np.random.default_rng(0))
    rest = np.where(known, values - values[known].mean(), 0)
    items = rest.sum(axis=0) / (known.sum(axis=0) + DAMPING)
    rest = np.where(known, rest - items, 0)
    users = rest.sum(axis=1) / (known.sum(axis=1) + DAMPING)
    rest = np.where(known, rest - users[:, None], 0)
    u, s, vt = np.linalg.svd(rest)
    expected = values[known].mean() + users[:, None] + items + (u[:, :3] * s[:3]) @ vt[:3]
    np.testing.assert_allclose(model.predict(np.arange(12)), expected, atol=1e-4)
    np.testing.assert_allclose(model.predict(np.array([5, 2])), expected[[5, 2]], atol=1e-4)


def test_factors_predict_held_out_ratings_better_than_biases_and_these_than_the_mean():
    values, known = low_rank()
    model = fit_ratings(known_part(values, known), 2, np.random.default_rng(0))
    biases = model.mean + model.user_bias[:, None] + model.item_bias
    errors = [np.square(p - values)[~known].mean() for p in (model.predict(np.arange(150)), biases, model.mean)]
    assert errors[0] < 0.8 * errors[1] and errors[1] < 0.8 * errors[2]


@pytest.mark.parametrize("factors", [1, 32])
def test_more_factors_than_the_matrix_has_are_no_error(factors):
    values, known = low_rank(users=5, items=3)
    known[:] = True
    model = fit_ratings(known_part(values, known), factors, np.random.default_rng(0))
    assert model.user_factors.shape == (5, min(factors, 2))


# --- Imputation ---


def as_table(values: np.ndarray, known: np.ndarray) -> pd.DataFrame:
    user, item = known.nonzero()
    return pd.DataFrame({"user": [f"u{u:03}" for u in user], "item": 100 + item, "rating": values[known]})


def test_imputed_are_the_best_unrated_pairs_above_the_threshold(monkeypatch):
    values, known = low_rank(users=40, items=30)
    table = as_table(values, known)
    held_out = table.sample(60, random_state=0)
    users = table["user"].unique()[5:35]
    items = np.sort(table["item"].unique())[3:]
    arguments = (table, held_out, users, items, 3.5, 4, 2)
    found = impute_positives(*arguments, np.random.default_rng(0))

    hidden = known.copy()
    hidden[held_out["user"].str[1:].astype(int), held_out["item"] - 100] = False
    order = [sorted(table["user"].unique()).index(user) for user in users]  # all users and items are rated here
    assert sorted(table["user"].unique()) == table["user"].unique().tolist() and len(items) == 27
    columns = table["item"].unique() - 100  # in order of appearance, on which the sign of no prediction depends
    model = fit_ratings(known_part(values[:, columns], hidden[:, columns]), 2, np.random.default_rng(0))
    scores = pd.DataFrame(model.predict(np.array(order)), users, columns + 100)
    expected = set()
    for user in users:
        rated = set(table.loc[table["user"] == user, "item"])
        open_ = scores.loc[user].drop([item for item in scores.columns if item in rated or item not in items])
        expected |= {(user, item) for item in open_[open_ > 3.5].nlargest(4).index}
    assert set(zip(found["user"], found["item"], strict=True)) == expected
    assert not found.duplicated().any() and found.groupby("user").size().max() == 4 > found.groupby("user").size().min()

    monkeypatch.setattr(exposure, "BLOCK", 60)  # two users at a time
    pd.testing.assert_frame_equal(impute_positives(*arguments, np.random.default_rng(0)), found)


def test_held_out_ratings_are_not_seen_and_all_others_are():
    values, known = low_rank(users=60, items=30)
    table = as_table(values, known)
    held_out = table.sample(300, random_state=0)

    def imputed(ratings: pd.DataFrame) -> pd.DataFrame:
        users, items = ratings["user"].unique(), ratings["item"].unique()
        return impute_positives(ratings, held_out, users, items, 3.5, 5, 4, np.random.default_rng(0))

    of_test = table.index.isin(held_out.index)
    pd.testing.assert_frame_equal(imputed(table.assign(rating=table["rating"].mask(of_test, 5.0))), imputed(table))
    low = table["rating"].lt(2.5) & ~of_test  # ratings that are no positives teach the model too
    assert not imputed(table.assign(rating=table["rating"].mask(low, 1.0))).equals(imputed(table))


def test_nothing_of_a_split_that_is_held_out_reaches_the_model(monkeypatch):
    data = DATA["ratings"]
    seen = []

    def spy(ratings, *arguments):
        seen.append(ratings)
        return fit_ratings(ratings, *arguments)

    monkeypatch.setattr(exposure, "fit_ratings", spy)
    split = make_split("exposure", data, 0)
    plain = make_split("exposure", data, 0, variant="propensity", resampled_share=0.999)  # the same base test
    held_out = plain["split"].ne("train").sum()
    assert seen[0].nnz == pytest.approx(len(data.table) - held_out, abs=1)
    assert split["split"].eq("train").sum() == plain["split"].eq("train").sum()


# --- The shift ---


@pytest.mark.parametrize("name", ["ratings", "timeless", "sittings"])
def test_imputed_rows_come_after_all_training_of_their_user(name):
    data = DATA[name]
    split = make_split("exposure", data, 0)
    base = round(0.2 * len(make_split("iid", data, 0)))
    assert split["imputed"].dtype == bool and 0 < split["imputed"].sum() < base == split["split"].eq("ood_test").sum()
    train = split[split["split"] == "train"].groupby("user")
    if "time" in split:
        imputed = split[split["imputed"]]
        assert (imputed["time"] == imputed["user"].map(train["time"].max()) + 1).all()
        assert split["time"].dtype == data.table["time"].dtype
    examples = histories(split, max_history=1000)
    whole = examples.merge(split[split["imputed"]], on=["user", "item"])
    assert len(whole) == split["imputed"].sum()
    order = ["time", "item"] if "time" in split else []
    for user, history in zip(whole["user"], whole["history"], strict=True):
        mine = train.get_group(user)
        assert history == (mine.sort_values(order) if order else mine)["item"].tolist()


def test_imputation_flattens_the_test():
    split = make_split("exposure", DATA["ratings"], 0, imputed_per_user=60)
    observed = make_split("exposure", DATA["ratings"], 0, variant="propensity", resampled_share=0.999)
    most = [part.loc[part["split"] == "ood_test", "item"].value_counts().max() for part in (split, observed)]
    assert most[0] < 0.7 * most[1]


def test_propensities_are_inverse_to_training_counts():
    counts = {"a": 1, "b": 9}
    rows = [(f"t{item}{n}", item, "train") for item, count in counts.items() for n in range(count)]
    rows += [(f"o{n}", item, "ood_test") for item in counts for n in range(1000)] + [("v", "a", "validation")]
    split = pd.DataFrame(rows, columns=["user", "item", "split"])
    drawn = expose(split, split, np.random.default_rng(0), variant="propensity", resampled_share=0.1)
    tested = drawn[drawn["split"] == "ood_test"]["item"].value_counts()
    assert tested.sum() == 200 and len(drawn) == 211 and not drawn["imputed"].any()
    # n weighted draws without replacement leave exp(-t w) of each kind, with t such that n are drawn
    rate = np.linspace(0, 1, 100_001)
    rate = rate[np.argmin(np.abs(1000 * (2 - np.exp(-rate) - np.exp(-rate / 9)) - 200))]
    assert tested["a"] == pytest.approx(1000 * (1 - np.exp(-rate)), abs=12)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"variant": "full"}, "variant of shift 'exposure' 'full'.*imputed, propensity"),
        ({"factors": 0}, "'factors'"),
        ({"imputed_per_user": 0}, "'imputed_per_user'"),
        ({"variant": "propensity", "resampled_share": 1.0}, "'resampled_share'"),
        ({"imputed_per_user": 2.5}, "'imputed_per_user' of shift 'exposure' must be a whole number"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(options, word):
    with pytest.raises(StudyError, match=word) as raised:
        make_split("exposure", DATA["ratings"], 0, **options)
    assert "\n" not in str(raised.value)


def test_ratings_that_teach_nothing_are_refused():
    table = DATA["ratings"].table
    with pytest.raises(StudyError, match="all training ratings are equal"):
        make_split("exposure", interactions("implicit", table.assign(rating=5.0), 80), 0)
    rng = np.random.default_rng(0)
    noise = interactions("noise", table.assign(rating=rng.choice([1.0, 4.0], len(table), p=[0.7, 0.3])), 80)
    with pytest.raises(StudyError, match="no unseen rating above 4"):
        make_split("exposure", noise, 0, min_user=1, factors=1)


@pytest.mark.realdata
def test_factors_help_on_published_ratings():
    if not (data_folder() / "ml-100k").exists():
        pytest.skip("ml-100k is absent: set CAUSALDPO_DATA to the folder of the published datasets")
    table = load_dataset("ml-100k").table
    user, item = (pd.factorize(table[column])[0] for column in ("user", "item"))
    values, test = table["rating"].to_numpy(), np.random.default_rng(0).random(len(table)) < 0.2
    known = sparse.csr_array((values[~test], (user[~test], item[~test])), shape=(user.max() + 1, item.max() + 1))
    model = fit_ratings(known, 32, np.random.default_rng(0))
    predicted = model.predict(np.arange(user.max() + 1))[user[test], item[test]]
    biases = (model.mean + model.user_bias[user] + model.item_bias[item])[test]
    rmse = [np.sqrt(np.square(p - values[test]).mean()) for p in (predicted, biases)]
    assert rmse[0] < rmse[1] - 0.01 and rmse[1] < 0.9 * values[test].std()
