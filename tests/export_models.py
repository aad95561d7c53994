"""A latent model with a real (small, random) AutoencoderKL and T5EncoderModel on disk, for the tests of exports."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flowt2i import Pipeline
from flowt2i.config import resolve
from flowt2i.data import scenes
from flowt2i.data.options import PrepareOptions
from flowt2i.data.prepare import prepare
from flowt2i.training import checkpoint
from flowt2i.training.loop import train


def save_vae(folder: Path) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "block_out_channels": (8, 8, 8, 8)}
    AutoencoderKL(**blocks, latent_channels=4, norm_num_groups=4, layers_per_block=1).save_pretrained(folder, safe_serialization=True)
    return folder


def save_t5(folder: Path, captions: list[str]) -> Path:
    """With a tokenizer learned from the captions."""
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    from flowt2i.text import END, PAD, learn_tokenizer

    torch.manual_seed(0)
    config = T5Config(vocab_size=400, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, is_encoder_decoder=False, use_cache=False)
    T5EncoderModel(config).save_pretrained(folder, safe_serialization=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learn_tokenizer(captions, 400), pad_token=PAD, eos_token=END, model_max_length=64)
    tokenizer.save_pretrained(folder)
    return folder


def train_on_latents(folder: Path, tiny: list[str]) -> Path:
    """FOLDER/run: two steps on the latents of FOLDER/nets/vae with FOLDER/nets/t5 reading the captions."""
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(24):
        image, caption = scenes.sample(0, i)
        Image.fromarray(image).save(folder / "images" / f"{i:03d}.png")
        lines.append({"file_name": f"{i:03d}.png", "text": caption})
    (folder / "images" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    vae, t5 = save_vae(folder / "nets" / "vae"), save_t5(folder / "nets" / "t5", [line["text"] for line in lines])
    options = {"sources": [str(folder / "images")], "codec": str(vae), "text": str(t5), "max_tokens": 64, "heldout": 0.2, "workers": 1}
    prepare(PrepareOptions(out=folder / "data", **options), progress=False)
    words = [*tiny, "--train.steps", "2", "--optim.lr", "1e-2", "--optim.schedule", "constant", "--optim.warmup", "0"]
    train(resolve("stability", words), folder / "data", folder / "run", progress=False)
    return enliven(folder / "run")


def enliven(run: Path) -> Path:
    """Give the weights of a run's newest checkpoint random values of a trained model's size: captions and times then matter to every pixel."""
    folder = checkpoint.newest_good(run)
    assert folder is not None
    generator = torch.Generator().manual_seed(0)
    for file in (folder / "model.safetensors", folder / "ema.safetensors"):
        state = {name: tensor + torch.randn(tensor.shape, generator=generator) * tensor.shape[-1] ** -0.5 for name, tensor in load_file(file).items()}
        save_file(state, file)
    checkpoint.write_manifest(folder)
    return run


def drawn(pipeline: Pipeline, prompts: list[str], seed: int = 3, **settings) -> np.ndarray:
    """What `pipeline.sample` draws before it is rounded to 256 levels: [B, H, W, 3] in [0, 1]."""
    kept = []
    rounded = pipeline.to_images
    pipeline.to_images = lambda z: kept.append(pipeline.codec.decode(z.float() * pipeline.std + pipeline.mean)) or rounded(z)  # type: ignore[method-assign]
    try:
        pipeline.sample(prompts, seed=seed, **settings)
    finally:
        del pipeline.to_images
    return ((kept[-1].clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()


def same(found: np.ndarray, wanted: np.ndarray) -> bool:
    """Pictures in [0, 1] under a grey level apart everywhere, and hardly in the mean: a steep pixel mask enlarges the rounding of single pixels at its edge."""
    apart = np.abs(found - wanted)
    return bool(apart.max() < 1 / 255 and apart.mean() < 5e-5)
