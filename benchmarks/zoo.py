"""Which models convert, and what still works on the converted model.

Every model is built with random weights, its BatchNorm statistics settled on generated images, and converted. The table
says how many layers were converted and what feeds them, how far the 8-bit network is from the full-precision one (a deep
random network amplifies any noise, so the original network with noise of the size of 8-bit rounding stands beside it), and
whether everything a user does with a model works on the converted one (the CHECKS below). A model that is refused shows
its message; where the message names a remedy, the model is converted with it.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import pickle
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.digits import processor
from profit import DuQConfig, calibrate_, param_groups, quant_layers, quantize_, set_bits
from profit.errors import ProfitError
from profit.state import apply_quantization_state_, quantization_state

ROOT = Path(__file__).resolve().parent.parent
BATCH, PIXELS = 4, 64
FULL = DuQConfig(weight_bits=None, act_bits=None, padding="zero")

TIMM = """
mobilenetv1_100 mobilenetv1_125 mobilenetv2_050 mobilenetv2_100 mobilenetv2_140
mobilenetv3_small_050 mobilenetv3_small_100 mobilenetv3_large_100 mobilenetv3_rw
tf_mobilenetv3_small_100 tf_mobilenetv3_large_100 tf_mobilenetv3_small_minimal_100
mobilenetv4_conv_small mobilenetv4_conv_medium mobilenetv4_conv_aa_medium mobilenetv4_hybrid_medium mobilenet_edgetpu_100
mnasnet_050 mnasnet_100 mnasnet_small semnasnet_075 semnasnet_100 spnasnet_100
efficientnet_b0 efficientnet_b0_gn efficientnet_es efficientnet_lite0 efficientnet_cc_b0_4e
tf_efficientnet_b0 tf_efficientnet_lite0 tf_efficientnetv2_b0
lcnet_100 lcnetv2_small ghostnet_100 ghostnetv2_100 fbnetc_100 fbnetv3_b hardcorenas_a mixnet_s tf_mixnet_s tinynet_e
regnetx_002 regnety_002 regnetz_b16 resnet18 resnet18d resnet50 eca_resnet33ts nf_regnet_b0
rexnet_100 starnet_s1 repvgg_a0 mobilevit_xxs densenet121
""".split()
TORCHVISION = """
mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5 mnasnet1_0 efficientnet_b0 regnet_x_400mf regnet_y_400mf
resnet18 resnet50 shufflenet_v2_x0_5 shufflenet_v2_x1_0 squeezenet1_1 googlenet inception_v3
""".split()
MODELS = (*(f"timm/{name}" for name in TIMM), *(f"torchvision/{name}" for name in TORCHVISION))
# What the refusals say to do, as patterns to skip.
REMEDIES = {
    "timm/eca_resnet33ts": ("*.attn.conv",),
    "torchvision/googlenet": ("aux1.*", "aux2.*"),
    "torchvision/inception_v3": ("AuxLogits.*",),
}
LARGER = {"torchvision/inception_v3": 299, "timm/mobilenetv4_hybrid_medium": 128}


@dataclass
class Row:
    """What was found for one model. `kinds` are (raw, unsigned, offset, signed); errors are relative L2 norms; `checks`
    maps the name of a check to "" where it passed and to what went wrong where it did not."""

    model: str
    refused: str = ""
    remedy: tuple[str, ...] = ()
    layers: int = 0
    kinds: tuple[int, ...] = ()
    ranked: int = 0
    fused: int = 0
    full_precision_error: float | None = None
    eight_bit_error: float | None = None
    noise_error: float | None = None
    worst_layer: tuple[str, float] | None = None
    checks: dict[str, str] = field(default_factory=dict)
    convert_s: float = 0.0
    wall_s: float = 0.0

    @property
    def converted(self) -> bool:
        return self.layers > 0

    @property
    def failed(self) -> list[str]:
        return [name for name, problem in self.checks.items() if problem]


def build(model: str) -> nn.Module:
    """`timm/NAME` or `torchvision/NAME` with random weights."""
    library, _, name = model.partition("/")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torchvision's word on the initialisation of GoogLeNet
        if library == "timm":
            import timm

            return timm.create_model(name, pretrained=False)
        import torchvision

        return torchvision.models.get_model(name, weights=None)


def images(count: int, pixels: int, seed: int) -> Tensor:
    """Smooth shapes with some noise, `[count, 3, pixels, pixels]`."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    smooth = F.interpolate(coarse, size=(pixels, pixels), mode="bicubic", align_corners=False)
    return smooth + 0.2 * torch.randn(count, 3, pixels, pixels, generator=generator)


@torch.no_grad()
def settle(model: nn.Module, x: Tensor) -> None:
    """BatchNorm statistics of `x`, then eval mode: a random network with unit statistics would blow up or die out."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def logits(output: Any) -> Tensor:
    """The output tensor; of GoogLeNet and Inception in training, the main one."""
    return output if isinstance(output, Tensor) else output[0]


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@torch.no_grad()
def worst_layer(model: nn.Module, x: Tensor) -> tuple[str, float]:
    """The layer whose 8-bit output is farthest from its full-precision one on the same input. A wrong kind shows here."""
    errors: dict[str, float] = {}
    layers = quant_layers(model)

    def hook(name: str) -> Callable[..., None]:
        def compare(layer: nn.Module, args: tuple[Tensor, ...], full: Tensor) -> None:
            layer.set_weight_bits(8), layer.set_act_bits(8)
            if float(full.norm()) > 0:
                errors[name] = max(errors.get(name, 0.0), relative(layer.forward(*args), full))
            layer.set_weight_bits(None), layer.set_act_bits(None)

        return compare

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    model(x)
    for handle in handles:
        handle.remove()
    return max(errors.items(), key=lambda item: item[1])


@torch.no_grad()
def with_rounding_noise(original: nn.Module, table: Any, x: Tensor) -> Tensor:
    """Logits of the unconverted network where weights and inputs of the converted layers carry uniform noise of one 8-bit
    step: the yardstick for the error of the quantized network, computed without any quantizer."""
    model, generator = copy.deepcopy(original), torch.Generator().manual_seed(0)

    def noisy(tensor: Tensor, steps: int) -> Tensor:
        noise = torch.rand(tensor.shape, generator=generator) - 0.5
        return tensor + noise * (tensor.max() - min(float(tensor.min()), 0.0) if steps == 255 else tensor.abs().max()) / steps

    for row in table:
        layer = model.get_submodule(row.name)
        layer.weight.copy_(noisy(layer.weight, 127))
        if row.kind != "raw":
            steps = 127 if row.kind == "signed" else 255
            layer.register_forward_pre_hook(lambda layer, args, steps=steps: (noisy(args[0], steps), *args[1:]))
    return model(x)


# ---- checks: on a calibrated W4A4 model in eval mode; each returns "" or what went wrong ---------------------------


def check_compile(model: nn.Module, x: Tensor, row: Row) -> str:
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    with torch.no_grad():
        same = torch.equal(compiled(x), model(x))
    return "" if same else "the compiled model gives other logits"


def check_training(model: nn.Module, x: Tensor, row: Row) -> str:
    """Two steps of SGD: losses and gradients finite, every parameter reached that is reached before conversion."""
    model = copy.deepcopy(model).train()
    labels = torch.arange(len(x))
    optimizer = torch.optim.SGD(param_groups(model, 1e-3, 4e-5), momentum=0.9, nesterov=True)
    for _ in range(2):
        loss = F.cross_entropy(logits(model(x)), labels)
        optimizer.zero_grad()
        loss.backward()
        if not torch.isfinite(loss):
            return f"the loss is {float(loss)}"
        bad = [n for n, p in model.named_parameters() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
        if bad:
            return f"the gradient of {bad[0]} is not finite"
        missed = [n for n, layer in quant_layers(model).items() if layer.weight.grad is None]
        if missed:
            return f"no gradient reaches {missed[0]}"
        optimizer.step()
    return ""


def check_deepcopy(model: nn.Module, x: Tensor, row: Row) -> str:
    return _same(copy.deepcopy(model), model, x)


def check_pickle(model: nn.Module, x: Tensor, row: Row) -> str:
    return _same(pickle.loads(pickle.dumps(model)), model, x)


def check_state_dict(model: nn.Module, x: Tensor, row: Row) -> str:
    """Through a file of weights, into a fresh model converted alike and into one rebuilt from its quantization state."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    alike, rebuilt = build(row.model), build(row.model)
    quantize_(alike, _config(4, row.remedy), x[:1])
    apply_quantization_state_(rebuilt, json.loads(json.dumps(quantization_state(model))))
    for other in (alike, rebuilt):
        other.load_state_dict(state)
        problem = _same(other.eval(), model, x)
        if problem:
            return problem
    return ""


def check_autocast(model: nn.Module, x: Tensor, row: Row) -> str:
    model = copy.deepcopy(model).train()
    with torch.autocast("cpu", torch.bfloat16):
        y = logits(model(x))
    F.cross_entropy(y.float(), torch.arange(len(x))).backward()
    if not bool(torch.isfinite(y).all()):
        return "logits are not finite"
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    return f"the gradient of {bad[0]} is not finite" if bad else ""


@torch.no_grad()
def check_channels_last(model: nn.Module, x: Tensor, row: Row) -> str:
    """In full precision, where the order of a sum cannot flip a code; and at 4 bits finite."""
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    other = x.contiguous(memory_format=torch.channels_last)
    if not bool(torch.isfinite(model(other)).all()):
        return "logits are not finite"
    set_bits(model, None, None)
    contiguous = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    error = relative(model(other), contiguous(x))
    return "" if error < 1e-3 else f"logits differ by {error:.1e}"


@torch.no_grad()
def check_modes(model: nn.Module, x: Tensor, row: Row) -> str:
    """Training and back: the flags of every module, and the same logits once statistics are put back."""
    model, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    before = model(x)
    model.train()
    if not all(m.training for m in model.modules()):
        return "train() leaves a module in eval mode"
    model(x)
    model.load_state_dict(state)
    model.eval()
    if any(m.training for m in model.modules()):
        return "eval() leaves a module in training mode"
    return "" if torch.equal(model(x), before) else "logits changed"


@torch.no_grad()
def check_average(model: nn.Module, x: Tensor, row: Row) -> str:
    """An average of weights in torch's own class, over the same weights, is the model."""
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for _ in range(2):
        average.update_parameters(model)
    error = relative(average.eval()(x), model(x))
    return "" if error < 1e-3 else f"logits differ by {error:.1e}"


@torch.no_grad()
def _same(other: nn.Module, model: nn.Module, x: Tensor) -> str:
    return "" if torch.equal(other(x), model(x)) else "logits differ"


CHECKS: dict[str, Callable[[nn.Module, Tensor, Row], str]] = {
    "compile": check_compile, "train": check_training, "deepcopy": check_deepcopy, "pickle": check_pickle,
    "state_dict": check_state_dict, "bf16": check_autocast, "channels_last": check_channels_last, "modes": check_modes,
    "average": check_average,
}  # fmt: skip


def _config(bits: int | None, remedy: Sequence[str]) -> DuQConfig:
    overrides = {pattern: {"skip": True} for pattern in remedy}
    return DuQConfig(weight_bits=bits, act_bits=bits, padding="zero", overrides=overrides)


def examine(model_name: str, checks: Sequence[str] = tuple(CHECKS)) -> Row:
    """Convert one model and run `checks` on it."""
    start = time.perf_counter()
    row = Row(model_name)
    # At 4 bits about one random network in thirty explodes: channels that became constant, BatchNorm behind each other.
    torch.manual_seed(0)
    model = build(model_name)
    x = images(BATCH, LARGER.get(model_name, PIXELS), seed=0)
    settle(model, x)
    original = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(x)
    try:
        table = _converted(model, x, row)
    except ProfitError as error:
        row.refused = row.refused or str(error)
        row.wall_s = round(time.perf_counter() - start, 1)
        return row
    counts = table.counts()
    row.layers, row.ranked, row.fused = counts["layers"], counts["ranked"], counts["fused"]
    row.kinds = tuple(counts[kind] for kind in ("raw", "unsigned", "offset", "signed"))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a dead squeeze-and-excite of a random network has no range
        row.full_precision_error = relative(model(x), expected)
        calibrate_(model, [x], batches=1, percentile="max")
        row.worst_layer = worst_layer(model, x)
        set_bits(model, 8, 8)
        row.eight_bit_error = relative(model(x), expected)
        row.noise_error = relative(with_rounding_noise(original, table, x), expected)
        set_bits(model, 4, 4)
    for name in checks:
        try:
            row.checks[name] = CHECKS[name](model, x, row)
        except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, pickle.PicklingError) as error:
            row.checks[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    row.wall_s = round(time.perf_counter() - start, 1)
    return row


def _converted(model: nn.Module, x: Tensor, row: Row) -> Any:
    """The layer table; a refusal is noted, and its remedy (if there is one here) tried."""
    start = time.perf_counter()
    try:
        table = quantize_(model, FULL, x[:1])
    except ProfitError as error:
        row.refused = str(error)
        if row.model not in REMEDIES:
            raise
        row.remedy = REMEDIES[row.model]
        start = time.perf_counter()
        table = quantize_(model, _config(None, row.remedy), x[:1])
    row.convert_s = round(time.perf_counter() - start, 2)
    return table


def markdown(rows: Sequence[Row]) -> str:
    """The table of converted models, then the refusals."""
    heads = ("model", "layers", "raw/unsigned/offset/signed", "ranked", "fused", "8 bits, logits", "noise, logits",
             "8 bits, worst layer", *CHECKS, "conversion s")  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for row in rows:
        if row.converted:
            cells = [
                row.model + (" (with the remedy)" if row.remedy else ""), row.layers, "/".join(map(str, row.kinds)),
                row.ranked, row.fused, f"{row.eight_bit_error:.1%}", f"{row.noise_error:.1%}", f"{row.worst_layer[1]:.1%}",
                *("-" if name not in row.checks else "no" if row.checks[name] else "yes" for name in CHECKS), row.convert_s,
            ]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| refused | message |", "|---|---|"]
    lines += [f"| {row.model} | {row.refused} |" for row in rows if row.refused]
    problems = [f"{row.model}: {name}: {row.checks[name]}" for row in rows for name in row.failed]
    return "\n".join(lines + ["", *problems])


def _in_process(model: str, checks: Sequence[str]) -> Row:
    torch.set_num_threads(1)
    return examine(model, checks)


def main(argv: Sequence[str]) -> int:
    """Examine the models; returns 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks zoo", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["*"], metavar="PATTERN", help="as 'timm/mobilenetv3*'; all by default")
    parser.add_argument("--checks", nargs="*", default=list(CHECKS), choices=list(CHECKS), help="all by default")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each (default 2)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/zoo.json", help="the result file")
    options = parser.parse_args(argv)
    from profit.train.files import write_atomic
    from profit.train.results import git_commit, versions

    chosen = [m for m in MODELS if any(fnmatchcase(m, pattern) for pattern in options.models)]
    if not chosen:
        print(f"error: no model of the zoo matches {' '.join(options.models)}", file=sys.stderr)
        return 2
    start, rows = time.perf_counter(), {}
    content = {
        "suite": "zoo",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "versions": versions(),
        "processor": processor(),
        "jobs": options.jobs,
        "images": {"batch": BATCH, "pixels": PIXELS, "larger": LARGER},
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        waiting = {pool.submit(_in_process, model, options.checks): model for model in chosen}
        for done in as_completed(waiting):
            row = rows[waiting[done]] = done.result()
            state = "refused" if not row.converted else f"{row.layers} layers, 8 bits {row.eight_bit_error:.1%}"
            problems = "".join(f"; {name}: {row.checks[name]}" for name in row.failed)
            print(f"[{len(rows)}/{len(chosen)}] {row.model}: {state}, {row.wall_s:.0f} s{problems}", flush=True)
            found = [asdict(rows[model]) for model in chosen if model in rows]
            content.update(wall_s=round(time.perf_counter() - start, 1), models=found)
            write_atomic(options.out, json.dumps(content, indent=1) + "\n")
    ordered = [rows[model] for model in chosen]
    print("\n" + markdown(ordered))
    return int(any(row.failed for row in ordered))
