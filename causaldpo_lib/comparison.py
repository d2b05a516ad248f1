"""The paper's accuracy tables beside this study's results: order and direction, never levels.

Datasets, backbones and sizes differ, so a setting of this study stands beside the printed dataset of its kind of shift
(``PAPER``). A printed difference, CausalDPO minus a row in NDCG@10, is a hypothesis about a direction; this study's
paired difference with its Holm-corrected p-value decides it, or leaves it undecided.

A second part sets the two kinds of this study's tables beside each other: hyper-parameters matched, and those of each
method's own paper.

Sources: arXiv 2603.22335, Tables 1, 3, 4, 5, 8 and 9, as ``published/accuracy.csv`` holds them; Kendall, Biometrika 30,
1938 (tau; with ties tau-b).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import product
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from causaldpo_lib.audit import OURS, SHIFTS, printed_rows, published, violations
from causaldpo_lib.errors import StudyError
from causaldpo_lib.evaluation import FLOORS
from causaldpo_lib.plots import SPLITS, look, metric_unit
from causaldpo_lib.tables import TEST_SPLITS, Tables, cell, facts, heading, only_cell, select, settings
from causaldpo_lib.takeaways import NOTHING, Pairs, answers, change, control_sentence, difference_cell

Frame = pd.DataFrame
NDCG = "NDCG@10"  # the metric whose directions are compared
SHOWN = ("HR@10", NDCG, "target_logp")
OWN = "-published"  # ends the names of settings whose methods have the hyper-parameters of their own papers
ORDERED = {"target_logp": "log p", NDCG: NDCG}  # by which methods are put in order, as titles have them


class Printed(NamedTuple):
    """A table of the paper, and what stands beside it here."""

    settings: Mapping[str, str]  # pattern of a setting's name -> the printed dataset; the first that fits
    methods: Mapping[str, str]  # printed name -> this study's method
    split: str = "ood_test"
    pairs: tuple[tuple[str, str], ...] = ()  # printed (method, baseline) compared besides CausalDPO and each row
    others: str = ""  # pattern of methods that are shown though the paper does not print them


CAUSAL = {OURS: "causal_dpo"}
PLAIN = {"SASRec": "sasrec", "BIGRec": "bigrec", "RW": "rw", "D3": "d3"}
ALIGNED = {"DMPO": "dmpo", "S-DPO": "s_dpo", "RosePO": "rose_po", "SPRec": "sprec", **CAUSAL}
VARIANTS = {"Dr.DPO": "dr_dpo", "CPO": "cpo", "SimPO": "simpo"}
PENALISED = {f"{name} + causal": f"{method}_causal" for name, method in VARIANTS.items()}
BY_SHIFT = {f"*-{shift}": dataset for shift, dataset in SHIFTS.items()}
BY_DATA = {"ml-*": "ML-10M", "book-crossing-*": "Book-Crossing"}
PAPER = {
    1: Printed(BY_SHIFT, PLAIN | ALIGNED),
    3: Printed(BY_DATA, PLAIN | ALIGNED, "iid_test"),  # no shift, so the kind of data decides
    4: Printed({"*-mixed": "Yelp2018"}, PLAIN | ALIGNED),
    5: Printed(  # not printed under a popularity shift: there, the kind of data decides
        {"*-temporal": "ML-10M", "*-exposure": "Book-Crossing"} | BY_DATA,
        {"DPO": "dpo", **VARIANTS, **PENALISED, **CAUSAL},
        pairs=tuple(zip(PENALISED, VARIANTS, strict=True)),
    ),
    8: Printed(BY_SHIFT, {"w/o SFT": "causal_dpo_no_sft", "w/o CausalDPO": "sft", "w/o both": "pretrained", **CAUSAL}),
    9: Printed(BY_SHIFT, PLAIN | CAUSAL, others="causal_dpo-backbone-*"),
}


class Panel(NamedTuple):
    """One setting of this study beside one dataset of a printed table."""

    table: Printed
    setting: str
    rows: Frame  # of ``audit.printed_rows``; ``here`` is this study's method, empty where it has no such row
    others: list[str]  # methods that the paper does not print
    tables: Tables  # metrics and paired, joined over studies
    studies: list[str]
    apart: list[str]  # studies that are left out, since their numbers of shared methods differ


def panels(number: int, studies: Mapping[str, Tables]) -> list[Panel]:
    """Where studies (by name, as ``tables.read`` gives them) have a row of a printed table besides CausalDPO's own.

    Raises:
        StudyError: there is no such table.
    """
    if number not in PAPER:
        raise StudyError(f"no Table {number} to compare with: choose from {', '.join(map(str, PAPER))}")
    table, printed, found = PAPER[number], printed_rows(published("accuracy")), []
    for setting in dict.fromkeys(name for study in studies.values() for name in settings(study)):
        dataset = next((name for pattern, name in table.settings.items() if fnmatchcase(setting, pattern)), "")
        rows = select(printed[printed["table"] == number], dataset=dataset)
        tables, joined, apart = _joined(setting, table, studies)
        measured = set(tables["metrics"]["method"])
        rows["here"] = [name if (name := table.methods.get(row)) in measured else "" for row in rows["method"]]
        others = sorted(name for name in measured if table.others and fnmatchcase(name, table.others))
        if len(rows) and (others or set(rows["here"]) - {"", CAUSAL[OURS]}):
            found.append(Panel(table, setting, rows, others, tables, joined, apart))
    return found


def _joined(setting: str, table: Printed, studies: Mapping[str, Tables]) -> tuple[Tables, list[str], list[str]]:
    """One setting's results from several studies, with the names of the joined ones and of those left out.

    The study with most of the table's methods comes first, and its rows stay. Studies share runs, so what they report
    of one method is equal; where it is not, they trained or tested otherwise. A corrected p-value keeps the family of
    its own study.
    """
    once = {"metrics": ["method", "metric"], "paired": ["metric", "method", "baseline"]}
    parts = {n: {key: select(s[key], setting=setting, split=table.split) for key in once} for n, s in studies.items()}
    wanted = set(table.methods.values())
    order = sorted(parts, key=lambda name: -len(wanted & set(parts[name]["metrics"]["method"])))
    first = select(parts[order[0]]["metrics"], metric=SHOWN)
    same, apart = [], []
    for name in (name for name in order if len(parts[name]["metrics"])):
        both = first.merge(parts[name]["metrics"], on=once["metrics"])
        (same if np.allclose(both["mean_x"], both["mean_y"], rtol=1e-4, atol=0) else apart).append(name)
    joined = {key: pd.concat([parts[name][key] for name in same or order]) for key in once}
    return {key: rows.drop_duplicates(once[key]) for key, rows in joined.items()}, same, apart


def beside(number: int, studies: Mapping[str, Tables]) -> Frame:
    """A printed table beside this study's results as text cells: its rows in their order, other methods, floors.

    Brackets hold 95 % intervals (the paper prints none); a cell is empty where there is no such number, and without
    any row of the table there is no line. log p is the model's, also where it does not order the list (BIGRec, RW, D3).
    """
    lines = []
    for panel in panels(number, studies):
        printed = panel.rows.to_dict("records")
        more = [{"method": look(method).label, "here": method} for method in (*panel.others, *FLOORS)]
        for row in (*printed, *more):
            line = {"paper's dataset": printed[0]["dataset"], "setting": panel.setting, "method": row["method"]}
            line |= {f"paper {heading(name)}": f"{row[name]:.2f}" if name in row else "" for name in SHOWN[:2]}
            rows = select(panel.tables["metrics"], method=row["here"])
            line |= {heading(metric): only_cell(select(rows, metric=metric), metric) for metric in SHOWN}
            for metric, title in ((NDCG, f"{NDCG} (points)"), ("target_logp", heading("target_logp"))):
                found = change(panel.tables, panel.setting, panel.table.split, metric, CAUSAL[OURS], row["here"])
                line[f"{OURS} − row, {title}"] = cell(found._asdict(), metric, "difference") if found else ""
            lines.append(line)
    return pd.DataFrame(lines)


def directions(panel: Panel) -> Frame:
    """The printed differences in NDCG@10 between methods that this study has too, and what it says about their signs.

    Returns:
        row (a printed name, ``a − b`` for the table's other pairs); result: agree, opposite, undecided, or untested
        (no paired difference); paper and half_width (of this study's interval), in percent of the NDCG@10 of CausalDPO
        there and here.
    """
    rows = panel.rows[panel.rows["here"] != ""].set_index("method")
    there = panel.rows.set_index("method").loc[OURS, NDCG]
    levels = select(panel.tables["metrics"], metric=NDCG, method=CAUSAL[OURS])["mean"]
    here = levels.iloc[0] if levels.any() else np.nan
    pairs = [*((OURS, name) for name in rows.index if name != OURS), *panel.table.pairs]
    lines = []
    for method, baseline in ((m, b) for m, b in pairs if m in rows.index and b in rows.index):
        claimed = rows.loc[method, NDCG] - rows.loc[baseline, NDCG]
        here_pair = rows.loc[method, "here"], rows.loc[baseline, "here"]
        found = change(panel.tables, panel.setting, panel.table.split, NDCG, *here_pair)
        result = "untested" if found is None else "undecided"
        if found and found.word != NOTHING:
            result = "agree" if (found.word == "raised") == (claimed > 0) else "opposite"
        line = {"row": baseline if method == OURS else f"{method} − {baseline}", "result": result}
        half_width = 50 * (found.high - found.low) / here if found else np.nan
        lines.append({**line, "paper": 100 * abs(claimed) / there, "half_width": half_width})
    return pd.DataFrame(lines, columns=["row", "result", "paper", "half_width"])


def agreement(number: int, studies: Mapping[str, Tables]) -> str:
    """How many printed directions this study finds, finds reversed or cannot decide, and in what order. In Markdown."""
    found = panels(number, studies)
    if not found:
        kinds = " or ".join(f"`{pattern}`" for pattern in PAPER[number].settings)
        return f"**Table {number}.** Left out: no given study has a row of it besides {OURS}'s in a setting {kinds}."
    parts = [directions(panel) for panel in found]
    counts = pd.concat(parts)["result"].value_counts()
    if not len(counts):
        return f"**Table {number}.** No printed difference between {OURS} and another row has a counterpart here."
    said = ", ".join(f"{counts.get(word, 0)} {word}" for word in ("agree", "opposite", "undecided"))
    start = (
        f"**Table {number}.** Directions of {counts.drop('untested', errors='ignore').sum()} comparisons in {NDCG}, "
        f"{OURS} minus a row{' or a loss with the penalty minus without' * bool(PAPER[number].pairs)}: {said}."
    )
    return "\n".join([start, "", *(f"- {_sentences(*each)}" for each in zip(found, parts, strict=True))])


def _sentences(panel: Panel, found: Frame) -> str:
    """What one panel says about directions, order and power, and what is missing or doubtful."""
    dataset, shift = panel.rows[["dataset", "shift"]].iloc[0]
    split, rows = panel.table.split, panel.rows[panel.rows["here"] != ""]
    other = ", another shift" * (split == "ood_test" and not panel.setting.endswith(f"-{shift}"))
    by = {word: list(found.loc[found["result"] == word, "row"]) for word in ("agree", "opposite", "untested")}
    agree, opposite = (", ".join(by[word]) or "none" for word in ("agree", "opposite"))
    open_ = found[found["result"] == "undecided"]
    said = [
        f"*{panel.setting} beside {dataset} ({shift}{other})*, {SPLITS[split]} of {', '.join(panel.studies)} "
        f"({facts(panel.tables, panel.setting, split)}): agree {agree}; opposite {opposite}; undecided {len(open_)}.",
        _order(panel, rows),
    ]
    if len(known := open_.dropna()):
        paper, reach, number = known["paper"], known["half_width"], len(known)
        said.append(
            f"Undecided, in percent of {OURS}'s {NDCG}: the median printed difference is {paper.median():.0f} %, the "
            f"median half-width of the intervals here {reach.median():.0f} %; in {(reach > paper).sum()} of {number} "
            "the interval is too wide to see a difference of the printed size."
        )
    for text, names in (
        ("Without a paired difference here", by["untested"]),
        ("Not measured here", panel.rows.loc[panel.rows["here"] == "", "method"]),
        ("Printed with figures that cannot all be right", violations(rows)["method"]),
        ("Left out, since shared methods have other numbers there", panel.apart),
    ):
        said += [f"{text}: {', '.join(names)}."] if len(names) else []
    return " ".join(said)


def _order(panel: Panel, rows: Frame) -> str:
    """Kendall's tau between the printed order of the methods and this study's, by NDCG@10."""
    here = select(panel.tables["metrics"], metric=NDCG).set_index("method")["mean"].loc[rows["here"]]
    tau = kendalltau(rows[NDCG], here).statistic if len(rows) > 1 else np.nan
    value = "undefined" if np.isnan(tau) else f"{tau:+.2f}"
    few = ", which says little of so few" * (len(rows) <= 3)
    return f"Kendall's tau of the printed and this study's order: {value} (methods: {len(rows)}{few})."


# --- matched and as published ---


class Kind(NamedTuple):
    """One of the two kinds of tables: with hyper-parameters that all methods share, or those of each method's paper."""

    name: str
    tables: Tables
    setting: str


def both_kinds(matched: Tables, own: Tables, setting: str) -> tuple[Kind, Kind]:
    """A setting with matched hyper-parameters, and its counterpart (``OWN``) with those of each method's own paper."""
    return Kind("matched", matched, setting), Kind("as published", own, setting + OWN)


def kind_pairs(kinds: Sequence[Kind]) -> Pairs:
    """What is compared in both kinds: DPO with SFT, each other method with DPO, CausalDPO with its shuffled control."""
    methods = [list(select(kind.tables["metrics"], setting=kind.setting)["method"].unique()) for kind in kinds]
    shared = [method for method in methods[0] if method in methods[1] and method not in FLOORS]
    others = [(method, "dpo") for method in shared if method not in ("sft", "dpo")]
    pairs = [("dpo", "sft"), *others, ("causal_dpo", "shuffled")]
    return {f"{look(m).label} against {look(b).label}": (m, b) for m, b in pairs if {m, b} <= set(shared)}


def kinds_table(kinds: Sequence[Kind]) -> Frame:
    """``kind_pairs`` as text cells: differences in log p and NDCG@10 on each test, in either kind.

    No family of tests holds both kinds: p is Holm's in the study of its own.
    """
    titles = {metric: f"{name} ({metric_unit(metric, difference=True)})" for metric, name in ORDERED.items()}
    lines = []
    for (name, pair), split in product(kind_pairs(kinds).items(), TEST_SPLITS):
        line = {"comparison": name, "test": SPLITS[split].removesuffix(" test")}
        for (metric, title), kind in product(titles.items(), kinds):
            line[f"{title}, {kind.name}"] = difference_cell(kind.tables, kind.setting, split, metric, *pair)
        lines.append(line)
    return pd.DataFrame(lines)


def kinds_takeaway(kinds: Sequence[Kind]) -> str:
    """Whether each paper's own hyper-parameters change what the comparisons and their order say. In Markdown."""
    setting, pairs = kinds[0].setting, kind_pairs(kinds)
    if not pairs:
        return f"*{setting}: no study with the hyper-parameters of each method's own paper stands beside it.*"
    methods = list(dict.fromkeys(name for pair in pairs.values() for name in pair))
    said = []
    for metric, title in ORDERED.items():
        words = [
            [found and found.word for found in (change(k.tables, k.setting, split, metric, *pair) for k in kinds)]
            for pair, split in product(pairs.values(), TEST_SPLITS)
        ]
        words = [each for each in words if all(each)]
        counts = [
            f"{kind.name}, raised in {column.count('raised')} and lowered in {column.count('lowered')}"
            for kind, column in zip(kinds, zip(*words, strict=True), strict=False)
        ]
        turned = sum({*each} == {"raised", "lowered"} for each in words)
        ood = [select(k.tables["metrics"], setting=k.setting, split="ood_test", metric=metric) for k in kinds]
        tau = kendalltau(*(rows.set_index("method")["mean"][methods] for rows in ood)).statistic
        said.append(
            f"- {title}, {len(words)} comparisons over both tests: {'; '.join(counts)}; one way in one kind and the "
            f"other way in the other: {turned}. Kendall's tau between the two orders of {len(methods)} methods on the "
            f"OOD test: {tau:+.2f}."
        )
    where = (kinds[-1].tables, kinds[-1].setting, "ood_test", "target_logp")
    steps = {"CausalDPO against DPO": ("causal_dpo", "dpo"), "its shuffled control against DPO": ("shuffled", "dpo")}
    control = control_sentence(change(*where, "causal_dpo", "shuffled"), "log p on the OOD test")
    said.append(f"- {kinds[-1].name.capitalize()}: {answers(*where, steps)}. {control}")
    return "\n".join([f"**Takeaway.** *{setting}.*", "", *said])
