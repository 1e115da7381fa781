"""The ops that trainer and rollout engine share. One meaning each, in ``kernels.reference``.

Callers write ``from kernels import rms_norm``; which implementation computes is decided by where the tensor lives
(``kernels.dispatch``). Importing this package costs torch and nothing more; it carries no ``__version__`` on purpose
(another distribution called ``kernels`` exists, and transformers asks for its version).
"""

from kernels import reference
from kernels.dispatch import dispatched
from kernels.reference import (
    KV_BLOCK,
    AttentionKind,
    AttentionPlan,
    SampledTokens,
    TileBatch,
    distribution,
    plan_tiles,
    rope_tables,
)

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

add_rms_norm = dispatched(reference.add_rms_norm)
attend_blocks = dispatched(reference.attend_blocks)
attend_paged = dispatched(reference.attend_paged)
geglu = dispatched(reference.geglu)
invariant_linear = dispatched(reference.invariant_linear)
linear = dispatched(reference.linear)
logits = dispatched(reference.logits)
packed_attention = dispatched(reference.packed_attention)
philox_uniform = dispatched(reference.philox_uniform)
rms_norm = dispatched(reference.rms_norm)
rope = dispatched(reference.rope)
rope_store = dispatched(reference.rope_store)
sample_tokens = dispatched(reference.sample_tokens)
store_kv = dispatched(reference.store_kv)
swiglu = dispatched(reference.swiglu)
token_logprobs = dispatched(reference.token_logprobs)
