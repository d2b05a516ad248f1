"""Losses: worked values, gradients, identities, masks, extremes, and trl's own functions on the same batch."""

import math
import re
import types
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from causaldpo_lib import losses
from causaldpo_lib.errors import StudyError
from causaldpo_lib.losses import (
    LOSSES,
    BetaState,
    LogProbs,
    check_hyperparameters,
    example_losses,
    hyperparameters,
    implicit_rewards,
    preference_loss,
)

CHOSEN, REF_CHOSEN, CHOSEN_TOKENS = [-5.0, -7.5, -4.0], [-5.5, -7.0, -4.8], [4, 6, 3]
REJECTED = [[-6.0, -9.0, -12.0], [-7.0, -7.2, -11.0], [-10.0, -6.5, -9.5]]
REF_REJECTED = [[-6.5, -8.5, -11.0], [-7.2, -7.6, -10.0], [-9.0, -6.0, -9.7]]
REJECTED_TOKENS = [[5, 6, 8], [6, 5, 7], [8, 4, 6]]


def toy(columns=slice(None), dtype=torch.float64) -> LogProbs:
    """Three prompts, of whose three rejected responses ``columns`` are taken."""

    def matrix(rows, kind):
        return torch.tensor(rows, dtype=kind)[:, columns]

    return LogProbs(
        torch.tensor(CHOSEN, dtype=dtype),
        matrix(REJECTED, dtype),
        torch.tensor(REF_CHOSEN, dtype=dtype),
        matrix(REF_REJECTED, dtype),
        torch.tensor(CHOSEN_TOKENS),
        matrix(REJECTED_TOKENS, torch.int64),
    )


def drawn(prompts: int, rejected: int, seed: int = 0, dtype=torch.float32) -> LogProbs:
    """Log-probabilities of responses of 2 to 8 tokens, a reference near the policy."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=dtype)

    lengths = [torch.randint(2, 9, shape, generator=generator) for shape in ((prompts,), (prompts, rejected))]
    policy = [-length * (0.2 + 2 * uniform(*length.shape)) for length in lengths]
    reference = [logp + 2 * uniform(*logp.shape) - 1 for logp in policy]
    return LogProbs(*policy, *reference, *lengths)


def rows(log_probs: LogProbs, index) -> LogProbs:
    return LogProbs(**{name: value[index] for name, value in vars(log_probs).items()})


def of_rejected(log_probs: LogProbs, index) -> LogProbs:
    """The same prompts with the rejected responses ``index``."""
    return LogProbs(**{name: v[:, index] if v.ndim == 2 else v for name, v in vars(log_probs).items()})


FIRST, SECOND, ALL = slice(0, 1), slice(1, 2), slice(None)
ORACLE_SMOOTHING = torch.sigmoid(torch.tensor([0.5, 0.6, -1.0]) - torch.tensor([1.2, 0.3, 0.8]))


@pytest.mark.parametrize(
    ("name", "options", "columns", "batch", "examples"),
    [
        ("dpo", {"beta": 0.1}, FIRST, 0.676366, [0.693147, 0.728760, 0.607192]),
        ("dpo", {"beta": 1.0}, FIRST, 0.649770, [0.693147, 1.103186, 0.152978]),
        ("dpo", {"beta": 0.1}, SECOND, 0.671271, [0.644397, 0.739159, 0.630258]),
        ("ipo", {"tau": 0.1, "average": False}, FIRST, 22.576667, [25.0, 32.49, 10.24]),
        ("ipo", {"tau": 0.1}, FIRST, 24.055880, [24.750625, 26.180278, 21.236736]),
        ("cdpo", {"beta": 1.0, "label_smoothing": 0.1}, FIRST, 0.686437, [0.693147, 1.033186, 0.332978]),
        ("rdpo", {"beta": 1.0, "label_smoothing": 0.1}, FIRST, 0.603937, [0.693147, 1.190686, -0.072022]),
        ("dr_dpo", {"beta": 1.0, "beta_prime": 1.0}, FIRST, 0.573907, [0.693147, 1.103186, 0.152978]),
        ("dr_dpo", {"beta": 0.1, "beta_prime": 1.0}, FIRST, 0.675054, [0.693147, 0.728760, 0.607192]),
        ("simpo", {"beta": 2.5, "gamma_beta_ratio": 0.55}, FIRST, 1.747173, [1.701413, 1.770053, 1.770053]),
        ("simpo", {"beta": 2.0, "gamma_beta_ratio": 0.5}, FIRST, 1.420955, [1.387335, 1.437764, 1.437764]),
        ("cpo", {"beta": 0.1, "nll_weight": 0.0}, FIRST, 0.600115, [0.644397, 0.718460, 0.437488]),
        ("cpo", {"beta": 0.1, "nll_weight": 1.0}, FIRST, 1.869346, None),
        ("orpo", {"beta": 0.1}, FIRST, 1.343757, None),
        ("dmpo", {"beta": 0.1}, ALL, 0.665793, None),
        ("dmpo", {"beta": 1.0}, ALL, 0.503247, [0.360885, 0.893193, 0.255665]),
        ("s_dpo", {"beta": 0.1}, ALL, 1.345790, None),
        ("s_dpo", {"beta": 1.0}, ALL, 1.147827, [0.952048, 1.804986, 0.686446]),
        ("mppo", {}, ALL, 0.641620, [0.638686, 0.642766, 0.643407]),
        ("mppo", {"variant": "pair_mns"}, ALL, 2.027590, [2.024443, 2.028884, 2.029445]),
        ("mppo", {"variant": "pair_single"}, FIRST, 0.703620, [0.700519, 0.705674, 0.704667]),
        ("mppo", {"probability": "sequence"}, ALL, 0.681460, [0.684383, 0.693155, 0.666841]),
        (
            "rose_po",
            {"beta": 1.0, "label_smoothing": ORACLE_SMOOTHING},
            FIRST,
            0.600844,
            [0.693147, 0.701076, 0.408310],
        ),
        ("beta_dpo", {"rho": 0.0}, FIRST, 0.673411, [0.693147, 0.735956, 0.591129]),
        # The running mean is 0.2 after this batch, of mean 1.1 / 3.
        (
            "beta_dpo",
            {"rho": 0.0, "state": BetaState((0.2 - 0.11 / 3) / 0.9, 1.0)},
            FIRST,
            0.674858,
            [0.693147, 0.732388, 0.599040],
        ),
    ],
)
def test_worked_values(name, options, columns, batch, examples):
    loss, _ = preference_loss(name, toy(columns), **options)
    assert loss.item() == pytest.approx(batch, abs=1e-6)
    if examples is not None:
        expected = torch.tensor(examples, dtype=torch.float64)
        torch.testing.assert_close(example_losses(name, toy(columns), **options), expected, atol=1e-6, rtol=0)


def test_orpo_is_likelihood_and_odds():
    batch = toy(FIRST)
    likelihood = 16.5 / 13  # nats over tokens of the chosen responses
    torch.testing.assert_close((preference_loss("orpo", batch)[0] - likelihood).item(), 0.074526, atol=1e-6, rtol=0)
    odds = example_losses("orpo", batch, beta=0.2) - example_losses("orpo", batch, beta=0.1)
    torch.testing.assert_close(odds.tolist(), [0.072918, 0.075434, 0.075227], atol=1e-6, rtol=0)


def test_the_chosen_likelihood_is_a_mean_over_the_tokens_of_the_batch():
    def nll(log_probs):
        return (preference_loss("cpo", log_probs)[0] - preference_loss("cpo", log_probs, nll_weight=0.0)[0]).item()

    assert nll(toy()) == pytest.approx(16.5 / 13)


@pytest.fixture
def fixed_betas(monkeypatch):
    """Betas and boundaries that a loss derives from the log-probabilities, kept from its first call on: they are
    detached, so differences of the loss have to leave them in place."""
    for name in ("_calibrated", "boundary_negatives", "boundary_betas"):
        function, kept = getattr(losses, name), []

        def once(*args, function=function, kept=kept, **arguments):
            kept or kept.append(function(*args, **arguments))
            return kept[0]

        monkeypatch.setattr(losses, name, once)


RAGGED = torch.tensor([[True, True, True], [True, True, False], [False, True, False]])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("mask", [None, RAGGED], ids=["full", "ragged"])
def test_gradient_matches_finite_differences(name, mask, fixed_betas):
    batch = toy()
    weights = torch.tensor([0.5, 1.5, 1.0])

    def loss(chosen, rejected):
        return preference_loss(name, replace(batch, chosen=chosen, rejected=rejected, rejected_mask=mask), weights)[0]

    loss(batch.chosen, batch.rejected)
    assert torch.autograd.gradcheck(loss, (batch.chosen.requires_grad_(), batch.rejected.requires_grad_()))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("high", [0.0, -1e-9, 1e4])
def test_extreme_margins_keep_loss_and_gradient_finite(name, high):
    low = -1e4
    chosen = torch.tensor([high, low, low, high, -3.0], requires_grad=True)
    rejected = torch.tensor([[low, low], [high, high], [low, high], [high, high], [-3.0, low]], requires_grad=True)
    ones = torch.ones_like(rejected)
    batch = LogProbs(chosen, rejected, -3 * ones[:, 0], -3 * ones, ones[:, 0], ones)
    loss, metrics = preference_loss(name, batch)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(chosen.grad).all() and torch.isfinite(rejected.grad).all()
    assert all(map(math.isfinite, metrics.values()))


@pytest.mark.parametrize("name", LOSSES)
def test_what_the_mask_hides_does_not_matter(name):
    batch, mask = drawn(6, 3), torch.tensor([[True, True, False]]).expand(6, 3)
    expected = of_rejected(batch, slice(0, 2))
    for garbage in (math.nan, math.inf, -math.inf, 7.0):
        hidden = {
            key: getattr(batch, key).to(torch.float32).masked_fill(~mask, garbage)
            for key in ("rejected", "ref_rejected", "rejected_tokens")
        }
        chosen, rejected = batch.chosen.clone().requires_grad_(), hidden.pop("rejected").requires_grad_()
        masked = replace(batch, chosen=chosen, rejected=rejected, rejected_mask=mask, **hidden)
        loss, metrics = preference_loss(name, masked)
        loss.backward()
        few = expected.chosen.clone().requires_grad_(), expected.rejected.clone().requires_grad_()
        loss_of_few, metrics_of_few = preference_loss(name, replace(expected, chosen=few[0], rejected=few[1]))
        loss_of_few.backward()
        torch.testing.assert_close(loss, loss_of_few)
        torch.testing.assert_close(chosen.grad, few[0].grad)
        torch.testing.assert_close(rejected.grad, F.pad(few[1].grad, (0, 1)))
        assert metrics == pytest.approx(metrics_of_few)
        assert all(torch.isfinite(score).all() for score in implicit_rewards(name, masked))


# In these a prompt's value depends on the rest of the batch.
COUPLED = {"cpo", "orpo", "beta_dpo"}


@pytest.mark.parametrize("name", sorted(set(LOSSES) - COUPLED))
def test_a_ragged_batch_is_its_prompts_one_by_one(name):
    batch = replace(toy(), rejected_mask=RAGGED)
    alone = [
        example_losses(name, of_rejected(rows(toy(), slice(i, i + 1)), exists.nonzero()[:, 0]))
        for i, exists in enumerate(RAGGED)
    ]
    torch.testing.assert_close(example_losses(name, batch), torch.cat(alone))


@pytest.mark.parametrize("name", LOSSES)
def test_order_of_the_rejected_does_not_matter(name):
    batch = drawn(8, 5)
    torch.testing.assert_close(
        example_losses(name, of_rejected(batch, torch.tensor([3, 0, 4, 1, 2]))), example_losses(name, batch)
    )


@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_one_change_nothing(name):
    batch = drawn(8, 3)
    torch.testing.assert_close(preference_loss(name, batch, torch.ones(8))[0], preference_loss(name, batch)[0])


@pytest.mark.parametrize("name", sorted(set(LOSSES) - COUPLED))
def test_a_weight_is_a_number_of_copies(name):
    batch = drawn(4, 3)
    copies = rows(batch, torch.tensor([0, 0, 2, 3]))
    weighted, _ = preference_loss(name, batch, torch.tensor([2.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(weighted, preference_loss(name, copies)[0])


@pytest.mark.parametrize("name", ["cpo", "orpo"])
def test_weights_multiply_a_coupled_prompts_own_part(name):
    batch, weights = drawn(4, 3), torch.tensor([2.0, 0.0, 1.5, 0.5])
    expected = (weights * example_losses(name, batch)).mean()
    torch.testing.assert_close(preference_loss(name, batch, weights)[0], expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cdpo", {"label_smoothing": 0.0}),
        ("rdpo", {"label_smoothing": 0.0}),
        ("rose_po", {"label_smoothing": torch.zeros(8)}),
        ("rose_po", {"label_smoothing": torch.zeros(8), "form": "rdpo"}),
        ("beta_dpo", {"a": 0.0, "rho": 0.0}),
        ("dr_dpo", {"beta_prime": 1e6}),
    ],
)
@pytest.mark.parametrize("rejected", [1, 3])
def test_limits_are_dpo(name, options, rejected):
    batch = drawn(8, rejected, dtype=torch.float64)
    expected, _ = preference_loss("dpo", batch, beta=0.7)
    torch.testing.assert_close(preference_loss(name, batch, beta=0.7, **options)[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["dmpo", "s_dpo"])
def test_one_rejected_response_is_dpo(name):
    batch = drawn(8, 1)
    torch.testing.assert_close(example_losses(name, batch, beta=0.7), example_losses("dpo", batch, beta=0.7))


def test_dr_dpo_approaches_dpo_from_below():
    batch = drawn(16, 1, dtype=torch.float64)
    values = [preference_loss("dr_dpo", batch, beta=1.0, beta_prime=b)[0].item() for b in (0.1, 1.0, 10.0, 1e3)]
    plain = preference_loss("dpo", batch, beta=1.0)[0].item()
    assert sorted(values) == values and values[-1] < plain
    assert values[0] < example_losses("dpo", batch, beta=1.0).min() + 0.1 * math.log(16)


@pytest.mark.parametrize("name", ["dpo", "cdpo", "rdpo", "rose_po", "dr_dpo", "beta_dpo", "dmpo", "cpo"])
def test_zero_margin_is_log_two(name):
    logp = torch.full((4, 2), -3.0)
    batch = LogProbs(logp[:, 0], logp, logp[:, 0], logp, torch.ones(4), torch.ones(4, 2))
    options = {"nll_weight": 0.0} if name == "cpo" else {}
    loss, metrics = preference_loss(name, batch, beta=3.0, **options)
    assert loss.item() == pytest.approx(math.log(2))
    assert metrics["margin"] == 0.0 and metrics["accuracy"] == 0.0


def test_zero_margin_of_k_rejected_is_the_entropy_of_their_softmax():
    logp = torch.full((4, 5), -3.0)
    batch = LogProbs(logp[:, 0], logp, logp[:, 0], logp)
    assert preference_loss("s_dpo", batch)[0].item() == pytest.approx(math.log(6))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("dpo", "ipo", "cdpo", "rdpo", "rose_po", "dr_dpo", "simpo", "cpo", "orpo")),
        ("mppo", {"variant": "pair_single"}),
    ],
)
def test_losses_of_pairs_are_averaged_over_the_rejected(name, options):
    pairs = [example_losses(name, toy(slice(j, j + 1)), **options) for j in range(3)]
    torch.testing.assert_close(example_losses(name, toy(), **options), torch.stack(pairs).mean(0))


def test_smoothing_puts_the_best_margin_at_the_odds_of_a_right_label():
    best = math.log(0.9 / 0.1)
    margin = torch.tensor([best], dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(1, 1, dtype=torch.float64)
    example_losses("cdpo", LogProbs(margin, zeros, zeros[0], zeros), beta=1.0, label_smoothing=0.1).sum().backward()
    assert margin.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_robust_dpo_is_unbiased_under_swapped_labels():
    batch = drawn(8, 1, dtype=torch.float64)
    swapped = LogProbs(batch.rejected[:, 0], batch.chosen[:, None], batch.ref_rejected[:, 0], batch.ref_chosen[:, None])
    options = {"beta": 0.8, "label_smoothing": 0.3}
    mean = 0.7 * example_losses("rdpo", batch, **options) + 0.3 * example_losses("rdpo", swapped, **options)
    torch.testing.assert_close(mean, example_losses("dpo", batch, beta=0.8))


def test_smoothing_of_each_prompt_is_its_own():
    batch, smoothing = drawn(3, 2), torch.tensor([0.0, 0.2, 0.4])
    for name in ("cdpo", "rdpo", "rose_po"):
        alone = [
            example_losses(name, rows(batch, slice(i, i + 1)), label_smoothing=value)
            for i, value in enumerate(smoothing.tolist())
        ]
        torch.testing.assert_close(example_losses(name, batch, label_smoothing=smoothing), torch.cat(alone))


# --- beta-DPO ---------------------------------------------------------------------------------------------------------


def test_beta_dpo_keeps_a_draw_and_averages_over_it():
    """Margins 0, -0.7, 1.8 and a running mean of 0.2: beta 0.1 (1 + 0.6 (0.9 - 0.2)) when the first and third stay."""
    state = BetaState((0.2 - 0.11 / 3) / 0.9, 1.0)
    values = {}
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        loss, metrics = preference_loss("beta_dpo", toy(FIRST), state=state, generator=generator)
        assert metrics["margin_mean"] == pytest.approx(0.2)
        values[round(metrics["beta_used"], 6)] = loss.item()
    # Kept {1, 2}, {1, 3}, {2, 3}: means -0.35, 0.9 and 0.55.
    assert set(values) == {0.067, 0.142, 0.121}
    assert values[0.142] == pytest.approx(0.633319, abs=1e-6)


def test_beta_dpo_draws_without_replacement_by_its_weights():
    margins = torch.tensor([0.0, 1.0, 2.0, 3.0])
    zeros = torch.zeros(4, 1)
    state = BetaState(1.0, 1.0)
    mean = 0.9 + 0.15
    std = 0.9 + 0.1 * margins.std(correction=0).item()
    weights = torch.exp(-(((margins - mean) / std) ** 2) / 2)
    generator = torch.Generator().manual_seed(1)
    counts = torch.zeros(4)
    draws = 4000
    for _ in range(draws):
        _, kept, _, _ = losses._calibrated(
            LogProbs(margins, zeros, zeros[:, 0], zeros), 0.1, 0.6, 0.5, state, generator
        )
        assert len(set(kept.tolist())) == 2
        counts[kept] += 1
    p = weights / weights.sum()
    # Probability to be among two: drawn first, or second after another.
    expected = torch.stack([p[i] + sum(p[j] * p[i] / (1 - p[j]) for j in range(4) if j != i) for i in range(4)])
    torch.testing.assert_close(counts / draws, expected, atol=4 * 0.5 / math.sqrt(draws), rtol=0)


def test_beta_dpo_state_passes_from_batch_to_batch():
    state, mean, std = BetaState(), 0.0, 0.0
    for seed in range(4):
        batch = drawn(8, 2, seed)
        chosen, rejected = batch.log_ratios()
        margins = chosen - rejected.mean(1)
        mean, std = 0.9 * mean + 0.1 * margins.mean().item(), 0.9 * std + 0.1 * margins.std(correction=0).item()
        _, metrics = preference_loss("beta_dpo", batch, state=state)
        state = BetaState(metrics["margin_mean"], metrics["margin_std"])
        assert (state.mean, state.std) == pytest.approx((mean, std))


def test_beta_dpo_repeats_with_its_generator_and_without_one():
    batch = drawn(16, 1)

    def value(generator):
        return preference_loss("beta_dpo", batch, state=BetaState(0.0, 1.0), generator=generator)[0].item()

    assert value(torch.Generator().manual_seed(3)) == value(torch.Generator().manual_seed(3))
    assert len({value(torch.Generator().manual_seed(seed)) for seed in range(5)}) > 1
    assert value(None) == value(None)


def test_beta_dpo_of_equal_margins_draws_evenly():
    ones = torch.ones(6, 1)
    batch = LogProbs(5 * ones[:, 0], ones, ones[:, 0], ones)
    generator = torch.Generator().manual_seed(0)
    kept = [losses._calibrated(batch, 0.1, 0.6, 0.5, BetaState(), generator)[1] for _ in range(60)]
    assert torch.cat(kept).bincount(minlength=6).min() > 15


def test_beta_dpo_weighs_the_kept_prompts():
    """Without a generator the two prompts nearest to the running mean stay: margins 0 and -0.7."""
    weights = torch.tensor([0.4, 1.6, 9.0])
    loss, metrics = preference_loss("beta_dpo", toy(FIRST), weights)
    kept = example_losses("dpo", toy(FIRST), beta=metrics["beta_used"])[:2]
    torch.testing.assert_close(loss, (weights[:2] * kept).mean())


def test_beta_dpo_never_turns_the_preference_round():
    """The running mean is far above the batch's margins: beta would be negative."""
    assert preference_loss("beta_dpo", toy(FIRST), state=BetaState(100.0, 1.0))[1]["beta_used"] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("prompts", "rho", "count"), [(1, 0.2, 1), (3, 0.2, 2), (10, 0.9, 1), (20, 0.9, 2), (5, 0.4, 3)]
)
def test_beta_dpo_keeps_the_floor_of_its_share_but_at_least_one(prompts, rho, count):
    kept = losses._calibrated(drawn(prompts, 1), 0.1, 0.6, rho, BetaState(), None)[1]
    assert len(kept) == count


# --- Rewards and metrics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_rewards_have_the_shapes_of_the_responses_and_gradients(name):
    batch = drawn(5, 3)
    batch.chosen.requires_grad_(), batch.rejected.requires_grad_()
    chosen, rejected = implicit_rewards(name, batch)
    assert chosen.shape == (5,) and rejected.shape == (5, 3)
    gradients = torch.autograd.grad(chosen.sum() + rejected.sum(), (batch.chosen, batch.rejected))
    assert all((gradient > 0).all() for gradient in gradients)


@pytest.mark.parametrize(
    ("name", "options"), [("dpo", {"beta": 0.3}), ("cpo", {"nll_weight": 0.0}), ("simpo", {"gamma_beta_ratio": 0.0})]
)
def test_logistic_losses_compare_rewards(name, options):
    chosen, rejected = implicit_rewards(name, drawn(8, 1), **options)
    torch.testing.assert_close(
        example_losses(name, drawn(8, 1), **options), -F.logsigmoid(chosen - rejected[:, 0]), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("name", "options", "chosen", "rejected"),
    [
        ("s_dpo", {"beta": 2.0}, [1.0, -1.0, 1.6], [1.0, 0.4, -2.0]),
        ("dynamic_dmpo", {"beta": 2.0}, [1.0, -1.0, 1.6], [1.0, 0.4, -2.0]),
        ("ipo", {"tau": 2.0}, [0.25, -1 / 6, 1.6 / 3], [0.2, 0.4 / 6, -0.25]),
        ("ipo", {"tau": 2.0, "average": False}, [1.0, -1.0, 1.6], [1.0, 0.4, -2.0]),
        ("simpo", {"beta": 3.0}, [-3.75, -3.75, -4.0], [-3.6, -3.5, -3.75]),
        ("cpo", {"beta": 0.5}, [-2.5, -3.75, -2.0], [-3.0, -3.5, -5.0]),
        ("orpo", {"beta": 7.0}, [-1.25, -1.25, -4 / 3], [-1.2, -7 / 6, -1.25]),
        ("mppo", {}, [math.exp(-1.25)] * 2 + [math.exp(-4 / 3)], [math.exp(x) for x in (-1.2, -7 / 6, -1.25)]),
        ("mppo", {"probability": "sequence"}, list(map(math.exp, CHOSEN)), [math.exp(x) for x in (-6.0, -7.0, -10.0)]),
    ],
)
def test_worked_rewards(name, options, chosen, rejected):
    values = implicit_rewards(name, toy(FIRST), **options)
    assert values[0].tolist() == pytest.approx(chosen)
    assert values[1][:, 0].tolist() == pytest.approx(rejected)


def test_metrics_of_one_rejected_response():
    _, metrics = preference_loss("dpo", toy(FIRST))
    assert metrics == pytest.approx({"margin": 1.1 / 3, "accuracy": 1 / 3, "chosen_logp": -5.5})


def test_metrics_of_several_rejected_responses():
    """Margins h_w - h_j: (0, 1, 1.5), (-0.7, -0.9, 0.5), (1.8, 1.3, 0.6); the mask leaves out three of them."""
    _, metrics = preference_loss("dpo", replace(toy(), rejected_mask=RAGGED))
    assert metrics == pytest.approx(
        {
            "margin": (2.5 / 3 - 0.8 + 1.3) / 3,
            "accuracy": (2 / 3 + 0 + 1) / 3,
            "chosen_logp": -5.5,
            "margin_1": (0.0 - 0.7) / 2,
            "margin_2": (1.0 - 0.9 + 1.3) / 3,
            "margin_3": 1.5,
            "accuracy_1": 0.0,
            "accuracy_2": 2 / 3,
            "accuracy_3": 1.0,
            "win_rate": 1 / 3,
            "margin_min": (0.0 - 0.9 + 1.3) / 3,
        }
    )


def test_a_column_without_responses_has_no_metrics_but_a_broken_model_shows():
    mask = torch.tensor([[True, False, True]] * 3)
    _, metrics = preference_loss("dpo", replace(toy(), rejected_mask=mask))
    assert not {"margin_2", "accuracy_2"} & set(metrics) and {"margin_1", "accuracy_3"} <= set(metrics)
    loss, metrics = preference_loss("dpo", replace(toy(), chosen=torch.full((3,), math.nan)))
    assert math.isnan(loss) and math.isnan(metrics["margin"])


def test_accuracy_is_by_the_losss_own_score():
    """The summed log-probability is lower for the longer rejected response, the mean is higher."""
    batch = LogProbs(*(torch.tensor(v) for v in ([-4.0], [[-5.0]])), None, None, torch.tensor([2]), torch.tensor([[5]]))
    assert preference_loss("cpo", batch)[1]["accuracy"] == 1.0
    assert preference_loss("simpo", batch)[1]["accuracy"] == 0.0


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32(name):
    batch = drawn(6, 2)
    half = replace(batch, chosen=batch.chosen.bfloat16(), rejected=batch.rejected.bfloat16())
    rounded = replace(batch, chosen=half.chosen.float(), rejected=half.rejected.float())
    loss, _ = preference_loss(name, half)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, preference_loss(name, rounded)[0], rtol=0, atol=0)


# --- Bad input --------------------------------------------------------------------------------------------------------


def test_bad_names_are_named():
    with pytest.raises(StudyError, match="no hyper-parameter 'betta': choose from beta"):
        preference_loss("dpo", toy(), betta=0.1)
    with pytest.raises(StudyError, match=r"unknown loss 'dop' .did you mean 'dpo'"):
        preference_loss("dop", toy())
    with pytest.raises(StudyError, match="unknown variant of MPPO 'mnm': choose from pair_mnm, pair_mns, pair_single"):
        preference_loss("mppo", toy(), variant="mnm")
    with pytest.raises(StudyError, match=r"unknown kind of probability 'mean'"):
        preference_loss("dynamic_mppo", toy(), probability="mean")
    with pytest.raises(StudyError, match=r"unknown form of RosePO 'ipo'"):
        preference_loss("rose_po", toy(), form="ipo")


@pytest.mark.parametrize("name", LOSSES)
def test_unknown_hyperparameters_are_refused_everywhere(name):
    refusal = re.escape(f"no hyper-parameter 'lambda': choose from {', '.join(hyperparameters(name))}")
    for refuse in (
        lambda: check_hyperparameters(name, {"lambda": 1.0}),
        lambda: preference_loss(name, toy(), **{"lambda": 1.0}),
        lambda: example_losses(name, toy(), **{"lambda": 1.0}),
        lambda: implicit_rewards(name, toy(), **{"lambda": 1.0}),
    ):
        with pytest.raises(StudyError, match=refusal):
            refuse()


def test_bad_shapes_are_named():
    with pytest.raises(StudyError, match=r"expected \(B, K\)"):
        LogProbs(torch.zeros(2), torch.zeros(2))
    with pytest.raises(StudyError, match="no rejected response"):
        LogProbs(torch.zeros(2), torch.zeros(2, 0))
    with pytest.raises(StudyError, match="no rejected response"):
        LogProbs(torch.zeros(2), torch.zeros(2, 1), rejected_mask=torch.tensor([[True], [False]]))
    with pytest.raises(StudyError, match=r"label_smoothing has shape \(2,\): .* one per prompt, \(3,\)"):
        preference_loss("cdpo", toy(), label_smoothing=torch.zeros(2))


@pytest.mark.parametrize("smoothing", [0.5, torch.tensor([0.1, 0.7, 0.2])])
def test_robust_dpo_refuses_labels_that_are_wrong_more_often_than_not(smoothing):
    with pytest.raises(StudyError, match=r"label_smoothing reaches 0\.5"):
        preference_loss("rdpo", toy(), label_smoothing=smoothing)


@pytest.mark.parametrize("name", LOSSES)
def test_what_a_loss_needs_and_does_not_get_is_named(name):
    bare = LogProbs(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(StudyError, match=r"give ref_chosen and ref_rejected|give chosen_tokens and rejected_tokens"):
        preference_loss(name, bare)


# --- trl on the same batch --------------------------------------------------------------------------------------------


class FakeModel:
    """Answers a trl ``DPOTrainer`` with given log-probabilities per token."""

    training = True

    def __init__(self, token_logps):
        self.token_logps = token_logps

    def __call__(self, **_):
        flat = torch.zeros_like(self.token_logps)
        return types.SimpleNamespace(
            log_probs=self.token_logps, entropy=flat, mean_logits=flat, is_top1=flat.bool(), loss=flat.sum()
        )


def trl_dpo(batch: LogProbs, loss_type: str, **settings) -> torch.Tensor:
    """trl's ``DPOTrainer`` loss of one rejected response per prompt, each token with its share of the sum."""
    from trl import DPOTrainer

    trainer = object.__new__(DPOTrainer)
    accelerator = types.SimpleNamespace(
        device=batch.chosen.device, gather_for_metrics=torch.as_tensor, gather=torch.as_tensor
    )
    attributes = dict(
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        label_smoothing=0.0,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    for key, value in {**attributes, **settings}.items():
        object.__setattr__(trainer, key, value)
    tokens = torch.cat([batch.chosen_tokens, batch.rejected_tokens[:, 0]])
    sums = torch.cat([batch.chosen, batch.rejected[:, 0]])
    mask = torch.arange(int(tokens.max()))[None] < tokens[:, None]
    token_logps = torch.where(mask, (sums / tokens)[:, None], 0.0)
    mask = F.pad(mask, (1, 0)).long()  # one prompt token
    inputs = {
        "input_ids": mask,
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": batch.ref_chosen,
        "ref_rejected_logps": batch.ref_rejected[:, 0],
    }
    model = FakeModel(token_logps)
    object.__setattr__(trainer, "model", model)
    return trainer._compute_loss(model, inputs, return_outputs=False)


@pytest.mark.parametrize(
    ("name", "options", "loss_type", "settings"),
    [
        ("dpo", {"beta": 0.3}, "sigmoid", {"beta": 0.3}),
        ("ipo", {"tau": 0.2}, "ipo", {"beta": 0.2}),
        ("rdpo", {"beta": 0.3, "label_smoothing": 0.2}, "robust", {"beta": 0.3, "label_smoothing": 0.2}),
    ],
)
def test_agrees_with_trls_dpo_trainer(name, options, loss_type, settings):
    batch = drawn(16, 1)
    ours, _ = preference_loss(name, batch, **options)
    torch.testing.assert_close(ours, trl_dpo(batch, loss_type, **settings), atol=1e-5, rtol=0)


def test_conservative_dpo_agrees_with_trl_on_single_prompts():
    """trl's "aot" sorts the batch and then smooths: on a batch of one that is cDPO."""
    for i in range(6):
        batch = rows(drawn(6, 1), slice(i, i + 1))
        ours, _ = preference_loss("cdpo", batch, beta=0.3, label_smoothing=0.2)
        theirs = trl_dpo(batch, "aot", beta=0.3, label_smoothing=0.2)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.fixture
def trl_of(monkeypatch):
    """trl's experimental losses, called on a trainer that was never built."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    def trainer(kind, **settings):
        accelerator = types.SimpleNamespace(device=torch.device("cpu"))
        fake = types.SimpleNamespace(accelerator=accelerator, label_smoothing=0.0, alpha=0.0, **settings)
        function = {"cpo": CPOTrainer.cpo_loss, "orpo": ORPOTrainer.odds_ratio_loss}[kind]
        return lambda chosen, rejected: function(fake, chosen, rejected)[0]

    return trainer


def test_cpo_and_simpo_agree_with_trl(trl_of):
    batch = drawn(16, 1)
    theirs = trl_of("cpo", beta=0.4, loss_type="sigmoid")(batch.chosen, batch.rejected[:, 0])
    torch.testing.assert_close(example_losses("cpo", batch, beta=0.4, nll_weight=0.0), theirs, atol=1e-5, rtol=0)
    chosen, rejected = batch.token_means()
    theirs = trl_of("cpo", beta=2.2, loss_type="simpo", simpo_gamma=0.66)(chosen, rejected[:, 0])
    torch.testing.assert_close(
        example_losses("simpo", batch, beta=2.2, gamma_beta_ratio=0.3), theirs, atol=1e-5, rtol=0
    )


def test_odds_ratio_agrees_with_trl(trl_of):
    batch = drawn(16, 1)
    chosen, rejected = batch.token_means()
    theirs = trl_of("orpo", beta=0.3)(chosen, rejected[:, 0])
    odds = example_losses("orpo", batch, beta=0.3) - example_losses("orpo", batch, beta=0.0)
    torch.testing.assert_close(odds, -theirs, atol=1e-5, rtol=0)
