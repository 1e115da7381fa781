"""RoPE with the KV write: bit for bit what the two ops do one after the other, and nothing else is written."""

from __future__ import annotations

import pytest
import torch
from accuracy import normal
from torch import Tensor
from vast import FAR, sparse

from kernels import reference
from kernels.triton.rope import rope
from kernels.triton.rope_store import check_slots, rope_store

pytestmark = pytest.mark.usefixtures("poisoned")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# tokens, query heads, KV heads, head dim, elements that turn, page size
SHAPES = [
    (0, 2, 1, 16, 16, 16),
    (1, 4, 4, 16, 16, 16),
    (5, 8, 1, 32, 24, 16),
    (33, 4, 2, 20, 20, 32),
    (15, 40, 8, 128, 128, 17),
    (17, 2, 3, 96, 96, 256),
]


def heads_of(tokens: int, heads: int, width: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Heads that lie apart, as a fused projection's do."""
    return normal(tokens, heads + 3, width, seed=seed, dtype=dtype, device=device)[:, 1 : heads + 1]


def some_slots(tokens: int, pages: int, size: int, device: torch.device) -> Tensor:
    """Different slots in no order, the first and the last of all among them."""
    slots = torch.randperm(pages * size, generator=torch.Generator().manual_seed(3))[:tokens]
    if tokens > 1 and not (slots == 0).any() and not (slots == pages * size - 1).any():
        slots[:2] = torch.tensor([pages * size - 1, 0])
    return slots.to(device)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, q_heads, kv_heads, width, turning, size", SHAPES)
def test_the_bits_of_the_two_ops(
    tokens: int,
    q_heads: int,
    kv_heads: int,
    width: int,
    turning: int,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    q, k, v = (heads_of(tokens, n, width, i, dtype, device) for i, n in enumerate((q_heads, kv_heads, kv_heads)))
    angle = 3 * normal(tokens, turning // 2, seed=7, device=device)
    cos, sin = torch.cos(angle), torch.sin(angle)
    slots = some_slots(tokens, 4, size, device)
    found, wanted = (torch.full((2, 4, kv_heads, size, width), torch.nan, dtype=dtype, device=device) for _ in "ab")
    before = [x.clone() for x in (q, k, v)]
    out = rope_store(q, k, v, cos, sin, *found, slots)
    assert torch.equal(out, rope(q, cos, sin))
    assert torch.equal(out, reference.rope_store(q, k, v, cos, sin, *wanted, slots))
    assert torch.equal(bits(found), bits(wanted))
    assert found.isfinite().sum() == 2 * tokens * kv_heads * width  # so nothing else was written
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before, strict=True))


def test_one_layer_of_a_cache_and_int32_slots(device: torch.device) -> None:
    q, k, v = (normal(3, 2, 16, seed=i, device=device) for i in range(3))
    cos, sin = normal(3, 8, seed=4, device=device), normal(3, 8, seed=5, device=device)
    caches = torch.zeros(2, 3, 4, 2, 16, 16, device=device)  # k and v, layers, pages, heads, page, dim
    slots = torch.tensor([63, 0, 17], dtype=torch.int32, device=device)
    rope_store(q, k, v, cos, sin, caches[0, 1], caches[1, 1], slots)
    assert not caches[:, 0].any() and not caches[:, 2].any()
    for token, (page, offset) in enumerate([(3, 15), (0, 0), (1, 1)]):
        assert torch.equal(caches[0, 1, page, :, offset], rope(k, cos, sin)[token])
        assert torch.equal(caches[1, 1, page, :, offset], v[token])


def test_bits_depend_neither_on_company_nor_on_the_run(device: torch.device) -> None:
    q, k, v = (normal(5, 2, 16, seed=i, device=device) for i in range(3))
    cos, sin = normal(5, 8, seed=4, device=device), normal(5, 8, seed=5, device=device)
    slots = some_slots(5, 2, 16, device)

    def run(part: slice, caches: Tensor) -> Tensor:
        return rope_store(q[part], k[part], v[part], cos[part], sin[part], *caches, slots[part])

    first = torch.zeros(2, 2, 2, 16, 16, device=device)
    out = run(slice(None), first)
    for _ in range(20):
        again = torch.zeros_like(first)
        assert torch.equal(run(slice(None), again), out) and torch.equal(again, first)
    alone = torch.zeros_like(first)
    assert torch.equal(torch.cat([run(slice(i, i + 1), alone) for i in range(5)]), out)
    assert torch.equal(alone, first)


def test_pages_beyond_2_to_the_31_elements(device: torch.device) -> None:
    pages = 2 * FAR // 256 + 2
    caches = [sparse(pages * 256, torch.bfloat16, device).view(pages, 1, 16, 16) for _ in range(2)]
    q, k, v = (normal(2, 1, 16, seed=i, dtype=torch.bfloat16, device=device) for i in range(3))
    cos, sin = normal(2, 8, seed=4, device=device), normal(2, 8, seed=5, device=device)
    slots = torch.tensor([pages * 16 - 1, 5], dtype=torch.int32, device=device)
    rope_store(q, k, v, cos, sin, *caches, slots)
    for cache, wanted in zip(caches, (rope(k, cos, sin), v), strict=True):
        assert torch.equal(cache[-1, :, 15], wanted[0]) and torch.equal(cache[0, :, 5], wanted[1])


@pytest.mark.parametrize(
    "argument, given, message",
    [
        ("k", (4, 1, 8), r"rope_store: the shape of k is \(4, 1, 8\); expected \[4, KV heads, 16\]"),
        ("v", (4, 2, 16), r"rope_store: the shape of v is \(4, 2, 16\); expected that of k"),
        ("cos", (4, 9), r"rope_store: the shape of sin"),
        ("k_cache", (3, 2, 16, 16), r"rope_store: the shape of k_cache .* expected \[pages, 1, page size, 16\]"),
        ("v_cache", (4, 1, 16, 16), r"rope_store: shape and strides of v_cache"),
        ("slots", (5,), r"rope_store: the shape of slots is \(5,\); expected \[4\]"),
    ],
)
def test_wrong_shapes_are_named(argument: str, given: tuple[int, ...], message: str) -> None:
    shapes = {"q": (4, 2, 16), "k": (4, 1, 16), "v": (4, 1, 16), "cos": (4, 8), "sin": (4, 8)}
    shapes |= {"k_cache": (3, 1, 16, 16), "v_cache": (3, 1, 16, 16), "slots": (4,)}
    shapes[argument] = given
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    tensors["slots"] = tensors["slots"].long()
    with pytest.raises(ValueError, match=message):
        rope_store(**tensors)


def test_wrong_dtypes_and_strides_are_named() -> None:
    heads, table, pages = torch.zeros(4, 1, 16), torch.zeros(4, 8), torch.zeros(3, 1, 16, 16)
    slots = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"k_cache.dtype is torch.bfloat16; expected that of q, torch.float32"):
        rope_store(heads, heads, heads, table, table, pages.bfloat16(), pages, slots)
    with pytest.raises(ValueError, match=r"slots.dtype is torch.float32"):
        rope_store(heads, heads, heads, table, table, pages, pages, slots.float())
    with pytest.raises(ValueError, match=r"strides of k_cache is \(256, 256, 1, 16\); expected 1 along the head dim"):
        rope_store(heads, heads, heads, table, table, pages.mT, pages.mT, slots)


def test_slots_are_checked_on_request() -> None:
    pages = torch.zeros(3, 1, 16, 16)
    check_slots(torch.tensor([0, 47]), pages)
    with pytest.raises(ValueError, match=r"rope_store: slots is \[48, -1\]; expected 0 to 47, 3 pages"):
        check_slots(torch.tensor([48, 3, -1]), pages)
