"""Stages and their run folders. Free of torch, so that planning a study is quick.

A stage is one notebook and one function of ``stages.py``. Its run folder is named by a digest of the
parameters, in which an input counts by the name of *its* run folder: the same configuration is the same
folder, whichever study asks for it. A run is complete when ``summary.json`` exists, which is written last, and names
the present code, the inputs' present results, and the raw files at hand.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from causaldpo_lib.errors import StudyError, pick
from causaldpo_lib.parameters import check, declared_in
from causaldpo_lib.paths import NOTEBOOKS, RESULTS, data_folder, from_root
from causaldpo_lib.records import commit, plain, read_json, shown, versions, write_json
from causaldpo_lib.sources import canonical, digest, function_digest, notebook_digest

SAMPLED = 1 << 20  # bytes of a raw file that are read at either end to notice another
KEPT = ("config.json", "notebook.ipynb", "log.txt")  # what a fresh start of a run leaves in its folder


@dataclass(frozen=True)
class Stage:
    """A step of the study: its notebook, its function in ``stages.py``, and the run folders it reads.

    ``inputs`` maps the parameter that names an upstream run folder to the stages accepted there; those of ``optional``
    may be left empty.
    """

    notebook: str
    function: str
    inputs: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The notebook's file."""
        return NOTEBOOKS / f"{self.notebook}.ipynb"

    def given(self, parameters: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
        """The inputs that ``parameters`` name: all of ``inputs``, and what is not empty of ``optional``."""
        return {**self.inputs, **{key: stages for key, stages in self.optional.items() if parameters[key]}}


STAGES: dict[str, Stage] = {
    "data": Stage("01_data_and_shifts", "prepare_data", {}),
    "sft": Stage("02_supervised_fine_tuning", "fine_tune", {"data": ("data",)}),
    "sasrec": Stage("12_sequential_recommender", "fit_sequential", {"data": ("data",)}),
    "align": Stage(
        "03_preference_alignment", "align", {"data": ("data",), "sft": ("sft",)}, {"assistant": ("sasrec",)}
    ),
    "rank": Stage(
        "04_ranking_evaluation",
        "rank",
        {"data": ("data",), "checkpoint": ("sasrec", "sft", "align")},
        {"assistant": ("sasrec",)},
    ),
    "environments": Stage("05_pseudo_environments", "infer_environments", {"data": ("data",), "sft": ("sft",)}),
    "dpo4rec": Stage("20_dpo4rec", "reason_and_rerank", {"data": ("data",)}),
}


def declared(stage: str) -> dict[str, Any]:
    """The parameters of a stage with their defaults: the smoke setting declared in its notebook."""
    return declared_in(pick(STAGES, stage, "stage").path)


def resolve(stage: str, overrides: Mapping[str, Any], source: str | None = None) -> dict[str, Any]:
    """All parameters of a stage: the declared defaults updated by ``overrides``.

    Raises:
        StudyError: an unknown key or a value of the wrong kind; ``source`` is the file named in the sentence.
    """
    defaults = declared(stage)
    return {**defaults, **check(defaults, overrides, source or STAGES[stage].path.name)}


def code_digest(stage: str) -> str:
    """Digest of all code behind a stage: its notebook's code cells (no outputs) and its library code."""
    return digest([notebook_digest(STAGES[stage].path), library_digest(stage)])


def library_digest(stage: str) -> str:
    """Digest of a stage's function in ``stages.py`` and of all library code that it reaches."""
    return function_digest("stages", STAGES[stage].function)


# --- names ---


def folder_name(stage: str, parameters: Mapping[str, Any]) -> Path:
    """``results/runs/<dataset>-<shift>/<name>-<digest>`` of a configuration; no folder needs to exist yet."""
    return RESULTS.joinpath("runs", *_identity(stage, parameters))


def smoke_folder(stage: str) -> Path:
    """The run folder of a stage's declared defaults, each input being the last accepted stage's at its own."""
    inputs = {key: str(smoke_folder(accepted[-1])) for key, accepted in STAGES[stage].inputs.items()}
    return folder_name(stage, {**declared(stage), **inputs})


def _identity(stage: str, parameters: Mapping[str, Any]) -> tuple[str, str]:
    """(dataset-shift, name-digest) of a configuration: what its folder is called, wherever it was put."""
    empty = [key for key in STAGES[stage].inputs if not parameters[key]]
    if empty:
        raise StudyError(f"{STAGES[stage].path.name}: {empty[0]} is empty: give the run folder to read")
    inputs = {key: _identity_at(parameters[key]) for key in STAGES[stage].given(parameters)}
    setting = inputs["data"][0] if inputs else f"{parameters['dataset']}-{parameters['shift']}"
    if stage == "data":
        label = "data"
    elif stage == "rank":
        label = f"{inputs['checkpoint'][1].rpartition('-')[0]}-rank"
    else:
        label = f"{parameters.get('method', stage)}-s{parameters['seed']}"
    for text in (label, setting):
        if not re.fullmatch(r"[\w.-]+", text):
            raise StudyError(f"{text!r} cannot name a folder: use letters, digits, '-', '_' and '.'")
    content = {**_own(parameters), **{key: name for key, (_, name) in inputs.items()}}
    return setting, f"{label}-{digest({'stage': stage, 'parameters': content})[:10]}"


def _identity_at(path: str | Path) -> tuple[str, str]:
    """The identity recorded in a run folder, or what its path says where it is only planned."""
    folder = from_root(path)
    if not (folder / "config.json").exists():
        return folder.parent.name, folder.name
    config = read_json(folder / "config.json")
    return config["setting"], config["name"]


def _own(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that decide the result: all but ``run``, which only says where it goes."""
    return {key: value for key, value in parameters.items() if key != "run"}


# --- runs ---


@dataclass(frozen=True)
class Run:
    """One run folder. ``code`` is the digest of the library code, its own and upstream, behind the result; ``inputs``
    are those of the runs that it reads."""

    folder: Path
    stage: str
    parameters: Mapping[str, Any]
    code: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @property
    def complete(self) -> bool:
        """Whether the result is there and was made by the present code, from the present inputs and raw files."""
        if not (self.folder / "summary.json").exists():
            return False
        made, now = self.summary, {**self.inputs, **self.raw_files()}
        return made["code"] == self.code and all(made["inputs"].get(key, value) == value for key, value in now.items())

    def raw_files(self) -> dict[str, str]:
        """``files``: the fingerprint of the raw files that a data run reads; empty for others and without files."""
        return raw_files(self.parameters) if self.stage == "data" else {}

    @property
    def summary(self) -> dict[str, Any]:
        """The content of ``summary.json``: provenance, and the named numbers under ``scalars``."""
        return read_json(self.folder / "summary.json")

    def finish(self, device: str = "cpu", **scalars: Any) -> Path:
        """Write ``summary.json`` and return its path; the run is complete from here on. NaN becomes null."""
        config = read_json(self.folder / "config.json")
        summary = {
            **config,
            "inputs": {**config["inputs"], **self.raw_files()},  # the files may have come with the run, by download
            "code": self.code,
            "versions": versions(),
            "commit": commit(),
            "device": device,
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "wall_seconds": round(time.perf_counter() - self.started, 2),
            "scalars": plain(scalars),
        }
        return write_json(self.folder / "summary.json", summary)


def open_run(stage: str, parameters: Mapping[str, Any], folder: str | Path | None = None) -> Run:
    """The run of a configuration, ready to be filled: in its own folder, or in ``folder`` or ``run``.

    What an interrupted run, or one of older code, left there is cleared; a complete run is left as it is.

    Raises:
        StudyError: the folder holds another configuration or something else; an input is missing, unfinished,
            of the wrong stage, or was itself made from other data than ``data``.
    """
    accepted = pick(STAGES, stage, "stage").given(parameters)
    setting, name = _identity(stage, parameters)
    inputs = {key: load_run(parameters[key], stages) for key, stages in accepted.items()}
    for key, run in inputs.items():
        theirs, ours = run.parameters.get("data"), parameters.get("data")
        if theirs and _identity_at(theirs) != _identity_at(ours):
            remedy = "give runs made from the same data"
            raise StudyError(f"{key} {shown(run.folder)} was made from {theirs}, not from {ours}: {remedy}")
    target = from_root(folder or parameters.get("run") or folder_name(stage, parameters))
    config = {
        "stage": stage,
        "setting": setting,
        "name": name,
        "parameters": {**_own(parameters), **{key: shown(run.folder) for key, run in inputs.items()}},
        "inputs": {key: digest(run.summary) for key, run in inputs.items()},
    }
    _refuse_other(target, config)
    code = digest([library_digest(stage), *(run.code for run in inputs.values())])
    run = Run(target, stage, config["parameters"], code, config["inputs"])
    if not run.complete:
        target.mkdir(parents=True, exist_ok=True)
        for path in _content(target):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_json(target / "config.json", config)
    return run


def raw_files(parameters: Mapping[str, Any]) -> dict[str, str]:
    """``files``: sha256 of names, sizes, and the first and last MiB of a dataset's files; empty if none is at hand.

    Not of all bytes: a study asks whenever it is planned, and datasets have gigabytes. Moved or copied files stay the
    same. A named ``file`` (dataset ``custom``) stands for the folder.
    """
    folder, own = data_folder() / parameters["dataset"], parameters["dataset_options"].get("file")
    paths = [folder / own] if own else sorted(path for path in folder.rglob("*") if path.is_file())
    found = hashlib.sha256()
    for path in (path for path in paths if path.is_file()):
        size = path.stat().st_size
        found.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as stream:
            found.update(stream.read(SAMPLED))
            stream.seek(max(size - SAMPLED, 0))
            found.update(stream.read(SAMPLED))
    return {"files": found.hexdigest()} if any(path.is_file() for path in paths) else {}


def stale_files(folder: Path, parameters: Mapping[str, Any]) -> bool:
    """Whether a finished data run was made from other raw files than those at hand; not if there are none."""
    now = raw_files(parameters).get("files")
    if not now or not (folder / "summary.json").exists():
        return False
    return read_json(folder / "summary.json").get("inputs", {}).get("files", now) != now


def load_run(path: str | Path, stages: str | tuple[str, ...]) -> Run:
    """A finished run of one of ``stages``; a relative path is taken from the repository's root.

    Raises:
        StudyError: no such folder, not a run folder, not finished, or a run of another stage.
    """
    stages = (stages,) if isinstance(stages, str) else stages
    folder, wanted = from_root(path), f"a finished run of stage {' or '.join(stages)}"
    if not path or not folder.is_dir():
        raise StudyError(f"run folder {str(path)!r} does not exist: give {wanted}")
    if not (folder / "config.json").exists():
        raise StudyError(f"{shown(folder)} is not a run folder (it has no config.json): give {wanted}")
    config = read_json(folder / "config.json")
    if config["stage"] not in stages:
        raise StudyError(f"{shown(folder)} holds a run of stage {config['stage']}: give {wanted}")
    if not (folder / "summary.json").exists():
        again = pick(STAGES, config["stage"], "stage").path.name
        raise StudyError(f"{shown(folder)} has no summary.json, so its run did not finish: run {again} again")
    made = read_json(folder / "summary.json")
    return Run(folder, config["stage"], config["parameters"], made["code"], made["inputs"])


def _content(folder: Path) -> list[Path]:
    """What a stage wrote into its folder: neither the record of the run nor hidden files."""
    return [path for path in folder.iterdir() if path.name not in KEPT and not path.name.startswith(".")]


def _refuse_other(target: Path, config: Mapping[str, Any]) -> None:
    """Raise unless ``target`` is free or holds this very configuration."""
    if not (target / "config.json").exists():
        if target.exists() and _content(target):
            raise StudyError(f"{shown(target)} is not empty and not a run folder: give a new or an empty one")
        return
    found = read_json(target / "config.json")
    if any(found[key] != config[key] for key in ("stage", "setting", "name")):
        ours, theirs = config["parameters"], found["parameters"]
        keys = [key for key in {**ours, **theirs} if canonical(ours.get(key)) != canonical(theirs.get(key))]
        raise StudyError(
            f"{shown(target)} holds the run {found['name']}, not {config['name']} (they differ in "
            f"{', '.join(keys) or 'stage'}): choose another folder, or leave `run` empty"
        )
