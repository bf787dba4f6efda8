"""Every error that a user can meet: its HTTP status, and whose fault it is.

Messages say what was wrong, with the offending value, and what is allowed. Errors are caught at four borders
only: the HTTP handler, the engine's dispatch, the worker loop and the supervisor.
"""


class TinsmithError(Exception):
    """The server could not do what was asked, through no fault of the request."""

    status = 500
    category = "server"


class UserError(TinsmithError):
    """The request is wrong; the message says how to right it."""

    status = 400
    category = "user"


class UnauthorizedError(UserError):
    """No API key, or one that this server does not know."""

    status = 401


class LimitError(UserError):
    """A limit of the caller's key is reached; only the caller or an operator can change that."""

    status = 403


class ForbiddenError(UserError):
    """The caller is known, and may not do this whatever the circumstances."""

    status = 403


class NotFoundError(UserError):
    """There is no such object, or it belongs to somebody else."""

    status = 404


class GoneError(UserError):
    """The object existed once; its lifetime is over."""

    status = 410


class TooLargeError(UserError):
    """The body is larger than the server takes."""

    status = 413


class BusyError(TinsmithError):
    """The server, or the caller's rate, is at its limit; the same request will be taken in `retry_seconds`."""

    status = 429

    def __init__(self, message: str, retry_seconds: float) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds


class UnavailableError(TinsmithError):
    """The server cannot answer yet (it is starting), or for the moment (its engine is being restarted)."""

    status = 503


class ConfigError(TinsmithError):
    """A setting is unknown, malformed, or does not fit the machine."""
