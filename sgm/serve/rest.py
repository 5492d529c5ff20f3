"""OpenAI's video API, and what machines ask a server for: `/health` and `/metrics`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response

from sgm.serve.answers import ApiError, video_page, video_response
from sgm.serve.desk import Desk
from sgm.serve.jobs import COMPLETED, FAILED, Job
from sgm.serve.metrics import metrics
from sgm.serve.uploads import Upload

MOST_LISTED = 100
REFERENCE = "input_reference"


def video_routes(desk: Desk) -> APIRouter:
    """`/v1/...`"""
    router = APIRouter(prefix="/v1")
    add = router.add_api_route
    creating = _Creating(desk)
    add("/videos", creating.create, methods=["POST"], summary="Ask for a video", response_model=None)
    add("/videos", _listing(desk), methods=["GET"], summary="The videos, newest first", response_model=None)
    add("/videos/{video_id}", _retrieving(desk), methods=["GET"], summary="How far a video is", response_model=None)
    add("/videos/{video_id}", _deleting(desk), methods=["DELETE"],
        summary="Delete a video; one that is being made stops", response_model=None)  # fmt: skip
    add("/videos/{video_id}/content", _content(desk), methods=["GET"],
        summary="Its file: video, thumbnail or spritesheet", response_model=None)  # fmt: skip
    add("/models", _models(desk), methods=["GET"], summary="The models by name", response_model=None)
    add("/models/{name}", _model(desk), methods=["GET"], summary="One model", response_model=None)
    return router


class _Creating:
    def __init__(self, desk: Desk):
        self.desk = desk

    async def create(self, request: Request) -> Response:
        arrived = time.time()
        fields, upload = await _read_fields(request)
        if await request.is_disconnected():  # its repeat asks for the same
            raise ApiError(400, "The client has gone.")
        headers = request.headers
        repeats = headers.get("x-stainless-retry-count", "0")
        job = await run_in_threadpool(
            self.desk.take,
            fields,
            upload,
            client=str(request.scope.get("client_name", "")),
            key=headers.get("idempotency-key"),
            repeats=int(repeats) if repeats.isdecimal() else 0,
            arrived=arrived,
        )
        if not await request.is_disconnected():
            await run_in_threadpool(self.desk.store.answered, job.id)
        return video_response(job, self.desk.limits.keep_seconds)


def _listing(desk: Desk) -> Callable[..., Response]:
    def videos(
        limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 20, after: str | None = None, order: str = "desc"
    ) -> Response:
        if order not in ("asc", "desc"):
            raise ApiError(400, f"order is {order!r}; it must be asc or desc.", "order")
        jobs, more = desk.store.page(limit, desk.job(after) if after else None, order == "asc")
        return JSONResponse(video_page(jobs, more, desk.limits.keep_seconds))

    return videos


def _retrieving(desk: Desk) -> Callable[..., Response]:
    def retrieve(video_id: str) -> Response:
        return video_response(desk.job(video_id), desk.limits.keep_seconds)

    return retrieve


def _deleting(desk: Desk) -> Callable[..., Response]:
    def delete(video_id: str) -> Response:
        desk.store.delete(desk.job(video_id).id)
        return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})

    return delete


def _content(desk: Desk) -> Callable[..., Response]:
    def content(video_id: str, variant: str = "video") -> Response:
        job = desk.job(video_id)
        variants = desk.store.files(job.id).variants()
        if variant not in variants:
            raise ApiError(400, f"variant is {variant!r}; there are {', '.join(variants)}.", "variant")
        path, kind = variants[variant]
        if not (job.state == COMPLETED or (variant == "preview" and path.is_file())):
            raise _not_ready(job)
        return FileResponse(path, media_type=kind, filename=f"{job.id}{path.suffix}")

    return content


def _not_ready(job: Job) -> ApiError:
    if job.state == FAILED:
        return ApiError(404, f"The video {job.id!r} failed: {job.error}", "video_id", "video_failed")
    return ApiError(
        404, f"The video {job.id!r} is {job.state}; ask for its status first.", "video_id", "video_not_ready"
    )


def _models(desk: Desk) -> Callable[..., Response]:
    def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model_object(name) for name in desk.offer.models]})

    return models


def _model(desk: Desk) -> Callable[..., Response]:
    def model(name: str) -> Response:
        if name not in desk.offer.models:
            raise ApiError(404, f"The model {name!r} does not exist.", "model", "model_not_found")
        return JSONResponse(_model_object(name))

    return model


def _model_object(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "cogvideox-sat"}


def machine_routes(desk: Desk) -> APIRouter:
    """`/health` and `/metrics`."""
    router = APIRouter()

    def health() -> Response:
        alive = desk.alive()
        return JSONResponse({"status": "ok" if alive else "no worker", "workers": alive}, 200 if alive else 503)

    def prometheus() -> Response:
        return PlainTextResponse(metrics(desk), media_type="text/plain; version=0.0.4")

    router.add_api_route("/health", health, summary="Whether videos can be made", response_model=None)
    router.add_api_route("/metrics", prometheus, summary="Counts for Prometheus", response_model=None)
    return router


async def _read_fields(request: Request) -> tuple[dict[str, list[str]], Upload | None]:
    """The fields of a form or of a JSON object as texts, and the file that came along."""
    if request.headers.get("content-type", "").split(";")[0].strip() == "application/json":
        return _json_fields(await request.body())
    try:
        form = await request.form(max_files=1, max_fields=50)
    except MultiPartException as error:
        raise ApiError(400, f"The body is no form that can be read: {error.message}") from error
    fields: dict[str, list[str]] = {}
    upload = None
    try:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                if name != REFERENCE:
                    raise ApiError(400, f"A file is sent as {REFERENCE}, not as {name!r}.", name)
                upload = Upload.of(await value.read())
            else:
                fields.setdefault(name, []).append(value)
    finally:
        await form.close()
    url = fields.pop(f"{REFERENCE}[image_url]", None)
    return _without_reference(fields), Upload.of_url(url[0]) if url else upload


def _without_reference(fields: dict[str, list[str]]) -> dict[str, list[str]]:
    if any(name.startswith(REFERENCE) for name in fields):
        raise ApiError(400, f"{REFERENCE} is a file, or an object with an image_url that holds data.", REFERENCE)
    return fields


def _json_fields(body: bytes) -> tuple[dict[str, list[str]], Upload | None]:
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"The body is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ApiError(400, "The body is no JSON object.")
    reference = content.pop(REFERENCE, None)
    url = reference.get("image_url") if isinstance(reference, dict) else None
    if reference is not None and not isinstance(url, str):
        raise ApiError(400, f"In JSON, {REFERENCE} is an object with an image_url that holds data.", REFERENCE)
    fields = {name: _texts(name, value) for name, value in content.items() if value is not None}
    return fields, Upload.of_url(url) if url else None


def _texts(name: str, value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if any(isinstance(v, (dict, list)) for v in values):
        raise ApiError(400, f"{name} is a value, or a list of them.", name)
    return [str(v).lower() if isinstance(v, bool) else str(v) for v in values]
