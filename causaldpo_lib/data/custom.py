"""Anybody's interactions: one CSV or Parquet file with a title in every row."""

from __future__ import annotations

import warnings
from pathlib import Path

import polars as pl

from causaldpo_lib.data.interactions import Interactions, assemble, untitled
from causaldpo_lib.data.reading import UNCUT, Layout, cut_short, existing, header_of, listed, read_rows, refuse, seconds
from causaldpo_lib.errors import StudyError

REMEDY = "put it there, or set option 'file' to its name and CAUSALDPO_DATA to the folder that holds custom/"
COLUMNS = ("user", "item", "title", "rating", "time")
RATING = 5.0  # where the file has none
LATEST = 10**11  # seconds, the year 5138: what is more are milliseconds


def load_custom(
    folder: Path,
    *,
    file: str = "interactions.csv",
    user: str = "user",
    item: str = "item",
    title: str = "title",
    rating: str = "rating",
    time: str = "time",
    positive_threshold: float = 4.0,
    strict: bool = False,
) -> Interactions:
    """Any interactions in one file, CSV or Parquet, a row an interaction, columns named by options.

    Source, licence and counts: the user's. Columns that no option names are left out.

    Format: CSV has a header, commas, double quotes where needed, UTF-8; the ending ``.parquet`` tells Parquet. Users
    and items are any text or whole numbers (numbers if all are), times whole Unix seconds or ISO 8601 text in UTC
    (``2018-07-30``, ``2018-07-30 12:00``, ``2018-07-30T12:00:00Z``; another zone is refused), and in Parquet also
    dates and datetimes.

    Quirks: an item with several titles keeps the first that is not blank (counted as ``items_repeated``), one without
    any is dropped (``items_untitled``), several items of one title become one. Without a column of ratings every row
    is rated 5.0, without times there are none; both with a warning, unless the option is the empty text.

    Args:
        folder: holds the file.

    Options:
        ``file``: the file's name, or its path below ``folder``.
        ``user``: name of the column with the user's id.
        ``item``: name of the column with the item's id.
        ``title``: name of the column with the item's title.
        ``rating``: name of the column with the rating; the empty text: there is none.
        ``time``: name of the column with the time of the interaction; the empty text: there is none.
        ``positive_threshold``: the least rating that is positive, unless a split says otherwise.
        ``strict``: whether a positive rating has to be above ``positive_threshold``.

    Raises:
        StudyError: a missing, empty or damaged file; an unknown column; a malformed or truncated row (file and line
            named).
    """
    path = existing(folder / file, REMEDY)
    names = dict(zip(COLUMNS, (user, item, title, rating, time), strict=True))
    rows, layout = _read_parquet(path, names) if path.suffix == ".parquet" else _read_csv(path, names)
    missing = {name: pl.col(name).is_null() | (pl.col(name).cast(pl.String) == "") for name in ("user", "item")}
    problems = {f"the {name} is missing: fill it in or remove the row": mask for name, mask in missing.items()}
    if "rating" in rows.columns:
        problems["rating {rating} is not finite: correct or remove the row"] = ~pl.col("rating").is_finite()
    else:
        rows = rows.with_columns(rating=pl.lit(RATING))
    if "time" in rows.columns:
        rows = rows.with_columns(said=pl.col("time"), time=_times(rows["time"]))
        what = (
            "time {said!r} is neither whole seconds nor a date such as 2018-07-30 12:00:00: correct or remove the row"
        )
        problems[what] = pl.col("time").is_null()
        problems["time {said!r} is no time in seconds: give seconds since 1970"] = pl.col("time").abs() > LATEST
        if layout is not None and header_of(path, layout)[-1] == time and rows["time"].null_count() == 0:
            problems[f"the last line is truncated (time {{said!r}}): {UNCUT}"] = cut_short(rows, path, "time")
    refuse(rows, path, layout, problems)
    rows = rows.with_columns(_whole(rows["user"]), _whole(rows["item"]))
    table = rows.select(name for name in ("user", "item", "rating", "time") if name in rows.columns)
    # The first line of an item counts, so its blank titles go behind the others.
    items = rows.select("item", "title").unique(maintain_order=True).sort(untitled(), maintain_order=True)
    return assemble("custom", table, items, positive_threshold=positive_threshold, strict=strict)


def _chosen(names: dict[str, str], present: list[str], path: Path) -> dict[str, str]:
    """Column name -> what it is, of those that are read."""
    chosen: dict[str, str] = {}
    for kind, name in names.items():
        if name in present:
            if name in chosen:
                raise StudyError(
                    f"options {chosen[name]!r} and {kind!r} of dataset 'custom' both name column {name!r}: "
                    "give each its own"
                )
            chosen[name] = kind
        elif kind in ("rating", "time") and name in ("", kind):
            if name:
                instead = f"every row is rated {RATING}" if kind == "rating" else "there are no times"
                warnings.warn(f"{path} has no column {name!r}, so {instead}: name it by option {kind!r}", stacklevel=5)
        else:
            raise StudyError(
                f"{path} has no column {name!r}, only {listed(present)}: set option {kind!r} of dataset 'custom'"
            )
    return chosen


def _read_csv(path: Path, names: dict[str, str]) -> tuple[pl.DataFrame, Layout]:
    plain = Layout({}, ",", header=True, quoted=True)
    chosen = _chosen(names, header_of(path, plain), path)
    kinds = {name: float if kind == "rating" else str for name, kind in chosen.items()}
    layout = Layout(kinds, ",", header=True, quoted=True)
    return read_rows(path, layout).rename(chosen), layout


def _read_parquet(path: Path, names: dict[str, str]) -> tuple[pl.DataFrame, None]:
    try:
        chosen = _chosen(names, pl.read_parquet_schema(path).names(), path)
        rows = pl.read_parquet(path, columns=list(chosen), glob=False).rename(chosen)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as problem:
        raise StudyError(f"{path}: {str(problem).splitlines()[0]}: write the Parquet file again") from problem
    if rows.is_empty():
        raise StudyError(f"{path} has no rows: give it some")
    for name, kind in rows.schema.items():
        text = isinstance(kind, pl.String | pl.Categorical | pl.Enum)
        accepted = {
            "rating": kind.is_numeric() or kind == pl.Boolean,
            "time": text or kind.is_integer() or isinstance(kind, pl.Date | pl.Datetime),
            "title": text,
        }.get(name, text or kind.is_integer())
        if not accepted:
            raise StudyError(f"{path}: the {name} cannot be of type {kind}: write it as text or number")
    texts = [name for name, kind in rows.schema.items() if isinstance(kind, pl.Categorical | pl.Enum)]
    rating = [pl.col("rating").cast(pl.Float64)] if "rating" in rows.columns else []
    return rows.with_columns(pl.col(texts).cast(pl.String), *rating), None


def _times(said: pl.Series) -> pl.Series:
    """Whole seconds, null where a text is none."""
    if said.dtype.is_integer():
        return said.cast(pl.Int64, strict=False)
    if isinstance(said.dtype, pl.Date | pl.Datetime):
        return said.dt.epoch("s")
    frame = said.to_frame("said")
    return frame.select(time=pl.coalesce(pl.col("said").cast(pl.Int64, strict=False), seconds("said")))["time"]


def _whole(ids: pl.Series) -> pl.Series:
    """Texts as whole numbers if that loses nothing of any (no leading zeros), else as they are."""
    if ids.dtype != pl.String:
        return ids.cast(pl.Int64, strict=False) if ids.dtype != pl.UInt64 else ids
    return ids.cast(pl.Int64) if ids.str.contains(r"^(0|-?[1-9]\d{0,17})$").all() else ids
