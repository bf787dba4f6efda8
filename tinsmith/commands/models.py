"""`tinsmith models`: the base models that a server knows by name."""

from typing import Annotated

import typer

from tinsmith.config import EMBEDDED
from tinsmith.errors import ConfigError

app = typer.Typer(help="The base models of a server, and on this machine.", no_args_is_help=True)


@app.command("path")
def path(name: Annotated[str, typer.Argument(help=f"An embedded model: {EMBEDDED}.")]) -> None:
    """Print the folder of an embedded model (its tokenizer is there too)."""
    if name != EMBEDDED:
        raise ConfigError(f"there is no embedded model {name!r}; there is only {EMBEDDED!r}")
    from tinsmith.demo import tiny_folder

    typer.echo(tiny_folder())


@app.command("list")
def list() -> None:
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
