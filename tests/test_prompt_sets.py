"""Prompt sets on fabricated files in each published format: what loads, what is repaired, what bad input says."""

from __future__ import annotations

import csv
import io
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from causaldpo_lib.data import PROMPT_SETS, load_prompts
from causaldpo_lib.data.prompts import FORMATS, repair
from causaldpo_lib.errors import StudyError
from causaldpo_lib.paths import data_folder

LIKED, DISLIKED, TARGET = ["Alien", 'A "Quoted" Film', "8 1/2, or so"], ["Zero &amp; One"], "AmÃ©lie"


def quoted(titles: list[str], author: str = "") -> str:
    return ", ".join(f'"{title}"{author}' for title in titles)


def candidates(liked: list[str], disliked: list[str], target: str, label: int) -> dict[str, Any]:
    return {"historyList": "::".join(liked), "itemList": ["Heat", target, "Heat"], "trueSelection": target}


def instruction(liked: list[str], disliked: list[str], target: str, label: int) -> dict[str, Any]:
    sentence = f"The user has read before: {quoted(liked)}, please write a new one"
    return {"instruction": "Recommend.", "input": sentence, "output": f'"{target}"\n'}


def preference(liked: list[str], disliked: list[str], target: str, label: int, author: str = "") -> dict[str, Any]:
    asked = f'Whether the user will like the target film "{quoted([target], author) if author else target}"?'
    sentence = f"User Preference: {quoted(liked, author)}\nUser Unpreference: {quoted(disliked, author)}\n{asked}"
    return {"instruction": "Answer.", "input": sentence, "output": ("No.", "Yes.")[label]}


def by_author(*row: Any) -> dict[str, Any]:
    return preference(*row, author=" written by Ann O'Nym, Jr.")


def as_json(maker: Callable[..., dict[str, Any]]) -> Callable[[list[tuple]], str]:
    return lambda rows: json.dumps([maker(*row) for row in rows], indent=1)


def as_csv(rows: list[tuple]) -> str:
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(["user_id", "history_item_title", "item_title", "history_item_id"])
    table.writerows(["A1", repr(liked), target, "[1, 2]"] for liked, _, target, _ in rows)
    return text.getvalue()


TEXTS = {
    "candidates": as_json(candidates),
    "instruction": as_json(instruction),
    "preference": as_json(preference),
    "lists": as_csv,
}
ROWS = [(LIKED, DISLIKED, TARGET, 1), (LIKED[:1], [], "Heat", 0)]
SUFFIXES = {"candidates": "json", "instruction": "json", "preference": "json", "lists": "csv"}


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def fabricate(folder: Path, name: str, rows: list[tuple] = ROWS) -> list[Path]:
    """The files of a published set, with made-up prompts."""
    prompts = PROMPT_SETS[name]
    text = as_json(by_author)(rows) if name == "tallrec/book" else TEXTS[prompts.format](rows)
    for file in prompts.files.values():
        write(folder / file, text)
    return [folder / file for file in prompts.files.values()]


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_every_set_loads_into_one_table(name, tmp_path, monkeypatch):
    fabricate(tmp_path / "prompts" / name, name)
    monkeypatch.setenv("CAUSALDPO_DATA", str(tmp_path))
    prompts = load_prompts(name)
    known = PROMPT_SETS[name]
    assert prompts["split"].tolist() == [split for split in known.files for _ in ROWS]
    first, second = prompts.iloc[0], prompts.iloc[1]
    assert first["history"] == LIKED and first["target"] == "Amélie"
    assert second["history"] == ["Alien"] and second["target"] == "Heat"
    with_candidates = known.format == "candidates"
    assert first["candidates"] == (["Heat", "Amélie", "Heat"] if with_candidates else [])
    columns = ["history", "candidates", "target", "split"]
    if known.format == "preference":
        columns += ["disliked", "label"]
        assert (first["disliked"], second["disliked"]) == (["Zero & One"], [])
        assert prompts["label"].tolist() == [1, 0] * len(known.files)
    assert list(prompts) == columns


@pytest.mark.parametrize(
    ("published", "repaired"),
    [
        ("AmÃ©lie", "Amélie"),
        ("Jack &amp; Jill", "Jack & Jill"),
        ("9&rdquo; Nails &#39;B&#39;", "9” Nails 'B'"),
        ("Glue&Acirc;&reg;", "Glue®"),  # both at once
        *((title, title) for title in ("µ-Ziq", "Júpiter Maçã", "Amélie", "三", "", "AT&T", "&copy me", "R&B; &")),
    ],
)
def test_titles_are_repaired_and_sound_ones_left_alone(published, repaired):
    assert repair(published) == repaired


# --- Folders of other files ---


@pytest.mark.parametrize("format", FORMATS)
def test_other_files_are_read_by_format_and_sorted_by_the_split_they_name(format, tmp_path):
    text, suffix = TEXTS[format](ROWS), SUFFIXES[format]
    for place in ("ml-ood_test", "train/part-1", "Valid", "x_val", "films-test"):
        write(tmp_path / f"{place}.{suffix}", text)
    write(tmp_path / f"id2name.{suffix}", "{}")
    write(tmp_path / "test.txt", "not of this format")
    prompts = load_prompts("mine", tmp_path, format=format)
    found = prompts["split"].value_counts().to_dict()
    assert found == {"ood_test": 2, "train": 2, "validation": 4, "test": 2}


def test_names_and_formats_that_are_not_known_list_those_that_are(tmp_path):
    with pytest.raises(StudyError, match=r"unknown prompt set 'ml'.*causaldpo-ml-10m, .*tallrec/movie"):
        load_prompts("ml")
    with pytest.raises(StudyError, match=r"unknown format of prompts 'list' \(did you mean 'lists'\?\)"):
        load_prompts("mine", tmp_path, format="list")
    write(tmp_path / "id2name.json", "[]")
    with pytest.raises(StudyError, match=r"has no \.json file for format 'candidates' .*train.*test"):
        load_prompts("mine", tmp_path, format="candidates")
    with pytest.raises(StudyError, match=r"nowhere has no \.csv file for format 'lists'"):
        load_prompts("mine", tmp_path / "nowhere", format="lists")


# --- Bad input ---


@pytest.mark.parametrize("name", PROMPT_SETS)
def test_missing_files_are_named(name, tmp_path, monkeypatch):
    monkeypatch.setenv("CAUSALDPO_DATA", str(tmp_path))
    for path in reversed(fabricate(tmp_path / "prompts" / name, name)):
        path.unlink()
        with pytest.raises(StudyError, match=rf"{path.name} is missing: .*CAUSALDPO_DATA.*prompts/{name}/"):
            load_prompts(name)


def test_relative_folders_are_taken_from_the_repository_root(monkeypatch):
    monkeypatch.setenv("CAUSALDPO_DATA", f"some{os.sep}where")
    with pytest.raises(StudyError, match="sdpo-lastfm"):
        load_prompts("sdpo-lastfm")
    assert data_folder().is_absolute()


def one(maker: Callable[..., dict[str, Any]], **changes: Any) -> str:
    item = maker(*ROWS[0]) | changes
    return json.dumps([maker(*ROWS[1]), {key: value for key, value in item.items() if value is not None}])


def lists(history: str, target: str = "Heat") -> str:
    return f'user_id,history_item_title,item_title\nA,[],Heat\nB,"{history}",{target}\n'


JSON_FAULTS = [
    ('[\n{"input": "A",\n', r"test\.json:\d+: not complete JSON"),
    ("", r"test\.json:1: not complete JSON"),
    ("{}", "expected a list of prompts"),
    ("[]", "has no prompts"),
    ("[1]", "object 1 needs"),
    ("[" * 100_000, "no list of prompts|not complete JSON"),
    (f"[{'9' * 5000}]", "no list of prompts"),
]
FAULTS = {
    "candidates": [
        *JSON_FAULTS,
        (one(candidates, trueSelection=None), "object 2 needs"),
        (one(candidates, itemList="Heat"), "object 2 needs"),
        (one(candidates, itemList=["Heat", 1]), "object 2 needs"),
        (one(candidates, trueSelection="Cold"), "object 2: the target 'Cold' is not among its candidates"),
    ],
    "instruction": [
        *JSON_FAULTS,
        (one(instruction, output=None), "object 2 needs the texts 'input' and 'output'"),
        (one(instruction, input="no titles"), "object 2 needs quoted titles"),
        (one(instruction, input='one "quote'), "object 2 needs quoted titles"),
        (one(instruction, output="Heat"), "object 2 needs quoted titles"),
        (one(instruction, output='""'), "object 2 needs quoted titles"),
        (one(instruction, output='"Heat", "Cold"'), "object 2 needs quoted titles"),
    ],
    "preference": [
        *JSON_FAULTS,
        (one(preference, input=7), "object 2 needs the texts 'input' and 'output'"),
        (one(preference, output="Maybe."), "object 2 needs the lines .* and 'Yes.' or 'No.'"),
        (one(preference, input='User Preference: "A"'), "object 2 needs the lines"),
        (
            one(preference, input=preference(*ROWS[0])["input"].replace('"Alien"', "Alien")),
            "object 2: the history is not in quoted titles",
        ),
        (
            one(preference, input=preference(*ROWS[0])["input"].replace('"Zero &amp; One"', "Zero")),
            "object 2: the disliked is not in quoted titles",
        ),
        (one(preference, input=preference([], [], 'A", "B', 1)["input"]), "object 2: the target is not"),
    ],
    "lists": [
        ("", r"test\.csv:1: no column 'history_item_title'"),
        ("history_item_title,title\n[],A\n", r"test\.csv:1: no column 'item_title'"),
        ("history_item_title,item_title\n", "has no prompts"),
        (lists("['A'", "Heat"), r"test\.csv:3: history_item_title is not a list of texts"),
        (lists("'A'"), r"test\.csv:3: history_item_title is not a list"),
        (lists("['A', 1]"), r"test\.csv:3: history_item_title is not a list"),
        (lists("['A', '']"), r"test\.csv:3: history_item_title is not a list"),
        (lists("[str(1)]"), r"test\.csv:3: history_item_title is not a list"),
        (lists("(" * 500), r"test\.csv:3: history_item_title is not a list"),
        (lists("['A']", " "), r"test\.csv:3: .* item_title is empty"),
        (lists("['A']", "Heat,more"), r"test\.csv:3: not 3 fields"),
        (lists("['A']")[: -len(",Heat\n")], r"test\.csv:3: not 3 fields"),
        (lists("['A']")[: -len("',Heat\n")], r"test\.csv:\d: not CSV"),
        (lists("['A']") + f'C,"{"x" * 200_000}",Heat\n', r"test\.csv:4: not CSV"),
    ],
}


@pytest.mark.parametrize(("format", "text", "word"), [(name, *fault) for name in FAULTS for fault in FAULTS[name]])
def test_malformed_prompts_are_named(format, text, word, tmp_path):
    write(tmp_path / f"test.{SUFFIXES[format]}", text)
    with pytest.raises(StudyError, match=word) as raised:
        load_prompts("mine", tmp_path, format=format)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize("format", FORMATS)
def test_another_encoding_is_named_and_a_byte_order_mark_ignored(format, tmp_path):
    path = tmp_path / f"test.{SUFFIXES[format]}"
    path.write_bytes(b"\xef\xbb\xbf" + TEXTS[format](ROWS).encode())
    assert len(load_prompts("mine", tmp_path, format=format)) == 2
    path.write_bytes(TEXTS[format](ROWS).replace("Alien", "Aliên").encode("iso-8859-1") + "ê".encode("iso-8859-1"))
    with pytest.raises(StudyError, match=rf"{path.name}: not UTF-8"):
        load_prompts("mine", tmp_path, format=format)


def test_empty_pieces_of_a_joined_history_are_no_titles(tmp_path):
    write(tmp_path / "test.json", one(candidates, historyList="::Alien::::Heat::"))
    assert load_prompts("mine", tmp_path, format="candidates").loc[1, "history"] == ["Alien", "Heat"]


def test_literals_are_read_and_never_run(tmp_path):
    trap = tmp_path / "trap"
    write(tmp_path / "test.csv", lists(f"[open('{trap.as_posix()}', 'w').name]"))
    with pytest.raises(StudyError, match="not a list of texts"):
        load_prompts("mine", tmp_path, format="lists")
    assert not trap.exists()
    write(tmp_path / "test.csv", lists(r"['a\d', 'it\'s']"))  # Python warns of the first backslash
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_prompts("mine", tmp_path, format="lists").loc[1, "history"] == [r"a\d", "it's"]


SOUND = st.text(
    st.characters(codec="utf-8", exclude_characters='"\\&:\r\n', exclude_categories=("Cc", "Cs")), min_size=1
)
TITLE = SOUND.filter(lambda title: title.strip() and repair(title) == title)


@pytest.mark.parametrize("format", FORMATS)
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(st.lists(TITLE, min_size=1), st.lists(TITLE), TITLE, st.integers(0, 1)), min_size=1))
def test_what_was_written_is_read_back(format, rows, tmp_path):
    write(tmp_path / f"test.{SUFFIXES[format]}", TEXTS[format](rows))
    prompts = load_prompts("mine", tmp_path, format=format)
    assert prompts["history"].tolist() == [liked for liked, _, _, _ in rows]
    assert prompts["target"].tolist() == [target for _, _, target, _ in rows]
    if format == "preference":
        assert prompts["disliked"].tolist() == [disliked for _, disliked, _, _ in rows]
        assert prompts["label"].tolist() == [label for _, _, _, label in rows]


@pytest.mark.parametrize("format", FORMATS)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_gives_prompts_or_one_sentence(format, data, tmp_path):
    text = TEXTS[format](ROWS).encode()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, min(start + data.draw(st.sampled_from([0, 1, 20, 10_000])), len(text))))
    new = data.draw(
        st.one_of(st.binary(max_size=4), st.sampled_from([b'"', b"[", b"\\", b"\n", b",", b"\x00", b"'", b"1e999"]))
    )
    (tmp_path / f"test.{SUFFIXES[format]}").write_bytes(text[:start] + new + text[end:])
    try:
        prompts = load_prompts("mine", tmp_path, format=format)
    except StudyError as problem:
        assert "\n" not in str(problem) and f"test.{SUFFIXES[format]}" in str(problem)
    else:
        assert all(isinstance(title, str) and title for titles in prompts["history"] for title in titles)
        assert all(isinstance(title, str) and title for title in prompts["target"])


# --- The published files, where they are ---

COUNTS = {  # rows by split, longest history, candidates
    "causaldpo-ml-10m": ({"validation": 2_282, "ood_test": 3_436}, 10, 10),
    "sdpo-lastfm": ({"validation": 2_767, "test": 2_495}, 10, 20),
    "sprec-goodreads": ({"train": 5_000}, 10, 0),
    "minionerec-amazon-industrial": ({"validation": 4_532, "test": 4_533}, 10, 0),
    "tallrec/book": ({"validation": 2_427, "test": 2_427}, 10, 0),
    "tallrec/movie": ({"validation": 1_000, "test": 1_000}, 10, 0),
}


def published(name: str) -> pd.DataFrame:
    if not (data_folder() / "prompts" / name).exists():
        pytest.skip(f"prompt set {name} is absent: set CAUSALDPO_DATA to the folder of the published datasets")
    return load_prompts(name)


@pytest.mark.realdata
@pytest.mark.parametrize("name", PROMPT_SETS)
def test_published_sets_have_their_published_counts(name):
    prompts = published(name)
    rows, longest, choices = COUNTS[name]
    assert prompts.groupby("split", sort=False).size().to_dict() == rows
    assert prompts["history"].str.len().max() == longest
    assert set(prompts["candidates"].str.len()) == {choices}
    assert prompts["target"].str.len().min() > 0
    assert not any("&amp;" in title for titles in prompts["history"] for title in titles)


@pytest.mark.realdata
def test_published_titles_join_their_catalogues():
    """The two sets that come with one: every title is found there, but for one that Goodreads' does not list."""
    films = published("causaldpo-ml-10m")
    lines = (data_folder() / "prompts/causaldpo-ml-10m/movies.dat").read_text(encoding="utf-8").splitlines()
    known = {line.split("::")[1].rsplit(" (", 1)[0] for line in lines}
    assert {title for column in ("history", "candidates") for titles in films[column] for title in titles} <= known
    books = published("sprec-goodreads")
    known = set(json.loads((data_folder() / "prompts/sprec-goodreads/id2name.json").read_text("utf-8")).values())
    assert len({*books["target"], *(title for titles in books["history"] for title in titles)} - known) == 1


@pytest.mark.realdata
def test_published_answers_have_their_published_shares():
    book, movie = published("tallrec/book"), published("tallrec/movie")
    assert book.groupby("split")["label"].sum().to_dict() == {"validation": 1_011, "test": 1_054}
    assert movie.groupby("split")["label"].sum().to_dict() == {"validation": 658, "test": 528}
    together = book["history"].str.len() + book["disliked"].str.len()
    assert together.between(1, 20).all()
