"""The child's end of the line to its supervisor: a first line of input, and the end of input, which says stop.

In the other direction goes a file: how much has been got done, so that a crash is known for what it is.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PULSE_SECONDS = 1.0


def read_first_line() -> str:
    """From standard input, unbuffered: the rest of it must stay readable for `stop_at_end_of_input`."""
    line = b""
    while not line.endswith(b"\n"):
        part = os.read(0, 65536)
        if not part:
            raise SystemExit("this process is started by `tinsmith serve`; it needs settings on its standard input")
        line += part
    return line.decode()


def stop_at_end_of_input(stop: threading.Event, grace: float) -> None:
    """Waits for that end, sets `stop`, and ends the process if it is still there after `grace` seconds."""
    while os.read(0, 4096):
        pass
    stop.set()
    time.sleep(grace)
    os._exit(1)  # the parent may be gone, so nobody else would end a process that hangs


def tell_progress(pulse: Path, done: Callable[[], int], stop: threading.Event) -> None:
    """Writes `done` into the file `pulse`, at once and every second, until `stop`."""
    pulse.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with suppress(OSError):  # a full disk, say: then a crash would pass for one without use
            pulse.write_bytes(b"-%d\n" % done())
        if stop.wait(PULSE_SECONDS):
            return
