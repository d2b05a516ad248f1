"""DynamicPO: which rejected responses count, with which betas, and the share of the gradient they would get anyway."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from test_losses import RAGGED, drawn, toy

from causaldpo_lib.errors import StudyError
from causaldpo_lib.losses import (
    SELECTIONS,
    LogProbs,
    boundary_betas,
    boundary_negatives,
    example_losses,
    gradient_share,
    preference_loss,
)

DYNAMIC = ("dynamic_dmpo", "dynamic_s_dpo", "dynamic_mppo")


def five() -> LogProbs:
    """One prompt, five rejected responses, none above the chosen one."""
    rows = [-5.0], [[-6.0, -6.3, -9.0, -9.2, -12.0]], [-5.5], [[-6.4, -6.0, -9.1, -9.0, -11.5]]
    return LogProbs(*(torch.tensor(row, dtype=torch.float64) for row in rows))


def without_violations(values) -> LogProbs:
    values = torch.as_tensor(values, dtype=torch.float64)
    return LogProbs(values.amax(-1) + 1.0, values)


@pytest.mark.parametrize(
    ("name", "gamma", "options", "batch", "examples"),
    [
        ("dynamic_dmpo", 2.0, {}, 0.646945, [0.693147, 0.937331, 0.310356]),
        ("dynamic_dmpo", 6.0, {}, 0.664216, [0.693147, 0.916911, 0.382588]),
        ("dynamic_s_dpo", 2.0, {}, 0.805702, [0.693147, 1.413604, 0.310356]),
        ("dynamic_s_dpo", 6.0, {}, 0.821247, [0.693147, 1.388007, 0.382588]),
        ("dynamic_mppo", 2.0, {"probability": "sequence"}, 0.690587, [0.691829, 0.693299, 0.686632]),
        ("dynamic_mppo", 6.0, {"probability": "sequence"}, 0.691176, None),
        ("dynamic_mppo", 2.0, {"probability": "geometric"}, 0.683905, [0.697705, 0.686453, 0.667557]),
        ("dynamic_mppo", 6.0, {"probability": "geometric"}, 0.685915, None),
    ],
)
def test_worked_values(name, gamma, options, batch, examples):
    assert preference_loss(name, toy(), gamma=gamma, **options)[0].item() == pytest.approx(batch, abs=1e-6)
    if examples is not None:
        expected = torch.tensor(examples, dtype=torch.float64)
        torch.testing.assert_close(example_losses(name, toy(), gamma=gamma, **options), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("gamma", "expected"),
    [(2.0, [[0.619203], [0.552706, 0.548540], [0.777575]]), (6.0, [[0.530634], [0.509316, 0.507197], [0.587239]])],
)
def test_worked_boundary_and_betas(gamma, expected):
    """No violation in the first and third row, whose three clusters are their three points; two in the second."""
    boundary = boundary_negatives(toy())
    assert boundary.tolist() == [[True, False, False], [True, True, False], [False, True, False]]
    betas = boundary_betas(toy(), boundary, beta=1.0, gamma=gamma, alpha=0.5)
    assert betas[boundary].tolist() == pytest.approx([*itertools.chain(*expected)], abs=1e-6)


@pytest.mark.parametrize(
    ("gamma", "betas", "dmpo", "s_dpo"),
    [(2.0, [0.619203, 0.646395], 0.558829, 0.930665), (6.0, [0.527148, 0.534155], 0.580321, 0.955859)],
)
def test_worked_values_of_real_clusters(gamma, betas, dmpo, s_dpo):
    boundary = boundary_negatives(five())
    assert boundary.tolist() == [[True, True, False, False, False]]
    found = boundary_betas(five(), boundary, beta=1.0, gamma=gamma, alpha=0.5)[boundary]
    assert found.tolist() == pytest.approx(betas, abs=1e-6)
    assert preference_loss("dynamic_dmpo", five(), gamma=gamma)[0].item() == pytest.approx(dmpo, abs=1e-6)
    assert preference_loss("dynamic_s_dpo", five(), gamma=gamma)[0].item() == pytest.approx(s_dpo, abs=1e-6)


def top_clusters_by_search(values: list[float]) -> set[float]:
    """The least member of the top cluster in each best division of the distinct values into at most three intervals."""
    distinct = sorted(set(values), reverse=True)
    found = {}
    for cuts in itertools.combinations_with_replacement(range(1, len(distinct) + 1), 2):
        parts = [distinct[: cuts[0]], distinct[cuts[0] : cuts[1]], distinct[cuts[1] :]]
        members = [[v for v in values if v in part] for part in parts if part]
        cost = sum((v - sum(part) / len(part)) ** 2 for part in members for v in part)
        found.setdefault(min(parts[0]), []).append(cost)
    least = {minimum: min(costs) for minimum, costs in found.items()}
    return {minimum for minimum, cost in least.items() if cost < min(least.values()) + 1e-6}


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(-30, -1), min_size=1, max_size=9), st.integers(0, 4))
def test_clusters_are_the_best_of_all(values, missing):
    row = torch.tensor([values + [-2] * missing], dtype=torch.float64)
    mask = torch.arange(row.shape[1])[None] < len(values)
    boundary = boundary_negatives(LogProbs(torch.zeros(1, dtype=torch.float64), row, rejected_mask=mask))
    assert not (boundary & ~mask).any()
    chosen = [value for value, inside in zip(values, boundary[0].tolist(), strict=False) if inside]
    assert min(chosen) in top_clusters_by_search(values)
    assert sorted(chosen) == sorted(value for value in values if value >= min(chosen))  # equal values stay together


def test_clusters_are_those_of_a_well_started_kmeans():
    generator = torch.Generator().manual_seed(0)
    values = -20 * torch.rand(30, 12, generator=generator, dtype=torch.float64)
    boundary = boundary_negatives(without_violations(values)).numpy()
    for row, ours in zip(values.numpy(), boundary, strict=True):
        kmeans = KMeans(3, n_init=20, random_state=42).fit(row[:, None])
        np.testing.assert_array_equal(ours, kmeans.labels_ == kmeans.cluster_centers_[:, 0].argmax())


def test_clusters_keep_their_digits_far_from_zero():
    values = torch.tensor([[-1.0, -1.2, -3.0, -3.1, -6.0]]) - 1e4
    boundary = boundary_negatives(LogProbs(values.amax(-1) + 1.0, values))
    assert boundary.tolist() == [[True, True, False, False, False]]


def test_clusters_of_a_ragged_row_are_those_of_its_responses():
    values, mask = torch.tensor([[-9.0, -1.0, -6.0, -6.3, -12.0]]), torch.tensor([[True, False, True, True, True]])
    log_probs = LogProbs(torch.tensor([-5.0]), values, rejected_mask=mask)
    assert boundary_negatives(log_probs).tolist() == [[False, False, True, True, False]]
    for mask in ([[True, False, True, False, False]], [[False, False, True, False, False]]):
        log_probs = LogProbs(torch.tensor([-5.0]), values, rejected_mask=torch.tensor(mask))
        assert boundary_negatives(log_probs).tolist() == [[False, False, True, False, False]]


def test_a_tie_with_the_chosen_response_is_a_violation():
    log_probs = LogProbs(torch.tensor([-5.0]), torch.tensor([[-5.0, -5.1, -4.0]]))
    assert boundary_negatives(log_probs).tolist() == [[True, False, True]]


@pytest.mark.parametrize("name", DYNAMIC)
@pytest.mark.parametrize("rejected", [1, 2])
def test_few_rejected_responses_equal_to_the_chosen_are_finite(name, rejected):
    logp = torch.full((2, rejected), -3.0, requires_grad=True)
    lengths = torch.ones(2, rejected)
    batch = LogProbs(logp[:, 0], logp, logp.detach()[:, 0], logp.detach(), lengths[:, 0], lengths)
    loss, _ = preference_loss(name, batch)
    loss.backward()
    # beta_j = 0.5 beta: the margin 0 - 0 is all gamma's.
    expected = math.log(1 + rejected) if name == "dynamic_s_dpo" else math.log(2)
    assert loss.item() == pytest.approx(expected) and torch.isfinite(logp.grad).all()
    for gamma, beta in ((2.0, 0.5), (0.0, 1.0)):
        betas = boundary_betas(batch, torch.ones(2, rejected, dtype=torch.bool), 1.0, gamma, 0.5)
        assert betas.flatten().tolist() == pytest.approx([beta] * 2 * rejected)


@pytest.mark.parametrize("name", DYNAMIC)
def test_without_adjustment_the_loss_is_the_base_loss_of_the_boundary(name):
    batch = drawn(16, 6)
    boundary = boundary_negatives(batch)
    base = name.removeprefix("dynamic_")
    options = {} if base == "mppo" else {"beta": 1.0}
    expected = example_losses(base, replace(batch, rejected_mask=boundary), **options)
    assert 0 < boundary.float().mean() < 1
    torch.testing.assert_close(example_losses(name, batch, alpha=0.0), expected)


def test_betas_stay_within_their_range_and_fall_with_ambiguity():
    batch = drawn(32, 8)
    betas = boundary_betas(batch, boundary_negatives(batch), beta=0.4, gamma=2.0, alpha=0.5)
    assert betas.min() >= 0.2 and betas.max() <= 0.6
    # A rejected response nearer to the chosen one and farther from the rest is the more ambiguous.
    values = torch.tensor([[-5.5, -9.0, -9.0], [-7.0, -9.0, -9.0]])
    log_probs = LogProbs(torch.tensor([-5.0, -5.0]), values)
    near, far = boundary_betas(log_probs, boundary_negatives(log_probs), 1.0, 2.0, 0.5)[:, 0]
    assert near < far


@pytest.mark.parametrize("name", DYNAMIC)
def test_no_gradient_outside_the_boundary(name):
    batch = drawn(8, 5)
    batch.rejected.requires_grad_()
    gradient = torch.autograd.grad(preference_loss(name, batch)[0], batch.rejected)[0]
    boundary = boundary_negatives(batch)
    assert (gradient[boundary] > 0).all() and (gradient[~boundary] == 0).all()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("dmpo", {}),
        ("s_dpo", {"beta": 0.6}),
        *(
            ("mppo", {"variant": variant, "probability": probability})
            for variant in ("pair_mnm", "pair_mns", "pair_single")
            for probability in ("geometric", "sequence")
        ),
    ],
)
@pytest.mark.parametrize("mask", [None, RAGGED])
def test_gradient_share_is_autograds(name, options, mask):
    batch = replace(toy(), rejected_mask=mask)
    batch.rejected.requires_grad_()
    boundary = boundary_negatives(batch)
    gradient = torch.autograd.grad(preference_loss(name, batch, **options)[0], batch.rejected)[0].abs()
    expected = (gradient * boundary).sum(-1) / gradient.sum(-1)
    torch.testing.assert_close(gradient_share(name, batch, boundary, **options), expected)


@pytest.mark.parametrize("name", DYNAMIC)
def test_metrics_are_the_shares_under_the_loss_without_selection(name):
    batch = drawn(16, 6)
    boundary = boundary_negatives(batch)
    options = {"beta": 0.5}
    base = {} if name == "dynamic_mppo" else options
    _, metrics = preference_loss(name, batch, **options)
    share = gradient_share(name.removeprefix("dynamic_"), batch, boundary, **base).mean().item()
    assert metrics["boundary_share"] == pytest.approx(boundary.float().mean().item())
    assert metrics["gradient_share"] == pytest.approx(share)
    if name == "dynamic_dmpo":  # whose gradient is blind to difficulty
        assert share == pytest.approx(metrics["boundary_share"])


def test_gradient_share_of_underflowing_probabilities():
    batch = LogProbs(torch.tensor([-900.0]), torch.tensor([[-1000.0, -1001.0, -1100.0]]))
    boundary = torch.tensor([[True, False, False]])
    share = gradient_share("mppo", batch, boundary, probability="sequence")
    assert share.item() == pytest.approx(1 / (1 + math.exp(-1)))


def test_gradient_share_names_the_losses_it_knows():
    with pytest.raises(StudyError, match=r"unknown loss with a gradient share 'dpo' .*: choose from dmpo, s_dpo, mppo"):
        gradient_share("dpo", toy(), boundary_negatives(toy()))


def test_equal_values_share_a_cluster_in_any_order():
    values = [-6.0, -12.0, -6.0, -9.0]
    for order in itertools.permutations(range(4)):
        log_probs = without_violations([[values[j] for j in order]])
        assert boundary_negatives(log_probs)[0].tolist() == [values[j] == -6.0 for j in order]


# --- controls ---


@pytest.mark.parametrize("mask", [None, RAGGED], ids=["all", "ragged"])
@pytest.mark.parametrize("name", DYNAMIC)
def test_all_negatives_with_one_beta_are_the_loss_alone(name, mask):
    batch = toy() if mask is None else replace(toy(), rejected_mask=mask)
    base = {} if name == "dynamic_mppo" else {"beta": 1.0}
    found = example_losses(name, batch, selection="all", alpha=0.0)
    torch.testing.assert_close(found, example_losses(name.removeprefix("dynamic_"), batch, **base))
    assert not torch.allclose(found, example_losses(name, batch, alpha=0.0))  # the boundary is another selection


def test_random_negatives_are_as_many_as_the_boundary_and_any_of_the_rejected():
    rejected, mask = torch.tensor([[-6.0, -6.3, -9.0, -9.2, -12.0, -6.1]]), torch.tensor([[True] * 5 + [False]])
    batch = LogProbs(torch.tensor([-5.0]), rejected, rejected_mask=mask)
    size = boundary_negatives(batch).sum(-1)
    assert size.tolist() == [2]
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(6)
    for _ in range(2000):
        chosen = SELECTIONS["random"](batch, generator)
        assert chosen.sum(-1).equal(size) and not (chosen & ~mask).any()
        counts += chosen[0]
    assert (counts / 2000).tolist() == pytest.approx([2 / 5] * 5 + [0.0], abs=0.05)
    again = [SELECTIONS["random"](batch, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert again[0].equal(again[1])


@pytest.mark.parametrize(
    ("selection", "sentence"), [("random", "give a generator"), ("rndom", "unknown selection of negatives 'rndom'")]
)
@pytest.mark.parametrize("name", DYNAMIC)
def test_a_selection_that_cannot_be_made_is_refused(name, selection, sentence):
    with pytest.raises(StudyError, match=sentence):
        example_losses(name, toy(), selection=selection)


@pytest.mark.parametrize("name", ["dmpo", "s_dpo", "mppo"])
def test_losses_alone_report_what_the_boundary_is_and_gets(name):
    """Of the loss itself, with its own hyper-parameters: what DynamicPO says is lost."""
    metrics, boundary = preference_loss(name, toy())[1], boundary_negatives(toy())
    assert metrics["boundary_share"] == pytest.approx(boundary.double().mean().item())
    assert metrics["gradient_share"] == pytest.approx(gradient_share(name, toy(), boundary).mean().item())
