"""A schedule becomes tensors, the tensors go through the decoder, and next tokens come out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kernels import SampledTokens, philox_uniform, sample_tokens
from kernels.device import upload
from kernels.dispatch import uses_triton
from rollout_engine.kv_cache import KVCache
from rollout_engine.models.context import PagedAttention
from rollout_engine.models.decoder import Decoder
from rollout_engine.scheduler import Chunk, Schedule

if TYPE_CHECKING:
    from rollout_engine.decode_graphs import DecodeGraphs

SAMPLER_ELEMENTS = 1 << 24  # of one [rows, vocabulary] fp32 block: 64 MiB; on a GPU 16 times as much
ROW_MULTIPLE = 8


@dataclass(frozen=True)
class _Draws:
    """The tokens to draw after a step's forward, and as many copies of the last as fill up the rows."""

    count: int  # without those copies
    index: Tensor  # [R] row of the hidden states; on the device, as the others
    uniform: Tensor  # [R]
    heat: Tensor  # [R] temperatures
    filters: tuple[Tensor | None, Tensor | None, Tensor | None]  # top-k, top-p, min-p [R]; None without any
    bans: dict[int, list[int]]  # row -> tokens


class Runner:
    """Runs one step on one device."""

    def __init__(self, decoder: Decoder, kv_cache: KVCache, graphs: DecodeGraphs | None = None) -> None:
        self.decoder = decoder
        self.kv_cache = kv_cache
        self.graphs = graphs
        self.device = decoder.norm.weight.device
        # Sampler and trainer compute log-probs by kernels of their own there: in exact the trainer's are reported.
        self.rescores = decoder.exact and uses_triton(self.device)

    # no_grad, not inference_mode: the weights may be the trainer's own, and inference tensors can't be trained.
    @torch.no_grad()
    def run(self, step: Schedule) -> SampledTokens | None:
        """Forward the step's chunks; one sampled token per (chunk, sample) that caught up, in chunk order, on the CPU.

        The host prepares the draws while the device is at the forward, and waits for it once, at the end.
        Raises FloatingPointError when the logits aren't finite.
        """
        if step.copies:
            self.kv_cache.copy_pages(step.copies)
        lengths = np.array([chunk.end - chunk.start for chunk in step.chunks])
        padding = self.graphs.padding(lengths) if self.graphs else None
        inputs = self._inputs(step.chunks, lengths, padding or 0)
        runs = self.decoder if padding is None or self.graphs is None else self.graphs
        hidden = runs.hidden(*inputs)
        draws = self._draws(step.chunks)
        return None if draws is None else self._sample(hidden, draws)

    def _inputs(self, chunks: list[Chunk], lengths: np.ndarray, padding: int) -> tuple[Tensor, PagedAttention]:
        """Tokens and context of the chunks, and of ``padding`` rows after them: a token 0 each, on the spare page."""
        lengths = np.append(lengths, np.ones(padding, dtype=np.int64))
        ends = np.array([chunk.end for chunk in chunks] + [1] * padding)
        tables = np.zeros((len(lengths), max(len(chunk.seq.pages) for chunk in chunks)), dtype=np.int64)
        tables[len(chunks) :, 0] = self.kv_cache.spare_page
        tokens: list[int] = []
        for row, (seq, start, end, _) in enumerate(chunks):
            tables[row, : len(seq.pages)] = seq.pages
            tokens += seq.token_ids[start:end]
        ctx = PagedAttention.from_pages(lengths, ends, tables, *self.kv_cache.storage(), exact=self.decoder.exact)
        return self._upload(np.array(tokens + [0] * padding, dtype=np.int64)), ctx

    def _draws(self, chunks: list[Chunk]) -> _Draws | None:
        integers: list[tuple[int, int, int, int, int]] = []  # row of the hidden states, top-k, and the noise's counters
        fractions: list[tuple[float, float, float]] = []
        bans: dict[int, list[int]] = {}
        row = -1
        for seq, start, end, samples in chunks:
            row += end - start
            group, params = seq.group, seq.group.params
            too_short = end - len(group.prompt_ids) < params.min_tokens
            for sample in range(seq.index, seq.index + samples):
                if too_short and group.stop_ids:
                    bans[len(integers)] = list(group.stop_ids)
                integers.append((row, params.top_k, group.seed, group.sample_ids[sample], end))
                fractions.append((params.temperature, params.top_p, params.min_p))
        if not integers:
            return None
        count, pad = len(integers), -len(integers) % ROW_MULTIPLE
        numbers = np.array(integers + integers[-1:] * pad, dtype=np.int64).T
        heats, top_ps, min_ps = np.array(fractions + fractions[-1:] * pad, dtype=np.float32).T
        index, top_k, *counters = self._upload(numbers)
        heat, top_p, min_p = self._upload(np.stack([heats, top_ps, min_ps]))
        filtered = bool(((numbers[1] > 0) | (top_ps < 1) | (min_ps > 0)).any())
        filters = (top_k, top_p, min_p) if filtered else (None, None, None)
        return _Draws(count, index, philox_uniform(*counters), heat, filters, bans)

    def _sample(self, hidden: Tensor, draws: _Draws) -> SampledTokens:
        chosen = hidden[draws.index]
        elements = SAMPLER_ELEMENTS * (16 if self.device.type == "cuda" else 1)
        width = max(ROW_MULTIPLE, elements // self.decoder.config.vocab_size // ROW_MULTIPLE * ROW_MULTIPLE)
        parts = []
        for begin in range(0, len(chosen), width):
            part = slice(begin, begin + width)
            z = self.decoder.head.logits(chosen[part])
            top_k, top_p, min_p = (None if column is None else column[part] for column in draws.filters)
            banned = self._banned(z, {row - begin: ids for row, ids in draws.bans.items() if 0 <= row - begin < width})
            found = sample_tokens(z, draws.heat[part], draws.uniform[part], top_k, top_p, min_p, banned)
            parts.append(self._rescored(found, chosen[part], draws.heat[part]) if self.rescores else found)
        columns = [torch.cat(column) for column in zip(*(vars(p).values() for p in parts), strict=True)]
        if self.device.type != "cpu":  # in one copy; float64 holds token ids and fp32 numbers
            together = torch.stack([column.double() for column in columns]).cpu()
            columns = [column.to(like.dtype) for column, like in zip(together, columns, strict=True)]
        sampled = SampledTokens(*columns)
        if not torch.isfinite(sampled.logprobs).all():
            raise FloatingPointError(
                "the model's logits are not finite; its weights are damaged, or its dtype overflows"
            )
        return SampledTokens(*[column[: draws.count] for column in columns])

    def _upload(self, numbers: np.ndarray) -> Tensor:
        return upload(torch.from_numpy(np.ascontiguousarray(numbers)), self.device)

    def _rescored(self, found: SampledTokens, hidden: Tensor, heat: Tensor) -> SampledTokens:
        """The same tokens with the log-probs and entropies that the trainer will compute for them."""
        logprobs, entropy = self.decoder.head(hidden, found.tokens, heat)
        kept = torch.where(heat > 0, found.log_kept_mass, logprobs)
        processed = logprobs - kept
        return replace(found, logprobs=logprobs, processed_logprobs=processed, log_kept_mass=kept, entropy=entropy)

    def _banned(self, z: Tensor, bans: dict[int, list[int]]) -> Tensor | None:
        """The tokens of ``bans`` (row -> ids) as a mask over logits z [R, V]; None where there are none."""
        if not bans:
            return None
        rows, ids = self._upload(np.array([(row, token) for row, tokens in bans.items() for token in tokens]).T)
        mask = torch.zeros_like(z, dtype=torch.bool)
        mask[rows, ids] = True
        return mask
