"""Makes the clips of jobs, one after the other."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from sgm.data.video_out import write_contact_sheet
from sgm.errors import SgmError
from sgm.files import replacing, write_text
from sgm.serve.jobs import ClipRequest, Job, JobFiles
from sgm.serve.store import JobStore

if TYPE_CHECKING:
    from sgm import StepReport, Video

TOLD_EVERY = 0.25  # seconds between two notes of how far a job is
PREVIEW_EVERY = 1.0
PREVIEW_SHARE = 0.1  # of the time, that previews may take
PREVIEW_FRAMES = 4


class NotWantedError(Exception):
    """The job was deleted while it was made."""


@dataclass
class Maker:
    """Attributes:
    name: of this worker, under which its jobs stand in the store.
    generate: makes a clip; it gets the job's folder, and calls back after each step.
    previews: whether there is anybody to look at them.
    too_large: what a preview may raise for want of memory, after which there are no more.
    """

    store: JobStore
    name: str
    generate: Callable[[ClipRequest, Path, Callable[[StepReport], None]], Video]
    previews: bool = False
    too_large: tuple[type[Exception], ...] = ()

    def make_next(self) -> bool:
        """Make the next job's clip; False where none waits. What a request is at fault for, its job says.

        Raises:
            Exception: a bug, which ends the job, too.
        """
        job = self.store.claim(self.name)
        if job is None:
            return False
        try:
            self._make(job, self.store.files(job.id))
        except NotWantedError:
            pass
        except SgmError as error:
            folder = f"{self.store.files(job.id).folder}{os.sep}"  # is no client's business
            self.store.finish(job.id, self.name, str(error).replace(folder, ""))
        except Exception as error:
            self.store.finish(job.id, self.name, f"{type(error).__name__}: the server's log says more.")
            raise
        else:
            self.store.finish(job.id, self.name)
        self.store.forget(job.id)  # if it was deleted
        return True

    def _make(self, job: Job, files: JobFiles) -> None:
        files.folder.mkdir(exist_ok=True)
        clip = self.generate(job.request, files.folder, _Watch(self, job, files))
        if not self.store.is_wanted(job.id, self.name):
            raise NotWantedError
        height, width = clip.frames.shape[1:3]
        if (height, width) != job.request.size:
            self.store.made_otherwise(job.id, replace(job.request, size=(height, width)))
        _write(clip, files)


class _Watch:
    """Called after each step: writes down how far the job is, and ends it where it is not wanted any more."""

    def __init__(self, maker: Maker, job: Job, files: JobFiles):
        self.maker, self.job, self.files = maker, job, files
        self.told = self.next_preview = 0.0

    def __call__(self, report: StepReport) -> None:
        store, worker, now = self.maker.store, self.maker.name, time.monotonic()
        if not store.is_wanted(self.job.id, worker):
            raise NotWantedError
        if now - self.told >= TOLD_EVERY or report.step == report.total:
            store.step(self.job.id, worker, report.step, report.total)
            self.told = now
        if self.maker.previews and now >= self.next_preview and report.step < report.total:
            self._preview(report)
            took = time.monotonic() - now
            self.next_preview = time.monotonic() + max(PREVIEW_EVERY, took / PREVIEW_SHARE)

    def _preview(self, report: StepReport) -> None:
        try:
            frames = report.preview()
        except self.maker.too_large:
            self.maker.previews = False
            return
        write_contact_sheet(self.files.preview, frames, PREVIEW_FRAMES, columns=2, width=frames.shape[2])


def _write(clip: Video, files: JobFiles) -> None:
    clip.save(files.video)
    frames = clip.frames
    with replacing(files.thumbnail) as temporary:
        Image.fromarray(np.ascontiguousarray(frames[len(frames) // 2])).save(temporary, quality=85)
    write_contact_sheet(files.spritesheet, frames)
    if clip.warnings:
        write_text(files.warnings, "\n".join(clip.warnings))
    files.preview.unlink(missing_ok=True)
