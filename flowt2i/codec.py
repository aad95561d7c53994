"""Image codecs: between pictures and what the flow runs on.

`pixels` is the picture itself; any diffusers `AutoencoderKL` gives latents. What is *stored* (uint8 pixels, or the
mean and log-variance of a VAE's posterior) is kept apart from *latents* (float32, raw: neither scaled nor normalised;
`scaling_factor` is used nowhere, statistics of the data take its place).
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch

from flowt2i.description import CodecSpec, fingerprint_files
from flowt2i.errors import UserError
from flowt2i.pretrained import ALIASES, LOAD_ERRORS, find_pretrained, first_line, full_id, quiet, read_config, weight_files


class Codec(Protocol):
    """Pictures to what is stored, and latents back to pictures."""

    spec: CodecSpec
    stored_shape: tuple[int, int, int]  # of one sample as kept on disk
    stored_dtype: np.dtype

    def to(self, device: torch.device | str) -> Self: ...

    def encode(self, images: torch.Tensor) -> np.ndarray:
        """uint8 [B, 3, H, W] -> what is stored, [B, channels, h, w]; of the square `stored_shape`. Sides are multiples of `spec.factor`."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Raw latents, float [B, C, h, w], not normalised -> float32 [B, 3, H, W] in [-1, 1]."""
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


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Decoded pictures, float [B, 3, H, W] in [-1, 1] (beyond it they are cut), as uint8 [B, H, W, 3]."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def stored_to_images(codec: Codec, stored: torch.Tensor, at_once: int = 64) -> np.ndarray:
    """Stored samples as pictures, uint8 [B, H, W, 3]: a VAE's are decoded from the mean of their latents, `at_once` of them together."""
    return np.concatenate([to_uint8(codec.decode(stored_to_latents(codec.spec.kind, part))) for part in stored.split(at_once)])


class PixelCodec:
    """No net at all: the flow runs on the picture."""

    def __init__(self, image_size: int):
        self.spec = CodecSpec(kind="pixels", image_size=image_size, shape=(3, image_size, image_size))
        self.stored_shape = self.spec.shape
        self.stored_dtype = np.dtype(np.uint8)

    def to(self, device: torch.device | str) -> Self:
        return self

    def encode(self, images: torch.Tensor) -> np.ndarray:
        _check_images(images, 1)
        return images.cpu().numpy()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.float().clamp(-1, 1)


class VaeCodec:
    """A frozen `AutoencoderKL`, in fp32 or bf16 (never fp16: SD's VAE overflows there).

    Pictures of which a side is longer than `tile_above` pixels are decoded one by one in tiles of half of it, which overlap by a quarter and are blended
    (diffusers' tiling): the memory is that of a tile however large the picture, and the attention in the VAE does not grow with the fourth power of the
    side. The tiles' own means and variances in the group norms make a small difference to decoding in one piece. Smaller pictures are decoded together as
    long as they have `pixels_at_once` or less: SD's decoder takes about 3 GiB for that in fp32.
    """

    tile_above = 1024
    pixels_at_once = 1 << 20

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
        """Moments float16 [B, 2C, h, w] = (mean, logvar) of uint8 [B, 3, H, W]. UserError where the VAE gives NaN, inf or a constant."""
        _check_images(images, self.spec.factor)
        x = (images.to(self.device).float() / 127.5 - 1).to(self.dtype)
        with torch.autocast(self.device.type, enabled=False):
            moments = self.net.encode(x).latent_dist.parameters.float()
        mean, logvar = moments.chunk(2, dim=1)
        stored = torch.cat([mean, logvar.clamp(-30, 20)], dim=1).half().cpu()
        self._check(stored, images)
        return stored.numpy()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        height, width = (side * self.spec.factor for side in latents.shape[2:])
        parts = latents.to(self.device, self.dtype).split(max(1, self.pixels_at_once // (height * width)))
        with torch.autocast(self.device.type, enabled=False), self._tiles(max(height, width) > self.tile_above):
            return torch.cat([self.net.decode(part).sample.float().clamp(-1, 1) for part in parts])

    @contextlib.contextmanager
    def _tiles(self, wanted: bool) -> Iterator[None]:
        """Within it the net decodes one picture after another, in tiles of half of `tile_above`."""
        if not wanted:
            yield
            return
        cells = max(4, self.tile_above // 2 // self.spec.factor // 4 * 4)  # of a latent; a quarter of them overlaps
        self.net.tile_latent_min_size, self.net.tile_sample_min_size = cells, cells * self.spec.factor
        self.net.enable_tiling()
        self.net.enable_slicing()
        try:
            yield
        finally:
            self.net.disable_tiling()
            self.net.disable_slicing()

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


def _check_images(images: torch.Tensor, factor: int) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % factor or images.shape[3] % factor:
        raise ValueError(f"images must be uint8 [B, 3, H, W] with sides of a multiple of {factor}, not {images.dtype} {tuple(images.shape)}")


def _load_vae(folder: Path, id: str, dtype: torch.dtype) -> Any:
    kind = read_config(folder).get("_class_name", "no diffusers model")
    if kind != "AutoencoderKL":
        raise UserError(f"{id!r} is {kind}, not AutoencoderKL: pass a VAE such as 'sd-vae-ft-mse', or use 'pixels'")
    with quiet():
        from diffusers import AutoencoderKL

        try:
            net, info = AutoencoderKL.from_pretrained(
                str(folder), use_safetensors=True, local_files_only=True, torch_dtype=dtype, low_cpu_mem_usage=False, output_loading_info=True
            )
        except LOAD_ERRORS as error:
            raise UserError(f"VAE {id!r} cannot be loaded ({first_line(error)}): fetch or save it again") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"VAE {id!r} lacks {len(missing)} weights (first: {missing[0]}): fetch or save it again")
    return net.eval().requires_grad_(False)
