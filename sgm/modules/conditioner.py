"""From a batch (captions, images, numbers) to the network's conditions."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TypedDict

import torch
from torch import Tensor, nn

from sgm.modules.children import ModuleList
from sgm.typed import ConfigError, Share
from sgm.util import Config, Node, Role, instantiate_from_config

# An embedding's number of axes decides what it is to the network.
KEY_OF_RANK = {2: "vector", 3: "crossattn", 4: "concat", 5: "concat"}
# The axis on which embeddings of one kind are joined: vector (b, d), crossattn (b, l, d), concat (b, [t,] c, h, w).
JOIN_AXIS = {"vector": 1, "crossattn": 2, "concat": -3}


class AbstractEmbModel(nn.Module):
    """Base of embedders. `GeneralConditioner` sets the attributes from the YAML entry.

    Attributes:
        is_trainable: False keeps the embedder in eval mode whatever `train()` is called with.
        ucg_rate: probability that a sample's embedding becomes zero.
        input_keys: entries of the batch that `forward` gets, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_trainable = False
        self.ucg_rate = 0.0
        self.input_keys: tuple[str, ...] = ()

    def train(self, mode: bool = True) -> AbstractEmbModel:
        return super().train(mode and self.is_trainable)


class BesideEmbedder(TypedDict, total=False):
    """What may stand beside an embedder's target."""

    is_trainable: bool
    ucg_rate: Share
    input_key: str
    input_keys: Sequence[str]
    name: Any


def drop_samples(embedding: Tensor, rate: float) -> Tensor:
    """Zero whole samples of (b, ...) with probability `rate`; the others are not rescaled.

    One `torch.bernoulli` of b float32 probabilities on the embedding's device, whether training or not.
    """
    keep = torch.bernoulli(torch.full((embedding.shape[0],), 1 - rate, device=embedding.device))
    return keep.to(embedding.dtype).view(-1, *[1] * (embedding.ndim - 1)) * embedding


class GeneralConditioner(nn.Module):
    """Runs the embedders and sorts their outputs by rank into `vector`, `crossattn` and `concat`.

    Args:
        emb_models: one mapping an embedder: `target`, `params`, and beside them `input_key` (or `input_keys`),
            `is_trainable` (False), `ucg_rate` (0.0; caption dropout).
    Raises:
        ConfigError: an entry without an input key, with an unknown key, or a rate outside 0..1.
    """

    def __init__(self, emb_models: Sequence[Annotated[Config, Role(AbstractEmbModel, beside=BesideEmbedder)]]) -> None:
        super().__init__()
        if not emb_models:
            raise ConfigError("emb_models is empty: name a text encoder, as the configurations in configs/ do.")
        self.embedders: ModuleList[AbstractEmbModel] = ModuleList([_build_embedder(config) for config in emb_models])

    def forward(
        self, batch: Mapping[str, Any], force_zero_embeddings: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Conditions of a batch.

        Args:
            force_zero_embeddings: input keys whose embedding is replaced by zeros of the same shape.
        Returns:
            `vector` (b, d), `crossattn` (b, l, d), `concat` (b, [t,] c, h, w): those that some embedder makes.
        """
        made = [_embed(embedder, batch) for embedder in self.embedders]
        return self._joined_by_rank(made, frozenset(force_zero_embeddings or ()))

    def _joined_by_rank(self, made: Sequence[list[Tensor]], zeroed: frozenset[str]) -> dict[str, Tensor]:
        """What each embedder made, after dropout and zeroing, joined by rank."""
        output: dict[str, Tensor] = {}
        for embedder, embeddings in zip(self.embedders, made):
            for embedding in embeddings:
                if embedding.ndim not in KEY_OF_RANK:
                    shape = list(embedding.shape)
                    raise ConfigError(f"{type(embedder).__name__} gave shape {shape}; 2 to 5 axes have a use.")
                key = KEY_OF_RANK[embedding.ndim]
                if embedder.ucg_rate > 0:
                    embedding = drop_samples(embedding, embedder.ucg_rate)
                if zeroed.intersection(embedder.input_keys):
                    embedding = torch.zeros_like(embedding)
                joined = [output[key], embedding] if key in output else [embedding]
                output[key] = torch.cat(joined, dim=JOIN_AXIS[key]) if len(joined) > 1 else embedding
        return output

    def get_unconditional_conditioning(
        self,
        batch_c: Mapping[str, Any],
        batch_uc: Mapping[str, Any] | None = None,
        force_uc_zero_embeddings: Collection[str] | None = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Conditions and unconditional conditions for guidance, both without dropout.

        An embedder runs once where its second result is known from the first: zeros, or an embedding of the same.

        Args:
            batch_uc: the batch to steer away from (negative prompts); None takes `batch_c`.
            force_uc_zero_embeddings: input keys whose unconditional embedding is zeros (CogVideoX: ["txt"]).
        """
        with self.without_dropout():
            zeroed, others = frozenset(force_uc_zero_embeddings or ()), batch_c if batch_uc is None else batch_uc
            made = [_embed(embedder, batch_c) for embedder in self.embedders]
            made_uc = [
                embeddings if _can_reuse(embedder, batch_c, others, zeroed) else _embed(embedder, others)
                for embedder, embeddings in zip(self.embedders, made)
            ]
            return self._joined_by_rank(made, frozenset()), self._joined_by_rank(made_uc, zeroed)

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Every `ucg_rate` is 0 inside the block."""
        rates = [embedder.ucg_rate for embedder in self.embedders]
        try:
            for embedder in self.embedders:
                embedder.ucg_rate = 0.0
            yield
        finally:
            for embedder, rate in zip(self.embedders, rates):
                embedder.ucg_rate = rate


def _build_embedder(config: Mapping[str, Any]) -> AbstractEmbModel:
    target = config["target"]
    keys = [config["input_key"]] if "input_key" in config else list(config.get("input_keys", ()))
    if not keys:
        raise ConfigError(f"{target}: set input_key, the batch entry that it embeds (captions: txt).")
    rate = float(config.get("ucg_rate", 0.0))
    bare = Node(target=target, params=config.get("params") or {})
    bare.place = getattr(config, "place", "")
    embedder = instantiate_from_config(bare)
    embedder.input_keys, embedder.ucg_rate = tuple(keys), rate
    embedder.is_trainable = bool(config.get("is_trainable", False))
    if not embedder.is_trainable:
        embedder.requires_grad_(False).eval()
    return embedder


def _embed(embedder: AbstractEmbModel, batch: Mapping[str, Any]) -> list[Tensor]:
    absent = [key for key in embedder.input_keys if key not in batch]
    if absent:
        raise ConfigError(
            f"{type(embedder).__name__} needs {', '.join(absent)} from the batch, "
            f"which holds {', '.join(map(str, batch)) or 'nothing'}."
        )
    with torch.set_grad_enabled(embedder.is_trainable and torch.is_grad_enabled()):
        made = embedder(*(batch[key] for key in embedder.input_keys))
    return list(made) if isinstance(made, list | tuple) else [made]


def _can_reuse(
    embedder: AbstractEmbModel, batch: Mapping[str, Any], others: Mapping[str, Any], zeroed: frozenset[str]
) -> bool:
    """Whether what the embedder made of `batch` has the values, or only its sizes where it is zeroed, for `others`."""
    pairs = [(batch[key], others.get(key)) for key in embedder.input_keys]
    if zeroed.isdisjoint(embedder.input_keys):
        return not embedder.training and all(a is b for a, b in pairs)
    return all(a is b or _entry_size(a) == _entry_size(b) is not None for a, b in pairs)


def _entry_size(entry: Any) -> Any:
    """What decides the size of an embedding: a tensor's shape, the number of captions; None: not known."""
    return entry.shape if isinstance(entry, Tensor) else len(entry) if isinstance(entry, list | tuple) else None
