"""Plain statements of every operation in `mien.kernels`, to test the fast ones against.

Written to be read, not to be fast; beside tests and benchmarks, only the measuring of a model uses
one (`ssim`).
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .optimizer_rules import EMA, Clipping, Rule
from .reference_augment import augment as augment
from .reference_augment import vary_color as vary_color


def bias_act(
    x_bchw: Tensor,
    bias_c: Tensor | None,
    *,
    negative_slope: float,
    residual_bchw: Tensor | None = None,
    border: Sequence[int] = (0, 0, 0, 0),
    reflect: bool = False,
) -> Tensor:
    """`mien.kernels.bias_act` as separate operations, in the dtype of ``x_bchw``."""
    z_bchw = x_bchw if bias_c is None else x_bchw + bias_c.view(-1, 1, 1)
    if residual_bchw is not None:
        z_bchw = z_bchw + residual_bchw
    y_bchw = F.leaky_relu(z_bchw, negative_slope)
    return F.pad(y_bchw, tuple(border), "reflect" if reflect else "constant")


def bias_act_depth_to_space(
    x_bchw: Tensor, bias_c: Tensor | None, *, negative_slope: float, factor: int = 2
) -> Tensor:
    """The operation of `mien.kernels.bias_act` as separate ones, in the dtype of ``x_bchw``."""
    z_bhwc = bias_act(x_bchw, bias_c, negative_slope=negative_slope).permute(0, 2, 3, 1)
    batch, rows, columns, _ = z_bhwc.shape
    blocks = z_bhwc.reshape(batch, rows, columns, factor, factor, -1)
    spread = blocks.permute(0, 1, 3, 2, 4, 5)
    return spread.reshape(batch, rows * factor, columns * factor, -1).permute(0, 3, 1, 2)


def conv3x3(x_bchw: Tensor, weight: Tensor, padding: int = 1) -> Tensor:
    """`mien.kernels.conv3x3` as nine products, one for each place of the kernel."""
    framed = F.pad(x_bchw, (padding,) * 4)
    rows, columns = framed.shape[2] - 2, framed.shape[3] - 2
    products = (
        torch.einsum(
            "bihw,oi->bohw", framed[:, :, i : i + rows, j : j + columns], weight[:, :, i, j]
        )
        for i in range(3)
        for j in range(3)
    )
    return torch.stack([*products]).sum(0)


def enlarge(x_bchw: Tensor, factor: int = 2) -> Tensor:
    """`mien.kernels.enlarge` by the weights of its results, in the dtype of ``x_bchw``."""
    for axis in (2, 3):
        x_bchw = (x_bchw.movedim(axis, -1) @ _enlarging(x_bchw, axis, factor)).movedim(-1, axis)
    return x_bchw


def _enlarging(x_bchw: Tensor, axis: int, factor: int) -> Tensor:
    """(S, S * factor): the share of each pixel of one axis in each result."""
    size = x_bchw.shape[axis]
    centre = ((torch.arange(size * factor, device=x_bchw.device) + 0.5) / factor - 0.5).clamp(min=0)
    before = centre.long().clamp(max=size - 1)
    after, share = (before + 1).clamp(max=size - 1), centre - before
    pixels = torch.arange(size, device=x_bchw.device)[:, None]
    return ((pixels == before) * (1 - share) + (pixels == after) * share).to(x_bchw.dtype)


def to_image(x_bchw: Tensor, bias_c: Tensor | None, *, channels: int) -> Tensor:
    """`mien.kernels.to_image` as separate operations; types of 16 bits become fp32."""
    z_bchw = bias_act(x_bchw, bias_c, negative_slope=1)[:, :channels]
    return torch.sigmoid(z_bchw.float() if z_bchw.dtype.itemsize == 2 else z_bchw)


def dense_gradient(input_ni: Tensor, grad_output_no: Tensor) -> Tensor:
    """The gradient (O, I) of a dense weight, which `mien.kernels.dense` leaves as its factors."""
    return torch.einsum("no,ni->oi", grad_output_no, input_ni)


def optimize(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    moments: Mapping[str, Sequence[Tensor]],
    *,
    rule: Rule,
    learning_rate: float,
    step: int,
    clipping: Clipping = Clipping(),  # noqa: B008  (frozen)
    norms: Sequence[float] = (),
    rates: Sequence[float] | None = None,
    scale: float = 1.0,
    decays: Sequence[bool] | None = None,
) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """`mien.kernels.optimize` for one step that is number ``step`` of the finite ones, from 1.

    Args:
        parameters: Parameters before the step.
        gradients: Gradients of the scaled loss, or the mean of several.
        moments: Moments of the rule.
        rule: How the weights are moved.
        learning_rate: Learning rate of this step.
        step: Number of the step.
        clipping: How gradients are bound.
        norms: Past ones, of autoclip.
        rates: Learning rates of the steps before, of schedule-free; default: the present one.
        scale: What the loss was multiplied with.
        decays: Whether the weight decay moves each parameter; default: all.

    Returns:
        Parameters and moments after the step, in their own dtype; what came in, if a gradient is
        not finite.
    """
    gradients = [each.to(parameters[0].dtype) / scale for each in gradients]
    if not all(torch.isfinite(each).all() for each in gradients):
        return list(parameters), {kind: list(each) for kind, each in moments.items()}
    moved: list[Tensor] = []
    new: dict[str, list[Tensor]] = {kind: [] for kind in moments}
    for i, gradient in enumerate(clipped(gradients, clipping, norms)):
        decay = rule.weight_decay if decays is None or decays[i] else 0.0
        own = {kind: tensors[i] for kind, tensors in moments.items()}
        if rule.is_schedule_free:
            past = [learning_rate] * (step - 1) if rates is None else rates
            share = learning_rate**2 / math.fsum(rate**2 for rate in (*past, learning_rate))
            parameter, own = _schedule_free(
                parameters[i], gradient, own, rule, learning_rate, step, share, decay
            )
        else:
            parameter, own = _moved(parameters[i], gradient, own, rule, learning_rate, step, decay)
        moved.append(parameter)
        for kind, tensor in own.items():
            new[kind].append(tensor)
    return moved, new


def _moved(
    parameter: Tensor,
    gradient: Tensor,
    moments: dict[str, Tensor],
    rule: Rule,
    learning_rate: float,
    step: int,
    decay: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Parameter and moments after the step of any other rule than schedule-free."""
    if rule.is_decoupled:
        parameter = (1 - learning_rate * decay) * parameter
    else:
        gradient = gradient + decay * parameter
    ema = moments.pop(EMA, None)
    change, moments = _change(gradient, moments, rule, step)
    parameter = parameter - learning_rate * change
    if ema is not None:
        decay = min(rule.ema, (1 + step) / (10 + step))
        moments[EMA] = decay * ema + (1 - decay) * parameter
    return parameter, moments


def _schedule_free(
    parameter: Tensor,
    gradient: Tensor,
    moments: dict[str, Tensor],
    rule: Rule,
    learning_rate: float,
    step: int,
    share: float,
    decay: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Parameter and moments after the step of schedule-free; algorithm 1 of Defazio et al., with
    the average x that `mien.kernels.optimize` does not keep, and ``share`` as c."""
    beta_1, beta_2 = rule.beta_1, rule.beta_2
    base = moments["base"]
    average = (parameter - (1 - beta_1) * base) / beta_1
    exp_avg_sq = beta_2 * moments["square"] + (1 - beta_2) * gradient.square()
    root = (exp_avg_sq / (1 - beta_2**step)).sqrt() + rule.epsilon
    base = base - learning_rate * gradient / root - learning_rate * decay * parameter
    average = (1 - share) * average + share * base
    parameter = (1 - beta_1) * base + beta_1 * average
    return parameter, {"base": base, "square": exp_avg_sq}


def clipped(
    gradients: Sequence[Tensor], clipping: Clipping, norms: Sequence[float] = ()
) -> list[Tensor]:
    """The gradients within the bound; ``norms`` are past ones, of autoclip."""
    bound, kind = clipping.bound, clipping.kind
    if kind == "value":
        return [each.clamp(-bound, bound) for each in gradients]
    if kind == "norm":
        # A norm of 0 clips nothing.
        return [each * min(1.0, bound / max(float(each.norm()), 1e-300)) for each in gradients]
    norm = math.sqrt(sum(float(each.square().sum()) for each in gradients))
    if kind == "autoclip":
        bound = float(np.percentile([*norms, norm], bound))
    factor = min(1.0, bound / (norm + 1e-6)) if clipping.is_of_all else 1.0
    return [each * factor for each in gradients]


def _change(
    gradient: Tensor, moments: dict[str, Tensor], rule: Rule, step: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the learning rate is multiplied with, and the moments after the step."""
    beta_1, beta_2, epsilon = rule.beta_1, rule.beta_2, rule.epsilon
    short, long = 1 - beta_1**step, 1 - beta_2**step
    if rule.name == "lion":
        sign = (beta_1 * moments["mean"] + (1 - beta_1) * gradient).sign()
        return sign, {"mean": beta_2 * moments["mean"] + (1 - beta_2) * gradient}
    if rule.name == "rms-prop":
        exp_avg_sq = beta_2 * moments["square"] + (1 - beta_2) * gradient.square()
        return gradient / (exp_avg_sq.sqrt() + epsilon), {"square": exp_avg_sq}
    exp_avg = beta_1 * moments["mean"] + (1 - beta_1) * gradient
    if rule.name == "adamax":
        max_exp_avg_sq = torch.maximum(beta_2 * moments["largest"], gradient.abs() + epsilon)
        return exp_avg / short / max_exp_avg_sq, {"mean": exp_avg, "largest": max_exp_avg_sq}
    if rule.name == "adabelief":
        exp_avg_sq = (
            beta_2 * moments["square"] + (1 - beta_2) * (gradient - exp_avg).square() + epsilon
        )
        longest = 2 / (1 - beta_2) - 1
        length = longest - 2 * step * beta_2**step / long
        if length < 5:
            return exp_avg / short, {"mean": exp_avg, "square": exp_avg_sq}
        rectified = (length - 4) * (length - 2) * longest
        rectified /= (longest - 4) * (longest - 2) * length
        change = math.sqrt(long * rectified) / short * exp_avg / (exp_avg_sq.sqrt() + epsilon)
        return change, {"mean": exp_avg, "square": exp_avg_sq}
    exp_avg_sq = beta_2 * moments["square"] + (1 - beta_2) * gradient.square()
    new = {"mean": exp_avg, "square": exp_avg_sq}
    if rule.has_max_exp_avg_sq:
        new["largest"] = torch.maximum(moments["largest"], exp_avg_sq)
    root = (new.get("largest", exp_avg_sq) / long).sqrt() + epsilon
    if rule.name != "nadam":
        return exp_avg / short / root, new
    momenta = [beta_1 * (1 - 0.5 * 0.96 ** (t * 0.004)) for t in range(1, step + 2)]
    ahead = momenta[-1] / (1 - math.prod(momenta)) * exp_avg
    return (ahead + (1 - momenta[-2]) / (1 - math.prod(momenta[:-1])) * gradient) / root, new


def face_loss(
    pred_a: Tensor,
    pred_b: Tensor,
    target_nchw: Tensor,
    weight_n1hw: Tensor | None,
    *,
    losses: Sequence[tuple[str, float]],
    scale: float = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mien.kernels.face_loss` by autograd, in the dtype of the predictions.

    Returns:
        Means (2, K) of each side and loss, unshared and unscaled; the gradients of both sides.
    """
    means: list[Tensor] = []
    gradients: list[Tensor] = []
    if weight_n1hw is None:
        weight_n1hw = torch.ones_like(target_nchw[:, :1])
    sides = zip((pred_a, pred_b), target_nchw.chunk(2), weight_n1hw.chunk(2), strict=True)
    for pred, target, weight in sides:
        pred = pred.detach().requires_grad_()
        with torch.enable_grad():
            maps = [LOSS_MAPS[name](pred, target.to(pred.dtype)) for name, _ in losses]
            side = torch.stack([(each * weight.to(pred.dtype)).mean() for each in maps])
            total = sum(share * mean for (_, share), mean in zip(losses, side, strict=True))
            gradients += torch.autograd.grad(scale * total, pred)
        means.append(side.detach())
    return torch.stack(means), gradients[0], gradients[1]


def filtered_loss(
    differences: Callable[[Tensor, Tensor], Tensor],
    pred_bchw: Tensor,
    target_bchw: Tensor,
    weight_b1hw: Tensor,
) -> tuple[Tensor, Tensor]:
    """`mien.kernels.filtered_loss` by autograd, of a map that PyTorch computes.

    Returns:
        Means (B,) of weight * map of each face, and the gradient of their sum.
    """
    pred = pred_bchw.detach().requires_grad_()
    with torch.enable_grad():
        values = (weight_b1hw * differences(pred, target_bchw)).mean(dim=(1, 2, 3))
        (gradient,) = torch.autograd.grad(values.sum(), pred)
    return values.detach(), gradient


def mae(pred_bchw: Tensor, target_bchw: Tensor) -> Tensor:
    """|pred - target|."""
    return (pred_bchw - target_bchw).abs()


def mse(pred_bchw: Tensor, target_bchw: Tensor) -> Tensor:
    """(pred - target)^2."""
    return (pred_bchw - target_bchw).square()


def logcosh(pred_bchw: Tensor, target_bchw: Tensor) -> Tensor:
    """log(cosh(target - pred))."""
    difference = target_bchw - pred_bchw
    # By softplus, since cosh overflows where the difference is large.
    return difference + F.softplus(-2 * difference) - math.log(2)


def smooth_loss(pred_bchw: Tensor, target_bchw: Tensor) -> Tensor:
    """The general robust loss with alpha 1 and c 1/255 (Barron 2019, equation 1), times c."""
    c = 1 / 255
    return c * ((((pred_bchw - target_bchw) / c).square() + 1).sqrt() - 1)


def ssim(pred_bchw: Tensor, target_bchw: Tensor) -> Tensor:
    """1 - SSIM, 0..2 (Wang et al. 2004, equation 13), with an 11 x 11 Gaussian of sigma 1.5.

    Borders are reflected, so the map keeps the picture's size. Variances are clamped at 0.
    """
    c1, c2 = 0.01**2, 0.03**2  # for pictures in 0..1
    x, y = pred_bchw, target_bchw
    mean_x, mean_y, mean_xy = _blurred(x), _blurred(y), _blurred(x * y)
    mean_squares = _blurred(x * x + y * y)
    product, squares = mean_x * mean_y, mean_x.square() + mean_y.square()
    luminance = (2 * product + c1) / (squares + c1)
    contrast = (2 * (mean_xy - product) + c2) / (F.relu(mean_squares - squares) + c2)
    return 1 - luminance * contrast


def _blurred(x_bchw: Tensor) -> Tensor:
    places = torch.arange(-5, 6, dtype=x_bchw.dtype, device=x_bchw.device)
    taps = torch.exp(-(places**2) / (2 * 1.5**2))
    taps = (taps / taps.sum()).expand(x_bchw.shape[1], 1, 1, -1)
    padded = F.pad(x_bchw, (5, 5, 5, 5), mode="reflect")
    across = F.conv2d(padded, taps, groups=len(taps))
    return F.conv2d(across, taps.transpose(2, 3), groups=len(taps))


LOSS_MAPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mae": mae,
    "mse": mse,
    "logcosh": logcosh,
    "smooth_loss": smooth_loss,
    "ssim": ssim,
}
"""Every picture loss: (prediction, target), both (B, C, H, W), to a map of that shape."""
