"""The paper's printed numbers, checked against arithmetic and set beside this study's.

Metrics of one relevant item obey identities (``metrics``), means can be computed again, and hit rates are whole
numbers of hits divided by the number of test examples. Printed figures are rounded, so every check allows each of
them +-0.005 points. A violation says that the figures of a row cannot all be right as printed; it says neither which
one is wrong nor why, and it is no statement about the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom, norm

from causaldpo_lib.errors import StudyError
from causaldpo_lib.metrics import discounts
from causaldpo_lib.plots import look
from causaldpo_lib.tables import Tables, select, settings
from causaldpo_lib.takeaways import NOTHING, change

PUBLISHED = Path(__file__).resolve().parent / "published"
TOLERANCE = 0.005  # points, half of the last printed digit
METRICS = ("HR@10", "NDCG@10", "HR@20", "NDCG@20")
ROW = ["table", "dataset", "shift", "method"]
OURS = "CausalDPO"

Frame = pd.DataFrame


def published(name: str) -> Frame:
    """A table of ``causaldpo_lib/published``: accuracy, seconds, datasets or claims.

    Raises:
        StudyError: there is no such table.
    """
    path = PUBLISHED / f"{name}.csv"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in PUBLISHED.glob("*.csv")))
        raise StudyError(f"no published table {name!r}: choose from {known}")
    return pd.read_csv(path)


def printed_rows(accuracy: Frame) -> Frame:
    """A line per (table, dataset, method) in the paper's order: four metrics in percent, NaN where not printed."""
    wide = accuracy.pivot(index=ROW, columns="metric", values="percent")
    return wide.loc[pd.MultiIndex.from_frame(accuracy[ROW].drop_duplicates()), list(METRICS)].reset_index()


# --- identities of HR and NDCG ---


def identities(rows: Frame, tolerance: float = TOLERANCE) -> Frame:
    """Every identity of every printed row: its figure, the range that the row's other figures allow, whether it holds.

        HR@K / log2(K + 1) <= NDCG@K <= HR@K
        dHR / log2(21) <= NDCG@20 - NDCG@10 <= dHR / log2(12),   dHR = HR@20 - HR@10

    since a hit counts at most what the first place of its range counts and at least what the last does. Every printed
    figure is taken at the end of its rounding range that is best for the row.

    Args:
        rows: of ``printed_rows``; identities with a figure that is not printed are left out.

    Returns:
        table, dataset, shift, method, identity, x (the hit rate), y (the NDCG), low, high (allowed for y), holds.
        Percent; low and high hold the tolerance of both figures.
    """
    last = {10: discounts(10)[-1], 20: discounts(20)[-1]}
    first_after_ten = discounts(11)[-1]
    parts = []
    for identity, x, y, low, high, figures in (
        ("NDCG@10 within HR@10", rows["HR@10"], rows["NDCG@10"], last[10], 1.0, 1),
        ("NDCG@20 within HR@20", rows["HR@20"], rows["NDCG@20"], last[20], 1.0, 1),
        (
            "NDCG@20 - NDCG@10 within HR@20 - HR@10",
            rows["HR@20"] - rows["HR@10"],
            rows["NDCG@20"] - rows["NDCG@10"],
            last[20],
            first_after_ten,
            2,
        ),
    ):
        slack = figures * tolerance
        part = rows[ROW].assign(identity=identity, x=x, y=y)
        part["low"] = low * (x - slack) - slack
        part["high"] = high * (x + slack) + slack
        part["holds"] = (y >= part["low"] - 1e-9) & (y <= part["high"] + 1e-9)
        parts.append(part.dropna(subset=["x", "y"]))
    return pd.concat(parts, ignore_index=True)


def violations(rows: Frame, tolerance: float = TOLERANCE) -> Frame:
    """The printed rows that violate an identity, with the names of those they violate; the paper's order.

    ``repeats``: the same figures stand in an earlier table under the same dataset and method.
    """
    found = identities(rows, tolerance)
    broken = found[~found["holds"]].groupby(ROW, sort=False)["identity"].agg("; ".join).rename("violates")
    repeats = rows.drop(columns="table").duplicated()
    return rows.assign(repeats=repeats).merge(broken.reset_index(), on=ROW, how="inner")


def identities_takeaway(rows: Frame) -> str:
    """How many printed rows can be right as printed, by table. In Markdown."""
    broken = violations(rows)
    fresh, total = int((~broken["repeats"]).sum()), int((~rows.drop(columns="table").duplicated()).sum())
    by_table = ", ".join(
        f"Table {table} {count} of {int((rows['table'] == table).sum())}"
        for table, count in broken["table"].value_counts().sort_index().items()
    )
    ours = broken[broken["method"].str.startswith(OURS)]
    names = "; ".join(f"Table {r.table} {r.method}, {r.dataset}" for r in ours.itertuples())
    return (
        f"**Takeaway.** {len(broken)} of {len(rows)} printed rows violate at least one identity beyond rounding "
        f"({by_table}); without rows that repeat an earlier table, {fresh} of {total}. Rows of {OURS} itself among "
        f"them: {names or 'none'}."
    )


# --- gains that the text states ---


def gains(accuracy: Frame, method: str = OURS, baselines: tuple[str, ...] = (), table: int = 1) -> Frame:
    """Relative gains of a method over the best of ``baselines`` (all others of the table, if empty), by metric.

    Returns:
        dataset, metric, best (the competitor's name), gain, low, high: percent; low and high are the extremes over
        the rounding of both figures.
    """
    rows = accuracy[accuracy["table"] == table]
    lines = []
    for (dataset, metric), part in rows.groupby(["dataset", "metric"], sort=False):
        value = part.set_index("method")["percent"]
        others = value[list(baselines)] if baselines else value.drop(method)
        best, own = others.max(), value[method]
        low, high = ((own + sign * TOLERANCE) / (best - sign * TOLERANCE) for sign in (-1, 1))
        numbers = {"gain": 100 * (own / best - 1), "low": 100 * (low - 1), "high": 100 * (high - 1)}
        lines.append({"dataset": dataset, "metric": metric, "best": others.idxmax(), **numbers})
    return pd.DataFrame(lines)


def recomputed_claims(accuracy: Frame, seconds: Frame, claims: Frame) -> Frame:
    """The gains that the text states beside the same gains from the tables.

    Returns:
        claim, where, claimed, recomputed, low, high (percent, extremes over the rounding of the printed figures),
        agrees: the stated number lies between the extremes, up to its own rounding (0.05).
    """
    table1, dpo = gains(accuracy), gains(accuracy, baselines=("DPO",), table=5)
    simpo = gains(accuracy, "SimPO + causal", ("SimPO",), table=5)
    time = seconds[seconds["table"] == 6].set_index("method")["seconds_per_epoch"]
    more = pd.Series(dict.fromkeys(("gain", "low", "high"), 100 * (time[OURS] / time["DPO"] - 1)))
    numbers = ["gain", "low", "high"]
    lines = []
    for claim in claims.itertuples():
        mine = table1 if pd.isna(claim.dataset) else table1[table1["dataset"] == claim.dataset]
        if claim.kind == "mean_gain":
            found = mine[numbers].mean()
        elif claim.kind in ("smallest_gain", "largest_gain"):
            found = mine.sort_values("gain")[numbers].iloc[0 if claim.kind == "smallest_gain" else -1]
        elif claim.kind == "gain_over_dpo":
            found = dpo.loc[dpo["dataset"] == claim.dataset, numbers].mean()
        elif claim.kind == "simpo_gain":
            chosen = (simpo["dataset"] == claim.dataset) & (simpo["metric"] == "NDCG@10")
            found = simpo.loc[chosen, numbers].iloc[0]
        elif claim.kind == "more_seconds":
            found = more
        else:
            raise StudyError(f"published/claims.csv: unknown kind {claim.kind!r}")
        agrees = found["low"] - 0.05 <= claim.claimed_percent <= found["high"] + 0.05
        numbers_found = {"recomputed": found["gain"], "low": found["low"], "high": found["high"]}
        line = {"claim": claim.claim, "where": claim.where, "claimed": claim.claimed_percent}
        lines.append({**line, **numbers_found, "agrees": bool(agrees)})
    return pd.DataFrame(lines)


def claims_takeaway(found: Frame) -> str:
    """Which of the stated gains follow from the tables. In Markdown."""
    wrong = found[~found["agrees"]]
    said = "; ".join(
        f"{r.claim[0].lower() + r.claim[1:]}, stated as {r.claimed:.2f} % ({r.where}), is {r.recomputed:.2f} % from "
        f"the tables, {r.low:.2f} to {r.high:.2f} % over all roundings"
        for r in wrong.itertuples()
    )
    return (
        f"**Takeaway.** {len(found) - len(wrong)} of {len(found)} stated gains follow from the printed tables. "
        + (f"Not so: {said}." if said else "")
    ).rstrip()


# --- what a hit is worth there ---


def attainable(values: ArrayLike, examples: ArrayLike, tolerance: float = TOLERANCE) -> NDArray[np.bool_]:
    """Whether each printed hit rate (percent) is a whole number of hits among so many examples, up to rounding.

    Shapes:  values (..., F) and examples (M,) broadcast to (..., F, M).
    """
    rate, count = np.asarray(values, dtype=float)[..., None], np.asarray(examples, dtype=float)
    return np.abs(rate - 100 * np.round(rate * count / 100) / count) <= tolerance + 1e-9


class Granularity(NamedTuple):
    """How well a set of printed hit rates fits whole numbers of hits, by number of test examples."""

    scan: Frame  # examples, fits (figures that are whole hits), chance (expected without a grid), score
    figures: int
    best: int  # the number of examples with the largest score
    p: float  # share of gridless sets of figures whose best score, scanned alike, is as large
    smallest: int | None  # the fewest examples at which all figures are whole hits; None within the scan's range


def granularity(
    values: ArrayLike, sizes: ArrayLike = range(150, 1201), draws: int = 2000, seed: int = 0
) -> Granularity:
    """Do printed hit rates (percent) look like whole hits among N examples, for some N that was scanned for?

    With N examples hit rates lie on a grid of 100/N points. Figures from elsewhere fall within +-0.005 of it with
    probability N / 10,000. The score of N is -log10 of the binomial probability of at least as many fits. Since N is
    scanned for, the best score is compared with those of ``draws`` sets of figures without a grid: the printed ones,
    each distinct figure multiplied by a number uniform between 0.7 and 1.3 and rounded again (ties stay ties), scanned
    alike. A small p says that a grid of that size is in the figures, not that N is the number of examples: multiples of
    N fit as well.

    Checked: tests/test_audit.py, on figures made from a known N, and by its error rate on figures without a grid.
    """
    rates, candidates = np.asarray(values, dtype=float), np.asarray(sizes)
    chance = np.minimum(2 * TOLERANCE * candidates / 100, 1.0)
    tails = binom.sf(np.arange(len(rates) + 1)[:, None] - 1, len(rates), chance)  # P(at least so many fits): (F+1, M)
    scores = -np.log10(np.maximum(tails, 1e-300))

    def scored(figures: NDArray) -> tuple[NDArray, NDArray]:
        fits = attainable(figures, candidates).sum(axis=-2)
        return fits, np.take_along_axis(scores, np.atleast_2d(fits), axis=0).reshape(fits.shape)

    fits, score = scored(rates)
    rng = np.random.default_rng(seed)
    distinct, place = np.unique(rates, return_inverse=True)
    moved = np.round(distinct * rng.uniform(0.7, 1.3, (draws, len(distinct))), 2)[:, place]
    best = np.array([scored(row)[1].max() for row in moved])
    scan = pd.DataFrame({"examples": candidates, "fits": fits, "chance": len(rates) * chance, "score": score})
    whole = candidates[fits == len(rates)]
    p = float((1 + (best >= score.max() - 1e-12).sum()) / (1 + draws))
    return Granularity(scan, len(rates), int(candidates[score.argmax()]), p, int(whole[0]) if len(whole) else None)


def hit_rates(accuracy: Frame, table: int = 1) -> dict[str, NDArray]:
    """The printed hit rates of a table, HR@10 and HR@20 of all methods, by dataset."""
    rows = accuracy[(accuracy["table"] == table) & accuracy["metric"].str.startswith("HR")]
    return {dataset: part["percent"].to_numpy() for dataset, part in rows.groupby("dataset", sort=False)}


def granularity_takeaway(found: Mapping[str, Granularity]) -> str:
    """What the grids of the datasets suggest, with the chance of it. In Markdown."""
    parts = []
    for dataset, g in found.items():
        row = g.scan[g.scan["examples"] == g.best].iloc[0]
        parts.append(
            f"{dataset}: the best-fitting N is {g.best:,}, where {int(row['fits'])} of {g.figures} figures are whole "
            f"hits and {row['chance']:.1f} are expected by chance (p = {g.p:.3f} with the scan counted in)"
        )
    clear = [dataset for dataset, g in found.items() if g.p * len(found) <= 0.05]  # Bonferroni over the scans
    if not clear:
        verdict = "None stands out beyond chance, so nothing follows about the number of test examples."
    else:
        verdict = f"A grid stands out on {', '.join(clear)}."
        if any(found[dataset].scan["fits"].max() < found[dataset].figures for dataset in clear):
            verdict += " It fits some figures and not all: not every row can come from one test set of that size."
    return f"**Takeaway.** {'; '.join(parts)}. {verdict}"


def examples_needed(percent: float, baseline: float, level: float = 0.95) -> float:
    """Test examples at which two independent hit rates (percent) differ by their interval's half width.

        N = z^2 [ p (1 - p) + q (1 - q) ] / (p - q)^2

    The same examples for both methods, as is usual, need fewer; how many, the printed figures do not tell.
    """
    p, q = percent / 100, baseline / 100
    return float(norm.ppf((1 + level) / 2) ** 2 * (p * (1 - p) + q * (1 - q)) / (p - q) ** 2)


def hits_behind(accuracy: Frame, sizes: tuple[int, ...]) -> Frame:
    """The margin of CausalDPO over the best competitor in HR, in points and in hits, for given numbers of examples."""
    printed = accuracy[accuracy["table"] == 1].set_index(["dataset", "metric", "method"])["percent"]
    lines = []
    for row in gains(accuracy).itertuples():
        if row.metric.startswith("HR"):
            own, best = (printed[row.dataset, row.metric, name] for name in (OURS, row.best))
            line = {"dataset": row.dataset, "metric": row.metric, "best competitor": row.best, "points": own - best}
            line |= {f"hits of {size:,}": (own - best) * size / 100 for size in sizes}
            lines.append({**line, "examples for an interval without 0": examples_needed(own, best)})
    return pd.DataFrame(lines)


# --- the same thing under two names ---

# One rejected response per prompt: the three losses are one function (methods of Table 1; DPO stands in Table 5).
SAME_LOSS = ("DMPO", "S-DPO", "DPO")
# Supervised fine-tuning alone, in Table 8 and in Table 1.
SAME_MODEL = {"w/o CausalDPO": "BIGRec"}


def same_losses(rows: Frame) -> Frame:
    """DMPO, S-DPO and DPO with one negative, which are one loss: a line per dataset and method, and their ratio.

    Returns:
        the lines of ``printed_rows`` of Tables 1 and 5, and per dataset a line ``largest / smallest``.
    """
    chosen = rows[rows["method"].isin(SAME_LOSS) & rows["table"].isin((1, 5))]
    lines = []
    for dataset, part in chosen.groupby("dataset", sort=False):
        ratio = {metric: part[metric].max() / part[metric].min() for metric in METRICS}
        lines += [part, pd.DataFrame([{"dataset": dataset, "method": "largest / smallest", **ratio}])]
    return pd.concat(lines, ignore_index=True)[["dataset", "method", *METRICS]]


def disagreements(accuracy: Frame) -> Frame:
    """Figures that stand in several tables for the same dataset, shift, method and metric, and differ.

    Returns:
        dataset, method, metric, and for both places table, name and percent.
    """
    named = accuracy.assign(model=accuracy["method"].replace(SAME_MODEL))
    named = named.drop_duplicates(["dataset", "shift", "method", "metric", "percent"])  # copies of an earlier table
    pairs = named.merge(named, on=["dataset", "shift", "model", "metric"], suffixes=("", "_other"))
    pairs = pairs[(pairs["table"] < pairs["table_other"]) & (pairs["percent"] != pairs["percent_other"])]
    columns = ["dataset", "metric", "table", "method", "percent", "table_other", "method_other", "percent_other"]
    return pairs[columns].reset_index(drop=True)


def ablation_order(rows: Frame) -> Frame:
    """Table 8: is "w/o SFT" the worst variant, below "w/o both", as the text says? By dataset and metric."""
    table = rows[rows["table"] == 8]
    lines = []
    for dataset, part in table.groupby("dataset", sort=False):
        value = part.set_index("method")
        for metric in ("HR@10", "NDCG@10"):
            alone, both = value.loc["w/o SFT", metric], value.loc["w/o both", metric]
            line = {"dataset": dataset, "metric": metric, "w/o SFT": alone, "w/o both": both}
            lines.append({**line, "w/o SFT is worse": bool(alone < both)})
    return pd.DataFrame(lines)


def names_takeaway(rows: Frame, accuracy: Frame) -> str:
    """How far apart figures of one loss, and of one model, are printed. In Markdown."""
    ratios = same_losses(rows)
    ratios = ratios[ratios["method"] == "largest / smallest"].set_index("dataset")
    dataset, metric = ratios[list(METRICS)].stack().idxmax()
    found = disagreements(accuracy)
    apart = found.assign(ratio=(np.log(found["percent_other"] / found["percent"])).abs())
    row = apart.loc[apart["ratio"].idxmax()]
    order = ablation_order(rows)
    worse = int(order["w/o SFT is worse"].sum())
    return (
        f"**Takeaway.** One loss under three names is printed with {metric} up to {ratios.loc[dataset, metric]:.1f} "
        f"times apart ({dataset}). {len(found)} figures differ between tables that name the same model and dataset, "
        f"most {row['method']} and {row['method_other']} on {row['dataset']}: {row['metric']} {row['percent']:.2f} in "
        f"Table {row['table']}, {row['percent_other']:.2f} in Table {row['table_other']}. "
        f'"w/o SFT" is worse than "w/o both", as the text says, in {worse} of {len(order)} comparisons.'
    )


# --- paper and replication ---

SHIFTS = {"popularity": "Yelp2018", "temporal": "ML-10M", "exposure": "Book-Crossing"}  # the paper's dataset of each
# This study's methods under the paper's names, the first that is printed for a dataset: with one negative DMPO is DPO.
COUNTERPARTS = {"sft": ("BIGRec",), "dpo": ("DPO", "DMPO"), "causal_dpo": (OURS,)}
COMPARISONS = (("dpo", "sft"), ("causal_dpo", "sft"), ("causal_dpo", "dpo"))


def counterpart(rows: Frame, dataset: str, shift: str, method: str) -> pd.Series | None:
    """The printed row that corresponds to one of this study's methods, from the first table that has it."""
    part = rows[(rows["dataset"] == dataset) & (rows["shift"] == shift)]
    for name in COUNTERPARTS[method]:
        if len(found := part[part["method"] == name]):
            return found.iloc[0]
    return None


def shared_settings(tables: Tables) -> dict[str, str]:
    """The study's settings whose shift the paper has too, with that shift."""
    return {name: shift for name in settings(tables) for shift in SHIFTS if name.endswith(f"-{shift}")}


def side_by_side(rows: Frame, tables: Tables) -> Frame:
    """Relative differences between methods under shift, in the paper and here: direction, not level.

    Datasets, backbones and sizes differ, so absolute values are not comparable; the sign of a difference is a
    statement that can be. Here each difference is paired, with its 95 % interval and Holm-corrected p-value, divided
    by the baseline's mean; the paper prints no interval.

    Returns:
        setting, dataset (the paper's), metric, method, baseline, paper, difference, low, high (percent of the
        baseline), direction: ``same`` or ``opposite`` where this study detects a difference, else ``undecided``.
    """
    lines = []
    for setting, shift in shared_settings(tables).items():
        printed = {m: counterpart(rows, SHIFTS[shift], shift, m) for m in COUNTERPARTS}
        levels = select(tables["metrics"], setting=setting, split="ood_test").set_index(["metric", "method"])["mean"]
        for (method, baseline), metric in product(COMPARISONS, METRICS):
            found = change(tables, setting, "ood_test", metric, method, baseline)
            if found is None or printed[method] is None or printed[baseline] is None:
                continue
            paper, level = 100 * (printed[method][metric] / printed[baseline][metric] - 1), levels[metric, baseline]
            direction = "undecided"
            if found.word != NOTHING:
                direction = "same" if (paper > 0) == (found.difference > 0) else "opposite"
            key = {"setting": setting, "dataset": SHIFTS[shift], "metric": metric, "method": method}
            numbers = {name: 100 * getattr(found, name) / level for name in ("difference", "low", "high")}
            lines.append({**key, "baseline": baseline, "paper": paper, **numbers, "direction": direction})
    columns = ["setting", "dataset", "metric", "method", "baseline", "paper", "difference", "low", "high", "direction"]
    return pd.DataFrame(lines, columns=columns)


def rank_orders(rows: Frame, tables: Tables) -> Frame:
    """The order of the shared methods under shift, best first, by metric: in the paper and here (means in percent)."""
    lines = []
    for setting, shift in shared_settings(tables).items():
        printed = {m: counterpart(rows, SHIFTS[shift], shift, m) for m in COUNTERPARTS}
        for metric in METRICS:
            found = select(tables["metrics"], setting=setting, split="ood_test", metric=metric)
            here = found.set_index("method")["mean"]
            shared = [m for m, row in printed.items() if row is not None and m in here]
            by_paper = sorted(shared, key=lambda m: -printed[m][metric])
            by_study = sorted(shared, key=lambda m: -here[m])
            line = {"setting": setting, "metric": metric, "the paper's dataset": SHIFTS[shift]}
            line["paper"] = " > ".join(f"{printed[m]['method']} {printed[m][metric]:.2f}" for m in by_paper)
            line["here"] = " > ".join(f"{look(m).label} {100 * here[m]:.2f}" for m in by_study)
            lines.append({**line, "same order": by_paper == by_study})
    return pd.DataFrame(lines)


def side_by_side_takeaway(found: Frame) -> str:
    """How many of the paper's directions this study detects, contradicts or cannot decide. In Markdown."""
    if found.empty:
        return "**Takeaway.** This study's tables hold no setting with a shift of the paper's."
    counts = found["direction"].value_counts()
    agree = ((found["paper"] > 0) == (found["difference"] > 0)).sum()
    said = ", ".join(f"{counts.get(word, 0)} {word}" for word in ("same", "opposite", "undecided"))
    within = (found["low"] <= found["paper"]) & (found["paper"] <= found["high"])
    gains = within[(found["method"] == "causal_dpo") & (found["paper"] > 0)]
    return (
        f"**Takeaway.** Of {len(found)} differences under shift, directions: {said}. The bare signs agree in {agree}; "
        f"the paper's relative difference lies inside this study's interval in {within.sum()}. Of {len(gains)} printed "
        f"gains of CausalDPO, {(~gains).sum()} lie outside. Undecided means that these data allow both directions; "
        "outside the interval, that they exclude an effect of the printed size - on other data and backbones than the "
        "paper's."
    )
