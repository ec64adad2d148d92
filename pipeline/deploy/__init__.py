"""From a trained module to ONNX files that are proven to compute the same, or nearly so in fewer bits."""

from pipeline.deploy.answer import Answer, choose
from pipeline.deploy.export import ExportRecord, export_onnx, export_skeleton
from pipeline.deploy.parity import Gate, ParityRecord, check_logits, check_parity, onnx_accuracy
from pipeline.deploy.quantize import (
    FLOAT16_GATE,
    NO_GATE,
    Int8Record,
    fix_batch,
    probe,
    quantise_int8,
    to_float16,
)

__all__ = [
    "FLOAT16_GATE",
    "NO_GATE",
    "Answer",
    "ExportRecord",
    "Gate",
    "Int8Record",
    "ParityRecord",
    "check_logits",
    "check_parity",
    "choose",
    "export_onnx",
    "export_skeleton",
    "fix_batch",
    "onnx_accuracy",
    "probe",
    "quantise_int8",
    "to_float16",
]
