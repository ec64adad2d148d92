"""Modules as ONNX files: one export that ships, and a fast one of the same graph that is only ever timed.

Both go through the same clean-up (`pipeline.deploy.graph`), so that the same weights give the same bytes in
any folder and process, and both files hold the same operators.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.artifacts import replacing, sha256_file
from pipeline.deploy.graph import clean
from pipeline.errors import ExportError
from pipeline.types import Json

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto
    from torch import nn

INPUT_NAME = "images"
OUTPUT_NAME = "logits"
OLDEST_OPSET = 18
NEWEST_SCRIPT_OPSET = 20
"""The last opset that torch's TorchScript exporter writes; it is frozen there."""

_ABOUT_THEMSELVES = (
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated",
    r".*legacy TorchScript-based ONNX export",
    r"The feature will be removed\. Please remove usage of this function",
)


@dataclass(frozen=True)
class ExportRecord:
    """One ONNX file. `batch` is None where the file takes any batch; `bytes` is the file's size."""

    sha256: str
    bytes: int
    batch: int | None
    opset: int
    ir_version: int
    exporter: str
    seconds: float

    def to_json(self) -> Json:
        return asdict(self)


def export_onnx(
    network: nn.Module,
    path: Path,
    *,
    image_shape: tuple[int, int, int],
    batch: int | None,
    opset: int,
    metadata: Mapping[str, str],
) -> ExportRecord:
    """Write `network` in evaluation mode as the file that ships, atomically; `network` is left as it is.

    The input `images` has shape (batch, *image_shape), float32; batch None is dynamic. Output: `logits`.
    Batch norm is folded into the convolutions. `metadata` lands in the model's `metadata_props`.

    Raises ExportError when torch or the ONNX checker refuses the network, StorageError when the disk does.
    """
    import torch

    _check_opset(opset)
    started = time.perf_counter()
    frozen = frozen_copy(network)
    # An example batch of 1 would be baked into the graph, so a dynamic batch is traced with 2.
    example = torch.zeros(2 if batch is None else batch, *image_shape)
    with _quiet(), _translated("network"):
        program = torch.onnx.export(
            frozen,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},) if batch is None else None,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            opset_version=opset,
            verbose=False,
        )
        assert program is not None
        model = program.model_proto
    return _finish(model, path, batch, metadata, f"torch {torch.__version__} dynamo", started)


def export_skeleton(
    network: nn.Module, path: Path, *, image_shape: tuple[int, int, int], batch: int, opset: int
) -> ExportRecord:
    """Write `network` as a file that is only timed: the operators of `export_onnx`, in a tenth of a second.

    Uses torch's TorchScript exporter, which is deprecated for shipping; `tests/deploy` holds it to the same
    operators. Raises as `export_onnx` does.
    """
    import onnx
    import torch

    _check_opset(opset)
    started = time.perf_counter()
    frozen = frozen_copy(network)
    with _quiet(), _translated("network"), tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "skeleton.onnx"
        torch.onnx.export(
            frozen,
            (torch.zeros(batch, *image_shape),),
            draft,
            dynamo=False,
            input_names=[INPUT_NAME],
            output_names=[OUTPUT_NAME],
            opset_version=min(opset, NEWEST_SCRIPT_OPSET),
        )
        model = onnx.load_model(draft)
    return _finish(model, path, batch, {}, f"torch {torch.__version__} torchscript", started)


def _check_opset(opset: int) -> None:
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if not OLDEST_OPSET <= opset <= newest:
        raise ExportError(f"opset {opset} was asked for; this installation writes {OLDEST_OPSET} to {newest}")


def frozen_copy(network: nn.Module) -> nn.Module:
    """A copy on the CPU, in evaluation mode and torch's plain memory layout."""
    import torch

    frozen = copy.deepcopy(network).to("cpu").eval()
    return frozen.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload,no-any-return]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters' warnings and log lines about themselves."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in _ABOUT_THEMSELVES:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """Turn whatever a third-party exporter or checker raises into an ExportError with its first line."""
    try:
        yield
    except Exception as failure:
        reason = (str(failure).strip().splitlines() or [type(failure).__name__])[0]
        raise ExportError(f"the {what} cannot be written as ONNX: {reason}") from failure


def _finish(
    model: ModelProto,
    path: Path,
    batch: int | None,
    metadata: Mapping[str, str],
    exporter: str,
    started: float,
) -> ExportRecord:
    import onnx

    clean(model)
    # what the opset asks for, not what this onnx writes: a device's runtime may be older
    model.ir_version = onnx.helper.find_min_ir_version_for(model.opset_import, ignore_unknown=True)
    onnx.helper.set_model_props(model, dict(sorted(metadata.items())))
    _refuse_unfolded(model.graph)
    with _translated("exported graph"):
        onnx.checker.check_model(model, full_check=True)
    with replacing(path) as draft:
        draft.write_bytes(model.SerializeToString(deterministic=True))
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return ExportRecord(
        sha256=sha256_file(path),
        bytes=path.stat().st_size,
        batch=batch,
        opset=opset,
        ir_version=model.ir_version,
        exporter=exporter,
        seconds=time.perf_counter() - started,
    )


def _refuse_unfolded(graph: GraphProto) -> None:
    convolved = {name for node in graph.node if node.op_type == "Conv" for name in node.output}
    for node in graph.node:
        if node.op_type == "BatchNormalization" and node.input[0] in convolved:
            raise ExportError(
                f"batch norm '{node.name}' was not folded into its convolution, so the file is slower than "
                "it has to be; install the versions that constraints.txt pins"
            )
