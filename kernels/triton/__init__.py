"""The ops once more, in Triton, under the signatures and contracts of ``kernels.reference``.

One op a file. What a kernel doesn't take (float64, a head dim without a tile) goes to the reference, with one warning
that says why. Offsets into tensors are int64; lengths are never compile-time constants, so that nothing is compiled
anew because a batch is longer; there is no autotuning at run time: ``tiles.py`` says which tile is used for what.
"""

from kernels.triton.activations import geglu, swiglu
from kernels.triton.kv_store import store_kv
from kernels.triton.logits import logits
from kernels.triton.logprobs import token_logprobs
from kernels.triton.matmul import invariant_linear, linear
from kernels.triton.norms import add_rms_norm, rms_norm
from kernels.triton.packed_attention import packed_attention
from kernels.triton.paged_attention import attend_blocks, attend_paged
from kernels.triton.rope import rope
from kernels.triton.rope_store import rope_store
from kernels.triton.sampling import philox_uniform, sample_tokens

__all__ = [
    "add_rms_norm",
    "attend_blocks",
    "attend_paged",
    "geglu",
    "invariant_linear",
    "linear",
    "logits",
    "packed_attention",
    "philox_uniform",
    "rms_norm",
    "rope",
    "rope_store",
    "sample_tokens",
    "store_kv",
    "swiglu",
    "token_logprobs",
]
