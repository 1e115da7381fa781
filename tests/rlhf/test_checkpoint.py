"""Checkpoints are whole or not there: what stays, what `latest` and `best` say, and a kill at any moment."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlhf.algorithms.grpo import GRPO
from rlhf.checkpoint import Checkpoints, LoopState
from rlhf.config import Checkpoint
from rlhf.evaluate import Evaluation
from rlhf.types import Completion, Prompt, Score, Trajectory


class Role:
    """Remembers a number, in two files; its weights are the number too."""

    def __init__(self, number: int = 0) -> None:
        self.number = number

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(str(self.number))

    def save_state(self, folder: Path) -> None:
        folder.mkdir()
        for name in "ab":
            (folder / name).write_text(str(self.number) * 100)

    def load_state(self, folder: Path) -> None:
        a, b = [(folder / name).read_text() for name in "ab"]
        assert a == b
        self.number = int(a[: len(a) // 100])


def evaluation(step: int, accuracy: float) -> Evaluation:
    completion = Completion("p", "a", (1,), "stop", (-1.0,))
    scores = [Score(float(i < round(accuracy * 10))) for i in range(10)]
    return Evaluation(step, [Trajectory.from_completion(Prompt(0, "p", (1,)), completion, 0, s) for s in scores])


def save(checkpoints: Checkpoints, step: int, accuracy: float = 0.0, measured_at: int | None = None) -> None:
    latest = evaluation(step if measured_at is None else measured_at, accuracy)
    state = LoopState(GRPO(), {"position": step}, {}, latest, latest, step, {"samples": step, "tokens": 0}, 1.0)
    checkpoints.save(state, {"policy": Role(step), "critic": Role(step)})


def loaded(checkpoints: Checkpoints) -> int:
    """The step that a resumed run goes on from; all its parts must agree on it."""
    roles = {name: Role() for name in ("policy", "critic")}
    state = checkpoints.load(roles)
    assert state is not None
    assert {role.number for role in roles.values()} == {state.step} == {state.rollouts["position"]}
    return state.step


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.is_symlink())


def check_links(folder: Path) -> None:
    """A link, where there is one, leads to a whole checkpoint."""
    for link in folder.iterdir():
        assert not link.is_symlink() or (link / "DONE").exists() or link.suffix == ".tmp", link


def test_a_checkpoint_has_its_parts(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Checkpoint())
    assert checkpoints.load({}) is None
    save(checkpoints, 100, 0.5)
    latest = tmp_path / "checkpoints" / "latest"
    assert latest.readlink() == Path("000100")
    parts = [f"trainer/{role}/{name}" for role in ("critic", "policy") for name in "ab"]
    weights = ["critic/hf/model.safetensors", "hf/model.safetensors"]
    files = sorted(str(p.relative_to(latest.resolve())) for p in latest.resolve().rglob("*") if p.is_file())
    assert files == sorted(["DONE", "state.json", "trainer/loop.pkl", *parts, *weights])
    assert json.loads((latest / "state.json").read_text()) == {
        "step": 100, "eval/reward": 0.5, "eval/accuracy": 0.5, "eval/step": 100
    }  # fmt: skip
    assert loaded(checkpoints) == 100


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "accuracies", "kept", "best"),
    [
        (2, None, [0.9, 0.1, 0.2, 0.3], [3, 4], None),
        (1, "eval/accuracy", [0.1, 0.9, 0.2, 0.3], [2, 4], 2),
        (1, "eval/accuracy", [0.9, 0.1, 0.9, 0.3], [3, 4], 3),  # the later of equals; the older one goes
        (2, "eval/reward", [0.1, 0.2, 0.3, 0.4], [3, 4], 4),
        (3, "eval/accuracy", [0.5, 0.4, 0.3, 0.2], [1, 2, 3, 4], 1),
    ],
)
def test_the_last_ones_and_the_best_stay(
    tmp_path: Path, keep_last: int, keep_best: Any, accuracies: Sequence[float], kept: list[int], best: int | None
) -> None:
    checkpoints = Checkpoints(tmp_path, Checkpoint(keep_last=keep_last, keep_best=keep_best))
    for step, accuracy in enumerate(accuracies, 1):
        save(checkpoints, step, accuracy)
        check_links(tmp_path / "checkpoints")
        assert loaded(checkpoints) == step
    assert names(tmp_path / "checkpoints") == [f"{step:06d}" for step in kept]
    link = tmp_path / "checkpoints" / "best"
    assert link.is_symlink() == (best is not None)
    assert best is None or link.readlink() == Path(f"{best:06d}")


def test_the_evaluation_of_other_weights_makes_no_best_checkpoint(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Checkpoint(keep_last=1))
    save(checkpoints, 1, 0.9, measured_at=0)  # an evaluation from before these steps
    assert not (tmp_path / "checkpoints" / "best").exists()
    save(checkpoints, 2, 0.3)
    assert (tmp_path / "checkpoints" / "best").readlink() == Path("000002")


def test_a_torn_folder_is_never_loaded_and_goes(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Checkpoint())
    save(checkpoints, 1)
    for step in (2, 3):
        save(checkpoints, step)
        (tmp_path / "checkpoints" / f"{step:06d}" / "DONE").unlink()
    (tmp_path / "checkpoints" / "000003" / "trainer" / "loop.pkl").write_bytes(b"half")
    assert loaded(checkpoints) == 1
    save(checkpoints, 2)  # of a step whose folder is there, and another that will not come again soon
    assert loaded(checkpoints) == 2 and names(tmp_path / "checkpoints") == ["000001", "000002"]


def test_the_newest_is_the_one_with_the_most_steps(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Checkpoint(keep_last=1, keep_best=None))
    for step in (999_999, 1_000_000):  # by name, the first would come last
        save(checkpoints, step)
        assert loaded(checkpoints) == checkpoints.last_step == step


# ---------------------------------------------------------------- killed

CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink"}
_armed: list[int] = []  # operations that are still let through


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _armed or event not in CHANGES or (event == "open" and "r" in str(arguments[1])):
        return
    if _armed[0] == 0:
        raise KeyboardInterrupt
    _armed[0] -= 1


sys.addaudithook(_hook)  # hooks stay for good; this one sleeps unless armed


@contextmanager
def only(operations: int) -> Iterator[None]:
    """Lets so many changes of the file system through, and none after."""
    _armed.append(operations)
    try:
        yield
    finally:
        _armed.clear()


def test_a_crash_at_any_file_operation_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    survived, seen = 0, set()
    while True:
        checkpoints = Checkpoints(tmp_path / str(survived), Checkpoint(keep_last=1))
        save(checkpoints, 1, 0.5)
        save(checkpoints, 2, 0.1)
        try:
            with only(survived):
                save(checkpoints, 3, 0.7)
        except KeyboardInterrupt:
            check_links(checkpoints.folder)
            seen.add(loaded(checkpoints))
            save(checkpoints, loaded(checkpoints) + 1, 0.8)  # nothing that was left is in the way
            check_links(checkpoints.folder)
            assert len(names(checkpoints.folder)) == 1
            survived += 1
        else:
            break
    assert seen == {2, 3} and survived > 30  # mkdirs, files, renames, and the files of two folders that go


def save_forever(checkpoints: Checkpoints, step: int, report: int) -> None:
    """In a child: it ends with a kill, or by itself when nobody reads its reports."""
    try:
        while True:
            os.write(report, b".")
            save(checkpoints, step, step % 7 / 10)
            step += 1
    finally:
        os._exit(1)


def test_kills_at_random_moments_leave_a_checkpoint_that_loads(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, Checkpoint(keep_last=2))
    begin = time.monotonic()
    save(checkpoints, 1)
    duration = time.monotonic() - begin
    moments, torn, before = random.Random(0), 0, 1
    for _ in range(20):
        reports, report = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reports)
            save_forever(checkpoints, before + 1, report)
        os.close(report)
        started = moments.randint(1, 3)
        for _ in range(started):
            os.read(reports, 1)  # it begins to save, and has ended the one before
        time.sleep(moments.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        os.close(reports)
        assert os.WIFSIGNALED(status)
        check_links(checkpoints.folder)
        assert loaded(checkpoints) >= before + started - 1
        torn += len(checkpoints.done()) < len(names(checkpoints.folder))
        before = loaded(checkpoints)
    assert before > 1 and torn > 0  # they wrote, and were killed while they did
