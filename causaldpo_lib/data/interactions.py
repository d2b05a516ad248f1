"""The table every dataset is turned into, and the clean-up that all loaders share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pandas as pd

from causaldpo_lib.errors import StudyError

if TYPE_CHECKING:
    from causaldpo_lib.data.simulated import SimulatedTruth


@dataclass(frozen=True)
class Interactions:
    """Who interacted with what, and the catalogue; checked when it is made.

    Attributes:
        name: the dataset's name in ``DATASETS``.
        table: one row an interaction: ``user``, ``item`` (the source's own ids), ``rating``, and ``time``
            (integer seconds) where the source has it; ``simulated`` adds ``environment`` and ``regime``.
            Sorted by user, time, item. No (user, item) is repeated.
        items: one row an item: ``item``, ``title`` (unique) and what the source gives (``genres`` joined by
            ``|``, ``year`` ...). Items nobody interacted with are listed too.
        stats: counts of what loading did (rows read, duplicates merged ...).
        users: one row a user where the source describes users, else None.
        truth: the causal model behind ``simulated``, else None.

    Raises:
        StudyError: a column is missing, a value is missing or repeated, or a row names an unlisted item.
    """

    name: str
    table: pd.DataFrame
    items: pd.DataFrame
    stats: dict[str, int] = field(default_factory=dict)
    users: pd.DataFrame | None = None
    truth: SimulatedTruth | None = None

    def __post_init__(self) -> None:
        self._require(self.table, ("user", "item", "rating"), "interactions")
        self._require(self.items, ("item", "title"), "items")
        titles = self.items["title"].astype(str)
        problems = {
            "the interactions are empty": self.table.empty,
            "an interaction has no time: give every row one, or leave the column out": (
                "time" in self.table and self.table["time"].isna().any()
            ),
            "a (user, item) pair is repeated: keep one row of each": self.table.duplicated(["user", "item"]).any(),
            "an item id is listed twice: keep one row of each": self.items["item"].duplicated().any(),
            "two items share a title: merge them": titles.duplicated().any(),
            "an item has an empty title: name it or leave it out": titles.str.strip().eq("").any(),
            "an interaction names an item that is not listed": not self.table["item"].isin(self.items["item"]).all(),
        }
        for problem, present in problems.items():
            if present:
                raise StudyError(f"dataset {self.name!r}: {problem}")

    def _require(self, frame: pd.DataFrame, columns: tuple[str, ...], kind: str) -> None:
        for column in columns:
            if column not in frame:
                present = ", ".join(map(str, frame.columns))
                raise StudyError(f"dataset {self.name!r}: the {kind} have no column {column!r}, only {present}")
            if frame[column].isna().any():
                raise StudyError(f"dataset {self.name!r}: column {column!r} of the {kind} has missing values")


def merge_shared_titles(table: pd.DataFrame, items: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, int]]:
    """Make every title one item and every (user, item) one row, sorted by user, time, item.

    A model that answers with a title cannot tell two ids of one title apart, so they become the lowest id,
    whose catalogue row is kept. Of a user's repeated interactions with an item the earliest stays (or the
    first row).

    Returns:
        table, items, and the counts ``titles_merged`` (ids) and ``duplicates_merged`` (rows).
    """
    lowest = items.groupby("title")["item"].transform("min")
    merged = table.assign(item=table["item"].map(pd.Series(lowest.to_numpy(), index=items["item"])))
    order = [column for column in ("user", "time", "item") if column in merged]
    if "time" in order:
        merged = merged.sort_values(order, kind="stable")
    merged = merged.drop_duplicates(["user", "item"]).sort_values(order, kind="stable", ignore_index=True)
    kept = items[items["item"].eq(lowest)].sort_values("item", ignore_index=True)
    counts = {"titles_merged": len(items) - len(kept), "duplicates_merged": len(table) - len(merged)}
    return merged, kept, counts
