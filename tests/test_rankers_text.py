"""Rankers that read generated text: grounding by embedding, and which candidates a text names.

Among them the slips of a published evaluator, each of which scores something else without an error: predictions cut at
the first "." and ",", the first character of a prediction in place of the prediction, prompts cut at their end, and
examples left out of the numerator but not of the denominator.
"""

import math
import sys

import numpy as np
import plain_forwards
import pytest
import torch
from conftest import TITLES, small_model

from causaldpo_lib import grounding, ranking
from causaldpo_lib.catalogue import Catalogue
from causaldpo_lib.errors import StudyError
from causaldpo_lib.prompts import encode_prompts, prompt_text
from causaldpo_lib.ranking import RANKERS


@pytest.fixture(scope="module")
def catalogue(items, tiny):
    return Catalogue.build(items, tiny[1])


@pytest.fixture(scope="module")
def untied(tiny):
    return small_model("llama", len(tiny[1])).eval()


@pytest.fixture
def writes(monkeypatch):
    """Replace generation by given texts, one list for each prompt, whatever its batch; prompts are collected."""

    def install(tokenizer, answers):
        prompts = []

        def generate(model, own_tokenizer, encoded, beams, max_new_tokens):
            texts = tokenizer.batch_decode(encoded, skip_special_tokens=True)
            prompts.extend(texts)
            return [answers[text] for text in texts]

        monkeypatch.setattr(ranking, "generate_texts", generate)
        return prompts

    return install


# --- grounding, with embeddings that can be checked by hand ---

PLACES = {"East": (1.0, 0.0), "Far East": (9.0, 1.0), "North": (0.0, 2.0), "West": (-1.0, 0.0), "east": (2.0, 0.1)}


def encode(texts):
    return torch.tensor([PLACES[text] for text in texts])


CARDINAL = ["West", "North", "Far East", "East"]


def order(texts, **options):
    (scores,) = grounding.ground_texts([texts], CARDINAL, encode(CARDINAL), encode, **options)
    return [CARDINAL[place] for place in scores.argsort(descending=True, stable=True)]


def test_titles_are_ranked_by_distance_to_the_first_text():
    # cos: 0.9988 East, 0.998 Far East, 0.05 North, -0.9988 West. L2: 1.005, 7.06, 2.76, 3.00.
    assert order(["east", "West"], distance="cosine") == ["West", "East", "Far East", "North"]
    assert order(["east"], distance="cosine") == ["East", "Far East", "North", "West"]
    assert order(["east"], distance="l2") == ["East", "North", "West", "Far East"]
    (scores,) = grounding.ground_texts([["east"]], CARDINAL, encode(CARDINAL), encode, distance="l2")
    assert scores.tolist() == pytest.approx(
        [-math.hypot(3, 0.1), -math.hypot(2, 1.9), -math.hypot(7, 0.9), -math.hypot(1, 0.1)]
    )
    (scores,) = grounding.ground_texts([["east"]], CARDINAL, encode(CARDINAL), encode)
    assert scores[3].item() == pytest.approx(2 / math.hypot(2, 0.1) - 1, abs=1e-6)
    with pytest.raises(StudyError, match="unknown distance 'l3'"):
        order(["east"], distance="l3")


def test_texts_that_are_titles_come_first_in_beam_order():
    # The nearest title to the first text is East; texts 2 and 4 are titles, one of them written twice.
    assert order(["east", "North", " West ", "North"]) == ["North", "West", "East", "Far East"]
    assert order(["east", "Far  East"], distance="l2")[0] == "Far East"


def test_blank_texts_are_passed_over_and_nothing_but_blanks_is_a_tie():
    assert order(["", "  ", "east"]) == order(["east"])
    (scores,) = grounding.ground_texts([["", " "]], CARDINAL, encode(CARDINAL), encode)
    assert scores.tolist() == [0.0] * 4
    assert order([""]) == CARDINAL


def test_popularity_is_injected_as_in_bigrec():
    # D~ = (D - min) / (max - min) of 3.0017, 2.7586, 7.0576, 1.0050; C~ = 1, 0, 1/3, 0.
    far = np.array([math.hypot(3, 0.1), math.hypot(2, 1.9), math.hypot(7, 0.9), math.hypot(1, 0.1)])
    near = (far - far.min()) / (far.max() - far.min())
    popular = torch.tensor([4.0, 1.0, 2.0, 1.0])
    factors = grounding.boost_factors(popular, 2.0)
    (scores,) = grounding.ground_texts([["east"]], CARDINAL, encode(CARDINAL), encode, "l2", factors)
    np.testing.assert_allclose(-scores, near * np.array([2.0, 1.0, 4 / 3, 1.0]) ** -2.0, atol=1e-6)
    assert order(["east"], distance="l2", factors=factors) == ["East", "West", "North", "Far East"]
    # A row of its own for each example, and a popularity without differences changes no order.
    both = torch.stack([popular, torch.ones(4)])
    own = grounding.boost_factors(both, 2.0)
    first, second = grounding.ground_texts([["east"], ["east"]], CARDINAL, encode(CARDINAL), encode, "l2", own)
    torch.testing.assert_close(first, scores)
    np.testing.assert_allclose(-second, near, atol=1e-6)


def test_a_bare_text_is_refused_because_its_first_element_is_a_character():
    with pytest.raises(StudyError, match="not one text"):
        grounding.ground_texts(["east"], CARDINAL, encode(CARDINAL), encode)


# --- encoders and generation ---


def test_the_backbones_own_encoder_is_the_last_tokens_state(tiny):
    model, tokenizer = tiny
    texts = ["Zero", "Comet, The (1995)", "The Rusted Moon"]
    vectors = grounding.state_encoder(model, tokenizer, batch_size=2)(texts)
    for text, vector in zip(texts, vectors, strict=True):
        states = model.get_decoder()(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state
        torch.testing.assert_close(vector, states[0, -1].detach(), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def sentence_model(tmp_path_factory):
    """A small random BERT with mean pooling, in the format of sentence-transformers."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("bert")
    words = sorted({word for title in TITLES for word in title.lower().replace(",", " , ").split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(words) + 5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
    ).save_pretrained(folder / "bert")
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder / "bert")
    body = Transformer(str(folder / "bert"))
    SentenceTransformer(modules=[body, Pooling(16)]).save(str(folder / "model"))
    return folder / "model"


def test_any_sentence_encoder_serves(sentence_model, catalogue, tiny, rows, writes):
    from sentence_transformers import SentenceTransformer

    texts = [row["prompt"] for row in rows[:3]]
    answers = ["Silent Harbor at Nine", "The Moon", "Laughing Crown"]
    writes(tiny[1], dict(zip(texts, [[answer] for answer in answers], strict=True)))
    found = RANKERS["embedding"](*tiny, catalogue, texts, [10, 11, 12], 12, 2, encoder=sentence_model, distance="l2")
    model = SentenceTransformer(str(sentence_model))
    titles = model.encode(catalogue.titles)
    for row, answer in enumerate(answers):
        far = np.linalg.norm(titles - model.encode([answer]), axis=1)
        np.testing.assert_allclose(-found.scores[row], np.sort(far), atol=1e-4)
        np.testing.assert_allclose(far[found.items[row] - 10], np.sort(far), atol=1e-4)


def test_a_missing_sentence_encoder_is_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(StudyError, match="no sentence encoder could be loaded from"):
        grounding.sentence_encoder(str(tmp_path / "nowhere"))
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(StudyError, match=r"pip install '.\[embedding\]'"):
        grounding.sentence_encoder("any")


def test_greedy_texts_are_the_models_most_probable_tokens(tiny, untied, rows):
    """Whatever sampling the checkpoint's own settings ask for, and whatever the other prompts of the batch are."""
    tokenizer = tiny[1]
    untied.generation_config.update(do_sample=True, temperature=3.0, top_k=3, top_p=0.5)
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows[:3]])
    found = grounding.generate_texts(untied, tokenizer, prompts, beams=1, max_new_tokens=5)
    for prompt, (text,) in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(5):
            with torch.inference_mode():
                ids.append(int(untied(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()
    several = grounding.generate_texts(untied, tokenizer, prompts, beams=3, max_new_tokens=5)
    assert [len(texts) for texts in several] == [3, 3, 3] and len(set(several[0])) > 1


# --- the embedding ranker ---


def test_titles_with_commas_and_points_are_matched_whole(catalogue, tiny, rows, writes):
    texts = [row["prompt"] for row in rows[:3]]
    written = [["Comet, The (1995)"], ["nothing of the kind", "Über die Brücke"], ["", " "]]
    prompts = writes(tiny[1], dict(zip(texts, written, strict=True)))
    found = RANKERS["embedding"](*tiny, catalogue, texts, [18, 17, 15], 12, 2)
    assert found.items[0, 0] == 18 and found.items[1, 0] == 17
    assert found.rank.tolist() == [0, 0, 11]  # nothing written: all titles tie, and ties count against the target
    assert found.items[2].tolist() == list(range(10, 22))
    assert found.exact.tolist() == [1.0, 0.5, 0.0] and found.texts == written
    assert sorted(prompts) == sorted(texts)


def test_prompts_are_never_cut_at_their_end(catalogue, tiny, writes):
    tokenizer = tiny[1]
    model = small_model("llama", len(tokenizer))
    model.config.max_position_embeddings = 64
    long = prompt_text(["Zero"] * 100)

    class Everything(dict):
        def __missing__(self, key):
            return ["Zero"]

    seen = writes(tokenizer, Everything())
    RANKERS["embedding"](model, tokenizer, catalogue, [long], [10], 3, 1)
    assert len(seen[0]) < len(long) and seen[0].endswith("Zero\nNext:") and seen[0].startswith("Chosen so far: Zero;")


def test_targets_outside_the_catalogue_are_refused_not_skipped(catalogue, tiny, rows):
    with pytest.raises(StudyError, match="rank only examples whose items it holds"):
        RANKERS["embedding"](*tiny, catalogue, [rows[0]["prompt"], rows[1]["prompt"]], [10, 99], 3, 2)


# --- candidates ---


@pytest.mark.parametrize(
    ("text", "named", "contained"),
    [
        ("Alien Nation", ["Alien Nation"], ["Alien", "Alien Nation"]),
        ("I say Alien.", ["Alien"], ["Alien"]),
        ("Alien Nation or Alien", ["Alien Nation", "Alien"], ["Alien", "Alien Nation"]),
        ("Aliens", [], ["Alien"]),
        ("What? (1990)", ["What? (1990)"], ["What? (1990)"]),
        ("alien", [], []),
        ("", [], []),
    ],
)
def test_which_titles_a_text_names(text, named, contained):
    titles = ["Alien", "Alien Nation", "What? (1990)", "Alien"]
    assert grounding.named_titles(text, titles) == named
    assert grounding.contained_titles(text, titles) == contained


def test_hits_and_valid_answers_are_shares_of_all_examples():
    titles = [["Alien", "Alien Nation"]] * 5
    answers = ["Alien Nation", "Alien", "Alien", "none of them", ""]
    found = grounding.answer_measures(answers, titles, ["Alien Nation", "Alien", "Alien Nation", "Alien", "Alien"])
    assert found["valid"].tolist() == [True, True, True, False, False]
    assert found["hit"].tolist() == [True, True, False, False, False]
    assert found["source_valid"].tolist() == [False, True, True, False, False]
    assert found["source_hit"].tolist() == [False, True, False, False, False]
    assert found["hit"].mean() == pytest.approx(2 / 5)


def test_candidates_are_ranked_by_likelihood(catalogue, tiny, untied, rows):
    texts, targets = [row["prompt"] for row in rows[:3]], [10, 15, 21]
    listed = [[10, 12, 14, 14], [11, 15, 13, 20], [21, 10, 12, 17]]  # the first list has three distinct candidates
    found = RANKERS["candidates"](untied, tiny[1], catalogue, texts, targets, 20, 2, candidates=listed)
    assert found.items.shape == (3, 3) and found.texts == [] and found.hit.size == 0
    for row, prompt in enumerate(encode_prompts(tiny[1], texts)):
        free, _ = plain_forwards.logps(untied, prompt, catalogue.responses)
        items = np.array(sorted(set(listed[row])))
        values = plain_forwards.normalised(free[items - 10])
        best = np.argsort(-values)
        assert found.items[row].tolist() == items[best][:3].tolist()
        np.testing.assert_allclose(found.scores[row], values[best][:3], atol=1e-4)
        place = items.tolist().index(targets[row])
        assert found.rank[row] == best.tolist().index(place)
        assert found.target_logp[row] == pytest.approx(values[place], abs=1e-4)


def test_greedy_answers_stand_beside_the_likelihoods(catalogue, tiny, rows, writes):
    texts = [row["prompt"] for row in rows[:3]]
    writes(tiny[1], dict(zip(texts, [["Silent Harbor Nights"], ["Zero it is"], ["?"]], strict=True)))
    listed = [[12, 13, 21], [12, 13, 21], [12, 13, 21]]
    found = RANKERS["candidates"](*tiny, catalogue, texts, [13, 12, 21], 3, 2, candidates=listed, texts=True)
    assert found.texts == ["Silent Harbor Nights", "Zero it is", "?"]
    assert found.valid.tolist() == [True, True, False] and found.hit.tolist() == [True, False, False]
    assert found.source_valid.tolist() == [False, True, False] and found.source_hit.tolist() == [False] * 3


def test_drawn_candidates_hold_the_target_once_and_follow_the_seed(catalogue, tiny, rows):
    targets = np.arange(12).repeat(50)
    listed = grounding.random_candidates(targets, 12, 5, np.random.default_rng(0))
    assert all(row.count(target) == 1 and len(set(row)) == 5 for row, target in zip(listed, targets, strict=True))
    assert listed == grounding.random_candidates(targets, 12, 5, np.random.default_rng(0))
    others = np.bincount([item for row, target in zip(listed, targets, strict=True) for item in row if item != target])
    assert len(others) == 12 and others.min() > 150 and others.max() < 250  # 200 each
    assert len({row.index(target) for row, target in zip(listed, targets, strict=True)}) == 5
    texts, items = [rows[0]["prompt"]] * 12, list(range(10, 22))
    one, two = (RANKERS["candidates"](*tiny, catalogue, texts, items, 4, 5, count=4, seed=seed) for seed in (0, 1))
    assert one.items.shape == (12, 4) and not np.array_equal(one.items, two.items)


def test_candidates_must_hold_the_target(catalogue, tiny, rows):
    arguments = (*tiny, catalogue, [rows[0]["prompt"]], [10], 3, 1)
    with pytest.raises(StudyError, match="target of example 0 is not among its candidates"):
        RANKERS["candidates"](*arguments, candidates=[[11, 12]])
    with pytest.raises(StudyError, match="candidate item 99 is not in the catalogue"):
        RANKERS["candidates"](*arguments, candidates=[[10, 99]])
