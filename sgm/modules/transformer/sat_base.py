"""What the transformer takes from SwissArmyTransformer, imported once and without SAT's start-up messages."""

# ruff: noqa: F401  # names for the modules beside this one

from __future__ import annotations

from sgm.distributed import quiet_libraries

with quiet_libraries():
    from sat.model.base_model import BaseMixin, BaseModel, non_conflict, replacable
    from sat.model.transformer import MLP, BaseTransformer, BaseTransformerLayer, SelfAttention
    from sat.mpu import (
        ColumnParallelLinear,
        RowParallelLinear,
        copy_to_model_parallel_region,
        reduce_from_model_parallel_region,
    )
    from sat.mpu.utils import scaled_init_method, unscaled_init_method
    from sat.transformer_defaults import HOOKS_DEFAULT
