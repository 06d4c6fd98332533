"""Kill -9 a training run again and again, resume it, and compare with the run that was never interrupted.

Some of the kills come at random moments from outside. The others strike inside the writing of files: at a random call of
fsync, rename or unlink, before or after it, and at an fsync sometimes with only half of the file written. After every kill
each checkpoint that was complete before is opened again; at the end the weights are compared byte by byte.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..harness.place import RESULTS, ROOT

RECIPE = ROOT / "recipes" / "smoke.yaml"
# dropout, so that something is drawn from the generators; checkpoints more often than the run needs
CHANGES = (
    "model.args={width: 0.34, head: 16, drop_rate: 0.2}", "data.limit=64", "data.shift=1", "schedule.fp_epochs=4",
    "schedule.act_bits=[8,4]", "schedule.weight_bits=[5,4]", "schedule.sample_epochs=3", "run.tensorboard=false",
)  # fmt: skip
EVENTS_PER_EPOCH = 12  # about; fsync, rename and unlink calls, counting before and after each

WRITERS = ("save_checkpoint", "prune", "save_network", "own_teacher", "_write_results", "open_run")


def in_child(work: Callable[[], int]) -> int:
    """Start `work` in a forked process, silent, and return its id."""
    process = os.fork()
    if process:
        return process
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    code = 70
    try:
        code = work()
    finally:
        os._exit(code)


def run(folder: Path, arm: Callable[[], None] | None) -> Callable[[], int]:
    """Train, or carry on, in `folder`; `arm` is called before, in the same process."""

    def work() -> int:
        import profit.report
        from profit.cli import main

        profit.report.write_report = lambda folder: folder  # drawing takes longer than training
        if arm:
            arm()
        settings = [part for change in CHANGES for part in ("-s", change)]
        return main(["train", str(RECIPE), "--out", str(folder), "--resume", "-q", *settings])

    return work


def kill_at(event: int, halve: bool, told: Path) -> Callable[[], None]:
    """Have the process kill itself at the `event`-th moment around an fsync, a rename or an unlink; `told` says inside what."""

    def arm() -> None:
        count = [0]

        def maybe_die() -> None:
            count[0] += 1
            if count[0] == event:
                frame, names = sys._getframe(), []
                while frame is not None:
                    names.append(frame.f_code.co_name)
                    frame = frame.f_back
                told.write_text(next((name for name in WRITERS if name in names), "another file"))
                os.kill(os.getpid(), signal.SIGKILL)

        def watched(call: Callable[..., Any]) -> Callable[..., Any]:
            def replacement(*args: Any, **kwargs: Any) -> Any:
                if call is fsync and halve and count[0] + 1 == event:
                    size = os.fstat(args[0]).st_size
                    if os.path.isfile(f"/proc/self/fd/{args[0]}"):
                        os.ftruncate(args[0], size // 2)
                maybe_die()
                result = call(*args, **kwargs)
                maybe_die()
                return result

            return replacement

        fsync = os.fsync
        os.fsync, os.replace, os.unlink = watched(os.fsync), watched(os.replace), watched(os.unlink)

    return arm


def complete(folder: Path) -> dict[str, Any]:
    """The checkpoints that can be read, by name, with their progress; {} before the first."""
    from profit.errors import CheckpointError
    from profit.train.checkpoint import load_checkpoint

    found = {}
    for path in sorted((folder / "checkpoints").glob("*.json")):
        try:
            found[path.stem] = len(load_checkpoint(path)["model"])
        except CheckpointError as error:
            found[path.stem] = str(error)
    return found


def lost(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Checkpoints that were readable and are not: the best two, and the newest unless a newer one is there."""
    bad = [f"{name}: {value}" for name, value in after.items() if isinstance(value, str)]
    newest = max((name for name in before if name.startswith("epoch")), default="")
    later = max((name for name in after if name.startswith("epoch") and not isinstance(after[name], str)), default="")
    gone = [name for name in before if name.startswith("best") and name not in after]
    return bad + gone + ([newest] if later < newest else [])


def contents(folder: Path) -> dict[str, bytes]:
    """What two runs must agree in, byte by byte."""
    files = [folder / "model.safetensors", *sorted((folder / "checkpoints").glob("*.safetensors"))]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def campaign(work: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill runs until `kills` have died; every run is carried on to its end."""
    chance = random.Random(seed)
    started = time.perf_counter()
    os.waitpid(in_child(run(work / "whole", None)), 0)
    duration = time.perf_counter() - started
    whole, rows, differing, runs = contents(work / "whole"), [], [], 0
    epochs = int(max(name for name in complete(work / "whole") if name.startswith("epoch")).removeprefix("epoch-"))
    while len(rows) < kills:
        folder = work / f"killed-{runs}"
        runs += 1
        finished = False
        while not finished:
            before = complete(folder)
            inside, halve, delay = chance.random() < 0.6, chance.random() < 0.5, chance.uniform(0, duration / 3)
            event = chance.randint(1, 6 * EVENTS_PER_EPOCH)
            stop = len(rows) >= kills
            told = folder.with_suffix(".told")
            process = in_child(run(folder, kill_at(event, halve, told) if inside and not stop else None))
            if not inside and not stop:
                time.sleep(delay)
                os.kill(process, signal.SIGKILL)
            status = os.waitpid(process, 0)[1]
            if os.WIFSIGNALED(status):
                after = complete(folder)
                done = max((name for name in after if name.startswith("epoch")), default="none")
                where = f"inside {told.read_text()}, file operation {event}" if inside else f"after {delay:.2f} s"
                left = sorted(path.name for path in folder.rglob(".*"))
                rows.append({"run": runs - 1, "where": where, "newest": done, "lost": lost(before, after), "left_over": left})
                told = f"left over {', '.join(left) or 'nothing'}, lost {rows[-1]['lost'] or 'nothing'}"
                print(f"kill {len(rows):2} run {runs - 1}: {where:44} newest {done}, {told}", flush=True)
            elif os.waitstatus_to_exitcode(status) == 0:
                finished = True
            else:
                raise SystemExit(f"error: the run in {folder} ended with status {os.waitstatus_to_exitcode(status)}; "
                                 "carry it on by hand to see why")  # fmt: skip
        mine = contents(folder)
        differing += [f"{folder.name}/{name}" for name in sorted({*whole, *mine}) if whole.get(name) != mine.get(name)]
    checkpoints = ("save_checkpoint", "prune")
    within = [any(name in row["where"] for name in checkpoints) for row in rows]
    return {
        "kills": len(rows),
        "inside_checkpoint_writes": sum(within),
        "inside_other_writes": sum("inside" in row["where"] for row in rows) - sum(within),
        "runs": runs,
        "epochs_per_run": epochs,
        "files_compared": runs * len(whole),
        "files_differing": differing,
        "checkpoints_lost": [name for row in rows for name in row["lost"]],
        "rows": rows,
    }


def main(argv: Sequence[str]) -> int:
    """Run the suite; returns the exit status: 1 where anything differs or is lost."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks kills", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="how many (default 30)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=RESULTS / "kills.json", help="the result file")
    options = parser.parse_args(argv)
    import sklearn.model_selection  # noqa: F401  everything a run needs is imported once, before the forks
    import timm  # noqa: F401
    import torch

    import profit.report
    import profit.train.trainer  # noqa: F401
    from profit.environment import git_commit, processor, versions
    from profit.files import write_atomic

    torch.set_num_threads(1)
    commit = git_commit()
    with tempfile.TemporaryDirectory() as work:
        found = campaign(Path(work), options.kills, options.seed)
    content = {
        "suite": "kills", "created": datetime.now(UTC).isoformat(timespec="seconds"), "git_commit": commit,
        "versions": versions(), "processor": processor(), "seed": options.seed, "changes": CHANGES, **found,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out, json.dumps(content, indent=1) + "\n")
    print(
        f"{found['kills']} kills ({found['inside_checkpoint_writes']} inside the writing or pruning of checkpoints, "
        f"{found['inside_other_writes']} inside that of other files) in {found['runs']} runs of {found['epochs_per_run']} "
        f"epochs: {len(found['files_differing'])} of {found['files_compared']} files differ from the run never interrupted, "
        f"{len(found['checkpoints_lost'])} checkpoints lost"
    )
    return 1 if found["files_differing"] or found["checkpoints_lost"] else 0
