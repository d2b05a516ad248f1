"""IFairLRS's weights and re-ranking, against shares counted by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TITLES
from transformers import TrainingArguments

from causaldpo_lib.backbone import tiny_backbone
from causaldpo_lib.errors import StudyError
from causaldpo_lib.fairness import WEIGHTINGS, history_shares, target_weights, unfairness, unfairness_factors
from causaldpo_lib.packing import pack, score_responses
from causaldpo_lib.prompts import prompt_text, response_text
from causaldpo_lib.trainers import SupervisedTrainer, encode_features

ITEMS = pd.DataFrame({"item": [1, 2, 3, 4], "group_items": ["G1", "G1", "G2", "G3"]})
# histories: G1 four of eight, G2 three, G3 one; targets: G1 three of four, G2 one.
EXAMPLES = pd.DataFrame({"item": [1, 2, 1, 3], "history": [[1, 3], [2, 2], [3, 3, 4], [1]]})


def test_weights_restore_the_histories_shares():
    assert history_shares(EXAMPLES, ITEMS).tolist() == [4 / 8, 3 / 8, 1 / 8]
    weights = target_weights(EXAMPLES, ITEMS)
    assert weights == pytest.approx([0.5 / 0.75] * 3 + [0.375 / 0.25])
    assert weights[:3].sum() / 4 == pytest.approx(0.5) and weights[3] / 4 == pytest.approx(0.375)
    assert WEIGHTINGS["none"](EXAMPLES, ITEMS) is None


def test_unfairness_is_the_excess_of_what_is_shown_and_moves_it_away():
    shown = np.array([[1, 2], [1, 3], [2, 1], [1, 2]])  # G1 seven of eight slots, G2 one
    found = unfairness(shown, EXAMPLES, ITEMS)
    assert found.tolist() == pytest.approx([7 / 8 - 4 / 8, 1 / 8 - 3 / 8, -1 / 8]) and found.sum() == pytest.approx(0)
    assert unfairness_factors(found, ITEMS, 2.0) == pytest.approx([1.375**2, 1.375**2, 1.0, 1.0])
    assert unfairness_factors(found, ITEMS, 0.0).tolist() == [1.0] * 4


@pytest.fixture
def trainer(tmp_path):
    """A function that makes a trainer of the same small model on three rows."""

    def make(weights):
        model, tokenizer = tiny_backbone(TITLES, seed=0, name="tiny-small")
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(10)  # at random all titles are about equally likely
        rows = [{"prompt": prompt_text([TITLES[i]]), "chosen": response_text(TITLES[i + 3])} for i in range(3)]
        for row, weight in zip(rows, weights, strict=False):
            row["weight"] = weight
        arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
        return SupervisedTrainer(model, arguments, rows, tokenizer), rows

    return make


def test_the_weighted_loss_is_the_mean_of_weighted_token_means(trainer):
    """Not the weights' mean times the batch's mean, as IFairLRS's released code has it."""
    weights = [3.0, 0.5, 1.0]
    weighted, rows = trainer(weights)
    features = encode_features(weighted.processing_class, rows, ["chosen"])
    batch = pack([f["input_ids"] for f in features], [f["responses"] for f in features], 0)
    scores = score_responses(weighted.model, batch)
    means = -(scores.sum_logps / scores.tokens)[:, 0]
    inputs = {"index": torch.arange(3), **vars(batch)}
    loss = weighted.compute_loss(weighted.model, dict(inputs))
    assert loss.item() == pytest.approx((torch.tensor(weights) * means).mean().item(), rel=1e-5)
    assert loss.item() != pytest.approx(np.mean(weights) * means.mean().item(), rel=1e-3)
    plain, _ = trainer([])
    assert plain.compute_loss(plain.model, dict(inputs)).item() == pytest.approx(
        (-scores.sum_logps.sum() / scores.tokens.sum()).item(), rel=1e-5
    )


def test_some_rows_without_weight_are_refused(trainer):
    with pytest.raises(StudyError, match="2 of 3 training rows have no weight"):
        trainer([1.0])
