"""A Hugging Face cache whose layers are packed, and the attention function "turboquant" that reads them.

    model.set_attn_implementation("turboquant")
    model.generate(ids, past_key_values=TurboQuantCache(model.config))

`update` hands new keys and values on as they are, with the layer that is to take them. The attention function, which
sees by the mask what is padding, appends them and attends; padding is never stored.

Source: https://huggingface.co/docs/transformers/attention_interface.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from typing import Any

import numpy as np
import torch
import transformers  # pyright: ignore[reportMissingImports]
from torch.nn.functional import pad
from transformers import cache_utils  # pyright: ignore[reportMissingImports]
from transformers.masking_utils import (  # pyright: ignore[reportMissingImports]
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # pyright: ignore[reportMissingImports]

from tq_torch.cache import KVCache, load_file, save_file
from tqcore import cache_checks
from tqcore.quantizer import Quantizer

NAME = "turboquant"
ROOM = 64  # a cache without a `max_length` grows by an eighth of its length, in steps of this many positions
CROP_TO = "max_length" in inspect.signature(cache_utils.DynamicLayer.crop).parameters  # transformers before 5.18


class TurboQuantCache(transformers.Cache):
    """Keys and values of a decoder, packed but for sliding-window and chosen layers, for `past_key_values=`.

    Layers with a sliding window stay dense, in transformers' own layers, bounded by their window.

    Args:
      config: of the model.
      keys, values: bits of a coordinate, 1 to 4, or a Quantizer.
      dense_layers: indices of layers that stay dense; negative ones count from the end.
      max_length: allocates that many positions at the first update, whose addresses then stay, for `torch.compile` and
        CUDA graphs. None: the cache grows.
      dense_returning: `update` returns dense keys and values, decompressed, for attention implementations other than
        "turboquant".
      window, block, first, center: as of `KVCache.zeros`.

    Raises:
      ValueError: an index of `dense_layers` is out of range, or an argument of `KVCache.zeros` is, at the first update.
    """

    def __init__(
        self,
        config: Any,
        *,
        keys: int | Quantizer = 4,
        values: int | Quantizer = 4,
        dense_layers: Sequence[int] = (),
        max_length: int | None = None,
        dense_returning: bool = False,
        window: int = 0,
        block: int = 1,
        first: int = 0,
        center: Any = None,
    ):
        if max_length is None:
            layers = transformers.DynamicCache(config=config).layers
        else:
            layers = transformers.StaticCache(config=config, max_cache_len=max_length).layers
        wrong = [index for index in dense_layers if not -len(layers) <= index < len(layers)]
        if wrong:
            raise ValueError(f"`dense_layers` must be indices of {len(layers)} layers, got {wrong[0]}.")
        dense = {index % len(layers) for index in dense_layers}
        options = {"window": window, "block": block, "first": first, "center": center}
        make = partial(TurboQuantLayer, keys, values, max_length, dense_returning, options)
        full = cache_utils.DynamicLayer, cache_utils.StaticLayer
        packed = {i for i, layer in enumerate(layers) if type(layer) in full and i not in dense}
        super().__init__(layers=[make() if i in packed else layer for i, layer in enumerate(layers)])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays of all layers."""
        parts = (getattr(layer, name, None) for layer in self.layers for name in ("keys", "values", "cache"))
        return sum(part.nbytes for part in parts if part is not None)

    def save(self, path: str | PathLike) -> None:
        """Writes the packed layers as "layer.0" and so on: a file that `tqjax.load_file` reads too.

        Raises:
          ValueError: a layer is empty, or dense in transformers' own layer.
        """
        caches: Any = {f"layer.{i}": getattr(layer, "cache", None) for i, layer in enumerate(self.layers)}
        missing = [name for name, cache in caches.items() if cache is None]
        if missing:
            raise ValueError(f"layers must be packed and have seen positions to be saved, got none in {missing[0]}.")
        save_file(caches, path)

    def load(self, path: str | PathLike, device: Any = None) -> "TurboQuantCache":
        """Takes the layers of a file, whichever framework wrote it, in place of its own; returns itself.

        Raises:
          ValueError: the file does not hold a cache for each layer, and no others.
        """
        caches: Any = load_file(path)
        layers: list[Any] = self.layers
        names = [f"layer.{i}" for i in range(len(layers))]
        held = sorted(caches) if isinstance(caches, dict) else []
        known = all(isinstance(layer, TurboQuantLayer) for layer in layers)
        if held != sorted(names) or not known or not all(isinstance(caches[name], KVCache) for name in names):
            raise ValueError(f"{path} must hold the caches {names} for packed layers, got {held}.")
        for layer, name in zip(layers, names, strict=True):
            layer.take(caches[name].map(lambda x: x.to(device)))
        return self


@dataclass(frozen=True)
class Handle:
    """What `update` returns in place of keys and of values: what is new, and the layer that is to take it."""

    layer: "TurboQuantLayer"
    key: torch.Tensor
    value: torch.Tensor
    is_first: bool


class TurboQuantLayer(cache_utils.CacheLayerMixin):
    """One layer of a `TurboQuantCache`."""

    is_sliding = False
    is_croppable = True

    def __init__(self, keys, values, max_length, dense_returning, options):
        super().__init__()
        self.key_quantizer, self.value_quantizer, self.options = keys, values, options
        self.max_length, self.dense_returning = max_length, dense_returning
        self.is_compileable = max_length is not None
        self.cache: Any = None  # the KVCache, once shapes are known
        self.seen: Any = 0  # positions of the batch, padding included; a tensor where the cache does not grow
        self.is_empty = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor | None = None) -> None:
        batch, heads, steps, head_dim = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        keys, values = (
            bits if isinstance(bits, Quantizer) else Quantizer(head_dim, bits)
            for bits in (self.key_quantizer, self.value_quantizer)
        )
        least = self.options["first"] + self.options["window"]
        capacity = max(least, _roomy(steps)) if self.max_length is None else self.max_length
        self.cache = KVCache.zeros(
            batch, heads, capacity, keys, values, dtype=self.dtype, device=self.device, **self.options
        )
        if self.max_length is not None:
            self.seen = torch.zeros((), dtype=torch.int64, device=self.device)
            if not torch.compiler.is_compiling():
                self.cache.map(_fix_address)
                _fix_address(self.seen)
        self.is_initialized = True

    def take(self, cache: Any) -> None:
        """Goes on with a `KVCache` that has been filled elsewhere."""
        self.cache, self.dtype = cache, getattr(torch, cache.config.dtype)
        self.device, self.max_length, self.is_compileable = cache.lengths.device, None, False
        self.seen, self.is_empty, self.is_initialized = int(cache.lengths.max()), False, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple:
        """What attention is to read: a `Handle` twice, or with `dense_returning` keys and values [B, K, S, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        cache_checks.check_cache_append(key_states, value_states, None, self.cache)
        is_first, steps = self.is_empty, key_states.shape[-2]
        if self.max_length is None:
            self._make_room(self.seen + steps)
            self.seen += steps
        else:
            if not torch.compiler.is_compiling():
                seen = int(self.seen) if self.device.type == "cpu" else 0
                cache_checks.check_room(np.array(seen), np.array(steps), self.max_length)
            self.seen.add_(steps)
        self.is_empty = False
        if not self.dense_returning:
            handle = Handle(self, key_states, value_states, is_first)
            return handle, handle
        self.cache.append(key_states, value_states)
        keys, values = self.cache.dense()
        return (keys, values) if self.max_length is not None else (keys[:, :, : self.seen], values[:, :, : self.seen])

    def attend(self, query: torch.Tensor, handle: Handle, mask: torch.Tensor | None, **options: Any) -> torch.Tensor:
        """Takes what is new but for padding, and attends over all, [B, H, T, D]."""
        counts = None
        if mask is not None and handle.is_first and query.shape[2] > 1:
            own = mask[:, 0].diagonal(dim1=-2, dim2=-1)  # of a position, whether it sees itself: padding does not
            counts = own.sum(-1, dtype=torch.int32)
            order = own.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, None, :, None]
            taken = [x.gather(2, order.expand_as(x)) for x in (handle.key, handle.value)]
        else:
            taken = [handle.key, handle.value]
        if mask is not None and query.shape[2] > 1 and self.max_length is None:
            self._check_mask(mask, self.cache.lengths + (query.shape[2] if counts is None else counts), handle.is_first)
        self.cache.append(*taken, counts)
        return self.cache.attend(query, **options)

    def _check_mask(self, mask: torch.Tensor, lengths: torch.Tensor, is_first: bool) -> None:
        """Whether it is causal behind padding on the left, which is what the cache knows."""
        steps, size = mask.shape[-2:]
        position = torch.arange(size, device=mask.device)
        query = torch.arange(size - steps, size, device=mask.device)[:, None]
        known = (position <= query) & (position >= (size - lengths)[:, None, None])
        if (
            mask.shape[1] != 1
            or mask.dtype != torch.bool
            or not torch.equal(known.expand(mask[:, 0].shape), mask[:, 0])
        ):
            self.seen, self.is_empty = self.seen - steps, is_first
            raise NotImplementedError("'turboquant' needs causal attention with padding on the left, got another mask.")

    def _make_room(self, length: int) -> None:
        """Grows the cache to hold `length` positions."""
        if length > self.cache.capacity:
            more = _roomy(length) - self.cache.capacity
            for packed in ("keys", "values"):
                old = getattr(self.cache, packed)
                new = replace(old, codes=pad(old.codes, (0, 0, 0, more)), norms=pad(old.norms, (0, more)))
                setattr(self.cache, packed, new)

    def get_seq_length(self) -> Any:
        return self.seen

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """The positions that a mask has, and the first; `query_length` was a tensor of positions in 5.0."""
        steps = query_length if isinstance(query_length, int) else query_length.shape[0]
        return (self.seen + steps if self.max_length is None else self.max_length), 0

    def get_max_length(self) -> int:
        return -1 if self.max_length is None else self.max_length

    get_max_cache_shape = get_max_length  # its name before 5.18

    def crop(self, tokens: int) -> None:
        """Removes -`tokens` positions; in transformers before 5.18, a number of at least 0 is how many to keep."""
        if tokens > 0 and not CROP_TO:
            raise ValueError(f"`tokens_to_remove` must be 0 or negative, got {tokens}.")
        removed = -tokens if tokens < 0 or not CROP_TO else self.seen - tokens
        if self.is_initialized and (not isinstance(removed, int) or removed > 0):
            self.cache.crop((self.cache.lengths - removed).clamp(min=0).int())
            self._set_seen((self.seen - removed).clamp(min=0) if self.max_length else max(0, self.seen - removed))

    def reset(self) -> None:
        if self.is_initialized:
            self.cache.reset()
            self._set_seen(0)
        self.is_empty = True

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        if self.is_initialized:
            self.cache.select(beam_idx.to(self.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            self.cache.select(torch.arange(self.cache.batch, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.is_initialized:
            indices = indices.to(self.device)
            self.cache.select(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def offload(self) -> None:
        if self.is_initialized:
            self.cache = self.cache.map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.is_initialized and self.cache.lengths.device != self.device:
            self.cache = self.cache.map(lambda x: x.to(self.device, non_blocking=True))

    def _set_seen(self, seen: Any) -> None:
        if self.max_length is None:
            self.seen = seen
        else:
            self.seen.copy_(torch.as_tensor(seen))


def attention(
    module: Any,
    query: torch.Tensor,
    key: Any,
    value: Any,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function: query [B, H, T, D] and handles, or keys and values of dense layers -> [B, T, H, D].

    Raises:
      NotImplementedError: for packed layers, the mask is not causal behind padding on the left, or there are a window,
        dropout or biases of positions.
    """
    if not isinstance(key, Handle):
        return _dense(module, query, key, value, attention_mask, scaling, dropout, softcap, s_aux, **kwargs), None
    given = kwargs | {"sliding_window": sliding_window}
    odd = [name for name in ("position_bias", "sliding_window") if given.get(name) is not None]
    odd += ["dropout"] * (dropout > 0) + ["is_causal=False"] * (not getattr(module, "is_causal", True))
    if odd:
        raise NotImplementedError(
            f"'turboquant' needs causal attention without windows, dropout or biases, got {odd[0]}."
        )
    out = key.layer.attend(
        query,
        key,
        attention_mask,
        scale=scaling,
        logits_soft_cap=softcap,
        sinks=None if s_aux is None else s_aux.float(),
    )
    return out.transpose(1, 2).contiguous(), None


def _dense(module, query, key, value, mask, scaling, dropout, softcap, sinks, **kwargs):
    """Attention over dense keys and values: "sdpa", or where that lacks a soft cap or sinks, sums in float32."""
    if softcap is None and sinks is None:
        sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)[0]
    groups, steps = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (x.repeat_interleave(groups, dim=1).float() for x in (key, value))
    logits = query.float() @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is None:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=query.device).tril(key.shape[2] - steps)
    logits = logits.masked_fill(~mask, torch.finfo(torch.float32).min)
    if sinks is not None:
        logits = torch.cat([logits, sinks.float()[:, None, None].expand(*logits.shape[:3], 1)], -1)
    weights = torch.softmax(logits, -1)[..., : key.shape[2]]
    weights = torch.nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).to(query.dtype).transpose(1, 2).contiguous()


def _roomy(length: int) -> int:
    return -(-(length + length // 8 + 1) // ROOM) * ROOM


def _fix_address(tensor: torch.Tensor) -> torch.Tensor:
    torch._dynamo.mark_static_address(tensor)
    return tensor


transformers.AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
