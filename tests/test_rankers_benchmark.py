"""The ranking benchmark runs and reports a ratio per comparison; how large it is, is no test's business."""

import json

import numpy as np
import plain_forwards
import pytest
import torch
from conftest import small_model

from benchmarks import ranking
from causaldpo_lib.catalogue import Catalogue
from causaldpo_lib.prompts import encode_prompts


def test_it_reports_ratios_and_agreement(tmp_path, monkeypatch, capsys):
    sizes = ["--titles", "40", "60", "--prompts", "2", "--pairs", "4", "--rows", "32", "--repeats", "1"]
    monkeypatch.setattr("sys.argv", ["ranking", *sizes, "--output", str(tmp_path / "b.json")])
    ranking.main()
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "b.json").read_text())["catalogues"]
    assert [part["titles"] for part in found] == [40, 60]
    for part in found:
        assert len(part["ratios"]) == 4 and all(value > 0 for value in part["ratios"].values())
        assert len(part["agreement"]) == 8 and all(-1 <= value <= 1 for value in part["agreement"].values())
        # Five times the width covers these catalogues: the search is exhaustive, and equal to the exact ranking.
        assert part["agreement"][f"beam of width 100 and exact pi_C, overlap@20, {part['titles']} titles"] == 1.0
        assert all(name in printed for name in [*part["ratios"], *part["agreement"]])


def test_the_alternatives_compute_the_same(tiny, items, rows):
    """A ratio against something else that does less, or more, would mean nothing."""
    tokenizer = tiny[1]
    model = small_model("llama", len(tokenizer)).eval()
    catalogue = Catalogue.build(items, tokenizer)
    texts = [row["prompt"] for row in rows[:2]]
    lists = ranking.generated_lists(model, tokenizer, catalogue, texts, width=4)
    for prompt, found in zip(encode_prompts(tokenizer, texts), lists, strict=True):
        free, _ = plain_forwards.logps(model, prompt, catalogue.responses)
        np.testing.assert_allclose(ranking.plain_likelihoods(model, prompt, catalogue.responses), free, atol=1e-4)
        # transformers searches by the model's own log-probabilities, and fills lists up with titles ended twice.
        places = [catalogue.responses.index(ids) for ids in found if ids in catalogue.responses]
        assert len(found) == 4 and len(set(places)) == len(places) >= 2
        assert places == sorted(places, key=lambda place: -free[place])
    assert torch.get_num_threads() == 1


def test_titles_are_distinct_and_follow_the_generator():
    first = ranking.titles_like_films(500, np.random.default_rng(0))
    assert len(set(first)) == 500 and first == ranking.titles_like_films(500, np.random.default_rng(0))
    assert first != ranking.titles_like_films(500, np.random.default_rng(1))
    assert np.mean([len(title.split()) for title in first]) == pytest.approx(4.2, abs=0.5)
