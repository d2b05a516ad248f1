"""What is said about a study of DPO4Rec, from tables made by hand."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from causaldpo_lib import plots, reasoning, reranking

ROWS = ("backbone", "kar", "knowledge", "dpo4rec_1", "dpo4rec_2", "shuffled", "initial")
KEY = {"setting": "ml-100k-popularity", "split": "ood_test", "metric": "ndcg@5"}


def levels(**means):
    return [
        {**KEY, "split": split, "metric": metric, "method": method, "row": row, "seeds": 3, "users": 1500}
        | {"mean": means.get(row, 0.3), "low": 0.2, "high": 0.5}
        for split in ("validation", "iid_test", "ood_test")
        for metric in ("ndcg@5", "map@5")
        for method in ("dlcm", "prm")
        for row in ROWS
    ]


def difference(row, baseline, mean, low, high, p, method="prm", **other):
    numbers = {"difference": mean, "low": low, "high": high, "p": p, "p_holm": p}
    return {**KEY, "method": method, "row": row, "baseline": baseline, **numbers, **other}


EXAMPLE = {
    "history": ["The Rusted Comet", "Silent Harbor"],
    "list": [{"title": "Zero", "positive": False}, {"title": "Paper Tigers", "positive": True}],
    "rounds": [
        {
            "texts": [
                {"number": -1, "text": "genre mostly drama", "reward": 0.6},
                {"number": 0, "text": "", "reward": 0.5},
                {"number": 1, "text": "genre mostly comedy", "reward": 0.8},
                {"number": 2, "text": "period mostly 1990s", "reward": 0.3},
            ],
            "pair": [1, 2],
        },
        {"texts": [{"number": -1, "text": "a", "reward": 0.4}, {"number": 0, "text": "b", "reward": 0.4}], "pair": []},
    ],
}


@pytest.fixture
def tables(tmp_path):
    """A study's tables, written and read again, as notebook 21 has them."""
    rounds = [
        {"setting": KEY["setting"], "method": method, "round": number, "metric": metric, "mean": mean, "low": low}
        | {"high": 2 * mean - low, "blank_reward": 0.30, "tied": 20.0, "pairs": 60.0}
        for method, gain in (("dlcm", 0.0), ("prm", 0.02))
        for number in (0, 1, 2)
        for metric, mean, low in (
            ("reward", 0.34 + number * gain, 0.3),
            ("reward_gain", number * gain, number * gain - 0.01),
            ("validation", 0.4, 0.3),
            ("validation_gain", 0.0, -0.01),
        )
    ]
    paired = [
        difference("initial", "backbone", -0.04, -0.06, -0.02, 0.001),
        difference("knowledge", "backbone", 0.03, 0.01, 0.05, 0.01),
        difference("dpo4rec_2", "backbone", 0.03, 0.01, 0.05, 0.20),
        difference("dpo4rec_2", "knowledge", -0.02, -0.03, -0.01, 0.01),
        difference("dpo4rec_1", "knowledge", 0.09, 0.08, 0.10, 0.0),  # not the last round
        difference("dpo4rec_2", "shuffled", 0.0, -0.02, 0.02, 1.0),
        difference("dpo4rec_2", "shuffled", 0.0, -0.04, 0.04, 1.0, split="iid_test"),
        difference("dpo4rec_2", "shuffled", 0.09, 0.08, 0.10, 0.0, split="validation"),  # no test
        difference("dpo4rec_2", "kar", 0.09, 0.08, 0.10, 0.0, metric="map@5"),  # another metric
    ]
    content = {
        "reranking": pd.DataFrame(levels(initial=0.25, knowledge=0.45)),
        "reranking_paired": pd.DataFrame(paired),
        "reranking_rounds": pd.DataFrame(rounds),
        "reranking_example": reranking.example_rows(EXAMPLE),
        "costs": pd.DataFrame({"stage": ["dpo4rec"]}),
    }
    for name, table in content.items():
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    return reranking.read(tmp_path)


def test_claims_are_signed_tests_of_the_last_round_on_test_lists(tables):
    found = reasoning.claims(tables)
    claim = found.set_index(["claim", "split"])["outcome"].to_dict()
    names = {pair: name for name, pair in reasoning.CLAIMS.items()}
    assert claim == {
        (names["backbone", "initial"], "ood_test"): "supported",  # the table has it the other way round
        (names["knowledge", "backbone"], "ood_test"): "supported",
        (names[reasoning.LAST, "backbone"], "ood_test"): "not detected",  # the interval says yes, Holm's p no
        (names[reasoning.LAST, "knowledge"], "ood_test"): "contradicted",
        (names[reasoning.LAST, "shuffled"], "ood_test"): "not detected",
        (names[reasoning.LAST, "shuffled"], "iid_test"): "not detected",
    }
    turned = found[found["claim"] == names["backbone", "initial"]].iloc[0]
    assert turned[["mean", "low", "high"]].tolist() == pytest.approx([4, 2, 6])  # points
    assert turned["name"] == "re-ranker alone\n− initial order"
    assert "DPO4Rec, round 2\n− unaligned knowledge" in set(found["name"])


def test_outcomes_are_counted_by_claim(tables):
    counts = reasoning.counts(reasoning.claims(tables)).set_index("claim")
    row = counts.loc["What helps is said about the user: aligned knowledge beats that of others"]
    assert row.tolist() == [0, 0, 2, 2, "+0.00 ... +0.00"]
    assert counts.loc["Alignment adds to unaligned knowledge", "contradicted"] == 1


def test_the_verdict_counts_all_tests_beside_those_that_it_names(tables):
    found = reasoning.claims(tables)
    text = reasoning.takeaway(found)
    first, second, last = (
        "A re-ranker orders better than",
        "Unaligned knowledge helps the",
        "Alignment adds to unaligned",
    )
    assert f"2 of 6 tests support their claim, one each of: {first} the initial ranker; {second} re-ranker. " in text
    assert f"1 of 6 tests contradicts its claim, {last} knowledge. 3 of 6 detect nothing" in text
    assert "half-widths are 1.0 to 4.0 points" in text
    none = reasoning.takeaway(found.assign(outcome="not detected"))
    assert "None supports its claim. None contradicts its claim. 6 of 6 detect nothing" in none
    twice = reasoning.takeaway(pd.concat([found, found]))
    assert f"4 of 12 tests support their claim, by claim: {first} the initial ranker (2);" in twice


def test_levels_begin_with_the_initial_order_and_are_in_percent(tables):
    found = reasoning.levels(tables, KEY["setting"])
    assert len(found) == 2 * 2 * len(ROWS) and found["name"].iloc[0] == "initial order"
    assert found.loc[found["row"] == "knowledge", "mean"].tolist() == pytest.approx([45.0] * 4)
    text = reasoning.levels_takeaway(tables, KEY["setting"])
    assert "1,500 lists, 3 seeds" in text
    assert "lowest and highest of the 7 rows, untested (the highest of several is high by chance): DLCM" in text
    assert "PRM 25.0 % (initial order) and 45.0 % (+ unaligned knowledge)" in text


def test_the_curve_is_of_gains_and_its_takeaway_of_the_last_round(tables):
    found = reasoning.curve(tables, KEY["setting"])
    assert set(found["metric"]) == {"reward_gain", "validation_gain"} and len(found) == 2 * 3 * 2
    text = reasoning.curve_takeaway(tables, KEY["setting"])
    assert "PRM +4.00 points [+3.00, +5.00]; on others: DLCM +0.00" in text
    assert "against no text (points): DLCM +4.00, PRM +4.00; all texts of a user tie for 25 % of" in text
    tied = tables["reranking_rounds"].assign(tied=tables["reranking_rounds"]["method"].map({"dlcm": 20, "prm": 60}))
    assert "tie for 25 to 50 % of" in reasoning.curve_takeaway({**tables, "reranking_rounds": tied}, KEY["setting"])


def test_the_shown_user_survives_writing(tables):
    steps = reasoning.loop(tables).set_index("step")["text"]
    assert steps["language model"].startswith("3 texts") and steps["re-ranker"].endswith("0.30 to 0.80")
    assert steps["best and worst"].endswith("0.80 against 0.30")
    first = reasoning.texts_table(tables, 0)
    assert first["role"].tolist() == ["chosen", "greedy", "", "rejected"]
    assert first["text"].tolist()[2] == "*no usable text*" and first["reward"].tolist()[0] == "0.800"
    assert set(reasoning.texts_table(tables, 1)["role"]) == {"greedy", ""}  # all tied: no pair
    text = reasoning.user_text(tables)
    assert (
        "(2): The Rusted Comet; Silent Harbor." in text and "order, positives in bold*: Zero; **Paper Tigers**." in text
    )


def test_a_study_without_simulated_users_shows_none():
    assert reranking.example_rows({}).empty


def test_figures_show_every_step_and_round(tables):
    fig, axes = plots.panels(columns=2)
    steps = reasoning.loop(tables)
    plots.loop_drawing(axes[0, 0], steps)
    shown = {text.get_text() for text in axes[0, 0].texts}
    assert {*steps["step"], *steps["text"], "next round"} <= shown
    curve = reasoning.curve(tables, KEY["setting"])
    plots.round_curves(axes[0, 1], curve[curve["metric"] == "reward_gain"], "points")
    lines = [bars.lines[0] for bars in axes[0, 1].containers]
    assert [np.asarray(line.get_ydata(), float).round(6).tolist() for line in lines] == [[0, 0, 0], [0, 2, 4]]
    assert [bars.get_label() for bars in axes[0, 1].containers] == ["DLCM", "PRM"]
    plt.close(fig)
