"""The main path of a training script, for any version of the SDK: run with its Python, it prints what worked.

Standard library and `tinker` only; written so that old versions understand it (futures by `.result()`, no new names).
"""

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import tinker
from tinker import types

warnings.simplefilter("ignore")


def done(value: Any) -> Any:
    """The value itself: some versions return futures where others return clients."""
    return value.result() if hasattr(value, "result") else value


class Path:
    """The steps, in order; each uses what earlier ones have made."""

    def __init__(self, base_url: str) -> None:
        self.service = tinker.ServiceClient(base_url=base_url)
        self.rest = self.service.create_rest_client()
        self.client: Any = None
        self.state = ""

    def capabilities(self) -> object:
        return "tiny" in [model.model_name for model in self.service.get_server_capabilities().supported_models]

    def create_lora_training_client(self) -> object:
        self.client = done(self.service.create_lora_training_client("tiny", rank=4))
        return done(self.client.get_info()).model_data.model_name == "tiny"

    def forward_backward(self) -> object:
        datum = types.Datum(
            model_input=types.ModelInput.from_ints([1, 2, 3, 4]),
            loss_fn_inputs={
                "target_tokens": types.TensorData(data=[2, 3, 4, 5], dtype="int64", shape=[4]),
                "weights": types.TensorData(data=[1.0] * 4, dtype="float32", shape=[4]),
            },
        )
        output = self.client.forward_backward([datum] * 3, "cross_entropy").result()
        forward = self.client.forward([datum], "cross_entropy").result()
        return len(output.loss_fn_outputs) == 3 and "loss:sum" in forward.metrics

    def optim_step(self) -> object:
        return self.client.optim_step(types.AdamParams(learning_rate=1e-3)).result() is not None

    def save_state(self) -> object:
        self.state = self.client.save_state("state").result().path
        return self.state.startswith("tinker://")

    def create_training_client_from_state(self) -> object:
        again = done(self.service.create_training_client_from_state(self.state))
        return again.optim_step(types.AdamParams(learning_rate=1e-3)).result() is not None

    def sample(self) -> object:
        sampler = done(self.client.save_weights_and_get_sampling_client(name="sampler"))
        parameters = types.SamplingParams(max_tokens=4, temperature=0.0, stop=[])
        found = sampler.sample(types.ModelInput.from_ints([1, 2, 3]), 2, parameters).result()
        logprobs = sampler.compute_logprobs(types.ModelInput.from_ints([1, 2, 3])).result()
        return [len(one.tokens) for one in found.sequences] == [4, 4] and len(logprobs) == 3

    def checkpoints(self) -> object:
        run = self.state.removeprefix("tinker://").partition("/")[0]
        paths = [one.tinker_path for one in self.rest.list_checkpoints(run).result().checkpoints]
        self.rest.publish_checkpoint_from_tinker_path(self.state).result()
        self.rest.delete_checkpoint_from_tinker_path(self.state).result()
        return self.state in paths


STEPS: tuple[Callable[[Path], object], ...] = (
    Path.capabilities,
    Path.create_lora_training_client,
    Path.forward_backward,
    Path.optim_step,
    Path.save_state,
    Path.create_training_client_from_state,
    Path.sample,
    Path.checkpoints,
)


def main() -> None:
    """Prints one JSON object: step → whether it worked; errors go to stderr."""
    path = Path(sys.argv[1])
    found = {}
    for step in STEPS:
        try:
            found[step.__name__] = bool(step(path))
        except Exception:
            traceback.print_exc()
            found[step.__name__] = False
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
