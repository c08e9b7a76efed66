"""Compiles kernels for NVIDIA devices without one, and reads what ptxas says of them."""

import contextlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction


@dataclass(frozen=True)
class Resources:
    """What one thread, or one program, of a compiled kernel takes."""

    registers: int
    spill_bytes: int
    shared_bytes: int
    cubin_bytes: int


def compile_kernel(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], capability: int, **options
) -> Any:
    """`signature` from argument to Triton type; pointers and "i32:16" arguments are taken as multiples of 16."""
    aligned = [name for name, kind in signature.items() if kind.startswith("*") or kind.endswith(":16")]
    make = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = make(
        kernel,
        {**{k: v.removesuffix(":16") for k, v in signature.items()}, **{k: "constexpr" for k in constants}},
        constants,
        {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_ttir(text: str, capability: int, **options) -> Any:
    """A module of Triton IR, such as Pallas makes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ttir")
        path.write_text(text)
        return triton.compile(str(path), target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled: Any, capability: int) -> Resources:
    """Assembles the PTX once more, verbosely."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(compiled.asm["ptx"])
        architecture = re.search(r"\.target (sm_\w+)", compiled.asm["ptx"])[1]
        said = subprocess.run(
            [get_ptxas(capability).path, "-v", f"--gpu-name={architecture}", path, "-o", f"{path}.cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", said)]
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", said))
    return Resources(registers, sum(spills), compiled.metadata.shared, len(compiled.asm["cubin"]))


def pallas_ttir(function: Any, *arguments: Any) -> list[tuple[str, int, int]]:
    """(Triton IR, num_warps, num_stages) of each Pallas kernel that `function` lowers to for CUDA."""
    import jax
    from jax._src.lib.mlir import ir
    from jax._src.pallas.triton import lowering

    with _abstract_gpu():
        module = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    found = []

    def visit(operation):
        for region in operation.regions:
            for block in region.blocks:
                for inner in block.operations:
                    name = inner.operation.name
                    if name == "stablehlo.custom_call" and "gpu.triton" in str(inner.attributes["call_target_name"]):
                        config = inner.attributes["mhlo.backend_config"]
                        with lowering._new_ir_context(), ir.Location.unknown():
                            text = ir.Module.parse(ir.StringAttr(config["ir"]).value_bytes).operation.get_asm()
                        numbers = (ir.IntegerAttr(config[key]).value for key in ("num_warps", "num_stages"))
                        found.append((text, *numbers))
                    visit(inner.operation)

    with module.context:
        visit(module.operation)
    return found


def _abstract_gpu():
    """JAX from 0.11 on wants to be told of a device to lower for."""
    import jax

    if jax.__version_info__ < (0, 11):
        return contextlib.nullcontext()
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="cuda")
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))
