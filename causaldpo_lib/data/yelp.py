"""Yelp Open Dataset: reviews joined with businesses."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from causaldpo_lib.data.interactions import Interactions, assemble
from causaldpo_lib.data.reading import joined, outside, published, read_json_lines, refuse, seconds, warn_of_subset

RELEASES = {
    "Yelp Open Dataset of 2018 (round 11)": {"reviews": 5_261_668, "businesses": 174_567},
    "Yelp Open Dataset of 2018 (round 12)": {"reviews": 5_996_996, "businesses": 188_593},
    "Yelp Open Dataset of 2022": {"reviews": 6_990_280, "businesses": 150_346},
}
REVIEW = {"user_id": str, "business_id": str, "stars": float, "date": str}
BUSINESS = {"business_id": str}
DESCRIPTION = {"name": str, "city": str, "state": str, "categories": str}


def load_yelp(folder: Path) -> Interactions:
    """Yelp: reviews of businesses with one to five stars, 2004 to 2022.

    Source: Yelp Open Dataset, https://business.yelp.com/data/resources/open-dataset/; behind a form, so nothing is
    downloaded here.
    Licence: Yelp's dataset licence: academic, non-commercial, no redistribution.
    Complete sets: 2018 (round 11) 5,261,668 reviews and 174,567 businesses, (round 12) 5,996,996 and 188,593; 2022
    6,990,280 and 150,346. Any other content loads with a warning of its counts. The benchmark "Yelp2018" of graph
    recommenders (31,668 users, as CausalDPO's Table 2) is derived from one of 2018 and has neither names nor times.

    Files, one JSON object a line, UTF-8: ``yelp_academic_dataset_review.json`` (user_id, business_id, stars, date)
    and ``yelp_academic_dataset_business.json`` (business_id, name, city, state, categories), or both without
    ``yelp_academic_dataset_``. In dumps of 2018 dates have no time of day, and categories may be a list instead of
    a text with commas; both forms load alike, categories as ``genres``, joined by ``|``. Times are read as UTC.

    Titles: a business's name. A name that several businesses bear gets city and state, "Name (City, ST)"; those of
    one name in one city, such as the branches of a chain, are one item. Of a user's several reviews of an item the
    earliest stays. A review whose business is missing is dropped and counted.

    Args:
        folder: holds the files.

    Raises:
        StudyError: a missing or empty file; a malformed, truncated or impossible line (file and line named).
    """
    review_path, business_path = published("yelp", folder, *(_named(folder, kind) for kind in ("review", "business")))
    businesses = read_json_lines(business_path, BUSINESS, DESCRIPTION)
    reviews = read_json_lines(review_path, REVIEW).with_columns(time=seconds("date"))
    undated = {"date {date!r} is no date such as 2018-07-30 12:00:00: correct or remove it": pl.col("time").is_null()}
    refuse(reviews, review_path, None, {**outside("stars", 1, 5), **undated})
    warn_of_subset({"reviews": len(reviews), "businesses": len(businesses)}, RELEASES, folder)
    ratings = reviews.select(user="user_id", item="business_id", rating=pl.col("stars").cast(pl.Float32), time="time")
    return assemble("yelp", ratings, _described(businesses))


def _named(folder: Path, kind: str) -> str:
    long, short = f"yelp_academic_dataset_{kind}.json", f"{kind}.json"
    return short if (folder / short).exists() and not (folder / long).exists() else long


def _described(businesses: pl.DataFrame) -> pl.DataFrame:
    name, city, state = (pl.col(column).str.strip_chars() for column in ("name", "city", "state"))
    parts = (pl.when(part != "").then(part) for part in (city, state))
    place = pl.concat_str(*parts, separator=", ", ignore_nulls=True)
    branch = (pl.col("business_id").n_unique().over(name) > 1) & (name != "") & (place != "")
    return businesses.select(
        item="business_id",
        title=pl.when(branch).then(pl.format("{} ({})", name, place)).otherwise(name),
        genres=joined(businesses["categories"]),
        city="city",
        state="state",
    )
