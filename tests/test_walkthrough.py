"""The notebook on the method: its numbers agree with plain formulas, and each degenerate case is really there."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import small_model

from causaldpo_lib import mmd, pipeline, stages, walkthrough
from causaldpo_lib.backbone import train_tokenizer
from causaldpo_lib.causal import Regulariser
from causaldpo_lib.environments import EnvironmentInference
from causaldpo_lib.errors import StudyError
from causaldpo_lib.losses import LogProbs, preference_loss


def drawn(size=12, environments=3, seed=0):
    """Rewards of chosen and rejected responses, and soft memberships."""
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = torch.randn(2, size, generator=generator)
    memberships = torch.randn(size, environments, generator=generator).mul(2).softmax(1)
    return chosen, rejected, memberships


def log_probs(chosen, rejected, beta):
    zeros = torch.zeros_like(chosen)
    return LogProbs(chosen / beta, rejected[:, None] / beta, zeros, zeros[:, None])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs under a small random model, fine-tuned and aligned in a folder of its own."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("runs")

    def execute(stage, **overrides):
        return stages.execute(stage, pipeline.resolve(stage, overrides))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "RESULTS", root)
        options = {"users": 40, "items": 40, "length": 10}
        data = execute("data", dataset_options=options, test_examples=10)
        tokenizer = train_tokenizer(pd.read_parquet(data.folder / "items.parquet")["title"])
        small_model("qwen2", len(tokenizer)).save_pretrained(root / "qwen2")
        tokenizer.save_pretrained(root / "qwen2")
        sft = execute("sft", data=str(data.folder), backbone=str(root / "qwen2"), epochs=1.0, batch_size=64)
        return walkthrough.training_pairs(str(sft.folder), seed=1, beta=0.5)


def test_scores_of_a_pair_are_the_sums_over_its_tokens(pairs):
    scored = pairs.scored([5, 2])
    for place, row in enumerate((5, 2)):
        tokens = walkthrough.token_logps(pairs, row)
        assert "".join(tokens["token"][:-1]) == pairs.texts["chosen"][row] and tokens["token"].iloc[-1] == "</s>"
        assert tokens["reference"].sum() == pytest.approx(scored.ref_chosen[place].item(), abs=1e-4)
        assert tokens["policy"].sum() == pytest.approx(scored.chosen[place].item(), abs=1e-4)
    assert (scored.chosen != scored.ref_chosen).all()  # the policy has moved


def test_rejected_titles_are_neither_chosen_nor_in_the_history(pairs):
    for row in pairs.texts.itertuples():
        history = row.prompt.removeprefix("Chosen so far: ").removesuffix("\nNext:").split("; ")
        assert row.rejected.strip() not in [*history, row.chosen.strip()]
    assert len(pairs.states) == len(pairs.texts) and pairs.states.std(0).max() > 0


def test_released_objective_sees_no_history_and_with_everything_undone_is_dpo(pairs):
    index = torch.arange(12)
    table = walkthrough.released_table(pairs, index, seed=0)
    assert table["feature_spread"]["as released"] < 1e-4 < 0.01 < table["feature_spread"]["last prompt state"]
    assert table["counted"]["as released"] == 1 > table["counted"]["all undone"]
    dpo, _ = preference_loss("dpo", pairs.scored(index), beta=0.1)
    assert table["preference_loss"]["all undone"] == pytest.approx(dpo.item(), abs=1e-4)


def test_a_copy_that_attends_to_nothing_is_clamped_by_its_own_log_ratios(pairs, monkeypatch):
    index = [0, 3, 4]
    policy, reference, *sides = walkthrough.padded(pairs, index)
    for name, keep in (("everything", 1), ("nothing", 0)):
        ratios = []
        for tokens in sides:
            ours, theirs = (
                model(input_ids=tokens.input_ids, attention_mask=keep * tokens.attention_mask).logits.log_softmax(-1)
                for model in (policy, reference)
            )
            gaps = (ours - theirs)[:, :-1]
            targets = tokens.labels[:, 1:].clamp_min(0)
            ratios += gaps.gather(-1, targets[..., None]).sum((1, 2)).tolist()
        for rank in range(1, 6):  # limits between any two log-ratios: each share is met by its own ratios only
            limit = np.sort(np.abs(ratios))[rank - 1 : rank + 1].mean()
            monkeypatch.setattr(walkthrough, "CLAMP", float(limit))
            assert walkthrough.clamped_by_attention(pairs, index)[name] == pytest.approx(1 - rank / 6)


@pytest.mark.parametrize(("lines", "shown"), [(["step 1", "step 2"], "step 2\n"), ([], "")])
def test_of_a_training_the_last_line_is_shown(lines, shown, capsys):
    assert walkthrough.last_line(lambda: [print(line) for line in lines]) == [None] * len(lines)
    assert capsys.readouterr().out == shown


def test_an_unknown_run_is_refused():
    with pytest.raises(StudyError, match="does not exist"):
        walkthrough.training_pairs("results/runs/none", 1, 1.0)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [("v", 2 - 2 * math.exp(-0.5)), ("u", -2 * math.exp(-0.5)), ("debiased", 0.0)],
)
def test_double_loop_of_two_points_in_two_environments_by_hand(estimator, expected):
    one, other = torch.eye(2)
    assert walkthrough.double_loop(torch.tensor([0.0, 1.0]), one, other, 1.0, estimator) == pytest.approx(expected)


@pytest.mark.parametrize("environments", [2, 4])
def test_library_and_double_loop_agree_on_every_estimator(environments):
    rewards, _, memberships = drawn(environments=environments)
    table = walkthrough.estimator_table(rewards, memberships, 0.7)
    assert list(table["estimator"]) == list(mmd.ESTIMATORS)
    np.testing.assert_allclose(table["library"], table["double loop"], atol=1e-6)


def test_pairs_of_environments_average_to_the_penalty():
    rewards, _, memberships = drawn(environments=4)
    values = walkthrough.pairwise_mmd(rewards, memberships, 0.7)
    assert (values == values.T).all() and (values.diagonal() == 0).all()
    expected = mmd.mmd_squared(rewards, memberships, 0.7).item()
    assert values[np.triu_indices(4, 1)].mean() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_pushes_on_rewards_are_the_formulas(beta):
    chosen, rejected, memberships = drawn()
    regulariser = Regulariser(weight=3.0, bandwidth=0.8)
    alone, penalty = walkthrough.reward_gradients(log_probs(chosen, rejected, beta), memberships, beta, regulariser)
    np.testing.assert_allclose(alone, torch.sigmoid(rejected - chosen) / len(chosen), rtol=1e-4)
    differences = walkthrough.central_differences(chosen.double(), memberships.double(), 0.8)
    np.testing.assert_allclose(penalty, -3.0 * differences, atol=1e-5)
    # The notebook's formula, averaged over pairs of environments.
    weights = mmd.environment_weights(memberships)
    kernel = mmd.gaussian_kernel(chosen[:, None], 0.8)
    slopes = [
        -2 / 0.8**2 * q * ((kernel * (chosen[:, None] - chosen)) @ q)
        for q in (a - c for a, c in itertools.combinations(weights.T, 2))
    ]
    np.testing.assert_allclose(differences, torch.stack(slopes).mean(0), atol=1e-5)


def test_following_the_penalty_aligns_the_environments():
    rewards, _, memberships = drawn(size=24, environments=2)
    rewards = rewards + 2 * memberships[:, 0]
    moved = walkthrough.followed(rewards, memberships, 1.0)
    before, after = (walkthrough.environment_means(s, memberships) for s in (rewards, moved))
    assert mmd.mmd_squared(moved, memberships, 1.0) < 0.05 * mmd.mmd_squared(rewards, memberships, 1.0)
    assert (after[0] - after[1]).abs() < 0.2 * (before[0] - before[1]).abs()


def test_means_of_environments_are_weighted_and_an_empty_one_is_0():
    memberships = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    means = walkthrough.environment_means(torch.tensor([3.0, 6.0]), memberships)
    assert means.tolist() == pytest.approx([(3 + 0.5 * 6) / 1.5, 6.0, 0.0])


def test_the_empirical_prior_is_the_plain_mean_and_the_uniform_one_is_not():
    losses, _, memberships = drawn()
    table = walkthrough.prior_table(losses, memberships, seed=0)
    np.testing.assert_allclose(table["empirical prior"], losses.mean(), atol=1e-6)
    assert (table["uniform prior"] - losses.mean().item()).abs().min() > 1e-3
    weights = memberships / memberships.sum(0)
    assert table["uniform prior"][0] == pytest.approx((weights.T @ losses).mean().item(), abs=1e-6)


def test_gradients_through_g_switch_the_penalty_off_and_detached_ones_do_not():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    states = 0.3 * torch.randn(40, 16, generator=generator) + 1.5 * labels[:, None]
    table = walkthrough.collapse(states, labels.float(), seeds=[0, 1], steps=40, rate=0.02)
    for (variant, _), rows in table.groupby(["variant", "run"]):
        assert len(rows) == 40 and rows["mmd2"].iloc[0] > 0.05
        if variant == "detached":
            assert rows["mmd2"].nunique() == rows["weight_distance"].nunique() == 1
        else:
            assert rows["mmd2"].iloc[-1] < 0.1 * rows["mmd2"].iloc[0]
            assert rows["weight_distance"].iloc[-1] < 0.5 * rows["weight_distance"].iloc[0]


def test_farthest_two_are_neighbourhoods_of_the_two_outermost_centres():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([0.0, 30.0, 80.0])
    states = torch.cat([torch.randn(60, 6, generator=generator) + centre for centre in centres])
    inference = EnvironmentInference(components=6, min_samples=(10,)).fit(states)
    assert len(inference.centres) == 3
    near, features = walkthrough.farthest_two(inference, states, size=10, apart=4.0)
    assert sorted({int(row) // 60 for row in near[:10]} | {int(row) // 60 for row in near[10:]}) == [0, 2]
    assert (features[:10].mean(0) - features[10:].mean(0)).norm().item() == pytest.approx(4.0, rel=0.05)


def test_counts_tell_noise_from_one_cluster_and_from_two():
    generator = torch.Generator().manual_seed(0)
    cloud = torch.randn(200, 24, generator=generator)
    spaces = {"cloud": cloud, "two": 0.01 * cloud + 50.0 * (torch.arange(200) % 2)[:, None]}
    rules = {"narrow": {"eps": 0.5, "min_samples": 4}, "wide": {"eps": 100.0, "min_samples": 4}}
    table = walkthrough.cluster_counts(spaces, rules, (32,), seed=0, batches=5).set_index(["features", "DBSCAN"])
    assert table.loc[("cloud", "narrow"), ["noise", "clusters", "usable"]].tolist() == [1, 0, 0]
    assert table.loc[("cloud", "wide"), ["noise", "clusters", "usable"]].tolist() == [0, 1, 0]
    assert table.loc[("two", "narrow"), ["noise", "clusters", "usable"]].tolist() == [0, 2, 1]


def test_the_bias_is_the_exact_mean_over_all_ways_to_deal_the_memberships():
    rewards, _, memberships = drawn(size=5)
    orders = itertools.permutations(range(5))
    mean = np.mean([mmd.mmd_squared(rewards, memberships[list(order)], 0.9).item() for order in orders])
    assert walkthrough.expected_bias(rewards, memberships, 0.9) == pytest.approx(mean, rel=1e-4)


def test_dealt_memberships_centre_the_debiased_statistic_on_0():
    rewards, _, memberships = drawn(size=20)
    draws = walkthrough.permuted_estimates(rewards, memberships, 0.9, seed=0, draws=400)
    errors = draws.std() / 20
    assert list(draws) == list(mmd.ESTIMATORS) and draws["v"].min() >= 0
    assert abs(draws["debiased"].mean()) < 4 * errors["debiased"]
    assert abs(draws["v"].mean() - walkthrough.expected_bias(rewards, memberships, 0.9)) < 4 * errors["v"]


def test_shrinking_rewards_games_a_fixed_width_and_the_medians_gradient_explodes():
    chosen, rejected, memberships = drawn()
    table = walkthrough.shrunk_rewards(chosen, rejected, memberships, [1.0, 1e-2, 1e-3])
    mmd2, ratio = (table.pivot(index="scale", columns="variant", values=name) for name in ("mmd2", "ratio"))
    np.testing.assert_allclose(mmd2["median width"], mmd2["median width"][1.0], rtol=1e-3)
    assert mmd2["fixed width"][1.0] == pytest.approx(mmd2["median width"][1.0], rel=1e-5)
    # Second order in the rewards: a hundredth of a hundredth.
    assert mmd2["fixed width"][1e-3] == pytest.approx(1e-2 * mmd2["fixed width"][1e-2], rel=0.05)
    assert mmd2["median, floor"][1e-3] < 1e-2 * mmd2["median, floor"][1.0]
    assert ratio["median width"][1e-3] == pytest.approx(10 * ratio["median width"][1e-2], rel=0.05)
    assert ratio["median, floor"][1e-3] < ratio["median, floor"][1e-2] < ratio["median width"][1e-2]
    start = walkthrough.shrunk_rewards(0 * chosen, 0 * rejected, memberships, [1.0])
    assert (start["ratio"] == 0).all() and (start["mmd2"].abs() < 1e-6).all()
