"""Backbones: the embedded ``tiny`` Llama, or any Hugging Face causal language model by name or path."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from causaldpo_lib.errors import StudyError, pick
from causaldpo_lib.prompts import prompt_text, response_text

# A bar for a file that loads in milliseconds is noise in every notebook and log.
transformers_logging.disable_progress_bar()

# Embedded backbones: name -> (width, layers). `tiny` has 1.3M parameters with a 4,000-token vocabulary: as small as
# reads ten titles, large enough to learn a catalogue; the others, of 0.5M, 4.2M, 28M and 90M, are for comparisons of
# size. The last two want a GPU.
TINY = {"tiny": (128, 4), "tiny-small": (64, 4), "tiny-large": (256, 4), "small": (512, 8), "base": (768, 12)}


def device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train_tokenizer(titles: Iterable[str], vocabulary: int = 4000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the catalogue's titles as they stand in prompts and responses.

    Bytes outside the titles stay expressible, so any text can be encoded. The same titles give the same tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    # Words keep their blank and their punctuation (" (1995)" is one token), only the prompt's own marks stand alone:
    # prompts are a third shorter than with GPT-2's rule, and compute is proportional to tokens.
    words = pre_tokenizers.Split(Regex(r" ?[^\s;:]+|\s|;|:"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    titles = sorted(titles)
    # The template stands in every prompt, so it is counted as often as a frequent word of the titles.
    texts = [prompt_text([])] * 100 + [response_text(title) for title in titles]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def tiny_backbone(
    titles: Iterable[str], seed: int, name: str = "tiny"
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A randomly initialised Llama-architecture model, by its name in ``TINY``, with a tokenizer for ``titles``."""
    width, layers = pick(TINY, name, "embedded backbone")
    tokenizer = train_tokenizer(titles)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        hidden_size=width,
        intermediate_size=11 * width // 4,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 32, 1),
        num_key_value_heads=max(width // 32, 1),
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config), tokenizer


def load_checkpoint(
    name_or_path: str | Path, dtype: torch.dtype | str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer on the default device; "auto" is the precision it was saved in.

    Raises:
        StudyError: nothing loadable is there, weights are missing, or the tokenizer has no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        model, report = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise StudyError(
            f"no causal language model could be loaded from {str(name_or_path)!r}: give 'tiny', a folder in Hugging "
            f"Face format or a hub name that is reachable ({str(error).splitlines()[0]})"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise StudyError(
            f"{str(name_or_path)!r} has no weights for {missing[0]} ({len(missing)} missing), which would be random: "
            "save the checkpoint again, whole"
        )
    if tokenizer.eos_token_id is None:
        raise StudyError(f"the tokenizer of {str(name_or_path)!r} has no end-of-sequence token to close responses with")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device()), tokenizer


def with_lora(model: PreTrainedModel, rank: int) -> torch.nn.Module:
    """``model`` with trainable low-rank adapters of ``rank`` on all linear layers; rank 0 trains every weight."""
    if rank == 0:
        return model
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def save_checkpoint(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights (adapters merged, safetensors) and tokenizer in ordinary Hugging Face format."""
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
