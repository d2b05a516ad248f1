"""The notebook on DynamicPO: frames hold what the tables say, sentences follow the numbers, and every cell runs."""

import inspect
import re

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from causaldpo_lib import collapse, plots
from causaldpo_lib.errors import StudyError
from causaldpo_lib.evaluation import MARGIN, compared
from causaldpo_lib.losses import dynamic_dmpo_loss
from causaldpo_lib.study import load_study

SETTING, SPLITS, SEEDS = "ml-100k-popularity", ("iid_test", "ood_test"), (1, 2, 3)
STUDY = load_study("dynamicpo")
METHODS = [method.name for method in STUDY.methods]
PAIRS = [*compared(METHODS), *STUDY.comparisons]
UP, DOWN, NOTHING = (0.02, 0.01, 0.03, 0.006), (-0.02, -0.03, -0.01, 0.006), (0.001, -0.01, 0.012, 1.0)
CURVES = {"dmpo": (0.21, 0.22, 0.20, 0.15), "s_dpo": (0.20, 0.21, 0.215, 0.22), "mppo": (0.20, 0.205, 0.21, 0.19)}
COUNTS = (1, 3, 5, 15)
PRINTED = ["printed, LastFM", "printed, Goodreads", "printed, Steam"]


def negatives(method):
    """The negatives of a method of the study: those of its own sweep, 3 of the plain ones, 15 of the controls."""
    base, _, count = method.partition("-negatives_per_prompt-")
    return int(count) if count else 3 if base == method and "-" not in method else 15


def hit_rate(method, split):
    if method == "sft":
        return 0.19 - 0.04 * (split == "ood_test")
    base = method.split("-")[0]
    place = COUNTS.index(negatives(method))
    gain = 0.01 * place * base.startswith("dynamic_") - 0.01 * ("random" in method)
    return CURVES[base.removeprefix("dynamic_")][place] + gain - 0.04 * (split == "ood_test")


def made_up(changes=None, default=NOTHING, refuted=1.0):
    """Tables of the study dynamicpo in which every paired difference is ``default``, except those in ``changes``."""
    rng = np.random.default_rng(0)
    names = ("HR@1", "HR@10", "target_logp")
    metrics, paired, training, diagnostics = [], [], [], []
    for split in SPLITS:
        key = {"setting": SETTING, "split": split}
        for metric in names:
            levels = {method: (hit_rate(method, split), 0.02, 3) for method in METHODS}
            for method, (mean, reach, seeds) in {**levels, "random": (0.05, 0, 0), "popular": (0.11, 0.01, 0)}.items():
                level = {"mean": mean, "low": mean - reach, "high": mean + reach, "seeds": seeds, "examples": 2000}
                metrics.append({**key, "method": method, "metric": metric, **level})
            for pair in PAIRS:
                difference, low, high, p_holm = (changes or {}).get(pair, default)
                row = {"method": pair[0], "baseline": pair[1], "difference": difference, "low": low, "high": high}
                row |= {"p": p_holm / 10, "p_holm": p_holm, "margin": MARGIN * 0.2, "p_equivalent": refuted}
                paired.append({**key, "metric": metric, **row, "p_equivalent_holm": refuted, "p_mcnemar": 0.5})
    for method in METHODS[1:]:
        count = negatives(method)
        for seed in SEEDS:
            key = {"setting": SETTING, "method": method, "seed": seed}
            slow = 1.02 if method.startswith("dynamic_") else 1.0
            seconds = (20 + 4 * count) * slow * (1 + 0.01 * rng.random())
            diagnostics.append({**key, "seconds": seconds + 5, "train_seconds": seconds, "pairs": 2048})
            for step in range(3, 64, 3):
                fall = 0.4 * step / 63 + 0.02 * rng.random()
                row = {"iteration": 0, "step": step, "preference_loss": np.log(1 + count) * (1 - fall), "margin": fall}
                row |= {"accuracy": 0.5 + fall, "chosen_logp": -9.0}
                if count > 1:
                    boundary = 0.3 - 0.2 * step / 63 + 0.02 * rng.random()
                    row |= {"win_rate": 0.3 + fall, "margin_min": -0.1, "boundary_share": boundary}
                    row["gradient_share"] = boundary * (1 if "dmpo" in method else 1.8)
                training.append({**key, **row})
    diagnostics += [{"setting": SETTING, "method": "sft", "seed": s, "train_seconds": 99.0} for s in SEEDS]
    costs = [{"setting": SETTING, "stage": "align", "method": m, "runs": 3, "seconds": 60.0} for m in METHODS[1:]]
    rest = {"setting": SETTING, "split": "ood_test", "grouping": "mass", "group": "G1", "method": "sft"}
    frames = {"metrics": metrics, "paired": paired, "training": training, "diagnostics": diagnostics, "costs": costs}
    found = {name: pd.DataFrame(rows) for name, rows in frames.items()}
    found["costs"]["device"] = "cpu"
    return found | {name: pd.DataFrame([rest]) for name in ("shares", "groups")}


@pytest.fixture(scope="module")
def tables():
    return made_up()


def pair(pairs, loss):
    return pairs[plots.look(loss).label]


@pytest.mark.parametrize("loss", collapse.LOSSES)
def test_a_loss_has_one_colour_alone_and_with_dynamicpo(loss):
    alone, dynamic = (plots.look(f"{prefix}{loss}{collapse.MARK}{collapse.MANY}") for prefix in ("", "dynamic_"))
    assert dynamic.colour == alone.colour and dynamic.marker != alone.marker
    assert sum(plots.look(other).colour == alone.colour for other in collapse.LOSSES) == 1
    rows = pd.DataFrame({"name": ["a", "b"], "method": [loss, f"dynamic_{loss}"], "split": "iid_test", "mean": 1.0})
    ax = plots.named_intervals(plots.panels()[1][0, 0], rows.assign(low=0.0, high=2.0), "HR@1 (%)")
    assert [container.lines[0].get_marker() for container in ax.containers] == ["o", "D"]
    plt.close("all")


# Frames


def test_the_study_has_everything_that_is_looked_at():
    asked = [
        *collapse.COLLAPSE.values(),
        *collapse.TRAINED.values(),
        *collapse.MENDED.values(),
        *collapse.WITH.values(),
    ]
    assert {*asked, *collapse.PARTS.values()} <= {*PAIRS}
    assert {*collapse.VARIANTS} <= {*METHODS}
    defaults = inspect.signature(dynamic_dmpo_loss).parameters
    named = f"DynamicPO (alpha {defaults['alpha'].default:g}, gamma {defaults['gamma'].default:g})"
    assert collapse.VARIANTS[collapse.DYNAMIC] == named


def test_curves_hold_every_loss_at_every_number_of_negatives_and_nothing_else(tables):
    rows = collapse.accuracy(tables, SETTING)
    assert len(rows) == 2 * len(SPLITS) * len(CURVES) * len(COUNTS)
    one = rows[(rows["split"] == "iid_test") & (rows["method"] == "dmpo")]
    assert one["negatives"].tolist() == list(COUNTS) and np.allclose(one["mean"], [21, 22, 20, 15])
    assert list(dict.fromkeys(rows["method"]))[:3] == ["dmpo", "dynamic_dmpo", "s_dpo"]
    assert np.allclose(rows["high"] - rows["low"], 4)
    levels = collapse.levels(tables, SETTING)
    assert {*levels["method"]} == {"sft", "popular", "random"} and {*levels["metric"]} == {"HR@1"}


def test_tables_of_another_study_are_refused(tables):
    with pytest.raises(StudyError, match="no dmpo or s_dpo or mppo: give those of the study dynamicpo"):
        collapse.scaled(tables["metrics"].query("method == 'sft'"))


def test_controls_keep_their_order_and_their_names(tables):
    rows = collapse.controls(tables, SETTING)
    assert list(dict.fromkeys(rows["name"])) == list(collapse.VARIANTS.values())
    assert len(rows) == len(SPLITS) * len(collapse.VARIANTS)


def test_shares_are_means_and_ranges_over_the_seeds(tables):
    rows = collapse.shares(tables, SETTING)
    assert {*rows["negatives"]} == {3, 5, 15} and {*rows["loss"]} == {*CURVES}  # one negative has no boundary to log
    log = tables["training"].query("method == 's_dpo-negatives_per_prompt-15' and step == 33")["gradient_share"] * 100
    row = rows.query("loss == 's_dpo' and negatives == 15 and quantity == 'gradient_share' and step == 33").iloc[0]
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((log.mean(), log.min(), log.max()))
    ends = collapse.share_ends(tables, SETTING)
    whole = rows.query("loss == 'mppo' and negatives == 5 and quantity == 'boundary_share'").sort_values("step")["mean"]
    found = ends.loc[("MPPO", 5), "of the negatives (%)"]
    assert (found["first"], found["last"]) == pytest.approx((whole.iloc[0], whole.iloc[-1]))
    gradient = ends.loc[("MPPO", 15), "of the gradient (%)"]
    text = collapse.share_takeaway(tables, SETTING)
    assert re.search(
        rf"MPPO [\d.]+ % and {gradient['first']:.1f} % at .*, [\d.]+ % and {gradient['last']:.1f} % at", text
    )


def test_autograd_and_the_closed_form_give_the_same_shares():
    found = collapse.measured_shares(prompts=40).set_index("loss")
    np.testing.assert_allclose(found["closed form"], found["autograd"], atol=1e-9)
    assert found["gap"].max() < 1e-9 and found["closed form"].between(1, 99).all()
    assert found.loc["DMPO", "closed form"] == pytest.approx(found.loc["DMPO", "boundary"])
    assert found.loc["S-DPO", "closed form"] > 1.05 * found.loc["S-DPO", "boundary"]
    assert not found.equals(collapse.measured_shares(seed=1, prompts=40).set_index("loss"))


def test_what_is_left_of_the_loss_and_who_wins(tables):
    rows = collapse.fits(tables, SETTING).set_index(["method", "negatives", "quantity"])
    logs = tables["training"].query("method == 'mppo-negatives_per_prompt-5'").groupby("seed")
    left = 100 * logs["preference_loss"].last() / logs["preference_loss"].first()
    found = rows.loc[("mppo", 5, "left")]
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((left.mean(), left.min(), left.max()))
    assert rows.loc[("mppo", 5, "win"), "mean"] == pytest.approx(100 * logs["win_rate"].last().mean())
    single = tables["training"].query("method == 'mppo-negatives_per_prompt-1'").groupby("seed")["accuracy"].last()
    assert rows.loc[("mppo", 1, "win"), "mean"] == pytest.approx(100 * single.mean())
    assert rows.loc[("mppo", 5, "hits"), "mean"] == pytest.approx(21)  # of the IID test
    assert len(rows) == 3 * 2 * len(CURVES) * len(COUNTS) and rows.notna().all(axis=None)


def test_overhead_is_a_ratio_within_each_seed(tables):
    rows = collapse.overhead(tables, SETTING)
    assert len(rows) == len(CURVES) * len(COUNTS) and rows["method"].str.startswith("dynamic_").all()
    times = tables["diagnostics"].set_index(["method", "seed"])["train_seconds"]
    ratios = times["dynamic_s_dpo"] / times["s_dpo"]
    found = rows.query("loss == 's_dpo' and negatives == 3").iloc[0]
    assert (found["mean"], found["low"], found["high"]) == pytest.approx((ratios.mean(), ratios.min(), ratios.max()))
    text = collapse.overhead_takeaway(tables, SETTING)
    assert re.search(
        r"takes 1.01. to 1.02. times as long \(means over seeds; single seeds 1.01. to 1.02.; on cpu\)\.$", text
    )


# Sentences


@pytest.mark.parametrize(
    ("numbers", "says"),
    [
        (UP, "DMPO: raised (+2.00 points"),
        (DOWN, "DMPO: lowered (-2.00"),
        (NOTHING, "DMPO: no detectable change (+0.10"),
    ],
)
def test_the_collapse_follows_the_numbers(numbers, says):
    text = collapse.collapse_takeaway(made_up({pair(collapse.COLLAPSE, "dmpo"): numbers}), SETTING, "ood_test")
    assert text.startswith(f"**Takeaway.** *{SETTING}, OOD test.* HR@1 with 15 negatives against 1, {says}")
    assert "S-DPO: no detectable change" in text
    assert "DMPO 18.00 % at 3, S-DPO 18.00 % at 15, MPPO 17.00 % at 5" in text
    text = collapse.collapse_takeaway(made_up({pair(collapse.MENDED, "dmpo"): numbers}), SETTING, "ood_test")
    assert f"DynamicPO against the loss alone, with 15, {says}" in text


def test_what_was_not_compared_is_said(tables):
    without = {**tables, "paired": tables["paired"].query("baseline == 'sft'")}
    assert "against 1, DMPO: not compared; S-DPO: not" in collapse.collapse_takeaway(without, SETTING, "iid_test")
    assert collapse.tally(without, collapse.PARTS) == "not compared"
    alone = {**tables, "paired": tables["paired"].query("baseline != 'sft'")}
    assert collapse.undone(alone) == "not compared"
    assert (collapse.beside_paper(without, SETTING)["here, OOD test"] == "not compared").all()


def test_refuted_changes_are_counted():
    tables = made_up(refuted=0.01)
    assert "p = 1.000; ±8.6 % refuted)" in collapse.answers(tables, SETTING, "iid_test", collapse.PARTS)
    assert collapse.tally(tables, collapse.PARTS).endswith("±8.6 % refuted in 6")
    assert "refuted)" not in collapse.answers(made_up(), SETTING, "iid_test", collapse.PARTS)


@pytest.mark.parametrize("which", [collapse.TRAINED, collapse.COLLAPSE])
def test_fitted_more_and_less_accurate_needs_both(which):
    tables = made_up({pair(which, "mppo"): DOWN})
    assert collapse.fit_takeaway(tables, SETTING, "ood_test").endswith("SFT or 1 negative: MPPO.")
    log = tables["training"]
    rising = (log["method"] == "mppo-negatives_per_prompt-15") & (log["seed"] == 2) & (log["step"] == 63)
    log.loc[rising, "preference_loss"] = 9.0  # one seed is enough
    assert collapse.fit_takeaway(tables, SETTING, "ood_test").endswith("SFT or 1 negative: none.")


def test_dynamicpo_is_among_what_is_fitted_more_and_less_accurate():
    dynamic, _ = collapse.WITH["S-DPO with DynamicPO"]
    for baseline in ("sft", f"dynamic_s_dpo{collapse.MARK}{collapse.FEW}"):
        said = collapse.fit_takeaway(made_up({(dynamic, baseline): DOWN}), SETTING, "iid_test")
        assert said.endswith("SFT or 1 negative: S-DPO with DynamicPO.")
    assert "DMPO with DynamicPO: no detectable change (+0.10 points" in said


def losses(tables, method, curve):
    """Tables whose loss over the logged steps is a line between two values, one pair for each seed."""
    log = tables["training"].copy()
    for seed, (first, last) in zip(SEEDS, curve, strict=True):
        rows = (log["method"] == method) & (log["seed"] == seed)
        log.loc[rows, "preference_loss"] = np.linspace(first, last, rows.sum())
    return {**tables, "training": log}


def test_what_is_left_of_a_loss_is_of_steps_and_of_quarters(tables):
    method = f"mppo{collapse.MARK}{collapse.MANY}"
    raised = losses(tables, method, [(1.0, 1.2), (2.0, 2.0), (1.0, 1.1)])
    row = collapse.loss_left(raised, SETTING).set_index("method").loc[method]
    assert (row["mean"], row["low"], row["high"]) == pytest.approx((110, 100, 120))
    steps = np.linspace(1, 1.2, 21)
    assert row["quarter_high"] == pytest.approx(100 * steps[-5:].mean() / steps[:5].mean())
    said = collapse.loss_takeaway(raised, SETTING)
    assert "MPPO 110.0 %" in said and "Not below 100 %: MPPO. Single steps" in said
    assert f"MPPO {row['quarter']:.1f} % (seeds 100.0 to {row['quarter_high']:.1f})" in said
    assert "All are below 100 %. DynamicPO's controls on DMPO: as many negatives at random" in collapse.loss_takeaway(
        tables, SETTING
    )


def test_the_boundary_is_named_only_where_all_its_losses_stay_up(tables):
    assert "do not single out" in collapse.loss_takeaway(tables, SETTING)
    kept = tables
    for method in (collapse.DYNAMIC, "dynamic_dmpo-alpha-0.0"):
        kept = losses(kept, method, [(1.0, 1.0)] * 3)
    assert "the choice of the boundary, neither" in collapse.loss_takeaway(kept, SETTING)
    fallen = losses(kept, "dynamic_dmpo-alpha-0.0", [(1.0, 1.0), (1.0, 0.5), (1.0, 1.0)])  # one seed is enough
    assert "do not single out" in collapse.loss_takeaway(fallen, SETTING)


def test_undoing_is_said_where_hit_rates_go_back_towards_sft():
    assert "takes HR@1 nearer to SFT's in 0 of 6 (detectable changes among these differences: 0 of 12)" in (
        collapse.undone(made_up())
    )
    said = collapse.undone(made_up({pair(collapse.TRAINED, "dmpo"): UP, pair(collapse.TRAINED, "s_dpo"): DOWN}))
    assert said.startswith(
        "IID test, DMPO +2.00 and +0.10, S-DPO -2.00 and +0.10, MPPO +0.10 and +0.10; OOD test, DMPO"
    )
    assert "in 4 of 6: it mostly undoes what the loss does, 2 gains of HR@1 and 2 losses" in said and "4 of 12)" in said
    assert f"with DynamicPO, 15 negatives: {said}." in collapse.verdict(
        made_up({pair(collapse.TRAINED, "dmpo"): UP, pair(collapse.TRAINED, "s_dpo"): DOWN})
    )


def test_the_verdict_counts_losses_and_splits():
    text = collapse.verdict(made_up())
    assert (
        "against 1: lowered in 0 of 6, raised in 0 of 6, no detectable change in 6 of 6; ±8.6 % refuted in 0." in text
    )
    assert "No fall is detected that DynamicPO could mend." in text
    changes = {pair(collapse.COLLAPSE, "dmpo"): DOWN, pair(collapse.MENDED, "dmpo"): UP}
    control = "the boundary rather than as many at random"
    own = tuple(f"dynamic_{method}" for method in collapse.COLLAPSE["S-DPO"])
    text = collapse.verdict(made_up({**changes, collapse.PARTS[control]: UP, own: DOWN}))
    assert "The same with DynamicPO: lowered in 2 of 6 (S-DPO on the IID test, S-DPO on the OOD test)" in text
    assert "against 1: lowered in 2 of 6 (DMPO on the IID test, DMPO on the OOD test), raised in 0 of 6, no" in text
    assert "alone, 15 negatives: lowered in 0 of 6, raised in 2 of 6 (DMPO on the IID test," in text
    assert "No fall is detected" not in text and f"raised in 2 of 6 ({control} on the IID test, " in text


def test_printed_gains_are_differences_of_the_printed_rates(tables):
    found = collapse.beside_paper(tables, SETTING)
    assert found.loc["DMPO", PRINTED].tolist() == ["+8.13", "+13.79", "+6.07"]
    assert found.loc["S-DPO", PRINTED].tolist() == ["+0.49", "+0.65", "+0.50"]
    assert found.loc["MPPO", "here, IID test"] == "+0.10 points [-1.00, +1.20], p = 1.000"


@pytest.mark.parametrize(("high", "says"), [(0.2, "all intervals have a value in common"), (0.155, "some are apart")])
def test_constants_are_compared_by_their_intervals(high, says):
    tables = made_up()
    chosen = tables["metrics"]["method"].eq("dynamic_dmpo-gamma-6.0") & tables["metrics"]["split"].eq("iid_test")
    tables["metrics"].loc[chosen, ["mean", "low", "high"]] = 0.15, 0.14, high
    text = collapse.constants_takeaway(tables, SETTING, "iid_test")
    assert text == f"Over alpha and gamma HR@1 goes from 15.00 %, gamma 6, to 18.00 %, gamma 0; {says}."


# The notebook


def test_the_notebook_draws_and_explains_everything(tables, run_notebook, written):
    defaults, images, shown = run_notebook("13_dynamicpo", tables=written(tables))
    assert defaults["tables"] == "../figures/dynamicpo"
    kinds = ("accuracy", "shares", "fit", "controls", "time")
    assert images == {f"dynamicpo-{kind}-{SETTING}" for kind in kinds}
    texts = [thing.data for thing in shown if hasattr(thing, "data")]
    assert sum(text.startswith("**Takeaway.**") for text in texts) == 10
