"""One forward pass per prompt for all of its responses.

A prompt's tokens come once, followed by every response; a response sees the prompt and itself only, and its positions
restart where the prompt ends. Log-probabilities and gradients then equal those of separate forward passes, while the
prompt - most of the tokens - is computed once, and the vocabulary projection runs at response positions only.

The prompts of a batch go through the model as one row without padding; only attention, which mixes tokens, sees them
apart. A batch of mixed lengths costs its tokens, not its longest member.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from causaldpo_lib.errors import StudyError


@dataclass
class PackedBatch:
    """Tensors of B prompts with at most R responses of at most T tokens, packed into rows of L tokens.

    Shapes: ``input_ids``, ``position_ids``, ``segments`` (B, L) - segment 0 is the prompt, r >= 1 the r-th response,
    -1 padding; ``predictors`` and ``targets`` (B, R, T) - the position whose state predicts a response token, and that
    token; ``target_mask`` (B, R, T) bool, all False where a prompt has fewer than R responses; ``prompt_end`` (B,) -
    the position of the last prompt token.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    predictors: Tensor
    targets: Tensor
    target_mask: Tensor
    prompt_end: Tensor

    def to(self, device: torch.device | str) -> PackedBatch:
        return PackedBatch(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def pack(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[Sequence[int]]],
    pad_id: int,
    count: int | None = None,
) -> PackedBatch:
    """Pack token ids of B prompts and the non-empty responses of each; R is ``count``, or the largest number there is.

    Raises:
        StudyError: a prompt has no token, so that nothing predicts a response's first one.
    """
    if not all(len(prompt) for prompt in prompts):
        raise StudyError("a prompt has no token: start it with text, or use a tokenizer that starts it with one")
    count = max(map(len, responses)) if count is None else count
    longest = max(len(response) for group in responses for response in group)
    rows, predictors, targets, target_mask = [], [], [], []
    for prompt, group in zip(prompts, responses, strict=True):
        start = len(prompt)
        ids, positions, segments = list(prompt), list(range(start)), [0] * start
        for r, response in enumerate(group):
            size = len(response)
            fill = [0] * (longest - size)
            # The last prompt token predicts every response's first token; then each token predicts its successor.
            predictors.append([start - 1, *range(len(ids), len(ids) + size - 1), *fill])
            targets.append([*response, *fill])
            target_mask.append([1] * size + fill)
            ids += response
            positions += range(start, start + size)
            segments += [r + 1] * size
        for part in (predictors, targets, target_mask):
            part += [[0] * longest] * (count - len(group))
        rows.append((torch.tensor(ids), torch.tensor(positions), torch.tensor(segments)))
    ids, positions, segments = zip(*rows, strict=True)
    shape = (len(prompts), count, longest)
    return PackedBatch(
        input_ids=pad_sequence(ids, batch_first=True, padding_value=pad_id),
        position_ids=pad_sequence(positions, batch_first=True),
        segments=pad_sequence(segments, batch_first=True, padding_value=-1),
        predictors=torch.tensor(predictors).view(shape),
        targets=torch.tensor(targets).view(shape),
        target_mask=torch.tensor(target_mask, dtype=torch.bool).view(shape),
        prompt_end=torch.tensor([len(prompt) - 1 for prompt in prompts]),
    )


def prepend(batch: PackedBatch, tokens: Tensor, after_first: bool) -> PackedBatch:
    """``batch`` with ``tokens`` (B, m) before each prompt, or after its first token (the beginning-of-sequence one)."""
    first, added = int(after_first), tokens.shape[1]

    def widened(rows: Tensor, middle: Tensor, shift: int) -> Tensor:
        return torch.cat([rows[:, :first], middle, rows[:, first:] + shift], dim=1)

    places = torch.arange(first, first + added, device=tokens.device).expand_as(tokens)
    return PackedBatch(
        input_ids=widened(batch.input_ids, tokens, 0),
        position_ids=widened(batch.position_ids, places, added),
        segments=widened(batch.segments, torch.zeros_like(tokens), 0),
        predictors=batch.predictors + added,
        targets=batch.targets,
        target_mask=batch.target_mask,
        prompt_end=batch.prompt_end + added,
    )


class Layout(NamedTuple):
    """Where attention finds the B prompts and their responses among the N tokens of one row.

    ``gather`` (B, P + S): tokens of each prompt, filled up to P, then of its responses, filled up to S; ``back`` (N,):
    each token's place in that, flattened; ``prompt`` is P, ``longest`` the largest position plus one.
    """

    gather: Tensor
    back: Tensor
    prompt: int
    longest: int


def _layout(batch: PackedBatch) -> tuple[Layout, Tensor]:
    """The layout, and which keys (1, B, S, P + S) a response's token sees: its prompt, and earlier ones of its own."""
    segments = batch.segments
    lengths, prompts = (segments >= 0).sum(1)[:, None], batch.prompt_end[:, None] + 1
    answers = lengths - prompts
    starts = lengths.cumsum(0) - lengths
    width, size = torch.stack([prompts.max(), answers.max()]).tolist()
    places = torch.arange(max(width, size), device=segments.device)
    in_prompt, in_answer = places[:width] < prompts, places[:size] < answers
    gather = torch.cat(
        [
            starts + places[:width].minimum(prompts - 1),
            starts + prompts + places[:size].minimum(answers - 1),
        ],
        dim=1,
    )
    own = torch.full(in_answer.shape, -1, device=segments.device)
    own[in_answer] = segments[segments > 0]
    same = (own[:, :, None] == own[:, None, :]) & (places[:size, None] >= places[:size])
    visible = torch.cat([in_prompt[:, None].expand(-1, size, -1), same], dim=2)
    back = torch.cat([in_prompt, in_answer], dim=1).flatten().nonzero()[:, 0]
    return Layout(gather, back, width, int(batch.position_ids.max()) + 1), visible[None]


class CannotPack(RuntimeError):
    """This model's attention, or this batch, is beyond what ``packed_attention`` computes."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: plain SDPA, or with ``packing`` attention within prompts and responses.

    Prompts are causal among themselves, which needs no mask and skips half of the work; responses, the few, see their
    prompt's keys and their own under ``attention_mask``.
    """
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    window = kwargs.get("sliding_window")
    if window is not None and packing.longest > window:
        raise CannotPack(f"its attention window of {window} tokens is shorter than a prompt with its response")
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)

    def apart(states: Tensor) -> Tensor:
        return states[0].index_select(1, packing.gather.flatten()).unflatten(1, packing.gather.shape)

    # Shapes (heads, B, tokens, d): SDPA takes any two leading dimensions, so nothing is transposed.
    query, key, value = apart(query), apart(key), apart(value)
    size = packing.prompt
    options = {"dropout_p": dropout, "scale": scaling}
    prompts = F.scaled_dot_product_attention(
        query[:, :, :size], key[:, :, :size], value[:, :, :size], is_causal=True, **options
    )
    answers = F.scaled_dot_product_attention(query[:, :, size:], key, value, attn_mask=attention_mask, **options)
    together = torch.cat([prompts, answers], dim=2).flatten(1, 2).index_select(1, packing.back)
    return together.transpose(0, 1)[None].contiguous(), None


PACKED = "causaldpo_packed"
AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)  # for ordinary calls of a model that has been switched over


@dataclass
class ResponseScores:
    """What one packed forward pass gives.

    ``sum_logps`` (B, R) in nats, ``tokens`` (B, R), both 0 for absent responses; ``prompt_states`` (B, d), last-layer
    states of the last prompt token, which see the whole history and no response; ``response_states`` (B, R, d), mean
    last-layer states over a response's tokens, where asked for.
    """

    sum_logps: Tensor
    tokens: Tensor
    prompt_states: Tensor
    response_states: Tensor | None = None


def _unwrapped(model: nn.Module) -> nn.Module:
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The transformer without its vocabulary projection, and that projection; adapters stay in place."""
    model = _unwrapped(model)
    return model.get_decoder(), model.get_output_embeddings()


def context_of(model: nn.Module) -> int:
    """Tokens of a prompt and its response at all stages: the model's positions, or the window that its attention sees.

    Beyond a window the masks by which rankers let titles share a prompt would show them what the model does not see.
    Some configurations say neither.
    """
    config = decoder_and_head(model)[0].config
    limits = (getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window"))
    return min(limit for limit in (*limits, 2**31) if limit)


@contextmanager
def _last_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """Last-layer states of the forward passes within; the pass itself goes through ``model`` as it is wrapped.

    (A wrapper such as DistributedDataParallel prepares its gradient exchange in its own forward.)
    """
    found: list[Tensor] = []
    handle = decoder_and_head(model)[0].register_forward_hook(
        lambda module, inputs, output: found.append(output.last_hidden_state)
    )
    try:
        yield found
    finally:
        handle.remove()


def _flat_inputs(batch: PackedBatch) -> dict[str, Any]:
    layout, visible = _layout(batch)
    kept = batch.segments >= 0
    return {
        "input_ids": batch.input_ids[kept][None],
        "position_ids": batch.position_ids[kept][None],
        "attention_mask": visible,  # four-dimensional masks reach the attention function as they are
        "packing": layout,
        "use_cache": False,
    }


def _row_starts(batch: PackedBatch) -> Tensor:
    lengths = (batch.segments >= 0).sum(1)
    return lengths.cumsum(0) - lengths


def _packed_pass(model: nn.Module, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (M, V) at the M response tokens, states (M, d) of these tokens, and prompt states (B, d)."""
    starts = _row_starts(batch)
    predictors = (batch.predictors + starts[:, None, None])[batch.target_mask]
    with _last_states(model) as found:
        logits = model(**_flat_inputs(batch), logits_to_keep=predictors).logits[0]
    states = found[-1][0]
    return logits, states[batch.segments[batch.segments >= 0] > 0], states[starts + batch.prompt_end]


def _sequences(batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every response behind its own copy of the prompt: ids and mask (Q, L), lengths of prompt and of both (Q,)."""
    rows, lengths = [], []
    for b, ids in enumerate(batch.input_ids):
        prompt = ids[: batch.prompt_end[b] + 1]
        for r in batch.target_mask[b].any(1).nonzero()[:, 0]:
            rows.append(torch.cat([prompt, batch.targets[b, r][batch.target_mask[b, r]]]))
            lengths.append((len(prompt), len(rows[-1])))
    prompts, whole = torch.tensor(lengths, device=batch.input_ids.device).unbind(1)
    ids = pad_sequence(rows, batch_first=True)
    return ids, torch.arange(ids.shape[1], device=ids.device) < whole[:, None], prompts, whole


def _separate_pass(model: nn.Module, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """As ``_packed_pass`` by an ordinary forward pass over prompt and response, padded on the right."""
    ids, mask, prompts, whole = _sequences(batch)
    with _last_states(model) as found:
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
    places = torch.arange(ids.shape[1], device=ids.device)
    own = (places >= prompts[:, None]) & (places < whole[:, None])
    predicts = (places >= prompts[:, None] - 1) & (places < whole[:, None] - 1)
    first = batch.target_mask.any(2).sum(1).cumsum(0) - batch.target_mask.any(2).sum(1)
    return logits[predicts], found[-1][own], found[-1][first, batch.prompt_end]


# Decoder -> whether its packed passes are what separate ones are.
_PACKABLE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def can_pack(model: nn.Module, batch: PackedBatch) -> bool:
    """Whether ``model`` takes packed rows, found out once by its states of the first prompt and responses of a batch.

    A model that does is switched over to ``packed_attention`` for good, since a checkpointed layer runs again in the
    backward pass; ordinary calls then are plain SDPA. Any other keeps its attention, and a warning says why.
    """
    decoder = decoder_and_head(model)[0]
    if decoder not in _PACKABLE:
        reason = _why_not(_unwrapped(model), decoder, batch)
        _PACKABLE[decoder] = reason is None
        if reason is not None:
            _warn(model, reason)
    return _PACKABLE[decoder]


def _warn(model: nn.Module, reason: str) -> None:
    warnings.warn(
        f"{type(_unwrapped(model)).__name__} cannot share a prompt among its responses ({reason}): they are scored in "
        "separate forward passes, which give the same and are slower",
        stacklevel=3,
    )


@torch.no_grad()
def _why_not(base: nn.Module, decoder: nn.Module, batch: PackedBatch) -> str | None:
    if "logits_to_keep" not in inspect.signature(type(base).forward).parameters:
        return "its forward has no argument logits_to_keep"
    first = PackedBatch(**{name: tensor[:1] for name, tensor in vars(batch).items()})
    ids, mask, prompts, whole = _sequences(first)
    training, before = decoder.training, base.config._attn_implementation
    decoder.eval()
    try:
        with torch.autocast(ids.device.type, enabled=False):
            states = decoder(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
            places = torch.arange(ids.shape[1], device=ids.device)
            expected = states[(places >= prompts[:, None]) & (places < whole[:, None])].float()
            base.set_attn_implementation(PACKED)
            inputs = _flat_inputs(first)
            found = decoder(**inputs).last_hidden_state[0][first.segments[first.segments >= 0] > 0].float()
        precise = states.dtype in (torch.float32, torch.float64)
        error = float((found - expected).abs().max() / expected.abs().max())
        reason = None if error < (1e-3 if precise else 0.1) else f"its states differ by {error:.1%}"
    except (CannotPack, TypeError, ValueError, RuntimeError, AttributeError) as problem:
        reason = str(problem).splitlines()[0]
    finally:
        decoder.train(training)
    if reason is not None:
        base.set_attn_implementation(before)
    return reason


def _response_pass(model: nn.Module, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    if can_pack(model, batch):
        try:
            return _packed_pass(model, batch)
        except CannotPack as problem:  # a prompt longer than those seen so far
            _warn(model, str(problem))
    return _separate_pass(model, batch)


def _sum_over_responses(token_values: Tensor, batch: PackedBatch) -> Tensor:
    """Sums (B, R) of values given per response token (M,), in the order of ``target_mask``."""
    spread = torch.zeros(batch.target_mask.shape, dtype=token_values.dtype, device=token_values.device)
    return spread.masked_scatter(batch.target_mask, token_values).sum(-1)


def _mean_over_responses(states: Tensor, batch: PackedBatch) -> Tensor:
    """Means (B, R, d) of states given per response token (M, d); 0 for absent responses."""
    group = torch.arange(batch.target_mask.shape[:2].numel(), device=states.device).view(batch.target_mask.shape[:2])
    sums = states.new_zeros(group.numel(), states.shape[-1]).index_add(
        0, group[:, :, None].expand_as(batch.target_mask)[batch.target_mask], states
    )
    return sums.view(*group.shape, -1) / batch.target_mask.sum(-1, keepdim=True).clamp_min(1)


def score_responses(model: nn.Module, batch: PackedBatch, response_states: bool = False) -> ResponseScores:
    """Summed log-probabilities log pi(y|x) of every response, end-of-sequence token included, computed in float32."""
    logits, states, prompt_states = _response_pass(model, batch)
    token_logps = -F.cross_entropy(logits.float(), batch.targets[batch.target_mask], reduction="none")
    return ResponseScores(
        _sum_over_responses(token_logps, batch),
        batch.target_mask.sum(-1),
        prompt_states,
        _mean_over_responses(states, batch) if response_states else None,
    )


def batches_by_length(prompts: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices of prompts in batches of similar length, longest first: little padding, and peak memory comes early."""
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))


@torch.no_grad()
def score_dataset(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[Sequence[int]]],
    pad_id: int,
    batch_size: int,
    count: int | None = None,
) -> ResponseScores:
    """``score_responses`` over N prompts in evaluation mode, without gradients; float32 tensors on the CPU."""
    device = next(model.parameters()).device
    count = max(map(len, responses)) if count is None else count
    was_training = model.training
    model.eval()
    indices, parts = [], []
    for chunk in batches_by_length(prompts, batch_size):
        batch = pack([prompts[i] for i in chunk], [responses[i] for i in chunk], pad_id, count).to(device)
        scores = score_responses(model, batch)
        indices += chunk
        parts.append((scores.sum_logps.float().cpu(), scores.tokens.cpu(), scores.prompt_states.float().cpu()))
    model.train(was_training)
    back = torch.argsort(torch.tensor(indices))
    return ResponseScores(*(torch.cat(part)[back] for part in zip(*parts, strict=True)))
