"""The paper's own setting, as a lab with GPUs would run it: its plan, and its notebooks with a small random Llama."""

import json
import re

import pandas as pd
import pytest
from conftest import small_model

from benchmarks.publisher_files import write_movielens
from causaldpo_lib import workflow
from causaldpo_lib.backbone import train_tokenizer
from causaldpo_lib.paths import RESULTS
from causaldpo_lib.run import find_notebook, run_notebook
from causaldpo_lib.study import jobs, load_study

# What makes an hour of eight cards a minute of one core; all else is as the study's file says.
SMALLER = {
    "data": {"test_examples": 20, "validation_examples": 10},
    "sft": {"epochs": 0.02},
    "sasrec": {"epochs": 2},
    "align": {"train_examples": 64, "epochs": 1.0},
    "rank": {},
}


@pytest.mark.slow
def test_the_papers_study_can_be_planned():
    study = load_study("paper")
    steps = workflow.plan(study)
    # Two methods may rank one checkpoint alike; tables and reading notebooks come on top.
    runs = {job.folder for job in jobs(study) if not job.folder.is_relative_to(RESULTS) or not job.folder.exists()}
    assert len(steps) == len(runs) + 1 + len(workflow.READING)


@pytest.mark.slow
def test_its_notebooks_run_with_a_small_model_of_its_architecture(tmp_path, monkeypatch):
    monkeypatch.setenv("CAUSALDPO_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_movielens(tmp_path / "data" / "ml-10m", ratings=12_000)
    found = [job for job in jobs(load_study("paper")) if job.setting == "ml-10m-temporal" and job.seed in (None, 1)]
    by_folder = {job.folder: job for job in reversed(found)}
    places = {}

    def run(job):
        if job.folder in places:
            return places[job.folder]
        inputs = {key: str(run(by_folder[folder])) for key, folder in job.inputs.items()}
        places[job.folder] = tmp_path / "ml-10m-temporal" / job.folder.name
        change = {**SMALLER[job.stage], **inputs, "run": str(places[job.folder])}
        if job.stage == "sft":
            change["backbone"] = str(llama(pd.read_parquet(f"{inputs['data']}/items.parquet")["title"]))
        output = tmp_path / "notebooks" / f"{job.folder.name}.ipynb"
        run_notebook(find_notebook(job.notebook), {**job.parameters, **change}, output)
        return places[job.folder]

    def llama(titles):
        tokenizer = train_tokenizer(titles)
        small_model("llama", len(tokenizer)).save_pretrained(tmp_path / "llama")
        tokenizer.save_pretrained(tmp_path / "llama")
        return tmp_path / "llama"

    for method in ("causal_dpo", "d3"):
        [last] = [job for job in found if job.stage == "rank" and job.method == method]
        table = pd.read_parquet(run(last) / "predictions.parquet")
        assert set(table["split"]) == {"validation", "iid_test", "ood_test"}
        assert all(len(set(items)) == 20 for items in table["items"])
    [aligned] = [place for place in places.values() if re.fullmatch(r"causal_dpo-s1-\w+", place.name)]
    recorded = json.loads((aligned / "summary.json").read_text())["parameters"]
    assert (recorded["lora_rank"], recorded["loss_options"]["beta"], recorded["mmd_weight"]) == (8, 2.0, 0.001)
