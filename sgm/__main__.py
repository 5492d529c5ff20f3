"""`cogvideox-sat sample ...`, `train ...` and `serve ...` (also `python -m sgm`): the entries, from any folder.

Several processes: `python -m sgm.launch --standalone --nproc_per_node=2 -m sgm sample ...`.
"""

from __future__ import annotations

import sys

from sgm.cli import Parser


def main() -> int:
    """Run the entry that the first word of the command line names, with the words after it."""
    parser = Parser(prog="cogvideox-sat", description="Text to video with CogVideoX models, and their fine-tuning.")
    about = "text to video; fine-tuning; page and server (each has a --help)"
    parser.add_argument("entry", choices=("sample", "train", "serve"), help=about)
    name = parser.parse_args(sys.argv[1:2]).entry
    prog, arguments = f"{parser.prog} {name}", sys.argv[2:]
    if name == "sample":
        import sample_video

        return sample_video.main(arguments, prog=prog, listen=True)
    if name == "serve":
        from sgm.serve.__main__ import main as serve

        return serve(arguments, prog=prog)
    import train_video

    return train_video.main(arguments, prog=prog, leave=True)


if __name__ == "__main__":
    sys.exit(main())
