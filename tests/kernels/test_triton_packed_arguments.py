"""What packed attention takes: strides, dtypes and shapes; and what it refuses, or leaves to plain torch."""

from __future__ import annotations

import logging
import mmap

import pytest
import torch
from packed import layout, qkv

from kernels import AttentionKind, plan_tiles, reference
from kernels.dispatch import warn_once
from kernels.triton.packed_attention import packed_attention
from kernels.triton.ragged import MAX_STRIDE

LENGTHS = ([5, 3], [9, 3])


def test_heads_of_a_fused_projection_need_no_copy(device: torch.device) -> None:
    fused = torch.cat(qkv([12], [12], (4, 2), 16, device=device), 1)
    q, k, v = fused.split((4, 2, 2), 1)
    rest = layout([12], [12], device)
    assert not k.is_contiguous()
    whole = packed_attention(q.contiguous(), k.contiguous(), v.contiguous(), *rest)
    assert torch.equal(packed_attention(q, k, v, *rest), whole)
    swapped = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]  # heads outside: these are copied
    assert torch.equal(packed_attention(*swapped, *rest), whole)


def test_gradients_may_come_expanded(device: torch.device) -> None:
    tensors = [x.requires_grad_() for x in qkv(*LENGTHS, (2, 1), 16, device=device)]
    out = packed_attention(*tensors, *layout(*LENGTHS, device))
    expanded = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
    assert all(map(torch.equal, expanded, torch.autograd.grad(out, tensors, torch.ones_like(out))))


@pytest.mark.skipif(torch.cuda.is_available(), reason="address space without memory is to be had on a CPU only")
@pytest.mark.parametrize("which", [0, 1, 2])
def test_offsets_beyond_int32(which: int) -> None:
    """Tokens so far apart that the last one's offset is above 2^31."""
    tokens = (1 << 31) // MAX_STRIDE + 2
    tensors = qkv([2 if which else tokens], [tokens], (1, 1), 16, torch.bfloat16)
    rest = layout([len(tensors[0])], [tokens])

    def run() -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = packed_attention(*leaves, *rest)
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]

    expected = run()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.13 on
    space = torch.frombuffer(mmap.mmap(-1, tokens * MAX_STRIDE * 2, flags=flags), dtype=torch.bfloat16)
    far = space.as_strided((tokens, 1, 16), (MAX_STRIDE, 16, 1))
    far.copy_(tensors[which])
    tensors[which] = far
    assert all(map(torch.equal, run(), expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), r"q \[2, 16\].*must be \[T, Hq, D\]"),
        (lambda q, k, v: (q, k, v[..., :8]), r"v \[12, 1, 8\]; must be"),
        (lambda q, k, v: (q[..., :8], k, v), r"q \[8, 2, 8\].*must be"),
        (lambda q, k, v: (q, k.repeat(1, 3, 1), v.repeat(1, 3, 1)), r"k \[12, 3, 16\].*heads of q must be a multiple"),
        (lambda q, k, v: (q[1:], k, v), r"q \[7, 2, 16\].*the plan has 8 queries and 12 keys"),
        (lambda q, k, v: (q, k[1:], v[1:]), r"k \[11, 1, 16\].*the plan has 8 queries and 12 keys"),
        (lambda q, k, v: (q, k.half(), v), r"k is torch.float16 on .*; must be torch.float32"),
        (lambda q, k, v: (q, k, v.bfloat16()), r"v is torch.bfloat16"),
    ],
)
def test_arguments_that_do_not_belong_together(change, message: str, device: torch.device) -> None:
    tensors = change(*qkv(*LENGTHS, (2, 1), 16, device=device))
    with pytest.raises(ValueError, match=f"packed_attention: .*{message}"):
        packed_attention(*tensors, *layout(*LENGTHS, device))


def test_an_empty_window_is_refused(device: torch.device) -> None:
    tensors = qkv(*LENGTHS, (2, 1), 16, device=device)
    with pytest.raises(ValueError, match="window=0; must be at least 1"):
        packed_attention(*tensors, *layout(*LENGTHS, device), AttentionKind(window=0))


def test_a_plan_for_another_device_is_refused() -> None:
    tensors = qkv(*LENGTHS, (2, 1), 16)
    slots, blocks, _ = layout(*LENGTHS)
    with pytest.raises(ValueError, match="the plan is on meta, the tensors on cpu"):
        packed_attention(*tensors, slots, blocks, layout(*LENGTHS, "meta")[2])


def test_more_queries_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sequence 1 brings 3 queries, but has 2 tokens"):
        plan_tiles([1, 3], [1, 2], [[0], [1]])


@pytest.mark.parametrize(
    ("dim", "dtype", "kind", "reason"),
    [
        (16, torch.float64, AttentionKind(), "not torch.float64"),
        (264, torch.float32, AttentionKind(), "head dims go to 256, not 264"),
        (16, torch.float32, AttentionKind(scale=-0.5), "a scale above 0, not -0.5"),
    ],
)
def test_what_the_kernel_does_not_take_runs_in_plain_torch_and_says_why(
    dim: int,
    dtype: torch.dtype,
    kind: AttentionKind,
    reason: str,
    device: torch.device,
    caplog: pytest.LogCaptureFixture,
) -> None:
    warn_once.cache_clear()
    tensors = qkv(*LENGTHS, (2, 1), dim, dtype, device)
    rest = layout(*LENGTHS, device)
    with caplog.at_level(logging.WARNING):
        found = packed_attention(*tensors, *rest, kind)
        packed_attention(*tensors, *rest, kind)
    assert torch.equal(found, reference.packed_attention(*tensors, *rest, kind))
    said = [r.getMessage() for r in caplog.records]
    assert len(said) == 1 and reason in said[0]
