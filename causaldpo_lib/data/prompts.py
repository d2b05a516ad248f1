"""Ready-made prompt sets of other projects: histories, candidates and targets as titles."""

from __future__ import annotations

import ast
import csv
import html
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from causaldpo_lib.errors import StudyError, pick
from causaldpo_lib.paths import data_folder, from_root

Row = dict[str, Any]


@dataclass(frozen=True)
class PromptSet:
    """A published set: its ``FORMATS`` name, and the file of each split."""

    format: str
    files: Mapping[str, str]


WINDOW = "Industrial_and_Scientific_5_2016-10-2018-11.csv"
BINARY = PromptSet("preference", {"validation": "valid.json", "test": "test.json"})

# A set's name is its folder's. "ood_test" only where the publisher calls it so.
PROMPT_SETS: dict[str, PromptSet] = {
    "causaldpo-ml-10m": PromptSet("candidates", {"validation": "ml-val.json", "ood_test": "ml-ood_test.json"}),
    "sdpo-lastfm": PromptSet("candidates", {"validation": "lastfm-val.json", "test": "lastfm-test.json"}),
    "sprec-goodreads": PromptSet("instruction", {"train": "train.json"}),
    "minionerec-amazon-industrial": PromptSet("lists", {"validation": f"valid/{WINDOW}", "test": f"test/{WINDOW}"}),
    "tallrec/book": BINARY,
    "tallrec/movie": BINARY,
}

# What names a split in the path of a file of an unpublished set; the first that is found counts.
SPLIT_WORDS = {
    **{"ood": "ood_test", "train": "train", "val": "validation", "valid": "validation", "validation": "validation"},
    "test": "test",
}


def load_prompts(name: str, folder: str | Path | None = None, *, format: str | None = None) -> pd.DataFrame:
    """Load a prompt set of ``PROMPT_SETS``, or a folder of files in one of their ``FORMATS``.

    | set | titles, terms | format |
    | --- | --- | --- |
    | causaldpo-ml-10m | MovieLens-10M, 10 candidates; GroupLens: research use | candidates |
    | sdpo-lastfm | Last.fm artists, 20 candidates; non-commercial research | candidates |
    | sprec-goodreads | UCSD Book Graph; academic use, no redistribution | instruction |
    | minionerec-amazon-industrial | Amazon Reviews 2018; research use | lists |
    | tallrec/book, tallrec/movie | Book-Crossing, MovieLens-100K; their terms | preference |

    Quirks: SPRec's is a training part, the others are validation and test parts. Titles are repaired, see `repair`.
    Where titles stand in quotes, one that contains ``", "`` cannot be told from two. Authors of books, which
    TALLRec adds, are left out. A history may contain its target, and a title twice.

    Args:
        name: the set's name, of which errors speak. With ``format`` any.
        folder: the set's own folder, by default ``$CAUSALDPO_DATA/prompts/<name>``; a relative path is taken
            from the repository's root.
        format: read the folder's files of this format instead of the published ones. A file belongs to the
            split that its path inside the folder names (train, val, valid, validation, test, ood): ``test/a.csv``,
            ``ml-ood_test.json``. One that names none, such as ``id2name.json``, is not read.

    Returns:
        one row a prompt: ``history`` (list of titles, oldest first), ``candidates`` (list of titles, empty where
        the target is to be generated; a title may be repeated), ``target`` (title), ``split``. Format
        ``preference`` adds ``disliked`` (list of titles; the history is what was liked) and ``label`` (1: the user
        likes the target, 0: not).

    Raises:
        StudyError: an unknown name or format, a missing file, or a malformed one (line or object named).
    """
    files: Mapping[Path, str]
    if format is None:
        published = pick(PROMPT_SETS, name, "prompt set")
        place = _place(name, folder)
        read, files = FORMATS[published.format], {place / file: split for split, file in published.files.items()}
    else:
        read = pick(FORMATS, format, "format of prompts")
        place = _place(name, folder)
        files = _files_by_split(place, format)
    parts = []
    for path, split in files.items():
        if not path.is_file():
            raise StudyError(
                f"{path} is missing: put the published files of prompt set {name!r} there, or set CAUSALDPO_DATA "
                f"to the folder that holds prompts/{name}/"
            )
        rows = pd.DataFrame([{"candidates": [], **row, "split": split} for row in read(path)])
        if rows.empty:
            raise StudyError(f"{path} has no prompts: restore the published file")
        parts.append(rows)
    table = pd.concat(parts, ignore_index=True)
    first = ["history", "candidates", "target", "split"]
    return table[first + [column for column in table if column not in first]]


def repair(title: str) -> str:
    """Undo HTML entities (``&amp;``), and UTF-8 bytes that were once read as ISO-8859-1 ("AmÃ©lie").

    Any other title comes back unchanged.
    """
    title = re.sub(r"&#?\w+;", lambda entity: html.unescape(entity[0]), title)
    try:
        return title.encode("iso-8859-1").decode("utf-8")
    except UnicodeError:
        return title


def _place(name: str, folder: str | Path | None) -> Path:
    return from_root(folder) if folder is not None else data_folder() / "prompts" / name


def _files_by_split(folder: Path, format: str) -> dict[Path, str]:
    suffix = ".csv" if format == "lists" else ".json"
    found = {}
    for path in sorted(folder.rglob(f"*{suffix}")):
        words = re.split(r"[^a-z]+", path.relative_to(folder).with_suffix("").as_posix().lower())
        split = next((split for word, split in SPLIT_WORDS.items() if word in words), None)
        if split:
            found[path] = split
    if not found:
        raise StudyError(
            f"{folder} has no {suffix} file for format {format!r} whose path names a split: "
            f"use one of the words {', '.join(SPLIT_WORDS)} in its name"
        )
    return found


# --- Formats: path -> rows ---


def _candidate_prompts(path: Path) -> Iterator[Row]:
    """JSON list of ``historyList`` (titles joined by ``::``), ``itemList`` (candidates), ``trueSelection`` (one of
    them)."""
    for item, where in _objects(path):
        match item:
            case {"historyList": str(history), "itemList": [*candidates], "trueSelection": str(target)} if all(
                isinstance(title, str) for title in candidates
            ):
                pass
            case _:
                raise StudyError(
                    f"{where} needs the texts 'historyList' and 'trueSelection' and the list of texts 'itemList'"
                )
        if target not in candidates:
            raise StudyError(f"{where}: the target {target!r} is not among its candidates: restore the published file")
        yield {
            "history": [repair(title) for title in history.split("::") if title],
            "candidates": [repair(title) for title in candidates],
            "target": repair(target),
        }


def _instruction_prompts(path: Path) -> Iterator[Row]:
    """JSON list of ``instruction``, ``input`` (a sentence around quoted titles), ``output`` (a quoted title)."""
    for item, where in _objects(path):
        sentence, output = _input_and_output(item, where)
        body, titles = re.fullmatch(r'[^"]*(".*")[^"]*', sentence, re.DOTALL), _quoted(output.strip())
        if body is None or len(titles) != 1:
            raise StudyError(f"{where} needs quoted titles in 'input' and one as 'output': restore the published file")
        yield {"history": [repair(title) for title in _quoted(body[1])], "target": repair(titles[0])}


ASKED = re.compile(
    r"User Preference: ?(?P<liked>.*)\nUser Unpreference: ?(?P<disliked>.*)\n"
    r'Whether the user will like the target \w+ "(?P<target>.+)"\?',
    re.DOTALL,
)
ANSWERS = {"Yes.": 1, "No.": 0}


def _preference_prompts(path: Path) -> Iterator[Row]:
    """JSON list of ``instruction``, ``input`` (liked titles, disliked titles, "Whether the user will like the
    target ..."; a book's quoted title is followed by " written by" and its author), ``output`` ("Yes." or "No.")."""
    for item, where in _objects(path):
        sentence, output = _input_and_output(item, where)
        asked = ASKED.fullmatch(sentence.strip())
        if asked is None or output.strip() not in ANSWERS:
            raise StudyError(
                f"{where} needs the lines 'User Preference: ', 'User Unpreference: ' and 'Whether the user will like "
                "the target' in 'input', and 'Yes.' or 'No.' as 'output': restore the published file"
            )
        target = asked["target"]
        titles = {
            "history": _listed(asked["liked"].strip()),
            "disliked": _listed(asked["disliked"].strip()),
            "target": _listed(target if WRITTEN in target else f'"{target}"'),
        }
        for part, found in titles.items():
            if found is None or (part == "target" and len(found) > 1):
                raise StudyError(f"{where}: the {part} is not in quoted titles: restore the published file")
        yield {**titles, "target": titles["target"][0], "label": ANSWERS[output.strip()]}


TITLES, TARGET = "history_item_title", "item_title"


def _list_prompts(path: Path) -> Iterator[Row]:
    """CSV with header: ``history_item_title`` (a Python literal, list of texts), ``item_title``; others are not
    read."""
    with _opened(path) as file, warnings.catch_warnings():
        for kind in (DeprecationWarning, SyntaxWarning):  # of a backslash in a literal, which Python leaves as it is
            warnings.simplefilter("ignore", kind)
        rows = csv.DictReader(file, strict=True)
        try:
            names = rows.fieldnames or []
            if missing := [name for name in (TITLES, TARGET) if name not in names]:
                raise StudyError(f"{path}:1: no column {missing[0]!r}: restore the header line")
            for row in rows:
                where = f"{path}:{rows.line_num}"
                if None in row or None in row.values():
                    raise StudyError(f"{where}: not {len(names)} fields as the header has: restore the published file")
                history = _literal(row[TITLES])
                if history is None or not row[TARGET].strip():
                    raise StudyError(
                        f"{where}: {TITLES} is not a list of texts, or {TARGET} is empty: restore the published file"
                    )
                yield {"history": [repair(title) for title in history], "target": repair(row[TARGET])}
        except csv.Error as problem:
            line = rows.reader.line_num  # that of the file, which `rows` takes over only after a sound row
            raise StudyError(f"{path}:{line}: not CSV ({problem}): restore the published file") from problem
        except UnicodeDecodeError as problem:
            raise StudyError(f"{path}: not UTF-8 text: restore the published file") from problem


FORMATS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "candidates": _candidate_prompts,
    "instruction": _instruction_prompts,
    "preference": _preference_prompts,
    "lists": _list_prompts,
}


# --- Parts of formats ---


def _opened(path: Path) -> Any:
    return path.open(encoding="utf-8-sig", newline="")


def _objects(path: Path) -> Iterator[tuple[Any, str]]:
    """The objects of a JSON list, each with its place for an error."""
    try:
        with _opened(path) as file:
            objects = json.load(file)
    except json.JSONDecodeError as problem:
        raise StudyError(
            f"{path}:{problem.lineno}: not complete JSON ({problem.msg}): restore the published file"
        ) from problem
    except UnicodeDecodeError as problem:
        raise StudyError(f"{path}: not UTF-8 text: restore the published file") from problem
    except (RecursionError, ValueError) as problem:  # nested, or a number of digits, beyond all measure
        raise StudyError(f"{path}: no list of prompts ({problem}): restore the published file") from problem
    if not isinstance(objects, list):
        raise StudyError(f"{path}: expected a list of prompts: restore the published file")
    for number, item in enumerate(objects, start=1):
        yield item, f"{path}: object {number}"


def _input_and_output(item: Any, where: str) -> tuple[str, str]:
    match item:
        case {"input": str(sentence), "output": str(output)}:
            return sentence, output
    raise StudyError(f"{where} needs the texts 'input' and 'output': restore the published file")


def _quoted(text: str) -> list[str]:
    """Titles of ``"A", "B"``, where quotes inside a title do no harm; none if the text is no such list."""
    if len(text) < 3 or text[0] != '"' or text[-1] != '"':
        return []
    titles = text[1:-1].split('", "')
    return titles if all(titles) else []


WRITTEN = '" written by '


def _listed(text: str) -> list[str] | None:
    """Repaired titles of ``"A", "B"`` or ``"A" written by X, "B" written by Y``, or None if it is neither."""
    if not text:
        return []
    if WRITTEN not in text:
        titles = _quoted(text)
    else:
        parts = [re.fullmatch(rf'"(.+){WRITTEN}.*', part, re.DOTALL) for part in re.split(r', (?=")', text)]
        titles = [part[1] for part in parts if part] if all(parts) else []
    return [repair(title) for title in titles] or None


def _literal(text: str) -> list[str] | None:
    """The list of texts that a Python literal is, or None; nothing in it is evaluated."""
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    return found if isinstance(found, list) and all(isinstance(title, str) and title for title in found) else None
