"""What a caller asks about itself: a token in exchange for its key, the key's description, and to give the key back."""

import sqlalchemy as sa
from starlette.responses import Response

from tinsmith.api.calls import Call, answer
from tinsmith.api.tokens import ORGANIZATION
from tinsmith.errors import UserError
from tinsmith.store import keys
from tinsmith.wire import service_types


async def issue_token(call: Call) -> Response:
    """POST /auth/token: a token that can be sent instead of the key until it expires."""
    tokens, caller = call.services.access.tokens, call.caller
    if not tokens.lifetime:
        raise UserError("this server issues no tokens (token_minutes is 0); send the API key itself")
    return answer(
        service_types.AuthTokenResponse(await tokens.issue(caller.owner, caller.digest, caller.name, caller.until))
    )


async def describe_key(call: Call) -> Response:
    """GET /auth/apikey/me: the key that was sent."""
    caller = call.caller
    number = int(caller.digest[:12] or "0", 16)
    organization, user = (
        service_types.NamedOrganization(ORGANIZATION),
        service_types.KeyUser(f"{caller.owner}@localhost"),
    )
    role = "admin" if caller.is_admin else "user"
    name = caller.name or "any"
    return answer(service_types.KeyInfo(number, name, role, service_types.KeyDetails(organization, user)))


async def revoke_own_key(call: Call) -> Response:
    """DELETE /auth/apikey/me: makes the key that was sent worthless. What it made stays."""
    await call.services.database.write_async(_revoke, call.caller.digest)
    return answer({})


def _revoke(conn: sa.Connection, digest: str) -> None:
    if not keys.revoke_digest(conn, digest):
        raise UserError(
            "this key is not kept in the database, so it cannot be revoked here; it is one of the server's settings "
            "(--api-key), or the server takes any key"
        )
