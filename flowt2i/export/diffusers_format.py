"""A folder that `diffusers.DiffusionPipeline` loads and runs, where flowt2i is not installed too.

DIR/model_index.json  pipeline.py              the pipeline
    transformer/                               weights, configuration, and the model's own code in flowt2i_transformer.py
    scheduler/  tokenizer/  text_encoder/  vae/    diffusers' and transformers' own formats
"""

import json
from pathlib import Path
from typing import Any

import torch

from flowt2i import model as model_code
from flowt2i.errors import UserError
from flowt2i.export import diffusers_model, diffusers_pipeline
from flowt2i.export.carry import self_contained
from flowt2i.export.diffusers_model import FlowT2ITransformer
from flowt2i.export.diffusers_pipeline import FlowT2IPipeline
from flowt2i.export.facts import euler_steps
from flowt2i.files import share_tensors
from flowt2i.pipeline import Pipeline
from flowt2i.pretrained import quiet

CODE = "flowt2i_transformer"


def write(pipeline: Pipeline, folder: Path, dtype: torch.dtype) -> None:
    """Write all components of a pipeline on any device. UserError where transformers has no public class for the text encoder."""
    with quiet():
        as_diffusers(pipeline, dtype).save_pretrained(folder, safe_serialization=True)
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["pipeline", FlowT2IPipeline.__name__]  # of pipeline.py in this folder
    index["transformer"] = [CODE, FlowT2ITransformer.__name__]
    if index["tokenizer"][1] == "TokenizersBackend":  # its name in transformers 5; both versions know the older one
        index["tokenizer"][1] = "PreTrainedTokenizerFast"
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    (folder / "pipeline.py").write_text(self_contained(Path(diffusers_pipeline.__file__)))
    (folder / "transformer" / f"{CODE}.py").write_text(transformer_code())
    share_tensors(folder, like=folder / "model_index.json")


def as_diffusers(pipeline: Pipeline, dtype: torch.dtype = torch.float32) -> FlowT2IPipeline:
    """Our pipeline as diffusers' components on the CPU; weights are copied, VAE and text encoder shared."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    description, net, own = pipeline.description, pipeline.model, pipeline.settings()
    text = description.text
    transformer = FlowT2ITransformer(
        model=net.config.model_dump(),
        shape=list(net.shape),
        text_dim=text.dim if text.kind == "hf" else 0,
        vocab_size=text.vocab_size,
        latent_mean=list(description.latent_mean),
        latent_std=list(description.latent_std),
    )
    transformer.net.load_state_dict(net.state_dict())
    transformer.net.to(dtype)
    return FlowT2IPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=own["shift"]),
        tokenizer=_tokenizer(pipeline),
        text_encoder=_text_encoder(pipeline),
        vae=pipeline.codec.net if description.codec.kind == "vae" else None,
        max_tokens=text.max_tokens,
        caption_tokens=max(description.longest_caption, 1),
        steps=euler_steps(own),
        guidance=own["guidance"],
        guidance_rule=own["guidance_rule"],
        guidance_interval=(own["guidance_from"], own["guidance_until"]),
        width=description.home[0],
        height=description.home[1],
    )


def transformer_code() -> str:
    """One file with flowt2i/model.py and the class that diffusers loads."""
    model = self_contained(Path(model_code.__file__), {"flowt2i.config": "from types import SimpleNamespace as ModelConfig\n"})
    shell = self_contained(Path(diffusers_model.__file__), {"flowt2i.config": "", "flowt2i.model": ""})
    return f"{model}\n\n{shell}"


def _tokenizer(pipeline: Pipeline) -> Any:
    backend = pipeline.tokenizer.backend
    if pipeline.description.text.kind == "hf":
        return backend
    from transformers import PreTrainedTokenizerFast

    from flowt2i.text import END, PAD

    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=END, model_max_length=pipeline.description.text.max_tokens)


def _text_encoder(pipeline: Pipeline) -> Any:
    if pipeline.encoder is None:
        return None
    import transformers

    net: Any = pipeline.encoder.net
    if not hasattr(transformers, type(net).__name__):
        raise UserError(f"--format diffusers: text encoder {type(net).__name__} cannot be saved by itself: export with --format flowt2i instead")
    return net
