"""Our own format: what `Pipeline.from_pretrained` reads, in a folder or on the hub.

DIR/model.safetensors                    the weights, EMA unless raw ones were asked for
    config.json  dataset.json            configuration and description, as in a checkpoint
    tokenizer/  vae/  text_encoder/      the nets where they lie in folders of this machine, or where asked for; else they are named by hub id
    export.json  manifest.json           format, training, scores · size and sha256 of every file above
    scores.json                          what was measured of it, where that was given
    README.md  samples.png               the model card; not in the manifest, so that it may be edited
"""

import shutil
from pathlib import Path

import torch

from flowt2i import exported
from flowt2i.description import DatasetDescription
from flowt2i.export.facts import public_config, public_source
from flowt2i.files import save_tensors
from flowt2i.hub import PATTERNS
from flowt2i.pipeline import Pipeline
from flowt2i.pretrained import find_pretrained, weight_files

TRAVELS = {Path(pattern).suffix for pattern in PATTERNS}  # what is fetched from the hub, and nothing else


def write(
    pipeline: Pipeline, folder: Path, dtype: torch.dtype, captions: int, nets: bool, vae: str | None, text: str | None, source: str = ""
) -> None:  # fmt: skip
    """Write weights, configuration, description and tokenizer of a pipeline on any device.

    captions: how many captions of held-out pictures may travel. source: what the training pictures are called, where they have no public name.
    nets: copy VAE and text encoder too where the hub has them. vae, text: where they are, if they moved. UserError where they cannot be had.
    """
    state = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in pipeline.model.state_dict().items()}
    save_tensors(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(public_config(pipeline.config).model_dump_json(indent=2) + "\n")
    pipeline.tokenizer.save(folder)
    kept = {"source": source or public_source(pipeline.description), "prompts": pipeline.description.prompts[:captions]}
    description = pipeline.description.model_copy(update=kept)
    if description.codec.kind == "vae":
        description = _take_along(description, "codec", "diffusion_pytorch_model", vae, folder / exported.VAE, nets)
    if description.text.kind == "hf":
        description = _take_along(description, "text", "model", text, folder / exported.ENCODER, nets)
    description.save(folder)
    for file in (f for f in (folder / "tokenizer").rglob("*") if f.is_file() and f.suffix not in TRAVELS):
        file.unlink()  # some tokenizers write their vocabulary a second time, in a form of their own


def _take_along(description: DatasetDescription, part: str, stem: str, moved: str | None, target: Path, always: bool) -> DatasetDescription:
    """Copy a net that no other machine could find by its id, byte by byte (its fingerprint is of the bytes), and name it by its place here."""
    spec = getattr(description, part)
    local = Path(moved or spec.id).expanduser().is_dir()
    if not local and not always:
        return description
    what = "image codec" if part == "codec" else "text encoder"
    source = find_pretrained(moved or spec.id, stem=stem, what=what, instead="pixels" if part == "codec" else "builtin")
    files = [source / "config.json", *weight_files(source, stem)]
    index = source / f"{stem}.safetensors.index.json"
    target.mkdir()
    for file in [*files, *([index] if index.is_file() else [])]:
        shutil.copyfile(file, target / file.name)
    return description.model_copy(update={part: spec.model_copy(update={"id": target.name})})
