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
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir
from jax.interpreters.xla import apply_primitive
from jax.sharding import NamedSharding, PartitionSpec

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
    flat = functools.partial(_flat, function, tree)
    jaxpr = jax.make_jaxpr(flat)(*(jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in leaves))
    options = {"axes": tuple(jax.tree.leaves(axes)), "results": tuple(results)}
    return split_p.bind(*leaves, jaxpr=jaxpr, function=flat, **options)


def axes_of(shape: Sequence[int], whole: str, sizes: dict[str, int]) -> str:
    """The letters of an array that is broadcast to one of axes `whole`: axes of length 1 are capital."""
    pairs = zip(whole[len(whole) - len(shape) :], shape, strict=True)
    return "".join(letter if n == sizes.get(letter) else letter.upper() for letter, n in pairs)


@split_p.def_abstract_eval
def _shapes(*avals, jaxpr, **_):
    varies = frozenset().union(*(getattr(x, "vma", None) or () for x in avals))
    return [x.update(vma=varies) if varies else x for x in jaxpr.out_avals]


def _batch(arrays, batched, *, jaxpr, function, axes, results):
    """One more axis, that may be sharded as well."""
    letter = next(letter for letter in "vwxyz" if all(letter not in of for of in axes))
    arrays = [x if at is None else jnp.moveaxis(x, at, 0) for x, at in zip(arrays, batched, strict=True)]
    axes = [of if at is None else letter + of for of, at in zip(axes, batched, strict=True)]
    function = jax.vmap(function, [None if at is None else 0 for at in batched])
    found = split(function, axes, [letter + of for of in results], arrays)
    return found, [0] * len(found)


def _lower(ctx, *operands, jaxpr, function, axes, results):
    spread, avals = jaxpr_as_fun(jaxpr), jaxpr.in_avals
    if _is_for_several(ctx.module_context.axis_context):
        sizes = {letter: n for x, of in zip(avals, axes, strict=True) for letter, n in zip(of, x.shape, strict=True)}
        spread = _partitioned(function, jaxpr.out_avals, axes, results, sizes)
    ctx = ctx.replace(avals_in=avals, avals_out=jaxpr.out_avals)
    return mlir.lower_fun(spread, multiple_results=True)(ctx, *operands)


def _is_for_several(context):
    """Whether XLA is to partition: not on one device, nor within `shard_map`, nor in `jax.export`, which knows none."""
    if hasattr(context, "manual_axes"):
        return set(context.manual_axes) != set(context.mesh.axis_names)
    return len(getattr(context, "device_assignment", None) or ()) > 1


batching.primitive_batchers[split_p] = _batch
mlir.register_lowering(split_p, _lower)


def _flat(function, tree, *leaves):
    return jax.tree.leaves(function(*jax.tree.unflatten(tree, leaves)))


def _partitioned(function, outs, axes, results, sizes):
    """`function` as XLA partitions it."""

    @custom_partitioning
    def wrapped(*arrays):  # stands for it until its parts are known, and may hold no constants
        return [jnp.zeros(x.shape, x.dtype) for x in outs]

    def partition(mesh, arrays, outs):
        found: dict[str, tuple[str, ...]] = {}
        for x, of in zip((*outs, *arrays), (*results, *axes), strict=True):
            for letter, over in zip(of.replace("h", "k"), _spec(x), strict=False):
                taken = {name for names in found.values() for name in names} & set(over)
                even = letter.islower() and sizes[letter] % math.prod(mesh.shape[name] for name in over) == 0
                if over and even and not taken and letter not in found:
                    found[letter] = over
        places = [
            NamedSharding(mesh, PartitionSpec(*(found.get(letter) for letter in of.replace("h", "k"))))
            for of in (*results, *axes)
        ]
        return mesh, function, places[: len(results)], tuple(places[len(results) :])

    wrapped.def_partition(partition=partition, **_rule(axes, results, sizes))
    return wrapped


def _spec(x):
    """Of each axis, the names of the mesh's axes that it is sharded over."""
    spec = getattr(x.sharding, "spec", ())
    return [() if over is None else (over,) if isinstance(over, str) else tuple(over) for over in spec]


def _rule(axes, results, sizes):
    """Shardy's. Each capital is an axis of its own, since one letter may stand for several lengths."""
    whole = []

    def factor(letter):
        if letter == "h":
            return "(k g)" if sizes["h"] != sizes["k"] else "k"
        if letter.islower():
            return letter
        whole.append(f"whole{len(whole)}")
        return whole[-1]

    sides = [", ".join(" ".join(map(factor, of)) for of in side) for side in (axes, results)]
    rule: dict[str, Any] = {"sharding_rule": " -> ".join(sides)}
    if "(k g)" in rule["sharding_rule"]:
        rule["g"] = sizes["h"] // sizes["k"]
        whole.append("g")
    return rule | {"need_replication_factors": tuple(whole)}
