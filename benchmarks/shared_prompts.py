"""Training on the samples of a few prompts, as reinforcement learning does: what it saves to compute a prompt once.

    python -m benchmarks.shared_prompts [--size small|0.6b|4b] [--rounds N]

The importance sampling loss on 16 samples of each of 4 prompts, one adapter of rank 32, forward_backward and optim_step
of the trainer itself. The rival is the same trainer with every sample in a call of its own, where nothing is shared;
both alternately. Tokens are those of all samples, prompts included, whether or not they are computed again. On a GPU
in bfloat16, on a CPU in fp32 with prompts a tenth as long.
"""

import argparse
from functools import partial
from statistics import median

import numpy as np
import torch

from benchmarks.qwen3 import Case, fused_base, interleaved, random_base
from benchmarks.recording import Row, record
from benchmarks.workloads import RANK, SHAPES, SMALL
from tinsmith.bench import seconds_to_train
from tinsmith.protocols import ModelCall, ModelSpec
from tinsmith.training.trainer import TorchTrainer
from tinsmith.wire.packing import TrainCall

PROMPTS, SAMPLES = 4, 16
ROWS = {"small": 1024, "0.6b": 16_384, "4b": 8_192}
"""Of one pass."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="small", choices=list(ROWS))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    size, gpu = arguments.size, torch.cuda.is_available()
    sizes, lengths = SHAPES.get(size, SMALL), (1024, 256) if gpu else (104, 24)
    base = fused_base(sizes, torch.device("cuda")) if gpu else random_base(sizes, torch.float32, torch.device("cpu"))
    trainer = TorchTrainer(base, micro_batch_tokens=ROWS[size], max_adapters=1, max_rank=RANK)
    trainer.add("m", ModelSpec(RANK, 0, train_unembed=False))
    data = samples(sizes.vocabulary, *lengths)
    cases = {
        "apart": Case(partial(seconds_to_train, trainer, [ModelCall("m", call_of([datum])) for datum in data])),
        "together": Case(partial(seconds_to_train, trainer, [ModelCall("m", call_of(data))])),
    }
    tokens, times = sum(map(len, data)), interleaved(cases, arguments.rounds)
    apart, together = (1000 * tokens / median(times[name]) for name in ("apart", "together"))
    name = f"training {size}: {SAMPLES} samples of {lengths[1]} tokens for each of {PROMPTS} prompts of {lengths[0]}"
    row = Row(name, round(together), "tokens/s", f"{apart:.0f}")
    accelerator = f"1 x {torch.cuda.get_device_name()}" if gpu else ""
    record("shared_prompts_gpu" if gpu else "shared_prompts", [row], accelerator)


def samples(vocabulary: int, prompt: int, output: int) -> list[list[int]]:
    """The texts, group by group."""
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(PROMPTS):
        start = rng.integers(0, vocabulary, prompt).tolist()
        texts += [start + rng.integers(0, vocabulary, output).tolist() for _ in range(SAMPLES)]
    return texts


def call_of(texts: list[list[int]]) -> TrainCall:
    """Each text's tokens predict the next; all of its tokens have an advantage."""
    offsets = np.cumsum([0, *(len(text) - 1 for text in texts)])
    tokens, targets = (np.concatenate([text[part] for text in texts]) for part in (slice(None, -1), slice(1, None)))
    inputs = {"logprobs": np.full(offsets[-1], -10, np.float32), "advantages": np.ones(offsets[-1], np.float32)}
    widths = np.zeros(len(texts), np.int32)
    int32 = (tokens.astype(np.int32), offsets, targets.astype(np.int32), offsets, widths)
    return TrainCall("importance_sampling", {}, False, *int32, inputs)


if __name__ == "__main__":
    main()
