"""What of ``kernels/triton/filters.py`` is shipped: vocabularies of real models, each filter alone and all of them."""

from __future__ import annotations

import torch

from kernels.triton.sampling import sample_tokens

PRODUCTS: dict[str, str] = {}
SPILLS: dict[str, str] = {}


def launch() -> None:
    row, count = torch.ones(2), torch.ones(2, dtype=torch.int64)
    for vocab in (151_936, 262_208):
        z, banned = torch.zeros(2, vocab), torch.zeros(2, vocab, dtype=torch.bool)
        sample_tokens(z, row, row, count, row, row)
        sample_tokens(z, row, row, count, row, row, banned)
    sample_tokens(z, row, row, count)
    sample_tokens(z, row, row, None, row)
    sample_tokens(z, row, row, None, None, row)
