"""No text of a recipe reaches a library that could fetch or run what it says."""

from __future__ import annotations

import copy
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from profit import allowed
from profit.cli import main
from profit.data import create_data
from profit.errors import DataError, ProfitError, RecipeError, one_line
from profit.models import create_model
from profit.train import recipe_io
from profit.train.network import Architecture
from profit.train.recipe import DataRecipe
from profit.train.recipe_io import dump_recipe, load_recipe, parse_recipe, recipe_dict, stored_dict
from profit.train.teacher import load_teacher
from tests.profit.train.tiny_run import VALUES, tiny_recipe

WDS = {"name": "wds/x"}
HOSTILE = [
    ({"data": {**WDS, "path": "pipe:touch CANARY;"}}, "data.path: .*pipe:"),
    ({"data": {**WDS, "path": "PIPE:touch CANARY;"}}, "data.path: .*PIPE:"),
    ({"data": {**WDS, "path": "http://127.0.0.1:9/x"}}, "data.path: .*http:"),
    ({"data": {**WDS, "path": "https://127.0.0.1:9/x"}}, "data.path: .*https:"),
    ({"data": {**WDS, "path": "gs://bucket/x"}}, "data.path: .*gs:"),
    ({"data": {**WDS, "path": "hf://datasets/x/y"}}, "data.path: .*hf:"),
    ({"data": {**WDS, "path": "s3://bucket"}}, "data.path: .*s3:"),
    ({"data": {**WDS, "path": "hdfs:/x"}}, "data.path: .*hdfs:"),
    ({"data": {**WDS, "path": "scp://host/x"}}, "data.path: .*scp:"),
    ({"data": {**WDS, "path": "file:/etc/passwd"}}, "data.path: .*file:"),
    ({"data": {**WDS, "path": "x::pipe:touch CANARY"}}, "data.path: .*'::'"),
    ({"data": {**WDS, "path": "touch CANARY|"}}, r"data.path: .*'\|'"),
    ({"data": {**WDS, "path": "-"}}, "data.path: .*leading -"),
    ({"data": {**WDS, "path": "~/x"}}, "data.path: .*leading ~"),
    ({"data": {**WDS, "path": "x\npipe:touch CANARY"}}, "data.path: .*control character"),
    ({"data": {**WDS, "path": "x\x1b]0;y\x07"}}, "control character|special characters"),
    ({"data": {**WDS, "train_split": "pipe:touch CANARY;.tar"}}, "data.train_split: "),
    ({"data": {**WDS, "train_split": "x.tar::pipe:touch CANARY"}}, "data.train_split: "),
    ({"data": {**WDS, "train_split": "${HOME}.tar"}}, "data.train_split: "),
    ({"data": {**WDS, "test_split": "/etc/x.tar"}}, "data.test_split: .*leads out"),
    ({"data": {**WDS, "test_split": "../x.tar"}}, "data.test_split: .*leads out"),
    ({"data": {**WDS, "test_split": "{a,..}/x.tar"}}, None),  # a name with two dots, looked at once it is expanded
    ({"data": {**WDS, "test_split": "x-{0..999999999}.tar"}}, "data.test_split: .*more than 100000 files"),
    ({"data": {**WDS, "test_split": "{0..999}{0..999}.tar"}}, "data.test_split: .*more than 100000 files"),
    ({"data": {**WDS, "test_split": "{{0..9},a}.tar"}}, "data.test_split: .*(braces|leads)"),
    ({"data": {"name": "wds/pipe:touch CANARY"}}, "unknown data.name"),
    ({"data": {"name": "WDS/x"}}, "unknown data.name"),
    ({"data": {"name": "hfds/user/set"}}, "data.name: 'hfds/user/set' would .* export the images"),
    ({"data": {"name": "HFDS/user/set"}}, "data.name: .*would"),
    ({"data": {"name": "hfids/user/set"}}, "data.name: .*would"),
    ({"data": {"name": "tfds/mnist"}}, "data.name: .*tensorflow-datasets"),
    ({"data": {"name": "torch/imagenet"}}, "timm cannot open .*known are torch/cifar10"),
    ({"data": {"name": "torch/image_folder"}}, "timm cannot open"),
    ({"data": {"name": "torch/inaturalist"}}, "timm cannot open"),
    ({"data": {"name": "torch/x/mnist"}}, "timm cannot open"),
    ({"data": {"name": "my/images"}}, "unknown data.name"),
    ({"data": {"name": "https://127.0.0.1:9/x"}}, "unknown data.name"),
    ({"data": {"name": "imagefolder:pipe:touch CANARY"}}, "data.name: .*pipe:"),
    ({"data": {"name": "imagefolder", "path": "http://127.0.0.1:9"}}, "data.path: .*http:"),
    ({"data": {"name": "torch/mnist", "path": "pipe:touch CANARY"}}, "data.path: .*pipe:"),
    ({"data": {"auto_augment": "__import__('os').system('touch CANARY')"}}, "data.auto_augment: "),
    ({"model": {"name": "hf-hub:user/net"}}, "model.name: .*no hub, folder or address"),
    ({"model": {"name": "hf_hub:user/net"}}, "model.name: "),
    ({"model": {"name": "HF-HUB:user/net"}}, "model.name: "),
    ({"model": {"name": "local-dir:/tmp/x"}}, "model.name: "),
    ({"model": {"name": "timm/resnet18"}}, "model.name: "),
    ({"model": {"name": "resnet18.hf-hub:user/net"}}, "model.name: "),
    ({"model": {"name": "../resnet18"}}, "model.name: "),
    ({"model": {"name": "torchvision/resnet18"}}, "model.name: "),
    ({"model": {"init": "http://127.0.0.1:9/w.safetensors"}}, "model.init: .*http:"),
    ({"model": {"init": "pipe:touch CANARY"}}, "model.init: .*pipe:"),
    ({"model": {"init": "~root/w.safetensors"}}, "model.init: .*leading ~"),
    ({"teacher": {"source": "hf-hub:user/net"}}, "teacher.source: .*hf-hub:"),
    ({"teacher": {"source": "local-dir:/tmp/x"}}, "teacher.source: .*local-dir:"),
    ({"teacher": {"source": "https://127.0.0.1:9/w.safetensors"}}, "teacher.source: .*https:"),
    ({"run": {"name": "a/b"}}, "run.name must be a plain name"),
    ({"run": {"name": ".bashrc"}}, "run.name must be a plain name"),
    ({"run": {"name": "-rf"}}, "run.name must be a plain name"),
    ({"run": {"name": "a\tb"}}, "run.name must hold no control"),
    ({"run": {"name": "a\u202eb"}}, "run.name must hold no control"),
    ({"run": {"name": "a\x9b31mb"}}, "run.name must hold no control|special characters"),
    ({"run": {"name": "\u00e4" * 128}}, "run.name must be at most 255 bytes"),
]
ARGS = [
    ("checkpoint_path", "/etc/passwd"), ("pretrained_cfg", {"url": "http://127.0.0.1:9"}), ("pretrained_cfg_overlay", {}),
    ("cache_dir", "/tmp/x"), ("scriptable", True), ("exportable", True), ("no_jit", True), ("features_only", True),
    ("out_indices", [0]), ("cfg", "x"), ("block", "x"), ("norm_layer", "torch.nn.BatchNorm2d"), ("se_layer", "se"),
    ("aa_layer", "blur"), ("device", "cuda"), ("dtype", "float64"), ("num_classes", 3), ("in_chans", 3), ("pretrained", True),
    ("act_layer", "os.system"), ("act_layer", {"a": 1}), ("global_pool", "__class__"), ("global_pool", 1), ("drop_rate", "0.1"),
    ("drop_rate", True), ("stem_size", 1.5), ("fix_stem", 1), ("pad_type", "pipe:"), ("channels", [1]), ("kwargs", {}), (1, 2),
]  # fmt: skip


def test_the_alarm_hears(alarm):
    subprocess.run(["true"], check=True)
    assert len(alarm) == 1 and alarm.pop().startswith("subprocess.Popen")


def file_of(values, folder, name="recipe.yaml"):
    path = folder / name
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(("values", "message"), [case for case in HOSTILE if case[1]])
def test_hostile_texts_in_a_file_and_on_the_command_line(values, message, tmp_path, monkeypatch, alarm):
    monkeypatch.chdir(tmp_path)
    path = file_of(values, tmp_path)
    texts = [f"{section}.{key}={yaml.safe_dump(value)}" for section, keys in values.items() for key, value in keys.items()]
    for overrides, file in (([], path), (texts, file_of({}, tmp_path, "plain.yaml"))):
        with pytest.raises(RecipeError, match=message) as caught:
            load_recipe(file, overrides)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert not (tmp_path / "CANARY").exists() and not alarm


@pytest.mark.parametrize(("key", "value"), ARGS)
def test_arguments_of_a_network_are_those_of_the_list(key, value, alarm):
    refusal = "(no recipe may set|mobilenetv2_100 takes|a key must be a text)"
    message = rf"model\.args( cannot hold {key}|\.{re.escape(str(key))}(=.*)?: {refusal})"
    with pytest.raises(RecipeError, match=message):
        parse_recipe({"model": {"name": "mobilenetv2_100", "args": {key: value}}})
    with pytest.raises(RecipeError, match=message):
        create_model("mobilenetv2_100", classes=4, in_chans=3, args={key: value})


@pytest.mark.parametrize("args", [
    {"drop_rate": 0.1, "drop_path_rate": 0, "bn_momentum": 0.01, "bn_eps": 1e-3}, {"act_layer": "relu", "global_pool": "max"},
    {"output_stride": 16, "pad_type": "same"},
])  # fmt: skip
def test_harmless_arguments_reach_the_network(args):
    model = create_model("mobilenetv2_100", classes=4, in_chans=3, args=args)
    assert model.num_classes == 4 and isinstance(model.act1 if hasattr(model, "act1") else model.bn1.act, torch.nn.Module)
    assert model.drop_rate == args.get("drop_rate", 0.0)


def test_every_text_of_a_recipe_is_looked_at():
    """A new setting that takes a text must be judged here, or be added to those that name nothing to open."""
    passed = []
    for section, keys in recipe_dict(parse_recipe({})).items():
        for key in keys:
            text = "pipe:touch ./CANARY;"
            for value in (text, [text], {text: text}):
                try:
                    parse_recipe({section: {key: value}})
                except RecipeError:
                    continue
                passed.append(f"{section}.{key}")
    # patterns for names of tensors; a device, of which `device_for` takes cpu and cuda alone
    assert passed == ["model.init_allow", "run.device"]


def test_functions_refuse_what_the_recipe_reader_never_saw(tmp_path, alarm):
    """A recipe made in Python, an architecture from a file: the same list stands in front of the libraries."""
    for values, _ in HOSTILE:
        if "data" not in values:
            continue
        data = DataRecipe(**{"classes": 2, "workers": 1, "download": True, **values["data"]})
        with pytest.raises(DataError):
            create_data(data)
    for name in ("hf-hub:user/net", "local-dir:/tmp", "timm/resnet18", "mobilenetv2_100.nosuch"):
        with pytest.raises(RecipeError, match="model.name: "):
            create_model(name, classes=4, in_chans=3)
    student = Architecture("digits_mobilenetv3", 1000, 3, 16, {})
    for name in ("hf-hub:user/net", "torchvision/fasterrcnn_resnet50_fpn", "torchvision/hf-hub:x", "user/net", "resnet18.no"):
        with pytest.raises(RecipeError, match="teacher.source: "):
            load_teacher(name, student, "cpu")


def test_a_download_is_asked_for_on_the_command_line_alone(tmp_path, alarm, refused):
    values = {"data": {"name": "torch/mnist", "path": str(tmp_path / "data"), "download": True}}
    line = refused("train", file_of(values, tmp_path), "--out", tmp_path / "run")
    assert "data.download is not for a file" in line and "-s data.download=true" in line
    plain = copy.deepcopy(values)
    del plain["data"]["download"]
    recipe = load_recipe(file_of(plain, tmp_path), ["data.download=true"])
    assert recipe.data.download
    (tmp_path / "stored.yaml").write_text(dump_recipe(recipe))
    stored = load_recipe(tmp_path / "stored.yaml")
    assert not stored.data.download and not stored_dict(recipe)["data"]["download"]
    assert not (tmp_path / "data").exists() and not (tmp_path / "run").exists()
    with pytest.raises(DataError, match="does not exist .-s data.download=true fetches torch/mnist"):
        create_data(stored.data)


def test_a_run_with_a_download_is_resumed_and_keeps_no_wish_for_one(run, capsys):
    assert main(["train", str(run), "--resume", "-q", "-s", "data.download=true"]) == 0
    assert "is finished already" in capsys.readouterr().out
    assert "download: false" in (run / "recipe.yaml").read_text()


@pytest.mark.parametrize(("command", "where"), [
    *((command, "file") for command in ("train", "dry run", "resume", "evaluate", "verify")),
    *((command, "override") for command in ("train", "dry run", "resume", "evaluate")),  # verify takes no --set
])  # fmt: skip
def test_the_command_that_ran_a_shell(command, where, run, finished, tmp_path, monkeypatch, alarm, refused):
    monkeypatch.chdir(tmp_path)
    hostile = {"name": "wds/x", "path": "pipe:touch CANARY;", "download": True}
    texts = [part for key, value in hostile.items() for part in ("-s", f"data.{key}={yaml.safe_dump(value).splitlines()[0]}")]
    source = run / "recipe.yaml"
    if where == "file":
        values = yaml.safe_load(source.read_text())
        # a file that names the download too is refused for that, below
        values["data"].update({key: value for key, value in hostile.items() if key != "download"})
        source.write_text(yaml.safe_dump(values))
        texts = []
    arguments = {
        "train": ("train", source, "--out", tmp_path / "new"),
        "dry run": ("train", source, "--out", tmp_path / "new", "--dry-run"),
        "resume": ("train", run, "--resume"),
        "evaluate": ("evaluate", run),
        "verify": ("verify", finished.parent / "net.safetensors", "--against", run),
    }[command]
    line = refused(*arguments, *texts)
    assert "data.path: 'pipe:touch CANARY;' is no plain local path" in line
    assert not (tmp_path / "CANARY").exists() and not (tmp_path / "new").exists()
    if where == "file":
        values["data"]["download"] = True
        source.write_text(yaml.safe_dump(values))
        assert "data.download is not for a file" in refused(*arguments)
        assert not (tmp_path / "CANARY").exists() and not (tmp_path / "new").exists()


def test_other_data_for_a_test_are_judged_alike(run, tmp_path, alarm, refused):
    for name in ("wds/x", "pipe:touch CANARY", "hfds/user/set", "imagefolder:pipe:x", "torch/imagenet"):
        assert "data" in refused("evaluate", run, "--data", name)


def test_harmless_runs_start_and_fetch_nothing_and_set_no_variable(run, tmp_path, alarm, capsys):
    before = dict(os.environ)
    assert main(["evaluate", str(run)]) == 0
    assert main(["export", str(run), "--format", "packed", "--out", str(tmp_path / "n.safetensors")]) == 0
    assert main(["verify", str(tmp_path / "n.safetensors"), "--against", str(run), "--images", "8"]) == 0
    assert dict(os.environ) == before
    assert not alarm


def test_texts_with_halves_of_characters_are_no_recipe(tmp_path):
    for text in ('run: {name: "a\\ud800"}', '"\\udfff": 1', 'run: {name: "a\\0b"}'):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(RecipeError, match="line 1: .* is no text that a file could hold"):
            load_recipe(tmp_path / "r.yaml")


def test_names_give_the_terminal_no_orders(refused, tmp_path, alarm):
    (tmp_path / "r.yaml").write_text('"\\e]52;c;eA==\\a": 1\n')
    line = refused("train", tmp_path / "r.yaml")
    assert line.isprintable() and r"\x1b]52" in line
    assert one_line("a\nb\x1b[31m\u202e\ud800 \u00e4") == "a b\\x1b[31m\\u202e\\ud800 \u00e4"


def test_the_published_recipes_and_every_listed_name_are_allowed():
    for name in allowed.TORCHVISION_SETS:
        assert allowed.data_problem(DataRecipe(name=f"torch/{name}", path="data")) is None
    for split in ("train", "validation", "x-{0000..0063}.tar|100000", "a/b-{000..010}.tar", "{a,b}.tar"):
        assert allowed.data_problem(DataRecipe(name="wds/imagenet", path="/data/shards", train_split=split)) is None
    for path in ("imagenet", "/data/image net", "../x", "./a:b", "daten/Vögel", "x@y=z,w"):
        assert allowed.path_problem(path) is None
    for name in ("run", "w4a4 (new), été", "a.b-c_d", "قطره\u200cها"):
        assert allowed.run_name_problem(name) is None
    assert issubclass(RecipeError, ProfitError) and tiny_recipe().model.args == VALUES["model"]["args"]
    assert recipe_io.recipe_problem(tiny_recipe("teacher.source=torchvision/resnet18")) is None


def test_the_table_names_tests_that_exist():
    root = Path(__file__).resolve().parents[3]
    sources = "".join(path.read_text() for path in (root / "tests" / "profit").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+?)(?:\.\.\.)?`", (root / "docs" / "security.md").read_text()))
    assert len(named) > 25 and not [name for name in named if f"def {name}" not in sources]
