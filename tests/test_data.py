"""What all datasets share: the contract, the rules of clean-up, and MovieLens-100K as the format in full."""

from __future__ import annotations

import warnings
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from samples import FILES, TITLES_100K, write

from causaldpo_lib.data import DATASETS, Interactions, load_dataset
from causaldpo_lib.data.interactions import assemble, counts, merge_shared_titles
from causaldpo_lib.errors import StudyError
from causaldpo_lib.paths import data_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*is not the published MovieLens-100K")


@pytest.fixture
def ml_100k(tmp_path) -> Path:
    return write("ml-100k", tmp_path / "ml-100k")


# --- The registry and the contract ---


def test_every_loader_has_a_data_card():
    for loader in DATASETS.values():
        assert loader.__doc__ and "Raises:" in loader.__doc__


def test_unknown_names_and_options_are_refused(ml_100k):
    with pytest.raises(StudyError, match=r"unknown dataset 'ml-100'.*simulated, ml-100k"):
        load_dataset("ml-100")
    with pytest.raises(StudyError, match=r"dataset 'ml-100k' takes no options: remove 'users'"):
        load_dataset("ml-100k", ml_100k, users=3)
    with pytest.raises(StudyError, match=r"unknown option of dataset 'simulated' 'folders'"):
        load_dataset("simulated", folders=3)


GOOD = {
    "table": pd.DataFrame({"user": [1, 1], "item": [1, 2], "rating": [5.0, 4.0], "time": [1, 2]}),
    "items": pd.DataFrame({"item": [1, 2, 3], "title": ["One", "Two", "Three"]}),
}


@pytest.mark.parametrize(
    ("part", "change", "word"),
    [
        ("table", lambda t: t.drop(columns="rating"), "no column 'rating'"),
        ("table", lambda t: t.assign(rating=[5.0, np.nan]), "'rating' of the interactions has missing"),
        ("table", lambda t: t.assign(time=[1, np.nan]), "has no time"),
        ("table", lambda t: t.assign(item=1), "pair is repeated"),
        ("table", lambda t: t.assign(item=[1, 9]), "not listed"),
        ("table", lambda t: t.head(0), "empty"),
        ("items", lambda t: t.drop(columns="title"), "no column 'title'"),
        ("items", lambda t: t.assign(item=[1, 2, 2]), "listed twice"),
        ("items", lambda t: t.assign(title=["One", "Two", "Two"]), "share a title"),
        ("items", lambda t: t.assign(title=["One", "Two", " "]), "empty title"),
    ],
)
def test_interactions_are_checked_when_made(part, change, word):
    Interactions("toy", **GOOD)
    with pytest.raises(StudyError, match=f"dataset 'toy'.*{word}"):
        Interactions("toy", **(GOOD | {part: change(GOOD[part])}))


# --- The rules of clean-up ---


def test_every_rule_counts_what_it_does():
    ratings = pl.DataFrame({"user": [1, 1, 1, 2, 2, 3], "item": [1, 2, 3, 9, 4, 3], "rating": [1.0, 2, 3, 4, 5, 6]})
    items = pl.DataFrame({"item": [3, 2, 1, 1, 4, 5], "title": ["A\u00a0\n b", " A b ", "C", "D", "\t", None]})
    data = assemble("toy", ratings, items, rows_read=8, positive_threshold=2.5, strict=True)
    assert data.items.to_numpy(dtype=object).tolist() == [[1, "C"], [2, "A b"]]
    assert data.table.to_numpy(dtype=object).tolist() == [[1, 1, 1], [1, 2, 2], [3, 2, 6]]
    assert data.stats == {
        "rows_read": 8,
        "rows_filtered": 2,
        "items_listed": 6,
        "items_repeated": 1,
        "items_untitled": 2,
        "ratings_without_item": 2,
        "titles_merged": 1,
        "duplicates_merged": 1,
    }
    assert (data.positive_threshold, data.strict) == (2.5, True)


def merged_by_hand(table: list[tuple], titles: dict) -> list[tuple]:
    """The rule of `merge_shared_titles`, a row at a time."""
    kept: dict[tuple, tuple] = {}
    for user, item, rating, time in table:
        item = min(other for other, title in titles.items() if title == titles[item])
        if (user, item) not in kept or time < kept[user, item][3]:
            kept[user, item] = (user, item, rating, time)
    return sorted(kept.values(), key=lambda row: (row[0], row[3], row[1]))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 5), st.integers(0, 3)), min_size=1),
    st.lists(st.sampled_from("abc"), min_size=6, max_size=6),
    st.booleans(),
    st.booleans(),
)
def test_merging_equals_the_rule_a_row_at_a_time(table, titles, timed, texts):
    key = (lambda item: f"i{item}") if texts else int
    table = [(user, key(item), rating, time if timed else 0) for user, item, rating, time in table]
    titles = {key(item): title for item, title in enumerate(titles)}
    ratings = pl.DataFrame(table, schema=["user", "item", "rating", "time"], orient="row")
    items = pl.DataFrame({"item": list(titles), "title": list(titles.values())})
    merged, kept, stats = merge_shared_titles(ratings if timed else ratings.drop("time"), items)
    expected = merged_by_hand(table, titles)
    assert merged.rows() == (expected if timed else [row[:3] for row in expected])
    assert stats == {"titles_merged": 6 - len(set(titles.values())), "duplicates_merged": len(table) - len(expected)}
    assert kept["item"].is_sorted() and kept["title"].n_unique() == len(kept) == len(set(titles.values()))


# --- MovieLens-100K ---


def test_ml_100k_reads_the_publishers_format(ml_100k):
    data = load_dataset("ml-100k", ml_100k)
    assert data.table.values.tolist() == [
        [1, 2, 2, 874965700],  # film 4 merged into film 2, of which the earlier rating stays
        [1, 1, 5, 874965758],
        [2, 1, 3, 883888671],  # equal times: by item
        [2, 3, 1, 883888671],
        [3, 2, 5, 879959583],
    ]
    assert data.items["item"].tolist() == [1, 2, 3]
    assert data.items["title"].tolist() == [TITLES_100K[1], TITLES_100K[2], TITLES_100K[3]]
    assert data.items["genres"].tolist() == ["Action", "Action|Adventure", "Action|Animation"]
    assert data.items["year"].tolist() == [1996, 1995, pd.NA]
    assert data.users["occupation"].tolist() == ["technician", "other", "writer"]
    assert data.stats == counts(rows_read=6, items_listed=4, titles_merged=1, duplicates_merged=1)
    assert data.truth is None


def test_ml_100k_subset_warns_with_counts(ml_100k):
    with pytest.warns(UserWarning, match="6 of 100,000 ratings, 3 of 943 users, 4 of 1,682 movies"):
        load_dataset("ml-100k", ml_100k)


@pytest.mark.parametrize("ending", ["\r\n", "\n\n"])
def test_ml_100k_line_ends_and_blank_lines_do_no_harm(ml_100k, ending):
    for name in ("u.data", "u.item"):
        path = ml_100k / name
        path.write_bytes(path.read_bytes().replace(b"\n", ending.encode()))
    assert len(load_dataset("ml-100k", ml_100k).table) == 5


def test_ml_100k_works_without_final_line_end_and_without_users(ml_100k):
    (ml_100k / "u.user").unlink()
    (ml_100k / "u.data").write_bytes(FILES["ml-100k"]["u.data"][:-1])
    data = load_dataset("ml-100k", ml_100k)
    assert len(data.table) == 5 and data.users is None


@pytest.mark.parametrize(
    ("file", "line", "text", "word"),
    [
        ("u.data", 2, b"1\t2\t4", "3 fields instead of 4"),
        ("u.data", 2, b"1\t2\t4\t874965759\t0", "5 fields instead of 4"),
        ("u.data", 3, b"1\tfour\t2\t874965700", "item 'four' is not a whole number"),
        ("u.data", 3, b"1\t\t2\t874965700", "item '' is not a whole number"),
        ("u.data", 1, b"user_id\titem_id\trating\ttimestamp", "user 'user_id' is not a whole number"),
        ("u.data", 4, b"2\t3\t6\t883888671", "rating 6 is outside 1 to 5"),
        ("u.data", 4, b"2\t3\t0\t883888671", "rating 0 is outside 1 to 5"),
        ("u.item", 2, b"2|Short (1995)|01-Jan-1995", "3 fields instead of 24"),
        ("u.user", 1, b"1|old|M|technician|85711", "age 'old' is not a whole number"),
    ],
)
def test_ml_100k_names_file_and_line_of_a_bad_row(ml_100k, file, line, text, word):
    lines = FILES["ml-100k"][file].splitlines()
    lines[line - 1] = text
    (ml_100k / file).write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(StudyError, match=word) as raised:
        load_dataset("ml-100k", ml_100k)
    assert str(raised.value).startswith(f"{ml_100k / file}:{line}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("cut", [4, 11, 15])
def test_ml_100k_truncated_last_line_is_named(ml_100k, cut):
    path = ml_100k / "u.data"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(StudyError, match=r"u\.data:6: .*truncated"):
        load_dataset("ml-100k", ml_100k)


@pytest.mark.parametrize("name", ["u.data", "u.item"])
def test_ml_100k_missing_and_empty_files_are_named(ml_100k, name):
    (ml_100k / name).write_bytes(b"")
    with pytest.raises(StudyError, match=f"{name} is empty"):
        load_dataset("ml-100k", ml_100k)
    (ml_100k / name).unlink()
    with pytest.raises(StudyError, match=rf"{name} is missing: .*files\.grouplens\.org.*CAUSALDPO_DATA"):
        load_dataset("ml-100k", ml_100k)


# --- The published files, where they are ---


def needs(path: Path) -> None:
    if not path.exists():
        pytest.skip(f"{path} is absent: set CAUSALDPO_DATA to the folder of the published datasets")


@pytest.mark.realdata
def test_published_ml_100k():
    needs(data_folder() / "ml-100k")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load_dataset("ml-100k")
    assert data.stats["rows_read"] == 100_000
    assert data.table["user"].nunique() == 943
    assert data.stats["items_listed"] == 1_682 and data.stats["titles_merged"] == 18
    assert len(data.items) == 1_664 and len(data.users) == 943
    assert data.items["year"].notna().sum() == 1_663  # all but "unknown"


def test_reading_is_fast(ml_100k):
    """100,000 rows in well under two seconds: no row is touched in Python when all are sound."""
    import time

    rows = "".join(f"{n // 100}\t{1 + n % 2}\t{1 + n % 5}\t{874965758 + n}\n" for n in range(100_000))
    (ml_100k / "u.data").write_text(rows)
    start = time.perf_counter()
    load_dataset("ml-100k", ml_100k)
    assert time.perf_counter() - start < 2
