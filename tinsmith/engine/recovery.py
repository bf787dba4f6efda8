"""Bringing a model back: its last recovery point, then the operations behind it, executed again.

The job table is the command log. A recovery point is a folder with weights, optimizer state and accumulated gradient
as they were after one seq, so the log behind it is short. The same path serves a crash, a restart, and a model that
was paged out to make room.
"""

import json
import logging
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tinsmith.engine.checkpoints import folder_name, remove_folder, verify_folder, write_folder
from tinsmith.errors import TinsmithError
from tinsmith.protocols import AdamParams, ModelCall, ModelSpec, Trainer, Weights
from tinsmith.wire.jobs import Past
from tinsmith.wire.packing import TrainCall

if TYPE_CHECKING:
    from tinsmith.store.ledger import Ledger
    from tinsmith.store.records import Model

log = logging.getLogger(__name__)

Publish = Callable[[str, Weights, str], None]


class Recovery:
    """Writes recovery points into `folder`, and restores models from them."""

    def __init__(self, ledger: "Ledger", trainer: Trainer, folder: Path) -> None:
        self._ledger = ledger
        self._trainer = trainer
        self._folder = folder

    def write_point(self, model_id: str, seq: int) -> None:
        """Makes the model as it is now, after `seq`, the state that a recovery starts from."""
        record = self._ledger.find_model(model_id)
        if record is None:
            return
        target = self._folder / folder_name(model_id) / f"{seq:09d}-{secrets.token_hex(4)}"
        write_folder(target, lambda into: self._trainer.save(model_id, into, optimizer=True, gradient=True))
        self._ledger.update_model(model_id, recovery_seq=seq, recovery_folder=str(target))
        if record.recovery_folder:
            remove_folder(Path(record.recovery_folder))

    def forget(self, model_id: str) -> None:
        """Removes the recovery points of a model that will not come back."""
        remove_folder(self._folder / folder_name(model_id))

    def restore(self, record: "Model", publish: Publish) -> int:
        """Puts a model on the device as it was after the last operation that ended; returns that one's seq.

        `publish` receives the unnamed snapshots that the replayed operations made.
        """
        self._trainer.add(record.id, ModelSpec(**record.spec))
        try:
            after = -1
            if record.recovery_folder is not None and record.recovery_seq is not None:
                after = record.recovery_seq
                folder = verify_folder(Path(record.recovery_folder))
                self._trainer.load(record.id, folder, optimizer=True, gradient=True)
            past = self._ledger.history(record.id, after)
            self._replay_all(record, past, publish)
        except BaseException:
            self._trainer.drop(record.id)
            raise
        if past:
            log.info("restored %s: %d operations after seq %d", record.id, len(past), after)
        return past[-1].header.seq if past else after

    def _replay_all(self, record: "Model", past: list[Past], publish: Publish) -> None:
        for entry in (entry for entry in past if entry.header.kind in _REPLAYED):
            if entry.state == "done":
                body = self._ledger.payloads([entry.header])[entry.header.number]  # all at once may not fit memory
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
                if request["sampler_id"] is not None:
                    publish(snapshot_of(record.id, request), self._trainer.snapshot(record.id), record.id)


_REPLAYED = frozenset({"forward_backward", "optim_step", "load_weights", "save_weights_for_sampler"})


def snapshot_of(model_id: str, request: dict[str, str]) -> str:
    """The id of the snapshot that an unnamed save_weights_for_sampler publishes.

    All inflight samplers of a model share one, which every later inflight save replaces.
    """
    return f"{model_id}:inflight" if request["kind"] == "inflight" else request["sampler_id"]


def load_checkpoint(ledger: "Ledger", trainer: Trainer, model_id: str, path: str, optimizer: bool) -> None:
    """Replaces a model's weights (and optimizer state) by a checkpoint's."""
    checkpoint = ledger.find_checkpoint(path)
    if checkpoint is None:
        raise CheckpointGoneError(f"checkpoint {path} does not exist any more (deleted or expired)")
    trainer.load(model_id, verify_folder(Path(checkpoint.folder)), optimizer=optimizer)


class CheckpointGoneError(TinsmithError):
    """A checkpoint was deleted between the request for it and its use."""

    category = "user"
