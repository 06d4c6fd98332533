"""A training run as data: nested dataclasses with every value a run depends on.

Reading and writing YAML and overriding single values are in `recipe_io`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from profit.config import DuQConfig
from profit.schedule import PhaseSchedule


@dataclass(frozen=True)
class ModelRecipe:
    """Which network.

    Attributes:
        name: `digits_mobilenetv3` or a timm model name.
        pretrained: start from timm's weights, which are fetched on first use.
        init: a .safetensors file to start from: a model.safetensors of a run, or plain weights of this architecture.
        init_allow: names or shell patterns (`classifier.*`) of tensors that `init` may lack, have in addition or hold in
            another shape; the network keeps its own there.
        classes: number of outputs; None takes the data's, another number than the data's is refused.
        args: further keyword arguments of the model; `profit.allowed` lists them.
    """

    name: str = "digits_mobilenetv3"
    pretrained: bool = False
    init: str | None = None
    init_allow: tuple[str, ...] = ()
    classes: int | None = None
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataRecipe:
    """Which images. `fold`, `folds` and `shift` concern the digits only; the values after `limit` concern timm's only.

    Attributes:
        name: `digits`, `imagefolder`, `imagefolder:PATH`, `wds/NAME` (tar files in `path`), or one of torchvision's sets
            `torch/cifar10`, `cifar100`, `fashion_mnist`, `kmnist`, `mnist`, `places365`, `qmnist`.
        path: folder of the data, a plain local path.
        image_size: side of the square image.
        batch_size: images per optimizer step, over all processes and accumulated micro-batches together.
        eval_batch_size: images per test batch of a process.
        folds, fold: stratified folds; fold number `fold` (from 0) is the test set.
        shift: largest random shift of a training image in pixels.
        limit: keep at most this many training and test images.
        on_error: `refuse` stops at an image that cannot be read, `skip` leaves it out and counts it (image folders).
        in_chans, train_split, test_split, classes, workers, download, mean, std, crop_pct, interpolation, hflip,
        color_jitter, auto_augment, scale: see `profit.data.timm_data.timm_data`.
    """

    name: str = "digits"
    path: str | None = None
    image_size: int = 16
    batch_size: int = 64
    eval_batch_size: int = 256
    folds: int = 5
    fold: int = 0
    shift: int = 0
    limit: int | None = None
    on_error: Literal["refuse", "skip"] = "refuse"
    in_chans: int = 3
    train_split: str = "train"
    test_split: str = "val"
    classes: int | None = None
    workers: int = 2
    download: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    interpolation: str = "bilinear"
    hflip: float = 0.5
    color_jitter: float | None = None
    auto_augment: str | None = None
    scale: tuple[float, ...] | None = None


@dataclass(frozen=True)
class CalibrationRecipe:
    """How the activation intervals start; see `profit.calibrate_`. `percentile` is a number, "max", or None for 99.9."""

    batches: int = 8
    percentile: float | Literal["max"] | None = None
    mode: Literal["corrected", "original"] = "corrected"


@dataclass(frozen=True)
class OptimRecipe:
    """SGD; learning rates, weight decay and their course belong to the schedule.

    Attributes:
        clip_grad: largest norm of the gradient.
        accumulate: micro-batches per optimizer step and process; BatchNorm sees one micro-batch at a time.
    """

    momentum: float = 0.9
    nesterov: bool = True
    clip_grad: float | None = None
    label_smoothing: float = 0.0
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {self.accumulate}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")


@dataclass(frozen=True)
class TeacherRecipe:
    """Loss = CE + `weight` * CE(softmax of the teacher, student), temperature 1.

    Attributes:
        source: None (no teacher), `self` (the network itself as it is when quantization begins), a run folder, a
            .safetensors file of a run, a timm model name, or `torchvision/NAME`; the last two with pretrained weights.
    """

    source: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class EmaRecipe:
    """Exponential average of the weights, begun anew in every phase; `decay` None follows the phase's steps."""

    enabled: bool = True
    decay: float | None = None


@dataclass(frozen=True)
class AiwqRecipe:
    """See `profit.AIWQMonitor`; `decay` None follows the number of sampled steps."""

    mode: Literal["corrected", "original"] = "corrected"
    every: int = 1
    decay: float | None = None


@dataclass(frozen=True)
class RunRecipe:
    """The run itself.

    Attributes:
        name: title in the report and of the default output folder.
        seed: of initial weights, order and augmentation.
        threads: torch threads; None leaves torch's choice. One is fastest for very small nets.
        device: `cpu`, `cuda`, `cuda:1`, ... or `auto`. Under torchrun `cuda` and `auto` give each process its own GPU.
        eval_every: test after every n-th epoch; 0 only at the end of a phase.
        weights: which weights become model.safetensors: the trained ones (`model`) or their average (`ema`).
        tensorboard: write curves for TensorBoard.
        keep_checkpoints: how many resumable checkpoints are kept; two, so that a damaged one has a predecessor.
        amp: `bf16` runs forward passes under autocast; parameters, quantizer intervals and statistics stay float32.
        compile: torch.compile of the training step's forward and backward pass; sampling phases run without, since hooks
            break the graph at every layer.
        channels_last: memory format of images and weights.
        sync_bn: in several processes, BatchNorm over the batches of all of them. Without, each normalises its own
            micro-batch, and the running statistics are averaged after every epoch.
        find_unused_parameters: for a network of which some parameters get no gradient in some steps (DistributedDataParallel).
        timeout_s: how long a process waits for the others before it gives up.
    """

    name: str = "run"
    seed: int = 0
    threads: int | None = 1
    device: str = "auto"
    eval_every: int = 1
    weights: Literal["model", "ema"] = "model"
    tensorboard: bool = True
    keep_checkpoints: int = 2
    amp: Literal["none", "bf16"] = "none"
    compile: bool = False
    channels_last: bool = False
    sync_bn: bool = False
    find_unused_parameters: bool = False
    timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        if self.keep_checkpoints < 1:
            raise ValueError(f"keep_checkpoints must be at least 1, got {self.keep_checkpoints}")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be positive, got {self.timeout_s}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, got {self.threads}")


@dataclass(frozen=True)
class Recipe:
    """Everything a run depends on. Bit widths are in `schedule`, not in `quant`."""

    model: ModelRecipe = field(default_factory=ModelRecipe)
    data: DataRecipe = field(default_factory=DataRecipe)
    quant: DuQConfig = field(default_factory=lambda: DuQConfig(weight_bits=None, act_bits=None))
    calibration: CalibrationRecipe = field(default_factory=CalibrationRecipe)
    schedule: PhaseSchedule = field(default_factory=PhaseSchedule)
    optim: OptimRecipe = field(default_factory=OptimRecipe)
    teacher: TeacherRecipe = field(default_factory=TeacherRecipe)
    ema: EmaRecipe = field(default_factory=EmaRecipe)
    aiwq: AiwqRecipe = field(default_factory=AiwqRecipe)
    run: RunRecipe = field(default_factory=RunRecipe)
