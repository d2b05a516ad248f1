"""pyproject.toml is the single source of dependencies: the other files, and the imports, agree with it."""

from __future__ import annotations

import ast
import json
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
# The packages that the study's owner named, and that a conda user therefore finds by name in environment.yml.
OWNERS = {
    "jupyterlab",
    "papermill",
    "torch",
    "transformers",
    "peft",
    "trl",
    "umap-learn",
    "scikit-learn",
    "seaborn",
    "nbval",
}
ACCELERATOR = re.compile(r"nvidia|cuda|triton|rocm")
INSTALLERS = {"pip", "setuptools", "wheel"}  # tools of the virtual environment itself

Requirements = dict[str, Requirement]


def by_name(lines: Iterable[str]) -> Requirements:
    """Requirements by canonical name; a name that stands twice is an error."""
    parsed = [Requirement(line) for line in lines]
    table = {canonicalize_name(requirement.name): requirement for requirement in parsed}
    assert len(table) == len(parsed), "a package is named twice"
    return table


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]


@pytest.fixture(scope="module")
def core(project: dict) -> Requirements:
    return by_name(project["dependencies"])


@pytest.fixture(scope="module")
def extras(project: dict) -> dict[str, Requirements]:
    return {name: by_name(lines) for name, lines in project["optional-dependencies"].items()}


@pytest.fixture(scope="module")
def declared(core: Requirements, extras: dict[str, Requirements]) -> Requirements:
    every = [*core.values(), *(requirement for extra in extras.values() for requirement in extra.values())]
    return by_name(str(requirement) for requirement in every)


@pytest.fixture(scope="module")
def pins() -> Requirements:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf8").splitlines()
    return by_name(line for line in lines if line.strip() and not line.startswith("#"))


@pytest.fixture(scope="module")
def conda() -> list:
    return yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf8"))["dependencies"]


@pytest.fixture(scope="module")
def conda_pip(conda: list) -> list[str]:
    return next(entry["pip"] for entry in conda if isinstance(entry, dict))


# environment.yml


def test_environment_file_names_the_owners_ten_as_pyproject_does(conda_pip: list[str], declared: Requirements):
    named = by_name(line for line in conda_pip if not line.startswith("-"))
    assert set(named) == OWNERS
    assert {name: str(named[name].specifier) for name in OWNERS} == {
        name: str(declared[name].specifier) for name in OWNERS
    }


def test_environment_file_installs_the_project_at_the_tested_versions(
    conda_pip: list[str], extras: dict[str, Requirements]
):
    options = [line.split(maxsplit=1) for line in conda_pip if line.startswith("-")]
    assert ["-c", "constraints.txt"] in options
    (project,) = [value for flag, value in options if flag == "-e"]
    assert set(re.fullmatch(r"\.\[(.+)]", project)[1].split(",")) == set(extras)


def test_environment_file_asks_for_the_python_that_the_project_supports(conda: list, project: dict):
    (python,) = [entry for entry in conda if isinstance(entry, str) and entry.startswith("python")]
    assert SpecifierSet(python.removeprefix("python")) == SpecifierSet(project["requires-python"])
    assert "pip" in conda, "conda warns when pip packages are listed without pip itself"


# constraints.txt


def test_constraints_are_exact_versions_of_no_particular_accelerator(pins: Requirements):
    for name, pin in pins.items():
        assert re.fullmatch(r"==[^,*+]+", str(pin.specifier)), f"{pin}: not one exact public version"
        assert not ACCELERATOR.search(name), f"{pin}: belongs to one kind of accelerator"


def test_constraints_satisfy_every_declared_requirement(pins: Requirements, declared: Requirements):
    assert set(declared) <= set(pins), "declared, but without a tested version in constraints.txt"
    for name, requirement in declared.items():
        version = str(pins[name].specifier).removeprefix("==")
        assert requirement.specifier.contains(version), f"{requirement}, but constraints.txt has {version}"


def test_constraints_cover_what_the_pinned_packages_require(pins: Requirements, declared: Requirements):
    """Follow the installed metadata, so that a new dependency's own dependencies are not left floating.

    Only from packages installed at their pinned version: another version's requirements prove nothing.
    """
    queue, seen, unpinned = list(declared.values()), set(), set()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        visit = (name, frozenset(requirement.extras))
        if visit in seen or name in INSTALLERS or ACCELERATOR.search(name):
            continue
        seen.add(visit)
        if name not in pins:
            unpinned.add(name)
            continue
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue  # an extra that this environment was built without
        if not pins[name].specifier.contains(installed.version):
            continue
        for line in installed.requires or []:
            needed = Requirement(line)
            active = [{"extra": extra} for extra in ("", *requirement.extras)]
            if needed.marker is None or any(needed.marker.evaluate(extra) for extra in active):
                queue.append(needed)
    assert not unpinned


# imports


def imported(tree: ast.Module, top_level: bool) -> set[str]:
    """Names of the modules that code imports: while it is itself imported, or only once a function runs."""
    found: set[str] = set()

    def visit(node: ast.AST, inside: bool) -> None:
        inside = inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if inside != top_level:
            if isinstance(node, ast.Import):
                found.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(tree, False)
    return found


@cache
def installed_modules() -> Mapping[str, list[str]]:
    return packages_distributions()  # reads every package's file list: a second


def undeclared(modules: set[str], allowed: Iterable[str], own: set[str]) -> set[str]:
    """Modules that belong to no allowed distribution; one that is not installed counts under its own name."""
    distributions = installed_modules()
    return {
        module
        for module in modules - own - sys.stdlib_module_names
        if not {canonicalize_name(name) for name in distributions.get(module, [module])} & set(allowed)
    }


def python_sources(*folders: str) -> Iterator[tuple[str, ast.Module]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf8"))


def notebook_sources() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf8"))["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        plain = "\n".join(line for line in code.splitlines() if not line.lstrip().startswith(("%", "!")))
        yield path.relative_to(ROOT).as_posix(), ast.parse(plain)


def test_the_library_imports_only_what_is_declared(core: Requirements, extras: dict[str, Requirements]):
    """At import only the core packages; the extras may be imported by a function that needs them."""
    problems, sources = {}, list(python_sources("causaldpo_lib"))
    assert sources
    for path, tree in sources:
        lazy = {*core, *extras["pipeline"], *extras["embedding"]}
        missing = undeclared(imported(tree, top_level=True), core, {"causaldpo_lib"})
        missing |= undeclared(imported(tree, top_level=False), lazy, {"causaldpo_lib"})
        if missing:
            problems[path] = missing
    assert not problems


def test_notebooks_benchmarks_and_tests_import_only_what_is_declared(core: Requirements, declared: Requirements):
    problems = {}
    own = {"causaldpo_lib", "benchmarks", "tests", "conftest"} | {path.stem for path in (ROOT / "tests").glob("*.py")}
    own |= {"recbole"}  # the other side of a comparison: it runs in an environment of its own
    groups = [
        (core, [*notebook_sources(), *python_sources("benchmarks")]),
        (declared, python_sources("tests")),
    ]
    for allowed, sources in groups:
        for path, tree in sources:
            modules = imported(tree, top_level=True) | imported(tree, top_level=False)
            if missing := undeclared(modules, allowed, own):
                problems[path] = missing
    assert not problems
