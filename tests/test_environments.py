"""Pseudo-environments: Eq. 8's worked values, recovery of planted clusters, and what must not pass silently."""

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score

from causaldpo_lib.environments import EnvironmentInference, knee, soft_memberships
from causaldpo_lib.errors import StudyError


def test_soft_memberships_worked_values():
    z = torch.tensor([[0.0, 0.0], [1.0, 0.0], [4.0, 0.0], [5.0, 0.0]])
    p = soft_memberships(z, torch.tensor([[0.5, 0.0], [4.5, 0.0]]))
    torch.testing.assert_close(p[:, 0], torch.tensor([0.982014, 0.952574, 0.047426, 0.017986]), atol=1e-6, rtol=0)
    torch.testing.assert_close(p.sum(1), torch.ones(4))


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
    inference = EnvironmentInference()
    hard = inference.diagnostics(torch.eye(2).repeat(10, 1))
    flat = inference.diagnostics(torch.full((20, 2), 0.5))
    assert hard["membership_entropy"] == pytest.approx(0.0, abs=1e-9) and hard["weight_distance"] == pytest.approx(2.0)
    assert hard["effective_sample_size"] == pytest.approx(0.5) and hard["balance"] == pytest.approx(1.0)
    assert flat["membership_entropy"] == pytest.approx(1.0) and flat["weight_distance"] == pytest.approx(0.0)


def test_identical_states_are_refused():
    with pytest.raises(StudyError, match="prompt states are identical"):
        EnvironmentInference().fit(torch.ones(10, 4))
    with pytest.raises(StudyError, match="not fitted"):
        EnvironmentInference().memberships(torch.ones(10, 4))


def test_knee_of_a_bent_curve():
    assert knee(np.concatenate([np.linspace(0, 1, 90), np.linspace(1, 20, 10)])) == pytest.approx(1.0, abs=0.2)
    assert knee(np.full(5, 2.0)) == 2.0
