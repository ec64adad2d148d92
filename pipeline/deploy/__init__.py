"""From a trained module to an ONNX file that is proven to compute the same."""

from pipeline.deploy.export import ExportRecord, export_onnx, export_skeleton
from pipeline.deploy.parity import ParityRecord, check_logits, check_parity, onnx_accuracy

__all__ = [
    "ExportRecord",
    "ParityRecord",
    "check_logits",
    "check_parity",
    "export_onnx",
    "export_skeleton",
    "onnx_accuracy",
]
