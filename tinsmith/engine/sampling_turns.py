"""Sampling's turns of the device: which samples are inside the sampler, and how they get in and out of it.

The loop hands over the samples that it has claimed and gives a turn after every slice of training; their jobs end here.
Knows neither training nor the sampler's own scheduling.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING

from tinsmith.engine.entering import RECENT_SECONDS, Passes, Session, entering, session_of, tenants
from tinsmith.engine.outcomes import attempt, failed, outcome_of
from tinsmith.engine.planning import apart
from tinsmith.engine.residency import Residency
from tinsmith.engine.shares import Shares
from tinsmith.engine.trials import Trials
from tinsmith.engine.watching import Watch
from tinsmith.errors import TinsmithError, UserError
from tinsmith.lost_device import raise_if_lost
from tinsmith.protocols import Finished, Sampler, SnapshotCall
from tinsmith.wire.jobs import Header, Outcome
from tinsmith.wire.packing import SampleCall

if TYPE_CHECKING:
    from tinsmith.store.ledger import Ledger
    from tinsmith.store.records import SamplerRecord

Ended = tuple[Header, Outcome]

log = logging.getLogger(__name__)

MAX_SAMPLING = 4_096  # requests inside the sampler; further ones stay in the queue
MAX_SAMPLING_TOKENS = 2**26  # of their prompts and what they may generate, at about 40 bytes each
KEPT_FREE = 16  # an owner may always have one part in so many inside, however full the sampler is
TELL_SECONDS = 0.03  # how often clients that read along hear of new tokens, at most


class SamplingTurns:
    """The samples that an engine has taken from the queue, from `hold` to the end of their jobs."""

    def __init__(
        self,
        ledger: "Ledger",
        sampler: Sampler,
        residency: Residency,
        trials: Trials,
        watch: Watch,
        shares: Shares,
    ) -> None:
        self._ledger = ledger
        self._sampler = sampler
        self._residency = residency
        self._trials = trials
        self._watch = watch
        self._shares = shares
        self._inside: dict[str, Header] = {}  # by request id
        self._samples: dict[Session, int] = {}  # inside, of each session that has any
        self._held: list[Header] = []  # wait until the sampler is free for them
        self._ending: deque[tuple[Future[list[str]], list[Ended]]] = deque()  # their results are being written
        self._told_at = 0.0
        self._passes = Passes()
        self._ended_at: dict[Session, float] = {}  # when each one's last sample did, if that was just now

    @property
    def busy(self) -> bool:
        """Whether a turn would have anything to do."""
        return bool(self._held or self._sampler.load)

    def room(self) -> int:
        """How many further requests may enter the sampler."""
        taken = [*self._inside.values(), *self._held]
        if sum(header.tokens for header in taken) >= MAX_SAMPLING_TOKENS:
            return 0
        return max(0, MAX_SAMPLING - len(taken))

    def crowded(self) -> list[str]:
        """Owners that have so much in the full sampler that they must wait for room; any other may still enter."""
        requests: Counter[str] = Counter()
        tokens: Counter[str] = Counter()
        for header in (*self._inside.values(), *self._held):
            requests[header.owner] += 1
            tokens[header.owner] += header.tokens
        return [
            owner
            for owner in requests
            if requests[owner] * KEPT_FREE >= MAX_SAMPLING or tokens[owner] * KEPT_FREE >= MAX_SAMPLING_TOKENS
        ]

    def under_way(self) -> dict[int, str]:
        """Job number → request id of what is inside the sampler."""
        return {header.number: request_id for request_id, header in self._inside.items()}

    def hold(self, headers: Iterable[Header]) -> None:
        """Takes over samples that were claimed; they enter the sampler with the next turn."""
        self._held.extend(headers)

    def take_turn(self, since: float) -> None:
        """Steps the sampler at least once, and for as long as training has just had the device: from `since` to now.

        So either has half of the time while both have work, and a token waits for one micro-batch at most.
        """
        began = time.monotonic()
        self._settle(1)
        self._admit()
        until = 2 * time.monotonic() - since
        while self._sampler.load:
            self._watch.step(len(self._inside))
            samples = tenants(self._samples)
            with self._trials.sampling([header.number for header in self._inside.values()]):
                finished = self._step()
            ended = [(self._take_out(end.request_id), end.output) for end in finished]
            self._end([(header, outcome_of(header, output)) for header, output in ended])
            self._tell()
            began, before = time.monotonic(), began
            self._passes.saw(samples, began - before)
            if began >= until:
                break
        self._settle(1 if self.busy else 0)

    def give_up(self, request_ids: Iterable[str]) -> None:
        """Drops those samples under way that nobody waits for any more; their jobs have ended already."""
        gone = set(request_ids)
        self._held = [header for header in self._held if header.request_id not in gone]
        for request_id in gone:
            if request_id in self._inside:
                self._take_out(request_id)
                self._sampler.cancel(request_id)

    def clear(self) -> None:
        """Drops everything, as a crash would; the jobs have not ended."""
        for request_id in self._inside:
            self._sampler.cancel(request_id)
        self._inside.clear()
        self._samples.clear()
        self._held.clear()
        self._ending.clear()

    def _admit(self) -> None:
        """Hands held samples to the sampler; suspects of an engine's death go apart, once it has become empty."""
        if not self._held:
            return
        admitted: Sequence[Header] = ()
        if not any(header.number in self._trials.suspects for header in self._held):
            admitted = entering(self._held, self._samples, self._recent(), self._passes.doubling, self._shares.weights)
        elif not self._sampler.load:
            admitted = apart(self._held, self._trials.suspects)
        numbers = {header.number for header in admitted}
        self._held = [header for header in self._held if header.number not in numbers]
        self._start(admitted)

    def _recent(self) -> list[Session]:
        """Sessions whose last sample has ended just now."""
        since = time.monotonic() - RECENT_SECONDS
        self._ended_at = {session: at for session, at in self._ended_at.items() if at > since}
        return list(self._ended_at)

    def _start(self, headers: Sequence[Header]) -> None:
        if not headers:
            return
        self._watch.begin(headers)
        bodies = self._ledger.payloads(headers)
        samplers = {subject: self._ledger.find_sampler(subject) for subject in {header.subject for header in headers}}
        failures = []
        for header in headers:
            if header.number not in bodies:  # given up before it began, and its payload deleted
                continue
            error = attempt(self._trials, header, partial(self._submit, header, bodies[header.number], samplers))
            if error is not None:
                failures.append((header, failed(header, error)))
        self._end(failures)

    def _submit(self, header: Header, body: bytes, samplers: "Mapping[str, SamplerRecord | None]") -> None:
        record = samplers[header.subject]
        if record is None:
            raise UserError(f"no sampling session {header.subject}")
        with self._trials.sampling([header.number]):
            snapshot_id = self._residency.require_snapshot(record.snapshot, record.model_id)
        call = SnapshotCall(
            header.request_id,
            snapshot_id,
            record.session_id,
            SampleCall.from_bytes(body),
            header.owner,
            self._shares.weight(header.owner),
        )
        self._sampler.submit(call)
        self._inside[header.request_id] = header
        session = session_of(header)
        self._samples[session] = self._samples.get(session, 0) + 1

    def _take_out(self, request_id: str) -> Header:
        """What was inside under this id, and is not any more."""
        header = self._inside.pop(request_id)
        session = session_of(header)
        self._samples[session] -= 1
        if not self._samples[session]:
            del self._samples[session]
        return header

    def _step(self) -> list[Finished]:
        try:
            return self._sampler.step()
        except Exception as error:  # the sampler itself broke: nothing that it holds can be trusted, training can
            raise_if_lost(error)
            log.exception("the sampler broke; its %d requests end", len(self._inside))
            failure = TinsmithError(f"failed on the server: {type(error).__name__}: {error}")
            for request_id in self._inside:
                self._sampler.cancel(request_id)
            return [Finished(request_id, failure) for request_id in self._inside]

    def _tell(self) -> None:
        """Tells those who read along what they have got."""
        now = time.monotonic()
        if now - self._told_at >= TELL_SECONDS:
            self._told_at = now
            self._ledger.tell(self._sampler.progress())

    def _end(self, ended: list[Ended]) -> None:
        """Ends jobs: the next pass runs while their results are written."""
        if not ended:
            return
        self._ending.append((self._ledger.complete_soon([outcome for _, outcome in ended]), ended))
        now = time.monotonic()
        for header, _ in ended:
            self._ended_at[session_of(header)] = now

    def _settle(self, most: int) -> None:
        """Takes note of results that have been written, after waiting for all but `most` writes of some."""
        while self._ending and (len(self._ending) > most or self._ending[0][0].done()):
            writing, ended = self._ending.popleft()
            writing.result()
            for header, outcome in ended:
                self._trials.end(header.number)
                self._watch.end(header, outcome)
