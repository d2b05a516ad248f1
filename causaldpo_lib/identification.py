r"""What environments identify, in causal models that can be enumerated: Eq. 6 and Prop. 3.2 of arXiv 2603.22335.

Axes: e environment, x input, y outcome, k inferred environment. Probabilities and rewards are float64; rewards and
divergences are in nats. Nothing here is used in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import expit

from causaldpo_lib.theory import gaussian


@dataclass(frozen=True, eq=False)
class Model:
    """An SCM E -> X -> Y <- E: p(e) (E,), p(x | e) (E, X), p(y | x, e) (X, E, Y)."""

    p_e: np.ndarray
    p_x: np.ndarray
    p_y: np.ndarray

    def joint(self) -> np.ndarray:
        """What is observed, p(e, x, y)."""
        return np.einsum("e,ex,xey->exy", self.p_e, self.p_x, self.p_y)


def random_model(rng: np.random.Generator, environments: int = 2, inputs: int = 2, outcomes: int = 2) -> Model:
    """A model with all mechanisms drawn from flat Dirichlet distributions."""
    p_x = rng.dirichlet(np.ones(inputs), environments)
    return Model(rng.dirichlet(np.ones(environments)), p_x, rng.dirichlet(np.ones(outcomes), (inputs, environments)))


def worked_models() -> dict[str, Model]:
    """Two models with the same p(e) and p(x | e): without and with an arrow E -> Y."""
    p_e, p_x = np.array([0.5, 0.5]), np.array([[0.8, 0.2], [0.2, 0.8]])
    yes = {"E moves inputs only": [[0.9, 0.9], [0.4, 0.4]], "E moves inputs and choices": [[0.9, 0.5], [0.6, 0.2]]}
    return {name: Model(p_e, p_x, np.stack([1 - np.array(p), p], -1)) for name, p in yes.items()}


def traced_model(noise: float) -> tuple[Model, np.ndarray]:
    """A model with x = (s, v), and the memberships (X, 2) that read v, which shows e wrongly with chance ``noise``.

    s and e cause y, v does not: then p(y | do(s, v)) = p(y | do(s)). x = 2 s + v; environment 1 has more of s = 1.
    """
    p_s, p_v = np.array([[0.8, 0.2], [0.2, 0.8]]), np.array([[1 - noise, noise], [noise, 1 - noise]])
    yes = np.array([[0.2, 0.6], [0.4, 0.8]])  # p(y = 1 | s, e)
    p_y = np.repeat(np.stack([1 - yes, yes], -1), 2, axis=0)
    return Model(np.array([0.5, 0.5]), np.einsum("es,ev->esv", p_s, p_v).reshape(2, 4), p_y), np.tile(np.eye(2), (2, 1))


def without_trace(joint: np.ndarray) -> np.ndarray:
    """p(k, s, y) of p(k, x, y) with x = 2 s + v."""
    return joint.reshape(len(joint), 2, 2, -1).sum(2)


def truncated(model: Model) -> np.ndarray:
    """p(y | do(x)) (X, Y) from the mechanisms: the factor p(x | e) is left out of the joint."""
    return np.einsum("e,xey->xy", model.p_e, model.p_y)


def backdoor(joint: np.ndarray) -> np.ndarray:
    """Eq. 6 from observed p(k, x, y) alone: sum_k p(y | x, k) p(k), (X, Y); NaN where a pair (x, k) never occurs."""
    with np.errstate(invalid="ignore"):
        return np.einsum("k,kxy->xy", joint.sum((1, 2)), joint / joint.sum(2, keepdims=True))


def observed(joint: np.ndarray) -> np.ndarray:
    """p(y | x) (X, Y) from p(k, x, y)."""
    return joint.sum(0) / joint.sum((0, 2))[:, None]


def simulated(model: Model, draws: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Share of each y (X, Y) and standard error when X is set by hand, in ``draws`` runs of the model for each x."""
    counts = np.zeros(model.p_y.shape[::2])
    for x in range(len(counts)):
        environments = rng.choice(len(model.p_e), draws, p=model.p_e)
        for e, runs in enumerate(np.bincount(environments, minlength=len(model.p_e))):
            counts[x] += rng.multinomial(runs, model.p_y[x, e])
    share = counts / draws
    return share, np.sqrt(share * (1 - share) / draws)


def inferred(model: Model, memberships: np.ndarray) -> np.ndarray:
    """p(k, x, y) when environments are inferred from x alone, with p(k | x) = ``memberships`` (X, K)."""
    return np.einsum("xk,xy->kxy", memberships, model.joint().sum(0))


def fill_range(joint: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest value (X, Y) of Eq. 6 over all p(y | x, k) at pairs (x, k) that never occur in p(k, x, y)."""
    mass, prior = joint.sum(2, keepdims=True), joint.sum((1, 2))
    known = np.divide(joint, mass, out=np.zeros_like(joint), where=mass > 0)
    low = np.einsum("k,kxy->xy", prior, known)
    return low, low + np.einsum("k,kxo->xo", prior, (mass == 0).astype(float))


def adjustments(model: Model, hard: np.ndarray, soft: np.ndarray, draws: int, rng: np.random.Generator) -> pd.DataFrame:
    """p(y = 1) for every x by each way to read Eq. 6 (estimate, input, value, low, high).

    ``hard``, ``soft``: memberships (X, K) inferred from x. ``low`` and ``high``: 95 % of the simulation, and the range
    over what hard memberships leave undefined, without a value of its own.
    """
    share, error = simulated(model, draws, rng)
    low, high = fill_range(inferred(model, hard))
    exact = {
        "truncated factorisation": truncated(model),
        "Eq. 6, true environments": backdoor(model.joint()),
        "Eq. 6, one model for all": np.einsum("e,xy->xy", model.p_e, observed(model.joint())),
        "Eq. 6, soft clusters of x": backdoor(inferred(model, soft)),
        "p(y | x)": observed(model.joint()),
    }
    rows = [("simulated intervention", share, share - 1.96 * error, share + 1.96 * error)]
    rows += [(name, value, value, value) for name, value in exact.items()]
    rows.append(("Eq. 6, hard clusters of x", backdoor(inferred(model, hard)), low, high))
    return pd.DataFrame(
        [
            {"estimate": name, "input": x, "value": value[x, 1], "low": least[x, 1], "high": most[x, 1]}
            for name, value, least, most in rows
            for x in range(len(share))
        ]
    )


def separations(count: int, rng: np.random.Generator) -> dict[str, float]:
    """Two independences, as the largest conditional information (nats) in ``count`` random models of the cut graph.

    ``printed``: E and Y given X once the arrows into X are cut, as Eq. 32 has it. ``needed``: X and Y given E once
    those out of X are cut, which is what rule 2 of the do-calculus asks for.
    """
    found = {"printed": 0.0, "needed": 0.0}
    for model in (random_model(rng, 2, 3, 2) for _ in range(count)):
        into = np.einsum("e,x,xey->exy", model.p_e, model.p_x.mean(0), model.p_y)
        out = np.einsum("e,ex,ey->xey", model.p_e, model.p_x, model.p_y.mean(0))
        found["printed"] = max(found["printed"], conditional_information(into))
        found["needed"] = max(found["needed"], conditional_information(out))
    return found


def trace_errors(noises: Sequence[float]) -> pd.DataFrame:
    """Largest error of p(y | do(s)) with clusters of x = (s, v) that read v, and without adjustment, per noise of v.

    ``undefined``: how many of the 16 values p(y | x, k) the formula for do(x) needs and never sees.
    """
    rows = []
    for noise in noises:
        model, read = traced_model(noise)
        joint, truth = inferred(model, read), truncated(model)[::2]
        found = {"adjusted": backdoor(without_trace(joint)), "unadjusted": observed(without_trace(joint))}
        errors = {name: np.abs(value - truth).max() for name, value in found.items()}
        rows.append({"noise": noise, **errors, "undefined": int((joint.sum(2) == 0).sum()) * joint.shape[2]})
    return pd.DataFrame(rows)


def conditional_information(joint: np.ndarray) -> float:
    """I(A; C | B) in nats of p(a, b, c)."""
    given = joint.sum((0, 2), keepdims=True)
    product = joint.sum(2, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log((joint * given)[seen] / product[seen])).sum())


# --- Proposition 3.2: the penalty beside the interventional policy, two outcomes ---


def log_sigmoid(t: np.ndarray) -> np.ndarray:
    """Stable log of the logistic function."""
    return -np.logaddexp(0, -t)


def both_outcomes(logits: np.ndarray) -> np.ndarray:
    """log p (X, 2) of two outcomes from the logit (X,) of the second."""
    return np.stack([log_sigmoid(-logits), log_sigmoid(logits)], -1)


def _gaps(model: Model, given_x: bool) -> np.ndarray:
    """Differences between environments' laws of (x, y_w), (rows, X * 2); ``given_x``: one row per x, of p(y | x, e)."""
    law = np.broadcast_to(model.p_y.transpose(1, 0, 2), model.joint().shape)
    pairs = [(m, n) for m in range(len(law)) for n in range(m)]
    if not given_x:
        law = law * model.p_x[..., None]
        return np.stack([(law[m] - law[n]).ravel() for m, n in pairs])
    alone = np.eye(law.shape[1])[..., None]  # keeps one x
    return np.concatenate([(alone * (law[m] - law[n])).reshape(len(alone), -1) for m, n in pairs])


def penalty(model: Model, logits: np.ndarray, width: float = 1.0, given_x: bool = False) -> float:
    """Mean MMD^2 of chosen rewards (flat reference, beta 1) over pairs of true environments.

    ``given_x``: do(x) taken at its word, x set to one value in both environments; the mean over x.
    """
    gaps, kernel = _gaps(model, given_x), gaussian(both_outcomes(logits).ravel(), width)
    return max(float(np.einsum("gi,ij,gj->g", gaps, kernel, gaps).mean()), 0.0)  # not -1e-17


def causal_kl(model: Model, logits: np.ndarray) -> float:
    """KL(p(y | do(x)) || policy) in nats, mean over p(x); ``logits`` (X,) of outcome 1 against 0."""
    truth = truncated(model)
    return float(np.einsum("e,ex,xy,xy->", model.p_e, model.p_x, truth, np.log(truth) - both_outcomes(logits)))


def objective(logits: np.ndarray, model: Model, weight: float, width: float = 1.0) -> tuple[float, np.ndarray]:
    """DPO + weight x MMD^2 up to a constant, and its gradient (X,): flat reference, uniform negatives, beta 1."""
    chosen, gaps, rewards = model.joint().sum(0), _gaps(model, False), both_outcomes(logits)
    kernel = gaussian(rewards.ravel(), width)
    change = np.stack([-expit(logits), expit(-logits)], -1)  # of the rewards with the logit
    slope = -kernel * (rewards.ravel()[:, None] - rewards.ravel()) / width**2
    push = 2 * (gaps * (gaps @ slope.T)).mean(0).reshape(rewards.shape)
    value = weight * np.einsum("gi,ij,gj->g", gaps, kernel, gaps).mean() - 0.5 * (chosen * rewards).sum()
    return float(value), ((weight * push - 0.5 * chosen) * change).sum(1)


def penalised(model: Model, weights: Sequence[float], width: float = 1.0) -> pd.DataFrame:
    """The minimiser of DPO + weight x MMD^2 (true environments, flat reference, uniform negatives, beta 1) per weight.

    Columns: weight, mmd2, kl (``causal_kl``) and logit_x per input. Each weight starts from the last solution: give
    them in increasing order. At weight 0 the policy is p(y | x).
    """
    chosen = model.joint().sum(0)
    logits, rows = np.log(chosen[:, 1] / chosen[:, 0]), []
    for weight in weights:
        if weight:
            logits = minimize(objective, logits, (model, weight, width), "BFGS", jac=True, options={"gtol": 1e-7}).x
        named = {f"logit_{x}": value for x, value in enumerate(logits)}
        measured = {"mmd2": penalty(model, logits, width), "kl": causal_kl(model, logits)}
        rows.append({"weight": weight, **measured, **named})
    return pd.DataFrame(rows)


def compared(models: Mapping[str, Model]) -> pd.DataFrame:
    """Penalty, pooled and with x held fixed, and ``causal_kl`` of the interventional, observed and flat policy."""
    rows = []
    for name, model in models.items():
        flat = np.full_like(truncated(model), 0.5)
        policies = {"p(y | do(x))": truncated(model), "p(y | x)": observed(model.joint()), "flat": flat}
        for policy, p in policies.items():
            logits = np.log(p[:, 1] / p[:, 0])
            found = {"MMD²": penalty(model, logits), "MMD², x held": penalty(model, logits, given_x=True)}
            rows.append({"model": name, "policy": policy, **found, "causal KL": causal_kl(model, logits)})
    return pd.DataFrame(rows)


def invariant_policies(model: Model, given_x: bool, reach: float = 3.0, points: int = 31) -> pd.DataFrame:
    """Policies on a grid of logits (two inputs, -reach to reach) with a penalty below 1e-9: logit_0, logit_1."""
    grid = np.linspace(-reach, reach, points)
    found = [(a, b) for a in grid for b in grid if penalty(model, np.array([a, b]), given_x=given_x) < 1e-9]
    return pd.DataFrame(found, columns=["logit_0", "logit_1"])


def random_paths(count: int, weights: Sequence[float], rng: np.random.Generator) -> pd.DataFrame:
    """``penalised`` in ``count`` random confounded models of two inputs: a row each.

    Columns: start (``causal_kl`` without the penalty), best (least with one of the positive ``weights``), last (with
    the last of them), tempered (``best_tempering``).
    """
    rows = []
    for _ in range(count):
        model = random_model(rng)
        path = penalised(model, [0.0, *weights])
        first = path.filter(like="logit_").to_numpy()[0]
        best, tempered = path["kl"].iloc[1:].min(), best_tempering(model, first)
        rows.append({"start": path["kl"].iloc[0], "best": best, "last": path["kl"].iloc[-1], "tempered": tempered})
    return pd.DataFrame(rows)


def best_tempering(model: Model, logits: np.ndarray) -> float:
    """Least ``causal_kl`` over the policies t x ``logits``, t from 0 to 1: shrinkage that knows no environments."""
    return min(causal_kl(model, t * logits) for t in np.linspace(0, 1, 101))
