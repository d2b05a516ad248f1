"""Reasoning about a user's preferences as text: the prompt for it, texts to learn it from, sampling, encoding.

DPO4Rec (arXiv 2410.05939) prompts a language model with a user's history and with the factors to reason by, as KAR
(arXiv 2306.10933) does. A text, its *knowledge*, becomes a vector by a frozen encoder, which a re-ranker reads.

An embedded backbone knows nothing about any title, so its prompts hold what the items' table says of each item (genres,
decade ...) in place of the title, and it is taught first: from such histories to templated summaries of random parts of
them. Which factors, values and manner of counting a summary has is drawn too. Sampled texts then differ in what they
say, as those of a large model do, and no template is better by construction.

A text is one paragraph: what follows a line break is cut off. A generation without any word is *empty*; one with
neither an end nor a line break within its tokens is *over-long*. Both count as no text: an empty string, and a vector
of zeros.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from causaldpo_lib.decoding import check_exact, check_finite, read_prompts
from causaldpo_lib.errors import StudyError, pick
from causaldpo_lib.grounding import Encoder, last_states, squeezed
from causaldpo_lib.packing import decoder_and_head
from causaldpo_lib.prompts import SEPARATOR, encode_prompts, response_text

# Both begin as the study's prompts do: a prompt that is too long loses its oldest titles.
TAUGHT = "Chosen so far: {history}\nPreferences by {factors}:"
INSTRUCTION = (
    "Chosen so far: {history}\n"
    "Task: in one paragraph of at most three sentences, say what this user prefers and why, judging by {factors}. "
    "Name what stands out against other users, not single titles.\n"
    "Preferences:"
)
MANNERS = ("mostly", "unusually often")  # by count, and by excess over what is usual
MOST_VALUES = 3  # named of one factor
LEAST_PART = 1 / 3  # of a history that a summary is made of

Values = Mapping[str, Sequence[tuple[str, ...]]]  # factor -> its values of each catalogue item


# --- factors: what reasoning goes by ---


def genre(items: pd.DataFrame, counts: np.ndarray) -> list[tuple[str, ...]] | None:
    """All genres, categories or tags of each item."""
    if "genres" not in items:
        return None
    return [tuple(filter(None, text.split("|"))) for text in items["genres"].fillna("")]


def period(items: pd.DataFrame, counts: np.ndarray) -> list[tuple[str, ...]] | None:
    """The decade of each item's year."""
    if "year" not in items:
        return None
    return [() if pd.isna(year) else (f"{int(year) // 10 * 10}s",) for year in items["year"]]


def popularity(items: pd.DataFrame, counts: np.ndarray) -> list[tuple[str, ...]] | None:
    """Which third of the interactions (``counts``, of what texts may know) an item belongs to, most frequent first."""
    order = np.argsort(-counts, kind="stable")
    before = np.empty(len(counts))
    before[order] = counts[order].cumsum() - counts[order]
    third = np.where(counts > 0, 3 * before // max(counts.sum(), 1), 2).astype(int)
    names = ("widely known", "known", "little known")
    return [(names[index],) for index in third]


def _column(name: str) -> Callable[[pd.DataFrame, np.ndarray], list[tuple[str, ...]] | None]:
    def values(items: pd.DataFrame, counts: np.ndarray) -> list[tuple[str, ...]] | None:
        return [(text,) if text else () for text in items[name].fillna("")] if name in items else None

    return values


# (items, counts (I,)) -> values of each item, or None where the table does not tell. Those without a function only
# stand in the instruction: a large language model may know them.
FACTORS: dict[str, Callable[[pd.DataFrame, np.ndarray], list[tuple[str, ...]] | None] | None] = {
    "genre": genre,
    "period": period,
    "popularity": popularity,
    "author": _column("author"),
    "brand": _column("brand"),
    "director": None,
    "actors": None,
    "theme": None,
}


def factor_values(items: pd.DataFrame, counts: np.ndarray, factors: Sequence[str]) -> dict[str, list[tuple[str, ...]]]:
    """The values of every item, for those of ``factors`` that the items' table gives.

    Raises:
        StudyError: an unknown factor, or none at all is named.
    """
    if not factors:
        raise StudyError(f"factors is empty: name one or more of {', '.join(FACTORS)}")
    found = {}
    for name in factors:
        function = pick(FACTORS, name, "factor")
        values = function(items, counts) if function else None
        if values is not None:
            found[name] = values
    return found


# --- prompts and the texts that an embedded backbone learns from ---


def knowledge_prompt(history: Sequence[str], factors: Sequence[str], instruction: bool) -> str:
    """The prompt that asks for the preferences behind a history, oldest item first.

    The instruction for a large model, which knows what titles stand for, or the short form that a small one is taught.
    """
    template = INSTRUCTION if instruction else TAUGHT
    return template.format(history=SEPARATOR.join(history), factors=_listed(factors))


def usual_shares(values: Values, counts: np.ndarray) -> dict[str, dict[str, float]]:
    """Per factor the share of each value among all mentions, items weighed by ``counts`` (I,): what is usual."""
    found = {}
    for factor, rows in values.items():
        total: Counter[str] = Counter()
        for names, count in zip(rows, counts.tolist(), strict=True):
            for name in names:
                total[name] += count
        mentions = sum(total.values()) or 1
        found[factor] = {name: count / mentions for name, count in total.items()}
    return found


def named_values(
    positions: Sequence[int], rows: Sequence[tuple[str, ...]], shares: Mapping[str, float], manner: str
) -> list[str]:
    """A factor's values among items, the one to be named first at the front; equals by name.

    ``mostly`` orders by count c; ``unusually often`` by (c - n s) / sqrt(n s), with n the mentions of all values and s
    the usual share, and leaves out what is not above 0.
    """
    counts = Counter(name for position in positions for name in rows[position])
    weights = {name: float(count) for name, count in counts.items()}
    if manner == MANNERS[1]:
        mentions = sum(counts.values())
        for name, count in counts.items():
            expected = mentions * shares.get(name, 0.0)
            weights[name] = (count - expected) / math.sqrt(expected) if expected else math.inf
        weights = {name: weight for name, weight in weights.items() if weight > 0}
    return sorted(weights, key=lambda name: (-weights[name], name))


def summary(
    positions: Sequence[int], values: Values, shares: Mapping[str, Mapping[str, float]], rng: np.random.Generator
) -> str:
    """A templated text about items (catalogue positions): drawn factors, each in a drawn manner with 1 to 3 values.

    Empty where no factor has a value of these items.
    """
    parts = []
    spoken = rng.random(len(values)) < 0.6
    for number, (factor, rows) in enumerate(values.items()):
        manner, most = MANNERS[rng.integers(2)], int(rng.integers(1, MOST_VALUES + 1))
        names = named_values(positions, rows, shares[factor], manner)[:most]
        if names and (spoken[number] or not spoken.any()):
            parts.append(f"{factor} {manner} {', '.join(names)}")
    return SEPARATOR.join(parts)


def item_texts(titles: Sequence[str], values: Values) -> list[str]:
    """What is known of each item: its title and its factors. The item knowledge of KAR, from metadata."""
    texts = []
    for position, title in enumerate(titles):
        known = [f"{factor} {', '.join(rows[position])}" for factor, rows in values.items() if rows[position]]
        texts.append(SEPARATOR.join([title, *known]))
    return texts


def facts(titles: Sequence[str], values: Values) -> list[str]:
    """Each item as an embedded backbone reads it in a history: all its factors' values, or its title without any."""
    return [
        ", ".join(name for rows in values.values() for name in rows[position]) or title
        for position, title in enumerate(titles)
    ]


def teaching_rows(
    histories: Sequence[Sequence[int]],
    described: Sequence[str],
    values: Values,
    counts: np.ndarray,
    texts: int,
    rng: np.random.Generator,
) -> list[dict[str, object]]:
    """Rows (``prompt``, and ``chosen``, a list of ``texts`` responses) for supervised fine-tuning of a small backbone.

    One row a history, whose items stand as ``described`` (``facts``): summaries of random parts of it, a third of its
    items or more.

    Raises:
        StudyError: the items' table gives none of the factors.
    """
    if not values:
        raise StudyError(
            "the items have none of the factors, so there is nothing to teach an embedded backbone: name 'popularity', "
            "which every dataset has, or generate by a pretrained model"
        )
    shares, rows = usual_shares(values, counts), []
    for history in histories:
        least = math.ceil(LEAST_PART * len(history))
        parts = [
            rng.choice(history, int(rng.integers(least, len(history) + 1)), replace=False).tolist()
            for _ in range(texts)
        ]
        written = [text for part in parts if (text := summary(part, values, shares, rng))]
        if written:
            prompt = knowledge_prompt([described[position] for position in history], list(values), instruction=False)
            # As many for every row, so that none has absent responses.
            chosen = [response_text(written[number % len(written)]) for number in range(texts)]
            rows.append({"prompt": prompt, "chosen": chosen})
    return rows


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


# --- sampling ---


class Generated(NamedTuple):
    """``texts``: a list for each prompt, "" where there is none; how many were ``empty`` and ``over_long``."""

    texts: list[list[str]]
    empty: int
    over_long: int


@torch.inference_mode()
def generate_knowledge(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    count: int,
    *,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    context: int,
) -> Generated:
    """``count`` texts for each prompt, sampled from softmax(logits / temperature), or greedy at temperature 0.

    A prompt is computed once for all its texts. The draws of a batch depend on ``seed`` and the batch's number,
    and on nothing drawn before. A prompt that leaves no room in ``context`` tokens loses its oldest titles.

    Raises:
        StudyError: a temperature below 0, several greedy texts, no token to generate, or scores that are not numbers.
    """
    if temperature < 0 or (temperature == 0 and count > 1) or min(count, max_new_tokens) < 1:
        raise StudyError(
            f"{count} texts of up to {max_new_tokens} tokens at temperature {temperature:g} cannot be sampled: give "
            "one text or more, one token or more, and a temperature above 0 (at 0 there is one text, the greedy one)"
        )
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    encoded = encode_prompts(tokenizer, list(prompts), context - max_new_tokens)
    if encoded:
        check_exact(model, encoded[0], [encoded[0][-1], tokenizer.eos_token_id], tokenizer.pad_token_id)
    found = Generated([], 0, 0)
    for number, first in enumerate(range(0, len(encoded), batch_size)):
        generator = torch.Generator(device).manual_seed(
            int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        )
        batch = encoded[first : first + batch_size]
        tokens = _continuations(model, tokenizer, batch, count, temperature, max_new_tokens, generator)
        for row in range(len(batch)):
            texts = []
            for ids in tokens[row * count : (row + 1) * count].tolist():
                text, fault = _paragraph(ids, tokenizer)
                texts.append(text)
                found = found._replace(**({fault: getattr(found, fault) + 1} if fault else {}))
            found.texts.append(texts)
    model.train(was_training)
    return found


def _continuations(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    count: int,
    temperature: float,
    limit: int,
    generator: torch.Generator,
) -> Tensor:
    """Token ids (B count, T <= limit) after each prompt, those of one prompt in a row; filled up with the end token."""
    reading = read_prompts(model, prompts, tokenizer.pad_token_id)
    device, end = reading.states.device, tokenizer.eos_token_id
    # All texts of a prompt lie side by side in one row whose mask lets a token see the prompt and its own text, so that
    # the cache holds each prompt once.
    own = torch.full((count, count), torch.finfo(reading.mask.dtype).min, dtype=reading.mask.dtype, device=device)
    own.fill_diagonal_(0.0)
    mask = reading.mask.expand(-1, count, -1)
    states = reading.states[:, None].expand(-1, count, -1)
    done = torch.zeros(len(prompts), count, dtype=torch.bool, device=device)
    found: list[Tensor] = []
    for step in range(limit):
        logits = reading.head(states).float()
        check_finite(logits)
        token = _drawn(logits.flatten(0, 1), temperature, generator).view_as(done).masked_fill(done, end)
        found.append(token)
        done |= token == end
        if done.all() or step == limit - 1:
            break
        mask = torch.cat([mask, own.expand(len(prompts), -1, -1)], dim=-1)
        states = reading.decoder(
            input_ids=token,
            attention_mask=mask[:, None],
            position_ids=(reading.lengths[:, None] + step).expand(-1, count),
            past_key_values=reading.cache,
            use_cache=True,
        ).last_hidden_state
    return torch.stack(found, dim=-1).flatten(0, 1)


def _drawn(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A token (B,) from each row of logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1, generator=generator)[:, 0]


def _paragraph(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The first line of a generation, single blanks for its white space, and what is wrong with it, if anything."""
    ended = tokenizer.eos_token_id in ids
    written = ids[: ids.index(tokenizer.eos_token_id)] if ended else ids
    text = tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
    line, broken, _ = text.partition("\n")
    if not squeezed(line):
        return "", "empty"
    if not ended and not broken:
        return "", "over_long"
    return squeezed(line), ""


# --- encoding ---


def mean_encoder(model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Encoder:
    """The mean of a backbone's last-layer states over a text's tokens, (N, d)."""
    decoder, _ = decoder_and_head(model)

    @torch.inference_mode()
    def encode(texts: Sequence[str]) -> Tensor:
        found = []
        for states, lengths in last_states(decoder, tokenizer, [response_text(text) for text in texts], batch_size):
            padded = torch.arange(states.shape[1], device=states.device) >= lengths[:, None]
            total = states.float().masked_fill(padded[..., None], 0.0).sum(1)
            found.append((total / lengths[:, None]).cpu())
        return torch.cat(found)

    return encode


def encode_knowledge(texts: Sequence[str], encode: Encoder) -> Tensor:
    """Vectors (N, d) of texts, each different one encoded once; zeros where there is no text."""
    spoken = sorted(set(filter(None, texts))) or [""]  # which says how wide a vector is
    known = encode(spoken)
    place = {text: number for number, text in enumerate(spoken)}
    vectors = known.new_zeros(len(texts), known.shape[1])
    rows = [row for row, text in enumerate(texts) if text]
    vectors[rows] = known[[place[texts[row]] for row in rows]]
    return vectors
