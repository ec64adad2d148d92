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


def test_a_truth_value_is_no_number() -> None:
    """YAML reads yes and on for one, and 1 is what would become of it."""

    class Switched(Outer):
        switch: bool | int = 0

    for values in ({"steps": True}, {"steps": 1, "inner": {"rate": False}}):
        with pytest.raises(ConfigError, match="is (true|false); expected anything else"):
            parse_settings(Outer, values, "a.yaml")
    assert parse_settings(Switched, {"steps": 1, "switch": True}, "a.yaml").switch is True


def test_what_came_later_is_written_where_it_is_not_as_it_comes() -> None:
    class Grown(Outer):
        later = frozenset({"extra"})
        extra: int = 3

    assert Grown(steps=1).model_dump() == Outer(steps=1).model_dump()
    assert Grown(steps=1, extra=4).model_dump(exclude={"steps"})["extra"] == 4
    assert parse_settings(Grown, {"steps": 1, "extra": 3}, "a.yaml") == Grown(steps=1)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Inner().rate = 2.0  # type: ignore[misc]


def test_pick_lists_what_there_is() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown method 'randm' \(did you mean 'random'\?\); there are: asng, random"
    ):
        pick({"random": 1, "asng": 2}, "randm", "method")
