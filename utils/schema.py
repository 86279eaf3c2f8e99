"""Every key of the configuration: its type, default, reason and range.

"As released" marks the numbers of PBAL's public release, "ProDA" those of the code that it builds on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data.taxonomy import CLASS_SETS, ClassSet, custom_class_set

STAGES = ("warmup", "bpl", "pseudo_labels", "pst", "distill", "test")
RUNS = (*STAGES, "source_only")  # what a benchmark's `stages` may name
TRAINING_STAGES = ("warmup", "bpl", "pst", "distill")
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
SIMCLR_RESNETS = ("resnet50", "resnet101", "resnet152")  # of which SimCLRv2 weights exist at width 1
DEFAULT_ARCH, DEFAULT_BACKBONE = "deeplabv2", "resnet101"
TINY = 1e-12  # least value of what must be above 0


def opt(default: Any, why: str, least: float = 0, most: float = math.inf) -> Any:
    """A config field: its default (copied if mutable), the one-line reason that `--help` shows, and for numbers,
    and those in lists, the range that `utils.config` checks."""
    metadata = {"help": why, "least": least, "most": most}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DatasetConfig:
    format: Literal["gta5", "synthia", "cityscapes", "folder"] = opt("gta5", "layout and label ids on disk")
    root: str = opt("data/GTA5", "folder of the dataset, relative to where the script is started")
    split: str = opt(
        "all", "cityscapes: train | val | test; gta5: all, or train | val | test of split.mat; else unused"
    )
    size: list[int] = opt(
        [], "[width, height] that images and labels are brought to when read; [] keeps each as it is", least=1
    )
    images: list[str] = opt([], "folder: globs below root, e.g. ['images/*.jpg']")
    labels: str = opt("", "folder: label of an image, from {dir} {parent} {stem}, e.g. 'labels/{stem}.png'; '' = none")
    strip: str = opt("", "folder: ending cut from an image's stem before {stem} is filled in")
    id_map: dict = opt({}, "folder: {label id: class name or 'ignore'}; ids not named are ignored; {} = train ids")


@dataclass
class DataConfig:
    class_set: Literal["cityscapes19", "cityscapes16", "custom", "auto"] = opt(
        "cityscapes19", "which classes are learnt; auto (test.py alone) = as many as the checkpoint has"
    )
    class_names: list[str] = opt([], "custom: class names in train-id order")
    palette: list[list[int]] = opt(
        [], "custom: one [r, g, b] per class; [] spreads colours over the hue circle", most=255
    )
    source: DatasetConfig = opt(None, "labelled domain")
    target: DatasetConfig = opt(None, "domain adapted to; its labels are never read in training")
    val: DatasetConfig = opt(None, "labelled split of the target domain, for measuring only")
    base_width: int = opt(2200, "width in px that scale 1 stands for (as released); 0 = the image's own width")
    scale: list[float] = opt([0.5, 1.5], "uniform range of the random resize, aspect kept (as released)", least=TINY)
    crop: list[int] = opt([896, 512], "[width, height] of training crops (as released)", least=32)
    hflip: float = opt(0.5, "probability of mirroring (as released)", most=1)
    jitter: bool = opt(True, "colour jitter in the strong view; off: strong = weak")
    jitter_hue: float = opt(0.2, "strong view: hue shift in +-this (as released)", most=0.5)
    jitter_factor: list[float] = opt([0.5, 1.5], "strong view: brightness, contrast, saturation (as released)")
    randaugment: list[int] = opt(
        [2, 10], "distillation's strong view: number and magnitude of operations (ProDA)", most=10
    )
    cutout: float = opt(0.25, "distillation's strong view: side of the hole as a share of the crop's; 0 = none", most=1)
    workers: int = opt(4, "loader processes per domain and training process; 0 loads in the latter")
    check: int = opt(8, "images of each dataset that are read and looked at before training starts; 0 = none")
    on_error: Literal["stop", "skip"] = opt(
        "stop", "training image or label that cannot be used: end, or take the next one in its place"
    )
    max_skipped: int = opt(10, "on_error=skip: different files after which training ends all the same")
    toy_root: str = opt("", "draw the toy cities into this folder on first use; '' = real data")


@dataclass
class ModelConfig:
    """`auto` is what the weight file tells of its network, and where it tells nothing, the default named here."""

    arch: Literal["auto", "deeplabv2", "deeplab_pbal"] = opt(
        "auto", "segmentation architecture; default deeplabv2; deeplab_pbal is that of PBAL's published checkpoints"
    )
    backbone: str = opt("auto", "resnet18 | resnet34 | resnet50 | resnet101 | resnet152 | timm/NAME; default resnet101")
    output_stride: Literal["auto", 8, 16] = opt(
        "auto", "input pixels per pixel of the backbone's output; default 8, deeplab_pbal 16 (as released)"
    )
    dilations: Literal["auto"] | list[int] = opt(
        "auto",
        "of the 3x3 convolutions that see the backbone's output side by side, in its pixels; default as released: "
        "[6, 12, 18, 24] at stride 8 and half of that at 16, deeplab_pbal [6, 12, 18] at 16",
        least=1,
    )
    bn_clr: Literal["auto", True, False] = opt(
        "auto", "deeplabv2: one more BatchNorm behind the backbone (ProDA, with SimCLR weights); default false"
    )
    normalization: Literal["auto", "imagenet", "half", "none"] = opt(
        "auto", "input statistics; default what the backbone's ImageNet weights expect; none = [0, 1] as it is"
    )
    dropout: float = opt(
        0.1, "before the classifier, of whole channels; deeplab_pbal: of single values (as released)", most=0.99
    )
    init: str = opt("imagenet", "start from: scratch | imagenet | simclr | a run's name (e.g. bpl) | a file")
    published: str = opt("", "file tried when the run named by init is not there")


@dataclass
class LossConfig:
    adversarial: float = opt(0.01, "weight of output-space alignment (as released); 0 trains without adversary")
    gan: Literal["bce", "ls"] = opt("bce", "adversary: binary cross-entropy (as released) | least squares (ProDA)")
    bidirectional: float = opt(0.1, "weight of each of the two prototype terms (as released); 0 = warm-up")
    directions: Literal["both", "s2t", "t2s"] = opt(
        "both", "which of the two are learnt: pixels over classes (s2t), classes over pixels (t2s); for ablations"
    )
    pseudo_ce: float = opt(1.0, "weight of cross-entropy on pseudo labels (as released)")
    contrast: float = opt(1.0, "weight of prototypical contrast, each domain (as released)")
    temperature: float = opt(0.07, "tau of prototypical contrast (as released)", least=TINY)
    prototype_gradient: bool = opt(False, "PST's contrast moves the prototypes too: true as released, false the paper")
    projection: Literal["none", "linear", "mlp"] = opt(
        "none", "PST: features and prototypes go through G before the contrast: none as released; the paper has one"
    )
    distill: float = opt(1.0, "weight of the distillation term (ProDA)")
    distill_form: Literal["kl", "released"] = opt(
        "kl", "kl = KL(teacher || student) | released = ProDA's code: kl_div of probabilities, mean over classes too"
    )


@dataclass
class TrainConfig:
    iterations: int = opt(60_000, "steps to run (as released)", least=1)
    horizon: int = opt(90_000, "steps over which the poly schedule would reach zero (as released)", least=1)
    lr: float = opt(1e-4, "learning rate of the backbone; the head has ten times as much (as released)", least=TINY)
    head_lr_factor: float = opt(10.0, "head's learning rate over the backbone's (as released)", least=TINY)
    power: float = opt(0.9, "exponent of the poly schedule (as released)", least=0)
    momentum: float = opt(0.9, "SGD momentum (as released)", most=0.999)
    weight_decay: float = opt(2e-4, "SGD weight decay (as released)")
    lr_discriminator: float = opt(
        1e-4, "Adam on the discriminator, betas (0.9, 0.99), same poly schedule (as released)", least=TINY
    )
    batch_source: int = opt(4, "source crops a step, of all processes together (as released)", least=1)
    batch_target: int = opt(4, "target crops a step, of all processes together (as released)", least=1)
    precision: Literal["auto", "float32", "tf32", "bfloat16", "float16"] = opt(
        "auto",
        "of the forward passes (losses are float32); auto = bfloat16 on GPUs that have it, float16 with loss scaling on "
        "older ones, float32 on CPUs; tf32 = float32 with TF32 products on GPUs",
    )
    accumulate: int = opt(
        1,
        "parts that each batch is split into, for less memory: gradients are averaged, cross-entropy is exact; "
        "BatchNorm, and BPL's softmax over pixels, see one part at a time",
        least=1,
    )
    checkpointing: bool = opt(
        False, "compute the backbone's activations again in the backward pass: much less memory, a third more time"
    )
    compile: bool = opt(False, "torch.compile of the networks that are trained: minutes at the start, faster steps")
    val_every: int = opt(1000, "steps between validations (as released)", least=1)
    save_every: int = opt(1000, "steps between writes of checkpoints/last.pth", least=1)
    log_every: int = opt(20, "steps between log lines", least=1)
    panels: int = opt(4, "validation images drawn into panels/ at each validation")
    on_nonfinite: Literal["stop", "skip"] = opt(
        "stop", "a loss or gradient that is not finite: end, or leave the step out; the weights are untouched in both"
    )
    max_skipped: int = opt(10, "on_nonfinite=skip: steps left out after which training ends all the same")
    deterministic: bool = opt(False, "bit-equal runs on one machine, by slower kernels where need be")
    restart: bool = opt(False, "begin anew although the run folder holds a run; else it is resumed")


@dataclass
class BatchNormConfig:
    statistics: Literal["running", "target", "saved"] = opt(
        "running",
        "running = as released; target = recomputed on unlabelled target training images before "
        "validation, pseudo labels and saving; saved = whatever the checkpoint holds (not in training)",
    )
    images: int = opt(256, "target images that statistics are recomputed on; 0 = all")


@dataclass
class PseudoConfig:
    threshold: float = opt(0.95, "pixels less confident than this become ignore (ProDA, CAG)", most=1)
    selection: Literal["constant", "class_balanced"] = opt(
        "constant", "class_balanced: per class min(threshold, the confidence that keeps `keep` of its pixels)"
    )
    keep: float = opt(0.66, "class_balanced: share of each class's pixels that is kept at least", most=1)
    flip: bool = opt(True, "average with the prediction of the mirrored image (ProDA)")


@dataclass
class DistillConfig:
    rounds: list[int] = opt([1, 2], "rounds to run; round 2 learns from round 1's result (ProDA)", least=1, most=2)
    init_round1: str = opt(
        "simclr", "student of round 1: simclr (ProDA) | imagenet | scratch | teacher | a run's name | a file"
    )


@dataclass
class TestConfig:
    dataset: Literal["val", "source", "target"] = opt("val", "labelled dataset of the benchmark that is scored")
    images: str = opt("", "predict these instead, without labels: an image, a folder or a glob, e.g. 'photos/**/*.jpg'")
    export: bool = opt(False, "write the prediction of every image into predictions/; always with test.images")
    flip: bool = opt(False, "average with the prediction of the mirrored image")
    scales: list[float] = opt([1.0], "average over the image resized by these; [0.5] predicts at half size", least=TINY)
    window: list[int] = opt([], "sliding window [width, height]; [] = the whole image (as in the literature)", least=32)
    overlap: float = opt(0.5, "least share of a sliding window that its neighbour sees too", most=0.9)
    batch: int = opt(1, "images predicted at once, in validation and pseudo labels too", least=1)
    panels: int = opt(8, "images drawn into panels/, and as many of the worst")


@dataclass
class Config:
    benchmark: str = opt("gta5_to_cityscapes", "who adapts to whom: a name in configs/benchmarks/ or a YAML file")
    stage: Literal["warmup", "bpl", "pseudo_labels", "pst", "distill", "test"] = opt("bpl", "set by the stage file")
    name: str = opt("", "run folder below runs/<benchmark>/; '' = the stage's name")
    runs: str = opt("runs", "folder of all runs")
    checkpoint: str = opt("", "test and pseudo labels: the network, a run's name or a file; distill: the teacher")
    which: Literal["last", "best"] = opt("last", "checkpoint of a named run; best was chosen by looking at val labels")
    pseudo_labels: str = opt("pseudo_labels", "run that holds the pseudo labels")
    seed: int = opt(0, "of weights, data order and augmentation, which differ from stage to stage too", most=2**31)
    device: str = opt("auto", "auto = cuda where there is one, under torchrun a GPU for each process | cpu | cuda:N")
    data: DataConfig = opt(None, "")
    model: ModelConfig = opt(None, "")
    loss: LossConfig = opt(None, "")
    train: TrainConfig = opt(None, "")
    batchnorm: BatchNormConfig = opt(None, "")
    pseudo: PseudoConfig = opt(None, "")
    distill: DistillConfig = opt(None, "")
    test: TestConfig = opt(None, "")

    @property
    def classes(self) -> ClassSet:
        """The class set of this configuration."""
        if self.data.class_set == "custom":
            return custom_class_set(self.data.class_names, self.data.palette)
        return CLASS_SETS["cityscapes19" if self.data.class_set == "auto" else self.data.class_set]

    @property
    def benchmark_name(self) -> str:
        """`benchmark` without folder and ending: the folder below `runs`."""
        return Path(self.benchmark).stem

    @property
    def run_dir(self) -> Path:
        """Where this run writes: `runs/<benchmark>/<name>`."""
        return self.sibling_run(self.name or self.stage)

    def sibling_run(self, name: str) -> Path:
        """Folder of another run of the same benchmark."""
        return Path(self.runs) / self.benchmark_name / name
