r"""Penalties for outputs or risks that differ between soft environments; first of all the squared MMD.

With the within-environment weights :math:`a_k = P_{:,k} / \sum_i p_{ik}` and the Gaussian kernel matrix
:math:`K_{ij} = \exp(-\lVert s_i - s_j\rVert^2 / 2\sigma^2)` on outputs, environments m and m' differ by
:math:`\mathrm{MMD}^2 = q^\top K q` with :math:`q = a_m - a_{m'}` (Eq. 10 of arXiv 2603.22335 with soft weights).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from causaldpo_lib.errors import StudyError, pick

# Equal up to rounding: Eq. 8's rows of identical states differ by this much.
COLLAPSE_TOLERANCE = 1e-5


def median_bandwidth(outputs: Tensor) -> Tensor:
    """Median of the pairwise distances i < j of ``outputs`` (B,) or (B, d), detached; torch's (lower) median.

    1 where it would be 0 or where there is no pair.
    """
    outputs = _as_points(outputs.detach())
    one = torch.ones((), dtype=outputs.dtype, device=outputs.device)
    if len(outputs) < 2:
        return one
    median = torch.pdist(outputs).median()
    return torch.where(median > 0, median, one)


def gaussian_kernel(outputs: Tensor, bandwidth: Tensor | float) -> Tensor:
    """exp(-||s_i - s_j||^2 / (2 bandwidth^2)) of ``outputs`` (B, d), as (B, B); the mean over several bandwidths (W,).

    Differentiable everywhere, identical outputs included.
    """
    # cdist makes no (B, B, d) array of differences; its gradient is 0 where a distance is 0, and without the
    # matrix-product mode small distances between large outputs do not drown in rounding.
    distances = (
        outputs - outputs.T
        if outputs.shape[1] == 1
        else torch.cdist(outputs, outputs, compute_mode="donot_use_mm_for_euclid_dist")
    )
    squared = distances.square()
    if isinstance(bandwidth, Tensor) and bandwidth.ndim:
        return torch.exp(-squared / (2 * bandwidth.reshape(-1, 1, 1) ** 2)).mean(0)
    return torch.exp(-squared / (2 * bandwidth**2))


def environment_weights(memberships: Tensor) -> Tensor:
    """Within-environment weights a_k of ``memberships`` (B, K): columns that sum to 1, (B, K').

    An environment without weight in this batch has no distribution to compare: it is left out.
    """
    mass = memberships.sum(0)
    return (memberships / mass.clamp_min(torch.finfo(mass.dtype).tiny))[:, mass > 1e-6]


def collapsed(memberships: Tensor) -> bool:
    """Whether all rows of ``memberships`` (B, K) are equal up to rounding, so that environments cannot differ."""
    return torch.allclose(memberships, memberships[:1].expand_as(memberships), rtol=COLLAPSE_TOLERANCE, atol=0.0)


# An estimator maps the kernel matrix (B, B) and the weights (B, K) to inner products G (K, K) between the environments'
# embeddings, from which a pair's value is G_mm + G_nn - 2 G_mn: all pairs in one matrix product.


def _inner_v(kernel: Tensor, weights: Tensor) -> Tensor:
    # Only differences of columns count; centred, nearly equal environments do not cancel in rounding.
    centred = weights - weights.mean(1, keepdim=True)
    return centred.T @ kernel @ centred


def _inner_u(kernel: Tensor, weights: Tensor) -> Tensor:
    # Both environments weigh the same examples, so i = j biases the cross term too: it is removed from all three.
    off = kernel - torch.diag_embed(kernel.diagonal())
    # a'(11' - I)c is 1 - a'c without its cancellation where one point has nearly all of the weight. An environment of
    # one point has no pair of points: its self term is 0 (0/0 otherwise).
    others = 1 - torch.eye(len(off), dtype=off.dtype, device=off.device)
    return (weights.T @ off @ weights) / (weights.T @ others @ weights).clamp_min(torch.finfo(off.dtype).tiny)


def _inner_debiased(kernel: Tensor, weights: Tensor) -> Tensor:
    # E[q'Kq] = (1 - kappa) ||q||^2 when memberships are independent of outputs; kappa: mean off-diagonal kernel value.
    size = len(kernel)
    kappa = (kernel.sum() - kernel.diagonal().sum()) / (size * (size - 1))
    return _inner_v(kernel - (1 - kappa) * torch.eye(size, dtype=kernel.dtype, device=kernel.device), weights)


ESTIMATORS = {"v": _inner_v, "u": _inner_u, "debiased": _inner_debiased}
PAIRS = {"mean": torch.mean, "sum": torch.sum, "ordered_sum": lambda values: 2 * values.sum()}


def mmd_squared(
    outputs: Tensor,
    memberships: Tensor,
    bandwidth: float | Tensor | None = None,
    estimator: str = "v",
    pairs: str = "mean",
) -> Tensor:
    """Soft-weighted MMD^2 of outputs over all pairs of environments.

    Args:
        outputs: (B,) or (B, d), the policy's output per example, which gradients flow through.
        memberships: (B, K), non-negative rows that sum to 1. Gradients flow through these too unless the caller
            detaches them, and then flattening them is a way to minimise the MMD.
        bandwidth: kernel width in the outputs' unit; None is the detached median of the pairwise distances. A tensor
            (W,) averages the kernels of several widths.
        estimator: ``v`` (never negative, for training), ``u`` (diagonal removed in all three terms) or ``debiased``.
        pairs: ``mean`` over unordered pairs, their ``sum``, or the paper's ``ordered_sum``.

    Returns:
        A scalar, float64 for float64 outputs and float32 otherwise. Exactly 0 when there are fewer than two
        environments with any weight, and - with a warning - when all memberships are equal.

    Raises:
        StudyError: shapes disagree, or an unknown estimator or reduction is named.
    """
    return mmd_estimates(outputs, memberships, bandwidth, (estimator,), pairs)[0]


def mmd_estimates(
    outputs: Tensor,
    memberships: Tensor,
    bandwidth: float | Tensor | None = None,
    estimators: Sequence[str] = ("v", "debiased"),
    pairs: str = "mean",
) -> Tensor:
    """``mmd_squared`` by each of ``estimators`` on one kernel matrix, (len(estimators),)."""
    inners = [pick(ESTIMATORS, name, "MMD estimator") for name in estimators]
    reduce = pick(PAIRS, pairs, "reduction over pairs")
    if memberships.ndim != 2 or len(memberships) != len(outputs):
        raise StudyError(
            f"memberships of shape {tuple(memberships.shape)} do not fit {len(outputs)} outputs: expected (B, K)"
        )
    outputs = _as_points(outputs)
    weights = environment_weights(memberships).to(outputs.dtype)
    nothing = ((outputs.sum() + weights.sum()) * 0.0).expand(len(inners))  # zeros that can be differentiated
    if len(outputs) > 1 and memberships.shape[1] > 1 and collapsed(memberships):
        warnings.warn(
            "all examples of a batch have the same environment memberships: the MMD between environments is 0 and "
            "regularises nothing",
            stacklevel=1,  # here, whoever calls: Python then shows it once
        )
        return nothing
    if len(outputs) < 2 or weights.shape[1] < 2:
        return nothing
    m, n = torch.triu_indices(weights.shape[1], weights.shape[1], offset=1, device=weights.device)

    def over_pairs(products: Tensor) -> Tensor:
        norms = products.diagonal()
        return reduce(norms[m] + norms[n] - 2 * products[m, n])

    with full_precision(outputs):
        kernel = gaussian_kernel(outputs, median_bandwidth(outputs) if bandwidth is None else bandwidth)
        return torch.stack([over_pairs(inner(kernel, weights)) for inner in inners])


def full_precision(tensor: Tensor) -> torch.autocast:
    """A context without automatic mixed precision: the matrix products here cancel, in bfloat16 they would be noise."""
    return torch.autocast(tensor.device.type, enabled=False)


def _as_points(outputs: Tensor) -> Tensor:
    return outputs.reshape(len(outputs), -1).to(torch.promote_types(outputs.dtype, torch.float32))


def environment_risks(losses: Tensor, memberships: Tensor) -> Tensor:
    r"""Weighted mean losses :math:`L_k = a_k^\top \ell` (K',) of the environments present among losses (B,)."""
    with full_precision(losses):
        return environment_weights(memberships).to(losses.dtype).T @ losses


def mmd(
    outputs: Tensor,
    losses: Tensor | None,
    memberships: Tensor,
    *,
    bandwidth: float | Tensor | None = None,
    estimator: str = "v",
    pairs: str = "mean",
) -> Tensor:
    """``mmd_squared`` of the outputs, which are to be distributed alike in all environments (Eq. 10)."""
    return mmd_squared(outputs, memberships, bandwidth, estimator, pairs)


def vrex(outputs: Tensor, losses: Tensor, memberships: Tensor, **kernel: object) -> Tensor:
    r"""V-REx: the variance :math:`\frac1K\sum_k (L_k - \bar L)^2` of the environments' risks.

    Source: Krueger et al., arXiv 2003.00688, Eq. 8. It asks for equal risks where the MMD asks for equal outputs, and
    uses neither outputs nor kernel.
    """
    return environment_risks(losses, memberships).var(correction=0)


def group_dro(outputs: Tensor, losses: Tensor, memberships: Tensor, *, eta: float = 10.0, **kernel: object) -> Tensor:
    r"""Soft worst case over environments, less the mean loss:
    :math:`\frac1\eta\log\frac1K\sum_k e^{\eta L_k} - \bar\ell`.

    Added to the mean loss with weight 1 it leaves the soft worst case alone, whose gradient weighs environment k by
    softmax(eta L)_k: the fixed point in q of group DRO (Sagawa et al., arXiv 1911.08731) under an entropy penalty,
    without its state between steps. With ``eta`` = 10 per nat, a risk 0.1 higher counts e times as much; eta ->
    infinity is the worst environment. Less than 0 where large environments have the larger risks.
    """
    risks = environment_risks(losses, memberships)
    return (torch.logsumexp(eta * risks, 0) - math.log(len(risks))) / eta - losses.mean()


# (outputs (B,) or (B, d), losses (B,), memberships (B, K), *, bandwidth, estimator, pairs) -> scalar
PENALTIES: dict[str, Callable[..., Tensor]] = {"mmd": mmd, "vrex": vrex, "group_dro": group_dro}
