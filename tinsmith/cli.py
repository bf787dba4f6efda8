"""The command line: `tinsmith serve` and `version`; all other commands are in `commands/`.

Light: `--help` imports neither torch nor the web framework. Knows how to ask, not how anything is done.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tinsmith import __version__
from tinsmith.backend_config import check_tensor_parallel, merge, translate
from tinsmith.commands import keys, operations, weights
from tinsmith.commands import models as models_commands
from tinsmith.commands.bench import bench
from tinsmith.config import describe, load_settings, read_environment
from tinsmith.errors import TinsmithError

app = typer.Typer(
    name="tinsmith",
    help="A self-hosted server for the Tinker API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(models_commands.app, name="models")
app.add_typer(keys.app, name="keys")
app.command("export")(weights.export)
app.command("import")(weights.import_)
app.command("status")(operations.status)
app.command("doctor")(operations.doctor)
app.command("bench")(bench)


Models = Annotated[
    list[str] | None,
    typer.Argument(metavar="MODEL", help="Registered names, 'tiny' (embedded), model folders, hub names."),
]
Aliases = Annotated[
    list[str] | None, typer.Option("--alias", help="NAME=MODEL: serve it under NAME too; * is any name.")
]
Deterministic = Annotated[
    bool | None, typer.Option("--deterministic", help="The same bits alone and in company; slower.")
]
MemoryFraction = Annotated[
    float | None, typer.Option(help="Of the device's memory, for all models together; 0: all that is free.")
]
MemoryShares = Annotated[
    list[str] | None, typer.Option("--memory-share", help="MODEL=FRACTION of that; the others divide the rest.")
]
GradientCheckpointing = Annotated[
    str | None, typer.Option(help="Less memory, a third more time in training: auto, on or off.")
]
BackendConfig = Annotated[
    str, typer.Option(metavar="JSON", help="SkyRL's keys as a JSON object; docs/migration.md has them.")
]


@app.command()
def serve(
    context: typer.Context,
    models: Models = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 picks a free one.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder for checkpoints and the database.")] = None,
    database_url: Annotated[str | None, typer.Option(help="postgresql://… instead of SQLite.")] = None,
    aliases: Aliases = None,
    api_keys: Annotated[list[str] | None, typer.Option("--api-key", help="A key that clients may use.")] = None,
    no_auth: Annotated[bool | None, typer.Option("--no-auth", help="Take any key, on any address.")] = None,
    max_lora_adapters: Annotated[int | None, typer.Option(help="Adapters on the device at once.")] = None,
    max_lora_rank: Annotated[int | None, typer.Option(help="Largest rank that may be asked for.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of an engine; 0: chosen by its size.")] = None,
    deterministic: Deterministic = None,
    memory_fraction: MemoryFraction = None,
    memory_shares: MemoryShares = None,
    max_context: Annotated[int | None, typer.Option(help="Tokens; 0: what the model was made for.")] = None,
    kv_cache_tokens: Annotated[int | None, typer.Option(help="Sampling cache; 0: from free memory.")] = None,
    train_tokens: Annotated[int | None, typer.Option(help="Training micro-batch; 0: from free memory.")] = None,
    train_micro_batch_size: Annotated[int | None, typer.Option(help="Sequences in it at most; 0: any number.")] = None,
    gradient_checkpointing: GradientCheckpointing = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="Devices that share a model: 1.")] = 1,
    backend_config: BackendConfig = "{}",
    log: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    log_format: Annotated[str | None, typer.Option(help="text or json: one JSON object per line.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of the settings.")] = None,
    show_settings: Annotated[bool, typer.Option("--show-settings", help="Print all settings and end.")] = False,
) -> None:
    """Serve one or more models to Tinker clients, until Ctrl-C: those named, else all registered ones, else 'tiny'."""
    check_tensor_parallel(tensor_parallel_size)
    others = ("config", "show_settings", "backend_config", "tensor_parallel_size")
    said = {name: value for name, value in context.params.items() if value not in (None, (), []) and name not in others}
    settings = load_settings(config, read_environment(), merge(said, translate(backend_config)))
    if show_settings:
        for name, value in describe(settings):
            typer.echo(f"{name:<18} {value}")
        return
    from tinsmith.serve import supervise

    raise typer.Exit(supervise(settings))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> Any:
    """Runs the command line; what cannot be done is one line on stderr and exit code 2."""
    try:
        return app()
    except TinsmithError as error:
        typer.echo(f"tinsmith: {error}", err=True)
        sys.exit(2)
