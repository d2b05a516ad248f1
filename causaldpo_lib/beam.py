"""Beam search on the trie of the titles' tokens, batched over prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from causaldpo_lib.catalogue import Trie
from causaldpo_lib.decoding import MINUS_INFINITY, Reading, child_logps, mixed


def beam_search(
    readings: Sequence[Reading],
    log_prior: Tensor,
    trie: Trie,
    width: int,
    dead: Tensor | None = None,
    normalise_length: bool = False,
    assistance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The ``width`` titles that beam search finds most probable under pi_C for each of B prompts, best first.

    With K readings of the prompts, one per environment, it is the search of their mixture (Eq. 6 of arXiv 2603.22335),
    whose prefixes have probability :math:`\sum_k \hat p(k)\,\pi_C(prefix \mid x, E = k)`: all K keep the same beams.

    All beams of a row lie side by side in one sequence whose mask lets a token see the prompt and its own ancestors, so
    that the cache is only ever appended to: changing beams changes the mask. Finished beams are not computed further;
    they compete on with their own scores.

    Args:
        readings: the prompts, in each environment; they are rewound at the end.
        log_prior: (K,) log-probabilities of the environments, [0] for a policy without.
        trie: on the device of the model.
        width: beams kept, at most as many as titles; 1 or more.
        dead: (B, M) bool, nodes that a row must not enter (``dead_nodes``); probabilities stay those of the whole trie.
        assistance: (B, M), what is added to the log-probability of a step into each node (``assisted_steps``).
        normalise_length: beams compete by log pi_C / tokens, the end-of-sequence token included.

    Returns:
        Catalogue positions and scores in nats, both (B, W), W = min(width, titles); scores are log pi_C, per token if
        ``normalise_length``. Equal scores stand in catalogue order. Where fewer than W titles are not dead, the rest
        have score minus infinity.
    """
    device = log_prior.device
    width = min(width, len(trie.paths))
    root = torch.zeros(len(readings[0].states), dtype=torch.long, device=device)
    starts = [child_logps(each.head, each.states, root, trie, constrained=True) for each in readings]
    # inner[k]: log pi_C of the candidates in environment k; added: what else they compete by.
    inner, nodes = torch.stack([logps for logps, _ in starts]), starts[0][1]
    added = torch.zeros_like(inner[0]) if assistance is None else assistance.gather(1, nodes)
    # lineage[b, p, s]: does the p-th parent of row b see the s-th appended token? source: the parent of each candidate.
    lineage = torch.zeros(len(nodes), 1, 0, dtype=torch.bool, device=device)
    source = torch.zeros_like(nodes)
    while True:
        scores = mixed(inner, log_prior) + added
        if dead is not None:
            scores = scores.masked_fill(dead.gather(1, nodes), MINUS_INFINITY)
        kept = _ranked(scores, nodes, trie, normalise_length).topk(min(width, scores.shape[1]), dim=1).indices
        scores, nodes, source, added = (values.gather(1, kept) for values in (scores, nodes, source, added))
        inner = inner.gather(2, kept.expand(len(inner), -1, -1))
        live = (trie.leaf[nodes] < 0) & (scores > MINUS_INFINITY)
        size = int(live.sum(1).max())
        if not size:
            break
        # Rows with fewer live beams than the others carry finished ones along, whose children count for nothing.
        growing = live.int().argsort(dim=1, descending=True, stable=True)[:, :size]
        parents, source = nodes.gather(1, growing), source.gather(1, growing)
        own = torch.eye(size, dtype=torch.bool, device=device).expand(len(nodes), -1, -1)
        seen = torch.cat([lineage.gather(1, source[..., None].expand(-1, -1, lineage.shape[-1])), own], dim=-1)
        grown = []
        for reading, before in zip(readings, inner.masked_fill(~live, MINUS_INFINITY), strict=True):
            states = reading.extend(parents, seen, trie).flatten(0, 1)
            steps, children = child_logps(reading.head, states, parents.flatten(), trie, constrained=True)
            grown.append((before.gather(1, growing)[..., None] + steps.view(*parents.shape, -1)).flatten(1))
        children = children.view(len(nodes), -1)
        offspring = torch.arange(size, device=device).repeat_interleave(children.shape[1] // size)
        more = added.gather(1, growing).gather(1, offspring.expand(len(nodes), -1))
        if assistance is not None:
            more = more + assistance.gather(1, children)
        inner = torch.cat([inner.masked_fill(live, MINUS_INFINITY), torch.stack(grown)], dim=2)
        added, nodes = torch.cat([added, more], dim=1), torch.cat([nodes, children], dim=1)
        source = torch.cat([torch.full_like(live, size, dtype=torch.long), offspring.expand(len(nodes), -1)], dim=1)
        lineage = torch.cat([seen, torch.zeros_like(seen[:, :1])], dim=1)
    for reading in readings:
        reading.rewind()
    return in_order(trie.leaf[nodes], _ranked(scores, nodes, trie, normalise_length))


def in_order(positions: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Lists (B, W) by descending score, equal scores in catalogue order."""
    order = positions.argsort(dim=1, stable=True)
    order = order.gather(1, scores.gather(1, order).argsort(dim=1, descending=True, stable=True))
    return positions.gather(1, order), scores.gather(1, order)


def dead_nodes(trie: Trie, masked: list[list[int]]) -> Tensor:
    """The nodes (B, M) below which every title is among a row's masked positions; the root's entry is void."""
    alive = torch.bincount(trie.paths.flatten(), minlength=len(trie.leaf))
    dead = torch.zeros(len(masked), len(trie.leaf), dtype=torch.bool, device=trie.leaf.device)
    for row, positions in enumerate(masked):
        nodes = trie.paths[sorted(set(positions))].flatten()
        dead[row] = torch.bincount(nodes, minlength=len(trie.leaf)) == alive
    return dead


def assisted_steps(logps: Tensor, trie: Trie) -> Tensor:
    r"""log s of D3 (arXiv 2406.14900) for a step into each node, (B, M), from another recommender's log p, (B, N).

    .. math:: s(t \mid prefix) = \frac{\sum_{i \in I(prefix + t)} p_i}{\sum_{i \in I(prefix)} p_i}

    with I the titles that start so. Along a title the steps' logs add up to log p of that title.
    """
    shares = logps.double().exp()
    masses = torch.zeros(len(logps), len(trie.leaf), dtype=torch.float64, device=logps.device)
    for nodes in trie.paths.T:
        masses.index_add_(1, nodes, shares)
    masses[:, 0] = shares.sum(1)  # the paths' padding fell on the root
    before = torch.cat([torch.zeros_like(trie.paths[:, :1]), trie.paths[:, :-1]], dim=1)
    parents = torch.zeros_like(trie.leaf)
    parents[trie.paths[trie.paths > 0]] = before[trie.paths > 0]
    logs = masses.clamp_min(1e-20).log()  # D3's own floor
    return (logs - logs[:, parents]).float()


def _ranked(scores: Tensor, nodes: Tensor, trie: Trie, normalise_length: bool) -> Tensor:
    """What beams compete by."""
    return scores / trie.depth[nodes] if normalise_length else scores
