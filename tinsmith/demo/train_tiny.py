"""Trains the embedded model through the Tinker API, examines it, and writes it as a Hugging Face folder.

A client like any other: full-parameter training (rank 0) of a served blank model, with the `tinker` SDK. Knows nothing
of the server beside its address.

    python -m tinsmith.demo.blank blank
    tinsmith serve blank --port 8123
    python -m tinsmith.demo.train_tiny --base-url http://127.0.0.1:8123 --blank blank --export tiny
"""

import argparse
import math
import shutil
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import tinker
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tinsmith.demo.corpus import Piece, stream
from tinsmith.demo.grading import Format, Grade, formats, grade

IN_FLIGHT = 4
"""Steps that are submitted ahead of the one whose result is awaited."""

WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the model is trained: batches of whole conversations, linear warm-up, then a cosine down to `floor`.

    `prompt_weight` is the loss weight of a token that the assistant did not write; its own tokens weigh 1.
    """

    steps: int = 1000
    conversations: int = 32
    learning_rate: float = 3e-3
    warmup: int = 20
    floor: float = 0.05
    prompt_weight: float = 0.1
    seed: int = 1

    def adam(self, step: int) -> tinker.AdamParams:
        """The parameters of one step, counted from 1."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        scale = min(1.0, step / self.warmup) * (self.floor + (1 - self.floor) * cosine)
        return tinker.AdamParams(
            learning_rate=self.learning_rate * scale, beta1=0.9, beta2=0.95, eps=1e-8, grad_clip_norm=1.0
        )


class Encoder:
    """Turns texts into token ids, piece by piece, as the cookbook's renderers do."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.encode = lru_cache(maxsize=100_000)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def prompt(self, texts: list[str]) -> tinker.ModelInput:
        return tinker.ModelInput.from_ints([token for text in texts for token in self.encode(text)])

    def stop(self, form: Format) -> list[str] | list[int]:
        """The text that ends a reply; its token where that is a control token."""
        tokens = self.encode(form.stop)
        return list(tokens) if len(tokens) == 1 else [form.stop]


def batches(encoder: Encoder, recipe: Recipe) -> Iterator[list[tinker.Datum]]:
    """Training batches without end. The weights of a batch add up to 1, so that its summed loss is a mean."""
    conversations = stream(recipe.seed)
    while True:
        rows = [_tokens_and_weights(encoder, next(conversations), recipe) for _ in range(recipe.conversations)]
        total = sum(float(weights[1:].sum()) for _, weights in rows)
        yield [_datum(tokens, weights / total) for tokens, weights in rows]


def _tokens_and_weights(encoder: Encoder, pieces: list[Piece], recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    tokens: list[int] = []
    weights: list[float] = []
    for piece in pieces:
        ids = encoder.encode(piece.text)
        tokens += ids
        weights += [1.0 if piece.is_reply else recipe.prompt_weight] * len(ids)
    return np.array(tokens, dtype=np.int64), np.array(weights, dtype=np.float32)


def _datum(tokens: np.ndarray, weights: np.ndarray) -> tinker.Datum:
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1].tolist()),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData(data=tokens[1:], dtype="int64", shape=[len(tokens) - 1]),
            "weights": tinker.TensorData(data=weights[1:], dtype="float32", shape=[len(tokens) - 1]),
        },
    )


def train(client: tinker.TrainingClient, encoder: Encoder, recipe: Recipe) -> None:
    """Runs the recipe, a few steps ahead of the server, and prints the loss now and then."""
    started, tokens = time.monotonic(), 0
    waiting: list[tuple[int, tinker.APIFuture[tinker.ForwardBackwardOutput]]] = []
    for step, batch in zip(range(1, recipe.steps + 1), batches(encoder, recipe), strict=False):
        size = sum(datum.model_input.length for datum in batch)
        waiting.append((size, client.forward_backward(batch, loss_fn="cross_entropy")))
        client.optim_step(recipe.adam(step))
        while len(waiting) > (IN_FLIGHT if step < recipe.steps else 0):
            size, future = waiting.pop(0)
            tokens += size
            loss = future.result().metrics["loss:sum"]
        if step % 20 == 0:
            print(f"step {step:4d}  loss {loss:.3f}  {tokens:,} tokens  {time.monotonic() - started:.0f} s", flush=True)


def examine(client: tinker.SamplingClient, encoder: Encoder, count: int) -> dict[str, list[Grade]]:
    """Asks `count` held-out problems in every format, at temperature 1; grades by name of the format."""
    grades: dict[str, list[Grade]] = {}
    for form in formats():
        problems = form.problems(count)
        stop = encoder.stop(form)
        futures = [
            client.sample(
                prompt=encoder.prompt(form.prompt(problem.question)),
                num_samples=1,
                sampling_params=tinker.SamplingParams(max_tokens=32, temperature=1.0, stop=stop, seed=place),
            )
            for place, problem in enumerate(problems)
        ]
        replies = [str(encoder.tokenizer.decode(future.result().sequences[0].tokens)) for future in futures]
        grades[form.name] = [
            grade(reply, form, problem.answer) for reply, problem in zip(replies, problems, strict=True)
        ]
        print(row(form.name, grades[form.name]), flush=True)
    return grades


def row(name: str, grades: list[Grade]) -> str:
    """One line of the table of success rates, in percent."""
    right = sum(mark.is_right for mark in grades) / len(grades)
    ended = sum(mark.is_ended for mark in grades) / len(grades)
    return f"| {name} | {right:.0%} | {ended:.0%} |"


def export(client: tinker.TrainingClient, rest: tinker.RestClient, blank: Path, folder: Path) -> None:
    """Writes the trained weights as bf16 into `folder`, beside copies of the blank model's other files."""
    folder.mkdir(parents=True, exist_ok=True)
    path = client.save_weights_external("trained").result().path
    urls = rest.get_external_weights_urls(path).result().urls
    fetched = folder / f".{WEIGHTS}"
    urllib.request.urlretrieve(urls[WEIGHTS], fetched)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in load_file(fetched).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    fetched.unlink()
    for file in blank.iterdir():
        if file.name != WEIGHTS and file.resolve() != (folder / file.name).resolve():
            shutil.copyfile(file, folder / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", required=True, help="the server's address")
    parser.add_argument("--blank", type=Path, required=True, help="the folder of the blank model that is served")
    parser.add_argument("--export", type=Path, required=True, help="where the trained folder goes")
    parser.add_argument("--steps", type=int, default=Recipe().steps)
    parser.add_argument("--examine", type=int, default=200, metavar="N", help="held-out problems for each format")
    arguments = parser.parse_args()
    recipe = Recipe(steps=arguments.steps)
    encoder = Encoder(arguments.blank)
    rest = tinker.RestClient(base_url=arguments.base_url)
    served = rest.get_server_capabilities().result().supported_models[0].model_name
    service = tinker.ServiceClient(base_url=arguments.base_url, display_name="train the embedded model")
    client = service.create_lora_training_client(base_model=str(served), rank=0, seed=recipe.seed).result()
    train(client, encoder, recipe)
    export(client, rest, arguments.blank, arguments.export)
    examine(client.save_weights_and_get_sampling_client().result(), encoder, arguments.examine)


if __name__ == "__main__":
    main()
