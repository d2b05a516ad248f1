"""From finished runs to result tables: csv files, and the same as text for the console, notebooks and README.

``collect`` reads the run folders of a study and returns its tables; ``python -m causaldpo_lib.tables STUDY``
writes them to ``results/<study>/`` as csv. Everything shown anywhere is made from these files:

    metrics.csv      setting, split, method, metric, mean, low, high, seeds, examples
    paired.csv       setting, split, metric, method, baseline, difference, low, high, p, p_holm,
                     margin, p_equivalent, p_equivalent_holm (not of slopes), p_mcnemar (hit rates)
    shares.csv       setting, split, grouping, group, method, share, low, high
    groups.csv       setting, split, grouping, group, method, mean, low, high, examples
    slopes.csv       setting, split, grouping, metric, method, slope, low, high, groups
    times.csv        setting, split, grouping, group, metric, method, mean, low, high, examples
    validation.csv   as metrics.csv, of the validation split: for selection only
    diagnostics.csv  setting, method, seed, seconds, coverage and Gini of the lists, scalars of the training run
    training.csv     setting, method, seed, iteration, step and what alignment logged at it (``LOGGED``)
    costs.csv        setting, stage, method, runs, seconds of one, device
    points-<setting>.csv  the environments stage's map of prompt states

Fractions are stored as fractions, log-probabilities in nats. Intervals are 95 %, over training
seeds and users together (``stats``); floors have no seeds, so theirs is over users
only, and what a set of lists has as a whole (``evaluation.LIST_METRICS``) varies over seeds only.
A Holm family is all methods against one baseline, in one metric, split and setting.
times.csv needs examples with a ``time``, validation.csv rankings of the validation split; without, they are empty. The
metric ``causal_KL`` needs predictions with a column ``catalogue_logps``, a list in the order of items.parquet.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from causaldpo_lib import metrics, stats
from causaldpo_lib.costs import cost_rows
from causaldpo_lib.errors import StudyError
from causaldpo_lib.evaluation import (
    ENDS,
    FLOORS,
    KL,
    LIFT,
    LIST_METRICS,
    SELECTION,
    K,
    Panel,
    group_rows,
    metric_rows,
    paired_rows,
    share_rows,
    slope_rows,
    time_rows,
)
from causaldpo_lib.evaluation import select as select_by_rule
from causaldpo_lib.paths import RESULTS, from_root
from causaldpo_lib.pipeline import load_run
from causaldpo_lib.plots import GROUPINGS, SPLITS, look, metric_name, metric_scale, metric_unit
from causaldpo_lib.records import folder_with, read_table, shown, write_tables

MAIN_METRICS = ("target_logp", f"causal_NDCG@{K}", "HR@10", "NDCG@10")
TEST_SPLITS = ("iid_test", "ood_test")
# What figures show of studies with many methods, and the references beside them; tables show all.
CORE = (
    *("sft", "dpo", "causal_dpo", "shuffled", "popularity_negatives", "causal_negatives"),
    *("training", "targets", *FLOORS),
)
VALIDATION = ("validation",)
TABLES = ("metrics", "paired", "shares", "groups", "diagnostics")
# Tables that studies of an earlier version lack, and that can be without rows; their columns, for those cases.
LATER = {
    "slopes": ["setting", "split", "grouping", "metric", "method", "slope", "low", "high", "groups"],
    "times": ["setting", "split", "grouping", "group", "metric", "method", "mean", "low", "high", "examples"],
    "validation": ["setting", "split", "method", "metric", "mean", "low", "high", "seeds", "examples"],
    "training": ["setting", "method", "seed", "iteration", "step"],
    "costs": ["setting", "stage", "method", "runs", "seconds", "device"],
}
# Columns of the tables that can be without rows: those, and differences, of which a single method has none.
COLUMNS = LATER | {
    "paired": [
        *("setting", "split", "metric", "method", "baseline", "difference", "low", "high", "p", "p_holm"),
        *("margin", "p_equivalent", "p_equivalent_holm", "p_mcnemar"),
    ]
}
# Columns of an alignment's log that curves are drawn from, where it has them.
LOGGED = (
    *("preference_loss", "margin", "accuracy", "win_rate", "margin_min", "chosen_logp"),
    *("mmd2_debiased", "boundary_share", "gradient_share"),
)
LISTS = (*LIST_METRICS, LIFT)  # what the lists are like, shown apart from how accurate they are

Frame = pd.DataFrame
Tables = Mapping[str, Frame]


# --- reading the runs ---


def collect(study: Any) -> dict[str, Frame]:
    """All tables of a study from its finished runs, by file stem; deterministic.

    Raises:
        StudyError: a run is missing, unfinished, or does not hold what its stage writes; the folder is named.
    """
    from causaldpo_lib.study import jobs

    return collect_jobs(jobs(study), study.comparisons)


def collect_jobs(jobs: Sequence[Any], comparisons: Sequence[tuple[str, str]] = ()) -> dict[str, Frame]:
    """As ``collect``, from the jobs themselves: objects with stage, setting, method, seed, parameters and folder."""
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in (*TABLES, *LATER)}
    points: dict[str, Frame] = {}
    for setting in dict.fromkeys(job.setting for job in jobs):
        mine = [job for job in jobs if job.setting == setting]
        panels = list(read_panels(setting, mine))
        for panel in panels:
            rows["metrics"] += metric_rows(panel)
            rows["paired"] += paired_rows(panel, comparisons)
            rows["shares"] += share_rows(panel)
            rows["groups"] += group_rows(panel)
            rows["slopes"] += slope_rows(panel)
            rows["times"] += time_rows(panel)
        for panel in read_panels(setting, mine, VALIDATION):
            rows["validation"] += metric_rows(panel)
        rows["diagnostics"] += diagnostic_rows(setting, mine, panels)
        rows["training"] += training_rows(setting, mine)
        for job in (job for job in mine if job.stage == "environments"):
            points.setdefault(f"points-{setting}", pd.read_csv(_file(job, "points.csv")))
    rows["costs"] = cost_rows(jobs)
    if not rows["metrics"]:
        raise StudyError("the study has no ranking run: there is nothing to put into tables")
    tables = {
        name: pd.DataFrame(content or None, columns=None if content else COLUMNS.get(name))
        for name, content in rows.items()
    }
    return {**tables, **points}


def read_panels(setting: str, jobs: Sequence[Any], splits: Sequence[str] = TEST_SPLITS) -> list[Panel]:
    """Splits of one setting, with the predictions of all its rank runs aligned by example.

    The validation split is there only if all runs ranked it.

    Raises:
        StudyError: as in ``collect``; or methods that were trained with different seeds, which cannot be
        paired.
    """
    data = [job for job in jobs if job.stage == "data"]
    ranked = [job for job in jobs if job.stage == "rank"]
    if not data or not ranked:
        return []
    items = pd.read_parquet(_file(data[0], "items.parquet"))
    examples = pd.read_parquet(_file(data[0], "examples.parquet"))
    truth = data[0].folder / "truth.parquet"
    preferences = (
        pd.read_parquet(truth).pivot(index="user", columns="item", values="preference") if truth.exists() else None
    )
    runs: dict[str, dict[int, tuple[Any, Frame]]] = {}
    for job in ranked:
        runs.setdefault(job.method, {})[job.seed] = (job, pd.read_parquet(_file(job, "predictions.parquet")))
    seeds = {method: sorted(by_seed) for method, by_seed in runs.items()}
    if len({tuple(found) for found in seeds.values()}) > 1:
        raise StudyError(f"{setting}: the methods were trained with different seeds ({seeds}): give all the same seeds")
    panels = []
    for split in splits:
        rows = examples[examples["split"] == split].sort_values("example")
        if rows.empty or (
            split in VALIDATION
            and not all((part["split"] == split).any() for by_seed in runs.values() for _, part in by_seed.values())
        ):
            continue
        aligned = {m: [_align(*runs[m][seed], split, rows) for seed in seeds[m]] for m in runs}
        panels.append(
            Panel(
                setting=setting,
                split=split,
                items=items,
                users=rows["user"].to_numpy(),
                targets=rows["item"].to_numpy(),
                ranks={m: np.stack([part["rank"].to_numpy(float) for part in parts]) for m, parts in aligned.items()},
                logps={
                    m: np.stack([part["target_logp"].to_numpy(float) for part in parts]) for m, parts in aligned.items()
                },
                lists={
                    m: np.stack([np.stack(part["items"].tolist()) for part in parts]) for m, parts in aligned.items()
                },
                preferences=None
                if preferences is None
                else preferences.loc[rows["user"], items["item"]].fillna(0.0).to_numpy(),
                catalogue_logps=_catalogue_logps(aligned),
                times=rows["time"].to_numpy(float) if "time" in rows else None,
                environments=rows["environment"].to_numpy() if "environment" in rows else None,
                profile_popularity=_profile_popularity(rows, items),
                candidates=_candidates(ranked, aligned),
            )
        )
    return panels


def _catalogue_logps(aligned: Mapping[str, Sequence[Frame]]) -> dict[str, np.ndarray] | None:
    """Per method the log-probability of every item, (S, N, items); None unless all predictions hold it."""
    if not all("catalogue_logps" in part for parts in aligned.values() for part in parts):
        return None
    return {m: np.stack([np.stack(part["catalogue_logps"].tolist()) for part in parts]) for m, parts in aligned.items()}


def _candidates(ranked: Sequence[Any], aligned: Mapping[str, Sequence[Frame]]) -> np.ndarray | None:
    """The candidates (N, C) of every example if only these were ranked: all of them stand in every method's lists."""
    if {job.parameters.get("ranker") for job in ranked} != {"candidates"}:
        return None
    return np.stack(next(iter(aligned.values()))[0]["items"].tolist())


def _profile_popularity(examples: Frame, items: Frame) -> np.ndarray | None:
    """The mean training count of each example's history, (N,); None if the examples have no histories."""
    if "history" not in examples:
        return None
    lengths = examples["history"].map(len).to_numpy()
    chosen = pd.Series(np.concatenate([np.asarray(history) for history in examples["history"]]))
    counts = chosen.map(items.set_index("item")["train_count"]).to_numpy(float)
    return np.add.reduceat(counts, np.cumsum(lengths) - lengths) / lengths


def _file(job: Any, name: str) -> Path:
    """A file of a job's run, which must be finished."""
    path = load_run(job.folder, job.stage).folder / name
    if not path.exists():
        raise StudyError(f"{shown(path)} is missing: delete its folder and run the study again")
    return path


def _align(job: Any, predictions: Frame, split: str, examples: Frame) -> Frame:
    rows = predictions[predictions["split"] == split].sort_values("example")
    if not np.array_equal(rows["example"], examples["example"]) or not np.array_equal(rows["target"], examples["item"]):
        raise StudyError(
            f"{shown(Path(job.folder))} does not rank the {len(examples)} {split} examples of its data run: "
            "delete the folder and run the study again"
        )
    return rows


def diagnostic_rows(setting: str, jobs: Sequence[Any], panels: Sequence[Panel]) -> list[dict[str, Any]]:
    """Rows of diagnostics.csv: what training and environments were like, and how varied the lists are."""
    rows = []
    aligned = {job.method for job in jobs if job.stage == "align"}
    for job in jobs:
        # What a method fine-tuned before it aligned is no row of its own.
        if job.stage not in ("sft", "sasrec", "align", "environments") or (
            job.stage == "sft" and job.method in aligned
        ):
            continue
        summary = load_run(job.folder, job.stage).summary
        method = job.method or job.stage
        row = {"setting": setting, "method": method, "seed": job.seed, "seconds": summary.get("wall_seconds")}
        for panel in panels:
            if method not in panel.lists:
                continue
            seeds = sorted({other.seed for other in jobs if other.stage == "rank" and other.method == method})
            shown_items = panel.places(panel.lists[method][seeds.index(job.seed)][:, :K])
            row[f"coverage_{panel.split}"] = metrics.coverage(shown_items, len(panel.items), K)
            row[f"gini_{panel.split}"] = metrics.gini(np.bincount(shown_items.ravel(), minlength=len(panel.items)))
        rows.append({**row, **summary["scalars"]})
    return rows


def training_rows(setting: str, jobs: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows of training.csv: every logged step of every alignment, the columns of ``LOGGED`` that it has."""
    rows = []
    for job in (job for job in jobs if job.stage == "align"):
        log = pd.read_csv(_file(job, "log.csv"))
        kept = [name for name in ("iteration", "step", *LOGGED) if name in log]
        key = {"setting": setting, "method": job.method, "seed": job.seed}
        rows += [{**key, **row} for row in log[kept].to_dict("records")]
    return rows


def write(study: Any) -> list[Path]:
    """Collect a study's tables into ``results/<study>/``; returns the files."""
    return write_tables(study.folder, collect(study))


# --- reading the tables ---


def tables_folder(path: str | Path) -> Path:
    """A study's folder of tables (``records.folder_with``)."""
    return folder_with("metrics.csv", path, f"make study STUDY={Path(path).name}")


def figures_folder(figures: str | Path, tables: Path) -> Path:
    """Where a reading notebook writes: ``figures`` (from the root), or ``results/figures/<study>``."""
    return from_root(figures) if figures else RESULTS / "figures" / tables.name


def read(path: str | Path) -> dict[str, Frame]:
    """The tables of a study, by file stem, as ``write`` left them; those of ``LATER`` without rows if they are missing.

    Raises:
        StudyError: a table is missing or cannot be read.
    """
    folder = tables_folder(path)
    found: dict[str, Frame] = {}
    later = [folder / f"{name}.csv" for name in LATER]
    found |= {file.stem: pd.DataFrame(columns=LATER[file.stem]) for file in later}
    files = [*(folder / f"{name}.csv" for name in TABLES), *(file for file in later if file.exists())]
    for file in [*files, *sorted(folder.glob("points-*.csv"))]:
        found[file.stem] = read_table(file, "make the study's tables again")
    found["costs"] = found["costs"].fillna({"method": ""})  # of stages that methods share
    return found


def settings(tables: Tables) -> list[str]:
    """The settings of a study, in its order."""
    return list(tables["metrics"]["setting"].unique())


def select(table: Frame, **equal: Any) -> Frame:
    """The rows of a table where each named column has the given value (or one of a list of values)."""
    for column, value in equal.items():
        table = table[table[column].isin(value if isinstance(value, list | tuple) else [value])]
    return table.reset_index(drop=True)


def core(table: Frame) -> Frame:
    """The rows of ``CORE``, whose number a figure can hold; of comparisons those between two of them."""
    for column in ("method", "baseline"):
        if column in table:
            table = table[table[column].isin(CORE)]
    return table.reset_index(drop=True)


def histogram(table: Frame, column: str, bins: int = 30, log: bool = False) -> Frame:
    """Per split, the share of its rows in common bins of ``column``: columns split, left, right, share.

    ``log``: bins of equal width on a logarithmic scale; the values must be positive.
    """
    values = table[column].to_numpy(float)
    low, high = values.min(), values.max()
    edges = np.geomspace(low, high, bins + 1) if log else np.linspace(low, high, bins + 1)
    edges[0], edges[-1] = low, high  # geomspace rounds
    parts = []
    for split, rows in table.groupby("split", sort=False):
        counts, _ = np.histogram(rows[column].to_numpy(float), edges)
        share = counts / counts.sum()
        parts.append(pd.DataFrame({"split": split, "left": edges[:-1], "right": edges[1:], "share": share}))
    return pd.concat(parts, ignore_index=True)


# --- tables as text ---


def main_metrics(table: Frame) -> Frame:
    """The rows of the metrics that are reported first, in that order: primary endpoints, HR@10, NDCG@10."""
    return pd.concat([select(table, metric=metric) for metric in MAIN_METRICS], ignore_index=True)


def heading(metric: str) -> str:
    """A short column title with the unit."""
    short = {"target_logp": "log p (nats)", KL: "causal KL (nats)"}
    if metric in short:
        return short[metric]
    return f"{metric_name(metric)} {metric_unit(metric)}".rstrip()


def cell(row: Mapping[str, Any], metric: str, value: str = "mean") -> str:
    """A number with its interval (none where it has none, or no width): shares with one decimal, others with two."""
    digits = {"share": 1, LIFT: 0, f"Gini@{K}": 3}.get(metric, 2)
    mean, low, high = (f"{metric_scale(metric) * row[name]:.{digits}f}" for name in (value, "low", "high"))
    return mean if low == high or np.isnan([row["low"], row["high"]]).any() else f"{mean} [{low}, {high}]"


def only_cell(rows: Frame, metric: str, value: str = "mean") -> str:
    """``cell`` of the one row that was selected, empty if there is none."""
    return cell(rows.iloc[0], metric, value) if len(rows) else ""


def facts(tables: Tables, setting: str, split: str) -> str:
    """How many seeds and examples stand behind a panel, and what one hit is worth."""
    rows = select(tables["metrics"], setting=setting, split=split)
    count, seeds = int(rows["examples"].iloc[0]), int(rows["seeds"].max())
    points = 100 * stats.one_hit(count)
    many = "s" * (seeds != 1)
    return f"{count:,} examples, {seeds} training seed{many}; one hit = {points:.3f} points of one seed's HR"


def result_table(tables: Tables, setting: str, split: str, everything: bool = False) -> Frame:
    """One panel as text cells: methods by the main (or all) accuracies, and the shares of the groups at both ends."""
    rows = select(tables["metrics"], setting=setting, split=split)
    rows = rows[~rows["metric"].isin(LISTS)]
    shares = select(tables["shares"], setting=setting, split=split, grouping="mass")
    names = (pd.concat([main_metrics(rows), rows]) if everything else main_metrics(rows))["metric"].unique()
    lines = []
    for method in rows["method"].unique():
        line = {"method": look(method).label}
        for metric in names:
            line[heading(metric)] = only_cell(select(rows, metric=metric, method=method), metric)
        for group in ENDS:
            share = select(shares, method=method, group=group)
            line[f"share of {group} %"] = only_cell(share, "share", "share")
        lines.append(line)
    return pd.DataFrame(lines)


def list_table(tables: Tables, setting: str, split: str) -> Frame:
    """What one panel's lists are like, as text cells: methods by concentration, variety and popularity lift.

    Without rows where the study's tables do not hold them.
    """
    rows = select(tables["metrics"], setting=setting, split=split)
    bounded = rows["metric"].isin(LIST_METRICS)  # shares: what intervals over a few seeds hold beyond 0 and 1 cannot be
    ends = rows[["low", "high"]].where(~bounded, rows[["low", "high"]].clip(0, 1))
    rows = rows.assign(low=ends["low"], high=ends["high"])
    names = [name for name in LISTS if name in set(rows["metric"])]
    lines = []
    for method in rows["method"].unique() if names else []:
        cells = {heading(name): only_cell(select(rows, metric=name, method=method), name) for name in names}
        lines.append({"method": look(method).label, **cells})
    return pd.DataFrame(lines)


def times_table(tables: Tables, setting: str, split: str, grouping: str = "count") -> Frame:
    """Accuracy by period as text cells: a row per metric and method, a column per period with its examples."""
    rows = select(tables["times"], setting=setting, split=split, grouping=grouping)
    lines = []
    for metric, method in rows[["metric", "method"]].drop_duplicates().itertuples(index=False):
        line = {"metric": heading(metric), "method": look(method).label}
        for row in select(rows, metric=metric, method=method).to_dict("records"):
            line[f"{row['group']} ({row['examples']:,})"] = cell(row, metric) if row["examples"] else ""
        lines.append(line)
    return pd.DataFrame(lines)


def slope_table(tables: Tables, setting: str, split: str) -> Frame:
    """Slopes of NDCG per step G1 -> G5 and T1 -> T5 as text cells (points per step): methods by grouping."""
    rows = select(tables["slopes"], setting=setting, split=split)
    lines = []
    for method in rows["method"].unique():
        line = {"method": look(method).label}
        for row in select(rows, method=method).to_dict("records"):
            line[f"{row['metric']} over {GROUPINGS.get(row['grouping'], row['grouping'])}"] = cell(row, "", "slope")
        lines.append(line)
    return pd.DataFrame(lines)


def slopes_by_method(tables: Tables, setting: str, grouping: str) -> Frame:
    """Slopes of NDCG over groups or periods for a forest plot: name, method, split, mean, low, high (points a step)."""
    rows = select(tables["slopes"], setting=setting, grouping=grouping)
    points = 100 * rows[["slope", "low", "high"]].rename(columns={"slope": "mean"})
    names = rows["method"].map(lambda method: look(method).label).rename("name")
    return pd.concat([names, rows[["method", "split"]], points], axis=1)


def selection_text(tables: Tables, rule: str) -> str:
    """The rule of a model selection and what it chooses, for the line above a table."""
    rows = pd.concat([tables["validation"], tables["metrics"]], ignore_index=True)
    chosen = select_by_rule(rows, rule)
    names = ", ".join(f"{look(method).label} on {setting}" for setting, method in chosen.items())
    return f"Selected by `{rule}` ({SELECTION[rule].text}): {names}."


def diagnostics_table(tables: Tables, setting: str) -> Frame:
    """The diagnostics of one setting as text cells, a column per trained method: means over seeds, texts joined."""
    rows = select(tables["diagnostics"], setting=setting)
    rows = rows[rows["method"] != "environments"].drop(columns=["setting", "seed"])

    def text(values: pd.Series) -> str:
        values = values.dropna()
        if values.empty:
            return ""
        if pd.api.types.is_numeric_dtype(values):
            return f"{values.mean():.4g}"
        return ", ".join(dict.fromkeys(values.astype(str)))

    columns = {
        look(method).label: part.drop(columns="method").apply(text)
        for method, part in rows.groupby("method", sort=False)
    }
    table = pd.DataFrame(columns).rename_axis("mean over seeds")
    return table[(table != "").any(axis=1)]


def blocks(table: Frame, columns: int = 8) -> list[Frame]:
    """A table of text cells in parts of at most ``columns`` columns, each without its empty rows: none is cut short."""
    parts = [table.iloc[:, start : start + columns] for start in range(0, table.shape[1], columns)]
    return [part[(part != "").any(axis=1)] for part in parts]


def markdown(table: Frame) -> str:
    """A table of text cells in Markdown."""
    rows = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def markdown_table(folder: str | Path, setting: str, splits: Sequence[str] = TEST_SPLITS) -> str:
    """The main results of one setting in Markdown, for notebooks and the README: one table per test split."""
    tables = read(folder)
    parts = []
    for split in select(tables["metrics"], setting=setting, split=list(splits))["split"].unique():
        about = f"{facts(tables, setting, split)}; 95 % intervals over seeds and users"
        title = f"**{setting}, {SPLITS[split]}** ({about})"
        parts += [title, markdown(result_table(tables, setting, split))]
    return "\n\n".join(parts)


def summary_text(folder: str | Path) -> str:
    """The study's main results for the console: per setting and split, methods by metrics, with intervals."""
    tables = read(folder)
    lines = []
    for setting in settings(tables):
        for split in select(tables["metrics"], setting=setting)["split"].unique():
            lines += ["", f"{setting}, {SPLITS[split]}: {facts(tables, setting, split)}"]
            lines += columns(result_table(tables, setting, split))
    return "\n".join([*lines[1:], "", "[low, high]: 95 % intervals over training seeds and users"])


def columns(table: Frame) -> list[str]:
    """A table of text cells as aligned lines for the console."""
    rows = [list(table.columns), *table.astype(str).to_numpy().tolist()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


# --- command line ---


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a study's tables and print their paths; 0, or 1 after one sentence about what is wrong."""
    from causaldpo_lib.study import command

    return command("tables", main.__doc__, write, arguments)


if __name__ == "__main__":
    sys.exit(main())
