"""The benchmark harness: how it times and counts, what it measures, and that a wrong result gets no figure."""

from __future__ import annotations

import math
import time
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness import children, gates, nets, registry, timing
from benchmarks.harness.children import WrongResult, measure
from benchmarks.harness.rows import SKIPPED, Report, Row, table
from benchmarks.harness.timing import Budget, Call, Spread
from profit_kernels import dispatch
from tests.tolerances import CONV

from .jobs import prepare

ROW_KEYS = set("suite case variant direction median_s p20_s p80_s floor_s kept_bytes device versions commit".split())


# How time and memory are measured


def test_spread_is_median_and_fifths():
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0, 3.0)
    found = Spread.of(range(101))
    assert (found.median, found.p20, found.p80, found.least) == (50, 20, 80, 0)


def test_variants_take_turns_in_their_context():
    log = []

    def call(name):
        class Context:
            def __enter__(self):
                log.append(f"+{name}")

            def __exit__(self, *_):
                log.append(f"-{name}")

        return Call(lambda state: log.append(f"{name}{state}"), setup=lambda: 7, context=Context)

    found = timing.interleaved({"a": call("a"), "b": call("b")}, timing.CpuClock(), rounds=2, turn_s=0.0, most=1)
    assert set(found) == {"a", "b"} and all(spread.median >= 0 for spread in found.values())
    assert log[:6] == ["+a", "a7", "-a", "+b", "b7", "-b"]  # warm-up
    timed = [entry for entry in log[6:] if entry[0] == "+"]
    assert timed == ["+a", "+a", "+b", "+b"] * 2  # an untimed call in front of every turn


def test_setup_and_the_release_of_the_result_are_not_timed():
    slow = Call(lambda state: time.sleep(0.01), setup=lambda: time.sleep(0.1))
    assert 0.01 <= timing.CpuClock()(slow) < 0.1


def test_kept_bytes_counts_each_storage_once_and_no_parameter():
    x, w = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)

    def forward():
        y = x @ w  # keeps x and w
        return y.exp() * y.exp()[:2].sum()  # keeps both exp, one of them also as a slice, and a scalar

    alone = timing.kept_bytes(lambda: (x * 2).exp(), [w])
    assert alone == 8 * 4 * 4
    kept = timing.kept_bytes(forward, [w])
    assert kept == x.nbytes + 2 * 8 * 4 * 4 + 4
    assert timing.kept_bytes(forward, [w, x]) == kept - x.nbytes


def test_a_floor_is_the_bytes_in_copies():
    assert timing.copies({"forward": 2, "backward": 3}, 0.5) == {"forward": 0.5, "backward": 0.75}


def test_the_allocator_is_tuned_unless_the_user_chose(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    assert "untuned" in timing.allocator()
    assert "glibc.malloc.mmap_max=0" in timing.tuned_environment()["GLIBC_TUNABLES"]
    monkeypatch.setenv("LD_PRELOAD", "libjemalloc.so")
    assert "GLIBC_TUNABLES" not in timing.tuned_environment() and timing.allocator() == "LD_PRELOAD=libjemalloc.so"


def test_compilation_needs_a_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "'no-such-compiler' is not on the PATH" in timing.why_no_compile("cpu")


# Processes


def test_each_variant_lives_in_a_process_and_costs_only_itself(capfd):
    said = []
    jobs = {name: name for name in ("good", "absent", "wrong", "dies", "better")}
    found = measure(prepare, jobs, rounds=2, turn_s=0.0, most=1, at_once=2, say=said.append)
    assert list(found) == list(jobs)
    assert {name: outcome.status for name, outcome in found.items()} == {
        "good": "ok", "absent": "skipped", "wrong": "failed", "dies": "failed", "better": "ok",
    }  # fmt: skip
    assert found["absent"].note == "it needs a unicorn" and "ended with status 3" in found["dies"].note
    assert found["good"].spread.median > 0 and found["good"].kept_bytes == 40
    assert found["wrong"].spread is None and "wrong: failed (wrong result: 7 instead of 8)" in said


def test_a_budget_ends_the_waiting():
    found = measure(prepare, {"slow": "slow", "good": "good"}, rounds=1, turn_s=0.0, budget=Budget(2.0))
    assert found["slow"].status == "skipped" and "not ready" in found["slow"].note
    assert found["good"].note == "no time left"
    assert not Budget(None).used_up() and Budget(-1.0).used_up() and Budget(None).left() == math.inf


# What is measured


@pytest.mark.parametrize("net", nets.PLAIN)
def test_the_plain_networks_have_the_layers_of_timm(net):
    pytest.importorskip("timm")

    def shapes():
        registry.layers.cache_clear()
        return [(x.shape, x.weight_shape, x.stride, x.padding, x.offset, x.activation) for x in registry.layers(net, 64, 2)]

    with mock.patch.object(nets, "has_timm", lambda: False):
        ours = shapes()
    assert ours == shapes() and ours


def test_layers_as_they_run():
    found = registry.layers("mobilenetv2_100", 224, 256)
    assert len(found) == 51 and sum(layer.depthwise for layer in found) == 17
    first = next(layer for layer in found if layer.depthwise)
    assert first.shape == (256, 32, 112, 112) and first.output_shape == first.shape and first.activation == "relu6"
    assert all(layer.kernel in (3, 5) for layer in registry.depthwise_layers(224, 256))
    assert all(layer.pointwise and not layer.depthwise for layer in registry.pointwise_layers(224, 256))
    labels = [layer.label for layer in registry.depthwise_layers(224, 256)]
    assert len(labels) == len(set(labels)) == 22
    for layer in registry.depthwise_layers(32, 1):
        y = F.conv2d(F.pad(torch.empty(layer.shape), layer.padding), torch.empty(layer.weight_shape), None, layer.stride,
                     groups=layer.groups)  # fmt: skip
        assert y.shape == layer.output_shape
        break


def test_without_timm_other_networks_are_refused():
    with mock.patch.object(nets, "has_timm", lambda: False):
        assert "without timm" in nets.check_name("resnet18")
        assert nets.create("mobilenetv2_050")(torch.randn(2, 3, 32, 32)).shape == (2, 1000)
    with pytest.raises(ValueError, match="'resnet1800'"):
        nets.create("resnet1800")


def test_every_operator_has_a_folder_and_a_case():
    assert {op for ops in registry.OPS.values() for op in ops} == set(dispatch.OPS)


# No figure for a wrong result


def test_the_gates_see_small_errors(rng):
    grad = torch.randn(1000, generator=rng)
    gates.relative_l2("y", grad * 1.0001, grad, gates.RELATIVE[torch.float32])
    for wrong in (grad * 1.01, grad + torch.nan, grad[:10], grad.double()):
        with pytest.raises(WrongResult):
            gates.relative_l2("y", wrong, grad, gates.RELATIVE[torch.float32])
    with pytest.raises(WrongResult, match="gradient of a"):
        gates.interval("the gradient of a", torch.tensor([9.0]), torch.tensor([1.0]), grad)
    with pytest.raises(WrongResult, match="steps"):
        gates.one_step(torch.tensor([1.0]), torch.tensor([0.0]), torch.zeros(1), 4, False)
    with pytest.raises(WrongResult, match="Tensor-likes"):
        gates.kl(torch.tensor([0.1]), torch.tensor([0.2]), torch.float32)


# Rows


def test_rows_have_the_agreed_keys_and_a_table():
    report = Report("ops", "cpu", {"toy": True})
    report.add("case", "auto", "forward", Spread(1e-3, 0.9e-3, 1.1e-3, 0.8e-3), floor_s=5e-4, kept_bytes=2_000_000)
    report.add("case", "reference-eager", "forward", Spread(3e-3, 3e-3, 3e-3, 3e-3))
    report.add("case", "cuda", "forward", status=SKIPPED, note="no kernels")
    content = report.to_dict()
    assert set(content["rows"][0]) == ROW_KEYS | {"min_s", "peak_bytes", "status", "note"}
    assert Row(**content["rows"][0]) == report.rows[0]
    assert {"allocator", "threads", "command", "created", "device", "versions", "commit"} <= set(content)
    lines = table(report.rows).splitlines()
    assert lines[1] == "case"
    assert lines[2].split() == ["auto", "forward", "1", "0.9", "1.1", "0.8", "0.5", "2.00", "1.00", "2.0"]
    assert lines[3].split()[-1] == "3.00" and lines[4].endswith("skipped: no kernels")


def test_process_close_kills_what_hangs():
    child = children._Child(prepare, "slow")
    child.close()
    assert not child.process.is_alive()


def test_convolution_gate_is_not_tighter_than_sums_in_another_order():
    assert gates.RELATIVE[torch.float32] > CONV["rtol"]
