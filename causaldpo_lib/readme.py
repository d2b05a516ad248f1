"""The README's generated parts: what a published study found, between markers named after the study.

A part ``claims`` of study ``ml-100k`` stands between ``<!-- ml-100k claims -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from causaldpo_lib import tables, takeaways
from causaldpo_lib.errors import StudyError
from causaldpo_lib.plots import SPLITS

PART = re.compile(r"(<!-- (?P<study>[\w.-]+) (?P<part>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _claims(folder: Path, claims: Sequence[takeaways.Claim] = takeaways.CLAIMS) -> str:
    """Every claim on the OOD tests, a row each, a column per setting: result and difference with its interval."""
    rows = takeaways.claim_table(tables.read(folder), claims)
    rows = rows[rows["split"] == SPLITS["ood_test"]]
    rows["cell"] = rows["result"] + ": " + rows["difference"].str.partition(", p ")[0]
    cells = rows.pivot(index="claim", columns="setting", values="cell").reindex(rows["claim"].unique())
    return tables.markdown(cells.fillna("").reset_index())


def _hypotheses(folder: Path) -> str:
    return _claims(folder, takeaways.HYPOTHESES)


def _results(folder: Path, splits: Sequence[str] = tables.TEST_SPLITS) -> str:
    found = tables.settings(tables.read(folder))
    return "\n\n".join(tables.markdown_table(folder, setting, splits) for setting in found)


def _ood(folder: Path) -> str:
    return _results(folder, ["ood_test"])


def _environments(folder: Path) -> str:
    found = tables.read(folder)
    return "\n\n".join(takeaways.diagnostics_takeaway(found, setting) for setting in tables.settings(found))


PARTS = {
    "claims": _claims,
    "hypotheses": _hypotheses,
    "results": _results,
    "ood": _ood,
    "environments": _environments,
}


def filled(text: str, figures: Path) -> str:
    """``text`` with every marked part made anew from the tables in ``figures/<study>``.

    A study without tables leaves its parts as they are.

    Raises:
        StudyError: a marker names an unknown part.
    """

    def fill(match: re.Match[str]) -> str:
        folder, part = figures / match["study"], match["part"]
        if part not in PARTS:
            raise StudyError(f"the README's marker {match[1].strip()!r} names no part: choose from {', '.join(PARTS)}")
        if not (folder / "metrics.csv").exists():
            return match[0]
        return f"{match[1]}{PARTS[part](folder)}\n{match[4]}"

    return PART.sub(fill, text)
