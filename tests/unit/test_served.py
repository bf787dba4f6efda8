"""Which base models a server serves, and under which names."""

from pathlib import Path

import pytest

from tinsmith.config import load_settings
from tinsmith.errors import ConfigError
from tinsmith.served import Served, base_of, choose_served, find_served, shares_by_name

REGISTERED = (
    Served("small", "/models/small", folder="/models/small", dtype="bfloat16", max_context=512),
    Served("Qwen/Qwen3-4B", "Qwen/Qwen3-4B", folder="/cache/qwen"),
)


def choose(**settings: object) -> tuple[Served, ...]:
    return choose_served(load_settings(None, {}, settings), REGISTERED)


def test_without_a_name_all_registered_models_are_served_and_without_those_the_embedded_one() -> None:
    assert [model.name for model in choose()] == ["small", "Qwen/Qwen3-4B"]
    assert [model.base for model in choose_served(load_settings(), ())] == ["tiny"]


def test_a_name_is_a_registered_one_else_a_folder_else_one_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model", "small", "tiny"):
        (tmp_path / name).mkdir()
    bases = {model.name: model.base for model in choose(models=["small", "model", "tiny", "Qwen/Qwen3-0.6B"])}
    assert bases == {
        "small": "/models/small",
        "model": str(tmp_path / "model"),
        "tiny": "tiny",
        "Qwen/Qwen3-0.6B": "Qwen/Qwen3-0.6B",
    }
    assert base_of("model") == base_of(str(tmp_path / "." / "model")) == str(tmp_path / "model")


def test_what_the_server_is_told_goes_before_what_a_model_was_registered_with() -> None:
    [own] = choose(models=["small"])
    assert (own.dtype, own.max_context, own.neighbours) == ("bfloat16", 512, 0)
    told = choose(dtype="float32", max_context=64)
    assert [(model.dtype, model.max_context, model.neighbours) for model in told] == [("float32", 64, 1)] * 2


def test_the_same_model_cannot_be_served_twice(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match=r"name it once"):
        choose(models=["tiny", "tiny"])
    with pytest.raises(ConfigError, match=r"'.*model', '.*model' are the same model"):
        choose(models=[str(tmp_path / "model"), str(tmp_path / "." / "model")])


def test_an_alias_or_a_share_must_name_a_served_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a=other.*serves 'tiny'.*write a=tiny"):
        choose(models=["tiny"], aliases=["a=other"])
    with pytest.raises(ConfigError, match=r"'other'.*serves 'small', 'Qwen/Qwen3-4B'"):
        choose(memory_shares={"other": 0.5})
    (tmp_path / "model").mkdir()
    for target in (str(tmp_path / "model"), str(tmp_path / "." / "model")):
        [served] = choose(models=[str(tmp_path / "model")], aliases=[f"a={target}"], memory_shares={target: 0.5})
        assert find_served([served], target) is served


def test_shares_of_memory_belong_to_models() -> None:
    settings = load_settings(None, {}, {"memory_shares": ["/models/small=0.25"]})
    assert shares_by_name(settings, choose_served(settings, REGISTERED)) == {"small": 0.25}


def test_every_base_model_has_a_folder_name_of_its_own() -> None:
    bases = ["tiny", "/a/tiny", "/b/tiny", "Qwen/Qwen3-4B", "Qwen3-4B", "/models/ö x", "/" + "long" * 99]
    slugs = [Served("name", base).slug for base in bases]
    assert len(set(slugs)) == len(slugs)
    assert slugs[0] == "tiny"
    assert all(slug.isascii() and "/" not in slug and len(slug) < 100 for slug in slugs)
