"""What a training shows of itself every `eval_every` steps: validation loss, a preview grid, on scenes data a score.

All ranks compute: images and prompts are divided over them. Rank 0 writes. A signal breaks off between the parts, and nothing is shown. What it took is
logged (`eval_s`), and decides how soon the next one comes: see `pace`.
"""

import math
import sys
import time
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from flowt2i.errors import UserError
from flowt2i.evaluation import on_track
from flowt2i.evaluation.nets import resize
from flowt2i.evaluation.reference import real_images
from flowt2i.evaluation.validation import heldout_loss
from flowt2i.grid import grid
from flowt2i.memory import is_out_of_memory, told
from flowt2i.pipeline import Pipeline, Samples
from flowt2i.training.distributed import World
from flowt2i.training.objective import Objective
from flowt2i.training.pace import score_steps
from flowt2i.training.tracking import Tracker

if TYPE_CHECKING:
    from flowt2i.training.loop import Trainer

AT_ONCE = 64  # pictures that go through the network together on a rank; fewer where training has to take few at a time (`Trainer.at_once`)


def evaluate(trainer: "Trainer", tracker: Tracker | None, last: bool) -> dict[str, Any]:
    """Validation loss of raw and EMA weights by time bin, a preview grid, on scenes data the prompt-following score; a line on how these stand.

    `eval_s`: the seconds that the training waited. {} where it failed or was broken off. Nothing that training goes on from is changed.
    """
    started = time.perf_counter()
    values: dict[str, Any] = {}
    try:
        # Eager: a compiled block that meets other sizes here could be compiled anew for all sizes, and the training's losses would round otherwise.
        with torch.compiler.set_stance("force_eager"):
            values = _evaluate(trainer, tracker, last)
    except UserError as error:  # the training itself is sound and saved
        if trainer.world.main:
            warnings.warn(f"evaluation at step {trainer.step} failed: {error}", stacklevel=2)
    except (RuntimeError, MemoryError) as error:
        if trainer.world.size > 1 or not is_out_of_memory(error):  # several ranks would wait for the one that is out of it
            raise
        warnings.warn(f"evaluation at step {trainer.step} failed: out of memory ({told(error)})", stacklevel=2)
    trainer.model.train()
    seconds = time.perf_counter() - started
    trainer.pace.took(seconds)
    if not values:
        return {}
    values["eval_s"] = round(seconds, 3)
    if tracker:  # after the pictures: where this line stands, all was shown
        tracker.evaluation(trainer.step, {"images_seen": trainer.step * trainer.config.data.batch_size, **values})
    return values


def _evaluate(trainer: "Trainer", tracker: Tracker | None, last: bool) -> dict[str, Any]:
    values: dict[str, Any] = {"validation": loss_on_heldout(trainer, trainer.objective)}
    if trainer.ema_objective:
        values["validation_ema"] = loss_on_heldout(trainer, trainer.ema_objective)
    if trainer.stopping():
        return {}
    pipeline = trainer.pipeline()
    pipeline.model.eval()
    prompts = preview_prompts(trainer)
    samples = sample_over_ranks(trainer.world, pipeline, prompts, trainer.at_once, seed=1_000)
    if trainer.stopping():
        return {}
    picture = grid(samples.images, samples.prompts, columns=min(8, math.ceil(math.sqrt(len(prompts)))))
    if trainer.description.is_scenes and trainer.config.train.score_prompts:
        from flowt2i.data import scenes
        from flowt2i.evaluation.scenes import FIRST_SEED, score_images

        asked = scenes.prompts(trainer.config.train.seed, trainer.config.train.score_prompts, heldout=False)
        drawn = sample_over_ranks(trainer.world, pipeline, asked, trainer.at_once, seed=FIRST_SEED, steps=score_steps(trainer.config.sample))
        values["score"] = score_images(drawn.images, asked)["all"]["accuracy"]
    elif not trainer.description.is_scenes and not trainer.config.data.subset and trainer.config.train.score_images:
        values |= trainer.kernel_score(trainer, pipeline)
    memorised = side_by_side(trainer, pipeline) if trainer.config.data.subset and last else None
    if trainer.world.main and trainer.progress:
        seen = {"images_seen": trainer.step * trainer.config.data.batch_size}
        if held := on_track.standing(seen | values, trainer.config, trainer.description):
            tqdm.write(held.line, file=sys.stderr)
    if tracker:
        tracker.image(trainer.step, "samples", picture)
        if memorised:
            tracker.image(trainer.step, "memorised", memorised)
    return values


def sample_over_ranks(world: World, pipeline: Pipeline, prompts: list[str], most: int = AT_ONCE, *, seed: int, **settings: Any) -> Samples:
    """`pipeline.sample` with the prompts divided over the ranks, as many for each: all pictures, on every rank. UserError on all where one fails.

    A batch that fails on one rank does not end its work: the others would wait for it in the next pass of a sharded model.
    """
    if not all(prompt.strip() for prompt in prompts):
        raise UserError("an empty prompt: say what the picture should show")
    share = world.share(len(prompts))
    parts: list[Samples] = []
    together = min(AT_ONCE, most)
    failure: UserError | None = None
    for rows in np.split(share, range(together, len(share), together)):
        try:
            parts.append(pipeline.sample([prompts[k] for k in rows], seed=seed + int(rows.min(initial=len(prompts))), batch_size=together, **settings))
        except UserError as error:
            failure = failure or error
    if world.any(failure is not None):
        raise failure or UserError("another rank could not draw its pictures")
    mine = replace(parts[0], images=np.concatenate([part.images for part in parts]))
    images = world.collect(mine.images, len(prompts))
    return replace(mine, images=images, prompts=list(prompts), seeds=[seed + k for k in range(len(prompts))])


def loss_on_heldout(trainer: "Trainer", objective: Objective) -> dict[str, float]:
    """On held-out images (or on the training subset, where memorising is the aim), see `evaluation.validation`."""
    dataset, text_of = (trainer.dataset, trainer.text_of) if trainer.config.data.subset else (trainer.heldout, trainer.heldout_text_of)
    count = min(trainer.config.train.eval_images, trainer.count if trainer.config.data.subset else len(dataset))
    return heldout_loss(objective, dataset, trainer.latents, text_of, count, trainer.config.train.eval_images, trainer.world, min(AT_ONCE, trainer.at_once))


def preview_prompts(trainer: "Trainer") -> list[str]:
    wanted = trainer.config.sample.images
    if trainer.config.sample.prompts:
        return trainer.config.sample.prompts[:wanted]
    if trainer.config.data.subset:
        return [trainer.dataset.caption(i) for i in range(min(wanted, trainer.count))]
    if trainer.description.is_scenes:
        from flowt2i.data.scenes import curated_prompts

        return curated_prompts()[:wanted]
    return [c for c in (trainer.heldout.caption(i) for i in range(min(wanted, len(trainer.heldout)))) if c.strip()]


def side_by_side(trainer: "Trainer", pipeline: Pipeline) -> Any:
    """Training images above, what the model makes of their captions below."""
    shown = min(trainer.count, 32)
    captions = [trainer.dataset.caption(i) for i in range(shown)]
    originals = real_images(trainer.dataset, pipeline.codec, np.arange(shown))
    samples = resize(sample_over_ranks(trainer.world, pipeline, captions, trainer.at_once, seed=1_000).images, originals.shape[1])
    columns, images, labels = 8, [], []
    for start in range(0, shown, columns):
        row = slice(start, min(start + columns, shown))
        short = columns - len(originals[row])
        blank = [np.full_like(originals[0], 255)] * short
        images += [*originals[row], *blank, *samples[row], *blank]
        labels += [f"real: {c}" for c in captions[row]] + [""] * short + [f"model: {c}" for c in captions[row]] + [""] * short
    return grid(np.stack(images), labels, columns=columns)
