"""A tiny random model, engines on it, and the packed trainer forward that judges their log-probs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config

from rollout_engine import LLM, RequestOutput
from rollout_engine.models import qwen3
from rollout_engine.models.checkpoint import Model, save_model
from rollout_engine.models.context import PackedAttention
from rollout_engine.models.decoder import Decoder

VOCAB, EOS, CONTEXT = 131, 0, 256

MakeLLM = Callable[..., LLM]


class Comparison(NamedTuple):
    gap: float  # largest |engine - trainer|; infinite where either is NaN
    tokens: int  # compared


Compare = Callable[..., Comparison]


@pytest.fixture
def model() -> Model:
    """Grouped-query attention, odd widths, a tied head and distributions that are not flat."""
    hf = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=72,
        intermediate_size=100,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=20,
        tie_word_embeddings=True,
        max_position_embeddings=CONTEXT,
    )
    decoder = Decoder(qwen3.decoder_config(hf), VOCAB)
    decoder.init_weights(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)
    return Model(decoder, hf, None, (EOS,))


@pytest.fixture
def make_llm(model: Model) -> MakeLLM:
    """``make_llm(model=other, pages=12, **engine)``: an engine whose pool has exactly ``pages`` pages."""

    def make(*, model: Model = model, pages: int = 64, page_size: int = 32, **engine: object) -> LLM:
        page_bytes = page_size * model.decoder.config.kv_bytes_per_token(4)
        gib = (pages + 0.5) * page_bytes / 2**30
        llm = LLM(model, **{"kv_cache_gib": gib, "page_size": page_size, "max_num_seqs": 32, **engine})
        assert llm.kv_cache.num_pages == pages
        return llm

    return make


@pytest.fixture
def compare() -> Compare:
    """``compare(decoder, outputs, temperature=1.0, version=None)``: engine against packed trainer forward.

    ``temperature`` is one for all or one per request; ``version`` restricts it to tokens of these weights.
    """

    def run(
        decoder: Decoder,
        outputs: Sequence[RequestOutput],
        temperature: float | Sequence[float] = 1.0,
        version: int | None = None,
    ) -> Comparison:
        heats = [temperature] * len(outputs) if isinstance(temperature, (int, float)) else list(temperature)
        answers = [(out, answer, heat) for out, heat in zip(outputs, heats, strict=True) for answer in out.outputs]
        answers = [found for found in answers if found[1].token_ids]
        if not answers:
            return Comparison(0.0, 0)
        pairs = [(out.prompt_token_ids, answer.token_ids) for out, answer, _ in answers]
        per_token = [len(answer.token_ids) for _, answer, _ in answers]
        heat = torch.tensor([heat for _, _, heat in answers]).repeat_interleave(torch.tensor(per_token))
        expected = trainer_logprobs(decoder, pairs, heat).double()
        engine = torch.tensor([x for _, answer, _ in answers for x in answer.policy_logprobs], dtype=torch.float64)
        versions = torch.tensor([v for _, answer, _ in answers for v in answer.weight_versions])
        assert engine.shape == versions.shape == expected.shape
        chosen = versions == version if version is not None else torch.ones_like(versions, dtype=torch.bool)
        gaps = (engine - expected).abs()[chosen].nan_to_num(nan=torch.inf)
        return Comparison(gaps.max().item() if len(gaps) else 0.0, len(gaps))

    return run


def packed(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Tensor, PackedAttention, Tensor, Tensor]:
    """Token ids, context, scored rows and targets of (prompt, answer) pairs laid end to end."""
    lengths = [len(prompt) + len(answer) for prompt, answer in pairs]
    ids = torch.tensor([token for prompt, answer in pairs for token in (*prompt, *answer)])
    rows: list[int] = []
    begin = 0
    for (prompt, _), length in zip(pairs, lengths, strict=True):
        rows += range(begin + len(prompt) - 1, begin + length - 1)
        begin += length
    targets = torch.tensor([token for _, answer in pairs for token in answer])
    return ids, PackedAttention.from_lengths(lengths), torch.tensor(rows), targets


def trainer_logprobs(decoder: Decoder, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], heat: Tensor) -> Tensor:
    """Log-probs of all answer tokens as the trainer computes them: one packed forward, gradients on."""
    ids, ctx, rows, targets = packed(pairs)
    logprobs, _ = decoder(ids, ctx, rows, targets, heat)
    assert logprobs.requires_grad
    return logprobs.detach()


@pytest.fixture
def pack() -> Callable[..., tuple[Tensor, PackedAttention, Tensor, Tensor]]:
    return packed


def random_prompt(length: int, seed: int) -> list[int]:
    return torch.randint(1, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture
def prompt() -> Callable[[int, int], list[int]]:
    """``prompt(length, seed)``: random token ids without the end-of-sequence id."""
    return random_prompt


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges inside words and inside characters, a BOS token and a chat template that writes it."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(
        ["the end of the day, the end", "naïve café — 你好你好 🙂🙃🙂", "\n\nSTOP STOP"] * 4, trainer
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[{{ tone }}]"
    return fast


@pytest.fixture(scope="session")
def text_model(byte_tokenizer: PreTrainedTokenizerFast) -> Model:
    """A tiny random model that speaks the bytes of ``byte_tokenizer``; nearly uniform over them."""
    hf = Qwen3Config(
        vocab_size=len(byte_tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=True,
        max_position_embeddings=CONTEXT,
    )
    decoder = Decoder(qwen3.decoder_config(hf), len(byte_tokenizer))
    decoder.init_weights(0)
    return Model(decoder, hf, byte_tokenizer, (byte_tokenizer.eos_token_id,))


@pytest.fixture(scope="session")
def checkpoint(text_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``text_model`` on disk."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    save_model(text_model, folder)
    return folder
