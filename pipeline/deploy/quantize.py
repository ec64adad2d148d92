"""Files of lower precision from a finished float32 file: int8 (QDQ, static, per channel), or float16.

Int8 is done by `onnxruntime.quantization`, which the runtime brings along, in the order that its
documentation asks for: pre-process (its optimiser and shape inference), calibrate on training images,
quantise. Weights are int8 with a scale per output channel. Activations are uint8 with a zero point on a CPU:
with int8 ones the same networks ran 1.3 to 2 times slower on an x86-64 with AVX-512 VNNI. With `symmetric`
they are int8 around zero, which is what NVIDIA's runtimes take.

Where that loses more accuracy than is allowed, weights of 7 bits are tried (processors without VNNI add
products of two 8 bit numbers with saturation), then a mixture, in which the layers that lose most stay
float. For that a network is divided into at most 24 groups of consecutive layers, a layer being a
convolution or a matrix product with what follows it up to the next one; each group is quantised alone, and
the mean squared error of the logits ranks it. A quarter of the groups stays float, then a half, then three
quarters, until the drop is kept. Everything here is deterministic: the same file, images and version of the
runtime give the same bytes.

Float16 is done by `onnxruntime.transformers.float16`: it comes with the runtime and is maintained with it,
while onnxconverter-common, which it was taken from, would be one more dependency for the same function.
Inputs and outputs stay float32 in both, so that a consumer does not see which of the files it runs.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import replacing, sha256_file
from pipeline.deploy.graph import strip
from pipeline.deploy.parity import Gate
from pipeline.devices.session import open_session
from pipeline.errors import BudgetlineError, ExportError
from pipeline.types import Float32Array, Json

if TYPE_CHECKING:
    from onnx import ModelProto

AccuracyOf = Callable[[Path], float]
"""Share of correct answers of a file, in [0, 1]."""

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
MOST_GROUPS = 24
FLOAT_SHARES = (0.25, 0.5, 0.75)
RANKING_IMAGES = 32

FLOAT16_GATE = Gate(max_abs_error=0.1, min_top1_agreement=0.995)
"""Float16 has 11 significant bits: a logit of 16 is known to 0.008, and each of some fifty layers rounds
its result. A tenth in a logit changes a probability by at most 2.5 points."""

NO_GATE = Gate(max_abs_error=sys.float_info.max, min_top1_agreement=0.0)
"""Int8 files are held to an accuracy; their logits need only be numbers."""


@dataclass(frozen=True)
class Int8Record:
    """An int8 file and how it came to be.

    `kept_float` names the layers (of `layers`: convolutions and matrix products) that stayed float;
    accuracies are shares of the images that `accuracy_of` knows, in ONNX Runtime; `within` tells whether the
    allowed drop is kept; `rounds` counts the files that were tried."""

    sha256: str
    bytes: int
    layers: int
    kept_float: tuple[str, ...]
    weight_bits: int
    activations: str
    rounds: int
    calibration_images: int
    float_accuracy: float
    accuracy: float
    within: bool
    converter: str
    seconds: float

    @property
    def drop(self) -> float:
        """Accuracy lost, in percentage points; below 0 where it came out better."""
        return 100 * (self.float_accuracy - self.accuracy)

    def to_json(self) -> Json:
        return {**asdict(self), "kept_float": list(self.kept_float)}


@dataclass(frozen=True)
class Float16Record:
    """A float16 file."""

    sha256: str
    bytes: int
    converter: str
    seconds: float

    def to_json(self) -> Json:
        return asdict(self)


# ------------------------------------------------------------------------------------------------------- int8


class _Attempt(NamedTuple):
    """One way to quantise: the nodes that stay float, and the bits of a weight."""

    float_nodes: tuple[str, ...] = ()
    weight_bits: int = 8


class _Tried(NamedTuple):
    attempt: _Attempt
    file: Path
    accuracy: float


def quantise_int8(
    model_path: Path,
    out_path: Path,
    calibration_batches: Sequence[Float32Array],
    *,
    accuracy_of: AccuracyOf,
    max_accuracy_drop: float,
    symmetric: bool = False,
) -> Int8Record:
    """Write the int8 form of a float32 file that takes any batch, atomically.

    `calibration_batches` are normalised training images (N, C, H, W); `max_accuracy_drop` is in percentage
    points of what `accuracy_of` gives. Where no attempt keeps it, the most accurate one is written, and
    `within` is False. Raises ExportError where ONNX Runtime cannot quantise the file."""
    started = time.perf_counter()
    float_accuracy = accuracy_of(model_path)
    with tempfile.TemporaryDirectory(prefix="budgetline-int8-") as name, _translated(model_path):
        quantiser = _Quantiser(model_path, Path(name), calibration_batches, symmetric)
        tried = _search(quantiser, accuracy_of, float_accuracy, max_accuracy_drop)
        best = max(tried, key=lambda one: one.accuracy)
        _finish(best.file, out_path, _metadata(model_path) | {"precision": "int8"})
    return Int8Record(
        sha256=sha256_file(out_path),
        bytes=out_path.stat().st_size,
        layers=len(quantiser.layers),
        kept_float=tuple(layer for layer in quantiser.layers if layer in best.attempt.float_nodes),
        weight_bits=best.attempt.weight_bits,
        activations="int8" if symmetric else "uint8",
        rounds=len(tried),
        calibration_images=sum(len(batch) for batch in calibration_batches),
        float_accuracy=float_accuracy,
        accuracy=best.accuracy,
        within=_within(best.accuracy, float_accuracy, max_accuracy_drop),
        converter=_converter(),
        seconds=round(time.perf_counter() - started, 3),
    )


def _search(
    quantiser: _Quantiser, accuracy_of: AccuracyOf, float_accuracy: float, max_accuracy_drop: float
) -> list[_Tried]:
    """What was tried, in order; the last one keeps the drop, or none does."""
    tried: list[_Tried] = []

    def fails(attempt: _Attempt) -> bool:
        file = quantiser.write(f"round{len(tried)}", attempt)
        tried.append(_Tried(attempt, file, accuracy_of(file)))
        return not _within(tried[-1].accuracy, float_accuracy, max_accuracy_drop)

    if fails(_Attempt()) and fails(_Attempt(weight_bits=7)):
        bits = max(tried, key=lambda one: one.accuracy).attempt.weight_bits
        worst_first = quantiser.rank(bits)
        for share in FLOAT_SHARES:
            kept = worst_first[: int(np.ceil(share * len(worst_first)))]
            if not fails(_Attempt(tuple(node for group in kept for node in group), bits)):
                break
    return tried


def _within(accuracy: float, float_accuracy: float, max_accuracy_drop: float) -> bool:
    return 100 * (float_accuracy - accuracy) <= max_accuracy_drop + 1e-9


class _Quantiser:
    """One file, prepared, and its quantised forms in a folder."""

    def __init__(
        self, model_path: Path, folder: Path, batches: Sequence[Float32Array], symmetric: bool
    ) -> None:
        self.folder, self.batches, self.symmetric = folder, batches, symmetric
        self.prepared = folder / "prepared.onnx"
        model = _prepare(model_path, self.prepared)
        self.input_name = str(model.graph.input[0].name)
        self.layers = tuple(node.name for node in model.graph.node if node.op_type in WEIGHTED)
        self.groups = _groups(model)

    def write(self, name: str, attempt: _Attempt, only: Sequence[str] = ()) -> Path:
        """`only` limits quantisation to these nodes, which are then calibrated on few images."""
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        path = self.folder / f"{name}.onnx"
        batches = [self._few] if only else self.batches
        with _quiet():
            quantize_static(
                str(self.prepared),
                str(path),
                _Reader(self.input_name, batches),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                reduce_range=attempt.weight_bits == 7,
                activation_type=QuantType.QInt8 if self.symmetric else QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_quantize=list(only),
                nodes_to_exclude=list(attempt.float_nodes),
                extra_options={"ActivationSymmetric": self.symmetric},
            )
        return path

    def rank(self, weight_bits: int) -> list[tuple[str, ...]]:
        """The groups, the one that loses most alone first."""
        wanted = self._logits(self.prepared)
        errors = []
        for group in self.groups:
            alone = self._logits(self.write("alone", _Attempt(weight_bits=weight_bits), only=group))
            errors.append(float(np.mean((alone - wanted) ** 2)))
        order = sorted(range(len(self.groups)), key=lambda index: (-errors[index], index))
        return [self.groups[index] for index in order]

    @property
    def _few(self) -> Float32Array:
        return self.batches[0][:RANKING_IMAGES]

    def _logits(self, path: Path) -> NDArray[np.float64]:
        logits = open_session(path).run(None, {self.input_name: self._few})[0]
        return np.asarray(logits, dtype=np.float64)


class _Reader:
    """Batches as ONNX Runtime's calibration asks for them."""

    def __init__(self, input_name: str, batches: Sequence[Float32Array]) -> None:
        self._feeds = ({input_name: np.ascontiguousarray(batch, np.float32)} for batch in batches)

    def get_next(self) -> Mapping[str, Float32Array] | None:
        return next(self._feeds, None)


def _prepare(model_path: Path, out_path: Path) -> ModelProto:
    """The optimised, shape-inferred form that is quantised; every node has a name of its own."""
    import onnx

    with _quiet():
        from onnxruntime.quantization.shape_inference import quant_pre_process

        # ONNX's own inference knows all shapes of such a network; the symbolic one is for transformers.
        quant_pre_process(str(model_path), str(out_path), skip_symbolic_shape=True)
    model = onnx.load_model(out_path)
    taken: set[str] = set()
    for index, node in enumerate(model.graph.node):
        node.name = node.name if node.name and node.name not in taken else f"{node.op_type}_{index}"
        taken.add(node.name)
    onnx.save_model(model, out_path)
    return model


def _groups(model: ModelProto) -> list[tuple[str, ...]]:
    """Nodes by layer (with what follows it), in at most `MOST_GROUPS` runs of layers."""
    layers: list[list[str]] = [[]]
    for node in model.graph.node:
        if node.op_type in WEIGHTED and any(layers):
            layers.append([])
        layers[-1].append(node.name)
    runs = np.array_split(np.arange(len(layers)), min(MOST_GROUPS, len(layers)))
    return [tuple(node for index in run for node in layers[index]) for run in runs]


# ---------------------------------------------------------------------------------------------------- float16


def to_float16(model_path: Path, out_path: Path) -> Float16Record:
    """Write the float16 form of a float32 file, atomically; its inputs and outputs stay float32.

    Numbers too large for float16 become its largest, those too small its smallest: the parity gate
    (`FLOAT16_GATE`) tells whether that matters. Raises ExportError where it cannot be converted."""
    import onnx

    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="budgetline-fp16-") as name, _translated(model_path):
        with _quiet():
            from onnxruntime.transformers.float16 import convert_float_to_float16

            model = convert_float_to_float16(onnx.load_model(model_path), keep_io_types=True)
        _sort_casts(model)
        draft = Path(name) / "half.onnx"
        onnx.save_model(model, draft)
        _finish(draft, out_path, _metadata(model_path) | {"precision": "fp16"})
    return Float16Record(
        sha256=sha256_file(out_path),
        bytes=out_path.stat().st_size,
        converter=_converter(),
        seconds=round(time.perf_counter() - started, 3),
    )


def _sort_casts(model: ModelProto) -> None:
    """The converter appends the casts of the inputs to the end; ONNX wants nodes before their readers."""
    from onnx import NodeProto

    inputs = {entry.name for entry in model.graph.input}
    nodes = [NodeProto.FromString(node.SerializeToString()) for node in model.graph.node]
    model.graph.ClearField("node")
    model.graph.node.extend(sorted(nodes, key=lambda n: not (n.op_type == "Cast" and n.input[0] in inputs)))


# ----------------------------------------------------------------------------------------------- for any file


def probe(precision: Literal["fp16", "int8"], *, symmetric: bool = False) -> bytes:
    """A small model in that precision with the operators that spaces use, for asking a provider whether it
    runs such files before any network is trained. Raises ExportError."""
    with tempfile.TemporaryDirectory(prefix="budgetline-probe-") as name:
        path, out = Path(name) / "float.onnx", Path(name) / "out.onnx"
        path.write_bytes(_probe_model().SerializeToString())
        if precision == "fp16":
            to_float16(path, out)
        else:
            noise = np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)
            quantise_int8(
                path, out, [noise], accuracy_of=lambda file: 1.0, max_accuracy_drop=0.0, symmetric=symmetric
            )
        return out.read_bytes()


def _probe_model() -> ModelProto:
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    shapes = {"stem": (4, 3, 3, 3), "shift": (4,), "depth": (4, 1, 3, 3), "classes": (2, 8), "bias": (2,)}
    weights = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
    node, pads, window = helper.make_node, [1, 1, 1, 1], [3, 3]
    nodes = [
        node("Conv", ["images", "stem", "shift"], ["a"], pads=pads),
        node("Relu", ["a"], ["b"]),
        node("Conv", ["b", "depth", "shift"], ["c"], group=4, pads=pads),
        node("Add", ["b", "c"], ["d"]),
        node("MaxPool", ["d"], ["e"], kernel_shape=window, pads=pads),
        node("AveragePool", ["d"], ["f"], kernel_shape=window, pads=pads),
        node("Concat", ["e", "f"], ["g"], axis=1),
        node("GlobalAveragePool", ["g"], ["h"]),
        node("Flatten", ["h"], ["i"]),
        node("Gemm", ["i", "classes", "bias"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 2])],
        [numpy_helper.from_array(value, key) for key, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def fix_batch(model_path: Path, out_path: Path, batch: int) -> None:
    """Write a file that takes any batch as one that takes just `batch` images, atomically."""
    import onnx

    model = onnx.load_model(model_path)
    for entry in (*model.graph.input, *model.graph.output):
        entry.type.tensor_type.shape.dim[0].dim_value = batch
    with _translated(model_path):
        _write(model, out_path)


def _metadata(model_path: Path) -> dict[str, str]:
    import onnx

    return {entry.key: entry.value for entry in onnx.load_model(model_path).metadata_props}


def _finish(draft: Path, out_path: Path, metadata: Mapping[str, str]) -> None:
    """Without traces of the converter, and with the metadata of the float file."""
    import onnx

    model = onnx.load_model(draft)
    strip(model)
    used = {node.domain for node in model.graph.node}
    for entry in [entry for entry in model.opset_import if entry.domain not in used | {""}]:
        model.opset_import.remove(entry)
    onnx.helper.set_model_props(model, dict(sorted(metadata.items())))
    _write(model, out_path)


def _write(model: ModelProto, out_path: Path) -> None:
    import onnx

    onnx.checker.check_model(model, full_check=True)
    with replacing(out_path) as draft:
        draft.write_bytes(model.SerializeToString(deterministic=True))


def _converter() -> str:
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings and log lines of the converters, and without what they add to the import path."""
    import onnxruntime

    paths = list(sys.path)
    onnxruntime.set_default_logger_severity(4)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.path[:] = paths


@contextlib.contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn whatever a third-party converter or checker raises into an ExportError with its first line."""
    try:
        yield
    except BudgetlineError:
        raise
    except Exception as failure:
        reason = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
        raise ExportError(f"{path}: cannot be written in lower precision: {reason}") from failure
