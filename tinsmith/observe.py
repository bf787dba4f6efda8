"""Logging: one line per event on stderr, the same shape in every process of a server. Knows no settings file."""

import logging
import sys


class _Line(logging.Formatter):
    """Keeps an event on one line, whatever a client put into it; only tracebacks follow, indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = record.message.replace("\r", "\\r").replace("\n", "\\n")
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:
        return "    " + super().formatException(ei).replace("\n", "\n    ")  # type: ignore[arg-type]


def configure_logging(level: str, process: str) -> None:
    """Sends tinsmith's events of `level` (debug, info, warning, error) and other packages' warnings to stderr.

    `process` (`server`, `api`, `engine`) is named in each line.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line(f"%(asctime)s %(levelname)-7s {process:<6} %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("tinsmith").setLevel(level.upper())
    logging.captureWarnings(True)
