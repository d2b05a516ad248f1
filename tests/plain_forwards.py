"""What the rankers must give, by one ordinary forward pass per title and dictionaries for the trie."""

import numpy as np
import torch


def logps(model, prompt, responses):
    """log pi(y|x) and log pi_C(y|x) of every response, (N,) float64 each."""
    allowed = {}
    for ids in responses:
        for depth, token in enumerate(ids):
            allowed.setdefault(tuple(ids[:depth]), set()).add(token)
    free, constrained = [], []
    with torch.inference_mode():
        for ids in responses:
            logits = model(torch.tensor([prompt + ids])).logits[0].double()
            steps = logits[len(prompt) - 1 : -1]
            own = steps.gather(-1, torch.tensor(ids)[:, None])[:, 0]
            masses = [
                torch.logsumexp(row[sorted(allowed[tuple(ids[:depth])])], 0).item() for depth, row in enumerate(steps)
            ]
            free.append((own - steps.logsumexp(-1)).sum().item())
            constrained.append(own.sum().item() - sum(masses))
    return np.array(free), np.array(constrained)


def mixed(values, prior):
    """log sum_k prior_k exp(values_k) of (K, N)."""
    return np.logaddexp.reduce(np.asarray(values) + np.log(prior)[:, None], axis=0)


def normalised(values):
    return values - np.logaddexp.reduce(values)
