"""Loaders by name: folders of images, torchvision's datasets, callables; and class-balanced subsets."""

import numpy as np
import pytest
import torch
from command_line import typer
from torch.utils.data import TensorDataset

from fxprune.cli.datasets import Source, loader_of
from fxprune.cli.output import Output
from fxprune.cli.preprocessing import Preparation
from fxprune.cli.subsets import balanced, labels_of
from fxprune.errors import CalibrationError, FxpruneError

Image = pytest.importorskip("PIL.Image")
PLAIN = Preparation(None, 0.875, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def opened(name, tmp_path, prepare=PLAIN, training=True, samples=None, batch_size=None, seed=0, **arguments):
    source = Source(name, "--data" if training else "--eval-data", arguments, tmp_path, training=training)
    with Output(json=False, quiet=True).busy("opening") as bars:
        return loader_of(source, prepare, bars, samples=samples, batch_size=batch_size, workers=0, seed=seed)


def images_of(tmp_path, classes=3, each=4, size=(20, 10)):
    for index in range(classes):
        folder = tmp_path / "images" / f"class{index}"
        folder.mkdir(parents=True)
        for number in range(each + index):
            Image.new("RGB", size, (85 * index, 0, 255)).save(folder / f"{number}.png")
    return tmp_path / "images"


def test_folder_of_images_is_resized_and_normalised(tmp_path):
    folder = images_of(tmp_path)
    prepare = Preparation(8, 0.8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    inputs, targets = next(iter(opened(str(folder), tmp_path, prepare, batch_size=5)))
    assert inputs.shape == (5, 3, 8, 8)
    assert targets.tolist() == [0, 0, 0, 0, 1]
    assert torch.allclose(inputs[:, 2], torch.ones(5, 8, 8))
    assert torch.allclose(inputs[4, 0], torch.full((8, 8), 85 / 255 * 2 - 1))


def test_middle_is_cropped_and_one_mean_makes_grey():
    image = Image.new("RGB", (40, 20))
    image.paste((255, 255, 255), (15, 5, 25, 15))
    found = Preparation(10, 0.5, (0.0,), (1.0,))(image)
    assert found.shape == (1, 10, 10)
    assert found.mean() > 0.99
    whole = Preparation(10, 1.0, (0.0,), (1.0,))(image)
    assert 0.2 < whole.mean() < 0.8
    assert torch.equal(Preparation(None, 0.5, (0.0,), (1.0,))(image), Preparation(None, 1.0, (0.0,), (1.0,))(image))


def test_folder_without_classes(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FxpruneError, match=r"empty holds no images in folders, one a class .* CLASS/IMAGE"):
        opened(str(tmp_path / "empty"), tmp_path)


def test_subset_has_all_classes_alike():
    labels = np.repeat([0, 1, 2], [100, 50, 4])
    chosen = balanced(labels, len(labels), 30, seed=1)
    assert np.bincount(labels[chosen]).tolist() == [13, 13, 4]
    assert len(set(chosen.tolist())) == 30
    assert np.bincount(labels[chosen[:9]]).tolist() == [3, 3, 3]
    assert np.array_equal(chosen, balanced(labels, len(labels), 30, seed=1))
    assert not np.array_equal(chosen, balanced(labels, len(labels), 30, seed=2))


class Slow(torch.utils.data.Dataset):
    def __init__(self, targets):
        self.pairs = [(torch.zeros(1), target) for target in targets]
        self.read = 0

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        self.read += 1
        return self.pairs[index]


@pytest.mark.parametrize(
    ("dataset", "labels"),
    [
        (TensorDataset(torch.zeros(3, 1), torch.tensor([2, 0, 1])), [2, 0, 1]),
        (TensorDataset(torch.zeros(3, 1), torch.zeros(3, 4)), None),
        (Slow([1, 0]), [1, 0]),
        (Slow([torch.tensor(1), torch.tensor(0)]), [1, 0]),
        (Slow([0.5, 1.5]), None),
        (Slow([torch.zeros(2, 2)] * 4), None),
    ],
)
def test_labels_are_read_where_there_are_any(dataset, labels):
    with Output(json=False, quiet=True).busy("reading") as bars:
        found = labels_of(dataset, len(dataset), bars)
    assert (found if found is None else found.tolist()) == labels


def test_labels_that_are_no_classes_are_not_all_read():
    masks = Slow([torch.zeros(2, 2)] * 4)
    with Output(json=False, quiet=True).busy("reading") as bars:
        labels_of(masks, len(masks), bars)
    assert masks.read == 1


def test_torchvision_by_name(tmp_path):
    arguments = {"size": 30, "image_size": (3, 16, 16), "num_classes": 3}
    loader = opened("torchvision:FakeData", tmp_path, samples=9, batch_size=4, **arguments)
    shapes = [tuple(inputs.shape) for inputs, _ in loader]
    assert shapes == [(4, 3, 16, 16), (4, 3, 16, 16), (1, 3, 16, 16)]
    assert torch.cat([targets for _, targets in loader]).bincount().tolist() == [3, 3, 3]


def test_torchvision_takes_root_and_split(tmp_path, monkeypatch):
    import torchvision

    seen = []

    class CIFAR10(TensorDataset):
        def __init__(self, root, train=True, transform=None, download=False):
            seen.append((root, train, transform is PLAIN, download))
            super().__init__(torch.zeros(4, 3), torch.arange(4))

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", CIFAR10)
    opened("torchvision:CIFAR10", tmp_path)
    opened("torchvision:CIFAR10", tmp_path, training=False, download=True)
    assert seen == [(str(tmp_path), True, True, False), (str(tmp_path), False, True, True)]


def test_torchvision_hands_arguments_on_to_parents(tmp_path, monkeypatch):
    import torchvision

    class Parent(TensorDataset):
        def __init__(self, root, transform=None):
            self.seen = root, transform
            super().__init__(torch.zeros(4, 3), torch.arange(4))

    class ImageNet(Parent):
        def __init__(self, root, split="train", **kwargs):
            self.split = split
            super().__init__(root, **kwargs)

    monkeypatch.setattr(torchvision.datasets, "ImageNet", ImageNet)
    trained, held = (opened("torchvision:ImageNet", tmp_path, training=training).dataset for training in (True, False))
    assert (trained.seen, trained.split, held.split) == ((str(tmp_path), PLAIN), "train", "val")


def test_torchvision_that_is_not_there(tmp_path):
    with pytest.raises(FxpruneError, match=r"CIFAR10 is not in .*: name its folder with --data-root, or add"):
        opened("torchvision:CIFAR10", tmp_path)
    with pytest.raises(FxpruneError, match="torchvision has no dataset 'CIFAR'; did you mean CIFAR10"):
        opened("torchvision:CIFAR", tmp_path)


def test_a_dataset_is_cut_down_and_a_loader_kept(project):
    cut = opened("mynets:dataset", project, samples=9, batch_size=5)
    assert [len(targets) for _, targets in cut] == [5, 4]
    assert torch.cat([targets for _, targets in cut]).bincount().tolist() == [3, 3, 3]
    loader = opened("mynets:loader", project, count=30)
    assert [len(targets) for _, targets in loader] == [20, 10]
    assert isinstance(opened("mynets:batches", project), list)


def test_a_dataset_is_not_taken_whole_for_calibration(project):
    assert sum(len(targets) for _, targets in opened("mynets:dataset", project, count=1200)) == 1000
    assert sum(len(targets) for _, targets in opened("mynets:dataset", project, samples=0, count=1200)) == 1200
    assert sum(len(targets) for _, targets in opened("mynets:dataset", project, training=False, count=1200)) == 1200


def test_what_gives_no_loader(project):
    with pytest.raises(FxpruneError, match="mynets:batches gives a list, from which 5 samples cannot be taken"):
        opened("mynets:batches", project, samples=5)
    with pytest.raises(FxpruneError, match=r"mynets:loss\(\) fails: TypeError"):
        opened("mynets:loss", project)
    with pytest.raises(FxpruneError, match="mynets:build gives a Net: name a loader or a Dataset"):
        opened("mynets:build", project)
    with pytest.raises(FxpruneError, match="the data has no sample: at least one is needed"):
        opened("mynets:dataset", project, count=0)
    with pytest.raises(typer.BadParameter, match="there is no folder 'nowhere'"):
        opened("nowhere", project)


def test_a_loader_that_fails_is_an_error_of_ours(project):
    loader = opened("mynets:Torn", project)
    with Output(json=False, quiet=True).busy("reading") as bars:
        watched = bars.over(loader)
        message = r"the loader fails on batch 1 \(ValueError: image 7 is cut off\)"
        with pytest.raises(CalibrationError, match=message):
            list(watched)
