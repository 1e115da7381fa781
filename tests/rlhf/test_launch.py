"""Bad input is refused before a run folder, a process or a step exists."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes import arithmetic
from rlhf.config import Reward, load_config
from rlhf.judging import Judges
from rlhf.launch import dry_run, launch
from rlhf.roles.reward import RewardFunction
from rlhf.types import Completion, Prompt, Score

CONFIG = Path(__file__).parents[2] / "configs" / "arithmetic_grpo_cpu.yaml"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    arithmetic.initial_model(tmp_path / "model", 0)
    return tmp_path / "model"


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def forget_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def change_config(**entries: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"model\.safetensors is truncated or damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "lacks the weight files"),
        (forget_tokenizer, "has no tokenizer"),
        (change_config(model_type="gpt2"), r"model_type 'gpt2' is not supported; choose .*llama.*qwen3"),
        (change_config(num_hidden_layers=5), "is not a config that transformers accepts: .*layer_types"),
        (
            change_config(num_hidden_layers=5, layer_types=["full_attention"] * 5),
            r"lacks 11 tensors that its config\.json calls for",
        ),
        (change_config(max_position_embeddings=10), r"rollout\.max_tokens=5 make 11; .*context is 10"),
    ],
)
def test_a_damaged_checkpoint_is_refused_before_anything_starts(
    checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(checkpoint)
    config = load_config(CONFIG, [f"model.path={checkpoint}", f"run.dir={tmp_path / 'runs'}"])
    with pytest.raises(ValueError, match=f"(?s){message}"):
        launch(config)
    assert not (tmp_path / "runs").exists()


def test_a_whole_checkpoint_passes_the_same_checks(checkpoint: Path) -> None:
    assert "0.79 M parameters" in dry_run(load_config(CONFIG, [f"model.path={checkpoint}"]))


def test_a_recipe_without_what_the_config_asks_for_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "task.py"
    recipe.write_text("from recipes.arithmetic import initial_model, prompts, reward")
    with pytest.raises(ValueError, match=r"has no warm_start; set warm_start\.steps=0"):
        dry_run(load_config(CONFIG, [f"recipe.path={recipe}"]))
    recipe.write_text("from recipes.arithmetic import warm_start, prompts, reward")
    with pytest.raises(ValueError, match=r"has no initial_model; give model\.path"):
        dry_run(load_config(CONFIG, [f"recipe.path={recipe}"]))


def score_of(recipe: Path, columns: dict[str, object]) -> Score | None:
    """Of an empty answer."""
    role = Judges(Reward(), RewardFunction(recipe=str(recipe), section=Reward()), {}, seed=0)
    return role.score([Prompt(0, "a", (1,), columns)], [[Completion("a", "", (), "stop")]])[0].score


def test_every_column_reaches_the_reward_that_has_a_parameter_for_it(tmp_path: Path) -> None:
    recipe = tmp_path / "columns.py"
    recipe.write_text(
        "def prompts(split): return [{'prompt': 'a', 'answer': '1', 'level': 5}]\n"
        "def reward(completion, answer, level=0, **rest): return level + len(rest)\n"
    )
    assert score_of(recipe, {"prompt": "a", "answer": "1", "level": 5}) == Score(6.0)  # rest holds the prompt


def test_a_score_of_numpy_numbers_becomes_one_that_logs_can_hold(tmp_path: Path) -> None:
    recipe = tmp_path / "numbers.py"
    recipe.write_text(
        "import numpy as np\nfrom rlhf import Score\n"
        "def prompts(split): return [{'prompt': 'a'}]\n"
        "def reward(completion): return Score(np.float32(0.5), {'ok': np.bool_(True)})\n"
    )
    score = score_of(recipe, {"prompt": "a"})
    assert score is not None and json.dumps([score.value, score.parts]) == '[0.5, {"ok": 1.0}]'
