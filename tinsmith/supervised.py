"""The child's end of the line to its supervisor: a first line of input, and the end of input, which says stop."""

import os
import threading
import time


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
