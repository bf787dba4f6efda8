"""The command line: `tinsmith serve`, `keys`, `models` and `version`.

Light: `--help` imports neither torch nor the web framework. Knows how to ask, not how anything is done.
"""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinsmith import __version__
from tinsmith.config import EMBEDDED, describe, load_settings, mask_password, read_environment
from tinsmith.errors import ConfigError, TinsmithError

if TYPE_CHECKING:
    from tinsmith.store.database import Database
    from tinsmith.store.keys import Key

app = typer.Typer(
    name="tinsmith",
    help="A self-hosted server for the Tinker API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="The models on this machine.", no_args_is_help=True)
app.add_typer(models_app, name="models")
keys_app = typer.Typer(help="The API keys of a server, running or not.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")

DataDir = Annotated[Path | None, typer.Option(help="The server's data folder.")]
DatabaseUrl = Annotated[str | None, typer.Option(help="The server's database, if it is not in the data folder.")]
Config = Annotated[Path | None, typer.Option(help="The server's TOML file.")]


@app.command()
def serve(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Registered names, 'tiny' (embedded), model folders, hub names."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 picks a free one.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder for checkpoints and the database.")] = None,
    database_url: Annotated[str | None, typer.Option(help="postgresql://… instead of SQLite.")] = None,
    aliases: Annotated[
        list[str] | None, typer.Option("--alias", help="NAME=MODEL: serve it under NAME too; * is any name.")
    ] = None,
    api_keys: Annotated[list[str] | None, typer.Option("--api-key", help="A key that clients may use.")] = None,
    no_auth: Annotated[bool | None, typer.Option("--no-auth", help="Take any key, on any address.")] = None,
    max_lora_adapters: Annotated[int | None, typer.Option(help="Adapters on the device at once.")] = None,
    max_lora_rank: Annotated[int | None, typer.Option(help="Largest rank that may be asked for.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the engine; 0: every core.")] = None,
    deterministic: Annotated[
        bool | None, typer.Option("--deterministic", help="The same bits alone and in company; slower.")
    ] = None,
    memory_fraction: Annotated[
        float | None, typer.Option(help="Of the device's memory, for all models together; 0: all that is free.")
    ] = None,
    memory_shares: Annotated[
        list[str] | None, typer.Option("--memory-share", help="MODEL=FRACTION of that; the others divide the rest.")
    ] = None,
    max_context: Annotated[int | None, typer.Option(help="Tokens; 0: what the model was made for.")] = None,
    kv_cache_tokens: Annotated[int | None, typer.Option(help="Sampling cache; 0: from free memory.")] = None,
    train_tokens: Annotated[int | None, typer.Option(help="Training micro-batch; 0: from free memory.")] = None,
    train_micro_batch_size: Annotated[int | None, typer.Option(help="Sequences in it at most; 0: any number.")] = None,
    gradient_checkpointing: Annotated[
        str | None, typer.Option(help="Less memory, a third more time in training: auto, on or off.")
    ] = None,
    log: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json: one JSON object per line.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of the settings.")] = None,
    show_settings: Annotated[bool, typer.Option("--show-settings", help="Print all settings and end.")] = False,
) -> None:
    """Serve one or more models to Tinker clients, until Ctrl-C: those named, else all registered ones, else 'tiny'."""
    given = {name: value for name, value in context.params.items() if value not in (None, (), [])}
    given.pop("config", None)
    given.pop("show_settings")
    settings = load_settings(config, read_environment(), given)
    if show_settings:
        for name, value in describe(settings):
            typer.echo(f"{name:<18} {value}")
        return
    from tinsmith.serve import supervise

    raise typer.Exit(supervise(settings))


@models_app.command("path")
def models_path(name: Annotated[str, typer.Argument(help=f"An embedded model: {EMBEDDED}.")]) -> None:
    """Print the folder of an embedded model (its tokenizer is there too)."""
    if name != EMBEDDED:
        raise ConfigError(f"there is no embedded model {name!r}; there is only {EMBEDDED!r}")
    from tinsmith.demo import tiny_folder

    typer.echo(tiny_folder())


@models_app.command("list")
def models_list() -> None:
    """List what `tinsmith serve` can serve without downloading: embedded models and the hub cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    from tinsmith.demo import tiny_folder

    typer.echo(f"{EMBEDDED:<40} {tiny_folder()}")
    try:
        cached = sorted(scan_cache_dir().repos, key=lambda repo: repo.repo_id)
    except CacheNotFound:
        cached = []
    for repo in cached:
        if repo.repo_type == "model":
            typer.echo(f"{repo.repo_id:<40} {repo.repo_path}")


@keys_app.command("create")
def keys_create(
    name: Annotated[str, typer.Argument(help="Whose key it is; lists show it.")],
    admin: Annotated[bool, typer.Option("--admin", help="May list and describe what all keys made.")] = False,
    expires: Annotated[
        int | None, typer.Option(metavar="DAYS", min=1, max=36500, help="Days that it is valid.")
    ] = None,
    tokens_per_second: Annotated[
        int | None, typer.Option(min=1, help="Tokens trained and sampled, on average.")
    ] = None,
    max_models: Annotated[int | None, typer.Option(min=1, max=2**31 - 1, help="Models open at once.")] = None,
    max_storage: Annotated[int | None, typer.Option(min=1, max=2**63 - 1, help="Bytes of checkpoints.")] = None,
    weight: Annotated[
        float, typer.Option(min=0.01, max=1000.0, help="Its share while others want theirs: 2 is twice the usual.")
    ] = 1.0,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Make a key and print it, this once: only its digest is stored."""
    from tinsmith.store import keys

    secret, key = keys.new_key(name, keys.ADMIN if admin else keys.USER)
    key = replace(
        key,
        expires_at=expires and key.created_at + expires * 86400,
        tokens_per_second=tokens_per_second,
        max_models=max_models,
        max_storage=max_storage,
        weight=weight,
    )
    with _server_database(config, data_dir, database_url, create=True) as (database, where):
        database.write(keys.create_key, key)
    typer.echo(secret)
    typer.echo(f"This is the key {name!r} of the server with {where}; it is not shown again.", err=True)


@keys_app.command("list")
def keys_list(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """List all keys, also expired and revoked ones."""
    from tinsmith.store import keys

    with _server_database(config, data_dir, database_url) as (database, _):
        rows = [_described(key) for key in database.read(keys.list_keys)]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    titles = ("name", "key", "owner", "role", "state", "created", "last used", "expires", "limits", "weight")
    table = [titles, *(_shown(row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(titles))]
    for row in table:
        typer.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


@keys_app.command("revoke")
def keys_revoke(
    name_or_prefix: Annotated[str, typer.Argument(help="Its name, or its beginning (tml-…).")],
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Make a key worthless, within seconds also on a running server. What it made stays."""
    from tinsmith.store import keys

    with _server_database(config, data_dir, database_url) as (database, _):
        key = database.write(keys.revoke_key, name_or_prefix)
    typer.echo(f"revoked {key.prefix}… ({key.name})")


@keys_app.command("rotate")
def keys_rotate(
    name_or_prefix: Annotated[str, typer.Argument(help="Its name, or its beginning (tml-…).")],
    overlap: Annotated[
        int, typer.Option(metavar="HOURS", min=0, max=24 * 365, help="Hours that the old one stays good.")
    ] = 0,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Replace a key by a new one of the same owner, name, role and limits, and print that, this once."""
    from tinsmith.store import keys

    with _server_database(config, data_dir, database_url) as (database, where):
        secret, key = database.write(keys.rotate_key, name_or_prefix, overlap * 3600.0)
    typer.echo(secret)
    ends = f"in {overlap} hours" if overlap else "now"
    typer.echo(f"This is the new key {key.name!r} of the server with {where}; the old one ends {ends}.", err=True)


@contextmanager
def _server_database(
    config: Path | None, data_dir: Path | None, database_url: str | None, *, create: bool = False
) -> Iterator[tuple["Database", str]]:
    """The database that a server with these settings uses, and how to call it. Raises ConfigError if there is none."""
    from tinsmith.store.database import Database

    given = {name: value for name, value in (("data_dir", data_dir), ("database_url", database_url)) if value}
    settings = load_settings(config, read_environment(), given)
    where = f"database {mask_password(settings.database_url)}"
    if not settings.database_url:
        where = f"data folder {settings.data_dir.absolute()}"
        if not create and not settings.data_dir.is_dir():
            raise ConfigError(f"there is no {where}; name the server's with --data-dir, --database-url or --config")
    database = Database(settings.effective_database_url)
    try:
        database.migrate()
        yield database, where
    finally:
        database.close()


def _described(key: "Key") -> dict[str, Any]:
    """A key for people and programs, with times in ISO 8601."""
    times = ("created_at", "used_at", "expires_at", "revoked_at")
    limits = ("tokens_per_second", "max_models", "max_storage")
    return {
        **{name: getattr(key, name) for name in ("name", "prefix", "owner", "role")},
        "state": key.state(time.time()),
        **{name: _timestamp(getattr(key, name)) for name in times},
        **{name: getattr(key, name) for name in limits},
        "weight": key.weight,
    }


def _shown(row: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table; times to the minute."""
    limits = {"tokens/s": row["tokens_per_second"], "models": row["max_models"], "bytes": row["max_storage"]}
    return (
        *(row["name"], f"{row['prefix']}…", row["owner"], row["role"], row["state"]),
        *((row[time] or "-")[:16].replace("T", " ") for time in ("created_at", "used_at", "expires_at")),
        ", ".join(f"{limit:,.10g} {unit}" for unit, limit in limits.items() if limit is not None) or "-",
        f"{row['weight']:g}",
    )


def _timestamp(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> Any:
    """Runs the command line; what cannot be done is one line on stderr and exit code 2."""
    try:
        return app()
    except TinsmithError as error:
        typer.echo(f"tinsmith: {error}", err=True)
        sys.exit(2)
