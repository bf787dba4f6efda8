"""Sampling between the API's JSON request and protobuf answer, and the flat arrays of `packing`.

What passes `sample_call` can run beside strangers' requests; whether its snapshot exists is not known here.
"""

import math
import secrets
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinsmith.errors import TooLargeError, UserError
from tinsmith.wire import messages_pb2 as pb
from tinsmith.wire.codec import Limits
from tinsmith.wire.packing import Int32, Int64, SampleCall, SampleOutput
from tinsmith.wire.sampling_types import EncodedText, SampleRequest, SamplingParams, TensorData
from tinsmith.wire.tensors import FLOAT32, INT32, INT64, dense_tensor, densify

MAX_STOPS = 256
MAX_STOP_LENGTH = 1000
MAX_COST = 2**31 - 1


def sample_call(request: SampleRequest, limits: Limits) -> SampleCall:
    """The request as flat arrays, checked, with a seed drawn if there is none. Raises UserError, TooLargeError."""
    params = request.sampling_params
    prompt_P = _prompt(request, limits)
    stop_tokens, stop_strings = _stops(params, limits.vocab_size)
    _check_sampling(request, len(prompt_P))
    return SampleCall(
        prompt_P=prompt_P,
        seed=secrets.randbits(63) if params.seed is None else params.seed,
        num_samples=request.num_samples,
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        stop_at_eos=params.stop is None,
        stop_tokens=stop_tokens,
        stop_strings=stop_strings,
        prompt_logprobs=bool(request.prompt_logprobs),
        prompt_logprobs_last_n=request.prompt_logprobs_last_n,
        topk_prompt_logprobs=request.topk_prompt_logprobs,
        topk_sample_logprobs=request.topk_sample_logprobs,
        prompt_alt_tokens_k=request.prompt_alt_tokens_k,
        target_prompt_tokens=_targets(request.target_prompt_logprobs, len(prompt_P), limits),
    )


def sample_cost(call: SampleCall, max_context: int) -> int:
    """The tokens that a request may take: its prompt once, and every sample to its limit."""
    longest = max_context - len(call.prompt_P)
    generated = longest if call.max_tokens is None else min(call.max_tokens, longest)
    return min(len(call.prompt_P) + call.num_samples * generated, MAX_COST)


def _prompt(request: SampleRequest, limits: Limits) -> Int32:
    tokens: list[int] = []
    for index, chunk in enumerate(request.prompt.chunks):
        if not isinstance(chunk, EncodedText):
            kind = type(chunk).__struct_config__.tag
            raise UserError(f"prompt chunk {index} is {kind!r}; this server takes 'encoded_text' only")
        tokens += chunk.tokens
    if not 0 < len(tokens) < limits.max_context:
        raise UserError(
            f"the prompt has {len(tokens)} tokens; 1 to {limits.max_context - 1} are allowed "
            f"(the context of {limits.max_context} holds the prompt and at least one sampled token)"
        )
    return _token_ids(tokens, 0, limits.vocab_size, "prompt token").astype(INT32)


def _stops(params: SamplingParams, vocab_size: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Stop tokens and stop strings, of which at least one is empty."""
    stop = [params.stop] if isinstance(params.stop, str) else params.stop or []
    strings = tuple(entry for entry in stop if isinstance(entry, str))
    tokens = tuple(entry for entry in stop if not isinstance(entry, str))
    if strings and tokens:
        raise UserError(f"stop mixes texts and token ids ({strings[0]!r} and {tokens[0]}); give one kind")
    if len(stop) > MAX_STOPS:
        raise UserError(f"stop has {len(stop)} entries; at most {MAX_STOPS} are allowed")
    for text in strings:
        if not 0 < len(text) <= MAX_STOP_LENGTH:
            raise UserError(f"a stop text has {len(text)} characters; 1 to {MAX_STOP_LENGTH} are allowed")
    _token_ids(list(tokens), 0, vocab_size, "stop token")
    return tokens, strings


def _check_sampling(request: SampleRequest, prompt_tokens: int) -> None:
    params, last_n = request.sampling_params, request.prompt_logprobs_last_n
    if params.top_k == 0:
        raise UserError("top_k is 0; give at least 1, or -1 for no limit")
    if not math.isfinite(params.temperature):
        raise UserError(f"temperature is {params.temperature}; it must be a finite number of at least 0")
    if last_n is not None and not request.prompt_logprobs:
        raise UserError("prompt_logprobs_last_n needs prompt_logprobs")
    if last_n is not None and last_n >= prompt_tokens:
        raise UserError(
            f"prompt_logprobs_last_n is {last_n}; with {prompt_tokens} prompt tokens, {prompt_tokens - 1} is the most"
        )


def _targets(tensor: TensorData | None, prompt_tokens: int, limits: Limits) -> Int64 | None:
    """Targets [P, K] from the wire's [P - 1, K], whose row i belongs to prompt token i + 1; -1 asks for nothing."""
    if tensor is None:
        return None
    name = "target_prompt_logprobs"
    shape = tensor.shape or []
    if tensor.dtype != "int64" or len(shape) != 2 or shape[0] != prompt_tokens - 1 or shape[1] < 1:
        raise UserError(
            f"{name} is {tensor.dtype} of shape {shape}; with {prompt_tokens} prompt tokens it must be int64 "
            f"of shape [{prompt_tokens - 1}, K], K at least 1"
        )
    if (filled := prompt_tokens * shape[1] * INT64.itemsize) > limits.max_bytes:
        raise TooLargeError(f"{name} fills {filled} bytes; the most that this server takes is {limits.max_bytes}")
    values = _token_ids(tensor.data, -1, limits.vocab_size, name)
    if tensor.sparse_crow_indices is not None or tensor.sparse_col_indices is not None:
        crow = np.array(tensor.sparse_crow_indices or [], INT64)
        values = densify(values, crow, np.array(tensor.sparse_col_indices or [], INT64), shape, name, pad=-1)
    if len(values) != shape[0] * shape[1]:
        raise UserError(f"{name} holds {len(values)} values; its shape {shape} needs {shape[0] * shape[1]}")
    nothing = np.full((1, shape[1]), -1, INT64)
    return np.concatenate([nothing, values.reshape(shape)])


def _token_ids(values: list[Any], lowest: int, vocab_size: int, name: str) -> Int64:
    ids = np.array(values) if values else np.empty(0, INT64)
    if ids.dtype.kind != "i":  # fractions, or integers beyond 64 bits
        raise UserError(f"{name}s must be whole numbers from {lowest} to {vocab_size - 1}")
    wrong = np.flatnonzero((ids < lowest) | (ids >= vocab_size))
    if len(wrong):
        raise UserError(f"{name} {wrong[0]} is {ids[wrong[0]]}; {lowest} to {vocab_size - 1} are allowed")
    return ids.astype(INT64, copy=False)


def encode_sample_output(output: SampleOutput) -> bytes:
    """A protobuf SampleResponse."""
    extras = output.extras
    message = pb.SampleResponse(prompt_cache_hit_tokens=output.cache_hit_tokens)
    offsets = output.offsets.tolist()
    for index, (start, end) in enumerate(pairwise(offsets)):
        sequence = message.sequences.add(
            stop_reason=pb.STOP_REASON_STOP if output.stopped[index] else pb.STOP_REASON_LENGTH,
            tokens=output.tokens_S[start:end].astype(INT32, copy=False).tobytes(),
            logprobs=output.logprobs_S[start:end].astype(FLOAT32, copy=False).tobytes(),
        )
        if "topk_sample_ids" in extras:
            ids, logprobs = extras["topk_sample_ids"], extras["topk_sample_logprobs"]
            sequence.topk_sampled_logprobs.CopyFrom(_topk(ids[start:end], logprobs[start:end]))
    if "prompt_logprobs" in extras:
        message.prompt_logprobs = extras["prompt_logprobs"].astype(FLOAT32, copy=False).tobytes()
    if "topk_prompt_ids" in extras:
        message.topk_prompt_logprobs.CopyFrom(_topk(extras["topk_prompt_ids"], extras["topk_prompt_logprobs"]))
    if "target_prompt_logprobs" in extras:
        message.target_prompt_logprobs.CopyFrom(dense_tensor(extras["target_prompt_logprobs"][1:], FLOAT32))
    if "alt_tokens" in extras:
        message.prompt_alt_tokens.tokens.CopyFrom(dense_tensor(extras["alt_tokens"], INT64))
        message.prompt_alt_tokens.logprobs.CopyFrom(dense_tensor(extras["alt_logprobs"], FLOAT32))
    return message.SerializeToString()


def _topk(ids: NDArray[Any], logprobs: NDArray[Any]) -> pb.TopkLogprobs:
    length, k = ids.shape
    return pb.TopkLogprobs(
        token_ids=np.ascontiguousarray(ids, INT32).tobytes(),
        logprobs=np.ascontiguousarray(logprobs, FLOAT32).tobytes(),
        k=k,
        length=length,
    )
