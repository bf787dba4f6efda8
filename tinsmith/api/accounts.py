"""What was done and what was used: the audit log, usage by the hour with its prices, and what is stored now.

Everybody sees their own; an admin sees all.
"""

from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta

import sqlalchemy as sa
from starlette.responses import Response

from tinsmith.api.calls import Call, answer
from tinsmith.api.sessions import labels
from tinsmith.config import Settings
from tinsmith.errors import UserError
from tinsmith.store import audit, records, usage
from tinsmith.wire import accounts

GIGABYTE = 10**9
MONTH_HOURS = 720
_LONGEST = timedelta(days=14)
_MILLION = 1_000_000


async def audit_log(call: Call) -> Response:
    """GET /audit: the acts of one day (UTC; today), oldest first."""
    kind = call.request.query_params.get("event_type", "all")
    allowed = ("all", *audit.RESOURCES, "teams")
    if kind not in allowed:
        raise UserError(f"event_type is {kind!r}; allowed: {', '.join(allowed)}")
    resource = None if kind == "all" else audit.RESOURCES.get(kind, kind)
    since = _day(call.request.query_params.get("day")).timestamp()
    entries = await call.services.database.read_async(
        audit.entries, _whose(call), since, since + timedelta(days=1).total_seconds(), resource
    )
    return answer(accounts.AuditLog([_entry(entry) for entry in entries]))


def _entry(entry: audit.Entry) -> accounts.AuditEntry:
    details: dict[str, object] = {"owner": entry.owner, **entry.details}
    model_id, path = entry.details.get("model_id"), entry.details.get("tinker_path")
    return accounts.AuditEntry(_timestamp(entry.at), entry.event, details, model_id, path)


async def usage_events(call: Call) -> Response:
    """GET /billing/usage/events: what was used, by hour, session and kind, from `starting_on` until `ending_before`."""
    first, last = _hours(call)
    report = await call.services.database.read_async(_report, call.services.settings, _whose(call), first, last)
    return answer(report)


async def current_storage(call: Call) -> Response:
    """GET /billing/usage/checkpoints/current: checkpoints that are kept now, by project and owner."""
    project_id = call.request.query_params.get("project_id")
    if project_id is not None and not project_id.isprintable():
        raise UserError(f"there is no project {project_id[:80]!r}")
    shelves = await call.services.database.read_async(usage.shelves, _whose(call), project_id)
    rate = call.services.settings.price_storage or None
    data = [
        accounts.StoredNow(
            shelf.project_id,
            shelf.owner,
            shelf.owner,
            shelf.checkpoints,
            shelf.size_bytes,
            shelf.size_bytes / GIGABYTE,
            None if rate is None else rate * shelf.size_bytes / GIGABYTE,
        )
        for shelf in shelves
    ]
    return answer(accounts.StorageReport(data, rate))


def _report(
    conn: sa.Connection, settings: Settings, owner: str | None, first_hour: int, last_hour: int
) -> accounts.UsageReport:
    now = datetime.now(UTC).timestamp()
    tokens = usage.tokens(conn, owner, first_hour, last_hour)
    stored = usage.stored(conn, owner, first_hour, last_hour, now)
    session_ids = sorted({each.account.session_id for each in tokens} | {each.account.session_id for each in stored})
    about = usage.sessions_about(conn, session_ids)
    events = [_tokens_event(each, settings, about) for each in tokens]
    events += [event for each in stored for event in _storage_events(each, settings, about)]
    events.sort(key=lambda event: event.bucket_start)  # stable: tokens stay before storage, most first
    known = {key: accounts.UsageSession(labels(metadata)) for key, (_, metadata) in about.items()}
    return accounts.UsageReport(events, known)


def _tokens_event(used: usage.Tokens, settings: Settings, about: usage.About) -> accounts.UsageEvent:
    rates = {
        "train": settings.price_train,
        "prefill": settings.price_prefill,
        "cached_prefill": settings.price_cached_prefill,
        "sample": settings.price_sample,
    }
    rate = rates[used.kind] or None
    info: accounts.TokenUse | accounts.PrefillUse
    if used.kind in ("prefill", "cached_prefill"):
        info = accounts.PrefillUse(used.kind == "cached_prefill", used.count)
    else:
        info = accounts.TokenUse("training" if used.kind == "train" else "sampling_sample", used.count)
    event = _event(used.hour, used.account, about, info)
    event.effective_rate_usd_per_million_tokens = rate
    event.estimated_cost_usd = None if rate is None else rate * used.count / _MILLION
    return event


def _storage_events(stored: usage.Stored, settings: Settings, about: usage.About) -> Iterator[accounts.UsageEvent]:
    if stored.made:
        yield _event(stored.hour, stored.account, about, accounts.CheckpointUse(stored.made))
    rate, amount = settings.price_storage or None, stored.byte_hours / GIGABYTE
    event = _event(stored.hour, stored.account, about, accounts.StorageUse(amount))
    event.effective_rate_usd_per_gigabyte_month = rate
    event.estimated_cost_usd = None if rate is None else rate * amount / MONTH_HOURS
    yield event


def _event(
    hour: int,
    account: usage.Account,
    about: usage.About,
    info: accounts.TokenUse | accounts.PrefillUse | accounts.CheckpointUse | accounts.StorageUse,
) -> accounts.UsageEvent:
    project_id, _ = about.get(account.session_id, (None, {}))
    begin = hour * usage.HOUR
    times = (_timestamp(begin), _timestamp(begin + usage.HOUR))
    return accounts.UsageEvent(*times, account.base, account.owner, account.owner, account.session_id, project_id, info)


def _whose(call: Call) -> str | None:
    return None if call.viewer == records.EVERYBODY else call.owner


def _hours(call: Call) -> tuple[int, int]:
    """The window of the query, in hours since the epoch. Raises UserError."""
    begin, end = (_instant(call, name) for name in ("starting_on", "ending_before"))
    if begin > datetime.now(UTC):
        raise UserError(f"starting_on is {begin.isoformat()}, which is in the future")
    if not begin < end <= begin + _LONGEST:
        raise UserError(
            f"the window from {begin.isoformat()} to {end.isoformat()} is not allowed; it must end after it begins, "
            f"and cover {_LONGEST.days} days at most"
        )
    return int(begin.timestamp()) // usage.HOUR, int(end.timestamp()) // usage.HOUR


def _instant(call: Call, name: str) -> datetime:
    text = call.request.query_params.get(name, "")
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is not None and moment.timestamp() % usage.HOUR == 0:
            return moment.astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    raise UserError(f"{name} is {text[:80]!r}; it must be a full hour like 2026-07-13T00:00:00Z")


def _day(text: str | None) -> datetime:
    """Midnight (UTC) of a day like 2026-07-13, or of today."""
    try:
        day = datetime.now(UTC).date() if text is None else date.fromisoformat(text)
    except ValueError:
        raise UserError(f"day is {(text or '')[:80]!r}; it must be like 2026-07-13") from None
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()
