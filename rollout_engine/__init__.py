"""The rollout engine: an inference library by itself, made for sampling groups of answers.

>>> from rollout_engine import LLM, SamplingParams
>>> llm = LLM("path/to/checkpoint")
>>> llm.generate("Hello", SamplingParams(n=4, max_tokens=32))[0].outputs[0].text
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rollout_engine.types import CompletionOutput, EngineStats, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from rollout_engine.llm import LLM as LLM

__all__ = ["LLM", "CompletionOutput", "EngineStats", "RequestOutput", "SamplingParams"]


def __getattr__(name: str) -> Any:
    if name == "LLM":  # brings torch along, so it comes when asked for
        from rollout_engine.llm import LLM

        return LLM
    raise AttributeError(f"module 'rollout_engine' has no attribute {name!r}")
