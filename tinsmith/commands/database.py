"""Which server a command is about: the options that name it, and its database, whether it runs or not."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinsmith.config import load_settings, mask_password, read_environment
from tinsmith.errors import ConfigError

if TYPE_CHECKING:
    from tinsmith.store.database import Database

DataDir = Annotated[Path | None, typer.Option(help="The server's data folder.")]
DatabaseUrl = Annotated[str | None, typer.Option(help="The server's database, if it is not in the data folder.")]
Config = Annotated[Path | None, typer.Option(help="The server's TOML file.")]


@contextmanager
def server_database(
    config: Path | None, data_dir: Path | None, database_url: str | None, *, create: bool = False
) -> Iterator[tuple["Database", str]]:
    """The database that a server with these settings uses, and how to call it. Raises ConfigError if there is none."""
    from tinsmith.store.database import Database
    from tinsmith.store.occupancy import migrate_alone

    given = {name: value for name, value in (("data_dir", data_dir), ("database_url", database_url)) if value}
    settings = load_settings(config, read_environment(), given)
    where = f"database {mask_password(settings.database_url)}"
    if not settings.database_url:
        where = f"data folder {settings.data_dir.absolute()}"
        if not create and not settings.data_dir.is_dir():
            raise ConfigError(f"there is no {where}; name the server's with --data-dir, --database-url or --config")
    database = Database(settings.effective_database_url)
    try:
        migrate_alone(database, settings.effective_database_url)
        yield database, where
    finally:
        database.close()
