"""The float parts of a converted model, on the kernels that the native engine runs.

An int8 layer rounds its input. Where two float kernels before it differ in the last bit, a value in
some thousands of requests falls to the other side of a rounding, and that integer is another one:
measured on the canonical ranker, 3.5 % of all requests then had a score that differed in the third
digit. With the same kernels the integers are the same, and what was evaluated is what is served.
"""

from __future__ import annotations

from torch import nn

from fastrec.compress.layers import swap_obstacle
from fastrec.compress.selection import set_module
from fastrec.models import fuse_attention_
from fastrec.nn.layer_norm import LayerNorm


def match_serving_numerics_(model: nn.Module) -> None:
    """From now on, norms and the models' own attention round in ``model`` as in the engine.

    In place, for inference; training, other devices and other dtypes stay torch's.
    """
    norms = [
        name
        for name, m in model.named_modules()
        if type(m) is nn.LayerNorm and name and swap_obstacle(m) is None
    ]
    for name in norms:
        norm = model.get_submodule(name)
        assert isinstance(norm, nn.LayerNorm)
        set_module(model, name, LayerNorm.from_float(norm))
    fuse_attention_(model)
