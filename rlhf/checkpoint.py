"""Checkpoints of a run: everything that it takes to go on as if nothing had happened.

``checkpoints/000100/`` holds ``hf/`` (and ``critic/hf/``), which transformers loads; ``trainer/``, what each rank of
each role and the loop need; ``state.json`` for people; and ``DONE``, which is written last: a folder without it is a
torn one, is never loaded, and goes when the next is written. ``latest`` and ``best`` are links to whole ones.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rlhf import config
from rlhf.algorithms import Algorithm
from rlhf.evaluate import Evaluation
from rlhf.run_folder import write_atomic


class State(Protocol):
    """What a loop needs to go on; it is pickled."""

    @property
    def step(self) -> int:
        """How many are done."""


class Learner(Protocol):
    """A role that learns; all its ranks are called, and share the folders."""

    def save_state(self, folder: Path) -> None:
        """Write everything that the next step depends on into a new folder."""

    def load_state(self, folder: Path) -> None:
        """Be where the role was that wrote the folder; before the first step."""

    def save(self, folder: Path) -> None:
        """Write the weights into a new folder, as transformers loads them."""


@dataclass(frozen=True)
class LoopState:
    """What the loop itself knows after ``step`` steps.

    algorithm: with what it has adapted. rollouts, reward: their ``state()``. before, latest: evaluations.
    progress: samples and tokens so far. elapsed_s: seconds of training so far.
    """

    algorithm: Algorithm
    rollouts: dict[str, Any]
    reward: dict[str, Any]
    before: Evaluation
    latest: Evaluation
    step: int = 0
    progress: dict[str, int] = field(default_factory=lambda: {"samples": 0, "tokens": 0})
    elapsed_s: float = 0.0


class Checkpoints:
    """The checkpoints of one run; one process writes them."""

    def __init__(self, run_folder: Path, section: config.Checkpoint) -> None:
        self.folder = run_folder / "checkpoints"
        self.section = section

    def done(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        if not self.folder.exists():
            return []
        found = [p for p in self.folder.iterdir() if p.name.isdigit() and (p / "DONE").exists()]
        return sorted(found, key=lambda folder: int(folder.name))

    @property
    def last_step(self) -> int:
        """Of the newest whole checkpoint; 0 where there is none."""
        return max((int(folder.name) for folder in self.done()), default=0)

    def save(self, state: LoopState, learners: Mapping[str, Learner]) -> None:
        """Write the checkpoint of ``state.step``."""
        self.finish(self.write(state, learners, "policy"), {"step": state.step, **state.latest.metrics})

    def write(self, state: State, learners: Mapping[str, Learner], main: str) -> Path:
        """All of the checkpoint of ``state.step`` but what :meth:`finish` adds: its folder. ``main``: whose weights are
        the ones in ``hf``."""
        folder = self.begin(state.step)
        for name, role in learners.items():
            role.save_state(folder / "trainer" / name)
            role.save(folder / "hf" if name == main else folder / name / "hf")
        (folder / "trainer" / "loop.pkl").write_bytes(pickle.dumps(state))
        return folder

    def load(self, learners: Mapping[str, Learner]) -> Any:
        """Bring the learners to where they were at the newest whole checkpoint. The state that was written with it;
        None where there is no such."""
        found = self.done()
        if not found:
            return None
        for name, role in learners.items():
            role.load_state(found[-1] / "trainer" / name)
        return pickle.loads((found[-1] / "trainer" / "loop.pkl").read_bytes())

    def begin(self, step: int) -> Path:
        """An empty folder for the checkpoint at ``step``. Torn ones go."""
        self.folder.mkdir(parents=True, exist_ok=True)
        whole = self.done()
        for torn in self.folder.iterdir():
            if torn.name.isdigit() and torn not in whole:
                shutil.rmtree(torn)
        folder = self.folder / f"{step:06d}"
        (folder / "trainer").mkdir(parents=True)
        return folder

    def finish(self, folder: Path, state: dict[str, Any]) -> None:
        """Everything is on disk: state, DONE, the links; then the old ones that nothing keeps go."""
        write_atomic(folder / "state.json", json.dumps(state, indent=1))
        write_atomic(folder / "DONE", "")
        whole, best = self.done(), self.best()
        self._link("latest", whole[-1])
        if best is not None:
            self._link("best", best)
        for old in whole[: -self.section.keep_last]:
            if old != best:
                (old / "DONE").unlink()
                shutil.rmtree(old)

    def best(self) -> Path | None:
        """The one with the largest ``checkpoint.keep_best``, the later of equals. Only an evaluation of the very
        weights that were saved counts."""
        measured: dict[Path, float] = {}
        for folder in reversed(self.done()) if self.section.keep_best else ():
            state = json.loads((folder / "state.json").read_text())
            if state["eval/step"] == state["step"]:
                measured[folder] = state[self.section.keep_best]
        return max(measured, key=measured.__getitem__) if measured else None

    def _link(self, name: str, folder: Path) -> None:
        link = self.folder / f"{name}.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
        os.replace(link, self.folder / name)
