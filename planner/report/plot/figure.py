"""One style for every picture, and how a picture becomes files. Imports matplotlib when it draws, never at
import.

Colours are those of Okabe and Ito, which people with any colour vision tell apart; kinds of attention have
shapes besides. Lines and bars are named where they are, not in a legend, where there is room. Text is at
least 9 points at the width of a page.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from attention.errors import ConfigError, UnavailableError
from planner.files import write_whole

SUFFIXES: Final = (".png", ".svg")
FONT: Final = "DejaVu Sans"
"""Comes with matplotlib."""
DPI: Final = 120
TEXT, LABEL, TITLE = 9.5, 10.5, 12.0
"""Font sizes in points: beside marks, of axes, of the title."""
BLUE, ORANGE, GREEN, RED, SKY, PINK, YELLOW = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#56b4e9",
    "#cc79a7",
    "#f0e442",
)
COLORS: Final = (BLUE, ORANGE, GREEN, RED, SKY, PINK)
"""The colours of series, in this order."""
INK, MUTED, GRID = "#1f2328", "#6b737b", "#e3e6e8"
KINDS: Final = {
    "dense": (INK, "s"),
    "dilated": (ORANGE, "^"),
    "local_window": (SKY, "o"),
    "global_local": (BLUE, "D"),
    "dilated_sparse": (GREEN, "v"),
    "adaptive": (PINK, "P"),
    "multihead": (RED, "X"),
}
"""Colour and marker of each kind of attention; see `planner.question.dimensions.attention_kind`."""
_SETTINGS: Final = {
    "font.family": FONT, "font.size": TEXT, "axes.labelsize": LABEL, "axes.titlesize": LABEL,
    "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "grid.color": GRID, "legend.frameon": False, "svg.hashsalt": "attention-planner",
    "svg.fonttype": "path",
}  # pairs, related ones on a line  # fmt: skip


def written(paths: Sequence[Path], draw: Callable[[Any], None], what: str = "--plot") -> None:
    """Draws once and writes the picture to each of `paths`, PNG or SVG by suffix; a file appears whole or not
    at all. `draw` gets an empty matplotlib Figure, 8 x 5 inches unless it sets another size."""
    for path in paths:
        if path.suffix not in SUFFIXES:
            raise ConfigError(f"{what} {path} must end in {' or '.join(SUFFIXES)}")
    for path, data in zip(paths, drawn([path.suffix[1:] for path in paths], draw, what), strict=True):
        write_whole(path, data, what)


def drawn(formats: Sequence[str], draw: Callable[[Any], None], what: str = "--plot") -> list[bytes]:
    """The picture in each format, `png` or `svg`; the same drawing gives the same bytes."""
    try:
        matplotlib = import_module("matplotlib")
        fonts = import_module("matplotlib.font_manager")
        make = import_module("matplotlib.figure").Figure
    except ImportError:
        raise UnavailableError(
            f"{what} needs matplotlib, which is not installed: pip install matplotlib"
        ) from None
    try:
        fonts.findfont(FONT, fallback_to_default=False)
    except ValueError:
        raise UnavailableError(
            f"{what} needs the font {FONT!r}, which comes with matplotlib and is missing: reinstall it"
        ) from None
    pictures = []
    with matplotlib.rc_context(_SETTINGS):
        figure = make(figsize=(8, 5), layout="constrained")
        import_module("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
        draw(figure)
        for axes in figure.axes:
            for axis in (axes.xaxis, axes.yaxis):
                _plain_if_narrow(axis)
        for name in formats:
            buffer = io.BytesIO()
            about = {"Date": None} if name == "svg" else {"Software": None}
            figure.savefig(buffer, format=name, dpi=DPI, metadata=about)
            pictures.append(buffer.getvalue())
    return pictures


def _plain_if_narrow(axis: Any) -> None:
    """On a logarithmic axis of less than a decade 5, 6 and 7, which matplotlib calls 5 x 10^0 and so on."""
    low, high = sorted(axis.get_view_interval())
    if axis.get_scale() != "log" or high >= 10 * low:
        return
    shown: Any = import_module("matplotlib.ticker").LogFormatter

    class Plain(shown):  # type: ignore[misc]
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:,.10g}" if super().__call__(x, pos) else ""

    if isinstance(axis.get_major_formatter(), shown):
        axis.set_major_formatter(Plain())
    if isinstance(axis.get_minor_formatter(), shown):
        axis.set_minor_formatter(Plain())


def title(figure: Any, text: str, below: str = "") -> None:
    """Sets the title: what the picture shows, and `below` it of which workload."""
    figure.suptitle(f"{text}\n{below}" if below else text, fontsize=TITLE, x=0.02, ha="left")


def named(axes: Any, x: Any, y: Any, text: str, color: str = INK, **options: Any) -> None:
    """A name beside a point, in the colour of what it names."""
    options = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "color": color} | options
    axes.annotate(text, (x, y), fontsize=TEXT, **options)


def tokens(count: float) -> str:
    """A number of tokens on an axis: 512, 64K, 1M."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "K")):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return f"{count:g}"


def token_axis(axis: Any, counts: Sequence[int]) -> None:
    """A logarithmic axis of tokens, with these as its ticks."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(import_module("matplotlib.ticker").FixedLocator(list(counts)))
    axis.set_minor_locator(import_module("matplotlib.ticker").NullLocator())
    axis.set_ticklabels([tokens(count) for count in counts])
