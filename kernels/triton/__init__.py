"""The ops once more, in Triton, under the signatures and contracts of ``kernels.reference``.

One op a file. What a kernel doesn't take (float64, a head dim without a tile) goes to the reference, with one warning
that says why. Offsets into tensors are int64; lengths are never compile-time constants, so that nothing is compiled
anew because a batch is longer; there is no autotuning at run time: ``tiles.py`` says which tile is used for what.
"""

from kernels.triton.logits import logits
from kernels.triton.logprobs import token_logprobs
from kernels.triton.norms import add_rms_norm, rms_norm

__all__ = ["add_rms_norm", "logits", "rms_norm", "token_logprobs"]
