"""Ways to damage a file, for the suite fuzz: its bytes, the values it holds, or the nodes of its graph."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

EXTREMES: tuple[Any, ...] = (
    0, -1, 1, 10**6, 10**12, 10**40, -(10**30), 0.0, -0.5, 1e-300, 1e30, 1e308, float("inf"), float("nan"), True, None, "", "x",
    "[red]", "[/]", "\u00fc\U0001f600", "\ud800", "a\0b", "../x", "a/b", "1e9", "%s{0}", [], [[]], {}, {"a": {"b": [1]}},
    ["x"] * 50, "y" * 5000,
)  # fmt: skip


def damaged_bytes(data: bytes, random: Random) -> tuple[bytes, str]:
    """`data` with one damage, and its name."""
    size = max(len(data), 1)
    kind = random.choice(("bit",) * 6 + ("cut", "empty", "zeros", "noise", "twice", "front", "lines", "nul", "tail"))
    at = random.randrange(size)
    if kind == "bit":
        return data[:at] + bytes([(data[at] if data else 0) ^ 1 << random.randrange(8)]) + data[at + 1 :], f"bit at {at}"
    length = random.randint(1, max(size // 8, 1))
    made = {
        "cut": data[:at], "empty": b"", "zeros": data[:at] + bytes(length) + data[at + length :],
        "noise": data[:at] + random.randbytes(length) + data[at + length :], "twice": data[: at + length] + data[at:],
        "front": random.choice((b"\xef\xbb\xbf", b"\xff\xfe", b"PK\x03\x04", b"\n\n")) + data,
        "lines": data.replace(b"\n", b"\r\n"), "nul": data[:at] + b"\0" + data[at:], "tail": data + random.randbytes(length),
    }  # fmt: skip
    return made[kind], f"{kind} at {at}"


def damaged_values(tree: Any, random: Random) -> tuple[Any, str]:
    """A copy of nested mappings and lists with one of its values, or keys, changed."""
    tree = copy.deepcopy(tree)
    places: list[tuple[Any, Any, str]] = []

    def walk(value: Any, where: str) -> None:
        pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in pairs:
            places.append((value, key, f"{where}.{key}"))
            walk(inner, f"{where}.{key}")

    walk(tree, "")
    if not places:
        return tree, "nothing to change"
    # deep places are many: without this, sections would hardly ever be hit
    depth = random.randint(1, 8)
    chosen = [place for place in places if place[2].count(".") <= depth] or places
    holder, key, where = random.choice(chosen)
    kind = random.choice(("extreme",) * 6 + ("delete", "rename", "twice", "deep", "text"))
    if kind == "extreme":
        holder[key] = random.choice(EXTREMES)
    elif kind == "delete" or (kind in ("rename", "twice") and isinstance(holder, list) is (kind == "rename")):
        del holder[key]
    elif kind == "rename":
        holder[random.choice(("unknown", "\ud800", "", str(key) + "x"))] = holder.pop(key)
    elif kind == "twice":
        holder += holder
    elif kind == "deep":
        for _ in range(random.choice((5, 60, 900))):
            holder[key] = [holder[key]]
    else:
        holder[key] = json.dumps(holder[key])[:100]
    return tree, f"{kind} {where[:60]}"


def _tensors_file(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def damaged_safetensors(data: bytes, random: Random) -> tuple[bytes, str]:
    """Its bytes, or its header with one value changed, or what its metadata tell in JSON."""
    if random.random() < 0.6:
        return damaged_bytes(data, random)
    size = struct.unpack("<Q", data[:8])[0]
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    metadata = header.get("__metadata__", {})
    if metadata and random.random() < 0.6:
        key = random.choice(sorted(metadata))
        try:
            told, what = damaged_values(json.loads(metadata[key]), random)
            metadata[key] = json.dumps(told)
        except ValueError:
            metadata[key], what = "{", "metadata"
    else:
        header, what = damaged_values(header, random)
    return _tensors_file(header, rest), f"header: {what}"


def damaged_checkpoint(data: bytes, random: Random) -> tuple[bytes, str]:
    """The .json of a checkpoint, with checksums that are right: what only somebody who knows the format can make."""
    head = json.loads(data)
    state, what = damaged_values(head["state"], random)
    text = json.dumps(state)
    # as it is read back: a key that stands twice, or a text for a number, changes what is summed
    head |= {"state": state, "state_sha256": hashlib.sha256(json.dumps(json.loads(text)).encode()).hexdigest()}
    return json.dumps(head).encode(), f"crafted: {what}"


def damaged_onnx(data: bytes, random: Random) -> tuple[bytes, str]:
    """Its bytes, or its graph: nodes, tensors, names, versions."""
    if random.random() < 0.5:
        return damaged_bytes(data, random)
    import onnx

    model = onnx.load_model_from_string(data)
    graph = model.graph
    node, tensor = random.choice(graph.node), random.choice(graph.initializer)
    elsewhere = onnx.StringStringEntryProto(key="location", value="/etc/passwd")
    edits: dict[str, Callable[[], Any]] = {
        "node gone": lambda: graph.node.remove(node),
        "another operator": lambda: setattr(node, "op_type", random.choice(("Relu", "Loop", "Identity", "Nope", "MatMul"))),
        "another input": lambda: node.input.__setitem__(0, random.choice(("nowhere", "input", ""))),
        "no attributes": lambda: node.ClearField("attribute"),
        "tensor gone": lambda: graph.initializer.remove(tensor),
        "huge dims": lambda: tensor.dims.__setitem__(slice(None), [10**6] * 4),
        "negative dims": lambda: tensor.dims.append(-1),
        "another type": lambda: setattr(tensor, "data_type", random.randint(0, 30)),
        "no numbers": lambda: tensor.ClearField("raw_data"),
        "other numbers": lambda: setattr(tensor, "raw_data", random.randbytes(len(tensor.raw_data))),
        "in another file": lambda: tensor.MergeFrom(onnx.TensorProto(data_location=1, external_data=[elsewhere])),
        "no opset": lambda: model.ClearField("opset_import"),
        "opset": lambda: setattr(model.opset_import[0], "version", random.choice((0, 1, 7, 99, 10**9))),
        "domain": lambda: setattr(node, "domain", "com.example"),
        "no metadata": lambda: model.ClearField("metadata_props"),
        "variant": lambda: setattr(model.metadata_props[0], "value", "integer"),
        "no input": lambda: graph.ClearField("input"),
        "output": lambda: setattr(graph.output[0], "name", "another"),
        "input type": lambda: graph.input[0].type.tensor_type.__setattr__("elem_type", 7),
        "no graph": lambda: model.ClearField("graph"),
        "version": lambda: setattr(model, "ir_version", random.choice((0, 1, 999))),
    }  # fmt: skip
    name = random.choice(sorted(edits))
    edits[name]()
    return model.SerializeToString(), f"graph: {name}"
