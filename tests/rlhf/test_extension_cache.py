"""A lock that a killed process left on an extension holds nobody up for long, and a live one is respected."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.backends import extension_cache


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float, bool], Path]:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))

    def make(age_s: float, built: bool) -> Path:
        folder = tmp_path / "py311_cpu" / "some_op"
        folder.mkdir(parents=True)
        if built:
            (folder / "some_op.so").touch()
        (folder / "lock").touch()
        os.utime(folder / "lock", (time.time() - age_s,) * 2)
        return folder / "lock"

    return make


@pytest.mark.parametrize(
    ("age_s", "built", "stale"), [(200, True, True), (2, True, False), (90, False, False), (700, False, True)]
)
def test_a_lock_is_stale_by_its_age_and_what_it_guards(
    lock: Callable[[float, bool], Path], age_s: float, built: bool, stale: bool
) -> None:
    path = lock(age_s, built)
    assert extension_cache.stale_locks() == ([path] if stale else [])


def test_a_stale_lock_is_removed_at_once(lock: Callable[[float, bool], Path]) -> None:
    path = lock(200, True)
    begin = time.monotonic()
    extension_cache.wait_for_locks()
    assert not path.exists() and time.monotonic() - begin < 5


def test_a_live_lock_is_waited_for(lock: Callable[[float, bool], Path]) -> None:
    path = lock(0, False)
    builder = threading.Timer(1.5, path.unlink)
    builder.start()
    begin = time.monotonic()
    extension_cache.wait_for_locks()
    assert 1 < time.monotonic() - begin < 30
    builder.join()


def test_the_environments_own_ninja_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another version would find the extension stale, and so would the environment's own after it, in turn."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")  # so that what the call sets is undone
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setattr(sys, "prefix", "/somewhere/environment")
    for _ in range(2):
        assert extension_cache.folder() == Path("/somewhere/environment/torch_extensions")
        assert os.environ["PATH"] == "/somewhere/environment/bin:/usr/bin"
