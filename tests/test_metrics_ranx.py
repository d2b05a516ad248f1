"""HR, NDCG, MRR and the metrics of whole lists against ranx, an independent library, to 1e-9.

Apart, since ranx compiles itself when it is used.
"""

import math

import numpy as np
import pytest

from causaldpo_lib import metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*unsafe cast from uint64 to int64"),  # numba, compiling ranx
]


@pytest.fixture(scope="module")
def ranked():
    """Random lists of 20 with the 0-based rank of each example's one target, infinity where it is absent."""
    rng = np.random.default_rng(0)
    lists = np.stack([rng.permutation(40)[:20] for _ in range(60)])
    targets = rng.integers(0, 40, 60)
    found = lists == targets[:, None]
    return lists, targets, np.where(found.any(axis=1), found.argmax(axis=1), math.inf)


@pytest.mark.parametrize("k", [1, 10, 20])
def test_metrics_agree_with_ranx(ranked, k):
    import ranx

    lists, targets, ranks = ranked
    truth = ranx.Qrels({f"q{u}": {f"i{item}": 1} for u, item in enumerate(targets)})
    run = ranx.Run({f"q{u}": {f"i{item}": 20.0 - r for r, item in enumerate(row)} for u, row in enumerate(lists)})
    expected = ranx.evaluate(truth, run, [f"hit_rate@{k}", f"ndcg@{k}", f"mrr@{k}"])
    assert np.isinf(ranks).any() and (ranks < k).any()
    assert metrics.hit_rate_at_k(ranks, k) == pytest.approx(expected[f"hit_rate@{k}"], abs=1e-9)
    assert metrics.ndcg_at_k(ranks, k) == pytest.approx(expected[f"ndcg@{k}"], abs=1e-9)
    assert metrics.mrr_at_k(ranks, k) == pytest.approx(expected[f"mrr@{k}"], abs=1e-9)


@pytest.mark.parametrize("k", [1, 3, 5, 10])
def test_list_metrics_agree_with_ranx(k):
    import ranx

    rng = np.random.default_rng(1)
    labels = rng.random((80, 20)) < 0.2
    labels = labels[labels.any(axis=1)]
    truth = ranx.Qrels({f"q{u:02}": {f"i{i}": 1 for i in np.flatnonzero(row)} for u, row in enumerate(labels)})
    run = ranx.Run({f"q{u:02}": {f"i{i}": 20.0 - i for i in range(20)} for u in range(len(labels))})
    found = ranx.evaluate(truth, run, [f"ndcg_burges@{k}", f"map@{k}"], return_mean=False)
    assert metrics.list_ndcg(labels, k) == pytest.approx(found[f"ndcg_burges@{k}"], abs=1e-9)
    # ranx divides by all positives, not by as many as k places could show.
    share = np.minimum(labels.sum(axis=1), k) / labels.sum(axis=1)
    assert metrics.list_average_precision(labels, k) * share == pytest.approx(found[f"map@{k}"], abs=1e-9)
