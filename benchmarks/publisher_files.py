"""A file of ratings as large as MovieLens-10M, in its publisher's format, made up: the real one may not be passed on.

``python -m benchmarks.publisher_files FOLDER [--ratings N]`` writes ``ratings.dat`` and ``movies.dat`` as `ml-10m`
reads them. Users and films shrink with the ratings, so that sizes compare: 1M ratings is a tenth of everything.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import polars as pl

RATINGS, USERS, MOVIES = 10_000_054, 71_567, 10_681  # as the paper's Table 2 counts MovieLens-10M
LEAST = 20  # ratings a user
FIRST, LAST = 789_652_009, 1_231_131_736  # Unix seconds: 1995-01-09 and 2009-01-05
GENRES = ("Action", "Comedy", "Drama", "Horror", "Musical", "Sci-Fi", "Western")


def write_movielens(folder: Path, ratings: int = RATINGS, seed: int = 0) -> tuple[int, int, int]:
    """Write the two files into ``folder``, in the publisher's order: by user, then film.

    Activity and popularity are long-tailed, ratings are half stars, a user's times lie within one year, and no (user,
    film) is repeated.

    Args:
        ratings: rows of ``ratings.dat``; users in proportion to the whole set's, films too where they suffice.
        seed: of everything.

    Returns:
        ratings, users, films: the numbers written.
    """
    rng = np.random.default_rng(seed)
    users = max(round(USERS * ratings / RATINGS), 1)
    movies = max(round(MOVIES * ratings / RATINGS), 4 * RATINGS // USERS)  # four times what a user rates on average
    folder.mkdir(parents=True, exist_ok=True)
    lengths = _lengths(ratings, users, movies, rng)
    user = np.repeat(np.arange(1, users + 1), lengths)
    step = np.arange(ratings) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    # Low-numbered films are popular: each user takes every stride-th place of a curve that is steep at its start.
    place = (step + rng.random(ratings)) / np.repeat(lengths, lengths)
    item = _increasing(np.floor(movies * place**2).astype(np.int64), lengths, movies)
    taste = np.repeat(rng.normal(3.6, 0.5, users), lengths)
    half_stars = np.clip(np.rint(2 * rng.normal(taste, 1.0)), 1, 10).astype(np.int64)
    year = np.repeat(rng.integers(FIRST, LAST - 31_536_000, users), lengths)
    frame = pl.DataFrame(
        {
            "user": user,
            "item": 1 + item,
            "rating": half_stars / 2,
            "time": year + rng.integers(0, 31_536_000, ratings),
        }
    )
    whole = pl.col("rating").cast(pl.Int64)
    stars = pl.when(pl.col("rating") == whole).then(whole.cast(pl.String)).otherwise(pl.col("rating").cast(pl.String))
    blank = pl.lit(None, pl.String)  # empty columns between single colons make the publisher's double ones
    columns = ("user", blank.alias("1"), "item", blank.alias("2"), stars.alias("rating"), blank.alias("3"), "time")
    frame.select(columns).write_csv(folder / "ratings.dat", separator=":", include_header=False, quote_style="never")
    titles = (f"{n}::Made-up Film: Part {n} ({1930 + n % 79})::{GENRES[n % 7]}|Drama\n" for n in range(1, movies + 1))
    (folder / "movies.dat").write_text("".join(titles), encoding="utf-8")
    return ratings, users, movies


def _lengths(ratings: int, users: int, movies: int, rng: np.random.Generator) -> np.ndarray:
    """(users,) ratings of each user: log-normal above `LEAST`, at most half of the films, of the given sum."""
    least, most = min(LEAST, ratings // users), movies // 2
    if ratings > users * most:
        raise ValueError(f"{ratings:,} ratings do not fit {users:,} users of {most:,} films each: ask for more")
    weight = rng.lognormal(0.0, 1.1, users)
    lengths = np.minimum(least + np.floor((ratings - least * users) * weight / weight.sum()), most).astype(np.int64)
    while missing := ratings - lengths.sum():
        open_ = rng.permutation(np.flatnonzero(lengths < most))[:missing]
        lengths[open_] += 1
    return lengths


def _increasing(item: np.ndarray, lengths: np.ndarray, movies: int) -> np.ndarray:
    """Make each user's non-decreasing items strictly increasing, within 0 .. ``movies`` - 1."""
    step = np.arange(len(item)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    user = np.repeat(np.arange(len(lengths)), lengths)
    # x_s -> s + max over t <= s of (x_t - t); users are kept apart by an offset that no item reaches
    raised = np.maximum.accumulate(item - step + user * (2 * movies)) - user * (2 * movies) + step
    return np.minimum(raised, movies - np.repeat(lengths, lengths) + step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ratings", type=int, default=RATINGS, help=f"rows of ratings.dat (default {RATINGS:,})")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print("wrote {:,} ratings by {:,} users of {:,} films".format(*write_movielens(**vars(options))))


if __name__ == "__main__":
    main()
