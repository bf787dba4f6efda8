"""`tinsmith export` and `tinsmith import`: weights out of a server, and adapters into one."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinsmith.commands.database import Config, DatabaseUrl, DataDir, server_database
from tinsmith.config import read_environment
from tinsmith.errors import ConfigError, NotFoundError
from tinsmith.exporting import DTYPES, FORMS
from tinsmith.served import Served, base_of

if TYPE_CHECKING:
    from tinsmith.exporting import Source
    from tinsmith.store.database import Database

DEFAULT_URL = "http://127.0.0.1:8000"


def export(
    checkpoint: Annotated[str, typer.Argument(help="A tinker:// path of the server's, or an adapter's folder.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    merged: Annotated[bool, typer.Option("--merged", help="A whole model, with the adapter added in.")] = False,
    form: Annotated[str, typer.Option(help=f"Of an adapter: {' or '.join(FORMS)}.")] = FORMS[0],
    dtype: Annotated[str, typer.Option(help=f"Of a merged model: {', '.join(DTYPES)}; auto is the base's.")] = "auto",
    base: Annotated[str | None, typer.Option(help="The base model, if not what the checkpoint names.")] = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Write a checkpoint as other software reads it: a PEFT adapter, or a Hugging Face model."""
    from tinsmith.exporting import export_adapter, export_merged, folder_source

    _check_choices(form, dtype, merged)
    if checkpoint.startswith("tinker://"):
        with server_database(config, data_dir, database_url) as (database, _):
            source = _stored(database, checkpoint, base)
    else:
        source = folder_source(Path(checkpoint), base)
    if not merged:
        export_adapter(source, out, form, _report)
        typer.echo(out)
        return
    result = export_merged(source, out, dtype, _report)
    typer.echo(out)
    typer.echo(
        f"{result.parameters / 1e6:,.1f} M parameters in {result.dtype}; compared with what was trained: mean "
        f"|difference of logprobs| {result.mean_difference:.2g}, at most {result.largest_difference:.2g} (what was "
        f"trained differs by {result.effect:.2g} from the base)",
        err=True,
    )


def import_(
    adapter: Annotated[Path, typer.Argument(help="A folder with adapter_config.json and adapter_model.safetensors.")],
    url: Annotated[str | None, typer.Option(help=f"The running server; else $TINKER_BASE_URL, {DEFAULT_URL}.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Whose adapter it will be; else $TINKER_API_KEY.")] = None,
    base: Annotated[str | None, typer.Option(help="What the server calls the adapter's base model.")] = None,
) -> None:
    """Give a running server a PEFT adapter, and print its tinker:// path."""
    from tinsmith.importing import import_adapter

    environment = read_environment()
    url = url or environment.get("TINKER_BASE_URL") or DEFAULT_URL
    key = api_key or environment.get("TINKER_API_KEY") or "tml-local"
    typer.echo(import_adapter(adapter, url, key, base, _report))


def _report(progress: str) -> None:
    typer.echo(progress, err=True)


def _check_choices(form: str, dtype: str, merged: bool) -> None:
    for name, value, allowed in (("form", form, FORMS), ("dtype", dtype, DTYPES)):
        if value not in allowed:
            raise ConfigError(f"--{name} is {value!r}; allowed: {', '.join(allowed)}")
    if merged and form != FORMS[0]:
        raise ConfigError(f"--form {form} is of an adapter, and a merged model has none; give one of --merged, --form")
    if dtype != "auto" and not merged:
        raise ConfigError(f"--dtype {dtype} is of a merged model; adapters are written as they are, in float32")


def _stored(database: "Database", path: str, base: str | None) -> "Source":
    """A checkpoint that the server has, whosoever it is: who runs this has the data folder."""
    from tinsmith.exporting import checkpoint_source
    from tinsmith.store import records, registry

    found = database.read(records.find_checkpoint, path)
    if found is None:
        raise NotFoundError(f"the server has no checkpoint {path} (deleted or expired, or another data folder)")
    if base is not None:
        return checkpoint_source(path, found.folder, Served(base, base_of(base)), base)
    known = {model.base: model for model in database.read(registry.list_registered)}
    folder = known[found.base].folder if found.base in known else ""
    return checkpoint_source(path, found.folder, Served(found.base_name, found.base, folder), found.base_name)
