"""The causal regulariser on every loss, the priors, and soft prompts per environment."""

import copy
import itertools
import json

import pytest
import torch
from conftest import small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from causaldpo_lib.causal import (
    OUTPUTS,
    PRIORS,
    Backdoor,
    Regulariser,
    add_environment_tokens,
    causal_loss,
    draw_environments,
    uniform_prior_weights,
    with_environment,
)
from causaldpo_lib.environments import membership_diagnostics
from causaldpo_lib.errors import StudyError
from causaldpo_lib.losses import (
    LOSSES,
    BetaState,
    LogProbs,
    dpo_loss,
    example_losses,
    implicit_rewards,
    preference_loss,
)
from causaldpo_lib.mmd import ESTIMATORS, PENALTIES, environment_weights, median_bandwidth, mmd_squared

TWO = torch.tensor([[0.8, 0.2], [0.3, 0.7], [0.6, 0.4]], dtype=torch.float64)


def toy(dtype=torch.float64, negatives=1):
    """Three prompts with worked values, and token counts."""

    def tensor(values):
        return torch.tensor(values, dtype=dtype)

    rejected = tensor([[-6.0, -9.0, -12.0], [-7.0, -7.2, -11.0], [-10.0, -6.5, -9.5]])[:, :negatives]
    ref_rejected = tensor([[-6.5, -8.5, -11.0], [-7.2, -7.6, -10.0], [-9.0, -6.0, -9.7]])[:, :negatives]
    return LogProbs(
        chosen=tensor([-5.0, -7.5, -4.0]).requires_grad_(),
        rejected=rejected.requires_grad_(),
        ref_chosen=tensor([-5.5, -7.0, -4.8]),
        ref_rejected=ref_rejected,
        chosen_tokens=tensor([4.0, 6.0, 3.0]),
        rejected_tokens=tensor([[5.0, 6, 8], [6, 5, 7], [8, 4, 6]])[:, :negatives],
    )


@pytest.mark.parametrize(
    ("regulariser", "expected"),
    [
        (Regulariser(weight=0.0), 0.649770),
        (Regulariser(weight=0.1), 0.660536),
        (Regulariser(weight=1.0), 0.757425),
        (Regulariser(weight=0.0, prior="uniform"), 0.661295),
        (Regulariser(weight=0.1, prior="uniform"), 0.672061),
        (Regulariser(weight=1.0, estimator="u"), 0.649770 + 0.035048),
        (Regulariser(weight=1.0, estimator="debiased"), 0.649770 + 0.029235),
        (Regulariser(weight=1.0, pairs="ordered_sum"), 0.649770 + 2 * 0.107655),
        (Regulariser(weight=2.0, penalty="vrex"), 0.649770 + 2 * (0.172872 / 2) ** 2),
        (Regulariser(weight=1.0, bandwidth=1.0), 0.757425),
    ],
)
def test_worked_values(regulariser, expected):
    total, metrics = causal_loss("dpo", toy(), TWO, regulariser, beta=1.0)
    assert total.item() == pytest.approx(expected, abs=1e-6)
    assert metrics["mmd2"] == pytest.approx(0.107655 * (2 if regulariser.pairs == "ordered_sum" else 1), abs=1e-6)
    assert metrics["preference_loss"] + regulariser.weight * metrics["penalty"] == pytest.approx(expected, abs=1e-6)


def test_metrics_are_floats_of_the_loss_the_penalty_and_the_environments():
    log_probs = toy(negatives=3)
    _, metrics = causal_loss("dpo", log_probs, TWO, Regulariser(), beta=1.0)
    assert all(isinstance(value, float | int) for value in metrics.values())
    assert metrics["mmd2_debiased"] == pytest.approx(0.029235, abs=1e-6)
    assert membership_diagnostics(TWO).items() <= metrics.items()
    assert preference_loss("dpo", log_probs, beta=1.0)[1].items() <= metrics.items()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("penalty", PENALTIES)
def test_every_loss_takes_every_penalty(loss, penalty):
    log_probs = toy(torch.float32, negatives=3)
    total, metrics = causal_loss(loss, log_probs, TWO.float(), Regulariser(0.5, penalty))
    plain = preference_loss(loss, log_probs)[0]
    # Independently: the penalty of the loss's own chosen score, or of its losses.
    score, losses = implicit_rewards(loss, log_probs)[0], example_losses(loss, log_probs)
    width = median_bandwidth(score).clamp_min(0.1)
    expected = PENALTIES[penalty](score, losses, TWO.float(), bandwidth=width, estimator="v", pairs="mean")
    assert total.item() == pytest.approx((plain + 0.5 * expected).item(), abs=1e-6)
    assert metrics["penalty"] == pytest.approx(expected.item(), abs=1e-6)
    total.backward()
    assert log_probs.chosen.grad.isfinite().all()


@pytest.mark.parametrize("loss", ["dpo", "simpo", "s_dpo"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_outputs_by_their_definitions(loss, output):
    log_probs = toy(negatives=3)
    states = torch.randn(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    beta = 0.7
    if loss == "simpo":
        chosen = beta * log_probs.chosen / log_probs.chosen_tokens
        rejected = beta * log_probs.rejected / log_probs.rejected_tokens
    else:
        chosen = beta * (log_probs.chosen - log_probs.ref_chosen)
        rejected = beta * (log_probs.rejected - log_probs.ref_rejected)
    expected = {
        "reward": chosen,
        "mean_logp": log_probs.chosen / log_probs.chosen_tokens,
        "margin": chosen - rejected.mean(1),
        "hidden": states,
    }[output]
    _, metrics = causal_loss(loss, log_probs, TWO, Regulariser(output=output, bandwidth=0.4), states, beta=beta)
    assert metrics["mmd2"] == pytest.approx(mmd_squared(expected, TWO, 0.4).item(), rel=1e-6)


def test_the_margin_looks_at_existing_responses_only():
    log_probs = toy(negatives=3)
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    masked = LogProbs(**{**vars(log_probs), "rejected_mask": mask})
    h = (log_probs.rejected - log_probs.ref_rejected).detach()
    rejected = torch.stack([h[0, :2].mean(), h[1, 0], h[2].mean()])
    expected = mmd_squared((log_probs.chosen - log_probs.ref_chosen) - rejected, TWO, 1.0)
    _, metrics = causal_loss("dpo", masked, TWO, Regulariser(output="margin", bandwidth=1.0), beta=1.0)
    assert metrics["mmd2"] == pytest.approx(expected.item(), abs=1e-6)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10_000), environments=st.integers(1, 5), sharpness=st.floats(0.1, 20.0))
def test_the_empirical_prior_is_the_plain_loss_whatever_the_memberships(seed, environments, sharpness):
    generator = torch.Generator().manual_seed(seed)
    memberships = torch.softmax(
        sharpness * torch.randn(3, environments, generator=generator, dtype=torch.float64), dim=1
    )
    log_probs = toy()
    total, _ = causal_loss("dpo", log_probs, memberships, Regulariser(weight=0.0), beta=1.0)
    # Backdoor-weighted, written out: sum_k p_hat_k sum_i p_ik l_i / sum_i p_ik.
    losses = dpo_loss(log_probs, beta=1.0)
    weighted = sum(
        memberships[:, k].mean() * (memberships[:, k] @ losses) / memberships[:, k].sum() for k in range(environments)
    )
    policy = (log_probs.chosen, log_probs.rejected)
    gradients = torch.autograd.grad(total, policy, retain_graph=True)
    for other in (weighted, losses.mean()):
        assert total.item() == pytest.approx(other.item(), abs=1e-12)
        for found, expected in zip(gradients, torch.autograd.grad(other, policy, retain_graph=True), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@settings(deadline=None, max_examples=30)
@given(shape=st.tuples(st.integers(1, 12), st.integers(1, 5)), seed=st.integers(0, 1000))
def test_uniform_prior_weights_have_mean_1_and_give_environments_the_same_say(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    memberships = torch.softmax(3 * torch.randn(*shape, generator=generator, dtype=torch.float64), dim=1)
    weights = uniform_prior_weights(memberships)
    prior = memberships.mean(0)
    by_hand = [sum(memberships[i, k] / prior[k] for k in range(shape[1])) / shape[1] for i in range(shape[0])]
    torch.testing.assert_close(weights, torch.stack(by_hand))
    losses = torch.randn(shape[0], generator=generator, dtype=torch.float64)
    risks = environment_weights(memberships).T @ losses
    assert weights.mean().item() == pytest.approx(1.0)
    assert (weights * losses).mean().item() == pytest.approx(risks.mean().item())


def test_an_environment_that_is_absent_from_the_batch_has_no_say():
    absent = torch.eye(3)[[0, 0, 0, 1]]
    torch.testing.assert_close(uniform_prior_weights(absent), torch.tensor([2 / 3, 2 / 3, 2 / 3, 2.0]))


@pytest.mark.parametrize(
    ("loss", "options"),
    [("dynamic_dmpo", {"selection": "random"}), ("beta_dpo", {"rho": 0.4, "state": BetaState(0.0, 10.0)})],
    ids=["dynamic_dmpo", "beta_dpo"],
)
@pytest.mark.parametrize("penalty", ["vrex", "group_dro"])
def test_the_penalty_judges_the_draws_that_are_trained_on(loss, options, penalty):
    def with_generator(seed):
        return {**options, "generator": torch.Generator().manual_seed(seed)}

    log_probs = toy(negatives=3)
    drawn, penalties = set(), set()
    for seed in range(12):
        total, metrics = causal_loss(loss, log_probs, TWO, Regulariser(0.5, penalty), **with_generator(seed))
        losses = example_losses(loss, log_probs, **with_generator(seed))
        outputs = implicit_rewards(loss, log_probs)[0]
        expected = PENALTIES[penalty](outputs, losses, TWO, bandwidth=1.0, estimator="v", pairs="mean")
        assert metrics["penalty"] == pytest.approx(expected.item(), abs=1e-9)
        preference, _ = preference_loss(loss, log_probs, **with_generator(seed))
        assert total.item() == pytest.approx((preference + 0.5 * expected).item(), abs=1e-9)
        drawn.add(round(preference.item(), 6))
        penalties.add(round(expected.item(), 6))
    assert len(drawn) > 1 and len(penalties) > 1


def test_weight_0_keeps_the_penalty_out_of_the_graph():
    log_probs, plain = toy(), toy()
    memberships = TWO.clone().requires_grad_()
    total, metrics = causal_loss("dpo", log_probs, memberships, Regulariser(weight=0.0), beta=0.3)
    total.backward()
    preference_loss("dpo", plain, beta=0.3)[0].backward()
    assert torch.equal(log_probs.chosen.grad, plain.chosen.grad) and memberships.grad is None
    assert metrics["penalty"] > 0


@pytest.mark.parametrize(
    ("penalty", "output", "estimator"),
    [("mmd", output, estimator) for output in ("reward", "mean_logp", "margin") for estimator in ESTIMATORS]
    + [("vrex", "reward", "v"), ("group_dro", "reward", "v")],
)
def test_gradients_match_finite_differences(penalty, output, estimator):
    regulariser = Regulariser(0.8, penalty, output, "uniform", estimator, bandwidth=0.6)
    given_ = toy(negatives=3)

    def total(chosen, rejected):
        log_probs = LogProbs(**{**vars(given_), "chosen": chosen, "rejected": rejected})
        return causal_loss("dpo", log_probs, TWO, regulariser, beta=0.9)[0]

    assert torch.autograd.gradcheck(total, (given_.chosen, given_.rejected))


def test_gradients_reach_memberships_through_the_penalty_only():
    memberships = TWO.clone().requires_grad_()
    total, _ = causal_loss("dpo", toy(), memberships, Regulariser(1.0, prior="uniform", bandwidth=1.0), beta=1.0)
    (found,) = torch.autograd.grad(total, memberships)
    (expected,) = torch.autograd.grad(mmd_squared((toy().chosen - toy().ref_chosen), memberships, 1.0), memberships)
    torch.testing.assert_close(found, expected)


def test_collapsed_memberships_leave_the_preference_loss():
    log_probs, plain = toy(), toy()
    with pytest.warns(UserWarning, match="regularises nothing"):
        total, metrics = causal_loss("dpo", log_probs, torch.full((3, 4), 0.25).double(), Regulariser(5.0), beta=1.0)
    total.backward()
    preference_loss("dpo", plain, beta=1.0)[0].backward()
    assert metrics["penalty"] == metrics["mmd2"] == metrics["mmd2_debiased"] == metrics["weight_distance"] == 0.0
    assert torch.equal(log_probs.chosen.grad, plain.chosen.grad)


def test_the_median_bandwidth_has_a_floor_and_a_fixed_one_has_none():
    rewards = torch.tensor([0.0, 0.001, 0.002])
    assert Regulariser().width(rewards).item() == pytest.approx(0.1)
    assert Regulariser(min_bandwidth=1e-6).width(rewards).item() == pytest.approx(0.001)
    assert Regulariser(bandwidth=0.01).width(rewards) == 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalty": "irm"}, "unknown penalty 'irm'"),
        ({"output": "rewards"}, "unknown regularised output 'rewards' \\(did you mean 'reward'"),
        ({"prior": "flat"}, "unknown environment prior 'flat'"),
        ({"estimator": "w"}, "unknown MMD estimator 'w'"),
        ({"pairs": "all"}, "unknown reduction over pairs 'all'"),
        ({"weight": -1.0}, "weight is -1.0: give 0 or more"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"bandwidth": 0.0}, "bandwidth is 0.0: give a positive"),
        ({"min_bandwidth": -1.0}, "min_bandwidth is -1.0"),
    ],
)
def test_bad_regularisers_are_named(options, message):
    with pytest.raises(StudyError, match=message):
        Regulariser(**options)


def test_missing_input_of_an_output_is_named():
    with pytest.raises(StudyError, match="give response_states of shape"):
        causal_loss("dpo", toy(), TWO, Regulariser(output="hidden"))
    bare = LogProbs(toy().chosen, toy().rejected, toy().ref_chosen, toy().ref_rejected)
    with pytest.raises(StudyError, match="chosen_tokens"):
        causal_loss("dpo", bare, TWO, Regulariser(output="mean_logp"))


def test_a_backdoor_travels_with_its_checkpoint(tmp_path):
    backdoor = Backdoor([[7, 8], [9, 10]], [0.25, 0.75])
    backdoor.save(tmp_path)
    assert Backdoor.load(tmp_path) == backdoor
    assert json.loads((tmp_path / "environments.json").read_text()) == {
        "tokens": [[7, 8], [9, 10]],
        "prior": [0.25, 0.75],
    }
    for damage in ("{", "[]", '{"tokens": [[1]]}'):
        (tmp_path / "environments.json").write_text(damage)
        with pytest.raises(StudyError, match=r"environments\.json holds no environment tokens"):
            Backdoor.load(tmp_path)
    with pytest.raises(StudyError, match="holds no environment tokens"):
        Backdoor.load(tmp_path / "absent")
    for tokens, prior, message in [
        ([[1]], [0.5, 0.5], "do not fit a prior over 2"),
        ([[1], []], [0.5, 0.5], "non-empty list"),
        ([[1], [2]], [0.5, 0.6], "no distribution"),
        ([[1], [2]], [1.5, -0.5], "no distribution"),
        ([[1], [2]], [float("nan"), 1.0], "no distribution"),
    ]:
        with pytest.raises(StudyError, match=message):
            Backdoor(tokens, prior)


def test_environment_tokens_stand_behind_the_beginning_of_the_sequence():
    assert with_environment([1, 5, 6], [90, 91], 1) == [1, 90, 91, 5, 6]
    assert with_environment([5, 6], [90, 91], 1) == with_environment([5, 6], [90, 91], None) == [90, 91, 5, 6]


def test_environments_are_drawn_with_their_memberships():
    memberships = torch.tensor([[0.9, 0.1, 0.0]]).expand(20_000, 3)
    drawn = draw_environments(memberships, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=3) / 20_000
    assert shares[0].item() == pytest.approx(0.9, abs=0.01) and shares[2] == 0
    assert torch.equal(drawn, draw_environments(memberships, torch.Generator().manual_seed(0)))
    assert drawn.shape == (20_000,)


@pytest.fixture
def expanded(tiny):
    """The tiny backbone before and after adding three environments of two tokens."""
    model, tokenizer = copy.deepcopy(tiny)
    tokens = add_environment_tokens(model, tokenizer, 3, 2, seed=0)
    return tiny[0], model, tokenizer, tokens


def log_softmax(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits.log_softmax(-1)


def test_added_tokens_are_new_and_special(expanded, tiny):
    _, model, tokenizer, tokens = expanded
    old = len(tiny[1])
    assert tokens == [[old, old + 1], [old + 2, old + 3], [old + 4, old + 5]]
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == old + 6
    assert tokenizer.decode(tokens[0], skip_special_tokens=True) == ""
    text = "Chosen so far: Silent Harbor\nNext:"
    assert tokenizer(text)["input_ids"] == tiny[1](text)["input_ids"]


@pytest.mark.parametrize("tied", [True, False])
def test_ordinary_log_probabilities_hardly_change(tiny, tied):
    _, tokenizer = copy.deepcopy(tiny)
    torch.manual_seed(0)
    before = copy.deepcopy(tiny[0]) if tied else small_model("llama", len(tokenizer))
    with torch.no_grad():
        before.get_output_embeddings().weight.mul_(8.0)  # peaked, as after training
    model = copy.deepcopy(before)
    tokens = add_environment_tokens(model, tokenizer, 3, 2, seed=0)
    old, ids = tokens[0][0], [1, 30, 31, 32, 33]
    plain, wider = log_softmax(before, ids), log_softmax(model, ids)
    fall = plain - wider[..., :old]
    torch.testing.assert_close(fall, fall[..., :1].expand_as(fall), atol=1e-4, rtol=0)  # one factor for all: the mass
    if not tied:
        head = model.get_output_embeddings().weight
        torch.testing.assert_close(head[old:], head[:old].mean(0).expand(6, -1))
    # Jensen: at most log(1 + n / V) with rows at the mean; tied rows carry the noise of the embeddings as well.
    bound = torch.log1p(torch.tensor(6 / old)).item()
    assert fall.min() >= -1e-5 and fall.max() <= (1.05 if tied else 1.0) * bound + 1e-5


def test_new_rows_are_near_the_mean_distinct_and_seeded(expanded, tiny):
    _, model, _, tokens = expanded
    rows = model.get_input_embeddings().weight.detach()
    old, new = rows[: tokens[0][0]], rows[tokens[0][0] :]
    assert (new - old.mean(0)).abs().max() < 0.05 * old.std()
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(new, 2))
    torch.testing.assert_close(old, tiny[0].get_input_embeddings().weight, atol=0, rtol=0)
    for seed, same in ((0, True), (1, False)):
        again, tokenizer = copy.deepcopy(tiny)
        add_environment_tokens(again, tokenizer, 3, 2, seed=seed)
        assert torch.equal(again.get_input_embeddings().weight, rows) == same


def test_rows_that_a_model_keeps_in_reserve_are_used(tiny):
    tokenizer = copy.deepcopy(tiny[1])
    model = small_model("qwen2", len(tokenizer) + 3)
    tokens = add_environment_tokens(model, tokenizer, 1, 2, seed=0)
    assert tokens == [[len(tokenizer) - 2, len(tokenizer) - 1]]
    assert model.get_input_embeddings().weight.shape[0] == len(tiny[1]) + 3


def test_adapters_train_the_new_rows_and_no_other(expanded):
    _, model, _, tokens = expanded
    new = [index for group in tokens for index in group]
    before = model.get_input_embeddings().weight.detach().clone()
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=new, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 1.0)
    ids = torch.tensor([[1, *tokens[1], 30, 31]])
    adapted(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    merged = adapted.merge_and_unload()
    changed = (merged.get_input_embeddings().weight.detach() != before).any(1).nonzero()[:, 0].tolist()
    assert set(tokens[1]) <= set(changed) <= set(new)
    with pytest.raises(StudyError, match="before the adapters"):
        add_environment_tokens(get_peft_model(merged, LoraConfig(r=2, target_modules=["q_proj"])), None, 1, 1, 0)


def test_numbers_of_environment_tokens_must_be_positive(tiny):
    for counts in ((0, 2), (2, 0)):
        with pytest.raises(StudyError, match="give at least one of both"):
            add_environment_tokens(*tiny, *counts, seed=0)


def test_every_prior_is_a_weighting_or_none():
    for prior in PRIORS.values():
        weights = prior(TWO)
        assert weights is None or (weights > 0).all()
