"""`make demo`: starts a server with the embedded model, teaches it two things through the real SDK, and stops.

First supervised learning on a few facts, then reinforcement learning on sums, each with a LoRA adapter of its own. A
client like any other: knows the server's address and the `tinker` SDK, nothing of the inside.

    python -m tinsmith.demo.walkthrough [--data-dir FOLDER]
"""

import argparse
import os
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tinker
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tinsmith.demo.local_server import LocalServer

FACTS = {
    "Who are you?": "I am Tin, a very small model.",
    "Who made you?": "A tinsmith, with a hammer.",
    "Where do you live?": "On your own machine.",
    "What do you like?": "Small steps and big batches.",
}
FACT_STEPS = 30
SUM_STEPS = 15
QUESTIONS, GROUP = 12, 16  # sums that are practised, and replies to each of them in every step
DATA_DIR = Path("tinsmith-data/demo")
STOP = "\n\nUser:"


Loss = Literal["cross_entropy", "importance_sampling"]


@dataclass(frozen=True)
class Lesson:
    """One adapter under training, and how to talk to it."""

    client: tinker.TrainingClient
    tokenizer: Any

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def prompt(self, question: str) -> tinker.ModelInput:
        return tinker.ModelInput.from_ints(self.encode(f"User: {question}\n\nAssistant:"))

    def reply(self, sequence: tinker.SampledSequence) -> str:
        return str(self.tokenizer.decode(sequence.tokens)).partition(STOP)[0].strip()

    def answers(self, questions: Sequence[str]) -> list[str]:
        """Greedy replies of the adapter as it is now."""
        sampler = self.client.save_weights_and_get_sampling_client().result()
        greedy = tinker.SamplingParams(max_tokens=32, temperature=0.0, stop=[STOP])
        futures = [sampler.sample(self.prompt(question), 1, greedy) for question in questions]
        return [self.reply(future.result().sequences[0]) for future in futures]

    def step(self, datums: list[tinker.Datum], loss: Loss, learning_rate: float) -> tinker.ForwardBackwardOutput:
        """One update; the optimizer step is already on its way while the gradient is computed."""
        adam = tinker.AdamParams(learning_rate=learning_rate, beta1=0.9, beta2=0.95, eps=1e-8)
        forward_backward, optimizer = self.client.forward_backward(datums, loss), self.client.optim_step(adam)
        optimizer.result()
        return forward_backward.result()


class Screen:
    """A bar with a live figure on a terminal; a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def bar(self, title: str, steps: int) -> Iterator[Any]:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figure]}"))
        with Progress(*columns, TimeElapsedColumn(), console=self.console) as progress:
            task = progress.add_task(title, total=steps, figure="")

            def advance(step: int, figure: str) -> None:
                progress.update(task, completed=step, figure=figure)
                if not self.console.is_terminal and (step == 1 or step % 5 == 0):
                    self.console.print(f"{title}  step {step}/{steps}  {figure}")

            yield advance

    def compare(self, questions: Sequence[str], before: Sequence[str], after: Sequence[str]) -> None:
        table = Table("question", "before", "after", box=None, header_style="bold")
        for row in zip(questions, before, after, strict=True):
            table.add_row(*(text.replace("\n", " ") for text in row))
        self.console.print(table)


def learn_facts(lesson: Lesson, screen: Screen) -> str:
    """Supervised learning; returns the checkpoint's path."""
    questions = list(FACTS)
    before = lesson.answers(questions)
    datums = [fact_datum(lesson, question, answer) for question, answer in FACTS.items()]
    tokens = sum(sum(datum.loss_fn_inputs["weights"].data) for datum in datums)
    with screen.bar("supervised   ", FACT_STEPS) as advance:
        for step in range(1, FACT_STEPS + 1):
            result = lesson.step(datums, "cross_entropy", 3e-3)
            advance(step, f"loss per token {result.metrics['loss:sum'] / tokens:.3f}")
    screen.compare(questions, before, lesson.answers(questions))
    return lesson.client.save_weights_for_sampler("facts").result().path


def fact_datum(lesson: Lesson, question: str, answer: str) -> tinker.Datum:
    """A conversation in which only the reply, with the text that ends it, has weight."""
    given, reply = lesson.prompt(question).to_ints(), lesson.encode(f" {answer}\n\n") + lesson.encode("User:")
    tokens, weights = given + reply, [0.0] * len(given) + [1.0] * len(reply)
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": integers(tokens[1:]), "weights": numbers(weights[1:])},
    )


def learn_sums(lesson: Lesson, screen: Screen) -> str:
    """Reinforcement learning on the same sums in every step; returns the checkpoint's path."""
    rng = random.Random(7)
    sums = [sum_question(rng) for _ in range(QUESTIONS)]
    shown = [question for question, _ in sums[:5]]
    before = lesson.answers(shown)
    with screen.bar("reinforcement", SUM_STEPS) as advance:
        for step in range(1, SUM_STEPS + 1):
            rewards, datums = collect(lesson, sums, seed=step * QUESTIONS)
            if datums:
                lesson.step(datums, "importance_sampling", 1e-3)
            advance(step, f"right answers {sum(rewards) / len(rewards):.0%}")
    screen.compare(shown, before, lesson.answers(shown))
    return lesson.client.save_weights_for_sampler("sums").result().path


def sum_question(rng: random.Random) -> tuple[str, int]:
    first, second = rng.randint(10, 99), rng.randint(10, 99)
    return f"What is {first} + {second}?", first + second


def collect(lesson: Lesson, questions: list[tuple[str, int]], seed: int) -> tuple[list[float], list[tinker.Datum]]:
    """Samples a group of replies to each question; the mean reward of each, and what there is to learn from."""
    sampler = lesson.client.save_weights_and_get_sampling_client().result()
    prompts = [lesson.prompt(question) for question, _ in questions]
    futures = [
        sampler.sample(prompt, GROUP, tinker.SamplingParams(max_tokens=16, stop=[STOP], seed=seed + place))
        for place, prompt in enumerate(prompts)
    ]
    rewards, datums = [], []
    for (_, answer), prompt, future in zip(questions, prompts, futures, strict=True):
        sequences = future.result().sequences
        earned = [float(re.findall(r"\d+", lesson.reply(each)) == [str(answer)]) for each in sequences]
        mean = sum(earned) / len(earned)
        rewards.append(mean)
        if 0 < mean < 1:  # otherwise every advantage is zero
            datums += [rollout_datum(prompt, each, r - mean) for each, r in zip(sequences, earned, strict=True)]
    return rewards, datums


def rollout_datum(prompt: tinker.ModelInput, sequence: tinker.SampledSequence, advantage: float) -> tinker.Datum:
    """A sampled reply with its log-probabilities and its advantage; the prompt's rows count nothing."""
    assert sequence.logprobs is not None
    given = prompt.length - 1
    return tinker.Datum(
        model_input=prompt.append(tinker.EncodedTextChunk(tokens=sequence.tokens[:-1])),
        loss_fn_inputs={
            "target_tokens": integers([0] * given + sequence.tokens),
            "logprobs": numbers([0.0] * given + sequence.logprobs),
            "advantages": numbers([0.0] * given + [advantage] * len(sequence.tokens)),
        },
    )


def integers(values: list[int]) -> tinker.TensorData:
    return tinker.TensorData(data=values, dtype="int64", shape=[len(values)])


def numbers(values: list[float]) -> tinker.TensorData:
    return tinker.TensorData(data=values, dtype="float32", shape=[len(values)])


def walk(data_dir: Path, console: Console) -> None:
    """The whole walk: start, teach twice, say what can be tried next, stop."""
    screen = Screen(console)
    data_dir.mkdir(parents=True, exist_ok=True)
    console.print(f"Starting a server: tinsmith serve tiny --port 0 --data-dir {data_dir}")
    with LocalServer(data_dir, data_dir / "server.log") as server:
        console.print(f"It is ready at {server.base_url}; its log is {data_dir / 'server.log'}\n")
        os.environ.update(server.client_environment())
        paths = []
        with tinker.ServiceClient(display_name="walk-through") as service:
            for teach in (learn_facts, learn_sums):
                client = service.create_lora_training_client(base_model="tiny", rank=16, seed=1).result()
                paths.append(teach(Lesson(client, client.get_tokenizer()), screen))
                console.print()
    console.print(f"Checkpoints, in {data_dir}:", *paths, sep="\n  ")
    console.print(
        f"\nNext: `tinsmith serve tiny --data-dir {data_dir}` serves them again; export the two variables that it "
        "prints, and run your own script, examples/sl_loop.py or examples/rl_loop.py."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=DATA_DIR, help="where the checkpoints stay (%(default)s)")
    walk(parser.parse_args().data_dir, Console(soft_wrap=True, highlight=False))


if __name__ == "__main__":
    main()
