"""Pseudo-environments: clusters of the frozen reference's prompt states, with soft memberships."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from sklearn.cluster import DBSCAN, KMeans
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from causaldpo_lib.errors import StudyError


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


@dataclass
class EnvironmentInference:
    """Infer pseudo-environments once, from prompt states of the frozen reference model.

    States are standardised and projected on their leading principal components (not whitened: that would give the
    noise directions the weight of the leading ones). DBSCAN (Eq. 7 of arXiv 2603.22335) clusters a seeded sample of
    them with its radius at the knee of the sorted distances to the ``min_samples``-th neighbour. Where it finds fewer
    than two or more than ``max_environments`` clusters, or calls over ``max_noise`` of the points noise, a smaller
    neighbourhood and smaller radii are tried, then k-means with ``fallback_environments`` centres; ``method`` says
    which was used. Memberships are soft (Eq. 8). Their temperature is the smaller of two medians: the distance to the
    nearest centre, which makes separate clusters nearly hard, and the gap to the second-nearest, without which
    high-dimensional clusters that touch would have flat rows.

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
            StudyError: fewer than two distinct states, so that nothing can be clustered.
        """
        states = np.asarray(torch.as_tensor(states).float().cpu(), dtype=np.float64)
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
        self.centres = torch.as_tensor(centres, dtype=torch.float32)
        distances = torch.cdist(torch.as_tensor(z, dtype=torch.float32), self.centres).sort(-1).values
        nearest, gap = distances[:, 0].median(), (distances[:, 1] - distances[:, 0]).median()
        self.temperature = float(torch.minimum(nearest, gap).clamp_min(1e-6))
        return self

    def _cluster(self, z: np.ndarray) -> np.ndarray:
        for wanted in self.min_samples:
            min_samples = min(wanted, max(2, len(z) // 10))
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
        """What says whether the environments are there: their number, noise, entropies and effective sample size.

        ``membership_entropy`` is the mean row entropy over log K (0: hard, 1: flat), ``balance`` the entropy of the
        mean row over log K, ``effective_sample_size`` the smallest :math:`1 / \\lVert a_k\\rVert^2` as a share of the
        rows, and ``weight_distance`` the mean :math:`\\lVert a_m - a_{m'}\\rVert_1` in 0..2 (0: the penalty is off).
        """
        p = memberships.double()
        count = p.shape[1]
        scale = np.log(count) if count > 1 else 1.0
        weights = p / p.sum(0)
        gaps = [(weights[:, m] - weights[:, n]).abs().sum() for m in range(count) for n in range(m + 1, count)]
        mean = p.mean(0)
        return {
            "environments": count,
            "environment_method": self.method,
            "noise_share": self.noise_share,
            "membership_entropy": float(-(p * p.clamp_min(1e-12).log()).sum(-1).mean() / scale),
            "balance": float(-(mean * mean.clamp_min(1e-12).log()).sum() / scale),
            "effective_sample_size": float((1 / weights.square().sum(0)).min() / len(p)),
            "weight_distance": float(torch.stack(gaps).mean()) if gaps else 0.0,
        }
