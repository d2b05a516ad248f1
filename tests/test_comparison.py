"""The paper's tables beside fabricated studies: cells and counts worked by hand, missing rows and studies."""

import pandas as pd
import pytest

from causaldpo_lib import comparison
from causaldpo_lib.audit import OURS, printed_rows, published
from causaldpo_lib.comparison import PAPER, agreement, beside, directions, panels
from causaldpo_lib.errors import StudyError
from causaldpo_lib.evaluation import FLOORS
from causaldpo_lib.paths import PARAMS
from causaldpo_lib.plots import look
from causaldpo_lib.study import load_study
from causaldpo_lib.tables import read

UP, DOWN, NOTHING = (0.01, 0.004, 0.016, 0.006), (-0.01, -0.016, -0.004, 0.006), (0.01, -0.002, 0.022, 0.6)
POPULARITY, TEMPORAL = "ml-100k-popularity", "ml-100k-temporal"
SMALL = "causal_dpo-backbone-tiny-small"
LEVELS = {"causal_dpo": 0.04, "sasrec": 0.03, "dmpo": 0.02, "s_dpo": 0.01}


def study(setting=POPULARITY, levels=LEVELS, changes=None, split="ood_test", examples=2000):
    """Tables of one panel: NDCG@10 by method (HR@10 twice that, log p 100 times below 0), floors, the given changes.

    ``changes``: (method, baseline) -> difference, low, high, corrected p, in NDCG@10; ten times that in log p.
    """
    key = {"setting": setting, "split": split}
    metrics, paired = [], []
    for metric, scale in (("HR@10", 2), ("NDCG@10", 1), ("target_logp", -100)):
        for method, level in {**levels, "random": 0.001, "popular": 0.005}.items():
            numbers = {"mean": scale * level, "low": scale * level - 0.01, "high": scale * level + 0.01}
            row = {**key, "method": method, "metric": metric, **numbers}
            metrics.append({**row, "seeds": 0 if method in FLOORS else 3, "examples": examples})
    for metric, scale in (("NDCG@10", 1), ("target_logp", 10)):
        for (method, baseline), (mean, low, high, p) in (changes or {}).items():
            numbers = {"difference": scale * mean, "low": scale * low, "high": scale * high, "p": p / 2, "p_holm": p}
            paired.append({**key, "metric": metric, "method": method, "baseline": baseline, **numbers})
    columns = [*key, "metric", "method", "baseline", "difference", "low", "high", "p", "p_holm"]
    return {"metrics": pd.DataFrame(metrics), "paired": pd.DataFrame(paired, columns=columns)}


def lines(number, studies, setting=POPULARITY):
    """The cells beside a table, by method."""
    table = beside(number, studies)
    return table[table["setting"] == setting].set_index("method")


# What stands beside what


@pytest.mark.parametrize("number", PAPER)
def test_names_are_printed_and_methods_exist(number):
    rows = printed_rows(published("accuracy")).query("table == @number")
    table = PAPER[number]
    assert set(table.methods) <= set(rows["method"]) and {OURS, *sum(table.pairs, ())} <= set(table.methods)
    left_out = set(rows["method"]) - set(table.methods)
    assert left_out == ({"CausalDPO (Qwen2.5-7B)", "CausalDPO (Qwen3-8B)"} if number == 9 else set())
    assert set(rows["dataset"]) <= set(table.settings.values())
    for method in table.methods.values():
        assert (PARAMS / "methods" / f"{method}.yaml").exists()


@pytest.mark.parametrize("number", PAPER)
def test_every_printed_difference_has_a_direction(number):
    rows = printed_rows(published("accuracy")).query("table == @number")
    for _, part in rows.groupby("dataset"):
        value = part.set_index("method")["NDCG@10"]
        others = [name for name in PAPER[number].methods if name != OURS]
        assert all(value[OURS] != value[name] for name in others)
        assert all(value[a] != value[b] for a, b in PAPER[number].pairs)


@pytest.mark.parametrize(
    ("number", "setting", "dataset", "about"),
    [
        (1, "ml-100k-popularity", "Yelp2018", "(popularity)"),
        (1, "book-crossing-popularity", "Yelp2018", "(popularity)"),
        (1, "ml-1m-temporal", "ML-10M", "(temporal)"),
        (1, "book-crossing-exposure", "Book-Crossing", "(exposure)"),
        (3, "ml-100k-popularity", "ML-10M", "(iid)"),
        (3, "book-crossing-popularity", "Book-Crossing", "(iid)"),
        (4, "ml-100k-mixed", "Yelp2018", "(mixed)"),
        (5, "yelp-temporal", "ML-10M", "(temporal)"),
        (5, "ml-100k-popularity", "ML-10M", "(temporal, another shift)"),
        (5, "book-crossing-popularity", "Book-Crossing", "(exposure, another shift)"),
        (9, "ml-100k-temporal", "ML-10M", "(temporal)"),
        (1, "simulated-environment", None, ""),
        (3, "yelp-popularity", None, ""),
        (9, "book-crossing-exposure", None, ""),  # Table 9 has no Book-Crossing
    ],
)
def test_a_setting_stands_beside_the_dataset_of_its_shift(number, setting, dataset, about):
    name = "dpo" if number == 5 else "sasrec"
    studies = {"x": study(setting, {"causal_dpo": 0.04, name: 0.03}, split=PAPER[number].split)}
    found = panels(number, studies)
    assert [set(panel.rows["dataset"]) for panel in found] == ([{dataset}] if dataset else [])
    assert (f"*{setting} beside {dataset} {about}*" in agreement(number, studies)) == bool(dataset)


def test_the_iid_test_is_another_split():
    assert panels(3, {"x": study()}) == [] and len(panels(3, {"x": study(split="iid_test")})) == 1


# Cells


def test_cells_stand_as_printed_and_as_measured():
    found = lines(1, {"x": study(changes={("sasrec", "causal_dpo"): UP})})
    row = found.loc["SASRec"]
    assert row["paper's dataset"] == "Yelp2018"
    assert row[["paper HR@10 %", "paper NDCG@10 %"]].tolist() == ["1.01", "0.43"]
    assert row[["HR@10 %", "NDCG@10 %"]].tolist() == ["6.00 [5.00, 7.00]", "3.00 [2.00, 4.00]"]
    assert row["log p (nats)"] == "-3.00 [-3.01, -2.99]"


def test_rows_are_in_the_papers_order_and_floors_come_last():
    found = lines(1, {"x": study()})
    names = ["SASRec", "BIGRec", "RW", "D3", "DMPO", "S-DPO", "RosePO", "SPRec", OURS, "Random", "Most popular"]
    assert list(found.index) == names
    assert found.loc["Most popular", "NDCG@10 %"] == "0.50 [-0.50, 1.50]"
    assert found.loc["Most popular", "paper NDCG@10 %"] == ""


def test_a_row_that_no_study_has_is_empty_but_for_the_paper():
    row = lines(1, {"x": study()}).loc["BIGRec"]
    assert row["paper NDCG@10 %"] == "0.50" and not any(row.iloc[4:])
    assert "Not measured here: BIGRec, RW, D3, RosePO, SPRec." in agreement(1, {"x": study()})


@pytest.mark.parametrize("pair", [("sft", "causal_dpo"), ("causal_dpo", "sft")])
def test_differences_are_causal_dpo_minus_the_row_whichever_way_they_were_paired(pair):
    levels = {"causal_dpo": 0.04, "sft": 0.03}
    found = lines(8, {"x": study(levels=levels, changes={pair: (0.01, 0.002, 0.016, 0.006)})}).loc["w/o CausalDPO"]
    turned = pair[0] == "sft"
    assert found["CausalDPO − row, NDCG@10 (points)"] == ("-1.00 [-1.60, -0.20]" if turned else "1.00 [0.20, 1.60]")
    assert found["CausalDPO − row, log p (nats)"] == ("-0.10 [-0.16, -0.02]" if turned else "0.10 [0.02, 0.16]")


def test_other_backbones_are_shown_and_not_judged():
    studies = {"x": study(levels={"causal_dpo": 0.04, SMALL: 0.05}, changes={(SMALL, "causal_dpo"): UP})}
    found = lines(9, studies)
    assert list(found.index)[-3:] == [look(SMALL).label, "Random", "Most popular"]
    assert found.loc[look(SMALL).label, "CausalDPO − row, NDCG@10 (points)"] == "-1.00 [-1.60, -0.40]"
    assert found.loc["CausalDPO (Qwen3-8B)", "paper NDCG@10 %"] == "0.80"
    assert agreement(9, studies).endswith("between CausalDPO and another row has a counterpart here.")
    alone = {"x": study(levels={SMALL: 0.05})}  # a table without CausalDPO itself
    assert lines(9, alone).loc[look(SMALL).label, "NDCG@10 %"] == "5.00 [4.00, 6.00]"
    assert agreement(9, alone).startswith("**Table 9.** No printed difference")


# What agrees


@pytest.mark.parametrize(
    ("pair", "numbers", "result"),
    [
        (("causal_dpo", "sasrec"), UP, "agree"),  # the paper: CausalDPO above every row of Table 1
        (("causal_dpo", "sasrec"), DOWN, "opposite"),
        (("sasrec", "causal_dpo"), UP, "opposite"),
        (("sasrec", "causal_dpo"), DOWN, "agree"),
        (("sasrec", "causal_dpo"), NOTHING, "undecided"),
        (("causal_dpo", "sasrec"), (0.01, 0.004, 0.016, 0.06), "undecided"),  # Holm's p is above 0.05
        (("sasrec", "sft"), UP, "untested"),
    ],
)
def test_a_direction_is_judged_by_interval_and_corrected_p(pair, numbers, result):
    (panel,) = panels(1, {"x": study(changes={pair: numbers})})
    assert directions(panel).set_index("row")["result"].to_dict() == {
        "SASRec": result,
        "DMPO": "untested",
        "S-DPO": "untested",
    }


def test_counts_name_what_agrees_and_what_is_opposite():
    changes = {("causal_dpo", "sasrec"): UP, ("dmpo", "causal_dpo"): UP, ("s_dpo", "causal_dpo"): NOTHING}
    studies = {"a": study(changes=changes), "b": study(TEMPORAL, changes={("causal_dpo", "sasrec"): UP})}
    text = agreement(1, studies)
    first, _, popularity, temporal = text.split("\n")
    assert first == (
        "**Table 1.** Directions of 4 comparisons in NDCG@10, CausalDPO minus a row: 2 agree, 1 opposite, 1 undecided."
    )
    assert "OOD test of a (2,000 examples, 3 training seeds; one hit = 0.050 points of one seed's HR)" in popularity
    assert "agree SASRec; opposite DMPO; undecided 1." in popularity
    assert "agree SASRec; opposite none; undecided 0." in temporal
    assert "Without a paired difference here: DMPO, S-DPO." in temporal and "paired difference" not in popularity
    assert "half-width" not in temporal  # nothing is undecided


def test_undecided_differences_are_measured_against_the_intervals():
    changes = {("sasrec", "causal_dpo"): NOTHING, ("s_dpo", "causal_dpo"): (0.0, -0.006, 0.006, 1.0)}
    (panel,) = panels(1, {"x": study(changes=changes)})
    found = directions(panel).set_index("row")
    assert found.loc["SASRec", "paper"] == pytest.approx(100 * (0.77 - 0.43) / 0.77)
    assert found.loc["SASRec", "half_width"] == pytest.approx(100 * 0.012 / 0.04)
    # S-DPO: 30 % there and 15 % here; SASRec 44 % and 30 %
    said = "the median printed difference is 37 %, the median half-width of the intervals here 22 %; in 0 of 2"
    assert said in agreement(1, {"x": study(changes=changes)})
    wide = {**changes, ("sasrec", "causal_dpo"): (0.0, -0.05, 0.05, 1.0)}
    assert "in 1 of 2 the interval is too wide" in agreement(1, {"x": study(changes=wide)})


@pytest.mark.parametrize(
    ("levels", "says"),
    [
        # printed: CausalDPO 0.77, S-DPO 0.54, SASRec 0.43, DMPO 0.26
        ({"causal_dpo": 0.04, "s_dpo": 0.03, "sasrec": 0.02, "dmpo": 0.01}, "+1.00 (methods: 4)."),
        ({"causal_dpo": 0.01, "s_dpo": 0.02, "sasrec": 0.03, "dmpo": 0.04}, "-1.00 (methods: 4)."),
        ({"causal_dpo": 0.04, "s_dpo": 0.02, "sasrec": 0.03, "dmpo": 0.01}, "+0.67 (methods: 4)."),  # (5 - 1) / 6
        ({"causal_dpo": 0.04, "s_dpo": 0.02, "sasrec": 0.03}, "+0.33 (methods: 3, which says little of so few)."),
        ({"causal_dpo": 0.04, "s_dpo": 0.04}, "undefined (methods: 2, which says little of so few)."),
    ],
)
def test_the_order_is_compared_by_tau(levels, says):
    assert f"Kendall's tau of the printed and this study's order: {says}" in agreement(1, {"x": study(levels=levels)})


def test_the_penalty_is_compared_with_the_same_loss_without_it():
    levels = {"causal_dpo": 0.04, "simpo": 0.03, "simpo_causal": 0.02, "cpo": 0.01, "cpo_causal": 0.02}
    # Printed on ML-10M: SimPO 0.21 to 0.27; on Book-Crossing 0.18 to 0.03.
    for setting, word in ((TEMPORAL, "agree"), ("book-crossing-exposure", "opposite")):
        (panel,) = panels(5, {"x": study(setting, levels, {("simpo_causal", "simpo"): UP})})
        found = directions(panel).set_index("row")["result"]
        assert found["SimPO + causal − SimPO"] == word and found["CPO + causal − CPO"] == "untested"
        assert "Dr.DPO + causal − Dr.DPO" not in found


def test_rows_that_violate_an_identity_are_named():
    assert "Printed with figures that cannot all be right: SASRec." in agreement(1, {"x": study()})
    assert "cannot all be right" not in agreement(1, {"x": study(levels={"causal_dpo": 0.04, "dmpo": 0.02})})


# Several studies, and none


def test_studies_of_one_setting_are_joined_by_method():
    studies = {
        "ablations": study(levels={"causal_dpo": 0.04, SMALL: 0.05}, changes={(SMALL, "causal_dpo"): UP}),
        "baselines": study(levels={"causal_dpo": 0.04, "sasrec": 0.03}, changes={("sasrec", "causal_dpo"): DOWN}),
    }
    found = lines(9, studies)
    assert found.loc["SASRec", "NDCG@10 %"] == "3.00 [2.00, 4.00]" and found.index.is_unique
    assert found.loc[["SASRec", look(SMALL).label], "CausalDPO − row, NDCG@10 (points)"].tolist() == [
        "1.00 [0.40, 1.60]",
        "-1.00 [-1.60, -0.40]",
    ]
    assert "OOD test of baselines, ablations (" in agreement(9, studies)


def test_the_study_with_most_methods_keeps_its_rows():
    pair = ("sasrec", "causal_dpo")
    small = study(levels={"causal_dpo": 0.04, "sasrec": 0.03}, changes={pair: (-0.01, -0.02, 0.0, 0.9)})
    large = study(changes={pair: DOWN})
    for studies in ({"small": small, "large": large}, {"large": large, "small": small}):
        assert "agree SASRec; opposite none; undecided 0." in agreement(1, studies)


def test_a_study_that_measured_otherwise_is_left_out_and_named():
    other, same = (study(levels={"causal_dpo": level, "bigrec": 0.03}) for level in (0.041, 0.04))
    studies = {"main": study(), "other": other, "elsewhere": study(TEMPORAL)}
    assert lines(1, studies).loc["BIGRec", "NDCG@10 %"] == ""
    text = agreement(1, studies)
    assert text.count("Left out, since shared methods have other numbers there: other.") == 1
    assert "OOD test of main (" in text
    assert lines(1, {"main": study(), "same": same}).loc["BIGRec", "NDCG@10 %"] == "3.00 [2.00, 4.00]"


@pytest.mark.parametrize(
    "studies", [{}, {"x": study("simulated-environment")}, {"x": study(levels={"causal_dpo": 0.04, "dpo": 0.03})}]
)
def test_a_table_without_rows_is_left_out_in_one_sentence(studies):
    assert beside(1, studies).empty
    assert agreement(1, studies) == (
        "**Table 1.** Left out: no given study has a row of it besides CausalDPO's in a setting `*-popularity` or "
        "`*-temporal` or `*-exposure`."
    )


def test_an_unknown_table_is_refused():
    with pytest.raises(StudyError, match="no Table 2 to compare with: choose from 1, 3, 4, 5, 8, 9"):
        beside(2, {"x": study()})


@pytest.mark.parametrize("number", PAPER)
def test_published_tables_can_be_read(number):
    studies = {"ml-100k": read("../figures/ml-100k")}
    assert agreement(number, studies).startswith(f"**Table {number}.** ")
    assert beside(number, studies).empty == (comparison.panels(number, studies) == [])


# Matched and as published


def as_published(levels, changes=None):
    return study(POPULARITY + comparison.OWN, levels, changes)


def test_kinds_share_their_comparisons_and_not_their_tests():
    levels = {"sft": 0.05, **LEVELS, "dpo": 0.035, "shuffled": 0.04}
    pair = ("s_dpo", "dpo")
    matched = study(levels=levels, changes={pair: UP, ("causal_dpo", "shuffled"): NOTHING})
    own = as_published({name: levels[name] for name in levels if name != "dmpo"}, {("dpo", "s_dpo"): UP})
    kinds = comparison.both_kinds(matched, own, POPULARITY)
    assert list(comparison.kind_pairs(kinds).values()) == [
        *(("dpo", "sft"), ("causal_dpo", "dpo"), ("sasrec", "dpo"), pair, ("shuffled", "dpo")),
        ("causal_dpo", "shuffled"),
    ]
    table = comparison.kinds_table(kinds).set_index(["comparison", "test"])
    row = table.loc["S-DPO against DPO", "OOD"]
    assert row["NDCG@10 (points), matched"] == "+1.00 [+0.40, +1.60], p = 0.006, **raised**"
    assert row["NDCG@10 (points), as published"] == "-1.00 [-1.60, -0.40], p = 0.006, **lowered**"
    assert row["log p (nats), matched"] == "+0.10 [+0.04, +0.16], p = 0.006, **raised**"
    assert (table.loc["S-DPO against DPO", "IID"] == "not compared").all()
    assert table.loc["CausalDPO against Shuffled control", "OOD"].tolist()[1::2] == ["not compared"] * 2
    text = comparison.kinds_takeaway(kinds)
    assert (
        "- log p, 1 comparisons over both tests: matched, raised in 1 and lowered in 0; as published, raised in 0 and "
        "lowered in 1; one way in one kind and the other way in the other: 1."
    ) in text
    assert text.count("of 6 methods on the OOD test: +1.00.") == 2
    steps = "CausalDPO against DPO: not compared; its shuffled control against DPO: not compared"
    assert f"- As published: {steps}. Without the shuffled control nothing can be said" in text


@pytest.mark.parametrize(("order", "tau"), [((0.03, 0.02, 0.01), "+1.00"), ((0.01, 0.02, 0.03), "-1.00")])
def test_the_order_of_the_kinds_is_compared(order, tau):
    names = ("dpo", "causal_dpo", "shuffled")
    control = {("causal_dpo", "shuffled"): UP}
    matched = study(levels=dict(zip(names, (0.03, 0.02, 0.01), strict=True)), changes=control)
    own = as_published(dict(zip(names, order, strict=True)), control)
    text = comparison.kinds_takeaway(comparison.both_kinds(matched, own, POPULARITY))
    assert text.count(f"Kendall's tau between the two orders of 3 methods on the OOD test: {tau}.") == 2
    assert "raised in 1 and lowered in 0; as published, raised in 1 and lowered in 0" in text
    assert "not compared. With the inferred environments log p on the OOD test is higher" in text


def test_without_a_counterpart_nothing_stands_beside():
    kinds = comparison.both_kinds(study(), study(), POPULARITY)
    assert not comparison.kind_pairs(kinds) and comparison.kinds_table(kinds).empty
    assert comparison.kinds_takeaway(kinds).startswith(f"*{POPULARITY}: no study")


def test_the_published_study_is_the_counterpart_of_a_matched_one():
    own, matched = load_study("published"), load_study("baselines")
    assert {setting.name for setting in own.settings} == {f"{s.name}{comparison.OWN}" for s in matched.settings}
    assert len({method.name for method in own.methods} & {method.name for method in matched.methods}) >= 9
