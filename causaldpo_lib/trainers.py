"""Trainers on transformers' ``Trainer``: supervised fine-tuning and (Causal)DPO over packed prompts.

Both score responses through ``packing``: the prompt once per example, logits at response positions only, prompts of
similar length together. ``benchmarks/run.py`` measures the ratio to trl's ``SFTTrainer`` and ``DPOTrainer``.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig

from causaldpo_lib.environments import EnvironmentInference
from causaldpo_lib.errors import StudyError, pick
from causaldpo_lib.losses import LogProbs, check_hyperparameters, hyperparameters, preference_loss
from causaldpo_lib.mmd import median_bandwidth, mmd_squared
from causaldpo_lib.packing import PackedBatch, pack, score_dataset, score_responses
from causaldpo_lib.prompts import check_boundary, encode_prompts, encode_responses

Feature = dict[str, Any]


def encode_features(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    response_columns: Sequence[str],
    max_length: int | None = None,
) -> list[Feature]:
    """Rows with string columns ``prompt`` and ``response_columns`` (a string, or a list of strings) as token ids.

    A prompt that with its longest response exceeds ``max_length`` tokens loses its oldest titles.

    Raises:
        StudyError: there is no row, a row lacks a column, or the tokenizer merges prompt and response.
    """
    rows = list(rows)
    if not rows:
        raise StudyError("the training set is empty: no prompt is left to train on")
    for index, row in enumerate(rows):
        if missing := {"prompt", *response_columns} - set(row):
            raise StudyError(f"training row {index} has no column {sorted(missing)[0]!r}: it has {', '.join(row)}")
    groups = [[row[c]] if isinstance(row[c], str) else list(row[c]) for c in response_columns for row in rows]
    check_boundary(tokenizer, rows[0]["prompt"], groups[0][0])
    flat = iter(encode_responses(tokenizer, [response for group in groups for response in group]))
    encoded = [[next(flat) for _ in group] for group in groups]
    count = len(rows)
    longest = max(len(response) for group in encoded for response in group)
    limit = None if max_length is None else max_length - longest
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows], limit)
    return [
        # transformers groups by the length of input_ids, which the prompt dominates.
        {
            "index": i,
            "input_ids": prompts[i],
            "responses": [r for c in range(len(response_columns)) for r in encoded[c * count + i]],
        }
        for i in range(count)
    ]


def _context(model: nn.Module) -> int:
    return model.config.max_position_embeddings


class PackedCollator:
    """Features to a ``PackedBatch`` as a dictionary of tensors (which the trainer moves to its device)."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, features: Sequence[Feature]) -> dict[str, Tensor]:
        batch = pack([f["input_ids"] for f in features], [f["responses"] for f in features], self.pad_id)
        return {"index": torch.tensor([f["index"] for f in features]), **vars(batch)}


class ProgressLines(TrainerCallback):
    """One line per log entry with the time left: readable in a notebook, in a log file and under ``tail -f``."""

    def __init__(self, label: str) -> None:
        self.label = label

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.started = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if "loss" in (logs or {}):
            left = (time.perf_counter() - self.started) * (state.max_steps / max(state.global_step, 1) - 1)
            print(
                f"{self.label}: step {state.global_step} of {state.max_steps}, "
                f"loss {float(logs['loss']):.3f}, {left:.0f} s left",
                flush=True,
            )


class PackedTrainer(Trainer):
    """What both trainers share: packed batches, and extra numbers in the log."""

    def __init__(self, args: TrainingArguments, label: str, **kwargs: Any) -> None:
        args.remove_unused_columns = False  # the collator, not the model's signature, reads the features
        args._n_gpu = min(args.n_gpu, 1)  # one process, one GPU: torchrun, not DataParallel, for several
        super().__init__(args=args, **kwargs)
        self.model_accepts_loss_kwargs = False  # compute_loss gives batch means: accumulated batches are averaged
        self._recorded: dict[str, list[float]] = defaultdict(list)
        self.remove_callback(PrinterCallback)
        self.add_callback(ProgressLines(label))

    def record(self, metrics: Mapping[str, float]) -> None:
        """Average ``metrics`` over the steps until the next log entry."""
        for name, value in metrics.items():
            self._recorded[name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs = {**logs, **{name: sum(values) / len(values) for name, values in self._recorded.items()}}
            self._recorded.clear()
        super().log(logs, start_time)

    def table(self) -> list[dict[str, float]]:
        """The log's training entries, one dictionary per logged step."""
        return [
            {name: float(value) for name, value in entry.items() if name != "total_flos"}
            for entry in self.state.log_history
            if "loss" in entry
        ]


class SupervisedTrainer(PackedTrainer):
    """Completion-only cross-entropy: the mean over response tokens of -log pi(token | prompt, earlier tokens).

    The rows have string columns ``prompt`` and ``chosen``.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: Iterable[Mapping[str, Any]],
        processing_class: PreTrainedTokenizerBase,
        label: str = "fine-tuning",
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            train_dataset=encode_features(processing_class, train_dataset, ["chosen"], _context(model)),
            processing_class=processing_class,
            data_collator=PackedCollator(processing_class.pad_token_id),
            label=label,
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs.pop("index")
        scores = score_responses(model, PackedBatch(**inputs))
        loss = -scores.sum_logps.sum() / scores.tokens.sum()
        return (loss, scores) if return_outputs else loss


@dataclass
class CausalDPOConfig(DPOConfig):
    """trl's ``DPOConfig`` (of which ``beta`` and the training arguments are used) with the causal regulariser.

    Attributes:
        loss: a name of ``LOSSES``; ``loss_options`` are its hyper-parameters, ``beta`` included if it has one.
        mmd_weight: lambda of Eq. 10, the weight of the squared MMD of the chosen responses' implicit rewards; 0 is the
            plain preference loss.
        mmd_bandwidth: Gaussian kernel width in reward units; None is the batch's median distance.
        mmd_min_bandwidth: least width of the median rule, in reward units. Training starts with all rewards at 0; the
            penalty's gradient grows like 1 / bandwidth and would drown the preference loss over differences that mean
            nothing (the logistic loss changes over a reward of 1).
        mmd_estimator: ``v``, ``u`` or ``debiased``.
        memberships: ``inferred`` from the reference's prompt states, or ``shuffled`` - the inferred rows dealt to other
            examples once: the same penalty without any information on environments (the decisive control).
        environment_seed: seed of the clustering sample and of the shuffle.
    """

    loss: str = field(default="dpo", metadata={"help": "Name of a preference loss."})
    loss_options: dict | str | None = field(default=None, metadata={"help": "The loss's hyper-parameters."})
    mmd_weight: float = field(default=1.0, metadata={"help": "Weight of the squared MMD between environments."})
    mmd_bandwidth: float | None = field(default=None, metadata={"help": "Kernel bandwidth; None: median distance."})
    mmd_min_bandwidth: float = field(default=0.1, metadata={"help": "Least bandwidth of the median rule."})
    mmd_estimator: str = field(default="v", metadata={"help": "MMD estimator: v, u or debiased."})
    memberships: str = field(default="inferred", metadata={"help": "inferred or shuffled."})
    environment_seed: int = field(default=0, metadata={"help": "Seed of clustering and shuffling."})

    def __post_init__(self) -> None:
        super().__post_init__()
        options = dict(self.loss_options or {})
        check_hyperparameters(self.loss, options)
        self.loss_options = options
        pick(MEMBERSHIPS, self.memberships, "kind of memberships")


def _shuffled(memberships: Tensor, generator: torch.Generator) -> Tensor:
    return memberships[torch.randperm(len(memberships), generator=generator)]


MEMBERSHIPS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "inferred": lambda memberships, generator: memberships,
    "shuffled": _shuffled,
}


class CausalDPOTrainer(PackedTrainer):
    r"""Preference loss plus :math:`\lambda\,\mathrm{MMD}^2` between pseudo-environments (Eq. 10 of arXiv 2603.22335).

    Used like trl's ``DPOTrainer``: rows have string columns ``prompt``, ``chosen`` and ``rejected`` (the last may be a
    list of strings, of the same length in all rows). Before training, one pass of the frozen reference - ``ref_model``,
    or the initial policy - over the training set gives its log-probabilities and the prompt states from which
    environments are inferred; memberships are detached and fixed, so no gradient can flatten them. The penalised output
    is the implicit reward of the chosen response, :math:`s_i = \beta h_w` (the reference-free score where a loss has no
    reference is not implemented).

    After training, ``memberships`` (N, K), ``environments`` and ``diagnostics`` describe the environments used.
    """

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None = None,
        args: CausalDPOConfig | None = None,
        train_dataset: Iterable[Mapping[str, Any]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        label: str = "alignment",
    ) -> None:
        args = CausalDPOConfig(output_dir="results/trainer") if args is None else args
        limit = min(args.max_length or _context(model), _context(model))
        features = encode_features(processing_class, train_dataset, ["chosen", "rejected"], limit)
        if len({len(feature["responses"]) for feature in features}) > 1:
            raise StudyError("rows have different numbers of rejected responses: give every row the same number")
        super().__init__(
            model=model,
            args=args,
            train_dataset=features,
            processing_class=processing_class,
            data_collator=PackedCollator(processing_class.pad_token_id),
            label=label,
        )
        self.loss_options = dict(args.loss_options)
        if "beta" in hyperparameters(args.loss):
            self.loss_options.setdefault("beta", args.beta)
        self.beta = float(self.loss_options.get("beta", args.beta))
        reference = self.model if ref_model is None else ref_model.to(self.args.device)
        with self.compute_loss_context_manager():
            scores = score_dataset(
                reference,
                [feature["input_ids"] for feature in features],
                [feature["responses"] for feature in features],
                processing_class.pad_token_id,
                2 * self.args.per_device_train_batch_size,
            )
        self.reference_logps = scores.sum_logps
        self.environments = EnvironmentInference(seed=args.environment_seed).fit(scores.prompt_states)
        inferred = self.environments.memberships(scores.prompt_states)
        generator = torch.Generator().manual_seed(args.environment_seed)
        self.memberships = MEMBERSHIPS[args.memberships](inferred, generator)
        self.diagnostics = self.environments.diagnostics(self.memberships)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        index = inputs.pop("index").cpu()
        scores = score_responses(model, PackedBatch(**inputs))
        policy = scores.sum_logps
        reference = self.reference_logps[index].to(policy.device)
        log_probs = LogProbs(
            chosen=policy[:, 0],
            rejected=policy[:, 1:],
            ref_chosen=reference[:, 0],
            ref_rejected=reference[:, 1:],
            chosen_tokens=scores.tokens[:, 0],
            rejected_tokens=scores.tokens[:, 1:],
        )
        preference, metrics = preference_loss(self.args.loss, log_probs, **self.loss_options)
        rewards = self.beta * log_probs.log_ratios()[0]
        memberships = self.memberships[index].to(policy.device)
        bandwidth = self.args.mmd_bandwidth or median_bandwidth(rewards).clamp_min(self.args.mmd_min_bandwidth)
        penalty = mmd_squared(rewards, memberships, bandwidth, self.args.mmd_estimator)
        debiased = mmd_squared(rewards.detach(), memberships, bandwidth, "debiased")
        # lambda = 0 keeps the penalty in the log and out of the graph: the gradient is then exactly the loss's own.
        loss = preference + self.args.mmd_weight * penalty if self.args.mmd_weight else preference
        self.record(
            {"preference_loss": preference.item(), "mmd2": penalty.item(), "mmd2_debiased": debiased.item(), **metrics}
        )
        return (loss, scores) if return_outputs else loss
