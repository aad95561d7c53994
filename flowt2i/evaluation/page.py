"""The report as one HTML file: no script, nothing loaded from elsewhere, light and dark (report.css), readable on a phone.

Pure functions from numbers and pictures to text.
"""

import base64
import io
from collections.abc import Sequence
from html import escape
from importlib import resources

import numpy as np
from PIL import Image

from flowt2i.evaluation.charts import Series, legend


def page(title: str, subtitle: str, sections: Sequence[str]) -> str:
    """The whole document; sections are HTML already."""
    style = (resources.files("flowt2i.evaluation") / "report.css").read_text()
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(title)}</title><style>{style}</style>'
    body = f'<main><h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p>{"".join(sections)}</main>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def code(text: str) -> str:
    return f'<p class="soft"><code>{escape(text)}</code></p>'


def cards(items: Sequence[tuple[str, str, str]]) -> str:
    """(name, value, note) as tiles."""
    tile = '<div class="card"><div class="soft">{}</div><div class="big">{}</div><div class="soft">{}</div></div>'
    return f'<div class="cards">{"".join(tile.format(*map(escape, item)) for item in items)}</div>'


def charts(items: Sequence[tuple[str, str, Sequence[Series]]]) -> str:
    """(title, svg, its series for the legend) as tiles."""
    return f'<div class="charts">{"".join(f"""<div class="card"><h3>{escape(title)}</h3>{legend(lines)}{svg}</div>""" for title, svg, lines in items)}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] = (), raw: Sequence[int] = ()) -> str:
    """A table; columns `numbers` stand right, columns `raw` are HTML already."""
    mark = lambda k: ' class="n"' if k in numbers else ""
    head = "".join(f"<th{mark(k)}>{escape(cell)}</th>" for k, cell in enumerate(header))
    body = "".join("<tr>" + "".join(f"<td{mark(k)}>{cell if k in raw else escape(cell)}</td>" for k, cell in enumerate(row)) + "</tr>" for row in rows)
    return f'<div class="scroll card"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def meter(value: float, low: float, high: float) -> str:
    """A share of 1 as a bar with its interval."""
    return f'<span class="meter"><i style="width:{100 * value:.1f}%"></i><b style="left:{100 * low:.1f}%;width:{100 * max(high - low, 0):.1f}%"></b></span>'


def samples(images: Sequence[np.ndarray], captions: Sequence[str]) -> str:
    """Pictures uint8 [H, W, 3], each over its caption."""
    return f'<div class="samples">{"".join(_figure([image], caption) for image, caption in zip(images, captions))}</div>'


def pairs(images: Sequence[Sequence[np.ndarray]], captions: Sequence[str]) -> str:
    """Pairs of pictures, each over its caption."""
    return f'<div class="samples pairs">{"".join(_figure(pair, caption) for pair, caption in zip(images, captions))}</div>'


def _figure(images: Sequence[np.ndarray], caption: str) -> str:
    shown = "".join(f'<img alt="" src="{data_uri(image)}">' for image in images)
    return f"<figure><div>{shown}</div><figcaption>{escape(caption)}</figcaption></figure>"


def data_uri(image: np.ndarray) -> str:
    """uint8 [H, W, 3] as a PNG inside the page."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
