"""The members of every library that architectures.py tries: how each is built, without weights, and its inputs.

A library that is not installed has no members. Every member is a function that gives the model and a function from a
batch size to seeded inputs.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from weights import MEMBERS, SIZES, family_of

Inputs = Callable[[int], Any]
Made = tuple[nn.Module, Inputs]
Make = Callable[[], Made]


def numbers(*shape: int) -> Inputs:
    """Seeded normal numbers of a shape, for each sample."""
    return lambda batch: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))


def several(*parts: Inputs) -> Inputs:
    """Several inputs."""
    return lambda batch: tuple(part(batch) for part in parts)


def named(**parts: Inputs) -> Inputs:
    """Several inputs by name."""
    return lambda batch: {name: part(batch) for name, part in parts.items()}


def words(length: int, count: int = 100) -> Inputs:
    """Numbers of words."""
    return lambda batch: torch.randint(1, count, (batch, length), generator=torch.Generator().manual_seed(batch))


def first_running(attempts: Sequence[tuple[Callable[[], nn.Module], Inputs]]) -> Made:
    """The first of several models with inputs that runs; raises the last one's error where none does."""
    for position, (make, inputs) in enumerate(attempts):
        try:
            model = make().eval()
            with torch.no_grad():
                model(*([given] if isinstance(given := inputs(2), Tensor) else given))
        except Exception:
            if position == len(attempts) - 1:
                raise
        else:
            return model, inputs
    raise LookupError("no attempt is given")


# --- torchvision and timm


LARGER = {"raft_small": 128, "s3d": 224, "mvit_v1_b": 224}


def of_torchvision(name: str) -> Made:
    """A member of torchvision's families; the backbone of a detector."""
    size = (SIZES | LARGER).get(name, 64)
    family = family_of(name)
    options: dict[str, Any] = {"weights": None}
    if family in ("segmentation", "detection"):
        options["weights_backbone"] = None
    if name.startswith("vit_"):
        options["image_size"] = size
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    model: nn.Module = torchvision.models.get_model(name, **options)
    if family == "optical flow":
        return model, several(numbers(3, size, size), numbers(3, size, size))
    shape = (3, 16 if name in LARGER else 8, size, size) if family == "video" else (3, size, size)
    return model.get_submodule("backbone") if family == "detection" else model, numbers(*shape)  # type: ignore[return-value]


SMALL_WORDS = (
    "test_",
    "atto",
    "femto",
    "pico",
    "nano",
    "xxs",
    "xxt",
    "tiny",
    "_050",
    "_s0",
    "_m0",
    "_b0",
    "_s",
    "18",
    "_xs",
    "_14",
)


def timm_members() -> dict[str, Make]:
    """A small member of each module of timm."""
    import timm

    found = {}
    for module in timm.list_modules():
        if names := timm.list_models(module=module):
            name = min(names, key=_size_by_name)
            found[f"{module}: {name}"] = partial(of_timm, name)
    return found


def _size_by_name(name: str) -> tuple[int, int, str]:
    rank = next((index for index, word in enumerate(SMALL_WORDS) if word in name), len(SMALL_WORDS))
    return rank, len(name), name


def of_timm(name: str) -> Made:
    """A model of timm at the smallest images that it takes."""
    import timm

    height = timm.get_pretrained_cfg(name).input_size[-1] if timm.get_pretrained_cfg(name) else 224
    makes = [
        (lambda: timm.create_model(name, img_size=64, num_classes=10), numbers(3, 64, 64)),
        (lambda: timm.create_model(name, num_classes=10), numbers(3, 64, 64)),
        (lambda: timm.create_model(name, num_classes=10), numbers(3, height, height)),
        (lambda: timm.create_model(name), numbers(3, height, height)),
    ]
    return first_running(makes)


# --- ultralytics, segmentation_models_pytorch, monai


def ultralytics_members() -> dict[str, Make]:
    """Every network of ultralytics by its yaml, in the smallest size, without those that are told what to look for."""
    os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp())
    os.environ.setdefault("YOLO_OFFLINE", "true")
    import ultralytics

    folder = Path(ultralytics.__file__).parent / "cfg" / "models"
    names = [path.name for path in sorted(folder.glob("*/*.yaml")) if not path.name.startswith("yoloe")]
    sizes = ("s", "m", "l", "x", "b", "e", "c")
    kept = [
        n
        for n in names
        if "world" not in n and not (n[4:7] in ("v9e", "v9m", "v9s") or (n[4:].startswith("v10") and n[7:8] in sizes))
    ]
    return {name.removesuffix(".yaml"): partial(of_ultralytics, name) for name in kept if "rtdetr-x" not in name}


def of_ultralytics(name: str) -> Made:
    """The network of a yaml."""
    from ultralytics import RTDETR, YOLO

    side = 64 if "cls" in name else 128
    network: Any = (RTDETR if name.startswith("rtdetr") or "-rtdetr" in name else YOLO)(_smallest_of_yaml(name))
    return network.model.eval(), numbers(3, side, side)


def _smallest_of_yaml(name: str) -> str:
    stem, _, rest = name.removesuffix(".yaml").partition("-")
    scaled = stem in ("yolov5", "yolov6", "yolov8", "yolo11", "yolo12", "yolo26")
    return f"{stem}{'n' if scaled else ''}{'-' * bool(rest)}{rest}.yaml"


SMP_DECODERS = (
    "Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "PAN", "DeepLabV3", "DeepLabV3Plus", "UPerNet",
    "Segformer", "DPT",
)  # fmt: skip
SMP_ENCODERS = (
    "densenet121", "vgg11_bn", "mobilenet_v2", "efficientnet-b0", "mit_b0", "mobileone_s0", "dpn68", "xception",
    "inceptionresnetv2", "inceptionv4", "se_resnet50", "resnext50_32x4d", "timm-efficientnet-b0", "timm-skresnet18",
    "tu-convnext_atto", "tu-regnetx_002",
)  # fmt: skip


def smp_members() -> dict[str, Make]:
    """Every decoder of segmentation_models_pytorch, and U-Nets of every family of encoders."""
    pairs = [(d, "resnet18" if d != "DPT" else "tu-vit_tiny_patch16_224") for d in SMP_DECODERS]
    pairs += [("Unet", encoder) for encoder in SMP_ENCODERS]
    return {f"{decoder} of {encoder}": partial(of_smp, decoder, encoder) for decoder, encoder in pairs}


def of_smp(decoder: str, encoder: str) -> Made:
    """A segmentation network."""
    import segmentation_models_pytorch as smp

    side = 224 if decoder == "DPT" else 64
    return getattr(smp, decoder)(encoder, encoder_weights=None, classes=4), numbers(3, side, side)


_FLAT: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
_STEPS: dict[str, Any] = {"channels": (8, 16, 32), "strides": (2, 2)}
MONAI: dict[str, tuple[dict[str, Any], Inputs]] = {
    "UNet": ({**_FLAT, **_STEPS, "num_res_units": 2}, numbers(1, 32, 32)),
    "BasicUNet": ({**_FLAT, "features": (8, 8, 16, 32, 64, 8)}, numbers(1, 32, 32)),
    "BasicUNetPlusPlus": ({**_FLAT, "features": (8, 8, 16, 32, 64, 8)}, numbers(1, 32, 32)),
    "AttentionUnet": ({**_FLAT, **_STEPS}, numbers(1, 32, 32)),
    "SegResNet": ({**_FLAT, "init_filters": 8}, numbers(1, 32, 32)),
    "SegResNetVAE": ({**_FLAT, "init_filters": 8, "input_image_size": (32, 32)}, numbers(1, 32, 32)),
    "SegResNetDS": ({**_FLAT, "init_filters": 8, "dsdepth": 2}, numbers(1, 32, 32)),
    "VNet": ({**_FLAT, "spatial_dims": 3, "out_channels": 2}, numbers(1, 32, 32, 32)),
    "DynUNet": (
        {**_FLAT, "kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2],
         "filters": [8, 16, 32]},
        numbers(1, 32, 32),
    ),
    "UNETR": (
        {"in_channels": 1, "out_channels": 2, "img_size": 32, "feature_size": 8, "hidden_size": 64, "mlp_dim": 128,
         "num_heads": 4, "spatial_dims": 2},
        numbers(1, 32, 32),
    ),
    "SwinUNETR": ({"in_channels": 1, "out_channels": 2, "feature_size": 12, "spatial_dims": 2}, numbers(1, 64, 64)),
    "HighResNet": ({"spatial_dims": 2, "in_channels": 1, "out_channels": 2}, numbers(1, 32, 32)),
    "DenseNet": ({**_FLAT, "init_features": 16, "growth_rate": 8, "block_config": (2, 2, 2)}, numbers(1, 32, 32)),
    "ResNet": (
        {"block": "basic", "layers": [1, 1, 1, 1], "block_inplanes": [8, 16, 32, 64], "spatial_dims": 2,
         "n_input_channels": 1, "num_classes": 2},
        numbers(1, 32, 32),
    ),
    "SEResNet50": ({"spatial_dims": 2, "in_channels": 1, "num_classes": 2}, numbers(1, 64, 64)),
    "EfficientNetBN": (
        {"model_name": "efficientnet-b0", "pretrained": False, "spatial_dims": 2, "in_channels": 1, "num_classes": 2},
        numbers(1, 64, 64),
    ),
    "ViT": (
        {"in_channels": 1, "img_size": 32, "patch_size": 8, "hidden_size": 64, "mlp_dim": 128, "num_layers": 2,
         "num_heads": 4, "classification": True, "spatial_dims": 2},
        numbers(1, 32, 32),
    ),
    "ViTAutoEnc": (
        {"in_channels": 1, "img_size": (32, 32), "patch_size": (8, 8), "hidden_size": 64, "mlp_dim": 128,
         "num_layers": 2, "num_heads": 4, "spatial_dims": 2},
        numbers(1, 32, 32),
    ),
    "AutoEncoder": ({**_FLAT, **_STEPS}, numbers(1, 32, 32)),
    "Regressor": (
        {"in_shape": (1, 32, 32), "out_shape": (2,), "channels": (8, 16), "strides": (2, 2)}, numbers(1, 32, 32)
    ),
    "Classifier": (
        {"in_shape": (1, 32, 32), "classes": 2, "channels": (8, 16), "strides": (2, 2)}, numbers(1, 32, 32)
    ),
    "Discriminator": ({"in_shape": (1, 32, 32), "channels": (8, 16), "strides": (2, 2)}, numbers(1, 32, 32)),
    "PatchDiscriminator": ({"spatial_dims": 2, "channels": 8, "in_channels": 1, "num_layers_d": 2}, numbers(1, 32, 32)),
    "Generator": (
        {"latent_shape": (16,), "start_shape": (16, 4, 4), "channels": (16, 8), "strides": (2, 2)}, numbers(16)
    ),
    "FlexibleUNet": (
        {"in_channels": 3, "out_channels": 2, "backbone": "efficientnet-b0", "spatial_dims": 2}, numbers(3, 64, 64)
    ),
    "AHNet": (
        {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "psp_block_num": 1, "upsample_mode": "nearest"},
        numbers(1, 64, 64, 64),
    ),
    "DiffusionModelUNet": (
        {**_FLAT, "channels": (16, 32), "num_res_blocks": 1, "attention_levels": (False, True), "norm_num_groups": 8,
         "num_head_channels": 8},
        several(numbers(1, 16, 16), lambda batch: torch.arange(batch) * 10),
    ),
    "AutoencoderKL": (
        {**_FLAT, "channels": (16, 32), "num_res_blocks": 1, "latent_channels": 4, "norm_num_groups": 8,
         "attention_levels": (False, False)},
        numbers(1, 16, 16),
    ),
    "VQVAE": (
        {**_FLAT, "channels": (16, 16), "num_res_channels": (16, 16), "num_res_layers": 1, "num_embeddings": 16,
         "embedding_dim": 16},
        numbers(1, 16, 16),
    ),
    "VoxelMorphUNet": (
        {"spatial_dims": 2, "in_channels": 2, "unet_out_channels": 8, "channels": (8,) * 6,
         "final_conv_channels": (8, 8)},
        numbers(2, 32, 32),
    ),
    "Restormer": (
        {"inp_channels": 1, "out_channels": 1, "dim": 8, "num_blocks": (1, 1, 1, 1), "heads": (1, 1, 2, 2),
         "num_refinement_blocks": 1, "spatial_dims": 2},
        numbers(1, 32, 32),
    ),
    "MedNeXt": ({"spatial_dims": 2, "init_filters": 8, "in_channels": 1, "out_channels": 2}, numbers(1, 32, 32)),
    "Quicknat": ({"num_channels": 1, "num_filters": 8}, numbers(1, 32, 32)),
    "HoVerNet": ({"mode": "fast", "out_classes": 2}, numbers(3, 256, 256)),
    "FullyConnectedNet": ({"in_channels": 10, "out_channels": 2, "hidden_channels": [16, 16]}, numbers(10)),
    "MaskedAutoEncoderViT": (
        {"in_channels": 1, "img_size": 32, "patch_size": 8, "hidden_size": 64, "mlp_dim": 128, "num_layers": 2,
         "num_heads": 4, "decoder_hidden_size": 32, "decoder_mlp_dim": 64, "decoder_num_layers": 1,
         "decoder_num_heads": 4, "spatial_dims": 2},
        numbers(1, 32, 32),
    ),
}  # fmt: skip


def of_monai(name: str) -> Made:
    """A network of monai."""
    nets = importlib.import_module("monai.networks.nets")
    options, inputs = MONAI[name]
    return getattr(nets, name)(**options), inputs


# --- torchaudio, open_clip


def _lengths(value: int) -> Inputs:
    return lambda batch: torch.full((batch,), value)


TORCHAUDIO: dict[str, tuple[dict[str, Any], Inputs]] = {
    "Conformer": (
        {"input_dim": 32, "num_heads": 4, "ffn_dim": 64, "num_layers": 2, "depthwise_conv_kernel_size": 5},
        several(numbers(20, 32), _lengths(20)),
    ),
    "ConvTasNet": ({"num_sources": 2, "enc_num_feats": 32, "msk_num_feats": 16, "msk_num_hidden_feats": 32,
                    "msk_num_layers": 2, "msk_num_stacks": 2}, numbers(1, 400)),
    "DeepSpeech": ({"n_feature": 16, "n_hidden": 32, "n_class": 10}, numbers(1, 20, 16)),
    "Emformer": (
        {"input_dim": 32, "num_heads": 4, "ffn_dim": 64, "num_layers": 2, "segment_length": 4,
         "right_context_length": 1},
        several(numbers(21, 32), _lengths(20)),
    ),
    "HDemucs": ({"sources": ["a", "b"], "channels": 8, "nfft": 1024, "depth": 5}, numbers(2, 16384)),
    "Wav2Letter": ({"num_classes": 10, "input_type": "mfcc", "num_features": 16}, numbers(16, 100)),
    "WaveRNN": (
        {"upsample_scales": [2, 2], "n_classes": 16, "hop_length": 4, "n_res_block": 2, "n_rnn": 32, "n_fc": 32,
         "n_freq": 16, "n_hidden": 16, "n_output": 16},
        several(numbers(1, 16), numbers(1, 16, 8)),
    ),
    "wav2vec2_model": (
        {"extractor_mode": "group_norm", "extractor_conv_layer_config": [(32, 10, 5), (32, 3, 2)],
         "extractor_conv_bias": False, "encoder_embed_dim": 64, "encoder_projection_dropout": 0.0,
         "encoder_pos_conv_kernel": 16, "encoder_pos_conv_groups": 4, "encoder_num_layers": 2, "encoder_num_heads": 4,
         "encoder_attention_dropout": 0.0, "encoder_ff_interm_features": 128, "encoder_ff_interm_dropout": 0.0,
         "encoder_dropout": 0.0, "encoder_layer_norm_first": False, "encoder_layer_drop": 0.0, "aux_num_out": 10},
        numbers(800),
    ),
    "wavlm_model": (
        {"extractor_mode": "group_norm", "extractor_conv_layer_config": [(32, 10, 5), (32, 3, 2)],
         "extractor_conv_bias": False, "encoder_embed_dim": 64, "encoder_projection_dropout": 0.0,
         "encoder_pos_conv_kernel": 16, "encoder_pos_conv_groups": 4, "encoder_num_layers": 2, "encoder_num_heads": 4,
         "encoder_num_buckets": 32, "encoder_max_distance": 80,
         "encoder_attention_dropout": 0.0, "encoder_ff_interm_features": 128, "encoder_ff_interm_dropout": 0.0,
         "encoder_dropout": 0.0, "encoder_layer_norm_first": False, "encoder_layer_drop": 0.0, "aux_num_out": 10},
        numbers(800),
    ),
    "squim_objective_base": ({}, numbers(16000)),
}  # fmt: skip


def of_torchaudio(name: str) -> Made:
    """A network of torchaudio."""
    models = importlib.import_module("torchaudio.models")
    options, inputs = TORCHAUDIO[name]
    return getattr(models, name)(**options), inputs


_TEXT = {"context_length": 16, "vocab_size": 100, "width": 32, "heads": 4, "layers": 2}
_SEEN = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2}
OPEN_CLIP: dict[str, dict[str, Any]] = {
    "CLIP of ViT": {"vision_cfg": {**_SEEN, "head_width": 16}},
    "CLIP of ResNet": {"vision_cfg": {"image_size": 64, "layers": (1, 1, 1, 1), "width": 8, "head_width": 32}},
    "CLIP of ConvNeXt": {
        "vision_cfg": {"timm_model_name": "convnext_atto", "image_size": 64, "timm_pool": "", "timm_proj": "linear"}
    },
    "CLIP with pooling by attention": {
        "vision_cfg": {**_SEEN, "head_width": 16, "attentional_pool": True, "attn_pooler_queries": 4,
                       "attn_pooler_heads": 4}
    },
    "CoCa": {
        "vision_cfg": {**_SEEN, "head_width": 16, "attentional_pool": True, "attn_pooler_heads": 4,
                       "output_tokens": True},
        "multimodal_cfg": {**_TEXT, "mlp_ratio": 2, "dim_head": 8, "n_queries": 8, "attn_pooler_heads": 4},
    },
}  # fmt: skip


def of_open_clip(name: str) -> Made:
    """A pair of towers of open_clip."""
    import open_clip

    options = OPEN_CLIP[name]
    text = {**_TEXT, **({"embed_cls": True, "output_tokens": True} if name == "CoCa" else {})}
    kind = open_clip.CoCa if name == "CoCa" else open_clip.CLIP
    side = options["vision_cfg"]["image_size"]
    model = kind(embed_dim=32, text_cfg=text, **options)
    length = 15 if name == "CoCa" else 16
    return model, several(numbers(3, side, side), words(length))


# --- torch_geometric


class GraphNet(nn.Module):
    """Two convolutions of torch_geometric on a graph, between linear layers on its nodes."""

    def __init__(self, make: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.lift, self.first, self.second, self.head = nn.Linear(16, 32), make(32, 32), make(32, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor, edge_index: Tensor, *more: Tensor) -> Tensor:
        """Nodes (n, 16), edges (2, m) and what else the convolution takes: the classes (n, 4)."""
        x = self.first(self.lift(x), edge_index, *more).relu()
        found: Tensor = self.head(self.second(x, edge_index, *more).relu())
        return found


def graph(nodes: int = 10, edges: int = 24) -> Callable[[int], tuple[Tensor, Tensor]]:
    """A random graph with some nodes for each sample."""

    def made(batch: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(batch)
        count = nodes * batch
        pairs = torch.randint(0, count, (2, edges * batch), generator=generator)
        return torch.randn(count, 16, generator=generator), torch.cat([pairs, torch.arange(count).expand(2, -1)], 1)

    return made


def _with(inputs: Inputs, *more: Callable[[tuple[Tensor, ...]], Tensor]) -> Inputs:
    return lambda batch: (*(made := inputs(batch)), *(each(made) for each in more))


def _edge_features(width: int) -> Callable[[tuple[Tensor, ...]], Tensor]:
    return lambda made: torch.rand(made[1].shape[1], width, generator=torch.Generator().manual_seed(0))


def _edge_kinds(made: tuple[Tensor, ...]) -> Tensor:
    return torch.randint(0, 3, (made[1].shape[1],), generator=torch.Generator().manual_seed(0))


def _mlp(a: int, b: int) -> nn.Module:
    return nn.Sequential(nn.Linear(a, 24), nn.ReLU(), nn.Linear(24, b))


def _pyg() -> dict[str, tuple[Callable[[int, int], nn.Module], Inputs]]:
    from torch_geometric import nn as g

    plain = (
        "GCNConv", "SAGEConv", "GraphConv", "ResGatedGraphConv", "GATConv", "GATv2Conv", "TransformerConv", "TAGConv",
        "ARMAConv", "SGConv", "SSGConv", "MFConv", "FeaStConv", "LEConv", "ClusterGCNConv", "GENConv", "FiLMConv",
        "SuperGATConv", "MixHopConv", "GeneralConv",
    )  # fmt: skip
    found: dict[str, tuple[Callable[[int, int], nn.Module], Inputs]] = {}
    for name in plain:
        options = {"SSGConv": {"alpha": 0.1}, "MixHopConv": {"powers": [1]}}.get(name, {})
        found[name] = partial(getattr(g, name), **options), graph()
    found |= {
        "ChebConv": (lambda a, b: g.ChebConv(a, b, K=2), graph()),
        "GINConv": (lambda a, b: g.GINConv(_mlp(a, b)), graph()),
        "EdgeConv": (lambda a, b: g.EdgeConv(_mlp(2 * a, b)), graph()),
        "PNAConv": (
            lambda a, b: g.PNAConv(a, b, ["mean", "max"], ["identity", "amplification"], deg=torch.ones(20).long()),
            graph(),
        ),
        "EGConv": (lambda a, b: g.EGConv(a, b, num_heads=4), graph()),
        "GatedGraphConv": (lambda a, b: g.GatedGraphConv(b, num_layers=2), graph()),
        "AntiSymmetricConv": (lambda a, b: g.AntiSymmetricConv(a), graph()),
        "DirGNNConv": (lambda a, b: g.DirGNNConv(g.SAGEConv(a, b)), graph()),
        "GPSConv": (lambda a, b: g.GPSConv(a, g.GCNConv(a, a), heads=4), graph()),
        "GINEConv": (lambda a, b: g.GINEConv(_mlp(a, b), edge_dim=4), _with(graph(), _edge_features(4))),
        "NNConv": (lambda a, b: g.NNConv(a, b, _mlp(4, a * b)), _with(graph(), _edge_features(4))),
        "CGConv": (lambda a, b: g.CGConv(a, dim=4), _with(graph(), _edge_features(4))),
        "GMMConv": (lambda a, b: g.GMMConv(a, b, dim=2, kernel_size=3), _with(graph(), _edge_features(2))),
        "PDNConv": (lambda a, b: g.PDNConv(a, b, edge_dim=4, hidden_channels=8), _with(graph(), _edge_features(4))),
        "RGCNConv": (lambda a, b: g.RGCNConv(a, b, num_relations=3), _with(graph(), _edge_kinds)),
        "RGATConv": (lambda a, b: g.RGATConv(a, b, num_relations=3), _with(graph(), _edge_kinds)),
        "FastRGCNConv": (lambda a, b: g.FastRGCNConv(a, b, num_relations=3), _with(graph(), _edge_kinds)),
    }
    return found


PYG_MODELS = ("GCN", "GraphSAGE", "GAT", "GIN", "EdgeCNN")


def pyg_members() -> dict[str, Make]:
    """A network of every convolution of torch_geometric that takes a graph, and its own models of those."""
    importlib.import_module("torch_geometric")
    return {name: partial(of_pyg, name) for name in (*_pyg(), *PYG_MODELS, "GraphUNet", "LINKX", "PMLP")}


def of_pyg(name: str) -> Made:
    """A graph network."""
    from torch_geometric import nn as g

    if name in PYG_MODELS:
        return getattr(g, name)(16, 32, num_layers=2, out_channels=4), graph()
    if name == "GraphUNet":
        return g.GraphUNet(16, 32, 4, depth=2), graph()
    if name == "LINKX":
        return g.LINKX(20, 16, 32, 4, num_layers=2), lambda batch: graph()(2)
    if name == "PMLP":
        return g.PMLP(16, 32, 4, num_layers=2), graph()
    make, inputs = _pyg()[name]
    return GraphNet(make), inputs


# --- diffusers

_BLOCKS2 = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
_TIME: Inputs = lambda batch: torch.arange(batch) * 10 + 1  # noqa: E731
_DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
DIFFUSERS: dict[str, tuple[dict[str, Any], Inputs]] = {
    "UNet2DModel": (
        {**_BLOCKS2, "sample_size": 16, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
         "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8},
        named(sample=numbers(3, 16, 16), timestep=_TIME),
    ),
    "UNet2DConditionModel": (
        {**_BLOCKS2, "sample_size": 16, "cross_attention_dim": 24, "attention_head_dim": 4,
         "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
        named(sample=numbers(4, 16, 16), timestep=_TIME, encoder_hidden_states=numbers(5, 24)),
    ),
    "UNet1DModel": (
        {"sample_size": 32, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32),
         "extra_in_channels": 16, "time_embedding_type": "fourier",
         "down_block_types": ("DownBlock1D", "AttnDownBlock1D"), "up_block_types": ("AttnUpBlock1D", "UpBlock1D")},
        named(sample=numbers(4, 32), timestep=_TIME),
    ),
    "UNet3DConditionModel": (
        {**_BLOCKS2, "sample_size": 16, "cross_attention_dim": 24, "attention_head_dim": 4,
         "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
         "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")},
        named(sample=numbers(4, 2, 16, 16), timestep=_TIME, encoder_hidden_states=numbers(5, 24)),
    ),
    "UVit2DModel": (
        {"hidden_size": 32, "cond_embed_dim": 32, "micro_cond_encode_dim": 2, "micro_cond_embed_dim": 10,
         "encoder_hidden_size": 32, "vocab_size": 32, "codebook_size": 31, "in_channels": 32,
         "block_out_channels": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
         "block_num_heads": 1, "sample_size": 8, "num_res_blocks": 1},
        named(input_ids=lambda b: torch.randint(0, 31, (b, 8, 8)), encoder_hidden_states=numbers(5, 32),
              pooled_text_emb=numbers(32), micro_conds=numbers(5)),
    ),
    "AutoencoderKL": (
        {**_BLOCKS2, "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
         "latent_channels": 4, "sample_size": 16},
        numbers(3, 16, 16),
    ),
    "AsymmetricAutoencoderKL": (
        {"down_block_out_channels": (16, 32), "up_block_out_channels": (16, 32), "layers_per_down_block": 1,
         "layers_per_up_block": 1, "norm_num_groups": 8, "down_block_types": ("DownEncoderBlock2D",) * 2,
         "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "sample_size": 16},
        numbers(3, 16, 16),
    ),
    "AutoencoderTiny": (
        {"encoder_block_out_channels": (16, 16), "decoder_block_out_channels": (16, 16), "num_encoder_blocks": (1, 2),
         "num_decoder_blocks": (2, 1)},
        numbers(3, 16, 16),
    ),
    "AutoencoderDC": (
        {"encoder_block_out_channels": (16, 32), "decoder_block_out_channels": (16, 32), "encoder_block_types":
         ("ResBlock", "EfficientViTBlock"), "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
         "encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1), "latent_channels": 4,
         "attention_head_dim": 8, "encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,)),
         "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu"},
        numbers(3, 16, 16),
    ),
    "VQModel": (
        {**_BLOCKS2, "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
         "latent_channels": 4, "num_vq_embeddings": 16},
        numbers(3, 16, 16),
    ),
    "AutoencoderOobleck": (
        {"encoder_hidden_size": 16, "downsampling_ratios": [2, 4], "decoder_channels": 16, "decoder_input_channels": 8,
         "channel_multiples": [1, 2]},
        numbers(2, 128),
    ),
    "ControlNetModel": (
        {**_BLOCKS2, "cross_attention_dim": 24, "attention_head_dim": 4, "conditioning_embedding_out_channels": (8, 16),
         "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")},
        named(sample=numbers(4, 16, 16), timestep=_TIME, encoder_hidden_states=numbers(5, 24),
              controlnet_cond=numbers(3, 32, 32)),
    ),
    "DiTTransformer2DModel": (
        {**_DIT, "sample_size": 8, "in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 100,
         "norm_num_groups": 4},
        named(hidden_states=numbers(4, 8, 8), timestep=_TIME, class_labels=torch.arange),
    ),
    "PixArtTransformer2DModel": (
        {**_DIT, "sample_size": 8, "cross_attention_dim": 16, "caption_channels": 24, "num_embeds_ada_norm": 100,
         "use_additional_conditions": False},
        lambda b: named(hidden_states=numbers(4, 8, 8), encoder_hidden_states=numbers(5, 24), timestep=_TIME)(b)
        | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "SD3Transformer2DModel": (
        {**_DIT, "sample_size": 8, "in_channels": 4, "joint_attention_dim": 24, "caption_projection_dim": 16,
         "pooled_projection_dim": 12, "out_channels": 4, "pos_embed_max_size": 16},
        named(hidden_states=numbers(4, 8, 8), encoder_hidden_states=numbers(5, 24), pooled_projections=numbers(12),
              timestep=_TIME),
    ),
    "FluxTransformer2DModel": (
        {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 12, "axes_dims_rope": (4, 4, 8)},
        lambda b: named(hidden_states=numbers(16, 4), encoder_hidden_states=numbers(5, 24),
                        pooled_projections=numbers(12), timestep=torch.ones)(b)
        | {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)},
    ),
    "AuraFlowTransformer2DModel": (
        {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1,
         "attention_head_dim": 8, "num_attention_heads": 2, "caption_projection_dim": 16, "joint_attention_dim": 16,
         "out_channels": 4, "pos_embed_max_size": 256},
        named(hidden_states=numbers(4, 8, 8), encoder_hidden_states=numbers(5, 16), timestep=_TIME),
    ),
    "SanaTransformer2DModel": (
        {"patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 1, "attention_head_dim": 4,
         "num_attention_heads": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 4,
         "cross_attention_dim": 8, "caption_channels": 8, "sample_size": 8},
        named(hidden_states=numbers(4, 8, 8), encoder_hidden_states=numbers(5, 8), timestep=_TIME),
    ),
    "CogVideoXTransformer3DModel": (
        {**_DIT, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8, "text_embed_dim": 8, "sample_width": 8,
         "sample_height": 8, "sample_frames": 8, "patch_size": 2, "temporal_compression_ratio": 4,
         "max_text_seq_length": 8},
        named(hidden_states=numbers(2, 4, 8, 8), encoder_hidden_states=numbers(8, 8), timestep=_TIME),
    ),
    "LTXVideoTransformer3DModel": (
        {"in_channels": 8, "out_channels": 8, "patch_size": 1, "patch_size_t": 1, "num_attention_heads": 4,
         "attention_head_dim": 8, "cross_attention_dim": 32, "num_layers": 1, "caption_channels": 16},
        lambda b: named(hidden_states=numbers(32, 8), encoder_hidden_states=numbers(6, 16), timestep=_TIME)(b)
        | {"encoder_attention_mask": torch.ones(b, 6), "num_frames": 2, "height": 4, "width": 4},
    ),
    "WanTransformer3DModel": (
        {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
         "out_channels": 4, "text_dim": 16, "freq_dim": 256, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32},
        named(hidden_states=numbers(4, 2, 8, 8), encoder_hidden_states=numbers(6, 16), timestep=_TIME),
    ),
    "MochiTransformer3DModel": (
        {**_DIT, "patch_size": 2, "pooled_projection_dim": 16, "in_channels": 4, "text_embed_dim": 16,
         "time_embed_dim": 4, "max_sequence_length": 16},
        lambda b: named(hidden_states=numbers(4, 2, 8, 8), encoder_hidden_states=numbers(6, 16), timestep=_TIME)(b)
        | {"encoder_attention_mask": torch.ones(b, 6).bool()},
    ),
    "Transformer2DModel": (
        {**_DIT, "in_channels": 16, "norm_num_groups": 8, "cross_attention_dim": 24},
        named(hidden_states=numbers(16, 8, 8), encoder_hidden_states=numbers(5, 24)),
    ),
    "PriorTransformer": (
        {**_DIT, "embedding_dim": 16, "num_embeddings": 5, "additional_embeddings": 4},
        named(hidden_states=numbers(16), timestep=_TIME, proj_embedding=numbers(16),
              encoder_hidden_states=numbers(5, 16)),
    ),
    "HunyuanDiT2DModel": (
        {**_DIT, "sample_size": 8, "patch_size": 2, "in_channels": 4, "hidden_size": 16, "mlp_ratio": 2.0,
         "cross_attention_dim": 8, "cross_attention_dim_t5": 8, "pooled_projection_dim": 4, "text_len": 4,
         "text_len_t5": 4, "activation_fn": "gelu-approximate", "norm_type": "layer_norm",
         "learn_sigma": True},
        lambda b: named(hidden_states=numbers(4, 8, 8), timestep=torch.ones,
                        encoder_hidden_states=numbers(4, 8), encoder_hidden_states_t5=numbers(4, 8),
                        image_meta_size=numbers(6))(b)
        | {"text_embedding_mask": torch.ones(b, 4), "text_embedding_mask_t5": torch.ones(b, 4),
           "style": torch.zeros(b, dtype=torch.long), "image_rotary_emb": [torch.ones(16, 8), torch.zeros(16, 8)]},
    ),
    "QwenImageTransformer2DModel": (
        {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16,
         "num_attention_heads": 3, "joint_attention_dim": 16, "axes_dims_rope": (8, 4, 4)},
        lambda b: named(hidden_states=numbers(16, 16), encoder_hidden_states=numbers(7, 16),
                        timestep=torch.ones)(b)
        | {"encoder_hidden_states_mask": torch.ones(b, 7).long(), "img_shapes": [(1, 4, 4)] * b},
    ),
}  # fmt: skip


def of_diffusers(name: str) -> Made:
    """A model of diffusers."""
    options, inputs = DIFFUSERS[name]
    return getattr(importlib.import_module("diffusers"), name)(**options), inputs


def members(library: str) -> dict[str, Make]:
    """The members of a library."""
    return LIBRARIES[library]()


def _of(table: Sequence[str], make: Callable[[str], Made], package: str) -> dict[str, Make]:
    importlib.import_module(package)
    return {name: partial(make, name) for name in table}


LIBRARIES: dict[str, Callable[[], dict[str, Make]]] = {
    "torchvision": lambda: {name: partial(of_torchvision, name) for name in MEMBERS},
    "timm": timm_members,
    "diffusers": lambda: _of(list(DIFFUSERS), of_diffusers, "diffusers"),
    "ultralytics": ultralytics_members,
    "segmentation_models_pytorch": smp_members,
    "monai": lambda: _of(list(MONAI), of_monai, "monai"),
    "torchaudio": lambda: _of(list(TORCHAUDIO), of_torchaudio, "torchaudio"),
    "torch_geometric": pyg_members,
    "open_clip": lambda: _of(list(OPEN_CLIP), of_open_clip, "open_clip"),
}
