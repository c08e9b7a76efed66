"""Generates with a Hugging Face model over a compressed cache: `tq_torch.transformers` on the weights of tiny_lm.py.

Any decoder of transformers that calls its attention functions takes the three lines of `generate`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from transformers import Qwen2Config, Qwen2ForCausalLM  # a Llama with biases on queries, keys and values, as tiny_lm is

from tq_torch.transformers import TurboQuantCache

WEIGHTS = Path(__file__).with_name("tiny_lm.safetensors")
LAYER = {
    "attention_norm": "input_layernorm", "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj", "attention.out": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj",
}  # fmt: skip


def load() -> Qwen2ForCausalLM:
    """The tiny model as one of transformers."""
    with safe_open(WEIGHTS, "pt") as file:
        shape = json.loads(file.metadata()["config"])
        arrays = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    config = Qwen2Config(
        vocab_size=shape["vocab"], hidden_size=shape["d_model"], intermediate_size=shape["d_ff"],
        num_hidden_layers=shape["n_layers"], num_attention_heads=shape["n_q_heads"],
        num_key_value_heads=shape["n_kv_heads"], head_dim=shape["head_dim"], max_position_embeddings=shape["context"],
        rope_parameters={"rope_type": "default", "rope_theta": shape["rope_theta"]}, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model, weights = Qwen2ForCausalLM(config).eval(), {"model.embed_tokens.weight": arrays.pop("embedding.embedding")}
    weights |= {
        "model.norm.weight": arrays.pop("final_norm.scale"),
        "lm_head.weight": weights["model.embed_tokens.weight"],
    }
    for name, array in arrays.items():
        _, index, *middle, last = name.split(".")
        kind = "bias" if last == "bias" else "weight"
        weights[f"model.layers.{index}.{LAYER['.'.join(middle)]}.{kind}"] = array.T if last == "kernel" else array
    model.load_state_dict(weights)
    return model


def generate(model: Qwen2ForCausalLM, prompt: np.ndarray, count: int, **cache_options) -> np.ndarray:
    """The `count` likeliest next bytes of prompts [B, T]; `cache_options` are those of `TurboQuantCache`."""
    model.set_attn_implementation("turboquant")
    ids, cache = torch.tensor(prompt.astype(np.int64)), TurboQuantCache(model.config, **cache_options)
    found = model.generate(ids, past_key_values=cache, max_new_tokens=count, do_sample=False)
    return found[:, ids.shape[1] :].numpy()


if __name__ == "__main__":
    text = np.frombuffer(" ".join(sys.argv[1:] or ["def read_file(path):\n    "]).encode(), np.uint8)[None]
    print(bytes(text[0]).decode() + bytes(generate(load(), text, 200, window=32)[0].tolist()).decode())
