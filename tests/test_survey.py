"""The study of data alone: tables from data runs, what is refused, the comparison with the paper, the options."""

from __future__ import annotations

import inspect
import warnings

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import pytest
import yaml

from causaldpo_lib import pipeline, plots, stages, survey
from causaldpo_lib import study as studies
from causaldpo_lib.data import DATASETS, PROMPT_SETS, Interactions, load_dataset
from causaldpo_lib.data.options import options_of
from causaldpo_lib.errors import StudyError
from causaldpo_lib.paths import data_folder
from causaldpo_lib.splits import SPLIT_NAMES, SPLITS, make_split, shift_functions

matplotlib.use("Agg")

SMALL = {"users": 120, "items": 60, "length": 20}
CONTENT = {
    "settings": [
        {"dataset": "simulated", "shift": "iid"},
        {"dataset": "simulated", "shift": "popularity"},
        {"name": "late", "dataset": "simulated", "shift": "temporal"},
        {"name": "empty", "dataset": "simulated", "shift": "iid", "data": {"shift_options": {"min_user": 500}}},
    ],
    "methods": [],
    "seeds": [],
    "data": {"dataset_options": SMALL, "test_examples": 0},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small study of data alone, with its runs done, one of them refused; its tables written."""
    root = tmp_path_factory.mktemp("survey")
    with pytest.MonkeyPatch.context() as patch:
        for module in (studies, pipeline):
            patch.setattr(module, "RESULTS", root / "results")
        patch.setenv("CAUSALDPO_DATA", str(root / "no data"))
        (root / "small.yaml").write_text(yaml.safe_dump(CONTENT))
        study = studies.load_study(root / "small.yaml")
        for job in studies.jobs(study):
            said = study.outcome(job.setting)
            said.parent.mkdir(parents=True, exist_ok=True)
            said.touch()
            try:
                stages.execute("data", {**job.parameters, "run": ""})
            except StudyError as error:
                said.write_text(f"error: {error} (executed copy: results/runs/x/notebook.ipynb)\n")
        survey.write(study)
        folder = study.folder
    return folder  # after the patches: the tests on published data need the real folder


@pytest.fixture
def tables(finished) -> dict[str, pd.DataFrame]:
    return survey.read(finished)


def test_every_setting_and_split_has_its_row(tables):
    found = tables["datasets"]
    assert list(found["setting"].unique()) == ["simulated-iid", "simulated-popularity", "late"]
    assert (found.groupby("setting")["split"].agg(tuple) == SPLIT_NAMES).all()
    runs = tables["datasets_summary"].set_index("setting")
    assert found.groupby("setting")["interactions"].sum().equals(runs["interactions"].dropna().astype(int).sort_index())
    assert runs.loc["late", "kinds"].startswith("temporal, one cut for all")


def test_a_refused_setting_is_listed_with_its_sentence_alone(tables, finished):
    refused = tables["datasets_summary"].set_index("setting").loc["empty"]
    assert refused["outcome"] == "refused" and pd.isna(refused["interactions"])
    assert refused["reason"].startswith("none of ") and refused["reason"].endswith("lower these options")
    assert "- **empty**: refused: none of" in survey.kinds_text(tables)
    assert "empty: refused: none of" in survey.summary_text(finished)


def test_histograms_are_shares_of_each_split(tables):
    found = tables["datasets_histograms"]
    assert set(found["quantity"]) == {"popularity", "time"}
    shares = found.groupby(["setting", "quantity", "split"])["share"].sum()
    assert len(shares) == 3 * 2 * 4 and shares.to_numpy() == pytest.approx(1, abs=1e-6)


def test_data_without_times_have_no_histogram_of_them():
    split = make_split("popularity", load_dataset("simulated", **SMALL), 0).drop(columns="time")
    counts = split.loc[split["split"] == "train", "item"].value_counts().rename("train_count")
    found = survey.histograms(split, counts.rename_axis("item").reset_index())
    assert set(found["quantity"]) == {"popularity"}


def test_imputed_rows_have_no_time_of_their_own():
    rows = pd.DataFrame({"item": 1, "split": "train", "time": [0, 50, 100, 900], "imputed": [False] * 3 + [True]})
    found = survey.histograms(rows, pd.DataFrame({"item": [1], "train_count": [4]}))
    assert found.loc[found["quantity"] == "time", "right"].max() == 100


@pytest.mark.parametrize("most", [1, 2, 3, 9, 40, 75, 90, 400, 5000])
def test_no_bin_of_popularity_is_too_narrow_for_a_whole_number(most):
    rows = pd.DataFrame({"item": range(most), "split": "train"})
    found = survey.histograms(rows, pd.DataFrame({"item": range(most), "train_count": range(most)}))
    assert (found["share"] > 0).all() and found["share"].sum() == pytest.approx(1)


def test_sources_are_what_was_loaded(tables):
    data = load_dataset("simulated", **SMALL)
    [row] = tables["datasets_sources"].to_dict("records")  # one dataset with one set of options: one row
    assert (row["users"], row["items"], row["interactions"]) == (120, 60, len(data.table))
    assert (row["settings"], row["first"]) == (4, pd.to_datetime(data.table["time"].min(), unit="s").date().isoformat())
    counts = tables["datasets_loading"].set_index("count")["value"]
    assert counts.to_dict() == data.stats


def test_prompt_sets_that_are_not_there_say_so_without_a_folder_of_this_machine(tables):
    found = tables["datasets_prompts"].set_index("prompts")
    assert set(found.index) == set(PROMPT_SETS)
    for name, remark in found["remark"].items():
        assert f"$CAUSALDPO_DATA/prompts/{name}" in remark


def test_a_dataset_s_own_warning_stands_beside_its_counts(monkeypatch):
    def load(folder):
        warnings.warn(f"{folder}: 12 of 99 rows", stacklevel=2)
        rows = pd.DataFrame({"user": [1, 2], "item": [1, 1], "rating": [3.0, 4.5], "time": [0, 86_400]})
        return Interactions("part", rows, pd.DataFrame({"item": [1, 2], "title": ["a", "b"]}), {"rows_read": 2})

    def absent(folder):
        raise StudyError(f"{folder}/ratings is missing: put it there")

    jobs = [
        studies.Job("data", f"{name}-iid", None, None, {"dataset": name, "dataset_options": {}}, {}, None)
        for name in ("part", "absent")
    ]
    for name, loader in (("part", load), ("absent", absent)):
        monkeypatch.setitem(DATASETS, name, loader)
    sources, loading = survey.describe_sources(jobs)
    part, missing = sources.to_dict("records")
    assert part["remark"] == "$CAUSALDPO_DATA/part: 12 of 99 rows"
    assert (part["items"], part["items_used"], part["lowest"], part["last"]) == (2, 1, 3.0, "1970-01-02")
    assert missing["remark"] == "$CAUSALDPO_DATA/absent/ratings is missing: put it there"
    assert pd.isna(missing["users"])
    assert loading.to_dict("records") == [{"dataset": "part", "count": "rows_read", "value": 2}]


def loaded(counts: dict[str, tuple[int, int]]) -> pd.DataFrame:
    """The table of loading for datasets with so many rows read and left out."""
    names = ("rows_read", "rows_filtered")
    found = [(name, count, value) for name, each in counts.items() for count, value in zip(names, each, strict=True)]
    return pd.DataFrame(found, columns=["dataset", "count", "value"])


def rows(**changes) -> dict[str, pd.DataFrame]:
    """Tables as of a study with books and a Yelp sample that nothing is left of."""
    sources = pd.DataFrame(
        {
            "dataset": ["ml-100k", "book-crossing", "yelp"],
            "users": [943, 100, 50],
            "items": [1664, 200, 40],
            "interactions": [99_693, 114_978, 60],
            "lowest": [1.0, 1.0, 1.0],
        }
    )
    loading = loaded({"ml-100k": (100_000, 0), "book-crossing": (115_000, 0), "yelp": (61, 0)})
    summary = pd.DataFrame(
        {
            "setting": ["ml-100k-iid", "book-crossing-iid", "yelp-iid"],
            "dataset": ["ml-100k", "book-crossing", "yelp"],
            "outcome": ["split", "split", "refused"],
            "reason": [None, None, "none of 60 interactions is left"],
            "users": [900, 20, None],
            "items": [1400, 30, None],
            "interactions": [55_000, 600, None],
        }
    )
    return {"datasets_sources": sources, "datasets_summary": summary, "datasets_loading": loading} | changes


def test_counts_stand_beside_the_paper_s():
    table = survey.table_2(rows()).set_index("source")
    assert table.loc["ml-100k, positives kept", ["users", "items", "interactions"]].tolist() == [900, 1400, 55_000]
    assert table.loc["book-crossing, positives kept", "density"] == 600 / (20 * 30)
    assert table["paper"].value_counts().to_dict() == {"MovieLens-10M": 3, "Book-Crossing": 3, "Yelp2018": 2}
    # the densities that follow from the printed counts, by another route
    printed = survey.table_2(rows())["source"].eq("paper, printed")
    assert (survey.table_2(rows())[printed]["density"] * 1e4).round(1).tolist() == [130.8, 13.0, 0.2]


def test_every_difference_is_explained_with_this_study_s_numbers():
    text = survey.differences(rows())
    for said in (
        "99,693 ratings, 1.0% of the printed 10,000,054",
        "55,000 positives of 900 users on 1,400 items",
        "has 60 reviews; nothing is kept (none of 60 interactions is left)",
        "114,978 ratings (10%), none of them implicit; editions",
        "It has no times",
    ):
        assert said in text, text
    alone = rows(datasets_sources=rows()["datasets_sources"].iloc[:1])
    assert "at hand has" not in survey.differences(alone)


def test_what_a_loader_left_out_is_said():
    text = survey.differences(rows(datasets_loading=loaded({"book-crossing": (300_000, 185_022), "yelp": (99, 39)})))
    assert "114,978 ratings (10%) after the loader left out 185,022 implicit ones of 300,000 rows; editions" in text
    assert "has 60 reviews (the loader left out 39 of 99 rows);" in text and "none of them implicit" not in text
    with_zeros = rows()["datasets_sources"].assign(lowest=0.0)
    assert "114,978 ratings (10%), implicit ones among them;" in survey.differences(rows(datasets_sources=with_zeros))
    unsaid = survey.differences(rows(datasets_loading=loaded({})))
    assert "114,978 ratings (10%); editions" in unsaid


def test_a_reader_s_own_file_stands_for_no_dataset_of_the_paper():
    content = rows()
    own = content["datasets_sources"].iloc[:1].assign(dataset="custom")
    kept = content["datasets_summary"].iloc[:1].assign(dataset="custom", setting="custom-iid")
    found = rows(datasets_sources=own, datasets_summary=kept)
    assert not survey.table_2(found)["source"].str.contains("custom").any()
    text = survey.differences(found)
    assert "custom" not in text and "nothing of its publisher stands in for it" in text


def test_several_files_of_readers_have_rows_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("CAUSALDPO_DATA", str(tmp_path))
    (tmp_path / "custom").mkdir()
    files = [("a.csv", 1), ("b.csv", 2), ("a.csv", 1)]
    for file, users in files:
        lines = "".join(f"{user},1,A\n" for user in range(users))
        (tmp_path / "custom" / file).write_text(f"user,item,title\n{lines}")
    common = {"rating": "", "time": ""}
    jobs = [
        studies.Job(
            "data", file, None, None, {"dataset": "custom", "dataset_options": {"file": file, **common}}, {}, None
        )
        for file, _ in files
    ]
    sources, loading = survey.describe_sources(jobs)
    assert sources["dataset"].tolist() == ["custom (file=a.csv)", "custom (file=b.csv)"]
    assert sources["users"].tolist() == [1, 2] and sources["settings"].tolist() == [2, 1]
    read = loading.pivot(index="dataset", columns="count", values="value")["rows_read"]  # refuses a repeated name
    assert read.to_dict() == {"custom (file=a.csv)": 1, "custom (file=b.csv)": 2}


def test_a_dataset_loaded_in_two_ways_stands_beside_the_paper_in_the_first():
    content = rows()
    names = {"book-crossing": "book-crossing (implicit=True)"}
    sources = content["datasets_sources"].replace({"dataset": names})
    more = sources.iloc[[1]].assign(dataset="book-crossing", interactions=7)
    found = rows(
        datasets_sources=pd.concat([sources, more]), datasets_loading=content["datasets_loading"].replace(names)
    )
    assert survey.table_2(found).set_index("source").loc["book-crossing, as loaded", "interactions"] == 114_978
    assert "114,978 ratings (10%), none of them implicit" in survey.differences(found)


def test_histograms_have_a_column_per_dataset_and_a_row_per_kind(tables):
    found = tables["datasets_histograms"]
    other = found[found["setting"] == "simulated-popularity"].assign(dataset="other", setting="other-popularity-flat")
    found = pd.concat([found, other], ignore_index=True)
    fig = plots.setting_histograms(found, "popularity", "count")
    titles = [ax.get_title() for ax in fig.axes if ax.axison]
    assert titles == ["simulated\niid", "simulated\npopularity", "other\npopularity-flat", "simulated\nlate"]
    assert fig.get_suptitle() == "count"
    labelled = [ax.get_title() for ax in fig.axes if ax.axison and ax.xaxis.get_tick_params()["labelbottom"]]
    assert labelled == ["other\npopularity-flat", "simulated\nlate"]  # the lowest panel of each column
    [panel] = [ax for ax in fig.axes if ax.get_title() == "simulated\niid"]
    mine = found[(found["setting"] == "simulated-iid") & (found["quantity"] == "popularity")]
    for split, drawn in zip(("train", "iid_test", "ood_test"), panel.patches, strict=True):
        expected = 100 * mine.loc[mine["split"] == split, "share"]
        assert drawn.get_data().values.tolist() == pytest.approx(expected.tolist())
    plt.close(fig)


def test_numbers_are_drawn_where_they_are(tables):
    fig, axes = plots.panels()
    ax = plots.split_numbers(axes[0, 0], tables["datasets"], "gini", "Gini", 10)
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["simulated-iid", "simulated-popularity", "late"]
    for line in ax.lines:
        split = {"training": "train", "IID test": "iid_test", "OOD test": "ood_test"}[line.get_label()]
        rows = tables["datasets"][tables["datasets"]["split"] == split]
        assert list(zip(*line.get_data(), strict=True)) == list(zip(10 * rows["gini"], range(3), strict=True))
    assert len(ax.lines) == 3
    plt.close(fig)


def test_takeaways_name_the_extremes(tables):
    wide = tables["datasets"].pivot(index="setting", columns="split", values="gini")
    assert wide["ood_test"].idxmin() == "simulated-popularity"
    said = survey.numbers_takeaway(tables)
    assert f"simulated-popularity (Gini {wide.loc['simulated-popularity', 'ood_test']:.2f}" in said
    assert "later than all training in late;" in survey.time_takeaway(tables)
    assert "least on simulated-popularity" in survey.popularity_takeaway(tables)


def test_choices_hold_every_option_with_its_default():
    table = survey.choices()
    found = set(zip(table["where"], table["option"].str.strip("`"), table["default"].str.strip("`"), strict=True))
    for shift in SPLITS:
        for function in shift_functions(shift):
            for option, default in options_of(function).items():
                text = "7:1:2" if option == "inner" else str(default)
                owner = {("every split", option, text), (f"shift {shift}", option, text)}
                assert owner & found or option == "positive_threshold", (shift, option)
    for name, loader in DATASETS.items():
        own = {option for where, option, _ in found if where == f"dataset {name}"}
        assert own == (set() if name == "simulated" else set(options_of(loader)))
    assert table["meaning"].str.len().gt(10).all() and not table["meaning"].str.contains("\\|").any()


def test_a_meaning_is_that_of_the_options_own_line():
    table = survey.choices()
    functions = {f"dataset {name}": [loader] for name, loader in DATASETS.items()}
    functions |= {f"shift {shift}": shift_functions(shift) for shift in SPLITS}
    functions["every split"] = shift_functions("iid")
    for row in table.itertuples():
        lines = [line.strip() for each in functions[row.where] for line in inspect.getdoc(each).splitlines()]
        begun = [line.partition(": ")[2] for line in lines if line.startswith(f"`{row.option}`: ")]
        assert any(
            begin and row.meaning.replace("`", "").startswith(begin.replace("`", "").rstrip(".")) for begin in begun
        ), row
    said = table.set_index(["where", "option"])["meaning"]
    assert said["dataset custom", "`user`"] == "name of the column with the user's id"
    assert said["every split", "`iterative`"].endswith("both hold, or once to the same counts")


def test_what_hangs_on_an_options_line_belongs_to_it_and_nothing_else_does():
    def loader(folder, *, share=0.5, kind="a", lost=1):
        """Loads with ``lost`` and ``kind``: a sentence that names options.

        Options:
            ``share``: of the rows
                that are kept.
            ``kind``: ``a``, or ``b``.
        Raises:
            StudyError: ``lost``.
        """

    assert survey._meaning(loader, "share") == "of the rows that are kept"
    assert survey._meaning(loader, "kind") == "`a`, or `b`"
    with pytest.raises(StudyError, match="option 'lost' of loader has no line of its own"):
        survey.choices(datasets={"own": loader})


def test_tables_that_are_missing_are_one_sentence(tmp_path, finished):
    with pytest.raises(StudyError, match=r"no datasets\.csv in .*run `make study STUDY="):
        survey.read(tmp_path / "datasets")
    (tmp_path / "datasets.csv").write_text("a\n1\n")
    with pytest.raises(StudyError, match=r"datasets_summary.csv cannot be read .*: run the study again"):
        survey.read(tmp_path)


@pytest.mark.realdata
def test_prompt_sets_at_hand_are_counted():
    if not (data_folder() / "prompts").is_dir():
        pytest.skip("no prompts: set CAUSALDPO_DATA to the folder of the published datasets")
    found = survey.describe_prompts().set_index(["prompts", "split"])
    assert found.loc[("causaldpo-ml-10m", "ood_test"), ["rows", "candidates"]].tolist() == [3436, 10]
