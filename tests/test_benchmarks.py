"""The benchmarks run and report what they say; how large the ratios are, is no test's business."""

import json

import pytest

from benchmarks import data, training
from benchmarks.training import Cell, Size, build, preference_rows, token_bound, word_tokenizer

TINY = Size(layers=1, hidden=32, batch=2, steps=2)


@pytest.mark.slow
def test_training_benchmark_reports_a_row_per_cell(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "quiet", lambda: None)
    monkeypatch.setattr(training, "cells", lambda negatives, tokens: [Cell(k, tokens[0]) for k in negatives])
    apart = training.grown_bytes_apart
    monkeypatch.setattr(
        training, "grown_bytes_apart", lambda name, cell, size: apart(name, cell, size) if name == "dpo" else 1
    )
    output = tmp_path / "training.json"
    sizes = ["--layers", "1", "--hidden", "32", "--batch", "2", "--steps", "2", "--repeats", "1"]
    training.main(["--negatives", "3", "--prompt-tokens", "12", *sizes, "--output", str(output)])
    (row,) = json.loads(output.read_text())["cells"]
    assert row["alternative"] == "padded concatenation" and row["peak_bytes"]["dpo"] > 0
    assert all(row[name] > 0 for name in ("speed_ratio", "token_bound", "causal_over_plain", "memory_ratio"))
    shown = capsys.readouterr().out
    assert "K=3  prompt 12" in shown and f"{row['speed_ratio']:.2f} x" in shown and "MiB" in shown


@pytest.mark.parametrize("cell", [Cell(0, 9), Cell(1, 9), Cell(3, 9), Cell(1, 20, mixed=True)], ids=str)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_contestants_train_on_the_same_loss(cell, tmp_path):
    """All start from one model and see the same rows, so that they differ in speed only."""
    losses = []
    for name in cell.contestants[:2]:
        trainer = build(name, cell, TINY, str(tmp_path))
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


def test_rows_have_the_lengths_that_the_table_says():
    tokenizer = word_tokenizer()
    rows = preference_rows(Cell(3, 40), 20)
    assert {len(tokenizer(row["prompt"])["input_ids"]) for row in rows} == {40}
    answers = [len(tokenizer(text)["input_ids"]) + 1 for row in rows for text in (row["chosen"], *row["rejected"])]
    assert min(answers) >= 4 and max(answers) <= 10
    mixed = {len(row["prompt"].split()) for row in preference_rows(Cell(1, 40, mixed=True), 100)}
    assert min(mixed) >= 8 and max(mixed) <= 40 and len(mixed) > 10


def test_token_bound_counts_prompts_once():
    cell, size = Cell(3, 40), Size(batch=2, steps=2)
    rows = preference_rows(cell, 4)
    answers = sum(len(text.split()) + 1 for row in rows for text in (row["chosen"], *row["rejected"]))
    assert token_bound(cell, size) == pytest.approx((4 * 4 * 40 + answers) / (4 * 40 + answers))


@pytest.mark.slow
def test_data_benchmark_reports_every_step(tmp_path, capsys, monkeypatch):
    output = tmp_path / "data.json"
    monkeypatch.setattr("sys.argv", ["data", "--sizes", "300000", "--plain-up-to", "1", "--output", str(output)])
    data.main()
    found = json.loads(output.read_text())["sizes"]["300000"]["library"]
    assert found["total"] == pytest.approx(sum(found["seconds"].values()))
    assert 0 < found["peak_gib"] < 2 and min(found["prompts"].values()) > 10_000
    assert "popularity histories" in capsys.readouterr().out
