"""The suite memory, the peers and the pictures."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from torch import nn

from benchmarks import block_cases, cases, options, peak, peers, plot, registry, step
from benchmarks.__main__ import main
from benchmarks.ops import evaluate
from benchmarks.process import Unavailable, WrongResult
from benchmarks.rows import SKIPPED, Report
from benchmarks.timing import Spread
from profit_kernels import dispatch, native

needs_peak = pytest.mark.skipif(peak.why_no_peak("cpu") is not None, reason=peak.why_no_peak("cpu") or "")
needs_library = pytest.mark.skipif(not native.available(), reason=native.why_missing() or "")
MEGABYTE = 1 << 20


# Peak memory


@needs_peak
def test_the_peak_is_what_a_call_needs_at_most():
    def call() -> torch.Tensor:
        first = torch.ones(64 * MEGABYTE, dtype=torch.uint8)
        second = first + 1  # both alive: 128 MB
        del first
        return second

    call()  # what is freed and kept by the allocator must not hide the next call's need
    assert 126 * MEGABYTE <= peak.peak_bytes(call, "cpu") < 160 * MEGABYTE


@needs_peak
def test_gradients_count_as_part_of_the_step():
    weight = torch.zeros(32 * MEGABYTE // 4, requires_grad=True)

    def call() -> None:
        weight.grad = None
        weight.sum().backward()
        weight.grad.add_(1.0)  # an expanded scalar becomes memory only when it is written

    call()
    assert 31 * MEGABYTE <= peak.peak_bytes(call, "cpu", [weight]) < 96 * MEGABYTE


def test_where_the_peak_cannot_be_measured_it_says_why(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(peak, "_STATUS", tmp_path / "status")
    assert "peak memory needs VmHWM" in peak.why_no_peak("cpu")
    (tmp_path / "status").write_text("Name: x\n")
    assert "no VmRSS" in peak.why_no_peak("cpu")
    monkeypatch.setenv("PROFIT_BENCHMARK_STARTED", "1")
    assert main(["memory", "--toy", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("error: peak memory needs")
    monkeypatch.setattr("sys.platform", "darwin")
    assert "this is darwin" in peak.why_no_peak("cpu")


@needs_peak
def test_memory_at_toy_size(tmp_path, capfd, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    path = tmp_path / "memory.json"
    asked = ["auto", "float-eager"]
    assert main(["memory", "--toy", "--device", "cpu", "--json", str(path), "--variants", *asked]) == 0
    content = json.loads(path.read_text())
    rows = {row["variant"]: row for row in content["rows"]}
    assert set(rows) == set(asked) and content["suite"] == "memory" and "mmap_max=0" in content["allocator"]
    assert all(row["peak_bytes"] > row["kept_bytes"] > 0 and row["median_s"] is None for row in rows.values())
    assert "peak MB" in capfd.readouterr().out


# Peers


def test_a_peer_that_is_not_installed_is_a_line(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    job = step.Job("brevitas", options.TOY_MODEL, 2, 32, "cpu", "fp32", 1)
    with pytest.raises(Unavailable, match=r"not installed: pip install 'profit-kernels\[peers\]'"):
        step.build(job, step.example(job)[0])
    assert not {"brevitas", "torchao"} & set(cases.duq((2, 8, 4, 4), "signed", torch.float32, "cpu").variants)


@pytest.mark.parametrize("peer", peers.PEERS)
def test_a_peer_quantizes_to_16_levels_and_trains(peer, rng):
    pytest.importorskip(peer)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.Flatten(), nn.Linear(128, 4)
    )
    before = net[2].weight.clone()
    peers.network(peer, net)
    assert type(net[0]) is nn.Conv2d, "the first layer stays"
    assert not {nn.Conv2d, nn.Linear} & {type(net[2]), type(net[4])}
    x = torch.randn(4, 3, 8, 8, generator=rng).to(memory_format=torch.channels_last)
    assert "gradients finite" in peers.check(peer, net, lambda: net(x).square().mean())
    torch.testing.assert_close(dict(net[2].named_parameters(remove_duplicate=False)).get(
        "weight", getattr(getattr(net[2], "layer", None), "weight", None)), before)  # fmt: skip
    quantizer = peers.quantizer(peer, "cpu", True)
    y = torch.randn(1, 512, 1, 1, generator=rng).to(memory_format=torch.channels_last)
    assert 8 < quantizer(y).unique().numel() <= 16


def test_a_peer_must_be_finite():
    layer = nn.Linear(2, 2)
    with pytest.raises(WrongResult, match="not finite"):
        peers.check("torch", layer, lambda: layer(torch.full((1, 2), torch.inf)).sum())


# The block


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_block_cases_see_a_wrong_gradient(dtype):
    layer = registry.depthwise_layers(32, 4, [options.TOY_MODEL])[0]
    case = block_cases.block(layer, dtype, "cpu")
    assert {"auto", "reference-eager", "reference-compile", "float-eager", block_cases.UNFUSED} <= set(case.variants)
    assert case.name.startswith("block ") and ("cpp" in case.variants) == ("cpp" in registry.backends("block", "cpu", dtype))
    expected = evaluate(case, case.variants["reference-eager"])
    for name in ("auto", block_cases.UNFUSED, "reference-eager"):
        case.variants[name].gate(*evaluate(case, case.variants[name]), *expected)
    outputs, gradients = evaluate(case, case.variants["auto"])
    for i in range(4):  # x, gamma, beta, w
        wrong = [1.1 * g if j == i else g for j, g in enumerate(gradients)]
        with pytest.raises(WrongResult, match="the gradient of"):
            case.variants["auto"].gate(outputs, wrong, *expected)
    assert set(registry.OPS["block"]) <= set(dispatch.OPS)


# Pictures


def some_rows(path, suite: str) -> None:
    report = Report(suite, "cpu", {}, path)
    for case in ("a case of a name that is so long that it has to be broken into two lines somewhere", "b", "c"):
        report.add(case, "auto", "forward+backward", Spread(2e-3, 1e-3, 3e-3, 1e-3), floor_s=1e-3, kept_bytes=5, peak_bytes=9)
        report.add(case, "auto", "backward", Spread(9.0, 9.0, 9.0, 9.0))
        report.add(case, "brevitas", "forward+backward", status=SKIPPED, note="not installed")
        report.add(case, "copy", "copy", Spread(1e-3, 1e-3, 1e-3, 1e-3))
    report.save()


@pytest.mark.parametrize("suite", ["ops", "memory"])
def test_a_picture_and_a_csv_of_every_row(tmp_path, capsys, monkeypatch, suite):
    monkeypatch.setattr(plot, "PER_PICTURE", 2)
    path = tmp_path / "found.json"
    some_rows(path, suite)
    assert main(["plot", str(path)]) == 0
    content = json.loads(path.read_text())
    with (tmp_path / "found.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["case"] for row in rows] == [row["case"] for row in content["rows"]]
    assert float(rows[0]["median_s"]) == content["rows"][0]["median_s"] and rows[2]["median_s"] == ""
    shown = plot.panels(content)
    assert len(shown) == 3 * (2 if suite == "memory" else 1)
    assert [row.variant for row in shown[0].rows] == ["auto", "brevitas"], "no copy, no backward alone"
    pages = -(-len(shown) // plot.PER_PICTURE)
    assert len(list(tmp_path.glob("found*.png"))) == pages > 1
    assert "found-2.png" in capsys.readouterr().out
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in tmp_path.glob("*.png"))


def test_what_cannot_be_plotted_is_one_line(tmp_path, capsys, monkeypatch):
    wrong = tmp_path / "wrong.json"
    for text, message in [("{", "cannot be read"), ('{"suite": "zoo"}', "not the JSON of one of the suites"),
                          ('{"suite": "ops", "rows": [{"tea": 1}]}', "unknown column 'tea'"),
                          ('{"suite": "ops", "rows": []}', "has no 'device'")]:  # fmt: skip
        wrong.write_text(text)
        assert main(["plot", str(wrong)]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert main(["plot", str(tmp_path / "absent.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    assert main(["plot"]) == 2
    assert "nothing to plot" in capsys.readouterr().err
