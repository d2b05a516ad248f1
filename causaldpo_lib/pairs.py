"""Preference pairs: which titles a prompt's chosen response is contrasted with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd

from causaldpo_lib.errors import StudyError, pick


def uniform_negatives(
    examples: pd.DataFrame, catalogue: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """``count`` different items per example, uniform over the catalogue without its history and target, (N, count).

    The negatives of the paper's tables (S-DPO's convention). With them DPO's optimum is proportional to
    ref(y) p(y|x)^(1/beta): popularity is sharpened even where nothing confounds.

    Raises:
        StudyError: the catalogue has too few items besides some history.
    """
    longest = int(examples["history"].map(len).max()) + 1
    if len(catalogue) < longest + count:
        raise StudyError(
            f"{count} negatives a prompt need a catalogue of at least {longest + count} items, "
            f"this one has {len(catalogue)}"
        )
    drawn = np.empty((len(examples), count), dtype=catalogue.dtype)
    for row, (history, item) in enumerate(zip(examples["history"], examples["item"], strict=True)):
        known = {*history, item}
        picked: list[object] = []
        while len(picked) < count:
            candidate = catalogue[rng.integers(len(catalogue))]
            if candidate not in known:
                known.add(candidate)
                picked.append(candidate)
        drawn[row] = picked
    return drawn


NEGATIVES: dict[str, Callable[[pd.DataFrame, np.ndarray, int, np.random.Generator], np.ndarray]] = {
    "uniform": uniform_negatives
}


def preference_pairs(
    examples: pd.DataFrame, catalogue: np.ndarray, negatives: str, count: int, seed: int
) -> np.ndarray:
    """Rejected items (N, count) of examples, by a sampler of ``NEGATIVES`` from a generator seeded with ``seed``."""
    sampler = pick(NEGATIVES, negatives, "negative sampler")
    return sampler(examples, catalogue, count, np.random.default_rng(seed))
