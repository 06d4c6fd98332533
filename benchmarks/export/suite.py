"""What export keeps and what it costs: codes, classes, file sizes, onnxruntime's latency; three timm MobileNets and digits.

The MobileNets have random weights and BatchNorm statistics of real images (scikit-learn's digits, enlarged); no ImageNet is
needed to see whether an exported network computes what the model computes. The digits networks are trained: run folders of
recipes/digits_w4a4.yaml and digits_w3a3.yaml, trained here where they are missing.

Codes are compared by `profit.verify`. Latency is the fastest of many runs, the variants taking turns, one image and one
thread; a ratio to the same network in full precision under the same onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..harness.place import RESULTS, digits_recipe

NETS = ("mobilenetv1_100", "mobilenetv2_100", "mobilenetv3_large_100")
MIXED = {"weight_bits": (8, 4, 3), "act_bits": (8, 4)}  # taken in turns, layer by layer
CONFIGURATIONS = ("W4A4", "W3A3", "mixed")
SIZES = (8, 4, 3, 2)


def real_images(count: int, size: int) -> Any:
    """`count` digits as [count, 3, size, size]."""
    import torch
    import torch.nn.functional as F

    from profit.data.digits import digits_data

    images = torch.cat([batch for batch, _ in digits_data().train])[:count]
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1).contiguous()


def random_net(name: str, images: Any) -> Any:
    """A timm network, converted, in full precision; BatchNorm statistics and ranges from the images."""
    import timm
    import torch

    import profit

    torch.manual_seed(0)
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the average over the batches
    with torch.no_grad():
        for part in images.split(16):
            model.train()(part)
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of the padding: these weights were trained with neither
        profit.quantize_(model, profit.DuQConfig(weight_bits=None, act_bits=None), example_inputs=(images[:1],))
        profit.set_bits(model, act_bits=8)
        profit.calibrate_(model, [images], batches=1)
    return model


def configure(model: Any, configuration: str) -> None:
    """Set the bit widths: "W4A4", "W3A3", or "mixed", every layer another one."""
    import profit

    if configuration != "mixed":
        bits = int(configuration[1])
        profit.set_bits(model, weight_bits=bits, act_bits=bits)
        return
    for index, layer in enumerate(profit.quant_layers(model).values()):
        layer.set_weight_bits(MIXED["weight_bits"][index % 3])
        layer.set_act_bits(MIXED["act_bits"][index % 2])


def agreement(model: Any, batches: Iterable[Any], example: Any, folder: Path) -> dict[str, Any]:
    """The packed file and the integer variant of ONNX, verified."""
    import profit

    batches = list(batches)
    profit.export_packed(model, folder / "net.safetensors", example)
    summary = profit.export_onnx(model, folder / "net.onnx", example, integer=True)
    exact, integer = (profit.verify(folder / f"net.{ending}", model, batches) for ending in ("safetensors", "onnx"))
    found = {
        "images": exact.images,
        "weights": exact.weights,
        "top1": {**exact.top1, "onnxruntime, integer kernels / model": integer.top1["onnxruntime / model"]},
        "outputs": {**exact.outputs, "onnxruntime, integer kernels / model": integer.outputs["onnxruntime / model"]},
        "correct": exact.correct,
        "failures": exact.failures() + integer.failures(),
        "executed": exact.executed,
        "executed, integer kernels": integer.executed,
        "layers": summary.layers,
        "float layers": summary.float_layers,
    }
    comparisons = {c.what: c for c in exact.comparisons} | {"onnxruntime, integer kernels": integer.comparisons[-1]}
    counts = ("codes", "inside", "differing_inside", "differing_outside")
    found["codes"] = {
        what: {**{name: c.total(name) for name in counts}, "farthest": c.farthest} for what, c in comparisons.items()
    }
    return found


def sizes(model: Any, example: Any, folder: Path) -> dict[str, Any]:
    """Bytes of the files at each bit width, and in full precision."""
    import profit
    from profit.export.onnx_export import build_onnx
    from profit.export.trace import trace_network

    found: dict[str, Any] = {"float32 state": sum(v.numel() * v.element_size() for v in model.state_dict().values())}
    for bits in SIZES:
        profit.set_bits(model, weight_bits=bits, act_bits=bits)
        packed = profit.export_packed(model, folder / "net.safetensors", example)
        lean = profit.export_packed(model, folder / "net.safetensors", example, restorable=False)
        onnx = profit.export_onnx(model, folder / "net.onnx", example, opset=25)
        found[str(bits)] = {
            "packed": packed.total, "packed, not restorable": lean.total, "codes": packed.codes, "onnx": onnx.size
        }  # fmt: skip
    profit.set_bits(model, weight_bits=None, act_bits=None)
    found["float32 onnx"] = build_onnx(trace_network(model, example, allow_float=True))[0].ByteSize()
    return found


def latency(model: Any, images: Any, repeats: int, configuration: str) -> dict[str, Any]:
    """Milliseconds for one image on one thread, the fastest of `repeats`, all variants taking turns."""
    import profit
    from profit.export.onnx_export import build_onnx
    from profit.export.onnx_runtime import session
    from profit.export.trace import trace_network

    quantized = trace_network(model, images)
    profit.set_bits(model, weight_bits=None, act_bits=None)
    full = trace_network(model, images, allow_float=True)
    exact, integer = build_onnx(quantized)[0], build_onnx(quantized, integer=True)[0]
    sessions = {
        "float32": session(build_onnx(full)[0], threads=1),
        "exact": session(exact, threads=1),
        "exact, session.disable_quant_qdq=1": session(exact, threads=1, config={"session.disable_quant_qdq": "1"}),
        "integer kernels": session(integer, threads=1),
    }
    feed = {"input": images[:1].numpy()}
    fastest = dict.fromkeys(sessions, float("inf"))
    for _ in range(repeats):
        for name, running in sessions.items():
            start = time.perf_counter()
            running.run(None, feed)
            fastest[name] = min(fastest[name], time.perf_counter() - start)
    base = fastest["float32"]
    configure(model, configuration)
    return {name: {"ms": round(1e3 * s, 3), "ratio": round(s / base, 3)} for name, s in fastest.items()}


def trained(configuration: str, work: Path) -> tuple[Any, Any]:
    """The digits network of a configuration, trained (mixed: the 4-bit one, its widths set), and its test batches."""
    from profit.data import create_data
    from profit.train import load_recipe, train
    from profit.train.network import load_network

    bits = 3 if configuration == "W3A3" else 4
    recipe = load_recipe(digits_recipe(bits), ["run.device=cpu"])
    folder = work / f"digits_w{bits}a{bits}"
    if not (folder / "model.safetensors").is_file():
        train(recipe, folder, resume=folder.exists(), quiet=True)
    model, _ = load_network(folder / "model.safetensors")
    if configuration == "mixed":
        configure(model, configuration)
    return model, create_data(recipe.data).test


def markdown(results: dict[str, Any]) -> str:
    """The tables of the results."""
    return "\n\n".join(
        "\n".join(table) for table in (_codes(results), _classes(results), _sizes(results), _latency(results))
    )


def _head(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---|---|" + "---:|" * (len(columns) - 2)]


def _rows(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(f"| {name} | {bits}", row) for name, rows in results["agreement"].items() for bits, row in rows.items()]


def _codes(results: dict[str, Any]) -> list[str]:
    """Codes that differ from the integer runtime's, of them within the band, and their largest distance from an edge."""

    def differing(entry: dict[str, Any]) -> str:
        count = entry["differing_inside"] + entry["differing_outside"]
        return f"{count} ({entry['differing_inside']}), {entry['farthest']:.0e}" if count else "0"

    columns = ("images", "codes", "in band", "model in float64", "in float32", "onnxruntime", "its integer kernels")
    lines = _head("network", "bits", *columns)
    for start, row in _rows(results):
        proof, *others = row["codes"].values()
        cells = [str(row["images"]), f"{proof['codes']:,}", str(proof["inside"]), *map(differing, (proof, *others))]
        lines.append(f"{start} | {' | '.join(cells)} |")
    return lines


def _classes(results: dict[str, Any]) -> list[str]:
    """Images that get the same class from both sides."""
    columns = {
        "integer runtime / model in float64": "integer runtime / model in float64",
        "integer runtime / model": "integer runtime / model",
        "onnxruntime / model": "onnxruntime / model",
        "onnxruntime, integer kernels / model": "its integer kernels / model",
    }
    lines = _head("network", "bits", *columns.values(), "layers with integer kernels")
    for start, row in _rows(results):
        cells = ["{} of {}".format(*row["top1"][what]) for what in columns]
        lines.append(f"{start} | {' | '.join(cells)} | {row['layers'] - len(row['float layers'])} of {row['layers']} |")
    return lines


def _sizes(results: dict[str, Any]) -> list[str]:
    lines = _head("network", "file", "float32", *(f"{bits} bits" for bits in SIZES))
    for name, row in results["sizes"].items():
        for kind in row[str(SIZES[0])]:
            full = row["float32 onnx"] if kind == "onnx" else row["float32 state"]
            cells = [f"{row[str(b)][kind]:,} ({full / row[str(b)][kind]:.1f} x)" for b in SIZES]
            lines.append(f"| {name} | {kind} | {full:,} | {' | '.join(cells)} |")
    return lines


def _latency(results: dict[str, Any]) -> list[str]:
    lines = _head("network", "float32", *(f"{name}, relative" for name in list(next(iter(results["latency"].values())))[1:]))
    for name, row in results["latency"].items():
        ratios = [f"{entry['ratio']:.2f}" for entry in list(row.values())[1:]]
        lines.append(f"| {name} | {row['float32']['ms']:.2f} ms | {' | '.join(ratios)} |")
    return lines


def main(argv: Sequence[str]) -> int:
    """Run the suite; returns the exit status: 1 where a difference is more than rounding explains."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks export", description=__doc__.splitlines()[0])
    parser.add_argument("--nets", nargs="*", default=list(NETS), help="timm names (default: MobileNet v1, v2, v3-Large)")
    parser.add_argument("--size", type=int, default=224, help="image size of the timm networks (default 224)")
    parser.add_argument("--images", type=int, default=4, help="images to compare codes on (default 4; digits: its test set)")
    parser.add_argument("--repeats", type=int, default=100, help="runs per variant (default 100)")
    parser.add_argument("--work", type=Path, default=Path("runs"), help="where the digits run folders are (default runs)")
    parser.add_argument("--out", type=Path, default=RESULTS / "export.json", help="the result file")
    options = parser.parse_args(argv)
    from profit.environment import git_commit, processor, versions
    from profit.errors import ProfitError
    from profit.files import write_atomic

    start = time.perf_counter()
    results: dict[str, Any] = {"agreement": {}, "sizes": {}, "latency": {}}

    def note(text: str) -> None:
        print(f"{(time.perf_counter() - start) / 60:5.1f} min  {text}", flush=True)

    def one(name: str, configuration: str, model: Any, batches: Any, example: Any, folder: Path) -> None:
        row = agreement(model, batches, example, folder)
        results["agreement"].setdefault(name, {})[configuration] = row
        note(f"{name} {configuration}: {'; '.join(row['failures']) or 'codes agree'}")
        if configuration == "W4A4":
            results["latency"][name] = latency(model, example, options.repeats, configuration)
            results["sizes"][name] = sizes(model, example, folder)
            note(f"{name}: latency and sizes")

    try:
        with tempfile.TemporaryDirectory() as folder:
            for configuration in CONFIGURATIONS:
                model, test = trained(configuration, options.work)
                one("digits", configuration, model, test, next(iter(test))[0], Path(folder))
            images = real_images(max(64, options.images), options.size) if options.nets else None
            for name in options.nets:
                for configuration in CONFIGURATIONS:
                    model = random_net(name, images)
                    configure(model, configuration)
                    part = images[: options.images]
                    one(name, configuration, model, part.split(4), part, Path(folder))
    except ProfitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    content = {
        "suite": "export",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "versions": {**versions(), **{name: version(name) for name in ("onnx", "onnxruntime")}},
        "processor": processor(),
        "image_size": options.size,
        "wall_s": round(time.perf_counter() - start, 1),
        **results,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out, json.dumps(content, indent=1) + "\n")
    print("\n" + markdown(results))
    return int(any(row["failures"] for rows in results["agreement"].values() for row in rows.values()))
