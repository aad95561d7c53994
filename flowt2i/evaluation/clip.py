"""How well pictures fit their captions in the eyes of a CLIP (Radford et al. 2021): the CLIP score, and how often the right caption is told from 99 others.

Any `CLIPModel` of Hugging Face, by id or folder, from safetensors, with its own preprocessing. A score is named after its net: those of two nets say nothing
about each other. Pictures of 64 pixels are enlarged to what the net reads, so compare with the score of real pictures of the same size.
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flowt2i.description import DatasetDescription, fingerprint_files, require_same
from flowt2i.errors import UserError
from flowt2i.evaluation.intervals import by_group, mean_interval, share_interval
from flowt2i.evaluation.metrics import Context, Scores
from flowt2i.evaluation.pictures import over_ranks
from flowt2i.evaluation.reference import captioned, real_images
from flowt2i.pretrained import LOAD_ERRORS, find_pretrained, first_line, quiet, read_config, weight_files
from flowt2i.training.distributed import World, best_device

CANDIDATES = 100  # captions among which the right one is to be found, itself counted
BATCH = 64


class Clip:
    """A CLIP in fp32, with its tokenizer and its preprocessing."""

    def __init__(self, net: Any, tokenizer: Any, preprocess: Any, name: str, fingerprint: str) -> None:
        self.net, self.tokenizer, self.preprocess, self.name, self.fingerprint = net, tokenizer, preprocess, name, fingerprint
        self.dim = int(net.config.projection_dim)
        self.device = next(net.parameters()).device
        self.longest = int(net.config.text_config.max_position_embeddings)

    @classmethod
    def load(cls, id: str, device: str | torch.device | None = None) -> "Clip":
        """From a folder or a hub id; UserError, one line, where it cannot be had or is no CLIP."""
        folder = find(id)
        from transformers import AutoTokenizer, CLIPModel
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # the one that needs no torchvision

        with quiet():
            try:
                options: dict[str, Any] = {"local_files_only": True}
                tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **options)
                preprocess = CLIPImageProcessorPil.from_pretrained(str(folder), **options)
                loaded: Any = CLIPModel.from_pretrained(str(folder), use_safetensors=True, dtype=torch.float32, output_loading_info=True, **options)
            except LOAD_ERRORS as error:
                raise UserError(f"CLIP {id!r} cannot be loaded ({first_line(error)}): fetch or save it again") from error
        net, info = loaded
        missing = sorted(key for key in info["missing_keys"] if "position_ids" not in key)
        if missing:
            raise UserError(f"CLIP {id!r} lacks {len(missing)} weights (first: {missing[0]}): fetch or save it again")
        net = net.eval().requires_grad_(False).to(torch.device(device) if device else best_device())
        files = [folder / "config.json", folder / "preprocessor_config.json", *weight_files(folder, "model")]
        return cls(net, tokenizer, preprocess, Path(id).name, fingerprint_files(files))

    @torch.inference_mode()
    def images(self, images: np.ndarray) -> Tensor:
        """uint8 [N, H, W, 3] -> unit vectors float32 [N, D], on the CPU."""
        parts = []
        for start in range(0, len(images), BATCH):
            pixels = self.preprocess(list(images[start : start + BATCH]), return_tensors="pt")["pixel_values"].to(self.device)
            parts.append(self.net.visual_projection(self.net.vision_model(pixel_values=pixels).pooler_output))
        return F.normalize(torch.cat(parts).float(), dim=-1).cpu()

    @torch.inference_mode()
    def captions(self, captions: Sequence[str]) -> Tensor:
        """N captions, cut at what the net reads -> unit vectors float32 [N, D], on the CPU."""
        parts = []
        for start in range(0, len(captions), BATCH):
            words = self.tokenizer(list(captions[start : start + BATCH]), padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
            read = self.net.text_model(input_ids=words["input_ids"].to(self.device), attention_mask=words["attention_mask"].to(self.device))
            parts.append(self.net.text_projection(read.pooler_output))
        return F.normalize(torch.cat(parts).float(), dim=-1).cpu()


def find(id: str) -> Path:
    """The folder of a CLIP, by folder or hub id; UserError, one line, where it cannot be had or is no CLIP."""
    folder = find_pretrained(id, stem="model", what="CLIP", instead="--metrics kid", tokenizer=True, also="preprocessor_config.json")
    kind = read_config(folder).get("model_type")
    if kind != "clip":
        raise UserError(f"CLIP {id!r} is a model of type {kind!r}, not 'clip': pass one such as 'openai/clip-vit-base-patch32'")
    if not (folder / "preprocessor_config.json").is_file():
        raise UserError(f"CLIP {id!r} has no preprocessor_config.json: fetch it again, it says how pictures are to be scaled")
    return folder


def check(context: Context, name: str = "clip") -> None:
    """UserError for what is wrong before any work: no CLIP, no model, no data of the model's codec."""
    if not context.clip_name:
        raise UserError("the clip score needs a net: add --clip openai/clip-vit-base-patch32 (or a folder with another CLIP)")
    find(context.clip_name)
    described = DatasetDescription.load(context.need_data(name))
    require_same(context.need_pipeline(name).description.codec, described.codec, "codec of the model and of --data")


def metric(context: Context) -> Scores:
    """`clip`: pictures of held-out captions, and beside them the real pictures of these captions."""
    check(context)
    pipeline = context.need_pipeline("clip")
    net = Clip.load(context.clip_name, context.world.device)
    found = score(net, context.images(), context.prompts, context.world, context.progress)
    data = context.captions
    captions = data.captions()
    rows = captioned(captions)[: context.num]
    real = score(net, real_images(data, pipeline.codec, rows), [captions[k] for k in rows], context.world, context.progress)
    title = f"{net.name}-{context.count}@{context.resolution}"
    names = {"clip": f"clip-{title}", "retrieval": f"retrieval-among-{found['candidates']}-{title}"}
    values, intervals, lines = {}, {}, []
    for what, name in names.items():
        for whose, measured in (("", found), ("/real pictures", real)):
            if what in measured:
                part = measured[what]
                value, form = (part["mean"], "{:6.2f}") if what == "clip" else (part["accuracy"], "{:6.1%}")
                values[name + whose], intervals[name + whose] = value, part
                ends = " to ".join(form.format(part[end]).strip() for end in ("low", "high"))
                of = f", {measured['pictures']} pictures of {part['n']} captions" if measured["pictures"] > part["n"] else ""
                lines.append(f"{what + whose:22s} {form.format(value)}   [{ends}]   n={part['n']}{of}")
    if found["pictures"] > found["clip"]["n"]:
        lines.append(f"(more pictures than captions: {found['clip']['n']} captions are what was seen, and what the intervals count)")
    of_data = f"{context.asked}, {found['clip']['n']} different ones"
    protocol = f"clip and retrieval-among-{found['candidates']} with {context.clip_name} {net.fingerprint[:8]}, {of_data}, {context.protocol()}"
    return Scores(values, protocol, lines, {"intervals": intervals})


def score(clip: Clip, images: np.ndarray, captions: Sequence[str], world: World | None = None, progress: bool = False) -> dict[str, Any]:
    """`clip`: CLIP score with its interval; `retrieval`: share of pictures whose own caption is nearest; `candidates`: among how many; `pictures`.

    images uint8 [N, H, W, 3], one a caption. Both are means over the *different* captions, of what the pictures of each get, and `n` is the number of captions:
    twenty pictures of one caption tell little more of the model than one. UserError for fewer than two pictures.
    """
    scores, hits = score_each(clip, images, captions, world, progress)
    means = by_group(scores, captions)
    result = {"clip": mean_interval(means), "candidates": min(CANDIDATES, len(means)), "pictures": len(images)}
    return result | ({"retrieval": share_interval(by_group(hits, captions))} if hits else {})


def score_each(
    clip: Clip, images: np.ndarray, captions: Sequence[str], world: World | None = None, progress: bool = False
) -> tuple[np.ndarray, list[bool]]:  # fmt: skip
    """CLIP score of every picture [N], and whether its caption was retrieved ([] where there is but one caption); over all ranks, the same on each."""
    if len(images) != len(captions) or len(images) < 2:
        raise UserError(f"a CLIP score needs two pictures or more, a caption each: {len(images)} pictures, {len(captions)} captions")
    distinct = sorted(set(captions))
    place = {caption: number for number, caption in enumerate(distinct)}
    world = world or World(0, 1, clip.device)
    gather = lambda count, work, title: torch.from_numpy(over_ranks(world, count, work, (clip.dim,), np.float32, progress, title))
    pictures = gather(len(images), lambda rows: clip.images(images[rows.start : rows.stop]).numpy(), "pictures through CLIP")
    texts = gather(len(distinct), lambda rows: clip.captions(distinct[rows.start : rows.stop]).numpy(), "captions through CLIP")
    own = [place[caption] for caption in captions]
    hits = retrieved(pictures, texts, own, distinct) if len(distinct) > 1 else []
    return clip_scores((pictures * texts[own]).sum(-1)), hits


def clip_scores(cosines: Tensor) -> np.ndarray:
    """100 max(cos, 0) of each picture: Hessel et al. 2021, eq. 1, with w = 100 (theirs is 2.5), as torchmetrics and most tables have it. [N]."""
    return 100 * cosines.double().clamp_min(0).numpy()


def retrieved(pictures: Tensor, texts: Tensor, own: Sequence[int], captions: Sequence[str]) -> list[bool]:
    """For each picture, whether its caption is nearer than all of 99 others (R-precision of Xu et al. 2018, AttnGAN, sect. 4); ties count against it.

    pictures [N, D] and texts [M, D]: unit vectors; own: which text is the picture's; captions: the M texts, all different, by whose hashes the others are
    chosen: the same on every machine, and for a picture the same whatever net and model are scored.
    """
    order = sorted(range(len(captions)), key=lambda k: hashlib.sha256(captions[k].encode("utf-8", "surrogatepass")).digest())
    rank = {text: place for place, text in enumerate(order)}
    others = min(CANDIDATES, len(captions)) - 1
    hits = []
    for picture, text in zip(pictures, own):
        rivals = [order[(rank[text] + k) % len(order)] for k in range(1, others + 1)]
        near = texts[[text, *rivals]] @ picture
        hits.append(bool(near[0] > near[1:].max()) and math.isfinite(float(near[0])))
    return hits
