"""Critic and reference with weights of their own: refused early where they can't work, and what they start from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from recipes import arithmetic
from rlhf.config import ModelSection, Train, load_config
from rlhf.launch import launch
from rlhf.roles.critic import Critic
from rlhf.roles.reward_model import RewardModel
from rlhf.types import Batch
from rollout_engine.models.checkpoint import load_scalar_model, save_model

CONFIG = Path(__file__).parents[2] / "configs" / "arithmetic_grpo_cpu.yaml"
SMALL = ["algorithm.name=ppo", "run.steps=1", "warm_start.steps=0", "rollout.prompts_per_step=4", "cluster.threads=1",
         "rollout.kv_cache_gib=0.02", "eval.prompts=4", "cluster.kind=local", "tracking.wandb=disabled"]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``policy``, ``other``, another language model, and ``judge``, a reward model."""
    folder = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("policy", "other")):
        arithmetic.initial_model(folder / name, seed)
    judge = load_scalar_model(folder / "policy")
    torch.nn.init.normal_(judge.decoder.score.weight, generator=torch.Generator().manual_seed(0))
    save_model(judge, folder / "judge")
    return folder


@pytest.fixture
def models(made: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / "models"))


def rename_a_token(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"+":', '"plus":'))


def configure(**entries: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))

    return change


def forget_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


@pytest.mark.parametrize(("role", "start"), [("critic", "judge"), ("reference", "other")])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (shutil.rmtree, "' is not a folder; give a folder with config.json or a Hub id"),
        (rename_a_token, "has another tokenizer than the policy, whose token ids it is shown"),
        (forget_tokenizer, "has no tokenizer"),
        (configure(max_position_embeddings=10), "has a context of 10 tokens; a prompt with its answer may have 11"),
        (configure(num_hidden_layers=5, layer_types=["full_attention"] * 5), "lacks 11 tensors that its config.json"),
        (truncate, "is truncated or damaged"),
    ],
)
def test_weights_that_will_not_do_are_refused_before_anything_starts(
    models: Path, tmp_path: Path, role: str, start: str, damage: Callable[[Path], object], said: str
) -> None:
    words = [*SMALL, f"run.dir={tmp_path / 'runs'}", f"{role}.path={models / start}"]
    damage(models / start)
    with pytest.raises(ValueError) as caught:
        launch(load_config(CONFIG, words))
    assert str(caught.value).startswith(f"{role}.path: ") and said in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_reference_is_a_language_model(made: Path, tmp_path: Path) -> None:
    words = [*SMALL, f"run.dir={tmp_path / 'runs'}", f"reference.path={made / 'judge'}"]
    with pytest.raises(ValueError, match=r"^reference\.path: .*judge has a scalar head; the reference is a language"):
        launch(load_config(CONFIG, words))


def test_a_critic_starts_from_a_reward_model_and_a_reference_from_what_it_is_given(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The critic's first values are the reward model's scores of every beginning of an answer, to the bit."""
    seen: list[Batch] = []
    score = Critic.score

    def watched(self: Critic, batch: Batch) -> Batch:
        seen.append(score(self, batch))
        return seen[-1]

    monkeypatch.setattr(Critic, "score", watched)
    starts = [f"model.path={made / 'policy'}", f"critic.path={made / 'judge'}", f"reference.path={made / 'other'}"]
    folder = launch(load_config(CONFIG, [*SMALL, *starts, f"run.dir={tmp_path / 'runs'}"])).folder
    (batch,) = seen
    ends = torch.tensor(batch.lengths).cumsum(0).tolist()
    trained = batch.loss_mask.nonzero().flatten().tolist()
    starts_at = {
        t: end - length for end, length in zip(ends, batch.lengths, strict=True) for t in range(end - length, end)
    }
    beginnings = [tuple(batch.tokens[starts_at[t] : t].tolist()) for t in trained]
    judge = RewardModel(checkpoint=made / "judge", model=ModelSection(), train=Train(lr=0), timeout_s=60)
    values = batch.column("values")[batch.loss_mask]
    assert len(values) > 16 and torch.equal(values, torch.tensor(judge.judge(beginnings)))
    assert values.std() > 0.1
    (row,) = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert abs(row["rollout/kl"]) > 1e-3  # to the policy's own start it is 0
