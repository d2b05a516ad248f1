"""The stages of the study: each reads run folders, fills one, and is what its notebook executes.

A notebook calls ``execute(stage, globals())``; everything else here is the function behind a stage.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pyarrow import parquet
from sklearn.metrics import adjusted_mutual_info_score
from transformers import TrainingArguments

from causaldpo_lib import (
    backbone,
    boosts,
    causal,
    dpo4rec,
    environments,
    fairness,
    knowledge,
    metrics,
    packing,
    pairs,
    pipeline,
    prompts,
    ranking,
    rerankers,
    sasrec,
    splits,
    trainers,
)
from causaldpo_lib.data import load_dataset
from causaldpo_lib.errors import StudyError, pick
from causaldpo_lib.losses import check_hyperparameters
from causaldpo_lib.records import read_json, write_json
from causaldpo_lib.sources import digest, function_digest

TESTED = ("validation", "iid_test", "ood_test")  # validation serves the choice between methods
LONGEST_LIST = 20  # the largest cut-off of the tables
MEASURED = 51_200  # titles of training prompts by which the use of soft prompts is measured, in each environment


def execute(stage: str, namespace: Mapping[str, Any]) -> pipeline.Run:
    """Run a stage with the parameters found in ``namespace`` (a notebook's globals), unless its run is complete.

    An input left empty is filled by the upstream stage with its declared defaults, the smoke setting, so that every
    notebook runs alone. The run folder's name is a digest of the parameters; equal parameters find the finished run.

    Raises:
        StudyError: bad parameters or inputs, or a ``run`` folder that belongs to another configuration.
    """
    known = pipeline.declared(stage)
    parameters = pipeline.resolve(stage, {name: namespace[name] for name in known})
    for name, upstream in pipeline.STAGES[stage].inputs.items():
        if not parameters[name]:
            given = {key: parameters[key] for key in pipeline.STAGES[upstream[-1]].inputs if parameters.get(key)}
            run = execute(upstream[-1], {**pipeline.declared(upstream[-1]), **given})
            parameters[name] = str(run.folder)
    run = pipeline.open_run(stage, parameters)
    if not run.complete:
        arguments = {name: value for name, value in parameters.items() if name != "run"}
        scalars = STAGE_FUNCTIONS[stage](run.folder, **arguments)
        run.finish(device=_device_name(), **scalars)
    return run


def prepare_data(
    folder: Path,
    dataset: str,
    dataset_options: dict[str, Any],
    shift: str,
    shift_options: dict[str, Any],
    split_seed: int,
    max_history: int,
    test_examples: int,
    validation_examples: int,
) -> dict[str, Any]:
    """Load a dataset, split it under a shift, and write split, catalogue and examples.

    Held-out examples are sampled once (``test_examples`` a test split, 0 for all), so that all methods and seeds share
    them.
    """
    interactions = load_dataset(dataset, **dataset_options)
    split = splits.make_split(shift, interactions, split_seed, **shift_options)
    examples = splits.history_table(split, max_history)
    of_split = examples["split"].to_pandas()
    left = split["split"].value_counts() - of_split.value_counts().reindex(splits.SPLIT_NAMES, fill_value=0)
    rng = np.random.default_rng(split_seed)
    kept = []
    for name, rows in sorted(of_split.groupby(of_split).indices.items()):
        most = {"train": 0, "validation": validation_examples}.get(name, test_examples)
        if 0 < most < len(rows):
            rows = np.sort(rng.choice(rows, most, replace=False))
        kept.append(rows)
    examples = examples.take(np.concatenate(kept))
    catalogue = interactions.items[interactions.items["item"].isin(split["item"])]
    counts = split.loc[split["split"] == "train", "item"].value_counts().reindex(catalogue["item"], fill_value=0)
    catalogue = catalogue.merge(splits.popularity_groups(counts), on="item")
    split.to_parquet(folder / "split.parquet")
    catalogue.to_parquet(folder / "items.parquet")
    parquet.write_table(examples, folder / "examples.parquet")
    if interactions.truth is not None:
        truth = interactions.truth.interventional().stack().rename("preference").reset_index()
        truth[truth["item"].isin(catalogue["item"])].to_parquet(folder / "truth.parquet")
    sizes = split["split"].value_counts()
    hashes = [pd.util.hash_pandas_object(frame, index=False) for frame in (interactions.table, interactions.items)]
    return {
        "interactions_sha256": hashlib.sha256(pd.concat(hashes).to_numpy().tobytes()).hexdigest(),
        "users": split["user"].nunique(),
        "items": len(catalogue),
        "dropped_without_history": {name: int(left[name]) for name in splits.SPLIT_NAMES},
        **{f"interactions_{name}": int(size) for name, size in sizes.items()},
        **{f"examples_{name}": int(size) for name, size in examples["split"].to_pandas().value_counts().items()},
    }


def fine_tune(
    folder: Path,
    data: str,
    backbone: str,
    seed: int,
    pretrain_epochs: int,
    epochs: float,
    weighting: str,
    learning_rate: float,
    batch_size: int,
    lora_rank: int,
) -> dict[str, Any]:
    """Supervised fine-tuning (completion loss) of a backbone on the training examples, weighed by ``weighting``.

    An embedded backbone is initialised from ``seed`` and first pretrained on the catalogue's titles alone; with
    ``epochs`` 0 it stays as it is then, and a loaded one as it was.
    """
    items, examples = _tables(data)
    model, tokenizer = _backbone(backbone, items["title"], seed, lora_rank)
    shared = {"seed": seed, "learning_rate": learning_rate, "batch_size": batch_size, "folder": folder}
    shared["train_sampling_strategy"] = "group_by_length"  # little padding
    logs = []
    if backbone in _TINY and pretrain_epochs:
        titles = [{"prompt": prompts.prompt_text([]), "chosen": prompts.response_text(t)} for t in items["title"]]
        arguments = _arguments(TrainingArguments, rows=len(titles), epochs=pretrain_epochs, **shared)
        trainer = trainers.SupervisedTrainer(model, arguments, titles, tokenizer, label="pretraining on titles")
        trainer.train()
        logs.append(pd.DataFrame(trainer.table()).assign(part="pretraining"))
    titles = items.set_index("item")["title"]
    sample = examples[examples["split"] == "train"]
    rows = prompts.prompt_table(sample, titles)
    weights = pick(fairness.WEIGHTINGS, weighting, "weighting of training examples")(sample, items)
    if weights is not None:
        rows["weight"] = weights
    outcome = None
    if epochs:
        arguments = _arguments(TrainingArguments, rows=len(rows), epochs=epochs, **shared)
        trainer = trainers.SupervisedTrainer(model, arguments, rows.to_dict("records"), tokenizer, label="fine-tuning")
        outcome, model = trainer.train(), trainer.model
        logs.append(pd.DataFrame(trainer.table()).assign(part="fine-tuning"))
    if not logs:
        raise StudyError("epochs = 0 leaves nothing to train here: set it above 0, or pretrain an embedded backbone")
    pd.concat(logs, ignore_index=True).to_csv(folder / "log.csv", index=False)
    validation = prompts.prompt_table(examples[examples["split"] == "validation"], titles)
    features = trainers.encode_features(tokenizer, validation.to_dict("records"), ["chosen"], packing.context_of(model))
    scores = packing.score_dataset(
        model,
        [feature["input_ids"] for feature in features],
        [feature["responses"] for feature in features],
        tokenizer.pad_token_id,
        2 * batch_size,
    )
    _save(model, tokenizer, items, folder)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_loss": outcome.training_loss if outcome else float("nan"),
        "validation_logp": float(scores.sum_logps.mean()),
        "train_seconds": outcome.metrics["train_runtime"] if outcome else 0.0,
    }


def align(
    folder: Path,
    data: str,
    sft: str,
    assistant: str,
    method: str,
    seed: int,
    loss: str,
    loss_options: dict[str, Any],
    nll_weight: float,
    negatives: str,
    negatives_per_prompt: int,
    negatives_tempering: float,
    memberships: str,
    membership_gradient: str,
    prior: str,
    penalty: str,
    output: str,
    mmd_weight: float,
    mmd_bandwidth: float,
    mmd_estimator: str,
    mmd_pairs: str,
    tokens_per_environment: int,
    iterations: int,
    round_epochs: float,
    train_examples: int,
    epochs: float,
    learning_rate: float,
    batch_size: int,
    lora_rank: int,
) -> dict[str, Any]:
    """Preference alignment of a fine-tuned checkpoint, which is also the frozen reference.

    ``train_examples`` (0 for all) and their negatives depend on ``seed`` only: methods that share a seed share pairs.
    Each of ``iterations`` starts from the policy of the one before, its new reference, and draws negatives anew; with
    ``round_epochs`` it then fine-tunes on the round's examples before it aligns, as SPRec does. An ``assistant`` is
    RosePO's preference oracle, whose doubts smooth the labels.
    """
    if iterations < 1:
        raise StudyError(f"iterations = {iterations} trains nothing: set it to 1 or more")
    if tokens_per_environment and (lora_rank or iterations > 1):
        raise StudyError("tokens_per_environment trains new embeddings, once: set lora_rank: 0 and iterations: 1")
    items, examples = _tables(data)
    sample = examples[examples["split"] == "train"]
    if 0 < train_examples < len(sample):
        rng = np.random.default_rng(seed)
        sample = sample.iloc[np.sort(rng.choice(len(sample), train_examples, replace=False))]
    titles = items.set_index("item")["title"]
    rows = prompts.prompt_table(sample, titles)
    if memberships in ORACLES:
        rows["environment"] = ORACLES[memberships](sample, items)
    model, tokenizer = _backbone(pipeline.load_run(sft, "sft").folder / "checkpoint", [], seed, lora_rank)
    logs = []
    for iteration in range(iterations):
        if iteration and lora_rank:
            # The round before is the reference: its adapters become part of the model, under fresh ones.
            torch.manual_seed(seed + iteration)
            model = backbone.with_lora(model.merge_and_unload(), lora_rank)
        pool = sample
        if negatives == "self_generated":
            pool = sample.assign(ranked=_own_lists(model, tokenizer, items, rows, sample, negatives_per_prompt))
        if negatives == "environment_matched":
            pool = sample.assign(memberships=_memberships(model, tokenizer, rows, memberships, seed))
        rejected = pairs.preference_pairs(
            pool, items, negatives, negatives_per_prompt, seed + 1000 * iteration, negatives_tempering
        )
        rows["rejected"] = [[prompts.response_text(titles[item]) for item in row] for row in rejected]
        if assistant:
            rows["label_smoothing"] = _doubts(assistant, sample, items, rejected)
        if round_epochs:
            arguments = _arguments(
                TrainingArguments,
                rows=len(rows),
                folder=folder,
                seed=seed + iteration,
                epochs=round_epochs,
                learning_rate=learning_rate,
                batch_size=batch_size,
            )
            supervised = rows[["prompt", "chosen"]].to_dict("records")
            trainers.SupervisedTrainer(model, arguments, supervised, tokenizer, label=f"{method}, fine-tuning").train()
            if lora_rank:
                model = backbone.with_lora(model.merge_and_unload(), lora_rank)
        # Batches are drawn at random, not by length: histories of one length share environments, and in a batch with
        # a single example of an environment the MMD measures that example.
        arguments = _arguments(
            trainers.CausalDPOConfig,
            rows=len(rows),
            folder=folder,
            seed=seed,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
            loss=loss,
            loss_options=loss_options,
            nll_weight=nll_weight,
            memberships=_kind(memberships),
            membership_gradient=membership_gradient,
            prior=prior,
            penalty=penalty,
            output=output,
            mmd_weight=mmd_weight,
            mmd_bandwidth=mmd_bandwidth or None,
            mmd_estimator=mmd_estimator,
            mmd_pairs=mmd_pairs,
            tokens_per_environment=tokens_per_environment,
            environment_seed=seed,
            reference_cache=str(folder.parent / f"reference-{function_digest('packing', 'score_dataset')[:10]}"),
        )
        trainer = trainers.CausalDPOTrainer(
            model, args=arguments, train_dataset=rows.to_dict("records"), processing_class=tokenizer, label=method
        )
        outcome = trainer.train()
        model = trainer.model
        logs.append(pd.DataFrame(trainer.table()).assign(iteration=iteration))
    log = pd.concat(logs, ignore_index=True)
    log.to_csv(folder / "log.csv", index=False)
    found = pd.DataFrame(trainer.memberships.numpy()).add_prefix("environment_")
    found.assign(example=sample["example"].to_numpy()).to_parquet(folder / "memberships.parquet")
    _save(model, tokenizer, items, folder)
    used = {}
    if trainer.backdoor is not None:
        trainer.backdoor.save(folder / "checkpoint")
        some = rows["prompt"].tolist()[: max(MEASURED // len(items), 8)]
        catalogue = ranking.Catalogue.build(items, tokenizer)
        information = ranking.environment_information(model, tokenizer, catalogue, some, batch_size, trainer.backdoor)
        used = {"environment_information": information}
    return {
        **trainer.diagnostics,
        **used,
        **_agreement(trainer.memberships.argmax(1).numpy(), sample, items),
        **{f"{name}_first": log[name].iloc[0] for name in ("mmd2_debiased", "margin", "chosen_logp")},
        **{f"{name}_last": log[name].iloc[-1] for name in ("mmd2_debiased", "margin", "chosen_logp", "accuracy")},
        **({"smoothing_mean": float(rows["label_smoothing"].mean())} if assistant else {}),
        "popularity_of_negatives": _popularity_of(rejected, items),
        "pairs": len(rows),
        "train_seconds": outcome.metrics["train_runtime"],
    }


def fit_sequential(
    folder: Path,
    data: str,
    seed: int,
    loss: str,
    hidden: int,
    blocks: int,
    heads: int,
    dropout: float,
    epochs: int,
    patience: int,
    learning_rate: float,
    weight_decay: float,
    batch_size: int,
) -> dict[str, Any]:
    """SASRec on the training examples' item ids, stopped by validation: a baseline, and what assists other methods."""
    items, examples = _tables(data)
    length = int(examples["history"].map(len).max())
    ids = items["item"].to_numpy()
    torch.manual_seed(seed)
    shape = {"hidden": hidden, "blocks": blocks, "heads": heads, "dropout": dropout, "length": length}
    model = sasrec.SASRec(len(ids), **shape).to(backbone.device())

    def windows(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        rows = examples[examples["split"] == split]
        targets = torch.from_numpy(pd.Index(ids).get_indexer(rows["item"]))
        return sasrec.encode_histories(rows["history"].tolist(), ids, length), targets

    log = sasrec.fit_sasrec(
        model,
        windows("train"),
        windows("validation"),
        loss=loss,
        epochs=epochs,
        patience=patience,
        learning_rate=learning_rate,
        batch_size=batch_size,
        weight_decay=weight_decay,
        seed=seed,
    )
    pd.DataFrame(log).to_csv(folder / "log.csv", index=False)
    sasrec.save_sasrec(model, ids, folder / "checkpoint")
    best = max(log, key=lambda row: row["validation_ndcg10"])
    return {"parameters": sum(weights.numel() for weights in model.parameters()), **best, "epochs_run": len(log)}


def rank(
    folder: Path,
    data: str,
    checkpoint: str,
    assistant: str,
    ranker: str,
    boost: str,
    strengths: list[float],
    beam_width: int,
    mask_history: bool,
    list_length: int,
    batch_size: int,
) -> dict[str, Any]:
    """Rank the catalogue for the held-out examples and write the lists.

    On simulated data also the exact log-probabilities of the whole catalogue, one list an example in the order of
    ``items.parquet``, which the true preferences are compared with. A ``boost`` mixes something into the ranking, as
    strongly as serves validation best among ``strengths``.
    """
    if list_length < LONGEST_LIST:
        raise StudyError(
            f"list_length = {list_length} is too short for HR@{LONGEST_LIST}: set it to {LONGEST_LIST} or more"
        )
    items, examples = _tables(data)
    examples = examples[examples["split"].isin(TESTED)].reset_index(drop=True)
    source = pipeline.load_run(checkpoint, ("sft", "align", "sasrec"))
    if (source.stage == "sasrec") != (ranker == "sasrec"):
        raise StudyError(f"ranker {ranker!r} does not fit a run of stage {source.stage}: 'sasrec' ranks by SASRec runs")
    if mask_history and ranker == "candidates":
        raise StudyError("ranker 'candidates' has its own lists, which hold nothing of the history: unset mask_history")
    options = {"masked": examples["history"].tolist()} if mask_history else {}
    if beam_width:
        if not ranker.startswith("beam"):
            raise StudyError(f"ranker {ranker!r} searches no beams: set beam_width: 0")
        options["width"] = beam_width
    if strengths and not boost:
        raise StudyError("strengths are those of a boost: name what is to be mixed in, or leave them empty")
    simulated = (pipeline.load_run(data, "data").folder / "truth.parquet").exists()
    shares, chosen = None, {}
    if ranker == "sasrec":
        if boost:
            raise StudyError("ranker 'sasrec' mixes nothing in: leave boost empty")
        shares = _sequential_logps(checkpoint, examples, items)
        ids, targets = items["item"].to_numpy(), examples["item"].to_numpy()
        found = ranking.rank_scores(shares, ids, targets, list_length, **options)
    else:
        model, tokenizer = backbone.load_checkpoint(source.folder / "checkpoint")
        with_environments = (source.folder / "checkpoint" / causal.BACKDOOR_FILE).exists()
        mixture = causal.Backdoor.load(source.folder / "checkpoint") if with_environments else None
        catalogue = ranking.Catalogue.build(items, tokenizer)
        texts = prompts.prompt_table(examples, items.set_index("item")["title"])["prompt"].tolist()

        def ranked(rows: np.ndarray, **more: Any) -> ranking.Ranking:
            """The examples of ``rows`` (positions), with options whose first dimension is the examples'."""
            own = {name: [values[row] for row in rows] for name, values in options.items() if name == "masked"}
            return pick(ranking.RANKERS, ranker, "ranker")(
                model,
                tokenizer,
                catalogue,
                [texts[row] for row in rows],
                examples["item"].to_numpy()[rows].tolist(),
                list_length,
                batch_size,
                mixture=mixture,
                **{**options, **own, **more},
            )

        if boost:
            logps = _sequential_logps(assistant, examples, items) if assistant else None
            source = boosts.Source(ranked, examples, items, logps)
            found, chosen["strength"] = boosts.boosted(source, ranker, boost, strengths)
        else:
            found = ranked(np.arange(len(examples)))
        if simulated and ranker != "candidates":  # whose metrics are among the candidates
            shares = ranking.catalogue_shares(model, tokenizer, catalogue, texts, batch_size, mixture=mixture)
    predictions = examples[["example", "split", "user", "item"]].rename(columns={"item": "target"})
    predictions = predictions.assign(
        rank=found.rank, target_logp=found.target_logp, items=found.items.tolist(), scores=found.scores.tolist()
    )
    if simulated and shares is not None:
        predictions["catalogue_logps"] = shares.tolist()
    predictions.to_parquet(folder / "predictions.parquet")
    by_split = predictions.groupby("split")
    return {
        "catalogue": len(items),
        **chosen,
        **{f"examples_{name}": len(part) for name, part in by_split},
        **{f"hr10_{name}": float((part["rank"] < 10).mean()) for name, part in by_split},
        **{f"target_logp_{name}": float(part["target_logp"].mean()) for name, part in by_split},
    }


def infer_environments(folder: Path, data: str, sft: str, seed: int, points: int) -> dict[str, Any]:
    """Infer pseudo-environments from a fine-tuned model's states of up to 8,000 training prompts; map some by UMAP."""
    # UMAP compiles itself on import (half a minute): only this stage pays.
    from umap import UMAP

    items, examples = _tables(data)
    rng = np.random.default_rng(seed)
    sample = examples[examples["split"] == "train"]
    sample = sample.iloc[np.sort(rng.permutation(len(sample))[:8000])]
    model, tokenizer = backbone.load_checkpoint(pipeline.load_run(sft, "sft").folder / "checkpoint")
    texts = prompts.prompt_table(sample, items.set_index("item")["title"])["prompt"].tolist()
    states = _prompt_states(model, tokenizer, texts)
    inference = environments.EnvironmentInference(seed=seed).fit(states)
    memberships = inference.memberships(states)
    labels = memberships.argmax(1).numpy()
    shown = np.sort(rng.permutation(len(sample))[:points])
    features = inference.features(states).numpy()[shown]
    coordinates = UMAP(n_neighbors=min(15, len(shown) - 1), random_state=seed, n_jobs=1).fit_transform(features)
    table = pd.DataFrame(
        {
            "umap_x": coordinates[:, 0],
            "umap_y": coordinates[:, 1],
            "environment": labels[shown],
            "membership": memberships.max(1).values.numpy()[shown],
            "group": history_groups(sample, items)[shown],
        }
    )
    if "environment" in sample:
        table["true_environment"] = sample["environment"].to_numpy()[shown]
    if "time" in sample:
        table["period"] = periods(sample, items)[shown]
    table.to_csv(folder / "points.csv", index=False, float_format="%.4f")
    return {**inference.diagnostics(memberships), **_agreement(labels, sample, items), "prompts": len(sample)}


def reason_and_rerank(
    folder: Path,
    data: str,
    method: str,
    seed: int,
    users: int,
    list_size: int,
    positives: int,
    pool: int,
    training_lists: int,
    list_seed: int,
    initial_epochs: int,
    generator: str,
    factors: list[str],
    teaching_texts: int,
    teaching_epochs: float,
    teaching_learning_rate: float,
    encoder: str,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    generation_batch_size: int,
    reranker: str,
    reranking_loss: str,
    adaptor: str,
    embedding: int,
    hidden: int,
    dropout: float,
    reranking_epochs: int,
    patience: int,
    reranking_learning_rate: float,
    weight_decay: float,
    reranking_batch_size: int,
    folds: int,
    rounds: int,
    loss: str,
    loss_options: dict[str, Any],
    nll_weight: float,
    memberships: str,
    penalty: str,
    output: str,
    mmd_weight: float,
    epochs: float,
    learning_rate: float,
    batch_size: int,
    lora_rank: int,
) -> dict[str, Any]:
    """DPO4Rec: align a generator of knowledge with its re-ranker's metric, and evaluate every row of texts.

    Finished rounds stay in a hidden folder until the run is complete, so that an interrupted one goes on from there; it
    is named after the code, the parameters and the inputs, and others are removed.
    """
    if rounds < 1:
        raise StudyError(f"rounds = {rounds} aligns nothing: set it to 1 or more")
    # All names before anything is taught.
    reranking_loss = reranking_loss or pick(rerankers.PAPER_LOSSES, reranker, "re-ranker")
    pick(rerankers.RERANKERS, reranker, "re-ranker")
    pick(rerankers.RERANKING_LOSSES, reranking_loss, "re-ranking loss")
    pick(rerankers.ADAPTORS, adaptor, "adaptor")
    check_hyperparameters(loss, loss_options)
    items, _ = _tables(data)
    source = pipeline.load_run(data, "data").folder
    split = pd.read_parquet(source / "split.parquet")
    material, initial = dpo4rec.make_material(
        items,
        split,
        size=list_size,
        positives=positives,
        pool=pool,
        copies=training_lists,
        users=users,
        epochs=initial_epochs,
        seed=list_seed,
    )
    config = read_json(folder / "config.json")
    home = folder / ".rounds" / digest([pipeline.library_digest("dpo4rec"), config])[:10]
    for other in (folder / ".rounds").glob("*"):
        if other != home:
            shutil.rmtree(other)
    titles = items["title"].tolist()
    values = knowledge.factor_values(items, material.counts, factors)
    embedded = generator in _TINY
    described = knowledge.facts(titles, values) if embedded else titles
    start: str | Path = generator
    shared = {"folder": folder, "batch_size": batch_size}
    if embedded:
        rng = np.random.default_rng(seed)
        rows = knowledge.teaching_rows(material.histories, described, values, material.counts, teaching_texts, rng)
        start = _taught(generator, rows, seed, lora_rank, teaching_epochs, teaching_learning_rate, **shared)

    def align_on(model: Any, tokenizer: Any, rows: list[dict[str, str]], number: int) -> tuple[Any, pd.DataFrame]:
        torch.manual_seed(seed + number)
        arguments = _arguments(
            trainers.CausalDPOConfig,
            rows=len(rows),
            seed=seed + number,
            epochs=epochs,
            learning_rate=learning_rate,
            loss=loss,
            loss_options=loss_options,
            nll_weight=nll_weight,
            memberships=memberships,
            penalty=penalty,
            output=output,
            mmd_weight=mmd_weight,
            environment_seed=seed,
            **shared,
        )
        trainer = trainers.CausalDPOTrainer(
            backbone.with_lora(model, lora_rank),
            args=arguments,
            train_dataset=rows,
            processing_class=tokenizer,
            label=f"{method}, round {number}",
        )
        trainer.train()
        return trainer.model, pd.DataFrame(trainer.table()).assign(round=number)

    named = factors if not embedded else list(values)
    setup = dpo4rec.Setup(
        material=material,
        prompts=[
            knowledge.knowledge_prompt([described[item] for item in history], named, instruction=not embedded)
            for history in material.histories
        ],
        item_texts=knowledge.item_texts(titles, values),
        load=lambda place: backbone.load_checkpoint(place, dtype="auto" if lora_rank else torch.float32),
        align=align_on,
        encoder=encoder,
        samples=samples,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        batch_size=generation_batch_size,
        folds=folds,
        seed=seed,
        reranking={
            "kind": reranker,
            "loss": reranking_loss,
            "adaptor": adaptor,
            "embedding": embedding,
            "hidden": hidden,
            "epochs": reranking_epochs,
            "patience": patience,
            "learning_rate": reranking_learning_rate,
            "weight_decay": weight_decay,
            "batch_size": reranking_batch_size,
            "dropout": dropout,
        },
    )
    found = dpo4rec.run(home, setup, start, rounds)
    found.tables["initial"] = pd.DataFrame(initial)
    for name in ("lists", "texts", "pairs"):
        found.tables[name].to_parquet(folder / f"{name}.parquet")
    for name in ("rounds", "reranking_log", "initial", "log"):
        found.tables[name].to_csv(folder / f"{name}.csv", index=False)
    if (source / "truth.parquet").exists():  # of simulated users alone: others are nobody's to show
        write_json(folder / "example.json", dpo4rec.example(found.folders, material, titles))
    if found.policy != generator:
        shutil.copytree(found.policy, folder / "checkpoint")
    shutil.rmtree(folder / ".rounds")
    first, last = found.tables["rounds"].iloc[0], found.tables["rounds"].iloc[-1]
    return {
        "users": len(material.users),
        **{f"left_out_{name}": count for name, count in material.left_out.items()},
        **{f"lists_{name}": len(lists) for name, lists in material.lists.items()},
        "false_negatives": material.false_negatives,
        "initial_validation_ndcg10": max(row["validation_ndcg10"] for row in initial),
        **{f"{name}_first": first[name] for name in ("reward", "validation", "gap", "pairs", "tied")},
        **{f"{name}_last": last[name] for name in ("reward", "validation", "gap", "pairs", "tied")},
        **{name: found.tables["rounds"][name].sum() for name in ("empty", "over_long", "unusable")},
    }


def _taught(
    generator: str,
    rows: list[dict[str, Any]],
    seed: int,
    lora_rank: int,
    epochs: float,
    learning_rate: float,
    folder: Path,
    batch_size: int,
) -> Path:
    """The checkpoint of an embedded backbone that was taught to write summaries, made unless it is there.

    It lies beside the run's folder, since the runs of one seed share it whatever their re-ranker.
    """
    options = {"seed": seed, "epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size}
    content = [function_digest("stages", "_taught"), generator, rows, options]
    target = folder.parent / f"taught-{digest(content)[:10]}"
    if not target.exists():
        texts = [text for row in rows for text in (row["prompt"], *row["chosen"])]
        model, tokenizer = _backbone(generator, texts, seed, lora_rank)
        arguments = _arguments(
            TrainingArguments, rows=len(rows), folder=folder, train_sampling_strategy="group_by_length", **options
        )
        trainer = trainers.SupervisedTrainer(model, arguments, rows, tokenizer, label="teaching")
        trainer.train()
        draft = target.with_name(f".{target.name}.{os.getpid()}")
        backbone.save_checkpoint(trainer.model, tokenizer, draft)
        try:
            draft.rename(target)
        except OSError:  # another run was faster, with the same result
            shutil.rmtree(draft)
    return target


STAGE_FUNCTIONS = {
    "data": prepare_data,
    "sft": fine_tune,
    "sasrec": fit_sequential,
    "align": align,
    "rank": rank,
    "environments": infer_environments,
    "dpo4rec": reason_and_rerank,
}
_TINY = backbone.TINY


def history_groups(examples: pd.DataFrame, items: pd.DataFrame) -> np.ndarray:
    """The popularity group (equal training mass) of each history's median item by popularity, (N,)."""
    group = dict(zip(items["item"], items["group_mass"], strict=True))
    return np.array([sorted(group[item] for item in history)[len(history) // 2] for history in examples["history"]])


def history_genres(examples: pd.DataFrame, items: pd.DataFrame) -> np.ndarray:
    """The most frequent first-listed genre of each history, the alphabetically first of equals, (N,)."""
    genre = dict(zip(items["item"], items["genres"].str.partition("|")[0], strict=True))
    named = [sorted(genre[item] for item in history) for history in examples["history"]]
    return np.array([max(names, key=names.count) for names in named])


def target_groups(examples: pd.DataFrame, items: pd.DataFrame) -> np.ndarray:
    """The popularity group (equal training mass) of each target, (N,): it looks at the outcome."""
    return examples["item"].map(items.set_index("item")["group_mass"]).to_numpy()


def periods(examples: pd.DataFrame, items: pd.DataFrame) -> np.ndarray:
    """The fifth of the training period, by number of examples, in which each target was chosen, (N,)."""
    if "time" not in examples:
        raise StudyError("memberships 'oracle_period' need times, which this dataset lacks: choose other memberships")
    return metrics.periods(examples["time"].to_numpy())


def true_environments(examples: pd.DataFrame, items: pd.DataFrame) -> np.ndarray:
    """The environment in which each target was chosen, (N,): the simulator's truth."""
    if "environment" not in examples:
        raise StudyError(
            "memberships 'oracle_environment' need the true environments, which only dataset 'simulated' has: choose "
            "other memberships"
        )
    return examples["environment"].to_numpy()


# Environments that no method may know: bounds on what inferring them better could bring.
ORACLES = {
    "oracle_environment": true_environments,
    "oracle_history": history_groups,
    "oracle_target": target_groups,
    "oracle_period": periods,
}


def _kind(memberships: str) -> str:
    """What the trainer calls these memberships: oracles are labels that the rows carry."""
    return "given" if memberships in ORACLES else memberships


def _memberships(model: Any, tokenizer: Any, rows: pd.DataFrame, memberships: str, seed: int) -> list[np.ndarray]:
    """The memberships that the trainer will give these rows, for the negatives to be drawn before there is one.

    But for rounds that fine-tune before they align (``round_epochs``): negatives are drawn from the policy that begins
    the round, and so are these memberships, while the trainer infers its own from the fine-tuned policy.
    """
    states = _prompt_states(model, tokenizer, rows["prompt"].tolist())
    labels = rows["environment"].tolist() if memberships in ORACLES else None
    kind = pick(environments.MEMBERSHIPS, _kind(memberships), "kind of memberships")
    return list(kind(states, labels, seed).rows.numpy())


def _prompt_states(model: Any, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Last-layer states (N, d) of the prompts' last tokens, in the trainer's precision: what environments are of."""
    encoded = prompts.encode_prompts(tokenizer, texts, packing.context_of(model) - 1)
    with torch.autocast(backbone.device().type, torch.bfloat16, enabled=_in_bfloat16()):
        scores = packing.score_dataset(
            model, encoded, [[[tokenizer.eos_token_id]]] * len(encoded), tokenizer.pad_token_id, batch_size=64
        )
    return scores.prompt_states


def _in_bfloat16() -> bool:
    """Whether models are trained under bfloat16 autocast: where there is a GPU."""
    return torch.cuda.is_available()


def _doubts(assistant: str, examples: pd.DataFrame, items: pd.DataFrame, rejected: np.ndarray) -> np.ndarray:
    r"""RosePO's label smoothing (N,): :math:`\epsilon_i = \sigma(s_l - s_w)` by a SASRec's scores, at most 0.49.

    With several rejected items their mean. Source: arXiv 2410.12519; the cap keeps the chosen title preferred.
    """
    logps, index = _sequential_logps(assistant, examples, items), pd.Index(items["item"])
    chosen = np.take_along_axis(logps, index.get_indexer(examples["item"])[:, None], axis=1)
    others = np.take_along_axis(logps, index.get_indexer(rejected.ravel()).reshape(rejected.shape), axis=1)
    return np.minimum(1 / (1 + np.exp(chosen - others)), 0.49).mean(axis=1)


def _sequential_logps(run: str, examples: pd.DataFrame, items: pd.DataFrame) -> np.ndarray:
    """A SASRec run's log-probabilities (N, items) for the examples' histories, columns in the order of ``items``."""
    model, ids = sasrec.load_sasrec(pipeline.load_run(run, "sasrec").folder / "checkpoint")
    histories = sasrec.encode_histories(examples["history"].tolist(), ids, model.shape["length"])
    logps = sasrec.catalogue_logps(model.to(backbone.device()), histories)
    return logps[:, pd.Index(ids).get_indexer(items["item"])]


def _popularity_of(rejected: np.ndarray, items: pd.DataFrame) -> float:
    """The mean training count of the rejected items."""
    return float(pd.Series(rejected.ravel()).map(items.set_index("item")["train_count"]).mean())


def _own_lists(
    model: Any, tokenizer: Any, items: pd.DataFrame, rows: pd.DataFrame, examples: pd.DataFrame, count: int
) -> list[Any]:
    """The model's own best items for each training prompt, enough for ``count`` besides target and history."""
    catalogue = ranking.Catalogue.build(items, tokenizer)
    length = count + 1 + int(examples["history"].map(len).max())
    texts, targets = rows["prompt"].tolist(), examples["item"].tolist()
    return ranking.RANKERS["beam"](model, tokenizer, catalogue, texts, targets, length, 64).items.tolist()


def _agreement(labels: np.ndarray, examples: pd.DataFrame, items: pd.DataFrame) -> dict[str, float]:
    """Adjusted mutual information (1: same partition, 0: chance) of hard environments with what they may stand for."""
    found = {"ami_history_group": float(adjusted_mutual_info_score(history_groups(examples, items), labels))}
    if "genres" in items:
        found["ami_history_genre"] = float(adjusted_mutual_info_score(history_genres(examples, items), labels))
    if "environment" in examples:
        found["ami_true_environment"] = float(adjusted_mutual_info_score(examples["environment"], labels))
    return found


def _tables(data: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    folder = pipeline.load_run(data, "data").folder
    return pd.read_parquet(folder / "items.parquet"), pd.read_parquet(folder / "examples.parquet")


def _backbone(source: str | Path, titles: pd.Series | list[str], seed: int, lora_rank: int) -> tuple[Any, Any]:
    if source in _TINY:
        if lora_rank:
            raise StudyError(f"lora_rank adapts pretrained weights, and {source!r} has none: set lora_rank: 0")
        model, tokenizer = backbone.tiny_backbone(titles, seed, source)
    else:
        # Small steps vanish when they are added to bfloat16 weights; adapters are float32 whatever they adapt.
        model, tokenizer = backbone.load_checkpoint(source, dtype="auto" if lora_rank else torch.float32)
    torch.manual_seed(seed)
    return backbone.with_lora(model, lora_rank), tokenizer


def _arguments(
    kind: type[TrainingArguments],
    *,
    folder: Path,
    rows: int,
    seed: int,
    epochs: float,
    learning_rate: float,
    batch_size: int,
    **options: Any,
) -> TrainingArguments:
    """Training arguments shared by all trainings: cosine schedule with 5 % warm-up."""
    steps = max(1, round(epochs * rows / batch_size))
    accelerated = torch.cuda.is_available()
    return kind(
        output_dir=str(folder / "trainer"),
        seed=seed,
        num_train_epochs=epochs,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        weight_decay=0.01,
        max_grad_norm=1.0,
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        activation_checkpointing=False,
        bf16=_in_bfloat16(),
        use_cpu=not accelerated,
        dataloader_pin_memory=accelerated,
        **options,
    )


def _save(model: torch.nn.Module, tokenizer: Any, items: pd.DataFrame, folder: Path) -> None:
    backbone.save_checkpoint(model, tokenizer, folder / "checkpoint")
    items[["item", "title"]].to_csv(folder / "checkpoint" / ranking.CATALOGUE_FILE, index=False)


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
