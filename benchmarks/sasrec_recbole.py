"""This library's SASRec against RecBole's, trained on the same windows of MovieLens-100K and measured by the same code.

Both get the study's training examples (at most ten earlier items -> next item), width, blocks, heads, dropout, full
softmax, Adam and early stopping on validation NDCG@10. Both score the whole catalogue for the study's test examples,
histories not masked, and ranks and log-probabilities are computed here from their scores. What differs is RecBole's
architecture: normalisation after each half of a block, and of the sum of embeddings instead of the factor sqrt(d);
padding on the right; at its default a feed-forward network 256 wide with GELU. `recbole_default` has that one,
`recbole` one like ours, as wide as the states with ReLU.

RecBole 1.2.1 needs older packages, so it lives in an environment of its own (Python 3.11), outside of this project's:

    pip install torch "numpy<2" "pandas<2.3" "scipy<1.14" "pyarrow<20" safetensors scikit-learn \
        colorlog colorama pyyaml tqdm tensorboard tabulate texttable thop psutil
    pip install --no-deps recbole==1.2.1

``python -m benchmarks.sasrec_recbole --data FOLDER``, where the folder is a finished data run of a study
(``results/runs/*/data-*``), trains ours, and in that other environment RecBole's, and adds what it finds to
``results/bench/sasrec.json``: aggregates only, replacing those of other data. One thread; a minute per model and seed,
`recbole_default` two.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import tempfile
import time
import warnings
from importlib import metadata, util
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from causaldpo_lib.metrics import hit_rate_at_k, ndcg_at_k
from causaldpo_lib.paths import RESULTS
from causaldpo_lib.records import read_json, versions, write_json
from causaldpo_lib.sasrec import SASRec, catalogue_logps, encode_histories, fit_sasrec

SHAPE = {"hidden": 32, "blocks": 2, "heads": 1, "dropout": 0.1, "length": 10}
TRAINING = {
    "loss": "softmax", "epochs": 100, "patience": 10, "learning_rate": 1e-3, "batch_size": 256, "weight_decay": 0.0,
}  # fmt: skip
FEED_FORWARDS = {"recbole": {"inner_size": SHAPE["hidden"], "hidden_act": "relu"}, "recbole_default": {}}
MEASURED = ("validation", "iid_test", "ood_test")

Examples = dict[str, pd.DataFrame]  # split -> columns user, item, history
Scores = dict[str, np.ndarray]  # split -> log-probabilities (N, items)


def ours(items: np.ndarray, examples: Examples, seed: int) -> Scores:
    """What this library's model gives after training with this seed."""
    torch.manual_seed(seed)
    model = SASRec(len(items), **SHAPE)
    histories = {name: encode_histories(part["history"], items, SHAPE["length"]) for name, part in examples.items()}
    train, validation = (
        (histories[name], torch.from_numpy(targets(items, examples[name]))) for name in ("train", "validation")
    )
    fit_sasrec(model, train, validation, seed=seed, **TRAINING)
    return {name: catalogue_logps(model, histories[name]) for name in MEASURED}


def theirs(items: np.ndarray, examples: Examples, seed: int, feed_forward: dict[str, object]) -> Scores:
    """The same from RecBole's model."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender import SASRec as TheirSASRec
    from recbole.trainer import Trainer
    from recbole.utils import init_seed

    warnings.filterwarnings("ignore", category=FutureWarning, module="recbole")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):  # RecBole leaves logs where it runs
        write_files(Path(folder, "study"), items, examples)
        config = Config(model="SASRec", dataset="study", config_dict=their_settings(seed, folder) | feed_forward)
        init_seed(seed, reproducibility=True)
        dataset = create_dataset(config)
        train, validation, _ = data_preparation(config, dataset)
        model = TheirSASRec(config, train.dataset)
        trainer = Trainer(config, model)
        trainer.fit(train, validation, verbose=False)
        # It holds their configuration too, which is no tensor.
        model.load_state_dict(torch.load(trainer.saved_model_file, weights_only=False)["state_dict"])
    numbers = dataset.token2id("item_id", list(map(str, items)))
    return {name: their_scores(model.eval(), items, numbers, examples[name]) for name in MEASURED}


@torch.inference_mode()
def their_scores(model: torch.nn.Module, items: np.ndarray, numbers: np.ndarray, part: pd.DataFrame) -> np.ndarray:
    """Log-probabilities (N, items) in the order of our catalogue, whose items RecBole calls ``numbers`` (items,)."""
    histories = np.append(0, numbers)[encode_histories(part["history"], items, SHAPE["length"]).numpy()]
    padded_right = np.take_along_axis(histories, (histories == 0).argsort(axis=1, kind="stable"), axis=1)
    lengths = (histories > 0).sum(axis=1)
    batch = {"item_id_list": torch.from_numpy(padded_right), "item_length": torch.from_numpy(lengths)}
    return torch.log_softmax(model.full_sort_predict(batch)[:, numbers], dim=-1).numpy()


def their_settings(seed: int, folder: str) -> dict[str, object]:
    """`SHAPE` and `TRAINING` in RecBole's words, for files whose rows are examples already."""
    return {
        "data_path": folder, "checkpoint_dir": folder, "seed": seed, "use_gpu": False, "show_progress": False,
        "benchmark_filename": ["train", "validation", "iid_test"], "alias_of_item_id": ["item_id_list"],
        "load_col": {"inter": ["user_id", "item_id_list", "item_id"], "item": ["item_id"]},
        "MAX_ITEM_LIST_LENGTH": SHAPE["length"], "hidden_size": SHAPE["hidden"], "n_layers": SHAPE["blocks"],
        "n_heads": SHAPE["heads"], "hidden_dropout_prob": SHAPE["dropout"], "attn_dropout_prob": SHAPE["dropout"],
        "loss_type": "CE", "train_neg_sample_args": None, "epochs": TRAINING["epochs"],
        "stopping_step": TRAINING["patience"] - 1,  # it stops at one epoch more
        "learning_rate": TRAINING["learning_rate"], "train_batch_size": TRAINING["batch_size"],
        "weight_decay": TRAINING["weight_decay"], "eval_args": {"order": "TO", "mode": "full"}, "repeatable": True,
        "metrics": ["NDCG"], "topk": [10], "valid_metric": "NDCG@10", "metric_decimal_place": 12,
    }  # fmt: skip


def write_files(folder: Path, items: np.ndarray, examples: Examples) -> None:
    """RecBole's "atomic files": the whole catalogue, and examples that need no further augmentation."""
    folder.mkdir()
    (folder / "study.item").write_text("\n".join(["item_id:token", *map(str, items)]) + "\n")
    for name, part in examples.items():
        lists = part["history"].map(lambda row: " ".join(map(str, row)))
        columns = {"user_id:token": part["user"], "item_id_list:token_seq": lists, "item_id:token": part["item"]}
        pd.DataFrame(columns).to_csv(folder / f"study.{name}.inter", sep="\t", index=False)


def targets(items: np.ndarray, part: pd.DataFrame) -> np.ndarray:
    """Positions (N,) in the catalogue of the items that came next."""
    return pd.Index(items).get_indexer(part["item"])


def measures(logps: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """HR@10 and NDCG@10, ties before the target, and the targets' mean log-probability in nats."""
    own = np.take_along_axis(logps, target[:, None], axis=1)
    ranks = (logps >= own).sum(axis=1) - 1
    return {"hr10": hit_rate_at_k(ranks, 10), "ndcg10": ndcg_at_k(ranks, 10), "logp": float(own.mean())}


def means(seeds: list[dict]) -> dict[str, dict[str, float]]:
    """Means of the measures over the seeds, per split."""
    return {name: pd.DataFrame([seed[name] for seed in seeds]).mean().to_dict() for name in MEASURED}


def main(argv: list[str] | None = None) -> None:
    """Train and measure what this environment has, and add it to the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=RESULTS / "bench" / "sasrec.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    items = pd.read_parquet(options.data / "items.parquet")["item"].to_numpy()
    examples = dict(list(pd.read_parquet(options.data / "examples.parquet").groupby("split")))
    installed, models = versions(), {"ours": lambda seed: ours(items, examples, seed)}
    if util.find_spec("recbole"):
        installed["recbole"] = metadata.version("recbole")
        models = {
            name: lambda seed, feed_forward=feed_forward: theirs(items, examples, seed, feed_forward)
            for name, feed_forward in FEED_FORWARDS.items()
        }
    task = {"data": options.data.name, "shape": SHAPE, "training": TRAINING}  # a data run's name tells its parameters
    record = read_json(options.output) if options.output.exists() else {}
    if any(record.get(key) != value for key, value in task.items()):  # nothing to compare with
        counts = {name: len(part) for name, part in examples.items()}
        record = {**task, "items": len(items), "examples": counts, "models": {}}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for seed, (model, train) in itertools.product(options.seeds, models.items()):
        start = time.perf_counter()
        logps = train(seed)
        row = {name: measures(logps[name], targets(items, examples[name])) for name in MEASURED}
        entry = record["models"].setdefault(model, {"seeds": {}})
        entry["seeds"][str(seed)] = row | {"seconds": time.perf_counter() - start}
        entry |= {"mean": means(list(entry["seeds"].values())), "versions": installed}
        write_json(options.output, record)
        for name in MEASURED:
            print(f"{model:16} {seed} {name:10}", *(f"{key} {value:7.4f}" for key, value in row[name].items()))


if __name__ == "__main__":
    main()
