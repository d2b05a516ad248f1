"""Studies: what their files may say, which runs they consist of, and what a change makes Snakemake run again."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import nbformat
import pytest
import yaml

from causaldpo_lib import pipeline, study, survey, tables, workflow
from causaldpo_lib.errors import StudyError
from causaldpo_lib.paths import PARAMS, ROOT
from causaldpo_lib.pipeline import STAGES
from causaldpo_lib.study import jobs, load_method, load_study

READING = {f"{name} of quick" for name in workflow.READING}
END = {"tables of quick", *READING}
ALIGNED = ("dpo", "s_dpo", "causal_dpo", "shuffled", "popularity_negatives", "causal_negatives")
METHODS = ("sft", "sasrec", *ALIGNED)
SEEDS = (1, 2, 3)


def steps(stage: str, methods=("",), seeds=SEEDS) -> set[str]:
    """The labels of a stage's steps in the quick study."""
    return {
        " ".join(part for part in (stage, method, f"seed {seed}", "(simulated-environment)") if part)
        for method in methods
        for seed in seeds
    }


# --- files ---


@pytest.mark.parametrize("path", sorted((PARAMS / "studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_loads_and_every_key_says_what_it_means(path):
    loaded = load_study(path.stem)
    assert jobs(loaded)
    assert loaded.data_only or len(loaded.seeds) >= 3


@pytest.mark.parametrize("path", sorted((PARAMS / "methods").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_method_loads(path):
    method = load_method(path.stem)
    assert method.label and method.summary


@pytest.mark.parametrize("path", sorted(PARAMS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_value_in_params_has_a_comment(path):
    for line in path.read_text().splitlines():
        key, _, value = line.strip().removeprefix("- ").partition(":")
        if line.strip() and not line.strip().startswith("#") and value.split("#")[0].strip():
            repeated = [other for other in path.read_text().splitlines() if f"{key}:" in other and "#" in other]
            assert repeated or key in ("label", "summary"), line


QUICK = yaml.safe_load((PARAMS / "studies" / "quick.yaml").read_text())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sedes": [1]}, r"unknown key 'sedes' \(did you mean 'seeds'\?\)"),
        ({"settings": [{"dataset": "ml-100", "shift": "iid"}]}, r"setting 1: unknown dataset 'ml-100' \(did"),
        ({"settings": [{"dataset": "simulated", "shift": "populrity"}]}, r"unknown shift 'populrity' \(did you"),
        ({"settings": [{"dataset": "simulated"}]}, "setting 1: key 'shift' is missing"),
        (
            {"settings": [{"dataset": "simulated", "shift": "iid", "data": {"test_example": 3}}]},
            r"setting 1, data: unknown parameter 'test_example' \(did you mean 'test_examples'\?\)",
        ),
        (
            {"settings": [{"dataset": "simulated", "shift": "iid", "data": {"dataset_options": {"user": 3}}}]},
            "setting 1: unknown option of dataset 'simulated' 'user'",
        ),
        ({"settings": [QUICK["settings"][0]] * 2}, "setting simulated-environment is listed twice"),
        ({"methods": ["dpo", "causal-dpo"]}, r"unknown method 'causal-dpo' \(did you mean 'causal_dpo'\?\)"),
        ({"methods": ["dpo", "dpo"]}, "method dpo is listed twice"),
        ({"seeds": []}, "seeds is .*: give a list of one or more int values"),
        ({"methods": []}, "methods is .*: give a list of one or more str values"),
        ({"settings": [{**QUICK["settings"][0], "name": "a/b"}]}, "setting 1: name 'a/b' cannot name a file"),
        (
            {"settings": [QUICK["settings"][0], {**QUICK["settings"][0], "name": "again"}]},
            "settings simulated-environment and again are the same data: remove one of them",
        ),
        (
            {"settings": [{"dataset": "simulated", "shift": "iid", "data": {"shift_options": {"min_users": 3}}}]},
            "setting 1: unknown option of shift 'iid' 'min_users'",
        ),
        ({"seeds": [1, "2"]}, "seeds is .*: give a list of one or more int values"),
        ({"split_seed": "0"}, "split_seed is the text '0', not a number"),
        ({"align": {"learning_rate": "1e-05"}}, r"align: learning_rate is the text '1e-05', .* write 1.0e-5"),
        ({"align": {"seed": 2}}, "align: seed comes from the study's settings, methods and seeds: remove it"),
        ({"sft": 3}, "sft must hold lines `key: value`, not 3"),
    ],
)
def test_a_bad_study_is_refused_with_file_and_key(tmp_path, change, sentence):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump({**QUICK, **change}))
    with pytest.raises(StudyError, match=sentence) as caught:
        load_study(file)
    assert "mine.yaml" in str(caught.value) or "method 'causal-dpo'" in str(caught.value)


def test_an_unknown_study_ends_with_one_sentence(capsys):
    assert study.main(["quikc"]) == 1
    said = capsys.readouterr().err
    known = ", ".join(sorted(path.stem for path in (PARAMS / "studies").glob("*.yaml")))
    assert said == f"error: unknown study 'quikc' (did you mean 'quick'?): choose from {known}\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("label: A\n", "key 'summary' is missing"),
        ("label: A\nsummary: B\nalign: {mmd_wait: 1.0}\n", "x.yaml, align: unknown parameter 'mmd_wait'"),
        ("label: A\nsummary: B\nalgin: {}\n", r"unknown key 'algin' \(did you mean 'align'\?\)"),
        ("label: A\nsummary: B\nrank: {assistant: sasrek}\n", "x.yaml, rank: unknown assistant 'sasrek'"),
        ("label: A\nsummary: B\nsft: {assistant: x}\n", "x.yaml, sft: assistant comes from the study's"),
        ("label: A\nsummary: B\npublished: {data: {}}\n", "x.yaml, published: unknown key 'data'"),
        ("label: A\nsummary: B\npublished: 3\n", "x.yaml, published must hold lines `key: value`, not 3"),
        ("label: A\nsummary: B\nalign: 3\n", "x.yaml, align must hold lines `key: value`, not 3"),
        (
            "label: A\nsummary: B\npublished: {align: {mmd_wait: 1.0}}\n",
            "x.yaml, published, align: unknown parameter 'mmd_wait'",
        ),
        (
            "label: A\nsummary: B\npublished: {rank: {assistant: sasrek}}\n",
            "x.yaml, published, rank: unknown assistant 'sasrek'",
        ),
        ("label: no\nsummary: B\n", "label is False"),
    ],
)
def test_a_bad_method_is_refused(tmp_path, monkeypatch, text, sentence):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "x.yaml").write_text(text)
    monkeypatch.setattr(study, "PARAMS", tmp_path)
    with pytest.raises(StudyError, match=sentence):
        load_method("x")


@pytest.mark.parametrize("kind", study.HYPERPARAMETERS)
@pytest.mark.parametrize("published", ["", "published:\n", "published: {align: }\n", "published: {sft: , align: {}}\n"])
def test_empty_sections_are_sections_without_lines(tmp_path, monkeypatch, kind, published):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "x.yaml").write_text(f"label: A\nsummary: B\nalign:\n{published}")
    monkeypatch.setattr(study, "PARAMS", tmp_path)
    method = load_method("x", kind)
    assert method.trained == "align" and method.overrides["align"] == {}
    assert ("sft" in method.overrides) == ("sft" in published and kind == "published")


def test_an_empty_section_of_a_study_changes_nothing(tmp_path):
    settings = [{**QUICK["settings"][0], "align": None}]
    assert jobs(written(tmp_path, settings=settings, rank=None)) == jobs(written(tmp_path))


# --- jobs ---


def test_the_quick_study_is_these_runs():
    found = jobs(load_study("quick"))
    counts = Counter(job.stage for job in found)
    assert counts == {"data": 1, "sft": 3, "sasrec": 3, "align": 18, "rank": 24, "environments": 1}
    assert len({job.folder for job in found}) == len(found)
    seen = set()
    for job in found:  # upstream first, and the parameters point there
        assert set(job.inputs.values()) <= seen
        assert set(job.inputs) == set(STAGES[job.stage].inputs)
        assert job.folder == pipeline.folder_name(job.stage, job.parameters)
        seen.add(job.folder)


def test_methods_differ_only_in_what_their_files_say():
    aligned = {job.method: job.parameters for job in jobs(load_study("quick")) if job.stage == "align"}
    differing = {key for key in aligned["dpo"] if len({str(p[key]) for p in aligned.values()}) > 1}
    assert differing == {"method", "memberships", "mmd_weight", "loss", "negatives", "negatives_per_prompt"}
    core = {name: aligned[name] for name in ("dpo", "causal_dpo", "shuffled")}
    differing = {key for key in core["dpo"] if len({str(p[key]) for p in core.values()}) > 1}
    assert differing == {"method", "memberships", "mmd_weight"}


def test_a_setting_wins_over_a_method_and_a_method_over_the_study(tmp_path):
    setting = {**QUICK["settings"][0], "align": {"epochs": 7.0}}
    content = {**QUICK, "settings": [setting], "align": {"epochs": 5.0, "mmd_weight": 9.0, "batch_size": 8}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    aligned = {j.method: j.parameters for j in jobs(load_study(tmp_path / "mine.yaml")) if j.stage == "align"}
    assert {p["epochs"] for p in aligned.values()} == {7.0}
    assert aligned["dpo"]["mmd_weight"] == 0.0
    assert {p["batch_size"] for p in aligned.values()} == {8}


def test_studies_share_the_runs_they_have_in_common(tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**QUICK, "seeds": [3, 4], "methods": ["dpo"]}))
    folders = [{job.folder for job in jobs(load_study(name))} for name in ("quick", tmp_path / "mine.yaml")]
    labels = {"data", "sft-s3", "dpo-s3", "dpo-s3-rank"}
    assert {folder.name.rpartition("-")[0] for folder in folders[0] & folders[1]} == labels


def test_settings_of_one_dataset_and_shift_are_told_apart_by_name(tmp_path):
    first = {**QUICK["settings"][0], "shift": "temporal", "data": {"shift_options": {"min_user": 6}}}
    second = {**first, "name": "by-user", "data": {"shift_options": {"scope": "user"}}}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**QUICK, "settings": [first, second], "seeds": [1]}))
    found = jobs(load_study(tmp_path / "mine.yaml"))
    assert Counter(job.setting for job in found) == {"simulated-temporal": 18, "by-user": 18}
    assert len({job.folder for job in found}) == 36
    options = {job.setting: job.parameters["shift_options"] for job in found if job.stage == "data"}
    assert options == {"simulated-temporal": {"min_user": 6}, "by-user": {"scope": "user"}}
    assert workflow.tables_of(load_study(tmp_path / "mine.yaml"))[-1] == "points-by-user"


def written(tmp_path, **change) -> study.Study:
    """The quick study for one seed with something changed."""
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**QUICK, "seeds": [1], **change}))
    return load_study(tmp_path / "mine.yaml")


def test_a_sweep_is_one_method_a_value_that_differs_in_it_alone(tmp_path):
    sweeps = [
        {"method": "causal_dpo", "stage": "align", "key": "mmd_weight", "values": [0.1, 10.0]},
        {"method": "dpo", "stage": "align", "key": "loss_options.beta", "values": [2.0], "with": {"epochs": 3.0}},
        {"method": "dpo", "stage": "sft", "key": "backbone", "values": ["a/b"]},
    ]
    found = jobs(written(tmp_path, methods=["sft", "dpo", "causal_dpo"], sweeps=sweeps))
    aligned = {job.method: job for job in found if job.stage == "align"}
    swept = ["causal_dpo-mmd_weight-0.1", "causal_dpo-mmd_weight-10.0", "dpo-beta-2.0", "dpo-backbone-a_b"]
    assert list(aligned) == ["dpo", "causal_dpo", *swept]
    for name, change in (
        (swept[1], {"mmd_weight": 10.0}),
        (swept[2], {"loss_options": {**QUICK["align"]["loss_options"], "beta": 2.0}, "epochs": 3.0}),
    ):
        base = aligned[name.partition("-")[0]].parameters
        assert aligned[name].parameters == {**base, "method": name, **change}
    own = next(job for job in found if job.folder == aligned[swept[3]].inputs["sft"])
    assert own.parameters["backbone"] == "a/b" and own.method == swept[3]
    assert aligned["dpo"].inputs["sft"] == aligned[swept[1]].inputs["sft"] != own.folder


def test_a_study_uses_its_own_hyperparameters_or_those_of_the_papers(tmp_path):
    betas = {}
    for kind in ("matched", "published"):
        found = jobs(written(tmp_path, methods=["dpo", "causal_dpo", "rose_po"], hyperparameters=kind))
        betas[kind] = {j.method: j.parameters["loss_options"]["beta"] for j in found if j.stage == "align"}
        drawn = {j.method: j.parameters["negatives"] for j in found if j.stage == "align"}
        assert (drawn["rose_po"] == "self_generated") == (kind == "published")
    assert betas == {
        "matched": {"dpo": 1.0, "causal_dpo": 1.0, "rose_po": 1.0},
        "published": {"dpo": 0.1, "causal_dpo": 2.0, "rose_po": 1.0},
    }


def test_an_assistant_is_trained_first_even_if_it_is_no_row(tmp_path):
    found = jobs(written(tmp_path, methods=["d3", "rose_po", "sft"]))
    [assistant] = [job.folder for job in found if job.stage == "sasrec"]
    by_label = {job.label.partition(" seed")[0]: job for job in found}
    assert by_label["rank d3"].inputs["assistant"] == by_label["align rose_po"].inputs["assistant"] == assistant
    assert "assistant" not in by_label["rank sft"].inputs
    place = {job.folder: index for index, job in enumerate(found)}
    assert place[assistant] < place[by_label["rank d3"].folder]


def test_methods_that_rank_one_checkpoint_alike_have_a_row_each(tmp_path):
    sweeps = [{"method": "sft", "stage": "rank", "key": "beam_width", "values": [0]}]
    found = [job for job in jobs(written(tmp_path, methods=["sft"], sweeps=sweeps)) if job.stage == "rank"]
    assert [job.method for job in found] == ["sft", "sft-beam_width-0"]
    assert found[0].folder == found[1].folder


def test_comparisons_are_pairs_of_the_study(tmp_path):
    loaded = written(tmp_path, comparisons=[["dpo", "s_dpo"]])
    assert loaded.comparisons == (("dpo", "s_dpo"),)


def test_a_study_may_name_the_notebooks_that_read_it(tmp_path):
    assert workflow.reading(written(tmp_path, notebooks=["13_dynamicpo"])) == ("13_dynamicpo",)
    assert workflow.reading(load_study("quick")) == workflow.READING


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hyperparameters": "publsihed"}, "unknown hyperparameters 'publsihed'"),
        ({"comparisons": [["dpo", "ipo"]]}, "unknown compared method 'ipo'"),
        ({"comparisons": ["dpo"]}, "comparison 'dpo' is no pair"),
        ({"notebooks": ["8_results_tables"]}, "unknown notebook '8_results_tables'"),
        ({"sweeps": ["dpo"]}, "sweeps is .*: give a list of one or more dict values"),
        ({"sweeps": [{"method": "dpo"}]}, "sweep 1: key 'stage' is missing"),
        ({"sweeps": [{"method": "ipo", "stage": "align", "key": "k", "values": [1]}]}, "unknown method 'ipo'"),
        ({"sweeps": [{"method": "dpo", "stage": "algin", "key": "k", "values": [1]}]}, "unknown stage 'algin'"),
        ({"sweeps": [{"method": "dpo", "stage": "align", "key": "beta", "values": [1]}]}, "unknown parameter 'beta'"),
        ({"sweeps": [{"method": "dpo", "stage": "align", "key": "epochs", "values": []}]}, "sweep 1: values is"),
    ],
)
def test_a_bad_sweep_or_comparison_is_refused(tmp_path, change, sentence):
    with pytest.raises(StudyError, match=sentence):
        written(tmp_path, **change)


def test_the_workflow_expects_the_tables_that_are_written():
    assert set(workflow.TABLES) == {*tables.TABLES, *tables.LATER}


def test_a_study_of_data_alone_has_data_runs_only(tmp_path):
    content = {key: QUICK[key] for key in ("settings", "data")} | {"methods": [], "seeds": []}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    study = load_study(tmp_path / "mine.yaml")
    [job] = jobs(study)
    assert study.data_only and job.stage == "data"
    assert job.folder in {each.folder for each in jobs(load_study("quick"))}  # the run of the other study
    assert workflow.tables_of(study) == survey.TABLES


# --- what a change makes Snakemake run again ---


def copy_of_the_project(target: Path) -> Path:
    """What a study needs, elsewhere: the library finds its folders from its own place."""
    for folder in ("causaldpo_lib", "notebooks", "params"):
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copyfile(ROOT / "Snakefile", target / "Snakefile")
    return target


def command(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command of the copy, which must not meet the library that is being tested."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([sys.executable, "-m", *arguments], cwd=tree, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A copy of the project in which the quick study is finished, as far as Snakemake can tell."""
    tree = copy_of_the_project(tmp_path_factory.mktemp("finished") / "project")
    quick = load_study("quick")
    folder = tree / "results" / "quick"
    names = [f"{name}.csv" for name in (*workflow.TABLES, "points-simulated-environment")]
    files = [tree / job.folder.relative_to(ROOT) / "summary.json" for job in jobs(quick)]
    files += [folder / name for name in names]
    files += [folder / "notebooks" / f".{name}.done" for name in workflow.READING]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")
    touched = command(tree, "snakemake", "--touch", "--forceall", "--cores", "1", "--config", "study=quick")
    assert touched.returncode == 0, touched.stderr
    return tree


@pytest.fixture
def tree(finished, tmp_path) -> Path:
    """A copy of the finished study, to change."""
    return shutil.copytree(finished, tmp_path / "project")


def planned(tree: Path) -> set[str]:
    """The steps that the study would run now."""
    done = command(tree, "causaldpo_lib.study", "quick", "--dry-run")
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.strip().splitlines()
    assert last == f"study quick: {len(lines)} steps would run" if lines else "study quick: nothing to do"
    return {line.rpartition(": ")[0] for line in lines}


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def add_code(tree: Path, *modules: str) -> None:
    """Change what modules do on import, for everyone who uses anything of them."""
    for module in modules:
        with (tree / "causaldpo_lib" / f"{module}.py").open("a") as file:
            file.write("\nassert True\n")


def test_other_raw_files_make_the_data_anew(tree, tmp_path, monkeypatch):
    (tmp_path / "raw" / "simulated").mkdir(parents=True)
    (tmp_path / "raw" / "simulated" / "ratings.csv").write_text("another")
    monkeypatch.setenv("CAUSALDPO_DATA", str(tmp_path / "raw"))
    assert planned(tree) == set()  # of files that a run does not record nothing is known
    (summary,) = (tree / "results" / "runs").glob("*/data-*/summary.json")
    before = summary.stat()
    summary.write_text('{"inputs": {"files": "what it was made from"}}')
    os.utime(summary, ns=(before.st_atime_ns, before.st_mtime_ns))
    done = command(tree, "causaldpo_lib.study", "quick", "--dry-run")
    assert "data (simulated-environment): its raw files are others\n" in done.stdout
    assert "sft seed 1 (simulated-environment): an input" in done.stdout


def test_saving_notebooks_and_rewording_code_runs_nothing(tree):
    for path in (tree / "notebooks").glob("*.ipynb"):
        content = nbformat.read(path, 4)
        content.cells.append(nbformat.v4.new_markdown_cell("A remark."))
        for cell in content.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [nbformat.v4.new_output("stream", text="x")], 1
        nbformat.write(content, path)
    for module in ("mmd", "trainers", "stats", "plots", "pipeline", "study"):
        with (tree / "causaldpo_lib" / f"{module}.py").open("a") as file:
            file.write("\n# A remark.\n")
    edit(tree / "params/studies/quick.yaml", "settings:", "# A remark.\nsettings:")
    edit(tree / "params/methods/dpo.yaml", "label: DPO", "label: DPO, renamed")
    assert planned(tree) == set()


def test_a_changed_value_runs_its_stage_and_what_follows(tree):
    path = tree / "params/studies/quick.yaml"
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**content, "align": {**content["align"], "batch_size": 17}}))
    aligned = ALIGNED
    assert planned(tree) == steps("align", aligned) | steps("rank", aligned) | END
    path.write_text(yaml.safe_dump(content))
    assert planned(tree) == set()  # the runs of before are still there


def test_a_changed_method_runs_only_itself(tree):
    edit(tree / "params/methods/causal_dpo.yaml", "mmd_weight: 1.0", "mmd_weight: 2.0")
    assert planned(tree) == steps("align", ["causal_dpo"]) | steps("rank", ["causal_dpo"]) | END


def test_an_edited_code_cell_runs_its_stage_and_what_follows(tree):
    path = next((tree / "notebooks").glob("04_*.ipynb"))
    content = nbformat.read(path, 4)
    content.cells.append(nbformat.v4.new_code_cell("print('more')"))
    nbformat.write(content, path)
    assert planned(tree) == steps("rank", METHODS) | END


def test_an_edited_penalty_runs_alignment_but_not_fine_tuning(tree):
    add_code(tree, "mmd")
    aligned = ALIGNED
    # the map's diagnostics weigh environments as the penalty does
    again = steps("align", aligned) | steps("rank", aligned) | steps("environments", seeds=[1])
    assert planned(tree) == again | END


def test_edited_environments_run_alignment_and_their_map(tree):
    add_code(tree, "environments", "losses")
    aligned = ALIGNED
    again = steps("align", aligned) | steps("rank", aligned) | steps("environments", seeds=[1])
    assert planned(tree) == again | END


def test_edited_figures_and_statistics_do_not_train(tree):
    add_code(tree, "plots")
    assert planned(tree) == READING
    add_code(tree, "stats")
    assert planned(tree) == END


def test_a_new_seed_runs_only_its_runs(tree):
    edit(tree / "params/studies/quick.yaml", "seeds: [1, 2, 3]", "seeds: [1, 2, 3, 4]")
    new = (
        steps("sft", seeds=[4])
        | steps("align", ALIGNED, [4])
        | steps("sasrec", ["sasrec"], [4])
        | steps("rank", METHODS, [4])
    )
    assert planned(tree) == new | END


def test_a_run_without_its_summary_runs_again_with_what_follows(tree):
    [summary] = (tree / "results/runs/simulated-environment").glob("dpo-s2-rank-*/summary.json")
    summary.unlink()
    assert planned(tree) == steps("rank", ["dpo"], [2]) | END


# --- running ---

BROKEN = """
from causaldpo_lib import pipeline
from causaldpo_lib.errors import StudyError

def execute(stage, namespace):
    parameters = {name: namespace[name] for name in pipeline.declared(stage)}
    run = pipeline.open_run(stage, pipeline.resolve(stage, parameters))
    if not run.complete:
        print("working on", stage, flush=True)
        if stage == "sft":
            raise StudyError("the cable is loose: push it in")
        run.finish(value=1)
    return run

def prepare_data(): ...
def fine_tune(): ...
def align(): ...
def fit_sequential(): ...
def rank(): ...
def infer_environments(): ...
"""


def test_a_failing_notebook_is_kept_and_what_is_done_stays_done(tmp_path):
    tree = copy_of_the_project(tmp_path)
    (tree / "causaldpo_lib/stages.py").write_text(BROKEN)
    for name, stage in STAGES.items():
        path = tree / "notebooks" / stage.path.name
        bare = nbformat.read(path, 4)
        bare.cells = [cell for cell in bare.cells if "parameters" in cell.metadata.get("tags", [])]
        run = f"from causaldpo_lib import stages\nstages.execute({name!r}, globals())"
        bare.cells.append(nbformat.v4.new_code_cell(run))
        nbformat.write(bare, path)
    content = yaml.safe_load((tree / "params/studies/quick.yaml").read_text())
    content |= {"seeds": [1], "methods": ["sft"]}
    (tree / "params/studies/quick.yaml").write_text(yaml.safe_dump(content))
    done = command(tree, "causaldpo_lib.study", "quick", "--cores", "1")
    assert done.returncode == 1
    assert re.search(r"1 of 8 steps done, .*: data \(simulated-environment\)", done.stdout)
    [folder] = (tree / "results/runs/simulated-environment").glob("sft-s1-*")
    shown = folder.relative_to(tree).as_posix()
    assert done.stderr.strip().splitlines() == [
        "FAILED sft seed 1 (simulated-environment)",
        f"  error: the cable is loose: push it in (executed copy: {shown}/notebook.ipynb)",
        f"  {shown}/notebook.ipynb",
        f"  {shown}/log.txt",
        "error: 1 step of study quick failed, see above: mend the cause; `make study STUDY=quick` goes on",
    ]
    cells = json.loads((folder / "notebook.ipynb").read_text())["cells"]
    errors = [o for cell in cells for o in cell.get("outputs", []) if o["output_type"] == "error"]
    assert [error["ename"] for error in errors] == ["StudyError"]
    assert "working on sft" in (folder / "log.txt").read_text()
    left = {"environments seed 1 (simulated-environment)", "rank sft seed 1 (simulated-environment)"}
    assert planned(tree) == steps("sft", seeds=[1]) | left | END
    refused = command(tree, "causaldpo_lib.study", "quick", "--publish")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: study quick is not up to date (7 steps are left): run")
    assert not (tree / "figures").exists()


ALONE = """
from causaldpo_lib import pipeline
from causaldpo_lib.errors import StudyError

def execute(stage, namespace):
    parameters = {name: namespace[name] for name in pipeline.declared(stage)}
    if parameters["shift"] == "popularity":
        raise StudyError("nothing is left: lower these options")
    if parameters["shift"] == "temporal" and not (pipeline.RESULTS / "mended").exists():
        raise KeyError("a slip in the code")
    run = pipeline.open_run(stage, pipeline.resolve(stage, parameters))
    if not run.complete:
        run.finish(value=1)
    return run

def prepare_data(): ...
def fine_tune(): ...
def align(): ...
def fit_sequential(): ...
def rank(): ...
def infer_environments(): ...
"""
WRITES = """
import sys
from causaldpo_lib.study import jobs, load_study

TABLES = {tables!r}

def write(study):
    for name in TABLES:
        said = [f"{{job.setting}}: {{study.outcome(job.setting).read_text()}}" for job in jobs(study)]
        (study.folder / f"{{name}}.csv").write_text("\\n".join(said))

def summary_text(folder):
    return (folder / "datasets.csv").read_text()

if __name__ == "__main__":
    write(load_study(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_refused_setting_is_a_finding_and_a_broken_one_a_failure(tmp_path):
    tree = copy_of_the_project(tmp_path)
    (tree / "causaldpo_lib/stages.py").write_text(ALONE)
    (tree / "causaldpo_lib/survey.py").write_text(WRITES.format(tables=survey.TABLES))
    for path, use in {"01_data_and_shifts": "stages.execute('data', globals())", "09_all_datasets": "stages"}.items():
        file = tree / "notebooks" / f"{path}.ipynb"
        bare = nbformat.read(file, 4)
        bare.cells = [cell for cell in bare.cells if "parameters" in cell.metadata.get("tags", [])]
        bare.cells.append(nbformat.v4.new_code_cell(f"from causaldpo_lib import stages\n{use}"))
        nbformat.write(bare, file)
    settings = [{"dataset": "simulated", "shift": shift} for shift in ("popularity", "temporal")]
    content = {"settings": settings, "methods": [], "seeds": []}
    (tree / "params/studies/mine.yaml").write_text(yaml.safe_dump(content))
    broken = command(tree, "causaldpo_lib.study", "mine", "--cores", "1")
    assert broken.returncode == 1
    assert "FAILED data (simulated-temporal)" in broken.stderr and "KeyError: 'a slip in the code'" in broken.stderr
    assert "popularity" not in broken.stderr and not (tree / "results/mine/datasets.csv").exists()
    (tree / "results/mended").touch()
    mended = command(tree, "causaldpo_lib.study", "mine", "--cores", "1")
    assert mended.returncode == 0, mended.stdout + mended.stderr
    [said] = [line for line in mended.stdout.splitlines() if line.startswith("simulated-popularity: ")]
    assert said.startswith("simulated-popularity: error: nothing is left: lower these options")
    assert "simulated-temporal: \n" in mended.stdout
    # nothing is left to do, but what was refused is tried again by the next run
    done = command(tree, "causaldpo_lib.study", "mine", "--dry-run")
    assert done.stdout == "study mine: nothing to do\n"
    again = command(tree, "causaldpo_lib.study", "mine", "--cores", "1")
    assert re.search(r"1 of 3 steps done, .*: data \(simulated-popularity\)", again.stdout), again.stdout
    assert "(simulated-temporal)" not in again.stdout
