"""Verdicts follow the tests, the tests follow the tables, and every statement can be tested by a declared study."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
import pytest

from causaldpo_lib import plots, verdict
from causaldpo_lib.audit import published
from causaldpo_lib.evaluation import compared, share_metric
from causaldpo_lib.paths import NOTEBOOKS, PARAMS
from causaldpo_lib.study import load_study
from causaldpo_lib.takeaways import Claim

UP, DOWN, NOTHING = (0.1, 0.05, 0.15, 0.006), (-0.1, -0.15, -0.05, 0.006), (0.01, -0.02, 0.04, 0.6)
STATEMENTS = [statement for group in verdict.GROUPS.values() for statement in group]
STATEMENT = verdict.Statement(
    "A is better than B", "Table 0", (Claim("", "HR@10", "a", "b", 1),), "08_results_tables", "more data"
)


def tables(iid, ood=None, setting="s", method="a", baseline="b", p_equivalent=1.0):
    """One paired difference per test split."""
    rows = [
        {"setting": setting, "split": split, "metric": "HR@10", "method": method, "baseline": baseline}
        | dict(zip(("difference", "low", "high", "p_holm"), numbers, strict=True))
        | {"margin": 0.05, "p_equivalent_holm": p_equivalent}
        for split, numbers in (("iid_test", iid), ("ood_test", ood))
        if numbers
    ]
    paired = pd.DataFrame(rows)
    return {"paired": paired, "metrics": paired}


@pytest.mark.parametrize(
    ("results", "says"),
    [
        ([], "cannot be tested here"),
        (["reproduced", "reproduced"], "supported"),
        (["reproduced", "not detected"], "supported in part"),
        (["reproduced", "equivalent"], "supported in part"),
        (["reproduced", *["not detected"] * 4], "supported in part"),
        (["reproduced", *["not detected"] * 5], "isolated support"),
        (["reproduced", "contradicted", "equivalent"], "mixed"),
        (["contradicted", "not detected"], "not supported"),
        (["equivalent", "not detected"], "not supported"),
        (["equivalent", "not detected", "not detected"], "undecided"),
        (["contradicted", "not detected", "not detected"], "contradicted in part"),
        (["contradicted", "equivalent", "not detected"], "not supported"),
        (["not detected", "not detected"], "undecided"),
    ],
)
def test_the_rule(results, says):
    assert verdict.word(results) == says
    assert verdict.word(results[::-1]) == says


def test_a_statement_with_an_untested_claim_is_supported_in_part_at_best():
    assert verdict.word(["reproduced"], complete=False) == "supported in part"
    both = STATEMENT._replace(claims=(*STATEMENT.claims, Claim("", "HR@10", "a", "c", 1)))
    assert verdict.counts([STATEMENT, both], {"one": tables(UP)})["verdict"].tolist() == [
        "supported",
        "supported in part",
    ]


@pytest.mark.parametrize(("group", "amplified"), [("G1", UP), ("G5", DOWN)])
def test_amplification_is_more_of_the_popular_and_less_of_the_unpopular(group, amplified):
    found = tables(amplified, method="dpo", baseline="sft")
    found["paired"]["metric"] = share_metric("mass", group)
    claimed, undone = verdict.PAPER[0], verdict.PAPER[6]
    assert "DPO shows popular items more" in claimed.text and "CausalDPO shows popular items less" in undone.text
    assert verdict.counts([claimed], {"one": found})["reproduced"].item() == 1
    found["paired"][["method", "baseline"]] = ["causal_dpo", "dpo"]
    assert verdict.counts([undone], {"one": found})["contradicted"].item() == 1


def test_without_confounding_nothing_is_claimed_unless_said_so():
    found = {"simulated": tables(UP, setting="simulated-none"), "other": tables(DOWN, setting="simulated-weak")}
    assert verdict.counts([STATEMENT], found)["contradicted"].item() == 1 == len(verdict.tests_of(STATEMENT, found))
    assert verdict.counts([STATEMENT._replace(everywhere=True)], found)["verdict"].item() == "mixed"


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (tables(UP, UP), "Supported.** Of 2 tests: 2 reproduced, 0 equivalent, 0 not detected, 0 contradicted."),
        (tables(UP, p_equivalent=0.01), "Not supported.** Of 1 test: 0 reproduced, 1 equivalent"),
        (tables(DOWN, DOWN, method="b", baseline="a"), "Supported.** Of 2 tests: 2 reproduced"),
        (tables(UP, DOWN), "Mixed.** Of 2 tests: 1 reproduced, 0 equivalent, 0 not detected, 1 contradicted."),
        (tables(NOTHING), "Undecided.** Of 1 test: 0 reproduced, 0 equivalent, 1 not detected"),
        (tables(NOTHING, p_equivalent=0.01), "Not supported.** Of 1 test: 0 reproduced, 1 equivalent"),
        (tables(UP, method="c"), "Cannot be tested here.** What would settle it: more data."),
    ],
)
def test_a_verdict_counts_its_tests(found, says):
    assert says in verdict.summary(STATEMENT, {"one": found})


def test_what_several_studies_measured_counts_once_and_the_first_counts():
    studies = {"one": tables(UP), "two": tables(DOWN, DOWN), "three": tables(NOTHING, setting="t")}
    rows = verdict.tests_of(STATEMENT, studies)
    assert rows[["study", "setting", "split", "result"]].values.tolist() == [
        ["one", "s", "IID test", "reproduced"],
        ["two", "s", "OOD test", "contradicted"],
        ["three", "t", "IID test", "not detected"],
    ]
    assert rows["difference"].iloc[0].startswith("+10.00 points [+5.00, +15.00]")


def test_tests_that_several_studies_made_are_compared(monkeypatch):
    monkeypatch.setattr(verdict, "GROUPS", {"a group": (STATEMENT,)})
    studies = {"one": tables(UP, NOTHING), "two": tables(UP, UP), "else": tables(UP, setting="other")}
    text = verdict.repeated(studies)
    assert text.startswith("**Made again.** Of 2 tests that a study made again, 1 have the result of the first; the")
    (line,) = text.splitlines()[2:]
    assert line.startswith("- a − b, HR@10, s, OOD test: `one` not detected (+1.00 points [-2.00, +4.00], p = 0.600); ")
    assert line.endswith("`two` reproduced (+10.00 points [+5.00, +15.00], p = 0.006).")
    third = verdict.repeated({**studies, "three": tables(DOWN)})
    assert "Of 3 tests" in third and "`three` contradicted (-10.00 points [-15.00, -5.00], p = 0.006)." in third
    assert verdict.repeated({"one": tables(UP), "two": tables(UP)}).endswith("1 have the result of the first.")
    assert "Of 0 tests" in verdict.repeated({"one": tables(UP)})


@pytest.mark.parametrize("statement", STATEMENTS, ids=lambda statement: statement.text[:40])
def test_a_statement_has_a_notebook_and_its_tests_are_of_a_declared_study(statement):
    assert (NOTEBOOKS / f"{statement.notebook}.ipynb").is_file()
    studies = [load_study(path) for path in sorted((PARAMS / "studies").glob("*.yaml"))]
    made = set()
    for study in studies:
        pairs = [*compared([method.name for method in study.methods]), *study.comparisons]
        made |= {frozenset(pair) for pair in pairs}
    assert {frozenset((claim.method, claim.baseline)) for claim in statement.claims} <= made


def test_statements_are_worded_once_and_name_tables_that_are_printed():
    texts = [statement.text for statement in STATEMENTS]
    assert len(set(texts)) == len(texts)
    printed = {f"Table {number}" for number in published("accuracy")["table"].unique()}
    for statement in verdict.PAPER:
        if statement.where.startswith("Table "):
            assert statement.where in printed


def test_bars_fill_their_row_and_an_untested_statement_has_none():
    table = verdict.counts([STATEMENT, STATEMENT._replace(claims=())], {"one": tables(UP, DOWN)})
    fig, axes = plots.panels()
    ax = plots.result_bars(axes[0, 0], table)
    widths = pd.DataFrame(
        [[bar.get_width() for bar in bars] for bars in ax.containers], index=list(plots.RESULT_COLOURS)
    )
    assert widths[0].to_dict() == {"reproduced": 50, "equivalent": 0, "not detected": 0, "contradicted": 50}
    assert widths[1].sum() == 0
    assert [text.get_text() for text in ax.texts] == ["2", "no test here"]
    assert list(plots.RESULT_COLOURS) == list(verdict.RESULTS)
    plt.close(fig)


def test_the_takeaway_counts_all_statements():
    said = verdict.takeaway({"one": tables(UP)})
    for name, statements in verdict.GROUPS.items():
        assert f"Of {len(statements)} statements of {name}: {len(statements)} cannot be tested here." in said
