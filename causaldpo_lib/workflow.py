"""Running a study through Snakemake: what is stale, progress, failures, and publishing a finished one."""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from causaldpo_lib.errors import StudyError
from causaldpo_lib.paths import FIGURES, NOTEBOOKS, RESULTS, ROOT
from causaldpo_lib.pipeline import STAGES, smoke_folder, stale_files
from causaldpo_lib.records import shown
from causaldpo_lib.run import execute_in_place

if TYPE_CHECKING:
    from causaldpo_lib.study import Study

READING = ("06_popularity_amplification", "07_group_wise_analysis", "08_results_tables")
TABLES = (
    *("metrics", "paired", "shares", "groups", "slopes", "times", "validation"),
    *("diagnostics", "training", "costs"),
)
RERANKING_READING = ("21_dpo4rec_results",)
RERANKING_TABLES = ("reranking", "reranking_paired", "reranking_rounds", "reranking_example", "costs")
DATA_READING = ("09_all_datasets",)
DATA_TABLES = ("", "_summary", "_sources", "_loading", "_histograms", "_prompts")  # of a study of data alone
# Changed parameters (the code's digests are among them), inputs of another content, another set of inputs.
# Left out: the text of a rule, since rewording the Snakefile changes no result.
TRIGGERS = ("params", "mtime", "input")
# How Snakemake's reasons begin, and what they mean here.
REASONS = {
    "Missing output files": "its result is missing",
    "Params have changed": "its parameters or its code changed",
    "Set of input files": "it has other inputs than before",
    "Updated input files": "an input changed",
    "Input files updated": "an input is made anew",
    "Forced execution": "its raw files are others",
}


def reading(study: Study) -> tuple[str, ...]:
    """The notebooks that read a study's tables: those that its file names, else the usual ones."""
    usual = DATA_READING if study.data_only else RERANKING_READING if study.reranking else READING
    return study.notebooks or usual


def tables_of(study: Study) -> tuple[str, ...]:
    """The stems of a study's tables."""
    if study.data_only:
        return tuple(f"datasets{part}" for part in DATA_TABLES)
    if study.reranking:
        return RERANKING_TABLES
    return (*TABLES, *(f"points-{setting.name}" for setting in study.settings))


def writer(study: Study) -> str:
    """The module whose ``write`` makes a study's tables, and whose ``summary_text`` shows them."""
    return "survey" if study.data_only else "reranking" if study.reranking else "tables"


@dataclass(frozen=True)
class Step:
    """A step of Snakemake's that would run, and why."""

    label: str
    reason: str


def run(study: Study, cores: int, threads: int = 1) -> None:
    """Run what is missing or stale of a study, then print its results.

    Raises:
        StudyError: a step failed (each is listed, with its notebook and its own sentence), or another study
            is running in this repository.
    """
    started = time.monotonic()
    with _alone() as lock:
        _ask_again(study)
        if said := _cost(study, plan(study), cores, threads):
            print(said, flush=True)
        failed = _execute(study, cores, threads, lock)
    if failed:
        for label, report in failed:
            print(f"\nFAILED {label}\n{report}", file=sys.stderr)
        again = f"`make study STUDY={study.name}`"
        count = f"{len(failed)} step{'s' * (len(failed) > 1)}"
        raise StudyError(f"{count} of study {study.name} failed, see above: mend the cause; {again} goes on")
    print(f"\nstudy {study.name}: all steps are done ({_clock(time.monotonic() - started)})\n")
    print(importlib.import_module(f"causaldpo_lib.{writer(study)}").summary_text(study.folder))
    print("\nfigures and tables:")
    for path in sorted([*study.folder.glob("*.png"), *study.folder.glob("*.csv")]):
        print(f"  {shown(path)}")


def _ask_again(study: Study) -> None:
    """Forget the outcome of every data run that is not there: what was refused is tried again, files may have come."""
    from causaldpo_lib.study import jobs  # which imports this module

    if study.data_only:
        for job in jobs(study):
            if not (job.folder / "summary.json").exists():
                study.outcome(job.setting).unlink(missing_ok=True)


def plan(study: Study) -> list[Step]:
    """The steps that a run would make now; nothing is written.

    Raises:
        StudyError: Snakemake could not lay the study out.
    """
    done = subprocess.run([*_command(study), "--dry-run"], capture_output=True, text=True, cwd=ROOT)
    text = done.stdout + done.stderr
    if done.returncode:
        raise StudyError(f"Snakemake cannot plan study {study.name}: {_last_lines(text)}")
    return [Step(*found) for found in re.findall(r"^Job \d+: (.*)\nReason: (.*)$", text, flags=re.M)]


def machine_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def show_plan(study: Study, cores: int | None = None, threads: int = 1) -> None:
    """Print the steps that a run would make now, with the reason of each; to stderr, how long their runs may take."""
    steps = plan(study)
    for step in steps:
        why = [words for start, words in REASONS.items() if start in step.reason]
        print(f"{step.label}: {(why or [step.reason])[0]}")
    print(f"study {study.name}: " + (f"{len(steps)} steps would run" if steps else "nothing to do"), flush=True)
    if said := _cost(study, steps, cores or machine_cores(), threads):
        print(said, file=sys.stderr)  # stdout is a list of steps, for whoever counts or filters them


def _cost(study: Study, steps: list[Step], cores: int, threads: int) -> str:
    """How long the runs among ``steps`` may take, in a line; empty if there are none. Tables are not counted."""
    from causaldpo_lib import costs  # pandas, which only planning needs
    from causaldpo_lib.study import jobs  # which imports this module

    every, labels = jobs(study), {step.label for step in steps}
    left = [job for job in every if job.label in labels]  # of jobs that share a folder, one gives its label to the step
    if not left:
        return ""
    return costs.sentence(costs.estimate(left, costs.known_costs(every, study.name)), cores, threads)


def publish(study: Study) -> None:
    """Copy a finished study's tables and figures to ``figures/<study>/``; renew the README and all notebooks in place.

    Raises:
        StudyError: the study is not finished or out of date, or a notebook fails.
    """
    from causaldpo_lib import readme  # draws on the plotting stack, which planning a study does not need

    left = plan(study)
    if left:
        again = f"`make study STUDY={study.name}` first"
        raise StudyError(f"study {study.name} is not up to date ({len(left)} steps are left): run {again}")
    target = FIGURES / study.name
    target.mkdir(parents=True, exist_ok=True)
    made_here = any(study.folder.glob("recovery*"))  # by a command of its own: what is published of it stays else
    for path in [*target.glob("*.csv"), *target.glob("*.png")]:
        if made_here or not path.stem.startswith("recovery"):
            path.unlink()
    for path in sorted([*study.folder.glob("*.csv"), *study.folder.glob("*.png")]):
        if _belongs(study, path.stem):
            shutil.copyfile(path, target / path.name)
    print(f"copied tables and figures to {shown(target)}")
    page = ROOT / "README.md"
    page.write_text(readme.filled(page.read_text(encoding="utf-8"), FIGURES), encoding="utf-8")
    execute_notebooks()


def execute_notebooks() -> None:
    """Renew every notebook's links and outputs in place, and ``figures/notebooks.csv``: what each took.

    The overview, which shows these times, comes last.
    """
    from causaldpo_lib import book, overview  # as in ``publish``
    from causaldpo_lib.backbone import device

    book.renew(NOTEBOOKS)
    for stage in STAGES:  # so that the saved outputs show the runs, not that they were there already
        shutil.rmtree(smoke_folder(stage), ignore_errors=True)
    times = []
    for notebook in sorted(NOTEBOOKS.glob("[0-9]*.ipynb"), key=lambda path: (path.stem == book.START, path)):
        start = time.perf_counter()
        if notebook.stem == book.START:
            overview.write_times(times, device().type, FIGURES)
        execute_in_place(notebook)
        times.append((notebook.stem, time.perf_counter() - start))
        print(f"executed {shown(notebook)}")


def _belongs(study: Study, stem: str) -> bool:
    """Whether a table or figure is of all settings or a present one: those of a removed one stay behind."""
    if study.data_only:
        return stem.startswith("datasets")
    if study.reranking:
        return stem == "costs" or stem.startswith("reranking")
    if stem.startswith("recovery"):  # of python -m causaldpo_lib.recovery, which no study runs
        return True
    return stem in TABLES or stem.endswith(("-all", *(f"-{setting.name}" for setting in study.settings)))


def _command(study: Study, threads: int = 1) -> list[str]:
    if importlib.util.find_spec("snakemake") is None:
        raise StudyError("Snakemake is not installed: run `make setup`, or pip install -e '.[pipeline]'")
    from causaldpo_lib.study import jobs  # which imports this module

    changed = [
        study.outcome(job.setting) if study.data_only else job.folder / "summary.json"
        for job in jobs(study)
        if job.stage == "data" and stale_files(job.folder, job.parameters)
    ]
    config = [f"study={study.path.resolve()}", f"threads={threads}"]
    snakemake = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--nolock"]
    options = ["--rerun-incomplete", "--keep-going", "--rerun-triggers", *TRIGGERS]
    options += ["--forcerun", *map(shown, changed)] if changed else []
    return [*snakemake, *options, "--config", *config]


def _execute(study: Study, cores: int, threads: int, lock: int) -> list[tuple[str, str]]:
    """Run Snakemake, with a line per finished step; returns (label, report) of each failed one."""
    study.folder.mkdir(parents=True, exist_ok=True)
    log = study.folder / "snakemake.log"
    # Snakemake and its notebooks get a session of their own: an interruption reaches all of them, and once. The
    # lock goes along, so that it holds as long as Snakemake lives.
    process = subprocess.Popen(
        [*_command(study, threads), "--cores", str(cores)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        pass_fds=(lock,),
    )
    with _ended_with_us(process), log.open("w", encoding="utf-8") as copy:
        failed = _follow(process.stdout, copy, study.name)
        status = process.wait()
    if status and not failed:
        raise StudyError(f"Snakemake stopped: {_last_lines(log.read_text('utf-8'))} (all of it: {shown(log)})")
    return failed


def _follow(lines: Iterable[str], copy: TextIO, name: str) -> list[tuple[str, str]]:
    """Copy Snakemake's messages and print progress; returns (label, report) of the failed steps."""
    started, total, done = time.monotonic(), 0, 0
    labels: dict[str, str] = {}
    failed: dict[str, str] = {}
    broken = ""  # the job that the lines of an error are about
    for line in lines:
        copy.write(line)
        if found := re.match(r"total\s+(\d+)", line):
            total = int(found[1]) - 1  # without the rule that only asks for all others
            print(f"study {name}: {total} steps to do; see log.txt in the folder of a run", flush=True)
        elif found := re.match(r"Job (\d+): (.*)", line):
            labels[found[1]] = found[2]
        elif (found := re.match(r"Finished jobid: (\d+)", line)) and found[1] in labels:
            done += 1
            clock = _clock(time.monotonic() - started)
            print(f"{done} of {total} steps done, {clock}: {labels[found[1]]}", flush=True)
        elif found := re.match(r"    jobid: (\d+)", line):
            broken = found[1]
        elif (found := re.match(r"    log: (.*) \(check log", line)) and broken in labels:
            failed[labels[broken]] = _report([ROOT / path for path in found[1].split(", ")])
            print(f"FAILED: {labels[broken]}", flush=True)
    return list(failed.items())


def _report(logs: list[Path]) -> str:
    """What a failed step said last, and where its notebook and log are."""
    said = [line for path in logs if path.suffix == ".txt" for line in _tail(path)]
    errors = [line for line in said if line.startswith("error: ")]
    return "\n".join(["  " + (errors or said or ["no message"])[-1], *(f"  {shown(path)}" for path in logs)])


def _tail(path: Path) -> list[str]:
    text = path.read_text("utf-8", errors="replace") if path.exists() else ""
    return [line for line in text.splitlines() if line.strip()]


def _last_lines(text: str) -> str:
    """The last thing that Snakemake said, without its own bookkeeping."""
    noise = ("Complete log", "Elapsed time", "Exiting because", "At least one job", "WorkflowError:")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(noise)]
    return " ".join(lines[-3:])


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


@contextmanager
def _alone() -> Iterator[int]:
    """Hold the one lock of this repository's results; the system frees it when its last holder ends, however.

    Raises:
        StudyError: another study, or an earlier one whose Snakemake still lives, holds it.
    """
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StudyError("another study is running in this repository: wait until it ends") from None
        yield lock.fileno()


@contextmanager
def _ended_with_us(process: subprocess.Popen[str]) -> Iterator[None]:
    """End the process and its children when this one is interrupted, told to end, or fails."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    except BaseException:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
                break
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
