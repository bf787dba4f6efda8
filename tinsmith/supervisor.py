"""Keeps a server's processes running: starts them, restarts those that crash or get stuck, stops them in order.

A child gets one line on its standard input; the end of that input tells it to stop, so that children also stop when
this process is killed. Knows commands and exit codes, nothing of settings, models or HTTP.
"""

import logging
import queue
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

logger = logging.getLogger(__name__)

EXIT_CONFIG = 78
"""A child that cannot work with its settings ends with this code and is not restarted."""

MAX_CRASHES = 5  # in a row, of processes that were of no use before
WELL_SECONDS = 60.0  # a process that has moved for so long was of use, also if nobody wanted anything
CRASH_WINDOW = 300.0  # seconds
STACK_SECONDS = 5.0  # for a stuck process to write where its threads stand
FIRST_DELAY = 0.25  # seconds; doubles with every crash in the window
LONGEST_DELAY = 15.0
HOPELESS_DELAY = 300.0  # before another try with one that restarting did not help, while others of its kind work


@dataclass
class Child:
    """One process to keep running. `grace` is how many seconds it may take to stop before it is killed.

    `environment` takes the place of this process's own. A process that has begun to change its file `pulse` must go
    on doing so at least every `patience` seconds (0: it is never taken for stuck). The file's first line is any byte,
    then a number: how much the process has got done.

    A `spare` child is one of several of its kind: as long as another one of them works, it alone stands still when
    restarting does not help, is tried again after HOPELESS_DELAY, and `stands_still` is told why.
    """

    name: str
    command: Sequence[str]
    first_line: str
    pass_fds: tuple[int, ...] = ()
    grace: float = 10.0
    environment: Mapping[str, str] | None = None
    pulse: Path | None = None
    patience: float = 0.0
    spare: bool = False
    stands_still: Callable[[str], None] | None = None
    hopeless: bool = False  # restarting it did not help, and it has not been tried again
    process: subprocess.Popen[bytes] | None = None
    pulse_before: int | None = None  # this process: when an earlier one last changed it
    moving_since: float | None = None  # when its first change was noticed; without a pulse: its start
    crashed_at: deque[float] = field(default_factory=deque)
    useless: int = 0  # processes in a row that crashed and had been of no use
    starts: int = 0

    def start(self) -> subprocess.Popen[bytes]:
        """A new process, in a session of its own so that Ctrl-C reaches only the supervisor."""
        self.pulse_before = self.last_change()
        self.moving_since = time.monotonic() if self.pulse is None else None
        self.starts += 1
        self.hopeless = False
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            pass_fds=self.pass_fds,
            env=self.environment,
            start_new_session=True,
        )
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it may have died at once; its exit is noticed elsewhere
            self.process.stdin.write(self.first_line.encode() + b"\n")
            self.process.stdin.flush()
        return self.process

    def end_input(self) -> None:
        """What tells the process to stop; also to be called once it has ended."""
        assert self.process is not None and self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def last_change(self) -> int | None:
        """When the pulse was last seen to beat, in the file system's nanoseconds; None if it never did."""
        try:
            return self.pulse.stat().st_mtime_ns if self.pulse is not None else None
        except FileNotFoundError:
            return None

    def was_of_use(self, now: float) -> bool:
        """Whether the process that ended at `now` had got something done, or had run well for a while."""
        if self.pulse is not None and self.last_change() != self.pulse_before and _done(self.pulse) > 0:
            return True
        return self.moving_since is not None and now - self.moving_since >= WELL_SECONDS

    def next_delay(self, now: float) -> float | None:
        """Notes a crash at `now`; how long to wait before a restart, or None if restarting does not help.

        It does not after too many processes in a row that were of no use. Others are started again for ever, with
        pauses that grow while crashes are frequent.
        """
        self.useless = 0 if self.was_of_use(now) else self.useless + 1
        self.crashed_at.append(now)
        while self.crashed_at[0] < now - CRASH_WINDOW:
            self.crashed_at.popleft()
        if self.useless > MAX_CRASHES:
            return None
        doublings = min(len(self.crashed_at) - 1, 10)
        return min(LONGEST_DELAY, FIRST_DELAY * 2.0**doublings)


@dataclass(frozen=True)
class _Exited:
    child: Child
    process: subprocess.Popen[bytes]


@dataclass(frozen=True)
class _RestartDue:
    child: Child


@dataclass(frozen=True)
class _Signalled:
    number: int


class Supervisor:
    """Runs `children` until a signal, or until one cannot be kept running. They stop in reverse order."""

    def __init__(self, children: Sequence[Child]) -> None:
        self._children = children
        self._events: queue.SimpleQueue[_Exited | _RestartDue | _Signalled] = queue.SimpleQueue()
        self.stopping = threading.Event()

    def run(self) -> int:
        """The server's exit code: 0 after a signal, 2 for settings that do not work, 1 after too many crashes."""
        with self._heard_signals():
            for child in self._children:
                self._start(child)
            code = None
            while code is None:
                code = self._handle(self._events.get())
            self.stopping.set()
            self._stop_all()
            return code

    @contextmanager
    def _heard_signals(self) -> Iterator[None]:
        """Makes events of signals, in a thread that reads the bytes which the C handler writes.

        A handler in Python would have to wait for the main thread, which a signal does not always wake.
        """
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup is meant
            numbers.append(signal.SIGHUP)
        receiver, sender = socket.socketpair()
        sender.setblocking(False)
        signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        for number in numbers:
            signal.signal(number, lambda number, frame: None)

        def read() -> None:
            while heard := receiver.recv(16):
                for number in heard:
                    self._events.put(_Signalled(number))

        threading.Thread(target=read, name="signals", daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)
            sender.close()

    def _start(self, child: Child) -> None:
        process = child.start()
        ended = threading.Event()
        logger.debug("started %s as process %d", child.name, process.pid)

        def wait() -> None:
            process.wait()
            ended.set()
            self._events.put(_Exited(child, process))

        threading.Thread(target=wait, name=f"wait-{child.name}", daemon=True).start()
        if child.pulse is not None:
            watch = (child, process, ended)
            threading.Thread(target=_watch, args=watch, name=f"watch-{child.name}", daemon=True).start()

    def _handle(self, event: _Exited | _RestartDue | _Signalled) -> int | None:
        """What to do about one event; an exit code when the server is to end."""
        match event:
            case _Signalled(number):
                logger.info("%s: stopping; once more to stop at once", signal.Signals(number).name)
                return 0
            case _RestartDue(child):
                self._start(child)
                return None
            case _Exited(child, process):
                return self._handle_exit(child, process.returncode)

    def _handle_exit(self, child: Child, code: int) -> int | None:
        child.end_input()
        child.process = None
        if code == EXIT_CONFIG and (child.starts == 1 or not child.spare):
            return 2
        delay = child.next_delay(time.monotonic()) if code != EXIT_CONFIG else None
        child.hopeless = delay is None
        if delay is None:
            return self._without(child, code)
        logger.warning("%s %s%s; restarting in %.2g s", child.name, _describe(code), _history(child), delay)
        self._restart_after(child, delay)
        return None

    def _without(self, child: Child, code: int) -> int | None:
        """Goes on without a child that restarting does not help, if others of its kind work; else an exit code."""
        reason = f"{_describe(code)}, {child.useless} times in a row without having got anything done"
        if code == EXIT_CONFIG:
            reason = "cannot work with its settings any more, as its last lines in the log say"
        if not child.spare or all(other.hopeless or not other.spare for other in self._children):
            logger.error("%s %s; giving up", child.name, reason)
            return 1
        logger.error("%s %s; the others go on, and it is tried again in %g s", child.name, reason, HOPELESS_DELAY)
        if child.stands_still is not None:
            child.stands_still(reason)
        self._restart_after(child, HOPELESS_DELAY)
        return None

    def _restart_after(self, child: Child, delay: float) -> None:
        timer = threading.Timer(delay, self._events.put, (_RestartDue(child),))
        timer.daemon = True
        timer.start()

    def _stop_all(self) -> None:
        patient = True
        for child in reversed(self._children):
            if child.process is not None:
                patient = self._stop(child, patient)

    def _stop(self, child: Child, patient: bool) -> bool:
        """Ends one child; whether the others may take their time too (no second signal came)."""
        process = child.process
        assert process is not None
        child.end_input()
        deadline = time.monotonic() + child.grace
        while process.poll() is None and patient:
            try:
                event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                logger.error("%s did not stop within %g s; killing it", child.name, child.grace)
                break
            patient = not isinstance(event, _Signalled)
        if process.poll() is None:
            process.kill()
            process.wait()
        return patient


def _watch(child: Child, process: subprocess.Popen[bytes], ended: threading.Event) -> None:
    """Follows one process's pulse until it has ended; ends it if it stops moving.

    Until its first pulse it is loading, however long that takes. Time for which this process did not move either (the
    whole machine was paused) is nobody's fault.
    """
    pulse, still, now = child.pulse_before, None, time.monotonic()
    interval = min(1.0, child.patience / 4 or 1.0)
    while not ended.wait(interval):
        before, now, latest = now, time.monotonic(), child.last_change()
        if latest != pulse:
            pulse, still = latest, 0.0
            child.moving_since = child.moving_since or now
        elif still is not None:
            still += min(now - before, 2 * interval)
        if still is not None and child.patience and still > child.patience:
            _end_stuck(child, process, ended)
            return


def _end_stuck(child: Child, process: subprocess.Popen[bytes], ended: threading.Event) -> None:
    logger.error(
        "%s is alive but has not moved for %g s; ending it, to be started again. Where its threads stand follows, if "
        "it can still say so",
        child.name,
        child.patience,
    )
    process.send_signal(signal.SIGABRT)
    if not ended.wait(STACK_SECONDS):
        process.kill()


def _history(child: Child) -> str:
    """What the crashes so far say, in words."""
    if child.useless:
        return f", having got nothing done ({child.useless} of at most {MAX_CRASHES} times in a row)"
    crashes = len(child.crashed_at)
    return f" ({crashes} times in {CRASH_WINDOW / 60:.0f} minutes)" if crashes > 1 else ""


def _done(pulse: Path) -> int:
    """How much a process says that it has got done."""
    try:
        return int(pulse.read_bytes().partition(b"\n")[0][1:] or b"0")
    except (OSError, ValueError):
        return 0


def _describe(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
