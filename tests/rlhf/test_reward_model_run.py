"""`rlhf reward-model CONFIG`: what a run leaves, and what it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForSequenceClassification

from rlhf.__main__ import main
from rlhf.cluster import RoleDied
from rlhf.config import Data, ModelSection, Train
from rlhf.data import Renderer, read_jsonl
from rlhf.reward_model.config import PairsSection, load_config
from rlhf.reward_model.launch import launch, resume
from rlhf.reward_model.pairs import tokenize_pairs
from rlhf.roles.reward_model import RewardModel
from rlhf.tracking import MetricLog
from rollout_engine.models.checkpoint import load_tokenizer

PACKAGED = Path(__file__).parents[2] / "configs" / "arithmetic_reward_model_cpu.yaml"


@pytest.fixture
def write(chat_checkpoint: Path, tmp_path: Path) -> Callable[..., Path]:
    """A config of a run of seconds, on chats in JSONL files; keyword arguments change sections."""

    def rows(count: int) -> str:
        made = [
            {
                "prompt": [{"role": "user", "content": f"{i}+{i}="}],
                "chosen": str(2 * i),
                "rejected": [{"role": "assistant", "content": "?" * (1 + i % 5)}],
                "margin": i % 2,
                "kind": f"{1 + i % 5} marks",
            }
            for i in range(count)
        ]
        return "".join(json.dumps(row) + "\n" for row in made)

    def make(**changes: dict[str, Any]) -> Path:
        (tmp_path / "pairs").mkdir(exist_ok=True)
        (tmp_path / "pairs" / "train.jsonl").write_text(rows(20))
        (tmp_path / "pairs" / "test.jsonl").write_text(rows(6))
        tree: dict[str, dict[str, Any]] = {
            "run": {"name": "judge", "dir": str(tmp_path / "runs")},
            "model": {"path": str(chat_checkpoint)},
            "data": {"path": str(tmp_path / "pairs"), "eval_split": "test"},
            "pairs": {"batch_size": 6, "steps": 3},
            "train": {"lr": 1e-3, "tokens_per_microbatch": 64},
            "cluster": {"threads": 1},
            "eval": {"every": 2},
            "checkpoint": {"every": 2, "keep_last": 2},
            "tracking": {"wandb": "disabled"},
        }
        for section, keys in changes.items():
            tree[section] = {**tree.get(section, {}), **keys}
        (tmp_path / "judge.yaml").write_text(yaml.safe_dump(tree))
        return tmp_path / "judge.yaml"

    return make


def test_a_run_leaves_a_reward_model(write: Callable[..., Path], tmp_path: Path, chat_checkpoint: Path) -> None:
    assert main(["reward-model", str(write()), "pairs.center_coef=0.01", "pairs.compare=tokens"]) == 0
    run = tmp_path / "runs" / "judge" / "0001"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert [row["eval/step"] for row in rows] == [0, 2, 3]
    assert rows[0]["eval/accuracy"] == 0.5, "a head of zeros knows nothing: ties"
    assert {"reward_model/loss", "reward_model/grad_norm", "reward_model/lr", "time/eta"} <= set(rows[0])
    log = (run / "train.log").read_text()
    assert "20 pairs, 6 held out; dropped: 0 too long" in log and "step 3/3  loss" in log and "ETA 0:00" in log
    assert "5 marks" in log and "confidence" in log
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"000002", "000003", "latest", "best"}

    folder = run / "checkpoints" / "latest" / "hf"
    calibration = json.loads((folder / "calibration.json").read_text())
    assert set(calibration) == {"midpoint", "chosen", "rejected", "accuracy", "auc", "ece"}
    render = Renderer(Data(), load_tokenizer(chat_checkpoint))
    section = PairsSection(batch_size=1, steps=1)
    pairs, _ = tokenize_pairs(read_jsonl(tmp_path / "pairs" / "test.jsonl"), render, section)
    judge = RewardModel(checkpoint=folder, model=ModelSection(), train=Train(lr=0), timeout_s=60)
    chosen, rejected = (judge.judge([getattr(pair, name) for pair in pairs]) for name in ("chosen", "rejected"))
    assert calibration["chosen"] == pytest.approx(sum(chosen) / 6)
    assert calibration["rejected"] == pytest.approx(sum(rejected) / 6)
    assert calibration["midpoint"] == pytest.approx(sum(chosen + rejected) / 12)
    assert calibration["accuracy"] == sum(a > b for a, b in zip(chosen, rejected, strict=True)) / 6
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    assert theirs(torch.tensor([pairs[0].chosen])).logits.item() == pytest.approx(chosen[0], abs=1e-5)
    evaluation = json.loads((run / "eval" / "000003.json").read_text())
    assert len(evaluation["reliability"]) == 10 and sum(row["count"] for row in evaluation["reliability"]) == 6
    assert sum(kind["pairs"] for kind in evaluation["kinds"].values()) == 6


def test_the_same_seed_gives_the_same_bits(write: Callable[..., Path]) -> None:
    first, second = (launch(load_config(write())) for _ in range(2))
    assert torch.equal(first.after.scores, second.after.scores)
    assert first.folder != second.folder
    other = launch(load_config(write(), ["run.seed=1"]))
    assert not torch.equal(first.after.scores, other.after.scores)


def test_a_dry_run_starts_nothing(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(pairs={"steps": None, "epochs": 3}, recipe={})
    assert main(["reward-model", str(config), "--dry-run", "data.eval_split=null"]) == 0
    said = capsys.readouterr().out
    assert "9 steps of 6 pairs = 3.0 epochs" in said and "18 pairs, 2 held out" in said
    assert "<|im_start|>assistant\\n" in said and "?<|im_end|>'\nmargin 0" in said
    assert main(["reward-model", str(PACKAGED), "--dry-run"]) == 0
    assert "recipes.arithmetic_ppo.preferences" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["pairs.stepz=3"], "unknown key 'pairs.stepz'; did you mean 'pairs.steps'?"),
        (["paris.steps=3"], "unknown key 'paris'; did you mean 'pairs'?"),
        (["recipe.pth=x"], "unknown key 'recipe.pth'; did you mean 'recipe.path'?"),
        (["pairs.epochs=3"], "pairs.steps=3 and pairs.epochs=3: give one of the two"),
        (["pairs.steps=null"], "pairs.steps=None and pairs.epochs=None: give one of the two"),
        (["model.path=null"], "model.path and recipe.path are both missing"),
        (["warm_start.steps=4"], "warm_start.steps=4 needs a recipe with warm_start(seed)"),
        (["checkpoint.keep_best=eval/reward"], "checkpoint.keep_best=eval/reward: held-out pairs have no reward; set"),
        (["cluster.ranks=2"], "cluster.ranks=2: cluster.kind=local runs one rank; set cluster.kind=ray"),
        (["data.eval_split=null", "data.train_split=validation"], "data.train_split='validation'"),
        (["pairs.chosen=better"], "row 0: pairs want the column 'better'; the data has prompt, chosen"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    write: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    message: str,
) -> None:
    assert main(["reward-model", str(write()), *overrides]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("rlhf reward-model: ") and message in said[-1]
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_two_ranks_are_one(write: Callable[..., Path]) -> None:
    """Same held-out scores to rounding: Ray divides the pairs over two actors, local has them all."""
    scores = {}
    for ranks, kind in ((1, "local"), (2, "ray")):
        config = write(cluster={"kind": kind, "ranks": ranks}, train={"lr": 1e-4}, pairs={"steps": 2})
        scores[ranks] = launch(load_config(config)).after.scores
    assert scores[1].abs().min() > 1e-5
    assert torch.allclose(scores[1], scores[2], rtol=0, atol=1e-6)


# ---------------------------------------------------------------- going on


class Killed(BaseException):
    """Nothing in the run expects it."""


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int, error: BaseException) -> None:
    """Once, when ``step`` is done and its checkpoint is not yet written."""
    record, left = MetricLog.record, [error]

    def ending(self: MetricLog, row: dict[str, Any], line: str) -> None:
        record(self, row, line)
        if row["step"] == step and left:
            raise left.pop()

    monkeypatch.setattr(MetricLog, "record", ending)


def what_is_left(run: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Metrics that don't measure the machine; weights, calibration and evaluations."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    files = [*run.glob("checkpoints/latest/hf/*"), *run.glob("eval/*")]
    fixed = [{name: value for name, value in row.items() if not name.startswith(MOVING)} for row in rows]
    return fixed, {str(file.relative_to(run)): file.read_bytes() for file in files}


MOVING = ("time/", "throughput/", "memory/")
LONG = {"pairs": {"steps": 5}, "checkpoint": {"every": 1}, "train": {"schedule": "cosine", "lr": 1e-3}}


@pytest.fixture
def whole(write: Callable[..., Path]) -> tuple[Path, Any]:
    """A config of five steps, with an epoch's end in the fourth, and what a run without an interruption leaves."""
    config = write(**LONG)
    return config, what_is_left(launch(load_config(config)).folder)


@pytest.mark.parametrize("step", [1, 2, 4])
def test_a_resumed_run_is_the_uninterrupted_one(
    whole: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    config, uninterrupted = whole
    with monkeypatch.context() as patch:
        interrupt(patch, step, Killed())
        with pytest.raises(Killed):
            launch(load_config(config))
    run = tmp_path / "runs" / "judge" / "0002"
    assert f"to go on: rlhf reward-model --resume {run}" in (run / "train.log").read_text()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "rew')  # a kill may cut a line short
    assert main(["reward-model", "--resume", str(run), "checkpoint.keep_last=1"]) == 0
    assert what_is_left(run) == uninterrupted
    assert ("goes on after step" in (run / "train.log").read_text()) == (step > 1)


def test_a_run_whose_role_dies_goes_on_by_itself(whole: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config, uninterrupted = whole
    interrupt(monkeypatch, 3, RoleDied("role reward_model (pid 7) died during update()"))
    run = launch(load_config(config)).folder
    log = (run / "train.log").read_text()
    assert "(pid 7) died during update()\nrestart 1 of at most 3\ngoes on after step 2" in log
    assert what_is_left(run) == uninterrupted


def test_more_steps_are_as_if_they_had_been_asked_for_at_first(write: Callable[..., Path]) -> None:
    constant = {**LONG, "train": {"lr": 1e-3}, "eval": {"every": 2}}
    whole = launch(load_config(write(**constant))).folder
    run = launch(load_config(write(**constant), ["pairs.steps=2"])).folder
    assert what_is_left(resume(run, ["pairs.steps=5"]).folder) == what_is_left(whole)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "has finished: 3 of 3 steps are done. To train on, give it more: rlhf reward-model --resume"),
        (["train.lr=1"], "train.lr=1.0 would make another run"),
        (["pairs.batch_size=2"], "pairs.batch_size=2 would make another run"),
        (["run.seed=1"], "On resume these can change: pairs.steps, pairs.epochs, eval.every, checkpoint, tracking, c"),
        (["--dry-run"], "give one of the two"),
        (["pairs.steps=4", "CHANGE pairs"], "20 training pairs became 19"),
        (["pairs.steps=4", "CHANGE margin"], "columns of the training rows differ"),
        (["pairs.steps=4", "CHANGE model"], "model.path: the model in"),
    ],
)
def test_what_would_make_another_run_is_refused(
    write: Callable[..., Path],
    chat_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    message: str,
) -> None:
    model = shutil.copytree(chat_checkpoint, tmp_path / "start")
    run = launch(load_config(write(model={"path": str(model)}))).folder
    data = tmp_path / "pairs" / "train.jsonl"
    changes = {
        "CHANGE pairs": lambda: data.write_text("".join(data.read_text().splitlines(keepends=True)[:-1])),
        "CHANGE margin": lambda: data.write_text(data.read_text().replace('"margin": 1', '"margin": 2')),
        "CHANGE model": lambda: (model / "generation_config.json").unlink(),
    }
    before = (run / "metrics.jsonl").read_text()
    for word in overrides:
        changes.get(word, lambda: None)()
    words = [word for word in overrides if word not in changes]
    assert main(["reward-model", "--resume", str(run), *words]) == 2
    assert message in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_text() == before
