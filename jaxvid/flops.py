"""FLOPs of the matrix products of a program, counted over its jaxpr.

A product of [m, k] and [k, n] is 2 m k n. The body of a scan counts as often as it runs, a cond as
its largest branch, a shard_map's body once for each device of its mesh (work that devices repeat is
work), recomputation as what it is. A Pallas kernel is the products of one step times the steps of
its grid, times the share of steps that do any work where the kernel skips the others by a table
that only the data make: that share is an argument. Nothing but products is counted.

`products` lists them instead, with the arguments that their two sides depend on.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal


def count(f, *args, shares: Mapping[str, float] | None = None, loop: int = 0) -> float:
    """FLOPs of f(*args), over all devices. `args` may be ShapeDtypeStructs.

    `shares` is, by the name of its kernel's function, the share of the grid's steps that a Pallas
    kernel works in; a kernel not named works in all of them. `loop` is what a while loop counts
    for, whose length the program does not state. Raises ValueError for products in such a loop
    where that is 0, and for convolutions.
    """
    return of_jaxpr(jax.make_jaxpr(f)(*args).jaxpr, shares or {}, loop)


def of_jaxpr(jaxpr: Jaxpr, shares: Mapping[str, float], loop: int = 0) -> float:
    """FLOPs of a jaxpr; see `count`."""
    return sum((_of_equation(e, shares, loop) for e in jaxpr.eqns), 0.0)


def _of_equation(e, shares, loop):
    name, inside = e.primitive.name, [of_jaxpr(j, shares, loop) for j in _inside(e.params)]
    match name:
        case "dot_general":
            return _product(e)
        case "conv_general_dilated":
            raise ValueError("a convolution is not counted; write it as a product, or add it here")
        case "scan":
            return e.params["length"] * sum(inside)
        case "while" if loop:
            return loop * sum(inside)
        case "while" if sum(inside):
            raise ValueError("products in a while loop, whose length the program does not state")
        case "cond":
            return max(inside)
        case "shard_map":
            return e.params["mesh"].size * sum(inside)
        case "pallas_call":
            steps = int(np.prod(e.params["grid_mapping"].grid))
            return sum(inside) * steps * shares.get(kernel_name(e), 1.0)
    return sum(inside)


def kernel_name(e) -> str:
    """The name of the function that a pallas_call runs."""
    return e.params["jaxpr"].debug_info.func_name


class Product(NamedTuple):
    """A product of matrices, as often as the program makes it."""

    flops: float
    left: frozenset[str]  # names of the arguments that the left side depends on
    right: frozenset[str]


def products(f, args: Mapping[str, Any]) -> tuple[list[Product], list[frozenset[str]]]:
    """The products of f(**args), and what each array that it returns depends on, by the names of
    the arguments. `args` may be trees of ShapeDtypeStructs.

    For a program of one device without kernels: raises ValueError for products in a kernel or
    shard_map, in a while loop, and for convolutions.
    """
    jaxpr = jax.make_jaxpr(lambda given: f(**given))(dict(args)).jaxpr
    names = [path[0].key for path, _ in jax.tree_util.tree_leaves_with_path(dict(args))]
    found: list[Product] = []
    return found, _follow(jaxpr, [frozenset({name}) for name in names], 1.0, found)


def _follow(jaxpr, ins, times, found):
    """What the outputs of a jaxpr depend on, given that for its inputs. Its products are appended
    to `found`."""
    known = dict(zip(jaxpr.invars, ins, strict=True))
    of = lambda v: frozenset() if isinstance(v, Literal) else known.get(v, frozenset())
    for e in jaxpr.eqns:
        read = list(map(of, e.invars))
        known.update(zip(e.outvars, _outputs(e, read, times, found)))
    return list(map(of, jaxpr.outvars))


def _outputs(e, read, times, found):
    name, inside, all_of_it = e.primitive.name, list(_inside(e.params)), frozenset().union(*read)
    if name == "dot_general":
        found.append(Product(times * _product(e), *read))
    elif name == "scan":
        return _scan(e, read, times, found)
    elif name in ("pallas_call", "shard_map") and of_jaxpr(inside[0], {}):
        raise ValueError(f"products in a {name} are not followed; trace for one device of a CPU")
    elif len(inside) == 1 and len(inside[0].invars) == len(read) and name != "while":
        return _follow(inside[0], read, times, found)
    elif _of_equation(e, {}, 0):
        raise ValueError(f"products in a {name} are not followed; add it here")
    return [all_of_it] * len(e.outvars)


def _scan(e, read, times, found):
    """What is carried depends on all that it depended on in any earlier round."""
    body, consts, carried = e.params["jaxpr"].jaxpr, e.params["num_consts"], e.params["num_carry"]
    first, last = consts, consts + carried
    while True:
        outs = _follow(body, read, times, [])
        grown = [a | b for a, b in zip(read[first:last], outs)]
        if grown == read[first:last]:
            break
        read = read[:first] + grown + read[last:]
    return _follow(body, read, times * e.params["length"], found)


def _product(e):
    (over, _), _ = e.params["dimension_numbers"]
    contracted = np.prod([e.invars[0].aval.shape[i] for i in over], initial=1.0)
    return 2.0 * np.prod(e.outvars[0].aval.shape, initial=1.0) * contracted


def _inside(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    """The jaxprs that an equation runs."""
    for value in params.values():
        for x in value if isinstance(value, tuple | list) else (value,):
            if isinstance(x, ClosedJaxpr):
                yield x.jaxpr
            elif isinstance(x, Jaxpr):
                yield x
