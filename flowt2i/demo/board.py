"""Pictures, progress and what they were made with, as HTML that holds the pictures themselves: nothing is written to the server's disk for the page.

Everything a visitor typed passes through `safe`.
"""

import base64
import html
import io
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from flowt2i.demo.drawing import Step
from flowt2i.pipeline import Samples, save_png
from flowt2i.shapes import name

CRISP_UP_TO = 128  # pixels: smaller pictures are shown enlarged, each pixel a square


class Panel(NamedTuple):
    """Some pictures under one heading."""

    title: str
    sources: Sequence[str]  # data: URLs
    captions: Sequence[str]
    settings: Sequence[dict[str, Any]]  # of finished pictures: what makes them again; empty while they form
    size: int  # pixels
    note: str = ""


def safe(text: str) -> str:
    """A text for HTML, in and out of attributes; also none of what gradio's templates read: `${…}`, `{{…}}`, `@children`."""
    return html.escape(text, quote=True).replace("{", "&#123;").replace("$", "&#36;").replace("@", "&#64;")


def preview_source(image: np.ndarray) -> str:
    """A small data: URL of a picture that is on view for a moment; image uint8 [H, W, 3]."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "WEBP", quality=90, method=0)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def png(picture: Image.Image) -> bytes:
    """The PNG file of a picture, its settings inside."""
    file = io.BytesIO()
    save_png(picture, file)
    return file.getvalue()


def forming(step: Step, title: str = "") -> Panel:
    """Pictures on their way."""
    return Panel(title, [preview_source(image) for image in step.images], [], [], step.images.shape[1])


def finished(samples: Samples, model: str, title: str = "", note: str = "") -> Panel:
    """Pictures that are done, each with the body of the request to `/api/generate` that makes it again."""
    sources = ["data:image/png;base64," + base64.b64encode(png(picture)).decode() for picture in samples.pictures()]
    settings = [recipe(samples, i, model) for i in range(len(sources))]
    return Panel(title, sources, [f"seed {seed}" for seed in samples.seeds], settings, samples.images.shape[1], note)


def recipe(samples: Samples, index: int, model: str) -> dict[str, Any]:
    """The settings of one picture, by the names of `/api/generate`."""
    used = {name: samples.settings[name] for name in ("negative", "steps", "guidance", "solver") if samples.settings.get(name) not in (None, "")}
    height, width = samples.images.shape[1:3]
    return {"model": model, "prompt": samples.prompts[index], **used, "seed": samples.seeds[index], "num": 1, "shape": name((width, height))}


def render(panels: Sequence[Panel], fraction: float, line: str, kind: str = "draw", done: bool = False) -> str:
    """The whole board. fraction: of the work, 0 to 1; line: one sentence for people; kind: the tab, for its layout."""
    percent = round(100 * min(max(fraction, 0), 1))
    bar = (
        f'<div class="bar" role="progressbar" aria-label="progress" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent}">'
        f'<i style="width:{percent}%"></i></div>'
    )
    return (
        f'<div class="board {kind}{" done" if done else " busy"}">{bar}<p class="line" role="status">{safe(line)}</p>'
        f'<div class="panels">{"".join(map(_panel, panels))}</div></div>'
    )


def empty(line: str) -> str:
    """A board on which nothing has been drawn yet."""
    return f'<div class="board empty"><p class="hint">{safe(line)}</p></div>'


def _panel(panel: Panel) -> str:
    title = f"<h3>{safe(panel.title)}</h3>" if panel.title else ""
    note = f'<p class="note">{safe(panel.note)}</p>' if panel.note else ""
    figures = "".join(_figure(panel, i) for i in range(len(panel.sources)))
    many = " n1" if len(panel.sources) == 1 else " many" * (len(panel.sources) > 4)
    crisp = " crisp" if panel.size <= CRISP_UP_TO else ""
    return f'<section class="panel">{title}<div class="pictures{many}{crisp}">{figures}</div>{note}</section>'


def _figure(panel: Panel, index: int) -> str:
    if not panel.settings:
        return f'<figure class="forming"><img src="{panel.sources[index]}" alt="a picture on its way"></figure>'
    settings = panel.settings[index]
    return (
        f'<figure class="finished" data-settings="{safe(json.dumps(settings))}"><img src="{panel.sources[index]}" alt="{safe(settings["prompt"])}">'
        f"<figcaption>{safe(panel.captions[index])}</figcaption></figure>"
    )
