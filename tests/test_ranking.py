"""Ranking: beam search against the exact distribution over a small catalogue, targets, and recommend."""

import numpy as np
import pytest
import torch
from conftest import small_model

from causaldpo_lib.backbone import save_checkpoint
from causaldpo_lib.errors import StudyError
from causaldpo_lib.prompts import encode_prompts
from causaldpo_lib.ranking import CATALOGUE_FILE, RANKERS, Catalogue, beam_search, build_trie, recommend, target_logps


@pytest.fixture(scope="module")
def catalogue(items, tiny):
    return Catalogue.build(items, tiny[1])


def exact(model, prompt, catalogue):
    """log pi_C of every title, by one ordinary forward pass per title and dictionaries for the trie."""
    allowed = {}
    for ids in catalogue.responses:
        for depth, token in enumerate(ids):
            allowed.setdefault(tuple(ids[:depth]), set()).add(token)
    values = []
    for ids in catalogue.responses:
        logits = model(torch.tensor([prompt + ids])).logits[0].detach().double()
        total = 0.0
        for depth, token in enumerate(ids):
            row = logits[len(prompt) + depth - 1]
            total += (row[token] - torch.logsumexp(row[sorted(allowed[tuple(ids[:depth])])], 0)).item()
        values.append(total)
    return np.array(values)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2"])
def test_full_width_beam_is_the_exact_distribution(architecture, catalogue, tiny, rows):
    tokenizer = tiny[1]
    model = small_model(architecture, len(tokenizer)).eval()
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows[:3]])
    found, scores = beam_search(model, prompts, catalogue.trie, 50, tokenizer.pad_token_id)
    assert found.shape == (3, 12)
    for row, prompt in enumerate(prompts):
        values = exact(model, prompt, catalogue)
        assert np.exp(values).sum() == pytest.approx(1.0, abs=1e-5)
        assert found[row].tolist() == np.argsort(-values).tolist()
        np.testing.assert_allclose(scores[row], np.sort(values)[::-1], atol=1e-4)
        logps = target_logps(model, [prompt] * 12, list(range(12)), catalogue, tokenizer.pad_token_id)
        np.testing.assert_allclose(logps, values, atol=1e-4)


@pytest.mark.parametrize("width", [1, 3, 12])
def test_narrow_beams_are_distinct_sorted_and_exactly_scored(width, catalogue, tiny, rows):
    model, tokenizer = tiny
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows[:5]])
    found, scores = beam_search(model.eval(), prompts, catalogue.trie, width, tokenizer.pad_token_id)
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    for row, prompt in enumerate(prompts):
        assert len(set(found[row].tolist())) == width and (found[row] >= 0).all()
        np.testing.assert_allclose(scores[row], exact(model, prompt, catalogue)[found[row]], atol=1e-4)


@pytest.mark.parametrize("name", RANKERS)
def test_rank_finds_targets_independent_of_batching(name, catalogue, tiny, items, rows):
    model, tokenizer = tiny
    texts, targets = [row["prompt"] for row in rows], [10 + i % 12 for i in range(24)]
    whole = RANKERS[name](model, tokenizer, catalogue, texts, targets, 4, 24)
    parts = RANKERS[name](model, tokenizer, catalogue, texts, targets, 4, 5)
    np.testing.assert_array_equal(whole.items, parts.items)
    np.testing.assert_allclose(whole.target_logp, parts.target_logp, atol=1e-4)
    for row, target in enumerate(targets):
        listed = whole.items[row].tolist()
        assert whole.rank[row] == (listed.index(target) if target in listed else 12)


def test_trie_has_one_leaf_per_title(catalogue):
    leaves = catalogue.trie.leaf[catalogue.trie.leaf >= 0]
    assert sorted(leaves.tolist()) == list(range(12))
    prefixes = {tuple(ids[:n]) for ids in catalogue.responses for n in range(len(ids) + 1)}
    assert len(catalogue.trie.leaf) == len(prefixes)


def test_bad_catalogues_targets_and_models_are_named(catalogue, tiny, items):
    model, tokenizer = tiny
    with pytest.raises(StudyError, match="catalogue is empty"):
        build_trie([])
    with pytest.raises(StudyError, match="rows 0 and 1 have the same tokens"):
        build_trie([[5, 2], [5, 2]])
    with pytest.raises(StudyError, match="target item 99 is not in the catalogue"):
        RANKERS["beam"](model, tokenizer, catalogue, ["x"], [99], 2, 1)
    broken = small_model("llama", len(tokenizer))
    torch.nn.init.constant_(broken.get_decoder().norm.weight, float("nan"))
    with pytest.raises(StudyError, match="not numbers"):
        beam_search(broken, [[1, 5]], catalogue.trie, 2, 0)


def test_recommend_takes_titles_or_ids_and_suggests_near_titles(tmp_path, tiny, items):
    save_checkpoint(*tiny, tmp_path)
    items.to_csv(tmp_path / CATALOGUE_FILE, index=False)
    found, scores = recommend(tmp_path, ["Silent Harbor", "Zero"], k=5)
    assert recommend(tmp_path, [12, 21], k=5) == (found, scores)
    assert len(set(found)) == 5 and set(found) <= set(items["item"]) and scores == sorted(scores, reverse=True)
    with pytest.raises(StudyError, match=r"'Silent Harbour' is neither .*\['Silent Harbor'"):
        recommend(tmp_path, ["Silent Harbour"])
    with pytest.raises(StudyError, match=r"catalogue.csv does not exist"):
        recommend(tmp_path / "nowhere", ["Zero"])
