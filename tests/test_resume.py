"""A killed training goes on: to the same weights and log entries, from checkpoints that are whole or not there."""

import math
import multiprocessing
import time

import pytest
import torch
from conftest import TITLES
from transformers import TrainerCallback, TrainingArguments

from causaldpo_lib.backbone import tiny_backbone, with_lora
from causaldpo_lib.checkpoints import damage, latest_checkpoint
from causaldpo_lib.errors import StudyError
from causaldpo_lib.prompts import prompt_text, response_text
from causaldpo_lib.trainers import CausalDPOConfig, CausalDPOTrainer, SupervisedTrainer

# Checkpoints fall between log entries, and epochs end between both.
SHARED = {
    "per_device_train_batch_size": 4,
    "max_steps": 16,
    "logging_steps": 3,
    "save_steps": 2,
    "save_total_limit": 3,
    "learning_rate": 1e-3,
    "seed": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}
# Between them they hold everything that a training carries from step to step.
KINDS = {
    "beta_dpo": {"loss": "beta_dpo", "tokens_per_environment": 2},
    "batch": {
        "memberships": "batch",
        "membership_gradient": "paper",
        "per_device_train_batch_size": 10,
        "gradient_accumulation_steps": 2,
    },
    "sft": {"train_sampling_strategy": "group_by_length"},
}


def rows(count=26):
    return [
        {
            # Two kinds of histories, so that there are clusters to be found in a batch, of different lengths.
            "prompt": prompt_text([TITLES[7 * (start % 2)]] * (5 + start % 2) + [TITLES[start % 12]]),
            "chosen": response_text(TITLES[(start + 5) % 12]),
            "rejected": [response_text(TITLES[(start + 7 + step) % 12]) for step in range(1 + start % 2)],
        }
        for start in range(count)
    ]


def trainer(folder, kind):
    torch.set_num_threads(1)
    model, tokenizer = tiny_backbone(TITLES, seed=0)
    if kind == "sft":
        return SupervisedTrainer(model, TrainingArguments(str(folder), **SHARED | KINDS[kind]), rows(), tokenizer)
    args = CausalDPOConfig(str(folder), bf16=False, activation_checkpointing=False, **SHARED | KINDS[kind])
    return CausalDPOTrainer(model, args=args, train_dataset=rows(), processing_class=tokenizer)


class Tell(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        self.step.value = state.global_step


def run(folder, kind, step, result):
    """In a process of its own: train from the latest checkpoint on, and save what came of it."""
    import warnings

    warnings.simplefilter("ignore")  # batches of one environment
    made = trainer(folder, kind)
    made.add_callback(Tell(step))
    before = {name: tensor.clone() for name, tensor in made.own_state()[1].items()}
    made.train(resume_from_checkpoint="latest")
    log = [{k: v for k, v in entry.items() if k != "prompts_per_second"} for entry in made.table()]
    values, tensors = made.own_state()
    found = {"model": made.model.state_dict(), "own": tensors, "before": before, "log": log, "values": values}
    torch.save(found, result)


@pytest.fixture(scope="module")
def processes():
    """Processes that start in milliseconds: forked from a server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["causaldpo_lib.trainers", "test_resume"])
    return context


def finished(context, folder, kind, kills=()):
    """What a training ends in that was killed a moment after each of these steps, and started again."""
    result = folder.parent / f"{folder.name}.pt"
    for kill in [*kills, None]:
        step = context.Value("i", 0)
        process = context.Process(target=run, args=(folder, kind, step, result))
        process.start()
        while process.is_alive() and (kill is None or step.value < kill[0]):
            time.sleep(0.002)
        if kill is not None:
            time.sleep(kill[1])
            process.kill()
        process.join()
        assert kill is not None or process.exitcode == 0
    return torch.load(result, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_is_bit_for_bit_the_same(kind, tmp_path, processes):
    generator = torch.Generator().manual_seed(len(kind))
    # In the middle of a step, of a log entry and - the longer waits - of a checkpoint that is being written.
    steps = sorted((torch.randperm(13, generator=generator)[:3] + 2).tolist())
    kills = [(step, 0.03 * float(torch.rand((), generator=generator))) for step in steps]
    whole = finished(processes, tmp_path / "whole", kind)
    pieces = finished(processes, tmp_path / "pieces", kind, kills)
    assert [entry["step"] for entry in whole["log"]] == [3, 6, 9, 12, 15]
    assert pieces["log"] == whole["log"] and pieces["values"] == whole["values"]
    for part in ("model", "own"):
        assert pieces[part].keys() == whole[part].keys()
        assert all(torch.equal(pieces[part][name], tensor) for name, tensor in whole[part].items())
    assert not any(torch.equal(whole["own"][name], tensor) for name, tensor in whole["before"].items())  # g has learned
    assert len(list((tmp_path / "pieces").glob("checkpoint-*"))) == 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    made = trainer(folder, "beta_dpo")
    made.args.max_steps = 4
    made.train()
    return folder


def test_a_trained_adapter_is_resumed_against_the_reference_that_it_began_with(tmp_path):
    def begin(folder, steps):
        torch.set_num_threads(1)
        model, tokenizer = tiny_backbone(TITLES, seed=0)
        torch.manual_seed(3)
        model = with_lora(model, rank=2)
        with torch.no_grad():
            for name, weights in model.named_parameters():
                if "lora_B" in name:
                    weights += 0.05
        options = {**SHARED, "max_steps": steps, "lr_scheduler_type": "constant", "bf16": False}
        args = CausalDPOConfig(str(folder), activation_checkpointing=False, **options)
        return CausalDPOTrainer(model, args=args, train_dataset=rows(), processing_class=tokenizer)

    whole, half = begin(tmp_path / "whole", 4), begin(tmp_path / "pieces", 2)
    started = whole.compute_loss(whole.model, whole.data_collator(whole.train_dataset[:4])).item()
    assert started == pytest.approx(math.log(2), abs=1e-5)  # the adapter is part of the reference
    whole.train()
    half.train()
    resumed = begin(tmp_path / "pieces", 4)
    resumed.train(resume_from_checkpoint="latest")
    assert resumed.resumed_from.name == "checkpoint-2"
    assert torch.equal(resumed.reference_logps, whole.reference_logps)
    ended = whole.model.state_dict()
    assert all(torch.equal(weights, ended[name]) for name, weights in resumed.model.state_dict().items())


def test_checkpoints_need_no_unpickling(trained):
    checkpoint = trained / "checkpoint-4"
    files = {path.name for path in checkpoint.iterdir()}
    assert files >= {"model.safetensors", "study.safetensors", "study_state.json", "trainer_state.json"}
    pickles = {name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))}
    assert pickles == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.load(checkpoint / name, weights_only=True)
    from transformers.trainer_pt_utils import safe_globals

    with safe_globals():  # numpy's arrays, as transformers reads them
        assert "python" in torch.load(checkpoint / "rng_state.pth", weights_only=True)
    assert not (trained / "checkpoint.unfinished").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "complete.json", "trainer_state.json"])
def test_a_truncated_checkpoint_is_passed_over(name, trained, capsys):
    file = trained / "checkpoint-4" / name
    content = file.read_bytes()
    try:
        file.write_bytes(content[: len(content) // 2])
        assert latest_checkpoint(trained) == trained / "checkpoint-2"
        said = capsys.readouterr().out
        assert "checkpoint-4 is damaged" in said and name in said
        with pytest.raises(StudyError, match=r"checkpoint-4 cannot be resumed from, .*" + name):
            trainer(trained, "beta_dpo").train(resume_from_checkpoint=trained / "checkpoint-4")
    finally:
        file.write_bytes(content)
    assert latest_checkpoint(trained) == trained / "checkpoint-4"


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\x9d", b"[]", b"5", b'{"model.safetensors": "many"}'])
def test_a_manifest_of_rubbish_is_damage(content, tmp_path, capsys):
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "complete.json").write_bytes(b"{}" if step == 2 else content)
    assert damage(tmp_path / "checkpoint-4") == "it has no readable complete.json"
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert "checkpoint-4 is damaged" in capsys.readouterr().out


def test_a_checkpoint_has_its_name_only_when_it_is_whole(trained, tmp_path, monkeypatch):
    """Cut off at any file: what was there before is what is found."""
    made = trainer(tmp_path, "beta_dpo")
    made.args.max_steps = 2
    made.train()

    def cut(*args, **kwargs):
        raise KeyboardInterrupt

    for target in ("_save_rng_state", "_save_own_state"):
        again = trainer(tmp_path, "beta_dpo")
        again.args.max_steps = 4
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(again, target, cut)
            again.train(resume_from_checkpoint="latest")
        assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert damage(tmp_path / "checkpoint-2") is None


def test_nothing_to_resume_from(tmp_path):
    made = trainer(tmp_path / "a", "sft")
    with pytest.raises(StudyError, match="no complete checkpoint"):
        made.train(resume_from_checkpoint=True)
    assert latest_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "a" / "checkpoint-3").mkdir(parents=True)
    assert latest_checkpoint(tmp_path / "a") is None
