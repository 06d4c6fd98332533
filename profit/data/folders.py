"""Image folders, `root/<class>/**/<image>`, and images that cannot be read.

timm's own reader makes a class of every folder that holds images, drops empty ones and follows links in a circle; a folder
with a mistake in it would train, with other classes than meant. Here the first level is the classes and every mistake is
an error that names the file.
"""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import ImageDataset
from timm.data.readers.reader import Reader
from timm.utils.misc import natural_key

from profit.errors import DataError

EXTENSIONS = frozenset(".bmp .gif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())
# What Pillow raises for files that are damaged in one way or another; OSError includes files that cannot be opened.
_DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)  # fmt: skip


class FolderReader(Reader):
    """The images of one split, as timm's ImageDataset asks for them.

    Args:
        root: holds one folder per class; links are followed.
        class_to_idx: of the training split, for another split; None numbers the classes in natural order.

    Raises:
        DataError: no or one class, an empty class, images outside of the classes, an unknown class, a link to a folder that
            contains it, a name that is an image's but no file.
    """

    def __init__(self, root: Path, class_to_idx: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self.root = root
        found = _entries(root)
        loose = [entry.path for entry in found if not _is_folder(entry) and _is_image(entry.name)]
        if loose:
            raise DataError(f"{_shown(loose[0])} is in no class: {root} must hold one folder per class, with the images inside")
        folders = [entry for entry in found if _is_folder(entry) and not entry.name.startswith(".")]
        files = {entry.name: _images_below(Path(entry.path), ()) for entry in folders}
        if not any(files.values()):
            raise DataError(f"{root} holds no image in class folders (images end in {' '.join(sorted(EXTENSIONS))})")
        if class_to_idx is None:
            empty = [name for name, images in files.items() if not images]
            if empty:
                raise DataError(f"{root / empty[0]} holds no image: add some, or remove the folder if it is no class")
            if len(files) == 1:
                raise DataError(f"{root} holds one class only ({next(iter(files))}): there is nothing to tell apart")
            class_to_idx = {name: index for index, name in enumerate(files)}
        unknown = [name for name, images in files.items() if images and name not in class_to_idx]
        if unknown:
            raise DataError(f"{root} holds classes that the training images lack: {', '.join(unknown[:5])}")
        self.class_to_idx = dict(class_to_idx)
        self.samples = [(image, class_to_idx[name]) for name, images in files.items() for image in images]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, target = self.samples[index]
        return open(path, "rb"), target

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        return os.path.basename(path) if basename else path if absolute else os.path.relpath(path, self.root)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: natural_key(entry.name))
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror or error}") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()  # a link to itself raises in is_dir


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def _images_below(folder: Path, above: tuple[tuple[int, int], ...]) -> list[str]:
    """Paths of the images in `folder` and below it; `above` identifies the folders on the way here."""
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        raise DataError(f"{folder} is a link to a folder that contains it: remove the link")
    images: list[str] = []
    for entry in _entries(folder):
        if _is_folder(entry):
            images += _images_below(Path(entry.path), (*above, identity))
        elif _is_image(entry.name):
            if not entry.is_symlink() and not entry.is_file():
                raise DataError(f"{_shown(entry.path)} is no file but a pipe, socket or device: remove it")
            images.append(entry.path)
    return images


def _shown(path: str) -> str:
    """`path` on one line, whatever its name."""
    return path if path.isprintable() else repr(path)


class FolderImages(ImageDataset):
    """timm's ImageDataset, where an unreadable image is an error or a gap: timm puts the next image in its place.

    Args:
        reader: the files.
        mode: "RGB" or "L".
        skip: an unreadable image gives what is wrong with it (see :class:`SkippingCollate`) instead of a DataError.
    """

    def __init__(self, reader: FolderReader, mode: str, skip: bool = False) -> None:
        super().__init__(str(reader.root), reader=reader, input_img_mode=mode)
        self.skip = skip
        # One flag per image, in memory that worker processes share.
        self.unreadable = torch.zeros(len(reader), dtype=torch.uint8).share_memory_()

    def __getitem__(self, index: int) -> tuple[Any, int] | str:
        path, target = self.reader.samples[index]
        try:
            image = read_image(path, self.input_img_mode)
        except DataError as error:
            if not self.skip:
                raise
            self.unreadable[index] = 1
            return str(error)
        return (image if self.transform is None else self.transform(image)), target

    def unreadable_files(self) -> list[str]:
        """Paths of the images that could not be read so far."""
        return [self.reader.samples[index][0] for index in self.unreadable.nonzero().flatten().tolist()]


def read_image(path: str, mode: str) -> Image.Image:
    """The first frame of an image file in `mode` ("RGB" or "L"); 16-bit grey is scaled to 8 bits, transparency dropped.

    Raises:
        DataError: unreadable or damaged, more pixels than Pillow's limit, or floating-point or 32-bit values.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", message="Palette images with Transparency", category=UserWarning)
        try:
            with open(path, "rb") as file:
                image = Image.open(file)
                if image.mode in ("F", "I"):
                    wide = "floating-point" if image.mode == "F" else "32-bit"
                    raise DataError(f"cannot read the image {_shown(path)}: it holds {wide} numbers; convert it to 8 bits")
                if image.mode.startswith("I;16"):  # Pillow would clip at 255: all white
                    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert(mode)
                return image.convert(mode)
        except _DAMAGED as error:
            raise DataError(f"cannot read the image {_shown(path)}: {_reason(error)}; replace or remove it, or set "
                            "data.on_error=skip") from error  # fmt: skip


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "it is no image that Pillow knows"
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        return f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__


class SkippingCollate:
    """`collate` over the images of a batch that could be read.

    Raises (when called):
        DataError: none of them could.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        readable = [sample for sample in samples if not isinstance(sample, str)]
        if not readable:
            raise DataError(f"none of the {len(samples)} images of a batch can be read, so data.on_error=skip is no help: "
                            f"{samples[0]}")  # fmt: skip
        return self.collate(readable)
