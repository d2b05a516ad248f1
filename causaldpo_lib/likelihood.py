"""The exact log-probability of every title of a catalogue: the trie evaluated whole, once per prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from causaldpo_lib.catalogue import Trie
from causaldpo_lib.decoding import Reading, child_logps


@dataclass(frozen=True)
class Piece:
    """Up to C inner nodes of a trie in depth-first order, and before them the A ancestors that they need.

    ``nodes`` (A + C,); ``visible`` (A + C, A + C) bool, ancestors and self; ``first`` = A, the place of the first node
    whose children no earlier piece has scored.
    """

    nodes: Tensor
    visible: Tensor
    first: int


def pieces(trie: Trie, size: int) -> list[Piece]:
    """The inner nodes of a trie but the root, ``size`` at a time: each once, but for the ancestors of a cut."""
    rows = torch.from_numpy(np.lexsort(trie.paths.cpu().numpy().T[::-1]).copy())
    ordered = trie.paths.cpu()[rows]
    # A node's first title in this order, row by row, is depth-first order.
    seen, index = np.unique(ordered.numpy(), return_index=True)
    seen, index = torch.from_numpy(seen), torch.from_numpy(index)
    inner = (seen > 0) & (trie.leaf.cpu()[seen] < 0)
    index = index[inner].sort().values
    found = []
    for start in range(0, len(index), size):
        row, step = index[start : start + size] // ordered.shape[1], index[start : start + size] % ordered.shape[1]
        above = ordered[row[0], : step[0]]
        nodes = torch.cat([above, ordered[row, step]])
        # lines[i]: the path from the root to node i.
        lines = torch.cat([ordered[row[:1]].expand(len(above), -1), ordered[row]])
        depth = torch.cat([torch.arange(len(above)), step])
        visible = (lines[:, depth] == nodes) & (depth <= depth[:, None])
        found.append(Piece(nodes.to(trie.leaf.device), visible.to(trie.leaf.device), len(above)))
    return found


def catalogue_logps(reading: Reading, trie: Trie, parts: Sequence[Piece], constrained: bool = False) -> Tensor:
    """log pi(y|x) of every title y for each of B prompts, in nats, end-of-sequence token included: (B, N) float32.

    Every prompt, and every prefix that titles share, is computed once. ``constrained`` gives log pi_C instead, the
    distribution that beam search ranks by. Memory grows with B times the size of a piece, not with the trie, but for
    one number per node. The reading is rewound.
    """
    rows = len(reading.states)
    edges = torch.zeros(rows, len(trie.leaf), device=reading.states.device)
    root = torch.zeros(rows, dtype=torch.long, device=edges.device)
    _put(edges, *child_logps(reading.head, reading.states, root, trie, constrained))
    for part in parts:
        states = reading.extend(part.nodes.expand(rows, -1), part.visible[None], trie)[:, part.first :]
        reading.rewind()
        nodes = part.nodes[part.first :].repeat(rows)
        _put(edges, *child_logps(reading.head, states.flatten(0, 1), nodes, trie, constrained))
    edges[:, 0] = 0.0
    total = torch.zeros(rows, len(trie.paths), device=edges.device)
    for nodes in trie.paths.T:
        total += edges[:, nodes]
    return total


def _put(edges: Tensor, logps: Tensor, children: Tensor) -> None:
    """Write log-probabilities (B * Q, C) into the columns of their children; what is no child falls on the root."""
    edges.scatter_(1, children.view(len(edges), -1), logps.view(len(edges), -1))
