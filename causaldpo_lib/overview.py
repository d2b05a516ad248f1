"""The study on one page: every notebook with its question and what it costs to run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from causaldpo_lib.book import GROUPS, START, group, in_order
from causaldpo_lib.errors import StudyError
from causaldpo_lib.evaluation import MARGIN, share_metric
from causaldpo_lib.paths import FIGURES, NOTEBOOKS
from causaldpo_lib.pipeline import STAGES
from causaldpo_lib.plots import SPLITS
from causaldpo_lib.records import shown
from causaldpo_lib.tables import Tables
from causaldpo_lib.takeaways import CLAIMS, HYPOTHESES, Claim, claim_table

# The comparisons that decide most: does alignment amplify, do environments matter, does the proposal help, more than no
# alignment would, and is it environments that help?
DECISIVE = tuple(
    claim
    for claim in (*CLAIMS, *HYPOTHESES)
    if claim[1:4]
    in (
        (share_metric("mass", "G1"), "dpo", "sft"),
        ("target_logp", "causal_dpo", "shuffled"),
        ("target_logp", "causal_negatives", "dpo"),
        ("target_logp", "causal_negatives", "sft"),
        ("target_logp", "causal_negatives", "popularity_negatives"),
    )
)
TIMES = "notebooks.csv"  # in figures/: what ``make publish`` measured of each notebook at its defaults
COLUMNS = ("notebook", "seconds", "device")


def question(notebook: Path) -> str:
    """What a notebook asks: the paragraph that its first cell opens with ``**Question.**``.

    Raises:
        StudyError: the first cell has none.
    """
    first = "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"])
    found = re.search(r"\*\*Question\.\*\*\s*(.*?)(?:\n\n|\Z)", first, re.DOTALL)
    if not found:
        raise StudyError(f"{shown(notebook)}: the first cell asks no question: begin a paragraph with **Question.**")
    return " ".join(found[1].split())


def seconds_text(seconds: float) -> str:
    """A time in words that a reader can plan with: seconds, rounded, or minutes."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min"


def write_times(rows: Iterable[tuple[str, float]], device: str, folder: Path = FIGURES) -> Path:
    """Keep what executing each notebook at its defaults took: (notebook, seconds), measured on ``device``."""
    table = pd.DataFrame([(name, round(seconds, 1), device) for name, seconds in rows], columns=COLUMNS)
    folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(folder / TIMES, index=False)
    return folder / TIMES


def study_times(figures: Path = FIGURES) -> pd.DataFrame:
    """The range over published studies of the time of a run of each stage: stage, device (CPU, GPU), low, high (s)."""
    found = [pd.read_csv(path, keep_default_na=False) for path in sorted(figures.glob("*/costs.csv"))]
    if not found:
        return pd.DataFrame(columns=["stage", "device", "low", "high"])
    table = pd.concat(found)
    table["device"] = table["device"].eq("cpu").map({True: "CPU", False: "GPU"})  # others are cards, by their names
    rows = table.groupby(["stage", "device"], sort=False)["seconds"]
    return rows.agg(low="min", high="max").reset_index()


def notebook_map(notebooks: Path = NOTEBOOKS, figures: Path = FIGURES) -> pd.DataFrame:
    """Every notebook but ``START`` with its question, the time at its defaults, and in a study on a CPU and a GPU.

    Columns: part, notebook (a link), question, defaults, a run of a study (CPU), the same (GPU). Times come from what
    publishing measured; where nothing did, the cell says so.
    """
    path = figures / TIMES
    defaults = pd.read_csv(path).set_index("notebook")["seconds"] if path.exists() else pd.Series(dtype=float)
    stages = {stage.notebook: name for name, stage in STAGES.items()}
    ranges = study_times(figures)
    lines = []
    for notebook in (path for path in in_order(notebooks) if path.stem != START):
        line = {
            "part": GROUPS[group(notebook)].partition(":")[0],
            "notebook": f"[{notebook.stem.replace('_', ' ')}]({notebook.name})",
            "question": question(notebook),
            "defaults": seconds_text(defaults[notebook.stem]) if notebook.stem in defaults else "not measured",
        }
        for device in ("CPU", "GPU"):
            rows = ranges[(ranges["stage"] == stages.get(notebook.stem)) & (ranges["device"] == device)]
            texts = [seconds_text(value) for row in rows.itertuples() for value in (row.low, row.high)]
            there = " to ".join(dict.fromkeys(texts)) or "not measured"
            line[f"a run of a study ({device})"] = there if notebook.stem in stages else "as at the defaults"
        lines.append(line)
    return pd.DataFrame(lines)


def decisive(studies: Mapping[str, Tables], claims: Sequence[Claim]) -> pd.DataFrame:
    """Claims on the OOD tests, a row per setting and a column per claim: result and difference with its interval.

    Of settings that several studies hold the first study counts.
    """
    rows = pd.concat([claim_table(tables, claims) for tables in studies.values()])
    rows = rows[rows["split"] == SPLITS["ood_test"]].drop_duplicates(["claim", "setting"])
    rows["cell"] = rows["result"] + ": " + rows["difference"].str.partition(", p ")[0]
    cells = rows.pivot(index="setting", columns="claim", values="cell")
    return cells.reindex(rows["setting"].unique())[list(rows["claim"].unique())].fillna("not measured").reset_index()


def margin_note() -> str:
    """How large a change *equivalent* excludes, and by which intervals. In Markdown."""
    return (
        f"*Equivalent* excludes ±{100 * MARGIN:.1f} % of the baseline's mean, in log p ±{np.log1p(MARGIN):.3f} nats. "
        "It is decided by two one-sided tests at 5 %, so by 90 % intervals: those of 95 % may reach over the margin."
    )
