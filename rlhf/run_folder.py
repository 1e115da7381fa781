"""The run folder: everything a run leaves behind, each file written whole or appended by line."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import platform
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "deepspeed", "transformers", "ray", "wandb", "triton", "numpy")


def write_atomic(path: Path, text: str) -> None:
    """Write a file that is never seen half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    tmp.write_text(text)
    os.replace(tmp, path)


class RunFolder:
    """``dir/name/0001``, the next free number; the number is taken by creating the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, root: Path, name: str) -> RunFolder:
        parent = root / name
        parent.mkdir(parents=True, exist_ok=True)
        number = max((int(p.name) for p in parent.iterdir() if p.name.isdigit()), default=0) + 1
        while True:
            try:
                (parent / f"{number:04d}").mkdir()
                return cls((parent / f"{number:04d}").resolve())
            except FileExistsError:
                number += 1

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from working on the run; a dead one keeps nobody. Raises ValueError where one is."""
        with (self.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another process is at work on {self.path}; wait for its end, or end it") from None
            yield

    def write(self, name: str, text: str) -> None:
        write_atomic(self.path / name, text)

    def link_as_latest(self) -> None:
        """``latest`` beside the run's folder leads to it: the newest run that has finished."""
        link = self.path.parent / "latest.tmp"
        link.unlink(missing_ok=True)
        link.symlink_to(self.path.name)
        os.replace(link, self.path.parent / "latest")

    def write_environment(self) -> None:
        packages = {name: version(name) for name in PACKAGES}
        facts = {"python": sys.version, "platform": platform.platform(), "cpus": os.cpu_count(), "packages": packages}
        self.write("environment.json", json.dumps(facts, indent=1))

    def write_rows(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """JSON lines, gzipped where the name ends in .gz."""
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = self.path / name
        if path.suffix == ".gz":
            path.parent.mkdir(parents=True, exist_ok=True)
            tmp = path.with_name(path.name + ".tmp")
            tmp.write_bytes(gzip.compress(text.encode(), mtime=0))
            os.replace(tmp, path)
        else:
            write_atomic(path, text)
