"""The jobs, in an SQLite file in the output folder: what was answered to a client is on the disk.

Every process opens the file for itself. A job belongs to the worker whose name stands in its row; whoever finishes it
says so under that name, so that a worker which was given up can no longer change it.
"""

from __future__ import annotations

import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sgm.errors import SgmError
from sgm.files import remove
from sgm.serve.jobs import (
    COMPLETED,
    DELETED,
    EXPIRED,
    FAILED,
    ID,
    QUEUED,
    RUNNING,
    SHOWN,
    ClipRequest,
    Job,
    JobFiles,
    ServeError,
)

FILE = "jobs.sqlite3"
MOST_ATTEMPTS = 3  # at one clip: the third worker that ends over it was not unlucky
GAVE_UP = f"the process that made it ended {MOST_ATTEMPTS} times over this video; the server's log says why."
REPEAT_SECONDS = 3600.0  # a client's repeat comes within its timeout (10 minutes) and two pauses
COLUMNS = "number, id, state, request, created_at, started_at, finished_at, step, steps, attempts, error"
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL,
    request TEXT NOT NULL,
    created_at REAL NOT NULL,
    started_at REAL,
    finished_at REAL,
    step INTEGER NOT NULL DEFAULT 0,
    steps INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0,
    error TEXT,
    worker TEXT,
    fingerprint TEXT NOT NULL,
    idempotency_key TEXT UNIQUE,
    repeats INTEGER NOT NULL,
    answered INTEGER NOT NULL DEFAULT 0,
    known INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS totals (name TEXT PRIMARY KEY, value REAL NOT NULL);
CREATE INDEX IF NOT EXISTS by_state ON jobs (state, number);
CREATE INDEX IF NOT EXISTS by_fingerprint ON jobs (fingerprint, number);
"""


class QueueFullError(SgmError):
    """So many jobs wait already."""


class KeyReusedError(SgmError):
    """An idempotency key came with another request before."""


@dataclass(frozen=True)
class Origin:
    """How a request came, by which a repeat of it is told from a second one.

    Attributes:
        fingerprint: equal for equal requests of one client.
        key: the client's name and its `Idempotency-Key`.
        repeats: how often the client has sent this request before, as it says (`x-stainless-retry-count`).
        arrived: when its first byte came.
    """

    fingerprint: str
    key: str | None = None
    repeats: int = 0
    arrived: float = 0.0


class JobStore:
    """The jobs below `folder`, which is made if it is not there. Safe to call from several threads.

    Raises:
        ServeError: the file is none of ours, or cannot be written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = sqlite3.connect(
                folder / FILE, timeout=30.0, isolation_level=None, check_same_thread=False
            )
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")  # survives a power cut, too
            self._connection.executescript(SCHEMA)
        except sqlite3.Error as error:
            raise ServeError(f"{folder / FILE}: {error}. Move it away, or name another --output-dir.") from error

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def files(self, job_id: str) -> JobFiles:
        """Where a job's files are. `job_id` must have the form of ours, so that no name leads out of the folder."""
        if not ID.fullmatch(job_id):
            raise ServeError(f"{job_id!r} is no id of a video.")
        return JobFiles(self.folder / job_id)

    # --- clients --------------------------------------------------------------------------------------------------

    def create(self, job_id: str, request: ClipRequest, origin: Origin, most_queued: int) -> tuple[Job, bool]:
        """Put a job into the queue, or find the one that this very request has made before.

        Returns:
            The job, and whether it is new.
        Raises:
            QueueFullError: `most_queued` jobs wait.
            KeyReusedError: see there.
        """
        with self._transaction() as db:
            if twin := self._twin(db, origin):
                return twin, False
            if self._count(db, QUEUED) >= most_queued:
                raise QueueFullError(f"{most_queued} videos wait already, which is the most this server takes.")
            db.execute(
                "INSERT INTO jobs (id, state, request, created_at, fingerprint, idempotency_key, repeats)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (job_id, QUEUED, request.to_json(), time.time(), origin.fingerprint, origin.key, origin.repeats),
            )
            self._add(db, "created")
            return next(self._select(db, "WHERE id = ?", job_id)), True

    def _twin(self, db: sqlite3.Connection, origin: Origin) -> Job | None:
        """The job that an earlier sending of the same request has made.

        Clients send again what they had no answer to. So it is a job that nobody has asked about since, and rather one
        whose answer did not get through. And where the repeat was faster than the first sending, it is the repeat's.
        """
        if origin.key is not None:
            for (fingerprint,) in db.execute("SELECT fingerprint FROM jobs WHERE idempotency_key = ?", (origin.key,)):
                if fingerprint != origin.fingerprint:
                    raise KeyReusedError("this Idempotency-Key came with another request before; use a new one.")
                return next(self._select(db, "WHERE idempotency_key = ?", origin.key))
            return None
        if origin.repeats:
            where, since = "known = 0", time.time() - REPEAT_SECONDS
        else:
            where, since = "repeats > 0", origin.arrived
        found = self._select(
            db,
            f"WHERE fingerprint = ? AND {where} AND created_at >= ? AND state != ? ORDER BY answered, number LIMIT 1",
            origin.fingerprint,
            since,
            DELETED,
        )
        return next(found, None)

    def answered(self, job_id: str) -> None:
        """The answer to the creation was sent, to a client that was still there."""
        with self._transaction() as db:
            db.execute("UPDATE jobs SET answered = 1 WHERE id = ?", (job_id,))

    def get(self, job_id: str, known: bool = False) -> Job | None:
        """The job, also an expired one; with `known`, a client has asked by this id, so it has had it."""
        with self._transaction() as db:
            if known:
                db.execute("UPDATE jobs SET known = 1 WHERE id = ? AND known = 0", (job_id,))
            return next(self._select(db, "WHERE id = ? AND state != ?", job_id, DELETED), None)

    def page(self, limit: int, after: Job | None = None, ascending: bool = False) -> tuple[list[Job], bool]:
        """Up to `limit` jobs that come after one, newest first, and whether there are more."""
        beyond, order = (">", "ASC") if ascending else ("<", "DESC")
        from_there, values = (f"AND number {beyond} ?", [after.number]) if after else ("", [])
        with self._reading() as db:
            where = f"WHERE state IN ({_marks(SHOWN)}) {from_there} ORDER BY number {order} LIMIT ?"
            jobs = list(self._select(db, where, *SHOWN, *values, limit + 1))
        return jobs[:limit], len(jobs) > limit

    def delete(self, job_id: str) -> bool:
        """Forget a job and its files; one that is being made stops at its next step. False where there is none."""
        with self._transaction() as db:
            changed = db.execute(
                f"UPDATE jobs SET state = ?, idempotency_key = NULL WHERE id = ? AND state IN ({_marks(SHOWN)})",
                (DELETED, job_id, *SHOWN),
            ).rowcount
            if not changed:
                return False
            self._add(db, "deleted")
            (worker,) = db.execute("SELECT worker FROM jobs WHERE id = ?", (job_id,)).fetchone()
        if worker is None:
            self.forget(job_id)
        return True

    def forget(self, job_id: str) -> None:
        """Remove the files of a deleted job, then its row; nothing of one that is not deleted."""
        with self._reading() as db:
            if db.execute("SELECT 1 FROM jobs WHERE id = ? AND state = ?", (job_id, DELETED)).fetchone() is None:
                return
        remove(self.files(job_id).folder)
        with self._transaction() as db:
            db.execute("DELETE FROM jobs WHERE id = ? AND state = ?", (job_id, DELETED))

    def expire(self, before: float) -> list[str]:
        """Remove the files of what was finished before a time; that it was there is still known."""
        with self._transaction() as db:
            where = f"WHERE finished_at < ? AND state IN ({_marks((COMPLETED, FAILED))})"
            jobs = [job.id for job in self._select(db, where, before, COMPLETED, FAILED)]
            gone = "UPDATE jobs SET state = ?, idempotency_key = NULL WHERE id = ?"
            db.executemany(gone, [(EXPIRED, job) for job in jobs])
        for job in jobs:
            remove(self.files(job).folder)
        return jobs

    # --- the queue ------------------------------------------------------------------------------------------------

    def waiting(self) -> list[Job]:
        """Jobs that are being made, then those that wait, each in their order."""
        with self._reading() as db:
            where = "WHERE state IN (?, ?) ORDER BY state = ?, number"
            return list(self._select(db, where, QUEUED, RUNNING, QUEUED))

    def counts(self) -> dict[str, int]:
        """Jobs by state."""
        with self._reading() as db:
            found = dict(db.execute("SELECT state, COUNT(*) FROM jobs GROUP BY state"))
        return {state: found.get(state, 0) for state in (*SHOWN, EXPIRED)}

    def totals(self) -> dict[str, float]:
        """What was ever `created`, `completed`, `failed` and `deleted` here, and the `seconds` of the completed."""
        with self._reading() as db:
            found = dict(db.execute("SELECT name, value FROM totals"))
        return {name: found.get(name, 0.0) for name in ("created", "completed", "failed", "deleted", "seconds")}

    def last_completed(self, count: int) -> list[Job]:
        with self._reading() as db:
            return list(self._select(db, "WHERE state = ? ORDER BY finished_at DESC LIMIT ?", COMPLETED, count))

    # --- workers --------------------------------------------------------------------------------------------------

    def claim(self, worker: str) -> Job | None:
        """The next job, from now on this worker's."""
        with self._transaction() as db:
            row = db.execute("SELECT id FROM jobs WHERE state = ? ORDER BY number LIMIT 1", (QUEUED,)).fetchone()
            if row is None:
                return None
            db.execute(
                "UPDATE jobs SET state = ?, worker = ?, started_at = ?, attempts = attempts + 1, step = 0, steps = 0"
                " WHERE id = ?",
                (RUNNING, worker, time.time(), row[0]),
            )
            return next(self._select(db, "WHERE id = ?", row[0]))

    def step(self, job_id: str, worker: str, step: int, steps: int) -> bool:
        """Write down how far a job is. False where it is no longer this worker's to make."""
        with self._transaction() as db:
            where = "WHERE id = ? AND worker = ? AND state = ?"
            values = (step, steps, job_id, worker, RUNNING)
            return bool(db.execute(f"UPDATE jobs SET step = ?, steps = ? {where}", values).rowcount)

    def made_otherwise(self, job_id: str, request: ClipRequest) -> None:
        """The request of a job as its video turned out: some models take the size of their picture."""
        with self._transaction() as db:
            db.execute("UPDATE jobs SET request = ? WHERE id = ?", (request.to_json(), job_id))

    def is_wanted(self, job_id: str, worker: str) -> bool:
        """Whether a job is still this worker's to make."""
        with self._reading() as db:
            where = "WHERE id = ? AND worker = ? AND state = ?"
            return db.execute(f"SELECT 1 FROM jobs {where}", (job_id, worker, RUNNING)).fetchone() is not None

    def finish(self, job_id: str, worker: str, error: str | None = None) -> bool:
        """A worker's last word on its job. False where the job was no longer its."""
        with self._transaction() as db:
            state, now = FAILED if error else COMPLETED, time.time()
            changed = db.execute(
                "UPDATE jobs SET state = ?, finished_at = ?, error = ?, worker = NULL"
                " WHERE id = ? AND worker = ? AND state = ?",
                (state, now, error, job_id, worker, RUNNING),
            ).rowcount
            if changed:
                self._add(db, state)
            if changed and not error:
                took = db.execute("SELECT ? - started_at FROM jobs WHERE id = ?", (now, job_id)).fetchone()[0]
                self._add(db, "seconds", took)
        return bool(changed)

    def requeue(self, worker: str | None = None) -> None:
        """What a worker that has ended (None: any) was making begins again, in its old place in the queue.

        A job over which `MOST_ATTEMPTS` workers have ended fails. What was deleted meanwhile goes.
        """
        whose, names = ("worker = ?", [worker]) if worker is not None else ("worker IS NOT NULL", [])
        with self._transaction() as db:
            if worker is None:  # what ended all of them was no job's fault
                db.execute(f"UPDATE jobs SET attempts = attempts - 1 WHERE {whose} AND state = ?", (RUNNING,))
            given_up = db.execute(
                f"UPDATE jobs SET state = ?, finished_at = ?, error = ?, worker = NULL"
                f" WHERE {whose} AND state = ? AND attempts >= ?",
                (FAILED, time.time(), GAVE_UP, *names, RUNNING, MOST_ATTEMPTS),
            ).rowcount
            self._add(db, FAILED, given_up)
            again = f"UPDATE jobs SET state = ?, worker = NULL, step = 0, steps = 0 WHERE {whose} AND state = ?"
            db.execute(again, (QUEUED, *names, RUNNING))
            gone = [row[0] for row in db.execute(f"SELECT id FROM jobs WHERE {whose} AND state = ?", (*names, DELETED))]
        for job in gone:
            self.forget(job)

    def sweep(self) -> None:
        """At the start, when nobody else is at work: nothing that was running runs, and no folder lacks its job."""
        self.requeue()
        with self._transaction() as db:
            deleted = [row[0] for row in db.execute("SELECT id FROM jobs WHERE state = ?", (DELETED,))]
            known = {row[0] for row in db.execute("SELECT id FROM jobs WHERE state != ?", (EXPIRED,))}
        for job in deleted:
            self.forget(job)
        for folder in self.folder.iterdir():
            if ID.fullmatch(folder.name) and folder.name not in known:
                remove(folder)

    # --- SQLite ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All that happens inside is done together, or not at all."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    @contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            yield self._connection

    @staticmethod
    def _add(db: sqlite3.Connection, name: str, amount: float = 1.0) -> None:
        db.execute(
            "INSERT INTO totals VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
            (name, amount),
        )

    @staticmethod
    def _count(db: sqlite3.Connection, state: str) -> int:
        return int(db.execute("SELECT COUNT(*) FROM jobs WHERE state = ?", (state,)).fetchone()[0])

    @staticmethod
    def _select(db: sqlite3.Connection, where: str, *values: Any) -> Iterator[Job]:
        rows = db.execute(f"SELECT {COLUMNS} FROM jobs {where}", values).fetchall()
        return (Job(row[0], row[1], row[2], ClipRequest.from_json(row[3]), *row[4:]) for row in rows)


def new_id() -> str:
    return f"video_{secrets.token_hex(16)}"


def _marks(values: Sequence[str]) -> str:
    return ", ".join("?" * len(values))
