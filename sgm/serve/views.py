"""What the page shows of jobs, as HTML. Everything that came from a person is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from sgm.serve.desk import Forecast
from sgm.serve.jobs import COMPLETED, FAILED, RUNNING, Job, JobFiles

SHOWN_CHARACTERS = 90  # of a prompt in a list

CSS = """
.cv-player video, .cv-player img { width: 100%; max-height: 60vh; object-fit: contain; background: #111;
  border-radius: 8px; }
.cv-empty { display: grid; place-items: center; min-height: 16rem; border: 1px dashed var(--border-color-primary);
  border-radius: 8px; color: var(--body-text-color-subdued); }
.cv-bar { height: 6px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden; margin: .5rem 0; }
.cv-bar div { height: 100%; background: var(--color-accent); transition: width .4s; }
.cv-links { display: flex; gap: 1rem; }
.cv-links a, .cv-links button, .cv-queue button { text-decoration: underline; color: inherit; background: none;
  border: none; padding: 0; text-align: left; cursor: pointer; font: inherit !important; }
.cv-queue button { overflow: hidden; white-space: nowrap; text-overflow: ellipsis; }
.cv-error { color: var(--error-text-color, #b00020); white-space: pre-wrap; }
.cv-warning { white-space: pre-line; font-size: .9rem; color: var(--body-text-color-subdued); }
.cv-player pre { max-height: 20rem; overflow: auto; font-size: .75rem; }
.cv-queue { display: grid; grid-template-columns: minmax(0, 1fr) auto auto; gap: .3rem 1rem; font-size: .9rem; }
.cv-gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(120px, 1fr)); gap: .5rem;
  align-items: start; }
.cv-gallery button { text-align: left; font-size: .75rem; font-weight: 400; line-height: 1.2; padding: 0;
  border: 2px solid transparent; border-radius: 8px; background: none; color: inherit; cursor: pointer;
  overflow: hidden; }
.cv-gallery button.cv-chosen { border-color: var(--color-accent); }
.cv-gallery img { width: 100%; aspect-ratio: 3 / 2; object-fit: cover; background: #111; border-radius: 6px; }
"""

# A click on anything that names a job tells the server which.
CLICKS = """
element.addEventListener('click', event => {
  const chosen = event.target.closest('[data-job]');
  if (chosen) trigger('click', {job: chosen.dataset.job, act: chosen.dataset.act || 'show'});
});
"""


def player(job: Job | None, files: JobFiles | None, forecast: Forecast) -> str:
    """The chosen job: its video, or how far it is."""
    if job is None or files is None:
        return '<div class="cv-player cv-empty">The video appears here.</div>'
    if job.state == COMPLETED:
        told = f"{_caption(job)}{_warnings(files)}{_links(job)}{_record(files)}"
        return f'<div class="cv-player">{_video(job)}{told}</div>'
    if job.state == FAILED:
        return f'<div class="cv-player">{_caption(job)}<p class="cv-error">{_text(job.error or "")}</p></div>'
    shown = '<div class="cv-empty">No frame can be seen yet.</div>'
    if job.state == RUNNING and files.preview.is_file():
        shown = f'<img alt="preview" src="{_address(job, "preview")}&amp;step={job.step}">'
    percent = f'<div class="cv-bar"><div style="width: {job.progress}%"></div></div>'
    return f'<div class="cv-player">{shown}{percent}<p>{_text(_how_far(job, forecast))}</p>{_caption(job)}</div>'


def queue(jobs: Sequence[Job], forecast: Forecast) -> str:
    """Jobs that are not finished, each with its place and the time left."""
    if not jobs:
        return "<p>No video is waiting.</p>"
    rows = [
        f'<button data-job="{job.id}">{_short(job.request.prompt)}</button>'
        f"<span>{_text(_how_far(job, forecast))}</span>"
        f'<button data-job="{job.id}" data-act="cancel">cancel</button>'
        for job in jobs
    ]
    return f'<div class="cv-queue">{"".join(rows)}</div>'


def gallery(jobs: Sequence[Job], chosen: str | None) -> str:
    """Finished jobs, newest first."""
    return f'<div class="cv-gallery">{"".join(_tile(job, job.id == chosen) for job in jobs)}</div>'


def _tile(job: Job, chosen: bool) -> str:
    picture = (
        f'<img alt="" loading="lazy" src="{_address(job, "thumbnail")}">' if job.state == COMPLETED else "failed: "
    )
    mark = ' class="cv-chosen"' if chosen else ""
    return f'<button data-job="{job.id}"{mark}>{picture}{_short(job.request.prompt)}</button>'


def _video(job: Job) -> str:
    return f'<video controls autoplay loop muted playsinline src="{_address(job, "video")}"></video>'


def _caption(job: Job) -> str:
    request = job.request
    size = f"{request.size[1]}x{request.size[0]}, {request.num_frames} frames"
    return f"<p>{_text(request.prompt)}</p><p>{_text(request.model)}, seed {request.seed}, {size}</p>"


def _links(job: Job) -> str:
    links = (("video", "Download"), ("record", "JSON"), ("spritesheet", "Frames"))
    shown = "".join(f'<a href="{_address(job, variant)}" download>{name}</a>' for variant, name in links)
    return f'<p class="cv-links">{shown}<button data-job="{job.id}" data-act="delete">Delete</button></p>'


def _warnings(files: JobFiles) -> str:
    """What was unusual about the clip."""
    return f'<p class="cv-warning">{_text(text)}</p>' if (text := _read(files.warnings)) else ""


def _record(files: JobFiles) -> str:
    """The clip's JSON, folded up."""
    text = _read(files.record)
    return text and f"<details><summary>How it was made</summary><pre>{_text(text)}</pre></details>"


def _read(file: Path) -> str:
    """Its text; "" where it is not there."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _address(job: Job, variant: str) -> str:
    return f"/v1/videos/{job.id}/content?variant={variant}"


def _how_far(job: Job, forecast: Forecast) -> str:
    left = forecast.seconds.get(job.id)
    time_left = "" if left is None else f", {duration(left)} left"
    if job.state == RUNNING:
        steps = f"step {job.step} of {job.steps}" if job.step else "starting"
        return f"{'decoding' if job.step and job.step == job.steps else steps}{time_left}"
    return f"place {forecast.positions.get(job.id, 1)} in the queue{time_left}"


def duration(seconds: float) -> str:
    """For people: `12 s`, `3 min`, `1 h 20 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _short(text: str) -> str:
    return _text(text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}...")


def _text(text: str) -> str:
    """Escaped, also for Gradio's templates."""
    return escape(text).replace("{", "&#123;").replace("$", "&#36;")
