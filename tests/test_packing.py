"""Packed forward passes give what separate forward passes give: values, gradients, states."""

import copy
import warnings

import pytest
import torch
from conftest import small_model
from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig, MistralConfig

from causaldpo_lib.causal import with_environment
from causaldpo_lib.errors import StudyError
from causaldpo_lib.packing import can_pack, context_of, pack, prepend, score_dataset, score_responses
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


def scored_apart(model, prompts, responses):
    return [[separate_logp(model, p, r) for r in group] for p, group in zip(prompts, responses, strict=True)]


def ragged(prompts, responses):
    """One, two, three ... responses of prompts that differ in length as well."""
    return prompts, [group[: 1 + index % len(group)] for index, group in enumerate(responses)]


def gradients(model, value):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [g for g in torch.autograd.grad(value, parameters, allow_unused=True) if g is not None]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2"])
@pytest.mark.parametrize("shape", [lambda *given: given, ragged], ids=["full", "ragged"])
def test_equals_separate_forward_passes(architecture, shape, tiny, rows):
    tokenizer = tiny[1]
    model = small_model(architecture, len(tokenizer)).eval()
    prompts, responses = shape(*encoded(rows[:5], tokenizer))
    apart = scored_apart(model, prompts, responses)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = pack(prompts, responses, tokenizer.pad_token_id)
        assert can_pack(model, batch)  # no other pass is compared with itself
        scores = score_responses(model, batch)
    found = [scores.sum_logps[b, r] for b, group in enumerate(apart) for r in range(len(group))]
    expected = [value for group in apart for value in group]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), atol=1e-4, rtol=0)
    assert [[n for n in row if n] for row in scores.tokens.tolist()] == [[len(r) for r in group] for group in responses]
    assert (scores.sum_logps == 0).sum() == batch.target_mask[:, :, 0].logical_not().sum()

    weights = torch.linspace(-1, 1, len(expected))
    packed = gradients(model, (weights * torch.stack(found)).sum())
    plain = gradients(model, (weights * torch.stack(expected)).sum())
    for left, right in zip(packed, plain, strict=True):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_a_model_that_packs_still_reads_padded_batches(side, architecture, tiny, rows):
    """The other way of scoring, whole sequences padded on either side, by a model that has packed before."""
    tokenizer = copy.deepcopy(tiny[1])
    tokenizer.padding_side = side
    model = small_model(architecture, len(tokenizer)).eval()
    prompts, responses = encoded(rows[:4], tokenizer)
    scores = score_responses(model, pack(prompts, responses, tokenizer.pad_token_id)).sum_logps
    whole = [p + group[1] for p, group in zip(prompts, responses, strict=True)]
    inputs = tokenizer.pad({"input_ids": whole}, return_tensors="pt")
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    logps = torch.log_softmax(model(**inputs).logits, -1)
    for row, (prompt, group) in enumerate(zip(prompts, responses, strict=True)):
        first = inputs["attention_mask"][row].argmax() + len(prompt)
        places = torch.arange(first, first + len(group[1]))
        found = logps[row, places - 1, inputs["input_ids"][row, places]].sum()
        torch.testing.assert_close(scores[row, 1], found, atol=1e-4, rtol=0)


def test_no_padding_enters_the_model(tiny, rows):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    prompts, responses = ragged(*encoded(rows[:6], tokenizer))
    batch = pack(prompts, responses, tokenizer.pad_token_id)
    assert can_pack(model, batch)
    seen, scored = [], []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.shape[:2].numel()))
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: scored.append(out.shape[:2].numel()))
    score_responses(model, batch)
    answers = sum(len(r) for group in responses for r in group)
    assert seen == [sum(map(len, prompts)) + answers] and scored == [answers]
    assert seen[0] < batch.input_ids.numel()


def odd_models(vocabulary):
    """Models that cannot take packed rows: their reason, and a shape of their own."""
    small = {"vocab_size": vocabulary, "hidden_size": 32, "num_hidden_layers": 2}
    heads = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return {
        "ALiBi": BloomConfig(n_head=4, n_layer=2, vocab_size=vocabulary, hidden_size=32),
        "state space": MambaConfig(state_size=4, **small),
        "attention window": MistralConfig(sliding_window=8, **heads, **small),
    }


@pytest.mark.parametrize("kind", ["ALiBi", "state space", "attention window"])
def test_what_cannot_share_prompts_is_scored_apart_with_a_warning(kind, tiny, rows):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(odd_models(len(tiny[1]))[kind]).eval()
    prompts, responses = ragged(*encoded(rows[:3], tiny[1]))
    before = model.config._attn_implementation
    batch = pack(prompts, responses, tiny[1].pad_token_id)
    with pytest.warns(UserWarning, match="cannot share a prompt among its responses"):
        scores = score_responses(model, batch, response_states=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = score_responses(model, batch)  # said once
    torch.testing.assert_close(again.sum_logps, scores.sum_logps)
    assert model.config._attn_implementation == before
    for b, group in enumerate(scored_apart(model, prompts, responses)):
        torch.testing.assert_close(scores.sum_logps[b, : len(group)], torch.stack(group), atol=1e-4, rtol=0)
    states = model.get_decoder()(torch.tensor([prompts[2] + responses[2][1]])).last_hidden_state[0]
    torch.testing.assert_close(scores.prompt_states[2], states[len(prompts[2]) - 1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(scores.response_states[2, 1], states[len(prompts[2]) :].mean(0), atol=1e-4, rtol=1e-4)


def test_the_context_is_the_shorter_of_positions_and_window(tiny):
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    for window, positions, context in ((8, 128, 8), (256, 128, 128), (None, 128, 128)):
        config = MistralConfig(sliding_window=window, max_position_embeddings=positions, **heads, **shape)
        assert context_of(AutoModelForCausalLM.from_config(config)) == context
    unlimited = BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)
    assert context_of(AutoModelForCausalLM.from_config(unlimited)) == 2**31


def test_an_attention_window_counts_from_the_first_prompt_that_exceeds_it(tiny, rows):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(odd_models(len(tiny[1]))["attention window"]).eval()
    prompts, responses = [[3, 4, 5]], [[[6, 7], [8]]]
    short, long = pack(prompts, responses, 0), pack([list(range(3, 20))], responses, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert can_pack(model, short)
        score_responses(model, short)
    with pytest.warns(UserWarning, match="attention window of 8 tokens"):
        found = score_responses(model, long).sum_logps
    expected = torch.stack(scored_apart(model, [list(range(3, 20))], responses)[0])
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_response_states_are_means_over_a_response_s_tokens(architecture, tiny, rows):
    model = small_model(architecture, len(tiny[1])).eval()
    prompts, responses = ragged(*encoded(rows[:4], tiny[1]))
    batch = pack(prompts, responses, tiny[1].pad_token_id)
    states = score_responses(model, batch, response_states=True).response_states
    for b, group in enumerate(responses):
        for r, response in enumerate(group):
            whole = model.get_decoder()(torch.tensor([prompts[b] + response])).last_hidden_state[0]
            torch.testing.assert_close(states[b, r], whole[len(prompts[b]) :].mean(0), atol=1e-5, rtol=1e-4)
    assert not states[batch.target_mask.any(-1).logical_not()].any()
    assert score_responses(model, batch).response_states is None


@pytest.mark.parametrize("after_first", [False, True])
def test_prepended_tokens_are_packed_as_if_they_stood_in_the_prompts(after_first, tiny, rows):
    model, tokenizer = tiny
    prompts, responses = ragged(*encoded(rows[:4], tokenizer))
    added = torch.tensor([[5, 6], [7, 8], [5, 6], [9, 9]])
    bos = tokenizer.bos_token_id if after_first else None
    inside = [with_environment(p, new, bos) for p, new in zip(prompts, added.tolist(), strict=True)]
    expected = score_responses(model, pack(inside, responses, tokenizer.pad_token_id))
    found = score_responses(model, prepend(pack(prompts, responses, tokenizer.pad_token_id), added, after_first))
    torch.testing.assert_close(found.sum_logps, expected.sum_logps)
    torch.testing.assert_close(found.prompt_states, expected.prompt_states)


def test_gradient_checkpointing_and_autocast_keep_the_numbers(tiny, rows):
    model, tokenizer = small_model("llama", len(tiny[1])), tiny[1]
    batch = pack(*ragged(*encoded(rows[:5], tokenizer)), tokenizer.pad_token_id)
    plain = gradients(model, score_responses(model, batch).sum_logps.mean())
    recomputed = copy.deepcopy(model).train()
    recomputed.activation_checkpointing_enable()
    again = gradients(recomputed, score_responses(recomputed, batch).sum_logps.mean())
    for left, right in zip(again, plain, strict=True):
        torch.testing.assert_close(left, right)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = score_responses(model, batch).sum_logps
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, score_responses(model, batch).sum_logps, atol=0.5, rtol=0)


def test_a_saved_model_knows_nothing_of_packing(tmp_path, tiny, rows):
    model, tokenizer = small_model("qwen2", len(tiny[1])), tiny[1]
    assert can_pack(model, pack(*encoded(rows[:1], tokenizer), tokenizer.pad_token_id))
    model.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


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
    with pytest.raises(StudyError, match=r"prompt 1, .* does not fit the 3 left beside the longest response"):
        encode_prompts(tokenizer, ["Next", prompt_text(titles)], max_tokens=3)


def test_a_prompt_of_another_form_is_read_whole_or_not_at_all(tiny):
    """The text before its first separator is no title, so that nothing can be taken out of it."""
    foreign = "Ranked by me: Zero; Paper Tigers; Silent Harbor ->"
    (whole,) = encode_prompts(tiny[1], [foreign])
    assert encode_prompts(tiny[1], [foreign], len(whole)) == [whole]
    with pytest.raises(StudyError, match=r"prompt 1 has .* does not begin with 'Chosen so far: ': shorten it"):
        encode_prompts(tiny[1], [prompt_text([]), foreign], len(whole) - 1)


def test_tokenizer_that_merges_prompt_and_response_is_refused(tiny):
    check_boundary(tiny[1], prompt_text(["Zero"]), response_text("Zero"))
    with pytest.raises(StudyError, match="token boundary"):
        check_boundary(tiny[1], "The Rus", "ted Comet")


def test_an_empty_prompt_is_refused():
    with pytest.raises(StudyError, match="a prompt has no token"):
        pack([[3], []], [[[4]], [[5]]], 0)
