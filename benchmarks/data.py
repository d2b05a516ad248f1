"""From a publisher's files to prompts: this library against plain pandas, in the same run, at growing sizes.

``python -m benchmarks.data`` makes files in the format of MovieLens-10M, and takes each size through both
implementations in a fresh process: files, then per shift the split, the histories and every prompt. Only ratios mean
anything: the seconds are this machine's. Prints a table and writes ``results/bench/data.json``.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from causaldpo_lib.paths import RESULTS, ROOT
from causaldpo_lib.records import versions, write_json

SIZES = (1_000_000, 10_000_054)
SHIFTS = ("popularity", "temporal")
GIB = 2**30 if sys.platform == "darwin" else 2**20  # ru_maxrss counts bytes there and KiB elsewhere


class Clock:
    """Wall seconds between laps, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now


def library(folder: Path) -> tuple[dict[str, float], dict[str, int]]:
    """The study's own path; prompts are made batch by batch, as training reads them."""
    from causaldpo_lib.data import load_dataset
    from causaldpo_lib.prompts import prompt_batches
    from causaldpo_lib.splits import history_table, make_split

    warnings.filterwarnings("ignore", ".* is not the published MovieLens-10M")  # it is made up
    clock = Clock()  # from here on: an import costs the same at every size
    interactions = load_dataset("ml-10m", folder)
    titles = interactions.items.set_index("item")["title"]
    clock.lap("files")
    prompts = {}
    for shift in SHIFTS:
        split = make_split(shift, interactions, 0)
        clock.lap(f"{shift} split")
        examples = history_table(split)
        clock.lap(f"{shift} histories")
        prompts[shift] = sum(len(batch) for batch in prompt_batches(examples, titles))
        clock.lap(f"{shift} prompts")
    return clock.seconds, prompts


def plain(folder: Path) -> tuple[dict[str, float], dict[str, int]]:
    """The same steps as one writes them down at first: pandas, a group at a time, lists of texts."""
    clock = Clock()
    read = {"sep": "::", "engine": "python", "header": None, "encoding": "utf-8"}
    ratings = pd.read_csv(folder / "ratings.dat", names=["user", "item", "rating", "time"], **read)
    titles = pd.read_csv(folder / "movies.dat", names=["item", "title", "genres"], **read)
    titles = dict(zip(titles["item"], titles["title"], strict=True))
    ratings = ratings.drop_duplicates(["user", "item"])
    clock.lap("files")
    prompts = {}
    for shift in SHIFTS:
        positives = ratings[ratings["rating"] >= 4]
        positives = positives.groupby("user").filter(lambda part: len(part) >= 5)
        positives = positives.sort_values(["user", "time", "item"], ignore_index=True)
        if shift == "temporal":
            ood = positives["time"] > positives["time"].quantile(0.8)
        else:
            counts = positives["item"].value_counts()
            cap = next(c for c in range(1, counts.max()) if (counts // 2).clip(upper=c).sum() >= 0.2 * len(positives))
            drawn = [
                part.sample(min(cap, len(part) // 2), random_state=0).index for _, part in positives.groupby("item")
            ]
            ood = positives.index.isin(np.concatenate(drawn))
        rest = positives[~ood].sample(frac=1, random_state=0).index
        train, validation = int(0.7 * len(rest)), int(0.8 * len(rest))
        positives["split"] = "ood_test"
        positives.loc[rest[:train], "split"] = "train"
        positives.loc[rest[train:validation], "split"] = "validation"
        positives.loc[rest[validation:], "split"] = "iid_test"
        clock.lap(f"{shift} split")

        examples = []
        for _, part in positives.groupby("user"):
            earlier, shown = [], []  # (time, item) in train, and what a test that runs on sees besides
            for item, when, name in zip(part["item"], part["time"], part["split"], strict=True):
                seen = shown if name == "ood_test" and shift == "temporal" else earlier
                history = [known for moment, known in seen if moment < when][-10:]
                if history:
                    examples.append((item, history))
                if name == "train":
                    earlier.append((when, item))
                if name in ("train", "ood_test"):
                    shown.append((when, item))
        clock.lap(f"{shift} histories")
        texts = []
        for item, history in examples:
            prompt = "Chosen so far: " + "; ".join(titles[known] for known in history) + "\nNext:"
            texts.append({"prompt": prompt, "chosen": " " + titles[item]})
        prompts[shift] = len(texts)
        clock.lap(f"{shift} prompts")
    return clock.seconds, prompts


IMPLEMENTATIONS: dict[str, Callable[[Path], tuple[dict[str, float], dict[str, int]]]] = {
    "library": library,
    "plain": plain,
}


def measure(name: str, folder: Path) -> dict[str, object]:
    """Run one implementation in this process: seconds by step, peak resident memory and the prompts it made."""
    seconds, prompts = IMPLEMENTATIONS[name](folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB
    return {"seconds": seconds, "total": sum(seconds.values()), "peak_gib": peak, "prompts": prompts}


def in_fresh_process(name: str, folder: Path) -> dict[str, object]:
    """`measure` in a process of its own, so that a peak of memory belongs to one run."""
    command = [sys.executable, "-m", "benchmarks.data", "--measure", name, str(folder)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def report(found: dict[int, dict[str, dict]]) -> dict[str, float]:
    """Print the table and return its ratios."""
    smallest, largest = min(found), max(found)
    steps = list(next(iter(found.values()))["library"]["seconds"])
    columns = [(size, name) for size, runs in found.items() for name in runs]
    print("seconds".ljust(24) + "".join(f"{name} {size:,}".rjust(22) for size, name in columns))
    for step in steps:
        print(step.ljust(24) + "".join(f"{found[size][name]['seconds'][step]:22.2f}" for size, name in columns))
    for key, label in (("total", "total"), ("peak_gib", "peak memory, GiB")):
        print(label.ljust(24) + "".join(f"{found[size][name][key]:22.2f}" for size, name in columns))
    ratios = {}
    for size, runs in found.items():
        if "plain" in runs:
            ratios[f"seconds at {size:,}: plain pandas / library"] = runs["plain"]["total"] / runs["library"]["total"]
            ratios[f"memory at {size:,}: plain pandas / library"] = (
                runs["plain"]["peak_gib"] / runs["library"]["peak_gib"]
            )
    if largest > smallest:  # 1 is linear growth, less is better
        for key, label in (("total", "seconds"), ("peak_gib", "memory")):
            growth = found[largest]["library"][key] / found[smallest]["library"][key]
            ratios[f"growth of {label} / growth of the data, library"] = growth * smallest / largest
    for label, value in ratios.items():
        print(f"{label:60s} {value:8.2f} x")
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="ratings of the files (default 1M and 10M)")
    parser.add_argument(
        "--plain-up-to",
        type=int,
        default=SIZES[0],
        help="largest size for plain pandas (default 1M; 10M takes minutes)",
    )
    parser.add_argument("--output", type=Path, default=RESULTS / "bench" / "data.json", help="where the json goes")
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        name, folder = options.measure
        print(json.dumps(measure(name, Path(folder))))
        return

    found: dict[int, dict[str, dict]] = {}
    for size in sorted(options.sizes):
        with tempfile.TemporaryDirectory() as folder:
            generate = [sys.executable, "-m", "benchmarks.publisher_files", folder, "--ratings", str(size)]
            subprocess.run(generate, cwd=ROOT, check=True)
            names = ["library", *(["plain"] if size <= options.plain_up_to else [])]
            found[size] = {name: in_fresh_process(name, Path(folder)) for name in names}
        counts = [runs["prompts"] for runs in found[size].values()]
        for shift in SHIFTS:  # both take the same way, up to what is drawn at random
            if max(count[shift] for count in counts) > 1.01 * min(count[shift] for count in counts):
                sys.exit(f"the implementations disagree on the number of prompts at {size:,} ratings: {counts}")
    ratios = report(found)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, {"sizes": found, "ratios": ratios, "versions": versions()})


if __name__ == "__main__":
    main()
