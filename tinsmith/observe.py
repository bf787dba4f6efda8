"""Logging: one line per event on stderr, the same shape in every process of a server; and what ties lines together.

Lines are text for people or JSON for programs. Every request of a client has one trace id, which its lines in all
processes name. Knows no settings file, no requests and no jobs.
"""

import json
import logging
import re
import secrets
import sys
import threading
from datetime import UTC, datetime
from types import TracebackType

REQUESTS = logging.getLogger("tinsmith.requests")
"""One line at each station of every request: with JSON lines at level info, in text only at debug."""

FORMATS = ("text", "json")

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-((?!0{32})[0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")
_REQUEST_ID = re.compile(r"[0-9A-Za-z][0-9A-Za-z._:-]{0,63}")


def trace_id(traceparent: str | None = None, request_id: str | None = None) -> str:
    """The trace id of a request that came with these headers, or a new one (32 hexadecimal digits).

    `traceparent` is the W3C's header, of which the trace id counts; `request_id` is taken as it is, if it is 1 to 64
    letters, digits and `._:-`. Malformed ones are passed over: they are nobody's error but the sender's own loss.
    """
    if traceparent and (found := _TRACEPARENT.fullmatch(traceparent)):
        return found[1]
    if request_id and _REQUEST_ID.fullmatch(request_id):
        return request_id
    return secrets.token_hex(16)


def note(logger: logging.Logger, level: int, message: str, **fields: object) -> None:
    """Logs `message` with named values: JSON members, or `name=value` at the end of a text line."""
    if logger.isEnabledFor(level):
        logger.log(level, message, extra={"fields": fields})


def configure_logging(level: str, process: str, form: str = "text") -> None:
    """Sends tinsmith's events of `level` (debug, info, warning, error) and other packages' warnings to stderr.

    `process` (`server`, `api`, `engine`) is named in each line; `form` is text or json.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLine(process) if form == "json" else _TextLine(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    least = logging.getLevelNamesMapping()[level.upper()]
    logging.getLogger("tinsmith").setLevel(least)
    REQUESTS.setLevel(least if form == "json" or least <= logging.DEBUG else max(least, logging.WARNING))
    logging.captureWarnings(True)
    if form == "json":
        sys.excepthook = _log_uncaught
        threading.excepthook = _log_uncaught_in_thread


class _TextLine(logging.Formatter):
    """Keeps an event on one line, whatever a client put into it; only tracebacks follow, indented."""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)-7s {process:<6} %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        values = "".join(f" {name}={value}" for name, value in _fields(record).items())
        record.message = (record.message + values).replace("\r", "\\r").replace("\n", "\\n")
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:
        return "    " + super().formatException(ei).replace("\n", "\n    ")  # type: ignore[arg-type]


class _JsonLine(logging.Formatter):
    """One JSON object, of ASCII alone, per event, its traceback included."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields: dict[str, object] = getattr(record, "fields", {})
    return fields


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    logging.getLogger("tinsmith").critical("the process ends: %s", error, exc_info=(kind, error, trace))


def _log_uncaught_in_thread(arguments: threading.ExceptHookArgs) -> None:
    error = arguments.exc_value
    if error is not None and not isinstance(error, SystemExit):
        name = arguments.thread.name if arguments.thread else "?"
        logging.getLogger("tinsmith").critical("the thread %s ends: %s", name, error, exc_info=error)
