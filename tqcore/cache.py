"""A cache of keys and values that generation appends to and attends over; written once, for arrays of any library.

Of a sequence of length n, the first `first` positions and the `window` most recent ones (up to `block - 1` more) are
dense, the others packed. The dense ones lie in one buffer [B, K, first + window + block - 1, D]: position p < first in
slot p, the others in a ring, position p in slot first + (p - first) mod (window + block - 1). Packed position s is
position first + s. What leaves the window is encoded from the ring before the ring is written.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np

from tqcore import cache_attention, cache_checks, checks, reference, reference_attention, softmax
from tqcore.cache_config import CacheConfig, CacheLibrary
from tqcore.quantizer import PackedVectors, Quantizer

LOST = softmax.UNBOUNDED  # the length of a sequence that could not be written: past any capacity, so attention is NaN


@dataclass(eq=False)
class KVCache:
    """Keys and values of one attention layer, packed but for the first and the most recent ones.

    `zeros` makes an empty one. A plain container: JAX rebuilds it with placeholders. In JAX a method returns a new
    cache (in place where the old one is donated to `jit`); in NumPy and torch it changes this one, and returns it.

    Args:
      keys, values: PackedVectors [B, K, S, D], or pools [N, K, page, D]; keys may have a center [B or 1, K, 1, D].
      lengths: [B] int32, the positions of each sequence.
      packed_lengths: [B] int32, how many of them, from `first` on, are packed.
      dense_keys, dense_values: [B, K, slots, D], or None where there are no slots.
      page_table: [B, M] int32, or None.
      frozen: [N] bool, pages that must not be written, or None.
      config: the rest.
    """

    keys: PackedVectors
    values: PackedVectors
    lengths: Any
    packed_lengths: Any
    dense_keys: Any
    dense_values: Any
    page_table: Any
    frozen: Any
    config: CacheConfig

    ARRAYS: ClassVar = ("lengths", "packed_lengths", "dense_keys", "dense_values", "page_table", "frozen")
    library: ClassVar[CacheLibrary]

    @classmethod
    def zeros(
        cls,
        batch: int,
        kv_heads: int,
        capacity: int,
        keys: Quantizer,
        values: Quantizer | None = None,
        *,
        dtype: Any = "float32",
        window: int = 0,
        block: int = 1,
        first: int = 0,
        center: Any = None,
        page_size: int | None = None,
        pages: int | None = None,
        page_table: Any = None,
        device: Any = None,
    ) -> "KVCache":
        """An empty cache.

        Args:
          batch: B.
          kv_heads: K.
          capacity: the positions that a sequence can have, dense ones included.
          keys: quantises keys; no `qjl`.
          values: quantises values; None means the keys' quantizer.
          dtype: of what is appended and of dense positions: float32, bfloat16 or float16.
          window: how many of the most recent positions stay dense; all of `capacity` for a dense cache.
          block: positions leave the window in blocks of this many.
          first: how many of the first positions stay dense.
          center: what is subtracted from keys: an array [B or 1, K, 1, D] float32; True for the mean of what is first
            appended to a sequence, if that is more than one position (in pages: to all sequences, which share it);
            None for nothing.
          page_size: 16 to 256 makes `keys` and `values` pools of pages of that size.
          pages: N; None means as many as the sequences can fill.
          page_table: [B, M] int32 with M · page_size at least the packed positions; None gives each sequence its own.
          device: where to put it; None means the default.

        Raises:
          ValueError: an argument out of its range.
        """
        values, dtype = values or keys, checks.dtype_name(dtype)
        cache_checks.check_cache_shape(batch, kv_heads, capacity, keys, values, dtype, window, block, first)
        calibrate = center is True
        config = CacheConfig(keys, values, dtype, window, block if window else 1, first, calibrate)
        zeros = partial(cls.library.zeros, device=device)
        size = max(0, capacity - first - window)
        leading, frozen = (batch, kv_heads, size), None
        if page_size is not None:
            cache_checks.check_pages(page_size, pages, page_table, batch, size)
            columns = -(-size // page_size)
            if page_table is None:
                page_table = cls.library.arange(batch * columns, zeros((), "int32")).reshape(batch, columns)
            pages = batch * page_table.shape[1] if pages is None else pages
            leading, frozen = (pages, kv_heads, page_size), zeros((pages,), "bool")
        rows = 1 if page_size is not None else batch
        if calibrate:
            center = zeros((rows, kv_heads, 1, keys.head_dim), "float32")
        elif center is not None:
            cache_checks.check_cache_center(center, rows, kv_heads, keys.head_dim)

        def packed(quantizer, center):
            codes, norms = zeros((*leading, quantizer.packed_dim), "uint8"), zeros(leading, "float32")
            return PackedVectors(codes, norms, quantizer, center)

        def dense():
            return zeros((batch, kv_heads, config.slots, keys.head_dim), dtype) if config.slots else None

        lengths = zeros((batch,), "int32"), zeros((batch,), "int32")
        return cls(packed(keys, center), packed(values, None), *lengths, dense(), dense(), page_table, frozen, config)

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def kv_heads(self) -> int:
        return self.keys.codes.shape[1]

    @property
    def capacity(self) -> int:
        """The positions that a sequence can have."""
        return softmax.context_size(self.keys, self.page_table) + self.config.first + self.config.window

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays: codes, norms, center, dense positions, lengths, pages in use or not."""
        return self.keys.nbytes + self.values.nbytes + sum(x.nbytes for x in self.arrays().values())

    def arrays(self) -> dict[str, Any]:
        """The arrays that are there, without packed vectors."""
        named = {name: getattr(self, name) for name in self.ARRAYS}
        return {name: x for name, x in named.items() if x is not None}

    def map(self, function: Callable[[Any], Any]) -> "KVCache":
        """A cache of this class with `function` applied to each array, such as a move to a device."""
        keys, values = self.keys.map(function), self.values.map(function)
        arrays = dict.fromkeys(self.ARRAYS) | {name: function(x) for name, x in self.arrays().items()}
        return type(self)(keys, values, config=self.config, **arrays)

    @classmethod
    def of(cls, cache: "KVCache", function: Callable[[Any], Any]) -> "KVCache":
        """A cache of this class from one of another, `function` taking each array into this library."""
        mapped = cache.map(function)
        return cls(**{name: getattr(mapped, name) for name in ("keys", "values", *cls.ARRAYS, "config")})

    def append(self, key: Any, value: Any, counts: Any = None) -> "KVCache":
        """Puts T positions after those of each sequence, or the first `counts` of them.

        Args:
          key, value: [B, K, T, D] of the cache's dtype.
          counts: [B] int32, 0 to T; None means T.

        Raises:
          ValueError: shape, dtype or device do not fit; and where lengths can be seen (on a CPU, outside of
            compilation) the cache is full or a page is frozen. The cache is then as it was. Elsewhere such a sequence
            is lost: what does not fit is not written, and its attention is NaN until it is cropped.
        """
        cache_checks.check_cache_append(key, value, counts, self)
        self.library.check_devices(key=key, value=value, counts=counts, cache=self.lengths)
        if key.shape[2] == 0:
            return self
        whole = counts is None
        counts = self.library.xp.full_like(self.lengths, key.shape[2]) if whole else counts
        blocked = self._blocked(counts)
        self._check_room(counts, blocked)
        return self._written(key, value, counts, whole, blocked)

    def attend(
        self,
        query: Any,
        *,
        is_causal: bool = True,
        local_window_size: int | tuple[int, int] | None = None,
        logits_soft_cap: float | None = None,
        sinks: Any = None,
        scale: float | None = None,
        return_lse: bool = False,
        implementation: str | None = None,
    ) -> Any:
        """Attention of the last T positions over all: `attention` over packed ones, merged with that over dense ones.

        Query t stands at position length - T + t. Keys are seen as the cache holds them now: what was dense when it was
        appended may be packed.

        Args:
          query: [B, H, T, D] float32, bfloat16 or float16, K dividing H.
          is_causal: whether a query sees no position after its own.
          local_window_size, logits_soft_cap, sinks, scale, return_lse, implementation: as of `attention`.

        Returns:
          [B, H, T, D] of the query's dtype; with `return_lse`, and lse [B, H, T] float32.

        Raises:
          ValueError: an argument does not fit.
          NotImplementedError: `local_window_size` where the cache has a dense window.
        """
        config, lib = self.config, self.library
        call = partial(
            lib.attention, keys=self.keys, values=self.values, page_table=self.page_table, sinks=sinks, scale=scale,
            logits_soft_cap=logits_soft_cap, local_window_size=local_window_size, implementation=implementation,
        )  # fmt: skip
        if not config.slots:
            return call(query, kv_lengths=self.lengths, is_causal=is_causal, return_lse=return_lse)
        if config.window and local_window_size is not None:
            raise NotImplementedError(
                "`local_window_size` needs a cache without a dense window, "
                f"got {local_window_size}, window={config.window}."
            )
        call = partial(call, kv_lengths=self.packed_lengths, return_lse=True)
        packed = cache_attention.attend_packed(self, query, is_causal, call)
        options = softmax.options(query, scale, is_causal, local_window_size, logits_soft_cap, None)
        out, lse = lib.merge_attention(*packed, *cache_attention.attend_dense(self, query, options))
        return (out, lse) if return_lse else out

    def crop(self, lengths: Any) -> "KVCache":
        """Forgets all positions of a sequence from `lengths` on; what was packed stays packed.

        Args:
          lengths: an integer of at least 0, or [B] int32. Sequences that are not longer stay as they are.
        """
        cache_checks.check_crop(lengths, self.batch)
        xp, first = self.library.xp, self.config.first
        if isinstance(lengths, int | np.integer):
            lengths = xp.full_like(self.lengths, int(lengths))
        packed = xp.minimum(self.packed_lengths, xp.clip(lengths - first, 0, None))
        return self._with(lengths=xp.minimum(self.lengths, lengths), packed_lengths=packed)

    def select(self, indices: Any) -> "KVCache":
        """The sequences `indices` [B'] of this cache, any of them any number of times: for beams and for batches.

        Sequences in pages keep their pages; one that is selected twice shares them with itself, so freeze them first.
        In torch the arrays stay where they are if B' is B.
        """
        checks.check_array("indices", indices, "[B]", ("int32", "int64"))

        def vectors(packed):
            if self.page_table is not None:
                return packed
            center = packed.center
            if center is not None and center.shape[0] == self.batch:
                center = center[indices]
            return replace(packed, codes=packed.codes[indices], norms=packed.norms[indices], center=center)

        arrays = {name: x[indices] for name, x in self.arrays().items() if name != "frozen"}
        return self._with(keys=vectors(self.keys), values=vectors(self.values), **arrays)

    def freeze(self, pages: Any) -> "KVCache":
        """Marks pages [F] of the pool as not to be written, such as those of a prefix that sequences share."""
        checks.check_array("pages", pages, "[F]", ("int32", "int64"))
        if self.frozen is None:
            raise ValueError("`freeze` needs a cache with pages, got one without.")
        numbers = self.library.arange(self.frozen.shape[0], self.frozen)
        return self._with(frozen=self.frozen | (numbers[:, None] == pages).any(-1))

    def reset(self) -> "KVCache":
        """Forgets all positions."""
        return self.crop(0)

    def dense(self, dtype: Any = None) -> tuple[Any, Any]:
        """What attention sees: keys and values [B, K, capacity, D], zeros after the length of a sequence.

        Args:
          dtype: float32, bfloat16 or float16; None means that of the cache.
        """
        xp, config = self.library.xp, self.config
        keys, values = self.keys, self.values
        positions = self.library.arange(self.capacity, self.lengths)
        if self.page_table is not None:
            used = positions[: self.capacity - config.first - config.window] < self.packed_lengths[:, None]
            keys, values = softmax.gathered(keys, values, self.page_table, used, xp)
        near = self.is_dense(positions)
        slot = xp.where(positions < config.first, positions, self._slot(positions))

        def whole(packed, dense):
            x = self.library.decompress(packed, dtype=self.config.dtype if dtype is None else dtype)
            if config.slots:
                index = xp.clip(positions - config.first, 0, max(0, x.shape[2] - 1)) + 0 * self.lengths[:, None]
                x = self.library.take(x, index) if x.shape[2] else 0 * self.library.take(dense, 0 * index)
                recent = self.library.take(dense, xp.clip(slot, 0, config.slots - 1) + 0 * self.lengths[:, None])
                x = xp.where(near[:, None, :, None], recent, x)
            seen = positions < self.lengths[:, None]
            return xp.where(seen[:, None, :, None], x, xp.zeros_like(x))

        return whole(keys, self.dense_keys), whole(values, self.dense_values)

    # --- below, the parts of the above -----------------------------------------------------------------------------

    def _with(self, **changed):
        """This cache with other fields."""
        keep = self.library.keep
        for name, new in changed.items():
            old = getattr(self, name)
            if isinstance(new, PackedVectors):
                center = None if new.center is None else keep(old.center, new.center)
                changed[name] = replace(
                    new, codes=keep(old.codes, new.codes), norms=keep(old.norms, new.norms), center=center
                )
            else:
                changed[name] = keep(old, new)
        return self._replaced(changed)

    def _replaced(self, changed):
        """NumPy and torch change the cache."""
        for name, new in changed.items():
            setattr(self, name, new)
        return self

    def _next_packed(self, counts):
        """[B] `packed_lengths` once `counts` positions are appended."""
        config, xp = self.config, self.library.xp
        if not config.slots:
            return self.lengths + counts
        over = self.lengths + counts - config.first - self.packed_lengths - config.window
        return self.packed_lengths + xp.clip(over, 0, None) // config.block * config.block

    def _blocked(self, counts):
        """[B] whether a page to be written is frozen, or None where none can be."""
        if self.frozen is None:
            return None
        touched, numbers = self._touched(counts)
        return (self.frozen[numbers] & touched).any(-1)

    def _touched(self, counts):
        """[B, M] the pages that `counts` more positions write, and their numbers, any for those out of range."""
        xp, page = self.library.xp, self.keys.codes.shape[2]
        begin = self.library.arange(self.page_table.shape[1], self.page_table) * page
        end = self._next_packed(counts)
        touched = (begin < end[:, None]) & (begin + page > self.packed_lengths[:, None])
        return touched & (end > self.packed_lengths)[:, None], xp.clip(self.page_table, 0, self.frozen.shape[0] - 1)

    def _check_room(self, counts, blocked):
        lengths, counts = self.library.on_host(self.lengths), self.library.on_host(counts)
        if lengths is not None and counts is not None:
            cache_checks.check_room(lengths, counts, self.capacity)
        blocked = None if blocked is None else self.library.on_host(blocked)
        if blocked is not None:
            cache_checks.check_thawed(blocked)

    def _written(self, key, value, counts, whole, blocked):
        """`whole`: all counts are T. Each operation on lengths is a launch of its own in torch."""
        config, lib, xp, steps = self.config, self.library, self.library.xp, key.shape[2]
        ends, table = self._next_packed(counts), self.page_table
        if blocked is not None:
            touched, _ = self._touched(counts)
            table = xp.where(touched & ~blocked[:, None], table, xp.full_like(table, -1))
        parts = []
        if config.ring:
            count = min(config.ring, -(-steps // config.block) * config.block)
            leaving = config.first + self.packed_lengths[:, None] + lib.arange(count, self.lengths)
            starts = xp.where(ends > self.packed_lengths, self.packed_lengths, -count)
            parts.append((lambda new, old: lib.take(old, self._slot(leaving)), starts))
        if steps > config.window:
            starts = self.lengths
            if config.slots or not whole:
                begin = self.lengths - config.first
                starts = xp.where(ends > begin, begin, -steps)
            parts.append((lambda new, old: new, starts))

        def packed(vectors, new, old):
            for source, starts in parts:
                vectors = lib.append(vectors, source(new, old), starts, page_table=table)
            return vectors

        centered = replace(self.keys, center=self._center(key, counts))
        keys = packed(centered, key, self.dense_keys)
        values = packed(self.values, value, self.dense_values)
        lengths = self.lengths + counts
        if blocked is not None:
            lengths, ends = (xp.where(blocked, xp.full_like(x, LOST), x) for x in (lengths, ends))
        dense = {}
        if config.slots:
            dense = {
                "dense_keys": self._shifted(key, counts, self.dense_keys),
                "dense_values": self._shifted(value, counts, self.dense_values),
            }
        return self._with(keys=keys, values=values, lengths=lengths, packed_lengths=ends, **dense)

    def _center(self, key, counts):
        """The center of keys: for a sequence that was empty, the mean of what is appended."""
        center, xp, steps = self.keys.center, self.library.xp, key.shape[2]
        if not self.config.calibrate or steps < 2:
            return center
        given = (self.library.arange(steps, counts) < counts[:, None])[:, None, :, None]
        mean = self.library.key_center(xp.where(given, key, xp.zeros_like(key)))
        mean = mean * self.library.cast(steps / xp.clip(counts, 1, None), mean)[:, None, None, None]
        if self.page_table is None:
            return xp.where((self.lengths == 0)[:, None, None, None], mean, center)
        mean = mean.sum(0)[None] * float(np.float32(1 / self.batch))
        return xp.where((self.lengths == 0).all(), mean, center)

    def _slot(self, positions):
        """Where in the dense buffer a position after the first ones lies, while it is recent."""
        return self.config.first + (positions - self.config.first) % max(1, self.config.ring)

    def slot_positions(self, lengths):
        """[B, slots] the position that each slot holds or is to hold; -1 for none."""
        first, ring = self.config.first, max(1, self.config.ring)
        slots, last = self.library.arange(self.config.slots, lengths), lengths[:, None] - 1
        recent = last - (last - slots) % ring
        return self.library.xp.where(slots < first, slots, self.library.xp.where(recent < first, -1, recent))

    def is_dense(self, positions):
        """[B, ...] which of `positions` are read from their slots."""
        first = self.config.first
        recent = positions >= first + self.packed_lengths[:, None]
        held = (positions >= 0) & (positions < self.lengths[:, None])
        return held & ((positions < first) | recent)

    def _shifted(self, new, counts, old):
        """The dense buffer once the first `counts` of `new` [B, K, T, D] are appended."""
        xp, steps, lengths = self.library.xp, new.shape[2], self.lengths[:, None]
        positions = self.slot_positions(self.lengths + counts)
        fresh = (positions >= lengths) & (positions < lengths + counts[:, None])
        source = xp.clip(positions - lengths, 0, steps - 1)
        return xp.where(fresh[:, None, :, None], self.library.take(new, source), old)


def from_dlpack(packed: PackedVectors | KVCache) -> PackedVectors | KVCache:
    """The same vectors or cache as NumPy arrays over the same memory, from any library with DLPack on the CPU."""
    return packed.map(np.from_dlpack) if isinstance(packed, PackedVectors) else KVCache.of(packed, np.from_dlpack)


def _keep(old, new):
    """Into the array that is there, where it fits."""
    if new is old or new is None or old is None or old.shape != new.shape:
        return new
    old[...] = new
    return old


def _take(x, index):
    return np.take_along_axis(x, index[:, None, :, None], axis=2)


KVCache.library = CacheLibrary(
    xp=np,
    zeros=lambda shape, dtype, device=None: np.zeros(shape, dtype),
    arange=lambda count, like: np.arange(count, dtype=np.int32),
    wide=lambda x: x.astype(np.float64),
    cast=lambda x, like: x.astype(like.dtype),
    matmul=np.matmul,
    take=_take,
    keep=_keep,
    check_devices=lambda **arrays: None,
    on_host=lambda x: x,
    append=reference.append,
    attention=reference_attention.attention,
    merge_attention=reference_attention.merge_attention,
    decompress=reference.decompress,
    key_center=reference.key_center,
)
