"""The op bench: its numbers belong together, and its error column sees an op that is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import kernels
from kernels.bench import __main__ as bench
from kernels.bench.timing import Limits


def test_a_report_of_small_ops(tmp_path: Path) -> None:
    where = tmp_path / "report.json", tmp_path / "report.png"
    assert bench.main(["rms_norm", "rope", "--budget", "0.01", "--json", str(where[0]), "--plot", str(where[1])]) == 0
    report = json.loads(where[0].read_text())
    assert {row["op"] for row in report["cases"]} == {"rms_norm", "rope"}
    for row in report["cases"]:
        assert row["error"]["ours"] < 1e-5
        assert row["ratio"] == pytest.approx(row["seconds"][row["best_peer"]] / row["seconds"]["ours"])
        assert row["of_limit"] == pytest.approx(row["bytes_per_s"] / report["limits"]["bytes_per_s"])
    assert where[1].read_bytes()[:4] == b"\x89PNG"


def test_a_wrong_op_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "rope", lambda x, cos, sin: x.clone())
    device = torch.device("cpu")
    (case,) = bench.chosen(["rope"], device, torch.float32)
    assert bench.measured(case, device, Limits(1e9, 1e9), 0.01)["error"]["ours"] > 0.1
