"""The sampler on one device: a continuously running batch over a paged KV cache, with many adapters side by side.

One `step` preempts if blocks run out, admits what fits, runs one packed forward pass per set of base weights (decoding
rows and prefill chunks together), and gives every sequence that reached its end one more token. Decisions are made in
`scheduling`, tokens chosen in `decoding`; this file carries them out. It knows no jobs, no SQL and no clock.

Legend: T rows of a packed batch, D hidden size.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tinsmith.errors import ConfigError, TinsmithError, UserError
from tinsmith.lost_device import raise_if_lost
from tinsmith.models.invariant import RowInvariance
from tinsmith.models.loading import BaseModel
from tinsmith.protocols import Capabilities, Finished, SamplerUsage, SnapshotCall, Weights
from tinsmith.sampling import scheduling
from tinsmith.sampling.batch import NextTokens, Work, attention_reach, forward, next_tokens, score_prompts
from tinsmith.sampling.cuda_decoding import cuda_decoding
from tinsmith.sampling.kv_cache import BlockPool, KVCache, chain_digests
from tinsmith.sampling.lanes import Lanes
from tinsmith.sampling.paged_rows import PagedRows
from tinsmith.sampling.recurrent import StateStore
from tinsmith.sampling.requests import NextToken, Request, Sample, broken, check, diverged
from tinsmith.sampling.scoring import PromptScores
from tinsmith.sampling.seats import Seats
from tinsmith.sampling.snapshots import Snapshots
from tinsmith.sampling.stopping import StopStrings, end_of_sequence_tokens
from tinsmith.wire.progress import Progress

if TYPE_CHECKING:
    from tinsmith.sampling.flights import Flight
    from tinsmith.sampling.graphs import DecodeGraphs

log = logging.getLogger(__name__)

_PREFILL_TOKENS = {"cpu": 512, "cuda": 8192}


def most_prefill_tokens(device: torch.device) -> int:
    """Prompt tokens that one step runs at most: what a decoding sequence may have to wait for."""
    return _PREFILL_TOKENS[device.type]


class TorchSampler:
    """Implements `protocols.Sampler` with the modules of `models`."""

    def __init__(
        self,
        model: BaseModel,
        tokenizer: Any,
        *,
        kv_tokens: int,
        max_running: int,
        block_size: int = 16,
        prefill_tokens: int | None = None,
        snapshot_bytes: int | None = None,
        deterministic: bool = False,
        max_rank: int = 128,
    ) -> None:
        """`kv_tokens` is the cache's size (its memory: that, × layers × 2 × K/V heads × head dimension × dtype).

        At most `max_running` sequences run at once; the others wait. Snapshots may take `snapshot_bytes` of memory
        (None: any number); `excess_bytes` says when they take more.

        If `deterministic`, every result has the bits that training gives, in any company; not those of models with
        recurrent layers. On a GPU it needs a model with exact layers, and takes no full-parameter models; adapters of
        more than `max_rank` decode more slowly there.
        """
        self._model = model
        self._block_size = block_size
        on_gpu = model.device.type == "cuda"
        self._prefill_tokens = prefill_tokens or most_prefill_tokens(model.device)
        self._reach = attention_reach(model)
        self._max_context = min(model.max_context, kv_tokens // block_size * block_size)
        self._stop_strings = StopStrings(tokenizer)
        self._end_tokens = end_of_sequence_tokens(model.module.generation_config, tokenizer)
        pool = BlockPool(kv_tokens // block_size)
        self._cache = KVCache(
            model.cache_shape,
            num_blocks=pool.num_blocks,
            block_size=block_size,
            dtype=model.dtype,
            device=model.device,
        )
        if deterministic and on_gpu and model.exact is None:
            raise ConfigError("a deterministic sampler on a GPU needs a model with exact layers")
        self._cuda = cuda_decoding(
            model, self._cache, max_rows=max_running, max_context=self._max_context, max_rank=max_rank
        )
        self._flight: Flight | None = None  # tokens that are on their way
        self._states = StateStore()
        self._seats = Seats(pool, self._cache, self._states, max_running=max_running, is_recurrent=model.is_recurrent)
        self._deterministic = deterministic and not on_gpu
        quick = None if self._deterministic else model.quick
        self._next_tokens: NextTokens = partial(next_tokens, quick=quick)
        self._lanes: dict[int, Lanes | PagedRows] = {}  # by version of the module that runs; the base is -1
        self._arrivals = count()
        self._snapshots = Snapshots(model, snapshot_bytes)
        self._requests: dict[str, Request] = {}
        self._streams: dict[str, Request] = {}  # those whose callers read along
        self._sampled = 0

    @property
    def load(self) -> int:
        return len(self._requests)

    def capabilities(self) -> Capabilities:
        model = self._model
        return Capabilities(
            architecture=model.architecture,
            vocab_size=model.vocab_size,
            max_context=self._max_context,
            max_lora_rank=0,
            max_adapters=0,
            parameters=model.parameters,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
        )

    def usage(self) -> SamplerUsage:
        pool, block = self._seats.pool, self._block_size
        return SamplerUsage(
            running=len(self._seats.running),
            waiting=len(self._seats.waiting),
            kv_tokens=pool.num_blocks * block,
            kv_tokens_held=(pool.num_blocks - pool.available) * block,
            kv_tokens_kept=pool.reusable * block,
            snapshots=len(self._snapshots) - 1,  # the base model is one, too
            snapshot_bytes=self._snapshots.taken_bytes,
            prefilled=self._seats.prefilled,
            sampled=self._sampled,
            preempted=self._seats.preempted,
        )

    # Snapshots

    @property
    def excess_bytes(self) -> int:
        return self._snapshots.excess_bytes

    def publish(self, snapshot_id: str, weights: Weights | Path) -> None:
        """Raises UserError for the base model's name, and for files that don't fit the base model."""
        self._snapshots.publish(snapshot_id, weights)
        if self._model.exact is not None and self._snapshots.require(snapshot_id).module is not None:
            self._snapshots.retract(snapshot_id)
            raise UserError(
                "full-parameter models can be trained with --deterministic on a GPU, but not sampled: their logprobs "
                "would not be those of training; leave it out, or serve on a CPU"
            )

    def retract(self, snapshot_id: str) -> None:
        """Unknown ids are ignored. Requests under way keep the weights until they end."""
        self._snapshots.retract(snapshot_id)

    def save(self, snapshot_id: str, folder: Path) -> None:
        self._snapshots.save(snapshot_id, folder)

    # Requests

    def submit(self, call: SnapshotCall) -> None:
        if call.request_id in self._requests:
            raise UserError(f"Request {call.request_id!r} is already being sampled.")
        snapshot = self._snapshots.require(call.snapshot_id)
        asked = call.call
        check(asked, vocab_size=self._model.vocab_size, max_context=self._max_context)
        prompt = asked.prompt_P.tolist()
        room = self._max_context - len(prompt)
        root = f"{snapshot.version}".encode()
        request = Request(
            call=call,
            snapshot=snapshot,
            prompt=prompt,
            limit=room if asked.max_tokens is None else min(asked.max_tokens, room),
            stop_tokens=frozenset(asked.stop_tokens) | (self._end_tokens if asked.stop_at_eos else frozenset()),
            scores=PromptScores(asked),
            root=root,
            digests=chain_digests(root, prompt, self._block_size),
            unfinished=asked.num_samples,
        )
        request.samples = [Sample(request, index, next(self._arrivals)) for index in range(asked.num_samples)]
        self._requests[call.request_id] = request
        if asked.stream:
            self._streams[call.request_id] = request
        self._seats.enqueue(request.samples[0])  # the others follow once it has run the prompt

    def cancel(self, request_id: str) -> None:
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._seats.drop(request, forget=False)

    def step(self) -> list[Finished]:
        self._seats.preempt()
        self._seats.admit()
        finished: list[Finished] = []
        batches = self._batches()
        new_lanes = PagedRows if self._deterministic else Lanes
        self._lanes = {version: self._lanes.get(version) or new_lanes(self._cache) for version in batches}
        flight = self._flight
        for version, works in batches.items():
            finished += self._attempt(version, works)
        if self._flight is flight:  # nobody has gone on from it, so its samples go on without it
            self._flight = None
        return finished

    def warm_up(self, on_progress: Callable[[str], None]) -> None:
        """Does beforehand what would otherwise make the first requests wait."""
        if self._cuda is None:
            return
        try:
            self._cuda.warm_up(on_progress)
        except Exception as error:  # a device with less of something; sampling works without, too
            raise_if_lost(error)
            if self._model.exact is not None:
                raise
            log.warning("decoding steps cannot be captured here: %s: %s", type(error).__name__, error, exc_info=True)
            self._cuda = None

    def progress(self) -> list[Progress]:
        self._streams = {name: request for name, request in self._streams.items() if name in self._requests}
        return [part for request in self._streams.values() for part in request.news()]

    def check(self) -> None:
        """Raises AssertionError unless cache and sequences agree; for tests, after each step."""
        self._seats.check(self._max_context)

    # One step

    def _batches(self) -> dict[int, list[Work]]:
        """The step's work by version of the module that runs (the base is -1), sorted by snapshot."""
        samples = self._in_turn()
        is_alone = all(sample.pending > 1 for sample in samples)
        prefilling = [
            scheduling.Prefilling(sample.key, sample.tenant, sample.pending, 1 if is_alone else self._row_cost(sample))
            for sample in samples
            if sample.pending > 1
        ]
        weights = self._seats.weights() if prefilling else {}
        shares = scheduling.prefill_shares(prefilling, self._prefill_tokens, weights)
        batches: dict[int, list[Work]] = defaultdict(list)
        for sample in samples:
            rows = shares.get(sample.key, 0) if sample.pending > 1 else 1
            if rows:
                snapshot = sample.request.snapshot
                batches[-1 if snapshot.module is None else snapshot.version].append(Work(sample, rows))
        for batch in batches.values():
            batch.sort(key=lambda work: work.sample.request.snapshot.version)
        return batches

    def _row_cost(self, sample: Sample) -> int:
        """What a row costs that sees the sample's past, in rows that see none."""
        return 1 if self._reach is None else 1 + sample.computed // self._reach

    def _in_turn(self) -> Sequence[Sample]:
        """All running samples; while requests are suspected of breaking passes, those of the oldest such alone."""
        suspects = [sample for sample in self._seats.running.values() if sample.request.suspect]
        if not suspects:
            return list(self._seats.running.values())
        oldest = min(suspects, key=lambda sample: sample.key).request
        return [sample for sample in suspects if sample.request is oldest]

    def _attempt(self, version: int, works: list[Work]) -> list[Finished]:
        """Runs works; if the pass breaks, its requests begin again one by one, and fail only if they break alone."""
        finished: list[Finished] = []
        try:
            self._run(works, self._lanes[version], finished)
        except Exception as error:  # whatever it was, it must not reach the neighbours
            raise_if_lost(error)
            self._flight = None
            requests = list(dict.fromkeys(work.sample.request for work in works))
            log.exception("a sampling pass of %d requests broke", len(requests))
            del self._lanes[version]
            if len(requests) == 1:
                return [*finished, self._fail(requests[0], broken(error))]
            for request in requests:
                request.suspect = True
                for sample in request.samples:
                    if sample.key in self._seats.running:
                        self._seats.suspend(sample)
        return finished

    def _run(self, works: list[Work], lanes: Lanes | PagedRows, finished: list[Finished]) -> None:
        """Adds to `finished` as it goes: who has ended has ended, also if the rest breaks."""
        cuda = self._cuda if works[0].sample.request.snapshot.module is None else None
        burst = [work.sample for work in cuda.burst(works)] if cuda else []
        decoding = {sample.key for sample in burst}
        others = [work for work in works if work.sample.key not in decoding]
        arithmetic = RowInvariance() if self._deterministic else nullcontext()
        prompts = [sample for sample in self._seats.running.values() if sample.pending > 1]
        with torch.inference_mode(), arithmetic:
            flight = self._take_off(burst, others, cuda.graphs, prompts) if cuda and burst else None
            hidden_TD = self._forward(others, lanes) if others else None
            if flight and prompts:  # the device has the others' rows to do meanwhile
                finished += self._accept(self._counted(flight))
            if hidden_TD is not None:
                finished += self._scored(others, hidden_TD)
            if cuda and flight and not prompts:
                self._flight = self._next_flight(flight, burst, cuda.graphs)
                finished += self._accept(self._counted(flight))

    def _forward(self, works: list[Work], lanes: Lanes | PagedRows) -> Tensor:
        """Hidden states [T, D] of the works' rows."""
        self._seats.make_room([work.sample for work in works], 1)
        layers = self._cuda.layers if self._cuda else None
        return forward(self._model, self._cache, lanes, self._states, works, layers)

    def _scored(self, works: list[Work], hidden_TD: Tensor) -> list[Finished]:
        """Counts the rows that the works have run; a token for every sample that has none left."""
        works = [
            work for work in works if work.sample.key in self._seats.running
        ]  # a sibling in the burst may have failed
        score_prompts(self._model, works, hidden_TD)
        for work in works:
            self._seats.advance(work.sample, work.rows)
        ready = [(work, [work.sample, *self._seats.fork(work.sample)]) for work in works if work.sample.pending == 0]
        choose = self._cuda.next_tokens if self._cuda else self._next_tokens
        return self._accept(choose(self._model, ready, hidden_TD)) if ready else []

    def _take_off(
        self, samples: Sequence[Sample], others: Sequence[Work], graphs: "DecodeGraphs", prompts: Sequence[Sample]
    ) -> "Flight":
        """The burst of these samples that is on its way, or else a new one; leaves the others room for a row each.

        `prompts` are the samples whose prompts are not through yet; `others` run beside the burst.
        """
        flight, self._flight = self._flight, None
        if flight is not None:
            return flight
        rows = {work.sample.key: work.rows for work in others}
        unfinished = {sample.tenant for sample in prompts if sample.pending > rows.get(sample.key, 0)}
        steps = scheduling.burst_steps(
            [sample.request.limit - len(sample.tokens) for sample in samples],
            prompts_wait=bool(prompts),
            prompts_left=unfinished.issuperset(sample.tenant for sample in samples),
            most=graphs.most_steps,
        )
        growth = sum(self._seats.growth(sample, steps) for sample in samples)
        if growth + sum(self._seats.growth(work.sample) for work in others) > self._seats.pool.available:
            steps = 1
        self._seats.make_room(samples, steps)
        return graphs.launch(samples, steps)

    def _next_flight(self, flight: "Flight", samples: Sequence[Sample], graphs: "DecodeGraphs") -> "Flight | None":
        """What follows, if hardly any sample has its last token in this one, and nobody has joined since."""
        steps = flight.steps
        aboard = flight.aboard()
        alive = {row: sample for row, sample in aboard.items() if sample.request.limit - len(sample.tokens) > steps}
        joined = {sample.key for sample in samples} - {sample.key for sample in aboard.values()}
        if joined or not scheduling.worth_going_on(len(alive), len(flight.samples)):
            return None
        growth = sum(self._seats.growth(sample, 2 * steps) for sample in alive.values())
        if growth > self._seats.pool.available or not graphs.can_follow(flight, steps):
            return None
        self._seats.make_room(list(alive.values()), 2 * steps)
        return graphs.follow(flight, alive.keys(), steps)

    def _counted(self, flight: "Flight") -> Iterator[NextToken]:
        """Counts the rows before tokens; drops those of samples that have ended or begun again meanwhile."""
        aboard = {sample.key for sample in flight.aboard().values()}
        for new in flight.tokens():
            if new.sample.key in aboard and new.sample.key in self._seats.running:
                self._seats.advance(new.sample, 1)
                yield new

    def _accept(self, chosen: Iterator[NextToken]) -> list[Finished]:
        """Appends the new tokens; ends samples, and requests whose last sample has ended or whose logits are broken."""
        finished = []
        for new in chosen:
            sample, request = new.sample, new.sample.request
            if request.request_id not in self._requests:
                continue  # an earlier sample of it has just failed
            if not new.finite:
                finished.append(self._fail(request, diverged(request)))
                continue
            request.suspect = False
            sample.append(new)
            self._sampled += 1
            try:
                sample.stopped = self._stops(sample)
            except Exception as error:  # the tokenizer's, about this request's strings and tokens
                log.exception("looking for stop strings broke")
                finished.append(self._fail(request, broken(error)))
                continue
            if sample.stopped or len(sample.tokens) == request.limit:
                del self._seats.running[sample.key]
                self._seats.release(sample)
                request.unfinished -= 1
                if not request.unfinished:
                    del self._requests[request.request_id]
                    finished.append(Finished(request.request_id, request.output()))
        return finished

    def _stops(self, sample: Sample) -> bool:
        strings = sample.request.call.call.stop_strings
        return sample.tokens[-1] in sample.request.stop_tokens or (
            bool(strings) and self._stop_strings.found(strings, sample.tokens)
        )

    def _fail(self, request: Request, error: TinsmithError) -> Finished:
        del self._requests[request.request_id]
        blocks = {block for sample in request.samples for block in sample.blocks}
        self._seats.drop(request, forget=True)
        self._cache.clear_blocks([block for block in blocks if not self._seats.pool.references(block)])
        return Finished(request.request_id, error)
