"""`tinsmith bench`: how fast a model trains and samples on this machine."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from tinsmith.commands.database import Config
from tinsmith.config import load_settings, read_environment
from tinsmith.errors import UserError


def bench(
    model: Annotated[str, typer.Argument(help="'tiny' (embedded), a model folder, or a hub name.")] = "tiny",
    adapters: Annotated[int, typer.Option(min=1, help="LoRA adapters that train and sample together.")] = 8,
    rank: Annotated[int, typer.Option(min=1, help="Their rank.")] = 32,
    requests: Annotated[int, typer.Option(min=1, help="Sampled at once, and sequences trained at once.")] = 64,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 256,
    output: Annotated[int, typer.Option(min=1, help="Tokens sampled after it.")] = 128,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    config: Config = None,
) -> None:
    """Measure training and sampling of MODEL as a server on this machine would do them, without a server."""
    from tinsmith.backend import load_backend
    from tinsmith.bench import Load, measure
    from tinsmith.served import choose_served

    given: dict[str, object] = {"models": [model], "device": device, "dtype": dtype}
    given |= {"max_lora_adapters": adapters, "max_lora_rank": rank}
    settings = load_settings(config, read_environment(), {name: value for name, value in given.items() if value})
    (served,) = choose_served(settings, [])
    trainer, sampler = load_backend(settings, served, lambda progress: typer.echo(progress, err=True))
    context = sampler.capabilities().max_context
    if prompt + output > context:
        raise UserError(f"{prompt} + {output} tokens do not fit into this model's context of {context}")
    rows = []
    for row in measure(trainer, sampler, Load(adapters, rank, requests, prompt, output)):
        rows.append(row)
        if not as_json:
            typer.echo(f"{row.name:<60} {row.value:>12,.4g} {row.unit}")
    if as_json:
        typer.echo(json.dumps([asdict(row) for row in rows], indent=2))
