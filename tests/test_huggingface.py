"""Models of transformers, tiny and random: pruned by the loss of their class, kept in a folder, made again."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import parameters, part_of, picture, same_picture
from torch import Tensor, nn

import fxprune
from fxprune.errors import ArtifactError, CalibrationError, FxpruneError

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    T = pytest.importorskip("transformers")
    from fxprune.integrations import huggingface
    from fxprune.integrations.huggingface import (
        compress_pretrained,
        from_pretrained,
        narrow_pretrained,
        save_pretrained,
    )

TEXT = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 32,
}  # fmt: skip
IMAGE = {
    "image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48,
}  # fmt: skip


def text(labels: Any, batch: int = 8, length: int = 9) -> dict[str, Tensor]:
    words = torch.randint(2, 48, (batch, length), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(words)
    mask[0, length - 3 :] = 0
    return {"input_ids": words, "attention_mask": mask} | labels(words) | {"idx": torch.arange(batch)}


def images(batch: int = 8) -> dict[str, Tensor]:
    pixels = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))
    return {"pixel_values": pixels, "labels": torch.arange(batch) % 3}


def classes(words: Tensor) -> dict[str, Tensor]:
    return {"labels": words[:, 0] % 3}


def next_words(words: Tensor) -> dict[str, Tensor]:
    return {"labels": words}


def spans(words: Tensor) -> dict[str, Tensor]:
    return {"start_positions": words[:, 0] % 4, "end_positions": words[:, 1] % 4 + 4}


# name: the model, the labels of so many words; None for images
MODELS: dict[str, tuple[Any, Any]] = {
    "bert": (lambda: T.BertForSequenceClassification(T.BertConfig(**TEXT, num_labels=3)), classes),
    "bert, regression": (
        lambda: T.BertForSequenceClassification(T.BertConfig(**TEXT, num_labels=1)),
        lambda words: {"labels": words[:, 0].float()},
    ),
    "bert, tokens": (
        lambda: T.BertForTokenClassification(T.BertConfig(**TEXT, num_labels=3)),
        lambda words: {"labels": words % 3},
    ),
    "bert, spans": (lambda: T.BertForQuestionAnswering(T.BertConfig(**TEXT)), spans),
    "bert, masked": (lambda: T.BertForMaskedLM(T.BertConfig(**TEXT)), next_words),
    "gpt2": (
        lambda: T.GPT2LMHeadModel(T.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32)),
        next_words,
    ),
    "llama": (lambda: T.LlamaForCausalLM(T.LlamaConfig(**TEXT, num_key_value_heads=2)), next_words),
    "gemma2": (
        lambda: T.Gemma2ForCausalLM(T.Gemma2Config(**TEXT, num_key_value_heads=2, head_dim=8)),
        next_words,
    ),
    "vit": (lambda: T.ViTForImageClassification(T.ViTConfig(**IMAGE, num_labels=3)), None),
}


def made(name: str) -> tuple[Any, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    model, labels = MODELS[name]
    return model().eval(), [images(8), images(6)] if labels is None else [text(labels, 8), text(labels, 6, 11)]


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in batch if name in ("input_ids", "attention_mask", "pixel_values")}


def heads_of(output: Any) -> Tensor:
    return output.logits if "logits" in output else torch.stack([output.start_logits, output.end_logits])


@pytest.mark.parametrize("name", part_of(MODELS, 12))
def test_pruned_by_the_loss_of_its_class_and_kept(name: str, tmp_path: Path) -> None:
    model, loader = made(name)
    before = picture(model)
    small = compress_pretrained(model, loader, params=0.85)
    assert same_picture(before, picture(model))
    report = fxprune.report(small)
    assert report.budget.achieved <= 0.85  # biases that compensation creates come on top
    assert parameters(small) < 0.9 * parameters(model)
    assert report.error < 1e-5
    assert report.provenance.call == "compress_pretrained(model, loader, params=0.85)"
    with torch.no_grad():
        expected = small(**inputs_of(loader[1]))
    assert type(expected).__name__ == type(model(**inputs_of(loader[1]))).__name__

    save_pretrained(small, tmp_path / "folder", model)
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {"config.json", "fxprune.safetensors"}
    again = from_pretrained(tmp_path / "folder")
    with torch.no_grad():
        assert torch.equal(heads_of(again(**inputs_of(loader[1]))), heads_of(expected))
    assert fxprune.report(again) == fxprune.report(small)

    for own in (narrow_pretrained(small, model), from_pretrained(tmp_path / "folder", own_class=True)):
        assert type(own) is type(model)
        assert own.config.to_dict().get("use_cache") == model.config.to_dict().get("use_cache")
        batch = {key: value for key, value in loader[0].items() if key != "idx"}
        with torch.no_grad():
            found, expected = own(**batch), small(**inputs_of(loader[0]))
        assert torch.isfinite(found.loss)
        torch.testing.assert_close(heads_of(found), heads_of(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.wide
@pytest.mark.parametrize("own_class", [False, True])
def test_a_narrowed_language_model_generates(own_class: bool) -> None:
    model, loader = made("llama")
    small = compress_pretrained(model, loader, params=0.85, own_class=own_class)
    own: Any = small if own_class else narrow_pretrained(small, model)
    assert type(own) is type(model)
    assert own.config.use_cache
    words = loader[0]["input_ids"][:2, :4]
    ids = {"pad_token_id": 0, "eos_token_id": None, "do_sample": False, "max_new_tokens": 5}
    cached, plain = own.generate(words, **ids), own.generate(words, **ids, use_cache=False)
    assert cached.shape == (2, 9)
    assert torch.equal(cached, plain)


@pytest.mark.wide
def test_layers_of_a_transformer_get_new_biases_only_where_asked() -> None:
    model, loader = made("llama")
    small = compress_pretrained(model, loader, params=0.85)
    assert small.state_dict().keys() == model.state_dict().keys()
    with_biases = compress_pretrained(model, loader, params=0.85, new_biases=True)
    assert with_biases.state_dict().keys() > model.state_dict().keys()


@pytest.mark.wide
def test_a_narrowed_class_trains_under_a_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, loader = made("bert")
    own: Any = narrow_pretrained(compress_pretrained(model, loader, params=0.85), model)
    samples = [{key: value[index] for key, value in loader[0].items()} for index in range(8)]
    options = T.TrainingArguments(str(tmp_path), num_train_epochs=1, report_to=[], save_strategy="no", use_cpu=True)
    before = own.classifier.weight.clone()
    T.Trainer(own, options, train_dataset=samples).train()
    assert not torch.equal(before, own.classifier.weight)


def test_what_is_no_pretrained_model() -> None:
    with pytest.raises(FxpruneError, match=r"Linear is no PreTrainedModel of transformers: use fxprune\.compress"):
        compress_pretrained(nn.Linear(2, 2), [])  # type: ignore[arg-type]


def test_batches_without_labels() -> None:
    model, loader = made("bert")
    with pytest.raises(
        CalibrationError, match=r"no labels that BertForSequenceClassification\.forward takes \(labels\)"
    ):
        compress_pretrained(model, [inputs_of(loader[0])])


def test_a_loss_that_is_not_the_one_of_the_class() -> None:
    class Doubled(T.BertForSequenceClassification):
        def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> Any:
            output = super().forward(input_ids, attention_mask, labels=labels)
            return type(output)(loss=2 * output.loss, logits=output.logits)

    model = Doubled(T.BertConfig(**TEXT, num_labels=3)).eval()
    message = r"is that of Doubled \(.*ForSequenceClassificationLoss gives 1[\d.]+ where the class gives 2.*pass loss="
    with pytest.raises(CalibrationError, match=message):
        compress_pretrained(model, [text(classes)])


@pytest.mark.wide
def test_classes_of_the_callers_are_kept_otherwise(tmp_path: Path) -> None:
    class MineForSequenceClassification(T.BertForSequenceClassification):
        pass

    model = MineForSequenceClassification(T.BertConfig(**TEXT, num_labels=3)).eval()
    small = compress_pretrained(model, [text(classes)], params=0.85)
    with pytest.raises(
        ArtifactError, match=r"MineForSequenceClassification is no class of transformers.*use fxprune\.save"
    ):
        save_pretrained(small, tmp_path, model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a smaller BERT."""
    folder = tmp_path_factory.mktemp("bert")
    model, loader = made("bert")
    save_pretrained(compress_pretrained(model, loader, params=0.85), folder, model)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda described: described.pop("fxprune"), r"cannot be read \(KeyError: 'fxprune'\).*save_pretrained wrote"),
        (lambda described: described.update(architectures=["os"]), "names the class os, which transformers does not"),
        (lambda described: described.update(architectures=["Trainer"]), "names the class Trainer, which"),
        (lambda described: described.update(hidden_size=33), "gives no BertForSequenceClassification|does not fit"),
        (lambda described: described.update(intermediate_size=40), "does not fit the BertForSequenceClassification"),
    ],
)
def test_an_altered_configuration(change: Any, message: str, saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    described = json.loads((tmp_path / "config.json").read_text())
    change(described)
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ArtifactError, match=message):
        from_pretrained(tmp_path)


def test_what_has_no_plan() -> None:
    model, _ = made("bert")
    with pytest.raises(FxpruneError, match="BertForSequenceClassification has no plan"):
        narrow_pretrained(model, model)


def test_a_folder_without_files(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"config\.json cannot be read \(FileNotFoundError"):
        from_pretrained(tmp_path)


POINTED = (
    r"; for a model of transformers, call fxprune\.integrations\.huggingface\.compress_pretrained\(model, loader, "
)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_compress_points_to_compress_pretrained_where_the_loss_fails(name: str) -> None:
    model, loader = made(name)
    batches = [inputs_of(batch) | {"labels": batch["labels"]} for batch in loader]
    loss = r'pass loss=lambda out, y: F.cross_entropy\(out\["logits"\], y\)'
    with pytest.raises(CalibrationError, match=rf"the output is an? .*Output with .*: {loss}{POINTED}"):
        fxprune.compress(model, batches, progress=False)


def test_compress_points_to_compress_pretrained_where_capture_fails() -> None:
    model, loader = made("gpt2")
    batches = [inputs_of(batch) | {"labels": batch["labels"]} for batch in loader]
    with pytest.raises(fxprune.CaptureError, match=rf"(?s)GPT2LMHeadModel cannot be captured.*{POINTED}"):
        fxprune.compress(model, batches, progress=False)
    with pytest.raises(fxprune.CaptureError, match=rf"does not fit GPT2LMHeadModel.forward.*{POINTED}"):
        fxprune.capture(model, (batches[0]["input_ids"],) * 30)


@pytest.mark.wide
def test_future_values_are_what_a_forecast_is_compared_with() -> None:
    torch.manual_seed(0)
    config = T.PatchTSTConfig(
        num_input_channels=2, context_length=16, patch_length=4, patch_stride=4, prediction_length=4, d_model=16,
        num_attention_heads=2, ffn_dim=32, num_hidden_layers=2,
    )  # fmt: skip
    model = T.PatchTSTForPrediction(config)
    batch = {"past_values": torch.randn(8, 16, 2), "future_values": torch.randn(8, 4, 2)}
    small = compress_pretrained(model, [batch], params=0.8, progress=False)
    assert parameters(small) < parameters(model)
    assert small(past_values=batch["past_values"]).prediction_outputs.shape == (8, 4, 2)


def test_the_labels_of_a_prompt_are_inputs() -> None:
    inputs, labels = huggingface.arguments_of(T.SamModel)
    assert "input_labels" in inputs
    assert labels == []


def test_a_graph_says_which_input_is_left_out() -> None:
    model, loader = made("llama")
    small = compress_pretrained(model, loader, ratios={"*": 0.5}, compensate="none", verify=False, progress=False)
    with pytest.raises(fxprune.CaptureError, match="an example that gives attention_mask, and this call leaves it out"):
        small(input_ids=loader[0]["input_ids"])
    bare = [{name: batch[name] for name in ("input_ids", "labels")} for batch in loader]
    small = compress_pretrained(model, bare, ratios={"*": 0.5}, compensate="none", verify=False, progress=False)
    with pytest.raises(fxprune.CaptureError, match="the graph was made for attention_mask=None"):
        small(input_ids=loader[0]["input_ids"], attention_mask=loader[0]["attention_mask"])
