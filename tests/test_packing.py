"""Packed forward passes give what separate forward passes give: values, gradients, states."""

import pytest
import torch
from conftest import small_model

from causaldpo_lib.errors import StudyError
from causaldpo_lib.packing import pack, score_dataset, score_responses
from causaldpo_lib.prompts import check_boundary, encode_prompts, encode_responses, prompt_text, response_text


def encoded(rows, tokenizer):
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows])
    responses = [encode_responses(tokenizer, [row["chosen"], *row["rejected"]]) for row in rows]
    return prompts, responses


def separate_logp(model, prompt, response):
    """log pi(y|x) by an ordinary forward pass over prompt + response."""
    logits = model(torch.tensor([prompt + response])).logits[0].float()
    logps = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
    return logps[torch.arange(len(response)), torch.tensor(response)].sum()


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2"])
def test_equals_separate_forward_passes(architecture, tiny, rows):
    tokenizer = tiny[1]
    model = small_model(architecture, len(tokenizer)).eval()
    prompts, responses = encoded(rows[:5], tokenizer)
    scores = score_responses(model, pack(prompts, responses, tokenizer.pad_token_id))
    expected = torch.stack(
        [torch.stack([separate_logp(model, p, r) for r in group]) for p, group in zip(prompts, responses, strict=True)]
    )
    torch.testing.assert_close(scores.sum_logps, expected, atol=1e-4, rtol=0)
    assert scores.tokens.tolist() == [[len(r) for r in group] for group in responses]

    weights = torch.linspace(-1, 1, expected.numel()).reshape(expected.shape)
    parameters = [p for p in model.parameters() if p.requires_grad]
    packed = torch.autograd.grad((weights * scores.sum_logps).sum(), parameters, allow_unused=True)
    plain = torch.autograd.grad((weights * expected).sum(), parameters, allow_unused=True)
    for left, right in zip(packed, plain, strict=True):
        if right is not None:
            torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-3)


def test_prompt_state_is_the_last_prompt_token_s_and_sees_no_response(tiny, rows):
    model, tokenizer = tiny
    prompts, responses = encoded(rows[:4], tokenizer)
    states = score_responses(model, pack(prompts, responses, tokenizer.pad_token_id)).prompt_states
    other = score_responses(
        model, pack(prompts, [group[::-1] for group in responses], tokenizer.pad_token_id)
    ).prompt_states
    torch.testing.assert_close(states, other)
    alone = model.model(torch.tensor([prompts[2]])).last_hidden_state[0, -1]
    torch.testing.assert_close(states[2], alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(states[0], states[1])  # different histories, different states


def test_score_dataset_keeps_the_order_whatever_the_batches(tiny, rows):
    model, tokenizer = tiny
    prompts, responses = encoded(rows, tokenizer)
    small, large = (score_dataset(model, prompts, responses, tokenizer.pad_token_id, size) for size in (3, 24))
    torch.testing.assert_close(small.sum_logps, large.sum_logps, atol=1e-4, rtol=0)
    torch.testing.assert_close(small.prompt_states, large.prompt_states, atol=1e-5, rtol=1e-4)


def test_prompts_lose_their_oldest_titles_first(tiny, items):
    tokenizer = tiny[1]
    titles = items["title"].tolist()[:4]
    whole = encode_prompts(tokenizer, [prompt_text(titles)])[0]
    cut = encode_prompts(tokenizer, [prompt_text(titles)], max_tokens=len(whole) - 1)[0]
    assert cut == encode_prompts(tokenizer, [prompt_text(titles[1:])])[0]
    with pytest.raises(StudyError, match="does not fit the 3 left"):
        encode_prompts(tokenizer, [prompt_text(titles)], max_tokens=3)


def test_tokenizer_that_merges_prompt_and_response_is_refused(tiny):
    check_boundary(tiny[1], prompt_text(["Zero"]), response_text("Zero"))
    with pytest.raises(StudyError, match="token boundary"):
        check_boundary(tiny[1], "The Rus", "ted Comet")
