"""Digests of source code, by which a change re-runs the results that depend on it and no others.

What a function depends on is read from the code: from its definition on, every top-level definition of this
library that it names, one through another and across modules. So editing ``plots.py`` redraws and does not
retrain, and nobody has to keep a list. Comments, docstrings and layout do not count. A name is followed
wherever it stands, so the reading errs on the side of running too much; only names built at run time escape.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from causaldpo_lib.errors import StudyError

PACKAGE = Path(__file__).resolve().parent
# These carry messages, folders and parameters, never a number of a result.
PLUMBING = ("", "costs", "errors", "parameters", "paths", "pipeline", "records", "run", "sources", "study", "workflow")


def digest(value: Any) -> str:
    """sha256 over canonical JSON: the order of keys and 1 versus 1.0 make no difference."""
    return hashlib.sha256(json.dumps(canonical(value), sort_keys=True).encode()).hexdigest()


def canonical(value: Any) -> Any:
    """The value with whole floats as ints and tuples as lists: equal configurations become equal texts."""
    if isinstance(value, Mapping):
        return {str(key): canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def function_digest(module: str, function: str) -> str:
    """Digest of a library function and of every library definition that it reaches."""
    return _digest(reached([(module, function)]))


def notebook_digest(notebook: Path, library: bool = False) -> str:
    """Digest of a notebook's code cells in order; with ``library``, also of the definitions they reach."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    if not library:
        return digest(sources)
    lines = [line for line in "\n".join(sources).splitlines() if not line.lstrip().startswith(("%", "!"))]
    code = _read("\n".join(lines))
    return digest([sources, _digest(reached(use for use in _named(code, code.tree) if use[0]))])


def reached(start: Iterable[tuple[str, str]]) -> dict[tuple[str, str], list[ast.stmt]]:
    """(module, name) -> its statements, for every library definition reached from ``start``.

    The name "" holds a module's loose statements, which run on import whatever is used of it.
    """
    found: dict[tuple[str, str], list[ast.stmt]] = {}
    todo, seen = list(start), set()
    while todo:
        module, name = todo.pop()
        if (module, name) in seen or module in PLUMBING:
            continue
        seen.add((module, name))
        code = _module(module)
        if name == "*":
            todo += [(module, each) for each in [*code.definitions, *code.imports]]
        elif name in code.imports:
            target, inner = code.imports[name]
            todo.append((target, inner or "*"))
        elif name in code.definitions:
            found[module, name] = code.definitions[name]
            uses = [use for node in found[module, name] for use in _named(code, node)]
            todo += [(module, ""), *((target or module, inner) for target, inner in uses)]
        elif _file(f"{module}.{name}").exists():
            todo.append((f"{module}.{name}", "*"))
    return found


@dataclass
class _Code:
    """A module taken apart; ``imports`` maps a name to (library module, name in it or "" for the module)."""

    tree: ast.Module
    definitions: dict[str, list[ast.stmt]] = field(default_factory=lambda: {"": []})
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)


@lru_cache
def _module(name: str) -> _Code:
    return _read(_file(name).read_text(encoding="utf-8"))


def _file(name: str) -> Path:
    path = PACKAGE.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _read(text: str) -> _Code:
    """Take a module's text apart.

    Raises:
        StudyError: an import of this library in a form that is not followed, so that a digest would not see it change.
    """
    code = _Code(ast.parse(text))
    for node in ast.walk(code.tree):
        _drop_docstring(node)
        if isinstance(node, ast.ImportFrom) and node.level:
            raise StudyError(f"line {node.lineno}: a relative import is not followed: import from {PACKAGE.name}")
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
            module = (node.module or "").partition(".")[2]
            for alias in node.names:
                inner = f"{module}.{alias.name}".strip(".")
                is_module = _file(inner).exists()
                code.imports[alias.asname or alias.name] = (inner, "") if is_module else (module, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith(f"{PACKAGE.name}.") and not alias.asname:
                    raise StudyError(
                        f"line {node.lineno}: import {alias.name} is not followed: give it a name with `as`"
                    )
                if alias.name.split(".")[0] == PACKAGE.name:
                    code.imports[alias.asname or PACKAGE.name] = (alias.name.partition(".")[2], "")
    for node in code.tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            code.definitions.setdefault(node.name, []).append(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for name in {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}:
                code.definitions.setdefault(name, []).append(node)
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            code.definitions[""].append(node)
    return code


def _named(code: _Code, tree: ast.AST) -> list[tuple[str, str]]:
    """(module, name) of all that ``tree``, a part of ``code``, names of this library; "" is its own module.

    ``ranking.build`` names one definition of ``ranking``; the module alone, handed on, stands for all of it.
    """
    attributes = {id(node.value): node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    uses = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in code.imports:
            target, inner = code.imports[node.id]
            uses.append((target, inner or attributes.get(id(node), "*")))
        elif isinstance(node, ast.Name) and node.id in code.definitions:
            uses.append(("", node.id))
    return uses


def _drop_docstring(node: ast.AST) -> None:
    if isinstance(node, ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.body:
        first = node.body[0]
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            node.body = node.body[1:]


def _digest(found: Mapping[tuple[str, str], list[ast.stmt]]) -> str:
    return digest([[*key, *(_plain(node) for node in found[key])] for key in sorted(found)])


def _plain(node: Any) -> Any:
    """A syntax tree as lists, without empty fields: every version of Python adds some, and shows others."""
    if isinstance(node, list):
        return [_plain(each) for each in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [[name, _plain(value)] for name, value in ast.iter_fields(node) if value is not None and value != []]
    return [type(node).__name__, *fields]
