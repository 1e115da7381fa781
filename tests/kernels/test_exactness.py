"""The start-up check passes where the ops are row-invariant and names the op that is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kernels.exactness as exactness
from kernels import reference

SHAPES = {(64, 24), (24, 40), (160, 24), (24, 80), (260, 24), (50257, 16)}


def check(shapes: set[tuple[int, int]] = SHAPES) -> None:
    rest = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 20, "device": torch.device("cpu")}
    exactness.check_exact(shapes, biased_shapes=shapes, **rest)


@pytest.mark.parametrize("threads", [1, 2])
def test_passes_on_this_machine(threads: int, set_threads: Callable[[int], None]) -> None:
    set_threads(threads)
    check()


def linear_with_company(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias) + 1e-6 * len(x)


@pytest.mark.parametrize("threads", [1, 2])
def test_refuses_a_linear_that_depends_on_the_batch(
    threads: int, set_threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_threads(threads)
    monkeypatch.setattr(exactness, "invariant_linear", linear_with_company)
    with pytest.raises(RuntimeError, match=rf"linear 24 -> 64 differs by .* \({threads} threads.*numerics: fast"):
        check({(64, 24)})


@pytest.mark.parametrize(
    "attribute, named",
    [
        ("invariant_linear", "linear 16 -> 32"),
        ("rms_norm", "rms_norm of width 16"),
        ("swiglu", "swiglu of width 32"),
        ("geglu", "geglu of width 32"),
        ("distribution", "log_softmax of width 32"),
        ("attend_paged", "attention"),
    ],
)
def test_names_the_op_that_depends_on_the_batch(attribute: str, named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = getattr(exactness, attribute)

    def with_company(first: Tensor, *rest: Any) -> Tensor:
        return sound(first, *rest) * (1 + 1e-5 * len(first))

    monkeypatch.setattr(exactness, attribute, with_company)
    with pytest.raises(RuntimeError, match=f"but {named} differs"):
        check({(32, 16)})


def test_notices_an_attention_that_reads_the_wrong_page(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = exactness.plan_tiles

    def wrong(queries: Any, contexts: Any, tables: Any, *rest: Any, **named: Any) -> Any:
        return sound(queries, contexts, [[0, 1, 2]], *rest, **named)

    monkeypatch.setattr(exactness, "plan_tiles", wrong)
    with pytest.raises(RuntimeError, match="but attention differs"):
        check({(32, 16)})


@pytest.mark.parametrize("rows", [1, 8])
def test_one_bit_in_one_row_is_enough(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = exactness.invariant_linear

    def nudged(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        out = sound(x, weight, *bias)
        if len(x) == rows:
            out[-1, 0] = torch.nextafter(out[-1, 0], torch.tensor(torch.inf))
        return out

    monkeypatch.setattr(exactness, "invariant_linear", nudged)
    with pytest.raises(RuntimeError, match="linear 16 -> 32"):
        check({(32, 16)})


def test_notices_a_bias_that_depends_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = exactness.invariant_linear

    def with_company(x: Tensor, weight: Tensor, *bias: Tensor) -> Tensor:
        return sound(x, weight, *(b * (1 + 1e-5 * len(x)) for b in bias))

    monkeypatch.setattr(exactness, "invariant_linear", with_company)
    with pytest.raises(RuntimeError, match="linear 16 -> 32 with a bias"):
        check({(32, 16)})


def test_notices_a_window_that_depends_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned a block too narrow, single tokens lose keys that a longer tile still sees."""
    sound = exactness.plan_tiles

    def narrow(queries: Any, contexts: Any, tables: Any, device: torch.device, window: int | None, exact: bool) -> Any:
        return sound(queries, contexts, tables, device, window and 2, exact)

    monkeypatch.setattr(exactness, "plan_tiles", narrow)
    monkeypatch.setattr(exactness, "attend_paged", reference.attend_paged)  # the C++ twin reads no tiles
    with pytest.raises(RuntimeError, match="but windowed attention differs"):
        check({(32, 16)})
