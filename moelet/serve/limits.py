"""What one server gives to those who ask, and how it says no. What is refused is a client's fault: 4xx, never 5xx."""

from typing import Any, NamedTuple

BODY = 64 * 1024  # bytes of a request
CHOICES = 16  # texts that one request may ask for


class Limits(NamedTuple):
    """How much one server does at a time, and for one request."""

    at_once: int = 16  # texts being written; the others wait
    waiting: int = 64  # texts that may wait; more are told to come back
    tokens: int = 1024  # new ones of a text
    seconds: float = 60.0  # that a text may take, from its first token


class Refusal(Exception):
    """A request that isn't answered: its HTTP status, and for a person what was given, what is needed, what to do."""

    def __init__(self, status: int, message: str, field: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.field, self.code = status, field, code

    def body(self) -> dict[str, Any]:
        """Return it as OpenAI's clients read it."""
        kind = "invalid_request_error" if self.status != 429 else "rate_limit_error"
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": self.code}}
