"""Memory that running a network takes: its weights, and the feature maps that are alive at the same time.

    memory_bytes = weights + max over operators of (what is read now or later + what is written now)

for the batch that the profile runs, operators one after the other in the order of the exported graph. A
feature map is kept until its last reader has run. Reused are only: the buffer of a map that nobody but an
activation reads, by that activation (runtimes fuse the two), and views (a flattened map is the map). What
the runtime takes besides is not in it: its own code, the scratch space of its kernels, second copies of
weights in another order, and what its allocator keeps in reserve. Measured beside it: the resident memory
that opening and running a session adds to a process (`resident_bytes` in a latency's context).

`peak_numbers` works it out from an architecture, `footprint` from an ONNX file, and they agree. No sum over
slots or operators is a maximum over time, so a cost table offers memory through `of` alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.costs.counts import FLOAT_BYTES, weight_bytes
from pipeline.deploy.quantize import WEIGHTED
from pipeline.spaces.base import SearchSpace, Traced
from pipeline.spaces.trace import Kind, Step
from pipeline.types import Arch

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

MEMORY = "memory_bytes"

_KINDS: dict[str, Kind] = {
    "Conv": "conv",
    "BatchNormalization": "norm",
    **dict.fromkeys(("Relu", "Clip", "HardSwish", "HardSigmoid", "Sigmoid", "LeakyRelu"), "activation"),
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze", "Identity"), "view"),
}


def offers_memory(space: SearchSpace) -> bool:
    """Whether a network's memory can be worked out before it is built."""
    return isinstance(space, Traced)


def memory_bytes(space: SearchSpace, arch: Arch, batch: int) -> int:
    """Of a float32 network; `offers_memory` must hold. Raises ConfigError for a network of another space."""
    return weight_bytes(space.layers(arch)) + FLOAT_BYTES * batch * peak_numbers(space, arch)


def peak_numbers(space: SearchSpace, arch: Arch) -> int:
    """The most numbers alive at once while one image is worked on."""
    assert isinstance(space, Traced), "asked of a space that `offers_memory`"
    steps = space.trace(arch)
    return peak(steps, [step.numbers for step in steps])


def peak(steps: Sequence[Step], sizes: Sequence[int]) -> int:
    """The largest sum of `sizes` (one per step's output) that are alive at once; the last step's output is
    the network's."""
    owner = _owners(steps)
    last = list(range(len(steps)))
    for now, step in enumerate(steps):
        for maker in step.reads:
            last[owner[maker]] = now
    begin: Counter[int] = Counter()
    end: Counter[int] = Counter()
    for number, of in enumerate(owner):
        if number == of:
            begin[number] += sizes[number]
            end[max(last[number], number)] += sizes[number]
    alive = most = 0
    for now in range(len(steps)):
        alive += begin[now]
        most = max(most, alive)
        alive -= end[now]
    return most


def _owners(steps: Sequence[Step]) -> list[int]:
    """Per step the one whose buffer holds its output: itself, or what it works on in place."""
    readers = Counter(maker for step in steps for maker in step.reads)
    owner: list[int] = []
    for number, step in enumerate(steps):
        maker = step.reads[0] if step.reads else number
        alone = readers[maker] == 1
        shares = (
            step.kind == "view"
            or (step.kind == "activation" and alone)
            or (step.kind == "norm" and alone and steps[maker].kind == "conv")
        )
        owner.append(owner[maker] if shares else number)
    return owner


# ----------------------------------------------------------------------------------------------- of an ONNX f


class Footprint(NamedTuple):
    """Bytes of a file's weights, and of its feature maps at their peak."""

    weight_bytes: int
    activation_bytes: int

    @property
    def memory_bytes(self) -> int:
        return self.weight_bytes + self.activation_bytes


def footprint(path: Path, batch: int) -> Footprint:
    """Of a file whose first axis is `batch` or free. In a quantised one, an operator between dequantised
    inputs and quantised outputs is counted as the runtime runs it: on quantised numbers."""
    import onnx

    model = onnx.load_model(path)
    for entry in (*model.graph.input, *model.graph.output):
        entry.type.tensor_type.shape.dim[0].dim_value = batch
    steps, sizes = _steps(onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True))
    return Footprint(_weight_bytes(model), peak(steps, sizes))


def _weight_bytes(model: ModelProto) -> int:
    """Without 64-bit integers, which are shapes and axes."""
    from onnx import TensorProto, helper

    return sum(
        math.prod(tensor.dims) * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
        for tensor in model.graph.initializer
        if tensor.data_type != TensorProto.INT64
    )


def _steps(model: ModelProto) -> tuple[list[Step], list[int]]:
    """Steps and the bytes of each one's output; what is worked out of constants alone is none."""
    sizes, fused = _tensor_bytes(model), _fused(model)
    graph = model.graph
    made = {entry.name: number for number, entry in enumerate(graph.input)}
    steps = [Step("input", 0) for _ in made]
    outputs = [sizes[name] for name in made]
    for node in graph.node:
        reads = tuple(made[name] for name in node.input if name in made)
        if reads:
            made[node.output[0]] = len(steps)
            steps.append(Step("view" if node.output[0] in fused.views else _kind(node), 0, reads))
            outputs.append(sizes[fused.sized_as.get(node.output[0], node.output[0])])
    return steps, outputs


def _kind(node: NodeProto) -> Kind:
    return _KINDS.get(node.op_type, "other")


def _tensor_bytes(model: ModelProto) -> dict[str, int]:
    from onnx import helper

    found = {}
    for entry in (*model.graph.input, *model.graph.value_info, *model.graph.output):
        tensor = entry.type.tensor_type
        width = int(helper.tensor_dtype_to_np_dtype(tensor.elem_type).itemsize)
        found[entry.name] = width * math.prod(axis.dim_value for axis in tensor.shape.dim)
    return found


class _Fused(NamedTuple):
    """What vanishes when quantised operators are fused: outputs that are views of their input, and outputs
    that are as large as another tensor (their quantised form)."""

    views: frozenset[str]
    sized_as: dict[str, str]


def _fused(model: ModelProto) -> _Fused:
    """An operator is fused where all it reads is dequantised or constant, and all its readers quantise."""
    graph = model.graph
    maker = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    outputs = {entry.name for entry in graph.output}

    def quantises(name: str) -> bool:
        found = readers.get(name, [])
        return name not in outputs and bool(found) and all(n.op_type == "QuantizeLinear" for n in found)

    def is_fused(node: NodeProto) -> bool:
        inputs = [maker[name] for name in node.input if name in maker]
        float_weights = node.op_type in WEIGHTED and node.input[1] not in maker
        return (
            node.op_type not in ("QuantizeLinear", "DequantizeLinear")
            and not float_weights
            and bool(inputs)
            and all(before.op_type == "DequantizeLinear" for before in inputs)
            and quantises(node.output[0])
        )

    fused = {node.output[0] for node in graph.node if is_fused(node)}
    sized_as = {name: readers[name][0].output[0] for name in fused}
    views = {
        node.output[0]
        for node in graph.node
        if (node.op_type == "QuantizeLinear" and node.input[0] in fused)
        or (
            node.op_type == "DequantizeLinear"
            and node.output[0] not in outputs
            and all(reader.output[0] in fused for reader in readers.get(node.output[0], []))
        )
    }
    return _Fused(frozenset(views), sized_as)
