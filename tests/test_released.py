"""The published trainer's objective: the consequence of each departure, and what is left when all are switched off."""

import pytest
import torch
from conftest import small_model
from torch import nn

from causaldpo_lib import released
from causaldpo_lib.environments import soft_memberships
from causaldpo_lib.errors import StudyError
from causaldpo_lib.losses import LogProbs, dpo_loss
from causaldpo_lib.mmd import mmd_squared
from causaldpo_lib.released import DEPARTURES, IGNORED, pad_pairs, released_code_loss

VOCABULARY, TEMPLATE, BATCH = 500, [7, 11, 13], 24


@pytest.fixture(scope="module")
def batch():
    """Two prompts of one template, twelve times each, and two random responses for each."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(20, VOCABULARY, (count,), generator=generator).tolist()

    prompts = [TEMPLATE + ids(4), TEMPLATE + ids(7)] * (BATCH // 2)
    return tuple(pad_pairs(prompts, [ids(2 + (i + r) % 3) for i in range(BATCH)], 0) for r in range(2))


@pytest.fixture(scope="module")
def models():
    reference = small_model("llama", VOCABULARY)
    policy = small_model("llama", VOCABULARY)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy, reference


def projection():
    torch.manual_seed(2)
    return nn.Linear(32, 32)


def run(models, batch, without=(), beta=0.1, seed=0):
    kept = [name for name in DEPARTURES if name not in without]
    return released_code_loss(
        *models, *batch, projection(), torch.Generator().manual_seed(seed), beta=beta, departures=kept
    )


def test_pairs_are_padded_on_the_right_and_only_responses_are_labelled():
    tokens = pad_pairs([[5, 6], [5]], [[8], [9, 4]], 0)
    assert tokens.input_ids.tolist() == [[5, 6, 8], [5, 9, 4]]
    assert tokens.labels.tolist() == [[IGNORED, IGNORED, 8], [IGNORED, 9, 4]]
    assert pad_pairs([[5, 6], [5]], [[8], [9]], 0).attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_features_of_the_first_token_are_the_same_whatever_the_history(models, batch):
    assert run(models, batch)[1]["feature_spread"] < 1e-4
    assert run(models, batch, ["features"])[1]["feature_spread"] > 0.1
    states = torch.arange(12.0).reshape(1, 4, 3)
    tokens = pad_pairs([[5, 6, 7]], [[8]], 0)
    assert released.last_prompt_position(states, tokens).tolist() == [[6.0, 7.0, 8.0]]


@pytest.mark.parametrize(("count", "clusters"), [(8, 0), (16, 1), (24, 2), (40, 3)])
def test_missing_centres_are_noise_and_surplus_ones_are_dropped(count, clusters):
    z = 20.0 * torch.arange(count)[:, None].remainder(max(clusters, 1)).expand(count, 4)
    first, second = (released.two_centres(z, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert first.shape == (2, 4)
    assert (first == second).all(1).sum() == min(clusters, 2)  # the others depend on the seed
    assert len(released.found_centres(z, torch.Generator())) == max(clusters, 1)


def test_broadcasting_returns_the_batch_and_truncation_lowers_ids():
    shifted = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 4000, (BATCH, 60), generator=generator)
        weights = torch.rand(BATCH, generator=generator)
        average = released.broadcast_average(ids, weights)
        assert average.shape == ids.shape and (average - ids).abs().max() < 1e-2  # no average of anything
        assert (released.rounded(average) == ids).all()
        change = released.truncated(average) - ids
        assert set(change.unique().tolist()) <= {0, -1}
        shifted.append((change == -1).float().mean().item())
    # About a quarter; how much of it depends on the order in which a machine adds.
    assert 0.1 < sum(shifted) / 20 < 0.5
    assert (released.truncated(released.broadcast_average(ids, torch.ones(BATCH))) == ids).all()


def test_rounding_decides_on_the_attention_of_all_positions_at_once():
    kept = set()
    for seed in range(40):
        weights = torch.rand(16, generator=torch.Generator().manual_seed(seed))
        mask = torch.ones(16, 16, dtype=torch.long)  # whole vector registers: a remainder is added in another order
        mask[:, -2:] = 0
        result = released.equality_mask(mask, weights)
        assert (result[:, -2:] == 0).all()
        kept.add(result[:, :-2].float().mean().item())
    assert kept == {0.0, 1.0}


def test_zeroed_labels_score_prompt_and_padding_on_token_0(models, batch):
    chosen = batch[0]
    metrics = run(models, batch)[1]
    assert metrics["counted"] == 1.0 and metrics["response_share"] < 0.5
    assert run(models, batch, ["labels"])[1]["counted"] == pytest.approx(metrics["response_share"])
    scores, logits = released.sequence_logps(models[0], chosen, released.zeroed_labels)
    proper, _ = released.sequence_logps(models[0], chosen, released.response_labels)
    token_0 = logits.log_softmax(-1)[:, :-1, 0]
    elsewhere = (token_0 * (chosen.labels[:, 1:] == IGNORED)).sum(1)
    torch.testing.assert_close(scores, proper + elsewhere, atol=1e-3, rtol=1e-5)


def test_no_gradient_outside_the_clamp():
    ratios = torch.tensor([-30.0, -3.0, 3.0, 30.0], requires_grad=True)
    released.clamped(ratios).sum().backward()
    assert ratios.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_beta_is_a_tenth_whatever_is_asked_for(models, batch):
    assert run(models, batch, beta=2.0)[0] == run(models, batch, beta=0.1)[0]
    assert run(models, batch, ["beta"], beta=2.0)[0] != run(models, batch, ["beta"], beta=0.1)[0]


def test_the_penalty_between_copies_is_nothing(models, batch):
    exact = run(models, batch, ["cast", "attention"])[1]  # copies without rounding damage
    assert exact["environments"] == 2 and exact["shifted_ids"] == 0.0 and exact["attended"] == 1.0
    assert exact["mmd2"] == pytest.approx(0.0, abs=1e-6)
    # Mean logits of different examples do not see each other: only i = j counts, and MMD^2 is at most 2 / B.
    far = 100 * torch.randn(2 * BATCH, VOCABULARY, generator=torch.Generator().manual_seed(0))
    hard = torch.eye(2).repeat_interleave(BATCH, 0)
    assert mmd_squared(far, hard, released.MMD_BANDWIDTH).item() == pytest.approx(2 / BATCH, rel=1e-5)


def test_with_every_departure_off_it_is_dpo_with_the_papers_penalty(models, batch):
    policy, reference = models
    loss, metrics = run(models, batch, DEPARTURES, beta=0.7)
    h = [
        released.sequence_logps(policy, tokens, released.response_labels)[0]
        - released.sequence_logps(reference, tokens, released.response_labels)[0]
        for tokens in batch
    ]
    states = policy(input_ids=batch[0].input_ids, output_hidden_states=True).hidden_states[-1]
    z = projection()(released.last_prompt_position(states, batch[0]))
    memberships = soft_memberships(z, released.found_centres(z.detach(), torch.Generator())).detach()
    dpo = dpo_loss(LogProbs(h[0], h[1][:, None], 0 * h[0], 0 * h[1][:, None]), beta=0.7).mean()
    penalty = mmd_squared(0.7 * h[0], memberships, 1.0)
    assert metrics["environments"] == memberships.shape[1] == 2
    assert metrics["mmd2"] == pytest.approx(penalty.item(), rel=1e-4) and penalty > 1e-3
    assert loss.item() == pytest.approx((dpo + 0.001 * penalty).item(), abs=1e-6)


@pytest.mark.parametrize("name", DEPARTURES)
@pytest.mark.parametrize("side", ["released", "paper"])
def test_a_name_switches_its_own_departure(monkeypatch, models, batch, name, side):
    called = []

    def spy(which):
        function = getattr(DEPARTURES[name], which)
        return lambda *arguments: called.append(which) or function(*arguments)

    monkeypatch.setitem(DEPARTURES, name, released.Departure(spy("released"), spy("paper")))
    run(models, batch, [name] if side == "paper" else [])
    assert set(called) == {side}


@pytest.mark.parametrize("name", DEPARTURES)
def test_each_departure_can_be_switched_off_and_leaves_a_trainable_loss(models, batch, name):
    policy = models[0]
    loss, _ = run(models, batch, [name], beta=0.5)
    policy.zero_grad()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    policy.zero_grad()
    assert loss.isfinite() and gradient.isfinite().all()


def test_memberships_that_underflow_are_left_out_and_counted(models, batch):
    policy, reference = models
    far = nn.Linear(32, 32)
    nn.init.constant_(far.bias, 1000.0)  # the random second centre is then beyond what exp can express
    _, metrics = released_code_loss(policy, reference, *batch, far, torch.Generator().manual_seed(0))
    assert metrics["undefined_environments"] == 1 and metrics["environments"] == 1


def test_unknown_departures_are_named(models, batch):
    with pytest.raises(StudyError, match="unknown departure 'labls' \\(did you mean 'labels'"):
        released_code_loss(*models, *batch, projection(), torch.Generator(), departures=["labls"])
