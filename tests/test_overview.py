"""The page that a reader starts from: notebooks with their questions and times, and the deciding comparisons."""

import json
import math

import pandas as pd
import pytest

from causaldpo_lib import overview
from causaldpo_lib.book import in_order
from causaldpo_lib.errors import StudyError
from causaldpo_lib.evaluation import MARGIN
from causaldpo_lib.takeaways import CLAIMS

UP, DOWN = (0.1, 0.05, 0.15, 0.006), (-0.1, -0.15, -0.05, 0.006)


def notebook(folder, name, first, parameters="points = 1"):
    """A notebook of two cells."""
    cells = [
        {"cell_type": "markdown", "source": first, "metadata": {}, "id": "a"},
        {"cell_type": "code", "source": parameters, "metadata": {"tags": ["parameters"]}, "outputs": [], "id": "b"},
    ]
    content = {"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (folder / f"{name}.ipynb").write_text(json.dumps(content))
    return folder / f"{name}.ipynb"


@pytest.mark.parametrize("path", in_order(), ids=lambda path: path.stem)
def test_every_notebook_asks_one_question(path):
    assert overview.question(path).endswith("?")


def test_a_question_is_one_paragraph_and_its_absence_is_named(tmp_path):
    path = notebook(tmp_path, "21_x", "# X\n\n**Question.** Does it\nwork?\n\nMore.")
    assert overview.question(path) == "Does it work?"
    with pytest.raises(StudyError, match=r"22_y\.ipynb: the first cell asks no question"):
        overview.question(notebook(tmp_path, "22_y", "# Y"))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (12.4, "12 s"), (89, "89 s"), (100, "2 min"), (711, "12 min")]
)
def test_times_are_rounded_to_what_a_reader_plans_with(seconds, text):
    assert overview.seconds_text(seconds) == text


def test_the_map_shows_measured_times_and_admits_what_was_not(tmp_path):
    notebooks, figures = tmp_path / "notebooks", tmp_path / "figures"
    for folder in (notebooks, figures / "one", figures / "two"):
        folder.mkdir(parents=True)
    notebook(notebooks, "00_start_here", "# Start\n\n**Question.** Where?")  # which shows the map
    notebook(notebooks, "02_supervised_fine_tuning", "# A\n\n**Question.** A?")
    notebook(notebooks, "06_read", "# B\n\n**Question.** B?", 'tables = "x"')
    notebook(notebooks, "11_understand", "# C\n\n**Question.** C?")
    before = overview.notebook_map(notebooks, figures)
    assert set(before["defaults"]) == {"not measured"}
    overview.write_times([("02_supervised_fine_tuning", 20.04), ("06_read", 3.0)], "cpu", figures)
    head = "setting,stage,method,runs,seconds,device\n"
    (figures / "one" / "costs.csv").write_text(head + "s,sft,,3,60,cpu\ns,align,dpo,3,1,cpu\n")
    (figures / "two" / "costs.csv").write_text(head + "s,sft,,3,600,cpu\ns,sft,,3,30,A card\n")
    table = overview.notebook_map(notebooks, figures)
    assert table["part"].tolist() == ["Compute", "Read", "Understand"]
    assert table["defaults"].tolist() == ["20 s", "3 s", "not measured"]
    assert table["a run of a study (CPU)"].tolist() == ["60 s to 10 min", *["as at the defaults"] * 2]
    assert table["a run of a study (GPU)"].tolist() == ["30 s", *["as at the defaults"] * 2]
    assert table["notebook"].iloc[1] == "[06 read](06_read.ipynb)"


def tables(setting, numbers):
    """One claim measured on both test splits of a setting."""
    claim = CLAIMS[0]
    keys = {"setting": setting, "metric": claim.metric, "method": claim.method, "baseline": claim.baseline}
    found = dict(zip(("difference", "low", "high", "p_holm"), numbers, strict=True))
    paired = pd.DataFrame([{**keys, "split": split, **found} for split in ("iid_test", "ood_test")])
    return {"paired": paired, "metrics": paired}


def test_the_deciding_comparisons_have_a_row_a_setting_and_the_first_study_counts():
    studies = {"one": tables("s", UP), "two": tables("s", DOWN), "three": tables("t", DOWN)}
    found = overview.decisive(studies, CLAIMS)
    assert found["setting"].tolist() == ["s", "t"]
    assert found[CLAIMS[0].text].tolist() == [
        "reproduced: +10.00 points [+5.00, +15.00]",
        "contradicted: -10.00 points [-15.00, -5.00]",
    ]


def test_the_margin_is_the_one_that_tests_use():
    note = overview.margin_note()
    assert f"±{100 * MARGIN:.1f} %" in note and f"±{math.log(1 + MARGIN):.3f} nats" in note
