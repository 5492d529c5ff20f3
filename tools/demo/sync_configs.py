"""Copy the model section and the weights' path of configs/demo_infer.yaml into the demo's training configurations.

    python tools/demo/sync_configs.py

demo_lora.yaml keeps its adapter (`lora_config`, `not_trainable_prefixes`).
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FROZEN = "  not_trainable_prefixes: [ 'all' ] # only the adapter learns\n"
ADAPTER = re.compile(r" *lora_config:\n(?: {10,}.*\n)+\n?")


def synced(own: str, infer: str) -> str:
    """The text `own` of a training configuration with `infer`'s model section and load path, and its own adapter."""
    head, _, section = own.partition("\nmodel:\n")
    model = infer.partition("\nmodel:\n")[2]
    adapter = ADAPTER.search(section)
    if adapter:
        model = model.replace("  log_keys:\n", FROZEN + "  log_keys:\n", 1)
        model = model.replace("        patch_embed_config:\n", adapter.group() + "        patch_embed_config:\n", 1)
    load = re.search(r"^  load: (\S+)", infer, re.MULTILINE).group(1)  # type: ignore[union-attr]
    head = re.sub(r"^  load: \S+", f"  load: {load}", head, flags=re.MULTILINE)
    return f"{head}\nmodel:\n{model}"


def main(arguments: list[str]) -> int:
    argparse.ArgumentParser(description=__doc__).parse_args(arguments)
    infer = (CONFIGS / "demo_infer.yaml").read_text(encoding="utf-8")
    for name in ("demo_lora.yaml", "demo_sft.yaml"):
        path = CONFIGS / name
        text = path.read_text(encoding="utf-8")
        if synced(text, infer) != text:
            path.write_text(synced(text, infer), encoding="utf-8")
            print(f"{path}: brought up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
