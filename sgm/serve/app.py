"""The web application: API, page, and what stands before both."""

from __future__ import annotations

from collections.abc import Iterable
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from sgm import __version__
from sgm.errors import SgmError
from sgm.serve.answers import ApiError
from sgm.serve.desk import Desk
from sgm.serve.guard import Guard, Keys
from sgm.serve.rest import routes

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


def application(desk: Desk, keys: Keys, hosts: Iterable[str] | None) -> FastAPI:
    """The API over a desk, without the page.

    Args:
        hosts: see `Guard`.
    """
    # What its pages of documentation show comes from elsewhere; the description itself is at /openapi.json.
    app = FastAPI(title="CogVideoX in SAT style", version=__version__, docs_url=None, redoc_url=None)
    app.include_router(routes(desk))
    for path in ("/v1/{rest:path}", "/videos{rest:path}", "/models{rest:path}"):  # else the page would answer
        app.add_api_route(path, _not_there, methods=METHODS, include_in_schema=False, response_model=None)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(Exception, _bug)
    app.add_middleware(
        Guard, keys=keys, hosts=hosts, most_bytes=desk.limits.upload_bytes + (1 << 20), answers=desk.answers
    )
    return app


def _not_there(rest: str) -> Response:
    raise HTTPException(404)


def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


def _http_error(request: Request, error: Exception) -> Response:
    """A path or a method that is not there, which a wrong `base_url` leads to."""
    assert isinstance(error, HTTPException)
    phrase = HTTPStatus(error.status_code).phrase
    asked = f"{request.method} {request.url.path}"
    message = f"{phrase}: {asked}. This server has /v1/videos and /v1/models; a client's base_url ends in /v1."
    return ApiError(error.status_code, message, None, phrase.lower().replace(" ", "_")).response()


def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return ApiError(400, f"{name}: {first['msg']}.", name, "invalid_value").response()


def _bug(_: Request, error: Exception) -> Response:
    """Its traceback goes to the log."""
    message = str(error) if isinstance(error, SgmError) else f"{type(error).__name__}: the server's log says more."
    return ApiError(500, message, None, "server_error").response()
