"""What a study's runs cost in time: measured, kept as costs.csv, and estimated before anything starts.

costs.csv   setting, stage, method (empty for what methods share), runs, seconds (median of one run), device
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import pandas as pd

from causaldpo_lib.errors import StudyError
from causaldpo_lib.paths import FIGURES, RESULTS
from causaldpo_lib.records import read_json, shown
from causaldpo_lib.sources import digest

if TYPE_CHECKING:
    from causaldpo_lib.study import Job

Key = tuple[str, str, str]
KEY = ["setting", "stage", "method"]
COLUMNS = [*KEY, "runs", "seconds", "device"]
ELSE = "*"  # the method of runs that are not like any of a study
# Seconds of a notebook beside its run (kernel, imports, figures): 01 to 04 took 9 to 10 each with their runs at hand.
BESIDE = 10.0


@dataclass(frozen=True)
class Estimate:
    """Seconds of ``runs`` in all, and of the longest chain of those that wait for each other.

    ``sources`` hold the known times, ``devices`` ran what is known or guessed; unknown times count as nothing.
    """

    seconds: float
    longest: float
    runs: int
    known: int
    guessed: int
    unknown: int
    sources: tuple[str, ...]
    devices: tuple[str, ...]


def cost_rows(jobs: Iterable[Job]) -> list[dict[str, Any]]:
    """Rows of costs.csv: what finished runs took, the median over seeds. Jobs that are not finished have none."""
    return _medians((_key(job), _summary(job.folder)) for job in jobs)


def known_costs(jobs: Iterable[Job], study: str = "") -> pd.DataFrame:
    """The columns of costs.csv and ``source``, a row per setting, stage and method that was timed.

    Finished runs come first, then the published costs of ``study``, then of others. A run stands for the jobs that
    differ from it by nothing but the seed, otherwise for method ``ELSE`` of its dataset and shift: it may be a trial.

    Raises:
        StudyError: a costs.csv has other columns, or something else than numbers of seconds.
    """
    keys: dict[str, set[Key]] = {}
    for job in jobs:
        keys.setdefault(_kind(job.folder, job.parameters), set()).add(_key(job))
    timed = []
    for folder in sorted(path.parent for path in (RESULTS / "runs").glob("*/*/summary.json")):
        if run := _summary(folder):
            others = [(run["setting"], run["stage"], ELSE)]
            timed += [(key, run) for key in keys.get(_kind(folder, run["parameters"]), others)]
    rows = [{**row, "source": shown(RESULTS / "runs")} for row in _medians(timed)]
    for path in sorted(FIGURES.glob("*/costs.csv"), key=lambda path: (path.parent.name != study, path)):
        try:
            table = pd.read_csv(path, keep_default_na=False)[COLUMNS].astype({"seconds": float})
        except (KeyError, ValueError):
            raise StudyError(f"{shown(path)} is no table of costs: publish its study again, or delete it") from None
        rows += table.assign(source=shown(path)).to_dict("records")
    return pd.DataFrame(rows, columns=[*COLUMNS, "source"]).drop_duplicates(KEY, ignore_index=True)


def estimate(jobs: Iterable[Job], known: pd.DataFrame) -> Estimate:
    """What ``jobs``, upstream first, will take; inputs that are not among them are there already.

    A job's time is that of its setting, stage and method. Else it is guessed, as the median of the stage on the same
    dataset and shift, else on the same dataset, else on any.
    """
    rows = known.to_dict("records")
    chains: dict[Path, float] = {}
    total, kinds, sources, devices = 0.0, [], set(), set()
    for job in jobs:
        found, kind = _like(job, rows)
        seconds = median(row["seconds"] for row in found) + BESIDE if found else 0.0
        chains[job.folder] = seconds + max((chains.get(folder, 0.0) for folder in job.inputs.values()), default=0.0)
        total += seconds
        kinds.append(kind)
        sources |= {row["source"] for row in found if kind == "known"}
        devices |= {row["device"] for row in found}
    counts = [len(kinds), *(kinds.count(kind) for kind in ("known", "guessed", "unknown"))]
    return Estimate(total, max(chains.values(), default=0.0), *counts, tuple(sorted(sources)), tuple(sorted(devices)))


def sentence(found: Estimate, cores: int, threads: int = 1) -> str:
    """The estimate in one line: how long, with each run on ``threads`` of the cores, and what that rests on."""
    if found.unknown == found.runs:
        return f"no estimate of the time: nothing like the {_count(found.runs, 'run')} was timed before"
    minutes = max(1, round(max(found.seconds / max(1, cores // threads), found.longest) / 60))
    clock = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
    known = f"; times of {found.known} known from {' and '.join(found.sources)}" if found.known else ""
    guessed = f"; {found.guessed} guessed from other runs of their stage, whatever their model" if found.guessed else ""
    unknown = f"; {found.unknown} of unknown time left out" if found.unknown else ""
    basis = f"{_count(found.runs, 'run')}{known}{guessed}{unknown}; measured on {' and '.join(found.devices)}"
    return f"estimated {clock} on {_count(cores, 'core')} ({basis})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _key(job: Job) -> Key:
    return job.setting, job.stage, job.method or ""


def _kind(folder: Path, parameters: Mapping[str, Any]) -> str:
    """What runs have in common that differ by their seed: the data, the name, the other parameters."""
    own = {key: value for key, value in parameters.items() if key not in ("seed", "sft", "checkpoint", "assistant")}
    return digest([folder.parent.name, re.sub(r"-s\d+(?=-)|-\w+$", "", folder.name), own])


def _summary(folder: Path) -> dict[str, Any]:
    """The summary of a timed run, else nothing: a damaged one is for those to report who need its numbers."""
    with suppress(StudyError):
        summary = read_json(folder / "summary.json")
        return summary if "wall_seconds" in summary else {}
    return {}


def _medians(timed: Iterable[tuple[Key, Mapping[str, Any]]]) -> list[dict[str, Any]]:
    rows = [(*key, 1, run["wall_seconds"], run.get("device", "unknown")) for key, run in timed if run]
    groups = pd.DataFrame(rows, columns=COLUMNS).groupby(KEY, sort=False, as_index=False)
    devices = ("device", lambda names: " and ".join(sorted(set(names))))
    return groups.agg(runs=("runs", "sum"), seconds=("seconds", "median"), device=devices).to_dict("records")


def _like(job: Job, rows: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str]:
    """The rows that are most like a job, and whether its time is thereby known, guessed or unknown."""
    rows = [row for row in rows if row["stage"] == job.stage]
    own = [row for row in rows if (row["setting"], row["stage"], row["method"]) == _key(job)]
    data = job.folder.parent.name  # <dataset>-<shift>, whatever the study calls it
    same = [row for row in rows if row["setting"] in (job.setting, data)]
    near = [row for row in rows if row["setting"].startswith(data.rpartition("-")[0] + "-")]
    return own or same or near or rows, "known" if own else "guessed" if rows else "unknown"
