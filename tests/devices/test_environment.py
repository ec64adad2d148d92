from __future__ import annotations

import pytest

from pipeline.devices import environment
from pipeline.devices.environment import (
    MALLOC,
    check_cores,
    check_malloc,
    check_providers,
    check_python,
    check_runtime_clash,
    check_torch_pair,
    describe_environment,
    doctor,
    is_this_machine,
    package_versions,
)
from pipeline.errors import ProviderError


def test_the_record_of_this_machine_is_complete() -> None:
    record = describe_environment()
    assert set(record) == {"python", "os", "cpu", "cores", "gpu", "packages", "load"}
    assert record["cpu"] and record["cores"]
    assert "numpy" in record["packages"]


@pytest.mark.parametrize("key", ["os", "cpu", "cores", "gpu"])
def test_this_machine_is_told_by_what_decides_its_speed(key: str) -> None:
    record = describe_environment()
    assert is_this_machine({**record, "load": 99.0, "python": "2.7"})
    assert not is_this_machine({**record, key: ["other"]})
    assert not is_this_machine({name: value for name, value in record.items() if name != key})


def test_another_runtime_is_another_machine() -> None:
    record = describe_environment()
    [runtime] = [name for name in record["packages"] if name.startswith("onnxruntime")]
    assert not is_this_machine({**record, "packages": {**record["packages"], runtime: "0.1"}})
    assert is_this_machine({**record, "packages": {**record["packages"], "torch": "0.1"}})
    assert not is_this_machine({**record, "packages": None})


def test_absent_packages_are_left_out() -> None:
    assert package_versions(("numpy", "no-such-package-at-all")).keys() == {"numpy"}


def test_doctor_checks_everything_and_says_what_to_do() -> None:
    checks = doctor()
    assert {"python", "onnxruntime", "torch", "CPUExecutionProvider", "cores", "malloc"} <= {
        c.name for c in checks
    }
    assert all(check.remedy for check in checks if check.status != "ok")
    assert next(c for c in checks if c.name == "CPUExecutionProvider").status == "ok"


def test_a_listed_provider_that_does_not_open_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: bytes, *, provider: str) -> None:
        raise ProviderError(f"{provider} does not open")

    monkeypatch.setattr(environment, "open_session", refuse)
    status = {check.name: check.status for check in check_providers()}
    assert status.pop("CPUExecutionProvider") == "fail"
    assert set(status.values()) <= {"warn"}


@pytest.mark.parametrize(
    ("installed", "status"),
    [(set(), "fail"), ({"onnxruntime", "onnxruntime-gpu"}, "fail")],
)
def test_runtimes_that_clash(installed: set[str], status: str) -> None:
    assert check_runtime_clash(installed).status == status


@pytest.mark.parametrize(
    ("torch", "torchvision", "status"),
    [
        ("2.12.1", "0.27.1", "ok"),
        ("2.11.0+cu128", "0.26.0+cu128", "ok"),
        ("2.13.0", "0.27.1", "fail"),
        ("2.12.1+cpu", "0.27.1", "warn"),
        (None, None, "warn"),
        ("2.12.1", None, "warn"),
    ],
)
def test_torch_and_torchvision_are_a_pair(torch: str | None, torchvision: str | None, status: str) -> None:
    assert check_torch_pair(torch, torchvision).status == status


def test_python_cores_and_malloc() -> None:
    assert check_python((3, 11)).status == "ok"
    assert check_python((3, 10)).status == "fail"
    assert check_cores(2, 2).status == "ok"
    assert check_cores(1, 2).status == "warn"
    assert check_malloc({}, "glibc").status == "warn"
    assert all(name in check_malloc({}, "glibc").remedy for name in MALLOC)
    assert check_malloc(MALLOC, "glibc").status == "ok"
    assert check_malloc({}, "").status == "ok"
