"""Preference losses as pure functions of summed log-probabilities (natural log, float32)."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from causaldpo_lib.errors import StudyError, pick


@dataclass
class LogProbs:
    """Log-probabilities of the responses of B prompts, in nats.

    Shapes: ``chosen``, ``ref_chosen`` (B,); ``rejected``, ``ref_rejected`` (B, K) - sums over response tokens under the
    policy and the frozen reference; ``chosen_tokens`` (B,), ``rejected_tokens`` (B, K) - response lengths;
    ``rejected_mask`` (B, K) bool - False where a prompt has fewer than K rejected responses.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    chosen_tokens: Tensor | None = None
    rejected_tokens: Tensor | None = None
    rejected_mask: Tensor | None = None

    def __post_init__(self) -> None:
        if self.rejected.ndim != 2 or self.rejected.shape[0] != self.chosen.shape[0]:
            raise StudyError(
                f"rejected log-probabilities have shape {tuple(self.rejected.shape)}: expected (B, K) with B = "
                f"{self.chosen.shape[0]} as in chosen"
            )

    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """h(y) = log pi(y|x) - log pi_ref(y|x) of the chosen (B,) and rejected (B, K) responses.

        Raises:
            StudyError: the reference's log-probabilities are not given.
        """
        if self.ref_chosen is None or self.ref_rejected is None:
            raise StudyError("this loss compares with a reference: give ref_chosen and ref_rejected")
        return self.chosen - self.ref_chosen, self.rejected - self.ref_rejected


def mean_over_rejected(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of ``values`` (B, K) over each row's existing rejected responses, (B,)."""
    if mask is None:
        return values.mean(-1)
    return values.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1)


def dpo_loss(log_probs: LogProbs, *, beta: float = 0.1) -> Tensor:
    r"""DPO, Eq. 1 of the paper: :math:`-\log\sigma(\beta h_w - \beta h_l)`, per example (B,).

    With K > 1 the mean over the rejected responses' losses. Source: Rafailov et al., arXiv 2305.18290, Eq. 7.
    """
    chosen, rejected = log_probs.log_ratios()
    return mean_over_rejected(-F.logsigmoid(beta * (chosen[:, None] - rejected)), log_probs.rejected_mask)


LOSSES: dict[str, Callable[..., Tensor]] = {"dpo": dpo_loss}


def hyperparameters(name: str) -> list[str]:
    """The names of a loss's hyper-parameters."""
    return list(inspect.signature(pick(LOSSES, name, "loss")).parameters)[1:]


def check_hyperparameters(name: str, given: dict[str, object]) -> None:
    """Refuse an unknown loss or hyper-parameter.

    Raises:
        StudyError: names the loss, the key and the keys that exist.
    """
    known = hyperparameters(name)
    for key in given:
        if key not in known:
            raise StudyError(f"loss {name!r} has no hyper-parameter {key!r}: choose from {', '.join(known)}")


def preference_loss(name: str, log_probs: LogProbs, **options: float) -> tuple[Tensor, dict[str, float]]:
    """Batch mean of a loss of ``LOSSES``, and what a log should show of the batch.

    Returns:
        A scalar tensor, and ``margin`` (mean log-ratio difference, in nats, where a reference is given), ``accuracy``
        (share of rejected responses whose score is below the chosen one's) and ``chosen_logp``, as floats.

    Raises:
        StudyError: unknown loss or hyper-parameter, or a reference is missing.
    """
    check_hyperparameters(name, options)
    loss = LOSSES[name](log_probs, **options).mean()
    if log_probs.ref_chosen is None:
        chosen, rejected = log_probs.chosen, log_probs.rejected
    else:
        chosen, rejected = log_probs.log_ratios()
    margins = (chosen[:, None] - rejected).detach()
    mask = log_probs.rejected_mask
    metrics = {
        "margin": mean_over_rejected(margins, mask).mean().item(),
        "accuracy": mean_over_rejected((margins > 0).float(), mask).mean().item(),
        "chosen_logp": log_probs.chosen.detach().mean().item(),
    }
    return loss, metrics
