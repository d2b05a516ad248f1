"""Sentences that must follow the numbers: every verdict, every claim, and tables with methods missing."""

import numpy as np
import pandas as pd
import pytest

from causaldpo_lib import takeaways
from causaldpo_lib.evaluation import ndcg_metric, share_metric

KEY = {"setting": "made-up", "split": "ood_test"}
UP, DOWN, NOTHING = (0.1, 0.05, 0.15, 0.006), (-0.1, -0.15, -0.05, 0.006), (0.01, -0.02, 0.04, 0.6)
PAIRS = [("dpo", "sft"), ("causal_dpo", "dpo"), ("shuffled", "dpo"), ("causal_dpo", "shuffled")]


def made_up(changes=None, default=NOTHING, pairs=PAIRS):
    """Tables in which every paired difference is ``default``, except those in ``changes``."""
    changes = changes or {}
    metrics = ["target_logp", "HR@10", "NDCG@10"]
    ends = [make("mass", group) for make in (share_metric, ndcg_metric) for group in ("G1", "G5")]
    paired = []
    for metric in [*metrics, *ends]:
        for method, baseline in pairs:
            numbers = changes.get((metric, method, baseline), default)
            found = dict(zip(("difference", "low", "high", "p_holm"), numbers, strict=True))
            paired.append({**KEY, "metric": metric, "method": method, "baseline": baseline, "p": 0.001, **found})
    methods = list(dict.fromkeys(method for pair in pairs for method in reversed(pair)))
    level = {"mean": 0.2, "low": 0.1, "high": 0.3}
    rows = [{**KEY, "method": m, "metric": k, **level, "seeds": 3, "examples": 50} for m in methods for k in metrics]
    floor = [{**KEY, "method": "popular", "metric": "HR@10", "mean": 0.05, "low": 0.04, "high": 0.06, "examples": 50}]
    share = {"grouping": "mass", "share": 0.2, "low": 0.1, "high": 0.3}
    shares = [{**KEY, **share, "method": m, "group": g} for m in [*methods, "training"] for g in ("G1", "G5")]
    fall = {"G1": (0.5, 0.4, 0.6, 20), "G5": (0.1, 0.05, 0.2, 30)}
    groups = [
        {**KEY, "grouping": "mass", "method": m, "group": g, "mean": a, "low": b, "high": c, "examples": n}
        for m in methods
        for g, (a, b, c, n) in fall.items()
    ]
    diagnostics = [
        {
            **KEY,
            "method": "causal_dpo",
            "seed": s,
            "environments": 4,
            "noise_share": 0.1 * s,
            "ami_true_environment": 0.5,
        }
        for s in (1, 2)
    ]
    columns = {
        "metrics": rows + floor,
        "paired": paired,
        "shares": shares,
        "groups": groups,
        "diagnostics": diagnostics,
    }
    return {name: pd.DataFrame(content) for name, content in columns.items()}


@pytest.mark.parametrize(
    ("low", "high", "p", "word"),
    [
        (0.1, 0.2, None, "raised"),
        (-0.2, -0.1, 0.01, "lowered"),
        (-0.1, 0.1, 0.01, "no detectable change"),
        (0.1, 0.2, 0.06, "no detectable change"),
        (0.0, 0.2, 0.01, "no detectable change"),
        (np.nan, np.nan, None, "no detectable change"),
    ],
)
def test_verdict_needs_the_interval_and_the_corrected_p(low, high, p, word):
    assert takeaways.verdict(low, high, p) == word


def test_change_is_shown_in_points_or_nats():
    found = takeaways.change(made_up(default=UP), "made-up", "ood_test", "HR@10", "dpo", "sft")
    assert found.size == "+10.00 points [+5.00, +15.00], p = 0.006"
    assert found.sentence("HR@10") == "DPO raised HR@10 against SFT (+10.00 points [+5.00, +15.00], p = 0.006)"
    found = takeaways.change(made_up(default=DOWN), "made-up", "ood_test", "target_logp", "dpo", "sft")
    assert found.size == "-0.10 nats [-0.15, -0.05], p = 0.006"
    assert takeaways.change(made_up(), "elsewhere", "ood_test", "HR@10", "dpo", "sft") is None


@pytest.mark.parametrize(("numbers", "says"), [(UP, "raised"), (DOWN, "lowered"), (NOTHING, "no detectable change in")])
def test_shares_takeaway_follows_the_numbers(numbers, says):
    tables = made_up({(share_metric("mass", "G1"), "dpo", "sft"): numbers})
    text = takeaways.shares_takeaway(tables, "made-up", "ood_test")
    assert text.startswith("**Takeaway.** *made-up, OOD test, groups of equal training mass.* DPO ")
    first = text.split("against SFT")[0]
    assert f"{says} the share of G1" in first
    assert "Training data 20.0 [10.0, 30.0] %" in text


def test_a_turned_difference_keeps_its_p_and_a_missing_one_is_none():
    tables = made_up({("HR@10", "dpo", "sft"): (0.1, 0.05, 0.16, 0.006)})
    found = takeaways.change(tables, "made-up", "ood_test", "HR@10", "sft", "dpo")
    assert found[:7] == ("HR@10", "sft", "dpo", -0.1, -0.16, -0.05, 0.006) and found.word == "lowered"
    assert takeaways.change(tables, "made-up", "ood_test", "HR@10", "sft", "shuffled") is None


@pytest.mark.parametrize(
    ("numbers", "says"), [(UP, "is higher than with"), (DOWN, "is lower than with"), (NOTHING, "cannot be told apart")]
)
def test_the_control_decides_about_the_environments(numbers, says):
    tables = made_up({(share_metric("mass", "G1"), "causal_dpo", "shuffled"): numbers})
    assert says in takeaways.shares_takeaway(tables, "made-up", "ood_test").split("\n")[0]


def test_what_is_detected_below_the_margin_says_so():
    key = (share_metric("mass", "G1"), "causal_dpo", "shuffled")
    tables = made_up({key: UP})
    small = {**tables, "paired": tables["paired"].assign(p_equivalent_holm=0.01)}
    for found, below in ((tables, False), (small, True)):
        difference = takeaways.change(found, "made-up", "ood_test", *key)
        assert difference.word == "raised" and (takeaways.BELOW in difference.size) == difference.equivalent == below
        said = takeaways.control_sentence(difference, "the share of G1")
        assert ("too small to matter by that margin" in said) == below
    nothing = {**made_up(), "paired": made_up()["paired"].assign(p_equivalent_holm=0.01)}
    assert takeaways.BELOW not in takeaways.change(nothing, "made-up", "ood_test", *key).size


def test_takeaways_say_what_was_not_compared():
    tables = made_up(pairs=PAIRS[:1])
    for text in (
        takeaways.shares_takeaway(tables, "made-up", "ood_test"),
        takeaways.groups_takeaway(tables, "made-up", "ood_test"),
        takeaways.results_takeaway(tables, "made-up", "ood_test"),
    ):
        assert "CausalDPO was not compared with DPO." in text
        assert "Without the shuffled control nothing can be said" in text


@pytest.mark.parametrize(
    ("last", "says"),
    [
        ((0.1, 0.05, 0.2, 30), "is lower than on G1"),
        ((0.9, 0.8, 1.0, 30), "is higher than on G1"),
        ((0.5, 0.3, 0.7, 30), "does not differ clearly from that on G1"),
        ((np.nan, np.nan, np.nan, 0), "has no test examples"),
    ],
)
def test_groups_takeaway_compares_the_ends(last, says):
    tables = made_up()
    rows = tables["groups"]["group"] == "G5"
    tables["groups"].loc[rows, ["mean", "low", "high", "examples"]] = last
    assert says in takeaways.groups_takeaway(tables, "made-up", "ood_test")


def test_results_takeaway_opens_with_the_primary_endpoint_and_ends_with_the_floor():
    text = takeaways.results_takeaway(made_up(default=DOWN), "made-up", "ood_test")
    assert "lowered the target's log-probability against SFT" in text.split("\n")[0]
    names = f"SFT, DPO, CausalDPO, {takeaways.look('shuffled').label}"
    assert text.endswith(f"Clearly above the most-popular floor in HR@10 (5.00 [4.00, 6.00] %): {names}.")
    tables = made_up(default=DOWN)
    guess = {**KEY, "method": "random", "metric": "target_logp", "mean": 0.1, "low": 0.1, "high": 0.1, "examples": 50}
    tables["metrics"] = pd.concat([tables["metrics"], pd.DataFrame([guess])], ignore_index=True)
    rows = tables["metrics"]
    rows.loc[(rows["method"] == "sft") & (rows["metric"] == "target_logp"), "low"] = 0.15
    text = takeaways.results_takeaway(tables, "made-up", "ood_test")
    floor = "Clearly above the random floor in log-probability of the target (0.10 nats): SFT; not so: DPO, CausalDPO, "
    assert text.endswith(f"{names}. {floor}{takeaways.look('shuffled').label}.")


def test_a_difference_of_one_example_has_no_interval():
    found = takeaways.Change("NDCG@10", "dpo", "sft", 0.25, float("nan"), float("nan"), 1.0)
    assert found.size == "+25.00 points no interval, p = 1.000" and found.word == takeaways.NOTHING and not found.open


def test_no_method_above_the_floor_is_said_so():
    tables = made_up()
    tables["metrics"].loc[tables["metrics"]["method"] == "popular", ["mean", "low", "high"]] = 0.9
    assert takeaways.results_takeaway(tables, "made-up", "ood_test").endswith("(90.00 %): no method.")


def test_diagnostics_takeaway_lists_seeds_and_admits_gaps():
    text = takeaways.diagnostics_takeaway(made_up(), "made-up")
    assert "K = 4, 4" in text and "noise points 0.10, 0.20" in text and "true environment 0.50, 0.50" in text
    assert "membership entropy not recorded" in text
    assert "no pseudo-environments" in takeaways.diagnostics_takeaway(made_up(), "made-up", "dpo")


def test_diagnostics_takeaway_says_what_the_environments_stand_for():
    tables = made_up()
    tables["diagnostics"]["ami_history_genre"] = 0.7
    assert "agreement with the main genre of the history 0.70, 0.70" in takeaways.diagnostics_takeaway(
        tables, "made-up"
    )


def test_caption_names_examples_seeds_and_intervals():
    assert takeaways.caption(made_up(), "made-up") == (
        "*made-up: OOD test 50 examples; means over 3 training seeds; whiskers: 95 % intervals over seeds and users.*"
    )


@pytest.mark.parametrize(
    ("numbers", "positive", "negative"),
    [
        (UP, "reproduced", "contradicted"),
        (DOWN, "contradicted", "reproduced"),
        (NOTHING, "not detected", "not detected"),
    ],
)
def test_claims_are_judged_by_their_direction(numbers, positive, negative):
    found = takeaways.claim_table(made_up(default=numbers))
    sign = {claim.text: claim.sign for claim in takeaways.CLAIMS}
    for row in found.itertuples():
        assert row.result == (positive if sign[row.claim] > 0 else negative)
    assert set(found["split"]) == {"OOD test"}  # the made-up study has no other
    assert len(found) == len(takeaways.CLAIMS) - 2  # nor a causal metric, nor slopes


def test_unreproduced_lists_everything_that_is_not_reproduced():
    tables = made_up({(share_metric("mass", "G1"), "dpo", "sft"): UP})
    text = takeaways.unreproduced(tables)
    count = len(takeaways.CLAIMS) - 2
    assert text.startswith(f"**Takeaway.** 1 of {count} tests reproduce their statement.")
    assert text.count("\n- ") == count - 1 and "**not detected** on made-up, OOD test" in text


def test_claims_concern_metrics_that_the_tables_have():
    from causaldpo_lib.evaluation import BASELINES

    for claim in takeaways.CLAIMS:
        assert claim.sign in (1, -1) and claim.baseline in BASELINES


def test_paired_table_has_a_verdict_per_comparison():
    table = takeaways.paired_table(made_up(default=UP), "made-up", "ood_test", "HR@10")
    assert table["verdict"].tolist() == ["raised"] * 4
    assert table["difference (points)"].iloc[0] == "10.00 [5.00, 15.00]"


# Equivalence


def with_equivalence(tables, p_equivalent):
    paired = tables["paired"].assign(margin=0.02, p_equivalent=p_equivalent, p_equivalent_holm=p_equivalent)
    paired["p_mcnemar"] = np.where(paired["metric"] == "HR@10", 0.7, np.nan)
    return {**tables, "paired": paired}


def test_tables_without_equivalence_say_nothing_about_it():
    assert takeaways.equivalence(made_up(), "made-up", "ood_test", "HR@10", "dpo", "sft") is None
    assert takeaways.equivalence_sentence(made_up(), "made-up", "ood_test", "HR@10", "HR@10") == ""
    assert "margin" not in takeaways.results_takeaway(made_up(), "made-up", "ood_test")
    assert not {"outcome", "p (McNemar)"} & set(takeaways.paired_table(made_up(), "made-up", "ood_test", "HR@10"))


@pytest.mark.parametrize(
    ("numbers", "p", "word"),
    [(NOTHING, 0.01, "equivalent"), (NOTHING, 0.4, "undecided"), (UP, 0.4, "different"), (UP, 0.01, "equivalent")],
)
def test_outcomes_stand_beside_the_differences(numbers, p, word):
    tables = with_equivalence(made_up(default=numbers), p)
    table = takeaways.paired_table(tables, "made-up", "ood_test", "HR@10")
    assert table["outcome"].tolist() == [word] * 4 and table["margin (points)"].tolist() == ["±2.00"] * 4
    assert table["p (McNemar)"].tolist() == ["0.700"] * 4
    assert "p (McNemar)" not in takeaways.paired_table(tables, "made-up", "ood_test", "NDCG@10")
    said = word + " (a detected difference below the margin)" * (word == "equivalent" and numbers == UP)
    sentence = f"Against a margin of ±8.6 %, in HR@10: DPO and SFT {said}, CausalDPO and DPO {said}, CausalDPO and"
    assert sentence in takeaways.results_takeaway(tables, "made-up", "ood_test")


def test_a_claim_that_is_not_detected_can_be_refuted():
    found = takeaways.claim_table(with_equivalence(made_up(), 0.01))
    assert set(found["result"]) == {"equivalent"}
    found = takeaways.claim_table(with_equivalence(made_up(default=UP), 0.01))
    assert set(found["result"]) == {"equivalent"}  # as stats.outcome: detected, and below the margin
    found = takeaways.claim_table(with_equivalence(made_up(default=UP), 0.4))
    assert set(found["result"]) == {"reproduced", "contradicted"}
    text = takeaways.unreproduced(with_equivalence(made_up(), 0.01))
    assert text.startswith("**Takeaway.** 0 of") and "**equivalent** on made-up" in text


# Periods


def test_slopes_takeaway_counts_what_falls():
    tables = made_up()
    key = {**KEY, "grouping": "mass", "metric": "NDCG@10", "groups": 5}
    slopes = {"sft": (-0.05, -0.06, -0.04), "dpo": (-0.01, -0.03, 0.01), "causal_dpo": (0.02, 0.01, 0.03)}
    rows = [{**key, "method": m, "slope": a, "low": b, "high": c} for m, (a, b, c) in slopes.items()]
    said = takeaways.slopes_takeaway({**tables, "slopes": pd.DataFrame(rows)}, "made-up", "ood_test")
    assert "falls from G1 to G5 with 1 of 3 methods" in said
    assert "CausalDPO was not compared with Shuffled control." in said


def test_times_takeaway_follows_the_slopes():
    tables = made_up()
    slope = {**KEY, "grouping": "count", "metric": "NDCG@10", "groups": 5}
    values = {"sft": (0.01, 0.005, 0.015), "dpo": (-0.01, -0.015, -0.005), "causal_dpo": (0.0, -0.01, 0.01)}
    rows = [{**slope, "method": m, "slope": a, "low": b, "high": c} for m, (a, b, c) in values.items()]
    tables["slopes"] = pd.DataFrame(rows)
    text = takeaways.times_takeaway(tables, "made-up", "ood_test")
    assert "SFT rises (1.00 [0.50, 1.50] points a period)" in text
    assert "DPO falls (-1.00" in text and "CausalDPO no detectable change (0.00" in text
    assert "DPO was not compared with SFT." in text
    tables["slopes"] = tables["slopes"].iloc[:0]
    assert takeaways.times_takeaway(tables, "made-up", "ood_test") == ""
