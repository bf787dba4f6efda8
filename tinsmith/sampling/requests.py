"""A sampling request under way, its samples, and what is refused at the door.

Knows the packed call and the names of weights; no tensors are computed here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from tinsmith.errors import TinsmithError, UserError
from tinsmith.models.lora import Adapter
from tinsmith.protocols import SnapshotCall, Weights
from tinsmith.sampling.scoring import PromptScores
from tinsmith.wire.packing import SampleCall, SampleOutput
from tinsmith.wire.progress import Progress


@dataclass(frozen=True, slots=True, eq=False)
class Snapshot:
    """Published weights. `version` is unique: publishing an id again makes another snapshot.

    The base model has neither adapter nor module nor weights of its own.
    """

    snapshot_id: str
    version: int
    weights: Weights | None = None
    adapter: Adapter | None = None
    module: nn.Module | None = None


@dataclass(slots=True, eq=False)
class Request:
    """One call and its samples. `limit` is the most tokens a sample may have, `digests` name the prompt's
    blocks in the cache, beginning at `root`."""

    call: SnapshotCall
    snapshot: Snapshot
    prompt: list[int]
    limit: int
    stop_tokens: frozenset[int]
    scores: PromptScores
    root: bytes
    digests: list[bytes]
    samples: "list[Sample]" = field(default_factory=list)
    cache_hit_tokens: int | None = None  # None until the prompt is first admitted
    forked: bool = False  # whether the prompt has been through the model, so that all samples may run
    unfinished: int = 0  # samples
    suspect: bool = False  # whether a pass with it in company broke, so that it must run alone

    @property
    def request_id(self) -> str:
        return self.call.request_id

    def output(self) -> SampleOutput:
        """What the caller gets, once all samples have ended."""
        lengths = [len(sample.tokens) for sample in self.samples]
        extras = self.scores.extras()
        k = self.call.call.topk_sample_logprobs
        if k:
            extras["topk_sample_ids"] = _stack([sample.top_ids for sample in self.samples], k, np.int32)
            extras["topk_sample_logprobs"] = _stack([sample.top_logprobs for sample in self.samples], k, np.float32)
        return SampleOutput(
            tokens_S=np.array([token for sample in self.samples for token in sample.tokens], np.int32),
            logprobs_S=np.array([value for sample in self.samples for value in sample.logprobs], np.float32),
            offsets=np.cumsum([0, *lengths], dtype=np.int64),
            stopped=np.array([sample.stopped for sample in self.samples], np.int8),
            cache_hit_tokens=self.cache_hit_tokens or 0,
            extras=extras,
            prompt_tokens=len(self.prompt),
        )

    def news(self) -> list[Progress]:
        """What its samples have got since the last call."""
        return [sample.news() for sample in self.samples if len(sample.tokens) > sample.told]


def _stack(parts: Sequence[list[Sequence[Any]]], k: int, dtype: type) -> NDArray[Any]:
    rows = [row for part in parts for row in part]
    return np.array(rows, dtype).reshape(len(rows), k)


@dataclass(slots=True, eq=False)
class Sample:
    """One continuation of a request's prompt. `key` is its arrival number.

    Of its tokens, `computed` have keys and values in `blocks`; `digests` name those of the blocks that are full.
    """

    request: Request
    index: int
    key: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_ids: list[Sequence[int]] = field(default_factory=list)
    top_logprobs: list[Sequence[float]] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    computed: int = 0
    told: int = 0  # tokens that `news` has given
    stopped: bool = False

    @property
    def tenant(self) -> str:
        return self.request.call.tenant

    @property
    def length(self) -> int:
        """Tokens of prompt and continuation."""
        return len(self.request.prompt) + len(self.tokens)

    @property
    def pending(self) -> int:
        """Tokens that have not been through the model."""
        return self.length - self.computed

    @property
    def known_digests(self) -> list[bytes]:
        """Names of its first blocks, as far as they are known: from before a preemption, or from the prompt."""
        return max(self.digests, self.request.digests, key=len)

    def append(self, new: "NextToken") -> None:
        self.tokens.append(new.token)
        self.logprobs.append(new.logprob)
        if new.top_ids:
            self.top_ids.append(new.top_ids)
            self.top_logprobs.append(new.top_logprobs)

    def news(self) -> Progress:
        """The tokens since the last call."""
        start, self.told = self.told, len(self.tokens)
        return Progress(
            self.request.request_id,
            self.index,
            start,
            self.tokens[start:],
            self.logprobs[start:],
            [list(ids) for ids in self.top_ids[start:]],
            [list(logprobs) for logprobs in self.top_logprobs[start:]],
        )

    @property
    def adapter(self) -> Adapter | None:
        return self.request.snapshot.adapter

    def slice(self, start: int, end: int) -> list[int]:
        """Tokens of prompt and continuation at positions `start` to `end`."""
        offset = len(self.request.prompt)
        if start >= offset:
            return self.tokens[start - offset : end - offset]
        return self.request.prompt[start:end] + self.tokens[: max(0, end - offset)]


@dataclass(frozen=True, slots=True)
class NextToken:
    """What the model says follows; meaningless unless `finite`. The top lists are as long as was asked for."""

    sample: Sample
    token: int
    logprob: float
    finite: bool
    top_ids: Sequence[int] = ()
    top_logprobs: Sequence[float] = ()


def check(call: SampleCall, *, vocab_size: int, max_context: int) -> None:
    """Raises UserError for a call that can never run."""
    prompt = call.prompt_P
    if not 1 <= len(prompt) <= max_context - 1:
        raise UserError(
            f"The prompt has {len(prompt)} tokens; this model takes 1 to {max_context - 1}"
            f" (a context of {max_context} less one token to sample)."
        )
    _within("prompt tokens", int(prompt.min()), 0, vocab_size - 1)
    _within("prompt tokens", int(prompt.max()), 0, vocab_size - 1)
    _within("num_samples", call.num_samples, 1, None)
    _within("max_tokens", 1 if call.max_tokens is None else call.max_tokens, 1, None)
    if not (math.isfinite(call.temperature) and call.temperature >= 0):
        raise UserError(f"temperature is {call.temperature}; allowed are 0 (greedy) and positive numbers.")
    if call.top_k != -1 and call.top_k < 1:
        raise UserError(f"top_k is {call.top_k}; allowed are -1 (off) and positive numbers.")
    if not 0 < call.top_p <= 1:
        raise UserError(f"top_p is {call.top_p}; allowed is more than 0 and at most 1.")
    if any(not string for string in call.stop_strings):
        raise UserError("A stop string is empty; it would end every sample before its first token.")
    _check_prompt_scores(call, vocab_size)


def _check_prompt_scores(call: SampleCall, vocab_size: int) -> None:
    rows = len(call.prompt_P) - 1
    for name in ("topk_prompt_logprobs", "topk_sample_logprobs", "prompt_alt_tokens_k"):
        _within(name, getattr(call, name), 0, vocab_size)
    if call.prompt_logprobs_last_n is not None:
        if not call.prompt_logprobs:
            raise UserError("prompt_logprobs_last_n is set, but prompt_logprobs is not.")
        _within("prompt_logprobs_last_n", call.prompt_logprobs_last_n, 1, rows)
    targets = call.target_prompt_tokens
    if targets is None:
        return
    if targets.ndim not in (1, 2) or targets.shape[0] != rows + 1 or targets.size == 0:
        raise UserError(
            f"target_prompt_logprobs has shape {list(targets.shape)}; allowed is one row for each of the {rows + 1}"
            " prompt tokens, with one target or more."
        )
    _within("target_prompt_logprobs", int(targets.min()), -1, vocab_size - 1)
    _within("target_prompt_logprobs", int(targets.max()), -1, vocab_size - 1)
    if targets[0].max() >= 0:
        raise UserError("target_prompt_logprobs names a target for the first prompt token, which nothing predicts.")


def _within(name: str, value: int, least: int, most: int | None) -> None:
    if value < least or (most is not None and value > most):
        allowed = f"{least} or more" if most is None else f"{least} to {most}"
        raise UserError(f"{name}: {value} is not allowed; allowed is {allowed}.")


def diverged(request: Request) -> UserError:
    """The error of a request whose logits are not finite."""
    snapshot_id = request.snapshot.snapshot_id
    return UserError(f"Snapshot {snapshot_id!r} gives logits that are not finite; its weights have probably diverged.")


def broken(error: Exception) -> TinsmithError:
    """The error of a request that broke the pass it was alone in."""
    return TinsmithError(f"Sampling failed on the server: {type(error).__name__}: {error}")
