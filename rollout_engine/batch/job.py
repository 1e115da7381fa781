"""Everything that decides the answers to a file of prompts, and the answering itself."""

from __future__ import annotations

import itertools
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout_engine.batch.output import Record
from rollout_engine.batch.prompts import PromptForm
from rollout_engine.batch.rows import Row, Source
from rollout_engine.types import RequestOutput, SamplingParams

if TYPE_CHECKING:
    from rollout_engine.llm import LLM


@dataclass(frozen=True)
class Job:
    """Args:
    model: checkpoint folder or Hub id, as for ``LLM``. params: of every row; its seed must be set.
    dtype, numerics, threads: of the engine; threads is the number that torch computes with in each process.
    token_ids, logprobs: write these columns too.
    limit: rows of the input to answer; None is all.
    engine: further arguments of ``LLM``. They decide how fast, not what is answered (in ``numerics="exact"``).
    """

    model: str
    source: Source
    params: SamplingParams
    form: PromptForm = field(default_factory=PromptForm)
    revision: str = "main"
    dtype: str = "float32"
    numerics: str = "exact"
    threads: int = 1
    token_ids: bool = False
    logprobs: bool = False
    limit: int | None = None
    engine: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> dict[str, Any]:
        """What must be the same for a continued run, by name, as JSON. Torch's bits depend on its thread count."""
        folder = Path(self.model)
        return {
            "model": str(folder.resolve()) if folder.is_dir() else self.model,
            "revision": self.revision,
            "input": self.source.identity(),
            "dtype": self.dtype,
            "numerics": self.numerics,
            "threads": self.threads if self.numerics == "exact" else None,
            "columns": [name for name in ("token_ids", "logprobs") if getattr(self, name)],
            **asdict(self.form),
            **asdict(self.params),
        }

    def rows(self, done: int, rank: int = 0, world: int = 1) -> Iterator[Row]:
        """Share ``rank`` of the rows from ``done`` on: every ``world``-th."""
        return itertools.islice(self.source.rows(), done + rank, self.limit, world)

    def load(self, rank: int = 0) -> LLM:
        """The engine of process ``rank``. Raises ValueError as ``LLM`` does."""
        import torch

        from kernels.device import device_of_rank
        from rollout_engine.llm import LLM

        torch.set_num_threads(self.threads)
        return LLM(
            self.model,
            revision=self.revision,
            dtype=self.dtype,
            device=str(device_of_rank(rank)),
            numerics=self.numerics,
            **self.engine,
        )

    def answer(self, llm: LLM, rows: Iterator[Row]) -> Iterator[Record]:
        """One record per row, in the rows' order; each sample's noise is its own, whatever the batch."""
        n = self.params.n
        pulled: deque[Row] = deque()

        def remember() -> Iterator[Row]:
            for row in rows:
                pulled.append(row)
                yield row

        outputs = llm.stream(
            remember(),
            self.params,
            prompt=lambda row: self.form.prompt(row, llm.tokenizer),
            sample_ids=lambda row: range((row.line - 1) * n, row.line * n),
            ordered=True,
        )
        for out in outputs:
            yield self._record(pulled.popleft(), out)

    def _record(self, row: Row, out: RequestOutput) -> Record:
        if out.error is not None:
            return Record(_json_lines([{"id": row.id, "line": row.line, "error": out.error}]), failed=True)
        lines = []
        for answer in out.outputs:
            line: dict[str, Any] = {
                "id": row.id,
                "index": answer.index,
                "text": answer.text,
                "finish_reason": answer.finish_reason,
                "prompt_tokens": len(out.prompt_token_ids),
                "completion_tokens": len(answer.token_ids),
            }
            if self.token_ids:
                line["token_ids"] = answer.token_ids
            if self.logprobs:
                line["logprobs"] = answer.policy_logprobs
            lines.append(line)
        tokens = sum(line["completion_tokens"] for line in lines)
        return Record(_json_lines(lines), failed=False, answers=len(lines), tokens=tokens)


def _json_lines(lines: list[dict[str, Any]]) -> bytes:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return text.encode("utf-8", "backslashreplace")  # half a surrogate pair, from an id, as JSON's own escape
