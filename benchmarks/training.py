"""This library's trainers against trl's, and against the way of the S-DPO code family, in one run on the same rows.

Each cell of the table is a number of rejected responses K and a prompt length; K = 0 is supervised fine-tuning. The
alternative is trl's ``SFTTrainer`` (K = 0) or ``DPOTrainer`` (K = 1), and beyond, where trl has none, one padded
forward pass over all 1 + K whole sequences with logits at all positions. The reference is scored before training in
all. Beside the ratio of speeds stands its token-count bound: tokens that the alternative computes over those that are
needed once. Peak memory is the growth of the resident set, each in a process of its own.

Only ratios mean anything: the seconds are this machine's. Writes ``results/bench/training.json``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from causaldpo_lib.losses import LogProbs, preference_loss
from causaldpo_lib.packing import score_dataset
from causaldpo_lib.paths import RESULTS, ROOT
from causaldpo_lib.records import versions
from causaldpo_lib.trainers import CausalDPOConfig, CausalDPOTrainer, SupervisedTrainer, encode_features

VOCABULARY = 4000
RESPONSE_TOKENS = (4, 10)  # titles, the end-of-sequence token included


@dataclass(frozen=True)
class Cell:
    """What is compared on: K rejected responses, prompts of ``prompt_tokens``, or of a fifth of it to all of it."""

    negatives: int
    prompt_tokens: int
    mixed: bool = False
    bf16: bool = False

    @property
    def alternative(self) -> str:
        return {0: "trl SFTTrainer", 1: "trl DPOTrainer"}.get(self.negatives, "padded concatenation")

    @property
    def contestants(self) -> list[str]:
        return [self.alternative, "sft"] if self.negatives == 0 else [self.alternative, "dpo", "causal_dpo"]

    def __str__(self) -> str:
        lengths = f"{self.prompt_tokens // 5}-{self.prompt_tokens}" if self.mixed else str(self.prompt_tokens)
        return f"K={self.negatives:<2} prompt {lengths}{' bf16' if self.bf16 else ''}"


@dataclass(frozen=True)
class Size:
    """Model, batch and number of steps; the first step of a run warms up and is not counted."""

    layers: int = 6
    hidden: int = 256
    batch: int = 4
    steps: int = 3


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, so that prompts have the lengths that the table says."""
    words = ["<pad>", "</s>", *(f"w{index}" for index in range(VOCABULARY - 2))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def preference_rows(cell: Cell, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of random words."""
    rng = np.random.default_rng(seed)

    def text(size: int) -> str:
        return " ".join(f"w{index}" for index in rng.integers(VOCABULARY - 2, size=size))

    def response() -> str:
        return " " + text(rng.integers(RESPONSE_TOKENS[0] - 1, RESPONSE_TOKENS[1]))

    least = cell.prompt_tokens // 5 if cell.mixed else cell.prompt_tokens
    return [
        {
            "prompt": text(rng.integers(least, cell.prompt_tokens + 1)),
            "chosen": response(),
            "rejected": [response() for _ in range(cell.negatives)],
        }
        for _ in range(count)
    ]


def random_llama(size: Size) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": size.hidden, "intermediate_size": 11 * size.hidden // 4, "num_hidden_layers": size.layers}
    heads = max(1, size.hidden // 32)
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_attention_heads=heads, **special, **shape))


class ConcatenatedTrainer(Trainer):
    """Preference optimisation as the S-DPO code family does it, the reference's part precomputed."""

    def __init__(self, model: LlamaForCausalLM, args: TrainingArguments, rows: list, tokenizer: Any) -> None:
        args.remove_unused_columns = False
        features = encode_features(tokenizer, rows, ["chosen", "rejected"])
        encoded = [[feature[key] for feature in features] for key in ("input_ids", "responses")]
        reference = score_dataset(model, *encoded, tokenizer.pad_token_id, args.per_device_train_batch_size).sum_logps
        for feature, logps in zip(features, reference, strict=True):
            feature["reference"] = logps
        super().__init__(model=model, args=args, train_dataset=features, data_collator=self.concatenate)

    @staticmethod
    def concatenate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pairs = [(f["input_ids"], response) for f in features for response in f["responses"]]
        ids = [torch.tensor(prompt + response) for prompt, response in pairs]
        labels = [torch.tensor([-100] * len(prompt) + response) for prompt, response in pairs]
        return {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "reference": torch.stack([f["reference"] for f in features]),
        }

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        reference, labels = inputs.pop("reference"), inputs.pop("labels")[:, 1:]
        logps = torch.log_softmax(model(**inputs, use_cache=False).logits[:, :-1].float(), -1)
        logps = logps.gather(2, labels.clamp_min(0)[..., None])[..., 0].masked_fill(labels < 0, 0).sum(-1)
        logps = logps.view(reference.shape)
        return preference_loss("dpo", LogProbs(logps[:, 0], logps[:, 1:], reference[:, 0], reference[:, 1:]))[0]


def build(contestant: str, cell: Cell, size: Size, folder: str) -> Trainer:
    """The trainer, ready to train: tokenised, the reference scored."""
    rows, tokenizer, model = preference_rows(cell, size.batch * size.steps), word_tokenizer(), random_llama(size)
    shared = {
        "output_dir": folder,
        "max_steps": size.steps,
        "per_device_train_batch_size": size.batch,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": cell.bf16,
        "dataloader_pin_memory": False,
    }
    no_recomputing = {"activation_checkpointing": False}  # trl's default saves memory for time
    if contestant == "sft":
        return SupervisedTrainer(model, TrainingArguments(**shared), rows, tokenizer)
    if contestant in ("dpo", "causal_dpo"):
        args = CausalDPOConfig(mmd_weight=float(contestant == "causal_dpo"), **shared, **no_recomputing)
        return CausalDPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    if contestant == "padded concatenation":
        return ConcatenatedTrainer(model, TrainingArguments(**shared), rows, tokenizer)
    if contestant == "trl SFTTrainer":
        completions = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows])
        args = SFTConfig(completion_only_loss=True, **shared, **no_recomputing)
        return SFTTrainer(model, args, train_dataset=completions, processing_class=tokenizer)
    pairs = Dataset.from_list([{**row, "rejected": row["rejected"][0]} for row in rows])
    args = DPOConfig(precompute_ref_log_probs=True, **shared, **no_recomputing)
    return DPOTrainer(model, None, args, train_dataset=pairs, processing_class=tokenizer)


class StepSeconds(TrainerCallback):
    """Wall seconds of every step but the first, from one step's end to the next one's: collation is in them."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return np.diff(self.ends).tolist()


def train_seconds(contestant: str, cell: Cell, size: Size) -> list[float]:
    """Wall seconds of a training's steps."""
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock = build(contestant, cell, size, folder), StepSeconds()
        trainer.add_callback(clock)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.seconds


def resident_bytes() -> int:
    """Resident set of this process, in bytes."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * resource.getpagesize()
    return peak_bytes()


def peak_bytes() -> int:
    """Peak of this process's resident set."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss counts what the parent held before this process became its own, there
        return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def grown_bytes(contestant: str, cell: Cell, size: Size) -> int:
    """Peak of the resident set, from building the model to the end of training, over what the libraries take."""
    train_seconds(contestant, replace(cell, prompt_tokens=8), Size(layers=1, hidden=32, batch=2, steps=2))  # libraries
    with tempfile.TemporaryDirectory() as folder:
        before = resident_bytes()
        build(contestant, cell, size, folder).train()
        return peak_bytes() - before


def grown_bytes_apart(contestant: str, cell: Cell, size: Size) -> int:
    """``grown_bytes`` in a fresh process: another contestant's freed memory would hide this one's."""
    given = json.dumps([contestant, asdict(cell), asdict(replace(size, steps=2))])
    command = [sys.executable, "-m", "benchmarks.training", "--grown", given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{contestant} failed in a process of its own: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def token_bound(cell: Cell, size: Size) -> float:
    """Tokens of whole sequences over tokens of prompts and responses: the ratio if speed were tokens alone."""
    rows = preference_rows(cell, size.batch * size.steps)
    prompts = np.array([len(row["prompt"].split()) for row in rows])
    responses = [[row["chosen"], *row["rejected"]] for row in rows]
    answers = np.array([sum(len(response.split()) + 1 for response in group) for group in responses])
    return float((prompts * (1 + cell.negatives) + answers).sum() / (prompts + answers).sum())


def measure(cell: Cell, size: Size, repeats: int, memory: bool) -> dict[str, Any]:
    """A row of the table: the fastest step of interleaved runs, since whatever else the machine does only adds."""
    seconds: dict[str, list[float]] = {name: [] for name in cell.contestants}
    for _ in range(repeats):
        for name in cell.contestants:
            seconds[name] += train_seconds(name, cell, size)
    fastest = {name: min(values) for name, values in seconds.items()}
    alternative, own, *causal = cell.contestants
    row = {
        **asdict(cell),
        "alternative": alternative,
        "prompts_per_second": {name: size.batch / value for name, value in fastest.items()},
        "speed_ratio": fastest[alternative] / fastest[own],
        "token_bound": token_bound(cell, size),
        "seconds": seconds,
    }
    if causal:
        row["causal_over_plain"] = fastest[causal[0]] / fastest[own]
    if memory:
        row["peak_bytes"] = {name: grown_bytes_apart(name, cell, size) for name in (alternative, own)}
        row["memory_ratio"] = row["peak_bytes"][alternative] / row["peak_bytes"][own]
    return row


def line(cell: Cell, row: dict[str, Any]) -> str:
    speeds = row["prompts_per_second"]
    shown = f"{cell!s:24s} {speeds[row['alternative']]:8.2f} {speeds[cell.contestants[1]]:8.2f} prompts/s"
    shown += f"  {row['speed_ratio']:6.2f} x (tokens: {row['token_bound']:5.2f})"
    if "causal_over_plain" in row:
        shown += f"  causal/plain {row['causal_over_plain']:.3f}"
    if "memory_ratio" in row:
        largest = [row["peak_bytes"][name] / 2**20 for name in (row["alternative"], cell.contestants[1])]
        shown += f"  memory {largest[0]:6.0f} / {largest[1]:5.0f} MiB = {row['memory_ratio']:.2f} x"
    return f"{shown}  {row['alternative']}"


def cells(negatives: Sequence[int], prompt_tokens: Sequence[int]) -> list[Cell]:
    """The grid, and at the shortest prompts mixed lengths and autocast bfloat16."""
    grid = [Cell(k, tokens) for tokens in prompt_tokens for k in negatives]
    short = min(prompt_tokens)
    return [*grid, Cell(1, short, mixed=True), Cell(1, short, bf16=True)]


def quiet() -> None:
    disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["TQDM_DISABLE"] = "1"  # trl's bar over the reference


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--negatives", type=int, nargs="+", default=[0, 1, 3, 7, 15], help="K (default 0 1 3 7 15)")
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[80, 400], help="prompt lengths (80 400)")
    parser.add_argument("--repeats", type=int, default=2, help="interleaved runs of each contestant (default 2)")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory too")
    for name, value in asdict(Size()).items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--output", type=Path, default=RESULTS / "bench" / "training.json", help="where the json goes")
    parser.add_argument("--grown", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    quiet()
    if options.grown:
        contestant, cell, size = json.loads(options.grown)
        print(grown_bytes(contestant, Cell(**cell), Size(**size)))
        return
    size = Size(**{name: getattr(options, name) for name in asdict(Size())})
    print(
        f"training, one thread, {size}, fastest step of {options.repeats} interleaved runs: alternative, this library"
    )
    rows = []
    for cell in cells(options.negatives, options.prompt_tokens):
        rows.append(measure(cell, size, options.repeats, options.memory))
        print(line(cell, rows[-1]), flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"size": asdict(size), "cells": rows, "versions": versions()}
    options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
