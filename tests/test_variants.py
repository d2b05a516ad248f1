"""The notebook on other losses: pairs are those of the paper's Table 5, sentences follow the numbers."""

import pytest

from causaldpo_lib import variants
from causaldpo_lib.ablations import PRIMARY
from causaldpo_lib.comparison import PAPER
from causaldpo_lib.paths import FIGURES
from causaldpo_lib.tables import read, settings

SETTING = "ml-100k-popularity"


@pytest.fixture(scope="module")
def tables():
    return read(FIGURES / "baselines")


def changed(tables, pair, numbers):
    """The tables in which a pair has another difference, interval and corrected p-value, in all metrics and splits."""
    paired = tables["paired"].copy()
    rows = (paired["method"] == pair[0]) & (paired["baseline"] == pair[1])
    paired.loc[rows, ["difference", "low", "high", "p_holm"]] = numbers
    return {**tables, "paired": paired}


def test_the_pairs_are_those_of_table_5(tables):
    table = PAPER[5]
    own = {(table.methods[method], table.methods[baseline]) for method, baseline in table.pairs}
    assert {*variants.PAIRS.values()} == own | {("causal_dpo", "dpo")}
    assert settings(tables) == [SETTING] and variants.measured(tables, SETTING) == variants.PAIRS


def test_differences_are_those_of_the_tables(tables):
    rows = variants.differences(tables, SETTING)
    assert len(rows) == 3 * len(variants.PAIRS) * 2  # no causal NDCG here
    assert list(dict.fromkeys(rows["metric"])) == [PRIMARY, "NDCG@10", "share of G1"]
    one = rows.query("metric == 'share of G1' and method == 'simpo_causal' and split == 'ood_test'").iloc[0]
    wide = tables["shares"].query("grouping == 'mass' and group == 'G1' and split == 'ood_test'").set_index("method")
    assert one["difference"] == pytest.approx(wide.loc["simpo_causal", "share"] - wide.loc["simpo", "share"], abs=1e-5)


def test_printed_differences_are_of_the_printed_rows(tables):
    found = variants.beside_paper(tables, SETTING).set_index("loss")
    assert list(found.index) == ["DPO", "Dr.DPO", "CPO", "SimPO"]
    assert found.loc["DPO", "paper, ML-10M"] == "+0.15"  # 0.35 - 0.20
    assert found.loc["SimPO", "paper, Book-Crossing"] == "-0.15*"  # 0.03 - 0.18: a row that cannot be right
    assert found.loc["CPO", "paper, ML-10M"] == "+0.06*"
    row = tables["paired"].query("metric == 'NDCG@10' and split == 'ood_test' and method == 'cpo_causal'")
    difference = 100 * row.query("baseline == 'cpo'")["difference"].iloc[0]
    assert found.loc["CPO", "here, OOD test"].startswith(f"{difference:+.2f} [")


@pytest.mark.parametrize(
    ("numbers", "word"),
    [
        ([0.2, 0.1, 0.3, 0.01], "raised"),
        ([-0.2, -0.3, -0.1, 0.01], "lowered"),
        ([0.0, -0.1, 0.1, 1.0], "no detectable"),
    ],
)
def test_the_takeaway_follows_the_numbers(tables, numbers, word):
    text = variants.takeaway(changed(tables, ("cpo_causal", "cpo"), numbers), SETTING)
    assert f"CPO: {word}" in text.splitlines()[0].replace("Dr.DPO", "")
    alike = tables
    for pair in variants.PAIRS.values():
        alike = changed(alike, pair, numbers)
    assert f"The verdict is the same for all losses: {word}" in variants.takeaway(alike, SETTING)
    other = changed(alike, ("cpo_causal", "cpo"), [9.0, 8.0, 10.0, 0.0] if word != "raised" else [0.0, -1.0, 1.0, 1.0])
    assert "The verdict is not the same for all losses." in variants.takeaway(other, SETTING)


def test_losses_that_a_study_lacks_are_left_out(tables):
    paired = tables["paired"]
    few = {**tables, "paired": paired[paired["method"] != "simpo_causal"]}
    assert "SimPO" not in variants.measured(few, SETTING) and "SimPO" not in set(
        variants.beside_paper(few, SETTING)["loss"]
    )
    none = {**tables, "paired": paired[paired["baseline"] == "sft"]}
    assert variants.differences(none, SETTING).empty and variants.beside_paper(none, SETTING).empty
    assert variants.takeaway(none, SETTING).endswith("No loss was trained with the penalty and without.")
