"""A schedule becomes tensors, the tensors go through the decoder, and next tokens come out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kernels import SampledTokens, philox_uniform, sample_tokens
from kernels.dispatch import uses_triton
from rollout_engine.kv_cache import KVCache
from rollout_engine.models.context import PagedAttention
from rollout_engine.models.decoder import Decoder
from rollout_engine.scheduler import Chunk, Schedule

if TYPE_CHECKING:
    from rollout_engine.decode_graphs import DecodeGraphs

SAMPLER_ELEMENTS = 1 << 24  # of one [rows, vocabulary] fp32 block: 64 MiB
ROW_MULTIPLE = 8


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
        """Forward the step's chunks; one sampled token per (chunk, sample) that caught up, in chunk order.

        Raises FloatingPointError when the logits aren't finite.
        """
        if step.copies:
            self.kv_cache.copy_pages(step.copies)
        lengths = np.array([chunk.end - chunk.start for chunk in step.chunks])
        padding = self.graphs.padding(lengths) if self.graphs else None
        inputs = self._inputs(step.chunks, lengths, padding or 0)
        runs = self.decoder if padding is None or self.graphs is None else self.graphs
        return self._sample(runs.hidden(*inputs), step.chunks)

    def _inputs(self, chunks: list[Chunk], lengths: np.ndarray, padding: int) -> tuple[Tensor, PagedAttention]:
        """Tokens and context of the chunks, and of ``padding`` rows after them: a token 0 each, on the spare page."""
        lengths = np.append(lengths, np.ones(padding, dtype=np.int64))
        ends = np.array([chunk.end for chunk in chunks] + [1] * padding)
        tables = np.zeros((len(lengths), max(len(chunk.seq.pages) for chunk in chunks)), dtype=np.int64)
        tables[len(chunks) :, 0] = self.kv_cache.spare_page
        tokens: list[int] = []
        for row, chunk in enumerate(chunks):
            tables[row, : len(chunk.seq.pages)] = chunk.seq.pages
            tokens += chunk.seq.token_ids[chunk.start : chunk.end]
        ctx = PagedAttention.from_pages(lengths, ends, tables, *self.kv_cache.storage(), exact=self.decoder.exact)
        return torch.tensor(tokens + [0] * padding, device=self.device), ctx

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
            found = sample_tokens(
                z,
                heat[part].float(),
                uniform[part],
                top_k[part].long() if filtered else None,
                top_p[part].float() if filtered else None,
                min_p[part].float() if filtered else None,
                self._banned(z, {row - begin: ids for row, ids in bans.items() if begin <= row < begin + width}),
            )
            parts.append(self._rescored(found, chosen[part], heat[part].float()) if self.rescores else found)
        if not all(torch.isfinite(part.logprobs).all() for part in parts):
            raise FloatingPointError(
                "the model's logits are not finite; its weights are damaged, or its dtype overflows"
            )
        columns = [torch.cat(column)[: len(rows)] for column in zip(*(vars(p).values() for p in parts), strict=True)]
        return SampledTokens(*columns)

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
        mask = torch.zeros_like(z, dtype=torch.bool)
        for row, ids in bans.items():
            mask[row, ids] = True
        return mask
