"""The tree as a stranger meets it: no machine paths, executed notebooks, links and commands that exist."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

import causaldpo_lib

ROOT = Path(__file__).resolve().parent.parent
UNTRACKED = {".git", ".venv", ".snakemake", ".ruff_cache", ".pytest_cache", ".hypothesis", "__pycache__"}
UNTRACKED_AT_ROOT = {"results", "data", "build", "dist"}
BINARY = {".png", ".pdf", ".ico"}
MACHINE_PATH = re.compile(
    r"(?<![\w.~-])/(?:home|root|work|Users)/[\w.-]"  # the lookbehind spares parts of longer paths
    r"|\b[A-Za-z]:\\{1,2}Users\\"
    r"|/tmp/ipykernel_\d"  # in outputs: a kernel's process number
)
TARGETS = {"help", "setup", "study", "test", "lab", "bench", "book", "publish"}


def git_files() -> list[Path] | None:
    """Tracked files, and those not ignored that are about to be; None outside a repository of our own."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        return None
    listing = subprocess.run(command, capture_output=True, text=True)
    if listing.returncode:  # such as a clone that belongs to another user
        return None
    return [ROOT / name for name in listing.stdout.split("\0") if name]


def walked_files() -> list[Path]:
    """The same without git, from the names that .gitignore lists."""
    found = []
    for folder, subfolders, names in os.walk(ROOT):
        skipped = UNTRACKED | (UNTRACKED_AT_ROOT if Path(folder) == ROOT else set())
        subfolders[:] = [name for name in subfolders if name not in skipped and not name.endswith(".egg-info")]
        found += [Path(folder, name) for name in names]
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


FILES = sorted(path for path in git_files() or walked_files() if path.is_file())
NOTEBOOKS = [path for path in FILES if path.suffix == ".ipynb"]
PAGES = [path for path in FILES if path.suffix == ".md"]


# Every file


def test_the_fixed_top_level_exists():
    folders = ["notebooks", "causaldpo_lib", "params", "figures", "tests", "benchmarks", ".ci", ".github"]
    pages = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE"]
    tools = ["environment.yml", "pyproject.toml", "constraints.txt", "Makefile", "Snakefile"]
    assert not {*folders, *pages, *tools} - {path.relative_to(ROOT).parts[0] for path in FILES}


def test_nothing_that_a_run_writes_is_tracked():
    assert not [relative(path) for path in FILES if relative(path).startswith(("results/", "data/", ".venv/"))]


def test_no_file_names_a_folder_of_one_machine():
    found = []
    for path in FILES:
        if path.suffix in BINARY:
            continue
        text = path.read_text(encoding="utf8")  # a binary file of an unknown kind fails here, by name
        found += [f"{relative(path)}: {match[0]}" for match in MACHINE_PATH.finditer(text)]
    assert not found


@pytest.mark.parametrize("folder", ["home", "root", "work", "Users"])
def test_the_pattern_finds_machine_paths_and_spares_addresses(folder: str):
    assert MACHINE_PATH.search(f"open('/{folder}/someone/x')")
    assert not MACHINE_PATH.search(f"https://example.org/{folder}/page, ../{folder}/x and a/{folder}/b")


def test_files_are_small():
    assert not {relative(path): size for path in FILES if (size := path.stat().st_size) > 1_500_000}


def test_ruff_finds_nothing():
    for command in (["check", "--quiet", "--output-format=concise"], ["format", "--check"]):
        result = subprocess.run(
            [sys.executable, "-m", "ruff", *command, str(ROOT)], capture_output=True, text=True, cwd=ROOT
        )
        assert result.returncode == 0, f"ruff {command[0]}: {result.stdout}{result.stderr}"


# Notebooks


def test_there_are_notebooks():
    assert NOTEBOOKS, "without one, the tests below would pass by having nothing to look at"


@pytest.fixture(params=NOTEBOOKS, ids=relative)
def notebook(request: pytest.FixtureRequest) -> dict:
    return json.loads(request.param.read_text(encoding="utf8"))


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code" and "".join(cell["source"]).strip()]


def test_notebook_is_valid_and_small(notebook: dict):
    nbformat.validate(notebook)
    cell_ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(cell_ids)) == len(cell_ids)
    assert len(json.dumps(notebook)) < 1_000_000


def test_notebook_opens_with_a_title(notebook: dict):
    first = notebook["cells"][0]
    assert first["cell_type"] == "markdown"
    assert "".join(first["source"]).startswith("# ")


def test_notebook_has_one_cell_of_parameters(notebook: dict):
    tagged = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    assert [cell["cell_type"] for cell in tagged] == ["code"]
    assert not [cell for cell in notebook["cells"] if "injected-parameters" in cell["metadata"].get("tags", [])]


def test_notebook_was_executed_top_to_bottom_without_errors(notebook: dict):
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output["ename"] for output in outputs if output["output_type"] == "error"]


def test_notebook_runs_on_the_one_kernel(notebook: dict):
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert notebook["metadata"]["language_info"]["name"] == "python"


# Pages


def headings(page: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ +(.+?) *$", re.sub(r"^```.*?^```", "", page, flags=re.M | re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: str) -> list[str]:
    """Targets of links and images, Markdown and HTML, outside code."""
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "code", page, flags=re.M | re.S)
    return re.findall(r"\]\(<?([^)>\s]+)", prose) + re.findall(r"\b(?:src|href)=\"([^\"]+)\"", prose)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_relative_links_and_images_exist(page: Path):
    broken = []
    for link in links(page.read_text(encoding="utf8")):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        tracked = target in FILES or any(target in path.parents for path in FILES)
        if not tracked or (anchor and target.suffix == ".md" and anchor not in headings(target.read_text("utf8"))):
            broken.append(link)
    assert not broken


def commands(page: str) -> str:
    """What a page shows as code."""
    fenced = re.findall(r"^```.*?\n(.*?)^```", page, flags=re.M | re.S)
    return "\n".join(fenced + re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", page, flags=re.M | re.S)))


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_commands_on_a_page_exist(page: Path):
    shown = commands(page.read_text(encoding="utf8"))
    assert set(re.findall(r"\bmake ([a-z]+)", shown)) <= TARGETS
    modules = re.findall(r"python -m ((?:causaldpo_lib|benchmarks)[\w.]*)", shown)
    assert not [name for name in modules if not (ROOT / name.replace(".", "/")).with_suffix(".py").is_file()]
    studies = [name for name in re.findall(r"\bSTUDY=([\w-]+)", shown) if name != "name"]
    assert not [name for name in studies if not (ROOT / "params" / "studies" / f"{name}.yaml").is_file()]


def test_the_readme_shows_the_commands():
    shown = commands((ROOT / "README.md").read_text(encoding="utf8"))
    assert set(re.findall(r"\bmake ([a-z]+)", shown)) == TARGETS - {"help"}


def test_contributing_names_dictionaries_that_exist():
    page = (ROOT / "CONTRIBUTING.md").read_text("utf8")
    rows = re.findall(r"^\|.*`([\w/]+(?:\.py|/))`.*\| `([A-Z]+)` \|$", page, re.M)
    assert len(rows) >= 4
    missing = []
    for place, name in rows:
        path = ROOT / "causaldpo_lib" / place / ("__init__.py" if place.endswith("/") else "")
        body = ast.parse(path.read_text(encoding="utf8")).body
        bound = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
        bound += [node.target for node in body if isinstance(node, ast.AnnAssign)]
        if name not in {getattr(target, "id", None) for target in bound}:
            missing.append(f"{name} in {place}")
    assert not missing


def test_license_citation_and_changelog_agree():
    assert "Apache License\n                           Version 2.0" in (ROOT / "LICENSE").read_text("utf8")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf8"))
    assert citation["license"] == "Apache-2.0"
    assert citation["version"] == causaldpo_lib.__version__
    latest = re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text("utf8"), re.M)[1]
    assert latest == causaldpo_lib.__version__


# Commands


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """make as a user's shell would start it, whatever make started these tests."""
    inherited = ("MAKE", "MFLAGS", "PYTHON", "PIP_ARGS", "STUDY", "CORES")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(inherited)}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def test_make_lists_exactly_the_fixed_targets():
    listing = make()
    assert set(re.findall(r"^make (\w+)", listing.stdout, re.M)) == TARGETS, listing.stderr


def test_make_passes_study_and_cores_on():
    assert "-m causaldpo_lib.study quick --cores " in make("-n", "study").stdout
    assert "-m causaldpo_lib.study ml-100k --cores 3" in make("-n", "study", "STUDY=ml-100k", "CORES=3").stdout
    assert "-m causaldpo_lib.study ml-100k --publish" in make("-n", "publish", "STUDY=ml-100k").stdout


@pytest.fixture
def fresh_tree(tmp_path: Path) -> Path:
    """As much of a clone as set-up reads before it installs anything."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.mark.parametrize("version", [(2, 7), (3, 10), (3, 14)])
def test_setup_refuses_an_interpreter_that_is_not_supported(fresh_tree: Path, version: tuple[int, int]):
    """The pretended interpreter runs the Makefile's own check with another version number."""
    pretender = fresh_tree / "old-python"
    pretend = f"import sys; sys.version_info = {(*version, 0)}; exec(sys.argv[1])"
    pretender.write_text(f'#!/bin/sh\nexec "{sys.executable}" -c "{pretend}" "$2"\n')
    pretender.chmod(0o755)
    result = make("setup", f"PYTHON={pretender}", cwd=fresh_tree)
    assert result.returncode != 0
    sentence, *rest = result.stderr.splitlines()
    assert f"is {version[0]}.{version[1]}: name another one" in sentence
    assert all(line.startswith("make: ***") for line in rest)
    assert not (fresh_tree / ".venv").exists()


def test_setup_says_when_there_is_no_such_interpreter(fresh_tree: Path):
    result = make("setup", "PYTHON=python3.99", cwd=fresh_tree)
    assert result.returncode != 0
    assert result.stderr.startswith("No interpreter python3.99")


def test_setup_does_nothing_when_nothing_changed(fresh_tree: Path):
    (fresh_tree / ".venv").mkdir()
    stamp = fresh_tree / ".venv" / ".setup-complete"
    stamp.touch()
    assert "pip install" not in make("-n", "setup", cwd=fresh_tree).stdout
    os.utime(stamp, (0, 0))  # older than constraints.txt
    assert "pip install" in make("-n", "setup", cwd=fresh_tree).stdout


def test_the_continuous_check_is_make_test():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text("utf8").rstrip().endswith("\nmake test")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text("utf8"))["jobs"]
    assert ".ci/run" in [step.get("run") for step in jobs["test"]["steps"]]
