"""Which rows a cut takes, in arrays: the latest of each group, and as even a draw over items as there can be."""

from __future__ import annotations

import numpy as np
import pandas as pd


def codes(values: pd.Series) -> np.ndarray:
    """(N,) the values' numbers 0, 1, ... in order of appearance."""
    return pd.factorize(values)[0]


def run_starts(values: np.ndarray) -> np.ndarray:
    """(N,) where the run of equal values begins that each position belongs to."""
    new = np.concatenate([[True], values[1:] != values[:-1]])
    return np.maximum.accumulate(np.where(new, np.arange(len(values)), 0))


def latest(group: np.ndarray, time: np.ndarray, share: float) -> np.ndarray:
    """(N,) bool, the latest ``share`` of each group (0, 1, ...).

    Equal times of a group stay together: the cut moves to the nearer end of theirs, but never before the first.
    """
    order = np.lexsort((time, group))
    size = np.bincount(group)
    start = np.cumsum(size) - size
    first = np.maximum(run_starts(group[order]), run_starts(time[order]))
    last = len(first) - 1 - np.maximum(run_starts(group[order][::-1]), run_starts(time[order][::-1]))[::-1]
    wished = size - np.rint(share * size).astype(int)
    at = np.minimum(start + wished, len(first) - 1)
    begin, end = first[at] - start, last[at] + 1 - start
    cut = np.where((wished - begin <= end - wished) & (begin > 0), begin, end)
    cut = np.where(wished < size, cut, size)
    late = np.empty(len(time), dtype=bool)
    late[order] = np.arange(len(time)) >= np.repeat(start + cut, size)
    return late


def flattest(item: np.ndarray, most: np.ndarray, target: int, rng: np.random.Generator) -> np.ndarray:
    """(N,) bool, ``target`` random rows, or all that may be taken, spread over items as evenly as they can be.

    Item i, a code 0, 1, ..., gives min(c, most[i]) rows with the smallest c that reaches ``target``; the surplus is
    taken back at random from the items that gave c.
    """
    givers = np.cumsum(np.bincount(most)[::-1])[::-1][1:]  # items that can give a first, a second, ... row
    cap = min(int(np.searchsorted(np.cumsum(givers), target)) + 1, max(len(givers), 1))
    rank = _rank_within(item, rng)
    taken = rank < np.minimum(cap, most)[item]
    surplus = max(int(taken.sum()) - target, 0)
    last = np.flatnonzero(taken & (rank == cap - 1))  # removing one of these keeps every count at cap or cap - 1
    taken[rng.choice(last, min(surplus, len(last)), replace=False)] = False
    return taken


def _rank_within(item: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N,) random order 0, 1, ... among the rows of the same item."""
    shuffled = rng.permutation(len(item))
    order = shuffled[np.argsort(item[shuffled], kind="stable")]
    rank = np.empty(len(item), dtype=np.int64)
    rank[order] = np.arange(len(item)) - run_starts(item[order])
    return rank
