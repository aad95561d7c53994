"""Image codecs: between pictures and what the flow runs on.

`pixels` is the picture itself; any diffusers `AutoencoderKL` gives latents. What is *stored* (uint8 pixels, or the
mean and log-variance of a VAE's posterior) is kept apart from *latents* (float32, raw: neither scaled nor normalised;
`scaling_factor` is used nowhere, statistics of the data take its place). The first half of this file finds
pretrained nets on disk or on the hub, for text encoders too; the second half holds the codecs.
"""

import contextlib
import importlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from safetensors import SafetensorError

from flowt2i.description import CodecSpec, fingerprint_files
from flowt2i.errors import UserError, nearest

ALIASES = {"sd-vae-ft-mse": "stabilityai/sd-vae-ft-mse"}
TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model"]
# What from_pretrained raises on broken or foreign files (OSError: absent, ValueError/KeyError: unknown architecture,
# RuntimeError: shapes, ImportError: a tokenizer's optional package, AttributeError/TypeError: nonsense in config.json).
LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError, TypeError, SafetensorError)

# ---- finding pretrained nets


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the multi-line chatter and weight-loading bars of the Hugging Face libraries; errors still raise."""
    from transformers.utils import logging as hf_logging

    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers", "huggingface_hub")]
    levels, bar = [logger.level for logger in loggers], hf_logging.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
        if bar:
            hf_logging.enable_progress_bar()


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors of a folder: `stem.safetensors`, or every shard that its index names; [] where any is missing."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        return []
    try:
        files = sorted({folder / name for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} cannot be read as an index of weights: fetch it again") from error
    return files if all(file.is_file() for file in files) else []


def find_pretrained(id: str, *, stem: str, what: str, instead: str, tokenizer: bool = False) -> Path:
    """Folder that holds `config.json` and safetensors `stem` of a pretrained net.

    `id` is a folder or a hub id; what the hub cache already holds is used without asking the network.
    `what` names the thing in messages, `instead` the choice that needs no download.
    `tokenizer`: a hub copy must also have tokenizer files. UserError, one line, where it cannot be had.
    """
    path = Path(id).expanduser()
    if not id:
        raise UserError(f"{what}: empty name; pass a folder, a hub id or {instead!r}")
    if not path.is_dir():
        if _looks_like_path(id):
            lack = "not a folder" if path.exists() else "no such folder"
            raise UserError(f"{what}: {lack}: {id}; pass the folder that holds config.json and {stem}.safetensors")
        return _from_hub(id, stem=stem, what=what, instead=instead, tokenizer=tokenizer)
    folder = path.resolve()
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file() and stem.startswith("diffusion"):
        folder = folder / "vae"  # a whole diffusers pipeline was given
    if not (folder / "config.json").is_file():
        raise UserError(f"{what} {id!r} has no config.json: pass a folder saved with save_pretrained")
    if not weight_files(folder, stem):
        raise UserError(_no_weights(what, id, stem, {file.name for file in folder.iterdir()}))
    return folder


def full_id(id: str) -> str:
    """What to write down: the absolute path of a folder, so that it is found from elsewhere too; a hub id as it is."""
    path = Path(id).expanduser()
    return str(path.resolve()) if path.is_dir() else id


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a pretrained net."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{folder / 'config.json'} is not JSON: fetch it again") from error
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'} is not a JSON object: fetch it again")
    return config


def first_line(error: BaseException) -> str:
    """The first line of an error of another library, short enough for a one-line message."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 160 else line[:157] + "..."


def _looks_like_path(id: str) -> bool:
    path = Path(id).expanduser()
    inside = path.parent != Path() and path.parent.is_dir()  # data/vae, where data/ exists
    return id.startswith((".", "/", "~")) or "\\" in id or id.count("/") > 1 or inside or path.exists()


def _no_weights(what: str, id: str, stem: str, names: set[str]) -> str:
    pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if not pickled:
        return f"{what} {id!r} has no (or not all) weights as {stem}.safetensors: fetch them again, or check that it is the right folder"
    return f"{what} {id!r} has only pickled weights ({pickled[0]}), which are never opened: convert them to safetensors with save_pretrained"


def _from_hub(id: str, *, stem: str, what: str, instead: str, tokenizer: bool) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    weights = [f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}-*-of-*.safetensors"]
    patterns = ["config.json", *weights, *(TOKENIZER_FILES if tokenizer else [])]
    with contextlib.suppress(LocalEntryNotFoundError, HFValidationError):
        folder = Path(snapshot_download(id, allow_patterns=patterns, local_files_only=True))
        has_tokenizer = any(file for pattern in TOKENIZER_FILES for file in folder.glob(pattern))
        if (folder / "config.json").is_file() and weight_files(folder, stem) and (has_tokenizer or not tokenizer):
            return folder
    guess = nearest(id, [instead, *ALIASES]) if "/" not in id else ""
    guess = guess if "did you mean" in guess else ""
    files = f"config.json, *.safetensors{', tokenizer files' if tokenizer else ''}"
    ways = f"download {id} ({files}) on another machine and pass the folder, or use {instead!r}, which needs no download"
    unreachable: tuple[type[Exception], ...] = (LocalEntryNotFoundError, OfflineModeIsEnabled, *_network_errors())
    try:
        with quiet():
            names = {file.rfilename for file in HfApi().model_info(id, timeout=5).siblings or []}
            if "config.json" not in names or not names & set(weights[:2]):
                raise UserError(_no_weights(what, id, stem, names))
            return Path(snapshot_download(id, allow_patterns=patterns))
    except HFValidationError as error:
        raise UserError(f"{what} {id!r} is neither a folder here nor a possible hub id: pass a folder or 'owner/name'") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403, 404):
            login = "check the name, or log in with `hf auth login` if it is private or gated"
            raise UserError(f"{what} {id!r}: the hub has no such model, or not for you ({status}){guess}: {login}") from error
        raise UserError(f"{what} {id!r} is not on this machine{guess} and the hub answers with error {status}: {ways}") from error
    except unreachable as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        raise UserError(f"{what} {id!r} is not on this machine{guess} and {why}: {ways}") from error
    except OSError as error:  # disk full, no right to write the cache
        raise UserError(f"{what} {id!r} could not be downloaded ({first_line(error)}): {ways}") from error


def _network_errors() -> list[type[Exception]]:
    # huggingface_hub lets the errors of its HTTP library through; which library that is depends on its version.
    found: list[type[Exception]] = []
    for name in ("httpx2", "httpx"):
        with contextlib.suppress(ImportError):
            found.append(importlib.import_module(name).HTTPError)
    return found


# ---- codecs


class Codec(Protocol):
    """Pictures to what is stored, and latents back to pictures."""

    spec: CodecSpec
    stored_shape: tuple[int, int, int]  # of one sample as kept on disk
    stored_dtype: np.dtype

    def to(self, device: torch.device | str) -> Self: ...

    def encode(self, images: torch.Tensor) -> np.ndarray:
        """uint8 [B, 3, S, S] -> what is stored, [B, *stored_shape]."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Raw latents, float [B, C, h, w], not normalised -> float32 [B, 3, S, S] in [-1, 1]."""
        ...


def stored_to_latents(kind: str, stored: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    """Raw latents, float32 [B, C, h, w], of stored samples.

    `pixels`: uint8 [B, C, h, w] scaled to [-1, 1]. `vae`: moments [B, 2C, h, w]; `noise` [B, C, h, w] draws from the
    posterior, None takes its mean.
    """
    if kind == "pixels":
        return stored.float() / 127.5 - 1
    mean, logvar = stored.float().chunk(2, dim=1)
    return mean if noise is None else mean + torch.exp(logvar.clamp(-30, 20) / 2) * noise


class PixelCodec:
    """No net at all: the flow runs on the picture."""

    def __init__(self, image_size: int):
        self.spec = CodecSpec(kind="pixels", image_size=image_size, shape=(3, image_size, image_size))
        self.stored_shape = self.spec.shape
        self.stored_dtype = np.dtype(np.uint8)

    def to(self, device: torch.device | str) -> Self:
        return self

    def encode(self, images: torch.Tensor) -> np.ndarray:
        _check_images(images, self.spec.image_size)
        return images.cpu().numpy()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.float().clamp(-1, 1)


class VaeCodec:
    """A frozen `AutoencoderKL`, in fp32 or bf16 (never fp16: SD's VAE overflows there)."""

    def __init__(self, id: str, image_size: int, dtype: torch.dtype = torch.float32):
        if dtype not in (torch.float32, torch.bfloat16):
            raise UserError(f"a VAE runs in float32 or bfloat16, not {dtype}: fp16 overflows")
        id = id if Path(id).is_dir() else ALIASES.get(id, id)
        stem = "diffusion_pytorch_model"
        folder = find_pretrained(id, stem=stem, what="image codec", instead="pixels")
        self.net = _load_vae(folder, id, dtype)
        self.dtype, self.device = dtype, torch.device("cpu")
        factor = 2 ** (len(self.net.config.block_out_channels) - 1)
        if image_size % factor:
            near = max(1, round(image_size / factor)) * factor
            raise UserError(f"image size {image_size} is not a multiple of {factor}, by which VAE {id!r} downsamples: take {near}")
        shape = (int(self.net.config.latent_channels), image_size // factor, image_size // factor)
        fingerprint = fingerprint_files([folder / "config.json", *weight_files(folder, stem)])
        self.spec = CodecSpec(kind="vae", id=full_id(id), fingerprint=fingerprint, image_size=image_size, shape=shape)
        self.stored_shape = (2 * shape[0], *shape[1:])
        self.stored_dtype = np.dtype(np.float16)

    def to(self, device: torch.device | str) -> Self:
        self.device = torch.device(device)
        self.net.to(self.device)
        return self

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> np.ndarray:
        """Moments float16 [B, 2C, h, w] = (mean, logvar) of uint8 [B, 3, S, S]. UserError where the VAE gives NaN, inf or a constant."""
        _check_images(images, self.spec.image_size)
        x = (images.to(self.device).float() / 127.5 - 1).to(self.dtype)
        with torch.autocast(self.device.type, enabled=False):
            moments = self.net.encode(x).latent_dist.parameters.float()
        mean, logvar = moments.chunk(2, dim=1)
        stored = torch.cat([mean, logvar.clamp(-30, 20)], dim=1).half().cpu()
        self._check(stored, images)
        return stored.numpy()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device.type, enabled=False):
            return self.net.decode(latents.to(self.device, self.dtype)).sample.float().clamp(-1, 1)

    def _check(self, stored: torch.Tensor, images: torch.Tensor) -> None:
        broken = "its weights are broken or of another version; use another VAE or 'pixels'"
        bad = ~stored.isfinite().all(3).all(2).all(0)
        if bad.any():
            raise UserError(f"VAE {self.spec.id!r} gives NaN or inf (moments channel {int(bad.nonzero()[0])}): {broken}")
        # Flat pictures may well give a flat latent; pictures with contrast may not.
        means = stored[:, : self.spec.shape[0]]
        contrast = int(images.max()) - int(images.min()) if len(images) else 0
        if contrast >= 16 and (means.amax((0, 2, 3)) == means.amin((0, 2, 3))).all():
            raise UserError(f"VAE {self.spec.id!r} gives constant moments whatever the picture: {broken}")


def load_codec(id: str, image_size: int, dtype: torch.dtype = torch.float32) -> Codec:
    """The codec `pixels`, `sd-vae-ft-mse`, or any AutoencoderKL by hub id or folder, for square images of `image_size` pixels.

    UserError: unknown or unreachable id, pickled or broken weights, a size the VAE cannot halve often enough.
    """
    if image_size < 1:
        raise UserError(f"image size {image_size} is not a positive number of pixels")
    return PixelCodec(image_size) if id == "pixels" else VaeCodec(id, image_size, dtype)


def codec_from_spec(spec: CodecSpec, id: str | None = None, dtype: torch.dtype = torch.float32) -> Codec:
    """The codec a dataset was prepared with, from `spec.id` or from the `id` given instead. UserError if it is another one."""
    codec = load_codec(id or spec.id, spec.image_size, dtype)
    if (codec.spec.kind, codec.spec.fingerprint, codec.spec.shape) != (spec.kind, spec.fingerprint, spec.shape):
        raise UserError(
            f"image codec {codec.spec.id!r} is not the one the data was prepared with ({spec.id!r}, fingerprint {spec.fingerprint[:12]}, "
            f"not {codec.spec.fingerprint[:12]}): pass the same VAE, or prepare the data again"
        )
    return codec


def _check_images(images: torch.Tensor, size: int) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1:] != (3, size, size):
        raise ValueError(f"images must be uint8 [B, 3, {size}, {size}], not {images.dtype} {tuple(images.shape)}")


def _load_vae(folder: Path, id: str, dtype: torch.dtype) -> Any:
    kind = read_config(folder).get("_class_name", "no diffusers model")
    if kind != "AutoencoderKL":
        raise UserError(f"{id!r} is {kind}, not AutoencoderKL: pass a VAE such as 'sd-vae-ft-mse', or use 'pixels'")
    with quiet():
        from diffusers import AutoencoderKL

        try:
            net, info = AutoencoderKL.from_pretrained(str(folder), use_safetensors=True, local_files_only=True, torch_dtype=dtype, output_loading_info=True)
        except LOAD_ERRORS as error:
            raise UserError(f"VAE {id!r} cannot be loaded ({first_line(error)}): fetch or save it again") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"VAE {id!r} lacks {len(missing)} weights (first: {missing[0]}): fetch or save it again")
    return net.eval().requires_grad_(False)
