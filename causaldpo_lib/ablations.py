"""What each part and hyper-parameter of CausalDPO does: frames, panels and sentences of notebook 15.

All is made from the tables of a study such as ``ablations``. An ``Axis`` is one thing that is varied: the ``Values`` of
one parameter, or a ``Choice`` between methods. What an axis has in a study's tables is shown with ``LEVELS``, what
SFT, DPO and the controls reach, behind it; an axis without two rows there, or with none of its own, is left out with
a sentence.
Log-probabilities are in nats, NDCG and shares in percent, of differences in points.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import Image
from matplotlib.figure import Figure

from causaldpo_lib import plots, takeaways
from causaldpo_lib.errors import StudyError, pick
from causaldpo_lib.evaluation import MARGIN, SELECTION, K, share_metric
from causaldpo_lib.evaluation import select as select_by_rule
from causaldpo_lib.plots import SPLITS, look, metric_name, metric_scale, metric_unit
from causaldpo_lib.study import jobs, load_study
from causaldpo_lib.tables import (
    TEST_SPLITS,
    Tables,
    figures_folder,
    markdown,
    only_cell,
    read,
    select,
    settings,
    tables_folder,
)
from causaldpo_lib.takeaways import NOTHING, Pairs, change, control_sentence, difference_cell, equivalence

Frame = pd.DataFrame
Parameters = Mapping[str, Mapping[str, Any]]  # method to its parameters of alignment
SHARE = share_metric("mass", "G1")
PRIMARY = "target_logp"
CAUSAL = f"causal_NDCG@{K}"  # where the interventional preference is known
METRICS = {
    PRIMARY: "log-probability of the target",
    CAUSAL: metric_name(CAUSAL),
    f"NDCG@{K}": f"NDCG@{K}",
    SHARE: "share of G1",
}
SHORT = {**METRICS, PRIMARY: "log p", CAUSAL: "causal NDCG"}
# Behind every panel: no alignment, no penalty, the control of the environments, and bounds (of which the last looks at
# the target).
LEVELS = ("sft", "dpo", "shuffled", "oracle_environment", "oracle_history", "oracle_target")
COMMON = {*LEVELS, "causal_dpo"}  # what most studies have: alone they vary nothing that an axis is about


@dataclass(frozen=True)
class Values:
    """The values of one parameter of alignment: a line per method of ``bases``.

    A member is a base or a row of its sweep; ``off`` is the method in which the parameter is 0 and all else equal.
    Members are compared with ``off`` where there is one, else with their base, and with other bases' at the same value.
    """

    title: str
    label: str  # of the axis
    key: str  # as a sweep names it
    bases: tuple[str, ...] = ("causal_dpo",)
    off: str = ""
    log: bool = False

    def members(self, methods: Collection[str], parameters: Parameters) -> Frame:
        """The rows of this axis among ``methods``: member, method (whose line it is on) and value, in order.

        Raises:
            StudyError: a member's value is not known.
        """
        option, _, entry = self.key.partition(".")
        lines = []
        for base in (*self.bases, *filter(None, [self.off])):
            mark = f"{base}-{entry or option}-"
            for member in methods:
                if member != base and (base == self.off or not member.startswith(mark)):
                    continue
                if member not in parameters:
                    raise StudyError(f"the study's file has no method {member!r} for its {self.key}: make tables anew")
                value = parameters[member][option]
                lines.append({"member": member, "method": base, "value": float(value[entry] if entry else value)})
        found = pd.DataFrame(lines, columns=["member", "method", "value"])
        found = found.sort_values("value", kind="stable", ignore_index=True)
        return found if found["value"].nunique() > 1 else found.head(1)  # one value is no path, on however many lines

    def pairs(self, members: Frame) -> Pairs:
        """What is compared with what."""
        by = {(row.method, row.value): row.member for row in members.itertuples()}
        values = members.set_index("member")["value"]
        found = {}
        for row in members.itertuples():
            against = self.off if self.off in values else row.method
            if row.member != against and against in values:
                name = f"{look(row.method).label}, {row.value:g} against {values[against]:g}"
                found[name] = (row.member, against)
        for first, second in zip(self.bases, self.bases[1:], strict=False):
            for value in sorted(members["value"].unique()):
                if {(first, value), (second, value)} <= by.keys():
                    name = f"{look(first).label} against {look(second).label} at {value:g}"
                    found[name] = by[first, value], by[second, value]
        return found


@dataclass(frozen=True)
class Choice:
    """A choice between methods, by what the panel calls them: each is compared with ``against``, or as ``given``."""

    title: str
    names: Mapping[str, str]
    against: str = ""
    given: tuple[tuple[str, str], ...] = field(default=())

    def members(self, methods: Collection[str], parameters: Parameters) -> Frame:
        """The rows of this axis among ``methods``: member, method and name, in order."""
        found = [(method, method, name) for method, name in self.names.items() if method in methods]
        return pd.DataFrame(found, columns=["member", "method", "name"])

    def pairs(self, members: Frame) -> Pairs:
        """What is compared with what."""
        wanted = [(name, self.against) for name in self.names if self.against and name != self.against]
        there = set(members["member"])
        return {
            f"{self.names[method]} against {self.names[baseline]}": (method, baseline)
            for method, baseline in dict.fromkeys([*wanted, *self.given])
            if {method, baseline} <= there
        }


Axis = Values | Choice
BOTH = ("causal_dpo", "dpo")
SMALL = "backbone-tiny-small"
AXES: dict[str, Axis] = {
    "lambda": Values(
        "Weight λ of the penalty",
        "λ (no unit; 0 is DPO)",
        "mmd_weight",
        ("causal_dpo", "shuffled"),
        off="dpo",
        log=True,
    ),
    "beta": Values("Beta, with and without the penalty", "beta (per nat)", "loss_options.beta", BOTH, log=True),
    "learning_rate": Values(
        "Learning rate, with and without the penalty", "peak learning rate of AdamW", "learning_rate", BOTH, log=True
    ),
    "negatives": Values("Negatives per prompt", "negatives per prompt", "negatives_per_prompt"),
    "iterations": Values("Rounds with fresh negatives", "rounds N", "iterations"),
    "output": Choice(
        "What is to be alike in all environments",
        {
            "causal_dpo": "reward",
            "causal_dpo-output-margin": "margin of rewards",
            "causal_dpo-output-mean_logp": "mean log p of a token",
            "causal_dpo-output-hidden": "hidden state",
        },
        "causal_dpo",
    ),
    "estimator": Choice(
        "Estimator of the MMD",
        {
            "causal_dpo": "V-statistic",
            "causal_dpo-mmd_estimator-debiased": "debiased",
            "causal_dpo-mmd_estimator-u": "U-statistic",
        },
        "causal_dpo",
    ),
    "gradient": Choice(
        "Algorithm 1: gradients into its clustering",
        {"mini_batch": "gradients flow", "mini_batch-membership_gradient-detached": "detached"},
        "mini_batch",
    ),
    "environments": Choice(
        "Which environments",
        {
            "shuffled": "shuffled",
            "causal_dpo": "inferred",
            "mini_batch": "per mini-batch",
            "random_centres": "random centres",
            "oracle_environment": "oracle: true",
            "oracle_history": "oracle: history",
            "oracle_target": "oracle: target",
        },
        "shuffled",
    ),
    "penalties": Choice(
        "Which penalty on the inferred environments",
        {"dpo": "none", "causal_dpo": "MMD", "vrex": "V-REx", "group_dro": "group DRO"},
        "dpo",
    ),
    "backdoor": Choice(
        "Conditioned on the environment (Eq. 6)",
        {
            "dpo": "not conditioned",
            "backdoor-memberships-shuffled": "shuffled",
            "backdoor": "inferred",
            "backdoor-mmd_weight-1.0": "inferred, with MMD",
            "backdoor-memberships-oracle_environment": "oracle: true",
        },
        "dpo",
        (
            ("backdoor", "backdoor-memberships-shuffled"),
            ("backdoor-mmd_weight-1.0", "backdoor"),
            ("backdoor-memberships-oracle_environment", "backdoor-memberships-shuffled"),
        ),
    ),
    "parts": Choice(
        "Without its parts (Table 8)",
        {
            "pretrained": "w/o both",
            "causal_dpo_no_sft": "w/o SFT",
            "sft": "w/o CausalDPO",
            "causal_dpo": "full",
        },
        given=(
            ("pretrained", "causal_dpo"),
            ("causal_dpo_no_sft", "causal_dpo"),
            ("causal_dpo", "sft"),
            ("causal_dpo_no_sft", "pretrained"),
        ),
    ),
    "backbones": Choice(
        "Backbones of two sizes (Table 9)",
        {
            f"sft-{SMALL}": "SFT, smaller",
            f"causal_dpo-{SMALL}": "CausalDPO, smaller",
            "sft": "SFT, tiny",
            "causal_dpo": "CausalDPO, tiny",
        },
        given=((f"causal_dpo-{SMALL}", f"sft-{SMALL}"), ("causal_dpo", "sft"), (f"causal_dpo-{SMALL}", "causal_dpo")),
    ),
    "sampling": Choice(
        "Which negatives, without a penalty",
        {
            "dpo": "uniform",
            "popularity_negatives": "popularity",
            "causal_negatives-negatives_tempering-0.5": "causal, tempered 0.5",
            "causal_negatives": "causal",
            "causal_negatives_shuffled": "causal, shuffled",
        },
        "dpo",
        (
            ("causal_negatives-negatives_tempering-0.5", "causal_negatives"),
            ("causal_negatives", "popularity_negatives"),
            ("causal_negatives", "causal_negatives_shuffled"),
        ),
    ),
    "rosepo": Choice(
        "RosePO's recipes of rejected titles",
        {
            "rose_po": "uniform",
            "rose_po_hard": "self-hard",
            "rose_po_semantic": "semantic",
            "rose_po_popular": "popular",
        },
        "rose_po",
    ),
    "bigrec": Choice(
        "BIGRec's injections",
        {"bigrec": "none", "bigrec_popularity": "popularity", "bigrec_cf": "collaborative filtering"},
        "bigrec",
    ),
}
SEARCHED = ("lambda", "beta", "learning_rate")  # whose values the declared rules choose


def parameters(study: str) -> Parameters:
    """Each method's parameters of alignment, as the file ``params/studies/<study>.yaml`` sets them.

    Raises:
        StudyError: there is no such study.
    """
    return {job.method: job.parameters for job in jobs(load_study(study)) if job.stage == "align"}


def measured(tables: Tables, setting: str) -> dict[str, str]:
    """The ``METRICS`` that a setting has: all but causal NDCG where no interventional preference is known."""
    known = {*select(tables["metrics"], setting=setting)["metric"], SHARE}
    return {metric: title for metric, title in METRICS.items() if metric in known}


def shown_metrics(tables: Tables, setting: str) -> Frame:
    """``METRICS`` of every method in the units that are shown: split, method, metric, mean, low, high and label."""
    keys = ["split", "method", "metric", "mean", "low", "high"]
    shares = select(tables["shares"], setting=setting, grouping="mass", group="G1")
    shares = shares.rename(columns={"share": "mean"}).assign(metric=SHARE)
    found = pd.concat([select(tables["metrics"], setting=setting)[keys], shares[keys]])
    found = pd.concat([select(found, metric=metric) for metric in METRICS], ignore_index=True)
    scale = found["metric"].map(metric_scale)
    found[["mean", "low", "high"]] = found[["mean", "low", "high"]].mul(scale, axis=0)
    return found.assign(label=[f"{SHORT[name]} ({metric_unit(name)})" for name in found["metric"]])


def members(tables: Tables, setting: str, axis: str, known: Parameters) -> Frame:
    """The rows of an axis that one setting has (``Values.members``, ``Choice.members``).

    Raises:
        StudyError: there is no such axis.
    """
    methods = select(tables["metrics"], setting=setting)["method"].unique().tolist()
    return pick(AXES, axis, "axis").members(methods, known)


def shows(found: Frame) -> bool:
    """Whether ``members`` are worth a panel: two or more, and not all of them ``COMMON``."""
    return len(found) > 1 and not set(found["member"]) <= COMMON


def plotted(tables: Tables, setting: str, found: Frame) -> Frame:
    """``shown_metrics`` of ``members``, with their places."""
    rows = shown_metrics(tables, setting).rename(columns={"method": "member"})
    kept = found.merge(rows, on="member")
    order = [list(METRICS).index(name) for name in kept["metric"]]
    return kept.assign(order=order).sort_values("order", kind="stable", ignore_index=True).drop(columns="order")


def levels(tables: Tables, setting: str) -> Frame:
    """``shown_metrics`` of ``LEVELS``, in that order, as far as there are any."""
    rows = shown_metrics(tables, setting)
    return pd.concat([select(rows, method=method) for method in LEVELS], ignore_index=True)


def difference_table(tables: Tables, setting: str, pairs: Pairs) -> Frame:
    """Each comparison in each test split as text cells: differences with intervals, Holm's p, and what they show."""
    titles = {
        metric: f"{SHORT[metric]} ({metric_unit(metric, difference=True)})" for metric in measured(tables, setting)
    }
    lines = []
    for name, pair in pairs.items():
        for split in TEST_SPLITS:
            line = {"comparison": name, "test": SPLITS[split].removesuffix(" test")}
            for metric, title in titles.items():
                line[title] = difference_cell(tables, setting, split, metric, *pair)
            lines.append(line)
    return pd.DataFrame(lines, columns=["comparison", "test", *titles.values()])


# --- panels ---


class Source(NamedTuple):
    """A study whose panels are shown: its tables, its methods' parameters, and the folder for its figures."""

    name: str
    tables: Tables
    parameters: Parameters
    output: Path


def sources(tables: str | Path, beside: Collection[str | Path], figures: str | Path = "") -> list[Source]:
    """The study whose tables are in a folder, its figures in ``figures``, and then those in the folders ``beside``.

    A study does not stand beside itself.
    """
    first = tables_folder(tables)
    others = [tables_folder(folder) for folder in beside if Path(folder).name != first.name]
    return [
        Source(folder.name, read(folder), parameters(folder.name), figures_folder(own, folder))
        for folder, own in [(first, figures), *((folder, "") for folder in others)]
    ]


def panels(studies: Sequence[Source], axis: str) -> Iterator[tuple[list[Image], str]]:
    """Per study and setting the figure of an axis, saved in the study's ``output``, and its text in Markdown.

    Text: what the figure shows, the table of differences, and the takeaway. Studies after the first are shown only if
    they have a row of the axis that those before have not. If no study ``shows`` the axis there is no figure, and the
    text is a sentence.
    """
    known: set[str] = set()
    absent = []
    for study in studies:
        for setting in settings(study.tables):
            found = members(study.tables, setting, axis, study.parameters)
            if not shows(found):
                title = pick(AXES, axis, "axis").title
                there = f"only {', '.join(look(name).label for name in found['member'])}" if len(found) else "none"
                absent.append(f"*{title}: left out, since of its rows the tables of {setting} have {there}.*")
            elif study is studies[0] or set(found["member"]) - known:
                known |= set(found["member"])
                yield _panel(study, setting, axis, found)
    yield from (([], text) for text in absent[: len(settings(studies[0].tables))] if not known)


def _panel(study: Source, setting: str, axis: str, found: Frame) -> tuple[list[Image], str]:
    """The figure and the text of one axis in one setting, whose rows are ``found``."""
    tables = study.tables
    rows, behind = plotted(tables, setting, found), levels(tables, setting)
    fig = draw(setting, AXES[axis], rows, behind)
    plots.save(fig, f"ablations-{axis}-{setting}", pd.concat([rows, behind]), study.output)
    picture = plots.picture(fig)
    plt.close(fig)
    table = markdown(difference_table(tables, setting, AXES[axis].pairs(found)))
    said = takeaway(tables, setting, axis, study.parameters)
    names = ", ".join(look(method).label for method in dict.fromkeys(behind["method"]))
    caption = takeaways.caption(tables, setting).rstrip("*").replace("*", f"*Study `{study.name}`. ", 1)
    caption += f" Lines behind: {names or 'none'}; the band is the interval of the shuffled control.*"
    return [picture], "\n\n".join([caption, table, said])


def draw(setting: str, axis: Axis, rows: Frame, behind: Frame) -> Figure:
    """The figure of one axis: metrics by test splits, ``behind`` on every panel."""
    title = f"{setting}: {axis.title}"
    if isinstance(axis, Values):

        def path(ax, part, level):
            return plots.value_paths(ax, part, axis.label, level, axis.log)

        return plots.metric_grid(rows, behind, path, title, ("metric", "split"), height=1.6)
    height = 1.1 + 0.2 * rows["name"].nunique()
    return plots.metric_grid(rows, behind, plots.variant_intervals, title, ("split", "metric"), height=height)


# --- sentences, in Markdown ---


def takeaway(tables: Tables, setting: str, axis: str, known: Parameters) -> str:
    """What moves along an axis: the primary metric on the OOD test with sizes, the rest counted over both tests."""
    pairs = AXES[axis].pairs(members(tables, setting, axis, known))
    found = {name: change(tables, setting, "ood_test", PRIMARY, *pair) for name, pair in pairs.items()}
    found = {name: each for name, each in found.items() if each}
    if not found:
        return f"**Takeaway.** *{setting}.* Nothing on this axis was compared."
    moved = [f"{name}: {each.word} ({each.size})" for name, each in found.items() if each.word != NOTHING]
    equal = [equivalence(tables, setting, "ood_test", PRIMARY, *pairs[name]) for name in found]
    rest = len(found) - len(moved)
    still = (
        f"no detectable change in {rest} of {len(found)} comparisons"
        if rest
        else f"detected in all {len(found)} comparisons"
    )
    if unsure := [f"{name} ({each.size})" for name, each in found.items() if each.open]:
        still += f", though the interval leaves out 0 before correction in: {', '.join(unsure)}"
    refuted = f", a change of ±{100 * MARGIN:.1f} % refuted in {equal.count('equivalent')}"
    others = [
        f"{title}, both tests: {takeaways.tally(tables, name, pairs, [setting])}"
        for name, title in measured(tables, setting).items()
    ]
    ends = f"{_ends(tables, setting, axis, known)}{_use(tables, setting, axis, known)}"
    said = f"Log-probability of the target: {'; '.join([*moved, still])}{refuted}.{ends}"
    return "\n".join([f"**Takeaway.** *{setting}, OOD test.* {said}", "", *(f"- {text}." for text in others[1:])])


def _ends(tables: Tables, setting: str, axis: str, known: Parameters) -> str:
    """Where a path that can be switched off ends, between where alignment starts and where it goes without."""
    rows = members(tables, setting, axis, known)
    means = select(shown_metrics(tables, setting), split="ood_test", metric=PRIMARY).set_index("method")["mean"]
    off = getattr(AXES[axis], "off", "")
    if not off or not {"sft", off} <= set(means.index):
        return ""
    last = rows[(rows["value"] == rows["value"].max()) & (rows["method"] != off)]
    ends = []
    for row in last.itertuples():
        found = change(tables, setting, "ood_test", PRIMARY, row.member, "sft")
        against = f" ({found.size} against SFT)" if found else ""
        ends.append(f"{look(row.method).label} {means[row.member]:.2f}{against}")
    start = [f"SFT, where it starts, {means['sft']:.2f}", f"{look(off).label} {means[off]:.2f} nats"]
    return f" At {last['value'].iloc[0]:g}: {', '.join(ends)}; {', '.join(start)}."


def _use(tables: Tables, setting: str, axis: str, known: Parameters) -> str:
    """How much the conditioned policies of an axis use their environment; empty where none is conditioned.

    ``ranking.environment_information``, the least and the most over training seeds: what an average over environments
    can be worth is bounded by how much they differ.
    """
    rows = tables["diagnostics"]
    if "environment_information" not in rows:
        return ""
    rows = select(rows, setting=setting).dropna(subset=["environment_information"])
    said = []
    for row in members(tables, setting, axis, known).itertuples():
        own = rows.loc[rows["method"] == row.member, "environment_information"]
        if len(own):
            said.append(f"{look(row.member).label} {own.min():.4f} to {own.max():.4f}")
    if not said:
        return ""
    return f" What a title says about the environment, given the prompt (nats, over seeds): {', '.join(said)}."


def environments_sentence(tables: Tables, setting: str) -> str:
    """What the shuffled control says about the inferred environments, per metric, on the OOD test."""
    said = [
        control_sentence(change(tables, setting, "ood_test", metric, "causal_dpo", "shuffled"), f"the {title}")
        for metric, title in measured(tables, setting).items()
    ]
    return f"*{setting}, OOD test.* {' '.join(dict.fromkeys(said))}"


def sizes(tables: Tables, setting: str) -> str:
    """How many parameters the backbones have, in one sentence; empty where the study has no other backbone."""
    rows = tables["diagnostics"]
    if "parameters" not in rows:
        return ""
    rows = select(rows, setting=setting, method=["sft", f"sft-{SMALL}"]).dropna(subset=["parameters"])
    counts = rows.groupby("method")["parameters"].first()
    if len(counts) < 2:
        return ""
    small, own = counts[f"sft-{SMALL}"], counts["sft"]
    return f"*{setting}: tiny has {own / 1e6:.2f} million parameters, the smaller one {small / 1e6:.2f} million.*"


# --- selection ---


def searches(tables: Tables, setting: str, known: Parameters) -> dict[str, list[str]]:
    """The candidates of each search that the study made: along one axis for each method, and along all axes at once."""
    found: dict[str, list[str]] = {}
    for axis in SEARCHED:
        rows = members(tables, setting, axis, known)
        for base in (base for base in AXES[axis].bases if base in BOTH):  # nobody chooses a control
            own = rows[rows["method"].isin([base, AXES[axis].off])]["member"].tolist()
            if len(own) > 1:
                found[f"{AXES[axis].label.split(' (')[0]} of {look(base).label}"] = own
    for base in BOTH:
        every = [name for key, names in found.items() if key.endswith(f" of {look(base).label}") for name in names]
        every = list(dict.fromkeys(name for name in every if base == "dpo" or name != "dpo"))
        if len(every) > 1:
            found[f"all of {look(base).label}"] = every
    return found


def selection(tables: Tables, setting: str, known: Parameters) -> Frame:
    """What each rule of ``SELECTION`` chooses in each search, and what that reaches in log p on the OOD test.

    A cell is empty where the study has no ranking of the rule's split. Columns: search, candidates, one per rule.
    """
    lines = []
    for search, candidates in searches(tables, setting, known).items():
        line = {"search": search, "candidates": str(len(candidates))}
        line |= {rule: _chosen(tables, setting, candidates, rule)[1] for rule in SELECTION}
        lines.append(line)
    return pd.DataFrame(lines, columns=["search", "candidates", *SELECTION])


def _chosen(tables: Tables, setting: str, candidates: list[str], rule: str) -> tuple[str, str]:
    """The candidate that a rule chooses and a cell of it; both empty where the rule has nothing to look at."""
    rows = pd.concat([tables["validation"], tables["metrics"]], ignore_index=True)
    rows = select(rows, setting=setting, method=candidates)
    by = SELECTION[rule]
    if select(rows, split=by.split, metric=by.metric).empty:
        return "", ""
    name = select_by_rule(rows, rule)[setting]
    reached = only_cell(select(rows, split="ood_test", metric=PRIMARY, method=name), PRIMARY)
    return name, f"{look(name).label}: {reached}"


def selection_takeaway(tables: Tables, setting: str, known: Parameters) -> str:
    """What IID validation chooses along each axis, and how far that is from what the OOD test would have chosen."""
    said = []
    for search, candidates in searches(tables, setting, known).items():
        fit, ndcg, oracle = (_chosen(tables, setting, candidates, rule)[0] for rule in SELECTION)
        if not fit:
            return (
                f"**Takeaway.** *{setting}.* These tables hold no ranking of the validation split: nothing is selected "
                "without looking at the test."
            )
        means = select(tables["metrics"], setting=setting, split="ood_test", metric=PRIMARY).set_index("method")["mean"]
        both = "by log-probability and by NDCG" if fit == ndcg else "by log-probability"
        other = "" if fit == ndcg else f", {look(ndcg).label} by NDCG"
        missed = f"on the OOD test {look(oracle).label} is {means[oracle] - means[fit]:.2f} nats better"
        end = "also best on the OOD test" if fit == oracle else missed
        said.append(f"- {search}: {look(fit).label} {both} ({end}){other}.")
    if not said:
        return f"**Takeaway.** *{setting}.* The study varies no hyper-parameter that a rule could choose."
    none = _without_penalty(tables, setting, known)
    head = "IID validation chooses, along one axis at a time with the others at their base:"
    return "\n".join([f"**Takeaway.** *{setting}.*{none} {head}", "", *said])


def _without_penalty(tables: Tables, setting: str, known: Parameters) -> str:
    """Whether validation would have the penalty at all; empty where λ has no path or there is no validation split."""
    path = members(tables, setting, "lambda", known)
    candidates = path[path["method"].isin(BOTH)]["member"].tolist()
    if "dpo" not in candidates or len(candidates) < 2:
        return ""
    chosen = [_chosen(tables, setting, candidates, rule)[0] for rule in SELECTION if rule.startswith("iid")]
    if not all(chosen):
        return ""
    off = sum(name == "dpo" for name in chosen)
    return f" Of {len(chosen)} rules on validation, {off} would switch the penalty off (λ = 0)."


# --- all of it ---


def ranges(tables: Tables, setting: str, split: str, known: Parameters) -> Frame:
    """How far the primary metric's means lie apart along each axis: name, low, high, method (of the highest), count.

    The widest first. Ranges of more rows are wider by chance: they are no tests.
    """
    rows = select(shown_metrics(tables, setting), split=split, metric=PRIMARY).set_index("method")["mean"]
    lines = []
    for axis, about in AXES.items():
        if shows(found := members(tables, setting, axis, known)):
            means = rows[found["member"]]
            line = {"axis": axis, "name": about.title, "low": means.min(), "high": means.max()}
            lines.append({**line, "method": means.idxmax(), "rows": len(means)})
    found = pd.DataFrame(lines, columns=["axis", "name", "low", "high", "method", "rows"])
    return found.iloc[(found["low"] - found["high"]).argsort(kind="stable")].reset_index(drop=True)


def verdict(tables: Tables, known: Parameters) -> str:
    """Per setting a table of how many comparisons on each axis move the primary metric, and what moves it farthest."""
    said = []
    for setting in settings(tables):
        lines = []
        for axis, about in AXES.items():
            if not shows(found := members(tables, setting, axis, known)):
                continue
            pairs = about.pairs(found)
            tested = [change(tables, setting, "ood_test", PRIMARY, *pair) for pair in pairs.values()]
            tested = [each for each in tested if each]
            if tested:
                line = {"axis": about.title, "detected": sum(each.word != NOTHING for each in tested)}
                line |= {"only before correction": sum(each.open for each in tested), "comparisons": len(tested)}
                lines.append(line)
        if not lines:
            said.append(f"*{setting}*: nothing on these axes was compared.")
            continue
        rows = pd.DataFrame(lines).sort_values("detected", ascending=False, kind="stable")
        wide = ranges(tables, setting, "ood_test", known)
        widest = wide.iloc[0]
        control = change(tables, setting, "ood_test", PRIMARY, "causal_dpo", "shuffled")
        inferred = f" Inferred against shuffled environments: {control.word} ({control.size})." if control else ""
        said.append(
            f"**Takeaway.** *{setting}*, OOD test, log-probability of the target: of {rows['comparisons'].sum()} "
            f"comparisons {rows['detected'].sum()} detect a change. The means lie farthest apart along: "
            f"{widest['name']}, {widest['high'] - widest['low']:.2f} nats (untested).{inferred}\n\n{markdown(rows)}"
        )
    return "\n\n".join(said)
