"""Pieces of a page as markup: tables, a confusion matrix, pictures. No scripts; page.css has their style."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

PICTURE_WIDTH = 1680  # px that pictures are shrunk to


def heat_map(counts: np.ndarray, names: Sequence[str]) -> str:
    """Table of a confusion matrix: rows are true classes, each in percent of its own pixels; under 0.5 % is left blank.

    Args:
        counts: (K, K), truth by prediction.
        names: K class names.
    """
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    head = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in names)
    body = ""
    for truth, row in zip(names, share):
        body += f'<tr><th scope="row">{escape(truth)}</th>'
        for name, value in zip(names, row):
            label, shown = escape(f"{truth} taken for {name}: {value:.1f} %"), f"{value:.0f}" if value >= 0.5 else ""
            kind = ' class="on"' if value > 45 else ""
            body += f'<td title="{label}" style="--share:{value:.0f}%"{kind}>{shown}</td>'
        body += "</tr>"
    return f'<div class="scroll" tabindex="0"><table class="heat"><tr><td></td>{head}</tr>{body}</table></div>'


def table(head: list[str], rows: list[list[str]]) -> str:
    """Head and rows of text, the first column left-aligned; where it is too wide it scrolls in a box of its own."""
    cells = "".join(f'<th scope="col">{escape(c)}</th>' for c in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{escape(c)}</td>" for c in rest) + "</tr>"
        for first, *rest in rows
    )
    return f'<div class="scroll" tabindex="0"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def picture(path: Path, description: str) -> str:
    """A picture file as JPEG inside the page; '' if there is none."""
    try:
        with Image.open(path) as file:
            sheet = file.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""
    sheet.thumbnail((PICTURE_WIDTH, 10 * PICTURE_WIDTH), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    sheet.save(data, "JPEG", quality=82, optimize=True)
    uri = f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
    width, height = sheet.size
    return f'<img src="{uri}" width="{width}" height="{height}" alt="{escape(description)}">'


def legend(items: list[tuple[str, str]]) -> str:
    """Legend of (name, CSS colour)."""
    parts = (f'<li><i style="background:{colour}"></i>{escape(name)}</li>' for name, colour in items)
    return f'<ul class="legend">{"".join(parts)}</ul>'
