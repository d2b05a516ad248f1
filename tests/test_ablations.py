"""The notebook on ablations: rows find their axis and place, sentences follow the numbers, and every cell runs."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from causaldpo_lib import ablations, plots
from causaldpo_lib.ablations import AXES, CAUSAL, METRICS, PRIMARY, SHARE
from causaldpo_lib.errors import StudyError
from causaldpo_lib.evaluation import MARGIN, compared
from causaldpo_lib.study import load_study

SETTING, SPLITS, SEEDS = "ml-100k-popularity", ("iid_test", "ood_test"), (1, 2, 3)
STUDIES = [load_study(name) for name in ("ablations", "variants", "backdoor")]  # which share the axes between them
METHODS = list(dict.fromkeys(method.name for study in STUDIES for method in study.methods))
PAIRS = list(dict.fromkeys([*compared(METHODS), *(pair for study in STUDIES for pair in study.comparisons)]))
KNOWN = {name: given for study in STUDIES for name, given in ablations.parameters(study.name).items()}
UP, DOWN, NOTHING = (0.2, 0.1, 0.3, 0.006), (-0.2, -0.3, -0.1, 0.006), (0.01, -0.1, 0.12, 1.0)
LOGPS = {"sft": -7.1, "dpo": -7.9, "causal_dpo": -7.6, "shuffled": -7.65, "causal_dpo-mmd_weight-10.0": -7.2}


def level(method, metric, split):
    """Made-up means: as in LOGPS, others by the length of their name."""
    own = LOGPS.get(method, -7.3 - 0.01 * len(method))
    shown = {PRIMARY: own, "NDCG@10": 0.012 + 0.001 * (own + 7.5), "HR@10": 0.03, SHARE: 0.5 - 0.1 * (own + 7.5)}[
        metric
    ]
    return shown + {PRIMARY: 1.2, "NDCG@10": 0.03, "HR@10": 0.05, SHARE: 0.1}[metric] * (split != "ood_test")


def made_up(changes=None, default=NOTHING, refuted=1.0, methods=METHODS, best=None):
    """Tables of the study in which every paired difference is ``default``, except those in ``changes``.

    Validation likes ``best`` most, else what the tests like.
    """
    metrics, shares, paired, validation = [], [], [], []
    for split in (*SPLITS, "validation"):
        key = {"setting": SETTING, "split": split}
        for metric in (PRIMARY, "NDCG@10", "HR@10"):
            reach = {PRIMARY: 0.2, "NDCG@10": 0.003, "HR@10": 0.01}[metric]
            for method in methods:
                mean = level(method, metric, split) + 9.0 * (split == "validation" and method == best)
                row = {**key, "method": method, "metric": metric, "mean": mean, "low": mean - reach}
                row |= {"high": mean + reach, "seeds": 3, "examples": 2000}
                (validation if split == "validation" else metrics).append(row)
        if split == "validation":
            continue
        for floor in ("random", "popular"):
            row = {**key, "method": floor, "metric": "HR@10", "mean": 0.01, "low": 0.01, "high": 0.01, "seeds": 0}
            metrics.append({**row, "examples": 2000})
        for method in methods:
            mean = level(method, SHARE, split)
            row = {**key, "grouping": "mass", "group": "G1", "method": method, "share": mean}
            shares.append({**row, "low": mean - 0.15, "high": mean + 0.15})
        for metric in METRICS:
            for pair in (pair for pair in PAIRS if set(pair) <= set(methods)):
                difference, low, high, p_holm = (changes or {}).get(pair, default)
                row = {"method": pair[0], "baseline": pair[1], "difference": difference, "low": low, "high": high}
                row |= {"p": p_holm / 10, "p_holm": p_holm, "margin": MARGIN * 0.2, "p_equivalent": refuted}
                paired.append({**key, "metric": metric, **row, "p_equivalent_holm": refuted, "p_mcnemar": 0.5})
    sizes = {"sft": 1.3e6, "sft-backbone-tiny-small": 0.5e6}
    diagnostics = [
        {"setting": SETTING, "method": m, "seed": s, "parameters": n} for m, n in sizes.items() for s in SEEDS
    ]
    rest = pd.DataFrame([{"setting": SETTING, "split": "ood_test", "grouping": "mass", "group": "G1", "method": "sft"}])
    frames = {"metrics": metrics, "shares": shares, "paired": paired, "validation": validation}
    found = {name: pd.DataFrame(rows) for name, rows in frames.items()}
    return found | {"diagnostics": pd.DataFrame(diagnostics), "groups": rest}


@pytest.fixture(scope="module")
def tables():
    return made_up()


def without(tables, *methods):
    """The tables without some methods."""
    left = [name for name in tables["metrics"]["method"].unique() if name not in methods]
    return {name: rows[rows["method"].isin(left)] if "method" in rows else rows for name, rows in tables.items()}


def source(tables, output, name="a study"):
    return ablations.Source(name, tables, KNOWN, output)


# Axes


def test_every_axis_is_in_the_study_and_every_comparison_is_tested(tables):
    for axis in AXES:
        found = ablations.members(tables, SETTING, axis, KNOWN)
        pairs = AXES[axis].pairs(found)
        assert len(found) > 1 and pairs, axis
        assert {*pairs.values()} <= {*PAIRS}, axis
    assert all("15_ablations" in study.notebooks for study in STUDIES)


def test_every_row_of_a_sweep_is_on_an_axis(tables):
    shown = {name for axis in AXES for name in ablations.members(tables, SETTING, axis, KNOWN)["member"]}
    assert {name for name in METHODS if "-" in name} <= shown


def test_values_are_those_of_the_study(tables):
    rows = ablations.members(tables, SETTING, "lambda", KNOWN)
    assert rows.groupby("method")["value"].apply(list).to_dict() == {
        "dpo": [0],
        "causal_dpo": [0.001, 0.1, 1, 10, 100],
        "shuffled": [1, 10, 100],
    }
    assert rows["value"].is_monotonic_increasing
    assert rows.set_index("member").loc[["dpo", "causal_dpo", "shuffled"], "value"].tolist() == [0, 1, 1]
    rows = ablations.members(tables, SETTING, "learning_rate", KNOWN)
    assert rows.groupby("method")["value"].apply(list).to_dict() == {
        m: [3e-5, 1e-4, 3e-4] for m in ("causal_dpo", "dpo")
    }
    assert ablations.members(tables, SETTING, "iterations", KNOWN)["value"].tolist() == [1, 2, 4]
    assert ablations.members(tables, SETTING, "negatives", KNOWN)["value"].tolist() == [1, 3]


def test_only_one_parameter_differs_along_an_axis(tables):
    """What a panel calls the effect of a parameter is the effect of nothing else."""
    aside = {"method", "seed", "data", "sft", "assistant"}
    for axis in (name for name, about in AXES.items() if isinstance(about, ablations.Values)):
        key = AXES[axis].key.partition(".")[0]
        for member in (rows := ablations.members(tables, SETTING, axis, KNOWN))["member"]:
            base = rows.set_index("member").loc[member, "method"]
            differing = {k for k, value in KNOWN[member].items() if value != KNOWN[base][k]}
            assert differing - aside <= {key}, (axis, member)
    off, on = KNOWN["dpo"], KNOWN["causal_dpo"]
    assert {k for k in on if on[k] != off[k]} - aside == {"mmd_weight"}


def test_values_are_compared_within_a_line_and_across_lines(tables):
    def pairs(axis):
        return AXES[axis].pairs(ablations.members(tables, SETTING, axis, KNOWN))

    path = [name for name in METHODS if name.split("-mmd_weight-")[0] in ("causal_dpo", "shuffled")]
    path = [name for name in path if name in ("causal_dpo", "shuffled") or "-mmd_weight-" in name]
    assert {*pairs("lambda").values()} == {*((name, "dpo") for name in path)} | {
        (name, name.replace("causal_dpo", "shuffled"))
        for name in ("causal_dpo", "causal_dpo-mmd_weight-10.0", "causal_dpo-mmd_weight-100.0")
    }
    beta = pairs("beta")
    assert beta["CausalDPO, 0.5 against 1"] == ("causal_dpo-beta-0.5", "causal_dpo")
    assert beta["CausalDPO against DPO at 0.5"] == ("causal_dpo-beta-0.5", "dpo-beta-0.5")
    assert beta["CausalDPO against DPO at 1"] == ("causal_dpo", "dpo") and len(beta) == 7


def test_a_row_that_the_study_does_not_know_is_refused(tables):
    with pytest.raises(StudyError, match=r"no method 'causal_dpo-beta-0\.5' for its loss_options\.beta"):
        ablations.members(tables, SETTING, "beta", {"causal_dpo": KNOWN["causal_dpo"]})
    with pytest.raises(StudyError, match="axis"):
        ablations.members(tables, SETTING, "gamma", KNOWN)


def test_plotted_values_are_in_the_units_of_their_labels(tables):
    rows = ablations.plotted(tables, SETTING, ablations.members(tables, SETTING, "lambda", KNOWN))
    # No interventional preference is known here, so there is no causal NDCG.
    assert list(dict.fromkeys(rows["metric"])) == [PRIMARY, "NDCG@10", SHARE] and len(rows) == 9 * 3 * 2
    one = rows.query("member == 'causal_dpo' and split == 'ood_test'").set_index("metric")
    assert one.loc[PRIMARY, "mean"] == pytest.approx(-7.6) and one.loc[PRIMARY, "label"] == "log p (nats)"
    assert one.loc[SHARE, "mean"] == pytest.approx(51) and one.loc[SHARE, "high"] == pytest.approx(66)
    assert one.loc["NDCG@10", "low"] == pytest.approx(1.19 - 0.3) and one.loc["NDCG@10", "label"] == "NDCG@10 (%)"


def test_causal_ndcg_is_shown_where_the_interventional_preference_is_known(tables):
    own = tables["metrics"][tables["metrics"]["metric"] == "NDCG@10"].assign(metric=CAUSAL)
    known = {**tables, "metrics": pd.concat([tables["metrics"], own])}
    assert list(ablations.measured(known, SETTING)) == [PRIMARY, CAUSAL, "NDCG@10", SHARE]
    assert list(ablations.measured(tables, SETTING)) == [PRIMARY, "NDCG@10", SHARE]
    for found, there in ((known, True), (tables, False)):
        assert (CAUSAL in set(ablations.shown_metrics(found, SETTING)["metric"])) == there
        cells = ablations.difference_table(found, SETTING, {"one": ("backdoor", "dpo")})
        assert ("causal NDCG (points)" in cells) == there
        assert ("causal NDCG@10, both tests" in ablations.takeaway(found, SETTING, "backdoor", KNOWN)) == there


def test_dpo_and_the_controls_stand_behind_every_panel(tables):
    rows = ablations.levels(tables, SETTING)
    expected = ["sft", "dpo", "shuffled", "oracle_history", "oracle_target"]
    assert list(dict.fromkeys(rows["method"])) == expected and len(rows) == 5 * 3 * 2
    assert set(ablations.levels(without(tables, "oracle_target"), SETTING)["method"]) == {*expected[:4]}
    for axis in AXES:
        found = ablations.plotted(tables, SETTING, ablations.members(tables, SETTING, axis, KNOWN))
        fig = ablations.draw(SETTING, AXES[axis], found, rows)
        labels = [text.get_text() for text in fig.legends[0].get_texts()]
        assert {f"{plots.look(method).label} (level)" for method in expected} <= set(labels), axis
        for ax in fig.axes:
            lines = sum(line.get_label().endswith("(level)") for line in ax.get_lines())
            assert lines == 5, axis
        plt.close(fig)


def test_zero_stands_apart_on_a_logarithmic_axis(tables):
    rows = ablations.plotted(tables, SETTING, ablations.members(tables, SETTING, "lambda", KNOWN))
    fig, axes = plots.panels()
    ax = axes[0, 0]
    part = rows[(rows["metric"] == PRIMARY) & (rows["split"] == "ood_test")]
    plots.value_paths(ax, part, "λ", ablations.levels(tables, SETTING).iloc[:0], log=True)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["0", "0.001", "0.1", "1", "10", "100"]
    places = ax.get_xticks()
    assert np.allclose(places[1:], [-3, -1, 0, 1, 2]) and places[0] < -3
    lines = {c.get_label(): c for c in ax.containers}
    assert {name: len(line.lines[0].get_xdata()) for name, line in lines.items()} == {
        **{"DPO": 1, "CausalDPO": 5, "Shuffled control": 3}
    }
    plt.close(fig)


# What is missing


def test_an_axis_without_two_rows_is_left_out_with_a_sentence(tables, tmp_path):
    few = without(tables, "vrex", "group_dro", "backdoor", "dpo", *(n for n in METHODS if n.startswith("dpo-")))
    ((figures, text),) = ablations.panels([source(few, tmp_path)], "penalties")
    assert not figures and not list(tmp_path.iterdir())
    assert text == (
        "*Which penalty on the inferred environments: left out, since of its rows the tables of ml-100k-popularity "
        "have only CausalDPO.*"
    )
    ((_, text),) = ablations.panels([source(without(tables, *METHODS[1:]), tmp_path)], "gradient")
    assert text.endswith("have none.*")
    ((figures, text),) = ablations.panels([source(few, tmp_path)], "lambda")  # without DPO, against the base
    assert (
        len(figures) == 1
        and "CausalDPO, 0.1 against 1" in text
        and (tmp_path / f"ablations-lambda-{SETTING}.csv").exists()
    )


def test_rows_that_most_studies_have_are_no_panel_of_their_own(tables, tmp_path):
    """SFT and CausalDPO on one backbone are no backbones of two sizes."""
    few = without(tables, "sft-backbone-tiny-small", "causal_dpo-backbone-tiny-small")
    ((figures, text),) = ablations.panels([source(few, tmp_path)], "backbones")
    assert not figures and not list(tmp_path.iterdir())
    assert text.endswith("have only SFT, CausalDPO.*")
    assert "backbones" not in set(ablations.ranges(few, SETTING, "ood_test", KNOWN)["axis"])
    assert AXES["backbones"].title not in ablations.verdict(few, KNOWN)
    assert AXES["backbones"].title in ablations.verdict(tables, KNOWN)


def test_one_value_on_two_lines_is_no_path(tables, tmp_path):
    single = without(tables, *(name for name in METHODS if "-beta-" in name))
    assert len(ablations.members(tables, SETTING, "beta", KNOWN)) > 2
    ((figures, text),) = ablations.panels([source(single, tmp_path)], "beta")
    assert not figures and text.endswith("have only CausalDPO.*")
    assert "beta" not in set(ablations.ranges(single, SETTING, "ood_test", KNOWN)["axis"])


def test_a_takeaway_of_detected_changes_alone_has_no_rest():
    pairs = [("rose_po_hard", "rose_po"), ("rose_po_semantic", "rose_po"), ("rose_po_popular", "rose_po")]
    text = ablations.takeaway(made_up(dict.fromkeys(pairs, UP)), SETTING, "rosepo", KNOWN)
    assert "detected in all 3 comparisons" in text and "no detectable change in 0 of 3" not in text.splitlines()[0]


def test_a_further_study_is_shown_only_where_it_adds_rows(tables, tmp_path):
    added = [name for name in METHODS if name.endswith("-100.0") or name.startswith("rose_po")]
    first, further = without(tables, *added), without(tables, "vrex", "bigrec")
    both = [source(first, tmp_path / "a", "first"), source(further, tmp_path / "b", "further")]

    def shown(axis, studies):
        return [text.split("`")[1] for figures, text in ablations.panels(studies, axis) if figures]

    assert shown("lambda", both) == ["first", "further"]
    assert shown("penalties", both) == ["first"] and shown("beta", both) == ["first"]
    assert shown("rosepo", both) == ["further"] and shown("rosepo", both[:1]) == []
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    assert {path.stem.split("-")[1] for path in (tmp_path / "b").glob("*.png")} == {"lambda", "rosepo"}


def test_a_study_does_not_stand_beside_itself(tables, written, tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "parameters", lambda study: KNOWN)
    folder = Path(written(tables))
    (only,) = ablations.sources(folder, [f"elsewhere/{folder.name}"], tmp_path / "drawn")
    assert only.name == folder.name and only.output == tmp_path / "drawn"
    with pytest.raises(StudyError, match="make study STUDY=other"):
        ablations.sources(folder, ["elsewhere/other"])


def test_a_study_of_other_things_has_sentences_only(tables, tmp_path):
    other = without(tables, *(set(METHODS) - {"sft"}))
    for axis in AXES:
        assert [not figures for figures, _ in ablations.panels([source(other, tmp_path)], axis)] == [True]
    assert ablations.selection(other, SETTING, KNOWN).empty
    assert ablations.selection_takeaway(other, SETTING, KNOWN).endswith("no hyper-parameter that a rule could choose.")
    assert "nothing on these axes was compared" in ablations.verdict(other, KNOWN)
    assert "Without the shuffled control" in ablations.environments_sentence(other, SETTING)
    assert ablations.ranges(other, SETTING, "ood_test", KNOWN).empty


# Sentences


@pytest.mark.parametrize(("numbers", "word"), [(UP, "raised"), (DOWN, "lowered"), (NOTHING, "")])
def test_a_takeaway_follows_the_numbers(numbers, word):
    tables = made_up({("causal_dpo-mmd_weight-0.1", "dpo"): numbers})
    text = ablations.takeaway(tables, SETTING, "lambda", KNOWN)
    size = "+0.01 nats [-0.10, +0.12], p = 1.000 against SFT"
    ends = f"At 100: CausalDPO -7.57 ({size}), Shuffled control -7.55 ({size}); SFT, where it starts, -7.10, DPO -7.90"
    assert ends in text and "At " not in ablations.takeaway(tables, SETTING, "beta", KNOWN)
    assert "SFT" not in ablations.takeaway(without(tables, "sft"), SETTING, "lambda", KNOWN)
    size = f"{numbers[0]:+.2f} nats [{numbers[1]:+.2f}, {numbers[2]:+.2f}], p = 0.006"
    moved = f"CausalDPO, 0.1 against 0: {word} ({size}); " if word else ""
    still = f"no detectable change in {10 if word else 11} of 11 comparisons, a change of ±8.6 % refuted in 0."
    assert text.startswith(f"**Takeaway.** *{SETTING}, OOD test.* Log-probability of the target: {moved}{still}")
    counts = {each: f"{each} in {2 * (each == word)} of 22" for each in ("raised", "lowered")}
    assert all(text.count(count) == 2 for count in counts.values()), text


def test_what_only_the_correction_hides_is_named():
    numbers = (0.2, 0.1, 0.3, 0.2)  # the interval leaves out 0, Holm's p does not
    tables = made_up({("causal_dpo-mmd_weight-0.1", "dpo"): numbers})
    text = ablations.takeaway(tables, SETTING, "lambda", KNOWN)
    size = "+0.20 nats [+0.10, +0.30], p = 0.200"
    assert f"the interval leaves out 0 before correction in: CausalDPO, 0.1 against 0 ({size})" in text
    assert "| Weight λ of the penalty | 0 | 1 | 11 |" in ablations.verdict(tables, KNOWN)
    assert "| Weight λ of the penalty | 0 | 0 | 11 |" in ablations.verdict(made_up(), KNOWN)


def test_the_takeaway_says_how_much_a_conditioned_policy_uses_its_environment(tables):
    assert "about the environment" not in ablations.takeaway(tables, SETTING, "backdoor", KNOWN)
    rows = [{"setting": SETTING, "method": "backdoor", "seed": s, "environment_information": s / 100} for s in SEEDS]
    known = {**tables, "diagnostics": pd.concat([tables["diagnostics"], pd.DataFrame(rows)])}
    said = ablations.takeaway(known, SETTING, "backdoor", KNOWN)
    assert "given the prompt (nats, over seeds): Backdoor 0.0100 to 0.0300." in said.splitlines()[0]
    assert "about the environment" not in ablations.takeaway(known, SETTING, "lambda", KNOWN)


def test_differences_are_cells_with_their_verdict():
    found = ablations.difference_table(
        made_up({("vrex", "dpo"): UP}, refuted=0.01),
        SETTING,
        {"a": ("vrex", "dpo"), "b": ("group_dro", "dpo"), "c": ("vrex", "group_dro")},
    )
    assert found["test"].tolist() == ["IID", "OOD"] * 3
    column = found["log p (nats)"]
    assert column[1] == "+0.20 [+0.10, +0.30], p = 0.006, below the margin, **raised**"
    assert column[3] == "+0.01 [-0.10, +0.12], p = 1.000, equivalent"
    assert column[5] == "not compared"
    assert found["share of G1 (points)"][1].startswith("+20.00 [+10.00")


@pytest.mark.parametrize("numbers", [UP, DOWN, NOTHING])
def test_the_verdict_names_what_moves(numbers):
    text = ablations.verdict(made_up({("vrex", "dpo"): numbers, ("causal_dpo", "shuffled"): numbers}), KNOWN)
    title, moved = AXES["penalties"].title, numbers != NOTHING
    assert f"| {title} | {int(moved)} | 0 | 3 |" in text  # against DPO: MMD, V-REx, group DRO
    assert ("comparisons 0 detect a change" in text) == (not moved)
    word = {UP: "raised", DOWN: "lowered", NOTHING: "no detectable change"}[numbers]
    assert f"Inferred against shuffled environments: {word} (" in text


def test_the_widest_range_is_first(tables):
    rows = ablations.ranges(tables, SETTING, "ood_test", KNOWN)
    widths = rows["high"] - rows["low"]
    assert widths.is_monotonic_decreasing and len(rows) == len(AXES)
    own = rows.set_index("axis").loc["lambda"]
    assert (own["low"], own["high"], own["method"]) == (-7.9, -7.2, "causal_dpo-mmd_weight-10.0")


# Selection


def test_validation_chooses_and_the_test_stands_beside(tables):
    found = ablations.selection(tables, SETTING, KNOWN).set_index("search")
    assert found.loc["λ of CausalDPO", "candidates"] == "6"
    assert found.loc["λ of CausalDPO", "iid_validation_logp"] == "CausalDPO, λ 10.0: -7.20 [-7.40, -7.00]"
    assert list(found.index) == [
        *("λ of CausalDPO", "beta of CausalDPO", "beta of DPO"),
        *("peak learning rate of AdamW of CausalDPO", "peak learning rate of AdamW of DPO"),
        *("all of CausalDPO", "all of DPO"),
    ]
    candidates = ablations.searches(tables, SETTING, KNOWN)
    assert "dpo" not in candidates["all of CausalDPO"] and len(candidates["all of CausalDPO"]) == 9
    off = made_up(best="dpo")
    found = ablations.selection(off, SETTING, KNOWN).set_index("search")
    assert found.loc["λ of CausalDPO", "iid_validation_logp"].startswith("DPO: -7.90")
    assert found.loc["λ of CausalDPO", "oracle_ood"].startswith("CausalDPO, λ 10.0")
    text = ablations.selection_takeaway(off, SETTING, KNOWN)
    assert "Of 2 rules on validation, 2 would switch the penalty off" in text
    assert (
        "λ of CausalDPO: DPO by log-probability and by NDCG (on the OOD test CausalDPO, λ 10.0 is 0.70 nats better)."
        in text
    )
    text = ablations.selection_takeaway(tables, SETTING, KNOWN)
    assert "Of 2 rules on validation, 0 would" in text and "(also best on the OOD test)" in text


def test_without_a_validation_split_only_the_oracle_chooses(tables):
    bare = {**tables, "validation": tables["validation"].iloc[:0]}
    found = ablations.selection(bare, SETTING, KNOWN)
    assert (found["iid_validation_logp"] == "").all() and (found["oracle_ood"] != "").all()
    assert "hold no ranking of the validation split" in ablations.selection_takeaway(bare, SETTING, KNOWN)


def test_sizes_are_those_of_the_fine_tuned_models(tables):
    assert ablations.sizes(tables, SETTING).endswith("tiny has 1.30 million parameters, the smaller one 0.50 million.*")
    assert ablations.sizes(without(tables, "sft-backbone-tiny-small"), SETTING) == ""


# The notebook


def test_the_notebook_draws_and_explains_everything(tables, run_notebook, written, monkeypatch):
    monkeypatch.setattr(ablations, "parameters", lambda study: KNOWN)  # the folder has another name
    defaults, images, shown = run_notebook("15_ablations", tables=written(tables), beside=[])
    assert defaults["tables"] == "../figures/ablations" and defaults["beside"] == [
        "../figures/variants",
        "../figures/backdoor",
    ]
    assert images == {f"ablations-{axis}-{SETTING}" for axis in (*AXES, "ranges")}
    texts = [thing.data for thing in shown if isinstance(getattr(thing, "data", None), str)]
    assert sum("**Takeaway.**" in text for text in texts) >= len(AXES) + 2
