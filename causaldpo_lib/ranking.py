"""Ranking the catalogue: beam search on the trie of the titles' tokens.

The constrained policy of a causal language model renormalises each token over the trie's continuations,
pi_C(y|x) = prod_t pi(y_t | x, y_<t) / sum over allowed t' of pi(t' | x, y_<t): a distribution over the catalogue. Lists
are ranked by log pi_C without length normalisation, and ``target_logps`` gives log pi_C of given titles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedTokenizerBase

from causaldpo_lib.backbone import load_checkpoint
from causaldpo_lib.errors import StudyError
from causaldpo_lib.packing import batches_by_length, decoder_and_head, pack, response_logits, sum_over_responses
from causaldpo_lib.prompts import encode_prompts, encode_responses, prompt_text, response_text

CATALOGUE_FILE = "catalogue.csv"
MINUS_INFINITY = float("-inf")


@dataclass
class Trie:
    """The titles' token sequences as a prefix tree in flat arrays.

    The children of node n are ``tokens[start[n] : start[n + 1]]`` and lead to nodes ``nodes[...]``; node 0 is the root;
    ``leaf[n]`` is the position in the catalogue of the title that ends in n, or -1. Every title ends in the
    end-of-sequence token, so exactly the leaves carry titles.
    """

    start: Tensor
    tokens: Tensor
    nodes: Tensor
    leaf: Tensor

    def to(self, device: torch.device | str) -> Trie:
        return Trie(**{name: tensor.to(device) for name, tensor in vars(self).items()})

    def children(self, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, nodes and existence mask (..., C) of the children of ``nodes`` (...)."""
        first, count = self.start[nodes], self.start[nodes + 1] - self.start[nodes]
        offset = torch.arange(int(count.max()), device=nodes.device)
        exists = offset < count[..., None]
        index = (first[..., None] + offset).clamp_max(len(self.tokens) - 1)
        return self.tokens[index], self.nodes[index], exists


def build_trie(titles: Sequence[Sequence[int]]) -> Trie:
    """The trie of token sequences that each end in the same end-of-sequence token.

    Raises:
        StudyError: no title is given, or two titles have the same tokens.
    """
    if not titles:
        raise StudyError("the catalogue is empty: there is nothing to rank")
    children: list[dict[int, int]] = [{}]
    leaf = [-1]
    for position, ids in enumerate(titles):
        node = 0
        for token in ids:
            if token not in children[node]:
                children[node][token] = len(children)
                children.append({})
                leaf.append(-1)
            node = children[node][token]
        if leaf[node] >= 0:
            raise StudyError(
                f"catalogue rows {leaf[node]} and {position} have the same tokens: merge items that share a title"
            )
        leaf[node] = position
    counts = [len(entry) for entry in children]
    return Trie(
        start=torch.tensor([0, *np.cumsum(counts).tolist()]),
        tokens=torch.tensor([token for entry in children for token in entry]),
        nodes=torch.tensor([node for entry in children for node in entry.values()]),
        leaf=torch.tensor(leaf),
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
            StudyError: the table is empty, or the tokenizer cannot express a title.
        """
        titles = items["title"].tolist()
        responses = encode_responses(tokenizer, [response_text(title) for title in titles])
        for title, ids in zip(titles, responses, strict=True):
            if len(ids) < 2 or tokenizer.unk_token_id in ids:
                raise StudyError(f"the tokenizer cannot express the title {title!r}")
        return cls(items["item"].to_numpy(), titles, responses, build_trie(responses))


def constrained_logps(logits: Tensor, nodes: Tensor, trie: Trie) -> tuple[Tensor, Tensor, Tensor]:
    """log pi_C of the continuations of ``nodes`` (...) from ``logits`` (..., V): values, child nodes, tokens (..., C).

    Continuations that do not exist have log-probability minus infinity.
    """
    tokens, nodes, exists = trie.children(nodes)
    allowed = logits.gather(-1, tokens).masked_fill(~exists, MINUS_INFINITY)
    return torch.log_softmax(allowed, dim=-1), nodes, tokens


@torch.inference_mode()
def beam_search(
    model: nn.Module, prompts: Sequence[Sequence[int]], trie: Trie, width: int, pad_id: int
) -> tuple[Tensor, Tensor]:
    """The ``width`` titles that beam search finds most probable under pi_C for each of B prompts, best first.

    The prompt is computed once per row. All beams of a row lie side by side in one sequence whose mask lets a token see
    the prompt and its own ancestors, so that the cache is only ever appended to: changing beams changes the mask.

    Returns:
        Catalogue positions (B, W) and their log-probabilities in nats, W = min(width, number of titles). With equal
        scores the order of the trie decides, so results are deterministic.

    Raises:
        StudyError: the model's scores are not numbers.
    """
    decoder, head = decoder_and_head(model)
    parameter = next(decoder.parameters())
    device, dtype = parameter.device, parameter.dtype
    trie = trie.to(device)
    width = min(width, int((trie.leaf >= 0).sum()))
    batch = pack(prompts, [[[pad_id]]] * len(prompts), pad_id).to(device)
    lengths = batch.prompt_end + 1
    size = int(lengths.max())
    prompt_mask = torch.arange(size, device=device) < lengths[:, None]
    cache = DynamicCache(config=decoder.config)
    out = decoder(
        input_ids=torch.where(prompt_mask, batch.input_ids[:, :size], pad_id),
        attention_mask=prompt_mask.long(),
        past_key_values=cache,
        use_cache=True,
    )
    rows = torch.arange(len(prompts), device=device)
    logits = head(out.last_hidden_state[rows, batch.prompt_end]).float()
    if not torch.isfinite(logits).all():
        raise StudyError("the model gives scores that are not numbers: its weights are damaged or training diverged")

    logps, nodes, tokens = constrained_logps(logits, torch.zeros_like(rows), trie)
    scores, picked = logps.topk(min(width, logps.shape[-1]), dim=-1)
    nodes, tokens = nodes.gather(-1, picked), tokens.gather(-1, picked)
    # visible[b, w, s]: does beam w of row b descend from the token in cache slot s?
    visible = torch.zeros(len(prompts), scores.shape[1], 0, dtype=torch.bool, device=device)
    depth = 0
    while not (trie.leaf[nodes] >= 0).all():
        beams = scores.shape[1]
        own = torch.eye(beams, dtype=torch.bool, device=device).expand(len(prompts), -1, -1)
        visible = torch.cat([visible, own], dim=-1)
        seen = torch.cat([prompt_mask[:, None].expand(-1, beams, -1), visible], dim=-1)
        mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)
        out = decoder(
            input_ids=tokens,
            attention_mask=mask[:, None],
            position_ids=(lengths[:, None] + depth).expand(-1, beams),
            past_key_values=cache,
            use_cache=True,
        )
        step, child_nodes, child_tokens = constrained_logps(head(out.last_hidden_state).float(), nodes, trie)
        finished = trie.leaf[nodes] >= 0
        # A finished beam competes on with its own score, as its single continuation.
        step = torch.where(finished[..., None], MINUS_INFINITY, step)
        step[..., 0] = torch.where(finished, 0.0, step[..., 0])
        child_nodes[..., 0] = torch.where(finished, nodes, child_nodes[..., 0])
        total = (scores[..., None] + step).flatten(1)
        keep = min(width, total.shape[1])
        scores, picked = total.topk(keep, dim=-1)
        parents = picked // step.shape[-1]
        nodes, tokens = child_nodes.flatten(1).gather(1, picked), child_tokens.flatten(1).gather(1, picked)
        visible = visible.gather(1, parents[..., None].expand(-1, -1, visible.shape[-1]))
        depth += 1
    return trie.leaf[nodes], scores


@torch.no_grad()
def target_logps(
    model: nn.Module, prompts: Sequence[Sequence[int]], targets: Sequence[int], catalogue: Catalogue, pad_id: int
) -> Tensor:
    """log pi_C(target | prompt) in nats, (B,): the targets' exact log-probabilities against the whole catalogue.

    ``targets`` are positions in the catalogue.
    """
    device = next(model.parameters()).device
    batch = pack(prompts, [[catalogue.responses[target]] for target in targets], pad_id).to(device)
    logits, _ = response_logits(model, batch)
    trie = catalogue.trie.to(device)
    # Walk all targets down the trie together: the node before each of their tokens.
    longest = batch.targets.shape[-1]
    node = torch.zeros(len(prompts), dtype=torch.long, device=device)
    nodes = torch.zeros(len(prompts), 1, longest, dtype=torch.long, device=device)
    for depth in range(longest):
        nodes[:, 0, depth] = node
        tokens, children, exists = trie.children(node)
        match = (tokens == batch.targets[:, 0, depth, None]) & exists
        node = torch.where(match.any(-1), children.gather(-1, match.long().argmax(-1, keepdim=True))[:, 0], node)
    tokens, _, exists = trie.children(nodes[batch.target_mask])
    allowed = logits.gather(-1, tokens).masked_fill(~exists, MINUS_INFINITY)
    own = logits.gather(-1, batch.targets[batch.target_mask][:, None])[:, 0]
    return sum_over_responses(own - torch.logsumexp(allowed, dim=-1), batch)[:, 0]


@dataclass
class Ranking:
    """Lists for N examples, and where their targets are.

    ``items`` (N, K) best first with ``scores`` (N, K) in nats; ``rank`` (N,), 0-based, the number of items in the
    catalogue for a target not in the list;
    ``target_logp`` (N,), the log-probability of the target against the whole catalogue, in nats.
    """

    items: np.ndarray
    scores: np.ndarray
    rank: np.ndarray
    target_logp: np.ndarray


def rank_beam(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    catalogue: Catalogue,
    prompts: Sequence[str],
    targets: Sequence[object],
    k: int,
    batch_size: int,
) -> Ranking:
    """Top ``k`` of the catalogue by beam search of width ``k``, and the targets' ranks and log-probabilities.

    Raises:
        StudyError: a target is not in the catalogue.
    """
    position = {item: index for index, item in enumerate(catalogue.items.tolist())}
    for target in targets:
        if target not in position:
            raise StudyError(f"the target item {target!r} is not in the catalogue of {len(position)} items")
    encoded = encode_prompts(tokenizer, prompts, _room(model, catalogue))
    positions = np.array([position[target] for target in targets])
    k = min(k, len(catalogue.items))
    found = np.empty((len(prompts), k), dtype=np.int64)
    scores = np.empty((len(prompts), k), dtype=np.float32)
    target_logp = np.empty(len(prompts), dtype=np.float32)
    model.eval()
    for chunk in batches_by_length(encoded, batch_size):
        rows = [encoded[index] for index in chunk]
        beams, values = beam_search(model, rows, catalogue.trie, k, tokenizer.pad_token_id)
        found[chunk], scores[chunk] = beams.cpu().numpy(), values.float().cpu().numpy()
        logps = target_logps(model, rows, positions[chunk].tolist(), catalogue, tokenizer.pad_token_id)
        target_logp[chunk] = logps.float().cpu().numpy()
    hits = found == positions[:, None]
    rank = np.where(hits.any(1), hits.argmax(1), len(catalogue.items))
    return Ranking(catalogue.items[found], scores, rank, target_logp)


RANKERS: dict[str, Callable[..., Ranking]] = {"beam": rank_beam}


def recommend(checkpoint: str | Path, history: Sequence[object], k: int = 10) -> tuple[list[object], list[float]]:
    """The next items for a person with this history, from a checkpoint that the study has trained.

    Args:
        checkpoint: a folder in Hugging Face format with the study's ``catalogue.csv`` (columns ``item``, ``title``).
        history: titles or item ids, oldest first.
        k: how many items.

    Returns:
        Item ids and their log-probabilities in nats, best first.

    Raises:
        StudyError: the folder has no catalogue, or a title or id is unknown (near titles are suggested).
    """
    file = Path(checkpoint) / CATALOGUE_FILE
    if not file.exists():
        raise StudyError(f"{file} does not exist: give a checkpoint folder written by the study's training notebooks")
    items = pd.read_csv(file)
    model, tokenizer = load_checkpoint(checkpoint)
    titles = [_title_of(entry, dict(zip(items["item"], items["title"], strict=True))) for entry in history]
    catalogue = Catalogue.build(items, tokenizer)
    prompts = encode_prompts(tokenizer, [prompt_text(titles)], _room(model, catalogue))
    # A narrow beam may lose the best title on the way: short lists are cut from a list of ordinary width.
    found, scores = beam_search(model.eval(), prompts, catalogue.trie, max(k, 20), tokenizer.pad_token_id)
    return catalogue.items[found[0, :k].cpu().numpy()].tolist(), scores[0, :k].tolist()


def _room(model: nn.Module, catalogue: Catalogue) -> int:
    """Tokens that the model's context leaves for a prompt beside the longest title."""
    return model.config.max_position_embeddings - max(len(ids) for ids in catalogue.responses)


def _title_of(entry: object, titles: Mapping[object, str]) -> str:
    if entry in titles:
        return titles[entry]
    if entry in titles.values():
        return str(entry)
    near = get_close_matches(str(entry), [str(title) for title in titles.values()], n=3, cutoff=0.5)
    raise StudyError(f"{entry!r} is neither an item id nor a title of the catalogue: the nearest titles are {near}")
