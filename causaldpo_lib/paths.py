"""Where things are, derived from this file's own place; no other module names a folder."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"
PARAMS = ROOT / "params"
RESULTS = ROOT / "results"
FIGURES = ROOT / "figures"


def from_root(path: str | Path) -> Path:
    """A path as given if absolute, else taken from the repository's root (notebooks run in their own folder)."""
    return ROOT / path


def data_folder() -> Path:
    """The folder that holds ``<dataset name>/``: ``$CAUSALDPO_DATA``, by default ``data/`` in the repository."""
    return from_root(os.environ.get("CAUSALDPO_DATA") or "data")
