"""Page and server: `python -m sgm.serve [CONFIG.yaml ...]`, also `cogvideox-sat serve` and `bash serve.sh`."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sgm.cli import Interrupts, Parser, exit_code
from sgm.flags import add_flags
from sgm.inference.options import SampleArgs
from sgm.serve.limits import Limits

FLAGS = ("load", "merge_lora", "placement", "device", "decoder", "vae_tiling", "refine_model")  # options of `args:`
PACKAGES = ("fastapi", "uvicorn", "python_multipart")  # of requirements.txt, which also has the page's


def parse(arguments: Sequence[str], prog: str | None = None) -> argparse.Namespace:
    parser = Parser(prog, description=__doc__)
    add, most = parser.add_argument, Limits()
    add("configs", nargs="*", metavar="CONFIG.yaml", help="of the model; later files win; default: as sampling's")
    add("--name", metavar="NAME", help="what clients call this model; default: the file's name without `_infer`")
    add("--model", action="append", default=[], metavar="NAME=FILE[,FILE]", help="another model; may be repeated")
    add("--lora", action="append", default=[], metavar="[NAME=]PATH[:SCALE]",
        help="an adapter that clients may ask for by name; may be repeated")  # fmt: skip
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of every configuration")
    add("--allow-target", action="append", default=[], metavar="PREFIX",
        help="also accept classes of your own package as YAML targets")  # fmt: skip
    add_flags(parser, SampleArgs, FLAGS)
    add("--workers", type=int, metavar="N", help="processes that make videos; default: one a GPU")
    add("--host", default="127.0.0.1", help="address to listen at; default: this machine alone (127.0.0.1)")
    add("--port", type=int, default=7860, help="default 7860; 0: any that is free")
    add("--allow-host", action="append", default=[], metavar="NAME", help="a name of this server, behind a proxy say")
    add("--api-keys", type=Path, metavar="FILE", help="keys, one a line, of which clients send one")
    add("--output-dir", type=Path, default=Path("outputs/serve"), metavar="FOLDER", help="videos, and the queue")
    add("--no-page", action="store_true", help="the API alone")
    add("--max-queue", type=int, default=most.queued, metavar="N", help=f"videos that may wait ({most.queued})")
    add("--max-clip", type=float, default=most.clip, metavar="X",
        help=f"pixels of a video, in those of one of the model's own size and length ({most.clip:g})")  # fmt: skip
    add("--max-steps", type=int, default=most.steps, metavar="N", help=f"steps of a video ({most.steps})")
    add("--max-upload", type=int, default=most.upload_bytes >> 20, metavar="MIB",
        help=f"MiB of one request ({most.upload_bytes >> 20})")  # fmt: skip
    add("--keep-days", type=float, metavar="DAYS", help="delete what was finished so long ago; default: keep it")
    return parser.parse_args(list(arguments))


def main(arguments: Sequence[str], prog: str | None = None) -> int:
    """Returns the exit code."""
    options = parse(arguments, prog)
    for package in PACKAGES if options.no_page else (*PACKAGES, "gradio"):
        if importlib.util.find_spec(package) is None:
            return exit_code(partial(_lacks, package))
    from sgm.serve.run import serve

    stopped = "stopped; what was being made begins again with the next start"
    return exit_code(lambda: serve(options, Interrupts().listen().check), stopped)


def _lacks(package: str) -> int:
    raise ModuleNotFoundError(f"No module named {package!r}", name=package)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
