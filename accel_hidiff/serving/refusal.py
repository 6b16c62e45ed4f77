"""Answers that are no image: a status, and one line that says what was expected, what came and what to do."""

from __future__ import annotations

from typing import Any


class Refusal(Exception):
    """A request that is not served.

    Attributes:
        status: of HTTP; 499 is for a client that went, who gets no answer.
        message: one line.
        kind: "invalid_request_error", "rate_limit_error" or "server_error".
        param: the field of the request that is at fault, None where it is none.
        code: a name for programs.
        retry_after: seconds after which to try again, None where that would not help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def to_json(self) -> dict[str, Any]:
        """The body of the answer, as OpenAI's API has it.

        >>> Refusal(400, "n: expected 1 to 4, got 9", param="n", code="invalid_value").to_json()["error"]["param"]
        'n'
        """
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def headers(self) -> dict[str, str]:
        """Headers of the answer beside those of its body."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def invalid(param: str | None, message: str, code: str = "invalid_value") -> Refusal:
    """400: the request says something that cannot be."""
    return Refusal(400, message, param=param, code=code)


def too_large(limit: int) -> Refusal:
    """413: more bytes than `service.max_body`."""
    message = f"body: expected at most {limit} bytes, got more; send a shorter request"
    return Refusal(413, message, code="body_too_large")


def queue_full(capacity: int, retry_after: int) -> Refusal:
    """429: as many requests wait as may."""
    message = (
        f"queue: expected fewer than {capacity} waiting requests, got {capacity}; try again in about {retry_after} s"
    )
    return Refusal(429, message, kind="rate_limit_error", code="queue_full", retry_after=retry_after)


def timed_out(seconds: float) -> Refusal:
    """504: the request took longer than `service.timeout`."""
    message = (
        f"expected an image within {seconds:g} s, waiting included, and it took longer; "
        "ask for fewer steps, fewer images or a smaller size, or try when the queue is shorter"
    )
    return Refusal(504, message, kind="server_error", code="timeout")


def client_gone() -> Refusal:
    """499: nobody reads the answer."""
    return Refusal(499, "the client closed the connection", code="client_gone")


def unavailable(message: str, code: str, retry_after: int | None) -> Refusal:
    """503: this process does not serve the request now; another one, or this one later, may."""
    return Refusal(503, message, kind="server_error", code=code, retry_after=retry_after)


def out_of_memory(what: str) -> Refusal:
    """503: the request needs more memory than the device has left; nothing is wrong with the service."""
    message = f"expected {what} to fit the memory of the device, it does not now; ask for a smaller size, or try later"
    return unavailable(message, "out_of_memory", None)


def device_lost() -> Refusal:
    """503: no request can be served any more until the process is started anew."""
    return unavailable("the device answers no more; send the request to another replica", "device_lost", None)


def stopping() -> Refusal:
    """503: the service was told to end."""
    return unavailable("the service is stopping; send the request to another replica", "stopping", 5)


def failed(kind: str, number: str) -> Refusal:
    """500: the pipeline raised; what and where is in the log."""
    message = f"the pipeline failed with {kind}; the log of the service has the rest under request {number}"
    return Refusal(500, message, kind="server_error", code="pipeline_failed")
