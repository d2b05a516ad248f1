"""Run folders as the stages leave them, with made-up predictions whose properties are known.

The fabricated DPO prefers popular items strongly, CausalDPO a little, SFT and the shuffled control not at all (the
control is a copy of SFT up to noise), so the tables must find exactly that.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

POPULARITY_WEIGHT = {"sft": 0.0, "dpo": 1.5, "causal_dpo": 0.6, "shuffled": 0.0}
GROUPS = np.array(["G1", "G2", "G3", "G4", "G5"])


def write_run(folder: Path, stage: str, **scalars: float) -> None:
    """The two files that make a folder a finished run."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"stage": stage, "setting": folder.parent.name, "name": folder.name, "parameters": {}, "inputs": {}}
    (folder / "config.json").write_text(json.dumps(config))
    summary = {**config, "code": "none", "wall_seconds": 1.0, "scalars": scalars}
    (folder / "summary.json").write_text(json.dumps(summary))


def catalogue(rng: np.random.Generator, size: int) -> pd.DataFrame:
    """Items with long-tailed training counts; the last two were never trained on."""
    counts = np.sort((300 / np.arange(1, size + 1)).astype(int))[::-1].copy()
    counts[-2:] = 0
    mass = np.minimum(5 * (np.cumsum(counts) - counts) // counts.sum(), 4)
    table = pd.DataFrame(
        {
            "item": np.arange(100, 100 + size),
            "title": [f"Title {i}" for i in range(size)],
            "train_count": counts,
            "group_mass": GROUPS[mass],
            "group_items": GROUPS[5 * np.arange(size) // size],
        }
    )
    return table.sample(frac=1, random_state=rng.integers(1000)).reset_index(drop=True)


def setting(
    root: Path,
    name: str,
    seeds=(1, 2, 3),
    methods=tuple(POPULARITY_WEIGHT),
    truth=False,
    examples=120,
    items=40,
    validation=False,
) -> list[SimpleNamespace]:
    """Write all runs of one setting and return their jobs.

    With ``truth`` preferences, times and true environments are known; with ``validation`` that split is ranked too.
    """
    rng = np.random.default_rng(sum(name.encode()))
    table = catalogue(rng, items)
    data = root / name / "data-0"
    write_run(data, "data")
    table.to_parquet(data / "items.parquet")
    splits = [*(["validation"] if validation else []), "iid_test", "ood_test"]
    count = len(splits) * examples
    rows = pd.DataFrame(
        {
            "example": rng.permutation(count),
            "split": np.repeat(splits, examples),
            "user": rng.integers(0, 30, count),
            "item": rng.choice(table["item"], count),
        }
    )
    chance = np.random.default_rng(len(name))
    written = rows.assign(history=[chance.choice(table["item"], 1 + n % 4).tolist() for n in range(count)])
    if truth:
        written["time"] = chance.integers(10**9, 10**9 + 10**6, count)
        written["environment"] = chance.choice(["autumn", "spring", "summer", "winter"], count)
    written.to_parquet(data / "examples.parquet")
    if truth:
        users = pd.Index(range(30), name="user")
        preferences = rng.dirichlet(np.full(items, 0.3), size=30)
        wide = pd.DataFrame(preferences, users, pd.Index(table["item"], name="item"))
        wide.stack().rename("preference").reset_index().to_parquet(data / "truth.parquet")
    jobs = [SimpleNamespace(stage="data", setting=name, seed=None, method=None, folder=data)]
    log_counts = np.log1p(table["train_count"].to_numpy())
    for seed in seeds:
        for method in methods:
            stage = "sft" if method == "sft" else "align"
            folder = root / name / f"{method}-s{seed}-0"
            shown = (
                {} if method in ("sft", "dpo") else {"environments": 4, "noise_share": 0.2, "ami_history_group": 0.1}
            )
            if stage == "sft":
                shown["parameters"] = 1000
            write_run(folder, stage, train_seconds=1.0, **shown)
            if stage == "align":
                log = {"step": [1, 2], "iteration": 0, "preference_loss": [0.7, 0.6], "margin": [0.0, 0.5], "lr": 1.0}
                pd.DataFrame(log).to_csv(folder / "log.csv", index=False)
            jobs.append(SimpleNamespace(stage=stage, setting=name, seed=seed, method=method, folder=folder))
            folder = root / name / f"{method}-s{seed}-rank-0"
            write_run(folder, "rank")
            scores = POPULARITY_WEIGHT[method] * log_counts + rng.gumbel(size=(count, items))
            scores += 1.5 * (table["item"].to_numpy() == rows["item"].to_numpy()[:, None])  # better than chance
            order = np.argsort(-scores, axis=1)
            place = np.argmax(table["item"].to_numpy()[order] == rows["item"].to_numpy()[:, None], axis=1)
            predictions = rows.rename(columns={"item": "target"}).assign(
                rank=np.minimum(place, 20),
                target_logp=-np.log(items) + 0.5 + 0.1 * POPULARITY_WEIGHT[method] + rng.normal(0, 0.1, count),
                items=table["item"].to_numpy()[order[:, :20]].tolist(),
                scores=(-np.arange(20.0) * np.ones((count, 1))).tolist(),
            )
            if truth:
                logps = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
                predictions["catalogue_logps"] = logps.tolist()
            predictions.to_parquet(folder / "predictions.parquet")
            jobs.append(
                SimpleNamespace(stage="rank", setting=name, seed=seed, method=method, folder=folder, parameters={})
            )
    folder = root / name / "environments-s1-0"
    write_run(folder, "environments", environments=4, noise_share=0.2)
    points = pd.DataFrame(rng.normal(size=(90, 2)), columns=["umap_x", "umap_y"])
    points["environment"] = rng.integers(0, 4, 90)
    if truth:
        points["true_environment"] = rng.choice(["autumn", "spring", "summer", "winter"], 90)
    points["group"] = GROUPS[rng.integers(0, 5, 90)]
    points.to_csv(folder / "points.csv", index=False)
    jobs.append(SimpleNamespace(stage="environments", setting=name, seed=1, method=None, folder=folder))
    return jobs
