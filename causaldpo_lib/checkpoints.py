"""What a training leaves on disk to go on from: checkpoints that are whole or not there, and cached reference scores.

A checkpoint is written beside the others, listed file by file in ``complete.json``, flushed, and only then renamed to
``checkpoint-<step>``; older ones go after that. Killed at any moment, a training so finds its last checkpoint, and
continues to the same weights and log entries, bit for bit on a CPU. Nothing in it needs unpickling: weights are
safetensors, the rest JSON or files that transformers reads with ``weights_only``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from causaldpo_lib.errors import StudyError
from causaldpo_lib.packing import ResponseScores

MANIFEST = "complete.json"
STATE = "study_state.json"
UNFINISHED = "checkpoint.unfinished"


def damage(checkpoint: Path) -> str | None:
    """Why ``checkpoint`` cannot be resumed from, or None."""
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not JSON, or no text at all
        sizes = None
    if not isinstance(sizes, dict) or not all(isinstance(size, int) for size in sizes.values()):
        return f"it has no readable {MANIFEST}"
    for name, size in sizes.items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else 0
        if found != size:
            return f"{name} has {found:,} of {size:,} bytes"
    return None


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete ``checkpoint-<step>`` of ``folder``, or None; says which damaged ones it passes over."""
    steps = {
        int(found[1]): path
        for path in Path(folder).glob("checkpoint-*")
        if (found := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    for step in sorted(steps, reverse=True):
        reason = damage(steps[step])
        if reason is None:
            return steps[step]
        print(f"{steps[step].name} is damaged ({reason}): looking for the one before", flush=True)
    return None


class _Restore(TrainerCallback):
    """Sets the trainer's own state once transformers has reset it, and the order of an epoch's rows."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        if self.trainer.resumed_from is not None:
            self.trainer._restore(self.trainer.resumed_from)

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs) -> None:
        # With several processes, the sampler of a resumed epoch lies deeper than transformers and accelerate look for
        # it: one that orders rows by the epoch's number would deal out the first epoch again.
        inner = train_dataloader
        while getattr(inner, "batch_sampler", None) is not None:
            inner = inner.batch_sampler
        if hasattr(getattr(inner, "sampler", None), "set_epoch"):
            inner.sampler.set_epoch(int(state.epoch or 0))


class ResumableTrainer(Trainer):
    """transformers' ``Trainer`` with atomic checkpoints that also hold the sums of the log entry under way."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.resumed_from: Path | None = None
        self._staging: Path | None = None
        self.add_callback(_Restore(self))

    def own_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a subclass adds to a checkpoint: JSON values, and tensors."""
        return {}, {}

    def load_own_state(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take back what ``own_state`` gave."""

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs: Any):
        """``Trainer.train``; "latest" (or True) resumes from the newest complete checkpoint of ``output_dir``.

        Without any, "latest" starts at the beginning: the same command starts and restarts a training.

        Raises:
            StudyError: a checkpoint is named and damaged, or True is given and none is there.
        """
        found = None
        if resume_from_checkpoint in ("latest", True):
            found = latest_checkpoint(self.args.output_dir)
            if found is None and resume_from_checkpoint is True:
                raise StudyError(f"{self.args.output_dir} has no complete checkpoint to resume from: start without")
        elif resume_from_checkpoint:
            found = Path(resume_from_checkpoint)
            if (reason := damage(found)) is not None:
                raise StudyError(f"{found} cannot be resumed from, {reason}: name another or use 'latest'")
        self.resumed_from = found
        return super().train(resume_from_checkpoint=None if found is None else str(found), **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(super()._get_output_dir(trial))
        staging, name = folder / UNFINISHED, f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._save_own_state(staging / name)
            (staging / name / "training_args.bin").unlink(missing_ok=True)  # a pickle, and nobody reads it
            _publish(staging / name, folder / name)
            staging.rmdir()
            rotate_checkpoints(str(folder), self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()

    def _save_own_state(self, checkpoint: Path) -> None:
        values, tensors = self.own_state()
        values["log_entry"] = [self._tr_loss.item(), self._total_loss_scalar, self._globalstep_last_logged]
        (checkpoint / STATE).write_text(json.dumps(values) + "\n", encoding="utf-8")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, checkpoint / "study.safetensors")

    def _restore(self, checkpoint: Path) -> None:
        values = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        loss, self._total_loss_scalar, self._globalstep_last_logged = values.pop("log_entry")
        self._tr_loss = torch.full_like(self._tr_loss, loss)
        with safe_open(checkpoint / "study.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file, no mapping)
        self.load_own_state(values, tensors)


def _publish(written: Path, final: Path) -> None:
    """List and flush what is written, then give it its name."""
    files = sorted(path for path in written.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(written)): path.stat().st_size for path in files}
    manifest = written / MANIFEST
    manifest.write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    for path in [*files, manifest]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if final.exists():  # of an earlier run in this folder
        shutil.rmtree(final)
    os.replace(written, final)


def scores_digest(
    model: nn.Module, prompts: Sequence[Sequence[int]], responses: Sequence[Any], precision: str, skip: str | None
) -> str:
    """sha256 of what reference scores depend on: weights (but for names with ``skip`` in them), tokens, precision."""
    found = hashlib.sha256(json.dumps([precision, prompts, responses]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if skip is None or skip not in name:
            tensor = tensor.detach().cpu().contiguous()
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def save_scores(scores: ResponseScores, folder: Path, digest: str) -> None:
    """Write scores as ``<folder>/<digest>.safetensors``, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in vars(scores).items() if tensor is not None}
    temporary = folder / f"{digest}.{os.getpid()}.unfinished"
    save_file(tensors, temporary, metadata={"digest": digest, "content": _content(tensors)})
    os.replace(temporary, folder / f"{digest}.safetensors")


def load_scores(folder: Path, digest: str) -> ResponseScores | None:
    """Read them back; None where there are none, or where the file is damaged, which is said."""
    path = folder / f"{digest}.safetensors"
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file, no mapping)
            content = (file.metadata() or {}).get("content")
        if content == _content(tensors) and set(tensors) <= {field.name for field in fields(ResponseScores)}:
            return ResponseScores(**tensors)
        reason = "its content does not fit its checksum"
    except (SafetensorError, OSError, TypeError) as error:
        reason = str(error).splitlines()[0]
    print(f"the cached reference scores {path} are damaged ({reason}): computing them again", flush=True)
    return None


def _content(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()
