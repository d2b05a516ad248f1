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


def execute(stage, folder, **overrides):
    """Run a stage's own function in ``folder``, its parameters the notebook's defaults under ``overrides``."""
    from causaldpo_lib import pipeline, stages

    return stages.execute(stage, pipeline.resolve(stage, {"run": str(folder), **overrides}))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder for the runs of one file's stages, on one thread."""
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run_notebook(tmp_path, monkeypatch):
    """Run the code cells of a reading notebook with other parameters, its figures in ``tmp_path / "figures"``.

    Returns the declared parameters, the stems of its images, and everything that it displayed. Each image has its
    csv, no text holds an undefined number, and no figure is left open: what holds for every notebook is checked here.
    """

    def run(name, **parameters):
        import json
        import re

        import matplotlib.pyplot as plt

        from causaldpo_lib import plots
        from causaldpo_lib.paths import NOTEBOOKS

        shown, folder = [], tmp_path / "figures"
        monkeypatch.setattr("IPython.display.display", lambda *things: shown.extend(things))
        monkeypatch.setattr(plots, "DPI", 30)
        monkeypatch.chdir(tmp_path)
        cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text("utf8"))["cells"]
        declared, *codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        space: dict[str, object] = {}
        exec(declared, space)
        defaults = {key: value for key, value in space.items() if not key.startswith("__")}
        assert parameters.keys() <= defaults.keys() and defaults["figures"] == ""
        space |= parameters | {"figures": str(folder)}
        for code in codes:
            exec(code, space)
        images = {path.stem for path in folder.glob("*.png")}
        assert images == {path.stem for path in folder.glob("*.csv")}
        texts = [thing.data for thing in shown if isinstance(getattr(thing, "data", None), str)]
        assert not [text for text in texts if re.search(r"\bnan\b|\bNone\b", text)]
        assert not plt.get_fignums()  # each figure is shown once, where the notebook says so
        return defaults, images, shown

    return run


@pytest.fixture
def written(tmp_path):
    """Write tables as csv and return their folder."""

    def write(tables):
        for name, table in tables.items():
            table.to_csv(tmp_path / f"{name}.csv", index=False)
        return str(tmp_path)

    return write
