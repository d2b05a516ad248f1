"""Takeaways: sentences computed from the result tables, phrased to stay true whatever the numbers are.

A difference is called ``raised`` or ``lowered`` only if its 95 % interval leaves out 0 and its p-value is at
most 0.05 after Holm's correction within its family (all methods against one baseline, in one metric, split and
setting); everything else is ``no detectable change``, which is not a claim of equality. Equality is claimed where
equivalence tests refute a difference as large as the margin (``evaluation.MARGIN``), and otherwise left ``undecided``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from causaldpo_lib.evaluation import ENDS, FLOORS, MARGIN, K, ndcg_metric, share_metric, slope_metric
from causaldpo_lib.plots import GROUPINGS, SPLITS, look, metric_name, metric_scale, metric_unit
from causaldpo_lib.stats import outcome
from causaldpo_lib.tables import (
    TEST_SPLITS,
    Tables,
    cell,
    main_metrics,
    only_cell,
    select,
    settings,
)

Frame = pd.DataFrame
Pairs = Mapping[str, tuple[str, str]]  # what is compared, in words, to method and baseline
LEVEL = 0.05  # of a claim, after Holm's correction
NOTHING = "no detectable change"
BELOW = ", below the margin"  # of what is detected, and shown to be too small to matter
ALIGNED = (("dpo", "sft"), ("causal_dpo", "dpo"), ("shuffled", "dpo"))  # what each step changes


def verdict(low: float, high: float, p: float | None = None) -> str:
    """What an interval of a difference shows: ``raised``, ``lowered``, or ``no detectable change``.

    The interval must leave out 0, and where a (corrected) p-value is given it must be at most 0.05.
    """
    if (p is not None and p > LEVEL) or low <= 0 <= high or np.isnan([low, high]).any():
        return NOTHING
    return "raised" if low > 0 else "lowered"


def _p(value: float, equals: str = "") -> str:
    return "< 0.001" if value < 0.001 else f"{equals}{value:.3f}"


class Change(NamedTuple):
    """A paired difference as a row of paired.csv, with its verdict."""

    metric: str
    method: str
    baseline: str
    difference: float
    low: float
    high: float
    p_holm: float
    p_equivalent: float = np.nan  # of the equivalence tests, corrected; NaN where the tables have none

    @property
    def equivalent(self) -> bool:
        """Whether a difference of the margin is refuted, whatever its sign (``stats.outcome``)."""
        return outcome(self.p_holm, self.p_equivalent) == "equivalent"

    @property
    def word(self) -> str:
        """``raised``, ``lowered`` or ``no detectable change``."""
        return verdict(self.low, self.high, self.p_holm)

    @property
    def open(self) -> bool:
        """Whether the interval leaves out 0 and only the correction does not: neither a change nor its absence."""
        return self.word == NOTHING and verdict(self.low, self.high) != NOTHING

    @property
    def size(self) -> str:
        """The difference with its interval, signed, in points or nats, and the corrected p-value.

        A difference that is detected and yet equivalent is said to be below the margin.
        """
        scale = metric_scale(self.metric)
        mean, low, high = (f"{scale * x:+.2f}" for x in (self.difference, self.low, self.high))
        ends = "no interval" if np.isnan(self.low) else f"[{low}, {high}]"
        small = BELOW if self.equivalent and self.word != NOTHING else ""
        return f"{mean} {metric_unit(self.metric, difference=True)} {ends}, p {_p(self.p_holm, '= ')}{small}"

    def sentence(self, what: str) -> str:
        """``DPO raised <what> against SFT (+3.10 points [...])``, without a full stop."""
        method, baseline = look(self.method).label, look(self.baseline).label
        if self.word == NOTHING:
            return f"{method} shows no detectable change in {what} against {baseline} ({self.size})"
        return f"{method} {self.word} {what} against {baseline} ({self.size})"


def change(tables: Tables, setting: str, split: str, metric: str, method: str, baseline: str) -> Change | None:
    """``method`` minus ``baseline``, whichever way round paired.csv has them; None where it has neither."""
    rows = select(tables["paired"], setting=setting, split=split, metric=metric)
    this, other = rows["method"], rows["baseline"]
    for row in rows[(this == method) & (other == baseline)].itertuples():
        return Change(metric, method, baseline, row.difference, row.low, row.high, row.p_holm, _equivalent(row))
    for row in rows[(this == baseline) & (other == method)].itertuples():
        return Change(metric, method, baseline, -row.difference, -row.high, -row.low, row.p_holm, _equivalent(row))
    return None


def _equivalent(row: Any) -> float:
    """The corrected p-value of a row's equivalence tests, NaN where there are none."""
    return getattr(row, "p_equivalent_holm", np.nan)


def equivalence(tables: Tables, setting: str, split: str, metric: str, method: str, baseline: str) -> str | None:
    """``equivalent``, ``different`` or ``undecided`` (``stats.outcome``); None where the tables do not say."""
    rows = select(tables["paired"], setting=setting, split=split, metric=metric)
    pair = {method, baseline}
    rows = rows[rows["method"].isin(pair) & rows["baseline"].isin(pair)]
    if rows.empty or "p_equivalent_holm" not in rows or rows["p_equivalent_holm"].isna().all():
        return None
    return outcome(rows["p_holm"].iloc[0], rows["p_equivalent_holm"].iloc[0])


def difference_cell(tables: Tables, setting: str, split: str, metric: str, method: str, baseline: str) -> str:
    """``method`` minus ``baseline`` under a heading with the unit: its size, and what it shows, if it does."""
    key = (tables, setting, split, metric, method, baseline)
    if (found := change(*key)) is None:
        return "not compared"
    text = found.size.replace(f" {metric_unit(metric, difference=True)} ", " ")
    if found.word != NOTHING:
        return f"{text}, **{found.word}**"
    return text + ", equivalent" * (equivalence(*key) == "equivalent")


def answers(tables: Tables, setting: str, split: str, metric: str, pairs: Pairs) -> str:
    """Of each pair: ``raised``, ``lowered`` or no detectable change, its size, and if the margin is refuted."""
    said = []
    for name, pair in pairs.items():
        if (found := change(tables, setting, split, metric, *pair)) is None:
            said.append(f"{name}: not compared")
            continue
        refuted = found.equivalent and found.word == NOTHING  # else its size says so
        said.append(f"{name}: {found.word} ({found.size}{f'; ±{100 * MARGIN:.1f} % refuted' * refuted})")
    return "; ".join(said)


def tally(tables: Tables, metric: str, pairs: Pairs, where: Sequence[str] | None = None) -> str:
    """In how many of all settings (or those of ``where``) and test splits each pair differs, and in which."""
    found: dict[str, list[str]] = {"lowered": [], "raised": [], NOTHING: []}
    refuted = 0
    for setting, split, (name, pair) in product(where or settings(tables), TEST_SPLITS, pairs.items()):
        key = (tables, setting, split, metric, *pair)
        if difference := change(*key):
            found[difference.word].append(f"{name} on the {SPLITS[split]}")
            refuted += equivalence(*key) == "equivalent"
    total = sum(map(len, found.values()))
    if not total:
        return "not compared"
    *changes, none = (f"{word} in {len(names)} of {total}" for word, names in found.items())
    named = [
        f"{text} ({', '.join(names)})" if names else text for text, names in zip(changes, found.values(), strict=False)
    ]
    return f"{', '.join([*named, none])}; ±{100 * MARGIN:.1f} % refuted in {refuted}"


def equivalence_sentence(tables: Tables, setting: str, split: str, metric: str, what: str) -> str:
    """What the equivalence tests say about each step of the alignment, empty where the tables do not hold them."""
    pairs = [*ALIGNED[:2], ("causal_dpo", "shuffled")]
    said = []
    for method, baseline in pairs:
        word = equivalence(tables, setting, split, metric, method, baseline)
        detected = change(tables, setting, split, metric, method, baseline)
        if detected and BELOW in detected.size:
            word += " (a detected difference below the margin)"
        said += [f"{look(method).label} and {look(baseline).label} {word}"] if word else []
    return f"Against a margin of ±{100 * MARGIN:.1f} %, in {what}: {', '.join(said)}." if said else ""


def _sentence(found: Change | None, what: str, method: str, baseline: str) -> str:
    if found is None:
        return f"{look(method).label} was not compared with {look(baseline).label}."
    return found.sentence(what) + "."


def _takeaway(where: str, sentences: list[str], details: list[str]) -> str:
    """The quotable sentences in bold-headed prose, the rest as a list below, in Markdown."""
    return "\n".join([f"**Takeaway.** *{where}* {' '.join(sentences)}", "", *(f"- {text}" for text in details)])


def _share(tables: Tables, setting: str, split: str, grouping: str, group: str, method: str) -> str:
    key = {"setting": setting, "split": split, "grouping": grouping, "group": group, "method": method}
    text = only_cell(select(tables["shares"], **key), "share", "share")
    return f"{text} %" if text else "not measured"


def shares_takeaway(tables: Tables, setting: str, split: str, grouping: str = "mass") -> str:
    """Did DPO amplify popularity, did CausalDPO undo it, did its control do as well? In Markdown."""

    def compare(method: str, baseline: str, group: str) -> Change | None:
        return change(tables, setting, split, share_metric(grouping, group), method, baseline)

    levels = ", ".join(
        f"{look(m).label} {_share(tables, setting, split, grouping, 'G1', m)}"
        for m in ("training", "targets", "sft", "dpo", "causal_dpo", "shuffled")
        if len(select(tables["shares"], setting=setting, split=split, method=m))
    )
    top, bottom = (
        [_sentence(compare(m, b, group), f"the share of {group}", m, b) for m, b in ALIGNED] for group in ENDS
    )
    return _takeaway(
        f"{setting}, {SPLITS[split]}, {GROUPINGS[grouping]}.",
        [*top, control_sentence(compare("causal_dpo", "shuffled", "G1"), "the share of G1")],
        [f"Share of the most popular group, G1: {levels}.", " ".join(bottom)],
    )


def control_sentence(control: Change | None, what: str) -> str:
    """What the comparison of CausalDPO with its shuffled control says about the inferred environments."""
    if control is None:
        return "Without the shuffled control nothing can be said about the inferred environments."
    if control.word == NOTHING:
        return (
            f"CausalDPO and its control with shuffled memberships cannot be told apart in {what} "
            f"({control.size}), so no effect of the inferred environments is shown here."
        )
    end = ", too small to matter by that margin" if control.equivalent else ""
    return (
        f"With the inferred environments {what} is {'higher' if control.word == 'raised' else 'lower'} than "
        f"with shuffled memberships ({control.size}): the environments themselves make this difference{end}."
    )


def groups_takeaway(tables: Tables, setting: str, split: str, grouping: str = "mass") -> str:
    """Does accuracy fall from popular to unpopular targets, does alignment change the ends? In Markdown."""
    rows = select(tables["groups"], setting=setting, split=split, grouping=grouping)
    changes = [
        [
            _sentence(change(tables, setting, split, ndcg_metric(grouping, g), m, b), f"NDCG@{K} on {g}", m, b)
            for m, b in ALIGNED[:2]
        ]
        for g in ENDS
    ]
    control = change(tables, setting, split, ndcg_metric(grouping, "G5"), "causal_dpo", "shuffled")
    return _takeaway(
        f"{setting}, {SPLITS[split]}, {GROUPINGS[grouping]}.",
        [*changes[1], control_sentence(control, f"NDCG@{K} on G5")],
        [" ".join(changes[0]), *(_fall(select(rows, method=m), m) for m in rows["method"].unique())],
    )


def _fall(rows: Frame, method: str) -> str:
    """How a method's accuracy on the least popular group compares with the most popular one, by intervals."""
    ends = [select(rows, group=group) for group in ENDS]
    if any(end.empty or not end["examples"].iloc[0] for end in ends):
        return f"{look(method).label} has no test examples in {' or '.join(ENDS)}."
    first, last = (end.iloc[0] for end in ends)
    word = "is lower than" if last["high"] < first["low"] else "does not differ clearly from that"
    word = "is higher than" if last["low"] > first["high"] else word
    values = f"{cell(last, 'NDCG')} % against {cell(first, 'NDCG')} %"
    return f"{look(method).label}: NDCG@{K} on G5 {word} on G1 ({values})."


def results_takeaway(tables: Tables, setting: str, split: str) -> str:
    """Every endpoint: DPO against SFT, CausalDPO against DPO and against its control. In Markdown.

    The first of ``MAIN_METRICS``, the most sensitive one, is the headline.
    """
    rows = select(tables["metrics"], setting=setting, split=split)
    lines = []
    for metric in main_metrics(rows)["metric"].unique():
        what = "the target's log-probability" if metric == "target_logp" else metric_name(metric)
        found = [(change(tables, setting, split, metric, m, b), m, b) for m, b in ALIGNED[:2]]
        sentences = [_sentence(difference, what, m, b) for difference, m, b in found]
        control = change(tables, setting, split, metric, "causal_dpo", "shuffled")
        equal = equivalence_sentence(tables, setting, split, metric, what)
        lines.append(" ".join([*sentences, control_sentence(control, what), equal]).rstrip())
    return _takeaway(f"{setting}, {SPLITS[split]}.", lines[:1], [*lines[1:], floor_sentence(rows)])


def floor_sentence(rows: Frame) -> str:
    """Which methods are clearly above the most-popular floor in HR@10, and above a uniform guess in log p.

    Clearly: their intervals do not overlap.
    """
    said = []
    for metric, floor_name, title in (("HR@10", "popular", "most-popular"), ("target_logp", "random", "random")):
        found = select(rows, metric=metric)
        floor = select(found, method=floor_name)
        if len(floor):
            end = floor.iloc[0]["high"]
            own = [(look(r.method).label, r.low > end) for r in found.itertuples() if r.method not in FLOORS]
            above, below = ([label for label, is_above in own if is_above == wanted] for wanted in (True, False))
            unit = metric_unit(metric)
            level = f"the {title} floor in {metric_name(metric)} ({cell(floor.iloc[0], metric)} {unit})"
            rest = f"; not so: {', '.join(below)}" if above and below else ""
            said.append(f"Clearly above {level}: {', '.join(above) or 'no method'}{rest}.")
    return " ".join(said)


def diagnostics_takeaway(tables: Tables, setting: str, method: str = "causal_dpo") -> str:
    """What a method's pseudo-environments were: number, noise, sharpness, agreement. In Markdown."""
    rows = select(tables["diagnostics"], setting=setting, method=method)
    if rows.empty or "environments" not in rows or rows["environments"].isna().all():
        return f"**Takeaway.** {setting}: no pseudo-environments were recorded for {look(method).label}."

    def values(column: str, form: str) -> str:
        if column not in rows or rows[column].isna().all():
            return "not recorded"
        return ", ".join(format(value, form) for value in rows[column].dropna())

    parts = [
        f"environments K = {values('environments', '.0f')}",
        f"share of noise points {values('noise_share', '.2f')}",
        f"membership entropy {values('membership_entropy', '.2f')} (0 hard, 1 flat)",
        f"smallest effective sample size {values('effective_sample_size', '.2f')} of the rows",
        f"agreement with the popularity of the history {values('ami_history_group', '.2f')}",
    ]
    known = {"ami_history_genre": "main genre of the history", "ami_true_environment": "true environment"}
    for column, what in known.items():
        if column in rows and rows[column].notna().any():
            parts.append(f"agreement with the {what} {values(column, '.2f')}")
    note = " Agreement is adjusted mutual information: 0 is chance, 1 the same partition."
    return f"**Takeaway.** {setting}, {look(method).label}, one value per seed: " + "; ".join(parts) + "." + note


def caption(tables: Tables, setting: str) -> str:
    """What stands behind a figure of one setting: examples, seeds, and what the whiskers are. In Markdown."""
    rows = select(tables["metrics"], setting=setting)
    counts = rows.groupby("split", sort=False)["examples"].first()
    examples = ", ".join(f"{SPLITS[split]} {count:,} examples" for split, count in counts.items())
    seeds = int(rows["seeds"].max())
    many = "s" * (seeds != 1)
    return (
        f"*{setting}: {examples}; means over {seeds} training seed{many}; whiskers: 95 % intervals "
        "over seeds and users.*"
    )


def slopes_takeaway(tables: Tables, setting: str, split: str) -> str:
    """Which methods lose accuracy from popular to unpopular targets, and does CausalDPO lose less? In Markdown."""
    rows = select(tables["slopes"], setting=setting, split=split, grouping="mass")
    words = [verdict(row.low, row.high) for row in rows.itertuples()]
    steps = [*ALIGNED[:2], ("causal_dpo", "shuffled")]
    changes = [
        _sentence(change(tables, setting, split, slope_metric("mass"), m, b), "the slope over G1 to G5", m, b)
        for m, b in steps
    ]
    fall = (
        f"NDCG@{K} falls from G1 to G5 with {words.count('lowered')} of {len(words)} methods (95 % interval below 0)."
    )
    return _takeaway(f"{setting}, {SPLITS[split]}.", [fall, *changes], [])


def times_takeaway(tables: Tables, setting: str, split: str) -> str:
    """Does accuracy change from the earliest to the latest fifth of the test, and does alignment change that?

    In Markdown; empty where the study's examples have no time.
    """
    rows = select(tables["slopes"], setting=setting, split=split, grouping="count")
    if rows.empty:
        return ""
    levels = [
        f"{look(row.method).label} {verdict(row.low, row.high).replace('raised', 'rises').replace('lowered', 'falls')} "
        f"({cell(row._asdict(), '', 'slope')} points a period)"
        for row in rows.itertuples()
    ]
    changes = [
        _sentence(change(tables, setting, split, slope_metric("count"), m, b), "the slope over time", m, b)
        for m, b in ALIGNED[:2]
    ]
    return _takeaway(f"{setting}, {SPLITS[split]}, T1 to T5.", [f"NDCG@{K}: " + ", ".join(levels) + "."], changes)


def paired_table(tables: Tables, setting: str, split: str, metric: str) -> Frame:
    """The paired differences of one metric as text cells, with corrected p-values, verdicts and equivalence.

    ``p (McNemar)`` stands beside hit rates, ``outcome`` where the tables hold equivalence tests.
    """
    rows = select(tables["paired"], setting=setting, split=split, metric=metric)
    unit = metric_unit(metric, difference=True)
    lines = []
    for row in rows.to_dict("records"):
        line = {
            "comparison": f"{look(row['method']).label} − {look(row['baseline']).label}",
            f"difference ({unit})": cell(row, metric, "difference"),
            "p": _p(row["p"]),
            "p (Holm)": _p(row["p_holm"]),
            "verdict": verdict(row["low"], row["high"], row["p_holm"]),
        }
        if not np.isnan(row.get("p_mcnemar", np.nan)):
            line["p (McNemar)"] = _p(row["p_mcnemar"])
        if not np.isnan(row.get("p_equivalent_holm", np.nan)):
            line[f"margin ({unit})"] = f"±{metric_scale(metric) * row['margin']:.2f}"
            line["p of equivalence (Holm)"] = _p(row["p_equivalent_holm"])
            line["outcome"] = outcome(row["p_holm"], row["p_equivalent_holm"])
        lines.append(line)
    return pd.DataFrame(lines)


class Claim(NamedTuple):
    """A statement of the paper as a signed paired difference: sign +1 where it says ``method`` is higher."""

    text: str
    metric: str
    method: str
    baseline: str
    sign: int
    splits: tuple[str, ...] = TEST_SPLITS


CLAIMS = (
    Claim("DPO shows the most popular items more than SFT", share_metric("mass", "G1"), "dpo", "sft", 1),
    Claim("DPO shows the least popular items less than SFT", share_metric("mass", "G5"), "dpo", "sft", -1),
    Claim("DPO fits the targets worse than SFT", "target_logp", "dpo", "sft", -1),
    Claim(
        "CausalDPO shows the most popular items less than DPO",
        share_metric("mass", "G1"),
        "causal_dpo",
        "dpo",
        -1,
    ),
    Claim(
        "CausalDPO shows the least popular items more than DPO",
        share_metric("mass", "G5"),
        "causal_dpo",
        "dpo",
        1,
    ),
    Claim("CausalDPO ranks better than DPO under shift", "NDCG@10", "causal_dpo", "dpo", 1, ("ood_test",)),
    Claim(
        "CausalDPO fits the targets better than DPO under shift",
        "target_logp",
        "causal_dpo",
        "dpo",
        1,
        ("ood_test",),
    ),
    Claim(
        "CausalDPO collects more interventional preference (training p(E)) than DPO under shift",
        f"causal_NDCG@{K}",
        "causal_dpo",
        "dpo",
        1,
        ("ood_test",),
    ),
    Claim(
        "CausalDPO is better than DPO on unpopular targets",
        ndcg_metric("mass", "G5"),
        "causal_dpo",
        "dpo",
        1,
        ("ood_test",),
    ),
    Claim(
        "CausalDPO loses less accuracy than DPO from popular to unpopular targets",
        slope_metric("mass"),
        "causal_dpo",
        "dpo",
        1,
        ("ood_test",),
    ),
    Claim(
        "Inferred environments reduce popularity more than shuffled ones",
        share_metric("mass", "G1"),
        "causal_dpo",
        "shuffled",
        -1,
    ),
    Claim(
        "Inferred environments fit the targets better than shuffled ones under shift",
        "target_logp",
        "causal_dpo",
        "shuffled",
        1,
        ("ood_test",),
    ),
)

# What this study expects of its own alternative, negatives that divide environments out, stated the same way.
HYPOTHESES = (
    Claim(
        "Popularity negatives show the most popular items less than uniform ones",
        share_metric("mass", "G1"),
        "popularity_negatives",
        "dpo",
        -1,
    ),
    Claim(
        "Causal negatives show the most popular items less than uniform ones",
        share_metric("mass", "G1"),
        "causal_negatives",
        "dpo",
        -1,
    ),
    Claim(
        "Causal negatives fit the targets better than uniform ones under shift",
        "target_logp",
        "causal_negatives",
        "dpo",
        1,
        ("ood_test",),
    ),
    Claim(
        "Causal negatives fit the targets better than SFT, where they start, under shift",
        "target_logp",
        "causal_negatives",
        "sft",
        1,
        ("ood_test",),
    ),
    Claim(
        "Causal negatives rank better than uniform ones under shift",
        "NDCG@10",
        "causal_negatives",
        "dpo",
        1,
        ("ood_test",),
    ),
    Claim(
        "Causal negatives collect more interventional preference (training p(E)) than uniform ones under shift",
        f"causal_NDCG@{K}",
        "causal_negatives",
        "dpo",
        1,
        ("ood_test",),
    ),
    Claim(
        "Causal negatives fit the targets better than CausalDPO under shift",
        "target_logp",
        "causal_negatives",
        "causal_dpo",
        1,
        ("ood_test",),
    ),
    Claim(
        "Environments matter: causal negatives fit the targets better than popularity negatives under shift",
        "target_logp",
        "causal_negatives",
        "popularity_negatives",
        1,
        ("ood_test",),
    ),
    Claim(
        "Environments matter: causal negatives fit the targets better than with shuffled memberships under shift",
        "target_logp",
        "causal_negatives",
        "causal_negatives_shuffled",
        1,
        ("ood_test",),
    ),
    Claim(
        "True environments serve causal negatives better than inferred ones under shift",
        f"causal_NDCG@{K}",
        "causal_negatives_oracle",
        "causal_negatives",
        1,
        ("ood_test",),
    ),
)


def claim_table(tables: Tables, claims: Sequence[Claim] = CLAIMS) -> Frame:
    """Every claim wherever it can be tested: reproduced, contradicted, not detected or equivalent.

    The first two are about direction. ``equivalent``: a change of the margin is refuted, as ``stats.outcome`` has it;
    it takes precedence over a direction, and the difference then says that it is below the margin.
    """
    lines = []
    for claim in claims:
        for setting in settings(tables):
            for split in claim.splits:
                found = change(tables, setting, split, claim.metric, claim.method, claim.baseline)
                if found is None:
                    continue
                word = "not detected"
                if found.equivalent:
                    word = "equivalent"
                elif found.word != NOTHING:
                    word = "reproduced" if (found.word == "raised") == (claim.sign > 0) else "contradicted"
                key = {"claim": claim.text, "setting": setting, "split": SPLITS[split]}
                lines.append({**key, "result": word, "difference": found.size})
    return pd.DataFrame(lines, columns=["claim", "setting", "split", "result", "difference"])


def unreproduced(tables: Tables, claims: Sequence[Claim] = CLAIMS) -> str:
    """A Markdown list of the claims that the study contradicts, refutes or does not detect, with their intervals."""
    rows = claim_table(tables, claims)
    missing = rows[rows["result"] != "reproduced"]
    count = f"{len(rows) - len(missing)} of {len(rows)} tests reproduce their statement."
    lines = [f"- {r.claim}: **{r.result}** on {r.setting}, {r.split} ({r.difference})." for r in missing.itertuples()]
    return "\n".join([f"**Takeaway.** {count}", "", *lines]).rstrip()
