"""Answers in the form of OpenAI's API: a video, a page of them, an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import JSONResponse

from sgm.serve.jobs import FAILED, Job

POLL_MILLISECONDS = 1000  # between two questions of a client about one job
_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is refused.

    Args:
        status: of HTTP. Clients of OpenAI send again what 408, 409, 429 and 5xx refused.
        param: the field at fault.
        code: a word for programs.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    def response(self) -> JSONResponse:
        kind = "server_error" if self.status >= 500 else _KINDS.get(self.status, "invalid_request_error")
        content = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": content}, self.status, dict(self.headers or {}))


def video_response(job: Job, keep_seconds: float | None) -> JSONResponse:
    """One video, and when to ask again."""
    return JSONResponse(video(job, keep_seconds), headers={"openai-poll-after-ms": str(POLL_MILLISECONDS)})


def video(job: Job, keep_seconds: float | None) -> dict[str, Any]:
    """The video object; besides OpenAI's entries the `seed`, with which the same request gives the same clip."""
    request, done = job.request, job.finished_at
    seconds = (request.num_frames - 1) / request.fps
    return {
        "id": job.id,
        "object": "video",
        "model": request.model,
        "status": job.state,
        "progress": job.progress,
        "created_at": int(job.created_at),
        "completed_at": None if done is None else int(done),
        "expires_at": None if done is None or keep_seconds is None else int(done + keep_seconds),
        "prompt": request.prompt,
        "size": f"{request.size[1]}x{request.size[0]}",
        "seconds": f"{seconds:g}",
        "seed": request.seed,
        "remixed_from_video_id": None,
        "error": {"code": "generation_failed", "message": job.error} if job.state == FAILED else None,
    }


def video_page(jobs: Sequence[Job], has_more: bool, keep_seconds: float | None) -> dict[str, Any]:
    return {
        "object": "list",
        "data": [video(job, keep_seconds) for job in jobs],
        "first_id": jobs[0].id if jobs else None,
        "last_id": jobs[-1].id if jobs else None,
        "has_more": has_more,
    }
