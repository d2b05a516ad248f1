"""Pseudo-environments: Eq. 8's worked values, recovery of planted clusters, and what must not pass silently."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import DBSCAN
from sklearn.metrics import adjusted_mutual_info_score

from causaldpo_lib.environments import (
    GRADIENTS,
    MEMBERSHIPS,
    BatchEnvironments,
    EnvironmentInference,
    knee,
    membership_diagnostics,
    soft_memberships,
    temperature_rule,
)
from causaldpo_lib.errors import StudyError
from causaldpo_lib.mmd import mmd_squared


def test_soft_memberships_worked_values():
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0], [4.0, 0.0], [5.0, 0.0]])
    p = soft_memberships(z, torch.tensor([[0.5, 0.0], [4.5, 0.0]]))
    torch.testing.assert_close(p[:, 0], torch.tensor([0.982014, 0.952574, 0.047426, 0.017986]), atol=1e-6, rtol=0)
    torch.testing.assert_close(p.sum(1), torch.ones(4))


@settings(deadline=None, max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 6), st.integers(1, 8)),
    scale=st.floats(1e-3, 1e3),
    temperature=st.floats(1e-3, 1e3),
)
def test_soft_memberships_are_distributions_whose_order_is_that_of_the_distances(shape, scale, temperature):
    count, environments, width = shape
    generator = torch.Generator().manual_seed(count)
    z = scale * torch.randn(count, width, generator=generator)
    centres = scale * torch.randn(environments, width, generator=generator)
    p = soft_memberships(z, centres, temperature)
    torch.testing.assert_close(p.sum(1), torch.ones(count))
    distances = (z[:, None] - centres).norm(dim=-1)
    assert (p >= 0).all() and (p.gather(1, distances.argmin(1, keepdim=True))[:, 0] >= p.max(1).values - 1e-3).all()


def test_temperature_rule_takes_the_smaller_median():
    z = torch.tensor([[0.0], [1.0], [9.0]])
    assert temperature_rule(z, torch.tensor([[0.5], [9.5]])) == pytest.approx(0.5)  # gaps 9, 8, 8
    assert temperature_rule(z, torch.tensor([[4.0], [-4.5], [30.0]])) == pytest.approx(2.5)  # nearest 4, 3, 5
    assert temperature_rule(z, torch.tensor([[1.0], [1.0]])) == pytest.approx(1e-6)


def planted(separation: float, count: int = 300, seed: int = 0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=count)
    centres = separation * rng.normal(size=(3, 40))
    return (centres[labels] + rng.normal(size=(count, 40))).astype(np.float32), labels


def test_separate_clusters_are_recovered():
    states, labels = planted(4.0)
    inference = EnvironmentInference(components=8, min_samples=(10,)).fit(states)
    p = inference.memberships(states)
    assert inference.method == "dbscan(min_samples=10)" and p.shape == (300, 3)
    assert adjusted_mutual_info_score(labels, p.argmax(1)) > 0.99
    assert inference.diagnostics(p)["weight_distance"] > 1.9


def test_without_density_k_means_takes_over_and_says_so():
    states = np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)
    inference = EnvironmentInference(min_samples=(20,)).fit(states)
    assert inference.method == "kmeans(k=4)"
    p = inference.memberships(states)
    assert p.shape == (200, 4)
    # The rows must stay informative: a flat membership matrix would switch the penalty off.
    assert inference.diagnostics(p)["membership_entropy"] < 0.95


def test_same_states_give_the_same_memberships_whatever_else_is_asked():
    states, _ = planted(1.0)
    inference = EnvironmentInference(seed=3).fit(states)
    torch.testing.assert_close(inference.memberships(states)[:7], inference.memberships(states[:7]))
    again = EnvironmentInference(seed=3).fit(states)
    torch.testing.assert_close(again.memberships(states), inference.memberships(states))


def test_diagnostics_tell_hard_flat_and_single_environments_apart():
    hard = membership_diagnostics(torch.eye(2).repeat(10, 1))
    flat = membership_diagnostics(torch.full((20, 2), 0.5))
    assert hard["membership_entropy"] == pytest.approx(0.0, abs=1e-9) and hard["weight_distance"] == pytest.approx(2.0)
    assert hard["effective_sample_size"] == pytest.approx(0.5) and hard["balance"] == pytest.approx(1.0)
    assert flat["membership_entropy"] == pytest.approx(1.0) and flat["weight_distance"] == pytest.approx(0.0)


def test_identical_states_are_refused():
    with pytest.raises(StudyError, match="prompt states are identical"):
        EnvironmentInference().fit(torch.ones(10, 4))
    with pytest.raises(StudyError, match="not fitted"):
        EnvironmentInference().memberships(torch.ones(10, 4))


def test_states_that_are_no_numbers_are_refused_by_their_row():
    states = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    states[[7, 9], 1] = torch.tensor([float("nan"), float("inf")])
    with pytest.raises(StudyError, match="the states of 2 prompts, first of row 7, are not numbers"):
        EnvironmentInference().fit(states)


def test_knee_of_a_bent_curve():
    assert knee(np.concatenate([np.linspace(0, 1, 90), np.linspace(1, 20, 10)])) == pytest.approx(1.0, abs=0.2)
    assert knee(np.full(5, 2.0)) == 2.0


def test_diagnostics_of_a_single_environment_and_of_one_without_weight():
    single = membership_diagnostics(torch.ones(6, 1))
    assert single["environments"] == 1 and single["weight_distance"] == single["membership_entropy"] == 0.0
    absent = membership_diagnostics(torch.eye(3)[[0, 0, 1, 1]])
    assert absent["environments"] == 3 and absent["weight_distance"] == 2.0  # what is absent is compared with nothing
    worked = membership_diagnostics(torch.tensor([[0.8, 0.2], [0.3, 0.7], [0.6, 0.4]]))
    # a_1 = (8, 3, 6) / 17, a_2 = (2, 7, 4) / 13
    assert worked["effective_sample_size"] == pytest.approx(min(17**2 / 109, 13**2 / 69) / 3)
    assert worked["weight_distance"] == pytest.approx(8 / 17 - 2 / 13 + 7 / 13 - 3 / 17 + 6 / 17 - 4 / 13)


@pytest.mark.parametrize("name", MEMBERSHIPS)
def test_every_kind_of_memberships_is_a_seeded_distribution_per_row(name):
    states, labels = planted(3.0, count=120)
    states, labels = torch.as_tensor(states), [f"period {label}" for label in labels]
    found = MEMBERSHIPS[name](states, labels, 5)
    assert found.rows.ndim == 2 and len(found.rows) == 120 and not found.rows.requires_grad
    torch.testing.assert_close(found.rows.sum(1), torch.ones(120))
    assert (found.rows >= 0).all() and found.diagnostics["environments"] == found.rows.shape[1] >= 2
    assert {"environment_method", "noise_share", "weight_distance"} <= set(found.diagnostics)
    torch.testing.assert_close(MEMBERSHIPS[name](states, labels, 5).rows, found.rows)


def test_shuffled_is_one_permutation_of_the_inferred_rows():
    states = planted(3.0)[0]
    inferred, shuffled = (MEMBERSHIPS[name](states, None, 4).rows for name in ("inferred", "shuffled"))
    order = torch.randperm(300, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(shuffled, inferred[order], atol=0, rtol=0)
    assert adjusted_mutual_info_score(inferred.argmax(1), shuffled.argmax(1)) < 0.05


def test_random_centres_are_training_states_with_the_same_temperature_rule():
    states = planted(3.0)[0]
    inferred, found = (MEMBERSHIPS[name](states, None, 4) for name in ("inferred", "random_centres"))
    z, centres = found.inference.features(states), found.inference.centres
    assert len(centres) == len(inferred.inference.centres) and found.diagnostics["environment_method"] == "random(k=3)"
    assert all((z == centre).all(1).any() for centre in centres)
    assert found.inference.temperature == temperature_rule(z, centres)
    torch.testing.assert_close(found.rows, soft_memberships(z, centres, found.inference.temperature))


def test_given_environments_are_hard_in_sorted_order_and_must_be_there():
    states = torch.zeros(4, 2)
    found = MEMBERSHIPS["given"](states, ["late", "early", "late", "middle"], 0)
    assert found.rows.argmax(1).tolist() == [1, 0, 1, 2] and found.rows.max(1).values.tolist() == [1.0] * 4
    for labels in (None, ["a", "b"], ["a", "b", None, "a"], [0.0, 1.0, float("nan"), 1.0]):
        with pytest.raises(StudyError, match="column 'environment' of every training row"):
            MEMBERSHIPS["given"](states, labels, 0)
    with pytest.raises(StudyError, match="all training rows have environment 'a'"):
        MEMBERSHIPS["given"](states, ["a"] * 4, 0)


def clustered_batch():
    return torch.as_tensor(planted(4.0, count=48)[0])


@pytest.mark.parametrize("options", [{}, {"eps": 3.0, "min_samples": 5, "temperature": 2.0}])
def test_batch_environments_are_algorithm_1_by_hand(options):
    states = clustered_batch()
    module = BatchEnvironments(40, 8, seed=1, **options)
    p = module(states)
    z = (states @ module.projection.weight.T + module.projection.bias).detach()
    neighbours = np.sort(torch.cdist(z, z).numpy(), 1)[:, 4]
    labels = DBSCAN(eps=options.get("eps", knee(neighbours)), min_samples=options.get("min_samples", 4)).fit_predict(z)
    centres = torch.stack([z[labels == k].mean(0) for k in range(labels.max() + 1)])
    assert len(centres) >= 2
    torch.testing.assert_close(p, soft_memberships(z, centres, options.get("temperature", 1.0)), atol=1e-4, rtol=1e-4)
    diagnostics = module.diagnostics(p)
    assert diagnostics["environments"] == len(centres)
    assert diagnostics["noise_share"] == pytest.approx((labels < 0).mean())


def test_only_the_papers_gradient_reaches_the_projection_and_the_states():
    for gradient in GRADIENTS:
        module, states = BatchEnvironments(40, 8, gradient), clustered_batch().requires_grad_()
        outputs = torch.randn(48, generator=torch.Generator().manual_seed(0), requires_grad=True)
        mmd_squared(outputs, module(states), 1.0).backward()
        assert outputs.grad.abs().sum() > 0
        reached = [
            tensor.grad is not None and bool(tensor.grad.abs().sum() > 0)
            for tensor in (module.projection.weight, states)
        ]
        assert reached == [GRADIENTS[gradient]] * 2


def test_the_papers_gradient_collapses_the_memberships_and_the_diagnostics_show_it():
    states, labels = planted(4.0, count=48)
    states = 0.2 * torch.as_tensor(states)  # distances near Eq. 8's scale: soft memberships, which can be moved
    outputs = torch.as_tensor(labels).float()  # never change: environments go on differing in them
    module = BatchEnvironments(40, 8, "paper", seed=1)
    optimizer = torch.optim.Adam(module.parameters(), 0.01)

    def step():
        p = module(states)
        penalty = mmd_squared(outputs, p, 1.0)
        if penalty.requires_grad:
            optimizer.zero_grad()
            penalty.backward()
            optimizer.step()
        return penalty.item(), module.diagnostics(p)["weight_distance"]

    with pytest.warns(UserWarning, match="a single environment"):
        steps = [step() for _ in range(25)]
    assert steps[0][0] > 0.5 and steps[0][1] > 1.0
    assert steps[-1] == (0.0, 0.0) and module.single_batches > 3  # no way back


def test_a_batch_without_clusters_is_one_environment_and_says_so_once():
    states = torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
    module = BatchEnvironments(40, 8, "paper", eps=1e-3)
    with pytest.warns(UserWarning, match=r"0 clusters among the 12 states of a batch \(100% noise\)"):
        p = module(states)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = module(states)
        assert mmd_squared(states[:, 0], again).item() == 0.0
    assert p.tolist() == again.tolist() == [[1.0]] * 12 and module.single_batches == 2
    with pytest.warns(UserWarning, match="1 cluster among the 5 states"):
        assert BatchEnvironments(40, 8)(states[:1].repeat(5, 1)).shape == (5, 1)
    with pytest.warns(UserWarning, match="0 clusters among the 1 states"):
        assert BatchEnvironments(40, 8)(states[:1]).shape == (1, 1)


def test_batch_environments_start_from_their_seed_and_travel_in_a_state_dict():
    state = torch.get_rng_state()
    one, other = BatchEnvironments(40, 8, seed=3), BatchEnvironments(40, 8, seed=4)
    torch.testing.assert_close(one.projection.weight, BatchEnvironments(40, 8, seed=3).projection.weight)
    assert not torch.equal(one.projection.weight, other.projection.weight)
    other.load_state_dict(one.state_dict())
    expected = one(clustered_batch())
    torch.testing.assert_close(expected, other(clustered_batch()))
    assert torch.equal(torch.get_rng_state(), state)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(other(clustered_batch()), expected, atol=0, rtol=0)
    with pytest.raises(StudyError, match="unknown membership gradient 'papr'"):
        BatchEnvironments(40, 8, "papr")


def test_two_states_are_the_fewest_that_can_be_clustered():
    found = EnvironmentInference().fit(torch.tensor([[0.0, 1.0], [3.0, 1.0]]))
    assert len(found.centres) == 2
    with pytest.raises(StudyError, match="identical"):
        EnvironmentInference().fit(torch.ones(1, 2))
