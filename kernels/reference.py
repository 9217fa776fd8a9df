"""Plain statements of every operation in `mien.kernels`, to test the fast ones against.

Written to be read, not to be fast; beside tests, only the measuring of a model uses one (`ssim`).
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .rules import Clipping, Rule

WARP_LANDMARKS = 2
_IDENTITY = np.array([[1, 0, 0], [0, 1, 0]], np.float32)


def augment(
    faces_fssc: np.ndarray,
    records: np.ndarray,
    *,
    input_px: int,
    output_px: Sequence[int],
    landmarks: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
    penalize_mask: bool = True,
    eye_multiplier: float = 1,
    mouth_multiplier: float = 1,
    single_interpolation: bool = False,
    rgb: bool = False,
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray], np.ndarray]:
    """`mien.kernels.augment` as a chain of OpenCV calls.

    It takes one store, and for each record the ``landmarks`` (68, 2) of its face and of the one
    that it is warped to.

    Returns:
        Input (B, H, W, 3) uint8; of each output its target (B, H, W, 3) uint8 and its weight
        (B, H, W) float64; the face mask (B, H, W) uint8 of the last output.
    """
    inputs: list[np.ndarray] = []
    targets: list[list[np.ndarray]] = [[] for _ in output_px]
    weights: list[list[np.ndarray]] = [[] for _ in output_px]
    masks: list[np.ndarray] = []
    size_px = faces_fssc.shape[1]
    for number, record in enumerate(records):
        face_ssc = faces_fssc[record["index"]].copy()
        if record["color"]:
            face_ssc[..., :3] = vary_color(
                face_ssc[..., :3], record["lab"], int(record["clahe_tiles"])
            )
        colored = face_ssc = np.ascontiguousarray(face_ssc[..., :6])
        if not np.array_equal(record["matrix"], _IDENTITY):
            face_ssc = cv2.warpAffine(
                face_ssc,
                record["matrix"],
                (size_px, size_px),
                flags=cv2.INTER_LINEAR,
                borderMode=cv2.BORDER_REPLICATE,
            )
        if record["flip"]:
            face_ssc = face_ssc[:, ::-1]
        order = [2, 1, 0] if rgb else [0, 1, 2]
        before = np.ascontiguousarray(colored[..., order])
        picture = np.ascontiguousarray(face_ssc[..., order])
        # OpenCV's rounding depends on the number of channels: those masks that are used.
        used = [3]
        if penalize_mask:
            used += [4] * (eye_multiplier > 1) + [5] * (mouth_multiplier > 1)
        stack = np.ascontiguousarray(face_ssc[..., order + used])
        for i, edge in enumerate(output_px):
            small = _shrunk(stack, edge)
            targets[i].append(small[..., :3])
            face, areas = small[..., 3], iter(np.moveaxis(small[..., 4:], -1, 0))
            weight = np.ones((edge, edge))
            if penalize_mask:
                weight = face / 255
                for multiplier in (eye_multiplier, mouth_multiplier):
                    if multiplier > 1:
                        weight = weight + weight * (next(areas) / 255) * multiplier
            weights[i].append(weight)
        masks.append(face)
        if record["warp"]:
            border = cv2.BORDER_CONSTANT
            if record["warp"] == WARP_LANDMARKS:
                assert landmarks is not None
                maps = landmark_maps(record, *landmarks[number], size_px)
                border = cv2.BORDER_REPLICATE
            else:
                maps = warp_maps(record["warp_noise"], size_px)
            if single_interpolation:
                maps = maps_before(*maps, record["matrix"], bool(record["flip"]))
                picture, border = before, cv2.BORDER_REPLICATE
            picture = cv2.remap(picture, *maps, cv2.INTER_LINEAR, borderMode=border)
        inputs.append(_shrunk(picture, input_px))
    return np.stack(inputs), [*map(np.stack, targets)], [*map(np.stack, weights)], np.stack(masks)


def vary_color(picture_ssc: np.ndarray, lab: np.ndarray, clahe_tiles: int) -> np.ndarray:
    """A BGR picture with L, a, b moved by a part of the way to 255 or 0, then CLAHE on L."""
    levels = cv2.cvtColor(np.ascontiguousarray(picture_ssc), cv2.COLOR_BGR2LAB).astype(np.float32)
    part = lab.astype(np.float32)
    moved = np.where(part >= 0, levels + (255 - levels) * part, levels * (1 + part))
    lab_ssc = moved.astype(np.uint8)
    if clahe_tiles:
        clahe = cv2.createCLAHE(clipLimit=2.0, tileGridSize=(clahe_tiles, clahe_tiles))
        lab_ssc[..., 0] = clahe.apply(np.ascontiguousarray(lab_ssc[..., 0]))
    return cv2.cvtColor(lab_ssc, cv2.COLOR_LAB2BGR)


def warp_maps(noise: np.ndarray, size_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions from which each pixel of the random warp comes: x (S, S) and y (S, S), float32."""
    points = np.linspace(0, size_px, 5, dtype=np.float32)
    stretched = int(1.25 * size_px)
    begin = stretched // 10
    maps = []
    for grid in (np.tile(points, (5, 1)) + noise[0], np.tile(points[:, None], 5) + noise[1]):
        large = cv2.resize(grid, (stretched, stretched), interpolation=cv2.INTER_LINEAR)
        maps.append(np.ascontiguousarray(large[begin : begin + size_px, begin : begin + size_px]))
    return maps[0], maps[1]


def landmark_maps(
    record: np.ndarray, source_l2: np.ndarray, destination_l2: np.ndarray, size_px: int
) -> tuple[np.ndarray, np.ndarray]:
    """Positions from which each pixel of the warp to landmarks comes: x (S, S) and y (S, S),
    float32."""
    source = _turned(source_l2, record, size_px)
    destination = _turned(destination_l2, record, size_px) + record["landmark_noise"]
    inner = np.concatenate([source[17:], destination[17:]]).astype(int).astype(np.float32)
    hull = cv2.convexHull(inner)

    def is_covered(point: np.ndarray) -> bool:
        return cv2.pointPolygonTest(hull, tuple(map(float, point)), False) >= 0

    kept = [
        i
        for i in range(len(source))
        if i > 17 or not (is_covered(source[i]) or is_covered(destination[i]))
    ]
    last, half = size_px - 1, size_px // 2 - 1
    corners = [(0, 0), (0, last), (last, last), (last, 0)]
    anchors = np.array([*corners, (half, 0), (half, last), (last, half), (0, half)], float)
    source = np.concatenate([source[kept], anchors])
    destination = np.concatenate([destination[kept], anchors])
    maps = np.full((2, size_px, size_px), np.nan)
    y, x = np.indices((size_px, size_px))
    for triangle in delaunay(destination):
        a, b, c = destination[triangle]
        of_b, of_c = np.einsum(
            "ij,jyx->iyx",
            np.linalg.inv(np.stack([b - a, c - a], 1)),
            np.stack([x - a[0], y - a[1]]),
        )
        shares = np.stack([1 - of_b - of_c, of_b, of_c])
        inside = (shares >= -1e-9).all(0)
        maps[:, inside] = source[triangle].T @ shares[:, inside]
    return maps[0].astype(np.float32), maps[1].astype(np.float32)


def delaunay(points_p2: np.ndarray) -> np.ndarray:
    """The triangles (T, 3) round whose corners runs a circle with no other point within."""
    triples = np.array(list(itertools.combinations(range(len(points_p2)), 3)))
    a, b, c = (points_p2[triples[:, i]] for i in range(3))
    area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    squares = [np.square(corner).sum(1) for corner in (a, b, c)]
    with np.errstate(divide="ignore", invalid="ignore"):
        centre_x = sum(
            s * (q[:, 1] - r[:, 1]) for s, q, r in zip(squares, (b, c, a), (c, a, b), strict=True)
        ) / (2 * area)
        centre_y = sum(
            s * (r[:, 0] - q[:, 0]) for s, q, r in zip(squares, (b, c, a), (c, a, b), strict=True)
        ) / (2 * area)
        centre = np.stack([centre_x, centre_y], 1)
        radius = np.linalg.norm(a - centre, axis=1)
        empty = np.abs(area) > 1e-9
        for point in points_p2:
            empty &= np.linalg.norm(point - centre, axis=1) > radius * (1 - 1e-9)
    return triples[empty]


def _turned(landmarks_l2: np.ndarray, record: np.ndarray, size_px: int) -> np.ndarray:
    """Landmarks of the store in the turned and mirrored picture, float64."""
    matrix = record["matrix"].astype(np.float64)
    points = landmarks_l2 @ matrix[:, :2].T + matrix[:, 2]
    if record["flip"]:
        points[:, 0] = size_px - 1 - points[:, 0]
    return points


def maps_before(
    x_ss: np.ndarray, y_ss: np.ndarray, matrix: np.ndarray, flip: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Positions in the picture before of those in the turned and mirrored one, float32."""
    x = x_ss.shape[0] - 1 - x_ss.astype(np.float64) if flip else x_ss.astype(np.float64)
    whole = np.vstack([matrix.astype(np.float64), [0, 0, 1]])
    inverse = np.linalg.inv(whole)[:2]
    source = np.einsum("ij,jyx->iyx", inverse, np.stack([x, y_ss, np.ones_like(x)]))
    return source[0].astype(np.float32), source[1].astype(np.float32)


def _shrunk(picture: np.ndarray, edge: int) -> np.ndarray:
    """Picture resized by area; more than four channels one by one where OpenCV refuses them."""
    if picture.shape[0] == edge:
        return picture
    if picture.shape[2] > 4 and picture.shape[0] % edge:
        planes = [np.ascontiguousarray(plane) for plane in np.moveaxis(picture, -1, 0)]
        return np.stack(
            [cv2.resize(p, (edge, edge), interpolation=cv2.INTER_AREA) for p in planes], -1
        )
    return cv2.resize(picture, (edge, edge), interpolation=cv2.INTER_AREA)


def activate(
    x_bchw: Tensor,
    bias_c: Tensor | None,
    *,
    slope: float,
    residual_bchw: Tensor | None = None,
    border: Sequence[int] = (0, 0, 0, 0),
    reflect: bool = False,
) -> Tensor:
    """`mien.kernels.activate` as separate operations, in the dtype of ``x_bchw``."""
    z_bchw = x_bchw if bias_c is None else x_bchw + bias_c.view(-1, 1, 1)
    if residual_bchw is not None:
        z_bchw = z_bchw + residual_bchw
    return F.pad(F.leaky_relu(z_bchw, slope), tuple(border), "reflect" if reflect else "constant")


def upscale(x_bchw: Tensor, bias_c: Tensor | None, *, slope: float, factor: int = 2) -> Tensor:
    """`mien.kernels.upscale` as separate operations, in the dtype of ``x_bchw``."""
    z_bhwc = activate(x_bchw, bias_c, slope=slope).permute(0, 2, 3, 1)
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
    z_bchw = activate(x_bchw, bias_c, slope=1)[:, :channels]
    return torch.sigmoid(z_bchw.float() if z_bchw.dtype.itemsize == 2 else z_bchw)


def dense_gradient(input_ni: Tensor, slope_no: Tensor) -> Tensor:
    """The gradient (O, I) of a dense weight, which `mien.kernels.dense` leaves as its factors."""
    return torch.einsum("no,ni->oi", slope_no, input_ni)


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
        kept = {kind: tensors[i] for kind, tensors in moments.items()}
        parameter = parameters[i]
        if rule.is_decoupled:
            parameter = (1 - learning_rate * decay) * parameter
        else:
            gradient = gradient + decay * parameter
        change, kept = _change(gradient, kept, rule, step)
        moved.append(parameter - learning_rate * change)
        for kind, tensor in kept.items():
            new[kind].append(tensor)
    return moved, new


def clipped(
    gradients: Sequence[Tensor], clipping: Clipping, norms: Sequence[float] = ()
) -> list[Tensor]:
    """The gradients within the bound; ``norms`` are past ones, of autoclip."""
    bound, kind = clipping.bound, clipping.kind
    if kind == "value":
        return [each.clamp(-bound, bound) for each in gradients]
    if kind == "norm":
        return [each * min(1.0, bound / max(float(each.norm()), 1e-300)) for each in gradients]
    norm = math.sqrt(sum(float(each.square().sum()) for each in gradients))
    if kind == "autoclip":
        bound = float(np.percentile([*norms, norm], bound))
    factor = min(1.0, bound / (norm + 1e-6)) if clipping.is_of_all else 1.0
    return [each * factor for each in gradients]


def _change(
    gradient: Tensor, kept: dict[str, Tensor], rule: Rule, step: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the learning rate is multiplied with, and the moments after the step."""
    beta_1, beta_2, epsilon = rule.beta_1, rule.beta_2, rule.epsilon
    short, long = 1 - beta_1**step, 1 - beta_2**step
    if rule.name == "lion":
        sign = (beta_1 * kept["mean"] + (1 - beta_1) * gradient).sign()
        return sign, {"mean": beta_2 * kept["mean"] + (1 - beta_2) * gradient}
    if rule.name == "rms-prop":
        square = beta_2 * kept["square"] + (1 - beta_2) * gradient.square()
        return gradient / (square.sqrt() + epsilon), {"square": square}
    mean = beta_1 * kept["mean"] + (1 - beta_1) * gradient
    if rule.name == "adamax":
        largest = torch.maximum(beta_2 * kept["largest"], gradient.abs() + epsilon)
        return mean / short / largest, {"mean": mean, "largest": largest}
    if rule.name == "adabelief":
        square = beta_2 * kept["square"] + (1 - beta_2) * (gradient - mean).square() + epsilon
        longest = 2 / (1 - beta_2) - 1
        length = longest - 2 * step * beta_2**step / long
        if length < 5:
            return mean / short, {"mean": mean, "square": square}
        rectified = (length - 4) * (length - 2) * longest
        rectified /= (longest - 4) * (longest - 2) * length
        change = math.sqrt(long * rectified) / short * mean / (square.sqrt() + epsilon)
        return change, {"mean": mean, "square": square}
    square = beta_2 * kept["square"] + (1 - beta_2) * gradient.square()
    new = {"mean": mean, "square": square}
    if rule.has_largest_square:
        new["largest"] = torch.maximum(kept["largest"], square)
    root = (new.get("largest", square) / long).sqrt() + epsilon
    if rule.name != "nadam":
        return mean / short / root, new
    momenta = [beta_1 * (1 - 0.5 * 0.96 ** (t * 0.004)) for t in range(1, step + 2)]
    ahead = momenta[-1] / (1 - math.prod(momenta)) * mean
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
