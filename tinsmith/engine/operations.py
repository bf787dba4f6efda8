"""The operations that are barriers of their model: create, load, step, save. One method per kind of job.

Each performs one job and ends it in the ledger, result and records in one transaction. An error of the request is
raised; the loop ends the job with it.
"""

import json
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinsmith.engine.checkpoints import folder_name, remove_folder, write_folder
from tinsmith.engine.exports import prepare_export
from tinsmith.engine.recovery import load_checkpoint, snapshot_of
from tinsmith.engine.residency import Residency
from tinsmith.errors import NotFoundError, UnavailableError, UserError
from tinsmith.protocols import AdamParams, ModelSpec, Trainer
from tinsmith.wire.jobs import Header, Outcome

if TYPE_CHECKING:
    from tinsmith.store.ledger import Ledger, NewCheckpoint

    MakeCheckpoint = Callable[..., NewCheckpoint]

Request = dict[str, Any]

ADOPTED = "adopted"
"""The folder beside an upload's files for the same adapter in another form."""


class Operations:
    """Performs barrier jobs against a trainer, with checkpoints below `folder`."""

    def __init__(
        self, ledger: "Ledger", trainer: Trainer, residency: Residency, folder: Path, checkpoint: "MakeCheckpoint"
    ) -> None:
        self._ledger = ledger
        self._trainer = trainer
        self._residency = residency
        self._folder = folder
        self._checkpoint = checkpoint
        self._kinds: dict[str, Callable[[Header, Request], None]] = {
            "create_model": self._create_model,
            "load_weights": self._load_weights,
            "optim_step": self._optim_step,
            "save_weights": self._save_weights,
            "save_weights_for_sampler": self._save_weights_for_sampler,
            "save_weights_external": self._save_weights_external,
            "import_weights": self._import_weights,
        }

    def perform(self, header: Header, body: bytes) -> None:
        """Runs one job to its end. Raises TinsmithError if it cannot be done; then nothing has changed."""
        perform = self._kinds.get(header.kind)
        if perform is None:
            raise UserError(f"no operation {header.kind!r}; known: {', '.join(self._kinds)}")
        perform(header, json.loads(body))

    def _finish(self, header: Header, answer: dict[str, Any], **records: Any) -> None:
        outcome = Outcome(header.number, json.dumps({**answer, "type": header.kind}).encode())
        self._ledger.complete_with(outcome, header.subject, **records)

    def _create_model(self, header: Header, request: Request) -> None:
        self._add(header.subject)
        self._finish(header, {"model_id": header.subject}, model={"state": "ready"})

    def _add(self, model_id: str) -> None:
        record = self._ledger.find_model(model_id)
        if record is None:
            raise NotFoundError(f"no model {model_id}")
        spec = ModelSpec(**record.spec)
        self._residency.make_room(spec)
        self._trainer.add(model_id, spec)
        self._residency.admit(model_id)

    def _load_weights(self, header: Header, request: Request) -> None:
        if request["create"]:
            self._add(header.subject)
        load_checkpoint(self._ledger, self._trainer, header.subject, request["path"], request["optimizer"])
        # The checkpoint may be deleted tomorrow: from here on, recovery must not need it.
        self._residency.advance(header.subject, header.seq)
        self._residency.write_point(header.subject)
        answer = {"path": request["path"], "model_id": header.subject}
        self._finish(header, answer, model={"state": "ready"})

    def _optim_step(self, header: Header, request: Request) -> None:
        metrics = self._trainer.optim_step(header.subject, AdamParams(**request))
        self._finish(header, {"metrics": metrics})

    def _save_weights(self, header: Header, request: Request) -> None:
        self._save(header, request, "training", "weights", optimizer=True)

    def _save_weights_external(self, header: Header, request: Request) -> None:
        record = self._ledger.find_model(header.subject)
        assert record is not None, header.subject
        recipients = request.get("age_encryption_recipients") or []
        prepare = partial(prepare_export, base_name=record.base_name, recipients=recipients)
        self._save(header, request, "external", "external_weights", optimizer=False, prepare=prepare)

    def _import_weights(self, header: Header, request: Request) -> None:
        """The model is there to be loaded and saved, so that its checkpoint is like any other; then it is closed."""
        folder = Path(request["folder"])
        spare = folder / ADOPTED
        remove_folder(spare)  # of an engine that died here
        adopted = self._trainer.adopt(folder, spare)
        spec = self._trainer.describe(adopted)
        _check_promise(spec, request["promised"], widened=adopted == spare)
        self._residency.make_room(spec)
        self._trainer.add(header.subject, spec)
        try:
            self._trainer.load(header.subject, adopted, optimizer=False)
            model = {"state": "closed", "spec": spec.to_dict()}
            self._save(header, request, "external", "external_weights", optimizer=False, model=model)
        finally:
            self._trainer.drop(header.subject)

    def _save_weights_for_sampler(self, header: Header, request: Request) -> None:
        if request["sampler_id"] is None:
            self._save(header, request, "sampler", "sampler_weights", optimizer=False)
            return
        snapshot_id = snapshot_of(header.subject, request)
        self._residency.publish(snapshot_id, self._trainer.snapshot(header.subject), header.subject)
        answer = {"path": None, "sampling_session_id": request["sampler_id"]}
        self._finish(header, answer, sampler=(request["sampler_id"], snapshot_id))

    def _save(
        self,
        header: Header,
        request: Request,
        kind: str,
        segment: str,
        *,
        optimizer: bool,
        prepare: Callable[[Path], None] | None = None,
        model: dict[str, Any] | None = None,
    ) -> None:
        """Writes a checkpoint and ends the job. `prepare` changes the files before they are sealed for good."""
        model_id, path, name = header.subject, request["path"], request["name"]
        previous = self._ledger.find_checkpoint(path)
        if previous is not None and not request.get("overwrite", False):
            raise UserError(f"{path} exists already; choose another name, delete it, or save with overwrite=true")
        self._ledger.check_storage(header, kind, path)
        folder = self._folder / folder_name(model_id) / segment / f"{name}-{secrets.token_hex(4)}"

        def fill(into: Path) -> None:
            self._trainer.save(model_id, into, optimizer=optimizer)
            if prepare is not None:
                prepare(into)

        size = write_folder(folder, fill, header.request_id)
        try:
            self._ledger.check_storage(header, kind, path, size)
            checkpoint = self._new_checkpoint(request, kind, folder, size)
            self._finish(header, {"path": path, "size_bytes": size}, checkpoint=checkpoint, model=model)
        except UnavailableError:  # it may have been recorded; if not, it is collected as an orphan
            raise
        except BaseException:
            remove_folder(folder)
            raise
        superseded = self._ledger.drop_superseded_checkpoints(model_id, kind)
        for old in [*superseded, *([] if previous is None else [Path(previous.folder)])]:
            remove_folder(old)

    def _new_checkpoint(self, request: Request, kind: str, folder: Path, size: int) -> "NewCheckpoint":
        return self._checkpoint(
            path=request["path"],
            kind=kind,
            name=request["name"],
            folder=folder,
            size_bytes=size,
            ttl_seconds=request.get("ttl_seconds"),
            overwrite=request.get("overwrite", False),
            user_metadata=request.get("user_metadata") or {},
        )


def _check_promise(spec: ModelSpec, promised: Request, *, widened: bool) -> None:
    """Raises UserError if an uploaded adapter is not what its upload was begun for; it may have been widened here."""
    if spec.rank != promised["rank"] * (2 if widened else 1):
        raise UserError(
            f"the uploaded adapter has rank {spec.rank}; its upload was started for rank {promised['rank']}"
        )
    for part in ("train_attn", "train_mlp", "train_unembed"):
        if getattr(spec, part) and not promised[part]:
            raise UserError(f"the uploaded adapter has weights that its upload ruled out with {part}=false")
