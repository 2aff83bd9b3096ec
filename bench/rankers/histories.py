"""Models of a history of events: sequence encoders, and rankers that weigh the history."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ITEMS, LENGTH, CANDIDATES, D, HEADS, LAYERS = 20_000, 50, 50, 64, 2, 2


def history(batch: int, seed: int, length: int = LENGTH) -> Tensor:
    """Ids, padded with 0 behind; at least half of the places are events."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, ITEMS, (batch, length), generator=draw)
    ends = torch.randint(length // 2, length + 1, (batch, 1), generator=draw)
    return torch.where(torch.arange(length) < ends, ids, 0)


def scored(batch: int, seed: int) -> tuple[Tensor, ...]:
    """A history, and candidates to score."""
    draw = torch.Generator().manual_seed(seed + 1)
    candidates = torch.randint(1, ITEMS, (batch, CANDIDATES), generator=draw)
    return history(batch, seed), candidates


def against_one(batch: int, seed: int) -> tuple[Tensor, ...]:
    """A history, and one candidate."""
    return history(batch, seed), scored(batch, seed)[1][:, 0].contiguous()


def events(batch: int, seed: int) -> tuple[Tensor, ...]:
    """A history, what was done with each item, one candidate."""
    draw = torch.Generator().manual_seed(seed + 2)
    actions = torch.randint(0, 8, (batch, LENGTH), generator=draw)
    return history(batch, seed), actions, against_one(batch, seed)[1]


def mlp(*sizes: int, norm: bool = False, last: bool = False) -> nn.Sequential:
    """Linear layers with ReLU between them, perhaps batch norm, perhaps a score at the end."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers.append(nn.Linear(inputs, outputs))
        if norm:
            layers.append(nn.BatchNorm1d(outputs))
        layers.append(nn.ReLU())
    if last:
        layers.append(nn.Linear(sizes[-1], 1))
    return nn.Sequential(*layers)


def randomised(model: nn.Module) -> nn.Module:
    """Batch norms as if trained: folding them into their neighbours is then no identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


class Encoder(nn.Module):
    """Scores of candidates: the last state of an encoded history times their embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, D, padding_idx=0)
        self.positions = nn.Embedding(LENGTH, D)
        self.norm = nn.LayerNorm(D)

    def embedded(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.size(1)).unsqueeze(0).expand_as(ids)
        return self.norm(self.items(ids) + self.positions(places))

    def scores(self, states: Tensor, ids: Tensor, candidates: Tensor) -> Tensor:
        last = (ids != 0).sum(1) - 1
        at = last.view(-1, 1, 1).expand(-1, -1, states.size(2))
        user = states.gather(1, at).squeeze(1)
        return (self.items(candidates) * user.unsqueeze(1)).sum(-1)


class SASRecLayers(Encoder):
    """SASRec on nn.TransformerEncoderLayer, causal and padded."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            D, HEADS, 4 * D, 0.1, "relu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, ids: Tensor, candidates: Tensor) -> Tensor:
        causal = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)
        states = self.encoder(self.embedded(ids), causal, ids == 0, is_causal=True)
        return self.scores(states, ids, candidates)


class HandWritten(nn.Module):
    """Attention as products and a softmax, an added mask, GELU by erf."""

    def __init__(self, post_norm: bool) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(D, D) for _ in range(3))
        self.out = nn.Linear(D, D)
        self.norm, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.post_norm = post_norm

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.size(0), x.size(1), HEADS, D // HEADS).permute(0, 2, 1, 3)

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(D // HEADS) + mask
        context = torch.matmul(torch.softmax(scores, dim=-1), v)
        return self.out(context.permute(0, 2, 1, 3).contiguous().view(x.shape))

    def feed(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(h * 0.5 * (1.0 + torch.erf(h / math.sqrt(2.0))))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if self.post_norm:
            x = self.norm(x + self.attend(x, mask))
            return self.norm2(x + self.feed(x))
        x = x + self.attend(self.norm(x), mask)
        return x + self.feed(self.norm2(x))


class SASRecHandWritten(Encoder):
    """SASRec with attention spelled out; its mask adds -10000 where a key is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(HandWritten(True) for _ in range(LAYERS))

    def forward(self, ids: Tensor, candidates: Tensor) -> Tensor:
        seen = (ids != 0).unsqueeze(1).unsqueeze(2)
        seen = torch.tril(seen.expand(-1, -1, ids.size(1), -1))
        mask = torch.where(seen, 0.0, -10000.0)
        x = self.embedded(ids)
        for layer in self.layers:
            x = layer(x, mask)
        return self.scores(x, ids, candidates)


class BERT4RecLayers(Encoder):
    """BERT4Rec on nn.TransformerEncoderLayer: both directions, padded, GELU."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(D, HEADS, 4 * D, 0.1, "gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)

    def forward(self, ids: Tensor, candidates: Tensor) -> Tensor:
        states = self.encoder(self.embedded(ids), src_key_padding_mask=ids == 0)
        return self.scores(states, ids, candidates)


class BERT4RecHandWritten(Encoder):
    """BERT4Rec with attention spelled out: masked_fill by -1e9, GELU by tanh."""

    class Layer(HandWritten):
        def attend(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
            scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
            weights = F.softmax(scores.masked_fill(mask == 0, -1e9), dim=-1)
            context = torch.matmul(weights, v).transpose(1, 2).contiguous()
            return self.out(context.view(x.size(0), -1, D))

        def feed(self, x: Tensor) -> Tensor:
            h = self.up(x)
            cubic = math.sqrt(2 / math.pi) * (h + 0.044715 * torch.pow(h, 3))
            return self.down(0.5 * h * (1 + torch.tanh(cubic)))

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer(False) for _ in range(LAYERS))

    def forward(self, ids: Tensor, candidates: Tensor) -> Tensor:
        mask = (ids > 0).unsqueeze(1).repeat(1, ids.size(1), 1).unsqueeze(1)
        x = self.embedded(ids)
        for layer in self.layers:
            x = layer(x, mask)
        return self.scores(x, ids, candidates)


class GRU4Rec(Encoder):
    """A GRU over the history, and a projection of its states."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(D, 128, batch_first=True, bias=False)
        self.dense = nn.Linear(128, D)

    def forward(self, ids: Tensor, candidates: Tensor) -> Tensor:
        states, _ = self.gru(self.items(ids))
        return self.scores(self.dense(states), ids, candidates)


class NARM(Encoder):
    """A GRU whose states are weighed against the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(D, 128, batch_first=True)
        self.a, self.b = nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False)
        self.v = nn.Linear(128, 1, bias=False)
        self.out = nn.Linear(256, D, bias=False)

    def forward(self, ids: Tensor, candidates: Tensor) -> Tensor:
        mask = ids.gt(0).unsqueeze(2)
        states, _ = self.gru(self.items(ids))
        last = (ids != 0).sum(1) - 1
        end = states.gather(1, last.view(-1, 1, 1).expand(-1, -1, 128)).squeeze(1)
        near = self.b(end).unsqueeze(1).expand_as(states)
        alpha = self.v(mask * torch.sigmoid(self.a(states) + near))
        local = torch.sum(alpha.expand_as(states) * states, 1)
        user = self.out(torch.cat([local, end], 1))
        return torch.bmm(self.items(candidates), user.unsqueeze(2)).squeeze(2)


class Caser(nn.Module):
    """Convolutions over the last events as an image: horizontal of each height, and vertical."""

    def __init__(self, length: int = 10, horizontal: int = 16, vertical: int = 4) -> None:
        super().__init__()
        self.length = length
        self.items = nn.Embedding(ITEMS, D, padding_idx=0)
        self.down = nn.Conv2d(1, vertical, (length, 1))
        self.across = nn.ModuleList(nn.Conv2d(1, horizontal, (h, D)) for h in range(1, length + 1))
        self.dense = nn.Linear(vertical * D + horizontal * length, D)

    def forward(self, ids: Tensor, candidates: Tensor) -> Tensor:
        x = self.items(ids[:, : self.length]).unsqueeze(1)
        down = self.down(x).view(x.size(0), -1)
        across = [F.relu(conv(x).squeeze(3)) for conv in self.across]
        pooled = [F.max_pool1d(a, a.size(2)).squeeze(2) for a in across]
        user = F.relu(self.dense(torch.cat([down, *pooled], 1)))
        return torch.bmm(self.items(candidates), user.unsqueeze(2)).squeeze(2)


class NextItNet(Encoder):
    """Residual blocks of dilated causal convolutions, as 2-D convolutions over a padded image."""

    class Block(nn.Module):
        def __init__(self, dilation: int) -> None:
            super().__init__()
            self.first = nn.Conv2d(D, D, (1, 3), dilation=dilation)
            self.second = nn.Conv2d(D, D, (1, 3), dilation=2 * dilation)
            self.norm, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
            self.dilation = dilation

        def one(self, x: Tensor, conv: nn.Conv2d, dilation: int) -> Tensor:
            image = F.pad(x.permute(0, 2, 1).unsqueeze(2), (2 * dilation, 0))
            return conv(image).squeeze(2).permute(0, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.norm(self.one(x, self.first, self.dilation)))
            return x + F.relu(self.norm2(self.one(h, self.second, 2 * self.dilation)))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(self.Block(d) for d in (1, 4) * 2))

    def forward(self, ids: Tensor, candidates: Tensor) -> Tensor:
        return self.scores(self.blocks(self.items(ids)), ids, candidates)


class STAMP(nn.Module):
    """Memory of the session weighed against its last item, without recurrence."""

    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(ITEMS, D, padding_idx=0)
        self.w1, self.w2, self.w3 = (nn.Linear(D, D, bias=False) for _ in range(3))
        self.w0 = nn.Linear(D, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(D))
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, ids: Tensor, candidates: Tensor) -> Tensor:
        x = self.items(ids)
        count = (ids != 0).sum(1)
        last = x.gather(1, (count - 1).view(-1, 1, 1).expand(-1, -1, D)).squeeze(1)
        mean = x.sum(1) / count.unsqueeze(1).float()
        beside = self.w2(last).unsqueeze(1) + self.w3(mean).unsqueeze(1) + self.bias
        alpha = self.w0(torch.sigmoid(self.w1(x) + beside))
        memory = (alpha * x).sum(1) + mean
        user = torch.tanh(self.a(memory)) * torch.tanh(self.b(last))
        return torch.matmul(self.items(candidates), user.unsqueeze(-1)).squeeze(-1)


class FMLPRec(Encoder):
    """Filters in the frequency domain instead of attention."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(1, LENGTH // 2 + 1, D, 2) * 0.1)
            self.norm, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
            self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

        def forward(self, x: Tensor) -> Tensor:
            spectrum = torch.fft.rfft(x, dim=1, norm="ortho")
            spectrum = spectrum * torch.view_as_complex(self.weight)
            x = self.norm(torch.fft.irfft(spectrum, n=LENGTH, dim=1, norm="ortho") + x)
            return self.norm2(self.down(F.gelu(self.up(x))) + x)

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(LAYERS))

    def forward(self, ids: Tensor, candidates: Tensor) -> Tensor:
        x = self.embedded(ids)
        for layer in self.layers:
            x = layer(x)
        return self.scores(x, ids, candidates)


class LightSANs(Encoder):
    """Attention over a few interests into which the history is pooled."""

    class Layer(HandWritten):
        def __init__(self, interests: int = 5) -> None:
            super().__init__(True)
            self.pool_k = nn.Parameter(torch.randn(D, interests) * 0.1)
            self.pool_v = nn.Parameter(torch.randn(D, interests) * 0.1)

        def pooled(self, x: Tensor, theta: Tensor) -> Tensor:
            weights = torch.softmax(torch.matmul(x, theta), dim=1)
            return torch.einsum("nij,nik->njk", weights, x)

        def attend(self, x: Tensor, mask: Tensor) -> Tensor:
            q = self.split(self.q(x))
            k = self.split(self.pooled(self.k(x), self.pool_k))
            v = self.split(self.pooled(self.v(x), self.pool_v))
            scores = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(D // HEADS), -2)
            return self.out((scores @ v).permute(0, 2, 1, 3).reshape(x.shape))

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(LAYERS))

    def forward(self, ids: Tensor, candidates: Tensor) -> Tensor:
        x = self.embedded(ids)
        for layer in self.layers:
            x = layer(x, x)
        return self.scores(x, ids, candidates)


class DIN(nn.Module):
    """The candidate weighs the history by a network on rows of all users together; Dice."""

    def __init__(self, emb: int = 16) -> None:
        super().__init__()
        self.width = 4 * emb
        self.items = nn.Embedding(ITEMS, emb, padding_idx=0)
        self.weigh = nn.Sequential(
            nn.Linear(4 * emb, 80), nn.Sigmoid(), nn.Linear(80, 40), nn.Sigmoid(), nn.Linear(40, 1)
        )
        self.tower = mlp(2 * emb, 200, 80, norm=True, last=True)

    def forward(self, ids: Tensor, candidate: Tensor) -> Tensor:
        x, target = self.items(ids), self.items(candidate)
        wanted = target.unsqueeze(1).expand(-1, ids.size(1), -1)
        beside = torch.cat([wanted, x, wanted - x, wanted * x], dim=-1)
        weights = self.weigh(beside.view(-1, self.width)).view(-1, ids.size(1))
        weights = weights * (ids > 0).float()
        interest = (weights.unsqueeze(-1) * x).sum(dim=1)
        return self.tower(torch.cat([interest, target], dim=-1)).squeeze(-1)


class BST(nn.Module):
    """A transformer layer over the history with the candidate behind it, then a tower."""

    def __init__(self) -> None:
        super().__init__()
        self.items, self.positions = nn.Embedding(ITEMS, D), nn.Embedding(LENGTH + 1, D)
        self.attention = nn.MultiheadAttention(D, 8, batch_first=True)
        self.norm, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.feed = nn.Sequential(nn.Linear(D, 4 * D), nn.LeakyReLU(), nn.Linear(4 * D, D))
        self.tower = nn.Sequential(
            nn.Linear((LENGTH + 1) * D, 512), nn.LeakyReLU(), nn.Linear(512, 256), nn.LeakyReLU(),
            nn.Linear(256, 1),
        )  # fmt: skip

    def forward(self, ids: Tensor, candidate: Tensor) -> Tensor:
        row = torch.cat([ids, candidate.unsqueeze(1)], 1)
        x = self.items(row) + self.positions.weight
        attended, _ = self.attention(x, x, x, key_padding_mask=row == 0, need_weights=False)
        x = self.norm(x + attended)
        x = self.norm2(x + self.feed(x))
        return self.tower(x.flatten(1)).squeeze(1)


class TransAct(nn.Module):
    """Events with their actions beside the candidate, early fusion, the last outputs and a max."""

    def __init__(self, last: int = 10) -> None:
        super().__init__()
        self.last = last
        self.items, self.actions = nn.Embedding(ITEMS, 32), nn.Embedding(8, 32)
        layer = nn.TransformerEncoderLayer(96, 2, 32, 0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.tower = mlp(96 * (last + 1), 256, last=True)

    def forward(self, ids: Tensor, actions: Tensor, candidate: Tensor) -> Tensor:
        wanted = self.items(candidate).unsqueeze(1).expand(-1, ids.size(1), -1)
        x = torch.cat([self.actions(actions), self.items(ids), wanted], -1)
        states = self.encoder(x, src_key_padding_mask=ids == 0)
        best, _ = torch.max(states, dim=1)
        return self.tower(torch.cat([states[:, : self.last].flatten(1), best], 1)).squeeze(1)


class SIM(nn.Module):
    """A long history: the events nearest to the candidate, then attention over them."""

    def __init__(self, emb: int = 16, nearest: int = 20) -> None:
        super().__init__()
        self.nearest = nearest
        self.items = nn.Embedding(ITEMS, emb, padding_idx=0)
        self.attention = nn.MultiheadAttention(emb, 2, batch_first=True)
        self.tower = mlp(2 * emb, 200, 80, norm=True, last=True)

    def forward(self, ids: Tensor, candidate: Tensor) -> Tensor:
        x, target = self.items(ids), self.items(candidate)
        near = torch.bmm(x, target.unsqueeze(-1)).squeeze(-1)
        near = near.masked_fill(ids == 0, torch.finfo(torch.float32).min)
        _, at = near.topk(self.nearest, dim=1)
        found = torch.gather(x, 1, at.unsqueeze(-1).expand(-1, -1, x.size(-1)))
        interest, _ = self.attention(target.unsqueeze(1), found, found, need_weights=False)
        return self.tower(torch.cat([interest.squeeze(1), target], -1)).squeeze(-1)


MODELS = {
    "SASRec (nn layers)": (SASRecLayers, scored),
    "SASRec (hand-written)": (SASRecHandWritten, scored),
    "BERT4Rec (nn layers)": (BERT4RecLayers, scored),
    "BERT4Rec (hand-written)": (BERT4RecHandWritten, scored),
    "GRU4Rec": (GRU4Rec, scored),
    "NARM": (NARM, scored),
    "Caser": (Caser, scored),
    "NextItNet": (NextItNet, scored),
    "STAMP": (STAMP, scored),
    "FMLP-Rec": (FMLPRec, scored),
    "LightSANs": (LightSANs, scored),
    "DIN": (lambda: randomised(DIN()), against_one),
    "BST": (BST, against_one),
    "TransAct": (TransAct, events),
    "SIM": (
        lambda: randomised(SIM()),
        lambda b, seed: (history(b, seed, 200), against_one(b, seed)[1]),
    ),
}
