"""What every rank of a test under torchrun does: several commands one after the other in one process group, with faults put into them.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/ranks.py JOBS.json OUT

JOBS.json: a list of {"train": words of `flowt2i train`, and what is to go wrong: see `fault`}, {"evaluate": [checkpoint, data, words]} or
{"collectives", "rehearse", "pictures", "kernel" or "slow_disk": [run, data, words]}. OUT/RANK.json: for each job its exit status and what the
rank was given (step, first row, sample numbers, noise), or what the function of that name returns.
"""

import errno
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.utils._python_dispatch import TorchDispatchMode

from flowt2i import cli
from flowt2i.config import resolve
from flowt2i.errors import UserError
from flowt2i.evaluation import nets
from flowt2i.evaluation import pictures as scored
from flowt2i.evaluation.pictures import Drawing
from flowt2i.evaluation.validation import validation_loss
from flowt2i.training import checkpoint, distributed, dryrun, parallel
from flowt2i.training import evaluate as evaluation
from flowt2i.training.evaluate import evaluate
from flowt2i.training.fit_memory import fit_memory
from flowt2i.training.loop import Trainer
from flowt2i.training.pace import Pace
from flowt2i.training.saver import Saver
from flowt2i.training.score import KernelScore


def record(seen: list[Any], stack: ExitStack) -> None:
    """Note what each micro-batch of the run is made of."""
    forward, ready = Trainer.forward, Trainer._make_ready

    def beginning(self: Trainer) -> None:
        ready(self)
        seen.clear()  # what was only rehearsed

    def noting(self: Trainer, module: Any, batch: Any, draw: Any, t: Any, part: slice) -> Any:
        noise = [round(float(x), 6) for x in draw.noise[part].flatten(1)[:, 0]]
        seen.append({"step": self.step, "row": part.start, "samples": batch.index.tolist(), "noise": noise})
        return forward(self, module, batch, draw, t, part)

    stack.enter_context(mock.patch.object(Trainer, "forward", noting))
    stack.enter_context(mock.patch.object(Trainer, "_make_ready", beginning))


def fault(kind: str, rank: int, step: int) -> Any:
    """A patch that makes one rank fail at one step: "loss", "gradient", "late", "signal"; or "disk": nothing can be written any more; or
    "memory": more than `step` images at a time do not fit on one rank (all: -1).
    """
    if kind == "memory":
        return short_of_memory(rank, most=step)
    if kind == "disk":
        return mock.patch.object(checkpoint, "save_tensors", side_effect=OSError(errno.ENOSPC, "No space left on device"))
    here = lambda trainer: trainer.world.rank == rank and trainer.step == step
    if kind in ("late", "signal"):
        agree = Trainer._agree

        def stopping(self: Trainer, *args: Any) -> Any:
            if here(self):
                self.budget, self.stop_signal = (0.0, None) if kind == "late" else (self.budget, 15)
            return agree(self, *args)

        return mock.patch.object(Trainer, "_agree", stopping)
    latents = Trainer.latents

    class Infinite(torch.autograd.Function):
        """The loss stays finite, its gradient does not."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * float("inf")

    def spoilt(self: Trainer, *args: Any) -> torch.Tensor:
        if kind == "gradient":
            if not hasattr(self, "hooked"):
                self.hooked = self.model.unembed.register_forward_hook(lambda module, inputs, output: Infinite.apply(output) if here(self) else None)
            return latents(self, *args)
        return latents(self, *args) * (float("nan") if here(self) else 1.0)

    return mock.patch.object(Trainer, "latents", spoilt)


def short_of_memory(short: int, most: int) -> Any:
    """Look for the micro-batch that fits, as on a GPU, with a rank (all: -1) that holds `most` images."""
    train = Trainer.train

    def training(self: Trainer) -> dict[str, Any]:
        forward = self.objective.forward

        def limited(images: torch.Tensor, *rest: Any) -> Any:
            if short in (-1, self.world.rank) and len(images) > most and torch.is_grad_enabled():
                raise torch.OutOfMemoryError("CUDA out of memory")
            return forward(images, *rest)

        self.objective.forward = limited  # type: ignore[method-assign]
        fit_memory(self)
        return train(self)

    return mock.patch.object(Trainer, "train", training)


class Collectives(TorchDispatchMode):
    """Counts what is sent between the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.counts[function.__name__.removesuffix(".default")] += 1
        return function(*args, **(kwargs or {}))


def collectives(run: str, data: str, words: list[str]) -> dict[str, Any]:
    """What the third step of a training sends (DDP lays its buckets anew in the second)."""
    trainer = Trainer(resolve("quickstart", words), Path(data), Path(run), None, progress=False)
    batches = iter(trainer._loader())
    for trainer.step in range(2):
        trainer._step(batches, 1.0, False)
    trainer.step = 2
    with Collectives() as sent:
        trainer._step(batches, 1.0, False)
    trainer.close()
    return {"accumulation": trainer.accumulate, "kind": type(next(trainer.model.parameters())).__name__, **sent.counts}


def rehearse(run: str, data: str, words: list[str]) -> dict[str, Any]:
    """Whether weights, average and random state are after a dry run what they were before, how much state the optimizer has then, and how many
    steps it made: rank 0 alone found the first one quick."""
    trainer = Trainer(resolve("quickstart", words), Path(data), Path(run), None, progress=False)
    tensors = lambda: [t for name in ("model", "ema") for t in trainer._tensors()[name].values()]
    before, random = [parallel.whole(t).clone() for t in tensors()], torch.get_rng_state()
    with mock.patch.object(dryrun, "QUICK", math.inf if trainer.world.main else 0.0), mock.patch.object(
        trainer, "rehearse_step", wraps=trainer.rehearse_step
    ) as steps:  # fmt: skip
        dryrun.rehearse(trainer)
    weights = all(torch.equal(a, parallel.whole(b)) for a, b in zip(before, tensors()))
    trainer.close()
    same = torch.equal(random, torch.get_rng_state())
    return {"weights": weights, "random": same, "state": len(trainer.optimizer.state()), "steps": steps.call_count}


def pictures(run: str, data: str, words: list[str]) -> dict[str, Any]:
    """Four pictures in batches of one, of which the first on rank 1 fails; an empty prompt; then four that do not fail. So for the pictures
    that are scored, and for a feature net that rank 1 alone cannot load."""
    trainer = Trainer(resolve("quickstart", words), Path(data), Path(run), None, progress=False)
    pipeline, prompts, calls = trainer.pipeline(), ["a", "b", "c", "d"], 0
    draw = pipeline.to_images

    def failing(*args: Any) -> Any:
        nonlocal calls
        images, calls = draw(*args), calls + 1
        if trainer.world.rank == 1 and calls == 1:
            raise UserError("not finite")
        return images

    with mock.patch.object(evaluation, "AT_ONCE", 1), torch.no_grad():
        evaluation.loss_on_heldout(trainer, trainer.ema_objective or trainer.objective)  # as before all pictures: it makes the objective FSDP2's root
        said = []
        for texts in (prompts, ["a", "b", "c", " "]):
            with mock.patch.object(pipeline, "to_images", failing):
                try:
                    evaluation.sample_over_ranks(trainer.world, pipeline, texts, seed=0)
                except UserError as error:
                    said.append(str(error))
        shape = evaluation.sample_over_ranks(trainer.world, pipeline, prompts, seed=0).images.shape
        calls, drawing = 0, Drawing(pipeline, prompts, 0, {})
        with mock.patch.object(scored, "BLOCK", 1):
            with mock.patch.object(pipeline, "to_images", failing):
                scored_error = error_of(lambda: drawing.images(trainer.world, progress=False))
            again = drawing.images(trainer.world, progress=False).shape
        lone = UserError("no net") if trainer.world.rank == 1 else None
        with mock.patch.object(nets, "has_efficientnet", return_value=True), mock.patch.object(nets, "load_net", side_effect=lone):
            net_error = error_of(lambda: KernelScore()(trainer, pipeline))
        together = trainer.world.any(False)  # nobody is ahead, or behind
    trainer.close()
    found = {"error": said[0], "empty": "an empty prompt" in said[1], "shape": list(shape)}
    return found | {"scored": scored_error, "again": list(again), "net": net_error, "together": together}


def kernel(run: str, data: str, words: list[str]) -> dict[str, Any]:
    """The kernel distance of an evaluation on a small random net, and how many pictures this rank drew for it; whether the next two evaluations are due
    where rank 0's clock says the first and not the second, and the others' the opposite."""
    trainer = Trainer(resolve("quickstart", words), Path(data), Path(run), None, progress=False)
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(3, 12, 5, 3), torch.nn.GELU(), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    net, pipeline = nets.TorchNet("random", layers, 32, 127, 60, "random", trainer.world.device), trainer.pipeline()
    with mock.patch.object(nets, "has_efficientnet", return_value=True), mock.patch.object(nets, "load_net", return_value=net), mock.patch.object(
        pipeline, "sample", wraps=pipeline.sample
    ) as drawn:  # fmt: skip
        found: dict[str, Any] = dict(KernelScore()(trainer, pipeline))
    trainer.close()
    due = []
    for says in (True, False):
        with mock.patch.object(Pace, "affordable", return_value=says is trainer.world.main):
            due.append(Pace(2, 0.05).due(4, trainer.world))
    return found | {"drawn": sum(len(call.args[0]) for call in drawn.call_args_list), "due": due}


def error_of(work: Callable[[], Any]) -> str:
    """What a mistake says; nothing where there was none."""
    try:
        work()
    except UserError as error:
        return str(error)
    return ""


def slow_disk(run: str, data: str, words: list[str]) -> list[int]:
    """Two saves that each take three times as long as ranks wait for each other; the checkpoints that are there then."""
    world, save_tensors = distributed.start(), checkpoint.save_tensors
    tensors = {"model": {"number": torch.ones(1)}}

    def slow(*args: Any) -> None:
        time.sleep(3)
        save_tensors(*args)

    saver = Saver(world, Path(run), keep_recent=3, keep_every=0)
    world.any(False)
    _set_pg_timeout(timedelta(seconds=1))
    with mock.patch.object(checkpoint, "save_tensors", slow):
        for step in (1, 2):
            saver.save(step, tensors, {"state.json": "{}", "config.json": "{}"}, {})
        saver.wait()
        saver.rehearse(Path(run) / "aside", tensors, {"state.json": "{}", "config.json": "{}"}, {})
    _set_pg_timeout(timedelta(seconds=600))
    return checkpoint.list_steps(Path(run))


def uneven_validation(world: distributed.World) -> dict[str, float]:
    """Thirteen made-up losses in batches of three."""
    return validation_loss(lambda rows, t, draw: t * (1 + draw.noise[: len(rows)].mean((1, 2, 3)).abs()), [(np.arange(13), (3, 4, 4))], 3, False, world)


def main() -> None:
    jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    world = distributed.start()
    results = []
    with mock.patch.object(distributed, "stop"):  # the process group serves all jobs
        for job in jobs:
            seen: list[Any] = []
            if "evaluate" in job:
                source, data, words = job["evaluate"]
                trainer = Trainer(resolve("quickstart", words), Path(data), out / f"evaluated-{world.size}", source, progress=False)
                results.append({"values": evaluate(trainer, None, last=True), "uneven": uneven_validation(world)})
                trainer.close()
                continue
            other = next((work for work in (collectives, rehearse, pictures, kernel, slow_disk) if work.__name__ in job), None)
            if other:
                results.append(other(*job[other.__name__]))
                continue
            with ExitStack() as stack:
                record(seen, stack)
                if "fault" in job:
                    stack.enter_context(fault(*job["fault"]))
                results.append({"status": cli.main(["train", *job["train"]]), "seen": seen})
    (out / f"{world.rank}.json").write_text(json.dumps(results))
    distributed.stop()
    os._exit(0)  # nothing of a failed job may hold the process


if __name__ == "__main__":
    main()
