"""The engine's side of the store: every method is one transaction, and rings whoever waits for what it changed."""

import os
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tinsmith.store import forgetting, keys, pruning, queue, records, retention, snapshots, usage
from tinsmith.store.database import Database
from tinsmith.store.doorbell import Bell, Doorbell
from tinsmith.wire.jobs import Header, Job, Outcome, Past
from tinsmith.wire.progress import Progress


@dataclass(frozen=True, slots=True)
class NewCheckpoint:
    """A folder of weights that an operation wrote, to be recorded together with the operation's result."""

    path: str
    kind: str
    name: str
    folder: Path
    size_bytes: int
    ttl_seconds: int | None = None
    overwrite: bool = False
    user_metadata: dict[str, Any] = field(default_factory=dict)


class Ledger:
    """Jobs and records of one base model, for one engine process."""

    def __init__(self, database: Database, doorbell: Doorbell, base: str, keep_checkpoints: int = 0) -> None:
        """Of every model's checkpoints the latest `keep_checkpoints` of each kind stay, if it does not say; 0: all."""
        self.base = base
        self._keep_checkpoints = keep_checkpoints
        self.engine_id = secrets.token_hex(8)
        self._database = database
        self._doorbell = doorbell
        self._place = pruning.Place()
        self._forgotten_to = forgetting.Place()

    def listen(self) -> Bell:
        """Rings when work was submitted."""
        return self._doorbell.listen("jobs")

    # Jobs

    def take_over(self) -> int:
        """Queues again what dead engines were running. Returns how many jobs."""
        return self._database.write(queue.release, self.base)

    def release(self) -> None:
        """Queues again what this engine was running."""
        self._database.write(queue.release, self.base, self.engine_id)

    def claim(self, limit: int, *, crowded: Sequence[str] = ()) -> list[Header]:
        """Takes up to `limit` queued jobs, oldest first, but no samples of the owners in `crowded`."""
        return self._database.write(queue.claim, self.base, self.engine_id, limit, crowded)

    def abandoned(self, numbers: Sequence[int], silent_since: float) -> list[int]:
        """Gives up the samples of clients that have been silent since; returns which of these jobs are over."""
        self._database.write(queue.give_up_silent, self.base, silent_since)
        return self._database.read(queue.ended, numbers)

    def ended(self, numbers: Sequence[int]) -> list[int]:
        """Those of these jobs that are over."""
        return self._database.read(queue.ended, numbers)

    def payloads(self, headers: Sequence[Header]) -> dict[int, bytes]:
        """The packed request of each job, by its number."""
        return self._database.read(queue.payloads, [header.number for header in headers])

    def complete(self, outcomes: Sequence[Outcome]) -> None:
        if outcomes:
            self._ring_done(self._database.write(_complete, outcomes, self.base))

    def complete_soon(self, outcomes: Sequence[Outcome]) -> Future[list[str]]:
        """`complete` that need not be waited for: what it gives is done once the outcomes are written."""
        writing = self._database.write_soon(_complete, outcomes, self.base)
        writing.add_done_callback(self._ring_written)
        return writing

    def complete_with(
        self,
        outcome: Outcome,
        model_id: str,
        *,
        model: dict[str, Any] | None = None,
        sampler: tuple[str, str] | None = None,
        checkpoint: NewCheckpoint | None = None,
    ) -> None:
        """Ends a job together with what it did to the records: all of it, or (with UserError) nothing.

        `model` are changes of the model's record, `sampler` is (sampler id, snapshot) for a sampler that follows an
        inflight snapshot, `checkpoint` is a folder to be recorded.
        """
        self._ring_done(self._database.write(_complete_with, outcome, model_id, model, sampler, checkpoint))

    def tell(self, news: Sequence[Progress]) -> None:
        """Tells clients that read along what their samples have got. Nothing is written: it may get lost."""
        if news:
            self._doorbell.ring("tokens", [message for part in news for message in part.to_messages()])

    def history(self, model_id: str, after: int) -> list[Past]:
        """The ended jobs of a model behind seq `after`, in order, up to the first that has not ended."""
        return self._database.read(queue.history, model_id, after)

    def was_chunked(self, header: Header) -> bool:
        """Whether a request was one part of a client's larger call."""
        return self._database.read(queue.was_chunked, header.subject, header.seq)

    def skip(self, header: Header, seq: int) -> None:
        """Gives up on an operation that never arrived while `header` waited behind it."""
        lost = Job(header.subject, seq, "lost", header.owner, self.base, b"")
        self._database.write(queue.reject, lost, f"request {lost.request_id} did not arrive in time and was skipped")

    def prune(self, finished_before: float) -> bool:
        """Deletes some old results, needless payloads and forgotten jobs. Returns whether to go on soon."""
        found, self._place, more = self._database.read(pruning.find, finished_before, self._place)
        if found:
            self._database.write(pruning.delete, found)
        return more

    def _ring_written(self, writing: Future[list[str]]) -> None:
        if not writing.exception():  # which is for those who wait for it
            self._ring_done(writing.result())

    def _ring_done(self, request_ids: list[str]) -> None:
        self._doorbell.ring("done", request_ids)

    # Records

    def find_model(self, model_id: str) -> records.Model | None:
        return self._database.read(records.find_model, model_id)

    def update_model(self, model_id: str, **changes: Any) -> None:
        self._database.write(records.update_model, model_id, **changes)

    def closing_models(self, unseen_since: float) -> list[str]:
        """Models to be closed: their session is finished, or its client has been silent since that time."""
        return self._database.read(records.closing_models, self.base, unseen_since)

    def sync(self) -> None:
        """Returns once all that was written will outlive a power cut, too."""
        self._database.sync()

    def silent_models(self, unseen_since: float) -> list[str]:
        """Models that may be trained still, but whose client has been silent since that time."""
        return self._database.read(records.silent_models, self.base, unseen_since)

    def find_sampler(self, sampler_id: str) -> records.SamplerRecord | None:
        return self._database.read(records.find_sampler, sampler_id)

    def find_checkpoint(self, path: str) -> records.Checkpoint | None:
        return self._database.read(records.find_checkpoint, path)

    def checkpoint_folders(self) -> list[str]:
        """The folders of all checkpoints, also of expired ones."""
        return self._database.read(records.checkpoint_folders)

    def knows(self, request_id: str) -> bool:
        """Whether there was such a job, and is not forgotten."""
        return self._database.read(queue.find, request_id) is not None

    def check_storage(self, header: Header, kind: str, path: str, size_bytes: int | None = None) -> None:
        """Raises LimitError if a job's checkpoint is more than its owner may store; its size may not be known yet."""
        self._database.read(keys.check_storage, header.owner, header.subject, kind, path, size_bytes)

    def weights(self) -> dict[str, float]:
        """How many times the usual share an owner gets; of those who get another than that."""
        return self._database.read(keys.weights)

    def drop_superseded_checkpoints(self, model_id: str, kind: str) -> list[Path]:
        """Forgets a model's checkpoints behind the latest ones that are to be kept; returns their folders."""
        dropped = self._database.write(retention.drop_superseded, model_id, kind, self._keep_checkpoints)
        return [Path(checkpoint.folder) for checkpoint in dropped]

    def drop_expired_checkpoints(self, now: float) -> list[Path]:
        """Forgets checkpoints whose time is over; returns their folders, for removal."""
        return self._database.write(_drop_expired, now)

    def release_superseded_snapshots(self, unused_since: float) -> tuple[list[tuple[str, str]], bool]:
        """Marks unnamed snapshots as gone that were superseded, and not asked for anything since that time.

        Returns (snapshot, model) of some, whose files may then be removed: the marks outlive a power cut. And whether
        there may be more.
        """
        released = self._database.write(snapshots.release_superseded, self.base, unused_since)
        if released:
            self.sync()
        return released, len(released) == snapshots.AT_ONCE

    def released_snapshots(self) -> list[tuple[str, str]]:
        """(snapshot, model) of all that are marked as gone, of models that are not over."""
        return self._database.read(snapshots.released, self.base)

    def forget(self, now: float, silent_since: float) -> None:
        """Deletes some records that nobody can ask for any more: custom losses of sessions that are over, samplers
        whose weights are gone, and sessions that have nothing in them."""
        found, self._forgotten_to = self._database.read(forgetting.find, self._forgotten_to, now, silent_since)
        if found:
            self._database.write(forgetting.delete, found, now, silent_since)

    def announce(
        self,
        state: str,
        progress: str,
        capabilities: dict[str, Any] | None = None,
        statistics: dict[str, Any] | None = None,
    ) -> None:
        """Publishes the engine's state (loading, ready, stopped, failed) and numbers, and beats its heart."""
        record = records.EngineRecord(
            self.base, self.engine_id, os.getpid(), state, progress, capabilities, time.time(), statistics
        )
        self._database.write(records.put_engine, record)
        self._doorbell.ring("engine")


def _complete(conn: sa.Connection, outcomes: Sequence[Outcome], base: str) -> list[str]:
    ended = queue.complete(conn, outcomes)
    counted = set(ended)  # without those that had ended before
    usage.add(conn, base, [one.used for one in outcomes if one.used and one.used.request_id in counted], time.time())
    return ended


def _complete_with(
    conn: sa.Connection,
    outcome: Outcome,
    model_id: str,
    model: dict[str, Any] | None,
    sampler: tuple[str, str] | None,
    checkpoint: NewCheckpoint | None,
) -> list[str]:
    if model:
        records.update_model(conn, model_id, **model)
    if sampler:
        records.update_sampler(conn, sampler[0], snapshot=sampler[1], written_at=time.time())
    if checkpoint:
        _record_checkpoint(conn, model_id, checkpoint)
    return queue.complete(conn, [outcome])


def _record_checkpoint(conn: sa.Connection, model_id: str, new: NewCheckpoint) -> None:
    model = records.find_model(conn, model_id)
    assert model is not None, model_id
    now = time.time()
    record = records.Checkpoint(
        path=new.path,
        model_id=model_id,
        kind=new.kind,
        name=new.name,
        owner=model.owner,
        base=model.base,
        base_name=model.base_name,
        spec=model.spec,
        folder=str(new.folder),
        size_bytes=new.size_bytes,
        public=False,
        user_metadata=new.user_metadata,
        created_at=now,
        expires_at=now + new.ttl_seconds if new.ttl_seconds else None,
    )
    records.create_checkpoint(conn, record, overwrite=new.overwrite)


def _drop_expired(conn: sa.Connection, now: float) -> list[Path]:
    expired = records.expired_checkpoints(conn, now)
    return [Path(records.delete_checkpoint(conn, checkpoint.path).folder) for checkpoint in expired]
