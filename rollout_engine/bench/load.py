"""What is measured: an RL-shaped load on random models, the same for everybody."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import Qwen3Config

from rollout_engine.models import qwen3
from rollout_engine.models.checkpoint import Model
from rollout_engine.models.decoder import Decoder

SIZES = {  # name: hidden, layers, query heads, KV heads, head dim, MLP width, vocabulary
    "tiny": (64, 2, 4, 2, 16, 96, 256),
    "3M": (256, 4, 8, 4, 32, 768, 4096),
    "25M": (512, 8, 8, 4, 64, 1536, 4096),
    "0.6B": (1024, 28, 16, 8, 128, 3072, 151936),
    "1B": (2048, 16, 32, 8, 64, 8192, 128256),
}


@dataclass(frozen=True)
class Load:
    """Prompts with one answer length for each sample of their group: lengths are prescribed, so that all
    engines generate equally many tokens. An answer ends at its length, never at an end-of-sequence token.
    """

    prompts: tuple[tuple[int, ...], ...]
    lengths: tuple[tuple[int, ...], ...]  # [prompts][samples]

    @classmethod
    def make(
        cls, vocab: int, *, prompts: int, samples: int, mean: int, cap: int, sigma: float = 0.8, seed: int = 0
    ) -> Load:
        """Prompts of 20 to 90 random tokens; log-normal lengths with the given mean before the cap, in tokens."""
        mu = math.log(mean) - sigma**2 / 2
        return cls._draw(vocab, prompts, samples, cap, seed, lambda rng: rng.lognormvariate(mu, sigma))

    @classmethod
    def skewed(cls, vocab: int, *, prompts: int, samples: int, mean: int, seed: int = 0) -> Load:
        """The same prompts with exponential lengths, capped at 16 times the mean: what static batching suffers from."""
        return cls._draw(vocab, prompts, samples, 16 * mean, seed, lambda rng: rng.expovariate(1 / mean))

    @classmethod
    def _draw(
        cls, vocab: int, prompts: int, samples: int, cap: int, seed: int, length: Callable[[random.Random], float]
    ) -> Load:
        rng = random.Random(seed)
        return cls(
            tuple(tuple(rng.randrange(1, vocab) for _ in range(rng.randint(20, 90))) for _ in range(prompts)),
            tuple(tuple(min(cap, max(1, round(length(rng)))) for _ in range(samples)) for _ in range(prompts)),
        )

    def requests(self) -> list[tuple[tuple[int, ...], int]]:
        """(prompt, answer length) of every sample, groups together."""
        return [(p, n) for p, group in zip(self.prompts, self.lengths, strict=True) for n in group]

    @property
    def useful_tokens(self) -> int:
        return sum(map(sum, self.lengths))

    @property
    def longest(self) -> int:
        return max(map(max, self.lengths))


def random_model(size: str, *, dtype: str = "float32", device: torch.device | str = "cpu") -> Model:
    """A ``qwen3`` model of one of ``SIZES`` with random weights, tied embeddings, no tokenizer."""
    hidden, layers, heads, kv_heads, head_dim, mlp, vocab = SIZES[size]
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
    )
    decoder = Decoder(qwen3.decoder_config(config), vocab)
    decoder.init_weights(0)
    decoder.to(device, getattr(torch, dtype))
    return Model(decoder, config, None, ())


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's intra-op threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
