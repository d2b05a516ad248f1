"""The study of data alone: every dataset under every shift, in tables, beside what the paper prints.

A study without methods consists of data runs. ``python -m causaldpo_lib.survey STUDY`` writes their numbers to
``results/<study>/`` as csv; notebook 09 reads nothing else:

    datasets.csv             a row per setting and split: the numbers of `description.describe_by_split`
    datasets_summary.csv     a row per setting: those of `description.describe` about the whole, and the kind of shift,
                             or the sentence with which the dataset or the shift refused
    datasets_sources.csv     a row per dataset: what was loaded, before any filter, and its rule for positives; one that
                             is loaded with several sets of options has a row of each, "name (option=value)"
    datasets_loading.csv     what loading did: dataset (as above), count, value
    datasets_histograms.csv  popularity and time of the interactions, by setting and split
    datasets_prompts.csv     the ready-made prompt sets, by split

A setting whose files are missing, or of which its filters leave nothing, is a result and listed as such.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from causaldpo_lib.data import DATASETS, PROMPT_SETS, load_dataset, load_prompts
from causaldpo_lib.data.options import options_of
from causaldpo_lib.description import describe, describe_by_split, kind_of_shift, kinds_of_shift
from causaldpo_lib.errors import StudyError
from causaldpo_lib.paths import ROOT, data_folder
from causaldpo_lib.pipeline import load_run
from causaldpo_lib.plots import SPLITS as SPLIT_LABELS
from causaldpo_lib.records import folder_with, read_table, write_tables
from causaldpo_lib.splits import SPLITS, shift_functions
from causaldpo_lib.tables import histogram, select

Frame = pd.DataFrame
Tables = Mapping[str, Frame]

TABLES = tuple(f"datasets{part}" for part in ("", "_summary", "_sources", "_loading", "_histograms", "_prompts"))
WHOLE = ("interactions", "users", "items", "density", "timed", "cuts", "sitting")  # of `describe`, in the summary
WHOLE += ("popularity_distance", "environment_distance")
SUMMARY = ("setting", "dataset", "shift", "outcome", "reason", *WHOLE, "kinds", "kind")
SOURCES = ("dataset", "settings", "users", "items", "items_used", "interactions", "lowest", "highest", "positive")
SOURCES += ("first", "last", "remark")
PROMPTS = ("prompts", "split", "rows", "targets", "history", "candidates", "remark")
# Table 2 of CausalDPO (arXiv 2603.22335), and the datasets here that stand for each row.
PAPER = (
    ("MovieLens-10M", 71_567, 10_681, 10_000_054, ("ml-10m", "ml-1m", "ml-100k", "ml-latest-small")),
    ("Yelp2018", 31_668, 38_048, 1_561_406, ("yelp",)),
    ("Book-Crossing", 278_858, 271_379, 1_149_780, ("book-crossing",)),
)


# --- making the tables ---


def collect(study: Any) -> dict[str, Frame]:
    """All tables of a study of data alone, from its finished data runs and the datasets themselves."""
    from causaldpo_lib.study import jobs

    found = jobs(study)
    parts: dict[str, list[Frame]] = {name: [] for name in ("datasets", "datasets_histograms")}
    summary = []
    for job in found:
        key = {"setting": job.setting, "dataset": job.parameters["dataset"], "shift": job.parameters["shift"]}
        if not (job.folder / "summary.json").exists():
            reason = study.outcome(job.setting).read_text(encoding="utf-8")
            summary.append({**key, "outcome": "refused", "reason": _sentence(reason)})
            continue
        folder = load_run(job.folder, "data").folder
        split, items, examples = (pd.read_parquet(folder / f"{n}.parquet") for n in ("split", "items", "examples"))
        numbers = describe(split, items)
        parts["datasets"].append(_with(key, describe_by_split(split, items, examples)))
        parts["datasets_histograms"].append(_with(key, histograms(split, items)))
        kinds = ", ".join(kinds_of_shift(numbers)) or "none"
        whole = {name: numbers[name] for name in WHOLE}
        summary.append({**key, "outcome": "split", **whole, "kinds": kinds, "kind": kind_of_shift(numbers)})
    sources, loading = describe_sources(found)
    tables = {name: pd.concat(frames, ignore_index=True) for name, frames in parts.items() if frames}
    return tables | {
        "datasets_summary": pd.DataFrame(summary, columns=SUMMARY),
        "datasets_sources": sources,
        "datasets_loading": loading,
        "datasets_prompts": describe_prompts(),
    }


def histograms(split: Frame, items: Frame) -> Frame:
    """Histograms of a split table: ``quantity`` popularity (1 + training count of the item) and time."""
    counts = items.set_index("item")["train_count"]
    popularity = split.assign(popularity=1 + split["item"].map(counts))
    counted = popularity["popularity"]
    # Counts are whole numbers: in bins that grow by less than 1.45 the lowest ones would hold none.
    bins = max(1, min(12, int(np.log(counted.max() / counted.min()) / np.log(1.45))))
    parts = [_with({"quantity": "popularity"}, histogram(popularity, "popularity", bins=bins, log=True))]
    if "time" in split:
        real = split[~split["imputed"].eq(True)] if "imputed" in split else split
        parts.append(_with({"quantity": "time"}, histogram(real, "time")))
    return pd.concat(parts, ignore_index=True)


def describe_sources(jobs: Iterable[Any]) -> tuple[Frame, Frame]:
    """(sources, loading): what each dataset of these jobs holds before any filter, and the counts of its loader."""
    settings: dict[tuple[str, str], list[str]] = {}
    for job in jobs:
        key = (job.parameters["dataset"], json.dumps(job.parameters["dataset_options"], sort_keys=True))
        settings.setdefault(key, []).append(job.setting)
    rows, counts = [], []
    labels = _labels(settings)
    for (name, options), used in settings.items():
        label = labels[name, options]
        row = {"dataset": label, "settings": len(used)}
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                data = load_dataset(name, **json.loads(options))
            except StudyError as error:
                rows.append({**row, "remark": _sentence(str(error))})
                continue
        table, rating = data.table, data.table["rating"]
        strict, threshold = getattr(data, "strict", False), getattr(data, "positive_threshold", 4.0)
        row |= {"users": table["user"].nunique(), "items": len(data.items), "items_used": table["item"].nunique()}
        row |= {"interactions": len(table), "lowest": rating.min(), "highest": rating.max()}
        row |= {"positive": f"{'>' if strict else '>='} {threshold:g}"}
        if "time" in table:
            first, last = pd.to_datetime(table["time"].agg(["min", "max"]), unit="s").dt.strftime("%Y-%m-%d")
            row |= {"first": first, "last": last}
        rows.append({**row, "remark": " ".join(dict.fromkeys(_sentence(str(each.message)) for each in said))})
        counts += [{"dataset": label, "count": count, "value": value} for count, value in data.stats.items()]
    return pd.DataFrame(rows, columns=SOURCES), pd.DataFrame(counts, columns=["dataset", "count", "value"])


def _labels(loaded: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """What tables call each (dataset, options as JSON): its name, and those of its options that others of it differ in.

    Several files of readers' own are all ``custom``: rows of one name would pass for one dataset.
    """
    chosen = {key: json.loads(key[1]) for key in loaded}
    found = {}
    for (name, text), options in chosen.items():
        others = [other for (dataset, _), other in chosen.items() if dataset == name]
        own = [
            f"{option}={value}"
            for option, value in options.items()
            if any(option not in other or other[option] != value for other in others)
        ]
        found[name, text] = f"{name} ({_sentence(', '.join(own))})" if own else name
    return found


def describe_prompts() -> Frame:
    """The prompt sets by split: prompts, mean lengths of history and candidate list, distinct targets."""
    rows = []
    for name in PROMPT_SETS:
        try:
            table = load_prompts(name)
        except StudyError as error:
            rows.append({"prompts": name, "remark": _sentence(str(error))})
            continue
        for split, part in table.groupby("split", sort=False):
            row = {"prompts": name, "split": split, "rows": len(part), "targets": part["target"].nunique()}
            row |= {column: part[column].map(len).astype(float).mean() for column in ("history", "candidates")}
            rows.append(row)
    return pd.DataFrame(rows, columns=PROMPTS)


def write(study: Any) -> list[Path]:
    """Collect a study's tables into ``results/<study>/``; returns the files."""
    tables = collect(study)
    missing = [name for name in TABLES if name not in tables]
    if missing:
        raise StudyError(f"study {study.name}: no setting could be split, see its reasons: mend or add a setting")
    return write_tables(study.folder, {name: tables[name] for name in TABLES}, digits=8)


def _with(key: Mapping[str, Any], table: Frame) -> Frame:
    """A table with the same values in leading columns of every row."""
    return pd.concat([pd.DataFrame(key, index=table.index), table], axis=1)


def _sentence(said: str) -> str:
    """What a loader, a shift or a failed run said, without the folders of this machine."""
    text = re.sub(r"^error: | \(executed copy: .*\)$", "", said.strip())
    return text.replace(str(data_folder()), "$CAUSALDPO_DATA").replace(f"{ROOT}/", "")


# --- reading them ---


def tables_folder(path: str | Path) -> Path:
    """A study's folder of tables (``records.folder_with``)."""
    return folder_with("datasets.csv", path, f"make study STUDY={Path(path).name}")


def read(path: str | Path) -> dict[str, Frame]:
    """The tables as `write` left them, by file stem; ``path`` as in `tables_folder`.

    Raises:
        StudyError: a table is missing or cannot be read.
    """
    folder = tables_folder(path)
    return {name: read_table(folder / f"{name}.csv", "run the study again") for name in TABLES}


def table_2(study: Tables) -> Frame:
    """Users, items and interactions that the paper's Table 2 prints, and of what stands for each dataset here.

    Columns: paper (its name), source (``paper, printed``, or a dataset with ``as loaded`` or ``positives kept``),
    users, items, interactions, density.
    """
    sources = study["datasets_sources"]
    summary = select(study["datasets_summary"], outcome="split")
    rows = []
    for paper, users, items, interactions, stand_ins in PAPER:
        rows.append((paper, "paper, printed", users, items, interactions))
        for dataset in stand_ins:
            for stage, table in (("as loaded", sources), ("positives kept", summary)):
                found = _first(table, dataset)
                if found is not None:
                    rows.append((paper, f"{dataset}, {stage}", *found[["users", "items", "interactions"]]))
    table = pd.DataFrame(rows, columns=["paper", "source", "users", "items", "interactions"])
    table = table.astype({name: int for name in ("users", "items", "interactions")})
    return table.assign(density=table["interactions"] / (table["users"] * table["items"]))


def _first(table: Frame, dataset: str) -> pd.Series | None:
    """The first row with counts of a dataset, whatever its options; None without any."""
    rows = table[table["dataset"].str.partition(" (")[0].eq(dataset) & table["users"].notna()]
    return rows.iloc[0] if len(rows) else None


def table_2_cells(study: Tables) -> Frame:
    """`table_2` as text cells."""
    table = table_2(study)
    for column in ("users", "items", "interactions"):
        table[column] = table[column].map("{:,}".format)
    return table.assign(density=table["density"].map("{:.4%}".format))


def sources_cells(study: Tables) -> Frame:
    """What each dataset holds as loaded, as text cells: counts, scale and rule for positives, times, remarks."""
    rows = study["datasets_sources"]
    table = rows[["dataset"]].copy()
    for column in ("users", "items", "interactions"):
        table[column] = rows[column].map(lambda value: "" if pd.isna(value) else f"{value:,.0f}")
    scale = rows["lowest"].map("{:g}".format) + " to " + rows["highest"].map("{:g}".format)
    table["ratings"] = scale.where(rows["users"].notna(), "")
    table["positive"] = rows["positive"].fillna("")
    table["times"] = (rows["first"] + " to " + rows["last"]).fillna("none")
    return table.assign(remark=rows["remark"].fillna(""))


def differences(study: Tables) -> str:
    """Why the counts of `table_2` differ, in Markdown; every number of this study is read from its tables."""
    counts = table_2(study).set_index("source")
    summary, lines = study["datasets_summary"], []

    def has(dataset: str) -> bool:
        return f"{dataset}, as loaded" in counts.index

    def loaded(dataset: str, column: str = "interactions") -> int:
        return int(counts.loc[f"{dataset}, as loaded", column])

    def filtered(dataset: str) -> tuple[int, int] | None:
        """(rows of the files, those of them that the loader left out), None where its counts do not say so."""
        label = _first(study["datasets_sources"], dataset)["dataset"]
        did = select(study["datasets_loading"], dataset=label).set_index("count")["value"]
        known = {"rows_read", "rows_filtered"} <= set(did.index)
        return (int(did["rows_read"]), int(did["rows_filtered"])) if known else None

    def implicit() -> str:
        """What became of the implicit ratings, zeros, of Book-Crossing."""
        if _first(study["datasets_sources"], "book-crossing")["lowest"] == 0:
            return ", implicit ones among them"
        rows_read, left_out = filtered("book-crossing") or (0, 0)
        if left_out:
            return f" after the loader left out {left_out:,} implicit ones of {rows_read:,} rows"
        return ", none of them implicit" if rows_read else ""

    def kept(dataset: str) -> str:
        name = f"{dataset}, positives kept"
        if name not in counts.index:
            reasons = select(summary, dataset=dataset, outcome="refused")["reason"]
            return f"nothing is kept ({reasons.iloc[0] if len(reasons) else 'no setting'})"
        row = counts.loc[name]
        return f"{row['interactions']:,} positives of {row['users']:,} users on {row['items']:,} items are kept"

    printed = {name: interactions for name, _, _, interactions, _ in PAPER}
    stand_ins = [name for name in PAPER[0][4] if has(name)]
    lines.append(
        "**Raw or filtered.** All three rows of the paper are counts before its own filters (at least 20 or 40 "
        "interactions a user, ratings above 4 or 7), so none of them is the data that any method was trained on. Here "
        "both are given: as loaded, and the positives kept."
    )
    sizes = "; ".join(f"{n}: {loaded(n):,} ratings, {loaded(n) / printed['MovieLens-10M']:.1%}" for n in stand_ins)
    if not has("ml-10m") and not stand_ins:
        lines.append("**MovieLens-10M** is not at hand, and nothing of its publisher stands in for it.")
    elif not has("ml-10m"):
        lines.append(
            f"**MovieLens-10M** is not at hand; smaller data of the same publisher stand in for it ({sizes} of the "
            f"printed {printed['MovieLens-10M']:,}). "
            + " ".join(f"Of {name} {kept(name)}." for name in stand_ins)
            + (" The library loads the 10M files too: name `ml-10m` in the study." if "ml-10m" in DATASETS else "")
        )
    reviews = ""
    if has("yelp"):
        rows_read, left_out = filtered("yelp") or (0, 0)
        part = f" (the loader left out {left_out:,} of {rows_read:,} rows)" if left_out else ""
        reviews = f" The sample of it at hand has {loaded('yelp'):,} reviews{part}; {kept('yelp')}."
    lines.append(
        f"**Yelp2018.** The printed {printed['Yelp2018']:,} interactions are those of the 10-core benchmark used for "
        "graph recommenders, which has no ratings, no times and no names: the paper's rating filter, its temporal "
        "split and its text prompts need the publisher's Yelp Open Dataset instead, whose counts are others."
        f"{reviews}"
    )
    books = ""
    if has("book-crossing"):
        share = loaded("book-crossing") / printed["Book-Crossing"]
        books = (
            f" What is at hand has {loaded('book-crossing'):,} ratings ({share:.0%}){implicit()}; editions of one "
            f"title are one item; {kept('book-crossing')}."
        )
    lines.append(
        f"**Book-Crossing.** The printed {printed['Book-Crossing']:,} rows are the publisher's whole dump, of which "
        "62 % are zeros for books without a rating. It has no times, so the paper's chronological cut cannot be made "
        f"from it; here the exposure shift starts from a random test.{books}"
    )
    return "\n".join(f"- {line}" for line in lines)


# --- what the paper leaves open ---


def choices(shifts: Mapping[str, Any] = SPLITS, datasets: Mapping[str, Callable[..., Any]] = DATASETS) -> Frame:
    """Every option of filters, cuts, shifts and loaders with its default, as the functions' signatures say.

    Columns: where (``every split``, shift or dataset), option, default, meaning (the option's own line of the
    function's docstring). The simulator, which stands for no dataset, is left out.

    Raises:
        StudyError: an option has no line of its own.
    """
    every = {shift: shift_functions(shift) for shift in shifts}
    common = [function for function in next(iter(every.values())) if all(function in own for own in every.values())]
    rows = [("every split", function) for function in common]
    rows += [(f"shift {shift}", f) for shift, own in every.items() for f in own if f not in common]
    rows += [(f"dataset {name}", loader) for name, loader in datasets.items() if name != "simulated"]
    found: dict[tuple[str, str], dict[str, str]] = {}
    for where, function in rows:
        for option, default in options_of(function).items():
            if where.startswith("shift") and ("every split", option) in found:
                continue  # handed on to this shift
            row = {"where": where, "option": f"`{option}`", "default": f"`{_shown_default(default)}`"}
            found.setdefault((where, option), row | {"meaning": _meaning(function, option)})
    return pd.DataFrame(list(found.values()))


def _shown_default(default: Any) -> str:
    return ":".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _meaning(function: Callable[..., Any], option: str) -> str:
    """What a docstring's line of an option says: that which begins with its name in backticks, and what hangs on it.

    Sentences elsewhere that name the option are about something else: a default, a quirk, another option.
    """
    said = re.search(rf"^( *)``{option}``: (.*(?:\n\1 +\S.*)*)", inspect.getdoc(function) or "", flags=re.MULTILINE)
    if said is None:
        raise StudyError(
            f"option {option!r} of {function.__name__} has no line of its own in the docstring: add one that begins "
            f"with ``{option}``: and says what it means"
        )
    return re.sub(r"\s+", " ", said[2]).replace("``", "`").replace("|", "/").rstrip(".")


# --- sentences and text ---


def _tested(study: Tables, column: str) -> Frame:
    """One number of both tests by setting, columns iid_test and ood_test."""
    wide = study["datasets"].pivot(index="setting", columns="split", values=column)
    return wide.reindex(study["datasets"]["setting"].unique())[["iid_test", "ood_test"]]


def numbers_takeaway(study: Tables) -> str:
    """Where the OOD test differs from the IID test in Gini, groups, new items and new users. In Markdown."""
    gini, groups = _tested(study, "gini"), _tested(study, "kl_mass")
    flat = gini["ood_test"] / gini["iid_test"]
    new = _tested(study, "new_users")["ood_test"]
    old = [name for name in new.index if new[name] == 0]
    return (
        f"**Takeaway.** The OOD test is flattest against its IID test on {flat.idxmin()} (Gini "
        f"{gini.loc[flat.idxmin(), 'ood_test']:.2f} instead of {gini.loc[flat.idxmin(), 'iid_test']:.2f}) and most "
        f"concentrated on {flat.idxmax()} ({gini.loc[flat.idxmax(), 'ood_test']:.2f} instead of "
        f"{gini.loc[flat.idxmax(), 'iid_test']:.2f}). Over groups of equal training mass no IID test is further from "
        f"uniform than {groups['iid_test'].max():.3f} nats, the OOD test of {groups['ood_test'].idxmax()} is "
        f"{groups['ood_test'].max():.2f} nats away. New users make {new.max():.0%} of the OOD interactions on "
        f"{new.idxmax()} and none in {len(old)} of {len(new)} settings."
    )


def popularity_takeaway(study: Tables) -> str:
    """How the median training popularity of the targets moves from the IID to the OOD test. In Markdown."""
    median = _tested(study, "popularity")
    ratio = median["ood_test"] / median["iid_test"]
    lower = [name for name in ratio.index if ratio[name] < 0.8]
    return (
        f"**Takeaway.** The median OOD target has less than 80 % of the training interactions of the median IID target "
        f"in {len(lower)} of {len(ratio)} settings ({', '.join(lower) or 'none'}); least on {ratio.idxmin()}: "
        f"{median.loc[ratio.idxmin(), 'ood_test']:.0f} instead of {median.loc[ratio.idxmin(), 'iid_test']:.0f}."
    )


def time_takeaway(study: Tables) -> str:
    """Which OOD tests lie after training, and how many cuts per user fall inside one sitting. In Markdown."""
    later = _tested(study, "later")["ood_test"].dropna()
    after, partly = (
        [name for name in later.index if low <= later[name] < high] for low, high in ((0.99, 2), (0.05, 0.99))
    )
    timed = study["datasets_summary"].dropna(subset=["sitting"])
    timed = timed[timed["cuts"] > 0].groupby("dataset", sort=False)["sitting"]
    within = ", ".join(f"{name} {part.min():.0%}" + _up_to(part) for name, part in timed)
    return (
        f"**Takeaway.** The whole OOD test is later than all training in {', '.join(after) or 'no setting'}; a part of "
        f"it in {', '.join(f'{name} ({later[name]:.0%})' for name in partly) or 'no setting'}. A cut in each user's "
        f"own time would fall inside one sitting (less than an hour) for these shares of the users: {within}."
    )


def _up_to(part: pd.Series) -> str:
    return f" to {part.max():.0%}" if f"{part.max():.0%}" != f"{part.min():.0%}" else ""


def kinds_text(study: Tables) -> str:
    """Each setting with the kind of shift that its numbers show, or why there is none, as a Markdown list."""
    lines = []
    for row in study["datasets_summary"].itertuples():
        said = f"{row.kind}." if row.outcome == "split" else f"refused: {row.reason}"
        lines.append(f"- **{row.setting}**: {said}")
    return "\n".join(lines)


def summary_text(folder: str | Path) -> str:
    """The main numbers for the console: a line per dataset, setting and prompt set."""
    study = read(folder)
    lines = []
    for row in study["datasets_sources"].itertuples():
        counts = "not loaded" if pd.isna(row.users) else f"{row.users:,.0f} users, {row.items:,.0f} items"
        counts += "" if pd.isna(row.users) else f", {row.interactions:,.0f} interactions"
        lines.append(f"{row.dataset}: {counts}" + (f" ({row.remark})" if isinstance(row.remark, str) else ""))
    lines.append("")
    for row in study["datasets_summary"].itertuples():
        kept = "refused: " + str(row.reason) if row.outcome == "refused" else f"{row.interactions:,.0f} positives"
        lines.append(f"{row.setting}: {kept}" + (f"; shift: {row.kinds}" if row.outcome == "split" else ""))
    lines.append("")
    for row in study["datasets_prompts"].itertuples():
        known = isinstance(row.split, str)
        lines.append(f"prompts {row.prompts}: " + (f"{row.split}, {row.rows:,.0f} rows" if known else str(row.remark)))
    return "\n".join(lines)


def shown_numbers(study: Tables, setting: str) -> Frame:
    """The rows of datasets.csv of one setting as text cells: counts, and shares in percent."""
    rows = select(study["datasets"], setting=setting)
    table = pd.DataFrame({"split": [SPLIT_LABELS.get(name, "training") for name in rows["split"]]})
    for column in ("interactions", "users", "items", "examples"):
        table[column] = rows[column].map("{:,}".format)
    for column, title in (("gini", "Gini"), ("kl_mass", "KL of mass groups"), ("kl_items", "KL of item groups")):
        table[title] = rows[column].map("{:.3f}".format)
    table["median popularity"] = rows["popularity"].map("{:.0f}".format)
    for column, title in (("new_items", "new items"), ("new_users", "new users"), ("later", "later than training")):
        table[title] = rows[column].map(lambda share: "" if np.isnan(share) else f"{share:.1%}")
    return table


# --- command line ---


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tables of a study of data alone and print their paths; 0, or 1 after one sentence about the fault."""
    from causaldpo_lib.study import command

    return command("survey", main.__doc__, write, arguments)


if __name__ == "__main__":
    sys.exit(main())
