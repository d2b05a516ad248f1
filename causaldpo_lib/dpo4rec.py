"""DPO4Rec: a language model's reasoning aligned with the metric of the re-ranker that reads it.

Source: Sun et al., arXiv 2410.05939, of which no code is published. The loop, for rounds t = 1 ... T:

    texts     k_u1 ... k_uN sampled by the policy of round t - 1 from the prompt of user u
    reward    r_un = mean NDCG@5 of a re-ranker's orders of the user's training lists, with k_un as knowledge
    pairs     chosen = the best text of a user, rejected = the worst; a user whose texts all tie gives none
    DPO       the policy of round t, from that of round t - 1, which is also the reference

Who may know what, so that a reward says something about users and not about the fit:

- A user's training interactions are cut in time. The *early* half, at most 30 items (KAR, arXiv 2306.10933), is all
  that prompts, histories and the initial ranker see. The *late* rest makes the user's training lists, and each held-out
  split one list. No list's positive was ever a target of the initial ranker, and all come strictly after the early
  part: a random split also holds out interactions before it, which the early part would give away.
- Lists are drawn from a pool, the initial ranker's top items after the early history: the user's positives that are in
  it, and hard negatives from the rest of it. Positives that the ranker has below the pool are not put in. They would
  stand under all negatives, and a re-ranker would find them by turning the order around, whatever it knows of the user.
- What is known to be positive is no negative. When a training list is made, that is the training interactions alone:
  to leave out held-out ones, too, would let tests decide what rewards are. For a held-out list it is the positives of
  all splits.
- Rewards are cross-fitted. Users are dealt to folds, and a user's lists are scored by a re-ranker trained on those of
  the other folds. These *judges* are trained once, on the texts of the policy before alignment, and serve all rounds:
  rewards of different rounds can be compared.
- Texts about items, from metadata, stand beside every text about a user: a re-ranker that does not know which items are
  dramas can do nothing with "likes dramas".
- Held-out lists serve the evaluation, where a re-ranker is trained anew for each row, stopped by the validation lists.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from causaldpo_lib import backbone, grounding, knowledge, packing, rerankers, sasrec
from causaldpo_lib.errors import StudyError
from causaldpo_lib.metrics import list_average_precision, list_ndcg
from causaldpo_lib.prompts import response_text
from causaldpo_lib.rerankers import Features, Lists

LONGEST_EARLY = 30  # items of the early part at most: KAR's rule
SPLITS = ("train", "validation", "iid_test", "ood_test")
REWARD_CUTOFF = 5  # NDCG@5
CUTOFFS = (1, 3, 5, 10)
FEWEST_PAIRS = 8  # below, a round aligns nothing
INITIAL = {"loss": "softmax", "patience": 5, "learning_rate": 1e-3, "batch_size": 128, "weight_decay": 0.0}
VALIDATION_SHARE = 0.1  # of users, that stop the initial ranker and the judges
GREEDY = -1  # number of the greedy text among a user's texts

Load = Callable[[str | Path], tuple[Any, Any]]


# --- what everyone sees: early histories, lists ---


@dataclass(frozen=True)
class Material:
    """U users with an early history, their lists by split, and ``counts`` (I,), the early interactions of each item.

    ``histories`` are catalogue positions, oldest first. ``left_out``: users without an early history, and by split
    users without a later positive in the pool. ``false_negatives``: share of the training lists' negatives that are
    held out.
    """

    users: np.ndarray
    histories: list[list[int]]
    lists: dict[str, Lists]
    counts: np.ndarray
    left_out: dict[str, int]
    false_negatives: float

    def features(self, user_knowledge: Tensor | None = None, item_knowledge: Tensor | None = None) -> Features:
        """The users' histories with any knowledge: (U, d), (I, d)."""
        table = torch.full((len(self.histories), max(map(len, self.histories))), -1)
        for row, history in enumerate(self.histories):
            table[row, : len(history)] = torch.tensor(history)
        return Features(table, user_knowledge, item_knowledge)


def early_part(training: Sequence[int]) -> int:
    """How many of a user's n training items, oldest first, are early: min(ceil(n / 2), 30)."""
    return min(math.ceil(len(training) / 2), LONGEST_EARLY)


def make_material(
    items: pd.DataFrame,
    split: pd.DataFrame,
    *,
    size: int,
    positives: int,
    pool: int,
    copies: int,
    users: int,
    epochs: int,
    seed: int,
) -> tuple[Material, list[dict[str, float]]]:
    """Early histories and lists of a split table, and the log of the initial ranker that ordered them.

    Args:
        items: the catalogue, whose order gives positions. split: of ``splits.make_split``, as stored: its order within
            a user is that of time, or stands for it.
        size, positives: places of a list, and positives that it holds at most.
        pool: top items of the initial ranker that a list is drawn from.
        copies: training lists of a user, each with its own draws.
        users: users drawn at most; 0: all.
        epochs: of the initial ranker, at most.

    Raises:
        StudyError: lists too short for a negative, or no user has a training list.
    """
    if copies < 1:
        raise StudyError(f"training_lists = {copies} leaves nothing to learn from: give 1 or more")
    if not 1 <= positives < size <= pool:
        raise StudyError(
            f"lists of {size} places cannot hold up to {positives} positives and be drawn from a pool of {pool}: give "
            "positives < list_size <= pool"
        )
    rng = np.random.default_rng([seed, 0])
    moment = split["time"] if "time" in split else np.arange(len(split))
    rows = split.assign(place=pd.Index(items["item"]).get_indexer(split["item"]), moment=moment)
    parts = {name: rows[rows["split"] == name] for name in SPLITS}
    everyone, chosen = np.sort(split["user"].unique()), np.sort(parts["train"]["user"].unique())
    without = len(everyone) - len(chosen)
    if 0 < users < len(chosen):
        chosen = np.sort(rng.choice(chosen, users, replace=False))
    training = _by_user(parts["train"], "place", chosen)
    early = [row[: early_part(row)] for row in training]
    moments = _by_user(parts["train"], "moment", chosen)
    last = pd.Series([times[len(row) - 1] for times, row in zip(moments, early, strict=True)], index=chosen)
    targets_of = {
        name: _by_user(part[part["moment"] > part["user"].map(last)], "place", chosen) for name, part in parts.items()
    }
    positives_of = [_by_user(part, "place", chosen) for part in parts.values()]
    everything = [[*chain(*several)] for several in zip(*positives_of, strict=True)]

    nothing = StudyError(
        f"none of {len(chosen)} users has a late training interaction among the initial ranker's top {pool}, so there "
        "is no list to learn from: choose a larger pool, or data with longer histories"
    )
    if not any(targets_of["train"]):
        raise nothing
    ranker, log = _initial_ranker(early, len(items), epochs, seed)
    lists, left_out = {}, {"early": without}
    for number, (name, targets) in enumerate(targets_of.items()):
        known = training if name == "train" else everything
        draws = np.random.default_rng([seed, 1, number])
        several = copies if name == "train" else 1
        lists[name] = _make_lists(ranker, early, targets, known, size, positives, pool, several, draws)
        left_out[name] = len(chosen) - len(lists[name]) // several
    if not len(lists["train"]):
        raise nothing
    found = lists["train"]
    negative = found.mask & (found.labels == 0)
    truths = [set(everything[user]) for user in found.users.tolist()]
    hidden = sum(
        item in truth
        for row, chosen_row, truth in zip(found.items, negative, truths, strict=True)
        for item in row[chosen_row].tolist()
    )
    counts = np.bincount(np.concatenate(early), minlength=len(items))
    return Material(chosen, early, lists, counts, left_out, hidden / max(int(negative.sum()), 1)), log


def _by_user(rows: pd.DataFrame, column: str, users: np.ndarray) -> list[list[int]]:
    """A column's values of each of some users, in the order of the rows."""
    found = rows.groupby("user")[column].agg(list).to_dict()
    return [found.get(user, []) for user in users.tolist()]


def _initial_ranker(
    early: Sequence[Sequence[int]], items: int, epochs: int, seed: int
) -> tuple[sasrec.SASRec, list[dict[str, float]]]:
    """SASRec on windows within the early parts; the last windows of a tenth of the users stop it, and train nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = sasrec.SASRec(items, length=LONGEST_EARLY)
    model = model.to(backbone.device())
    several = [row for row, history in enumerate(early) if len(history) > 1]
    rng = np.random.default_rng([seed, 2])
    stopping = set(rng.permutation(several)[: max(1, round(VALIDATION_SHARE * len(several)))].tolist())
    windows: dict[bool, list[tuple[Sequence[int], int]]] = {True: [], False: []}
    for row in several:
        history = early[row]
        for end in range(1, len(history)):
            windows[row in stopping and end == len(history) - 1].append((history[:end], history[end]))

    def encoded(rows: list[tuple[Sequence[int], int]]) -> tuple[Tensor, Tensor]:
        histories = sasrec.encode_histories([history for history, _ in rows], np.arange(items), LONGEST_EARLY)
        return histories, torch.tensor([target for _, target in rows])

    return model, sasrec.fit_sasrec(
        model, encoded(windows[False]), encoded(windows[True]), epochs=epochs, seed=seed, **INITIAL
    )


def _make_lists(
    ranker: sasrec.SASRec,
    early: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]],
    known: Sequence[Sequence[int]],
    size: int,
    most: int,
    pool: int,
    copies: int,
    rng: np.random.Generator,
) -> Lists:
    """``copies`` lists of each user with ``targets`` in the pool, in a row: up to ``most`` of these, the rest from what
    is not ``known``.
    """
    rows, members, labels, scores = [], [], [], []
    some = [row for row, found in enumerate(targets) if found]
    length, count = ranker.shape["length"], len(ranker.items.weight) - 1
    for first in range(0, len(some), 512):
        part = some[first : first + 512]
        histories = sasrec.encode_histories([early[row] for row in part], np.arange(count), length)
        for row, own in zip(part, sasrec.catalogue_logps(ranker, histories), strict=True):
            wanted = set(targets[row]) - set(early[row])
            banned = {*known[row], *early[row]} - wanted
            order = np.argsort(-own, kind="stable")[: pool + len(banned)].tolist()
            candidates = [item for item in order if item not in banned][:pool]
            positive = [item for item in candidates if item in wanted]
            negative = [item for item in candidates if item not in wanted]
            for _ in range(copies if positive else 0):
                mine = rng.choice(positive, min(most, len(positive)), replace=False).tolist()
                others = rng.choice(negative, min(size - len(mine), len(negative)), replace=False).tolist()
                listed = sorted([*mine, *others], key=lambda item: (-own[item], item))
                fill = [0] * (size - len(listed))
                rows.append(row)
                members.append([*listed, *(-1 for _ in fill)])
                labels.append([*(float(item in mine) for item in listed), *fill])
                scores.append([*own[listed].tolist(), *fill])
    return Lists(
        torch.tensor(rows, dtype=torch.long),
        torch.tensor(members, dtype=torch.long).view(-1, size),
        torch.tensor(labels, dtype=torch.float32).view(-1, size),
        torch.tensor(scores, dtype=torch.float32).view(-1, size),
    )


# --- rewards ---


class Judges(NamedTuple):
    """A re-ranker for each fold, trained on the other folds' training lists, and the fold (U,) of each user."""

    fold: np.ndarray
    models: list[rerankers.Reranker]
    log: list[dict[str, float]]


def fit_judges(
    material: Material, texts: Tensor, items: Tensor, *, folds: int, seed: int, reranking: Mapping[str, Any]
) -> Judges:
    """Train the re-rankers that give rewards: on texts (U, N, d) and lists of the other folds' users.

    Each of a user's N texts and L lists is shown equally often: the k-th of max(L, N) examples is list k mod L with
    text k mod N. A tenth of the users stop the training instead. No held-out list is looked at. ``items`` (I, d).

    Raises:
        StudyError: fewer than two folds, or a fold without users.
    """
    lists, count = material.lists["train"], texts.shape[1]
    rng = np.random.default_rng([seed, 3])
    fold = rng.permutation(np.arange(len(material.users)) % max(folds, 1))
    users = lists.users.unique().numpy()
    if folds < 2 or len(set(fold[users])) < folds:
        raise StudyError(f"{len(users)} users with training lists cannot be cut into folds = {folds}: give 2 or more")
    features = material.features(None, items)
    features = Features(features.histories.repeat_interleave(count, dim=0), texts.flatten(0, 1), items)
    copies = len(lists) // len(users)

    def shown(some: np.ndarray) -> Lists:
        """The examples of some users (places in ``users``)."""
        number = torch.arange(max(copies, count)).repeat(len(some))
        place = torch.from_numpy(some).repeat_interleave(max(copies, count))
        found = lists.rows(place * copies + number % copies)
        return Lists(found.users * count + number % count, found.items, found.labels, found.scores)

    models, log = [], []
    for index in range(folds):
        others = rng.permutation(np.flatnonzero(fold[users] != index))
        stop = max(1, round(VALIDATION_SHARE * len(others)))
        if len(others) <= stop:
            raise StudyError(f"fold {index} of {folds} leaves {len(others)} users to train on: give fewer folds")
        model, epochs = rerankers.fit_reranker(
            shown(np.sort(others[stop:])), features, (shown(np.sort(others[:stop])), features), seed=seed, **reranking
        )
        models.append(model)
        log += [{"fold": index, **row} for row in epochs]
    return Judges(fold, models, log)


def rewards(judges: Judges, material: Material, texts: Tensor, items: Tensor, split: str = "train") -> np.ndarray:
    """Mean NDCG@5 (U, N) of the users' lists of a split under N texts (U, N, d) each; NaN for users without a list.

    The judge of a user's fold, which never saw that user, makes the order.
    """
    lists = material.lists[split]
    users, found = lists.users.numpy(), np.zeros((len(lists), texts.shape[1]))
    for index, model in enumerate(judges.models):
        rows = np.flatnonzero(judges.fold[users] == index)
        if len(rows):
            mine = lists.rows(rows)
            scores = rerankers.text_scores(model, mine, material.features(None, items), texts)
            labels = mine.labels[:, None].expand(scores.shape)
            found[rows] = list_ndcg(rerankers.ranked_labels(scores, labels), REWARD_CUTOFF)
    total, count = np.zeros((len(texts), texts.shape[1])), np.zeros((len(texts), 1))
    np.add.at(total, users, found)
    np.add.at(count, users, 1)
    return np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


class Pairs(NamedTuple):
    """``table``: user, chosen and rejected (numbers of texts); users who ``tied``, or had fewer than two texts."""

    table: pd.DataFrame
    tied: int
    unusable: int


def best_and_worst(texts: Sequence[Sequence[str]], values: np.ndarray) -> Pairs:
    """The best and the worst text of each user by its rewards (U, N), the first of equals.

    "" is no text, and a user without a list, whose rewards are NaN, counts nowhere. Rewards are means of a few metrics:
    what differs by rounding alone is a tie.
    """
    rows, tied, unusable = [], 0, 0
    for user in np.flatnonzero(~np.isnan(values[:, 0])).tolist():
        own = np.round(values[user], 9)
        numbers = [number for number, text in enumerate(texts[user]) if text]
        if len(numbers) < 2:
            unusable += 1
        elif max(own[numbers]) == min(own[numbers]):
            tied += 1
        else:
            best, worst = max(numbers, key=lambda n: own[n]), min(numbers, key=lambda n: own[n])
            rows.append({"user": user, "chosen": best, "rejected": worst})
    return Pairs(pd.DataFrame(rows, columns=["user", "chosen", "rejected"], dtype=int), tied, unusable)


# --- the loop ---


@dataclass(frozen=True)
class Setup:
    """What all rounds share.

    ``prompts`` (U,), one a user, and ``item_texts`` (I,). ``load`` makes (model, tokenizer) of a checkpoint;
    ``align(model, tokenizer, rows, round)`` trains it on rows of prompt, chosen and rejected, and returns it with its
    log. ``encoder`` names a model of sentence-transformers; empty: the mean state of the policy before alignment.
    """

    material: Material
    prompts: list[str]
    item_texts: list[str]
    load: Load
    align: Callable[[Any, Any, list[dict[str, str]], int], tuple[Any, pd.DataFrame]]
    encoder: str
    samples: int
    temperature: float
    max_new_tokens: int
    batch_size: int
    folds: int
    seed: int
    reranking: Mapping[str, Any]


def run_rounds(home: Path, setup: Setup, start: str | Path, rounds: int) -> list[Path]:
    """Round 0, which samples from the policy ``start``, and ``rounds`` of alignment: their folders in ``home``.

    A round's folder is written beside its place and then renamed. Those that are there are kept, and the next one
    begins from their files alone: an interrupted run goes on to the same result. Each holds

        texts.parquet   user (row), number (-1: the greedy text), text, reward, validation (mean NDCG@5 of the user's
                        training and validation lists under that text, by the user's judge; NaN without a list)
        pairs.parquet   user, chosen, rejected (numbers of texts), best, worst (their rewards)
        round.json      the row of rounds.csv
        log.csv         the alignment's log, and checkpoint/ its policy, unless the round aligned nothing

    """
    encode = _encoder(setup, start)
    items = knowledge.encode_knowledge(setup.item_texts, encode)
    judges: Judges | None = None
    for number in range(rounds + 1):
        folder = home / str(number)
        if folder.exists():
            continue
        draft = home / f"{number}.unfinished"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        if number:
            _aligned(setup, home, start, number, draft)
        own = draft / "checkpoint"
        model, tokenizer = setup.load(own if own.exists() else _policy(home, number - 1, start))
        sampled, greedy = _texts(setup, model, tokenizer, number)
        del model
        vectors = _vectors(sampled.texts, encode)
        if judges is None:
            first = vectors if number == 0 else _vectors(_read_texts(home / "0"), encode)
            judges = fit_judges(
                setup.material, first, items, folds=setup.folds, seed=setup.seed, reranking=setup.reranking
            )
            pd.DataFrame(judges.log).to_csv(draft / "judges.csv", index=False)
        together = torch.cat([_vectors(greedy.texts, encode), vectors], dim=1)
        values = {
            name: rewards(judges, setup.material, together, items, split)
            for name, split in (("reward", "train"), ("validation", "validation"))
        }
        blank = rewards(judges, setup.material, torch.zeros_like(vectors[:, :1]), items)
        _write_round(draft, number, sampled, greedy, values, float(np.nanmean(blank)))
        os.replace(draft, folder)
        said = json.loads((folder / "round.json").read_text(encoding="utf-8"))
        print(f"round {number} of {rounds}: mean reward {said['reward']:.4f}, {said['pairs']} pairs", flush=True)
    return [home / str(number) for number in range(rounds + 1)]


def _policy(home: Path, number: int, start: str | Path) -> str | Path:
    """The checkpoint of a round's policy: the last that a round up to it made."""
    made = [home / str(n) / "checkpoint" for n in range(number, 0, -1)]
    return next((path for path in made if path.exists()), start)


def _encoder(setup: Setup, start: str | Path) -> grounding.Encoder:
    if setup.encoder:
        return grounding.sentence_encoder(setup.encoder)
    model, tokenizer = setup.load(start)
    return knowledge.mean_encoder(model.eval().requires_grad_(False), tokenizer, 4 * setup.batch_size)


def _aligned(setup: Setup, home: Path, start: str | Path, number: int, draft: Path) -> None:
    """Align the policy of the round before on the pairs of its texts, and save it; too few pairs leave it as it is."""
    before = home / str(number - 1)
    pairs = pd.read_parquet(before / "pairs.parquet")
    if len(pairs) < FEWEST_PAIRS:
        print(f"round {number}: {len(pairs)} pairs are too few to align on, so the policy stays as it is", flush=True)
        return
    texts = _read_texts(before)
    rows = [
        {
            "prompt": setup.prompts[user],
            "chosen": response_text(texts[user][chosen]),
            "rejected": response_text(texts[user][rejected]),
        }
        for user, chosen, rejected in pairs[["user", "chosen", "rejected"]].itertuples(index=False)
    ]
    model, tokenizer = setup.load(_policy(home, number - 1, start))
    model, log = setup.align(model, tokenizer, rows, number)
    log.to_csv(draft / "log.csv", index=False)
    backbone.save_checkpoint(model, tokenizer, draft / "checkpoint")


def _texts(setup: Setup, model: Any, tokenizer: Any, number: int) -> tuple[knowledge.Generated, knowledge.Generated]:
    """A round's sampled texts, and the greedy one of each user, which the evaluation reads."""
    shared = {"max_new_tokens": setup.max_new_tokens, "batch_size": setup.batch_size}
    shared["context"] = packing.context_of(model)
    seed = int(np.random.SeedSequence([setup.seed, number]).generate_state(1)[0])
    args = (model, tokenizer, setup.prompts)
    sampled = knowledge.generate_knowledge(*args, setup.samples, temperature=setup.temperature, seed=seed, **shared)
    return sampled, knowledge.generate_knowledge(*args, 1, temperature=0.0, seed=seed, **shared)


def _vectors(texts: Sequence[Sequence[str]], encode: grounding.Encoder) -> Tensor:
    """(U, N, d) of N texts of each user."""
    flat = [text for row in texts for text in row]
    return knowledge.encode_knowledge(flat, encode).unflatten(0, (len(texts), -1))


def _read_texts(folder: Path, greedy: bool = False) -> list[list[str]]:
    """The sampled texts of a round by user, or the greedy one of each."""
    table = pd.read_parquet(folder / "texts.parquet")
    table = table[(table["number"] == GREEDY) == greedy]
    return table.groupby("user", sort=True)["text"].agg(list).tolist()


def _write_round(
    folder: Path,
    number: int,
    sampled: knowledge.Generated,
    greedy: knowledge.Generated,
    values: Mapping[str, np.ndarray],
    blank: float,
) -> None:
    """The files of a round but for those of its alignment; ``values`` (U, 1 + N), the greedy text's first."""
    users, count = values["reward"].shape
    pd.DataFrame(
        {
            "user": np.repeat(np.arange(users), count),
            "number": np.tile(np.arange(GREEDY, count - 1), users),
            "text": [text for own, row in zip(greedy.texts, sampled.texts, strict=True) for text in (*own, *row)],
            **{name: found.ravel() for name, found in values.items()},
        }
    ).to_parquet(folder / "texts.parquet")
    own = values["reward"][:, 1:]
    pairs = best_and_worst(sampled.texts, own)
    chosen, rejected = (own[pairs.table["user"], pairs.table[name]] for name in ("chosen", "rejected"))
    pairs.table.assign(best=chosen, worst=rejected).to_parquet(folder / "pairs.parquet")
    texts = [text for row in sampled.texts for text in row]
    judged = own[~np.isnan(own[:, 0])]
    row = {
        "round": number,
        "texts": len(texts),
        "empty": sampled.empty,
        "over_long": sampled.over_long,
        "distinct": len(set(texts)),
        "words": float(np.mean([len(text.split()) for text in texts])),
        "users": len(judged),
        "reward": float(judged.mean()),
        "greedy_reward": float(np.nanmean(values["reward"][:, 0])),
        "blank_reward": blank,
        "validation": _mean(values["validation"][:, 1:]),
        "greedy_validation": _mean(values["validation"][:, :1]),
        "gap": float((judged.max(axis=1) - judged.min(axis=1)).mean()),
        "pairs": len(pairs.table),
        "tied": pairs.tied,
        "unusable": pairs.unusable,
    }
    (folder / "round.json").write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


def _mean(values: np.ndarray) -> float | None:
    """The mean of what is there; None if nothing is, as where no user has a validation list."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else None


# --- evaluation ---


def evaluate(
    material: Material,
    greedy: Sequence[Tensor],
    items: Tensor,
    *,
    adaptor: str,
    seed: int,
    reranking: Mapping[str, Any],
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A re-ranker for each row, trained on the training lists with that row's texts, and its metrics on held-out lists.

        initial      the initial ranker's order, no re-ranker
        backbone     no knowledge
        kar          texts before alignment, through the hybrid-expert adaptor
        knowledge    the same, through ``adaptor``, as all rows below
        dpo4rec_t    texts of the policy after round t
        shuffled     those of the last round, each user with the text of another: the control

    All but the first two also have the texts about items.
    A user's text is the greedy one: there is one answer to "what would the system say", and no noise of sampling in the
    comparison of rows. All rows share seed, training lists and the validation lists that stop them.

    Args:
        greedy: vectors (U, d) of rounds 0 ... T. items: vectors (I, d).

    Returns:
        A row per row, split and list: ndcg@k and map@k, fractions, k of ``CUTOFFS``; and the trainings' log.
    """
    rng = np.random.default_rng([seed, 4])
    order = rng.permutation(len(material.users))
    shuffled = torch.empty_like(greedy[-1])
    shuffled[order] = greedy[-1][np.roll(order, 1)]  # a single cycle: nobody keeps their own
    plan: dict[str, tuple[Features, str]] = {
        "backbone": (material.features(), adaptor),
        "kar": (material.features(greedy[0], items), "hybrid_experts"),
        "knowledge": (material.features(greedy[0], items), adaptor),
        **{f"dpo4rec_{t}": (material.features(found, items), adaptor) for t, found in enumerate(greedy) if t},
        "shuffled": (material.features(shuffled, items), adaptor),
    }
    tables = [_measured("initial", split, material, None) for split in SPLITS[1:] if len(material.lists[split])]
    logs = []
    for name, (features, kind) in plan.items():
        stop = material.lists["validation"]
        model, log = rerankers.fit_reranker(
            material.lists["train"],
            features,
            (stop, features) if len(stop) else None,
            adaptor=kind,
            seed=seed,
            **reranking,
        )
        logs.append(pd.DataFrame(log).assign(row=name))
        for split in SPLITS[1:]:
            if len(material.lists[split]):
                scores = rerankers.list_scores(model, material.lists[split], features)
                tables.append(_measured(name, split, material, scores))
    return pd.concat(tables, ignore_index=True), pd.concat(logs, ignore_index=True)


def _measured(row: str, split: str, material: Material, scores: Tensor | None) -> pd.DataFrame:
    """The metrics of a split's lists ordered by ``scores``, or in the initial ranker's order."""
    lists = material.lists[split]
    labels = lists.labels.numpy() if scores is None else rerankers.ranked_labels(scores, lists.labels)
    found = {"row": row, "split": split, "user": material.users[lists.users.numpy()]}
    for k in CUTOFFS:
        found |= {f"ndcg@{k}": list_ndcg(labels, k), f"map@{k}": list_average_precision(labels, k)}
    return pd.DataFrame(found)


@dataclass(frozen=True)
class Found:
    """What a run found: its ``tables``, the ``folders`` of its rounds and the last ``policy``."""

    tables: dict[str, pd.DataFrame]
    folders: list[Path]
    policy: str | Path


def run(home: Path, setup: Setup, start: str | Path, rounds: int) -> Found:
    """The rounds, and the evaluation of their texts."""
    folders = run_rounds(home, setup, start, rounds)
    encode = _encoder(setup, start)
    greedy = [_vectors(_read_texts(folder, greedy=True), encode)[:, 0] for folder in folders]
    reranking = {name: value for name, value in setup.reranking.items() if name != "adaptor"}
    lists, log = evaluate(
        setup.material,
        greedy,
        knowledge.encode_knowledge(setup.item_texts, encode),
        adaptor=setup.reranking["adaptor"],
        seed=setup.seed,
        reranking=reranking,
    )
    of_rounds = {
        name: pd.concat(
            [pd.read_parquet(folder / f"{name}.parquet").assign(round=number) for number, folder in enumerate(folders)],
            ignore_index=True,
        )
        for name in ("texts", "pairs")
    }
    users = setup.material.users
    tables = {name: table.assign(user=users[table["user"]]) for name, table in of_rounds.items()}
    logs = [pd.read_csv(folder / "log.csv") for folder in folders if (folder / "log.csv").exists()]
    tables |= {
        "lists": lists,
        "reranking_log": log,
        "rounds": pd.DataFrame([json.loads((folder / "round.json").read_text("utf-8")) for folder in folders]),
        "log": pd.concat(logs, ignore_index=True) if logs else pd.DataFrame(columns=["round", "step"]),
    }
    return Found(tables, folders, _policy(home, rounds, start))


# --- one user, for reading ---


def example(folders: Sequence[Path], material: Material, titles: Sequence[str]) -> dict[str, Any]:
    """The loop at one user: history, list, and the texts of each round with their rewards and the pair, as JSON values.

    The user whose gap between best and worst reward in round 0 is the median one, so neither the best case nor the
    worst; empty where nobody has a pair.
    """
    pairs = pd.read_parquet(folders[0] / "pairs.parquet")
    if pairs.empty:
        return {}
    gaps = (pairs["best"] - pairs["worst"]).sort_values(kind="stable")
    user = int(pairs.loc[gaps.index[(len(gaps) - 1) // 2], "user"])
    lists = material.lists["train"]
    row = int((lists.users == user).nonzero()[0])  # the first of the user's lists
    places = zip(lists.items[row].tolist(), lists.labels[row].tolist(), strict=True)
    rounds = []
    for folder in folders:
        texts, pairs = pd.read_parquet(folder / "texts.parquet"), pd.read_parquet(folder / "pairs.parquet")
        own, pair = texts[texts["user"] == user], pairs[pairs["user"] == user]
        rounds.append(
            {
                "texts": own[["number", "text", "reward"]].to_dict("records"),
                "pair": pair[["chosen", "rejected"]].iloc[0].tolist() if len(pair) else [],
            }
        )
    return {
        "history": [titles[position] for position in material.histories[user]],
        "list": [{"title": titles[item], "positive": label > 0} for item, label in places if item >= 0],
        "rounds": rounds,
    }
