"""How a refusal names layers, and what it tells to do about them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase

_SHOWN = 4  # patterns; more of them and the list helps less than filter_fn


def several(names: Sequence[str], kinds: Sequence[str]) -> str:
    """"layer 'a' (Conv1d)", or with "and 3 more layers" behind it; `kinds` are the class names."""
    more = len(names) - 1
    name = f"layer {names[0]!r}" if names[0] else "the model itself"
    tail = f" and {more} more layer{'s' * (more > 1)}" if more else ""
    return f"{name} ({kinds[0]}){tail}"


def leave_out(names: Sequence[str], kinds: Sequence[str], others: Collection[str]) -> str:
    """"leave it out with overrides={...} or filter_fn": patterns that match all of `names` and none of `others`."""
    them, patterns = "it" if len(names) == 1 else "them", skip_patterns(names, others)
    if len(patterns) <= _SHOWN:
        settings = ", ".join(f"{pattern!r}: {{'skip': True}}" for pattern in patterns)
        return f"leave {them} out with overrides={{{settings}}} or filter_fn"
    condition = f"=lambda module, name: type(module).__name__ != {kinds[0]!r}" if len(set(kinds)) == 1 else ""
    return f"leave {them} out with filter_fn{condition}"


def skip_patterns(names: Sequence[str], others: Collection[str]) -> list[str]:
    """Few shell patterns that match every one of `names` and none of `others`: each covers the most that are left."""
    if len(names) == 1:
        return list(names)
    candidates: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        candidates.update({".".join([*parts[:i], "*"]): None for i in range(1, len(parts))})
        candidates.update({".".join(["*", *parts[i:]]): None for i in range(1, len(parts))})
    allowed = [pattern for pattern in candidates if not any(fnmatchcase(other, pattern) for other in others)]
    chosen, left = [], list(names)
    while left:
        best = max(allowed, key=lambda pattern: sum(fnmatchcase(name, pattern) for name in left), default="")
        covered = [name for name in left if fnmatchcase(name, best)] if best else []
        if len(covered) < 2:
            return chosen + left
        chosen.append(best)
        left = [name for name in left if name not in covered]
    return chosen
