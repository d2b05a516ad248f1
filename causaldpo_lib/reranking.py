"""From finished runs of DPO4Rec to result tables: csv files, and the same as text for the console.

``python -m causaldpo_lib.reranking STUDY`` writes them to ``results/<study>/``:

    reranking.csv         setting, method, row, split, metric, mean, low, high, seeds, users
    reranking_paired.csv  setting, method, split, metric, row, baseline, difference, low, high, p, p_holm
    reranking_rounds.csv  setting, method, round, metric, mean, low, high, and means over seeds of what a round counted
    reranking_example.csv part, round, number, text, value, role: the loop at one simulated user, if there is one
    costs.csv             setting, stage, method, runs, seconds of one, device

A method is a re-ranker, and a row what it reads (``dpo4rec.evaluate``); metrics are fractions per held-out list, one
list a user. Intervals are 95 %, over training seeds and users together (``stats``). A family of Holm's correction is
all rows of one method that are compared with one baseline in one metric, split and setting. In reranking_rounds.csv
the metrics are the mean reward of a user's sampled texts on the lists that pairs come from (``reward``) and on
validation lists (``validation``), and their change since round 0 (``..._gain``), paired by user.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from causaldpo_lib import stats
from causaldpo_lib.costs import cost_rows
from causaldpo_lib.errors import StudyError
from causaldpo_lib.pipeline import load_run
from causaldpo_lib.plots import SPLITS, look
from causaldpo_lib.records import folder_with, read_json, read_table, write_tables
from causaldpo_lib.tables import columns, markdown, select

Frame = pd.DataFrame
Tables = Mapping[str, Frame]

TABLES = ("reranking", "reranking_paired", "reranking_rounds", "reranking_example", "costs")
REWARDS = ("reward", "validation")
COUNTED = ("pairs", "tied", "unusable", "empty", "over_long", "distinct", "texts", "gap", "words", "blank_reward")
SHOWN = ("ndcg@5", "map@5")  # of the text for the console
# A part of a text as an embedded generator is taught it (``knowledge.summary``): a factor, a manner, values.
VALUE = r"[^\s,;\ufffd](?:[^,;\ufffd]*[^\s,;\ufffd])?"
FORM = re.compile(rf"\w+ (?:mostly|unusually often) {VALUE}(?:, {VALUE})*")
LABELS = {
    "initial": "initial order",
    "backbone": "re-ranker alone",
    "kar": "+ KAR",
    "knowledge": "+ unaligned knowledge",
    "shuffled": "+ shuffled knowledge",
}


# --- reading the runs ---


def collect(study: Any) -> dict[str, Frame]:
    """All tables of a study of re-rankers from its finished runs, by file stem; deterministic.

    Raises:
        StudyError: a run is missing or unfinished, or two seeds do not have the same lists.
    """
    from causaldpo_lib.study import jobs

    return collect_jobs(jobs(study))


def collect_jobs(jobs: Sequence[Any]) -> dict[str, Frame]:
    """As ``collect``, from the jobs themselves: objects with stage, setting, method, seed, parameters and folder."""
    runs: dict[tuple[str, str], list[Path]] = {}
    for job in jobs:
        if job.stage == "dpo4rec":
            runs.setdefault((job.setting, job.method), []).append(load_run(job.folder, "dpo4rec").folder)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
    for (setting, method), folders in runs.items():
        key = {"setting": setting, "method": method}
        found = [pd.read_parquet(folder / "lists.parquet") for folder in folders]
        for split in found[0]["split"].unique():
            values, users = by_row(found, split, setting)
            rows["reranking"] += level_rows({**key, "split": split}, values, users)
            rows["reranking_paired"] += paired_rows({**key, "split": split}, values, users)
        rows["reranking_rounds"] += round_rows(key, folders)
    rows["costs"] = cost_rows(jobs)
    examples = (folder / "example.json" for folders in runs.values() for folder in folders)
    example = next((read_json(path) for path in examples if path.exists()), {})
    return {name: pd.DataFrame(content) for name, content in rows.items()} | {
        "reranking_example": example_rows(example)
    }


def by_row(found: Sequence[Frame], split: str, setting: str) -> tuple[dict[str, dict[str, np.ndarray]], np.ndarray]:
    """Per metric and row, the values (S, N) of S seeds at the N lists of a split; and the lists' users (N,).

    Raises:
        StudyError: the seeds' lists are not those of the same users.
    """
    parts = [table[table["split"] == split] for table in found]
    rows = list(parts[0]["row"].unique())
    metrics = [name for name in parts[0] if "@" in name]
    users = parts[0].loc[parts[0]["row"] == rows[0], "user"].to_numpy()
    values: dict[str, dict[str, np.ndarray]] = {metric: {} for metric in metrics}
    for row in rows:
        own = [part[part["row"] == row] for part in parts]
        if any(not np.array_equal(part["user"], users) for part in own):
            raise StudyError(f"{setting}, {split}: the seeds' runs have lists of different users: run them again")
        for metric in metrics:
            values[metric][row] = np.stack([part[metric].to_numpy(float) for part in own])
    return values, users


def compared(rows: Sequence[str]) -> list[tuple[str, str]]:
    """The (row, baseline) pairs that are tested: what each step adds, and the last round against its control."""
    rounds = [row for row in rows if row.startswith("dpo4rec_")]
    pairs = [(row, "backbone") for row in ("initial", "kar", "knowledge", *rounds, "shuffled")]
    pairs += [(row, baseline) for baseline in ("kar", "knowledge") for row in rounds]
    pairs += [(row, "shuffled") for row in ("knowledge", *rounds[-1:])]
    return [(row, baseline) for row, baseline in pairs if row in rows and baseline in rows]


def level_rows(
    key: Mapping[str, Any], values: Mapping[str, Mapping[str, np.ndarray]], users: np.ndarray
) -> list[dict[str, Any]]:
    """Rows of reranking.csv of one method and split."""
    return [
        {**key, "row": row, "metric": metric, **stats.interval(table, users)._asdict()}
        | {"seeds": len(table), "users": len(users)}
        for metric, found in values.items()
        for row, table in found.items()
    ]


def paired_rows(
    key: Mapping[str, Any], values: Mapping[str, Mapping[str, np.ndarray]], users: np.ndarray
) -> list[dict[str, Any]]:
    """Rows of reranking_paired.csv of one method and split."""
    rows = []
    for metric, found in values.items():
        mine = []
        for row, baseline in compared(list(found)):
            numbers = stats.paired(found[row], found[baseline], users)._asdict()
            mine.append({**key, "metric": metric, "row": row, "baseline": baseline, "difference": numbers.pop("mean")})
            mine[-1] |= numbers
        rows += stats.with_holm(mine)
    return rows


def round_rows(key: Mapping[str, Any], folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Rows of reranking_rounds.csv of one method: the learning curve over rounds."""
    texts = [pd.read_parquet(folder / "texts.parquet") for folder in folders]
    counts = pd.concat([pd.read_csv(folder / "rounds.csv") for folder in folders])
    rows = []
    for metric in REWARDS:
        # A user's mean over sampled texts (the greedy one is number -1), by round: (users, rounds) of each seed.
        tables = [
            table[table["number"] >= 0].pivot_table(index="user", columns="round", values=metric, aggfunc="mean")
            for table in texts
        ]
        tables = [table.dropna() for table in tables]
        users = tables[0].index.to_numpy()
        if not len(users):
            continue
        if any(not np.array_equal(table.index, users) for table in tables):
            raise StudyError(f"{key['setting']}: the seeds' runs have lists of different users: run them again")
        cube = np.stack([table.to_numpy() for table in tables])  # (S, users, rounds)
        for number, name in enumerate(tables[0].columns):
            mean = counts[counts["round"] == name].mean(numeric_only=True)
            shared = {**key, "round": int(name)}
            told = {count: float(mean[count]) for count in COUNTED}
            rows.append({**shared, "metric": metric, **stats.interval(cube[..., number], users)._asdict(), **told})
            gain = stats.paired(cube[..., number], cube[..., 0], users)
            rows.append({**shared, "metric": f"{metric}_gain", **gain._asdict(), **told})
    return rows


def example_rows(content: Mapping[str, Any]) -> Frame:
    """``dpo4rec.example`` as a table: part, round, number, text, value (reward, or 1 of a positive), role."""
    rows: list[tuple[Any, ...]] = []
    for number, title in enumerate(content.get("history", [])):
        rows.append(("history", np.nan, number, title, np.nan, ""))
    for number, place in enumerate(content.get("list", [])):
        rows.append(("list", np.nan, number, place["title"], float(place["positive"]), ""))
    for index, one in enumerate(content.get("rounds", [])):
        roles = dict(zip(one["pair"], ("chosen", "rejected"), strict=False)) | {-1: "greedy"}
        for text in one["texts"]:
            rows.append(("text", index, text["number"], text["text"], text["reward"], roles.get(text["number"], "")))
    return pd.DataFrame(rows, columns=["part", "round", "number", "text", "value", "role"])


def write(study: Any) -> list[Path]:
    """Collect a study's tables into ``results/<study>/``; returns the files."""
    return write_tables(study.folder, collect(study))


# --- reading the tables ---


def read(path: str | Path) -> dict[str, Frame]:
    """The tables of a study of re-rankers, by file stem, as ``write`` left them.

    Raises:
        StudyError: a table is missing or cannot be read.
    """
    folder = folder_with("reranking.csv", path, f"make study STUDY={Path(path).name}")
    return {name: read_table(folder / f"{name}.csv", "make the study's tables again") for name in TABLES}


def row_label(row: str) -> str:
    """What tables and figures call a row."""
    return LABELS.get(row, row.replace("dpo4rec_", "+ DPO4Rec, round "))


def result_table(tables: Tables, setting: str, split: str, metrics: Sequence[str] = SHOWN) -> Frame:
    """One setting and split as text cells in percent: rows by method and metric, with intervals."""
    table = select(tables["reranking"], setting=setting, split=split)
    lines = []
    for row in sorted(table["row"].unique(), key=lambda row: row != "initial"):  # where everything begins, on top
        line = {"row": row_label(row)}
        for method in table["method"].unique():
            for metric in metrics:
                found = select(table, row=row, method=method, metric=metric)
                mean, low, high = (f"{100 * found[name].iloc[0]:.1f}" for name in ("mean", "low", "high"))
                line[f"{look(method).label} {metric.upper()} %"] = f"{mean} [{low}, {high}]"
        lines.append(line)
    return pd.DataFrame(lines)


def markdown_table(folder: str | Path, setting: str, split: str, metric: str = SHOWN[0]) -> str:
    """The same of one metric in Markdown, for notebooks and the README."""
    return markdown(result_table(read(folder), setting, split, [metric]))


def well_formed(text: str) -> bool:
    """Whether a text has the form that an embedded generator is taught, in all its parts: no word is broken off."""
    return all(FORM.fullmatch(part) for part in text.split("; "))


def broken_texts(tables: Tables) -> str:
    """How many of the shown user's texts lack the taught form in each round, in Markdown.

    Empty without a shown user, and where no text of round 0 has it: a large generator writes in its own words.
    """
    rows = select(tables["reranking_example"], part="text")
    broken = ~rows["text"].fillna("").map(well_formed).astype(bool)
    if broken[rows["round"] == 0].all():
        return ""
    counted = broken.groupby(rows["round"]).agg(["sum", "count"])
    said = ", ".join(
        f"{row['sum']} of {row['count']} in round {number:.0f}" for number, row in counted.astype(int).iterrows()
    )
    return (
        f"**Takeaway.** Of this user's texts, greedy and sampled, {said} are broken: not in the form that was taught, "
        "of a factor, *mostly* or *unusually often*, and values. They are one user's, and no estimate for all."
    )


def summary_text(folder: str | Path) -> str:
    """The study's main results for the console: per setting and test split, rows by re-rankers, with intervals."""
    tables = read(folder)
    lines = []
    tests = select(tables["reranking"], split=["iid_test", "ood_test"])
    for setting, split in tests[["setting", "split"]].drop_duplicates().itertuples(index=False):
        part = select(tests, setting=setting, split=split)
        facts = f"{part['users'].iloc[0]:,} lists, {part['seeds'].max()} seeds"
        lines += ["", f"{setting}, {SPLITS[split]}: {facts}", *columns(result_table(tables, setting, split))]
    return "\n".join([*lines[1:], "", "[low, high]: 95 % intervals over training seeds and users"])


# --- command line ---


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a study's tables and print their paths; 0, or 1 after one sentence about what is wrong."""
    from causaldpo_lib.study import command

    return command("reranking", main.__doc__, write, arguments)


if __name__ == "__main__":
    sys.exit(main())
