"""Models of diffusers, small and random, where it is installed: pruned in their class, kept in folders, made again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import difference, outputs, parameters, part_of
from torch import Tensor, nn

import fxprune
from fxprune.errors import ArtifactError

pytestmark = pytest.mark.filterwarnings("ignore")  # of diffusers
D: Any = pytest.importorskip("diffusers")
from fxprune.integrations.diffusers import from_pretrained, save_pretrained  # noqa: E402 - needs diffusers

IMAGE = {"sample_size": 16, "in_channels": 4, "out_channels": 4}
BLOCKS = IMAGE | {"layers_per_block": 1, "block_out_channels": (32, 64), "norm_num_groups": 8}
HEADS = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 1}
ENDS = {"joint_attention_dim": 32, "pooled_projection_dim": 32}

MODELS: dict[str, Any] = {
    "UNet2DModel": BLOCKS | {
        "attention_head_dim": 8, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "DiTTransformer2DModel": HEADS | {"sample_size": 16, "in_channels": 4, "patch_size": 2, "num_embeds_ada_norm": 10},
    "UNet2DConditionModel": BLOCKS | {
        "attention_head_dim": 4, "cross_attention_dim": 32, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "SD3Transformer2DModel": HEADS | IMAGE | ENDS | {
        "patch_size": 2, "caption_projection_dim": 32, "pos_embed_max_size": 16,
    },
    "AutoencoderKL": {
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (32, 64), "norm_num_groups": 8, "latent_channels": 4,
    },
    "FluxTransformer2DModel": ENDS | {
        "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6),
    },
}  # fmt: skip


def inputs(name: str, batch: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(batch)
    x, steps, words = torch.randn(batch, 4, 16, 16), torch.arange(batch), torch.randn(batch, 7, 32)
    several = {"encoder_hidden_states": words, "pooled_projections": torch.randn(batch, 32)}
    return {
        "UNet2DModel": {"sample": x, "timestep": steps},
        "UNet2DConditionModel": {"sample": x, "timestep": steps, "encoder_hidden_states": words},
        "DiTTransformer2DModel": {"hidden_states": x, "timestep": steps, "class_labels": steps},
        "SD3Transformer2DModel": {"hidden_states": x, "timestep": steps, **several},
        "AutoencoderKL": {"sample": x[:, :3]},
        "FluxTransformer2DModel": {
            "hidden_states": x.flatten(2).transpose(1, 2), "timestep": steps.float(), **several,
            "img_ids": torch.zeros(256, 3), "txt_ids": torch.zeros(7, 3),
        },
    }[name]  # fmt: skip


def made(name: str) -> Any:
    torch.manual_seed(0)
    return getattr(D, name)(**MODELS[name]).eval()


@pytest.mark.parametrize("name", part_of(MODELS, 3))
def test_pruned_in_the_class_and_kept_in_a_folder(name: str, tmp_path: Path) -> None:
    model, example = made(name), inputs(name)
    plan = fxprune.Scores.random(model, example).plan(alpha=0.4)
    small = fxprune.apply(model, plan)
    save_pretrained(small, tmp_path / "folder", model)
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"config.json", "fxprune.safetensors"}
    own, graph = from_pretrained(tmp_path / "folder"), from_pretrained(tmp_path / "folder", own_class=False)
    assert type(own) is type(model)
    assert isinstance(graph, torch.fx.GraphModule)
    assert parameters(own) < 0.9 * parameters(model)
    assert difference(outputs(small, example), outputs(own, example)) < 1e-4
    assert fxprune.report(own).params_after == fxprune.report(small).params_after


def test_a_unet_is_pruned_by_the_loss_of_its_training(tmp_path: Path) -> None:
    model = made("UNet2DModel")
    loader = [(inputs("UNet2DModel", batch), torch.randn(batch, 4, 16, 16)) for batch in (8, 6)]
    own: Any = fxprune.compress(
        model, loader, params=0.7, own_class=True, loss=lambda out, noise: nn.functional.mse_loss(out.sample, noise),
        progress=False,
    )  # fmt: skip
    assert type(own) is type(model)
    assert parameters(own) <= 0.71 * parameters(model)
    noise = own.train()(**loader[0][0]).sample
    nn.functional.mse_loss(noise, loader[0][1]).backward()
    save_pretrained(own, tmp_path, model)
    assert difference(outputs(own, loader[1][0]), outputs(from_pretrained(tmp_path), loader[1][0])) < 1e-5


def test_a_class_of_ones_own_is_kept_otherwise(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"Linear is no class of diffusers.*: use fxprune\.save, and"):
        save_pretrained(nn.Linear(2, 2), tmp_path, nn.Linear(2, 2))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pruned model."""
    folder: Path = tmp_path_factory.mktemp("kept")
    model, example = made("UNet2DModel"), inputs("UNet2DModel", 2)
    save_pretrained(fxprune.apply(model, fxprune.Scores.random(model, example).plan(alpha=0.2)), folder, model)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda described: described.pop("fxprune"), r"cannot be read \(KeyError: 'fxprune'\).*save_pretrained wrote"),
        (lambda described: described.update(_class_name="os"), "names the class os, which diffusers does not have"),
        (lambda described: described.update(block_out_channels=3), "gives no UNet2DModel .*: was it altered, or"),
    ],
)
def test_an_altered_configuration(change: Any, message: str, kept: Path, tmp_path: Path) -> None:
    shutil.copytree(kept, tmp_path / "folder")
    described = json.loads((kept / "config.json").read_text())
    change(described)
    (tmp_path / "folder" / "config.json").write_text(json.dumps(described))
    with pytest.raises(ArtifactError, match=message):
        from_pretrained(tmp_path / "folder")
