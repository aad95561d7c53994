"""The loss on held-out images at fixed noise and fixed times, by time bin, of raw and averaged weights: what training logs, of any checkpoint."""

import torch
from torch import Tensor

from flowt2i.codec import stored_to_latents
from flowt2i.data.dataset import Batch, ImageTextDataset
from flowt2i.description import require_same
from flowt2i.errors import UserError
from flowt2i.evaluation.metrics import Context, Scores
from flowt2i.evaluation.validation import heldout_loss
from flowt2i.pipeline import build_model
from flowt2i.training import checkpoint
from flowt2i.training.features import CaptionFeatures
from flowt2i.training.objective import Objective

FILES = {"raw": "model.safetensors", "ema": "ema.safetensors"}


def metric(context: Context) -> Scores:
    """`evaluate --metrics loss`: over as many held-out images as the model's training looked at (train.eval_images)."""
    pipeline, data = context.need_pipeline("loss"), context.need_data("loss")
    if context.source is None:
        raise UserError("the loss score needs a model on disk: give --model")
    config, device = pipeline.config, pipeline.device
    dataset = ImageTextDataset(data, "heldout" if ImageTextDataset(data).description.heldout_count else "train")
    require_same(pipeline.description.codec, dataset.description.codec, "codec of the model and of the data")
    require_same(pipeline.description.text, dataset.description.text, "text encoder of the model and of the data")
    encoder = pipeline.encoder
    text_of = (
        CaptionFeatures(encoder, dataset, pipeline.description.text.dim, device, context.progress and context.world.main)
        if encoder
        else lambda batch: batch.ids.to(device)
    )

    def latents(batch: Batch, noise: Tensor | None) -> Tensor:
        return (stored_to_latents(pipeline.description.codec.kind, batch.stored.to(device), noise) - pipeline.mean) / pipeline.std

    most = config.train.eval_images
    count = min(most, len(dataset))
    title = f"loss-{count}@{pipeline.description.codec.image_size}"
    values: dict[str, float] = {}
    lines = []
    for name, file in FILES.items():
        if not (context.source / file).exists():
            continue
        model = build_model(config, pipeline.description)
        checkpoint.load_into(model, context.source / file)
        objective = Objective(model.to(device).eval().requires_grad_(False), config.flow, config.train.precision).to(device)
        found = heldout_loss(objective, dataset, latents, text_of, count, most, context.world)
        values |= {f"{title}/{name}" + ("" if part == "loss" else f"/{part}"): value for part, value in found.items()}
        bins = "   ".join(f"{part} {value:.4f}" for part, value in found.items() if part != "loss")
        lines.append(f"{'loss, ' + name + ' weights':30s} {found['loss']:10.5f}   {bins}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    kind = f"{count} {dataset.split} pictures of data {dataset.description.fingerprint[:8]}"
    return Scores(values, f"{title}, {kind}, noise and times fixed, {pipeline.model.config.target}-prediction", lines)
