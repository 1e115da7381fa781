"""Rows of the input, one at a time, from JSON lines, Parquet or a data set."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

PARQUET_ROWS = 256  # read at a time


@dataclass(frozen=True)
class Row:
    """``line`` counts from 1, in a file the line's number. JSON is parsed when asked for: rows are also skipped."""

    line: int
    content: bytes | dict[str, Any]

    @cached_property
    def columns(self) -> dict[str, Any]:
        """Raises ValueError for a line that isn't a JSON object."""
        if isinstance(self.content, dict):
            return self.content
        try:
            columns = json.loads(self.content)
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
            raise ValueError(f"not JSON: {error}") from None
        if not isinstance(columns, dict):
            raise ValueError(f"a line must be a JSON object, not {type(columns).__name__}")
        return columns

    @property
    def id(self) -> str | int:
        """The row's own, else its line."""
        try:
            given = self.columns.get("id")
        except ValueError:
            return self.line
        return given if isinstance(given, str | int) else self.line


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Args:
        path: a ``.jsonl`` (also ``.jsonl.gz``) or ``.parquet`` file, a folder that ``Dataset.save_to_disk`` or a
            collection of data files made, or a Hub id, which is streamed.
        subset, split: of a data set.
    """

    path: str
    subset: str | None = None
    split: str = "train"

    def __post_init__(self) -> None:
        path = Path(self.path)
        looks_local = path.is_absolute() or self.path.startswith(".") or self._kind is not None
        if not path.exists() and (looks_local or self.path.count("/") > 1):
            raise ValueError(f"input {self.path!r} isn't there; give a .jsonl or .parquet file, a folder or a Hub id")
        if path.is_file() and self._kind is None:
            raise ValueError(f"input {self.path!r} is no kind of file that is read: .jsonl, .jsonl.gz or .parquet")

    @property
    def _kind(self) -> str | None:
        names = {".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".parquet": "parquet"}
        return next((kind for suffix, kind in names.items() if self.path.endswith(suffix)), None)

    @property
    def _is_saved(self) -> bool:
        """By ``save_to_disk``."""
        return any((Path(self.path) / name).exists() for name in ("state.json", "dataset_dict.json"))

    def rows(self) -> Iterator[Row]:
        """All rows, in bounded memory. Raises ValueError for a source that can't be read, OSError for a damaged one."""
        if self._kind == "jsonl":
            return self._json_lines()
        if self._kind == "parquet":
            return self._parquet()
        return (Row(line, dict(columns)) for line, columns in enumerate(self._dataset(), 1))

    def count(self) -> int | None:
        """Number of rows, where it is to be had without reading a stream to its end (blank lines count)."""
        if self._kind == "parquet":
            from pyarrow.parquet import ParquetFile

            with ParquetFile(self.path) as file:
                return file.metadata.num_rows
        if self.path.endswith(".jsonl"):
            with open(self.path, "rb") as file:
                return sum(1 for _ in file)
        return len(self._dataset()) if self._is_saved else None

    def identity(self) -> dict[str, Any]:
        """What must not change between a run and its continuation."""
        path = Path(self.path)
        if path.is_file():
            return {"path": str(path.resolve()), "bytes": path.stat().st_size}
        return {
            "path": str(path.resolve()) if path.is_dir() else self.path,
            "subset": self.subset,
            "split": self.split,
        }

    def _json_lines(self) -> Iterator[Row]:
        opened = gzip.open if self.path.endswith(".gz") else open
        line = 0
        with opened(self.path, "rb") as file:
            try:
                for line, text in enumerate(file, 1):
                    if text.strip():
                        yield Row(line, text)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise OSError(f"input {self.path} is damaged after line {line}: {error}") from error

    def _parquet(self) -> Iterator[Row]:
        from pyarrow.parquet import ParquetFile

        line = 0
        with ParquetFile(self.path, pre_buffer=False) as file:
            for table in file.iter_batches(batch_size=PARQUET_ROWS):
                for columns in table.to_pylist():
                    line += 1
                    yield Row(line, columns)

    def _dataset(self) -> Any:
        from datasets import DatasetDict, load_dataset, load_from_disk

        if self._is_saved:
            data = load_from_disk(self.path)
            if not isinstance(data, DatasetDict):
                return data
            if self.split not in data:
                raise ValueError(f"input {self.path!r} has the splits {sorted(data)}, not {self.split!r}; set --split")
            return data[self.split]
        try:
            return load_dataset(self.path, name=self.subset, split=self.split, streaming=True)
        except Exception as error:  # datasets and the Hub client have many kinds
            raise ValueError(f"input {self.path!r} is neither a file nor a data set that loads: {error}") from error
