"""`tinsmith status` asks a running server how it is; `tinsmith doctor` looks at a machine that shall run one."""

import json
import urllib.error
import urllib.request
from datetime import datetime
from typing import Annotated, Any

import typer

from tinsmith.commands.database import Config, DatabaseUrl, DataDir
from tinsmith.config import Settings, load_settings, read_environment
from tinsmith.errors import ConfigError

Json = Annotated[bool, typer.Option("--json", help="As JSON.")]

_ASK_SECONDS = 10.0
_EVERY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_COLOURS = {"ok": typer.colors.GREEN, "warn": typer.colors.YELLOW, "fail": typer.colors.RED}
_LONGEST_ERROR = 120


def status(
    url: Annotated[str | None, typer.Option(help="The server; else --config's, $TINKER_BASE_URL.")] = None,
    key: Annotated[str | None, typer.Option(help="An admin's key; else TINKER_API_KEY.")] = None,
    as_json: Json = False,
    config: Config = None,
) -> None:
    """Ask a running server: engines, queue, what is on the device, latest failures. Exit code 1 unless all is ready."""
    environment = read_environment()
    if url is None and config is None:  # a file of settings says which server is meant
        url = environment.get("TINKER_BASE_URL")
    address = url or _address(load_settings(config, environment))
    told = _ask(address.rstrip("/"), key or environment.get("TINKER_API_KEY", ""))
    if as_json:
        typer.echo(json.dumps(told, indent=2))
    else:
        for line in describe_status(told):
            typer.echo(line)
    raise typer.Exit(0 if all(engine["state"] == "ready" for engine in told["engines"]) else 1)


def doctor(
    models: Annotated[list[str] | None, typer.Argument(metavar="[MODEL]...", help="What would be served.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32 or bfloat16.")] = None,
    as_json: Json = False,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    config: Config = None,
) -> None:
    """Look at this machine with a server's eyes, changing nothing. Exit code 1 if one could not work here."""
    from tinsmith.doctor import FAIL, examine

    given: dict[str, object] = {"models": models, "host": host, "port": port, "device": device, "dtype": dtype}
    given |= {"data_dir": data_dir, "database_url": database_url}
    environment = read_environment()
    settings = load_settings(config, environment, {name: value for name, value in given.items() if value is not None})
    findings = []
    for finding in examine(settings, environment):
        findings.append(finding)
        if not as_json:
            typer.echo(f"{typer.style(f'{finding.level:<5}', _COLOURS[finding.level])}{finding.name}: {finding.says}")
            if finding.advice:
                typer.echo(f"     → {finding.advice}")
    if as_json:
        fields = ("name", "level", "says", "advice")
        typer.echo(json.dumps([{name: getattr(each, name) for name in fields} for each in findings], indent=2))
    raise typer.Exit(int(any(finding.level == FAIL for finding in findings)))


def _address(settings: Settings) -> str:
    host = _EVERY_ADDRESS.get(settings.host, settings.host)
    return f"http://[{host}]:{settings.port}" if ":" in host else f"http://{host}:{settings.port}"


def _ask(address: str, key: str) -> dict[str, Any]:
    """What the server says of itself. Raises ConfigError with what to do, or ends with code 1 if nobody answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        request = urllib.request.Request(f"{address}/status", headers={"X-API-Key": key} if key else {})
        with opener.open(request, timeout=_ASK_SECONDS) as answer:
            told: dict[str, Any] = json.loads(answer.read())
            return told
    except urllib.error.HTTPError as error:
        reason = _detail(error)
        if error.code in (401, 403):
            raise ConfigError(f"{address} does not tell: {reason}; give an admin's key with --key") from error
        typer.echo(f"tinsmith: {address} answers {error.code}: {reason}", err=True)
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "reason", error))
        typer.echo(f"tinsmith: no Tinsmith server answers at {address} ({reason}); --url names another one", err=True)
    raise typer.Exit(1)


def _detail(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read())["detail"])
    except (OSError, ValueError, KeyError, TypeError):
        return str(error.reason)


def describe_status(told: dict[str, Any]) -> list[str]:
    """What GET /status says, as lines for people."""
    lines = [f"Tinsmith {told['version']}, {told['free_bytes'] / 1e9:.3g} GB free in {told['data_dir']}"]
    for engine in told["engines"]:
        lines += _engine(engine)
    waiting = [
        (w["model"], w["state"], w["kind"], w["tenant"], f"{w['jobs']:,}", f"{w['oldest_seconds']:.1f} s")
        for w in told["waiting"]
    ]
    lines += ["", "queue" if waiting else "queue: empty"]
    lines += _table([("model", "state", "kind", "tenant", "jobs", "oldest"), *waiting]) if waiting else []
    failures = [_failure(each) for each in told["failures"]]
    lines += ["", "latest failures" if failures else "no failures lately"]
    lines += _table([("when", "request", "kind", "tenant", "fault", "error", "trace"), *failures]) if failures else []
    return lines


def _engine(engine: dict[str, Any]) -> list[str]:
    beat = "" if engine["beat_seconds"] is None else f", heard of {engine['beat_seconds']:.0f} s ago"
    progress = f": {engine['progress']}" if engine["progress"] else ""
    starts = f"starts: {engine['starts']}, {engine['recoveries']} of them after a death"
    lines = ["", f"engine {engine['model']}: {engine['state']}{progress}{beat}; {starts}"]
    if held := engine["held"]:
        lines.append(
            f"  on the device: {held['models']} of {held['models_most']} models, {held['snapshots']} of "
            f"{held['snapshots_most']} snapshots ({held['snapshot_bytes'] / 1e6:.4g} MB)"
        )
        lines.append(
            f"  sampling: {held['samples_running']:,} running, {held['samples_waiting']:,} waiting; cache "
            f"{held['kv_tokens_held']:,} of {held['kv_tokens']:,} tokens, {held['kv_tokens_kept']:,} kept for reuse"
        )
    if tokens := engine["tokens"]:
        lines.append("  tokens: " + ", ".join(f"{count:,} {what}" for what, count in tokens.items()))
    for kind, ends in (engine["jobs"] or {}).items():
        failed = [f"{ends[fault]:,} failed by the {fault}'s fault" for fault in ("user", "server") if ends[fault]]
        lines.append(f"  {kind}: " + ", ".join([f"{ends['done']:,} done", *failed]))
    return lines


def _failure(failure: dict[str, Any]) -> tuple[str, ...]:
    when = datetime.fromtimestamp(failure["at"]).strftime("%m-%d %H:%M:%S")
    error = " ".join(failure["error"].split())
    short = error if len(error) <= _LONGEST_ERROR else f"{error[: _LONGEST_ERROR - 1]}…"
    of = (failure["request"], failure["kind"], failure["tenant"], failure["category"])
    return (when, *of, short, failure["trace"] or "-")


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in rows]
    return ["  " + "  ".join(row).rstrip() for row in padded]
