"""Pseudo-environments: clusters of the frozen reference's prompt states, with soft memberships, and their controls."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.cluster import DBSCAN, KMeans
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from causaldpo_lib.errors import StudyError, pick
from causaldpo_lib.mmd import environment_weights, full_precision


def soft_memberships(z: Tensor, centres: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Memberships (B, K) of features ``z`` (B, d) in environments with ``centres`` (K, d).

    .. math:: p_{ik} = \exp(-D_{ik} / \tau) / \sum_j \exp(-D_{ij} / \tau), \quad D_{ik} = \lVert z_i - c_k \rVert_2

    Eq. 8 of arXiv 2603.22335, which has no temperature (:math:`\tau = 1`): memberships then flatten or saturate with
    the scale of ``z``. Rows sum to 1.
    """
    return torch.softmax(-torch.cdist(z, centres) / temperature, dim=-1)


def knee(values: np.ndarray) -> float:
    """The value where a sorted curve lies farthest from the chord between its ends."""
    values = np.sort(np.asarray(values, dtype=float))
    if values[-1] == values[0]:
        return float(values[0])
    x = np.linspace(0.0, 1.0, len(values))
    y = (values - values[0]) / (values[-1] - values[0])
    return float(values[np.argmax(np.abs(y - x))])


def temperature_rule(z: Tensor, centres: Tensor) -> float:
    """The smaller of two medians over ``z`` (N, d): the distance to the nearest of ``centres`` (K, d), which makes
    separate clusters nearly hard, and the gap to the second-nearest, without which high-dimensional clusters that touch
    would have flat rows.
    """
    distances = torch.cdist(z, centres).sort(-1).values
    nearest, gap = distances[:, 0].median(), (distances[:, 1] - distances[:, 0]).median()
    return float(torch.minimum(nearest, gap).clamp_min(1e-6))


def membership_diagnostics(memberships: Tensor) -> dict[str, float]:
    """What says whether environments are there, of ``memberships`` (N, K): entropies and effective sample size.

    ``membership_entropy`` is the mean row entropy over log K (0: hard, 1: flat), ``balance`` the entropy of the mean
    row over log K, ``effective_sample_size`` the smallest :math:`1 / \\lVert a_k\\rVert^2` as a share of the rows,
    and ``weight_distance`` the mean :math:`\\lVert a_m - a_{m'}\\rVert_1` in 0..2 (0: the penalty is off).
    """
    p = memberships.detach().cpu().double()  # (B, K) is small: one transfer, and no further wait for the device
    count = p.shape[1]
    scale = np.log(count) if count > 1 else 1.0
    weights, mean = environment_weights(p), p.mean(0)
    m, n = torch.triu_indices(weights.shape[1], weights.shape[1], offset=1)
    gaps = (weights[:, m] - weights[:, n]).abs().sum(0)
    return {
        "environments": count,
        "membership_entropy": float(-torch.special.xlogy(p, p).sum(-1).mean() / scale),
        "balance": float(-torch.special.xlogy(mean, mean).sum() / scale),
        "effective_sample_size": float((1 / weights.square().sum(0)).min() / len(p)),
        "weight_distance": float(gaps.mean()) if len(gaps) else 0.0,
    }


@dataclass
class EnvironmentInference:
    """Infer pseudo-environments once, from prompt states of the frozen reference model.

    States are standardised and projected on their leading principal components (not whitened: that would give the
    noise directions the weight of the leading ones). DBSCAN (Eq. 7 of arXiv 2603.22335) clusters a seeded sample of
    them with its radius at the knee of the sorted distances to the ``min_samples``-th neighbour. Where it finds fewer
    than two or more than ``max_environments`` clusters, or calls over ``max_noise`` of the points noise, a smaller
    neighbourhood and smaller radii are tried, then k-means with ``fallback_environments`` centres; ``method`` says
    which was used. Memberships are soft (Eq. 8) with the temperature of ``temperature_rule``.

    Unlike Algorithm 1, which clusters each mini-batch, the frozen features are clustered once over all training
    prompts: 32 points in many dimensions are nearly all noise.
    """

    components: int = 32
    min_samples: tuple[int, ...] = (64, 32, 20)
    max_noise: float = 0.6
    max_environments: int = 8
    fallback_environments: int = 4
    sample: int = 8000
    seed: int = 0
    method: str = field(default="", init=False)
    noise_share: float = field(default=float("nan"), init=False)
    temperature: float = field(default=float("nan"), init=False)
    centres: Tensor | None = field(default=None, init=False, repr=False)

    def fit(self, states: Tensor | np.ndarray) -> EnvironmentInference:
        """Find the environments' centres from ``states`` (N, d).

        Raises:
            StudyError: fewer than two distinct states, so that nothing can be clustered, or states that are no numbers.
        """
        states = np.asarray(torch.as_tensor(states).float().cpu(), dtype=np.float64)
        if not (finite := np.isfinite(states).all(axis=1)).all():
            raise StudyError(
                f"the states of {(~finite).sum()} prompts, first of row {int(np.argmin(finite))}, are not numbers: the "
                "reference model's weights are damaged or its training diverged"
            )
        if len(states) < 2 or np.ptp(states, axis=0).max() == 0:
            raise StudyError(
                f"all {len(states)} prompt states are identical: environments cannot be inferred from them (was the "
                "state taken at a position that sees no history?)"
            )
        self._mean, self._scale = states.mean(0), states.std(0) + 1e-8
        standardised = (states - self._mean) / self._scale
        count = min(self.components, states.shape[1], len(states) - 1)
        self._pca = PCA(count, svd_solver="full").fit(standardised)
        z = self._pca.transform(standardised)
        rng = np.random.default_rng(self.seed)
        if len(z) > self.sample:
            z = z[rng.choice(len(z), self.sample, replace=False)]
        labels = self._cluster(z)
        kept = labels >= 0
        self.noise_share = float(1 - kept.mean())
        centres = np.stack([z[labels == k].mean(0) for k in range(labels.max() + 1)])
        self.place(torch.as_tensor(z, dtype=torch.float32), torch.as_tensor(centres, dtype=torch.float32))
        return self

    def place(self, z: Tensor, centres: Tensor) -> None:
        """Set ``centres`` (K, d') among features ``z`` (N, d'), and the temperature that goes with them."""
        self.centres, self.temperature = centres, temperature_rule(z, centres)

    def _cluster(self, z: np.ndarray) -> np.ndarray:
        for wanted in self.min_samples:
            min_samples = min(wanted, max(2, len(z) // 10), len(z) - 1)
            distances = NearestNeighbors(n_neighbors=min_samples).fit(z).kneighbors()[0][:, -1]
            for shrink in (1.0, 0.8, 0.64, 0.512):
                labels = DBSCAN(eps=shrink * knee(distances) + 1e-12, min_samples=min_samples).fit_predict(z)
                if 2 <= labels.max() + 1 <= self.max_environments and (labels < 0).mean() <= self.max_noise:
                    self.method = f"dbscan(min_samples={min_samples})"
                    return labels
        count = min(self.fallback_environments, len(z))
        self.method = f"kmeans(k={count})"
        return KMeans(count, n_init=10, random_state=self.seed).fit_predict(z)

    def features(self, states: Tensor | np.ndarray) -> Tensor:
        """The projection (N, d') in which distances are taken.

        Raises:
            StudyError: called before ``fit``.
        """
        if self.centres is None:
            raise StudyError("environments are not fitted: call fit with the training prompts' states first")
        states = np.asarray(torch.as_tensor(states).float().cpu(), dtype=np.float64)
        projected = self._pca.transform((states - self._mean) / self._scale)
        return torch.as_tensor(projected, dtype=torch.float32)

    def memberships(self, states: Tensor | np.ndarray) -> Tensor:
        """Soft memberships (N, K) of any states of the same model, detached, float32."""
        return soft_memberships(self.features(states), self.centres, self.temperature)

    def diagnostics(self, memberships: Tensor) -> dict[str, float | str]:
        """``membership_diagnostics``, with the method that found the environments and the noise it left out."""
        return {
            **membership_diagnostics(memberships),
            "environment_method": self.method,
            "noise_share": self.noise_share,
        }


# Whether gradients reach the memberships of a mini-batch.
GRADIENTS = {"detached": False, "paper": True}


class BatchEnvironments(nn.Module):
    r"""Algorithm 1 of arXiv 2603.22335 to the letter: environments found anew in every mini-batch.

    A linear :math:`z_i = g(h_i) = W h_i + b`, DBSCAN on the batch's z, centres :math:`c_k` = cluster means, Eq. 8 for
    all points, noise included. Where fewer than two clusters are found the batch is a single environment, memberships
    are ones (B, 1) and the penalty is 0: it warns the first time and ``single_batches`` counts on.

    ``gradient``: ``detached`` cuts memberships off, so that g stays what it was; ``paper`` lets gradients flow through
    centres and g (and into the states, unless these are detached). g can then lower the MMD by flattening the
    memberships instead of aligning the outputs: ``weight_distance`` of ``diagnostics`` falls, the clusters merge, and
    from a single environment no gradient leads back. (Far apart for Eq. 8's fixed scale, memberships are saturated and
    g hardly moves at all.)

    Args:
        dimension: d, width of the states; ``components``: d', width of z.
        gradient: ``detached`` or ``paper``.
        seed: of the initial W, normal of variance 1 / d; b starts at 0.
        eps: DBSCAN's radius, in units of z; None is the knee of the batch's sorted distances to the
            ``min_samples``-th neighbour.
        min_samples: points within ``eps``, itself included, that make a core point.
        temperature: of Eq. 8, which has none (1).
    """

    def __init__(
        self,
        dimension: int,
        components: int = 32,
        gradient: str = "detached",
        seed: int = 0,
        eps: float | None = None,
        min_samples: int = 4,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.flows = pick(GRADIENTS, gradient, "membership gradient")
        self.eps, self.min_samples, self.temperature = eps, min_samples, temperature
        # Without the default initialisation, which would draw from the global generator.
        self.projection = nn.utils.skip_init(nn.Linear, dimension, components)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.projection.weight.normal_(std=dimension**-0.5, generator=generator)
            self.projection.bias.zero_()
        self.noise_share, self.single_batches = float("nan"), 0

    def forward(self, states: Tensor) -> Tensor:
        """Memberships (B, K) of ``states`` (B, d), K as found in them."""
        with torch.set_grad_enabled(self.flows and torch.is_grad_enabled()), full_precision(states):
            z = self.projection(states.float())
            centres = self.centres(z)
            if len(centres) < 2:
                return z.new_ones(len(z), 1)
            return soft_memberships(z, centres, self.temperature)

    def centres(self, z: Tensor) -> Tensor:
        """Means (K, d') of the clusters that DBSCAN finds in ``z`` (B, d'); K may be 0."""
        points = z.detach().cpu().numpy()
        labels = torch.as_tensor(self._cluster(points), device=z.device)
        self.noise_share = float((labels < 0).float().mean())
        count = int(labels.max()) + 1
        if count < 2:
            if not self.single_batches:
                warnings.warn(
                    f"DBSCAN found {count} cluster{'' if count == 1 else 's'} among the {len(z)} states of a batch "
                    f"({self.noise_share:.0%} noise): a single environment, nothing is regularised (reported once)",
                    stacklevel=3,
                )
            self.single_batches += 1
        kept = labels >= 0
        members = nn.functional.one_hot(labels[kept], max(count, 1)).to(z.dtype)[:, :count]
        return (members / members.sum(0)).T @ z[kept]

    def _cluster(self, z: np.ndarray) -> np.ndarray:
        eps = self.eps
        if eps is None:
            count = min(self.min_samples, len(z) - 1)
            if count < 1:
                return np.full(len(z), -1)
            eps = knee(NearestNeighbors(n_neighbors=count).fit(z).kneighbors()[0][:, -1]) + 1e-12
        return DBSCAN(eps=eps, min_samples=self.min_samples).fit_predict(z)

    def diagnostics(self, memberships: Tensor) -> dict[str, float]:
        """``membership_diagnostics`` of a batch, and the share of noise in the latest one."""
        return {**membership_diagnostics(memberships), "noise_share": self.noise_share}


class Environments(NamedTuple):
    """Memberships ``rows`` (N, K) of the training rows, what describes them, and the fitted clustering if any."""

    rows: Tensor
    diagnostics: dict[str, float | str]
    inference: EnvironmentInference | None


def inferred(states: Tensor, labels: Sequence | None, seed: int) -> Environments:
    """The study's default: ``EnvironmentInference`` on the training rows' cached states (N, d)."""
    inference = EnvironmentInference(seed=seed).fit(states)
    rows = inference.memberships(states)
    return Environments(rows, inference.diagnostics(rows), inference)


def shuffled(states: Tensor, labels: Sequence | None, seed: int) -> Environments:
    """The inferred rows dealt once to other examples: the same penalty without any information on environments."""
    found = inferred(states, labels, seed)
    order = torch.randperm(len(found.rows), generator=torch.Generator().manual_seed(seed))
    return found._replace(rows=found.rows[order])


def random_centres(states: Tensor, labels: Sequence | None, seed: int) -> Environments:
    """As many randomly drawn training states for centres as are inferred: neighbourhoods without clusters."""
    inference = EnvironmentInference(seed=seed).fit(states)
    z = inference.features(states)
    drawn = torch.randperm(len(z), generator=torch.Generator().manual_seed(seed))[: len(inference.centres)]
    inference.place(z, z[drawn])
    inference.method, inference.noise_share = f"random(k={len(drawn)})", 0.0
    rows = inference.memberships(states)
    return Environments(rows, inference.diagnostics(rows), inference)


def given(states: Tensor, labels: Sequence | None, seed: int) -> Environments:
    """Hard environments that the training rows name in their column ``environment``, in sorted order: an oracle.

    Raises:
        StudyError: labels are missing, do not fit the rows, or name a single environment.
    """
    codes, names = pd.factorize(pd.Series(labels, dtype=object), sort=True)
    if len(codes) != len(states) or (codes < 0).any():
        raise StudyError("memberships 'given' need a value in the column 'environment' of every training row: add it")
    if len(names) < 2:
        raise StudyError(
            f"all training rows have environment {names[0]!r}: an environment needs another to differ from"
        )
    rows = nn.functional.one_hot(torch.as_tensor(codes), len(names)).float()
    method = {"environment_method": "given", "noise_share": 0.0}
    return Environments(rows, {**membership_diagnostics(rows), **method}, None)


def batch(states: Tensor, labels: Sequence | None, seed: int, sample: int = 2000) -> Environments:
    """What an untrained g sees: Algorithm 1 with a seeded sample of the training states as the mini-batch.

    Training does not use these rows: ``BatchEnvironments`` finds its own in every mini-batch.
    """
    module = BatchEnvironments(states.shape[1], seed=seed)
    drawn = torch.randperm(len(states), generator=torch.Generator().manual_seed(seed))[:sample]
    with torch.no_grad():
        z = module.projection(states.float())
        centres = module.centres(z[drawn])
        rows = soft_memberships(z, centres) if len(centres) > 1 else z.new_ones(len(z), 1)
    return Environments(rows, {**module.diagnostics(rows), "environment_method": "batch"}, None)


# (states (N, d) of the training rows, labels (N) or None, seed) -> Environments
MEMBERSHIPS: dict[str, Callable[[Tensor, Sequence | None, int], Environments]] = {
    "inferred": inferred,
    "shuffled": shuffled,
    "random_centres": random_centres,
    "given": given,
    "batch": batch,
}
