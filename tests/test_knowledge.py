"""Knowledge as text: factors, prompts, summaries, sampling from any causal language model, frozen encoding."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TITLES, small_model
from transformers import GenerationConfig

from causaldpo_lib import knowledge
from causaldpo_lib.backbone import load_checkpoint, train_tokenizer
from causaldpo_lib.errors import StudyError
from causaldpo_lib.prompts import encode_prompts, response_text

ITEMS = pd.DataFrame(
    {
        "item": [1, 2, 3, 4],
        "title": ["A", "B", "C", "D"],
        "genres": ["Crime|Drama", "Drama", "", None],
        "year": [1999, 1990, None, 1931],
        "author": ["Ann", "", "Bob", None],
    }
)
COUNTS = np.array([10, 1, 5, 0])
PROMPTS = [knowledge.knowledge_prompt(TITLES[:count], ["genre"], False) for count in (1, 4, 7)]


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def pretrained(request, tmp_path_factory):
    """A small random checkpoint of a user's own, from disk."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = train_tokenizer(TITLES)
    small_model(request.param, len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return load_checkpoint(folder, dtype=torch.float32)


def test_a_model_whose_texts_would_come_from_other_logits_is_refused():
    from transformers import CohereConfig, CohereForCausalLM

    tokenizer = train_tokenizer(TITLES)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = CohereForCausalLM(CohereConfig(vocab_size=len(tokenizer), logit_scale=1 / 16, **shape))
    with pytest.raises(StudyError, match="rescales its logits"):
        knowledge.generate_knowledge(
            *(model, tokenizer, PROMPTS, 2), temperature=1.0, max_new_tokens=8, batch_size=4, seed=0, context=256
        )


# --- factors, prompts, summaries ---


def test_factors_are_what_the_table_says():
    values = knowledge.factor_values(ITEMS, COUNTS, list(knowledge.FACTORS))
    assert list(values) == ["genre", "period", "popularity", "author"]  # no brand, and nothing says the director
    assert values["genre"] == [("Crime", "Drama"), ("Drama",), (), ()]
    assert values["period"] == [("1990s",), ("1990s",), (), ("1930s",)]
    # Of 16 interactions 10 come first; the next item begins at 10 of 16, in the second third; 15 and 16 are the last.
    assert values["popularity"] == [("widely known",), ("little known",), ("known",), ("little known",)]
    assert values["author"] == [("Ann",), (), ("Bob",), ()]


@pytest.mark.parametrize(
    ("factors", "sentence"), [(["genere"], r"unknown factor 'genere' \(did you"), ([], "factors is empty: name one")]
)
def test_bad_factors_are_refused(factors, sentence):
    with pytest.raises(StudyError, match=sentence):
        knowledge.factor_values(ITEMS, COUNTS, factors)


@pytest.mark.parametrize("instruction", [False, True])
def test_prompts_name_history_and_factors_and_lose_the_oldest_titles_first(tiny, instruction):
    prompt = knowledge.knowledge_prompt(["Old One", "Zero"], ["genre", "period", "theme"], instruction)
    assert "Old One; Zero\n" in prompt and "genre, period and theme" in prompt and prompt.endswith(":")
    tokenizer = tiny[1]
    whole = tokenizer(prompt)["input_ids"]
    [cut] = encode_prompts(tokenizer, [prompt], len(whole) - 1)
    assert tokenizer.decode(cut, skip_special_tokens=True).strip() == prompt.replace("Old One; ", "")


def test_values_are_named_by_count_or_by_excess():
    rows = [("a",), ("a", "b"), ("c",), ("b",), ("c",)]
    usual = {"a": 0.5, "b": 0.4, "c": 0.1}
    assert knowledge.named_values([0, 1, 2, 3], rows, usual, "mostly") == ["a", "b", "c"]
    # Of five mentions 2 a, 2 b, 1 c are found and 2.5, 2, 0.5 are usual: (c - n s) / sqrt(n s) is above 0 for c alone.
    assert knowledge.named_values([0, 1, 2, 3], rows, usual, "unusually often") == ["c"]
    assert knowledge.named_values([], rows, usual, "mostly") == []


def test_usual_shares_weigh_by_interactions():
    shares = knowledge.usual_shares({"genre": [("Crime", "Drama"), ("Drama",)]}, np.array([1, 2]))
    assert shares == {"genre": {"Crime": 0.25, "Drama": 0.75}}


def test_summaries_vary_and_say_nothing_that_is_not_there():
    values = knowledge.factor_values(ITEMS, COUNTS, ["genre", "period", "popularity"])
    shares = knowledge.usual_shares(values, COUNTS)
    rng = np.random.default_rng(0)
    texts = [knowledge.summary([1, 3], values, shares, rng) for _ in range(60)]
    assert len(set(texts)) > 10 and "" not in texts
    assert all(part.split()[0] in values for text in texts for part in text.split("; "))
    assert not [text for text in texts if "Crime" in text or "widely" in text]
    assert {len(text.split("; ")) for text in texts} == {1, 2, 3}
    again = np.random.default_rng(0)
    assert [knowledge.summary([1, 3], values, shares, again) for _ in range(60)] == texts


def test_histories_of_an_embedded_backbone_hold_facts_in_place_of_titles():
    values = knowledge.factor_values(ITEMS, COUNTS, ["genre", "period"])
    assert knowledge.facts(["A", "B", "C", "D"], values) == ["Crime, Drama, 1990s", "Drama, 1990s", "C", "1930s"]


def test_teaching_shows_every_history_in_several_texts():
    values = knowledge.factor_values(ITEMS, COUNTS, ["genre", "period"])
    described = knowledge.facts(ITEMS["title"].tolist(), values)
    rng = np.random.default_rng(0)
    rows = knowledge.teaching_rows([[1, 1, 3], [2], [2, 0]], described, values, COUNTS, 9, rng)
    # The item C has neither a genre nor a year: where there is nothing to say there is no row.
    assert [row["prompt"] for row in rows] == [
        "Chosen so far: Drama, 1990s; Drama, 1990s; 1930s\nPreferences by genre and period:",
        "Chosen so far: C; Crime, Drama, 1990s\nPreferences by genre and period:",
    ]
    assert all(len(row["chosen"]) == 9 and all(text[0] == " " for text in row["chosen"]) for row in rows)
    assert len(set(rows[0]["chosen"])) > 3 and "Crime" not in "".join(rows[0]["chosen"])
    with pytest.raises(StudyError, match="none of the factors, so there is nothing to teach"):
        knowledge.teaching_rows([[0]], described, {}, COUNTS, 1, rng)


def test_item_texts_hold_title_and_facts():
    values = knowledge.factor_values(ITEMS, COUNTS, ["genre", "period"])
    assert knowledge.item_texts(["A", "B", "C", "D"], values) == [
        *("A; genre Crime, Drama; period 1990s", "B; genre Drama; period 1990s", "C", "D; period 1930s")
    ]


# --- sampling ---

SAMPLING = {"temperature": 1.0, "max_new_tokens": 12, "batch_size": 2, "seed": 3, "context": 512}


def test_texts_are_drawn_by_the_seed_alone(pretrained, monkeypatch):
    monkeypatch.setattr(knowledge, "_paragraph", lambda ids, tokenizer: (str(ids), ""))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    found = knowledge.generate_knowledge(*pretrained, PROMPTS, 4, **SAMPLING)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert knowledge.generate_knowledge(*pretrained, PROMPTS, 4, **SAMPLING) == found
    assert knowledge.generate_knowledge(*pretrained, PROMPTS, 4, **{**SAMPLING, "seed": 4}) != found
    assert [len(set(texts)) for texts in found.texts] == [4, 4, 4]


def test_greedy_texts_are_those_of_transformers_whatever_the_batch(pretrained):
    model, tokenizer = pretrained
    together = knowledge._continuations(
        model, tokenizer, tokenizer(PROMPTS)["input_ids"], 1, 0.0, 12, torch.Generator()
    )
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=tokenizer.eos_token_id)
    for prompt, ids in zip(PROMPTS, together, strict=True):
        given = torch.tensor([tokenizer(prompt)["input_ids"]])
        out = model.generate(given, attention_mask=torch.ones_like(given), generation_config=settings)
        assert ids[: out.shape[1] - given.shape[1]].tolist() == out[0, given.shape[1] :].tolist()


def test_texts_of_one_prompt_do_not_see_each_other(pretrained, monkeypatch):
    """Tokens forced from outside: the logits at every step are those of the prompt with its own text alone."""
    model, tokenizer = copy.deepcopy(pretrained[0]), pretrained[1]
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "embed" not in name and weights.ndim > 1:
                weights.mul_(8.0)  # so that positions and neighbours matter
    prompts = tokenizer(PROMPTS[:2])["input_ids"]
    forced = torch.randint(10, 200, (2, 3, 4), generator=torch.Generator().manual_seed(0))
    forced[1, 2, 1] = tokenizer.eos_token_id
    seen = []

    def drawn(logits, temperature, generator):
        seen.append(logits.view(2, 3, -1))
        return forced[:, :, len(seen) - 1].flatten()

    monkeypatch.setattr(knowledge, "_drawn", drawn)
    found = knowledge._continuations(model, tokenizer, prompts, 3, 1.0, 4, torch.Generator()).view(2, 3, 4)
    assert found[1, 2].tolist() == [forced[1, 2, 0], *[tokenizer.eos_token_id] * 3]
    forced[1, 2, 2:] = tokenizer.eos_token_id
    assert torch.equal(found, forced)
    for row, prompt in enumerate(prompts):
        for number in range(3):
            with torch.inference_mode():
                alone = model(torch.tensor([[*prompt, *forced[row, number].tolist()]])).logits[0, len(prompt) - 1 : -1]
            together = torch.stack([logits[row, number] for logits in seen])
            assert torch.allclose(together, alone, atol=1e-3, rtol=1e-3)


def test_batches_have_draws_of_their_own(pretrained, monkeypatch):
    monkeypatch.setattr(knowledge, "_paragraph", lambda ids, tokenizer: (str(ids), ""))
    found = knowledge.generate_knowledge(*pretrained, PROMPTS[:1] * 4, 2, **SAMPLING)
    assert found.texts[0] != found.texts[2]


@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_samples_follow_the_models_probabilities(pretrained, temperature):
    model, tokenizer = pretrained
    ids = tokenizer(PROMPTS[:2])["input_ids"]
    drawn = knowledge._continuations(model, tokenizer, ids, 4000, temperature, 1, torch.Generator().manual_seed(0))
    for prompt, tokens in zip(ids, drawn.view(2, 4000), strict=True):
        with torch.inference_mode():
            expected = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
        top = expected.topk(20).indices
        seen = torch.stack([(tokens == token).float().mean() for token in top])
        assert (seen - expected[top]).abs().max() < 4 * float((expected.max() / 4000).sqrt()) + 1e-3


def test_texts_that_are_none_are_found_and_counted(tiny, monkeypatch):
    model, tokenizer = tiny
    end = tokenizer.eos_token_id

    def ids(text, *more):
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], *more]

    written = [ids(" Silent  Harbor", end, end), ids(" \n", end), [end], ids(" Zero\n and on"), ids(" Zero and on")]
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in written], True, end)
    rows = [row[: len(own)] for row, own in zip(rows, written, strict=True)]  # without the fill, which would end them

    class Rows(list):
        def tolist(self):
            return [row.tolist() for row in self]

        def __getitem__(self, part):
            return Rows(list.__getitem__(self, part))

    monkeypatch.setattr(knowledge, "_continuations", lambda *_: Rows(rows))
    found = knowledge.generate_knowledge(model, tokenizer, PROMPTS[:1], 5, **SAMPLING)
    assert found == ([["Silent Harbor", "", "", "Zero", ""]], 2, 1)


def test_generation_leaves_the_models_mode_alone(pretrained):
    model, tokenizer = pretrained
    model.train()
    knowledge.generate_knowledge(model, tokenizer, PROMPTS, 1, **{**SAMPLING, "temperature": 0.0})
    assert model.training
    model.eval()


@pytest.mark.parametrize("change", [{"temperature": -1.0}, {"temperature": 0.0}, {"max_new_tokens": 0}])
def test_what_cannot_be_sampled_is_refused(pretrained, change):
    with pytest.raises(StudyError, match=r"2 texts of up to .* cannot be sampled"):
        knowledge.generate_knowledge(*pretrained, PROMPTS, 2, **{**SAMPLING, **change})


# --- encoding ---


def test_the_mean_state_is_that_of_the_text_alone(pretrained):
    model, tokenizer = pretrained
    texts = ["Zero", "Silent Harbor Nights", "A Paper Crown; Zero"]
    found = knowledge.mean_encoder(model, tokenizer, 2)(texts)
    for text, vector in zip(texts, found, strict=True):
        ids = torch.tensor([tokenizer(response_text(text))["input_ids"]])
        with torch.inference_mode():
            states = model(ids, output_hidden_states=True).hidden_states[-1][0]
        assert torch.allclose(vector, states.mean(0), atol=1e-5)


def test_no_text_is_a_vector_of_zeros_and_each_text_is_encoded_once():
    asked = []

    def encode(texts):
        asked.append(list(texts))
        return torch.tensor([[float(len(text)), 1.0] for text in texts])

    found = knowledge.encode_knowledge(["bb", "", "a", "bb"], encode)
    assert found.tolist() == [[2.0, 1.0], [0.0, 0.0], [1.0, 1.0], [2.0, 1.0]] and asked == [["a", "bb"]]
    assert knowledge.encode_knowledge(["", ""], encode).tolist() == [[0.0, 0.0]] * 2
