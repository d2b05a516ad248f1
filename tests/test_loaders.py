"""Every other loader on made-up files in its publisher's format, and on the published files where they are."""

from __future__ import annotations

import json
import warnings
from datetime import UTC, datetime
from pathlib import Path
from time import process_time

import pandas as pd
import polars as pl
import pytest
from samples import FILES, business, json_lines, write

from causaldpo_lib.data import DATASETS, load_dataset
from causaldpo_lib.data.interactions import STATS
from causaldpo_lib.errors import StudyError
from causaldpo_lib.paths import data_folder

subset = pytest.mark.filterwarnings("ignore:.*results do not compare")
pytestmark = subset
SLICE = {"user": "user_index", "item": "movie_id", "rating": "label", "time": "timestamp"}


@pytest.fixture
def load(tmp_path):
    """Load a dataset's made-up files, some replaced."""

    def loaded(name: str, files: dict[str, bytes] | None = None, **options):
        folder = write(name, tmp_path / name)
        for file, content in (files or {}).items():
            (folder / file).write_bytes(content)
        return load_dataset(name, folder, **options)

    return loaded


def rows(data) -> list[list]:
    return data.table.to_numpy(dtype=object).tolist()


def counted(data) -> dict[str, int]:
    """The counts that are not zero."""
    return {name: count for name, count in data.stats.items() if count}


def at(*moment: int) -> int:
    return int(datetime(*moment, tzinfo=UTC).timestamp())


# --- What holds for all ---


def test_every_dataset_that_reads_files_is_tested_here():
    assert set(FILES) == set(DATASETS) - {"simulated"}


@pytest.mark.parametrize("name", FILES)
def test_every_loader_counts_in_the_same_words(load, name):
    stats = load(name).stats
    assert tuple(stats) == STATS and all(isinstance(count, int) for count in stats.values())


@pytest.mark.parametrize("name", FILES)
def test_every_row_that_was_read_is_kept_or_counted(load, name):
    data = load(name)
    lost = ("rows_filtered", "ratings_without_item", "duplicates_merged")
    assert len(data.table) == data.stats["rows_read"] - sum(data.stats[count] for count in lost)
    gone = ("items_repeated", "items_untitled", "titles_merged")
    assert len(data.items) == data.stats["items_listed"] - sum(data.stats[count] for count in gone)


@pytest.mark.parametrize("name", set(FILES) - {"custom"})
def test_other_counts_than_the_published_ones_warn(tmp_path, name):
    with pytest.warns(UserWarning, match="is not .*it holds .*results do not compare"):
        load_dataset(name, write(name, tmp_path))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_and_an_empty_file_are_named(tmp_path, name):
    for number, file in enumerate(FILES[name]):
        if file in ("u.user", "users.dat", "BX-Users.csv"):
            continue
        path = write(name, tmp_path / f"{number}") / file
        path.write_bytes(b"")
        with pytest.raises(StudyError, match=f"{file} is empty"):
            load_dataset(name, path.parent)
        path.unlink()
        with pytest.raises(StudyError, match=rf"{file.split('.')[0]}.* is missing: .*CAUSALDPO_DATA"):
            load_dataset(name, path.parent)


@pytest.mark.parametrize("name", FILES)
def test_blank_lines_and_other_line_ends_do_no_harm(load, tmp_path, name):
    whole = load(name)
    for number, old in enumerate((b"\n", b"\r\n")):
        for file in FILES[name]:
            content = FILES[name][file].replace(b"\r\n", b"\n").replace(b"\n", (b"\r\n", b"\n\n")[number])
            (tmp_path / name / file).write_bytes(old + content + old)
        data = load_dataset(name, tmp_path / name)
        pd.testing.assert_frame_equal(data.table, whole.table)
        pd.testing.assert_frame_equal(data.items, whole.items)


def test_a_byte_order_mark_is_no_part_of_a_name(load):
    mark = b"\xef\xbb\xbf"
    assert rows(load("custom", {"interactions.csv": mark + FILES["custom"]["interactions.csv"]})) == rows(
        load("custom")
    )


@pytest.mark.parametrize(("name", "word"), [("yelp", "accept Yelp's terms"), ("amazon", "metadata")])
def test_what_cannot_be_downloaded_says_what_to_fetch(tmp_path, name, word):
    with pytest.raises(StudyError, match=f"{word}.*CAUSALDPO_DATA"):
        load_dataset(name, tmp_path / "absent")


# --- MovieLens ---


def test_ml_1m(load):
    data = load("ml-1m")
    assert rows(data) == [
        [1, 20, 5, 978300760],
        [1, 10, 3, 978302109],
        [2, 30, 1, 978298400],
        [2, 10, 4, 978298413],
    ]
    assert data.items.to_numpy(dtype=object).tolist() == [
        [10, 'Été: "One" (1995)', "Comedy|Drama", 1995],
        [20, "2001: Two (1968)", "Drama", 1968],
        [30, "Three (2000)", "War", 2000],
    ]
    assert data.users["zip"].tolist() == ["48067", "70072-1"]


def test_ml_10m(load):
    data = load("ml-10m")
    assert rows(data) == [[1, 185, 4.5, 838983525], [1, 122, 5, 838985046], [7, 122, 0.5, 1230000000]]
    assert data.items["title"].tolist() == ["Été, L' (a.k.a. Summer) (1992)", "Net, The (1995)"]
    assert counted(data) == {"rows_read": 4, "items_listed": 2, "ratings_without_item": 1}
    assert data.users is None and (data.positive_threshold, data.strict) == (4.0, False)


def test_ml_latest_small(load):
    data = load("ml-latest-small")
    assert rows(data) == [[1, 3, 0.5, 964981247], [1, 1, 4, 964982703], [2, 3, 5, 1445714835]]
    assert data.items["title"].tolist() == ["Toy (1995)", 'Été, The "Big" One (1995)']
    assert data.items["genres"].tolist() == ["Comedy|War", ""]


def test_the_larger_releases_are_known_by_their_counts(tmp_path, monkeypatch):
    from causaldpo_lib.data import movielens

    releases = {"a": {"ratings": 1, "users": 1, "movies": 1}, "b": {"ratings": 3, "users": 2, "movies": 2}}
    monkeypatch.setattr(movielens, "CSV_RELEASES", releases)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_dataset("ml-latest-small", write("ml-latest-small", tmp_path))


# --- Book-Crossing ---


def test_book_crossing(load):
    data = load("book-crossing")
    assert rows(data) == [[8, "01X", 9], [9, "01X", 10], [9, "02", 7], [10, "04", 8]]  # 03 is an edition of 02
    books = data.items.set_index("item")
    assert books["title"].to_dict() == {"01X": '"O" Is; for Öl', "02": "Salt & Pepper", "04": "X-Men: How (Level 4)"}
    assert books["author"].to_dict() == {"01X": "Ann & Bob", "02": "C", "04": "Michael T"}
    assert books["year"].tolist() == [2001, pd.NA, 2000] and books.loc["04", "publisher"] == "DK Publishing"
    assert data.users["age"].tolist() == [pd.NA, 34, pd.NA]
    assert data.users["location"].tolist()[0] == 'bonn, "nrw", germany'
    assert "time" not in data.table and (data.positive_threshold, data.strict) == (7.0, True)
    assert counted(data) == {
        "rows_read": 7,
        "rows_filtered": 1,
        "items_listed": 4,
        "ratings_without_item": 1,
        "titles_merged": 1,
        "duplicates_merged": 1,
    }


def test_book_crossing_keeps_implicit_ratings_on_request(load):
    data = load("book-crossing", implicit=True)
    assert [8, "02", 0] in rows(data) and data.stats["rows_filtered"] == 0


@pytest.mark.parametrize("name", FILES)
def test_the_datasets_own_rule_for_positives_is_the_splits_default(load, name):
    from causaldpo_lib.splits import make_split

    data = load(name)
    keeps = data.table["rating"].gt(7) if name == "book-crossing" else data.table["rating"].ge(4)
    with pytest.raises(StudyError, match=rf"rating {'> 7' if name == 'book-crossing' else '>= 4'}, min_user=99"):
        make_split("iid", data, 0, min_user=99)
    assert keeps.any()


# --- Yelp ---


def test_yelp(load):
    data = load("yelp")
    assert rows(data) == [
        ["u1", "b1", 4, at(2011, 10, 29, 19, 32, 49)],
        ["u1", "b2", 5, at(2011, 10, 30)],
        ["u2", "b1", 5, at(2012, 1, 1, 0, 0, 1)],  # the earlier of two
        ["u3", "b3", 3, at(2012, 1, 1, 0, 0, 1)],  # b4 is a branch of b3 in the same city
    ]
    assert data.items["title"].tolist() == ["Blue Café", "Jo's (Reno, NV)", "Jo's (Tucson, AZ)"]
    assert data.items["genres"].tolist() == ["Diners|Bars", "", "Diners|Bars"]
    assert data.stats["ratings_without_item"] == 1 and data.stats["titles_merged"] == 1


def test_yelp_of_2018_loads_alike(tmp_path):
    whole = load_dataset("yelp", write("yelp", tmp_path / "2022"))
    old = tmp_path / "2018"
    old.mkdir()
    for file, content in FILES["yelp"].items():
        objects = [json.loads(line) for line in content.splitlines()]
        for each in objects:
            if "date" in each:
                each |= {"date": each["date"][:10], "useful": 0}
            elif each["categories"]:
                each |= {"categories": each["categories"].split(", "), "neighborhood": ""}
        (old / file.removeprefix("yelp_academic_dataset_")).write_bytes(json_lines(*objects))
    data = load_dataset("yelp", old)
    pd.testing.assert_frame_equal(data.items, whole.items)
    assert (data.table["time"] % 86_400 == 0).all()
    days = data.table.assign(time=data.table["time"] // 86_400)
    pd.testing.assert_frame_equal(days, whole.table.assign(time=whole.table["time"] // 86_400))


def test_yelp_names_need_no_city(load):
    lines = [business(key, "Same", "", "") for key in ("b1", "b2")] + [business("b3", "Same", "Reno", "")]
    data = load("yelp", {"yelp_academic_dataset_business.json": json_lines(*lines)})
    assert data.items["title"].tolist() == ["Same", "Same (Reno)"]


# --- Amazon ---


def test_amazon(load):
    data = load("amazon")
    assert rows(data) == [
        ["A1", "B1", 5, 1500000000],
        ["A1", "B2", 2, 1500086400],
        ["A2", "B2", 4, 1400000000],
    ]
    assert data.items["title"].tolist() == ["Soap & Glory", "Rose Oil"]
    assert data.items["brand"].tolist()[0] == "S&G"
    assert data.items["genres"].tolist() == ["Beauty|Bath, Body", ""]
    assert counted(data) == {
        "rows_read": 5,
        "items_listed": 5,
        "items_repeated": 1,
        "items_untitled": 2,
        "ratings_without_item": 2,
    }


def test_amazon_reads_packed_files_and_tells_a_cut_one(tmp_path):
    plain = load_dataset("amazon", write("amazon", tmp_path / "plain"))
    folder = write("amazon", tmp_path / "packed", packed=True)
    pd.testing.assert_frame_equal(load_dataset("amazon", folder).table, plain.table)
    path = folder / "All_Beauty.json.gz"
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(StudyError, match=r"All_Beauty\.json\.gz"):
        load_dataset("amazon", folder)


def test_amazon_picks_the_category(tmp_path):
    folder = write("amazon", tmp_path)
    (folder / "meta_Books.json").write_bytes(FILES["amazon"]["meta_All_Beauty.json"])
    (folder / "Books_5.json").write_bytes(FILES["amazon"]["All_Beauty.json"].splitlines(keepends=True)[0])
    with pytest.raises(StudyError, match="option 'category' to one of All_Beauty, Books"):
        load_dataset("amazon", folder)
    with pytest.warns(UserWarning, match="not the published Amazon Books_5, it holds 1 of 27,164,983 reviews"):
        assert len(load_dataset("amazon", folder, category="Books").table) == 1
    with pytest.raises(StudyError, match=r"Toys\.json is missing"):
        load_dataset("amazon", folder, category="Toys")


# --- LastFM ---


def test_lastfm(load):
    data = load("lastfm")
    assert rows(data) == [[2, 51, 5], [2, 52, 5], [3, 52, 5]]  # 53 is 52 again
    assert data.items["title"].tolist() == ['Duran "D" Duran', "Björk"]


def test_lastfm_leaves_out_what_was_played_too_seldom(load):
    data = load("lastfm", min_plays=9)
    assert rows(data) == [[2, 51, 5], [3, 52, 5]] and data.stats["rows_filtered"] == 2
    for plays, word in ((0, "1 or more"), (10**6, "13883 or less")):
        with pytest.raises(StudyError, match=word):
            load("lastfm", min_plays=plays)


# --- custom ---


def test_custom(load):
    data = load("custom")
    assert rows(data) == [
        ["ann", "007", 4.5, at(2018, 7, 30)],
        ["ann", "8", 2, 1532995201],
        ["bob", "8", 5, at(2018, 7, 30, 12)],
    ]
    assert data.items["title"].tolist() == ["Été, one", "Two"]
    assert data.stats["items_repeated"] == 1


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_blank_first_title_of_custom_data_does_no_harm(tmp_path, kind):
    blank = [" ", ""] if kind == "csv" else [None, "\t"]
    titles = [blank[0], "One", "Uno", blank[1], blank[0]]
    frame = pl.DataFrame({"user": [1, 2, 3, 1, 1], "item": [1, 1, 1, 2, 3], "title": titles})
    frame = pl.concat([frame, pl.DataFrame({"user": [2], "item": [2], "title": ["Two"]})])
    path = tmp_path / f"mine.{kind}"
    frame.write_csv(path) if kind == "csv" else frame.write_parquet(path)
    data = load_dataset("custom", tmp_path, file=path.name, rating="", time="")
    assert data.items[["item", "title"]].values.tolist() == [[1, "One"], [2, "Two"]]
    assert len(data.table) == 5
    found = {name: data.stats[name] for name in ("items_repeated", "items_untitled", "ratings_without_item")}
    assert found == {"items_repeated": 3, "items_untitled": 1, "ratings_without_item": 1}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_custom_columns_are_named_by_options(tmp_path, kind):
    frame = pl.DataFrame(
        {"u": [3, 3], "i": [20, 10], "t": ["B", "A"], "r": [1, 0], "when": ["2020-01-02", "2020-01-01"]}
    )
    path = tmp_path / f"mine.{kind}"
    frame.write_csv(path) if kind == "csv" else frame.with_columns(pl.col("when").str.to_date()).write_parquet(path)
    options = {"file": path.name, "user": "u", "item": "i", "title": "t", "rating": "r", "time": "when"}
    data = load_dataset("custom", tmp_path, positive_threshold=1, **options)
    assert rows(data) == [[3, 10, 0, at(2020, 1, 1)], [3, 20, 1, at(2020, 1, 2)]]
    assert data.table["user"].dtype == "int64" and data.positive_threshold == 1


def test_custom_without_ratings_and_times(load):
    content = {"interactions.csv": b"user,item,title\n1,1,One\n1,2,Two\n"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = load("custom", content, rating="", time="")
    assert rows(data) == [[1, 1, 5], [1, 2, 5]]
    with pytest.warns(UserWarning) as said:
        load("custom", content)
    assert [word in str(each.message) for each, word in zip(said, ("5.0", "no times"), strict=True)] == [True, True]
    with pytest.raises(StudyError, match=r"no column 'stars', only user, item, title: set option 'rating'"):
        load("custom", content, rating="stars", time="")
    with pytest.raises(StudyError, match=r"options 'user' and 'item' .* both name column 'user'"):
        load("custom", content, item="user")


@pytest.mark.parametrize(
    ("column", "values", "word"),
    [
        ("user", [None, 1], r"custom\.parquet:1: the user is missing"),
        ("rating", [1.0, float("nan")], r":2: rating nan is not finite"),
        ("rating", ["a", "b"], "the rating cannot be of type String"),
        ("time", [None, 1], r":1: time None is neither"),
        ("title", [1, 2], "the title cannot be of type Int64"),
    ],
)
def test_custom_parquet_is_checked(tmp_path, column, values, word):
    columns = {"user": [1, 2], "item": [1, 1], "title": ["A", "A"], "rating": [1.0, 2.0], "time": [1, 2]}
    pl.DataFrame(columns | {column: values}).write_parquet(tmp_path / "custom.parquet")
    with pytest.raises(StudyError, match=word):
        load_dataset("custom", tmp_path, file="custom.parquet")


# --- Bad rows ---


@pytest.mark.parametrize(
    ("name", "file", "line", "old", "new", "word"),
    [
        ("ml-1m", "ratings.dat", 2, "::3::", "::6::", "rating 6.0 is outside 1 to 5"),
        ("ml-1m", "ratings.dat", 2, "::", ":", "1 fields instead of 4"),
        ("ml-1m", "ratings.dat", 2, "::3::", "::three::", "rating 'three' is not a number"),
        ("ml-1m", "ratings.dat", 2, "::3::", "::3::4::", "5 fields instead of 4"),
        ("ml-10m", "ratings.dat", 3, "0.5", "0.4", "outside 0.5 to 5"),
        ("ml-10m", "movies.dat", 2, "::Action", "", "2 fields instead of 3"),
        ("ml-latest-small", "ratings.csv", 1, "rating", "stars", "no column 'rating', only userId"),
        ("ml-latest-small", "ratings.csv", 3, "0.5", "", "rating '' is not a number"),
        ("ml-latest-small", "ratings.csv", 3, ",", "\t", "1 fields instead of 4"),
        ("book-crossing", "BX-Book-Ratings.csv", 4, '"10"', '"11"', "Book-Rating 11 is outside 0 to 10"),
        ("book-crossing", "BX-Book-Ratings.csv", 4, '"9"', '"nine"', "User-ID 'nine' is not a whole number"),
        ("book-crossing", "BX-Books.csv", 3, '"House";', "", "fields instead of 8"),
        ("yelp", "yelp_academic_dataset_review.json", 2, "2011-10-30", "30/10/2011", "date '30/10/2011"),
        ("yelp", "yelp_academic_dataset_review.json", 2, '"stars": 5.0', '"stars": "five"', "stars 'five'"),
        ("yelp", "yelp_academic_dataset_review.json", 2, '"stars": 5.0, ', "", "no field 'stars'"),
        ("yelp", "yelp_academic_dataset_business.json", 2, "}", "", "not complete JSON"),
        ("amazon", "All_Beauty.json", 2, "2.0", "0.0", "overall 0.0 is outside 1 to 5"),
        ("lastfm", "user_artists.dat", 3, "\t1", "\t-1", "weight -1 is no count"),
        ("custom", "interactions.csv", 3, ",2,", ",two,", "rating 'two' is not a number"),
        ("custom", "interactions.csv", 3, "1532995201", "soon", "time 'soon' is neither"),
        ("custom", "interactions.csv", 3, "ann", "", "the user is missing"),
        ("custom", "interactions.csv", 3, "1532995201", "1532995201000", "'1532995201000' is no time in seconds"),
        ("yelp", "yelp_academic_dataset_review.json", 2, "5.0", "5" * 5000, "not complete JSON, Exceeds the limit"),
    ],
)
def test_a_bad_row_is_named(tmp_path, name, file, line, old, new, word):
    path = write(name, tmp_path) / file
    encoding = "iso-8859-1" if name in ("book-crossing", "ml-1m") else "utf-8"
    lines = path.read_bytes().decode(encoding).splitlines(keepends=True)
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new)
    path.write_bytes("".join(lines).encode(encoding))
    with pytest.raises(StudyError, match=word) as raised:
        load_dataset(name, tmp_path)
    assert str(raised.value).startswith(f"{path}:{line}: ") and "\n" not in str(raised.value)


def test_a_cut_time_at_the_end_of_custom_data_is_named(tmp_path):
    path = tmp_path / "interactions.csv"
    path.write_text("user,item,title,time\n1,1,A,1600000000\n2,1,A,16000")
    said = (
        r"interactions\.csv:3: the last line is truncated \(time '16000'\): restore the file, or end .* with a newline"
    )
    with pytest.raises(StudyError, match=said):
        load_dataset("custom", tmp_path, rating="")
    path.write_bytes(path.read_bytes() + b"\n")
    assert len(load_dataset("custom", tmp_path, rating="").table) == 2


def test_a_last_small_number_may_have_fewer_digits(tmp_path):
    path = tmp_path / "interactions.csv"
    path.write_text("user,item,title,time\n1,1,A,12\n2,1,A,11\n3,1,A,10\n4,1,A,9")
    assert load_dataset("custom", tmp_path, rating="").table["time"].tolist() == [12, 11, 10, 9]
    # One that is no time in seconds among the others is enough: nothing is known of the last.
    path.write_text("user,item,title,time\n1,1,A,1600000000\n2,1,A,99999999\n3,1,A,9")
    assert len(load_dataset("custom", tmp_path, rating="").table) == 3


@pytest.mark.parametrize("name", ["ml-latest-small", "lastfm", "custom"])
def test_another_encoding_is_named_with_its_line(tmp_path, name):
    file = {"ml-latest-small": "movies.csv", "lastfm": "artists.dat", "custom": "interactions.csv"}[name]
    path = write(name, tmp_path) / file
    path.write_bytes(path.read_bytes().decode().encode("iso-8859-1"))
    with pytest.raises(StudyError, match=rf"{file}:\d: not UTF-8 text: .*convert"):
        load_dataset(name, tmp_path)


def test_ratings_of_other_items_are_told(load):
    with pytest.raises(StudyError, match="none of its 4 ratings is of a listed item"):
        load("ml-1m", {"movies.dat": b"77::Elsewhere (1990)::Drama\n"})


# --- Size ---


def test_double_colons_are_read_faster_than_by_python(tmp_path):
    """The whole loader beats pandas' reading alone, which takes a row at a time for such separators."""
    lines = "".join(f"{1 + n // 100}::{1 + n % 100}::{1 + n % 5}::{978300760 + n}\n" for n in range(100_000))
    (tmp_path / "ratings.dat").write_text(lines)
    (tmp_path / "movies.dat").write_text("".join(f"{n}::Film {n} (2000)::War\n" for n in range(1, 101)))
    start = process_time()
    data = load_dataset("ml-1m", tmp_path)
    half = process_time()
    plain = pd.read_csv(tmp_path / "ratings.dat", sep="::", engine="python", header=None)
    assert half - start < process_time() - half
    assert data.table.to_numpy(dtype=float).tolist() == plain.to_numpy(dtype=float).tolist()


# --- The published files, where they are ---


def real(name: str, folder: str | None = None, **options):
    path = data_folder() / (folder or name)
    if not path.exists():
        pytest.skip(f"{path} is absent: set CAUSALDPO_DATA to the folder of the published datasets")
    return load_dataset(name, path, **options)


@pytest.mark.realdata
def test_published_book_crossing():
    data = real("book-crossing")
    assert data.stats["rows_read"] == 204_164 and data.stats["items_listed"] == 18_185
    assert data.stats["ratings_without_item"] == data.stats["items_untitled"] == data.stats["rows_filtered"] == 0
    assert data.table["user"].nunique() == len(data.users) == 48_299
    assert data.users["age"].isna().sum() >= 18_952
    assert not data.items["title"].str.contains("&amp;").any()
    counts = data.table["rating"].value_counts()
    assert counts.index.min() == 1 and counts.index.max() == 10


@pytest.mark.realdata
def test_published_yelp():
    data = real("yelp")
    assert data.stats["rows_read"] == 5_000 and data.stats["items_listed"] == 1_000
    assert data.stats["ratings_without_item"] == 0 and data.table["user"].nunique() == 4_786
    days = pd.to_datetime(data.table["time"], unit="s").dt.strftime("%Y-%m-%d")
    assert (days.min(), days.max()) == ("2005-03-12", "2022-01-19")


@pytest.mark.realdata
def test_published_slice_of_ml_1m():
    data = real("custom", "custom/ml-1m-slice", **SLICE, positive_threshold=1.0)
    assert len(data.table) == 51_623 and data.table["user"].nunique() == 838 and len(data.items) == 3_255
    assert data.table["rating"].value_counts().to_dict() == {1.0: 27_684, 0.0: 23_939}
    assert not data.stats["titles_merged"] and not data.stats["duplicates_merged"]


@pytest.mark.realdata
def test_published_films_of_ml_1m_and_ml_10m(tmp_path):
    """The catalogues are whole where the ratings are not: each is read beside a single made-up rating."""
    for name, folder, films in (("ml-1m", "custom/ml-1m-slice", 3_883), ("ml-10m", "prompts/causaldpo-ml-10m", 10_681)):
        source = data_folder() / folder / "movies.dat"
        if not source.exists():
            pytest.skip(f"{source} is absent: set CAUSALDPO_DATA to the folder of the published datasets")
        place: Path = tmp_path / name
        place.mkdir()
        (place / "movies.dat").symlink_to(source)
        (place / "ratings.dat").write_bytes(b"1::1::5::978300760\n")
        data = load_dataset(name, place)
        assert data.stats["items_listed"] == films and not data.stats["items_untitled"]
        assert data.items["year"].notna().all() and not data.items["title"].str.contains("Ã").any()
