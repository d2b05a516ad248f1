"""What the causal penalty costs beside the losses it is added to, part by part, in one run on one thread.

The methods of Tables 6 and 7 of arXiv 2603.22335, and Algorithm 1 to the letter, on the study's tiny backbone and
prompts of ten titles. What a method needs is done and nothing else: no diagnostics, reference scores only for losses
with a reference or for environments. Once for all training examples: the reference's pass over them (its
log-probabilities and the prompt states are one pass) and the clustering. In every step: collation, the policy's forward
pass, the loss, the penalty with its kernel, Algorithm 1's clustering, the backward pass, the optimiser. Beside it the
penalty alone by batch size and number of environments, and rankings by the size of the catalogue.

Seconds are of the processor, not of the clock, so that a busy machine changes them little, and methods take turns in
every repetition. Only ratios mean anything. Writes ``results/bench/cost.json``; ``causaldpo_lib/method_costs.py`` reads
it.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.ranking import histories, titles_like_films
from causaldpo_lib.backbone import tiny_backbone
from causaldpo_lib.environments import BatchEnvironments, inferred
from causaldpo_lib.losses import LogProbs, implicit_rewards, preference_loss
from causaldpo_lib.mmd import median_bandwidth, mmd_squared
from causaldpo_lib.packing import PackedBatch, pack, score_dataset, score_responses
from causaldpo_lib.paths import RESULTS
from causaldpo_lib.prompts import response_text
from causaldpo_lib.ranking import RANKERS, Catalogue
from causaldpo_lib.records import versions
from causaldpo_lib.study import load_method
from causaldpo_lib.trainers import encode_features

# Table 6, then Table 7, then the paper's algorithm with its clustering in every mini-batch.
METHODS = ("dpo", "cpo", "simpo", "causal_dpo", "dr_dpo_causal", "cpo_causal", "simpo_causal", "mini_batch")
REFERENCE_FREE = ("cpo", "simpo")
WIDTH = 20


@dataclass(frozen=True)
class Size:
    """How much is measured; the first step of a run warms up and is not counted.

    ``examples`` are trained on in an epoch and pass the reference once; ``titles`` are in the catalogue.
    """

    backbone: str = "tiny"
    titles: int = 1700
    examples: int = 2048
    batch: int = 32
    steps: int = 6
    repeats: int = 5


@dataclass(frozen=True)
class Recipe:
    """What a method computes, from its file in ``params/methods``."""

    loss: str
    options: dict[str, Any]
    weight: float
    clusters: bool  # in every batch
    pairs: str

    @property
    def reference(self) -> bool:
        """Whether the reference's pass is needed: for the loss, or for the states of the environments."""
        return self.loss not in REFERENCE_FREE or (self.weight > 0 and not self.clusters)

    @property
    def clustering(self) -> bool:
        """Whether environments are inferred before training."""
        return self.weight > 0 and not self.clusters


def recipe(method: str) -> Recipe:
    """A method's loss and penalty."""
    align = load_method(method).overrides["align"]
    batch = align.get("memberships") == "batch"
    return Recipe(
        align["loss"], align.get("loss_options", {}), align["mmd_weight"], batch, align.get("mmd_pairs", "mean")
    )


class Stopwatch:
    """Seconds of named parts; a part that is entered twice adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.process_time()
        yield
        self.seconds[name] += time.process_time() - started


class Bench:
    """A backbone, encoded preference pairs with uniform negatives, and what is computed from them once."""

    def __init__(self, size: Size) -> None:
        self.size, rng = size, np.random.default_rng(0)
        titles = titles_like_films(size.titles, rng)
        self.model, self.tokenizer = tiny_backbone(titles, seed=0, name=size.backbone)
        chosen, rejected = (rng.integers(size.titles, size=size.examples) for _ in range(2))
        rows = [
            {"prompt": prompt, "chosen": response_text(titles[y]), "rejected": response_text(titles[other])}
            for prompt, y, other in zip(histories(titles, [10] * size.examples, rng), chosen, rejected, strict=True)
        ]
        features = encode_features(self.tokenizer, rows, ["chosen", "rejected"])
        self.prompts = [feature["input_ids"] for feature in features]
        self.responses = [feature["responses"] for feature in features]
        self.parameters = sum(weights.numel() for weights in self.model.parameters())
        self.reference: Any = None
        self.memberships: Any = None

    def once(self) -> dict[str, float]:
        """Seconds of the reference's pass over all examples, and of the clustering of its states."""
        watch = Stopwatch()
        pad = self.tokenizer.pad_token_id
        with watch.part("reference"):
            scores = score_dataset(self.model, self.prompts, self.responses, pad, 2 * self.size.batch)
        with watch.part("clustering"):
            found = inferred(scores.prompt_states, None, 0)
        self.reference, self.memberships = scores.sum_logps, found.rows
        return dict(watch.seconds)

    def train(self, method: str) -> dict[str, float]:
        """Median seconds of a step's parts and ``total``, over all steps but the first; from a fresh copy."""
        how, model = recipe(method), copy.deepcopy(self.model).train()
        learned = list(model.parameters())
        environments = None
        if how.clusters:
            environments = BatchEnvironments(model.config.hidden_size, gradient="paper")
            learned += list(environments.parameters())
        optimiser = torch.optim.AdamW(learned, lr=1e-4)
        rng, laps = np.random.default_rng(1), []
        for _ in range(self.size.steps + 1):
            index = rng.choice(self.size.examples, self.size.batch, replace=False)
            watch, started = Stopwatch(), time.process_time()
            self._step(how, model, environments, optimiser, learned, index, watch)
            laps.append({**watch.seconds, "total": time.process_time() - started})
        return pd.DataFrame(laps[1:]).median().to_dict()

    def _step(self, how, model, environments, optimiser, learned, index, watch) -> None:
        with watch.part("collation"):
            prompts, responses = ([rows[i] for i in index] for rows in (self.prompts, self.responses))
            batch: PackedBatch = pack(prompts, responses, self.tokenizer.pad_token_id)
        with watch.part("forward"):
            scores = score_responses(model, batch)
        with watch.part("loss"):
            given = {"chosen": scores.sum_logps[:, 0], "rejected": scores.sum_logps[:, 1:]}
            given |= {"chosen_tokens": scores.tokens[:, 0], "rejected_tokens": scores.tokens[:, 1:]}
            if how.loss not in REFERENCE_FREE:
                theirs = self.reference[index]
                given |= {"ref_chosen": theirs[:, 0], "ref_rejected": theirs[:, 1:]}
            log_probs = LogProbs(**given)
            loss, _ = preference_loss(how.loss, log_probs, **how.options)
        if how.weight:
            if environments is not None:
                with watch.part("batch clustering"):
                    memberships = environments(scores.prompt_states)
            with watch.part("penalty"):
                if environments is None:
                    memberships = self.memberships[index]
                rewards, _ = implicit_rewards(how.loss, log_probs, **how.options)
                width = median_bandwidth(rewards).clamp_min(0.1)
                loss = loss + how.weight * mmd_squared(rewards, memberships, width, "v", how.pairs)
        with watch.part("backward"):
            loss.backward()
        with watch.part("optimiser"):
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimiser.step()
            optimiser.zero_grad()


def method_costs(size: Size) -> dict[str, Any]:
    """Seconds of all methods, a list over the repetitions for each part."""
    bench = Bench(size)
    once: dict[str, list[float]] = defaultdict(list)
    steps: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in METHODS}
    for repeat in range(size.repeats):
        for part, seconds in bench.once().items():
            once[part].append(seconds)
        for name in METHODS[repeat % len(METHODS) :] + METHODS[: repeat % len(METHODS)]:  # nobody is always first
            for part, seconds in bench.train(name).items():
                steps[name][part].append(seconds)
    rows = []
    for name in METHODS:
        how = recipe(name)
        needed = [part for part, used in (("reference", how.reference), ("clustering", how.clustering)) if used]
        rows.append({"method": name, "once": needed, "seconds": dict(steps[name])})
    return {"once": dict(once), "methods": rows, "parameters": bench.parameters}


def penalty_costs(batches: Sequence[int], environments: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Seconds of the penalty on random rewards, forward and backward, by batch size B and environments K."""
    generator = torch.Generator().manual_seed(0)
    cells = [(size, count) for count in environments for size in batches]
    found: dict[tuple[int, int], list[float]] = {cell: [] for cell in cells}
    inputs = {
        (size, count): (
            torch.randn(size, generator=generator, requires_grad=True),
            torch.randn(size, count, generator=generator).softmax(1),
        )
        for size, count in cells
    }
    for repeat in range(repeats + 1):
        for cell in cells:
            rewards, memberships = inputs[cell]
            times = []
            for _ in range(5):  # the fastest of a few: caches and the allocator warm up
                started = time.process_time()
                mmd_squared(rewards, memberships, median_bandwidth(rewards)).backward()
                times.append(time.process_time() - started)
                rewards.grad = None
            if repeat:  # the first round warms up
                found[cell].append(min(times))
    return [{"batch": size, "environments": count, "seconds": found[size, count]} for size, count in cells]


def ranking_costs(sizes: Sequence[int], prompts: int, repeats: int, backbone: str = "tiny") -> list[dict[str, Any]]:
    """Seconds a prompt of both rankers by the size of the catalogue; model, tokenizer and prompts are the same."""
    rng = np.random.default_rng(0)
    titles = titles_like_films(max(sizes), rng)
    model, tokenizer = tiny_backbone(titles, seed=0, name=backbone)
    model.eval()
    texts = histories(titles, [10] * prompts, rng)
    frames = {size: pd.DataFrame({"item": range(size), "title": titles[:size]}) for size in sizes}
    catalogues = {size: Catalogue.build(frame, tokenizer) for size, frame in frames.items()}
    cells = [(ranker, size) for ranker in ("likelihood", "beam") for size in sizes]
    found: dict[tuple[str, int], list[float]] = {cell: [] for cell in cells}
    for _ in range(repeats):
        for ranker, size in cells:
            targets = [place % size for place in range(prompts)]
            started = time.process_time()
            RANKERS[ranker](model, tokenizer, catalogues[size], texts, targets, WIDTH, prompts)
            found[ranker, size].append((time.process_time() - started) / prompts)
    return [{"ranker": ranker, "titles": size, "seconds": found[ranker, size]} for ranker, size in cells]


def show(found: dict[str, Any]) -> None:
    """Print the table."""
    base = np.array(next(row["seconds"]["total"] for row in found["methods"] if row["method"] == "dpo"))
    for row in found["methods"]:
        parts = {part: np.median(values) for part, values in row["seconds"].items()}
        ratio = np.median(np.array(row["seconds"]["total"]) / base)
        shown = "  ".join(f"{part} {1000 * value:.1f}" for part, value in parts.items())
        print(f"{row['method']:14s} {ratio:6.3f} x dpo   ms a step: {shown}")
    once = "  ".join(f"{part} {np.median(values):.2f} s" for part, values in found["once"].items())
    print(f"once for {found['size']['examples']} examples: {once}")
    for row in found["penalty"]:
        shown = 1000 * np.median(row["seconds"])
        print(f"penalty  B={row['batch']:<5d} K={row['environments']:<3d} {shown:9.3f} ms")
    for row in found["ranking"]:
        shown = 1000 * np.median(row["seconds"])
        print(f"ranking  {row['ranker']:11s} {row['titles']:6d} titles {shown:9.1f} ms a prompt")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in asdict(Size()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"default {value}")
    sizes = [16, 32, 64, 128, 256, 512, 1024]
    parser.add_argument("--batches", type=int, nargs="+", default=sizes, help="B of the penalty (16 ... 1024)")
    parser.add_argument("--environments", type=int, nargs="+", default=[2, 8, 32], help="K of the penalty (2 8 32)")
    sizes = [250, 500, 1000, 2000, 4000, 8000]
    parser.add_argument("--catalogues", type=int, nargs="+", default=sizes, help="titles to rank (250 ... 8000)")
    parser.add_argument("--prompts", type=int, default=4, help="prompts to rank for (default 4)")
    parser.add_argument("--output", type=Path, default=RESULTS / "bench" / "cost.json", help="where the json goes")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    size = Size(**{name: getattr(options, name) for name in asdict(Size())})
    print(f"cost, one thread, processor time, {size}: medians of interleaved repetitions")
    found = {"threads": 1, "clock": "processor", "size": asdict(size), **method_costs(size)}
    found["penalty"] = penalty_costs(options.batches, options.environments, max(size.repeats, 3))
    found["ranking"] = ranking_costs(options.catalogues, options.prompts, size.repeats, size.backbone)
    torch.set_num_threads(threads)
    show(found)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({**found, "versions": versions()}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
