"""What a split is like: every number against a loop or a value worked by hand, and the words against made shifts."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from causaldpo_lib.data import load_dataset
from causaldpo_lib.description import (
    SITTING,
    describe,
    describe_by_split,
    kind_of_shift,
    kinds_of_shift,
    kl_to_uniform,
    sittings,
)
from causaldpo_lib.splits import SPLIT_NAMES, SPLITS, histories, make_split, popularity_groups

SIMULATED = load_dataset("simulated", users=150, items=80, length=25)


def catalogue(split: pd.DataFrame) -> pd.DataFrame:
    """The items of a split table with their training counts and groups."""
    items = pd.Index(sorted(split["item"].unique()))
    return popularity_groups(split.loc[split["split"] == "train", "item"].value_counts().reindex(items, fill_value=0))


def made(shift: str, **options) -> pd.DataFrame:
    return make_split(shift, SIMULATED, 0, **options)


OPTIONS = {"exposure": {"variant": "propensity"}}


# --- numbers ---


@pytest.mark.parametrize("shift", list(SPLITS))
def test_every_number_of_a_split_is_what_a_loop_counts(shift):
    split = made(shift, **OPTIONS.get(shift, {}))
    items = catalogue(split)
    examples = histories(split)
    found = describe_by_split(split, items, examples)
    assert tuple(found["split"]) == SPLIT_NAMES
    rows = list(split.to_dict("records"))
    train = [row for row in rows if row["split"] == "train"]
    count = {item: sum(row["item"] == item for row in train) for item in items["item"]}
    last = max(row["time"] for row in train)
    own = {user: max(row["time"] for row in train if row["user"] == user) for user in {row["user"] for row in train}}
    group = dict(zip(items["item"], items["group_mass"], strict=True))
    for row in found.to_dict("records"):
        mine = [each for each in rows if each["split"] == row["split"]]
        size = len(mine)
        assert row["interactions"] == size
        assert row["users"] == len({each["user"] for each in mine})
        assert row["density"] == pytest.approx(size / (row["users"] * len({each["item"] for each in mine})))
        assert row["popularity"] == np.median([count[each["item"]] for each in mine])
        assert row["new_items"] == pytest.approx(sum(count[each["item"]] == 0 for each in mine) / size)
        assert row["new_users"] == pytest.approx(sum(each["user"] not in own for each in mine) / size)
        assert row["later"] == pytest.approx(sum(each["time"] > last for each in mine) / size)
        later = sum(each["time"] > own.get(each["user"], -math.inf) for each in mine)
        assert row["later_than_own"] == pytest.approx(later / size)
        shares = [sum(group[each["item"]] == name for each in mine) / size for name in ("G1", "G2", "G3", "G4", "G5")]
        assert row["kl_mass"] == pytest.approx(sum(p * math.log(5 * p) for p in shares if p))
        of_items = sorted(sum(each["item"] == item for each in mine) for item in {each["item"] for each in mine})
        differences = sum(abs(a - b) for a in of_items for b in of_items)
        assert row["gini"] == pytest.approx(differences / (2 * len(of_items) * size))
        lengths = [len(history) for history in examples.loc[examples["split"] == row["split"], "history"]]
        assert (row["examples"], row["history"]) == (len(lengths), pytest.approx(np.mean(lengths)))


def test_the_whole_is_described_beside_the_splits():
    split = made("iid")
    found = describe(split, catalogue(split))
    assert found["interactions"] == len(split) and found["timed"] is True
    assert found["density"] == len(split) / (found["users"] * found["items"])
    by_split = describe_by_split(split, catalogue(split)).set_index("split")
    assert found["ood_test_gini"] == by_split.loc["ood_test", "gini"]
    shares = pd.crosstab(split["split"], split["environment"], normalize="index")
    moved = (shares.loc["iid_test"] - shares.loc["ood_test"]).abs().sum() / 2
    assert found["environment_distance"] == pytest.approx(moved)


def test_divergence_from_uniform_by_hand():
    assert kl_to_uniform(np.full(5, 0.2)) == pytest.approx(0, abs=1e-12)
    assert kl_to_uniform(np.array([1.0, 0, 0, 0, 0])) == pytest.approx(math.log(5))
    assert kl_to_uniform(np.array([0.5, 0.5, 0, 0, 0])) == pytest.approx(math.log(2.5))


def table(**columns) -> pd.DataFrame:
    return pd.DataFrame(columns).assign(split="train", item=range(len(columns["user"])))


def test_cuts_inside_a_sitting_by_hand():
    """Of five interactions the last one is cut off: after a minute for user 1, after two hours for user 2."""
    times = [0, 10, 20, 30, 90, 0, 10, 20, 30, 30 + 2 * SITTING, 7, 7, 7, 7, 7]
    users = [1] * 5 + [2] * 5 + [3] * 5  # all of user 3's have one time: no cut
    assert sittings(table(user=users, time=times)) == (2, 0.5)
    edge = [0, 10, 20, 30, 30 + SITTING, 0, 10, 20, 30, 29 + SITTING]
    assert sittings(table(user=[1] * 5 + [2] * 5, time=edge)) == (2, 0.5)
    count, share = sittings(table(user=[1, 1]))
    assert count == 0 and math.isnan(share)


def test_imputed_rows_count_as_targets_but_not_for_times():
    split = made("iid")
    added = split[split["split"] == "ood_test"].head(200).assign(time=split["time"].max() + 1, imputed=True)
    added["item"] = split["item"].max() + 1
    both = pd.concat([split.assign(imputed=False), added], ignore_index=True)
    plain, found = (describe(s, catalogue(s)) for s in (split, both))
    assert found["ood_test_imputed"] == pytest.approx(200 / found["ood_test_interactions"])
    assert found["ood_test_interactions"] == plain["ood_test_interactions"] + 200
    assert found["ood_test_later"] == plain["ood_test_later"] and found["sitting"] == plain["sitting"]
    assert "imputed exposure" in kinds_of_shift(found)


def test_without_times_nothing_is_said_about_them():
    split = made("popularity").drop(columns="time")
    found = describe(split, catalogue(split))
    assert found["timed"] is False and found["cuts"] == 0 and math.isnan(found["ood_test_later"])
    assert "towards less popular items" in kinds_of_shift(found)
    assert "temporal" not in kind_of_shift(found)


# --- words ---


@pytest.mark.parametrize(
    ("shift", "options", "kinds"),
    [
        ("iid", {}, set()),
        ("popularity", {}, {"towards less popular items"}),
        ("temporal", {}, {"temporal, one cut for all", "other environments"}),
        ("environment", {}, {"temporal, one cut for all", "other environments"}),
        ("mixed", {}, {"partly temporal", "towards less popular items"}),
        ("exposure", {"variant": "propensity"}, {"towards less popular items"}),
    ],
)
def test_the_kind_of_shift_is_read_from_the_numbers(shift, options, kinds):
    split = made(shift, **options)
    found = kinds_of_shift(describe(split, catalogue(split)))
    assert kinds <= set(found)
    if not kinds:
        assert not found and kind_of_shift(describe(split, catalogue(split))).startswith("no shift to be seen")
    assert all(name in kind_of_shift(describe(split, catalogue(split))) for name in found)


def test_a_cut_per_user_is_told_from_one_for_all():
    """Users come one after another, so that a cut in each one's own time is none in everybody's."""
    rows = SIMULATED.table[SIMULATED.table["regime"] == 0].copy()
    rows["time"] = rows["time"].rank(method="dense").astype(int) + 10**6 * rows["user"].rank(method="dense").astype(int)
    split = rows[["user", "item", "time"]].assign(split="train")
    late = SPLITS["temporal"].rule(split.reset_index(drop=True), np.random.default_rng(0), scope="user")
    names = np.random.default_rng(0).choice(SPLIT_NAMES[:3], len(split), p=[0.7, 0.1, 0.2])
    split["split"] = np.where(late, "ood_test", names)
    found = kinds_of_shift(describe(split, catalogue(split)))
    assert "temporal, a cut per user" in found and "temporal, one cut for all" not in found


def test_new_users_and_new_items_are_said():
    split = made("iid")
    tested = split["split"].eq("ood_test")
    strangers = tested & (tested.cumsum() % 10 == 0)
    for column in ("user", "item"):
        moved = split.astype({column: str})
        moved.loc[strangers, column] = [f"new {i % 3}" for i in range(strangers.sum())]
        assert set(kinds_of_shift(describe(moved, catalogue(moved)))) >= {f"new {column}s"}
        share = 1 - moved.loc[tested, column].isin(moved.loc[moved["split"] == "train", column]).mean()
        assert f"{share:.0%} of the OOD interactions" in kind_of_shift(describe(moved, catalogue(moved)))
