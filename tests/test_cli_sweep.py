"""What a sweep takes and shows: accuracy, the front, the plot."""

import pytest
import torch
from command_line import typer  # noqa: F401 - skips what follows where it is missing
from torch import nn

from fxprune.cli.evaluation import accuracy
from fxprune.cli.pareto import Row, plot, table, with_front
from fxprune.errors import FxpruneError


def row(name, accuracy, macs, milliseconds=None):
    return Row(name, None, 1, macs, accuracy, milliseconds)


def test_front_is_what_nothing_beats():
    rows = [row("a", 0.9, 100, 5.0), row("b", 0.9, 80, 5.0), row("c", 0.8, 90, 6.0), row("d", 0.7, 90, 4.0)]
    assert [r.on_front for r in with_front(rows)] == [False, True, False, True]


def test_the_table_says_how_many_samples_were_timed():
    rows = [row("a", 0.9, 100, 5.0)]
    assert str(table(rows, batch_size=32).caption).endswith("better in one\nms: of 32 samples in one batch")
    assert "ms" not in str(table(rows).caption)


def test_plot_has_a_panel_for_times_where_there_are_any(tmp_path):
    pytest.importorskip("matplotlib")
    timed, untimed = [row("a", 0.9, 100, 5.0), row("b", 0.8, 50, 3.0)], [row("a", 0.9, 100), row("b", 0.8, 50)]
    for rows, name in ((timed, "timed.png"), (untimed, "untimed.png")):
        plot(rows, tmp_path / name)
    wide, narrow = (
        int.from_bytes((tmp_path / name).read_bytes()[16:20], "big") for name in ("timed.png", "untimed.png")
    )
    assert wide == 2 * narrow
    assert {path.name for path in tmp_path.iterdir()} == {"timed.png", "untimed.png"}


def test_accuracy_leaves_the_mode():
    model = nn.Sequential(nn.Dropout(0.99)).train()
    assert accuracy(model, [(torch.eye(4), torch.arange(4))]) == 1
    assert model.training
    assert model[0].training


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.eye(3), torch.zeros(3, 2).long()), r"the model gives float32 \(3, 3\) for targets int64 \(3, 2\)"),
        ((torch.eye(3), torch.zeros(3)), r"accuracy needs \(N, classes\) for \(N,\) class numbers: pass --eval-metric"),
        ((torch.eye(3), None), "for targets NoneType"),
        (
            (torch.eye(3), torch.tensor([0, 1, 3])),
            "hold class 3, and the output has 3 classes, 0 to 2",
        ),
        ((torch.zeros(3), torch.zeros(3).long()), r"the model gives float32 \(3,\)"),
    ],
)
def test_accuracy_of_what_has_no_classes(batch, message):
    with pytest.raises(FxpruneError, match=message):
        accuracy(nn.Identity(), [batch])
