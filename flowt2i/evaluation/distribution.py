"""How near the distribution of a model's pictures is to that of real ones: FID, Fréchet distance on any net, and kernel distance.

Each score comes with a floor: what as many real pictures score in place of the drawn ones, against the rest of the reference (pictures against themselves
would say nothing). With a VAE there is another: the same real pictures, gone through it, against the same rest (no model on its latents can be better).
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flowt2i.codec import stored_to_latents, to_uint8
from flowt2i.errors import UserError
from flowt2i.evaluation import pictures
from flowt2i.evaluation.frechet import LEAST, Moments, frechet_distance
from flowt2i.evaluation.kid import MOST, Estimate, kernel_distance
from flowt2i.evaluation.metrics import Context, Scores, Skipped
from flowt2i.evaluation.reference import SPLITS, Reference
from flowt2i.pipeline import Pipeline

LEAST_KERNEL = 16  # pictures below which the error of a kernel distance is larger than any difference


TOO_FEW = "a Fréchet distance of fewer than {:,} pictures tells of their number more than of the model (its bias goes as 1 / n)"


def check(context: Context, name: str) -> None:
    """What is wrong with numbers, net, reference and data before a picture is drawn: Skipped, UserError."""
    if name == "kid" and context.count < LEAST_KERNEL:
        raise Skipped(f"a kernel distance of {context.count} pictures is all error: take --num {LEAST_KERNEL} or more, better some hundreds")
    if name != "kid" and context.count < LEAST:
        raise Skipped(f"{TOO_FEW.format(LEAST)}, and these are {context.count:,}: take --num {LEAST} or more, or --metrics kid, which has no bias")
    context.net("inception" if name == "fid" else None)
    if context.real in SPLITS and context.data is None:
        raise UserError(f"the reference {context.real!r} needs the dataset: give --data DIR, or --reference FOLDER of images")
    if context.real not in SPLITS and not (Path(context.real) / "reference.json").exists():
        pictures.list_images(Path(context.real))
    if context.pipeline is not None:
        context.prompts  # noqa: B018  # captions that are missing are told


def fid(context: Context) -> Scores:
    """Fréchet distance on Inception-v3: the only one that is called FID."""
    return _frechet(context, "inception")


def frechet(context: Context) -> Scores:
    """Fréchet distance on the net that was asked for."""
    return _frechet(context, context.net_name)


def _frechet(context: Context, net_name: str) -> Scores:
    reference = context.reference_of(net_name)
    if reference.identity.count < LEAST:
        raise Skipped(
            f"{TOO_FEW.format(LEAST)}, and the reference has {reference.identity.count:,}: take --reference train or a folder with more, or --metrics kid"
        )
    net = context.net(net_name)
    name = "fid-inception" if net.name == "inception" else f"frechet-{net.name}"
    title = f"{name}-{context.count}@{context.resolution}"
    first, rest = reference.parted(context.count)
    has_floor = len(first) >= LEAST  # and so the rest, which is no smaller
    features, rebuilt = context.features(net_name), _reconstruction(context, reference, net_name) if has_floor else None

    def distances() -> dict[str, float]:
        found = {title: frechet_distance(Moments.of(features), Moments.of(reference.features))}
        if has_floor:
            real = Moments.of(rest)
            found[f"{title}/floor"] = frechet_distance(Moments.of(first), real)
            if rebuilt is not None:
                found[f"{title}/reconstruction"] = frechet_distance(Moments.of(rebuilt), real)
        return found

    values = context.world.on_main(distances)
    lines = [f"{name:30s} {values[title]:10.3f}"]
    if has_floor:
        too_few = "; too high, fewer than are scored: no bound" if len(first) < context.count else ""
        lines.append(f"  {'floor':28s} {values[f'{title}/floor']:10.3f}   {_floor_text(first, rest)}{too_few}")
    else:
        lines.append(f"  no floor: for it the reference needs {2 * LEAST:,} pictures, and has {reference.identity.count:,}")
    if rebuilt is not None:
        lines.append(f"  {'reconstruction':28s} {values[f'{title}/reconstruction']:10.3f}   {_rebuilt_text(rebuilt, rest)}")
    return Scores(values, f"{title}, {_reference_text(reference)}, {_drawn_text(context)}", lines + _latents_text(reference))


def kid(context: Context) -> Scores:
    """Kernel distance on the net that was asked for (on Inception-v3: KID), with its standard error."""
    reference = context.reference_of()
    if reference.identity.count < LEAST_KERNEL:
        raise Skipped(f"the reference has only {reference.identity.count} pictures: take --reference train, or a folder with {LEAST_KERNEL} or more")
    net = context.net()
    name = f"kid-{net.name}"
    title = f"{name}-{context.count}@{context.resolution}"
    first, rest = reference.parted(context.count)
    features, rebuilt = context.features(), _reconstruction(context, reference, None)

    def distances() -> dict[str, Estimate]:
        found = {title: kernel_distance(features, reference.features), f"{title}/floor": kernel_distance(first, rest)}
        return found | ({f"{title}/reconstruction": kernel_distance(rebuilt, rest)} if rebuilt is not None else {})

    found = context.world.on_main(distances)
    text = {part: f"{estimate.value * 1000:10.3f} ± {estimate.error * 1000:.3f}" for part, estimate in found.items()}
    lines = [f"{name:30s} {text[title]}   in thousandths, ± one standard error"]
    too_few = "; wider than the score's error: fewer pictures" if len(first) < context.count else ""
    lines.append(f"  {'floor':28s} {text[f'{title}/floor']}   {_floor_text(first, rest)}{too_few}")
    if rebuilt is not None:
        lines.append(f"  {'reconstruction':28s} {text[f'{title}/reconstruction']}   {_rebuilt_text(rebuilt, rest)}")
    values = {part: estimate.value for part, estimate in found.items()}
    errors = {part: estimate.error for part, estimate in found.items()}
    more = f", the first {MOST:,} a side" if max(context.count, reference.identity.count) > MOST else ""
    protocol = f"{title}{more}, {_reference_text(reference)}, {_drawn_text(context)}"
    return Scores(values, protocol, lines + _latents_text(reference), {"errors": errors})


def _reconstruction(context: Context, reference: Reference, net_name: str | None) -> Tensor | None:
    """Features of the pictures of the floor (`Reference.parted`, the first) that went through the model's VAE and back: [m, dim].

    None without a VAE or without the originals.
    """
    pipeline = context.pipeline
    if pipeline is None or pipeline.description.codec.kind != "vae" or reference.originals is None:
        return None
    net, originals, count = context.net(net_name), reference.originals, len(reference.parted(context.count)[0])
    work = lambda rows: net(through_codec(pipeline, originals(rows))).numpy()
    found = pictures.over_ranks(context.world, count, work, (net.dim,), np.float32, context.progress, "real pictures through the VAE")
    return torch.from_numpy(found)


@torch.no_grad()
def through_codec(pipeline: Pipeline, images: np.ndarray) -> np.ndarray:
    """uint8 [N, S, S, 3] encoded (posterior's mean) and decoded."""
    pixels = torch.from_numpy(images.copy()).permute(0, 3, 1, 2).contiguous()
    latents = stored_to_latents(pipeline.description.codec.kind, torch.from_numpy(pipeline.codec.encode(pixels)), None).to(pipeline.device)
    decoded = pipeline.codec.decode(latents)
    if not torch.isfinite(decoded).all():
        raise UserError("the VAE puts out numbers that are not finite: its weights are broken, give another with --codec")
    return to_uint8(decoded)


def _reference_text(reference: Reference) -> str:
    return f"reference {reference.identity.hash[:8]} ({reference.identity.count} {reference.identity.source})"


def _drawn_text(context: Context) -> str:
    return context.protocol() + (f", {context.asked}" if context.pipeline else "")


def _floor_text(first: Tensor, rest: Tensor) -> str:
    return f"{len(first):,} real pictures against {len(rest):,} others"


def _rebuilt_text(rebuilt: Tensor, rest: Tensor) -> str:
    return f"{len(rebuilt):,} real ones through the VAE and back, against {len(rest):,} others"


def _latents_text(reference: Reference) -> list[str]:
    if not reference.identity.made.startswith("decoded"):
        return []
    return ["  (the data holds latents, so real pictures are seen through the VAE; what it loses shows against --reference FOLDER of the originals)"]
