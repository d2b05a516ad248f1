"""MMD^2 against worked values, brute-force loops, textbook estimators and finite differences."""

import itertools
import math

import pytest
import torch

from causaldpo_lib.errors import StudyError
from causaldpo_lib.mmd import ESTIMATORS, median_bandwidth, mmd_squared

REWARDS = torch.tensor([0.5, -0.5, 0.8], dtype=torch.float64)
TWO = torch.tensor([[0.8, 0.2], [0.3, 0.7], [0.6, 0.4]], dtype=torch.float64)
THREE = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.5, 0.3], [0.1, 0.3, 0.6]], dtype=torch.float64)


@pytest.mark.parametrize(("estimator", "expected"), [("v", 0.107655), ("u", 0.035048), ("debiased", 0.029235)])
def test_worked_values(estimator, expected):
    for bandwidth in (1.0, None):  # 1.0 is also the median distance of these rewards
        assert mmd_squared(REWARDS, TWO, bandwidth, estimator).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("pairs", "expected"), [("sum", 0.130316), ("mean", 0.043439), ("ordered_sum", 0.260633)])
def test_worked_values_of_three_environments(pairs, expected):
    assert mmd_squared(REWARDS, THREE, 1.0, pairs=pairs).item() == pytest.approx(expected, abs=1e-6)


def random_case(count=7, environments=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(count, 2, generator=generator)
    return outputs, torch.softmax(torch.randn(count, environments, generator=generator), -1)


def brute_force(outputs, memberships, bandwidth, estimator):
    """Double loops over examples, written from the definitions."""
    n, count = memberships.shape
    k = [
        [math.exp(-float((outputs[i] - outputs[j]) @ (outputs[i] - outputs[j])) / (2 * bandwidth**2)) for j in range(n)]
        for i in range(n)
    ]
    a = (memberships / memberships.sum(0)).T.tolist()
    values = []
    for m, o in itertools.combinations(range(count), 2):

        def term(left, right):
            total = sum(left[i] * right[j] * k[i][j] for i in range(n) for j in range(n) if estimator != "u" or i != j)
            return total / (1 - sum(x * y for x, y in zip(left, right, strict=True))) if estimator == "u" else total

        value = term(a[m], a[m]) + term(a[o], a[o]) - 2 * term(a[m], a[o])
        if estimator == "debiased":
            kappa = sum(k[i][j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
            value -= (1 - kappa) * sum((x - y) ** 2 for x, y in zip(a[m], a[o], strict=True))
        values.append(value)
    return sum(values) / len(values)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equals_double_loops(estimator):
    outputs, memberships = random_case()
    expected = brute_force(outputs.double(), memberships.double(), 0.7, estimator)
    assert mmd_squared(outputs, memberships, 0.7, estimator).item() == pytest.approx(expected, abs=1e-6)


def test_hard_disjoint_memberships_give_the_textbook_u_statistic():
    outputs, _ = random_case(9)
    x, y = outputs[:4], outputs[4:]

    def k(a, b):
        return torch.exp(-(torch.cdist(a, b) ** 2) / 2)

    textbook = (k(x, x).sum() - 4) / (4 * 3) + (k(y, y).sum() - 5) / (5 * 4) - 2 * k(x, y).mean()
    hard = torch.nn.functional.one_hot(torch.tensor([0] * 4 + [1] * 5)).float()
    torch.testing.assert_close(mmd_squared(outputs, hard, 1.0, "u"), textbook)


def test_gradient_matches_finite_differences_and_bandwidth_is_detached():
    outputs, memberships = random_case()
    outputs = outputs.double().requires_grad_()
    # mmd_squared computes in float32; a coarse step and tolerance are what that allows.
    assert torch.autograd.gradcheck(
        lambda s: mmd_squared(s, memberships, 0.7).double(), (outputs,), eps=1e-2, atol=1e-3, rtol=1e-2
    )
    assert not median_bandwidth(outputs).requires_grad


@pytest.mark.parametrize("memberships", [torch.full((5, 3), 1 / 3), torch.ones(5, 1), torch.eye(2)[[0] * 5]])
def test_collapsed_memberships_measure_nothing(memberships):
    outputs = torch.randn(5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    value = mmd_squared(outputs, memberships)
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-7)
    torch.testing.assert_close(outputs.grad, torch.zeros(5), atol=1e-6, rtol=0)


def test_independent_memberships_have_debiased_mean_zero_and_a_shift_is_seen():
    generator = torch.Generator().manual_seed(0)
    v, debiased = [], []
    for _ in range(300):
        outputs = torch.randn(32, generator=generator)
        memberships = torch.softmax(torch.randn(32, 2, generator=generator), -1)
        v.append(mmd_squared(outputs, memberships, 1.0).item())
        debiased.append(mmd_squared(outputs, memberships, 1.0, "debiased").item())
    spread = torch.tensor(debiased).std().item() / math.sqrt(300)
    assert abs(sum(debiased) / 300) < 4 * spread < sum(v) / 300
    shifted = torch.cat([torch.randn(16, generator=generator), 3 + torch.randn(16, generator=generator)])
    assert mmd_squared(shifted, torch.eye(2)[[0] * 16 + [1] * 16], 1.0, "debiased").item() > 0.3


def test_bad_input_is_named():
    with pytest.raises(StudyError, match=r"memberships of shape \(3, 2\) do not fit 4 outputs"):
        mmd_squared(torch.zeros(4), TWO)
    with pytest.raises(StudyError, match="unknown MMD estimator 'w'"):
        mmd_squared(REWARDS, TWO, estimator="w")
