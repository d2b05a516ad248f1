"""What can be mixed into a model's ranking, each as strongly as serves validation best: BIGRec, IFairLRS, D3.

A boost is prepared once from a ``Source`` and then gives, for a strength and some rows (positions of examples), the
options that make the ranker mix it in. ``boosted`` chooses the strength.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch

from causaldpo_lib.errors import StudyError, pick
from causaldpo_lib.fairness import unfairness, unfairness_factors
from causaldpo_lib.grounding import boost_factors
from causaldpo_lib.metrics import ndcg_at_k
from causaldpo_lib.ranking import Ranking

Ranked = Callable[..., Ranking]  # (rows (R,), **options of the ranker) -> their ranking
Options = Callable[[float, np.ndarray], dict[str, Any]]  # (strength, rows (R,)) -> options of the ranker


@dataclass(frozen=True)
class Source:
    """What boosts are made of: N ``examples`` with column ``split``, the catalogue, and an assistant's
    log-probabilities (N, items) where there is one. ``ranked`` ranks rows without any boost."""

    ranked: Ranked
    examples: pd.DataFrame
    items: pd.DataFrame
    logps: np.ndarray | None = None

    @cached_property
    def validation(self) -> np.ndarray:
        """The rows of the validation split.

        Raises:
            StudyError: there is none.
        """
        rows = np.flatnonzero(self.examples["split"] == "validation")
        if not len(rows):
            raise StudyError("a boost's strength is chosen on validation examples, and there are none: keep some")
        return rows

    @cached_property
    def unboosted(self) -> Ranking:
        """All rows without any boost."""
        return self.ranked(np.arange(len(self.examples)))

    def assistant(self) -> np.ndarray:
        """``logps``.

        Raises:
            StudyError: there is no assistant.
        """
        if self.logps is None:
            raise StudyError("boost 'assistant' needs the run folder of a SASRec: give assistant")
        return self.logps


def _with_factors(source: Source, factors: Callable[[float], np.ndarray]) -> Options:
    """Options of the embedding ranker: texts written once, and factors (items,) or (N, items) on their distances."""
    texts = source.unboosted.texts

    def options(strength: float, rows: np.ndarray) -> dict[str, Any]:
        found = factors(strength)
        return {"texts": [texts[row] for row in rows], "factors": found if found.ndim == 1 else found[rows]}

    return options


def grounded_popularity(source: Source) -> Options:
    """BIGRec's injection of popularity, the items' shares of the training interactions."""
    counts = torch.as_tensor(source.items["train_count"].to_numpy(float))
    return _with_factors(source, lambda gamma: boost_factors(counts, gamma).numpy())


def grounded_assistant(source: Source) -> Options:
    """BIGRec's injection of a collaborative recommender, its probabilities."""
    shares = torch.as_tensor(np.exp(source.assistant()))
    return _with_factors(source, lambda gamma: boost_factors(shares, gamma).numpy())


def grounded_fairness(source: Source) -> Options:
    """IFairLRS's re-ranking: items of the groups that validation lists show too often move away."""
    rows = source.validation
    unfair = unfairness(source.unboosted.items[rows][:, :10], source.examples.iloc[rows], source.items)
    return _with_factors(source, lambda gamma: unfairness_factors(unfair, source.items, gamma))


def searched_assistant(source: Source) -> Options:
    """D3's mixture with a text-free assistant in the beam search; the strength is the assistant's weight, below 1."""
    logps = source.assistant()
    return lambda weight, rows: {"assistant": logps[rows], "assistant_weight": weight}


# Ranker -> what can be mixed into it.
BOOSTS: dict[str, dict[str, Callable[[Source], Options]]] = {
    "embedding": {
        "popularity": grounded_popularity,
        "assistant": grounded_assistant,
        "unfairness": grounded_fairness,
    },
    "beam": {"assistant": searched_assistant},
}


def boosted(source: Source, ranker: str, boost: str, strengths: Sequence[float]) -> tuple[Ranking, float]:
    """All examples ranked with a boost, and the strength with the best validation NDCG@10, the first of equals.

    Raises:
        StudyError: a ranker or boost that do not go together, no strengths or validation examples, no assistant.
    """
    if not strengths:
        raise StudyError(f"boost {boost!r} has no strengths to choose from: give a list, such as [0.0, 1.0]")
    kinds = pick(BOOSTS, ranker, "ranker into which something can be mixed")
    options, rows = pick(kinds, boost, f"boost of ranker {ranker!r}")(source), source.validation

    def fit(strength: float) -> float:
        return ndcg_at_k(source.ranked(rows, **options(strength, rows)).rank, 10)

    best = max(strengths, key=fit)
    everything = np.arange(len(source.examples))
    return source.ranked(everything, **options(best, everything)), best
