"""Studies: settings x methods x seeds, read from YAML and laid out as jobs.

    python -m causaldpo_lib.study NAME [--cores N] [--threads N] [--dry-run] [--publish]

A study file says what differs from the notebooks' defaults; a method file says what one method does otherwise. A
value is taken from the first of: setting, sweep, method, study, notebook. Every key is checked before anything starts.
A study with ``methods: []`` and ``seeds: []`` is one of data alone: it prepares its settings and describes them.
One whose methods have a section ``dpo4rec`` is one of re-rankers, with runs and tables of their own.

Two kinds of tables are never mixed. By default all methods share the study's negatives and beta (*matched*); with
``hyperparameters: published`` each has those of its own paper, the section ``published`` of its file.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from causaldpo_lib import workflow
from causaldpo_lib.errors import StudyError, pick
from causaldpo_lib.parameters import check, read_yaml, unknown_key
from causaldpo_lib.paths import NOTEBOOKS, PARAMS, RESULTS
from causaldpo_lib.pipeline import STAGES, declared, folder_name
from causaldpo_lib.records import shown

# What the layout of a study decides, and no override may.
LAID_OUT = ("data", "sft", "checkpoint", "dataset", "shift", "split_seed", "seed", "method", "assistant", "run")
STUDY_KEYS = (
    *("settings", "methods", "sweeps", "comparisons", "seeds", "split_seed", "hyperparameters", "notebooks"),
    *STAGES,
)
SETTING_KEYS = ("name", "dataset", "shift", *STAGES)
METHOD_STAGES = ("sft", "sasrec", "align", "rank", "dpo4rec")  # what a method may do otherwise
METHOD_KEYS = ("label", "summary", *METHOD_STAGES, "published")
SWEEP_KEYS = ("method", "stage", "key", "values", "with")
HYPERPARAMETERS = ("matched", "published")

Overrides = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Method:
    """A method of a table.

    ``overrides`` are its parameters by stage. Its ranked checkpoint comes from the last training stage among them:
    ``sasrec``, ``align`` (even with nothing to override), else ``sft``. ``assistants`` names, by stage, another method
    whose checkpoint that stage reads beside its own inputs; ``entries`` change single entries of options, by stage.
    """

    name: str
    label: str
    summary: str
    overrides: Overrides
    assistants: Mapping[str, str] = field(default_factory=dict)
    entries: Overrides = field(default_factory=dict)

    @property
    def reranks(self) -> bool:
        """Whether it is a re-ranker with a knowledge generator, and no ranker of the whole catalogue."""
        return "dpo4rec" in self.overrides

    @property
    def trained(self) -> str:
        """The stage that makes the checkpoint which is ranked."""
        return next((stage for stage in ("sasrec", "align") if stage in self.overrides), "sft")


@dataclass(frozen=True)
class Setting:
    """A dataset under a shift, with its own overrides by stage.

    ``name`` is what tables and figures call it: by default ``<dataset>-<shift>``. Run folders are named after what they
    hold, so that studies share them under whatever name.
    """

    name: str
    dataset: str
    shift: str
    overrides: Overrides


@dataclass(frozen=True)
class Study:
    """A study as its file says, checked. One split seed: only training seeds vary, so tests are paired.

    ``comparisons`` are the (method, baseline) pairs that it tests beside the usual ones, ``notebooks`` what reads its
    tables instead of the usual ones.
    """

    name: str
    path: Path
    settings: tuple[Setting, ...]
    methods: tuple[Method, ...]
    seeds: tuple[int, ...]
    split_seed: int
    overrides: Overrides
    comparisons: tuple[tuple[str, str], ...] = ()
    notebooks: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where its tables and figures go."""
        return RESULTS / self.name

    @property
    def data_only(self) -> bool:
        """Whether it trains nothing: a setting that cannot be made is then a finding, not a failure."""
        return not self.methods

    @property
    def reranking(self) -> bool:
        """Whether its methods are re-rankers."""
        return any(method.reranks for method in self.methods)

    def outcome(self, setting: str) -> Path:
        """In a study of data alone: the file with the sentence that refused a setting, empty if nothing did."""
        return self.folder / "outcomes" / f"{setting}.txt"


@dataclass(frozen=True)
class Job:
    """One run of one stage. ``inputs`` maps a parameter to an upstream run folder; ``folder`` is its own."""

    stage: str
    setting: str
    seed: int | None
    method: str | None
    parameters: Mapping[str, Any]
    inputs: Mapping[str, Path]
    folder: Path

    @property
    def notebook(self) -> str:
        """The name of the stage's notebook."""
        return STAGES[self.stage].notebook

    @property
    def label(self) -> str:
        """What people see of the job while a study runs."""
        parts = [self.stage, self.method or "", "" if self.seed is None else f"seed {self.seed}"]
        return f"{' '.join(part for part in parts if part)} ({self.setting})"


def load_study(name: str | Path) -> Study:
    """A study by name (``params/studies/<name>.yaml``) or by the path of its YAML file.

    Raises:
        StudyError: no such study; an unknown or misplaced key, a value of the wrong kind, an unknown dataset,
            shift or method, or one thing listed twice; the sentence names the file and the key.
    """
    path = _study_file(name)
    source = shown(path.resolve())
    content = read_yaml(path)
    _known(source, content, STUDY_KEYS)
    overrides = _overrides(source, content)
    settings = tuple(
        _setting(f"{source}, setting {number}", entry, overrides.get("data", {}))
        for number, entry in enumerate(_list(source, content, "settings", dict), 1)
    )
    data_only = content.get("seeds") == [] == content.get("methods")
    seeds = () if data_only else tuple(_list(source, content, "seeds", int))
    hyperparameters = content.get("hyperparameters", "matched")
    if hyperparameters not in HYPERPARAMETERS:
        raise unknown_key(source, "hyperparameters", hyperparameters, HYPERPARAMETERS)
    methods: tuple[Method, ...] = ()
    if not data_only:
        methods = tuple(load_method(method, hyperparameters) for method in _list(source, content, "methods", str))
        bases = {method.name: method for method in methods}
        sweeps = _list(source, content, "sweeps", dict) if content.get("sweeps", []) != [] else []
        for number, entry in enumerate(sweeps, 1):
            methods += tuple(_swept(f"{source}, sweep {number}", entry, bases))
    named = {"setting": [s.name for s in settings], "method": [m.name for m in methods], "seed": seeds}
    for kind, names in named.items():
        repeated = [name for name in names if names.count(name) > 1]
        if repeated:
            raise StudyError(f"{source}: {kind} {repeated[0]} is listed twice: list it once")
    _alike(source, methods)
    comparisons = _comparisons(source, content, methods)
    if comparisons and methods[0].reranks:
        raise StudyError(f"{source}: re-rankers are compared row by row in their own tables: remove comparisons")
    split_seed = check({"split_seed": 0}, {"split_seed": content.get("split_seed", 0)}, source)["split_seed"]
    notebooks = tuple(_list(source, content, "notebooks", str)) if "notebooks" in content else ()
    for notebook in notebooks:
        if not (NOTEBOOKS / f"{notebook}.ipynb").is_file():
            raise unknown_key(source, "notebook", notebook, sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")))
    study = Study(path.stem, path, settings, methods, seeds, split_seed, overrides, comparisons, notebooks)
    made: dict[Path, str] = {}
    for setting in settings:
        other = made.setdefault(_job(study, "data", setting).folder, setting.name)
        if other != setting.name:
            raise StudyError(f"{source}: settings {other} and {setting.name} are the same data: remove one of them")
    return study


def load_method(name: str, hyperparameters: str = "matched") -> Method:
    """A method by the name of its file in ``params/methods``, with the study's hyper-parameters or its paper's own.

    Raises:
        StudyError: no such method, or a file with unknown keys or values of the wrong kind.
    """
    files = {path.stem: path for path in sorted((PARAMS / "methods").glob("*.yaml"))}
    path = pick(files, name, "method")
    source, content = shown(path), read_yaml(path)
    _known(source, content, METHOD_KEYS)
    missing = [key for key in ("label", "summary") if key not in content]
    if missing:
        raise StudyError(f"{source}: key {missing[0]!r} is missing: a method has a label and a summary")
    text = check({"label": "", "summary": ""}, {key: content[key] for key in ("label", "summary")}, source)
    overrides, assistants = _method_sections(
        source, {key: content[key] for key in METHOD_STAGES if key in content}, files
    )
    # Checked whatever the study uses: a slip is found when it is made.
    published = f"{source}, published"
    own = _section(published, content.get("published"))
    _known(published, own, METHOD_STAGES)
    own_overrides, own_assistants = _method_sections(published, own, files)
    if hyperparameters == "published":
        stages = dict.fromkeys((*overrides, *own_overrides))
        overrides = {stage: {**overrides.get(stage, {}), **own_overrides.get(stage, {})} for stage in stages}
        assistants |= own_assistants
    return Method(name, text["label"], text["summary"], overrides, assistants)


def _method_sections(
    source: str, content: Mapping[str, Any], methods: Iterable[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """A method's overrides by stage, checked, and its assistants, by stage the names of other ``methods``."""
    overrides, assistants = {}, {}
    for stage, given in content.items():
        section = _section(f"{source}, {stage}", given)
        if stage in ("align", "rank") and "assistant" in section:
            assistants[stage] = section.pop("assistant")
            if assistants[stage] not in methods:
                raise unknown_key(f"{source}, {stage}", "assistant", assistants[stage], methods)
        overrides[stage] = _stage_overrides(f"{source}, {stage}", stage, section)
    return overrides, assistants


def _swept(source: str, content: Any, methods: Mapping[str, Method]) -> list[Method]:
    """The methods of a sweep, one per value of one parameter: ``<method>-<key>-<value>``.

    ``key`` may name an entry of options, as in ``loss_options.beta``; the other options then stay as they are. ``with``
    holds parameters of the same stage that all of them share.
    """
    _known(source, content, SWEEP_KEYS)
    missing = [key for key in SWEEP_KEYS[:4] if key not in content]
    if missing:
        raise StudyError(f"{source}: key {missing[0]!r} is missing: a sweep has {', '.join(SWEEP_KEYS[:4])}")
    stage, key = content["stage"], content["key"]
    for kind, value, known in (("method", content["method"], methods), ("stage", stage, METHOD_STAGES)):
        if value not in known:
            raise unknown_key(source, kind, value, known)
    base = methods[content["method"]]
    fixed = _stage_overrides(f"{source}, with", stage, content.get("with", {}))
    base = replace(base, overrides={**base.overrides, stage: {**base.overrides.get(stage, {}), **fixed}})
    option, _, entry = key.partition(".")
    found = []
    for value in _list(source, content, "values", object):
        change = _stage_overrides(f"{source}, {key}", stage, {option: {entry: value} if entry else value})
        name = re.sub(r"[^\w.-]", "_", f"{base.name}-{entry or option}-{value}")
        method = replace(base, name=name, label=f"{base.label}, {key} {value}")
        if entry:
            found.append(replace(method, entries={stage: change}))
        else:
            overrides = {**base.overrides, stage: {**base.overrides.get(stage, {}), **change}}
            found.append(replace(method, overrides=overrides))
    return found


def _alike(source: str, methods: Sequence[Method]) -> None:
    """Refuse what has no place in one table: re-rankers beside methods that rank the catalogue, or both in one."""
    by_kind = {kind: [method for method in methods if method.reranks == kind] for kind in (True, False)}
    if by_kind[True] and by_kind[False]:
        one, other = by_kind[True][0].name, by_kind[False][0].name
        raise StudyError(f"{source}: {one} is a re-ranker and {other} is not: give each kind a study of its own")
    for method in by_kind[True]:
        if others := [stage for stage in method.overrides if stage != "dpo4rec"]:
            raise StudyError(f"{source}: {method.name} is a re-ranker without a stage {others[0]}: remove its section")


def _comparisons(source: str, content: Mapping[str, Any], methods: Sequence[Method]) -> tuple[tuple[str, str], ...]:
    """The pairs under ``comparisons``, each of two different methods of the study."""
    known = [method.name for method in methods]
    pairs = content.get("comparisons") or []
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or pair[0] == pair[1]:
            raise StudyError(f"{source}: comparison {pair!r} is no pair: give [method, baseline]")
        for name in pair:
            if name not in known:
                raise unknown_key(source, "compared method", name, known)
    return tuple((method, baseline) for method, baseline in pairs)


def jobs(study: Study) -> list[Job]:
    """All runs of a study, upstream first: per setting one data run, and per seed training and rank runs.

    The pseudo-environments are mapped once per setting, for the first seed. A re-ranker has one run per setting and
    seed, its whole loop. A run that methods or studies have in common is one folder, and one job. Without seeds there
    are the data runs alone.
    """
    found: dict[tuple[Path, str | None], Job] = {}

    def add(stage: str, *arguments: Any) -> Job:
        job = _job(study, stage, *arguments)
        # Two methods may rank one checkpoint in one way, and each has its row.
        return found.setdefault((job.folder, job.method if stage == "rank" else None), job)

    def trained(method: Method, setting: Setting, seed: int, data: Job) -> Job:
        """The job of a method's checkpoint, those before it added."""
        if method.trained == "sasrec":
            return add("sasrec", setting, seed, method, {"data": data})
        own = method if "sft" in method.overrides else None
        sft = add("sft", setting, seed, own, {"data": data})
        if method.trained == "sft":
            return sft
        return add("align", setting, seed, method, {"data": data, "sft": sft, **assistant(method, "align", seed, data)})

    def assistant(method: Method, stage: str, seed: int, data: Job) -> dict[str, Job]:
        if stage not in method.assistants:
            return {}
        setting = next(each for each in study.settings if each.name == data.setting)
        return {"assistant": trained(load_method(method.assistants[stage]), setting, seed, data)}

    for setting in study.settings:
        data = add("data", setting)
        for seed in study.seeds:
            if study.reranking:
                for method in study.methods:
                    add("dpo4rec", setting, seed, method, {"data": data})
                continue
            if seed == study.seeds[0]:
                sft = add("sft", setting, seed, None, {"data": data})
                add("environments", setting, seed, None, {"data": data, "sft": sft})
            for method in study.methods:
                checkpoint = trained(method, setting, seed, data)
                ends = {"data": data, "checkpoint": checkpoint, **assistant(method, "rank", seed, data)}
                add("rank", setting, seed, method, ends)
    return list(found.values())


def _job(
    study: Study,
    stage: str,
    setting: Setting,
    seed: int | None = None,
    method: Method | None = None,
    inputs: Mapping[str, Job] | None = None,
) -> Job:
    """The job of a stage: its parameters from all layers, and its folder from these."""
    upstream = {key: job.folder for key, job in (inputs or {}).items()}
    name = method.name if method else None
    laid_out = {"dataset": setting.dataset, "shift": setting.shift, "split_seed": study.split_seed}
    laid_out |= {"seed": seed, "method": name, **{key: shown(folder) for key, folder in upstream.items()}}
    defaults = {key: value for key, value in declared(stage).items() if key != "run"}
    parameters = {**defaults, **study.overrides.get(stage, {}), **(method.overrides.get(stage, {}) if method else {})}
    for option, entries in (method.entries.get(stage, {}) if method else {}).items():
        parameters[option] = {**parameters[option], **entries}
    parameters |= setting.overrides.get(stage, {})
    parameters |= {key: value for key, value in laid_out.items() if key in defaults}
    return Job(stage, setting.name, seed, name, parameters, upstream, folder_name(stage, parameters))


# --- reading a study's file ---


def _study_file(name: str | Path) -> Path:
    if Path(name).suffix == ".yaml" or os.sep in str(name):
        return Path(name)
    files = {path.stem: path for path in (PARAMS / "studies").glob("*.yaml")}
    return pick(dict(sorted(files.items())), str(name), "study")


def _setting(source: str, content: Mapping[str, Any], shared: Mapping[str, Any]) -> Setting:
    # Torch-free, but pandas: only who reads a study pays for it.
    from causaldpo_lib.data import DATASETS
    from causaldpo_lib.data.options import check_options, options_of
    from causaldpo_lib.splits import SPLITS, shift_functions

    _known(source, content, SETTING_KEYS)
    for key, table in (("dataset", DATASETS), ("shift", SPLITS)):
        if key not in content:
            raise StudyError(f"{source}: key {key!r} is missing: a setting has a dataset and a shift")
        if content[key] not in table:
            raise unknown_key(source, key, content[key], table)
    dataset, shift, overrides = content["dataset"], content["shift"], _overrides(source, content)
    name = content.get("name", f"{dataset}-{shift}")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise StudyError(f"{source}: name {name!r} cannot name a file: use letters, digits, '-', '_' and '.'")
    options = {**declared("data"), **shared, **overrides.get("data", {})}
    shift_options = {name: value for function in shift_functions(shift) for name, value in options_of(function).items()}
    try:
        check_options(options["dataset_options"], options_of(DATASETS[dataset]), f"dataset {dataset!r}")
        check_options(options["shift_options"], shift_options, f"shift {shift!r}")
    except StudyError as error:
        raise StudyError(f"{source}: {error}") from None
    return Setting(name, dataset, shift, overrides)


def _overrides(source: str, content: Mapping[str, Any]) -> Overrides:
    given = [stage for stage in STAGES if stage in content]
    return {stage: _stage_overrides(f"{source}, {stage}", stage, content[stage]) for stage in given}


def _section(source: str, content: Any) -> dict[str, Any]:
    """A copy of a section's lines; one without any (YAML reads null) is empty."""
    if content is not None and not isinstance(content, dict):
        raise StudyError(f"{source} must hold lines `key: value`, not {content!r}")
    return dict(content or {})


def _stage_overrides(source: str, stage: str, content: Any) -> dict[str, Any]:
    content = _section(source, content)
    for key in content:
        if key in LAID_OUT:
            raise StudyError(f"{source}: {key} comes from the study's settings, methods and seeds: remove it")
    free = {key: value for key, value in declared(stage).items() if key not in LAID_OUT}
    return check(free, content, source)


def _known(source: str, content: Mapping[str, Any], keys: Sequence[str]) -> None:
    for key in content:
        if key not in keys:
            raise unknown_key(source, "key", key, keys)


def _list(source: str, content: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    values = content.get(key)
    wrong = kind is not object and isinstance(values, list) and any(type(value) is not kind for value in values)
    if not isinstance(values, list) or not values or wrong:
        raise StudyError(f"{source}: {key} is {values!r}: give a list of one or more {kind.__name__} values")
    return values


# --- command line ---


def command(
    module: str, about: str | None, write: Callable[[Study], Iterable[Path]], given: Sequence[str] | None
) -> int:
    """What ``python -m causaldpo_lib.<module> STUDY`` does where ``write`` makes a study's tables: print their paths.

    ``about`` is its help; returns 0, or 1 after one sentence about what is wrong.
    """
    parser = argparse.ArgumentParser(prog=f"python -m causaldpo_lib.{module}", description=about)
    parser.add_argument("study", help="name of params/studies/<name>.yaml")
    options = parser.parse_args(given)
    try:
        for path in write(load_study(options.study)):
            print(shown(path))
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a study, or what is missing of it; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m causaldpo_lib.study", description=main.__doc__)
    parser.add_argument("name", help="a file of params/studies (without .yaml), or a path")
    parser.add_argument("--cores", type=int, default=workflow.machine_cores(), help="cores to use in all (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run (%(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="list what would run, and why")
    parser.add_argument("--publish", action="store_true", help="copy to figures/, re-execute all notebooks")
    options = parser.parse_args(arguments)
    try:
        study = load_study(options.name)
        if options.dry_run:
            workflow.show_plan(study, options.cores, options.threads)
        elif options.publish:
            workflow.publish(study)
        else:
            workflow.run(study, options.cores, options.threads)
    except StudyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted: the same command goes on where it stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
