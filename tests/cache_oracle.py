"""A cache that keeps every vector and says of each whether it is packed: what `KVCache` is held against."""

from dataclasses import dataclass

import numpy as np

import tqcore


@dataclass
class Sequence:
    keys: np.ndarray  # [K, n, D], as given
    values: np.ndarray
    packed: int = 0  # how many positions from `first` on are packed
    center: np.ndarray | None = None  # [K, 1, D]


class OracleCache:
    """Sequences one by one; a crop or an append touches no array of another."""

    def __init__(self, batch, kv_heads, keys, values, *, window=0, block=1, first=0, center=None, **_):
        self.quantizers, self.window, self.block, self.first, self.center = (keys, values), window, block, first, center
        nothing = np.zeros((kv_heads, 0, keys.head_dim), np.float32)
        zero = np.zeros((kv_heads, 1, keys.head_dim), np.float32) if center else None
        self.sequences = [Sequence(nothing, nothing, 0, zero) for _ in range(batch)]

    @property
    def lengths(self):
        return np.array([s.keys.shape[1] for s in self.sequences], np.int32)

    def append(self, key, value):
        for s, k, v in zip(self.sequences, key, value, strict=True):
            if self.center and s.keys.shape[1] == 0 and k.shape[1] > 1:
                s.center = tqcore.key_center(k)
            s.keys, s.values = np.concatenate([s.keys, k], 1), np.concatenate([s.values, v], 1)
            while s.keys.shape[1] - self.first - s.packed >= self.window + self.block:
                s.packed += self.block

    def crop(self, lengths):
        for s, length in zip(self.sequences, np.broadcast_to(lengths, len(self.sequences)), strict=True):
            s.keys, s.values = s.keys[:, :length], s.values[:, :length]
            s.packed = min(s.packed, max(0, s.keys.shape[1] - self.first))

    def select(self, indices):
        chosen = [self.sequences[i] for i in indices]
        self.sequences = [Sequence(s.keys, s.values, s.packed, s.center) for s in chosen]

    def dense(self, index):
        """What attention sees of sequence `index`: keys and values [K, n, D]."""
        s = self.sequences[index]
        at = slice(self.first, self.first + s.packed)
        seen = []
        for x, quantizer, center in zip((s.keys, s.values), self.quantizers, (s.center, None), strict=True):
            seen.append(x.copy())
            seen[-1][:, at] = tqcore.decompress(tqcore.compress(x[:, at], quantizer, center=center))
        return seen

    def attend(self, query):
        """Causal attention in float64, [B, H, T, D]."""
        out = np.zeros(query.shape)
        for b, q in enumerate(query.astype(np.float64)):
            keys, values = (np.repeat(x.astype(np.float64), len(q) // len(x), 0) for x in self.dense(b))
            steps, length = q.shape[1], keys.shape[1]
            visible = np.arange(length) <= length - steps + np.arange(steps)[:, None]
            powers = np.where(visible, np.exp(q @ keys.swapaxes(1, 2) * q.shape[-1] ** -0.5), 0)
            total = powers.sum(-1, keepdims=True)
            out[b] = powers @ values / np.where(total == 0, 1, total)
        return out
