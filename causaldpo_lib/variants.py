"""Does the causal penalty help other losses than DPO? Frames and sentences of notebook 16, beside the paper's Table 5.

Each loss with the penalty against the same loss without: paired differences in ``ablations.METRICS``.
"""

from __future__ import annotations

import pandas as pd

from causaldpo_lib import ablations, takeaways
from causaldpo_lib.ablations import METRICS, PRIMARY, SHORT
from causaldpo_lib.audit import OURS, printed_rows, published, violations
from causaldpo_lib.comparison import PENALISED, VARIANTS
from causaldpo_lib.evaluation import K
from causaldpo_lib.plots import SPLITS
from causaldpo_lib.tables import TEST_SPLITS, Tables, select
from causaldpo_lib.takeaways import Pairs, change

Frame = pd.DataFrame
PRINTED = {"DPO": ("DPO", OURS), **{name: (name, f"{name} + causal") for name in VARIANTS}}  # without, with
PAIRS: Pairs = {"DPO": ("causal_dpo", "dpo")} | {
    name: (PENALISED[f"{name} + causal"], method) for name, method in VARIANTS.items()
}
NDCG = f"NDCG@{K}"


def measured(tables: Tables, setting: str) -> Pairs:
    """The losses of ``PAIRS`` that the study has compared with and without the penalty."""
    found = select(tables["paired"], setting=setting)[["method", "baseline"]].drop_duplicates()
    there = set(found.itertuples(index=False, name=None))
    return {name: pair for name, pair in PAIRS.items() if pair in there}


def differences(tables: Tables, setting: str) -> Frame:
    """Rows of paired.csv for each loss, in the order of ``METRICS``, under the metrics' short names."""
    rows = select(tables["paired"], setting=setting)
    parts = [
        select(rows, metric=metric, method=method, baseline=baseline)
        for metric in METRICS
        for method, baseline in measured(tables, setting).values()
    ]
    found = pd.concat([select(rows, metric=[]), *parts], ignore_index=True)
    return found.assign(metric=found["metric"].replace({name: SHORT[name] for name in METRICS if name != PRIMARY}))


def beside_paper(tables: Tables, setting: str) -> Frame:
    """What the penalty adds in NDCG@10, in points: as printed for each dataset, and here with intervals, per loss.

    ``*`` marks a printed difference of which a row cannot be right as printed (``audit.violations``).
    """
    rows = printed_rows(published("accuracy"))
    rows = rows[rows["table"] == 5]
    broken = set(violations(rows)[["dataset", "method"]].itertuples(index=False, name=None))
    by = rows.set_index(["dataset", "method"])[NDCG]
    lines = []
    for name, pair in measured(tables, setting).items():
        line: dict[str, str] = {"loss": name}
        for dataset in rows["dataset"].unique():
            without, with_ = ((dataset, method) for method in PRINTED[name])
            mark = "*" * bool({without, with_} & broken)
            line[f"paper, {dataset}"] = f"{by[with_] - by[without]:+.2f}{mark}"
        for split in TEST_SPLITS:
            found = change(tables, setting, split, NDCG, *pair)
            line[f"here, {SPLITS[split]}"] = found.size.replace(" points", "") if found else "not compared"
        lines.append(line)
    return pd.DataFrame(lines)


def takeaway(tables: Tables, setting: str) -> str:
    """Where the penalty changes what its loss does: the primary metric with sizes, then all metrics counted."""
    pairs = measured(tables, setting)
    if not pairs:
        return f"**Takeaway.** *{setting}.* No loss was trained with the penalty and without."
    said = takeaways.answers(tables, setting, "ood_test", PRIMARY, pairs)
    counted = [
        f"- {title}, both tests: {takeaways.tally(tables, name, pairs, [setting])}."
        for name, title in ablations.measured(tables, setting).items()
    ]
    words = {change(tables, setting, "ood_test", PRIMARY, *pair).word for pair in pairs.values()}
    alike = f"the same for all losses: {words.pop()}" if len(words) == 1 else "not the same for all losses"
    head = (
        f"**Takeaway.** *{setting}, OOD test.* Log-probability of the target with the penalty against without: {said}."
    )
    return "\n".join([f"{head} The verdict is {alike}.", "", *counted])
