"""Operations of a network's graph, and the peak rate of matrix products on this machine.

A multiplication with its addition counts as two operations. Convolutions and matrix products are counted, in the shapes
that they have at a given batch; element-wise operations are not. `onnx` is imported when a graph is counted.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from redif_sdk.errors import UnsupportedModel

__all__ = ["count_flops", "gemm_peak"]

#: Operators that multiply matrices and have no rule here: no figure is better than one that is too small.
_UNCOUNTED = frozenset(
    [
        "Attention",
        "ConvInteger",
        "DeformConv",
        "Einsum",
        "GRU",
        "If",
        "LSTM",
        "MatMulInteger",
        "QLinearConv",
        "QLinearMatMul",
        "RNN",
        "Scan",
    ]
)

Shapes = dict[str, list[int]]


def count_flops(model: bytes, dims: Mapping[str, int], trips: int = 1) -> int:
    """Operations of one call of a graph, with its free axes set by `dims`; a loop's body runs `trips` times.

    Raises UnsupportedModel for operators that are not known here, and where a shape cannot be told.
    """
    import onnx

    proto = onnx.load_from_string(model)
    _bind(proto.graph, dims)
    proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    return _graph_flops(proto.graph, {}, trips)


def _bind(graph: Any, dims: Mapping[str, int]) -> None:
    """Replace the free axes by numbers, also in the bodies of loops."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in dims:
                dim.dim_value = dims[dim.dim_param]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _bind(attribute.g, dims)


def _graph_flops(graph: Any, around: Shapes, trips: int) -> int:
    shapes = around | _shapes(graph)
    total = 0
    for node in graph.node:
        if node.op_type in _UNCOUNTED:
            raise UnsupportedModel(f"{node.op_type} ({node.name}) is not counted; add it to bench/flops.py")
        if node.op_type == "Loop":
            body = next(attribute.g for attribute in node.attribute if attribute.name == "body")
            total += trips * _graph_flops(body, shapes, trips)
        elif node.op_type in _RULES:
            total += 2 * _RULES[node.op_type](node, shapes)
    return total


def _shapes(graph: Any) -> Shapes:
    """The fully known shapes, by name."""
    found: Shapes = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(dim.HasField("dim_value") for dim in tensor.shape.dim):
            found[value.name] = [dim.dim_value for dim in tensor.shape.dim]
    return found | {tensor.name: list(tensor.dims) for tensor in graph.initializer}


def _shape(node: Any, name: str, shapes: Shapes) -> list[int]:
    if name not in shapes:
        raise UnsupportedModel(f"the shape of {name} at {node.op_type} ({node.name}) is unknown; it cannot be counted")
    return shapes[name]


def _conv(node: Any, shapes: Shapes) -> int:
    """Each output sums over the kernel and the channels of its group: the weights' (M, C / group, kernel)."""
    return math.prod(_shape(node, node.output[0], shapes)) * math.prod(_shape(node, node.input[1], shapes)[1:])


def _conv_transpose(node: Any, shapes: Shapes) -> int:
    """Each input goes to the kernel and the channels of its group: the weights' (C, M / group, kernel)."""
    return math.prod(_shape(node, node.input[0], shapes)) * math.prod(_shape(node, node.input[1], shapes)[1:])


def _gemm(node: Any, shapes: Shapes) -> int:
    turned = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    inner = _shape(node, node.input[0], shapes)[0 if turned else 1]
    return math.prod(_shape(node, node.output[0], shapes)) * inner


def _matmul(node: Any, shapes: Shapes) -> int:
    return math.prod(_shape(node, node.output[0], shapes)) * _shape(node, node.input[0], shapes)[-1]


#: Operator -> multiplications with their additions.
_RULES = {"Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm, "MatMul": _matmul}

_GEMM_PROGRAM = """
import time
import numpy
best = 0.0
for size in (1536, 1792, 2048):
    a, b = numpy.ones((size, size), numpy.float32), numpy.ones((size, size), numpy.float32)
    out = numpy.empty_like(a)
    for _ in range(6):
        start = time.perf_counter()
        numpy.matmul(a, b, out=out)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
print(best)
"""


def gemm_peak(num_threads: int | None = None) -> float:
    """Operations a second of the best of 18 products of square float32 matrices (1536 to 2048), by numpy's BLAS.

    In a process of its own: a BLAS takes its number of threads when it is loaded.
    """
    threads = {} if num_threads is None else dict.fromkeys(_THREAD_VARIABLES, str(num_threads))
    done = subprocess.run(
        [sys.executable, "-c", _GEMM_PROGRAM], env=os.environ | threads, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")
