"""Recipes and weight files that are broken or made to do harm: one line with the name, and nothing is executed."""

from __future__ import annotations

import json
import os
import pickle
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from profit.errors import CheckpointError, RecipeError
from profit.models import create_model
from profit.train.network import Architecture, load_network, load_weights, read_weights, save_network
from profit.train.recipe_io import apply_overrides, load_recipe, parse_recipe
from profit.train.teacher import load_teacher
from tests.profit.signing import signed

BOMB = "a: &a [x]\n" + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefg", "bcdefgh", strict=True))
TEXTS = {
    "tab": ("model:\n\tname: x\n", "not valid YAML: line 2.*spaces, not tabs"),
    "key twice": ("schedule:\n  lr: 0.1\n  lr: 0.2\n", "line 3: the key lr stands there twice"),
    "section twice": ("data: {fold: 1}\ndata: {fold: 2}\n", "line 2: the key data stands there twice"),
    "alias bomb": (BOMB, "line 2: a recipe has no aliases"),
    "recursive alias": ("model: &m {args: *m}\n", "no aliases"),
    "deep list": ("model: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    "deep mapping": ("model: " + "{a: " * 3000 + "1" + "}" * 3000, "nested too deeply"),
    "python tag": ("model: !!python/object/apply:os.system ['false']\n", "could not determine a constructor"),
    "two documents": ("model: {}\n---\ndata: {}\n", "another document"),
    "list as key": ("? [a]\n: 2\n", "unhashable key"),
    "impossible date": ("run: {name: 2020-99-99}\n", "month must be in|holds a value"),
    "not a mapping": ("- a\n", "a recipe is a mapping of sections"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_recipes_that_are_no_recipes(name, tmp_path):
    text, message = TEXTS[name]
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_recipes_in_another_encoding_and_aliases_on_the_command_line(tmp_path):
    (tmp_path / "r.yaml").write_bytes("model: {}".encode("utf-16"))
    with pytest.raises(RecipeError, match="no text in UTF-8"):
        load_recipe(tmp_path / "r.yaml")
    with pytest.raises(RecipeError, match="--set model.args.*no aliases"):
        apply_overrides({}, ["model.args=&a [*a]"])


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("data", "batch_size", 0, "data.batch_size must be at least 1, got 0"),
        ("data", "image_size", 10**8, r"data.image_size must lie in 1..4096"),
        ("data", "workers", -1, "data.workers must lie in 0..1024"),
        ("data", "in_chans", 7, "data.in_chans must be one of 1, 3, got 7"),
        ("data", "std", [0.5, 0, 1], "data.std must be above 0, got 0"),
        ("data", "scale", [0.9, 0.1], "data.scale must be two numbers, the smaller one first"),
        ("data", "interpolation", "magic", "data.interpolation must be one of bilinear"),
        ("calibration", "percentile", 400, "calibration.percentile must be above 0 and at most 100"),
        ("optim", "momentum", 7, "optim.momentum must be at least 0 and below 1"),
        ("optim", "clip_grad", -1, "optim.clip_grad must be above 0"),
        ("ema", "decay", float("nan"), "ema.decay must be a finite number"),
        ("schedule", "lr", float("inf"), "schedule.lr must be a finite number"),
        ("run", "seed", 10**30, "run.seed must lie in"),
        ("run", "name", "../../etc", "run.name must be a plain name"),
        ("run", "name", "..", "run.name must be a plain name"),
        ("run", "threads", 0, "run.threads must lie in 1..4096"),
    ],
)
def test_values_out_of_range_are_named(section, key, value, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe({section: {key: value}})


def test_every_limit_belongs_to_a_setting():
    """A limit of a setting that was renamed would never be looked at."""
    from profit.train import limits
    from profit.train.recipe_io import recipe_dict

    known = {f"{section}.{key}" for section, values in recipe_dict(parse_recipe({})).items() for key in values}
    assert {*limits.LIMITS, *limits.POSITIVE, *limits.FRACTIONS, *limits.CHOICES} <= known


def test_a_teacher_of_other_classes_is_no_teacher():
    architecture = Architecture("digits_mobilenetv3", 10, 3, 16, {})
    with pytest.raises(RecipeError, match="teacher.source: resnet18 has 1000 classes and 3 .* the student 10 and 3"):
        load_teacher("resnet18", architecture, torch.device("cpu"), pretrained=False)
    with pytest.raises(RecipeError, match="teacher.source: 'resnet81' is neither"):
        load_teacher("resnet81", architecture, torch.device("cpu"))


class Harm:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("name", ["w.pth", "w.pkl", "w", "w.safetensors", "model.bin"])
def test_pickles_are_refused_unopened(name, tmp_path):
    mark = tmp_path / "executed"
    (tmp_path / name).write_bytes(pickle.dumps(Harm(str(mark))))
    with pytest.raises(CheckpointError) as caught:
        read_weights(tmp_path / name)
    assert not mark.exists() and "\n" not in str(caught.value) and name in str(caught.value)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A saved network, its file's header and the rest of the file."""
    from profit import DuQConfig, quantize_

    architecture = Architecture("digits_mobilenetv3", 10, 1, 16, {"width": 0.5, "head": 32})
    model = architecture.build()
    quantize_(model, DuQConfig(None, None), architecture.example_input())
    path = tmp_path_factory.mktemp("network") / "model.safetensors"
    save_network(path, model, architecture, {})
    return path


def rewritten(source, target, change):
    """`source` with its description changed, and a checksum that fits: a file made to deceive."""
    data = source.read_bytes()
    length = int.from_bytes(data[:8], "little")
    head = json.loads(data[8 : 8 + length])
    head["__metadata__"]["profit"] = signed(change(head["__metadata__"]["profit"]), load_file(source))
    text = json.dumps(head).encode()
    target.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return target


def edited(*keys, value):
    def change(text):
        description = json.loads(text)
        place = description
        for key in keys[:-1]:
            place = place[key if key is not None else next(iter(place))]
        place[keys[-1]] = value
        return json.dumps(description)

    return change


DESCRIPTIONS = {
    "cut off": (lambda text: text[:50], "not JSON"),
    "deep": (lambda text: "[" * 100_000, "not JSON"),
    "a list": (lambda text: "[1]", "another format"),
    "another version": (edited("format", value="profit-model-9"), "another version"),
    "no architecture": (edited("architecture", value=None), "architecture .* not readable"),
    "classes as text": (edited("architecture", "classes", value="many"), r"not readable \(classes\)"),
    "10^15 classes": (edited("architecture", "classes", value=10**15), "must lie in 1..1000000"),
    "unknown network": (edited("architecture", "name", value="nope"), "cannot be built.*nope"),
    "no quantization": (edited("quantization", value=None), "does not tell how its network is quantized"),
    "99 bits": (edited("quantization", "layers", None, "weight_bits", value=99), "damaged: weight_bits=99"),
    "own bits": (edited("quantization", "layers", None, "own_bits", value=3), "damaged"),
    "offset": (edited("quantization", "layers", None, "offset", value="x"), "damaged"),
    "fused from": (edited("quantization", "layers", None, "fused_from", value=5), "another architecture"),
    "configuration": (edited("quantization", "config", value={"weight_bits": "x"}), "configuration .* damaged"),
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_descriptions_that_do_not_describe(name, network, tmp_path):
    change, message = DESCRIPTIONS[name]
    path = rewritten(network, tmp_path / "w.safetensors", change)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_network(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_weight_file_cannot_have_another_file_opened(network, tmp_path):
    mark, pickled = tmp_path / "executed", tmp_path / "w.pth"
    pickled.write_bytes(pickle.dumps(Harm(str(mark))))
    path = rewritten(network, tmp_path / "w.safetensors", edited("architecture", "args", "checkpoint_path", value=str(pickled)))
    model, _ = load_network(path)  # the argument is not passed on
    assert not mark.exists() and sum(p.numel() for p in model.parameters()) > 0


@pytest.mark.parametrize("cut", [0, 5, 20, 3000])
def test_truncated_weights(cut, network, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(network.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="w.safetensors is not a readable .safetensors file"):
        read_weights(tmp_path / "w.safetensors")


def fresh():
    return create_model("digits_mobilenetv3", classes=10, in_chans=1)


TENSORS = {
    "missing": (lambda state: state.pop("conv_stem.weight"), "lacks conv_stem.weight"),
    "unknown": (lambda state: state.update(extra=torch.zeros(1)), "has the unknown extra"),
    "shape": (lambda state: state.update({"conv_stem.weight": torch.zeros(1)}), "another shape for conv_stem.weight"),
    "int8": (lambda state: state.update({"conv_stem.weight": state["conv_stem.weight"].to(torch.int8)}), "other than floating"),
    "complex": (lambda state: state.update({"conv_stem.weight": state["conv_stem.weight"].cfloat()}), "other than floating"),
    "nan": (lambda state: state["conv_stem.weight"].view(-1)[3:4].fill_(float("nan")), "NaN or infinity in conv_stem.weight"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit(name, tmp_path):
    change, message = TENSORS[name]
    state = {key: value.clone() for key, value in fresh().state_dict().items()}
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    model = fresh()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=f"w.safetensors does not fit this model: it .*{message}"):
        load_weights(model, read_weights(tmp_path / "w.safetensors").state, tmp_path / "w.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_what_may_differ_is_allowed_by_name(tmp_path):
    model, other = fresh(), create_model("digits_mobilenetv3", classes=7, in_chans=1)
    head = model.classifier.weight.clone()
    save_file({**other.state_dict(), "extra.x": torch.zeros(1)}, tmp_path / "w.safetensors")
    state = load_file(tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="another shape for classifier"):
        load_weights(model, state, "w", ["extra.*"])
    with pytest.raises(CheckpointError, match="no tensor that differs .*is called 'clasifier"):
        load_weights(model, state, "w", ["clasifier.*", "extra.*"])
    load_weights(model, state, "w", ["classifier.*", "extra.*"])
    assert torch.equal(model.classifier.weight, head) and torch.equal(model.conv_stem.weight, other.conv_stem.weight)
