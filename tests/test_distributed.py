"""Two gloo processes under torchrun compute what one process computes on the global batch.

This file is also the program that both run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TITLES
from transformers import set_seed

from causaldpo_lib.backbone import tiny_backbone
from causaldpo_lib.prompts import prompt_text, response_text
from causaldpo_lib.trainers import CausalDPOConfig, CausalDPOTrainer

LOGGED = ("loss", "grad_norm", "preference_loss", "mmd2", "mmd2_debiased", "margin", "chosen_logp", "margin_2")
# What processes exchange differs: rewards alone; the prompts' states, with gradients; the responses' states.
KINDS = {
    "reward": {"reference_cache": "cache"},
    "batch": {"memberships": "batch", "membership_gradient": "paper", "mmd_weight": 3.0},
    "hidden": {"output": "hidden", "mmd_weight": 3.0},
}
# The order of rows that several processes resume: transformers' own, and this library's.
ORDERS = {"random": {}, "grouped": {"train_sampling_strategy": "group_by_length"}}


def rows():
    """Prompts and numbers of rejected responses that differ between the processes' shares."""
    return [
        {
            # Two kinds of histories, so that there are clusters to be found in a batch, of different lengths.
            "prompt": prompt_text([TITLES[7 * (start % 2)]] * (5 + start % 2) + [TITLES[start % 12]]),
            "chosen": response_text(TITLES[(start + 5) % 12]),
            "rejected": [response_text(TITLES[(start + 7 + step) % 12]) for step in range(1 + start % 3)],
        }
        for start in range(48)
    ]


def trained(folder: Path, kind: str, per_device: int, steps: int = 3, resume: str | None = None) -> dict:
    """Steps of plain gradient descent: the weights' change is the sum of the gradients."""
    torch.set_num_threads(1)
    set_seed(0)
    model, tokenizer = tiny_backbone(TITLES, seed=0)
    options = {**(KINDS | ORDERS)[kind]}
    if "reference_cache" in options:
        options["reference_cache"] = str(folder / "cache")
    args = CausalDPOConfig(
        str(folder),
        per_device_train_batch_size=per_device,
        max_steps=steps,
        logging_steps=1,
        optim="sgd",
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        seed=3,
        save_strategy="steps",
        save_steps=4,  # in the second epoch
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        dataloader_pin_memory=False,
        loss_options={"beta": 1.0},
        **options,
    )
    trainer = CausalDPOTrainer(model, args=args, train_dataset=rows(), processing_class=tokenizer)
    trainer.train(resume_from_checkpoint=resume)
    weights = {**trainer.model.state_dict(), **trainer.own_state()[1]}
    return {
        "world": args.world_size,
        "log": [{name: entry[name] for name in LOGGED} for entry in trainer.table()],
        "memberships": trainer.memberships,
        "weights": {name: tensor.clone() for name, tensor in weights.items()},
    }


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, str(folder)], env=environment, capture_output=True, text=True, timeout=240, start_new_session=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:DBSCAN found")  # in some of the batches
@pytest.mark.parametrize("kind", KINDS)
def test_equals_one_process_on_the_global_batch(kind, two_processes, tmp_path):
    both = [torch.load(two_processes / f"{kind}-{rank}.pt", weights_only=True) for rank in (0, 1)]
    one = trained(tmp_path, kind, per_device=16)
    assert [part["world"] for part in both] == [2, 2] and one["world"] == 1
    assert both[0]["log"] == both[1]["log"]  # one loss, one MMD, one log
    assert max(entry["mmd2"] for entry in one["log"]) > 1e-4
    for entry, expected in zip(both[0]["log"], one["log"], strict=True):
        assert entry == pytest.approx(expected, rel=2e-3, abs=1e-5)
    torch.testing.assert_close(both[0]["memberships"], one["memberships"], atol=1e-4, rtol=1e-3)
    for name, tensor in one["weights"].items():
        assert torch.equal(both[0]["weights"][name], both[1]["weights"][name]), name
        torch.testing.assert_close(both[0]["weights"][name], tensor, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("kind", ORDERS)
def test_a_resumed_epoch_goes_on_in_both_processes(kind, two_processes):
    files = [two_processes / f"{kind}-{part}-0.pt" for part in ("whole", "resumed")]
    whole, resumed = (torch.load(file, weights_only=True) for file in files)
    assert resumed["log"] == whole["log"] and len(whole["log"]) == 6
    assert all(torch.equal(resumed["weights"][name], tensor) for name, tensor in whole["weights"].items())


def test_both_processes_shared_one_reference_cache(two_processes):
    assert len(list((two_processes / "reward" / "cache").glob("*.safetensors"))) == 1


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for name in KINDS:
        content = trained(target / name, name, per_device=8)
        torch.save(content, target / f"{name}-{os.environ['RANK']}.pt")
    for name in ORDERS:
        folder = target / name
        for part, resume in (("whole", None), ("resumed", str(folder / "checkpoint-4"))):
            content = trained(folder, name, per_device=8, steps=6, resume=resume)
            torch.save(content, target / f"{name}-{part}-{os.environ['RANK']}.pt")
