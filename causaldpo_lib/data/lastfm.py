"""LastFM of HetRec 2011: who listened to which artist."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from causaldpo_lib.data.interactions import Interactions, assemble
from causaldpo_lib.data.reading import Layout, published, read_rows, refuse, warn_of_subset
from causaldpo_lib.errors import StudyError

RELEASES = {"LastFM of HetRec 2011": {"pairs": 92_834, "users": 1_892, "artists": 17_632}}
PLAYS = Layout({"userID": int, "artistID": int, "weight": int}, "\t", header=True)
ARTISTS = Layout({"id": int, "name": str}, "\t", header=True, lacking=2)
RATING = 5.0  # of every artist that counts as listened to


def load_lastfm(folder: Path, *, min_plays: int = 1) -> Interactions:
    """LastFM HetRec-2011: listening counts of users and artists.

    Source: HetRec 2011 workshop (Cantador, Brusilovsky & Kuflik), https://grouplens.org/datasets/hetrec-2011/, from
    Last.fm. Downloaded from there when ``folder`` does not exist.
    Licence: non-commercial research with acknowledgement.
    Complete set: 92,834 (user, artist) pairs of 1,892 users and 17,632 artists, each user's top 50 at most. A smaller
    one loads with a warning.

    Files, cut by tabs, UTF-8, with header: ``user_artists.dat`` (userID, artistID, weight: how often the user
    listened), ``artists.dat`` (id, name, url, pictureURL).

    Ratings: there are none. Counts differ between users by orders of magnitude and are no judgement, so every artist
    played at least ``min_plays`` times gets 5.0, which every usual threshold takes as positive; the others are dropped.

    Quirks: there are no times of listening. Artists of the same name are one item.

    Args:
        folder: holds the files.

    Options:
        ``min_plays``: how often a user has to have played an artist, for it to count as listened to.

    Raises:
        StudyError: a missing or empty file; a malformed, truncated or impossible row (file and line named);
            ``min_plays`` below 1 or above all counts.
    """
    if min_plays < 1:
        raise StudyError(f"option 'min_plays' of dataset 'lastfm' must be 1 or more, not {min_plays}")
    plays_path, artists_path = published("lastfm", folder, "user_artists.dat", "artists.dat")
    artists, plays = read_rows(artists_path, ARTISTS), read_rows(plays_path, PLAYS)
    problem = "weight {weight} is no count of plays: correct or remove the line"
    refuse(plays, plays_path, PLAYS, {problem: pl.col("weight") < 1})
    found = {"pairs": len(plays), "users": plays["userID"].n_unique(), "artists": len(artists)}
    warn_of_subset(found, RELEASES, folder)
    kept = plays.filter(pl.col("weight") >= min_plays)
    if kept.is_empty():
        most = plays["weight"].max()
        raise StudyError(f"option 'min_plays' of dataset 'lastfm' must be {most} or less, not {min_plays}")
    ratings = kept.select(user="userID", item="artistID", rating=pl.lit(RATING, pl.Float32))
    return assemble("lastfm", ratings, artists.select(item="id", title="name"), rows_read=len(plays))
