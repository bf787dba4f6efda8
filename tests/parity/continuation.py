"""Training that goes on from a checkpoint: run here, or as a program in a process of its own."""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tinsmith.models.loading import load_base
from tinsmith.models.weights import ADAPTER_CONFIG, adapter_spec
from tinsmith.protocols import AdamParams, ModelCall, ModelSpec
from tinsmith.training.trainer import TorchTrainer
from tinsmith.wire.packing import TrainCall

PARAMS = AdamParams(learning_rate=0.01, weight_decay=0.1, grad_clip_norm=3.0)


def train(trainer: TorchTrainer, model_id: str, calls: Sequence[TrainCall]) -> None:
    """Forward, backward and optimizer step for each call."""
    for call in calls:
        trainer.forward_backward([ModelCall(model_id, call)])
        trainer.optim_step(model_id, PARAMS)


def new_trainer(folder: Path, dtype: torch.dtype) -> TorchTrainer:
    model = load_base(folder, dtype=dtype, device=torch.device("cpu"), on_progress=lambda _: None)
    return TorchTrainer(model, micro_batch_tokens=32, max_adapters=4, max_rank=32, gradient_checkpointing=False)


def main(folder: str, calls: str, *checkpoints: str) -> None:
    """Of every checkpoint `PATH:DTYPE`: loads it, trains on the calls of a folder, saves into `PATH-continued`."""
    torch.set_num_threads(1)
    bodies = [path.read_bytes() for path in sorted(Path(calls).iterdir())]
    for checkpoint in checkpoints:
        path, _, dtype = checkpoint.rpartition(":")
        trainer = new_trainer(Path(folder), getattr(torch, dtype))
        is_lora = (Path(path) / ADAPTER_CONFIG).exists()
        trainer.add("m", adapter_spec(Path(path)) if is_lora else ModelSpec(rank=0, seed=0))
        trainer.load("m", Path(path), optimizer=True)
        train(trainer, "m", [TrainCall.from_bytes(body) for body in bodies])
        target = Path(path + "-continued")
        target.mkdir()
        trainer.save("m", target, optimizer=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
