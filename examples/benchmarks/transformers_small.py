"""Small random configurations of Hugging Face transformers, and inputs for them. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, HEADS, LAYERS, HIDDEN, WORDS = 64, 4, 2, 128, 100
TEXT = {
    "vocab_size": WORDS, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN, "max_position_embeddings": 64,
}  # fmt: skip
DECODER = {**TEXT, "num_key_value_heads": 2, "use_cache": False}
IMAGE = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": HIDDEN,
    "image_size": 32, "patch_size": 4,
}  # fmt: skip


def sentences(batch: int = 2) -> dict[str, Tensor]:
    """Words and a mask that hides none."""
    words = torch.randint(2, WORDS, (batch, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": words, "attention_mask": torch.ones_like(words)}


def numbers(*shape: int) -> Callable[[], Tensor]:
    """Two samples of seeded normal numbers."""
    return lambda: torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))


def _made(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
        return made

    return make


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "BERT": (_made("BertForSequenceClassification", "BertConfig", **TEXT), sentences),
    "DistilBERT": (
        _made(
            "DistilBertForSequenceClassification", "DistilBertConfig", vocab_size=WORDS, dim=WIDTH, n_layers=LAYERS,
            n_heads=HEADS, hidden_dim=HIDDEN, max_position_embeddings=64,
        ),
        sentences,
    ),
    "RoBERTa": (_made("RobertaForSequenceClassification", "RobertaConfig", **TEXT), sentences),
    "GPT-2": (
        _made(
            "GPT2LMHeadModel", "GPT2Config", vocab_size=WORDS, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
            n_positions=64, use_cache=False,
        ),
        sentences,
    ),
    "LLaMA": (_made("LlamaForCausalLM", "LlamaConfig", **DECODER), sentences),
    "Mistral": (_made("MistralForCausalLM", "MistralConfig", **DECODER), sentences),
    "Qwen2": (_made("Qwen2ForCausalLM", "Qwen2Config", **DECODER), sentences),
    "T5 encoder": (
        _made(
            "T5EncoderModel", "T5Config", vocab_size=WORDS, d_model=WIDTH, d_kv=16, d_ff=HIDDEN, num_layers=LAYERS,
            num_heads=HEADS,
        ),
        sentences,
    ),
    "ViT": (_made("ViTForImageClassification", "ViTConfig", **IMAGE), numbers(3, 32, 32)),
    "DeiT": (_made("DeiTForImageClassification", "DeiTConfig", **IMAGE), numbers(3, 32, 32)),
    "Swin": (
        _made(
            "SwinForImageClassification", "SwinConfig", image_size=32, patch_size=2, embed_dim=32, depths=[2, 2],
            num_heads=[2, 4], window_size=4,
        ),
        numbers(3, 32, 32),
    ),
    "ConvNeXt": (
        _made("ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[32, 64], depths=[2, 2], num_stages=2),
        numbers(3, 32, 32),
    ),
    "SegFormer": (
        _made(
            "SegformerForSemanticSegmentation", "SegformerConfig", num_encoder_blocks=2, depths=[2, 2],
            sr_ratios=[2, 1], hidden_sizes=[32, 64], patch_sizes=[7, 3], strides=[4, 2], num_attention_heads=[2, 4],
            mlp_ratios=[2, 2], decoder_hidden_size=32,
        ),
        numbers(3, 64, 64),
    ),
    "Wav2Vec2": (
        _made(
            "Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", vocab_size=WORDS, hidden_size=WIDTH,
            num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=HIDDEN, conv_dim=[32, 32],
            conv_stride=[5, 2], conv_kernel=[10, 3], num_feat_extract_layers=2, num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4, classifier_proj_size=32,
        ),
        numbers(400),
    ),
    "Whisper encoder": (
        _made(
            "WhisperForAudioClassification", "WhisperConfig", vocab_size=WORDS, num_mel_bins=16, d_model=WIDTH,
            encoder_layers=LAYERS, encoder_attention_heads=HEADS, encoder_ffn_dim=HIDDEN, decoder_layers=1,
            decoder_attention_heads=HEADS, decoder_ffn_dim=HIDDEN, max_source_positions=20, classifier_proj_size=32,
            pad_token_id=0,
        ),
        numbers(16, 40),
    ),
}  # fmt: skip
