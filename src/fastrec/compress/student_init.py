"""A student that starts from what its teacher knows about items and categories."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastrec.models import Ranker, RankerConfig


def make_student(teacher: Ranker, config: RankerConfig, *, seed: int = 0) -> Ranker:
    """A ranker of ``config`` whose tables are the teacher's, projected to the student's width.

    Tables learn slowest (a row only moves when its item is met), and hold most of the parameters,
    so the student inherits them: vectors are projected onto the d principal directions of the
    teacher's item vectors, and factorised tables are the best low-rank ones of that (truncated SVD,
    by way of the Gram matrix: quick for any number of rows). Blocks, attention and tower start
    fresh.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = Ranker(config)
    with torch.no_grad():
        items = vectors(teacher.item_embedding, teacher.item_proj)
        # [d_teacher, d_student]: most of the items' energy survives
        basis = principal(items, config.d)
        _fill(student.item_embedding, student.item_proj, items @ basis)
        categories = vectors(teacher.category_embedding, teacher.category_proj)
        _fill(student.category_embedding, student.category_proj, categories @ basis)
        for name in ("behaviour_embedding", "position_embedding"):
            own, guide = getattr(student, name), getattr(teacher, name)
            if own.num_embeddings == guide.num_embeddings:
                own.weight.copy_(guide.weight.float() @ basis)
    return student


def vectors(table: nn.Embedding, projection: nn.Linear | None) -> Tensor:
    """The table's rows in the teacher's width, float32 [n, d]."""
    rows = table.weight.float()
    return rows if projection is None else rows @ projection.weight.float().T


def principal(rows: Tensor, width: int) -> Tensor:
    """Orthonormal [d, width]: eigenvectors of the Gram matrix, largest first, zeros where d <
    width."""
    _, vectors = torch.linalg.eigh(rows.T @ rows)
    leading = vectors.flip(1)[:, :width]
    return nn.functional.pad(leading, (0, width - leading.shape[1]))


def _fill(table: nn.Embedding, projection: nn.Linear | None, rows: Tensor) -> None:
    """Set table (and projection) so that they give ``rows`` [n, d], or the best of their rank."""
    if projection is None:
        table.weight.copy_(rows)
        return
    directions = principal(rows, table.embedding_dim)  # [d, rank]
    table.weight.copy_(rows @ directions)
    projection.weight.copy_(directions)
