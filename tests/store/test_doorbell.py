"""The doorbell: heard in every process, by nobody else's server, and never in the way of who rings."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psycopg
import pytest

from tinsmith.errors import ConfigError
from tinsmith.store import sockets
from tinsmith.store.bell import Courier, pack, packets, unpack
from tinsmith.store.doorbell import Bell, Doorbell

LONG = 30.0  # seconds: only a test that fails waits for so long


@pytest.fixture
def doorbell(database_url: str) -> Iterator[Doorbell]:
    doorbell = Doorbell(database_url)
    yield doorbell
    doorbell.close()


@pytest.fixture
def listen(doorbell: Doorbell) -> Iterator[Callable[..., Bell]]:
    bells: list[Bell] = []

    def listen(*topics: str) -> Bell:
        bells.append(doorbell.listen(*topics))
        return bells[-1]

    yield listen
    for bell in bells:
        bell.close()


def hear(bell: Bell, count: int) -> set[str]:
    """Messages, until there are `count` different ones."""
    heard: set[str] = set()
    while len(heard) < count:
        messages = bell.wait(LONG)
        assert messages, f"heard {len(heard)} of {count}"
        heard |= set(messages)
    return heard


def test_a_ring_is_heard_by_all_who_listen_to_its_topic(doorbell: Doorbell, listen: Callable[..., Bell]) -> None:
    one, two, other = listen("done"), listen("done", "engine"), listen("jobs")
    doorbell.ring("done", ["m:1", "m:2"])
    assert hear(one, 2) == hear(two, 2) == {"m:1", "m:2"}
    assert other.wait(0.05) == []


def test_a_ring_without_messages_reads_as_its_topic(doorbell: Doorbell, listen: Callable[..., Bell]) -> None:
    bell = listen("jobs", "engine")
    doorbell.ring("jobs")
    assert hear(bell, 1) == {"jobs"}
    doorbell.ring("engine")
    assert hear(bell, 1) == {"engine"}


def test_no_messages_at_all_wake_nobody(doorbell: Doorbell, listen: Callable[..., Bell]) -> None:
    bell = listen("done")
    doorbell.ring("done", [])
    assert bell.wait(0.05) == []


def test_rings_before_anybody_waits_are_kept(doorbell: Doorbell, listen: Callable[..., Bell]) -> None:
    bell = listen("done")
    for n in range(3):
        doorbell.ring("done", [str(n)])
    assert hear(bell, 3) == {"0", "1", "2"}


def test_thousands_of_messages_arrive_although_a_listener_is_busy(
    doorbell: Doorbell, listen: Callable[..., Bell]
) -> None:
    bell = listen("done")
    names = [f"session-{n // 100}:sample:{n % 100}:{n}" for n in range(5000)]
    for start in range(0, 5000, 50):
        doorbell.ring("done", names[start : start + 50])
    assert hear(bell, 5000) == set(names)


def test_waiting_is_one_sleep_and_no_loop(listen: Callable[..., Bell], monkeypatch: pytest.MonkeyPatch) -> None:
    sleeps = []
    sleep = Bell._sleep
    monkeypatch.setattr(Bell, "_sleep", lambda bell, *args: (sleeps.append(args), sleep(bell, *args))[1])
    assert listen("jobs").wait(0.5) == []
    assert len(sleeps) <= 2


def test_closing_a_bell_wakes_who_waits(doorbell: Doorbell) -> None:
    bell = doorbell.listen("jobs")
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(bell.wait, LONG)
        threading.Event().wait(0.05)
        bell.close()
        assert waiting.result(LONG) == []
    assert bell.wait(LONG) == []
    bell.close()
    doorbell.ring("jobs")


def test_many_threads_ring_at_once(doorbell: Doorbell, listen: Callable[..., Bell]) -> None:
    bell = listen("done")
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda n: doorbell.ring("done", [str(n)]), range(400)))
    assert len(hear(bell, 400)) == 400


def test_other_databases_are_not_heard(doorbell: Doorbell, tmp_path: Path, listen: Callable[..., Bell]) -> None:
    bell = listen("jobs")
    stranger = Doorbell(f"sqlite:///{tmp_path}/other.db")
    stranger.ring("jobs")
    stranger.close()
    assert bell.wait(0.05) == []


def test_an_unknown_topic_is_refused(doorbell: Doorbell) -> None:
    with pytest.raises(ValueError, match="jobs, done, engine"):
        doorbell.listen("nonsense")


def test_strange_messages_harm_nobody(doorbell: Doorbell, listen: Callable[..., Bell]) -> None:
    bell = listen("done")
    doorbell.ring("done", ["nul\0", "x" * 100_000, "\ud800", "ß", "good"])
    assert {"ß", "good"} <= hear(bell, 3)


RINGER = """
import sys
from tinsmith.store.doorbell import Doorbell
doorbell = Doorbell(sys.argv[1])
answers = doorbell.listen("jobs")
doorbell.ring("done", ["up"])
while (heard := answers.wait(30)) != ["stop"]:
    doorbell.ring("done", [f"heard {message}" for message in heard])
doorbell.close()
"""


def test_processes_ring_each_other(doorbell: Doorbell, database_url: str, listen: Callable[..., Bell]) -> None:
    bell = listen("done")
    with subprocess.Popen([sys.executable, "-c", RINGER, database_url]) as process:
        assert hear(bell, 1) == {"up"}
        doorbell.ring("jobs", ["m:1"])
        assert hear(bell, 1) == {"heard m:1"}
        doorbell.ring("jobs", ["stop"])
        assert process.wait(LONG) == 0


def test_a_killed_listener_harms_nobody(doorbell: Doorbell, database_url: str, listen: Callable[..., Bell]) -> None:
    bell = listen("done")
    with subprocess.Popen([sys.executable, "-c", RINGER, database_url]) as process:
        assert hear(bell, 1) == {"up"}
        process.kill()
    doorbell.ring("jobs")
    doorbell.ring("done", ["alive"])
    assert hear(bell, 1) == {"alive"}


# Packets


@pytest.mark.parametrize("limit", [10, 25, 1000])
def test_packets_hold_every_message_and_fit(limit: int) -> None:
    messages = [f"ü{n}" for n in range(100)]
    groups = packets(messages, limit)
    assert [message for group in groups for message in group] == messages
    assert all(len(pack(group)) <= limit and unpack(pack(group)) == group for group in groups)


def test_what_cannot_be_delivered_is_tried_again_and_at_last_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: dict[str, int] = {"never": 0, "third": 0}
    delivered = threading.Event()
    # A try takes ten seconds here, however long the machine needs.
    clock = SimpleNamespace(monotonic=lambda: 10.0 * tries["never"], sleep=time.sleep)
    monkeypatch.setattr("tinsmith.store.bell.time", clock)

    def deliver(address: str, messages: list[str]) -> list[str]:
        tries[address] += 1
        if address == "third" and tries[address] == 3:
            delivered.set()
            return []
        return messages

    courier = Courier(deliver)
    courier.send("never", ["a"])
    courier.send("third", ["a", "b", "a"])
    assert delivered.wait(LONG)
    give_up_at = time.monotonic() + LONG
    while tries["never"] < 4:
        assert time.monotonic() < give_up_at
        time.sleep(0.01)
    courier.close()
    courier.send("never", ["a"])
    assert not courier._bag and tries["never"] == 4


# Sockets


def folder_of(url: str) -> Path:
    return sockets._private_folder(url)


def test_sockets_of_the_dead_are_removed_and_folders_with_them(sqlite_url: str) -> None:
    doorbell = Doorbell(sqlite_url)
    dead = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    dead.bind(str(folder_of(sqlite_url) / "jobs-1-dead"))
    dead.close()
    doorbell.ring("jobs")
    assert list(folder_of(sqlite_url).iterdir()) == []
    bell = doorbell.listen("jobs")
    bell.close()
    doorbell.close()
    assert not folder_of(sqlite_url).exists()


def test_nobody_else_can_enter_the_folder(sqlite_url: str) -> None:
    doorbell = Doorbell(sqlite_url)
    assert folder_of(sqlite_url).stat().st_mode & 0o777 == 0o700
    doorbell.close()


def test_a_folder_that_others_can_enter_is_refused(sqlite_url: str) -> None:
    folder_of(sqlite_url).mkdir(mode=0o755)
    with pytest.raises(ConfigError, match="0700"):
        Doorbell(sqlite_url)
    folder_of(sqlite_url).rmdir()


def test_a_cleaned_temporary_folder_is_made_again(sqlite_url: str) -> None:
    doorbell = Doorbell(sqlite_url)
    bell = doorbell.listen("jobs", "engine")
    for path in folder_of(sqlite_url).iterdir():
        path.unlink()
    folder_of(sqlite_url).rmdir()
    doorbell.ring("jobs")
    assert bell.wait(0.0) == ["jobs", "engine"], "rings may have been lost"
    doorbell.ring("engine")
    assert bell.wait(LONG) == ["engine"]
    bell.close()
    doorbell.close()


def test_the_same_file_is_the_same_doorbell_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert folder_of("sqlite:///x.db") == folder_of(f"sqlite:///{tmp_path}/x.db") != folder_of("sqlite:///y.db")


def test_socket_names_fit_however_deep_the_temporary_folder_is(
    sqlite_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = tmp_path / ("deep" * 30)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    doorbell = Doorbell(sqlite_url)
    bell = doorbell.listen("jobs", "done", "engine")
    doorbell.ring("jobs")
    assert bell.wait(LONG) == ["jobs"]
    bell.close()
    doorbell.close()


OPENER = """
import os, sys
from tinsmith.store.doorbell import Doorbell
doorbell = Doorbell(sys.argv[1])
before = os.listdir("/proc/self/fd")
for _ in range(5):
    doorbell.listen("jobs").close()
assert os.listdir("/proc/self/fd") == before
doorbell.close()
"""


def test_bells_leave_no_open_files(sqlite_url: str) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    # In a process of its own: threads that other tests have left behind open and close files, too.
    subprocess.run([sys.executable, "-c", OPENER, sqlite_url], check=True, timeout=60)


# Notifications


def end_other_connections(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        others = "datname = current_database() AND pid <> pg_backend_pid()"
        conn.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}".encode())


def test_lost_connections_are_made_again(postgres_url: str) -> None:
    doorbell = Doorbell(postgres_url)
    bell = doorbell.listen("jobs", "done")
    doorbell.ring("done", ["m:1"])
    assert bell.wait(LONG) == ["m:1"]
    end_other_connections(postgres_url)
    assert bell.wait(LONG) == ["jobs", "done"], "rings may have been lost"
    doorbell.ring("done", ["m:2"])
    assert bell.wait(LONG) == ["m:2"]
    bell.close()
    doorbell.close()


def test_a_database_that_is_away_stops_nobody() -> None:
    doorbell = Doorbell("postgresql://nobody@/nowhere?host=/nonexistent")
    bell = doorbell.listen("jobs")
    doorbell.ring("jobs")
    assert bell.wait(0.1) == []
    bell.close()
    doorbell.close()
