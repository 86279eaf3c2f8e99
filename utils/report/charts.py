"""Pieces of a page as markup: charts in inline SVG, tables, pictures. No scripts; page.css has their style."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 360, 220  # units of a line chart, about its pixels on the page
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 12, 38  # margins inside it
CELL = 26  # side of a heat map's cell in px
MOST_POINTS = 200  # a longer line is averaged down to as many points
PICTURE_WIDTH = 1680  # px that pictures are shrunk to
LEGIBLE_WIDTH = 860  # least px of a wide picture; on a phone it scrolls in its box


class Line(NamedTuple):
    """One curve: its name, CSS colour and (x, y) points in ascending x."""

    name: str
    colour: str
    points: list[tuple[float, float]]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside low..high, about `count` of them."""
    raw = ((high - low) or 1.0) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `MOST_POINTS` points: means of equally long stretches."""
    if len(points) <= MOST_POINTS:
        return points
    return [tuple(stretch.mean(0)) for stretch in np.array_split(np.array(points, float), MOST_POINTS)]


def line_chart(title: str, lines: Sequence[Line], x_label: str, starts: Sequence[float] = ()) -> str:
    """SVG figure of curves, each with points, over common axes.

    Args:
        starts: x where each stage begins: the axis starts at one of them, later ones get a vertical line.
    """
    lines = [line._replace(points=thin(line.points)) for line in lines]
    xs, ys = zip(*(point for line in lines for point in line.points))
    low_x, high_x = max((start for start in starts if start < min(xs)), default=0), max(xs)
    low, high = min(ys), max(ys)
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    low, high = low - room, high + room

    def x(value: float) -> float:
        return LEFT + (value - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for value in ticks(low, high):
        parts.append(f'<path class="grid" d="M{LEFT} {y(value):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in ticks(low_x, high_x):
        parts.append(f'<text x="{x(value):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{value:g}</text>')
    parts += [f'<path class="divider" d="M{x(v):.1f} {TOP}V{HEIGHT - BOTTOM}"/>' for v in starts if low_x < v < high_x]
    parts.append(f'<path class="base" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    for line in lines:
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points)
        width = 1.8 if len(line.points) > 1 else 7  # a single point is a dot
        parts.append(f'<path class="line" d="M{path}h0" stroke="{line.colour}" stroke-width="{width}"/>')
    label = escape(f"{title} over {x_label}: {', '.join(line.name for line in lines)}")
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def heat_map(counts: np.ndarray, names: Sequence[str], title: str) -> str:
    """SVG of a confusion matrix: rows are true classes, each in percent of its own pixels; under 0.5 % is left blank.

    Args:
        counts: (K, K), truth by prediction.
        names: K class names.
    """
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    margin = 16 + round(6.6 * max(map(len, names)))  # px that the longest name takes, with room
    size = CELL * len(names)
    width = margin + size + 8
    parts = [f'<rect class="sheet" x="{margin}" y="{margin}" width="{size}" height="{size}"/>']
    for k, name in enumerate(names):
        centre = margin + CELL * k + CELL / 2
        parts.append(f'<text x="{margin - 7}" y="{centre + 4}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<text transform="translate({centre + 4} {margin - 7}) rotate(-90)">{escape(name)}</text>')
    for i, j in zip(*np.nonzero(share >= 0.5)):
        left, top, value = margin + CELL * j, margin + CELL * i, share[i, j]
        label = escape(f"{names[i]} taken for {names[j]}: {value:.1f} %")
        parts.append(
            f'<g><title>{label}</title><rect x="{left}" y="{top}" width="{CELL}" height="{CELL}" '
            f'fill="var(--heat)" fill-opacity="{0.06 + 0.94 * value / 100:.2f}"/>'
            f'<text class="{"on" if value > 45 else "off"}" '
            f'x="{left + CELL / 2}" y="{top + CELL / 2 + 3.5}" text-anchor="middle">{value:.0f}</text></g>'
        )
    return (
        f'<div class="scroll" tabindex="0"><svg class="heat" width="{width}" height="{width}" '
        f'viewBox="0 0 {width} {width}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></div>'
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """Head and rows of text, the first column left-aligned; where it is too wide it scrolls in a box of its own."""
    cells = "".join(f'<th scope="col">{escape(c)}</th>' for c in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(c)}</td>" for c in rest) + "</tr>"
        for first, *rest in rows
    )
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(path: Path, description: str) -> str:
    """A picture file as JPEG inside the page, in a box that scrolls on a phone and says so; '' if there is none."""
    try:
        with Image.open(path) as file:
            sheet = file.convert("RGB")
    except (OSError, ValueError):
        return ""
    sheet.thumbnail((PICTURE_WIDTH, 10 * PICTURE_WIDTH), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    sheet.save(data, "JPEG", quality=82, optimize=True)
    uri = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
    width, height = sheet.size
    least = min(width, LEGIBLE_WIDTH)
    wide = " wide" if least == LEGIBLE_WIDTH else ""
    return (
        f'<div class="picture{wide}"><div class="scroll" tabindex="0">'
        f'<img src="{uri}" width="{width}" height="{height}" '
        f'style="min-width:{least}px" alt="{escape(description)}"></div></div>'
    )


def legend(items: list[tuple[str, str]]) -> str:
    """Legend of (name, CSS colour)."""
    parts = (f'<li><i style="background:{colour}"></i>{escape(name)}</li>' for name, colour in items)
    return f'<ul class="legend">{"".join(parts)}</ul>'
