"""One exercise for every public method of the SDK, by class and name: what it is called with, and what must come back.

An `x_async` is exercised like its `x`. A class that only forwards to another one (the futures of clients) borrows that
one's exercises.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any

import tinker
import torch
from tinker import types
from tinker.lib.api_future_impl import QueueState
from tinker.lib.public_interfaces import (
    AdminClient,
    APIFuture,
    AwaitableConcurrentFuture,
    BackcompatSamplingClientFuture,
    BackcompatTrainingClientFuture,
    LossHandle,
    RestClient,
)

from tests.contract.datums import greedy, rollout, supervised, tokens

DATUMS = [supervised(tokens(12, seed)) for seed in range(2)]
PROMPT = types.ModelInput.from_ints(tokens(8))
ADAM = types.AdamParams(learning_rate=1e-3)
PROJECT = "compatibility"
HOURS = {
    "starting_on": datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=1),
    "ending_before": datetime.now(UTC).replace(minute=0, second=0, microsecond=0) + timedelta(hours=2),
}


def squared(logprobs: torch.Tensor, advantages: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A loss that can be traced."""
    loss = -(logprobs * advantages).sum() + 0.01 * (logprobs**2).sum()
    return loss, {"custom/squared:sum": loss}


def plain(_data: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    """A loss that runs in the client."""
    return torch.stack([one.sum() for one in logprobs]).sum(), {}


class World:
    """One session against one server, with something of everything in it, made when it is first asked for."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        self.service = tinker.ServiceClient(base_url=base_url, project_id=PROJECT, display_name="compatibility")
        self.rest = RestClient(base_url=base_url)
        self.admin = AdminClient(base_url=base_url)
        self._names = itertools.count()

    def name(self) -> str:
        """A name that no checkpoint has yet."""
        return f"c{next(self._names):03d}"

    @property
    def session_id(self) -> str:
        return str(self.service.holder.get_session_id())

    @cached_property
    def training_future(self) -> BackcompatTrainingClientFuture:
        return self.service.create_lora_training_client("tiny", rank=4, seed=1, user_metadata={"made": "here"})

    @cached_property
    def training(self) -> tinker.TrainingClient:
        return self.training_future.result()

    @cached_property
    def sampling_future(self) -> BackcompatSamplingClientFuture:
        return self.service.create_sampling_client(base_model="tiny")

    @cached_property
    def sampling(self) -> tinker.SamplingClient:
        return self.sampling_future.result()

    @cached_property
    def state(self) -> str:
        return self.save()

    @cached_property
    def run_id(self) -> str:
        return str(self.training.model_id)

    @cached_property
    def snapshot(self) -> str:
        return str(self.training.save_weights_for_sampler(self.name()).result().path)

    @cached_property
    def export(self) -> str:
        return str(self.training.save_weights_external(self.name()).result().path)

    @property
    def sampler_id(self) -> str:
        assert self.sampling
        return str(self.rest.get_session(self.session_id).result().sampler_ids[0])

    @cached_property
    def loss(self) -> LossHandle:
        return self.service.create_custom_loss(squared, {"logprobs": 1, "advantages": 1}).result()

    def save(self) -> str:
        """The path of a new checkpoint."""
        return str(self.training.save_state(self.name()).result().path)

    def future(self) -> AwaitableConcurrentFuture[Any]:
        """The future of something quick."""
        future = self.rest.get_server_capabilities()
        assert isinstance(future, AwaitableConcurrentFuture)
        return future


Arguments = Callable[[World], tuple[Any, ...]]


def none(_world: World) -> tuple[Any, ...]:
    """No arguments."""
    return ()


@dataclass(frozen=True)
class Case:
    """What a method is called with, and whether its result (futures resolved) is right."""

    arguments: Arguments = none
    check: Callable[[Any, World], object] = lambda result, _world: result is not None
    keywords: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    local: bool = False  # the server has no part in it
    fresh: Callable[[World], Any] | None = None  # an object of its own, which the call uses up


def is_none(result: Any, _world: World) -> bool:
    return result is None


def is_path(result: Any, _world: World) -> bool:
    return str(getattr(result, "path", result)).startswith("tinker://")


def trains(result: Any, _world: World) -> bool:
    """A training client that works."""
    return len(result.forward(DATUMS, "cross_entropy").result().loss_fn_outputs) == 2


def samples(result: Any, _world: World) -> bool:
    """A sampling client that works."""
    return len(result.sample(PROMPT, 1, greedy(2)).result().sequences[0].tokens) == 2


def scored(result: Any, _world: World) -> bool:
    return "loss:sum" in result.metrics and len(result.loss_fn_outputs) == 2


def expires(result: Any, world: World) -> bool:
    """The first checkpoint has a lifetime now."""
    del result
    listed = world.rest.list_checkpoints(world.run_id).result().checkpoints
    return next(one for one in listed if one.tinker_path == world.state).expires_at is not None


def is_public(wanted: bool) -> Callable[[Any, World], bool]:
    def check(_result: Any, world: World) -> bool:
        listed = world.rest.list_checkpoints(world.run_id).result().checkpoints
        return next(one for one in listed if one.tinker_path == world.state).public is wanted

    return check


def finished(result: Any, world: World) -> bool:
    """The newest session of the client is over."""
    del result
    page = world.rest.search_sessions(types.SessionSearchRequest(display_name="closing", limit=1)).result()
    return page.sessions[0].status.type == "client_finished"


def used_tokens(result: Any, world: World) -> bool:
    """What the session has trained and sampled was counted."""
    kinds = {event.event_info.type for event in result.data if event.session_id == world.session_id}
    return kinds >= {"training", "sampling_prefill", "sampling_sample", "checkpoint", "storage"}


def opened(world: World) -> tinker.ServiceClient:
    client = tinker.ServiceClient(base_url=world.base_url, display_name="closing")
    assert client.holder.get_session_id()
    return client


def use(world: World) -> tuple[Any, ...]:
    """Trains and samples a little, so that there is something to report."""
    world.training.forward_backward(DATUMS, "cross_entropy").result()
    world.sampling.sample(PROMPT, 1, greedy(2)).result()
    assert world.state
    return ()


def train_custom(world: World) -> tuple[Any, ...]:
    """A loss that the server computes."""
    data = [rollout(tokens(12, seed), [0.0] * 11, [0.5] * 11) for seed in range(2)]
    for datum in data:
        del datum.loss_fn_inputs["logprobs"]
    return data, world.loss


SERVICE = {
    "close": Case(lambda w: ("success",), finished, fresh=opened),
    "copy_weights": Case(lambda w: (w.state,), is_path, note="shares its files with the original, and outlives it"),
    "create_custom_loss": Case(
        lambda w: (lambda logprobs: (logprobs.sum() * float(w.name()[1:]), {}), {"logprobs": 1}),
        lambda handle, w: handle.loss_id is not None,
        note="computed on the server, from a closed list of operators",
    ),
    "create_lora_training_client": Case(
        lambda w: ("tiny",), trains, {"rank": 4, "optimizer": types.AdamOptimizerConfig()}
    ),
    "create_rest_client": Case(check=lambda client, w: client.list_sessions().result().sessions),
    "create_sampling_client": Case(lambda w: (w.snapshot,), samples),
    "create_training_client_from_state": Case(lambda w: (w.state,), trains),
    "create_training_client_from_state_with_optimizer": Case(lambda w: (w.state,), trains),
    "get_console_url": Case(local=True, note="an address of the hosted service"),
    "get_server_capabilities": Case(check=lambda found, w: "tiny" in [m.model_name for m in found.supported_models]),
    "get_telemetry": Case(check=lambda found, w: True, local=True, note="what it sends is taken and dropped"),
    "holder": Case(check=lambda holder, w: holder.get_session_id()),
}

TRAINING = {
    "create_sampling_client": Case(lambda w: (w.snapshot,), samples),
    "forward": Case(lambda w: (DATUMS, "cross_entropy"), scored),
    "forward_backward": Case(lambda w: (DATUMS, "cross_entropy"), scored),
    "forward_backward_custom": Case(
        train_custom, scored, note="a function runs in the client, a loss of `create_custom_loss` on the server"
    ),
    "get_console_url": Case(local=True, note="an address of the hosted service"),
    "get_info": Case(check=lambda info, w: (info.model_data.model_name, info.lora_rank) == ("tiny", 4)),
    "get_telemetry": Case(check=lambda found, w: True, local=True),
    "get_tokenizer": Case(check=lambda tokenizer, w: tokenizer.encode("2+2="), note="on the server's machine"),
    "load_state": Case(lambda w: (w.state,), is_path),
    "load_state_with_optimizer": Case(lambda w: (w.state,), is_path),
    "optim_step": Case(
        lambda w: (ADAM,), lambda result, w: result.metrics is not None, note="AdamW; others are refused"
    ),
    "save_state": Case(lambda w: (w.name(),), is_path, {"ttl_seconds": 3600, "user_metadata": {"step": "1"}}),
    "save_weights_and_get_sampling_client": Case(check=samples, keywords={"kind": "inflight"}),
    "save_weights_external": Case(lambda w: (w.name(),), is_path),
    "save_weights_for_sampler": Case(lambda w: (w.name(),), is_path),
}

SAMPLING = {
    "compute_logprobs": Case(lambda w: (PROMPT,), lambda found, w: len(found) == 8 and found[0] is None),
    "create": Case(lambda w: (w.service.holder,), samples, {"base_model": "tiny"}),
    "from_sampler_handle": Case(lambda w: (w.sampling.get_sampler_handle(),), samples),
    "get_base_model": Case(check=lambda name, w: name == "tiny"),
    "get_sampler_handle": Case(local=True),
    "get_telemetry": Case(check=lambda found, w: True, local=True),
    "get_tokenizer": Case(
        check=lambda tokenizer, w: tokenizer.encode("2+2="),
        note="looked for by the model's name: a folder of that name, or the hub",
    ),
    "on_queue_state_change": Case(lambda w: (QueueState.ACTIVE, None), is_none, local=True),
    "sample": Case(
        lambda w: (PROMPT, 2, greedy(3)),
        lambda found, w: [len(one.tokens) for one in found.sequences] == [3, 3] and len(found.prompt_logprobs) == 8,
        {"include_prompt_logprobs": True, "topk_prompt_logprobs": 2},
    ),
}

ADMIN = {
    "get_audit_log": Case(
        use, lambda log, w: any(one.tinker_path == w.state for one in log.entries), note="an admin sees everybody's"
    ),
    "get_billing_usage": Case(use, used_tokens, HOURS, note="counted when requests end; prices are settings"),
    "get_current_checkpoint_storage_usage": Case(
        use, lambda found, w: found.data[0].size_bytes > 0, {"project_id": PROJECT}
    ),
    "get_telemetry": Case(check=lambda found, w: True, local=True),
}

REST = ADMIN | {
    "assign_session_project": Case(lambda w: (w.session_id, PROJECT), is_none),
    "copy_weights": Case(lambda w: (w.state, "archive"), is_path, {"ttl_seconds": 3600}),
    "delete_checkpoint": Case(lambda w: (w.run_id, w.save().partition(w.run_id + "/")[2]), is_none),
    "delete_checkpoint_from_tinker_path": Case(lambda w: (w.save(),), is_none),
    "export_session_trace": Case(lambda w: (w.session_id,), lambda url, w: url.startswith(w.base_url)),
    "get_external_weights_urls": Case(
        lambda w: (w.export,), lambda found, w: "adapter_model.safetensors" in found.urls, note="signed, for an hour"
    ),
    "get_sampler": Case(lambda w: (w.sampler_id,), lambda found, w: found.base_model == "tiny"),
    "get_server_capabilities": SERVICE["get_server_capabilities"],
    "get_session": Case(lambda w: (w.session_id,), lambda found, w: w.run_id in found.training_run_ids),
    "get_training_run": Case(lambda w: (w.run_id,), lambda run, w: run.user_metadata == {"made": "here"}),
    "get_training_run_by_tinker_path": Case(lambda w: (w.state,), lambda run, w: run.training_run_id == w.run_id),
    "get_weights_info_by_tinker_path": Case(lambda w: (w.state,), lambda info, w: info.lora_rank == 4),
    "list_checkpoints": Case(lambda w: (w.run_id,), lambda found, w: found.checkpoints),
    "list_sessions": Case(check=lambda found, w: w.session_id in found.sessions),
    "list_training_runs": Case(check=lambda found, w: found.training_runs),
    "list_user_checkpoints": Case(check=lambda found, w: found.checkpoints),
    "publish_checkpoint_from_tinker_path": Case(lambda w: (w.state,), is_public(True)),
    "search_sessions": Case(
        lambda w: (types.SessionSearchRequest(display_name="compat"),),
        lambda found, w: found.sessions[0].session_id == w.session_id,
    ),
    "set_checkpoint_ttl_from_tinker_path": Case(lambda w: (w.state, 7200), expires),
    "unpublish_checkpoint_from_tinker_path": Case(lambda w: (w.state,), is_public(False)),
    "whoami": Case(check=lambda me, w: me.org_urn == "tml:organization:tinsmith"),
}

FUTURE = {
    "coroutine": Case(check=lambda found, w: found.supported_models),
    "future": Case(check=lambda found, w: found.result(30).supported_models),
    "result": Case(check=lambda found, w: found.supported_models),
}
CLIENT_FUTURE = {
    "coroutine": Case(),
    "future": Case(check=lambda found, w: found.result(30)),
    "result": Case(),
}

HANDLE = {
    "input_names": Case(check=lambda names, w: names == ("advantages",), local=True),
    "key": Case(local=True),
}


@dataclass(frozen=True)
class Walked:
    """A public class of the SDK: what stands for it, and its exercises."""

    kind: type
    subject: Callable[[World], Any]
    cases: Mapping[str, Case]


CLASSES = (
    Walked(tinker.ServiceClient, lambda w: w.service, SERVICE),
    Walked(tinker.TrainingClient, lambda w: w.training, TRAINING),
    Walked(tinker.SamplingClient, lambda w: w.sampling, SAMPLING),
    Walked(RestClient, lambda w: w.rest, REST),
    Walked(AdminClient, lambda w: w.admin, ADMIN),
    Walked(APIFuture, lambda w: w.future(), FUTURE),
    Walked(AwaitableConcurrentFuture, lambda w: w.future(), FUTURE),
    Walked(BackcompatTrainingClientFuture, lambda w: w.training_future, TRAINING | CLIENT_FUTURE),
    Walked(BackcompatSamplingClientFuture, lambda w: w.sampling_future, SAMPLING | CLIENT_FUTURE),
    Walked(LossHandle, lambda w: w.loss, HANDLE),
)
