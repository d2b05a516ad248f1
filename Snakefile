# Chains the notebooks of one study: a rule per run, laid out by causaldpo_lib.study.
#
#   python -m causaldpo_lib.study NAME        what `make study STUDY=NAME` does: this file, progress, results table
#   snakemake -n --config study=NAME          what would run, and why
#
# A run's parameters and the digest of its code are `params`, so a change of either runs it again; saving outputs into
# a notebook does not. Executed notebooks are logs: a failing one is kept, with its traceback.

import json
import re
import sys

sys.path.insert(0, str(workflow.basedir))

from causaldpo_lib import pipeline, sources, study as studies, workflow as running
from causaldpo_lib.paths import NOTEBOOKS, ROOT
from causaldpo_lib.records import shown

workdir: str(ROOT)


STUDY = studies.load_study(str(config.get("study", "quick")))
JOBS = studies.jobs(STUDY)
SETTINGS = dict.fromkeys(job.setting for job in JOBS)
FOLDER = shown(STUDY.folder)
TABLES = [f"{FOLDER}/{name}.csv" for name in (*running.TABLES, *(f"points-{setting}" for setting in SETTINGS))]
CODE = {stage: pipeline.code_digest(stage) for stage in pipeline.STAGES}
PYTHON = sys.executable
THREADS = int(config.get("threads", 1))
# "exec" makes Snakemake the notebook's parent process, and the notebook ends with it.
NOTEBOOK = "exec {PYTHON:q} -m causaldpo_lib.run --end-with-parent {params.notebook:q} -o {log.nb:q}"


def text(value):
    """A parameter that Snakemake records as it is: in a plain string it would take braces for wildcards."""
    return lambda wildcards: value


def summary(folder):
    return f"{shown(folder)}/summary.json"


# Every run is a target of its own: Snakemake would not miss a lost one as long as the tables are there.
rule all:
    input:
        sorted({summary(job.folder) for job in JOBS}),
        TABLES,
        [f"{FOLDER}/notebooks/.{name}.done" for name in running.READING],


for folder, job in {job.folder: job for job in JOBS}.items():

    rule:
        name:
            re.sub(r"\W", "_", f"{job.stage}_{folder.parent.name}_{folder.name}")
        message:
            job.label
        input:
            **{key: summary(upstream) for key, upstream in job.inputs.items()},
        output:
            summary(folder),
        log:
            nb=f"{shown(folder)}/notebook.ipynb",
            txt=f"{shown(folder)}/log.txt",
        params:
            notebook=job.notebook,
            code=CODE[job.stage],
            parameters=text(json.dumps(job.parameters, sort_keys=True)),
        threads: THREADS
        shell:
            NOTEBOOK + " -y {params.parameters:q} > {log.txt:q} 2>&1"


rule tables:
    message:
        f"tables of {STUDY.name}"
    input:
        sorted({summary(job.folder) for job in JOBS}),
    output:
        TABLES,
    log:
        txt=f"{FOLDER}/tables.log.txt",
    params:
        code=sources.function_digest("tables", "write"),
        study=text(shown(STUDY.path.resolve())),
    shell:
        "exec {PYTHON:q} -m causaldpo_lib.tables {params.study:q} > {log.txt:q} 2>&1"


for name in running.READING:

    rule:
        name:
            f"reading_{name}"
        message:
            f"{name} of {STUDY.name}"
        input:
            TABLES,
        output:
            touch(f"{FOLDER}/notebooks/.{name}.done"),
        log:
            nb=f"{FOLDER}/notebooks/{name}.ipynb",
            txt=f"{FOLDER}/notebooks/{name}.log.txt",
        params:
            notebook=name,
            code=sources.notebook_digest(NOTEBOOKS / f"{name}.ipynb", library=True),
            folder=FOLDER,
        shell:
            NOTEBOOK + " -p tables {params.folder:q} -p figures {params.folder:q} > {log.txt:q} 2>&1"
