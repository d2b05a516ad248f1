r"""What each departure of the CausalDPO authors' published code from their paper does, measured on a batch.

``CARDS`` holds, for every departure, what the paper says, what the code does and a remedy; the functions give the
numbers that go with them. The objective itself is re-created in ``released.py``. Nothing here is used in training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from sklearn.cluster import DBSCAN
from torch import Tensor, nn

from causaldpo_lib import grounding, mmd, released
from causaldpo_lib.environments import EnvironmentInference
from causaldpo_lib.errors import StudyError, pick
from causaldpo_lib.released import DEPARTURES, EPS, MIN_SAMPLES, MMD_BANDWIDTH, MMD_WEIGHT, PairTokens

Projection = Callable[[Tensor], Tensor]
CANDIDATES, CATALOGUE, PRINTED_ITEMS, INITIALS = 10, 3471, 10681, 39  # counted in the released files; printed: Table 2
LLAMA_VOCABULARY, LLAMA_WIDTH = 128256, 4096
# Of DEPARTURES; averaging ids and truncating them do nothing one without the other.
GROUPS: dict[str, tuple[str, ...]] = {
    "first-token features": ("features",),
    "two centres": ("centres",),
    "averaged ids": ("aggregation", "cast"),
    "attention by rounding": ("attention",),
    "zeroed labels": ("labels",),
    "beta 0.1": ("beta",),
    "clamp": ("clamp",),
    "copies for environments": ("rows",),
    "uniform prior": ("prior",),
    "mean logits": ("outputs",),
}
# Columns of ``departure_table``
COLUMNS: dict[str, str] = {
    "loss": "the whole objective (nats)",
    "cosine": "of its gradient with that of the paper's objective",
    "length": "of its gradient over the length of the paper's",
    "penalty_share": f"the penalty's part of the gradients' norms, at λ = {MMD_WEIGHT:g}",
    "penalty_cosine": "cosine of the penalties' gradients alone (NaN where one of them is 0)",
    **released.NUMBERS,
}
ONLY, REPAIRED = "the paper's, with this departure", "as released, with this one repaired"


class Card(NamedTuple):
    """One departure: its numbers (rows), the two sides, a remedy, and whether it is run or only read."""

    rows: tuple[int, ...]
    title: str
    paper: str
    code: str
    remedy: str
    run: bool = True


CARDS: dict[str, Card] = {
    "features": Card(
        (5,),
        "Features of the first token",
        "$z_i = g(h_i)$, with $h_i$ a hidden representation of the input.",
        "takes the last layer's state at position 0 of prompt and chosen title, as one would take a [CLS] state. In a "
        "causal model position 0 has seen its own token only, and prompts of one template share it (unless truncated).",
        "take the state of the last prompt token: it has seen the history and no answer.",
    ),
    "density": Card(
        (8,),
        "Ten neighbours in a batch of eight",
        "DBSCAN on the mini-batch (Eq. 7); radius and least number of neighbours are not given.",
        "uses radius 0.5 and 10 points for a core point; the default batch per device is 8, the script's 16.",
        "cluster many prompts at once, with the radius taken from their own distances.",
    ),
    "centres": Card(
        (6,),
        "Always two centres",
        "K is the number of clusters found.",
        "fixes K at 2: further clusters are dropped, missing ones are replaced by Gaussian random centres, and where "
        "DBSCAN finds none the previous centres stay, at first random ones too.",
        "keep the clusters found; with fewer than two, leave the penalty out of that batch and log it.",
    ),
    "ids": Card(
        (1, 2),
        "Averages of token ids that are no averages",
        "$\\bar x^{(k)} = \\sum_i p_{ik} x_i / \\sum_i p_{ik}$ over representations $x_i$ (Eq. 9).",
        "multiplies weights of shape (B, 1, 1) with ids of shape (B, L). The sum over the first axis, divided by the "
        "sum of the weights, is the original batch for every environment, but for float32 rounding, and the cast to "
        "integers cuts off what rounding left just below.",
        "weigh losses and outputs, and leave ids as they are.",
    ),
    "attention": Card(
        (3,),
        "Attention decided by rounding",
        "does not change what is attended to.",
        "averages the mask in the same way and compares it with 1.",
        "pass the mask on as it came.",
    ),
    "prior": Card(
        (12,),
        "A prior over copies",
        "a backdoor adjustment with the estimated prior $\\hat p(E = k) = \\frac1N \\sum_i p_{ik}$.",
        "takes the plain mean over environments, each of which holds every example with weight 1 / B.",
        "say that the preference loss is the plain mean, which the estimated prior gives as well, or choose another "
        "prior.",
    ),
    "labels": Card(
        (4,),
        "Prompt and padding are scored",
        "log-probabilities of the responses (Eq. 1).",
        "replaces negative labels by 0 before the mask of -100 is taken, so that nothing is masked: every prompt and "
        "padding position adds the log-probability of token 0.",
        "take the mask first.",
    ),
    "beta": Card(
        (7,),
        "A β that does not arrive",
        "tunes β; 2 is best in Fig. 3.",
        "passes β to a configuration object which the trainer does not read: it uses its own default of 0.1. The "
        "limits of 512 and 128 tokens come about in the same way.",
        "read β and the limits from the configuration, in one place.",
    ),
    "clamp": Card(
        (13,),
        "Clamped log-ratios",
        "log-ratios of any size (Eq. 1).",
        "cuts each log-ratio to [-10, 10] before the logarithm of 1 + exp.",
        "use softplus, which cannot overflow, without a clamp.",
    ),
    "outputs": Card(
        (10,),
        "Mean logits and a fixed width",
        "the policy's output for $(x, y_w)$, such as its score, under a characteristic kernel.",
        "averages the logits over all positions, prompt and padding included: a point in as many dimensions as the "
        "vocabulary has tokens, under a Gaussian kernel of width 1.",
        "compare rewards of the chosen responses, with the batch's median distance for width.",
    ),
    "reduction": Card(
        (11,),
        "Which sum of which MMD",
        "$\\sum_{m, m'} \\mathrm{MMD}$ over ordered pairs, while its appendix differentiates MMD².",
        "takes the mean of MMD² over unordered pairs.",
        "state which; with K found in data a mean keeps the meaning of λ, and MMD² has a gradient at 0.",
    ),
    "gradient": Card(
        (9,),
        "A feature map that is never trained",
        "trains g together with the policy.",
        "casts and compares on every way from memberships to loss, and makes g and the centres after the optimiser's "
        "model, of which they are no part.",
        "give g to the optimiser and let memberships weigh losses; or call g fixed, which also avoids a collapse.",
    ),
    "first_character": Card(
        (20,),
        "The first character of a prediction",
        "scores and ranks the whole item space by the generated title.",
        "stores a prediction as one text, while the evaluation takes element 0 of what it expects to be a list.",
        "store a list, or take the text; and refuse a text where a list is expected.",
    ),
    "stripping": Card(
        (19,),
        "Titles cut at full stops and commas",
        "is silent on it.",
        "removes !@#$%^&*{} and keeps what stands before the first full stop, then before the first comma; catalogue "
        "titles stay whole.",
        "end at the end-of-sequence token; no other cut is needed.",
    ),
    "or_ratio": Card(
        (21,),
        "A counter that goes on",
        "reports no ORRatio; the repository does.",
        "does not reset the number of lists between K = 10 and K = 20.",
        "count anew at each cut-off.",
    ),
    "skipped": Card(
        (22,),
        "Skipped, but divided by",
        "is silent on it.",
        "skips examples whose target is not in the catalogue's list and divides by all examples.",
        "leave them out of both, and report how many there are.",
    ),
    "negatives": Card(
        (14,),
        "Several negatives",
        "varies their number (Fig. 3), following S-DPO.",
        "makes a pair of each, although the trainer's loss is already written for several.",
        "put all negatives of a prompt into one example.",
        run=False,
    ),
    "tokenisation": Card(
        (15,),
        "Three tokenisations of a title",
        "is silent on it.",
        "the class that writes prompts is not in the repository; with S-DPO's, fine-tuning, preference training and "
        "inference would treat the blank before a title in three ways.",
        "build prompt and title once, and cut tokens, not text.",
        run=False,
    ),
    "colon": Card(
        (16,),
        "Titles with a colon",
        "fine-tunes on titles.",
        "looks for the last colon as the end of the prompt: of a title that has one, the rest alone is learned.",
        "take the prompt's length in tokens.",
        run=False,
    ),
    "candidates": Card(
        (17,),
        "Ten candidates in the prompt",
        "ranks the entire item space.",
        "asks to choose from given options, ten with the target among them.",
        "drop the options, or report accuracy among ten.",
        run=False,
    ),
    "catalogue": Card(
        (18,),
        "Another catalogue",
        "10,681 items.",
        "grounds in a list of 3,471 titles, which lacks part of the targets and candidates.",
        "ground in all items of the training data, and publish the list.",
        run=False,
    ),
    "scripts": Card(
        (23,),
        "Scripts that stop",
        "is silent on it.",
        "scripts pass unknown arguments, one file is missing, one import is absent, paths are absolute.",
        "run the README's commands in a fresh clone before each release.",
        run=False,
    ),
    "gain": Card(
        (24,),
        "Two average gains",
        "17.17 %.",
        "the repository's README says 24.10 %.",
        "print the command and the table behind a number; notebook 10 has the arithmetic.",
        run=False,
    ),
}


def card(name: str) -> str:
    """The text of a departure, in Markdown.

    Raises:
        StudyError: there is no such card.
    """
    found = pick(CARDS, name, "departure")
    numbers = f"row{'s' if len(found.rows) > 1 else ''} {', '.join(map(str, found.rows))}"
    return (
        f"**{found.title}** ({numbers})\n\n- *Paper*: {found.paper}\n- *Published code*: {found.code}\n"
        f"- *Remedy*: {found.remedy}"
    )


def card_table(run: bool) -> pd.DataFrame:
    """The departures that are run here, or those that are only read: row, departure, paper, published code, remedy."""
    rows = [
        {
            "row": ", ".join(map(str, found.rows)),
            "departure": found.title,
            "paper": found.paper,
            "published code": found.code,
            "remedy": found.remedy,
        }
        for found in CARDS.values()
        if found.run == run
    ]
    return pd.DataFrame(rows)


# --- The objective, departure by departure ---


class Batch(NamedTuple):
    """Rows of the training pairs, and a map g under which DBSCAN as published finds two clusters in them."""

    rows: Tensor
    projection: Projection


def dense_batches(
    inference: EnvironmentInference, states: Tensor, size: int, count: int, allowed: np.ndarray | None = None
) -> list[Batch]:
    """Batches that are kind to Algorithm 1: ``size`` rows of ``states`` (N, d) nearest to each of two centres.

    The two centres are a pair of ``inference``'s, the ``count`` pairs that lie farthest apart in turn. g, a linear map
    with an offset, is the inference's own, scaled so that ``MIN_SAMPLES`` of a group are well within ``EPS``.
    ``allowed`` (N,) bool: rows that may be drawn.

    Raises:
        StudyError: ``size`` is below ``MIN_SAMPLES``, or there are fewer than ``count`` pairs of centres.
    """
    m, n = torch.triu_indices(len(inference.centres), len(inference.centres), offset=1)
    if size < MIN_SAMPLES or len(m) < count:
        raise StudyError(
            f"{count} batches of two groups of {size} need groups of at least {MIN_SAMPLES}, and as many pairs among "
            f"{len(inference.centres)} centres"
        )
    z = inference.features(states)
    barred = torch.as_tensor(np.zeros(len(z), bool) if allowed is None else ~allowed)
    apart = (inference.centres[m] - inference.centres[n]).norm(dim=1).argsort(descending=True)
    found = []
    for pair in apart[:count].tolist():
        centres = torch.stack([inference.centres[m[pair]], inference.centres[n[pair]]])
        near = torch.cdist(z, centres).masked_fill(barred[:, None], torch.inf).argsort(0)[:size].T
        reach = max(torch.cdist(z[group], z[group]).kthvalue(MIN_SAMPLES, 1).values.max().item() for group in near)
        # Half as wide again: the policy's states are not quite the reference's.
        found.append(Batch(near.flatten(), _scaled(inference, EPS / (1.5 * reach))))
    return found


def _scaled(inference: EnvironmentInference, factor: float) -> Projection:
    return lambda states: factor * inference.features(states).to(states.device)


def departure_table(
    policy: nn.Module,
    reference: nn.Module,
    chosen: PairTokens,
    rejected: PairTokens,
    projection: Projection,
    seed: int,
    beta: float = 1.0,
    groups: Mapping[str, Collection[str]] = GROUPS,
) -> pd.DataFrame:
    r"""The objective with and without each departure, and where its gradient points.

    Args:
        beta: what is asked for; ``groups``: names of ``DEPARTURES`` to be switched together, by name.

    Returns:
        a row for the paper's objective (all departures off), one as released (all on), and two per group: ``ONLY`` (all
        off but the group) and ``REPAIRED`` (all on but the group); ``side`` says which. Columns are the numbers of
        ``released_code_loss`` and ``loss``; ``penalty_share``, of the norms of the two terms' gradients, the penalty at
        weight ``MMD_WEIGHT``; ``cosine`` with the paper's gradient and ``length`` over it; and ``penalty_cosine``, of
        the penalties' gradients alone. A cosine with a gradient that is 0 is NaN.
    """
    every = set(DEPARTURES)
    runs: dict[tuple[str, str], set[str]] = {("none", "paper"): set(), ("all", "released"): every}
    for name, members in groups.items():
        runs[name, ONLY], runs[name, REPAIRED] = set(members), every - set(members)
    rows: list[dict[str, Any]] = []
    base: tuple[Tensor, Tensor] | None = None
    for (name, side), kept in runs.items():
        generator = torch.Generator().manual_seed(seed)
        preference, mmd2, metrics = released.released_code_terms(
            policy, reference, chosen, rejected, projection, generator, beta, kept
        )
        ours = _gradient(policy, preference)
        penalty = MMD_WEIGHT * _gradient(policy, mmd2)
        total = ours + penalty
        base = base or (total, penalty)
        rows.append(
            {
                "departure": name,
                "side": side,
                "loss": preference.item() + MMD_WEIGHT * mmd2.item(),
                "penalty_share": (penalty.norm() / (ours.norm() + penalty.norm())).item(),
                "cosine": _cosine(total, base[0]),
                "length": (total.norm() / base[0].norm()).item(),
                "penalty_cosine": _cosine(penalty, base[1]),
                **metrics,
            }
        )
    return pd.DataFrame(rows)


def departure_means(table: pd.DataFrame, policy: str, columns: Sequence[str]) -> pd.DataFrame:
    """Means of ``columns`` of ``departure_table`` over the batches of one policy, by departure and what is left on."""
    short = {"paper": "all off", "released": "all on", ONLY: "alone", REPAIRED: "repaired"}
    rows = table[table["policy"] == policy]
    means = rows.groupby(["departure", "side"], sort=False)[list(columns)].mean()
    return means.rename(index=short, level="side")


def _gradient(model: nn.Module, value: Tensor) -> Tensor:
    parameters = list(model.parameters())
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]
    ).double()


def _cosine(first: Tensor, second: Tensor) -> float:
    product = first.norm() * second.norm()
    return (first @ second / product).item() if product > 0 else float("nan")


@torch.no_grad()
def part_way(reference: nn.Module, policy: nn.Module, share: float) -> nn.Module:
    """A model whose parameters are ``share`` of the way from the reference's to the policy's: 0 is where it starts."""
    moved = copy.deepcopy(policy)
    for parameter, start in zip(moved.parameters(), reference.parameters(), strict=True):
        parameter.copy_(start + share * (parameter - start))
    return moved


# --- One departure at a time ---


def core_points(
    spaces: Mapping[str, Tensor], sizes: Sequence[int], seed: int, batches: int = 30, min_samples: int = MIN_SAMPLES
) -> pd.DataFrame:
    """What DBSCAN with the published radius finds in random mini-batches of features (N, d') by name.

    Returns:
        a row per space and batch size: ``core``, the mean share of core points, ``low`` and ``high``, the middle 95 %
        of batches, and ``usable``, the share of batches with two clusters.
    """
    rows = []
    for name, z in spaces.items():
        for size in sizes:
            generator, shares, usable = torch.Generator().manual_seed(seed), [], []
            for _ in range(batches):
                part = z[torch.randperm(len(z), generator=generator)[:size]].numpy()
                found = DBSCAN(eps=EPS, min_samples=min_samples).fit(part)
                shares.append(len(found.core_sample_indices_) / len(part))
                usable.append(found.labels_.max() >= 1)
            low, high = np.quantile(shares, (0.025, 0.975))
            row = {"variant": name, "batch": size, "core": np.mean(shares), "low": low, "high": high}
            rows.append({**row, "usable": np.mean(usable)})
    return pd.DataFrame(rows)


def rounding_table(tokens: PairTokens, seed: int, draws: int = 200) -> pd.DataFrame:
    """What random membership weights, uniform in 0..1, do to ids and mask of a batch: a row per draw.

    Columns: ``shifted``, the share of real tokens whose id is another one, ``lowest``, the least difference, and
    ``attended``, the share of them that are still attended to.
    """
    generator, real, rows = torch.Generator().manual_seed(seed), tokens.attention_mask.bool(), []
    for _ in range(draws):
        weights = torch.rand(len(tokens.input_ids), generator=generator)
        change = released.truncated(released.broadcast_average(tokens.input_ids, weights)) - tokens.input_ids
        mask = released.equality_mask(tokens.attention_mask, weights)
        rows.append(
            {
                "shifted": (change[real] != 0).float().mean().item(),
                "lowest": change[real].min().item(),
                "attended": (mask[real] == 1).float().mean().item(),
            }
        )
    return pd.DataFrame(rows)


def gradient_reaches(tokens: PairTokens) -> dict[str, bool]:
    """Whether memberships still have a gradient path after each step of the published averages."""
    weights = torch.full((len(tokens.input_ids),), 0.5, requires_grad=True)
    average = released.broadcast_average(tokens.input_ids, weights)
    return {
        "weighted ids": average.requires_grad,
        "ids after the cast": released.truncated(average).requires_grad,
        "mask after the comparison": released.equality_mask(tokens.attention_mask, weights).requires_grad,
    }


@torch.no_grad()
def log_ratio_table(policy: nn.Module, reference: nn.Module, chosen: PairTokens, rejected: PairTokens) -> pd.DataFrame:
    """Log-ratios of both responses when the response's tokens count, and when every position does.

    Columns: variant, response, policy (summed log-probability, nats), log_ratio (nats), clamped (whether beyond 10).
    """
    rules = {"response tokens": released.response_labels, "every position": released.zeroed_labels}
    rows = []
    for variant, rule in rules.items():
        for response, tokens in (("chosen", chosen), ("rejected", rejected)):
            ours, theirs = (released.sequence_logps(model, tokens, rule)[0] for model in (policy, reference))
            part = {"variant": variant, "response": response, "policy": ours, "log_ratio": ours - theirs}
            rows.append(pd.DataFrame(part))
    return pd.concat(rows, ignore_index=True).assign(clamped=lambda t: t["log_ratio"].abs() > released.CLAMP)


def clamped_on_the_way(
    policy: nn.Module, reference: nn.Module, chosen: PairTokens, rejected: PairTokens, shares: Sequence[float]
) -> pd.DataFrame:
    """The share of log-ratios beyond the clamp for models ``part_way`` to the policy: variant, moved, clamped."""
    found = [
        log_ratio_table(part_way(reference, policy, share), reference, chosen, rejected).assign(moved=share)
        for share in shares
    ]
    return pd.concat(found).groupby(["variant", "moved"], sort=False)["clamped"].mean().reset_index()


def clamp_slopes(log_ratios: Sequence[float], beta: float) -> pd.DataFrame:
    """How strongly a pair pushes its chosen response up, -dL/dh of softplus(-beta h), the rejected log-ratio being 0.

    Columns: variant, log_ratio (nats), slope.
    """
    rows = []
    for variant, step in (("Eq. 1", released.unclamped), ("clamped", released.clamped)):
        ratios = torch.tensor(list(log_ratios), dtype=torch.float64, requires_grad=True)
        nn.functional.softplus(-beta * step(ratios)).sum().backward()
        part = {"variant": variant, "log_ratio": ratios.detach(), "slope": -ratios.grad}
        rows.append(pd.DataFrame(part))
    return pd.concat(rows, ignore_index=True)


class Kernels(NamedTuple):
    """Kernel matrices (B, B) of two outputs, and of both the median distance and the median kernel value of pairs."""

    matrices: dict[str, np.ndarray]
    distances: dict[str, float]
    values: dict[str, float]


@torch.no_grad()
def kernel_pair(policy: nn.Module, reference: nn.Module, chosen: PairTokens, beta: float) -> Kernels:
    """Mean logits under a width of 1, as published, beside implicit rewards under their median distance."""
    ours, logits = released.sequence_logps(policy, chosen, released.response_labels)
    theirs, _ = released.sequence_logps(reference, chosen, released.response_labels)
    rewards = beta * (ours - theirs)[:, None]
    outputs = {
        "mean logits, width 1": (released.mean_logits(logits, rewards), MMD_BANDWIDTH),
        "rewards, median width": (rewards, mmd.median_bandwidth(rewards)),
    }
    matrices = {name: mmd.gaussian_kernel(points, width).numpy() for name, (points, width) in outputs.items()}
    off = ~np.eye(len(rewards), dtype=bool)
    return Kernels(
        matrices,
        {name: torch.pdist(points).median().item() for name, (points, _) in outputs.items()},
        {name: float(np.median(kernel[off])) for name, kernel in matrices.items()},
    )


def reduction_table(outputs: Tensor, memberships: Tensor, bandwidth: float) -> pd.DataFrame:
    """The penalty on the first K environments, K = 2, 3, ...: as published, and by two readings of Eq. 10.

    Columns: environments, mean of MMD² (unordered pairs), ordered sum of MMD², ordered sum of MMD.
    """
    rows = []
    for count in range(2, memberships.shape[1] + 1):
        p = memberships[:, :count] / memberships[:, :count].sum(1, keepdim=True)
        pairs = [p[:, [m, n]] for m in range(count) for n in range(m + 1, count)]
        roots = [mmd.mmd_squared(outputs, pair, bandwidth).clamp_min(0).sqrt().item() for pair in pairs]
        row = {name: mmd.mmd_squared(outputs, p, bandwidth, pairs=name).item() for name in ("mean", "ordered_sum")}
        rows.append(
            {
                "environments": count,
                "mean of MMD²": row["mean"],
                "ordered sum of MMD²": row["ordered_sum"],
                "ordered sum of MMD": 2 * sum(roots),
            }
        )
    return pd.DataFrame(rows)


# --- The published evaluation ---


def article_last(title: str) -> str:
    """A title as some catalogues write it: "The Lantern" is "Lantern, The"."""
    return f"{title[4:]}, The" if title.startswith("The ") else title


def grounded_ranks(titles: Sequence[str], texts: Sequence[str], encode: grounding.Encoder) -> np.ndarray:
    """0-based rank of title i when text i is grounded by the cosine of embeddings; equals share their mean rank.

    A text that is a title is at distance 0 from it, whatever the encoder.
    """
    catalogue, written = encode(list(titles)).double(), encode(list(texts)).double()
    far = grounding.cosine_distance(written, catalogue).round(decimals=9)
    own = far.diagonal()[:, None]
    return ((far < own).sum(1) + ((far == own).sum(1) - 1) / 2).numpy()


def reachable_share(initials: int, titles: int, k: int) -> float:
    """The largest share of titles that can stand in any list of length k when there is one list per initial."""
    return min(1.0, initials * k / titles)


# --- Sentences ---


def gradient_takeaway(table: pd.DataFrame) -> str:
    """What the gradients of ``departure_table`` come to, over batches and policies (column ``policy``), in Markdown."""
    said = []
    for policy, rows in table.groupby("policy", sort=False):
        means = rows.groupby(["departure", "side"], sort=False)[["cosine", "length"]].mean()
        every = means.loc[("all", "released")]
        alone = means.xs(ONLY, level="side")["cosine"]
        repaired = means.xs(REPAIRED, level="side")["cosine"]
        gain = (repaired - every["cosine"]).fillna(-np.inf)
        helps = (
            f"of single repairs *{gain.idxmax()}* helps most (to {repaired[gain.idxmax()]:.2f})"
            if gain.max() > 0.05
            else f"no single repair adds more than {max(gain.max(), 0):.2f}"
        )
        dead = [name for name, value in repaired.items() if np.isnan(value)]
        gone = f"; with *{'*, *'.join(dead)}* repaired alone no gradient is left at all" if dead else ""
        said.append(
            f"*{policy}*: cosine {every['cosine']:.2f} with the paper's gradient and {every['length']:.2g} times "
            f"its length; {helps}{gone}; "
            f"alone, *{alone.idxmin()}* turns the paper's gradient most (to {alone.min():.2f}) and "
            f"{int((alone > 0.99).sum())} of "
            f"{len(alone)} leave it above 0.99"
        )
    return f"**Takeaway.** As released, means of {table['batch'].nunique()} batches. " + ". ".join(said) + "."


def copies_takeaway(table: pd.DataFrame, limit: float, kernel: float) -> str:
    """How far apart the copies of a batch are in ``departure_table``, and which damage does it; a sentence or two.

    Args:
        limit: the most that MMD² can be where no example sees another.
        kernel: mean kernel value of pairs of examples.
    """
    said = []
    for policy, rows in table.groupby("policy", sort=False):
        own = rows[rows["side"] == "released"][["mmd2", "attended", "shifted_ids"]].mean()
        repaired = rows[rows["side"] == REPAIRED].groupby("departure")["mmd2"].mean()
        # Of each damage what it makes when the other is repaired; not below 0, as rounding leaves it.
        ids, attention = (max(repaired[name], 0.0) for name in ("attention by rounding", "averaged ids"))
        causes = [cause for cause, left in (("changed ids", ids), ("lost attention", attention)) if left > 1e-6]
        said.append(
            f"*{policy}* {own['mmd2']:.2f}, by {' and by '.join(causes) or 'neither damage'} ({own['shifted_ids']:.0%} "
            f"of the ids are changed and {own['attended']:.0%} of the tokens attended to; with attention as it came "
            f"MMD² is {ids:.2f}, with ids as they came {attention:.2f})"
        )
    return (
        f"For a kernel that vanishes between different examples, as with Llama's vocabulary, damaged copies can reach "
        f"2 / B = {limit:.2f} at most. In this small vocabulary the kernel's mean over pairs is {kernel:.2f}, and as "
        f"released (means of {table['batch'].nunique()} batches) MMD² is {'; '.join(said)}."
    )


def penalty_takeaway(table: pd.DataFrame) -> str:
    """What is left of the penalty's gradient in ``departure_table``, several batches, in Markdown."""
    sides = table.groupby("side")
    share, cosine = sides["penalty_share"].mean(), sides["penalty_cosine"].mean()["released"]
    alone = table[table["side"] == ONLY].groupby("departure", sort=False)["penalty_cosine"]
    gone = [name for name, values in alone if values.isna().all()]
    turned = alone.mean().dropna()
    turned = turned[turned < 0.5]
    return (
        f"**Takeaway.** At λ = {MMD_WEIGHT:g} the penalty has {share['released']:.2%} of the gradients' norms as "
        f"released and "
        f"{share['paper']:.2%} with every departure undone. Whatever λ: "
        + (f"with *{'*, *'.join(gone)}* alone it has no gradient; " if gone else "")
        + (f"with *{'*, *'.join(turned.index)}* alone it points elsewhere (cosine below 0.5); " if len(turned) else "")
        + (
            f"as released its direction has cosine {cosine:.2f} with the paper's."
            if np.isfinite(cosine)
            else "as released it has no direction to compare."
        )
    )


def reading(table: pd.DataFrame, whole: float, first: float, k: int) -> str:
    """What published numbers can and cannot be read as, if they came from this code; a Markdown list.

    Args:
        table: of ``departure_table``, several batches and policies.
        whole, first: HR@k of perfect predictions, grounded as whole titles and by their first character.
    """
    rows = table[table["side"] == "released"]
    share, cosine, spread = rows["penalty_share"].mean(), rows["cosine"].mean(), rows["feature_spread"].max()
    said = [
        f"**The penalty.** It has {share:.1%} of the gradients' norms at λ = {MMD_WEIGHT:g}, and compares copies of "
        f"one batch. "
        + (
            "A difference between rows of a table cannot be credited to it."
            if share < 0.05
            else "That is not nothing, but what it compares is rounding damage, not environments."
        ),
        f"**Environments.** Features of different histories are at most {spread:.2g} apart. "
        + ("Environments cannot depend on histories." if spread < 1e-4 else "They differ, if little."),
        f"**β.** The loss is that of β = {released.BETA:g} whatever is asked for: made with this code, a curve "
        f"over β does not show an effect of β.",
        f"**The preference loss.** Its gradient has cosine {cosine:.2f} with that of DPO as printed: "
        + ("a run moves partly" if cosine > 0.05 else "a run hardly moves")
        + " the way that the equation says, by a share that depends on how far training has come.",
        f"**Accuracy.** Perfect predictions, grounded by their first character, have HR@{k} of {first:.1%} here "
        f"(whole: {whole:.1%}). "
        f"In the released catalogue ({INITIALS} initials, {CATALOGUE:,} titles) at most "
        f"{reachable_share(INITIALS, CATALOGUE, k):.1%} of titles "
        "could be in any list.",
    ]
    return "\n".join(f"- {sentence}" for sentence in said)


def remedies(names: Sequence[str] = tuple(CARDS)) -> str:
    """The remedies as a Markdown list."""
    return "\n".join(f"- {CARDS[name].title}: {CARDS[name].remedy}" for name in names)
