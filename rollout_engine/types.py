"""What goes into the engine and what comes out. Names and shapes follow vLLM's offline API."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def fits_int64(value: object) -> bool:
    """An integer that the counter-based noise can be keyed with."""
    return isinstance(value, int) and -(2**63) <= value < 2**63


@dataclass(frozen=True)
class SamplingParams:
    """How to sample one prompt's answers.

    Args:
        n: answers per prompt; the prompt is prefilled once for all of them.
        temperature: 0 is greedy; else at least 1e-4, below which fp32 can't tell it from greedy.
        top_k: keep the k likeliest tokens, 0 keeps all. top_p: keep the smallest set with this mass.
        min_p: keep tokens at least this fraction as likely as the likeliest (Nguyen et al. 2024), 0 keeps all.
            In this order: temperature, min_p, top_k, then top_p of what those kept.
        seed: makes the answers depend on (seed, index, position) alone; None draws from the engine's seed
            and a running sample number.
        max_tokens: longest answer; the model's context length caps it too.
        min_tokens: shortest answer: until then the ids that would stop it can't be drawn, and stop strings don't count.
        stop: strings that end the answer; its text is cut before the first one, or after it with
            ``include_stop_str_in_output``. The token columns keep every token sampled.
        stop_token_ids: end the answer, beside the model's own end-of-sequence ids.
        ignore_eos: keep going past the end-of-sequence ids (``stop_token_ids`` still stop).
        skip_special_tokens: leave special tokens out of the text.
        logprobs: None, or 0/1 to fill ``CompletionOutput.logprobs`` with the sampled tokens' entries.

    Raises ValueError naming the field, what was given and what is allowed.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int = 16
    min_tokens: int = 0
    stop: tuple[str, ...] | list[str] | str | None = ()  # a tuple once made
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        for name, ok, allowed in (
            ("n", isinstance(self.n, int) and self.n >= 1, "a whole number, at least 1"),
            ("temperature", self.temperature == 0 or 1e-4 <= self.temperature <= 1e4, "0 (greedy), or 1e-4 to 1e4"),
            ("top_k", isinstance(self.top_k, int) and self.top_k >= 0, "a whole number, 0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]; for greedy decoding use temperature=0"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1], 0 (off)"),
            ("max_tokens", isinstance(self.max_tokens, int) and self.max_tokens >= 1, "a whole number, at least 1"),
            (
                "min_tokens",
                isinstance(self.min_tokens, int) and 0 <= self.min_tokens <= self.max_tokens,
                f"a whole number from 0 to max_tokens={self.max_tokens}",
            ),
            ("stop", all(isinstance(text, str) and text for text in stop), "text, or several, none of them empty"),
            ("seed", self.seed is None or fits_int64(self.seed), "None or an integer of 64 bits"),
            ("logprobs", self.logprobs in (None, 0, 1), "None, 0 or 1 (the sampled token's)"),
        ):
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)}: must be {allowed}")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` in the one form that it is kept in."""
        assert isinstance(self.stop, tuple)
        return self.stop


@dataclass(frozen=True)
class Logprob:
    logprob: float


@dataclass(frozen=True)
class CompletionOutput:
    """One answer. The per-token columns have one entry per token of ``token_ids``, eos included."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # "stop" | "length" | "abort"
    stop_reason: int | str | None  # the token or the string that stopped it
    sample_id: int
    policy_logprobs: tuple[float, ...]  # full vocabulary, at the sampling temperature
    processed_logprobs: tuple[float, ...]  # under the distribution sampled from: min_tokens, min_p, top_k, top_p
    log_kept_mass: tuple[float, ...]  # log of the mass that those left
    entropies: tuple[float, ...]  # of the full vocabulary at the sampling temperature, in nats
    weight_versions: tuple[int, ...]  # version of the weights that produced the token
    logprobs: list[dict[int, Logprob]] | None = None  # vLLM's shape, when asked for

    @property
    def cumulative_logprob(self) -> float:
        return sum(self.policy_logprobs)


@dataclass(frozen=True)
class RequestOutput:
    """All answers to one prompt, in order of ``index``."""

    request_id: int  # -1 for a row that was refused
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    num_cached_tokens: int
    finished: bool = True
    position: int | None = None  # of its row in `LLM.stream`, from 0
    error: str | None = None  # in `LLM.stream`: why the row was refused; then there are no outputs


@dataclass
class EngineStats:
    """Counters since the engine started; tokens, unless the name says otherwise.

    ``forwarded - recomputed == prompts + (outputs - 1 per answer) - cached`` once all requests finished:
    no token is scored twice behind the caller's back.
    """

    forwarded: int = 0
    recomputed: int = 0  # of those forwarded: again, after a preemption or a weight swap
    cached: int = 0  # prompt tokens found in the prefix cache
    sampled: int = 0
    steps: int = 0
    preemptions: int = 0
    aborted_requests: int = 0
    finished_requests: int = 0
    running_sequences: int = 0
    waiting_sequences: int = 0
    free_pages: int = 0
    total_pages: int = 0
    weight_version: int = 0

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(eq=False)
class Group:
    """A request inside the engine: one prompt, ``n`` samples. Prefilled by its first sample, then forked."""

    request_id: int
    prompt: str | None
    prompt_ids: list[int]
    params: SamplingParams
    seed: int
    sample_ids: list[int]  # n, or none until the request is queued
    max_len: int  # prompt and answer
    stop_ids: frozenset[int] = frozenset()  # tokens that end an answer
    forked: bool = False
    num_cached: int = 0
    outputs: dict[int, CompletionOutput] = field(default_factory=dict)


@dataclass(eq=False)
class Sequence:
    """One sample inside the engine: ``num_cached <= num_computed <= len(token_ids) <= group.max_len``.

    There is no prefill phase and no decode phase: a step catches ``num_computed`` up with the tokens, and a
    sequence that has caught up gets its next token sampled.
    """

    group: Group
    index: int
    token_ids: list[int]  # prompt, then answer
    num_computed: int = 0  # tokens whose KV is in the pages
    num_once: int = 0  # tokens that were computed or cached at some time; below it, forwarding is recomputing
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)  # prefix-cache keys of the leading full pages
    columns: list[tuple[float, ...]] = field(default_factory=list)  # of SampledTokens, for each token but itself
    versions: list[int] = field(default_factory=list)

    @property
    def num_samples(self) -> int:
        """Answers this sequence stands for: the whole group until it is forked."""
        return 1 if self.group.forked else self.group.params.n

    @property
    def sample_id(self) -> int:
        return self.group.sample_ids[self.index]
