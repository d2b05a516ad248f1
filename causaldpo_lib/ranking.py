r"""Ranking the catalogue for prompts: ``RANKERS``, and ``recommend`` for a person with a list of titles.

With log pi(y|x) the model's own log-probability of a title's tokens, end-of-sequence token included, two distributions
over the catalogue C are in use:

    share of the catalogue    p_C(y|x)  = pi(y|x) / sum over y' in C of pi(y'|x)
    constrained policy        pi_C(y|x) = prod_t pi(y_t | x, y_<t) / m_t,  m_t = mass of the titles' tokens at step t

so log pi_C(y|x) = log pi(y|x) - sum_t log m_t along y. Both sum to 1 over the catalogue. They order titles alike only
where the m_t are: p_C looks ahead to what a prefix can still become, pi_C is what constrained decoding samples from.

    ranker              list                                  scores                        target_logp
    beam                beam search under pi_C                log pi_C                      log pi_C
    beam_normalised     the same, by the mean over tokens     log pi_C / tokens             log pi_C
    likelihood          all titles, exactly                   log p_C                       log p_C
    embedding           titles near to a generated text       see ``ground_texts``          log pi_C
    candidates          a few listed titles, exactly          log of the share of these     the same, of the target

One rule for each special case, the same in all rankers:

- Ties: equal scores stand in catalogue order in a list; the target's ``rank`` counts every equal title as before it.
- Titles that several items share: refused when the catalogue is built; the loaders merge such items.
- Items of the history: ranked like all others. ``masked`` takes given items out of an example's list; the others keep
  their scores, and a masked target is a miss.
- Empty generations: the first text that is not blank speaks; if all are blank, all titles tie.
- Short catalogues: a list has min(k, titles) entries; masking that leaves fewer is an error that says how many.
- Long histories: a prompt beyond the model's context loses its oldest titles, never its end.
- Backdoor checkpoints (``environments.json``): ``mixture`` ranks by sum_k prior_k p(y | environment k, x); ``beam``
  searches by the same sum over prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import kendalltau
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from causaldpo_lib.backbone import load_checkpoint
from causaldpo_lib.beam import assisted_steps, beam_search, dead_nodes, in_order
from causaldpo_lib.catalogue import CATALOGUE_FILE, Catalogue, Trie, read_catalogue, titles_of
from causaldpo_lib.causal import BACKDOOR_FILE, Backdoor, with_environment
from causaldpo_lib.decoding import MINUS_INFINITY, Reading, check_exact, mixed, read_prompts, title_logps
from causaldpo_lib.errors import StudyError, pick
from causaldpo_lib.grounding import (
    answer_measures,
    generate_texts,
    ground_texts,
    random_candidates,
    sentence_encoder,
    squeezed,
    state_encoder,
)
from causaldpo_lib.likelihood import catalogue_logps, pieces
from causaldpo_lib.packing import batches_by_length, context_of
from causaldpo_lib.prompts import check_boundary, encode_prompts, prompt_text, response_text

__all__ = ["CATALOGUE_FILE", "RANKERS", "Catalogue", "Ranking", "agreement", "catalogue_shares", "recommend"]


@dataclass
class Ranking:
    """Lists for N examples, and where their targets are.

    ``items`` (N, K) best first with ``scores`` (N, K), K = min(k, titles); ``rank`` (N,), 0-based: exact where a ranker
    scores every title, else the place in the list, and the number of titles for a miss; ``target_logp`` (N,) in nats.
    What scores and log-probabilities are of, the module's table says.
    """

    items: np.ndarray
    scores: np.ndarray
    rank: np.ndarray
    target_logp: np.ndarray


@dataclass
class GroundedRanking(Ranking):
    """With ``texts`` (N lists), what was written, and ``exact`` (N,), the share of these texts that are titles."""

    texts: list[list[str]]
    exact: np.ndarray


@dataclass
class CandidateRanking(Ranking):
    """Ranking of listed candidates by likelihood, and beside it what a greedy answer names.

    HitRatio@1 of the likelihoods is mean(rank == 0), and every such answer is valid. Of the texts it is mean(``hit``),
    with valid ratio mean(``valid``): an answer is valid if it names exactly one candidate, by longest match
    (``named_titles``); ``source_hit`` and ``source_valid`` are by the substring rule of the published evaluators. All
    (N,) bool, over all examples; empty without ``texts``.
    """

    texts: list[str]
    hit: np.ndarray
    valid: np.ndarray
    source_hit: np.ndarray
    source_valid: np.ndarray


@torch.inference_mode()
def rank_beam(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    catalogue: Catalogue,
    prompts: Sequence[str],
    targets: Sequence[object],
    k: int,
    batch_size: int,
    *,
    masked: Sequence[Sequence[object]] | None = None,
    mixture: Backdoor | None = None,
    normalise_length: bool = False,
    width: int | None = None,
    assistant: np.ndarray | None = None,
    assistant_weight: float = 0.0,
) -> Ranking:
    r"""The top ``k`` of the catalogue by beam search under pi_C, D3's rule (arXiv 2406.14900).

    No length normalisation: dividing by length favours titles with near-certain tokens, which add length at no cost.
    ``normalise_length`` does it nonetheless. ``width`` beams are kept, ``k`` if None: more find more of the exact list.

    With ``assistant`` (N, items), another recommender's log-probabilities, beams compete by D3's mixture: weight w for
    the assistant, 1 - w for the model at each step, which over a title adds up to
    :math:`(1 - w) \log\pi_C(y|x) + w \log p_{assistant}(y)`. ``target_logp`` stays the model's own.

    Raises:
        StudyError: k < 1, a target or masked item that is not in the catalogue, too few titles left, damaged weights;
            an ``assistant_weight`` outside 0 <= w < 1.
    """
    if not 0 <= assistant_weight < 1:
        raise StudyError(f"assistant_weight is {assistant_weight}: give the assistant's share, 0 or more and below 1")
    task = _Task.build(model, tokenizer, catalogue, prompts, targets, k, masked, mixture)
    result = task.empty_lists()
    rank = np.full(len(prompts), len(catalogue.items))
    for chunk, readings in task.batches(batch_size):
        dead = None if masked is None else dead_nodes(task.trie, [task.masked[row] for row in chunk])
        steps = None
        if assistant is not None and assistant_weight:
            own = torch.as_tensor(assistant[chunk], device=task.trie.leaf.device)
            # Weights 1 - w and w order titles as 1 and w / (1 - w) do; the scores are scaled back below.
            steps = assisted_steps(own, task.trie) * (assistant_weight / (1 - assistant_weight))
        found, scores = beam_search(
            readings, task.log_prior, task.trie, max(k, width or k), dead, normalise_length, steps
        )
        if steps is not None:
            scores = scores * (1 - assistant_weight)
        found, scores = found[:, : task.size].cpu().numpy(), scores[:, : task.size].cpu().numpy()
        result.items[chunk], result.scores[chunk] = catalogue.items[found], scores
        result.target_logp[chunk] = task.target_logps(chunk, readings)
        hits = found == task.targets[chunk][:, None]
        rank[chunk] = np.where(hits.any(1), hits.argmax(1), rank[chunk])
    result.rank = rank
    return result


@torch.inference_mode()
def rank_likelihood(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    catalogue: Catalogue,
    prompts: Sequence[str],
    targets: Sequence[object],
    k: int,
    batch_size: int,
    *,
    masked: Sequence[Sequence[object]] | None = None,
    mixture: Backdoor | None = None,
    constrained: bool = False,
    piece: int = 128,
) -> Ranking:
    """The whole catalogue in exact order of p_C, or of pi_C if ``constrained``: what beam search approximates.

    ``target_logp`` is the primary endpoint of a study: the target's log-probability against the whole catalogue.
    ``piece`` trie nodes of ``batch_size`` prompts are computed at once, which bounds the memory.

    Raises:
        StudyError: as ``rank_beam``.
    """
    task = _Task.build(model, tokenizer, catalogue, prompts, targets, k, masked, mixture)
    result = task.empty_lists()
    for chunk, shares in _shares(task, batch_size, constrained, piece):
        task.fill(result, chunk, shares)
        result.target_logp[chunk] = shares.gather(1, task.places(chunk))[:, 0].cpu().numpy()
    return result


@torch.inference_mode()
def catalogue_shares(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    catalogue: Catalogue,
    prompts: Sequence[str],
    batch_size: int,
    *,
    mixture: Backdoor | None = None,
    constrained: bool = False,
    piece: int = 128,
) -> np.ndarray:
    """log p_C, or log pi_C if ``constrained``, of every item for each prompt: (N, items) float32, catalogue order.

    What comparisons with a known preference over the catalogue need, such as causal NDCG.
    """
    task = _Task.build(model, tokenizer, catalogue, prompts, [], 1, None, mixture)
    found = np.empty((len(prompts), len(catalogue.items)), dtype=np.float32)
    for chunk, shares in _shares(task, batch_size, constrained, piece):
        found[chunk] = shares.cpu().numpy()
    return found


@torch.inference_mode()
def environment_information(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    catalogue: Catalogue,
    prompts: Sequence[str],
    batch_size: int,
    mixture: Backdoor,
    *,
    piece: int = 128,
) -> float:
    r"""How far a conditioned policy uses its environment, in nats: the mean over prompts of

    .. math:: I(y; E \mid x) = \sum_k \hat p(k)\, \mathrm{KL}\big(p_C(\cdot \mid x, E = k) \,\|\,
        \textstyle\sum_j \hat p(j)\, p_C(\cdot \mid x, E = j)\big)

    over the catalogue: 0 if the soft prompts change nothing, at most the entropy of the prior.
    """
    task = _Task.build(model, tokenizer, catalogue, prompts, [], 1, None, mixture)
    parts, found = pieces(task.trie, piece), []
    for _, readings in task.batches(batch_size):
        logps = torch.stack(
            [torch.log_softmax(catalogue_logps(reading, task.trie, parts), dim=-1) for reading in readings]
        )
        gaps = (logps.exp() * (logps - mixed(logps, task.log_prior))).sum(-1)
        found.append((task.log_prior.exp()[:, None] * gaps).sum(0))
    return float(torch.cat(found).mean())


@torch.inference_mode()
def rank_embedding(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    catalogue: Catalogue,
    prompts: Sequence[str],
    targets: Sequence[object],
    k: int,
    batch_size: int,
    *,
    masked: Sequence[Sequence[object]] | None = None,
    mixture: Backdoor | None = None,
    encoder: str | Path | None = None,
    distance: str = "cosine",
    beams: int = 4,
    max_new_tokens: int | None = None,
    texts: Sequence[list[str]] | None = None,
    factors: np.ndarray | None = None,
) -> GroundedRanking:
    """The catalogue by nearness to what the model writes: BIGRec's grounding (arXiv 2308.08434), after exact matches.

    Args:
        encoder: a sentence-transformers model by name or path; None embeds by the backbone's own last-token states.
        distance: "cosine" or "l2", a name of ``grounding.DISTANCES``.
        beams: texts per example, by unconstrained beam search; BIGRec's 4.
        max_new_tokens: room for a text; None for that of the longest title.
        texts: what was written for the examples before, to be ranked anew; None writes it.
        factors: on the distances, (items,) or (N, items): BIGRec's injection of popularity or of another recommender
            (``grounding.boost_factors``), IFairLRS's re-ranking (``fairness.unfairness_factors``). Their strength is
            to be chosen on validation examples.

    Raises:
        StudyError: as ``rank_beam``; an unknown distance or encoder; a mixture, which writes no text of its own.
    """
    _refuse(mixture)
    task = _Task.build(model, tokenizer, catalogue, prompts, targets, k, masked, None)
    encode = state_encoder(model, tokenizer, batch_size) if encoder is None else sentence_encoder(str(encoder))
    vectors = encode(catalogue.titles)
    extra = None if factors is None else torch.as_tensor(np.asarray(factors), dtype=torch.float32)
    room = max_new_tokens or task.trie.paths.shape[1]
    result = task.empty_lists()
    found: list[list[str]] = [[] for _ in prompts]
    for chunk, readings in task.batches(batch_size):
        if texts is None:
            written = generate_texts(model, tokenizer, [task.encoded[0][row] for row in chunk], beams, room)
        else:
            written = [list(texts[row]) for row in chunk]
        own = extra if extra is None or extra.ndim == 1 else extra[chunk]
        scores = ground_texts(written, catalogue.titles, vectors, encode, distance, own)
        task.fill(result, chunk, scores.to(task.trie.leaf.device))
        result.target_logp[chunk] = task.target_logps(chunk, readings)
        for row, beam in zip(chunk, written, strict=True):
            found[row] = beam
    known = set(map(squeezed, catalogue.titles))
    exact = np.array([np.mean([squeezed(text) in known for text in row]) for row in found])
    return GroundedRanking(**vars(result), texts=found, exact=exact)


@torch.inference_mode()
def rank_candidates(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    catalogue: Catalogue,
    prompts: Sequence[str],
    targets: Sequence[object],
    k: int,
    batch_size: int,
    *,
    candidates: Sequence[Sequence[object]] | None = None,
    mixture: Backdoor | None = None,
    texts: bool = False,
    max_new_tokens: int = 20,
    count: int = 20,
    seed: int = 0,
) -> CandidateRanking:
    """Listed candidates by likelihood and, with ``texts``, by greedy answers (S-DPO, DynamicPO: 20 candidates).

    Prompts are taken as they are: for the published protocol they list the candidates themselves, and a model is not to
    be measured with such prompts and without in one comparison.

    Args:
        candidates: items per example, their target among them; repeated ones count once. None draws ``count`` from the
            catalogue with ``seed``, the target included.

    Raises:
        StudyError: as ``rank_beam``; a target that is not among its candidates; texts of a mixture.
    """
    if texts:
        _refuse(mixture)
    task = _Task.build(model, tokenizer, catalogue, prompts, targets, k, None, mixture)
    if candidates is None:
        listed = random_candidates(task.targets, len(catalogue.items), count, np.random.default_rng(seed))
    else:
        listed = [list(dict.fromkeys(catalogue.positions(row, "candidate").tolist())) for row in candidates]
        for row, (target, positions) in enumerate(zip(task.targets.tolist(), listed, strict=True)):
            if target not in positions:
                raise StudyError(f"the target of example {row} is not among its candidates: list it with them")
    size = min([k, *(len(row) for row in listed)])
    result = task.empty_lists(size)
    answers = [""] * len(prompts)
    for chunk, readings in task.batches(batch_size):
        width = max(len(listed[row]) for row in chunk)
        # Shorter lists are filled up with their first candidate, which is then left out.
        filled = torch.tensor([listed[row] + [listed[row][0]] * (width - len(listed[row])) for row in chunk])
        unused = torch.arange(width) >= torch.tensor([[len(listed[row])] for row in chunk])
        filled, unused = filled.to(task.trie.leaf.device), unused.to(task.trie.leaf.device)
        logps = task.mix([title_logps(reading, filled, task.trie, constrained=False) for reading in readings])
        shares = torch.log_softmax(logps.masked_fill(unused, MINUS_INFINITY), dim=-1)
        is_target = (filled == task.places(chunk)) & ~unused
        own = shares[is_target]
        found, scores = in_order(filled, shares)
        result.items[chunk] = catalogue.items[found[:, :size].cpu().numpy()]
        result.scores[chunk] = scores[:, :size].cpu().numpy()
        result.rank[chunk] = (shares >= own[:, None]).sum(1).cpu().numpy() - 1
        result.target_logp[chunk] = own.cpu().numpy()
        if texts:
            written = generate_texts(model, tokenizer, [task.encoded[0][row] for row in chunk], 1, max_new_tokens)
            for row, (text,) in zip(chunk, written, strict=True):
                answers[row] = text
    if not texts:
        return CandidateRanking(**vars(result), texts=[], **answer_measures([], [], []))
    titles = [[catalogue.titles[place] for place in row] for row in listed]
    aims = [catalogue.titles[place] for place in task.targets]
    return CandidateRanking(**vars(result), texts=answers, **answer_measures(answers, titles, aims))


def rank_scores(
    logps: np.ndarray,
    items: np.ndarray,
    targets: np.ndarray,
    k: int,
    masked: Sequence[Sequence[object]] | None = None,
) -> Ranking:
    """Ranking by log-probabilities (N, items) that are there already, such as SASRec's, under this module's rules.

    Args:
        items: ids in the order of the columns; ``targets`` (N,) ids; ``masked`` ids per example, or None.

    Raises:
        StudyError: a target or masked item that is not in the catalogue, or too few items left.
    """
    index = pd.Index(items)
    places = index.get_indexer(targets)
    if (places < 0).any():
        raise StudyError(f"the target item {targets[int(np.argmin(places))]!r} is not in the catalogue: rank others")
    scores = logps.astype(np.float32, copy=True)
    own = np.take_along_axis(scores, places[:, None], axis=1)
    if masked is not None:
        for row, ids in enumerate(masked):
            hidden = index.get_indexer(pd.Index(ids))
            if (hidden < 0).any():
                unknown = ids[int(np.argmin(hidden))]
                raise StudyError(f"the masked item {unknown!r} is not in the catalogue: mask only items that it holds")
            scores[row, hidden] = MINUS_INFINITY
    size = min(k, len(items))
    rank = scores.shape[1] - 1 - (scores < own).sum(axis=1)  # ties and what is no number stand before the target
    rank[np.isneginf(np.take_along_axis(scores, places[:, None], axis=1)[:, 0])] = len(items)
    order = (-scores).argsort(axis=1, kind="stable")[:, :size]
    left = (scores > MINUS_INFINITY).sum(axis=1).min(initial=size)
    if left < size:
        raise StudyError(f"masking leaves {left} titles for an example: set k to {left} or less, or mask fewer")
    return Ranking(items[order], np.take_along_axis(scores, order, axis=1), rank, own[:, 0])


RANKERS: dict[str, Callable[..., Ranking]] = {
    "beam": rank_beam,
    "beam_normalised": partial(rank_beam, normalise_length=True),
    "likelihood": rank_likelihood,
    "embedding": rank_embedding,
    "candidates": rank_candidates,
}


def recommend(
    checkpoint: str | Path, history: Sequence[object], k: int = 10, ranker: str = "beam"
) -> tuple[list[object], list[float]]:
    """The next items for a person with this history, from a checkpoint that the study has trained.

    Args:
        checkpoint: a folder in Hugging Face format with the study's ``catalogue.csv`` (columns ``item``, ``title``).
        history: titles or item ids, oldest first.
        k: how many items; all of them where the catalogue has fewer.
        ranker: a name of ``RANKERS`` that ranks the whole catalogue.

    Returns:
        Item ids and their scores (for ``beam`` log-probabilities in nats), best first.

    Raises:
        StudyError: the folder has no catalogue, or a title or id is unknown (near titles are suggested).
    """
    rank = pick({name: each for name, each in RANKERS.items() if name != "candidates"}, ranker, "ranker of a catalogue")
    items = read_catalogue(checkpoint)
    prompt = prompt_text(titles_of(history, items))
    model, tokenizer = load_checkpoint(checkpoint)
    catalogue = Catalogue.build(items, tokenizer)
    mixture = Backdoor.load(Path(checkpoint)) if (Path(checkpoint) / BACKDOOR_FILE).exists() else None
    # A narrow beam loses good titles on the way: short lists are cut from a long one. Rankers look for a target beside
    # the list; any will do.
    wide = max(k, 100) if k > 0 else k
    found = rank(model, tokenizer, catalogue, [prompt], catalogue.items[:1].tolist(), wide, 1, mixture=mixture)
    return found.items[0, :k].tolist(), found.scores[0, :k].tolist()


def agreement(first: Ranking, second: Ranking) -> dict[str, float]:
    """How alike the lists of two rankings of the same examples are, means over examples.

    ``overlap``: share of the first list's items that the second list has; ``kendall_tau``: Kendall's tau-b of the
    orders in which both have their common items (where they are two or more), 1 for the same order.
    """
    shared, orders = [], []
    for ours, theirs in zip(first.items.tolist(), second.items.tolist(), strict=True):
        place = {item: index for index, item in enumerate(theirs)}
        common = [place[item] for item in ours if item in place]
        shared.append(len(common) / len(ours))
        if len(common) > 1:
            orders.append(kendalltau(range(len(common)), common).statistic)
    return {"overlap": float(np.mean(shared)), "kendall_tau": float(np.mean(orders)) if orders else float("nan")}


@dataclass
class _Task:
    """What every ranker starts from: checked arguments, encoded prompts per environment, and places of the targets."""

    model: nn.Module
    trie: Trie
    catalogue: Catalogue
    encoded: list[list[list[int]]]
    log_prior: Tensor
    targets: np.ndarray
    masked: list[list[int]] | None
    size: int
    pad_id: int

    @classmethod
    def build(
        cls,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        catalogue: Catalogue,
        prompts: Sequence[str],
        targets: Sequence[object],
        k: int,
        masked: Sequence[Sequence[object]] | None,
        mixture: Backdoor | None,
    ) -> _Task:
        if k < 1:
            raise StudyError(f"k = {k} asks for lists without items: set it to 1 or more")
        places = catalogue.positions(targets, "target")
        hidden = None
        if masked is not None:
            hidden = [catalogue.positions(row, "masked").tolist() for row in masked]
            left = len(catalogue.items) - max((len(set(row)) for row in hidden), default=0)
            if left < min(k, len(catalogue.items)):
                raise StudyError(f"masking leaves {left} titles for an example: set k to {left} or less, or mask fewer")
        prefixes, prior = ([[]], [1.0]) if mixture is None else (mixture.tokens, mixture.prior)
        room = context_of(model) - catalogue.trie.paths.shape[1] + max(len(ids) for ids in prefixes)
        if len(prompts):
            check_boundary(tokenizer, prompts[0], response_text(catalogue.titles[0]))
        plain = encode_prompts(tokenizer, prompts, room) if len(prompts) else []
        encoded = [[with_environment(ids, tokens, tokenizer.bos_token_id) for ids in plain] for tokens in prefixes]
        model.eval()
        parameter = next(model.parameters())
        if len(prompts):
            check_exact(model, encoded[0][0], catalogue.responses[0], tokenizer.pad_token_id)
        return cls(
            model=model,
            trie=catalogue.trie.to(parameter.device),
            catalogue=catalogue,
            encoded=encoded,
            log_prior=torch.tensor(prior, device=parameter.device).log(),
            targets=places,
            masked=hidden,
            size=min(k, len(catalogue.items)),
            pad_id=tokenizer.pad_token_id,
        )

    def empty_lists(self, size: int | None = None) -> Ranking:
        count, size = len(self.encoded[0]), self.size if size is None else size
        return Ranking(
            np.empty((count, size), dtype=self.catalogue.items.dtype),
            np.empty((count, size), dtype=np.float32),
            np.empty(count, dtype=np.int64),
            np.empty(count, dtype=np.float32),
        )

    def batches(self, batch_size: int) -> Iterator[tuple[list[int], list[Reading]]]:
        """Rows of similar length, and their prompts read in each environment."""
        for chunk in batches_by_length(self.encoded[0], batch_size):
            rows = [[encoded[row] for row in chunk] for encoded in self.encoded]
            yield chunk, [read_prompts(self.model, prompts, self.pad_id) for prompts in rows]

    def places(self, chunk: list[int]) -> Tensor:
        """Catalogue positions (B, 1) of targets, on the model's device."""
        return torch.from_numpy(self.targets[chunk]).to(self.trie.leaf.device)[:, None]

    def mix(self, logps: Sequence[Tensor]) -> Tensor:
        """log-probabilities (B, N) of the mixture from those in each environment."""
        return mixed(torch.stack(list(logps)), self.log_prior)

    def target_logps(self, chunk: list[int], readings: Sequence[Reading]) -> np.ndarray:
        """log pi_C of the targets, (B,)."""
        places = self.places(chunk)
        found = self.mix([title_logps(each, places, self.trie, constrained=True) for each in readings])
        return found[:, 0].cpu().numpy()

    def fill(self, result: Ranking, chunk: list[int], scores: Tensor) -> None:
        """Lists and ranks of a chunk from scores (B, titles)."""
        own = scores.gather(1, self.places(chunk))
        if self.masked is not None:
            scores = scores.clone()
            for row, index in enumerate(chunk):
                scores[row, self.masked[index]] = MINUS_INFINITY
        rank = (scores >= own).sum(1).cpu().numpy() - 1
        if self.masked is not None:
            hidden = np.array([self.targets[index] in self.masked[index] for index in chunk], dtype=bool)
            rank = np.where(hidden, len(self.catalogue.items), rank)
        order = scores.argsort(dim=1, descending=True, stable=True)[:, : self.size]
        result.items[chunk] = self.catalogue.items[order.cpu().numpy()]
        result.scores[chunk] = scores.gather(1, order).cpu().numpy()
        result.rank[chunk] = rank


def _shares(task: _Task, batch_size: int, constrained: bool, piece: int) -> Iterator[tuple[list[int], Tensor]]:
    """Log-probabilities (B, titles) over the catalogue that sum to 1, batch by batch."""
    parts = pieces(task.trie, piece)
    for chunk, readings in task.batches(batch_size):
        logps = task.mix([catalogue_logps(reading, task.trie, parts, constrained) for reading in readings])
        yield chunk, torch.log_softmax(logps, dim=-1)


def _refuse(mixture: Backdoor | None) -> None:
    if mixture is not None:
        raise StudyError(
            "a mixture over environments writes no text of its own: rank this checkpoint by 'beam' or 'likelihood'"
        )
