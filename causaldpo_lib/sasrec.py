"""SASRec: self-attention over a history of item numbers, the study's recommender without language.

Source: Kang and McAuley, ICDM 2018 (arXiv 1808.09781). Of a history s_1 ... s_n of items with embeddings E,

    x_t = sqrt(d) E[s_t] + P_t,      x <- x + Attention(LayerNorm(x)),      x <- x + FFN(LayerNorm(x)),      L times
    score(i | s_1 ... s_n) = LayerNorm(x_n) . E[i]

with causal attention, FFN(x) = W_2 ReLU(W_1 x + b_1) + b_2 at width d, dropout on x and on what each half of a block
adds, and E shared between input and output. Normalisation comes before each half ("pre-norm"), as in the paper's
g(x) = x + Dropout(g(LayerNorm(x))), and needs no warm-up of the learning rate.

Items are positions 0 ... n-1 in a catalogue wherever they are targets or scores, and numbers 1 ... n in histories,
where 0 is padding on the left.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from causaldpo_lib.errors import StudyError, pick
from causaldpo_lib.metrics import ndcg_at_k

WEIGHTS_FILE = "sasrec.safetensors"
SHAPE_FILE = "sasrec.json"


class _Block(nn.Module):
    """Causal self-attention and a point-wise feed-forward network, each added to what it reads."""

    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.attention_norm, self.feed_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.query_key_value = nn.Linear(hidden, 3 * hidden)
        self.output = nn.Linear(hidden, hidden)
        self.feed = nn.Sequential(
            nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, hidden), nn.Dropout(dropout)
        )

    def forward(self, states: Tensor, visible: Tensor) -> Tensor:
        """(B, L, d) to the same; ``visible`` (B, 1, L, L): whether a position (row) may look at another (column)."""
        projected = self.query_key_value(self.attention_norm(states)).chunk(3, dim=-1)
        query, key, value = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in projected)
        dropout = self.dropout.p if self.training else 0.0
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, dropout_p=dropout)
        states = states + self.dropout(self.output(found.transpose(1, 2).flatten(2)))
        return states + self.feed(self.feed_norm(states))


class SASRec(nn.Module):
    """The model of this module's head; weights start from N(0, 0.02), biases and the padding's embedding from 0.

    The last item of a history always has the last position, so how much padding stands before it changes nothing.

    Raises:
        StudyError: ``heads`` does not divide ``hidden``.
    """

    def __init__(
        self, items: int, hidden: int = 32, blocks: int = 2, heads: int = 1, dropout: float = 0.1, length: int = 10
    ) -> None:
        super().__init__()
        if hidden % heads:
            raise StudyError(f"hidden = {hidden} cannot be cut into {heads} heads: choose a divisor of it")
        self.shape = {"hidden": hidden, "blocks": blocks, "heads": heads, "dropout": dropout, "length": length}
        self.items = nn.Embedding(items + 1, hidden, padding_idx=0)
        self.positions = nn.Parameter(torch.empty(length, hidden))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(hidden, heads, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(hidden)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
        with torch.no_grad():
            self.items.weight[0] = 0.0

    def forward(self, histories: Tensor) -> Tensor:
        """States (B, L, hidden) at all positions of ``histories`` (B, L), L at most the model's length.

        Raises:
            StudyError: histories are longer than the model's ``length``.
        """
        width, length = histories.shape[1], len(self.positions)
        if width > length:
            raise StudyError(f"histories have {width} items, but this SASRec reads {length}: keep the latest {length}")
        earlier = torch.ones(width, width, dtype=torch.bool, device=histories.device).tril()
        itself = torch.eye(width, dtype=torch.bool, device=histories.device)  # so that padding has something to read
        visible = (earlier & (histories > 0)[:, None, None, :]) | itself
        states = self.items.embedding_dim**0.5 * self.items(histories) + self.positions[length - width :]
        states = self.dropout(states)
        for block in self.blocks:
            states = block(states, visible)
        return self.norm(states)

    def logits(self, histories: Tensor) -> Tensor:
        """Scores (B, items) of the whole catalogue as the item after ``histories`` (B, L)."""
        return self(histories)[:, -1] @ self.items.weight[1:].T


def softmax_loss(logits: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
    """-log softmax(logits)[target] over the whole catalogue, mean over rows; no chance in it."""
    return F.cross_entropy(logits, targets)


def bce_loss(logits: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
    """-log sigmoid(r_target) - log(1 - sigmoid(r_negative)), mean over rows: the paper's loss.

    One negative a row, uniform over the other n - 1 items. The best score of an item is log (n-1) p / (1-p), with p its
    share of the targets after this history: for small p its softmax is p, as with the full softmax, only noisier.
    """
    others = torch.randint(logits.shape[1] - 1, targets.shape, generator=generator).to(targets.device)
    negatives = others + (others >= targets)
    positive, negative = (logits.gather(1, each[:, None]) for each in (targets, negatives))
    return (F.softplus(-positive) + F.softplus(negative)).mean()


# (logits (B, items), targets (B,) positions in the catalogue, generator on the CPU) -> mean loss
SASREC_LOSSES: dict[str, Callable[[Tensor, Tensor, torch.Generator], Tensor]] = {
    "softmax": softmax_loss,
    "bce": bce_loss,
}


def encode_histories(histories: Sequence[Sequence[object]], ids: np.ndarray, length: int) -> Tensor:
    """Item ids to numbers (N, length): the latest ``length`` of each history, 0 on the left of shorter ones.

    Raises:
        StudyError: an id that is not among ``ids``, the catalogue's in order.
    """
    latest = [list(row)[-length:] for row in histories]
    items = pd.Index([item for row in latest for item in row])
    numbers = pd.Index(ids).get_indexer(items) + 1
    if (numbers == 0).any():
        unknown = items.tolist()[int(np.argmin(numbers))]
        raise StudyError(f"item {unknown!r} of a history is not in the catalogue: give one that holds it")
    lengths = np.array([len(row) for row in latest], dtype=np.int64)
    table = np.zeros((len(latest), length), dtype=np.int64)
    table[np.arange(length) >= length - lengths[:, None]] = numbers
    return torch.from_numpy(table)


def fit_sasrec(
    model: SASRec,
    train: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
    *,
    loss: str,
    epochs: int,
    patience: int,
    learning_rate: float,
    batch_size: int,
    weight_decay: float,
    seed: int,
) -> list[dict[str, float]]:
    """Train ``model`` in place by Adam, and leave it with the weights of its best epoch.

    An example is a window: earlier items, and the one item that followed them. The loss is taken at the last position
    only, so each training interaction is a target exactly once an epoch, as it is for the study's language models.
    (The paper trains on all positions of a user's one long sequence: the same targets, in other batches.)

    Args:
        train, validation: histories (N, L) as by ``encode_histories``, and targets (N,), positions in the catalogue.
        loss: a name of ``SASREC_LOSSES``.
        patience: epochs without a better validation NDCG@10 after which training stops.
        weight_decay: Adam's, an L2 penalty on all weights.
        seed: decides order, dropout and negatives (the caller's decides the first weights); torch's global state is
            left as it was.

    Returns:
        A row per epoch: ``epoch`` (from 1), ``loss``, ``validation_ndcg10`` (a fraction, over the full catalogue) and
        ``validation_logp`` (mean of the targets, nats).

    Raises:
        StudyError: an unknown loss, no examples or epochs, or losses that are not finite.
    """
    objective = pick(SASREC_LOSSES, loss, "SASRec loss")
    if min(epochs, len(train[1]), len(validation[1])) < 1:
        raise StudyError(
            f"{epochs} epochs of {len(train[1])} training and {len(validation[1])} validation examples fit nothing: "
            "SASRec needs 1 or more of each"
        )
    device = model.positions.device
    histories, targets = (each.to(device) for each in train)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    rows: list[dict[str, float]] = []
    best, weights = {}, {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # dropout takes no generator
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        for epoch in range(1, epochs + 1):
            model.train()
            total = 0.0
            for batch in torch.randperm(len(targets), generator=generator).to(device).split(batch_size):
                value = objective(model.logits(histories[batch]), targets[batch], generator)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                total += value.item() * len(batch)
            row = {"epoch": epoch, "loss": total / len(targets), **_validation(model, *validation)}
            if not np.isfinite([*row.values()]).all():
                raise StudyError(
                    f"SASRec diverges in epoch {epoch} (loss {row['loss']:.3g}, validation log-probability "
                    f"{row['validation_logp']:.3g}): lower learning_rate = {learning_rate}"
                )
            rows.append(row)
            if not best or row["validation_ndcg10"] > best["validation_ndcg10"]:
                best, weights = row, {name: tensor.clone() for name, tensor in model.state_dict().items()}
            elif epoch - best["epoch"] >= patience:
                break
    model.load_state_dict(weights)
    return rows


def _validation(model: SASRec, histories: Tensor, targets: Tensor) -> dict[str, float]:
    logps = catalogue_logps(model, histories)
    own = np.take_along_axis(logps, targets.cpu().numpy()[:, None], axis=1)
    ranks = logps.shape[1] - 1 - (logps < own).sum(axis=1)  # ties and NaN stand before the target
    return {"validation_ndcg10": ndcg_at_k(ranks, 10), "validation_logp": float(own.mean())}


@torch.inference_mode()
def catalogue_logps(model: SASRec, histories: Tensor, batch_size: int = 512) -> np.ndarray:
    """Log-probabilities (N, items), float32, of every item after ``histories`` (N, L): log softmax of the scores.

    Sets the model to evaluation.
    """
    model.eval()
    device = model.positions.device
    parts = [torch.log_softmax(model.logits(part.to(device)), dim=-1).cpu() for part in histories.split(batch_size)]
    return torch.cat(parts).numpy()


def save_sasrec(model: SASRec, ids: np.ndarray, folder: Path) -> None:
    """Write weights, shape and the items' ids (numbers or texts, in the order of the embeddings) into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / WEIGHTS_FILE)
    content = {**model.shape, "ids": np.asarray(ids).tolist()}
    (folder / SHAPE_FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")


def load_sasrec(folder: Path) -> tuple[SASRec, np.ndarray]:
    """The model, set to evaluation, and the items' ids that `save_sasrec` wrote.

    Raises:
        StudyError: a file is missing or damaged, or the two do not fit together.
    """
    file = folder / SHAPE_FILE
    try:
        shape = json.loads(file.read_text(encoding="utf-8"))
        ids = np.array(shape.pop("ids"))
        model = SASRec(len(ids), **shape)
        file = folder / WEIGHTS_FILE
        model.load_state_dict(load_file(file))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise StudyError(f"{file} is missing or damaged ({reason}): train this SASRec again") from error
    return model.eval(), ids
