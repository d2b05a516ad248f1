"""Damaged files of every format: a clean result or one sentence, never another exception or a silent wrong row."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import hypothesis.strategies as st
import pandas as pd
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from samples import FILES, PACKED, write

from causaldpo_lib.data import Interactions, load_dataset
from causaldpo_lib.errors import StudyError

SCALES = {"book-crossing": (0, 10), "custom": (-1e300, 1e300)}
BITS = [b"", b"\n", b"\r\n", b"\r", b'"', b'""', b"\\", b";", b",", b"\t", b"::", b":", b"|", b"{", b"}", b"[", b"null"]
BITS += [b"-1", b"1e999", b"nan", b"99999999999999999999", b"\xff", b"\xc3", b"\x00", b"\xef\xbb\xbf", b"&amp;", b"<b>"]


@st.composite
def damages(draw) -> tuple[str, int, int, int, bytes]:
    """A kind of damage, two places in thousandths of the file, a length, and what is put in."""
    kind = draw(st.sampled_from(["cut", "replace", "insert", "repeat", "swap", "drop"]))
    place, other = draw(st.integers(0, 1000)), draw(st.integers(0, 1000))
    text = draw(st.one_of(st.sampled_from(BITS), st.binary(max_size=4)))
    return kind, place, other, draw(st.integers(0, 12)), text


def damaged(content: bytes, damage: tuple[str, int, int, int, bytes]) -> bytes:
    kind, place, other, length, text = damage
    at = place * len(content) // 1000
    lines = content.splitlines(keepends=True)
    line, second = place * len(lines) // 1001, other * len(lines) // 1001
    match kind:
        case "cut":
            return content[:at]
        case "replace":
            return content[:at] + text + content[at + length :]
        case "insert":
            return content[:at] + text + content[at:]
        case "repeat":
            return b"".join([*lines[: line + 1], *lines[line:]])
        case "swap" if lines:
            lines[line], lines[second] = lines[second], lines[line]
        case "drop" if lines:
            del lines[line]
    return b"".join(lines)


def load_or_refuse(name: str, folder: Path) -> Interactions | None:
    """The data, which hold together, or None after one sentence about a file of the folder, or the dataset."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            data = load_dataset(name, folder)
        except StudyError as error:
            said = str(error)
            assert "\n" not in said and (str(folder) in said or said.startswith(f"dataset {name!r}: ")), said
            assert ": " in said
            return None
    lowest, highest = SCALES.get(name, (0.5, 5))
    assert data.table["rating"].between(lowest, highest).all()
    assert not data.table.duplicated(["user", "item"]).any()
    assert pd.merge(data.table, data.items, on="item").shape[0] == len(data.table)
    if "time" in data.table:
        assert pd.api.types.is_integer_dtype(data.table["time"])
    assert data.items["title"].str.strip().ne("").all() and data.items["title"].is_unique
    return data


CASES = [(name, file, packed) for name in FILES for file in FILES[name] for packed in {False, name in PACKED}]


@pytest.mark.parametrize(("name", "file", "packed"), CASES)
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.lists(damages(), min_size=1, max_size=2))
def test_a_damaged_file_loads_or_is_refused_in_one_sentence(name, file, packed, hurt):
    with tempfile.TemporaryDirectory() as place:
        folder = write(name, Path(place) / name, packed)
        path = folder / f"{file}{'.gz' * packed}"
        content = path.read_bytes()
        for each in hurt:
            content = damaged(content, each)
        path.write_bytes(content)
        load_or_refuse(name, folder)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(damages())
def test_a_damaged_parquet_file_too(hurt):
    frame = pl.DataFrame({"user": [1, 2], "item": [1, 2], "title": ["A", "B"], "rating": [1.0, 5.0], "time": [1, 2]})
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "mine.parquet"
        frame.write_parquet(path)
        path.write_bytes(damaged(path.read_bytes(), hurt))
        try:
            load_dataset("custom", place, file=path.name)
        except StudyError as error:
            assert str(path) in str(error) or "dataset 'custom'" in str(error)


@pytest.mark.parametrize("name", FILES)
def test_every_cut_of_the_ratings_is_found_or_only_shortens(name, tmp_path):
    """Cut after any byte: never a row that was not there before."""
    folder = write(name, tmp_path)
    file = next(iter(FILES[name]))
    whole = load_or_refuse(name, folder)
    known = set(map(tuple, whole.table[["user", "item"]].to_numpy(dtype=object).tolist()))
    content = FILES[name][file]
    cut = 0
    for length in range(len(content)):
        (folder / file).write_bytes(content[:length])
        data = load_or_refuse(name, folder)
        cut += data is None
        if data is not None:
            assert set(map(tuple, data.table[["user", "item"]].to_numpy(dtype=object).tolist())) <= known
    assert cut
