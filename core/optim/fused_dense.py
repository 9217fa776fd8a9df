"""Dense layers whose weights' gradients are never in memory: which they are, what forbids them.

See docs/fused_dense.md for what that is expected to bring.
"""

from torch import nn

from ...kernels.dense_table import MULTIPLE
from ...models.blocks import Dense
from ..config import OptimizerConfig

LEAST = 1_000_000
"""Weights of a layer, at least: of fewer, 6 MB are no longer moved, which takes an H100 2
microseconds, and the launches take as long. By calculation, unmeasured on a GPU."""


def check(config: OptimizerConfig, engine: str) -> None:
    """Refuse the switch where it cannot be kept.

    Args:
        config: Settings of the optimizer.
        engine: Name of the engine that was chosen.

    Raises:
        ValueError: Names what needs the gradients in memory, and what to change.
    """
    if not config.fused_dense:
        return
    obstacle = None
    if config.gradient_accumulation > 1:
        obstacle = (
            f"optimizer.gradient_accumulation is {config.gradient_accumulation}, whose sum needs "
            "every gradient in memory; set it to 1"
        )
    elif engine == "compile":
        obstacle = "the compile engine forms every gradient by itself; use --engine eager or graph"
    if obstacle:
        raise ValueError(
            f"optimizer.fused_dense is on, but {obstacle}, or set optimizer.fused_dense to false"
        )


def switch(model: nn.Module, *, is_on: bool) -> frozenset[str]:
    """Have the large dense layers of a model leave the factors of their weights' gradients; or,
    where it is off, none.

    Returns:
        Names of their weights.
    """
    layers = [module for module in model.modules() if isinstance(module, Dense)]
    for layer in layers:
        # Set in both directions: a model may have been used with the switch on before.
        layer.is_low_rank = is_on and _is_served(layer)
    # By identity: a weight that two modules share has one name among the parameters.
    chosen = {id(layer.linear.weight) for layer in layers if layer.is_low_rank}
    return frozenset(name for name, each in model.named_parameters() if id(each) in chosen)


def _is_served(layer: Dense) -> bool:
    """Whether a layer is trained, large enough, and of sizes that the kernels take."""
    weight = layer.linear.weight
    fits = not any(size % MULTIPLE for size in weight.shape)
    return weight.requires_grad and fits and weight.numel() >= LEAST


def described(num_layers: int, num_weights: int) -> str:
    """Sentence for the start-up report about what the switch does in a run."""
    if not num_layers:
        return f"none has {LEAST:,} weights or more to train, so optimizer.fused_dense does nothing"
    return f"{num_weights / 1e6:.1f} M weights of {num_layers} are moved without a gradient"
