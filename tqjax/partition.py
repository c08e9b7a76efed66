"""How operations are split over the devices of a mesh: by sequences and key heads, each device for itself.

A kernel is a black box to XLA, which would gather its operands on every device. `split` names the axes of a function's
arrays, so that XLA keeps them where they are and calls the function on each device with what lies there, and
`shard_map` knows over which axes of the mesh the outputs vary.

Source: jax.experimental.custom_partitioning; Shardy's rules, openxla.org/shardy.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir
from jax.interpreters.xla import apply_primitive
from jax.sharding import ManualAxisType, NamedSharding, PartitionSpec

split_p = Primitive("tq_split")
split_p.multiple_results = True
split_p.def_impl(functools.partial(apply_primitive, split_p))


def split(function: Callable[..., Any], axes: Any, results: Sequence[str], arrays: Sequence[Any]) -> list:
    """The arrays of function(*arrays), a list, each device having computed its part of the axes that may be sharded.

    Args:
      function: of arrays, or trees of them, of any size along those axes.
      axes: the same trees of strings, a letter for each axis of an array; capitals are axes that each device needs
        whole. "h" are the query heads of key heads "k": each device holds those of its key heads.
      results: a string for each result.
    """
    leaves, tree = jax.tree.flatten(tuple(arrays))
    axes, results, flat = jax.tree.leaves(axes), list(results), functools.partial(_flat, function, tree)
    given = [jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves]
    jaxpr = jax.make_jaxpr(flat)(*given)
    spread = jax.make_jaxpr(_partitioned(flat, jaxpr, axes, results))(*given)
    return split_p.bind(*leaves, jaxpr=jaxpr, spread=spread, function=flat, axes=tuple(axes), results=tuple(results))


def axes_of(shape: Sequence[int], whole: str, sizes: dict[str, int]) -> str:
    """The letters of an array that is broadcast to one of axes `whole`: axes of length 1 are capital."""
    pairs = zip(whole[len(whole) - len(shape) :], shape, strict=True)
    return "".join(letter if n == sizes.get(letter) else letter.upper() for letter, n in pairs)


def struct(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    """An output of a Pallas kernel within `split`, which says over which axes of a mesh it varies."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=ManualAxisType())


@split_p.def_abstract_eval
def _shapes(*avals, jaxpr, axes, results, **_):
    kind = ManualAxisType(varying=frozenset().union(*(x.manual_axis_type.varying for x in avals)))
    mesh = next((x.sharding.mesh for x in avals if not x.sharding.mesh.empty), None)
    if mesh is None:
        return jaxpr.out_avals
    sizes = _sizes(axes, avals)
    places = _places(mesh, zip(axes, avals, strict=True), sizes, results)
    pairs = zip(jaxpr.out_avals, places, strict=True)
    return [ShapedArray(x.shape, x.dtype, sharding=place, manual_axis_type=kind) for x, place in pairs]


def _batch(arrays, batched, *, function, axes, results, **_):
    """One more axis, that may be sharded as well."""
    letter = next(letter for letter in "vwxyz" if all(letter not in of for of in axes))
    arrays = [x if at is None else jnp.moveaxis(x, at, 0) for x, at in zip(arrays, batched, strict=True)]
    axes = [of if at is None else letter + of for of, at in zip(axes, batched, strict=True)]
    function = jax.vmap(function, [None if at is None else 0 for at in batched])
    found = split(function, axes, [letter + of for of in results], arrays)
    return found, [0] * len(found)


def _lower(ctx, *operands, jaxpr, spread, **_):
    used = spread if _is_for_several(ctx.module_context.axis_context) else jaxpr
    ctx = ctx.replace(avals_in=jaxpr.in_avals, avals_out=jaxpr.out_avals)
    return mlir.lower_fun(jaxpr_as_fun(used), multiple_results=True)(ctx, *operands)


def _is_for_several(context):
    """Whether XLA is to partition: not on one device, nor within `shard_map`, nor in `jax.export`, which knows none."""
    if hasattr(context, "manual_axes"):
        return set(context.manual_axes) != set(context.mesh.axis_names)
    return len(getattr(context, "device_assignment", None) or ()) > 1


batching.primitive_batchers[split_p] = _batch
mlir.register_lowering(split_p, _lower)


def _flat(function, tree, *leaves):
    return jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves)))


def _partitioned(function, jaxpr, axes, results):
    """`function`, whose jaxpr that is where nothing is sharded, as XLA partitions it."""
    sizes = _sizes(axes, jaxpr.in_avals)

    @custom_partitioning
    def wrapped(*arrays):  # stands for it until its parts are known, and may hold no constants
        return [jnp.zeros(x.shape, x.dtype) for x in jaxpr.out_avals]

    def partition(mesh, arrays, outs):
        known = zip((*results, *axes), (*outs, *arrays), strict=True)
        places = _places(mesh, known, sizes, (*results, *axes))
        return mesh, function, places[: len(results)], tuple(places[len(results) :])

    wrapped.def_partition(partition=partition, **_rule(axes, results, sizes))
    return wrapped


def _sizes(axes, arrays):
    return {letter: n for of, x in zip(axes, arrays, strict=True) for letter, n in zip(of, x.shape, strict=True)}


def _places(mesh, known, sizes, wanted):
    """Shardings of arrays with axes `wanted`, from pairs of axes and arrays: the first sharding of an axis holds."""
    heads = "h" if sizes.get("k") == 1 else "k"  # one key head serves query heads on any device
    found: dict[str, tuple[str, ...]] = {}
    for of, x in known:
        for letter, over in zip(of.replace("h", heads), _spec(x), strict=False):
            taken = {name for names in found.values() for name in names} & set(over)
            even = letter.islower() and sizes[letter] % math.prod(mesh.shape[name] for name in over) == 0
            if over and even and not taken and letter not in found:
                found[letter] = over
    return [NamedSharding(mesh, PartitionSpec(*map(found.get, of.replace("h", heads)))) for of in wanted]


def _spec(x):
    """Of each axis, the names of the mesh's axes that it is sharded over."""
    spec = getattr(x.sharding, "spec", ())
    return [() if over is None else (over,) if isinstance(over, str) else tuple(over) for over in spec]


def _rule(axes, results, sizes):
    """Shardy's. Each capital is an axis of its own, since one letter may stand for several lengths."""
    whole, heads = [], "h" if sizes.get("k") == 1 else "k" if sizes.get("h") == sizes.get("k") else "(k g)"

    def factor(letter):
        if letter == "h":
            if heads == "(k g)" and "g" not in whole:
                whole.append("g")  # in the order of their first places, as Shardy wants them
            return heads
        if letter.islower():
            return letter
        whole.append(f"whole{len(whole)}")
        return whole[-1]

    rule = " -> ".join(", ".join(" ".join(map(factor, of)) for of in side) for side in (axes, results))
    groups = {"g": sizes["h"] // sizes["k"]} if "g" in whole else {}
    return {"sharding_rule": rule, "need_replication_factors": tuple(whole)} | groups
