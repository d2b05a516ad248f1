"""Re-rankers: networks that order a short list again after reading all of it, with or without knowledge about the user.

A place i of a list, an item with the initial ranker's log-probability s_i, is the feature vector

    x_i = e_i (+) z_i (+) 1 / rank_i (+) mean of e over the user's history (+) adapted knowledge, if there is any

(+) concatenation, e a learned embedding, z the scores s standardised within the list, rank_i = 1 + how many scores of
the list are higher (of the scores, not of the place: a network without positions then cannot see the order). Knowledge
is the frozen encoding of a text about the user, the same at all places, and of texts about the items. From
X = (x_1 ... x_n) a list network makes n scores:

    dlcm      o = GRU(X), s_n its last state;  score_i = v . (LN(o_i) * tanh(W LN(s_n)))    Ai et al., SIGIR 2018
    prm       H = Block(W X + P), P learned positions, one head;  score_i = w . h_i         Pei et al., RecSys 2019
    set_rank  H = Block(W X), no positions, two heads;  score_i = MLP(h_i)                  Pang et al., SIGIR 2020

Block is a transformer encoder's layer, its feed-forward part twice as wide as its states. Where public code normalises
DLCM's states over the batch, this module does it over the state (LN), so that no score depends on other lists.

Items are positions 0 ... n-1 in a catalogue, -1 where a list or a history is padded. What training never showed, in a
list or in a history of its users, has the embedding 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from causaldpo_lib.backbone import device as default_device
from causaldpo_lib.errors import StudyError, pick
from causaldpo_lib.metrics import list_ndcg

VALIDATION_CUTOFF = 5  # NDCG@5, the headline metric of DPO4Rec and its reward


@dataclass(frozen=True)
class Lists:
    """N lists of up to n places, in the initial ranker's order and padded at the end."""

    users: Tensor  # (N,) long: the user's row in the tables of `Features`
    items: Tensor  # (N, n) long: positions in the catalogue, -1 where padded
    labels: Tensor  # (N, n) float: 1 for a positive, else 0
    scores: Tensor  # (N, n) float: the initial ranker's log-probabilities, nats

    def __len__(self) -> int:
        return len(self.users)

    @property
    def mask(self) -> Tensor:
        """(N, n) bool: whether a place holds an item."""
        return self.items >= 0

    def rows(self, index: Tensor | np.ndarray | Sequence[int]) -> Lists:
        """The lists of these rows, in this order; a row may be named twice."""
        index = torch.as_tensor(index, device=self.users.device)
        index = index if index.numel() else index.long()  # an empty list makes a tensor of floats
        return Lists(*(getattr(self, field.name)[index] for field in fields(self)))

    def to(self, device: torch.device) -> Lists:
        """The same lists on a device."""
        return Lists(*(getattr(self, field.name).to(device) for field in fields(self)))


@dataclass(frozen=True)
class Features:
    """What is known of U users and I items besides the lists. A zero vector of knowledge says nothing."""

    histories: Tensor  # (U, H) long: positions in the catalogue, -1 where padded
    user_knowledge: Tensor | None = None  # (U, d): frozen encoding of each user's text
    item_knowledge: Tensor | None = None  # (I, d): frozen encoding of each item's text

    def to(self, device: torch.device) -> Features:
        """The same features on a device."""
        values = (getattr(self, field.name) for field in fields(self))
        return Features(*(value if value is None else value.to(device) for value in values))

    def knowledge(self) -> dict[str, Tensor]:
        """The tables of knowledge that there are, by whom they are about."""
        tables = {"user": self.user_knowledge, "item": self.item_knowledge}
        return {name: table for name, table in tables.items() if table is not None}


# --- list networks: (features in, hidden width, most places, dropout); (X (B, n, f), mask (B, n)) -> scores (B, n) ---


class DLCM(nn.Module):
    """Deep listwise context model, of this module's head: the last state of a GRU says what the list as a whole is."""

    def __init__(self, features: int, hidden: int, places: int, dropout: float) -> None:
        super().__init__()
        self.read = nn.GRU(features, hidden, batch_first=True)
        self.norm, self.context = nn.LayerNorm(hidden), nn.Linear(hidden, hidden)
        self.dropout, self.score = nn.Dropout(dropout), nn.Linear(hidden, 1)

    def forward(self, places: Tensor, mask: Tensor) -> Tensor:
        states = self.norm(self.read(places)[0])
        last = states[torch.arange(len(mask), device=mask.device), mask.sum(dim=1) - 1]  # padding is at the end
        joint = states * torch.tanh(self.context(last))[:, None]
        return self.score(self.dropout(joint)).squeeze(-1)


class PRM(nn.Module):
    """Personalised re-ranking model, of this module's head: self-attention over features and positions."""

    def __init__(self, features: int, hidden: int, places: int, dropout: float) -> None:
        super().__init__()
        self.project = nn.Linear(features, hidden)
        self.positions = nn.Parameter(0.02 * torch.randn(places, hidden))
        self.block = _attention_block(hidden, 1, dropout)
        self.score = nn.Linear(hidden, 1)

    def forward(self, places: Tensor, mask: Tensor) -> Tensor:
        width, most = places.shape[1], len(self.positions)
        if width > most:
            raise StudyError(f"lists have {width} places, but this PRM was trained on {most}: make shorter lists")
        states = self.project(places) + self.positions[:width]
        return self.score(self.block(states, src_key_padding_mask=~mask)).squeeze(-1)


class SetRank(nn.Module):
    """SetRank, of this module's head: self-attention over a set. A list in another order has the same scores."""

    def __init__(self, features: int, hidden: int, places: int, dropout: float) -> None:
        super().__init__()
        self.project = nn.Linear(features, hidden)
        self.block = _attention_block(hidden, 2, dropout)
        self.score = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 1))

    def forward(self, places: Tensor, mask: Tensor) -> Tensor:
        states = self.block(self.project(places), src_key_padding_mask=~mask)
        return self.score(states).squeeze(-1)


def _attention_block(hidden: int, heads: int, dropout: float) -> nn.TransformerEncoderLayer:
    if hidden % heads:
        raise StudyError(f"hidden = {hidden} cannot be cut into {heads} heads: choose a multiple of {heads}")
    return nn.TransformerEncoderLayer(hidden, heads, 2 * hidden, dropout, batch_first=True)


RERANKERS: dict[str, type[nn.Module]] = {"dlcm": DLCM, "prm": PRM, "set_rank": SetRank}


# --- adaptors: ({"user": width in, "item": width in}, width out); tables by name -> the same, (..., width out) ---


class _Separate(nn.ModuleDict):
    """A network for each table of knowledge."""

    def forward(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self[name](table) for name, table in tables.items()}


def linear_adaptor(widths: Mapping[str, int], width: int) -> nn.Module:
    """A linear map for each table: the plain adaptor."""
    return _Separate({name: nn.Linear(given, width) for name, given in widths.items()})


def mlp_adaptor(widths: Mapping[str, int], width: int) -> nn.Module:
    """W_2 ReLU(W_1 k + b_1) + b_2 for each table, four times as wide inside as its output, as KAR's experts are."""
    return _Separate({name: _expert(given, width) for name, given in widths.items()})


class HybridExperts(nn.Module):
    """KAR's adaptor (Xi et al., arXiv 2306.10933): experts that all tables share, and experts of each table alone.

        adapted(k) = sum_e softmax(G k)_e E_e(k),     e over the shared experts and the table's own

    with E_e an MLP four times as wide inside as its output (128 to 32 in KAR), G one linear map for each table.

    Raises:
        StudyError: tables of different widths, which no expert could share.
    """

    def __init__(self, widths: Mapping[str, int], width: int, shared: int = 2, specific: int = 5) -> None:
        super().__init__()
        if len(set(widths.values())) > 1:
            found = " and ".join(f"{given} ({name})" for name, given in widths.items())
            raise StudyError(f"shared experts read one width of knowledge, not {found}: encode both by one encoder")
        given = next(iter(widths.values()))
        self.shared = nn.ModuleList(_expert(given, width) for _ in range(shared))
        self.specific = nn.ModuleDict(
            {name: nn.ModuleList(_expert(given, width) for _ in range(specific)) for name in widths}
        )
        self.gates = nn.ModuleDict({name: nn.Linear(given, shared + specific) for name in widths})

    def forward(self, tables: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self._adapted(name, table) for name, table in tables.items()}

    def _adapted(self, name: str, table: Tensor) -> Tensor:
        opinions = torch.stack([expert(table) for expert in [*self.shared, *self.specific[name]]], dim=-1)
        return (opinions * self.gates[name](table).softmax(dim=-1)[..., None, :]).sum(dim=-1)


def _expert(given: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(given, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))


ADAPTORS: dict[str, Callable[[Mapping[str, int], int], nn.Module]] = {
    "linear": linear_adaptor,
    "mlp": mlp_adaptor,
    "hybrid_experts": HybridExperts,
}


# --- losses ---


def bce_loss(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """KAR's: -y_i log sigmoid(s_i) - (1 - y_i) log(1 - sigmoid(s_i)), mean over places of a list, then over lists."""
    each = F.binary_cross_entropy_with_logits(scores.masked_fill(~mask, 0.0), labels, reduction="none")
    return (each.masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1)).mean()


def attention_rank_loss(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """-sum_i a_i log b_i + (1 - a_i) log(1 - b_i), mean over lists, with b = softmax(s): DLCM's and SetRank's.

    a_i = e^{y_i} / sum_j e^{y_j} over places with y > 0, else 0; of labels 0 and 1 that is 1 over the number of
    positives. Where DLCM also cuts the scores' attention at 0, this is SetRank's softmax, which has a gradient there.
    """
    target = labels.masked_fill(~(mask & (labels > 0)), -torch.inf).softmax(dim=1)
    # Not -inf: the only place of a list has no others, their log-probability's weight is 0, and 0 * inf is no number.
    nothing = torch.finfo(scores.dtype).min / 4
    scores = scores.masked_fill(~mask, nothing)
    itself = torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    others = scores[:, None, :].expand(-1, scores.shape[1], -1).masked_fill(itself, nothing).logsumexp(dim=2)
    total = scores.logsumexp(dim=1, keepdim=True)
    each = target * (scores - total) + (1.0 - target) * (others - total)
    return -each.masked_fill(~mask, 0.0).sum(dim=1).mean()


def softmax_loss(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """-sum_i y_i log softmax(s)_i / sum_i y_i, mean over lists: PRM's, with the same weight for every list."""
    logps = scores.masked_fill(~mask, -torch.inf).log_softmax(dim=1).masked_fill(~mask, 0.0)
    return -((labels * logps).sum(dim=1) / labels.sum(dim=1)).mean()


# (scores (B, n), labels (B, n), mask (B, n)) -> mean loss; every list holds a positive, padded labels are 0
RERANKING_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "bce": bce_loss,
    "attention_rank": attention_rank_loss,
    "softmax": softmax_loss,
}

# re-ranker -> the loss of its own paper
PAPER_LOSSES = {"dlcm": "attention_rank", "prm": "softmax", "set_rank": "attention_rank"}


# --- the whole model ---


class Reranker(nn.Module):
    """Features of this module's head, then the list network ``kind``: scores (B, n), -inf where padded.

    Knowledge is centred and brought to a mean square of 1 by what training showed (``lists`` and ``features``): mean
    states of a language model differ by little from one large vector. A zero vector stays zero, the average.

    Args:
        lists, features: those of training. They give widths, the number of places and the items with an embedding.
        kind, adaptor: names of ``RERANKERS`` and ``ADAPTORS``; the adaptor is not used without knowledge.
        embedding: width of an item's embedding, and of what an adaptor makes of a text.
    """

    def __init__(
        self,
        lists: Lists,
        features: Features,
        *,
        kind: str,
        adaptor: str,
        embedding: int,
        hidden: int,
        dropout: float,
    ) -> None:
        super().__init__()
        network, adapt = pick(RERANKERS, kind, "re-ranker"), pick(ADAPTORS, adaptor, "adaptor")
        shown = torch.cat([lists.items.flatten(), features.histories[lists.users].flatten()]).unique()
        shown = shown[shown >= 0]
        numbers = torch.zeros(int(shown[-1]) + 2, dtype=torch.long, device=shown.device)  # the last: unknown, 0
        numbers[shown] = torch.arange(1, len(shown) + 1, device=shown.device)
        self.register_buffer("numbers", numbers)
        self.items = nn.Embedding(len(shown) + 1, embedding, padding_idx=0)
        nn.init.normal_(self.items.weight[1:], std=0.1)
        tables = features.knowledge()
        self.known_of = tuple(tables)
        for name, table in tables.items():
            seen = table[lists.users] if name == "user" else table[lists.items[lists.mask]]
            centre, scale = _spread(seen.float())
            self.register_buffer(f"{name}_centre", centre)
            self.register_buffer(f"{name}_scale", scale)
        self.adaptor = adapt({name: table.shape[1] for name, table in tables.items()}, embedding) if tables else None
        width = 2 * embedding + 2 + embedding * len(tables)
        self.network = network(width, hidden, lists.items.shape[1], dropout)

    def forward(self, lists: Lists, features: Features) -> Tensor:
        """Scores (B, n) of lists, which like the features are on the model's device.

        Raises:
            StudyError: the features hold other tables of knowledge than the model was trained with.
        """
        tables, mask = features.knowledge(), lists.mask
        if tuple(tables) != self.known_of:
            has, needs = (" and ".join(names) or "no" for names in (tables, self.known_of))
            raise StudyError(f"this re-ranker was trained with {needs} knowledge, not {has}: give it what it was")
        dtype = self.items.weight.dtype  # whatever precision tables were read or encoded in
        places = [self._embedded(lists.items), *_initial(lists.scores.to(dtype), mask)]
        places.append(_everywhere(self._history(features.histories[lists.users]), mask))
        if tables:
            # Lists share items: each is adapted once, however many lists (or texts for one list) stand in the batch.
            some, where = lists.items.clamp(min=0).unique(return_inverse=True)
            rows = {"user": lists.users, "item": some}
            adapted = self.adaptor(
                {name: self._scaled(name, table[rows[name]].to(dtype)) for name, table in tables.items()}
            )
            at = {"user": lambda found: _everywhere(found, mask), "item": lambda found: found[where]}
            places += [at[name](found) for name, found in adapted.items()]
        joined = torch.cat(places, dim=-1).masked_fill(~mask[..., None], 0.0)
        return self.network(joined, mask).masked_fill(~mask, -torch.inf)

    def _embedded(self, items: Tensor) -> Tensor:
        last = len(self.numbers) - 1
        return self.items(self.numbers[torch.where(items < 0, last, items.clamp(max=last))])

    def _history(self, histories: Tensor) -> Tensor:
        counts = (histories >= 0).sum(dim=1, keepdim=True)
        return self._embedded(histories).sum(dim=1) / counts.clamp(min=1)

    def _scaled(self, name: str, rows: Tensor) -> Tensor:
        says = (rows != 0).any(dim=-1, keepdim=True)
        scaled = (rows - getattr(self, f"{name}_centre")) / getattr(self, f"{name}_scale")
        return scaled.masked_fill(~says, 0.0)


def _spread(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (d,) and root mean square distance to it per dimension, a scalar, of the rows (N, d) that are not zero."""
    rows = rows[(rows != 0).any(dim=1)]
    if not len(rows):
        return torch.zeros(rows.shape[1], device=rows.device), torch.ones((), device=rows.device)
    centre = rows.mean(dim=0)
    scale = (rows - centre).square().mean().sqrt()
    # Texts that are all the same differ by rounding alone: that is not to be blown up to a spread of 1.
    return centre, torch.where(scale > 1e-5 * rows.square().mean().sqrt(), scale, torch.ones_like(scale))


def _initial(scores: Tensor, mask: Tensor) -> list[Tensor]:
    """Two features (B, n, 1): scores standardised within their list (0 if all the same), and 1 / their rank."""
    counts = mask.sum(dim=1, keepdim=True)
    inside = scores.masked_fill(~mask, 0.0)
    centred = (inside - inside.sum(dim=1, keepdim=True) / counts).masked_fill(~mask, 0.0)
    spread = (centred.square().sum(dim=1, keepdim=True) / counts).sqrt()
    higher = ((inside[:, None, :] > inside[:, :, None]) & mask[:, None, :]).sum(dim=2)
    return [(centred / spread.clamp(min=1e-6))[..., None], (1.0 / (1.0 + higher.to(scores.dtype)))[..., None]]


def _everywhere(rows: Tensor, mask: Tensor) -> Tensor:
    """(B, d) to (B, n, d), the same at all places."""
    return rows[:, None].expand(-1, mask.shape[1], -1)


def fit_reranker(
    lists: Lists,
    features: Features,
    validation: tuple[Lists, Features] | None = None,
    *,
    kind: str,
    loss: str,
    adaptor: str,
    embedding: int,
    hidden: int,
    epochs: int,
    patience: int,
    learning_rate: float,
    weight_decay: float,
    batch_size: int,
    dropout: float,
    seed: int,
) -> tuple[Reranker, list[dict[str, float]]]:
    """Train a re-ranker by Adam. With validation it keeps the weights of its best epoch, without those of the last.

    Nothing but these lists, and of the features the rows of their users and items, enters the weights; validation only
    chooses the epoch.

    Args:
        kind, loss, adaptor: names of ``RERANKERS``, ``RERANKING_LOSSES`` and ``ADAPTORS``.
        embedding, hidden: widths of an item's embedding and of the list network's states.
        patience: epochs without a better validation NDCG@5 after which training stops.
        weight_decay: Adam's, an L2 penalty on all weights.
        seed: decides first weights, order and dropout; torch's global state is left as it was.

    Returns:
        The model in evaluation, on the accelerator if there is one, and a row per epoch: ``epoch`` (from 1), ``loss``,
        ``validation_ndcg5`` (a fraction; only with validation).

    Raises:
        StudyError: an unknown name, no lists or epochs, a list without a positive, lists or features that do not fit
            together, or a loss that is not finite.
    """
    objective = pick(RERANKING_LOSSES, loss, "re-ranking loss")
    if min(epochs, len(lists)) < 1:
        raise StudyError(f"{epochs} epochs of {len(lists)} lists fit nothing: a re-ranker needs 1 or more of each")
    _check(lists, features, "training", positives=True)
    if validation is not None:
        _check(*validation, "validation", positives=True)
    device = default_device()
    rows: list[dict[str, float]] = []
    best, weights = {}, {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):  # dropout takes no generator
        torch.manual_seed(seed)
        shape = {"kind": kind, "adaptor": adaptor, "embedding": embedding, "hidden": hidden, "dropout": dropout}
        model = Reranker(lists, features, **shape).to(device)
        lists, features = lists.to(device), features.to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
        generator = torch.Generator().manual_seed(seed)
        for epoch in range(1, epochs + 1):
            model.train()
            total = 0.0
            for index in torch.randperm(len(lists), generator=generator).split(batch_size):
                batch = lists.rows(index)
                scores = model(batch, features)
                value = objective(scores, batch.labels.to(scores.dtype), batch.mask)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                total += value.item() * len(batch)
            row = {"epoch": epoch, "loss": total / len(lists)}
            if not np.isfinite(row["loss"]):
                raise StudyError(f"{kind} diverges in epoch {epoch}: lower learning_rate = {learning_rate}")
            rows.append(row)
            if validation is None:
                continue
            ranked = ranked_labels(list_scores(model, *validation, batch_size), validation[0].labels)
            row["validation_ndcg5"] = float(list_ndcg(ranked, VALIDATION_CUTOFF).mean())
            if not best or row["validation_ndcg5"] > best["validation_ndcg5"]:
                best, weights = row, {name: tensor.clone() for name, tensor in model.state_dict().items()}
            elif epoch - best["epoch"] >= patience:
                break
    if weights:
        model.load_state_dict(weights)
    return model.eval(), rows


@torch.inference_mode()
def list_scores(model: Reranker, lists: Lists, features: Features, batch_size: int = 512) -> Tensor:
    """Scores (N, n) of lists, on the CPU, -inf where padded. Sets the model to evaluation.

    Raises:
        StudyError: lists and features do not fit together or to the model, or a score is not finite.
    """
    model.eval()
    if not len(lists):
        return torch.zeros(lists.items.shape)
    _check(lists, features, "scored", positives=False)
    device = model.numbers.device
    features = features.to(device)
    parts = torch.arange(len(lists)).split(batch_size)
    scores = torch.cat([model(lists.rows(index).to(device), features).cpu() for index in parts])
    if not scores[lists.mask.cpu()].isfinite().all():
        raise StudyError("a re-ranker's scores are not finite: train it again with a lower learning_rate")
    return scores


def text_scores(model: Reranker, lists: Lists, features: Features, texts: Tensor, batch_size: int = 512) -> Tensor:
    """Scores (N, T, n) of N lists under T alternative texts (U, T, d) of each user, all else as in ``features``.

    Raises:
        StudyError: as in ``list_scores``, or texts for another number of users than there are histories.
    """
    users, count = len(features.histories), texts.shape[1]
    if len(texts) != users:
        raise StudyError(f"there are texts of {len(texts)} users, but histories of {users}: give both for all users")
    several = lists.rows(torch.arange(len(lists)).repeat_interleave(count))
    which = torch.arange(count, device=lists.users.device).repeat(len(lists))
    several = Lists(several.users * count + which, several.items, several.labels, several.scores)
    histories = features.histories.repeat_interleave(count, dim=0)
    scores = list_scores(model, several, Features(histories, texts.flatten(0, 1), features.item_knowledge), batch_size)
    return scores.unflatten(0, (len(lists), count))


def ranked_labels(scores: Tensor, labels: Tensor) -> np.ndarray:
    """Labels (..., n) in the order of falling scores (..., n), for the metrics of lists; padding comes last.

    Places with the same score keep the order that they have, the initial ranker's.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return labels.to(scores.device).expand(scores.shape).gather(-1, order).cpu().numpy()


def _check(lists: Lists, features: Features, name: str, positives: bool) -> None:
    """Refuse, with the row named, what would train or score without complaint, or fail far from its cause."""
    mask, users = lists.mask, len(features.histories)
    rules = {
        "has no items: leave it out": ~mask.any(dim=1),
        "has padding (-1) before an item: pad at the end": (mask[:, 1:] & ~mask[:, :-1]).any(dim=1),
        "has a score that is not finite: give the initial ranker's": (mask & ~lists.scores.isfinite()).any(dim=1),
        "has a label other than 0 and 1, or a positive in its padding: mark positives by 1": (
            ((lists.labels != 0) & (lists.labels != 1)) | ((lists.labels != 0) & ~mask)
        ).any(dim=1),
        f"is of a user outside the {users} rows of features: number users as features do": (
            (lists.users < 0) | (lists.users >= users)
        ),
    }
    if positives:
        rules["has no positive: leave it out"] = (lists.labels <= 0).all(dim=1)
    if features.item_knowledge is not None:
        known = len(features.item_knowledge)
        rules[f"has an item outside the {known} rows of item knowledge: give knowledge of the whole catalogue"] = (
            lists.items >= known
        ).any(dim=1)
    for says, broken in rules.items():
        if broken.any():
            raise StudyError(f"{name} list {int(broken.nonzero()[0])} {says}")
    if features.user_knowledge is not None and len(features.user_knowledge) != users:
        given = len(features.user_knowledge)
        raise StudyError(f"there is knowledge of {given} users, but histories of {users}: give both for all users")
