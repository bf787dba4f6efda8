"""Which requests an engine died of: what it was doing is written down as it goes, for the next engine to read.

The notes are small files without fsync: they outlive any death of the process, and a power cut is no request's fault.
What ran when an engine died is tried again apart from everything else, so that a second death tells the culprit from
its neighbours. A file's time of change shows the supervisor that the engine moves. Knows numbers of jobs, not what they
do.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from tinsmith.errors import TinsmithError

log = logging.getLogger(__name__)

PULSE = "now"  # the file that changes with every turn of the loop; its one byte says what is going on
_FOLDER = "engine"  # of the data folder
LIMIT = 2  # deaths of an engine, the last with nothing beside it: then the request is the cause
_IDLE, _TRAINING, _SAMPLING = b"-", b"t", b"s"
_LISTS = {_TRAINING: "training", _SAMPLING: "sampling"}
_DEATHS = "deaths.json"


def pulse_file(data_dir: Path) -> Path:
    """What an engine changes at least every second, unless one slice of work takes longer; not while it loads."""
    return data_dir / _FOLDER / PULSE


class DeadlyRequestError(TinsmithError):
    """The engine died twice while running this request, the second time with nothing beside it; it is given up."""


class Trials:
    """One engine's notes in a server's data folder, and what it makes of those of the engines before it."""

    def __init__(self, data_dir: Path) -> None:
        folder = data_dir / _FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._files = {name: os.open(folder / name, os.O_RDWR | os.O_CREAT) for name in (PULSE, *_LISTS.values())}
        self._noted: dict[str, list[int]] = {}
        self._now = _IDLE
        self._deaths: dict[int, int] = {}
        self._condemned: set[int] = set()

    def close(self) -> None:
        """Nothing is going on any more. Closes the files."""
        self._note(_IDLE)
        for file in self._files.values():
            os.close(file)

    # What goes on now

    def pulse(self) -> None:
        """Shows that the engine moves."""
        self._write(PULSE, self._now)

    def training(self, numbers: Sequence[int]) -> AbstractContextManager[None]:
        """While a barrier or a batch of these jobs runs."""
        return self._doing(_TRAINING, numbers)

    def sampling(self, numbers: Sequence[int]) -> AbstractContextManager[None]:
        """While the sampler takes a step with these jobs; may interrupt a batch."""
        return self._doing(_SAMPLING, numbers)

    @contextmanager
    def _doing(self, phase: bytes, numbers: Sequence[int]) -> Iterator[None]:
        before = self._now
        name = _LISTS[phase]
        if self._noted.get(name) != numbers:
            self._noted[name] = list(numbers)
            self._write(name, json.dumps(self._noted[name]).encode() + b"\n")
        self._note(phase)
        try:
            yield
        except Exception:
            self._note(before)
            raise  # anything else ends the process, and is to be read as its death
        self._note(before)

    def _note(self, phase: bytes) -> None:
        self._now = phase
        self._write(PULSE, phase)

    def _write(self, name: str, content: bytes) -> None:
        try:
            os.pwrite(self._files[name], content, 0)
        except OSError as error:  # a full disk: work goes on, and a death now would go unexplained
            log.warning("cannot note what the engine is doing: %s", error)

    # What went on when an engine died

    @property
    def suspects(self) -> dict[int, int]:
        """Job number → how many engines died while running it, of the jobs that have not ended."""
        return self._deaths

    def take_over(self, ended: Callable[[Sequence[int]], Sequence[int]]) -> None:
        """Reads what an engine before this one was doing when it died. `ended` picks the jobs that are over."""
        doing = self._read_doing()
        deaths, condemned = self._read_deaths()
        for number in doing:
            deaths[number] = deaths.get(number, 0) + 1
        if len(doing) == 1 and deaths[doing[0]] >= LIMIT:
            condemned.add(doing[0])
        over = set(ended(list(deaths)))
        self._deaths = {number: count for number, count in deaths.items() if number not in over}
        self._condemned = condemned - over
        if doing:
            log.warning("the engine before this one died while running %d requests: %s", len(doing), doing[:10])
        self._save_deaths()
        self._note(_IDLE)

    def check(self, number: int) -> None:
        """Raises DeadlyRequestError for a job that is not to be tried again."""
        if number in self._condemned:
            raise DeadlyRequestError(
                f"the engine died {self._deaths[number]} times while running this request, the last time with no "
                "other request beside it; it is not tried again. The server's log says how the engine ended"
            )

    def end(self, number: int) -> None:
        """Notes that a job has ended; if it was a suspect, it is none any more."""
        self._deaths.pop(number, None)

    def _read_doing(self) -> list[int]:
        name = _LISTS.get(os.pread(self._files[PULSE], 1, 0))
        if name is None:
            return []
        try:
            line, _, _ = (self._folder / name).read_bytes().partition(b"\n")
            return [int(number) for number in json.loads(line)]
        except ValueError as error:
            log.warning("the note on what the last engine was doing is damaged: %s", error)
            return []

    def _read_deaths(self) -> tuple[dict[int, int], set[int]]:
        try:
            saved = json.loads((self._folder / _DEATHS).read_bytes())
            return {int(number): count for number, count in saved["deaths"].items()}, set(saved["condemned"])
        except FileNotFoundError:
            return {}, set()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("the note on how engines died is damaged: %s", error)
            return {}, set()

    def _save_deaths(self) -> None:
        content = json.dumps({"deaths": self._deaths, "condemned": sorted(self._condemned)})
        temporary = self._folder / f".{_DEATHS}.new"
        try:
            temporary.write_text(content)
            temporary.replace(self._folder / _DEATHS)
        except OSError as error:
            log.warning("cannot note how the last engine died: %s", error)
