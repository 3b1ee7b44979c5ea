"""Reading traced programs."""

import collections

import jax


def primitives(jaxpr) -> collections.Counter:
    """How often each primitive stands in a program, loops and calls opened."""
    count = collections.Counter()
    for equation in jaxpr.eqns:
        count[equation.primitive.name] += 1
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                count += primitives(inner)
    return count
