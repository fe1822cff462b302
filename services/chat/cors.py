"""Pages of other origins: which may call, and with what."""

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from services.chat.problems import Problem


class Cors(CORSMiddleware):
    """A refused preflight is told as every error is; the framework's own words would be plain text."""

    def preflight_response(self, request_headers: Headers) -> Response:
        answer = super().preflight_response(request_headers)
        if answer.status_code == 200:
            return answer
        detail = (
            f"Pages of other origins may call with {answer.headers['access-control-allow-methods']} and the headers "
            f"{answer.headers['access-control-allow-headers']}, where an operator names their origin in "
            "CHATRAIL_CORS_ORIGINS."
        )
        kept = {name: value for name, value in answer.headers.items() if not name.startswith("content-")}
        return Problem(400, "Refused to this page", detail, headers=kept).response()
