"""A Postgres server of our own for tests and benchmarks: in a temporary folder, on a Unix socket, gone afterwards."""

import fcntl
import os
import pwd
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict

_FAST = "-c fsync=off -c full_page_writes=off -c max_connections=200 -c shared_buffers=32MB"


def find_binaries() -> Path | None:
    """The folder of initdb and pg_ctl, if Postgres is installed."""
    on_path = shutil.which("initdb")
    folders = [Path(on_path).resolve().parent] if on_path else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "pg_ctl").exists()), None)


class ThrowawayPostgres:
    """A server in `folder`, which several processes may share: the first `start` starts it."""

    def __init__(self, folder: Path, binaries: Path) -> None:
        self.folder = folder
        self._binaries = binaries

    def start(self) -> None:
        """Starts the server unless it runs already."""
        with (self.folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (self.folder / "data").exists():
                self._initialise()
                self._pg_ctl(
                    "start", "-l", str(self.folder / "log"), "-o", f"{_FAST} -c listen_addresses='' -k {self.folder}"
                )

    def restart(self) -> None:
        """Stops the server at once, as a crash would, and starts it again."""
        self._pg_ctl("restart", "-m", "immediate", "-l", str(self.folder / "log"))

    def stop(self) -> None:
        """Ends the server and removes its folder."""
        if (self.folder / "data" / "postmaster.pid").exists():
            self._pg_ctl("stop", "-m", "immediate")
        shutil.rmtree(self.folder)

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://tinsmith@/{database}?host={self.folder}"

    @contextmanager
    def database(self, template: str | None = None) -> Iterator[str]:
        """The URL of a new database, empty or a copy of the one at `template`; it goes at the end."""
        name = f"test_{uuid.uuid4().hex[:12]}"
        original = conninfo_to_dict(template)["dbname"] if template else "template1"
        self._execute(f"CREATE DATABASE {name} TEMPLATE {original}")
        try:
            yield self.url(name)
        finally:
            self._execute(f"DROP DATABASE {name} WITH (FORCE)")

    def _execute(self, statement: str) -> None:
        """On a connection of its own: the server may be restarted between two."""
        with psycopg.connect(self.url(), autocommit=True) as conn:
            conn.execute(statement.encode())

    def _initialise(self) -> None:
        user = _unprivileged_user()
        if user is not None:
            shutil.chown(self.folder, user)
        self._run(
            "initdb", "-D", str(self.folder / "data"), "-U", "tinsmith", "-A", "trust", "-E", "UTF8", "--locale=C", "-N"
        )

    def _pg_ctl(self, *arguments: str) -> None:
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-w", *arguments)

    def _run(self, binary: str, *arguments: str) -> None:
        command = [str(self._binaries / binary), *arguments]
        user = _unprivileged_user()
        identity = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}
        done = subprocess.run(
            command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False, **identity
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed; see {self.folder / 'log'}")


@contextmanager
def throwaway_postgres() -> Iterator[ThrowawayPostgres | None]:
    """A server for the time of the block; None if Postgres is not installed."""
    binaries = find_binaries()
    if binaries is None:
        yield None
        return
    server = ThrowawayPostgres(new_folder(), binaries)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def new_folder() -> Path:
    """A folder with a name short enough for a socket, which the server's user can enter."""
    folder = Path(tempfile.mkdtemp(prefix="tinsmith-pg-"))
    folder.chmod(0o755)
    return folder


def _unprivileged_user() -> str | None:
    """Whom to run the server as, if we are root: Postgres refuses to be."""
    if os.geteuid() != 0:
        return None
    return next(entry.pw_name for name in ("postgres", "nobody") for entry in pwd.getpwall() if entry.pw_name == name)
