"""What a study of DPO4Rec shows: its tables (``reranking``) as figures' rows, claims and sentences, for notebook 21.

A claim is a signed difference of two rows in NDCG@5, tested in every setting, re-ranker and test split. *Supported*:
the interval is above 0 and Holm's p, in its family, at most 0.05; *contradicted*: the same below 0; *not detected*:
neither, which is not *no effect*.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from causaldpo_lib.plots import SPLITS, look
from causaldpo_lib.reranking import row_label
from causaldpo_lib.tables import select
from causaldpo_lib.takeaways import NOTHING, verdict

Frame = pd.DataFrame
Tables = Mapping[str, Frame]

METRIC = "ndcg@5"  # the headline metric of DPO4Rec, and its reward
TESTS = ("iid_test", "ood_test")
LAST = "last round"
# claim: (row, baseline), the first expected higher
CLAIMS = {
    "A re-ranker orders better than the initial ranker": ("backbone", "initial"),
    "KAR's knowledge helps the re-ranker": ("kar", "backbone"),
    "Unaligned knowledge helps the re-ranker": ("knowledge", "backbone"),
    "Aligned knowledge helps the re-ranker": (LAST, "backbone"),
    "Alignment adds to unaligned knowledge": (LAST, "knowledge"),
    "Aligned knowledge helps more than KAR": (LAST, "kar"),
    "What helps is said about the user: aligned knowledge beats that of others": (LAST, "shuffled"),
}
SEEN = {"supported": "support", "contradicted": "contradict"}
WORDS = {"raised": "supported", "lowered": "contradicted", NOTHING: "not detected"}


def settings(tables: Tables) -> list[str]:
    """The settings of a study, in its order."""
    return list(dict.fromkeys(tables["reranking"]["setting"]))


def last_round(tables: Tables) -> str:
    """The row of the last round of alignment."""
    return f"dpo4rec_{tables['reranking_rounds']['round'].max()}"


def levels(tables: Tables, setting: str, metric: str = METRIC) -> Frame:
    """Means of one metric (percent) by re-ranker, row and test split, as ``plots.named_intervals`` takes them."""
    rows = select(tables["reranking"], setting=setting, metric=metric, split=list(TESTS))
    values = {name: 100 * rows[name] for name in ("mean", "low", "high")}
    rows = rows[["method", "split", "row"]].assign(name=rows["row"].map(row_label), **values)
    return rows.sort_values("row", key=lambda row: row != "initial", kind="stable", ignore_index=True)


def claims(tables: Tables, metric: str = METRIC) -> Frame:
    """Every test of every claim.

    Returns:
        claim, setting, method (re-ranker), split, name (of the difference), mean, low, high (points), p_holm, outcome
        (a value of ``WORDS``).
    """
    lines, last = [], last_round(tables)
    for claim, pair in CLAIMS.items():
        row, baseline = (last if name == LAST else name for name in pair)
        for found in _differences(tables, row, baseline, metric).itertuples():
            word = verdict(found.low, found.high, found.p_holm)
            lines.append(
                {
                    **{"claim": claim, "setting": found.setting, "method": found.method, "split": found.split},
                    "name": "\n− ".join(row_label(name).removeprefix("+ ") for name in (row, baseline)),
                    **{name: 100 * getattr(found, name) for name in ("mean", "low", "high")},
                    **{"p_holm": found.p_holm, "outcome": WORDS[word]},
                }
            )
    return pd.DataFrame(lines)


def _differences(tables: Tables, row: str, baseline: str, metric: str) -> Frame:
    """Rows of reranking_paired.csv of one pair, ``row`` minus ``baseline`` whichever way round the table has it."""
    rows = select(tables["reranking_paired"], metric=metric, split=list(TESTS)).rename(columns={"difference": "mean"})
    found = select(rows, row=row, baseline=baseline)
    if len(found):
        return found
    other = select(rows, row=baseline, baseline=row)
    return other.assign(mean=-other["mean"], low=-other["high"], high=-other["low"])


def counts(found: Frame) -> Frame:
    """How often each claim is supported, not detected and contradicted, and the range of its differences (points)."""
    lines = []
    for claim, rows in found.groupby("claim", sort=False):
        outcomes = rows["outcome"].value_counts()
        line = {"claim": claim, **{word: outcomes.get(word, 0) for word in WORDS.values()}, "tests": len(rows)}
        lines.append(line | {"differences (points)": f"{rows['mean'].min():+.2f} ... {rows['mean'].max():+.2f}"})
    return pd.DataFrame(lines)


def takeaway(found: Frame) -> str:
    """What is left of the claims: how many of all tests support and contradict them, which ones, in Markdown."""
    said, total = [], len(found)
    for word, verb in SEEN.items():
        tests = found.loc[found["outcome"] == word, "claim"].value_counts(sort=False)
        if tests.empty:
            said.append(f"None {verb}s its claim.")
            continue
        count = tests.sum()
        once = (tests == 1).all()
        names = "; ".join(tests.index if once else [f"{claim} ({times})" for claim, times in tests.items()])
        each = "one each of: " if once and count > 1 else "" if once else "by claim: "
        does = f"{verb} their claim" if count > 1 else f"{verb}s its claim"
        said.append(f"{count} of {total} tests {does}, {each}{names}.")
    nothing = int((found["outcome"] == WORDS[NOTHING]).sum())
    half = (found["high"] - found["low"]) / 2
    return (
        f"**Takeaway.** *NDCG@5 on held-out lists, {total} tests of {found['claim'].nunique()} claims.* "
        f"{' '.join(said)} {nothing} of {total} detect nothing, which is not *no effect*: half-widths are "
        f"{half.min():.1f} to {half.max():.1f} points."
    )


def levels_takeaway(tables: Tables, setting: str) -> str:
    """The lowest and the highest row of each re-ranker under shift, which no test has compared, in Markdown."""
    rows, said = select(levels(tables, setting), split="ood_test"), []
    for method in rows["method"].unique():
        own = rows[rows["method"] == method].sort_values("mean")
        low, high = own.iloc[0], own.iloc[-1]
        said.append(
            f"{look(method).label} {low['mean']:.1f} % ({low['name']}) and {high['mean']:.1f} % ({high['name']})"
        )
    count = select(tables["reranking"], setting=setting, split="ood_test")[["users", "seeds"]].iloc[0]
    return (
        f"**Takeaway.** *{setting}, {SPLITS['ood_test']}, {count['users']:,} lists, {count['seeds']} seeds.* NDCG@5, "
        f"lowest and highest of the {rows['row'].nunique()} rows, untested (the highest of several is high by chance): "
        f"{'; '.join(said)}."
    )


def curve(tables: Tables, setting: str) -> Frame:
    """The change of the mean reward since round 0 (points): method, metric, round, mean, low, high."""
    rows = tables["reranking_rounds"]
    rows = rows[(rows["setting"] == setting) & rows["metric"].str.endswith("_gain")]
    values = {name: 100 * rows[name] for name in ("mean", "low", "high")}
    return rows[["method", "metric", "round"]].assign(**values).reset_index(drop=True)


def curve_takeaway(tables: Tables, setting: str) -> str:
    """What alignment did to the reward that it maximises, and to the same on lists that gave no pairs, in Markdown."""
    rows, said = curve(tables, setting), []
    last = rows[rows["round"] == rows["round"].max()]
    for metric, where in (("reward_gain", "on the lists that gave the pairs"), ("validation_gain", "on others")):
        parts = []
        for row in last[last["metric"] == metric].itertuples():
            parts.append(f"{look(row.method).label} {row.mean:+.2f} points [{row.low:+.2f}, {row.high:+.2f}]")
        said += [f"{where}: {', '.join(parts)}"] if parts else []
    first = select(tables["reranking_rounds"], setting=setting, metric="reward", round=0)
    worth = [f"{look(row.method).label} {100 * (row.mean - row.blank_reward):+.2f}" for row in first.itertuples()]
    ties = 100 * first["tied"] / (first["tied"] + first["pairs"])
    low, high = (f"{value:.0f}" for value in (ties.min(), ties.max()))
    return (
        f"**Takeaway.** *{setting}.* Change of a sampled text's mean reward by the last round, {'; '.join(said)}. "
        f"Before any alignment a text is worth, against no text (points): {', '.join(worth)}; all texts of a user tie "
        f"for {low if low == high else f'{low} to {high}'} % of the users."
    )


# --- one user of the simulator ---


def part(tables: Tables, name: str) -> Frame:
    """The rows of one part of the walk-through: ``history``, ``list`` or ``text``."""
    return select(tables["reranking_example"], part=name).reset_index(drop=True)


def loop(tables: Tables) -> Frame:
    """The loop's steps with what they were for the shown user in round 0: columns step and text, for the drawing."""
    texts = select(part(tables, "text"), round=0)
    own = texts[texts["number"] >= 0]
    chosen, rejected = (own[own["role"] == role]["value"] for role in ("chosen", "rejected"))
    pair = f"{chosen.iloc[0]:.2f} against {rejected.iloc[0]:.2f}" if len(chosen) and len(rejected) else "all tie"
    steps = [
        ("language model", f"{len(own)} texts\nabout a user's early history"),
        ("re-ranker", f"reward of each: NDCG@5\n{own['value'].min():.2f} to {own['value'].max():.2f}"),
        ("best and worst", f"chosen and rejected\n{pair}"),
        ("DPO", "the policy of the next round,\nthis one its reference"),
    ]
    return pd.DataFrame(steps, columns=["step", "text"])


def texts_table(tables: Tables, number: int) -> Frame:
    """One round's texts of the shown user with reward and role, best first; the greedy one is what evaluation reads."""
    rows = select(part(tables, "text"), round=number).sort_values("value", ascending=False, kind="stable")
    words = rows["text"].fillna("*no usable text*")
    table = rows.assign(text=words, reward=rows["value"].map("{:.3f}".format), role=rows["role"].fillna(""))
    return table[["text", "reward", "role"]].reset_index(drop=True)


def user_text(tables: Tables) -> str:
    """The shown user's early history and list, positives in bold, in Markdown."""
    history, listed = part(tables, "history")["text"], part(tables, "list")
    titles = [f"**{row.text}**" if row.value else row.text for row in listed.itertuples()]
    return (
        f"*Early history* ({len(history)}): {'; '.join(history)}.\n\n"
        f"*First training list, in the initial ranker's order, positives in bold*: "
        f"{'; '.join(titles)}."
    )
