"""The demo's server over plain HTTP: what the page does, what programs do, and what a stranger may try."""

import base64
import io
import json
import os
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio")
from demoing import GOOD, OTHERS, Served, follow, free_port, join, serving, visit, write_model

from flowt2i.demo import Library, drawing, limits, mailboxes, serve
from flowt2i.demo.guard import LARGEST_BODY
from flowt2i.description import Bucket
from flowt2i.errors import UserError

API_GOOD: dict[str, Any] = {name: GOOD[name] for name in ("model", "prompt", "steps", "guidance", "solver", "seed", "num")}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    folder = tmp_path_factory.mktemp("demo")
    return Library([write_model(folder / "tiny"), write_model(folder / "other", seed=1, prompts=OTHERS)], device="cpu")


@pytest.fixture(scope="module")
def served(library: Library, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    hostile = {"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SERVER_PORT": "1", "GRADIO_SHARE": "True", "GRADIO_ALLOWED_PATHS": "/",
               "GRADIO_ROOT_PATH": "/elsewhere", "GRADIO_MCP_SERVER": "True", "GRADIO_NUM_WORKERS": "3", "GRADIO_SSR_MODE": "True",
               "GRADIO_RUN_HISTORY": "True"}  # fmt: skip
    os.environ.update(hostile)
    try:
        with serving(library) as running:
            yield running
    finally:
        for name in hostile:
            os.environ.pop(name, None)


def pictures_of(html: str) -> np.ndarray:
    """Finished pictures on a board, uint8 [N, H, W, 3]."""
    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in re.findall(r'data:image/png;base64,([^"]+)"', html)])


def generate(served: Served, headers: dict[str, str] | None = None, **changes: Any) -> httpx.Response:
    return httpx.post(f"{served.url}/api/generate", json=API_GOOD | changes, headers=headers, timeout=120)


def still_up(served: Served) -> bool:
    return httpx.get(f"{served.url}/api/health").json()["status"] == "ok" and generate(served, steps=1, num=1).status_code == 200


# ---- the page


def test_pictures_form_step_by_step_and_are_the_pipelines(served: Served) -> None:
    boards, error = visit(served, "forming")
    assert error is None
    lines = [re.search(r'role="status">([^<]*)<', html)[1] for html in boards]  # type: ignore[index]
    assert [line.split(",")[0] for line in lines[:4]] == ["step 1 of 6", "step 3 of 6", "step 5 of 6", "step 6 of 6"] and "s left" in lines[0]
    assert lines[-1].startswith("2 pictures in") and "seeds 7 to 8" in lines[-1] and "image/webp" in boards[0]
    expected = served.library.load("tiny").sample(GOOD["prompt"], steps=6, guidance=2.0, solver="euler", seed=7, num=2).images
    np.testing.assert_array_equal(pictures_of(boards[-1]), expected)


def test_compare_draws_both_sides_on_the_same_seeds(served: Served) -> None:
    boards, error = visit(served, "comparing", "on_compare")
    assert error is None and "A · tiny: 6 euler steps, guidance 2" in boards[-1] and "B · other: 3 heun steps, guidance 1" in boards[-1]
    both = pictures_of(boards[-1])
    a = served.library.load("tiny").sample(GOOD["prompt"], steps=6, guidance=2.0, solver="euler", seed=7, num=2).images
    b = served.library.load("other").sample(GOOD["prompt"], steps=3, guidance=1.0, solver="heun", seed=7, num=2).images
    np.testing.assert_array_equal(both, np.concatenate([a, b]))


def test_sweep_has_a_column_for_each_number_of_steps(served: Served) -> None:
    boards, error = visit(served, "sweeping", "on_sweep", num=1, solver="heun")
    assert error is None and len(pictures_of(boards[-1])) == len(limits.SWEEP)
    assert re.findall(r"<h3>(\d+) step", boards[-1]) == [str(steps) for steps in limits.SWEEP]
    assert re.findall(r"(\d+) evaluations", boards[-1]) == [str(2 * (2 * steps - 1)) for steps in limits.SWEEP]  # Heun's, guidance's counted


def test_choosing_a_model_brings_its_prompts_and_settings(served: Served) -> None:
    with httpx.Client() as client:
        for prompt, then in (("a red circle", "a green star"), ("my own", {"__type__": "update"})):  # what a visitor wrote stays
            assert join(served, client, "choosing", "on_model", model="other", prompt=prompt).status_code == 200
            data = list(follow(served, client, "choosing"))[-1]["output"]["data"]
            assert "a pink cross" in data[1] and data[2:6] == [then, 5, 3, "euler"] and data[6]["value"] == "32x32"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": ""}, "Say what"), ({"prompt": "\x00\x01"}, "Say what"), ({"prompt": "x" * 2001}, "2,000 at most"), ({"steps": 0}, "1 to 200"),
        ({"steps": -1}, "1 to 200"), ({"steps": float("nan")}, "1 to 200"), ({"steps": 1e9}, "1 to 200"), ({"guidance": float("inf")}, "0 to 20"),
        ({"num": 9}, "1 to 8"), ({"solver": "rk9"}, "No such solver"), ({"seed": -1}, "0 to"), ({"model": "../../etc"}, "not offered"),
        ({"model": None}, "not offered"),
    ],
)  # fmt: skip
def test_bad_input_is_a_message_on_the_page(served: Served, changes: dict[str, Any], says: str, capfd: pytest.CaptureFixture[str]) -> None:
    for function in ("on_draw", "on_compare"):
        _, error = visit(served, f"bad-{function}", function, **changes)
        assert error and says in error and "Traceback" not in error
    assert "Traceback" not in capfd.readouterr().err
    assert visit(served, "good-after", steps=1, num=1)[1] is None


@pytest.mark.parametrize("prompt", ["دائرة حمراء\u202e", "a \ud800 heart \x1b[31m", "<script>alert(1)</script> {{x}} ${x}", "👩‍🚀", "x" * 2000])
@pytest.mark.filterwarnings("ignore:.*cut to")
def test_odd_prompts_are_drawn(served: Served, prompt: str) -> None:
    boards, error = visit(served, "odd", prompt=prompt, steps=1, num=1)
    assert error is None and "board draw done" in boards[-1] and "<script" not in boards[-1]
    assert generate(served, prompt=prompt.encode("utf-8", "ignore").decode(), steps=1, num=1).status_code == 200


def test_a_fault_of_ours_shows_no_traceback(served: Served, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(served.library.load("tiny"), "sample", lambda *_, **__: 1 / 0)
    _, error = visit(served, "broken")
    assert error and "Something broke" in error and "ZeroDivision" not in error
    answer = generate(served)
    assert answer.status_code == 500 and "terminal" in answer.json()["error"] and "ZeroDivision" not in answer.text
    assert capfd.readouterr().err.count("ZeroDivisionError") >= 2  # for whoever runs the server


def test_a_model_that_went_bad_is_a_message(library: Library, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(name: str) -> Any:
        raise UserError("checkpoint x is damaged")

    monkeypatch.setattr(library, "load", gone)
    assert "damaged" in (visit(served, "damaged")[1] or "")
    answer = generate(served)
    assert (answer.status_code, answer.json()["error"]) == (422, "checkpoint x is damaged")


@pytest.mark.parametrize("function", ["on_draw", "on_compare", "on_sweep"])
@pytest.mark.filterwarnings("ignore:.*cut to")
def test_a_prompt_that_is_cut_is_told(served: Served, function: str) -> None:
    with httpx.Client(timeout=60) as client:
        assert join(served, client, f"cut-{function}", function, prompt="a red circle " * 20, steps=1, steps_b=1, num=1).status_code == 200
        told = [message["log"] for message in follow(served, client, f"cut-{function}") if message["msg"] == "log"]
    assert len(told) == (2 if function == "on_compare" else 1) and all("12 tokens" in log for log in told)
    assert generate(served, prompt="a red circle " * 20, steps=1, num=1).json()["cut"] and not generate(served, steps=1, num=1).json()["cut"]


def test_steps_per_update_counts_in_every_tab(served: Served) -> None:
    often, seldom = (visit(served, f"updates-{every}", "on_sweep", num=1, every=every)[0] for every in (1, 50))
    assert len(seldom) < len(often) <= limits.MOST_UPDATES + 1


# ---- the API


def test_api_draws_what_the_pipeline_draws(served: Served) -> None:
    answer = generate(served).json()
    got = np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(image["png"])))) for image in answer["images"]])
    expected = served.library.load("tiny").sample(GOOD["prompt"], steps=6, guidance=2.0, solver="euler", seed=7, num=2).images
    np.testing.assert_array_equal(got, expected)
    assert [image["seed"] for image in answer["images"]] == [7, 8] and answer["evaluations"] == 12 and answer["settings"]["steps"] == 6


def test_api_sends_one_png_that_tells_how_it_was_made(served: Served) -> None:
    answer = generate(served, {"accept": "image/png"}, num=1)
    assert answer.headers["content-type"] == "image/png"
    told = json.loads(Image.open(io.BytesIO(answer.content)).info["flowt2i"])
    assert (told["prompt"], told["seed"], told["steps"]) == ("a red circle", 7, 6)
    assert generate(served, {"accept": "image/png"}, num=2).status_code == 422


def test_the_shapes_that_a_model_was_trained_at_are_offered_and_no_others(tmp_path: Path) -> None:
    buckets = tuple(Bucket(width=w, height=h, train=n, heldout=0) for w, h, n in ((24, 40, 1), (32, 32, 5), (40, 24, 2)))
    library = Library([write_model(tmp_path / "wide", buckets=buckets), write_model(tmp_path / "tall", buckets=buckets[:1])], device="cpu")
    assert library.card("wide").shapes == ["32x32", "24x40", "40x24"] and "32×32 pixels and 2 other shapes" in library.card("wide").facts
    with serving(library) as served:
        listed = httpx.get(f"{served.url}/api/models").json()["models"][0]
        assert listed["shapes"] == ["32x32", "24x40", "40x24"]
        for shape, size in (("40x24", (24, 40)), ("", (32, 32))):
            answer = generate(served, model="wide", shape=shape, num=1)
            assert Image.open(io.BytesIO(base64.b64decode(answer.json()["images"][0]["png"]))).size == size[::-1]
            html, error = visit(served, f"shape-{shape}", model="wide", shape=shape, num=1)
            assert not error and pictures_of(html[-1]).shape == (1, *size, 3)
            assert f"&quot;shape&quot;: &quot;{size[1]}x{size[0]}&quot;" in html[-1], "the gallery draws it again in this shape"
        for shape in ("4096x4096", "wide", 7):
            answer = generate(served, model="wide", shape=shape)
            assert answer.status_code == 422 and ("choose one of these shapes" in answer.json()["error"] or "text" in answer.json()["error"])
        html, error = visit(served, "own-shapes", "on_compare", model="wide", model_b="tall", shape="32x32", num=1)
        assert not error and all(f"&quot;shape&quot;: &quot;{own}&quot;" in html[-1] for own in ("32x32", "24x40")), "each draws its own"


def test_api_uses_the_models_own_settings_where_none_are_given(served: Served) -> None:
    answer = httpx.post(f"{served.url}/api/generate", json={"prompt": "a red circle"}, timeout=60).json()
    assert answer["model"] == "tiny" and answer["settings"]["steps"] == 5 and len(answer["images"]) == 1
    listed = httpx.get(f"{served.url}/api/models").json()["models"]
    assert [model["name"] for model in listed] == ["tiny", "other"] and listed[0]["defaults"]["steps"] == 5 and listed[0]["image_size"] == 32
    assert str(Path.home()) not in json.dumps(listed) and "/tmp" not in json.dumps(listed)  # names, no places


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b"", 400, "JSON"), (b"{", 400, "JSON"), (b"[]", 400, "object"), (b"[" * 60_000, 400, "JSON"), (b'"x"', 400, "object"), (b"\xff\xfe", 400, "JSON"),
        (b"{}", 422, "Say what"), (b'{"prompt": "a", "stepz": 3}', 422, "did you mean 'steps'"), (b'{"prompt": "a", "steps": NaN}', 422, "1 to 200"),
        (b'{"prompt": "a", "steps": 1e999}', 422, "1 to 200"), (b'{"prompt": "a", "guidance": Infinity}', 422, "0 to 20"),
        (b'{"prompt": "a", "model": "/etc"}', 422, "not offered"), 
        (b'{"prompt": "a", "negative": 5}', 422, "must be a text"), (b'{"prompt": "a", "steps": ' + b"9" * 5000 + b"}", 400, "JSON"),
        (b'{"prompt": "' + b"x" * 10_000_000 + b'"}', 413, "bytes"),
    ],
)  # fmt: skip
def test_api_refuses_in_one_line(served: Served, body: bytes, status: int, says: str, capfd: pytest.CaptureFixture[str]) -> None:
    answer = httpx.post(f"{served.url}/api/generate", content=body, headers={"content-type": "application/json"}, timeout=60)
    assert answer.status_code == status and says in answer.json()["error"] and len(answer.text) < 300
    assert "Traceback" not in capfd.readouterr().err


def test_api_takes_json_only_and_its_methods_only(served: Served) -> None:
    assert httpx.post(f"{served.url}/api/generate", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert httpx.get(f"{served.url}/api/generate").status_code == 403 and httpx.post(f"{served.url}/api/health").status_code == 403


def test_sent_in_pieces_a_body_is_still_bounded(served: Served) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield b"x" * 65_536

    with httpx.Client() as client:
        try:
            assert client.post(f"{served.url}/api/generate", content=endless(), headers={"content-type": "application/json"}).status_code == 413
        except httpx.TransportError:  # the server had hung up before all was sent
            pass
    assert still_up(served)


# ---- abuse


def test_fifty_clients_at_the_api_some_served_the_rest_refused_at_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    release, drawing = threading.Event(), threading.Event()
    pipeline = served.library.load("tiny")
    sample = pipeline.sample

    def slow(*arguments: Any, **settings: Any) -> Any:
        drawing.set()
        release.wait(60)
        return sample(*arguments, **settings)

    monkeypatch.setattr(pipeline, "sample", slow)
    refused = threading.Semaphore(0)

    def client(_: int) -> list[int]:
        codes = []
        with httpx.Client(timeout=120, limits=httpx.Limits(max_keepalive_connections=0)) as own:
            for _ in range(20):
                codes.append(own.post(f"{served.url}/api/generate", json=API_GOOD | {"steps": 1, "num": 1}).status_code)
                if codes[-1] == 429:
                    refused.release()
        return codes

    with ThreadPoolExecutor(50) as pool:
        answers = pool.map(client, range(50))
        try:
            for _ in range((50 - limits.WAITING - 1) * 20):  # all that the waiting ones do not hold is refused while not one has been drawn
                assert refused.acquire(timeout=60)
            assert httpx.get(f"{served.url}/api/health").json()["waiting"] == limits.WAITING + 1
        finally:
            release.set()
        counted = Counter(code for codes in answers for code in codes)
    assert set(counted) == {200, 429} and counted[200] >= limits.WAITING + 1 and sum(counted.values()) == 1000


def test_the_pages_queue_is_bounded_and_says_so_at_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    pipeline = served.library.load("tiny")
    sample = pipeline.sample
    monkeypatch.setattr(pipeline, "sample", lambda *a, **s: release.wait(60) and sample(*a, **s))
    with httpx.Client(timeout=60) as client:
        codes = [join(served, client, f"crowd-{k}", steps=1, num=1).status_code for k in range(60)]
        counted = Counter(codes)
        assert set(counted) == {200, 503} and counted[200] <= limits.WAITING + 2
        release.set()
        for k in (k for k, code in enumerate(codes) if code == 200):
            assert list(follow(served, client, f"crowd-{k}"))[-1]["success"]
    assert still_up(served)


def test_pictures_that_nobody_fetches_do_not_pile_up_and_who_waits_gets_theirs(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = served.blocks._queue.pending_messages_per_session
    monkeypatch.setattr(boxes, "most", 5)
    release, pipeline = threading.Event(), served.library.load("tiny")
    sample = pipeline.sample
    monkeypatch.setattr(pipeline, "sample", lambda *a, **s: release.wait(60) and sample(*a, **s))
    with httpx.Client(timeout=60) as client:
        for patient in ("patient-1", "patient-2"):
            assert join(served, client, patient, steps=1, num=1).status_code == 200
        for k in range(40):  # each asks, never listens, and takes it back
            answer = join(served, client, f"deaf-{k}")
            taken_back = {"session_hash": f"deaf-{k}", "fn_index": served.functions["on_draw"], "event_id": answer.json()["event_id"]}
            assert client.post(f"{served.url}/gradio_api/cancel", json=taken_back).status_code == 200
        assert len(boxes) <= 7 and len(served.blocks._queue.pending_event_ids_session) <= 7
        release.set()
        for patient in ("patient-1", "patient-2"):
            assert list(follow(served, client, patient))[-1]["success"]


def test_visitors_who_leave_do_not_keep_the_others_waiting(served: Served) -> None:
    with httpx.Client(timeout=60) as client:
        assert join(served, client, "leaver", steps=200, every=1, num=8).status_code == 200
        for message in follow(served, client, "leaver"):
            if message["msg"] == "process_generating":
                break
    assert visit(served, "next", steps=1, num=1)[1] is None


def endlessly(served: Served, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Slow the model down, so that 200 steps take minutes; the event tells that it is at work."""
    pipeline, began = served.library.load("tiny"), threading.Event()
    field = pipeline.field

    def slow(*given: Any) -> Any:
        began.set()
        time.sleep(0.2)
        return field(*given)

    monkeypatch.setattr(pipeline, "field", slow)
    return began


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.05)
    return holds()


def test_visitors_who_leave_between_two_previews_are_noticed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    endlessly(served, monkeypatch)
    with httpx.Client(timeout=60) as client:
        assert join(served, client, "leaver-between", steps=200, every=200, solver="rk4", num=1).status_code == 200
        for message in follow(served, client, "leaver-between"):
            if message["msg"] == "process_generating":
                break
    assert within(30, lambda: not drawing._turn.locked())


def test_visitors_who_never_listen_are_not_drawn_for(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mailboxes, "PATIENCE", 1.0)
    began = endlessly(served, monkeypatch)
    with httpx.Client(timeout=60) as client:
        for k in range(3):
            assert join(served, client, f"never-listens-{k}", steps=200, every=200, num=1).status_code == 200
    assert began.wait(30)
    assert within(30, lambda: not any(served.blocks._queue.active_jobs) and not len(served.blocks._queue) and not drawing._turn.locked())
    monkeypatch.undo()
    assert visit(served, "listens", steps=1, num=1)[1] is None


def test_programs_that_hang_up_give_their_place_free(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    began = endlessly(served, monkeypatch)

    def waiting() -> int:
        return httpx.get(f"{served.url}/api/health").json()["waiting"]

    def ask() -> socket.socket:
        body = json.dumps(API_GOOD | {"steps": 200, "num": 1}).encode()
        raw = socket.create_connection(("127.0.0.1", served.port), timeout=30)
        raw.sendall(b"POST /api/generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        return raw

    first = ask()
    assert began.wait(30)
    others = [ask() for _ in range(limits.WAITING)]
    assert within(30, lambda: waiting() == limits.WAITING + 1) and generate(served).status_code == 429
    for raw in others:
        raw.close()
    assert within(30, lambda: waiting() == 1) and drawing._turn.locked()  # the first is still drawn for
    first.close()
    assert within(30, lambda: waiting() == 0 and not drawing._turn.locked())
    with drawing._turn:  # as where the page draws: the one whose turn it is waits in its thread
        patient = ask()
        assert within(30, lambda: waiting() == 1)
        patient.close()
        assert within(30, lambda: waiting() == 0)
    monkeypatch.undo()
    assert still_up(served)


def test_what_guidance_leads_away_from_and_solvers_that_take_pictures_one_by_one(served: Served) -> None:
    boards, error = visit(served, "away", negative="a blue square", solver="dopri5", steps=3)
    assert error is None and len(pictures_of(boards[-1])) == 2
    pipeline = served.library.load("tiny")
    expected = pipeline.sample(GOOD["prompt"], steps=3, guidance=2.0, solver="dopri5", seed=7, num=2, negative="a blue square").images
    np.testing.assert_array_equal(pictures_of(boards[-1]), expected)
    fractions = [int(found[1]) for html in boards if (found := re.search(r'aria-valuenow="(\d+)"', html))]
    assert fractions == sorted(fractions) and fractions[0] < 50 and fractions[-1] == 100
    assert generate(served, negative="a blue square", num=1).json()["settings"]["negative"] == "a blue square"
    assert "guidance, which is off" in generate(served, negative="a blue square", guidance=1).json()["error"]


@pytest.mark.parametrize("path", ["upload", "run/predict", "run/on_draw", "run/on_draw/", "api/on_draw", "call/on_draw", "call/v2/on_draw",
                                  "process_recording", "vibe-edit", "vibe-code", "stream/x", "queue/join/"])  # fmt: skip
def test_direct_routes_are_closed(served: Served, path: str) -> None:
    body = {"data": [GOOD[name] for name in ("model", "prompt")], "fn_index": 0, "session_hash": "direct"}
    assert httpx.post(f"{served.url}/gradio_api/{path}", json=body).status_code == 403
    if path == "upload":
        assert httpx.post(f"{served.url}/gradio_api/upload", files={"files": ("a.txt", b"x" * 100)}).status_code == 403


def test_the_page_tells_of_no_function_to_call(served: Served) -> None:
    told = httpx.get(f"{served.url}/gradio_api/info").json()
    assert told["named_endpoints"] == {} and told["unnamed_endpoints"] == {}


@pytest.mark.parametrize(
    "path",
    ["/gradio_api/file=/etc/passwd", "/gradio_api/file=../../etc/passwd", "/gradio_api/file=.env", "/gradio_api/file/etc/passwd",
     "/file=/etc/passwd",     "/static/../../../../../../etc/passwd", "/static/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/assets/..%2f..%2f..%2fetc/passwd",
     "/assets/%5c..%5cx",
     "/gradio_api/proxy=http://127.0.0.1:1/", "/gradio_api/stream/a/b/c/playlist.m3u8", "/gradio_api/file=MODEL", "/monitoring", "/docs",
     "/gradio_api/deep_link"],
)  # fmt: skip
def test_files_are_closed(served: Served, path: str) -> None:
    path = path.replace("MODEL", str(served.library.card("tiny").path / "checkpoints" / "step_00000001" / "model.safetensors"))
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as raw:  # no client tidies the path up
        raw.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: raw.recv(65_536), b""))
    assert answer.split(b" ")[1] == b"403" and b"root:" not in answer


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b"NaN", b'{"data": "x", "fn_index": 0, "session_hash": "s"}', b'{"data": [], "fn_index": NaN, "session_hash": "s"}',
     b'{"data": [], "fn_index": 99999, "session_hash": "s"}', b'{"data": [], "fn_index": true, "session_hash": "s"}',
     b'{"data": [], "fn_index": "0", "session_hash": "s"}', b'{"data": [], "fn_index": 0}', b'{"data": [], "fn_index": 0, "session_hash": ""}',
     b'{"data": [], "fn_index": 0, "session_hash": "' + b"s" * 1000 + b'"}', b'{"data": ' + b"[" * 30_000 + b"]" * 30_000 + b"}", b"x" * (LARGEST_BODY + 1)],
)  # fmt: skip
def test_garbage_in_the_queue_is_refused(served: Served, body: bytes) -> None:
    for route in ("queue/join", "cancel", "reset"):
        status = httpx.post(f"{served.url}/gradio_api/{route}", content=body, headers={"content-type": "application/json"}).status_code
        assert 400 <= status < 500, (route, status)


def test_too_few_values_in_the_queue_end_in_an_error_message(served: Served) -> None:
    with httpx.Client(timeout=60) as client:
        body = {"data": [1], "fn_index": served.functions["on_draw"], "session_hash": "few"}
        assert client.post(f"{served.url}/gradio_api/queue/join", json=body).status_code == 200
        assert not list(follow(served, client, "few"))[-1]["success"]
    assert still_up(served)


def test_nothing_is_written_for_visitors(served: Served) -> None:
    visit(served, "leaves-nothing")
    generate(served)
    cache = Path(os.environ["GRADIO_TEMP_DIR"])
    assert cache.name.startswith("flowt2i-demo-") and not [path for path in cache.rglob("*") if path.is_file()]


def test_the_environment_opens_nothing(served: Served) -> None:
    assert served.blocks.server_name == "127.0.0.1" and not served.blocks.share and served.blocks.share_url is None
    with socket.socket() as probe:
        probe.settimeout(2)
        assert probe.connect_ex(("127.0.0.2", served.port)) != 0  # would answer if it listened on 0.0.0.0
    config = httpx.get(f"{served.url}/config").json()
    assert not config["connect_heartbeat"]  # its route is closed
    assert not config.get("mcp_server") and not config.get("is_space") and served.blocks.allowed_paths == []


def test_a_proxy_in_the_environment_is_passed_by(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "example.org")
    monkeypatch.setenv("no_proxy", "")
    with serving(library) as served:
        assert still_up(served)
    with serving(library):
        pass
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "example.org,127.0.0.1,localhost"


def test_what_keeps_the_page_from_starting_is_one_line(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    import gradio.networking

    monkeypatch.setattr(gradio.networking, "url_ok", lambda _: False)
    with pytest.raises(UserError, match="the page could not be started: When localhost is not accessible") as caught:
        serve(library, free_port(), block=False)
    assert "\n" not in str(caught.value)


def test_other_names_for_this_machine_are_refused(served: Served) -> None:
    for path in ("/", "/api/models", "/config"):
        assert httpx.get(served.url + path, headers={"host": f"rebound.example:{served.port}"}).status_code == 403
        assert httpx.get(f"http://localhost:{served.port}{path}").status_code == 200
    assert generate(served, {"host": "rebound.example"}).status_code == 403


def test_answers_tell_browsers_to_load_nothing_from_elsewhere(served: Served) -> None:
    headers = httpx.get(served.url).headers
    assert "default-src 'self'" in headers["content-security-policy"] and "frame-ancestors 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


def test_with_a_password_everything_wants_it(library: Library) -> None:
    with serving(library, auth=("friend", "long-enough:ü")) as served:
        for path in ("/", "/config", "/api/health", "/api/models", "/gradio_api/info", "/gradio_api/queue/data?session_hash=x", "/assets/x"):
            answer = httpx.get(served.url + path)
            assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Basic")
        assert httpx.post(f"{served.url}/api/generate", json=API_GOOD).status_code == 401
        assert httpx.post(f"{served.url}/api/generate", json=API_GOOD, auth=("friend", "wrong")).status_code == 401
        assert httpx.get(f"{served.url}/api/health", headers={"authorization": "Bearer x"}).status_code == 401
        known = httpx.BasicAuth("friend", "long-enough:ü")
        assert httpx.get(served.url, auth=known).status_code == 200
        assert httpx.post(f"{served.url}/api/generate", json=API_GOOD, auth=known, timeout=60).status_code == 200


def test_a_port_in_use_is_one_line(library: Library, served: Served) -> None:
    with pytest.raises(UserError, match=f"port {served.port} cannot be had"):
        serve(library, served.port, block=False)
    assert still_up(served)


def test_share_without_a_network_is_one_line(library: Library, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    import gradio.networking

    def no_network(*_: Any, **__: Any) -> str:
        raise RuntimeError("no network")

    monkeypatch.setattr(gradio.networking, "setup_tunnel", no_network)
    with pytest.raises(UserError, match="no public address"):
        serve(library, free_port(), share=True, public=True, block=False)
    assert "warning: a public address" in capfd.readouterr().err
