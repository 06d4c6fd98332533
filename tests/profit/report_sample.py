"""A made-up results.json, as a finished run of the demo recipe would write it."""

from __future__ import annotations

import random


def sample_results(seed: int, blocks: int = 17) -> dict:
    """Results of a made-up MobileNetV3-like run: stem, `blocks` x (expand, depthwise, project), classifier; 22 phases."""
    rng = random.Random(seed)
    names = ["conv_stem"]
    for block in range(blocks):
        names += [f"blocks.{block // 3}.{block % 3}.{conv}" for conv in ("conv_pw", "conv_dw", "conv_pwl")]
    names.append("classifier")
    layers = [_layer(rng, name, index, len(names)) for index, name in enumerate(names)]
    ranked = sorted((layer for layer in layers if layer["ranked"]), key=lambda layer: -layer["aiwq"])
    for rank, layer in enumerate(ranked, start=1):
        layer["rank"] = rank
        layer["frozen_stage"] = 1 if rank <= len(ranked) // 3 else 2 if rank <= 2 * len(ranked) // 3 else None
    phases = _phases(rng, [layer["name"] for layer in ranked], len(layers))
    widths = (32, 8, 5, 4, 3, 2)
    parameters = sum(layer["parameters"] for layer in layers)
    measured = {32: 99.17, 8: 98.89, 5: 98.61, 4: 98.33}
    return {
        "schema": 1,
        "run": {
            "name": "digits_w4a4", "created": "2026-01-31T12:34:56+00:00", "finished": True,
            "command": "profit train recipes/digits_w4a4.yaml --out runs/digits -s data.fold=0", "seed": 7,
            "git_commit": "0123456789abcdef0123456789abcdef01234567", "device": "cpu", "threads": 1, "wall_s": 273.4,
            "versions": {"python": "3.12.3", "torch": "2.15.0", "triton": None, "timm": "1.0.31", "numpy": "2.3.1",
                         "profit_kernels": "0.1.0"},
        },
        "model": {"name": "digits_mobilenetv3", "parameters": parameters + 3210, "classes": 10, "in_chans": 1},
        "data": {"name": "digits", "train": 1437, "test": 360, "image_size": 16, "fold": 0},
        "recipe": {"model": {"name": "digits_mobilenetv3"}, "quant": {"weight_bits": 4, "overrides": {}},
                   "schedule": {"act_bits": [8, 5, 4], "profit": True}},
        "phases": phases,
        "layers": layers,
        "weights": {layer["name"]: _histogram(rng, layer["parameters"]) for layer in layers},
        "sizes": [{"label": f"W{b}", "bits": b, "bytes": parameters * b // 8 + 13000, "accuracy": measured.get(b)}
                  for b in widths],
        "aiwq": {"mode": "corrected", "steps": 115, "decay": 0.98, "clamped": 12, "skipped": 0,
                 "scores": {layer["name"]: layer["aiwq"] for layer in ranked}},
        "final": {"accuracy": 98.33, "accuracy_ema": 98.61, "accuracy_fp": 99.17},
    }  # fmt: skip


def _layer(rng: random.Random, name: str, index: int, count: int) -> dict:
    kind = "raw" if index == 0 else rng.choice(["signed", "unsigned", "offset"])
    depthwise = name.endswith("conv_dw")
    parameters = rng.randrange(9, 90) * 9 if depthwise else rng.randrange(100, 3000)
    classifier = index == count - 1
    return {
        "name": name, "type": "linear" if classifier else "depthwise" if depthwise else "conv",
        "kernel": [3, 3] if depthwise or index == 0 else [1, 1], "stride": 1,
        "groups": parameters // 9 if depthwise else 1, "kind": kind, "offset": -0.375 if kind == "offset" else 0.0,
        "pad_value": -0.375 if kind == "offset" and depthwise else 0.0,
        "activation": {"offset": "hardswish", "unsigned": "relu"}.get(kind, "none"), "weight_bits": 4,
        "act_bits": None if index == 0 else 4, "ranked": not classifier, "parameters": parameters,
        "macs": parameters * 256, "A_x": rng.uniform(1, 6), "C_x": rng.uniform(1, 6), "A_w": rng.uniform(0.2, 1),
        "C_w": rng.uniform(0.2, 1), "aiwq": None if classifier else 10 ** rng.uniform(-5.2, -2.1 + 0.6 * depthwise),
        "rank": None, "frozen_stage": None,
    }  # fmt: skip


def _phases(rng: random.Random, ranked: list[str], layers: int) -> list[dict]:
    plan = [("fp", "train", None, None, 15, 0)]
    for bits in (8, 5, 4):
        plan += [(f"a{bits}.{part}", kind, None, bits, epochs, layers if kind == "bn" else 0)
                 for part, kind, epochs in (("bn", "bn", 2), ("train", "train", 6), ("bn2", "bn", 2))]  # fmt: skip
    for bits in (8, 5):
        plan += [(f"w{bits}.{part}", kind, bits, 4, epochs, layers if kind == "bn" else 0)
                 for part, kind, epochs in (("bn", "bn", 2), ("train", "train", 6), ("bn2", "bn", 2))]  # fmt: skip
    plan += [("w4.bn", "bn", 4, 4, 2, layers), ("w4.sample", "sample", 4, 4, 5, 0)]
    plan += [(f"w4.stage{s}", "train", 4, 4, 6, len(ranked) * s // 3) for s in range(3)]
    plan += [("w4.final", "bn", 4, 4, 3, layers)]
    phases, level = [], 40.0
    for name, kind, weight_bits, act_bits, epochs, frozen in plan:
        history = []
        for epoch in range(1, epochs + 1):
            level += (98.6 - level) * 0.25 + rng.uniform(-0.4, 0.4)
            loss = (100.5 - level) / 25
            history.append({"epoch": epoch, "lr": 0.02 / epoch, "train_loss": loss * 1.1, "test_loss": loss,
                            "accuracy": level, "accuracy_ema": min(level + 0.3, 99.9)})  # fmt: skip
        phases.append({
            "name": name, "kind": kind, "bits": f"W{weight_bits or 32}A{act_bits or 32}", "weight_bits": weight_bits,
            "act_bits": act_bits, "frozen": frozen, "frozen_layers": ranked[:frozen], "epochs": epochs, "lr": 0.02,
            "accuracy": level, "accuracy_ema": min(level + 0.3, 99.9), "train_loss": loss * 1.1, "test_loss": loss,
            "wall_s": epochs * 2.3, "images_per_s": rng.uniform(600, 2500), "history": history,
        })  # fmt: skip
    return phases


def _histogram(rng: random.Random, parameters: int, bits: int = 4, bins: int = 64) -> dict:
    weights = [rng.gauss(0, 0.25) for _ in range(parameters)]
    steps, scale = 2 ** (bits - 1) - 1, 0.6
    low, high = min(weights), max(weights)
    edges = [low + (high - low) * i / bins for i in range(bins + 1)]
    counts, codes = [0] * bins, [0] * (2 * steps + 1)
    for weight in weights:
        counts[min(int((weight - low) / (high - low) * bins), bins - 1)] += 1
        codes[round(max(-1, min(1, weight / scale)) * steps) + steps] += 1
    return {"edges": edges, "counts": counts, "grid": [scale * q / steps for q in range(-steps, steps + 1)],
            "code_counts": codes}  # fmt: skip
