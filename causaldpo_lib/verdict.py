"""For each statement of the papers and of this study's own proposal: the tests that bear on it, and what they say.

A statement is tested by signed paired differences (``takeaways.Claim``) in the published studies that have them. Words
of a test, as in ``takeaways.claim_table``: *reproduced*, *contradicted*, *equivalent* (whatever its sign, a change of
the margin is excluded: ``evaluation.MARGIN``), *not detected*. Where nothing is confounded nothing is claimed, so
settings of strength 0 count for statements that hold ``everywhere`` only. Words of a statement (``word``):

    supported              every test reproduces it, and every claim of it is tested
    supported in part      a fifth of the tests or more reproduce it, none contradicts it
    isolated support       fewer do, none contradicts it
    mixed                  some reproduce it, some contradict it
    not supported          none reproduces it, and half of them or more contradict it or exclude a change of the margin
    contradicted in part   none reproduces it, some contradict it, and most detect and exclude nothing
    undecided              none reproduces or contradicts it, and most detect and exclude nothing
    cannot be tested here  no published study has what it needs

p-values are corrected over the methods compared with one baseline in one metric, not over the tests of a statement: of
twenty tests of nothing one is expected to find something, and what is a family of its own is not corrected at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

import pandas as pd

from causaldpo_lib import collapse
from causaldpo_lib.amplification import strengths
from causaldpo_lib.comparison import ALIGNED, PENALISED, PLAIN, VARIANTS
from causaldpo_lib.evaluation import K, ndcg_metric, share_metric, slope_metric
from causaldpo_lib.plots import look, metric_name
from causaldpo_lib.tables import TEST_SPLITS, Tables, markdown
from causaldpo_lib.takeaways import Claim, claim_table

Frame = pd.DataFrame
Claims = tuple[Claim, ...]
OOD, IID = ("ood_test",), ("iid_test",)
RESULTS = ("reproduced", "equivalent", "not detected", "contradicted")
FEW = 0.2  # share of the tests, from which support is more than isolated


class Statement(NamedTuple):
    """What is claimed and where, the tests that bear on it, the notebook with the evidence, what would settle it.

    ``everywhere``: it is claimed without a confounder too.
    """

    text: str
    where: str
    claims: Claims
    notebook: str
    settle: str
    everywhere: bool = False


def _claims(
    methods: Sequence[str], baselines: Sequence[str], metrics: Sequence[str], sign: int = 1, splits: Sequence[str] = OOD
) -> Claims:
    """That each method is higher (``sign`` -1: lower) than each baseline in each metric."""
    return tuple(claim for metric in metrics for claim in _paired(product(methods, baselines), metric, splits, sign))


def _paired(pairs: Iterable[tuple[str, str]], metric: str, splits: Sequence[str], sign: int = 1) -> Claims:
    """That the first method of each pair is higher (``sign`` -1: lower) than the second."""
    return tuple(Claim("", metric, method, baseline, sign, tuple(splits)) for method, baseline in pairs)


def _shown(method: str, baseline: str, popular: int = -1) -> Claims:
    """That a method shows the most popular items less (``popular`` 1: more), the least popular ones more (less)."""
    ends = (("G1", popular), ("G5", -popular))
    return tuple(Claim("", share_metric("mass", group), method, baseline, sign) for group, sign in ends)


NDCG, FIT, CAUSAL = ["NDCG@10"], ["target_logp"], [f"causal_NDCG@{K}"]
# As sweeps name their rows: the penalty's strength, whose environments.
STRENGTH, SHUFFLED, TRUE = "-mmd_weight-", "-memberships-shuffled", "-memberships-oracle_environment"
OTHERS = [method for method in ALIGNED.values() if method != "causal_dpo"]  # preference optimisation of Table 1
LLM = "the paper's own setting on a GPU node: `make study STUDY=paper` (Llama-3.1-8B)"
MORE = "more training seeds: three decide about differences of some points at best"
OTHER = "other data, and backbones that know the items"
PAPER = (
    Statement(
        "DPO shows popular items more, and unpopular ones less, than the supervised model",
        "Fig. 1, Proposition 3.1",
        _shown("dpo", "sft", popular=1),
        "06_popularity_amplification",
        f"the share of G1 before and after DPO in {LLM}",
    ),
    Statement(
        "DPO ranks worse than the supervised model under shift",
        "Section 1",
        _claims(["dpo"], ["sft"], NDCG, -1),
        "08_results_tables",
        MORE,
    ),
    Statement(
        "CausalDPO ranks better than DPO under shift",
        "Tables 1 and 4",
        _claims(["causal_dpo"], ["dpo"], NDCG),
        "08_results_tables",
        LLM,
    ),
    Statement(
        "CausalDPO ranks better than other preference optimisation under shift",
        "Tables 1 and 4",
        _claims(["causal_dpo"], OTHERS, NDCG),
        "08_results_tables",
        LLM,
    ),
    Statement(
        "CausalDPO ranks better than recommenders without preference optimisation under shift",
        "Tables 1 and 4",
        _claims(["causal_dpo"], [*PLAIN.values()], NDCG),
        "08_results_tables",
        LLM,
    ),
    Statement(
        "CausalDPO ranks better than DPO and the supervised model on data like the training data too",
        "Table 3",
        _claims(["causal_dpo"], ["dpo", "sft"], NDCG, splits=IID),
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
        "test sets with more hits among unpopular targets",
    ),
    Statement(
        "The penalty makes Dr.DPO, CPO and SimPO rank better",
        "Table 5",
        _paired(zip(PENALISED.values(), VARIANTS.values(), strict=True), "NDCG@10", OOD),
        "16_variants_and_cost",
        LLM,
    ),
    Statement(
        "CausalDPO ranks better than without its fine-tuning, and without both fine-tuning and alignment",
        "Table 8",
        _claims(["causal_dpo"], ["causal_dpo_no_sft", "pretrained"], NDCG),
        "15_ablations",
        LLM,
    ),
    Statement(
        "CausalDPO ranks better under shift than without its alignment: than the supervised model",
        "Tables 1 and 8",
        _claims(["causal_dpo"], ["sft"], NDCG),
        "15_ablations",
        LLM,
    ),
    Statement(
        "Two or four rounds of CausalDPO rank better than one",
        "Fig. 3",
        _claims(["causal_dpo-iterations-2", "causal_dpo-iterations-4"], ["causal_dpo"], NDCG),
        "15_ablations",
        LLM,
    ),
    Statement(
        "CausalDPO improves a backbone of another size",
        "Table 9",
        _claims(["causal_dpo-backbone-tiny-small"], ["sft-backbone-tiny-small"], NDCG),
        "15_ablations",
        "Qwen2.5-7B, Qwen3-8B and Llama-3.1-8B on a GPU node (`backbone` of `params/studies/paper.yaml`)",
    ),
    Statement(
        "All this holds at 7 and 8 billion parameters, on ML-10M, Yelp2018 and Book-Crossing",
        "Tables 1 to 9",
        (),
        "08_results_tables",
        LLM,
    ),
)
# What an effect would be due to, and what the accuracies are too coarse for: the paper reports neither.
CONTROLS = (
    Statement(
        "Inferred environments rank and fit better than shuffled ones: the environments matter, not the penalty's form",
        "implied by Sections 3.2 and 3.3; `shuffled`",
        _claims(["causal_dpo"], ["shuffled"], FIT + NDCG + CAUSAL),
        "15_ablations",
        "environments that move the outcome and that prompts reveal (notebook 14)",
    ),
    Statement(
        "Inferred environments rank and fit better than shuffled ones where the penalty is felt (λ = 10 and 100)",
        "implied by Sections 3.2 and 3.3; `shuffled` at the same λ",
        tuple(
            claim
            for metric in FIT + NDCG
            for claim in _paired(
                ((f"causal_dpo{STRENGTH}{value}", f"shuffled{STRENGTH}{value}") for value in (10.0, 100.0)), metric, OOD
            )
        ),
        "15_ablations",
        "environments that move the outcome and that prompts reveal (notebook 14)",
    ),
    Statement(
        "Inferred environments show popular items less, and unpopular ones more, than shuffled ones",
        "implied by Fig. 1; `shuffled`",
        _shown("causal_dpo", "shuffled"),
        "06_popularity_amplification",
        "environments that move the outcome and that prompts reveal (notebook 14)",
    ),
    Statement(
        "Environments known to carry popularity (oracles) rank and fit better than shuffled ones under shift",
        "what the penalty can do with the right environments; `oracle_history`, `oracle_target`",
        _claims(["oracle_history", "oracle_target"], ["shuffled"], FIT + NDCG),
        "15_ablations",
        MORE,
    ),
    Statement(
        "A policy conditioned on inferred environments, averaged over them, ranks and fits better than DPO under shift",
        "Eq. 6 to the letter; `backdoor`",
        _claims(["backdoor"], ["dpo"], FIT + NDCG + CAUSAL),
        "15_ablations",
        "environments that move the outcome and that prompts reveal (notebook 14)",
    ),
    Statement(
        "Such a policy ranks and fits better with inferred environments than with shuffled ones",
        "implied by Eq. 6; `backdoor` with shuffled memberships",
        _claims(["backdoor"], [f"backdoor{SHUFFLED}"], FIT + NDCG + CAUSAL),
        "15_ablations",
        "environments that move the outcome and that prompts reveal (notebook 14)",
    ),
    Statement(
        "Such a policy with true environments ranks and fits better than DPO and than with shuffled ones",
        "Eq. 6 under its own assumptions; `backdoor` with the simulator's environments",
        _claims([f"backdoor{TRUE}"], ["dpo", f"backdoor{SHUFFLED}"], FIT + NDCG + CAUSAL),
        "15_ablations",
        "simulated data in which the environment is a larger part of the choice",
    ),
    Statement(
        "CausalDPO keeps more probability on the targets than DPO under shift",
        "log-probability of the target, this study's primary endpoint",
        _claims(["causal_dpo"], ["dpo"], FIT),
        "08_results_tables",
        MORE,
    ),
    Statement(
        "CausalDPO keeps more probability on the targets under shift than the supervised model that it starts from",
        "log-probability of the target, this study's primary endpoint",
        _claims(["causal_dpo"], ["sft"], FIT),
        "08_results_tables",
        "a loss that does not sharpen every prompt's distribution",
    ),
    Statement(
        "DPO collects less of the interventional preference than the supervised model",
        "Proposition 3.1; causal NDCG, this study's primary endpoint where that preference is known",
        _claims(["dpo"], ["sft"], CAUSAL, -1),
        "08_results_tables",
        MORE,
    ),
    Statement(
        "CausalDPO collects more of the interventional preference than DPO",
        "causal NDCG, this study's primary endpoint where that preference is known",
        _claims(["causal_dpo"], ["dpo"], CAUSAL),
        "08_results_tables",
        "environments that move the outcome and that prompts reveal (notebook 14)",
    ),
)
DYNAMICPO = (
    Statement(
        "Accuracy collapses when negatives become many",
        "DynamicPO, Fig. 1 and 4",
        _paired(collapse.COLLAPSE.values(), collapse.METRIC, TEST_SPLITS, -1),
        "13_dynamicpo",
        "a backbone of billions of parameters, its candidates in the prompt as there",
        everywhere=True,
    ),
    Statement(
        "DynamicPO does better than the loss that it is put on, at many negatives",
        "DynamicPO, Table 2",
        _paired(collapse.MENDED.values(), collapse.METRIC, TEST_SPLITS),
        "13_dynamicpo",
        "a setting in which accuracy does collapse",
        everywhere=True,
    ),
)
OWN = (
    Statement(
        "Popularity-proportional negatives show popular items less, and unpopular ones more, than uniform ones",
        "`causaldpo_lib/pairs.py`",
        _shown("popularity_negatives", "dpo"),
        "06_popularity_amplification",
        OTHER,
        everywhere=True,
    ),
    Statement(
        "Causal (environment-matched) negatives show popular items less, and unpopular ones more, than uniform ones",
        "`causaldpo_lib/pairs.py`",
        _shown("causal_negatives", "dpo"),
        "06_popularity_amplification",
        OTHER,
    ),
    Statement(
        "Causal negatives rank better under shift than uniform ones and than CausalDPO",
        "`causaldpo_lib/pairs.py`",
        _claims(["causal_negatives"], ["dpo", "causal_dpo"], NDCG),
        "08_results_tables",
        MORE,
    ),
    Statement(
        "Causal negatives keep more probability on targets under shift than uniform ones and CausalDPO",
        "`causaldpo_lib/pairs.py`",
        _claims(["causal_negatives"], ["dpo", "causal_dpo"], FIT),
        "08_results_tables",
        MORE,
    ),
    Statement(
        "Causal negatives keep more probability on targets under shift than the supervised model",
        "`causaldpo_lib/pairs.py`",
        _claims(["causal_negatives"], ["sft"], FIT),
        "08_results_tables",
        "a loss that does not sharpen every prompt's distribution",
    ),
    Statement(
        "Causal negatives collect more of the interventional preference than uniform ones",
        "`causaldpo_lib/pairs.py`",
        _claims(["causal_negatives"], ["dpo"], CAUSAL),
        "08_results_tables",
        "a simulator whose base popularity is no part of the interventional preference",
    ),
    Statement(
        "The environments of causal negatives matter: better than popularity-proportional and than shuffled ones",
        "`causaldpo_lib/pairs.py`",
        _claims(["causal_negatives"], ["popularity_negatives", "causal_negatives_shuffled"], FIT + NDCG + CAUSAL),
        "08_results_tables",
        "environments that prompts reveal (notebook 14)",
    ),
    Statement(
        "True environments serve causal negatives better than inferred ones",
        "`causaldpo_lib/pairs.py`",
        _claims(["causal_negatives_oracle"], ["causal_negatives"], CAUSAL),
        "08_results_tables",
        MORE,
    ),
)
GROUPS = {
    "the CausalDPO paper": PAPER,
    "its controls": CONTROLS,
    "the DynamicPO paper": DYNAMICPO,
    "this study's own proposal": OWN,
}


@cache
def _unconfounded(study: str) -> list[str]:
    """The settings of a study in which nothing is confounded; its file is read once, for all statements."""
    return [setting for setting, strength in strengths(study).items() if strength == 0]


def tests_of(statement: Statement, studies: Mapping[str, Tables]) -> Frame:
    """Every test of a statement, as ``claim_table`` has it; of what several studies measured the first study counts.

    Columns: study, method, baseline, metric, setting, split, result, difference.
    """
    found = []
    for study, claim in product(studies, statement.claims):
        paired, pair = studies[study]["paired"], [claim.method, claim.baseline]
        ours = (paired["metric"] == claim.metric) & paired["method"].isin(pair) & paired["baseline"].isin(pair)
        if not ours.any():
            continue
        about = {"study": study, "method": claim.method, "baseline": claim.baseline, "metric": claim.metric}
        rows = claim_table({**studies[study], "paired": paired[ours]}, [claim]).assign(**about)
        found.append(rows if statement.everywhere else rows[~rows["setting"].isin(_unconfounded(study))])
    columns = ["study", "method", "baseline", "metric", "setting", "split", "result", "difference"]
    rows = pd.concat(found)[columns] if found else pd.DataFrame(columns=columns)
    return rows.drop_duplicates(["method", "baseline", "metric", "setting", "split"]).reset_index(drop=True)


def word(results: Sequence[str], complete: bool = True) -> str:
    """A statement's verdict from the results of its tests; ``complete``: every claim has one (see the module)."""
    count = {name: list(results).count(name) for name in RESULTS}
    if not len(results):
        return "cannot be tested here"
    if count["reproduced"] == len(results) and complete:
        return "supported"
    if count["reproduced"]:
        few = count["reproduced"] < FEW * len(results)
        return "mixed" if count["contradicted"] else "isolated support" if few else "supported in part"
    if 2 * (count["contradicted"] + count["equivalent"]) >= len(results):
        return "not supported"
    return "contradicted in part" if count["contradicted"] else "undecided"


def counts(statements: Sequence[Statement], studies: Mapping[str, Tables]) -> Frame:
    """A row per statement: its verdict and the number of its tests with each result of ``RESULTS``."""
    lines = []
    for statement in statements:
        rows = tests_of(statement, studies)
        asked = {(claim.method, claim.baseline, claim.metric) for claim in statement.claims}
        tested = set(rows[["method", "baseline", "metric"]].itertuples(index=False, name=None))
        number = {name: int((rows["result"] == name).sum()) for name in RESULTS}
        verdict = word(list(rows["result"]), asked == tested)
        lines.append({"statement": statement.text, "verdict": verdict, **number, "tests": len(rows)})
    return pd.DataFrame(lines, columns=["statement", "verdict", *RESULTS, "tests"])


def repeated(studies: Mapping[str, Tables]) -> str:
    """How far studies agree with the first that made a test, all with the same parameters and seeds. In Markdown.

    On other processors sums round differently, and training carries that on: they are different models.
    """
    key = ["method", "baseline", "metric", "setting", "split"]
    each = [
        tests_of(statement, {name: tables})
        for group in GROUPS.values()
        for statement in group
        for name, tables in studies.items()
    ]
    rows = pd.concat(each).drop_duplicates(["study", *key])
    lines, total = [], 0
    for _, found in rows[rows.duplicated(key, keep=False)].groupby(key, sort=False):
        first, *others = found.itertuples()
        total += len(others)
        name = f"{look(first.method).label} − {look(first.baseline).label}, {metric_name(first.metric)}"
        for other in (other for other in others if other.result != first.result):
            said = "; ".join(f"`{row.study}` {row.result} ({row.difference})" for row in (first, other))
            lines.append(f"- {name}, {first.setting}, {first.split}: {said}.")
    count = f"Of {total} tests that a study made again, {total - len(lines)} have the result of the first"
    return "\n".join([f"**Made again.** {count}{'; the others:' if lines else '.'}", "", *lines]).rstrip()


def summary(statement: Statement, studies: Mapping[str, Tables]) -> str:
    """The verdict on a statement with the numbers behind it and, if it is open, what would settle it, in Markdown."""
    row = counts([statement], studies).iloc[0]
    said = f"**{row['verdict'].capitalize()}.**"
    if row["tests"]:
        tests = "test" if row["tests"] == 1 else "tests"
        said += f" Of {row['tests']} {tests}: " + ", ".join(f"{row[name]} {name}" for name in RESULTS) + "."
    return said if row["verdict"] == "supported" else f"{said} What would settle it: {statement.settle}."


def section(statement: Statement, studies: Mapping[str, Tables]) -> str:
    """A statement with its verdict and every test behind it, in Markdown."""
    link = f"[{statement.notebook.replace('_', ' ')}]({statement.notebook}.ipynb)"
    parts = [f"### {statement.text}", f"*{statement.where}; evidence in {link}*", summary(statement, studies)]
    rows = tests_of(statement, studies)
    if len(rows):
        method, baseline = (rows[column].map(lambda name: look(name).label) for column in ("method", "baseline"))
        shown = rows.assign(comparison=method + " − " + baseline, metric=rows["metric"].map(metric_name))
        parts.append(markdown(shown[["setting", "split", "metric", "comparison", "difference", "result"]]))
    return "\n\n".join(parts)


def takeaway(studies: Mapping[str, Tables]) -> str:
    """How many statements of each group of ``GROUPS`` have which verdict, in Markdown."""
    said = []
    for name, statements in GROUPS.items():
        verdicts = counts(statements, studies)["verdict"].value_counts()
        found = ", ".join(f"{number} {verdict}" for verdict, number in verdicts.items())
        said.append(f"Of {len(statements)} statements of {name}: {found}.")
    return f"**Takeaway.** {' '.join(said)}"
