"""Where requests become jobs, for clients of the API and for the page alike."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field

from sgm.files import SaveError, remove, replacing, saving, sync_folder
from sgm.serve.answers import ApiError
from sgm.serve.jobs import EXPIRED, ID, QUEUED, RUNNING, ClipRequest, Job
from sgm.serve.limits import Limits
from sgm.serve.parameters import Offer, clip_request
from sgm.serve.store import JobStore, KeyReusedError, Origin, QueueFullError, new_id
from sgm.serve.uploads import Upload

RETRY_AFTER = {"retry-after": "10"}
RECENT = 20  # clips by which the time of others is judged


@dataclass
class Desk:
    """Takes requests, and says how far jobs are.

    Attributes:
        wake: called when there is a new job.
        alive: how many workers there are.
    """

    store: JobStore
    offer: Offer
    limits: Limits
    wake: Callable[[], None] = lambda: None
    alive: Callable[[], int] = lambda: 1
    answers: dict[int, int] = field(default_factory=dict)  # HTTP status -> how many

    def take(
        self,
        fields: Mapping[str, Sequence[str]],
        upload: Upload | None,
        client: str = "",
        key: str | None = None,
        repeats: int = 0,
        arrived: float | None = None,
    ) -> Job:
        """The job that a request asks for; one job however often the request is sent.

        Raises:
            ApiError: the request is refused; nothing is left of it.
        """
        request = clip_request(fields, upload, self.offer, self.limits)
        fingerprint = _fingerprint(client, fields, upload)
        key = None if key is None else f"{client} {key}"  # another client's is another one
        origin = Origin(fingerprint, key, repeats, time.time() if arrived is None else arrived)
        job_id, is_new = new_id(), False
        try:
            if upload is not None:
                self._keep(job_id, upload)
            job, is_new = self.store.create(job_id, request, origin, self.limits.queued)
        except QueueFullError as error:
            raise ApiError(429, f"{error} Try again later.", None, "queue_full", RETRY_AFTER) from error
        except KeyReusedError as error:
            raise ApiError(422, str(error), None, "idempotency_key_reused") from error
        finally:
            if not is_new:
                with suppress(OSError):
                    remove(self.store.files(job_id).folder)
        if is_new:
            self.wake()
        return job

    def _keep(self, job_id: str, upload: Upload) -> None:
        folder = self.store.files(job_id).folder
        try:
            with saving(folder):
                folder.mkdir()
            with replacing(folder / upload.name) as temporary:  # on the disk, as the job will be
                temporary.write_bytes(upload.data)
            sync_folder(self.store.folder)
        except SaveError as error:
            raise ApiError(507, str(error), None, "no_room") from error

    def job(self, job_id: str) -> Job:
        """The job that a client names.

        Raises:
            ApiError: there is none, or no more.
        """
        job = self.store.get(job_id, known=True) if ID.fullmatch(job_id) else None
        if job is None:
            raise ApiError(404, f"No video with id {job_id!r}.", "video_id", "video_not_found")
        if job.state == EXPIRED:
            days = f"{self.limits.keep_days:g} days" if self.limits.keep_days else "some time"
            raise ApiError(404, f"The video {job_id!r} was kept for {days} and is gone.", "video_id", "video_expired")
        return job

    def expire(self) -> None:
        """Remove what was kept long enough."""
        if self.limits.keep_seconds is not None:
            self.store.expire(time.time() - self.limits.keep_seconds)

    def forecast(self) -> Forecast:
        """Positions and times of the jobs that are not finished."""
        store, workers = self.store, max(1, self.alive())
        steps = {name: facts.steps for name, facts in self.offer.models.items()}
        return Forecast(store.waiting(), store.last_completed(RECENT), workers, time.time(), steps)


class Forecast:
    """When jobs will be finished, judged by how long the last ones took. Seconds; None where none has been made yet.

    Args:
        waiting: running jobs, then queued ones, in their order.
        completed: of which the time is known.
        workers: that share the queue.
        steps: of a model's videos, where neither the request nor another one of its mode says it.
    """

    def __init__(
        self,
        waiting: Sequence[Job],
        completed: Sequence[Job],
        workers: int,
        now: float,
        steps: Mapping[str, int] | None = None,
    ):
        own_steps = {(j.request.model, j.request.mode): j.steps for j in completed if j.request.steps is None}

        def work_of(job: Job) -> int:
            asked, known = job.request, own_steps.get((job.request.model, job.request.mode))
            return asked.pixels * (job.steps or asked.steps or known or (steps or {}).get(asked.model) or 1)

        work = sum(map(work_of, completed))
        seconds = sum((job.finished_at or 0.0) - (job.started_at or 0.0) for job in completed)
        rate = seconds / work if work else None
        self.positions: dict[str, int] = {}  # 0: it is being made
        self.seconds: dict[str, float | None] = {}
        ahead: float | None = 0.0
        for job in waiting:
            left = _left(job, None if rate is None else rate * work_of(job), now)
            self.positions[job.id] = 0 if job.state == RUNNING else 1 + sum(p > 0 for p in self.positions.values())
            own = None if left is None or ahead is None else left + (ahead / workers if job.state == QUEUED else 0.0)
            self.seconds[job.id] = own
            ahead = None if left is None or ahead is None else ahead + left


def _left(job: Job, whole: float | None, now: float) -> float | None:
    """Of this job alone, which takes `whole` seconds; by its own steps once it has taken some, but for the last."""
    if job.state != RUNNING or not job.step or job.started_at is None:
        return whole
    if job.step == job.steps:  # it is decoded
        return None if whole is None else max(0.0, whole - (now - job.started_at))
    return (now - job.started_at) / job.step * (job.steps - job.step)


def _fingerprint(client: str, fields: Mapping[str, Sequence[str]], upload: Upload | None) -> str:
    """Equal where one client sends the same again; a seed that was drawn is no part of it."""
    content = [client, sorted((name, list(values)) for name, values in fields.items())]
    digest = hashlib.sha256(json.dumps(content).encode())
    digest.update(upload.data if upload else b"")
    return digest.hexdigest()


def same_again(request: ClipRequest) -> dict[str, list[str]]:
    """The fields that ask for a clip like this one once more, its start aside."""
    content = asdict(request)
    fields = {
        name: [str(content[name])]
        for name in ("prompt", "negative_prompt", "model", "mode", "seed", "steps", "guidance_scale", "strength")
        if content[name] not in (None, "")
    }
    return fields | {
        "size": [f"{request.size[1]}x{request.size[0]}"],
        "seconds": [f"{(request.num_frames - 1) / request.fps:g}"],
        "lora": list(request.lora),
        "refine": [str(request.refine).lower()],
    }
