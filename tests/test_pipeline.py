"""Parameters, run folders and code digests: what is refused, what is found again, what makes a result stale."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from causaldpo_lib import parameters, pipeline, records, run, sources
from causaldpo_lib.errors import StudyError
from causaldpo_lib.paths import NOTEBOOKS, PARAMS, ROOT
from causaldpo_lib.pipeline import STAGES, declared, folder_name, load_run, open_run, resolve

SMALL = {"dataset_options": {"users": 9, "items": 9}}


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch) -> Path:
    """Run folders go to a temporary place."""
    monkeypatch.setattr(pipeline, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def finished(stage: str, **given) -> pipeline.Run:
    """A run folder as its stage leaves it, without the work."""
    opened = open_run(stage, resolve(stage, given))
    (opened.folder / "result.csv").write_text("a\n1\n")
    opened.finish(score=0.5)
    return opened


@pytest.fixture
def data() -> str:
    return str(finished("data", **SMALL).folder)


def notebook(path: Path, *cells: str, defaults: str = "n = 1\nrate = 0.1\nname = 'a'\noptions = {}") -> Path:
    tagged = nbformat.v4.new_code_cell(defaults)
    tagged.metadata["tags"] = ["parameters"]
    content = nbformat.v4.new_notebook(cells=[tagged, *map(nbformat.v4.new_code_cell, cells)])
    content.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(content, path)
    return path


# --- parameters ---


def test_every_stage_declares_what_its_function_takes():
    for name, stage in STAGES.items():
        [function] = sources.reached([("stages", stage.function)])["stages", stage.function]
        taken = [argument.arg for argument in function.args.args if argument.arg != "folder"]
        assert [key for key in declared(name) if key != "run"] == taken
        assert set(stage.inputs) <= set(taken)


def test_overrides_update_the_declared_defaults():
    found = resolve("sft", {"epochs": 2})
    assert found == {**declared("sft"), "epochs": 2.0}
    assert isinstance(found["epochs"], float)


@pytest.mark.parametrize(
    ("stage", "overrides", "sentence"),
    [
        ("align", {"mmd_wieght": 1.0}, r"03_.*unknown parameter 'mmd_wieght' \(did you mean 'mmd_weight'\?\)"),
        ("align", {"learning_rate": "1e-05"}, r"learning_rate is the text '1e-05', .* write 1\.0e-5, without"),
        ("align", {"loss_options": {"beta": "5E-1"}}, r"loss_options\.beta is the text '5E-1', .* 5\.0e-1"),
        ("align", {"learning_rate": float("nan")}, "give a finite number"),
        ("align", {"seed": True}, "seed is True, of kind bool: give a value of kind int"),
        ("align", {"seed": 1.5}, "seed is 1.5, of kind float: give a value of kind int"),
        ("align", {"method": False}, "method is False, of kind bool: give a value of kind str"),
        ("data", {"dataset_options": [1]}, "dataset_options is .1., of kind list: give a value of kind dict"),
    ],
)
def test_bad_overrides_are_refused(stage, overrides, sentence):
    with pytest.raises(StudyError, match=sentence):
        resolve(stage, overrides)


def test_the_suggested_number_is_one_to_yaml():
    for text in ("1e-05", "1E5", "-3", "2.5e-3"):
        assert yaml.safe_load(parameters._yaml_number(text)) == float(text)


@pytest.mark.parametrize(
    ("text", "default", "value"),
    [("1e-05", 0.1, 1e-5), ("007", "a", "007"), ("true", False, True), ("{'a': 1}", {}, {"a": 1}), ("3", 1, 3)],
)
def test_command_line_values_are_read_by_the_kind_of_the_default(text, default, value):
    assert parameters.from_text(text, default) == value


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\nb: [\n", "line 3: not valid YAML"),
        ("a: 1\nb: 2\na: 3\n", "line 3: not valid YAML .key 'a' is given twice"),
        ("- 1\n", "must hold lines `key: value`, not a list"),
    ],
)
def test_bad_yaml_is_named_by_file_and_line(tmp_path, text, sentence):
    file = tmp_path / "p.yaml"
    file.write_text(text)
    with pytest.raises(StudyError, match=f"p.yaml.*{sentence}"):
        parameters.read_yaml(file)
    with pytest.raises(StudyError, match=r"none\.yaml cannot be read"):
        parameters.read_yaml(tmp_path / "none.yaml")


def test_no_number_in_params_is_a_text():
    def texts(value):
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from texts(item)
        elif isinstance(value, str):
            yield value

    for file in PARAMS.rglob("*.yaml"):
        assert not [text for text in texts(parameters.read_yaml(file)) if parameters._is_number(text)], file


def test_a_parameters_cell_must_be_one_and_plain(tmp_path):
    with pytest.raises(StudyError, match="its parameters cell cannot be read"):
        parameters.declared_in(notebook(tmp_path / "a.ipynb", defaults="n = 1 + f()"))
    two = nbformat.read(notebook(tmp_path / "b.ipynb", "n = 2"), 4)
    two.cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(two, tmp_path / "b.ipynb")
    with pytest.raises(StudyError, match="has 2 cells tagged"):
        parameters.declared_in(tmp_path / "b.ipynb")


# --- run folders ---


def test_equal_configurations_share_a_folder_and_others_do_not(results):
    base = folder_name("data", declared("data"))
    assert base.parent == results / "runs" / "simulated-environment"
    assert base == folder_name("data", {**declared("data"), "run": "elsewhere"})
    assert base == folder_name("data", dict(reversed(declared("data").items())))
    floats = {name: float(value) for name, value in declared("data")["dataset_options"].items()}
    assert base == folder_name("data", resolve("data", {"dataset_options": floats}))
    assert base != folder_name("data", resolve("data", {"split_seed": 1}))


def test_a_folder_is_named_after_what_it_holds(data):
    sft = folder_name("sft", resolve("sft", {"data": data, "seed": 3}))
    dpo = folder_name("align", resolve("align", {"data": data, "sft": str(sft), "method": "dpo"}))
    rank = folder_name("rank", resolve("rank", {"data": data, "checkpoint": str(dpo)}))
    assert sft.name.startswith("sft-s3-")
    assert dpo.name.startswith("dpo-s1-")
    assert rank.name.startswith("dpo-s1-rank-")
    assert {sft.parent, dpo.parent, rank.parent} == {Path(data).parent}


def test_a_change_upstream_changes_every_folder_downstream():
    first, second = ({"split_seed": seed, **SMALL} for seed in (0, 1))
    names = []
    for given in (first, second):
        data = folder_name("data", resolve("data", given))
        names.append(folder_name("sft", resolve("sft", {"data": str(data)})).name)
    assert names[0] != names[1]


def test_a_run_put_elsewhere_counts_as_itself(data, tmp_path):
    moved = finished("data", **SMALL, run=str(tmp_path / "mine"))
    assert moved.folder == tmp_path / "mine"
    names = {folder_name("sft", resolve("sft", {"data": path})) for path in (data, str(moved.folder))}
    assert len(names) == 1


def test_names_that_leave_the_folder_are_refused(data):
    with pytest.raises(StudyError, match="cannot name a folder"):
        folder_name("align", resolve("align", {"data": data, "sft": data, "method": "../x"}))
    with pytest.raises(StudyError, match=r"02_.*: data is empty"):
        folder_name("sft", declared("sft"))


def test_a_finished_run_is_found_again_and_left_alone():
    first = finished("data", **SMALL)
    again = open_run("data", resolve("data", SMALL))
    assert again.complete
    assert (again.folder / "result.csv").exists()
    assert again.summary["scalars"] == {"score": 0.5}
    assert load_run(first.folder, "data").parameters == first.parameters
    summary = again.summary
    assert summary["versions"]["python"] and summary["wall_seconds"] >= 0 and summary["device"] == "cpu"


def test_a_run_made_from_another_result_of_its_input_is_not_complete(data):
    """The same configuration, run again: its weights are others, so what was made of the old ones is not of it."""
    sft = finished("sft", data=data)
    aligned = {"data": data, "sft": str(sft.folder)}
    finished("align", **aligned)
    assert open_run("align", resolve("align", aligned)).complete
    (sft.folder / "summary.json").unlink()
    sft.finish(score=0.25)
    assert not open_run("align", resolve("align", aligned)).complete


def test_a_data_run_is_complete_as_long_as_its_raw_files_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("CAUSALDPO_DATA", str(tmp_path / "raw"))
    given = {"dataset": "ml-100k", "shift": "popularity", "dataset_options": {}}
    file = tmp_path / "raw" / "ml-100k" / "u.data"

    def complete():
        return open_run("data", resolve("data", given)).complete

    opened = open_run("data", resolve("data", given))  # nothing is there yet: the stage downloads it
    file.parent.mkdir(parents=True)
    file.write_text("1\t2\t3\t4\n")
    opened.finish()
    assert complete() and not pipeline.stale_files(opened.folder, opened.parameters)
    text = file.read_text()
    file.unlink()
    assert complete()  # no raw files, no doubt
    file.write_text(text)  # copied anew
    assert complete()
    file.write_text("1\t2\t3\t5\n")
    assert pipeline.stale_files(opened.folder, opened.parameters) and not complete()
    assert not pipeline.stale_files(opened.folder, opened.parameters)  # cleared: no result, none that is stale


def test_a_named_file_stands_for_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CAUSALDPO_DATA", str(tmp_path))
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom" / "mine.csv").write_text("a")
    own = {"dataset": "custom", "dataset_options": {"file": "mine.csv"}}
    before = pipeline.raw_files(own)
    (tmp_path / "custom" / "another.csv").write_text("b")
    assert pipeline.raw_files(own) == before != {}
    (tmp_path / "custom" / "mine.csv").write_text("c")
    assert pipeline.raw_files(own) != before
    assert pipeline.raw_files({"dataset": "simulated", "dataset_options": {}}) == {}


def test_a_summary_is_strict_json_and_appears_whole(data, monkeypatch):
    folder = Path(data)
    opened = pipeline.Run(folder, "data", declared("data"), "code")
    (folder / "summary.json").unlink()
    monkeypatch.setattr(records.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        opened.finish(score=1)
    assert not (folder / "summary.json").exists()
    monkeypatch.undo()
    opened.finish(score=float("nan"))
    assert json.loads((folder / "summary.json").read_text())["scalars"] == {"score": None}


def test_an_interrupted_run_starts_from_a_clean_folder():
    opened = open_run("data", resolve("data", SMALL))
    (opened.folder / "half.parquet").write_text("")
    (opened.folder / "checkpoint").mkdir()
    (opened.folder / "log.txt").write_text("the log stays")
    again = open_run("data", resolve("data", SMALL))
    assert not again.complete
    assert {path.name for path in again.folder.iterdir()} == {"config.json", "log.txt"}


def test_a_run_of_other_code_is_made_anew(monkeypatch):
    first = finished("data", **SMALL)
    monkeypatch.setattr(pipeline, "library_digest", lambda stage: "edited")
    assert load_run(first.folder, "data").complete  # for a reader it stays usable
    assert not open_run("data", resolve("data", SMALL)).complete


def test_a_run_on_data_of_other_code_is_made_anew(monkeypatch, data):
    sft = finished("sft", data=data)
    digests = {"data": "edited", "sft": pipeline.library_digest("sft")}
    monkeypatch.setattr(pipeline, "library_digest", digests.get)
    finished("data", **SMALL)
    assert not open_run("sft", resolve("sft", {"data": data})).complete
    assert sft.folder == open_run("sft", resolve("sft", {"data": data})).folder


def test_the_folder_of_another_configuration_is_refused_and_stays_usable():
    first = finished("data", **SMALL)
    with pytest.raises(StudyError, match=r"holds the run data-\w+, not data-\w+ \(they differ in split_seed\)"):
        open_run("data", resolve("data", {**SMALL, "split_seed": 1, "run": str(first.folder)}))
    assert load_run(first.folder, "data").summary["scalars"] == {"score": 0.5}


def test_a_folder_with_other_files_is_refused_and_kept(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("x")
    with pytest.raises(StudyError, match="not empty and not a run folder"):
        open_run("data", resolve("data", SMALL), tmp_path / "letters")
    assert (tmp_path / "letters" / "dear.txt").exists()


def test_inputs_must_be_finished_runs_of_the_right_stage_and_data(data, tmp_path):
    with pytest.raises(StudyError, match="'results/none' does not exist: give a finished run of stage data"):
        open_run("sft", resolve("sft", {"data": "results/none"}))
    with pytest.raises(StudyError, match="is not a run folder"):
        load_run(tmp_path, "data")
    with pytest.raises(StudyError, match="holds a run of stage data: give a finished run of stage sft or align"):
        load_run(data, ("sft", "align"))
    opened = open_run("sft", resolve("sft", {"data": data}))
    with pytest.raises(StudyError, match=r"no summary.json, .* run 02_supervised_fine_tuning.ipynb again"):
        load_run(opened.folder, "sft")
    opened.finish()
    other = str(finished("data", **SMALL, split_seed=1).folder)
    with pytest.raises(StudyError, match=r"sft .* was made from .*: give runs made from the same data"):
        open_run("align", resolve("align", {"data": other, "sft": str(opened.folder)}))


def test_damaged_records_are_named(data):
    (Path(data) / "summary.json").write_text('{"stage": "da')
    with pytest.raises(StudyError, match=r"summary.json is damaged"):
        load_run(data, "data")


# --- code digests ---


def modules(stage: str) -> set[str]:
    return {module for module, _ in sources.reached([("stages", STAGES[stage].function)])}


def test_each_stage_depends_on_the_code_it_uses_and_no_other():
    assert {"data", "data.simulated", "splits"} <= modules("data")
    assert {"backbone", "packing", "prompts", "trainers"} <= modules("sft")
    assert {"environments", "losses", "mmd", "pairs", "trainers"} <= modules("align")
    assert {"backbone", "ranking"} <= modules("rank")
    assert "environments" in modules("environments")
    training = {"environments", "losses", "mmd"}
    assert not modules("sft") & training
    assert not modules("rank") & training
    reading = {"evaluation", "stats", "tables", "plots", "takeaways"}
    for stage in STAGES:
        assert not modules(stage) & reading
        found = sources.reached([("stages", STAGES[stage].function)])
        # The oracle of periods, and NDCG@10 on validation, which stops SASRec and chooses a boost's strength.
        chosen_by = {"ndcg_at_k", "gains", "_ranks", "_mean", "_cutoff", "FloatArray"}
        if stage == "dpo4rec":  # whose rewards are a metric, and which measures its own lists
            chosen_by |= {"list_ndcg", "list_average_precision", "_labels", "discounts"}
        assert {name for module, name in found if module == "metrics"} <= {"periods", "", *chosen_by}
    training = {"plots", *modules("align")} - {"metrics"}
    assert not {module for module, _ in sources.reached([("tables", "write")])} & training


def library(folder: Path, **texts: str) -> None:
    """A small package in place of the library."""
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    sources._module.cache_clear()


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "causaldpo_lib"
    monkeypatch.setattr(sources, "PACKAGE", folder)
    a = "from causaldpo_lib import b\nfrom causaldpo_lib.c import TABLE\nimport math\n"
    a += "def start():\n    return b.used(math.pi), TABLE\ndef other():\n    return b.unused()\n"
    texts = {
        "a": a,
        "b": "def used(x):\n    return helper(x)\ndef helper(x):\n    return x\ndef unused():\n    return 0\n",
        "c": "from causaldpo_lib import d\nTABLE = {'one': d.one}\n",
        "d": "def one():\n    return 1\n",
        "errors": "TEXT = 'a'\n",
    }
    library(folder, **texts)
    yield folder
    sources._module.cache_clear()


def edited(package: Path, module: str, old: str, new: str) -> bool:
    """Whether an edit of a module changes the digest of ``a.start``."""
    before = sources.function_digest("a", "start")
    text = (package / f"{module}.py").read_text()
    assert old in text
    library(package, **{module: text.replace(old, new)})
    return sources.function_digest("a", "start") != before


def test_an_edit_counts_where_it_is_reached(package):
    assert edited(package, "a", "return b.used", "return 2 * b.used")
    assert edited(package, "b", "    return x", "    return -x")  # through a function
    assert edited(package, "d", "return 1", "return 2")  # through a table of another module
    assert edited(package, "b", "def used", "print('on import')\ndef used")  # runs whatever is used


def test_an_edit_does_not_count_where_it_is_not_reached(package):
    assert not edited(package, "b", "return 0", "return 1")
    assert not edited(package, "a", "return b.unused()", "return 1")
    assert not edited(package, "b", "    return helper(x)", '    """Text."""\n\n    # why\n    return helper( x )')


def test_a_module_that_is_handed_on_counts_as_a_whole(package):
    assert edited(package, "a", "return b.used(math.pi)", "return getattr(b, 'used')")
    assert edited(package, "b", "return 0", "return 1")


@pytest.mark.parametrize(
    ("imports", "says"),
    [
        ("from . import b", "line 1: a relative import"),
        ("from .b import used", "line 1: a relative import"),
        ("def f():\n    import causaldpo_lib.b", "line 2: import causaldpo_lib.b"),
    ],
)
def test_an_import_that_no_digest_would_follow_is_refused(package, imports, says):
    library(package, e=f"{imports}\ndef start():\n    return 1\n")
    with pytest.raises(StudyError, match=says):
        sources.function_digest("e", "start")
    library(package, e="import causaldpo_lib.b as b\ndef start():\n    return b.used(1)\n")
    assert ("b", "used") in sources.reached([("e", "start")])


def test_fields_that_another_python_adds_do_not_count(package, monkeypatch):
    before = sources.function_digest("a", "start")
    for kind in (ast.FunctionDef, ast.Call):
        monkeypatch.setattr(kind, "_fields", (*kind._fields, "type_params_to_come"))
    monkeypatch.setattr(ast.AST, "type_params_to_come", [], raising=False)
    sources._module.cache_clear()
    assert sources.function_digest("a", "start") == before


def test_saved_outputs_and_texts_are_no_code(tmp_path):
    path = notebook(tmp_path / "a.ipynb", "1 + 1")
    before = sources.notebook_digest(path)
    content = nbformat.read(path, 4)
    content.cells[1].outputs = [nbformat.v4.new_output("stream", text="2")]
    content.cells[1].execution_count = 2
    content.cells.append(nbformat.v4.new_markdown_cell("text"))
    nbformat.write(content, path)
    assert sources.notebook_digest(path) == before
    content.cells[1].source = "1 + 2"
    nbformat.write(content, path)
    assert sources.notebook_digest(path) != before


# --- one notebook through papermill ---


def test_everything_is_checked_before_anything_starts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "run_notebook", lambda *_: pytest.fail("started"))
    path = str(notebook(tmp_path / "a.ipynb"))
    (tmp_path / "p.yaml").write_text("rate: 1e-05\n")
    for arguments, sentence in [
        ([path, "-p", "m", "1"], "a.ipynb: unknown parameter 'm'"),
        ([path, "-p", "n", "1.5"], "n is 1.5, of kind float: give a value of kind int"),
        ([path, "-f", str(tmp_path / "p.yaml")], "p.yaml for a.ipynb: rate is the text '1e-05', not a number"),
        ([path, "-y", "{"], "is not JSON"),
        ([path, "-o", path], "is the notebook itself"),
        (["08_results_tables", "-p", "tabels", "x"], "unknown parameter 'tabels' (did you mean 'tables'?)"),
        (["03_prefrence_alignment"], "(did you mean '03_preference_alignment'?)"),
    ]:
        assert run.main(arguments) == 1
        said = capsys.readouterr().err.strip()
        assert sentence in said
        assert said.startswith("error: ") and len(said.splitlines()) == 1


def test_later_options_win(tmp_path):
    path = notebook(tmp_path / "a.ipynb")
    (tmp_path / "p.yaml").write_text("n: 2\nname: file\n")
    found = run.parameters_of(path, [tmp_path / "p.yaml"], '{"name": "json"}', [("rate", "1e-05")])
    assert found == {"n": 2, "name": "json", "rate": 1e-5}


def test_a_failing_notebook_is_kept_with_one_sentence(tmp_path):
    body = "print(n, rate, flush=True)\nfrom causaldpo_lib.errors import StudyError\nraise StudyError('no such thing')"
    path = notebook(tmp_path / "a.ipynb", body)
    command = [sys.executable, "-m", "causaldpo_lib.run", str(path), "-p", "rate", "1e-05", "-o"]
    done = subprocess.run([*command, str(tmp_path / "out.ipynb")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == "1 1e-05\n"
    assert done.stderr.strip().splitlines() == [f"error: no such thing (executed copy: {tmp_path / 'out.ipynb'})"]
    kept = nbformat.read(tmp_path / "out.ipynb", 4)
    assert [o.ename for cell in kept.cells for o in cell.get("outputs", []) if o.output_type == "error"] == [
        "StudyError"
    ]


def test_other_errors_name_the_cell():
    found = run.failure("03.ipynb", 5, "KeyError", "'item'\nmore")
    assert str(found) == "Cell 5 of 03.ipynb failed: KeyError: 'item'"


def test_notebooks_are_found_by_name():
    assert run.find_notebook("01_data_and_shifts") == NOTEBOOKS / "01_data_and_shifts.ipynb"
    assert run.find_notebook("notebooks/01_data_and_shifts.ipynb").name == "01_data_and_shifts.ipynb"
