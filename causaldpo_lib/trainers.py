"""Trainers on transformers' ``Trainer``: supervised fine-tuning and (Causal)DPO over packed prompts.

Both score responses through ``packing``: the prompt once per example, no padding, logits at response positions only.
``benchmarks/training.py`` measures the ratio to trl's ``SFTTrainer`` and ``DPOTrainer``.

Several processes (``torchrun --nproc_per_node N``) compute one loss: log-probabilities, memberships and outputs of all
are gathered with their gradients, so that loss, MMD and kernel width are those of the global batch. Where the rows do
not fill the last batch, accelerate starts again from the epoch's first ones, which then count twice. Accumulated
micro-batches are different: each has its own MMD (of its own examples), and these are averaged.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, distributed, nn
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_pt_utils import get_length_grouped_indices
from trl import DPOConfig
from trl.trainer.utils import disable_dropout_in_model

from causaldpo_lib.causal import Backdoor, Regulariser, add_environment_tokens, causal_loss, draw_environments
from causaldpo_lib.checkpoints import ResumableTrainer, latest_checkpoint, load_scores, save_scores, scores_digest
from causaldpo_lib.environments import GRADIENTS, MEMBERSHIPS, BatchEnvironments
from causaldpo_lib.errors import StudyError, pick
from causaldpo_lib.losses import BetaState, LogProbs, check_hyperparameters, hyperparameters
from causaldpo_lib.packing import (
    PackedBatch,
    ResponseScores,
    can_pack,
    context_of,
    pack,
    prepend,
    score_dataset,
    score_responses,
)
from causaldpo_lib.prompts import check_boundary, encode_prompts, encode_responses

Feature = dict[str, Any]
# A preference loss starts near 1; what it has become at this value, in nats, no further step repairs.
EXPLODED = 1e6
# Soft prompts take steps so many times as large as the weights do: at the weights' own rate they stay where they began.
PROMPT_RATE = 100.0


def training_rows(dataset: Iterable[Mapping[str, Any]] | None) -> list[Mapping[str, Any]]:
    """The rows of a training set.

    Raises:
        StudyError: it is a table of columns, there is no row, or one is no dictionary.
    """
    if isinstance(dataset, pd.DataFrame):
        raise StudyError("the training set is a DataFrame: give its rows as dictionaries, frame.to_dict('records')")
    rows = [] if dataset is None else list(dataset)
    if not rows:
        raise StudyError("the training set is empty: no prompt is left to train on")
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise StudyError(f"training row {index} is {row!r:.60}: give a dictionary of its columns")
    return rows


def _no_text(index: int, column: str, value: object) -> StudyError:
    """What is wrong with a value that should be a text, or a list of texts."""
    first = value[0] if isinstance(value, list | tuple) and value else value
    if isinstance(first, Mapping):
        return StudyError(
            f"training row {index} has messages in column {column!r}: write them as one text, such as by the "
            "tokenizer's apply_chat_template"
        )
    return StudyError(f"training row {index} has {value!r:.60} in column {column!r}: give it a text, or drop the row")


def _responses(index: int, column: str, value: object) -> list[str]:
    """A row's responses in ``column``, one or several.

    Raises:
        StudyError: there is none, or one is no text.
    """
    # The keys of a dictionary are texts as well, and no responses.
    several = isinstance(value, Iterable) and not isinstance(value, str | Mapping)
    texts = list(value) if several else [value]
    if not texts:
        raise StudyError(f"training row {index} has no response in column {column!r}: give it one, or drop the row")
    for text in texts:
        if not isinstance(text, str):
            raise _no_text(index, column, text)
    return texts


def encode_features(
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Mapping[str, Any]],
    response_columns: Sequence[str],
    max_length: int | None = None,
) -> list[Feature]:
    """Rows with string columns ``prompt`` and ``response_columns`` (a string, or a list of strings) as token ids.

    A prompt that with the longest response of all rows exceeds ``max_length`` tokens loses its oldest titles. Not with
    its own: a history is then cut alike whatever it is answered with, as it is for ranking, which leaves room for the
    longest title.

    Raises:
        StudyError: there is no row, a row lacks a column, a text or a response, the tokenizer merges prompt and
            response, or a prompt does not fit.
    """
    rows = training_rows(rows)
    for index, row in enumerate(rows):
        if missing := {"prompt", *response_columns} - set(row):
            raise StudyError(f"training row {index} has no column {sorted(missing)[0]!r}: it has {', '.join(row)}")
        if not isinstance(row["prompt"], str):
            raise _no_text(index, "prompt", row["prompt"])
    groups = [_responses(index, c, row[c]) for c in response_columns for index, row in enumerate(rows)]
    check_boundary(tokenizer, rows[0]["prompt"], groups[0][0])
    flat = iter(encode_responses(tokenizer, [response for group in groups for response in group]))
    encoded = [[next(flat) for _ in group] for group in groups]
    count = len(rows)
    sizes = [max(map(len, group)) for group in encoded]
    widest = max(range(len(sizes)), key=sizes.__getitem__)
    limit = None if max_length is None else max_length - sizes[widest]
    longest = f"the longest response, the {sizes[widest]} tokens of training row {widest % count}"
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows], limit, longest)
    return [
        # transformers groups by the length of input_ids, which the prompt dominates.
        {
            "index": i,
            "input_ids": prompts[i],
            "responses": [r for c in range(len(response_columns)) for r in encoded[c * count + i]],
        }
        for i in range(count)
    ]


def _loaded(model: object, processing_class: object, name: str = "model") -> None:
    """Refuse what a trainer cannot begin with.

    Raises:
        StudyError: the model is not loaded, or there is no tokenizer that closes and pads responses.
    """
    if not isinstance(model, nn.Module):
        raise StudyError(
            f"{name} is {model!r:.60}, not a loaded model: load it with causaldpo_lib.backbone.load_checkpoint, which "
            "gives model and tokenizer"
        )
    if processing_class is None:
        raise StudyError("processing_class is missing: give the model's tokenizer, which load_checkpoint gives with it")
    for token in ("eos_token", "pad_token"):
        if getattr(processing_class, token, None) is None:
            raise StudyError(f"the tokenizer has no {token}: set it, as causaldpo_lib.backbone.load_checkpoint does")


def _numbers(rows: Sequence[Mapping[str, Any]], name: str, most: float) -> Tensor | None:
    """The rows' column ``name`` of numbers from 0 to ``most``, float32 (N,); None where no row has it.

    Raises:
        StudyError: some rows lack it, or a value is no such number.
    """
    count = sum(name in row for row in rows)
    if not count:
        return None
    if count < len(rows):
        raise StudyError(f"{len(rows) - count} of {len(rows)} training rows have no {name}: give all rows one, or none")
    values = []
    for index, row in enumerate(rows):
        try:
            value = float(row[name])
        except (TypeError, ValueError):
            value = math.nan
        if not (math.isfinite(value) and 0 <= value <= most):
            wanted = "of 0 or more" if most == math.inf else f"from 0 to {most:g}"
            raise StudyError(f"training row {index} has {row[name]!r:.60} in column {name!r}: give a number {wanted}")
        values.append(value)
    return torch.tensor(values, dtype=torch.float32)


def _without_dropout(model: nn.Module) -> None:
    """Switch off all dropout of ``model``, for good."""
    disable_dropout_in_model(model)
    for module in model.modules():
        # The layers of Llama and its relatives hold the attention's rate as a number, which trl's function passes over.
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def _adapters(model: nn.Module) -> tuple[list[str], str | None]:
    """What of the adapters in ``model`` its weights do not say, and the names of weights that change nothing.

    A fresh LoRA adapter, all B = 0, is the base model whatever its random A: nothing is to be said of it, and its
    weights, with "lora_" in their names, can be skipped. Of others it matters which are in use, and their scale.
    """
    lora = [(name, weights) for name, weights in model.named_parameters() if "lora_" in name]
    if lora and all(".lora_A." in name or (".lora_B." in name and not weights.any()) for name, weights in lora):
        return [], "lora_"
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    used = [(each.active_adapters, each.disable_adapters, getattr(each, "scaling", None)) for each in layers]
    return list(map(str, used)), None


class PackedCollator:
    """Features to a ``PackedBatch`` of ``count`` responses as a dictionary of tensors (for the trainer's device)."""

    def __init__(self, pad_id: int, count: int) -> None:
        self.pad_id, self.count = pad_id, count

    def __call__(self, features: Sequence[Feature]) -> dict[str, Tensor]:
        batch = pack([f["input_ids"] for f in features], [f["responses"] for f in features], self.pad_id, self.count)
        return {"index": torch.tensor([f["index"] for f in features]), **vars(batch)}


class ProgressLines(TrainerCallback):
    """One line per log entry with the time left: readable in a notebook, in a log file and under ``tail -f``."""

    def __init__(self, label: str) -> None:
        self.label = label

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.started, self.first = time.perf_counter(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if state.is_world_process_zero and "loss" in (logs or {}):
            pace = (time.perf_counter() - self.started) / max(state.global_step - self.first, 1)
            print(
                f"{self.label}: step {state.global_step} of {state.max_steps}, loss {float(logs['loss']):.3f}, "
                f"{pace * (state.max_steps - state.global_step):.0f} s left",
                flush=True,
            )


class FasterRows(TrainerCallback):
    """Multiplies every step of some rows of the embedding by ``rate``, as a learning rate of their own would.

    An optimiser's step of a weight depends on that weight's gradients alone, and is in proportion to the learning rate.
    """

    def __init__(self, rows: Sequence[int], rate: float) -> None:
        self.rows, self.rate = torch.tensor(rows), rate

    def on_step_begin(self, args, state, control, model=None, **kwargs) -> None:
        self.before = self._rows(model).clone()

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        weight = model.get_input_embeddings().weight
        weight[self.rows] = self.before + self.rate * (self._rows(model) - self.before)

    @torch.no_grad()
    def _rows(self, model: nn.Module) -> Tensor:
        return model.get_input_embeddings().weight[self.rows]


class LengthGroupedSampler(Sampler[int]):
    """Batches of similar prompt lengths, drawn from seed and epoch alone, so that a resumed epoch goes on."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        generator = torch.Generator().manual_seed(_seed(self.seed, self.epoch))
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=generator))


def _seed(*parts: int) -> int:
    """One seed from several numbers: what is drawn at a step depends on that step, and on nothing drawn before."""
    return int(np.random.SeedSequence([abs(part) for part in parts]).generate_state(1)[0])


class _Gather(torch.autograd.Function):
    """Rows of all processes, in order of rank; the gradient of a row goes back to the process that owns it.

    Every process computes the same global loss, so a row's gradients add up to N times its own, and the mean over
    processes that DistributedDataParallel takes of the weights' gradients makes that one (methods: data parallelism).
    """

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, rows.contiguous())
        ctx.own = slice(distributed.get_rank() * len(rows), (distributed.get_rank() + 1) * len(rows))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient)
        return gradient[ctx.own]


def gathered(rows: Tensor) -> Tensor:
    """``rows`` (B, ...) of every process, one after the other; as they are where there is one process."""
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    return _Gather.apply(rows) if several else rows


class PackedTrainer(ResumableTrainer):
    """What both trainers share: packed batches, the global loss, more numbers in the log, and a stop when it breaks."""

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        features: list[Feature],
        processing_class: PreTrainedTokenizerBase,
        label: str,
    ) -> None:
        args.remove_unused_columns = False  # the collator, not the model's signature, reads the features
        args._n_gpu = min(args.n_gpu, 1)  # one process, one GPU: torchrun, not DataParallel, for several
        self._recorded: dict[str, list[float]] = defaultdict(list)
        self._prompts, self._since, self._rows = 0, time.perf_counter(), (0, [])
        self.responses = max(len(feature["responses"]) for feature in features)
        super().__init__(
            model=model,
            args=args,
            train_dataset=features,
            processing_class=processing_class,
            data_collator=PackedCollator(processing_class.pad_token_id, self.responses),
        )
        self.model_accepts_loss_kwargs = False  # compute_loss gives batch means: accumulated batches are averaged
        self.remove_callback(PrinterCallback)
        self.add_callback(ProgressLines(label))
        # Found out here, where the model is not wrapped yet, on the longest prompt, which tries its attention most.
        longest = max(features, key=lambda feature: len(feature["input_ids"]))
        batch = pack([longest["input_ids"]], [longest["responses"]], processing_class.pad_token_id)
        can_pack(self.model, batch.to(self.args.device))

    def train(self, *args: Any, **kwargs: Any):
        self._recorded.clear()
        self._prompts, self._since = 0, time.perf_counter()
        return super().train(*args, **kwargs)

    def scores(self, model: nn.Module, inputs: dict[str, Tensor], **options: bool) -> tuple[Tensor, ResponseScores]:
        """Row indices on the CPU and scores of the global batch; ``inputs`` are a collated batch of this process."""
        index = inputs.pop("index")
        scores = score_responses(model, self.prepared(PackedBatch(**inputs), index.cpu()), **options)
        return gathered(index).cpu(), ResponseScores(
            **{name: None if rows is None else gathered(rows) for name, rows in vars(scores).items()}
        )

    def prepared(self, batch: PackedBatch, index: Tensor) -> PackedBatch:
        """The batch as the policy sees it."""
        return batch

    def checked(self, loss: Tensor, index: Tensor) -> Tensor:
        """``loss`` of the rows ``index``.

        Raises:
            StudyError: it is not a number or above ``EXPLODED``.
        """
        step, rows = self._rows
        self._rows = self.state.global_step, index.tolist() + (rows if step == self.state.global_step else [])
        value = loss.item()
        if not abs(value) <= EXPLODED:
            self._stop(f"the loss is {value:g}")
        self._prompts += len(index)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        # A gradient scaler (fp16) meets infinite gradients as a matter of course and skips the step.
        if self.accelerator.scaler is None and not math.isfinite(float(norm)):
            self._stop(f"the gradient's norm is {float(norm):g}")
        return norm

    def _stop(self, what: str) -> None:
        last = latest_checkpoint(self.args.output_dir)
        good = "none was saved (save_strategy)" if last is None else f"{last}"
        raise StudyError(
            f"{what} at step {self.state.global_step + 1}, in a batch of training rows {self._rows[1]}: look at "
            f"these rows, lower learning_rate or max_grad_norm; last good checkpoint: {good}"
        )

    def record(self, metrics: Mapping[str, float]) -> None:
        """Average ``metrics`` over the steps until the next log entry."""
        for name, value in metrics.items():
            self._recorded[name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            now = time.perf_counter()
            logs = {**logs, **{name: sum(values) / len(values) for name, values in self._recorded.items()}}
            logs["prompts_per_second"] = self._prompts / (now - self._since)
            self._recorded.clear()
            self._prompts, self._since = 0, now
        super().log(logs, start_time)

    def table(self) -> list[dict[str, float]]:
        """The log's training entries, one dictionary per logged step."""
        return [
            {name: float(value) for name, value in entry.items() if name != "total_flos"}
            for entry in self.state.log_history
            if "loss" in entry
        ]

    def own_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"recorded": dict(self._recorded)}, {}

    def load_own_state(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self._recorded = defaultdict(list, values["recorded"])
        self._since = time.perf_counter()

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        lengths = [len(feature["input_ids"]) for feature in self.train_dataset]
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(lengths, batch_size, self.args.seed)


class SupervisedTrainer(PackedTrainer):
    r"""Completion-only cross-entropy: the mean over response tokens of -log pi(token | prompt, earlier tokens).

    The rows have string columns ``prompt`` and ``chosen``. With a column ``weight`` in all of them the loss is
    :math:`\frac1B\sum_i w_i \overline{CE}_i`, :math:`\overline{CE}_i` the mean over the tokens of response i.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        train_dataset: Iterable[Mapping[str, Any]],
        processing_class: PreTrainedTokenizerBase,
        label: str = "fine-tuning",
    ) -> None:
        _loaded(model, processing_class)
        rows = training_rows(train_dataset)
        features = encode_features(processing_class, rows, ["chosen"], context_of(model))
        self.weights = _numbers(rows, "weight", math.inf)
        super().__init__(model, args, features, processing_class, label)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        index, scores = self.scores(model, inputs)
        if self.weights is None:
            loss = -scores.sum_logps.sum() / scores.tokens.sum()
        else:
            means = -(scores.sum_logps / scores.tokens)[:, 0]
            loss = (self.weights[index].to(means.device) * means).mean()
        loss = self.checked(loss, index)
        return (loss, scores) if return_outputs else loss


_SMOOTHED = "set loss to 'cdpo', 'rdpo' or 'rose_po', and label_smoothing in loss_options"
_SYNCHRONISED = "begin another training with the trained policy, which is then its reference"
# Options of the objective that trl's DPOTrainer reads and this one does not -> what to do instead.
UNUSED = {
    "loss_type": "name the loss by loss and its hyper-parameters by loss_options",
    "loss_weights": "name one loss by loss, and the weights of its parts by loss_options or nll_weight",
    "label_smoothing": _SMOOTHED,
    "label_smoothing_factor": _SMOOTHED,
    "ld_alpha": "leave it out; the losses 'ipo' and 'simpo' take lengths into account",
    "f_divergence_type": "leave it out; all losses with a reference are those of the reverse KL divergence",
    "f_alpha_divergence_coef": "leave it out; all losses with a reference are those of the reverse KL divergence",
    "use_weighting": "leave it out; the losses 'dr_dpo' and 'beta_dpo' weigh prompts",
    "discopop_tau": "leave it out, and name the loss by loss",
    "sync_ref_model": _SYNCHRONISED,
    "ref_model_mixup_alpha": _SYNCHRONISED,
    "ref_model_sync_steps": _SYNCHRONISED,
    "router_aux_loss_coef": "leave it out; no auxiliary loss of a mixture of experts is added",
    "truncation_mode": "leave it out; a prompt that is too long loses its oldest titles",
}


@dataclass
class CausalDPOConfig(DPOConfig):
    """trl's ``DPOConfig`` with the causal regulariser.

    Of trl's own options ``beta``, ``max_length``, ``disable_dropout`` and the training arguments are used. Those of
    its objective (``UNUSED``) are refused where they are set; how it prepares its data is of no consequence here.

    Attributes:
        beta: of the loss, unless ``loss_options`` name one; None is the loss's own default.
        max_length: tokens of a prompt with the longest response; None is the model's context, as for fine-tuning and
            ranking, so that all stages see the same prompts.
        loss: a name of ``LOSSES``; ``loss_options`` are its hyper-parameters, ``beta`` included if it has one.
        mmd_weight: lambda of Eq. 10, the weight of the penalty; 0 is the plain preference loss.
        mmd_bandwidth, mmd_min_bandwidth, mmd_estimator, mmd_pairs, penalty, output, prior: see ``Regulariser``.
        memberships: a name of ``MEMBERSHIPS``: ``inferred`` from the reference's prompt states, controls such as
            ``shuffled``, ``given`` by the rows' column ``environment``, or ``batch``, anew in every batch from the
            policy's states; then ``membership_gradient`` is ``detached`` or ``paper``.
        tokens_per_environment: length of the soft prompt that conditions the policy on an environment (Eq. 6), drawn
            from the example's memberships at every step, and trained at ``PROMPT_RATE`` times the learning rate; 0 is
            the unconditioned policy.
        environment_seed: seed of clustering, controls and draws.
        nll_weight: weight of the chosen responses' token-mean negative log-likelihood, a stabiliser.
        reference_cache: folder in which the reference's scores are kept and found again; None computes them anew.

    Raises:
        StudyError: an unknown name, an option that would not be used, or options that contradict each other.
    """

    beta: float | None = field(default=None, metadata={"help": "The loss's beta; None: its own default."})
    max_length: int | None = field(default=None, metadata={"help": "Most tokens; None: the model's context."})
    loss: str = field(default="dpo", metadata={"help": "Name of a preference loss."})
    loss_options: dict | str | None = field(default=None, metadata={"help": "The loss's hyper-parameters."})
    mmd_weight: float = field(default=1.0, metadata={"help": "Weight of the penalty on environments' differences."})
    mmd_bandwidth: float | None = field(default=None, metadata={"help": "Kernel bandwidth; None: median distance."})
    mmd_min_bandwidth: float = field(default=0.1, metadata={"help": "Least bandwidth of the median rule."})
    mmd_estimator: str = field(default="v", metadata={"help": "MMD estimator: v, u or debiased."})
    mmd_pairs: str = field(default="mean", metadata={"help": "Reduction over pairs of environments."})
    penalty: str = field(default="mmd", metadata={"help": "Name of a penalty."})
    output: str = field(default="reward", metadata={"help": "What is to be alike in all environments."})
    prior: str = field(default="empirical", metadata={"help": "Environment prior: empirical or uniform."})
    memberships: str = field(default="inferred", metadata={"help": "Kind of memberships."})
    membership_gradient: str = field(default="detached", metadata={"help": "With batch memberships: or paper."})
    tokens_per_environment: int = field(default=0, metadata={"help": "Length of an environment's soft prompt."})
    environment_seed: int = field(default=0, metadata={"help": "Seed of clustering, controls and draws."})
    nll_weight: float = field(default=0.0, metadata={"help": "Weight of the chosen responses' NLL."})
    reference_cache: str | None = field(default=None, metadata={"help": "Folder of cached reference scores."})

    def __post_init__(self) -> None:
        super().__post_init__()
        options = dict(self.loss_options or {})
        check_hyperparameters(self.loss, options)
        self.loss_options = options
        self._refuse_unused()
        pick(MEMBERSHIPS, self.memberships, "kind of memberships")
        pick(GRADIENTS, self.membership_gradient, "membership gradient")
        if self.membership_gradient != "detached" and self.memberships != "batch":
            raise StudyError(
                f"membership_gradient {self.membership_gradient!r} needs memberships that training computes: set "
                "memberships to 'batch', or leave the gradient 'detached'"
            )
        if self.tokens_per_environment and self.memberships == "batch":
            raise StudyError(
                "tokens_per_environment needs environments that keep their identity from batch to batch: choose other "
                "memberships than 'batch'"
            )
        self.regulariser()

    def _refuse_unused(self) -> None:
        """Refuse options that would change nothing, or count twice: a result would be taken for what it is not."""
        for option in fields(DPOConfig):
            if option.name in UNUSED:
                default = option.default_factory() if option.default is MISSING else option.default
                if (value := getattr(self, option.name)) != default:
                    raise StudyError(f"{option.name} = {value!r} has no effect here: {UNUSED[option.name]}")
        known = hyperparameters(self.loss)
        if self.beta is not None and "beta" not in known:
            raise StudyError(
                f"beta = {self.beta} has no effect on loss {self.loss!r}, which has none: leave it out, or set in "
                f"loss_options what it has ({', '.join(known)})"
            )
        if self.nll_weight and "nll_weight" in known:
            raise StudyError(
                f"nll_weight = {self.nll_weight} would be added to the nll_weight that loss {self.loss!r} has itself: "
                "set the one in loss_options instead"
            )

    def regulariser(self) -> Regulariser:
        """The penalty's options as one object, checked."""
        return Regulariser(
            weight=self.mmd_weight,
            penalty=self.penalty,
            output=self.output,
            prior=self.prior,
            estimator=self.mmd_estimator,
            pairs=self.mmd_pairs,
            bandwidth=self.mmd_bandwidth,
            min_bandwidth=self.mmd_min_bandwidth,
        )


class CausalDPOTrainer(PackedTrainer):
    r"""Preference loss plus :math:`\lambda\,\mathrm{MMD}^2` between pseudo-environments (Eq. 10 of arXiv 2603.22335).

    Used like trl's ``DPOTrainer``: rows have string columns ``prompt``, ``chosen`` and ``rejected``, the last may be a
    list of strings, of any length from one. A column ``label_smoothing`` gives each row its own, for losses that have
    that hyper-parameter (RosePO's personalised smoothing). Before training, one pass of the frozen reference over the
    training set gives its log-probabilities and the prompt states from which environments are inferred. It is
    ``ref_model``; else the policy as it is given, adapters included, so that a trained policy starts another round as
    its own reference; a fresh adapter changes nothing yet. A training is therefore resumed with the policy that it
    began with: the checkpoint's weights are loaded by ``train``, after that pass.
    Memberships are detached and fixed, so no gradient can flatten them - but for ``memberships="batch"``, Algorithm 1.

    Not taken are trl's ``peft_config`` (add adapters first, by ``backbone.with_lora`` or peft's ``get_peft_model``)
    and ``eval_dataset`` (rank a validation set instead, or score it by ``packing.score_dataset``).

    ``memberships`` (N, K), ``environments`` (the fitted ``EnvironmentInference``, if any), ``diagnostics`` and
    ``backdoor`` (the soft prompts, if any; save it beside the checkpoint) describe the environments used.
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
        _loaded(model, processing_class)
        if ref_model is not None:
            _loaded(ref_model, processing_class, "ref_model")
        args = CausalDPOConfig(output_dir="results/trainer") if args is None else args
        if args.disable_dropout:
            _without_dropout(model)
        limit = min(args.max_length or context_of(model), context_of(model)) - args.tokens_per_environment
        rows = training_rows(train_dataset)
        features = encode_features(processing_class, rows, ["chosen", "rejected"], limit)
        self.loss_options = dict(args.loss_options)
        if args.beta is not None:
            self.loss_options.setdefault("beta", args.beta)
        self.smoothing = _smoothing(rows, args.loss, self.loss_options)
        super().__init__(model, args, features, processing_class, label)
        self.regulariser = args.regulariser()
        self.beta_state = BetaState()
        self.ragged = len({len(feature["responses"]) for feature in features}) > 1

        reference = self._reference_scores(ref_model)
        self.reference_logps = reference.sum_logps
        labels = [row.get("environment") for row in rows] if args.memberships == "given" else None
        found = MEMBERSHIPS[args.memberships](reference.prompt_states, labels, args.environment_seed)
        self.memberships, self.diagnostics, self.environments = found.rows, found.diagnostics, found.inference
        self.batch_environments: BatchEnvironments | None = None
        if args.memberships == "batch":
            self.batch_environments = BatchEnvironments(
                reference.prompt_states.shape[1], gradient=args.membership_gradient, seed=args.environment_seed
            ).to(self.args.device)
        self.backdoor: Backdoor | None = None
        if args.tokens_per_environment:
            prior = self.memberships.double().mean(0)
            count, seed = len(prior), args.environment_seed
            tokens = add_environment_tokens(model, processing_class, count, args.tokens_per_environment, seed)
            self.backdoor = Backdoor(tokens, (prior / prior.sum()).tolist())
            self.add_callback(FasterRows([i for ids in tokens for i in ids], PROMPT_RATE))

    def _reference_scores(self, ref_model: nn.Module | None) -> ResponseScores:
        """From the cache or computed, every process a share of the rows; the first one writes."""
        reference = self.model if ref_model is None else ref_model.to(self.args.device)
        prompts, responses = ([f[name] for f in self.train_dataset] for name in ("input_ids", "responses"))
        rank, world = self.args.process_index, self.args.world_size
        folder = None if self.args.reference_cache is None else Path(self.args.reference_cache)
        box: list[Any] = [None]
        if folder is not None and rank == 0:
            # The context is part of the precision: scores in float32 are no reference of a policy under autocast.
            precision = f"autocast {self.accelerator.mixed_precision}"
            adapters, skip = _adapters(reference)
            digest = scores_digest(reference, prompts, responses, " ".join([precision, *adapters]), skip)
            box = [load_scores(folder, digest)]
        if world > 1:
            distributed.broadcast_object_list(box)
        if box[0] is not None:
            return box[0]
        # The policy's forward pass is under autocast from training on; here no model is prepared for it yet.
        with self.accelerator.autocast():
            scores = score_dataset(
                reference,
                prompts[rank::world],
                responses[rank::world],
                self.processing_class.pad_token_id,
                2 * self.args.per_device_train_batch_size,
                self.responses,
            )
        if world > 1:
            scores = _interleaved(scores, world)
        if folder is not None and rank == 0:
            save_scores(scores, folder, digest)
        return scores

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        super().create_optimizer(model)
        if fresh and self._learns_environments:
            self.optimizer.add_param_group({"params": list(self.batch_environments.parameters()), "weight_decay": 0.0})
        return self.optimizer

    @property
    def _learns_environments(self) -> bool:
        return self.args.membership_gradient == "paper"

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        # The training loop clears the gradients of the model, which this one is no part of.
        trained = (weights for weights in model.parameters() if weights.requires_grad)
        if self._learns_environments and all(weights.grad is None for weights in trained):
            self.batch_environments.zero_grad()
        return super().training_step(model, inputs, num_items_in_batch)

    def _generator(self, index: Tensor) -> torch.Generator:
        seed = _seed(self.args.environment_seed, self.state.global_step, int(index[0]))
        return torch.Generator().manual_seed(seed)

    def prepared(self, batch: PackedBatch, index: Tensor) -> PackedBatch:
        if self.backdoor is None:
            return batch
        environments = draw_environments(self.memberships[index], self._generator(index))
        tokens = torch.tensor(self.backdoor.tokens)[environments].to(batch.input_ids.device)
        bos = self.processing_class.bos_token_id
        return prepend(batch, tokens, bos is not None and bool((batch.input_ids[:, 0] == bos).all()))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        index, scores = self.scores(model, inputs, response_states=self.args.output == "hidden")
        policy, tokens = scores.sum_logps, scores.tokens
        reference = self.reference_logps[index].to(policy.device)
        log_probs = LogProbs(
            chosen=policy[:, 0],
            rejected=policy[:, 1:],
            ref_chosen=reference[:, 0],
            ref_rejected=reference[:, 1:],
            chosen_tokens=tokens[:, 0],
            rejected_tokens=tokens[:, 1:],
            rejected_mask=tokens[:, 1:] > 0 if self.ragged else None,
        )
        if self.batch_environments is None:
            memberships = self.memberships[index].to(policy.device)
        else:
            memberships = self.batch_environments(scores.prompt_states)
        known = hyperparameters(self.args.loss)
        drawn = {"state": self.beta_state, "generator": self._generator(index)}
        options = {**{name: value for name, value in drawn.items() if name in known}, **self.loss_options}
        if self.smoothing is not None:
            options["label_smoothing"] = self.smoothing[index].to(policy.device)
        states = None if scores.response_states is None else scores.response_states[:, 0]
        loss, metrics = causal_loss(self.args.loss, log_probs, memberships, self.regulariser, states, **options)
        if "margin_mean" in metrics:
            self.beta_state = BetaState(metrics["margin_mean"], metrics["margin_std"])
        if self.batch_environments is not None:
            metrics["noise_share"] = self.batch_environments.noise_share
        if self.args.nll_weight:
            nll = -policy[:, 0].sum() / tokens[:, 0].sum()
            loss, metrics["nll"] = loss + self.args.nll_weight * nll, nll.item()
        loss = self.checked(loss, index)
        self.record(metrics)
        return (loss, scores) if return_outputs else loss

    def own_state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values, tensors = super().own_state()
        values["beta_state"] = vars(self.beta_state)
        return values, tensors | (self.batch_environments.state_dict() if self.batch_environments else {})

    def load_own_state(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().load_own_state(values, tensors)
        self.beta_state = BetaState(**values["beta_state"])
        if self.batch_environments is not None:
            self.batch_environments.load_state_dict(tensors)


def _smoothing(rows: Sequence[Mapping[str, Any]], loss: str, options: Mapping[str, Any]) -> Tensor | None:
    """The rows' column ``label_smoothing`` (N,), None where they have none.

    Raises:
        StudyError: some rows lack it, one is no share, the loss does not take it, or ``options`` hold one for all rows
            as well.
    """
    found = _numbers(rows, "label_smoothing", 1.0)
    if found is None:
        return None
    if "label_smoothing" not in hyperparameters(loss):
        raise StudyError(
            f"the rows smooth their labels, but loss {loss!r} does not take it from them: choose 'rose_po'"
        )
    if "label_smoothing" in options:
        raise StudyError(
            "both the rows and loss_options smooth the labels: remove label_smoothing from loss_options, or the rows' "
            "column of that name"
        )
    return found


@torch.no_grad()
def _interleaved(scores: ResponseScores, world: int) -> ResponseScores:
    """Scores of rows r, r + world, ... of every rank r in the order of the rows."""
    parts: list[Any] = [None] * world
    distributed.all_gather_object(parts, scores)
    count = sum(len(part.tokens) for part in parts)

    def woven(name: str) -> Tensor:
        rows = getattr(parts[0], name)
        whole = rows.new_empty(count, *rows.shape[1:])
        for rank, part in enumerate(parts):
            whole[rank::world] = getattr(part, name)
        return whole

    return ResponseScores(*(woven(name) for name in ("sum_logps", "tokens", "prompt_states")))
