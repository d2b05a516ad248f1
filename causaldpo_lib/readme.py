"""The README's generated parts: what a published study found, between markers named after the study.

A part ``ood`` of study ``ml-100k`` stands between ``<!-- ml-100k ood -->`` and ``<!-- end -->``. Parts of ``ALL``
studies together, those that the verdict notebook reads, have ``all`` for a study: ``<!-- all verdict -->``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from causaldpo_lib import ablations, comparison, overview, reasoning, reranking, tables, verdict
from causaldpo_lib.errors import StudyError
from causaldpo_lib.parameters import declared_in
from causaldpo_lib.paths import NOTEBOOKS

PART = re.compile(r"(<!-- (?P<study>[\w.-]+) (?P<part>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _results(folder: Path, splits: Sequence[str] = tables.TEST_SPLITS) -> str:
    found = tables.settings(tables.read(folder))
    return "\n\n".join(tables.markdown_table(folder, setting, splits) for setting in found)


def _ood(folder: Path) -> str:
    return _results(folder, ["ood_test"])


def _made(folder: Path) -> str:
    """What a study is made of and took: its runs, the sum of their times, the size of its fine-tuned models."""
    found = tables.read(folder)
    costs, models = found["costs"], found["diagnostics"]
    minutes = (costs["runs"] * costs["seconds"]).sum() / 60
    sizes = [f"{size:,.0f}" for size in sorted(models.loc[models["method"] == "sft", "parameters"].unique())]
    return (
        f"`{folder.name}`: {costs['runs'].sum()} runs, {minutes:.0f} minutes of one core in all, measured on "
        f"{' and '.join(sorted(set(costs['device'])))}; models of {', '.join(sizes)} parameters."
    )


def _kinds(folder: Path) -> str:
    """What each paper's own hyper-parameters make of CausalDPO and of its control: the end of notebook 08's text."""
    matched = tables.read(folder.parent / "baselines")
    found = [comparison.both_kinds(matched, tables.read(folder), setting) for setting in tables.settings(matched)]
    return "\n".join(comparison.kinds_takeaway(kinds).splitlines()[-1] for kinds in found)


def _axis(folder: Path, axis: str) -> str:
    """What one axis of notebook 15 does to the log-probability on the OOD test, as said there."""
    found, known = tables.read(folder), ablations.parameters(folder.name)
    said = [ablations.takeaway(found, setting, axis, known) for setting in tables.settings(found)]
    return "\n".join(f"- {text.splitlines()[0].removeprefix('**Takeaway.** ')}" for text in said)


def _claims(folder: Path) -> str:
    """Every claim about reasoning aligned with a re-ranker, with the results of its tests."""
    return tables.markdown(reasoning.counts(reasoning.claims(reranking.read(folder))))


def _studies(figures: Path) -> dict[str, tables.Tables]:
    """The tables that the verdict notebook reads by default, as far as they are published."""
    names = [Path(path).name for path in declared_in(NOTEBOOKS / "19_verdict.ipynb")["tables"]]
    return {name: tables.read(figures / name) for name in names if (figures / name / "metrics.csv").exists()}


def _verdict(figures: Path) -> str:
    """Every statement, group by group, with its verdict and the results of its tests."""
    studies = _studies(figures)
    found = {f"**{name}**": verdict.counts(group, studies) for name, group in verdict.GROUPS.items()}
    heads = [pd.DataFrame([[name, *[""] * (rows.shape[1] - 1)]], columns=rows.columns) for name, rows in found.items()]
    return tables.markdown(pd.concat([part for pair in zip(heads, found.values(), strict=True) for part in pair]))


def _takeaway(figures: Path) -> str:
    return verdict.takeaway(_studies(figures)).replace("**Takeaway.**", "**So far.**")


def _decisive(figures: Path) -> str:
    return f"{tables.markdown(overview.decisive(_studies(figures), overview.DECISIVE))}\n\n{overview.margin_note()}"


def _notebooks(figures: Path) -> str:
    """Every notebook, linked from the README's folder, with its question."""
    rows = overview.notebook_map(figures=figures)[["notebook", "question"]]
    return tables.markdown(rows.assign(notebook=rows["notebook"].str.replace("](", "](notebooks/", regex=False)))


PARTS = {
    "results": _results,
    "ood": _ood,
    "made": _made,
    "claims": _claims,
    "kinds": _kinds,
    "lambda": partial(_axis, axis="lambda"),
    "policy": partial(_axis, axis="backdoor"),
}
FIRST = {"claims": "reranking.csv"}  # the table whose presence says that a study is published, if not metrics.csv
ALL = {"takeaway": _takeaway, "verdict": _verdict, "decisive": _decisive, "notebooks": _notebooks}


def filled(text: str, figures: Path) -> str:
    """``text`` with every marked part made anew from the tables in ``figures/<study>``.

    A study without tables leaves its parts as they are.

    Raises:
        StudyError: a marker names an unknown part.
    """

    def fill(match: re.Match[str]) -> str:
        whole = match["study"] == "all"
        folder, parts = (figures, ALL) if whole else (figures / match["study"], PARTS)
        if match["part"] not in parts:
            raise StudyError(f"the README's marker {match[1].strip()!r} names no part: choose from {', '.join(parts)}")
        if not whole and not (folder / FIRST.get(match["part"], "metrics.csv")).exists():
            return match[0]
        return f"{match[1]}{parts[match['part']](folder)}\n{match[4]}"

    return PART.sub(fill, text)
