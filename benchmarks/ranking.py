"""`make bench`: the rankers against what transformers alone offers for the same, in one run, on one thread.

``beam`` against ``generate`` with ``prefix_allowed_tokens_fn`` at the same width; ``likelihood`` against a plain
forward pass for each pair of prompt and title (prompts of ten titles, as most are; shorter ones gain less from being
read once); what twice the prompts cost; and how much of the exact top 20 beam search finds, at that width and at five
times the width. Only ratios mean anything: the seconds are this machine's. Prints a table and writes
``results/bench/ranking.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerBase, TrainingArguments

from causaldpo_lib.backbone import tiny_backbone
from causaldpo_lib.paths import RESULTS
from causaldpo_lib.prompts import encode_prompts, prompt_text, response_text
from causaldpo_lib.ranking import RANKERS, Catalogue, Ranking, agreement
from causaldpo_lib.records import versions
from causaldpo_lib.trainers import SupervisedTrainer

WIDTH = 20
BATCH = 16


def titles_like_films(count: int, rng: np.random.Generator) -> list[str]:
    """Distinct titles of one to five invented words with Zipf's frequencies and a year: few share a long prefix."""
    syllables = [first + second for first in "bdfgklmnprstv" for second in ("a", "e", "i", "o", "u", "ar", "en", "os")]
    words = ["".join(rng.choice(syllables, rng.integers(1, 4))).capitalize() for _ in range(4000)]
    frequency = 1.0 / np.arange(10, 10 + len(words))
    titles: dict[str, None] = {}
    while len(titles) < count:
        picked = rng.choice(words, rng.integers(1, 6), p=frequency / frequency.sum())
        article = "The " if rng.random() < 0.25 else ""
        titles[f"{article}{' '.join(picked)} ({rng.integers(1930, 2024)})"] = None
    return list(titles)


def trained_backbone(
    titles: Sequence[str], rows: int, rng: np.random.Generator
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The tiny backbone after one pass over ``rows`` examples whose targets have Zipf's frequencies."""
    model, tokenizer = tiny_backbone(titles, seed=0)
    frequency = 1.0 / np.arange(1, len(titles) + 1)
    targets = rng.choice(len(titles), rows, p=frequency / frequency.sum())
    examples = [
        {"prompt": prompt, "chosen": response_text(titles[target])}
        for prompt, target in zip(histories(titles, rng.integers(1, 11, rows), rng), targets, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            num_train_epochs=1,
            learning_rate=3e-3,
            per_device_train_batch_size=32,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        SupervisedTrainer(model, arguments, examples, tokenizer).train()
    return model.eval(), tokenizer


def histories(titles: Sequence[str], sizes: Sequence[int], rng: np.random.Generator) -> list[str]:
    """A prompt for each size: a history of so many titles."""
    return [prompt_text([titles[place] for place in rng.integers(0, len(titles), size)]) for size in sizes]


@torch.inference_mode()
def generated_lists(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    catalogue: Catalogue,
    prompts: Sequence[str],
    width: int = WIDTH,
) -> list[list[list[int]]]:
    """The tokens of ``width`` titles per prompt, by ``generate`` and a function that names the allowed tokens."""
    allowed: dict[tuple[int, ...], set[int]] = {}
    for ids in catalogue.responses:
        for depth, token in enumerate(ids):
            allowed.setdefault(tuple(ids[:depth]), set()).add(token)
    options = {prefix: sorted(tokens) for prefix, tokens in allowed.items()}
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    settings = GenerationConfig(
        max_new_tokens=max(len(ids) for ids in catalogue.responses),
        num_beams=width,
        num_return_sequences=width,
        length_penalty=0.0,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=end,
    )
    found = []
    for first in range(0, len(prompts), BATCH):
        batch = tokenizer(list(prompts[first : first + BATCH]), padding=True, return_tensors="pt")
        size = batch["input_ids"].shape[1]
        out = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            generation_config=settings,
            prefix_allowed_tokens_fn=lambda _, ids, size=size: options.get(tuple(ids[size:].tolist()), [end]),
        )
        lists = out[:, size:].view(-1, width, out.shape[1] - size).tolist()
        found += [[[token for token in ids if token != pad] for ids in row] for row in lists]
    return found


@torch.inference_mode()
def plain_likelihoods(
    model: torch.nn.Module, prompt: Sequence[int], responses: Sequence[Sequence[int]]
) -> torch.Tensor:
    """log pi(y|x) of titles by one ordinary forward pass per (prompt, title), in batches."""
    found = []
    for first in range(0, len(responses), BATCH):
        part = responses[first : first + BATCH]
        rows = pad_sequence([torch.tensor([*prompt, *ids]) for ids in part], batch_first=True)
        lengths = torch.tensor([len(prompt) + len(ids) for ids in part])
        inside = torch.arange(rows.shape[1]) < lengths[:, None]
        logps = model(input_ids=rows, attention_mask=inside.long()).logits[:, :-1].log_softmax(-1)
        own = logps.gather(-1, rows[:, 1:, None])[..., 0]
        found.append(own.masked_fill(~inside[:, 1:], 0.0)[:, len(prompt) - 1 :].sum(-1))
    return torch.cat(found)


def measure(count: int, prompts: int, pairs: int, rows: int, repeats: int) -> dict[str, object]:
    """Seconds and ratios for a catalogue of ``count`` titles.

    The plain forwards take ``pairs`` titles per prompt; ``beam``, which is quick, is timed on four times the prompts.
    """
    rng = np.random.default_rng(count)
    titles = titles_like_films(count, rng)
    model, tokenizer = trained_backbone(titles, rows, rng)
    catalogue = Catalogue.build(pd.DataFrame({"item": range(count), "title": titles}), tokenizer)
    many = 4 * prompts
    texts = histories(titles, [10] * (2 * many), rng)
    targets = rng.integers(0, count, 2 * many).tolist()
    encoded = encode_prompts(tokenizer, texts[:prompts])
    sample = [catalogue.responses[place] for place in rng.integers(0, count, pairs)]

    def rank(name: str, examples: int, **options: object) -> Ranking:
        return RANKERS[name](model, tokenizer, catalogue, texts[:examples], targets[:examples], WIDTH, BATCH, **options)

    cells = {
        "generate": lambda: generated_lists(model, tokenizer, catalogue, texts[:many]),
        "beam": lambda: rank("beam", many),
        "beam, twice the prompts": lambda: rank("beam", 2 * many),
        "plain forwards": lambda: [plain_likelihoods(model, prompt, sample) for prompt in encoded],
        "likelihood": lambda: rank("likelihood", prompts),
        "likelihood, twice the prompts": lambda: rank("likelihood", 2 * prompts),
    }
    # Interleaved, so that a busy moment of the machine hits all of them.
    found: dict[str, list[float]] = {name: [] for name in cells}
    for _ in range(repeats):
        for name, run in cells.items():
            started = time.perf_counter()
            run()
            found[name].append(time.perf_counter() - started)
    median = {name: float(np.median(values)) for name, values in found.items()}
    median["plain forwards"] *= count / pairs
    exact = {
        "pi_C": rank("likelihood", prompts, constrained=True),
        "p_C": rank("likelihood", prompts),
    }
    alike = {
        f"beam of width {width} and exact {of}": agreement(exact[of], rank("beam", prompts, width=width))
        for of in exact
        for width in (WIDTH, 5 * WIDTH)
    }
    return {
        "titles": count,
        "prompts": prompts,
        "seconds": median,
        "ratios": {
            f"beam: generate / this library, {count} titles": median["generate"] / median["beam"],
            f"likelihood: plain / this library, {count} titles": median["plain forwards"] / median["likelihood"],
            f"beam: twice the prompts / once, {count} titles": median["beam, twice the prompts"] / median["beam"],
            f"likelihood: twice the prompts / once, {count} titles": median["likelihood, twice the prompts"]
            / median["likelihood"],
        },
        "agreement": {
            f"{name}, {measure}@{WIDTH}, {count} titles": value
            for name, values in alike.items()
            for measure, value in values.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--titles", type=int, nargs="+", default=[1700, 10000], help="catalogue sizes")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of ten titles (default 4), and twice as many")
    parser.add_argument("--pairs", type=int, default=64, help="titles per prompt for the plain forwards (default 64)")
    parser.add_argument("--rows", type=int, default=3000, help="training examples before measuring (default 3000)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each cell, the median counts (default 3)")
    parser.add_argument("--output", type=Path, default=RESULTS / "bench" / "ranking.json", help="where the json goes")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = [measure(count, options.prompts, options.pairs, options.rows, options.repeats) for count in options.titles]
    print(f"{options.prompts} prompts, width {WIDTH}, one thread, median of {options.repeats} interleaved runs")
    for part in found:
        for name, value in part["seconds"].items():
            print(f"{part['titles']:6d} titles  {name:32s} {value:9.2f} s")
    for part in found:
        for name, value in part["ratios"].items():
            print(f"{name:64s} {value:8.2f} x")
        for name, value in part["agreement"].items():
            print(f"{name:64s} {value:8.3f}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"catalogues": found, "versions": versions()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
