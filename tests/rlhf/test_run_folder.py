"""The run folder's files, the line of a step, the learning rate, and a light import."""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest

from rlhf.metrics import mean_of, rollout_metrics
from rlhf.run_folder import RunFolder, write_atomic
from rlhf.schedule import learning_rate
from rlhf.tracking.console import clock, step_line
from rlhf.types import Completion, Prompt, Score, Trajectory


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path, "task")


def tree(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


# ---------------------------------------------------------------- folders and files


def test_runs_are_numbered_and_never_reused(tmp_path: Path) -> None:
    root = tmp_path / "not" / "yet"
    made = [RunFolder.create(root, "task").path for _ in range(3)]
    assert made == [(root / "task" / name).resolve() for name in ("0001", "0002", "0003")]
    shutil.rmtree(made[1])
    assert RunFolder.create(root, "task").path.name == "0004"
    (root / "task" / "0041").mkdir()
    (root / "task" / "notes").mkdir()
    assert RunFolder.create(root, "task").path.name == "0042"
    assert RunFolder.create(root, "other").path == (root / "other" / "0001").resolve()


def test_a_number_taken_meanwhile_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("0001", "0002"):
        (tmp_path / "task" / name).mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", lambda self: iter(()))  # listed before the other run took its number
        assert RunFolder.create(tmp_path, "task").path.name == "0003"


def test_a_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_atomic(path, "long old text")
    write_atomic(path, "new")
    assert path.read_text() == "new" and tree(tmp_path) == {"deep", "deep/file.txt"}


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.txt"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "half \ud800 way")  # fails while writing
    assert path.read_text() == "old"

    def crash(*_: object) -> None:
        raise OSError("disk gone")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(OSError, match="disk gone"):
            write_atomic(path, "new")
    assert path.read_text() == "old"
    write_atomic(path, "new")  # and what was left behind is in nobody's way
    assert path.read_text() == "new"


def test_rows_are_json_lines_gzipped_by_name(run: RunFolder) -> None:
    rows = [{"step": 1, "text": "é\n✓"}, {"step": 2, "text": ""}]
    run.write_rows("samples/a.jsonl", iter(rows))
    run.write_rows("samples/a.jsonl.gz", iter(rows))
    plain = (run.path / "samples/a.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in plain.splitlines()] == rows
    assert gzip.decompress((run.path / "samples/a.jsonl.gz").read_bytes()).decode() == plain
    assert tree(run.path / "samples") == {"a.jsonl", "a.jsonl.gz"}


def test_the_environment_is_recorded(run: RunFolder) -> None:
    run.write_environment()
    facts = json.loads((run.path / "environment.json").read_text())
    assert facts["python"] == sys.version
    assert facts["packages"]["torch"] == version("torch") and "deepspeed" in facts["packages"]


# ---------------------------------------------------------------- the line of a step

ROW = {
    "step": 30,
    "reward/mean": 0.4812,
    "length/mean": 3.62,
    "length/truncated": 0.0449,
    "policy/entropy": 1.2345,
    "policy/clip_fraction": 0.0123,
    "rollout/logprob_gap_max": 0.0,
    "time/generate": 0.449,
    "time/reward": 0.01,
    "time/score": 0.21,
    "time/train": 1.06,
    "time/swap": 0.0004,
    "time/step": 1.7194,
    "throughput/tokens_per_s": 2749.6,
    "time/eta": 312.9,
}
LINE = (
    "step 30/200  reward .481  | len 4 cut 4% |  ent 1.23 clip 1.2%  gap .0"
    "  | gen 0.4 reward 0.0 score 0.2 train 1.1 swap 0.0 = 1.7 s  | 2.7k tok/s | ETA 5:12"
)


def test_the_line_of_a_step() -> None:
    assert step_line(ROW, 200) == LINE


def test_the_line_of_a_step_with_evaluation_and_kl() -> None:
    row = {**ROW, "eval/accuracy": 0.75, "eval/step": 25, "policy/kl": 0.00081, "reward/mean": -0.5}
    row |= {"rollout/logprob_gap_max": 12.34, "throughput/tokens_per_s": 87.4, "time/eta": 3912.0}
    assert step_line(row, 200) == (
        "step 30/200  reward -.5  eval .75@25  | len 4 cut 4% |  kl 8e-4  ent 1.23 clip 1.2%  gap 12.3"
        "  | gen 0.4 reward 0.0 score 0.2 train 1.1 swap 0.0 = 1.7 s  | 87 tok/s | ETA 1:05:12"
    )


def test_the_line_of_a_step_whose_reward_failed_says_so() -> None:
    failed = "  REWARD FAILED on 3 answers  | gen"
    assert step_line({**ROW, "reward/errors": 1, "reward/timeouts": 2}, 200) == LINE.replace("  | gen", failed)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.9, "0:59"), (60, "1:00"), (312, "5:12"), (3599, "59:59"), (3600, "1:00:00"), (90061, "25:01:01")],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


# ---------------------------------------------------------------- metrics


def answer(group: int, score: Score | None, length: int, reason: str = "stop") -> Trajectory:
    completion = Completion("p", "a", (7,) * length, reason, (-1.0,) * length)
    return Trajectory.from_completion(Prompt(group, "p", (1, 2, 3)), completion, group, score)


def test_rollout_metrics_by_hand() -> None:
    made = [
        answer(0, Score(1.0, {"form": 1.0}), 2),
        answer(0, Score(0.0, {"form": 0.0, "rare": 5.0}), 4),
        answer(1, Score(0.5), 5, "length"),
        answer(1, None, 1),
        answer(1, Score(0.0), 3),
        answer(2, Score(0.25), 2),
        answer(2, Score(0.25), 4),
    ]
    metrics = rollout_metrics(made)
    assert metrics["reward/mean"] == pytest.approx(2 / 6)
    squares = [x * x for x in (4 / 6, -2 / 6, 1 / 6, -2 / 6, -0.5 / 6, -0.5 / 6)]
    assert metrics["reward/std"] == pytest.approx(math.sqrt(sum(squares) / 6))
    assert metrics["reward/unjudged"] == metrics["length/truncated"] == pytest.approx(1 / 7)
    assert metrics["reward/flat_groups"] == pytest.approx(1 / 3)
    assert (metrics["length/mean"], metrics["length/max"]) == (3.0, 5)
    assert (metrics["reward/part/form"], metrics["reward/part/rare"]) == (0.5, 5.0)


def test_the_greedy_answers_mean_reward_is_shown_where_there_are_any() -> None:
    answers = [answer(0, Score(1.0), 2), answer(0, Score(0.0), 2), answer(1, Score(1.0), 2)]
    assert "reward/greedy" not in rollout_metrics(answers)
    compared = [replace(t, baseline=baseline) for t, baseline in zip(answers, (1.0, 1.0, 0.0), strict=True)]
    assert rollout_metrics(compared)["reward/greedy"] == pytest.approx(2 / 3)


def test_several_updates_merge_into_one_row() -> None:
    first = {"policy/loss": 1.0, "rollout/logprob_gap_max": 0.0, "rollout/logprob_gap_mean": 0.0}
    second = {"policy/loss": 3.0, "rollout/logprob_gap_max": 0.5, "rollout/logprob_gap_mean": 0.1}
    merged = mean_of([first, second])
    assert merged == {"policy/loss": 2.0, "rollout/logprob_gap_max": 0.0, "rollout/logprob_gap_mean": 0.0}


def test_a_part_can_not_take_the_name_of_a_metric() -> None:
    ours = {"mean": 9.0, "std": 9.0, "errors": 9.0, "part/x": 9.0}
    metrics = rollout_metrics([answer(0, Score(1.0, ours), 1), answer(0, Score(0.0, {}), 1)])
    assert (metrics["reward/mean"], metrics["reward/std"], metrics["reward/errors"]) == (0.5, 0.5, 0)
    assert metrics["reward/part/mean"] == metrics["reward/part/part/x"] == 9.0


# ---------------------------------------------------------------- learning rate


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        # 2 steps of warm-up to 8, then 4 steps
        ("constant", [4.0, 8.0, 8.0, 8.0, 8.0, 8.0]),
        ("linear", [4.0, 8.0, 8.0, 6.0, 4.0, 2.0]),
        ("cosine", [4.0, 8.0, 8.0, 4 + 4 / math.sqrt(2), 4.0, 4 - 4 / math.sqrt(2)]),
    ],
)
def test_learning_rates_by_hand(schedule: str, rates: list[float]) -> None:
    assert [learning_rate(step, 6, 8.0, 2, schedule) for step in range(6)] == pytest.approx(rates, rel=1e-12)


def test_learning_rate_edges() -> None:
    assert [learning_rate(step, 3, 3.0, 0, "linear") for step in range(3)] == pytest.approx([3.0, 2.0, 1.0])
    assert learning_rate(0, 1, 0.1, 0, "cosine") == 0.1
    assert [learning_rate(step, 3, 6.0, 6, "linear") for step in range(3)] == pytest.approx([1.0, 2.0, 3.0])
    assert learning_rate(3, 3, 6.0, 3, "constant") == 6.0


# ---------------------------------------------------------------- importing the package


def test_importing_rlhf_is_light() -> None:
    code = (
        "import sys, time; import rlhf; from rlhf import Completion, Score\n"
        "assert 'torch' not in sys.modules, 'importing rlhf imports torch'\n"
        "print(time.process_time())"  # of the process, the interpreter's start included
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1
