"""What the penalty costs: the benchmark's parts make up its steps, ratios and powers are those of the given times."""

import copy
import json

import matplotlib

matplotlib.use("Agg")
import pytest
import torch

from benchmarks import cost
from causaldpo_lib import method_costs
from causaldpo_lib.errors import StudyError
from causaldpo_lib.paths import FIGURES
from causaldpo_lib.study import load_method

PARTS = {"collation": 0.001, "forward": 0.02, "loss": 0.001, "backward": 0.03, "optimiser": 0.008}


def made_up():
    """Times of two repetitions, the second twice as slow: ratios must not see that."""
    rows = []
    for method in cost.METHODS:
        how = cost.recipe(method)
        parts = {
            **PARTS,
            **({"penalty": 0.004} if how.weight else {}),
            **({"batch clustering": 0.01} if how.clusters else {}),
        }
        parts["total"] = sum(parts.values()) / 0.99
        needed = [part for part, used in (("reference", how.reference), ("clustering", how.clustering)) if used]
        rows.append({"method": method, "once": needed, "seconds": {p: [s, 2 * s] for p, s in parts.items()}})
    penalty = [
        {"batch": b, "environments": k, "seconds": [1e-6 * k * b**2, 2e-6 * k * b**2]} for k in (2, 8) for b in (16, 64)
    ]
    ranking = [
        {"ranker": r, "titles": n, "seconds": [1e-3 * n, 1e-3 * n]} for r in ("likelihood", "beam") for n in (50, 100)
    ]
    size = {"backbone": "tiny", "titles": 100, "examples": 320, "batch": 32, "steps": 2, "repeats": 2}
    once = {"reference": [0.3, 0.6], "clustering": [0.06, 0.12]}
    rest = {"penalty": penalty, "ranking": ranking, "parameters": 1_300_000, "threads": 1, "clock": "processor"}
    return {"size": size, "once": once, "methods": rows, **rest}


@pytest.fixture(scope="module")
def costs():
    return made_up()


# The benchmark


def test_the_benchmark_reports_parts_that_make_up_their_steps(tmp_path, capsys):
    output, threads = tmp_path / "cost.json", torch.get_num_threads()
    sizes = ["--backbone", "tiny-small", "--titles", "60", "--examples", "48", "--batch", "8", "--steps", "2"]
    more = [
        "--repeats",
        "2",
        "--batches",
        "16",
        "32",
        "--environments",
        "2",
        "--catalogues",
        "30",
        "60",
        "--prompts",
        "2",
    ]
    cost.main([*sizes, *more, "--output", str(output)])
    found = method_costs.read_costs(output)
    assert found["threads"] == 1 and torch.get_num_threads() == threads
    assert [row["method"] for row in found["methods"]] == list(cost.METHODS)
    for row in found["methods"]:
        parts = set(row["seconds"])
        assert set(PARTS) | {"total"} <= parts <= {*method_costs.PARTS, "total"}
        assert ("penalty" in parts) == (load_method(row["method"]).overrides["align"]["mmd_weight"] > 0)
        assert ("batch clustering" in parts) == (row["method"] == "mini_batch")
        assert all(len(times) == 2 and min(times) >= 0 for times in row["seconds"].values())
    # What is no part is the stopwatch itself: the parts of a median step are nearly all of it.
    shares = method_costs.accounted(found).set_index("method")["mean"]
    assert shares.between(0.85, 1.1).all(), shares
    assert len(found["penalty"]) == 2 and len(found["ranking"]) == 4
    assert "causal_dpo" in capsys.readouterr().out


def test_methods_need_what_their_formulas_need():
    recipes = {name: cost.recipe(name) for name in cost.METHODS}
    assert {name for name, how in recipes.items() if not how.reference} == {"cpo", "simpo"}
    assert {name for name, how in recipes.items() if how.clustering} == {
        *("causal_dpo", "dr_dpo_causal", "cpo_causal", "simpo_causal")
    }
    assert recipes["mini_batch"].clusters and recipes["mini_batch"].pairs == "ordered_sum"
    assert {how.loss for how in recipes.values()} == {"dpo", "cpo", "simpo", "dr_dpo"}


def test_a_step_of_the_benchmark_is_the_trainers_loss():
    """The timed computation has the gradients of the library's own loss with the penalty."""
    from causaldpo_lib.causal import Regulariser, causal_loss
    from causaldpo_lib.losses import LogProbs
    from causaldpo_lib.packing import pack, score_responses

    torch.manual_seed(0)
    bench = cost.Bench(cost.Size("tiny-small", titles=40, examples=40, batch=8))
    bench.once()
    models = [copy.deepcopy(bench.model).train() for _ in range(2)]
    index = list(range(8))
    start = bench.reference.clone()
    bench.reference = start + torch.randn(start.shape)  # not all rewards 0
    optimiser = torch.optim.SGD(models[0].parameters(), lr=1.0)
    before = {name: weights.detach().clone() for name, weights in models[0].named_parameters()}
    how = cost.recipe("causal_dpo")
    bench._step(how, models[0], None, optimiser, list(models[0].parameters()), index, cost.Stopwatch())
    batch = pack([bench.prompts[i] for i in index], [bench.responses[i] for i in index], bench.tokenizer.pad_token_id)
    scores, theirs = score_responses(models[1], batch), bench.reference[index]
    given = LogProbs(scores.sum_logps[:, 0], scores.sum_logps[:, 1:], theirs[:, 0], theirs[:, 1:])
    loss, logged = causal_loss("dpo", given, bench.memberships[index], Regulariser(weight=how.weight))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(models[1].parameters(), 1.0)
    assert logged["penalty"] > 1e-3
    for name, weights in models[1].named_parameters():
        moved = before[name] - dict(models[0].named_parameters())[name].detach()
        torch.testing.assert_close(moved, weights.grad, atol=1e-5, rtol=1e-3)


# Frames


def test_ratios_are_taken_within_a_repetition(costs):
    found = method_costs.ratios(costs).set_index(["method", "kind"])
    step = sum(PARTS.values())
    row = found.loc[("causal_dpo", "step")]
    assert (row["mean"], row["low"], row["high"]) == pytest.approx(((step + 0.004) / step,) * 3)
    # An epoch has ten steps; DPO's reference takes 0.3 s, and the clustering 0.06 s more.
    own, base = 10 * (step + 0.004) / 0.99, 10 * step / 0.99
    assert found.loc[("causal_dpo", "one epoch"), "mean"] == pytest.approx((own + 0.36) / (base + 0.3))
    assert found.loc[("causal_dpo", "three epochs"), "mean"] == pytest.approx((3 * own + 0.36) / (3 * base + 0.3))
    assert found.loc[("simpo", "one epoch"), "mean"] == pytest.approx(base / (base + 0.3))
    assert found.loc[("dpo", "step"), "mean"] == 1 and found.loc[("dpo", "step"), "paper"] == 1
    assert found.loc[("causal_dpo", "step"), "paper"] == pytest.approx(2971 / 2482)
    assert found.loc[("simpo_causal", "step"), "paper"] == pytest.approx(2280 / 2482)
    assert found.loc[("mini_batch", "step"), "paper"] != found.loc[("mini_batch", "step"), "paper"]  # NaN


def test_parts_and_powers_are_those_of_the_times(costs):
    profile = method_costs.profile(costs).set_index(["method", "part"])
    assert profile.loc[("dpo", "forward"), "mean"] == pytest.approx(30)  # ms, the median of 20 and 40
    assert (profile.loc[("dpo", "forward"), "low"], profile.loc[("dpo", "forward"), "high"]) == (20, 40)
    assert ("dpo", "penalty") not in profile.index and ("mini_batch", "batch clustering") in profile.index
    assert method_costs.accounted(costs)["mean"].tolist() == pytest.approx([0.99] * len(cost.METHODS))
    rows = method_costs.penalty_scaling(costs)
    assert method_costs.exponent(rows[rows["series"] == "K = 8"], "batch") == pytest.approx(2)
    assert method_costs.exponent(
        method_costs.ranking_scaling(costs).query("series == 'beam'"), "titles"
    ) == pytest.approx(1)
    once = method_costs.once_table(costs).set_index("once")
    assert once.loc["clustering and memberships", "ms an example"] == "0.281 [0.188, 0.375]"


def test_files_of_something_else_are_refused(tmp_path):
    with pytest.raises(StudyError, match=r"no file 'nowhere\.json': run"):
        method_costs.read_costs("nowhere.json")
    (tmp_path / "training.json").write_text(json.dumps({"size": {}, "cells": []}))
    with pytest.raises(StudyError, match=r"training\.json has no 'once'"):
        method_costs.read_costs(tmp_path / "training.json")


# Sentences


@pytest.mark.parametrize(("factor", "says"), [(1.5, "agree in that it is longer"), (0.5, "that it is shorter")])
def test_the_step_is_longer_or_shorter_or_neither(costs, factor, says):
    changed = copy.deepcopy(costs)
    rows = {row["method"]: row["seconds"] for row in changed["methods"]}
    rows["causal_dpo"]["total"] = [factor * each for each in rows["dpo"]["total"]]
    text = method_costs.step_takeaway(changed)
    assert says in text and f"takes {factor:.2f} [{factor:.2f}, {factor:.2f}] times" in text
    rows["causal_dpo"]["total"] = [0.9 * rows["dpo"]["total"][0], 1.1 * rows["dpo"]["total"][1]]
    assert "1.00 [0.90, 1.10] times that of DPO (the range over the repetitions holds 1)" in method_costs.step_takeaway(
        changed
    )


def test_epochs_stand_beside_the_printed_ones(costs):
    text = method_costs.epoch_takeaway(costs)
    assert "CausalDPO 1.11 [1.11, 1.11], printed 1.20 (above this range)" in text
    assert "SimPO 0.67 [0.67, 0.67], printed 0.58 (below this range)" in text
    assert "is another than printed." in text and "Algorithm 1, which clusters every mini-batch: 1.1" in text
    assert "power 2.00 (K = 2), 2.00 (K = 8) of the batch" in method_costs.penalty_takeaway(costs)
    assert "K = 8 takes 4.0 times as long as K = 2" in method_costs.penalty_takeaway(costs)
    assert "beam: 2 times the titles take 2.0 times as long (power 1.00" in method_costs.ranking_takeaway(costs)


# The notebook


def test_the_notebook_draws_and_explains_everything(costs, tmp_path, run_notebook):
    (tmp_path / "cost.json").write_text(json.dumps(costs))
    tables = str(FIGURES / "baselines")
    defaults, images, shown = run_notebook("16_variants_and_cost", tables=tables, cost=str(tmp_path / "cost.json"))
    assert (defaults["tables"], defaults["cost"]) == ("../figures/baselines", "../figures/bench/cost.json")
    kinds = ("differences-ml-100k-popularity", "parts", "ratios", "penalty", "ranking")
    assert images == {f"variants-{kind}" for kind in kinds}
    texts = [thing.data for thing in shown if hasattr(thing, "data")]
    assert sum("**Takeaway.**" in text for text in texts) == 5
