"""The command line: `profit train`, `recipes`, `evaluate`, `export`, `verify`, `report`, `doctor`.

Heavy imports are inside the commands: `profit --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from profit import frame
from profit.errors import ProfitError, RecipeError, one_line

EXIT_DIFFERENT = 1

app = typer.Typer(
    help="Train mobile networks at 4 bits and below with PROFIT (Park & Yoo, ECCV 2020).",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"profit {version('profit-kernels')}"
    except PackageNotFoundError:
        return "profit, run from its source without being installed"


def _print_version(asked: bool) -> None:
    if asked:
        print(_version())
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="Change one value of the recipe; may be repeated."),
]


class Format(StrEnum):
    """What `export` writes."""

    packed = "packed"
    onnx = "onnx"
    torch = "torch"


_RECIPE = "A YAML recipe, the name of one that comes with the package, or a run folder for its recipe."
Run = Annotated[Path, typer.Argument(help="A run folder.", show_default=False)]
Checkpoint = Annotated[
    str | None, typer.Option(help="best, best_ema, last or a weight file; the final model by default.")
]


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help=_RECIPE, show_default=False)],
    out: Annotated[Path | None, typer.Option(help="The run folder; runs/<run.name> by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Carry on the run in the folder.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Plain lines instead of progress bars.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the phases, what they freeze and the estimated time; train nothing.")
    ] = False,
    images: Annotated[
        int | None, typer.Option(min=1, max=10**12, help="With --dry-run, without the data: training images.")
    ] = None,
    throughput: Annotated[
        float | None, typer.Option(min=1e-9, help="With --dry-run: images per second, not measured.")
    ] = None,
    accept_changed: Annotated[
        list[str] | None,
        typer.Option(metavar="WHAT", help="With --resume: recipe, teacher or data may have changed; may be repeated."),
    ] = None,
    tune_allocator: Annotated[
        bool, typer.Option("--tune-allocator", help="Keep freed memory for the next step (glibc): faster on the CPU, larger.")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Train a recipe through all its phases and write a report.

    [dim]profit train digits_w4a4 --set data.fold=1[/dim]
    """
    from profit.train.recipe_io import load_recipe
    from profit.train.shipped import is_shadowed

    for option, value in (("--images", images), ("--throughput", throughput)):
        if value is not None and not dry_run:
            raise RecipeError(f"{option} is for --dry-run, which trains nothing; training takes what the recipe says (--set)")
    if throughput is not None and not throughput <= 1e12:
        raise RecipeError(f"--throughput {throughput}: give the images per second")
    if is_shadowed(recipe):
        print(f"{recipe}: the one in this folder, not the recipe of that name that comes with the package", file=sys.stderr)
    loaded = load_recipe(recipe, overrides or ())
    stored = (recipe / "recipe.yaml").is_file()
    if stored and not (out or resume or dry_run):
        raise RecipeError(f"{recipe} is a run folder: --resume carries the run on, --out DIR trains its recipe again")
    folder = out or (recipe if stored and (resume or dry_run) else Path("runs") / loaded.run.name)
    if os.environ.get("RANK", "0") == "0":  # before torch is loaded, which takes seconds
        print(one_line(f"{_version()}: {f'plan of {recipe}' if dry_run else f'training {recipe} into {folder}'}"), flush=True)
    if dry_run:
        from profit.train.dry_run import dry_run as plan

        print(plan(loaded, folder, images, throughput))
        return

    from profit.distributed import rank
    from profit.report.html import REPORT_NAME
    from profit.train.processes import process_group
    from profit.train.runs import MODEL, is_begun
    from profit.train.trainer import train as run_training

    def kept() -> str:
        if not is_begun(folder):
            return "no epoch was finished yet"
        return f"the last finished epoch is kept in {folder}; the same command with --resume carries on from there"

    frame.kept = kept
    finished = resume and (folder / MODEL).is_file()
    with process_group(loaded.run.timeout_s):
        if tune_allocator:
            _tune_allocator(say=rank() == 0)
        results = run_training(loaded, folder, resume=resume, quiet=quiet, accept_changed=accept_changed or ())
        if rank():
            return  # process 0 tells the results
    if finished:
        print(f"{folder} is finished already")
    if not (folder / REPORT_NAME).is_file():  # its run was interrupted in between
        from profit.report import write_report

        write_report(folder)
    _print_results(results)
    print(f"report: {folder / 'report.html'}")


@app.command()
def recipes() -> None:
    """List the recipes that come with the package."""
    from profit.train.shipped import shipped_recipes, title

    shipped = shipped_recipes()
    for name, path in shipped.items():
        print(f"{name.ljust(max(map(len, shipped)))}  {title(path)}")


@app.command()
def evaluate(
    run: Run,
    checkpoint: Checkpoint = None,
    data: Annotated[str | None, typer.Option(help="A folder of images or a data set name; the run's own by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    overrides: Overrides = None,
) -> None:
    """Test the network of a run."""
    _loading(f"testing {run}")
    from profit.train.evaluation import evaluate_run

    result = evaluate_run(run, checkpoint=checkpoint, data=data, overrides=overrides or ())
    if as_json:
        print(json.dumps(result))
        return
    print(
        f"{result['weights']} ({result['bits']}): accuracy {result['accuracy']:.2f}%, loss {result['loss']:.4f} "
        f"on {result['images']} test images of {result['data']}"
        + (f" ({result['unreadable']} unreadable left out)" if result["unreadable"] else "")
    )


@app.command()
def export(
    run: Run,
    out: Annotated[Path, typer.Option(help="The file to write.", show_default=False)],
    format: Annotated[Format, typer.Option(help="What to write.", show_default=False)],
    checkpoint: Checkpoint = None,
    opset: Annotated[int, typer.Option(help="onnx: 13 to 25; 4-bit types need 21, 2-bit types 25.")] = 21,
    integer: Annotated[
        bool, typer.Option("--integer", help="onnx: the variant that onnxruntime runs with integer kernels.")
    ] = False,
    restorable: Annotated[
        bool, typer.Option(help="packed: keep what loading the file into a model again needs.")
    ] = True,
) -> None:
    """Export the network of a run: packed in true bit widths, as ONNX, or by torch.export.

    [dim]profit export runs/a --format packed --out a.safetensors[/dim]
    """
    _loading(f"exporting {run}")
    from profit.export.command import export_run

    print(export_run(run, out, format.value, checkpoint=checkpoint, opset=opset, integer=integer, restorable=restorable))


@app.command()
def verify(
    exported: Annotated[Path, typer.Argument(help="A file that export wrote.", show_default=False)],
    against: Annotated[Path, typer.Option(help="The run folder it was exported from.", show_default=False)],
    checkpoint: Checkpoint = None,
    images: Annotated[
        int | None, typer.Option(max=10**12, help="Use this many of the run's test images; all by default.")
    ] = None,
    trust: Annotated[bool, typer.Option("--trust", help="Open a .pt2 file, which can run code of whoever made it.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare an exported file with its run on real images; exit status 1 if rounding does not explain a difference."""
    _loading(f"verifying {exported}")
    from profit.export.command import verify_run

    result = verify_run(exported, against, checkpoint=checkpoint, images=images, trust=trust)
    print(json.dumps(result.to_dict()) if as_json else result)
    if result.failures():
        raise typer.Exit(EXIT_DIFFERENT)


@app.command()
def report(run: Run) -> None:
    """Write report.html of a run from its results.json."""
    from profit.report import write_report

    print(write_report(run))


@app.command()
def doctor() -> None:
    """Show what is built, which backend serves which operator, and why anything is missing."""
    from profit.doctor import doctor as run_doctor

    run_doctor()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status.

    0; 1 where `verify` found a difference; 2 for an error told in one line; 70 for one that nobody foresaw; 130 for Ctrl-C.
    """
    frame.kept = None
    return frame.guarded(lambda: _run(sys.argv[1:] if argv is None else list(argv)))


def _run(argv: list[str]) -> int:
    command = typer.main.get_command(app)
    usage_error = typer.BadParameter.__mro__[2]  # ClickException, of the click that typer uses, a package or its own copy
    try:
        with command.make_context("profit", list(argv) or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as stop:
        return stop.exit_code if argv else frame.EXIT_ERROR
    except usage_error as error:
        asked = getattr(error.ctx, "command_path", "profit")
        raise ProfitError(f"{error.format_message().rstrip('.')}; {asked} --help tells what it takes") from None
    return 0


def _loading(what: str) -> None:
    """Tell people, not programs, that it begins: the imports that follow take seconds."""
    if sys.stderr.isatty():
        frame.say(f"{_version()}: {what}")


def _tune_allocator(say: bool) -> None:
    """In every process of a run; one of them says what was done."""
    from profit.train.allocator import tune_allocator

    line = tune_allocator(os.environ)
    if say:
        print(line)


def _print_results(results: dict) -> None:
    """The table of phases at the end of a run."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    title = f"{results['run']['name']}: {results['model']['name']} on {results['data']['name']}"
    table = Table(title=Text(one_line(title)))  # as all texts here: `[red]` in a name is a name
    for column, justify in (
        ("phase", "left"), ("bits", "left"), ("frozen", "right"), ("epochs", "right"), ("accuracy %", "right"),
        ("average of weights %", "right"), ("seconds", "right"),
    ):  # fmt: skip
        table.add_column(column, justify=justify)
    for phase in results["phases"]:
        ema = phase.get("accuracy_ema")
        table.add_row(
            Text(phase["name"]), Text(phase["bits"]), str(phase["frozen"]), str(phase["epochs"]), f"{phase['accuracy']:.2f}",
            "-" if ema is None else f"{ema:.2f}", f"{phase['wall_s']:.1f}",
        )  # fmt: skip
    console = Console() if sys.stdout.isatty() else Console(width=110)
    console.print(table)
    fp = results["final"].get("accuracy_fp")
    print(
        f"final accuracy {results['final']['accuracy']:.2f}%"
        + ("" if fp is None else f" (full precision {fp:.2f}%)")
        + f", {results['run']['wall_s']:.0f} s of training"
    )
