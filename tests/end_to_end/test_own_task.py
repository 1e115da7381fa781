"""The documented task of one's own, and the packaged GSM8K config, run as they are written, on a tiny model."""

from __future__ import annotations

import gzip
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from command_line import ROOT, environment, metrics_of

PAGE = ROOT / "docs" / "own_task.md"
GSM8K = ROOT / "configs" / "gsm8k_grpo_1gpu.yaml"
QUESTIONS = [{"question": f"Ann has {n} apples and buys {n}.", "answer": f"{n}+{n}\n#### {2 * n}"} for n in range(12)]


def fences() -> dict[str, str]:
    """Fenced blocks of the page, by language."""
    return dict(re.findall(r"^```(\w+)\n(.*?)^```$", PAGE.read_text(), re.M | re.S))


@pytest.fixture
def small(chat_checkpoint: Path, tmp_path: Path) -> list[str]:
    """What a machine without a GPU and without the Hub overrides."""
    return [
        f"model.path={chat_checkpoint}", "model.dtype=float32", f"run.dir={tmp_path / 'runs'}", "run.steps=2",
        "rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "rollout.max_tokens=8",
        "rollout.kv_cache_gib=0.02", "rollout.numerics=exact", "train.tokens_per_microbatch=1024",
        "cluster.kind=local", "cluster.gpus=0", "cluster.threads=1", "eval.prompts=4", "tracking.wandb=disabled",
    ]  # fmt: skip


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(), cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def answers(folder: Path) -> list[dict[str, object]]:
    with gzip.open(folder / "rollouts" / "000002.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


def test_the_page_stays_short() -> None:
    assert sum(len(block.splitlines()) for block in fences().values()) < 30


def test_the_documented_task_runs_as_it_is_written(tmp_path: Path, small: list[str]) -> None:
    blocks = fences()
    (tmp_path / "my_task.py").write_text(blocks["python"])
    (tmp_path / "my_task.jsonl").write_text(blocks["json"])
    script = f'set -e\nrlhf() {{ {shlex.quote(sys.executable)} -m rlhf "$@"; }}\n{blocks["sh"].rstrip()}'
    run(["bash", "-c", f"{script} {shlex.join(small)}"], tmp_path)
    folder = tmp_path / "runs" / "my-task" / "0001"
    rows = metrics_of(folder)
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["reward/errors"] == row["reward/timeouts"] == 0 for row in rows)
    assert all(0 <= row["reward/part/valid"] <= 1 and row["rollout/logprob_gap_max"] == 0.0 for row in rows)
    tickets = [json.loads(line)["ticket"] for line in blocks["json"].splitlines()]
    for row in answers(folder):
        prompt = str(row["prompt"])
        assert prompt.startswith("<bos><|im_start|>system\nAnswer with") and prompt.count("<bos>") == 1
        assert sum(f"<|im_start|>user\n{ticket}<|im_end|>" in prompt for ticket in tickets) == 1


@pytest.mark.parametrize(
    ("text", "value", "valid"),
    [
        ('{"team": "billing"}', 1.0, 1.0),
        ('{"team": "login"}', 0.2, 1.0),
        ('{"team": ["billing", "login", "delivery"]}', 0.0, 1.0),
        ("billing", 0.0, 0.0),
        ("5", 0.0, 0.0),
        ("[]", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_the_documented_reward_is_sound(text: str, value: float, valid: float) -> None:
    from rlhf import Completion, Score

    namespace: dict[str, object] = {}
    exec(fences()["python"], namespace)
    reward = namespace["reward"]
    assert callable(reward)
    assert reward(Completion("", text, (1,), "stop"), "billing") == Score(value, {"valid": valid})


@pytest.fixture
def gsm8k(tmp_path: Path) -> list[str]:
    """Overrides for a local sample with the columns of GSM8K."""
    splits = {"train": datasets.Dataset.from_list(QUESTIONS), "test": datasets.Dataset.from_list(QUESTIONS[:3])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "gsm8k")
    return [f"data.path={tmp_path / 'gsm8k'}", "data.subset=null"]


def test_the_gsm8k_config_dry_runs_on_a_local_sample(tmp_path: Path, small: list[str], gsm8k: list[str]) -> None:
    command = [sys.executable, "-m", "rlhf", "train", str(GSM8K), "--dry-run"]
    said = run([*command, *small, *gsm8k], tmp_path)
    assert "12 training prompts (0 dropped as too long), 3 held out" in said
    system = "<bos><|im_start|>system\nFinish with #### and the number.<|im_end|>\n<|im_start|>user\nAnn has "
    assert f"the first prompt, as the model sees it:\n{system}0" in said
    assert said.count("reward of an empty answer to 'Ann has ") == 4
    assert said.count("0.0 {'right': 0.0, 'format': 0.0}") == 4
    assert not (tmp_path / "runs").exists()


def test_the_gsm8k_config_trains_on_a_local_sample(tmp_path: Path, small: list[str], gsm8k: list[str]) -> None:
    run([sys.executable, "-m", "rlhf", "train", str(GSM8K), *small, *gsm8k], tmp_path)
    rows = metrics_of(tmp_path / "runs" / "gsm8k-grpo" / "0001")
    assert [row["step"] for row in rows] == [1, 2] and {row["eval/step"] for row in rows} == {0, 2}
    for row in rows:
        assert row["reward/part/right"] <= row["reward/mean"] <= 1 and row["rollout/logprob_gap_max"] == 0.0
