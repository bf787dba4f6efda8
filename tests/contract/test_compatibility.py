"""Every public method of the SDK, found by looking at its classes, exercised against a real server.

`make compat` writes what this finds to docs/compatibility.md; the committed page must say the same.
"""

import asyncio
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import tinker
from tinker.lib.public_interfaces import APIFuture

from tests.contract import compatibility_page as page
from tests.contract.cli_cases import NOTES
from tests.contract.sdk_cases import CLASSES, Case, Walked, World
from tinsmith.demo import tiny_folder
from tinsmith.demo.local_server import LocalServer

pytestmark = [pytest.mark.xdist_group("server"), pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def world(server: LocalServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    (folder / "tiny").symlink_to(tiny_folder())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where the SDK looks for a tokenizer by the model's name
        patch.setenv("TINKER_BASE_URL", server.base_url)
        world = World(server.base_url)
        yield world
        world.service.close("success").result()


def public_methods(kind: type) -> list[str]:
    """The names of a class's methods and properties, also inherited ones."""
    return [
        name
        for name, value in inspect.getmembers(kind)
        if not name.startswith("_") and (callable(value) or isinstance(value, property))
    ]


def base_name(method: str) -> str:
    return method.removesuffix("_async")


METHODS = [(walked, method) for walked in CLASSES for method in public_methods(walked.kind)]


def resolved(value: Any) -> Any:
    """What a method's result stands for, once it is there."""
    while True:
        if inspect.isawaitable(value) and not isinstance(value, APIFuture):
            value = asyncio.run(_awaited(value))
        elif isinstance(value, APIFuture):
            value = value.result(60)
        else:
            return value


async def _awaited(value: Any) -> Any:
    return await value


def exercise(walked: Walked, method: str, case: Case, world: World) -> None:
    """Calls the method. Raises if it fails, or returns something wrong."""
    subject = case.fresh(world) if case.fresh else walked.subject(world)
    arguments = case.arguments(world)
    member = getattr(subject, method)
    value = member(*arguments, **case.keywords) if callable(member) else member
    result = value if base_name(method) == "future" else resolved(value)
    assert case.check(result, world), f"{walked.kind.__name__}.{method} returned {result!r}"


@pytest.mark.parametrize(
    ("walked", "method"), METHODS, ids=[f"{walked.kind.__name__}.{method}" for walked, method in METHODS]
)
def test_every_public_method_works(walked: Walked, method: str, world: World) -> None:
    case = walked.cases.get(base_name(method))
    assert case is not None, f"tests/contract/sdk_cases.py has no exercise for {walked.kind.__name__}.{method}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # half of the SDK is deprecated by its other half
        warnings.simplefilter("ignore", tinker.ExperimentalWarning)
        exercise(walked, method, case, world)


def rows() -> list[page.Row]:
    """What the walk has found, or would fail to find."""
    found = []
    for walked in CLASSES:
        names = public_methods(walked.kind)
        for name in dict.fromkeys(map(base_name, names)):
            forms = [form for form, there in (("sync", name in names), ("async", f"{name}_async" in names)) if there]
            case = walked.cases[name]
            outcome = "in the client" if case.local else "works"
            found.append(page.Row(walked.kind.__name__, name, ", ".join(forms), outcome, case.note))
    return found


def test_the_committed_page_says_what_the_walk_finds() -> None:
    made = page.methods(rows()) + "\n" + page.commands(NOTES) + "\n"
    committed, versions = page.read()
    if page.WRITES:
        page.write(made, versions)
    else:
        assert committed == made, f"run `make compat`, and commit docs/{page.PAGE.name}"


def test_no_exercise_is_left_over() -> None:
    for walked in CLASSES:
        known = {base_name(name) for name in public_methods(walked.kind)}
        assert set(walked.cases) <= known, walked.kind
