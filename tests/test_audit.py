"""The audit against the numbers that were found by hand, an independent solver, and figures whose truth is known."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from test_takeaways import DOWN, NOTHING, UP, made_up

from causaldpo_lib import audit, metrics, plots
from causaldpo_lib.errors import StudyError


@pytest.fixture(scope="module")
def accuracy():
    return audit.published("accuracy")


@pytest.fixture(scope="module")
def rows(accuracy):
    return audit.printed_rows(accuracy)


def printed(**figures):
    """One printed row."""
    row = {"table": 1, "dataset": "made-up", "shift": "none", "method": "x", "HR@20": np.nan, "NDCG@20": np.nan}
    return pd.DataFrame([{**row, **{name.replace("_", "@"): value for name, value in figures.items()}}])


# The data


def test_the_tables_have_their_shapes(accuracy, rows):
    assert rows.groupby("table").size().to_dict() == {1: 27, 3: 18, 4: 9, 5: 16, 8: 12, 9: 14}
    assert accuracy["percent"].notna().all() and len(accuracy) == 360
    assert rows.set_index("table").loc[8, "HR@20"].isna().all()
    assert rows.loc[rows["table"] != 8, list(audit.METRICS)].notna().all(axis=None)
    assert rows["table"].is_monotonic_increasing


@pytest.mark.parametrize(
    ("table", "dataset", "method", "figures"),
    [
        (1, "Yelp2018", "CausalDPO", [1.53, 0.77, 1.79, 0.82]),
        (3, "Book-Crossing", "SASRec", [1.70, 0.90, 3.12, 1.02]),
        (4, "Yelp2018", "CausalDPO", [0.53, 0.24, 1.51, 0.47]),
        (5, "ML-10M", "Dr.DPO", [0.17, 0.20, 0.55, 0.18]),
        (9, "ML-10M", "CausalDPO (Qwen3-8B)", [0.63, 0.38, 1.09, 0.47]),
    ],
)
def test_figures_stand_as_printed(rows, table, dataset, method, figures):
    row = rows[(rows["table"] == table) & (rows["dataset"] == dataset) & (rows["method"] == method)]
    assert row[list(audit.METRICS)].to_numpy().tolist() == [figures]


def test_every_published_table_is_described(accuracy):
    readme = (audit.PUBLISHED / "README.md").read_text("utf8")
    for file in audit.PUBLISHED.glob("*.csv"):
        assert f"`{file.name}`" in readme and len(audit.published(file.stem))
    with pytest.raises(StudyError, match="choose from accuracy, claims, datasets, dynamicpo, seconds"):
        audit.published("table1")


# Identities


def test_32_of_96_rows_violate_an_identity(rows):
    broken = audit.violations(rows)
    assert (len(rows), len(broken)) == (96, 32)
    assert broken["table"].value_counts().to_dict() == {3: 10, 5: 9, 1: 7, 9: 5, 8: 1}
    assert (~broken["repeats"]).sum() == 29
    first = broken[broken["table"] == 1]
    assert set(zip(first["method"], first["dataset"], strict=True)) == {
        ("SASRec", "Yelp2018"),
        ("SASRec", "ML-10M"),
        ("SASRec", "Book-Crossing"),
        ("RW", "ML-10M"),
        ("RW", "Book-Crossing"),
        ("RosePO", "Book-Crossing"),
        ("SPRec", "ML-10M"),
    }
    worst = broken[(broken["method"] == "Dr.DPO") & (broken["dataset"] == "ML-10M")]["violates"].iloc[0]
    assert worst == "NDCG@10 within HR@10; NDCG@20 - NDCG@10 within HR@20 - HR@10"


def possible(row, tolerance=audit.TOLERANCE):
    """Whether some true HR and NDCG round to the printed ones and obey all identities: a linear programme."""
    log11, log12, log21 = np.log2([11, 12, 21])
    # Unknown: HR@10, NDCG@10, HR@20, NDCG@20; each line is <= 0.
    constraints = [
        [1 / log11, -1, 0, 0],
        [-1, 1, 0, 0],
        [-1 / log21, 1, 1 / log21, -1],
        [1 / log12, -1, -1 / log12, 1],
        [1, 0, -1, 0],
    ]
    box = [(value - tolerance, value + tolerance) if value == value else (0, 100) for value in row]
    return linprog(np.zeros(4), constraints, np.zeros(5), bounds=box).status == 0


def test_the_violating_rows_are_those_that_no_true_values_round_to(rows):
    impossible = ~rows[list(audit.METRICS)].apply(lambda row: possible(row.to_list()), axis=1)
    broken = audit.violations(rows)
    assert set(rows[impossible].set_index(audit.ROW).index) == set(broken.set_index(audit.ROW).index)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 60), min_size=5, max_size=300))
def test_rows_of_true_ranks_never_violate(ranks):
    true = {f"HR_{k}": metrics.hit_rate_at_k(ranks, k) for k in (10, 20)}
    true |= {f"NDCG_{k}": metrics.ndcg_at_k(ranks, k) for k in (10, 20)}
    row = printed(**{name: round(100 * value, 2) for name, value in true.items()})
    assert audit.violations(row).empty and len(audit.identities(row)) == 3


@pytest.mark.parametrize(
    ("figures", "holds"),
    [
        ({"HR_10": 1.0, "NDCG_10": 1.01}, True),  # rounding of both
        ({"HR_10": 1.0, "NDCG_10": 1.02}, False),
        ({"HR_10": 0.5, "NDCG_10": 0.14}, True),  # 0.495 / 3.4594 = 0.1431, less 0.005
        ({"HR_10": 0.5, "NDCG_10": 0.13}, False),
        ({"HR_10": 0.5, "NDCG_10": 0.2, "HR_20": 0.5, "NDCG_20": 0.2}, True),
        ({"HR_10": 0.5, "NDCG_10": 0.2, "HR_20": 0.5, "NDCG_20": 0.22}, False),
        ({"HR_10": 0.5, "NDCG_10": 0.2, "HR_20": 1.0, "NDCG_20": 0.33}, True),
        ({"HR_10": 0.5, "NDCG_10": 0.2, "HR_20": 1.0, "NDCG_20": 0.30}, False),
    ],
)
def test_identities_of_hand_worked_rows(figures, holds):
    assert audit.identities(printed(**figures))["holds"].all() == holds


def test_identities_takeaway_counts_what_it_shows(rows):
    text = audit.identities_takeaway(rows)
    assert text.startswith("**Takeaway.** 32 of 96 printed rows violate at least one identity beyond rounding")
    assert "Table 1 7 of 27" in text and "29 of 84" in text and "Table 3 CausalDPO, ML-10M" in text
    assert "among them: none" in audit.identities_takeaway(rows[rows["table"] == 4])


# Gains


def test_gains_are_those_found_by_hand(accuracy):
    found = audit.gains(accuracy)
    means = found.groupby("dataset")["gain"].mean().round(2).to_dict()
    assert means == {"Yelp2018": 22.29, "ML-10M": 15.81, "Book-Crossing": 13.41}
    assert found["gain"].mean() == pytest.approx(17.17, abs=0.005)
    row = found[(found["dataset"] == "ML-10M") & (found["metric"] == "HR@10")].iloc[0]
    assert row["gain"] == pytest.approx(100 * (0.61 / 0.55 - 1)) and row["best"] in ("S-DPO", "SPRec")
    assert (row["low"], row["high"]) == pytest.approx((100 * (0.605 / 0.555 - 1), 100 * (0.615 / 0.545 - 1)))


def test_two_of_nine_stated_gains_do_not_follow(accuracy):
    found = audit.recomputed_claims(accuracy, audit.published("seconds"), audit.published("claims"))
    assert found.loc[~found["agrees"], "claimed"].tolist() == [24.06, 24.10]
    assert found["recomputed"].round(2).tolist() == [22.29, 15.81, 8.47, 23.33, 17.17, 17.17, 205.94, 28.57, 19.70]
    text = audit.claims_takeaway(found)
    assert (
        text.startswith("**Takeaway.** 7 of 9 stated gains") and "stated as 24.06 % (Section 3.7), is 15.81 %" in text
    )
    assert audit.claims_takeaway(found[found["agrees"]]).endswith("7 of 7 stated gains follow from the printed tables.")


def test_an_unknown_kind_of_claim_is_named(accuracy):
    claims = audit.published("claims").assign(kind="guess")
    with pytest.raises(StudyError, match="unknown kind 'guess'"):
        audit.recomputed_claims(accuracy, audit.published("seconds"), claims)


# Granularity


def test_attainable_rates_are_whole_hits():
    assert audit.attainable([1.53, 1.02, 1.01], [391, 200]).tolist() == [[True, False], [True, False], [False, False]]
    assert audit.attainable(np.round(100 * np.arange(40) / 391, 2), [391]).all()


def test_the_granularity_of_yelp_is_that_found_by_hand(accuracy):
    found = audit.granularity(audit.hit_rates(accuracy)["Yelp2018"], draws=500)
    row = found.scan[found.scan["examples"] == 391].iloc[0]
    assert (row["fits"], found.figures, found.best) == (8, 18, 391)
    assert row["chance"] == pytest.approx(0.7, abs=0.01)
    assert found.p < 0.02 and found.smallest is None


def test_a_known_number_of_examples_is_found():
    rates = np.round(100 * np.random.default_rng(0).integers(2, 30, 18) / 613, 2)
    found = audit.granularity(rates, draws=200)
    assert found.p <= 0.01 and audit.attainable(rates, [found.best]).all()
    assert found.smallest <= 613


def test_figures_without_a_grid_are_rarely_called_one():
    rng = np.random.default_rng(1)
    p = [audit.granularity(np.round(rng.uniform(0.3, 1.8, 18), 2), range(150, 700), 99, s).p for s in range(60)]
    assert np.mean(np.array(p) <= 0.1) <= 0.2


def test_granularity_takeaway_speaks_of_chance(accuracy):
    found = {name: audit.granularity(rates, draws=500) for name, rates in audit.hit_rates(accuracy).items()}
    text = audit.granularity_takeaway(found)
    assert "Yelp2018: the best-fitting N is 391, where 8 of 18" in text and "A grid stands out on Yelp2018." in text
    assert "fits some figures and not all" in text
    assert "None stands out" in audit.granularity_takeaway({"ML-10M": found["ML-10M"]})


def test_hits_behind_the_margins(accuracy):
    found = audit.hits_behind(accuracy, (391,)).set_index(["dataset", "metric"])
    assert found.loc[("Yelp2018", "HR@10"), "hits of 391"] == pytest.approx(2, abs=0.01)
    assert found.loc[("Yelp2018", "HR@10"), "best competitor"] == "SPRec" and len(found) == 6


def test_examples_needed_give_an_interval_that_touches_0():
    size = audit.examples_needed(1.53, 1.02)
    error = np.sqrt((0.0153 * 0.9847 + 0.0102 * 0.9898) / size)
    assert 0.0051 / error == pytest.approx(1.96, abs=0.001)


# Two names of one thing


def test_one_loss_under_three_names_differs(rows):
    found = audit.same_losses(rows).set_index(["dataset", "method"])
    assert found.loc[("Book-Crossing", "largest / smallest"), "HR@10"] == pytest.approx(0.49 / 0.19)
    assert found.loc[("Book-Crossing", "DPO"), "HR@10"] == 0.19 and ("Yelp2018", "DPO") not in found.index


def test_table_8_differs_from_table_1(accuracy):
    found = audit.disagreements(accuracy)
    assert len(found) == 7 and set(found["table"]) == {1} and set(found["table_other"]) == {8}
    key = found.set_index(["dataset", "method", "metric"])[["percent", "percent_other"]]
    assert key.loc[("ML-10M", "CausalDPO", "HR@10")].tolist() == [0.61, 0.58]
    assert key.loc[("Yelp2018", "BIGRec", "NDCG@10")].tolist() == [0.50, 0.69]


def test_the_order_of_the_ablation_is_read_off(rows):
    assert audit.ablation_order(rows)["w/o SFT is worse"].tolist() == [True, False, False, False, True, False]


# Paper and replication


def study(numbers):
    tables = made_up(default=numbers)
    replace = {"made-up": "ml-100k-temporal"}
    return {name: table.replace({"setting": replace}) for name, table in tables.items()}


@pytest.mark.parametrize(
    ("numbers", "directions"),
    [
        (UP, ["opposite", "opposite", "same", "same"]),  # the paper: DPO below BIGRec, CausalDPO above DPO
        (DOWN, ["same", "same", "opposite", "opposite"]),
        (NOTHING, ["undecided"] * 4),
    ],
)
def test_directions_are_compared_where_a_difference_is_detected(rows, numbers, directions):
    found = audit.side_by_side(rows, study(numbers))
    assert found["direction"].tolist() == directions  # HR@10 and NDCG@10 of two comparisons that the study has
    assert found["paper"].iloc[0] == pytest.approx(100 * (0.43 / 0.53 - 1))
    assert found["paper"].iloc[2] == pytest.approx(100 * (0.61 / 0.43 - 1))
    assert found["difference"].iloc[0] == pytest.approx(100 * numbers[0] / 0.2)
    text = audit.side_by_side_takeaway(found)
    assert f"{directions.count('same')} same, {directions.count('opposite')} opposite" in text


def test_dmpo_stands_for_dpo_where_dpo_is_not_printed(rows):
    assert audit.counterpart(rows, "Yelp2018", "popularity", "dpo")["method"] == "DMPO"
    assert audit.counterpart(rows, "ML-10M", "temporal", "dpo")["method"] == "DPO"
    assert audit.counterpart(rows, "LastFM", "temporal", "dpo") is None


def test_a_study_without_the_papers_shifts_is_said_so(rows):
    found = audit.side_by_side(rows, made_up())
    assert found.empty and "no setting with a shift" in audit.side_by_side_takeaway(found)
    assert audit.rank_orders(rows, made_up()).empty


def test_rank_orders_put_the_best_first(rows):
    tables = study(NOTHING)
    table = tables["metrics"]
    table.loc[table["method"] == "dpo", "mean"] = 0.9
    found = audit.rank_orders(rows, tables).set_index("metric")
    assert found.loc["HR@10", "paper"] == "CausalDPO 0.61 > BIGRec 0.53 > DPO 0.43"
    assert found.loc["HR@10", "here"].startswith("DPO 90.00 > ") and not found.loc["HR@10", "same order"]


# Figures


def test_the_band_holds_the_possible_rows_and_no_other(rows):
    found = audit.identities(rows)
    part = found[found["identity"] == "NDCG@10 within HR@10"]
    _, axes = plots.panels()
    ax = plots.identity_band(axes[0, 0], part, "allowed")
    drawn = {line.get_label(): line.get_ydata() for line in ax.lines}
    assert len(drawn["possible as printed"]) == part["holds"].sum()
    assert len(drawn["not possible as printed"]) == (~part["holds"]).sum() == 5
    plots.plt.close("all")


def test_the_scan_marks_its_best(accuracy):
    found = audit.granularity(audit.hit_rates(accuracy)["Yelp2018"], draws=10)
    _, axes = plots.panels()
    ax = plots.granularity_scan(axes[0, 0], found.scan, found.best)
    assert ax.lines[-1].get_xdata().tolist() == [391] and ax.lines[-1].get_ydata().tolist() == [8]
    plots.plt.close("all")


def test_paper_and_replication_stand_in_one_row(rows):
    found = audit.side_by_side(rows, study(UP))
    _, axes = plots.panels()
    ax = plots.paper_and_replication(axes[0, 0], found)
    stars = next(line for line in ax.lines if line.get_marker() == "*")
    assert stars.get_xdata().tolist() == found["paper"].tolist() and stars.get_ydata().tolist() == [0, 1, 2, 3]
    assert next(text.get_text() for text in ax.get_yticklabels()) == "DPO − SFT, HR@10"
    plots.plt.close("all")
