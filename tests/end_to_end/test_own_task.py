"""The documented task of one's own, and the packaged GSM8K configs, run as they are written, on a tiny model."""

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

from rlhf.__main__ import main

PAGE = ROOT / "docs" / "own_task.md"
GSM8K = [pytest.param(file, id=file.stem) for file in sorted((ROOT / "configs").glob("gsm8k_*.yaml"))]
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


def test_the_packaged_configs_of_gsm8k_are_found() -> None:
    assert [param.id for param in GSM8K] == ["gsm8k_grpo_1gpu", "gsm8k_ppo_1gpu", "gsm8k_ppo_8gpu"]


@pytest.fixture
def gsm8k(tmp_path: Path) -> list[str]:
    """Overrides for a local sample with the columns of GSM8K."""
    splits = {"train": datasets.Dataset.from_list(QUESTIONS), "test": datasets.Dataset.from_list(QUESTIONS[:3])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "gsm8k")
    return [f"data.path={tmp_path / 'gsm8k'}", "data.subset=null"]


@pytest.mark.parametrize("config", GSM8K)
def test_a_gsm8k_config_dry_runs_on_a_local_sample(
    config: Path, chat_checkpoint: Path, tmp_path: Path, gsm8k: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """With its GPUs, ranks and memory; only the model is another one, of a shorter context."""
    tiny = [f"model.path={chat_checkpoint}", "rollout.max_tokens=512", f"run.dir={tmp_path / 'runs'}"]
    assert main(["train", str(config), "--dry-run", *tiny, *gsm8k]) == 0
    said = capsys.readouterr().out
    assert "12 training prompts (0 dropped as too long), 3 held out" in said
    assert ("colocated on 8 GPUs: policy 0-7" if "8gpu" in config.name else "colocated on 1 GPU: policy 0") in said
    assert ("roles       policy (trainer + engine), reward, reference, critic;" in said) == ("ppo" in config.name)
    system = "<bos><|im_start|>system\nFinish with #### and the number.<|im_end|>\n<|im_start|>user\nAnn has "
    assert f"the first prompt, as the model sees it:\n{system}0" in said
    assert said.count("reward of an empty answer to 'Ann has ") == 4
    assert said.count("0.0 {'right': 0.0, 'format': 0.0}") == 4
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("config", GSM8K)
def test_a_gsm8k_config_trains_on_a_local_sample(
    config: Path, tmp_path: Path, small: list[str], gsm8k: list[str]
) -> None:
    ppo = "ppo" in config.name
    shorter = ["algorithm.critic_warmup_steps=1"] * ppo  # 5 as packaged: the policy would not learn in two steps
    assert main(["train", str(config), *small, *gsm8k, *shorter]) == 0
    (folder,) = (tmp_path / "runs").glob("gsm8k-*/0001")
    rows = metrics_of(folder)
    assert [row["step"] for row in rows] == [1, 2] and {row["eval/step"] for row in rows} == {0, 2}
    for row in rows:
        assert row["reward/part/right"] <= row["reward/mean"] <= 1
        assert not ppo or (row["critic/lr"] > 0 and row["rollout/kl_coef"] == 0.001)
    assert all(row["rollout/logprob_gap_max"] == 0.0 < row["policy/lr"] for row in rows[ppo:])
    assert (folder / "checkpoints" / "latest" / "critic" / "hf" / "model.safetensors").exists() == ppo
