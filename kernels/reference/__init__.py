"""Every op in plain torch: the specification of the Triton kernels, and the CPU path.

All ops are *row-invariant* on CPU in fp32: the bits of a row do not depend on how many other
rows share the call, nor on their order. (They may depend on the thread count, as torch's matrix
product divides columns among threads; trainer and engine share a process, and so the count.)
Three habits buy that:

* matrix products see a multiple of eight rows of whole 16-byte groups (:func:`linear`) or a fixed
  32-key block (:func:`attend_blocks`);
* elementwise code uses only exp, log, tanh, cos, sin, rsqrt and + - * /, whose vector body and tail
  agree (``F.silu``, ``sigmoid`` and ``pow`` do not);
* a reduction runs along the last axis of at least eight rows.

``kernels.exactness`` asserts it on the machine at hand.
"""

from kernels.reference.attention import (
    KV_BLOCK,
    AttentionKind,
    AttentionPlan,
    TileBatch,
    attend_blocks,
    attend_paged,
    packed_attention,
    plan_tiles,
    store_kv,
)
from kernels.reference.dense import (
    add_rms_norm,
    geglu,
    invariant_linear,
    linear,
    rms_norm,
    rope,
    rope_store,
    rope_tables,
    swiglu,
)
from kernels.reference.logprobs import distribution, logits, token_logprobs
from kernels.reference.sampling import SampledTokens, philox_uniform, sample_tokens

__all__ = [
    "KV_BLOCK",
    "AttentionKind",
    "AttentionPlan",
    "SampledTokens",
    "TileBatch",
    "add_rms_norm",
    "attend_blocks",
    "attend_paged",
    "distribution",
    "geglu",
    "invariant_linear",
    "linear",
    "logits",
    "packed_attention",
    "philox_uniform",
    "plan_tiles",
    "rms_norm",
    "rope",
    "rope_store",
    "rope_tables",
    "sample_tokens",
    "store_kv",
    "swiglu",
    "token_logprobs",
]
