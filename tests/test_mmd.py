"""MMD^2 against worked values, brute-force loops, textbook estimators and finite differences."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causaldpo_lib.errors import StudyError
from causaldpo_lib.mmd import (
    ESTIMATORS,
    PAIRS,
    PENALTIES,
    environment_weights,
    median_bandwidth,
    mmd_estimates,
    mmd_squared,
)

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


@pytest.mark.parametrize(("pair", "expected"), [((0, 1), 0.058388), ((0, 2), 0.016574), ((1, 2), 0.055354)])
def test_worked_values_of_single_pairs(pair, expected):
    assert mmd_squared(REWARDS, THREE[:, pair], 1.0).item() == pytest.approx(expected, abs=1e-6)


def test_several_bandwidths_average_their_kernels():
    widths = torch.tensor([0.25, 0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
    assert 5 * mmd_squared(REWARDS, TWO, widths).item() == pytest.approx(0.621667, abs=1e-6)


def test_risk_penalties_worked_values():
    # Per-environment DPO losses 0.574859 and 0.747731, mean loss 0.649770.
    losses = -torch.nn.functional.logsigmoid(torch.tensor([0.0, -0.7, 1.8], dtype=torch.float64))
    assert PENALTIES["vrex"](REWARDS, losses, TWO).item() == pytest.approx((0.172872 / 2) ** 2, abs=1e-6)
    for eta in (1.0, 10.0):
        worst = math.log((math.exp(eta * 0.574859) + math.exp(eta * 0.747731)) / 2) / eta
        assert PENALTIES["group_dro"](REWARDS, losses, TWO, eta=eta).item() == pytest.approx(worst - 0.649770, abs=1e-6)


def random_case(count=7, environments=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(count, 2, generator=generator)
    return outputs, torch.softmax(torch.randn(count, environments, generator=generator), -1)


def brute_force(outputs, memberships, bandwidth, estimator, pairs="mean"):
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
    return {"mean": sum(values) / len(values), "sum": sum(values), "ordered_sum": 2 * sum(values)}[pairs]


@settings(deadline=None, max_examples=40)
@given(
    size=st.tuples(st.integers(2, 8), st.integers(2, 4)),
    seed=st.integers(0, 1000),
    names=st.tuples(st.sampled_from(list(ESTIMATORS)), st.sampled_from(list(PAIRS))),
    bandwidth=st.floats(0.3, 3.0),
)
def test_equals_double_loops(size, seed, names, bandwidth):
    outputs, memberships = (tensor.double() for tensor in random_case(*size, seed))
    expected = brute_force(outputs, memberships, bandwidth, *names)
    assert mmd_squared(outputs, memberships, bandwidth, *names).item() == pytest.approx(expected, abs=1e-12)
    single = mmd_squared(outputs.float(), memberships.float(), bandwidth, *names)
    rounding = 1e-4 if names[0] == "u" else 2e-6  # u divides by 1 - |a|^2, which is small where one example dominates
    assert single.dtype == torch.float32 and single.item() == pytest.approx(expected, rel=1e-4, abs=rounding)


@pytest.mark.parametrize("share", [1e-3, 1e-5, 1e-7, 1e-9])
def test_u_keeps_its_digits_where_one_example_has_nearly_all_of_an_environment(share):
    outputs = torch.tensor([[0.3], [-0.4], [1.1], [0.2]])
    rest = (1 - share) / 2
    memberships = torch.tensor([[1.0, 0.0], [share, 1.0], [share / 2, rest], [0.0, rest]])
    expected = brute_force(outputs.double(), memberships.double(), 1.0, "u", "mean")
    assert mmd_squared(outputs, memberships, 1.0, "u").item() == pytest.approx(expected, rel=1e-4)


def test_estimates_share_a_kernel_and_nothing_else():
    outputs, memberships = random_case()
    together = mmd_estimates(outputs, memberships, None, list(ESTIMATORS), "sum")
    alone = [mmd_squared(outputs, memberships, None, name, "sum") for name in ESTIMATORS]
    assert together.tolist() == [value.item() for value in alone]


def test_hard_disjoint_memberships_give_the_textbook_statistics():
    outputs, _ = random_case(9)
    x, y = outputs[:4], outputs[4:]

    def k(a, b):
        return torch.exp(-(torch.cdist(a, b) ** 2) / 2)

    textbook = (k(x, x).sum() - 4) / (4 * 3) + (k(y, y).sum() - 5) / (5 * 4) - 2 * k(x, y).mean()
    hard = torch.nn.functional.one_hot(torch.tensor([0] * 4 + [1] * 5)).float()
    torch.testing.assert_close(mmd_squared(outputs, hard, 1.0, "u"), textbook)
    textbook = k(x, x).mean() + k(y, y).mean() - 2 * k(x, y).mean()
    torch.testing.assert_close(mmd_squared(outputs, hard, 1.0, "v"), textbook)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("width", [1, 3])
def test_gradients_match_finite_differences(estimator, width):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(6, width, generator=generator, dtype=torch.float64)
    outputs[3:5] = outputs[0]  # zero distances beside those of i = i
    logits = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda s, p: mmd_squared(s, p.softmax(-1), 0.7, estimator),
        (outputs.requires_grad_(), logits.requires_grad_()),
    )


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_are_finite_with_their_gradients_where_training_starts(name):
    outputs, losses = torch.zeros(6, requires_grad=True), torch.full((6,), math.log(2), requires_grad=True)
    _, memberships = random_case(6)
    value = PENALTIES[name](outputs, losses, memberships, bandwidth=None, estimator="v", pairs="mean")
    (value + 0 * (outputs.sum() + losses.sum())).backward()
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    assert outputs.grad.isfinite().all() and losses.grad.isfinite().all()


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_see_environments_that_differ_and_no_order(name):
    generator = torch.Generator().manual_seed(0)
    memberships = torch.eye(2).repeat_interleave(8, 0)
    outputs = 0.1 * torch.randn(16, generator=generator) + memberships[:, 1]
    options = {"bandwidth": 0.5, "estimator": "v", "pairs": "mean"}
    value = PENALTIES[name](outputs, outputs, memberships, **options)
    assert value > 0.1
    order = torch.randperm(16, generator=generator)
    torch.testing.assert_close(PENALTIES[name](outputs[order], outputs[order], memberships[order], **options), value)
    swapped = PENALTIES[name](outputs, outputs, memberships.flip(1), **options)
    torch.testing.assert_close(swapped, value)


def test_group_dro_with_weight_1_leaves_the_worst_environment():
    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(12, generator=generator, dtype=torch.float64)
    _, memberships = random_case(12)
    memberships = memberships.double()
    worst = (environment_weights(memberships).T @ losses).max()
    total = losses.mean() + PENALTIES["group_dro"](losses, losses, memberships, eta=1000.0)
    assert total.item() == pytest.approx(worst.item(), abs=2e-3)
    # For small eta the gap to the environments' mean risk is eta / 2 times the variance of V-REx.
    gap = losses.mean() + PENALTIES["group_dro"](losses, losses, memberships, eta=1e-3)
    gap = gap - (environment_weights(memberships).T @ losses).mean()
    assert gap.item() == pytest.approx(0.5e-3 * PENALTIES["vrex"](losses, losses, memberships).item(), rel=1e-2)


def test_bandwidth_is_detached_and_never_0():
    outputs, _ = random_case()
    assert not median_bandwidth(outputs.requires_grad_()).requires_grad
    assert median_bandwidth(torch.zeros(4)) == median_bandwidth(torch.zeros(1)) == 1.0
    assert median_bandwidth(torch.tensor([0.0, 1.0, 3.0])) == 2.0


def test_small_differences_between_large_outputs_survive_float32():
    outputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    memberships = random_case(8)[1]
    shifted = mmd_squared(outputs + 1000.0, memberships, 4.0)
    torch.testing.assert_close(shifted, mmd_squared(outputs, memberships, 4.0), rtol=1e-2, atol=0)
    assert mmd_squared(outputs.bfloat16(), memberships, 4.0).dtype == torch.float32


@pytest.mark.parametrize("name", PENALTIES)
def test_mixed_precision_stays_outside(name):
    outputs, memberships = random_case(16)
    losses = outputs[:, 0]
    options = {"bandwidth": None, "estimator": "v", "pairs": "mean"}
    expected = PENALTIES[name](outputs, losses, memberships, **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = PENALTIES[name](outputs, losses, memberships, **options)
    assert found.dtype == torch.float32 and found.item() == expected.item()


def test_nearly_equal_environments_do_not_drown_in_rounding():
    outputs, memberships = random_case(16)
    nearly = (1 / 3 + 1e-3 * (memberships.double() - 1 / 3)).float()
    exact = mmd_squared(outputs.double(), nearly.double(), 1.0).item()
    assert 0 < exact < 1e-6 and mmd_squared(outputs, nearly, 1.0).item() == pytest.approx(exact, rel=1e-2)


@settings(deadline=None, max_examples=25)
@given(
    count=st.integers(2, 40),
    row=st.lists(st.floats(0.01, 1.0), min_size=2, max_size=5),
    estimator=st.sampled_from(list(ESTIMATORS)),
)
def test_equal_memberships_give_exactly_0_and_a_warning(count, row, estimator):
    memberships = torch.tensor(row).div(sum(row)).expand(count, -1)
    outputs = torch.randn(count, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with pytest.warns(UserWarning, match="regularises nothing"):
        value = mmd_squared(outputs, memberships, None, estimator)
    value.backward()
    assert value.item() == 0.0 and (outputs.grad == 0).all()


def test_memberships_equal_up_to_rounding_count_as_equal_and_others_do_not():
    outputs, memberships = random_case(8)
    nearly = memberships[:1] * (1 + 1e-6 * torch.rand(8, 1, generator=torch.Generator().manual_seed(0)))
    with pytest.warns(UserWarning, match="regularises nothing"):
        assert mmd_squared(outputs, nearly).item() == 0.0
    nearly[0, 0] *= 1.01
    assert mmd_squared(outputs, nearly).item() > 0


@pytest.mark.parametrize(
    ("count", "memberships"),
    [(5, torch.ones(5, 1)), (1, torch.tensor([[0.3, 0.7]])), (3, torch.tensor([[1, 0], [1, 1e-8], [1, 0]]))],
)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_single_environment_or_example_is_0_without_a_warning(count, memberships, estimator):
    outputs = torch.arange(float(count), requires_grad=True)
    value = mmd_squared(outputs, memberships, None, estimator)
    value.backward()
    assert value.item() == 0.0 and (outputs.grad == 0).all()


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
