"""Who is asking: an API key becomes an owner, the name under which a tenant's objects are kept."""

import hashlib
import hmac

from starlette.requests import Request

from tinsmith.config import Settings
from tinsmith.errors import UnauthorizedError

LOCAL_OWNER = "local"


def owner_of(request: Request, settings: Settings) -> str:
    """The owner whose key the request carries, as X-API-Key or Authorization: Bearer.

    A server without keys (reachable from its own machine only, or told to trust its network) has one owner and takes
    any key, or none. Raises UnauthorizedError.
    """
    if not settings.api_keys:
        return LOCAL_OWNER
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    key = request.headers.get("x-api-key") or (credentials.strip() if scheme.lower() == "bearer" else "")
    if not key:
        raise UnauthorizedError("no API key; send it as X-API-Key (TINKER_API_KEY) or as Authorization: Bearer")
    # Every key is compared, so that the time taken tells nothing about which one was nearly right.
    matches = [hmac.compare_digest(key.encode(), known.encode()) for known in settings.api_keys]
    if not any(matches):
        raise UnauthorizedError("this server does not know the API key")
    return hashlib.sha256(key.encode()).hexdigest()[:16]
