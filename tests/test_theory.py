"""The paper's statements on enumerable worlds: against autograd, differences, brute force and hand values."""

import itertools
import math

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import check_grad

from causaldpo_lib import identification, mmd, plots, theory
from causaldpo_lib.errors import StudyError

BETA, WEIGHTS = 0.7, np.array([0.4, -0.3])
DO, SEEN, FLAT = "p(y | do(x))", "p(y | x)", "flat"


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def worlds():
    return [theory.toy_world(), theory.toy_world(0.6, 0.9, -0.2, copies=(3, 1, 1, 2)), theory.toy_world(environments=1)]


def brute_loss(world, negatives, weights, reference):
    """Eq. 15 with whole policies, normaliser and all, one pair at a time."""
    rejected = np.broadcast_to(theory.NEGATIVES[negatives](world), world.choices.shape)
    users, environments, items = world.choices.shape
    total = torch.zeros((), dtype=torch.float64)
    for u, e in itertools.product(range(users), range(environments)):
        features = torch.tensor(np.stack([world.f_env[:, e], world.f_rest[:, u]], -1))
        ratio = torch.log_softmax(features @ weights, 0) - torch.log_softmax(features @ reference, 0)
        for w, y in itertools.product(range(items), repeat=2):
            chance = world.joint[u, e] * world.choices[u, e, w] * rejected[u, e, y]
            total = total - chance * torch.nn.functional.logsigmoid(BETA * (ratio[w] - ratio[y]))
    return total


# Proposition 3.1, first half


@pytest.mark.parametrize("negatives", theory.NEGATIVES)
@pytest.mark.parametrize("index", range(3))
def test_loss_and_gradient_are_those_of_whole_policies(index, negatives):
    world = worlds()[index]
    reference = torch.tensor([0.2, 0.5], dtype=torch.float64)
    weights = (torch.tensor(WEIGHTS) + reference).requires_grad_()
    loss = brute_loss(world, negatives, weights, reference)
    (gradient,) = torch.autograd.grad(loss, weights)
    pairs = theory.preference_pairs(world, negatives)
    assert theory.dpo_loss(WEIGHTS, pairs, BETA) == pytest.approx(loss.item(), abs=1e-12)
    assert theory.dpo_gradient(WEIGHTS, pairs, BETA) == pytest.approx(gradient.numpy(), abs=1e-12)


def test_half_of_eq_23_is_the_taylor_line():
    pairs, step = theory.preference_pairs(theory.toy_world(), "uniform"), 1e-5
    ahead, behind = (theory.dpo_loss(np.array([s, 0.0]), pairs, BETA) for s in (step, -step))
    slope = -(ahead - behind) / (2 * step)
    line = theory.linear_prediction(pairs, BETA, 0.1, 3, factor=0.5)
    assert line == pytest.approx(0.1 * slope * np.arange(4), abs=1e-10)
    assert theory.linear_prediction(pairs, BETA, 0.1, 3) == pytest.approx(2 * line)
    assert theory.descend(pairs, BETA, 0.1, 1)[1, 0] == pytest.approx(line[1], abs=1e-12)


def test_first_departure_counts_steps():
    path, line = np.array([0.0, 1.0, 1.9, 2.6]), np.array([0.0, 1.0, 2.0, 3.0])
    assert theory.first_departure(path, line) == 3 and theory.first_departure(path, line, 0.01) == 2
    assert theory.first_departure(path, 2 * line) == 1 and theory.first_departure(path, path) is None
    assert theory.stated(3) == "from step 3 on" and theory.stated(None) == "at no step shown"


def test_growth_ends_at_boost_over_beta_and_needs_no_confounder():
    # The optimum is log(p / q) / beta; with uniform q, the generating log-odds over beta.
    lines, table = theory.growth(theory.case_pairs(), BETA, 0.1, 50)
    limit = table["limit"]
    assert limit.iloc[:3].to_numpy() == pytest.approx(0.5 / BETA) and limit.iloc[3] == pytest.approx(-0.5 / BETA)
    curves = lines.pivot(index="step", columns="case", values="weight")[list(theory.CASES)].to_numpy()
    assert np.abs(curves[:, [1, 2]] - curves[:, [0]]).max() < 1e-12
    still = table.loc[["one environment, popularity negatives", "confounded, matched negatives"]]
    assert np.abs(still.to_numpy()).max() < 1e-12
    moved = table.loc["the same, genre tied to boost"]  # expected difference 0, first step 0, and yet
    assert abs(moved["E[f(y_w) - f(y_l)]"]) < 1e-12 and abs(moved["step 1"]) < 1e-12 and moved["step 50"] < -0.001


def test_a_positive_expected_difference_can_end_in_a_negative_weight():
    # Pairs that differ in f_E alone fix w_E: sigma(2 beta w_E) = 0.3. The others: sigma(2 beta (w_E + w_rest)) = 0.95.
    by_hand = np.array([math.log(0.3 / 0.7), math.log(0.95 / 0.05) - math.log(0.3 / 0.7)]) / (2 * BETA)
    assert theory.optimum(theory.SUPPRESSED, BETA) == pytest.approx(by_hand)
    assert theory.SUPPRESSED.probability @ theory.SUPPRESSED.difference[:, 0] == pytest.approx(1.02)
    path = theory.descend(theory.SUPPRESSED, BETA, 0.1, 3000)[:, 0]
    assert path[1] > 0 and path[-1] < -0.1


def test_pairs_that_features_separate_have_no_optimum():
    with pytest.raises(StudyError, match="no finite optimum"):
        theory.optimum(theory.Pairs(np.ones(1), np.ones((1, 2))), 1.0)
    with pytest.raises(StudyError, match="copies"):
        theory.toy_world(copies=(1, 1, 1))
    with pytest.raises(StudyError, match="did you mean 'uniform'"):
        theory.preference_pairs(theory.toy_world(), "unifrom")


def test_both_sides_of_eq_17_have_the_mean_p_of_e():
    world = theory.toy_world(0.7, copies=(2, 1, 1, 1))
    skewed = theory.World(np.array([[0.5, 0.1], [0.1, 0.3]]), world.choices, world.f_env, world.f_rest)
    for negatives in theory.NEGATIVES:
        assert theory.posterior_means(skewed, negatives) == pytest.approx(np.array([[0.6, 0.4], [0.6, 0.4]]))


def test_no_policy_wins_more_pairs_than_is_attainable():
    pairs = theory.preference_pairs(theory.toy_world(), "uniform")
    best = max(pairs.probability @ (pairs.difference @ w > 0) for w in np.random.default_rng(0).normal(size=(500, 2)))
    assert theory.attainable_wins(pairs) == pytest.approx(best)
    assert theory.attainable_wins(theory.SUPPRESSED) == pytest.approx(0.7 * 0.95 + 0.3 * 0.7)
    assert theory.attainable_wins(theory.Pairs(np.ones(1), np.ones((1, 2)))) == 1


# Proposition 3.1, second half


def brute_readings(f, mechanism, train, test, p_x, weight):
    """Every reading by loops over x, e and y."""
    (inputs, environments, items), logp = mechanism.shape, weight * f - np.log(np.exp(weight * f).sum(0))
    triples = [(e, y) for e in range(environments) for y in range(items)]
    found = dict.fromkeys([*theory.READINGS, "bound"], 0.0)
    for x in range(inputs):
        marginal = [
            [sum(p[x, e] * mechanism[x, e, y] for e in range(environments)) for y in range(items)]
            for p in (train, test)
        ]
        joint = [sum(p[x, e] * mechanism[x, e, y] * f[y, e] for e, y in triples) for p in (train, test)]
        product = [sum(p[x, e] * marginal[i][y] * f[y, e] for e, y in triples) for i, p in enumerate((train, test))]
        change = [(test - train)[x, e] * marginal[0][y] for e, y in triples]
        found["eq26"] += p_x[x] * abs(weight * sum(c * f[y, e] for c, (e, y) in zip(change, triples, strict=True)))
        found["log_probability"] += p_x[x] * abs(sum(c * logp[y, e] for c, (e, y) in zip(change, triples, strict=True)))
        found["joint"] += p_x[x] * abs(weight * (joint[1] - joint[0]))
        found["product"] += p_x[x] * abs(weight * (product[1] - product[0]))
        found["printed"] += p_x[x] * abs(weight * (product[1] - joint[0]))
        for e, y in triples:
            p = mechanism[x, e, y]
            found["kl"] += p_x[x] * test[x, e] * (p * (math.log(p) - logp[y, e]) if p else 0)
        distance = sum(abs(train[x, e] - test[x, e]) for e in range(environments)) / 2
        found["bound"] += p_x[x] * 2 * abs(f).max() * abs(weight) * distance
    return found


def test_readings_of_the_bound_match_loops():
    rng = np.random.default_rng(0)
    for _ in range(5):
        f, mechanism = rng.normal(size=(3, 2)), rng.dirichlet(np.ones(3), (2, 2))
        train, test = rng.dirichlet(np.ones(2), (2, 2))
        arguments = (f, mechanism, train, test, np.array([0.3, 0.7]), -1.3)
        found = theory.bound_readings(*arguments)
        assert found == pytest.approx(brute_readings(*arguments))
        assert 0 <= found["eq26"] <= found["bound"] and 0 <= found["joint"] <= found["bound"]


def test_each_counter_world_exceeds_the_bound():
    for name, arguments in theory.counter_worlds().items():
        assert brute_readings(*arguments)[name] > brute_readings(*arguments)["bound"] + 0.1
    # Independent y and E, one environment to 80 %: (2 s - 1)^2 falls from 1 to 0.36; the bound is 2 * 0.2.
    found = theory.bound_readings(*theory.counter_worlds()["product"])
    assert (found["product"], found["bound"]) == pytest.approx((0.64, 0.4))


def test_random_worlds_never_break_the_readings_that_are_proved():
    ratios = theory.random_bounds(300, np.random.default_rng(1))
    assert ratios[["eq26", "joint"]].max().max() <= 1 + 1e-9 and (ratios["printed"] > 1).any()


def test_drift_starts_without_one():
    table = theory.drifting(theory.toy_world(), 1.0, 3).pivot(index="drift", columns="case", values="value")
    assert table.loc[0, ["bound", "eq26", "joint", "product"]].abs().max() < 1e-12
    assert table.loc[1, "bound"] == pytest.approx(2 * 0.6)  # 2 C |w| TV with p(e = u | u) from 0.8 to 0.2


# Eq. 6


def test_backdoor_sum_is_the_simulated_intervention():
    rng = np.random.default_rng(0)
    model = identification.random_model(rng, 3, 3, 2)
    share, error = identification.simulated(model, 20_000, rng)
    assert identification.backdoor(model.joint()) == pytest.approx(identification.truncated(model))
    assert np.abs(share - identification.truncated(model)).max() < 5 * error.max()
    # Brute force: draw e, set x, draw y, one run at a time.
    runs = [rng.random() < model.p_y[1, rng.choice(3, p=model.p_e), 1] for _ in range(4000)]
    assert np.mean(runs) == pytest.approx(identification.truncated(model)[1, 1], abs=0.04)
    assert np.abs(identification.observed(model.joint()) - identification.truncated(model)).max() > 0.01


def test_environments_inferred_from_x_adjust_nothing():
    rng = np.random.default_rng(1)
    model = identification.random_model(rng, 2, 3)
    soft, hard = rng.dirichlet(np.ones(2), 3), np.eye(2)[[0, 0, 1]]
    seen = identification.observed(model.joint())
    assert identification.backdoor(identification.inferred(model, soft)) == pytest.approx(seen)
    assert np.isnan(identification.backdoor(identification.inferred(model, hard))).all()
    # The range is attained, and contains every way to fill the unseen pairs.
    joint = identification.inferred(model, hard)
    low, high = identification.fill_range(joint)
    prior, mass = joint.sum((1, 2)), joint.sum(2)
    for fill in ([1.0, 0.0], [0.0, 1.0], [0.3, 0.7]):
        known = [[joint[k, x] / mass[k, x] if mass[k, x] else np.array(fill) for x in range(3)] for k in range(2)]
        total = np.einsum("k,kxy->xy", prior, np.array(known))
        assert (low - 1e-12 <= total).all() and (total <= high + 1e-12).all()
    filled = np.einsum("k,kxy->xy", prior, np.array([[seen[x] for x in range(3)] for _ in range(2)]))
    assert filled == pytest.approx(seen)  # the conditional that has no k in it: again p(y | x)
    assert high - low == pytest.approx(np.repeat(1 - prior[[0, 0, 1]][:, None], 2, 1))


def test_conditional_information_worked_values():
    copy = np.zeros((2, 1, 2))
    copy[0, 0, 0] = copy[1, 0, 1] = 0.5
    assert identification.conditional_information(copy) == pytest.approx(math.log(2))
    assert identification.conditional_information(np.full((2, 3, 2), 1 / 12)) == pytest.approx(0, abs=1e-12)


def test_the_printed_separation_fails_and_the_needed_one_holds():
    found = identification.separations(20, np.random.default_rng(0))
    assert found["printed"] > 0.01 and found["needed"] < 1e-12


def test_a_trace_that_causes_nothing_lets_clusters_of_x_adjust():
    table = identification.trace_errors([0.0, 0.2, 0.5]).set_index("noise")
    # p(y = 1 | do(s = 0)) = (0.2 + 0.6) / 2, and p(y = 1 | s = 0) = 0.8 * 0.2 + 0.2 * 0.6.
    assert table.loc[0, "adjusted"] < 1e-12 and table.loc[0, "unadjusted"] == pytest.approx(0.12)
    assert table["adjusted"].is_monotonic_increasing and table.loc[0.5, "adjusted"] == pytest.approx(0.12)
    assert (table["undefined"] == 8).all()  # for do(x) itself the pairs never occur


def test_adjustments_table_agrees_where_it_should():
    model = identification.worked_models()["E moves inputs and choices"]
    hard = np.eye(2)
    table = identification.adjustments(model, hard, 0.8 * hard + 0.1, 500, np.random.default_rng(0))
    values = table.pivot(index="input", columns="estimate", values="value")
    assert values["Eq. 6, true environments"].to_numpy() == pytest.approx([0.7, 0.4])  # means of 0.9, 0.5 and 0.6, 0.2
    assert values["Eq. 6, soft clusters of x"].to_numpy() == pytest.approx(values["p(y | x)"].to_numpy())
    assert values["Eq. 6, one model for all"].to_numpy() == pytest.approx(values["p(y | x)"].to_numpy())
    assert values["p(y | x)"].to_numpy() == pytest.approx([0.8 * 0.9 + 0.2 * 0.5, 0.2 * 0.6 + 0.8 * 0.2])
    assert values["Eq. 6, hard clusters of x"].isna().all()


# Proposition 3.2


def test_mmd_is_the_library_s_and_its_gradient_is_not_eq_45():
    rng = np.random.default_rng(0)
    z, first = rng.normal(size=7), np.arange(7) < 3

    def value(points):
        kernel = theory.gaussian(np.asarray(points), 0.8)
        return theory.mmd_squared(kernel, first / 3, ~first / 4)

    memberships = torch.tensor(np.stack([first, ~first], -1).astype(float))
    assert value(z) == pytest.approx(mmd.mmd_squared(torch.tensor(z), memberships, 0.8).item(), abs=1e-12)
    assert check_grad(value, lambda points: theory.mmd_gradient(points, first, 0.8), z) < 1e-6
    assert check_grad(value, lambda points: theory.mmd_gradient(points, first, 0.8, printed=True), z) > 0.05


def test_the_printed_gradient_moves_environments_that_are_alike():
    z, first = np.array([-1.0, 0.5, 1.0, -1.0, 0.5, 1.0]), np.arange(6) < 3
    assert np.abs(theory.mmd_gradient(z, first, 1.0)).max() < 1e-12
    assert theory.followed(z, first, 1.0, False, 1.0, 50) == pytest.approx(z)
    assert theory.followed(z, first, 1.0, True, 1.0, 50).std() < 0.7 * z.std()


def test_world_penalty_is_the_double_loop():
    world, weights = worlds()[1], (0.9, -0.4)
    points, laws = [], [[], []]
    for (u, e), y in itertools.product(np.ndindex(2, 2), range(len(world.f_env))):
        scores = weights[0] * world.f_env[:, e] + weights[1] * world.f_rest[:, u]
        points.append(BETA * (scores[y] - math.log(np.exp(scores).sum()) + math.log(len(scores))))
        chance = world.joint[u, e] / world.joint[:, e].sum() * world.choices[u, e, y]
        laws[e].append(chance), laws[1 - e].append(0.0)
    gap = np.subtract(*laws)
    total = sum(
        a * b * math.exp(-((s - t) ** 2) / 2)
        for a, s in zip(gap, points, strict=True)
        for b, t in zip(gap, points, strict=True)
    )
    assert theory.world_penalty(world, weights, BETA) == pytest.approx(total) and total > 1e-4
    with pytest.raises(StudyError, match="1 environments"):
        theory.world_penalty(theory.toy_world(environments=1), weights, BETA)


def test_amplification_alike_in_all_environments_has_no_penalty():
    world = theory.toy_world()
    path = theory.descend(theory.preference_pairs(world, "uniform"), BETA, 0.3, 100)
    assert path[-1, 0] > 0.4 and max(theory.world_penalty(world, weights, BETA) for weights in path) < 1e-12
    table = theory.spurious_policies(5, BETA).set_index("policy")
    spurious, causal = table.loc["f_E alone"], table.loc["f_rest alone"]
    same = ["training margin", "DPO loss", "penalty"]
    assert spurious[same].tolist() == pytest.approx(causal[same].tolist()) and spurious["penalty"] < 1e-9
    assert spurious["test margin"] == -10 and causal["test margin"] == 10


def test_the_interventional_policy_is_penalised_and_the_flat_one_is_not():
    models = identification.worked_models()
    table = identification.compared(models).set_index(["model", "policy"])
    # Laws 0.8 / 0.2 of the two inputs, rewards log 2p: 0.6^2 times the squared MMD between the inputs' laws.
    points, q = np.log(2 * np.array([0.1, 0.9, 0.6, 0.4])), np.array([0.1, 0.9, -0.6, -0.4])
    by_hand = 0.36 * sum(
        a * b * math.exp(-((s - t) ** 2) / 2)
        for a, s in zip(q, points, strict=True)
        for b, t in zip(q, points, strict=True)
    )
    assert table.loc[("E moves inputs only", DO), "MMD²"] == pytest.approx(by_hand) and by_hand > 0.01
    assert table.loc[("E moves inputs only", DO), "MMD², x held"] < 1e-12
    assert table.loc[("E moves inputs and choices", DO), "MMD², x held"] > 0.01
    for name in models:
        assert table.loc[(name, FLAT), ["MMD²", "MMD², x held"]].max() < 1e-12
        assert table.loc[(name, DO), "causal KL"] < 1e-12 < 0.01 < table.loc[(name, FLAT), "causal KL"]
    assert len(identification.invariant_policies(models["E moves inputs only"], False, points=7)) == 1


def test_penalised_policies_minimise_the_objective():
    model = identification.worked_models()["E moves inputs and choices"]
    logits = np.array([0.7, -0.4])
    for weight in (0.0, 2.0):
        assert (
            check_grad(
                lambda z, w=weight: identification.objective(z, model, w)[0],
                lambda z, w=weight: identification.objective(z, model, w)[1],
                logits,
            )
            < 1e-6
        )
    at = [identification.objective(logits, model, w)[0] for w in (0, 3)]
    assert at[1] - at[0] == pytest.approx(3 * identification.penalty(model, logits))
    path = identification.penalised(model, [0, 1])
    seen = identification.observed(model.joint())
    assert path.loc[0, ["logit_0", "logit_1"]].to_numpy() == pytest.approx(np.log(seen[:, 1] / seen[:, 0]))
    grid = np.linspace(-3, 3, 61)
    least = min((identification.objective(np.array([a, b]), model, 1)[0], a, b) for a in grid for b in grid)
    assert path.loc[1, ["logit_0", "logit_1"]].to_numpy(float) == pytest.approx(least[1:], abs=0.1)
    truth = identification.truncated(model)
    flat = np.mean([(truth[x] * np.log(2 * truth[x])).sum() for x in range(2)])  # p(x) is half and half
    assert identification.causal_kl(model, np.zeros(2)) == pytest.approx(flat)
    assert (
        identification.best_tempering(model, path.loc[0, ["logit_0", "logit_1"]].to_numpy(float)) <= path.loc[0, "kl"]
    )


def test_random_paths_have_a_row_per_model():
    table = identification.random_paths(2, [1.0], np.random.default_rng(0))
    assert list(table) == ["start", "best", "last", "tempered"] and len(table) == 2
    assert (table["tempered"] <= table["start"]).all() and (table["best"] == table["last"]).all()


# Proposition 3.3


def test_bound_holds_in_the_ball_and_fails_outside():
    table = theory.coverage_table(5000, 50, np.random.default_rng(0)).set_index("loss")
    assert table.loc["f, norm 1", "holds"] >= 0.95 and (table["holds"].iloc[1:] < 0.05).all()
    # The witness attains the MMD; of norm 5 it is 5 times as far off.
    assert table["shift"].iloc[:2].tolist() == pytest.approx(
        [table["shift_term"].iloc[0], 5 * table["shift_term"].iloc[0]]
    )
    # E_p - E_q of sign(cos) with density proportional to 1 +- 0.9 cos.
    cosine = np.cos(2 * np.pi * np.arange(64) / 64)
    assert table.loc["step in e, no f", "shift"] == pytest.approx(2 * 0.9 * (np.sign(cosine) @ cosine) / 64)


def test_coverage_counts_exact_cases():
    # One draw of one environment: the mean is g(0) with probability q0; complexity of a single g = (1, 0) is q0.
    losses, p, q = np.array([[1.0, 0.0]]), np.array([0.0, 1.0]), np.array([0.5, 0.5])
    found = theory.bound_coverage(losses, p, q, 0.25, 1, 20_000, np.random.default_rng(0))
    assert found["error"] == pytest.approx(0.5, abs=0.02)
    assert found["bound"] == pytest.approx(2 * 0.5 + math.sqrt(2 * math.log(40)) + 0.25, abs=0.05)
    assert found["shift"] == 0.5 and found["holds"] == 1


def test_witness_has_its_norm():
    kernel = theory.gaussian(np.linspace(0, 1, 4), 0.5)
    values = theory.witness(kernel, np.array([1.0, -2.0, 0.5, 1.0]), 3.0)
    assert values @ np.linalg.solve(kernel, values) == pytest.approx(9)


def test_penalty_family_shifts_risk_without_penalty():
    table = theory.penalty_family([0.0, 1.0, 4.0], BETA)
    assert table["penalty"].max() < 1e-12 and table["distance"].tolist() == pytest.approx([math.sqrt(0.375)] * 3)
    # log(1 + e^m) - log(1 + e^-m) = m: R_2 - R_0 is the mean margin beta w E[f(y_w) - f(y_l)] of environment 0.
    expected = [0.5 * BETA * w * (2 / (1 + math.exp(-1)) - 1) for w in (0.0, 1.0, 4.0)]
    assert table["shift"].tolist() == pytest.approx(expected)


# Table and figures


def numbers(**changes):
    """A number for each line of the closing table that meets what is asked, but for the changes."""
    meeting = {"≤": 0.0, "<": -1.0, "≥": 2.0, ">": 2.0}
    return {name: meeting[line.check.sign] for name, line in theory.LINES.items()} | changes


def test_verdicts_name_a_departure_only_where_there_is_one():
    table = theory.verdicts(numbers(size=0.3, gradient=2e-9), tolerance=0.2)
    rows = table.set_index("statement")
    assert table["outcome"].sum() == len(theory.LINES) - 2 and (table["departs"] != "–").sum() == 2
    assert rows.loc["size after one step", ["asked", "departs"]].tolist() == [
        *("≤ 0.2", "off by 30%: 1 − σ(0) = 1/2 is missing")
    ]
    assert not rows.loc["gradient", "outcome"] and rows.loc["gradient", "asked"] == "≤ 1e-09"
    assert theory.verdicts(numbers(size=0.3), tolerance=0.4)["outcome"].all()
    printed = theory.verdict_table(table)
    assert printed["found"].iloc[0] == "2e-09 (asked: ≤ 1e-09)" and printed["outcome"].iloc[0] == "**fails**"
    assert printed["statement"].iloc[0] == "Eq. 19, gradient" and "*(reading)*" in printed["statement"].iloc[1]
    assert r"P_test(y\|x) ≈ P_train(y\|x)" in printed["statement"].tolist()  # of no equation, so without a mark


def test_a_line_without_a_number_is_refused():
    found = numbers()
    del found["hard"]
    with pytest.raises(StudyError, match="differ in hard, odd"):
        theory.verdicts({**found, "odd": 1.0}, 0.1)


def test_an_equation_counts_once_whatever_its_readings():
    equations = {line.equation for line in theory.LINES.values()} - {""}
    said = theory.verdict_takeaway(theory.verdicts(numbers(), 0.1))
    alone = [e for e in equations if not any(line.printed for line in theory.LINES.values() if line.equation == e)]
    assert f"Of {len(equations)} equations" in said and f"as printed: {len(equations) - len(alone)} (Eq. 19, " in said
    assert said.endswith("in no line above: 0 (none)" + said[said.index(". Where") :])
    bad = numbers(printed=3, kl=1, product=2, log_probability=2, linear=9.0, gradient=1.0, joint=1)
    said = theory.verdict_takeaway(theory.verdicts(bad, 0.1))
    assert r"Eq. 5 (GenErr as Eq. 26, y from one p(y\|x), assuming: p(y\|x,e) stays)" in said
    said_once = theory.verdict_takeaway(theory.verdicts(numbers(**{"backdoor, simulated": 6.0}), 0.1))
    assert "Eq. 6 (truncated factorisation)" in said_once  # printed lines that fail in part do not count as printed
    assert "in no line above: 2 (Eq. 19, Eq. 24)." in said and "need assumptions that the paper does not state." in said


def test_readings_count_the_checks_that_exceed_the_bound():
    rng = np.random.default_rng(0)
    drift, random = theory.drifting(theory.toy_world(), 1.0, 3), theory.random_bounds(50, rng)
    table = theory.reading_table(drift, random)
    assert table.loc[["eq26", "joint"], "exceeded"].tolist() == [0, 0] and list(table.index) == list(theory.READINGS)
    assert table.loc["printed", "exceeded"] == 3 and table.loc["product", "counter-example: GenErr"] == pytest.approx(
        0.64
    )
    calm = theory.reading_table(drift[drift["drift"] == 0], random.clip(upper=1.0))  # only counter-examples are left
    assert calm.loc["product", "exceeded"] == 1


def test_case_lines_draw_each_case():
    rows = pd.DataFrame({"case": list("aabb"), "step": [0, 1, 0, 1], "weight": [0.0, 1.0, 2.0, 3.0]})
    ax = plots.case_lines(plots.panels()[1][0, 0], rows, "step", "weight")
    assert [line.get_ydata().tolist() for line in ax.lines] == [[0, 1], [2, 3]]
    assert ax.lines[0].get_linewidth() > ax.lines[1].get_linewidth()


def test_adjustment_points_draw_values_and_ranges():
    rows = pd.DataFrame(
        [
            ("exact", 0, 0.3, 0.3, 0.3),
            ("exact", 1, 0.6, 0.5, 0.7),
            ("range", 0, np.nan, 0.1, 0.5),
            ("range", 1, np.nan, 0.2, 0.4),
        ],
        columns=["estimate", "input", "value", "low", "high"],
    )
    ax = plots.adjustment_points(plots.panels()[1][0, 0], rows)
    assert ax.get_legend_handles_labels()[1] == ["exact", "range"]
    exact, unknown = ax.containers
    assert exact[0].get_ydata().tolist() == [0.3, 0.6] and unknown[0].get_marker() == ""
    assert [segment[:, 1].tolist() for segment in unknown[2][0].get_segments()] == [
        pytest.approx([0.1, 0.5]),
        pytest.approx([0.2, 0.4]),
    ]
