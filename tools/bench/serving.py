"""Does the server lose a job, make one twice, or grow? Many clients at once, then a kill in the middle of the queue.

    python tools/bench/serving.py --requests 500 --clients 20

Clips are as small as the configuration's model makes them: what is measured is all around them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=["configs/demo_infer.yaml"], metavar="CONFIG.yaml")
    parser.add_argument("--requests", type=int, default=500, metavar="N", help="of all clients together (500)")
    parser.add_argument("--clients", type=int, default=20, metavar="N", help="at once (20)")
    parser.add_argument("--size", default="32x16", metavar="WIDTHxHEIGHT", help="of the clips (32x16)")
    parser.add_argument("--kills", type=int, default=3, metavar="N", help="of the server, while it works (3)")
    return parser.parse_args(arguments)


class Server:
    """The server in a process of its own, over a folder that stays."""

    def __init__(self, folder: Path, configs: list[str], queue: int):
        more = ["--no-page", "--max-queue", str(queue), "--max-clip", "100"]
        start = [sys.executable, "-m", "sgm.serve", *configs, "--port", "0", "--output-dir", str(folder)]
        self.process = subprocess.Popen([*start, *more], cwd=REPO, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = next((line for line in self.process.stdout if "http://" in line), None)
        if line is None:
            raise SystemExit("error: the server did not start; see above")
        self.address = next(word for word in line.split() if word.startswith("http://"))

    def client(self) -> Any:
        import openai

        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="none")

    def memory(self) -> list[float]:
        """MiB that the server and its workers hold."""
        import psutil

        own = psutil.Process(self.process.pid)
        return [p.memory_info().rss / 2**20 for p in (own, *own.children())]


def ask(server: Server, options: argparse.Namespace, offset: int = 0) -> list[str]:
    """Every client asks for its share; gives the ids that were answered."""
    ids: list[str] = []

    def client(k: int) -> None:
        videos = server.client().videos
        for n in range(k, options.requests, options.clients):
            more = {"steps": 2, "seed": offset + n}
            ids.append(videos.create(prompt=f"{offset + n}", size=options.size, seconds="0", extra_body=more).id)

    threads = [threading.Thread(target=client, args=(k,)) for k in range(options.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ids


def finish(server: Server, done: Callable[[Counter[str]], bool] = lambda left: not left) -> None:
    """Wait until a condition holds of what is not finished, by state."""
    videos = server.client().videos
    while True:
        states = Counter(video.status for video in videos.list(limit=100, order="desc"))
        left = Counter({state: n for state, n in states.items() if state in ("queued", "in_progress")})
        if done(left):
            return
        time.sleep(0.5)


def check(folder: Path, server: Server, ids: list[str], prompts: int) -> str:
    """What became of the jobs, by the API and by the records on the disk."""
    states = Counter(video.status for video in server.client().videos.list(limit=100))
    records = [json.loads(file.read_text())["prompt"] for file in folder.glob("video_*/000000.json")]
    lost, twice = prompts - len(set(records)), len(records) - len(set(records))
    return f"{len(set(ids))} answers, {dict(states)}; {lost} lost, {twice} made twice"


def main(arguments: list[str]) -> int:
    import warnings

    warnings.filterwarnings("ignore", message="The Sora API")
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="serving-") as scratch:
        folder = Path(scratch)
        server = Server(folder, options.configs, 2 * options.requests)
        ask(server, argparse.Namespace(**{**vars(options), "requests": options.clients}), 10**6)
        finish(server)
        before, began = server.memory(), time.monotonic()
        ids = ask(server, options)
        asked = time.monotonic() - began
        finish(server)
        took, after = time.monotonic() - began, server.memory()
        print(f"{options.requests} requests of {options.clients} clients: taken in {asked:.1f} s, made in {took:.1f} s")
        print(check(folder, server, ids, options.requests + options.clients))
        print("MiB of server and worker: " + ", ".join(f"{a:.0f} -> {b:.0f}" for a, b in zip(before, after)))
        more = ask(server, options, 2 * 10**6)
        for k in range(options.kills):
            left = options.requests * (options.kills - k) // (options.kills + 1)
            finish(server, lambda states, left=left: states.total() <= left)
            server.process.kill()
            server.process.wait()
            server = Server(folder, options.configs, 2 * options.requests)
        finish(server)
        print(f"{options.kills} kills while {options.requests} were made:")
        print(check(folder, server, more, 2 * options.requests + options.clients))
        server.process.terminate()
        server.process.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
