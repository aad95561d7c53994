"""The HTTP API for programs: `POST /api/generate`, `GET /api/models`, `GET /api/health`. The same limits as the page; docs/demo.md describes it.

A request waits for its turn without a thread; where `WAITING` already wait, the next is refused at once with 429.
"""

import asyncio
import base64
import threading
import traceback
from typing import Any

from anyio import to_thread
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from flowt2i import __version__
from flowt2i.demo.board import png
from flowt2i.demo.drawing import Cut, run
from flowt2i.demo.library import Library
from flowt2i.demo.limits import WAITING, Request, check, own_settings
from flowt2i.errors import UserError, nearest
from flowt2i.pipeline import Samples

FIELDS = ("model", "prompt", "negative", "steps", "guidance", "solver", "seed", "num", "shape")


class Api:
    """The routes and the line of those who wait."""

    def __init__(self, library: Library, waiting: int = WAITING):
        self.library, self.most = library, waiting
        self.waiting = 0  # and drawing
        self.turn = asyncio.Semaphore(1)

    @property
    def routes(self) -> list[Route]:
        return [
            Route("/api/generate", self.generate, methods=["POST"]),
            Route("/api/models", self.models, methods=["GET"]),
            Route("/api/health", self.health, methods=["GET"]),
        ]

    async def health(self, _: HttpRequest) -> Response:
        return JSONResponse({"status": "ok", "version": __version__, "waiting": self.waiting, "most_waiting": self.most})

    async def models(self, _: HttpRequest) -> Response:
        listed = []
        for name, card in self.library.cards.items():
            defaults = own_settings(card.config.sample)._asdict()
            listed.append({"name": name, "parameters": card.parameters, "image_size": card.description.codec.image_size, "shapes": card.shapes,
                           "defaults": defaults, "prompts": card.prompts})  # fmt: skip
        return JSONResponse({"models": listed})

    async def generate(self, http: HttpRequest) -> Response:
        if http.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":  # also keeps other sites' forms out
            return failure(415, "send the settings as JSON: Content-Type: application/json")
        try:
            model, request = self.wanted(await http.json())
        except (UserError, ValueError) as error:
            return failure(422, str(error))
        one_png = "image/png" in http.headers.get("accept", "")
        if one_png and request.num != 1:
            return failure(422, "one PNG can be sent only for num 1: leave Accept: image/png out, and several come as JSON")
        if self.waiting > self.most:  # one draws, the others wait
            return failure(429, f"{self.most} requests are waiting already: come back in a minute", {"Retry-After": "30"})
        self.waiting += 1
        gone = threading.Event()
        watcher = asyncio.create_task(_watch(http, gone))
        samples: Samples | None = None
        cut = False
        try:
            if await self.has_turn(watcher):
                try:
                    samples, cut = await to_thread.run_sync(self.draw, model, request, gone)
                finally:
                    self.turn.release()
        except UserError as error:
            return failure(422, str(error))
        except Exception:
            traceback.print_exc()
            return failure(500, "something broke while drawing; the terminal of the server says what")
        finally:
            self.waiting -= 1
            watcher.cancel()
        if samples is None:
            return failure(499, "the client has gone")
        pictures = [png(picture) for picture in samples.pictures()]
        if one_png:
            return Response(pictures[0], media_type="image/png")
        images = [{"seed": seed, "png": base64.b64encode(picture).decode()} for seed, picture in zip(samples.seeds, pictures)]
        return JSONResponse({"model": model, "prompt": request.prompt, "images": images, "settings": samples.settings, "cut": cut,
                             "evaluations": samples.evaluations, "seconds": round(samples.seconds, 3)})  # fmt: skip

    def wanted(self, body: dict[str, Any]) -> tuple[str, Request]:
        """The model's name and the checked request of a body; what it leaves out is the model's own, seed 0 and one picture."""
        unknown = [name for name in body if name not in FIELDS]
        if unknown:
            raise UserError(f"no setting {unknown[0][:40]!r}{nearest(unknown[0][:40], FIELDS)}")
        model = body.get("model", self.library.first)
        given = {**own_settings(self.library.card(model).config.sample)._asdict(), "seed": 0, "num": 1, "negative": "", "shape": "", **body}
        settings: dict[str, Any] = {name: given.get(name) for name in FIELDS if name != "model"}
        return model, check(**settings)._replace(updates=0)  # nobody watches

    async def has_turn(self, watcher: "asyncio.Task[None]") -> bool:
        """Wait for the turn; True with the turn taken, False where the client went away before (`watcher` ended)."""
        turn = asyncio.ensure_future(self.turn.acquire())
        try:
            await asyncio.wait({turn, watcher}, return_when=asyncio.FIRST_COMPLETED)
            return turn.done()
        finally:
            turn.cancel()  # of no effect where it is done

    def draw(self, model: str, request: Request, gone: threading.Event) -> tuple[Samples | None, bool]:
        """In a thread: the samples, or None where the client went away; and whether the prompt was cut."""
        samples: Samples | None = None
        cut = False
        for news in run(lambda: self.library.load(model), request, gone=gone):
            if isinstance(news, Samples):
                samples = news
            cut = cut or isinstance(news, Cut)
        return samples, cut


async def _watch(http: HttpRequest, gone: threading.Event) -> None:
    """Set `gone` when the client hangs up."""
    while not await http.is_disconnected():
        await asyncio.sleep(0.5)
    gone.set()


def failure(status: int, why: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": why}, status, headers)


async def malformed(_: HttpRequest, __: Exception) -> Response:
    """In place of FastAPI's answer, which repeats what came: a NaN in it is no JSON and would end in a 500."""
    return failure(422, "the request is malformed")
