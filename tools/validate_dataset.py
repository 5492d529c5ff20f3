"""Check a data set before training: `python tools/validate_dataset.py CONFIG.yaml` or `... --data SOURCE`.

Prints what is usable and why the rest is not; writes a JSON file and a contact sheet on request. Exit status 1: nothing
is usable, or with --strict something is not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", metavar="CONFIG.yaml", help="training configuration: data, text encoder")
    parser.add_argument("--data", nargs="+", metavar="SOURCE", help="folders, manifests, shards; default: CONFIG's")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of CONFIG")
    parser.add_argument("--tokenizer", metavar="DIR", help="text encoder's folder; default: that of CONFIG")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all facts of all clips")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="write a contact sheet of the usable clips")
    parser.add_argument("--sheet-clips", type=int, default=40, metavar="N", help="clips on the sheet, evenly chosen")
    parser.add_argument("--rows", type=int, default=20, metavar="N", help="rows of the table; 0: all")
    parser.add_argument("--workers", type=int, metavar="N", help="videos opened at a time")
    parser.add_argument("--strict", action="store_true", help="fail where any clip is not usable")
    parser.add_argument("--allow-target", action="append", default=[], metavar="PREFIX", help="see train_video.py")
    options = parser.parse_args(arguments)
    if not options.configs and not options.data:
        parser.error("name a configuration or --data")
    return options


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    from sgm.cli import exit_code

    return exit_code(lambda: run(options))


def run(options: argparse.Namespace) -> int:
    from sgm.config import merge_yaml
    from sgm.data.dataset import ClipSource, DataSection
    from sgm.data.sources import Listing, passed_over_line
    from sgm.files import write_text
    from sgm.places import found_path
    from sgm.util import allow_target
    from tools.examine_clips import as_json, contact_sheet, examine, summary, table, text_encoder_params

    for prefix in options.allow_target:
        allow_target(prefix)
    config = merge_yaml(options.configs, options.set) if options.configs else {}
    data = config.get("data") or {"target": "data_video.SFTDataset", "params": {}}
    clips_of = ClipSource.of(DataSection.parse(data))
    settings = clips_of.settings
    sources = options.data or [*_named(config, "train_data"), *_named(config, "valid_data")]
    passed_over: Counter[str] = Counter()

    def list_and_count(source: Path) -> Listing:
        clips = clips_of.list_all(source)
        passed_over.update(clips.passed_over)
        return clips

    params = text_encoder_params(config.get("model") or {})
    model_dir = options.tokenizer or params.get("model_dir")
    tokenizer = _tokenizer(model_dir and found_path(model_dir), int(params.get("max_length", 226)))
    facts = [
        fact
        for source in dict.fromkeys(map(found_path, sources))
        for fact in examine(Path(source).expanduser(), settings, list_and_count, tokenizer, options.workers)
    ]
    print("\n".join(table(facts, options.rows)))
    print("\n".join(summary(facts, tokenizer is not None)))
    if passed_over:
        print(f"  {passed_over_line(passed_over)}")
    if options.json:
        content = as_json(facts, settings) | {"passed_over": dict(passed_over)}
        write_text(options.json, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        print(f"facts: {options.json}")
    usable = [fact for fact in facts if fact.usable]
    if options.sheet and usable:
        contact_sheet(usable, settings, options.sheet, options.sheet_clips)
        print(f"contact sheet: {options.sheet}")
    return 0 if usable and not (options.strict and len(usable) < len(facts)) else 1


def _named(config: dict, name: str) -> list[str]:
    value = (config.get("args") or {}).get(name) or []
    return [value] if isinstance(value, str) else list(value)


def _tokenizer(model_dir: str | None, max_length: int):
    """Counts a caption's tokens; None where there is no text encoder here."""
    from sgm.modules.encoders.t5_files import is_local
    from tools.examine_clips import TokenCounter

    return TokenCounter(model_dir, max_length) if model_dir and is_local(model_dir) else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
