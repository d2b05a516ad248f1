"""Figures show exactly the values they are given, methods keep their look, reading notebooks draw everything."""

import io
from itertools import pairwise

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import PIL.Image
import pytest
from fabricated import setting

from causaldpo_lib import plots, tables
from causaldpo_lib.paths import PARAMS

READING = ("06_popularity_amplification", "07_group_wise_analysis")
METHODS = ("sft", "dpo", "causal_dpo", "shuffled")


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder of tables made from fabricated runs of two settings."""
    root = tmp_path_factory.mktemp("study")
    jobs = setting(root / "runs", "simulated-environment", truth=True) + setting(root / "runs", "ml-100k-popularity")
    for name, table in tables.collect_jobs(jobs).items():
        table.to_csv(root / f"{name}.csv", index=False)
    return root


def ax_of(fig_and_axes):
    return fig_and_axes[1][0, 0]


def shares(methods=METHODS):
    rows = [
        {"group": f"G{g}", "method": m, "share": 0.1 * g, "low": 0.1 * g - 0.02, "high": 0.1 * g + 0.03}
        for m in methods
        for g in range(1, 6)
    ]
    return pd.DataFrame(rows)


def test_bars_are_the_shares_in_percent():
    ax = plots.group_shares(ax_of(plots.panels()), shares())
    heights = [[bar.get_height() for bar in bars] for bars in ax.containers if hasattr(bars, "patches")]
    assert np.allclose(heights, [[10, 20, 30, 40, 50]] * 4)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["G1", "G2", "G3", "G4", "G5"]
    assert ax.get_ylim()[0] == 0 and "%" in ax.get_ylabel()


def test_references_are_no_bars():
    ax = plots.group_shares(ax_of(plots.panels()), shares(("training", "dpo", "targets")))
    assert len([c for c in ax.containers if hasattr(c, "patches")]) == 1
    assert set(ax.get_legend_handles_labels()[1]) == {"Training data", "Test targets", plots.look("dpo").label}


def test_bars_of_a_group_do_not_overlap():
    ax = plots.group_shares(ax_of(plots.panels()), shares())
    edges = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bars in ax.containers[::2] for bar in bars)
    assert all(right <= left + 1e-9 for (_, right), (left, _) in pairwise(edges))


def test_group_accuracy_shows_sizes_and_leaves_empty_groups_out():
    rows = [
        {"group": g, "method": m, "mean": 0.2, "low": 0.1, "high": 0.4, "examples": 1200}
        for m in METHODS
        for g in ("G1", "G2")
    ]
    table = pd.DataFrame(rows)
    table.loc[table["group"] == "G2", ["mean", "low", "high"]] = np.nan
    table.loc[table["group"] == "G2", "examples"] = 0
    fig, axes = plots.panels()
    ax = plots.group_ndcg(axes[0, 0], table)
    fig.canvas.draw()
    assert [text.get_text() for text in ax.get_xticklabels()] == ["G1\n1,200", "G2\n0"]
    assert ax.get_ylim()[1] > 40 and ax.get_ylim()[0] <= 0


def test_panels_that_share_an_axis_cut_nothing():
    one, other = shares().assign(split="iid_test"), shares().assign(split="ood_test")
    one["share"] *= 0.1
    one["low"], one["high"] = one["share"], one["share"]
    fig = plots.by_split(pd.concat([one, other]), plots.group_shares, "title")
    assert all(ax.get_ylim()[1] >= 53 for ax in fig.axes)
    assert [ax.get_ylabel() != "" for ax in fig.axes] == [True, False]
    assert [ax.get_title() for ax in fig.axes] == ["IID test", "OOD test"]


@pytest.mark.parametrize(("metric", "scale", "unit"), [("HR@10", 100, "(%)"), ("target_logp", 1, "(nats)")])
def test_forest_plot_has_a_row_per_method_in_the_metrics_unit(metric, scale, unit):
    rows = [
        {"split": s, "method": m, "metric": metric, "mean": 0.2, "low": 0.1, "high": 0.4}
        for s in ("iid_test", "ood_test")
        for m in (*METHODS, "random")
    ]
    ax = plots.metric_intervals(ax_of(plots.panels()), pd.DataFrame(rows))
    assert [text.get_text() for text in ax.get_yticklabels()] == [plots.look(m).label for m in (*METHODS, "random")]
    assert unit in ax.get_xlabel()
    points = [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 1 and line.get_marker() == "o"]
    assert np.allclose(points, 0.2 * scale) and len(points) == 10


def test_differences_show_no_effect():
    rows = [
        {"split": s, "method": "dpo", "baseline": "sft", "metric": "HR@10", "difference": 0.1, "low": 0.0, "high": 0.2}
        for s in ("iid_test", "ood_test")
    ]
    ax = plots.paired_differences(ax_of(plots.panels()), pd.DataFrame(rows))
    assert any(np.allclose(line.get_xdata(), 0) for line in ax.lines if len(line.get_xdata()) == 2)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["DPO − SFT"]
    assert "points" in ax.get_xlabel()


@pytest.mark.parametrize(("more", "panels"), [([], 1), (["group"], 2), (["true_environment", "period"], 3)])
def test_maps_have_a_panel_a_known_colouring(more, panels):
    points = pd.DataFrame(
        {"umap_x": [0.0, 1], "umap_y": [0.0, 1], **{key: ["a", "b"] for key in ["environment", *more]}}
    )
    fig = plots.umap_maps(points, "title")
    shown = [ax for ax in fig.axes if ax.axison]
    assert len(shown) == panels
    assert [ax.get_title() for ax in shown] == [plots.POINTS[by] for by in plots.POINTS if by in points]
    plt.close(fig)


def test_umap_shows_every_point_once_under_its_value():
    points = pd.DataFrame({"umap_x": [0.0, 1, 2, 3], "umap_y": [0.0, 1, 2, 3], "environment": [-1, 0, 1, 1]})
    ax = plots.umap_points(ax_of(plots.panels()), points, "environment")
    assert [len(drawn.get_offsets()) for drawn in ax.collections] == [1, 1, 2]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["none", "0", "1"]


def test_training_curves_draw_a_line_per_seed_and_one_label_per_method():
    log = pd.DataFrame({"step": [1, 2] * 4, "loss": [2.0, 1.0] * 3 + [2.0, np.nan]})
    log["method"], log["seed"] = ["dpo"] * 4 + ["causal_dpo"] * 4, [1, 1, 2, 2] * 2
    ax = plots.training_curves(ax_of(plots.panels()), log, "loss", "DPO loss (nats)")
    assert [len(line.get_xdata()) for line in ax.lines] == [2, 2, 2, 1]
    assert ax.get_legend_handles_labels()[1] == [plots.look("dpo").label, plots.look("causal_dpo").label]
    assert len(plots.training_curves(ax_of(plots.panels()), log[["step", "loss"]], "loss").lines) == 1


@pytest.mark.parametrize("dates", [False, True])
def test_histograms_outline_each_split(dates):
    rows = pd.DataFrame({"split": ["train"] * 3 + ["ood_test"] * 3, "time": [8.7e8, 8.8e8, 8.9e8] * 2})
    fig, axes = plots.panels()
    ax = plots.split_histograms(axes[0, 0], tables.histogram(rows, "time", bins=4), "time", dates=dates)
    fig.canvas.draw()
    assert len(ax.patches) == 2
    assert np.allclose([patch.get_data().values.sum() for patch in ax.patches], 100)


def test_methods_keep_distinct_looks_and_the_labels_of_their_files():
    looks = [plots.look(method) for method in METHODS]
    assert len({look.colour for look in looks}) == len({look.marker for look in looks}) == len(METHODS)
    for file in (PARAMS / "methods").glob("*.yaml"):
        assert f"label: {plots.look(file.stem).label}" in file.read_text("utf8")
    assert plots.look("brand_new").label == "brand_new" and plots.look("brand_new") == plots.look("brand_new")


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        ("share@10_mass_G1", "share of G1"),
        ("share@10_items_G5", "share of G5, groups of equally many items"),
        ("NDCG@10_mass_G5", "NDCG@10 on G5"),
        ("slope_NDCG@10_mass", "slope of NDCG@10 over the groups"),
        ("target_logp", "log-probability of the target"),
        ("NDCG@10", "NDCG@10"),
        ("causal_NDCG@10", "causal NDCG@10"),
    ],
)
def test_metrics_of_groups_have_names(metric, name):
    assert plots.metric_name(metric) == name


def test_a_picture_is_small_and_looks_the_same():
    """Up to the fringes of letters, in the colours that were drawn, and of the size that was asked for."""
    fig, axes = plots.panels(height=3)
    for method in ("sft", "dpo", "causal_dpo", "shuffled"):
        axes[0, 0].plot(np.random.default_rng(len(method)).normal(size=200), color=plots.look(method).colour)
    full = io.BytesIO()
    fig.savefig(full, dpi=90)
    shown = plots.picture(fig, dpi=90).data
    before, after = (np.asarray(PIL.Image.open(io.BytesIO(d)).convert("RGB"), float) for d in (full.getvalue(), shown))
    plt.close(fig)
    assert after.shape == before.shape and len(shown) < len(full.getvalue()) / 2
    assert np.abs(after - before).mean() < 1 and np.abs(after - before).max() < 64


def test_saving_writes_the_picture_and_its_values(tmp_path):
    table = shares()
    fig, axes = plots.panels()
    plots.group_shares(axes[0, 0], table)
    image = plots.save(fig, "motivation", table, tmp_path / "new")
    assert image.read_bytes().startswith(b"\x89PNG")
    pd.testing.assert_frame_equal(pd.read_csv(image.with_suffix(".csv")), table)
    again = plots.save(fig, "again", table, tmp_path / "new")
    assert again.read_bytes() == image.read_bytes()


@pytest.fixture
def executed(study, run_notebook):
    """Run a notebook's cells on the fabricated study; its images by stem, and everything that it displayed."""

    def run(notebook):
        defaults, images, shown = run_notebook(notebook, tables=str(study))
        assert images and defaults["tables"].startswith("../figures/")
        assert any(thing.data.startswith("**Takeaway.**") for thing in shown if hasattr(thing, "data"))
        return images, shown

    return run


@pytest.mark.parametrize("notebook", READING)
def test_reading_notebook_draws_and_explains_every_setting(notebook, executed):
    images, _ = executed(notebook)
    for name in ("simulated-environment", "ml-100k-popularity"):
        assert any(stem.endswith(name) for stem in images)


def test_group_notebook_shows_slopes_and_periods(executed):
    images, shown = executed("07_group_wise_analysis")
    assert {"ndcg-slopes-simulated-environment", "ndcg-times-simulated-environment"} <= images
    columns = {column for thing in shown if isinstance(thing, pd.DataFrame) for column in thing}
    assert {"T5 (24)", "NDCG@10 over groups of equal training mass"} <= columns
    assert any("T1 to T5." in thing.data for thing in shown if hasattr(thing, "data"))


def test_results_notebook_shows_outcomes_and_lists(executed):
    images, shown = executed("08_results_tables")
    for name in ("simulated-environment", "ml-100k-popularity"):
        assert any(stem.endswith(name) for stem in images)
    columns = {column for thing in shown if isinstance(thing, pd.DataFrame) for column in thing}
    assert {"MRR@10 %", "ORRatio@10 %", "popularity lift@10 %"} <= columns
    texts = [thing.data for thing in shown if hasattr(thing, "data")]
    assert any("| p (McNemar) |" in text and "| outcome |" in text for text in texts)
    assert any("Against a margin of" in text for text in texts)


def test_published_numbers_notebook_compares_the_settings_that_share_a_shift(executed):
    images, _ = executed("10_published_numbers")
    assert {"published-identities", "published-granularity", "published-effects-ml-100k-popularity"} == images


def test_hit_rate_curve_draws_percentages_and_the_floor():
    curve = pd.DataFrame({"iid_test": [0.1, 0.3], "ood_test": [0.0, 0.2]}, index=[1, 2])
    ax = plots.hit_rate_curve(ax_of(plots.panels()), curve, floor=np.array([0.01, 0.02]))
    drawn = {line.get_label(): line.get_ydata().tolist() for line in ax.lines}
    assert drawn == {"IID test": [10, 30], "OOD test": [0, 20], "random list": [1, 2]}


def test_response_points_keep_their_values_and_the_line_has_slope_1():
    table = pd.DataFrame({"response": ["chosen", "rejected"], "reference": [-3.0, -5.0], "policy": [-2.0, -6.0]})
    ax = plots.response_points(ax_of(plots.panels()), table)
    drawn = {
        line.get_label(): line.get_xydata().tolist() for line in ax.lines if line.get_label() in ("chosen", "rejected")
    }
    assert drawn == {"chosen": [[-3, -2]], "rejected": [[-5, -6]]}
    assert next(line for line in ax.lines if line.get_label() == "reward 0").get_slope() == 1


def test_membership_bars_stack_to_1_in_the_environments_colours():
    memberships = np.array([[0.7, 0.3], [0.4, 0.6], [0.2, 0.8]])
    ax = plots.membership_bars(ax_of(plots.panels()), memberships, np.array([0, 1, 1]))
    heights = np.array([[bar.get_height() for bar in bars] for bars in ax.containers])
    assert np.allclose(heights.T, memberships)
    assert np.allclose([bar.get_y() + bar.get_height() for bar in ax.containers[1]], 1)
    assert ax.get_xticks().tolist() == [0, 1.5]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "1"]


def test_kernel_matrix_shows_the_values_and_a_line_between_environments():
    kernel = np.array([[1, 0.5, 0.1], [0.5, 1, 0.2], [0.1, 0.2, 1]])
    ax = plots.kernel_matrix(ax_of(plots.panels()), kernel, np.array([2, 2, 5]))
    assert (ax.images[0].get_array() == kernel).all() and ax.images[0].get_clim() == (0, 1)
    assert {line.get_ydata()[0] for line in ax.lines if line.get_ydata()[0] == line.get_ydata()[1]} == {1.5}
    assert [text.get_text() for text in ax.get_yticklabels()] == ["2", "5"]


def test_pair_matrix_writes_each_pair_once():
    ax = plots.pair_matrix(ax_of(plots.panels()), np.array([[0, 0.1, 0.2], [0.1, 0, 0.3], [0.2, 0.3, 0]]))
    assert [(text.get_position(), text.get_text()) for text in ax.texts] == [
        ((0, 1), "0.10"),
        ((0, 2), "0.20"),
        ((1, 2), "0.30"),
    ]


def test_arrows_start_at_the_reward_and_end_where_it_is_pushed():
    table = pd.DataFrame({"environment": [0, 0, 4], "reward": [0.1, 0.5, -0.2], "push": [0.2, -0.1, 0.3], "mean": 0.25})
    ax = plots.reward_pulls(ax_of(plots.panels()), table)
    assert [(text.xy[0], text.xyann[0]) for text in ax.texts] == [
        (pytest.approx(reward + push), reward) for reward, push in zip(table["reward"], table["push"], strict=True)
    ]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["0", "4"]


def test_pushes_are_bars_for_dpo_and_points_for_the_sum():
    table = pd.DataFrame({"environment": [0, 1], "preference": [0.1, 0.2], "total": [0.3, -0.1]})
    ax = plots.pushes(ax_of(plots.panels()), table)
    assert [bar.get_height() for bar in ax.patches] == [0.1, 0.2]
    points = next(line for line in ax.lines if line.get_label() == "DPO and penalty")
    assert points.get_ydata().tolist() == [0.3, -0.1]


def test_variants_have_a_colour_and_a_label_each_however_many_runs():
    table = pd.DataFrame({"variant": ["a", "a", "b"], "run": [0, 1, 0], "step": [0, 0, 0], "value": [1.0, 2.0, 3.0]})
    ax = plots.variant_lines(ax_of(plots.panels()), table, "step", "value")
    assert ax.get_legend_handles_labels()[1] == ["a", "b"]
    assert [line.get_ydata().tolist() for line in ax.lines] == [[1], [2], [3]]
    assert len({line.get_color() for line in ax.lines}) == 2


def test_null_histogram_counts_all_draws_and_marks_both_values():
    ax = plots.null_histogram(ax_of(plots.panels()), np.linspace(0, 1, 100), observed=0.8, expected=0.5)
    assert sum(bar.get_height() for bar in ax.patches) == 100
    assert {line.get_label(): line.get_xdata()[0] for line in ax.lines} == {
        "expected of these": 0.5,
        "the batch's own memberships": 0.8,
    }


@pytest.mark.parametrize(
    ("method", "base", "label"),
    [
        ("dmpo-negatives_per_prompt-15", "dmpo", "DMPO, 15 negatives"),
        ("dmpo-negatives_per_prompt-1", "dmpo", "DMPO, 1 negative"),
        ("backdoor-memberships-oracle_environment", "backdoor", "Backdoor, true environments"),
        ("dynamic_dmpo-alpha-0.0", "dynamic_dmpo", "DynamicPO DMPO, alpha 0.0"),
        ("causal_dpo-mmd_weight-10.0", "causal_dpo", "CausalDPO, λ 10.0"),
        ("dpo-train_examples-512", "dpo", "DPO, train_examples 512"),
    ],
)
def test_a_swept_method_looks_as_its_method_and_says_its_value(method, base, label):
    assert plots.look(method)[:2] == plots.look(base)[:2] and plots.look(method).label == label


def test_what_only_resembles_a_swept_method_keeps_its_name():
    assert plots.look("brand_new-beta-1").label == "brand_new-beta-1" and plots.look("dpo-old").label == "dpo-old"


def counted():
    """A number over 1, 3 and 15 negatives of a loss and of the same with DynamicPO."""
    rows = [
        {
            "loss": loss,
            "split": split,
            "method": f"{prefix}{loss}",
            "negatives": n,
            "mean": n,
            "low": n - 1,
            "high": n + 2,
        }
        for split in ("iid_test", "ood_test")
        for loss in ("dmpo", "s_dpo")
        for prefix in ("", "dynamic_")
        for n in (15, 1, 3)
    ]
    return pd.DataFrame(rows)


def test_numbers_of_negatives_are_equally_spaced_and_ordered():
    table = counted().query("loss == 'dmpo' and split == 'iid_test'")
    levels = pd.DataFrame({"method": ["sft", "random"], "mean": [4, 5], "low": [3, 5], "high": [5, 5]})
    ax = plots.by_negatives(ax_of(plots.panels()), table, "HR@1 (%)", levels)
    alone, dynamic = (container.lines[0] for container in ax.containers)
    for line in (alone, dynamic):
        assert line.get_ydata().tolist() == [1, 3, 15] and np.allclose(np.diff(line.get_xdata()), 1)
    assert (dynamic.get_xdata() - alone.get_xdata() > 0.05).all()  # the bars do not hide each other
    assert [alone.get_linestyle(), alone.get_color()] == ["-", plots.look("dmpo").colour]
    assert dynamic.get_markerfacecolor() == "white" and dynamic.get_color() == plots.look("dynamic_dmpo").colour
    (bars,) = ax.containers[1].lines[2]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[0, 3], [2, 5], [14, 17]]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "3", "15"]
    assert ax.get_legend_handles_labels()[1] == ["SFT", "Random"]


def test_there_is_a_panel_per_loss_and_split_and_one_legend():
    fig = plots.by_loss(counted(), lambda ax, rows: plots.by_negatives(ax, rows, "x (%)"), "title", rows="split")
    plots.dynamic_legend(fig)
    titles = [f"{loss}, {split}" for split in ("IID test", "OOD test") for loss in ("DMPO", "S-DPO")]
    assert [ax.get_title() for ax in fig.axes] == titles
    assert [ax.get_ylabel() for ax in fig.axes] == ["x (%)", "", "x (%)", ""]
    assert [ax.get_xlabel() for ax in fig.axes] == ["", "", *["negatives per prompt"] * 2]
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["loss alone", "with DynamicPO"]
    fig = plots.by_loss(counted(), lambda ax, rows: ax.set_xlabel(f"{len(rows)} rows"), "title")
    assert [(ax.get_title(), ax.get_xlabel()) for ax in fig.axes] == [("DMPO", "12 rows"), ("S-DPO", "12 rows")]


def test_shares_have_a_line_and_a_band_each():
    table = pd.DataFrame({"quantity": ["boundary_share", "gradient_share"] * 2, "step": [1, 1, 2, 2]})
    table["mean"], table["low"], table["high"] = [10, 40, 12, 30], [9, 38, 11, 29], [11, 41, 14, 33]
    ax = plots.share_curves(ax_of(plots.panels()), table)
    drawn = {line.get_label(): line.get_ydata().tolist() for line in ax.lines}
    assert drawn == {"share of the negatives": [10, 12], "share of the gradient": [40, 30]}
    assert [band.get_paths()[0].get_extents().y1 for band in ax.collections] == [14, 41]
    assert ax.get_ylim() == (0, 100)


def test_named_intervals_have_a_row_per_name():
    table = pd.DataFrame({"name": ["one", "other"] * 2, "method": ["sft", "dmpo"] * 2})
    table["split"] = ["iid_test"] * 2 + ["ood_test"] * 2
    table["mean"], table["low"], table["high"] = [20, 21, 15, 16], [19, 20, 14, 15], [22, 23, 17, 18]
    ax = plots.named_intervals(ax_of(plots.panels()), table, "HR@1 (%)")
    assert [text.get_text() for text in ax.get_yticklabels()] == ["one", "other"] and ax.get_xlabel() == "HR@1 (%)"
    points = [container.lines[0] for container in ax.containers]
    assert [point.get_xdata()[0] for point in points] == [20, 21, 15, 16]
    assert [round(point.get_ydata()[0]) for point in points] == [0, 1, 0, 1]
    assert [point.get_markerfacecolor() == "white" for point in points] == [True, True, False, False]
    assert [point.get_color() for point in points] == [plots.look(m).colour for m in table["method"]]
    assert ax.get_legend_handles_labels()[1] == ["IID test", "OOD test"]
