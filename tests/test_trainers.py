"""Trainers: trl on the same batch, the penalty's effect on the gradient, controls, and what the log holds."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import TrainingArguments

from causaldpo_lib.errors import StudyError
from causaldpo_lib.losses import LOSSES
from causaldpo_lib.mmd import median_bandwidth, mmd_squared
from causaldpo_lib.trainers import CausalDPOConfig, CausalDPOTrainer, SupervisedTrainer, encode_features


def config(folder, **options):
    shared = {"per_device_train_batch_size": 8, "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3, "seed": 1}
    fixed = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    return CausalDPOConfig(str(folder), **shared, **fixed, activation_checkpointing=False, **options)


def trainer(folder, tiny, rows, **options):
    return CausalDPOTrainer(
        copy.deepcopy(tiny[0]), args=config(folder, **options), train_dataset=rows, processing_class=tiny[1]
    )


def first_batch(trained):
    return trained.data_collator(trained.train_dataset[:8])


def loss_and_gradient(trained):
    trained.model.zero_grad()
    loss = trained.compute_loss(trained.model, first_batch(trained))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trained.model.parameters()])


def drift(trained):
    """Move the policy off its reference, so that margins and rewards are not all zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


def test_equals_trl_on_the_same_batch(tmp_path, tiny, rows):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = tiny
    single = [{**row, "rejected": row["rejected"][0]} for row in rows[:8]]
    # trl appends the end-of-sequence token itself, as the library does.
    args = DPOConfig(
        str(tmp_path),
        per_device_train_batch_size=8,
        beta=0.3,
        report_to="none",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        precompute_ref_log_probs=False,
        disable_tqdm=True,
    )
    theirs = DPOTrainer(
        copy.deepcopy(model),
        copy.deepcopy(model),
        args,
        train_dataset=Dataset.from_list(single),
        processing_class=tokenizer,
    )
    ours = trainer(tmp_path, tiny, single, loss_options={"beta": 0.3}, mmd_weight=0.0)
    drift(ours)
    drift(theirs)
    batch = theirs.data_collator([theirs.train_dataset[i] for i in range(8)])
    expected = theirs.compute_loss(theirs.model, batch)
    expected.backward()
    loss, gradient = loss_and_gradient(ours)
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    theirs_gradient = torch.cat([p.grad.flatten() for p in theirs.model.parameters()])
    torch.testing.assert_close(gradient, theirs_gradient, atol=1e-5, rtol=1e-3)


def test_penalty_adds_its_own_value_and_gradient(tmp_path, tiny, rows):
    runs = [trainer(tmp_path, tiny, rows, mmd_weight=weight, loss_options={"beta": 0.5}) for weight in (0.0, 2.0)]
    for run in runs:
        drift(run)
    (plain, plain_gradient), (causal, causal_gradient) = map(loss_and_gradient, runs)
    run = runs[1]
    from causaldpo_lib.packing import PackedBatch, score_responses

    batch = first_batch(run)
    index = batch.pop("index")
    rewards = 0.5 * (score_responses(run.model, PackedBatch(**batch)).sum_logps[:, 0] - run.reference_logps[index, 0])
    penalty = mmd_squared(rewards, run.memberships[index], median_bandwidth(rewards).clamp_min(0.1))
    run.model.zero_grad()
    penalty.backward()
    own = torch.cat([p.grad.flatten() for p in run.model.parameters()])
    assert penalty.item() > 1e-4 and own.norm() > 1e-4
    assert causal == pytest.approx(plain + 2 * penalty.item(), abs=1e-5)
    torch.testing.assert_close(causal_gradient, plain_gradient + 2 * own, atol=1e-5, rtol=1e-3)


def test_shuffled_memberships_are_the_same_rows_dealt_anew(tmp_path, tiny, rows):
    inferred, shuffled = (
        trainer(tmp_path, tiny, rows, memberships=kind).memberships for kind in ("inferred", "shuffled")
    )
    assert not torch.equal(inferred, shuffled)
    assert sorted(inferred.tolist()) == sorted(shuffled.tolist())


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains_and_logs_its_parts(name, tmp_path, tiny, rows):
    trained = trainer(tmp_path, tiny, rows, loss=name)
    before = copy.deepcopy(trained.model.state_dict())
    trained.train()
    table = trained.table()
    assert [entry["step"] for entry in table] == [1.0, 2.0, 3.0]
    assert {"preference_loss", "mmd2", "mmd2_debiased", "margin", "accuracy", "chosen_logp"} <= set(table[0])
    assert table[0]["loss"] == pytest.approx(table[0]["preference_loss"] + table[0]["mmd2"], abs=1e-3)
    assert any(not torch.equal(before[key], value) for key, value in trained.model.state_dict().items())


def test_alignment_raises_the_margin_and_is_repeatable(tmp_path, tiny, rows):
    runs = [trainer(tmp_path, tiny, rows, mmd_weight=0.0) for _ in range(2)]
    for run in runs:
        run.args.max_steps = 20
        run.train()
    first, last = runs[0].table()[0], runs[0].table()[-1]
    assert last["margin"] > first["margin"] + 1.0 and last["preference_loss"] < first["preference_loss"]
    assert [entry["loss"] for entry in runs[0].table()] == [entry["loss"] for entry in runs[1].table()]


def test_supervised_loss_is_the_completion_s_token_mean(tmp_path, tiny, rows):
    model, tokenizer = copy.deepcopy(tiny[0]), tiny[1]
    args = TrainingArguments(
        str(tmp_path),
        max_steps=25,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trained = SupervisedTrainer(model, args, rows, tokenizer)
    loss = trained.compute_loss(model, first_batch(trained)).item()
    total, tokens = 0.0, 0
    for feature in trained.train_dataset[:8]:
        prompt, response = feature["input_ids"], feature["responses"][0]
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        total += F.cross_entropy(logits, torch.tensor(response), reduction="sum").item()
        tokens += len(response)
    assert loss == pytest.approx(total / tokens, abs=1e-5)
    trained.train()
    assert trained.table()[-1]["loss"] < 0.5 * trained.table()[0]["loss"]


def test_lora_trains_only_adapters_and_merges_into_an_ordinary_checkpoint(tmp_path, tiny, rows):
    from causaldpo_lib.backbone import load_checkpoint, save_checkpoint, with_lora

    model = with_lora(copy.deepcopy(tiny[0]), rank=4)
    run = CausalDPOTrainer(model, args=config(tmp_path / "t"), train_dataset=rows, processing_class=tiny[1])
    run.train()
    assert all("lora" in name for name, p in run.model.named_parameters() if p.requires_grad)
    with torch.no_grad():
        expected = run.model(torch.tensor([[1, 5, 9]])).logits
    save_checkpoint(run.model, tiny[1], tmp_path / "merged")
    merged, _ = load_checkpoint(tmp_path / "merged")
    torch.testing.assert_close(merged(torch.tensor([[1, 5, 9]])).logits, expected, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(expected, tiny[0](torch.tensor([[1, 5, 9]])).logits)


def test_bad_input_is_named(tmp_path, tiny, rows):
    with pytest.raises(StudyError, match="unknown kind of memberships 'shufled'"):
        config(tmp_path, memberships="shufled")
    with pytest.raises(StudyError, match="no hyper-parameter 'gama'"):
        config(tmp_path, loss_options={"gama": 1.0})
    with pytest.raises(StudyError, match="training set is empty"):
        trainer(tmp_path, tiny, [])
    with pytest.raises(StudyError, match="row 1 has no column 'rejected'"):
        encode_features(tiny[1], [rows[0], {"prompt": "p", "chosen": "c"}], ["chosen", "rejected"])
    with pytest.raises(StudyError, match="different numbers of rejected"):
        trainer(tmp_path, tiny, [rows[0], {**rows[1], "rejected": rows[1]["rejected"][:1]}])


def test_accumulated_batches_are_averaged(tmp_path, tiny, rows):
    """Adam hides the gradient's scale from the weights, so its logged norm is compared."""
    norms = []
    for size, steps in ((8, 1), (4, 2)):
        args = config(tmp_path, mmd_weight=0.0, gradient_accumulation_steps=steps)
        args.per_device_train_batch_size, args.max_steps = size, 1
        run = CausalDPOTrainer(copy.deepcopy(tiny[0]), args=args, train_dataset=rows[:8], processing_class=tiny[1])
        run.train()
        norms.append(run.table()[0]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_penalty_does_not_drown_the_loss_while_rewards_are_tiny(tmp_path, tiny, rows):
    """The gradient of a median-width kernel grows like 1 / width: unbounded where training starts, at equal rewards."""
    norms = {}
    for weight in (0.0, 1.0):
        run = trainer(tmp_path, tiny, rows, mmd_weight=weight, loss_options={"beta": 1.0})
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter += 1e-5 * torch.randn(parameter.shape, generator=generator)
        norms[weight] = loss_and_gradient(run)[1].norm().item()
    assert norms[1.0] < 2 * norms[0.0]


def test_long_prompts_lose_their_oldest_titles(tiny, rows):
    row = max(rows, key=lambda each: len(each["prompt"]))
    (whole,), (cut,) = (encode_features(tiny[1], [row], ["chosen"], length) for length in (None, 25))
    assert len(whole["input_ids"]) > len(cut["input_ids"]) and whole["input_ids"][-3:] == cut["input_ids"][-3:]
    assert len(cut["input_ids"]) + len(cut["responses"][0]) <= 25
