"""Which texts of a recipe, a run folder or a weight file may reach a library, by name; docs/security.md is the table.

A text can make timm, torchvision or webdataset fetch an address, start a command, unpickle or import: whoever wrote a recipe
would run a program on the machine of whoever tries it. Nothing here opens, imports or asks for anything; every function says
what is wrong, or None. What must read from the disk to decide is in :mod:`profit.data.streams`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from profit.train.recipe import DataRecipe, Recipe

OWN_MODELS = ("digits_mobilenetv3",)

# Data sets of torchvision that read files of a fixed layout under data.path and write nothing. CIFAR's are pickles, which
# torchvision opens only where their MD5 is the published one. (Its `imagenet` unpacks archives, `image_folder` and
# `inaturalist` are folders: `imagefolder` reads them.)
TORCHVISION_SETS = ("cifar10", "cifar100", "fashion_mnist", "kmnist", "mnist", "places365", "qmnist")
# Readers of timm that run a builder's code or fetch what the name says.
_HUBS = {"hfds": "Hugging Face's datasets", "hfids": "Hugging Face's datasets", "tfds": "tensorflow-datasets"}

# What a recipe says elsewhere.
_DECIDED = {
    "num_classes": "the data decides it, or model.classes",
    "in_chans": "data.in_chans decides it",
    "pretrained": "model.pretrained decides it",
}
_ACTIVATIONS = (
    "celu", "elu", "gelu", "gelu_tanh", "hard_mish", "hard_sigmoid", "hard_swish", "identity", "leaky_relu", "mish", "prelu",
    "quick_gelu", "relu", "relu6", "selu", "sigmoid", "silu", "swish", "tanh",
)  # fmt: skip
_POOLS = ("", "avg", "avgmax", "catavgmax", "fast", "fastavg", "fastavgmax", "fastcatavgmax", "fastmax", "max", "token")
# Arguments of a network and their types; a tuple holds the words that may stand there.
OWN_ARGS: dict[str, Any] = {"width": float, "head": int, "drop_rate": float}
TIMM_ARGS: dict[str, Any] = {
    **dict.fromkeys(("attn_drop_rate", "bn_eps", "bn_momentum", "drop_block_rate", "drop_path_rate", "drop_rate"), float),
    **dict.fromkeys(("layer_scale_init_value", "mlp_ratio", "patch_drop_rate", "pos_drop_rate", "proj_drop_rate"), float),
    **dict.fromkeys(("channel_multiplier", "depth_multiplier", "init_values", "width"), float),
    **dict.fromkeys(("base_width", "block_reduce_first", "cardinality", "depth", "down_kernel_size", "drop_block_size"), int),
    **dict.fromkeys(("embed_dim", "group_size", "img_size", "num_features", "num_heads", "output_stride", "patch_size"), int),
    **dict.fromkeys(("reg_tokens", "stem_kernel_size", "stem_size", "stem_width"), int),
    **dict.fromkeys(("avg_down", "bn_tf", "class_token", "dynamic_img_size", "fix_stem", "head_bias", "head_norm"), bool),
    **dict.fromkeys(("qk_norm", "qkv_bias", "replace_stem_pool", "se_from_exp", "zero_init_last"), bool),
    "act_layer": _ACTIVATIONS,
    "global_pool": _POOLS,
    "pad_type": ("", "same"),
    "stem_type": ("", "deep", "deep_tiered"),
}  # fmt: skip
# Where the first weights come from. A weight file of an earlier version may hold them; it has its own weights and needs none.
FIRST_WEIGHTS = frozenset(("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"))

_MODEL_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*:")
_STREAM = re.compile(r"wds/[\w.\-]+")
_SPLIT = re.compile(r"[A-Za-z0-9_.\-/{},]+(\|\d{1,12})?")
_AUGMENT = re.compile(r"[A-Za-z0-9_.\-]+")
_BRACES = re.compile(r"\{(\d{1,9})\.\.(\d{1,9})\}|\{([^{}]*,[^{}]*)\}")
MOST_SHARDS = 100_000


def recipe_problem(recipe: Recipe) -> str | None:
    """What a recipe from a stranger may not say, named by its full key."""
    model, teacher = recipe.model, recipe.teacher.source
    return (
        model_problem(model.name, model.args)
        or (model.init and _named("model.init", path_problem(model.init)))
        or data_problem(recipe.data)
        or (teacher and teacher_problem(teacher))
        or None
    )


def data_problem(data: DataRecipe) -> str | None:
    """Names, paths and splits of a `data` section."""
    name, _, inline = data.name.partition(":") if data.name.startswith("imagefolder:") else (data.name, "", "")
    prefix, slash, rest = name.partition("/")
    if slash and prefix.lower() in _HUBS:
        return (f"data.name: {data.name!r} would run code of {_HUBS[prefix.lower()]} or fetch from a hub: export the images to "
                "a folder (imagefolder:PATH) or to webdataset's tar files (wds/NAME)")  # fmt: skip
    if prefix == "torch" and slash and rest not in TORCHVISION_SETS:
        known = ", ".join(f"torch/{known}" for known in TORCHVISION_SETS)
        return f"data.name: timm cannot open the data set {data.name!r} here: known are {known}; imagefolder:PATH takes folders"
    if not (name in ("digits", "imagefolder") or prefix == "torch" and slash or _STREAM.fullmatch(name)):
        return f"unknown data.name {data.name!r}: digits, imagefolder:PATH, wds/NAME, or one of torch/* as torch/cifar10"
    for key, path in (("data.name", inline), ("data.path", data.path)):
        if path and (wrong := path_problem(path)):
            return _named(key, wrong)
    for key, split in (("data.train_split", data.train_split), ("data.test_split", data.test_split)):
        wrong = shards_problem(split) if prefix == "wds" else path_problem(split)
        if wrong:
            return _named(key, wrong)
    if data.auto_augment is not None and not _AUGMENT.fullmatch(data.auto_augment):
        return f"data.auto_augment: {data.auto_augment!r} is no name of timm's, as rand-m9-mstd0.5 is"
    return None


def path_problem(path: str) -> str | None:
    """A plain local path: what some library would take for an address, a command or a home folder is none."""
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in path):
        return f"{path!r} holds a control character"
    if "::" in path or "|" in path:
        return f"{path!r} is no plain local path: '::' and '|' join addresses and commands"
    if scheme := _SCHEME.match(path):
        return f"{path!r} is no plain local path but an address or a command ({scheme[0]}); write ./{scheme[0]}... for a folder"
    if path.startswith(("~", "-")):
        return f"{path!r} is no plain local path: write it out, without a leading {path[0]}"
    return None


def shards_problem(split: str) -> str | None:
    """A split of a stream: a word, or names of tar files in the data folder, as `train-{0000..0015}.tar|10000`."""
    if not _SPLIT.fullmatch(split):
        return f"{split!r} names neither a split nor tar files in the data folder, as train-{{0000..0015}}.tar|10000 does"
    names, count = split.partition("|")[0], 1
    for first, last, listed in _BRACES.findall(names):
        count *= listed.count(",") + 1 if listed else abs(int(last) - int(first)) + 1
    if count > MOST_SHARDS:
        return f"{split!r} stands for more than {MOST_SHARDS} files"
    plain = _BRACES.sub("x", names)
    if set(plain) & set("{},"):
        return f"{split!r} holds braces that are neither {{0000..0015}} nor {{a,b}}"
    return None if shard_is_inside(plain) and ".." not in plain else f"{split!r} leads out of the data folder"


def shard_is_inside(name: str) -> bool:
    """Whether the name of a shard means a place below the data folder."""
    return path_problem(name) is None and not name.startswith("/") and ".." not in name.split("/")


def model_problem(name: str, args: Mapping[str, Any], setting: str = "model.name") -> str | None:
    """The name of a network and the arguments it is made with."""
    if not _MODEL_NAME.fullmatch(name):
        return f"{setting}: {name!r} is no plain name of a timm model or of one of ours: no hub, folder or address is opened"
    known = OWN_ARGS if name in OWN_MODELS else TIMM_ARGS
    for key, value in args.items():
        if key in _DECIDED:
            return f"model.args cannot hold {key}: {_DECIDED[key]}"
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(sorted(known))}"
            return f"model.args.{key}={_short(value)}: no recipe may set that of {name}; {hint}"
        if not _fits(value, known[key]):
            wanted = {float: "a number", int: "a whole number", bool: "true or false"}.get(known[key])
            wanted = wanted or f"one of {', '.join(map(repr, known[key]))}"
            return f"model.args.{key}={_short(value)}: {name} takes {wanted}"
    return None


def teacher_problem(source: str) -> str | None:
    """`self`, a run folder or weight file, a timm model, or `torchvision/NAME`."""
    return _named("teacher.source", path_problem(source))


def teacher_name_problem(source: str) -> str | None:
    """A teacher that is no file: the name of a network."""
    return model_problem(source.removeprefix("torchvision/"), {}, "teacher.source")


def run_name_problem(name: str) -> str | None:
    """The name of a run becomes that of a folder under runs/."""
    if any(unicodedata.category(c) in ("Cc", "Cs", "Cf", "Zl", "Zp") and c not in "\u200c\u200d" for c in name):
        return "must hold no control characters"
    if not name.strip(". ") or name.startswith((".", "-")) or set(name) & set("/\\"):
        return "must be a plain name, without slashes and not beginning with . or -: it is that of a folder"
    return None if len(name.encode()) <= 255 else "must be at most 255 bytes long: it is that of a folder"


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(kind, tuple):
        return isinstance(value, str) and value in kind
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else int)


def _named(setting: str, wrong: str | None) -> str | None:
    return f"{setting}: {wrong}" if wrong else None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
