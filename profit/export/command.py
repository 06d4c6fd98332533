"""`profit export` and `profit verify`: the functions of this package on the network and the images of a run."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..errors import CheckpointError, ExportError
from .network import Network
from .onnx_export import MAX_OPSET, MIN_OPSET, export_onnx
from .onnx_runtime import describe, executed, load_onnx
from .packed import export_packed, read_packed
from .torch_export import export_torch
from .verify import Verification, verify

ENDINGS = {"packed": ".safetensors", "onnx": ".onnx", "torch": ".pt2"}


def export_run(
    run: Path, out: Path, format: str, *, checkpoint: str | None = None, opset: int = 21, integer: bool = False,
    restorable: bool = True,
) -> str:  # fmt: skip
    """Export the network of a run folder; returns what was written, in words.

    Raises:
        ExportError: `out` does not end as the format asks, an option of another format, or see the format's function.
        CheckpointError: no run, or no such weights.
    """
    if out.suffix != ENDINGS[format]:
        raise ExportError(f"--out {out}: a file of format {format} ends in {ENDINGS[format]}")
    if format != "onnx" and (integer or opset != 21):
        raise ExportError(f"--integer and --opset ({MIN_OPSET} to {MAX_OPSET}) belong to --format onnx")
    if format != "packed" and not restorable:
        raise ExportError("--no-restorable belongs to --format packed")
    from ..train.runs import is_of_a_run

    if is_of_a_run(out):
        raise ExportError(f"--out {out} is a file that the run keeps for itself: choose another name")
    model, images = _network(run, checkpoint)
    full = sum(p.numel() * p.element_size() for p in model.state_dict().values())
    if format == "packed":
        size = export_packed(model, out, images, restorable=restorable)
        parts = {
            "weight codes": size.codes, "float weights": size.float_weights, "folded scales and biases": size.folded,
            "to load it into a model": size.restore, "description": size.description,
        }  # fmt: skip
        shares = ", ".join(f"{name} {count:,}" for name, count in parts.items() if count)
        return f"{out}: {bits(read_packed(out))}, {size.total:,} bytes ({shares}); the float32 state is {full:,}"
    if format == "torch":
        return f"{out}: {export_torch(model, out, images):,} bytes; the float32 state is {full:,}"
    summary = export_onnx(model, out, images, opset=opset, integer=integer)
    lines = [f"{out}: {summary.layers} layers, opset {opset}, {summary.size:,} bytes; the float32 state is {full:,}"]
    lines += [f"  float: {name}: {reason}" for name, reason in summary.float_layers.items()]
    lines.append(f"onnxruntime runs: {describe(executed(load_onnx(out)).items())}")
    return "\n".join(lines)


def verify_run(
    exported: Path, run: Path, *, checkpoint: str | None = None, images: int | None = None, trust: bool = False
) -> Verification:
    """Verify an exported file against a run folder, on the run's own test images.

    Raises:
        ExportError: see :func:`~profit.export.verify.verify`. CheckpointError: no run, or no such weights. DataError: the
            run's data cannot be found.
    """
    from ..data import create_data
    from ..train.recipe_io import load_recipe
    from ..train.runs import RECIPE

    if images is not None and images < 1:
        raise ExportError(f"--images {images}: at least one image is needed")
    if not (run / RECIPE).is_file():
        raise CheckpointError(f"{run} is not a run folder: it has no {RECIPE}")
    recipe = load_recipe(run / RECIPE)
    model, _ = _network(run, checkpoint)
    data = create_data(recipe.data, seed=recipe.run.seed)
    return verify(exported, model, data.test, images=images, trust=trust)


def bits(network: Network) -> str:
    """"22 layers: 20 W4A4, 1 W4A32", most frequent first."""
    counts: dict[str, int] = {}
    for layer in network.layers.values():
        counts[layer.bits] = counts.get(layer.bits, 0) + 1
    listed = ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
    return f"{len(network.layers)} layers ({listed})"


def _network(run: Path, checkpoint: str | None) -> tuple[nn.Module, object]:
    from ..train.network import load_network
    from ..train.runs import RECIPE, resolve_weights

    if not (run / RECIPE).is_file():
        raise CheckpointError(f"{run} is not a run folder: it has no {RECIPE}")
    model, architecture = load_network(resolve_weights(run, checkpoint))
    return model, architecture.example_input()
