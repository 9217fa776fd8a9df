"""Every setting of a training run: its type, default, range, meaning, and whether it may change.

A *locked* setting is part of a model's identity: it is fixed when the model folder is made. A
*free* one may change at every resume. Values come, lowest weight first, from the defaults, a TOML
file, ``--set section.key=value`` and the command line's flags. Ranges are enforced at construction.

A flag holds for the session that it is given in; all else a model keeps for its next sessions. What
a model is made with *stays* even where a flag gives it. One that is *private* is for the start that
it is given to: no file of a run holds it. A setting that is a *path* counts in the
folder of a model only under the rules of `core.checkpoint.known_paths`.
"""

import dataclasses
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...models.fields import Checked, fields_of, named, nearest, setting, shown

# The names by which faceswap's extraction stores masks in its face PNGs.
MASK_TYPES = (
    "bisenet-fp_face",
    "bisenet-fp_head",
    "components",
    "custom_face",
    "custom_head",
    "extended",
    "none",
    "unet-dfl",
    "vgg-clear",
    "vgg-obstructed",
)


class Section(Checked):
    """Base of a table of settings."""

    # Empty, and not left out: a base without slots gives every section a dictionary after all.
    __slots__ = ()

    @classmethod
    def full_name(cls, name: str) -> str:
        """Section and name, as `--set` takes them."""
        return f"{section_name(cls)}.{name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(Section):
    """Network that is trained."""

    trainer: str = setting("original", locked=True, flag="-t --trainer")
    """Model family."""

    reflect_padding: bool = setting(False, locked=True)
    """Pad convolutions by reflection instead of zeros; can lessen artefacts at the borders."""

    icnr_init: bool = setting(False, locked=True)
    """Draw the weights before a depth-to-space so that no checkerboard shows at the start."""

    conv_aware_init: bool = setting(False, locked=True)
    """Draw the weights of convolutions convolution-aware, in some seconds."""

    load_weights: str = setting("", flag="-l --load-weights", path=True)
    """Begin a new model with weights, normally the encoder's, of this model folder, generation or
    model.safetensors of the same family."""

    options: dict = setting({}, locked=True)
    """The family's own options, such as `lowmem = true` of original; each is locked or free."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig(Section):
    """Folders of the faces, how faces are cut out of them and where they are kept."""

    input_a: tuple[str, ...] = setting((), flag="-A --input-a", stays=True, path=True)
    """Folders of the faces of side A, the person in the film: face PNGs, or DeepFaceLab's JPEGs.
    Several: all faces alike, or FOLDER:0.3 for three of ten draws from that one."""

    input_b: tuple[str, ...] = setting((), flag="-B --input-b", stays=True, path=True)
    """Folders of the faces of side B, the face to put there, in the same way."""

    sub_folders: bool = setting(False, flag="--sub-folders", stays=True)
    """Read the faces of sub-folders, too."""

    # Defaults of the crop and of the masks are faceswap's.
    centering: str = setting("face", choices=("face", "head", "legacy"), locked=True)
    """What the crop is centred on: the face, the whole head, or the old, tighter crop."""

    coverage: float = setting(100.0, low=62.5, high=100.0, locked=True)
    """Percent of the centred crop that is trained on."""

    vertical_offset: int = setting(0, low=-25, high=25, locked=True)
    """Percent by which the crop is moved; a positive number moves the face down."""

    mask_type: str = setting("extended", choices=MASK_TYPES, locked=True)
    """Mask to train with: drawn from the landmarks (components, extended) or stored in the PNG."""

    mask_dilation: float = setting(0.0, low=-5.0, high=5.0)
    """Percent of its size by which the mask grows (or, negative, shrinks)."""

    mask_blur_kernel: int = setting(3, low=0, high=9)
    """Edge of the blur in px, of stored masks; 0 is off."""

    mask_threshold: int = setting(4, low=0, high=50)
    """Percent from black and white that is snapped to black and white, of stored masks."""

    decoder: str = setting("auto", choices=("auto", "dali", "opencv"))
    """What decodes the PNGs: DALI, or threads with ISA-L and OpenCV (opencv); auto: DALI with a
    GPU, where it is installed, else threads."""

    placement: str = setting("auto", choices=("auto", "gpu", "host", "file"))
    """Place where decoded faces are kept: GPU memory, (pinned) host memory, a memory-mapped
    file."""

    store_dir: str = setting("", path=True)
    """Folder that keeps the decoded faces for the next start; default: `faces` in the model's.
    Trainings may share it: of each face folder it keeps what was decoded with the 4 settings used
    last."""

    num_threads: int = setting(0, low=0, high=1024)
    """Threads that decode and augment; 0: as many as the process has cores."""

    strict: bool = setting(False, flag="--strict")
    """Stop at the first unreadable face file instead of skipping and counting it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig(Section):
    """How each face is varied every time that it is seen."""

    flip: bool = setting(True, flag="-P --no-flip")
    """Mirror faces at random."""

    color: bool = setting(True, flag="-c --no-augment-color")
    """Vary lightness, colour and contrast."""

    warp: bool = setting(True, flag="-W --no-warp")
    """Bend the input picture with a random 5 x 5 grid."""

    warp_to_landmarks: bool = setting(False, flag="-M --warp-to-landmarks")
    """Bend the input picture to the landmarks of a similar face of the other side instead."""

    single_interpolation: bool = setting(False)
    """Turn and bend the input picture in one sampling instead of two: slightly sharper."""

    # Defaults and ranges of all these are faceswap's, whose meaning of percent they keep.
    zoom_amount: int = setting(5, low=0, high=25)
    """Percent of zoom, in and out."""

    rotation_range: int = setting(10, low=0, high=25)
    """Degrees of rotation, either way."""

    shift_range: int = setting(5, low=0, high=25)
    """Percent of the picture's edge by which it is moved, either way, on each axis."""

    flip_chance: int = setting(50, low=0, high=75)
    """Percent of faces that are mirrored."""

    color_lightness: int = setting(30, low=0, high=75)
    """Percent by which lightness goes up or down."""

    color_ab: int = setting(8, low=0, high=50)
    """Percent by which each colour axis of LAB goes up or down."""

    color_clahe_chance: int = setting(50, low=0, high=75)
    """Percent of faces whose local contrast is equalised (CLAHE)."""

    color_clahe_max_size: int = setting(4, low=1, high=8)
    """Largest number of steps by which the CLAHE grid is refined."""


# As in faceswap the first slot cannot have flip, lpips or none.
LOSSES = (
    "ffl",
    "gmsd",
    "l_inf_norm",
    "laploss",
    "logcosh",
    "mae",
    "ms_ssim",
    "mse",
    "pixel_gradient_diff",
    "smooth_loss",
    "ssim",
)
_LATER_LOSSES = (*LOSSES, "flip", "lpips_alex", "lpips_squeeze", "lpips_vgg16", "none")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig(Section):
    """What is minimised."""

    # Defaults are faceswap's of all that it has.
    loss_function: str = setting("ssim", choices=LOSSES)
    """First loss, at weight 100 %."""

    loss_function_2: str = setting("mse", choices=_LATER_LOSSES)
    """Second loss."""

    loss_weight_2: int = setting(100, low=0, high=400)
    """Percent of the second loss."""

    loss_function_3: str = setting("none", choices=_LATER_LOSSES)
    """Third loss."""

    loss_weight_3: int = setting(0, low=0, high=400)
    """Percent of the third loss."""

    loss_function_4: str = setting("none", choices=_LATER_LOSSES)
    """Fourth loss."""

    loss_weight_4: int = setting(0, low=0, high=400)
    """Percent of the fourth loss."""

    lpips_weights: str = setting("", path=True)
    """Folder with the weights of the lpips losses, which are not shipped: see docs/learning.md."""

    mask_loss_function: str = setting("mse", choices=("mae", "mse"))
    """Loss of the predicted mask, with `learn_mask`."""

    eye_multiplier: int = setting(3, low=1, high=40)
    """Extra weight of the eyes, inside the mask; 1 is off."""

    mouth_multiplier: int = setting(2, low=1, high=40)
    """Extra weight of the mouth, inside the mask; 1 is off."""

    penalized_mask_loss: bool = setting(True, locked=True)
    """Count errors only inside the mask."""

    learn_mask: bool = setting(False, locked=True)
    """Let the model predict the mask as well."""


OPTIMIZERS = ("adabelief", "adam", "adamax", "adamw", "lion", "nadam", "rms-prop", "schedule-free")
CLIPPINGS = ("autoclip", "global_norm", "norm", "value", "none")
_LEAST_INTERPOLATION = 0.1
"""Smallest ada_beta_1 of schedule-free: that of `kernels.optimizer_rules`, which says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig(Section):
    """How the weights are updated."""

    # Defaults are faceswap's of all that it has, down to the search of the rate.
    optimizer: str = setting("adam", choices=OPTIMIZERS, locked=True)
    """The rule. schedule-free is adamw with an average of the weights in the place of a falling
    rate, of which all is made that is shown, exported and swapped; in the memory of adam. Not with
    another schedule than constant, nor with ada_amsgrad or train.ema."""

    # faceswap's slider ends at 1e-4; the finder, which tries rates up to 0.1, may find more.
    learning_rate: float = setting(5e-5, low=1e-6, high=1e-2)
    """Step size."""

    warmup_steps: int = setting(0, low=0, high=1_000_000, flag="-a --warmup")
    """Updates over which the rate rises from near 0, from when this was set, also by a stage."""

    schedule: str = setting("constant", choices=("constant", "cosine", "step"))
    """What becomes of the rate: it stays, falls along half a cosine, or falls in steps."""

    schedule_iterations: int = setting(100_000, low=1, high=1_000_000_000)
    """Iterations until the cosine ends, or between two steps, from when the schedule was set."""

    schedule_factor: float = setting(0.1, low=0.0, high=1.0)
    """What the rate is multiplied with at the end of the cosine, or at each step."""

    epsilon_exponent: int = setting(-7, low=-20, high=0)
    """The optimizer's epsilon is 10 to this power; lion has none."""

    # Below 1, which would never take in a gradient.
    ada_beta_1: float = setting(0.9, low=0.0, high=0.999999, locked=True)
    """Memory of the gradient's mean; with schedule-free, from 0.1, the share of the average in the
    weights at which gradients are taken."""

    ada_beta_2: float = setting(0.999, low=0.0, high=0.9999999, locked=True)
    """Memory of the gradient's square; of the mean, with lion."""

    ada_amsgrad: bool = setting(False, locked=True)
    """Keep the memory of the square from ever shrinking; of adam and adamw."""

    weight_decay: float = setting(0.0, low=0.0, high=1.0)
    """How strongly weights are drawn to 0; biases and the weights of norms are left alone."""

    gradient_clipping: str = setting("none", choices=CLIPPINGS)
    """Bound the gradients: each number (value), each tensor's norm (norm), the norm of all
    (global_norm), or that by a percentile of the past norms (autoclip)."""

    clipping_value: float = setting(1.0, low=0.0, high=10.0)
    """The bound, above 0; with autoclip a tenth of the percentile, so 1.0 is the 10th and 0 the
    smallest norm."""

    autoclip_history: int = setting(10_000, low=0, high=100_000)
    """Number of past norms that autoclip looks at; 0: the last 100,000."""

    gradient_accumulation: int = setting(1, low=1, high=100)
    """Iterations whose mean gradient makes one update; if one of them is not finite, none of them
    does."""

    use_lr_finder: bool = setting(False, flag="-r --use-lr-finder", stays=True)
    """Find the learning rate before a new model is trained; a resumed one keeps what was found."""

    lr_finder_iterations: int = setting(1000, low=100, high=10_000, locked=True)
    """Iterations of the search, on the model itself, which is put back afterwards."""

    lr_finder_mode: str = setting(
        "set", choices=("set", "graph_and_set", "graph_and_exit"), locked=True
    )
    """Use the found rate, draw its graph too, or draw the graph and leave."""

    lr_finder_strength: str = setting(
        "default", choices=("default", "aggressive", "extreme"), locked=True
    )
    """How near the found rate is to the one at which the loss was lowest: a tenth, a fifth, or
    two fifths of it."""

    overlap: str = setting("auto", choices=("auto", "on", "off"))
    """Update the weights of finished layers while the backward pass still runs, to the same bits;
    auto: on a GPU, where the update is a tenth of the step or more. Not with fp16. If a gradient
    is not finite, only its own part of the weights (4 M or more) is sure to stay as it was; without
    overlap all weights stay."""

    fused_dense: bool = setting(False)
    """Leave the gradients of large dense layers (1 M weights or more) as two small factors, which
    the update multiplies: less memory is taken and moved, and 16 bits round them no more. Off until
    it is measured on a GPU; by calculation it pays up to a batch size of some 100. Not with
    gradient_accumulation, nor with the compile engine."""

    reduce: str = setting("same", choices=("same", "fp32"))
    """Type in which several processes add up their gradients: the one that they have (same), or
    fp32, which is twice the bytes of 16 bits. With gradient_accumulation it is fp32."""

    placement: str = setting("gpu", choices=("gpu", "host"))
    """Memory for fp32 master weights and moments: the GPU's, or the host's (central storage), which
    the GPU then reads and writes, to the same bits: 12 bytes a parameter less on the GPU with adam
    in 16 bits, and an update as slow as PCIe."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionConfig(Section):
    """Number format in which the network computes; weights, statistics and losses stay fp32."""

    mode: str = setting(
        "auto", choices=("auto", "bf16", "fp16", "tf32", "fp32"), flag="--precision"
    )
    """auto: bf16 on a GPU that has it, tf32 on an older GPU, fp32 on the CPU."""

    align_channels: str = setting("auto", choices=("auto", "on", "off"))
    """Pad channels to multiples of 8 with zeros that no file ever holds; auto: on a GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig(Section):
    """The run."""

    # faceswap's slider ends at 256.
    batch_size: int = setting(16, low=0, high=4096, flag="-b --batch-size", words={"auto": 0})
    """Faces of each side in one iteration; auto (or 0): the most that fit in memory, up to
    `auto_batch_limit`. auto:N sets that too."""

    # A larger batch has more EG/s and fewer updates for the same faces.
    auto_batch_limit: int = setting(64, low=4, high=4096)
    """Largest batch size that auto chooses; beyond 64 training is faster and often worse."""

    iterations: int = setting(1_000_000, low=1, high=1_000_000_000, flag="-i --iterations")
    """Iterations of this session; a resumed model goes this many further."""

    until: int = setting(0, low=0, high=1_000_000_000, flag="--until")
    """Total iteration at which training ends, however often it was started, where `iterations` does
    not end it before; 0 is off."""

    # The largest number that a TOML file holds.
    seed: int = setting(0, low=0, high=2**63 - 1, locked=True, flag="--seed")
    """Fixes the initial weights, the order of the faces and every random number."""

    nan_protection: str = setting("halt", choices=("halt", "rollback", "off"))
    """What follows a loss or gradient that is not a number, or a collapse: stop with advice (halt),
    or go back to the last good save with a lower rate and try again (rollback). A step that is not
    finite never reaches the weights; off: it is only left out."""

    rollback_limit: int = setting(3, low=1, high=100)
    """Rollbacks after which training gives up, if the mean loss was no lower in between than it was
    before."""

    # Of rollbacks the numbers are chosen, unmeasured.
    rollback_factor: float = setting(0.5, low=0.01, high=1.0)
    """What the learning rate is multiplied with at each rollback, until another rate is set."""

    ema: float = setting(0.0, low=0.0, high=0.999999)
    """Decay of a running average of the weights, 0.999 or so, which previews, held-out scores,
    exports and swaps are then made of; it is kept in fp32, 4 bytes a parameter more. Its decay
    begins low: of update t it is min(ema, (1 + t) / (10 + t)). 0: no average, but that which
    schedule-free has by itself."""

    freeze_weights: bool = setting(False, flag="-f --freeze-weights")
    """Leave some of the model as it is, normally the encoder, and train the rest faster."""

    device: str = setting("auto", choices=("auto", "cpu", "cuda", "cuda:N"), flag="--device")
    """auto: the first GPU, else the CPU; cuda:1: the second one. The environment variable
    CUDA_VISIBLE_DEVICES chooses which GPUs there are, and numbers them from 0."""

    log_interval: int = setting(0, low=0, high=4096)
    """Iterations between two status lines; 0: about one a second on a terminal, elsewhere one a
    minute."""

    engine: str = setting("auto", choices=("auto", "eager", "compile", "graph"), flag="--engine")
    """How a step runs: operation by operation, compiled by torch, or as one CUDA graph (auto: on a
    GPU)."""

    decoder_streams: str = setting("auto", choices=("auto", "one", "two"))
    """Run both decoders at the same time on a GPU; auto: where it takes at most 16 faces of a side
    at once."""

    deterministic: bool = setting(False)
    """Let a GPU use only algorithms that give the same bits in every run, slower or not."""

    distribution: str = setting("auto", choices=("auto", "mirrored", "sharded"))
    """How several processes divide the update: each updates all weights (mirrored), or its own
    share of them, for which it alone keeps the moments (sharded); auto: what is predicted to be
    faster. The weights are the same but for rounding, and a save is the same file."""

    micro_batch: int = setting(0, low=0, high=4096)
    """Faces of each side whose gradient is computed at a time; those of a batch are then added up
    in fp32 in an order that hangs on nothing else, so that 1, 2, 4 or 8 processes come to the same
    bits. It is slower, and takes less memory. 0: the whole share of a process at once."""

    def __post_init__(self) -> None:
        # Taken apart before the fields are checked, to which `auto:48` is no value.
        word, _, limit = str(self.batch_size).partition(":")
        if word == "auto" and limit.isdecimal():
            object.__setattr__(self, "batch_size", word)
            object.__setattr__(self, "auto_batch_limit", int(limit))
        # By name: `slots` makes the class anew, and `super()` would look in the one before.
        Section.__post_init__(self)

    def last_iteration(self, done: int) -> int:
        """The total iteration at which a training ends that begins after ``done`` of them."""
        last = done + self.iterations
        return min(last, self.until) if self.until else last


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributeConfig(Section):
    """GPUs of this machine that a run is spread over; a model keeps none of this."""

    gpus: str = setting(
        "",
        flag="--gpus",
        pattern=r"|all|[1-9]\d{0,2}|(\d{1,3},)+(\d{1,3})?",
        form="all, how many (2; up to 999) or which with commas between (0,2,3)",
    )
    """Train on several GPUs, with a process on each: all of them, how many (2), or which (0,2,3, as
    nvidia-smi numbers them; 3, is the fourth alone). With `train.device` cpu: so many processes."""

    exclude_gpus: tuple[str, ...] = setting(
        (), flag="-X --exclude-gpus", pattern=r"\d{1,3}", form="numbers of GPUs"
    )
    """Numbers of GPUs to leave alone, as nvidia-smi has them."""

    restarts: int = setting(0, low=0, high=1000, flag="--restarts")
    """Times that training goes on from the last save where a process or its GPU fails, with the
    GPUs that are left."""

    def __post_init__(self) -> None:
        if type(self.gpus) in (int, str):  # a file may have either, and spaces at commas
            object.__setattr__(self, "gpus", "".join(str(self.gpus).split()))
        excluded = self.exclude_gpus
        numbers = excluded if isinstance(excluded, list | tuple) else [excluded]
        # A flag gives words, a file numbers or one text: all become the same.
        words = tuple(filter(None, re.split(r"[\s,]+", " ".join(map(str, numbers)))))
        object.__setattr__(self, "exclude_gpus", words)
        Section.__post_init__(self)


# 250 is faceswap's; at thousands of iterations a minute saving would be most of the work.
SAVE_ITERATIONS, SAVE_SECONDS = 250, 60.0
"""Iterations and seconds after which a save is due where neither is set: both have to be over."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveConfig(Section):
    """What is kept of the run, and when."""

    model_dir: str = setting("", flag="-m --model-dir", path=True)
    """The model's folder: a new model where it is empty, a resumed one where it holds one."""

    save_interval: int = setting(0, low=0, high=1_000_000, flag="-s --save-interval")
    """Iterations between two saves; 0: 250, but not within a minute of the last save."""

    save_minutes: float = setting(0.0, low=0.0, high=1440.0, flag="--save-minutes")
    """Minutes between two saves, in place of iterations; 0 is off."""

    # Not `exit`, faceswap's default, with which a crash costs the optimizer's state.
    save_optimizer: str = setting("always", choices=("never", "always", "exit"))
    """Saves that hold the optimizer's state: exit, the last one only. Without it a resumed model
    begins with an empty optimizer, and what follows a crash is not bit for bit the same."""

    # Two: the newest, and one to go back to.
    keep_generations: int = setting(2, low=1, high=100)
    """How many complete saves are kept."""

    # Default of faceswap.
    snapshot_interval: int = setting(
        25_000, low=0, high=1_000_000_000, flag="-I --snapshot-interval"
    )
    """Total iterations between two copies of the model, optimizer and all, that are kept beside its
    folder as `<model dir>_snapshot_<n>_iters`; 0 is off."""

    logs: bool = setting(True, flag="-n --no-logs")
    """Write TensorBoard events, and what is reported as `events.jsonl`; both stay small."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogConfig(Section):
    """What of the reports is printed."""

    level: str = setting(
        "info", choices=("debug", "info", "warning", "error"), flag="-L --loglevel --log-level"
    )
    """How much must be amiss for a report to be printed; debug: every report is."""

    file: str = setting("", flag="-F --logfile --log-file", path=True)
    """File to which the same lines are added, each with its date; at 16 MiB it is put aside, and
    four of those are kept."""

    # Private, as the notifications below: a stranger's folder must have no faces sent anywhere.
    wandb: str = setting("", private=True, flag="--wandb")
    """Project of Weights & Biases that is told losses, previews and settings too; no model keeps
    it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NotifyConfig(Section):
    """Notifications of the end of a run, a stage, a rollback or a failure; no model keeps them."""

    # A stranger's folder must not run a command, and an address may hold a password.
    command: str = setting("", private=True, flag="--notify-command")
    """Command for the shell that is run at each: $MIEN_EVENT and $MIEN_TEXT say what happened, and
    it reads the same as a line of JSON."""

    url: str = setting("", private=True, flag="--notify-url")
    """Place to send a message to, as a URL of Apprise: ntfys://ntfy.sh/topic, discord://id/token,
    mailto://..."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig(Section):
    """How good the model is, measured at every save on faces that it is never trained on."""

    # Locked: a face that was trained on once tells nothing when it is measured on.
    held_out: int = setting(0, low=0, high=1000, locked=True)
    """One in so many faces of each side, chosen by file name, is kept for measuring; 0: none."""

    held_out_a: str = setting("", path=True)
    """Folder of faces of A to measure on, in place of a share of those that are trained on."""

    held_out_b: str = setting("", path=True)
    """The same of B."""

    max_faces: int = setting(64, low=1, high=10_000)
    """Faces of each side that are measured, evenly spread over those held out."""

    landmark_model: str = setting("", path=True)
    """ONNX file of a network that finds 68 landmarks in a face, to compare a swap's pose."""

    embedding_model: str = setting("", path=True)
    """ONNX file of a face recogniser, to compare a swap's identity with A's and with B's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreviewConfig(Section):
    """The picture written at every save, and those of the time-lapse."""

    # Default and range of faceswap; odd numbers are allowed, too.
    preview_images: int = setting(14, low=2, high=16)
    """Faces of each side in the picture."""

    faces: str = setting("fixed", choices=("fixed", "fresh"))
    """Show the same faces every time, evenly spread over the folder, or others every time."""

    style: str = setting("sheet", choices=("sheet", "faceswap"))
    """Sheet to judge by, with the swap pasted back into its face, or faceswap's layout."""

    enlarge: str = setting("lanczos", choices=("lanczos", "nearest"))
    """How faces of less than 128 px are enlarged in a sheet: smoothly, or pixel by pixel."""

    show_mask: bool = setting(True)
    """Show the mask, if the model trains with one: outlined in a sheet, as a tint of what it
    leaves out in faceswap's layout. The key m puts the tint in its place, or takes that away."""

    mask_opacity: int = setting(30, low=0, high=100)
    """Percent of tint over what the mask leaves out."""

    mask_color: str = setting("#ff0000", pattern="#[0-9a-fA-F]{6}", form="#rrggbb")
    """Colour of the mask's outline and tint, and of the coverage corners, as #rrggbb."""

    history: int = setting(40, low=0, high=1000)
    """Most previews that are kept in `previews`, to be compared; the older, the fewer."""

    write_image: str = setting("", flag="-w --write-image", path=True)
    """PNG file to which every preview is written too."""

    window: bool = setting(False, flag="-p --preview")
    """Show the preview in a window; needs a screen, and opencv-python."""

    preview_scale: int = setting(100, low=10, high=400, flag="--preview-scale")
    """Percent of its size at which the window shows the preview."""

    timelapse_input_a: str = setting("", flag="-x --timelapse-input-a", path=True)
    """Folder whose first faces are drawn at every save as a picture of the time-lapse, as A."""

    timelapse_input_b: str = setting("", flag="-y --timelapse-input-b", path=True)
    """The same of B."""

    timelapse_output: str = setting("", flag="-z --timelapse-output", path=True)
    """Folder of the time-lapse's pictures; default: `timelapse` in the model's."""

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if self.write_image and not self.write_image.lower().endswith(".png"):
            raise ValueError(f"preview.write_image must end in .png, got {self.write_image!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One training run, whole: each section as its class, or as a table of its settings.

    Raises:
        ValueError: A table has an unknown key (the nearest known one is named), a value is not
            allowed, or values do not go together.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    distribute: DistributeConfig = field(default_factory=DistributeConfig)
    save: SaveConfig = field(default_factory=SaveConfig)
    log: LogConfig = field(default_factory=LogConfig)
    notify: NotifyConfig = field(default_factory=NotifyConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    preview: PreviewConfig = field(default_factory=PreviewConfig)

    def __post_init__(self) -> None:
        # The way in which a frozen dataclass settles its own fields.
        for name in SECTIONS:
            object.__setattr__(self, name, section_of(name, getattr(self, name)))
        uses_mask = self.loss.penalized_mask_loss or self.loss.learn_mask
        if uses_mask and self.data.mask_type == "none":
            raise ValueError(
                "data.mask_type is none, but loss.penalized_mask_loss or loss.learn_mask needs a "
                "mask; choose a mask, or set both to false"
            )
        # Of a valid setting each, so that only both together show it.
        clipping = self.optimizer.gradient_clipping
        if clipping in ("value", "norm", "global_norm") and self.optimizer.clipping_value == 0:
            raise ValueError(
                "optimizer.clipping_value must be above 0 with optimizer.gradient_clipping "
                f"{clipping}, got 0.0, with which nothing would move; set a bound, or clipping to "
                "none"
            )
        if self.optimizer.optimizer == "schedule-free":
            self._refuse_beside_schedule_free()

    def _refuse_beside_schedule_free(self) -> None:
        """Refuse, by ValueError, what schedule-free has no place for or brings itself."""
        optimizer, begin = self.optimizer, "optimizer.optimizer is schedule-free, but"
        if optimizer.schedule != "constant":
            raise ValueError(
                f"{begin} optimizer.schedule {optimizer.schedule} lowers the rate, which its "
                "average is in the place of; set the schedule to constant (a warm-up may stay)"
            )
        if optimizer.ada_amsgrad:
            raise ValueError(
                f"{begin} optimizer.ada_amsgrad is of adam and adamw alone; set it to false"
            )
        if optimizer.ada_beta_1 < _LEAST_INTERPOLATION:
            raise ValueError(
                f"{begin} optimizer.ada_beta_1 is {optimizer.ada_beta_1:g}: the average could not "
                f"be told from the weights; set it to {_LEAST_INTERPOLATION} or more"
            )
        if self.train.ema:
            raise ValueError(
                f"{begin} train.ema {self.train.ema:g} asks for an average beside its own; set "
                "train.ema to 0"
            )


SECTIONS: dict[str, type] = {
    spec.name: typing.cast(type, spec.default_factory) for spec in dataclasses.fields(Config)
}


def section_of(name: str, values: Any) -> Any:
    """A section, as it is or made of a table of its settings.

    Raises:
        ValueError: It is neither, or the table has an unknown key (the nearest known one is named)
            or a value that is not allowed.
    """
    # Sections are made by their class alone, so no value escapes its rule.
    kind = SECTIONS[name]
    if isinstance(values, kind):
        return values
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} must be a table of settings, got {shown(values)}")
    refuse_unknown(values, fields_of(kind), f"{name}.")
    return kind(**values)


def refuse_unknown(values: Mapping[str, Any], known: Iterable[str], prefix: str = "") -> None:
    """Refuse a key that is no name of a section or, with its prefix, of a setting."""
    for key in values:
        if key not in known:
            meant = _meant(key, known, prefix)
            hint = f"; did you mean {meant}?" if meant else ""
            raise ValueError(f"unknown setting {prefix}{named(key)}{hint}")


def _meant(key: object, known: Iterable[str], prefix: str) -> str | None:
    """The setting of that name in another section, or else the nearest name in this one."""
    # Another section first: a right name in the wrong place is the more usual slip.
    for name, kind in SECTIONS.items():
        if key in fields_of(kind):
            return f"{name}.{key}"
    near = nearest(key, known)
    return f"{prefix}{near}" if near else None


def section_name(kind: type) -> str:
    """The name under which a section's class stands in the file."""
    return next(name for name, cls in SECTIONS.items() if cls is kind)
