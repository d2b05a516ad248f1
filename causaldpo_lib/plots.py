"""Figures: one style, one look per method, functions that draw a tidy table on an axis and compute nothing.

Every function takes the axis first and a table in the column layout of ``tables.py``, already reduced to what
one panel shows; the notebook writes the same table beside the image with ``save``.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from causaldpo_lib.parameters import read_yaml
from causaldpo_lib.paths import PARAMS

WIDTH = 7.2  # inches, the text width of a notebook or a README on a laptop
DPI = 160


Draw = Callable[[Axes, pd.DataFrame], Axes]


class Look(NamedTuple):
    """How a method appears in every figure."""

    colour: str
    marker: str
    label: str


# Okabe and Ito's colour-blind-safe palette; grey for what is not the method under study.
COLOURS = {
    "sft": ("#6E6E6E", "s"),
    "dpo": ("#0072B2", "o"),
    "causal_dpo": ("#D55E00", "D"),
    "shuffled": ("#009E73", "^"),
    "popularity_negatives": ("#E69F00", "v"),
    "causal_negatives": ("#CC79A7", "P"),
    "dlcm": ("#0072B2", "o"),
    "prm": ("#D55E00", "D"),
    "set_rank": ("#009E73", "^"),
    "random": ("#BDBDBD", "x"),
    "popular": ("#BDBDBD", "P"),
    "training": ("#000000", "_"),
    "targets": ("#000000", "*"),
}
# Of what is no method; a method's label stands in its file in params/methods.
LABELS = {
    "random": "Random",
    "popular": "Most popular",
    "training": "Training data",
    "targets": "Test targets",
}
# How a sweep's value is worded after its method's label; a value of 1 takes the last s away.
SWEPT = {
    "negatives_per_prompt": "{} negatives",
    "mmd_weight": "λ {}",
    "beta": "beta {}",
    "alpha": "alpha {}",
    "gamma": "gamma {}",
    "selection": "selection {}",
    "iterations": "{} iterations",
    "backbone": "backbone {}",
    "negatives_tempering": "tempering {}",
    "learning_rate": "learning rate {}",
    "output": "output {}",
    "mmd_estimator": "estimator {}",
    "memberships": "{} environments",
    "membership_gradient": "gradient {}",
}
KINDS = {"oracle_environment": "true"}  # of memberships, in words
OTHERS = ("#CC79A7", "#E69F00", "#56B4E9", "#8C6BB1", "#A6761D")  # methods added later, by name
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6BB1", "#A6761D")
SPLITS = {"validation": "validation", "iid_test": "IID test", "ood_test": "OOD test"}
SPLIT_COLOURS = {"train": "#6E6E6E", "validation": "#E69F00", "iid_test": "#56B4E9", "ood_test": "#D55E00"}
METRICS = {
    "target_logp": "log-probability of the target",
    "causal_NDCG@10": "causal NDCG@10",
    "causal_KL": "KL error against the interventional preference",
    "popularity_lift@10": "popularity lift@10",
}
NATS = ("target_logp", "causal_KL")
POINTS = {
    "environment": "inferred environment",
    "true_environment": "true environment",
    "period": "period of the choice",
    "group": "popularity of the history",
}
GROUPINGS = {
    "mass": "groups of equal training mass",
    "items": "groups of equally many items",
    "environment": "true environments",
    "count": "periods of equally many examples",
    "length": "periods of equal length",
}


@lru_cache
def look(method: str) -> Look:
    """The colour, marker and label of a method or reference; others get a stable colour and their name.

    A method of a sweep, ``<method>-<key>-<value>``, looks as its method does, and its label says the value. DynamicPO
    has the colour of the loss that it is put on, and a marker of its own.
    """
    base, *swept = method.split("-", 2)
    file = PARAMS / "methods" / f"{base}.yaml"
    if len(swept) == 2 and file.exists():
        key, value = swept
        wording = SWEPT.get(key, f"{key} {{}}")
        wording = wording.removesuffix("s") if value == "1" else wording
        return look(base)._replace(label=f"{look(base).label}, {wording.format(KINDS.get(value, value))}")
    if (loss := method.removeprefix("dynamic_")) != method:
        colour, marker = look(loss).colour, "D"
    else:
        colour, marker = COLOURS.get(method) or (OTHERS[sum(method.encode()) % len(OTHERS)], "v")
    file = PARAMS / "methods" / f"{method}.yaml"
    label = read_yaml(file)["label"] if file.exists() else LABELS.get(method, method)
    return Look(colour, marker, label)


def metric_name(metric: str) -> str:
    """A metric's name in a title or a sentence; groups are of equal training mass unless the name says otherwise."""
    found = re.fullmatch(r"(slope_)?(share|NDCG@\d+)(?:@\d+)?_([a-z]+)(?:_(\w+))?", metric)
    if not found:
        return METRICS.get(metric, metric)
    slope, what, grouping, group = found.groups()
    name = f"share of {group}" if what == "share" else f"{what} on {group}"
    name = f"slope of {what} over the groups" if slope else name
    return name if grouping == "mass" else f"{name}, {GROUPINGS.get(grouping, grouping)}"


def metric_unit(metric: str, difference: bool = False) -> str:
    """The unit of a metric's shown values: nats, percent, percentage points of a difference, or none."""
    if metric in NATS:
        return "nats"
    if metric == "Gini@10":
        return ""
    return "points" if difference else "%"


def metric_scale(metric: str) -> float:
    """The factor from a table's number to the shown one: percent for fractions, 1 for what has another unit."""
    return 1.0 if metric in (*NATS, "Gini@10") else 100.0


def use_style() -> None:
    """Set the one figure style of the study for this process."""
    mpl.rcParams.update(
        {
            "figure.dpi": 100,
            "savefig.dpi": DPI,
            "figure.constrained_layout.use": True,
            "font.size": 9.5,
            "axes.titlesize": 10,
            "axes.labelsize": 9.5,
            "legend.fontsize": 9,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#E6E6E6",
            "grid.linewidth": 0.7,
            "lines.linewidth": 1.4,
            "lines.markersize": 5,
            "errorbar.capsize": 2,
        }
    )


def panels(columns: int = 1, rows: int = 1, height: float = 3.0, **options: object) -> tuple[Figure, np.ndarray]:
    """A figure of the study's width and its axes (rows, columns); ``height`` in inches per row."""
    use_style()
    return plt.subplots(rows, columns, figsize=(WIDTH, height * rows), squeeze=False, **options)


def by_split(table: pd.DataFrame, draw: Draw, title: str) -> Figure:
    """One panel per split of a table, side by side on one scale, each drawn by ``draw(ax, its rows)``."""
    splits = list(table["split"].unique())
    fig, axes = panels(len(splits), sharey=True)
    for ax, split in zip(axes.flat, splits, strict=True):
        draw(ax, table[table["split"] == split])
        ax.set_title(SPLITS.get(split, split))
    fig.suptitle(title)
    legend_below(fig)
    return fig


def by_metric(table: pd.DataFrame, draw: Draw, title: str) -> Figure:
    """One panel per metric of a table, two in a row, each with its own scale, drawn by ``draw(ax, its rows)``.

    Panels grow with the rows of a forest plot: the methods, or the pairs of them.
    """
    metrics = list(table["metric"].unique())
    rows = len(table[["method", *table.columns.intersection(["baseline"])]].drop_duplicates())
    fig, axes = panels(2, (len(metrics) + 1) // 2, height=max(2.5, 0.8 + 0.2 * rows), sharey=True)
    for ax, metric in zip(axes.flat, metrics, strict=False):
        draw(ax, table[table["metric"] == metric])
    for ax in axes.flat[len(metrics) :]:
        ax.set_axis_off()
    fig.suptitle(title)
    legend_below(fig)
    return fig


def legend_below(fig: Figure, columns: int = 4) -> None:
    """One legend under all panels, each label once."""
    found: dict[str, object] = {}
    for ax in fig.axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        fig.legend(found.values(), found.keys(), loc="outside lower center", ncols=min(columns, len(found)))


def save(fig: Figure, stem: str, data: pd.DataFrame, folder: str | Path) -> Path:
    """Write ``<stem>.png`` and, with the plotted values, ``<stem>.csv``; returns the image's path."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    data.to_csv(target / f"{stem}.csv", index=False, float_format="%.6g")
    image = target / f"{stem}.png"
    fig.savefig(image, dpi=DPI, metadata={"Software": None})  # same figure, same bytes
    return image


def picture(fig: Figure, dpi: int = 100) -> Image:
    """The figure as a notebook shows it, in a palette of 128 colours: a third of the bytes, the same to the eye."""
    full, small = BytesIO(), BytesIO()
    fig.savefig(full, format="png", dpi=dpi, metadata={"Software": None})
    with PIL.Image.open(full) as pixels:
        pixels.convert("RGB").quantize(128).save(small, "png", optimize=True)
    return Image(small.getvalue(), format="png")


def _whiskers(rows: pd.DataFrame, value: str, scale: float = 1.0) -> np.ndarray:
    """Distances from the value down to ``low`` and up to ``high``, as matplotlib wants them: (2, n)."""
    below = (rows[value] - rows["low"]).clip(lower=0)
    above = (rows["high"] - rows[value]).clip(lower=0)
    return scale * np.stack([below.to_numpy(float), above.to_numpy(float)])


def _label_y(ax: Axes, text: str) -> None:
    """Label the vertical axis, once where panels share it."""
    shared = len(ax.get_shared_y_axes().get_siblings(ax)) > 1
    if not shared or ax.get_subplotspec().is_first_col():
        ax.set_ylabel(text)


def _present(rows: pd.DataFrame) -> list[str]:
    """The methods of a table in their order of appearance."""
    return list(dict.fromkeys(rows["method"]))


def group_shares(ax: Axes, shares: pd.DataFrame) -> Axes:
    """Bars with intervals: the share of recommendation slots (%) that each popularity group gets, by method.

    Columns: group, method, share (fraction), low, high. The methods ``training`` and ``targets`` are
    references, drawn as a line and a star over each group instead of a bar.
    """
    groups = sorted(shares["group"].unique())
    methods = [m for m in _present(shares) if m not in ("training", "targets")]
    width = 0.8 / max(len(methods), 1)
    place = {group: position for position, group in enumerate(groups)}
    for index, method in enumerate(methods):
        rows = shares[shares["method"] == method]
        x = rows["group"].map(place) - 0.4 + (index + 0.5) * width
        style = look(method)
        ax.bar(x, 100 * rows["share"], width * 0.92, color=style.colour, label=style.label)
        ax.errorbar(x, 100 * rows["share"], _whiskers(rows, "share", 100), fmt="none", ecolor="#222222", lw=0.9)
    training = shares[shares["method"] == "training"]
    x = training["group"].map(place).to_numpy(float)
    if len(training):
        share = 100 * training["share"]
        ax.hlines(share, x - 0.46, x + 0.46, color="black", lw=1.3, ls=(0, (3, 1.5)), label=look("training").label)
    targets = shares[shares["method"] == "targets"]
    if len(targets):
        x = targets["group"].map(place)
        ax.plot(x, 100 * targets["share"], "*", ms=9, mfc="white", mec="black", label=look("targets").label)
    ax.set_xticks(range(len(groups)), groups)
    ax.set_xlabel("popularity group (G1 = most popular)")
    _label_y(ax, "share of top-10 slots (%)")
    ax.grid(axis="x", visible=False)
    return ax


def group_ndcg(ax: Axes, groups: pd.DataFrame, label: str = "group of the target") -> Axes:
    """Points with intervals: NDCG@10 (%) of the examples whose target is in each group or period, by method.

    Columns: group, method, mean (fraction), low, high, examples (in the group, shown under its name).
    """
    names = sorted(groups["group"].unique())
    methods = _present(groups)
    step = 0.6 / max(len(methods) - 1, 1)
    for index, method in enumerate(methods):
        rows = groups[groups["method"] == method].sort_values("group")
        x = rows["group"].map(names.index) - 0.3 + index * step
        style = look(method)
        ax.errorbar(
            x,
            100 * rows["mean"],
            _whiskers(rows, "mean", 100),
            fmt=style.marker,
            color=style.colour,
            lw=1.1,
            label=style.label,
        )
    sizes = groups.groupby("group")["examples"].first()
    ax.set_xticks(range(len(names)), [f"{name}\n{sizes[name]:,}" for name in names])
    ax.set_xlabel(f"{label}, number of test examples")
    _label_y(ax, "NDCG@10 (%)")
    ax.axhline(0, color="black", lw=0.9)  # in view; a fixed limit would cut panels that share the axis
    ax.grid(axis="x", visible=False)
    return ax


def metric_intervals(ax: Axes, metrics: pd.DataFrame) -> Axes:
    """Forest plot of one metric in one setting: a row per method, IID test hollow and OOD test filled.

    Columns: split, method, metric (one), mean, low, high.
    """
    metric = metrics["metric"].iloc[0]
    scale = metric_scale(metric)
    methods = _present(metrics)
    for split, offset, face in (("iid_test", -0.14, "white"), ("ood_test", 0.14, None)):
        for position, method in enumerate(methods):
            rows = metrics[(metrics["method"] == method) & (metrics["split"] == split)]
            style = look(method)
            ax.errorbar(
                scale * rows["mean"],
                [position + offset] * len(rows),
                xerr=_whiskers(rows, "mean", scale),
                fmt="o",
                color=style.colour,
                mfc=face or style.colour,
            )
        ax.plot([], [], "o", color="#444444", mfc=face or "#444444", label=SPLITS[split])
    _name_rows(ax, [look(method).label for method in methods])
    ax.set_title(metric_name(metric))
    ax.set_xlabel(f"mean ({metric_unit(metric)})")
    return ax


def paired_differences(ax: Axes, paired: pd.DataFrame) -> Axes:
    """Forest plot of paired differences in one metric and setting: a row per comparison, a line at no effect.

    Columns: split, metric (one), method, baseline, difference, low, high. Filled: OOD test; hollow: IID.
    """
    metric = paired["metric"].iloc[0]
    scale = metric_scale(metric)
    pairs = list(dict.fromkeys(zip(paired["method"], paired["baseline"], strict=True)))
    ax.axvline(0, color="black", lw=0.9)
    for split, offset, face in (("iid_test", -0.14, "white"), ("ood_test", 0.14, None)):
        for position, (method, baseline) in enumerate(pairs):
            chosen = (paired["method"] == method) & (paired["baseline"] == baseline) & (paired["split"] == split)
            rows = paired[chosen]
            colour = look(method).colour
            ax.errorbar(
                scale * rows["difference"],
                [position + offset] * len(rows),
                xerr=_whiskers(rows, "difference", scale),
                fmt="o",
                color=colour,
                mfc=face or colour,
            )
        ax.plot([], [], "o", color="#444444", mfc=face or "#444444", label=SPLITS[split])
    _name_rows(ax, [f"{look(method).label} − {look(baseline).label}" for method, baseline in pairs])
    ax.set_title(metric_name(metric))
    ax.set_xlabel(f"difference ({metric_unit(metric, difference=True)})")
    return ax


def _name_rows(ax: Axes, names: list[str]) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)  # the first row on top
    ax.grid(axis="y", visible=False)


def identity_band(ax: Axes, rows: pd.DataFrame, bounds: str) -> Axes:
    """What an average hit counts in printed rows, inside the band that arithmetic and rounding allow.

    Columns (``audit.identities``, one identity): x (hit rate, %), y (NDCG, %), low, high (allowed y), holds.
    ``bounds``: the label of the band. Rows inside are dots, rows outside crosses.
    """
    ordered = rows.sort_values("x")
    x = ordered["x"].to_numpy(float)
    band = [ordered[side] / x for side in ("low", "high")]
    ax.fill_between(x, *band, color="#56B4E9", alpha=0.3, lw=0, label=bounds)
    for holds, colour, marker, label in ((True, "#6E6E6E", "o", "possible"), (False, "#D55E00", "X", "not possible")):
        part = rows[rows["holds"] == holds]
        ax.plot(part["x"], part["y"] / part["x"], marker, color=colour, ms=5, alpha=0.85, label=f"{label} as printed")
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(NullLocator())
    return ax


def granularity_scan(ax: Axes, scan: pd.DataFrame, best: int) -> Axes:
    """How many printed hit rates are whole hits, by supposed number of test examples, beside what chance gives.

    Columns (``audit.granularity``): examples, fits, chance. The best-fitting number is marked.
    """
    ax.step(scan["examples"], scan["fits"], where="mid", color="#0072B2", lw=0.8, label="figures that are whole hits")
    ax.plot(scan["examples"], scan["chance"], color="black", ls=(0, (3, 1.5)), label="expected by chance")
    row = scan[scan["examples"] == best]
    ax.plot(row["examples"], row["fits"], "D", color="#D55E00", label="largest excess")
    ax.annotate(f"{best:,}", (best, row["fits"].iloc[0]), xytext=(5, 3), textcoords="offset points")
    ax.set_xlabel("supposed number of test examples")
    _label_y(ax, "fitting figures")
    return ax


def paper_and_replication(ax: Axes, rows: pd.DataFrame) -> Axes:
    """Relative differences (% of the baseline) of the paper and of this study: a row per comparison and metric.

    Columns (``audit.side_by_side``, one setting): metric, method, baseline, paper, difference, low, high.
    """
    rows = rows.reset_index(drop=True)
    ax.axvline(0, color="black", lw=0.9)
    whiskers = _whiskers(rows, "difference")
    for position, row in rows.iterrows():
        style = look(row["method"])
        reach = whiskers[:, position : position + 1]
        ax.errorbar(row["difference"], position, xerr=reach, fmt="o", color=style.colour)
    ax.plot(rows["paper"], rows.index, "*", ms=9, mfc="white", mec="black", label="paper, no interval printed")
    ax.plot([], [], "o", color="#444444", label="this study, 95 % interval")
    names = [f"{look(r.method).label} − {look(r.baseline).label}, {r.metric}" for r in rows.itertuples()]
    _name_rows(ax, names)
    ax.set_xlabel("difference (% of the baseline's value)")
    return ax


def umap_points(ax: Axes, points: pd.DataFrame, by: str) -> Axes:
    """Scatter of projected prompt states coloured by ``by``; axes have no unit, only neighbourhoods count.

    Columns: umap_x, umap_y and ``by``. Popularity groups and periods get an ordered colour scale, everything else a
    palette; the value -1 (no cluster) is light grey.
    """
    values = sorted(points[by].unique())
    ordered = by in ("group", "period")
    for index, value in enumerate(values):
        rows = points[points[by] == value]
        if value in (-1, "-1"):
            colour, name = "#D0D0D0", "none"
        elif ordered:
            colour, name = mpl.colormaps["viridis"](0.92 * index / max(len(values) - 1, 1)), str(value)
        else:
            colour, name = PALETTE[index % len(PALETTE)], str(value)
        ax.scatter(rows["umap_x"], rows["umap_y"], s=7, color=colour, lw=0, alpha=0.8, label=name)
    ax.set_title(POINTS.get(by, by))
    ax.set_xlabel("UMAP 1 (no unit)")
    _label_y(ax, "UMAP 2 (no unit)")
    ax.set_xticks([])
    ax.set_yticks([])
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1), "ncols": 3}
    ax.legend(**place, markerscale=2, columnspacing=0.8, handletextpad=0.1)
    return ax


def umap_maps(points: pd.DataFrame, title: str) -> Figure:
    """The map coloured by each of ``POINTS`` that the table has, two panels a row."""
    colours = [by for by in POINTS if by in points]
    fig, axes = panels(2, (len(colours) + 1) // 2, height=3.2, sharey=True)
    for ax, by in zip(axes.flat, colours, strict=False):
        umap_points(ax, points, by)
    for ax in axes.flat[len(colours) :]:
        ax.set_axis_off()
    fig.suptitle(title)
    return fig


def training_curves(ax: Axes, log: pd.DataFrame, column: str, label: str | None = None) -> Axes:
    """One logged quantity against the optimiser step: a line per method and seed, methods in their colours.

    Columns: step, ``column``, and optionally method and seed. Rows without a value are left out.
    """
    rows = log.dropna(subset=[column])
    keys = [key for key in ("method", "seed") if key in rows]
    named: set[str] = set()
    for name, line in rows.groupby(keys, sort=False) if keys else [((), rows)]:
        method = name[0] if "method" in keys else "causal_dpo"
        style = look(method)
        show = style.label if "method" in keys and method not in named else None
        named.add(method)
        ax.plot(line["step"], line[column], color=style.colour, lw=1.2, alpha=0.85, label=show)
    ax.set_xlabel("optimiser step")
    ax.set_ylabel(label or column.replace("_", " "))
    return ax


def split_histograms(ax: Axes, histogram: pd.DataFrame, label: str, dates: bool = False, log: bool = False) -> Axes:
    """Outlined histograms of one quantity, one per split, as shares (%) of the split's own interactions.

    Columns: split, left, right, share (fraction) as ``tables.histogram`` counts them. ``dates``: edges
    are seconds since 1970; ``log``: a logarithmic horizontal axis.
    """
    for split in sorted(histogram["split"].unique(), key=list(SPLIT_COLOURS).index):
        rows = histogram[histogram["split"] == split]
        edges = np.append(rows["left"].to_numpy(float), rows["right"].to_numpy(float)[-1])
        at = edges / 86400 if dates else edges  # matplotlib's dates count days since 1970
        name = SPLITS.get(split, "training" if split == "train" else split)
        ax.stairs(100 * rows["share"], at, color=SPLIT_COLOURS.get(split, "#222222"), lw=1.4, label=name)
    if dates:
        locator = AutoDateLocator(minticks=3, maxticks=6)
        ax.xaxis.set_major_locator(locator)
        ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))
    if log:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel(label)
    _label_y(ax, "share of the split (%)")
    return ax


def hit_rate_curve(ax: Axes, curve: pd.DataFrame, floor: np.ndarray) -> Axes:
    """Hit rate (%) against the length of the list, a line per split, and the ``floor`` (fractions) of a random list.

    ``curve``: fractions, one row per list length (its index), one column per split.
    """
    for split in curve:
        ax.plot(curve.index, 100 * curve[split], color=SPLIT_COLOURS.get(split), label=SPLITS.get(split, split))
    ax.plot(curve.index, 100 * np.asarray(floor), color="#222222", ls=":", label="random list")
    ax.set_ylim(bottom=0)
    ax.set_xlabel("length of the list (items)")
    _label_y(ax, "hit rate (%)")
    return ax


# --- The study of data alone (notebook 09) ---


def split_numbers(ax: Axes, table: pd.DataFrame, column: str, label: str, scale: float = 1.0) -> Axes:
    """One number of the splits as points, a row per setting in the table's order: training, IID test and OOD test.

    Columns: setting, split and ``column``, shown times ``scale``. The numbers are of whole splits: no interval.
    """
    settings = list(dict.fromkeys(table["setting"]))
    # The IID test is hollow and on top, so that it shows where both tests are one point.
    for split, marker, size in (("train", "|", 8), ("ood_test", "D", 4.5), ("iid_test", "o", 7)):
        rows = table[table["split"] == split]
        y = rows["setting"].map(settings.index)
        face = "none" if split == "iid_test" else SPLIT_COLOURS[split]
        style = {"color": SPLIT_COLOURS[split], "mfc": face, "ms": size, "mew": 1.4}
        ax.plot(scale * rows[column], y, marker, label=SPLITS.get(split, "training"), **style)
    _name_rows(ax, settings)
    ax.grid(axis="y", visible=True)  # leads the eye to the setting's name
    ax.set_xlabel(label)
    return ax


def setting_histograms(histograms: pd.DataFrame, quantity: str, label: str) -> Figure:
    """Small multiples of `split_histograms`: a column per dataset, a row per setting without its dataset's name.

    Columns: setting, dataset, shift, quantity, split, left, right, share. Validation, which is drawn as
    training is, is left out.
    """
    rows = histograms[(histograms["quantity"] == quantity) & (histograms["split"] != "validation")]
    names = zip(rows["setting"], rows["dataset"], strict=True)
    rows = rows.assign(kind=[setting.removeprefix(f"{dataset}-") for setting, dataset in names])
    datasets, shifts = (list(dict.fromkeys(rows[name])) for name in ("dataset", "shift"))
    kinds = [kind for shift in shifts for kind in dict.fromkeys(rows.loc[rows["shift"] == shift, "kind"])]
    fig, axes = panels(len(datasets), len(kinds), height=1.15, sharex="col")
    for column, dataset in enumerate(datasets):
        mine = rows[rows["dataset"] == dataset]
        last = max(kinds.index(kind) for kind in mine["kind"])
        for place, (ax, kind) in enumerate(zip(axes[:, column], kinds, strict=True)):
            found = mine[mine["kind"] == kind]
            if found.empty:
                ax.set_axis_off()
                continue
            split_histograms(ax, found, "", dates=quantity == "time", log=quantity == "popularity")
            if quantity == "popularity":
                ax.xaxis.set_major_locator(LogLocator())  # decades only: a panel is narrow
            ax.tick_params(labelsize=7, labelbottom=place == last)
            ax.xaxis.get_offset_text().set_fontsize(7)
            ax.set(xlabel="", ylabel="")
            ax.set_title(f"{dataset}\n{kind}", fontsize=8)
    fig.suptitle(label, fontsize=9)
    fig.supylabel("share of the split (%)", fontsize=9)
    legend_below(fig)
    return fig


# --- The method, step by step (notebook 11) ---


def response_points(ax: Axes, table: pd.DataFrame) -> Axes:
    """Responses by their log-probability under the reference and under the policy; on the diagonal the reward is 0.

    Columns: response (``chosen`` or ``rejected``), reference and policy (nats).
    """
    low = table[["reference", "policy"]].to_numpy().min()
    ax.axline((low, low), slope=1, color="black", lw=0.9, label="reward 0")
    for response, colour, marker in (("rejected", "#6E6E6E", "x"), ("chosen", "#0072B2", "o")):
        rows = table[table["response"] == response]
        ax.plot(rows["reference"], rows["policy"], marker, color=colour, ms=4.5, label=response)
    ax.set_xlabel("log-probability under the reference (nats)")
    ax.set_ylabel("under the policy (nats)")
    return ax


def environment_colour(environment: int) -> str:
    """The colour of an environment by its number."""
    return PALETTE[environment % len(PALETTE)]


def membership_bars(ax: Axes, memberships: np.ndarray, owners: np.ndarray) -> Axes:
    """One bar per example, cut into its memberships (B, K); ``owners`` (B,), sorted: its largest, marked below."""
    below = np.zeros(len(memberships))
    for environment, column in enumerate(memberships.T):
        style = {"color": environment_colour(environment), "label": f"environment {environment}"}
        ax.bar(range(len(column)), column, 0.85, bottom=below, **style)
        below += column
    _mark_owners(ax, owners)
    ax.set_ylim(0, 1)
    ax.set_ylabel("membership")
    return ax


def kernel_matrix(ax: Axes, kernel: np.ndarray, owners: np.ndarray) -> Axes:
    """Kernel values (B, B) of examples ordered by environment (``owners``, sorted), the blocks outlined."""
    image = ax.imshow(kernel, cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
    ax.figure.colorbar(image, ax=ax, label="kernel value", shrink=0.85)
    for edge in np.flatnonzero(np.diff(owners)) + 0.5:
        ax.axhline(edge, color="white", lw=0.9)
        ax.axvline(edge, color="white", lw=0.9)
    _mark_owners(ax, owners)
    ax.set_yticks(ax.get_xticks(), np.unique(owners))
    ax.grid(visible=False)
    return ax


def pair_matrix(ax: Axes, values: np.ndarray) -> Axes:
    """One number per pair of environments, (K, K) and symmetric, written out in the lower triangle."""
    count = len(values)
    lower = np.where(np.tri(count, k=-1, dtype=bool), values, np.nan)
    ax.imshow(lower, cmap="Blues", vmin=0, interpolation="nearest")
    for m, n in zip(*np.tril_indices(count, -1), strict=True):
        dark = values[m, n] > 0.6 * np.nanmax(lower)
        ax.text(n, m, f"{values[m, n]:.2f}", ha="center", va="center", fontsize=8, color="white" if dark else "black")
    ax.set_xticks(range(count))
    ax.set_yticks(range(count))
    ax.set_xlabel("environment")
    ax.set_ylabel("environment")
    ax.grid(visible=False)
    return ax


def reward_pulls(ax: Axes, table: pd.DataFrame) -> Axes:
    """Chosen rewards, a row per environment, each with an arrow along the penalty's push; a bar is the weighted mean.

    Columns: environment (an example's largest membership), reward, push (signed, as long as it is to be drawn) and mean
    (of the environment, all memberships counted).
    """
    present = list(table["environment"].unique())
    for row, environment in enumerate(present):
        rows = table[table["environment"] == environment]
        spread = row + (np.linspace(-0.32, 0.32, len(rows)) if len(rows) > 1 else np.zeros(1))
        colour = environment_colour(environment)
        ax.plot(rows["reward"], spread, "o", color=colour, ms=3.5)
        arrow = {"arrowstyle": "-|>,head_width=0.16,head_length=0.28", "color": colour, "lw": 1.1, "shrinkA": 0}
        for reward, y, push in zip(rows["reward"], spread, rows["push"], strict=True):
            ax.annotate("", (reward + push, y), (reward, y), arrowprops=arrow | {"shrinkB": 0})
        ax.vlines(rows["mean"].iloc[0], row - 0.42, row + 0.42, color="black", lw=1.6)
    _name_rows(ax, [f"{environment}" for environment in present])
    ax.set_xlabel("reward of the chosen response")
    ax.set_ylabel("environment")
    return ax


def pushes(ax: Axes, table: pd.DataFrame) -> Axes:
    """What gradient descent would add to each chosen reward: bars for DPO alone, dots with both terms.

    Columns, ordered by environment: environment, preference, total.
    """
    x = np.arange(len(table))
    ax.bar(x, table["preference"], 0.85, color=look("dpo").colour, alpha=0.45, label="DPO alone")
    ax.plot(x, table["total"], "D", color=look("causal_dpo").colour, ms=3.5, label="DPO and penalty")
    ax.axhline(0, color="black", lw=0.9)
    _mark_owners(ax, table["environment"].to_numpy())
    ax.set_ylabel("push on the chosen reward")
    return ax


def _mark_owners(ax: Axes, owners: np.ndarray) -> None:
    """Name the runs of equal ``owners`` (B,) under the horizontal axis, with a light line between them."""
    present = np.unique(owners)
    ax.set_xticks([np.flatnonzero(owners == k).mean() for k in present], present)
    for edge in np.flatnonzero(np.diff(owners)) + 0.5:
        ax.axvline(edge, color="white", lw=0.9)
    ax.tick_params(axis="x", length=0)
    ax.set_xlim(-0.5, len(owners) - 0.5)
    ax.set_xlabel("examples by their environment")
    ax.grid(axis="x", visible=False)


def variant_lines(ax: Axes, table: pd.DataFrame, x: str, y: str) -> Axes:
    """One quantity against another, a colour and a dash per variant, a thin line per run of it.

    Columns: variant, ``x``, ``y``, and optionally run.
    """
    dashes = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
    for index, (variant, rows) in enumerate(table.groupby("variant", sort=False)):
        style = {"color": ("#D55E00", "#0072B2", "#009E73")[index % 3], "ls": dashes[index % 3]}
        lines = [line for _, line in rows.groupby("run")] if "run" in rows else [rows]
        for position, line in enumerate(lines):
            label = None if position else variant
            ax.plot(line[x], line[y], lw=1.6 if len(lines) == 1 else 0.9, label=label, **style)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    return ax


def null_histogram(ax: Axes, draws: np.ndarray, observed: float, expected: float) -> Axes:
    """A statistic on memberships dealt at random, its mean by the formula (dashed), and the batch's own (solid)."""
    ax.hist(draws, 40, color="#BDBDBD", label="memberships dealt at random")
    ax.axvline(expected, color="#0072B2", ls=(0, (4, 2)), label="expected of these")
    ax.axvline(observed, color="#D55E00", label="the batch's own memberships")
    _label_y(ax, "draws")
    return ax


# --- More and more negatives (notebook 13) ---


def by_loss(table: pd.DataFrame, draw: Draw, title: str, rows: str | None = None, **options: object) -> Figure:
    """A panel per loss (a column) and value of ``rows`` (a row), each drawn by ``draw(ax, its rows)``.

    Columns: loss (a method) and, if given, ``rows``. ``options``: of ``panels``.
    """
    keys = table[rows] if rows else pd.Series("", table.index)
    losses, values = (list(dict.fromkeys(column)) for column in (table["loss"], keys))
    fig, axes = panels(len(losses), len(values), **{"height": 2.3, "sharey": True, **options})
    for place, value in enumerate(values):
        for ax, loss in zip(axes[place], losses, strict=True):
            draw(ax, table[(table["loss"] == loss) & (keys == value)])
            if value in SPLITS or not place:
                ax.set_title(look(loss).label + (f", {SPLITS[value]}" if value in SPLITS else ""))
            if place < len(values) - 1:
                ax.set_xlabel("")
    fig.suptitle(title)
    return fig


def by_negatives(ax: Axes, table: pd.DataFrame, label: str, levels: pd.DataFrame | None = None) -> Axes:
    """A number with its interval against the number of negatives, equally spaced: a line per method.

    Solid and filled, a loss; dashed and hollow, the same with DynamicPO, both in the loss's colour. Columns: method,
    negatives, mean, low, high; of ``levels``, what does not depend on negatives: method, mean, low, high.
    """
    counts, methods = sorted(table["negatives"].unique()), _present(table)
    for row in () if levels is None else levels.itertuples():
        style = look(row.method)
        dashes = {"sft": "-", "popular": (0, (5, 2))}.get(row.method, ":")
        ax.axhline(row.mean, color=style.colour, lw=1.1, ls=dashes, label=style.label)
        ax.axhspan(row.low, row.high, color=style.colour, alpha=0.15, lw=0)
    for index, method in enumerate(methods):
        rows = table[table["method"] == method].sort_values("negatives")
        x = rows["negatives"].map(counts.index) + 0.12 * (index - (len(methods) - 1) / 2)
        ax.errorbar(x, rows["mean"], _whiskers(rows, "mean"), **_dynamic_style(method))
    ax.set_xticks(range(len(counts)), counts)
    ax.set_xlim(-0.4, len(counts) - 0.6)
    ax.set_xlabel("negatives per prompt")
    _label_y(ax, label)
    return ax


def _dynamic_style(method: str) -> dict[str, object]:
    """Marker and line of a loss (solid, filled) or of the same with DynamicPO (dashed, hollow)."""
    dynamic, colour = method.startswith("dynamic_"), look(method).colour
    shape = {"marker": "D", "mfc": "white", "ls": (0, (4, 2))} if dynamic else {"marker": "o", "ls": "-"}
    return {"color": colour, "ms": 4.5, **shape}


def dynamic_legend(fig: Figure, columns: int = 5) -> None:
    """``legend_below``, with what solid and dashed lines mean whatever their colour."""
    for method, label in (("loss", "loss alone"), ("dynamic_", "with DynamicPO")):
        fig.axes[0].plot([], [], label=label, **{**_dynamic_style(method), "color": "#444444"})
    legend_below(fig, columns)


def share_curves(ax: Axes, table: pd.DataFrame) -> Axes:
    """The boundary's share of the negatives and of the gradient (%) against the optimiser step, with a band.

    Columns: quantity (``boundary_share`` or ``gradient_share``), step, mean, low, high.
    """
    names = {"boundary_share": "share of the negatives", "gradient_share": "share of the gradient"}
    for (quantity, name), colour, dashes in zip(names.items(), ("#6E6E6E", "#0072B2"), ("-", (0, (4, 2))), strict=True):
        rows = table[table["quantity"] == quantity]
        ax.fill_between(rows["step"], rows["low"], rows["high"], color=colour, alpha=0.2, lw=0)
        ax.plot(rows["step"], rows["mean"], color=colour, ls=dashes, label=name)
    ax.set_ylim(0, 100)
    ax.set_xlabel("optimiser step")
    _label_y(ax, "boundary's share (%)")
    return ax


def named_intervals(ax: Axes, table: pd.DataFrame, label: str) -> Axes:
    """Forest plot with a row per ``name``, in its method's colour: IID test hollow and OOD test filled.

    DynamicPO has diamonds, as its colour is that of the loss.
    Columns: name, method, split, mean, low, high, in the unit of ``label``.
    """
    names = list(dict.fromkeys(table["name"]))
    for split, offset, hollow in (("iid_test", -0.14, True), ("ood_test", 0.14, False)):
        for row in table[table["split"] == split].itertuples():
            colour, reach = look(row.method).colour, [[max(row.mean - row.low, 0)], [max(row.high - row.mean, 0)]]
            marker = "D" if row.method.startswith("dynamic_") else "o"
            style = {"fmt": marker, "color": colour, "mfc": "white" if hollow else colour}
            ax.errorbar(row.mean, names.index(row.name) + offset, xerr=reach, **style)
        ax.plot([], [], "o", color="#444444", mfc="white" if hollow else "#444444", label=SPLITS[split])
    _name_rows(ax, names)
    ax.set_xlabel(label)
    return ax


# --- Amplification over settings (notebook 06) ---


def share_changes(table: pd.DataFrame, label: str, title: str) -> Figure:
    """Forest plots side by side, one per comparison: its difference in every setting, IID hollow and OOD filled.

    Columns: name (of the comparison), method, setting, split, mean, low, high, in the unit of ``label``.
    """
    names, places = (list(dict.fromkeys(table[column])) for column in ("name", "setting"))
    fig, axes = panels(len(names), height=max(2.2, 1.3 + 0.34 * len(places)), sharex=True, sharey=True)
    for ax, name in zip(axes.flat, names, strict=True):
        rows = table[table["name"] == name].assign(name=table["setting"])
        missing = rows.iloc[:0].reindex(range(len(places))).assign(name=places)  # every setting keeps its row
        named_intervals(ax, pd.concat([missing, rows]), label)
        ax.set_title(name.replace(" − ", "\n− "), fontsize="small")
        ax.axvline(0, color="black", lw=0.9)
        ax.locator_params(axis="x", nbins=3)
        ax.set_xlabel(label if name == names[len(names) // 2] else "", fontsize="small")
    axes[0, 0].tick_params(axis="y", labelsize="small")
    fig.suptitle(title)
    legend_below(fig)
    return fig


# --- Ablations (notebook 15) ---


def metric_grid(
    table: pd.DataFrame,
    levels: pd.DataFrame,
    draw: Callable[[Axes, pd.DataFrame, pd.DataFrame], Axes],
    title: str,
    by: tuple[str, str],
    height: float,
) -> Figure:
    """A panel per value of two columns, ``by`` rows and columns, each drawn by ``draw(ax, its rows, its levels)``.

    Columns of both tables: metric, split, label (of the metric) and what ``draw`` asks for. The metric's axis is shared
    by no two panels: levels differ between tests.
    """
    downs, acrosses = (list(dict.fromkeys(table[column])) for column in by)
    fig, axes = panels(len(acrosses), len(downs), height=height)
    for place, down in enumerate(downs):
        for ax, across in zip(axes[place], acrosses, strict=True):
            parts = [rows[(rows[by[0]] == down) & (rows[by[1]] == across)] for rows in (table, levels)]
            draw(ax, *parts)
            split = down if by[0] == "split" else across
            if by[0] == "split" or not place:
                ax.set_title(SPLITS.get(split, split), fontsize=9.5)
            if by[0] == "metric" and place < len(downs) - 1:
                ax.set(xlabel="", xticklabels=[])
            if ax is not axes[place, 0]:
                ax.set_ylabel("")
                if by[0] == "split":
                    ax.set_yticklabels([])
    fig.suptitle(title, fontsize=11)
    legend_below(fig, 3)
    return fig


def reference_levels(ax: Axes, levels: pd.DataFrame, upright: bool = False) -> None:
    """What other methods reach, as lines, the shuffled control with its interval as a band behind everything.

    ``upright`` is for a horizontal scale. Columns: method, mean, low, high.
    """
    dashes = ((0, (1, 2.5)), "-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1)))
    line, band = (ax.axvline, ax.axvspan) if upright else (ax.axhline, ax.axhspan)
    for dash, row in zip(dashes, levels.itertuples(), strict=False):
        style = look(row.method)
        line(row.mean, color=style.colour, lw=1.1, ls=dash, zorder=1.5, label=f"{style.label} (level)")
        if row.method == "shuffled":
            band(row.low, row.high, color=style.colour, alpha=0.13, lw=0, zorder=0.5)


def value_paths(ax: Axes, table: pd.DataFrame, label: str, levels: pd.DataFrame, log: bool = False) -> Axes:
    """A number with its interval along the values of a parameter: a line per method, ``levels`` behind.

    Columns: method, value, label (of the vertical axis), mean, low, high. Values are equally spaced, or by their
    logarithm with ``log``; 0 then stands apart, left of a dotted line, and is not joined to the others.
    """
    reference_levels(ax, levels)
    values, methods = sorted(table["value"].unique()), _present(table)
    zero = log and values[0] == 0
    if log:
        logs = np.log10(values[1:] if zero else values)
        gap = max((logs[-1] - logs[0]) / max(len(logs) - 1, 1), 0.3)
        places = [*([logs[0] - gap] if zero else []), *logs]
    else:
        places = list(range(len(values)))
    if zero:
        ax.axvline((places[0] + places[1]) / 2, color="#6E6E6E", lw=0.9, ls=":")
    span = max(places[-1] - places[0], 1e-9)
    apart = 0.012 * span * table["value"].duplicated().any()  # only where whiskers would hide each other
    for index, method in enumerate(methods):
        rows = table[table["method"] == method].sort_values("value")
        style = look(method)
        x = rows["value"].map(dict(zip(values, places, strict=True))) + apart * (2 * index - len(methods) + 1)
        own = {"color": style.colour, "marker": style.marker, "label": style.label}
        ax.errorbar(x, rows["mean"], _whiskers(rows, "mean"), **own)
    ax.set_xticks(places, [f"{value:g}" for value in values])
    ax.set_xlim(places[0] - 0.1 * span, places[-1] + 0.1 * span)
    ax.set_xlabel(label)
    ax.set_ylabel(table["label"].iloc[0])
    return ax


def variant_intervals(ax: Axes, table: pd.DataFrame, levels: pd.DataFrame) -> Axes:
    """Forest plot with a row per ``name``, in its method's colour and marker, ``levels`` behind.

    Columns: name, method, label (of the horizontal axis), mean, low, high.
    """
    reference_levels(ax, levels, upright=True)
    for position, row in enumerate(table.itertuples()):
        style, reach = look(row.method), [[max(row.mean - row.low, 0)], [max(row.high - row.mean, 0)]]
        ax.errorbar(row.mean, position, xerr=reach, fmt=style.marker, color=style.colour)
    _name_rows(ax, list(table["name"]))
    ax.set_xlabel(table["label"].iloc[0])
    return ax


def mean_ranges(ax: Axes, table: pd.DataFrame, label: str) -> Axes:
    """From the lowest to the highest mean of each row; what reaches the highest is written beside it.

    Columns: name, method, low, high, in the unit of ``label``.
    """
    for position, row in enumerate(table.itertuples()):
        ax.plot([row.low, row.high], [position] * 2, "|-", color="#0072B2", lw=3, ms=9, solid_capstyle="butt")
        about = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
        ax.annotate(look(row.method).label, (row.high, position), **about)
    _name_rows(ax, list(table["name"]))
    low, high = table["low"].min(), table["high"].max()
    ax.set_xlim(low - 0.05 * (high - low), high + 0.75 * (high - low))  # room for the longest label on the longest bar
    ax.set_xlabel(label)
    return ax


# --- Theory (notebook 18) ---


def case_lines(ax: Axes, table: pd.DataFrame, x: str, y: str) -> Axes:
    """One quantity against another, a line per case; later cases are thinner, so that one on another shows both.

    Columns: case, ``x``, ``y``.
    """
    cases = list(dict.fromkeys(table["case"]))
    colours, dashes = (*PALETTE, "#000000"), ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
    for index, case in enumerate(cases):
        rows = table[table["case"] == case]
        width = 3.4 - 2.2 * index / max(len(cases) - 1, 1)
        ax.plot(rows[x], rows[y], color=colours[index % len(colours)], ls=dashes[index % 4], lw=width, label=case)
    return ax


def adjustment_points(ax: Axes, table: pd.DataFrame) -> Axes:
    """A probability per input by several estimates: a marker each, with its interval, or an interval alone.

    Columns: estimate, input, value (NaN: none), low, high.
    """
    names = list(dict.fromkeys(table["estimate"]))
    for index, name in enumerate(names):
        rows = table[table["estimate"] == name]
        x = rows["input"] + 0.1 * (index - (len(names) - 1) / 2)
        style = {"color": PALETTE[index % len(PALETTE)], "marker": "osD^vPX"[index % 7], "ls": "none", "label": name}
        if rows["value"].isna().all():
            ax.errorbar(x, (rows["low"] + rows["high"]) / 2, (rows["high"] - rows["low"]) / 2, **style | {"marker": ""})
        else:
            ax.errorbar(x, rows["value"], _whiskers(rows, "value"), **style)
    ax.set_xticks(sorted(table["input"].unique()))
    ax.set(xlabel="input x", ylabel="probability of y = 1", ylim=(0, 1))
    ax.grid(axis="x", visible=False)
    return ax


# --- Verdicts (notebook 19) ---

RESULT_COLOURS = {
    "reproduced": "#0072B2",
    "equivalent": "#6E6E6E",
    "not detected": "#D9D9D9",
    "contradicted": "#D55E00",
}


def result_bars(ax: Axes, table: pd.DataFrame) -> Axes:
    """Stacked bars: a row per statement, its tests by result (%), their number at the end.

    Columns: statement, tests, and a count per result of ``RESULT_COLOURS``. Statements without tests have an empty row.
    """
    total, left = table["tests"].to_numpy(float), np.zeros(len(table))
    for result, colour in RESULT_COLOURS.items():
        share = 100 * np.divide(table[result], total, out=np.zeros_like(total), where=total > 0)
        ax.barh(range(len(table)), share, left=left, color=colour, height=0.7, label=result)
        left = left + share
    for place, tests in enumerate(table["tests"]):
        ax.text(102, place, f"{tests}" if tests else "no test here", va="center", fontsize="x-small")
    ax.set_yticks(range(len(table)), [textwrap.fill(text, 52) for text in table["statement"]], fontsize="x-small")
    ax.invert_yaxis()
    ax.set(xlim=(0, 122), xlabel="tests with each result (%), and their number", xticks=range(0, 101, 25))
    ax.grid(axis="y", visible=False)
    return ax


# --- Recovery of environments (notebook 14) ---


def by_column(
    table: pd.DataFrame, column: str, draw: Draw, title: str, across: int = 3, legend: int = 3, **options: object
) -> Figure:
    """A panel per value of ``column``, ``across`` in a row, each drawn by ``draw(ax, its rows)``.

    The panels share one scale; the legend stands below, in ``legend`` columns. ``options``: of ``panels``.
    """
    names = list(dict.fromkeys(table[column]))
    rows = -(-len(names) // across)
    fig, axes = panels(min(across, len(names)), rows, **{"height": 2.3, "sharey": True, **options})
    for ax, name in zip(axes.flat, names, strict=False):
        draw(ax, table[table[column] == name])
        ax.set_title(str(name), fontsize=9)
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    fig.suptitle(title)
    legend_below(fig, legend)
    return fig


def _series_style(place: int) -> dict[str, object]:
    """Colour and marker of the series at a place."""
    return {"color": PALETTE[place % len(PALETTE)], "marker": "oDs^vPX"[place % 7], "ls": "none", "ms": 4.5, "mew": 0.6}


def seed_columns(ax: Axes, table: pd.DataFrame, x: str, value: str, by: str, label: str, series: Sequence[str]) -> Axes:
    """A number at each value of ``x``, equally spaced: a point per run, a colour, marker and place per ``by``.

    Columns: ``x``, ``value``, ``by`` and null, drawn as a grey dash: what chance stays below in 95 % of the cases.
    ``series``: all values of ``by`` in any panel, so that they look the same in each.
    """
    places = sorted(table[x].unique())
    step = 0.8 / max(len(series), 1)
    for index, name in enumerate(series):
        rows = table[table[by] == name]
        at = rows[x].map(places.index) - 0.4 + (index + 0.5) * step
        ax.hlines(rows["null"], at - 0.45 * step, at + 0.45 * step, color="#9A9A9A", lw=1.4)
        ax.plot(at, rows[value], label=name, mec="white", **_series_style(index))
    ax.plot([], [], color="#9A9A9A", lw=1.4, label="95 % of chance below")
    ax.axhline(0, color="black", lw=0.9)
    ax.set_xticks(range(len(places)), [f"{place:g}" for place in places])
    ax.set_xlim(-0.55, len(places) - 0.45)
    ax.grid(axis="x", visible=False)
    _label_y(ax, label)
    return ax


def seed_rows(ax: Axes, table: pd.DataFrame, row: str, value: str, by: str, label: str) -> Axes:
    """A number in rows: a point per run, a row per value of ``row``, a colour and marker per value of ``by``.

    Columns: ``row``, ``value``, ``by``; rows and series stand in the table's order.
    """
    rows, series = (list(dict.fromkeys(table[column])) for column in (row, by))
    step = 0.76 / max(len(series), 1)
    for edge in range(1, len(rows)):
        ax.axhline(edge - 0.5, color="#E6E6E6", lw=0.7)
    for index, name in enumerate(series):
        part = table[table[by] == name]
        at = part[row].map(rows.index) - 0.38 + (index + 0.5) * step
        ax.plot(part[value], at, label=name, mec="white", **_series_style(index))
    _name_rows(ax, rows)
    ax.set_xlabel(label)
    return ax


def batch_lines(ax: Axes, table: pd.DataFrame, value: str, label: str) -> Axes:
    """A mean over mini-batches against their size (logarithmic): a colour, marker and dash per rule, a line per seed.

    Columns: rule_name, seed, size, ``value``; rules without values are left out.
    """
    sizes = sorted(table["size"].unique())
    dashes = ("-", (0, (4, 2)), (0, (1.5, 1.5)))
    for index, (rule, rows) in enumerate(table.groupby("rule_name", sort=False)):
        for place, (_, line) in enumerate(rows.dropna(subset=[value]).groupby("seed")):
            style = _series_style(index) | {"ls": dashes[index % 3], "ms": 3.5, "lw": 1}
            ax.plot(line["size"], line[value], label=None if place else rule, **style)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, sizes)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("prompts per batch")
    ax.set_ylabel(label)
    return ax


# --- What the released code optimises (notebook 17) ---


def gradient_cosines(ax: Axes, table: pd.DataFrame) -> Axes:
    """A row per departure: cosines with the paper's gradient, a dot per batch and a larger mark for their mean.

    The dashed line is the mean with all departures on. Columns: departure, side, cosine (NaN: no gradient is left,
    drawn as a cross at 0); a side ``released`` is the line, ``paper`` is left out, the others have a colour each.
    """
    rows = table[~table["side"].isin(["paper", "released"])]
    names, sides = list(dict.fromkeys(rows["departure"])), list(dict.fromkeys(rows["side"]))
    ax.axvline(0, color="#6E6E6E", lw=0.9)
    released = table.loc[table["side"] == "released", "cosine"].mean()
    ax.axvline(released, color="black", lw=1.1, ls=(0, (4, 2)), label="as released")
    marks = zip(sides, ("#0072B2", "#D55E00"), ("o", "D"), (-0.17, 0.17), strict=True)
    for side, colour, marker, offset in marks:
        for position, name in enumerate(names):
            values = rows.loc[(rows["side"] == side) & (rows["departure"] == name), "cosine"]
            y = position + offset
            if values.isna().all():
                ax.plot(0, y, "x", color=colour, ms=6, mew=1.6)
                continue
            ax.plot(values, np.full(len(values), y), ".", color=colour, ms=4, alpha=0.6)
            ax.plot(values.mean(), y, marker, color=colour, ms=5.5)
        ax.plot([], [], marker, color=colour, ms=5.5, label=side)
    ax.plot([], [], "x", color="#444444", ms=6, mew=1.6, label="no gradient left")
    _name_rows(ax, names)
    ax.set_xlim(min(-0.32, table["cosine"].min() - 0.05), 1.08)
    ax.set_xlabel("cosine with the paper's gradient")
    return ax


def core_point_curves(ax: Axes, table: pd.DataFrame, marks: dict[str, int]) -> Axes:
    """The share of core points (%) against the batch size, a line per variant with a band; ``marks``: sizes by name.

    Columns: variant, batch, core, low, high (fractions).
    """
    shapes = (("#D55E00", "-", "o"), ("#0072B2", (0, (5, 2)), "s"), ("#009E73", (0, (1.5, 1.5)), "^"))
    for (variant, rows), (colour, dashes, marker) in zip(table.groupby("variant", sort=False), shapes, strict=False):
        ax.fill_between(rows["batch"], 100 * rows["low"], 100 * rows["high"], color=colour, alpha=0.15, lw=0)
        ax.plot(rows["batch"], 100 * rows["core"], color=colour, ls=dashes, marker=marker, ms=4, label=variant)
    for name, size in marks.items():
        ax.axvline(size, color="#6E6E6E", lw=0.9, ls=":")
        ax.annotate(name, (size, 108), ha="right", va="center", fontsize=8, xytext=(-3, 0), textcoords="offset points")
    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted(table["batch"].unique()), sorted(table["batch"].unique()))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_ylim(-4, 115)
    ax.set_yticks(range(0, 101, 25))
    ax.set_xlabel("examples in the batch")
    ax.set_ylabel("core points (%)")
    return ax


# --- Costs (notebook 16) ---


def cost_bars(ax: Axes, table: pd.DataFrame, names: dict[str, str]) -> Axes:
    """A step's time as a bar per method, cut into its parts, with the range of the whole over the repetitions.

    Columns: method, part (a key of ``names``, or ``total``), mean, low, high (ms).
    """
    methods = _present(table)
    ends = np.zeros(len(methods))
    for index, (part, name) in enumerate(names.items()):
        rows = table[table["part"] == part].set_index("method")["mean"].reindex(methods).fillna(0.0)
        if rows.any():
            ax.barh(range(len(methods)), rows, 0.7, left=ends, color=PALETTE[index % len(PALETTE)], label=name)
        ends += rows.to_numpy()
    whole = table[table["part"] == "total"]
    ax.errorbar(whole["mean"], range(len(methods)), xerr=_whiskers(whole, "mean"), fmt="|", color="#222222", lw=0.9)
    ax.plot([], [], "|", color="#222222", label="whole step, range")
    _name_rows(ax, [look(method).label for method in methods])
    ax.set_xlabel("time of a step (ms)")
    return ax


def cost_ratios(ax: Axes, table: pd.DataFrame) -> Axes:
    """Times over DPO's with their ranges over the repetitions, a row per method, and what the paper prints as stars.

    Columns: method, kind, mean, low, high, paper (NaN where it prints none).
    """
    methods, kinds = _present(table), list(dict.fromkeys(table["kind"]))
    ax.axvline(1, color="black", lw=0.9)
    for index, (kind, marker) in enumerate(zip(kinds, "os^", strict=False)):
        rows = table[table["kind"] == kind]
        y = rows["method"].map(methods.index) + 0.2 * (index - (len(kinds) - 1) / 2)
        ax.errorbar(rows["mean"], y, xerr=_whiskers(rows, "mean"), fmt=marker, color=PALETTE[index], ms=4.5, label=kind)
    printed = table.drop_duplicates("method").dropna(subset=["paper"])
    place = printed["method"].map(methods.index)
    ax.plot(printed["paper"], place, "*", ms=9, mfc="white", mec="black", label="paper, one epoch")
    _name_rows(ax, [look(method).label for method in methods])
    ax.set_xlabel("time over that of DPO")
    return ax


def scaling_lines(ax: Axes, table: pd.DataFrame, x: str, label: str, power: int) -> Axes:
    """Time against size on logarithmic axes, a line per series with its range, and a guide of the given power.

    Columns: ``x``, series, mean, low, high (ms).
    """
    for index, (series, rows) in enumerate(table.groupby("series", sort=False)):
        style = {"color": PALETTE[index % len(PALETTE)], "marker": "os^D"[index % 4], "label": series}
        ax.errorbar(rows[x], rows["mean"], _whiskers(rows, "mean"), **style)
    ends = np.array([table[x].min(), table[x].max()], dtype=float)
    top = table.loc[table[x] == ends[1], "mean"].max()
    guide = top * (ends / ends[1]) ** power
    ax.plot(ends, guide, color="#6E6E6E", ls=(0, (4, 2)), label=f"power {power}")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.5 * table["low"].min())  # the guide may leave the picture
    values = sorted(table[x].unique())
    ax.set_xticks(values, [f"{value:,}" for value in values])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlabel(label)
    _label_y(ax, "time (ms)")
    return ax


# --- DPO4Rec (notebook 21) ---


def loop_drawing(ax: Axes, table: pd.DataFrame) -> Axes:
    """The steps of a loop as boxes from left to right, and an arrow back from the last to the first.

    Columns: step, text (what the step makes of its input).
    """
    count = len(table)
    ax.set_axis_off()
    ax.set_xlim(-0.5, count - 0.5)
    ax.set_ylim(-1.1, 0.6)
    box = {"boxstyle": "round,pad=0.5", "fc": "white", "ec": "#0072B2", "lw": 1.2}
    arrow = {"arrowstyle": "-|>", "color": "#6E6E6E", "lw": 1.2, "shrinkA": 0, "shrinkB": 0}
    for place, row in enumerate(table.itertuples()):
        ax.text(place, 0.15, row.step, ha="center", va="center", weight="bold", color="black", bbox=box)
        ax.text(place, -0.22, row.text, ha="center", va="top", fontsize=8)
        if place:
            ax.annotate("", (place - 0.36, 0.15), (place - 0.64, 0.15), arrowprops=arrow)
    ax.plot([count - 1, count - 1, 0], [-0.62, -0.8, -0.8], color="#6E6E6E", lw=1.2)
    ax.annotate("", (0, -0.62), (0, -0.81), arrowprops=arrow)
    ax.text((count - 1) / 2, -0.95, "next round", ha="center", va="center", fontsize=8)
    return ax


def round_curves(ax: Axes, table: pd.DataFrame, label: str) -> Axes:
    """A mean over rounds with its intervals, a line per method, side by side.

    Columns: method, round, mean, low, high, in the unit of ``label``.
    """
    methods, rounds = list(dict.fromkeys(table["method"])), sorted(table["round"].unique())
    for index, method in enumerate(methods):
        rows, style = table[table["method"] == method].sort_values("round"), look(method)
        x = rows["round"] + 0.06 * (2 * index - len(methods) + 1) / 2
        own = {"color": style.colour, "marker": style.marker, "label": style.label}
        ax.errorbar(x, rows["mean"], _whiskers(rows, "mean"), **own)
    ax.axhline(0, color="black", lw=0.9)
    ax.set_xticks(rounds)
    ax.set_xlim(rounds[0] - 0.3, rounds[-1] + 0.3)
    ax.set_xlabel("round")
    _label_y(ax, label)
    return ax
