"""The demo without a server: limits, the library of models, drawing, the HTML of the board."""

import asyncio
import json
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gradio")
from demoing import PROMPTS, write_model

from flowt2i import box
from flowt2i.cli import main
from flowt2i.config import SampleConfig
from flowt2i.demo import Library, board, drawing, found, parse_auth, serve
from flowt2i.demo.guard import HERE, Guard, allowed
from flowt2i.demo.limits import MOST_UPDATES, Request, check, own_settings, readable
from flowt2i.errors import UserError
from flowt2i.pipeline import Pipeline, Samples
from flowt2i.solvers import SOLVERS, ToleranceError

WANTED: dict[str, Any] = {"prompt": "a red circle", "steps": 6, "guidance": 2.0, "solver": "euler", "seed": 7, "num": 2, "every": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("demo") / "runs" / "tiny")


@pytest.fixture(scope="module")
def pipeline(run: Path) -> Pipeline:
    return Pipeline.from_pretrained(run, device="cpu")


# ---- limits


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": ""}, "Say what"), ({"prompt": " \n"}, "Say what"), ({"prompt": "\x00\x07"}, "Say what"), ({"prompt": 3}, "must be a text"), 
        ({"negative": 5}, "must be a text"),
        ({"prompt": None}, "Say what"), ({"prompt": ["a"]}, "must be a text"), ({"prompt": "x" * 2001}, "2,000 at most"),
        ({"prompt": "x" * 10**7}, "2,000 at most"),
        ({"negative": "x" * 2001}, "2,000 at most"), ({"steps": 0}, "1 to 200"), ({"steps": -1}, "1 to 200"), ({"steps": 201}, "1 to 200"),
        ({"steps": 1e9}, "1 to 200"), ({"steps": float("nan")}, "1 to 200"), ({"steps": "many"}, "1 to 200"), ({"steps": None}, "1 to 200"),
        ({"steps": True}, "1 to 200"), ({"steps": 2.5}, "whole number"), ({"num": 9}, "1 to 8"), ({"num": 0}, "1 to 8"), ({"guidance": -1}, "0 to 20"),
        ({"guidance": float("inf")}, "0 to 20"), ({"guidance": float("nan")}, "0 to 20"), ({"guidance": 1e9}, "0 to 20"), ({"guidance": {}}, "0 to 20"),
        ({"solver": "oiler"}, "did you mean 'euler'"), ({"solver": None}, "euler"), ({"solver": ["euler"]}, "euler"),
        ({"solver": "z" * 10**6}, "No such solver"), ({"seed": -1}, "0 to"), ({"seed": 2**40}, "0 to"), ({"seed": None}, "0 to"),
        ({"every": 0}, "1 to 200"), ({"every": float("inf")}, "1 to 200"),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused_in_one_line(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        check(**(WANTED | changes))
    assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_is_offered(solver: str) -> None:
    assert check(**(WANTED | {"solver": solver})).solver == solver


def test_prompts_keep_every_script_and_lose_what_nobody_can_read() -> None:
    assert readable("prompt", "  a\tred\n circle\x00\x1b[31m ") == "a red circle[31m"
    assert readable("prompt", "دائرة حمراء كبيرة") == "دائرة حمراء كبيرة"  # Arabic, right to left
    assert readable("prompt", "עיגול\u202e אדום\u2066") == "עיגול אדום"  # Hebrew, with marks that would turn the page's own words round
    assert readable("prompt", "a \ud800 heart") == "a heart"  # half of a surrogate pair
    assert readable("prompt", "👩‍🚀 ❤️") == "👩‍🚀 ❤️"  # joiners hold emoji together


def test_a_drawing_has_a_bounded_number_of_previews() -> None:
    assert check(**(WANTED | {"steps": 200, "every": 1})).every == 200 / MOST_UPDATES
    assert check(**WANTED).every == 2
    assert check(**(WANTED | {"steps": 200, "every": 1, "num": 8, "solver": "dopri5"})).every == 200 * 8 / MOST_UPDATES  # picture after picture
    half = check(**(WANTED | {"steps": 200, "every": 1}), drawings=2)
    assert (half.updates, half.every) == (MOST_UPDATES / 2, 400 / MOST_UPDATES)


# ---- models


def test_library_offers_the_chosen_first_then_the_newest(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, foreign, empty = write_model(tmp_path / "models" / "tiny", seed=1), tmp_path / "models" / "foreign", tmp_path / "runs" / "started"
    foreign.mkdir()
    (foreign / "config.json").write_text("{}")
    (foreign / "model.safetensors").write_bytes(b"nothing of ours")
    (empty / "checkpoints").mkdir(parents=True)
    shutil.copytree(run / "checkpoints" / "step_00000001", tmp_path / "models" / "exported")
    monkeypatch.chdir(tmp_path)
    assert set(found()) == {Path("models/tiny"), Path("models/foreign"), Path("models/exported")}
    library = Library([run], found())
    assert library.names[0] == "tiny" and set(library.names) == {"tiny", "tiny (2)", "exported"}  # one of a foreign make is passed over
    assert library.card("tiny (2)").path.resolve() == other
    assert library.card("tiny").prompts == list(PROMPTS) and "32×32" in library.card("tiny").facts
    for name in ("runs/tiny", "../tiny", "", None, 3, ["tiny"]):
        with pytest.raises(UserError, match="not offered"):
            library.card(name)


def test_an_exported_model_is_served(run: Path, tmp_path: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["export", str(run), "--to", str(tmp_path / "models" / "travelled")]) == 0
    monkeypatch.chdir(tmp_path)
    library = Library([], found(), device="cpu")
    assert library.names == ["travelled"]
    np.testing.assert_array_equal(library.load("travelled").sample("a", steps=2).images, pipeline.sample("a", steps=2).images)


def test_library_loads_once_and_again_where_a_run_went_on(tmp_path: Path) -> None:
    run = write_model(tmp_path / "going")
    library = Library([run], device="cpu")
    before = library.load("going")
    assert library.load("going") is before
    write_model(tmp_path / "going", seed=5, step=2)
    after = library.load("going")
    assert after is not before and not np.array_equal(before.sample("a", steps=1).images, after.sample("a", steps=1).images)


def test_few_models_are_kept_in_memory(tmp_path: Path) -> None:
    library = Library([write_model(tmp_path / f"m{k}", seed=k) for k in range(4)], device="cpu")
    for name in library.names:
        library.load(name)
    assert len(library._loaded) == 3 and "m0" not in library._loaded


def test_scenes_models_get_prompts_of_scenes(run: Path) -> None:
    from dataclasses import replace

    card = Library([run]).card("tiny")
    assert len(replace(card, description=card.description.model_copy(update={"source": "scenes"})).prompts) == 16


def test_no_model_a_missing_and_a_foreign_one_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(box, "BOX", tmp_path / "nothing")  # no model came with this installation
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    for words, says in ((["demo"], "make quickstart"), (["demo", "--model", "nowhere"], "no model at nowhere"), (["demo", "--model", "foreign"], "foreign")):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1 and "Traceback" not in error


# ---- drawing


def test_steps_then_samples(pipeline: Pipeline) -> None:
    *steps, samples = drawing.run(lambda: pipeline, check(**WANTED))
    assert isinstance(samples, Samples) and all(isinstance(step, drawing.Step) for step in steps)
    assert [step.done for step in steps] == [1, 3, 5, 6] and steps[-1].fraction == 1 and steps[0].left >= 0
    assert all(step.images.shape == (2, 32, 32, 3) for step in steps)
    expected = pipeline.sample("a red circle", steps=6, guidance=2.0, solver="euler", seed=7, num=2).images
    np.testing.assert_array_equal(samples.images, expected)


def test_a_prompt_that_is_cut_is_told(pipeline: Pipeline) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert drawing.Cut(12) in list(drawing.run(lambda: pipeline, check(**WANTED | {"prompt": "a red circle " * 20, "steps": 1})))


def evaluated(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, each: Callable[[int], None] = lambda _: None) -> list[int]:
    """Counts evaluations of the network, and calls `each` at every one."""
    count: list[int] = []
    field = pipeline.field

    def counted(*given: Any) -> Any:
        count.append(len(count))
        each(len(count))
        return field(*given)

    monkeypatch.setattr(pipeline, "field", counted)
    return count


def test_an_abandoned_drawing_ends_before_the_next_evaluation(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    closed, sixth = threading.Event(), threading.Event()

    def wait(count: int) -> None:
        if count == 6:
            sixth.set()
            closed.wait(30)

    count = evaluated(pipeline, monkeypatch, wait)
    pictures = drawing.run(lambda: pipeline, Request("a red circle", 200, 2.0, "rk4", 0, 1, 200))  # the next preview is far away
    next(pictures)
    assert sixth.wait(30)
    pictures.close()
    closed.set()
    with drawing._turn:  # the drawing holds it until it has ended
        assert len(count) == 6


def test_whoever_leaves_while_waiting_for_the_turn_is_gone(pipeline: Pipeline) -> None:
    gone, loaded = threading.Event(), []
    with drawing._turn:
        waiting = drawing.run(lambda: loaded.append(1) or pipeline, check(**WANTED), gone=gone)
        assert next(waiting) == drawing.Pulse()
        gone.set()
        assert not [news for news in waiting if not isinstance(news, drawing.Pulse)] and not loaded


@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_a_drawing_that_takes_too_long_is_ended_between_previews(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, solver: str) -> None:
    count = evaluated(pipeline, monkeypatch, lambda _: time.sleep(0.05))
    with pytest.raises(UserError, match="longer than"):
        list(drawing.run(lambda: pipeline, check(**WANTED | {"solver": solver, "steps": 200, "every": 200}), drawing.Clock(0.2)))
    assert len(count) <= 5


def test_the_drawings_of_one_request_share_its_seconds(pipeline: Pipeline) -> None:
    clock = drawing.Clock()
    list(drawing.run(lambda: pipeline, check(**WANTED), clock))
    assert 0 < clock.spent < 60
    clock.limit = clock.spent
    with pytest.raises(UserError, match="longer than"):
        list(drawing.run(lambda: pipeline, check(**WANTED), clock))


def test_solvers_that_draw_one_by_one_show_no_more_previews(pipeline: Pipeline) -> None:
    wanted = check(**WANTED | {"solver": "dopri5", "steps": 5, "num": 4, "every": 1}, drawings=8)
    steps = [news for news in drawing.run(lambda: pipeline, wanted) if isinstance(news, drawing.Step)]
    assert 3 <= len(steps) <= MOST_UPDATES / 8 and len({len(step.images) for step in steps}) > 2
    assert not [news for news in drawing.run(lambda: pipeline, check(**WANTED)._replace(updates=0)) if isinstance(news, drawing.Step)]


def test_a_solver_that_gives_up_names_no_option_of_the_command_line(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def gives_up(*_: Any, **__: Any) -> Any:
        raise ToleranceError("the error stays above the tolerance")

    monkeypatch.setattr("flowt2i.settings.dopri5", gives_up)
    with pytest.raises(UserError, match=r"dopri5: .*choose another solver") as caught:
        list(drawing.run(lambda: pipeline, check(**WANTED | {"solver": "dopri5"})))
    assert "--" not in str(caught.value)


# ---- the board


def test_nothing_of_a_prompt_is_read_as_html_or_as_a_template(pipeline: Pipeline) -> None:
    evil = """<script>alert(1)</script>"><img src=x onerror=alert(1)> ${alert(1)} {{constructor}} @children '"""
    samples = pipeline.sample(evil, steps=1, num=1)
    html = board.render([board.finished(samples, "tiny", evil, evil)], 1, evil, done=True)
    for piece in ("<script", "<img src=x", "${", "{{", "@children", "alert(1)>"):
        assert piece not in html
    import html as library

    settings = json.loads(library.unescape(html.split('data-settings="')[1].split('"')[0]))
    assert settings["prompt"] == evil and settings["model"] == "tiny"  # it comes back whole


def test_progress_is_between_0_and_100() -> None:
    for fraction, percent in ((-1, 0), (0.254, 25), (7, 100)):
        assert f'aria-valuenow="{percent}"' in board.render([], fraction, "")


# ---- the door


@pytest.mark.parametrize("path", ["/gradio_api/upload", "/gradio_api/run/predict", "/gradio_api/run/on_draw", "/gradio_api/api/on_draw",
                                  "/gradio_api/call/on_draw", "/gradio_api/call/v2/on_draw", "/gradio_api/process_recording",
                                  "/gradio_api/vibe-edit", "/gradio_api/queue/join/", "/login",
                                  "/gradio_api/file=/etc/passwd", "/config"])  # fmt: skip
def test_nothing_but_the_queue_and_the_api_is_written_to(path: str) -> None:
    assert not allowed("POST", path) and not allowed("PUT", path) and not allowed("DELETE", path)


@pytest.mark.parametrize("path", ["/gradio_api/file=/etc/passwd", "/gradio_api/file/etc/passwd", "/file=/etc/passwd", "/docs",
                                  "/gradio_api/proxy=http://127.0.0.1/", "/gradio_api/stream/a/b/c/playlist.m3u8", "/static/../../../../etc/passwd",
                                  "/assets/..\\..\\x",
                                  "/gradio_api/deep_link", "/monitoring", "/gradio_api/custom_component/x/y/z/../../w", "/openapi.json",
                                  "/gradio_api/runs", "/gradio_api/dev/reload", "/gradio_api/heartbeat/x"])  # fmt: skip
def test_no_file_is_read_but_the_pages_own(path: str) -> None:
    assert not allowed("GET", path) and not allowed("HEAD", path)


async def ask(guard: Guard, path: str, *headers: tuple[bytes, bytes]) -> int:
    """The status that a GET gets from the guard."""
    statuses: list[int] = []

    async def send(message: Any) -> None:
        statuses.append(message.get("status"))

    path, _, query = path.partition("?")
    scope = {"type": "http", "path": path, "query_string": query.encode(), "method": "GET", "headers": headers}
    await guard(scope, None, send)  # type: ignore[arg-type]
    return statuses[0]


async def answers(_: Any, __: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200})


@pytest.mark.parametrize(("name", "status"), [("127.0.0.1:7860", 200), ("localhost", 200), ("LOCALHOST:1", 200), ("[::1]:7860", 200), ("evil.example", 403),
                                              ("evil.example:7860", 403), ("127.0.0.1.evil.example", 403), ("localhost:x", 403), ("", 403)])  # fmt: skip
def test_only_names_of_this_machine_are_answered(name: str, status: int) -> None:
    def got(*headers: tuple[bytes, bytes], hosts: Collection[str] | None = HERE) -> int:
        return asyncio.run(ask(Guard(answers, frozenset, hosts=hosts), "/", *headers))

    assert got((b"host", name.encode())) == status
    assert got() == got((b"host", b"localhost"), (b"host", b"evil.example")) == 403
    assert got((b"host", name.encode()), hosts=None) == 200  # where it is shared


def test_those_who_listen_do_not_close_the_door_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowt2i.demo.guard.CONNECTIONS", {"listening": 3, "requests": 1})
    one, other, plain = "/gradio_api/queue/data?session_hash=one", "/gradio_api/queue/data?session_hash=other", "/api/health"

    async def while_open(*held: str) -> list[int]:
        """The status of each kind of request while others are open."""
        release = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await answers(scope, receive, send)
            if ("held", "") in scope["headers"]:
                await release.wait()

        guard = Guard(app, frozenset, hosts=None)
        tasks = [asyncio.create_task(ask(guard, path, ("held", ""))) for path in held]  # type: ignore[arg-type]
        await asyncio.sleep(0)
        statuses = [await ask(guard, path) for path in (one, other, plain)]
        release.set()
        assert await asyncio.gather(*tasks) == [200] * len(held) and not guard.open
        return statuses

    assert asyncio.run(while_open(plain)) == [200, 200, 429]
    assert asyncio.run(while_open(one)) == [200, 200, 200]
    assert asyncio.run(while_open(one, one)) == [429, 200, 200]  # two of one session
    assert asyncio.run(while_open(one, one, other)) == [429, 429, 200]


def test_sharing_wants_a_password_or_the_word_public(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="--auth USER:PASSWORD, or --public"):
        serve(Library([run]), 7860, share=True)
    assert main(["demo", "--model", str(run), "--share"]) == 2 and "--public" in capsys.readouterr().err
    assert parse_auth("a:b:c:long:one") == ("a", "b:c:long:one") and parse_auth(None) is None
    for wrong in ("", "user", "user:", ":password123", "user:short"):
        with pytest.raises(UserError, match="--auth wants"):
            parse_auth(wrong)


def test_without_gradio_it_says_what_to_install(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match="pip install"):
        serve(Library([run]), 7860)


@pytest.mark.parametrize("port", [0, -1, 70000])
def test_ports_out_of_range(run: Path, port: int) -> None:
    with pytest.raises(UserError, match="out of range"):
        serve(Library([run]), port, block=False)


def test_a_models_own_settings_are_what_a_visitor_may_ask_for():
    assert own_settings(SampleConfig(steps=250, guidance=30.0)) == (200, 20, "euler")
    assert own_settings(SampleConfig(schedule="0,0.5,1")).steps == 2, "times that are written out say how many steps they are"
