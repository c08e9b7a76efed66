"""The gate: every timed output against the oracle, a float64 product, and the other implementations."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from inputs import Case, InputSets

import tqcore
from tqcore.packing import unpack

BITS_OF_THE_ORACLE = 0.0  # as tolerances
EVERY_SCORE_WRITTEN = float("inf")
CHECKED_KEYS = 2**16
CHECKED_QUERIES = 8


class Red(Exception):
    """A timed implementation gave a wrong score."""


@dataclass(frozen=True)
class Reference:
    """Scores [G, t, s] of one key head of one input set: from the oracle, and in float64 from decompressed keys."""

    batch: int
    heads: slice
    t: torch.Tensor
    s: torch.Tensor
    oracle: np.ndarray
    exact: np.ndarray

    def part(self, scores: torch.Tensor) -> np.ndarray:
        """Of scores [B, H, T, S], those that this holds."""
        head = scores[self.batch, self.heads]
        if len(self.t) < head.shape[1] or len(self.s) < head.shape[2]:
            head = head[:, self.t][:, :, self.s]
        return head.float().cpu().numpy()


def make_references(case: Case, sets: InputSets, centroids: np.ndarray) -> list[Reference]:
    """One key head of each set, from the first head of the first set to the last head of the last."""
    t, s = _spread(case.T, CHECKED_QUERIES), _spread(case.S, CHECKED_KEYS)
    on_device = [torch.from_numpy(x).to(sets.table.device) for x in (t, s)]
    references = []
    for i, (q, codes, norms) in enumerate(sets.packed):
        batch, kv_head = divmod(i * (case.B * case.K - 1) // (len(sets.packed) - 1), case.K)
        heads = slice(kv_head * case.G, (kv_head + 1) * case.G)
        q, codes, norms = (x.cpu().numpy() for x in (q[batch, heads], codes[batch, kv_head], norms[batch, kv_head]))
        q, codes, norms = q[:, t], codes[s], norms[s]
        packed = q[None], codes[None, None], norms[None, None], centroids, sets.scale
        oracle = tqcore.fused_qk_scores(*packed, n_q_heads=case.G, n_kv_heads=1)[0]
        keys = centroids.astype(np.float64)[unpack(codes, np, case.bits)] * norms[:, None]
        exact = sets.scale * (q.astype(np.float64) @ keys.T)
        references.append(Reference(batch, heads, *on_device, oracle, exact))
    return references


def _spread(length: int, limit: int) -> np.ndarray:
    """At most `limit` of the positions 0 to length - 1, evenly spaced, the first and the last among them."""
    return np.linspace(0, length - 1, min(length, limit)).round().astype(np.int64)


def check(
    tolerance: float,
    outputs: Iterable[tuple[int, torch.Tensor]],
    references: list[Reference],
    agreed: dict[int, torch.Tensor],
) -> float:
    """Returns the largest relative error against float64, or raises Red.

    Args:
      tolerance: largest relative error, or BITS_OF_THE_ORACLE, or EVERY_SCORE_WRITTEN.
      outputs: (input set, scores); every input set once or more.
      references: of each input set.
      agreed: of each input set, the scores of the first implementation with the bits of the oracle; the others must
        have these bits everywhere. What is missing is filled in.
    """
    errors, kept = {}, {}
    for i, out in outputs:
        unwritten = int((~torch.isfinite(out)).sum())
        if unwritten:
            raise Red(f"set {i}: {unwritten} of {out.numel()} scores are not written, or not finite.")
        reference = references[i]
        scores = reference.part(out)
        error = float(np.linalg.norm(scores - reference.exact) / np.linalg.norm(reference.exact))
        errors[i] = max(error, errors.get(i, 0.0))
        if tolerance != BITS_OF_THE_ORACLE:
            if not error <= tolerance:
                raise Red(f"set {i}: relative error {error:.2e}, above {tolerance:.0e}.")
            continue
        wrong = np.count_nonzero(scores.view(np.int32) != reference.oracle.view(np.int32))
        if wrong:
            raise Red(f"set {i}, batch {reference.batch}: {wrong} of {scores.size} scores differ from the oracle.")
        expected = agreed.get(i, kept.setdefault(i, out))
        if not torch.equal(out.view(torch.int32), expected.view(torch.int32)):
            wrong = int((out.view(torch.int32) != expected.view(torch.int32)).sum())
            raise Red(f"set {i}: {wrong} of {out.numel()} scores differ between implementations, or between calls.")
    missing = [i for i in range(len(references)) if i not in errors]
    if missing:
        raise Red(f"sets {missing}: no scores.")
    agreed.update((i, out) for i, out in kept.items() if i not in agreed)
    return max(errors.values())
