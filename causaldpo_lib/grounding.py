"""Free text to items: generation, embeddings, and the rules by which a text stands for a title.

BIGRec (arXiv 2308.08434): a model writes what it recommends, and the catalogue is ranked by how near its titles are to
that text. The S-DPO family asks which of a few listed candidates a text names.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from causaldpo_lib.errors import StudyError, pick
from causaldpo_lib.packing import decoder_and_head

Encoder = Callable[[Sequence[str]], Tensor]


def generate_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    beams: int,
    max_new_tokens: int,
) -> list[list[str]]:
    """The ``beams`` texts, stripped and best first, that unconstrained beam search (1: greedy) writes for each prompt.

    Deterministic, whatever sampling a checkpoint's own generation settings ask for.
    """
    device = next(model.parameters()).device
    size = max(len(ids) for ids in prompts)
    ids = torch.full((len(prompts), size), tokenizer.pad_token_id)
    for row, prompt in enumerate(prompts):
        ids[row, size - len(prompt) :] = torch.tensor(prompt)
    seen = torch.arange(size) >= size - torch.tensor([len(prompt) for prompt in prompts])[:, None]
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=beams,
        num_return_sequences=beams,
        do_sample=False,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    out = model.generate(input_ids=ids.to(device), attention_mask=seen.long().to(device), generation_config=settings)
    texts = tokenizer.batch_decode(out[:, size:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [[text.strip() for text in texts[row * beams : (row + 1) * beams]] for row in range(len(prompts))]


def last_states(
    decoder: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Last-layer states (B, T, d) of texts, padded at the end, and their lengths (B,) in tokens, batch by batch.

    A text without a token is read as the end-of-sequence token.
    """
    device = next(decoder.parameters()).device
    for first in range(0, len(texts), batch_size):
        part = tokenizer(list(texts[first : first + batch_size]))["input_ids"]
        rows = [torch.tensor(ids or [tokenizer.eos_token_id], device=device) for ids in part]
        lengths = torch.tensor([len(ids) for ids in rows], device=device)
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        seen = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
        yield decoder(input_ids=ids, attention_mask=seen).last_hidden_state, lengths


def state_encoder(model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Encoder:
    """BIGRec's encoder: the last-layer state of a text's last token, from the backbone itself."""
    decoder, _ = decoder_and_head(model)

    @torch.inference_mode()
    def encode(texts: Sequence[str]) -> Tensor:
        return torch.cat(
            [
                states[torch.arange(len(states), device=states.device), lengths - 1].float().cpu()
                for states, lengths in last_states(decoder, tokenizer, texts, batch_size)
            ]
        )

    return encode


def sentence_encoder(name_or_path: str) -> Encoder:
    """Any model of sentence-transformers.

    Raises:
        StudyError: the package is not installed, or nothing loadable is there.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise StudyError(
            "sentence encoders need an extra package: run pip install '.[embedding]', or leave `encoder` out"
        ) from error
    try:
        encoder = SentenceTransformer(str(name_or_path))
    except (OSError, ValueError) as error:
        raise StudyError(
            f"no sentence encoder could be loaded from {str(name_or_path)!r}: give a folder of sentence-transformers "
            "or a hub name that is reachable"
        ) from error
    return lambda texts: torch.from_numpy(encoder.encode(list(texts), show_progress_bar=False)).float()


def cosine_distance(vectors: Tensor, others: Tensor) -> Tensor:
    """1 - cosine of (B, d) with (N, d): (B, N) in 0 ... 2."""
    return 1.0 - nn.functional.normalize(vectors, dim=-1) @ nn.functional.normalize(others, dim=-1).T


def euclidean_distance(vectors: Tensor, others: Tensor) -> Tensor:
    """L2 distances of (B, d) and (N, d): (B, N)."""
    return torch.cdist(vectors, others, compute_mode="donot_use_mm_for_euclid_dist")


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": cosine_distance, "l2": euclidean_distance}


def ground_texts(
    texts: Sequence[Sequence[str]],
    titles: Sequence[str],
    title_vectors: Tensor,
    encode: Encoder,
    distance: str = "cosine",
    factors: Tensor | None = None,
) -> Tensor:
    """Scores (B, N) of N titles, the higher the nearer, for B examples with their generated texts, best first.

    A text that is a title, white space aside, puts that title first: the scores of such titles are whole numbers above
    0 that fall with the beams. The others have minus their distance to the first text that is not blank. Where all
    texts are blank nothing is near: every title has 0.

    With ``factors``, (N,) or (B, N), such as ``boost_factors``, distances are min-max normalised per example and then
    multiplied by them.

    Raises:
        StudyError: texts are not lists of strings, or the distance is unknown.
    """
    if any(isinstance(row, str) for row in texts):
        # The first element of a string is its first character, which embeds without complaint.
        raise StudyError("each example needs a list of generated texts, not one text: wrap single texts in a list")
    measure = pick(DISTANCES, distance, "distance")
    written = [next((text for text in row if text.strip()), "") for row in texts]
    scores = torch.zeros(len(texts), len(titles))
    spoken = [row for row, text in enumerate(written) if text]
    if spoken:
        far = measure(encode([written[row] for row in spoken]).float(), title_vectors.float())
        if factors is not None:
            far = _min_max(far) * factors.expand(len(texts), -1)[spoken]
        scores[spoken] = -far
    place = {squeezed(title): position for position, title in enumerate(titles)}
    for row, beams in enumerate(texts):
        exact = list(dict.fromkeys(place[text] for text in map(squeezed, beams) if text in place))
        scores[row, exact] = torch.arange(len(exact), 0, -1, dtype=scores.dtype)
    return scores


def boost_factors(boost: Tensor, gamma: float) -> Tensor:
    """BIGRec's factors (1 + C~)^-gamma on distances, C~ = ``boost`` min-max normalised over its last dimension.

    ``boost``, (N,) or (B, N): popularity shares, or another recommender's probabilities.
    """
    return (1.0 + _min_max(boost)) ** -gamma


def named_titles(text: str, titles: Sequence[str]) -> list[str]:
    """The candidate titles that a text names, the longest match first.

    A title counts where it stands as whole words outside of longer named titles: "Alien" is not named by "Aliens", nor
    by a text whose "Alien Nation" is a candidate of its own.
    """
    named = []
    for title in sorted(set(titles), key=lambda title: (-len(title), title)):
        rest = re.sub(rf"(?<!\w){re.escape(title)}(?!\w)", "\0", text)
        if rest != text:
            named.append(title)
            text = rest
    return named


def contained_titles(text: str, titles: Sequence[str]) -> list[str]:
    """The candidate titles that are substrings of a text: the rule of the S-DPO family's published evaluators.

    A title inside another one makes two answers of one, which that rule calls invalid.
    """
    return [title for title in sorted(set(titles)) if title in text]


def answer_measures(
    answers: Sequence[str], titles: Sequence[Sequence[str]], aims: Sequence[str]
) -> dict[str, np.ndarray]:
    """Whether answers name exactly one of their candidate titles, and whether that is the aim: (N,) bool each.

    ``hit`` and ``valid`` by longest match, ``source_hit`` and ``source_valid`` by the substring rule.
    """
    found = {}
    for prefix, rule in (("", named_titles), ("source_", contained_titles)):
        named = [rule(text, row) for text, row in zip(answers, titles, strict=True)]
        found[f"{prefix}hit"] = np.array([row == [aim] for row, aim in zip(named, aims, strict=True)], dtype=bool)
        found[f"{prefix}valid"] = np.array([len(row) == 1 for row in named], dtype=bool)
    return found


def squeezed(text: str) -> str:
    """A text with single blanks for its white space, by which texts and titles are compared."""
    return " ".join(text.split())


def _min_max(values: Tensor) -> Tensor:
    low, high = values.min(-1, keepdim=True).values, values.max(-1, keepdim=True).values
    return (values - low) / torch.where(high > low, high - low, 1.0)


def random_candidates(targets: np.ndarray, items: int, count: int, rng: np.random.Generator) -> list[list[int]]:
    """For each target position, itself and ``count`` - 1 others of ``items`` drawn uniformly, in random order."""
    others = min(count, items) - 1
    found = []
    for target in targets.tolist():
        drawn = rng.choice(items - 1, others, replace=False)
        found.append(rng.permutation([target, *(drawn + (drawn >= target))]).tolist())
    return found
