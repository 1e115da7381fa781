"""The decoder against transformers on the same weights, checkpoints in and out, and checkpoints it must refuse."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

import rollout_engine.models.checkpoint as checkpoint
from rollout_engine import LLM, SamplingParams
from rollout_engine.models import families
from rollout_engine.models.checkpoint import Model, load_model, save_model
from rollout_engine.models.context import PackedAttention

VOCAB = 83
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def llama(heads: int = 6, kv_heads: int = 3, head_dim: int = 20, hidden: int = 36, **rest: Any) -> LlamaConfig:
    sizes = {"vocab_size": VOCAB, "intermediate_size": 52, "num_hidden_layers": 2, "max_position_embeddings": 512}
    sizes |= {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return LlamaConfig(**sizes, head_dim=head_dim, eos_token_id=2, **rest)


def qwen3(heads: int = 6, kv_heads: int = 3, head_dim: int = 20, hidden: int = 44, **rest: Any) -> Qwen3Config:
    sizes = {"vocab_size": VOCAB, "intermediate_size": 52, "num_hidden_layers": 2, "max_position_embeddings": 512}
    sizes |= {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return Qwen3Config(**sizes, head_dim=head_dim, eos_token_id=2, **rest)


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama_gqa1": lambda: llama(4, 4, 12, 44),
    "llama_gqa2_biases": lambda: llama(6, 3, 20, attention_bias=True, mlp_bias=True),
    "llama_gqa8_tied": lambda: llama(8, 1, 16, 40, tie_word_embeddings=True),
    "llama3_rope": lambda: llama(6, 3, 32, rope_parameters=LLAMA3_ROPE, attention_bias=True, rms_norm_eps=1e-5),
    "qwen3_gqa1_tied": lambda: qwen3(4, 4, 12, tie_word_embeddings=True),
    "qwen3_gqa2_biases": lambda: qwen3(6, 3, 20, attention_bias=True),
    "qwen3_odd_width": lambda: qwen3(4, 2, 10, 37),
    "qwen3_gqa8": lambda: qwen3(8, 1, 16, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
}


def random_model(config: Any, seed: int = 0) -> Any:
    """Weights of a size that makes every part count, so that a swapped norm or a dropped bias shows."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty_like(parameter).normal_(generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise * (0.1 if parameter.dim() == 1 else parameter.shape[1] ** -0.5))
        model.get_input_embeddings().weight.mul_(0.5)  # lets the layers decide the next token
    return model


def save(model: Any, folder: Path, **rest: Any) -> Path:
    model.save_pretrained(folder, **rest)
    return folder


def tokenizer(words: int) -> PreTrainedTokenizerFast:
    model = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, words)}, "<unk>"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", eos_token="</s>")


def token_ids(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def our_logprobs(model: Model, prompts: list[list[int]]) -> list[Tensor]:
    """Log-probs of all tokens at all positions, the prompts packed into one call."""
    lengths = [len(ids) for ids in prompts]
    hidden = model.decoder.hidden(torch.tensor(list(itertools.chain(*prompts))), PackedAttention.from_lengths(lengths))
    return list(torch.log_softmax(model.decoder.head.logits(hidden), -1).split(lengths))


@torch.no_grad()
def their_logits(model: Any, ids: list[int]) -> Tensor:
    return model(torch.tensor([ids])).logits[0]


def assert_same_logprobs(model: Model, theirs: Any, prompts: list[list[int]]) -> None:
    for ours, ids in zip(our_logprobs(model, prompts), prompts, strict=True):
        torch.testing.assert_close(ours, torch.log_softmax(their_logits(theirs, ids), -1), rtol=0, atol=1e-5)


# ---------------------------------------------------------------- against transformers


@pytest.mark.parametrize("name", CONFIGS)
def test_logprobs_match_transformers(name: str, tmp_path: Path) -> None:
    theirs = random_model(CONFIGS[name]())
    model = load_model(save(theirs, tmp_path / "model"), tokenizer=False)
    assert_same_logprobs(model, theirs, token_ids(1, 33, 100))


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_match_transformers(name: str, tmp_path: Path) -> None:
    theirs = random_model(CONFIGS[name]())
    prompts = token_ids(1, 30, 33, 64)
    numerics = "fast" if name == "qwen3_odd_width" else "exact"  # BLAS is not row-invariant at every odd width
    llm = LLM(save(theirs, tmp_path / "model"), tokenizer=False, kv_cache_gib=0.05, numerics=numerics)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    theirs.generation_config.eos_token_id = None
    for ids, answer in zip(prompts, answers, strict=True):
        rest = {"attention_mask": torch.ones(1, len(ids)), "do_sample": False, "pad_token_id": 0}
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=40, **rest)
        assert list(answer.outputs[0].token_ids) == expected[0, len(ids) :].tolist()
    # Not a few tokens over and over, which would prove little.
    assert len({token for answer in answers for token in answer.outputs[0].token_ids}) > 12


# ---------------------------------------------------------------- checkpoints out and in again


@pytest.mark.parametrize("shard_bytes", [None, 20_000])
@pytest.mark.parametrize("name", CONFIGS)
def test_saved_model_has_equal_logits_in_transformers(
    name: str, shard_bytes: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = random_model(CONFIGS[name]())
    model = load_model(save(theirs, tmp_path / "in"), tokenizer=False)
    if shard_bytes:
        monkeypatch.setattr(checkpoint, "SHARD_BYTES", shard_bytes)
    save_model(model, tmp_path / "out")
    assert (len(list((tmp_path / "out").glob("*.safetensors"))) > 2) == bool(shard_bytes)
    assert not list(tmp_path.glob("*.tmp"))
    back, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert back.dtype == torch.float32 and back.config.eos_token_id == 2
    (ids,) = token_ids(50)
    assert torch.equal(their_logits(back, ids), their_logits(theirs, ids))
    again = load_model(tmp_path / "out", tokenizer=False)
    assert again.decoder.config == model.decoder.config and again.eos_ids == model.eos_ids
    assert torch.equal(our_logprobs(again, [ids])[0], our_logprobs(model, [ids])[0])


def test_sharded_checkpoint_loads(tmp_path: Path) -> None:
    theirs = random_model(llama())
    folder = save(theirs, tmp_path / "model", max_shard_size="20KB")
    assert (folder / "model.safetensors.index.json").exists() and len(list(folder.glob("*.safetensors"))) > 2
    assert_same_logprobs(load_model(folder, tokenizer=False), theirs, token_ids(33))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_half_precision_weights_survive_both_ways(dtype: str, tmp_path: Path) -> None:
    theirs = random_model(llama()).bfloat16()
    model = load_model(save(theirs, tmp_path / "in"), dtype=dtype, tokenizer=False)
    save_model(model, tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    expected = {"bfloat16": torch.bfloat16, "float32": torch.float32}[dtype]
    assert all(after[k].dtype == expected and torch.equal(v.to(expected), after[k]) for k, v in before.items())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == expected


@pytest.mark.parametrize(
    "generation, config, expected",
    [([2, 5], 3, (2, 5)), (7, [2, 3], (7,)), (None, [2, 3], (2, 3)), (None, 0, (0,)), (None, None, (2,))],
)
def test_end_of_sequence_ids_travel_along(
    generation: Any, config: Any, expected: tuple[int, ...], tmp_path: Path
) -> None:
    """generation_config.json comes before config.json, and that before the tokenizer, whose eos is 2."""
    folder = save(random_model(llama()), tmp_path / "in")
    settings = json.loads((folder / "config.json").read_text()) | {"eos_token_id": config}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation} if generation else {}))
    tokenizer(70).save_pretrained(folder)
    model = load_model(folder)
    assert model.eos_ids == expected
    save_model(model, tmp_path / "out")
    assert load_model(tmp_path / "out").eos_ids == expected
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.eos_token_id
    assert (tuple(back) if isinstance(back, list) else (back,)) == expected


def test_tokenizer_travels_along_and_bounds_what_is_sampled(tmp_path: Path) -> None:
    folder = save(random_model(llama()), tmp_path / "in")
    tokenizer(70).save_pretrained(folder)
    model = load_model(folder)
    assert model.decoder.head.num_tokens == 70 < model.decoder.config.vocab_size
    assert torch.isinf(our_logprobs(model, token_ids(5))[0][:, 70:]).all()
    save_model(model, tmp_path / "out")
    again = load_model(tmp_path / "out")
    assert again.tokenizer("w5 w69 nonsense")["input_ids"] == [5, 69, 0]
    assert again.decoder.head.num_tokens == 70


def test_saving_onto_a_folder_is_refused_and_leaves_it_alone(tmp_path: Path) -> None:
    model = load_model(save(random_model(llama()), tmp_path / "in"), tokenizer=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("here")
    with pytest.raises(ValueError, match="out exists"):
        save_model(model, tmp_path / "out")
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["precious.txt"]


# ---------------------------------------------------------------- refused


def test_unknown_family_names_the_supported_ones(tmp_path: Path) -> None:
    GPT2Config(n_layer=1).save_pretrained(tmp_path)
    assert families() == ["gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3"]
    with pytest.raises(ValueError, match=r"'gpt2'.*'llama', 'mistral'"):
        load_model(tmp_path, tokenizer=False)


@pytest.mark.parametrize(
    "config, message",
    [
        (lambda: llama(rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}), "rope_type 'yarn'"),
        (lambda: llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "'dynamic'"),
        (lambda: llama(heads=5, kv_heads=2, hidden=40), "num_attention_heads=5"),
        (lambda: llama(hidden_act="gelu"), "hidden_act"),
        (lambda: qwen3(hidden_act="gelu"), "hidden_act"),
    ],
    ids=["rope_yarn", "rope_dynamic", "uneven_heads", "llama_gelu", "qwen3_gelu"],
)
def test_models_that_are_not_built_are_refused(config: Callable[[], Any], message: str, tmp_path: Path) -> None:
    config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path, tokenizer=False)


def test_missing_and_oversized_tokenizer_are_refused(tmp_path: Path) -> None:
    folder = save(random_model(llama()), tmp_path / "model")
    with pytest.raises(ValueError, match="no tokenizer"):
        load_model(folder)
    tokenizer(VOCAB + 1).save_pretrained(folder)
    with pytest.raises(ValueError, match=f"{VOCAB + 1} tokens but the model embeds {VOCAB}"):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -5000, -1])
def test_truncated_weights_name_the_file(keep: int, tmp_path: Path) -> None:
    folder = save(random_model(llama()), tmp_path / "model", max_shard_size="20KB")
    victim = sorted(folder.glob("*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:keep])
    with pytest.raises(ValueError, match=victim.name):
        load_model(folder, tokenizer=False)


def test_missing_files_are_named(tmp_path: Path) -> None:
    folder = save(random_model(llama()), tmp_path / "model", max_shard_size="20KB")
    victim = sorted(folder.glob("*.safetensors"))[0]
    victim.unlink()
    with pytest.raises(ValueError, match=victim.name):
        load_model(folder, tokenizer=False)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_model(tmp_path, tokenizer=False)
    with pytest.raises(ValueError, match="nowhere"):
        load_model(tmp_path / "nowhere", tokenizer=False)


LAYER = "model.layers.1"


@pytest.mark.parametrize("name", [f"{LAYER}.self_attn.k_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    folder = save(random_model(llama()), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=name):
        load_model(folder, tokenizer=False)


@pytest.mark.parametrize(
    "shapes",
    [
        {"model.norm.weight": (37,)},
        {"model.embed_tokens.weight": (VOCAB, 37)},
        {f"{LAYER}.mlp.down_proj.weight": (52, 36)},
        {f"{LAYER}.self_attn.q_proj.weight": (119, 36)},
        {f"{LAYER}.mlp.up_proj.weight": (52, 1)},  # would broadcast
        {f"{LAYER}.mlp.up_proj.weight": (52, 37)},
        {f"{LAYER}.mlp.gate_proj.weight": (50, 36), f"{LAYER}.mlp.up_proj.weight": (54, 36)},  # the sum is right
    ],
    ids=["norm", "embedding", "transposed", "one_row_short", "one_column", "wide_second_part", "rows_moved"],
)
def test_wrong_shape_is_named(shapes: dict[str, tuple[int, ...]], tmp_path: Path) -> None:
    folder = save(random_model(llama()), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors") | {name: torch.ones(shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="shape") as caught:
        load_model(folder, tokenizer=False)
    assert any(name in str(caught.value) for name in shapes)


# ---------------------------------------------------------------- a package called kernels


def test_transformers_imports_beside_our_kernels_package() -> None:
    """Another distribution is called ``kernels`` too; transformers must not take ours for it."""
    code = (
        "import kernels, sys\n"
        "assert not hasattr(kernels, '__version__'), kernels.__version__\n"
        "from transformers import LlamaForCausalLM, Qwen3ForCausalLM, AutoModelForCausalLM\n"
        "import transformers.integrations.hub_kernels\n"
        "assert sys.modules['kernels'] is kernels and kernels.rms_norm\n"
        "print(kernels.__file__)"
    )
    root = Path(checkpoint.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == root / "kernels" / "__init__.py"
