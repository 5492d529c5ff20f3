"""What a training configuration will need of memory, and what each switch would change: before anything is loaded.

python tools/estimate_memory.py configs/cogvideox_2b_sft.yaml [MORE.yaml ...] [--set KEY=VALUE ...] [--gpus N]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))
LOW_MEMORY = REPO / "configs" / "low_memory.yaml"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="+", type=Path, metavar="CONFIG.yaml", help="later files win")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs the run is spread over")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="kind of machine it will run on")
    parser.add_argument("--allow-target", action="append", default=[], metavar="PREFIX", help="see train_video.py")
    options = parser.parse_args(arguments)
    from sgm.util import allow_target

    for prefix in options.allow_target:
        allow_target(prefix)
    from sgm.cli import exit_code

    return exit_code(lambda: print("\n".join(table(options.configs, options.set, options.gpus, options.device))))


def table(configs: list[Path], overrides: list[str], gpus: int, device: str) -> list[str]:
    """Lines of the report.

    Raises:
        ConfigError: the configuration is wrong.
    """
    from sgm.training.memory import GIB, gib

    base = needs_of(configs, overrides, gpus, device)
    rows = [(needs, how) for how, needs in base.variants().items() if needs.total != base.total]
    least = needs_of([*configs, LOW_MEMORY], overrides, gpus, device)
    rows.append((least, f"with {LOW_MEMORY.name}"))
    if base.encoder_values > base.picture_encoder:
        rows.append((least.cached(), f"with {LOW_MEMORY.name} and args.cache_dir"))
    rows = [(base, "as configured"), *sorted(rows, key=lambda row: row[0].total, reverse=True)]
    return [
        (
            f"{base.trained:,} trained of {base.trained + base.frozen:,} values, {base.tokens} tokens a clip, "
            f"{base.dtype}, ZeRO {base.stage} over {gpus} GPU{'s' if gpus > 1 else ''}"
        ),
        *base.report(None),
        "",
        "   GPU GiB  CPU GiB",
        *(f"{needs.total / GIB:10.2f} {needs.on_cpu / GIB:8.2f}  {how}" for needs, how in rows),
        "",
        f"GPU: what torch allocates; the driver takes about {gib(0.5 * GIB)} besides.",
        "CPU: the offloaded optimizer, streamed weights, and layers' inputs that wait there.",
        "A text encoder that is not on this machine counts as T5 XXL.",
    ]


def needs_of(configs: list[Path], overrides: list[str], gpus: int, device: str):
    """`MemoryNeeds` of a configuration."""
    from sgm import distributed
    from sgm.config import ConfigError, check_model_section, load_run_config
    from sgm.models.diffusion import SATVideoDiffusionEngine
    from sgm.training.options import TrainArgs
    from sgm.training.setup.deepspeed import plan_deepspeed
    from sgm.training.setup.estimate import planned_needs
    from sgm.weights.preflight import with_found_paths

    config = with_found_paths(load_run_config(configs, TrainArgs, overrides=overrides))
    check_model_section(config.model, SATVideoDiffusionEngine)
    shares = config.args.sequence_parallel_size
    if gpus % shares:
        raise ConfigError(f"--gpus {gpus} is no multiple of args.sequence_parallel_size {shares}")
    plan = plan_deepspeed(config.deepspeed, device_type=device, data_parallel_size=gpus // shares)
    distributed.init_distributed("cpu")
    distributed.ensure_groups(1)
    return planned_needs(config, plan, gpus)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
