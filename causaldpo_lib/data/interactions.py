"""The table every dataset is turned into, and the clean-up that all loaders share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pandas as pd
import polars as pl

from causaldpo_lib.errors import StudyError

if TYPE_CHECKING:
    from causaldpo_lib.data.simulated import SimulatedTruth


# What loading did, in the same words for every dataset; see `assemble` for the rules.
STATS = (
    "rows_read",
    "rows_filtered",
    "items_listed",
    "items_repeated",
    "items_untitled",
    "ratings_without_item",
    "titles_merged",
    "duplicates_merged",
)


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
        stats: counts of what loading did, the names of ``STATS``.
        users: one row a user where the source describes users, else None.
        truth: the causal model behind ``simulated``, else None.
        positive_threshold, strict: what counts as positive on this rating scale unless a split says otherwise:
            a rating of at least the threshold or, if ``strict``, above it.

    Raises:
        StudyError: a column is missing, a value is missing or repeated, or a row names an unlisted item.
    """

    name: str
    table: pd.DataFrame
    items: pd.DataFrame
    stats: dict[str, int] = field(default_factory=dict)
    users: pd.DataFrame | None = None
    truth: SimulatedTruth | None = None
    positive_threshold: float = 4.0
    strict: bool = False

    def __post_init__(self) -> None:
        self._require(self.table, ("user", "item", "rating"), "interactions")
        self._require(self.items, ("item", "title"), "items")
        titles = self.items["title"].astype(str)
        problems = {
            "the interactions are empty": self.table.empty,
            "an interaction has no time: give every row one, or leave the column out": (
                "time" in self.table and self.table["time"].isna().any()
            ),
            "a (user, item) pair is repeated: keep one row of each": _has_repeats(self.table),
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


def counts(**found: int) -> dict[str, int]:
    """The stats of a loader: all of ``STATS``, zero where nothing is given."""
    return dict.fromkeys(STATS, 0) | found


def assemble(
    name: str,
    ratings: pl.DataFrame,
    items: pl.DataFrame,
    users: pl.DataFrame | None = None,
    *,
    rows_read: int | None = None,
    positive_threshold: float = 4.0,
    strict: bool = False,
) -> Interactions:
    """Turn what a loader read into `Interactions` by the rules that hold for every dataset.

    In this order, each with its count in ``stats``:

    1. Rows that an option of the loader left out: ``rows_filtered`` of ``rows_read``.
    2. An item listed twice: the first line counts (``items_repeated`` of ``items_listed``).
    3. Titles: runs of white space and control characters become one space. An item without a title is dropped
       (``items_untitled``).
    4. A rating of an item that is not listed, or was dropped, is dropped (``ratings_without_item``).
    5. Items that share a title, such as a book's editions, become one, and a user's repeated ratings of an item
       too: see `merge_shared_titles`.

    Args:
        ratings: columns user, item, rating and, where it exists, time; rows in the file's order.
        items: columns item, title (null: none) and what else the source gives.
        rows_read: rows of the file, by default those of ``ratings``.
        positive_threshold, strict: of `Interactions`.

    Raises:
        StudyError: no rating is of a listed item, or what `Interactions` checks.
    """
    listed = items.unique("item", keep="first", maintain_order=True)
    titled = listed.with_columns(plain_title()).filter(~untitled())
    known = ratings.select(pl.col("item").is_in(titled["item"].implode()))["item"]
    kept = ratings if known.all() else ratings.filter(known)
    if kept.is_empty():
        raise StudyError(
            f"dataset {name!r}: none of its {len(ratings):,} ratings is of a listed item with a title: "
            "put the ratings and the items of the same release together"
        )
    rows_read = len(ratings) if rows_read is None else rows_read
    stats = counts(
        rows_read=rows_read,
        rows_filtered=rows_read - len(ratings),
        items_listed=len(items),
        items_repeated=len(items) - len(listed),
        items_untitled=len(listed) - len(titled),
        ratings_without_item=len(ratings) - len(kept),
    )
    table, catalogue, merged = merge_shared_titles(kept, titled)
    described = None if users is None else _to_pandas(users)
    return Interactions(
        name, table.to_pandas(), _to_pandas(catalogue), stats | merged, described, None, positive_threshold, strict
    )


def plain_title() -> pl.Expr:
    """Column title as text, with runs of white space and control characters as one space, and none around it."""
    return pl.col("title").cast(pl.String).str.replace_all(r"[\s\x00-\x1f\x7f]+", " ").str.strip_chars()


def untitled() -> pl.Expr:
    """Whether column title is null or blank."""
    return plain_title().fill_null("") == ""


def merge_shared_titles(table: pl.DataFrame, items: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, int]]:
    """Make every title one item and every (user, item) one row, sorted by user, time, item.

    A model that answers with a title cannot tell two ids of one title apart, so they become the lowest id,
    whose catalogue row is kept. Of a user's repeated interactions with an item the earliest stays (or the
    first row).

    Returns:
        table, items, and the counts ``titles_merged`` (ids) and ``duplicates_merged`` (rows).
    """
    lowest = items.select("item", lowest=pl.col("item").min().over("title"))
    shared = lowest.filter(pl.col("item") != pl.col("lowest"))
    merged = table
    if len(shared):
        merged = merged.with_columns(pl.col("item").replace(shared["item"], shared["lowest"]))
    order = [column for column in ("user", "time", "item") if column in merged.columns]
    if "time" in order:  # the first row of a user's repeats is then the earliest
        merged = merged.sort(order, maintain_order=True)
    first = merged.select(pl.col("item").is_first_distinct().over("user"))["item"]
    if not first.all():
        merged = merged.filter(first)
    if "time" not in order:
        merged = merged.sort(order, maintain_order=True)
    kept = items.filter(lowest["item"] == lowest["lowest"]).sort("item")
    return merged, kept, {"titles_merged": len(shared), "duplicates_merged": len(table) - len(merged)}


def _to_pandas(frame: pl.DataFrame) -> pd.DataFrame:
    """As pandas, where whole numbers with gaps stay whole (``Int64``)."""
    gaps = [name for name, kind in frame.schema.items() if kind.is_integer() and frame[name].null_count()]
    return frame.to_pandas().astype(dict.fromkeys(gaps, "Int64"))


def _has_repeats(table: pd.DataFrame) -> bool:
    pairs = pl.from_pandas(table[["user", "item"]])
    return pairs.select(pl.col("item").is_duplicated().over("user").any()).item()
