"""The warm start trains on the recipe's answers, in order, and ends at its loss or its last step."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from recipes import arithmetic
from rlhf.config import load_config
from rlhf.data import Renderer
from rlhf.recipe import load_recipe
from rlhf.run_folder import RunFolder
from rlhf.tracking.console import Console
from rlhf.types import Batch
from rlhf.warm_start import warm_start
from rollout_engine.models.checkpoint import load_tokenizer

CONFIG = Path(__file__).parents[2] / "configs" / "arithmetic_grpo_cpu.yaml"


class FakePolicy:
    """Loss 2.0, 1.9, 1.8, ...; keeps what it was given."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.saved: Path | None = None

    def update(self, batch: Batch) -> dict[str, float]:
        self.batches.append(batch)
        return {"policy/loss": 2.1 - 0.1 * len(self.batches)}

    def publish(self) -> None:
        self.published = len(self.batches)

    def save(self, folder: Path) -> None:
        assert self.published == len(self.batches), "what is saved is what was published"
        self.saved = folder


class FakeCluster:
    def __init__(self) -> None:
        self.policy = FakePolicy()
        self.asked: dict[str, Any] = {}
        self.stopped: list[Any] = []

    def spawn(self, name: str, role: Any, **kwargs: Any) -> Any:
        self.asked = kwargs
        return self.policy

    def stop(self, role: Any) -> None:
        self.stopped.append(role)


# The mean of eight losses 2.1 - 0.1 k ending at step s is 2.45 - 0.1 s.
@pytest.mark.parametrize(("until", "steps"), [(0.0, 20), (1.66, 8), (1.651, 8), (1.649, 9), (1.0, 15)])
def test_it_ends_at_the_loss_or_at_the_last_step(tmp_path: Path, until: float, steps: int) -> None:
    arithmetic.initial_model(tmp_path / "model", 0)
    tokenizer = load_tokenizer(tmp_path / "model")
    overrides = [
        "warm_start.steps=20",
        f"warm_start.until_loss={until}",
        "warm_start.batch_size=3",
        "train.zero_stage=2",
    ]
    config = load_config(CONFIG, overrides)
    cluster, console = FakeCluster(), Console(tmp_path / "train.log")
    run = RunFolder(tmp_path)
    recipe = load_recipe("recipes.arithmetic")
    folder = warm_start(config, recipe, tokenizer, tmp_path / "model", cluster, run, console)
    console.close()
    policy = cluster.policy
    assert len(policy.batches) == steps
    assert folder == policy.saved == tmp_path / "warm_start" and cluster.stopped == [policy]
    assert cluster.asked["train"].lr == config.warm_start.lr and cluster.asked["train"].zero_stage == 2
    rows = list(itertools.islice(arithmetic.warm_start(config.run.seed), 3 * steps))
    for batch, wanted in zip(policy.batches, _threes(rows), strict=True):
        parts = [tokenizer.decode(part, skip_special_tokens=False) for part in batch.tokens.split(batch.lengths)]
        assert parts == [f"{prompt}{answer}<eos>" for prompt, answer in wanted]
        assert batch.loss_mask.sum() == sum(len(answer) + 1 for _, answer in wanted)
        assert batch.column("loss_weights").sum().item() == pytest.approx(1)
    assert f"warm start {steps}/20" in (tmp_path / "train.log").read_text()


def test_prompts_are_rendered_as_the_rl_will_render_them(chat_checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(chat_checkpoint)
    (tmp_path / "task.py").write_text(
        "def reward(completion): return 1.0\ndef warm_start(seed):\n    while True: yield 'hi', 'hello'"
    )
    config = load_config(CONFIG, ["warm_start.steps=1", "warm_start.batch_size=1", "data.system=Be brief."])
    cluster, console = FakeCluster(), Console(tmp_path / "train.log")
    recipe = load_recipe(str(tmp_path / "task.py"))
    warm_start(config, recipe, tokenizer, chat_checkpoint, cluster, RunFolder(tmp_path), console)
    console.close()
    (batch,) = cluster.policy.batches
    prompt, _, _ = Renderer(config.data, tokenizer)("hi")
    assert prompt.startswith("<bos><|im_start|>system\nBe brief.")
    assert tokenizer.decode(batch.tokens) == f"{prompt}hello<|im_end|>"
    assert tokenizer.decode(batch.tokens[batch.loss_mask]) == "hello<|im_end|>"


def _threes(rows: list[tuple[str, str]]) -> list[list[tuple[str, str]]]:
    return [rows[i : i + 3] for i in range(0, len(rows), 3)]
