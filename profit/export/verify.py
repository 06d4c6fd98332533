"""Is an exported file what was trained? The model, the integer runtime and onnxruntime on the same images.

Codes are compared layer by layer, each layer on the same codes in front of it:

1. the model in float64 against the integer runtime: the proof. Float32 sums are out of it, so that codes may differ within
   4 float32 ulp of a rounding edge and nowhere else;
2. the model as it was trained, in float32, against the integer runtime: what its rounding costs;
3. onnxruntime against the integer runtime.

Outputs and the top-1 class come from free runs of each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import torch
from torch import Tensor, nn

from ..checks import check_module, check_path, first_line
from ..errors import ExportError
from ..quantize import quant_layers
from .compare import Codes, Comparison, compare_runtime, exact_copy, layers_by_run, model_codes
from .network import Network
from .onnx_export import build_onnx
from .onnx_layers import FLOAT32_STEPS, bias_rounding
from .onnx_operators import require
from .onnx_runtime import describe, executed, load_onnx, outputs_on, run, session, with_given_codes
from .packed import read_packed
from .runtime import IntegerRuntime
from .trace import trace_network

MODEL, EXACT, RUNTIME, ONNX, PROGRAM = (
    "model", "model in float64", "integer runtime", "onnxruntime", "exported program",
)  # fmt: skip

# How far outputs of the same codes may lie apart, as a share of the largest: float32 sums, and biases rounded to integers.
LAST, LAST_ROUNDED, TINY = 1e-4, 2e-2, 1e-6


@dataclass
class Verification:
    """What :func:`verify` saw; `str()` is the table.

    Attributes:
        file, images: what was verified, on how many images.
        weights: (number of weight codes or floats compared with the model's, how many differ).
        comparisons: codes by layer, see the module's text.
        outputs: largest absolute difference of the outputs, by what was compared: "onnxruntime / model" and the like.
        top1: (images that get the same class from both, images), by the same names.
        correct: images classified correctly, by name, where labels were given.
        last_differing: outputs of onnxruntime that differ from the runtime's on the same codes in front of the last layer.
        executed: what onnxruntime runs. notes: what could not be compared, and why.
    """

    file: str
    images: int = 0
    weights: tuple[int, int] = (0, 0)
    comparisons: list[Comparison] = field(default_factory=list)
    outputs: dict[str, float] = field(default_factory=dict)
    top1: dict[str, tuple[int, int]] = field(default_factory=dict)
    correct: dict[str, int] = field(default_factory=dict)
    last_differing: int = 0
    executed: str = ""
    notes: list[str] = field(default_factory=list)

    def failures(self) -> list[str]:
        """One line for each thing that rounding does not explain; empty if the file is what was trained."""
        numbers, differing = self.weights
        found = [f"{differing} of {numbers} weights or settings differ from the model's"] if differing else []
        for comparison in self.comparisons:
            for row in comparison.failures():
                found.append(
                    f"{comparison.what}: layer {row.name!r}: {row.differing} of {row.codes} codes differ, "
                    f"up to {row.farthest:.2g} of a step from a rounding edge"
                )
        if self.last_differing:
            found.append(f"{ONNX}: {self.last_differing} outputs differ on the same codes in front of the last layer")
        return found

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return {**asdict(self), "failures": self.failures()}

    def __str__(self) -> str:
        from .verify_table import table

        return table(self)


def verify(
    exported: str | Path, model: nn.Module, batches: Iterable[Any], *, images: int | None = None, trust: bool = False
) -> Verification:
    """Compare an exported file with the model it was made from.

    Usage::

        print(profit.verify("net.safetensors", model, [images]))

    Args:
        exported: a packed .safetensors, an .onnx or a .pt2 file.
        model: the converted model, in any mode; it is not changed.
        batches: image tensors [N, C, H, W], or tuples that start with images and labels.
        images: stop after this many; None takes all.
        trust: open a .pt2 file, which can run code of whoever made it.

    Raises:
        ExportError: the file cannot be used or is of another model; there are no images. TypeError: an argument of another
            type.
    """
    check_path(exported, "verify(exported, model, batches)", "exported")
    check_module(model)
    path = Path(exported)
    check = {".onnx": _Onnx, ".pt2": _Program, ".safetensors": _Packed}.get(path.suffix)
    if check is None:
        raise ExportError(f"{path}: only .safetensors (packed), .onnx and .pt2 files can be verified")
    if check is _Program and path.is_file() and not is_zipfile(path):  # of which torch would print a trace of its own
        raise ExportError(f"{path} is not a readable .pt2 file: it is no file that torch.export wrote")
    if check is _Program and not trust:
        raise ExportError(f"{path}: opening a .pt2 file can run code hidden in it; --trust (trust=True) if it is your own")
    work, result = None, Verification(str(path))
    for batch in batches:
        pictures, labels = (batch[0], batch[1]) if isinstance(batch, (tuple, list)) and len(batch) > 1 else (batch, None)
        pictures = pictures[0] if isinstance(pictures, (tuple, list)) else pictures
        left = len(pictures) if images is None else images - result.images
        pictures, labels = pictures[:left].cpu().float(), None if labels is None else labels[:left].cpu()
        if len(pictures):
            work = work or check(path, model, pictures, result)
            result.images += len(pictures)
            work.batch(pictures, labels)
    if not result.images:
        raise ExportError("there are no images to verify on")
    return result


class _Check(ABC):
    """What the checks have in common: the model's own outputs, and counting."""

    def __init__(self, path: Path, model: nn.Module, images: Tensor, result: Verification) -> None:
        self.path, self.model, self.result = path, model, result

    @abstractmethod
    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """The output of everything that is compared, the model's first."""

    def batch(self, images: Tensor, labels: Tensor | None) -> None:
        """Compare on one batch."""
        result = self.result
        outputs = {name: output.double().cpu() for name, output in self.outputs(images).items()}
        shape = outputs[MODEL].shape
        for name, output in outputs.items():
            if output.shape != shape:
                raise ExportError(f"{self.path}: {name} gives {list(output.shape)} numbers, the model {list(shape)}: it was "
                                  "not exported from this model")  # fmt: skip
            if labels is not None:
                result.correct[name] = result.correct.get(name, 0) + int((output.argmax(1) == labels).sum())
        pairs = [(name, MODEL) for name in outputs if name != MODEL]
        pairs += [(RUNTIME, EXACT)] if EXACT in outputs else []
        for name, other in pairs:
            one, two, key = outputs[name], outputs[other], f"{name} / {other}"
            result.outputs[key] = max(result.outputs.get(key, 0.0), float((one - two).abs().max()))
            same, total = result.top1.get(key, (0, 0))
            result.top1[key] = (same + int((one.argmax(1) == two.argmax(1)).sum()), total + len(one))

    def of_model(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Codes]:
        """Output and codes of a model in eval mode, on its own device."""
        device = next(model.parameters()).device
        training = model.training
        model.eval()
        try:
            output, codes = model_codes(model, images.to(device))
        finally:
            model.train(training)
        return output, {name: value.cpu() for name, value in codes.items()}


class _Network(_Check):
    """Packed files and ONNX files: three comparisons of codes."""

    def __init__(self, path: Path, model: nn.Module, images: Tensor, result: Verification) -> None:
        super().__init__(path, model, images, result)
        self.network = self.read(trace_network(model, images))
        self.runtime = IntegerRuntime(self.network)
        self.layers = layers_by_run(self.network)
        self.exact = exact_copy(model)
        self.proof = Comparison(f"{EXACT} / {RUNTIME}", None)
        self.trained = Comparison(f"{MODEL} in float32 / {RUNTIME}", FLOAT32_STEPS)
        result.comparisons += [self.proof, self.trained]
        self.proto, allowed = self.onnx()
        if self.proto is not None:
            self.onnxruntime = Comparison(f"{ONNX} / {RUNTIME}", FLOAT32_STEPS, allowed)
            result.comparisons.append(self.onnxruntime)
            self.free = session(self.proto)
            self.given: Any = None
            result.executed = describe(executed(self.proto).items())

    @abstractmethod
    def read(self, traced: Network) -> Network:
        """The network to run, from the file or as traced; compares its weights with the traced ones."""

    @abstractmethod
    def onnx(self) -> tuple[Any, dict[str, float]]:
        """(the model for onnxruntime or None, how far from an edge it may differ where it rounds a bias)."""

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        exact, codes = self.of_model(self.exact, images.double())
        self.runtime(images, compare_runtime(self.proof, codes, self.layers))
        output, codes = self.of_model(self.model, images)
        self.runtime(images, compare_runtime(self.trained, codes, self.layers))
        inputs: dict[str, Tensor] = {}
        codes = {}

        def keep(name: str, x: Tensor, own: Tensor) -> Tensor:
            inputs[name], codes[name] = x, own
            return own

        outputs = {MODEL: output, EXACT: exact, RUNTIME: self.runtime(images, keep)}
        if self.proto is None:
            return outputs
        outputs[ONNX] = run(self.free, images)
        if self.given is None:
            self.given = session(with_given_codes(self.proto, {name: tuple(c.shape) for name, c in codes.items()}))
        last, seen = outputs_on(self.given, images, codes)
        self._compare_last(last.double(), outputs[RUNTIME].double())
        for name, own in seen.items():
            self.onnxruntime.add(name, self.layers[name], inputs[name], own, codes[name])
        return outputs

    def _compare_last(self, output: Tensor, expected: Tensor) -> None:
        """What follows the last codes shows in the output alone: both of them on the same codes."""
        if output.shape != expected.shape:
            raise ExportError(f"{self.path} gives {list(output.shape)} numbers, the model {list(expected.shape)}")
        share = LAST_ROUNDED if self.onnxruntime.allowed_at else LAST
        allowed = share * float(expected.abs().max()) + TINY
        excess = (output - expected).abs() - allowed
        self.result.last_differing += int((~(excess <= 0)).sum())  # NaN differs


class _Packed(_Network):
    def read(self, traced: Network) -> Network:
        network = read_packed(self.path)
        ours, theirs = (value.to_dict() for value in (traced, network))
        if ours["steps"] != theirs["steps"] or ours["layers"].keys() != theirs["layers"].keys():
            raise ExportError(f"{self.path} was not exported from this model: its steps are others")
        compared = differing = 0
        for name, layer in traced.layers.items():
            other = network.layers[name]
            differing += layer.settings() != other.settings()
            for one, two in ((layer.weight, other.weight), (layer.multiplier, other.multiplier), (layer.bias, other.bias)):
                compared += one.numel()
                differing += one.numel() if one.shape != two.shape else int((one != two).sum())
        self.result.weights = (compared, differing)
        return network

    def onnx(self) -> tuple[Any, dict[str, float]]:
        try:
            require("onnx"), require("onnxruntime")
        except ExportError as error:
            self.result.notes.append(f"not compared with onnxruntime: {error}")
            return None, {}
        return build_onnx(self.network)[0], {}


class _Onnx(_Network):
    def read(self, traced: Network) -> Network:
        return traced

    def onnx(self) -> tuple[Any, dict[str, float]]:
        proto = load_onnx(self.path)
        variant = {entry.key: entry.value for entry in proto.metadata_props}.get("profit.variant")
        if variant is None:
            raise ExportError(f"{self.path} was not written by profit export")
        return proto, bias_rounding(self.network) if variant == "integer" else {}


class _Program(_Check):
    """A .pt2 file holds no codes to look at: outputs alone."""

    def __init__(self, path: Path, model: nn.Module, images: Tensor, result: Verification) -> None:
        super().__init__(path, model, images, result)
        if not path.is_file():
            raise ExportError(f"there is no file {path}")
        if not quant_layers(model):
            raise ExportError("the model is not quantized: it has no quantized layer")
        try:
            self.program = torch.export.load(path).module()
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, OSError, BadZipFile) as error:
            raise ExportError(f"{path} is not a readable .pt2 file: {first_line(error)}") from None
        result.notes.append("a .pt2 file shows no codes: outputs and classes only")

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            return {MODEL: self.of_model(self.model, images)[0], PROGRAM: self._of_program(images)}

    def _of_program(self, images: Tensor) -> Tensor:
        try:
            output = self.program(images)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise ExportError(f"{self.path} cannot be run on the run's images: {first_line(error)}") from None
        if not isinstance(output, Tensor):
            raise ExportError(f"{self.path} gives a {type(output).__name__}, not logits")
        return output
