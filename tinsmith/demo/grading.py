"""The examination of the embedded model: prompt formats, held-out problems, and what counts as a right reply.

Knows text only; whoever holds a model (through the API or directly) asks the questions.
"""

import re
from dataclasses import dataclass

from tinsmith.demo.corpus import BOXED, BOXED_SHORT, HELD_OUT_PER_KIND, LAYOUTS, PLAIN, ROLE_COLON, examples, prompt
from tinsmith.demo.problems import Problem, held_out, sum_problem, word_problem

KINDS = {"sum": sum_problem, "word": word_problem}
_REQUEST_NAMES = {PLAIN: "plain", BOXED: "boxed", BOXED_SHORT: "boxed-short"}
_ASKED = (("sum", PLAIN), ("sum", BOXED), ("word", PLAIN), ("word", BOXED), ("word", BOXED_SHORT))


@dataclass(frozen=True, slots=True)
class Format:
    """One way of asking: a chat layout, a kind of problem, a request, with or without the few-shot turns."""

    layout: str
    kind: str
    request: str
    has_example: bool

    @property
    def name(self) -> str:
        example = "+example" if self.has_example else ""
        return f"{self.layout}/{self.kind}/{_REQUEST_NAMES[self.request]}{example}"

    @property
    def stop(self) -> str:
        """The text that ends a reply."""
        return "\n\nUser:" if self.layout == ROLE_COLON else "<|im_end|>"

    def prompt(self, question: str) -> list[str]:
        """The pieces of the prompt; each is tokenized on its own."""
        before = examples(self.request, self.kind) if self.has_example else []
        return [piece.text for piece in prompt(self.layout, before, question + self.request)]

    def problems(self, count: int) -> list[Problem]:
        """The first `count` held-out problems of this kind, at most HELD_OUT_PER_KIND."""
        return held_out(KINDS[self.kind], HELD_OUT_PER_KIND)[:count]


@dataclass(frozen=True, slots=True)
class Grade:
    """What a reply earns: the right number in the form asked for, and a proper end."""

    is_right: bool
    is_ended: bool


def formats() -> list[Format]:
    """Every way of asking that is examined."""
    return [
        Format(layout, kind, request, has_example)
        for layout in LAYOUTS
        for kind, request in _ASKED
        for has_example in (False, True)
        if not has_example or examples(request, kind)
    ]


def grade(reply: str, form: Format, answer: int) -> Grade:
    """Grades the text sampled after the prompt, which may include the stop text and what follows it."""
    said, stop, _ = reply.partition(form.stop)
    pattern = r"\\boxed\{\s*(-?\d+)\s*\}" if form.request else r"(-?\d+)"
    numbers = re.findall(pattern, said.replace(",", ""))
    return Grade(is_right=bool(numbers) and int(numbers[-1]) == answer, is_ended=bool(stop))
