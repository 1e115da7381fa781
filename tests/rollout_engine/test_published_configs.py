"""config.json files as they stand on the Hub, with fewer layers: our decoder against transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from rollout_engine.models import family
from rollout_engine.models.checkpoint import load_hf_config, load_model
from rollout_engine.models.config import DecoderConfig
from rollout_engine.models.context import PackedAttention
from rollout_engine.models.decoder import Decoder

LLAMA_3_2_1B_INSTRUCT = """{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 128000,
  "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
  "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false,
  "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
  "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0,
  "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
  "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0", "use_cache": true,
  "vocab_size": 128256}"""
MISTRAL_7B_V0_1 = """{
  "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
  "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
  "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
  "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false,
  "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": true, "vocab_size": 32000}"""
QWEN2_5_0_5B = """{
  "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
  "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
  "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
  "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
  "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
  "use_cache": true, "use_mrope": false, "use_sliding_window": false, "vocab_size": 151936}"""
QWEN3_0_6B = """{
  "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643,
  "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
  "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
  "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
  "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true,
  "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false,
  "vocab_size": 151936}"""
GEMMA_2_2B = """{
  "architectures": ["Gemma2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
  "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
  "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "initializer_range": 0.02, "intermediate_size": 9216,
  "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8, "num_hidden_layers": 26,
  "num_key_value_heads": 4, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
  "rope_theta": 10000.0, "sliding_window": 4096, "torch_dtype": "float32", "transformers_version": "4.42.4",
  "use_cache": true, "vocab_size": 256000}"""
GEMMA_3_1B = """{
  "architectures": ["Gemma3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "attn_logit_softcapping": null, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
  "final_logit_softcapping": null, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
  "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768,
  "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
  "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
  "rope_scaling": null, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
  "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "use_cache": true, "vocab_size": 262144}"""
GEMMA_3_4B = """{
  "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
  "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
  "model_type": "gemma3", "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
  "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
  "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "vision_config": {"hidden_size": 1152,
  "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model", "num_attention_heads": 16,
  "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": false}}"""
PHI_3_MINI_4K_INSTRUCT = """{
  "_name_or_path": "Phi-3-mini-4k-instruct", "architectures": ["Phi3ForCausalLM"], "attention_dropout": 0.0,
  "bos_token_id": 1, "embd_pdrop": 0.0, "eos_token_id": 32000, "hidden_act": "silu", "hidden_size": 3072,
  "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "phi3",
  "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
  "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
  "rope_scaling": null, "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": false,
  "torch_dtype": "bfloat16", "transformers_version": "4.40.2", "use_cache": true, "attention_bias": false,
  "vocab_size": 32064}"""

VOCAB = 512
# name -> config.json, its eos ids, layers that show all kinds of layer, and the whole model's parameters
PUBLISHED = {
    "llama": (LLAMA_3_2_1B_INSTRUCT, (128001, 128008, 128009), 1, 1_235_814_400),
    "mistral": (MISTRAL_7B_V0_1, (2,), 1, 7_241_732_096),
    "qwen2": (QWEN2_5_0_5B, (151643,), 2, 494_032_768),
    "qwen3": (QWEN3_0_6B, (151645,), 2, 596_049_920),
    "gemma2": (GEMMA_2_2B, (1,), 2, 2_614_341_888),
    "gemma3": (GEMMA_3_1B, (1, 106), 6, 999_885_952),
    "phi3": (PHI_3_MINI_4K_INSTRUCT, (32000,), 1, 3_821_079_552),
}


def num_parameters(config: DecoderConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Decoder(config, config.vocab_size).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_logprobs_match_transformers(name: str, tmp_path: Path) -> None:
    """Cut in layers and vocabulary; weights in bfloat16, read as fp32 on both sides."""
    published, eos, layers, _ = PUBLISHED[name]
    settings = json.loads(published) | {"num_hidden_layers": layers, "vocab_size": VOCAB, "pad_token_id": 0}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with torch.device("meta"):
        scratch = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator).mul_(0.02).bfloat16()
        for name, tensor in scratch.state_dict().items()
        if name != "lm_head.weight" or not scratch.config.tie_word_embeddings
    }
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    del scratch, tensors
    model = load_model(tmp_path, tokenizer=False)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    shutil.rmtree(tmp_path)  # half a gigabyte
    assert model.eos_ids == eos and model.decoder.norm.weight.dtype == torch.float32
    ids = torch.randint(VOCAB, (40,), generator=generator)
    with torch.no_grad():
        ours = model.decoder.head.logits(model.decoder.hidden(ids, PackedAttention.from_lengths([40])))
        expected = theirs(ids[None]).logits[0]
    torch.testing.assert_close(ours.log_softmax(-1), expected.log_softmax(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_whole_model_has_its_published_number_of_parameters(name: str, tmp_path: Path) -> None:
    published, _, _, parameters = PUBLISHED[name]
    (tmp_path / "config.json").write_text(published)
    hf = load_hf_config(tmp_path)
    assert num_parameters(family(hf).decoder_config(hf)) == parameters


def test_gemma_3_4b_is_read_as_its_text_half(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(GEMMA_3_4B)
    hf = load_hf_config(tmp_path)
    config = family(hf).decoder_config(hf)
    assert hf.eos_token_id == [1, 106]
    vision_tower, projector = 416_866_032, 2_950_272
    assert num_parameters(config) + vision_tower + projector == 4_300_079_472
    assert [layer.window for layer in config.layers[:7]] == [1024] * 5 + [None, 1024]
    assert [layer.rope.theta for layer in config.layers[4:6]] == [1e4, 1e6]
    assert config.layers[5].rope.scaling is not None and config.layers[4].rope.scaling is None
