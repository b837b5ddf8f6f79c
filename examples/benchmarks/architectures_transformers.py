"""Every model type of transformers from its configuration class, made small by the names of its numbers; and inputs.

Nothing is downloaded. A model type is one architecture, with the first of `HEADS` that it has, or none.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.auto import modeling_auto

WORDS, LENGTH, IMAGE, FRAMES = 128, 12, 64, 4
HEADS = (  # of several, the first that a model type has
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SEQUENCE_CLASSIFICATION", "MASKED_LM", "IMAGE_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION", "OBJECT_DETECTION", "DEPTH_ESTIMATION", "UNIVERSAL_SEGMENTATION",
    "VIDEO_CLASSIFICATION", "AUDIO_CLASSIFICATION", "CTC", "SPEECH_SEQ_2_SEQ", "TOKEN_CLASSIFICATION",
    "QUESTION_ANSWERING", "ZERO_SHOT_IMAGE_CLASSIFICATION", "IMAGE_TEXT_TO_TEXT", "IMAGE_TO_IMAGE",
    "TIME_SERIES_PREDICTION", "MASKED_IMAGE_MODELING", "IMAGE_MATTING", "INSTANCE_SEGMENTATION",
)  # fmt: skip
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
NUMBERS: tuple[tuple[str, int], ...] = (  # the first pattern that matches a whole name
    (r".*vocab_size(_.*)?|n_words|codebook_size|.*num_embeddings", WORDS),
    (
        r"(v|qk_nope|qk|global|swa|linear_.*|mamba_|ssm_|attention_|index|kv)?_?head_dim|d_kv|.*_head_size|kv_channels",
        16,
    ),
    (r"qk_rope_head_dim|rotary_dim|rope_dim", 8),
    (r".*lora_rank|.*_rank", 16),
    (r"(n|num)_(local_|routed_|total_)?experts|moe_num_experts|num_local_experts", 4),
    (r".*experts_per_tok(en)?|moe_k|moe_topk|top_k_experts|num_selected_experts|.*_top_?k", 2),
    (r"n_groups?|topk_group|n_group", 1),
    (r"(num_)?mem_blocks|n_shared_experts|num_shared_experts|first_k_dense_replace|num_conv_layers_.*", 1),
    (r".*(num|n)_(hidden_)?layers?|.*_layers|.*_depth|n_layers?|num_blocks|depth|num_.*_blocks", 2),
    (r".*(num|n)_(key_value|kv)_heads|.*num_kv_heads|num_attention_groups", 2),
    (r".*heads|n_head|.*_n_head|.*num_heads", 4),
    (r".*(intermediate|ffn|feed_?forward|d_ff|d_inner|mlp_hidden|inner_dim|mlp_dim|fc_size).*", 128),
    (
        r".*(hidden_size|d_model|n_embd|n_embed|embed(ding)?_dim|embed_size|hidden_dim|embedding_size|projection_dim)",
        64,
    ),
    (r"(.*_)?dim(_size)?|.*_dim|.*_channels_out|lru_width|hidden_channels|.*projector.*size|channels", 64),
    (r".*image_size|.*img_size|input_size|crop_size", IMAGE),
    (r"max_position_embeddings|n_positions|n_ctx|max_.*position.*|max_seq_len.*|.*context_length|seq_length", 64),
    (r".*num_mel_bins|feature_size|num_mel.*", 16),
    (r".*num_queries", 8),
    (r".*frames", FRAMES),
    (r"patch_size", 8),
    (r"mm_tokens_per_image", 16),
)
MOST, MOST_TOKENS = 40_000_000, 600
WAYS = ("plain", "tokens", "image", "channel", "frames first", "text")  # of giving a model its inputs
SERIES = ("past_values", "past_observed_mask", "future_values", "future_time_features")
KEPT = (  # which are not made smaller
    r"num_channels|in_channels|.*kernel.*|.*stride.*|num_labels|.*window.*|.*chunk.*|.+_patch.*|.*type_.*|"
    r".*patch_.+(?<!patch_size)|.*norm.*dim.*|num_feat_extract_layers"
)


def small(kind: type[PretrainedConfig], *, widths: bool = True) -> PretrainedConfig:
    """A small configuration of a class: its default one, with other numbers by their names, or only with few layers."""
    default = kind()
    options: dict[str, Any] = {}
    for name, value in vars(default).items():
        if isinstance(value, PretrainedConfig):
            known = type(value).__name__.startswith("Timm")
            options[name] = value if known else small(type(value), widths=widths)
        elif name in IDS and value is not None:
            options[name] = IDS[name]
        elif (widths or re.fullmatch(DEPTHS, name)) and (new := smaller(name, value)) is not None:
            options[name] = new
    if getattr(default, "kv_lora_rank", None):
        options["num_key_value_heads"] = options.get("num_attention_heads", default.num_attention_heads)
    if vars(default).get("layer_types"):
        kinds = list(dict.fromkeys(vars(default)["layer_types"]))
        options |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    return kind(**options | CORRECTIONS.get(kind.__name__, {}))


def smaller(name: str, value: Any) -> Any:
    """A number, or a list of numbers, in its small form by its name; None where it stays."""
    if name.startswith("_") or isinstance(value, bool) or re.fullmatch(KEPT, name):
        return None
    if isinstance(value, int):
        if re.fullmatch(r".*token_(id|index)|.*_id", name) and value >= WORDS:
            return 96 + sum(map(ord, name)) % 32
        found = next((number for pattern, number in NUMBERS if re.fullmatch(pattern, name)), value)
        return min(found, value) if value != found else None
    if isinstance(value, (list, tuple)) and value and all(type(entry) is int for entry in value):
        return type(value)(_smaller_list(name, list(value)))
    return None


def _smaller_list(name: str, values: list[int]) -> list[int]:
    if re.search(r"depth|layers|blocks|num_.*repeat", name) and "drop" not in name:
        return [min(value, 2) for value in values]
    if re.search(r"hidden_sizes|channels|dims?$|conv_dim|embed_dim|widths|feature", name) and min(values) >= 16:
        factor = max(1, min(values) // 16)
        return [max(value // factor // 8 * 8, 8) for value in values]
    if re.search(r"image_size|input_size", name):
        return [IMAGE] * len(values)
    return values


DEPTHS = (
    r".*vocab_size(_.*)?|n_words|.*layers?|.*depths?|.*_blocks|.*image_size|.*position.*|.*num_queries|.*frames|"
    r".*experts"
)
_SERIES = {"prediction_length": 8, "context_length": 16, "lags_sequence": [1, 2], "num_time_features": 1}
_SWIN = {"image_size": 64, "embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
CORRECTIONS: dict[str, dict[str, Any]] = {
    "AutoformerConfig": _SERIES,
    "InformerConfig": _SERIES,
    "TimeSeriesTransformerConfig": _SERIES,
    "PatchTSTConfig": {"context_length": 32, "patch_length": 4, "patch_stride": 4, "prediction_length": 8},
    "PatchTSMixerConfig": {"context_length": 32, "patch_length": 4, "patch_stride": 4, "prediction_length": 8},
    "TransfoXLConfig": {"cutoffs": [20, 40]},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "ReformerConfig": {
        "is_decoder": True,
        "axial_pos_shape": [4, 3],
        "axial_pos_embds_dim": [32, 32],
        "lsh_attn_chunk_length": 4,
        "local_attn_chunk_length": 4,
    },
    "SwinConfig": _SWIN,
    "Swinv2Config": _SWIN,
    "DonutSwinConfig": _SWIN,
    "EfficientNetConfig": {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280},
    "XmodConfig": {"default_language": "en_XX"},
}


def _mapping(head: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES")
    return found


def architectures() -> dict[str, str]:
    """The class of each model type."""
    chosen: dict[str, str] = {}
    for head in HEADS:
        for kind, name in _mapping(head).items():
            chosen.setdefault(kind, name if isinstance(name, str) else name[0])
    for kind, name in modeling_auto.MODEL_MAPPING_NAMES.items():
        chosen.setdefault(kind, name if isinstance(name, str) else name[0])
    kinds = sorted(chosen, key=lambda kind: not chosen[kind].lower().startswith(re.sub("[_-]", "", kind)))
    classes: dict[str, str] = {}
    for kind in kinds:
        classes.setdefault(chosen[kind], kind)
    return {kind: name for name, kind in sorted(classes.items(), key=lambda pair: pair[1])}


Inputs = Callable[[int], dict[str, Tensor]]


def made(kind: str) -> tuple[nn.Module, Inputs]:
    """A small model of a model type, with seeded random weights, and its inputs for a batch size.

    Configurations and inputs are tried until the model runs; the first failure is raised where it never does.
    """
    first: Exception | None = None
    for widths in (True, False):
        try:
            model = build(getattr(transformers, architectures()[kind]), widths=widths)
            return model, running(model)
        except Exception as error:  # noqa: BLE001 - the next one is tried
            first = first or error
    assert first is not None
    raise first


def build(model_class: Any, *, widths: bool) -> nn.Module:
    """A model of a class by its small configuration, in eval mode and without a cache."""
    torch.manual_seed(0)
    config = small(model_class.config_class, widths=widths)
    for each in [config, *(v for v in vars(config).values() if isinstance(v, PretrainedConfig))]:
        if "use_cache" in each.to_dict():
            each.use_cache = False
    size = 0
    with suppress(RuntimeError, NotImplementedError), torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > MOST:
        raise ValueError(f"the smallest configuration that is known has {size:,} parameters")
    model: nn.Module = model_class(config).eval()
    return model


def running(model: Any) -> Inputs:
    """The first kind of inputs with which a model runs."""
    first: Exception | None = None
    tokens = 0
    for way in WAYS:
        inputs = partial(inputs_for, model, way, tokens)
        try:
            with torch.no_grad():
                model(**inputs(2))
        except Exception as error:  # noqa: BLE001 - the next kind is tried
            first = first or error
            if found := re.search(r"tokens: 0, features: (\d+)", str(error)):
                tokens = int(found[1]) // 2
        else:
            return inputs
    assert first is not None
    raise first


def inputs_for(model: Any, way: str, tokens: int, batch: int) -> dict[str, Tensor]:
    """Seeded inputs of a model, by the names that its forward takes."""
    names = inspect.signature(type(model).forward).parameters
    generator = torch.Generator().manual_seed(batch)
    config, main = model.config, model.main_input_name
    needed = {main} & set(names) | {
        name
        for name, p in names.items()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and name != "self"
    }
    if config.is_encoder_decoder:
        needed |= {"decoder_input_ids"} & set(names)
    if (hasattr(config, "vision_config") and way != "text") or way == "image" or "pixel_values" in needed:
        needed |= {"pixel_values"} & set(names)
    needed |= {"bbox", *(name for name in SERIES if "past_time_features" in needed)} & set(names)
    found = {name: MAKERS[name](config, batch, generator) for name in sorted(needed) if name in MAKERS}
    if missing := sorted(needed - set(found)):
        raise LookupError(f"no input is known for {', '.join(missing)}")
    if way == "tokens" and tokens and "input_ids" in found:
        image = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", 0)
        words = tokens if tokens < MOST_TOKENS else tokens // config.get_text_config().hidden_size
        found["input_ids"] = torch.cat([torch.full((batch, words), image), found["input_ids"]], 1)
    if way == "channel" and "input_values" in found:
        found["input_values"] = found["input_values"][:, None]
    if way == "frames first" and "input_features" in found:
        found["input_features"] = found["input_features"].mT.contiguous()
    if "input_ids" in found and "attention_mask" in names:
        found["attention_mask"] = torch.ones_like(found["input_ids"])
        found["attention_mask"][:, -1] = 0  # samples with padding; without, models leave masks out
    return found


def _words(config: Any, batch: int, generator: torch.Generator) -> Tensor:
    return torch.randint(3, 90, (batch, LENGTH), generator=generator)


def _vision(config: Any) -> Any:
    return next(
        (v for key in ("vision_config", "backbone_config") if (v := getattr(config, key, None)) is not None), config
    )


def _images(config: Any, batch: int, generator: torch.Generator) -> Tensor:
    vision = _vision(config)
    size = getattr(vision, "image_size", None) or getattr(vision, "img_size", None) or IMAGE
    size = list(size) if isinstance(size, (list, tuple)) else [size, size]
    channels = getattr(vision, "num_channels", None) or 3
    frames = getattr(vision, "num_frames", None)
    return torch.randn(batch, *([frames] if frames else []), channels, *size, generator=generator)


def _features(config: Any, batch: int, generator: torch.Generator) -> Tensor:
    named = ("num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels", "input_dim", "num_mels")
    configs = [config, *(v for v in vars(config).values() if isinstance(v, PretrainedConfig))]
    bins = next((v for each in configs for name in named if (v := getattr(each, name, None))), 16)
    frames = 2 * next((v for each in configs if (v := getattr(each, "max_source_positions", None))), 32)
    return torch.randn(batch, bins, frames, generator=generator)


def _series(config: Any, batch: int, generator: torch.Generator) -> Tensor:
    lags = max(getattr(config, "lags_sequence", None) or [0])
    channels = getattr(config, "num_input_channels", None)
    shape = (batch, config.context_length + lags, *([channels] if channels else []))
    return torch.randn(*shape, generator=generator)


def _clips(config: Any, batch: int, generator: torch.Generator) -> Tensor:
    images = _images(config, batch, generator)
    return images if images.ndim == 5 else images[:, None].expand(-1, FRAMES, -1, -1, -1).clone()


MAKERS: dict[str, Callable[[Any, int, torch.Generator], Tensor]] = {
    "input_ids": _words,
    "decoder_input_ids": _words,
    "pixel_values": _images,
    "input_features": _features,
    "inputs": _words,
    "pixel_values_videos": _clips,
    "flattened_patches": lambda config, batch, generator: torch.cat(
        [torch.ones(batch, 6, 2), torch.randn(batch, 6, 768, generator=generator)], 2
    ),
    "past_values": _series,
    "past_time_features": lambda config, batch, generator: torch.randn(batch, 18, 1, generator=generator),
    "past_observed_mask": lambda config, batch, generator: torch.ones(batch, 18),
    "future_values": lambda config, batch, generator: torch.randn(batch, 8, generator=generator),
    "future_time_features": lambda config, batch, generator: torch.randn(batch, 8, 1, generator=generator),
    "input_values": lambda config, batch, generator: torch.randn(batch, 1600, generator=generator),
    "bbox": lambda config, batch, generator: (
        torch.zeros(batch, LENGTH, 4, dtype=torch.long) + torch.tensor([1, 2, 9, 9])
    ),
}


def labels(model: Any, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Labels for the loss of a model's head; none where the class has no usual loss."""
    name, count = type(model).__name__, len(next(iter(batch.values())))
    if re.search("ForCausalLM|ForMaskedLM|LMHeadModel|ForConditionalGeneration", name) and "input_ids" in batch:
        return {"labels": batch.get("decoder_input_ids", batch["input_ids"])}
    if re.search("For(Sequence|Image|Audio|Video)Classification", name):
        return {"labels": torch.arange(count) % 2}
    if "ForTokenClassification" in name:
        return {"labels": batch["input_ids"] % 2}
    return {}


def imported() -> None:
    """Import what most models of transformers share."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    for name in ("LlamaForCausalLM", "BertModel", "ViTModel", "T5Model", "Wav2Vec2Model", "LlavaModel", "MixtralModel"):
        getattr(transformers, name)
    import fxprune.integrations.huggingface  # noqa: F401
