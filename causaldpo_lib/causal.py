r"""The causal regulariser on any preference loss, and the environment-conditioned policy of the backdoor formula.

:math:`\mathcal L = \mathcal L_{pref} + \lambda\,\Omega(s, \ell, P)` (Eq. 10 of arXiv 2603.22335): a penalty
:math:`\Omega` of ``PENALTIES`` on outputs s or losses that differ between environments with memberships P.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from causaldpo_lib.environments import membership_diagnostics
from causaldpo_lib.errors import StudyError, pick
from causaldpo_lib.losses import LogProbs, example_losses, implicit_rewards, mean_over_rejected, preference_loss
from causaldpo_lib.mmd import ESTIMATORS, PAIRS, PENALTIES, environment_weights, median_bandwidth, mmd_estimates


def _reward(loss: str, log_probs: LogProbs, states: Tensor | None, options: dict[str, Any]) -> Tensor:
    return implicit_rewards(loss, log_probs, **options)[0]


def _margin(loss: str, log_probs: LogProbs, states: Tensor | None, options: dict[str, Any]) -> Tensor:
    chosen, rejected = implicit_rewards(loss, log_probs, **options)
    return chosen - mean_over_rejected(rejected, log_probs.rejected_mask)


def _mean_logp(loss: str, log_probs: LogProbs, states: Tensor | None, options: dict[str, Any]) -> Tensor:
    return log_probs.token_means()[0]


def _hidden(loss: str, log_probs: LogProbs, states: Tensor | None, options: dict[str, Any]) -> Tensor:
    if states is None or states.shape[0] != len(log_probs.chosen):
        raise StudyError("output 'hidden' compares the chosen responses' states: give response_states of shape (B, d)")
    return states


# What is to be distributed alike in all environments, per example (B,) or (B, d); all of it belongs to the chosen
# response, but for the margin: the loss's own score (beta h for losses with a reference), that score less the mean of
# the rejected ones, the mean log-probability per token, the mean last-layer state over the response's tokens.
OUTPUTS: dict[str, Callable[[str, LogProbs, Tensor | None, dict[str, Any]], Tensor]] = {
    "reward": _reward,
    "mean_logp": _mean_logp,
    "margin": _margin,
    "hidden": _hidden,
}


def uniform_prior_weights(memberships: Tensor) -> Tensor:
    r"""Example weights (B,) of mean 1 that give all environments of ``memberships`` (B, K) the same say.

    .. math:: w_i = \sum_k \frac{1 / K}{\hat p(k)} p_{ik}, \quad \hat p(k) = \frac1B\sum_i p_{ik}

    so that :math:`\frac1B\sum_i w_i \ell_i = \frac1K\sum_k L_k`. Environments without weight in the batch do not count.
    """
    return len(memberships) * environment_weights(memberships).mean(1)


# The empirical prior sum_k p_hat(k) L_k is the plain mean whatever the memberships: no weights.
PRIORS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "empirical": lambda memberships: None,
    "uniform": uniform_prior_weights,
}


@dataclass(frozen=True)
class Regulariser:
    """What is added to a preference loss.

    Attributes:
        weight: lambda of Eq. 10; 0 is the preference loss alone.
        penalty: a name of ``PENALTIES``.
        output: a name of ``OUTPUTS``; the risk penalties ``vrex`` and ``group_dro`` look at the losses instead.
        prior: ``empirical``, the plain mean of the preference loss, or ``uniform`` over environments.
        estimator: of the MMD, a name of ``ESTIMATORS``; ``pairs``: reduction over pairs of environments, of ``PAIRS``.
        bandwidth: Gaussian kernel width in the output's unit; None is the batch's median distance.
        min_bandwidth: least width of the median rule. Training starts with all rewards at 0; the penalty's gradient
            grows like 1 / bandwidth and would drown the preference loss over differences that mean nothing (the
            logistic loss changes over a reward of 1).

    Raises:
        StudyError: an unknown name, a negative weight or a width that is not positive.
    """

    weight: float = 1.0
    penalty: str = "mmd"
    output: str = "reward"
    prior: str = "empirical"
    estimator: str = "v"
    pairs: str = "mean"
    bandwidth: float | None = None
    min_bandwidth: float = 0.1

    def __post_init__(self) -> None:
        pick(PENALTIES, self.penalty, "penalty")
        pick(OUTPUTS, self.output, "regularised output")
        pick(PRIORS, self.prior, "environment prior")
        pick(ESTIMATORS, self.estimator, "MMD estimator")
        pick(PAIRS, self.pairs, "reduction over pairs")
        if not self.weight >= 0:
            raise StudyError(f"the regulariser's weight is {self.weight}: give 0 or more")
        for name, width in (("bandwidth", self.bandwidth), ("min_bandwidth", self.min_bandwidth)):
            if width is not None and not width > 0:
                raise StudyError(f"{name} is {width}: give a positive kernel width, or none for the median distance")

    def width(self, outputs: Tensor) -> float | Tensor:
        """The kernel width on ``outputs``."""
        return self.bandwidth or median_bandwidth(outputs).clamp_min(self.min_bandwidth)


def causal_loss(
    loss: str,
    log_probs: LogProbs,
    memberships: Tensor,
    regulariser: Regulariser,
    response_states: Tensor | None = None,
    **loss_options: Any,
) -> tuple[Tensor, dict[str, float]]:
    """Preference loss plus weighted penalty of a batch of B examples.

    Args:
        loss: a name of ``LOSSES``; ``loss_options`` are its hyper-parameters.
        log_probs: of the policy, and of the reference where the loss or output has one.
        memberships: (B, K). Gradients reach them through the penalty only, never through the prior's weights.
        response_states: (B, d), mean last-layer states over the chosen responses' tokens, for output ``hidden``.

    Returns:
        The scalar total, and as floats ``preference_loss``, ``penalty`` (unweighted), ``mmd2`` (V-statistic) and
        ``mmd2_debiased`` of the output, ``membership_diagnostics`` of the batch and what ``preference_loss`` reports.
        With weight 0 the penalty is in these but not in the graph: the gradient is then exactly the loss's own.
    """
    weights = PRIORS[regulariser.prior](memberships.detach())
    # Some losses draw at random: what the penalty judges are the draws that are trained on.
    same = dict(loss_options)
    if loss_options.get("generator") is not None:
        same["generator"] = loss_options["generator"].clone_state()
    preference, metrics = preference_loss(loss, log_probs, weights, **loss_options)
    outputs = OUTPUTS[regulariser.output](loss, log_probs, response_states, loss_options)
    width = regulariser.width(outputs)
    penalty = PENALTIES[regulariser.penalty](
        outputs,
        None if regulariser.penalty == "mmd" else example_losses(loss, log_probs, **same),
        memberships,
        bandwidth=width,
        estimator=regulariser.estimator,
        pairs=regulariser.pairs,
    )
    with torch.no_grad():
        mmd2 = mmd_estimates(outputs, memberships, width, ("v", "debiased"), regulariser.pairs)
    total = preference + regulariser.weight * penalty if regulariser.weight else preference
    values = torch.stack([preference.detach(), penalty.detach(), *mmd2]).tolist()  # one transfer
    logged = dict(zip(("preference_loss", "penalty", "mmd2", "mmd2_debiased"), values, strict=True))
    return total, {**logged, **membership_diagnostics(memberships), **metrics}


@dataclass(frozen=True)
class Backdoor:
    r"""The policy of Eq. 6: :math:`p(y \mid do(x)) = \sum_k \hat p(k)\,p_\theta(y \mid x, E = k)`.

    Environment k is a soft prompt: ``tokens[k]``, added vocabulary entries that stand before the prompt
    (``with_environment``). ``prior`` is :math:`\hat p`, the mean row of the training memberships.

    Raises:
        StudyError: there is not one non-empty list of tokens per probability, or these are no distribution.
    """

    tokens: list[list[int]]
    prior: list[float]

    def __post_init__(self) -> None:
        if not self.tokens or len(self.tokens) != len(self.prior) or not all(self.tokens):
            raise StudyError(
                f"{len(self.tokens)} lists of environment tokens do not fit a prior over {len(self.prior)} "
                "environments: give a non-empty list of tokens for each"
            )
        if not (min(self.prior) >= 0 and abs(sum(self.prior) - 1) <= 1e-4):
            raise StudyError(f"the environments' prior {self.prior} is no distribution: give shares that sum to 1")

    def save(self, folder: Path) -> None:
        """Write ``environments.json`` into a checkpoint's folder."""
        (folder / BACKDOOR_FILE).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Backdoor:
        """Read it back.

        Raises:
            StudyError: the file is missing or damaged.
        """
        path = folder / BACKDOOR_FILE
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise StudyError(f"{path} holds no environment tokens ({error}): train the checkpoint again") from error


BACKDOOR_FILE = "environments.json"


def with_environment(prompt_ids: Sequence[int], tokens: Sequence[int], bos_id: int | None) -> list[int]:
    """The prompt's ids after an environment's tokens; a beginning-of-sequence token stays in front."""
    start = int(bos_id is not None and len(prompt_ids) > 0 and prompt_ids[0] == bos_id)
    return [*prompt_ids[:start], *tokens, *prompt_ids[start:]]


def draw_environments(memberships: Tensor, generator: torch.Generator) -> Tensor:
    """One environment per row of ``memberships`` (B, K), drawn with its probabilities: (B,) int64.

    ``generator`` lives on the device of ``memberships``.
    """
    return torch.multinomial(memberships, 1, generator=generator)[:, 0]


@torch.no_grad()
def add_environment_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    environments: int,
    tokens_per_environment: int,
    seed: int,
) -> list[list[int]]:
    r"""Add a soft prompt of new vocabulary entries per environment to model and tokenizer; their ids, one list each.

    New input rows are the mean embedding plus a hundredth of the embeddings' standard deviation as seeded noise, which
    tells them apart; new rows of an untied output layer are exactly the mean output row. The n new entries join the
    softmax, where by Jensen's inequality one at the mean row takes less than 1 / V of the old mass:
    :math:`e^{\frac1V\sum_v o_v} \le \frac1V\sum_v e^{o_v}`. An ordinary response's log-probability so falls by less
    than :math:`\log(1 + n / V)` per token (with tied embeddings up to the noise), 0.004 for 16 entries beside 4,000 and
    far less where the softmax is peaked. ``CausalDPOTrainer`` scores its reference before it calls this, so the policy
    alone has this loss, and a soft prompt in its context: h of a response starts lower by as much, and the difference
    of two responses' h by as much as their losses differ.

    With LoRA, call this first and let the adapter train the new rows:
    ``LoraConfig(..., trainable_token_indices=[i for ids in tokens for i in ids])``.

    Raises:
        StudyError: the model has adapters already, or the numbers are not positive.
    """
    if hasattr(model, "peft_config"):
        raise StudyError("environment tokens come before the adapters, and the trainer adds them: train all weights")
    if environments < 1 or tokens_per_environment < 1:
        raise StudyError(
            f"{environments} environments with {tokens_per_environment} tokens each: give at least one of both"
        )
    names = [[f"<environment {k}.{j}>" for j in range(tokens_per_environment)] for k in range(environments)]
    tokenizer.add_tokens([AddedToken(name, special=True) for group in names for name in group])
    ids = [tokenizer.convert_tokens_to_ids(group) for group in names]
    new = torch.tensor(ids).flatten()
    old = int(new.min())
    # Some models have more rows than their tokenizer has tokens: these are used, never cut off.
    rows = max(model.get_input_embeddings().weight.shape[0], int(new.max()) + 1)
    model.resize_token_embeddings(rows, mean_resizing=False)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings().weight
    if head is not None and head.weight is not embedding:
        head.weight[new] = head.weight[:old].float().mean(0).to(head.weight.dtype)
        if getattr(head, "bias", None) is not None:
            head.bias[new] = head.bias[:old].float().mean().to(head.bias.dtype)
    mean, spread = embedding[:old].float().mean(0), embedding[:old].float().std()
    noise = torch.randn(len(new), len(mean), generator=torch.Generator().manual_seed(seed)).to(embedding.device)
    embedding[new] = (mean + 0.01 * spread * noise).to(embedding.dtype)
    return ids
