"""Every key of the configuration: its type, default, reason and range.

"As released" marks the numbers of PBAL's public release, "ProDA" those of the code that it builds on.
"""

from __future__ import annotations

import difflib
import glob
import math
import os
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from utils.config.errors import ConfigError

STAGES = ("warmup", "bpl", "pseudo_labels", "pst", "distill", "test")
RUNS = (*STAGES, "source_only")  # what a benchmark's `stages` may name
TRAINING_STAGES = ("warmup", "bpl", "pst", "distill")
TRAIN_OR_TEST = (*TRAINING_STAGES, "test")
ADVERSARIAL, JITTERED = ("warmup", "bpl"), ("warmup", "bpl", "pst")
MAX_SKIPPED = 10  # unusable files, or steps that are not finite, that a run leaves out before it ends all the same
COMPILED_STEPS = 5_000  # of a run, from which its compilation is won back: see utils/README.md
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
WEIGHT_ENDINGS = (".pth", ".pt", ".pkl", ".tar", ".ckpt", ".bin", ".safetensors")  # no run's name ends like this
SIMCLR_RESNETS = ("resnet50", "resnet101", "resnet152")  # of which SimCLRv2 weights exist at width 1
DEFAULT_ARCH, DEFAULT_BACKBONE = "deeplabv2", "resnet101"
TINY = 1e-12  # least value of what must be above 0


def opt(
    default: Any,
    why: str,
    least: float = 0,
    most: float = math.inf,
    stages: tuple[str, ...] | None = None,
    path: Callable[[str], bool] | None = None,
) -> Any:
    """A config field.

    Args:
        default: copied if mutable; of a section, its class.
        why: the line that `--help` shows.
        least, most: range of a number, and of those in a list; `utils.config.loading` checks it.
        stages: which stages read the key; by default those that read its section.
        path: for a path, the test that it is there, e.g. `os.path.isdir`; see `utils.config.loading.find_path`.
    """
    metadata = {"help": why, "least": least, "most": most, "stages": stages, "path": path}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def require(holds: object, message: str) -> None:
    """Raise ConfigError with `message` unless `holds`."""
    if not holds:
        raise ConfigError(message)


def nearest(word: object, known: Iterable[object]) -> str:
    """The one of `known` that is spelt most like `word`."""
    return difflib.get_close_matches(str(word), map(str, known), n=1, cutoff=0)[0]


def leaves_folder(path: str) -> bool:
    """Whether a path leads out of the folder that it is meant to be below."""
    return Path(path).is_absolute() or ".." in Path(path).parts


def matches(pattern: str) -> bool:
    """Whether there is such a file or folder, or one that the glob matches."""
    root = fixed_part(Path(pattern))
    rest = Path(pattern).relative_to(root)
    return rest == Path() or any(glob.iglob(str(rest), root_dir=root, recursive=True))


def fixed_part(pattern: Path) -> Path:
    """The longest prefix of a glob that exists literally: brackets may be part of a folder's name."""
    return next((path for path in (pattern, *pattern.parents) if os.path.exists(path)), Path())


@dataclass
class DatasetConfig:
    format: Literal["gta5", "synthia", "cityscapes", "folder"] = opt("gta5", "layout and label ids on disk")
    root: str = opt("", "folder of the dataset", path=os.path.isdir)
    split: str = opt("all", "cityscapes: train | val | test; gta5: all, or those of split.mat; else all")
    size: list[int] = opt([], "[width, height] that images and labels are brought to; [] keeps their own", least=1)
    images: list[str] = opt([], "folder: globs below root, e.g. ['images/*.jpg']")
    labels: str = opt("", "folder: label of an image, from {dir} {parent} {stem}, e.g. 'labels/{stem}.png'; '' = none")
    strip: str = opt("", "folder: ending cut from an image's stem before {stem} is filled in")
    id_map: dict = opt({}, "folder: {label id: class name or 'ignore'}; ids not named are ignored; {} = train ids")

    def validate(self, key: str) -> None:
        """As `Config.validate`; `key` is the section's own, e.g. data.source."""
        if self.format == "folder":
            require(self.images, f"{key}.images is empty, but format=folder needs globs")
        else:
            for name in ("images", "labels", "strip", "id_map"):
                unread = f"{key}.{name} is set, but format={self.format} has its own; use folder"
                require(not getattr(self, name), unread)
        require(len(self.size) in (0, 2), f"{key}.size={self.size}: [width, height]")
        splits = {"cityscapes": ("train", "val", "test"), "gta5": ("all", "train", "val", "test")}
        known = splits.get(self.format, ("all",))
        require(
            self.split in known, f"{key}.split={self.split!r} is not one of those of {self.format}: {', '.join(known)}"
        )
        require(not Path(self.labels).is_absolute(), f"{key}.labels={self.labels!r} must be relative to root")


@dataclass
class DataConfig:
    class_set: Literal["cityscapes19", "cityscapes16", "custom", "auto"] = opt(
        "cityscapes19", "which classes are learnt; auto (test.py alone) = as many as the checkpoint has"
    )
    class_names: list[str] = opt([], "custom: class names in train-id order")
    palette: list[list[int]] = opt([], "custom: one [r, g, b] per class; [] = around the hue circle", most=255)
    source: DatasetConfig = opt(DatasetConfig, "labelled domain", stages=TRAIN_OR_TEST)
    target: DatasetConfig = opt(
        DatasetConfig, "domain adapted to; labelled_bound and test.dataset=target alone read its labels"
    )
    val: DatasetConfig = opt(DatasetConfig, "the target's labelled split, to measure by", stages=TRAIN_OR_TEST)
    base_width: int = opt(
        2200, "width in px that scale 1 stands for (as released); 0 = the image's own width", stages=TRAINING_STAGES
    )
    scale: list[float] = opt(
        [0.5, 1.5], "range of the random resize, aspect kept (as released)", least=TINY, stages=TRAINING_STAGES
    )
    crop: list[int] = opt([896, 512], "[width, height] of crops (as released)", least=32, stages=TRAINING_STAGES)
    hflip: float = opt(0.5, "probability of mirroring (as released)", most=1, stages=TRAINING_STAGES)
    jitter: bool = opt(True, "colour jitter in the strong view; without it, strong = weak", stages=JITTERED)
    jitter_hue: float = opt(0.2, "strong view: hue shift, uniform in +-this (as released)", most=0.5, stages=JITTERED)
    jitter_factor: list[float] = opt(
        [0.5, 1.5], "strong view: range of brightness, contrast and saturation (as released)", stages=JITTERED
    )
    randaugment: list[int] = opt(
        [2, 10], "strong view: number and magnitude of operations (ProDA)", most=10, stages=("distill",)
    )
    cutout: float = opt(
        0.333, "strong view: side of the hole over the crop's short side; 0 = none (ProDA)", most=1, stages=("distill",)
    )
    strong_geometry: bool = opt(
        True, "strong view: also mirror, rotation, shear and translation (ProDA)", stages=("distill",)
    )
    workers: int = opt(4, "loader processes per domain and training process; 0 = the training process loads")
    on_error: Literal["stop", "skip"] = opt(
        "stop",
        f"an image or label of source or target that cannot be used ends the run, or is skipped ({MAX_SKIPPED} files "
        "at most); validation files, and labels that are missing, end it",
        stages=STAGES,
    )
    toy_root: str = opt("", "folder that the toy cities are drawn into on first use; '' = real data")

    def validate(self) -> None:
        """As `Config.validate`."""
        if self.class_set == "custom":
            require(self.class_names, "data.class_set=custom needs data.class_names")
        else:
            for name in ("class_names", "palette"):
                unused = f"data.{name} is set, but data.class_set={self.class_set}; use custom"
                require(not getattr(self, name), unused)
        for name in ("source", "target", "val"):
            section = getattr(self, name)
            section.validate(f"data.{name}")
            named = section.format == "folder" or self.class_set != "custom" or not section.root
            require(named, f"data.class_set=custom needs data.{name}.format=folder, not {section.format}")
        for name in ("crop", "scale", "jitter_factor", "randaugment"):
            value = getattr(self, name)
            require(len(value) == 2, f"data.{name}={value} must hold two numbers")
            ordered = name in ("crop", "randaugment") or value[0] <= value[1]
            require(ordered, f"data.{name}={value} must be [low, high]")
        number, magnitude = self.randaugment
        require(not number or magnitude > 1, f"data.randaugment={self.randaugment}: magnitudes are 2 to 10")


@dataclass
class ModelConfig:
    """`auto`: what the weight file says of its network; where it says nothing, the default named here."""

    arch: Literal["auto", "deeplabv2", "deeplab_pbal"] = opt(
        "auto", "segmentation architecture; deeplabv2 by default; deeplab_pbal is that of PBAL's published checkpoints"
    )
    backbone: str = opt("auto", f"{' | '.join(RESNETS)} | timm/NAME; {DEFAULT_BACKBONE} by default")
    output_stride: Literal["auto", 8, 14, 16, 32] = opt(
        "auto",
        "input pixels per pixel of the backbone's output: 8 by default; deeplab_pbal 16 (as released); a timm network "
        "that cannot be dilated keeps its own; ResNets have 8 and 16",
    )
    dilations: Literal["auto"] | list[int] = opt(
        "auto",
        "dilations of the head's parallel 3x3 convolutions; as released by default: [6, 12, 18, 24] at stride 8 and "
        "in proportion at others, deeplab_pbal [6, 12, 18] at 16",
        least=1,
    )
    bn_clr: Literal["auto", True, False] = opt(
        "auto", "deeplabv2: one more BatchNorm after the backbone (ProDA, with SimCLR weights); false by default"
    )
    normalization: Literal["auto", "imagenet", "half", "none"] = opt(
        "auto", "input mean and std; by default what the backbone's ImageNet weights expect; none = [0, 1] as it is"
    )
    dropout: float = opt(
        0.1,
        "dropped share of feature channels; deeplab_pbal: of values (as released)",
        most=0.99,
        stages=TRAINING_STAGES,
    )
    init: str = opt(
        "imagenet",
        "start from: scratch | imagenet | simclr | a run's name (e.g. bpl) | a file",
        stages=("warmup", "bpl", "pst"),
        path=os.path.isfile,
    )
    published: list[str] = opt(
        [], "files of pretrain_model/ to try where the stage named by init or checkpoint was not trained"
    )
    init_discriminator: Literal["checkpoint", "new"] = opt(
        "new", "discriminator: a new one, or that of the file that init names, where it fits", stages=ADVERSARIAL
    )

    def validate(self) -> None:
        """As `Config.validate`."""
        name, stride = self.backbone_name, self.output_stride
        if not name.startswith("timm/"):
            if name not in RESNETS:
                near = nearest(name, RESNETS)
                raise ConfigError(f"model.backbone={name!r} is unknown; nearest is {near!r}, or timm/NAME")
            fits = stride in ("auto", 8, 16)
            require(fits, f"model.output_stride={stride}, but model.backbone={name} has 8 and 16")
        variant = self.bn_clr is not True or self.arch != "deeplab_pbal"
        require(variant, f"model.bn_clr is a variant of deeplabv2, not of model.arch={self.arch}")

    @property
    def backbone_name(self) -> str:
        """`backbone`, with the default in place of auto."""
        return DEFAULT_BACKBONE if self.backbone == "auto" else self.backbone


@dataclass
class LossConfig:
    adversarial: float = opt(0.01, "weight of output-space alignment (as released); 0 = none", stages=ADVERSARIAL)
    gan: Literal["bce", "ls"] = opt(
        "bce", "adversary: binary cross-entropy (as released) | least squares (ProDA)", stages=ADVERSARIAL
    )
    bidirectional: float = opt(0.1, "weight of each prototype term (as released); 0 = warm-up", stages=("bpl",))
    directions: Literal["both", "s2t", "t2s"] = opt(
        "both", "s2t: each pixel weighs the classes by its softmax; t2s: each class weighs the pixels", stages=("bpl",)
    )
    pseudo_ce: float = opt(1.0, "weight of cross-entropy on pseudo labels (as released)", stages=("pst", "distill"))
    contrast: float = opt(1.0, "weight of prototypical contrast, each domain (as released)", stages=("pst",))
    temperature: float = opt(0.07, "tau of prototypical contrast (as released)", least=TINY, stages=("pst",))
    prototype_gradient: bool = opt(
        False, "the contrast's gradient reaches the prototypes: true as released, false in the paper", stages=("pst",)
    )
    projection: Literal["none", "linear", "mlp"] = opt(
        "none", "projection G of features and prototypes before the contrast: none as released", stages=("pst",)
    )
    distill: float = opt(1.0, "weight of the distillation term (ProDA)", stages=("distill",))
    distill_form: Literal["kl", "released"] = opt(
        "kl",
        "kl = KL(teacher || student) | released = ProDA's code: kl_div of probabilities, mean over classes too",
        stages=("distill",),
    )


@dataclass
class TrainConfig:
    iterations: int = opt(60_000, "steps to run (as released)", least=1)
    horizon: int = opt(90_000, "steps after which the poly schedule would reach zero (as released)", least=1)
    lr: float = opt(1e-4, "learning rate of the backbone (as released)", least=TINY)
    head_lr_factor: float = opt(10.0, "head: this many times the backbone's learning rate (as released)", least=TINY)
    optimizer: Literal["sgd", "adamw"] = opt(
        "sgd", "of the network: SGD with momentum (as released) | AdamW, which transformers need"
    )
    warmup_steps: int = opt(0, "steps over which the learning rates rise to the poly schedule; 0 as released")
    weight_decay: float = opt(2e-4, "weight decay (as released); AdamW usually takes 0.01, and spares norms and biases")
    lr_discriminator: float = opt(
        1e-4, "Adam's on the discriminator, same schedule (as released)", least=TINY, stages=ADVERSARIAL
    )
    batch_source: int = opt(4, "source crops a step, of all processes together (as released)", least=1)
    batch_target: int = opt(
        4,
        "target crops a step, of all processes together (as released); with batchnorm.statistics=target, also whole "
        "target images in one forward pass",
        least=1,
        stages=STAGES,
    )
    precision: Literal["auto", "float32", "tf32", "bfloat16", "float16"] = opt(
        "auto",
        "of the forward passes. auto = bfloat16 on GPUs and CPUs that compute in it, float16 with loss scaling on "
        "other GPUs, float32 on other CPUs; tf32 = float32 with TF32 products on GPUs",
        stages=STAGES,
    )
    accumulate: int = opt(
        1, "parts of each batch, to save memory; BatchNorm and BPL's softmax over pixels see one at a time", least=1
    )
    checkpointing: bool = opt(
        False, "compute the backbone's activations again in the backward pass: much less memory, a third more time"
    )
    compile: Literal["auto", True, False] = opt(
        "auto",
        "torch.compile of networks and strong view; on a GPU, networks become CUDA graphs, which do not wait for "
        "Python: minutes in the first step, then a quarter to two fifths less time. auto = where that was measured to "
        f"pay: deeplabv2 on a ResNet, in bfloat16, on one GPU, for {COMPILED_STEPS:,} steps or more, without "
        "accumulate, checkpointing, deterministic and online labels",
    )
    val_every: int = opt(1000, "steps between validations (as released)", least=1)
    save_every: int = opt(1000, "steps between writes of checkpoints/last.pth", least=1)
    log_every: int = opt(20, "steps between log lines", least=1)
    panels: int = opt(4, "validation images drawn into panels/ at each validation")
    on_nonfinite: Literal["stop", "skip"] = opt(
        "stop",
        f"a loss or gradient that is not finite ends the run, or its step is skipped ({MAX_SKIPPED} at most); "
        "no weight is touched",
    )
    deterministic: bool = opt(False, "bit-equal runs on one machine, by slower kernels where needed", stages=STAGES)
    restart: bool = opt(
        False,
        "begin anew although the run folder holds a run; otherwise a training is resumed, finished pseudo labels stay",
        stages=(*TRAINING_STAGES, "pseudo_labels"),
    )


@dataclass
class BatchNormConfig:
    statistics: Literal["running", "target", "saved"] = opt(
        "running",
        "running = as released; target = recomputed on unlabelled target training images before each use; saved = what "
        "the checkpoint holds (not in training)",
    )
    images: int = opt(256, "target images that statistics are recomputed on; 0 = all")


@dataclass
class PseudoConfig:
    threshold: float = opt(0.95, "pixels less confident than this become ignore (ProDA, CAG)", most=1)
    selection: Literal["constant", "class_balanced"] = opt(
        "constant", "class_balanced: per class min(threshold, the confidence that keeps `keep` of its pixels)"
    )
    keep: float = opt(0.66, "class_balanced: least share of each class's pixels that is kept", most=1)
    labels: Literal["offline", "online"] = opt(
        "offline",
        "offline = gen_pseudo_labels.py's | online = a teacher's at every step, the moving average of the model (DACS)",
        stages=("pst",),
    )
    ema: float = opt(0.99, "online: share of the teacher that each step keeps", most=0.9999, stages=("pst",))
    confidence: float = opt(
        0.968, "online: a target pixel's weight is the share of its image above this (DACS)", most=1, stages=("pst",)
    )
    mix: float = opt(
        1.0,
        "online: source classes are pasted onto target images up to this share of train.horizon (DACS: always)",
        most=1,
        stages=("pst",),
    )


@dataclass
class DistillConfig:
    resolution: Literal["full", "quarter"] = opt(
        "quarter",
        "of the target's losses: full = cross-entropy at label size, KL at feature size | quarter = both at a quarter "
        "of the crop (ProDA)",
    )
    rounds: list[int] = opt([1, 2], "rounds to run; round 2 learns from round 1's result (ProDA)", least=1, most=2)
    init_round1: str = opt(
        "simclr", "round 1's start: simclr (ProDA) | imagenet | scratch | teacher | a run | a file", path=os.path.isfile
    )


@dataclass
class TestConfig:
    dataset: Literal["val", "source", "target"] = opt("val", "labelled dataset that is scored", stages=("test",))
    images: str = opt(
        "",
        "predict these without labels: an image, folder or glob, e.g. 'photos/**/*.jpg'",
        stages=("test",),
        path=matches,
    )
    export: bool = opt(False, "write every prediction into predictions/; always with test.images", stages=("test",))
    flip: bool = opt(False, "average with the prediction of the mirrored image", stages=TRAIN_OR_TEST)
    scales: list[float] = opt(
        [1.0], "average over the image resized by these; [0.5] predicts at half size", least=TINY, stages=TRAIN_OR_TEST
    )
    window: list[int] = opt(
        [], "sliding window [width, height]; [] = the whole image (usual)", least=32, stages=TRAIN_OR_TEST
    )
    overlap: float = opt(0.5, "least share of a window that neighbours overlap by", most=0.9, stages=TRAIN_OR_TEST)
    batch: int = opt(1, "images predicted at once, in validation and pseudo labels too", least=1)
    panels: int = opt(8, "images drawn into panels/, and as many of the worst", stages=("test",))


@dataclass
class Config:
    benchmark: str = opt("gta5_to_cityscapes", "the pair of domains: a name in configs/benchmarks/ or a YAML file")
    stage: Literal[STAGES] = opt("bpl", "set by the stage file", stages=())
    name: str = opt("", "run folder below runs/<benchmark>/; '' = the stage's name")
    runs: str = opt("runs", "folder of all runs, relative to the working folder; a YAML's must lie inside it")
    checkpoint: str = opt(
        "",
        "the network to use, or the teacher of distillation's round 1: a run's name or a file",
        stages=("pseudo_labels", "distill", "test"),
        path=os.path.isfile,
    )
    which: Literal["last", "best"] = opt(
        "last", "which checkpoint of a run; best was chosen by the validation labels that it is scored on"
    )
    pseudo_labels: str = opt("pseudo_labels", "run that holds the pseudo labels", stages=("pst",))
    seed: int = opt(0, "of weights, data order and augmentation", most=2**31, stages=TRAINING_STAGES)
    device: str = opt("auto", "cpu | cuda:N | auto: a GPU if there is one; under torchrun, one for each process")
    data: DataConfig = opt(DataConfig, "")
    model: ModelConfig = opt(ModelConfig, "")
    loss: LossConfig = opt(LossConfig, "")
    train: TrainConfig = opt(TrainConfig, "", stages=TRAINING_STAGES)
    batchnorm: BatchNormConfig = opt(BatchNormConfig, "")
    pseudo: PseudoConfig = opt(PseudoConfig, "", stages=("pseudo_labels", "distill"))
    distill: DistillConfig = opt(DistillConfig, "", stages=("distill",))
    test: TestConfig = opt(TestConfig, "")

    def validate(self) -> None:
        """Raise ConfigError, naming the key, for values that cannot work together."""
        self.data.validate()
        self.model.validate()
        t, rounds = self.train, self.distill.rounds
        beyond = f"train.iterations={t.iterations} is beyond train.horizon={t.horizon}"
        require(t.iterations <= t.horizon, f"{beyond}, where the learning rate reaches zero")
        require(rounds and rounds == sorted(set(rounds)), f"distill.rounds={rounds} must be [1], [2] or [1, 2]")
        require(len(self.test.window) in (0, 2), f"test.window={self.test.window}: [width, height]")
        require(self.test.scales, "test.scales=[] must hold a number; [1] is the image as it is")
        trains = self.stage in TRAINING_STAGES
        require(
            not trains or self.batchnorm.statistics != "saved",
            "batchnorm.statistics=saved is for test.py and gen_pseudo_labels.py; training takes running or target",
        )
        require(
            self.stage != "warmup" or self.loss.bidirectional == 0,
            f"loss.bidirectional={self.loss.bidirectional} in the warm-up: that is BPL, use configs/stage1_BPL.yml",
        )
        for key in ("name", "pseudo_labels"):
            value = getattr(self, key)
            below = not value or (Path(value).parts and not leaves_folder(value))
            require(below, f"{key}={value!r} must be a folder below runs/<benchmark>")
            require(not value.endswith(WEIGHT_ENDINGS), f"{key}={value!r} would be taken for a file of weights")
        named = self.benchmark_name not in ("", ".", "..")
        require(named, f"benchmark={self.benchmark!r} names no folder below {self.runs}")
        key, start = "model.init", self.model.init
        if self.stage == "distill":
            key, start = "distill.init_round1", self.distill.init_round1
        backbone = self.model.backbone_name
        require(
            not (trains and start == "simclr") or backbone in SIMCLR_RESNETS,
            f"{key}=simclr, but there are no SimCLR weights of model.backbone={backbone}; nearest is imagenet",
        )
        named = self.data.class_set != "auto"
        require(named or self.stage == "test", "data.class_set=auto is for test.py alone: name the classes")

    @property
    def benchmark_name(self) -> str:
        """`benchmark` without folder and ending: the folder below `runs`."""
        return Path(self.benchmark).stem

    @property
    def words(self) -> str:
        """What leads another command to the runs of this benchmark."""
        others = {key: getattr(self, key) for key in ("runs", "seed")}
        words = [f"{key}={value}" for key, value in others.items() if value != getattr(Config, key)]
        return shlex.join([f"benchmark={self.benchmark}", *words])

    @property
    def run_dir(self) -> Path:
        """Where this run writes: `runs/<benchmark>/<name>`."""
        return self.sibling_run(self.name or self.stage)

    def sibling_run(self, name: str) -> Path:
        """Folder of another run of the same benchmark."""
        return Path(os.path.expanduser(self.runs)).absolute() / self.benchmark_name / name
