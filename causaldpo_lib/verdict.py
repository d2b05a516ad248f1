"""For each statement of the papers and of this study's own proposal: the tests that bear on it, and what they say.

A statement is tested by signed paired differences (``takeaways.Claim``) in every published study that has them. Words
of a test, as in ``takeaways.claim_table``: *reproduced*, *contradicted*, *equivalent* (an effect of half the size that
the paper claims is excluded), *not detected*. Words of a statement (``word``):

    supported              every test reproduces it
    supported in part      some tests reproduce it, none contradicts it
    mixed                  some reproduce it, some contradict it
    not supported          none reproduces it, and at least one contradicts it or excludes an effect of the margin
    undecided              no test detects anything, and none excludes an effect of the margin
    cannot be tested here  no published study has what it needs
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

import pandas as pd

from causaldpo_lib.evaluation import ndcg_metric, share_metric, slope_metric
from causaldpo_lib.plots import look, metric_name
from causaldpo_lib.tables import TEST_SPLITS, Tables, markdown
from causaldpo_lib.takeaways import HYPOTHESES, Claim, claim_table

Frame = pd.DataFrame
Claims = tuple[Claim, ...]
OOD, IID = ("ood_test",), ("iid_test",)
RESULTS = ("reproduced", "equivalent", "not detected", "contradicted")


class Statement(NamedTuple):
    """What is claimed and where, the tests that bear on it, the notebook with the evidence, what would settle it."""

    text: str
    where: str
    claims: Claims
    notebook: str
    settle: str


def _claims(
    methods: Sequence[str],
    baselines: Sequence[str],
    metrics: Sequence[str],
    sign: int = 1,
    splits: tuple[str, ...] = OOD,
) -> Claims:
    """That each method is higher (``sign`` -1: lower) than each baseline in each metric."""
    return tuple(Claim("", metric, m, b, sign, splits) for m, b, metric in product(methods, baselines, metrics))


def _at(loss: str, negatives: int) -> str:
    """The method of a sweep over numbers of negatives."""
    return f"{loss}-negatives_per_prompt-{negatives}"


def _shown(method: str, baseline: str) -> Claims:
    """That a method shows the most popular items less, and the least popular ones more, than its baseline."""
    head, tail = ((share_metric("mass", group), sign) for group, sign in (("G1", -1), ("G5", 1)))
    return tuple(Claim("", metric, method, baseline, sign) for metric, sign in (head, tail))


FIT = ("target_logp", "NDCG@10")
ALIGNMENT = ("dmpo", "s_dpo", "rose_po", "sprec")
LOSSES = ("dmpo", "s_dpo", "mppo")
LLM = "the paper's own setting on a GPU node: `make study STUDY=paper` (Llama-3.1-8B)"
MORE = "more training seeds: three decide about differences of some points at best"
PAPER = (
    Statement(
        "DPO shows popular items more, and unpopular ones less, than the supervised model",
        "Fig. 1, Proposition 3.1",
        _shown("sft", "dpo"),
        "06_popularity_amplification",
        f"the share of G1 before and after DPO in {LLM}",
    ),
    Statement(
        "DPO generalises worse than the supervised model under shift",
        "Section 1",
        _claims(["dpo"], ["sft"], FIT, -1),
        "08_results_tables",
        MORE,
    ),
    Statement(
        "CausalDPO ranks better than DPO under shift",
        "Tables 1 and 4",
        _claims(["causal_dpo"], ["dpo"], FIT),
        "08_results_tables",
        LLM,
    ),
    Statement(
        "CausalDPO ranks better than other preference optimisation under shift",
        "Tables 1 and 4",
        _claims(["causal_dpo"], ALIGNMENT, ["NDCG@10"]),
        "08_results_tables",
        LLM,
    ),
    Statement(
        "CausalDPO ranks better than recommenders without preference optimisation under shift",
        "Tables 1 and 4",
        _claims(["causal_dpo"], ["sasrec", "bigrec", "rw", "d3"], ["NDCG@10"]),
        "08_results_tables",
        LLM,
    ),
    Statement(
        "CausalDPO ranks better than DPO and the supervised model on data like the training data too",
        "Table 3",
        _claims(["causal_dpo"], ["dpo", "sft"], ["NDCG@10"], splits=IID),
        "08_results_tables",
        LLM,
    ),
    Statement(
        "CausalDPO shows popular items less, and unpopular ones more, than DPO",
        "Fig. 1",
        _shown("causal_dpo", "dpo"),
        "06_popularity_amplification",
        MORE,
    ),
    Statement(
        "CausalDPO gains most where the target is unpopular, so that accuracy falls less from group to group",
        "Fig. 2",
        _claims(["causal_dpo"], ["dpo"], [ndcg_metric("mass", "G5"), slope_metric("mass")]),
        "07_group_wise_analysis",
        "test sets with more hits among unpopular targets; here NDCG@10 of G5 is near 0 for every method",
    ),
    Statement(
        "The inferred environments make the difference, not the penalty's form",
        "Sections 3.2 and 3.3, by implication",
        _claims(["causal_dpo"], ["shuffled"], FIT) + _shown("causal_dpo", "shuffled"),
        "15_ablations",
        "environments that are known to move the outcome and can be inferred from prompts (notebook 14)",
    ),
    Statement(
        "The penalty improves other preference losses: Dr.DPO, CPO, SimPO",
        "Table 5",
        tuple(claim for loss in ("dr_dpo", "cpo", "simpo") for claim in _claims([f"{loss}_causal"], [loss], FIT)),
        "16_variants_and_cost",
        LLM,
    ),
    Statement(
        "Supervised fine-tuning and alignment are both needed",
        "Table 8",
        _claims(["causal_dpo"], ["causal_dpo_no_sft", "sft", "pretrained"], ["NDCG@10"]),
        "15_ablations",
        LLM,
    ),
    Statement(
        "More rounds help, up to four",
        "Fig. 3",
        _claims(["causal_dpo-iterations-2", "causal_dpo-iterations-4"], ["causal_dpo"], ["NDCG@10"]),
        "15_ablations",
        LLM,
    ),
    Statement(
        "It helps on backbones of other families and sizes",
        "Table 9",
        _claims(["causal_dpo-backbone-tiny-small"], ["sft-backbone-tiny-small"], ["NDCG@10"]),
        "15_ablations",
        "Qwen2.5-7B, Qwen3-8B and Llama-3.1-8B on a GPU node (`backbone` of `params/studies/paper.yaml`)",
    ),
    Statement(
        "It works at 7 and 8 billion parameters, on ML-10M, Yelp2018 and Book-Crossing",
        "Tables 1 to 9",
        (),
        "08_results_tables",
        LLM,
    ),
)
DYNAMICPO = (
    Statement(
        "Accuracy collapses when negatives become many",
        "DynamicPO, Fig. 1 and 4",
        tuple(
            claim for loss in LOSSES for claim in _claims([_at(loss, 15)], [_at(loss, 1)], ["HR@1"], -1, TEST_SPLITS)
        ),
        "13_dynamicpo",
        "a backbone of billions of parameters, its candidates in the prompt as there",
    ),
    Statement(
        "DynamicPO does better than the loss that it is put on, at many negatives",
        "DynamicPO, Table 2",
        tuple(
            claim
            for loss in LOSSES
            for claim in _claims([_at(f"dynamic_{loss}", 15)], [_at(loss, 15)], ["HR@1"], splits=TEST_SPLITS)
        ),
        "13_dynamicpo",
        "a setting in which accuracy does collapse",
    ),
)
OWN = (
    Statement(
        "The choice of negatives drives popularity: popularity-proportional ones show popular items less",
        "this study, `causaldpo_lib/pairs.py`",
        (HYPOTHESES[0],),
        "06_popularity_amplification",
        "confirmed or not by other data and backbones",
    ),
    Statement(
        "Environment-matched negatives remove what environments add: popular items are shown less",
        "this study, `causaldpo_lib/pairs.py`",
        (HYPOTHESES[1],),
        "06_popularity_amplification",
        "confirmed or not by other data and backbones",
    ),
    Statement(
        "Environment-matched negatives fit and rank better under shift than uniform ones",
        "this study",
        (HYPOTHESES[2], HYPOTHESES[3]),
        "08_results_tables",
        MORE,
    ),
    Statement(
        "They collect more of the interventional preference than uniform ones",
        "this study",
        (HYPOTHESES[4],),
        "08_results_tables",
        "a simulator whose base popularity is no part of the interventional preference",
    ),
    Statement(
        "Their environments matter: better than popularity-proportional and than shuffled ones",
        "this study",
        (HYPOTHESES[6], HYPOTHESES[7]),
        "08_results_tables",
        "environments that prompts reveal (notebook 14)",
    ),
    Statement(
        "The true environments serve them better than inferred ones",
        "this study",
        (HYPOTHESES[8],),
        "08_results_tables",
        MORE,
    ),
)


def tests_of(statement: Statement, studies: Mapping[str, Tables]) -> Frame:
    """Every test of a statement, as ``claim_table`` has it; of what several studies measured the first study counts.

    Columns: study, method, baseline, metric, setting, split, result, difference.
    """
    found = []
    for study, tables in studies.items():
        for claim in statement.claims:
            about = {"study": study, "method": claim.method, "baseline": claim.baseline, "metric": claim.metric}
            found.append(claim_table(tables, [claim]).assign(**about))
    columns = ["study", "method", "baseline", "metric", "setting", "split", "result", "difference"]
    rows = pd.concat(found)[columns] if found else pd.DataFrame(columns=columns)
    return rows.drop_duplicates(["method", "baseline", "metric", "setting", "split"]).reset_index(drop=True)


def word(results: Sequence[str]) -> str:
    """A statement's verdict from the results of its tests (the module's docstring has the rule)."""
    count = {name: list(results).count(name) for name in RESULTS}
    if not len(results):
        return "cannot be tested here"
    if count["reproduced"] == len(results):
        return "supported"
    if count["reproduced"]:
        return "mixed" if count["contradicted"] else "supported in part"
    return "not supported" if count["contradicted"] or count["equivalent"] else "undecided"


def counts(statements: Sequence[Statement], studies: Mapping[str, Tables]) -> Frame:
    """A row per statement: its verdict and the number of its tests with each result of ``RESULTS``."""
    lines = []
    for statement in statements:
        results = list(tests_of(statement, studies)["result"])
        number = {name: results.count(name) for name in RESULTS}
        lines.append({"statement": statement.text, "verdict": word(results), **number, "tests": len(results)})
    return pd.DataFrame(lines, columns=["statement", "verdict", *RESULTS, "tests"])


def summary(statement: Statement, studies: Mapping[str, Tables]) -> str:
    """The verdict on a statement in a sentence with the numbers behind it, and what would settle it, in Markdown."""
    row = counts([statement], studies).iloc[0]
    said = f"**{row['verdict'].capitalize()}.**"
    if row["tests"]:
        tests = "test" if row["tests"] == 1 else "tests"
        said += f" Of {row['tests']} {tests}: " + ", ".join(f"{row[name]} {name}" for name in RESULTS) + "."
    return f"{said} What would settle it: {statement.settle}."


def section(statement: Statement, studies: Mapping[str, Tables]) -> str:
    """A statement with its verdict and every test behind it, in Markdown."""
    link = f"[{statement.notebook.replace('_', ' ')}]({statement.notebook}.ipynb)"
    parts = [f"### {statement.text}", f"*{statement.where}; evidence in {link}*", summary(statement, studies)]
    rows = tests_of(statement, studies)
    if len(rows):
        names = rows["method"].map(label) + " − " + rows["baseline"].map(label)
        shown = rows.assign(comparison=names, metric=rows["metric"].map(metric_name))
        parts.append(markdown(shown[["setting", "split", "metric", "comparison", "difference", "result"]]))
    return "\n\n".join(parts)


def label(method: str) -> str:
    """What figures and tables call a method."""
    return look(method).label


def takeaway(studies: Mapping[str, Tables]) -> str:
    """How many statements of the paper under study are supported, and how this study's own fare, in Markdown."""
    said = []
    for what, statements in (
        ("statements of the CausalDPO paper", PAPER),
        ("statements of the DynamicPO paper", DYNAMICPO),
        ("of this study's own", OWN),
    ):
        verdicts = counts(statements, studies)["verdict"].value_counts()
        found = ", ".join(f"{number} {name}" for name, number in verdicts.items())
        said.append(f"Of {len(statements)} {what}: {found}.")
    return f"**Takeaway.** {' '.join(said)}"
