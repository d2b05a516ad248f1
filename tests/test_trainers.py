"""Trainers: trl on the same batch, the penalty's effect on the gradient, controls, and what the log holds."""

import copy
import math

import pandas as pd
import pytest
import torch
from conftest import small_model
from torch.nn import functional as F
from transformers import TrainingArguments

from causaldpo_lib.causal import causal_loss
from causaldpo_lib.checkpoints import scores_digest
from causaldpo_lib.errors import StudyError
from causaldpo_lib.losses import LOSSES
from causaldpo_lib.mmd import median_bandwidth, mmd_squared
from causaldpo_lib.packing import PackedBatch, score_responses
from causaldpo_lib.prompts import prompt_text
from causaldpo_lib.trainers import (
    CausalDPOConfig,
    CausalDPOTrainer,
    LengthGroupedSampler,
    SupervisedTrainer,
    encode_features,
)


def config(folder, **options):
    shared = {"per_device_train_batch_size": 8, "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-3, "seed": 1}
    fixed = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    return CausalDPOConfig(str(folder), **{**shared, **fixed, "activation_checkpointing": False, **options})


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


def counted_passes(model):
    """Grows by one with every forward pass of ``model``."""
    passes = []
    model.register_forward_hook(lambda *given: passes.append(1))
    return passes


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
    trained = trainer(tmp_path, tiny, rows, loss=name, max_steps=2)
    before = copy.deepcopy(trained.model.state_dict())
    trained.train()
    table = trained.table()
    assert [entry["step"] for entry in table] == [1.0, 2.0]
    logged = {"preference_loss", "penalty", "mmd2", "mmd2_debiased", "margin", "accuracy", "chosen_logp"}
    logged |= {"margin_1", "margin_2", "accuracy_1", "accuracy_2", "weight_distance", "prompts_per_second"}
    assert logged <= set(table[0])
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

    @torch.no_grad()
    def logits(model):  # each on its own device
        return model(torch.tensor([[1, 5, 9]], device=model.device)).logits.cpu()

    expected = logits(run.model)
    save_checkpoint(run.model, tiny[1], tmp_path / "merged")
    merged, _ = load_checkpoint(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(expected, logits(tiny[0]))


def test_bad_input_is_named(tmp_path, tiny, rows):
    with pytest.raises(StudyError, match="unknown kind of memberships 'shufled'"):
        config(tmp_path, memberships="shufled")
    with pytest.raises(StudyError, match="no hyper-parameter 'gama'"):
        config(tmp_path, loss_options={"gama": 1.0})
    with pytest.raises(StudyError, match="training set is empty"):
        trainer(tmp_path, tiny, [])
    with pytest.raises(StudyError, match="row 1 has no column 'rejected'"):
        encode_features(tiny[1], [rows[0], {"prompt": "p", "chosen": "c"}], ["chosen", "rejected"])
    with pytest.raises(StudyError, match="row 1 has no response in column 'rejected'"):
        trainer(tmp_path, tiny, [rows[0], {**rows[1], "rejected": []}])
    with pytest.raises(StudyError, match="set memberships to 'batch'"):
        config(tmp_path, membership_gradient="paper")
    with pytest.raises(StudyError, match="keep their identity"):
        config(tmp_path, memberships="batch", tokens_per_environment=2)
    with pytest.raises(StudyError, match="unknown penalty 'mdd'"):
        config(tmp_path, penalty="mdd")
    with pytest.raises(StudyError, match="column 'environment' of every training row"):
        trainer(tmp_path, tiny, rows, memberships="given")
    smoothed = [{**row, "label_smoothing": 0.2} for row in rows]
    with pytest.raises(StudyError, match="loss 'dpo' does not take it from them: choose 'rose_po'"):
        trainer(tmp_path, tiny, smoothed)
    with pytest.raises(StudyError, match="both the rows and loss_options smooth the labels: remove label_smoothing"):
        trainer(tmp_path, tiny, smoothed, loss="rose_po", loss_options={"label_smoothing": 0.1})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"loss_type": "ipo"}, r"loss_type = \['ipo'\] has no effect here: name the loss by loss"),
        ({"loss_weights": [2.0]}, "loss_weights .* by loss_options or nll_weight"),
        ({"label_smoothing": 0.4}, "label_smoothing = 0.4 .* and label_smoothing in loss_options"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor = 0.1 .* set loss to 'cdpo'"),
        ({"ld_alpha": 0.5}, "ld_alpha = 0.5"),
        ({"f_divergence_type": "forward_kl"}, "f_divergence_type = 'forward_kl'"),
        ({"f_alpha_divergence_coef": 0.7}, "f_alpha_divergence_coef = 0.7"),
        ({"use_weighting": True}, "use_weighting = True"),
        ({"discopop_tau": 0.1}, "discopop_tau = 0.1"),
        ({"sync_ref_model": True}, "sync_ref_model = True .* begin another training"),
        ({"ref_model_mixup_alpha": 0.5}, "ref_model_mixup_alpha = 0.5"),
        ({"ref_model_sync_steps": 5}, "ref_model_sync_steps = 5"),
        ({"router_aux_loss_coef": 0.1}, "router_aux_loss_coef = 0.1"),
        ({"loss": "ipo", "beta": 0.5}, r"beta = 0.5 has no effect on loss 'ipo', .* \(tau, average\)"),
        ({"loss": "mppo", "beta": 0.1}, "beta = 0.1 has no effect on loss 'mppo'"),
        ({"loss": "cpo", "nll_weight": 0.5}, "nll_weight = 0.5 would be added .* set the one in loss_options"),
    ],
)
def test_options_that_would_change_nothing_or_count_twice_are_refused(options, sentence, tmp_path):
    with pytest.raises(StudyError, match=sentence):
        config(tmp_path, **options)


def test_trl_s_defaults_written_out_are_no_choice(tmp_path):
    made = config(tmp_path, loss_type="sigmoid", label_smoothing=0.0, loss="cpo", nll_weight=0.0, beta=0.3)
    assert made.loss_type == ["sigmoid"] and made.max_length is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"prompt": None}, "row 1 has None in column 'prompt': give it a text"),
        ({"prompt": float("nan")}, "row 1 has nan in column 'prompt'"),
        (
            {"prompt": [{"role": "user", "content": "Zero"}]},
            r"row 1 has messages in .*apply_chat_template",
        ),
        ({"chosen": [{"role": "assistant", "content": "Zero"}]}, "row 1 has messages in column 'chosen'"),
        ({"chosen": {"role": "assistant", "content": "Zero"}}, "row 1 has messages in column 'chosen'"),
        ({"chosen": None}, "row 1 has None in column 'chosen'"),
        ({"rejected": float("nan")}, "row 1 has nan in column 'rejected'"),
        ({"rejected": [" Zero", None]}, "row 1 has None in column 'rejected'"),
        ({"label_smoothing": None}, "row 1 has None in column 'label_smoothing': give a number from 0 to 1"),
        ({"label_smoothing": 1.5}, "row 1 has 1.5 in column 'label_smoothing'"),
    ],
)
def test_a_bad_value_is_named_by_row_and_column(change, sentence, tmp_path, tiny, rows):
    smoothed = [{**row, "label_smoothing": 0.2} for row in rows]
    with pytest.raises(StudyError, match=sentence):
        trainer(tmp_path, tiny, [smoothed[0], {**smoothed[1], **change}, *smoothed[2:]], loss="rose_po")


def test_a_bad_weight_is_named_by_row_and_column(tmp_path, tiny, rows):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    for weight in (None, "much", -1.0, float("nan"), math.inf):
        weighed = [{**row, "weight": 1.0 if index else weight} for index, row in enumerate(rows)]
        with pytest.raises(StudyError, match=r"row 0 has .* in column 'weight': give a number of 0 or more"):
            SupervisedTrainer(tiny[0], args, weighed, tiny[1])
    with pytest.raises(StudyError, match="23 of 24 training rows have no weight"):
        SupervisedTrainer(tiny[0], args, [{**rows[0], "weight": 1.0}, *rows[1:]], tiny[1])


def test_what_a_trainer_cannot_begin_with_is_named(tmp_path, tiny, rows):
    def begin(**given):
        given = {"model": tiny[0], "train_dataset": rows, "processing_class": tiny[1], **given}
        CausalDPOTrainer(args=config(tmp_path), **given)

    for name in ("model", "ref_model"):
        with pytest.raises(StudyError, match=f"{name} is 'gpt2', not a loaded model: .*backbone.load_checkpoint"):
            begin(**{name: "gpt2"})
    with pytest.raises(StudyError, match="processing_class is missing"):
        begin(processing_class=None)
    padless = copy.deepcopy(tiny[1])
    padless.pad_token = None
    with pytest.raises(StudyError, match="the tokenizer has no pad_token: set it"):
        begin(processing_class=padless)
    with pytest.raises(StudyError, match=r"DataFrame: give its rows as dictionaries, frame.to_dict\('records'\)"):
        begin(train_dataset=pd.DataFrame(rows))
    with pytest.raises(StudyError, match="row 0 is 'train': give a dictionary"):
        begin(train_dataset={"train": rows})
    with pytest.raises(StudyError, match="training set is empty"):
        begin(train_dataset=None)


def test_all_trainings_see_the_same_prompts_up_to_the_model_s_context(tmp_path, tiny, rows):
    """A prompt beyond trl's default of 1,024 tokens, and one beyond the model's 2,048."""
    long = [{**rows[0], "prompt": prompt_text(["Silent Harbor Nights"] * count)} for count in (300, 700)]
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    supervised = SupervisedTrainer(small_model("llama", len(tiny[1])), args, long, tiny[1])
    equal = [{**row, "rejected": row["chosen"]} for row in long]
    model = small_model("llama", len(tiny[1]))
    aligned = CausalDPOTrainer(model, args=config(tmp_path), train_dataset=equal, processing_class=tiny[1])
    prompts = [[feature["input_ids"] for feature in run.train_dataset] for run in (supervised, aligned)]
    assert prompts[0] == prompts[1] and 1024 < len(prompts[0][0]) < len(prompts[0][1]) < 2048


def test_the_longest_response_of_all_is_what_a_prompt_has_to_fit(tiny, rows):
    """A history is cut alike whatever it is answered with; with no room left, the error says what takes it."""
    prompt = prompt_text(["Zero"] * 20)
    short, long = ({"prompt": prompt, "chosen": " Zero" * words} for words in (1, 9))
    room = len(encode_features(tiny[1], [long], ["chosen"], 40)[0]["input_ids"])
    both = encode_features(tiny[1], [short, long], ["chosen"], 40)
    assert [len(feature["input_ids"]) for feature in both] == [room, room]
    endless = {**rows[5], "rejected": [" Comet", " Zero" * 300]}
    sentence = "prompt 0, .* does not fit the 0 left beside the longest response, the 301 tokens of training row 5: "
    with pytest.raises(StudyError, match=sentence):
        encode_features(tiny[1], [*rows[:5], endless], ["chosen", "rejected"], 100)


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


def test_ragged_rejected_lists_are_masked(tmp_path, tiny, rows):
    """Rows with one and two rejected responses: each row's loss is that of the row alone."""
    mixed = [{**row, "rejected": row["rejected"][: 1 + index % 2]} for index, row in enumerate(rows)]
    run = trainer(tmp_path, tiny, mixed, mmd_weight=0.0, loss_options={"beta": 0.5})
    drift(run)
    loss, gradient = loss_and_gradient(run)
    run.model.zero_grad()
    _, scores = run.scores(run.model, first_batch(run))
    ratios = scores.sum_logps - run.reference_logps[:8]
    alone = [-F.logsigmoid(0.5 * (row[0] - row[1 : 2 + i % 2])).mean() for i, row in enumerate(ratios)]
    expected = torch.stack(alone).mean()
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert run.reference_logps[0, 2] == 0 and run.reference_logps[1, 2] != 0
    torch.testing.assert_close(gradient, torch.cat([p.grad.flatten() for p in run.model.parameters()]))
    margins = [(row[0] - row[2]).item() for row in ratios[1::2]]
    assert run._recorded["margin_2"] == [pytest.approx(sum(margins) / 4, abs=1e-4)]


def test_reference_scores_are_computed_once(tmp_path, tiny, rows, capsys):
    cache = tmp_path / "cache"

    def passes_and_scores(**options):
        model = options.pop("model", None) or copy.deepcopy(tiny[0])
        passes = counted_passes(model)
        run = CausalDPOTrainer(
            model, args=config(tmp_path, reference_cache=str(cache)), train_dataset=rows, processing_class=tiny[1]
        )
        return len(passes), run.reference_logps, run.memberships

    computed, logps, memberships = passes_and_scores()
    assert computed == 2  # 24 rows, 16 at a time
    found = passes_and_scores()
    assert found[0] == 0 and torch.equal(found[1], logps) and torch.equal(found[2], memberships)
    (file,) = cache.iterdir()

    other = copy.deepcopy(tiny[0])
    with torch.no_grad():
        next(other.parameters())[5, 0] += 1e-3
    assert passes_and_scores(model=other)[0] == 2 and len(list(cache.iterdir())) == 2

    content = bytearray(file.read_bytes())
    for damaged in (bytes(content[:-100]), bytes([*content[:-1], content[-1] ^ 1])):
        file.write_bytes(damaged)
        again = passes_and_scores()
        assert again[0] == 2 and torch.equal(again[1], logps)
        assert f"{file} are damaged" in capsys.readouterr().out
        assert passes_and_scores()[0] == 0


def adapted(model, scale=0.0, rank=4, seed=5):
    """A copy of ``model`` with adapters: fresh ones, or as if trained, all B at ``scale``."""
    from causaldpo_lib.backbone import with_lora

    torch.manual_seed(seed)
    found = with_lora(copy.deepcopy(model), rank)
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "lora_B" in name:
                parameter += scale
    return found


def test_reference_is_the_policy_with_its_adapters_or_the_model_given(tmp_path, tiny, rows):
    plain = trainer(tmp_path, tiny, rows)
    fresh, trained = (
        CausalDPOTrainer(model, args=config(tmp_path), train_dataset=rows, processing_class=tiny[1])
        for model in (adapted(tiny[0]), adapted(tiny[0], 0.1))
    )
    assert torch.equal(fresh.reference_logps, plain.reference_logps)
    assert (trained.reference_logps - plain.reference_logps).abs().max() > 1e-2
    assert trained.compute_loss(trained.model, first_batch(trained)).item() == pytest.approx(math.log(2), abs=1e-5)
    merged = trained.model.merge_and_unload()
    given = CausalDPOTrainer(copy.deepcopy(tiny[0]), merged, config(tmp_path), rows, processing_class=tiny[1])
    torch.testing.assert_close(given.reference_logps, trained.reference_logps, atol=1e-4, rtol=0)


def test_a_cached_reference_is_never_another_adapter_s(tmp_path, tiny, rows):
    """Trained weights, their scale, and which of two adapters is in use all make another reference."""
    from peft import LoraConfig

    doubled, second = adapted(tiny[0], 0.1), adapted(tiny[0], 0.1)
    for module in doubled.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] *= 2
    second.add_adapter("second", LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    first = copy.deepcopy(second)
    second.set_adapter("second")
    models = [adapted(tiny[0]), adapted(tiny[0], 0.1), adapted(tiny[0], 0.2), doubled, first, second]
    for number, model in enumerate(models, start=1):
        options = [config(tmp_path, reference_cache=cache) for cache in (str(tmp_path / "cache"), None)]
        cached, computed = (
            CausalDPOTrainer(model, args=args, train_dataset=rows, processing_class=tiny[1]) for args in options
        )
        assert torch.equal(cached.reference_logps, computed.reference_logps)
        assert len(list((tmp_path / "cache").iterdir())) == number


def test_policy_and_reference_are_scored_without_dropout(tmp_path, tiny, rows):
    """Before the first step they are the same model, so all log-ratios are 0; with dropout they are not."""
    first = {}
    for disabled in (True, False):
        model = small_model("gpt2", len(tiny[1]))  # dropout of 0.1, in modules
        args = config(tmp_path, disable_dropout=disabled, max_steps=1)
        run = CausalDPOTrainer(model, args=args, train_dataset=rows, processing_class=tiny[1])
        run.train()
        first[disabled] = abs(run.table()[0]["preference_loss"] - math.log(2))
    assert first[True] < 1e-6 < 1e-4 < first[False]
    model = copy.deepcopy(tiny[0])
    for layer in model.model.layers:  # a number in Llama's attention
        layer.self_attn.attention_dropout = 0.5
    run = CausalDPOTrainer(model, args=config(tmp_path), train_dataset=rows, processing_class=tiny[1])
    run.model.train()
    assert run.compute_loss(run.model, first_batch(run)).item() == pytest.approx(math.log(2), abs=1e-6)


def test_adapters_do_not_change_the_reference_s_digest(tmp_path, tiny, rows):
    from causaldpo_lib.backbone import with_lora

    for seed in (1, 2):
        torch.manual_seed(seed)
        model = with_lora(copy.deepcopy(tiny[0]), rank=2)
        args = config(tmp_path, reference_cache=str(tmp_path / "cache"))
        CausalDPOTrainer(model, args=args, train_dataset=rows, processing_class=tiny[1])
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_trained_policy_is_the_next_round_s_reference(tmp_path, tiny, rows):
    first = trainer(tmp_path, tiny, rows)
    first.train()
    second = CausalDPOTrainer(first.model, args=config(tmp_path), train_dataset=rows, processing_class=tiny[1])
    assert (second.reference_logps - first.reference_logps).abs().max() > 1e-3
    assert second.compute_loss(second.model, first_batch(second)).item() == pytest.approx(math.log(2), abs=1e-5)
    second.train()
    assert len(second.table()) == 3


def test_the_reference_is_scored_in_the_policys_precision(tmp_path, tiny, rows, monkeypatch):
    """In bfloat16 as in float32 policy and reference are equal before the first step: all log-ratios are 0."""
    seen = []

    def listening(name, log_probs, *given, **options):
        seen.append(torch.cat([part.detach().flatten() for part in log_probs.log_ratios()]))
        return causal_loss(name, log_probs, *given, **options)

    monkeypatch.setattr("causaldpo_lib.trainers.causal_loss", listening)
    # One row eight times: in a batch of other lengths bfloat16 rounds otherwise.
    same = [{**rows[0], "environment": index % 2} for index in range(8)]
    options = {"memberships": "given", "max_steps": 1, "reference_cache": str(tmp_path / "cache")}
    logps = []
    for bf16 in (False, True):
        run = trainer(tmp_path, tiny, same, bf16=bf16, **options)
        run.train()
        torch.testing.assert_close(seen.pop(), torch.zeros(24), atol=1e-6, rtol=0)
        logps.append(run.reference_logps)
    assert (logps[0] - logps[1]).abs().max() > 1e-3  # the cache keeps them apart


def test_cached_scores_of_another_precision_are_not_used(tmp_path, tiny, rows):
    cache = tmp_path / "cache"
    first = trainer(tmp_path, tiny, rows, bf16=True, reference_cache=str(cache))
    prompts, responses = ([f[name] for f in first.train_dataset] for name in ("input_ids", "responses"))
    (file,) = cache.iterdir()
    names = [scores_digest(tiny[0], prompts, responses, precision, None) for precision in ("autocast bf16", "bf16")]
    assert names[0] in file.name and names[1] not in file.name


def test_nll_weight_adds_the_chosen_responses_token_mean(tmp_path, tiny, rows):
    plain, stabilised = (trainer(tmp_path, tiny, rows, mmd_weight=0.0, nll_weight=weight) for weight in (0.0, 0.5))
    loss, gradient = loss_and_gradient(plain)
    other, other_gradient = loss_and_gradient(stabilised)
    # The supervised loss is this mean, and another test holds it against plain cross-entropy.
    supervised = SupervisedTrainer(
        plain.model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True), rows, tiny[1]
    )
    nll, nll_gradient = loss_and_gradient(supervised)
    assert other == pytest.approx(loss + 0.5 * nll, abs=1e-5)
    torch.testing.assert_close(other_gradient, gradient + 0.5 * nll_gradient, atol=1e-5, rtol=1e-3)
    assert stabilised._recorded["nll"] == [pytest.approx(nll, abs=1e-5)]


@pytest.mark.parametrize("break_it", ["nan", "explode", "gradient"])
def test_a_broken_loss_stops_with_step_rows_and_last_checkpoint(break_it, tmp_path, tiny, rows, monkeypatch):
    run = trainer(tmp_path, tiny, rows, save_strategy="steps", save_steps=2, max_steps=5)
    scores_of = run.scores
    seen = []

    def broken(model, inputs, **options):
        index, scores = scores_of(model, inputs, **options)
        seen.append(index.tolist())
        if run.state.global_step == 3:
            if break_it == "gradient":  # the derivative of the root at 0 is infinite
                scores.sum_logps = scores.sum_logps + (scores.sum_logps * 0).sqrt()
            else:
                scores.sum_logps = scores.sum_logps * {"nan": math.nan, "explode": 1e9}[break_it]
        return index, scores

    monkeypatch.setattr(run, "scores", broken)
    with pytest.raises(StudyError, match=r"at step 4, .*last good checkpoint: .*checkpoint-2") as caught:
        run.train()
    assert f"training rows {seen[-1]}" in str(caught.value)
    assert {"nan": "loss is nan", "explode": "loss is ", "gradient": "norm is nan"}[break_it] in str(caught.value)
    assert len(seen) == 4


@pytest.mark.filterwarnings("ignore:DBSCAN found")  # in some of the batches
def test_batch_memberships_follow_the_policy_and_g_learns_only_by_the_paper(tmp_path, tiny, items):
    titles = items["title"].tolist()
    rows = [
        {"prompt": prompt_text([titles[7 * (i % 2)]] * 6 + [titles[i % 12]]), "chosen": " Zero", "rejected": " Comet"}
        for i in range(32)
    ]
    for gradient in ("detached", "paper"):
        options = {"memberships": "batch", "membership_gradient": gradient, "per_device_train_batch_size": 16}
        run = trainer(tmp_path, tiny, rows, **options)
        assert run.environments is None and run.diagnostics["environment_method"] == "batch"
        before = {name: tensor.clone() for name, tensor in run.own_state()[1].items()}
        run.train()
        assert max(entry["environments"] for entry in run.table()) >= 2
        moved = [not torch.equal(before[name], tensor) for name, tensor in run.own_state()[1].items()]
        assert moved == [gradient == "paper"] * 2


def test_given_environments_are_the_rows_own(tmp_path, tiny, rows):
    labelled = [{**row, "environment": "ab"[index % 2]} for index, row in enumerate(rows)]
    run = trainer(tmp_path, tiny, labelled, memberships="given")
    assert run.memberships.tolist() == [[1.0, 0.0], [0.0, 1.0]] * 12


def test_soft_prompts_condition_the_policy_and_not_the_reference(tmp_path, tiny, rows, monkeypatch):
    tokenizer = copy.deepcopy(tiny[1])
    model = copy.deepcopy(tiny[0])
    vocabulary = len(tokenizer)
    plain = trainer(tmp_path, tiny, rows)
    args = config(tmp_path, tokens_per_environment=2, learning_rate=1e-2)
    run = CausalDPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    torch.testing.assert_close(run.reference_logps, plain.reference_logps)
    assert len(run.backdoor.tokens) == run.memberships.shape[1]
    assert run.backdoor.prior == pytest.approx(run.memberships.mean(0).tolist(), abs=1e-5)
    seen = []
    run.model.get_input_embeddings().register_forward_hook(lambda module, ids, out: seen.append(ids[0][0]))
    before = run.model.get_input_embeddings().weight.detach().clone()
    run.train()
    added = torch.tensor([i for ids in run.backdoor.tokens for i in ids])
    assert added.min() == vocabulary
    used = torch.cat([ids[ids >= vocabulary] for ids in seen])
    assert len(used) == 3 * 8 * 2 and len(used.unique()) > 2  # one draw per example and step
    assert seen[0][0] == tokenizer.bos_token_id and seen[0][1] >= vocabulary
    moved = (run.model.get_input_embeddings().weight != before).any(1)
    assert moved[used.unique()].all()
    # Soft prompts move at a rate of their own: the first step is the weights', so many times over.
    steps = {}
    for rate in (1.0, 5.0):
        monkeypatch.setattr("causaldpo_lib.trainers.PROMPT_RATE", rate)
        tokens, policy = copy.deepcopy(tiny[1]), copy.deepcopy(tiny[0])
        args = config(tmp_path / str(rate), tokens_per_environment=2, learning_rate=1e-3, max_steps=1)
        again = CausalDPOTrainer(policy, args=args, train_dataset=rows, processing_class=tokens)
        start = policy.get_input_embeddings().weight.detach().clone()
        again.train()
        steps[rate] = policy.get_input_embeddings().weight.detach() - start
    assert steps[1.0][added].abs().max() > 1e-4
    torch.testing.assert_close(steps[5.0][added], 5 * steps[1.0][added], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(steps[5.0][:vocabulary], steps[1.0][:vocabulary])
    # A step's draws depend on that step alone, so that a resumed training draws the same.
    index = torch.arange(8)
    run.state.global_step = 1
    draws = [run.prepared(PackedBatch(**without_index(first_batch(run))), index).input_ids for _ in range(2)]
    run.state.global_step = 2
    draws.append(run.prepared(PackedBatch(**without_index(first_batch(run))), index).input_ids)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def without_index(batch):
    return {name: tensor for name, tensor in batch.items() if name != "index"}


@pytest.mark.parametrize("options", [{"activation_checkpointing": True}, {"bf16": True}], ids=["checkpointing", "bf16"])
def test_memory_savers_train_alike(options, tmp_path, tiny, rows):
    plain, saving = (trainer(tmp_path, tiny, rows, **given) for given in ({}, options))
    for run in (plain, saving):
        run.train()
    exact = "bf16" not in options
    for left, right in zip(plain.table(), saving.table(), strict=True):
        assert left["loss"] == pytest.approx(right["loss"], abs=1e-5 if exact else 2e-2)
        assert left["chosen_logp"] == pytest.approx(right["chosen_logp"], abs=1e-4 if exact else 0.5)


def test_length_groups_are_drawn_from_seed_and_epoch():
    sampler, again = (LengthGroupedSampler(range(100), 10, seed=3) for _ in range(2))
    first = list(sampler)
    assert sorted(first) == list(range(100)) and list(again) == first
    again.set_epoch(1)
    assert list(again) != first
    assert list(LengthGroupedSampler(range(100), 10, seed=4)) != first
