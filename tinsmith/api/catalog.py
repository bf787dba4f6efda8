"""Which base models are served, under which names, and what their engines say of themselves.

Looks at the engines' records in the database, woken by the doorbell and once a second, in one thread. What an engine
said last about its capabilities stays valid while it is being restarted.
"""

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from tinsmith.config import EMBEDDED
from tinsmith.demo import tiny_folder
from tinsmith.errors import TinsmithError, UnavailableError, UserError
from tinsmith.protocols import Capabilities
from tinsmith.served import ANY_NAME, Served, find_served
from tinsmith.store import records
from tinsmith.store.database import Database
from tinsmith.store.doorbell import Doorbell

_LOOK_SECONDS = 1.0
FAILED = "failed"
_SETTLED = ("ready", FAILED)

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Known:
    """What is known of one model's engine."""

    engine: records.EngineRecord | None = None
    capabilities: Capabilities | None = None
    settled: bool = False  # it has been ready since this process began, or cannot be


class Catalog:
    """The served models' names, and their engines' states. `start` and `close` bracket its thread."""

    def __init__(
        self, served: Sequence[Served], aliases: Mapping[str, str], database: Database, doorbell: Doorbell
    ) -> None:
        self.served = tuple(served)
        self._by_base = {model.base: model for model in served}
        self._by_name = _names(served, aliases)
        self._known = {model.base: _Known() for model in served}
        self._database = database
        self._doorbell = doorbell
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="engine-state", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, within a second."""
        self._closing.set()
        self._thread.join()

    # Names

    def names(self, base: str) -> list[str]:
        """All exact names under which a model is served, its own first."""
        return [name for name, model in self._by_name.items() if model.base == base and name != ANY_NAME]

    def require(self, name: str) -> Served:
        """The model that is served under `name`, as it is or up to a colon. Raises UserError, UnavailableError."""
        for known in (name, name.partition(":")[0], ANY_NAME):
            if known in self._by_name:
                return self._working(self._by_name[known])
        names = [known for known in self._by_name if known != ANY_NAME]
        raise UserError(
            f"this server does not serve {name!r}; it serves {', '.join(names)} "
            f"(tinsmith serve --alias {name}={self.served[0].name} would add the name)"
        )

    def require_base(self, base: str, what: str) -> Served:
        """`find_base`, for something to be queued. Raises UnavailableError, too, if the engine cannot run."""
        return self._working(self.find_base(base, what))

    def find_base(self, base: str, what: str) -> Served:
        """The served model with this key, to which `what` belongs. Raises UserError if it is not served now."""
        if base not in self._by_base:
            serves = ", ".join(repr(model.name) for model in self.served)
            raise UserError(
                f"{what} belongs to base model {base!r}, which this server does not serve; it serves {serves}"
            )
        return self._by_base[base]

    def _working(self, model: Served) -> Served:
        """Nothing is queued for an engine that nobody can say will ever run."""
        state, progress = self.state_of(model.base)
        if state == FAILED:
            raise UnavailableError(f"the engine of {model.name} has failed: {progress}; other models are served")
        return model

    def tokenizer(self, base: str) -> str:
        """Where clients on this machine find the tokenizer: a folder, or a hub name."""
        if base == EMBEDDED:
            return str(tiny_folder())
        folder = self._by_base[base].folder if base in self._by_base else ""
        return folder if folder and Path(folder).is_dir() else base

    # Engines

    @property
    def state(self) -> tuple[str, str]:
        """`ready` when requests can be worked on, else what hinders that, and a line about its progress.

        Until every engine has been ready once (or cannot be), the slowest counts; then the best.
        """
        states = {base: self.state_of(base) for base in self._known}
        unsettled = [states[base] for base, known in self._known.items() if not known.settled]
        order = (*unsettled, *sorted(states.values(), key=lambda state: state[0] != "ready"))
        return order[0]

    def state_of(self, base: str) -> tuple[str, str]:
        """One engine's state (`ready` when it can work) and a line about its progress."""
        engine = self._known[base].engine if base in self._known else None
        if engine is None:
            return "starting", "the engine has not reported yet"
        return engine.state, engine.progress

    def contexts(self) -> dict[str, int]:
        """The longest sequence of every model, in tokens, by its base. Raises UnavailableError until all are known.

        Models whose engines failed before they knew are left out, unless there are no others.
        """
        lost = [b for b, known in self._known.items() if known.capabilities is None and self.state_of(b)[0] == FAILED]
        bases = [base for base in self._known if base not in lost] or lost
        return {base: self.capabilities(base).max_context for base in bases}

    def capabilities(self, base: str) -> Capabilities:
        """What a loaded model can do. Raises UnavailableError until its engine has said so once."""
        capabilities = self._known[base].capabilities
        if capabilities is None:
            state, progress = self.state_of(base)
            name = self._by_base[base].name
            raise UnavailableError(f"the engine of {name} is not ready ({state}: {progress}); try again soon")
        return capabilities

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
            found = self._database.read(_find_engines, list(self._known))
        except TinsmithError as error:
            log.warning("cannot read the engines' states: %s", error)
            return
        except Exception:  # this thread's border: without it, the API would never hear of its engines again
            log.exception("reading the engines' states failed")
            return
        for engine in found:
            known = self._known[engine.base]
            known.engine = engine
            known.settled |= engine.state in _SETTLED
            if engine.capabilities is not None:
                known.capabilities = Capabilities(**engine.capabilities)


def _find_engines(conn: sa.Connection, bases: Sequence[str]) -> list[records.EngineRecord]:
    found = (records.find_engine(conn, base) for base in bases)
    return [engine for engine in found if engine is not None]


def _names(served: Sequence[Served], aliases: Mapping[str, str]) -> dict[str, Served]:
    """Who is meant by every name: models' own, then their keys, then aliases."""
    names = {model.name: model for model in served}
    for model in served:
        names.setdefault(model.base, model)
    for alias, target in aliases.items():
        if (aimed := find_served(served, target)) is not None:
            names.setdefault(alias, aimed)
    return names
