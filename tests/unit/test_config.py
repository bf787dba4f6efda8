"""Settings: where they come from, what is refused, and how they travel to a child process."""

from dataclasses import fields
from pathlib import Path

import pytest

from tinsmith.config import CHOICES, RANGES, Settings, describe, engine_environment, is_loopback, load_settings
from tinsmith.errors import ConfigError


def write(folder: Path, text: str) -> Path:
    path = folder / "tinsmith.toml"
    path.write_text(text)
    return path


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, 'port = 1\nmax_lora_rank = 8\ndtype = "float32"\n')
    environment = {"TINSMITH_PORT": "2", "TINSMITH_MAX_LORA_RANK": "16", "HOME": "/"}
    settings = load_settings(file, environment, {"port": 3})
    assert (settings.port, settings.max_lora_rank, settings.dtype) == (3, 16, "float32")


def test_without_any_source_the_defaults_hold() -> None:
    assert load_settings() == Settings()


def test_unknown_names_are_refused_with_the_allowed_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'prot'.*allowed:.* port"):
        load_settings(write(tmp_path, "prot = 1"))
    with pytest.raises(ConfigError, match=r"'TINSMITH_PROT'.*TINSMITH_PORT"):
        load_settings(None, {"TINSMITH_PROT": "1"})


def test_the_test_suites_own_variables_are_no_settings() -> None:
    assert load_settings(None, {"TINSMITH_TEST_ANYTHING": "1"}) == Settings()


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("port", "eighty", "whole number"),
        ("port", 1.5, "whole number"),
        ("port", True, "whole number"),
        ("port", 65536, "0 to 65535"),
        ("port", -1, "0 to 65535"),
        ("max_lora_rank", 0, "1 to"),
        ("poll_seconds", 60, "0.1 to 40"),
        ("poll_seconds", "nan", "0.1 to 40"),
        ("future_hours", "long", "a number"),
        ("no_auth", "perhaps", "true or false"),
        ("models", 7, "list"),
        ("models", [""], "empty"),
        ("memory_fraction", 1.5, "0.0 to 1.0"),
        ("memory_shares", ["a=much"], "a number"),
        ("memory_shares", {"a": 0.7, "b": 0.4}, "a=0.7, b=0.4"),
        ("memory_shares", ["a=0"], "above 0"),
        ("device", "tpu", "auto, cpu, cuda"),
        ("dtype", "fp8", "float32, bfloat16"),
        ("log", "loud", "debug, info"),
        ("aliases", "just-a-name", "NAME=MODEL"),
        ("aliases", ["=tiny"], "NAME=MODEL"),
        ("aliases", {"a": 1}, "text"),
        ("api_keys", 5, "list"),
        ("api_keys", ["secret-key"], "tml-"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_allowed(name: str, value: object, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_settings(None, {}, {name: value})


def test_every_choice_and_range_is_of_a_setting_and_contains_its_default() -> None:
    defaults = {f.name: getattr(Settings(), f.name) for f in fields(Settings)}
    assert all(defaults[name] in allowed for name, allowed in CHOICES.items())
    assert all(low <= defaults[name] <= high for name, (low, high) in RANGES.items())


def test_lists_and_tables_can_be_given_in_all_three_places(tmp_path: Path) -> None:
    file = write(tmp_path, 'api_keys = ["tml-a", "tml-b"]\n[aliases]\n"Qwen/Qwen3-8B" = "tiny"\n')
    assert load_settings(file).api_keys == ("tml-a", "tml-b")
    assert load_settings(file).aliases == {"Qwen/Qwen3-8B": "tiny"}
    variables = {"TINSMITH_API_KEYS": "tml-a, tml-b", "TINSMITH_ALIASES": "x=tiny,*=tiny"}
    assert load_settings(None, variables).api_keys == ("tml-a", "tml-b")
    assert load_settings(None, variables).aliases == {"x": "tiny", "*": "tiny"}
    assert load_settings(None, {}, {"aliases": ["x=tiny"]}).aliases == {"x": "tiny"}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "server.example", "127.0.0.1.example"])
def test_an_address_that_others_can_reach_is_no_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_an_address_of_this_machine_only_is_loopback(host: str) -> None:
    assert is_loopback(host)


def test_keys_and_an_open_door_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="exclude"):
        load_settings(None, {}, {"api_keys": ["tml-x"], "no_auth": True})


def test_settings_travel_to_a_child_process_unchanged() -> None:
    settings = load_settings(
        None,
        {},
        {"aliases": ["*=tiny"], "api_keys": ["tml-x"], "data_dir": Path("/data"), "memory_shares": ["tiny=0.5"]},
    )
    assert Settings.from_json(settings.to_json()) == settings
    assert "\n" not in settings.to_json()


def test_printed_settings_hide_keys_and_passwords() -> None:
    url = "postgresql://me:s3cret@db:5432/tinsmith"
    rows = dict(describe(load_settings(None, {}, {"api_keys": ["tml-abcdefgh"], "database_url": url})))
    assert set(rows) == {f.name for f in fields(Settings)}
    assert "abcdefgh" not in rows["api_keys"]
    assert rows["database_url"] == "postgresql://me:***@db:5432/tinsmith"


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.toml"):
        load_settings(tmp_path / "nothing.toml")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load_settings(write(tmp_path, "port ="))


def test_the_database_lies_in_the_data_folder_unless_a_url_is_given() -> None:
    assert load_settings(None, {}, {"data_dir": "/data"}).effective_database_url == "sqlite:////data/tinsmith.db"
    url = "postgresql://db/tinsmith"
    assert load_settings(None, {}, {"database_url": url}).effective_database_url == url


def test_every_setting_is_explained_in_the_how_to() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how-to.md").read_text()
    assert [f.name for f in fields(Settings) if f"`{f.name}`" not in page] == []


def test_an_engine_finds_what_its_libraries_read_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    environment = engine_environment(Settings(deterministic=True))
    assert (environment["OMP_WAIT_POLICY"], environment["CUBLAS_WORKSPACE_CONFIG"]) == ("PASSIVE", ":16:8")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    assert engine_environment(Settings(deterministic=True))["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert "CUBLAS_WORKSPACE_CONFIG" not in engine_environment(Settings())
    assert environment["PATH"]
