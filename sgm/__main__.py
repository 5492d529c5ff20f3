"""`cogvideox-sat sample ...` and `cogvideox-sat train ...` (also `python -m sgm`): the two entries, from any folder.

Several processes: `python -m sgm.launch --standalone --nproc_per_node=2 -m sgm sample ...`.
"""

from __future__ import annotations

import sys

from sgm.cli import Parser


def main() -> int:
    """Run the entry that the first word of the command line names, with the words after it."""
    parser = Parser(prog="cogvideox-sat", description="Text to video with CogVideoX models, and their fine-tuning.")
    parser.add_argument("entry", choices=("sample", "train"), help="text to video; fine-tuning (each has a --help)")
    name = parser.parse_args(sys.argv[1:2]).entry
    prog, arguments = f"{parser.prog} {name}", sys.argv[2:]
    if name == "sample":
        import sample_video

        return sample_video.main(arguments, prog=prog, listen=True)
    import train_video

    return train_video.main(arguments, prog=prog, leave=True)


if __name__ == "__main__":
    sys.exit(main())
