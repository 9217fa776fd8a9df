"""The decoder of phaze-a: a face from a code, and beside it the mask.

Shape letters: B faces, C channels, H rows, W columns.
"""

from torch import Tensor, nn

from ..alignment import Runs
from ..autoencoder import Build, Outputs
from ..blocks import ToImage
from ..graph import Network, Value, describe
from .config import Config
from .layers import Level, Reshape, dny_entry

Branches = list[nn.Module]
"""The same step for the face and, where there is a mask, for the mask."""


def upscales(
    config: Config, build: Build, inputs: Runs, *, levels: range, num_branches: int, sides: int
) -> tuple[list[Branches], Runs]:
    """Build some of the upscales between a code and a face; also gives the channels of the last.

    Where they include the first, what goes before all comes before it.

    Args:
        config: The options of the model.
        build: Settings of the model beside its options.
        inputs: Channels of what is to be scaled up.
        levels: Numbers of the upscales.
        num_branches: 1, or 2 where there is a mask.
        sides: Number of sides in a batch; see `BatchNorm`.
    """
    reflect, steps = build.reflect_padding, list[Branches]()
    if levels.start == 0:
        steps, inputs = _entries(config, inputs, num_branches, reflect)
    for number in levels:
        has_residuals = number < levels[-1] or not config.dec_skip_last_residual
        # The mask needs neither noise nor residual blocks.
        step = [
            Level(
                config.dec_upscale_method,
                inputs,
                config.dec_filters[number],
                noise=config.dec_gaussian and is_face,
                norm=config.dec_norm,
                residuals=config.dec_res_blocks if has_residuals and is_face else 0,
                sides=sides,
                reflect=reflect,
            )
            for is_face in (True, False)[:num_branches]
        ]
        steps, inputs = [*steps, list(step)], step[0].channels
    return steps, inputs


def _entries(
    config: Config, inputs: Runs, num_branches: int, reflect: bool
) -> tuple[list[Branches], Runs]:
    steps = list[Branches]()
    start_px = config.start_px
    if start_px != config.fc_px:
        channels = sum(inputs) * config.fc_px**2 // start_px**2
        steps.append([Reshape(inputs, start_px, channels) for _ in range(num_branches)])
        inputs = (channels,)
    if config.dec_upscale_method == "upscale_dny":
        width = config.dec_max_filters
        steps.append([dny_entry(inputs, width, reflect=reflect) for _ in range(num_branches)])
        inputs = (width,)
    return steps, inputs


class Decoder(nn.Module):
    """[B, C, H, W] -> a face and, where one is learned, its mask, 0..1."""

    def __init__(self, config: Config, build: Build, inputs: Runs, *, sides: int):
        """``sides``: of a batch; see `BatchNorm`."""
        super().__init__()
        self.num_branches = 2 if build.learn_mask else 1
        steps, inputs = upscales(
            config,
            build,
            inputs,
            levels=range(config.dec_upscales_in_fc, len(config.dec_filters)),
            num_branches=self.num_branches,
            sides=sides,
        )
        self.steps = nn.ModuleList(nn.ModuleList(step) for step in steps)
        self.images = nn.ModuleList(
            ToImage(inputs, outputs, config.dec_output_kernel)
            for outputs in (3, 1)[: self.num_branches]
        )

    def forward(self, code_bchw: Tensor) -> Outputs:
        branches: Outputs = (code_bchw,) * self.num_branches
        for step in (*self.steps, self.images):
            branches = tuple(each(x) for each, x in zip(step, branches, strict=True))
        return branches

    def describe(self, network: Network, code: Value) -> tuple[Value, ...]:
        """Add the layers of all branches to a graph; the outputs."""
        branches = (code,) * self.num_branches
        for step in (*self.steps, self.images):
            branches = tuple(
                describe(network, each, x) for each, x in zip(step, branches, strict=True)
            )
        return branches
