"""What is on the device: models that train, snapshots that are sampled; makes room by paging out the idlest.

Nobody is told "maximum number of adapters": a model or snapshot that was paged out comes back with its next request.
"""

import logging
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

from tinsmith.engine.checkpoints import folder_name, remove_folder, write_folder
from tinsmith.engine.exports import readable_folder
from tinsmith.engine.recovery import Recovery
from tinsmith.errors import GoneError, NotFoundError, TinsmithError
from tinsmith.manifests import verify_folder
from tinsmith.protocols import BASE_SNAPSHOT, ModelSpec, Sampler, Trainer, Weights
from tinsmith.wire.jobs import GONE_SNAPSHOT

if TYPE_CHECKING:
    from tinsmith.store.ledger import Ledger

log = logging.getLogger(__name__)


LONG_LOG = 64  # operations behind a recovery point; a model that replayed as many gets a new one at once


class Residency:
    """Keeps at most `max_models` models and `max_snapshots` snapshots on the device.

    Of both also no more than there is memory for. Snapshots made by models that are paged out wait in
    `folder`/MODEL/.
    """

    def __init__(
        self,
        ledger: "Ledger",
        trainer: Trainer,
        sampler: Sampler,
        recovery: Recovery,
        folder: Path,
        *,
        max_models: int,
        max_snapshots: int,
    ) -> None:
        self._ledger = ledger
        self._trainer = trainer
        self._sampler = sampler
        self._recovery = recovery
        self._folder = folder
        self._max_models = max_models
        self._max_snapshots = max_snapshots
        self._models: OrderedDict[str, int] = OrderedDict()  # id → last seq that is in the weights
        self._points: dict[str, int] = {}  # id → seq of its recovery point
        self._snapshots: OrderedDict[str, str | None] = OrderedDict()  # id → the model it came from, if unnamed
        self._restored = self._paged_out = 0

    def held(self) -> dict[str, int]:
        """How much is on the device, and may be at most; callable from any thread."""
        return {
            "models": len(self._models),
            "models_most": self._max_models,
            "snapshots": len(self._snapshots),
            "snapshots_most": self._max_snapshots,
        }

    def events(self) -> dict[str, int]:
        """How often models came back, and models or snapshots went to disk to make room; callable from any thread."""
        return {"restored": self._restored, "paged_out": self._paged_out}

    # Models

    @property
    def models(self) -> list[str]:
        return list(self._models)

    def admit(self, model_id: str) -> None:
        """Notes a model that was just added to the trainer by its first operation."""
        self._models[model_id] = -1

    def make_room(self, spec: ModelSpec, wanted: frozenset[str] = frozenset()) -> None:
        """Pages out models, least recently used first and none of `wanted`, until one more fits, by number and bytes.

        One alone may be larger than all room.
        """
        for model_id in list(self._models):
            if len(self._models) < self._max_models and not self._trainer.excess_bytes(spec):
                return
            if model_id not in wanted:
                self.page_out(model_id)

    def require_model(self, model_id: str, wanted: frozenset[str] = frozenset()) -> None:
        """Makes sure that the model is on the device as it was after the last operation that ended."""
        if model_id not in self._models:
            record = self._ledger.find_model(model_id)
            if record is None or record.state != "ready":
                raise NotFoundError(f"model {model_id} could not be created, or its session is over")
            self.make_room(ModelSpec(**record.spec), wanted)
            self._models[model_id], self._points[model_id] = self._recovery.restore(record, self.publish)
            self._restored += 1
            self._shorten_log(model_id)
        self._models.move_to_end(model_id)

    def advance(self, model_id: str, seq: int) -> None:
        """Notes that a resident model now contains everything up to `seq`."""
        if model_id in self._models:
            self._models[model_id] = seq

    def write_point(self, model_id: str) -> None:
        """Writes a recovery point, if the model has moved since its last one, and its snapshots with it."""
        seq = self._models[model_id]
        if seq > self._points.get(model_id, -1):
            self._save_snapshots_of(model_id)
            self._recovery.write_point(model_id, seq)
            self._points[model_id] = seq

    def _shorten_log(self, model_id: str) -> None:
        """Gives a model that came back by a long way a recovery point: another may be needed before the next is due."""
        if self._models[model_id] - self._points[model_id] < LONG_LOG:
            return
        try:
            self.write_point(model_id)
        except TinsmithError as error:  # a full disk, say; the log is there still
            log.error("no recovery point for %s: %s", model_id, error)

    def page_out(self, model_id: str) -> None:
        """Moves a model from the device to disk."""
        log.info("paging out %s", model_id)
        self._paged_out += 1
        self.write_point(model_id)
        self._forget_model(model_id)

    def rest(self, model_id: str) -> None:
        """Moves a model, if it is on the device, and its unnamed snapshots to disk."""
        if model_id in self._models:
            self.page_out(model_id)
        for snapshot_id in [s for s, origin in self._snapshots.items() if origin == model_id]:
            self._page_out_snapshot(snapshot_id)

    def close_model(self, model_id: str) -> None:
        """Frees everything that a model of a finished session holds, its recovery points included."""
        self._forget_model(model_id)
        for snapshot_id in [s for s, origin in self._snapshots.items() if origin == model_id]:
            self._sampler.retract(snapshot_id)
            del self._snapshots[snapshot_id]
        remove_folder(self._paged_of(model_id))
        self._recovery.forget(model_id)

    def discard_model(self, model_id: str) -> None:
        """Drops a model that may differ from what the log says; its next request restores it, if it was created."""
        self._forget_model(model_id)

    def _forget_model(self, model_id: str) -> None:
        if self._models.pop(model_id, None) is not None:
            self._trainer.drop(model_id)
        self._points.pop(model_id, None)

    # Snapshots

    def publish(self, snapshot_id: str, weights: Weights | Path, model_id: str | None) -> None:
        """Hands a snapshot to the sampler; `model_id` is where an unnamed one came from."""
        if model_id is not None:
            remove_folder(self._paged_of(model_id) / folder_name(snapshot_id))
        self._hold(snapshot_id, weights, model_id)

    def require_snapshot(self, snapshot_id: str, model_id: str | None) -> str:
        """Makes sure that a snapshot can be sampled, and returns the id that the sampler knows it by.

        A named snapshot is known by its folder, so that a path saved again is another snapshot. One that the device
        has lost comes from disk, or from replaying the model it was saved from.
        """
        if snapshot_id == BASE_SNAPSHOT:
            return snapshot_id
        if snapshot_id == GONE_SNAPSHOT:
            raise GoneError("the sampler's snapshot was superseded, and deleted after nobody had used it for long")
        if snapshot_id.startswith("tinker://"):
            return self._require_named(snapshot_id)
        if snapshot_id not in self._snapshots:
            self._bring_back(snapshot_id, model_id)
        self._snapshots.move_to_end(snapshot_id)
        return snapshot_id

    def delete_snapshot(self, snapshot_id: str, model_id: str) -> None:
        """Drops an unnamed snapshot that the ledger knows to be gone, wherever it is, if it is anywhere."""
        if self._snapshots.pop(snapshot_id, None) is not None:
            self._sampler.retract(snapshot_id)
        remove_folder(self._paged_of(model_id) / folder_name(snapshot_id))

    def _require_named(self, path: str) -> str:
        checkpoint = self._ledger.find_checkpoint(path)
        if checkpoint is None:
            raise NotFoundError(f"there is no checkpoint {path}: deleted, expired, or never saved")
        if checkpoint.folder not in self._snapshots:
            self.publish(checkpoint.folder, readable_folder(checkpoint.folder, path), None)
        self._snapshots.move_to_end(checkpoint.folder)
        return checkpoint.folder

    def _bring_back(self, snapshot_id: str, model_id: str | None) -> None:
        if model_id is not None:
            folder = self._paged_of(model_id) / folder_name(snapshot_id)
            if folder.exists():
                self._hold(snapshot_id, verify_folder(folder), model_id)
            else:
                self.require_model(model_id)
        if snapshot_id not in self._snapshots:
            raise NotFoundError(f"there is no snapshot {snapshot_id}: it could not be saved, or its session is over")

    def _hold(self, snapshot_id: str, weights: Weights | Path, model_id: str | None) -> None:
        """Hands a snapshot to the sampler, and pages out the idlest others if there are too many now."""
        self._sampler.publish(snapshot_id, weights)
        self._snapshots[snapshot_id] = model_id
        self._snapshots.move_to_end(snapshot_id)
        while len(self._snapshots) > 1 and (len(self._snapshots) > self._max_snapshots or self._sampler.excess_bytes):
            self._page_out_snapshot(next(iter(self._snapshots)))

    def _page_out_snapshot(self, snapshot_id: str) -> None:
        self._paged_out += 1
        self._save_snapshot(snapshot_id)
        self._sampler.retract(snapshot_id)
        del self._snapshots[snapshot_id]

    def _save_snapshots_of(self, model_id: str) -> None:
        for snapshot_id, origin in self._snapshots.items():
            if origin == model_id:
                self._save_snapshot(snapshot_id)

    def _save_snapshot(self, snapshot_id: str) -> None:
        """Writes a snapshot to disk, unless it is there already: a named one always is."""
        model_id = self._snapshots[snapshot_id]
        if model_id is None:
            return
        folder = self._paged_of(model_id) / folder_name(snapshot_id)
        if not folder.exists():
            write_folder(folder, lambda into: self._sampler.save(snapshot_id, into))

    def _paged_of(self, model_id: str) -> Path:
        return self._folder / folder_name(model_id)
