"""Parameters of notebooks: their declared defaults, the check of overrides against them, safe YAML."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from causaldpo_lib.errors import StudyError


def declared_in(notebook: Path) -> dict[str, Any]:
    """The defaults of a notebook's cell tagged ``parameters``, read as literals: nothing is executed."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError):
        raise StudyError(f"{notebook} is missing or not a notebook: give the path of one") from None
    tagged = [cell for cell in cells if "parameters" in cell.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise StudyError(f"{notebook.name} has {len(tagged)} cells tagged 'parameters': tag exactly one")
    try:
        lines = ast.parse("".join(tagged[0]["source"])).body
        return {line.targets[0].id: ast.literal_eval(line.value) for line in lines}
    except (SyntaxError, ValueError, AttributeError):
        remedy = "write only lines `name = literal` in it"
        raise StudyError(f"{notebook.name}: its parameters cell cannot be read: {remedy}") from None


def check(defaults: Mapping[str, Any], overrides: Mapping[str, Any], source: str) -> dict[str, Any]:
    """``overrides`` as the notebook should get them, each checked by name and by the kind of its default.

    An int where a float is declared becomes a float, so that 1 and 1.0 are one configuration. Options
    (dictionaries) replace the default ones as a whole.

    Raises:
        StudyError: an unknown key, or a value of another kind; the sentence opens with ``source``.
    """
    for key in overrides:
        if key not in defaults:
            raise unknown_key(source, "parameter", key, defaults)
    return {key: _same_kind(defaults[key], value, key, source) for key, value in overrides.items()}


def unknown_key(source: str, kind: str, key: object, known: Iterable[str]) -> StudyError:
    """The error for a key that ``source`` should not have, with the nearest known one."""
    known = list(known)
    close = get_close_matches(str(key), known, n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return StudyError(f"{source}: unknown {kind} {key!r}{hint}: choose from {', '.join(known)}")


def _same_kind(default: Any, value: Any, key: str, source: str) -> Any:
    """``value`` if it is of the default's kind; inside options, where nothing is declared, that is None."""
    if isinstance(value, str) and not isinstance(default, str) and _is_number(value):
        remedy = f"write {_yaml_number(value)}, without quotes"
        raise StudyError(f"{source}: {key} is the text {value!r}, not a number: {remedy}")
    if isinstance(value, float) and not math.isfinite(value):
        raise StudyError(f"{source}: {key} is {value}: give a finite number")
    if isinstance(value, Mapping) and isinstance(default, dict | None):
        return {str(name): _same_kind(None, item, f"{key}.{name}", source) for name, item in value.items()}
    if isinstance(value, list | tuple) and isinstance(default, list | None):
        return [_same_kind(None, item, key, source) for item in value]
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if default is not None and type(value) is not type(default):
        remedy = f"give a value of kind {type(default).__name__}, such as {default!r}"
        raise StudyError(f"{source}: {key} is {value!r}, of kind {type(value).__name__}: {remedy}")
    return value


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", text.strip().lower()) is not None


def _yaml_number(text: str) -> str:
    """The number as YAML reads one: with a point in the mantissa (1e-05 is a text to it)."""
    mantissa, _, exponent = text.strip().lower().partition("e")
    if not exponent:
        return mantissa
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{int(exponent):+d}"


def from_text(text: str, default: Any) -> Any:
    """A value of the command line, read by the kind of its default: text stays text, 1e-05 is a number."""
    if isinstance(default, str):
        return text
    for read in (ast.literal_eval, yaml.safe_load):
        try:
            return read(text)
        except (SyntaxError, ValueError, TypeError, yaml.YAMLError):  # TypeError: a list as a key
            continue
    return text


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds one mapping (an empty file holds an empty one); a key given twice is an error.

    Raises:
        StudyError: no such file, not YAML (file and line named), a repeated key, or no mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError:
        raise StudyError(f"{path} cannot be read: give the path of a YAML file") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise StudyError(f"{path}, line {line}: not valid YAML ({error.problem}): mend this line") from None
    except ValueError:
        raise StudyError(f"{path} is not a UTF-8 text: give the path of a YAML file") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise StudyError(f"{path} must hold lines `key: value`, not a {type(content).__name__}")
    return content


class _UniqueKeys(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; here the second one is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key is a list or a mapping instead of a name"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            if key.value in seen:
                problem = f"key {key.value!r} is given twice"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)
