"""What of ``kernels/triton/sampling.py`` is shipped: vocabularies of real models, with and without filters and bans."""

from __future__ import annotations

import json
import random

import compile_only
import torch

from kernels.triton import filters, sampling
from kernels.triton.sampling import philox_uniform, sample_tokens

PRODUCTS: dict[str, str] = {}
SPILLS: dict[str, str] = {}
VOCABS = (50_257, 151_936, 262_208)


def _sample(rows: int, vocab: int, filtered: bool, bans: bool, skipped: int = 0) -> None:
    """With columns that start ``skipped`` entries into longer ones."""
    column, z = torch.ones(rows + skipped)[skipped:], torch.zeros(rows, vocab)
    filters = (torch.ones(rows + skipped, dtype=torch.int64)[skipped:], column, column) if filtered else (None,) * 3
    sample_tokens(z, column, column, *filters, torch.zeros(rows, vocab, dtype=torch.bool) if bans else None)


def launch() -> None:
    philox_uniform(*torch.zeros(3, 8, dtype=torch.int64))
    for vocab in VOCABS:
        for filtered in (False, True):
            for bans in (False, True):
                _sample(2, vocab, filtered, bans)


def count_compilations() -> None:
    """Prints, as JSON by kernel, how often it is compiled for 50 batches of two models."""
    compile_only.driver.set_active(compile_only.CompileOnly())
    rng = random.Random(0)
    for _ in range(50):
        rows = rng.choice((1, 8, 16, rng.randrange(1, 40)))
        philox_uniform(*torch.zeros(3, rows, dtype=torch.int64))
        _sample(rows, rng.choice((1024, 1001)), True, True, rng.choice((0, 1, 8)))
    kernels = [*compile_only.kernels_of(sampling), *compile_only.kernels_of(filters)]
    print(json.dumps({kernel.__name__: len(compile_only.compiled(kernel)) for kernel in kernels}))
