"""The engine's bench runs, counts what it says it counts, and writes the numbers it shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rollout_engine.bench import ours, serving
from rollout_engine.bench.__main__ import main
from rollout_engine.bench.load import Load, random_model


def test_the_load_is_skewed_and_always_the_same() -> None:
    load = Load.make(4096, prompts=16, samples=8, mean=70, cap=256)
    lengths = [n for _, n in load.requests()]
    assert load == Load.make(4096, prompts=16, samples=8, mean=70, cap=256)
    assert len(lengths) == 128 and max(lengths) == load.longest == 256 and load.useful_tokens == sum(lengths)
    assert 55 < sum(lengths) / 128 < 85 and sorted(lengths)[64] < 65  # the median lies below the mean
    assert all(20 <= len(prompt) <= 90 for prompt in load.prompts)


def test_a_static_batch_runs_every_answer_to_the_longest_and_continuous_batching_none() -> None:
    llm = ours.make_engine(random_model("tiny"))
    load = Load.make(256, prompts=3, samples=2, mean=8, cap=20)
    for run, sampled in ((ours.continuous, load.useful_tokens), (ours.static, 6 * load.longest)):
        steps = run(llm, load)
        assert sum(steps.sampled) == sampled
        assert sum(steps.layers) < steps.total
        assert {len(column) for column in vars(steps).values()} == {len(steps.seconds)}
    assert ours.matmul_seconds(llm.model, steps) > 0
    assert sum(row["steps"] for row in ours.by_rows(steps)) <= len(steps.seconds)


def test_the_bench_writes_the_numbers_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"--repeats": 1, "--threads": 1, "--prompts": 2, "--samples": 2, "--mean": 4, "--cap": 6}
    args = ["--models", "tiny", "--page-sizes", "32", "64", *(str(x) for pair in small.items() for x in pair)]
    assert main([*args, "--json", str(tmp_path / "bench.json")]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())["models"]["tiny"]
    rates = found["tokens_per_s"]
    assert set(rates) == {
        *("onpolicy", "onpolicy, static batch", "transformers, continuous", "transformers, padded", "matmuls alone"),
    }
    assert all(rate > 0 for rate in rates.values())
    assert found["ratio"]["transformers, padded"] == pytest.approx(rates["onpolicy"] / rates["transformers, padded"])
    assert found["settings"]["transformers, continuous"]["page_size"] in (32, 64) and len(found["tried"]) == 2
    printed = capsys.readouterr().out
    for name, rate in rates.items():
        assert f"{name:<28}{rate:>10.0f}" in printed
    assert list(tmp_path.iterdir()) == [tmp_path / "bench.json"]


def test_serving_one_shape(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "serving.json"
    assert main(["--shape", "tiny", "--requests", "2", "--kv-cache-gib", "0.1", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["tokens_per_s"] == pytest.approx(found["tokens"] / found["seconds"])
    assert f"2 requests, {found['tokens']} tokens" in capsys.readouterr().out


def test_what_graphs_gain_is_asked_of_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    found = serving.decode("tiny", [1, 2], kv_cache_gib=0.01, device=torch.device("cpu"), tokens=16)
    assert set(found["tokens_per_s"]) == {"1", "2"}
    assert all(rate > 0 for rates in found["tokens_per_s"].values() for rate in rates.values())
    assert len(serving.decode_table(found).splitlines()) == 4
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            main(["--shape", "1B", "--decode", "1", "8"])
        assert "CUDA graphs" in capsys.readouterr().err
