"""A single flipped bit, wherever it is, is noticed in every file that holds weights."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import profit
from profit import DuQConfig, quantize_
from profit.errors import CheckpointError, ExportError
from profit.train.checkpoint import load_checkpoint, save_checkpoint
from profit.train.network import Architecture, load_network, network_state, read_weights, save_network
from profit.train.teacher import own_teacher
from tests.profit.signing import signed

FLIPS = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One file of every kind, of a small network."""
    folder = tmp_path_factory.mktemp("files")
    architecture = Architecture("digits_mobilenetv3", 2, 1, 16, {"width": 0.34, "head": 16, "drop_rate": 1e-5}, ("ä", "b"))
    model, images = architecture.build(), architecture.example_input()
    quantize_(model, DuQConfig(None, None), images)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            torch.nn.init.normal_(buffer)
    own_teacher(model, architecture, folder / "teacher.safetensors", stored=False)
    profit.set_bits(model, weight_bits=4, act_bits=4)
    profit.calibrate_(model, [(images, None)], batches=1)
    save_network(folder / "model.safetensors", model, architecture, {"accuracy": 1e-5})
    save_checkpoint(folder / "epoch-00001", {**network_state(model, architecture), "lr": 1e-5, "best": {"4": 99.5}})
    profit.export_packed(model.eval(), folder / "packed.safetensors", images)
    return folder


READ = {
    "model.safetensors": read_weights,
    "teacher.safetensors": read_weights,
    "epoch-00001.json": load_checkpoint,
    "epoch-00001.safetensors": load_checkpoint,
    "packed.safetensors": profit.read_packed,
}


def flip(path, bit: int):
    """Read the file with one bit flipped, and put it back."""
    data = path.read_bytes()
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(damaged)
    try:
        READ[path.name](path)
    except (CheckpointError, ExportError) as error:
        return str(error)
    finally:
        path.write_bytes(data)
    return None


def regions(data: bytes) -> dict[str, range]:
    """The bytes of each part of a .safetensors file."""
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length]
    return {
        "header length": range(8), "header": range(8, 8 + length), "tensors": range(8 + length, len(data)),
        "padding of the header": range(8 + len(header.rstrip()), 8 + length),
        "metadata": range(8 + header.index(b"__metadata__"), 8 + header.index(b"}}") if b"}}" in header else 8 + length),
    }  # fmt: skip


def some(places: range, count: int, rng) -> list[int]:
    """Random bits of these bytes."""
    return torch.randint(8 * places.start, 8 * places.stop, (count,), generator=rng).tolist() if places else []


@pytest.mark.parametrize("name", READ)
def test_64_of_64_are_noticed(name, folder, rng) -> None:
    path = folder / name
    READ[name](path)
    bits = some(range(path.stat().st_size), FLIPS, rng)
    unnoticed = [bit for bit in bits if flip(path, bit) is None]
    assert len(bits) == FLIPS and not unnoticed, f"bits {unnoticed}"


@pytest.mark.parametrize("name", [name for name in READ if name.endswith("safetensors") and "epoch" not in name])
def test_in_every_part_of_the_file(name, folder, rng) -> None:
    path = folder / name
    for part, places in regions(path.read_bytes()).items():
        for bit in some(places, 8, rng):
            assert flip(path, bit), f"{part}: bit {bit}"


def test_every_bit_of_what_tells_the_format(tmp_path) -> None:
    """A file that has a checksum must never become one that needs none, or plain weights."""
    path = tmp_path / "model.safetensors"
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1))
    architecture = Architecture("tiny", 2, 1, 4, {})
    quantize_(model, DuQConfig(None, None), architecture.example_input())
    save_network(path, model, architecture, {})
    data = path.read_bytes()
    for text in (b'"__metadata__"', b'"profit"', b'format\\": \\"profit-model-2\\', b"sha256"):
        start = data.index(text)
        for bit in range(8 * start, 8 * (start + len(text))):
            assert flip(path, bit), f"{text.decode()}: bit {bit - 8 * start}"


def test_numbers_and_letters_that_mean_the_same_after_a_flip(folder) -> None:
    """1e-05 and 1E-05, \\u00e4 and \\u00E4."""
    for name, text in (("model.safetensors", b"1e-05"), ("model.safetensors", b"u00e4"), ("epoch-00001.json", b"1e-05")):
        data = (folder / name).read_bytes()
        assert "checksum" in flip(folder / name, 8 * (data.index(text) + text.index(b"e")) + 5), (name, text)


def test_what_is_appended_or_exchanged_is_noticed(folder, tmp_path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    tensors, target = load_file(folder / "model.safetensors"), tmp_path / "w.safetensors"
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    for more in (b"\0", b" ", b"\n"):
        target.write_bytes(data + more)
        with pytest.raises(CheckpointError):
            read_weights(target)
    names = [name for name in tensors if name.endswith("running_mean")][:2]
    other = {**tensors, names[0]: tensors[names[1]], names[1]: tensors[names[0]]}
    wider = {**tensors, names[0]: tensors[names[0]].double()}
    for changed in (other, wider, {**tensors, "more": torch.zeros(1)}):
        save_file(changed, target, metadata)
        with pytest.raises(CheckpointError, match="its checksum does not match its content"):
            read_weights(target)
    save_file(tensors, target, metadata)  # another program's copy of the same content
    assert read_weights(target).architecture.class_names == ("ä", "b")


def test_a_checksum_is_not_missed_by_leaving_it_out(folder, tmp_path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    description = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["profit"])
    assert description["format"] == "profit-model-2"
    tensors, target = load_file(folder / "model.safetensors"), tmp_path / "w.safetensors"
    for digest in (None, "", 5, [], "0" * 64):
        save_file(tensors, target, {"profit": json.dumps(description | {"sha256": digest})})
        with pytest.raises(CheckpointError, match="its checksum does not match its content"):
            read_weights(target)
    del description["sha256"]
    save_file(tensors, target, {"profit": json.dumps(description)})
    with pytest.raises(CheckpointError, match="its checksum does not match its content"):
        read_weights(target)


def test_files_of_the_first_format_are_still_read(folder, tmp_path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    description = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["profit"])
    first = {key: description[key] for key in ("architecture", "quantization", "note")} | {"format": "profit-model-1"}
    save_file(load_file(folder / "model.safetensors"), tmp_path / "w.safetensors", {"profit": json.dumps(first)})
    (old, architecture), (new, named) = load_network(tmp_path / "w.safetensors"), load_network(folder / "model.safetensors")
    assert architecture == named and architecture.class_names == () and named.class_names == ("ä", "b")
    images = architecture.example_input()
    assert torch.equal(old(images), new(images))


@pytest.mark.parametrize("names", [["a"], "ab", [1, 2], {"a": 1, "b": 2}, 5])
def test_class_names_that_are_none(names, folder, tmp_path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["profit"]) | {"class_names": names})
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, tmp_path / "w.safetensors", {"profit": signed(text, tensors)})
    with pytest.raises(CheckpointError, match="its class names are not 2 texts"):
        load_network(tmp_path / "w.safetensors")
