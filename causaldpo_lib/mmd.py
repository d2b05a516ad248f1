r"""Squared maximum mean discrepancy of outputs between soft environments.

With the within-environment weights :math:`a_k = P_{:,k} / \sum_i p_{ik}` and the Gaussian kernel matrix
:math:`K_{ij} = \exp(-\lVert s_i - s_j\rVert^2 / 2\sigma^2)` on outputs, environments m and m' differ by
:math:`\mathrm{MMD}^2 = q^\top K q` with :math:`q = a_m - a_{m'}` (Eq. 10 of arXiv 2603.22335 with soft weights).
"""

from __future__ import annotations

import torch
from torch import Tensor

from causaldpo_lib.errors import StudyError, pick


def median_bandwidth(outputs: Tensor) -> Tensor:
    """Median of the pairwise distances i < j of ``outputs`` (B,) or (B, d), detached; torch's (lower) median.

    1 where it would be 0 or where there is no pair.
    """
    one = torch.ones((), device=outputs.device)
    if len(outputs) < 2:
        return one
    median = torch.pdist(outputs.detach().reshape(len(outputs), -1).float()).median()
    return torch.where(median > 0, median, one)


def gaussian_kernel(outputs: Tensor, bandwidth: Tensor | float) -> Tensor:
    """exp(-||s_i - s_j||^2 / (2 bandwidth^2)) of ``outputs`` (B, d), as (B, B)."""
    # Differences instead of cdist: the square root's gradient is undefined on the diagonal.
    squared = (outputs[:, None, :] - outputs[None, :, :]).square().sum(-1)
    return torch.exp(-squared / (2 * bandwidth**2))


def _pair_v(kernel: Tensor, a: Tensor, c: Tensor) -> Tensor:
    q = a - c
    return q @ kernel @ q


def _pair_u(kernel: Tensor, a: Tensor, c: Tensor) -> Tensor:
    # Both environments weigh the same examples, so i = j biases the cross term too: it is removed from all three.
    off = kernel - torch.diag_embed(kernel.diagonal())

    def term(left: Tensor, right: Tensor) -> Tensor:
        # An environment of one point has no pair of points: its self term is 0 (0/0 otherwise).
        return (left @ off @ right) / (1 - left @ right).clamp_min(torch.finfo(off.dtype).tiny)

    return term(a, a) + term(c, c) - 2 * term(a, c)


def _pair_debiased(kernel: Tensor, a: Tensor, c: Tensor) -> Tensor:
    # E[q'Kq] = (1 - kappa) ||q||^2 when memberships are independent of outputs; kappa: mean off-diagonal kernel value.
    size = kernel.shape[0]
    kappa = (kernel.sum() - kernel.diagonal().sum()) / (size * (size - 1))
    return _pair_v(kernel, a, c) - (1 - kappa) * (a - c).square().sum()


ESTIMATORS = {"v": _pair_v, "u": _pair_u, "debiased": _pair_debiased}
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
        outputs: (B,) or (B, d), the policy's output per example; gradients flow through these only if the caller
            detaches ``memberships`` (methods where they do not can be minimised by flattening the memberships).
        memberships: (B, K), non-negative rows that sum to 1.
        bandwidth: kernel width in the outputs' unit; None is the detached median of the pairwise distances.
        estimator: ``v`` (never negative, for training), ``u`` (diagonal removed in all three terms) or ``debiased``.
        pairs: ``mean`` over unordered pairs, their ``sum``, or the paper's ``ordered_sum``.

    Returns:
        A scalar; 0 when there are fewer than two environments with any weight.

    Raises:
        StudyError: shapes disagree, or an unknown estimator or reduction is named.
    """
    pair, reduce = pick(ESTIMATORS, estimator, "MMD estimator"), pick(PAIRS, pairs, "reduction over pairs")
    if memberships.ndim != 2 or len(memberships) != len(outputs):
        raise StudyError(
            f"memberships of shape {tuple(memberships.shape)} do not fit {len(outputs)} outputs: expected (B, K)"
        )
    outputs = outputs.reshape(len(outputs), -1).float()
    mass = memberships.sum(0)
    # An environment without weight in this batch has no distribution to compare.
    weights = (memberships / mass.clamp_min(torch.finfo(mass.dtype).tiny))[:, mass > 1e-6].float()
    count = weights.shape[1]
    if count < 2 or len(outputs) < 2:
        return outputs.sum() * 0.0
    kernel = gaussian_kernel(outputs, median_bandwidth(outputs) if bandwidth is None else bandwidth)
    values = [pair(kernel, weights[:, m], weights[:, n]) for m in range(count) for n in range(m + 1, count)]
    return reduce(torch.stack(values))
