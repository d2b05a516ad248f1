"""What the causal penalty costs in time: frames and sentences of notebook 16, from ``benchmarks/cost.py``'s json.

Each part was timed in every repetition for all methods in turn. Shown are the median and the range over the
repetitions; ratios to DPO are taken within a repetition. Times are milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from causaldpo_lib.audit import OURS, published
from causaldpo_lib.comparison import PENALISED, VARIANTS
from causaldpo_lib.errors import StudyError
from causaldpo_lib.paths import NOTEBOOKS, from_root
from causaldpo_lib.plots import look
from causaldpo_lib.records import read_json

Frame = pd.DataFrame
BASE = "dpo"
PARTS = {  # in the order of a step
    "collation": "collation",
    "forward": "forward pass",
    "loss": "loss",
    "batch clustering": "clustering of the batch",
    "penalty": "penalty, its forward part",
    "backward": "backward pass",
    "optimiser": "optimiser",
}
PRINTED = {"DPO": BASE, **VARIANTS, **PENALISED, OURS: "causal_dpo"}
EPOCHS = 3  # the paper's


def read_costs(path: str | Path) -> dict[str, Any]:
    """The benchmark's json; a relative path is taken from ``notebooks/``, else from the root.

    Raises:
        StudyError: there is none, or it is of something else.
    """
    for file in (NOTEBOOKS / path, from_root(path)):
        if file.is_file():
            found = read_json(file)
            if missing := [key for key in ("size", "once", "methods", "penalty", "ranking") if key not in found]:
                raise StudyError(f"{path} has no {missing[0]!r}: give the json of `python -m benchmarks.run cost`")
            return found
    raise StudyError(f"no file {str(path)!r}: run `python -m benchmarks.run cost --output figures/bench/cost.json`")


def _spread(values: Any) -> dict[str, float]:
    return {"mean": float(np.median(values)), "low": float(np.min(values)), "high": float(np.max(values))}


def _steps(costs: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Per method and part, seconds of a step in each repetition."""
    return {row["method"]: {part: np.array(s) for part, s in row["seconds"].items()} for row in costs["methods"]}


def profile(costs: Mapping[str, Any]) -> Frame:
    """Milliseconds of each part of a step, and of the whole: method, part (``total`` last), mean, low, high."""
    lines = []
    for method, seconds in _steps(costs).items():
        for part in (*PARTS, "total"):
            if part in seconds:
                lines.append({"method": method, "part": part, **_spread(1000 * seconds[part])})
    return pd.DataFrame(lines)


def accounted(costs: Mapping[str, Any]) -> Frame:
    """Which share of a whole step the parts are, per method: method, mean, low, high."""
    lines = []
    for method, seconds in _steps(costs).items():
        parts = sum(values for part, values in seconds.items() if part != "total")
        lines.append({"method": method, **_spread(parts / seconds["total"])})
    return pd.DataFrame(lines)


def epoch_seconds(costs: Mapping[str, Any], method: str, epochs: int) -> np.ndarray:
    """Seconds of ``epochs`` over the examples and of what is done once before them, in each repetition."""
    row = next(row for row in costs["methods"] if row["method"] == method)
    steps = math.ceil(costs["size"]["examples"] / costs["size"]["batch"])
    once = sum((np.array(costs["once"][part]) for part in row["once"]), np.zeros(costs["size"]["repeats"]))
    return epochs * steps * np.array(row["seconds"]["total"]) + once


def ratios(costs: Mapping[str, Any]) -> Frame:
    """Time of each method over DPO's: method, kind, mean, low, high, and what the paper prints for an epoch.

    ``kind``: ``step``; ``one epoch`` and ``three epochs``, both with what is done once before.
    """
    steps = _steps(costs)
    printed = published("seconds").drop_duplicates("method").set_index("method")["seconds_per_epoch"]
    paper = {PRINTED[name]: value / printed["DPO"] for name, value in printed.items()}
    lines = []
    for method in steps:
        over = {
            "step": steps[method]["total"] / steps[BASE]["total"],
            "one epoch": epoch_seconds(costs, method, 1) / epoch_seconds(costs, BASE, 1),
            "three epochs": epoch_seconds(costs, method, EPOCHS) / epoch_seconds(costs, BASE, EPOCHS),
        }
        key = {"method": method, "paper": paper.get(method, np.nan)}
        lines += [{**key, "kind": kind, **_spread(values)} for kind, values in over.items()]
    return pd.DataFrame(lines)


def ratio_table(costs: Mapping[str, Any]) -> Frame:
    """``ratios`` as text cells beside the paper's: a row per method, ranges over the repetitions in brackets."""
    lines = []
    for method, rows in ratios(costs).groupby("method", sort=False):
        line = {"method": look(method).label}
        for row in rows.itertuples():
            line[row.kind] = f"{row.mean:.2f} [{row.low:.2f}, {row.high:.2f}]"
        paper = rows["paper"].iloc[0]
        lines.append({**line, "paper, epoch": "" if np.isnan(paper) else f"{paper:.2f}"})
    return pd.DataFrame(lines)


def once_table(costs: Mapping[str, Any]) -> Frame:
    """What is done once before training: its milliseconds per example and its share of one epoch of CausalDPO in %."""
    whole = epoch_seconds(costs, "causal_dpo", 1)
    names = {"reference": "reference: log-probabilities and prompt states", "clustering": "clustering and memberships"}
    lines = []
    for part, values in costs["once"].items():
        seconds = np.array(values)
        each, share = _spread(1000 * seconds / costs["size"]["examples"]), _spread(100 * seconds / whole)
        line = {"once": names[part], "ms an example": f"{each['mean']:.3f} [{each['low']:.3f}, {each['high']:.3f}]"}
        lines.append({**line, "% of the epoch": f"{share['mean']:.1f} [{share['low']:.1f}, {share['high']:.1f}]"})
    return pd.DataFrame(lines)


def penalty_scaling(costs: Mapping[str, Any]) -> Frame:
    """Milliseconds of the penalty, forward and backward: batch, environments, series, mean, low, high."""
    lines = []
    for row in costs["penalty"]:
        key = {"batch": row["batch"], "environments": row["environments"], "series": f"K = {row['environments']}"}
        lines.append({**key, **_spread(1000 * np.array(row["seconds"]))})
    return pd.DataFrame(lines)


def ranking_scaling(costs: Mapping[str, Any]) -> Frame:
    """Milliseconds a prompt of the rankers: titles, series, mean, low, high."""
    lines = [
        {"titles": r["titles"], "series": r["ranker"], **_spread(1000 * np.array(r["seconds"]))}
        for r in costs["ranking"]
    ]
    return pd.DataFrame(lines)


def exponent(rows: Frame, x: str) -> float:
    """Between the two largest ``x`` of one series: the power p in time ~ x^p; NaN with a single one."""
    ends = rows.sort_values(x).iloc[-2:]
    if len(ends) < 2:
        return float("nan")
    first, last = ends.iloc[0], ends.iloc[1]
    return float(np.log(last["mean"] / first["mean"]) / np.log(last[x] / first[x]))


# --- sentences, in Markdown ---


def _times(row: Any) -> str:
    return f"{row.mean:.2f} [{row.low:.2f}, {row.high:.2f}]"


def step_takeaway(costs: Mapping[str, Any]) -> str:
    """How much longer a step of CausalDPO is than DPO's, and which share of it is the penalty's own."""
    steps = _steps(costs)
    ratio = next(r for r in ratios(costs).itertuples() if r.method == "causal_dpo" and r.kind == "step")
    share = _spread(100 * steps["causal_dpo"]["penalty"] / steps["causal_dpo"]["total"])
    parts = accounted(costs)
    size = costs["size"]
    inside = "the range over the repetitions holds 1" if ratio.low <= 1 <= ratio.high else "all repetitions agree"
    inside += " in that it is longer" if ratio.low > 1 else " in that it is shorter" if ratio.high < 1 else ""
    return (
        f"**Takeaway.** A step of CausalDPO with {size['batch']} prompts takes {_times(ratio)} times that of DPO "
        f"({inside}); the penalty's forward part is {share['mean']:.2f} % [{share['low']:.2f}, {share['high']:.2f}] of "
        f"it. The parts add up to {100 * parts['mean'].min():.1f} to {100 * parts['mean'].max():.1f} % of the steps."
    )


def epoch_takeaway(costs: Mapping[str, Any]) -> str:
    """Epochs here and in the paper, as ratios to DPO, and whether the paper's is inside the range over repetitions."""
    found = ratios(costs)
    known = found[(found["kind"] == "one epoch") & found["paper"].notna() & (found["method"] != BASE)]
    said = []
    for row in known.itertuples():
        place = "inside" if row.low <= row.paper <= row.high else "above" if row.paper > row.high else "below"
        said.append(f"{look(row.method).label} {_times(row)}, printed {row.paper:.2f} ({place} this range)")
    order = known.assign(here=known["mean"].rank(), there=known["paper"].rank())
    same = "the same" if (order["here"] == order["there"]).all() else "another"
    batchwise = next((r for r in found.itertuples() if r.method == "mini_batch" and r.kind == "one epoch"), None)
    alone = f" Algorithm 1, which clusters every mini-batch: {_times(batchwise)}." if batchwise else ""
    return (
        f"**Takeaway.** One epoch over DPO's, with what is done once: {'; '.join(said)}. The order of these is {same} "
        f"{'as' if same == 'the same' else 'than'} printed.{alone}"
    )


def penalty_takeaway(costs: Mapping[str, Any]) -> str:
    """How the penalty grows with batch and environments, and what it is beside a step that grows in proportion."""
    rows = penalty_scaling(costs)
    powers = [f"{exponent(part, 'batch'):.2f} ({series})" for series, part in rows.groupby("series", sort=False)]
    largest = rows[rows["batch"] == rows["batch"].max()].sort_values("environments")
    few, many = largest.iloc[0], largest.iloc[-1]
    step = 1000 * np.median(_steps(costs)[BASE]["total"]) / costs["size"]["batch"] * few["batch"]
    return (
        f"**Takeaway.** Between the two largest batches the penalty grows with the power {', '.join(powers)} of the "
        f"batch (2: quadratic). At {few['batch']:.0f} prompts {many['series']} takes {many['mean'] / few['mean']:.1f} "
        f"times as long as {few['series']}. There it would be {100 * few['mean'] / step:.2f} to "
        f"{100 * many['mean'] / step:.2f} % of a step of DPO, if the step grew in proportion to the batch."
    )


def ranking_takeaway(costs: Mapping[str, Any]) -> str:
    """How the rankers grow with the catalogue."""
    said = []
    for series, part in ranking_scaling(costs).groupby("series", sort=False):
        part = part.sort_values("titles")
        first, last = part.iloc[0], part.iloc[-1]
        said.append(
            f"{series}: {last['titles'] / first['titles']:.0f} times the titles take "
            f"{last['mean'] / first['mean']:.1f} times as long (power {exponent(part, 'titles'):.2f} between the two "
            "largest)"
        )
    return f"**Takeaway.** A prompt's ranking by {'; by '.join(said)}. No method of training changes this."


def about(costs: Mapping[str, Any]) -> str:
    """What was measured, in one sentence for a caption."""
    size = costs["size"]
    return (
        f"*{size['backbone']} backbone, {costs['parameters'] / 1e6:.2f} million parameters, {size['titles']:,} titles, "
        f"batches of {size['batch']}, {costs['threads']} thread, {costs['clock']} time, medians and ranges over "
        f"{size['repeats']} interleaved repetitions.*"
    )
