"""The published trainer's objective: the consequence of each departure, and what is left when all are switched off."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import small_model
from torch import nn

from causaldpo_lib import departures, metrics, plots, released
from causaldpo_lib.environments import EnvironmentInference, soft_memberships
from causaldpo_lib.errors import StudyError
from causaldpo_lib.losses import LogProbs, dpo_loss
from causaldpo_lib.mmd import mmd_squared
from causaldpo_lib.released import DEPARTURES, IGNORED, pad_pairs, released_code_loss

VOCABULARY, TEMPLATE, BATCH = 500, [7, 11, 13], 24


@pytest.fixture(scope="module")
def batch():
    """Two prompts of one template, twelve times each, and two random responses for each."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(20, VOCABULARY, (count,), generator=generator).tolist()

    prompts = [TEMPLATE + ids(4), TEMPLATE + ids(7)] * (BATCH // 2)
    return tuple(pad_pairs(prompts, [ids(2 + (i + r) % 3) for i in range(BATCH)], 0) for r in range(2))


@pytest.fixture(scope="module")
def models():
    reference = small_model("llama", VOCABULARY)
    policy = small_model("llama", VOCABULARY)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy, reference


def projection():
    torch.manual_seed(2)
    return nn.Linear(32, 32)


def run(models, batch, without=(), beta=0.1, seed=0):
    kept = [name for name in DEPARTURES if name not in without]
    return released_code_loss(
        *models, *batch, projection(), torch.Generator().manual_seed(seed), beta=beta, departures=kept
    )


def test_pairs_are_padded_on_the_right_and_only_responses_are_labelled():
    tokens = pad_pairs([[5, 6], [5]], [[8], [9, 4]], 0)
    assert tokens.input_ids.tolist() == [[5, 6, 8], [5, 9, 4]]
    assert tokens.labels.tolist() == [[IGNORED, IGNORED, 8], [IGNORED, 9, 4]]
    assert pad_pairs([[5, 6], [5]], [[8], [9]], 0).attention_mask.tolist() == [[1, 1, 1], [1, 1, 0]]


def test_features_of_the_first_token_are_the_same_whatever_the_history(models, batch):
    assert run(models, batch)[1]["feature_spread"] < 1e-4
    assert run(models, batch, ["features"])[1]["feature_spread"] > 0.1
    states = torch.arange(12.0).reshape(1, 4, 3)
    tokens = pad_pairs([[5, 6, 7]], [[8]], 0)
    assert released.last_prompt_position(states, tokens).tolist() == [[6.0, 7.0, 8.0]]


@pytest.mark.parametrize(("count", "clusters"), [(8, 0), (16, 1), (24, 2), (40, 3)])
def test_missing_centres_are_noise_and_surplus_ones_are_dropped(count, clusters):
    z = 20.0 * torch.arange(count)[:, None].remainder(max(clusters, 1)).expand(count, 4)
    first, second = (released.two_centres(z, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert first.shape == (2, 4)
    assert (first == second).all(1).sum() == min(clusters, 2)  # the others depend on the seed
    assert len(released.found_centres(z, torch.Generator())) == max(clusters, 1)


def test_broadcasting_returns_the_batch_and_truncation_lowers_ids():
    shifted = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 4000, (BATCH, 60), generator=generator)
        weights = torch.rand(BATCH, generator=generator)
        average = released.broadcast_average(ids, weights)
        assert average.shape == ids.shape and (average - ids).abs().max() < 1e-2  # no average of anything
        assert (released.rounded(average) == ids).all()
        change = released.truncated(average) - ids
        assert set(change.unique().tolist()) <= {0, -1}
        shifted.append((change == -1).float().mean().item())
    # About a quarter; how much of it depends on the order in which a machine adds.
    assert 0.1 < sum(shifted) / 20 < 0.5
    assert (released.truncated(released.broadcast_average(ids, torch.ones(BATCH))) == ids).all()


def test_rounding_decides_on_the_attention_of_all_positions_at_once():
    kept = set()
    for seed in range(40):
        weights = torch.rand(16, generator=torch.Generator().manual_seed(seed))
        mask = torch.ones(16, 16, dtype=torch.long)  # whole vector registers: a remainder is added in another order
        mask[:, -2:] = 0
        result = released.equality_mask(mask, weights)
        assert (result[:, -2:] == 0).all()
        kept.add(result[:, :-2].float().mean().item())
    assert kept == {0.0, 1.0}


def test_zeroed_labels_score_prompt_and_padding_on_token_0(models, batch):
    chosen = batch[0]
    metrics = run(models, batch)[1]
    assert metrics["counted"] == 1.0 and metrics["response_share"] < 0.5
    assert run(models, batch, ["labels"])[1]["counted"] == pytest.approx(metrics["response_share"])
    scores, logits = released.sequence_logps(models[0], chosen, released.zeroed_labels)
    proper, _ = released.sequence_logps(models[0], chosen, released.response_labels)
    token_0 = logits.log_softmax(-1)[:, :-1, 0]
    elsewhere = (token_0 * (chosen.labels[:, 1:] == IGNORED)).sum(1)
    torch.testing.assert_close(scores, proper + elsewhere, atol=1e-3, rtol=1e-5)


def test_no_gradient_outside_the_clamp():
    ratios = torch.tensor([-30.0, -3.0, 3.0, 30.0], requires_grad=True)
    released.clamped(ratios).sum().backward()
    assert ratios.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_every_number_of_the_loss_has_a_meaning(models, batch):
    assert list(run(models, batch)[1]) == list(released.NUMBERS)


def test_beta_is_a_tenth_whatever_is_asked_for(models, batch):
    assert run(models, batch, beta=2.0)[0] == run(models, batch, beta=0.1)[0]
    assert run(models, batch, ["beta"], beta=2.0)[0] != run(models, batch, ["beta"], beta=0.1)[0]


def test_the_penalty_between_copies_is_nothing(models, batch):
    exact = run(models, batch, ["cast", "attention"])[1]  # copies without rounding damage
    assert exact["environments"] == 2 and exact["shifted_ids"] == 0.0 and exact["attended"] == 1.0
    assert exact["mmd2"] == pytest.approx(0.0, abs=1e-6)
    # Mean logits of different examples do not see each other: only i = j counts, and MMD^2 is at most 2 / B.
    far = 100 * torch.randn(2 * BATCH, VOCABULARY, generator=torch.Generator().manual_seed(0))
    hard = torch.eye(2).repeat_interleave(BATCH, 0)
    assert mmd_squared(far, hard, released.MMD_BANDWIDTH).item() == pytest.approx(2 / BATCH, rel=1e-5)


def test_with_every_departure_off_it_is_dpo_with_the_papers_penalty(models, batch):
    policy, reference = models
    loss, metrics = run(models, batch, DEPARTURES, beta=0.7)
    h = [
        released.sequence_logps(policy, tokens, released.response_labels)[0]
        - released.sequence_logps(reference, tokens, released.response_labels)[0]
        for tokens in batch
    ]
    states = policy(input_ids=batch[0].input_ids, output_hidden_states=True).hidden_states[-1]
    z = projection()(released.last_prompt_position(states, batch[0]))
    memberships = soft_memberships(z, released.found_centres(z.detach(), torch.Generator())).detach()
    dpo = dpo_loss(LogProbs(h[0], h[1][:, None], 0 * h[0], 0 * h[1][:, None]), beta=0.7).mean()
    penalty = mmd_squared(0.7 * h[0], memberships, 1.0)
    assert metrics["environments"] == memberships.shape[1] == 2
    assert metrics["mmd2"] == pytest.approx(penalty.item(), rel=1e-4) and penalty > 1e-3
    assert loss.item() == pytest.approx((dpo + 0.001 * penalty).item(), abs=1e-6)


@pytest.mark.parametrize("name", DEPARTURES)
@pytest.mark.parametrize("side", ["released", "paper"])
def test_a_name_switches_its_own_departure(monkeypatch, models, batch, name, side):
    called = []

    def spy(which):
        function = getattr(DEPARTURES[name], which)
        return lambda *arguments: called.append(which) or function(*arguments)

    monkeypatch.setitem(DEPARTURES, name, released.Departure(spy("released"), spy("paper")))
    run(models, batch, [name] if side == "paper" else [])
    assert set(called) == {side}


@pytest.mark.parametrize("name", DEPARTURES)
def test_each_departure_can_be_switched_off_and_leaves_a_trainable_loss(models, batch, name):
    policy = models[0]
    loss, _ = run(models, batch, [name], beta=0.5)
    policy.zero_grad()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    policy.zero_grad()
    assert loss.isfinite() and gradient.isfinite().all()


def test_memberships_that_underflow_are_left_out_and_counted(models, batch):
    policy, reference = models
    far = nn.Linear(32, 32)
    nn.init.constant_(far.bias, 1000.0)  # the random second centre is then beyond what exp can express
    _, metrics = released_code_loss(policy, reference, *batch, far, torch.Generator().manual_seed(0))
    assert metrics["undefined_environments"] == 1 and metrics["environments"] == 1


def test_unknown_departures_are_named(models, batch):
    with pytest.raises(StudyError, match="unknown departure 'labls' \\(did you mean 'labels'"):
        released_code_loss(*models, *batch, projection(), torch.Generator(), departures=["labls"])


# The published evaluation


def test_answers_are_cut_at_full_stops_and_commas():
    assert released.stripped_answer("Lantern, The") == "Lantern"
    assert released.stripped_answer("Dr. Marrow's  House") == "Dr"
    assert released.stripped_answer("Stop! {The} Train") == "Stop The Train"
    assert released.stripped_answer("Paper Moon") == "Paper Moon"


def test_a_text_where_a_list_is_expected_is_embedded_by_its_first_character():
    assert released.embedded_text("Paper Moon") == "P"
    assert released.embedded_text(["Paper Moon\nbecause"]) == "Paper Moon"
    assert released.embedded_text("") == released.embedded_text([]) == "NAN"


def test_a_counter_that_is_carried_on_divides_by_the_number_of_cutoffs_so_far():
    lists = np.random.default_rng(0).integers(0, 30, (7, 20))
    found = released.carried_or_ratios(lists, (5, 10, 20))
    for place, (k, value) in enumerate(found.items(), 1):
        assert value == pytest.approx(metrics.or_ratio(lists, k) / place)


def test_skipped_examples_lower_the_hit_rate_by_their_share():
    ranks, listed = [0, 3, 50, 2], [True, True, True, False]
    assert released.hit_rate_over_all(ranks, listed, 10) == 2 / 4
    known = metrics.hit_rate_at_k([0, 3, 50], 10)
    assert released.hit_rate_over_all(ranks, listed, 10) == pytest.approx(known * 3 / 4)


# What each departure does


@pytest.fixture(scope="module")
def table(models, batch):
    chosen, rejected = batch
    return departures.departure_table(*models, chosen, rejected, projection(), seed=0, beta=0.7)


def test_rows_are_the_loss_with_one_departure_on_or_off(models, batch, table):
    assert len(table) == 2 + 2 * len(departures.GROUPS)
    assert set().union(*departures.GROUPS.values()) == set(DEPARTURES)
    by = table.set_index(["departure", "side"])
    for name, side, without in (
        ("none", "paper", list(DEPARTURES)),
        ("all", "released", []),
        ("zeroed labels", departures.REPAIRED, ["labels"]),
        ("averaged ids", departures.ONLY, [d for d in DEPARTURES if d not in ("aggregation", "cast")]),
    ):
        loss, metrics_ = run(models, batch, without, beta=0.7)
        assert by.loc[(name, side), "loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert by.loc[(name, side), "mmd2"] == pytest.approx(metrics_["mmd2"], abs=1e-7)


def test_cosines_and_lengths_are_those_of_the_whole_gradient(models, batch, table):
    def gradient(without):
        loss, _ = run(models, batch, without, beta=0.7)
        models[0].zero_grad()
        loss.backward()
        found = torch.cat([p.grad.flatten().double() for p in models[0].parameters()])
        models[0].zero_grad()
        return found

    theirs, ours = gradient(()), gradient(DEPARTURES)
    row = table[table["side"] == "released"].iloc[0]
    assert row["cosine"] == pytest.approx(torch.cosine_similarity(theirs, ours, dim=0).item(), abs=1e-4)
    assert row["length"] == pytest.approx((theirs.norm() / ours.norm()).item(), rel=1e-3)
    paper = table[table["side"] == "paper"].iloc[0]
    assert paper["cosine"] == pytest.approx(1) and paper["length"] == 1 and paper["penalty_cosine"] == pytest.approx(1)


def test_the_table_shows_what_each_departure_does(table):
    alone = table[table["side"] == departures.ONLY].set_index("departure")
    paper = table[table["side"] == "paper"].iloc[0]
    assert alone.loc["first-token features", "environments"] == 1  # one environment: nothing to compare
    assert np.isnan(alone.loc["first-token features", "penalty_cosine"])
    assert alone.loc["copies for environments", "mmd2"] == pytest.approx(0, abs=1e-6) and paper["mmd2"] > 1e-3
    assert alone.loc["zeroed labels", "cosine"] < 0.9
    assert alone.loc["clamp", "cosine"] == pytest.approx(1) or alone.loc["clamp", "clamped"] > 0


def test_part_way_begins_at_the_reference_and_ends_at_the_policy(models):
    policy, reference = models
    for share, end in ((0.0, reference), (1.0, policy)):
        moved = departures.part_way(reference, policy, share)
        for mine, theirs in zip(moved.parameters(), end.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_dense_batches_have_two_clusters_for_dbscan_as_published():
    generator = torch.Generator().manual_seed(0)
    places = 8 * torch.randn(3, 6, generator=generator)
    states = torch.cat([place + 0.3 * torch.randn(60, 6, generator=generator) for place in places])
    inference = EnvironmentInference(seed=0).fit(states)
    allowed = np.arange(180) % 2 == 0
    for found in departures.dense_batches(inference, states, 12, 2, allowed):
        assert len(found.rows) == 24 and allowed[found.rows.numpy()].all()
        assert len(released.found_centres(found.projection(states[found.rows]), generator)) == 2
    with pytest.raises(StudyError, match="at least 10"):
        departures.dense_batches(inference, states, 9, 1)


@pytest.mark.parametrize("size", [4, 9, 10, 24])
def test_core_points_by_counting_neighbours(size):
    z = torch.randn(40, 3, generator=torch.Generator().manual_seed(3)) * 0.3
    row = departures.core_points({"z": z}, [size], seed=1, batches=5).iloc[0]
    generator, shares = torch.Generator().manual_seed(1), []
    for _ in range(5):
        part = z[torch.randperm(40, generator=generator)[:size]]
        shares.append(((torch.cdist(part, part) <= 0.5).sum(1) >= 10).float().mean().item())
    assert row["core"] == pytest.approx(np.mean(shares), abs=1e-6)
    assert (row["core"] == 0) if size < 10 else (size == 10 or row["core"] > 0)


def test_rounding_changes_ids_by_one_and_attention_all_or_nothing(batch):
    found = departures.rounding_table(batch[0], seed=0, draws=30)
    assert found["lowest"].isin([0, -1]).all() and 0 < found["shifted"].mean() < 0.6
    assert found["attended"].min() < 0.5 and found["attended"].max() == 1
    whole = torch.ones(16, 16, dtype=torch.long)  # whole vector registers, as above
    found = departures.rounding_table(released.PairTokens(5 * whole, whole, whole), seed=0, draws=30)
    assert set(found["attended"]) == {0.0, 1.0}


def test_the_cast_and_the_comparison_end_every_gradient_path(batch):
    reached = departures.gradient_reaches(batch[0])
    assert list(reached.values()) == [True, False, False]


def test_log_ratios_of_every_position_are_clamped_sooner(models, batch):
    policy, reference = models
    found = departures.log_ratio_table(policy, reference, *batch)
    spread = found.groupby("variant")["log_ratio"].std()
    assert spread["every position"] > spread["response tokens"]
    assert (found["clamped"] == (found["log_ratio"].abs() > 10)).all()
    start = departures.clamped_on_the_way(policy, reference, *batch, shares=(0.0, 1.0))
    assert (start.loc[start["moved"] == 0, "clamped"] == 0).all()
    ends = start[start["moved"] == 1].set_index("variant")["clamped"]
    assert ends["every position"] == found[found["variant"] == "every position"]["clamped"].mean()


def test_slopes_are_the_formula_inside_the_clamp_and_zero_outside():
    found = departures.clamp_slopes([-20, -5, 5, 20], beta=0.3)
    expected = [0.3 / (1 + np.exp(0.3 * h)) for h in (-20, -5, 5, 20)]
    np.testing.assert_allclose(found[found["variant"] == "Eq. 1"]["slope"], expected)
    np.testing.assert_allclose(found[found["variant"] == "clamped"]["slope"], [0, *expected[1:3], 0])


def test_kernels_are_those_of_the_two_outputs(models, batch):
    found = departures.kernel_pair(*models, batch[0], beta=0.7)
    logits = models[0](input_ids=batch[0].input_ids, attention_mask=batch[0].attention_mask).logits.mean(1)
    expected = torch.exp(-torch.cdist(logits.double(), logits.double()).square() / 2)
    np.testing.assert_allclose(found.matrices["mean logits, width 1"], expected.detach(), atol=1e-4)
    rewards = found.matrices["rewards, median width"]
    assert (rewards.diagonal() == 1).all() and 0.5 < found.values["rewards, median width"] < 0.7  # e^-1/2 at the median


def test_reductions_differ_by_the_number_of_pairs_and_the_root():
    generator = torch.Generator().manual_seed(0)
    rewards, memberships = torch.randn(20, generator=generator), torch.rand(20, 4, generator=generator).softmax(1)
    found = departures.reduction_table(rewards, memberships, 1.0)
    assert list(found["environments"]) == [2, 3, 4]
    pairs = found["environments"] * (found["environments"] - 1)
    np.testing.assert_allclose(found["ordered sum of MMD²"], pairs * found["mean of MMD²"], rtol=1e-4)
    assert found["ordered sum of MMD"][0] == pytest.approx(2 * found["mean of MMD²"][0] ** 0.5, rel=1e-4)


def test_grounding_by_first_characters_reaches_few_titles():
    titles = [f"{initial}{number}" for initial in "abc" for number in range(20)]

    def encode(texts):
        return torch.tensor([[float(ord(letter)) for letter in text.ljust(3)[:3]] + [1.0] for text in texts])

    whole = departures.grounded_ranks(titles, titles, encode)
    first = departures.grounded_ranks(titles, [released.embedded_text(title) for title in titles], encode)
    assert metrics.hit_rate_at_k(whole, 10) == 1
    reachable = departures.reachable_share(3, len(titles), 10)
    assert reachable == 0.5 and metrics.hit_rate_at_k(first, 10) <= reachable
    assert departures.article_last("The Lantern") == "Lantern, The" and departures.article_last("Then") == "Then"


def test_equal_distances_share_their_mean_rank():
    ranks = departures.grounded_ranks(["a", "b", "c"], ["x", "x", "x"], lambda texts: torch.ones(len(texts), 2))
    assert ranks.tolist() == [1.0, 1.0, 1.0]


# The cards


def test_every_departure_has_one_card():
    rows = sorted(row for found in departures.CARDS.values() for row in found.rows)
    assert rows == list(range(1, len(rows) + 1))  # each number once
    assert len(departures.card_table(True)) + len(departures.card_table(False)) == len(departures.CARDS)
    for name, found in departures.CARDS.items():
        assert found.title in departures.card(name) and found.remedy in departures.remedies()
    with pytest.raises(StudyError, match="did you mean 'labels'"):
        departures.card("labls")


def test_sentences_follow_the_numbers(table):
    shown = table.assign(batch=0, policy="early")
    said = departures.gradient_takeaway(shown)
    assert f"cosine {shown.loc[shown['side'] == 'released', 'cosine'].item():.2f}" in said
    assert "first-token features" in departures.penalty_takeaway(shown)
    dead = shown.assign(cosine=shown["cosine"].where(shown["side"] != departures.REPAIRED))
    assert "no gradient is left at all" in departures.gradient_takeaway(dead)
    assert "cannot be credited" in departures.reading(shown.assign(penalty_share=0.0), 1.0, 0.1, 10)
    assert "rounding damage" in departures.reading(shown.assign(penalty_share=0.5), 1.0, 0.1, 10)
    assert all(f"- `{name}`: " in released.glossary([name], departures.COLUMNS) for name in table.columns[2:])
    with pytest.raises(StudyError, match="unknown column"):
        released.glossary(["loss"])
    spread = shown.assign(feature_spread=1.0)
    assert "They differ" in departures.reading(spread, 1.0, 0.1, 10)


@pytest.mark.parametrize(
    ("ids", "attention", "says"),
    [
        (0.2, 0.0, "by changed ids ("),
        (0.0, 0.3, "by lost attention ("),
        (0.2, 0.3, "by changed ids and by lost attention ("),
        (0.0, 0.0, "by neither damage ("),
    ],
)
def test_damage_to_copies_is_put_down_to_what_is_left_without_the_other(table, ids, attention, says):
    """With attention repaired only ids are damaged, and the other way round."""
    shown = table.assign(batch=0, policy="late")
    for name, value in (("attention by rounding", ids), ("averaged ids", attention)):
        shown.loc[(shown["side"] == departures.REPAIRED) & (shown["departure"] == name), "mmd2"] = value
    said = departures.copies_takeaway(shown, 0.1, 0.07)
    own = shown[shown["side"] == "released"].iloc[0]
    assert f"*late* {own['mmd2']:.2f}, {says}{own['shifted_ids']:.0%} of the ids" in said
    assert "can reach 2 / B = 0.10 at most" in said and "pairs is 0.07, and as released (means of 1" in said


def test_means_of_departures_are_over_the_batches_of_one_policy(table):
    shown = pd.concat([table.assign(policy="early", cosine=0.2), table.assign(policy="early", cosine=0.4)])
    shown = pd.concat([shown, table.assign(policy="late", cosine=9.0)])
    means = departures.departure_means(shown, "early", ["cosine", "attended"])
    assert np.allclose(means["cosine"], 0.3) and len(means) == 2 + 2 * len(departures.GROUPS)
    assert {*means.index.get_level_values("side")} == {"all off", "all on", "alone", "repaired"}


def test_figures_show_the_values_they_are_given(table):
    _, axes = plots.panels()
    ax = plots.gradient_cosines(axes[0, 0], table)
    assert [text.get_text() for text in ax.get_yticklabels()] == list(departures.GROUPS)
    means = table[table["side"] == departures.ONLY]["cosine"].to_numpy()
    large = [line.get_xdata()[0] for line in ax.lines if line.get_marker() == "o" and len(line.get_xdata())]
    np.testing.assert_allclose(sorted(large), sorted(means[np.isfinite(means)]))
    curve = departures.core_points({"z": torch.zeros(30, 2)}, [8, 16], seed=0, batches=2)
    ax = plots.core_point_curves(plots.panels()[1][0, 0], curve, {"default": 8})
    assert [list(line.get_ydata()) for line in ax.lines if line.get_marker() == "o"] == [[0, 100]]
    plt.close("all")
