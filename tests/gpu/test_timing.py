"""Files timed on a GPU by ONNX Runtime: on the provider asked for, bound there, repeatable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.deploy import export_onnx, fix_batch, to_float16
from pipeline.deploy.export import INPUT_NAME
from pipeline.devices.environment import doctor
from pipeline.devices.measure import measure
from pipeline.devices.session import PROVIDERS, RuntimeSettings, open_session
from pipeline.spaces.mbconv import MBConvSettings, MBConvSpace
from pipeline.train.retrain import seeded

SPACE = MBConvSpace((3, 32, 32), 10, MBConvSettings(size="small"))
HALF_ERROR = 0.1


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The smallest and the largest network for any batch and for one image, and the largest in float16."""
    folder, made = tmp_path_factory.mktemp("networks"), {}
    for name, arch in (("small", SPACE.smallest), ("large", SPACE.largest)):
        with seeded(0):
            network = SPACE.build(arch).eval()
        made[name] = folder / f"{name}.onnx"
        export_onnx(network, made[name], image_shape=SPACE.image_shape, batch=None, opset=20, metadata={})
        made[f"{name}-1"] = folder / f"{name}-1.onnx"
        fix_batch(made[name], made[f"{name}-1"], 1)
    made["half"] = folder / "half.onnx"
    to_float16(made["large"], made["half"])
    return made


def runtime(provider: str, batch: int = 1, precision: str = "fp32") -> RuntimeSettings:
    return RuntimeSettings(provider=PROVIDERS[provider], batch=batch, precision=precision)


def test_doctor_says_that_it_opens(provider: str) -> None:
    assert any(
        PROVIDERS[provider] in check.name + check.message and check.status == "ok" for check in doctor()
    )


def test_logits_are_the_cpus(provider: str, files: dict[str, Path]) -> None:
    images = np.random.default_rng(0).standard_normal((7, 3, 32, 32)).astype(np.float32)
    feeds = {INPUT_NAME: images}
    there = open_session(files["large"], provider=PROVIDERS[provider]).run(None, feeds)[0]
    here = open_session(files["large"]).run(None, feeds)[0]
    np.testing.assert_allclose(there, here, atol=0.01 * np.abs(here).max() + 1e-3)
    half = open_session(files["half"], provider=PROVIDERS[provider]).run(None, feeds)[0]
    np.testing.assert_allclose(half, here, atol=HALF_ERROR * max(1.0, float(np.abs(here).max())))


def test_a_larger_network_takes_longer_and_both_repeat(provider: str, files: dict[str, Path]) -> None:
    models = [files["small-1"], files["large-1"]]
    twice = [measure(models, models[1], runtime(provider), max_spread=0.5) for _ in range(2)]
    for records in twice:
        small, large = (record.latency_ms for record in records)
        assert 0 < small < large < 50
        assert records[0].context["provider"] == PROVIDERS[provider]
        assert records[0].context["copies_timed"] is False
    for first, again in zip(*twice, strict=True):
        assert again.latency_ms == pytest.approx(first.latency_ms, rel=0.25)


def test_a_batch_takes_less_than_its_images_one_by_one(provider: str, files: dict[str, Path]) -> None:
    [one] = measure([files["large-1"]], None, runtime(provider), max_spread=0.5)
    [many] = measure([files["large"]], None, runtime(provider, batch=64), max_spread=0.5)
    assert many.latency_ms < 32 * one.latency_ms
    [half] = measure([files["half"]], None, runtime(provider, batch=64, precision="fp16"), max_spread=0.5)
    assert half.latency_ms < 2 * many.latency_ms
