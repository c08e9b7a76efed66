"""Queries, keys and values of a Hugging Face model, for `tqcore.verify`."""

from functools import partial
from typing import Any

import numpy as np
import torch
import transformers  # pyright: ignore[reportMissingImports]
from numpy.typing import NDArray
from transformers.masking_utils import (  # pyright: ignore[reportMissingImports]
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # pyright: ignore[reportMissingImports]

from tqcore.verify import name_arrays

NAME = "tqcore_capture"
NOT_PLAIN = ("softcap", "s_aux", "position_bias")  # arguments of attention functions that change a softmax of scores


def capture(model: Any, input_ids: torch.Tensor) -> dict[str, NDArray]:
    """Runs a causal model and returns what its attention reads, after rotary embedding, as float32.

    An attention function registered with transformers keeps its arguments and calls "sdpa". Queries are scaled where
    the model's scale is not 1/√D. With plain rotary embedding, the base of its frequencies is kept too, and the biases
    of key projections where no norm follows them.

    Args:
      model: of transformers, on any device.
      input_ids: [B, T] integers, no padding.

    Returns:
      Arrays by name, as `tqcore.verify` describes them.

    Raises:
      ValueError: the model calls no attention function of transformers, or its attention is not a causal softmax of
        scores over all T tokens: one with a cap, sinks, position biases or a shorter window.

    Source: https://huggingface.co/docs/transformers/attention_interface.
    """
    theta, layers = _rotary_theta(model.config), {}
    transformers.AttentionInterface.register(NAME, partial(_record, layers, theta))
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(NAME)
        with torch.inference_mode():
            model(input_ids=input_ids.to(model.device), use_cache=False)
    finally:
        model.set_attn_implementation(before)
    if not layers:
        name = type(model).__name__
        raise ValueError(f"`model` must call attention functions of transformers, got {name}, which calls none.")
    return name_arrays([layers[index] for index in sorted(layers)], theta)


def capture_pretrained(name: str, text: str, tokens: int) -> dict[str, NDArray]:
    """`capture` of a model by its id or folder as it reads the first `tokens` tokens of `text`.

    Raises:
      ValueError: the text is of less than two tokens, or as of `capture`.
      OSError: there is no such model or folder.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :tokens]
    if ids.shape[1] < 2:
        raise ValueError(f"`text` must be of at least 2 tokens, got {ids.shape[1]}.")
    return capture(transformers.AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval(), ids)


def _record(
    layers: dict[int, dict[str, NDArray]],
    theta: float | None,
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function: [B, H, T, D], [B, K, S, D] twice -> [B, T, H, D]."""
    window = kwargs.get("sliding_window")
    odd = [name for name in NOT_PLAIN if kwargs.get(name) is not None]
    odd += ["is_causal=False"] * (not getattr(module, "is_causal", True))
    odd += [f"sliding_window={window}"] * (window is not None and window < key.shape[2])
    if odd or module.layer_idx in layers:
        came = ", ".join(odd) or f"layer {module.layer_idx} twice"
        raise ValueError(f"attention must be a causal softmax of scores over all tokens to be captured, got {came}.")
    head_dim = query.shape[-1]
    scale = 1.0 if scaling is None else scaling * head_dim**0.5
    layer = {"query": _numpy(query) * np.float32(scale), "key": _numpy(key), "value": _numpy(value)}
    bias = getattr(getattr(module, "k_proj", None), "bias", None)
    if theta is not None and bias is not None and not hasattr(module, "k_norm"):
        layer["key_bias"] = _numpy(bias).reshape(-1, head_dim)
    layers[module.layer_idx] = layer
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)


def _rotary_theta(config: Any) -> float | None:
    """The base of the frequencies, where all of a head turns by them as they are."""
    rotary = getattr(config, "rope_parameters", None) or {}
    plain = rotary.get("rope_type") == "default" and rotary.get("partial_rotary_factor", 1) == 1
    return float(rotary["rope_theta"]) if plain else None


def _numpy(tensor: torch.Tensor) -> NDArray[np.float32]:
    return tensor.detach().float().cpu().numpy()
