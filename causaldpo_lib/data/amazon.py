"""Amazon Reviews 2018: reviews of one category joined with its metadata."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from causaldpo_lib.data.interactions import Interactions, assemble
from causaldpo_lib.data.reading import joined, outside, published, read_json_lines, refuse, unescaped, warn_of_subset
from causaldpo_lib.errors import StudyError

REVIEWS = {  # in the publisher's files by name, without their ending
    "All_Beauty": 371_345,
    "All_Beauty_5": 5_269,
    "Luxury_Beauty": 574_628,
    "Luxury_Beauty_5": 34_278,
    "Books": 51_311_621,
    "Books_5": 27_164_983,
}
REVIEW = {"reviewerID": str, "asin": str, "overall": float, "unixReviewTime": int}
PRODUCT = {"asin": str}
DESCRIPTION = {"title": str, "brand": str, "category": str}
ENDINGS = (".json", ".json.gz")


def load_amazon(folder: Path, *, category: str = "") -> Interactions:
    """Amazon Reviews 2018: reviews of products with one to five stars, 1996-05 to 2018-10, by category.

    Source: Ni, Li & McAuley (EMNLP 2019), https://nijianmo.github.io/amazon/; linked from a form, so nothing is
    downloaded here.
    Licence: research use; treat as not for redistribution.
    Complete sets: All_Beauty 371,345 reviews (5-core 5,269), Luxury_Beauty 574,628 (34,278), Books 51,311,621
    (27,164,983). Files of these names with other counts load with a warning.

    Files, one JSON object a line, UTF-8, plain or as ``.gz``: ``<category>.json`` or, if that is absent, the 5-core
    ``<category>_5.json`` (reviewerID, asin, overall, unixReviewTime), and ``meta_<category>.json`` (asin, title,
    brand, category: a list, here ``genres``).

    Quirks: products are listed repeatedly (the first line counts), and variants of a product under one title (one
    item). Titles hold HTML entities and tags, which are resolved and removed; where the publisher's crawler caught a
    page's script instead (it calls ``getTime``), there is none. Products without a title, and ratings of products
    that are not listed, are dropped and counted. Reviews are repeated under several of a product's variants: of a
    user's several the earliest stays. Times are whole days.

    Args:
        folder: holds the files.

    Options:
        ``category``: that of the files, such as ``All_Beauty``; needed when the folder holds several.

    Raises:
        StudyError: an unknown category; a missing, empty or damaged file; a malformed, truncated or impossible line
            (file and line named).
    """
    reviews_of, meta_of = _names(folder, category)
    review_path, meta_path = published("amazon", folder, reviews_of, meta_of)
    stem = reviews_of.partition(".")[0]
    products = read_json_lines(meta_path, PRODUCT, DESCRIPTION)
    reviews = read_json_lines(review_path, REVIEW)
    refuse(reviews, review_path, None, outside("overall", 1, 5))
    if stem in REVIEWS:
        warn_of_subset({"reviews": len(reviews)}, {f"Amazon {stem}": {"reviews": REVIEWS[stem]}}, folder)
    ratings = reviews.select(
        user="reviewerID", item="asin", rating=pl.col("overall").cast(pl.Float32), time="unixReviewTime"
    )
    return assemble("amazon", ratings, _described(products))


def _names(folder: Path, category: str) -> tuple[str, str]:
    """Of the files of reviews and of metadata, as they are there or, if absent, as they should be."""
    present = {path.name for path in folder.glob("*") if path.name.endswith(ENDINGS)}
    categories = sorted({name.removeprefix("meta_").partition(".")[0] for name in present if name.startswith("meta_")})
    if not category and len(categories) > 1:
        raise StudyError(f"{folder} holds several categories: set option 'category' to one of {', '.join(categories)}")
    category = category or (categories[0] if categories else "All_Beauty")

    def first(*stems: str) -> str:
        names = [f"{stem}{ending}" for stem in stems for ending in ENDINGS]
        return next((name for name in names if name in present), names[0])

    return first(category, f"{category}_5"), first(f"meta_{category}")


def _described(products: pl.DataFrame) -> pl.DataFrame:
    script = pl.col("title").str.contains("getTime", literal=True)
    titles = products.select(pl.when(~script).then(pl.col("title").str.replace_all(r"<[^>]*>", " ")))["title"]
    return products.select(
        item="asin", title=unescaped(titles), brand=unescaped(products["brand"]), genres=joined(products["category"])
    )
