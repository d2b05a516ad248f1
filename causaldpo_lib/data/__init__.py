"""Datasets by name. A new one is a loader with a data-card docstring, named in ``DATASETS``.

A loader's keyword-only arguments are its options; one that reads files takes the dataset's ``folder`` first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from causaldpo_lib.data.amazon import load_amazon
from causaldpo_lib.data.book_crossing import load_book_crossing
from causaldpo_lib.data.custom import load_custom
from causaldpo_lib.data.interactions import Interactions
from causaldpo_lib.data.lastfm import load_lastfm
from causaldpo_lib.data.movielens import load_ml_1m, load_ml_10m, load_ml_100k, load_ml_latest_small
from causaldpo_lib.data.options import check_options, options_of
from causaldpo_lib.data.prompts import PROMPT_SETS, load_prompts
from causaldpo_lib.data.simulated import SimulatedTruth, simulate
from causaldpo_lib.data.yelp import load_yelp
from causaldpo_lib.errors import pick
from causaldpo_lib.paths import data_folder, from_root

__all__ = ["DATASETS", "PROMPT_SETS", "Interactions", "SimulatedTruth", "load_dataset", "load_prompts"]

DATASETS: dict[str, Callable[..., Interactions]] = {
    "simulated": simulate,
    "ml-100k": load_ml_100k,
    "ml-1m": load_ml_1m,
    "ml-10m": load_ml_10m,
    "ml-latest-small": load_ml_latest_small,
    "book-crossing": load_book_crossing,
    "yelp": load_yelp,
    "amazon": load_amazon,
    "lastfm": load_lastfm,
    "custom": load_custom,
}


def load_dataset(name: str, folder: str | Path | None = None, **options: Any) -> Interactions:
    """Load a dataset of ``DATASETS``.

    Args:
        name: the dataset's name.
        folder: the dataset's own folder, by default ``$CAUSALDPO_DATA/<name>``; a relative path is taken from
            the repository's root. ``simulated`` reads no files and ignores it.
        options: keyword arguments of the loader, see its docstring.

    Raises:
        StudyError: an unknown name or option, or files that are missing or malformed.
    """
    loader = pick(DATASETS, name, "dataset")
    options = check_options(options, options_of(loader), f"dataset {name!r}")
    if "folder" not in inspect.signature(loader).parameters:
        return loader(**options)
    return loader(from_root(folder) if folder is not None else data_folder() / name, **options)
