"""The difference that trained networks see (Zhang et al. 2018: LPIPS).

A trunk that was trained on ImageNet looks at both pictures. At each of some of its layers every
pixel's features are scaled to length 1, the squared differences are added with trained weights to
a map, and the maps, resized to the picture, are summed; a tenth of the sum is the loss.

The trunks bear torchvision's names, so its files fit: ``features.<n>.weight``. The weights of the
features bear those of LPIPS's own files: ``lin<k>.model.1.weight``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.weight_files import SUFFIXES, read_tensors
from ..system.paths import expanded
from .picture import PictureLoss

# LPIPS's own.
_LEAST_LENGTH = 1e-10
# faceswap's share, so that its weights of losses mean the same here.
_SHARE = 0.1


class _Fire(nn.Module):
    """A squeeze to few channels, then 1 x 1 and 3 x 3 convolutions beside each other."""

    def __init__(self, inputs: int, squeezed: int, expanded: int):
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x_bchw: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x_bchw))
        return F.relu(torch.cat((self.expand1x1(x), self.expand3x3(x)), dim=1))


def _alexnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
    )


def _squeezenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, stride=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        _Fire(64, 16, 64),
        _Fire(128, 16, 64),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        _Fire(128, 32, 128),
        _Fire(256, 32, 128),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        _Fire(256, 48, 192),
        _Fire(384, 48, 192),
        _Fire(384, 64, 256),
        _Fire(512, 64, 256),
    )


def _vgg16() -> nn.Sequential:
    layers: list[nn.Module] = []
    inputs = 3
    for channels, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        if layers:
            layers.append(nn.MaxPool2d(2))
        for _ in range(count):
            layers += [nn.Conv2d(inputs, channels, 3, padding=1), nn.ReLU()]
            inputs = channels
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Trunk:
    """A network that looks at pictures, and what is taken of it."""

    make: Callable[[], nn.Sequential]
    """Convolutional part of the network, up to the last layer that is taken."""

    file: str
    """Torchvision's name of it, with which the file of its weights begins."""

    linear_file: str
    """Name of the file of LPIPS's weights."""

    taken: tuple[int, ...]
    """Layers whose outputs are compared."""

    channels: tuple[int, ...]
    """Channels of these outputs."""

    rims: tuple[int, ...]
    """Pixels to leave out around each of them, where features come of the padding."""

    min_px: int
    """The smallest picture of which every rim leaves a pixel."""


TRUNKS = {
    "lpips_alex": Trunk(
        _alexnet,
        file="alexnet",
        linear_file="alex",
        taken=(1, 4, 7, 9, 10),  # the last one before its ReLU
        channels=(64, 192, 384, 256, 256),
        rims=(2, 2, 1, 1, 1),
        min_px=63,
    ),
    "lpips_squeeze": Trunk(
        _squeezenet,
        file="squeezenet1_1",
        linear_file="squeeze",
        taken=(1, 4, 7, 9, 10, 11, 12),
        channels=(64, 128, 256, 384, 384, 512, 512),
        rims=(1, 1, 1, 1, 1, 1, 1),
        min_px=49,
    ),
    "lpips_vgg16": Trunk(
        _vgg16,
        file="vgg16",
        linear_file="vgg",
        taken=(3, 8, 15, 22, 29),
        channels=(64, 128, 256, 512, 512),
        rims=(1, 1, 1, 1, 1),
        min_px=48,
    ),
}


class Lpips(PictureLoss):
    """lpips_*: of pictures of any size from the trunk's smallest; map of 1 channel.

    Args:
        name: Name in `TRUNKS`.
        folder: Holds the weights; see `_tensors`.

    Raises:
        ValueError: The folder lacks a file, or a file is not what its name says.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, name: str, folder: str):
        super().__init__()
        self.trunk = TRUNKS[name]
        with torch.device("meta"):  # nothing is drawn for what files will fill
            self.features = self.trunk.make()
            self.linears = nn.ParameterList(
                nn.Parameter(torch.empty(1, channels, 1, 1)) for channels in self.trunk.channels
            )
        self._load(name, folder)
        # Nothing of it is trained; the gradient goes through it to the picture alone.
        self.requires_grad_(False).eval()
        # Of RGB in -1..1.
        mean, deviation = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float64).view(3, 1, 1))
        self.register_buffer(
            "deviation", torch.tensor(deviation, dtype=torch.float64).view(3, 1, 1)
        )

    def map(self, pred_bchw: Tensor, target_bchw: Tensor) -> Tensor:
        size = pred_bchw.shape[2:]
        total = torch.zeros_like(pred_bchw[:, :1])
        seen = zip(self._seen(pred_bchw), self._seen(target_bchw), self.linears, strict=True)
        for x, y, weight in seen:
            difference = F.conv2d((x - y).square(), weight)
            total = total + F.interpolate(difference, size, mode="bilinear", align_corners=False)
        return _SHARE * total

    def _seen(self, bgr_bchw: Tensor) -> list[Tensor]:
        """What each taken layer makes of the pictures, without its rim, every pixel of length 1."""
        # RGB in -1..1, as the trunk was trained on; the mean and the deviation are LPIPS's.
        x = (2 * bgr_bchw.flip(1) - 1 - self.mean) / self.deviation
        # As its filters are: one layout through all layers, so that nothing is rearranged.
        x = x.contiguous(memory_format=torch.channels_last)
        rims = dict(zip(self.trunk.taken, self.trunk.rims, strict=True))
        taken = []
        for number, layer in enumerate(self.features):
            x = layer(x)
            if number in rims:
                rim = rims[number]
                inner = x[:, :, rim:-rim, rim:-rim]
                # Bounded below before the root, whose slope is infinite at 0.
                square = inner.square().sum(dim=1, keepdim=True).clamp_min(_LEAST_LENGTH**2)
                taken.append(inner / (square.sqrt() + _LEAST_LENGTH))
        return taken

    def _load(self, name: str, folder: str) -> None:
        file = _find(name, folder, self.trunk.file, "torchvision's ImageNet weights")
        own = {f"features.{key}": each for key, each in self.features.state_dict().items()}
        tensors = _tensors(file, own)
        filters = {
            name.removeprefix("features."): tensor.contiguous(memory_format=torch.channels_last)
            if tensor.dim() == 4
            else tensor
            for name, tensor in tensors.items()
        }
        # Assigned: modules of the meta device have no memory to copy into.
        self.features.load_state_dict(filters, assign=True)
        file = _find(name, folder, self.trunk.linear_file, "the weights of LPIPS 0.1")
        own = {f"lin{k}.model.1.weight": each for k, each in enumerate(self.linears)}
        self.linears = nn.ParameterList(_tensors(file, own).values())


def _find(name: str, folder: str, stem: str, what: str) -> Path:
    """The one file ``<stem>.*`` or ``<stem>-*.*`` of the folder."""
    remedy = f"{what}, {stem}.pth (or .safetensors): put it into the folder loss.lpips_weights"
    if not folder:
        raise ValueError(f"{name} needs {remedy}, which is not set")
    place = expanded(folder)
    names = (f"{stem}.", f"{stem}-")
    files = sorted(
        file
        for file in (place.iterdir() if place.is_dir() else ())
        if file.name.startswith(names) and file.suffix in SUFFIXES
    )
    if not files:
        raise ValueError(f"{name} needs {remedy}, {place}")
    if len(files) > 1:
        several = ", ".join(file.name for file in files)
        raise ValueError(f"{place} has several weights for {name}, keep one: {several}")
    return files[0]


def _tensors(file: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The expected tensors of a file, in fp32, in the shapes of ``expected``."""
    tensors = read_tensors(file)
    for name, tensor in expected.items():
        if name not in tensors:
            raise ValueError(f"{file} has no tensor {name}; name another loss.lpips_weights")
        if tensors[name].shape != tensor.shape:
            raise ValueError(
                f"{file}: {name} must have shape {tuple(tensor.shape)}, got "
                f"{tuple(tensors[name].shape)}; name another loss.lpips_weights"
            )
    return {name: tensors[name].float() for name in expected}
