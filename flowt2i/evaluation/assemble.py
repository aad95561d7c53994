"""Measures what the report shows beside the scores: samples, curves over sampling settings, the run's own curves, two models against each other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from flowt2i.config import load_config
from flowt2i.data import scenes as scenes_data
from flowt2i.description import DatasetDescription
from flowt2i.errors import UserError
from flowt2i.evaluation import clip, compare, on_track, scenes
from flowt2i.evaluation.intervals import Z95
from flowt2i.evaluation.kid import kernel_distance
from flowt2i.evaluation.metrics import Context, Scores
from flowt2i.evaluation.pictures import STRIDE, features
from flowt2i.evaluation.report import Pictures, Point, Report
from flowt2i.pipeline import Pipeline
from flowt2i.score import Score
from flowt2i.settings import is_guided
from flowt2i.training import checkpoint
from flowt2i.training.tracking import read_log

STEPS = (1, 2, 4, 8, 16, 50)  # solver steps of the curve against cost
GUIDANCE = (1.0, 1.5, 2.0, 3.0, 5.0, 8.0)
SHOWN = 24  # samples in the report: the first ones
COUNTED = 4  # pictures on which passes of the net are counted
UNGUIDED = {"negative": None, "guide": None}  # what acts through guidance is left out where there is none
CURVE = 256  # prompts at each point of a curve, unless asked for others


@dataclass
class Measure:
    """A score that is cheap enough to be drawn as a curve: of(images uint8 [N, H, W, 3], prompts) -> value, low, high."""

    name: str
    share: bool
    of: Callable[[np.ndarray, Sequence[str]], tuple[float, float, float]]


def assemble(context: Context, found: dict[str, Scores], model: Path, left_out: dict[str, str], curve: int = CURVE) -> tuple[Report, Pictures]:
    """Everything for report.json and report.html, beside the scores that were found: samples, curves of `curve` prompts a point (0: none), training."""
    pipeline = context.need_pipeline("report")
    report = Report(str(model), pipeline.settings(**context.settings), context.protocol(), from_scores(found), notes=list(left_out.values()))
    pictures = Pictures()
    prompts = prompts_of(context)
    shown = replace(context, num=min(SHOWN, len(prompts)), progress=False)
    pictures.samples = list(shown.images(prompts[:SHOWN], seed=noise_seed(context)))
    report.samples = [{"prompt": prompt, "seed": first_seed(context) + k} for k, prompt in enumerate(prompts[:SHOWN])]
    for scores in found.values():
        report.memorisation |= scores.details.get("memorisation", {})
        pictures.pairs |= scores.pictures
    report.training = training_curves(model)
    measure = measure_for(context, "kid" in found) if curve else None
    if measure:
        asked = prompts[:curve]
        report.curves = {"measure": measure.name, "share": measure.share, "n": len(asked)}
        for name, setting, values in (("evaluations", "steps", STEPS), ("guidance", "guidance", GUIDANCE)):
            if setting == "steps" and report.settings["solver"] == "dopri5":
                report.notes.append("No curve over steps: dopri5 chooses its own.")
                continue
            try:
                report.curves[name] = sweep(context, measure, asked, setting, values)
            except UserError as error:  # the scores were worth their time: the report is written without this curve
                report.notes.append(f"No curve over {setting}: {error}")
    elif curve:
        report.notes.append("No curves over steps and guidance: on data other than the scenes they need a CLIP (--clip ID_OR_FOLDER) or --metrics kid.")
    return report, pictures


def evaluations(pipeline: Pipeline, prompts: Sequence[str], seed: int, settings: dict[str, Any]) -> int:
    """Passes of the net a picture takes, guidance's included, counted on a few pictures (all take as many, but with dopri5)."""
    return pipeline.sample(list(prompts[:COUNTED]), seed=(seed + 1) * STRIDE, **settings).evaluations


def from_scores(found: dict[str, Scores]) -> list[Score]:
    """Every value of every metric, with its interval where it has one."""
    scores = []
    for metric in found.values():
        intervals, errors = metric.details.get("intervals", {}), metric.details.get("errors", {})
        for name, value in metric.values.items():
            error = Z95 * errors[name] if name in errors else None  # a standard error
            spread = intervals.get(name) or ({} if error is None else {"low": value - error, "high": value + error})
            scores.append(Score(name, value, metric.protocol, spread.get("low"), spread.get("high"), spread.get("n"), share="accuracy" in spread))
    return scores


def noise_seed(context: Context) -> int:
    """Of the noise, as `Context.images` counts it: on scenes --seed is that of the prompts alone."""
    return 0 if context.need_pipeline("report").description.is_scenes else context.seed


def first_seed(context: Context) -> int:
    """Seed of the noise of picture 0."""
    return (noise_seed(context) + 1) * scenes.FIRST_SEED


def prompts_of(context: Context) -> list[str]:
    """What samples and curves are asked for: scenes prompts, or held-out captions."""
    if context.need_pipeline("report").description.is_scenes:
        return scenes_data.prompts(context.seed, context.num, heldout=context.heldout_pairs)
    return context.prompts


def measure_for(context: Context, kernel: bool) -> Measure | None:
    """The exact checker on scenes; else CLIP where one is named; else the kernel distance where it was asked for (`kernel`); else nothing."""
    if context.need_pipeline("report").description.is_scenes:

        def all_right(images: np.ndarray, prompts: Sequence[str]) -> tuple[float, float, float]:
            share = scenes.score_images(images, prompts)["all"]
            return share["accuracy"], share["low"], share["high"]

        return Measure("prompts all right", True, all_right)
    if context.clip_name:
        clip_net = clip.Clip.load(context.clip_name, context.world.device)

        def clip_score(images: np.ndarray, prompts: Sequence[str]) -> tuple[float, float, float]:
            spread = clip.score(clip_net, images, prompts, context.world)["clip"]
            return spread["mean"], spread["low"], spread["high"]

        return Measure(f"CLIP score ({clip_net.name})", False, clip_score)
    if kernel:
        net, reference = context.net(), context.reference_of()

        def distance(images: np.ndarray, prompts: Sequence[str]) -> tuple[float, float, float]:
            if len(images) < 3:
                raise UserError("a kernel distance needs three pictures or more: take a larger --curve-num")
            found = kernel_distance(features(net, images, context.world, progress=False), reference.features)
            return found.value, found.value - Z95 * found.error, found.value + Z95 * found.error

        return Measure(f"kernel distance ({net.name})", False, distance)
    return None


def sweep(context: Context, measure: Measure, prompts: Sequence[str], setting: str, values: Sequence[float]) -> list[Point]:
    """The measure at each value of one setting (`steps` or `guidance`), all with the same prompts and the same noise."""
    pipeline, seed, points = context.need_pipeline("report"), noise_seed(context), []
    for value in tqdm(values, desc=f"curve over {setting}", unit="point", disable=not (context.progress and context.world.main), leave=False):
        chosen: dict[str, Any] = {setting: int(value) if setting == "steps" else value}
        if not is_guided(pipeline.settings(**context.settings | chosen | UNGUIDED)):
            chosen |= UNGUIDED
        images = context.images(prompts, seed=seed, settings=chosen)
        points.append(Point(value, *measure.of(images, prompts), evaluations=evaluations(pipeline, prompts, seed, context.settings | chosen)))
    return points


def training_curves(model: Path) -> dict[str, Any]:
    """The logged curves of the run that a model belongs to, with our own of the same preset; empty where it is no run folder."""
    run = run_folder(model)
    if run is None:
        return {}
    config = load_config(run / "config.json")
    found: dict[str, Any] = {
        "batch_size": config.data.batch_size,
        "preset": config.preset,
        "score_prompts": config.train.score_prompts,
        **on_track.curve_of(run),
    }
    reference, same = on_track.comparable(config, DatasetDescription.load(checkpoint.find(run)))
    if reference:
        found["reference"] = [{what: r[what] for what in sorted(same) if r.get(what)} | {"seed": r["seed"]} for r in reference["runs"]]
        evaluations = read_log(run / "eval.jsonl")
        standing = on_track.standing(evaluations[-1], config, DatasetDescription.load(checkpoint.find(run))) if evaluations else None
        found["standing"] = standing.line if standing else ""
    return found


def run_folder(model: Path) -> Path | None:
    """The run that a run folder or one of its checkpoints belongs to."""
    for folder in (model, model.parent.parent):
        if (folder / "log.jsonl").is_file() and (folder / "config.json").is_file():
            return folder
    return None


# ---- two models ------------------------------------------------------------------------------------------------------


def set_side_by_side(first: Context, second: Context, models: tuple[Path, Path]) -> tuple[Report, Pictures]:
    """A report of two models, the same prompts and seeds asked of both, with paired intervals of the difference."""
    a, b = first.need_pipeline("comparison"), second.need_pipeline("comparison")
    compare.check_comparable(a, b)
    prompts = prompts_of(first)
    if a.description.is_scenes:
        drawn = first.images(prompts, seed=noise_seed(first)), second.images(prompts, seed=noise_seed(first))
        rows = compare.of_scenes(list(drawn[0]), list(drawn[1]), prompts)
    elif first.clip_name:
        net = clip.Clip.load(first.clip_name, first.world.device)
        drawn = first.images(prompts, seed=noise_seed(first)), second.images(prompts, seed=noise_seed(first))
        rows = compare.of_clip(net, *drawn, prompts, first.world)
    else:
        raise UserError("two models of real data are compared by a CLIP: add --clip openai/clip-vit-base-patch32 (or a folder with another CLIP)")
    report = Report(f"{models[0]} against {models[1]}", a.settings(**first.settings), f"A: {first.protocol()}; B: {second.protocol()}")
    report.comparison = {"a": str(models[0]), "b": str(models[1]), "n": len(prompts), "scores": rows, "method": compare.METHOD}
    report.samples = [{"prompt": prompt, "seed": first_seed(first) + k} for k, prompt in enumerate(prompts[:SHOWN])]
    if a.model.shape != b.model.shape:
        report.notes.append("The two models run on latents of different shapes: the seeds are the same, the noise is not.")
    return report, Pictures(compared=list(zip(*(images[:SHOWN] for images in drawn))))
