"""Tables from fabricated runs against loops over the predictions, and runs that are not as they should be."""

import json
import math
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from fabricated import setting, write_run

from causaldpo_lib import evaluation, study, tables
from causaldpo_lib.errors import StudyError

NAMES = ("simulated-environment", "ml-100k-popularity")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return setting(root, NAMES[0], truth=True) + setting(root, NAMES[1])


@pytest.fixture(scope="module")
def collected(jobs):
    return tables.collect_jobs(jobs)


@pytest.fixture(scope="module")
def folder(collected, tmp_path_factory):
    target = tmp_path_factory.mktemp("fabricated")
    for name, table in collected.items():
        table.to_csv(target / f"{name}.csv", index=False)
    return target


@pytest.fixture
def one_setting(tmp_path):
    return setting(tmp_path, NAMES[0], truth=True, seeds=(1,), examples=30)


def predictions_of(jobs, name, method, split):
    """The rows of a method's rank runs, all seeds together."""
    mine = [job for job in jobs if (job.stage, job.setting, job.method) == ("rank", name, method)]
    rows = pd.concat([pd.read_parquet(job.folder / "predictions.parquet") for job in mine])
    return rows[rows["split"] == split]


def read_items(jobs, name):
    data = next(job for job in jobs if (job.stage, job.setting) == ("data", name))
    return pd.read_parquet(data.folder / "items.parquet")


def value(table, column="mean", **equal):
    rows = tables.select(table, **equal)
    assert len(rows) == 1
    return rows[column].iloc[0]


# What the tables say


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["sft", "dpo", "causal_dpo", "shuffled"])
def test_metrics_are_the_means_of_the_predictions(jobs, collected, name, method):
    for split in tables.TEST_SPLITS:
        rows = predictions_of(jobs, name, method, split)
        key = {"setting": name, "split": split, "method": method}
        for k in (10, 20):
            gains = [1 / math.log2(rank + 2) if rank < k else 0.0 for rank in rows["rank"]]
            hit_rate = value(collected["metrics"], metric=f"HR@{k}", **key)
            assert hit_rate == pytest.approx((rows["rank"] < k).mean())
            assert value(collected["metrics"], metric=f"NDCG@{k}", **key) == pytest.approx(np.mean(gains))
        logp = value(collected["metrics"], metric="target_logp", **key)
        assert logp == pytest.approx(rows["target_logp"].mean())


def test_intervals_hold_their_means_and_say_what_is_behind_them(collected):
    table = collected["metrics"]
    assert ((table["low"] <= table["mean"] + 1e-12) & (table["mean"] <= table["high"] + 1e-12)).all()
    trained = ~table["method"].isin(evaluation.FLOORS)
    assert set(table.loc[trained, "seeds"]) == {3} and set(table.loc[~trained, "seeds"]) == {0}
    assert set(table["examples"]) == {120}


def test_random_floor_is_the_mean_over_random_orders(collected):
    rng = np.random.default_rng(0)
    places = np.argsort(rng.random((4000, 40)), axis=1)[:, 0]
    key = {"setting": NAMES[1], "split": "ood_test", "method": "random"}
    assert value(collected["metrics"], metric="HR@10", **key) == 10 / 40
    simulated = np.mean(np.where(places < 10, 1 / np.log2(places + 2), 0))
    assert value(collected["metrics"], metric="NDCG@10", **key) == pytest.approx(simulated, rel=0.05)
    assert value(collected["metrics"], metric="target_logp", **key) == pytest.approx(-math.log(40))


def test_popular_floor_recommends_by_training_count(jobs, collected):
    items = read_items(jobs, NAMES[1])
    by_count = sorted(zip(-items["train_count"], items["item"], strict=True))
    place = {item: rank for rank, (_, item) in enumerate(by_count)}
    targets = predictions_of(jobs, NAMES[1], "sft", "iid_test")["target"]
    key = {"setting": NAMES[1], "split": "iid_test", "method": "popular"}
    hits = np.mean([place[target] < 10 for target in targets])
    assert value(collected["metrics"], metric="HR@10", **key) == pytest.approx(hits)
    count = dict(zip(items["item"], items["train_count"], strict=True))
    smoothed = [math.log((count[t] + 1) / (sum(count.values()) + len(count))) for t in targets]
    assert value(collected["metrics"], metric="target_logp", **key) == pytest.approx(np.mean(smoothed))


def test_causal_metric_equals_a_loop_and_exists_only_where_the_truth_is_known(jobs, collected):
    data = jobs[0].folder
    truth = pd.read_parquet(data / "truth.parquet").set_index(["user", "item"])["preference"]
    expected = []
    for row in predictions_of(jobs, NAMES[0], "dpo", "ood_test").itertuples():
        best = sorted(truth[row.user], reverse=True)[:10]
        dcg, ideal = (
            sum(gain / math.log2(r + 2) for r, gain in enumerate(found))
            for found in ([truth[row.user, item] for item in row.items[:10]], best)
        )
        expected.append(dcg / ideal)
    key = {"split": "ood_test", "method": "dpo", "metric": "causal_NDCG@10"}
    assert value(collected["metrics"], setting=NAMES[0], **key) == pytest.approx(np.mean(expected))
    assert tables.select(collected["metrics"], setting=NAMES[1], metric="causal_NDCG@10").empty


def test_interventional_error_is_over_the_whole_catalogue(jobs, collected):
    truth = pd.read_parquet(jobs[0].folder / "truth.parquet").pivot(index="user", columns="item", values="preference")
    order = read_items(jobs, NAMES[0])["item"]
    rows = predictions_of(jobs, NAMES[0], "sft", "ood_test")
    errors = [scipy.stats.entropy(truth.loc[row.user, order], np.exp(row.catalogue_logps)) for row in rows.itertuples()]
    key = {"setting": NAMES[0], "split": "ood_test", "metric": "causal_KL"}
    assert value(collected["metrics"], method="sft", **key) == pytest.approx(np.mean(errors))
    uniform = [math.log(40) - scipy.stats.entropy(truth.loc[user]) for user in rows["user"].iloc[:120]]
    assert value(collected["metrics"], method="random", **key) == pytest.approx(np.mean(uniform))
    assert tables.select(collected["metrics"], setting=NAMES[1], metric="causal_KL").empty
    assert tables.heading("causal_KL") == "causal KL (nats)"


def test_random_causal_floor_is_the_expectation(jobs, collected):
    truth = pd.read_parquet(jobs[0].folder / "truth.parquet").pivot(index="user", columns="item").to_numpy()
    rng = np.random.default_rng(0)
    weights = 1 / np.log2(np.arange(10) + 2)
    users = predictions_of(jobs, NAMES[0], "sft", "iid_test").drop_duplicates("example")["user"]
    played = [
        rng.permuted(np.tile(truth[user], (300, 1)), axis=1)[:, :10] @ weights / (-np.sort(-truth[user])[:10] @ weights)
        for user in users
    ]
    key = {"setting": NAMES[0], "split": "iid_test", "method": "random", "metric": "causal_NDCG@10"}
    assert value(collected["metrics"], **key) == pytest.approx(np.mean(played), rel=0.02)


def test_shares_sum_to_one_and_count_slots(jobs, collected):
    shares = collected["shares"]
    assert np.allclose(shares.groupby(["setting", "split", "grouping", "method"])["share"].sum(), 1)
    items = read_items(jobs, NAMES[1]).set_index("item")
    slots = np.concatenate([row[:10] for row in predictions_of(jobs, NAMES[1], "dpo", "ood_test")["items"]])
    key = {"setting": NAMES[1], "split": "ood_test", "grouping": "mass"}
    for group in ("G1", "G5"):
        counted = (items.loc[slots, "group_mass"] == group).mean()
        assert value(shares, "share", method="dpo", group=group, **key) == pytest.approx(counted)
    trained = items.loc[items["group_mass"] == "G1", "train_count"].sum() / items["train_count"].sum()
    assert value(shares, "share", method="training", group="G1", **key) == pytest.approx(trained)


def test_targets_are_a_reference_beside_the_lists(jobs, collected):
    targets = predictions_of(jobs, NAMES[1], "sft", "ood_test").drop_duplicates("example")["target"]
    group = read_items(jobs, NAMES[1]).set_index("item").loc[targets, "group_items"]
    key = {"setting": NAMES[1], "split": "ood_test", "grouping": "items", "group": "G2"}
    assert value(collected["shares"], "share", method="targets", **key) == pytest.approx((group == "G2").mean())


def test_group_accuracy_is_over_the_targets_of_the_group(jobs, collected):
    rows = predictions_of(jobs, NAMES[0], "causal_dpo", "iid_test")
    group = read_items(jobs, NAMES[0]).set_index("item").loc[rows["target"], "group_mass"].to_numpy()
    gains = np.where(rows["rank"] < 10, 1 / np.log2(rows["rank"] + 2), 0)
    key = {"setting": NAMES[0], "split": "iid_test", "grouping": "mass", "method": "causal_dpo"}
    for name in ("G3", "G5"):
        assert value(collected["groups"], group=name, **key) == pytest.approx(gains[group == name].mean())
    assert tables.select(collected["groups"], **key)["examples"].sum() == 120


def test_a_group_without_targets_has_no_number(one_setting):
    for job in one_setting:
        if job.stage == "data":
            items = pd.read_parquet(job.folder / "items.parquet")
            examples = pd.read_parquet(job.folder / "examples.parquet")
            items.loc[items["item"].isin(examples["item"]) & (items["group_mass"] == "G1"), "group_mass"] = "G2"
            items.loc[~items["item"].isin(examples["item"]), "group_mass"] = "G1"
            items.to_parquet(job.folder / "items.parquet")
    found = tables.collect_jobs(one_setting)
    empty = tables.select(found["groups"], grouping="mass", group="G1")
    assert len(empty) and empty["mean"].isna().all() and (empty["examples"] == 0).all()
    assert evaluation.ndcg_metric("mass", "G1") not in set(found["paired"]["metric"])


def test_random_lists_are_as_varied_as_random_lists_are(collected):
    """120 uniform lists of 10 show each of 40 items 30 times, give or take."""
    key = {"setting": NAMES[1], "split": "ood_test", "method": "random"}
    found = {name: value(collected["metrics"], metric=name, **key) for name in evaluation.LIST_METRICS}
    assert found["coverage@10"] == 1.0 and found["DivRatio@10"] == pytest.approx(40 / 1200)
    assert 3 / 40 < found["ORRatio@10"] < 0.12 and found["Gini@10"] < 0.15


def test_popular_lists_are_the_same_for_everybody(collected):
    key = {"setting": NAMES[1], "split": "ood_test", "method": "popular"}
    found = {name: value(collected["metrics"], metric=name, **key) for name in evaluation.LIST_METRICS}
    assert found == pytest.approx({"ORRatio@10": 0.3, "DivRatio@10": 10 / 1200, "coverage@10": 0.25, "Gini@10": 0.75})


def test_list_metrics_are_means_over_seeds(jobs, collected):
    rows = predictions_of(jobs, NAMES[0], "dpo", "ood_test")
    ratios = []
    for seed in range(3):
        slots = np.concatenate([row[:10] for row in rows["items"].iloc[120 * seed : 120 * (seed + 1)]])
        ratios.append(pd.Series(slots).value_counts().iloc[:3].sum() / 1200)
    key = {"setting": NAMES[0], "split": "ood_test", "method": "dpo", "metric": "ORRatio@10"}
    mean, low, high = (value(collected["metrics"], column, **key) for column in ("mean", "low", "high"))
    assert mean == pytest.approx(np.mean(ratios))
    reach = 4.3027 * np.std(ratios, ddof=1) / 3**0.5  # Student's t with two degrees of freedom
    assert (mean - low, high - mean) == pytest.approx((reach, reach), rel=1e-4)


def test_popularity_lift_compares_lists_with_histories(jobs, collected):
    count = read_items(jobs, NAMES[0]).set_index("item")["train_count"]
    examples = pd.read_parquet(jobs[0].folder / "examples.parquet")
    profile = np.mean([count[row].mean() for row in examples.loc[examples["split"] == "ood_test", "history"]])
    shown = np.mean([count[row[:10]].mean() for row in predictions_of(jobs, NAMES[0], "dpo", "ood_test")["items"]])
    key = {"setting": NAMES[0], "split": "ood_test", "metric": "popularity_lift@10"}
    assert value(collected["metrics"], method="dpo", **key) == pytest.approx(shown / profile - 1)
    assert value(collected["metrics"], method="random", **key) == pytest.approx(count.mean() / profile - 1)
    assert value(collected["paired"], "low", method="dpo", baseline="sft", **key) > 0


def test_accuracy_is_grouped_by_the_true_environment_where_it_is_known(jobs, collected):
    environment = pd.read_parquet(jobs[0].folder / "examples.parquet").set_index("example")["environment"]
    rows = predictions_of(jobs, NAMES[0], "sft", "iid_test")
    chosen = rows["example"].map(environment).eq("spring").to_numpy()
    gains = np.where(rows["rank"] < 10, 1 / np.log2(rows["rank"] + 2), 0)
    key = {"split": "iid_test", "grouping": "environment", "group": "spring", "method": "sft"}
    assert value(collected["groups"], setting=NAMES[0], **key) == pytest.approx(gains[chosen].mean())
    assert tables.select(collected["groups"], setting=NAMES[1], grouping="environment").empty


# Periods and slopes


def test_periods_are_cut_by_the_targets_times(jobs, collected):
    times = pd.read_parquet(jobs[0].folder / "examples.parquet").set_index("example")["time"]
    rows = predictions_of(jobs, NAMES[0], "dpo", "ood_test")
    moment = rows["example"].map(times).to_numpy()
    last = moment >= np.quantile(moment, 0.8)  # no two of these times are equal
    key = {"setting": NAMES[0], "split": "ood_test", "grouping": "count", "group": "T5", "method": "dpo"}
    assert value(collected["times"], metric="HR@10", **key) == pytest.approx((rows["rank"] < 10)[last].mean())
    assert tables.select(collected["times"], grouping="count", group="T5")["examples"].unique().tolist() == [24]
    assert set(collected["times"]["setting"]) == {NAMES[0]}  # the other has no times
    assert set(collected["times"]["grouping"]) == set(evaluation.PERIODS)


def test_slopes_are_those_of_the_groups_in_the_tables(collected):
    key = {"setting": NAMES[1], "split": "iid_test", "grouping": "mass"}
    slopes = {}
    for method in ("causal_dpo", "dpo"):
        means = tables.select(collected["groups"], method=method, **key)["mean"]
        slopes[method] = value(collected["slopes"], "slope", method=method, **key)
        assert slopes[method] == pytest.approx(np.polyfit(range(5), means, 1)[0])
    assert set(tables.select(collected["slopes"], setting=NAMES[1])["grouping"]) == {"mass", "items"}
    assert set(tables.select(collected["slopes"], setting=NAMES[0])["grouping"]) == {"mass", "items", "count", "length"}
    pair = {"method": "causal_dpo", "baseline": "dpo", "setting": NAMES[1], "split": "iid_test"}
    found = value(collected["paired"], "difference", metric=evaluation.slope_metric("mass"), **pair)
    assert found == pytest.approx(slopes["causal_dpo"] - slopes["dpo"])


def test_an_empty_table_keeps_its_columns(one_setting, tmp_path):
    found = tables.collect_jobs(one_setting)
    assert found["validation"].empty
    for name, table in found.items():
        columns = tables.LATER.get(name, [])
        assert list(table)[: len(columns)] == columns  # training curves have more
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    assert tables.read(tmp_path)["validation"].empty


def test_a_single_method_has_no_differences_but_their_columns(jobs, collected, tmp_path):
    alone = [job for job in jobs if job.stage not in ("rank", "align") or job.method == "sft"]
    found = tables.collect_jobs(alone)
    assert found["paired"].empty and set(found["paired"]) == set(collected["paired"])
    tables.write_tables(tmp_path, found)
    read = tables.read(tmp_path)
    assert read["paired"].empty and list(read["paired"]) == tables.COLUMNS["paired"]
    assert set(tables.result_table(read, NAMES[0], "ood_test")["method"]) == {"SFT", "Random", "Most popular"}
    assert "SFT" in tables.summary_text(tmp_path)


def test_tables_of_an_earlier_version_are_read_without_the_later_ones(folder, tmp_path):
    for file in folder.glob("*.csv"):
        if file.stem not in tables.LATER:
            shutil.copy(file, tmp_path)
    metrics = pd.read_csv(folder / "metrics.csv")
    metrics[~metrics["metric"].isin(tables.LISTS)].to_csv(tmp_path / "metrics.csv", index=False)
    found = tables.read(tmp_path)
    assert all(found[name].empty for name in tables.LATER)
    for show in (tables.list_table, tables.slope_table, tables.times_table):
        assert show(found, NAMES[0], "ood_test").empty


# Selection


def test_selection_takes_the_best_on_validation_and_says_by_which_rule(tmp_path):
    jobs = setting(tmp_path, NAMES[1], seeds=(1,), examples=40, validation=True)
    found = tables.collect_jobs(jobs)
    assert set(found["validation"]["split"]) == {"validation"} and "validation" not in set(found["metrics"]["split"])
    rows = predictions_of(jobs, NAMES[1], "dpo", "validation")
    logp = tables.select(found["validation"], metric="target_logp")
    assert value(logp, method="dpo") == pytest.approx(rows["target_logp"].mean())
    trained = logp[~logp["method"].isin(evaluation.FLOORS)]
    best = trained.loc[trained["mean"].idxmax(), "method"]
    assert evaluation.select(found["validation"], "iid_validation_logp") == {NAMES[1]: best}
    text = tables.selection_text(found, "iid_validation_logp")
    assert text.startswith("Selected by `iid_validation_logp` (largest mean log-probability on IID validation): ")
    assert "LOOKS AT THE TEST" in tables.selection_text(found, "oracle_ood")


@pytest.mark.parametrize("rule", evaluation.SELECTION)
def test_every_selection_rule_takes_the_largest_of_its_own_rows(rule):
    by = evaluation.SELECTION[rule]
    rows = pd.DataFrame(
        [
            {"setting": s, "split": split, "method": m, "metric": metric, "mean": mean}
            for split in ("validation", "iid_test", "ood_test")
            for metric in ("target_logp", "NDCG@10")
            for s, m, mean in (("a", "x", 1), ("a", "y", 2), ("a", "popular", 9), ("b", "x", 5), ("b", "y", 5))
        ]
    )
    other = (rows["split"] != by.split) | (rows["metric"] != by.metric)
    rows.loc[other, "mean"] *= -1  # whoever reads another row chooses x of setting a
    assert evaluation.select(rows, rule) == {"a": "y", "b": "x"}


def test_selection_refuses_what_it_cannot_do(collected):
    with pytest.raises(StudyError, match="unknown selection rule 'best'"):
        evaluation.select(collected["metrics"], "best")
    with pytest.raises(StudyError, match="needs target_logp on validation"):
        evaluation.select(collected["metrics"], "iid_validation_logp")


# Comparisons


def test_every_method_is_compared_with_the_baselines_before_it():
    assert evaluation.compared(["sft", "dpo", "causal_dpo", "shuffled"]) == [
        ("dpo", "sft"),
        ("causal_dpo", "sft"),
        ("causal_dpo", "dpo"),
        ("causal_dpo", "shuffled"),
        ("shuffled", "sft"),
        ("shuffled", "dpo"),
    ]
    assert evaluation.compared(["dpo"]) == []


def test_a_method_is_compared_with_its_counterpart_at_the_same_value_of_a_sweep():
    methods = ["dmpo", "dmpo-k-1", "dynamic_dmpo-k-1", "dynamic_dmpo-k-5", "causal_negatives", "popularity_negatives"]
    assert evaluation.compared(methods) == [
        ("dynamic_dmpo-k-1", "dmpo-k-1"),
        ("causal_negatives", "popularity_negatives"),
    ]
    assert ("dmpo", "shuffled") not in evaluation.compared(["shuffled", "dmpo", "causal_dpo"])
    assert ("dmpo", "causal_dpo") in evaluation.compared(["shuffled", "dmpo", "causal_dpo"])


def test_differences_are_paired_and_corrected_within_their_metric(jobs, collected):
    paired = collected["paired"]
    key = {"setting": NAMES[1], "split": "ood_test"}
    means = {
        method: (predictions_of(jobs, NAMES[1], method, "ood_test")["rank"] < 10).mean() for method in ("dpo", "sft")
    }
    found = value(paired, "difference", metric="HR@10", method="dpo", baseline="sft", **key)
    assert found == pytest.approx(means["dpo"] - means["sft"])
    assert len(tables.select(paired, metric="HR@10", **key)) == 6
    for baseline, size in (("sft", 3), ("dpo", 2), ("shuffled", 1)):  # all methods against one of them
        family = tables.select(paired, metric="HR@10", baseline=baseline, **key)
        assert len(family) == size
        assert family.loc[family["p"].idxmin(), "p_holm"] == pytest.approx(min(1, size * family["p"].min()))
    assert (paired["p_holm"] >= paired["p"]).all() and (paired["p"] > 0).all()


def test_equivalence_and_mcnemar_stand_beside_the_differences(collected):
    paired = collected["paired"]
    slopes = paired["metric"].str.startswith("slope")
    tests = paired[["margin", "p_equivalent", "p_equivalent_holm"]]
    assert tests[slopes].isna().all(axis=None) and tests[~slopes].notna().all(axis=None)
    assert (tests["p_equivalent_holm"] >= tests["p_equivalent"])[~slopes].all()
    family = paired[
        paired["metric"].eq("target_logp") & paired["setting"].eq(NAMES[1]) & paired["split"].eq("ood_test")
    ]
    family = family[family["baseline"] == "sft"]
    first = family.loc[family["p_equivalent"].idxmin()]
    assert first["p_equivalent_holm"] == pytest.approx(min(1, 3 * first["p_equivalent"]))
    assert (paired["metric"].str.startswith("HR@") == paired["p_mcnemar"].notna()).all()
    key = {"setting": NAMES[1], "split": "ood_test"}
    level = value(collected["metrics"], method="sft", metric="NDCG@10", **key)
    key |= {"baseline": "sft"}
    assert value(paired, "margin", method="dpo", metric="NDCG@10", **key) == pytest.approx(0.1717 / 2 * level)
    # The shuffled control is SFT again, up to 0.01 nats; DPO lies 0.15 nats above, the margin is 0.08.
    key |= {"metric": "target_logp"}
    assert value(paired, "margin", method="dpo", **key) == pytest.approx(math.log(1 + 0.1717 / 2))
    assert value(paired, "p_equivalent_holm", method="shuffled", **key) < 0.01
    assert value(paired, "p_equivalent_holm", method="dpo", **key) > 0.9


def test_a_study_may_test_further_pairs(jobs):
    mine = [job for job in jobs if job.setting == NAMES[1]]
    paired = tables.collect_jobs(mine, [("shuffled", "causal_dpo")])["paired"]
    key = {"split": "ood_test", "metric": "HR@10", "method": "shuffled", "baseline": "causal_dpo"}
    reverse = {**key, "method": "causal_dpo", "baseline": "shuffled"}
    assert value(paired, "difference", **key) == pytest.approx(-value(paired, "difference", **reverse))


def test_training_curves_are_the_logs(jobs, collected):
    table = collected["training"]
    assert list(table.columns) == ["setting", "method", "seed", "iteration", "step", "preference_loss", "margin"]
    assert len(table) == 2 * 3 * 3 * 2  # settings, aligned methods, seeds, logged steps
    key = {"setting": NAMES[0], "method": "dpo", "seed": 2}
    assert tables.select(table, **key)["preference_loss"].tolist() == [0.7, 0.6]


def test_what_was_fine_tuned_to_be_aligned_is_no_row_of_diagnostics(one_setting):
    [sft] = [job for job in one_setting if job.stage == "sft"]
    own = SimpleNamespace(**{**vars(sft), "method": "dpo"})
    table = pd.DataFrame(tables.diagnostic_rows(NAMES[0], [*one_setting, own], []))
    assert Counter(table["method"]) == {"sft": 1, "dpo": 1, "causal_dpo": 1, "shuffled": 1, "environments": 1}


def test_where_candidates_are_ranked_the_floors_are_among_them(jobs):
    """Lists hold all candidates; the popular floor orders each example's own."""
    mine = [SimpleNamespace(**vars(job)) for job in jobs if job.setting == NAMES[1]]
    for job in mine:
        if job.stage == "rank":
            job.parameters = {"ranker": "candidates"}
    panel = next(iter(tables.read_panels(NAMES[1], mine, ["ood_test"])))
    assert panel.candidates.shape == (120, 20)
    inside = (panel.candidates == panel.targets[:, None]).any(1)
    floors = evaluation.floor_scores(panel)
    assert floors["HR@1"]["random"].mean() == pytest.approx(1 / 20)
    assert floors["target_logp"]["random"].mean() == pytest.approx(-math.log(20))
    order = {item: place for place, item in enumerate(evaluation.popular_order(panel.items).tolist())}
    first = [min(row, key=order.get) for row in panel.candidates.tolist()]
    hits = np.array(first) == panel.targets
    assert floors["HR@1"]["popular"][0][inside].tolist() == hits[inside].tolist()


def test_figures_show_the_core_of_a_study(collected):
    more = pd.concat([collected["paired"], collected["paired"].assign(method="s_dpo")], ignore_index=True)
    pd.testing.assert_frame_equal(tables.core(more), collected["paired"])
    assert set(tables.core(collected["shares"])["method"]) == set(collected["shares"]["method"])


def test_the_fabricated_amplification_is_found(collected):
    for split in tables.TEST_SPLITS:
        key = {"setting": NAMES[1], "split": split, "metric": evaluation.share_metric("mass", "G1")}
        assert value(collected["paired"], "low", method="dpo", baseline="sft", **key) > 0.05
        assert value(collected["paired"], "high", method="causal_dpo", baseline="dpo", **key) < 0
        assert value(collected["paired"], "p_holm", method="shuffled", baseline="sft", **key) > 0.05


def test_collecting_again_gives_the_same_tables(jobs, collected):
    for name, table in tables.collect_jobs(jobs).items():
        pd.testing.assert_frame_equal(table, collected[name])


def test_diagnostics_hold_every_training_run_with_its_scalars(collected):
    rows = tables.select(collected["diagnostics"], setting=NAMES[0])
    assert len(rows) == 3 * 4 + 1  # seeds x methods, and the map
    assert set(rows.loc[rows["method"] == "causal_dpo", "environments"]) == {4}
    assert rows.loc[rows["method"] == "dpo", "environments"].isna().all()
    lists = rows[rows["method"] != "environments"]
    assert lists["coverage_ood_test"].between(0, 1).all() and lists["gini_ood_test"].between(0, 1).all()


# Runs that are not as they should be


def damage(jobs, stage, method=None):
    return next(job for job in jobs if job.stage == stage and job.method == method).folder


def test_an_unfinished_run_is_named(one_setting):
    folder = damage(one_setting, "rank", "dpo")
    (folder / "summary.json").unlink()
    with pytest.raises(StudyError, match=rf"{folder.name}.*did not finish"):
        tables.collect_jobs(one_setting)


def test_a_missing_run_is_named(one_setting):
    folder = damage(one_setting, "align", "shuffled")
    shutil.rmtree(folder)
    with pytest.raises(StudyError, match=rf"{folder.name}.*does not exist"):
        tables.collect_jobs(one_setting)


def test_a_run_without_its_predictions_is_named(one_setting):
    folder = damage(one_setting, "rank", "sft")
    (folder / "predictions.parquet").unlink()
    with pytest.raises(StudyError, match=rf"{folder.name}/predictions.parquet is missing"):
        tables.collect_jobs(one_setting)


@pytest.mark.parametrize("change", ["fewer", "other targets"])
def test_predictions_of_other_examples_are_refused(one_setting, change):
    folder = damage(one_setting, "rank", "sft")
    rows = pd.read_parquet(folder / "predictions.parquet")
    rows = rows.iloc[1:] if change == "fewer" else rows.assign(target=rows["target"].iloc[0])
    rows.to_parquet(folder / "predictions.parquet")
    with pytest.raises(StudyError, match=rf"{folder.name} does not rank the 30"):
        tables.collect_jobs(one_setting)


def test_methods_of_different_seeds_cannot_be_paired(tmp_path):
    jobs = setting(tmp_path, NAMES[0], seeds=(1, 2), methods=("sft", "dpo"), examples=30)
    jobs = [job for job in jobs if (job.stage, job.method, job.seed) != ("rank", "dpo", 2)]
    with pytest.raises(StudyError, match="different seeds"):
        tables.collect_jobs(jobs)


def test_a_study_without_rankings_is_refused(tmp_path):
    write_run(tmp_path / NAMES[0] / "data-0", "data")
    data = SimpleNamespace(
        stage="data", setting=NAMES[0], seed=None, method=None, folder=tmp_path / NAMES[0] / "data-0"
    )
    with pytest.raises(StudyError, match="no ranking run"):
        tables.collect_jobs([data])


# Files and texts


def test_tables_are_written_read_and_printed_by_command(jobs, collected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        study, "load_study", lambda name: SimpleNamespace(name=name, folder=tmp_path / name, comparisons=())
    )
    monkeypatch.setattr(study, "jobs", lambda _: jobs)
    assert tables.main(["made-up"]) == 0
    assert "metrics.csv" in capsys.readouterr().out
    found = tables.read(tmp_path / "made-up")
    assert set(found) == set(collected)
    for name, table in found.items():
        pd.testing.assert_frame_equal(table, collected[name], check_dtype=False, rtol=1e-5)


def test_the_command_ends_with_one_sentence(capsys):
    assert tables.main(["no-such-study"]) == 1
    captured = capsys.readouterr()
    assert not captured.out and captured.err.startswith("error: unknown study 'no-such-study'")
    assert captured.err.count("\n") == 1


def test_a_folder_without_tables_is_refused_with_the_command_that_makes_them():
    with pytest.raises(StudyError, match="make study STUDY=nowhere"):
        tables.read("../figures/nowhere")


def test_a_damaged_table_is_named(folder, tmp_path):
    for file in folder.glob("*.csv"):
        shutil.copy(file, tmp_path)
    (tmp_path / "shares.csv").write_text("")
    with pytest.raises(StudyError, match=r"shares.csv cannot be read"):
        tables.read(tmp_path)


def test_figures_go_where_they_are_told(tmp_path):
    assert tables.figures_folder("", tmp_path / "quick").parts[-3:] == ("results", "figures", "quick")
    assert tables.figures_folder(str(tmp_path), tmp_path / "quick") == tmp_path


def test_summary_shows_every_method_metric_and_one_hits_worth(folder, collected):
    text = tables.summary_text(folder)
    for name in NAMES:
        assert f"{name}, IID test: 120 examples, 3 training seeds; one hit = 0.833 points" in text
    for label in ("SFT", "DPO", "CausalDPO", "Random", "Most popular", "HR@10 %", "NDCG@10 %", "log p (nats)"):
        assert label in text
    row = tables.select(collected["metrics"], setting=NAMES[1], split="ood_test", method="dpo", metric="HR@10").iloc[0]
    assert f"{100 * row['mean']:.2f} [{100 * row['low']:.2f}, {100 * row['high']:.2f}]" in text
    assert max(len(line) for line in text.splitlines()) < 150


def test_markdown_table_is_one_table_per_split(folder):
    text = tables.markdown_table(folder, NAMES[1])
    assert text.count("\n| --- |") == 2 and NAMES[0] not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert sum(line.startswith("| DPO |") for line in rows) == 2


def test_result_table_shows_all_metrics_on_request(folder):
    read = tables.read(folder)
    assert "HR@20 %" not in tables.result_table(read, NAMES[0], "ood_test")
    everything = tables.result_table(read, NAMES[0], "ood_test", everything=True)
    assert list(everything)[1:4] == ["log p (nats)", "causal NDCG@10 %", "HR@10 %"]
    assert {"HR@20 %", "NDCG@20 %", "share of G1 %"} <= set(everything)


def test_lists_are_described_apart_from_accuracy(folder):
    read = tables.read(folder)
    table = tables.list_table(read, NAMES[0], "ood_test").set_index("method")
    assert list(table) == ["ORRatio@10 %", "DivRatio@10 %", "coverage@10 %", "Gini@10", "popularity lift@10 %"]
    assert table.loc["Most popular", "Gini@10"] == "0.750" and table.loc["Most popular", "ORRatio@10 %"] == "30.00"
    assert "[" in table.loc["DPO", "popularity lift@10 %"]
    assert not set(table) & set(tables.result_table(read, NAMES[0], "ood_test", everything=True))
    wide = read["metrics"].assign(low=-0.2, high=1.7)
    table = tables.list_table({**read, "metrics": wide}, NAMES[0], "ood_test").set_index("method")
    assert table.loc["DPO", "coverage@10 %"].endswith("[0.00, 100.00]")
    assert table.loc["DPO", "Gini@10"].endswith("[0.000, 1.000]")
    assert table.loc["DPO", "popularity lift@10 %"].endswith("[-20, 170]")


def test_periods_and_slopes_are_shown_with_examples_and_intervals(folder):
    read = tables.read(folder)
    table = tables.times_table(read, NAMES[0], "ood_test")
    assert list(table)[:3] == ["metric", "method", "T1 (24)"] and len(table) == 2 * 4
    assert table["T5 (24)"].str.contains(r"\d\.\d\d \[").all()
    slopes = tables.slope_table(read, NAMES[0], "ood_test")
    assert "NDCG@10 over periods of equal length" in slopes and len(slopes) == 4


def test_one_seed_has_no_interval_over_seeds(one_setting):
    found = tables.list_table(tables.collect_jobs(one_setting), NAMES[0], "ood_test").set_index("method")
    assert re.fullmatch(r"\d+\.\d\d", found.loc["DPO", "ORRatio@10 %"])


def test_blocks_hold_every_column_once_and_no_empty_row():
    table = pd.DataFrame({"a": ["1", ""], "b": ["2", ""], "c": ["", "3"]}, index=["x", "y"])
    first, second = tables.blocks(table, columns=2)
    assert first.to_dict() == {"a": {"x": "1"}, "b": {"x": "2"}} and second.to_dict() == {"c": {"y": "3"}}


def test_diagnostics_table_has_means_per_method(folder):
    table = tables.diagnostics_table(tables.read(folder), NAMES[0])
    assert table.loc["environments", "CausalDPO"] == "4" and table.loc["environments", "DPO"] == ""


def test_histogram_counts_each_split_in_common_bins():
    table = pd.DataFrame({"split": ["train"] * 4 + ["ood_test"] * 2, "count": [1, 1, 10, 100, 100, 100]})
    found = tables.histogram(table, "count", bins=2, log=True)
    assert found["left"].tolist() == pytest.approx([1, 10, 1, 10])
    assert found["share"].tolist() == pytest.approx([0.5, 0.5, 0.0, 1.0])
    even = tables.histogram(table, "count", bins=3)
    assert even.groupby("split")["share"].sum().tolist() == pytest.approx([1, 1])


def test_fabricated_runs_look_like_runs(jobs):
    """The fixture may not drift from the records that a run leaves."""
    for job in jobs[:3]:
        config = json.loads((job.folder / "config.json").read_text())
        assert {"stage", "setting", "name", "parameters", "inputs"} == set(config)


def test_slopes_of_a_forest_plot_are_points_a_step():
    key = {"setting": "s", "split": "ood_test", "metric": "NDCG@10", "groups": 5}
    rows = [
        {**key, "grouping": g, "method": "dpo", "slope": -0.02, "low": -0.03, "high": 0.01} for g in ("mass", "count")
    ]
    found = tables.slopes_by_method({"slopes": pd.DataFrame(rows)}, "s", "mass")
    assert found.to_dict("records") == [
        {"name": "DPO", "method": "dpo", "split": "ood_test", "mean": -2.0, "low": -3.0, "high": 1.0}
    ]
