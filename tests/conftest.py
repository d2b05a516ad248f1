"""Fixtures shared by the tests: a small catalogue and small random checkpoints on disk, no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pandas as pd
import pytest
import torch

TITLES = [
    "The Rusted Comet", "The Rusted Moon", "Silent Harbor", "Silent Harbor Nights", "A Paper Crown", "Paper Tigers",
    "Midnight at Nine", "Über die Brücke", "Comet, The (1995)", "Laughing Matter", "Laughing Stock", "Zero",
]  # fmt: skip


@pytest.fixture(scope="session")
def items():
    return pd.DataFrame({"item": range(10, 10 + len(TITLES)), "title": TITLES})


@pytest.fixture(scope="session")
def tiny(items):
    """A randomly initialised tiny backbone with its tokenizer; copy it before training."""
    from causaldpo_lib.backbone import tiny_backbone

    torch.set_num_threads(1)
    return tiny_backbone(items["title"], seed=0)


@pytest.fixture(scope="session")
def rows(items):
    """Preference rows: a prompt of up to four titles, a chosen title and two rejected ones."""
    from causaldpo_lib.prompts import prompt_text, response_text

    titles = items["title"].tolist()
    return [
        {
            "prompt": prompt_text([titles[(start + step) % 12] for step in range(1 + start % 4)]),
            "chosen": response_text(titles[(start + 5) % 12]),
            "rejected": [response_text(titles[(start + 7) % 12]), response_text(titles[(start + 8) % 12])],
        }
        for start in range(24)
    ]


def small_model(architecture: str, vocabulary: int):
    """A random model of another architecture, for what must hold for any causal language model."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    configs = {
        "llama": lambda: LlamaConfig(vocab_size=vocabulary, num_key_value_heads=4, **shape),
        "qwen2": lambda: Qwen2Config(vocab_size=vocabulary, num_key_value_heads=2, **shape),
        "qwen3": lambda: Qwen3Config(vocab_size=vocabulary, num_key_value_heads=2, head_dim=8, **shape),
        "gpt2": lambda: GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4),
    }
    return AutoModelForCausalLM.from_config(configs[architecture]())
