"""The exposure shift: a biased SVD of the known ratings, and the unseen pairs that it takes for positive."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.decomposition import TruncatedSVD

from causaldpo_lib.cuts import codes, flattest
from causaldpo_lib.errors import StudyError, pick

DAMPING = 5.0  # ratings at the mean that every user and item is given, so that few ratings move a bias little
BLOCK = 1 << 22  # scores held at a time


def expose(
    split: pd.DataFrame,
    ratings: pd.DataFrame,
    rng: np.random.Generator,
    *,
    variant: str = "imputed",
    positive_threshold: float = 4.0,
    factors: int = 32,
    imputed_per_user: int = 20,
    resampled_share: float = 0.5,
) -> pd.DataFrame:
    """Turn a random test into one of (nearly) uniform exposure of items.

    ``imputed``, the paper's full exposure simulated by matrix factorisation: a biased SVD of ``factors`` factors is
    fitted to all ratings but the held-out ones. Each test user's pairs without a rating that it puts above
    ``positive_threshold``, ``imputed_per_user`` of them at most, join the observed test, and as many as the observed
    test had are drawn from both, as evenly over items as they allow: the more are imputed, the more uniform the
    exposure, and the more of the test is model-made, to the advantage of recommenders that factorise the same
    matrix. An imputed row has ``imputed = True`` and one second after
    the user's last training interaction as its time (in data without times: the user's last row), so its history
    is the user's whole training history.

    ``propensity``, nothing imputed: ``resampled_share`` of the observed test is drawn without replacement with
    weights 1 / n_i, the item's training interactions, as its propensity to be seen.

    What is not drawn is in no split, nor has it any part in training.

    Options:
        ``variant``: ``imputed``, likely positives of a model among the test, or ``propensity``, nothing imputed.
        ``positive_threshold``: the predicted rating that an imputed pair has to exceed; the rule for positives of the
            whole split.
        ``factors``: number of factors of the SVD that predicts ratings (``imputed``).
        ``imputed_per_user``: most pairs of a test user that are imputed, those of the highest predicted ratings.
        ``resampled_share``: share of the observed test that is drawn by inverse propensities (``propensity``).

    Raises:
        StudyError: an unknown variant, a share outside 0 to 1, or ratings from which nothing can be imputed.
    """
    split = split.assign(imputed=False)
    if pick({"imputed": True, "propensity": False}, variant, "variant of shift 'exposure'"):
        return _draw_imputed(split, ratings, rng, positive_threshold, imputed_per_user, factors)
    return _draw_by_propensity(split, rng, resampled_share)


def _draw_imputed(
    split: pd.DataFrame, ratings: pd.DataFrame, rng: np.random.Generator, threshold: float, most: int, factors: int
) -> pd.DataFrame:
    """`expose` by imputation."""
    train, test = (split[split["split"].eq(name)] for name in ("train", "ood_test"))
    held_out = split[~split["split"].eq("train")]
    users = np.intersect1d(test["user"], train["user"])
    imputed = impute_positives(ratings, held_out, users, train["item"].unique(), threshold, most, factors, rng)
    imputed = imputed.assign(split="ood_test", imputed=True)
    if "time" in split:
        imputed["time"] = imputed["user"].map(train.groupby("user")["time"].max()).astype(split["time"].dtype) + 1
    item = codes(pd.concat([test["item"], imputed["item"]]))
    drawn = flattest(item, np.bincount(item), len(test), rng)
    whole = pd.concat([split[split["split"].ne("ood_test")], test[drawn[: len(test)]]]).sort_index()
    whole = pd.concat([whole, imputed[drawn[len(test) :]]])
    return whole.sort_values(
        ["user", "time", "item"] if "time" in whole else ["user"], kind="stable", ignore_index=True
    )


def _draw_by_propensity(split: pd.DataFrame, rng: np.random.Generator, share: float) -> pd.DataFrame:
    """`expose` by inverse propensities."""
    if not 0 < share < 1:
        raise StudyError(f"option 'resampled_share' must lie between 0 and 1, not {share}")
    ood = split["split"].eq("ood_test").to_numpy()
    item = codes(split["item"])
    trained = np.bincount(item, weights=split["split"].eq("train"))
    weight = 1 / np.maximum(trained[item[ood]], 1)
    kept = ~ood
    rows = np.flatnonzero(ood)
    kept[rng.choice(rows, round(share * len(rows)), replace=False, p=weight / weight.sum())] = True
    return split[kept]


@dataclass(frozen=True)
class RatingModel:
    """r(u, i) = mean + user_bias[u] + item_bias[i] + user_factors[u] . item_factors[i].

    Attributes:
        mean: mean rating.
        user_bias, item_bias: (U,) and (I,).
        user_factors, item_factors: (U, F) and (I, F).
    """

    mean: float
    user_bias: np.ndarray
    item_bias: np.ndarray
    user_factors: np.ndarray
    item_factors: np.ndarray

    def predict(self, users: np.ndarray) -> np.ndarray:
        """Predicted ratings (len(users), I) of users (codes)."""
        biases = self.mean + self.user_bias[users, None] + self.item_bias
        return biases + self.user_factors[users] @ self.item_factors.T


def fit_ratings(ratings: sparse.csr_array, factors: int, rng: np.random.Generator) -> RatingModel:
    """Damped means, then a truncated SVD of what they leave.

    b_i = sum_u (r - mean) / (n_i + DAMPING), b_u = sum_i (r - mean - b_i) / (n_u + DAMPING), and the SVD of the
    residuals with 0 where there is no rating, which draws a pair of which little is known towards its biases. (A
    common reading of "matrix factorisation"; the paper names no kind.)

    Args:
        ratings: (U, I), stored where known.
        factors: number of factors F, at most min(U, I) - 1.
    """
    known = ratings.astype(np.float64).tocoo()
    user, item = known.coords
    mean = float(known.data.mean())
    rest = known.data - mean
    item_bias = _damped_means(item, rest, known.shape[1])
    rest = rest - item_bias[item]
    user_bias = _damped_means(user, rest, known.shape[0])
    residuals = sparse.csr_matrix((rest - user_bias[user], (user, item)), shape=known.shape)
    svd = TruncatedSVD(max(1, min(factors, min(known.shape) - 1)), random_state=int(rng.integers(2**31)))
    user_factors = svd.fit_transform(residuals)
    parts = (user_bias, item_bias, user_factors, svd.components_.T)
    return RatingModel(mean, *(part.astype(np.float32) for part in parts))


def impute_positives(
    ratings: pd.DataFrame,
    held_out: pd.DataFrame,
    users: np.ndarray,
    items: np.ndarray,
    threshold: float,
    most: int,
    factors: int,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """The unrated pairs of ``users`` and ``items`` that a model of the other ratings puts above ``threshold``.

    Args:
        ratings: every rating there is, columns user, item, rating.
        held_out: pairs (columns user, item) whose ratings the model must not see; they are not imputed either.
        users: whose pairs are imputed; each is in ``ratings``.
        items: which items may be imputed; each is in ``ratings``.
        threshold: the predicted rating to exceed.
        most: pairs a user at most, those of the highest predictions.
        factors: of `fit_ratings`.

    Returns:
        columns user and item, by user in the order of ``users``.

    Raises:
        StudyError: ratings that are all equal, options out of range, or no pair above the threshold.
    """
    if factors < 1 or most < 1:
        raise StudyError(f"'factors' and 'imputed_per_user' must be 1 or more, not {factors} and {most}")
    user_ids, item_ids = pd.Index(ratings["user"].unique()), pd.Index(ratings["item"].unique())
    user, item = user_ids.get_indexer(ratings["user"]), item_ids.get_indexer(ratings["item"])
    pair = user * len(item_ids) + item
    hidden = user_ids.get_indexer(held_out["user"]) * len(item_ids) + item_ids.get_indexer(held_out["item"])
    seen = ~np.isin(pair, hidden)
    value = ratings["rating"].to_numpy()
    if not seen.any() or value[seen].min() == value[seen].max():
        raise StudyError(
            "all training ratings are equal, so no unseen rating can be predicted from them: "
            "use variant 'propensity' of shift 'exposure', or another shift"
        )
    shape = (len(user_ids), len(item_ids))
    model = fit_ratings(sparse.csr_array((value[seen], (user[seen], item[seen])), shape=shape), factors, rng)
    rated = sparse.csr_array((np.ones(len(pair), dtype=np.int8), (user, item)), shape=shape)
    barred = np.ones(len(item_ids), dtype=bool)
    barred[item_ids.get_indexer(items)] = False
    most = min(most, len(item_ids))

    rows, columns = [], []
    codes = user_ids.get_indexer(users)
    for block in np.array_split(codes, max(1, len(codes) * len(item_ids) // BLOCK)):
        scores = model.predict(block)
        scores[:, barred] = -np.inf
        scores[rated[block].nonzero()] = -np.inf
        best = np.argpartition(-scores, most - 1, axis=1)[:, :most]
        taken = np.zeros(scores.shape, dtype=bool)
        np.put_along_axis(taken, best, np.take_along_axis(scores, best, axis=1) > threshold, axis=1)
        row, column = taken.nonzero()
        rows.append(block[row])
        columns.append(column)
    imputed = pd.DataFrame(
        {"user": user_ids.take(np.concatenate(rows)), "item": item_ids.take(np.concatenate(columns))}
    )
    if imputed.empty:
        raise StudyError(
            f"the factorisation predicts no unseen rating above {threshold:g}, so shift 'exposure' has nothing to "
            "impute: use its variant 'propensity'"
        )
    return imputed


def _damped_means(code: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """(size,) means by code, with ``DAMPING`` zeros added to each."""
    return np.bincount(code, values, size) / (np.bincount(code, minlength=size) + DAMPING)
