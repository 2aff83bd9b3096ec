"""The canonical ranker: a history encoder, cross attention of the candidates over it, an MLP.

    token     = item + W_c category + behaviour + position         [B, L, d]
    encoded   = norm(blocks(token))                                [B, L, d]   once per user
    candidate = item + W_c category                                [B, m, d]
    context   = cross attention(candidate over encoded)            [B, m, d]
    score     = MLP([candidate, context, candidate * context])     [B, m]

Position counts back from the newest event (0 = newest), so that recency means the same thing
for any length of the history. Ids: 0 is padding in every table.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastrec.errors import ArgumentError
from fastrec.models.attention import MASKED, CrossAttention, EncoderBlock, KeyMask
from fastrec.models.config import Config
from fastrec.models.encoder import EncoderConfig, as_encoder
from fastrec.nn._projections import output_layer


@dataclass(frozen=True)
class RankerConfig(Config):
    """Sizes of a :class:`Ranker`.

    Args:
        n_items: rows of the item table, row 0 (padding) included.
        n_categories: rows of the category table, row 0 included.
        n_behaviours: kinds of behaviour; the table has one row more, for padding.
        history_length: longest history, L (rows of the position table).
        d: model width; a multiple of ``n_heads``.
        category_dim: width of the category table.
        n_blocks: encoder blocks.
        n_heads: heads of every attention.
        ffn: hidden width of the encoder's feed-forward part.
        tower: hidden widths of the scoring MLP.
        item_dim: width of the item table; None means ``d``, less means a factorised table (a Linear
            without bias brings it to ``d``).
        dropout: rate in the encoder blocks while training.
        encoder: what the blocks attend and project with; the default is a plain transformer's.

    Raises:
        ArgumentError: a size is not positive, ``d`` is not a multiple of ``n_heads``, or
            ``encoder`` does not fit.
    """

    n_items: int
    n_categories: int
    n_behaviours: int = 4
    history_length: int = 100
    d: int = 128
    category_dim: int = 32
    n_blocks: int = 2
    n_heads: int = 4
    ffn: int = 512
    tower: tuple[int, ...] = (1024,) * 6
    item_dim: int | None = None
    dropout: float = 0.0
    encoder: EncoderConfig = field(default_factory=EncoderConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "encoder", as_encoder(self.encoder))
        object.__setattr__(self, "tower", tuple(int(width) for width in self.tower))
        for name in ("n_items", "n_categories", "n_behaviours", "history_length", "d", "n_heads"):
            if getattr(self, name) < 1:
                raise ArgumentError(name, "a positive integer", getattr(self, name))
        for name in ("category_dim", "ffn"):
            if getattr(self, name) < 1:
                raise ArgumentError(name, "a positive integer", getattr(self, name))
        if self.n_blocks < 0:
            raise ArgumentError("n_blocks", "zero or more", self.n_blocks)
        if self.d % self.n_heads:
            raise ArgumentError("d", f"a multiple of n_heads = {self.n_heads}", self.d)
        if any(width < 1 for width in self.tower):
            raise ArgumentError("tower", "positive widths", self.tower)
        if self.item_dim is not None and self.item_dim < 1:
            raise ArgumentError("item_dim", "a positive integer or None", self.item_dim)
        if not 0 <= self.dropout < 1:
            raise ArgumentError("dropout", "a rate in [0, 1)", self.dropout)
        self.encoder.check(self.d, self.n_heads, self.ffn, causal=False)

    @classmethod
    def taobao(cls) -> RankerConfig:
        """The size all published figures are quoted on: 200,000 items, 32.0 M parameters."""
        return cls(n_items=200_000, n_categories=10_000)

    def student(self, share: float = 0.2) -> RankerConfig:
        """A ranker with at most ``share`` of this one's parameters, for distillation.

        Half the width, half as many tower layers of half the width, and a factorised item table as
        wide as the budget allows (at most ``item_dim / 2``, in steps of 8 where it can). Blocks and
        heads stay as they are, so that attention maps of student and teacher have the same shape.

        Raises:
            ArgumentError: not even an item table of width 1 fits.
        """
        d = max(self.n_heads, self.d // 2 // self.n_heads * self.n_heads)
        ffn = max(1, self.ffn // 2)
        small = dataclasses.replace(
            self,
            d=d,
            category_dim=max(1, self.category_dim // 2),
            ffn=ffn,
            encoder=self.encoder.halved(d, ffn),
            tower=tuple(
                max(1, width // 2) for width in self.tower[: math.ceil(len(self.tower) / 2)]
            ),
        )
        budget = int(share * self.n_parameters())
        widest = max(1, (self.item_dim or self.d) // 2)
        for item_dim in [*range(widest // 8 * 8, 0, -8), 4, 2, 1]:
            if item_dim <= widest:
                config = dataclasses.replace(small, item_dim=item_dim)
                if config.n_parameters() <= budget:
                    return config
        raise ArgumentError("share", "room for a student of half the width", share)

    def n_parameters(self) -> int:
        """Parameters of the model with these sizes, without building it."""
        d, ffn = self.d, self.ffn
        item_dim = self.item_dim or d
        total = self.n_items * item_dim + (item_dim * d if self.item_dim else 0)
        total += self.n_categories * self.category_dim + self.category_dim * d
        total += (self.n_behaviours + 1) * d + self.history_length * d
        with torch.device("meta"):
            block = EncoderBlock(d, self.n_heads, ffn, encoder=self.encoder)
        total += self.n_blocks * sum(p.numel() for p in block.parameters())
        total += 2 * d + 4 * d * (d + 1) + 2 * d
        widths = (3 * d, *self.tower, 1)
        return total + sum((a + 1) * b for a, b in itertools.pairwise(widths))


class Ranker(nn.Module):
    """Scores m candidates for each of B users from their last L events; see the module's notes.

    Forward trusts its inputs: run :func:`fastrec.models.validate_inputs` first where they come from
    outside. It has no data-dependent control flow, so it exports with a dynamic batch.
    """

    def __init__(self, config: RankerConfig) -> None:
        super().__init__()
        self.config = config
        d = config.d
        self.item_embedding = nn.Embedding(config.n_items, config.item_dim or d, padding_idx=0)
        self.item_proj = nn.Linear(config.item_dim, d, bias=False) if config.item_dim else None
        self.category_embedding = nn.Embedding(
            config.n_categories, config.category_dim, padding_idx=0
        )
        self.category_proj = nn.Linear(config.category_dim, d, bias=False)
        self.behaviour_embedding = nn.Embedding(config.n_behaviours + 1, d, padding_idx=0)
        self.position_embedding = nn.Embedding(config.history_length, d)
        self.blocks = nn.ModuleList(
            EncoderBlock(d, config.n_heads, config.ffn, config.dropout, config.encoder)
            for _ in range(config.n_blocks)
        )
        self.final_norm = nn.LayerNorm(d)
        self.candidate_norm = nn.LayerNorm(d)
        self.cross_attention = CrossAttention(d, config.n_heads)
        layers: list[nn.Module] = []
        width = 3 * d
        for hidden in config.tower:
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            width = hidden
        self.tower = nn.Sequential(*layers, nn.Linear(width, 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """An initialisation that learns within a few thousand examples (docs/training.md).

        Item vectors outweigh what the encoder blocks add at first, so that an encoded event still
        resembles its own item and the cross attention finds it; He initialisation for the tower.
        """
        for table in self.modules():
            if isinstance(table, nn.Embedding):
                nn.init.normal_(table.weight, std=0.5)
                if table.padding_idx is not None:
                    with torch.no_grad():
                        table.weight[table.padding_idx].zero_()
        with torch.no_grad():
            for block in self.blocks:
                output_layer(block.attention.out_proj)[0].mul_(0.1)
                output_layer(block.ffn[-1])[0].mul_(0.1)
        if self.item_proj is not None:
            # Keeps the scale of the projected rows that of an unfactorised table.
            nn.init.normal_(self.item_proj.weight, std=self.item_proj.in_features**-0.5)
        for layer in self.tower:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        nn.init.normal_(self.tower[-1].weight, std=self.tower[-1].in_features ** -0.5)

    def _vectors(self, item: Tensor, category: Tensor) -> Tensor:
        """Ids [B, n] -> item + W_c category [B, n, d]."""
        rows = self.item_embedding(item)
        if self.item_proj is not None:
            rows = self.item_proj(rows)
        return rows + self.category_proj(self.category_embedding(category))

    @staticmethod
    def _age(length: Tensor, size: int) -> Tensor:
        """Steps back from the newest event [B, L]; negative beyond the end."""
        return length.unsqueeze(1) - torch.arange(1, size + 1, device=length.device)

    @staticmethod
    def _mask(age: Tensor, length: Tensor, dtype: torch.dtype) -> KeyMask:
        return KeyMask(((age < 0).to(dtype) * MASKED)[:, None, None], length)

    def _encode(
        self, item: Tensor, category: Tensor, behaviour: Tensor, length: Tensor
    ) -> tuple[Tensor, KeyMask]:
        age = self._age(length, item.shape[1])
        x = self._vectors(item, category) + self.behaviour_embedding(behaviour)
        x = x + self.position_embedding(age.clamp_min(0))
        mask = self._mask(age, length, x.dtype)
        for block in self.blocks:
            x = block(x, mask)
        return self.final_norm(x), mask

    def _score(
        self,
        encoded: Tensor,
        mask: KeyMask,
        cand_item: Tensor,
        cand_category: Tensor,
    ) -> Tensor:
        candidate = self.candidate_norm(self._vectors(cand_item, cand_category))
        context = self.cross_attention(candidate, encoded, mask)
        # A user without history has nothing to attend to: the context is 0, not a mean of padding.
        context = context * (mask.length > 0).to(context.dtype)[:, None, None]
        z = torch.cat((candidate, context, candidate * context), dim=-1)
        return self.tower(z).squeeze(-1)

    def encode(self, item: Tensor, category: Tensor, behaviour: Tensor, length: Tensor) -> Tensor:
        """Encodes histories.

        Args:
            item, category, behaviour, length: as in :meth:`forward`.

        Returns:
            [B, L, d], for :meth:`score`.
        """
        return self._encode(item, category, behaviour, length)[0]

    def score(
        self, encoded: Tensor, length: Tensor, cand_item: Tensor, cand_category: Tensor
    ) -> Tensor:
        """Scores candidates of encoded histories.

        Args:
            encoded: :meth:`encode`'s output.
            length, cand_item, cand_category: as in :meth:`forward`.

        Returns:
            [B, m].
        """
        mask = self._mask(self._age(length, encoded.shape[1]), length, encoded.dtype)
        return self._score(encoded, mask, cand_item, cand_category)

    def forward(
        self,
        item: Tensor,
        category: Tensor,
        behaviour: Tensor,
        length: Tensor,
        cand_item: Tensor,
        cand_category: Tensor,
    ) -> Tensor:
        """Scores [B, m] of the candidates; higher is better.

        Args:
            item: int64 [B, L], left-aligned, oldest first; 0 beyond ``length``.
            category: int64 [B, L].
            behaviour: int64 [B, L].
            length: int64 [B], 0 to L.
            cand_item: int64 [B, m].
            cand_category: int64 [B, m].
        """
        encoded, mask = self._encode(item, category, behaviour, length)
        return self._score(encoded, mask, cand_item, cand_category)
