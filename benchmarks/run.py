"""`make bench`: this library's trainers against trl's on the same data, model, precision and batch, in one run.

Only ratios mean anything: the seconds are this machine's. Prints a table and writes ``results/bench/training.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from transformers import TrainingArguments
from transformers.trainer_callback import ProgressCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from causaldpo_lib.backbone import tiny_backbone
from causaldpo_lib.data import load_dataset
from causaldpo_lib.paths import RESULTS
from causaldpo_lib.prompts import prompt_text, response_text
from causaldpo_lib.records import versions
from causaldpo_lib.trainers import CausalDPOConfig, CausalDPOTrainer, SupervisedTrainer

BATCH = 32


def preference_rows(count: int, titles: list[str], seed: int = 0) -> list[dict[str, str]]:
    """Rows with histories of 1 to 10 titles, as a split gives them: lengths differ."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        picked = [titles[index] for index in rng.choice(len(titles), rng.integers(1, 11) + 2, replace=False)]
        chosen, rejected = (response_text(title) for title in picked[:2])
        rows.append({"prompt": prompt_text(picked[2:]), "chosen": chosen, "rejected": rejected})
    return rows


def seconds_of(make: Callable[[], object]) -> float:
    """Wall seconds of ``make().train()`` alone: building the trainer (tokenising, reference scores) is not counted."""
    trainer = make()
    trainer.remove_callback(ProgressCallback)
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1024, help="training rows (default 1024)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each trainer, the median counts (default 3)")
    parser.add_argument("--output", type=Path, default=RESULTS / "bench" / "training.json", help="where the json goes")
    options = parser.parse_args()
    disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)

    titles = load_dataset("simulated", users=50, items=300).items["title"].tolist()
    model, tokenizer = tiny_backbone(titles, seed=0)
    rows = preference_rows(options.rows, titles)
    with tempfile.TemporaryDirectory() as folder:
        shared = {
            "output_dir": folder,
            "num_train_epochs": 1,
            "per_device_train_batch_size": BATCH,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "activation_checkpointing": False,
            "dataloader_pin_memory": False,
        }
        by_length = {
            "train_sampling_strategy": "group_by_length"
        }  # as the study fine-tunes; preference batches are random
        completions = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows])

        def ours(weight: float) -> CausalDPOTrainer:
            args = CausalDPOConfig(mmd_weight=weight, **shared)
            return CausalDPOTrainer(copy.deepcopy(model), args=args, train_dataset=rows, processing_class=tokenizer)

        def theirs() -> DPOTrainer:
            # trl's best setting here: the reference is scored before training, as ours is.
            args = DPOConfig(precompute_ref_log_probs=True, **shared)
            return DPOTrainer(
                copy.deepcopy(model), None, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
            )

        cells = {
            "sft: trl SFTTrainer": lambda: SFTTrainer(
                copy.deepcopy(model),
                SFTConfig(completion_only_loss=True, **shared, **by_length),
                train_dataset=completions,
                processing_class=tokenizer,
            ),
            "sft: this library": lambda: SupervisedTrainer(
                copy.deepcopy(model), TrainingArguments(**shared, **by_length), rows, tokenizer
            ),
            "dpo: trl DPOTrainer": theirs,
            "dpo: this library": lambda: ours(0.0),
            "causal_dpo: this library": lambda: ours(1.0),
        }
        # Interleaved, so that a busy moment of the machine hits all of them.
        found: dict[str, list[float]] = {name: [] for name in cells}
        for _ in range(options.repeats):
            for name, make in cells.items():
                found[name].append(seconds_of(make))
    seconds = {name: float(np.median(values)) for name, values in found.items()}
    ratios = {
        "sft: trl / this library": seconds["sft: trl SFTTrainer"] / seconds["sft: this library"],
        "dpo: trl / this library": seconds["dpo: trl DPOTrainer"] / seconds["dpo: this library"],
        "causal_dpo / dpo, this library": seconds["causal_dpo: this library"] / seconds["dpo: this library"],
    }
    print(f"{options.rows} rows, batch {BATCH}, one thread, median of {options.repeats} interleaved runs")
    for name, value in seconds.items():
        print(f"{name:32s} {options.rows / value:8.0f} rows/s")
    for name, value in ratios.items():
        print(f"{name:32s} {value:8.2f} x")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"rows": options.rows, "batch": BATCH, "seconds": found, "ratios": ratios, "versions": versions()}
    options.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
