"""Turns on the event loop: how many requests a round of it begins, whose, and what does not queue."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest
from starlette.requests import Request

from tinsmith.api.auth import _secret
from tinsmith.api.turns import InTurn, Turns, key_sent

EACH = 4


async def count_rounds(begun: list[int]) -> None:
    """Appends, in every round of the event loop, a count of nothing yet."""
    while True:
        begun.append(0)
        await asyncio.sleep(0)


def per_round(crowd: int) -> list[int]:
    """How many of a crowd each round of the event loop began."""
    begun: list[int] = []

    async def request(turns: Turns) -> None:
        await turns.take(b"key")
        begun[-1] += 1

    async def run() -> None:
        counting = asyncio.create_task(count_rounds(begun))
        turns = Turns(EACH)
        await asyncio.gather(*(request(turns) for _ in range(crowd)))
        counting.cancel()

    asyncio.run(run())
    return begun


def test_a_round_of_the_event_loop_begins_no_more_than_a_few_requests() -> None:
    begun = per_round(10 * EACH)
    assert sum(begun) == 10 * EACH
    assert max(begun) == EACH


def test_every_round_begins_as_many_as_it_may_while_others_wait() -> None:
    begun = [number for number in per_round(10 * EACH) if number]
    assert begun == [EACH] * 10


def test_a_few_requests_do_not_wait_at_all() -> None:
    async def run() -> None:
        turns = Turns(EACH)
        for _ in range(EACH):
            assert not suspends(turns.take(b"key"))
        assert suspends(turns.take(b"key"))

    asyncio.run(run())


def suspends(coroutine: Coroutine[Any, Any, None]) -> bool:
    """Whether it waits for anything."""
    try:
        coroutine.send(None)
    except StopIteration:
        return False
    coroutine.close()
    return True


def order_of(crowd: list[bytes], cancelled: int = 0) -> list[bytes]:
    """The keys in whose order the turns of a crowd came, of which the first to wait `cancelled` went away."""
    order: list[bytes] = []

    async def request(turns: Turns, key: bytes) -> None:
        await turns.take(key)
        order.append(key)

    async def run() -> None:
        turns = Turns(EACH)
        tasks = [asyncio.create_task(request(turns, key)) for key in crowd]
        await asyncio.sleep(0)
        for task in tasks[EACH : EACH + cancelled]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())
    return order


def test_keys_take_turns_however_many_requests_one_of_them_has() -> None:
    order = order_of([b"large"] * 100 + [b"small"] * 2)
    assert order[: EACH + 4].count(b"small") == 2
    assert Counter(order) == {b"large": 100, b"small": 2}


def test_sessions_of_one_key_take_turns_and_have_no_more_of_them_than_another_key() -> None:
    order: list[str] = []

    async def request(turns: Turns, key: bytes, session: str) -> None:
        await turns.take(key, session)
        order.append(session)

    async def run() -> None:
        turns = Turns(EACH)
        crowd = [(b"one", "first")] * EACH  # which need not wait
        crowd += [(b"one", name) for name in "abc" for _ in range(10)] + [(b"other", "z")] * 10
        await asyncio.gather(*(request(turns, key, session) for key, session in crowd))

    asyncio.run(run())
    assert "".join(order[EACH:][:20]) == "azbzczazbzczazbzczaz"
    assert "".join(order[EACH:][20:]) == "bcabcabcabcabcabcabc"


def test_requests_of_one_key_keep_their_order() -> None:
    order: list[int] = []

    async def request(turns: Turns, number: int) -> None:
        await turns.take(b"key")
        order.append(number)

    async def run() -> None:
        turns = Turns(EACH)
        await asyncio.gather(*(request(turns, number) for number in range(50)))

    asyncio.run(run())
    assert order == list(range(50))


def test_who_goes_away_while_waiting_takes_nobodys_turn() -> None:
    assert len(order_of([b"key"] * 30, cancelled=10)) == 20


TOKEN, KEY, NO_KEY = (b"authorization", b"Bearer 1"), (b"x-api-key", b"2"), (b"x-api-key", b"")
OTHER_TOKEN, OTHER_KEY = (b"authorization", b"Bearer 3"), (b"x-api-key", b"4")


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ([], b""),
        ([TOKEN, OTHER_TOKEN], b"Bearer 1"),
        ([TOKEN, KEY, OTHER_KEY], b"2"),
        ([NO_KEY, OTHER_KEY, TOKEN], b"Bearer 1"),
    ],
)
def test_a_request_waits_under_the_key_that_is_looked_at(headers: list[tuple[bytes, bytes]], key: bytes) -> None:
    assert key_sent({"headers": headers}) == key
    sent = Request({"type": "http", "headers": headers})
    assert not headers or _secret(sent) == key.decode().removeprefix("Bearer ")


Paths = Callable[[str], Awaitable[None]]


@pytest.mark.parametrize("path", ["/api/v1/session_heartbeat", "/api/v1/healthz"])
def test_a_heartbeat_passes_all_that_wait(path: str) -> None:
    begun: list[str] = []

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        begun.append(scope["path"])

    async def run() -> None:
        in_turn = InTurn(app, Turns(EACH))
        requests = ["/api/v1/asample"] * 200 + [path]
        scopes = [{"type": "http", "path": one, "headers": []} for one in requests]
        await asyncio.gather(*(in_turn(scope, None, None) for scope in scopes))  # type: ignore[arg-type]

    asyncio.run(run())
    assert begun.index(path) == EACH
    assert len(begun) == 201
