r"""The objective that the CausalDPO authors' published trainer effectively optimises, departure by departure.

Re-created from a description of that code, to show what each difference from the paper (arXiv 2603.22335) does to the
loss and its gradient. Research code often differs from its paper in such ways; the point is which of its numbers can be
read as the paper's method. Each departure is a pair in ``DEPARTURES``: what the published code does and what the paper,
or the evident intention, has in its place. Of the rest, which cannot be switched: g and the centres get no gradient
(every path to them is cut by a cast or a comparison), and several negatives of a prompt are separate pairs.

The last section does the same for the published evaluation, which no trained model is needed to see.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from sklearn.cluster import DBSCAN
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from causaldpo_lib.environments import soft_memberships
from causaldpo_lib.errors import pick
from causaldpo_lib.metrics import hits
from causaldpo_lib.mmd import mmd_squared

EPS, MIN_SAMPLES, ENVIRONMENTS = 0.5, 10, 2
BETA, MMD_WEIGHT, MMD_BANDWIDTH, CLAMP = 0.1, 0.001, 1.0, 10.0
IGNORED = -100


@dataclass(frozen=True)
class PairTokens:
    """Prompts with one response each, padded on the right.

    Shapes: ``input_ids``, ``attention_mask`` and ``labels`` (B, L) int64; labels are the ids of the response's tokens
    and -100 elsewhere.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def pad_pairs(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int) -> PairTokens:
    """``PairTokens`` of token ids."""
    rows = [torch.tensor([*prompt, *response]) for prompt, response in zip(prompts, responses, strict=True)]
    labels = [row.clone().index_fill_(0, torch.arange(len(p)), IGNORED) for row, p in zip(rows, prompts, strict=True)]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id)
    attended = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return PairTokens(ids, attended, pad_sequence(labels, batch_first=True, padding_value=IGNORED))


def first_position(states: Tensor, tokens: PairTokens) -> Tensor:
    """The state of position 0, as of a [CLS] token: in a causal model it has seen its own token only, which is the same
    in all prompts of one template."""
    return states[:, 0]


def last_prompt_position(states: Tensor, tokens: PairTokens) -> Tensor:
    """The state of the last prompt token: it has seen the whole history and no response."""
    end = (tokens.labels != IGNORED).int().argmax(1) - 1
    return states[torch.arange(len(states), device=states.device), end]


def two_centres(z: Tensor, generator: torch.Generator) -> Tensor:
    """Always two centres: DBSCAN's first two clusters, and Gaussian noise for those that are missing.

    With fewer examples than ``MIN_SAMPLES`` no point can be a core point, so both are noise.
    """
    found = _clusters(z)[:ENVIRONMENTS]
    noise = torch.randn(ENVIRONMENTS - len(found), z.shape[1], generator=generator)
    return torch.cat([found, noise.to(z)])


def found_centres(z: Tensor, generator: torch.Generator) -> Tensor:
    """The clusters that are there; without any, the batch is one environment."""
    found = _clusters(z)
    return found if len(found) else z.mean(0, keepdim=True)


def _clusters(z: Tensor) -> Tensor:
    labels = torch.as_tensor(DBSCAN(eps=EPS, min_samples=MIN_SAMPLES).fit_predict(z.cpu().numpy()), device=z.device)
    return torch.stack([z[labels == k].mean(0) for k in range(int(labels.max()) + 1)]) if labels.max() >= 0 else z[:0]


def broadcast_average(values: Tensor, weights: Tensor) -> Tensor:
    r"""An "environment's average" of ``values`` (B, L) under ``weights`` (B,), after a broadcasting slip.

    Weights (B, 1, 1) times values (B, L) are (B, B, L); the sum over the first axis divided by the sum of weights is
    :math:`x_{jl} \sum_i w_i / \sum_i w_i`: the values themselves, but for float32 rounding. (Averaging ids over the
    batch, had the shapes matched, would not have meant anything either.)
    """
    return (weights[:, None, None] * values.float()).sum(0) / weights.sum()


def unchanged(values: Tensor, weights: Tensor) -> Tensor:
    """Eq. 9 concerns outputs and losses; token ids stay what they are."""
    return values.float()


def truncated(values: Tensor) -> Tensor:
    """Integers by truncation: an id that rounding left just below itself becomes the id before."""
    return values.long()


def rounded(values: Tensor) -> Tensor:
    """The nearest integers: every id survives."""
    return values.round().long()


def equality_mask(mask: Tensor, weights: Tensor) -> Tensor:
    """The attention mask averaged like ids and compared with 1: rounding decides for all positions at once, so that an
    environment attends to everything or to nothing."""
    return (broadcast_average(mask, weights).clamp(0, 1) == 1).long()


def same_mask(mask: Tensor, weights: Tensor) -> Tensor:
    """The attention mask as it came."""
    return mask


def zeroed_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Targets and which of them count, when -100 is replaced by 0 before the mask is taken: everything counts, and
    prompt and padding positions are scored on token 0."""
    labels = labels.clamp_min(0)
    return labels, labels != IGNORED


def response_labels(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Only the response's tokens count."""
    return labels.clamp_min(0), labels >= 0


def clamped(log_ratios: Tensor) -> Tensor:
    """Log-ratios cut to [-10, 10]: outside, the gradient is 0."""
    return log_ratios.clamp(-CLAMP, CLAMP)


def unclamped(log_ratios: Tensor) -> Tensor:
    """Log-ratios of any size, as in Eq. 1."""
    return log_ratios


def fixed_beta(beta: float) -> float:
    """The trainer's own default, whatever was asked for."""
    return BETA


def given_beta(beta: float) -> float:
    """The beta that was asked for."""
    return beta


def mean_logits(logits: Tensor, rewards: Tensor) -> Tensor:
    """Logits averaged over all positions, prompt and padding included: (B, V) points so far apart that a Gaussian
    kernel of width 1 is 0 between different examples."""
    return logits.mean(1)


def chosen_rewards(logits: Tensor, rewards: Tensor) -> Tensor:
    """Implicit rewards of the chosen responses."""
    return rewards


def equal_rows(weights: Tensor) -> Tensor:
    """Each example counts the same in every environment."""
    return torch.full_like(weights, 1 / len(weights))


def weighted_rows(weights: Tensor) -> Tensor:
    """Examples count by their membership: a_k."""
    return weights / weights.sum()


def uniform_prior(memberships: Tensor) -> Tensor:
    """All environments count the same."""
    return memberships.new_full((memberships.shape[1],), 1 / memberships.shape[1])


def estimated_prior(memberships: Tensor) -> Tensor:
    """Environments count by their mean membership."""
    return memberships.mean(0)


class Departure(NamedTuple):
    """What the published code does, and what stands in its place when the departure is switched off."""

    released: Callable[..., Any]
    paper: Callable[..., Any]


DEPARTURES: dict[str, Departure] = {
    "features": Departure(first_position, last_prompt_position),
    "centres": Departure(two_centres, found_centres),
    "aggregation": Departure(broadcast_average, unchanged),
    "cast": Departure(truncated, rounded),
    "attention": Departure(equality_mask, same_mask),
    "labels": Departure(zeroed_labels, response_labels),
    "clamp": Departure(clamped, unclamped),
    "beta": Departure(fixed_beta, given_beta),
    "rows": Departure(equal_rows, weighted_rows),
    "prior": Departure(uniform_prior, estimated_prior),
    "outputs": Departure(mean_logits, chosen_rewards),
}


# What the numbers of ``released_code_loss`` are; "tokens" leaves out padding, "positions" does not.
NUMBERS: dict[str, str] = {
    "preference_loss": "the objective without the penalty (nats)",
    "mmd2": "MMD² between the environments' outputs, before its weight (no unit)",
    "environments": "how many environments have any weight",
    "undefined_environments": "how many have none, so that their ids would be 0 / 0; they are left out",
    "feature_spread": "largest distance between two examples' features (no unit)",
    "shifted_ids": "share of the tokens of prompts and chosen titles whose id is another one in an environment's copy",
    "attended": "share of these tokens that the copies attend to",
    "counted": "share of all positions that are in the score of a chosen title",
    "response_share": "share of all positions that are tokens of the chosen titles",
    "clamped": f"share of the log-ratios, of both titles and in all copies, beyond ±{CLAMP:g}",
}


def glossary(names: Collection[str], meanings: Mapping[str, str] = NUMBERS) -> str:
    """What the columns of a table are, as a Markdown list.

    Raises:
        StudyError: a name has no meaning.
    """
    return "\n".join(f"- `{name}`: {pick(meanings, name, 'column')}" for name in names)


def environment_copy(tokens: PairTokens, weights: Tensor, steps: dict[str, Callable[..., Any]]) -> PairTokens:
    """What an environment with membership ``weights`` (B,) sees of a batch."""
    return PairTokens(
        input_ids=steps["cast"](steps["aggregation"](tokens.input_ids, weights)),
        attention_mask=steps["attention"](tokens.attention_mask, weights),
        labels=steps["cast"](steps["aggregation"](tokens.labels, weights)),
    )


def released_code_loss(
    policy: nn.Module,
    reference: nn.Module,
    chosen: PairTokens,
    rejected: PairTokens,
    projection: Callable[[Tensor], Tensor],
    generator: torch.Generator,
    beta: float = BETA,
    departures: Collection[str] = tuple(DEPARTURES),
) -> tuple[Tensor, dict[str, float]]:
    r"""Loss of a batch of B pairs as the published trainer computes it, with the ``departures`` that are left on.

    .. math:: \sum_k \hat p_k \sum_i a_{ik} \log(1 + e^{-\beta(h_{w,i}^{(k)} - h_{l,i}^{(k)})})
        + 0.001 \, \mathrm{MMD}^2(s^{(1)}, \dots, s^{(K)})

    over environments k, each with its own copy of the batch. With all departures on, the copies differ by rounding
    damage only; with all off it is plain DPO plus the MMD of rewards between the clusters found.

    Args:
        policy, reference: causal language models that return logits and hidden states.
        chosen, rejected: tokens of the same prompts, B rows each.
        projection: g, a map of hidden states (B, d), (B, d'); it gets no gradient.
        generator: of the missing centres.
        beta: what was asked for.
        departures: names of ``DEPARTURES``; a name that is absent is switched off.

    Returns:
        The scalar loss, and ``NUMBERS`` as floats.

    Raises:
        StudyError: a departure is unknown.
    """
    preference, mmd2, metrics = released_code_terms(
        policy, reference, chosen, rejected, projection, generator, beta, departures
    )
    return preference + MMD_WEIGHT * mmd2, metrics


def released_code_terms(
    policy: nn.Module,
    reference: nn.Module,
    chosen: PairTokens,
    rejected: PairTokens,
    projection: Callable[[Tensor], Tensor],
    generator: torch.Generator,
    beta: float = BETA,
    departures: Collection[str] = tuple(DEPARTURES),
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """The preference loss and the MMD^2 of ``released_code_loss`` before they are added, and its numbers."""
    for name in departures:
        pick(DEPARTURES, name, "departure")
    steps = {name: step.released if name in departures else step.paper for name, step in DEPARTURES.items()}
    beta = steps["beta"](beta)
    with torch.no_grad():
        states = policy(
            input_ids=chosen.input_ids, attention_mask=chosen.attention_mask, output_hidden_states=True
        ).hidden_states[-1]
        z = projection(steps["features"](states.float(), chosen))
        memberships = soft_memberships(z, steps["centres"](z, generator))
        defined = memberships.sum(0) > 0
        memberships = memberships[:, defined]
    risks, outputs, rows, ratios, copies = [], [], [], [], []
    for weights in memberships.T:
        pair = [environment_copy(tokens, weights, steps) for tokens in (chosen, rejected)]
        with torch.no_grad():
            reference_logps = [sequence_logps(reference, tokens, steps["labels"])[0] for tokens in pair]
        (chosen_logps, logits), (rejected_logps, _) = (sequence_logps(policy, t, steps["labels"]) for t in pair)
        raw = torch.stack([chosen_logps, rejected_logps]) - torch.stack(reference_logps)
        h_chosen, h_rejected = steps["clamp"](raw)
        row = steps["rows"](weights)
        risks.append(row @ F.softplus(-beta * (h_chosen - h_rejected)))
        outputs.append(steps["outputs"](logits, beta * h_chosen))
        rows.append(row[:, None])
        ratios.append(raw.detach())
        copies.append(pair[0])
    preference = steps["prior"](memberships) @ torch.stack(risks)
    # Copies side by side: the environments' weights then are the blocks of a block diagonal.
    mmd2 = mmd_squared(torch.cat(outputs), torch.block_diag(*rows), MMD_BANDWIDTH)
    real = chosen.attention_mask.bool()
    counted = torch.stack([steps["labels"](copy.labels)[1] for copy in copies])
    return (
        preference,
        mmd2,
        {
            "preference_loss": preference.item(),
            "mmd2": mmd2.item(),
            "environments": len(risks),
            "undefined_environments": int((~defined).sum()),
            "feature_spread": torch.pdist(z).max().item() if len(z) > 1 else 0.0,
            "shifted_ids": _share([copy.input_ids[real] != chosen.input_ids[real] for copy in copies]),
            "attended": _share([copy.attention_mask[real] == 1 for copy in copies]),
            "counted": counted.float().mean().item(),
            "response_share": _share([chosen.labels != IGNORED]),
            "clamped": _share([torch.stack(ratios).abs() > CLAMP]),
        },
    )


def sequence_logps(
    model: nn.Module, tokens: PairTokens, targets_of: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Summed log-probabilities (B,) of the labels that count, and the float32 logits (B, L, V)."""
    logits = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).logits.float()
    targets, counted = targets_of(tokens.labels[:, 1:])
    token_logps = -F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    return (token_logps * counted).sum(1), logits


def _share(parts: Sequence[Tensor]) -> float:
    return torch.stack([part.float() for part in parts]).mean().item()


# --- The published evaluation ---


def stripped_answer(text: str) -> str:
    """What the published inference keeps of a generated title: no ``!@#$%^&*{}``, nothing from the first full stop on,
    and of the rest nothing from the first comma on. Catalogue titles are not treated alike."""
    kept = " ".join("".join(letter for letter in text if letter not in "!@#$%^&*{}").split())
    return kept.split(".")[0].split(",")[0]


def embedded_text(prediction: str | Sequence[str]) -> str:
    """What the published evaluation embeds of a prediction: its element 0, to the first line break.

    The evaluation expects a list of texts. The published inference stores one text, whose element 0 is its first
    character. Nothing at all becomes "NAN". (A title in double quotes is looked for first; no character holds one.)
    """
    return prediction[0].split("\n", 1)[0] if len(prediction) else "NAN"


def carried_or_ratios(items: ArrayLike, cutoffs: Sequence[int] = (10, 20), top: int = 3) -> dict[int, float]:
    """ORRatio at each of ``cutoffs`` when the number of lists (N, >= k) counted so far is carried on to the next.

    The first is ``metrics.or_ratio``; the second is that divided by 2, a third would be divided by 3.
    """
    shown, counted, found = np.asarray(items), 0, {}
    for k in cutoffs:
        counted += len(shown)
        slots = np.unique(shown[:, :k], return_counts=True)[1]
        found[k] = float(np.sort(slots)[-top:].sum() / (k * counted))
    return found


def hit_rate_over_all(ranks: ArrayLike, listed: ArrayLike, k: int) -> float:
    """HR@k when examples whose target is not ``listed`` (N,) in the catalogue are skipped, but divided by as well.

    Over the listed alone it is ``metrics.hit_rate_at_k(ranks[listed], k)``; this is that times their share.
    """
    known = np.asarray(listed, dtype=bool)
    return float(hits(np.asarray(ranks, dtype=float)[known], k).sum() / len(known))
