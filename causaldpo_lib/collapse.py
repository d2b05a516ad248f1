"""Does accuracy fall with the number of negatives, and does DynamicPO mend it? Frames and sentences of notebook 13.

All is made from the tables of the study ``dynamicpo``: each of ``LOSSES``, alone and with DynamicPO, at several numbers
of negatives, and DynamicPO's controls at the most of them. Accuracies, shares and losses left are in percent.
"""

from __future__ import annotations

import re
from itertools import product

import pandas as pd
import torch

from causaldpo_lib import takeaways
from causaldpo_lib.audit import published
from causaldpo_lib.errors import StudyError
from causaldpo_lib.losses import LogProbs, boundary_negatives, example_losses, gradient_share
from causaldpo_lib.parameters import read_yaml
from causaldpo_lib.paths import PARAMS
from causaldpo_lib.plots import SPLITS, look
from causaldpo_lib.tables import TEST_SPLITS, Tables, select, settings
from causaldpo_lib.takeaways import Pairs, change

Frame = pd.DataFrame
LOSSES = ("dmpo", "s_dpo", "mppo")
METRIC = "HR@1"
MARK = "-negatives_per_prompt-"
FEW, MANY = 1, 15  # the numbers of negatives between which accuracy is said to collapse
NAMES = {loss: look(loss).label for loss in LOSSES}
COLLAPSE: Pairs = {NAMES[loss]: (f"{loss}{MARK}{MANY}", f"{loss}{MARK}{FEW}") for loss in LOSSES}
TRAINED: Pairs = {NAMES[loss]: (f"{loss}{MARK}{MANY}", "sft") for loss in LOSSES}
MENDED: Pairs = {NAMES[loss]: (f"dynamic_{loss}{MARK}{MANY}", f"{loss}{MARK}{MANY}") for loss in LOSSES}
DYNAMIC = f"dynamic_dmpo{MARK}{MANY}"
WITH: Pairs = {f"{NAMES[loss]} with DynamicPO": (f"dynamic_{loss}{MARK}{MANY}", "sft") for loss in LOSSES}
# DynamicPO on DMPO at MANY negatives: what the figure of the controls calls each, and what each of its parts changes.
VARIANTS = {
    "sft": "SFT, before alignment",
    f"dmpo{MARK}{MANY}": "DMPO",
    DYNAMIC: "DynamicPO (alpha 0.5, gamma 2)",
    "dynamic_dmpo-selection-random": "as many negatives at random",
    "dynamic_dmpo-selection-all": "all negatives, dynamic betas",
    "dynamic_dmpo-alpha-0.0": "boundary, one beta (alpha 0)",
    "dynamic_dmpo-alpha-1.0": "alpha 1",
    "dynamic_dmpo-gamma-0.0": "gamma 0",
    "dynamic_dmpo-gamma-6.0": "gamma 6",
}
SHARES = {"boundary_share": "of the negatives (%)", "gradient_share": "of the gradient (%)"}
PARTS: Pairs = {
    "the boundary rather than as many at random": (DYNAMIC, "dynamic_dmpo-selection-random"),
    "the boundary rather than all negatives": (DYNAMIC, "dynamic_dmpo-selection-all"),
    "dynamic betas rather than one": (DYNAMIC, "dynamic_dmpo-alpha-0.0"),
}


def scaled(table: Frame) -> Frame:
    """The rows of the losses, alone and with DynamicPO, over their numbers of negatives; others are left out.

    ``loss`` and ``negatives`` are added; ``method`` loses the number.

    Raises:
        StudyError: there are no such rows.
    """

    def own_negatives(method: str) -> int:
        return read_yaml(PARAMS / "methods" / f"{method}.yaml")["align"]["negatives_per_prompt"]

    parts = []
    for method in (f"{prefix}{loss}" for loss in LOSSES for prefix in ("", "dynamic_")):
        found = [re.fullmatch(rf"{method}(?:{MARK}(\d+))?", name) for name in table["method"].unique()]
        names = {int(match[1] or own_negatives(method)): match[0] for match in found if match}
        for negatives, name in sorted(names.items()):
            key = {"method": method, "loss": method.removeprefix("dynamic_"), "negatives": negatives}
            parts.append(table[table["method"] == name].assign(**key))
    if not parts:
        raise StudyError(f"these tables have no {' or '.join(LOSSES)}: give those of the study dynamicpo")
    return pd.concat(parts, ignore_index=True)


def _percent(rows: Frame) -> Frame:
    return rows.assign(**{name: 100 * rows[name] for name in ("mean", "low", "high")})


def accuracy(tables: Tables, setting: str) -> Frame:
    """HR@1 with its interval over the numbers of negatives: the columns of metrics.csv, loss and negatives."""
    return scaled(_percent(select(tables["metrics"], setting=setting, metric=METRIC)))


def levels(tables: Tables, setting: str) -> Frame:
    """HR@1 of what has no negatives: the supervised model and the floors."""
    return _percent(select(tables["metrics"], setting=setting, metric=METRIC, method=["sft", "popular", "random"]))


def controls(tables: Tables, setting: str) -> Frame:
    """HR@1 of ``VARIANTS`` in their order, each with its ``name``."""
    rows = _percent(select(tables["metrics"], setting=setting, metric=METRIC, method=list(VARIANTS)))
    rows = rows.sort_values("method", key=lambda methods: methods.map(list(VARIANTS).index), kind="stable")
    return rows.assign(name=rows["method"].map(VARIANTS))


# --- training ---


def _ranges(rows: Frame, keys: list[str], value: str = "value") -> Frame:
    """Mean, least (``low``) and largest (``high``) of a column over the seeds."""
    found = rows.groupby(keys, sort=False)[value].agg(["mean", "min", "max"])
    return found.rename(columns={"min": "low", "max": "high"}).reset_index()


def shares(tables: Tables, setting: str) -> Frame:
    """The boundary's share of the negatives and of the gradient at each logged step of the losses alone."""
    rows = scaled(select(tables["training"], setting=setting))
    rows = rows[rows["method"] == rows["loss"]]
    long = rows.melt(["loss", "negatives", "step"], list(SHARES), "quantity").dropna()
    return _ranges(long.assign(value=100 * long["value"]), ["loss", "negatives", "quantity", "step"])


def share_ends(tables: Tables, setting: str) -> Frame:
    """``shares`` at the first and the last logged step: a row per loss and number of negatives."""
    ends = shares(tables, setting).groupby(["loss", "negatives", "quantity"], sort=False)["mean"].agg(["first", "last"])
    wide = ends.unstack("quantity").swaplevel(axis=1).sort_index(axis=1)
    return wide.rename(index=NAMES, level="loss").rename(columns=SHARES, level=0)


def measured_shares(seed: int = 0, prompts: int = 200) -> Frame:
    """The boundary's share of the gradient on random log-probabilities by the closed form and by autograd, in %.

    MANY negatives a prompt; ``gap`` is the largest difference of any prompt, in points.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 12, (prompts, 1 + MANY), generator=generator).double()
    noise = torch.randn(2, prompts, 1 + MANY, generator=generator, dtype=torch.float64)
    reference = noise[0] - 3 * tokens
    policy = (reference + 2 * noise[1]).requires_grad_()
    batch = LogProbs(*(part for whole in (policy, reference, tokens) for part in (whole[:, 0], whole[:, 1:])))
    boundary, lines = boundary_negatives(batch), []
    for loss in LOSSES:
        (slopes,) = torch.autograd.grad(example_losses(loss, batch).sum(), policy, retain_graph=True)
        sizes = slopes[:, 1:].abs()
        closed, measured = gradient_share(loss, batch, boundary), (sizes * boundary).sum(1) / sizes.sum(1)
        line = {"boundary": boundary.double(), "closed form": closed, "autograd": measured}
        line = {name: 100 * values.mean().item() for name, values in line.items()}
        lines.append({"loss": look(loss).label, **line, "gap": 100 * (closed - measured).abs().max().item()})
    return pd.DataFrame(lines)


def left(losses: pd.Series, steps: int) -> float:
    """The mean of the last ``steps`` logged losses of a run in % of the mean of as many at its start."""
    return 100 * losses.tail(steps).mean() / losses.head(steps).mean()


def loss_left(tables: Tables, setting: str) -> Frame:
    """What training leaves of the loss in %, with MANY negatives: a row per method, in the order of ``LOSSES``.

    Columns: method and name; of the last logged step against the first ``mean``, ``low`` and ``high`` over the seeds;
    of the last quarter of the logged steps against the first quarter ``quarter``, ``quarter_low``, ``quarter_high``.
    The steps have different prompts, of which a quarter averages several times as many. DynamicPO's controls on DMPO
    are among the rows.
    """
    names = {f"{loss}{MARK}{MANY}": NAMES[loss] for loss in LOSSES}
    names |= {f"dynamic_{method}": f"{name} with DynamicPO" for method, name in names.items()}
    names |= {method: VARIANTS[method] for _, method in PARTS.values()}
    rows = select(tables["training"], setting=setting, method=list(names)).sort_values("step", kind="stable")
    found = []
    for method, name in names.items():
        runs = [run["preference_loss"] for _, run in rows[rows["method"] == method].groupby("seed")]
        ends = pd.Series([left(run, 1) for run in runs])
        quarters = pd.Series([left(run, max(1, len(run) // 4)) for run in runs])
        row = {"method": method, "name": name, "mean": ends.mean(), "low": ends.min(), "high": ends.max()}
        row |= {"quarter": quarters.mean(), "quarter_low": quarters.min(), "quarter_high": quarters.max()}
        found.append(row)
    return pd.DataFrame(found)


def fits(tables: Tables, setting: str) -> Frame:
    """What training came to at its last logged step, and HR@1 on the IID test, where a better fit should pay.

    ``quantity`` is ``left``, the preference loss in % of that at the first logged step, ``win``, the prompts (%) whose
    chosen response beats every rejected one, or ``hits``.
    """
    rows = scaled(select(tables["training"], setting=setting)).sort_values("step", kind="stable")
    rows["win"] = 100 * rows["win_rate"].fillna(rows["accuracy"])  # with one negative both are one, and it is logged
    keys = ["loss", "method", "negatives"]
    runs = rows.groupby([*keys, "seed"], sort=False)
    ends = pd.DataFrame({"left": runs["preference_loss"].apply(left, steps=1), "win": runs["win"].last()}).reset_index()
    found = _ranges(ends.melt(keys, ["left", "win"], "quantity"), [*keys, "quantity"])
    hits = select(accuracy(tables, setting), split="iid_test").assign(quantity="hits")
    return pd.concat([found, hits[found.columns]], ignore_index=True)


def overhead(tables: Tables, setting: str) -> Frame:
    """Training time with DynamicPO over that of the loss alone, by seed: mean and range over the seeds."""
    rows = scaled(select(tables["diagnostics"], setting=setting))
    rows["part"] = (rows["method"] == rows["loss"]).map({True: "alone", False: "dynamic"})
    seconds = rows.groupby(["loss", "negatives", "seed", "part"], sort=False)["train_seconds"].first().unstack("part")
    ratios = (seconds["dynamic"] / seconds["alone"]).dropna().rename("value").reset_index()
    ratios["method"] = "dynamic_" + ratios["loss"]
    return _ranges(ratios, ["loss", "method", "negatives"])


# --- sentences, in Markdown ---


def answers(tables: Tables, setting: str, split: str, pairs: Pairs) -> str:
    """``takeaways.answers`` about HR@1."""
    return takeaways.answers(tables, setting, split, METRIC, pairs)


def collapse_takeaway(tables: Tables, setting: str, split: str) -> str:
    """Is HR@1 lower with many negatives than with one, where is it highest, and what does DynamicPO change?"""
    alone = select(accuracy(tables, setting), split=split, method=list(LOSSES))
    best = alone.loc[alone.groupby("loss", sort=False)["mean"].idxmax()]
    peaks = ", ".join(f"{NAMES[row.loss]} {row.mean:.2f} % at {row.negatives}" for row in best.itertuples(index=False))
    return (
        f"**Takeaway.** *{setting}, {SPLITS[split]}.* HR@1 with {MANY} negatives against {FEW}, "
        f"{answers(tables, setting, split, COLLAPSE)}. DynamicPO against the loss alone, with {MANY}, "
        f"{answers(tables, setting, split, MENDED)}. Highest means of the losses alone: {peaks} (untested: the best of "
        "several is high by chance too)."
    )


def beside_paper(tables: Tables, setting: str) -> Frame:
    """Points of HR@1 that DynamicPO adds at MANY negatives: as printed for three datasets, and here with intervals."""
    printed = 100 * published("dynamicpo").pivot(index=["loss", "dataset"], columns="variant", values="hit_ratio")
    table = (printed["dynamic"] - printed["vanilla"]).unstack("dataset").loc[list(LOSSES)].map("{:+.2f}".format)
    table = table.rename(index=NAMES).add_prefix("printed, ")
    for split in TEST_SPLITS:
        found = [change(tables, setting, split, METRIC, *pair) for pair in MENDED.values()]
        table[f"here, {SPLITS[split]}"] = [each.size if each else "not compared" for each in found]
    return table.rename_axis(index="points of HR@1", columns=None)


def share_takeaway(tables: Tables, setting: str) -> str:
    """How much of the negatives the boundary is, and how much of the gradient it gets, at MANY negatives."""
    said = []
    for loss, row in share_ends(tables, setting).xs(MANY, level="negatives").iterrows():
        ends = (" and ".join(f"{row[name, end]:.1f} %" for name in SHARES.values()) for end in ("first", "last"))
        said.append(f"{loss} {' at the first logged step, '.join(ends)} at the last")
    about = f"The boundary's share of {MANY} negatives and of their gradient: "
    return f"**Takeaway.** *{setting}.* {about}{'; '.join(said)}."


def loss_takeaway(tables: Tables, setting: str) -> str:
    """Which losses does training lower with MANY negatives, and which part of DynamicPO keeps its loss up?"""
    rows = loss_left(tables, setting).set_index("method")
    parts = [method for _, method in PARTS.values()]
    main, controls = rows.drop(parts), rows.loc[parts]
    ends = ", ".join(f"{row['name']} {row['mean']:.1f} %" for _, row in main.iterrows())
    risen = main[main["mean"] >= 100]
    quarters = ", ".join(
        f"{row['name']} {row['quarter']:.1f} % (seeds {row['quarter_low']:.1f} to {row['quarter_high']:.1f})"
        for _, row in risen.iterrows()
    )
    up = (
        f"Not below 100 %: {', '.join(risen['name'])}. Single steps differ in their prompts; the last quarter of the "
        f"logged steps against the first: {quarters}"
        if len(risen)
        else "All are below 100 %"
    )
    said = ", ".join(f"{row['name']} {row['mean']:.1f} %" for _, row in controls.iterrows())
    return (
        f"**Takeaway.** *{setting}.* What training leaves of the loss, {MANY} negatives: {ends}. {up}. DynamicPO's "
        f"controls on DMPO: {said}. {_boundary_keeps(rows)}"
    )


def _boundary_keeps(rows: Frame) -> str:
    """Whether the choice of the boundary, and no other part of DynamicPO, keeps its loss on DMPO from falling."""
    plain, one_beta = (rows.loc[method] for method in (DYNAMIC, PARTS["dynamic betas rather than one"][1]))
    others = rows.loc[[method for name, (_, method) in PARTS.items() if "boundary" in name]]
    if min(plain["low"], one_beta["low"]) > others["high"].max():
        return (
            "With every seed more is left over the boundary, with one beta too, than over all negatives or as many at "
            "random: what keeps the loss up is the choice of the boundary, neither the betas nor the number of "
            "negatives."
        )
    return "They do not single out one part of DynamicPO as what keeps the loss up."


def fit_takeaway(tables: Tables, setting: str, split: str) -> str:
    """Does HR@1 end below where training started, or below that of one negative, although the loss falls?"""
    rows = loss_left(tables, setting).set_index("name")
    own = {f"{name} with DynamicPO": tuple(f"dynamic_{m}" for m in pair) for name, pair in COLLAPSE.items()}
    both = []
    for name, pair in {**TRAINED, **WITH}.items():
        found = [change(tables, setting, split, METRIC, *each) for each in (pair, {**COLLAPSE, **own}[name])]
        if rows.loc[name, "high"] < 100 and any(each and each.word == "lowered" for each in found):
            both.append(name)
    return (
        f"**Takeaway.** *{setting}, {SPLITS[split]}.* {MANY} negatives. HR@1 against SFT, where training starts, "
        f"{answers(tables, setting, split, {**TRAINED, **WITH})}. Both a loss that falls with every seed and an HR@1 "
        f"lower than with SFT or {FEW} negative: {', '.join(both) or 'none'}."
    )


def constants_takeaway(tables: Tables, setting: str, split: str) -> str:
    """How far HR@1 moves over the values of alpha and gamma, and whether their intervals have a point in common."""
    rows = select(controls(tables, setting), split=split)
    rows = rows[rows["method"].eq(DYNAMIC) | rows["method"].str.contains("alpha|gamma")]
    ends = (
        f"{row['mean']:.2f} %, {row['name']}"
        for _, row in rows.sort_values("mean", kind="stable").iloc[[0, -1]].iterrows()
    )
    common = "all intervals have a value in common" if rows["low"].max() <= rows["high"].min() else "some are apart"
    return f"Over alpha and gamma HR@1 goes from {', to '.join(ends)}; {common}."


def overhead_takeaway(tables: Tables, setting: str) -> str:
    """How much longer training takes with DynamicPO, over all losses and numbers of negatives."""
    rows = overhead(tables, setting)
    devices = select(tables["costs"], setting=setting, stage="align")["device"].unique()
    ends = (f"{rows[least].min():.3f} to {rows[most].max():.3f}" for least, most in (("mean", "mean"), ("low", "high")))
    times = " times as long (means over seeds; single seeds ".join(ends)
    where = "".join(f"; on {device}" for device in devices)
    return f"**Takeaway.** *{setting}.* With DynamicPO training takes {times}{where})."


def tally(tables: Tables, pairs: Pairs) -> str:
    """``takeaways.tally`` of HR@1."""
    return takeaways.tally(tables, METRIC, pairs)


def undone(tables: Tables) -> str:
    """HR@1 against SFT with MANY negatives, the losses alone and with DynamicPO: does DynamicPO undo what they do?"""
    said: dict[str, list[str]] = {}
    nearer: list[float] = []  # what a loss alone adds, where DynamicPO takes HR@1 back towards SFT's
    words = []
    for setting, split in product(settings(tables), TEST_SPLITS):
        for (name, alone), pair in zip(TRAINED.items(), WITH.values(), strict=True):
            found = [change(tables, setting, split, METRIC, *each) for each in (alone, pair)]
            if None in found:
                continue
            before, after = (100 * each.difference for each in found)
            words += [each.word for each in found]
            nearer += [before] * (abs(after) < abs(before))
            said.setdefault(SPLITS[split], []).append(f"{name} {before:+.2f} and {after:+.2f}")
    if not said:
        return "not compared"
    total, gains = len(words) // 2, sum(value > 0 for value in nearer)
    sizes = "; ".join(f"{split}, {', '.join(each)}" for split, each in said.items())
    mostly = f": it mostly undoes what the loss does, {gains} gains of HR@1 and {len(nearer) - gains} losses"
    detected = sum(word != takeaways.NOTHING for word in words)
    return (
        f"{sizes} points. DynamicPO takes HR@1 nearer to SFT's in {len(nearer)} of {total}"
        f"{mostly * (2 * len(nearer) > total)} (detectable changes among these differences: {detected} of {len(words)})"
    )


def verdict(tables: Tables) -> str:
    """What the study says about the collapse, about DynamicPO, and about its parts."""
    fall, mended, parts = (tally(tables, pairs) for pairs in (COLLAPSE, MENDED, PARTS))
    nothing = " No fall is detected that DynamicPO could mend." if "lowered in 0" in fall else ""
    own = tally(tables, {name: tuple(f"dynamic_{method}" for method in pair) for name, pair in COLLAPSE.items()})
    return "\n".join(
        [
            "**Takeaway.** HR@1 over all losses and test splits:",
            "",
            f"- Collapse, {MANY} negatives against {FEW}: {fall}.{nothing}",
            f"- The same with DynamicPO: {own}.",
            f"- DynamicPO against the loss alone, {MANY} negatives: {mended}.",
            f"- Against SFT, the loss alone and with DynamicPO, {MANY} negatives: {undone(tables)}.",
            f"- Parts of DynamicPO on DMPO, each against its control: {parts}.",
        ]
    )
