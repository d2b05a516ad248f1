"""One forward pass per prompt for all of its responses.

The prompt's tokens come once, followed by every response; a block mask lets a response see the prompt and itself only,
and its positions restart where the prompt ends. Log-probabilities then equal those of separate forward passes, while
the prompt - most of the tokens - is computed once, and the vocabulary projection runs at response positions only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence


@dataclass
class PackedBatch:
    """Tensors of B prompts with R responses of at most T tokens, packed into rows of L tokens.

    Shapes: ``input_ids``, ``position_ids``, ``segments`` (B, L) - segment 0 is the prompt, r >= 1 the r-th response,
    -1 padding; ``predictors`` and ``targets`` (B, R, T) - the position whose state predicts a response token, and that
    token; ``target_mask`` (B, R, T) bool; ``prompt_end`` (B,) - the position of the last prompt token.
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

    def attention_mask(self, dtype: torch.dtype) -> Tensor:
        """Additive mask (B, 1, L, L): a token sees earlier tokens of the prompt and of its own response."""
        segments = self.segments
        length = segments.shape[1]
        same = segments[:, :, None] == segments[:, None, :]
        to_prompt = (segments == 0)[:, None, :] & (segments > 0)[:, :, None]
        earlier = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
        # Padding sees (only) earlier padding, itself included, so that no row is empty and no softmax is 0/0.
        visible = (same | to_prompt) & earlier
        mask = torch.zeros(visible.shape, dtype=dtype, device=segments.device)
        return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


def pack(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[Sequence[int]]], pad_id: int) -> PackedBatch:
    """Pack token ids of B prompts and, for each, R non-empty responses."""
    rows = []
    count = len(responses[0])
    longest = max(len(response) for group in responses for response in group)
    shape = (len(prompts), count, longest)
    predictors, targets = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    target_mask = torch.zeros(shape, dtype=torch.bool)
    for b, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
        start = len(prompt)
        ids, positions, segments = list(prompt), list(range(start)), [0] * start
        for r, response in enumerate(group):
            size = len(response)
            # The last prompt token predicts every response's first token; then each token predicts its successor.
            predictors[b, r, :size] = torch.tensor([start - 1, *range(len(ids), len(ids) + size - 1)])
            targets[b, r, :size] = torch.tensor(response)
            target_mask[b, r, :size] = True
            ids += response
            positions += range(start, start + size)
            segments += [r + 1] * size
        rows.append((torch.tensor(ids), torch.tensor(positions), torch.tensor(segments)))
    ids, positions, segments = zip(*rows, strict=True)
    return PackedBatch(
        input_ids=pad_sequence(ids, batch_first=True, padding_value=pad_id),
        position_ids=pad_sequence(positions, batch_first=True),
        segments=pad_sequence(segments, batch_first=True, padding_value=-1),
        predictors=predictors,
        targets=targets,
        target_mask=target_mask,
        prompt_end=torch.tensor([len(prompt) - 1 for prompt in prompts]),
    )


@dataclass
class ResponseScores:
    """What one packed forward pass gives: ``sum_logps`` (B, R) in nats, ``tokens`` (B, R), ``prompt_states`` (B, d)."""

    sum_logps: Tensor
    tokens: Tensor
    prompt_states: Tensor


def decoder_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The transformer without its vocabulary projection, and that projection; adapters stay in place."""
    model = getattr(model, "module", model)
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    return model.get_decoder(), model.get_output_embeddings()


def response_logits(model: nn.Module, batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Float32 logits (M, V) at the M response tokens, in the order of ``target_mask``, and the prompt states (B, d).

    Prompt states are the last-layer states of the last prompt token: they see the whole history and no response.
    """
    decoder, head = decoder_and_head(model)
    states = decoder(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask(next(decoder.parameters()).dtype),
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state
    rows = torch.arange(len(states), device=states.device)
    row_of = rows[:, None, None].expand_as(batch.predictors)[batch.target_mask]
    logits = head(states[row_of, batch.predictors[batch.target_mask]]).float()
    return logits, states[rows, batch.prompt_end]


def sum_over_responses(token_values: Tensor, batch: PackedBatch) -> Tensor:
    """Sums (B, R) of values given per response token (M,), in the order of ``target_mask``."""
    spread = torch.zeros(batch.target_mask.shape, dtype=token_values.dtype, device=token_values.device)
    return spread.masked_scatter(batch.target_mask, token_values).sum(-1)


def score_responses(model: nn.Module, batch: PackedBatch) -> ResponseScores:
    """Summed log-probabilities log pi(y|x) of every response, end-of-sequence token included, computed in float32."""
    logits, prompt_states = response_logits(model, batch)
    token_logps = -F.cross_entropy(logits, batch.targets[batch.target_mask], reduction="none")
    return ResponseScores(sum_over_responses(token_logps, batch), batch.target_mask.sum(-1), prompt_states)


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
) -> ResponseScores:
    """``score_responses`` over N prompts in evaluation mode, without gradients; float32 tensors on the CPU."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    indices, parts = [], []
    for chunk in batches_by_length(prompts, batch_size):
        batch = pack([prompts[i] for i in chunk], [responses[i] for i in chunk], pad_id).to(device)
        scores = score_responses(model, batch)
        indices += chunk
        parts.append((scores.sum_logps.float().cpu(), scores.tokens.cpu(), scores.prompt_states.float().cpu()))
    model.train(was_training)
    back = torch.argsort(torch.tensor(indices))
    return ResponseScores(*(torch.cat(part)[back] for part in zip(*parts, strict=True)))
