r"""What the method computes on one batch, opened up for reading: a policy that has moved, its scored pairs, and each
degenerate case as a small table. Nothing here is used in training."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from causaldpo_lib import backbone, environments, mmd, packing, pairs, pipeline, prompts, stages
from causaldpo_lib.causal import Regulariser, causal_loss
from causaldpo_lib.losses import LogProbs
from causaldpo_lib.released import (
    CLAMP,
    DEPARTURES,
    PairTokens,
    pad_pairs,
    released_code_loss,
    sequence_logps,
    zeroed_labels,
)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Preference pairs with a reference and a policy that started from it.

    ``texts``: prompt, chosen and rejected, a row per pair; ``states`` (N, d): the reference's last-layer states at the
    last prompt token.
    """

    policy: PreTrainedModel
    reference: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    texts: pd.DataFrame
    states: Tensor

    def tokens(self, index: Sequence[int]) -> tuple[list[list[int]], list[list[list[int]]]]:
        """Token ids of the prompts ``index``, and of the chosen and the rejected response of each."""
        rows = self.texts.iloc[np.asarray(index)]
        answers = [prompts.encode_responses(self.tokenizer, rows[side].tolist()) for side in ("chosen", "rejected")]
        return prompts.encode_prompts(self.tokenizer, rows["prompt"].tolist()), list(
            map(list, zip(*answers, strict=True))
        )

    def scored(self, index: Sequence[int]) -> LogProbs:
        """Log-probabilities of the pairs ``index`` under both models."""
        ids, answers = self.tokens(index)
        pad = self.tokenizer.pad_token_id
        ours, theirs = (packing.score_dataset(m, ids, answers, pad, 64) for m in (self.policy, self.reference))
        return LogProbs(
            chosen=ours.sum_logps[:, 0],
            rejected=ours.sum_logps[:, 1:],
            ref_chosen=theirs.sum_logps[:, 0],
            ref_rejected=theirs.sum_logps[:, 1:],
            chosen_tokens=ours.tokens[:, 0],
            rejected_tokens=ours.tokens[:, 1:],
        )


def last_line(act: Callable[[], Any]) -> Any:
    """What ``act()`` returns. Of what it prints, a line for each step of a training, only the last line is shown."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        found = act()
    for line in said.getvalue().splitlines()[-1:]:
        print(line)
    return found


def training_pairs(sft: str, seed: int, beta: float) -> Pairs:
    """Training pairs (8,000 at most), the supervised model as reference, and a policy that plain DPO has moved from it.

    The policy is notebook 03's smoke alignment without the penalty, so that the penalty has something to find. ``sft``
    names the supervised run; empty is its smoke setting, made first if need be. Of the training's progress only the
    last line is printed.

    Raises:
        StudyError: ``sft`` is no finished run of notebook 02.
    """
    inputs = {"sft": sft, "data": pipeline.load_run(sft, "sft").parameters["data"]} if sft else {}
    setting = {"method": "dpo", "seed": seed, "loss_options": {"beta": beta}, "mmd_weight": 0.0}
    run = last_line(lambda: stages.execute("align", {**pipeline.declared("align"), **inputs, **setting}))
    start = pipeline.load_run(run.parameters["sft"], "sft")
    reference, tokenizer = backbone.load_checkpoint(start.folder / "checkpoint")
    policy, _ = backbone.load_checkpoint(run.folder / "checkpoint")
    data = pipeline.load_run(run.parameters["data"], "data").folder
    items, examples = pd.read_parquet(data / "items.parquet"), pd.read_parquet(data / "examples.parquet")
    examples = examples[examples["split"] == "train"]
    drawn = np.sort(np.random.default_rng(seed).permutation(len(examples))[:8000])
    examples = examples.iloc[drawn].reset_index(drop=True)
    titles = items.set_index("item")["title"]
    texts = prompts.prompt_table(examples, titles)
    rejected = pairs.preference_pairs(examples, items, "uniform", 1, seed)[:, 0]
    texts["rejected"] = [prompts.response_text(titles[item]) for item in rejected]
    ids = prompts.encode_prompts(tokenizer, texts["prompt"].tolist())
    closing = [[[tokenizer.eos_token_id]]] * len(ids)  # states are of the prompt: any response will do
    states = packing.score_dataset(reference, ids, closing, tokenizer.pad_token_id, batch_size=64).prompt_states
    return Pairs(policy, reference, tokenizer, texts, states)


@torch.no_grad()
def token_logps(found: Pairs, row: int) -> pd.DataFrame:
    """The tokens of a pair's chosen response by an ordinary forward pass: columns token, reference, policy (nats)."""
    (start,), ((answer, _),) = found.tokens([row])
    ids = torch.tensor([start + answer], device=found.policy.device)
    table = pd.DataFrame({"token": [found.tokenizer.decode([token]) for token in answer]})
    for name in ("reference", "policy"):
        logits = getattr(found, name).eval()(input_ids=ids).logits[0, len(start) - 1 : -1].float()
        table[name] = logits.log_softmax(-1).gather(1, ids[0, len(start) :, None])[:, 0].tolist()
    return table


def double_loop(outputs: Tensor, first: Tensor, second: Tensor, bandwidth: float, estimator: str) -> float:
    r"""MMD^2 between two environments with weights a and c, (B,) each summing to 1, term by term in Python floats.

    .. math:: \sum_{ij} (a_i a_j + c_i c_j - 2 a_i c_j)\, e^{-(s_i - s_j)^2 / 2\sigma^2}

    for ``v``; for ``u`` each of the three sums runs over :math:`i \ne j` and is divided by its own weights' sum; for
    ``debiased`` the V-statistic less :math:`(1 - \hat\kappa)\lVert a - c\rVert^2`, with :math:`\hat\kappa` the mean
    kernel value of pairs.
    """
    s, a, c = outputs.tolist(), first.tolist(), second.tolist()
    places = range(len(s))

    def kernel(i: int, j: int) -> float:
        return math.exp(-((s[i] - s[j]) ** 2) / (2 * bandwidth**2))

    def product(p: list[float], q: list[float], diagonal: bool) -> float:
        total = weight = 0.0
        for i in places:
            for j in places:
                if diagonal or i != j:
                    total += p[i] * q[j] * kernel(i, j)
                    weight += p[i] * q[j]
        return total / weight if weight else 0.0

    value = sum(sign * product(p, q, estimator != "u") for sign, p, q in ((1, a, a), (1, c, c), (-2, a, c)))
    if estimator == "debiased":
        kappa = sum(kernel(i, j) for i in places for j in places if i != j) / (len(s) * (len(s) - 1))
        value -= (1 - kappa) * sum((p - q) ** 2 for p, q in zip(a, c, strict=True))
    return value


def estimator_table(outputs: Tensor, memberships: Tensor, bandwidth: float) -> pd.DataFrame:
    """The mean over pairs of environments by each estimator, beside ``double_loop`` in float64.

    Columns: estimator, library, double loop.
    """
    weights = mmd.environment_weights(memberships.double())
    couples = list(itertools.combinations(weights.T, 2))
    rows = []
    for name in mmd.ESTIMATORS:
        brute = [double_loop(outputs, a, c, bandwidth, name) for a, c in couples]
        library = mmd.mmd_squared(outputs, memberships, bandwidth, name).item()
        rows.append({"estimator": name, "library": library, "double loop": sum(brute) / len(brute)})
    return pd.DataFrame(rows)


def reward_gradients(
    log_probs: LogProbs, memberships: Tensor, beta: float, regulariser: Regulariser
) -> tuple[np.ndarray, np.ndarray]:
    r"""What one step of gradient descent on the rewards would push the chosen ones by, up to the step size.

    Returns:
        :math:`-\partial\mathcal L / \partial s_i` of DPO alone and of the weighted penalty alone, (B,) each; the
        total's is their sum. Outputs are rewards, s = beta h.
    """

    def push(weight: float) -> np.ndarray:
        chosen = log_probs.chosen.clone().requires_grad_()
        moved = dataclasses.replace(log_probs, chosen=chosen)
        loss, _ = causal_loss("dpo", moved, memberships, dataclasses.replace(regulariser, weight=weight), beta=beta)
        return -torch.autograd.grad(loss, chosen)[0].numpy() / beta

    alone = push(0.0)
    return alone, push(regulariser.weight) - alone


def central_differences(outputs: Tensor, memberships: Tensor, bandwidth: float, step: float = 1e-4) -> Tensor:
    """The penalty's gradient in each output (B,) without automatic differentiation, in float64."""
    moves = step * torch.eye(len(outputs), dtype=torch.float64)
    up, down = (
        torch.stack([mmd.mmd_squared(outputs + sign * move, memberships, bandwidth) for move in moves])
        for sign in (1, -1)
    )
    return (up - down) / (2 * step)


def environment_means(outputs: Tensor, memberships: Tensor) -> Tensor:
    """Weighted mean (K,) of outputs (B,) in each environment; 0 in one that has no weight."""
    mass = memberships.sum(0)
    return memberships.T @ outputs / mass.clamp_min(torch.finfo(mass.dtype).tiny)


def pairwise_mmd(outputs: Tensor, memberships: Tensor, bandwidth: float) -> np.ndarray:
    """The V-statistic of every two environments, (K, K), of which the penalty is the mean above the diagonal."""
    count = memberships.shape[1]
    found = np.zeros((count, count))
    for couple in itertools.combinations(range(count), 2):
        found[couple] = found[couple[::-1]] = mmd.mmd_squared(outputs, memberships[:, list(couple)], bandwidth)
    return found


def followed(outputs: Tensor, memberships: Tensor, bandwidth: float, steps: int = 300, rate: float = 0.05) -> Tensor:
    """Where the rewards (B,) end when the penalty alone moves them: Adam with steps of ``rate`` bandwidths."""
    moved = outputs.clone().requires_grad_()
    optimizer = torch.optim.Adam([moved], rate * bandwidth)
    for _ in range(steps):
        optimizer.zero_grad()
        mmd.mmd_squared(moved, memberships, bandwidth).backward()
        optimizer.step()
    return moved.detach()


# --- Where it breaks ---


def prior_table(losses: Tensor, memberships: Tensor, seed: int) -> pd.DataFrame:
    r"""The preference loss :math:`\sum_k \pi_k L_k` under both priors, for the memberships at hand and for random ones.

    Columns: memberships, plain mean, empirical prior, uniform prior.
    """
    random = torch.rand(memberships.shape, generator=torch.Generator().manual_seed(seed)).pow(4)
    rows = []
    for name, p in (("inferred", memberships), ("random", random / random.sum(1, keepdim=True))):
        risks, prior = mmd.environment_risks(losses, p), p.mean(0)
        rows.append(
            {
                "memberships": name,
                "plain mean": losses.mean().item(),
                "empirical prior": (prior[p.sum(0) > 1e-6] @ risks).item(),
                "uniform prior": risks.mean().item(),
            }
        )
    return pd.DataFrame(rows)


def collapse(
    states: Tensor, outputs: Tensor, seeds: Sequence[int], steps: int = 60, rate: float = 0.003
) -> pd.DataFrame:
    """Algorithm 1's environments while g descends the penalty (Adam) on outputs (B,) that stay as they are.

    Columns: variant (whether gradients reach g), run (the seed of g's initial weights), step, environments,
    weight_distance, mmd2.
    """
    rows = []
    for (variant, gradient), seed in itertools.product(
        (("gradients through g", "paper"), ("detached", "detached")), seeds
    ):
        module = environments.BatchEnvironments(states.shape[1], gradient=gradient, seed=seed)
        optimizer = torch.optim.Adam(module.parameters(), rate)
        for step in range(steps):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that it has collapsed is what the table shows
                memberships = module(states)
                penalty = mmd.mmd_squared(outputs, memberships)
            found = module.diagnostics(memberships)
            row = {name: found[name] for name in ("environments", "weight_distance")}
            rows.append({"variant": variant, "run": seed, "step": step, **row, "mmd2": penalty.item()})
            if penalty.requires_grad:
                optimizer.zero_grad()
                penalty.backward()
                optimizer.step()
    return pd.DataFrame(rows)


def farthest_two(
    inference: environments.EnvironmentInference, states: Tensor, size: int, apart: float
) -> tuple[Tensor, Tensor]:
    """The ``size`` rows of ``states`` nearest to each of the two centres that lie farthest apart, and their features.

    Features (2 size, d') are scaled so that these centres are ``apart``: a batch that is kind to DBSCAN, at a distance
    from which Eq. 8, which has no temperature, gives rows that are neither flat nor hard.
    """
    z, centres = inference.features(states), inference.centres
    distances = torch.cdist(centres, centres)
    couple = divmod(int(distances.argmax()), len(centres))
    near = torch.cdist(z, centres[list(couple)]).argsort(0)[:size].T.flatten()
    return near, apart / distances.max() * z[near]


def cluster_counts(
    spaces: Mapping[str, Tensor],
    rules: Mapping[str, Mapping[str, Any]],
    sizes: Sequence[int],
    seed: int,
    batches: int = 50,
) -> pd.DataFrame:
    """What Algorithm 1's DBSCAN finds in random mini-batches of features.

    Args:
        spaces: features (N, d') by name; ``rules``: DBSCAN's options of ``BatchEnvironments`` by name.

    Returns:
        a row per space, rule and batch size: ``noise`` and ``clusters`` (means over batches) and ``usable``, the share
        of batches with the two clusters that a penalty needs.
    """
    rows = []
    for (space, z), (rule, options), size in itertools.product(spaces.items(), rules.items(), sizes):
        module = environments.BatchEnvironments(z.shape[1], **options)
        generator, found = torch.Generator().manual_seed(seed), []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a single environment: counted here
            for _ in range(batches):
                centres = module.centres(z[torch.randperm(len(z), generator=generator)[:size]])
                found.append((module.noise_share, len(centres)))
        noise, clusters = np.array(found).T
        row = {"features": space, "DBSCAN": rule, "batch": size}
        rows.append({**row, "noise": noise.mean(), "clusters": clusters.mean(), "usable": (clusters >= 2).mean()})
    return pd.DataFrame(rows)


def permuted_estimates(
    outputs: Tensor, memberships: Tensor, bandwidth: float, seed: int, draws: int = 1000
) -> pd.DataFrame:
    """Every estimator on memberships dealt at random to the batch's examples, a column each, ``draws`` rows.

    Memberships then say nothing about outputs; what an estimator shows on average is bias.
    """
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(outputs), generator=generator) for _ in range(draws)]
    names = list(mmd.ESTIMATORS)
    found = [mmd.mmd_estimates(outputs, memberships[order], bandwidth, names) for order in orders]
    return pd.DataFrame(torch.stack(found).numpy(), columns=names)


def expected_bias(outputs: Tensor, memberships: Tensor, bandwidth: float) -> float:
    r"""The V-statistic's mean over all ways to deal the memberships, :math:`(1-\hat\kappa)\lVert a_m-a_{m'}\rVert^2`,
    as the mean over pairs of environments."""
    kernel = mmd.gaussian_kernel(outputs[:, None], bandwidth)
    off = (kernel.sum() - kernel.diagonal().sum()) / (len(kernel) * (len(kernel) - 1))
    distances = torch.pdist(mmd.environment_weights(memberships).T).square()
    return ((1 - off) * distances.mean()).item()


def width_rules(rewards: Tensor) -> dict[str, Regulariser]:
    """Three kernel widths: fixed at the batch's own median, the median alone, and the median with the default floor."""
    fixed = mmd.median_bandwidth(rewards).item()
    return {
        "fixed width": Regulariser(bandwidth=fixed),
        "median width": Regulariser(min_bandwidth=torch.finfo(torch.float32).tiny),
        "median, floor": Regulariser(),
    }


def shrunk_rewards(chosen: Tensor, rejected: Tensor, memberships: Tensor, scales: Sequence[float]) -> pd.DataFrame:
    """The penalty and its gradient when all rewards, chosen and rejected (B,) each, are multiplied by a factor.

    Columns: variant (of the kernel's width), scale (the factor), distance (median between chosen rewards), mmd2, and
    ratio: the norm of the penalty's gradient in the chosen rewards over DPO's.
    """
    zeros, median = torch.zeros_like(chosen), mmd.median_bandwidth(chosen).item()
    rows = []
    for (variant, regulariser), scale in itertools.product(width_rules(chosen).items(), scales):
        scaled = LogProbs(scale * chosen, scale * rejected[:, None], zeros, zeros[:, None])
        value = mmd.mmd_squared(scaled.chosen, memberships, regulariser.width(scaled.chosen)).item()
        alone, penalty = reward_gradients(scaled, memberships, 1.0, regulariser)
        ratio = np.linalg.norm(penalty) / np.linalg.norm(alone)
        rows.append({"variant": variant, "scale": scale, "distance": scale * median, "mmd2": value, "ratio": ratio})
    return pd.DataFrame(rows)


def padded(found: Pairs, index: Sequence[int]) -> tuple[PreTrainedModel, PreTrainedModel, PairTokens, PairTokens]:
    """Copies of policy and reference on the CPU, and the pairs ``index`` as the published collator pads them."""
    ids, answers = found.tokens(index)
    chosen, rejected = (pad_pairs(ids, side, found.tokenizer.pad_token_id) for side in zip(*answers, strict=True))
    policy, reference = (copy.deepcopy(model).cpu().eval() for model in (found.policy, found.reference))
    return policy, reference, chosen, rejected


def released_table(found: Pairs, index: Sequence[int], seed: int) -> pd.DataFrame:
    """What the published trainer's objective makes of the pairs ``index``: as released, with the last prompt state for
    features, and with all departures undone; a row each, the columns are ``released_code_loss``'s numbers."""
    policy, reference, chosen, rejected = padded(found, index)
    projection = environments.BatchEnvironments(found.states.shape[1], seed=seed).projection
    kept = {"as released": set(DEPARTURES), "last prompt state": set(DEPARTURES) - {"features"}, "all undone": set()}
    rows = {}
    for name, departures in kept.items():
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            _, rows[name] = released_code_loss(
                policy, reference, chosen, rejected, projection, generator, departures=departures
            )
    return pd.DataFrame.from_dict(rows, orient="index")


@torch.no_grad()
def clamped_by_attention(found: Pairs, index: Sequence[int]) -> dict[str, float]:
    """The share of log-ratios beyond the published clamp when every position is scored, by what is attended to.

    Of both responses of the pairs ``index``, with their own ids: ``everything``, and ``nothing``, as a copy whose mask
    rounding has emptied.
    """
    policy, reference, *sides = padded(found, index)
    shares = {}
    for name, keep in (("everything", 1), ("nothing", 0)):
        copies = [dataclasses.replace(tokens, attention_mask=keep * tokens.attention_mask) for tokens in sides]
        ours, theirs = (
            torch.cat([sequence_logps(model, tokens, zeroed_labels)[0] for tokens in copies])
            for model in (policy, reference)
        )
        shares[name] = ((ours - theirs).abs() > CLAMP).float().mean().item()
    return shares
