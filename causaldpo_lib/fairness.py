r"""Item-side fairness as IFairLRS has it (arXiv 2402.15215): weights of training examples, and over-recommended groups.

Groups are fifths of the catalogue by popularity, equally many items each (column ``group_items``). With H_G the share
of group G among all items of the histories and T_G its share among the targets, a model fitted to the targets shifts
the histories' exposure by T_G / H_G; the weight H_G / T_G of an example undoes it.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

GROUP = "group_items"


def history_shares(examples: pd.DataFrame, items: pd.DataFrame) -> pd.Series:
    """H_G: the share of each group among all items of the histories of ``examples``, indexed by group."""
    histories = pd.Series(np.concatenate([np.asarray(history) for history in examples["history"]]))
    return _shares(histories, items)


def target_weights(examples: pd.DataFrame, items: pd.DataFrame) -> np.ndarray:
    r"""Weights (N,) of training examples: :math:`W_G = H_G / T_G` of the target's group G.

    Their weighted mean over the targets of each group restores the histories' shares, so they average to 1 where every
    group has targets. Source: IFairLRS, section 4.1, with the per-example product that its released code loses by
    taking the mean of the losses first.
    """
    ratio = history_shares(examples, items) / _shares(examples["item"], items)
    return examples["item"].map(_groups(items)).map(ratio).to_numpy(float)


def unfairness(shown: np.ndarray, examples: pd.DataFrame, items: pd.DataFrame) -> pd.Series:
    r""":math:`GU_G = GP_G - GH_G`: a group's share of the recommended slots ``shown`` (N, K ids) less its share of the
    histories of ``examples``; positive where it is shown too often. The five add up to 0.
    """
    return _shares(pd.Series(np.asarray(shown).ravel()), items) - history_shares(examples, items)


def unfairness_factors(group_unfairness: pd.Series, items: pd.DataFrame, gamma: float) -> np.ndarray:
    r"""Factors (items,) on distances: :math:`(1 + \max(0, GU_G))^\gamma` of each item's group, 1 or more.

    IFairLRS's re-ranking enlarges the distance of what is over-recommended; the source leaves the form open, this one
    is the reading that leaves under-recommended groups alone.
    """
    return (1.0 + items[GROUP].map(group_unfairness).clip(lower=0.0).to_numpy(float)) ** gamma


def _groups(items: pd.DataFrame) -> pd.Series:
    return items.set_index("item")[GROUP]


def _shares(ids: pd.Series, items: pd.DataFrame) -> pd.Series:
    counts = ids.map(_groups(items)).value_counts(normalize=True)
    return counts.reindex(sorted(items[GROUP].unique()), fill_value=0.0)


# Examples and catalogue -> weights (N,) of mean about 1, or None: all alike.
WEIGHTINGS = {"none": lambda examples, items: None, "target_groups": target_weights}
