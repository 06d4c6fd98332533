"""The errors people see: one line each, saying what was wrong, where, and what to do.

Wrong arguments of a function are ordinary ``ValueError`` / ``TypeError``; the classes below stand for a model, data or
file that cannot be used. The command line prints ``error: <message>`` for a :class:`ProfitError` and exits with status 2.
"""

import errno


class ProfitError(RuntimeError):
    """Base of every error this package raises on purpose."""


class ConversionError(ProfitError):
    """A model (or one named layer of it) cannot be converted; the model is left unchanged."""


class CalibrationError(ProfitError):
    """A quantizer has no usable range: not calibrated yet, or the data gave it none."""


class RecipeError(ProfitError):
    """A recipe has an unknown key or an impossible value."""


class CheckpointError(ProfitError):
    """A checkpoint is damaged, or belongs to another model."""


class DataError(ProfitError):
    """Training or test data is missing or unreadable."""


class MissingDataError(DataError):
    """There are no data where the recipe says; a dry run can do without."""


class TrainingError(ProfitError):
    """Training cannot go on (a loss that is not finite, ...)."""


class ExportError(ProfitError):
    """A model (or one named layer of it) cannot be exported, or an exported file cannot be used."""


def one_line(text: object) -> str:
    """`text` on one line, with what a terminal would not show as it is (control characters, half of a letter) escaped."""
    words = " ".join(str(text).split())
    if words.isprintable():
        return words
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in words)


def out_of_memory(error: BaseException) -> bool:
    """Whether Python, numpy, torch (on the CPU or a GPU) or the system had no memory left."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which it does not import to say so
        return True
    return isinstance(error, (RuntimeError, ImportError)) and any(text in str(error).lower() for text in _NO_MEMORY)


# Of torch's allocators and of the loader of libraries.
_NO_MEMORY = (
    "can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory", "std::bad_alloc",
    "failed to map segment", "unable to mmap", "can't start new thread", "storage size calculation overflowed",
)  # fmt: skip

# What `profit` imports beyond its base dependencies: the extras `train` and `export`.
_TRAIN_PACKAGES = frozenset(
    "typer rich yaml timm torchvision sklearn scipy matplotlib jinja2 tensorboard safetensors PIL".split()
)
_EXPORT_PACKAGES = frozenset(("onnx", "onnxruntime"))


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """What to install where a package of an extra is missing; None if it is another module."""
    package = (error.name or "").partition(".")[0]
    if package in _EXPORT_PACKAGES:
        return f"the package {package} is not installed: pip install 'profit-kernels[export]' brings what export to ONNX needs"
    if package not in _TRAIN_PACKAGES:
        return None
    return f"the package {package} is not installed: pip install 'profit-kernels[train]' brings all that training needs"
