"""What a caller is told when a request is refused."""

from __future__ import annotations

from typing import Any


class RequestError(Exception):
    """A request that is refused: the status, a sentence for the caller, OpenAI's `code` and the field it is about."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        retry_after_s: int | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.retry_after_s = status, message, code, retry_after_s
        self.param = param

    def body(self) -> dict[str, Any]:
        """The error in the protocol's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def cannot_answer(error: Exception) -> RequestError:
    """What a client is told of an error of the model: a ValueError is the caller's to mend, anything else is ours."""
    return RequestError(400 if isinstance(error, ValueError) else 500, f"the model cannot answer this: {error}")
