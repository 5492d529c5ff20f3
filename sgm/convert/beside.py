"""What no tensor says of a model: from the YAML file that lies beside the weights, or a shipped one that names them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sgm.config import merge_yaml
from sgm.convert.dit_sizes import Sizes, sizes_of_params
from sgm.convert.lazy import ConvertError, Deferred
from sgm.errors import SgmError
from sgm.places import CONFIGS, found_path

ABOVE = 3  # folders: of an iteration; of its run, or a release's transformer/; of the release


@dataclass(frozen=True)
class Described:
    """Sizes of a network, factor on latents and shift of the noise schedule; None where `path` does not say."""

    path: Path
    sizes: Sizes
    scale_factor: float | None
    shift_scale: float | None

    @classmethod
    def read(cls, path: Path) -> Described:
        """The `model:` section of a YAML file.

        Raises:
            ConvertError: it describes no network.
        """
        try:
            model = merge_yaml([path])["model"]
            sizes = sizes_of_params(model["network_config"]["params"])
        except (KeyError, TypeError, AttributeError) as error:
            raise ConvertError(f"{path} has no model.network_config.params that describe a network.") from error
        schedule = ((model.get("sampler_config") or {}).get("params") or {}).get("discretization_config")
        shift = (schedule.get("params") or {}).get("shift_scale", 1.0) if schedule else None  # SAT's default is 1
        return cls(path, sizes, model.get("scale_factor"), shift)


def described_beside(weights: Path, state: Mapping[str, Deferred]) -> Described | None:
    """What YAML files say of the network whose tensors `state` (SAT's names; may be empty) lie in the file `weights`.

    Raises:
        ConvertError: two of them differ.
    """
    found = list(_fitting(weights.resolve(), state))
    for name in ("sizes", "scale_factor", "shift_scale"):
        said = {value: d.path for d in found if (value := getattr(d, name)) is not None}
        if len(said) > 1:
            raise ConvertError(f"{' and '.join(map(str, said.values()))} say different things of {weights}: name the "
                               "right one with --config.")  # fmt: skip
    return max(found, key=lambda d: (d.scale_factor is not None) + (d.shift_scale is not None), default=None)


def _fitting(weights: Path, state: Mapping[str, Deferred]) -> Iterator[Described]:
    for path in _candidates(weights):
        try:
            described = Described.read(path)
            sizes = described.sizes.in_form_of(state)
            if state:
                sizes.check(state, str(weights))
        except SgmError:  # not a model's, or another model's
            continue
        yield replace(described, sizes=sizes)


def _candidates(weights: Path) -> Iterator[Path]:
    folders = weights.parents[:ABOVE]
    for folder in folders:
        yield from sorted(folder.glob("*.yaml"))
    for path in sorted(CONFIGS.glob("*.yaml")):
        load = (merge_yaml([path]).get("args") or {}).get("load")
        if load and Path(found_path(load)).resolve() in (weights, *folders):
            yield path
