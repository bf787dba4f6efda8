"""`tinsmith models`: the base models that a server knows by name."""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinsmith.commands.database import Config, DatabaseUrl, DataDir, server_database
from tinsmith.config import CHOICES, EMBEDDED
from tinsmith.errors import ConfigError
from tinsmith.model_files import count_parameters, model_folder
from tinsmith.served import ANY_NAME, Served, base_of

if TYPE_CHECKING:
    from tinsmith.store import registry

app = typer.Typer(help="The base models of a server, and on this machine.", no_args_is_help=True)


@app.command("path")
def path(name: Annotated[str, typer.Argument(help=f"An embedded model: {EMBEDDED}.")]) -> None:
    """Print the folder of an embedded model (its tokenizer is there too)."""
    if name != EMBEDDED:
        raise ConfigError(f"there is no embedded model {name!r}; there is only {EMBEDDED!r}")
    from tinsmith.demo import tiny_folder

    typer.echo(tiny_folder())


@app.command("add")
def models_add(
    model: Annotated[str, typer.Argument(help="A Hugging Face folder, or a name on the hub, which is fetched.")],
    name: Annotated[str | None, typer.Option(help="What clients call it; else the folder's or the hub's name.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    max_context: Annotated[int, typer.Option(min=0, help="Tokens; 0: what the model was made for.")] = 0,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that comes with the model.")
    ] = False,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Check a model, and have the server know it: `tinsmith serve NAME`, or without a name all that were added."""
    from tinsmith.store import registry

    checked = _checked(model, name, dtype, max_context, trust_remote_code)
    with server_database(config, data_dir, database_url, create=True) as (database, where):
        database.write(registry.register, checked)
    typer.echo(
        f"{checked.name}: {checked.architecture}, {checked.parameters / 1e6:,.4g} M parameters, in {checked.folder}"
    )
    typer.echo(f"Added to the server with {where}; it is served from its next start.", err=True)


def _checked(
    model: str, name: str | None, dtype: str, max_context: int, trust_remote_code: bool
) -> "registry.RegisteredModel":
    """What is to be registered. Raises ConfigError if the model could not be served."""
    if dtype not in CHOICES["dtype"]:
        raise ConfigError(f"dtype is {dtype!r}; allowed: {', '.join(CHOICES['dtype'])}")
    base = base_of(model)
    name = name or Path(model).name if Path(base).is_absolute() else name or model
    if not name or "," in name or "=" in name or name == ANY_NAME or (name == EMBEDDED and base != EMBEDDED):
        raise ConfigError(f"a model cannot be called {name!r}; choose another --name")
    served = Served(name, base, dtype=dtype, max_context=max_context, trust_remote_code=trust_remote_code)
    folder = model_folder(served, lambda progress: typer.echo(progress, err=True))
    parameters = count_parameters(folder)
    from tinsmith.models.checking import check_folder
    from tinsmith.store import registry

    found = check_folder(folder, trust_remote_code=trust_remote_code)
    if max_context > found.max_context:
        raise ConfigError(f"max_context is {max_context}, but {name} was made for {found.max_context} tokens at most")
    return registry.RegisteredModel(
        name=name,
        base=base,
        folder=str(folder),
        dtype=dtype,
        max_context=max_context,
        trust_remote_code=trust_remote_code,
        architecture=found.architecture,
        parameters=parameters,
        created_at=time.time(),
    )


@app.command("list")
def models_list(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """List the models that were added to the server, and what else could be served without downloading."""
    known = _registered(config, data_dir, database_url)
    rows = [asdict(model) for model in known]
    names = {model.base for model in known}
    others = [{"name": name, "folder": folder} for name, folder in _on_this_machine() if name not in names]
    if as_json:
        typer.echo(json.dumps({"registered": rows, "on_this_machine": others}, indent=2))
        return
    for row in rows:
        context = row["max_context"] or "its own"
        typer.echo(
            f"{row['name']:<40} {row['folder']}  ({row['architecture']}, {row['parameters'] / 1e6:,.4g} M, "
            f"dtype {row['dtype']}, context {context})"
        )
    for other in others:
        typer.echo(f"{other['name']:<40} {other['folder']}  (not added)")


def _registered(
    config: Path | None, data_dir: Path | None, database_url: str | None
) -> "list[registry.RegisteredModel]":
    """Nothing, if no server is named and there is none in the usual place. Raises ConfigError."""
    from tinsmith.store import registry

    try:
        with server_database(config, data_dir, database_url) as (database, _):
            return database.read(registry.list_registered)
    except ConfigError:
        if config or data_dir or database_url:
            raise
        return []


def _on_this_machine() -> Iterator[tuple[str, str]]:
    """Names that `tinsmith serve` takes without anything being added: the embedded model, and the hub's cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    from tinsmith.demo import tiny_folder

    yield EMBEDDED, str(tiny_folder())
    try:
        cached = sorted(scan_cache_dir().repos, key=lambda repo: repo.repo_id)
    except CacheNotFound:
        return
    for repo in cached:
        if repo.repo_type == "model":
            yield repo.repo_id, str(repo.repo_path)


@app.command("remove")
def models_remove(
    name: Annotated[str, typer.Argument(help="As it was added.")],
    force: Annotated[bool, typer.Option("--force", help="Also if checkpoints depend on it; they stay.")] = False,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Have the server forget a model, from its next start. Its files stay."""
    from tinsmith.store import registry

    with server_database(config, data_dir, database_url) as (database, _):
        removed = database.write(registry.unregister, name, force=force)
    typer.echo(f"removed {removed.name}; its files are still in {removed.folder}")
