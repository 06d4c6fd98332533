"""Choosing a backend: by name or not at all, never in silence."""

from __future__ import annotations

import logging

import pytest
import torch

import profit_kernels as pk
from profit_kernels import dispatch

X = torch.rand(2, 3, 4, 4)
ONE = torch.ones(1)


def test_a_backend_asked_for_by_name_raises_where_it_cannot_serve():
    with (
        pk.use_backend("cuda"),
        pytest.raises(pk.BackendError, match=r"'cuda' cannot serve duq on cpu .*These can: reference"),
    ):
        pk.duq_fake_quantize(X, ONE, ONE, bits=4)
    with pk.use_backend("cuda"), pytest.raises(pk.BackendError, match="depthwise"):
        pk.depthwise_conv2d(X, torch.zeros(3, 1, 3, 3))
    with pk.use_backend("triton", ops=["duq"]), pytest.raises(pk.BackendError, match="float64"):
        pk.duq_fake_quantize(X.double(), ONE.double(), ONE.double(), bits=4)


def test_use_backend_restores_the_choice_also_after_an_error():
    before = dict(dispatch._choice)
    with pytest.raises(KeyError), pk.use_backend("reference"):
        assert set(dispatch._choice.values()) == {"reference"}
        raise KeyError
    assert dispatch._choice == before


@pytest.mark.parametrize("name", ["Triton", "", "gpu"])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="unknown backend"):
        pk.set_backend(name)
    with pytest.raises(ValueError, match="unknown operator"):
        pk.set_backend("reference", ops=["conv"])


def test_environment_setting():
    assert set(dispatch._parse("").values()) == {"auto"}
    assert set(dispatch._parse("reference").values()) == {"reference"}
    mixed = dispatch._parse("duq=cpp, aiwq=reference")
    assert (mixed["duq"], mixed["aiwq"], mixed["depthwise"]) == ("cpp", "reference", "auto")
    with pytest.raises(ValueError, match="unknown backend"):
        dispatch._parse("duq=fast")


def test_auto_never_picks_the_interpreter():
    assert set(dispatch.plan("cpu").values()) <= {"cpp", "reference"}
    assert dispatch.plan("cpu", torch.complex64)["duq"] == "reference"


def test_the_choice_is_logged_once(caplog):
    dispatch._logged.clear()
    with caplog.at_level(logging.INFO, logger="profit_kernels"), pk.use_backend("auto"):
        for _ in range(3):
            pk.duq_fake_quantize(X, ONE, ONE, bits=4)
    assert len([r for r in caplog.records if r.message.startswith("duq on cpu")]) == 1


def test_available_backends():
    assert "reference" in pk.available_backends()
    assert "cuda" not in pk.available_backends()
    assert "reference" in pk.available_backends("cuda")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"bits": 1}, ValueError, "from 2 to 8"),
        ({"bits": 9}, ValueError, "from 2 to 8"),
        ({"bits": True}, ValueError, "from 2 to 8"),
        ({"bits": 4.0}, ValueError, "from 2 to 8"),
        ({"activation": "gelu"}, ValueError, "activation must be one of"),
        ({"offset": 0.1}, ValueError, "at most 0"),
        ({"offset": -0.375, "signed": True}, ValueError, "signed quantizer has no offset"),
        ({"x": torch.zeros(3, dtype=torch.int32)}, TypeError, "floating point"),
        ({"a": torch.ones(5)}, ValueError, "one value, or one per channel"),
        ({"c": torch.ones(2, 1)}, ValueError, "one value, or one per channel"),
        ({"a": torch.ones(1, device="meta")}, ValueError, "move them to one device"),
    ],
)
def test_bad_arguments_of_the_quantizer(arguments, error, message):
    with pytest.raises(error, match=message):
        pk.duq_fake_quantize(**({"x": X, "a": ONE, "c": ONE, "bits": 4} | arguments))


def test_a_string_for_a_list_of_operators():
    with pytest.raises(TypeError, match=r"ops must be a list of operators, got the string 'duq': write ops=\['duq'\]"):
        pk.set_backend("cpp", ops="duq")
