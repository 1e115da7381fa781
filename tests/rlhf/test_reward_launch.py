"""Reward models and servers in a whole run: refused early where they can't work, seen in plan, metrics and curve."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from reward_http import FakeModel, Serve

from recipes import arithmetic
from rlhf import judging
from rlhf.config import Config, ModelSection, Train, load_config
from rlhf.evaluate import Evaluation
from rlhf.judging import spawn_judges
from rlhf.launch import dry_run, launch
from rlhf.report import before_and_after, draw_curve
from rlhf.types import Completion, Prompt, Score, Trajectory

CONFIG = Path(__file__).parents[2] / "configs" / "arithmetic_grpo_cpu.yaml"
SMALL = ["run.steps=1", "warm_start.steps=0", "rollout.prompts_per_step=4", "rollout.kv_cache_gib=0.02",
         "eval.prompts=4", "cluster.threads=1", "cluster.kind=local", "tracking.wandb=disabled"]  # fmt: skip
NO_REWARD = "from recipes.arithmetic import initial_model, prompts"

Configure = Callable[..., Config]


@pytest.fixture
def configure(tmp_path: Path) -> Configure:
    """``configure(*overrides, recipe=source, **reward)``: a small run's config."""

    def make(*overrides: str, recipe: str | None = None, **reward: object) -> Config:
        words = [*SMALL, f"run.dir={tmp_path / 'runs'}", *overrides]
        if recipe is not None:
            (tmp_path / "task.py").write_text(recipe)
            words.append(f"recipe.path={tmp_path / 'task.py'}")
        words += [f"reward.{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in reward.items()]
        return load_config(CONFIG, words)

    return make


@pytest.fixture
def checkpoint(random_judge: Path, tmp_path: Path) -> Path:
    """Of a reward model with the policy's tokenizer; a test may damage it."""
    return shutil.copytree(random_judge, tmp_path / "judge")


def lose_calibration(folder: Path) -> None:
    (folder / "calibration.json").unlink()


def lose_head(folder: Path) -> None:
    shutil.rmtree(folder)
    arithmetic.initial_model(folder, 0)


def rename_a_token(folder: Path) -> None:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"+":', '"plus":'))


def shorten_context(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "max_position_embeddings": 10}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lose_calibration, r"judge has no calibration\.json .*reward\.model_scale=raw"),
        (lose_head, r"^reward\.models\.helpful: .*judge has no scalar head; `rlhf reward-model` trains one"),
        (rename_a_token, r"^reward\.models\.helpful: .*judge has another tokenizer than the policy"),
        (shorten_context, r"^reward\.models\.helpful: .*a context of 10 tokens; .* may have 11"),
        (shutil.rmtree, "judge' is not a folder"),
    ],
)
def test_a_reward_model_that_cannot_judge_is_refused_before_anything_starts(
    configure: Configure, checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None], said: str
) -> None:
    config = configure(models={"helpful": str(checkpoint)})
    assert f"1 x function (reward() of recipes.arithmetic) + 1 x helpful (reward model {checkpoint}" in flat(config)
    damage(checkpoint)
    with pytest.raises(ValueError, match=f"(?s){said}"):
        launch(config)
    assert not (tmp_path / "runs").exists()


def flat(config: Config) -> str:
    """What a dry run prints, without its line breaks."""
    return " ".join(dry_run(config).split())


def test_raw_scores_need_no_calibration(configure: Configure, checkpoint: Path) -> None:
    lose_calibration(checkpoint)
    assert "raw)" in flat(configure(models={"helpful": str(checkpoint)}, model_scale="raw"))


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ({}, r"has no function reward\(\); write one, or name reward\.models or \.servers"),
        ({"weights": {"function": 1}, "servers": {"s": "URL"}}, r"weights names the function, but recipe .* no reward"),
        ({"weights": {"s": 0}, "servers": {"s": "URL"}}, r"every component \(s\) has weight 0; nothing would be"),
    ],
)
def test_a_recipe_without_reward_needs_another_judge(
    configure: Configure, serve: Serve, reward: dict[str, object], said: str
) -> None:
    url = serve(lambda r: {"scores": [0.0] * len(r["completions"])}).url
    given = json.loads(json.dumps(reward).replace("URL", url))
    with pytest.raises(ValueError, match=said):
        dry_run(configure(recipe=NO_REWARD, **given))
    assert f"1 x s (server {url})" in flat(configure(recipe=NO_REWARD, servers={"s": url}))


def test_a_dry_run_shows_what_function_and_server_say_and_names_a_server_that_fails(
    configure: Configure, serve: Serve
) -> None:
    server = serve(lambda r: {"scores": [0.5]})
    settings = {"servers": {"style": server.url}, "weights": {"style": 2}, "on_error": "penalty"}
    shown = dry_run(configure(**settings))
    assert shown.count(": 1.0 {'function': 0.0, 'style': 0.5}") == 4
    server.answer = lambda r: (404, "nobody here")
    with pytest.raises(ValueError, match=r"^reward server style .* returned status 404: 'nobody here', for an empty"):
        dry_run(configure(**settings))


def test_a_dry_run_fails_with_the_function_whatever_a_failure_means_later(configure: Configure) -> None:
    with pytest.raises(ValueError, match=r"^reward\(\) raised ZeroDivisionError.*and answer ''"):
        dry_run(configure(recipe=f"{NO_REWARD}\ndef reward(completion): return 1 / 0", on_error="penalty"))


class Judge:
    """What a reward model's role is to its caller; a sequence is worth its last token."""

    def __init__(self, *, checkpoint: Path, model: ModelSection, train: Train, timeout_s: float) -> None:
        assert (checkpoint / "model.safetensors").exists()
        self.given = model, train, timeout_s
        self.judge = FakeModel().judge


@pytest.fixture
def judge_role(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "RewardModel", Judge)


class Spawns:
    """A cluster that notes who is spawned, on how many ranks."""

    def __init__(self) -> None:
        self.spawned: dict[str, int] = {}

    def spawn(self, name: str, role: Callable[..., object], *, ranks: int = 1, **arguments: object) -> object:
        self.spawned[name] = ranks
        return role(**arguments)


def test_each_reward_model_is_a_role_of_its_own(configure: Configure, checkpoint: Path, judge_role: None) -> None:
    cluster = Spawns()
    settings = ["reward_model.ranks=3", "reward_model.dtype=bfloat16", "reward_model.tokens_per_microbatch=7"]
    one = configure(*settings, models={"a": str(checkpoint)})
    judges = spawn_judges(one, cluster, {"reward_model": checkpoint})  # type: ignore[arg-type]
    assert cluster.spawned == {"reward": 1, "reward_model": 3}
    model, train, timeout_s = judges.models["a"].role.given  # type: ignore[attr-defined]
    assert (model.dtype, train.tokens_per_microbatch, timeout_s) == ("bfloat16", 7, 1800)
    assert judges.models["a"].midpoint == 0.25
    two = configure(models={"a": str(checkpoint), "b": str(checkpoint)}, model_scale="raw")
    weights = {"reward_model-a": checkpoint, "reward_model-b": checkpoint}
    judges = spawn_judges(two, cluster, weights)  # type: ignore[arg-type]
    assert list(cluster.spawned) == ["reward", "reward_model", "reward_model-a", "reward_model-b"]
    assert judges.names == ["function", "a", "b"] and judges.models["b"].midpoint is None


def test_a_run_by_function_server_and_model_logs_each_and_their_sum(
    configure: Configure, serve: Serve, checkpoint: Path, threads: object
) -> None:
    server = serve(lambda r: {"scores": [len(c["text"]) for c in r["completions"]]})
    weights = {"function": 0, "length": -0.5}
    reward = {"servers": {"length": server.url}, "models": {"m": str(checkpoint)}, "weights": weights}
    always_right = f"{NO_REWARD}\ndef reward(completion): return 1.0"
    result = launch(configure(recipe=always_right, **reward))
    (row,) = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    for section, mean in (("reward", "reward/mean"), ("eval", "eval/reward")):
        parts = {name: row[f"{section}/part/{name}"] for name in ("function", "length", "m")}
        assert row[mean] == pytest.approx(parts["m"] - 0.5 * parts["length"], abs=1e-12)
        assert 0 < parts["m"] < 1 <= parts["length"] and row[f"{section}/part/m/raw"] != 0
    assert row["eval/accuracy"] == 1.0 > row["eval/reward"]
    assert (result.folder / "curve.png").stat().st_size > 1000
    assert ", reward " in (result.folder / "train.log").read_text().splitlines()[-1]


def test_a_server_that_fails_in_the_middle_of_a_run_costs_the_penalty_or_ends_it(
    configure: Configure, serve: Serve, threads: object
) -> None:
    server = serve(lambda r: numbers_of_digits(r) if len(server.requests) <= 5 else (500, "out of memory"))
    right = f"{NO_REWARD}\ndef reward(completion): return 1.0"
    reward = {"servers": {"digits": server.url}, "weights": {"digits": 0.5}}
    result = launch(configure(recipe=right, **reward, on_error="penalty", penalty=-1.0))
    (row,) = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert (row["reward/errors"], row["reward/unjudged"]) == (16, 0.0)
    assert (row["reward/part/digits"], row["reward/mean"]) == (-1.0, 0.5)
    server.requests.clear()
    with pytest.raises(ValueError, match=r"^reward server digits .* returned status 500: 'out of memory', for prompt"):
        launch(configure(recipe=right, **reward))


def numbers_of_digits(request: dict[str, Any]) -> dict[str, Any]:
    return {"scores": [sum(c.isdigit() for c in answer["text"]) for answer in request["completions"]]}


# ---------------------------------------------------------------- the report


def test_the_curve_shows_held_out_reward_where_it_differs_from_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib import figure

    drawn: list[tuple[list[str], tuple[float, float]]] = []

    def keep(self: figure.Figure, *args: object, **kwargs: object) -> None:
        (top, _, _) = self.axes
        drawn.append(([str(line.get_label()) for line in top.lines], top.get_ylim()))

    monkeypatch.setattr(figure.Figure, "savefig", keep)
    row = {"step": 1, "reward/mean": -1.5, "rollout/logprob_gap_max": 0.0, "eval/step": 1, "eval/accuracy": 1.0}
    before = evaluation(Score(0.0))
    draw_curve([{**row, "eval/reward": 1.0}], before, tmp_path / "curve.png")
    draw_curve([{**row, "eval/reward": 3.0}], before, tmp_path / "curve.png")
    assert drawn == [
        (["training reward", "held-out accuracy"], (-1.5, 1.02)),
        (["training reward", "held-out accuracy", "held-out reward"], (-1.5, 3.0)),
    ]


@pytest.mark.parametrize(
    ("measured", "labels"),
    [({}, []), ({"policy/entropy": 0.7}, ["entropy"]), ({"rollout/kl": 0.2}, ["KL to the reference"])],
)
def test_the_curve_shows_entropy_and_kl_of_the_steps_that_have_them(
    measured: dict[str, float], labels: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib import figure

    drawn: list[list[tuple[Any, list[Any], list[Any]]]] = []

    def keep(self: figure.Figure, *args: object, **kwargs: object) -> None:
        lines = self.axes[1].lines
        drawn.append([(line.get_label(), [*line.get_xdata()], [*line.get_ydata()]) for line in lines])

    monkeypatch.setattr(figure.Figure, "savefig", keep)
    draw_curve([{"step": 1, "reward/mean": 0.0}, {"step": 2, "reward/mean": 0.5, **measured}],
               evaluation(Score(0.0)), tmp_path / "curve.png")  # fmt: skip
    assert drawn == [[(label, [2], [*measured.values()]) for label in labels]]


def evaluation(score: Score, accuracy_part: str | None = None) -> Evaluation:
    prompt, answer = Prompt(0, "p", (1,)), Completion("p", "five", (7,), "stop", (-1.0,))
    return Evaluation(0, [Trajectory.from_completion(prompt, answer, 0, score)], accuracy_part)


def test_answers_are_marked_right_as_accuracy_counts_them() -> None:
    wrong, right = Score(1.5, {"function": 0.0}), Score(-1.5, {"function": 1.0})
    assert before_and_after(evaluation(wrong, "function"), evaluation(right, "function")).split()[3:] == [
        "p", "five", "✗", "five", "✓"
    ]  # fmt: skip
    assert before_and_after(evaluation(wrong), evaluation(right)).split()[3:] == ["p", "five", "✓", "five", "✗"]
