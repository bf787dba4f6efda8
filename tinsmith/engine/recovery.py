"""Bringing a model back: its last recovery point, then the operations behind it, executed again.

The job table is the command log. A recovery point is a folder with weights, optimizer state and accumulated gradient
as they were after one seq, so the log behind it is short. The folders themselves say which points there are; the
model's record only says from where on the log is kept. The same path serves a crash, a restart, and a model that was
paged out to make room.
"""

import json
import logging
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tinsmith.engine.checkpoints import folder_name, remove_folder, write_folder
from tinsmith.engine.exports import readable_folder
from tinsmith.engine.trials import Trials
from tinsmith.errors import TinsmithError
from tinsmith.manifests import DamagedCheckpointError, verify_folder
from tinsmith.protocols import AdamParams, ModelCall, ModelSpec, Trainer, Weights
from tinsmith.wire.jobs import GONE_SNAPSHOT, Past
from tinsmith.wire.packing import TrainCall

if TYPE_CHECKING:
    from tinsmith.store.ledger import Ledger
    from tinsmith.store.records import Model

log = logging.getLogger(__name__)

KEPT_POINTS = 2
_DIGITS = 9  # of a seq in a point's name, so that names sort by seq
_POINTS = f"{'[0-9]' * _DIGITS}*-*"

Publish = Callable[[str, Weights, str], None]


class Recovery:
    """Writes recovery points below `folder`, and restores models from them.

    The newest KEPT_POINTS of a model stay, and the log behind the oldest of them: a damaged one is passed over.
    """

    def __init__(self, ledger: "Ledger", trainer: Trainer, folder: Path, trials: Trials) -> None:
        self._ledger = ledger
        self._trainer = trainer
        self._folder = folder
        self._trials = trials

    def write_point(self, model_id: str, seq: int) -> None:
        """Makes the model as it is now, after `seq`, the state that a recovery starts from."""
        self._remove_from(model_id, seq)
        target = self._folder / folder_name(model_id) / f"{seq:0{_DIGITS}d}-{secrets.token_hex(4)}"
        write_folder(target, lambda into: self._trainer.save(model_id, into, optimizer=True, gradient=True))
        points = self._points(model_id)
        if len(points) >= KEPT_POINTS:  # until then the whole log is kept: it serves as the point before the first
            oldest = points[-KEPT_POINTS]
            self._ledger.update_model(model_id, recovery_seq=_seq_of(oldest), recovery_folder=str(oldest))
        if points[:-KEPT_POINTS]:
            self._ledger.sync()  # a power cut must not bring back a log that needs what is removed now
        for point in points[:-KEPT_POINTS]:
            remove_folder(point)

    def forget(self, model_id: str) -> None:
        """Removes the recovery points of a model that will not come back."""
        remove_folder(self._folder / folder_name(model_id))
        self._trials.release_model(model_id)

    def restore(self, record: "Model", publish: Publish) -> tuple[int, int]:
        """Puts a model on the device as it was after the last operation that ended.

        Returns that operation's seq, and the seq of the recovery point that it came from (-1: none). `publish` receives
        the unnamed snapshots that the replayed operations made. Raises DamagedCheckpointError, and BrokenModelError
        for a model that engines have died of.
        """
        self._trials.check_model(record.id)
        kept_after = -1 if record.recovery_seq is None else record.recovery_seq
        past = self._ledger.history(record.id, kept_after)
        ended = past[-1].header.seq if past else kept_after
        self._remove_from(record.id, ended + 1)  # of an operation that must run again
        try:
            with self._trials.restoring(record.id, "loading its recovery point"):
                self._trainer.add(record.id, ModelSpec(**record.spec))
                point = self._load_newest(record, kept_after)
            behind = [entry for entry in past if entry.header.seq > point]
            self._replay_all(record, behind, publish)
        except Exception:
            self._trainer.drop(record.id)
            raise
        self._trials.release_model(record.id)
        if behind:
            log.info("restored %s: %d operations after seq %d", record.id, len(behind), point)
        return ended, point

    def _load_newest(self, record: "Model", kept_after: int) -> int:
        """Loads the newest recovery point that is whole; its seq, or -1 if the log is there from the beginning."""
        damaged = []
        for folder in reversed(self._points(record.id)):
            try:
                verify_folder(folder)
            except DamagedCheckpointError as error:
                log.warning("a recovery point of %s cannot be used: %s", record.id, error)
                damaged.append(str(error))
                continue
            self._trainer.load(record.id, folder, optimizer=True, gradient=True)
            return _seq_of(folder)
        if kept_after >= 0:
            raise DamagedCheckpointError(
                f"{record.id} cannot be restored, only loaded from a checkpoint: none of its recovery points can be "
                f"read ({'; '.join(damaged) or 'there are none'}), and the log begins after seq {kept_after}"
            )
        return -1

    def _points(self, model_id: str) -> list[Path]:
        """The model's recovery points, oldest first."""
        return sorted((self._folder / folder_name(model_id)).glob(_POINTS))

    def _remove_from(self, model_id: str, seq: int) -> None:
        """Removes points at or behind `seq`: their engine died before the ledger knew of the operation."""
        for point in self._points(model_id):
            if _seq_of(point) >= seq:
                remove_folder(point)

    def _replay_all(self, record: "Model", past: list[Past], publish: Publish) -> None:
        for entry in (entry for entry in past if entry.header.kind in _REPLAYED):
            self._trials.pulse()
            if entry.state == "done":
                body = self._ledger.payloads([entry.header])[entry.header.number]  # all at once may not fit memory
                with self._trials.restoring(
                    record.id, f"running {entry.header.request_id} ({entry.header.kind}) again"
                ):
                    self._replay(record, entry, body, publish)
            elif entry.header.kind == "optim_step" and entry.ran:
                self._trainer.discard_gradient(record.id)

    def _replay(self, record: "Model", entry: Past, body: bytes, publish: Publish) -> None:
        match entry.header.kind:
            case "forward_backward":
                [outcome] = self._trainer.forward_backward([ModelCall(record.id, TrainCall.from_bytes(body))])
                if isinstance(outcome, TinsmithError):
                    raise outcome
            case "optim_step":
                self._trainer.optim_step(record.id, AdamParams(**json.loads(body)))
            case "load_weights":
                request = json.loads(body)
                load_checkpoint(self._ledger, self._trainer, record.id, request["path"], request["optimizer"])
            case "save_weights_for_sampler":
                request = json.loads(body)
                if request["sampler_id"] is not None and not self._is_gone(request["sampler_id"]):
                    publish(snapshot_of(record.id, request), self._trainer.snapshot(record.id), record.id)

    def _is_gone(self, sampler_id: str) -> bool:
        """Whether the sampler's snapshot was deleted since it was made, and the sampler forgotten, perhaps."""
        sampler = self._ledger.find_sampler(sampler_id)
        return sampler is None or sampler.snapshot == GONE_SNAPSHOT


_REPLAYED = frozenset({"forward_backward", "optim_step", "load_weights", "save_weights_for_sampler"})


def _seq_of(point: Path) -> int:
    return int(point.name.partition("-")[0])


def snapshot_of(model_id: str, request: dict[str, str]) -> str:
    """The id of the snapshot that an unnamed save_weights_for_sampler publishes.

    All inflight samplers of a model share one, which every later inflight save replaces.
    """
    return f"{model_id}:inflight" if request["kind"] == "inflight" else request["sampler_id"]


def load_checkpoint(ledger: "Ledger", trainer: Trainer, model_id: str, path: str, optimizer: bool) -> None:
    """Replaces a model's weights (and optimizer state) by a checkpoint's."""
    checkpoint = ledger.find_checkpoint(path)
    if checkpoint is None:
        raise CheckpointGoneError(f"there is no checkpoint {path}: deleted, expired, or never saved")
    trainer.load(model_id, readable_folder(checkpoint.folder, path), optimizer=optimizer)


class CheckpointGoneError(TinsmithError):
    """A checkpoint was deleted between the request for it and its use."""

    category = "user"
