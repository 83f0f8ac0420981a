"""The one exception tree; every leaf carries the HTTP status and the OpenAI error type that a client sees.

BatonError
|- RequestError              the caller's fault
|  |- InvalidParameter 400   |- PromptTooLong 400   |- ModelNotFound 404   |- Unauthorized 401   |- BodyTooLarge 413
|  |- BodyTooSlow 408        |- RequestNotFound 404
|- Unavailable               nobody's fault, may succeed elsewhere or later
|  |- Overloaded 429         |- NoReplica 503       |- RequestTimeout 504
|- PeerError                 another process failed us; the request is re-planned
|  |- PeerLost 503           |- StaleMessage 409    |- TransferFailed 503   |- Incompatible 409
|- ConfigurationError 500    the operator's fault, raised before serving
"""


class BatonError(Exception):
    """Base of every error that may cross a process border; `str(error)` is safe to show to a client."""

    status = 500
    type = "internal_error"
    retryable = False

    def __init__(self, message: str, *, field: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.retry_after_s = retry_after_s


class RequestError(BatonError):
    """The request itself is at fault."""

    status = 400
    type = "invalid_request_error"


class InvalidParameter(RequestError):
    """A field has a wrong type or value; `field` names it."""


class PromptTooLong(RequestError):
    """Prompt plus requested output exceed the model's length; the message names both lengths."""


class ModelNotFound(RequestError):
    """The named model is not served here."""

    status = 404
    type = "not_found_error"


class RequestNotFound(RequestError):
    """Nothing is remembered of a request of this name."""

    status = 404
    type = "not_found_error"


class Unauthorized(RequestError):
    """The API key is missing or wrong."""

    status = 401
    type = "authentication_error"


class BodyTooLarge(RequestError):
    """The HTTP body exceeds the configured size; the message names the limit."""

    status = 413


class BodyTooSlow(RequestError):
    """The HTTP body did not arrive within the configured time."""

    status = 408
    type = "timeout_error"


class Unavailable(BatonError):
    """The request may succeed later or on another replica."""

    status = 503
    type = "service_unavailable_error"
    retryable = True


class Overloaded(Unavailable):
    """A bounded queue is full; `retry_after_s` says when to come back."""

    status = 429
    type = "rate_limit_error"


class NoReplica(Unavailable):
    """No live replica can take the request."""


class RequestTimeout(Unavailable):
    """The request's deadline passed."""

    status = 504
    type = "timeout_error"


class PeerError(BatonError):
    """Another process did not do its part; the orchestrator plans the request anew."""

    status = 503
    retryable = True


class PeerLost(PeerError):
    """A process cannot be reached or has ended."""


class StaleMessage(PeerError):
    """A message carries an outdated attempt, generation or incarnation, or follows its own cancellation."""

    status = 409


class TransferFailed(PeerError):
    """KV blocks did not arrive intact before the deadline."""


class Incompatible(PeerError):
    """Two processes cannot exchange messages, or two replicas KV blocks; `field` names what differs."""

    status = 409
    retryable = False


class ConfigurationError(BatonError):
    """The configuration or the checkpoint cannot be served; raised while starting."""


def error_classes() -> dict[str, type[BatonError]]:
    """Every class of the tree by its name, for carrying errors over a wire."""
    found: dict[str, type[BatonError]] = {}
    pending: list[type[BatonError]] = [BatonError]
    while pending:
        cls = pending.pop()
        found[cls.__name__] = cls
        pending.extend(cls.__subclasses__())
    return found
