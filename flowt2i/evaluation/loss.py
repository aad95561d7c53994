"""The loss on held-out images at fixed noise and fixed times, by time bin, of raw and averaged weights: what training logs, of any checkpoint."""

import torch
from torch import Tensor

from flowt2i.codec import stored_to_latents
from flowt2i.data.dataset import Batch, ImageTextDataset
from flowt2i.description import DatasetDescription, require_same
from flowt2i.errors import UserError
from flowt2i.evaluation.metrics import Context, Scores
from flowt2i.evaluation.reference import data_hash, same_data
from flowt2i.evaluation.validation import heldout_loss
from flowt2i.exported import weights_file
from flowt2i.pipeline import build_model
from flowt2i.training import checkpoint
from flowt2i.training.features import CaptionFeatures
from flowt2i.training.objective import Objective

KINDS = ("raw", "ema")


def check(context: Context, name: str) -> None:
    """UserError for a model or data that have no such loss."""
    pipeline, data = context.need_pipeline("loss"), context.need_data("loss")
    if context.source is None:
        raise UserError("the loss score needs a model on disk: give --model")
    theirs = DatasetDescription.load(data)
    if theirs.fingerprint == pipeline.description.fingerprint and not same_data(theirs, pipeline.description):
        raise UserError(f"{data} divides the data of the model otherwise: of its held-out images the model has seen some; prepare it with the same --heldout")
    require_same(pipeline.description.codec, theirs.codec, "codec of the model and of the data")
    require_same(pipeline.description.text, theirs.text, "text encoder of the model and of the data")


def metric(context: Context) -> Scores:
    """`evaluate --metrics loss`: over `--num` held-out images, else as many as the model's training looked at (train.eval_images)."""
    pipeline, data = context.need_pipeline("loss"), context.need_data("loss")
    assert context.source is not None  # checked
    config, device = pipeline.config, pipeline.device
    dataset = ImageTextDataset(data, "heldout" if DatasetDescription.load(data).heldout_count else "train")
    encoder = pipeline.encoder
    text_of = (
        CaptionFeatures(encoder, dataset, pipeline.description.text.dim, device, context.progress and context.world.main)
        if encoder
        else lambda batch: batch.ids.to(device)
    )

    def latents(batch: Batch, noise: Tensor | None) -> Tensor:
        return (stored_to_latents(pipeline.description.codec.kind, batch.stored.to(device), noise) - pipeline.mean) / pipeline.std

    most = context.given_num or config.train.eval_images
    count = min(most, len(dataset))
    title = f"loss-{count}@{pipeline.description.codec.image_size}"
    values: dict[str, float] = {}
    lines = []
    for name in KINDS:
        try:
            stem, _ = weights_file(context.source, name)
        except UserError:  # not in this folder: an exported model has one of them
            continue
        model = build_model(config, pipeline.description)
        checkpoint.load_into(model, context.source / f"{stem}.safetensors")
        objective = Objective(model.to(device).eval().requires_grad_(False), config.flow, pipeline.computes).to(device)
        found = heldout_loss(objective, dataset, latents, text_of, count, most, context.world)
        values |= {f"{title}/{name}" + ("" if part == "loss" else f"/{part}"): value for part, value in found.items()}
        bins = "   ".join(f"{part} {value:.4f}" for part, value in found.items() if part != "loss")
        lines.append(f"{'loss, ' + name + ' weights':30s} {found['loss']:10.5f}   {bins}")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    of = f"the first {count} {dataset.split} pictures of data {data_hash(dataset)[:8]}, noise and times fixed in batches of {min(64, most)}"
    flow = f"{pipeline.model.config.target}-prediction, floor {config.flow.floor:g}, {pipeline.computes}"
    return Scores(values, f"{title}, {of}, {flow}", lines)
