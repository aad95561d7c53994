"""`flowt2i demo`: a real server over HTTP, with a tiny untrained model."""

import socket
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowt2i.config import resolve
from flowt2i.description import CodecSpec, DatasetDescription
from flowt2i.errors import UserError
from flowt2i.pipeline import Pipeline, build_model
from flowt2i.text import make_tokenizer

pytest.importorskip("gradio")
from gradio_client import Client
from gradio_client.exceptions import AppError

from flowt2i import demo

PROMPTS = ("a red circle", "a blue square")
GOOD: dict[str, Any] = {"prompt": "a red circle", "steps": 6, "guidance": 2.0, "solver": "euler", "seed": 7, "images": 2, "every": 2}


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    config = resolve("quickstart", ["--model.width", "32", "--model.depth", "1", "--model.heads", "1", "--model.text_width", "32", "--model.text_depth", "1",
                                    "--train.precision", "fp32"])  # fmt: skip
    tokenizer = make_tokenizer("builtin", captions=list(PROMPTS), max_tokens=12, vocab_size=300)
    description = DatasetDescription(
        source="folder", codec=CodecSpec(kind="pixels", image_size=32, shape=(3, 32, 32)), text=tokenizer.spec, latent_mean=(0.0,) * 3, latent_std=(0.5,) * 3,
        train_count=2, heldout_count=0, heldout_fraction=0, longest_caption=8, prompts=PROMPTS,
    )  # fmt: skip
    return Pipeline(build_model(config, description).eval().requires_grad_(False), config, description, tokenizer, name="tiny")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def port(pipeline: Pipeline) -> Iterator[int]:
    number = free_port()
    blocks = demo.serve(pipeline, number, block=False)
    yield number
    blocks.close()


@pytest.fixture(scope="module")
def client(port: int) -> Client:
    return Client(f"http://127.0.0.1:{port}", verbose=False)


def ask(client: Client, **changes: Any) -> Any:
    return client.predict(**(GOOD | changes), api_name="/generate")


def picture_of(item: dict[str, Any]) -> Image.Image:
    return Image.open(item["image"])


def test_pictures_form_step_by_step_and_are_the_pipelines(client: Client, pipeline: Pipeline) -> None:
    job = client.submit(**GOOD, api_name="/generate")
    gallery, status = job.result(timeout=60)
    lines = [line for _, line in job.outputs()]
    assert [line.split(",")[0] for line in lines[:-1]] == ["step 1 of 6", "step 3 of 6", "step 5 of 6", "step 6 of 6"] and "s left" in lines[0]
    assert status == lines[-1] and status.startswith("2 pictures in") and "seeds 7 to 8" in status
    expected = pipeline.sample(GOOD["prompt"], steps=6, guidance=2.0, solver="euler", seed=7, num=2).images
    np.testing.assert_array_equal(np.stack([np.asarray(picture_of(item)) for item in gallery]), expected)
    assert "a red circle" in picture_of(gallery[0]).info["flowt2i"]  # how to make it again travels with the file


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": ""}, "Say what"), ({"prompt": " \n"}, "Say what"), ({"prompt": "x" * 2001}, "2,000 at most"), ({"steps": 0}, "1 to 200"),
        ({"steps": 201}, "1 to 200"), ({"steps": "many"}, "1 to 200"), ({"steps": None}, "1 to 200"), ({"images": 9}, "1 to 8"), ({"images": 0}, "1 to 8"),
        ({"guidance": -1}, "0 to 20"), ({"guidance": 1e9}, "0 to 20"), ({"solver": "rk9"}, "euler or heun"), ({"solver": None}, "euler or heun"),
        ({"solver": ["euler"]}, "euler or heun"), ({"seed": -1}, "0 to"), ({"seed": 2**40}, "0 to"), ({"seed": None}, "0 to"), ({"every": 0}, "1 to 200"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_and_the_page_lives_on(client: Client, changes: dict[str, Any], says: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AppError) as caught:
        ask(client, **changes)
    assert says in str(caught.value) and "Traceback" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err
    assert len(ask(client, steps=1, images=1)[0]) == 1


@pytest.mark.parametrize("changes", [{"steps": float("nan")}, {"guidance": float("inf")}, {"seed": True}, {"images": 2.5}, {"prompt": 3}])
def test_what_is_not_a_number_or_text_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        demo.check(**(GOOD | changes))


def test_long_prompt_is_drawn_with_a_warning(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(demo.gr, "Warning", told.append)
    with pytest.warns(UserWarning, match="cut to 12 tokens"):
        pictures, _ = list(demo.draw(pipeline, *(GOOD | {"prompt": "a red circle " * 20, "steps": 1}).values()))[-1]
    assert len(pictures) == 2 and "12 tokens" in told[0]


def test_visitors_draw_one_after_another(client: Client) -> None:
    jobs = [client.submit(**(GOOD | {"seed": seed}), api_name="/generate") for seed in range(3)]
    for seed, job in enumerate(jobs):
        assert f"seeds {seed} to {seed + 1}" in job.result(timeout=60)[1]


def test_an_abandoned_drawing_ends_at_the_next_preview(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    previews, closed, to_images = [], threading.Event(), pipeline.to_images

    def second_waits(z: Any) -> np.ndarray:
        previews.append(z)
        if len(previews) == 2:
            closed.wait(30)
        return to_images(z)

    monkeypatch.setattr(pipeline, "to_images", second_waits)
    drawing = demo.run(pipeline, demo.Request("a red circle", 200, 2.0, "euler", 0, 1, 1))
    next(drawing)
    drawing.close()
    closed.set()
    with demo._drawing:  # the drawing holds it until it has ended
        assert len(previews) == 2


def test_a_fault_of_ours_shows_no_traceback(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(pipeline, "sample", lambda *_, **__: 1 / 0)
    with pytest.raises(demo.gr.Error, match="Something broke"):
        list(demo.draw(pipeline, *GOOD.values()))
    assert "ZeroDivisionError" in capfd.readouterr().err  # for whoever runs the server


def test_listens_on_this_machine_only_and_says_when_the_port_is_taken(pipeline: Pipeline, port: int) -> None:
    with socket.socket() as probe:
        probe.settimeout(2)
        assert probe.connect_ex(("127.0.0.2", port)) != 0  # would answer if it listened on 0.0.0.0
    with pytest.raises(UserError, match=f"port {port} cannot be had"):
        demo.serve(pipeline, port, block=False)
    for wrong in (0, -1, 70000):
        with pytest.raises(UserError, match="out of range"):
            demo.serve(pipeline, wrong, block=False)


def test_prompts_to_try_fit_the_data(pipeline: Pipeline) -> None:
    assert demo.example_prompts(pipeline) == list(PROMPTS)
    scenes = Pipeline(pipeline.model, pipeline.config, pipeline.description.model_copy(update={"source": "scenes"}), pipeline.tokenizer)
    assert len(demo.example_prompts(scenes)) == 16
