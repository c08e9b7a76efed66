"""Hugging Face models over packed caches: against dense attention over the same vectors, and against the plain model.

`make test-hf-oldest` runs this file with the oldest transformers.
"""

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from backends import CUDA, DEVICE, assert_close, attention_tolerance, to_numpy

transformers = pytest.importorskip("transformers")
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

import tq_torch.transformers
from tq_torch.transformers import NAME, TurboQuantCache
from tqcore import Quantizer

SHAPE = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
MODELS = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),  # biases
    "gemma2": (  # a soft cap, every other layer a window
        transformers.Gemma2Config, transformers.Gemma2ForCausalLM,
        {"sliding_window": 8, "query_pre_attn_scalar": 32, "attn_logit_softcapping": 3.0},
    ),
    "gpt_oss": (  # sinks, every other layer a window
        transformers.GptOssConfig, transformers.GptOssForCausalLM,
        {"sliding_window": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
}  # fmt: skip
LIMIT = 0.05  # of logits through four layers, where the last bits of one put a coordinate of the next on another level
TOKENS = 16


def reference(query, key, value, mask, scaling, softcap=None, s_aux=None, **_):
    """Dense attention in float64, query [B, H, T, D], keys [B, K, S, D], mask [B, T, S] -> [B, T, H, D]."""
    key, value = (x.double().repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    logits = query.double() @ key.mT * scaling
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    powers = torch.where(mask[:, None], logits.exp(), 0)
    total = powers.sum(-1, keepdim=True) + (0 if s_aux is None else s_aux.double().exp()[:, None, None])
    return (powers @ value / torch.where(total == 0, 1, total)).transpose(1, 2)


def checked(module, query, key, value, attention_mask, **options):
    """The attention function, held against `reference` over what the cache holds, sequences one after the other."""
    out, weights = tq_torch.transformers.attention(module, query, key, value, attention_mask, **options)
    if isinstance(key, tq_torch.transformers.Handle):
        assert options.get("sliding_window") is None
        cache = key.layer.cache
        at = cache.lengths[:, None] - query.shape[2] + torch.arange(query.shape[2], device=query.device)
        mask = torch.arange(cache.capacity, device=query.device) <= at[..., None]
        expected = reference(query, *cache.dense(), mask, **options)
        assert_close(to_numpy(out), to_numpy(expected), 4 * attention_tolerance("float32", 32))  # logits of up to 64
        checked.calls += 1
    return out, weights


CHECKED = "turboquant_checked"
transformers.AttentionInterface.register(CHECKED, checked)
AttentionMaskInterface.register(CHECKED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@pytest.fixture(autouse=True)
def no_calls():
    checked.calls = 0


@pytest.fixture(params=MODELS)
def model(request):
    return make(request.param)


def make(name, seed=0, **changes):
    config, kind, more = MODELS[name]
    torch.manual_seed(seed)
    made = kind(config(**(SHAPE | more | changes))).eval().to(DEVICE)
    for parameter_name, parameter in made.named_parameters():
        if parameter_name.endswith(("bias", "sinks")):  # zeros as they are drawn
            torch.nn.init.normal_(parameter, std=0.5)
    return made


def prompts(batch=2, length=20):
    return torch.randint(2, 96, (batch, length), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def logits(model, ids, cache, implementation, mask=None, steps=4):
    """Of a prefill and `steps` decode steps."""
    model.set_attn_implementation(implementation)
    found, ends = [], [ids.shape[1] - steps, *range(ids.shape[1] - steps + 1, ids.shape[1] + 1)]
    with torch.no_grad():
        for begin, end in zip([0, *ends], ends, strict=False):
            given = {} if mask is None else {"attention_mask": mask[:, :end]}
            if mask is not None:
                given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, begin:end]
            found.append(model(ids[:, begin:end], past_key_values=cache, use_cache=True, **given).logits)
    return to_numpy(torch.cat(found, 1).float())


def generate(model, implementation, cache, ids, **options):
    model.set_attn_implementation(implementation)
    torch.manual_seed(2)
    with torch.no_grad():
        return model.generate(ids, past_key_values=cache, max_new_tokens=TOKENS, **options)


@pytest.mark.parametrize("options", [{}, {"window": 6, "first": 2, "block": 2}, {"dense_layers": (0, -1)}])
def test_equals_dense_attention_over_the_cache(model, options):
    ids = prompts()
    ours = logits(model, ids, TurboQuantCache(model.config, **options), CHECKED)
    assert checked.calls >= 5
    dense = logits(model, ids, TurboQuantCache(model.config, dense_returning=True, **options), "eager")
    plain = logits(model, ids, transformers.DynamicCache(config=model.config), "eager")
    assert_close(ours, dense, LIMIT)
    with pytest.raises(AssertionError):
        assert_close(ours, plain, LIMIT)


def test_dense_window_of_everything_is_the_plain_model(model):
    ids = prompts()
    cache = TurboQuantCache(model.config, window=64)
    assert_close(
        logits(model, ids, cache, NAME),
        logits(model, ids, transformers.DynamicCache(config=model.config), "eager"),
        1e-5,
    )


def test_left_padding(model):
    """A padded batch is its sequences one by one, and padding is not stored."""
    ids, mask = prompts(), torch.ones(2, 20, dtype=torch.int64, device=DEVICE)
    mask[1, :7] = 0
    for options in ({}, {"window": 5, "first": 2}):
        cache = TurboQuantCache(model.config, **options)
        together = logits(model, ids, cache, NAME, mask)
        assert max(layer.cache.lengths.tolist() for layer in cache.layers if hasattr(layer, "cache")) == [20, 13]
        for row, begin in ((0, 0), (1, 7)):
            alone = logits(model, ids[row : row + 1, begin:], TurboQuantCache(model.config, **options), NAME)
            assert_close(together[row : row + 1, begin:], alone, LIMIT)


def test_other_masks_are_refused(model):
    ids, mask = prompts(), torch.ones(2, 20, dtype=torch.int64, device=DEVICE)
    mask[0, 5:9] = 0
    cache = TurboQuantCache(model.config, dense_layers=range(3))
    with pytest.raises(NotImplementedError, match="padding on the left"):
        logits(model, ids, cache, NAME, mask)
    assert cache.layers[3].get_seq_length() == 0 and not cache.layers[3].cache.lengths.any()


SCENARIOS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 8},
    "beams": {"do_sample": False, "num_beams": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_generates(model, scenario):
    """The tokens of the plain model where all is dense; where little is, attention over what the cache holds."""
    ids = prompts()
    options = SCENARIOS[scenario] | {"attention_mask": torch.ones_like(ids)}
    plain = generate(model, "eager", transformers.DynamicCache(config=model.config), ids, **options)
    ours = generate(model, NAME, TurboQuantCache(model.config, window=64), ids, **options)
    assert torch.equal(plain, ours)
    cache = TurboQuantCache(model.config, window=4)
    generate(model, CHECKED, cache, ids, **options)
    assert checked.calls >= 2 * TOKENS
    assert cache.get_seq_length() == 20 + TOKENS - 1


def test_generates_from_padded_batches(model):
    ids, mask = prompts(), torch.ones(2, 20, dtype=torch.int64, device=DEVICE)
    mask[0, :9] = 0
    ids = torch.where(mask == 1, ids, 0)
    for options in ({"window": 64}, {"window": 4}):
        both = generate(
            model, NAME, TurboQuantCache(model.config, **options), ids, attention_mask=mask, do_sample=False
        )
        alone = generate(model, NAME, TurboQuantCache(model.config, **options), ids[:1, 9:], do_sample=False)
        assert torch.equal(both[:1, 9:], alone)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_assisted_decoding(name):
    """Candidates are cropped away again: the tokens of greedy search, in the plain model and over a dense window."""
    model, assistant = make(name), make(name, num_hidden_layers=2)
    assistant.load_state_dict(model.state_dict(), strict=False)
    assistant.generation_config.num_assistant_tokens = 4
    ids = prompts(1)
    greedy = generate(model, "eager", transformers.DynamicCache(config=model.config), ids, do_sample=False)
    crops = []
    for options in ({"window": 64}, {"window": 6}):
        cache = TurboQuantCache(model.config, **options)
        crop = cache.crop
        cache.crop = lambda tokens, crop=crop: (crops.append(tokens), crop(tokens))
        found = generate(model, NAME, cache, ids, do_sample=False, assistant_model=assistant)
        assert torch.equal(found, greedy) or options["window"] == 6
        assert cache.layers[0].cache.lengths.tolist() == [cache.get_seq_length()] and cache.get_seq_length() <= 44
    assert crops


def test_static_cache_and_compiled_decoding():
    """One graph for all decode steps, with the tokens of the cache that grows."""
    model, ids = make("llama"), prompts()
    grown = TurboQuantCache(model.config, window=4)
    expected = logits(model, ids, grown, NAME)
    cache = TurboQuantCache(model.config, window=4, max_length=64)
    model.set_attn_implementation(NAME)
    with torch.no_grad():
        assert_close(to_numpy(model(ids[:, :16], past_key_values=cache).logits), expected[:, :16], LIMIT)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, fullgraph=True, backend=counter)
    addresses = [x.keys.codes.data_ptr() for x in (layer.cache for layer in cache.layers)]
    for step in range(16, 20):
        with torch.no_grad():
            position = torch.tensor([[step]] * 2, device=DEVICE)
            found = compiled(ids[:, step : step + 1], past_key_values=cache, position_ids=position).logits
        assert_close(to_numpy(found), expected[:, step : step + 1], LIMIT)
    assert counter.frame_count == 1
    assert addresses == [x.keys.codes.data_ptr() for x in (layer.cache for layer in cache.layers)]


def test_memory_grows_with_the_sequence():
    model = make("llama")
    cache = TurboQuantCache(model.config, keys=4, values=Quantizer(32, 2))
    logits(model, prompts(1, 200), cache, NAME, steps=1)
    capacity = cache.layers[0].cache.capacity
    assert 200 <= capacity < 200 * 9 / 8 + 128
    assert cache.nbytes == 4 * (2 * capacity * (16 + 8 + 4 + 4) + 2 * 4)
    cache.crop(-150)
    assert cache.get_seq_length() == 50
    cache.reset()
    assert cache.get_seq_length() == 0
    logits(model, prompts(1, 20), cache, NAME, steps=1)
    assert cache.get_seq_length() == 20


def test_batches_are_repeated_and_selected():
    model, ids = make("llama"), prompts()
    cache = TurboQuantCache(model.config, window=4)
    logits(model, ids, cache, NAME, steps=1)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    with torch.no_grad():
        after = model(ids.flip(0)[:, :1], past_key_values=cache).logits
        straight = TurboQuantCache(model.config, window=4)
        logits(model, ids.flip(0), straight, NAME, steps=1)
        expected = model(ids.flip(0)[:, :1], past_key_values=straight).logits
    assert_close(to_numpy(after), to_numpy(expected), 1e-5)


def test_files(tmp_path):
    """A cache goes on where it was saved; one of another model is refused."""
    model, ids = make("llama"), prompts()
    cache = TurboQuantCache(model.config, window=4)
    with pytest.raises(ValueError, match="have seen positions to be saved, got none in layer.0"):
        cache.save(tmp_path / "cache")
    logits(model, ids, cache, NAME, steps=1)
    cache.save(tmp_path / "cache")
    loaded = TurboQuantCache(model.config).load(tmp_path / "cache", DEVICE)
    assert loaded.get_seq_length() == 20 and loaded.nbytes == cache.nbytes
    with torch.no_grad():
        after, expected = (model(ids[:, :1], past_key_values=held).logits for held in (loaded, cache))
    assert torch.equal(after, expected)
    with pytest.raises(ValueError, match="must hold the caches"):
        TurboQuantCache(make("llama", num_hidden_layers=2).config).load(tmp_path / "cache")


def test_refused():
    config = make("llama").config
    with pytest.raises(ValueError, match="`dense_layers` must be indices of 4 layers, got 4"):
        TurboQuantCache(config, dense_layers=[4])
    other = make("llama", num_key_value_heads=4)
    cache = TurboQuantCache(config)
    logits(make("llama"), prompts(), cache, NAME)
    before = cache.layers[0].cache.map(torch.clone)
    assert cache.get_seq_length() == 20
    with pytest.raises(ValueError, match="with the cache's B, K and D"):
        logits(other, prompts(), cache, NAME)
    assert np.array_equal(to_numpy(before.keys.codes), to_numpy(cache.layers[0].cache.keys.codes))
    assert cache.get_seq_length() == 20
    if not CUDA:
        with pytest.raises(ValueError, match="must have room"):
            logits(make("llama"), prompts(), TurboQuantCache(config, max_length=10), NAME)
