"""For the tests of the demo: tiny models on disk, a served page, and visitors that speak plain HTTP as the page in the browser does."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import torch

from flowt2i.config import resolve
from flowt2i.demo import Library, serve
from flowt2i.description import Bucket, CodecSpec, DatasetDescription
from flowt2i.pipeline import build_model
from flowt2i.text import make_tokenizer
from flowt2i.training import checkpoint

PROMPTS = ("a red circle", "a blue square")
OTHERS = ("a green star", "a pink cross")
INPUTS = {  # of each function of the page, in its order
    "on_draw": ("model", "prompt", "steps", "guidance", "solver", "seed", "num", "every", "negative", "shape"),
    "on_compare": ("prompt", "model", "steps", "guidance", "solver", "model_b", "steps_b", "guidance_b", "solver_b",
                   "seed", "num", "every", "negative", "shape"),
    "on_sweep": ("model", "prompt", "guidance", "solver", "seed", "num", "every", "negative", "shape"),
    "on_model": ("model", "prompt"),
}  # fmt: skip
GOOD: dict[str, Any] = {"model": "tiny", "prompt": "a red circle", "steps": 6, "guidance": 2.0, "solver": "euler", "seed": 7, "num": 2, "every": 2,
                        "negative": "", "shape": "", "model_b": "other", "steps_b": 3, "guidance_b": 1.0, "solver_b": "heun"}  # fmt: skip


def write_model(folder: Path, seed: int = 0, step: int = 1, prompts: tuple[str, ...] = PROMPTS, buckets: tuple[Bucket, ...] = ()) -> Path:
    """A run folder with one checkpoint of a small model that draws noise of its own."""
    config = resolve("quickstart", ["--model.width", "32", "--model.depth", "1", "--model.heads", "1", "--model.text_width", "32", "--model.text_depth", "1",
                                    "--train.precision", "fp32", "--sample.steps", "5", "--sample.guidance_until", "1"])  # fmt: skip
    tokenizer = make_tokenizer("builtin", captions=list(PROMPTS + OTHERS), max_tokens=12, vocab_size=300)
    description = DatasetDescription(
        source="folder", codec=CodecSpec(kind="pixels", image_size=32, shape=(3, 32, 32)), text=tokenizer.spec, latent_mean=(0.0,) * 3, latent_std=(0.5,) * 3,
        train_count=2, heldout_count=0, heldout_fraction=0, longest_caption=8, prompts=prompts,
        buckets=buckets,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = build_model(config, description)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    aside = folder / "prepared"
    aside.mkdir(parents=True, exist_ok=True)
    tokenizer.save(aside)
    description.save(aside)
    state = json.dumps({"step": step, "images_seen": 0})
    texts = {"config.json": config.model_dump_json(), "dataset.json": (aside / "dataset.json").read_text(), "state.json": state}
    checkpoint.save(folder, step, {"model": dict(model.state_dict())}, texts, {"tokenizer": aside / "tokenizer"})
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Served:
    """A running demo."""

    def __init__(self, library: Library, **options: Any):
        self.library, self.port = library, free_port()
        self.blocks = serve(library, self.port, block=False, **options)
        self.url = f"http://127.0.0.1:{self.port}"
        self.functions = {function.name: number for number, function in self.blocks.fns.items() if function.fn is not None}


@contextlib.contextmanager
def serving(library: Library, **options: Any) -> Iterator[Served]:
    served = Served(library, **options)
    try:
        yield served
    finally:
        served.blocks.close()


def join(served: Served, client: httpx.Client, session: str, function: str = "on_draw", **changes: Any) -> httpx.Response:
    """Ask for a place in the page's queue."""
    values = GOOD | changes
    body = {"data": [values[name] for name in INPUTS[function]], "fn_index": served.functions[function], "session_hash": session}
    return client.post(f"{served.url}/gradio_api/queue/join", content=json.dumps(body), headers={"content-type": "application/json"})


def follow(served: Served, client: httpx.Client, session: str) -> Iterator[dict[str, Any]]:
    """What the page hears, until its request is over."""
    with client.stream("GET", f"{served.url}/gradio_api/queue/data", params={"session_hash": session}, timeout=120) as stream:
        until = time.monotonic() + 120
        for line in stream.iter_lines():
            assert time.monotonic() < until, "nothing but heartbeats"
            if line.startswith("data:"):
                message = json.loads(line.removeprefix("data:"))
                yield message
                if message["msg"] in ("process_completed", "close_stream", "unexpected_error"):
                    return


def visit(served: Served, session: str, function: str = "on_draw", **changes: Any) -> tuple[list[Any], str | None]:
    """What a request of the page gets: the successive values of its first output, and the error it ends with, if any."""
    with httpx.Client() as client:
        answer = join(served, client, session, function, **changes)
        if answer.status_code != 200:
            return [], answer.text
        values: list[Any] = []
        for message in follow(served, client, session):
            output = message.get("output") or {}
            if message["msg"] in ("process_generating", "process_completed") and output.get("data"):
                value = output["data"][0]
                if value == []:  # the page was only asked whether it still listens
                    continue
                if isinstance(value, list) and isinstance(value[0], list):  # changes to the value before: gradio sends replacements whole
                    value = value[0][2]
                values.append(value)
            if message["msg"] == "process_completed" and not message["success"]:
                return values, str(output.get("error"))
        return values, None
