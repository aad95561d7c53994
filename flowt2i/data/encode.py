"""Encoding in batches that fit the memory (where one does not, it is halved, once for all, and that is said), and a look at what comes out."""

import warnings
from typing import Any

import numpy as np

from flowt2i.errors import UserError
from flowt2i.memory import is_out_of_memory


class Encoder:
    """A codec and how many pictures it is given at a time."""

    def __init__(self, codec: Any, batch_size: int) -> None:
        self.codec, self.batch_size = codec, batch_size

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """What is stored of uint8 [N, 3, H, W]. UserError where not even one picture fits the memory."""
        import torch

        images = torch.from_numpy(pixels)
        parts: list[np.ndarray] = []
        done = 0
        while done < len(images):
            try:
                parts.append(self.codec.encode(images[done : done + self.batch_size]))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._shrink(error)
                continue
            done += len(parts[-1])
        stored = np.concatenate(parts) if len(parts) != 1 else parts[0]
        if len(stored) > 1 and (stored == stored[:1]).all() and not (pixels == pixels[:1]).all():
            raise UserError(f"codec {self.codec.spec.id!r} gives the same latents for different images: its weights are broken; use another VAE or 'pixels'")
        return stored

    def _shrink(self, error: BaseException) -> None:
        import torch

        codec = self.codec.spec.id
        if self.batch_size == 1:
            size = self.codec.spec.image_size
            advice = "free memory, use --device cpu, or a smaller --image-size"
            raise UserError(f"not enough memory for codec {codec!r} to encode one image of {size} pixels: {advice}") from error
        self.batch_size //= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(f"out of memory: codec {codec!r} now encodes {self.batch_size} images at a time (see --batch-size)", stacklevel=3)
