"""One shortened seed of the quickstart, on Ray: it learns, and leaves behind what it promises."""

from __future__ import annotations

import gzip
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import command, environment, metrics_of
from wandb_file import history, records

STEPS, EVAL_PROMPTS = 100, 128


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    overrides = (f"run.steps={STEPS}", "eval.every=50", f"eval.prompts={EVAL_PROMPTS}", "checkpoint.every=50")
    done = subprocess.run(
        command(folder, *overrides), capture_output=True, text=True, timeout=900, env=environment(), cwd=folder
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "arithmetic-grpo" / "0001"


def test_it_learns_and_sampler_and_trainer_never_differ(run: Path) -> None:
    rows = metrics_of(run)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    before, after = rows[0]["eval/accuracy"], rows[-1]["eval/accuracy"]
    assert before <= 0.4 and after >= before + 0.15, (before, after)
    assert max(row["rollout/logprob_gap_max"] for row in rows) == 0.0
    assert [row["policy/version"] for row in rows] == list(range(1, STEPS + 1))
    assert rows[-1]["progress/samples"] == STEPS * 512


def test_the_run_folder_is_whole(run: Path) -> None:
    for name in (
        "config.yaml",
        "plan.txt",
        "environment.json",
        "train.log",
        "roles/policy-0.log",
        "roles/reward-0.log",
    ):
        assert (run / name).stat().st_size > 0, name
    assert (run / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert not list(run.rglob("*.tmp"))
    with gzip.open(run / "rollouts" / "000003.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 512 and {row["version"] for row in rows} == {2}
    for row in rows:
        a, b = row["prompt"].removesuffix("=").split("+")
        said = row["answer"][::-1]  # ones first
        assert (row["reward"] == 1.0) == (len(said) == 3 and said.isdigit() and int(said) == int(a) + int(b))
    assert len((run / "eval" / "000100.jsonl").read_text().splitlines()) == EVAL_PROMPTS
    log = (run / "train.log").read_text()
    assert "before" in log and "held-out accuracy" in log


def test_its_checkpoint_loads_in_transformers_and_answers_the_same(run: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert (run / "checkpoints" / "latest").resolve().name == "000100"
    assert sorted(p.name for p in (run / "checkpoints").iterdir() if p.name.isdigit()) == ["000050", "000100"]
    folder = run / "checkpoints" / "latest" / "hf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in (run / "eval" / "000100.jsonl").read_text().splitlines()][:24]
    for row in rows:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = model.generate(ids, do_sample=False, max_new_tokens=5, pad_token_id=tokenizer.pad_token_id)
        assert out[0, ids.shape[1] :].tolist() == row["token_ids"]


def test_wandb_kept_every_scalar_and_sample(run: Path) -> None:
    (file,) = run.rglob("*.wandb")
    rows = history(file)
    scalars = [row for row in rows if "reward/mean" in row]
    assert [row["progress/step"] for row in scalars] == list(range(1, STEPS + 1))
    logged = metrics_of(run)
    assert [row["reward/mean"] for row in scalars] == [row["reward/mean"] for row in logged]
    assert {"progress/samples", "progress/tokens", "rollout/logprob_gap_max", "time/train"} <= set(scalars[0])
    tables = [json.loads(p.read_text()) for p in run.rglob("media/table/samples_*.table.json")]
    assert len(tables) == STEPS and all(len(table["data"]) == 16 for table in tables)
    assert tables[0]["columns"] == [
        "step", "prompt", "answer", "reward", "parts", "advantage", "finish_reason", "version", "logprob",
    ]  # fmt: skip
    assert sorted({row[0] for table in tables for row in table["data"]}) == list(range(1, STEPS + 1))
    evals = [json.loads(p.read_text()) for p in run.rglob("media/table/eval/samples_*.table.json")]
    assert sorted({row[0] for table in evals for row in table["data"]}) == [0, 50, 100]
    (exit_record,) = [r for r in records(file) if r.WhichOneof("record_type") == "exit"]
    assert exit_record.exit.exit_code == 0


def test_bad_input_leaves_no_run_behind(run_training: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"rollout\.max_tokens=60"):
        run_training("rollout.max_tokens=60")
    assert not (tmp_path / "arithmetic-grpo").exists()


@pytest.mark.gpu
def test_the_quickstart_learns_in_bfloat16_on_a_gpu(run_training: Callable[..., Path]) -> None:
    overrides = ("cluster.gpus=1", "model.dtype=bfloat16", "rollout.numerics=fast", "tracking.wandb=disabled")
    rows = metrics_of(run_training(*overrides, timeout=1200))
    assert rows[0]["eval/accuracy"] <= 0.4 and rows[-1]["eval/accuracy"] >= 0.9
    assert max(row["rollout/logprob_gap_mean"] for row in rows) < 0.02
