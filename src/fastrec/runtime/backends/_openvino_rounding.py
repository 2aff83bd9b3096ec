"""OpenVINO's quantisers made to round as fastrec's kernels do.

OpenVINO turns QuantizeLinear into FakeQuantize, which computes round(x * a + b) with the zero point
in b: a sum near 128 rounds away what decides between two integers in one of some 10^5 elements,
and each such integer moves a whole row of the layers behind it. The kernels round the product and
add the zero point as an integer. So the product is rounded before FakeQuantize, which then maps
0..255 to 0..255 and is still what OpenVINO's int8 kernels are chosen by.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_LEVELS = 256


def round_before_quantising(model: Any) -> int:
    """Rewrite every 8-bit FakeQuantize of one scale in an ``ov.Model``; how many there were."""
    from openvino import opset13 as ops

    rewritten = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() != "FakeQuantize" or node.get_attributes()["levels"] != _LEVELS:
            continue
        bounds = [node.input_value(i).get_node() for i in (1, 2, 3, 4)]
        if any(b.get_type_name() != "Constant" or b.data.size != 1 for b in bounds):
            continue
        low, high, out_low, out_high = (float(b.data.reshape(())) for b in bounds)
        if (out_low, out_high) != (0.0, float(_LEVELS - 1)):
            continue
        # low = (0 - zero_point) * scale, high = (255 - zero_point) * scale.
        scale = np.float32((high - low) / (_LEVELS - 1))
        zero_point = np.float32(round(-low / float(scale)))
        scaled = ops.multiply(node.input_value(0), ops.constant(np.float32(1) / scale))
        whole = ops.round(scaled, "half_to_even")
        if zero_point:
            whole = ops.add(whole, ops.constant(zero_point))
        zero, top = ops.constant(np.float32(0)), ops.constant(np.float32(_LEVELS - 1))
        exact = ops.fake_quantize(whole, zero, top, zero, top, _LEVELS)
        for reader in node.output(0).get_target_inputs():
            reader.replace_source_output(exact.output(0))
        rewritten += 1
    return rewritten
