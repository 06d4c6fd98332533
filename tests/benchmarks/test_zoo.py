"""The model zoo: a model of each kind in every run, all of them where slow tests run."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.zoo import suite as zoo
from tests import tolerances

# Layers with inputs that are raw, unsigned, offset, signed, counted from the architectures: ResNet18 has 16 convolutions in
# blocks, 3 in shortcuts, a stem and a head; LCNet's two unsigned inputs are those of its two squeeze-and-excite gates.
FAST = {
    "timm/resnet18": (1, 20, 0, 0),
    "timm/lcnet_100": (1, 2, 30, 0),
    "timm/tinynet_e": (1, 0, 41, 10),
    "torchvision/shufflenet_v2_x0_5": (1, 37, 0, 19),
}
REFUSED_ONLY = ("timm/efficientnet_cc_b0_4e", "timm/nf_regnet_b0")


def assert_fine(row: zoo.Row) -> None:
    assert row.failed == [] and list(row.checks) != []
    assert row.full_precision_error < tolerances.CONVERTED_NETWORK
    assert row.worst_layer[1] < tolerances.EIGHT_BIT_WORST_LAYER
    assert row.eight_bit_error < tolerances.EIGHT_BIT_OVER_NOISE * row.noise_error


@pytest.mark.parametrize("name", FAST)
def test_models_of_each_kind(name) -> None:
    row = zoo.examine(name, [check for check in zoo.CHECKS if check not in ("compile", "state_dict")])
    assert row.kinds == FAST[name] and not row.refused
    assert_fine(row)


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.MODELS)
def test_the_whole_zoo(name) -> None:
    row = zoo.examine(name)
    assert bool(row.refused) is (name in zoo.REMEDIES or name in REFUSED_ONLY)
    assert "\n" not in row.refused
    if name in REFUSED_ONLY:
        assert not row.converted
    else:
        assert_fine(row)


def test_the_suite_writes_what_it_found(tmp_path, capsys) -> None:
    out = tmp_path / "zoo.json"
    names = ["timm/nf_regnet_b0", "torchvision/squeezenet1_1"]
    assert main(["zoo", "--models", *names, "--checks", "train", "--jobs", "1", "--out", str(out)]) == 0
    models = {row["model"]: row for row in json.loads(out.read_text())["models"]}
    assert "ScaledStdConv2d" in models[names[0]]["refused"] and models[names[1]]["checks"] == {"train": ""}
    text = capsys.readouterr().out
    assert "| torchvision/squeezenet1_1 | 26 | 1/25/0/0 |" in text and "| timm/nf_regnet_b0 | layer " in text
    assert main(["zoo", "--models", "nothing*"]) == 2


def test_a_check_that_fails_is_told(monkeypatch) -> None:
    monkeypatch.setitem(zoo.CHECKS, "train", lambda model, x, row: "it broke")
    row = zoo.examine("torchvision/squeezenet1_1", ["train"])
    assert row.failed == ["train"] and "torchvision/squeezenet1_1: train: it broke" in zoo.markdown([row])


def test_weights_load_through_timm_as_usual(tmp_path) -> None:
    """timm's own way of reading weights, from a file here in place of a download, then conversion."""
    import timm

    from profit import DuQConfig, quantize_

    source = timm.create_model("mobilenetv3_small_050", num_classes=10)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = timm.create_model("mobilenetv3_small_050", num_classes=10, checkpoint_path=str(tmp_path / "w.pth"))
    quantize_(model, DuQConfig(None, None, padding="zero"), torch.zeros(1, 3, 32, 32))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in source.state_dict().items())
    result = model.load_state_dict(source.state_dict(), strict=False)  # into the converted one: nothing is unknown
    assert result.unexpected_keys == [] and all("quantizer" in key for key in result.missing_keys)
