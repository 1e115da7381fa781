"""The op bench: its numbers belong together, its peers answer the same question, and its errors see a wrong op."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import normal
from torch import Tensor

import kernels
from kernels import AttentionKind
from kernels.bench import __main__ as bench
from kernels.bench import attention_cases, measure, product_cases, timing
from kernels.bench.case import Bar, Case
from kernels.bench.report import asked
from kernels.bench.timing import Limits

CPU = torch.device("cpu")
QUANTISED = {"int8": 5e-3, "float8_e4m3fn": 5e-2}  # what storing in so few bits costs


def test_a_report_of_small_ops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = [tmp_path / f"report.{kind}" for kind in ("json", "md", "png")]
    words = [
        word for name, path in zip(("--json", "--markdown", "--plot"), where, strict=True) for word in (name, path)
    ]
    assert bench.main(["norms", "rope", "--budget", "0.01", *map(str, words)]) == 0
    report = json.loads(where[0].read_text())
    assert {row["op"] for row in report["cases"]} == {"rms_norm", "add_rms_norm", "rope", "rope_store"}
    for row in report["cases"]:
        assert row["error"]["ours"] < 1e-5
        assert row["ratio"] == pytest.approx(row["seconds"][row["best_peer"]] / row["seconds"]["ours"])
        assert row["of_limit"] == pytest.approx(row["bytes_per_s"] / report["limits"]["bytes_per_s"])
        assert row["extra_bytes"] is None and row["bars"] is None  # asked of a GPU
    assert len(where[1].read_text().splitlines()) == 4 + len(report["cases"])
    assert where[2].read_bytes()[:4] == b"\x89PNG"
    assert "rms_norm" in capsys.readouterr().out


@pytest.mark.parametrize("family", bench.FAMILIES)
def test_every_case_is_right_and_so_are_its_peers(family: str) -> None:
    for case in bench.chosen([family], CPU, torch.float32):
        inputs = case.make(0)
        bound = next((size for kept, size in QUANTISED.items() if case.op == "store_kv" and kept in case.name), 5e-6)
        for name, op in {"ours": case.ours, **case.peers}.items():
            assert measure.error(case, op, inputs) < bound, (case.op, case.label, name)
            timed = case.call(op, inputs)()
            assert case.timed == "forward" or torch.equal(
                timed[0], case.result(op, inputs)[0]
            )  # what is timed is right


def test_a_wrong_op_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "rope", lambda x, cos, sin: x.clone())
    case, *_ = bench.chosen(["rope"], CPU, torch.float32)
    assert measure.measured(case, CPU, Limits(1e9, 1e9), 0.01)["error"]["ours"] > 0.1


def test_a_peer_that_refuses_is_named_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*given: Tensor) -> Tensor:
        raise RuntimeError("no kernel for this\nand a stack")

    case, *_ = bench.chosen(["norms"], CPU, torch.float32)
    case = dataclasses.replace(case, peers=case.peers | {"other": refuses})
    row = measure.measured(case, CPU, Limits(1e9, 1e9), 0.01)
    assert row["refused"] == {"other": "RuntimeError: no kernel for this"} and row["best_peer"] == "torch"


def bars(bar: Bar | None, times: dict[str, float], **case: Any) -> dict[str, Any] | None:
    given = Case("op", "name", lambda seed: (), normal, {}, normal, bytes=8.0, bar=bar, **case)
    return measure.bars(given, times, Limits(bytes_per_s=4.0, flops=1.0))


def test_what_was_asked_and_reached() -> None:
    assert bars(None, {"ours": 1.0}) is None
    refused = bars(Bar(0.5, 0.9, "cuDNN"), {"ours": 1.0})
    assert refused is not None and refused["reached"] is None
    of_limit = bars(Bar(0.7, 0.9), {"ours": 2.5})  # 8 bytes take 2 s at best
    assert of_limit is not None and of_limit["reached"] == pytest.approx(0.8)
    gain = bars(Bar(0.9, 0.95, "apart", unit=4.0), {"ours": 1.0, "apart": 3.0})
    assert gain is not None and gain["reached"] == pytest.approx(0.75)


VERDICTS = [(0.69, "MISSED"), (0.7, "floor reached"), (0.9, "aim reached"), (None, "not judged, it refused")]


@pytest.mark.parametrize("reached, verdict", VERDICTS)
def test_verdicts(reached: float | None, verdict: str) -> None:
    row = {"bars": {"of": "limit", "floor": 0.7, "aim": 0.9, "reached": reached, "extra_bytes": 1e9}}
    assert asked(row | {"extra_bytes": 10**9}).endswith(verdict)
    assert asked(row | {"extra_bytes": 10**9 + 1}).endswith("memory MISSED, 1000 MB at most")


@pytest.mark.parametrize("kind", [AttentionKind(), AttentionKind(window=40, softcap=2.0)])
def test_flex_attention_is_asked_the_same(kind: AttentionKind) -> None:
    """It is a peer on a GPU only, where it is compiled."""
    q, k, v = (normal(128, heads, 16, seed=heads, dtype=torch.float64) for heads in (4, 2, 2))
    peer = attention_cases.flex(kind, 2, 64, CPU, compile=False)
    for at in (slice(64), slice(64, 128)):
        wanted = attention_cases.attend(q[at], k[at], v[at], kind)
        torch.testing.assert_close(peer(q, k, v)[at], wanted, rtol=1e-9, atol=1e-9)


def test_the_recomputed_peer_holds_one_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_cases, "CHUNK", 64)
    *_, case = bench.chosen(["token_logprobs"], CPU, torch.float32)
    inputs = case.make(0)
    rows, vocabulary = len(inputs[0]), len(inputs[1])

    def kept(op: Any) -> int:
        """Numbers of logits that the graph holds between forward and backward."""
        total = 0

        def pack(t: Tensor) -> Tensor:
            nonlocal total
            total += t.numel() if t.shape[-1:] == (vocabulary,) else 0
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            op(*inputs[:-1])
        return total

    assert kept(case.peers["chunked matmul"]) >= rows * vocabulary
    assert kept(case.peers["chunked, recomputed"]) == 0


def test_on_a_gpu_a_round_is_queued_before_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU that takes 3 ms a call, whenever it is let go: the launches' own time isn't in the result."""
    log: list[str] = []
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.at - self.at)

    def call() -> None:
        log.append("call")
        clock[0] += 3e-3

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(f"sleep {cycles}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: log.append("wait"))
    assert timing._gpu_seconds([call] * 25, launch_s=1e-4) == pytest.approx(3e-3)
    assert log == ["sleep 6000000", *["call"] * 20, "wait", "sleep 1500000", *["call"] * 5, "wait"]
