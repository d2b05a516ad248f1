"""Who is shown more, or less, after alignment: one popularity group's share over all settings of several studies.

Two causes are told apart (arXiv 2603.22335, Section 3.1, names the first only). A *confounder*: environments that push
the same items in many histories; its strength is known on simulated data. The *negative sampler*: with rejected items
drawn from q, DPO's optimum is ref(y) (p(y|x) / q(y|x))^(1/beta). Uniform negatives so sharpen every prompt's
distribution, confounded or not; whether popular items gain by it over all prompts depends on how much their prompts
already agree. Negatives in proportion to popularity divide it out.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from causaldpo_lib.data.simulated import simulate
from causaldpo_lib.evaluation import share_metric
from causaldpo_lib.paths import PARAMS
from causaldpo_lib.pipeline import declared
from causaldpo_lib.plots import SPLITS, look
from causaldpo_lib.study import Setting, Study, load_study
from causaldpo_lib.tables import TEST_SPLITS, Tables, settings
from causaldpo_lib.takeaways import BELOW, change

Frame = pd.DataFrame
STEPS = (  # what the alignment changes, and what is changed about it
    ("dpo", "sft"),
    ("popularity_negatives", "sft"),
    ("causal_dpo", "dpo"),
    ("shuffled", "dpo"),
    ("causal_negatives", "dpo"),
)


def strengths(name: str) -> dict[str, float]:
    """Confounding strength (log-odds of a boosted item) of each setting of a study that is simulated."""
    if not (PARAMS / "studies" / f"{name}.yaml").exists():
        return {}
    study = load_study(name)
    simulated = (setting for setting in study.settings if setting.dataset == "simulated")
    return {setting.name: strength_of(_dataset_options(study, setting)) for setting in simulated}


def _dataset_options(study: Study, setting: Setting) -> Mapping[str, Any]:
    """Of a setting's data run: the setting's own, else the study's, else notebook 01's."""
    layers = declared("data"), study.overrides.get("data", {}), setting.overrides.get("data", {})
    return next(layer["dataset_options"] for layer in reversed(layers) if "dataset_options" in layer)


def strength_of(options: Mapping[str, Any]) -> float:
    """The confounding strength that options of the simulator ask for, else its default."""
    return float(options.get("strength", inspect.signature(simulate).parameters["strength"].default))


def share_changes(studies: Mapping[str, Tables], group: str = "G1", grouping: str = "mass") -> Frame:
    """The change of a group's share of the top-10 slots, for each step of ``STEPS`` that a setting measures.

    Of settings that several studies hold, under one name or two, the first study counts. Columns: setting, strength
    (NaN: unknown), name (of the comparison), split, method, baseline, mean, low, high (points), word (of
    ``takeaways.verdict``), size (the difference in words).
    """
    lines, seen = [], set()
    for study, tables in studies.items():
        known = strengths(study)
        for setting in (name for name in settings(tables) if name not in seen):
            seen.add(setting)
            for method, baseline in STEPS:
                for split in TEST_SPLITS:
                    found = change(tables, setting, split, share_metric(grouping, group), method, baseline)
                    if found is None:
                        continue
                    size = [100 * found.difference, 100 * found.low, 100 * found.high]
                    name = f"{look(method).label} − {look(baseline).label}"
                    lines.append(
                        [setting, known.get(setting), name, split, method, baseline, *size, found.word, found.size]
                    )
    columns = ["setting", "strength", "name", "split", "method", "baseline", "mean", "low", "high", "word", "size"]
    found = pd.DataFrame(lines, columns=columns).astype({"strength": float})
    numbers = found.groupby("setting", sort=False)[["mean", "low", "high"]].agg(tuple)  # the same runs, another name
    return found[found["setting"].isin(numbers[~numbers.duplicated()].index)].reset_index(drop=True)


def _where(rows: Frame) -> str:
    below = [BELOW * (BELOW in size) for size in rows["size"]]
    sizes = [f"{r.mean:+.1f} [{r.low:+.1f}, {r.high:+.1f}]" for r in rows.itertuples()]
    return ", ".join(f"{name} ({size}{end})" for name, size, end in zip(rows["setting"], sizes, below, strict=True))


def _counted(rows: Frame) -> str:
    """In how many settings a step raised, lowered or left a share, with the sizes of what was detected."""
    if rows.empty:
        return ""
    said = []
    for word in ("raised", "lowered"):
        found = rows[rows["word"] == word]
        said.append(f"{word} in {len(found)} ({_where(found)})" if len(found) else f"{word} in none")
    return f"of {len(rows)} settings {', '.join(said)}, no detectable change in the rest."


def causes_takeaway(changes: Frame, split: str = "ood_test") -> str:
    """Does DPO amplify, is a confounder or the sampler the cause, do CausalDPO and its control undo it? In Markdown."""
    rows = changes[changes["split"] == split]
    uniform, popular, causal, shuffled = (
        rows[(rows["method"] == method) & (rows["baseline"] == baseline)] for method, baseline in STEPS[:4]
    )
    answers = {
        "Amplification, DPO with uniform negatives against SFT": _counted(uniform),
        "Does a confounder add to it": strength_sentence(uniform),
        "The negatives, popularity-proportional ones against SFT": _counted(popular),
        "Does a confounder add to that": strength_sentence(popular),
        "CausalDPO against DPO": _counted(causal),
        "Its shuffled control against DPO": _counted(shuffled),
    }
    lines = [f"- {name}: {text}" for name, text in answers.items() if text]
    return "\n".join([f"**Takeaway.** *Share of G1 (points), {SPLITS[split]}.*", "", *lines])


def strength_sentence(rows: Frame) -> str:
    """One step at the least and at the greatest confounding strength; empty where no strength is known.

    The settings are independent, so the half-widths of their intervals add in squares to that of the difference.
    """
    rows = rows.dropna(subset="strength").sort_values("strength")
    if rows.empty:
        return ""
    least, most = rows.iloc[0], rows.iloc[-1]
    at = "without any confounding" if least["strength"] == 0 else f"at strength {least['strength']:g}"
    first = f"{at} {least['size']}"
    if least["word"] == "raised" and least["strength"] == 0:
        first += ", so that this amplification needs no confounder"
    if len(rows) == 1:
        return first + "."
    difference = most["mean"] - least["mean"]
    reach = np.hypot(least["high"] - least["low"], most["high"] - most["low"]) / 2
    return (
        f"{first}; at strength {most['strength']:g} {most['size']}; confounding so adds {difference:+.1f} points "
        f"[{difference - reach:+.1f}, {difference + reach:+.1f}]."
    )


def changes_caption(changes: Frame) -> str:
    """What the rows of the figure are: settings, their confounding strength where it is known, and the whiskers."""
    known = changes.dropna(subset="strength").drop_duplicates("setting")
    strength = ", ".join(f"{row.strength:g} in {row.setting}" for row in known.itertuples())
    about = f"; log-odds of a boosted item: {strength}" if strength else ""
    return f"*Paired by training seed and example; whiskers: 95 % intervals over seeds and users{about}.*"
