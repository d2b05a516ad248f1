"""Recovery of known environments: agreement and its chance level, clusterers, probe, batches, command, sentences."""

import json
import shutil
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score

from causaldpo_lib import packing, plots, prompts, recovery
from causaldpo_lib import study as studies
from causaldpo_lib.backbone import load_checkpoint, save_checkpoint
from causaldpo_lib.environments import EnvironmentInference
from causaldpo_lib.errors import StudyError
from causaldpo_lib.paths import NOTEBOOKS
from causaldpo_lib.recovery import TRUTH

COLUMNS = {
    "recovery": "setting strength seed features clusterer environments noise_share membership_entropy method prompts "
    "target ami nmi ari null p",
    "recovery_probe": "setting strength seed features accuracy majority information ami p prompts",
    "recovery_batch": "setting strength seed rule size batches several noise_share environments target ami",
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    yield
    plt.close("all")


def blobs(separation, count=600, classes=3, width=6, seed=0):
    """Classes, and features around a centre of their own, as far apart as ``separation``."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(classes, size=count)
    return truth, separation * np.eye(width)[truth] + rng.normal(size=(count, width))


# Agreement


def test_agreement_is_sklearn_s_for_every_rearrangement():
    rng = np.random.default_rng(0)
    labels, truths = rng.integers(4, size=60), np.stack([rng.permutation(np.arange(60) % 3) for _ in range(20)])
    expected = [adjusted_mutual_info_score(labels, truth) for truth in truths]
    np.testing.assert_allclose(recovery.ami_of(labels, truths), expected, atol=1e-10)
    assert not recovery.ami_of(np.zeros(60, dtype=int), truths).any()


def test_sequences_are_dealt_whole_among_users_of_equal_length():
    users = np.array([5, 5, 5, 2, 2, 9, 9, 9, 1, 7, 7])
    rows = recovery.dealt(users, draws=60)
    assert rows.shape == (60, 11) and (np.sort(rows, axis=1) == np.arange(11)).all()
    assert {tuple(row[:3]) for row in rows} == {tuple(row[5:8]) for row in rows} == {(0, 1, 2), (5, 6, 7)}
    assert {tuple(row[3:5]) for row in rows} == {(3, 4), (9, 10)} and set(rows[:, 8]) == {8}


def test_the_same_partition_agrees_fully_and_one_dealt_at_random_by_chance():
    truth = np.random.default_rng(0).integers(4, size=900)
    rows = recovery.dealt(np.repeat(np.arange(300), 3))
    same = recovery.agreement(3 - truth, truth, rows)
    assert same.ami == pytest.approx(1) and same.nmi == pytest.approx(1) and same.ari == pytest.approx(1)
    assert same.p == pytest.approx(1 / (1 + recovery.DRAWS)) and same.null < 0.05
    other = recovery.agreement(np.random.default_rng(1).permutation(truth), truth, rows)
    assert abs(other.ami) < 0.02 and other.p > 0.05


def test_chance_is_larger_where_a_user_has_one_cluster_and_one_environment():
    """Rows of one user are alike: a null that deals rows would call the chance agreement of users a finding."""
    rng, users = np.random.default_rng(0), np.repeat(np.arange(60), 10)
    rows, above = recovery.dealt(users, draws=99), 0
    for _ in range(40):
        labels, truth = rng.integers(3, size=60)[users], rng.integers(3, size=60)[users]
        above += recovery.agreement(labels, truth, rows).p <= 0.05
    assert above <= 6  # 2 expected; a null of single rows gives most of the 40
    single = [adjusted_mutual_info_score(labels, rng.permutation(truth)) for _ in range(50)]
    assert np.quantile(single, 0.95) < recovery.agreement(labels, truth, rows).null / 3


def test_users_of_whom_no_two_are_alike_are_refused():
    with pytest.raises(StudyError, match="no two of 2 users have as many prompts"):
        recovery.dealt(np.array([1, 1, 2]))


# Clusterers


def test_separate_blobs_are_recovered_and_no_blobs_are_not():
    truth, features = blobs(20.0)
    found = recovery.clusterings(features, 3, seed=0)
    assert list(found) == list(recovery.CLUSTERERS)
    for name in ("knee", "hdbscan", "kmeans", "gmm"):
        assert adjusted_mutual_info_score(truth, found[name].labels) == pytest.approx(1), name
        assert found[name].environments == 3
    assert found["kmeans_more"].environments == recovery.MORE
    assert found["released"].environments == 1 and found["released"].noise_share == 1  # 0.5 is nothing in 6 dimensions
    truth, features = blobs(0.0)
    for name, clustering in recovery.clusterings(features, 3, seed=0).items():
        assert abs(adjusted_mutual_info_score(truth, clustering.labels)) < 0.03 or clustering.environments == 1, name


def test_the_released_radius_is_in_units_of_the_states():
    truth, features = blobs(20.0, width=3)
    assert recovery.clusterings(features, 3, seed=0)["released"].noise_share > 0.5
    found = recovery.clusterings(features / 10, 3, seed=0)["released"]
    assert found.environments == 3 and adjusted_mutual_info_score(truth, found.labels) == pytest.approx(1)
    assert "released" not in recovery.clusterings(features, 3, seed=0, fixed=False)


def test_noise_belongs_to_the_nearest_centre_and_no_cluster_is_one_environment():
    z = np.array([[0.0], [0.2], [9.0], [9.2], [2.0], [8.0]])
    found = recovery.described(z, np.array([0, 0, 1, 1, -1, -1]), "given")
    assert found.labels.tolist() == [0, 0, 1, 1, 0, 1] and found.noise_share == pytest.approx(1 / 3)
    assert found.membership_entropy == pytest.approx(0, abs=1e-6)  # distances of 0.1 to own centres are the temperature
    alone = recovery.described(z, np.array([0, 0, 0, -1, -1, -1]), "given")
    assert alone.environments == 1 and not alone.labels.any() and alone.noise_share == 0.5


# Features


def test_states_are_those_that_alignment_clusters_and_the_first_token_says_nothing(tiny, rows):
    model, tokenizer = tiny
    texts = [row["prompt"] for row in rows]
    states = recovery.prompt_states(model, tokenizer, texts, batch_size=5)
    encoded = prompts.encode_prompts(tokenizer, texts, packing.context_of(model) - 1)
    scores = packing.score_dataset(model, encoded, [[[tokenizer.eos_token_id]]] * len(encoded), 0, 7)
    np.testing.assert_allclose(states["last"], scores.prompt_states.numpy(), atol=1e-4)
    with torch.no_grad():
        alone = packing.decoder_and_head(model)[0](torch.tensor([encoded[3]])).last_hidden_state[0]
    np.testing.assert_allclose(states["mean"][3], alone.mean(0).numpy(), atol=1e-4)
    assert recovery.distinct(states["last"]) and recovery.distinct(states["mean"])
    assert not recovery.distinct(states["first"])
    for name, found in recovery.clusterings(states["first"], 3, seed=0).items():
        assert (found.environments, found.noise_share, found.method) == (1, 0, "identical features"), name
    assert recovery.probe(states["first"], np.arange(24) % 3, np.arange(24), np.zeros((1, 24), int))["ami"] == 0


def test_bags_hold_shares_of_the_history():
    examples = pd.DataFrame({"history": [[7, 8, 7], [9]]})
    items = pd.DataFrame({"item": [9, 8, 7], "genres": ["War|Crime", "Crime", "Horror"]})
    found = recovery.history_bags(examples, items)
    np.testing.assert_allclose(found["items"], [[0, 1 / 3, 2 / 3], [1, 0, 0]])
    np.testing.assert_allclose(found["genres"], [[1 / 3, 2 / 3, 0], [0, 0, 1]])  # Crime, Horror, War
    assert list(recovery.history_bags(examples, items[["item"]])) == ["items"]


# Probe


def test_the_probe_reads_what_is_there_and_nothing_else():
    truth, features = blobs(6.0)
    users = np.arange(len(truth)) // 4
    rows = recovery.dealt(users)
    found = recovery.probe(features, truth, users, rows)
    assert found["accuracy"] > 0.95 and found["ami"] > 0.9 and found["information"] > 0.7 and found["p"] < 0.01
    none = recovery.probe(np.random.default_rng(1).permutation(features), truth, users, rows)
    assert none["accuracy"] < none["majority"] + 0.03 and none["information"] < 0.01 and abs(none["ami"]) < 0.02
    assert none["p"] > 0.05


def test_the_probe_is_not_fitted_on_the_users_that_it_is_tested_on():
    """A user's own mark, equal in all prompts, gives an environment away only within the user."""
    rng = np.random.default_rng(0)
    truth, users = rng.integers(2, size=40).repeat(8), np.arange(40).repeat(8)
    features = rng.normal(size=(40, 60)).repeat(8, axis=0)
    rows = recovery.dealt(users, draws=9)
    assert recovery.probe(features, truth, users, rows)["information"] < 0.05
    assert recovery.probe(features, truth, np.arange(320), rows)["accuracy"] > 0.9  # had prompts been dealt singly


# Batches


def test_the_probe_says_nothing_where_there_is_nothing_to_find():
    truth, features = blobs(20.0, count=60)
    rows = recovery.dealt(np.arange(60), draws=9)
    for classes, users in (
        (np.zeros(60, dtype=int), np.arange(60)),  # one environment
        (truth, np.zeros(60, dtype=int)),  # one user
        (np.arange(60) % 2, np.arange(60) % 2),  # two users with an environment each: a fit sees only one
    ):
        found = recovery.probe(features, classes, users, rows)
        assert found["accuracy"] == found["majority"] == np.bincount(classes).max() / 60
        assert (found["information"], found["ami"], found["p"]) == (0, 0, 1)


def test_fewer_users_than_folds_are_a_fold_each():
    truth, features = blobs(20.0, count=60)
    users = np.repeat(np.arange(3), 20)
    found = recovery.probe(features, truth, users, recovery.dealt(users, draws=9))
    assert found["accuracy"] > 0.9 and found["ami"] > 0.8


def test_batches_are_whole_and_few_points_are_no_clusters():
    truth, features = blobs(20.0, count=300)
    rows = pd.DataFrame(recovery.batch_rows(features.astype(np.float32), truth, {TRUTH: truth}, 0, (16, 128, 512)))
    assert set(rows["size"]) == {16, 128} and set(rows["rule"]) == set(recovery.RULES)
    assert set(rows.loc[rows["size"] == 16, "batches"]) == {18} and set(rows.loc[rows["size"] == 128, "batches"]) == {2}
    once = rows[rows["rule"] == "once"]
    assert np.allclose(once["ami"], 1) and once["noise_share"].isna().all()
    released = rows[rows["rule"] == "released"]
    assert (released["several"] == 0).all() and (released["ami"] == 0).all() and (released["noise_share"] > 0.9).all()
    large = rows[(rows["rule"] == "batch") & (rows["size"] == 128)].iloc[0]
    assert large["several"] == 1 and large["ami"] > 0.5


# The command


def write_run(folder, stage, parameters):
    folder.mkdir(parents=True)
    config = {"stage": stage, "setting": "simulated-environment", "name": folder.name, "parameters": parameters}
    (folder / "config.json").write_text(json.dumps({**config, "inputs": {}}))
    (folder / "summary.json").write_text(json.dumps({**config, "inputs": {}, "code": "none", "scalars": {}}))


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny, items):
    """A study of two settings, one of them simulated with a tiny random model, and its tables."""
    root = tmp_path_factory.mktemp("recovery")
    rng = np.random.default_rng(0)
    data = SimpleNamespace(
        stage="data", setting="weak", seed=None, method=None, label="data (weak)", folder=root / "data"
    )
    data.parameters = {"dataset": "simulated", "dataset_options": {"strength": 1.5}}
    other = SimpleNamespace(**{**vars(data), "setting": "real", "folder": root / "nothing"})
    other.parameters = {"dataset": "ml-100k", "dataset_options": {}}
    write_run(data.folder, "data", data.parameters)
    catalogue = items.assign(genres=np.resize(["War", "Crime", "Horror"], len(items)))
    catalogue["group_mass"] = np.resize(["G1", "G2"], len(items))
    catalogue.to_parquet(data.folder / "items.parquet")
    count = 120
    examples = pd.DataFrame({"example": range(count), "split": ["train", "ood_test"] * (count // 2)})
    examples["user"] = np.arange(count) // 4
    examples["item"] = rng.choice(items["item"], count)
    examples["history"] = [rng.choice(items["item"], 1 + n % 3).tolist() for n in range(count)]
    examples["time"], examples["environment"] = np.arange(count) * 60, rng.integers(3, size=count)
    examples.sample(frac=1, random_state=0).to_parquet(data.folder / "examples.parquet")
    jobs = [data, other]
    for seed in (1, 2):
        folder = root / f"sft-s{seed}"
        write_run(folder, "sft", {})
        save_checkpoint(*tiny, folder / "checkpoint")
        name = f"sft seed {seed} (weak)"
        jobs.append(SimpleNamespace(stage="sft", setting="weak", seed=seed, method=None, label=name, folder=folder))
    jobs.append(SimpleNamespace(stage="align", setting="weak", seed=1, method="dpo", label="dpo", folder=root / "dpo"))
    study = SimpleNamespace(name="made", folder=root / "results", jobs=jobs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "jobs", lambda study: study.jobs)
        paths = recovery.write(study, limit=50)
    assert [path.stem for path in paths] == list(recovery.TABLES)
    return study


@pytest.fixture
def laid_out(made, monkeypatch):
    monkeypatch.setattr(studies, "jobs", lambda study: study.jobs)
    monkeypatch.setattr(studies, "load_study", lambda name: made)
    return made


def test_tables_have_their_columns_and_a_row_per_combination(made):
    tables = {name: pd.read_csv(made.folder / f"{name}.csv") for name in recovery.TABLES}
    assert {name: list(table) for name, table in tables.items()} == {name: c.split() for name, c in COLUMNS.items()}
    rows = tables["recovery"]
    assert set(rows["setting"]) == {"weak"} and set(rows["strength"]) == {1.5} and set(rows["prompts"]) == {50}
    assert set(rows["target"]) == set(recovery.TARGETS)
    per_target = rows[rows["target"] == TRUTH]
    assert len(per_target) == 2 * 3 * len(recovery.CLUSTERERS) + 2 * (len(recovery.CLUSTERERS) - 1)
    assert set(rows.loc[rows["seed"].isna(), "features"]) == set(recovery.BAGS)
    assert set(rows["environments"]) <= set(range(1, 51)) and rows["ami"].between(-1, 1).all()
    assert len(tables["recovery_probe"]) == 2 * 3 + 2
    assert set(tables["recovery_batch"]["size"]) == {16, 32}


def test_unfinished_runs_are_named(laid_out, capsys):
    left = laid_out.jobs[3].folder / "summary.json"
    left.rename(left.with_suffix(".away"))
    try:
        assert recovery.main(["made"]) == 1
    finally:
        left.with_suffix(".away").rename(left)
    said = capsys.readouterr().err
    assert said == "error: study made: not finished: sft seed 2 (weak): run `make study STUDY=made` first\n"


def test_a_sample_is_clustered_as_an_alignment_of_its_seed_and_size_clusters_it(made):
    data, sft = (job.folder for job in (made.jobs[0], made.jobs[2]))
    found = recovery.by_sample(data, sft, sizes=(40, 50, 1000, 2000), seeds=(1, 2))
    assert found[["prompts", "seed"]].to_numpy().tolist() == [[n, seed] for n in (40, 50, 60) for seed in (1, 2)]
    examples = pd.read_parquet(data / "examples.parquet")
    train = examples[examples["split"] == "train"]
    own = train.iloc[np.sort(np.random.default_rng(2).choice(len(train), 40, replace=False))]  # as stages.align draws
    titles = pd.read_parquet(data / "items.parquet").set_index("item")["title"]
    model, tokenizer = load_checkpoint(sft / "checkpoint")
    texts = prompts.prompt_table(own, titles)["prompt"].tolist()
    states = recovery.prompt_states(model, tokenizer, texts)["last"]
    inference = EnvironmentInference(seed=2).fit(states)
    row = found[(found["prompts"] == 40) & (found["seed"] == 2)].iloc[0]
    expected = inference.diagnostics(inference.memberships(states))
    assert row["membership_entropy"] == pytest.approx(expected["membership_entropy"], abs=1e-5)
    assert row[["environments", "method"]].tolist() == [expected["environments"], inference.method]


def test_the_sentence_about_samples_names_every_number_of_environments():
    found = pd.DataFrame({"prompts": [512, 512, 1024], "seed": [1, 2, 1], "environments": [4, 7, 3]})
    found = found.assign(method=["kmeans(k=4)", "dbscan(min_samples=20)", "kmeans(k=4)"], noise_share=[0.0, 0.59, 0.0])
    said = recovery.samples_takeaway(found)
    assert "3 to 7 environments (by prompts, a number per seed: 512: 4, 7; 1,024: 3), with 0 to 59 % noise" in said
    assert "kmeans(k=4) in 2; dbscan(min_samples=20) in 1" in said
    assert "finds 4 environments" in recovery.samples_takeaway(found.assign(environments=4))


def test_a_study_without_known_environments_is_refused(laid_out, monkeypatch):
    monkeypatch.setattr(laid_out, "jobs", [laid_out.jobs[1]])
    with pytest.raises(StudyError, match="study made: no setting knows its true environments: name a study with"):
        recovery.collect(laid_out)
    monkeypatch.undo()
    monkeypatch.setattr(studies, "jobs", lambda study: study.jobs[:1])
    with pytest.raises(StudyError, match="study made fine-tunes no model"):
        recovery.collect(laid_out)


def test_the_study_of_published_data_is_refused_by_the_command(capsys):
    assert recovery.main(["ml-100k"]) == 1
    assert capsys.readouterr().err.startswith("error: study ml-100k: no setting knows its true environments")


# Reading


def test_missing_and_damaged_tables_are_named(made, tmp_path):
    with pytest.raises(StudyError, match=r"no recovery\.csv in 'nowhere': run `python -m causaldpo_lib\.recovery nowh"):
        recovery.read("nowhere")
    shutil.copy(made.folder / "recovery.csv", tmp_path)
    with pytest.raises(StudyError, match=r"recovery_probe\.csv cannot be read"):
        recovery.read(tmp_path)


def made_up(truth_ami=0.01, p=0.001, probe=0.1):
    """Tables in which k-means finds genres, and little of the truth."""
    rows, probes, batches = [], [], []
    for strength in (0.0, 3.0):
        for seed in (1, 2, 3):
            key = {"setting": f"s{strength:g}", "strength": strength, "seed": seed}
            for features in recovery.STATES:
                several = features != "first"
                for clusterer in ("knee", "kmeans"):
                    for target in recovery.TARGETS:
                        high = 0.6 if target == "history_genre" else truth_ami if strength else 0.0
                        found = {"environments": 4 if several else 1, "noise_share": 0.2, "membership_entropy": 0.7}
                        found |= {"method": "kmeans(k=4)", "prompts": 4000, "target": target, "ami": high * several}
                        found |= {"nmi": high, "ari": high, "null": 0.002, "p": p if several and strength else 1.0}
                        rows.append({**key, "features": features, "clusterer": clusterer, **found})
                said = {"accuracy": 0.5 + probe * bool(strength) * several, "majority": 0.5}
                said |= {"information": said["accuracy"] - 0.5, "ami": said["accuracy"] - 0.5, "prompts": 4000}
                said["p"] = 0.005 if said["ami"] else 1.0
                probes.append({**key, "features": features, **said})
            for rule in recovery.RULES:
                for size in (16, 512):
                    row = {"rule": rule, "size": size, "batches": 8, "several": 0.5, "noise_share": 0.3}
                    row["noise_share"] = np.nan if rule == "once" else 0.3
                    row |= {"environments": 2.0}
                    batches += [{**key, **row, "target": t, "ami": 0.01} for t in recovery.BATCH_TARGETS]
    tables = {"recovery": rows, "recovery_probe": probes, "recovery_batch": batches}
    return {name: pd.DataFrame(table) for name, table in tables.items()}


@pytest.fixture
def folder(tmp_path):
    for name, table in made_up().items():
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    return tmp_path


def test_sentences_follow_the_numbers(folder, tmp_path):
    tables = recovery.read(folder)
    assert "Strength 0: AMI 0.000, most by" in recovery.strength_takeaway(tables)
    assert "12 of 12 clusterings are above chance at p <= 0.05 (0.6 expected)" in recovery.strength_takeaway(tables)
    assert "a single environment with every clusterer" in recovery.first_token_takeaway(tables)
    assert "the main genre of the history is what 12 of 12" in recovery.instead_takeaway(tables, 3.0)
    said = recovery.ceiling_takeaway(tables, 3.0)
    assert "Last prompt token (this library): the probe has 60.0 % right, the majority 50.0 %, AMI 0.100;" in said
    assert "the best clusterer, chosen in hindsight, reaches 0.010, 10 % of the probe's AMI" in said
    assert "First token (released code): the probe reads nothing reliable" in said
    assert recovery.ceiling_takeaway(tables, 0.0).count("reads nothing reliable") == 3
    assert "K 4, noise 20 %, entropy 0.70." in recovery.clusters_takeaway(tables, "last")
    assert "a single environment in 6 of 6 runs" in recovery.clusters_takeaway(tables, "first")
    assert "batches of 16, then of 512;" in recovery.batch_takeaway(tables, 3.0)
    verdict = recovery.verdict(tables)
    assert "- Strength 0: above chance with every seed in 0 of 6 pairs" in verdict
    assert "- Strength 3: above chance with every seed in 4 of 6 pairs" in verdict
    assert "median AMI of 0.010, and most with the main genre of the history (0.600)" in verdict
    assert "3 training seeds; 3 values are too few" in recovery.seeds_text(tables)
    for name, table in made_up(truth_ami=0.9, p=0.2).items():
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    verdict = recovery.verdict(recovery.read(tmp_path))
    assert "above chance with every seed in 0 of 6" in verdict and "most with the true environment (0.900)" in verdict


def test_one_seed_that_finds_nothing_is_not_every_seed():
    tables = made_up()
    rows = tables["recovery"]
    lost = (rows["seed"] == 2) & (rows["clusterer"] == "kmeans") & (rows["features"] == "last")
    rows.loc[lost, ["environments", "ami", "p"]] = [1, 0.0, 1.0]
    tables["recovery"] = rows.assign(features_name=rows["features"], clusterer_name=rows["clusterer"])
    tables["recovery_probe"]["features_name"] = tables["recovery_probe"]["features"]
    assert "- Strength 3: above chance with every seed in 3 of 6 pairs" in recovery.verdict(tables)


def test_the_best_clusterer_is_the_best_of_each_run(folder):
    tables = recovery.read(folder)
    rows = tables["recovery"]
    top = (rows["seed"] == 2) & (rows["clusterer"] == "knee") & (rows["features"] == "mean")
    rows.loc[top & (rows["target"] == TRUTH) & (rows["strength"] == 3), "ami"] = 0.5
    found = recovery.ceilings(tables)
    best = found[(found["reader"] == recovery.BEST) & (found["strength"] == 3) & (found["features"] == "mean")]
    assert best.set_index("seed")["ami"].to_dict() == {1: 0.01, 2: 0.5, 3: 0.01}


# Figures and the notebook


def test_points_are_the_values_of_every_seed(folder):
    rows = recovery.ordered(recovery.select(recovery.read(folder)["recovery"], target=TRUTH))
    fig = plots.by_column(
        rows,
        "features_name",
        lambda ax, part: plots.seed_columns(
            ax, part, "strength", "ami", "clusterer_name", "AMI", list(recovery.CLUSTERERS.values())
        ),
        "title",
    )
    first = fig.axes[0]
    assert first.get_title() == recovery.FEATURES["last"] and first.get_ylabel() == "AMI"
    drawn = np.concatenate([line.get_ydata() for line in first.lines if line.get_marker() in "o^"])  # knee, k-means
    assert sorted(np.round(drawn, 3)) == [0] * 6 + [0.01] * 6
    assert [text.get_text() for text in first.get_xticklabels()] == ["0", "3"]
    ax = plots.seed_rows(plots.panels()[1][0, 0], rows, "clusterer_name", "ami", "features_name", "AMI")
    assert sum(len(line.get_xdata()) for line in ax.lines if line.get_marker() in "oDs") == len(rows)
    assert len(ax.get_yticklabels()) == 2


def test_long_tables_hold_the_same_numbers(folder):
    tables = recovery.read(folder)
    shapes = recovery.shapes(tables, "last")
    assert shapes.groupby("quantity", sort=False)["value"].first().tolist() == [4, 20, 0.7]
    assert len(shapes) == 3 * 2 * 2 * 3
    batches = recovery.batch_quantities(tables, 3.0).groupby("quantity", sort=False)["value"]
    assert batches.first().round(3).tolist() == [50, 30, 0.01, 0.01] and (batches.size() == 18).all()
    probes = recovery.probe_table(tables)
    assert probes.loc[3, ["strength", "right (%)", "AMI"]].tolist() == [3, "60.0", "0.100"]


def test_batch_lines_leave_out_rules_without_values(folder):
    rows = recovery.select(recovery.read(folder)["recovery_batch"], strength=3.0, target=TRUTH)
    ax = plots.batch_lines(plots.panels()[1][0, 0], rows, "noise_share", "noise")
    assert len(ax.lines) == 6 and len(ax.get_legend_handles_labels()[1]) == 2


def test_the_notebook_runs_on_made_up_tables(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(NOTEBOOKS)
    cells = json.loads((NOTEBOOKS / "14_environment_recovery.ipynb").read_text("utf8"))["cells"]
    namespace = {}
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        exec("".join(cell["source"]), namespace)
        if "parameters" in cell["metadata"].get("tags", []):
            assert namespace["tables"] == "../figures/simulated" and namespace["figures"] == ""
            namespace |= {"tables": str(folder), "figures": str(tmp_path / "drawn")}
    drawn = {path.stem for path in (tmp_path / "drawn").glob("*.png")}
    assert len(drawn) == 6 and all(stem.startswith("recovery-") for stem in drawn)
