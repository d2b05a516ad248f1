"""Ranking: the trie, beam search against the exact distribution over a small catalogue, and recommend."""

import numpy as np
import pandas as pd
import plain_forwards
import pytest
import torch
from conftest import TITLES, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from causaldpo_lib.backbone import save_checkpoint, train_tokenizer
from causaldpo_lib.beam import assisted_steps, beam_search, dead_nodes, in_order
from causaldpo_lib.catalogue import build_trie, read_catalogue
from causaldpo_lib.causal import Backdoor, with_environment
from causaldpo_lib.decoding import read_prompts, title_logps
from causaldpo_lib.errors import StudyError
from causaldpo_lib.prompts import SEPARATOR, encode_prompts, prompt_text
from causaldpo_lib.ranking import (
    CATALOGUE_FILE,
    RANKERS,
    Catalogue,
    Ranking,
    agreement,
    environment_information,
    rank_scores,
    recommend,
)

BEAMS = ["beam", "beam_normalised"]


@pytest.fixture(scope="module")
def catalogue(items, tiny):
    return Catalogue.build(items, tiny[1])


@pytest.fixture(scope="module")
def untied(tiny):
    """A random model whose output layer is its own, so that title probabilities are not dominated by the input."""
    return small_model("llama", len(tiny[1])).eval()


@pytest.fixture(scope="module")
def prompts(tiny, rows):
    return encode_prompts(tiny[1], [row["prompt"] for row in rows[:5]])


# --- the trie ---


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.integers(5, 8), max_size=5), min_size=1, max_size=12, unique_by=tuple))
def test_trie_holds_exactly_the_prefixes(titles):
    titles = [[*ids, 2] for ids in titles]
    trie = build_trie(titles)
    prefixes = {tuple(ids[:n]) for ids in titles for n in range(len(ids) + 1)}
    names = {0: ()}
    for node in range(len(trie.leaf)):  # parents come before children
        for child in range(trie.start[node], trie.start[node + 1]):
            names[child] = (*names[node], int(trie.tokens[child]))
    assert sorted(names) == list(range(len(trie.leaf))) and set(names.values()) == prefixes
    assert all(len(name) == trie.depth[node] for node, name in names.items())
    for position, ids in enumerate(titles):
        path = [node for node in trie.paths[position].tolist() if node]
        assert [names[node] for node in path] == [tuple(ids[: n + 1]) for n in range(len(ids))]
        assert trie.leaf[path[-1]] == position
    assert (trie.leaf >= 0).sum() == len(titles)
    owner, child = trie.children(torch.arange(len(trie.leaf)))
    assert [(names[a], names[b]) for a, b in zip(owner.tolist(), child.tolist(), strict=True)] == [
        (names[node][:-1], names[node]) for node in range(1, len(trie.leaf))
    ]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.lists(st.integers(5, 7), max_size=4), min_size=2, max_size=9, unique_by=tuple),
    st.lists(st.integers(0, 8), max_size=9),
)
def test_dead_nodes_lead_to_masked_titles_only(titles, masked):
    titles = [[*ids, 2] for ids in titles]
    masked = [position % len(titles) for position in masked]
    trie = build_trie(titles)
    (dead,) = dead_nodes(trie, [masked])
    for node in range(1, len(trie.leaf)):
        below = {row for row, path in enumerate(trie.paths.tolist()) if node in path}
        assert bool(dead[node]) == (below <= set(masked))


# --- beam search ---


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2"])
def test_full_width_beam_is_the_exact_distribution(architecture, catalogue, tiny, prompts):
    model = small_model(architecture, len(tiny[1])).eval()
    with torch.inference_mode():
        reading = read_prompts(model, prompts[:3], tiny[1].pad_token_id)
        found, scores = beam_search([reading], torch.zeros(1), catalogue.trie, 50)
        mean, means = beam_search([reading], torch.zeros(1), catalogue.trie, 50, normalise_length=True)
        listed = title_logps(reading, torch.arange(12).expand(3, -1), catalogue.trie, constrained=True)
    lengths = np.array([len(ids) for ids in catalogue.responses])
    assert found.shape == (3, 12)
    for row, prompt in enumerate(prompts[:3]):
        _, values = plain_forwards.logps(model, prompt, catalogue.responses)
        assert np.exp(values).sum() == pytest.approx(1.0, abs=1e-5)
        assert found[row].tolist() == np.argsort(-values).tolist()
        np.testing.assert_allclose(scores[row], np.sort(values)[::-1], atol=1e-4)
        assert mean[row].tolist() == np.argsort(-values / lengths).tolist()
        np.testing.assert_allclose(means[row], np.sort(values / lengths)[::-1], atol=1e-4)
        np.testing.assert_allclose(listed[row], values, atol=1e-4)


@pytest.mark.parametrize("normalise_length", [False, True])
@pytest.mark.parametrize("width", [1, 3, 12])
def test_narrow_beams_are_distinct_sorted_and_exactly_scored(width, normalise_length, catalogue, tiny, untied, prompts):
    with torch.inference_mode():
        reading = read_prompts(untied, prompts, tiny[1].pad_token_id)
        found, scores = beam_search([reading], torch.zeros(1), catalogue.trie, width, normalise_length=normalise_length)
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    for row, prompt in enumerate(prompts):
        values = plain_forwards.logps(untied, prompt, catalogue.responses)[1]
        if normalise_length:
            values = values / [len(ids) for ids in catalogue.responses]
        assert len(set(found[row].tolist())) == width and (found[row] >= 0).all()
        np.testing.assert_allclose(scores[row], values[found[row]], atol=1e-4)


@pytest.mark.parametrize("prior", [[1.0], [0.5, 0.3, 0.2]])
def test_beams_do_what_a_search_by_dictionaries_does(prior, tiny, untied):
    """Narrow beams lose good titles behind unlikely first words: this search must lose the same, in a mixture too."""
    pad = tiny[1].pad_token_id
    titles = [[a, b, 2] for a in range(10, 16) for b in range(20, 24)]
    trie, prompts = build_trie(titles), [[1, 9 - k, 8, *range(k)] for k in range(len(prior))]
    for width in (1, 2, 5):
        beams = {(): np.zeros(len(prior))}  # log-probability of a prefix in each environment
        for depth in range(3):
            grown = {}
            for prefix, scores in beams.items():
                allowed = sorted({ids[depth] for ids in titles if tuple(ids[:depth]) == prefix})
                with torch.inference_mode():
                    logits = [untied(torch.tensor([ids + list(prefix)])).logits[0, -1].double() for ids in prompts]
                steps = torch.stack([torch.log_softmax(row[allowed], 0) for row in logits]).numpy()
                for token, values in zip(allowed, steps.T, strict=True):
                    grown[*prefix, token] = scores + values
            totals = {prefix: plain_forwards.mixed(scores[:, None], prior)[0] for prefix, scores in grown.items()}
            beams = {prefix: grown[prefix] for prefix in sorted(totals, key=lambda prefix: -totals[prefix])[:width]}
        with torch.inference_mode():
            readings = [read_prompts(untied, [ids], pad) for ids in prompts]
            found, scores = beam_search(readings, torch.tensor(prior).log(), trie, width)
        assert [tuple(titles[position]) for position in found[0].tolist()] == list(beams)
        np.testing.assert_allclose(scores[0], [totals[prefix] for prefix in beams], atol=1e-5)


def test_a_vocabulary_cut_into_blocks_changes_nothing(catalogue, tiny, untied, prompts, monkeypatch):
    def run():
        reading = read_prompts(untied, prompts, tiny[1].pad_token_id)
        titles = torch.arange(12).expand(5, -1)
        return [title_logps(reading, titles, catalogue.trie, constrained) for constrained in (False, True)]

    with torch.inference_mode():
        whole = run()
        monkeypatch.setattr("causaldpo_lib.decoding.BLOCK", 1000)
        for value, expected in zip(run(), whole, strict=True):
            torch.testing.assert_close(value, expected)


def test_equal_scores_stand_in_catalogue_order():
    positions, scores = torch.tensor([[7, 2, 9, 4]]), torch.tensor([[0.5, 1.0, 0.5, 0.5]])
    assert in_order(positions, scores)[0].tolist() == [[2, 4, 7, 9]]
    assert in_order(positions, scores)[1].tolist() == [[1.0, 0.5, 0.5, 0.5]]


# --- what all rankers share ---


@pytest.mark.parametrize("name", RANKERS)
def test_lists_and_ranks_do_not_depend_on_batching(name, catalogue, tiny, rows):
    model, tokenizer = tiny
    texts, targets = [row["prompt"] for row in rows], [10 + i % 12 for i in range(24)]
    whole = RANKERS[name](model, tokenizer, catalogue, texts, targets, 4, 24)
    parts = RANKERS[name](model, tokenizer, catalogue, texts, targets, 4, 5)
    np.testing.assert_array_equal(whole.items, parts.items)
    np.testing.assert_array_equal(whole.rank, parts.rank)
    np.testing.assert_allclose(whole.target_logp, parts.target_logp, atol=1e-4)
    assert whole.items.shape == whole.scores.shape == (24, 4)
    assert (whole.scores[:, :-1] >= whole.scores[:, 1:]).all() and (whole.target_logp < 0).all()
    for row, target in enumerate(targets):
        listed = whole.items[row].tolist()
        assert len(set(listed)) == 4
        assert whole.rank[row] == listed.index(target) if target in listed else whole.rank[row] >= 4


@pytest.mark.parametrize("name", RANKERS)
def test_a_catalogue_shorter_than_the_list_is_listed_whole(name, catalogue, tiny, rows, items):
    found = RANKERS[name](*tiny, catalogue, [rows[0]["prompt"]], [15], 50, 4)
    assert sorted(found.items[0].tolist()) == items["item"].tolist()
    assert found.items[0, found.rank[0]] == 15


@pytest.mark.parametrize("name", RANKERS)
def test_no_prompts_give_empty_lists(name, catalogue, tiny):
    found = RANKERS[name](*tiny, catalogue, [], [], 4, 4)
    assert found.items.shape == (0, 4) and found.rank.shape == found.target_logp.shape == (0,)


@pytest.mark.parametrize("name", RANKERS)
def test_bad_arguments_are_one_sentence(name, catalogue, tiny, rows):
    prompt = rows[0]["prompt"]
    with pytest.raises(StudyError, match="target item 99 is not in the catalogue of 12 items"):
        RANKERS[name](*tiny, catalogue, [prompt], [99], 2, 1)
    with pytest.raises(StudyError, match="k = 0 asks for lists without items"):
        RANKERS[name](*tiny, catalogue, [prompt], [10], 0, 1)
    broken = small_model("llama", len(tiny[1]))
    torch.nn.init.constant_(broken.get_decoder().norm.weight, float("nan"))
    with pytest.raises(StudyError, match="not numbers"):
        RANKERS[name](broken, tiny[1], catalogue, [prompt], [10], 2, 1)


@pytest.mark.parametrize("name", ["beam", "likelihood"])
def test_a_title_that_breaks_the_model_is_noticed(name, catalogue, tiny, rows):
    broken = small_model("llama", len(tiny[1]))
    inner = catalogue.responses[TITLES.index("Zero")][0]
    torch.nn.init.constant_(broken.get_input_embeddings().weight[inner], float("nan"))
    with pytest.raises(StudyError, match="not numbers"):
        RANKERS[name](broken, tiny[1], catalogue, [rows[0]["prompt"]], [10], 12, 1)


@pytest.mark.parametrize("name", ["beam", "beam_normalised", "likelihood", "embedding"])
def test_masked_items_leave_the_list_and_the_others_keep_their_scores(name, catalogue, tiny, untied, rows):
    texts, targets = [row["prompt"] for row in rows[:4]], [10, 11, 12, 13]
    masked = [[11, 10], [], [21, 21, 20], [10, 12, 14, 16, 18, 20]]
    arguments = (untied, tiny[1], catalogue, texts, targets)
    exhaustive = {"width": 12} if name in BEAMS else {}
    full, part = RANKERS[name](*arguments, 12, 3), RANKERS[name](*arguments, 6, 3, masked=masked, **exhaustive)
    for row, hidden in enumerate(masked):
        keep = ~np.isin(full.items[row], hidden)
        assert part.items[row].tolist() == full.items[row][keep][:6].tolist()
        np.testing.assert_allclose(part.scores[row], full.scores[row][keep][:6], atol=1e-5)
    assert part.rank[0] == 12  # its target is masked: a miss
    assert part.rank[1] == full.rank[1] or (name in BEAMS and full.rank[1] >= 6 and part.rank[1] == 12)
    np.testing.assert_allclose(part.target_logp, full.target_logp, atol=1e-5)
    with pytest.raises(StudyError, match="masking leaves 6 titles for an example: set k to 6 or less"):
        RANKERS[name](*arguments, 7, 3, masked=masked)
    with pytest.raises(StudyError, match="masked item 99 is not in the catalogue"):
        RANKERS[name](*arguments, 6, 3, masked=[[99], [], [], []])


@pytest.mark.parametrize("name", RANKERS)
def test_a_long_history_loses_its_oldest_titles(name, catalogue, tiny):
    tokenizer = tiny[1]
    model = small_model("llama", len(tokenizer))
    long, short = prompt_text(["Zero"] * 200 + ["Paper Tigers"]), prompt_text(["Zero"] * 2 + ["Paper Tigers"])
    # As many tokens as the short prompt and the longest title need.
    model.config.max_position_embeddings = len(tokenizer(short)["input_ids"]) + catalogue.trie.paths.shape[1]
    cut, whole = (RANKERS[name](model, tokenizer, catalogue, [text], [10], 4, 1) for text in (long, short))
    np.testing.assert_array_equal(cut.items, whole.items)
    np.testing.assert_allclose(cut.target_logp, whole.target_logp, atol=1e-5)
    assert SEPARATOR in short


def test_wider_beams_find_more_of_the_exact_list(catalogue, tiny, untied, rows):
    arguments = (untied, tiny[1], catalogue, [row["prompt"] for row in rows], [10] * 24, 2, 8)
    exact = RANKERS["likelihood"](*arguments, constrained=True)
    narrow, wide = RANKERS["beam"](*arguments), RANKERS["beam"](*arguments, width=12)
    np.testing.assert_array_equal(wide.items, exact.items)
    np.testing.assert_allclose(wide.scores, exact.scores, atol=1e-4)
    assert wide.items.shape == (24, 2) and agreement(wide, exact) == {"overlap": 1.0, "kendall_tau": 1.0}
    assert agreement(exact, narrow)["overlap"] <= 1.0


def test_agreement_by_hand():
    def lists(*rows):
        return Ranking(np.array(rows), np.zeros((len(rows), 3)), np.zeros(len(rows)), np.zeros(len(rows)))

    # Row 0: two of three in common, in the opposite order; row 1: one in common, which has no order.
    assert agreement(lists([1, 2, 3], [4, 5, 6]), lists([2, 1, 9], [9, 8, 4])) == {
        "overlap": pytest.approx((2 / 3 + 1 / 3) / 2),
        "kendall_tau": -1.0,
    }
    # 1 2 3 against 2 1 3: one of three pairs is discordant.
    assert agreement(lists([1, 2, 3]), lists([2, 1, 3]))["kendall_tau"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", RANKERS)
def test_models_that_do_not_take_masks_and_positions_are_refused(name, catalogue, tiny, rows, monkeypatch):
    from transformers import BloomConfig, BloomForCausalLM

    arguments = (tiny[1], catalogue, [row["prompt"] for row in rows[:3]], [10] * 3, 4, 4)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=len(tiny[1]), hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(StudyError, match="BloomForCausalLM does not take the masks"):
        RANKERS[name](bloom, *arguments)
    # One that takes positions without complaint and counts its own.
    deaf = small_model("llama", len(tiny[1]))
    for parameter in deaf.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    forward = deaf.get_decoder().forward
    monkeypatch.setattr(deaf.get_decoder(), "forward", lambda position_ids=None, **kwargs: forward(**kwargs))
    with pytest.raises(StudyError, match=r"LlamaForCausalLM does not take the masks .*instead of"):
        RANKERS[name](deaf, *arguments)


def test_models_that_rescale_their_logits_are_refused_and_why(catalogue, tiny, rows):
    from transformers import CohereConfig, CohereForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    cohere = CohereForCausalLM(CohereConfig(vocab_size=len(tiny[1]), logit_scale=1 / 16, **shape))
    with pytest.raises(StudyError, match=r"CohereForCausalLM does not take .* or rescales its logits"):
        RANKERS["beam"](cohere, tiny[1], catalogue, [rows[0]["prompt"]], [10], 4, 4)


# --- mixtures over environments ---


@pytest.mark.parametrize("name", ["beam", "likelihood", "candidates"])
def test_a_mixture_over_environments_is_exact(name, catalogue, tiny, untied, rows):
    tokenizer = tiny[1]
    mixture = Backdoor([[30, 31], [40, 41], [50, 51]], [0.5, 0.3, 0.2])
    texts, targets = [row["prompt"] for row in rows[:3]], [10, 15, 21]
    found = RANKERS[name](untied, tokenizer, catalogue, texts, targets, 12, 2, mixture=mixture)
    for row, prompt in enumerate(encode_prompts(tokenizer, texts)):
        free, constrained = zip(
            *(
                plain_forwards.logps(
                    untied, with_environment(prompt, tokens, tokenizer.bos_token_id), catalogue.responses
                )
                for tokens in mixture.tokens
            ),
            strict=True,
        )
        values = plain_forwards.mixed(constrained if name == "beam" else free, mixture.prior)
        values = plain_forwards.normalised(values)
        assert found.items[row].tolist() == (10 + np.argsort(-values)).tolist()
        np.testing.assert_allclose(found.scores[row], np.sort(values)[::-1], atol=1e-4)
        assert found.target_logp[row] == pytest.approx(values[targets[row] - 10], abs=1e-4)


@pytest.mark.parametrize("normalise_length", [False, True])
def test_narrow_beams_of_a_mixture_are_scored_by_the_mixture(normalise_length, catalogue, tiny, untied, rows):
    mixture = Backdoor([[30], [40]], [0.9, 0.1])
    arguments = (untied, tiny[1], catalogue, [row["prompt"] for row in rows[:4]], [10] * 4)
    narrow = RANKERS["beam"](*arguments, 3, 4, mixture=mixture, normalise_length=normalise_length)
    full = RANKERS["beam"](*arguments, 12, 4, mixture=mixture)
    lengths = np.array([len(ids) if normalise_length else 1 for ids in catalogue.responses])
    for row in range(4):
        exact = full.scores[row] / lengths[full.items[row] - 10]
        scores = dict(zip(full.items[row].tolist(), exact.tolist(), strict=True))
        assert len(set(narrow.items[row].tolist())) == 3
        np.testing.assert_allclose(narrow.scores[row], [scores[item] for item in narrow.items[row]], atol=1e-4)


@pytest.mark.parametrize("name", BEAMS)
def test_masked_items_stay_out_of_a_mixtures_wide_beams(name, catalogue, tiny, untied, rows):
    """Beams wider than what masking leaves: their void ends are neither listed nor in the way of what is."""
    mixture = Backdoor([[30], [40]], [0.6, 0.4])
    masked = [[10, 12, 14, 16, 18, 20], [], [21, 20, 19, 18, 17], [10]]
    arguments = (untied, tiny[1], catalogue, [row["prompt"] for row in rows[:4]], [11] * 4)
    full = RANKERS[name](*arguments, 12, 3, mixture=mixture)
    for width in (6, 9, 12):
        part = RANKERS[name](*arguments, 6, 3, mixture=mixture, masked=masked, width=width)
        for row, hidden in enumerate(masked):
            keep = ~np.isin(full.items[row], hidden)
            if width >= keep.sum():  # else the search may lose titles on the way
                assert part.items[row].tolist() == full.items[row][keep][:6].tolist()
                np.testing.assert_allclose(part.scores[row], full.scores[row][keep][:6], atol=1e-4)
            assert not set(part.items[row].tolist()) & set(hidden) and np.isfinite(part.scores[row]).all()


def test_information_about_the_environment_is_what_titles_say_about_it(catalogue, tiny, rows):
    model = small_model("llama", len(tiny[1])).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    texts, prior = [row["prompt"] for row in rows[:3]], np.array([0.5, 0.3, 0.2])
    mixture = Backdoor([[30, 31], [40, 41], [50, 51]], prior.tolist())
    expected = []
    for prompt in encode_prompts(tiny[1], texts):
        ids = [with_environment(prompt, tokens, tiny[1].bos_token_id) for tokens in mixture.tokens]
        free = [plain_forwards.logps(model, each, catalogue.responses)[0] for each in ids]
        p = np.exp([plain_forwards.normalised(values) for values in free])
        expected.append(prior @ (p * np.log(p / (prior @ p))).sum(1))
    found = environment_information(model, tiny[1], catalogue, texts, 2, mixture)
    assert found == pytest.approx(np.mean(expected), abs=1e-5) and found > 1e-4
    alike = Backdoor([[30, 31]] * 3, prior.tolist())
    assert environment_information(model, tiny[1], catalogue, texts, 2, alike) == pytest.approx(0, abs=1e-6)


def test_a_mixture_of_one_environment_is_that_environment(catalogue, tiny, untied, rows):
    tokens = encode_prompts(tiny[1], [""])[0][1:] or [30]
    one = Backdoor([tokens], [1.0])
    texts = [rows[0]["prompt"]]
    mixed = RANKERS["beam"](untied, tiny[1], catalogue, texts, [10], 5, 1, mixture=one)
    with torch.inference_mode():
        (prompt,) = encode_prompts(tiny[1], texts)
        reading = read_prompts(untied, [with_environment(prompt, tokens, tiny[1].bos_token_id)], 0)
        found, scores = beam_search([reading], torch.zeros(1), catalogue.trie, 5)
    assert (mixed.items[0] - 10).tolist() == found[0].tolist()
    np.testing.assert_allclose(mixed.scores[0], scores[0], atol=1e-5)


def test_rankers_that_write_text_refuse_a_mixture(catalogue, tiny, rows):
    arguments = (*tiny, catalogue, [rows[0]["prompt"]], [10], 4, 1)
    with pytest.raises(StudyError, match="rank this checkpoint by 'beam' or 'likelihood'"):
        RANKERS["embedding"](*arguments, mixture=Backdoor([[30]], [1.0]))
    with pytest.raises(StudyError, match="rank this checkpoint by 'beam' or 'likelihood'"):
        RANKERS["candidates"](*arguments, mixture=Backdoor([[30]], [1.0]), texts=True)


# --- catalogues ---


def test_bad_catalogues_are_named(tiny):
    tokenizer = tiny[1]
    with pytest.raises(StudyError, match="catalogue is empty"):
        build_trie([])
    with pytest.raises(StudyError, match="catalogue is empty"):
        Catalogue.build(pd.DataFrame({"item": [], "title": []}), tokenizer)
    with pytest.raises(StudyError, match="rows 0 and 2 have the same tokens"):
        build_trie([[5, 2], [4, 2], [5, 2]])
    for title in ("", "Zero</s>Nine"):
        table = pd.DataFrame({"item": [1], "title": [title]})
        if title:
            with pytest.raises(StudyError, match="cannot express the title 'Zero</s>Nine'"):
                Catalogue.build(table, tokenizer)
    words = train_tokenizer(["Zero"], vocabulary=300)
    words.add_special_tokens({"unk_token": "<s>"})
    with pytest.raises(StudyError, match="cannot express the title 'A<s>'"):
        Catalogue.build(pd.DataFrame({"item": [1], "title": ["A<s>"]}), words)


@pytest.mark.parametrize(
    ("written", "read"),
    [(["12", "7"], [12, 7]), (["0195153448", "7"], ["0195153448", "7"]), (["B00X", "7"], ["B00X", "7"])],
)
def test_ids_and_titles_are_read_as_written(tmp_path, written, read):
    pd.DataFrame({"item": written, "title": ["1984", "NA"]}).to_csv(tmp_path / CATALOGUE_FILE, index=False)
    items = read_catalogue(tmp_path)
    assert items["item"].tolist() == read and items["title"].tolist() == ["1984", "NA"]


# --- recommend ---


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny, items):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(*tiny, folder)
    items.to_csv(folder / CATALOGUE_FILE, index=False)
    return folder


def test_recommend_takes_titles_or_ids_and_suggests_near_titles(tmp_path, checkpoint, items):
    found, scores = recommend(checkpoint, ["Silent Harbor", "Zero"], k=5)
    assert recommend(checkpoint, [12, 21], k=5) == (found, scores)
    assert len(set(found)) == 5 and set(found) <= set(items["item"]) and scores == sorted(scores, reverse=True)
    assert len(recommend(checkpoint, [12], k=99)[0]) == 12
    with pytest.raises(StudyError, match=r"'Silent Harbour' is neither .*\['Silent Harbor'"):
        recommend(checkpoint, ["Silent Harbour"])
    with pytest.raises(StudyError, match=r"'12345678' is neither an item id nor a title .*no title is near it"):
        recommend(checkpoint, ["12345678"])
    with pytest.raises(StudyError, match=r"catalogue.csv does not exist"):
        recommend(tmp_path / "nowhere", ["Zero"])
    with pytest.raises(StudyError, match="is one text: give a list"):
        recommend(checkpoint, "Zero")
    with pytest.raises(StudyError, match="k = 0"):
        recommend(checkpoint, ["Zero"], k=0)
    with pytest.raises(StudyError, match="choose from beam, beam_normalised, likelihood, embedding"):
        recommend(checkpoint, ["Zero"], ranker="candidates")


@pytest.mark.parametrize("ranker", [name for name in RANKERS if name != "candidates"])
def test_recommend_ranks_as_its_ranker_does(ranker, checkpoint, tiny, catalogue):
    found, scores = recommend(checkpoint, ["Zero"], k=3, ranker=ranker)
    expected = RANKERS[ranker](*tiny, catalogue, [prompt_text(["Zero"])], [10], 12, 1)
    assert found == expected.items[0, :3].tolist() and scores == pytest.approx(
        expected.scores[0, :3].tolist(), abs=1e-4
    )


def test_recommend_mixes_the_environments_of_a_checkpoint(tmp_path, tiny, items, catalogue):
    save_checkpoint(*tiny, tmp_path)
    items.to_csv(tmp_path / CATALOGUE_FILE, index=False)
    mixture = Backdoor([[30, 31], [40, 41]], [0.5, 0.5])
    mixture.save(tmp_path)
    _, scores = recommend(tmp_path, ["Zero"], k=12, ranker="likelihood")
    expected = RANKERS["likelihood"](*tiny, catalogue, [prompt_text(["Zero"])], [10], 12, 1, mixture=mixture)
    assert scores == pytest.approx(expected.scores[0].tolist(), abs=1e-4)
    plain = RANKERS["likelihood"](*tiny, catalogue, [prompt_text(["Zero"])], [10], 12, 1)
    assert not np.allclose(plain.scores, expected.scores, atol=1e-3)


# --- an assistant in the search ---


def test_assisted_steps_add_up_to_the_assistants_log_probability(catalogue):
    logps = torch.log_softmax(torch.randn(3, len(catalogue.items), generator=torch.Generator().manual_seed(0)), -1)
    steps = assisted_steps(logps, catalogue.trie)
    found = torch.stack([sum(steps[:, node] for node in path if node) for path in catalogue.trie.paths.tolist()], 1)
    torch.testing.assert_close(found, logps, atol=1e-5, rtol=1e-4)
    for node in range(len(catalogue.trie.leaf)):  # the shares of a node's children sum to 1
        begin, end = catalogue.trie.start[node], catalogue.trie.start[node + 1]
        if begin < end:
            assert steps[:, begin:end].exp().sum(1) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("mixture", [None, Backdoor([[30], [40]], [0.7, 0.3])])
def test_an_assisted_beam_finds_the_products_order(mixture, untied, tiny, catalogue, rows):
    texts, targets = [row["prompt"] for row in rows[:4]], catalogue.items[:4].tolist()
    logps = torch.log_softmax(3 * torch.randn(4, 12, generator=torch.Generator().manual_seed(1)), -1).numpy()
    arguments = untied, tiny[1], catalogue, texts, targets, 12, 2
    alone = RANKERS["beam"](*arguments, mixture=mixture)
    own = np.empty((4, 12))
    for row in range(4):
        own[row, catalogue.positions(alone.items[row], "listed")] = alone.scores[row]
    mixed = RANKERS["beam"](*arguments, mixture=mixture, assistant=logps, assistant_weight=0.3)
    product = 0.7 * own + 0.3 * logps
    np.testing.assert_array_equal(mixed.items, catalogue.items[(-product).argsort(1)])
    np.testing.assert_allclose(mixed.scores, -np.sort(-product, 1), atol=1e-4)
    np.testing.assert_allclose(mixed.target_logp, alone.target_logp)  # stays the model's own
    unmixed = RANKERS["beam"](*arguments, mixture=mixture, assistant=logps, assistant_weight=0.0)
    np.testing.assert_array_equal(unmixed.items, alone.items)


@pytest.mark.parametrize("weight", [-0.1, 1.0, 1.5])
def test_an_assistants_weight_outside_its_range_is_refused(weight, tiny, catalogue, rows):
    with pytest.raises(StudyError, match=f"assistant_weight is {weight}: give the assistant's share"):
        RANKERS["beam"](
            *(*tiny, catalogue, [rows[0]["prompt"]], [10], 4, 4), assistant=np.zeros((1, 12)), assistant_weight=weight
        )


# --- scores that are there already ---


def test_given_scores_are_ranked_by_the_same_rules():
    logps = np.log(np.array([[0.1, 0.4, 0.4, 0.1], [0.7, 0.1, 0.1, 0.1]]))
    items = np.array(["a", "b", "c", "d"])
    found = rank_scores(logps, items, np.array(["b", "d"]), 3)
    assert found.items.tolist() == [["b", "c", "a"], ["a", "b", "c"]]  # ties in catalogue order
    assert found.rank.tolist() == [1, 3]  # ties stand before the target
    assert found.target_logp == pytest.approx(np.log([0.4, 0.1]))
    masked = rank_scores(logps, items, np.array(["b", "d"]), 2, [["b"], ["a", "b"]])
    assert masked.items.tolist() == [["c", "a"], ["c", "d"]] and masked.rank.tolist() == [4, 1]
    broken = np.where(items == "d", np.nan, logps)
    assert rank_scores(broken, items, np.array(["d", "d"]), 3).rank.tolist() == [3, 3]  # no number is no hit
    with pytest.raises(StudyError, match=r"target item .*x"):
        rank_scores(logps, items, np.array(["b", "x"]), 3)
    with pytest.raises(StudyError, match="masking leaves 2 titles"):
        rank_scores(logps, items, np.array(["b", "d"]), 3, [[], ["a", "b"]])
    with pytest.raises(StudyError, match="the masked item 'x' is not in the catalogue"):
        rank_scores(logps, items, np.array(["b", "d"]), 2, [[], ["a", "x"]])
