"""Histories of titles to prompts, prompts and titles to tokens: the one place where text becomes ids.

A prompt ends in ``Next:`` and a response is a blank, a title and the end-of-sequence token, so that the boundary
between them is a token boundary. ``check_boundary`` tests this for the tokenizer at hand instead of assuming
it: supervised fine-tuning, alignment and ranking then see the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from causaldpo_lib.errors import StudyError

TEMPLATE = "Chosen so far: {history}\nNext:"
SEPARATOR = "; "


def prompt_text(titles: Sequence[str]) -> str:
    """The prompt of a history of titles, oldest first; no title gives the prompt of an unknown user."""
    return TEMPLATE.format(history=SEPARATOR.join(titles))


def response_text(title: str) -> str:
    """The response that names ``title``; the end-of-sequence token is added as an id by ``encode_responses``."""
    return f" {title}"


def prompt_table(examples: pd.DataFrame, titles: Mapping[object, str]) -> pd.DataFrame:
    """Prompts and chosen responses of examples (columns ``history`` and ``item``), one row per example, same index."""
    parts = [part.to_pandas() for part in prompt_batches(examples, titles)]
    return pd.concat(parts or [_NO_PROMPTS], ignore_index=True).set_axis(examples.index)


def prompt_batches(
    examples: pd.DataFrame | pa.Table, titles: Mapping[object, str], size: int = 1 << 16
) -> Iterator[pa.Table]:
    """The same in Arrow and lazily, ``size`` examples at a time, so that millions of prompts need not be held at once.

    Args:
        examples: columns ``history`` (item ids) and ``item``, in pandas or Arrow.
        titles: item id -> title, of every item named.
        size: examples a batch at most.

    Yields:
        columns ``prompt`` and ``chosen``, in the order of ``examples``.

    Raises:
        StudyError: an item has no title.
    """
    titles = pd.Series(titles)
    texts = pa.array(titles, pa.string())
    head, tail = TEMPLATE.split("{history}")

    def name(items: pa.Array) -> pa.Array:
        found = titles.index.get_indexer(items.to_pandas())
        if (found < 0).any():
            unknown = items[int(found.argmin())].as_py()
            raise StudyError(f"item {unknown!r} of an example has no title: add it to the items")
        return texts.take(pa.array(found))

    for begin in range(0, len(examples), size):
        part = examples[begin : begin + size]
        history, item = (pa.table({key: part[key]})[key].combine_chunks() for key in ("history", "item"))
        ends = np.cumsum(pc.list_value_length(history))
        named = pa.ListArray.from_arrays(np.append(0, ends).astype(np.int32), name(history.flatten()))
        prompt = pc.binary_join_element_wise(head, pc.binary_join(named, SEPARATOR), tail, "")
        yield pa.table({"prompt": prompt, "chosen": pc.binary_join_element_wise(response_text(""), name(item), "")})


_NO_PROMPTS = pd.DataFrame({"prompt": [], "chosen": []}, dtype=str)


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_tokens: int | None = None,
    beside: str = "the longest response",
) -> list[list[int]]:
    """Token ids of prompts, with the tokenizer's own beginning-of-sequence token if it has one.

    A prompt longer than ``max_tokens`` loses its oldest titles, never its tail. ``beside`` says in an error what the
    rest of the model's context is kept for.

    Raises:
        StudyError: a prompt exceeds ``max_tokens`` and does not begin as the study's do, so that its titles are not
            known, or it exceeds them even without any history.
    """
    encoded = tokenizer(list(prompts))["input_ids"]
    if max_tokens is None:
        return encoded
    head = TEMPLATE.partition("{")[0]
    for index, ids in enumerate(encoded):
        text = prompts[index]
        if len(ids) > max_tokens and not text.startswith(head):
            raise StudyError(
                f"prompt {index} has {len(ids)} tokens, {max(max_tokens, 0)} are left beside {beside}, and it does not "
                f"begin with {head!r}: shorten it, since only prompts of that form lose their oldest titles"
            )
        while len(ids) > max_tokens:
            _, found, tail = text.partition(SEPARATOR)
            if not found:
                raise StudyError(
                    f"prompt {index}, {len(ids)} tokens without the titles that it can lose, does not fit the "
                    f"{max(max_tokens, 0)} left beside {beside}: shorten either, or raise max_length if it is set"
                )
            text = head + tail
            ids = tokenizer(text)["input_ids"]
        encoded[index] = ids
    return encoded


def encode_responses(tokenizer: PreTrainedTokenizerBase, responses: Sequence[str]) -> list[list[int]]:
    """Token ids of responses, each closed by the end-of-sequence token."""
    if not len(responses):
        return []
    encoded = tokenizer(list(responses), add_special_tokens=False)["input_ids"]
    return [[*ids, tokenizer.eos_token_id] for ids in encoded]


def check_boundary(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> None:
    """Refuse a tokenizer that merges the end of a prompt with the start of a response.

    Raises:
        StudyError: the tokens of ``prompt + response`` are not those of the two parts in a row.
    """
    whole = tokenizer(prompt + response)["input_ids"]
    parts = tokenizer(prompt)["input_ids"] + tokenizer(response, add_special_tokens=False)["input_ids"]
    if whole != parts:
        raise StudyError(
            f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__!r} splits {response!r} differently "
            "after a prompt than alone: the study needs one for which ':' followed by a blank is a token boundary"
        )
