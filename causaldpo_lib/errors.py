"""The one error type a user of the study is meant to read, and the lookup that raises it."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

T = TypeVar("T")


class StudyError(ValueError):
    """Bad input: one sentence that names the file, line or key, and the remedy."""


def pick(table: Mapping[str, T], name: str, kind: str) -> T:
    """Return ``table[name]``; an unknown name lists the known ones.

    Raises:
        StudyError: ``name`` is not in ``table``.
    """
    if name not in table:
        close = get_close_matches(str(name), list(table), n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise StudyError(f"unknown {kind} {name!r}{hint}: choose from {', '.join(table)}")
    return table[name]
