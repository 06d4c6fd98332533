"""Two processes against one: ranges, AIWQ, losses, weights and statistics; a lost process ends the others with one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from profit_kernels import aiwq_conv2d, aiwq_conv2d_moments, kl_of_pooled, pool_moments
from tests import tolerances
from tests.oracles import gaussian_kl

from . import process_worker
from .tiny_run import VALUES

REPOSITORY = Path(__file__).resolve().parents[3]
SHORT = ("schedule.fp_epochs=2", "schedule.act_bits=[]", "schedule.weight_bits=[]", "schedule.profit_bits=[]")


def _torchrun(processes: int, *command: str, **kwargs) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--no-python"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, sys.executable, "-m", *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, **kwargs
    )


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> dict:
    """What two processes found."""
    path = tmp_path_factory.mktemp("two") / "found.json"
    done = _torchrun(2, "tests.profit.train.process_worker", str(path), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


def _same(two: dict, one: dict, keys: tuple[str, ...]) -> None:
    for key in keys:
        a, b = ([*found[key].values()] if isinstance(found[key], dict) else found[key] for found in (two, one))
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), **tolerances.PROCESSES)


def test_two_processes_with_synchronised_batchnorm_are_one(two) -> None:
    one = process_worker.measure()
    assert two["synced"]["ranges"] == one["ranges"], "the percentile of the union, exactly"
    _same(two["synced"], one, ("losses", "scores", "weight", "mean"))
    order = [sorted(found["scores"], key=lambda name: -found["scores"][name]) for found in (two["synced"], one)]
    assert order[0] == order[1] and min(one["scores"].values()) > 0
    assert two["synced"]["used"] == 2 * one["used"] and two["synced"]["skipped"] == 0


def test_without_it_they_are_one_process_that_accumulates(two) -> None:
    """BatchNorm then sees half a batch at a time in both; only its running statistics depend on the order."""
    one = process_worker.measure(accumulate=2)
    _same(two["ghost"], one, ("scores", "weight"))


def test_what_processes_agree_on(two) -> None:
    agreed = two["agreed"]
    assert (agreed["rank"], agreed["text"], agreed["list"]) == (0, "ä", [1, 2.5]) and np.isnan(agreed["nan"])
    assert two["gathered"] == [0, 1, 0, 1, 2]
    half = len(two["everywhere"]) // 2
    assert two["everywhere"][:half] == two["everywhere"][half:], "both processes have the same scores, to the last bit"


def test_pooled_moments_against_numpy(rng) -> None:
    x = torch.randn(6, 4, 5, 5, generator=rng).double() + 50  # a mean far from 0: sums of squares would cancel
    old = torch.randn(3, 4, 3, 3, generator=rng).double()
    new = torch.nn.functional.conv2d(x, old + 0.02 * torch.randn(old.shape, generator=rng).double())
    parts = [aiwq_conv2d_moments(a, b, old) for a, b in zip(x.split([1, 2, 3]), new.split([1, 2, 3]), strict=True)]
    nothing = torch.zeros_like(parts[0])
    kl = kl_of_pooled(pool_moments(torch.stack([*parts, nothing]), lambda part: part.sum(0)))
    expected = gaussian_kl(new.numpy(), torch.nn.functional.conv2d(x, old).numpy())
    torch.testing.assert_close(kl.double(), torch.from_numpy(expected), **tolerances.KL)
    torch.testing.assert_close(kl, aiwq_conv2d(x, new, old), **tolerances.KL)
    assert kl_of_pooled(pool_moments(nothing[None], lambda part: part.sum(0))).isnan().all()


@pytest.mark.slow
def test_a_run_in_two_processes_is_resumed_bit_for_bit(tmp_path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(VALUES))
    changes = ["schedule.fp_epochs=2", "schedule.train_epochs=1", "schedule.weight_bits=[4]", "model.args.drop_rate=0.2",
               "optim.accumulate=2", "run.timeout_s=100"]  # fmt: skip
    settings = [part for change in changes for part in ("-s", change)]

    def command(folder: str) -> list[str]:
        return ["profit", "train", str(recipe), "--out", str(tmp_path / folder), "-q", "--resume", *settings]

    whole = _torchrun(2, *command("whole"))
    assert whole.returncode == 0 and whole.stdout.count("final accuracy") == 1, whole.stderr
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python", sys.executable, "-m"]
    process = subprocess.Popen(
        [*launcher, *command("killed")], cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    limit = time.monotonic() + 240
    while not (tmp_path / "killed" / "checkpoints" / "epoch-00006.json").exists() and time.monotonic() < limit:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    assert _torchrun(2, *command("killed")).returncode == 0
    assert (tmp_path / "killed/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_process_that_dies_ends_the_other_with_one_line(tmp_path) -> None:
    """Without torchrun's agent, which would end the other itself."""
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys\nimport torch.distributed as dist\nfrom profit.cli import main\nimport profit.train.trainer as t\n"
        "dist.init_process_group('gloo')\n"
        "if dist.get_rank() == 1:\n"
        "    train_epoch = t.train_epoch\n"
        "    t.train_epoch = lambda *a, **k: os._exit(9) if 'epoch 2' in k['where'] else train_epoch(*a, **k)\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    recipe, folder = tmp_path / "tiny.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(VALUES))
    command = [sys.executable, str(script), "train", str(recipe), "--out", str(folder), "-q"]
    command += [part for change in SHORT for part in ("-s", change)]
    port = str(29500 + os.getpid() % 2000)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "PYTHONPATH": str(REPOSITORY)}
    start = partial(subprocess.Popen, command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    both = [start(env={**os.environ, **place, "RANK": str(rank)}) for rank in range(2)]
    (_, error), _ = (process.communicate(timeout=300) for process in both)
    assert both[1].returncode == 9 and both[0].returncode == 2
    assert error.startswith("error: process 0 of 2 waited in vain for another one") and error.count("\n") == 1, error
    assert (folder / "checkpoints" / "epoch-00001.json").is_file()
