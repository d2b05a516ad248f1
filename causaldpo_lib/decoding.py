"""Prompts computed once, and the log-probabilities of what may follow them in the catalogue's trie.

Nodes of the trie are appended to the cached prompts as tokens of one sequence per row; a mask lets each see the prompt
and its own ancestors. Their states give the log-probabilities of their children, either of the model itself,
log pi(t | x, y_<t), or of the constrained policy, renormalised over the trie's continuations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from causaldpo_lib.catalogue import Trie, build_trie
from causaldpo_lib.errors import StudyError
from causaldpo_lib.packing import decoder_and_head

MINUS_INFINITY = float("-inf")
# Numbers in one block of logits or gathered weights: 8 MB in float32, whatever the vocabulary.
BLOCK = 2**21


@dataclass
class Reading:
    """B prompts of at most P tokens that a model has read.

    ``mask`` (B, 1, P) is additive and hides the padding; ``lengths`` (B,) in tokens; ``states`` (B, d) are the
    last-layer states of the last prompt tokens, which predict the root's children.
    """

    decoder: nn.Module
    head: nn.Module
    cache: DynamicCache
    mask: Tensor
    lengths: Tensor
    states: Tensor

    def extend(self, nodes: Tensor, visible: Tensor, trie: Trie) -> Tensor:
        """Append Q trie nodes to every row; their last-layer states (B, Q, d).

        ``nodes`` (B, Q); ``visible`` (B or 1, Q, S) bool over all S nodes appended so far, these Q last: what a node
        sees beside the prompt (its ancestors and itself).

        Raises:
            StudyError: the states are not numbers.
        """
        hidden = torch.zeros(visible.shape, dtype=self.mask.dtype, device=nodes.device)
        hidden = hidden.masked_fill_(~visible, torch.finfo(self.mask.dtype).min)
        rows, count = nodes.shape
        mask = torch.cat([self.mask.expand(-1, count, -1), hidden.expand(rows, -1, -1)], dim=-1)
        states = self.decoder(
            input_ids=trie.tokens[nodes],
            attention_mask=mask[:, None],
            position_ids=self.lengths[:, None] + trie.depth[nodes] - 1,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        check_finite(states)
        return states

    def rewind(self) -> None:
        """Forget all appended nodes."""
        self.cache.crop(self.mask.shape[-1] - self.cache.get_seq_length())


def read_prompts(model: nn.Module, prompts: Sequence[Sequence[int]], pad_id: int) -> Reading:
    """Compute B prompts once.

    Raises:
        StudyError: the model's scores are not numbers.
    """
    decoder, head = decoder_and_head(model)
    parameter = next(decoder.parameters())
    lengths = torch.tensor([len(ids) for ids in prompts], device=parameter.device)
    ids = torch.full((len(prompts), int(lengths.max())), pad_id)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    seen = torch.arange(ids.shape[1], device=parameter.device) < lengths[:, None]
    # Every layer keeps the whole prompt: the mask alone says what is seen, and rewinding stays exact.
    cache = DynamicCache()
    states = decoder(
        input_ids=ids.to(parameter.device), attention_mask=seen.long(), past_key_values=cache, use_cache=True
    ).last_hidden_state
    states = states[torch.arange(len(prompts), device=parameter.device), lengths - 1]
    check_finite(head(states))
    mask = torch.zeros(seen.shape, dtype=parameter.dtype, device=parameter.device)
    mask = mask.masked_fill_(~seen, torch.finfo(parameter.dtype).min)
    return Reading(decoder, head, cache, mask[:, None], lengths, states)


def check_finite(scores: Tensor) -> None:
    """Refuse scores of which some are not numbers, or infinite.

    Raises:
        StudyError: some are.
    """
    if not torch.isfinite(scores).all():
        raise StudyError("the model gives scores that are not numbers: its weights are damaged or training diverged")


def check_exact(model: nn.Module, prompt: Sequence[int], response: Sequence[int], pad_id: int) -> None:
    """Refuse a model that does not take masks and positions as they are used here, such as one with ALiBi, or whose
    output layer does not give its logits, such as Cohere's and Granite's, which scale them.

    Scores ``response`` beside another one behind a padded part of ``prompt``, and again in a forward pass of its own.

    Raises:
        StudyError: the two differ by more than rounding.
    """
    part = prompt[len(prompt) // 2 :]
    reading = read_prompts(model, [prompt, part], pad_id)
    device = reading.lengths.device
    trie = build_trie([[pad_id, *response], response]).to(device)
    ids = torch.tensor([[*part, *response]], device=device)
    logps = torch.log_softmax(model(input_ids=ids).logits[0, len(part) - 1 : -1].float(), dim=-1)
    expected = float(logps.gather(1, ids[0, len(part) :, None]).sum())
    try:
        found = float(title_logps(reading, torch.tensor([[0, 1]] * 2, device=device), trie, constrained=False)[1, 1])
        problem = f"a title has log-probability {found:.3f} instead of {expected:.3f}"
    except StudyError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        found, problem = float("inf"), str(error)
    if abs(found - expected) > abs(expected) * (1e-3 if reading.mask.dtype == torch.float32 else 0.1):
        raise StudyError(
            f"{type(model).__name__} does not take the masks by which titles share a prompt, or rescales its logits "
            f"({problem}): choose a backbone with rotary or learned positions and plain logits"
        )


def child_logps(head: nn.Module, states: Tensor, nodes: Tensor, trie: Trie, constrained: bool) -> tuple[Tensor, Tensor]:
    """Log-probabilities in nats of the children of ``nodes`` (Q,) after ``states`` (Q, d), and the children, (Q, C).

    ``constrained`` renormalises over the children of each node; otherwise the whole vocabulary competes. C is the
    largest number of children; where a node has fewer, the value is minus infinity and the child 0.
    """
    owner, child = trie.children(nodes)
    offset = child - trie.start[nodes][owner]
    # Continuations are few beside the vocabulary: one product of a state and a row of the head for each. Where they
    # are many (near the root), or all words compete, the whole vocabulary is quicker.
    sparse = constrained and isinstance(head, nn.Linear) and 16 * len(child) < len(nodes) * head.out_features
    width = states.shape[-1] if sparse else head.weight.shape[0]
    values = []
    for rows, first in _blocks(states, width * (1 + len(child) // len(nodes) if sparse else 1)):
        begin, end = torch.searchsorted(owner, torch.tensor([first, first + len(rows)], device=owner.device)).tolist()
        own, token = owner[begin:end] - first, trie.tokens[child[begin:end]]
        if sparse:
            bias = 0.0 if head.bias is None else head.bias[token]
            values.append(((rows[own] * head.weight[token]).sum(-1) + bias).float())
        else:
            logits = head(rows).float()
            values.append((logits if constrained else torch.log_softmax(logits, dim=-1))[own, token])
    shape = (len(nodes), int(offset.max()) + 1 if len(offset) else 1)
    logps = torch.full(shape, MINUS_INFINITY, device=states.device)
    children = torch.zeros(shape, dtype=torch.long, device=states.device)
    logps[owner, offset] = torch.cat(values)
    children[owner, offset] = child
    if constrained:
        # A leaf has no children, and the softmax of nothing is not a number.
        return torch.log_softmax(logps, dim=-1).masked_fill(children == 0, MINUS_INFINITY), children
    return logps, children


def title_logps(reading: Reading, titles: Tensor, trie: Trie, constrained: bool) -> Tensor:
    """log pi(y|x), or log pi_C(y|x) if ``constrained``, of R catalogue positions per prompt, in nats: (B, R).

    One pass over the titles' tokens side by side; the reading is rewound.
    """
    paths = trie.paths[titles]
    paths = paths[..., : int((paths > 0).sum(-1).max())]
    logps, _ = child_logps(reading.head, reading.states, torch.zeros_like(titles[:, 0]), trie, constrained)
    total = logps.gather(1, paths[..., 0] - 1)
    parents, inner = paths[..., :-1], paths[..., 1:] > 0
    size = parents.shape[-1]
    if not size:
        return total
    own = torch.arange(titles.shape[1], device=titles.device).repeat_interleave(size)
    step = torch.arange(size, device=titles.device).repeat(titles.shape[1])
    visible = (own[:, None] == own) & (step[:, None] >= step)
    states = reading.extend(parents.flatten(1), visible[None], trie).view(*parents.shape, -1)
    reading.rewind()
    logps, _ = child_logps(reading.head, states[inner], parents[inner], trie, constrained)
    taken = paths[..., 1:][inner] - trie.start[parents[inner]]
    steps = torch.zeros(inner.shape, device=titles.device)
    steps[inner] = logps.gather(1, taken[:, None])[:, 0]
    return total + steps.sum(-1)


def mixed(logps: Tensor, log_prior: Tensor) -> Tensor:
    """log sum_k prior_k p_k of log-probabilities (K, B, N) given per environment: (B, N)."""
    if len(logps) == 1:
        return logps[0]
    return torch.logsumexp(logps + log_prior[:, None, None], dim=0)


def _blocks(rows: Tensor, width: int) -> Iterator[tuple[Tensor, int]]:
    """The rows cut so that no part times ``width`` exceeds ``BLOCK`` numbers, each with the place of its first row."""
    size = max(1, BLOCK // width)
    return ((rows[first : first + size], first) for first in range(0, len(rows), size))
