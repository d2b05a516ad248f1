"""MovieLens in its publisher's formats."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import csv

from causaldpo_lib.data.download import Archive, fetch
from causaldpo_lib.data.interactions import Interactions, merge_shared_titles
from causaldpo_lib.errors import StudyError

ML_100K = Archive(
    url="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
    md5="0e33842e24a9c977be4e0107933c0723",
    members=("ml-100k/u.data", "ml-100k/u.item", "ml-100k/u.user"),
)
ML_100K_COUNTS = {"ratings": 100_000, "users": 943, "movies": 1_682}
GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War"),
    "Western",
)

RATING_FIELDS = {"user": int, "item": int, "rating": int, "time": int}
MOVIE_FIELDS = {"item": int, "title": str, "release": str, "video": str, "url": str}
MOVIE_FIELDS |= dict.fromkeys(GENRES, int)
USER_FIELDS = {"user": int, "age": int, "gender": str, "occupation": str, "zip": str}


def load_ml_100k(folder: Path) -> Interactions:
    """MovieLens-100K: film ratings from a web site, 1997-09-20 to 1998-04-22.

    Source: GroupLens, University of Minnesota, https://grouplens.org/datasets/movielens/100k/ (Harper &
    Konstan 2015, doi:10.1145/2827872). Downloaded from there with a checksum when ``folder`` does not exist.
    Licence: research use with acknowledgement; no redistribution, no commercial use without permission.
    Complete set: 100,000 ratings (1 to 5, whole) by 943 users of 1,682 listed films; at least 20 ratings a
    user; no (user, film) repeated. A smaller one loads with a warning.

    Files: ``u.data`` (tab: user, film, rating, Unix time in seconds, in random order), ``u.item`` (24 fields
    cut by ``|``, ISO-8859-1: id, title with its year, release date, video date, address, 19 genre flags),
    ``u.user`` (cut by ``|``: user, age, gender, occupation, zip; may be absent).

    Quirks: 18 titles are listed under two ids and become one item here (the lower id), which repeats some of
    a user's ratings (the earliest stays). One film is called "unknown". Users rated long lists in one
    sitting, many within the same second, so times order a user's ratings only in part.

    Args:
        folder: holds the files.

    Raises:
        StudyError: a missing or empty file; a malformed, truncated or impossible row (file and line named).
    """
    if not folder.exists():
        fetch(ML_100K, folder)
    ratings_path, movies_path, users_path = (folder / name for name in ("u.data", "u.item", "u.user"))
    ratings = _read_rows(ratings_path, "\t", RATING_FIELDS)
    movies = _read_rows(movies_path, "|", MOVIE_FIELDS)
    users = _read_rows(users_path, "|", USER_FIELDS) if users_path.exists() else None
    _check_movies(movies, movies_path)
    _check_ratings(ratings, movies, ratings_path)
    found = {"ratings": len(ratings), "users": ratings["user"].nunique(), "movies": len(movies)}
    _warn_of_subset(found, folder)

    table, items, merged = merge_shared_titles(ratings.astype({"rating": float}), _describe(movies))
    stats = {"rows_read": len(ratings), "items_listed": len(movies), **merged}
    return Interactions("ml-100k", table, items, stats, users)


def _describe(movies: pd.DataFrame) -> pd.DataFrame:
    flags = movies[list(GENRES)].to_numpy(dtype=bool)
    genres = ["|".join(name for name, on in zip(GENRES, row, strict=True) if on) for row in flags]
    year = movies["title"].str.extract(r"\((\d{4})\)", expand=False).astype("Int64")
    return pd.DataFrame({"item": movies["item"], "title": movies["title"], "genres": genres, "year": year})


def _check_movies(movies: pd.DataFrame, path: Path) -> None:
    problems = {
        "film {item} is already listed above: keep one line of it": movies["item"].duplicated(),
        "film {item} has no title: restore it": movies["title"].eq(""),
    }
    _raise_at_first(problems, movies, path)


def _check_ratings(ratings: pd.DataFrame, movies: pd.DataFrame, path: Path) -> None:
    unlisted = ~ratings["item"].isin(movies["item"])
    problems = {
        "rating {rating} is outside 1 to 5: correct or remove the line": ~ratings["rating"].between(1, 5),
        "film {item} is not in u.item: restore that or remove the line": unlisted,
        "the last line is truncated (time {time}): restore the file": _cut_short(ratings["time"], path),
    }
    _raise_at_first(problems, ratings, path)


def _cut_short(times: pd.Series, path: Path) -> pd.Series:
    """True for a last row without line end whose time has fewer digits than every other row's."""
    short = pd.Series(False, index=times.index)
    with path.open("rb") as handle:
        handle.seek(-1, 2)
        ended = handle.read() in (b"\n", b"\r")
    if not ended and len(times) > 1:
        short.iloc[-1] = len(str(times.iloc[-1])) < len(str(times.iloc[:-1].min()))
    return short


def _raise_at_first(problems: Mapping[str, pd.Series], frame: pd.DataFrame, path: Path) -> None:
    for problem, rows in problems.items():
        if rows.any():
            row = int(np.argmax(rows.to_numpy()))
            where = f"{path}:{_line_of_row(path, row)}"
            raise StudyError(f"{where}: {problem.format(**frame.iloc[row].to_dict())}")


def _warn_of_subset(found: dict[str, int], folder: Path) -> None:
    if found != ML_100K_COUNTS:
        both = ", ".join(f"{found[name]:,} of {count:,} {name}" for name, count in ML_100K_COUNTS.items())
        warnings.warn(
            f"{folder} is not the published MovieLens-100K, it holds {both}: results do not compare",
            stacklevel=3,
        )


def _read_rows(path: Path, separator: str, fields: Mapping[str, type]) -> pd.DataFrame:
    """Read a file without header, strictly: all fields in every row, whole numbers where a field is int."""
    if not path.is_file():
        raise StudyError(
            f"{path} is missing: restore it, remove the folder {path.parent} to have it downloaded again "
            f"from {ML_100K.url}, or set CAUSALDPO_DATA to another folder of data"
        )
    types = {name: pa.int64() if kind is int else pa.string() for name, kind in fields.items()}
    try:
        return csv.read_csv(
            path,
            read_options=csv.ReadOptions(column_names=list(fields), encoding="iso-8859-1"),
            parse_options=csv.ParseOptions(delimiter=separator, quote_char=False),
            convert_options=csv.ConvertOptions(column_types=types, null_values=[], strings_can_be_null=False),
        ).to_pandas()
    except pa.ArrowInvalid as problem:  # fast reading does not name the line reliably: look for it now
        raise StudyError(_first_bad_line(path, separator, fields) or f"{path}: {problem}") from problem


def _first_bad_line(path: Path, separator: str, fields: Mapping[str, type]) -> str | None:
    number = 0
    with path.open(encoding="iso-8859-1") as handle:
        for number, line in enumerate(handle, start=1):
            where = f"{path}:{number}"
            cells = line.rstrip("\n").split(separator)
            if cells == [""]:
                continue
            if len(cells) != len(fields):
                cut = "" if line.endswith("\n") else " (the last line, truncated)"
                return f"{where}: {len(cells)} fields instead of {len(fields)}{cut}: restore the file"
            for cell, (name, kind) in zip(cells, fields.items(), strict=True):
                if kind is int and not re.fullmatch(r"-?\d+", cell):
                    return f"{where}: {name} {cell!r} is not a whole number: correct or remove the line"
    return None if number else f"{path} is empty: restore the published file"


def _line_of_row(path: Path, row: int) -> int:
    """Line number (from 1) of the row-th (from 0) line that is not blank."""
    with path.open(encoding="iso-8859-1") as handle:
        filled = (number for number, line in enumerate(handle, start=1) if line.strip("\n"))
        return next(number for count, number in enumerate(filled) if count == row)
