"""Who may import whom. Imports inside functions count; those under TYPE_CHECKING do not."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import tinsmith

ROOT = Path(tinsmith.__file__).parent

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "manifests": {"errors"},
    "age": {"errors"},
    "lost_device": set(),
    "observe": set(),
    "supervisor": set(),
    "sizing": {"errors"},
    "config": {"errors"},
    "served": {"errors", "config"},
    "model_files": {"errors", "config", "served", "demo"},
    "announce": {"config", "served"},
    "protocols": {"errors", "wire.packing", "wire.progress"},
    "wire.packing": set(),
    "wire.progress": set(),
    "wire.losses": set(),
    "wire.operators": set(),
    "wire": {"errors"},
    "store": {"errors", "wire"},
    "api": {"errors", "age", "config", "manifests", "served", "observe", "protocols", "wire", "store", "demo"},
    "engine": {"errors", "age", "lost_device", "manifests", "observe", "protocols", "wire"},
    "models": {"errors", "protocols", "sizing"},
    "training": {
        *("errors", "lost_device", "sizing", "protocols", "models", "wire.packing", "wire.losses", "wire.operators"),
    },
    "sampling": {"errors", "lost_device", "protocols", "models", "wire.packing", "wire.losses", "wire.progress"},
    "demo": set(),
    "backend_config": {"errors"},
    "cli": {"errors", "config", "backend_config", "commands", "serve"},
    "importing": {"errors", "models.peft_format"},
    "exporting": {"errors", "manifests", "served", "model_files", "models", "engine.exports"},
    "doctor": {"errors", "config", "served", "model_files", "sizing", "store"},
    "bench": {"protocols", "wire.packing"},
    "commands": {
        *("backend", "bench"),
        *("errors", "config", "served", "model_files", "models", "store", "importing", "exporting", "demo", "doctor"),
    },
    "exclusive": {"errors"},
    "data_folder": {"errors", "manifests"},
    "supervised": set(),
    "backend": {
        *("errors", "config", "served", "model_files", "sizing"),
        *("protocols", "models", "training", "sampling"),
    },
    "serve": {
        *("errors", "config", "served", "model_files", "sizing", "observe", "announce", "backend", "lost_device"),
        *("supervisor", "supervised", "exclusive", "data_folder"),
        *("api", "store", "engine"),
    },
}
"""Part (a module or a package; the longest match counts) → what it may import beside itself. No part may be missing."""

NEEDS_NO_SERVER_PACKAGES = ("engine", "models", "training", "sampling")
SERVER_PACKAGES = ("starlette", "uvicorn", "sqlalchemy", "msgspec", "tinker", "typer")


@cache
def modules() -> dict[str, Path]:
    """Dotted name below tinsmith → file; a package stands for its `__init__`."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:
            found[name] = path
    return found


def nodes_that_run(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from nodes_that_run(other)
            continue
        yield node
        yield from nodes_that_run(node)


@cache
def imports_of(name: str) -> frozenset[str]:
    """The modules below tinsmith that a module imports, anywhere in it."""
    found = set()
    for node in nodes_that_run(ast.parse(modules()[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    below = {full.removeprefix("tinsmith.") for full in found if full.startswith("tinsmith.")}
    return frozenset(module for target in below if (module := _as_module(target)))


def _as_module(target: str) -> str:
    """`store.queue` for `store.queue.submit`; empty for a name of the top package itself."""
    while target and target not in modules():
        target = target.rpartition(".")[0]
    return target


def is_in(module: str, part: str) -> bool:
    return module == part or module.startswith(part + ".")


def part_of(module: str) -> str:
    return max((part for part in ALLOWED if is_in(module, part)), key=len, default="")


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_imports_only_what_its_part_may(module: str) -> None:
    part = part_of(module)
    assert part, f"tinsmith/{module} belongs to no part; add it to ALLOWED"
    allowed = ALLOWED[part] | {part}
    foreign = {target for target in imports_of(module) if not any(is_in(target, other) for other in allowed)}
    assert not foreign, f"{module} may import {sorted(allowed)}, but imports {sorted(foreign)}"


def test_no_imports_go_in_a_circle() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"circle: {' → '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for target in imports_of(module):
                visit(target, (*path, module))
            done.add(module)

    for module in modules():
        visit(module, ())


def run(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def import_all(*parts: str) -> str:
    """Code that does it; migrations are left out, since only alembic can run them, and what needs a missing Triton."""
    imported = [m for m in modules() if any(is_in(m, part) for part in parts) and not is_in(m, "store.migrations")]
    names = [f"tinsmith.{module}" for module in imported]
    assert names
    return f"""
import importlib, sys
for name in {names!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
"""


def test_the_api_and_the_command_line_leave_torch_alone() -> None:
    parts = ("api", "store", "wire", "cli", "serve", "supervisor", "announce", "config", "engine")
    run(import_all(*parts) + "assert not {'torch', 'transformers'} & set(sys.modules)")


def test_help_loads_neither_torch_nor_the_web_framework_nor_the_database() -> None:
    heavy = {"torch", "transformers", "starlette", "uvicorn", "sqlalchemy", "numpy"}
    run(f"import sys, tinsmith.cli\nassert not {heavy!r} & set(sys.modules), {heavy!r} & set(sys.modules)")


def test_what_runs_on_a_device_imports_without_the_servers_packages() -> None:
    block = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {SERVER_PACKAGES!r}:
            raise ImportError(name + ' is blocked')
sys.meta_path.insert(0, Block())
"""
    run(block + import_all(*NEEDS_NO_SERVER_PACKAGES))
