"""Pieces of a page as markup: tables, a confusion matrix, pictures. No scripts; page.css has their style."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

CELL = 26  # side of a heat map's cell in px
PICTURE_WIDTH = 1680  # px that pictures are shrunk to
LEGIBLE_WIDTH = 860  # least px of a wide picture; on a phone it scrolls in its box


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
