import pytest

from pipeline.errors import ConfigError, ProfileError
from pipeline.settings import Settings, parse_settings, pick


class Inner(Settings):
    rate: float = 0.1


class Outer(Settings):
    steps: int
    inner: Inner = Inner()
    maybe: Inner | None = None


def test_unknown_keys_list_the_valid_ones_and_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"a\.yaml: unknown key 'stepps' \(did you mean 'steps'\?\); valid keys: "
    ):
        parse_settings(Outer, {"steps": 1, "stepps": 2}, "a.yaml")


@pytest.mark.parametrize("section", ["inner", "maybe"])
def test_unknown_keys_of_a_section_list_that_sections_keys(section: str) -> None:
    with pytest.raises(ConfigError, match=rf"unknown key '{section}\.ratte' .*valid keys: rate$"):
        parse_settings(Outer, {"steps": 1, section: {"ratte": 1}}, "a.yaml")


def test_missing_and_wrong_values_name_the_field() -> None:
    with pytest.raises(ConfigError, match="'steps' is missing"):
        parse_settings(Outer, {}, "a.yaml")
    with pytest.raises(ProfileError, match=r"'inner\.rate' is 'fast'"):
        parse_settings(Outer, {"steps": 1, "inner": {"rate": "fast"}}, "a.yaml", ProfileError)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Inner().rate = 2.0  # type: ignore[misc]


def test_pick_lists_what_there_is() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown method 'randm' \(did you mean 'random'\?\); there are: asng, random"
    ):
        pick({"random": 1, "asng": 2}, "randm", "method")
