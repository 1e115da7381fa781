"""Two-digit addition on a model of a million parameters, made on the spot: the quickstart, and a tutorial.

Operands have two digits and the answer three, ones first: ``58+72=031`` says 130. Each digit then depends on
two digits of the question and a carry, which so small a model can learn. It first sees some thousand worked
sums (warm start), then learns the rest by itself from a reward that checks the answer. No sum of the held-out
split is ever trained on, in either order of its operands.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf import Completion

LIMIT = 100  # operands are 0 .. 99
NUM_HELD_OUT = 500  # unordered pairs
ALPHABET = "0123456789+="


def _held_out() -> set[tuple[int, int]]:
    """Unordered pairs kept from training; the same for every seed, so that runs compare."""
    pairs = [(a, b) for a in range(LIMIT) for b in range(a, LIMIT)]
    return set(random.Random(0).sample(pairs, NUM_HELD_OUT))


def _problems(split: str) -> list[tuple[int, int]]:
    held_out = _held_out()
    pairs = [(a, b) for a in range(LIMIT) for b in range(LIMIT)]
    chosen = [(a, b) for a, b in pairs if ((min(a, b), max(a, b)) in held_out) == (split == "eval")]
    return random.Random(1).sample(chosen, len(chosen))


def _question(a: int, b: int) -> str:
    return f"{a:02d}+{b:02d}="


def _answer(a: int, b: int) -> str:
    return f"{a + b:03d}"[::-1]


def prompts(split: str) -> Iterator[dict[str, Any]]:
    """Rows with the sum as a column for the reward. split: "train" or "eval"."""
    for a, b in _problems(split):
        yield {"prompt": _question(a, b), "answer": _answer(a, b)}


def reward(completion: Completion, answer: str) -> float:
    """1 for the right digits, followed by the end of the answer."""
    return float(completion.text == answer and completion.finish_reason == "stop")


def warm_start(seed: int) -> Iterator[tuple[str, str]]:
    """Worked sums without end, from the training split."""
    problems = _problems("train")
    rng = random.Random(seed)
    while True:
        a, b = rng.choice(problems)
        yield _question(a, b), _answer(a, b)


def initial_model(folder: Path, seed: int) -> None:
    """Write a random qwen3 of 0.8 M parameters and a tokenizer with one token a character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config

    from rollout_engine.models import qwen3
    from rollout_engine.models.checkpoint import Model, save_model
    from rollout_engine.models.decoder import Decoder

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *ALPHABET])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    hf_config = Qwen3Config(
        vocab_size=16,  # two rows more than the tokenizer has: never sampled, never scored
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # positions 0 .. 12 differ in every frequency
        tie_word_embeddings=True,
        eos_token_id=vocabulary["<eos>"],
        pad_token_id=vocabulary["<pad>"],
    )
    decoder = Decoder(qwen3.decoder_config(hf_config), num_tokens=len(vocabulary))
    decoder.init_weights(seed, std=0.06)  # at a width of 128 the usual 0.02 learns several times slower
    save_model(Model(decoder, hf_config, tokenizer, (vocabulary["<eos>"],)), folder)
