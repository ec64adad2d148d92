from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from pipeline.devices import profile
from pipeline.devices.hardware import usable_cores
from pipeline.devices.profile import DeviceProfile, canonical_provider, load_profile
from pipeline.errors import ProfileError

SHIPPED = Path(__file__).parents[2] / "profiles"
ONE_TIER = "tiers: [{name: a, limits: {latency: 1 ms}}]\n"


@pytest.fixture
def write(tmp_path: Path):  # type: ignore[no-untyped-def]
    def write(text: str) -> Path:
        path = tmp_path / "board.yaml"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize("name", ["cpu-1thread", "cpu", "cuda", "params", "raspberry-pi-5"])
def test_shipped_profiles_load_by_name_and_by_path(name: str) -> None:
    profile = load_profile(name, SHIPPED)
    assert profile == load_profile(SHIPPED / f"{name}.yaml")
    assert profile.name == name
    assert profile.measures_latency == (name != "params")
    assert [tier.key for tier in profile.tiers_of()] == [f"{name}/{tier.name}" for tier in profile.tiers]


def test_a_name_is_looked_for_here_and_then_among_those_that_come_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_profile("cpu-1thread") == load_profile("cpu-1thread", SHIPPED)
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "cpu-1thread.yaml").write_text("batch: 3\n" + ONE_TIER)
    (tmp_path / "profiles" / "my-board.yaml").write_text(ONE_TIER)
    assert load_profile("cpu-1thread").batch == 3
    with pytest.raises(
        ProfileError, match=r"no profile 'phone': .*: cpu, cpu-1thread, cuda, my-board, params"
    ):
        load_profile("phone")


def test_installed_without_a_checkout_they_lie_among_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "__file__", str(tmp_path / "site" / "pipeline" / "devices" / "profile.py"))
    monkeypatch.setattr(profile.sysconfig, "get_path", lambda name: str(tmp_path / name))
    assert profile.shipped_profiles() == tmp_path / "data" / "share" / "budgetline" / "profiles"
    told = tomllib.loads((SHIPPED.parent / "pyproject.toml").read_text())["tool"]["setuptools"]["data-files"]
    assert told == {"share/budgetline/profiles": ["profiles/*.yaml"]}


def test_tiers_keep_the_order_and_the_limits_of_the_file(write) -> None:  # type: ignore[no-untyped-def]
    profile = load_profile(
        write(
            "tiers:\n- {name: s, limits: {latency: 25 %, params: 300 k}}\n- {name: l, limits: {latency: 2ms}}"
        )
    )
    small, large = profile.tiers_of()
    assert [(x.metric, x.value, x.relative) for x in small.limits] == [
        ("latency_ms", 0.25, True),
        ("params", 300_000, False),
    ]
    assert large.budgets == {"latency_ms": 2.0}
    assert profile.limits("params") and not profile.limits("flops")


def test_all_cores_are_counted_when_they_are_asked_for(write) -> None:  # type: ignore[no-untyped-def]
    profile = load_profile(write("threads: null\n" + ONE_TIER))
    assert profile.runtime().threads == len(usable_cores())
    assert profile.fingerprint()["threads"] == len(usable_cores())


def test_the_fingerprint_holds_what_decides_a_latency(write) -> None:  # type: ignore[no-untyped-def]
    plain = load_profile(write(ONE_TIER)).fingerprint()
    assert load_profile(write("description: x\nlane: 8\nname: y\n" + ONE_TIER)).fingerprint() == plain
    for changed in ("spinning: false", "batch: 2", "provider: cuda", "threads: null"):
        same = changed == "threads: null" and len(usable_cores()) == 1
        assert (load_profile(write(f"{changed}\n{ONE_TIER}")).fingerprint() == plain) == same, changed


def test_other_tiers_on_the_same_device() -> None:
    cpu = load_profile("cpu-1thread", SHIPPED)
    other = cpu.with_tiers({"tiny": {"latency": "0.1 ms"}})
    assert [tier.key for tier in other.tiers_of()] == ["cpu-1thread/tiny"]
    assert other.fingerprint() == cpu.fingerprint()
    assert load_profile("params", SHIPPED).with_tiers({"a": {"params": "9 k"}}).provider == "none"
    with pytest.raises(ProfileError, match="unit is missing"):
        cpu.with_tiers({"tiny": {"latency": "0.1"}})


def test_provider_names() -> None:
    assert canonical_provider("CUDA") == "CUDAExecutionProvider"
    assert canonical_provider("tensorrtexecutionprovider") == "TensorrtExecutionProvider"
    assert canonical_provider("VitisAIExecutionProvider") == "VitisAIExecutionProvider"
    with pytest.raises(ValueError, match="did you mean 'cuda'"):
        canonical_provider("cuad")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not a profile"),
        ("- 1", "is not a profile"),
        ("tiers: [", "line 1"),
        ("name: b", "'tiers' is missing"),
        ("tiers: []", "tiers"),
        ("thread: 1\n" + ONE_TIER, "did you mean 'threads'"),
        ("threads: 0\n" + ONE_TIER, "'threads' is 0"),
        ("batch: 0\n" + ONE_TIER, "'batch' is 0"),
        ("precision: int4\n" + ONE_TIER, "'precision' is 'int4'"),
        ("precision: fp16\n" + ONE_TIER, "'precision: fp16' is for GPUs"),
        ("int8: {calibration_images: 9}\n" + ONE_TIER, "'int8' has no effect unless 'precision' is int8"),
        ("precision: int8\nint8: {images: 9}\n" + ONE_TIER, "unknown key 'int8.images'"),
        ("precision: int8\nint8: {max_accuracy_drop: -1}\n" + ONE_TIER, "'int8.max_accuracy_drop' is -1"),
        (
            "provider: none\nprecision: int8\ntiers: [{name: a, limits: {params: 1 k}}]",
            "'precision: int8' has no effect without a provider",
        ),
        ("operations: []\n" + ONE_TIER, "at least one operation"),
        ("provider_options: {a: 1}\n" + ONE_TIER, "'provider_options' has no effect"),
        ("name: search\n" + ONE_TIER, "stage's folder"),
        ("name: ../x\n" + ONE_TIER, "becomes a folder"),
        ("provider: none\n" + ONE_TIER, "limits 'latency' but 'provider' is none"),
        ("provider: none\nthreads: 2\ntiers: [{name: a, limits: {params: 1 k}}]", "'threads' has no effect"),
        ("tiers: [{name: a, limits: {}}]", "tiers[0] ('a') has no limits"),
        ("tiers: [{name: a, limits: {latency: 0.6}}]", "unit is missing"),
        ("tiers: [{name: a, limits: {latency: -1 ms}}]", "above zero"),
        ("tiers: [{name: a, limits: {latancy: 1 ms}}]", "did you mean 'latency'"),
        ("tiers: [{name: a/b, limits: {latency: 1 ms}}]", "becomes a folder"),
        ("tiers: [{name: a., limits: {latency: 1 ms}}]", "becomes a folder"),
        ("tiers: [{name: a, limits: {latency: 1 ms, latency: 2 ms}}]", "key 'latency' is there twice"),
        (
            "tiers: [{name: a, limits: {latency: 1 ms}}, {name: A, limits: {latency: 2 ms}}]",
            "'a' and 'A' have the same name",
        ),
        (
            "tiers: [{name: a, limits: {latency: 1 ms}}, {name: b, limits: {latency: 1000 us}}]",
            "'a' and 'b' have the same limits",
        ),
        ("name: !!python/object/apply:os.getcwd []\n" + ONE_TIER, "could not determine a constructor"),
    ],
)
def test_a_bad_profile_names_the_file_and_what_is_wrong(write, text: str, said: str) -> None:  # type: ignore[no-untyped-def]
    path = write(text)
    with pytest.raises(ProfileError) as failure:
        load_profile(path)
    assert str(failure.value).startswith(f"{path}: ")
    assert said in str(failure.value)


def test_an_unknown_name_lists_the_profiles_there_are() -> None:
    with pytest.raises(ProfileError, match="cpu, cpu-1thread, cuda, params, raspberry-pi-5"):
        load_profile("cpux", SHIPPED)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProfileError, match="UTF-8"):
        load_profile(tmp_path / "p.yaml")


def test_a_profile_without_a_device_has_nothing_to_run_on() -> None:
    profile = DeviceProfile.model_validate(
        {"name": "x", "provider": "none", "tiers": [{"name": "a", "limits": {"params": "1 k"}}]}
    )
    assert profile.fingerprint() == {"provider": "none"}
    with pytest.raises(ProfileError, match="no device"):
        profile.runtime()


def test_int8_changes_what_ships_and_not_what_is_searched(write) -> None:  # type: ignore[no-untyped-def]
    plain = load_profile(write(ONE_TIER))
    int8 = load_profile(write("precision: int8\n" + ONE_TIER))
    assert int8.fingerprint() == plain.fingerprint() and int8.timed_precision == "fp32"
    assert (int8.int8.max_accuracy_drop, int8.int8.calibration_images) == (1.0, 512)
    half = load_profile(write("provider: cuda\nprecision: fp16\n" + ONE_TIER))
    assert half.runtime().precision == half.timed_precision == "fp16"
    assert half.fingerprint() != load_profile(write("provider: cuda\n" + ONE_TIER)).fingerprint()


def test_a_profile_without_int8_is_written_as_before_there_was_any(write) -> None:  # type: ignore[no-untyped-def]
    plain = load_profile(write(ONE_TIER)).model_dump(mode="json")
    assert "int8" not in plain and plain["precision"] == "fp32"
    int8 = load_profile(write("precision: int8\nint8: {max_accuracy_drop: 2}\n" + ONE_TIER))
    assert int8.model_dump(mode="json")["int8"] == {"max_accuracy_drop": 2.0, "calibration_images": 512}
    assert DeviceProfile.model_validate(int8.model_dump(mode="json", exclude_unset=True)) == int8
