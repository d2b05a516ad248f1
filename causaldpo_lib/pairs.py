"""Preference pairs: which items a prompt's chosen response is contrasted with.

A sampler of ``NEGATIVES`` gets examples (columns ``item``, the target, and ``history``), the catalogue (``item``,
``title``, ``train_count``), how many negatives an example gets, and a generator. It returns item ids (N, count):
different ones in a row, never the target, never an item of the history.

The choice matters without any confounder: DPO's optimum is proportional to ref(y) (p(y|x) / q(y|x))^(1/beta) when
chosen ones are drawn from p and rejected ones from q. So methods are compared under one sampler.

``popularity`` and ``environment_matched`` take ``tempering`` t: they draw in proportion to q^t, so that 1 is the
sampler itself, and 0 uniform over what it can draw: the trained items, and all items.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import numpy as np
import pandas as pd

from causaldpo_lib.errors import StudyError, pick


def uniform(examples: pd.DataFrame, items: pd.DataFrame, count: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform over the catalogue: the negatives of the paper's tables (S-DPO's convention).

    q is flat, so DPO sharpens popularity: its optimum goes with ref(y) p(y|x)^(1/beta).

    Raises:
        StudyError: the catalogue has too few items besides some history.
    """
    return _drawn(examples, items, np.ones(len(items)), count, rng)


def popularity(
    examples: pd.DataFrame, items: pd.DataFrame, count: int, rng: np.random.Generator, *, tempering: float = 1.0
) -> np.ndarray:
    """In proportion to ``train_count``, without replacement; an item that was never trained on is never drawn.

    RosePO's popularity-aware sampling (arXiv 2410.12519). q is the popularity, so DPO does not sharpen it. With a
    ``tempering`` between 0 and 1 it is sharpened in part; 0 is uniform over the trained items.

    Raises:
        StudyError: too few trained items besides some history.
    """
    counts = items["train_count"].to_numpy(float)
    return _drawn(examples, items, np.where(counts > 0, counts**tempering, 0.0), count, rng)  # 0^0 is 1


def environment_matched(
    examples: pd.DataFrame, items: pd.DataFrame, count: int, rng: np.random.Generator, *, tempering: float = 1.0
) -> np.ndarray:
    r"""Chosen items of other examples, weighed by how much their environments agree with the prompt's.

    .. math:: q(y \mid x) = \sum_k p(E = k \mid x)\, p(y \mid E = k), \quad
              p(y \mid E = k) = \frac{1/V + \sum_i p_{ik} 1[y_i = y]}{1 + \sum_i p_{ik}}

    with memberships :math:`p_{ik}` from the column ``memberships`` (a list of K a row) and one observation spread over
    the V items, so that none is impossible, trained on or not. This study's own proposal.

    DPO's optimum is :math:`ref(y) (p(y|x) / q(y|x))^{1/\beta}`. Where environments boost items whoever the user is,
    p(y|x) is :math:`\sum_k p(k|x) t(y|x) b_k(y)` up to a constant, and p(y|E = k) goes with
    :math:`b_k(y) E[t(y|x)]`. In their quotient what the environment adds cancels, and t(y|x) / E[t(y|x)] is left: what
    this prompt says beyond its environment. The penalty of Eq. 10 leaves the environment in the target and forbids its
    trace in the rewards; here it is divided out of the target. A single environment gives the popularity among the
    chosen items; hard memberships in the true environments are the bound.

    Raises:
        StudyError: the column is missing, or the catalogue has too few items besides some history.
    """
    if "memberships" not in examples:
        raise StudyError("these negatives need a column 'memberships', which the examples lack: add it")
    memberships = np.stack(examples["memberships"].map(np.asarray).tolist()).astype(float)
    chosen = np.full((memberships.shape[1], len(items)), 1 / len(items))
    np.add.at(chosen.T, _positions(items, examples["item"], "target"), memberships)
    chosen /= 1 + memberships.sum(axis=0)[:, None]
    return _drawn_by_row(examples, items, lambda rows: (memberships[rows] @ chosen) ** tempering, count, rng)


def candidates(examples: pd.DataFrame, items: pd.DataFrame, count: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform from the example's own list, column ``candidates`` (ids): what the paper's code does with 10 of them.

    Raises:
        StudyError: the column is missing, names an unknown item, or leaves too few.
    """
    listed = _lists(examples, "candidates", items)
    return _selected(examples, items, listed, rng.random(listed.shape), count, "its candidates")


def semantic(
    examples: pd.DataFrame, items: pd.DataFrame, count: int, rng: np.random.Generator, *, neighbours: int = 20
) -> np.ndarray:
    """Uniform from the ``neighbours`` titles nearest to the chosen one, besides the history (RosePO's second sampler).

    Nearness: cosine of TF-IDF vectors over the 3- to 5-letter pieces of words; of equally near titles the
    catalogue's first. An embedding of sentences could replace it, this one needs no other model.

    Raises:
        StudyError: the catalogue has too few items besides some history.
    """
    # Half a second to import, for this sampler only.
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True).fit_transform(items["title"])
    targets, row = np.unique(_positions(items, examples["item"], "target"), return_inverse=True)
    wanted = max(neighbours, count)
    longest = int(examples["history"].map(len).max())
    nearest = np.empty((len(targets), min(wanted + longest + 1, len(items))), dtype=np.int32)
    for start in range(0, len(targets), 512):
        rows = targets[start : start + 512]
        distance = -(vectors[rows] @ vectors.T).toarray().round(12)  # equal texts are equal in spite of rounding
        nearest[start : start + 512] = distance.argsort(axis=1, kind="stable")[:, : nearest.shape[1]]
    listed = nearest[row]
    near = _allowed(examples, items, listed)
    near &= near.cumsum(axis=1) <= wanted
    return _selected(examples, items, np.where(near, listed, -1), rng.random(listed.shape), count, "the catalogue")


def self_generated(examples: pd.DataFrame, items: pd.DataFrame, count: int, rng: np.random.Generator) -> np.ndarray:
    """The first of a model's own ranking, column ``ranked`` (ids, best first): SPRec's and RosePO's hard negatives.

    q is the model itself. Nothing is left to chance: another generator gives the same, another model others.

    Raises:
        StudyError: the column is missing, names an unknown item, or leaves too few.
    """
    listed = _lists(examples, "ranked", items)
    order = np.broadcast_to(np.arange(listed.shape[1], dtype=float), listed.shape)
    return _selected(examples, items, listed, order, count, "its ranking")


ROUNDS = 30  # of redrawing at once what was taken, before the few rows left are drawn from what they leave

Sampler = Callable[..., np.ndarray]  # (examples, items, count, rng, **own options)

NEGATIVES: dict[str, Sampler] = {
    "uniform": uniform,
    "popularity": popularity,
    "environment_matched": environment_matched,
    "candidates": candidates,
    "semantic": semantic,
    "self_generated": self_generated,
}


def preference_pairs(
    examples: pd.DataFrame, items: pd.DataFrame, negatives: str, count: int, seed: int, tempering: float = 1.0
) -> np.ndarray:
    """Rejected items (N, count) of examples, by a sampler of ``NEGATIVES`` from a generator seeded with ``seed``.

    ``tempering``, 0 to 1, is for the samplers that draw in proportion to something.

    Raises:
        StudyError: an unknown sampler, fewer than one negative, no examples, a tempering that the sampler does not take
            or outside its range, or what the sampler refuses.
    """
    sampler = pick(NEGATIVES, negatives, "negative sampler")
    if count < 1:
        raise StudyError(f"negatives_per_prompt is {count}: a preference pair needs 1 or more")
    if examples.empty:
        raise StudyError("there are no examples to draw negatives for: keep some training examples")
    if not 0 <= tempering <= 1:
        raise StudyError(
            f"negatives_tempering is {tempering}: give a number from 0 (uniform over what can be drawn) to 1"
        )
    options = {}
    if tempering != 1:
        if "tempering" not in inspect.signature(sampler).parameters:
            raise StudyError(f"negatives {negatives!r} are not drawn by weights: set negatives_tempering to 1")
        options = {"tempering": tempering}
    return sampler(examples, items, count, np.random.default_rng(seed), **options)


# --- what samplers share; items are handled as positions in the catalogue ---


def _drawn(
    examples: pd.DataFrame, items: pd.DataFrame, weights: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """``count`` draws in proportion to ``weights`` (items,), each from what history, target and earlier draws leave."""
    taken = _taken(examples, items)
    rows_of_taken = taken[weights[taken % len(items)] > 0] // len(items)
    left = (weights > 0).sum() - np.bincount(rows_of_taken, minlength=len(examples))
    if left.min() < count:
        raise StudyError(
            f"{count} negatives a prompt need {count - left.min()} more items than the {(weights > 0).sum()} that can "
            "be drawn here: lower negatives_per_prompt, or use a larger catalogue or another sampler"
        )
    edges = np.cumsum(weights)
    edges /= edges[-1]  # exactly 1 from the last drawable item on, and above every random number
    found = np.empty((len(examples), count), dtype=np.int64)
    for place in range(count):
        clashing = np.arange(len(examples))
        for _ in range(ROUNDS):
            draw = np.searchsorted(edges, rng.random(len(clashing)), side="right")
            found[clashing, place] = draw
            clash = _contains(taken, clashing * len(items) + draw)
            clash |= (found[clashing, :place] == draw[:, None]).any(axis=1)
            clashing = clashing[clash]
        for row in clashing:  # whose history holds nearly all of the weight
            begin, end = np.searchsorted(taken, [row * len(items), (row + 1) * len(items)])
            rest = weights.copy()
            rest[taken[begin:end] - row * len(items)] = rest[found[row, :place]] = 0
            found[row, place] = rng.choice(len(items), p=rest / rest.sum())
    return items["item"].to_numpy()[found]


def _drawn_by_row(
    examples: pd.DataFrame,
    items: pd.DataFrame,
    weights_of: Callable[[slice], np.ndarray],
    count: int,
    rng: np.random.Generator,
    size: int = 512,
) -> np.ndarray:
    """As ``_drawn`` with weights (rows, items), all above 0, of each row's own: ``weights_of`` gives those of a slice.

    Successive draws without replacement are the largest Gumbel-perturbed log-weights.
    """
    taken, found = _taken(examples, items), np.empty((len(examples), count), dtype=np.int64)
    left = len(items) - np.bincount(taken // len(items), minlength=len(examples))
    if left.min() < count:
        raise StudyError(
            f"the catalogue leaves {left.min()} items besides target and history of example "
            f"{examples.index[left.argmin()]!r}, not {count}: lower negatives_per_prompt"
        )
    for start in range(0, len(examples), size):
        rows = slice(start, min(start + size, len(examples)))
        keys = np.log(weights_of(rows))
        keys += rng.gumbel(size=keys.shape)
        np.negative(keys, out=keys)
        begin, end = np.searchsorted(taken, [rows.start * len(items), rows.stop * len(items)])
        keys[taken[begin:end] // len(items) - rows.start, taken[begin:end] % len(items)] = np.inf
        # The catalogue is not sorted for the few that come first.
        first = np.sort(np.argpartition(keys, count - 1, axis=1)[:, :count], axis=1)
        order = np.take_along_axis(keys, first, axis=1).argsort(axis=1, kind="stable")
        found[rows] = np.take_along_axis(first, order, axis=1)
    return items["item"].to_numpy()[found]


def _selected(
    examples: pd.DataFrame, items: pd.DataFrame, listed: np.ndarray, order: np.ndarray, count: int, source: str
) -> np.ndarray:
    """Of each row's ``listed`` positions (N, L; -1 none) the ``count`` allowed ones that come first in ``order``."""
    allowed = _allowed(examples, items, listed)
    short = np.flatnonzero(allowed.sum(axis=1) < count)
    if len(short):
        raise StudyError(
            f"{source} leaves {allowed[short[0]].sum()} items besides target and history of example "
            f"{examples.index[short[0]]!r}, not {count}: lower negatives_per_prompt or give longer lists"
        )
    first = np.where(allowed, order, np.inf).argsort(axis=1, kind="stable")[:, :count]
    return items["item"].to_numpy()[np.take_along_axis(listed, first, axis=1)]


def _allowed(examples: pd.DataFrame, items: pd.DataFrame, listed: np.ndarray) -> np.ndarray:
    """(N, L): whether a listed position is one, neither target nor in the history, and listed for the first time."""
    keys = np.arange(len(listed))[:, None] * len(items) + listed
    keys[listed < 0] = -1
    first = np.zeros(keys.size, dtype=bool)
    first[np.unique(keys, return_index=True)[1]] = True
    return (listed >= 0) & first.reshape(keys.shape) & ~_contains(_taken(examples, items), keys)


def _taken(examples: pd.DataFrame, items: pd.DataFrame) -> np.ndarray:
    """Sorted keys ``row * items + position`` of targets and of what the catalogue holds of the histories."""
    rows = np.arange(len(examples))
    lengths = examples["history"].map(len).to_numpy(dtype=np.int64)
    past = pd.Index(items["item"]).get_indexer(examples["history"][lengths > 0].explode())
    known = (np.repeat(rows, lengths) * len(items) + past)[past >= 0]
    return np.unique(np.concatenate([known, rows * len(items) + _positions(items, examples["item"], "target")]))


def _contains(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Whether each of ``wanted`` is among the sorted ``keys``."""
    place = np.searchsorted(keys, wanted)
    return (place < len(keys)) & (keys[np.minimum(place, len(keys) - 1)] == wanted)


def _positions(items: pd.DataFrame, ids: pd.Series, kind: str) -> np.ndarray:
    found = pd.Index(items["item"]).get_indexer(ids)
    if (found < 0).any():
        raise StudyError(
            f"{kind} {ids.tolist()[int(np.argmin(found))]!r} is not in the catalogue: give one that holds it"
        )
    return found


def _lists(examples: pd.DataFrame, column: str, items: pd.DataFrame) -> np.ndarray:
    """The lists of item ids in ``column`` as positions (N, longest), -1 after their ends."""
    if column not in examples:
        raise StudyError(f"these negatives come from a column {column!r}, which the examples lack: add it")
    lengths = examples[column].map(len).to_numpy(dtype=np.int64)
    table = np.full((len(examples), max(int(lengths.max()), 1)), -1)
    filled = np.arange(table.shape[1]) < lengths[:, None]
    table[filled] = _positions(items, examples[column][lengths > 0].explode(), f"item of column {column!r}")
    return table
