"""Losses: worked values, identities, gradients. (``test_trainers.py`` compares with trl on the same batch.)"""

import math

import pytest
import torch

from causaldpo_lib.errors import StudyError
from causaldpo_lib.losses import LOSSES, LogProbs, preference_loss

CHOSEN, REF_CHOSEN = [-5.0, -7.5, -4.0], [-5.5, -7.0, -4.8]
REJECTED = [[-6.0, -9.0, -12.0], [-7.0, -7.2, -11.0], [-10.0, -6.5, -9.5]]
REF_REJECTED = [[-6.5, -8.5, -11.0], [-7.2, -7.6, -10.0], [-9.0, -6.0, -9.7]]


def toy(rejected: int = 1) -> LogProbs:
    def matrix(rows):
        return torch.tensor(rows, dtype=torch.float64)[:, :rejected]

    return LogProbs(
        torch.tensor(CHOSEN, dtype=torch.float64),
        matrix(REJECTED),
        torch.tensor(REF_CHOSEN, dtype=torch.float64),
        matrix(REF_REJECTED),
    )


@pytest.mark.parametrize(
    ("beta", "expected"),
    [(0.1, [0.693147, 0.728760, 0.607192]), (1.0, [0.693147, 1.103186, 0.152978])],
)
def test_dpo_worked_values(beta, expected):
    values = LOSSES["dpo"](toy(), beta=beta)
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    assert preference_loss("dpo", toy(), beta=beta)[0].item() == pytest.approx(sum(expected) / 3, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_matches_finite_differences(name):
    batch = toy(3)
    mask = torch.tensor([[True, True, True], [True, True, False], [True, False, False]])

    def loss(chosen, rejected):
        return preference_loss(
            name, LogProbs(chosen, rejected, batch.ref_chosen, batch.ref_rejected, rejected_mask=mask)
        )[0]

    assert torch.autograd.gradcheck(loss, (batch.chosen.requires_grad_(), batch.rejected.requires_grad_()))


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_margins_stay_finite(name):
    chosen = torch.tensor([1e4, -1e4], requires_grad=True)
    zeros = torch.zeros(2)
    loss, _ = preference_loss(name, LogProbs(chosen, zeros[:, None], zeros, zeros[:, None]))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(chosen.grad).all()


def test_zero_margin_is_log_two():
    zeros = torch.zeros(4)
    loss, metrics = preference_loss("dpo", LogProbs(zeros, zeros[:, None], zeros, zeros[:, None]), beta=3.0)
    assert loss.item() == pytest.approx(math.log(2))
    assert metrics["margin"] == 0.0 and metrics["accuracy"] == 0.0


def test_several_rejected_are_the_mean_of_single_ones_and_masked_ones_do_not_count():
    single = [
        LOSSES["dpo"](
            LogProbs(*(t if t.ndim == 1 else t[:, k : k + 1] for t in vars(toy(3)).values() if t is not None))
        )
        for k in range(3)
    ]
    torch.testing.assert_close(LOSSES["dpo"](toy(3)), torch.stack(single).mean(0))
    masked = toy(3)
    masked.rejected_mask = torch.tensor([[True, False, False]] * 3)
    torch.testing.assert_close(LOSSES["dpo"](masked), single[0])


def test_bad_input_is_named():
    with pytest.raises(StudyError, match="no hyper-parameter 'betta': choose from beta"):
        preference_loss("dpo", toy(), betta=0.1)
    with pytest.raises(StudyError, match=r"unknown loss 'dop' .did you mean 'dpo'"):
        preference_loss("dop", toy())
    with pytest.raises(StudyError, match="ref_chosen"):
        preference_loss("dpo", LogProbs(torch.zeros(2), torch.zeros(2, 1)))
    with pytest.raises(StudyError, match=r"expected \(B, K\)"):
        LogProbs(torch.zeros(2), torch.zeros(2))
