"""Pictures of diffusion, as the papers draw them, each as the bytes of a PNG.

Nothing here keeps state between calls: figures are made by matplotlib's object-oriented interface and the Agg canvas.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from sora_jax.array_types import Float, NumpyArray
from sora_jax.pixels import to_pixels

DATA, MODEL, ACCENT = "#4477aa", "#ee6677", "#228833"  # of a palette that colour-blind people can tell apart
_DPI = 120


def png_bytes(image: NumpyArray) -> bytes:
    """Returns an (H, W, 3) or (H, W) uint8 image as a PNG.

    Raises:
        ValueError: another shape or dtype.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[-1] != 3):
        raise ValueError(f"image must be (H, W) or (H, W, 3) uint8, got {image.shape} {image.dtype}.")
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def _render(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, NumpyArray]:
    """Returns a figure of axes (rows, columns), each `width` by `height` inches."""
    figure = Figure(figsize=(columns * width, rows * height), dpi=_DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])


def image_grid(
    rows: Sequence[Float[NumpyArray, "columns height width channels"]], scale: int | None = None, gap: int = 2
) -> NumpyArray:
    """Returns rows of images side by side, (H, W, 3) uint8.

    Args:
        rows: of as many images of one size each, of values in [-1, 1], with 1 or 3 channels.
        scale: pixels of the picture along the side of one of an image's (default: as many as make the images 64 high).
        gap: white pixels between images.

    Raises:
        ValueError: rows of different shapes, or images of another number of channels.
        FloatingPointError: a value that is NaN or infinite.
    """
    shapes = {np.shape(row) for row in rows}
    if len(shapes) != 1 or len(shape := next(iter(shapes))) != 4 or shape[-1] not in (1, 3):
        raise ValueError(f"rows must all be (columns, H, W, 1 or 3) of one shape, got {sorted(shapes)}.")
    scale = max(64 // shape[1], 1) if scale is None else scale
    cells = to_pixels(np.stack(rows))
    cells = np.broadcast_to(cells, (*cells.shape[:-1], 3)).repeat(scale, axis=2).repeat(scale, axis=3)
    cells = np.pad(cells, ((0, 0), (0, 0), (gap, 0), (gap, 0), (0, 0)), constant_values=255)
    grid = cells.transpose(0, 2, 1, 3, 4).reshape(cells.shape[0] * cells.shape[2], -1, 3)
    return np.pad(grid, ((0, gap), (0, gap), (0, 0)), constant_values=255)


def point_trajectories(
    forward: Mapping[str, Float[NumpyArray, "points 2"]],
    reverse: Mapping[str, Float[NumpyArray, "points 2"]],
    drift: Mapping[str, tuple[Float[NumpyArray, "points 2"], Float[NumpyArray, "points 2"]]],
) -> bytes:
    """Draws points on their way to noise and back (arXiv:1503.03585, Figure 1).

    Args:
        forward: points of q(x_t) by a column's title.
        reverse: points of the model at the same columns.
        drift: places and the arrows of the mean's drift there, at the same columns.
    """
    figure, grid = _figure(3, len(forward), 2.4, 2.4)
    for column, title in enumerate(forward):
        for axes, points, colour in ((grid[0, column], forward[title], DATA), (grid[1, column], reverse[title], MODEL)):
            axes.scatter(points[:, 0], points[:, 1], s=1, color=colour, linewidths=0)
        at, arrows = drift[title]
        grid[2, column].quiver(at[:, 0], at[:, 1], arrows[:, 0], arrows[:, 1], color=ACCENT, angles="xy")
        grid[0, column].set_title(title, fontsize=9)
        for axes in grid[:, column]:
            axes.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal")
            _bare(axes)
    for axes, label in zip(grid[:, 0], ("forward, q", "reverse, p", "drift of the mean"), strict=True):
        axes.set_ylabel(label)
    return _render(figure)


def bit_trajectories(
    forward: Mapping[str, Float[NumpyArray, "sequences bits"]],
    reverse: Mapping[str, Float[NumpyArray, "sequences bits"]],
) -> bytes:
    """Draws sequences of bits, one a line, on their way to coins and back (arXiv:1503.03585, Figure 2).

    Args:
        forward: bits of q(x_t) by a column's title.
        reverse: bits of the model at the same columns.
    """
    figure, grid = _figure(2, len(forward), 1.9, 2.6)
    for column, title in enumerate(forward):
        for axes, bits in ((grid[0, column], forward[title]), (grid[1, column], reverse[title])):
            axes.imshow(bits, cmap="binary", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
            _bare(axes)
        grid[0, column].set_title(title, fontsize=9)
    for axes, label in zip(grid[:, 0], ("forward, q", "reverse, p"), strict=True):
        axes.set_ylabel(label)
    grid[1, 0].set_xlabel("bin")
    return _render(figure)


def bound_terms(steps: Float[NumpyArray, " steps"], unit: str) -> bytes:
    """Draws the terms of the bound against their step, the least noisy first.

    Args:
        steps: in bits a unit, L_0 first.
        unit: what they are bits of.
    """
    figure, grid = _figure(1, 1, 6.0, 3.2)
    axes = grid[0, 0]
    axes.plot(np.arange(1, len(steps)), steps[1:], color=MODEL, linewidth=1)
    axes.set(xlabel="step t", ylabel=f"KL of the step, bits / {unit}", title=f"L_0 = {steps[0]:.4g} bits / {unit}")
    axes.grid(alpha=0.3)
    return _render(figure)


def rate_distortion(rate: Float[NumpyArray, " steps"], distortion: Float[NumpyArray, " steps"]) -> bytes:
    """Draws progressive lossy coding (arXiv:2006.11239, Figure 5).

    Args:
        rate: bits a value sent before each step, from the noisiest on.
        distortion: root mean squared error then, on a scale of [0, 255].

    Raises:
        ValueError: curves of different lengths.
    """
    if np.shape(rate) != np.shape(distortion):
        raise ValueError(f"rate and distortion must be as long, got {np.shape(rate)} and {np.shape(distortion)}.")
    figure, (plots,) = _figure(1, 3, 3.4, 3.0)
    steps = np.arange(len(rate))
    for axes, x, y, labels in (
        (plots[0], steps, distortion, ("reverse steps made", "distortion (RMSE)")),
        (plots[1], steps, rate, ("reverse steps made", "rate (bits / value)")),
        (plots[2], rate, distortion, ("rate (bits / value)", "distortion (RMSE)")),
    ):
        axes.plot(x, y, color=MODEL)
        axes.set(xlabel=labels[0], ylabel=labels[1])
        axes.grid(alpha=0.3)
    return _render(figure)


def curves(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str) -> bytes:
    """Draws curves in one frame, with their names.

    Args:
        lines: the values of each curve along x and along y, by its name.
        x: what is along x.
        y: what is along y.
    """
    figure, axes = _figure(1, 1, 5.0, 3.5)
    ax = axes[0, 0]
    palette = (MODEL, DATA, ACCENT, "#ccbb44", "#66ccee", "#aa3377")
    for number, (name, values) in enumerate(lines.items()):
        ax.plot(*values, label=name, color=palette[number % len(palette)], marker="o", markersize=3)
    ax.set(xlabel=x, ylabel=y)
    ax.grid(alpha=0.3)
    ax.legend()
    return _render(figure)
