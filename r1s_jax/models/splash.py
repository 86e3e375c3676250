"""Attention of packed rows on TPUs: the splash kernel that JAX ships, forward and backward.

Everything here works on the local shard. Scores live in the chip's vector memory, a block at a
time. Blocks above the diagonal are skipped; those between two episodes are computed and masked.
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Float, Int

LANES = 128  # rows are padded to a multiple of it
BLOCKS = (512, 384, 256, 128)  # queries and keys per step: the largest that divides the row


def attention(
    q_BTHh: Float[Array, "B T H h"],
    k_BTKh: Float[Array, "B T K h"],
    v_BTKh: Float[Array, "B T K h"],
    segments_BT: Int[Array, "B T"] | None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T H h"]:
    """Causal grouped-query attention within segments, scores scaled by h**-0.5; softmax in f32.

    Without segment ids every row is one segment. `interpret` runs the kernel on any platform.
    """
    _, length, heads, width = q_BTHh.shape
    pad = -length % LANES
    padded = length + pad
    # What is padded stands behind all else, where no token looks.
    q, k, v = (
        jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2)
        for x in (q_BTHh * width**-0.5, k_BTKh, v_BTKh)
    )
    block = next(size for size in BLOCKS if padded % size == 0)
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((padded, padded))] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    ids = None
    if segments_BT is not None:
        padded_ids = jnp.pad(segments_BT, ((0, 0), (0, pad)))
        ids = kernels.SegmentIds(q=padded_ids, kv=padded_ids)
    mixed = cast(Array, jax.vmap(kernel)(q, k, v, ids))
    return mixed.swapaxes(1, 2)[:, :length]
