"""Data to train on where none is given: the built-in scenes, prepared by the real `prepare`; for latent presets with stand-ins for VAE and T5."""

import warnings
from pathlib import Path
from typing import Any

import torch

from flowt2i.data import scenes
from flowt2i.data.options import PrepareOptions
from flowt2i.data.prepare import prepare
from flowt2i.text import END, PAD, learn_tokenizer

COUNT = 600  # scenes; a loop sees them again and again
T5_SMALL: dict[str, Any] = {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}


def generated(folder: Path, latents: bool) -> Path:
    """A prepared dataset of scenes in `folder`. latents: 8x8x4 ones, and captions for an encoder of T5-small's size, both of random weights."""
    options: dict[str, Any] = {"sources": ["scenes"], "out": folder / "data", "count": COUNT, "workers": 1}
    if latents:
        options |= {"codec": str(stand_in_vae(folder / "vae")), "text": str(stand_in_encoder(folder / "t5"))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a VAE of random weights may well be said to blur
        prepare(PrepareOptions.of(**options), progress=False)
    return folder / "data"


def stand_in_vae(folder: Path) -> Path:
    """An AutoencoderKL with sd-vae-ft-mse's factor of 8 and 4 channels, but small."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    blocks: dict[str, Any] = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "block_out_channels": (8, 8, 8, 8)}
    net: Any = AutoencoderKL(**blocks, latent_channels=4, norm_num_groups=4, layers_per_block=1)
    net.save_pretrained(folder, safe_serialization=True)
    return folder


def stand_in_encoder(folder: Path) -> Path:
    """A T5 encoder of T5-small's size, with a tokenizer learned from the scenes' captions."""
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    backend = learn_tokenizer(scenes.prompts(0, 200), 400)
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=END, model_max_length=128).save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(vocab_size=512, **T5_SMALL, is_encoder_decoder=False, use_cache=False)
    T5EncoderModel(config).save_pretrained(folder, safe_serialization=True)
    return folder
