"""Publishers' text files: read at once by polars or, if that fails, line by line to name the first bad line."""

from __future__ import annotations

import csv
import gzip
import html
import json
import re
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from causaldpo_lib.data.download import ARCHIVES, BY_HAND, obtain
from causaldpo_lib.errors import StudyError

KINDS = {int: pl.Int64, float: pl.Float64, str: pl.String}
WORDS = {int: "a whole number", float: "a number", str: "text"}
WHOLE = re.compile(r"[ \t]*[+-]?[0-9]{1,19}")
STAND_IN = "\x1f"  # one character in the place of a separator of two, which polars does not take
CUTTABLE = 10**8  # seconds since 1970 have so much or more since 1973, 9 digits or 10: fewer are a part of one
UNCUT = "restore the file, or end the last line with a newline if it is whole"  # for what `cut_short` finds
ESCAPED = re.compile(r'\\(["\\])')


@dataclass(frozen=True)
class Layout:
    """How a text file of rows is cut.

    Attributes:
        fields: name -> int, float or str; without header all fields in order, with one those to read.
        separator: one character or, as MovieLens has it, ``::``.
        header: the first line names the fields.
        quoted: fields may stand in double quotes.
        escaped: inside quotes, a backslash stands before a quote or a backslash.
        encoding: ``utf-8``, or ``iso-8859-1``; a file of the latter that is valid UTF-8 is read as that, since
            it has been converted.
        lacking: so many fields may be missing at the end of a row, and come as null.
    """

    fields: Mapping[str, type]
    separator: str
    header: bool = False
    quoted: bool = False
    escaped: bool = False
    encoding: str = "utf-8"
    lacking: int = 0


def existing(path: Path, remedy: str) -> Path:
    """``path``, if it is a file with something in it.

    Raises:
        StudyError: it is missing (the remedy tells what to do) or empty.
    """
    if not path.is_file():
        raise StudyError(f"{path} is missing: {remedy}")
    if path.stat().st_size == 0:
        raise StudyError(f"{path} is empty: restore the published file")
    return path


def published(name: str, folder: Path, *files: str) -> list[Path]:
    """Paths of the files of a publisher's dataset, which is downloaded if there is no ``folder`` and its terms allow.

    Raises:
        StudyError: the download failed, a person has to fetch the dataset, or a file is missing or empty.
    """
    if not folder.exists():
        obtain(name, folder)
    again = BY_HAND.get(name) or (
        f"restore it, remove the folder {folder} to have it downloaded again from {ARCHIVES[name].url}"
    )
    remedy = f"{again}, or set CAUSALDPO_DATA to another folder of data"
    return [existing(folder / file, remedy) for file in files]


def read_rows(path: Path, layout: Layout) -> pl.DataFrame:
    """Read a file strictly: as many fields in every row as there are, numbers where a field is one.

    Blank lines are skipped. An empty text comes as ``""``.

    Raises:
        StudyError: with file and line, and what is wrong there.
    """
    start, names = _header(path, layout) if layout.header else (0, list(layout.fields))
    for name in layout.fields:
        if name not in names:
            raise StudyError(f"{path}:{start}: no column {name!r}, only {listed(names)}: restore the header line")
    if len(set(names)) < len(names):
        raise StudyError(f"{path}:{start}: a column name is repeated in {listed(names)}: rename one")
    schema = {name: KINDS[layout.fields.get(name, str)] for name in names}
    separator, source = layout.separator, _source(path, layout)
    if len(separator) == 2:
        # Between two separators of one character each stands an empty column, which costs one bit a row.
        schema, separator = (_doubled(schema), separator[0]) if source is path else (schema, STAND_IN)
    try:
        rows = pl.read_csv(
            source,
            has_header=False,
            skip_lines=start,
            schema=schema,
            separator=separator,
            quote_char='"' if layout.quoted else None,
            missing_columns="insert",
            raise_if_empty=False,
            glob=False,
        )
    # Polars does not name the line: look for it now. It panics where a file ends in a quote that opens a field.
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as problem:
        panic = isinstance(problem, pl.exceptions.PanicException)
        reason = "unfinished quotes" if panic else str(problem).splitlines()[0]
        raise StudyError(_first_bad(path, layout, names) or f"{path}: {reason}: restore the file") from problem
    missing = dict(zip(rows.columns, rows.null_count().row(0), strict=True))
    if missing[names[0]]:
        rows = rows.filter(~pl.all_horizontal(pl.col(names).is_null()))
        missing = dict(zip(rows.columns, rows.null_count().row(0), strict=True))
    if rows.is_empty():
        raise StudyError(f"{path} has no rows: restore the published file")
    suspect = {names[-1 - layout.lacking], *(name for name, kind in layout.fields.items() if kind is not str)}
    filled = [name for name in schema if name not in names and missing[name] < len(rows)]
    if filled or any(missing[name] for name in suspect):
        bad = _first_bad(path, layout, names)
        if bad:
            raise StudyError(bad)
    complete = names[: len(names) - layout.lacking]
    texts = [name for name in layout.fields if schema[name] == pl.String and name in complete]
    return rows.select(*layout.fields).with_columns(pl.col(texts).fill_null(""))


def header_of(path: Path, layout: Layout) -> list[str]:
    """The names in the first line of a file that is not blank."""
    return _header(path, layout)[1]


def listed(names: Iterable[str]) -> str:
    """Names in a sentence, on one line whatever is in them."""
    return ", ".join(" ".join(name.split()) for name in names)


def read_json_lines(path: Path, fields: Mapping[str, type], optional: Mapping[str, type] | None = None) -> pl.DataFrame:
    """Read a file of one JSON object a line, also gzipped.

    Args:
        fields: name -> int, float or str; every object has them.
        optional: more of them, null where an object lacks one; a list under a str comes as its JSON text.

    Raises:
        StudyError: with file and line, and what is wrong there.
    """
    schema = {name: KINDS[kind] for name, kind in {**fields, **(optional or {})}.items()}
    try:
        rows = pl.read_ndjson(path, schema=schema)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError) as problem:
        reason = str(problem).splitlines()[0]
        raise StudyError(_first_bad_object(path, fields) or f"{path}: {reason}: restore the file") from problem
    if rows.is_empty():
        raise StudyError(f"{path} has no objects: restore the published file")
    if any(rows[name].null_count() for name in fields):
        raise StudyError(_first_bad_object(path, fields) or f"{path}: a field is null: restore the file")
    return rows


def refuse(rows: pl.DataFrame, path: Path, layout: Layout | None, problems: Mapping[str, pl.Expr]) -> None:
    """Raise at the first row of which one of ``problems`` (sentence with ``{fields}`` -> mask) is true.

    Args:
        layout: of the file, to find the line of a row; None where every line is a row.

    Raises:
        StudyError: with file and line.
    """
    found = rows.select(mask.fill_null(True).arg_true().first().alias(text) for text, mask in problems.items())
    for problem, row in found.row(0, named=True).items():
        if row is not None:
            where = f"{path}:{_line_of_row(path, layout, row)}"
            raise StudyError(f"{where}: {problem.format(**rows.row(row, named=True))}")


def cut_short(rows: pl.DataFrame, path: Path, last: str) -> pl.Expr:
    """True for a last row without line end whose number in column ``last`` has fewer digits than all others.

    Only where all others are as long as seconds since 1970: of small numbers (12, 11, 10, 9) any may have fewer.
    """
    with path.open("rb") as handle:
        handle.seek(-1, 2)
        ended = handle.read() in (b"\n", b"\r")
    others = rows[last].head(-1).abs().min()
    if ended or others is None or others < CUTTABLE or len(str(abs(rows[last][-1]))) >= len(str(others)):
        return pl.lit(False)
    return pl.int_range(pl.len()) == pl.len() - 1


def outside(column: str, lowest: float, highest: float) -> dict[str, pl.Expr]:
    """The problem of a rating outside its scale, for `refuse`."""
    problem = f"{column} {{{column}}} is outside {lowest:g} to {highest:g}: correct or remove the line"
    return {problem: ~pl.col(column).is_between(lowest, highest)}


def unescaped(titles: pl.Series) -> pl.Series:
    """Titles with HTML entities (``&amp;``, ``&#39;``) replaced by what they stand for."""
    return titles.replace(
        {
            title: re.sub(r"&#?\w+;", lambda entity: html.unescape(entity[0]), title)
            for title in titles.unique().drop_nulls()
            if "&" in title
        }
    )


def joined(lists: pl.Series) -> pl.Series:
    """Lists of names, as JSON texts or as texts with commas, in one form: names joined by ``|``."""

    def one(text: str) -> str:
        try:
            names = json.loads(text) if text.startswith("[") else text.split(",")
        except (ValueError, RecursionError):
            names = [text]
        return "|".join(str(name).strip() for name in names)

    return lists.fill_null("").replace({text: one(text) for text in lists.unique().drop_nulls()})


def seconds(column: str) -> pl.Expr:
    """Whole Unix seconds from ISO 8601 text in UTC (date, or date and time), null where it is neither."""
    plain = pl.col(column).str.replace(r"(\.\d+)?(Z|\+00:?00)?$", "").str.replace("T", " ", literal=True)
    forms = ("%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M", "%Y-%m-%d")
    return pl.coalesce(plain.str.to_datetime(form, strict=False, time_unit="us") for form in forms).dt.epoch("s")


def warn_of_subset(found: Mapping[str, int], releases: Mapping[str, Mapping[str, int]], folder: Path) -> None:
    """Warn, with counts, when a folder does not hold one of the publisher's releases (name -> counts) whole."""
    if dict(found) in map(dict, releases.values()):
        return
    if len(releases) == 1:
        (name, whole), *_ = releases.items()
        counts = ", ".join(f"{found[key]:,} of {count:,} {key}" for key, count in whole.items())
        known = f"the published {name}"
    else:
        counts = ", ".join(f"{count:,} {key}" for key, count in found.items())
        known = f"one of the published {', '.join(releases)}"
    warnings.warn(f"{folder} is not {known}, it holds {counts}: results do not compare", stacklevel=4)


def _header(path: Path, layout: Layout) -> tuple[int, list[str]]:
    """(number of its line, names)."""
    for number, cells in _cells(path, layout):
        return number, cells
    raise StudyError(f"{path} has no rows: restore the published file")


def _doubled(schema: Mapping[str, pl.DataType]) -> dict[str, pl.DataType]:
    columns = {}
    for number, (name, kind) in enumerate(schema.items()):
        columns |= {f"empty {number}": pl.Boolean} if number else {}
        columns[name] = kind
    return columns


def _source(path: Path, layout: Layout) -> Path | bytes:
    """What polars can read: the file itself or, where text has to be changed first, its bytes as UTF-8."""
    doubled = len(layout.separator) == 2 and str in layout.fields.values()
    if not doubled and not layout.escaped and layout.encoding == "utf-8":
        return path
    data = path.read_bytes()
    if layout.encoding != "utf-8" and not _is_utf8(data):
        data = data.decode(layout.encoding).encode()
    if doubled:
        data = data.replace(layout.separator.encode(), STAND_IN.encode())
    return re.sub(rb'\\(["\\])', lambda pair: _unescape(pair[1]), data) if layout.escaped else data


def _unescape(character: bytes) -> bytes:
    return b'""' if character == b'"' else character


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _lines(path: Path, layout: Layout | None) -> Iterator[str]:
    """Lines as text, with their ends."""
    encoding = layout.encoding if layout else "utf-8"
    if encoding != "utf-8" and _is_utf8(path.read_bytes()):
        encoding = "utf-8"
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as handle:
            for number, line in enumerate(handle, start=1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 and encoding == "utf-8" else encoding)
                except UnicodeDecodeError as problem:
                    raise StudyError(
                        f"{path}:{number}: not {encoding.upper()} text: restore the file or convert it"
                    ) from problem
    except (EOFError, gzip.BadGzipFile, zlib.error) as problem:
        raise StudyError(f"{path}: damaged or cut gzip file ({problem}): fetch it again") from problem


def _cells(path: Path, layout: Layout) -> Iterator[tuple[int, list[str]]]:
    """(number of the first line, fields) of every row that is not blank."""
    if not layout.quoted:
        for number, line in enumerate(_lines(path, layout), start=1):
            cells = line.rstrip("\r\n").split(layout.separator)
            if any(cells):
                yield number, cells
        return
    lines = _lines(path, layout)
    if layout.escaped:
        lines = (ESCAPED.sub(lambda pair: _unescape(pair[1].encode()).decode(), line) for line in lines)
    reader = csv.reader(lines, delimiter=layout.separator)
    number = 1
    try:
        for cells in reader:
            if any(cells):
                yield number, cells
            number = reader.line_num + 1
    except csv.Error as problem:
        raise StudyError(f"{path}:{number}: {problem}: restore the line") from problem


def _first_bad(path: Path, layout: Layout, names: list[str]) -> str | None:
    rows = _cells(path, layout)
    if layout.header:
        next(rows)
    ended = path.read_bytes()[-1:] in (b"\n", b"\r")
    previous: str | None = None
    for number, cells in rows:
        if previous:
            return previous
        previous = _problem(cells, layout, names)
        previous = previous and f"{path}:{number}: {previous}"
    if previous and not ended:  # the bad row is the last one
        head, _, remedy = previous.rpartition(": ")
        return f"{head} (the last line, truncated): {remedy}"
    return previous


def _problem(cells: list[str], layout: Layout, names: list[str]) -> str | None:
    if not len(names) - layout.lacking <= len(cells) <= len(names):
        return f"{len(cells)} fields instead of {len(names)}: restore the file"
    for cell, name in zip(cells, names, strict=False):
        kind = layout.fields.get(name, str)
        if not _is(kind, cell):
            return f"{name} {cell!r} is not {WORDS[kind]}: correct or remove the line"
    return None


def _is(kind: type, cell: str) -> bool:
    if kind is int:
        return WHOLE.fullmatch(cell) is not None and abs(int(cell)) < 2**63
    try:
        kind(cell)
    except ValueError:
        return False
    return True


def _first_bad_object(path: Path, fields: Mapping[str, type]) -> str | None:
    for number, line in enumerate(_lines(path, None), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as problem:  # not JSON, or a number or nesting beyond Python's limits
            cut = "" if line.endswith("\n") else " (the last line, truncated)"
            return f"{where}: not complete JSON, {getattr(problem, 'msg', problem)}{cut}: restore the file"
        if not isinstance(value, dict):
            return f"{where}: not a JSON object: restore the file, one object a line"
        for name, kind in fields.items():
            if value.get(name) is None:
                return f"{where}: no field {name!r}, only {listed(value)}: restore the file"
            accepted = (int, float) if kind is float else (kind,)
            if not isinstance(value[name], accepted) or isinstance(value[name], bool):
                return f"{where}: {name} {value[name]!r} is not {WORDS[kind]}: correct or remove the line"
    return None


def _line_of_row(path: Path, layout: Layout | None, row: int) -> int:
    """Line number (from 1) of the row-th (from 0) row; in a Parquet file, which has no lines, of the row itself."""
    if path.suffix == ".parquet":
        return row + 1
    if layout is None:
        filled = (number for number, line in enumerate(_lines(path, None), start=1) if line.strip())
    else:
        filled = (number for number, _ in _cells(path, layout))
        row += layout.header
    return next(number for count, number in enumerate(filled) if count == row)
