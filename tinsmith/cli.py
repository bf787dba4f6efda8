"""The command line: `tinsmith serve`, `models` and `version`.

Light: `--help` imports neither torch nor the web framework. Knows how to ask, not how anything is done.
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tinsmith import __version__
from tinsmith.config import EMBEDDED, describe, load_settings, read_environment
from tinsmith.errors import ConfigError

app = typer.Typer(
    name="tinsmith",
    help="A self-hosted server for the Tinker API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
models_app = typer.Typer(help="The models on this machine.", no_args_is_help=True)
app.add_typer(models_app, name="models")


@app.command()
def serve(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="'tiny' (embedded), a model folder, or a hub name.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 picks a free one.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder for checkpoints and the database.")] = None,
    database_url: Annotated[str | None, typer.Option(help="postgresql://… instead of SQLite.")] = None,
    aliases: Annotated[
        list[str] | None, typer.Option("--alias", help="NAME=MODEL: serve it under NAME too; * is any name.")
    ] = None,
    api_keys: Annotated[list[str] | None, typer.Option("--api-key", help="A key that clients may use.")] = None,
    no_auth: Annotated[bool | None, typer.Option("--no-auth", help="Take any key, on any address.")] = None,
    max_lora_adapters: Annotated[int | None, typer.Option(help="Adapters on the device at once.")] = None,
    max_lora_rank: Annotated[int | None, typer.Option(help="Largest rank that may be asked for.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the engine; 0: every core.")] = None,
    deterministic: Annotated[
        bool | None, typer.Option("--deterministic", help="The same bits alone and in company; slower.")
    ] = None,
    max_context: Annotated[int | None, typer.Option(help="Tokens; 0: what the model was made for.")] = None,
    kv_cache_tokens: Annotated[int | None, typer.Option(help="Sampling cache; 0: from free memory.")] = None,
    train_tokens: Annotated[int | None, typer.Option(help="Training micro-batch; 0: from free memory.")] = None,
    train_micro_batch_size: Annotated[int | None, typer.Option(help="Sequences in it at most; 0: any number.")] = None,
    gradient_checkpointing: Annotated[
        str | None, typer.Option(help="Less memory, a third more time in training: auto, on or off.")
    ] = None,
    log: Annotated[str | None, typer.Option(help="debug, info, warning or error.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of the settings.")] = None,
    show_settings: Annotated[bool, typer.Option("--show-settings", help="Print all settings and end.")] = False,
) -> None:
    """Serve MODEL to Tinker clients, until Ctrl-C."""
    given = {name: value for name, value in context.params.items() if value not in (None, (), [])}
    given.pop("config", None)
    given.pop("show_settings")
    settings = load_settings(config, read_environment(), given)
    if show_settings:
        for name, value in describe(settings):
            typer.echo(f"{name:<18} {value}")
        return
    from tinsmith.serve import supervise

    raise typer.Exit(supervise(settings))


@models_app.command("path")
def models_path(name: Annotated[str, typer.Argument(help=f"An embedded model: {EMBEDDED}.")]) -> None:
    """Print the folder of an embedded model (its tokenizer is there too)."""
    if name != EMBEDDED:
        raise ConfigError(f"there is no embedded model {name!r}; there is only {EMBEDDED!r}")
    from tinsmith.demo import tiny_folder

    typer.echo(tiny_folder())


@models_app.command("list")
def models_list() -> None:
    """List what `tinsmith serve` can serve without downloading: embedded models and the hub cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    from tinsmith.demo import tiny_folder

    typer.echo(f"{EMBEDDED:<40} {tiny_folder()}")
    try:
        cached = sorted(scan_cache_dir().repos, key=lambda repo: repo.repo_id)
    except CacheNotFound:
        cached = []
    for repo in cached:
        if repo.repo_type == "model":
            typer.echo(f"{repo.repo_id:<40} {repo.repo_path}")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> Any:
    """Runs the command line; a setting that does not work is one line on stderr and exit code 2."""
    try:
        return app()
    except ConfigError as error:
        typer.echo(f"tinsmith: {error}", err=True)
        sys.exit(2)
