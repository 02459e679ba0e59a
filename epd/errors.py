"""Every error that can reach a client or cross a socket.

    EPDError
    ├── ClientError              4xx: the caller can mend it
    │   ├── InvalidRequest       400
    │   │   └── InvalidJSON      400
    │   ├── ContextLengthExceeded 400
    │   ├── InvalidImage         400
    │   ├── Unauthorized         401
    │   ├── MediaForbidden       403
    │   ├── AdminOnly            403
    │   ├── ModelNotFound        404
    │   ├── SessionBusy          409
    │   ├── RequestTooLarge      413
    │   ├── MediaUnavailable     422
    │   └── RequestAborted       499
    └── ServerError              5xx: we, or a part of the cluster, failed
        ├── Overloaded           429 (retryable)
        │   └── TooManyOfKey     429 (retryable)
        ├── WorkerFailed         502
        ├── NoWorker             503 (retryable)
        ├── HandedOver           503 (retryable)
        ├── SessionsUnavailable  503 (retryable)
        ├── ShuttingDown         503 (retryable)
        ├── DeadlineExceeded     504
        └── InternalError        500
    ProtocolError                a peer sent something malformed; never shown to clients
    ConfigError                  a flag or file is wrong; the process prints it and exits with code 2

The HTTP status and the `code` come from the class. `to_info` and `from_info` carry an error across a socket, so
the code on the wire is the code in the HTTP body.
"""

from __future__ import annotations

from typing import ClassVar

import msgspec


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """An error on the wire: what a client may read, nothing else."""

    code: str
    message: str
    param: str | None = None


class EPDError(Exception):
    """Base of all errors that a client may see. `str(error)` is written for that client."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"
    retryable: ClassVar[bool] = False
    retry_after_s: float | None = None
    """When to come back, where that can be told."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def to_info(self) -> ErrorInfo:
        """The wire form of this error."""
        return ErrorInfo(code=self.code, message=self.message, param=self.param)


class ClientError(EPDError):
    """The caller's fault: the same request would fail again."""

    status = 400
    code = "invalid_request"
    type = "invalid_request_error"


class InvalidRequest(ClientError):
    """A field is missing, malformed, out of range or not supported. Set `param` to the field."""


class InvalidJSON(InvalidRequest):
    """The body is not JSON."""

    code = "invalid_json"


class ContextLengthExceeded(ClientError):
    """Prompt, or prompt plus `max_tokens`, does not fit into the context."""

    code = "context_length_exceeded"

    @classmethod
    def of(cls, *, limit: int, prompt: int, completion: int | None) -> ContextLengthExceeded:
        """The phrase that OpenAI clients classify by, with the numbers.

        Args:
            limit: context length in tokens.
            prompt: prompt tokens, images expanded.
            completion: requested completion tokens; None when not given.
        """
        asked = f"{prompt} tokens in the prompt"
        if completion is not None:
            asked = f"{prompt + completion} tokens ({prompt} in the prompt, {completion} for the completion)"
        return cls(
            f"This model's maximum context length is {limit} tokens. However, you requested {asked}. "
            "Please shorten the text, use smaller images or lower max_tokens.",
            param="messages",
        )


class InvalidImage(ClientError):
    """The bytes are no picture that can be decoded, or its size is out of bounds."""

    code = "invalid_image"


class Unauthorized(ClientError):
    """The request brings no key, or a wrong one."""

    status = 401
    code = "invalid_api_key"
    type = "authentication_error"


class MediaForbidden(ClientError):
    """The address or path of a picture is not allowed."""

    status = 403
    code = "media_forbidden"
    type = "permission_error"


class AdminOnly(ClientError):
    """What was asked for concerns everybody, and needs the key of the operators."""

    status = 403
    code = "admin_key_required"
    type = "permission_error"


class ModelNotFound(ClientError):
    """No such model (or route)."""

    status = 404
    code = "model_not_found"
    type = "not_found_error"


class SessionBusy(ClientError):
    """Another request has the session: it is being answered, or took the session over."""

    status = 409
    code = "session_busy"


class RequestTooLarge(ClientError):
    """Body, picture bytes or pixels over the limit."""

    status = 413
    code = "request_too_large"


class MediaUnavailable(ClientError):
    """A remote picture could not be fetched."""

    status = 422
    code = "media_unavailable"


class RequestAborted(ClientError):
    """Somebody asked for its end; clients should not try again by themselves, as they do after a 5xx."""

    status = 499
    code = "aborted"
    type = "aborted_error"


class ServerError(EPDError):
    """Our fault, or the cluster's."""


class InternalError(ServerError):
    """A bug: logged with its trace, shown without it."""


class Overloaded(ServerError):
    """A bounded queue is full."""

    status = 429
    code = "overloaded"
    type = "rate_limit_error"
    retryable = True


class TooManyOfKey(Overloaded):
    """The caller's key has as many requests in work as it may."""

    code = "rate_limit_exceeded"


class WorkerFailed(ServerError):
    """A worker died or reported a failure while it worked on the request."""

    status = 502
    code = "worker_failed"


class NoWorker(ServerError):
    """No live worker of a role that the request needs."""

    status = 503
    code = "no_worker"
    type = "service_unavailable"
    retryable = True


class HandedOver(NoWorker):
    """A worker leaves, and gives the request back as it is, to be gone on with elsewhere."""

    code = "handed_over"


class SessionsUnavailable(ServerError):
    """The store of sessions can't be reached."""

    status = 503
    code = "sessions_unavailable"
    type = "service_unavailable"
    retryable = True


class ShuttingDown(ServerError):
    """This proxy finishes what it has and takes nothing new."""

    status = 503
    code = "shutting_down"
    type = "service_unavailable"
    retryable = True


class DeadlineExceeded(ServerError):
    """A stage could not finish in time."""

    status = 504
    code = "timeout"
    type = "timeout"


class ProtocolError(Exception):
    """A peer's message is malformed, too large or of another version."""


class ConfigError(Exception):
    """A flag, address or file is wrong. Says which one and how to mend it."""


_BY_CODE: dict[str, type[EPDError]] = {
    cls.code: cls
    for cls in (
        InvalidRequest,
        ContextLengthExceeded,
        InvalidImage,
        MediaForbidden,
        ModelNotFound,
        RequestTooLarge,
        MediaUnavailable,
        Overloaded,
        WorkerFailed,
        NoWorker,
        HandedOver,
        DeadlineExceeded,
        InternalError,
    )
}


def from_info(info: ErrorInfo) -> EPDError:
    """The error that `info` describes; an unknown code becomes an `InternalError`."""
    return _BY_CODE.get(info.code, InternalError)(info.message, param=info.param)
