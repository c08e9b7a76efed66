"""What packed keys and values would cost a model's attention, measured on tensors captured from it.

A capture is a dict, or a safetensors file, with these arrays for every layer i, as attention sees them, after rotary
embedding:

    layers.{i}.query     [B, H, T, D]  float32, bfloat16 or float16
    layers.{i}.key       [B, K, S, D]  K dividing H, S ≥ T
    layers.{i}.value     [B, K, S, D]
    layers.{i}.key_bias  [K, D]        optional: of the key projection, before rotary embedding
    rotary_theta         [1]           optional: the base of the rotary frequencies

Scores are ⟨query, key⟩ / √D, and query t sees the keys up to S - T + t; for a model of another scale, captures scale
queries. `tqjax.capture` and `tq_torch.capture` make captures; `python -m tqcore verify` reads them.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tqcore import center as center_of
from tqcore import checks
from tqcore.quantizer import Quantizer
from tqcore.reference import attention_scores, compress, decompress, key_center, rotary_center

# What the worst head of a layer may lose, and why these: docs/quality.md, "Limits". Top-1 agreement has no limit: in a
# row of nearly equal probabilities it falls without harm.
LIMITS = {"variation": 0.12, "cosine": 0.97}
CANDIDATES = ((4, 4), (4, 3), (3, 3), (4, 2), (2, 2))  # bits of keys and of values
CENTERS = ("none", "mean", "rotary mean", "rotary bias")  # cheapest first; what they are: `verify`
QUERIES = 128
PARTS = ("query", "key", "value", "key_bias")
THETA = "rotary_theta"


@dataclass(frozen=True)
class Setting:
    """How a layer's keys and values are packed; `norm` and `center` are those of keys, values take the default norm."""

    key_bits: int
    value_bits: int
    norm: str
    center: str

    def __str__(self) -> str:
        center = "" if self.center == "none" else f", {self.center}"
        return f"{self.key_bits}/{self.value_bits} {self.norm}{center}"


@dataclass(frozen=True)
class Layer:
    """A captured layer, in float32."""

    index: int
    query: NDArray[np.float32]
    key: NDArray[np.float32]
    value: NDArray[np.float32]
    key_bias: NDArray[np.float32] | None
    theta: float | None

    @property
    def shape(self) -> dict[str, int]:
        """Sizes by letter."""
        (batch, heads, length, head_dim), (_, kv_heads, positions, _) = self.query.shape, self.key.shape
        return {"B": batch, "H": heads, "K": kv_heads, "T": length, "S": positions, "D": head_dim}


@dataclass(frozen=True)
class Loss:
    """What one setting costs one layer.

    Args:
      setting: the setting.
      nbytes: of codes and norms, per position and key head.
      heads: [H] each: "score_rmse" in natural units; "score_relative", that over the standard deviation of exact scores
        along a row; "variation", half the sum of |p̂ - p| over a row's softmax; "top1", the share of rows whose largest
        probability stays at its key; "cosine" of p̂ v̂ with p v. Means over batch and queries.
    """

    setting: Setting
    nbytes: int
    heads: dict[str, NDArray]

    @property
    def worst(self) -> dict[str, float]:
        """The worst head of each measure."""
        return {name: float(x.min() if name in ("top1", "cosine") else x.max()) for name, x in self.heads.items()}

    @property
    def safe(self) -> bool:
        """Whether the worst head is within LIMITS."""
        worst = self.worst
        return worst["variation"] <= LIMITS["variation"] and worst["cosine"] >= LIMITS["cosine"]


@dataclass(frozen=True)
class Verdict:
    """One layer: the outliers of its keys, [K] each, and what every setting costs it."""

    index: int
    shape: dict[str, int]
    outliers: dict[str, NDArray]
    losses: list[Loss]

    @property
    def recommended(self) -> Loss | None:
        """The cheapest safe setting, or None: leave the layer dense.

        Fewest bytes; of those, no center before the mean; then the least variation. A rotary center adds a dense
        product to every score, so it comes last, whatever its bytes.
        """
        safe = [loss for loss in self.losses if loss.safe]
        return min(safe, key=_price, default=None)

    def at(self, bits: Sequence[int]) -> list[Loss]:
        """The settings of these bits of keys and values."""
        return [loss for loss in self.losses if (loss.setting.key_bits, loss.setting.value_bits) == tuple(bits)]

    def recommended_at(self, bits: Sequence[int]) -> Loss | None:
        """The cheapest safe setting of these bits, or None."""
        return min((loss for loss in self.at(bits) if loss.safe), key=_price, default=None)

    def best_at(self, bits: Sequence[int], centers: Sequence[str] = CENTERS) -> Loss:
        """The setting of these bits that loses least."""
        return min((x for x in self.at(bits) if x.setting.center in centers), key=lambda x: x.worst["variation"])

    def safe_at(self, bits: Sequence[int]) -> bool:
        """Whether some setting of these bits is safe."""
        return any(loss.safe for loss in self.at(bits))


@dataclass(frozen=True)
class Report:
    """All layers, and the bits of keys and values that were asked for."""

    bits: tuple[int, int]
    layers: list[Verdict]

    @property
    def safe(self) -> bool:
        """Whether every layer has a safe setting at the bits asked for."""
        return all(layer.safe_at(self.bits) for layer in self.layers)


def verify(
    tensors: Mapping[str, Any],
    *,
    bits: tuple[int, int] = (4, 4),
    theta: float | None = None,
    queries: int = QUERIES,
    track: Callable[[Sequence[Layer]], Iterable[Layer]] = iter,
) -> Report:
    """Measures every layer of a capture under CANDIDATES and `bits`, each norm of keys and each center.

    Centers are estimated on the first half of the keys, as on a prefill, and used for all of them:

    - "mean" is `key_center` of them;
    - "rotary mean", where theta is known, turns them back by their positions, takes the mean and turns it forth with
      `rotary_center`: what all keys share before rotary embedding, a bias included;
    - "rotary bias", where the layer has a bias too, is `rotary_center(key_bias)`.

    Args:
      tensors: NumPy arrays by name, as in the docstring of this module; bfloat16 as `ml_dtypes` has it.
      bits: of keys and of values, 1 to 4 each, that layers must be safe at.
      theta: base of the rotary frequencies of pairs (i, i + D/2); None means `tensors["rotary_theta"]`.
      queries: most queries of a layer to measure, spread evenly over T and the last among them.
      track: wraps the layers as they are worked through, such as a progress bar.

    Returns:
      Report.

    Raises:
      ValueError: an array is missing, of another name, dtype or shape, or not finite; `bits`, `theta` or `queries` are
        out of their range; codes of `bits` cannot be packed at D; or a bias comes without theta.
    """
    bits = _check_bits(bits)
    if not isinstance(queries, int | np.integer) or queries < 1:
        raise ValueError(f"`queries` must be an integer of at least 1, got {queries!r}.")
    layers = read_layers(tensors, theta)
    for layer in layers:
        for width in bits:
            Quantizer(layer.shape["D"], width)
    return Report(bits, [_verdict(layer, bits, queries) for layer in track(layers)])


def name_arrays(layers: Iterable[Mapping[str, Any]], theta: float | None = None) -> dict[str, NDArray]:
    """A capture from its layers in order, each a mapping from "query", "key", "value" and perhaps "key_bias"."""
    arrays = {f"layers.{i}.{part}": np.asarray(x) for i, layer in enumerate(layers) for part, x in layer.items()}
    return arrays if theta is None else arrays | {THETA: np.array([theta], np.float32)}


def read_layers(tensors: Mapping[str, Any], theta: float | None = None) -> list[Layer]:
    """The layers of a capture in order, checked; arguments and errors as of `verify`."""
    found: dict[int, dict[str, Any]] = {}
    for name, array in tensors.items():
        match = re.fullmatch(rf"layers\.(\d+)\.({'|'.join(PARTS)})", name)
        if match:
            found.setdefault(int(match[1]), {})[match[2]] = array
        elif name != THETA:
            raise ValueError(f"names must be 'layers.INDEX.PART', PART one of {', '.join(PARTS)}, got {name!r}.")
    if not found:
        raise ValueError(f"a capture must hold at least one layer of attention, got the names {sorted(tensors)}.")
    if theta is None and THETA in tensors:
        theta = _as_theta(tensors[THETA])
    return [_layer(index, found[index], theta) for index in sorted(found)]


def outliers(layer: Layer) -> dict[str, NDArray]:
    """What makes keys hard to quantise, [K] each.

    "mean_ratio": ‖mean‖ over the root mean square of ‖k - mean‖; "channel_ratio": the largest root mean square of a
    coordinate over that of all; "first_token": ‖k‖ of the first position over the median; and, where there is a bias,
    "bias_ratio": ‖bias‖ over the root mean square of ‖k - rotated bias‖.
    """
    key = layer.key.astype(np.float64)
    mean = key.mean(2, keepdims=True)
    square, norms = (key**2).mean((0, 2)), np.linalg.norm(key, axis=-1)
    found = {
        "mean_ratio": _ratio(np.linalg.norm(mean[:, :, 0], axis=-1).mean(0), _spread(key - mean)),
        "channel_ratio": np.sqrt(_ratio(square.max(-1), square.mean(-1))),
        "first_token": _ratio(norms[:, :, 0].mean(0), np.median(norms, axis=(0, 2))),
    }
    center = _center(layer, "rotary bias")
    if layer.key_bias is not None and center is not None:
        rest = key - center
        found["bias_ratio"] = _ratio(np.linalg.norm(layer.key_bias.astype(np.float64), axis=-1), _spread(rest))
    return found


def visible(queries: int, positions: int) -> NDArray[np.bool_]:
    """[T, S] causal mask, aligned to the bottom right."""
    return np.tri(queries, positions, positions - queries, dtype=bool)


def softmax(scores: NDArray, mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Over the last axis, where `mask` is set."""
    scores = np.where(mask, scores, -np.inf)
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def _price(loss: Loss) -> tuple:
    center = loss.setting.center
    return center.startswith("rotary"), loss.nbytes, center == "mean", loss.worst["variation"]


def _verdict(layer: Layer, bits: tuple[int, int], queries: int) -> Verdict:
    settings = _settings(layer, bits)
    batch, _, length, head_dim = layer.query.shape
    kv_heads = layer.key.shape[1]
    rows = np.unique(np.linspace(length - 1, 0, min(queries, length)).astype(int))
    heads = [[_measure_head(layer, b, k, rows, settings) for k in range(kv_heads)] for b in range(batch)]
    losses = []
    for index, setting in enumerate(settings):
        names = heads[0][0][index]
        measured = {
            name: np.mean([np.concatenate([head[index][name] for head in row]) for row in heads], axis=0)
            for name in names
        }
        widths = setting.key_bits, setting.value_bits
        nbytes = sum(Quantizer(head_dim, width).packed_dim + 4 for width in widths)
        losses.append(Loss(setting, nbytes, measured))
    return Verdict(layer.index, layer.shape, outliers(layer), losses)


def _settings(layer: Layer, bits: tuple[int, int]) -> list[Setting]:
    """Those of CANDIDATES that can be packed at D, and `bits`."""
    pairs = [pair for pair in dict.fromkeys((*CANDIDATES, bits)) if _packable(layer.shape["D"], pair)]
    known = [True, True, layer.theta is not None, layer.key_bias is not None]
    centers = [center for center, is_known in zip(CENTERS, known, strict=True) if is_known]
    return [Setting(*pair, norm, center) for pair in pairs for norm in checks.NORMS for center in centers]


def _packable(head_dim: int, pair: tuple[int, int]) -> bool:
    try:
        return all(Quantizer(head_dim, width) is not None for width in pair)
    except ValueError:
        return False


def _measure_head(layer: Layer, b: int, k: int, rows: NDArray, settings: Sequence[Setting]) -> list[dict[str, NDArray]]:
    """The measures of `Loss` by setting, [G] each, of the query heads that read key head k."""
    groups = layer.query.shape[1] // layer.key.shape[1]
    query = layer.query[b : b + 1, k * groups : (k + 1) * groups, rows]
    key, value = layer.key[b : b + 1, k : k + 1], layer.value[b : b + 1, k : k + 1]
    mask = visible(layer.query.shape[2], key.shape[2])[rows]
    exact = _scores(query, key)
    probabilities = softmax(exact, mask)
    output = probabilities @ value.astype(np.float64)

    by_key: dict[tuple, tuple[NDArray, dict[str, NDArray]]] = {}
    values: dict[int, NDArray] = {}
    results = []
    for setting in settings:
        quantizer = Quantizer(key.shape[-1], setting.key_bits, norm=setting.norm)
        name = quantizer, setting.center
        if name not in by_key:
            center = _center(layer, setting.center)
            packed = _packed_scores(query, key, quantizer, None if center is None else _head(center, b, k))
            by_key[name] = softmax(packed, mask), _compare(exact, packed, probabilities, mask)
        if setting.value_bits not in values:
            restored = decompress(compress(value, Quantizer(key.shape[-1], setting.value_bits)))
            values[setting.value_bits] = restored.astype(np.float64)
        p, measured = by_key[name]
        results.append(measured | {"cosine": _cosine(output, p @ values[setting.value_bits]).mean(-1)[0]})
    return results


def _center(layer: Layer, name: str) -> NDArray[np.float32] | None:
    """[B, K, 1, D], [B or 1, K, S, D] or None."""
    positions = np.arange(layer.key.shape[2])
    prefill = layer.key[:, :, : -(-len(positions) // 2)]
    if name == "mean":
        return key_center(prefill)
    if name == "rotary mean" and layer.theta is not None:
        angles = positions[: prefill.shape[2], None, None] * center_of.frequencies(prefill.shape[3], layer.theta)
        bias = key_center(center_of.rotary(prefill, -angles, False, np)[..., 0, :].astype(np.float32))
        return rotary_center(bias[..., 0, :], positions, theta=layer.theta)
    if name == "rotary bias" and layer.key_bias is not None and layer.theta is not None:
        return rotary_center(layer.key_bias[None], positions, theta=layer.theta)
    return None


def _head(center: NDArray, b: int, k: int) -> NDArray:
    """[B or 1, K, 1 or S, D] -> [1, 1, 1 or S, D]."""
    b = b if len(center) > 1 else 0
    return center[b : b + 1, k : k + 1]


def _scores(query: NDArray, key: NDArray) -> NDArray[np.float64]:
    """⟨query, key⟩ / √D for [1, G, T, D] and [1, 1, S, D]."""
    return query.astype(np.float64) @ key.astype(np.float64).swapaxes(-1, -2) * query.shape[-1] ** -0.5


def _packed_scores(query: NDArray, key: NDArray, quantizer: Quantizer, center: NDArray | None) -> NDArray[np.float64]:
    """`attention_scores` of packed keys, and what it leaves out of a center that all positions share, in float64."""
    packed = compress(key, quantizer, center=center)
    scores = attention_scores(query, packed).astype(np.float64)
    if center is not None and not center_of.is_added(packed, None):
        scores = scores + _scores(query, center)
    return scores


def _compare(exact: NDArray, packed: NDArray, probabilities: NDArray, mask: NDArray) -> dict[str, NDArray]:
    """Scores [1, G, T, S] against scores, [G] each."""
    count = mask.sum(-1)
    error = np.where(mask, packed - exact, 0)
    mean = np.where(mask, exact, 0).sum(-1) / count
    spread = np.where(mask, exact - mean[..., None], 0)
    rmse, deviation = (np.sqrt((x**2).sum((-1, -2)) / count.sum()) for x in (error, spread))
    found = softmax(packed, mask)
    return {
        "score_rmse": rmse[0],
        "score_relative": _ratio(rmse, deviation)[0],
        "variation": np.abs(found - probabilities).sum(-1).mean(-1)[0] / 2,
        "top1": (found.argmax(-1) == probabilities.argmax(-1)).mean(-1)[0],
    }


def _cosine(a: NDArray, b: NDArray) -> NDArray:
    """Over the last axis; 1 for two zero vectors, 0 for one."""
    norms = np.linalg.norm(a, axis=-1), np.linalg.norm(b, axis=-1)
    product = norms[0] * norms[1]
    return np.where(product > 0, (a * b).sum(-1) / np.where(product > 0, product, 1), norms[0] == norms[1])


def _ratio(a: NDArray, b: NDArray) -> NDArray:
    """a / b, and 0 where both are 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((a == 0) & (b == 0), 0.0, a / b)


def _spread(x: NDArray) -> NDArray:
    """[B, K, S, D] -> [K]: the root mean square of ‖x‖."""
    return np.sqrt((x**2).sum(-1).mean((0, 2)))


def _layer(index: int, parts: Mapping[str, Any], theta: float | None) -> Layer:
    name = f"layers.{index}."
    missing = [name + part for part in PARTS[:3] if part not in parts]
    if missing:
        raise ValueError(f"every layer must have a query, a key and a value, got none named {', '.join(missing)}.")
    axes: dict[str, str] = dict(zip(PARTS, ("[B, H, T, D]", "[B, K, S, D]", "[B, K, S, D]", "[K, D]"), strict=True))
    for part, array in parts.items():
        checks.check_array(name + part, array, axes[part], checks.FLOATS)
        if 0 in array.shape:
            raise ValueError(f"`{name}{part}` must not be empty, got shape {list(array.shape)}.")
    arrays = {part: np.asarray(array).astype(np.float32) for part, array in parts.items()}
    for part, array in arrays.items():
        bad = array.size - np.count_nonzero(np.isfinite(array))
        if bad:
            raise ValueError(f"`{name}{part}` must be finite, got {bad} of {array.size} values NaN or infinite.")
    layer = Layer(index, arrays["query"], arrays["key"], arrays["value"], arrays.get("key_bias"), theta)
    _check_shapes(name, layer)
    return layer


def _check_shapes(name: str, layer: Layer) -> None:
    query, key, value = (list(x.shape) for x in (layer.query, layer.key, layer.value))
    checks.check_head_dim(query[-1])
    if key != value or (query[0], query[3]) != (key[0], key[3]) or query[1] % key[1] or query[2] > key[2]:
        raise ValueError(
            f"`{name}query` [B, H, T, D], `{name}key` and `{name}value` [B, K, S, D] must share B, K, S and D, with "
            f"H a multiple of K and T at most S, got shapes {query}, {key} and {value}."
        )
    if layer.key_bias is not None:
        if list(layer.key_bias.shape) != [key[1], key[3]]:
            came = list(layer.key_bias.shape)
            raise ValueError(f"`{name}key_bias` must have the shape {[key[1], key[3]]} of a key, got {came}.")
        if layer.theta is None:
            raise ValueError(f"`theta` must be given where there is a bias, got None with `{name}key_bias`.")
        checks.check_rotary(layer.key_bias, np.arange(1), layer.theta)


def _as_theta(theta: Any) -> float:
    if np.size(theta) != 1 or checks.dtype_name(getattr(theta, "dtype", None)) not in checks.FLOATS:
        raise ValueError(f"`{THETA}` must be one floating-point number, got {theta!r}.")
    return float(np.asarray(theta).reshape(()).astype(np.float64))


def _check_bits(bits: Any) -> tuple[int, int]:
    if not isinstance(bits, Sequence) or len(bits) != 2:
        raise ValueError(f"`bits` must be a pair, of keys and of values, got {bits!r}.")
    for width in bits:
        checks.check_bits(width)
    return int(bits[0]), int(bits[1])
