"""Which base model is served, under which names, and what its engine says of itself.

Looks at the engine's record in the database, woken by the doorbell and once a second, in one thread. What the engine
said last about its capabilities stays valid while it is being restarted.
"""

import logging
import threading
from pathlib import Path

from tinsmith.config import EMBEDDED, Settings
from tinsmith.demo import tiny_folder
from tinsmith.errors import TinsmithError, UnavailableError, UserError
from tinsmith.protocols import Capabilities
from tinsmith.store import records
from tinsmith.store.database import Database
from tinsmith.store.doorbell import Doorbell

ANY_NAME = "*"
_LOOK_SECONDS = 1.0

log = logging.getLogger(__name__)


class Catalog:
    """The served model's names, and its engine's state. `start` and `close` bracket its thread."""

    def __init__(self, settings: Settings, database: Database, doorbell: Doorbell) -> None:
        self.base = settings.served_name
        self.name = settings.model
        self._aliases = settings.aliases
        self._database = database
        self._doorbell = doorbell
        self._engine: records.EngineRecord | None = None
        self._capabilities: Capabilities | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="engine-state", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, within a second."""
        self._closing.set()
        self._thread.join()

    @property
    def names(self) -> list[str]:
        """All exact names under which the model is served, its own first."""
        return list(dict.fromkeys([self.name, self.base, *(name for name in self._aliases if name != ANY_NAME)]))

    def require_served(self, name: str) -> None:
        """Raises UserError if `name`, as it is or up to a colon, is no name of the served model."""
        names = self.names
        if name not in names and name.partition(":")[0] not in names and ANY_NAME not in self._aliases:
            raise UserError(
                f"this server does not serve {name!r}; it serves {', '.join(names)} "
                f"(tinsmith serve --alias {name}={self.name} would add the name)"
            )

    @property
    def tokenizer(self) -> str:
        """Where clients on this machine find the tokenizer: a folder, or a hub name."""
        if self.name == EMBEDDED:
            return str(tiny_folder())
        return self.base if Path(self.base).is_dir() else self.name

    @property
    def state(self) -> tuple[str, str]:
        """The engine's state (`ready` when it can work) and a line about its progress."""
        if self._engine is None:
            return "starting", "the engine has not reported yet"
        return self._engine.state, self._engine.progress

    def capabilities(self) -> Capabilities:
        """What the loaded model can do. Raises UnavailableError until the engine has said so once."""
        if self._capabilities is None:
            state, progress = self.state
            raise UnavailableError(f"the engine of {self.name} is not ready ({state}: {progress}); try again soon")
        return self._capabilities

    def _watch(self) -> None:
        bell = self._doorbell.listen("engine")
        try:
            while not self._closing.is_set():
                self._look()
                bell.wait(_LOOK_SECONDS)
        finally:
            bell.close()

    def _look(self) -> None:
        try:
            self._engine = self._database.read(records.find_engine, self.base)
        except TinsmithError as error:
            log.warning("cannot read the engine's state: %s", error)
            return
        except Exception:  # this thread's border: without it, the API would never hear of its engine again
            log.exception("reading the engine's state failed")
            return
        if self._engine is not None and self._engine.capabilities is not None:
            self._capabilities = Capabilities(**self._engine.capabilities)
