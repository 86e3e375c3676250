"""The checker of annotations in tests: beartype, with an int accepted where a float is wanted.

No __init__ is checked: JAX builds registered dataclasses anew with shapes, shardings or None
where arrays stood, which is what tree_map is for.
"""

from collections.abc import Callable

from beartype import BeartypeConf, beartype

_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(fn: Callable) -> Callable:
    """Called by jaxtyping's import hook with each function of the library."""
    return fn if fn.__name__ == "__init__" else _checked(fn)
