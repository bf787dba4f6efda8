"""Which requests an engine died of: what it was doing is written down as it goes, for the next engine to read.

The notes are small files without fsync: they outlive any death of the process, and a power cut is no request's fault.
What ran when an engine died is tried again apart from everything else, so that a second death tells the culprit from
its neighbours. A model that engines die of while they bring it back is left alone. A file's time of change shows the
supervisor that the engine moves. Knows numbers of jobs and ids of models, not what is done with them.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from tinsmith.errors import TinsmithError

log = logging.getLogger(__name__)

PULSE = "now"  # the file that changes with every turn of the loop: a byte for what is going on, and how many jobs ended
_FOLDER = "engine"  # of the data folder
LIMIT = 2  # deaths of an engine, the last with nothing beside it: then the request is the cause
MOST_RESTORING = 4  # deaths while bringing one model back, wherever in its past: fewer than the supervisor puts up with
_IDLE, _TRAINING, _SAMPLING, _RESTORING = b"-", b"t", b"s", b"r"
_NOTES = {_TRAINING: "training", _SAMPLING: "sampling", _RESTORING: "restoring"}
_DEATHS = "deaths.json"


def pulse_file(data_dir: Path) -> Path:
    """What an engine changes at least every second, unless one slice of work takes longer; not while it loads."""
    return data_dir / _FOLDER / PULSE


def going_on(data_dir: Path) -> frozenset[int | str]:
    """What an engine is doing, or was when it died: numbers of jobs, or the id of the model that it brings back."""
    phase, note = _read_note(data_dir / _FOLDER)
    return frozenset(note[:1] if phase == _RESTORING else note)


class DeadlyRequestError(TinsmithError):
    """The engine died twice while running this request, the second time with nothing beside it; it is given up."""


class BrokenModelError(TinsmithError):
    """Engines died while bringing the model back; it is left as it is on disk."""


@dataclass(frozen=True, slots=True)
class Restoration:
    """What engines were doing when they died while bringing a model back."""

    what: str = ""  # the last of them
    deaths: int = 0  # of engines in a row, over just that
    in_all: int = 0


class Trials:
    """One engine's notes in a server's data folder, and what it makes of those of the engines before it."""

    def __init__(self, data_dir: Path) -> None:
        folder = data_dir / _FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._files = {name: os.open(folder / name, os.O_RDWR | os.O_CREAT) for name in (PULSE, *_NOTES.values())}
        self._noted: dict[str, Any] = {}
        self._now = _IDLE
        self._ended = 0
        self._deaths: dict[int, int] = {}
        self._condemned: set[int] = set()
        self._restorations: dict[str, Restoration] = {}  # by model id

    def close(self) -> None:
        """Nothing is going on any more. Closes the files."""
        self._note(_IDLE)
        for file in self._files.values():
            os.close(file)

    # What goes on now

    def pulse(self) -> None:
        """Shows that the engine moves, and how much it has got done."""
        self._write(PULSE, b"%b%d\n" % (self._now, self._ended))

    def training(self, numbers: Sequence[int]) -> AbstractContextManager[None]:
        """While a barrier or a batch of these jobs runs."""
        return self._doing(_TRAINING, list(numbers))

    def sampling(self, numbers: Sequence[int]) -> AbstractContextManager[None]:
        """While the sampler takes a step with these jobs; may interrupt a batch."""
        return self._doing(_SAMPLING, list(numbers))

    def restoring(self, model_id: str, what: str) -> AbstractContextManager[None]:
        """While a model is brought back from disk and log; `what` says in words how far that is."""
        return self._doing(_RESTORING, [model_id, what])

    @contextmanager
    def _doing(self, phase: bytes, note: list[Any]) -> Iterator[None]:
        before = self._now
        name = _NOTES[phase]
        if self._noted.get(name) != note:
            self._noted[name] = note
            self._write(name, json.dumps(note).encode() + b"\n")
        self._note(phase)
        try:
            yield
        except Exception:
            self._note(before)
            raise  # anything else ends the process, and is to be read as its death
        self._note(before)

    def _note(self, phase: bytes) -> None:
        self._now = phase
        self.pulse()

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
        phase, note = _read_note(self._folder)
        deaths, condemned, restorations = self._read_deaths()
        if phase == _RESTORING:
            model_id, what = note
            restorations[model_id] = _one_more(restorations.get(model_id, Restoration()), what)
            log.warning("the engine before this one died while bringing back %s: %s", model_id, what)
        elif note:
            _count(note, deaths, condemned)
            log.warning("the engine before this one died while running %d requests: %s", len(note), note[:10])
        over = set(ended(list(deaths)))
        self._deaths = {number: count for number, count in deaths.items() if number not in over}
        self._condemned = condemned - over
        self._restorations = restorations
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
        self._ended += 1
        self._deaths.pop(number, None)

    def check_model(self, model_id: str) -> None:
        """Raises BrokenModelError for a model that is not to be brought back again."""
        past = self._restorations.get(model_id)
        if past is not None and (past.deaths >= LIMIT or past.in_all >= MOST_RESTORING):
            raise BrokenModelError(
                f"model {model_id} is broken: the engine died {past.in_all} times while bringing it back, the last "
                f"time while {past.what}. It is not tried again; its recovery points stay on the server's disk until "
                "its session is over. Create another model from a checkpoint; the server's log says how the engine "
                "ended"
            )

    def release_model(self, model_id: str) -> None:
        """Forgets the deaths over a model: it has been brought back, or never will be."""
        if self._restorations.pop(model_id, None) is not None:
            self._save_deaths()

    def _read_deaths(self) -> tuple[dict[int, int], set[int], dict[str, Restoration]]:
        try:
            saved = json.loads((self._folder / _DEATHS).read_bytes())
            deaths = {int(number): count for number, count in saved["deaths"].items()}
            restorations = {model_id: Restoration(*past) for model_id, past in saved["restorations"].items()}
            return deaths, set(saved["condemned"]), restorations
        except FileNotFoundError:
            return {}, set(), {}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("the note on how engines died is damaged: %s", error)
            return {}, set(), {}

    def _save_deaths(self) -> None:
        restorations = {model_id: astuple(past) for model_id, past in self._restorations.items()}
        content = json.dumps(
            {"deaths": self._deaths, "condemned": sorted(self._condemned), "restorations": restorations}
        )
        temporary = self._folder / f".{_DEATHS}.new"
        try:
            temporary.write_text(content)
            temporary.replace(self._folder / _DEATHS)
        except OSError as error:
            log.warning("cannot note how the last engine died: %s", error)


def _read_note(folder: Path) -> tuple[bytes, list[Any]]:
    """The phase that an engine is in, and its note: numbers of jobs, or a model's id and what is done to it."""
    try:
        phase = (folder / PULSE).read_bytes()[:1]
        name = _NOTES.get(phase)
        if name is None:
            return _IDLE, []
        line, _, _ = (folder / name).read_bytes().partition(b"\n")
        note = json.loads(line)
        if phase == _RESTORING:
            model_id, what = note
            return phase, [str(model_id), str(what)]
        return phase, [int(number) for number in note]
    except (OSError, ValueError, TypeError) as error:
        log.warning("the note on what the last engine was doing cannot be read: %s", error)
        return _IDLE, []


def _count(numbers: Sequence[int], deaths: dict[int, int], condemned: set[int]) -> None:
    """Notes one more death for each of these jobs; a lone one is condemned by its last."""
    for number in numbers:
        deaths[number] = deaths.get(number, 0) + 1
    if len(numbers) == 1 and deaths[numbers[0]] >= LIMIT:
        condemned.add(numbers[0])


def _one_more(past: Restoration, what: str) -> Restoration:
    return Restoration(what, past.deaths + 1 if what == past.what else 1, past.in_all + 1)
