"""The likelihood ranker: every title's exact log-probability, with each shared token computed once."""

import numpy as np
import plain_forwards
import pytest
import torch
from conftest import small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from causaldpo_lib.catalogue import Catalogue, build_trie
from causaldpo_lib.decoding import read_prompts, title_logps
from causaldpo_lib.likelihood import catalogue_logps, pieces
from causaldpo_lib.prompts import encode_prompts
from causaldpo_lib.ranking import RANKERS, catalogue_shares


@pytest.fixture(scope="module")
def catalogue(items, tiny):
    return Catalogue.build(items, tiny[1])


@pytest.fixture(scope="module")
def untied(tiny):
    return small_model("llama", len(tiny[1])).eval()


@pytest.fixture(scope="module")
def prompts(tiny, rows):
    return encode_prompts(tiny[1], [row["prompt"] for row in rows[:5]])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2"])
def test_equal_to_one_plain_forward_per_title(architecture, catalogue, tiny, prompts):
    model, trie = small_model(architecture, len(tiny[1])).eval(), catalogue.trie
    with torch.inference_mode():
        reading = read_prompts(model, prompts[:3], tiny[1].pad_token_id)
        free = catalogue_logps(reading, trie, pieces(trie, 4))
        constrained = catalogue_logps(reading, trie, pieces(trie, 4), constrained=True)
        listed = title_logps(reading, torch.tensor([[3, 0], [5, 5], [11, 2]]), trie, constrained=False)
    for row, prompt in enumerate(prompts[:3]):
        expected = plain_forwards.logps(model, prompt, catalogue.responses)
        np.testing.assert_allclose(free[row], expected[0], atol=1e-4)
        np.testing.assert_allclose(constrained[row], expected[1], atol=1e-4)
    for row, places in enumerate([[3, 0], [5, 5], [11, 2]]):
        torch.testing.assert_close(listed[row], free[row, places], atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_pieces_of_any_size_give_the_same(size, catalogue, tiny, untied, prompts):
    with torch.inference_mode():
        reading = read_prompts(untied, prompts, tiny[1].pad_token_id)
        whole = catalogue_logps(reading, catalogue.trie, pieces(catalogue.trie, 3))
        torch.testing.assert_close(catalogue_logps(reading, catalogue.trie, pieces(catalogue.trie, size)), whole)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(5, 7), max_size=5), min_size=1, max_size=12, unique_by=tuple), st.integers(1, 7))
def test_every_inner_node_is_scored_once_and_sees_its_ancestors(titles, size):
    trie = build_trie([[*ids, 2] for ids in titles])
    parent = {
        int(child): node for node in range(len(trie.leaf)) for child in range(trie.start[node], trie.start[node + 1])
    }

    def line(node):
        return {node} | (line(parent[node]) if parent[node] else set())

    parts = pieces(trie, size)
    scored = [node for part in parts for node in part.nodes[part.first :].tolist()]
    assert sorted(scored) == [node for node in range(1, len(trie.leaf)) if trie.leaf[node] < 0]
    for part in parts:
        nodes = part.nodes.tolist()
        assert len(nodes) - part.first <= size
        for row, node in enumerate(nodes):
            assert {nodes[column] for column in part.visible[row].nonzero()[:, 0].tolist()} == line(node)
            assert int(part.visible[row].sum()) == len(line(node))


def test_prompts_and_shared_prefixes_are_computed_once(catalogue, tiny, untied, rows):
    seen = []
    hook = untied.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    prompt = encode_prompts(tiny[1], [rows[0]["prompt"]])[0]
    with torch.inference_mode():
        catalogue_logps(read_prompts(untied, [prompt] * 4, 0), catalogue.trie, pieces(catalogue.trie, 1000))
    hook.remove()
    inner = {tuple(ids[:n]) for ids in catalogue.responses for n in range(1, len(ids))}
    assert sum(seen) == 4 * (len(prompt) + len(inner))
    assert len(inner) < sum(len(ids) - 1 for ids in catalogue.responses)  # prefixes are shared in this catalogue


def test_ranks_lists_and_shares_are_of_the_whole_catalogue(catalogue, tiny, untied, rows):
    texts, targets = [row["prompt"] for row in rows[:6]], [10, 12, 14, 16, 18, 20]
    found = RANKERS["likelihood"](untied, tiny[1], catalogue, texts, targets, 5, 4)
    shares = catalogue_shares(untied, tiny[1], catalogue, texts, 4)
    np.testing.assert_allclose(np.exp(shares).sum(1), 1.0, atol=1e-5)
    for row, prompt in enumerate(encode_prompts(tiny[1], texts)):
        free, constrained = plain_forwards.logps(untied, prompt, catalogue.responses)
        expected = plain_forwards.normalised(free)
        order = np.argsort(-expected)
        np.testing.assert_allclose(shares[row], expected, atol=1e-4)
        assert found.items[row].tolist() == (10 + order[:5]).tolist()
        np.testing.assert_allclose(found.scores[row], expected[order[:5]], atol=1e-4)
        assert found.rank[row] == order.tolist().index(targets[row] - 10)
        assert found.target_logp[row] == pytest.approx(expected[targets[row] - 10], abs=1e-4)
        # The two distributions differ by the mass that the trie leaves out at each step.
        assert (constrained > free).all() and not np.allclose(expected, constrained, atol=1e-3)
    steps = catalogue_shares(untied, tiny[1], catalogue, texts[:1], 4, constrained=True)[0]
    (prompt,) = encode_prompts(tiny[1], texts[:1])
    np.testing.assert_allclose(steps, plain_forwards.logps(untied, prompt, catalogue.responses)[1], atol=1e-4)


def test_ties_count_against_the_target_and_stand_in_catalogue_order(catalogue, tiny, rows):
    """A model without an opinion: a title's log-probability is its number of tokens times -log V."""
    blank = small_model("llama", len(tiny[1]))
    torch.nn.init.zeros_(blank.get_output_embeddings().weight)
    lengths = np.array([len(ids) for ids in catalogue.responses])
    order = np.lexsort((np.arange(12), lengths))
    for target in range(12):
        found = RANKERS["likelihood"](blank, tiny[1], catalogue, [rows[0]["prompt"]], [10 + target], 12, 1)
        assert found.items[0].tolist() == (10 + order).tolist()
        assert found.rank[0] == (lengths <= lengths[target]).sum() - 1
