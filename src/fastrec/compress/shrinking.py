"""``student``: a shallower, narrower copy of a trained model, initialised from its weights."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from fastrec.compress.layers import computes_linear, weight_obstacle
from fastrec.compress.selection import bypassed_children, check_model, named_layers
from fastrec.compress.student_init import make_student, principal, vectors
from fastrec.errors import ArgumentError
from fastrec.models import Ranker, SASRec
from fastrec.models.attention import EncoderBlock

_ELEMENTWISE = (
    nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.Mish, nn.Hardswish,
    nn.Softplus, nn.Dropout, nn.Identity,
)  # fmt: skip


def student(
    model: nn.Module, depth: float | int = 1.0, width: float | int = 1.0, *, seed: int = 0
) -> nn.Module:
    """A smaller model for :func:`fastrec.distill`, initialised from its teacher.

    Of a ``Ranker`` or ``SASRec`` every width shrinks. The residual stream is projected onto the
    principal directions of the item vectors; each head gets the q and k whose scores, and the v and
    output whose product, are nearest to its own (SVD); feed-forward parts and towers keep the
    neurons with the largest weights in and out. Encoders with grouped, separable or low-rank
    projections start fresh (their tables do not).

    Of any other model the structure is kept where it is not plain: ``depth`` applies to the
    longest ``nn.ModuleList`` (or ``nn.TransformerEncoder``) of layers alike, ``width`` to hidden
    widths between two linear layers, with nothing but elementwise modules between, in an
    ``nn.Sequential`` or an ``nn.TransformerEncoderLayer``. Nothing outside them changes.

    Of N layers n are kept, the j-th from the ceil(j N / n)-th, as :class:`HiddenStates` pairs them.

    Args:
        model: the trained teacher; left as it is.
        depth: share of the layers kept, in (0, 1], or their number (an int).
        width: share of each width kept, in (0, 1]; of a ``Ranker`` or ``SASRec`` also the model
            width d (an int, a multiple of the heads).
        seed: of what starts fresh.

    Returns:
        a new model of the same class, in eval mode.

    Raises:
        ArgumentError: a share or number out of range, nothing in the model that can shrink so, or a
            weight that is re-parametrised.
    """
    model = check_model(model)
    for name, layer in named_layers(model, computes_linear, lambda module, name: True):
        if (why := weight_obstacle(layer)) is not None:
            raise ArgumentError("model", "plain weights", f"{name!r}: {why}")
    if isinstance(model, Ranker | SASRec):
        return _of_ours(model, depth, width, seed)
    new = copy.deepcopy(model).eval()
    if isinstance(width, int) and not isinstance(width, bool) and width != 1:
        raise ArgumentError("width", "a share in (0, 1] of a model of your own", width)
    if depth != 1.0 or isinstance(depth, int):
        _drop_layers(new, depth)
    share = _share("width", width, 1)
    if share < 1 and not _narrow_hidden(new, share):
        raise ArgumentError(
            "width", "1, or a model with linear layers in an nn.Sequential around an activation",
            width,
        )  # fmt: skip
    return new


def _share(argument: str, value: Any, whole: int) -> float:
    """``value`` as a share of ``whole``."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and isinstance(value, int) and 1 <= value <= whole:
        return value / whole
    if number and isinstance(value, float) and 0 < value <= 1:
        return value
    raise ArgumentError(argument, f"a share in (0, 1] or an integer in 1..{whole}", repr(value))


def kept_layers(kept: int, count: int) -> list[int]:
    """Which of ``count`` layers stay: the j-th of n is the ceil(j N / n)-th of N."""
    return [math.ceil((j + 1) * count / kept) - 1 for j in range(kept)]


# Models of any kind


def _drop_layers(model: nn.Module, depth: float | int) -> None:
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1 and _alike(module)
    ]
    if not lists:
        raise ArgumentError("depth", "1, or a model with an nn.ModuleList of layers alike", depth)
    _, layers = max(lists, key=lambda item: len(item[1]))
    count = len(layers)
    stay = kept_layers(max(1, round(_share("depth", depth, count) * count)), count)
    layers._modules = {str(i): layers[index] for i, index in enumerate(stay)}
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and module.layers is layers:
            module.num_layers = len(stay)


def _alike(layers: nn.ModuleList) -> bool:
    shapes = [[(n, p.shape) for n, p in layer.named_parameters()] for layer in layers]
    kinds = {type(layer) for layer in layers}
    return len(kinds) == 1 and all(shape == shapes[0] for shape in shapes)


def _narrow_hidden(model: nn.Module, share: float) -> int:
    """Hidden widths between two linear layers; how many were narrowed."""
    pairs: dict[tuple[int, int], tuple[nn.Linear, nn.Linear]] = {}
    called: dict[int, int] = {}  # a layer in two places keeps its sizes
    for module in model.modules():
        for child in module.children():
            called[id(child)] = called.get(id(child), 0) + 1
    bypassed = bypassed_children(model)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            first, last = module.linear1, module.linear2
            pairs[id(first), id(last)] = first, last
        elif type(module) is nn.Sequential and id(module) not in bypassed:
            left: nn.Linear | None = None
            for child in module:
                if computes_linear(child) and isinstance(child, nn.Linear):
                    if left is not None:
                        pairs[id(left), id(child)] = left, child
                    left = child
                elif not isinstance(child, _ELEMENTWISE):
                    left = None
    done = 0
    for first, last in pairs.values():
        if first is last or called[id(first)] > 1 or called[id(last)] > 1:
            continue
        keep = max(1, round(share * first.out_features))
        chosen = strongest(first, last, keep)
        _take(first, 0, chosen)
        _take(last, 1, chosen)
        done += 1
    return done


def strongest(first: nn.Linear, last: nn.Linear, count: int) -> Tensor:
    """int64 [count], rising: the neurons between two layers with the largest product of the norms
    of their weights in (bias included) and out."""
    weight = first.weight.detach().float()
    into = weight.square().sum(1)
    if first.bias is not None:
        into = into + first.bias.detach().float().square()
    out = last.weight.detach().float().square().sum(0)
    return torch.topk(into * out, count).indices.sort().values


def _take(layer: nn.Linear, dim: int, chosen: Tensor) -> None:
    """Keep the chosen outputs (0) or inputs (1) of a layer, in place."""
    with torch.no_grad():
        layer.weight = nn.Parameter(layer.weight.index_select(dim, chosen))
        if dim == 0:
            layer.out_features = len(chosen)
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias[chosen])
        else:
            layer.in_features = len(chosen)


# Models of fastrec.models


def _of_ours(teacher: Ranker | SASRec, depth: Any, width: Any, seed: int) -> nn.Module:
    config = teacher.config
    deep = _share("depth", depth, max(1, config.n_blocks))
    wide = _share("width", width, config.d)
    d = config.d if wide == 1 else _multiple(wide * config.d, config.n_heads)
    if isinstance(width, int) and width % config.n_heads:
        raise ArgumentError("width", f"a multiple of n_heads = {config.n_heads}", width)

    def narrow(size: int) -> int:
        return max(1, round(wide * size))

    ffn = narrow(config.ffn)
    changes: dict[str, Any] = {
        "d": d,
        "ffn": ffn,
        "n_blocks": min(config.n_blocks, max(1, round(deep * config.n_blocks))),
        "encoder": config.encoder if wide == 1 else config.encoder.halved(d, ffn),
    }
    if isinstance(teacher, SASRec):
        small = dataclasses.replace(teacher.config, **changes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            new: Ranker | SASRec = SASRec(small)
        basis = _basis(teacher.item_table().detach(), d)
        with torch.no_grad():
            new.item_embedding.weight.copy_(teacher.item_table() @ basis)
            new.position_embedding.weight.copy_(teacher.position_embedding.weight @ basis)
    else:
        layers = teacher.config.tower
        stay = kept_layers(max(1, round(deep * len(layers))), len(layers)) if layers else []
        item_dim = teacher.config.item_dim
        changes |= {
            "tower": tuple(narrow(layers[i]) for i in stay),
            "category_dim": narrow(teacher.config.category_dim),
            "item_dim": None if item_dim is None else min(narrow(item_dim), d),
        }
        ranker = dataclasses.replace(teacher.config, **changes)
        new = make_student(teacher, ranker, seed=seed)
        basis = _basis(vectors(teacher.item_embedding, teacher.item_proj).detach(), d)
    if d == config.d and isinstance(teacher, Ranker):
        # Nothing to project: the tables of the teacher, not their principal directions.
        basis = torch.eye(d)
        new = _same_tables(new, teacher)
    with torch.no_grad():
        stay = kept_layers(len(new.blocks), len(teacher.blocks)) if len(new.blocks) else []
        for own, index in zip(new.blocks, stay, strict=True):
            _block(own, teacher.blocks[index], basis)
        _final_norm(new.final_norm, teacher.final_norm, basis)
        if isinstance(new, Ranker) and isinstance(teacher, Ranker):
            _final_norm(new.candidate_norm, teacher.candidate_norm, basis)
            _cross_attention(new, teacher, basis)
            _tower(new, teacher, basis)
    return new.eval()


def _multiple(size: float, of: int) -> int:
    return max(of, round(size / of) * of)


def _basis(rows: Tensor, d: int) -> Tensor:
    """[d_teacher, d]: the items' principal directions, or all of them where nothing shrinks."""
    return torch.eye(d) if rows.shape[1] == d else principal(rows.float(), d)


def _same_tables(new: Any, teacher: Ranker) -> Any:
    own = new.state_dict()
    same = {
        name: tensor
        for name, tensor in teacher.state_dict().items()
        if ("embedding" in name or name.startswith(("item_proj", "category_proj")))
        and name in own
        and own[name].shape == tensor.shape
    }
    new.load_state_dict(same, strict=False)
    return new


def _block(own: EncoderBlock, guide: EncoderBlock, basis: Tensor) -> None:
    """One encoder block whose residual stream is the guide's, projected onto ``basis``."""
    if not all(
        type(layer) is nn.Linear
        for block in (own, guide)
        for layer in (block.attention.in_proj, block.attention.out_proj, block.ffn[0], block.ffn[2])
    ):
        return
    scale = _norm_scale(basis)
    norm, ffn_norm = guide.attention_norm, guide.ffn_norm
    merged = _behind_norm(guide.attention.in_proj, norm, basis, scale)
    heads = getattr(own.attention, "n_heads", None) or own.attention.num_heads
    sizes = [heads * guide.attention.qk_dim] * 2 + [basis.shape[0]]
    parts = merged.split(sizes)
    width = own.attention.head_dim / guide.attention.head_dim
    q, k = _scores(parts[0], parts[1], heads, own.attention.qk_dim, width)
    v, out, bias = _values(parts[2], guide.attention.out_proj, heads, own.attention.head_dim, basis)
    _set(own.attention.in_proj, torch.cat([q, k, v]))
    _set(own.attention.out_proj, torch.cat([out, bias[:, None]], 1))
    _plain(own.attention_norm)
    _plain(own.ffn_norm)
    chosen = strongest(guide.ffn[0], guide.ffn[2], own.ffn[0].out_features)
    _set(own.ffn[0], _behind_norm(guide.ffn[0], ffn_norm, basis, scale)[chosen])
    last = basis.T @ guide.ffn[2].weight[:, chosen]
    _set(own.ffn[2], torch.cat([last, (basis.T @ guide.ffn[2].bias)[:, None]], 1))


def _norm_scale(basis: Tensor) -> float:
    """Ratio of the norms' output lengths: sqrt(d_teacher / d)."""
    return float((basis.shape[0] / basis.shape[1]) ** 0.5)


def _behind_norm(layer: nn.Linear, norm: nn.LayerNorm, basis: Tensor, scale: float) -> Tensor:
    """[W, b] of a layer that reads the narrow norm without gain in place of ``norm``."""
    weight = (layer.weight * norm.weight) @ basis * scale
    bias = layer.weight @ norm.bias + (0 if layer.bias is None else layer.bias)
    return torch.cat([weight, bias[:, None]], 1)


def _scores(q: Tensor, k: Tensor, heads: int, rank: int, narrowed: float) -> tuple[Tensor, Tensor]:
    """q and k [H r, d + 1] whose scores are nearest; ``narrowed``: the new head width over the old,
    whose root the scores are divided by."""
    a_q, a_k = (x.double().unflatten(0, (heads, -1)) for x in (q, k))
    left, singular, right = torch.linalg.svd(a_q.transpose(1, 2) @ a_k, full_matrices=False)
    root = (singular[:, :rank, None] * narrowed**0.5).sqrt()
    return (
        (left.transpose(1, 2)[:, :rank] * root).flatten(0, 1).to(q.dtype),
        (right[:, :rank] * root).flatten(0, 1).to(q.dtype),
    )


def _values(
    v: Tensor, out: nn.Linear, heads: int, width: int, basis: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """v [H D, d + 1], the output's weight [d, H D] and bias [d] with the nearest product."""
    a_v = v.double().unflatten(0, (heads, -1))
    weight = (basis.T @ out.weight).double().unflatten(1, (heads, -1)).transpose(0, 1)
    left, singular, right = torch.linalg.svd(weight @ a_v, full_matrices=False)
    # Weights add up to 1, so that a constant passes through: it may stay in v.
    root = singular[:, :width, None].sqrt()
    narrow = (right[:, :width] * root).flatten(0, 1)
    wide = (left[:, :, :width] * root.transpose(1, 2)).transpose(0, 1).flatten(1)
    bias = torch.zeros(basis.shape[1]) if out.bias is None else basis.T @ out.bias
    return narrow.to(v.dtype), wide.to(v.dtype), bias


def _set(layer: nn.Linear, full: Tensor) -> None:
    """From [W, b]; rows beyond what there is start at zero."""
    weight, bias = full[:, :-1], full[:, -1]
    layer.weight.zero_()
    layer.weight[: weight.shape[0], : weight.shape[1]].copy_(weight)
    if layer.bias is not None:
        layer.bias.zero_()
        layer.bias[: len(bias)].copy_(bias)


def _plain(norm: nn.LayerNorm) -> None:
    norm.weight.fill_(1)
    norm.bias.zero_()


def _final_norm(own: nn.LayerNorm, guide: nn.LayerNorm, basis: Tensor) -> None:
    """The diagonal of the guide's gain in the basis: a norm has nothing else."""
    own.weight.copy_((basis.square() * guide.weight[:, None]).sum(0) * _norm_scale(basis))
    own.bias.copy_(basis.T @ guide.bias)


def _cross_attention(new: Ranker, teacher: Ranker, basis: Tensor) -> None:
    own, guide = new.cross_attention, teacher.cross_attention
    heads = own.n_heads

    def projected(layer: nn.Linear) -> Tensor:
        return torch.cat([layer.weight @ basis, layer.bias[:, None]], 1)

    k, v = projected(guide.kv_proj).chunk(2)
    width = own.head_dim / guide.head_dim
    q, k = _scores(projected(guide.q_proj), k, heads, own.head_dim, width)
    v, out, bias = _values(v, guide.out_proj, heads, own.head_dim, basis)
    _set(own.q_proj, q)
    _set(own.kv_proj, torch.cat([k, v]))
    _set(own.out_proj, torch.cat([out, bias[:, None]], 1))


def _tower(new: Ranker, teacher: Ranker, basis: Tensor) -> None:
    """Input [candidate, context, their product], each in the basis; the strongest neurons."""
    guides = [m for m in teacher.tower if isinstance(m, nn.Linear)]
    owns = [m for m in new.tower if isinstance(m, nn.Linear)]
    hidden = kept_layers(len(owns) - 1, len(guides) - 1) if len(owns) > 1 else []
    # The first layer reads the input, so it always stays.
    stay = [*([0] if hidden else []), *hidden[1:], len(guides) - 1]
    if any(
        guides[after].in_features != guides[index].out_features
        for index, after in itertools.pairwise(stay)
    ):
        return  # widths differ across what is left out: a fresh tower
    first = guides[0].weight.unflatten(1, (3, -1))
    # c o x with c = P c', x = P x': the terms in which one direction meets itself.
    parts = [first[:, 0] @ basis, first[:, 1] @ basis, first[:, 2] @ basis.square()]
    inputs = torch.cat(parts, 1)
    chosen: Tensor | None = None
    for own, index in zip(owns, stay, strict=True):
        weight = inputs if index == 0 else guides[index].weight
        if chosen is not None:
            weight = weight[:, chosen]
        full = torch.cat([weight, guides[index].bias[:, None]], 1)
        if index == len(guides) - 1:
            chosen = None
        else:
            count = min(own.out_features, guides[index].out_features)
            chosen = strongest(guides[index], guides[index + 1], count)
            full = full[chosen]
        _set(own, full)
