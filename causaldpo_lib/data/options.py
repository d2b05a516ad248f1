"""Options of datasets and shifts: the keyword arguments of a function, checked against its own signature."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from causaldpo_lib.errors import StudyError, pick


def options_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Names and defaults of the keyword-only arguments of ``function``."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def check_options(given: Mapping[str, Any], known: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Return ``given``, every name found in ``known`` (name -> default) and every value of its default's
    kind.

    Whole numbers are turned into floats where the default is a float, lists into tuples where it is a tuple.

    Raises:
        StudyError: an unknown name, or a value of another kind (YAML reads ``1e-5`` as text).
    """
    if given and not known:
        raise StudyError(f"{owner} takes no options: remove {', '.join(map(repr, given))}")
    return {
        name: _check_value(value, pick(known, name, f"option of {owner}"), f"option {name!r} of {owner}")
        for name, value in given.items()
    }


def _check_value(value: Any, default: Any, what: str) -> Any:
    match default:
        case bool():
            accepted, kind = isinstance(value, bool), "true or false"
        case int():
            accepted, kind = isinstance(value, int) and not isinstance(value, bool), "a whole number"
        case float():
            accepted, kind = isinstance(value, int | float) and not isinstance(value, bool), "a number"
        case str():
            accepted, kind = isinstance(value, str), "a name"
        case tuple():
            accepted, kind = isinstance(value, Sequence) and not isinstance(value, str), "a list"
        case _:
            raise TypeError(f"no rule to check {what} against its default {default!r}")
    if not accepted:
        raise StudyError(f"{what} must be {kind} such as {default}, not {value!r}")
    return type(default)(value)
