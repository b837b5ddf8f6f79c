"""The demo: its data and training, and one run of a few epochs through the command line."""

import json
from itertools import pairwise

import pytest
import torch
from command_line import CliRunner

from fxprune.cli import build_app
from fxprune.cli import digits_demo as demo
from fxprune.cli.output import Output

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
ALPHAS = (0.0, 0.1, 0.3)


def train(digits, seed):
    with Output(json=False, quiet=True).busy("training") as bars:
        return demo.train(digits.train, bars, epochs=1, seed=seed)


def test_a_third_is_held_out():
    digits = demo.split_digits(0)
    assert (len(digits.train), len(digits.test)) == (1198, 599)
    images, labels = digits.test.tensors
    assert images.shape == (599, 1, 8, 8)
    assert (images.min().item(), images.max().item()) == (-1, 1)
    assert labels.bincount().min() >= 57
    seen = {image.numpy().tobytes() for image in digits.train.tensors[0]}
    assert all(image.numpy().tobytes() not in seen for image in images)


@pytest.mark.wide
def test_training_is_seeded_and_leaves_the_global_generator():
    digits = demo.split_digits(0)
    state = torch.get_rng_state()
    first, second, other = (train(digits, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


@pytest.mark.wide
def test_run_through_the_command_line(tmp_path):
    """One test, so that the demo runs once however many processes the tests are spread over."""
    out = tmp_path / "results"
    options = ["--out", str(out), "--alphas", ",".join(map(str, ALPHAS)), "--epochs", "12", "--seed", "1"]
    result = CliRunner().invoke(build_app(), ["demo", *options], catch_exceptions=False)
    assert result.exit_code == 0
    document = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert (document["seed"], document["epochs"]) == (1, 12)
    check_original(document["original"])
    check_pruned(document["original"], document["pruned"])
    check_tables(result.output, [document["original"], *document["pruned"]])
    check_picture((out / "results.png").read_bytes())
    assert str(out / "results.png") in result.output.replace("\n", "")


def check_original(row):
    assert row["alpha"] is None
    assert row["accuracy"] > 0.97
    assert row["parameters"] == sum(p.numel() for p in demo.DigitsNet().parameters())
    assert row["widths"] == demo.widths(demo.DigitsNet())


def check_pruned(original, pruned):
    """Alpha 0 costs little once refitted, larger alphas cut more everywhere, and every network is verified."""
    assert [row["alpha"] for row in pruned] == list(ALPHAS)
    assert pruned[0]["accuracy"] > original["accuracy"] - 0.02
    assert pruned[0]["plain"] < pruned[0]["accuracy"]
    for larger, smaller in pairwise([original, *pruned]):
        assert smaller["parameters"] < larger["parameters"]
        assert smaller["macs"] < larger["macs"]
        assert all(smaller["widths"][layer] <= larger["widths"][layer] for layer in larger["widths"])
    assert all(0 <= row["error"] < 1e-4 and row["latency_ms"] > 0 for row in pruned)


def check_tables(text, rows):
    for row in rows:
        assert f"{row['parameters']:,}" in text
        assert f"{row['accuracy']:.1%}" in text
        assert row["plain"] is None or f"{row['plain']:.1%}" in text
    assert all(layer in text for layer in rows[0]["widths"])
    assert "training" in text


def check_picture(content):
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    assert width > 1200
    assert height > 600
