# Chains the notebooks of one study: a rule per run, laid out by causaldpo_lib.study.
#
#   python -m causaldpo_lib.study NAME        what `make study STUDY=NAME` does: this file, progress, results table
#   snakemake -n --config study=NAME          what would run, and why
#
# A run's parameters and the digest of its code are `params`, so a change of either runs it again (of the raw files
# too, but only the first command looks at those: it forces their data runs); saving outputs into
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
FOLDER = shown(STUDY.folder)
TABLES = [f"{FOLDER}/{name}.csv" for name in running.tables_of(STUDY)]
READING = running.reading(STUDY)
WRITER = running.writer(STUDY)
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


def end(job):
    """What a run leaves for the tables: in a study of data alone, the sentence that refused it counts as well."""
    return shown(STUDY.outcome(job.setting)) if STUDY.data_only else summary(job.folder)


# A refusal is the notebook's own sentence; a cell that broke ("Cell 3 of ...") or an interruption fails the step.
REFUSED = "grep '^error: ' {log.txt:q} | tail -n 1 | grep -Ev '^error: (Cell |interrupted)|kernel died' > {output:q}"
COMMAND = NOTEBOOK + " -y {params.parameters:q} > {log.txt:q} 2>&1"
if STUDY.data_only:
    COMMAND = f"if ({COMMAND}); then : > {{output:q}}; else {REFUSED}; fi"


# Every run is a target of its own: Snakemake would not miss a lost one as long as the tables are there.
rule all:
    input:
        sorted({end(job) for job in JOBS}),
        TABLES,
        [f"{FOLDER}/notebooks/.{name}.done" for name in READING],


for target, job in {end(job): job for job in JOBS}.items():

    rule:
        name:
            re.sub(r"\W", "_", f"{job.stage}_{job.setting}_{job.folder.name}")
        message:
            job.label
        input:
            **{key: summary(upstream) for key, upstream in job.inputs.items()},
        output:
            target,
        log:
            nb=f"{shown(job.folder)}/notebook.ipynb",
            txt=f"{shown(job.folder)}/log.txt",
        params:
            notebook=job.notebook,
            code=CODE[job.stage],
            parameters=text(json.dumps(job.parameters, sort_keys=True)),
        threads: THREADS
        shell:
            COMMAND


rule tables:
    message:
        f"tables of {STUDY.name}"
    input:
        sorted({end(job) for job in JOBS}),
    output:
        TABLES,
    log:
        txt=f"{FOLDER}/tables.log.txt",
    params:
        code=sources.function_digest(WRITER, "write"),
        study=text(shown(STUDY.path.resolve())),
    shell:
        "exec {PYTHON:q} -m causaldpo_lib.{WRITER} {params.study:q} > {log.txt:q} 2>&1"


for name in READING:

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
