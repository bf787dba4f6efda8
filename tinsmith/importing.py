"""A PEFT adapter from a folder into a running server, over HTTP, as any client would: the key says whose it is."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinsmith.errors import ConfigError, UnavailableError, UserError
from tinsmith.models.peft_format import check_adapter_config

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TIMEOUT_SECONDS = 300.0
FINISH_TRIES = 20  # the server holds each of them for half a minute

Report = Callable[[str], None]


def import_adapter(folder: Path, url: str, key: str, base_model: str | None, report: Report) -> str:
    """Uploads an adapter; its tinker:// path, to train on from and to sample.

    `base_model` is what the server calls the base; it may be left out where the adapter names it as the server does,
    or the server has only one name to offer. Raises ConfigError, UserError (what the server said).
    """
    config = _config(folder)
    api = f"{url.rstrip('/')}/api/v1"
    base_model = base_model or _base_of(config, _names(api, key))
    lora = {"rank": config["r"]}
    begun = _post(f"{api}/external_weights_upload_start", key, {"base_model": base_model, "lora_config": lora})
    for name, address in begun["urls"].items():
        report(f"sending {name}")
        _put(address, folder / name)
    report("the server checks that it fits")
    return _finish(api, key, begun["upload_id"])


def _finish(api: str, key: str, upload_id: str) -> str:
    """The new path. The server may want to be asked again: another model's step comes first, or its engine starts."""
    for _ in range(FINISH_TRIES):
        try:
            answer = _post(f"{api}/external_weights_upload_finish", key, {"upload_id": upload_id})
        except UnavailableError as error:
            reason = str(error)
            time.sleep(1)
            continue
        return str(answer["tinker_path"])
    raise UnavailableError(f"the server did not come to checking the upload: {reason}")


def _config(folder: Path) -> dict[str, Any]:
    """What the adapter says of itself. Raises ConfigError, UserError for what no server takes."""
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{folder} is no PEFT adapter: it has no {' and no '.join(missing)}")
    try:
        config = json.loads((folder / CONFIG).read_text())
    except ValueError as error:
        raise ConfigError(f"{folder / CONFIG} is not JSON: {error}") from error
    check_adapter_config(config, CONFIG)
    return dict(config)


def _names(api: str, key: str) -> list[str]:
    answer = _ask(urllib.request.Request(f"{api}/get_server_capabilities", headers={"X-API-Key": key}))
    return [model["model_name"] for model in answer["supported_models"]]


def _base_of(config: dict[str, Any], names: list[str]) -> str:
    named = config.get("base_model_name_or_path")
    if named in names:
        return str(named)
    if len(names) == 1:
        return names[0]
    raise ConfigError(f"the adapter is of {named!r}; say with --base which one of {', '.join(names)} that is")


def _post(address: str, key: str, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"X-API-Key": key, "Content-Type": "application/json"}
    return _ask(urllib.request.Request(address, json.dumps(body).encode(), headers, method="POST"))


def _put(address: str, path: Path) -> None:
    headers = {"Content-Length": str(path.stat().st_size), "Content-Type": "application/octet-stream"}
    with path.open("rb") as file:
        _ask(urllib.request.Request(address, file, headers, method="PUT"))


def _ask(request: urllib.request.Request) -> dict[str, Any]:
    """The JSON answer. Raises UserError with what the server said, ConfigError if it cannot be reached."""
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            return dict(json.load(response))
    except urllib.error.HTTPError as error:
        if error.code == UnavailableError.status:
            raise UnavailableError(_detail(error)) from error
        raise UserError(f"the server refused it ({error.code}): {_detail(error)}") from error
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(f"no server answers at {request.host} ({reason}); name a running one with --url") from error


def _detail(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["detail"])
    except (ValueError, KeyError, TypeError):
        return error.reason
