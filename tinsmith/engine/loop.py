"""The engine: takes jobs from the ledger, asks planning what runs next, has trainer and sampler do it, ends the jobs.

One thread owns the device. Each turn claims what is new, runs one slice of training (barriers, then one batch of many
tenants), gives sampling the same share of time, and keeps house. Knows no tensors and no SQL.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tinsmith.engine.checkpoints import orphans, remove_folder, sweep
from tinsmith.engine.operations import Operations
from tinsmith.engine.outcomes import attempt, failed, outcome_of
from tinsmith.engine.planning import Plan, apart, gaps, plan
from tinsmith.engine.points import PointSchedule
from tinsmith.engine.recovery import Recovery
from tinsmith.engine.residency import Residency
from tinsmith.engine.sampling_turns import SamplingTurns
from tinsmith.engine.shares import Shares
from tinsmith.engine.silence import PATIENCE_SECONDS, SILENT_SECONDS, Silence
from tinsmith.engine.trials import Trials
from tinsmith.engine.watching import Watch
from tinsmith.errors import TinsmithError, UnavailableError, UserError
from tinsmith.lost_device import raise_if_lost
from tinsmith.protocols import ModelCall, Sampler, Trainer
from tinsmith.wire.jobs import Header, Outcome
from tinsmith.wire.packing import TrainCall

if TYPE_CHECKING:
    from tinsmith.engine.operations import MakeCheckpoint
    from tinsmith.store.bell import Bell
    from tinsmith.store.ledger import Ledger

log = logging.getLogger(__name__)

BATCH_TOKENS = 16_384  # of one training batch: what a neighbour's request waits for at most
CLAIM_LIMIT = 256
IDLE_SECONDS = 1.0  # how long to sleep when nobody rings
BEAT_SECONDS = 5.0
KEEP_HOUSE_SECONDS = 10.0
KEEP_ORDER_SECONDS = 30.0  # between two looks for what nobody will ask for any more
SNAPSHOTS_PER_MODEL = 8  # on the device at most, of as many models as may be there; the sampler bounds their bytes
GAP_SECONDS = 330.0  # clients give up on a submission after 300 s; then what waits behind it goes on


@dataclass(slots=True)
class Lane:
    """One model's place: what waits, which seq comes next, and what went wrong since its last step."""

    next_seq: int
    waiting: dict[int, Header] = field(default_factory=dict)
    gap_since: float | None = None
    lost_chunk: str | None = None  # a part of a larger forward_backward failed: the gradient is incomplete
    stepped: bool = False  # since its recovery point
    used_at: float = 0.0


class Engine:
    """Runs the jobs of one base model. `run` returns when `stop` is set; everything else is its own business."""

    def __init__(
        self,
        ledger: "Ledger",
        trainer: Trainer,
        sampler: Sampler,
        new_checkpoint: "MakeCheckpoint",
        *,
        data_dir: Path,
        max_models: int,
        future_seconds: float,
        snapshot_seconds: float = 0.0,
    ) -> None:
        """Unnamed snapshots that were superseded stay for `snapshot_seconds` after their last use; 0: for ever."""
        self._ledger = ledger
        self._trainer = trainer
        self._data_dir = data_dir
        self._max_models = max_models
        self._future_seconds = future_seconds
        self._snapshot_seconds = snapshot_seconds
        self._trials = Trials(data_dir)
        recovery = Recovery(ledger, trainer, data_dir / "recovery", self._trials)
        self._residency = Residency(
            ledger,
            trainer,
            sampler,
            recovery,
            data_dir / "snapshots",
            max_models=max_models,
            max_snapshots=SNAPSHOTS_PER_MODEL * max_models,
        )
        self._operations = Operations(ledger, trainer, self._residency, data_dir / "checkpoints", new_checkpoint)
        self._lanes: dict[str, Lane] = {}
        self._shares = Shares()
        self._points = PointSchedule()
        self._watch = Watch(sampler, self._residency)
        self._sampling = SamplingTurns(ledger, sampler, self._residency, self._trials, self._watch, self._shares)
        self._astray = False  # the store failed in the middle of something: memory may differ from the log
        self._bell: Bell | None = None
        self._shared_at = time.monotonic()
        self._claimed_at = 0.0
        self._more_queued = False
        self._samples_queued = False
        self._pruning = False
        self._kept_house_at = self._kept_order_at = time.monotonic()
        self._silence = Silence()

    # The loop

    def run(self, stop: threading.Event) -> None:
        """Serves until `stop` is set; then leaves every model's state on disk.

        An error that ends it earlier leaves that to the engine after it: memory may hold the half of something.
        """
        bell = self._bell = self._ledger.listen()
        self.take_over()
        capabilities = self._trainer.capabilities().to_dict()
        beating = threading.Thread(target=self._beat, args=(stop, capabilities), name="heartbeat", daemon=True)
        self._ledger.announce("ready", "", capabilities, self._watch.report())
        beating.start()
        busy = True
        try:
            while not stop.is_set():
                rung = self._hear(0.0 if busy else IDLE_SECONDS)
                busy = self.turn(claim=rung or not busy)
        finally:
            bell.close()
            stop.set()
            beating.join()
        self._close()

    def take_over(self) -> None:
        """Begins where an engine before this one stopped, however it stopped."""
        sweep(self._data_dir)
        self._collect_orphans()
        for snapshot_id, model_id in self._ledger.released_snapshots():
            self._residency.delete_snapshot(snapshot_id, model_id)
        self._shares.weights = self._ledger.weights()
        self._trials.take_over(self._ledger.ended)
        released = self._ledger.take_over()
        if released:
            log.info("took over %d unfinished jobs", released)

    def _collect_orphans(self) -> None:
        """Removes checkpoints that were never recorded (their operation runs again), or whose record went first."""
        recorded = self._ledger.checkpoint_folders()
        for folder in orphans(self._data_dir / "checkpoints", recorded, self._ledger.knows):
            log.info("removing %s, which no checkpoint refers to", folder)
            remove_folder(folder)

    def _beat(self, stop: threading.Event, capabilities: dict[str, object]) -> None:
        while not stop.wait(BEAT_SECONDS):
            try:
                self._ledger.announce("ready", "", capabilities, self._watch.report())
            except Exception:  # the next beat may find the database again
                log.exception("no heartbeat")

    def turn(self, *, claim: bool = True) -> bool:
        """One round of work; returns whether there is more to do at once. `run` is a loop around this.

        Looks for new jobs when told to, when the last look did not get them all, and now and then (rings get lost).
        If the store fails, the next round begins with what the log says.
        """
        self._trials.pulse()
        try:
            if self._astray:
                self._go_back()
            return self._turn(claim)
        except UnavailableError as error:
            log.error("%s; then everything goes on from the log", error)
            self._astray = True
            return False

    def _go_back(self) -> None:
        """Drops what is in memory, as a crash would, but for the base model; then takes up the unfinished jobs."""
        self._watch.count("store_lost")
        self._sampling.clear()
        for model_id in self._residency.models:
            self._residency.discard_model(model_id)
        self._lanes.clear()
        self._ledger.release()
        self._astray, self._more_queued = False, True

    def _turn(self, claim: bool) -> bool:
        left = self._more_queued or (self._samples_queued and self._sampling.room() > 0)
        if claim or left or time.monotonic() - self._claimed_at > IDLE_SECONDS:
            self._claim()
        self._close_gaps()
        self._shared_at = time.monotonic()
        trained = self._train()
        self._sample()
        self._keep_house()
        queued = self._more_queued or self._samples_queued
        return bool(queued or self._pruning or trained or self._sampling.busy)

    def _close(self) -> None:
        for model_id in self._residency.models:
            self._to_disk(self._residency.write_point, model_id)
        self._ledger.release()
        self._trials.close()
        self._ledger.announce("stopped", "")

    # Taking in

    def _hear(self, seconds: float) -> bool:
        """Waits for a ring that work was submitted; drops the samples that the ring says were given up."""
        messages = self._bell.wait(seconds) if self._bell is not None else []
        self._sampling.give_up(messages)
        return bool(messages)

    def _claim(self) -> None:
        """Takes in what is queued, so that nobody's work is hidden behind another's, however much that is.

        While the sampler is full, samples of owners that have many in it stay in the queue, and all else passes them.
        """
        self._more_queued = True
        while self._more_queued:
            room = self._sampling.room()
            limit = min(CLAIM_LIMIT, room) if room else CLAIM_LIMIT
            headers = self._ledger.claim(limit, crowded=() if room else self._sampling.crowded())
            self._more_queued = len(headers) == limit
            self._samples_queued = not room
            for header in headers:
                if header.kind != "sample":
                    self._enqueue(header)
            self._sampling.hold(header for header in headers if header.kind == "sample")
        self._claimed_at = time.monotonic()

    def _enqueue(self, header: Header) -> None:
        lane = self._lanes.get(header.subject)
        if lane is None:
            lane = self._lanes[header.subject] = self._open_lane(header.subject)
        lane.waiting[header.seq] = header

    def _open_lane(self, model_id: str) -> Lane:
        record = self._ledger.find_model(model_id)
        after = -1 if record is None or record.recovery_seq is None else record.recovery_seq
        lane = Lane(after + 1)
        self._catch_up(model_id, lane)
        return lane

    def _catch_up(self, model_id: str, lane: Lane) -> None:
        """Moves past operations that ended without this engine: refused at the door, or done before it started."""
        for past in self._ledger.history(model_id, lane.next_seq - 1):
            lane.next_seq = past.header.seq + 1
            if past.ran or past.chunked:
                self._note_end(lane, past.header, past.category, chunked=past.chunked)

    def _waiting(self) -> dict[str, dict[int, Header]]:
        return {model_id: lane.waiting for model_id, lane in self._lanes.items() if lane.waiting}

    def _next_seqs(self) -> dict[str, int]:
        return {model_id: lane.next_seq for model_id, lane in self._lanes.items()}

    def _close_gaps(self) -> None:
        now = time.monotonic()
        for model_id in gaps(self._waiting(), self._next_seqs()):
            lane = self._lanes[model_id]
            self._catch_up(model_id, lane)
            if lane.next_seq in lane.waiting:
                lane.gap_since = None
            elif lane.gap_since is None:
                lane.gap_since = now
            elif now - lane.gap_since > GAP_SECONDS:
                self._ledger.skip(lane.waiting[min(lane.waiting)], lane.next_seq)

    # Training

    def _plan(self) -> Plan:
        return plan(self._waiting(), self._next_seqs(), self._shares, budget=BATCH_TOKENS, max_models=self._max_models)

    def _train(self) -> bool:
        """Runs what is due, and says whether anything was.

        The batch is planned after the barriers: a model whose optim_step has just run joins the others' batch with
        its next forward_backward, instead of taking turns with them for ever.
        """
        work = self._plan()
        for header in work.barriers:
            self._run_barrier(header)
        batch = apart(self._plan().batch if work.barriers else work.batch, self._trials.suspects)
        if batch:
            self._run_batch(batch)
        return bool(work.barriers or batch)

    def _run_barrier(self, header: Header) -> None:
        lane = self._lanes[header.subject]
        self._watch.begin([header])
        error = attempt(self._trials, header, partial(self._perform, header, lane))
        failure = None if error is None else failed(header, error)
        if failure is not None:
            self._ledger.complete([failure])
            self._undo(header)
        self._shares.charge([header])
        self._end(header, failure)

    def _perform(self, header: Header, lane: Lane) -> None:
        body = self._ledger.payloads([header])[header.number]
        if header.seq > 0:
            self._residency.require_model(header.subject)
        if header.kind == "optim_step" and lane.lost_chunk is not None:
            raise UserError(
                f"no step was taken: {lane.lost_chunk}, so the accumulated gradient was incomplete. It has been "
                "cleared; send the whole forward_backward again, then optim_step"
            )
        with self._trials.training([header.number]):
            self._operations.perform(header, body)
        lane.stepped |= header.kind in ("optim_step", "load_weights")

    def _undo(self, header: Header) -> None:
        """What a failed barrier leaves behind: no half-made or half-loaded model, no gradient that a step refused."""
        if header.seq == 0:
            self._residency.discard_model(header.subject)
            self._ledger.update_model(header.subject, state="failed")
        elif header.kind == "load_weights":
            self._residency.discard_model(header.subject)
        elif header.kind == "optim_step" and header.subject in self._residency.models:
            self._trainer.discard_gradient(header.subject)

    def _run_batch(self, batch: tuple[Header, ...]) -> None:
        self._watch.begin(batch)
        bodies = self._ledger.payloads(batch)
        wanted = frozenset(header.subject for header in batch)
        ready: list[Header] = []
        calls: list[ModelCall] = []
        outcomes: dict[int, Outcome] = {}
        for header in batch:
            error = attempt(self._trials, header, partial(self._prepare, header, bodies, wanted, calls))
            if error is None:
                ready.append(header)
            else:
                outcomes[header.number] = failed(header, error)
        outcomes |= self._forward_backward(ready, calls)
        self._ledger.complete([outcomes[header.number] for header in batch])
        self._shares.charge(batch)
        for header in batch:
            self._end(header, outcomes[header.number])

    def _prepare(
        self, header: Header, bodies: dict[int, bytes], wanted: frozenset[str], calls: list[ModelCall]
    ) -> None:
        """Adds a job's call to `calls`, with its model on the device."""
        self._residency.require_model(header.subject, wanted)
        calls.append(ModelCall(header.subject, TrainCall.from_bytes(bodies[header.number])))

    def _forward_backward(self, headers: list[Header], calls: list[ModelCall]) -> dict[int, Outcome]:
        if not calls:
            return {}
        others: list[Exception] = []
        try:
            with self._trials.training([header.number for header in headers]):
                results = self._trainer.forward_backward(calls, partial(self._let_others_in, others))
        except Exception as error:  # the trainer itself broke: nobody's gradient can be trusted
            if error in others:  # it did not
                raise
            raise_if_lost(error)
            log.exception("a batch of %d requests failed", len(calls))
            results = [TinsmithError(f"failed on the server: {type(error).__name__}: {error}") for _ in headers]
        return {header.number: outcome_of(header, result) for header, result in zip(headers, results, strict=True)}

    def _end(self, header: Header, outcome: Outcome | None) -> None:
        """Moves past a job; an operation that went well has no `outcome` here."""
        self._trials.end(header.number)
        self._watch.end(header, outcome)
        category = None if outcome is None else outcome.category
        lane = self._lanes[header.subject]
        lane.waiting.pop(header.seq, None)
        lane.next_seq = header.seq + 1
        lane.used_at = time.monotonic()
        self._residency.advance(header.subject, header.seq)
        chunked = category is not None and not header.is_barrier and self._ledger.was_chunked(header)
        self._note_end(lane, header, category, chunked=chunked)

    def _note_end(self, lane: Lane, header: Header, category: str | None, *, chunked: bool) -> None:
        if header.kind == "optim_step":
            lane.lost_chunk = None
        elif header.kind == "forward_backward" and category == "server":
            lane.lost_chunk = f"{header.request_id} met a server error"
        elif header.kind == "forward_backward" and category is not None and chunked:
            lane.lost_chunk = f"request {header.request_id}, a part of a larger forward_backward, failed"

    # Sampling

    def _let_others_in(self, broken: list[Exception]) -> None:
        """Between two micro-batches: takes in what was asked for, and gives sampling its turn. Notes what breaks."""
        try:
            if self._hear(0.0):
                self._claim()
            self._sample()
        except Exception as error:
            broken.append(error)
            raise

    def _sample(self) -> None:
        self._trials.pulse()
        self._sampling.take_turn(self._shared_at)
        self._shared_at = time.monotonic()

    # House-keeping

    def _keep_house(self) -> None:
        self._silence.look()
        now = time.monotonic()
        model_id = self._points.due(self._unwritten(), now)
        if model_id is not None:
            self._write_point(model_id)
            self._points.wrote(model_id, now, time.monotonic())
        if now - self._kept_house_at > KEEP_HOUSE_SECONDS:
            self._kept_house_at = now
            self._shares.weights = self._ledger.weights()
            self.close_models()
            self.rest_silent_models()
            self.drop_abandoned_samples()
            for folder in self._ledger.drop_expired_checkpoints(time.time()):
                remove_folder(folder)
            self._pruning = True
        if now - self._kept_order_at > KEEP_ORDER_SECONDS:
            self._kept_order_at = now
            self._ledger.forget(time.time(), self._silence.since(SILENT_SECONDS))
            if self.drop_superseded_snapshots():  # more are left: a few every second, so that nobody waits for it
                self._kept_order_at = now - KEEP_ORDER_SECONDS + 1.0
        if self._pruning:  # a little every turn, so that nobody waits for it
            self._pruning = self._ledger.prune(self._silence.since(self._future_seconds))

    def write_points(self) -> None:
        """Gives every model that has stepped since its last recovery point a new one."""
        for model_id in list(self._unwritten()):
            self._write_point(model_id)

    def _unwritten(self) -> Iterator[str]:
        """Models on the device that have stepped since their last recovery point."""
        resident = frozenset(self._residency.models)
        for model_id, lane in self._lanes.items():
            if lane.stepped and model_id in resident:
                yield model_id

    def _write_point(self, model_id: str) -> None:
        self._lanes[model_id].stepped = not self._to_disk(self._residency.write_point, model_id)

    def close_models(self) -> None:
        """Frees the models of sessions that are over, once nothing of theirs waits."""
        for model_id in self._ledger.closing_models(self._silence.since(SILENT_SECONDS)):
            lane = self._lanes.get(model_id)
            if lane is not None and lane.waiting:
                continue
            self._residency.close_model(model_id)
            self._ledger.update_model(model_id, state="closed", recovery_seq=None, recovery_folder=None)
            self._lanes.pop(model_id, None)
            self._shares.forget(model_id)
            self._points.forget(model_id)

    def rest_silent_models(self) -> None:
        """Moves what silent clients have on the device to disk; it comes back with their next request."""
        for model_id in self._ledger.silent_models(self._silence.since(PATIENCE_SECONDS)):
            lane = self._lanes.get(model_id)
            if not (lane and lane.waiting):
                self._to_disk(self._residency.rest, model_id)

    def drop_abandoned_samples(self) -> None:
        """Drops the samples of silent clients, and those given up by a client whose ring was lost."""
        if numbers := self._sampling.under_way():
            gone = self._ledger.abandoned(list(numbers), self._silence.since(PATIENCE_SECONDS))
            self._sampling.give_up(numbers[number] for number in gone)

    def drop_superseded_snapshots(self) -> bool:
        """Deletes some unnamed snapshots that were superseded, once nobody has sampled from them for long enough.

        Returns whether there may be more.
        """
        if not self._snapshot_seconds:
            return False
        unused_since = self._silence.since(self._snapshot_seconds)  # nobody could use any while there was no server
        released, more = self._ledger.release_superseded_snapshots(unused_since)
        for snapshot_id, model_id in released:
            log.info("deleting snapshot %s, superseded and long unused", snapshot_id)
            self._residency.delete_snapshot(snapshot_id, model_id)
        return more

    def _to_disk(self, write: Callable[[str], None], model_id: str) -> bool:
        """Whether a model could be written. If not, it stays, and the log still holds everything behind its points."""
        try:
            write(model_id)
        except Exception as error:  # a full disk, say
            raise_if_lost(error)
            log.error("no recovery point for %s: %s", model_id, error, exc_info=not isinstance(error, TinsmithError))
            self._watch.count("not_written")
            return False
        return True
