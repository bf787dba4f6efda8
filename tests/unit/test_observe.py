"""Log lines, for people and for programs, and the trace ids in them."""

import json
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tinsmith import observe
from tinsmith.observe import REQUESTS, configure_logging, note, trace_id

log = logging.getLogger("tinsmith.test")


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("tinsmith")
    before = (root.handlers[:], root.level, ours.level, REQUESTS.level, sys.excepthook, threading.excepthook)
    yield
    root.handlers[:], root.level, ours.level, REQUESTS.level, sys.excepthook, threading.excepthook = before
    logging.captureWarnings(False)


def of_this_test(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Our own lines: clients that earlier tests left behind in this process may log something, too."""
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    return [line for line in lines if line["logger"].startswith("tinsmith")]


def test_a_json_line_is_one_object_with_its_fields_and_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "engine", "json")
    note(REQUESTS, logging.INFO, "ended", trace="ab", kind="sample", tokens=3)
    try:
        raise ValueError("two\nlines \ud800")
    except ValueError:
        log.exception("it broke: %s", "why\nnot")
    ended, broke = of_this_test(capsys)
    assert ended.pop("time").endswith("+00:00")
    assert ended == {
        "level": "info", "process": "engine", "logger": "tinsmith.requests", "message": "ended",
        "trace": "ab", "kind": "sample", "tokens": 3,
    }  # fmt: skip
    assert (broke["message"], broke["level"]) == ("it broke: why\nnot", "error")
    assert broke["exception"].startswith("Traceback") and "ValueError: two\nlines" in broke["exception"]


def test_a_text_line_stays_one_line_and_shows_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "api")
    note(log, logging.INFO, "made", name="a\nb", size=7)
    assert capsys.readouterr().err.rstrip("\n").endswith("INFO    api    made name=a\\nb size=7")


@pytest.mark.parametrize(
    ("level", "form", "shown"),
    [("info", "text", False), ("debug", "text", True), ("info", "json", True), ("warning", "json", False)],
)
def test_stations_of_requests_are_shown_to_programs_and_to_who_asks_for_debug(
    level: str, form: str, shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(level, "api", form)
    note(REQUESTS, logging.INFO, "accepted")
    note(REQUESTS, logging.WARNING, "failed")
    assert ("accepted" in (err := capsys.readouterr().err)) == shown
    assert "failed" in err


def test_what_nobody_caught_is_a_json_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "engine", "json")
    error = RuntimeError("the end")
    sys.excepthook(RuntimeError, error, None)
    thread = threading.Thread(target=lambda: {}["nothing"], name="worker")
    thread.start()
    thread.join()
    process, in_thread = of_this_test(capsys)
    assert process["message"] == "the process ends: the end" and "RuntimeError" in process["exception"]
    assert in_thread["message"] == "the thread worker ends: 'nothing'" and "KeyError" in in_thread["exception"]


def test_well_formed_headers_give_the_trace_id() -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    assert trace_id(f"00-{trace}-00f067aa0ba902b7-01", "mine") == trace
    assert trace_id(f"01-{trace}-00f067aa0ba902b7-01-later-versions-say-more") == trace
    assert trace_id(None, "job_7.a:B-c") == "job_7.a:B-c"


@pytest.mark.parametrize(
    ("traceparent", "request_id"),
    [
        (None, None),
        ("", ""),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7", "-begins-badly"),
        ("00-" + "0" * 32 + "-00f067aa0ba902b7-01", "with space"),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-" + "0" * 16 + "-01", "a" * 65),
        ("ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "new\nline"),
        ("00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01", "é"),
    ],
)
def test_malformed_headers_give_a_new_trace_id(traceparent: str | None, request_id: str | None) -> None:
    made = {trace_id(traceparent, request_id) for _ in range(3)}
    assert len(made) == 3
    assert all(len(each) == 32 and int(each, 16) for each in made)


def test_a_line_that_nobody_wants_is_not_made() -> None:
    class Unwilling:
        def __str__(self) -> str:
            raise AssertionError("formatted")

    configure_logging("warning", "api", "json")
    note(observe.REQUESTS, logging.INFO, "accepted", value=Unwilling())
