"""What the command lines of the measuring suites have in common."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import nets, registry

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOY_MODEL = "mobilenetv2_050"


def parser(suite: str, description: str) -> argparse.ArgumentParser:
    """A parser with the common options: --json, --device, --batch, --size, --filter, --rounds, --budget,
    --threads, --toy."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks {suite}", description=description)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the rows there as well")
    made.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    made.add_argument("--batch", type=positive, help="images (default 16 on the CPU, 256 on a GPU)")
    made.add_argument("--size", type=positive, metavar="PX", help="height and width of an image (default 128, on a GPU 224)")
    made.add_argument("--filter", default="", metavar="TEXT", help="only the cases whose name holds this text")
    made.add_argument("--variants", nargs="+", metavar="NAME", help="only these variants")
    made.add_argument("--rounds", type=positive, default=7, help="turns of every variant (default 7)")
    made.add_argument("--budget", type=float, metavar="SECONDS", help="begin no further case after that time")
    made.add_argument("--threads", type=positive, help="of torch on the CPU (default: torch's own choice; --toy: 1)")
    made.add_argument("--toy", action="store_true", help="tiny shapes and one turn, to see that it runs")
    return made


def add_model(made: argparse.ArgumentParser) -> None:
    """--model and --dtype of the suites that measure whole networks."""
    made.add_argument("--model", nargs="+", metavar="NAME", help="networks (default: MobileNetV2 and V3-Large)")
    made.add_argument("--dtype", nargs="+", choices=tuple(DTYPES), default=["fp32"], help="bf16: autocast (default fp32)")


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def resolve(options: argparse.Namespace) -> str | None:
    """Fill in what depends on the device and on --toy; what is wrong with the options, in one line, or None."""
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        return "--device cuda: torch finds no CUDA GPU here"
    small = options.device == "cpu"
    if options.toy:
        options.rounds, options.threads = 1, options.threads or 1
        options.batch, options.size = options.batch or 8, options.size or 32
    options.batch = options.batch or (16 if small else 256)
    options.size = options.size or (128 if small else 224)
    if options.threads:
        torch.set_num_threads(options.threads)
    if hasattr(options, "model"):
        options.model = options.model or ([TOY_MODEL] if options.toy else list(registry.NETS))
        wrong = next(filter(None, map(nets.check_name, options.model)), None)
        if wrong is not None:
            return wrong
    return None


def chosen(options: argparse.Namespace, variants: list[str]) -> list[str]:
    """The variants that --variants leaves; without it all, but with --toy none that compiles (minutes for a network)."""
    if options.variants is not None:
        return [name for name in variants if name in options.variants]
    return [name for name in variants if not (options.toy and name.endswith("-compile"))]


def unknown_variants(options: argparse.Namespace, known: list[str]) -> str | None:
    """What is wrong with --variants, in one line, or None."""
    strange = [name for name in options.variants or () if name not in known]
    return f"--variants: {strange[0]!r} is not one of {', '.join(dict.fromkeys(known))}" if strange else None


def settings(options: argparse.Namespace) -> dict[str, object]:
    """The options as they stand, for the JSON."""
    return {key: value for key, value in vars(options).items() if key not in ("json", "budget")}


def refuse(message: str) -> int:
    """Print one line of error; the exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    return 2
