"""Beam search on the trie of the titles' tokens, batched over prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from causaldpo_lib.catalogue import Trie
from causaldpo_lib.decoding import MINUS_INFINITY, Reading, child_logps


def beam_search(
    reading: Reading,
    trie: Trie,
    width: int,
    dead: Tensor | None = None,
    normalise_length: bool = False,
    assistance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``width`` titles that beam search finds most probable under pi_C for each of B prompts, best first.

    All beams of a row lie side by side in one sequence whose mask lets a token see the prompt and its own ancestors, so
    that the cache is only ever appended to: changing beams changes the mask. Finished beams are not computed further;
    they compete on with their own scores.

    Args:
        reading: the prompts; it is rewound at the end.
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
    device = reading.states.device
    width = min(width, len(trie.paths))
    root = torch.zeros(len(reading.states), dtype=torch.long, device=device)
    scores, nodes = child_logps(reading.head, reading.states, root, trie, constrained=True)
    if assistance is not None:
        scores = scores + assistance.gather(1, nodes)
    # lineage[b, p, s]: does the p-th parent of row b see the s-th appended token? source: the parent of each candidate.
    lineage = torch.zeros(len(nodes), 1, 0, dtype=torch.bool, device=device)
    source = torch.zeros_like(nodes)
    while True:
        if dead is not None:
            scores = scores.masked_fill(dead.gather(1, nodes), MINUS_INFINITY)
        kept = _ranked(scores, nodes, trie, normalise_length).topk(min(width, scores.shape[1]), dim=1).indices
        scores, nodes, source = scores.gather(1, kept), nodes.gather(1, kept), source.gather(1, kept)
        live = (trie.leaf[nodes] < 0) & (scores > MINUS_INFINITY)
        size = int(live.sum(1).max())
        if not size:
            break
        # Rows with fewer live beams than the others carry finished ones along, whose children count for nothing.
        growing = live.int().argsort(dim=1, descending=True, stable=True)[:, :size]
        parents, source = nodes.gather(1, growing), source.gather(1, growing)
        own = torch.eye(size, dtype=torch.bool, device=device).expand(len(nodes), -1, -1)
        seen = torch.cat([lineage.gather(1, source[..., None].expand(-1, -1, lineage.shape[-1])), own], dim=-1)
        states = reading.extend(parents, seen, trie)
        steps, children = child_logps(reading.head, states.flatten(0, 1), parents.flatten(), trie, constrained=True)
        before = scores.gather(1, growing).masked_fill(~live.gather(1, growing), MINUS_INFINITY)
        grown = before[..., None] + steps.view(*parents.shape, -1)
        if assistance is not None:
            grown = grown + assistance.gather(1, children.view(len(parents), -1)).view_as(grown)
        scores = torch.cat([scores.masked_fill(live, MINUS_INFINITY), grown.flatten(1)], dim=1)
        nodes = torch.cat([nodes, children.view(len(nodes), -1)], dim=1)
        offspring = torch.arange(size, device=device).repeat_interleave(grown.shape[-1])
        source = torch.cat([torch.full_like(live, size, dtype=torch.long), offspring.expand(len(nodes), -1)], dim=1)
        lineage = torch.cat([seen, torch.zeros_like(seen[:, :1])], dim=1)
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
