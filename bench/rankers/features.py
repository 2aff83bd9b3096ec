"""Models of many categorical fields and some numbers: crosses, masks, mixers, towers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rankers.histories import mlp, randomised

FIELDS, NUMBERS, VALUES, EMB = 26, 13, 5_000, 16
WIDTH = FIELDS * EMB


def fields(batch: int, seed: int) -> tuple[Tensor, ...]:
    """An id for each field."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.randint(0, VALUES, (batch, FIELDS), generator=draw),)


def with_numbers(batch: int, seed: int) -> tuple[Tensor, ...]:
    """Ids and numbers."""
    draw = torch.Generator().manual_seed(seed + 1)
    return *fields(batch, seed), torch.randn(batch, NUMBERS, generator=draw)


class Fields(nn.Module):
    """A table for each field, [B, F] to [B, F, d]."""

    def __init__(self, emb: int = EMB) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(VALUES, emb) for _ in range(FIELDS))

    def forward(self, ids: Tensor) -> Tensor:
        return torch.stack([table(ids[:, i]) for i, table in enumerate(self.tables)], dim=1)


class DCNv2(nn.Module):
    """Crosses x0 * (W x + b) + x beside a deep network."""

    def __init__(self) -> None:
        super().__init__()
        self.fields = Fields()
        self.crosses = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.deep = mlp(WIDTH, 400, 400, norm=True)
        self.out = nn.Linear(WIDTH + 400, 1)

    def forward(self, ids: Tensor) -> Tensor:
        first = x = self.fields(ids).flatten(1)
        for cross in self.crosses:
            x = x + first * cross(x)
        return torch.sigmoid(self.out(torch.cat([x, self.deep(first)], -1))).squeeze(-1)


class XDeepFM(nn.Module):
    """Compressed interaction: outer products of fields, then convolutions of kernel 1."""

    def __init__(self, maps: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.fields, self.linear = Fields(), Fields(1)
        sizes = [FIELDS, *[maps] * layers]
        self.compress = nn.ModuleList(nn.Conv1d(FIELDS * n, maps, 1) for n in sizes[:-1])
        self.cin = nn.Linear(maps * layers, 1)
        self.deep = mlp(WIDTH, 400, 400, last=True)

    def forward(self, ids: Tensor) -> Tensor:
        first = x = self.fields(ids)
        pooled = []
        for conv in self.compress:
            outer = torch.einsum("bhd,bmd->bhmd", first, x)
            x = conv(outer.view(ids.size(0), -1, EMB))
            pooled.append(x.sum(dim=-1))
        score = self.cin(torch.cat(pooled, -1)) + self.deep(first.flatten(1))
        return torch.sigmoid(score + self.linear(ids).sum(1)).squeeze(-1)


class DeepFM(nn.Module):
    """Pairs of fields as half of (square of sum - sum of squares), beside a deep network."""

    def __init__(self) -> None:
        super().__init__()
        self.fields, self.linear = Fields(), Fields(1)
        self.deep = mlp(WIDTH, 400, 400, last=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.fields(ids)
        pairs = 0.5 * (x.sum(1).pow(2) - x.pow(2).sum(1)).sum(1, keepdim=True)
        score = self.linear(ids).sum(1) + pairs + self.deep(x.flatten(1))
        return torch.sigmoid(score).squeeze(-1)


class DLRM(nn.Module):
    """Dot products of all pairs, whose lower triangle goes on beside the numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.fields = Fields(64)
        self.bottom = mlp(NUMBERS, 512, 256, 64)
        rows = torch.tensor([i for i in range(FIELDS + 1) for _ in range(i)])
        columns = torch.tensor([j for i in range(FIELDS + 1) for j in range(i)])
        self.register_buffer("rows", rows)
        self.register_buffer("columns", columns)
        self.top = mlp(64 + len(rows), 512, 256, last=True)

    def forward(self, ids: Tensor, numbers: Tensor) -> Tensor:
        dense = self.bottom(numbers)
        x = torch.cat([dense.unsqueeze(1), self.fields(ids)], 1)
        products = torch.bmm(x, x.transpose(1, 2))
        pairs = products[:, self.rows, self.columns]
        return torch.sigmoid(self.top(torch.cat([dense, pairs], 1))).squeeze(1)


class MaskNet(nn.Module):
    """Parallel blocks: the input's own mask times a normed hidden layer."""

    class Block(nn.Module):
        def __init__(self, aggregation: int = 512, outputs: int = 128) -> None:
            super().__init__()
            self.mask = nn.Sequential(
                nn.Linear(WIDTH, aggregation), nn.ReLU(), nn.Linear(aggregation, WIDTH)
            )
            self.hidden = nn.Linear(WIDTH, outputs)
            self.norm = nn.LayerNorm(outputs)

        def forward(self, x: Tensor, normed: Tensor) -> Tensor:
            return torch.relu(self.norm(self.hidden(self.mask(x) * normed)))

    def __init__(self) -> None:
        super().__init__()
        self.fields = Fields()
        self.norm = nn.LayerNorm(EMB)
        self.blocks = nn.ModuleList(self.Block() for _ in range(4))
        self.tower = mlp(4 * 128, 256, 64, last=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.fields(ids)
        normed = self.norm(x).flatten(1)
        found = [block(x.flatten(1), normed) for block in self.blocks]
        return torch.sigmoid(self.tower(torch.cat(found, 1))).squeeze(1)


class RankMixer(nn.Module):
    """Tokens mixed by transposing their parts, then a feed-forward of each token's own."""

    TOKENS, DIM = 16, 96

    class Block(nn.Module):
        def __init__(self, tokens: int, dim: int) -> None:
            super().__init__()
            self.norm, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
            self.up = nn.Parameter(torch.randn(tokens, dim, 2 * dim) * dim**-0.5)
            self.down = nn.Parameter(torch.randn(tokens, 2 * dim, dim) * (2 * dim) ** -0.5)
            self.up_bias = nn.Parameter(torch.zeros(tokens, 2 * dim))
            self.down_bias = nn.Parameter(torch.zeros(tokens, dim))

        def forward(self, x: Tensor) -> Tensor:
            b, t, d = x.shape
            mixed = x.view(b, t, t, d // t).transpose(1, 2).reshape(b, t, d)
            x = self.norm(x + mixed)
            h = torch.einsum("btd,tdh->bth", x, self.up) + self.up_bias
            y = torch.einsum("bth,thd->btd", nn.functional.gelu(h), self.down) + self.down_bias
            return self.norm2(x + y)

    def __init__(self) -> None:
        super().__init__()
        self.fields = Fields()
        self.tokens = nn.Linear(WIDTH, self.TOKENS * self.DIM)
        self.blocks = nn.Sequential(*(self.Block(self.TOKENS, self.DIM) for _ in range(2)))
        self.out = mlp(self.DIM, 64, last=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(self.fields(ids).flatten(1)).view(-1, self.TOKENS, self.DIM)
        return self.out(self.blocks(x).mean(1)).squeeze(1)


MODELS = {
    "DCNv2": (lambda: randomised(DCNv2()), fields),
    "xDeepFM": (XDeepFM, fields),
    "DeepFM": (DeepFM, fields),
    "DLRM": (DLRM, with_numbers),
    "MaskNet": (MaskNet, fields),
    "RankMixer": (RankMixer, fields),
}
