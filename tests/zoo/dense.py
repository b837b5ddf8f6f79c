"""Fully connected networks."""

from nets import layers
from torch import Tensor, nn

from zoo.case import CLASSES, add, case, images, tensors

add(
    "mlp",
    lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, CLASSES)),
    tensors(6),
    shrinks=("0", "2"),
    frozen=("4",),
)
add(
    "mlp_batchnorm_dropout",
    lambda: nn.Sequential(
        nn.Linear(6, 16, bias=False),
        nn.BatchNorm1d(16),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(16, 12),
        nn.ReLU(),
        nn.BatchNorm1d(12),
        nn.Linear(12, CLASSES),
    ),
    tensors(6),
    shrinks=("0", "1", "4", "6"),
)
add(
    "mlp_on_sequences",
    lambda: nn.Sequential(
        nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 12), nn.GELU(), nn.Flatten(), nn.Linear(12 * 7, CLASSES)
    ),
    tensors(7, 6),
    shrinks=("0", "2"),
)


@case(tensors(6), shrinks=("inner", "outer"))
@layers(lambda: dict(
    outer=nn.Linear(6, 12), inner=nn.Linear(12, 16), back=nn.Linear(16, 12), head=nn.Linear(12, CLASSES),
))  # fmt: skip
def MlpResidual(self, x: Tensor) -> Tensor:
    x = self.outer(x).relu()
    return self.head(x + self.back(self.inner(x).relu()))


@case(images(2, 4), shrinks=("encode", "narrow", "decode"))
@layers(lambda: dict(encode=nn.Linear(32, 16), narrow=nn.Linear(16, 6), decode=nn.Linear(6, 16), out=nn.Linear(16, 32)))
def Autoencoder(self, x: Tensor) -> Tensor:
    """A flat image in, an image out."""
    code = self.narrow(self.encode(x.flatten(1)).relu())
    return self.out(self.decode(code).relu()).view(x.shape)


@case(images(3, 4), shrinks=("mix.0", "channels.0"))
@layers(lambda: dict(
    stem=nn.Conv2d(3, 8, 1), mix=nn.Sequential(nn.Linear(16, 12), nn.GELU(), nn.Linear(12, 16)),
    channels=nn.Sequential(nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 8)), head=nn.Linear(8, CLASSES),
))  # fmt: skip
def TokenMixing(self, x: Tensor) -> Tensor:
    """A linear over the H*W positions next to one over the channels, as in MLP-Mixer."""
    x = self.stem(x).flatten(2)
    x = x + self.mix(x)
    x = x.transpose(1, 2)
    x = x + self.channels(x)
    return self.head(x.mean(1))
