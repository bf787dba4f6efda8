"""Error bodies as the clients of each dialect read them. Which dialect it is, the path says (or Anthropic's header)."""

from typing import Any

from starlette.requests import Request

OPENAI, ANTHROPIC, TINKER = "openai", "anthropic", "tinker"
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def dialect_of(request: Request) -> str:
    """In which of the three dialects a request is to be answered."""
    path = request.url.path
    if path.startswith(("/anthropic/", "/v1/messages")):
        return ANTHROPIC
    if not path.startswith(("/oai/", "/v1/")):
        return TINKER
    return ANTHROPIC if path.startswith("/v1/") and "anthropic-version" in request.headers else OPENAI


def error_body(dialect: str, status: int, message: str) -> dict[str, Any]:
    """The body that says `message`."""
    if dialect == OPENAI:
        kind = _OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        code = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}.get(status)
        return {"error": {"message": message, "type": kind, "param": None, "code": code}}
    if dialect == ANTHROPIC:
        kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": message}}
    return {"detail": message}
