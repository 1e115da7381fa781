"""What of ``kernels/triton/paged_attention.py`` is shipped: head dims and groups of real models, every tile height."""

from __future__ import annotations

import random

import torch

from kernels import AttentionKind, AttentionPlan, plan_tiles
from kernels.triton.paged_attention import attend_blocks

SPILLS: dict[str, str] = {}
CAUSAL = AttentionKind()
LLAMA, QWEN, GEMMA = (4, 128), (7, 64), (2, 256)  # query heads a KV head, head dim


def product(constants: str) -> str | None:
    """fp32 is multiplied as it is, without tensor cores; a tile of 16 rows is too low for a warp group's product."""
    if "q=*fp32" in constants:
        return None
    return "HMMA" if "M=16," in constants else "HGMMA"


PRODUCTS = {"_attend_kernel": product}
VARIANTS = {"_attend_kernel": 3}  # heights of tiles


def attend(
    plan: AttentionPlan,
    shape: tuple[int, int],
    dtype: torch.dtype,
    kind: AttentionKind = CAUSAL,
    stored: torch.dtype | None = None,
    page: int = 32,
) -> None:
    group, dim = shape
    q = torch.zeros(int(plan.queries.sum()), 2 * group, dim, dtype=dtype)
    cache, scale = torch.zeros(4, 2, page, dim, dtype=stored or dtype), torch.zeros(4, 2, page)
    attend_blocks(q, cache, cache, plan, kind, scales=None if stored is None else (scale, scale))


def mixed(group: int, window: int | None = None) -> AttentionPlan:
    """Samples of one prompt that fill a tile of 64 rows, a row of a long context, and a piece of a prompt."""
    samples = 64 // group
    queries, contexts = [*[1] * samples, 1, 40], [*[300] * samples, 1000, 90]
    return plan_tiles(queries, contexts, [*[[0] * 32] * samples, [1] * 32, [2] * 3], window=window)


def launch() -> None:
    bf16 = torch.bfloat16
    for shape in (LLAMA, QWEN):
        attend(mixed(shape[0]), shape, bf16)
        attend(mixed(shape[0]), shape, torch.float32)
    attend(mixed(4), LLAMA, bf16, page=64)  # with pages of one block the compiler leaves their arithmetic out
    attend(mixed(4, 4096), LLAMA, bf16, AttentionKind(window=4096))
    attend(plan_tiles([1, 70], [90, 70], [[0, 1, 2]] * 2, exact=True), LLAMA, bf16)
    attend(mixed(2), GEMMA, bf16, AttentionKind(softcap=50.0))
    attend(mixed(2, 4096), GEMMA, bf16, AttentionKind(softcap=50.0, window=4096))
    for shape, stored in ((LLAMA, torch.int8), (LLAMA, torch.float8_e4m3fn), (GEMMA, torch.int8)):
        attend(mixed(shape[0]), shape, bf16, CAUSAL, stored)


def launch_batch(tokens: int) -> None:
    """As many sequences as it takes to bring that many tokens: single ones, and pieces of prompts."""
    rng = random.Random(tokens)
    queries: list[int] = []
    while sum(queries) < tokens:
        queries += [1] * rng.randint(1, 9) + [rng.randint(1, 300)]
    contexts = [n + rng.randint(0, 3000) for n in queries]
    shared = [rng.randrange(4) for _ in range(rng.randint(1, 60))]
    tables = [[*shared, *(rng.randrange(4) for _ in range(-(-n // 32)))] for n in contexts]
    attend(plan_tiles(queries, contexts, tables), QWEN, torch.bfloat16)
