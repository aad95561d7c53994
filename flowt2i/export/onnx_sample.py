"""Draw with the graphs in this folder: onnxruntime, numpy, tokenizers and Pillow, no torch.

    python sample.py "a small red circle" picture.png [seed]

Time runs from noise (t = 0) to the picture (t = 1). `flowt2i export --format onnx` writes this file.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

from flowt2i.text import token_ids

HERE = Path(__file__).parent


def encode(prompts: list[str], settings: dict[str, Any], folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Features [B, T, D] and mask [B, T] of captions."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # "<end>" written in a caption is text, not the end
    rows, _ = token_ids(tokenizer, prompts, settings["max_tokens"])
    width = max(settings["caption_tokens"], *(len(row) for row in rows))
    ids = np.array([row + [settings["pad_id"]] * (width - len(row)) for row in rows], np.int64)
    mask = np.array([[i < len(row) for i in range(width)] for row in rows])
    session = onnxruntime.InferenceSession(str(folder / "text_encoder.onnx"), providers=["CPUExecutionProvider"])
    return session.run(None, {"ids": ids, "mask": mask})[0], mask


def combined(rule: str, wanted: np.ndarray, unwanted: np.ndarray, scale: float) -> np.ndarray:
    """Velocities [B, C, H, W] by classifier-free guidance (2207.12598, eq. 6), CFG-Zero*'s (2503.18886) or all of it but each channel's mean."""
    if rule == "zero-star":
        unwanted = unwanted * (wanted * unwanted).sum((1, 2, 3), keepdims=True) / np.maximum((unwanted**2).sum((1, 2, 3), keepdims=True), 1e-8)
    velocity = unwanted + scale * (wanted - unwanted)
    return velocity + (wanted - velocity).mean((2, 3), keepdims=True) if rule == "mean-kept" else velocity


def draw(prompts: list[str], noise: np.ndarray, folder: Path = HERE, steps: int = 0, guidance: float | None = None) -> np.ndarray:
    """Pictures [B, H, W, 3] in [0, 1] from noise [B, C, H, W], in Euler steps with guidance on an interval of times."""
    settings = json.loads((folder / "sampling.json").read_text())
    steps, scale = steps or settings["steps"], settings["guidance"] if guidance is None else guidance
    text, mask = encode([*prompts, *[""] * len(prompts)], settings, folder)
    net = onnxruntime.InferenceSession(str(folder / "velocity.onnx"), providers=["CPUExecutionProvider"])
    even = np.linspace(0, 1, steps + 1, dtype=np.float32)
    times = even / (even + settings["shift"] * (1 - even))
    z = noise.astype(np.float32)
    first, last = settings["guidance_interval"]
    for t, after in zip(times[:-1], times[1:]):
        guided = first <= round(float(t), 6) < last
        both = np.concatenate([z, z]) if guided else z
        velocity = net.run(None, {"z": both, "t": np.full(len(both), t, np.float32), "text": text[: len(both)], "mask": mask[: len(both)]})[0]
        if guided:
            wanted, unwanted = np.split(velocity, 2)
            velocity = combined(settings["guidance_rule"], wanted, unwanted, scale)
        z = z + (after - t) * velocity
    mean, std = (np.array(settings[name], np.float32).reshape(1, -1, 1, 1) for name in ("latent_mean", "latent_std"))
    return (np.clip(z * std + mean, -1, 1).transpose(0, 2, 3, 1) + 1) / 2


if __name__ == "__main__":
    prompt, file, seed = [*sys.argv[1:], "0"][:3] if len(sys.argv) > 2 else sys.exit('usage: python sample.py "a small red circle" picture.png [seed]')
    shape = json.loads((HERE / "sampling.json").read_text())["shape"]
    picture = draw([prompt], np.random.default_rng(int(seed)).standard_normal((1, *shape)))[0]
    Image.fromarray((picture * 255).round().astype(np.uint8)).save(file)
