"""A run folder with tiny real ONNX files (a linear layer each), and a manifest over them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.artifacts import sha256_file, write_arrays, write_bytes
from pipeline.report.manifest import build_manifest, file_entry, tier_entry
from pipeline.types import Arch, Json, LatencyRecord, Limit, Tier

TIERS = {
    # name: (latency budget, latency, params, flops, architecture accuracy, test accuracy)
    "S": (0.15, 0.146, 62_410, 3_210_000, 0.9071, 0.9030),
    "M": (0.30, 0.281, 160_330, 9_180_000, 0.9172, 0.9143),
    "L": (0.60, 0.573, 411_020, 23_100_000, 0.9260, 0.9231),
}
CLASSES, IMAGE_SHAPE = 3, (1, 2, 2)


def linear_onnx(weights_FC: Any, batch: int | str) -> bytes:
    """`logits = flatten(images) @ weights` as a serialised model."""
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["images"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["logits"]),
        ],
        "linear",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, *IMAGE_SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, CLASSES])],
        [numpy_helper.from_array(weights_FC, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    content: bytes = model.SerializeToString(deterministic=True)
    return content


def latency_record(latency_ms: float, sha256: str) -> LatencyRecord:
    return LatencyRecord(
        latency_ms=latency_ms,
        p50_ms=latency_ms * 1.004,
        p95_ms=latency_ms * 1.06,
        spread=0.012,
        runs=600,
        rounds=6,
        discarded_rounds=1,
        first_run_ms=latency_ms * 9,
        drift=1.008,
        sha256=sha256,
        context={"provider": "CPUExecutionProvider", "threads": 1, "spinning": True, "cpu": "Example CPU"},
    )


def write_tier(run: Path, name: str, device: str = "cpu-1thread") -> Json:
    """A tier's files under `run`, and its entry."""
    budget_ms, latency_ms, params, flops, architecture, test = TIERS[name]
    rng = np.random.default_rng(sorted(TIERS).index(name))
    weights_FC = rng.normal(size=(4, CLASSES)).astype(np.float32)
    images = rng.normal(size=(5, *IMAGE_SHAPE)).astype(np.float32)
    folder = run / device / name
    write_bytes(folder / "model.onnx", linear_onnx(weights_FC, "batch"))
    write_bytes(folder / "model.batch1.onnx", linear_onnx(weights_FC, 1))
    write_bytes(folder / "weights.safetensors", weights_FC.tobytes())
    write_arrays(folder / "samples.npz", {"images": images, "logits": images.reshape(5, 4) @ weights_FC})
    parity = {"max_abs_error": 1.9e-6, "max_rel_error": 4e-7, "top1_agreement": 1.0, "images": 1000}
    timed = latency_record(latency_ms, sha256_file(folder / "model.batch1.onnx"))
    accuracy = {"architecture": architecture, "test": test}
    files = [
        file_entry(run, folder / "model.onnx", "onnx", parity=parity, accuracy=accuracy),
        file_entry(
            run, folder / "model.batch1.onnx", "onnx-batch1", latency=timed, parity=parity, accuracy=accuracy
        ),
        file_entry(run, folder / "weights.safetensors", "weights"),
        file_entry(run, folder / "samples.npz", "samples"),
    ]
    stated = f"{budget_ms:g} ms"
    limits = (Limit("latency_ms", budget_ms, False, stated), Limit("params", 500_000.0, False, "50 %"))
    return tier_entry(
        Tier(device, name, limits),
        Arch("mbconv", (1, 0, 2, 1)),
        description={"stem": 16, "stages": [{"operation": "k5e3", "depth": 2, "width": 32}], "head": 128},
        measured={"latency_ms": latency_ms, "params": params, "flops": flops, "weight_bytes": 4 * params},
        predicted={"latency_ms": latency_ms * 0.98, "params": params},
        accuracy=accuracy,
        training={"epochs": 30, "best_epoch": 27, "seconds": 251.5, "recipe": {"learning_rate": 0.05}},
        files=files,
        answer=f"{device}/{name}/model.batch1.onnx",
    )


def ranking() -> Json:
    rng = np.random.default_rng(7)
    points = [
        {
            "device": "cpu-1thread",
            "name": name,
            "loss": float(1.2 - 0.2 * i + 0.1 * z),
            "accuracy": 0.8 + 0.04 * i,
        }
        for i, name in enumerate(TIERS)
        for z in rng.normal(size=4)
    ]
    tiers = [{"device": "cpu-1thread", "name": name, "spearman": None, "n": 4} for name in TIERS]
    return {
        "spearman": 0.71,
        "n": len(points),
        "tiers": tiers,
        "trusted": True,
        "note": "Candidates were re-scored by loss.",
        "points": points,
    }


def trace(iterations: int = 60) -> list[Json]:
    """Warm-up records, then records of a search that settles."""
    warm = [{"iteration": i, "stage": "warm_up", "fit_loss": 2.3 - 0.02 * i} for i in range(20)]
    records = []
    for i in range(iterations):
        tiers = [
            {
                "tier": f"cpu-1thread/{name}",
                "usage": 0.95 + 0.4 * (k - 1) * np.exp(-i / 15),
                "loss": 1.0 - 0.2 * k + 0.8 * np.exp(-i / 40),
                "entropy": 0.98 * np.exp(-i / (30 + 8 * k)),
                "effective_sample_size": 12 - 8 * (1 - np.exp(-i / 20)) + k,
            }
            for k, name in enumerate(TIERS)
        ]
        records.append(
            {"iteration": 20 + i, "stage": "search", "fit_loss": 1.1 + 0.8 * np.exp(-i / 40), "tiers": tiers}
        )
    return [*warm, *records]


def sample_records(run: Path) -> Json:
    """The arguments of `build_manifest` for three tiers of one device, their files written under `run`."""
    return {
        "run": "fashion <demo>",
        "created": datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC),
        "search": {
            "method": "importance",
            "seed": 0,
            "evaluations": 4800,
            "seconds": 812.25,
            "settings": {"delta": 0.3},
            "ranking": ranking(),
        },
        "data": {
            "name": "fashion-mnist",
            "fingerprint": "5f" * 32,
            "classes": ["bag", "boot", "shirt"],
            "image_shape": IMAGE_SHAPE,
            "channel_order": "grey",
            "preparation": "taken as it is",
            "augmentation": {"flip": True, "crop_padding": 2},
            "mean": [0.286],
            "std": [0.353],
            "splits": {"weights": 50000, "architecture": 10000, "test": 10000},
        },
        "space": {"name": "mbconv", "settings": {"size": "small"}, "architectures": 35000},
        "profiles": {
            "cpu-1thread": {
                "provider": "CPUExecutionProvider",
                "provider_options": {},
                "threads": 1,
                "spinning": True,
                "batch": 1,
                "precision": "fp32",
            }
        },
        "costs": {"cpu-1thread": {"source": "predictor over 30 measured networks", "error": {"mape": 0.019}}},
        "stages": {"profile": 61.0, "search": 812.25, "derive": 20.0, "retrain": 900.5, "measure": 14.0},
        "versions": {"budgetline": "0.1.0", "onnxruntime": "1.31.1", "torch": "2.12.1"},
        "environment": {"cpu": "Example CPU", "cores": 2, "os": "Linux"},
        "tiers": [write_tier(run, name) for name in TIERS],
    }


def sample_manifest(run: Path) -> Json:
    return build_manifest(**sample_records(run))
