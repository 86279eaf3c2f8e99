"""Single steps: batches in parts, loss scaling, precision."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import distill
import train_bpl
import train_pst
from data.taxonomy import IGNORE
from data.transforms import Views
from utils.config import ConfigError, UserError
from utils.engine import loop, setup
from utils.engine.setup import build_network, choose_device, resolve_auto
from utils.engine.step import GuardedStep
from utils.evaluation import prediction
from utils.evaluation.prediction import autocast, default_precision

CPU = torch.device("cpu")
# torch 2.11's compiler calls what torch advises against.
COMPILES = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")


class PlainViews:
    """No randomness: what is drawn would depend on the parts."""

    def weak(self, images):
        return images / 255

    strong = weak

    def distill(self, images, labels):
        labels = labels.clone()
        labels[:, :, :16] = IGNORE  # the same share of every part
        return self.weak(images), labels


def batch(seed):
    """Four crops, of which each has another share of labelled pixels, the last none."""
    torch.manual_seed(seed)
    labels = torch.randint(0, 19, (4, 32, 64), dtype=torch.uint8)
    for i in range(4):
        labels[i, : 32 * i // 3] = IGNORE
    return {"image": torch.randint(0, 256, (4, 3, 32, 64), dtype=torch.uint8), "label": labels}


STAGES = {
    "source": ("stage0_warmup.yml", train_bpl.BPL, ("loss.adversarial=0",)),
    "warmup": ("stage0_warmup.yml", train_bpl.BPL, ("loss.adversarial=0.3",)),
    "pst": ("stage2_PST.yml", train_pst.PST, ("loss.prototype_gradient=true",)),
    # At a quarter, a part counts the labelled pixels of its own quarter.
    "distill": ("stage3_distill.yml", distill.Distillation, ("distill.resolution=full",)),
}


@pytest.mark.parametrize(("name", "parts"), [("source", 4), ("warmup", 2), ("pst", 2), ("distill", 2)])
def test_a_batch_in_parts_is_the_batch(configure, tmp_path, monkeypatch, name, parts):
    """Frozen normalisation, no dropout: the same update, losses and norms."""
    file, stage_type, given = STAGES[name]
    monkeypatch.setattr(
        distill, "load_network", lambda cfg, path, device: (build_network(resolve_auto(cfg), device).eval(), "")
    )
    monkeypatch.setattr(distill.checkpoint, "find_checkpoint", lambda *_: None)
    results = []
    for accumulate in (1, parts):
        numbers = ("train.batch_source=4", "train.batch_target=4", "model.dropout=0", f"train.accumulate={accumulate}")
        cfg = resolve_auto(configure("gta5_to_city", file, tmp_path, *numbers, *given))
        stage = stage_type(cfg, CPU)
        stage.views = PlainViews()
        torch.manual_seed(0)
        # At the released scale of weights, source and target look alike, and the discriminator's gradients cancel.
        for network in (stage.model.classifier, stage.networks.get("discriminator", nn.Identity())):
            for module in network.modules():
                if isinstance(module, nn.Conv2d):
                    module.reset_parameters()
        for module in stage.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                monkeypatch.setattr(module, "training", False)
                monkeypatch.setattr(module, "train", lambda mode=True: None)
        step = GuardedStep(cfg, stage.networks, stage.optimizers, CPU, tmp_path / "x.pth")
        assert step(stage.step, batch(1), batch(2), 1) == ""
        gradients = [p.grad for n in stage.networks.values() for p in n.parameters() if p.grad is not None]
        results.append((step.take_means(), gradients))
    (means, gradients), (means_in_parts, gradients_in_parts) = results
    for kind in ("loss", "grad_norm"):
        assert means_in_parts[kind] == pytest.approx(means[kind], rel=1e-5)
    for a, b in zip(gradients, gradients_in_parts):
        assert (a - b).norm() <= 1e-5 * max(a.norm(), means["grad_norm"]["model"] / 100)


def test_a_step_with_checkpointing_is_the_step(configure, tmp_path):
    results = []
    for checkpointing in (False, True):
        given = ("train.batch_source=4", "train.batch_target=4", f"train.checkpointing={checkpointing}")
        cfg = resolve_auto(configure("gta5_to_city", "stage1_BPL.yml", tmp_path, *given))
        stage = train_bpl.BPL(cfg, CPU)
        torch.manual_seed(0)
        GuardedStep(cfg, stage.networks, stage.optimizers, CPU, tmp_path / "x.pth")(stage.step, batch(1), batch(2), 1)
        results.append([p.clone() for n in stage.networks.values() for p in n.state_dict().values()])
        assert stage.model.backbone.checkpointing == checkpointing
    assert all(map(torch.equal, *results))  # weights after the update and running statistics


def test_parts_must_be_equal(configure, tmp_path):
    for key in ("batch_source", "batch_target"):
        given = ("train.batch_source=4", "train.batch_target=4", f"train.{key}=6", "train.accumulate=4")
        with pytest.raises(ConfigError, match=rf"^train\.{key}=6 must be a multiple of 4 "):
            configure("gta5_to_city", "stage1_BPL.yml", tmp_path, *given)
    given = ("train.batch_source=4", "train.batch_target=4", "train.accumulate=4", "model.arch=deeplab_pbal")
    with pytest.raises(UserError, match=r"with train\.accumulate.* 2 or more in each"):
        resolve_auto(configure("gta5_to_city", "stage1_BPL.yml", tmp_path, *given))


@pytest.fixture
def scaled(configure, tmp_path):
    """A step in float16 of one weight, whose gradient is what is asked for; call for the step and the weight."""

    def make(*given):
        cfg = resolve_auto(configure("gta5_to_city", "stage1_BPL.yml", tmp_path, "train.precision=float16", *given))
        network = nn.Linear(1, 1, bias=False)
        nn.init.ones_(network.weight)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
        return GuardedStep(cfg, {"model": network}, {"model": optimizer}, CPU, tmp_path / "bad.pth"), network.weight

    return make


def losses_of(weight, gradient, loss=1.0):
    """A stage's step whose gradient and loss are these."""

    def losses(source, target, backward):
        total = (weight * gradient).sum()
        backward(total, term=torch.tensor(loss))

    return losses


def test_scaled_gradients_are_unscaled_before_anything_sees_them(scaled):
    step, weight = scaled()
    assert step(losses_of(weight, 0.25), {}, {}, 1) == ""
    assert weight.item() == 1 - 0.5 * 0.25
    assert step.take_means() == {"loss": {"term": 1.0}, "grad_norm": {"model": 0.25}}


def test_overflow_is_the_scalers_business(scaled):
    step, weight = scaled()
    for i in range(3):  # finite at scale 2^13, infinite above it
        said = step(losses_of(weight, 3e34), {}, {}, i)
        assert f"loss scale now {2**15 / 2**i:g}, {i + 1} so far" in said and weight.item() == 1
    assert step(losses_of(weight, 3e34), {}, {}, 4) == "" and weight.item() < 0
    assert (step.overflows, step.skipped) == (3, 0) and not step.file.exists()
    assert step.take_means()["loss"] == {"term": 1.0}  # steps left out do not count

    again, _ = scaled()
    again.load_state_dict(copy.deepcopy(step.state_dict()))
    assert again.overflows == 3 and again.scaler.state_dict() == step.scaler.state_dict()
    assert again.scaler.get_scale() == 2**13


def test_no_scale_is_left(scaled):
    step, weight = scaled()
    with pytest.raises(UserError, match=r"overflow float16 even at a loss scale of 1; .*train\.precision=bfloat16"):
        for i in range(99):
            step(losses_of(weight, torch.inf), {}, {}, i)
    assert step.overflows == 17 and weight.item() == 1  # 2^16 … 2^0


def test_loss_that_is_not_finite_is_no_overflow(scaled):
    step, weight = scaled("train.on_nonfinite=skip")
    assert "loss term is nan" in step(losses_of(weight, torch.nan, torch.nan), {}, {}, 1)
    assert (step.overflows, step.skipped) == (0, 1) and step.file.exists()
    assert step(losses_of(weight, 0.5), {}, {}, 2) == "" and weight.item() == 0.75
    step.file.unlink()


def test_precision_by_device(monkeypatch):
    for native, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(prediction, "_cpu_computes_bfloat16", lambda native=native: native)
        assert default_precision(CPU) == expected
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    for native, expected in ((True, "bfloat16"), (False, "float16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert default_precision(torch.device("cuda")) == expected


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("float32", torch.float32),
        ("tf32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
    ],
)
def test_autocast_knows_every_precision(precision, expected):
    with autocast(CPU, precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected


@pytest.mark.parametrize("precision", ["auto", "float32", "tf32"])
def test_float32_is_float32(configure, tmp_path, precision):
    cfg = configure("gta5_to_city", "stage1_BPL.yml", tmp_path, f"train.precision={precision}")
    torch.backends.cudnn.allow_tf32 = True  # as torch has it
    choose_device(cfg)
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32


def test_missing_compiler_is_one_line(monkeypatch):
    def no_compiler(function):
        raise RuntimeError("No working C++ compiler found\nin 4 places")

    monkeypatch.setattr(setup.torch, "compile", no_compiler)
    with pytest.raises(UserError, match=r" on cpu here; set train\.compile=false: No working C\+\+ compiler found$"):
        setup.refuse_missing_compiler(CPU)


@COMPILES
def test_compiled_in_place(configure, tmp_path, monkeypatch):
    """By the compiler itself: a small network and the strong view give what they gave; names stay."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # put back afterwards
    cfg = configure("gta5_to_city", "stage1_BPL.yml", tmp_path)
    views = Views(cfg.data, (0.5,) * 3, (0.2,) * 3)
    network, x, images = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4), batch(1)["image"]

    def results():
        torch.manual_seed(0)
        return network(x), views.strong(images)

    expected, keys = results(), list(network.state_dict())
    stage = SimpleNamespace(cfg=cfg, device=CPU, model=network, views=views)
    try:
        loop.Stage.compile(stage)
    except UserError as error:
        pytest.skip(str(error))
    torch.testing.assert_close(results(), expected, rtol=1e-5, atol=1e-5)  # rounding of float32
    assert list(network.state_dict()) == keys and isinstance(network[0], nn.Linear)


@COMPILES
def test_a_compiled_step_is_the_same_step(configure, tmp_path, monkeypatch):
    """What torch.compile traces, without the kernels that it would make of it; names stay."""
    real = torch.compile
    monkeypatch.setattr(setup.torch, "compile", lambda function, mode=None: real(function, backend="aot_eager"))
    given = ("model.dropout=0", "train.precision=float32", "train.checkpointing=true", "train.accumulate=2")
    cfg, ends = resolve_auto(configure("gta5_to_city", "stage1_BPL.yml", tmp_path, *given)), []
    for compiled in (False, True):
        cfg.train.compile = compiled
        stage = train_bpl.BPL(cfg, CPU)
        if compiled:
            stage.compile()
        torch.manual_seed(0)
        step = GuardedStep(cfg, stage.networks, stage.optimizers, CPU, tmp_path / "not_finite.pth")
        step(stage.step, batch(1), batch(2), 1)
        end = {}
        for kind, network in stage.networks.items():
            end |= {(kind, name): tensor for name, tensor in network.state_dict().items()}
            end |= {(kind, name, "gradient"): p.grad for name, p in network.named_parameters()}
        ends.append(end)
    assert list(ends[0]) == list(ends[1])
    for name, eager in ends[0].items():
        difference = (ends[1][name] - eager).double().norm()
        assert difference <= 1e-3 * eager.double().norm(), name  # float32 through 18 layers of BatchNorm


@pytest.mark.parametrize("name", ["bpl", "pst"])
def test_no_loss_waits_for_the_device(configure, tmp_path, monkeypatch, name):
    """Tensors of the meta device have no content: whoever asks for it, as a wait for a GPU would, raises."""
    file, stage_type = {"bpl": ("stage1_BPL.yml", train_bpl.BPL), "pst": ("stage2_PST.yml", train_pst.PST)}[name]
    meta = torch.device("meta")
    stage = stage_type(resolve_auto(configure("gta5_to_city", file, tmp_path)), meta)
    stage.views = PlainViews()
    batches = ({key: value.to(meta) for key, value in batch(seed).items()} for seed in (1, 2))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it does not know the device
    terms = []
    stage.step(*batches, lambda total, **named: (total.backward(), terms.extend(named)))
    assert len(terms) == {"bpl": 5, "pst": 4}[name]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_updates_do_not_depend_on_how_gradients_lie_in_memory(configure, tmp_path, optimizer):
    """On a CPU, torch's fused optimizers take a channels-last weight's gradient for one laid out alike."""
    after = []
    for layout in (torch.channels_last, torch.contiguous_format):
        words = ("loss.adversarial=0.01", f"train.optimizer={optimizer}")
        stage = train_bpl.BPL(resolve_auto(configure("gta5_to_city", "stage0_warmup.yml", tmp_path, *words)), CPU)
        weights = [p for network in stage.networks.values() for p in network.parameters()]
        draws = torch.Generator().manual_seed(0)
        for weight in weights:
            gradient = torch.randn(weight.shape, generator=draws)
            weight.grad = gradient.to(memory_format=layout) if weight.dim() == 4 else gradient
        for own in stage.optimizers.values():
            own.step()
        after.append([weight.detach().clone() for weight in weights])
    for one, other in zip(*after):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_state_from_a_gpu_is_not_fused_on_a_cpu(configure, tmp_path):
    cfg = resolve_auto(configure("gta5_to_city", "stage1_BPL.yml", tmp_path))
    for optimizer in train_bpl.BPL(cfg, CPU).optimizers.values():
        state = optimizer.state_dict()
        for group in state["param_groups"]:
            group["fused"] = True
        optimizer.load_state_dict(state)
        loop._fit_to_device(optimizer, CPU)
        assert [group["fused"] for group in optimizer.param_groups] == [False] * len(state["param_groups"])


def test_a_state_from_a_cpu_is_fused_on_a_gpu(monkeypatch):
    """Fused kernels need Adam's counters beside the weights. "meta" stands for the GPU."""
    weight = nn.Parameter(torch.zeros(2, 3))
    weight.grad = torch.ones(2, 3)
    on_cpu = torch.optim.Adam([weight])
    on_cpu.step()
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(2, 3, device="meta"))])
    optimizer.load_state_dict(on_cpu.state_dict())
    monkeypatch.setattr(loop, "fuses", lambda device: True)
    loop._fit_to_device(optimizer, torch.device("meta"))
    assert optimizer.param_groups[0]["fused"]
    assert all(value.is_meta for state in optimizer.state.values() for value in state.values())
