"""OpenAI's video API, and what machines ask a server for: `/health` and `/metrics`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response

from sgm.serve.answers import ApiError, video_page, video_response
from sgm.serve.desk import Desk
from sgm.serve.jobs import COMPLETED, FAILED, QUEUED, RUNNING
from sgm.serve.uploads import Upload

MOST_LISTED = 100
REFERENCE = "input_reference"


def routes(desk: Desk) -> APIRouter:
    """`/v1/...`, `/health` and `/metrics`."""
    router, api = APIRouter(), _Api(desk)
    for method, path, answer, summary in (
        ("POST", "/v1/videos", api.create, "Ask for a video"),
        ("GET", "/v1/videos", api.videos, "The videos, newest first"),
        ("GET", "/v1/videos/{video_id}", api.retrieve, "How far a video is"),
        ("DELETE", "/v1/videos/{video_id}", api.delete, "Delete a video; one that is being made stops"),
        ("GET", "/v1/videos/{video_id}/content", api.content, "Its file: video, thumbnail or spritesheet"),
        ("GET", "/v1/models", api.models, "The models by name"),
        ("GET", "/v1/models/{name}", api.model, "One model"),
        ("GET", "/health", api.health, "Whether videos can be made"),
        ("GET", "/metrics", api.metrics, "Counts for Prometheus"),
    ):
        router.add_api_route(path, answer, methods=[method], summary=summary, response_model=None)
    return router


class _Api:
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

    def videos(
        self,
        limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = 20,
        after: str | None = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> Response:
        jobs, more = self.desk.store.page(limit, self.desk.job(after) if after else None, order == "asc")
        return JSONResponse(video_page(jobs, more, self.desk.limits.keep_seconds))

    def retrieve(self, video_id: str) -> Response:
        return video_response(self.desk.job(video_id), self.desk.limits.keep_seconds)

    def delete(self, video_id: str) -> Response:
        self.desk.store.delete(self.desk.job(video_id).id)
        return JSONResponse({"id": video_id, "object": "video.deleted", "deleted": True})

    def content(self, video_id: str, variant: str = "video") -> Response:
        job = self.desk.job(video_id)
        variants = self.desk.store.files(job.id).variants
        if variant not in variants:
            raise ApiError(400, f"variant is {variant!r}; there are {', '.join(variants)}.", "variant")
        path, kind = variants[variant]
        if job.state == FAILED:
            raise ApiError(404, f"The video {job.id!r} failed: {job.error}", "video_id", "video_failed")
        if not (path.is_file() and (job.state == COMPLETED or variant == "preview")):
            message = f"The video {job.id!r} is {job.state}, and there is no {variant} of it now."
            raise ApiError(404, message, "video_id", "video_not_ready")
        return FileResponse(path, media_type=kind, filename=f"{job.id}{path.suffix}")

    def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [_model_object(name) for name in self.desk.offer.models]})

    def model(self, name: str) -> Response:
        if name not in self.desk.offer.models:
            raise ApiError(404, f"The model {name!r} does not exist.", "model", "model_not_found")
        return JSONResponse(_model_object(name))

    def health(self) -> Response:
        alive = self.desk.alive()
        return JSONResponse({"status": "ok" if alive else "no worker", "workers": alive}, 200 if alive else 503)

    def metrics(self) -> Response:
        return PlainTextResponse(metrics(self.desk), media_type="text/plain; version=0.0.4")


def _model_object(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "cogvideox-sat"}


async def _read_fields(request: Request) -> tuple[dict[str, list[str]], Upload | None]:
    """The fields of a form or of a JSON object as texts, and the file that came along."""
    if request.headers.get("content-type", "").split(";")[0].strip() == "application/json":
        return _json_fields(await request.body())
    try:
        form = await request.form(max_files=1, max_fields=50)
    except HTTPException as error:
        raise ApiError(400, f"The body is no form that can be read: {error.detail}") from error
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
    if any(name.startswith(REFERENCE) for name in fields):
        raise ApiError(400, f"{REFERENCE} is a file, or an object with an image_url that holds data.", REFERENCE)
    return fields, Upload.of_url(url[0]) if url else upload


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


# --- for Prometheus -------------------------------------------------------------------------------------------------


def metrics(desk: Desk) -> str:
    """Text in Prometheus' format, version 0.0.4. Totals are those of the output folder, whichever process made them."""
    return "\n".join(_lines(desk)) + "\n"


def _lines(desk: Desk) -> Iterator[str]:
    totals, counts = desk.store.totals(), desk.store.counts()
    yield from _metric("videos_created_total", "counter", "Jobs that were taken on.", {"": totals["created"]})
    outcomes = {f'{{outcome="{name}"}}': totals[name] for name in ("completed", "failed", "deleted")}
    yield from _metric("videos_total", "counter", "Jobs by what became of them.", outcomes)
    yield from _metric("video_seconds_total", "counter", "Time spent on completed videos.", {"": totals["seconds"]})
    states = {f'{{state="{state}"}}': counts[state] for state in (QUEUED, RUNNING)}
    yield from _metric("videos", "gauge", "Jobs that are not finished.", states)
    yield from _metric("workers", "gauge", "Workers that are alive.", {"": desk.alive()})
    answers = {f'{{status="{status}"}}': n for status, n in sorted(desk.answers.items())}
    yield from _metric("http_responses_total", "counter", "Answers of this process by status.", answers)


def _metric(name: str, kind: str, about: str, values: Mapping[str, float]) -> Iterator[str]:
    name = f"cogvideox_{name}"
    yield f"# HELP {name} {about}"
    yield f"# TYPE {name} {kind}"
    for labels, value in values.items():
        yield f"{name}{labels} {value:g}" if value < 1e6 else f"{name}{labels} {value:.3f}"
