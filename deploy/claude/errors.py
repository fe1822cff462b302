"""Refusals, in the provider's words and shape."""

from typing import Any

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}
MESSAGES = {
    400: "The request was refused.",
    401: "invalid x-api-key",
    402: "Your credit balance is too low to access the Anthropic API.",
    403: "Your API key does not have permission to use the specified resource.",
    404: "Not found",
    413: "Request exceeds the maximum size",
    429: "This request would exceed your organization's rate limit.",
    500: "Internal server error",
    503: "Service unavailable",
    504: "The request timed out.",
    529: "Overloaded",
}
RETRY_AFTER_S = 2


class ApiError(Exception):
    """Ends a request before anything was given."""

    def __init__(self, status: int, message: str | None = None) -> None:
        self.status = status
        self.message = message or MESSAGES[status]
        super().__init__(f"{status} {self.message}")

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return [(b"retry-after", b"%d" % RETRY_AFTER_S)] if self.status == 429 else []

    def body(self, request_id: str) -> dict[str, Any]:
        error = {"type": ERROR_TYPES[self.status], "message": self.message}
        return {"type": "error", "error": error, "request_id": request_id}
