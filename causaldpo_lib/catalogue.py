"""The items that can be recommended: their titles, and the prefix tree of the titles' tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from causaldpo_lib.errors import StudyError
from causaldpo_lib.prompts import encode_responses, response_text

CATALOGUE_FILE = "catalogue.csv"


@dataclass(frozen=True)
class Trie:
    """N token sequences of at most T tokens as a prefix tree of M nodes in flat tensors.

    Node 0 is the root. Nodes are numbered level by level and within a level in the lexicographic order of their
    prefixes, so the children of a node are consecutive: ``start[n]`` to ``start[n + 1] - 1``. Every sequence ends in
    the end-of-sequence token and nowhere else contains it, so exactly the leaves carry titles.

    Shapes: ``start`` (M + 1,); ``tokens`` (M,), the token that leads to a node (0 for the root); ``depth`` (M,), tokens
    from the root; ``leaf`` (M,), the position of the title that ends in a node, or -1; ``paths`` (N, T), the nodes of a
    title in order, filled up with 0.
    """

    start: Tensor
    tokens: Tensor
    depth: Tensor
    leaf: Tensor
    paths: Tensor

    def to(self, device: torch.device | str) -> Trie:
        return Trie(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def children(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """The E children of ``nodes`` (Q,) in order: their parents' places in ``nodes``, and themselves, both (E,)."""
        count = self.start[nodes + 1] - self.start[nodes]
        owner = torch.repeat_interleave(torch.arange(len(nodes), device=nodes.device), count)
        before = torch.cumsum(count, 0) - count
        return owner, self.start[nodes][owner] + torch.arange(len(owner), device=nodes.device) - before[owner]


def build_trie(titles: Sequence[Sequence[int]]) -> Trie:
    """The trie of token sequences that each end in the same end-of-sequence token.

    Raises:
        StudyError: no title is given, or two titles have the same tokens.
    """
    if not titles:
        raise StudyError("the catalogue is empty: there is nothing to rank")
    lengths = np.array([len(ids) for ids in titles])
    padded = np.full((len(titles), lengths.max()), -1)
    for row, ids in enumerate(titles):
        padded[row, : len(ids)] = ids
    order = np.lexsort(padded.T[::-1])
    ranked = padded[order]
    # In lexicographic order a prefix is a node of its own where it differs from the prefix one row above.
    differs = np.ones(ranked.shape, dtype=bool)
    differs[1:] = np.logical_or.accumulate(ranked[1:] != ranked[:-1], axis=1)
    new = differs & (ranked >= 0)
    last = lengths[order] - 1
    twins = np.flatnonzero(~new[np.arange(len(titles)), last])
    if len(twins):
        first, second = sorted(order[twins[0] - 1 : twins[0] + 1].tolist())
        raise StudyError(f"catalogue rows {first} and {second} have the same tokens: merge items that share a title")
    nodes = np.cumsum(new.T).reshape(new.T.shape).T
    parents = np.concatenate([np.zeros((len(titles), 1), dtype=nodes.dtype), nodes[:, :-1]], axis=1)
    count = int(nodes.max()) + 1
    paths = np.empty_like(nodes)
    paths[order] = np.where(ranked >= 0, nodes, 0)
    leaf = np.full(count, -1)
    leaf[nodes[np.arange(len(titles)), last]] = order
    return Trie(
        start=torch.from_numpy(np.searchsorted(parents.T[new.T], np.arange(count + 1)) + 1),
        tokens=torch.from_numpy(np.concatenate([[0], ranked.T[new.T]])),
        depth=torch.from_numpy(np.concatenate([[0], np.nonzero(new.T)[0] + 1])),
        leaf=torch.from_numpy(leaf),
        paths=torch.from_numpy(paths),
    )


@dataclass
class Catalogue:
    """Items, their titles, and the trie of the titles' responses for one tokenizer."""

    items: np.ndarray
    titles: list[str]
    responses: list[list[int]]
    trie: Trie

    @classmethod
    def build(cls, items: pd.DataFrame, tokenizer: PreTrainedTokenizerBase) -> Catalogue:
        """From a table with columns ``item`` and ``title``.

        Raises:
            StudyError: the table is empty, two items share a title, or the tokenizer cannot express a title.
        """
        titles = items["title"].tolist()
        responses = encode_responses(tokenizer, [response_text(title) for title in titles])
        unusable = {tokenizer.unk_token_id, tokenizer.eos_token_id}
        for title, ids in zip(titles, responses, strict=True):
            if len(ids) < 2 or unusable.intersection(ids[:-1]):
                raise StudyError(
                    f"the tokenizer cannot express the title {title!r}: leave the item out or take another backbone"
                )
        return cls(items["item"].to_numpy(), titles, responses, build_trie(responses))

    def positions(self, items: Sequence[object], kind: str) -> np.ndarray:
        """Where ``items`` (N ids) stand in the catalogue, (N,); ``kind`` names them in the error.

        Raises:
            StudyError: an item is not in the catalogue.
        """
        for item in items:
            if item not in self._places:
                raise StudyError(
                    f"the {kind} item {item!r} is not in the catalogue of {len(self.items)} items: rank only examples "
                    "whose items it holds"
                )
        return np.array([self._places[item] for item in items], dtype=np.int64)

    @cached_property
    def _places(self) -> dict[object, int]:
        return {item: position for position, item in enumerate(self.items.tolist())}


def read_catalogue(folder: str | Path) -> pd.DataFrame:
    """The table (``item``, ``title``) of a checkpoint folder; ids are numbers only if all of them are written as such.

    Raises:
        StudyError: the folder has no catalogue, or one without these columns.
    """
    file = Path(folder) / CATALOGUE_FILE
    if not file.exists():
        raise StudyError(f"{file} does not exist: give a checkpoint folder written by the study's training notebooks")
    # Titles such as 1984 or NA, and ids such as 0195153448, are texts.
    try:
        items = pd.read_csv(file, dtype=str, keep_default_na=False)[["item", "title"]]
    except (KeyError, ValueError) as error:  # pandas' own errors of empty and ragged files are ValueErrors
        raise StudyError(f"{file} is no table of item and title: write the checkpoint again ({error})") from error
    numbers = pd.to_numeric(items["item"], errors="coerce")
    if numbers.notna().all() and (numbers.astype("int64").astype(str) == items["item"]).all():
        items["item"] = numbers.astype("int64")
    return items


def titles_of(history: Sequence[object], items: pd.DataFrame) -> list[str]:
    """The titles of a history of ids or titles, in order; what is both an id and a title is taken as the id.

    Raises:
        StudyError: the history is one text, or an entry is unknown (near titles are suggested).
    """
    if isinstance(history, str):
        raise StudyError(f"the history {history!r} is one text: give a list of titles or item ids")
    by_id = dict(zip(items["item"], items["title"], strict=True))
    known = set(items["title"])
    return [by_id[entry] if entry in by_id else _known_title(entry, known) for entry in history]


def _known_title(entry: object, known: set[str]) -> str:
    if entry in known:
        return str(entry)
    # Best matches first; sorted, so that equally near titles are suggested in one order.
    near = get_close_matches(str(entry), sorted(known), n=3, cutoff=0.5)
    advice = f"the nearest titles are {near}" if near else "no title is near it"
    raise StudyError(f"{entry!r} is neither an item id nor a title of the catalogue: {advice}")
