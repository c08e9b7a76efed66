"""The benchmark's machinery; no time is asserted."""

import json
import subprocess
import sys
from pathlib import Path

import attention_inputs
import baselines
import compare
import gate
import inputs
import jax
import jax.numpy as jnp
import numpy as np
import plot
import plot_attention
import pytest
import timing
import torch

import tqcore

ROOT = Path(__file__).parent.parent
FIELDS = {
    "op", "front", "implementation", "B", "K", "G", "S", "T", "D", "bits", "us", "us_low", "us_high", "bytes",
    "copy_share", "floor_us", "sets", "calls_per_burst", "kernels", "host_ahead", "error", "extra_bytes",
    "vs_bf16", "vs_bf16_f32out", "vs_fp32", "vs_fp32_highest", "vs_original", "vs_floor",
}  # fmt: skip
CASE = inputs.DryCase(B=1, K=2, G=2, S=24, T=2, D=64)
CENTROIDS = tqcore.Quantizer(64, 4).codebook.centroids


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    command = [sys.executable, ROOT / "benchmarks/bench.py", "--dry-run", "--out", out]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return json.loads((out / "dry_run.json").read_text())


def test_dry_run(report):
    rows = {(row["T"], row["front"], row["implementation"]): row for row in report["rows"]}
    assert all(row.keys() == FIELDS for row in rows.values())
    packed = [("torch", "eager"), ("torch", "triton"), ("jax", "xla"), ("jax", "pallas_triton")]
    assert {(1, *name) for name in (*packed, ("torch", "original"), ("torch", "floor"))} <= rows.keys()
    assert (2, "torch", "original_loop") in rows
    for (_, front, name), row in rows.items():
        assert (row["kernels"] is None) == (front == "torch")
        assert (row["error"] is None) == (name == "floor")
    assert rows[1, "jax", "xla"]["extra_bytes"] >= 0
    assert rows[1, "jax", "xla"]["calls_per_burst"] == timing.JAX_BURST_CALLS
    assert all("NotImplementedError" in one["reason"] for one in report["not_run"])


@pytest.mark.parametrize(("name", "rows"), [("several", 6)])
def test_dry_runs_of_others(tmp_path, name, rows):
    command = [sys.executable, ROOT / f"benchmarks/{name}.py", "--dry-run", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert len(found["rows"] + found.get("accuracy", [])) == rows and all(row["us"] > 0 for row in found["rows"])


@pytest.fixture(scope="module")
def checked():
    sets = inputs.InputSets(CASE, CENTROIDS, torch.device("cpu"), seed=0)
    references = gate.make_references(CASE, sets, CENTROIDS)
    heads = {"n_q_heads": CASE.K * CASE.G, "n_kv_heads": CASE.K}
    right = [
        torch.from_numpy(tqcore.fused_qk_scores(*(x.numpy() for x in packed), CENTROIDS, sets.scale, **heads))
        for packed in sets.packed
    ]
    return references, right


def test_gate_is_green(checked):
    references, right = checked
    agreed = {}
    assert gate.check(gate.BITS_OF_THE_ORACLE, enumerate(right), references, agreed) < 1e-3
    assert agreed.keys() == set(range(4))
    assert gate.check(gate.BITS_OF_THE_ORACLE, enumerate(right), references, agreed) < 1e-3


@pytest.mark.parametrize(
    "place, value, tolerance, message",
    [
        ((0, 0, 0, 0), 1e-30, gate.BITS_OF_THE_ORACLE, "differ from the oracle"),
        ((0, 3, 1, 23), 1e-30, gate.BITS_OF_THE_ORACLE, "differ between implementations"),
        ((0, 0, 0, 0), 1e3, 1e-2, "relative error"),
        ((0, 3, 1, 23), float("nan"), gate.EVERY_SCORE_WRITTEN, "not written"),
    ],
)
def test_gate_is_red(checked, place, value, tolerance, message):
    references, right = checked
    wrong = [scores.clone() for scores in right]
    wrong[0][place] = value
    with pytest.raises(gate.Red, match=message):
        gate.check(tolerance, enumerate(wrong), references, dict(enumerate(right)))


def test_gate_wants_every_set(checked):
    references, right = checked
    with pytest.raises(gate.Red, match="no scores"):
        gate.check(gate.BITS_OF_THE_ORACLE, enumerate(right[:3]), references, {})


def test_red_gate_ends_the_run(tmp_path):
    """A planted wrong score: exit status 1, and neither rows nor a file."""
    code = f"""
import runpy, sys
sys.argv = ["bench.py", "--dry-run", "--quick", "--out", {str(tmp_path)!r}]
sys.path[:0] = [{str(ROOT / "benchmarks")!r}, {str(ROOT)!r}]
import os
os.environ |= {{"JAX_PLATFORMS": "cpu", "TRITON_INTERPRET": "1"}}
import tq_torch.ops
right = tq_torch.ops.fused_qk_scores
def wrong(*args, implementation, **options):
    scores = right(*args, implementation="eager", **options).clone()
    scores[..., 0] += 1e-3
    return scores
tq_torch.ops.fused_qk_scores, tq_torch.ops.IMPLEMENTATIONS = wrong, ("eager",)
runpy.run_path({str(ROOT / "benchmarks/bench.py")!r}, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    assert "torch/eager, set 0" in done.stderr and "differ from the oracle" in done.stderr
    assert "µs" not in done.stdout and not list(tmp_path.iterdir())


def test_bursts_are_not_merged():
    """Parameters of their own keep equal calls apart; calls that share theirs become one."""
    cpu = jax.devices("cpu")[0]
    q, keys = jax.device_put((jnp.ones((1, 2, 4, 64)), jnp.ones((1, 2, 128, 64))), cpu)
    bursts = timing.JaxBursts(baselines.jax_scores, [[(q, keys)] * 2])
    assert (len(bursts.groups[0]), bursts.kernels) == (timing.JAX_BURST_CALLS, 1)
    assert [i for i, _ in bursts.outputs()] == [0, 1] * 8
    shared = jax.jit(lambda q, keys: [baselines.jax_scores(q, keys)] * 16).lower(q, keys).compile()
    with pytest.raises(timing.Merged):
        timing.kernels_per_call(shared.as_text(), 16)


@pytest.mark.parametrize("config", baselines.FLOOR_CONFIGS)
@pytest.mark.parametrize("head_dim, length", [(64, 1), (96, 3)])
def test_floor_reads_and_writes_all(config, head_dim, length):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 6, length, head_dim, generator=generator)
    codes = torch.randint(0, 256, (1, 2, 45, head_dim // 2), dtype=torch.uint8, generator=generator)
    norms = torch.rand(1, 2, 45, generator=generator)
    out = baselines.floor_scores(q.to(device), codes.to(device), norms.to(device), config=config).cpu().numpy()
    words = np.bitwise_xor.reduce(codes.numpy().view(np.int32), -1)
    expected = words.astype(np.float32) + norms.numpy()
    np.testing.assert_array_equal(out, np.broadcast_to(np.repeat(expected, 3, 1)[:, :, None], out.shape))


def test_kernels_per_call():
    hlo = """HloModule burst, num_partitions=1

%gemm (p0: bf16[4,8], p1: bf16[8,4]) -> f32[4,4] {
  ROOT %dot.1 = f32[4,4]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}
}

ENTRY %main (a: bf16[4,8], b: bf16[8,4]) -> (f32[4,4], f32[4,4]) {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = bf16[8,4]{1,0} parameter(1)
  %custom-call.1 = (f32[4,4]{1,0}, s8[16]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm"
  %part = f32[4,4]{1,0} get-tuple-element(%custom-call.1), index=0
  %fusion.1 = f32[4,4]{1,0} fusion(%a, %b), kind=kCustom, calls=%gemm
  %loop_fusion = f32[4,4]{1,0} fusion(%a), kind=kLoop, calls=%other
  ROOT %tuple = (f32[4,4]{1,0}, f32[4,4]{1,0}) tuple(%part, %fusion.1)
}
"""
    assert timing.kernels_per_call(hlo, 2) == 1
    assert timing.kernels_per_call(hlo, 1) == 2
    with pytest.raises(timing.Merged):
        timing.kernels_per_call(hlo, 4)


def row(us, low, high, **changes):
    case = {"op": "fused_qk_scores", "B": 1, "K": 8, "G": 4, "S": 4096, "T": 1, "D": 128, "bits": 4}
    return case | {"front": "jax", "implementation": "triton", "us": us, "us_low": low, "us_high": high} | changes


@pytest.mark.parametrize(
    "now, regressed, improved",
    [
        (row(110, 105, 115), 1, 0),
        (row(102.5, 102.1, 103), 0, 0),  # beyond the spread, within 3 %
        (row(110, 101, 115), 0, 0),  # beyond 3 %, within the spread
        (row(90, 88, 92), 0, 1),
        (row(110, 105, 115, S=8192), 0, 0),  # a new row
    ],
)
def test_compare(now, regressed, improved):
    found = compare.compare([now], [row(100, 98, 102)])
    assert tuple(map(len, found)) == (regressed, improved)


def test_report_falls_back_to_the_file(tmp_path):
    path = tmp_path / "fused_qk_scores.json"
    assert "No committed results" in compare.report([row(110, 105, 115)], path)
    path.write_text(json.dumps({"rows": [row(100, 98, 102)]}))
    said = compare.report([row(110, 105, 115)], path)
    assert "1 regressed" in said and "S4096" in said and "+10.0%" in said


def test_every_row_of_the_issue_is_timed():
    cases = inputs.CASES
    assert str(next(iter(cases))) == "B8 K8 G4 S32768 T1 D128 bits4"
    assert {case.S for case in cases if (case.B, case.T) == (1, 1)} >= {2**n for n in (10, 12, 14, 16, 17, 18, 20)}
    assert {case.T for case in cases if (case.B, case.S) == (1, 8192)} == {16, 128, 1024}
    assert {case.G for case in cases} == {1, 4, 8, 16} and {case.D for case in cases} == {64, 96, 128, 256}
    assert {case.bits for case in cases if case.S == 32768} == {2, 3, 4}
    for case in cases:
        between_uses = sum(case.bursts) * case.bytes(case.packed_dim, 2)
        assert between_uses >= inputs.CACHE_BYTES and sum(case.bursts) >= 4
        assert len(set(case.bursts)) == 1  # one compilation for all bursts


def test_plot(tmp_path):
    rows = []
    for name, factor in (("triton", 1.0), ("dense_bf16", 2.0), ("dense_bf16_f32out", 2.1), ("floor", 0.8)):
        for case in inputs.CASES:
            us = factor * (4 + case.bytes(68, 4) / 4e6)
            rows.append(row(us, us, us, **vars(case), implementation=name, front="torch", bytes=case.bytes(68, 4)))
    versions = {"torch": "2", "triton": "3", "jax": "0"}
    report = {"device": "none", "driver": None, "versions": versions, "commit": None, "date": "2026-11-23T00:00:00"}
    path = tmp_path / "fused_qk_scores.json"
    path.write_text(json.dumps(report | {"copy_gbps": 4000.0, "rows": rows}))
    drawn = plot.draw(path)
    assert [one.name[-5] for one in drawn] == ["S", "T", "G"]
    assert all(one.stat().st_size > 10_000 for one in drawn)
    path.write_text(json.dumps(report | {"copy_gbps": 4000.0, "rows": rows[:1]}))
    assert plot.draw(path) == []


@pytest.fixture(scope="module")
def attention_out(tmp_path_factory):
    out = tmp_path_factory.mktemp("attention")
    for options in ([], ["--decode", "50"]):
        command = [sys.executable, ROOT / "benchmarks/attention.py", "--dry-run", *options, "--out", out]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
    return out


def test_attention_dry_run(attention_out):
    report = json.loads((attention_out / "attention.json").read_text())
    names = {(row["page"], row["front"], row["implementation"]) for row in report["rows"]}
    packed = {(page, *name) for page in (None, 16) for name in (("torch", "triton"), ("jax", "pallas_triton"))}
    assert packed <= names
    assert all(row["error"] <= 1e-3 for row in report["rows"] if row["implementation"] in ("triton", "pallas_triton"))
    assert {"vs_sdpa_bf16", "vs_cudnn_bf16", "bits", "copy_share"} <= report["rows"][0].keys()
    decode = json.loads((attention_out / "attention_decode.json").read_text())["fronts"]
    for found in decode.values():
        assert found["compiled"]["first_steps"] == found["compiled"]["all_steps"]
        assert len(found["lengths"]) == len(found["us"]["packed"]) == 1
    names = ("attention", "attention_decode")
    drawn = [path for name in names for path in plot_attention.draw(attention_out / f"{name}.json")]
    assert all(path.stat().st_size > 10_000 for path in drawn) and drawn


def test_attention_gate_is_red():
    case = attention_inputs.DRY_CASES[0]
    sets = attention_inputs.InputSets(case, torch.device("cpu"), seed=0)
    references = attention_inputs.references(case, sets)
    candidate = attention_inputs.candidates(case)["torch", "triton"]
    inputs = [each for group in sets.of("torch", "packed") for each in group]
    right = [attention_inputs._ours(case, attention_inputs.tq_torch, "eager", *each) for each in inputs]
    assert attention_inputs.check(candidate, enumerate(right), references) < 1e-4
    for wrong in (right[0] * 1.002, right[0].roll(1, -1), torch.full_like(right[0], float("nan"))):
        with pytest.raises(gate.Red):
            attention_inputs.check(candidate, enumerate([wrong]), references)


def test_committed_results_are_drawn_and_compared():
    for path in Path(plot.RESULTS).glob("*/fused_qk_scores.json"):
        rows = json.loads(path.read_text())["rows"]
        assert compare.compare(rows, rows) == ([], [])
        assert np.isfinite([row["us"] for row in rows]).all()
