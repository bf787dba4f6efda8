"""Brings a database's tables to this version: one numbered file in `versions/` for every change of `tables.py`."""

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from tinsmith.errors import ConfigError

EMPTY, CURRENT, OLDER, NEWER = "empty", "current", "older", "newer"

_LOCK = 0x7155_3174  # any number that nobody else locks in this database


def upgrade(conn: sa.Connection) -> None:
    """Applies what is missing, inside the caller's transaction; processes that start together take turns.

    Raises ConfigError for a database that a newer version has changed.
    """
    if conn.dialect.name == "postgresql":  # on SQLite a write transaction has the database to itself
        conn.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
    config = Config(attributes={"connection": conn})
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise ConfigError(f"the database needs a newer version of Tinsmith than this one ({error})") from error


def level(conn: sa.Connection) -> str:
    """How far the database's tables are: EMPTY, OLDER or NEWER than this version's, or CURRENT. Changes nothing."""
    found = MigrationContext.configure(conn).get_current_revision()
    if found is None:
        return EMPTY
    scripts = ScriptDirectory(str(Path(__file__).parent))
    known = [script.revision for script in scripts.walk_revisions()]
    if found not in known:
        return NEWER
    return CURRENT if found == known[0] else OLDER
