"""Speed and memory of this code on this machine, compared with the released implementation.

    python -m utils.benchmark                          step, data and eval
    python -m utils.benchmark step                     one training step of BPL
    python -m utils.benchmark step stage=pst           of another stage: warmup, pst or distill
    python -m utils.benchmark data                     one training sample, and the CPU cores that a step needs
    python -m utils.benchmark eval                     evaluation and pseudo labels of one image
    python -m utils.benchmark plan                     memory that the recipe needs, and settings that fit
    python -m utils.benchmark step benchmark=toy       with a benchmark's own network and sizes

The forms run in turn within one process. Memory is the most that tensors take up during a call. On a CPU, steps and
images are smaller, so that each section ends within minutes.
"""

from __future__ import annotations

import copy
import gc
import itertools
import os
import platform
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

import distill
import train_bpl
import train_pst
from data.datasets import SegmentationDataset, build_dataset
from data.images import decode_png
from data.loaders import training_batches
from data.pseudo_labels import confidence_levels, write_png
from data.taxonomy import CLASS_SETS, IGNORE, class_set
from data.transforms import RandomScaleCropFlip
from models import statistics_kept, upsample
from models.backbone import IMAGENET_MEAN, IMAGENET_STD, check_backbone
from models.build import default_stride
from models.prediction import normalized
from utils.config import ROOT, Config, ConfigError, UserError
from utils.config.keys import DataConfig, DatasetConfig, require
from utils.engine.command_line import run_words, split_words
from utils.engine.loop import Stage
from utils.engine.setup import (
    build_network,
    checked_config,
    choose_device,
    refuse_unusable_backbone,
    resolve_auto,
)
from utils.engine.step import GuardedStep
from utils.evaluation.metrics import ConfusionMatrix
from utils.evaluation.prediction import autocast, default_precision, predict_confidence, predict_labels

CPU, META = torch.device("cpu"), torch.device("meta")
CPU_CROP, CPU_BATCH = [256, 128], 2  # of a step on a CPU, in place of larger ones
GPU_STEPS = 5  # steps in a row on a GPU
GTA5_SIZE, GTA5_IDS = (1914, 1052), 35
CARDS = (12, 16, 24, 40, 80)  # GiB
# Memory that tensors do not show: CUDA context and workspaces of convolutions in GiB, gaps between tensors as a share.
OVERHEAD, GAPS, GIB = 0.8, 0.1, 2**30

# ------------------------------------------------------------------------------------------------------- timing


class Timing(NamedTuple):
    """Seconds of each call, and the bytes of tensors that one call had alive at once."""

    seconds: list[float]
    memory: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes, its work on the device included."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def peak_memory_of(call: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors that one call has alive at once, beyond those that were there before."""
    if device.type == "cuda":
        gc.collect()  # garbage that is freed during the call would lower the count
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with _Alive() as counter:
        call()
    return counter.peak


class _Alive(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside, and the most that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}  # by storage, as long as it is alive; 0 if it was there before
        self.alive = self.peak = 0

    def _free(self, key: int) -> None:
        self.alive -= self.sizes.pop(key)

    def _meet(self, values: object, made: bool) -> None:
        """Take in tensors that an operation made, or that it was given: of these, unknown ones were there before."""
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and (key := (storage := value.untyped_storage())._cdata) not in self.sizes:
                self.sizes[key] = storage.nbytes() if made else 0
                self.alive += self.sizes[key]
                weakref.finalize(storage, self._free, key)
        self.peak = max(self.peak, self.alive)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._meet((args, kwargs), made=False)
        result = function(*args, **(kwargs or {}))
        self._meet(result, made=True)
        return result


def compare(
    forms: dict[str, Callable[[], object]], device: torch.device, repeats: int, in_a_row: int = 1
) -> dict[str, Timing]:
    """Time the forms in turn (A B C, A B C, …), so that a machine that slows down slows all of them.

    Args:
        repeats: rounds that count, after one that does not.
        in_a_row: calls of a form in each round; their mean is one measurement. The first after another form finds the
            host's caches cold, which a training does not.
    """
    timings = {name: Timing([], peak_memory_of(call, device)) for name, call in forms.items()}  # the warm-up round
    for _ in range(repeats):
        for name, call in forms.items():
            seconds = seconds_of(lambda call=call: [call() for _ in range(in_a_row)], device)
            timings[name].seconds.append(seconds / in_a_row)
    return timings


def report(title: str, timings: dict[str, Timing], images: int, notes: dict[str, str] | None = None) -> None:
    """Print a row for each form; "faster" compares with the first one."""
    first, width = timings[next(iter(timings))].median, max(len(title), *map(len, timings))
    print(f"{title:{width}} {'median':>10} {'min':>10} {'max':>10} {'faster':>7} {'images/s':>9} {'memory':>10}")
    for name, t in timings.items():
        times = "".join(f"{1000 * s:8.1f} ms" for s in (t.median, min(t.seconds), max(t.seconds)))
        row = f"{name:{width}}{times} {first / t.median:6.2f}x {images / t.median:9.2f} {t.memory / 2**20:6.0f} MiB"
        print(f"{row}  {(notes or {}).get(name, '')}".rstrip())
    print(flush=True)


# --------------------------------------------------------------------------------------------------------- step


def fitting(cfg: Config, device: torch.device) -> Config:
    """A resolved copy with crops and batches that the device gets through."""
    cfg = copy.deepcopy(cfg)
    if device.type == "cpu" and np.prod(cfg.data.crop) > 4 * np.prod(CPU_CROP):
        t = cfg.train
        cfg.data.crop, t.batch_source, t.batch_target, t.accumulate = CPU_CROP, CPU_BATCH, CPU_BATCH, 1
    return resolve_auto(cfg)


class Distillation(distill.Distillation):
    """With a copy of the student in place of a trained teacher."""

    def __init__(self, cfg: Config, device: torch.device):
        Stage.__init__(self, cfg, device)
        self.teacher = copy.deepcopy(self.model).eval().requires_grad_(False)


STAGES = {  # stage -> its config, its class by the configuration
    "warmup": ("stage0_warmup.yml", lambda cfg: train_bpl.BPL),
    "bpl": ("stage1_BPL.yml", lambda cfg: train_bpl.BPL),
    "pst": ("stage2_PST.yml", train_pst.stage_class),
    "distill": ("stage3_distill.yml", lambda cfg: Distillation),
}


def batches(cfg: Config, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random source and target batches of the recipe's size; target labels only where the stage learns from them."""
    (width, height), t, generator = cfg.data.crop, cfg.train, torch.Generator().manual_seed(0)

    def draw(*shape: int, high: int = 256) -> Tensor:
        return torch.randint(high, (*shape, height, width), generator=generator, dtype=torch.uint8).to(device)

    def batch(size: int, labelled: bool) -> dict[str, Tensor]:
        labels = {"label": draw(size, high=len(class_set(cfg.data)))} if labelled else {}
        return {"image": draw(size, 3)} | labels

    return batch(t.batch_source, True), batch(t.batch_target, STAGES[cfg.stage][1](cfg).uses_pseudo_labels)


def step_of(cfg: Config, device: torch.device, form: str) -> Callable[[], object]:
    """A call that makes one step of the stage that `cfg` configures.

    Args:
        form: "eager"; "compiled"; "released": float32, contiguous, one backward pass of the sum of all losses.
    """
    cfg = copy.deepcopy(cfg)
    cfg.train.compile = form == "compiled"
    stage, (source, target) = STAGES[cfg.stage][1](cfg)(cfg, device), batches(cfg, device)
    if cfg.train.compile:
        stage.compile()
    if form != "released":
        step = GuardedStep(cfg, stage.networks, stage.optimizers, device, Path(tempfile.gettempdir(), "not_finite.pth"))
        return lambda: step(stage.step, source, target, 1)
    for network in stage.networks.values():
        network.to(memory_format=torch.contiguous_format).train()

    def released() -> None:
        losses = []
        stage.step(source, target, lambda total, **terms: losses.append(total))
        for optimizer in stage.optimizers.values():
            optimizer.zero_grad()
        sum(losses).backward()
        for optimizer in stage.optimizers.values():
            optimizer.step()

    return released


def kernel_note(call: Callable[[], object], median: float, tflop: float) -> str:
    """Time of a GPU's kernels beside the wall time of a step, and whether launching them is what takes the time."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    spans = [e.time_range.elapsed_us() for e in profiler.events() if e.device_type == DeviceType.CUDA]
    busy = sum(spans) / 1e6  # seconds
    limit = "launch-bound" if busy < 0.9 * median else "bound by the GPU"
    kernels = f"{len(spans)} kernels take {1000 * busy:.1f} ms, {busy / median:.0%} of the step: {limit}"
    return f"{kernels}; {tflop / median:.0f} TFLOP/s"


def run_step(cfg: Config, device: torch.device, repeats: int = 3) -> None:
    """Print the time of a stage's step, without forms that the device cannot hold or compile."""
    cfg, forms, notes = fitting(cfg, device), {}, {}
    kinds = {"as released, float32": "released", f"here, {cfg.train.precision}": "eager"}
    kinds |= {f"here, {cfg.train.precision}, compiled": "compiled"} if device.type == "cuda" else {}
    for name, kind in kinds.items():
        try:
            call = step_of(cfg, device, kind)
            call()  # optimisers have their state, and networks are compiled, from now on
            forms[name] = call
        except (UserError, torch.OutOfMemoryError) as error:
            print(f"{name} is left out: {str(error).splitlines()[0]}")
    if not forms:
        return
    timings = compare(forms, device, repeats, in_a_row=GPU_STEPS if device.type == "cuda" else 1)
    if device.type == "cuda":
        with FlopCounterMode(display=False) as counter:
            next(iter(forms.values()))()
        notes = {n: kernel_note(forms[n], t.median, counter.get_total_flops() / 1e12) for n, t in timings.items()}
    t, (width, height) = cfg.train, cfg.data.crop
    title = f"step of {cfg.stage}: {cfg.model.backbone}, {width}x{height}, {t.batch_source}+{t.batch_target}"
    report(title, timings, t.batch_source + t.batch_target, notes)


# --------------------------------------------------------------------------------------------------------- data


def write_pair(root: Path) -> None:
    """A GTA5 folder of one image and its label map, as large as the real ones in pixels and, about, on disk."""
    rng, (width, height) = np.random.default_rng(0), GTA5_SIZE
    pixels = rng.normal(110, 4, (height, width, 3))  # a sensor's noise, under detail of every size
    for grain in (4, 8, 16, 64, 256):
        coarse = rng.integers(0, 256, (height // grain + 2, width // grain + 2, 3)).astype(np.uint8)
        pixels += (np.asarray(Image.fromarray(coarse).resize(GTA5_SIZE, Image.Resampling.BICUBIC)) - 128.0) / 4
    ids = rng.integers(0, GTA5_IDS, (height // 32, width // 32)).astype(np.uint8)
    for name, array in (("images", pixels.clip(0, 255).astype(np.uint8)), ("labels", ids)):
        (root / name).mkdir()
        Image.fromarray(array).resize(GTA5_SIZE, Image.Resampling.NEAREST).save(root / name / "00001.png")


def released_sample(dataset: SegmentationDataset, cfg: DataConfig, rng: np.random.Generator) -> tuple[Tensor, ...]:
    """Two views float32 (3, H, W) and label int64 (H, W) as releases make them: the whole image is resized, then
    cropped; label ids are mapped one after another; colours are changed in the loader."""
    sample, jitter = dataset.samples[0], (tuple(cfg.jitter_factor),) * 3
    image, label = Image.open(sample.image).convert("RGB"), Image.open(sample.label)
    width = round(rng.uniform(*cfg.scale) * (cfg.base_width or image.width))
    size = (width, round(width * image.height / image.width))
    image, label = image.resize(size, Image.Resampling.BICUBIC), label.resize(size, Image.Resampling.NEAREST)
    left, top = (int(rng.integers(max(0, s - c) + 1)) for s, c in zip(size, cfg.crop))
    image, label = (p.crop((left, top, left + cfg.crop[0], top + cfg.crop[1])) for p in (image, label))
    if rng.random() < cfg.hflip:
        image, label = (p.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for p in (image, label))
    ids = np.asarray(label)
    train_ids = np.full(ids.shape, IGNORE, np.float32)
    for i in range(GTA5_IDS):
        train_ids[ids == i] = dataset.lookup_table[i]
    views = (
        F.to_dtype(F.pil_to_tensor(p), scale=True) for p in (image, v2.ColorJitter(*jitter, cfg.jitter_hue)(image))
    )
    weak, strong = (F.normalize(view, IMAGENET_MEAN, IMAGENET_STD) for view in views)
    return weak, strong, torch.from_numpy(train_ids).long()


def run_data(cfg: Config, device: torch.device, repeats: int = 31) -> None:
    """Print the time of a training sample, of batches from worker processes, and the cores that feed a step."""
    with tempfile.TemporaryDirectory() as folder:
        write_pair(Path(folder))
        section = DatasetConfig(format="gta5", root=folder, size=[*GTA5_SIZE])
        dataset = build_dataset(section, CLASS_SETS["cityscapes19"], transform=RandomScaleCropFlip(cfg.data))
        threads, draws = torch.get_num_threads(), [itertools.count(), itertools.count()]  # both take the same crops
        torch.set_num_threads(1)  # as in a worker
        forms = {
            "as released": lambda: released_sample(dataset, cfg.data, np.random.default_rng([0, next(draws[0]), 1])),
            "here, a worker's part": lambda: dataset[0, next(draws[1])],
        }
        samples = compare(forms, CPU, repeats)
        torch.set_num_threads(threads)
        report("sample, one process", samples, 1)

        loaders, size = {}, cfg.train.batch_source
        for workers in (0, 1, 2):
            stream = training_batches(dataset, size, workers)
            for _ in range(2 * workers + 1):
                next(stream)  # batches that were read ahead
            loaders[f"{workers} workers"] = Timing([seconds_of(lambda s=stream: [next(s) for _ in range(8)], CPU)], 0)
            del stream  # its workers would go on reading
        report(f"8 batches of {size}", loaders, 8 * size)

    t, cost, step = cfg.train, samples["here, a worker's part"].median, 0.094  # BPL's recipe on an H200, compiled
    if device.type == "cuda":
        fitted = fitting(cfg, device)
        form = "compiled" if fitted.train.compile else "eager"
        step = compare({form: step_of(fitted, device, form)}, device, 3, GPU_STEPS)[form].median
    rate = (t.batch_source + t.batch_target) / step
    cores = f"{rate * cost:.1f} CPU cores at {1000 * cost:.0f} ms a sample (this machine has {os.cpu_count()})"
    whose = "a step" if device.type == "cuda" else "a GPU's assumed step"
    print(f"{whose} of {1000 * step:.0f} ms takes {rate:.0f} samples a second: {cores}")
    if not decode_png:
        print("Pillow decodes PNG here; pip install -r data/requirements-kornia.txt makes that four times as fast")
    print(flush=True)


# --------------------------------------------------------------------------------------------------------- eval


def run_eval(cfg: Config, device: torch.device, repeats: int = 3) -> None:
    """Print the time of evaluation and of pseudo labels of one image, with the recipe's network."""
    cfg = resolve_auto(cfg)
    classes, size = len(class_set(cfg.data)), (1024, 2048) if device.type == "cuda" else (256, 512)
    model, options = build_network(cfg, device).eval(), {"precision": cfg.train.precision}
    image = torch.randint(256, (1, 3, *size), dtype=torch.uint8).to(device)
    label = torch.randint(classes, (1, *size), dtype=torch.uint8).to(device)
    confusion, files = ConfusionMatrix(classes, device), ("label.png", "confidence.png")

    def network(x: Tensor) -> Tensor:
        with torch.no_grad(), autocast(device, cfg.train.precision):
            return model(normalized(x, model))["logits"].float()

    def plain(*views: tuple[Tensor, bool]) -> list[np.ndarray]:
        maps = [upsample(network(x), size).softmax(1) for x, _ in views]
        mean = sum(m.flip(-1) if mirrored else m for m, (_, mirrored) in zip(maps, views)) / len(views)
        return [x.cpu().numpy()[0] for x in reversed(mean.max(1))]

    def plain_evaluation() -> None:
        ids = label[0].cpu().numpy().astype(np.int64) * classes + plain((image, False))[0]
        np.bincount(ids.ravel(), minlength=classes**2)

    def plain_labels(folder: str) -> None:
        predicted, confidence = plain((image, False), (image.flip(-1), True))
        for file, array in zip(files, (predicted, np.round(255 * confidence))):
            Image.fromarray(array.astype(np.uint8)).save(Path(folder, file))

    def labels(folder: str) -> None:
        found, confidence = predict_confidence(model, image, flip=True, softmax_first=True, **options)
        for file, maps in zip(files, (found, confidence_levels(confidence, 0.95))):
            write_png(Path(folder, file), maps[0].cpu().numpy())

    title = f"{cfg.model.backbone}, {size[1]}x{size[0]}"
    forms = {"as released": plain_evaluation, "network alone": lambda: network(image)}
    forms |= {"here": lambda: confusion.update(predict_labels(model, image, **options), label)}
    report(f"evaluation: {title}", compare(forms, device, repeats), 1)
    with tempfile.TemporaryDirectory() as folder:
        forms = {"as released": lambda: plain_labels(folder), "here": lambda: labels(folder)}
        report(f"pseudo labels: {title}", compare(forms, device, repeats), 1)


# --------------------------------------------------------------------------------------------------------- plan


class Memory(NamedTuple):
    """Bytes of a step: those of networks, gradients and optimisers, and those that grow with the batch."""

    fixed: int
    batch: int


def memory_of_step(cfg: Config) -> Memory:
    """Memory of a BPL step with train.accumulate=1. Fake tensors have sizes but no content: no GPU is needed."""
    cfg = resolve_auto(cfg)
    with META:
        stage = train_bpl.BPL(cfg, META)
    stage.views = SimpleNamespace(weak=Tensor.float, strong=Tensor.float)  # colours cost little memory
    networks = stage.networks.values()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for network in networks:
            network.to_empty(device=CPU).train()
        weights = [p for n in networks for p in n.parameters()]
        for p in weights:
            p.grad = torch.empty_like(p)
        source, target = batches(cfg, CPU)

        def backward(total: Tensor, **terms: Tensor) -> None:
            with torch.autocast("cpu", enabled=False), statistics_kept(*networks):
                total.backward()

        with _Alive() as counter, autocast(CPU, cfg.train.precision):
            stage.step(source, target, backward)
        buffers = [b for network in networks for b in network.buffers()]
        adam_too = cfg.train.optimizer == "adamw"
        adam = [p for k, n in stage.networks.items() if k != "model" or adam_too for p in n.parameters()]
        # A weight has a gradient and one number that SGD or Adam keeps; Adam keeps a second one.
        fixed = 3 * _bytes(weights) + _bytes(buffers) + _bytes(adam)
        return Memory(fixed, counter.peak + _bytes([*source.values(), *target.values()]))


def _bytes(tensors: list[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


def run_plan(cfg: Config, device: torch.device) -> None:
    """Print the memory that settings need, and for each size of memory the settings that come closest to the recipe."""
    cfg, needs = copy.deepcopy(cfg), {}
    t, m, (width, height), half = cfg.train, cfg.model, cfg.data.crop, cfg.train.precision
    if half in ("auto", "float32", "tf32"):
        half = default_precision(device) if device.type == "cuda" else "bfloat16"
    m.arch = "deeplabv2" if m.arch == "auto" else m.arch
    own_stride = default_stride(m.arch, m.backbone) if m.output_stride == "auto" else m.output_stride
    strides = {own_stride} if check_backbone(m.backbone) else {8, 16, own_stride}  # without dilation, there is one
    least = 2 if m.arch == "deeplab_pbal" else 1  # images in a part, see `resolve_auto`
    sizes = (t.batch_source, t.batch_target)
    parts = [n for n in (1, 2, 4, 8) if all(size % n == 0 and size // n >= least for size in sizes)]
    t.accumulate = 1
    print(
        f"plan: BPL of {cfg.benchmark_name}, {width}x{height}, {sizes[0]}+{sizes[1]} images; GiB of tensors, and in all"
    )
    print("precision  stride  checkpointing  accumulate  tensors  in all")
    for t.precision, m.output_stride, t.checkpointing in itertools.product(
        (half, "float32"), sorted(strides), (False, True)
    ):
        memory, again = memory_of_step(cfg), "yes" if t.checkpointing else "no"
        for n in parts:
            peak = (memory.fixed + memory.batch / n) / GIB
            needs[t.precision, m.output_stride, t.checkpointing, n] = need = (1 + GAPS) * peak + OVERHEAD
            print(f"{t.precision:9} {m.output_stride:7} {again:>14} {n:11} {peak:8.1f} {need:7.1f}", flush=True)
    print(f"\nin all: with {GAPS:.0%} for gaps between tensors and {OVERHEAD:g} GiB for CUDA and its convolutions")
    # What changes the result least comes first: checkpointing, then smaller parts for BatchNorm, the stride last.
    order = sorted(needs, key=lambda key: (key[1] != own_stride, key[3], key[2], key[0] != half))
    here = device_memory(device)
    for name, size in {**{str(size): size for size in CARDS}, f"{device.type} {here:.1f}": here}.items():
        words = "none of these; take a smaller data.crop"
        if best := next((key for key in order if needs[key] <= size), None):
            words = f"train.precision={best[0]}" + " train.checkpointing=true" * best[2]
            words += f" train.accumulate={best[3]}" * (best[3] > 1)
            words += f" model.output_stride={best[1]}" * (best[1] != own_stride)
        print(f"{name:>9} GiB: {words}")
    print(flush=True)


def device_memory(device: torch.device) -> float:
    """Memory of the device, in GiB."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] / GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


SECTIONS = {"step": run_step, "data": run_data, "eval": run_eval, "plan": run_plan}


def main(words: list[str]) -> None:
    """Run the sections that the command line names."""
    own, words = split_words(words, ("stage",))
    chosen = [w for w in words if "=" not in w] or [name for name in SECTIONS if name != "plan"]
    if unknown := [name for name in chosen if name not in SECTIONS]:
        raise ConfigError(f"unknown section {unknown[0]!r}; known are {', '.join(SECTIONS)}")
    stage = own.get("stage", "bpl")
    require(stage in STAGES, f"stage={stage!r} is not one of {', '.join(STAGES)}")
    require(stage == "bpl" or chosen == ["step"], "stage= goes with `step` alone")
    cfg = checked_config(ROOT / "configs" / STAGES[stage][0], [w for w in words if "=" in w])
    refuse_unusable_backbone(cfg)
    device = choose_device(cfg)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, {device} ({name}), {os.cpu_count()} CPU cores\n")
    for section in chosen:
        SECTIONS[section](cfg, device)


if __name__ == "__main__":
    run_words(main, __doc__, "section or key=value")
