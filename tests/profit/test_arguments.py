"""Arguments of another type or out of range: TypeError or ValueError in one line, whatever the function."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import profit
from profit.errors import CalibrationError, CheckpointError, ConversionError
from tests.profit.conversion_nets import Mobile
from tests.profit.tiny_net import tiny_net

X = torch.zeros(1, 3, 8, 8)
# Every public function that takes a model, on what is none.
ON_A_MODEL = {
    "quantize_": lambda m: profit.quantize_(m, profit.DuQConfig(), X),
    "set_bits": lambda m: profit.set_bits(m, 4),
    "calibrate_": lambda m: profit.calibrate_(m, [X]),
    "reestimate_bn_": lambda m: profit.reestimate_bn_(m, [X], 1),
    "quant_layers": profit.quant_layers,
    "layer_table": profit.layer_table,
    "quantization_state": profit.quantization_state,
    "apply_quantization_state_": lambda m: profit.apply_quantization_state_(m, {}),
    "load_authors_checkpoint": lambda m: profit.load_authors_checkpoint(m, {}),
    "unfuse_": profit.unfuse_,
    "freeze_all": profit.freeze_all,
    "param_groups": lambda m: profit.param_groups(m, 0.1, 0.0),
    "ProgressiveFreezer": lambda m: profit.ProgressiveFreezer(m, {"dw": 1.0}),
    "AIWQMonitor": profit.AIWQMonitor,
}


@pytest.mark.parametrize("model", [None, "model.pt", X, {"a": 1}, Mobile], ids=["None", "str", "tensor", "dict", "class"])
@pytest.mark.parametrize("name", ON_A_MODEL)
def test_what_is_no_model(name, model):
    with pytest.raises(TypeError, match="^model must be a torch.nn.Module, got") as caught:
        ON_A_MODEL[name](model)
    assert "\n" not in str(caught.value)


def refused(error: type[Exception], message: str, call):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [{"weight_bits": 4}, "W4A4", X, profit.DuQConfig])
def test_what_is_no_config(config):
    refused(TypeError, "config must be a DuQConfig, got.*usage", lambda: profit.quantize_(Mobile(), config, X))


def test_what_is_no_filter():
    refused(TypeError, "filter_fn must be a function.*'conv'", lambda: profit.quantize_(Mobile(), None, X, "conv"))


def test_what_is_no_network_or_state(rng):
    refused(TypeError, "network must be a Network, got 'path'.*read_packed", lambda: profit.IntegerRuntime("path"))
    net = tiny_net(rng)
    refused(TypeError, "state_dict must map.*'/path'.*torch.load", lambda: profit.load_authors_checkpoint(net, "/path"))
    refused(CheckpointError, "a mapping; got None", lambda: profit.apply_quantization_state_(Mobile(), None))


@pytest.mark.parametrize(("arguments", "message"), [
    ({"percentile": True}, "percentile, .*at most 100; got True"), ({"percentile": "99"}, "percentile"),
    ({"percentile": math.nan}, "percentile"), ({"batches": 1.5}, "batches must be a whole number.*1.5"),
    ({"batches": "8"}, "batches"), ({"batches": True}, "batches"),
    ({"empty_range": "a"}, "empty_range must be.*above 0; got 'a'"), ({"empty_range": math.inf}, "empty_range"),
])  # fmt: skip
def test_calibration_arguments(rng, arguments, message):
    refused(ValueError, message, lambda: profit.calibrate_(tiny_net(rng), [X], **arguments))


MONITOR = [{"pooled": "yes"}, {"pooled": 1}, {"decay": "a"}, {"decay": math.nan}, {"every": 1.5}]


@pytest.mark.parametrize("arguments", MONITOR, ids=str)
def test_monitor_arguments(rng, arguments):
    refused(ValueError, f"^{next(iter(arguments))} must be .*got", lambda: profit.AIWQMonitor(tiny_net(rng), **arguments))


@pytest.mark.parametrize(("batch", "message"), [
    (torch.zeros(1, 4, 8, 8), "batch 2 of the loader .the last layer that it reached is 'stem'.: .*channels"),
    (X.long(), "batch 2 of the loader .*'stem'"), (X[0, 0], "batch 2 of the loader .*'stem'"),
    ({"image": X}, "batch 2 of the loader: "),
])  # fmt: skip
def test_batches_that_do_not_fit(rng, batch, message):
    net = tiny_net(rng)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    hooks = [len(m._forward_pre_hooks) for m in net.modules()]
    good = torch.randn(2, 3, 8, 8, generator=rng)
    refused(CalibrationError, f"^calibration: the model does not run on {message}",
            lambda: profit.calibrate_(net, [good, batch]))  # fmt: skip
    refused(CalibrationError, "^BatchNorm re-estimation: the model does not run on batch 2",
            lambda: profit.reestimate_bn_(net, [good, batch], 2))  # fmt: skip
    refused(TypeError, "loader must give batches, got 3", lambda: profit.calibrate_(net, 3))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [len(m._forward_pre_hooks) for m in net.modules()] == hooks


def test_too_small_an_image_names_the_layer():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    profit.quantize_(model, None, X)
    profit.calibrate_(model, [torch.ones_like(X)])
    pixel = X[..., :1, :1]
    refused(ValueError, "layer '2': the BatchNorm in front needs more than one value per channel", lambda: model(pixel))
    assert model[1].num_batches_tracked == 0


def test_an_error_without_text_is_named():
    class Asserting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            raise AssertionError

    refused(ConversionError, "does not run on example_inputs: AssertionError", lambda: profit.quantize_(Asserting(), None, X))
