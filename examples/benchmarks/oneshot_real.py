"""Three real networks of the one-shot benchmark, with their data and the measures that their users look at.

They lie under FXPRUNE_DATA: a speaker encoder (LSTM), the proposal network of a face detector, and a small LLaMA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cifar
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

FACE = 0.6  # the probability from which on a place is a face
CONTEXT, WINDOWS, TESTED = 128, 128, 64  # tokens; windows of the calibration, and of the perplexity
Batches = Sequence[tuple[Any, Any]]
Tokens = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """A trained network, its calibration batches and loss, and a measure of a network in its place.

    `unit` is "%" for shares, of which more is better, and "perplexity", of which less is.
    """

    model: nn.Module
    calibration: Batches
    loss: Callable[[Any, Any], Tensor]
    measure: Callable[[nn.Module], float]
    fresh: Sequence[Tensor]
    unit: str = "%"


class Speaker(nn.Module):
    """Mel spectrograms (n, frames, 40) to embeddings (n, 256) of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, num_layers=3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, x: Tensor) -> Tensor:
        """The embedding of the last layer's last state."""
        found = F.relu(self.linear(self.lstm(x)[1][0][-1]))
        return found / found.norm(dim=1, keepdim=True)


class FaceProposal(nn.Module):
    """Images (n, 3, h, w) to boxes (n, 4, ...) and probabilities (n, 2, ...)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.prelu1, self.pool1 = nn.Conv2d(3, 10, 3), nn.PReLU(10), nn.MaxPool2d(2, 2, ceil_mode=True)
        self.conv2, self.prelu2 = nn.Conv2d(10, 16, 3), nn.PReLU(16)
        self.conv3, self.prelu3 = nn.Conv2d(16, 32, 3), nn.PReLU(32)
        self.conv4_1, self.conv4_2 = nn.Conv2d(32, 2, 1), nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The boxes and the probabilities of no face and of a face."""
        x = self.pool1(self.prelu1(self.conv1(x)))
        x = self.prelu3(self.conv3(self.prelu2(self.conv2(x))))
        return self.conv4_2(x), self.conv4_1(x).softmax(1)


class NextToken(nn.Module):
    """A language model as token numbers (n, positions) to logits (n, positions, words)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits of the next token at each position."""
        logits: Tensor = self.model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits
        return logits


def _weights(path: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = torch.load(cifar.data_folder() / path, weights_only=True)
    return found


def speaker() -> Task:
    """Identification of six speakers: every fifth utterance enrols, the nearest mean embedding by cosine wins."""
    weights, model = _weights("real/speaker_lstm.pt"), Speaker()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    data = np.load(cifar.data_folder() / "real" / "speaker_mels.npz")
    calibration, test = (torch.from_numpy(data[name].astype(np.float32)) for name in ("calibration", "test"))
    goals = [model.eval()(x).detach() for x in calibration.split(40)]
    who = torch.from_numpy(np.unique(data["test_speaker"], return_inverse=True)[1])

    @torch.no_grad()
    def identified(net: nn.Module) -> float:
        found, right = torch.cat([net(x) for x in test.split(50)]), []
        enrols = torch.zeros(len(who), dtype=torch.bool)
        for speaker_number in who.unique():
            enrols[(who == speaker_number).nonzero().flatten()[::5]] = True
        means = torch.stack([found[enrols & (who == number)].mean(0) for number in who.unique()])
        right = F.normalize(found[~enrols]) @ F.normalize(means).T
        return float((right.argmax(1) == who[~enrols]).float().mean())

    loss = lambda output, goal: (1 - (output * goal).sum(1)).mean()  # noqa: E731
    return Task(model, list(zip(calibration.split(40), goals, strict=True)), loss, identified, test.split(50))


def face() -> Task:
    """The average precision of the face probability at all places; a place is a face where the original says so."""
    model = FaceProposal().eval()
    model.load_state_dict(_weights("real/face_proposal.pt"))
    data = np.load(cifar.data_folder() / "real" / "face_pieces.npz")
    calibration, test = ((torch.from_numpy(data[n].astype(np.float32)) - 127.5) / 128 for n in ("calibration", "test"))
    with torch.no_grad():
        goals, faces = model(calibration), model(test)[1][:, 1] > FACE
    parts = zip(calibration.split(50), *(goal.split(50) for goal in goals), strict=True)

    @torch.no_grad()
    def precision(net: nn.Module) -> float:
        return float(average_precision_score(faces.flatten().numpy(), net(test)[1][:, 1].flatten().numpy()))

    def loss(output: Any, goal: Any) -> Tensor:
        faces = (goal[1][:, 1:] > FACE).float()
        boxes = ((output[0] - goal[0]).square() * faces).sum() / faces.sum().clamp_min(1)
        return F.binary_cross_entropy(output[1][:, 1], goal[1][:, 1]) + boxes

    return Task(model, [(x, (boxes, chances)) for x, boxes, chances in parts], loss, precision, [test])


def language() -> Task:
    """Perplexity on windows of text that was not trained on."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024, hidden_size=128, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=384, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(_weights("lm/llama.pt"))
    return task_of_windows(model, *(np.load(cifar.data_folder() / "lm" / f"{name}.npy") for name in ("train", "val")))


def task_of_windows(model: nn.Module, train: Tokens, test: Tokens) -> Task:
    """The perplexity of a model of transformers on windows of `test`; those of `train` are its calibration."""
    calibration, fresh = _windows(train, WINDOWS), _windows(test, TESTED)

    @torch.no_grad()
    def perplexity(net: nn.Module) -> float:
        return float(torch.stack([next_token_loss(net(x), x) for x in fresh.split(16)]).mean().exp())

    batches = [(x, x) for x in calibration.split(16)]
    return Task(NextToken(model).eval(), batches, next_token_loss, perplexity, fresh.split(16), "perplexity")


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """The cross-entropy of the next tokens."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def _windows(tokens: Tokens, count: int) -> Tensor:
    starts = np.random.default_rng(0).integers(0, len(tokens) - CONTEXT - 1, count)
    return torch.stack([torch.from_numpy(tokens[start : start + CONTEXT].astype(np.int64)) for start in starts])


TASKS: dict[str, Callable[[], Task]] = {"speaker": speaker, "face": face, "language": language}
