"""Ready-made prompt sets of other projects: histories, candidates and targets as titles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd

from causaldpo_lib.errors import StudyError, pick
from causaldpo_lib.paths import data_folder, from_root

# Split of each file; "ood_test" only where the publisher calls it so. Nobody released the training part.
PROMPT_SETS: dict[str, dict[str, str]] = {
    "causaldpo-ml-10m": {"validation": "ml-val.json", "ood_test": "ml-ood_test.json"},
    "sdpo-lastfm": {"validation": "lastfm-val.json", "test": "lastfm-test.json"},
}


def load_prompts(name: str, folder: str | Path | None = None) -> pd.DataFrame:
    """Load a prompt set of ``PROMPT_SETS``.

    Format: a JSON list of objects ``historyList`` (titles joined by ``::``, oldest first), ``itemList``
    (candidates) and ``trueSelection`` (one of the candidates). Doubly encoded titles ("AmÃ©lie") are
    repaired.

    Args:
        name: ``causaldpo-ml-10m`` (MovieLens-10M, 10 candidates; GroupLens' terms: research use) or
            ``sdpo-lastfm`` (Last.fm artists, 20 candidates; non-commercial research).
        folder: the set's own folder, by default ``$CAUSALDPO_DATA/prompts/<name>``.

    Returns:
        one row a prompt: ``history`` (list of titles), ``candidates`` (list of titles; a title may be
        repeated), ``target`` (title), ``split``.

    Raises:
        StudyError: an unknown name, a missing file, or a malformed one (line or object named).
    """
    files = pick(PROMPT_SETS, name, "prompt set")
    place = from_root(folder) if folder is not None else data_folder() / "prompts" / name
    parts = [_read(place / file, name).assign(split=split) for split, file in files.items()]
    return pd.concat(parts, ignore_index=True)


def repair(title: str) -> str:
    """Undo UTF-8 bytes that were once read as ISO-8859-1; any other title comes back unchanged."""
    try:
        return title.encode("iso-8859-1").decode("utf-8")
    except UnicodeError:
        return title


def _read(path: Path, name: str) -> pd.DataFrame:
    if not path.is_file():
        raise StudyError(
            f"{path} is missing: put the published files of prompt set {name!r} there, or set CAUSALDPO_DATA "
            f"to the folder that holds prompts/{name}/"
        )
    try:
        objects = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as problem:
        raise StudyError(
            f"{path}:{problem.lineno}: not complete JSON ({problem.msg}): restore the published file"
        ) from problem
    except UnicodeDecodeError as problem:
        raise StudyError(f"{path}: not UTF-8 text: restore the published file") from problem
    if not isinstance(objects, list) or not objects:
        raise StudyError(f"{path}: expected a list of prompts: restore the published file")
    rows = [_row(item, f"{path}: object {number}") for number, item in enumerate(objects, start=1)]
    return pd.DataFrame(rows, columns=["history", "candidates", "target"])


def _row(item: Any, where: str) -> tuple[list[str], list[str], str]:
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
        raise StudyError(f"{where}: the target {target!r} is not among its candidates")
    titles = [repair(title) for title in history.split("::") if title]
    return titles, [repair(title) for title in candidates], repair(target)
