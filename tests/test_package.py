"""The house: what imports what, one face for three packages, budgets."""

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tq_torch
import tqcore
import tqjax

ROOT = Path(__file__).parent.parent
SOURCES = sorted(path for package in ("tqcore", "tqjax", "tq_torch") for path in (ROOT / package).rglob("*.py"))
ISOLATION = {
    "tqcore": [
        "jax",
        "torch",
        "triton",
        "flax",
        "safetensors",
        "transformers",
        "tqjax",
        "tq_torch",
        "rich",
        "matplotlib",
    ],
    "tqjax": ["torch", "triton", "flax", "safetensors", "transformers", "tq_torch"],
    "tq_torch": ["jax", "jaxlib", "flax", "safetensors", "transformers", "tqjax"],
}
HOMES = {
    "flax": {"tqjax/capture.py", "tqjax/flax.py"},
    "matplotlib": {"tqcore/report.py"},
    "rich": {"tqcore/report.py"},
    "safetensors": {"tqcore/file.py"},
    "transformers": {"tq_torch/capture.py", "tq_torch/transformers.py"},
    "triton": {
        "tqcore/kernels/__init__.py",
        "tqcore/kernels/compress.py",
        "tqcore/kernels/dense_compress.py",
        "tqcore/kernels/decompress.py",
        "tqcore/kernels/scores.py",
        "tqcore/kernels/attention.py",
        "tqcore/kernels/gluon_attention.py",
        "tqcore/kernels/gluon_cache.py",
        "tqcore/kernels/gluon_compress.py",
        "tqcore/kernels/gluon_scores.py",
        "tqcore/kernels/gluon_long_scores.py",
        "tq_torch/triton_call.py",
        "tqjax/triton_call.py",
    },
}


@pytest.mark.parametrize("package", ISOLATION)
def test_imports_alone(package):
    code = f"import sys, {package}; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(ISOLATION[package]).isdisjoint(modules.stdout.split())


def test_isolation_can_fail():
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, torch; print(*sys.modules)"], capture_output=True, text=True
    )
    assert "torch" in loaded.stdout.split()


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


def test_optional_packages_have_one_home():
    for package, homes in HOMES.items():
        assert {str(path.relative_to(ROOT)) for path in SOURCES if package in imported(path)} == homes


def test_layers():
    for path in SOURCES:
        layer, names = path.relative_to(ROOT).parts[0], set(imported(path))
        forbidden = {
            "tqcore": {"tqjax", "tq_torch", "jax", "torch"},
            "tqjax": {"tq_torch", "torch"},
            "tq_torch": {"tqjax", "jax"},
        }
        assert names.isdisjoint(forbidden[layer]), path


def test_one_face():
    assert tqcore.__all__ == tqjax.__all__ == tq_torch.__all__
    for name in tqcore.__all__:
        ours = getattr(tqcore, name)
        for package in (tqjax, tq_torch):
            theirs = getattr(package, name)
            if inspect.isfunction(ours):
                plain = [
                    [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
                    for f in (ours, theirs)
                ]
                assert plain[0] == plain[1], name
                assert theirs.__doc__, name
            elif ours is tqcore.KVCache:
                assert issubclass(theirs, ours)
            else:
                assert theirs is ours


def test_docstrings_tell_arguments_results_and_errors():
    scores = ("fused_qk_scores", "attention_scores", "attention", "merge_attention")
    for package in (tqcore, tqjax, tq_torch):
        for name in ("compress", "decompress", "rotate", *scores):
            doc = getattr(package, name).__doc__
            assert all(section in doc for section in ("Args:", "Returns:", "Raises:")), (package, name)


def test_budgets():
    """Files of at most 500 lines, functions of 60, kernels of 120."""
    for path in SOURCES:
        text = path.read_text()
        assert len(text.splitlines()) <= 500, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                assert length <= (120 if node.name.endswith("_kernel") else 60), (path, node.name, length)


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_readme_code_runs(framework, tmp_path, monkeypatch, capsys):
    """The blocks of the README, with the values that their comments promise."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (block,) = (block for block in blocks if f"import {framework}" in block)
    monkeypatch.chdir(tmp_path)
    exec(block, {})
    printed = capsys.readouterr().out
    promised = {"jax": ["0.265625", "(1, 8, 1, 4096)"], "torch": ["tensor(0.009"]}[framework]
    assert all(value in printed for value in promised)


def test_readme_numbers_are_measured():
    """The table of the first screen is that of benchmarks/results."""
    rows = json.loads((ROOT / "benchmarks/results/nvidia-h200/fused_qk_scores.json").read_text())["rows"]
    main = {"B": 8, "K": 8, "G": 4, "S": 32768, "T": 1, "D": 128, "bits": 4}
    us = {(row["front"], row["implementation"]): row["us"] for row in rows if main.items() <= row.items()}
    table = re.findall(r"^\| (?!---).*\| *\**(\d+)\** \| *\**(\d+|–)\** \|$", (ROOT / "README.md").read_text(), re.M)
    torch_names = ["gluon", "dense_bf16", "dense_fp32", "original", "floor"]
    jax_names = ["gluon", "dense_bf16", "dense_fp32", None, None]
    assert [int(a) for a, _ in table] == [round(us["torch", name]) for name in torch_names]
    assert [b for _, b in table] == ["–" if name is None else str(round(us["jax", name])) for name in jax_names]


def test_readme_attention_is_measured():
    """So is that of its second table."""
    rows = json.loads((ROOT / "benchmarks/results/nvidia-h200/attention.json").read_text())["rows"]
    main = {"B": 8, "K": 8, "G": 4, "S": 32768, "T": 1, "D": 128, "bits": "4/4", "page": None}
    us = {(row["front"], row["implementation"]): row["us"] for row in rows if main.items() <= row.items()}
    for best in (("torch", "sdpa"), ("jax", "cudnn")):
        us[best] = min(us[name] for name in list(us) if name[0] == best[0] and name[1].startswith(best[1]))
    names = [("gluon", "gluon"), ("triton", "triton"), ("sdpa", "cudnn")]
    table = re.findall(
        r"^\| (?!---).*\| *\**(\d+\.\d)\** \| *\**(\d+\.\d)\** \|$", (ROOT / "README.md").read_text(), re.M
    )
    assert table == [(f"{us['torch', a]:.1f}", f"{us['jax', b]:.1f}") for a, b in names]
