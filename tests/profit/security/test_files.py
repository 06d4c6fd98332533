"""No file of a run, and no exported file, is run or leads elsewhere."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
import zlib
from html.parser import HTMLParser

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from profit.cli import main
from profit.errors import CheckpointError, ExportError, ProfitError
from profit.export import packed
from profit.export.onnx_runtime import load_onnx
from profit.files import sha256_of_tensors
from profit.report import write_report
from profit.train.network import METADATA_KEY, load_network, read_weights
from profit.train.runs import open_run
from tests.profit.report_sample import sample_results
from tests.profit.signing import signed
from tests.profit.train.tiny_run import tiny_recipe


def tampered(source, target, **changes):
    """A weight file whose architecture says something else, with a checksum that fits."""
    with safe_open(source, "pt") as file:
        description = json.loads(file.metadata()[METADATA_KEY])
    description["architecture"].update(changes)
    tensors = load_file(source)
    save_file(tensors, target, {METADATA_KEY: signed(json.dumps(description), tensors)})
    return target


ARCHITECTURES = [
    {"name": "hf-hub:user/net"}, {"name": "local-dir:/tmp"}, {"name": "http://127.0.0.1:9"},
    {"args": {"norm_layer": "os.system"}}, {"name": "mobilenetv2_100", "args": {"features_only": True}},
    {"name": "mobilenetv2_100", "args": {"act_layer": "os.system"}},
]  # fmt: skip


@pytest.mark.parametrize("changes", ARCHITECTURES)
def test_architectures_of_a_weight_file(changes, run, alarm, refused):
    tampered(run / "model.safetensors", run / "model.safetensors", **changes)
    for command in (("evaluate", run), ("export", run, "--format", "packed", "--out", run.parent / "x.safetensors")):
        assert "the network it is for cannot be built" in refused(*command)
    with pytest.raises(CheckpointError, match="cannot be built"):
        load_network(run / "model.safetensors")
    assert not (run.parent / "x.safetensors").exists() and not alarm


def test_architectures_of_a_checkpoint(run, alarm):
    """Its checksum is whoever's who wrote it."""
    from profit.train.checkpoint import checkpoints, load_checkpoint, save_checkpoint

    base = checkpoints(run / "checkpoints")[-1]
    state = load_checkpoint(base)
    state["architecture"]["name"] = "hf-hub:user/net"
    save_checkpoint(base, state)
    with pytest.raises(CheckpointError, match="cannot be built: model.name: 'hf-hub:user/net'"):
        load_network(base.with_suffix(".json"))


def test_first_weights_named_in_a_weight_file_are_not_opened(run, alarm):
    """They belong to files of an earlier version, and the file has weights of its own."""
    args = {"width": 0.34, "head": 16, "checkpoint_path": "/etc/passwd", "pretrained_cfg": {"url": "http://127.0.0.1:9"}}
    path = tampered(run / "model.safetensors", run.parent / "old.safetensors", args=args)
    assert load_network(path)[1].name == "digits_mobilenetv3"


LINKS = ["recipe.yaml", "results.json", "model.safetensors", "log.txt", ".results.json.tmp", "checkpoints/epoch-00099.json",
         "checkpoints/.epoch-00099.safetensors.new", "tensorboard/events", "checkpoints", "tensorboard"]  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
def test_links_of_a_run_folder_lead_nowhere_else(name, run, tmp_path, alarm):
    outside = tmp_path / "outside"
    outside.mkdir()
    victim = outside / "epoch-00001.json"
    victim.write_text("mine")
    link = run / name
    if link.is_dir():
        shutil.rmtree(link)
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    if name == "recipe.yaml":
        victim.write_text("run: {name: x}\n")
    kept = victim.read_text()
    link.symlink_to(outside if name in ("checkpoints", "tensorboard") else victim)
    for resume in (True, False):
        with pytest.raises(ProfitError, match=f"{link} is a link that leads out of the run folder"):
            open_run(run, tiny_recipe(), resume)
    assert victim.read_text() == kept and [entry.name for entry in outside.iterdir()] == [victim.name]


def test_a_log_that_is_a_link_is_not_written(run, tmp_path, refused):
    (tmp_path / "victim").write_text("mine")
    (run / "log.txt").unlink()
    (run / "log.txt").symlink_to(tmp_path / "victim")
    (run / "model.safetensors").unlink()  # so that the run is carried on
    assert "log.txt is a link that leads out" in refused("train", run, "--resume", "-q")
    assert (tmp_path / "victim").read_text() == "mine"


def test_links_within_a_run_folder_and_the_owners_own_are_left_alone(run, tmp_path):
    (run / "checkpoints" / "mine.json").symlink_to("best.json")
    (run / "my-data").symlink_to(tmp_path)
    assert main(["train", str(run), "--resume", "-q"]) == 0


def test_a_report_replaces_a_link_and_not_its_target(run, tmp_path):
    (tmp_path / "victim").write_text("mine")
    (run / "report.html").symlink_to(tmp_path / "victim")
    (run / "results.json").write_text(json.dumps(sample_results(1, blocks=1)))
    write_report(run)
    assert (tmp_path / "victim").read_text() == "mine" and not (run / "report.html").is_symlink()


def test_pipes_among_the_files_of_a_run_are_not_waited_for(run, alarm, refused):
    for name, command in (
        ("results.json", ("report", run)),
        ("recipe.yaml", ("evaluate", run)),
        ("model.safetensors", ("evaluate", run)),
        ("checkpoints/best.json", ("evaluate", run, "--checkpoint", run / "checkpoints" / "best.safetensors")),
    ):
        (run / name).rename(run / "kept")
        os.mkfifo(run / name)
        refused(*command)
        (run / name).unlink()
        (run / "kept").rename(run / name)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: set[tuple[str, ...]] = set()
        self.links: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.add((tag, *sorted(name for name, _ in attrs)))
        self.links |= {value for name, value in attrs if name in ("href", "src", "xlink:href", "action") and value}


PAYLOADS = [
    '"><script>alert(1)</script>', "'><img src=x onerror=alert(1)>", "</text></svg><svg onload=alert(1)>",
    "javascript:alert(1)", "</style><script>", "{{ 7 * 7 }}{% include 'x' %}", "$\\input{/etc/passwd}$", "]]><!--",
    "&lt;b&gt;\x00\x1b[31m\u202e",
]  # fmt: skip


def test_names_in_results_are_text_in_the_report(tmp_path, alarm):
    def text(value):  # the same name gets the same end wherever it stands
        return value + PAYLOADS[zlib.crc32(value.encode()) % len(PAYLOADS)]

    def spoilt(value):
        if isinstance(value, dict):
            named = {"weights", "scores"}
            return {key: {text(name): spoilt(item) for name, item in inner.items()} if key in named else spoilt(inner)
                    for key, inner in value.items()}  # fmt: skip
        if isinstance(value, list):
            return [spoilt(item) for item in value]
        return text(value) if isinstance(value, str) else value

    results = sample_results(1, blocks=2)
    results["run"]["name"], results["run"]["device"] = "".join(PAYLOADS), PAYLOADS[5]
    results["layers"][0]["type"] = "".join(PAYLOADS)
    pages = []
    for content in (sample_results(1, blocks=2), spoilt(results)):
        (tmp_path / "results.json").write_text(json.dumps(content))
        pages.append(write_report(tmp_path).read_text(encoding="utf-8"))
    plain, hostile = map(Page, pages)
    assert hostile.elements <= plain.elements and "script" not in {element[0] for element in hostile.elements}
    assert not any(attribute.startswith("on") for element in hostile.elements for attribute in element[1:])
    assert all(link.startswith(("#", "data:,")) for link in hostile.links)
    assert "{{ 7 * 7 }}" in pages[1] and "<dd>{{ 7" not in pages[0]
    assert not alarm


def repacked(source, target, change):
    """A packed file whose description was changed, with a checksum that fits."""
    tensors = load_file(source)
    text = change(zlib.decompress(tensors["description"].numpy().tobytes()))
    tensors["description"] = torch.frombuffer(bytearray(zlib.compress(text, 9)), dtype=torch.uint8)
    digest = sha256_of_tensors(f"{packed.FORMAT} {packed.VERSION}", tensors)
    head = {"format": packed.FORMAT, "version": packed.VERSION, "sha256": digest}
    save_file(tensors, target, {packed.METADATA_KEY: json.dumps(head)})
    return target


def test_descriptions_that_swell(finished, tmp_path, alarm, refused):
    path = repacked(finished.parent / "net.safetensors", tmp_path / "bomb.safetensors", lambda text: b" " * 2**27)
    assert path.stat().st_size < 2**20
    assert "its description is longer than" in refused("verify", path, "--against", finished)


def test_operators_of_a_packed_file_are_those_of_the_table(finished, tmp_path, alarm):
    def change(text):
        description = json.loads(text)
        description["network"]["steps"][0].update(op="os.system", inputs=["touch CANARY"])
        return json.dumps(description).encode()

    path = repacked(finished.parent / "net.safetensors", tmp_path / "net.safetensors", change)
    with pytest.raises(ExportError, match="unknown operator 'os.system'"):
        packed.read_packed(path)


def test_a_program_is_not_opened_without_trust(finished, tmp_path, alarm, refused):
    with zipfile.ZipFile(tmp_path / "net.pt2", "w") as archive:
        archive.writestr("data.pkl", b"cos\nsystem\n(S'touch CANARY'\ntR.")
    assert "--trust" in refused("verify", tmp_path / "net.pt2", "--against", finished)


@pytest.fixture(scope="module")
def onnx_file(finished, tmp_path_factory):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    assert main(["export", str(finished), "--format", "onnx", "--out", str(path)]) == 0
    return path


def test_onnx_files_of_strangers(onnx_file, finished, tmp_path, alarm, refused):
    import onnx

    secret = tmp_path / "secret"
    secret.write_bytes(b"\x00" * 4096)

    def outside(proto):
        tensor = proto.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=str(secret))

    def outside_in_a_node(proto):
        tensor = onnx.numpy_helper.from_array(torch.zeros(1).numpy(), "t")
        tensor.external_data.add(key="location", value="../../../../etc/passwd")
        proto.graph.node.append(onnx.helper.make_node("Constant", [], ["t"], value=tensor))

    def custom(proto):
        proto.graph.node[0].domain = "evil.example"

    def loop(proto):
        body = onnx.helper.make_graph([], "body", [], [])
        proto.graph.node.append(onnx.helper.make_node("Loop", ["", ""], ["forever"], body=body))

    def function(proto):
        proto.functions.add(name="f", domain="x")

    for change, message in (
        (outside, "lies in another file"), (outside_in_a_node, "lies in another file"),
        (custom, "is a evil.example"), (loop, "is a ONNX 'Loop'"), (function, "it holds functions"),
    ):  # fmt: skip
        proto = onnx.load_model(onnx_file)
        change(proto)
        path = tmp_path / "net.onnx"
        path.write_bytes(proto.SerializeToString())
        with pytest.raises(ExportError, match=message):
            load_onnx(path)
    assert "it holds functions" in refused("verify", path, "--against", finished)
    with pytest.raises(ExportError, match="there is no ONNX file"):
        load_onnx("http://127.0.0.1:9/net.onnx")


def test_weight_files_are_local_files(tmp_path, alarm, refused, run):
    for name in ("http://127.0.0.1:9/w.safetensors", "pipe:touch CANARY", "hf-hub:user/net"):
        with pytest.raises(CheckpointError):
            read_weights(name)
        refused("evaluate", run, "--checkpoint", name)
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    values["model"]["init"] = values["teacher"]["source"] = "http://127.0.0.1:9/w.safetensors"
    (run / "recipe.yaml").write_text(yaml.safe_dump(values))
    assert "model.init: " in refused("train", run, "--out", tmp_path / "new")
