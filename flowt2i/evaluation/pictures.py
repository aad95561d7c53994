"""The pictures that are scored: drawn in blocks over all ranks and kept, so that an evaluation goes on where it was stopped; or read from a folder."""

import hashlib
import json
import os
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from flowt2i.data.images import load_square, to_rgb
from flowt2i.data.sample import IMAGE_SUFFIXES, Dropped
from flowt2i.errors import UserError
from flowt2i.evaluation.nets import FeatureNet, fingerprint_tensors, resize
from flowt2i.files import whole
from flowt2i.pipeline import Pipeline
from flowt2i.shapes import Shape
from flowt2i.styles import BY_STYLES
from flowt2i.training.distributed import World

BLOCK = 64  # pictures drawn together; the same ones whatever the number of ranks, so that no picture depends on it
STRIDE = 1_000_000  # of the seeds: --seed 0 draws with 1,000,000 and on, --seed 1 with 2,000,000 and on


@dataclass
class Drawing:
    """Pictures of prompts by a model, with settings as in `Pipeline.sample`; picture k has seed (seed + 1) * STRIDE + k.

    sizes: (width, height) of each, as the pictures have that it is held against; None: the model's own.
    """

    pipeline: Pipeline
    prompts: list[str]
    seed: int
    settings: dict[str, Any]
    sizes: list[Shape] | None = None

    def fingerprint(self) -> str:
        """sha256 of all that the pictures depend on, but their number: weights (a guide's too), settings, seed. Prompts are looked at block by block."""
        digest = hashlib.sha256(b"pictures-2")
        settings = self.pipeline.settings(**self.settings)
        by_styles = any(settings[name] for name in BY_STYLES)
        if not by_styles:  # as pictures were kept before there were such settings
            settings = {name: value for name, value in settings.items() if not name.startswith(BY_STYLES)}
        facts = [settings, self.seed, BLOCK, self.pipeline.computes, self.pipeline.description.codec.fingerprint]
        if by_styles:
            facts.append(self.pipeline.config.sample.styles)
        guide = self.pipeline._guide(self.settings.get("guide"))
        if guide is not None:  # its path may hold another model by now
            facts.append(weights_hash(guide))
        digest.update(json.dumps(facts, sort_keys=True).encode())
        digest.update(weights_hash(self.pipeline).encode())
        return digest.hexdigest()

    def images(self, world: World, run: Path | None = None, progress: bool = True) -> np.ndarray:
        """uint8 [N, S, S, 3], on every rank. UserError on every rank where one fails."""
        self.pipeline.settings(**self.settings)
        folder = keep_in(run, self.fingerprint()) if run else None
        size = self.pipeline.description.codec.image_size
        return over_ranks(world, len(self.prompts), lambda rows: self._block(rows, folder), (size, size, 3), np.uint8, progress, "drawing")

    def _block(self, rows: range, folder: Path | None) -> np.ndarray:
        prompts = [self.prompts[k] for k in rows]
        sizes = [self.sizes[k] for k in rows] if self.sizes else [self.pipeline.description.home] * len(rows)
        asked = json.dumps([prompts, sizes] if self.sizes else prompts)
        path = folder / f"{rows.start // BLOCK:06d}-{hashlib.sha256(asked.encode()).hexdigest()[:12]}.npy" if folder else None
        if path and (found := _read(path, len(rows))) is not None:
            return found
        images = draw(self.pipeline, prompts, sizes, (self.seed + 1) * STRIDE + rows.start, **self.settings)
        if path:
            _write(path, images)
        return images


def draw(pipeline: Pipeline, prompts: list[str], sizes: list[Shape], seed: int, **settings: Any) -> np.ndarray:
    """A picture of each prompt in its own size (width, height), squeezed to the model's square where it is another: uint8 [N, S, S, 3].

    Picture k has seed `seed + k`.
    """
    side = pipeline.description.codec.image_size
    images = np.zeros((len(prompts), side, side, 3), np.uint8)
    for size in sorted(set(sizes)):
        here = [k for k, other in enumerate(sizes) if other == size]
        drawn = pipeline.sample(
            [prompts[k] for k in here], seeds=[seed + k for k in here], width=size[0], height=size[1], batch_size=BLOCK, **settings
        )  # fmt: skip
        images[here] = resize(drawn.images, side)
    return images


def weights_hash(pipeline: Pipeline) -> str:
    """sha256 over names and values of a model's weights."""
    return fingerprint_tensors(pipeline.model.state_dict())


def over_ranks(
    world: World, count: int, work: Callable[[range], np.ndarray], shape: tuple[int, ...], dtype: Any, progress: bool, title: str, block: int = 0
) -> np.ndarray:  # fmt: skip
    """Results [count, *shape] of `work` on blocks of rows (of BLOCK, unless `block` says otherwise), on every rank, in main memory.

    In rounds of one block a rank, the last block repeated where they do not come out even (a sharded model needs every rank at every pass). After each
    round the ranks agree whether one failed, and then raise together, and share what they made: none runs ahead, and waits longer than one block takes.
    """
    block = block or BLOCK
    blocks = -(-count // block)
    results = np.zeros((count, *shape), dtype)
    with tqdm(total=count, desc=title, unit="image", disable=not (progress and world.main), leave=False) as bar:
        for first in range(0, blocks, world.size):
            number = min(first + world.rank, blocks - 1)
            rows = range(number * block, min((number + 1) * block, count))
            mine = np.zeros((1, block, *shape), dtype)
            failure: Exception | None = None
            try:
                mine[0, : len(rows)] = work(rows)
            except Exception as error:  # said after the round: the others are at work
                failure = error
            raise_everywhere(world, failure)
            made = world.collect(mine, world.size).reshape(-1, *shape)[: count - first * block]
            results[first * block : first * block + len(made)] = made
            bar.update(len(made))
    return results


def raise_everywhere(world: World, failure: Exception | None) -> None:
    """Where any rank failed all ranks stop, each with the first message, or its own where that is no mistake of the user."""
    if not world.any(failure is not None):
        return
    messages: list[Any] = [None] * world.size
    if world.size > 1:
        dist.all_gather_object(messages, str(failure) if failure else None)
    if failure and (world.size == 1 or not isinstance(failure, UserError)):
        raise failure
    raise UserError(next(message for message in messages if message is not None))


def features(net: FeatureNet, images: np.ndarray, world: World, progress: bool = True, title: str = "features") -> torch.Tensor:
    """Features float32 [N, dim] of uint8 [N, H, W, 3] (the same on all ranks), over all ranks; the same for any number of them."""
    found = over_ranks(world, len(images), lambda rows: net(images[rows.start : rows.stop]).numpy(), (net.dim,), np.float32, progress, title)
    return torch.from_numpy(found)


def keep_in(run: Path, fingerprint: str) -> Path | None:
    """RUN/evaluation/HASH, made where it is not there; None, with a warning, where it cannot be written."""
    folder = run / "evaluation" / fingerprint[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    warnings.warn(f"{folder} cannot be written: an evaluation that is stopped starts over", stacklevel=2)
    return None


def _read(path: Path, count: int) -> np.ndarray | None:
    try:
        images = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None
    return images if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 4 and len(images) == count else None


def _write(path: Path, images: np.ndarray) -> None:
    """Whole or not at all."""
    try:
        with whole(path) as aside, aside.open("wb") as file:
            np.save(file, images)
    except OSError as error:
        raise UserError(f"cannot keep pictures in {path.parent} ({error.strerror}): make room there") from error


# ---- pictures from elsewhere -----------------------------------------------------------------------------------------


def list_images(folder: Path) -> list[Path]:
    """Image files under a folder, sorted by path; what begins with a dot is left out. UserError where there are none."""
    if not folder.is_dir():
        raise UserError(f"no folder of images at {folder}")
    inside = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    found = sorted(path for path in inside if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    if not found:
        raise UserError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return found


def read_folder(folder: Path, most: int = 0, progress: bool = False) -> np.ndarray:
    """The first `most` (0: all) pictures of a folder as they are, uint8 [N, S, S, 3]. A `.npy` file of such an array is read too.

    UserError for an empty folder, broken files, numbers that are not finite, pictures that are not square or not all of one size.
    """
    if folder.suffix == ".npy":
        return _read_array(folder)[: most or None]
    files = list_images(folder)[: most or None]
    images: list[np.ndarray] = []
    for file in tqdm(files, desc="reading pictures", unit="image", disable=not progress, leave=False):
        try:
            with Image.open(file) as image:
                if image.mode == "F" and not np.isfinite(np.asarray(image)).all():
                    raise UserError(f"{file} holds numbers that are not finite: its maker's model diverged")
                images.append(np.asarray(to_rgb(image)))
        except UserError:
            raise
        except Exception as error:  # Pillow's plugins raise nearly anything on corrupt files
            raise UserError(f"{file} cannot be read as an image ({type(error).__name__}): make it again or take it out") from error
        if images[-1].shape != images[0].shape or images[0].shape[0] != images[0].shape[1]:
            sides = [f"{image.shape[1]}x{image.shape[0]}" for image in (images[0], images[-1])]
            what = f"not square ({sides[0]})" if sides[0] == sides[1] else f"of mixed sizes ({files[0].name} {sides[0]}, {file.name} {sides[1]})"
            raise UserError(f"the pictures of {folder} are {what}: bring them to one square size, by one method, before they are scored")
    return np.stack(images)


def _read_array(path: Path) -> np.ndarray:
    try:
        images = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read as an array (nothing is unpickled): save uint8 [N, S, S, 3] with numpy.save") from error
    if not isinstance(images, np.ndarray):  # an archive of arrays under another name
        images.close()
        raise UserError(f"{path} is an archive of several arrays (.npz): save one array, uint8 [N, S, S, 3], with numpy.save")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or images.shape[1] != images.shape[2] or not len(images):
        broken = np.issubdtype(images.dtype, np.floating) and not np.isfinite(images).all()
        what = "numbers that are not finite" if broken else f"{images.dtype} {list(images.shape)}"
        raise UserError(f"{path} holds {what}: pictures are uint8 [N, S, S, 3]")
    return images


def read_squares(files: Sequence[Path], size: int) -> np.ndarray:
    """Image files of any size as `prepare` reads them: centre crop and antialiased bicubic resize to uint8 [N, size, size, 3]."""
    squares = []
    for file in files:
        try:
            squares.append(load_square(file.read_bytes(), size))
        except (Dropped, OSError) as error:
            raise UserError(f"{file} cannot be read as an image ({error}): take it out of the reference") from error
    return np.stack(squares)
