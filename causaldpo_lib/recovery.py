"""Do pseudo-environments recover the environments that are known? Tables from the simulator's studies, and sentences.

``python -m causaldpo_lib.recovery STUDY`` reads a study's finished data and fine-tuned runs, wherever the true
environment of every choice is known, and writes to ``results/<study>/``; notebook 14 reads nothing else:

    recovery.csv        a row per run, features, clusterer and target: setting, strength, seed, features, clusterer,
                        environments (K), noise_share, membership_entropy, method, prompts, target, ami, nmi, ari,
                        null (the 95 % quantile of AMI by chance), p
    recovery_probe.csv  what a supervised reader gets of the true environment from the same features: setting,
                        strength, seed, features, accuracy, majority, information, ami, p, prompts
    recovery_batch.csv  clustering in every mini-batch beside clustering once: setting, strength, seed, rule, size,
                        batches, several, noise_share, environments, target, ami

The same prompts serve all runs of a setting. Features without a model have no training seed: their ``seed`` is empty.
Shares, entropies and accuracies are fractions; AMI is adjusted mutual information, 0 by chance, 1 the same partition.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.special import xlogy
from sklearn.cluster import DBSCAN, HDBSCAN, KMeans
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import expected_mutual_information
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn.utils.rnn import pad_sequence

from causaldpo_lib import backbone, packing, prompts
from causaldpo_lib.amplification import strength_of
from causaldpo_lib.environments import (
    BatchEnvironments,
    EnvironmentInference,
    membership_diagnostics,
    soft_memberships,
    temperature_rule,
)
from causaldpo_lib.errors import StudyError
from causaldpo_lib.pipeline import load_run
from causaldpo_lib.records import folder_with, read_table, write_tables
from causaldpo_lib.released import EPS, MIN_SAMPLES
from causaldpo_lib.stages import history_genres, history_groups, periods, true_environments
from causaldpo_lib.tables import select

Frame = pd.DataFrame
Tables = Mapping[str, Frame]

PROMPTS = 4000  # training prompts looked at, at most
TABLES = ("recovery", "recovery_probe", "recovery_batch")
STATES = {
    "last": "last prompt token (this library)",
    "mean": "mean over prompt tokens",
    "first": "first token (released code)",
}
BAGS = {"genres": "no model: genres of the history", "items": "no model: items of the history"}
FEATURES = STATES | BAGS
TRUTH = "true_environment"
TARGETS = {
    TRUTH: "true environment",
    "history_group": "popularity of the history",
    "history_genre": "main genre of the history",
    "period": "period of the choice",
}
MORE = 8  # clusters: the most that the library's rule accepts
CLUSTERERS = {
    "knee": "DBSCAN, eps at the knee (this library)",
    "released": f"DBSCAN, eps {EPS:g}, min {MIN_SAMPLES} (released code)",
    "hdbscan": "HDBSCAN",
    "kmeans": "k-means, K true",
    "kmeans_more": f"k-means, K {MORE}",
    "gmm": "Gaussian mixture, K true",
}
RULES = {
    "batch": "in every batch, eps at the knee (Algorithm 1)",
    "released": f"in every batch, eps {EPS:g}, min {MIN_SAMPLES} (released code)",
    "once": "once over all prompts (this library)",
}
SIZES = (16, 32, 64, 128, 256, 512)  # prompts a batch
BATCHES = 32  # of a size, at most
BATCH_TARGETS = (TRUTH, "history_genre")
SHAPES = {"environments": "environments K", "noise_share": "noise (%)", "membership_entropy": "membership entropy"}
LEVEL, DRAWS = 0.05, 199  # of chance: the share that counts as rare, and how often labels are dealt anew
SAMPLES, SEEDS = (512, 1024, 2048, 4096), (1, 2, 3)  # prompts and seeds by which the library's rule is tried again
PENALTIES = (0.0003, 0.003, 0.03)  # inverse strengths of the probe's: hundreds of directions, some thousand prompts
PROBE, BEST = "supervised probe", "best clusterer, in hindsight"


# --- what is clustered ---


@torch.no_grad()
def prompt_states(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int = 64) -> dict[str, np.ndarray]:
    """Last-layer states (N, d) of prompts, a dictionary by ``STATES``: at the last token, the mean, at the first token.

    One forward pass for all; the last token's are those of ``packing.score_dataset``, which alignment clusters.
    """
    encoded = prompts.encode_prompts(tokenizer, list(texts), packing.context_of(model) - 1)
    decoder = packing.decoder_and_head(model)[0]
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    order, parts = [], []
    for chunk in packing.batches_by_length(encoded, batch_size):
        rows = [torch.tensor(encoded[index]) for index in chunk]
        ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id).to(device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        states = decoder(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state.float()
        last = states[torch.arange(len(rows), device=device), lengths - 1]
        mean = (states * mask[:, :, None]).sum(1) / lengths[:, None]
        order += chunk
        parts.append((last.cpu(), mean.cpu(), states[:, 0].cpu()))
    model.train(was_training)
    back = np.argsort(order)
    return {name: torch.cat(part).numpy()[back] for name, part in zip(STATES, zip(*parts, strict=True), strict=True)}


def history_bags(examples: Frame, items: Frame) -> dict[str, np.ndarray]:
    """What a history holds without any model, by ``BAGS``: shares of its titles by genre (N, G) and by item (N, I).

    Their order within the history is lost. Without genres in the catalogue only the items' are there.
    """
    index = pd.Index(items["item"])
    lengths = examples["history"].map(len).to_numpy()
    rows = np.repeat(np.arange(len(examples)), lengths)
    bag = np.zeros((len(examples), len(index)))
    np.add.at(bag, (rows, index.get_indexer(np.concatenate(examples["history"].to_numpy()))), 1.0)
    bag /= lengths[:, None]
    if "genres" not in items:
        return {"items": bag}
    return {"genres": bag @ pd.get_dummies(items["genres"].str.partition("|")[0]).to_numpy(float), "items": bag}


def targets(examples: Frame, items: Frame) -> dict[str, np.ndarray]:
    """What clusters may stand for, by ``TARGETS``, each (N,); what the data do not know is left out."""
    found = {TRUTH: true_environments(examples, items), "history_group": history_groups(examples, items)}
    if "genres" in items:
        found["history_genre"] = history_genres(examples, items)
    if "time" in examples:
        found["period"] = periods(examples, items)
    return found


def distinct(features: np.ndarray) -> bool:
    """Whether features (N, d) differ by more than rounding, so that there is anything to cluster."""
    return bool(np.ptp(features, axis=0).max() > 1e-5 * max(np.abs(features).max(), 1e-12))


# --- clusterers ---


class Clustering(NamedTuple):
    """Hard environments ``labels`` (N,) of all points, and what describes them as in ``environments``."""

    labels: np.ndarray
    environments: int
    noise_share: float
    membership_entropy: float
    method: str


def one_cluster(count: int, noise_share: float, method: str) -> Clustering:
    """A single environment of ``count`` points: what remains where fewer than two clusters are found."""
    return Clustering(np.zeros(count, dtype=int), 1, noise_share, 0.0, method)


def described(z: np.ndarray, labels: np.ndarray, method: str) -> Clustering:
    """A clustering of ``z`` (N, d'), with ``labels`` of -1 for noise, seen as CausalDPO sees it.

    Memberships are Eq. 8's with the library's temperature; noise belongs to the nearest centre, since Eq. 8 gives it
    a row too. Fewer than two clusters are a single environment.
    """
    noise = labels < 0
    if labels.max() < 1:
        return one_cluster(len(labels), float(noise.mean()), method)
    points = torch.as_tensor(z, dtype=torch.float32)
    centres = torch.stack([points[labels == k].mean(0) for k in range(labels.max() + 1)])
    memberships = soft_memberships(points, centres, temperature_rule(points, centres))
    entropy = membership_diagnostics(memberships)["membership_entropy"]
    nearest = memberships.argmax(1).numpy()
    return Clustering(np.where(noise, nearest, labels), len(centres), float(noise.mean()), entropy, method)


def clusterings(features: np.ndarray, environments: int, seed: int, fixed: bool = True) -> dict[str, Clustering]:
    """Every one of ``CLUSTERERS`` on features (N, d), where ``environments`` is the true number K.

    All but ``released`` see the library's projection: standardised, on the leading principal components. The released
    code's fixed radius is in units of the states themselves, and is left out where they are none (not ``fixed``).
    """
    names = [name for name in CLUSTERERS if fixed or name != "released"]
    if not distinct(features):
        return {name: one_cluster(len(features), 0.0, "identical features") for name in names}
    features = np.asarray(features, dtype=np.float64)
    inference = EnvironmentInference(seed=seed).fit(features)
    memberships, z = inference.memberships(features), inference.features(features).double().numpy()
    size = min(max(inference.min_samples), max(2, len(z) // 10))
    found = inference.diagnostics(memberships)
    knee = Clustering(
        memberships.argmax(1).numpy(),
        int(found["environments"]),
        found["noise_share"],
        found["membership_entropy"],
        found["environment_method"],
    )

    def mixture() -> np.ndarray:
        # Bags leave directions without any variance within a component, which would have no likelihood.
        model = GaussianMixture(environments, covariance_type="diag", reg_covar=1e-3, n_init=3, random_state=seed)
        return model.fit_predict(z)

    rest: dict[str, Callable[[], np.ndarray]] = {
        "released": lambda: DBSCAN(eps=EPS, min_samples=MIN_SAMPLES).fit_predict(features),
        "hdbscan": lambda: HDBSCAN(min_cluster_size=size, copy=True).fit_predict(z),
        "kmeans": lambda: KMeans(environments, n_init=10, random_state=seed).fit_predict(z),
        "kmeans_more": lambda: KMeans(MORE, n_init=10, random_state=seed).fit_predict(z),
        "gmm": mixture,
    }
    return {"knee": knee} | {
        name: described(features if name == "released" else z, rest[name](), name) for name in names[1:]
    }


# --- agreement ---


def dealt(users: np.ndarray, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Rows (draws, N) whose labels each row gets when users' sequences are dealt to others with as many rows.

    ``users`` (N,): the rows in order of user and time. Prompts of one user resemble each other and share environments,
    so dealing single rows would call the chance agreement of a few users a finding. A user whose number of rows no
    other has keeps its own.

    Raises:
        StudyError: no two users have equally many rows, so that nothing can be dealt.
    """
    starts = np.flatnonzero(np.r_[True, users[1:] != users[:-1]])
    lengths = np.diff(np.r_[starts, len(users)])
    groups = [starts[lengths == size] for size in np.unique(lengths)]
    if max(map(len, groups)) < 2:
        raise StudyError(f"no two of {len(starts)} users have as many prompts: give more prompts")
    rng, found = np.random.default_rng(seed), np.tile(np.arange(len(users)), (draws, 1))
    for own in groups:
        size = int(lengths[np.searchsorted(starts, own[0])])
        steps = np.arange(size)
        for row in found:
            row[own[:, None] + steps] = rng.permutation(own)[:, None] + steps
    return found


def ami_of(labels: np.ndarray, truths: np.ndarray) -> np.ndarray:
    r"""AMI (draws,) of ``labels`` (N,) with each of ``truths`` (draws, N), rearrangements of the first.

    .. math:: \mathrm{AMI} = (I - \mathbb E[I]) / (\tfrac12 (H_l + H_t) - \mathbb E[I])

    Expected information and entropies are those of the class sizes, the same for all. A partition with a single class
    says nothing: 0.
    """
    codes, names = pd.factorize(labels)
    classes, count = np.unique(truths[0]), len(labels)
    if min(len(names), len(classes)) < 2:
        return np.zeros(len(truths))
    members = np.eye(len(names), dtype=np.float32)[codes]
    tables = np.stack([(truths == name).astype(np.float32) @ members for name in classes], axis=2)
    shares = np.rint(tables).astype(np.float64) / count  # (draws, labels, truths)
    entropies = sum(-xlogy(margin, margin).sum() for margin in (shares[0].sum(0), shares[0].sum(1)))
    information = xlogy(shares, shares).sum((1, 2)) + entropies
    expected = expected_mutual_information(np.rint(tables[0]).astype(np.int64), count)
    return (information - expected) / (entropies / 2 - expected)


class Agreement(NamedTuple):
    """How far two partitions agree, what chance gives (``null``: its 95 % quantile) and how often it gives as much."""

    ami: float
    nmi: float
    ari: float
    null: float
    p: float


def agreement(labels: np.ndarray, truth: np.ndarray, rows: np.ndarray) -> Agreement:
    """Agreement of N labels; chance is the truth rearranged by ``rows`` (draws, N) of ``dealt``."""
    codes = pd.factorize(truth)[0]
    ami, *chance = ami_of(labels, np.concatenate([codes[None], codes[rows]]))
    return Agreement(
        float(ami),
        float(normalized_mutual_info_score(truth, labels)),
        float(adjusted_rand_score(truth, labels)),
        float(np.quantile(chance, 1 - LEVEL)),
        float((1 + (np.array(chance) >= ami - 1e-12).sum()) / (1 + len(chance))),
    )


def probe(
    features: np.ndarray, truth: np.ndarray, users: np.ndarray, rows: np.ndarray, folds: int = 5
) -> dict[str, float]:
    """What logistic regression reads of ``truth`` (N,) in features (N, d), on users that it was not fitted on.

    ``accuracy`` beside ``majority``, the share of the most frequent class; ``information``, the share of the entropy of
    ``truth`` that the predicted probabilities take away (0: nothing; below 0: worse than the classes' shares); ``ami``
    of predicted and true classes, and its ``p`` as in ``agreement``. The best of ``PENALTIES`` counts: a ceiling.
    Fewer users than ``folds`` make a fold each. Nothing is read of features that are all alike, nor where the users of
    some fit have a single class.
    """
    codes = pd.factorize(truth, sort=True)[0]
    shares = np.bincount(codes) / len(codes)
    found = {"accuracy": float(shares.max()), "majority": float(shares.max()), "information": 0.0, "ami": 0.0, "p": 1.0}
    folds = min(folds, len(np.unique(users)))
    if folds < 2 or not distinct(features):
        return found
    parts = list(GroupKFold(folds).split(features, codes, users))
    if min(len(np.unique(codes[fitted])) for fitted, _ in parts) < 2:
        return found
    best: dict[str, float] = {"information": -np.inf}
    for penalty in PENALTIES:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=1000))
        predicted = cross_val_predict(model, features, codes, cv=parts, method="predict_proba")
        lost = -np.log(np.clip(predicted[np.arange(len(codes)), codes], 1e-12, None)).mean()
        information = float(1 + lost / xlogy(shares, shares).sum())
        if information > best["information"]:
            chosen = predicted.argmax(1)
            best = {"accuracy": float((chosen == codes).mean()), "information": information}
    same = agreement(chosen, codes, rows)
    return found | best | {"ami": same.ami, "p": same.p}


def batch_rows(
    states: np.ndarray, once: np.ndarray, truths: Mapping[str, np.ndarray], seed: int, sizes: Sequence[int] = SIZES
) -> list[dict[str, Any]]:
    """Rows of recovery_batch.csv without the run: ``RULES`` in mini-batches of states (N, d) drawn by ``seed``.

    ``once`` (N,): environments of the clustering over all prompts, looked at in the same batches. ``several``: the
    share of batches with two clusters or more; others count as a single environment, with an AMI of 0. The random g of
    Algorithm 1 keeps the scale of the states.
    """
    width, order = states.shape[1], np.random.default_rng(seed).permutation(len(states))
    rules = {
        "batch": BatchEnvironments(width, seed=seed),
        "released": BatchEnvironments(width, width, seed=seed, eps=EPS, min_samples=MIN_SAMPLES),
    }
    rows = []
    for size in (size for size in sizes if size <= len(states)):
        drawn = [order[start : start + size] for start in range(0, len(order) - size + 1, size)][:BATCHES]
        for rule in RULES:
            found, noise = [], []
            for batch in drawn:
                if rule == "once":
                    found.append(once[batch])
                    continue
                with warnings.catch_warnings(), torch.no_grad():  # a batch without clusters is counted here
                    warnings.simplefilter("ignore")
                    found.append(rules[rule](torch.as_tensor(states[batch])).argmax(1).numpy())
                noise.append(rules[rule].noise_share)
            counts = np.array([len(np.unique(labels)) for labels in found])
            row = {"rule": rule, "size": size, "batches": len(drawn), "several": float((counts > 1).mean())}
            row |= {"noise_share": float(np.mean(noise)) if noise else np.nan, "environments": float(counts.mean())}
            for target in (name for name in BATCH_TARGETS if name in truths):
                pairs = zip(drawn, found, strict=True)
                scores = [_ami(truths[target][batch], labels) for batch, labels in pairs]
                rows.append({**row, "target": target, "ami": float(np.mean(scores))})
    return rows


def _ami(truth: np.ndarray, labels: np.ndarray) -> float:
    """AMI; 0 where a side has a single class, also both (which sklearn calls the same partition)."""
    few = min(len(np.unique(truth)), len(np.unique(labels))) < 2
    return 0.0 if few else float(adjusted_mutual_info_score(truth, labels))


# --- making the tables ---


def collect(study: Any, limit: int = PROMPTS) -> dict[str, Frame]:
    """All tables of a study, from its finished data and fine-tuned runs of settings with known environments.

    Raises:
        StudyError: no setting knows its environments, or a run is not finished (each is named).
    """
    from causaldpo_lib.study import jobs

    known = [job for job in jobs(study) if job.stage in ("data", "sft") and job.method is None]
    settings = [job.setting for job in known if job.stage == "data" and job.parameters["dataset"] == "simulated"]
    if not settings:
        raise StudyError(
            f"study {study.name}: no setting knows its true environments: name a study with dataset 'simulated'"
        )
    known = [job for job in known if job.setting in settings]
    if all(job.stage == "data" for job in known):
        raise StudyError(f"study {study.name} fine-tunes no model, whose states could be clustered: name another one")
    if left := [job.label for job in known if not (Path(job.folder) / "summary.json").exists()]:
        raise StudyError(
            f"study {study.name}: not finished: {', '.join(left)}: run `make study STUDY={study.name}` first"
        )
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}
    for setting in settings:
        data, *fitted = (job for job in known if job.setting == setting)
        for name, found in _setting_rows(data, fitted, limit).items():
            rows[name] += [
                {"setting": setting, "strength": strength_of(data.parameters["dataset_options"]), **row}
                for row in found
            ]
    return {name: pd.DataFrame(found) for name, found in rows.items()}


def _setting_rows(data: Any, fitted: Sequence[Any], limit: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of each table for one setting: its fine-tuned runs, and once what needs no model."""
    folder = load_run(data.folder, "data").folder
    items, examples = (pd.read_parquet(folder / f"{name}.parquet") for name in ("items", "examples"))
    sample = examples[examples["split"] == "train"]
    sample = sample.iloc[np.random.default_rng(0).permutation(len(sample))[:limit]]
    sample = sample.sort_values(["user", *(["time"] if "time" in sample else []), "example"], kind="stable")
    truths, users = targets(sample, items), sample["user"].to_numpy()
    rearranged = dealt(users)
    texts = prompts.prompt_table(sample, items.set_index("item")["title"])["prompt"].tolist()
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TABLES}

    def add(seed: int | None, name: str, features: np.ndarray) -> dict[str, Clustering]:
        key = {"seed": seed, "features": name}
        true_count = len(np.unique(truths[TRUTH]))
        found = clusterings(features, true_count, seed or 0, fixed=name in STATES)
        for clusterer, clustering in found.items():
            about = {**key, "clusterer": clusterer, **clustering._asdict(), "prompts": len(sample)}
            labels = about.pop("labels")
            for target, truth in truths.items():
                rows["recovery"].append({**about, "target": target, **agreement(labels, truth, rearranged)._asdict()})
        rows["recovery_probe"].append(
            {**key, **probe(features, truths[TRUTH], users, rearranged), "prompts": len(sample)}
        )
        return found

    for name, features in history_bags(sample, items).items():
        add(None, name, features)
    for job in fitted:
        model, tokenizer = backbone.load_checkpoint(load_run(job.folder, "sft").folder / "checkpoint")
        states = prompt_states(model, tokenizer, texts)
        found = {name: add(job.seed, name, states[name]) for name in STATES}
        batches = batch_rows(states["last"], found["last"]["knee"].labels, truths, job.seed)
        rows["recovery_batch"] += [{"seed": job.seed, **row} for row in batches]
    return rows


def write(study: Any, limit: int = PROMPTS) -> list[Path]:
    """Collect a study's tables into ``results/<study>/``; returns the files."""
    return write_tables(study.folder, collect(study, limit))


# --- how much hangs on the sample, for notebook 05 ---


def by_sample(data: str | Path, sft: str | Path, sizes: Sequence[int] = SAMPLES, seeds: Sequence[int] = SEEDS) -> Frame:
    """What the library's rule finds in samples of a data run's training prompts, by the states of a fine-tuned run.

    A sample is drawn as an alignment draws its pairs, from a generator of its seed, so that the row of an alignment's
    ``train_examples`` and ``seed`` has the environments that its penalty is between. Sizes that are larger than the
    training part stand for all of it, once.

    Returns:
        prompts, seed, environments, method, noise_share (fraction), membership_entropy (1: flat rows).
    """
    folder = load_run(data, "data").folder
    items, examples = (pd.read_parquet(folder / f"{name}.parquet") for name in ("items", "examples"))
    train = examples[examples["split"] == "train"]
    draws = {
        (size, seed): np.sort(np.random.default_rng(seed).choice(len(train), size, replace=False))
        for size in sorted({min(size, len(train)) for size in sizes})
        for seed in seeds
    }
    needed = np.unique(np.concatenate(list(draws.values())))
    texts = prompts.prompt_table(train.iloc[needed], items.set_index("item")["title"])["prompt"].tolist()
    model, tokenizer = backbone.load_checkpoint(load_run(sft, "sft").folder / "checkpoint")
    states = prompt_states(model, tokenizer, texts)["last"]
    rows = []
    for (size, seed), drawn in draws.items():
        own = states[np.searchsorted(needed, drawn)]
        inference = EnvironmentInference(seed=seed).fit(own)
        found = inference.diagnostics(inference.memberships(own))
        names = {"environments": "environments", "method": "environment_method", "noise_share": "noise_share"}
        names["membership_entropy"] = "membership_entropy"
        rows.append({"prompts": size, "seed": seed, **{name: found[key] for name, key in names.items()}})
    return pd.DataFrame(rows)


def samples_takeaway(found: Frame) -> str:
    """How the number of environments changes with the sample and the seed, in Markdown; ``found`` of `by_sample`."""
    said = [
        f"{size:,}: {', '.join(map(str, part['environments']))}" for size, part in found.groupby("prompts", sort=True)
    ]
    ways = "; ".join(f"{method} in {count}" for method, count in found["method"].value_counts().items())
    low, high = found["environments"].min(), found["environments"].max()
    what = f"{low}" if low == high else f"{low} to {high}"
    return (
        f"**Takeaway.** In {len(found)} samples of the training prompts one rule finds {what} environments (by "
        f"prompts, a number per seed: {'; '.join(said)}), with {span(found['noise_share'], 0, 100)} % noise. Its ways: "
        f"{ways}. An alignment's environments are those of its own sample and seed."
    )


# --- reading them ---


def tables_folder(path: str | Path) -> Path:
    """A study's folder of tables (``records.folder_with``)."""
    return folder_with("recovery.csv", path, f"python -m causaldpo_lib.recovery {Path(path).name}")


def read(path: str | Path) -> dict[str, Frame]:
    """The tables as ``write`` left them, by file stem, with what figures call their keys; ``path`` as above.

    Raises:
        StudyError: a table is missing or cannot be read.
    """
    folder, found = tables_folder(path), {}
    names = {"features": FEATURES, "clusterer": CLUSTERERS, "target": TARGETS, "rule": RULES}
    for stem in TABLES:
        table = read_table(folder / f"{stem}.csv", "make the tables again")
        present = [column for column in names if column in table]
        found[stem] = table.assign(**{f"{column}_name": table[column].map(names[column]) for column in present})
    return found


def strengths(tables: Tables) -> list[float]:
    """The strengths of confounding, from weak to strong."""
    return sorted(tables["recovery"]["strength"].unique())


def seeds_text(tables: Tables) -> str:
    """What a point of the figures is."""
    rows = tables["recovery"]
    count, prompts_seen = rows["seed"].nunique(), int(rows["prompts"].max())
    return (
        f"Every point is one of {count} training seeds; {count} values are too few for an interval. Features without a "
        f"model have one point. {prompts_seen:,} training prompts."
    )


def ordered(table: Frame) -> Frame:
    """Rows in the order in which features, clusterers and targets are named here."""
    order = {"features": list(FEATURES), "clusterer": list(CLUSTERERS), "target": list(TARGETS)}
    keys = [name for name in order if name in table]
    found = table.sort_values(keys, key=lambda column: column.map(order[column.name].index), kind="stable")
    return found.reset_index(drop=True)


def clustered(tables: Tables, **keys: Any) -> Frame:
    """Rows of recovery.csv with two clusters or more, ``ordered``; ``keys`` are columns and their values."""
    rows = ordered(select(tables["recovery"], **keys))
    return rows[rows["environments"] > 1].reset_index(drop=True)


def ceilings(tables: Tables) -> Frame:
    """AMI with the truth by supervised probe and by the best clusterer: setting, strength, seed, features, reader, ami.

    The best is chosen for each run by the truth itself, which no clusterer could.
    """
    keys = ["setting", "strength", "seed", "features", "features_name"]
    rows = select(tables["recovery"], target=TRUTH)
    best = rows.groupby(keys, sort=False, dropna=False)["ami"].max().reset_index()
    parts = [tables["recovery_probe"].assign(reader=PROBE), best.assign(reader=BEST)]
    table = pd.concat([part[[*keys, "reader", "ami"]] for part in parts], ignore_index=True)
    return ordered(table)


def probe_table(tables: Tables) -> Frame:
    """The probe's numbers by strength and features as text cells, from the least to the largest seed."""
    lines = []
    for (strength, name), rows in ordered(tables["recovery_probe"]).groupby(["strength", "features_name"], sort=False):
        cells = {"right (%)": span(rows["accuracy"], 1, 100), "majority (%)": span(rows["majority"], 1, 100)}
        cells |= {"information (%)": span(rows["information"], 1, 100), "AMI": span(rows["ami"]), "p": span(rows["p"])}
        lines.append({"strength": strength, "features": name, **cells})
    return pd.DataFrame(lines).sort_values("strength", kind="stable").reset_index(drop=True)


def shapes(tables: Tables, features: str) -> Frame:
    """What clusterings of one feature look like, in long form: quantity (``SHAPES``), value, clusterer, strength."""
    rows = ordered(select(tables["recovery"], features=features, target=TRUTH))
    rows = rows.assign(
        noise_share=100 * rows["noise_share"], strength_name=rows["strength"].map("strength {:g}".format)
    )
    keys = ["clusterer", "clusterer_name", "strength", "strength_name", "seed"]
    long = rows.melt(keys, list(SHAPES), "quantity")
    return long.assign(quantity=long["quantity"].map(SHAPES))


def batch_quantities(tables: Tables, strength: float) -> Frame:
    """What mini-batches find at one strength, in long form: quantity, value, rule, rule_name, seed, size."""
    rows = select(tables["recovery_batch"], strength=strength)
    keys = ["rule", "rule_name", "seed", "size"]
    first = select(rows, target=TRUTH)
    parts = [
        first[keys].assign(quantity="batches with several clusters (%)", value=100 * first["several"]),
        first[keys].assign(quantity="noise (%)", value=100 * first["noise_share"]),
    ]
    for target, part in rows.groupby("target", sort=False):
        parts.append(part[keys].assign(quantity=f"AMI with the {TARGETS[target]}", value=part["ami"]))
    return pd.concat(parts, ignore_index=True)


# --- sentences, in Markdown ---


def span(values: pd.Series, digits: int = 3, scale: float = 1.0, unit: str = "") -> str:
    """A number, or the least and the largest of several."""
    low, high = (f"{round(scale * value, digits) + 0.0:.{digits}f}" for value in (values.min(), values.max()))
    return f"{low}{unit}" if low == high else f"{low} to {high}{unit}"


def exceeding(rows: Frame) -> str:
    """How many clusterings agree more than chance does, and how many would by chance."""
    count = int((rows["p"] <= LEVEL).sum())
    return f"{count} of {len(rows)} clusterings are above chance at p <= {LEVEL:g} ({LEVEL * len(rows):.1f} expected)"


def strength_takeaway(tables: Tables) -> str:
    """AMI with the truth at each strength, for all clusterings of states, and what chance gives."""
    said = []
    for strength in strengths(tables):
        rows = clustered(tables, strength=strength, target=TRUTH, features=list(STATES))
        if rows.empty:
            said.append(f"Strength {strength:g}: no clusters are found")
            continue
        top = rows.loc[rows["ami"].idxmax()]
        most = f"most by {top['clusterer_name']} on the {top['features_name']}"
        said.append(f"Strength {strength:g}: AMI {span(rows['ami'])}, {most}; {exceeding(rows)}")
    return f"**Takeaway.** Clusters of the model's states against the true environment. {'. '.join(said)}."


def first_token_takeaway(tables: Tables) -> str:
    """Whether the released code's feature can be clustered at all."""
    rows = select(tables["recovery"], target=TRUTH, features="first")
    kinds = ", ".join(dict.fromkeys(rows["method"]))
    if (rows["environments"] == 1).all():
        return f"The first token's states give a single environment with every clusterer and seed ({kinds})."
    return f"The first token's states give {span(rows['environments'], 0)} environments ({kinds})."


def instead_takeaway(tables: Tables, strength: float) -> str:
    """What the clusters of states agree with most at one strength, and how far that is from the truth."""
    rows = clustered(tables, strength=strength, features=list(STATES))
    if rows.empty:
        return f"**Takeaway.** *Strength {strength:g}.* No clusters are found."
    said = [
        f"with the {TARGETS[target]} {span(part['ami'])} (median {part['ami'].median():.3f})"
        for target, part in rows.groupby("target", sort=False)
    ]
    runs = rows.pivot_table(index=["seed", "features", "clusterer"], columns="target", values="ami")
    most = runs.idxmax(axis=1).value_counts()
    winner = f"the {TARGETS[most.index[0]]} is what {most.iloc[0]} of {len(runs)} clusterings agree with most"
    return f"**Takeaway.** *Strength {strength:g}.* AMI of all clusters of states {', '.join(said)}; {winner}."


def read_by_probe(rows: Frame) -> bool:
    """Whether the probe's classes agree with the true ones more than by chance, with every seed."""
    return bool((rows["p"] <= LEVEL).all())


def ceiling_takeaway(tables: Tables, strength: float) -> str:
    """At one strength and for each feature: is the environment in the features, and how much of it do clusters find?"""
    said, both = [], select(ceilings(tables), strength=strength)
    for name in (name for name in FEATURES if name in set(both["features"])):
        rows = select(tables["recovery_probe"], strength=strength, features=name)
        accuracy = f"{span(rows['accuracy'], 1, 100)} % right, the majority {span(rows['majority'], 1, 100)} %"
        if not read_by_probe(rows):
            said.append(f"{FEATURES[name]}: the probe reads nothing reliable ({accuracy})")
            continue
        supervised, best = (select(both, features=name, reader=reader)["ami"] for reader in (PROBE, BEST))
        said.append(
            f"{FEATURES[name]}: the probe has {accuracy}, AMI {span(supervised)}; the best clusterer, chosen in "
            f"hindsight, reaches {span(best)}, {100 * best.mean() / max(supervised.mean(), 1e-12):.0f} % of the "
            "probe's AMI"
        )
    return f"**Takeaway.** *Strength {strength:g}.* {'. '.join(map(_upper, said))}."


def clusters_takeaway(tables: Tables, features: str) -> str:
    """How many clusters, how much noise and how flat memberships each clusterer gives, over all strengths and seeds."""
    rows, said = select(tables["recovery"], features=features, target=TRUTH), []
    for clusterer in (name for name in CLUSTERERS if name in set(rows["clusterer"])):
        part = select(rows, clusterer=clusterer)
        single = int((part["environments"] == 1).sum())
        noise, entropy = span(part["noise_share"], 0, 100), span(part["membership_entropy"], 2)
        said.append(
            f"{CLUSTERERS[clusterer]}: K {span(part['environments'], 0)}, noise {noise} %, entropy {entropy}"
            + f", a single environment in {single} of {len(part)} runs" * (single > 0)
        )
    methods = select(rows, clusterer="knee")["method"].value_counts()
    ways = ", ".join(f"{method} in {count}" for method, count in methods.items())
    return f"**Takeaway.** *{_upper(FEATURES[features])}.* {'; '.join(said)}. The library's rule ended in {ways} runs."


def batch_takeaway(tables: Tables, strength: float) -> str:
    """What a mini-batch finds at the smallest and the largest size, beside clustering once, at one strength."""
    rows = select(tables["recovery_batch"], strength=strength)
    sizes = [int(rows["size"].min()), int(rows["size"].max())]

    def ends(rule: str, target: str, value: str, digits: int = 3, scale: float = 1.0) -> str:
        parts = (select(rows, rule=rule, target=target, size=size)[value] for size in sizes)
        return ", then ".join(span(part, digits, scale) for part in parts)

    several = "; ".join(f"{RULES[rule]}: {ends(rule, TRUTH, 'several', 0, 100)} %" for rule in ("batch", "released"))
    said = [
        f"AMI with the {TARGETS[target]} {ends('batch', target, 'ami')} by Algorithm 1, "
        f"{ends('once', target, 'ami')} by clustering once"
        for target in rows["target"].unique()
    ]
    about = (
        f"Strength {strength:g}; batches of {sizes[0]}, then of {sizes[1]}; means over batches, least to largest seed"
    )
    return f"**Takeaway.** *{about}.* Batches with several clusters: {several}. {'. '.join(said)}."


def verdict(tables: Tables) -> str:
    """Is recovery above chance, where, how much of what a probe reads is found, and what is found instead?"""
    lines = []
    for strength in strengths(tables):
        rows = ordered(select(tables["recovery"], strength=strength, target=TRUTH, features=list(STATES)))
        groups = rows.groupby(["features_name", "clusterer_name"], sort=False)
        every = [f"{clusterer} on the {name}" for (name, clusterer), part in groups if (part["p"] <= LEVEL).all()]
        both = select(ceilings(tables), strength=strength, features=list(STATES))
        probes, bests = (select(both, reader=reader)["ami"].max() for reader in (PROBE, BEST))
        named = f": {'; '.join(every)}" if every else ""
        lines.append(
            f"- Strength {strength:g}: above chance with every seed in {len(every)} of {len(groups)} pairs of states "
            f"and clusterer{named}. The largest AMI is {bests:.3f}, a supervised probe's {probes:.3f}."
        )
    strongest = strengths(tables)[-1]
    medians = clustered(tables, strength=strongest, features=list(STATES)).groupby("target", sort=False)["ami"].median()
    if medians.empty:
        first = f"At strength {strongest:g} no clusters are found."
    else:
        first = (
            f"At strength {strongest:g} clusters of states agree with the true environment at a median AMI of "
            f"{medians[TRUTH]:.3f}, and most with the {TARGETS[medians.idxmax()]} ({medians.max():.3f})."
        )
    return "\n".join([f"**Takeaway.** {first}", "", *lines])


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


# --- command line ---


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tables of a study whose environments are known and print their paths; 0, or 1 after one sentence."""
    from causaldpo_lib.study import command

    return command("recovery", main.__doc__, write, arguments)


if __name__ == "__main__":
    sys.exit(main())
