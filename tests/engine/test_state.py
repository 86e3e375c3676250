"""The one way into the cache: rows written at their own places."""

import jax
import jax.numpy as jnp
import numpy as np

from r1s_jax.engine.state import EngineConfig, write_rows


def test_write_rows():
    """Each block lands in its slot at its start; a slot beyond the cache writes nothing.

    Against a loop in numpy, for both orders of axes; the padding row comes last, after the row of
    the last slot, whose cache it must not undo.
    """
    rng = np.random.default_rng(0)
    for axis, shape, block in [(3, (4, 2, 3, 9), (3, 2, 3, 2)), (2, (4, 2, 9, 3), (3, 2, 2, 3))]:
        caches = tuple(rng.normal(size=shape).astype(np.float32) for _ in range(2))
        news = tuple(rng.normal(size=block).astype(np.float32) for _ in range(2))
        slots, starts = np.array([3, 0, 4]), np.array([7, 0, 5])
        got = jax.jit(write_rows, static_argnames="axis")(
            tuple(map(jnp.asarray, caches)),
            tuple(map(jnp.asarray, news)),
            jnp.asarray(slots),
            jnp.asarray(starts),
            axis=axis,
        )
        for cache, new, written in zip(caches, news, got, strict=True):
            for row in range(2):
                where = [slots[row], slice(None), slice(None), slice(None)]
                where[axis] = slice(starts[row], starts[row] + 2)
                cache[tuple(where)] = new[row]
            np.testing.assert_array_equal(written, cache)


def test_capacity_holds_the_longest_write():
    """A full context still has room for the padding of a chunk and of a document's piece."""
    assert EngineConfig(context=100, chunk=7, extend_tokens=30).capacity >= 130
    assert EngineConfig(context=100, chunk=40, extend_tokens=30).capacity >= 140
