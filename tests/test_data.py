"""Loaders on synthetic files in the publishers' formats: what loads, what merges, what bad input says."""

from __future__ import annotations

import gc
import hashlib
import http.server
import io
import json
import os
import threading
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from causaldpo_lib.data import DATASETS, PROMPT_SETS, Interactions, load_dataset, load_prompts, movielens
from causaldpo_lib.data.download import Archive
from causaldpo_lib.errors import StudyError
from causaldpo_lib.paths import data_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*is not the published MovieLens-100K")

RATINGS = [  # user, item, rating, time; film 4 is film 2 again
    (1, 1, 5, 874965758),
    (1, 2, 4, 874965759),
    (1, 4, 2, 874965700),
    (2, 3, 1, 883888671),
    (2, 1, 3, 883888671),
    (3, 4, 5, 879959583),
]
TITLES = {1: "Amélie's Tale (1996)", 2: 'A "Quoted" Film (1995)', 3: "unknown", 4: 'A "Quoted" Film (1995)'}


def movie_line(item: int, title: str) -> str:
    flags = ["1" if flag in (1, item) else "0" for flag in range(19)]
    return "|".join([str(item), title, "01-Jan-1995", "", "http://example.org", *flags])


def files_of_ml_100k() -> dict[str, bytes]:
    return {
        "u.data": "".join("\t".join(map(str, row)) + "\n" for row in RATINGS).encode(),
        "u.item": "".join(movie_line(*row) + "\n" for row in TITLES.items()).encode("iso-8859-1"),
        "u.user": b"1|24|M|technician|85711\n2|53|F|other|T8H1N\n3|23|M|writer|32067\n",
    }


@pytest.fixture
def ml_100k(tmp_path) -> Path:
    folder = tmp_path / "ml-100k"
    folder.mkdir()
    for name, content in files_of_ml_100k().items():
        (folder / name).write_bytes(content)
    return folder


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
    with pytest.raises(StudyError, match="unknown prompt set 'ml'"):
        load_prompts("ml")


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
    assert data.items["title"].tolist() == [TITLES[1], TITLES[2], TITLES[3]]
    assert data.items["genres"].tolist() == ["Action", "Action|Adventure", "Action|Animation"]
    assert data.items["year"].tolist() == [1996, 1995, pd.NA]
    assert data.users["occupation"].tolist() == ["technician", "other", "writer"]
    assert data.stats == {"rows_read": 6, "items_listed": 4, "titles_merged": 1, "duplicates_merged": 1}
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
    (ml_100k / "u.data").write_bytes(files_of_ml_100k()["u.data"][:-1])
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
        ("u.data", 5, b"2\t9\t3\t883888671", "film 9 is not in u.item"),
        ("u.item", 2, b"2|Short (1995)|01-Jan-1995", "3 fields instead of 24"),
        ("u.item", 3, movie_line(1, "Twice").encode(), "film 1 is already listed"),
        ("u.item", 3, movie_line(3, "").encode(), "film 3 has no title"),
        ("u.user", 1, b"1|old|M|technician|85711", "age 'old' is not a whole number"),
    ],
)
def test_ml_100k_names_file_and_line_of_a_bad_row(ml_100k, file, line, text, word):
    lines = files_of_ml_100k()[file].splitlines()
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


# --- Download ---


class Server(http.server.BaseHTTPRequestHandler):
    content = b""
    sent: int | None = None  # bytes after which the connection is cut
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[: self.sent])

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def publisher(monkeypatch):
    """A loopback server with a zip in the publisher's layout, in the place of the publisher."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("ml-100k/README", "not wanted")
        archive.writestr("../escape", "not wanted")
        for name, content in files_of_ml_100k().items():
            archive.writestr(f"ml-100k/{name}", content)
    handler = type("Handler", (Server,), {"content": buffer.getvalue()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    archive = Archive(
        url=f"http://127.0.0.1:{server.server_port}/ml-100k.zip",
        md5=hashlib.md5(buffer.getvalue()).hexdigest(),
        members=movielens.ML_100K.members,
    )
    monkeypatch.setattr(movielens, "ML_100K", archive)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield handler
    server.shutdown()
    thread.join()
    server.server_close()
    gc.collect()  # pooch leaves the socket of a failed download to the collector: let it go within the test


leaves_a_socket = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_an_absent_folder_is_downloaded_once(publisher, tmp_path):
    folder = tmp_path / "new" / "ml-100k"
    first = load_dataset("ml-100k", folder)
    assert sorted(path.name for path in folder.iterdir()) == ["u.data", "u.item", "u.user"]
    assert [path.name for path in folder.parent.iterdir()] == ["ml-100k"]  # no scratch left
    publisher.status = 500
    pd.testing.assert_frame_equal(first.table, load_dataset("ml-100k", folder).table)


def test_the_default_folder_follows_the_variable(publisher, tmp_path, monkeypatch):
    monkeypatch.setenv("CAUSALDPO_DATA", str(tmp_path))
    load_dataset("ml-100k")
    assert (tmp_path / "ml-100k" / "u.data").is_file()


@leaves_a_socket
@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"content": b"something else"}, "does not have the published checksum"),
        ({"sent": 100}, "the connection was cut"),
        ({"status": 404}, "404"),
    ],
)
def test_a_failed_download_leaves_nothing_and_says_what_to_do(publisher, tmp_path, settings, word):
    for name, value in settings.items():
        setattr(publisher, name, value)
    folder = tmp_path / "ml-100k"
    with pytest.raises(StudyError, match=word) as raised:
        load_dataset("ml-100k", folder)
    message = str(raised.value)
    assert str(folder) in message and "CAUSALDPO_DATA" in message and "http://127.0.0.1" in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_the_message_is_the_same(publisher, tmp_path, monkeypatch):
    closed = Archive(url="http://127.0.0.1:9/ml-100k.zip", md5="0", members=())
    monkeypatch.setattr(movielens, "ML_100K", closed)
    with pytest.raises(StudyError, match=r"ml-100k does not exist .*127\.0\.0\.1:9.*cannot be reached.*CAUSALDPO_DATA"):
        load_dataset("ml-100k", tmp_path / "ml-100k")


# --- Prompt sets ---

PROMPT = {
    "historyList": "Alien::AmÃ©lie::8 1/2",
    "itemList": ["Heat", "AmÃ©lie", "Heat"],
    "trueSelection": "Heat",
}


@pytest.fixture(params=PROMPT_SETS)
def prompt_set(request, tmp_path) -> tuple[str, Path]:
    folder = tmp_path / request.param
    folder.mkdir()
    for file in PROMPT_SETS[request.param].values():
        (folder / file).write_text(json.dumps([PROMPT, PROMPT], indent=1), encoding="utf-8")
    return request.param, folder


def test_prompts_load_with_repaired_titles(prompt_set):
    name, folder = prompt_set
    prompts = load_prompts(name, folder)
    assert len(prompts) == 2 * len(PROMPT_SETS[name])
    row = prompts.iloc[0]
    assert row["history"] == ["Alien", "Amélie", "8 1/2"]
    assert row["candidates"] == ["Heat", "Amélie", "Heat"]
    assert row["target"] == "Heat" and row["split"] == "validation"


def test_repair_leaves_sound_titles_alone():
    from causaldpo_lib.data.prompts import repair

    assert [repair(title) for title in ("µ-Ziq", "Júpiter Maçã", "Amélie", "三", "")] == [
        *("µ-Ziq", "Júpiter Maçã", "Amélie", "三", "")
    ]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('[\n{"historyList": "A",\n', r"json:\d+: not complete JSON"),
        ("{}", "expected a list of prompts"),
        ('[{"historyList": "A", "itemList": ["B"]}]', "object 1 needs"),
        ('[{"historyList": "A", "itemList": "B", "trueSelection": "B"}]', "object 1 needs"),
        ('[{"historyList": "A", "itemList": ["B"], "trueSelection": "C"}]', "object 1: the target 'C'"),
    ],
)
def test_malformed_prompts_are_named(prompt_set, text, word):
    name, folder = prompt_set
    next(folder.iterdir()).write_text(text)
    with pytest.raises(StudyError, match=word):
        load_prompts(name, folder)


def test_missing_prompts_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("CAUSALDPO_DATA", str(tmp_path))
    with pytest.raises(StudyError, match=r"lastfm-val\.json is missing.*CAUSALDPO_DATA.*prompts/sdpo-lastfm"):
        load_prompts("sdpo-lastfm")


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


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "rows"), [("causaldpo-ml-10m", 2_282 + 3_436), ("sdpo-lastfm", 2_767 + 2_495)])
def test_published_prompts(name, rows):
    needs(data_folder() / "prompts" / name)
    prompts = load_prompts(name)
    assert len(prompts) == rows
    assert prompts["history"].str.len().between(1, 10).all()
    assert not any("Ã" in title for titles in prompts["candidates"] for title in titles)


def test_reading_is_fast(ml_100k):
    """100,000 rows in well under two seconds: no row is touched in Python when all are sound."""
    import time

    rows = "".join(f"{n // 100}\t{1 + n % 2}\t{1 + n % 5}\t{874965758 + n}\n" for n in range(100_000))
    (ml_100k / "u.data").write_text(rows)
    start = time.perf_counter()
    load_dataset("ml-100k", ml_100k)
    assert time.perf_counter() - start < 2


def test_relative_folders_are_taken_from_the_repository_root(monkeypatch):
    monkeypatch.setenv("CAUSALDPO_DATA", f"some{os.sep}where")
    with pytest.raises(StudyError, match="sdpo-lastfm"):
        load_prompts("sdpo-lastfm")
    assert data_folder().is_absolute()
