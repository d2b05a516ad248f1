r"""Statements of arXiv 2603.22335 on worlds small enough to enumerate: every expectation here is a finite sum.

Propositions 3.1 and 3.3 and the penalty of Eq. 10; ``identification.py`` has Eq. 6 and Proposition 3.2. Axes: u taste
(the paper's X_rest), e environment, y item, x any discrete input. Probabilities and rewards are float64; rewards,
losses and log-probabilities are in nats. Nothing here is used in training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import ge, gt, le, lt
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.special import expit, log_softmax

from causaldpo_lib.errors import StudyError, pick

# Tolerances of the closing table
ZERO = 1e-9  # what sums of float64 may leave of a 0 (unit of the quantity)
NEARLY = 1e-3  # a difference of probabilities that is still "about equal"
SIGMAS = 5.0  # standard errors within which a simulation agrees
COVERED = 0.95  # of the draws, with delta = 0.05

# --- Proposition 3.1, first half: DPO on a policy with two weights ---


@dataclass(frozen=True, eq=False)
class World:
    """p(u, e) (U, E), p(y | u, e) (U, E, Y), and the features f_E (Y, E) and f_rest (Y, U), each -1 or +1."""

    joint: np.ndarray
    choices: np.ndarray
    f_env: np.ndarray
    f_rest: np.ndarray


class Pairs(NamedTuple):
    """Preference pairs as the log-linear policy sees them: probability (P,), f(y_w) - f(y_l) (P, 2), (E, rest)."""

    probability: np.ndarray
    difference: np.ndarray


def toy_world(
    confounding: float = 0.8,
    boost: float = 0.5,
    taste: float = 0.5,
    environments: int = 2,
    copies: Sequence[int] = (1, 1, 1, 1),
) -> World:
    r"""Two tastes; items of two genres, boosted in environment 0 or 1:
    :math:`p(y \mid u, e) \propto e^{taste\, f_{rest} + boost\, f_E}`.

    ``confounding`` is p(u = e), 0.5 for tastes independent of environments. With one environment f_E tells popular from
    unpopular items. ``copies``: items per (genre, boosted in) in the order 00, 01, 10, 11; unequal ones tie genre to
    boost.

    Raises:
        StudyError: ``confounding`` is no probability, or there are not one or two environments or four positive copies.
    """
    if not 0 <= confounding <= 1 or environments not in (1, 2) or len(copies) != 4 or min(copies) < 1:
        raise StudyError(
            f"confounding {confounding}, environments {environments}, copies {copies}: give a probability, 1 or 2, and "
            "four positive counts"
        )
    genre, boosted = np.repeat([[0, 0, 1, 1], [0, 1, 0, 1]], copies, axis=1)
    f_env = np.where(boosted[:, None] == np.arange(environments), 1.0, -1.0)
    f_rest = np.where(genre[:, None] == np.arange(2), 1.0, -1.0)
    same = np.array([[confounding, 1 - confounding], [1 - confounding, confounding]]) / 2
    joint = same if environments == 2 else same.sum(1, keepdims=True)
    choices = np.exp(log_softmax(taste * f_rest.T[:, None] + boost * f_env.T[None], axis=-1))
    return World(joint, choices, f_env, f_rest)


def _popularity(world: World) -> np.ndarray:
    return np.einsum("ue,uey->y", world.joint, world.choices)


def _matched(world: World) -> np.ndarray:
    return np.einsum("ue,uey->ey", world.joint / world.joint.sum(0), world.choices)


# World -> q(y_l | u, e), broadcastable to (U, E, Y)
NEGATIVES: dict[str, Callable[[World], np.ndarray]] = {
    "uniform": lambda world: np.full(len(world.f_env), 1 / len(world.f_env)),
    "popularity": _popularity,
    "matched": _matched,  # p(y | e): what is chosen in the pair's own environment
}


def preference_pairs(world: World, negatives: str) -> Pairs:
    """All pairs y_w ~ p(y | u, e), y_l ~ q, with those of equal feature differences merged.

    Raises:
        StudyError: an unknown sampler.
    """
    rejected = np.broadcast_to(pick(NEGATIVES, negatives, "negative sampler")(world), world.choices.shape)
    probability = np.einsum("ue,uey,uez->ueyz", world.joint, world.choices, rejected)
    env, rest = world.f_env.T[None], world.f_rest.T[:, None]
    gaps = np.stack(np.broadcast_arrays(*(f[..., :, None] - f[..., None, :] for f in (env, rest))), -1)
    rows, place = np.unique(gaps.reshape(-1, 2), axis=0, return_inverse=True)
    return Pairs(np.bincount(place.ravel(), probability.ravel()), rows)


def dpo_loss(weights: np.ndarray, pairs: Pairs, beta: float) -> float:
    """Eq. 15, nats. ``weights`` (2,) relative to the reference's; log Z(x) cancels, as both responses share x."""
    return float(pairs.probability @ np.logaddexp(0, -beta * pairs.difference @ weights))


def dpo_gradient(weights: np.ndarray, pairs: Pairs, beta: float) -> np.ndarray:
    r"""Eq. 19, :math:`-\beta\,E[(1-\sigma(\Delta r))\,\Delta f]`, (2,)."""
    slope = pairs.probability * expit(-beta * pairs.difference @ weights)
    return -beta * slope @ pairs.difference


def descend(pairs: Pairs, beta: float, rate: float, steps: int, start: Sequence[float] = (0.0, 0.0)) -> np.ndarray:
    """The path of plain gradient descent, (steps + 1, 2), weights relative to the reference's."""
    path = [np.asarray(start, float)]
    for _ in range(steps):
        path.append(path[-1] - rate * dpo_gradient(path[-1], pairs, beta))
    return np.stack(path)


def optimum(pairs: Pairs, beta: float) -> np.ndarray:
    """The minimiser (2,) of the DPO loss, by Newton's method.

    Raises:
        StudyError: it does not converge, as where the features tell chosen from rejected without error.
    """
    weights = np.zeros(2)
    for _ in range(40):  # a dozen do where there is one; without, weights grow by about 1 a step
        margin = beta * pairs.difference @ weights
        scaled = (pairs.probability * expit(margin) * expit(-margin))[:, None] * pairs.difference
        step = np.linalg.lstsq(beta**2 * scaled.T @ pairs.difference, dpo_gradient(weights, pairs, beta), rcond=None)[0]
        weights = weights - step
        if np.abs(step).max() < 1e-12:
            return weights
    raise StudyError("the pairs have no finite optimum: give pairs in which both orders occur")


def linear_prediction(pairs: Pairs, beta: float, rate: float, steps: int, factor: float = 1.0) -> np.ndarray:
    r"""Eq. 23: :math:`\eta T \beta\,E[\Delta f_E]` for T = 0..steps, times ``factor``; 1/2 makes it the Taylor line."""
    return factor * rate * beta * (pairs.probability @ pairs.difference[:, 0]) * np.arange(steps + 1)


def first_departure(path: np.ndarray, line: np.ndarray, tolerance: float = 0.1) -> int | None:
    """The first step at which ``line`` misses the growth of ``path`` by more than ``tolerance`` of it, or None."""
    off = np.abs(line - path)[1:] > tolerance * np.abs(path - path[0])[1:]
    return int(np.argmax(off)) + 1 if off.any() else None


# f_E goes along with what is liked, but by itself is disliked: two kinds of pairs differ in both features, two in f_E.
SUPPRESSED = Pairs(
    np.array([0.7 * 0.95, 0.7 * 0.05, 0.3 * 0.3, 0.3 * 0.7]),
    np.array([[2.0, 2.0], [-2.0, -2.0], [2.0, 0.0], [-2.0, 0.0]]),
)

# What a curve of the notebook is called: options of ``toy_world``, negatives.
CASES: dict[str, tuple[dict[str, object], str]] = {
    "confounded, uniform negatives": ({}, "uniform"),
    "no confounding, uniform": ({"confounding": 0.5}, "uniform"),
    "one environment, uniform": ({"environments": 1}, "uniform"),
    "boosted items disliked, uniform": ({"boost": -0.5}, "uniform"),
    "one environment, popularity negatives": ({"environments": 1}, "popularity"),
    "confounded, popularity negatives": ({}, "popularity"),
    "confounded, matched negatives": ({}, "matched"),
    "the same, genre tied to boost": ({"copies": (3, 1, 1, 3)}, "matched"),
}


def case_pairs() -> dict[str, Pairs]:
    """The pairs of every case, and of f_E liked by association only."""
    cases = {name: preference_pairs(toy_world(**options), kind) for name, (options, kind) in CASES.items()}
    return {**cases, "liked by association only": SUPPRESSED}


def growth(cases: Mapping[str, Pairs], beta: float, rate: float, steps: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Paths of w_E (case, step, weight); per case the expected difference, first, largest, last w_E and its limit."""
    paths = {name: descend(pairs, beta, rate, steps)[:, 0] for name, pairs in cases.items()}
    lines = pd.DataFrame(paths).rename_axis("step").reset_index().melt("step", var_name="case", value_name="weight")
    ends = {
        name: {
            "E[f(y_w) - f(y_l)]": cases[name].probability @ cases[name].difference[:, 0],
            "step 1": path[1],
            "largest": path.max(),
            f"step {steps}": path[-1],
            "limit": optimum(cases[name], beta)[0],
        }
        for name, path in paths.items()
    }
    return lines, pd.DataFrame(ends).T


def predictions(pairs: Pairs, beta: float, rate: float, steps: int) -> pd.DataFrame:
    """w_E by gradient descent beside Eq. 23 as printed and with its missing 1/2 (case, step, weight)."""
    lines = {
        "gradient descent": descend(pairs, beta, rate, steps)[:, 0],
        "Eq. 23 as printed": linear_prediction(pairs, beta, rate, steps),
        "Eq. 23 with the factor 1/2": linear_prediction(pairs, beta, rate, steps, 0.5),
        "limit of the growth": np.full(steps + 1, optimum(pairs, beta)[0]),
    }
    return pd.DataFrame(lines).rename_axis("step").reset_index().melt("step", var_name="case", value_name="weight")


def stated(step: int | None) -> str:
    """A result of ``first_departure`` in a sentence."""
    return "at no step shown" if step is None else f"from step {step} on"


def posterior_means(world: World, negatives: str) -> np.ndarray:
    """Means of p(E = e | y_w) over chosen and of p(E = e | y_l) over rejected items, (2, E): what Eq. 17 compares."""
    rejected = np.broadcast_to(NEGATIVES[negatives](world), world.choices.shape)
    means = []
    for law in (world.choices, rejected):
        both = np.einsum("ue,uey->ey", world.joint, law)
        means.append((both / both.sum(0)) @ both.sum(0))
    return np.stack(means)


def attainable_wins(pairs: Pairs) -> float:
    """The largest share of pairs whose margin any weights, or any function of the differences, can make positive.

    A pair and its reverse have opposite margins.
    """
    chance = {tuple(row): p for row, p in zip(pairs.difference.tolist(), pairs.probability, strict=True)}
    rows = [(p, chance.get(tuple(-v for v in row), 0.0)) for row, p in chance.items() if any(row)]
    return sum(max(p, back) / (2 if back else 1) for p, back in rows)


def spurious_policies(weight: float, beta: float) -> pd.DataFrame:
    """Training in which both features always favour the chosen item; in the test f_E favours the rejected one.

    Columns: policy, training margin (log-ratio of Eq. 12, nats), DPO loss, penalty between the two training
    environments, test margin.
    """
    train, test = Pairs(np.ones(1), np.array([[2.0, 2.0]])), Pairs(np.ones(1), np.array([[-2.0, 2.0]]))
    world, rows = toy_world(boost=20.0, taste=20.0), []  # the chosen item has both features, up to e^-40
    for name, weights in {"f_E alone": np.array([weight, 0]), "f_rest alone": np.array([0, weight])}.items():
        found = {"training margin": train.difference[0] @ weights, "DPO loss": dpo_loss(weights, train, beta)}
        rows.append(
            {
                "policy": name,
                **found,
                "penalty": world_penalty(world, weights, beta),
                "test margin": test.difference[0] @ weights,
            }
        )
    return pd.DataFrame(rows)


# --- Proposition 3.1, second half: the bound ---

READINGS = {
    "eq26": "Eq. 26, y from one p(y|x)",
    "joint": "Eq. 25, y and E joint",
    "product": "Eq. 25, y and E independent",
    "printed": "Eq. 25 as printed",
    "log_probability": "Eq. 26 with log Z",
    "kl": "Eq. 3, KL error",
}


def bound_readings(
    f: np.ndarray, mechanism: np.ndarray, train: np.ndarray, test: np.ndarray, p_x: np.ndarray, weight: float
) -> dict[str, float]:
    """GenErr of Eq. 25 and 26 under each of ``READINGS``, and ``bound``, the right side of Eq. 5; nats.

    Args:
        f: f_E (Y, E), arbitrary; C is its largest absolute value.
        mechanism: p(y | x, e) (X, E, Y), the same in training and test; ``weight`` is w_E.
        train, test: p(e | x), (X, E).
        p_x: p_test(x), (X,). The policy of ``log_probability`` and ``kl`` is softmax_y(w_E f_E(y, e)).
    """
    y_train, y_test = (np.einsum("xe,xey->xy", p, mechanism) for p in (train, test))
    inner = np.einsum("xey,ye->xe", mechanism, f)  # E[f | x, e]
    product_train, product_test = np.einsum("xy,xe,ye->x", y_train, train, f), np.einsum("xy,xe,ye->x", y_test, test, f)
    joint_train, joint_test = (inner * train).sum(1), (inner * test).sum(1)
    logp = log_softmax(weight * f, axis=0)
    entropy = np.einsum("xe,xey,xey->x", test, mechanism, np.log(np.where(mechanism > 0, mechanism, 1)))
    gaps = {
        "eq26": weight * np.einsum("xy,xe,ye->x", y_train, test - train, f),
        "joint": weight * (joint_test - joint_train),
        "product": weight * (product_test - product_train),
        "printed": weight * (product_test - joint_train),
        "log_probability": np.einsum("xy,xe,ye->x", y_train, test - train, logp),
        "kl": entropy - np.einsum("xe,xey,ye->x", test, mechanism, logp),
    }
    distance = 0.5 * np.abs(train - test).sum(1)
    bound = 2 * np.abs(f).max() * abs(weight) * (p_x @ distance)
    return {**{name: float(p_x @ np.abs(gap)) for name, gap in gaps.items()}, "bound": float(bound)}


def counter_worlds() -> dict[str, tuple[np.ndarray, ...]]:
    """Arguments of ``bound_readings`` for which the reading of that name exceeds the bound."""
    both, boosted = np.array([[1.0, -1.0], [-1.0, 1.0]]), np.eye(2)[None]
    half, one = np.full((1, 2), 0.5), np.ones(1)
    surely, nearly = np.array([[1.0, 0.0]]), np.array([[0.8, 0.2]])
    # Item 0 is all that is chosen; environment 0 favours it and environment 1 everything else, so log Z moves too.
    favoured, item = np.array([[1.0, -1.0]] + 7 * [[-1.0, 1.0]]), np.tile(np.eye(8)[0], (1, 2, 1))
    return {
        "printed": (both, boosted, half, half, one, 1.0),
        "product": (both, boosted, surely, nearly, one, 1.0),
        "log_probability": (favoured, item, surely, 1 - surely, one, 1.0),
        "kl": (both, boosted, half, half, one, 0.0),
    }


def drifting(world: World, weight: float, steps: int = 21) -> pd.DataFrame:
    """``bound_readings`` while p(e | u) moves from training to its mirror image (case, drift 0 to 1, value)."""
    train = world.joint / world.joint.sum(1, keepdims=True)
    rows = []
    for drift in np.linspace(0, 1, steps):
        test = (1 - drift) * train + drift * train[:, ::-1]
        found = bound_readings(world.f_env, world.choices, train, test, world.joint.sum(1), weight)
        rows += [{"case": name, "drift": drift, "value": value} for name, value in found.items()]
    return pd.DataFrame(rows)


def random_bounds(count: int, rng: np.random.Generator) -> pd.DataFrame:
    """``bound_readings`` over the bound in random worlds (2 inputs, 2 or 3 environments, 3 items), a row each."""
    rows = []
    for _ in range(count):
        environments, share = int(rng.integers(2, 4)), rng.choice([0.1, 0.3, 1.0])
        f = rng.choice([-1.0, 1.0], (3, environments))
        mechanism = rng.dirichlet(np.full(3, share), (2, environments))
        train, test = rng.dirichlet(np.full(environments, share), (2, 2))
        rows.append(bound_readings(f, mechanism, train, test, rng.dirichlet(np.ones(2)), rng.uniform(0.1, 3)))
    found = pd.DataFrame(rows)
    return found[list(READINGS)].div(found["bound"], axis=0)


def reading_table(drift: pd.DataFrame, random: pd.DataFrame) -> pd.DataFrame:
    """Each of ``READINGS`` against the bound of Eq. 5: in the toy, in random worlds, and in its counter-example.

    Args:
        drift, random: of ``drifting`` and ``random_bounds``.

    Returns:
        a row a reading: the largest excess over the bound in the toy (nats), the share of random worlds above it (%)
        and their median of GenErr / bound, both sides in the counter-example (nats; NaN without one), and ``exceeded``,
        in how many of the three it is.
    """
    wide = drift.pivot(index="drift", columns="case", values="value")
    counter = {name: bound_readings(*arguments) for name, arguments in counter_worlds().items()}
    table = pd.DataFrame(
        {
            "toy: largest excess (nats)": wide[list(READINGS)].sub(wide["bound"], axis=0).max(),
            "random: above (%)": 100 * (random > 1 + ZERO).mean(),
            "random: median ratio": random.median(),
            "counter-example: GenErr": pd.Series({name: found[name] for name, found in counter.items()}),
            "counter-example: bound": pd.Series({name: found["bound"] for name, found in counter.items()}),
        }
    ).reindex(list(READINGS))
    toy, share, _, error, bound = (table[column] for column in table)
    return table.assign(exceeded=(toy > ZERO).astype(int) + (share > 0) + (error > bound + ZERO))


# --- The penalty of Eq. 10 ---


def gaussian(points: np.ndarray, width: float) -> np.ndarray:
    """Kernel matrix (N, N) of real ``points`` (N,)."""
    return np.exp(-((points[:, None] - points) ** 2) / (2 * width**2))


def mmd_squared(kernel: np.ndarray, p: np.ndarray, q: np.ndarray) -> float:
    """Eq. 44 of distributions p and q (N,) on the points of ``kernel`` (N, N); not below 0."""
    return max(float((p - q) @ kernel @ (p - q)), 0.0)


def mmd_gradient(z: np.ndarray, first: np.ndarray, width: float, printed: bool = False) -> np.ndarray:
    """Gradient (N,) of MMD^2 between the points ``z`` where ``first`` (bool) and the others; nats^-1.

    ``printed``: as Eq. 45 has it, whose two terms within an environment lack the factor 2 of a symmetric kernel.
    """
    slope = -gaussian(z, width) * (z[:, None] - z) / width**2  # of k in its first argument
    share = np.where(first, 1 / first.sum(), 1 / (~first).sum())
    within = first[:, None] == first
    return share * ((np.where(within, 1.0 if printed else 2.0, -2.0) * slope) @ share)


def followed(z: np.ndarray, first: np.ndarray, width: float, printed: bool, rate: float, steps: int) -> np.ndarray:
    """Where descent on ``mmd_gradient`` alone takes the points ``z`` (N,)."""
    for _ in range(steps):
        z = z - rate * mmd_gradient(z, first, width, printed)
    return z


def world_penalty(world: World, weights: Sequence[float], beta: float, width: float = 1.0) -> float:
    """MMD^2 between two environments' rewards of chosen items, with the log-linear policy and a flat reference.

    Raises:
        StudyError: the world has not two environments.
    """
    if world.joint.shape[1] != 2:
        raise StudyError(f"the world has {world.joint.shape[1]} environments: two are compared")
    scores = weights[0] * world.f_env.T[None] + weights[1] * world.f_rest.T[:, None]
    rewards = beta * (log_softmax(scores, axis=-1) + np.log(len(world.f_env)))
    law = world.joint[..., None] / world.joint.sum(0)[:, None] * world.choices  # p(u, y | e)
    owner = np.broadcast_to(np.arange(2)[:, None], law.shape)
    first, second = (np.where(owner == e, law, 0).ravel() for e in (0, 1))
    return mmd_squared(gaussian(rewards.ravel(), width), first, second)


# --- Proposition 3.3: the bound between environment distributions ---


def witness(kernel: np.ndarray, direction: np.ndarray, norm: float = 1.0) -> np.ndarray:
    """Values (N,) of the RKHS function along ``kernel @ direction`` with the given RKHS norm."""
    return norm * kernel @ direction / np.sqrt(direction @ kernel @ direction)


def bound_coverage(
    losses: np.ndarray,
    p: np.ndarray,
    q: np.ndarray,
    shift_term: float,
    environments: int,
    repeats: int,
    rng: np.random.Generator,
    delta: float = 0.05,
) -> dict[str, float]:
    r"""How often Eq. 13 holds over draws of n training environments from q, for a class of policies.

    Args:
        losses: g_pi(e), (policies, N). Mixtures of policies add nothing: their losses are convex combinations.
        p, q: distributions of test and training environments (N,). ``environments`` is n.
        shift_term: L MMD(p, q).

    Returns:
        ``shift``, the largest |E_p g - E_q g|; ``shift_term``; ``error`` and ``bound``, means of both sides of Eq. 13,
        the complexity being the expected Rademacher average of the losses; ``holds``, the share of draws.
    """
    seen = rng.multinomial(environments, q, repeats)  # (R, N)
    signs = 2 * rng.binomial(seen, 0.5) - seen
    complexity = np.abs(signs @ losses.T / environments).max(1).mean()
    error = np.abs(losses @ p - seen @ losses.T / environments).max(1)
    bound = 2 * complexity + np.abs(losses).max() * np.sqrt(2 * np.log(2 / delta) / environments) + shift_term
    shift = np.abs(losses @ (p - q)).max()
    return {
        "shift": float(shift),
        "shift_term": shift_term,
        "error": float(error.mean()),
        "bound": float(bound),
        "holds": float((error <= bound).mean()),
    }


def coverage_table(environments: int, repeats: int, rng: np.random.Generator, delta: float = 0.05) -> pd.DataFrame:
    """``bound_coverage`` of four losses: 64 environments on a circle, a smooth characteristic kernel.

    The loss is the value f(e, a) (L = 1; the witness of MMD(p, q) and 8 random functions), its modulus (L = 1; training
    environments are uniform, those of the test come in waves of twice f's frequency), or a step that ignores f (L = 0).
    """
    angle = 2 * np.pi * np.arange(64) / 64
    kernel = np.exp((np.cos(angle[:, None] - angle) - 1) / 0.4**2)  # von Mises: smooth, periodic, positive definite
    tilted = np.stack([1 + 0.9 * np.cos(angle), 1 - 0.9 * np.cos(angle)]) / 64
    waves = np.stack([1 + 0.9 * np.cos(12 * angle), np.ones(64)]) / 64
    step = np.sign(np.cos(angle))[None]
    random = [witness(kernel, row) for row in rng.normal(size=(8, 64))]
    linear = np.stack([witness(kernel, np.subtract(*tilted)), *random])
    cases = [
        ("f, norm 1", linear, 1.0, tilted),
        ("f, norm 5", 5 * linear, 1.0, tilted),
        ("|f|, norm of f 1", np.abs(witness(kernel, np.cos(6 * angle)))[None], 1.0, waves),
        ("step in e, no f", step, 0.0, tilted),
    ]
    rows = []
    for label, losses, lipschitz, (p, q) in cases:
        term = lipschitz * np.sqrt(mmd_squared(kernel, p, q))
        rows.append({"loss": label, **bound_coverage(losses, p, q, term, environments, repeats, rng, delta)})
    return pd.DataFrame(rows)


def penalty_family(weights: Sequence[float], beta: float) -> pd.DataFrame:
    r"""Policies w_E f_E in a world whose test adds a third environment, in which boosted items are disliked.

    Training environments are 0 and 1, half each; test: a quarter each and half the third. Columns: weight, penalty
    (between 0 and 1), distance (MMD(p, q) with a kernel that finds all environments unlike), shift |R_p - R_q| of the
    DPO risk in nats.
    """
    world = toy_world()
    pairs, reversed_pairs = (preference_pairs(toy_world(boost=boost), "uniform") for boost in (0.5, -0.5))
    p, q = np.array([0.25, 0.25, 0.5]), np.array([0.5, 0.5, 0.0])
    rows = []
    for weight in weights:
        policy = np.array([weight, 0.0])
        usual, other = (dpo_loss(policy, some, beta) for some in (pairs, reversed_pairs))
        shift = abs((p - q) @ [usual, usual, other])
        distance = np.sqrt(mmd_squared(np.eye(3), p, q))
        found = {"penalty": world_penalty(world, policy, beta), "distance": distance, "shift": shift}
        rows.append({"weight": weight, **found})
    return pd.DataFrame(rows)


# --- Closing table ---

SIGNS: dict[str, Callable[[float, float], bool]] = {"≤": le, "<": lt, "≥": ge, ">": gt}


class Check(NamedTuple):
    """What is measured, and how it has to compare with ``limit``; None is the tolerance of ``verdicts``."""

    measured: str
    sign: str
    limit: float | None


class Line(NamedTuple):
    """A statement, and the check that it has to pass. ``departs``, said if it does not, may show the ``{value}``.

    ``equation``: the number it stands under, empty for what the paper does not number. ``printed``: said by the paper;
    else it is this study's reading, of that equation or of what the paper needs.
    """

    equation: str
    printed: bool
    statement: str
    assumption: str
    check: Check
    departs: str


EXCEEDED = Check("toy, random worlds, counter-example: how many exceed it", "≤", 0.0)
DRAWS = Check("share of draws, δ = 0.05", "≥", COVERED)
LINES: dict[str, Line] = {
    "gradient": Line(
        "19", True, "gradient", "log-linear policy", Check("first step less its Taylor line", "≤", ZERO), "differs"
    ),
    "first step": Line(
        "20",
        False,
        "the first step raises w_E",
        "Eq. 18, start at the reference",
        Check("least first step", ">", ZERO),
        "sign",
    ),
    "every step": Line(
        "21",
        True,
        "every step raises w_E",
        "Eq. 18",
        Check("f_E liked by association only: limit of w_E", ">", ZERO),
        "1 − σ weighs the pairs: w_E can end below its start",
    ),
    "every step, toy": Line(
        "21",
        False,
        "in the toy every step raises w_E",
        "log-odds linear in both features",
        Check("least step, uniform negatives", ">", 0.0),
        "w_E falls",
    ),
    "size": Line(
        "23",
        True,
        "size after one step",
        "start at the reference",
        Check("ratio to gradient descent, less 1", "≤", None),
        "off by {value:.0%}: 1 − σ(0) = 1/2 is missing",
    ),
    "linear": Line(
        "24",
        True,
        "growth is linear in T",
        "none",
        Check("Taylor line less growth, over growth, largest", "≤", None),
        "off by up to {value:.0%}, as growth has a limit",
    ),
    "confounder": Line(
        "",
        False,
        "w_E grows because E confounds",
        "Eq. 18",
        Check("change without confounding", ">", ZERO),
        "identical without confounder or second environment: uniform negatives do it",
    ),
    "still": Line(
        "",
        False,
        "w_E stays if E[f(y_w) − f(y_l)] = 0",
        "feature and genre independent",
        Check("largest w_E, popularity and matched negatives", "≤", ZERO),
        "w_E moves",
    ),
    "still, tied": Line(
        "",
        False,
        "w_E stays if E[f(y_w) − f(y_l)] = 0",
        "none",
        Check("w_E with genre tied to boost", "≤", ZERO),
        "only the first step is 0",
    ),
    "average": Line(
        "4",
        False,
        "can hold on average",
        "E is the pair's environment",
        Check("distance of the posteriors' means", ">", ZERO),
        "both sides have mean p(E)",
    ),
    "average, item": Line(
        "4",
        False,
        "can hold on average",
        "E is a feature of the item",
        Check("P(f_E = 1), chosen less rejected", ">", ZERO),
        "never larger",
    ),
    **{
        name: Line("5", name == "printed", f"GenErr as {label}", "p(y|x,e) stays", EXCEEDED, "in {value:.0f} of 3")
        for name, label in READINGS.items()
    },
    "P(y|x)": Line(
        "",
        False,
        "P_test(y|x) ≈ P_train(y|x)",
        "E → Y, p(E|x) drifts",
        Check("largest change at full drift", "≤", NEARLY),
        "differ by {value:.2f}",
    ),
    "backdoor": Line(
        "6", True, "truncated factorisation", "E observed, p(x,e) > 0", Check("largest distance", "≤", ZERO), "differs"
    ),
    "backdoor, simulated": Line(
        "6",
        True,
        "simulated intervention",
        "E observed, p(x,e) > 0",
        Check("standard errors apart", "≤", SIGMAS),
        "differs",
    ),
    "separation": Line(
        "32",
        True,
        "E ⊥ Y | X with arrows into X cut",
        "graph of Fig. 1",
        Check("I(E; Y | X), random models", "≤", ZERO),
        "E → Y remains; needed is X ⊥ Y | E with arrows out of X cut",
    ),
    "separation, needed": Line(
        "",
        False,
        "X ⊥ Y | E with arrows out of X cut, which Eq. 6 needs",
        "graph of Fig. 1",
        Check("I(X; Y | E), random models", "≤", ZERO),
        "dependent",
    ),
    "one model": Line(
        "",
        False,
        "one p_θ(y|x) can be averaged to p(y|do(x))",
        "p_θ is not told e",
        Check("largest distance, toy", "≤", ZERO),
        "the sum is p_θ(y|x)",
    ),
    "soft": Line(
        "",
        False,
        "inferred environments adjust",
        "k soft, from x alone",
        Check("largest distance to p(y|x), toy", ">", ZERO),
        "p(y|x,k) = p(y|x): the sum is p(y|x)",
    ),
    "hard": Line(
        "",
        False,
        "inferred environments identify Eq. 6",
        "k = g(x)",
        Check("range over unseen pairs", "≤", ZERO),
        "positivity fails, also for the true environment",
    ),
    "trace": Line(
        "",
        False,
        "inferred environments identify p(y|do(s))",
        "k = g(v), v no cause of y, no error",
        Check("error, toy with a trace", "≤", ZERO),
        "differs",
    ),
    "trace, errors": Line(
        "",
        False,
        "inferred environments identify p(y|do(s))",
        "v shows e with errors",
        Check("error, toy with a trace", "≤", ZERO),
        "confounding remains in part",
    ),
    "definite": Line(
        "",
        False,
        "MMD = 0 ⟹ equal distributions",
        "characteristic kernel, population",
        Check("least eigenvalue of the kernel", ">", ZERO),
        "not definite",
    ),
    "memberships": Line(
        "",
        False,
        "MMD = 0 ⟹ invariant policy",
        "memberships may be equal",
        Check("MMD² of equal mixtures", ">", ZERO),
        "0 for any policy",
    ),
    "Eq. 45": Line(
        "45",
        True,
        "is the gradient of Eq. 44",
        "none",
        Check("spread after descent on environments alike, change", "≤", ZERO),
        "factor 2 missing within environments: it shrinks the rewards",
    ),
    "Eq. 48": Line(
        "48",
        True,
        "∇MMD → 0 ⟹ p_m = p_m'",
        "Gaussian kernel, fixed width",
        Check("MMD² 8 widths apart, where the gradient is 0", "≤", ZERO),
        "the kernel is flat far away",
    ),
    "pooled": Line(
        "",
        False,
        "the interventional policy is invariant",
        "true environments, prompts pooled",
        Check("MMD², no confounding", "≤", ZERO),
        "penalised; parity is not sufficiency",
    ),
    "held, confounded": Line(
        "",
        False,
        "the interventional policy is invariant",
        "x held, with E → Y",
        Check("MMD², confounded model", "≤", ZERO),
        "penalised",
    ),
    "held": Line(
        "",
        False,
        "the interventional policy is invariant",
        "x held, no E → Y",
        Check("MMD², no confounding", "≤", ZERO),
        "penalised",
    ),
    "closer": Line(
        "",
        False,
        "the penalty brings p(y|do(x)) closer",
        "true environments, no confounding",
        Check("KL at the best λ > 0, less at λ = 0 (nats)", "<", 0.0),
        "KL rises",
    ),
    "closer, confounded": Line(
        "",
        False,
        "the penalty brings p(y|do(x)) closer",
        "true environments, one confounded model",
        Check("KL at the best λ > 0, less at λ = 0 (nats)", "<", 0.0),
        "KL rises",
    ),
    "closer, random": Line(
        "",
        False,
        "the penalty brings p(y|do(x)) closer",
        "random confounded models, in most",
        Check("share of models, best λ > 0", ">", 0.5),
        "in {value:.0%} of them",
    ),
    "margins": Line(
        "36",
        True,
        "all margins positive",
        "pairs occur both ways round",
        Check("largest share, all policies of the features", "≥", 1 - ZERO),
        "at most {value:.0%} of the pairs",
    ),
    "causal": Line(
        "",
        False,
        "MMD = 0 and large margins ⟹ causal",
        "features coincide in training",
        Check("least test margin of policies alike (nats)", ">", 0.0),
        "the spurious policy meets both",
    ),
    "f, norm 1": Line("13", False, "f, norm 1", "g in the ball of radius L", DRAWS, "holds in {value:.0%} of draws"),
    **{
        name: Line("13", True, name, "as stated", DRAWS, "holds in {value:.0%} of draws")
        for name in ("f, norm 5", "|f|, norm of f 1", "step in e, no f")
    },
    "penalty": Line(
        "13",
        False,
        "Eq. 10 lowers its bound",
        "none",
        Check("MMD(p, q) over policies without penalty, range", ">", ZERO),
        "its MMD is between environments and contains no policy",
    ),
}


def verdicts(found: Mapping[str, float], tolerance: float) -> pd.DataFrame:
    """The closing table: a row for each of ``LINES``, with the number ``found`` for it and what is asked of it.

    Columns: those of ``Line``, found, asked, and outcome, whether it holds; ``departs`` is shown where it does not.
    ``tolerance``: by how much of the growth a prediction of it may be off.

    Raises:
        StudyError: a number is missing, or there is one without a line.
    """
    if odd := sorted(set(LINES) ^ set(found)):
        raise StudyError(f"numbers and lines of the closing table differ in {', '.join(odd)}: give one for each")
    rows = []
    for name, line in LINES.items():
        measured, sign, limit = line.check
        value, limit = float(found[name]), tolerance if limit is None else limit
        holds = bool(SIGNS[sign](value, limit))
        rows.append(
            {
                **line._asdict(),
                "check": measured,
                "found": value,
                "asked": f"{sign} {limit:.3g}",
                "outcome": holds,
                "departs": "–" if holds else line.departs.format(value=value),
            }
        )
    return pd.DataFrame(rows)


def verdict_table(closing: pd.DataFrame) -> pd.DataFrame:
    """``verdicts`` as it is printed: readings of an equation are marked, bars escaped for Markdown."""
    number = closing["equation"].map(lambda equation: f"Eq. {equation}, " if equation else "")
    mark = np.where(closing["printed"] | (closing["equation"] == ""), "", " *(reading)*")
    table = pd.DataFrame(
        {
            "statement": number + closing["statement"] + mark,
            "assumption": closing["assumption"],
            "checked": closing["check"],
            "found": [
                f"{value:.2g} (asked: {asked})" for value, asked in zip(closing["found"], closing["asked"], strict=True)
            ],
            "outcome": np.where(closing["outcome"], "holds", "**fails**"),
            "where it departs": closing["departs"],
        }
    )
    return table.map(lambda cell: cell.replace("|", r"\|"))


def verdict_takeaway(closing: pd.DataFrame) -> str:
    """How many equations stand as printed, how many in some lines only, how many in none; in Markdown."""
    kinds: dict[str, list[str]] = {"printed": [], "some": [], "none": []}
    for equation, rows in closing[closing["equation"] != ""].groupby("equation", sort=False):
        printed, standing = rows[rows["printed"]]["outcome"], rows[rows["outcome"]]
        kind = "printed" if len(printed) and printed.all() else "some" if len(standing) else "none"
        kept = "; ".join(
            standing["statement"] + np.where(standing["printed"], "", ", assuming: " + standing["assumption"])
        )
        kinds[kind].append(f"Eq. {equation}" + f" ({kept})" * (kind == "some"))
    as_printed, in_part, failing = (f"{len(names)} ({', '.join(names) or 'none'})" for names in kinds.values())
    return (
        f"**Takeaway.** Of {sum(map(len, kinds.values()))} equations with a line above, not contradicted as printed: "
        f"{as_printed}; only in the lines named: {in_part}; in no line above: {failing}. Where a line fails, "
        "some world meets the assumption and not the statement. That says nothing about whether the method helps on "
        "data; it says that the paper's statements, as printed, need assumptions that the paper does not state."
    ).replace("|", r"\|")
