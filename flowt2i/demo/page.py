"""The page: what it shows and what its buttons do. Drawing, limits, pictures and models are in the modules beside it.

Only three events and the choice of a model reach Python, all through the queue; the rest (new seed, examples, the gallery) stays in the browser.
"""

import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any

import gradio as gr

from flowt2i.demo import board, mailboxes
from flowt2i.demo.drawing import Clock, Cut, Step, run
from flowt2i.demo.library import Library
from flowt2i.demo.limits import LARGEST_SEED, LONGEST_PROMPT, MOST_GUIDANCE, MOST_IMAGES, MOST_STEPS, SWEEP, WAITING, Request, check, own_settings
from flowt2i.errors import UserError
from flowt2i.pipeline import Samples
from flowt2i.solvers import SOLVERS

HERE = Path(__file__).parent
HOUR = 3_600
THEME = gr.themes.Default(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # no font is downloaded
CSS = (HERE / "page.css").read_text()
HEAD = f"<script>{(HERE / 'page.js').read_text()}</script>"
TITLE = (
    '<div class="title"><h1>flowt2i</h1><p>pictures from words, forming before your eyes</p><button class="theme" aria-label="light or dark">◐</button></div>'
)
WAIT = "One moment: another drawing, or the model, comes first."
Board = Iterator[str]


def draw(library: Library, model: Any, *inputs: Any) -> Board:
    """Pictures of one prompt, forming."""
    library.card(model)
    html = board.render([], 0, WAIT)
    for news in run(lambda: library.load(model), check(*inputs)):
        if isinstance(news, Step):
            html = board.render([board.forming(news)], news.fraction, progress(news))
        elif isinstance(news, Samples):
            html = board.render([board.finished(news, model)], 1, summary(news), done=True)
        elif isinstance(news, Cut):
            gr.Warning(cut(news))
            continue
        yield html  # as it was at a pulse: gradio stops asking here where the visitor has left or pressed Stop


def compare(library: Library, sides: Sequence[tuple[Any, Request]]) -> Board:
    """The same prompt and seeds under two models or settings, one after the other."""
    for model, _ in sides:
        library.card(model)
    panels: list[board.Panel] = []
    clock, html = Clock(), board.render([], 0, WAIT, "compare")
    for letter, (model, request) in zip("AB", sides):
        title = f"{letter} · {model}: {request.steps} {request.solver} steps, guidance {request.guidance:g}"
        for news in run(partial(library.load, model), request, clock):
            if isinstance(news, Step):
                fraction = (len(panels) + news.fraction) / len(sides)
                html = board.render([*panels, board.forming(news, title)], fraction, f"{letter}: {progress(news)}", "compare")
            elif isinstance(news, Samples):
                panels.append(board.finished(news, model, title, f"{news.evaluations} evaluations, {news.seconds:.1f} s"))
                continue
            elif isinstance(news, Cut):
                gr.Warning(f"{letter}: {cut(news)}")
                continue
            yield html
    yield board.render(panels, 1, "The same prompt and the same noise on both sides.", "compare", done=True)


def sweep(library: Library, model: Any, requests: Sequence[Request]) -> Board:
    """One prompt and the same seeds with more and more steps."""
    library.card(model)
    panels: list[board.Panel] = []
    started = time.perf_counter()
    work, warned = sum(request.steps for request in requests), False
    clock, html = Clock(), board.render([], 0, WAIT, "sweep")
    for request in requests:
        title, before = f"{request.steps} step" + "s" * (request.steps > 1), sum(earlier.steps for earlier in requests[: len(panels)])
        for news in run(partial(library.load, model), request, clock):
            if isinstance(news, Step):
                fraction = (before + news.fraction * request.steps) / work
                left = (time.perf_counter() - started) * (1 - fraction) / fraction
                html = board.render([*panels, board.forming(news, title)], fraction, f"{title}, about {left:.0f} s left", "sweep")
            elif isinstance(news, Samples):
                panels.append(board.finished(news, model, title, f"{news.evaluations} evaluations, {news.seconds:.2g} s"))
                continue
            elif isinstance(news, Cut):
                if not warned:  # once for all columns
                    gr.Warning(cut(news))
                warned = True
                continue
            yield html
    used = requests[0]
    yield board.render(panels, 1, f"{used.solver}, guidance {used.guidance:g}: the same noise in every column.", "sweep", done=True)


def cut(news: Cut) -> str:
    return f"The prompt is longer than the model reads ({news.tokens} tokens): its end was left out."


def progress(step: Step) -> str:
    return f"step {step.done} of {step.steps}, about {step.left:.0f} s left"


def summary(samples: Samples) -> str:
    """How the pictures came about, in a line."""
    used, seeds, count = samples.settings, samples.seeds, len(samples.seeds)
    of = f"seed {seeds[0]}" if count == 1 else f"seeds {seeds[0]} to {seeds[-1]}"
    return f"{count} picture{'s' * (count > 1)} in {samples.seconds:.1f} s: {used['steps']} {used['solver']} steps, guidance {used['guidance']:g}, {of}"


def spoken(act: Callable[..., Board]) -> Callable[..., Board]:
    """Every failure as a message on the page; never a traceback there."""

    @wraps(act)
    def told(*inputs: Any) -> Board:
        try:
            yield from act(*inputs)
        except UserError as error:
            raise gr.Error(board.safe(str(error)), title="Not drawn", print_exception=False) from error
        except Exception as error:
            traceback.print_exc()
            raise gr.Error("Something broke while drawing; the terminal of the server says what.", title="Not drawn", print_exception=False) from error

    return told


def page(library: Library) -> gr.Blocks:
    """The page, its queue set up, not yet served."""
    card = library.card(library.first)
    own_steps, own_guidance, own_solver = own_settings(card.config.sample)
    second = library.names[1] if len(library.names) > 1 else library.first

    def buttons(words: str, name: str) -> tuple[gr.Button, gr.Button]:
        with gr.Row():
            return gr.Button(words, variant="primary", scale=3, min_width=120, elem_id=name), gr.Button("Stop", min_width=80, elem_id=f"{name}-stop")

    with gr.Blocks(title="flowt2i", analytics_enabled=False, delete_cache=(HOUR, HOUR)) as blocks:
        gr.HTML(TITLE, js_on_load="flowt2i.theme(element)")
        with gr.Row(equal_height=True):
            model = gr.Dropdown(library.names, value=library.first, label="Model", info=card.facts, scale=1, min_width=220, elem_id="model")
            prompt = gr.Textbox(card.prompts[0], label="Prompt", lines=2, max_lines=5, max_length=LONGEST_PROMPT, scale=3, min_width=300, elem_id="prompt")
        chips = gr.HTML(chip_row(card.prompts), js_on_load="flowt2i.chips(element, trigger)", elem_id="chips")

        with gr.Row(elem_classes="work"):
            with gr.Column(scale=3, min_width=280), gr.Group():
                steps = gr.Slider(1, MOST_STEPS, own_steps, step=1, label="Steps", elem_id="steps")
                guidance = gr.Slider(0, MOST_GUIDANCE, own_guidance, step=0.1, label="Guidance (1: none)", elem_id="guidance")
                solver = gr.Dropdown(list(SOLVERS), value=own_solver, label="Solver", elem_id="solver")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED, elem_id="seed")
                new_seed = gr.Button("New seed", size="sm", elem_id="new-seed")
                shape = gr.Dropdown(card.shapes, value=card.shapes[0], label="Shape", visible=len(card.shapes) > 1, elem_id="shape")
                num = gr.Slider(1, MOST_IMAGES, 4, step=1, label="Pictures", elem_id="num")
                every = gr.Slider(1, 50, 2, step=1, label="Steps per update", elem_id="every")
                negative = gr.Textbox(
                    "", label="Negative prompt", info="what the picture should not show (needs guidance)", max_length=LONGEST_PROMPT, elem_id="negative",
                )  # fmt: skip
            with gr.Column(scale=7, min_width=300, elem_classes="tabs-first"), gr.Tabs():
                with gr.Tab("Draw"):
                    go, stop = buttons("Draw", "go")
                    drawn = gr.HTML(board.empty("Your pictures form here."), elem_id="drawn", js_on_load="flowt2i.watch(element)")
                with gr.Tab("Compare"):
                    gr.Markdown("The same prompt and seeds twice: A under the settings beside, B under these:")
                    with gr.Row():
                        other = gr.Dropdown(library.names, value=second, label="Model B", elem_id="B-model", min_width=150)
                        few = own_steps if second != library.first else 4
                        b_steps = gr.Number(few, label="Steps", precision=0, minimum=1, maximum=MOST_STEPS, min_width=90, elem_id="B-steps")
                        b_guidance = gr.Number(own_guidance, label="Guidance", minimum=0, maximum=MOST_GUIDANCE, step=0.1, min_width=90)
                        b_solver = gr.Dropdown(list(SOLVERS), value=own_solver, label="Solver", min_width=110)
                    go_compare, stop_compare = buttons("Compare", "go-compare")
                    compared = gr.HTML(board.empty("The two sides appear here."), elem_id="compared", js_on_load="flowt2i.watch(element)")
                with gr.Tab("Steps"):
                    gr.Markdown(f"Quality against steps: the same prompt and seeds with {', '.join(map(str, SWEEP[:-1]))} and {SWEEP[-1]} steps.")
                    go_sweep, stop_sweep = buttons("Draw them all", "go-sweep")
                    swept = gr.HTML(board.empty("A column for each number of steps."), elem_id="swept", js_on_load="flowt2i.watch(element)")
        gallery = gr.HTML('<div class="gallery"></div>', elem_id="gallery", js_on_load="flowt2i.gallery(element, trigger)")
        with gr.Accordion("For programs", open=False):
            gr.HTML(api_note(card.prompts[0]), js_on_load="flowt2i.address(element)")

        common = [seed, num, every, negative, shape]

        @spoken
        def on_draw(model, prompt, steps, guidance, solver, *common):
            yield from draw(library, model, prompt, steps, guidance, solver, *common)

        @spoken
        def on_compare(prompt, *rest):
            a, b, common = rest[:4], rest[4:8], rest[8:]
            asked = [(name, check(prompt, *own, *common, drawings=2)) for name, *own in (a, b)]
            if asked[0][1].shape == library.card(a[0]).shapes[0]:  # A's own: B draws its own, which may be another
                asked = [(name, request._replace(shape="")) for name, request in asked]
            yield from compare(library, asked)

        @spoken
        def on_sweep(model, prompt, guidance, solver, *common):
            yield from sweep(library, model, [check(prompt, steps, guidance, solver, *common, drawings=len(SWEEP)) for steps in SWEEP])

        # preprocess=False: `check` alone judges what comes, in words for people, where gradio would print a traceback
        common_options: dict[str, Any] = {"show_progress": "full", "preprocess": False, "api_visibility": "private", "concurrency_id": "drawing",
                                          "concurrency_limit": 1, "trigger_mode": "once"}  # fmt: skip
        for triggers, stopper, act, inputs, output in (
            ([go.click, prompt.submit], stop, on_draw, [model, prompt, steps, guidance, solver, *common], drawn),
            ([go_compare.click], stop_compare, on_compare, [prompt, model, steps, guidance, solver, other, b_steps, b_guidance, b_solver, *common], compared),
            ([go_sweep.click], stop_sweep, on_sweep, [model, prompt, guidance, solver, *common], swept),
        ):
            event = gr.on(triggers, act, inputs, output, **common_options)
            stopper.click(None, cancels=[event], js=f"() => flowt2i.stopping('{output.elem_id}')", api_visibility="private")
            for end in (event.then, event.failure):  # `then` comes after a stop too
                end(None, js=f"() => flowt2i.ended('{output.elem_id}')", api_visibility="private")

        def on_model(name: Any, prompt: Any) -> list[Any]:
            try:
                card = library.card(name)
            except UserError as error:
                raise gr.Error(str(error), print_exception=False) from error
            example = any(prompt in other.prompts for other in library.cards.values())  # what a visitor wrote stays
            first = card.prompts[0] if example and prompt not in card.prompts else gr.skip()
            info, chips = gr.Dropdown(info=card.facts), chip_row(card.prompts)
            shapes = gr.Dropdown(card.shapes, value=card.shapes[0], visible=len(card.shapes) > 1)
            return [info, chips, first, *own_settings(card.config.sample), shapes]

        quietly: dict[str, Any] = {"preprocess": False, "show_progress": "hidden", "api_visibility": "private"}
        model.input(on_model, [model, prompt], [model, chips, prompt, steps, guidance, solver, shape], **quietly)
        in_browser: dict[str, Any] = {"fn": None, "api_visibility": "private"}
        new_seed.click(inputs=None, outputs=seed, js=f"() => Math.floor(Math.random() * {LARGEST_SEED})", **in_browser)
        chips.click(inputs=None, outputs=prompt, js="() => flowt2i.chosen", **in_browser)
        again = [model, prompt, negative, steps, guidance, solver, seed, num, shape]
        gallery.click(inputs=None, outputs=again, js="() => flowt2i.again()", **in_browser)
    blocks.queue(max_size=WAITING, default_concurrency_limit=2, api_open=False)
    mailboxes.bound(blocks._queue)
    return blocks


def chip_row(prompts: list[str]) -> str:
    """Example prompts to click on."""
    return '<div class="chips">' + "".join(f'<button class="chip" dir="auto">{board.safe(prompt)}</button>' for prompt in prompts) + "</div>"


def api_note(prompt: str) -> str:
    """How programs draw here."""
    body = board.safe(json.dumps({"prompt": prompt, "steps": 20, "seed": 0, "num": 1}))
    return (
        "<p>Programs draw here too, within the same limits: <code>POST /api/generate</code> answers with PNGs in JSON "
        "(or one PNG with <code>Accept: image/png</code>), <code>GET /api/models</code> and <code>GET /api/health</code> say what there is.</p>"
        "<pre>curl -s <span class='address'></span>/api/generate \\\n  -H 'Content-Type: application/json' -H 'Accept: image/png' \\\n"
        f"  -d '{body}' -o picture.png</pre>"
    )
