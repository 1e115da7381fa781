"""A schedule becomes tensors, the tensors go through the decoder, and next tokens come out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kernels import SampledTokens, philox_uniform, sample_tokens
from rollout_engine.kv_cache import KVCache
from rollout_engine.models.context import PagedAttention
from rollout_engine.models.decoder import Decoder
from rollout_engine.scheduler import Chunk, Schedule

SAMPLER_ELEMENTS = 1 << 24  # of one [rows, vocabulary] fp32 block: 64 MiB
ROW_MULTIPLE = 8


class Runner:
    """Runs one step on one device."""

    def __init__(self, decoder: Decoder, kv_cache: KVCache) -> None:
        self.decoder = decoder
        self.kv_cache = kv_cache
        self.device = decoder.norm.weight.device

    # no_grad, not inference_mode: the weights may be the trainer's own, and inference tensors can't be trained.
    @torch.no_grad()
    def run(self, step: Schedule) -> SampledTokens | None:
        """Forward the step's chunks; one sampled token per (chunk, sample) that caught up, in chunk order.

        Raises FloatingPointError when the logits aren't finite.
        """
        if step.copies:
            self.kv_cache.copy_pages(step.copies)
        token_ids, ctx = self._inputs(step.chunks)
        hidden = self.decoder.hidden(token_ids, ctx)
        return self._sample(hidden, step.chunks)

    def _inputs(self, chunks: list[Chunk]) -> tuple[Tensor, PagedAttention]:
        lengths = np.array([chunk.end - chunk.start for chunk in chunks])
        ends = np.array([chunk.end for chunk in chunks])
        tables = np.zeros((len(chunks), max(len(chunk.seq.pages) for chunk in chunks)), dtype=np.int64)
        tokens: list[int] = []
        for row, chunk in enumerate(chunks):
            tables[row, : len(chunk.seq.pages)] = chunk.seq.pages
            tokens += chunk.seq.token_ids[chunk.start : chunk.end]
        ctx = PagedAttention.from_pages(lengths, ends, tables, *self.kv_cache.storage())
        return torch.tensor(tokens, device=self.device), ctx

    def _sample(self, hidden: Tensor, chunks: list[Chunk]) -> SampledTokens | None:
        rows: list[int] = []
        noise: list[tuple[int, int, int]] = []
        filters: list[tuple[float, int, float, float]] = []
        bans: dict[int, list[int]] = {}  # row of the sampler's block -> tokens
        row = -1
        for chunk in chunks:
            row += chunk.end - chunk.start
            group, params = chunk.seq.group, chunk.seq.group.params
            too_short = chunk.end - len(group.prompt_ids) < params.min_tokens
            for sample in range(chunk.seq.index, chunk.seq.index + chunk.samples):
                if too_short:
                    bans[len(rows)] = list(group.stop_ids)
                rows.append(row)
                noise.append((group.seed, group.sample_ids[sample], chunk.end))
                filters.append((params.temperature, params.top_k, params.top_p, params.min_p))
        if not rows:
            return None
        pad = -len(rows) % ROW_MULTIPLE
        noise += noise[-1:] * pad
        filters += filters[-1:] * pad
        uniform = philox_uniform(*torch.tensor(noise, device=self.device).T.contiguous())
        heat, top_k, top_p, min_p = torch.tensor(filters, dtype=torch.float64, device=self.device).T
        filtered = bool(((top_k > 0) | (top_p < 1) | (min_p > 0)).any())
        chosen = hidden[torch.tensor(rows + rows[-1:] * pad, device=self.device)]
        width = max(ROW_MULTIPLE, SAMPLER_ELEMENTS // self.decoder.config.vocab_size // ROW_MULTIPLE * ROW_MULTIPLE)
        parts = []
        for begin in range(0, len(chosen), width):
            part = slice(begin, begin + width)
            z = self.decoder.head.logits(chosen[part])
            parts.append(
                sample_tokens(
                    z,
                    heat[part].float(),
                    uniform[part],
                    top_k[part].long() if filtered else None,
                    top_p[part].float() if filtered else None,
                    min_p[part].float() if filtered else None,
                    self._banned(z, {row - begin: ids for row, ids in bans.items() if begin <= row < begin + width}),
                )
            )
        if not all(torch.isfinite(part.logprobs).all() for part in parts):
            raise FloatingPointError(
                "the model's logits are not finite; its weights are damaged, or its dtype overflows"
            )
        columns = [torch.cat(column)[: len(rows)] for column in zip(*(vars(p).values() for p in parts), strict=True)]
        return SampledTokens(*columns)

    def _banned(self, z: Tensor, bans: dict[int, list[int]]) -> Tensor | None:
        """The tokens of ``bans`` (row -> ids) as a mask over logits z [R, V]; None where there are none."""
        if not bans:
            return None
        mask = torch.zeros_like(z, dtype=torch.bool)
        for row, ids in bans.items():
            mask[row, ids] = True
        return mask
