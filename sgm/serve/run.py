"""The server's process: from a command line to jobs, workers, application and socket."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import socket
import sqlite3
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import uvicorn

from sgm.cli import print_line
from sgm.errors import SgmError
from sgm.files import remove, require_writable, try_lock
from sgm.inference.options import SampleArgs
from sgm.places import CONFIGS, found_path
from sgm.serve.app import application
from sgm.serve.desk import Desk
from sgm.serve.guard import ENVIRONMENT, LOOPBACK, Keys
from sgm.serve.jobs import ServeError
from sgm.serve.limits import Limits
from sgm.serve.parameters import SCALES, Offer, OfferedAdapter, split_scale
from sgm.serve.store import JobStore
from sgm.serve.supervisor import Order, Supervisor
from sgm.typed import ConfigError

EXPIRED_EVERY = 60.0  # seconds between two looks for what was kept long enough


def serve(options: argparse.Namespace, check: Callable[[], None]) -> int:
    """Serve until Ctrl-C or SIGTERM; returns the exit code.

    Raises:
        SgmError: bad options, a configuration that cannot run, an address or a folder that is taken.
    """
    for name in ("workers", "max_queue", "max_clip", "max_steps", "max_upload", "keep_days"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {value:g}; it must be above 0.")
    keys, adapters = Keys.read(options.api_keys), _adapters(options.lora)
    limits = Limits(
        queued=options.max_queue,
        clip=options.max_clip,
        steps=options.max_steps,
        upload_bytes=options.max_upload << 20,
        keep_days=options.keep_days,
    )
    folder = options.output_dir.resolve()
    require_writable(folder)
    with ExitStack() as stack:
        listener = stack.enter_context(_listening(options.host, options.port))
        if not stack.enter_context(try_lock(folder / "server.lock")):
            raise ServeError(f"another server is at work in {folder}; choose another --output-dir.")
        stack.enter_context(_files_kept_in(folder))
        store = JobStore(folder)
        store.sweep()
        order = _order(options, folder, adapters)
        print_line(f"starting with {', '.join(order.models)} ...", sys.stderr)
        supervisor = Supervisor(order, store, options.workers)
        try:
            ready = supervisor.start(lambda note: print_line(note, sys.stderr))
            check()
            offered = {name: OfferedAdapter(path, adapters[name].scale) for name, path in ready.adapters.items()}
            offer = Offer(ready.models, offered, ready.refines)
            desk = Desk(store, offer, limits, supervisor.wake, supervisor.alive)
            _run(options, desk, keys, listener)
        finally:
            supervisor.stop()
            store.close()
    check()
    return 0


def _run(options: argparse.Namespace, desk: Desk, keys: Keys, listener: socket.socket) -> None:
    app = application(desk, keys, _hosts(options, keys))
    if not options.no_page:
        from sgm.serve.page import with_page

        app = with_page(app, desk)
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    if host not in LOOPBACK and not keys:
        print_line(f"warning: {host} is seen by other machines, and no key is asked for (--api-keys, {ENVIRONMENT})")
    print_line(f"{', '.join(desk.offer.models)}: {address} ({'' if options.no_page else 'page; '}API: {address}/v1)")
    stop = threading.Event()
    threading.Thread(target=_expire, args=(desk, stop), daemon=True).start()
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2, lifespan="on")
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        stop.set()


def _expire(desk: Desk, stop: threading.Event) -> None:
    while not stop.wait(EXPIRED_EVERY):
        try:
            desk.expire()
        except (SgmError, OSError, sqlite3.Error) as error:
            print_line(f"warning: what was kept long enough could not be removed: {error}", sys.stderr)


def _listening(host: str, port: int) -> socket.socket:
    """A socket that is bound, and closed at the end of a `with`."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=256)
    except (OSError, OverflowError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise ServeError(f"cannot listen at {host}, port {port}: {reason}. Choose another --port (0: any).") from error


@contextmanager
def _files_kept_in(folder: Path) -> Iterator[None]:
    """What libraries write on the way (bodies of requests, uploads of the page) stays below the output folder, too."""
    temporary = folder / "temporary"
    if temporary.exists():
        remove(temporary)  # what was under way when an earlier server ended
    temporary.mkdir()
    before = tempfile.tempdir, {name: os.environ.get(name) for name in ("TMPDIR", "GRADIO_TEMP_DIR")}
    tempfile.tempdir = str(temporary)
    os.environ.update(dict.fromkeys(before[1], str(temporary)))
    try:
        yield
    finally:
        tempfile.tempdir = before[0]
        for name, value in before[1].items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})


def _hosts(options: argparse.Namespace, keys: Keys) -> Iterable[str] | None:
    """Names by which this server is called, besides addresses; None for any, where a name alone opens nothing."""
    if keys and not options.allow_host:
        return None
    return ["localhost", options.host, socket.gethostname(), *options.allow_host]


def _order(options: argparse.Namespace, folder: Path, adapters: Mapping[str, OfferedAdapter]) -> Order:
    flags = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(SampleArgs)}
    flags = {name: value for name, value in flags.items() if value is not None and name not in ("lora", "output_dir")}
    return Order(
        folder=str(folder),
        models={
            name: {"files": files, "overrides": options.set, "flags": flags} for name, files in _models(options).items()
        },
        adapters={name: adapter.path for name, adapter in adapters.items()},
        allowed_targets=options.allow_target,
        refine_model=options.refine_model,
        previews=not options.no_page,
    )


def _models(options: argparse.Namespace) -> dict[str, list[str]]:
    """Name -> files of its configuration."""
    from sgm.placeholders import config_files

    models: dict[str, list[str]] = {}
    if options.configs or not options.model:
        default, demo = CONFIGS / "cogvideox_2b_infer.yaml", CONFIGS / "demo_infer.yaml"
        files = [str(file) for file in config_files(options.configs, default, demo)]
        models[options.name or _usual_name(Path(files[0]))] = files
    elif options.name:
        raise ConfigError("--name is of the configuration that is named without --model; write --model NAME=FILE.")
    for text in options.model:
        name, equals, listed = text.partition("=")
        if not (name and equals and listed) or name in models:
            raise ConfigError(f"--model {text}: it must be NAME=FILE[,FILE], and each name another one.")
        models[name] = [str(file) for file in config_files(listed.split(","), Path(), Path())]
    return models


def _usual_name(file: Path) -> str:
    """Of a released model's `infer.yaml` the folder's."""
    return file.resolve().parent.name if file.name == "infer.yaml" else file.stem.removesuffix("_infer")


def _adapters(texts: Sequence[str]) -> dict[str, OfferedAdapter]:
    """By name, of `[NAME=]PATH[:SCALE]`."""
    found: dict[str, OfferedAdapter] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        path, scale = split_scale(rest if equals else text)
        name = name if equals else re.sub(r"\.(safetensors|pt|bin)$", "", Path(path).name)
        if not name or ":" in name or name in found:
            raise ConfigError(
                f"--lora {text}: each adapter needs a name of its own, without a colon: NAME=PATH[:SCALE]."
            )
        if not SCALES[0] <= scale <= SCALES[1]:
            raise ConfigError(f"--lora {text}: its scale must be from {SCALES[0]} to {SCALES[1]}.")
        found[name] = OfferedAdapter(found_path(path), scale)
    return found
