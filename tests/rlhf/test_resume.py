"""A resumed run is the uninterrupted one, bit by bit; one whose role dies goes on by itself; bad input is refused."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_deepspeed_contract import STAGES, weights
from test_training_exactness import rollout

from rlhf.__main__ import main
from rlhf.backends.deepspeed import DeepSpeedBackend
from rlhf.cluster import RoleDied
from rlhf.config import Config, load_config
from rlhf.launch import launch, resume
from rlhf.roles.policy import Policy
from rlhf.run_folder import RunFolder
from rlhf.tracking import Tracker

sys.path.append(str(Path(__file__).parents[1] / "end_to_end"))
from wandb_file import history

CONFIG = Path(__file__).parents[2] / "configs" / "arithmetic_grpo_cpu.yaml"
MOVING = ("time/", "throughput/", "memory/", "swap/gib_per_s")

# An untrained model earns nothing on sums; this pays for every 5. Sixteen prompts: an epoch is four steps.
RECIPE = """
import itertools
from recipes import arithmetic
from recipes.arithmetic import initial_model, warm_start

def prompts(split):
    return itertools.islice(arithmetic.prompts(split), 16 if split == "train" else 4)

def reward(completion):
    return completion.text.count("5") / 5
"""

GRPO = ["algorithm.kl_coef=0.05", "algorithm.updates_per_rollout=2", "reward.shuffle=true"]
# No KL reaches its target: the coefficient falls again and again, and is never what it was before.
ADAPTIVE = ["algorithm.kl_coef=0.05", "algorithm.kl_target=1000"]
PPO = ["algorithm.name=ppo", *ADAPTIVE, "algorithm.epochs=1"]
PPO += ["algorithm.critic_warmup_steps=2"]  # at the first of the checkpoints below the policy has taken no step
DAPO = ["algorithm.name=dapo", *ADAPTIVE]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "fives.py"
    file.write_text(RECIPE)
    return file


@pytest.fixture(scope="module")
def make_config(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Config]:
    def make(*overrides: str) -> Config:
        return load_config(
            CONFIG,
            [
                f"recipe.path={recipe}",
                f"run.dir={tmp_path_factory.mktemp('runs')}",
                "run.steps=5",
                "warm_start.steps=0",
                "rollout.prompts_per_step=4",
                "rollout.samples_per_prompt=3",
                "rollout.kv_cache_gib=0.02",
                "train.lr=3e-3",
                "eval.every=2",
                "eval.prompts=4",
                "checkpoint.every=1",
                "cluster.kind=local",
                "cluster.threads=1",
                "tracking.wandb=disabled",
                *overrides,
            ],
        )

    return make


class Killed(BaseException):
    """Nothing in the run expects it."""


def run_until(config: Config, step: int) -> Path:
    """The folder of a run that is ended in the middle of ``step``."""
    log = Tracker.log

    def killing(self: Tracker, now: int, metrics: dict[str, float]) -> None:
        log(self, now, metrics)
        if now == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "log", killing)
        with pytest.raises(Killed):
            launch(config)
    return max((config.run.dir / config.run.name).iterdir())


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(MOVING)} for row in rows]


def files_of(folder: Path) -> dict[str, bytes]:
    """The weights that the run ended with, and the answers of every step."""
    kept = [*folder.glob("checkpoints/latest/**/*.safetensors"), *folder.glob("rollouts/*"), *folder.glob("eval/*")]
    return {str(file.relative_to(folder)): file.read_bytes() for file in kept}


# ---------------------------------------------------------------- a role


@STAGES
def test_a_loaded_policy_goes_on_bit_by_bit(make_policy: Callable[..., Policy], tmp_path: Path, stage: int) -> None:
    """Same answers, same gradient, same step, same versions: optimizer, masters, schedule and engine are all there."""
    settings = {"zero_stage": stage, "lr": 1e-3, "schedule": "linear", "warmup_steps": 5}
    first = make_policy(**settings)
    for seed in range(2):
        first.update(rollout(first, seed))
        first.publish()
    first.save_state(tmp_path / "state")
    second = make_policy(**settings)
    second.load_state(tmp_path / "state")
    assert second.llm.weight_version == 2
    found = []
    for policy in (first, second):
        batch = rollout(policy, 5)
        metrics = policy.update(batch)
        found.append((batch.tokens, batch.rollout_logprobs, metrics, policy.publish().version, weights(policy)))
    (tokens, logprobs, metrics, version, moved), again = found
    assert torch.equal(tokens, again[0]) and torch.equal(logprobs, again[1])
    assert metrics == again[2] and version == again[3] == 3
    assert all(torch.equal(moved[name], again[4][name]) for name in moved)
    second.llm.check_integrity()


# ---------------------------------------------------------------- a run


@pytest.fixture(scope="module", params=["grpo", "ppo", "dapo"])
def whole(request: pytest.FixtureRequest, make_config: Callable[..., Config]) -> Iterator[tuple[list[str], Path]]:
    """Overrides, and the folder of a run that nothing has interrupted."""
    overrides = {"grpo": GRPO, "ppo": PPO, "dapo": DAPO}[request.param]
    yield overrides, launch(make_config(*overrides)).folder


@pytest.mark.parametrize("step", [3, 5])
def test_a_resumed_run_is_the_uninterrupted_one(
    whole: tuple[list[str], Path], make_config: Callable[..., Config], step: int
) -> None:
    """Killed in step 3, amid an epoch, or 5, the first of the next one; the checkpoint is of the step before."""
    overrides, uninterrupted = whole
    folder = run_until(make_config(*overrides), step)
    assert [row["step"] for row in metrics_of(folder)][-1] == step
    assert (folder / "checkpoints" / "latest").readlink() == Path(f"{step - 1:06d}")
    assert f"to go on: rlhf train --resume {folder}" in (folder / "train.log").read_text()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "rew')  # a kill may cut a line short
    assert resume(folder).folder == folder
    assert metrics_of(folder) == metrics_of(uninterrupted)
    assert files_of(folder) == files_of(uninterrupted)
    assert f"goes on after step {step - 1}" in (folder / "train.log").read_text()


def test_more_steps_are_as_if_they_had_been_asked_for_at_first(make_config: Callable[..., Config]) -> None:
    overrides = [*GRPO, "train.schedule=constant", "eval.every=2", "checkpoint.keep_last=9"]
    folder = launch(make_config(*overrides, "run.steps=2")).folder
    resume(folder, ["run.steps=4", "checkpoint.every=2"])
    whole = launch(make_config(*overrides, "run.steps=4")).folder
    assert metrics_of(folder) == metrics_of(whole) and files_of(folder) == files_of(whole)
    assert load_config(folder / "config.yaml").run.steps == 4


@pytest.mark.parametrize("whole", ["ppo", "dapo"], indirect=True)
def test_the_kl_coefficient_had_moved_where_a_run_above_resumes(whole: tuple[list[str], Path]) -> None:
    """In step 5 that of both, in step 3 that of DAPO: PPO's waits while the critic warms up."""
    falls = [0, 0, 0, 1, 2] if "algorithm.name=ppo" in whole[0] else [0, 1, 2, 3, 4]
    found = [row["rollout/kl_coef"] for row in metrics_of(whole[1])]
    assert found == pytest.approx([0.05 / 1.1**n for n in falls], rel=1e-12)


@pytest.mark.parametrize("whole", ["dapo"], indirect=True)
def test_groups_were_left_over_where_a_run_above_resumes(whole: tuple[list[str], Path]) -> None:
    assert metrics_of(whole[1])[1]["rollout/surplus"] > 0  # after step 2


def test_wandb_goes_on_with_the_same_run(make_config: Callable[..., Config]) -> None:
    folder = run_until(make_config(*GRPO, "tracking.wandb=offline", "run.steps=2"), 2)
    resume(folder)
    (run_id,) = {path.name.rsplit("-", 1)[1] for path in folder.glob("wandb/offline-run-*")}
    assert (folder / "wandb_id.txt").read_text() == run_id
    logged = [row for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")) for row in history(file)]
    assert [row["progress/step"] for row in logged if "reward/mean" in row] == [1, 2, 2]


# ---------------------------------------------------------------- recovery


@contextmanager
def deaths(*steps: int) -> Iterator[list[int]]:
    """The policy dies at the end of these steps, one after another; the steps that were done."""
    left, log, done = list(steps), Tracker.log, []

    def dying(self: Tracker, step: int, metrics: dict[str, float]) -> None:
        log(self, step, metrics)
        done.append(step)
        if left and left[0] == step:
            left.pop(0)
            raise RoleDied("role policy (pid 7) died during update(); last lines of its log:\nout of luck")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "log", dying)
        yield done


@pytest.mark.parametrize("whole", ["grpo"], indirect=True)
def test_a_run_whose_role_dies_goes_on_by_itself(
    whole: tuple[list[str], Path], make_config: Callable[..., Config]
) -> None:
    """First before there is a checkpoint, then after one, and twice in the same step."""
    overrides, uninterrupted = whole
    with deaths(1, 4, 4) as done:
        folder = launch(make_config(*overrides, "checkpoint.every=2")).folder
    assert done == [1, 1, 2, 3, 4, 3, 4, 3, 4, 5]
    assert metrics_of(folder) == metrics_of(uninterrupted)
    assert files_of(folder) == files_of(uninterrupted)
    log = (folder / "train.log").read_text()
    assert log.count("role policy (pid 7) died during update(); last lines of its log:\nout of luck") == 3
    assert "restart 3 of at most 3" in log and log.count("goes on after step 2\n") == 2


def test_restarts_are_bounded_and_the_warm_start_is_done_once(make_config: Callable[..., Config]) -> None:
    config = make_config("warm_start.steps=1", "warm_start.batch_size=4", "run.steps=2", "checkpoint.max_restarts=2")
    with deaths(1, 1, 1) as done, pytest.raises(RoleDied, match="out of luck"):
        launch(config)
    assert done == [1, 1, 1]
    folder = config.run.dir / config.run.name / "0001"
    assert (folder / "train.log").read_text().count("warm start 1/1") == 1
    assert len(resume(folder).after.trajectories) == 4  # a person may try once more


def test_what_is_wrong_with_the_input_is_not_tried_again(make_config: Callable[..., Config]) -> None:
    with deaths() as done, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "samples", lambda *_: (_ for _ in ()).throw(ValueError("no good")))
        with pytest.raises(ValueError, match="no good"):
            launch(make_config())
    assert done == [1]


# ---------------------------------------------------------------- refusals


@pytest.fixture(scope="module")
def finished(make_config: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, on data and with a recipe of its own."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "sums.jsonl").write_text("".join(json.dumps({"prompt": f"{i}+1=", "n": i}) + "\n" for i in range(9)))
    (folder / "task.py").write_text("from recipes.arithmetic import initial_model\ndef reward(completion, n): return n")
    return launch(
        make_config(
            f"data.path={folder / 'sums.jsonl'}",
            f"recipe.path={folder / 'task.py'}",
            "eval.prompts=1",
            "run.steps=1",
        )
    ).folder


def test_a_finished_run_says_so(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = metrics_of(finished)
    assert main(["train", "--resume", str(finished)]) == 2
    assert "has finished: 1 steps are done" in (error := capsys.readouterr().err)
    assert f"rlhf train --resume {finished} run.steps=2" in error
    assert metrics_of(finished) == before


def test_resume_goes_through_the_command_line(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(finished, folder, symlinks=True)
    assert main(["train", "--resume", str(folder), "run.steps=2", "eval.every=1"]) == 0
    assert [row["step"] for row in metrics_of(folder)] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.lr=1"], "train.lr=1.0 would make another run"),
        (["data.prompt=n"], "data.prompt=n would make another run"),
        (["run.seed=1"], "run.seed=1 would make another run"),
        (["algorithm.kl_coef=1"], "algorithm.kl_coef=1.0 would make another run"),
        (["cluster.ranks=2"], "cluster.ranks=2 would make another run"),
        (["eval.prompts=2"], "eval.prompts=2 would make another run"),
        (["run.step=3"], "did you mean 'run.steps'"),
        (["config.yaml"], "is not of the form section.key=value"),
        (["--dry-run"], "give one of the two"),
    ],
)
def test_what_would_make_another_run_is_refused(
    finished: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["train", "--resume", str(finished), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--resume", str(tmp_path)]) == 2
    assert "is no folder of a run" in capsys.readouterr().err
    assert main(["train"]) == 2
    assert "--resume with a run folder" in capsys.readouterr().err


def test_a_run_that_is_at_work_is_left_alone(finished: Path) -> None:
    with RunFolder(finished).locked(), pytest.raises(ValueError, match="another process is at work on"):
        resume(finished, ["run.steps=2"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[:-1], "8 training prompts became 7"),
        (lambda rows: [rows[1], rows[0], *rows[2:]], "training prompts differ|held-out prompts differ"),
        (lambda rows: [{**row, "n": -row["n"]} for row in rows], "columns of the training rows differ"),
        (lambda rows: [{**row, "prompt": "7+7="} for row in rows], "the training prompts differ"),
    ],
)
def test_changed_data_is_detected(
    finished: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]], message: str
) -> None:
    file = Path(str(load_config(finished / "config.yaml").data.path))
    text = file.read_text()
    rows = change([json.loads(line) for line in text.splitlines()])
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        with pytest.raises(ValueError, match=f"the data is no longer what .* was trained on: .*({message})"):
            resume(finished, ["run.steps=2"])
    finally:
        file.write_text(text)


def test_a_run_whose_every_update_is_skipped_does_not_pass_for_one_that_learnt(
    make_config: Callable[..., Config],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeepSpeedBackend, "_grad_norm", lambda self: math.nan)
        result = launch(make_config("run.steps=1", "train.zero_stage=0"))
    assert not result.learnt
    assert "NOTHING WAS LEARNT: all 1 updates" in (result.folder / "train.log").read_text().splitlines()[-1]
