"""`tinsmith keys`: the API keys of a server."""

import json
import time
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinsmith.commands.database import Config, DatabaseUrl, DataDir, server_database

if TYPE_CHECKING:
    from tinsmith.store.keys import Key

app = typer.Typer(help="The API keys of a server, running or not.", no_args_is_help=True)


@app.command("create")
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
    with server_database(config, data_dir, database_url, create=True) as (database, where):
        database.write(keys.create_key, key)
    typer.echo(secret)
    typer.echo(f"This is the key {name!r} of the server with {where}; it is not shown again.", err=True)


@app.command("list")
def keys_list(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """List all keys, also expired and revoked ones."""
    from tinsmith.store import keys

    with server_database(config, data_dir, database_url) as (database, _):
        rows = [_described(key) for key in database.read(keys.list_keys)]
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    titles = ("name", "key", "owner", "role", "state", "created", "last used", "expires", "limits", "weight")
    table = [titles, *(_shown(row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(titles))]
    for row in table:
        typer.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


@app.command("revoke")
def keys_revoke(
    name_or_prefix: Annotated[str, typer.Argument(help="Its name, or its beginning (tml-…).")],
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Make a key worthless, within seconds also on a running server. What it made stays."""
    from tinsmith.store import keys

    with server_database(config, data_dir, database_url) as (database, _):
        key = database.write(keys.revoke_key, name_or_prefix)
    typer.echo(f"revoked {key.prefix}… ({key.name})")


@app.command("rotate")
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

    with server_database(config, data_dir, database_url) as (database, where):
        secret, key = database.write(keys.rotate_key, name_or_prefix, overlap * 3600.0)
    typer.echo(secret)
    ends = f"in {overlap} hours" if overlap else "now"
    typer.echo(f"This is the new key {key.name!r} of the server with {where}; the old one ends {ends}.", err=True)


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
