"""Matplotlib figures as inline SVG that follows the page: CSS colours, the page's font, no ids that clash.

A figure is drawn with the stand-in colours of `COLOURS`; in the SVG each becomes a CSS variable, so that one drawing
serves the light page, the dark page and paper.
"""

import io
import re
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMES = ("ink", "muted", "line", "band", "raw", "ema", "hist", "level")
_NAMES += ("stage1", "stage2", "stage3", "stage4", "never")
COLOURS: dict[str, str] = {name: f"#0000{index:02x}" for index, name in enumerate(_NAMES, start=1)}
_VARIABLES = {colour: f"var(--{name})" for name, colour in COLOURS.items()}
_COLOUR = re.compile(r"#0000[0-9a-f]{2}\b")
_LINKS = ("href", "clip-path")
_FONT_FAMILY = re.compile(r"font(?:-family)?:[^;]*(?:;|$)")

STYLE = {
    "svg.fonttype": "none",  # text stays text: small, searchable, read aloud
    "text.parse_math": False,  # a "$" in a layer name is a dollar sign
    "axes.unicode_minus": True,
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.labelsize": 12,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": COLOURS["muted"],
    "axes.labelcolor": COLOURS["ink"],
    "axes.titlecolor": COLOURS["ink"],
    "text.color": COLOURS["ink"],
    "legend.labelcolor": COLOURS["ink"],
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.labelcolor": COLOURS["ink"],
    "ytick.labelcolor": COLOURS["ink"],
    "grid.color": COLOURS["line"],
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "path.simplify": True,
}


@dataclass(frozen=True)
class Chart:
    """One drawing: inline SVG, the text read in its place, its natural width in CSS pixels."""

    svg: str
    alt: str
    width: int


@contextmanager
def figure(width: int, height: int, layout: str | None = "constrained") -> Iterator["Figure"]:
    """An empty figure of `width` x `height` CSS pixels under the report's style, whatever the user's matplotlibrc."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context(["default", STYLE]):
        # 72 dpi: one SVG unit is one CSS pixel, font sizes are pixels
        yield Figure(figsize=(width / 72, height / 72), dpi=72, layout=layout)


def to_chart(fig: "Figure", prefix: str, alt: str) -> Chart:
    """Render `fig`; call inside `figure(...)`. `prefix` keeps its ids apart from those of other drawings."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": prefix}):  # same data, same file
        fig.savefig(buffer, format="svg", metadata={"Date": None})
    root = ET.fromstring(buffer.getvalue())
    width = round(float(root.get("viewBox", "0 0 0 0").split()[2]))
    for parent in list(root.iter()):
        for child in list(parent):
            # matplotlib's style sheet would apply to the whole page; the metadata names an outside address
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    referenced = _references(root)
    for element in root.iter():
        _localise(element, prefix, referenced)
    root.attrib.pop("width", None)
    root.attrib.pop("height", None)
    root.set("role", "img")
    root.set("aria-label", alt)
    return Chart(ET.tostring(root, encoding="unicode"), alt, width)


def _references(root: ET.Element) -> set[str]:
    links = (value for element in root.iter() for key, value in element.attrib.items() if key.endswith(_LINKS))
    return {match[1] for link in links if (match := re.search(r"#([\w-]+)", link))}


def _localise(element: ET.Element, prefix: str, referenced: set[str]) -> None:
    # inline SVG needs no namespaces, and HTML reads `href` without xlink
    element.tag = element.tag.rpartition("}")[2]
    attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
    identity = attributes.pop("id", None)
    if identity in referenced:
        attributes["id"] = f"{prefix}-{identity}"
    for link in _LINKS:
        if link in attributes:
            attributes[link] = attributes[link].replace("#", f"#{prefix}-", 1)
    if "style" in attributes:
        style = _COLOUR.sub(lambda match: _VARIABLES.get(match[0], match[0]), attributes["style"])
        attributes["style"] = style if element.tag != "text" else _FONT_FAMILY.sub("", style).strip()
    element.attrib.clear()
    element.attrib.update(attributes)
    element.tail = None if element.tail is None or element.tail.isspace() else element.tail
    element.text = None if element.text is None or element.text.isspace() else element.text


def plain(text: str, limit: int = 42) -> str:
    """`text` on one line without control characters, shortened in the middle to `limit` characters."""
    clean = "".join("\ufffd" if unicodedata.category(char) in ("Cc", "Cs", "Co", "Cn") else char for char in text)
    if len(clean) <= limit:
        return clean
    head = (limit - 1) // 2
    return clean[:head] + "…" + clean[-(limit - 1 - head) :]
