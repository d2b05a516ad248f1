"""MovieLens in its publisher's three formats: 100K, 1M and 10M, and the CSV files of all later releases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import polars as pl

from causaldpo_lib.data.interactions import Interactions, assemble
from causaldpo_lib.data.reading import UNCUT, Layout, cut_short, outside, published, read_rows, refuse, warn_of_subset

RELEASES = {
    "MovieLens-100K": {"ratings": 100_000, "users": 943, "movies": 1_682},
    "MovieLens-1M": {"ratings": 1_000_209, "users": 6_040, "movies": 3_883},
    "MovieLens-10M": {"ratings": 10_000_054, "users": 69_878, "movies": 10_681},
    "ml-latest-small": {"ratings": 100_836, "users": 610, "movies": 9_742},
    "ml-20m": {"ratings": 20_000_263, "users": 138_493, "movies": 27_278},
    "ml-25m": {"ratings": 25_000_095, "users": 162_541, "movies": 62_423},
    "ml-32m": {"ratings": 32_000_204, "users": 200_948, "movies": 87_585},
}
CSV_RELEASES = {name: counts for name, counts in RELEASES.items() if name.startswith("ml-")}
GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War"),
    "Western",
)

LATIN = "iso-8859-1"
RATINGS_100K = Layout({"user": int, "item": int, "rating": int, "time": int}, "\t")
MOVIES_100K = Layout(
    {"item": int, "title": str, "release": str, "video": str, "url": str} | dict.fromkeys(GENRES, int),
    "|",
    encoding=LATIN,
)
USERS_100K = Layout({"user": int, "age": int, "gender": str, "occupation": str, "zip": str}, "|", encoding=LATIN)
RATINGS = Layout({"user": int, "item": int, "rating": float, "time": int}, "::")
MOVIES = Layout({"item": int, "title": str, "genres": str}, "::", encoding=LATIN)
USERS_1M = Layout({"user": int, "gender": str, "age": int, "occupation": int, "zip": str}, "::", encoding=LATIN)
RATINGS_CSV = Layout({"userId": int, "movieId": int, "rating": float, "timestamp": int}, ",", header=True)
MOVIES_CSV = Layout({"movieId": int, "title": str, "genres": str}, ",", header=True, quoted=True)
COLUMNS_CSV = {"userId": "user", "movieId": "item", "timestamp": "time"}


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
    ratings_path, movies_path = published("ml-100k", folder, "u.data", "u.item")
    movies = read_rows(movies_path, MOVIES_100K)
    ratings = _ratings(ratings_path, RATINGS_100K, 1)
    flags = (pl.when(pl.col(name) != 0).then(pl.lit(name)) for name in GENRES)
    movies = _described(movies.with_columns(genres=pl.concat_str(*flags, separator="|", ignore_nulls=True)))
    _warn(ratings, movies, "MovieLens-100K", folder)
    return assemble("ml-100k", ratings, movies, _users(folder / "u.user", USERS_100K))


def load_ml_1m(folder: Path) -> Interactions:
    """MovieLens-1M: film ratings from a web site, 2000-04-25 to 2003-02-28.

    Source: GroupLens, https://grouplens.org/datasets/movielens/1m/ (Harper & Konstan 2015). Downloaded from there
    with a checksum when ``folder`` does not exist.
    Licence: research use with acknowledgement; no redistribution, no commercial use without permission.
    Complete set: 1,000,209 ratings (1 to 5, whole) by 6,040 users of 3,883 listed films, 3,706 of them rated; at
    least 20 ratings a user. A smaller one loads with a warning.

    Files, all cut by ``::`` and without header: ``ratings.dat`` (user, film, rating, Unix time in seconds),
    ``movies.dat`` (id, title with its year, genres cut by ``|``; ISO-8859-1), ``users.dat`` (user, gender, age
    group, occupation, zip; may be absent).

    Quirks: most users rated all they ever did in one sitting, many films within the same second.

    Args:
        folder: holds the files.

    Raises:
        StudyError: a missing or empty file; a malformed, truncated or impossible row (file and line named).
    """
    ratings, movies = _double_colon("ml-1m", folder, "MovieLens-1M", 1)
    return assemble("ml-1m", ratings, movies, _users(folder / "users.dat", USERS_1M))


def load_ml_10m(folder: Path) -> Interactions:
    """MovieLens-10M: film ratings from a web site, 1995-01-09 to 2009-01-05.

    Source: GroupLens, https://grouplens.org/datasets/movielens/10m/ (Harper & Konstan 2015). Downloaded from there
    with a checksum when ``folder`` does not exist.
    Licence: research use, non-commercial, with acknowledgement; treat as not for redistribution.
    Complete set: 10,000,054 ratings (0.5 to 5 in half stars) of 10,681 listed films, 10,677 of them rated; at least
    20 ratings a user. The publisher (and CausalDPO's Table 2) counts 71,567 users, of whom 69,878 rated a film and
    the others only gave tags. A smaller set loads with a warning.

    Files, both cut by ``::`` and without header: ``ratings.dat`` (user, film, rating, Unix time in seconds),
    ``movies.dat`` (id, title with its year, genres cut by ``|``; UTF-8). No users are described.

    Quirks: half stars exist only from 2003 on, so "above 4" means another share of the ratings before and after.
    Two films share a title and become one item.

    Args:
        folder: holds the files.

    Raises:
        StudyError: a missing or empty file; a malformed, truncated or impossible row (file and line named).
    """
    return assemble("ml-10m", *_double_colon("ml-10m", folder, "MovieLens-10M", 0.5))


def load_ml_latest_small(folder: Path) -> Interactions:
    """MovieLens in CSV: ml-latest-small (1996-03-29 to 2018-09-24) and the larger releases of its format.

    Source: GroupLens, https://grouplens.org/datasets/movielens/latest/ (Harper & Konstan 2015). ml-latest-small is
    downloaded from there when ``folder`` does not exist; a larger release is read from where it was put.
    Licence: research use with acknowledgement; redistribution under the same terms, no commercial use without
    permission.
    Complete sets: ml-latest-small of 2018-09 has 100,836 ratings (0.5 to 5 in half stars) by 610 users of 9,742
    listed films; ml-20m 20,000,263 by 138,493 of 27,278; ml-25m 25,000,095 by 162,541 of 62,423; ml-32m 32,000,204
    by 200,948 of 87,585. Any other content, such as a later state of "latest", loads with a warning of its counts.

    Files, with header, UTF-8: ``ratings.csv`` (userId, movieId, rating, timestamp in Unix seconds), ``movies.csv``
    (movieId, title with its year, genres cut by ``|``, in double quotes where needed).

    Quirks: some titles are listed under several ids and become one item here (the lowest id); some films have no
    year; "(no genres listed)" stands for none, as an empty text does here.

    Args:
        folder: holds the files.

    Raises:
        StudyError: a missing or empty file; a malformed, truncated or impossible row (file and line named).
    """
    ratings_path, movies_path = published("ml-latest-small", folder, "ratings.csv", "movies.csv")
    movies = read_rows(movies_path, MOVIES_CSV).rename(COLUMNS_CSV, strict=False)
    movies = _described(movies.with_columns(pl.col("genres").replace("(no genres listed)", "")))
    ratings = _ratings(ratings_path, RATINGS_CSV, 0.5)
    found = {"ratings": len(ratings), "users": ratings["user"].n_unique(), "movies": len(movies)}
    warn_of_subset(found, CSV_RELEASES, folder)
    return assemble("ml-latest-small", ratings, movies)


def _double_colon(name: str, folder: Path, release: str, lowest: float) -> tuple[pl.DataFrame, pl.DataFrame]:
    ratings_path, movies_path = published(name, folder, "ratings.dat", "movies.dat")
    movies = _described(read_rows(movies_path, MOVIES))
    ratings = _ratings(ratings_path, RATINGS, lowest)
    _warn(ratings, movies, release, folder)
    return ratings, movies


def _ratings(path: Path, layout: Layout, lowest: float) -> pl.DataFrame:
    rows = read_rows(path, layout).rename(COLUMNS_CSV, strict=False)
    cut = {f"the last line is truncated (time {{time}}): {UNCUT}": cut_short(rows, path, "time")}
    refuse(rows, path, layout, {**outside("rating", lowest, 5), **cut})
    return rows.with_columns(pl.col("rating").cast(pl.Float32))  # exact: stars are halves


def _described(movies: pl.DataFrame) -> pl.DataFrame:
    year = pl.col("title").str.extract(r".*\((\d{4})\)").cast(pl.Int64)
    return movies.select("item", "title", "genres", year=year)


def _users(path: Path, layout: Layout) -> pl.DataFrame | None:
    return read_rows(path, layout) if path.exists() else None


def _warn(ratings: pl.DataFrame, movies: pl.DataFrame, release: str, folder: Path) -> None:
    found: Mapping[str, int] = {
        "ratings": len(ratings),
        "users": ratings["user"].n_unique(),
        "movies": len(movies),
    }
    warn_of_subset(found, {release: RELEASES[release]}, folder)
