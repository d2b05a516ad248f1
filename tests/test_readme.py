"""The README's generated parts say what the tracked tables say."""

import re

import pandas as pd
import pytest
from fabricated import setting

from causaldpo_lib import ablations, readme, survey, tables
from causaldpo_lib.book import in_order
from causaldpo_lib.errors import StudyError
from causaldpo_lib.paths import FIGURES, ROOT
from causaldpo_lib.takeaways import NOTHING, change


def test_readme_is_what_the_tracked_tables_give():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.filled(text, FIGURES) == text, "run `make publish STUDY=baselines`"
    for marker, start in (("all verdict", "| statement"), ("all decisive", "| setting"), ("baselines ood", "**")):
        assert f"<!-- {marker} -->\n{start}" in text
    assert {f"(notebooks/{path.name})" for path in in_order()} <= set(re.findall(r"\(notebooks/[^)]*\)", text))


def test_parts_are_filled_from_tables_and_unfinished_studies_left_alone(tmp_path):
    (tmp_path / "some").mkdir()
    for name, table in tables.collect_jobs(setting(tmp_path / "runs", "ml-100k-popularity")).items():
        table.to_csv(tmp_path / "some" / f"{name}.csv", index=False)
    text = "a\n<!-- some results -->\nstale\n<!-- end -->\n<!-- none ood -->\nkept\n<!-- end -->\n"
    found = readme.filled(text, tmp_path)
    assert "stale" not in found and "kept" in found and "**ml-100k-popularity, OOD test**" in found
    assert readme.filled(found, tmp_path) == found
    costs = tables.read(tmp_path / "some")["costs"]
    made = readme.filled("<!-- some made -->\n<!-- end -->", tmp_path)
    minutes = sum(row.runs * row.seconds for row in costs.itertuples()) / 60
    assert f"`some`: {sum(costs['runs'])} runs, {round(minutes)} minutes of one core in all" in made
    assert "; models of 1,000 parameters." in made
    with pytest.raises(StudyError, match="names no part"):
        readme.filled("<!-- some clams -->\n<!-- end -->", tmp_path)


def test_claims_of_a_study_of_rerankers_need_its_own_tables(tmp_path, monkeypatch):
    text = "<!-- some claims -->\nkept\n<!-- end -->\n"
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "metrics.csv").touch()  # of another kind of study
    assert readme.filled(text, tmp_path) == text
    (tmp_path / "some" / "reranking.csv").touch()
    counted = {"claim": ["knowledge helps"], "supported": [3]}
    monkeypatch.setattr(readme.reranking, "read", lambda folder: folder.name)
    monkeypatch.setattr(readme.reasoning, "claims", lambda found: found)
    monkeypatch.setattr(readme.reasoning, "counts", lambda found: pd.DataFrame(counted) if found == "some" else None)
    assert "| knowledge helps | 3 |" in readme.filled(text, tmp_path)


def test_example_titles_are_in_the_catalogue_of_the_default_study():
    from causaldpo_lib.data import load_dataset
    from causaldpo_lib.study import load_study

    options = load_study("quick").settings[0].overrides["data"]["dataset_options"]
    titles = set(load_dataset("simulated", **options).items["title"])
    named = re.findall(r"recommend\([^\[]*\[([^\]]*)\]", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert named and {title.strip(' "') for title in named[0].split(",")} <= titles


@pytest.mark.parametrize(
    ("study", "part", "says"),
    [
        ("published", "kinds", ["- As published: CausalDPO against DPO: ", "; its shuffled control against DPO: "]),
        (
            "variants",
            "lambda",
            ["- *ml-100k-popularity, OOD test.*", " At 100: CausalDPO -", "; SFT, where"],
        ),
    ],
)
def test_what_one_table_hides_is_said_in_a_line(study, part, says):
    text = readme.filled(f"<!-- {study} {part} -->\n<!-- end -->", FIGURES)
    assert all(words in text for words in says) and len(text.splitlines()) == 3


def test_what_the_readme_says_without_numbers_is_so():
    """Its sentences about the proposal, the random floor and the shift that is none follow from the tracked tables."""
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "they collect *less* of the interventional preference than uniform ones" in text
    where = (tables.read(FIGURES / "simulated"), "simulated-strong", "ood_test", "causal_NDCG@10")
    assert change(*where, "causal_negatives", "dpo").word == "lowered"
    assert "under shift most aligned models have less of it than a uniform guess" in text
    rows = tables.select(tables.read(FIGURES / "baselines")["metrics"], split="ood_test", metric="target_logp")
    level = rows.set_index("method")["mean"]
    plain = {"sft", "sasrec", "sasrec_bce", "bigrec", "rw", "d3", "random", "popular"}
    aligned = level[[name for name in level.index if name not in plain]]
    assert (aligned < level["random"]).mean() > 0.5
    said = "DPO has beta 0.1 there and CausalDPO beta 2, and with its lambda of 0.001 the penalty changes nothing"
    assert said in text
    own = ablations.parameters("published")
    assert [own[name]["loss_options"]["beta"] for name in ("dpo", "causal_dpo")] == [0.1, 2.0]
    assert own["causal_dpo"]["mmd_weight"] == 0.001
    path = tables.read(FIGURES / "ablations")
    weak = change(path, "ml-100k-popularity", "ood_test", "target_logp", "causal_dpo-mmd_weight-0.001", "dpo")
    assert weak.equivalent and weak.word == NOTHING
    assert "Most gains of log p over DPO, of any method, are a way back to SFT" in text
    higher = [name for name in aligned.index if level[name] > level["dpo"]]
    assert sum(level[name] < level["sft"] for name in higher) > 0.5 * len(higher)
    assert "sees no shift in book-crossing-exposure" in text
    assert "**book-crossing-exposure**: no shift" in survey.kinds_text(survey.read(FIGURES / "datasets"))
