"""The web page: pictures from a prompt, forming step by step. It knows of a model only what `Pipeline` shows.

    flowt2i demo --model runs/quickstart

Every bound is checked here, on the server, whatever the page in the browser allows.
"""

import os
import queue
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from flowt2i.errors import UserError
from flowt2i.pipeline import Pipeline, Samples
from flowt2i.solvers import SOLVERS

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
try:
    import gradio as gr
except ImportError as error:
    raise UserError("the demo needs gradio: pip install -c constraints.txt -e '.[demo]'") from error

LONGEST_PROMPT, MOST_STEPS, MOST_IMAGES, MOST_GUIDANCE, LARGEST_SEED = 2_000, 200, 8, 20, 2**31 - 1
WAITING = 16  # requests that may queue up; further ones are told to come back later
HOUR = 3_600

THEME = gr.themes.Default(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # no font is downloaded
CSS = """
.gradio-container { max-width: 960px !important; margin: 0 auto !important; }
#gallery img { image-rendering: pixelated; }
#status { min-height: 1.6em; }
@media (max-width: 700px) { #drawn { order: -1; } }  /* on a phone the pictures come before the settings */
"""


class Request(NamedTuple):
    """What a visitor asked for, checked."""

    prompt: str
    steps: int
    guidance: float
    solver: str
    seed: int
    images: int
    every: int


def check(prompt: Any, steps: Any, guidance: Any, solver: Any, seed: Any, images: Any, every: Any) -> Request:
    """Turn what came over the net into a `Request`; UserError says what is out of range."""
    text = prompt.strip() if isinstance(prompt, str) else ""
    if not text:
        raise UserError("Say what the picture should show.")
    if len(text) > LONGEST_PROMPT:
        raise UserError(f"The prompt has {len(text):,} characters: {LONGEST_PROMPT:,} at most.")
    if not isinstance(solver, str) or solver not in SOLVERS:
        raise UserError(f"Choose a solver: {' or '.join(SOLVERS)}.")
    return Request(
        text, _whole("Steps", steps, 1, MOST_STEPS), _number("Guidance", guidance, 0, MOST_GUIDANCE), solver, _whole("The seed", seed, 0, LARGEST_SEED),
        _whole("The number of pictures", images, 1, MOST_IMAGES), _whole("Update every", every, 1, MOST_STEPS),
    )  # fmt: skip


def _number(name: str, value: Any, least: int, most: int, kind: str = "number") -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:  # NaN is not between anything
        raise UserError(f"{name} must be a {kind} from {least:,} to {most:,}.")
    return value


def _whole(name: str, value: Any, least: int, most: int) -> int:
    number = _number(name, value, least, most, "whole number")
    if number != int(number):
        raise UserError(f"{name} must be a whole number from {least:,} to {most:,}.")
    return int(number)


class _Abandoned(Exception):
    """The visitor went away or pressed stop."""


_drawing = threading.Lock()  # one drawing at a time, also where the one before was abandoned and has not noticed yet


def run(pipeline: Pipeline, request: Request) -> Iterator[tuple[int, np.ndarray] | Samples]:
    """Draw in a thread of its own: yields (steps done, previews uint8 [B, H, W, 3]), and at last the `Samples`.

    Closing the generator ends the drawing at the next preview.
    """
    news: queue.Queue[tuple[int, np.ndarray] | Samples | Exception] = queue.Queue()
    abandoned = threading.Event()

    def preview(step: int, steps: int, images: np.ndarray) -> None:
        if abandoned.is_set():
            raise _Abandoned
        news.put((step, images))

    def work() -> None:
        try:
            with _drawing:
                news.put(pipeline.sample(request.prompt, steps=request.steps, solver=request.solver, guidance=request.guidance, seed=request.seed,
                                         num=request.images, preview=preview, preview_every=request.every))  # fmt: skip
        except Exception as error:  # handed over to the thread that waits
            news.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            item = news.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if isinstance(item, Samples):
                return
    finally:
        abandoned.set()


def draw(pipeline: Pipeline, *inputs: Any) -> Iterator[tuple[list[Image.Image], str]]:
    """The pictures so far and a line about them, again and again. A `gr.Error` for the visitor instead of any traceback."""
    try:
        request = check(*inputs)
        before, started = pipeline.tokenizer.truncated, time.perf_counter()
        for news in run(pipeline, request):
            if isinstance(news, Samples):
                yield news.pictures(), summary(news)
            else:
                step, images = news
                left = (time.perf_counter() - started) / step * (request.steps - step)
                yield [Image.fromarray(image) for image in images], f"step {step} of {request.steps}, about {left:.0f} s left"
        if pipeline.tokenizer.truncated > before:
            gr.Warning(f"The prompt is longer than the model reads ({pipeline.description.text.max_tokens} tokens): its end was left out.")
    except UserError as error:
        raise gr.Error(str(error), title="Not drawn", print_exception=False) from error
    except Exception as error:
        traceback.print_exc()
        raise gr.Error("Something broke while drawing; the terminal of the server says what.", print_exception=False) from error


def summary(samples: Samples) -> str:
    """How the pictures came about, in a line."""
    used, seeds, count = samples.settings, samples.seeds, len(samples.seeds)
    of = f"seed {seeds[0]}" if count == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    return f"{count} picture{'s' * (count > 1)} in {samples.seconds:.1f} s: {used['steps']} {used['solver']} steps, guidance {used['guidance']:g}, {of}"


def example_prompts(pipeline: Pipeline) -> list[str]:
    """Prompts that fit what the model was trained on."""
    if pipeline.description.is_scenes:
        from flowt2i.data.scenes import curated_prompts

        return curated_prompts()
    return list(pipeline.description.prompts) or ["a picture"]


def page(pipeline: Pipeline) -> gr.Blocks:
    """The page, its queue set up, not yet served."""
    own = pipeline.settings()
    prompts = example_prompts(pipeline)
    size = pipeline.description.codec.image_size
    parameters = sum(p.numel() for p in pipeline.model.parameters()) / 1e6

    with gr.Blocks(title="flowt2i", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as blocks:
        gr.Markdown(f"# flowt2i\n`{pipeline.name or 'model'}`: {parameters:.1f}M parameters, {size}×{size} pictures")
        prompt = gr.Textbox(prompts[0], label="Prompt", lines=2, max_lines=6, max_length=LONGEST_PROMPT)
        with gr.Row():
            go, stop = gr.Button("Draw", variant="primary", min_width=100), gr.Button("Stop", min_width=100)
        with gr.Row():
            with gr.Column(min_width=300):
                images = gr.Slider(1, MOST_IMAGES, 4, step=1, label="Pictures")
                steps = gr.Slider(1, MOST_STEPS, min(own["steps"], MOST_STEPS), step=1, label="Steps")
                guidance = gr.Slider(0, MOST_GUIDANCE, min(own["guidance"], MOST_GUIDANCE), step=0.1, label="Guidance",
                                     info="1: none; more follows the prompt more closely")  # fmt: skip
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED)
                new_seed = gr.Button("New seed", size="sm")
                with gr.Accordion("More", open=False):
                    solver = gr.Radio(list(SOLVERS), value=own["solver"], label="Solver", info="heun: twice the work a step, fewer steps needed")
                    every = gr.Slider(1, 50, 2, step=1, label="Update every … steps")
            with gr.Column(min_width=300, elem_id="drawn"):
                gallery = gr.Gallery(label="Pictures", columns=2, height="auto", format="png", object_fit="contain", elem_id="gallery",
                                     buttons=["download", "fullscreen"])  # fmt: skip
                status = gr.Markdown(elem_id="status")
        gr.Examples([[p] for p in prompts], inputs=prompt, label="Prompts to try", examples_per_page=8)

        inputs = [prompt, steps, guidance, solver, seed, images, every]
        # preprocess=False: `check` alone judges what comes, in words for people, where gradio would print a traceback
        drawing = gr.on([go.click, prompt.submit], _bind(pipeline), inputs, [gallery, status], show_progress="minimal", show_progress_on=gallery,
                        preprocess=False, api_name="generate", concurrency_limit=1, trigger_mode="once")  # fmt: skip
        stop.click(lambda: "stopped", None, status, cancels=[drawing], queue=False, api_visibility="private")
        new_seed.click(lambda: random.randrange(LARGEST_SEED), None, seed, queue=False, api_visibility="private")
    return blocks.queue(max_size=WAITING)


def _bind(pipeline: Pipeline) -> Callable[..., Iterator[tuple[list[Image.Image], str]]]:
    """`draw` with its inputs by name, as gradio's API shows them."""

    def generate(prompt: str, steps: int, guidance: float, solver: str, seed: int, images: int, every: int) -> Iterator[tuple[list[Image.Image], str]]:
        """Draw pictures of a prompt; each update is the pictures so far and a line about them."""
        yield from draw(pipeline, prompt, steps, guidance, solver, seed, images, every)

    return generate


def serve(pipeline: Pipeline, port: int = 7860, share: bool = False, block: bool = True) -> gr.Blocks:
    """Serve the page on this machine until Ctrl-C (or return at once: block=False). UserError where the port cannot be had."""
    if not 1 <= port <= 65535:
        raise UserError(f"--port {port} is out of range: choose 1 to 65535")
    blocks = page(pipeline)
    try:
        blocks.launch(server_name="127.0.0.1", server_port=port, share=share, prevent_thread_lock=True, quiet=True, ssr_mode=False,
                      footer_links=["api"], theme=THEME, css=CSS, enable_monitoring=False)  # fmt: skip
    except OSError as error:
        raise UserError(f"port {port} cannot be had (another program uses it, or it needs more rights): choose another with --port") from error
    print(f"the page is at {blocks.local_url}{f' and at {blocks.share_url}' if blocks.share_url else ''} (stop with Ctrl-C)", file=sys.stderr)
    if block:
        blocks.block_thread()
    return blocks
