r"""Preference losses as pure functions of summed log-probabilities (natural log, float32).

Notation, per prompt :math:`x` with a chosen response :math:`y_w` and K rejected ones :math:`y_1 \dots y_K`:
:math:`\ell(y) = \log\pi_\theta(y \mid x)`, over response tokens summed; :math:`\bar\ell(y) = \ell(y) / |y|`, the mean;
:math:`h(y) = \ell(y) - \log\pi_{ref}(y \mid x)`. A loss of ``LOSSES`` gives one value per prompt, (B,), in nats. Losses
of pairs are averaged over the rejected responses; DMPO, S-DPO and MPPO compare the chosen one with all at once.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from causaldpo_lib.errors import StudyError, pick

Scores = tuple[Tensor, Tensor]  # of the chosen (B,) and the rejected (B, K) responses


@dataclass(frozen=True, eq=False)
class LogProbs:
    """Log-probabilities of the responses of B prompts, in nats; half precision is raised to float32.

    Shapes: ``chosen``, ``ref_chosen`` (B,); ``rejected``, ``ref_rejected`` (B, K) - sums over response tokens under the
    policy and the frozen reference; ``chosen_tokens`` (B,), ``rejected_tokens`` (B, K) - response lengths;
    ``rejected_mask`` (B, K) bool - False where a prompt has fewer than K rejected responses, by default all True.
    Whatever stands at a False, NaN included, is replaced on construction and gets no gradient.

    Raises:
        StudyError: ``rejected`` is not (B, K), or a prompt has no rejected response.
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
        mask = torch.ones_like(self.rejected, dtype=torch.bool) if self.rejected_mask is None else self.rejected_mask
        if mask.shape[1] == 0 or (self.rejected_mask is not None and not mask.any(-1).all()):
            raise StudyError("a prompt has no rejected response: give each at least one")
        object.__setattr__(self, "rejected_mask", mask)
        for name in (field.name for field in fields(self)[:-1]):
            value = getattr(self, name)
            if value is not None:
                value = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
                value = value.masked_fill(~mask, 1 if name == "rejected_tokens" else 0) if value.ndim == 2 else value
                object.__setattr__(self, name, value)

    def log_ratios(self, average: bool = False) -> Scores:
        """h(y) = log pi(y|x) - log pi_ref(y|x) of chosen (B,) and rejected (B, K); ``average``: over response length.

        Raises:
            StudyError: the reference's log-probabilities, or the lengths, are not given.
        """
        if self.ref_chosen is None or self.ref_rejected is None:
            raise StudyError("this loss compares with a reference: give ref_chosen and ref_rejected")
        ratios = self.chosen - self.ref_chosen, self.rejected - self.ref_rejected
        return self.per_token(ratios) if average else ratios

    def token_means(self) -> Scores:
        """Mean log-probability per token of the chosen (B,) and rejected (B, K) responses."""
        return self.per_token((self.chosen, self.rejected))

    def per_token(self, scores: Scores) -> Scores:
        """Scores divided by response lengths.

        Raises:
            StudyError: the lengths are not given.
        """
        if self.chosen_tokens is None or self.rejected_tokens is None:
            raise StudyError("this loss averages over tokens: give chosen_tokens and rejected_tokens")
        return scores[0] / self.chosen_tokens, scores[1] / self.rejected_tokens


def mean_over_rejected(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``values`` (B, K) over each row's existing rejected responses, (B,)."""
    return values.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1)


def margins_of(scores: Scores) -> Tensor:
    """Chosen minus rejected scores, (B, K)."""
    return scores[0][:, None] - scores[1]


def _logistic(margins: Tensor, log_probs: LogProbs) -> Tensor:
    """Mean over the rejected of -log sigma(margin), (B,)."""
    return mean_over_rejected(-F.logsigmoid(margins), log_probs.rejected_mask)


def _log_sum_exp(values: Tensor, mask: Tensor) -> Tensor:
    return values.masked_fill(~mask, -torch.inf).logsumexp(-1)


# --- Pairs, with a reference ------------------------------------------------------------------------------------------


def dpo_loss(log_probs: LogProbs, *, beta: float = 0.1) -> Tensor:
    r"""DPO, Eq. 1 of the paper: :math:`-\log\sigma(\beta h_w - \beta h_l)`.

    Source: Rafailov et al., arXiv 2305.18290, Eq. 7.
    """
    return _logistic(beta * margins_of(log_probs.log_ratios()), log_probs)


def ipo_loss(log_probs: LogProbs, *, tau: float = 0.1, average: bool = True) -> Tensor:
    r"""IPO: :math:`(h_w - h_l - 1/(2\tau))^2`; ``average`` divides each h by its response's length, as trl does.

    Source: Azar et al., arXiv 2310.12036, Eq. 17, where h is a sum.
    """
    errors = margins_of(log_probs.log_ratios(average)) - 1 / (2 * tau)
    return mean_over_rejected(errors.square(), log_probs.rejected_mask)


def cdpo_loss(log_probs: LogProbs, *, beta: float = 0.1, label_smoothing: float | Tensor = 0.1) -> Tensor:
    r"""Conservative DPO, :math:`-(1-\epsilon)\log\sigma(\Delta) - \epsilon\log\sigma(-\Delta)` with
    :math:`\Delta = \beta(h_w - h_l)`: a share :math:`\epsilon` of the labels is taken to be swapped, so the best margin
    is finite, :math:`\log((1-\epsilon)/\epsilon)`.

    ``label_smoothing``: one number, or one per prompt, (B,). Source: Mitchell, "A note on DPO with noisy
    preferences", 2023.
    """
    margins = beta * margins_of(log_probs.log_ratios())
    smoothing = _per_prompt(label_smoothing, margins)
    losses = -(1 - smoothing) * F.logsigmoid(margins) - smoothing * F.logsigmoid(-margins)
    return mean_over_rejected(losses, log_probs.rejected_mask)


def rdpo_loss(log_probs: LogProbs, *, beta: float = 0.1, label_smoothing: float | Tensor = 0.1) -> Tensor:
    r"""Robust DPO, :math:`[-(1-\epsilon)\log\sigma(\Delta) + \epsilon\log\sigma(-\Delta)] / (1 - 2\epsilon)`: the mean
    over labels swapped with probability :math:`\epsilon < 1/2` is the DPO loss of the true ones. Can be negative.

    ``label_smoothing``: one number, or one per prompt, (B,). Source: Chowdhury et al., arXiv 2403.00409.

    Raises:
        StudyError: a ``label_smoothing`` of one half or more.
    """
    margins = beta * margins_of(log_probs.log_ratios())
    smoothing = _per_prompt(label_smoothing, margins)
    if torch.as_tensor(smoothing >= 0.5).any():
        raise StudyError("label_smoothing reaches 0.5, where robust DPO has no meaning: clip it below")
    losses = (-(1 - smoothing) * F.logsigmoid(margins) + smoothing * F.logsigmoid(-margins)) / (1 - 2 * smoothing)
    return mean_over_rejected(losses, log_probs.rejected_mask)


def rose_po_loss(
    log_probs: LogProbs, *, beta: float = 0.1, label_smoothing: float | Tensor = 0.1, form: str = "cdpo"
) -> Tensor:
    r"""RosePO: cDPO or rDPO (``form``) with :math:`\epsilon_i = \sigma(s_i(y_l) - s_i(y_w))` for each prompt, (B,), the
    probability that the label is wrong by the scores s of a preference oracle.

    Used as given: clip it where the oracle is not trusted above one half. Source: Liao et al., arXiv 2410.12519, which
    leaves the form open.
    """
    loss = pick({"cdpo": cdpo_loss, "rdpo": rdpo_loss}, form, "form of RosePO")
    return loss(log_probs, beta=beta, label_smoothing=label_smoothing)


def _per_prompt(label_smoothing: float | Tensor, margins: Tensor) -> float | Tensor:
    if not isinstance(label_smoothing, Tensor):
        return label_smoothing
    if label_smoothing.shape != margins.shape[:1]:
        shape, prompts = tuple(label_smoothing.shape), len(margins)
        raise StudyError(f"label_smoothing has shape {shape}: give a number, or one per prompt, ({prompts},)")
    return label_smoothing.to(margins)[:, None]


# --- Pairs, without a reference ---------------------------------------------------------------------------------------


def simpo_loss(log_probs: LogProbs, *, beta: float = 2.0, gamma_beta_ratio: float = 0.5) -> Tensor:
    r"""SimPO: :math:`-\log\sigma(\beta(\bar\ell_w - \bar\ell_l) - \gamma)`, with :math:`\gamma / \beta` given.

    Source: Meng et al., arXiv 2405.14734, Eq. 6.
    """
    return _logistic(beta * (margins_of(log_probs.token_means()) - gamma_beta_ratio), log_probs)


def cpo_loss(log_probs: LogProbs, *, beta: float = 0.1, nll_weight: float = 1.0) -> Tensor:
    r"""Contrastive preference optimization: :math:`-\log\sigma(\beta(\ell_w - \ell_l)) + \alpha\,\mathrm{NLL}(y_w)`.

    ``nll_weight`` is :math:`\alpha`; the NLL is the mean over the batch's chosen tokens, as in the authors' code.
    Source: Xu et al., arXiv 2401.08417.
    """
    pairs = _logistic(beta * margins_of((log_probs.chosen, log_probs.rejected)), log_probs)
    return pairs + nll_weight * _token_mean_nll(log_probs)


def orpo_loss(log_probs: LogProbs, *, beta: float = 0.1) -> Tensor:
    r"""ORPO: :math:`\mathrm{NLL}(y_w) - \beta\log\sigma(o(\bar\ell_w) - o(\bar\ell_l))` with the log-odds
    :math:`o(\bar\ell) = \bar\ell - \log(1 - e^{\bar\ell})`.

    ``beta`` is the paper's :math:`\lambda`, named as in trl; the NLL is the mean over the batch's chosen tokens (trl
    also counts the prompt's). Source: Hong et al., arXiv 2403.07691.
    """
    chosen, rejected = (_log_odds(mean) for mean in log_probs.token_means())
    return _token_mean_nll(log_probs) + beta * _logistic(margins_of((chosen, rejected)), log_probs)


def _token_mean_nll(log_probs: LogProbs) -> Tensor:
    """(B,) values whose mean over the batch is the negative log-likelihood per chosen token."""
    chosen, _ = log_probs.token_means()
    return -chosen * log_probs.chosen_tokens / log_probs.chosen_tokens.to(chosen).mean()


def _log_odds(mean: Tensor) -> Tensor:
    # At probability 1 the odds are infinite: the nearest number below keeps loss and gradient finite.
    mean = mean.clamp(max=-torch.finfo(mean.dtype).eps)
    return mean - torch.log(-torch.expm1(mean))


# --- Pairs, weighed by the batch --------------------------------------------------------------------------------------


def dr_dpo_loss(log_probs: LogProbs, *, beta: float = 0.1, beta_prime: float = 1.0) -> Tensor:
    r"""The DPO losses :math:`\mathcal L_i` of which Dr.DPO's batch loss is the soft minimum,
    :math:`-\beta' \log \frac1B \sum_i w_i e^{-\mathcal L_i / \beta'}`: prompts of high loss, perhaps mislabelled, count
    less. :math:`\beta' \to \infty` gives DPO. Source: Wu et al., arXiv 2407.07880.
    """
    return dpo_loss(log_probs, beta=beta)


def _dr_dpo_batch(
    log_probs: LogProbs, weights: Tensor | None, *, beta: float, beta_prime: float
) -> tuple[Tensor, dict[str, Tensor]]:
    exponents = -dpo_loss(log_probs, beta=beta) / beta_prime
    if weights is not None:
        exponents = exponents + weights.log()
    return -beta_prime * (exponents.logsumexp(0) - math.log(len(exponents))), {}


@dataclass(frozen=True)
class BetaState:
    """Running mean and standard deviation, in nats, of the margins that beta-DPO has seen."""

    mean: float = 0.0
    std: float = 0.0


def beta_dpo_loss(
    log_probs: LogProbs,
    *,
    beta: float = 0.1,
    a: float = 0.6,
    rho: float = 0.2,
    state: BetaState = BetaState(),
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""The DPO losses at the batch's own :math:`\beta_{used} = \max(\beta(1 + a(\bar\Delta_{kept} - M)), 10^{-3})`, of
    which beta-DPO's batch loss is the mean over the kept prompts.

    :math:`\Delta_i = h_w - h_l` (mean over the rejected); M and S, their running mean and (population) standard
    deviation, move from ``state`` a tenth of the way to the batch's before use, and come back as the metrics
    ``margin_mean`` and ``margin_std``. The share ``rho`` of the prompts is dropped: the others are drawn without
    replacement with weights :math:`e^{-((\Delta_i - M) / S)^2 / 2}`; without ``generator`` the largest weights stay.
    Source: Wu et al., arXiv 2407.08639, and the authors' code.
    """
    return dpo_loss(log_probs, beta=_calibrated(log_probs, beta, a, rho, state, generator)[0])


def _beta_dpo_batch(
    log_probs: LogProbs, weights: Tensor | None, **arguments: object
) -> tuple[Tensor, dict[str, Tensor]]:
    used, kept, mean, std = _calibrated(log_probs, **arguments)
    losses = dpo_loss(log_probs, beta=used)
    losses = losses if weights is None else weights * losses
    return losses[kept].mean(), {"beta_used": used, "margin_mean": mean, "margin_std": std}


@torch.no_grad()
def _calibrated(
    log_probs: LogProbs, beta: float, a: float, rho: float, state: BetaState, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """beta-DPO's beta, indices of the kept prompts, running mean and standard deviation."""
    margins = mean_over_rejected(margins_of(log_probs.log_ratios()), log_probs.rejected_mask)
    mean = 0.9 * state.mean + 0.1 * margins.mean()
    std = 0.9 * state.std + 0.1 * margins.std(correction=0)
    log_weights = -((margins - mean) / std.clamp_min(1e-6)).square() / 2
    if generator is not None:
        # The largest Gumbel-perturbed log-weights are such a draw, and no underflow can upset it. Only differences of
        # log-weights count; without the largest one the noise is not lost to rounding.
        noise = torch.empty(margins.shape, device=generator.device).exponential_(generator=generator).to(margins)
        log_weights = log_weights - log_weights.max() - noise.log()
    kept = log_weights.topk(max(1, math.floor(len(margins) * (1 - rho) + 1e-9))).indices
    return (beta * (1 + a * (margins[kept].mean() - mean))).clamp_min(1e-3), kept, mean, std


# --- One chosen response against all rejected ones --------------------------------------------------------------------


def dmpo_loss(log_probs: LogProbs, *, beta: float = 0.1) -> Tensor:
    r"""DMPO: :math:`-\log\sigma(\beta h_w - \frac1K\sum_j \beta h_j)`. Source: Bai et al., arXiv 2405.16127."""
    margins = margins_of(log_probs.log_ratios())
    return -F.logsigmoid(beta * mean_over_rejected(margins, log_probs.rejected_mask))


def s_dpo_loss(log_probs: LogProbs, *, beta: float = 1.0) -> Tensor:
    r"""S-DPO: :math:`-\log\sigma(-\log\sum_j e^{\beta(h_j - h_w)})`, a softmax cross-entropy whose class is the chosen
    response. Source: Chen et al., arXiv 2406.09215.
    """
    margins = margins_of(log_probs.log_ratios())
    return F.softplus(_log_sum_exp(-beta * margins, log_probs.rejected_mask))


def mppo_loss(log_probs: LogProbs, *, variant: str = "pair_mnm", probability: str = "geometric") -> Tensor:
    r"""MPPO on probabilities p, by ``variant``: ``pair_mnm`` :math:`-\log\sigma(\sum_j (p_w - p_j))`, ``pair_mns``
    :math:`-\sum_j\log\sigma(p_w - p_j)`, or ``pair_single``, the mean of that sum's terms.

    ``probability``: ``geometric`` :math:`p = e^{\bar\ell}` (the paper) or ``sequence`` :math:`p = e^\ell` (DynamicPO's
    code). Source: Xie et al., arXiv 2412.15244.
    """
    margins, mask = margins_of(_probabilities(log_probs, probability)), log_probs.rejected_mask
    variants = {
        "pair_mnm": lambda: -F.logsigmoid((margins * mask).sum(-1)),
        "pair_mns": lambda: -(F.logsigmoid(margins) * mask).sum(-1),
        "pair_single": lambda: _logistic(margins, log_probs),
    }
    return pick(variants, variant, "variant of MPPO")()


def _log_probabilities(log_probs: LogProbs, probability: str) -> Scores:
    kinds = {"geometric": log_probs.token_means, "sequence": lambda: (log_probs.chosen, log_probs.rejected)}
    return pick(kinds, probability, "kind of probability")()


def _probabilities(log_probs: LogProbs, probability: str) -> Scores:
    chosen, rejected = (logp.clamp(max=0).exp() for logp in _log_probabilities(log_probs, probability))
    return chosen, rejected


# --- DynamicPO: only the boundary, each response with its own beta ----------------------------------------------------


@torch.no_grad()
def boundary_negatives(log_probs: LogProbs) -> Tensor:
    r"""DynamicPO's boundary :math:`\mathcal B`, (B, K) bool: the rejected responses with :math:`\ell_j \ge \ell_w`, or,
    where there is none, the highest of three clusters of the :math:`\ell_j`.

    The clusters are the exact 3-means of the line, for which the authors' K-means searches; equal values share one.
    Source: arXiv 2605.00327 and the authors' code.
    """
    values, mask = log_probs.rejected, log_probs.rejected_mask
    violations = mask & (values >= log_probs.chosen[:, None])
    top = mask & (values >= _top_cluster_minimum(values, mask)[:, None])
    return torch.where(violations.any(-1, keepdim=True), violations, top)


def _top_cluster_minimum(values: Tensor, mask: Tensor) -> Tensor:
    r"""The least member of the highest of (at most) three clusters of each row's values, (B,).

    Clusters on a line are intervals, so all cuts a <= b of the descending values are tried. The sum of squares within
    clusters is least where :math:`\sum_c (\sum_{i \in c} v_i)^2 / |c|` is largest.
    """
    ordered = values.masked_fill(~mask, -torch.inf).sort(-1, descending=True).values
    centred = ordered - mean_over_rejected(values, mask)[:, None]  # else the squares lose digits to the common part
    total = centred.masked_fill(ordered == -torch.inf, 0.0).cumsum(-1)
    to_a, to_b, to_end = total[:, :, None], total[:, None, :], total[:, -1, None, None]
    a = torch.arange(1, values.shape[1] + 1, device=values.device)[:, None]
    b, size = a.T, mask.sum(-1)[:, None, None]
    first, middle = to_a.square() / a, (to_b - to_a).square() / (b - a).clamp_min(1)
    last = (to_end - to_b).square() / (size - b).clamp_min(1)
    cuts = (first + middle + last).masked_fill((a > b) | (b > size), -torch.inf).flatten(1).argmax(-1)
    return ordered.gather(1, cuts[:, None] // values.shape[1])[:, 0]


@torch.no_grad()
def _random_negatives(log_probs: LogProbs, size: Tensor, generator: torch.Generator | None) -> Tensor:
    """As many random rejected responses of each row as ``size`` (B,) says, (B, K) bool."""
    if generator is None:
        raise StudyError("selection 'random' draws negatives: give a generator, as the trainer does")
    noise = torch.rand(log_probs.rejected.shape, device=generator.device, generator=generator).to(log_probs.rejected)
    order = noise.masked_fill(~log_probs.rejected_mask, 2.0).argsort(-1).argsort(-1)
    return order < size[:, None]


# Which rejected responses a dynamic loss looks at: DynamicPO's boundary, as many at random, or all of them.
SELECTIONS: dict[str, Callable[[LogProbs, torch.Generator | None], Tensor]] = {
    "boundary": lambda log_probs, generator: boundary_negatives(log_probs),
    "random": lambda log_probs, generator: _random_negatives(
        log_probs, boundary_negatives(log_probs).sum(-1), generator
    ),
    "all": lambda log_probs, generator: log_probs.rejected_mask,
}


def _selected(
    log_probs: LogProbs, beta: float, gamma: float, alpha: float, selection: str, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """The selected responses (B, K) bool, and their betas (B, K)."""
    chosen = pick(SELECTIONS, selection, "selection of negatives")(log_probs, generator)
    return chosen, boundary_betas(log_probs, chosen, beta, gamma, alpha)


@torch.no_grad()
def boundary_betas(log_probs: LogProbs, boundary: Tensor, beta: float, gamma: float, alpha: float) -> Tensor:
    r"""DynamicPO's :math:`\beta_j = \beta(1 + \alpha\tanh\frac{\delta_1 - \delta_2 - \gamma}{|\delta_1| +
    |\delta_2|})` for the responses of ``boundary``, (B, K).

    :math:`\delta_1 = \ell_w - \ell_j` and :math:`\delta_2 = \ell_j - m`, with m the mean :math:`\ell` of the rejected
    responses outside the boundary, or in it where none is outside.
    """
    outside = log_probs.rejected_mask & ~boundary
    outside = torch.where(outside.any(-1, keepdim=True), outside, boundary)
    to_chosen = margins_of((log_probs.chosen, log_probs.rejected))
    to_outside = log_probs.rejected - mean_over_rejected(log_probs.rejected, outside)[:, None]
    scale = to_chosen.abs() + to_outside.abs() + 1e-8
    return beta * (1 + alpha * torch.tanh((to_chosen - to_outside - gamma) / scale))


def dynamic_dmpo_loss(
    log_probs: LogProbs,
    *,
    beta: float = 1.0,
    gamma: float = 2.0,
    alpha: float = 0.5,
    selection: str = "boundary",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""DynamicPO on DMPO: :math:`-\log\sigma(\frac{1}{|\mathcal B|}\sum_{j \in \mathcal B} \beta_j (h_w - h_j))`.

    ``alpha`` 0 is one beta for all. ``selection``, a name of ``SELECTIONS``, replaces :math:`\mathcal B` for controls;
    ``random`` needs a ``generator``. Source: arXiv 2605.00327; ``gamma`` is 2 in the first release of its code, 6 in a
    later one.
    """
    boundary, betas = _selected(log_probs, beta, gamma, alpha, selection, generator)
    return -F.logsigmoid(mean_over_rejected(betas * margins_of(log_probs.log_ratios()), boundary))


def dynamic_s_dpo_loss(
    log_probs: LogProbs,
    *,
    beta: float = 1.0,
    gamma: float = 2.0,
    alpha: float = 0.5,
    selection: str = "boundary",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""DynamicPO on S-DPO: :math:`-\log\sigma(-\log\sum_{j \in \mathcal B} e^{\beta_j (h_j - h_w)})`.

    Source: as ``dynamic_dmpo_loss``.
    """
    boundary, betas = _selected(log_probs, beta, gamma, alpha, selection, generator)
    return F.softplus(_log_sum_exp(-betas * margins_of(log_probs.log_ratios()), boundary))


def dynamic_mppo_loss(
    log_probs: LogProbs,
    *,
    beta: float = 1.0,
    gamma: float = 2.0,
    alpha: float = 0.5,
    probability: str = "geometric",
    selection: str = "boundary",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""DynamicPO on MPPO: :math:`-\log\sigma(\sum_{j \in \mathcal B} \beta_j (p_w - p_j))`, p as in ``mppo_loss``.

    Boundary and betas stay on :math:`\ell`. Source: as ``dynamic_dmpo_loss``; its code takes p of the sequence.
    """
    boundary, betas = _selected(log_probs, beta, gamma, alpha, selection, generator)
    return -F.logsigmoid((betas * margins_of(_probabilities(log_probs, probability)) * boundary).sum(-1))


@torch.no_grad()
def gradient_share(name: str, log_probs: LogProbs, boundary: Tensor, **given: object) -> Tensor:
    r"""Share of a loss's gradient that falls on ``boundary``, (B,):
    :math:`\sum_{j \in \mathcal B} |\partial L / \partial \ell_j| \,/\, \sum_j |\partial L / \partial \ell_j|`.

    The gradients are proportional to 1 (``dmpo``), :math:`e^{\beta h_j}` (``s_dpo``) and
    :math:`\partial p_j / \partial \ell_j` (``mppo``; in the variants that take pairs one by one, times
    :math:`\sigma(p_j - p_w)`). A ``dynamic_`` name stands for the loss that it is built on: the share tells what the
    boundary would get without the selection. ``given``: the loss's hyper-parameters.
    """
    options = _arguments(name, given)
    log_gradients = {
        "dmpo": lambda: torch.zeros_like(log_probs.rejected),
        "s_dpo": lambda: options["beta"] * log_probs.log_ratios()[1],
        "mppo": lambda: _mppo_log_gradients(log_probs, options["probability"], options.get("variant", "pair_mnm")),
    }
    values = pick(log_gradients, name.removeprefix("dynamic_"), "loss with a gradient share")()
    return (values.masked_fill(~log_probs.rejected_mask, -torch.inf).softmax(-1) * boundary).sum(-1)


def _mppo_log_gradients(log_probs: LogProbs, probability: str, variant: str) -> Tensor:
    """log |dL/dl| of the rejected (B, K), up to what a row has in common: log dp/dl, and how open each pair is.

    log dp/dl is log p, less the log of the number of tokens for the geometric mean. pair_mnm weighs all pairs alike,
    by the sigmoid of their sum; the other variants weigh each by its own, sigma(p_j - p_w).
    """
    _, slopes = _log_probabilities(log_probs, probability)
    if probability == "geometric":
        slopes = slopes - log_probs.rejected_tokens.log()
    if variant == "pair_mnm":
        return slopes
    return slopes + F.logsigmoid(-margins_of(_probabilities(log_probs, probability)))


# --- The tables, and what a trainer calls -----------------------------------------------------------------------------

LOSSES: dict[str, Callable[..., Tensor]] = {
    "dpo": dpo_loss,
    "ipo": ipo_loss,
    "cdpo": cdpo_loss,
    "rdpo": rdpo_loss,
    "dr_dpo": dr_dpo_loss,
    "simpo": simpo_loss,
    "cpo": cpo_loss,
    "orpo": orpo_loss,
    "dmpo": dmpo_loss,
    "s_dpo": s_dpo_loss,
    "mppo": mppo_loss,
    "rose_po": rose_po_loss,
    "beta_dpo": beta_dpo_loss,
    "dynamic_dmpo": dynamic_dmpo_loss,
    "dynamic_s_dpo": dynamic_s_dpo_loss,
    "dynamic_mppo": dynamic_mppo_loss,
}

# Losses of a batch that are not the mean over its prompts: (log_probs, weights, all hyper-parameters) -> loss, metrics.
BATCH_LOSSES = {"dr_dpo": _dr_dpo_batch, "beta_dpo": _beta_dpo_batch}


def _scaled(factor: float, scores: Scores) -> Scores:
    return factor * scores[0], factor * scores[1]


# The scores by which a loss compares responses, where they are not beta h(y).
REWARDS: dict[str, Callable[..., Scores]] = {
    "ipo": lambda log_probs, tau, average: _scaled(tau, log_probs.log_ratios(average)),
    "simpo": lambda log_probs, beta, **_: _scaled(beta, log_probs.token_means()),
    "cpo": lambda log_probs, beta, **_: _scaled(beta, (log_probs.chosen, log_probs.rejected)),
    "orpo": lambda log_probs, **_: log_probs.token_means(),
    "mppo": lambda log_probs, probability, **_: _probabilities(log_probs, probability),
    "dynamic_mppo": lambda log_probs, probability, **_: _probabilities(log_probs, probability),
}


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


def _arguments(name: str, given: dict[str, object]) -> dict[str, object]:
    """All hyper-parameters of a loss: the given ones, and the defaults of the others."""
    check_hyperparameters(name, given)
    parameters = inspect.signature(LOSSES[name]).parameters
    return {key: parameters[key].default for key in hyperparameters(name)} | given


def example_losses(name: str, log_probs: LogProbs, **options: object) -> Tensor:
    """A loss of ``LOSSES`` for each prompt, (B,); for Dr.DPO and beta-DPO the DPO losses that the batch's is made of.

    Raises:
        StudyError: unknown loss or hyper-parameter, or something that the loss needs of ``log_probs`` is missing.
    """
    check_hyperparameters(name, options)
    return LOSSES[name](log_probs, **options)


def implicit_rewards(name: str, log_probs: LogProbs, **options: object) -> Scores:
    """The scores by which a loss compares responses, chosen (B,) and rejected (B, K), with gradients.

    beta h(y) (IPO: tau h(y), over the length if ``average``); without a reference beta times the mean (SimPO) or summed
    (CPO) log-probability, the mean log-probability (ORPO), the probability (MPPO). Losses that choose a beta of their
    own score with the given one. Entries outside ``rejected_mask`` are finite and mean nothing.

    Raises:
        StudyError: as ``example_losses``.
    """
    arguments = _arguments(name, options)
    if name in REWARDS:
        return REWARDS[name](log_probs, **arguments)
    return _scaled(arguments["beta"], log_probs.log_ratios())


def preference_loss(
    name: str, log_probs: LogProbs, weights: Tensor | None = None, **options: object
) -> tuple[Tensor, dict[str, float]]:
    """Loss of a batch, and what a log should show of it.

    Args:
        weights: (B,) of mean 1 by which each prompt counts in the mean (Dr.DPO's: inside the logarithm), or None.

    Returns:
        A scalar tensor, and as floats ``margin`` (mean difference of log-ratios, or of log-probabilities without a
        reference, in nats), ``accuracy`` (share of rejected responses with an implicit reward below the chosen one's)
        and ``chosen_logp``. With K > 1 also ``margin_1`` ... and ``accuracy_1`` ... per rejected response, ``win_rate``
        (share of prompts whose chosen reward is above all) and ``margin_min`` (mean over prompts of the least margin);
        of beta-DPO ``beta_used``, ``margin_mean``, ``margin_std``; of DMPO, S-DPO, MPPO and DynamicPO on them
        ``boundary_share``, the share of DynamicPO's boundary among the rejected, and its ``gradient_share``, both with
        K > 1.

    Raises:
        StudyError: as ``example_losses``.
    """
    if name in BATCH_LOSSES:
        loss, own = BATCH_LOSSES[name](log_probs, weights, **_arguments(name, options))
    else:
        losses, own = example_losses(name, log_probs, **options), {}
        loss = (losses if weights is None else weights * losses).mean()
    metrics = _metrics(name, log_probs, options) | own
    values = torch.stack([value.float() for value in metrics.values()]).tolist()  # one transfer from the device
    # A column of rejected responses that is empty in this batch has no margin and no accuracy.
    return loss, {
        key: value
        for key, value in zip(metrics, values, strict=True)
        if not (key.rpartition("_")[2].isdigit() and math.isnan(value))
    }


@torch.no_grad()
def _metrics(name: str, log_probs: LogProbs, options: dict[str, object]) -> dict[str, Tensor]:
    mask = log_probs.rejected_mask
    scores = (log_probs.chosen, log_probs.rejected) if log_probs.ref_chosen is None else log_probs.log_ratios()
    margins = margins_of(scores)
    won = margins_of(implicit_rewards(name, log_probs, **options)) > 0
    metrics = {
        "margin": mean_over_rejected(margins, mask).mean(),
        "accuracy": mean_over_rejected(won.to(margins), mask).mean(),
        "chosen_logp": log_probs.chosen.mean(),
    }
    if mask.shape[1] > 1:
        for metric, values in (("margin", margins), ("accuracy", won)):
            columns = (values * mask).sum(0) / mask.sum(0)
            metrics |= {f"{metric}_{j}": column for j, column in enumerate(columns, start=1)}
        metrics["win_rate"] = (won | ~mask).all(-1).to(margins).mean()
        metrics["margin_min"] = margins.masked_fill(~mask, torch.inf).amin(-1).mean()
    if mask.shape[1] > 1 and name.removeprefix("dynamic_") in ("dmpo", "s_dpo", "mppo"):
        boundary = boundary_negatives(log_probs)
        metrics["boundary_share"] = mean_over_rejected(boundary.to(margins), mask).mean()
        metrics["gradient_share"] = gradient_share(name, log_probs, boundary, **options).mean()
    return metrics
