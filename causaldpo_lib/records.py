"""Files as they are left and found: small JSON written whole or not at all, tables, and where a run came from."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from causaldpo_lib.errors import StudyError
from causaldpo_lib.paths import NOTEBOOKS, ROOT, from_root

PACKAGES = ("torch", "transformers", "trl", "peft", "tokenizers", "numpy", "pandas", "scikit-learn")


def shown(path: Path) -> str:
    """A path as people and records should see it: relative to the repository's root where it lies inside."""
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file.

    Raises:
        StudyError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError(f"{shown(path)} does not exist: run its notebook first") from None
    except ValueError:
        remedy = "delete its folder and run its notebook again"
        raise StudyError(f"{shown(path)} is damaged: {remedy}") from None


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write beside, then rename: a reader sees the old file or the whole new one, never a part."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(draft, path)
    return path


def plain(value: Any) -> Any:
    """A JSON value: scalars of numpy and torch become Python's, NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that make the numbers; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """The working tree's commit, with ``+`` when tracked files differ from it; None outside git."""
    git = ("git", "-C", str(ROOT))
    try:
        head, changed = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def folder_with(file: str, path: str | Path, command: str) -> Path:
    """The folder at ``path`` that holds ``file``; a relative path is taken from ``notebooks/``, else from the root.

    Raises:
        StudyError: neither holds it; ``command`` makes it.
    """
    for folder in (NOTEBOOKS / path, from_root(path)):
        if (folder / file).exists():
            return folder.resolve()
    raise StudyError(f"no {file} in {str(path)!r}: run `{command}` or give another folder")


def write_tables(folder: Path, tables: Mapping[str, Any], digits: int = 6) -> list[Path]:
    """Write data frames as ``<name>.csv`` with so many significant digits; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.csv" for name in tables]
    for path, table in zip(paths, tables.values(), strict=True):
        table.to_csv(path, index=False, float_format=f"%.{digits}g")
    return paths


def read_table(file: Path, remedy: str) -> Any:
    """A csv file as a data frame.

    Raises:
        StudyError: it is missing or cannot be read; ``remedy`` ends the sentence.
    """
    import pandas as pd  # which planning a study does not need

    try:
        return pd.read_csv(file)
    except (OSError, ValueError) as error:
        raise StudyError(f"{shown(file)} cannot be read ({error}): {remedy}") from None
