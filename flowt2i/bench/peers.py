"""Our training step beside those of transformers that others train from scratch, at one size, in one process, by turns.

Size: 12 blocks of width 768, 12 heads, 64 image tokens of 8x8x4 latents, 512-wide caption features. Every contender gets the same noise, times and
latents, runs under bf16 autocast (in fp32 where there are no units for bf16) and is updated by the same fused AdamW over all its parameters. The peers are
trained the plain way: captions padded to 128 tokens, no mask (which would only slow them down). Ours is the `stability` preset with what its training does:
captions padded to the longest of the batch, masked, their keys and values made of the real tokens (`ragged.py`). Its MLP is half as wide as the peers', as
that of the model the project began from; the preset `full_scale`, whose MLP is as wide as theirs, is timed as well. Eager is set against eager, compiled
(peers: `torch.compile` of the whole model; ours: of blocks and loss, as in training) against compiled.

The order of the turns is reversed each round, so that a machine that drifts does so for all alike; the rate is that of the median step.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from flowt2i import precision
from flowt2i.bench.captions import EMOJI_T5, LONGEST
from flowt2i.bench.step import FEATURES, BareStep, describe
from flowt2i.bench.timing import clock
from flowt2i.config import resolve
from flowt2i.data.dataset import ImageTextDataset
from flowt2i.errors import UserError, nearest
from flowt2i.memory import is_out_of_memory
from flowt2i.training.compiling import compile_training, has_compiler
from flowt2i.training.distributed import best_device

SHAPE = (4, 8, 8)
WARM = 2  # steps of each that are not counted; compiled, the first one compiles


class Size(NamedTuple):
    width: int = 768
    depth: int = 12
    heads: int = 12


SEED_SIZE = Size()
OWN = "full_scale"  # timed among the peers: our preset with an MLP as wide as theirs
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of data [B, 4, 8, 8], noise, times [B]
Call = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]  # of a peer: z [B, 4, 8, 8], times [B], captions [B, T, D] -> [B, 4, 8, 8]


# ---- the peers, from diffusers ------------------------------------------------------------------------------------------


def pixart(library: Any, size: Size) -> tuple[nn.Module, Call]:
    """PixArt-alpha's transformer (2310.00426): cross-attention to the caption, one AdaLN shared by all blocks."""
    model = library.PixArtTransformer2DModel(
        num_attention_heads=size.heads, attention_head_dim=size.width // size.heads, num_layers=size.depth, cross_attention_dim=size.width,
        caption_channels=FEATURES, in_channels=4, out_channels=4, sample_size=8, patch_size=1, use_additional_conditions=False,
    )  # fmt: skip
    more = {"resolution": None, "aspect_ratio": None}
    return model, lambda m, z, t, text: m(z, encoder_hidden_states=text, timestep=1000 * t, added_cond_kwargs=more, return_dict=False)[0]


def prx(library: Any, size: Size) -> tuple[nn.Module, Call]:
    """Photoroom's PRX: the caption gives keys and values and is never updated."""
    head = size.width // size.heads
    model = library.PRXTransformer2DModel(
        patch_size=1, in_channels=4, context_in_dim=FEATURES, hidden_size=size.width, num_heads=size.heads, depth=size.depth, axes_dim=[head // 2, head // 2],
    )  # fmt: skip
    return model, lambda m, z, t, text: m(z, timestep=t, encoder_hidden_states=text, return_dict=False)[0]


def sd3(library: Any, size: Size) -> tuple[nn.Module, Call]:
    """Stable Diffusion 3's transformer (2403.03206): image and caption as two streams with weights of their own."""
    model = library.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=size.depth, attention_head_dim=size.width // size.heads,
        num_attention_heads=size.heads, joint_attention_dim=FEATURES, caption_projection_dim=size.width, pooled_projection_dim=FEATURES,
        pos_embed_max_size=8, qk_norm="rms_norm",
    )  # fmt: skip
    return model, lambda m, z, t, text: m(z, encoder_hidden_states=text, pooled_projections=text.mean(1), timestep=1000 * t, return_dict=False)[0]


PEERS: dict[str, Callable[[Any, Size], tuple[nn.Module, Call]]] = {"pixart": pixart, "prx": prx, "sd3": sd3}


def chosen(words: str) -> list[str]:
    """The peers that a user names: "all", or some with commas between. UserError for one that is not known."""
    known = [OWN, *PEERS]
    names = known if words == "all" else words.split(",")
    for name in names:
        if name not in known:
            raise UserError(f"no peer {name!r}{nearest(name, known)}")
    return names


# ---- one training step --------------------------------------------------------------------------------------------------


class Contender:
    """A model that is trained: its loss, its optimizer."""

    def __init__(self, name: str, model: nn.Module, loss: Loss, compile: Callable[[], Any], text_tokens: int):
        self.name, self.model, self.loss, self.compile, self.text_tokens = name, model, loss, compile, text_tokens
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        self.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.seconds: list[float] = []

    def step(self, batch: int, device: torch.device) -> None:
        data, noise, t = torch.randn(batch, *SHAPE, device=device), torch.randn(batch, *SHAPE, device=device), torch.rand(batch, device=device)
        self.loss(data, noise, t).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed_step(self, batch: int, device: torch.device) -> float:
        start = clock(device)
        self.step(batch, device)
        return clock(device) - start


def peer(name: str, library: Any, size: Size, batch: int, device: torch.device) -> Contender:
    torch.manual_seed(0)
    model, call = PEERS[name](library, size)
    model.to(device).train()
    text = torch.randn(batch, LONGEST, FEATURES, device=device)
    computes = precision.resolved("auto", device)

    def loss(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        z = noise + t[:, None, None, None] * (data - noise)
        with precision.autocast(computes, device):
            output = call(model, z, t, text)
        return F.mse_loss(output.float(), data - noise)

    return Contender(name, model, loss, model.compile, LONGEST)


def ours(size: Size, batch: int, device: torch.device, lengths: dict[int, int] | np.ndarray, preset: str = "stability") -> Contender:
    config = resolve(preset, ["--model.width", str(size.width), "--model.depth", str(size.depth), "--model.heads", str(size.heads), "--train.ema", "0"])
    longest = int(max(lengths))
    step = BareStep(config, describe(True, longest), lengths, device, compiled=has_compiler())
    text, mask, room = step.captions(batch)
    loss: Loss = lambda data, noise, t: step.objective(data, noise, t, text, mask, room).losses.mean()
    return Contender("ours" if preset == "stability" else preset, step.model, loss, lambda: compile_training(step.objective), text.shape[1])


# ---- the comparison -----------------------------------------------------------------------------------------------------


def compare(
    names: Sequence[str],
    batch: int = 0,
    rounds: int = 5,
    size: Size = SEED_SIZE,
    lengths: dict[int, int] | np.ndarray = EMOJI_T5,
    modes: Sequence[str] = ("eager", "compiled"),
) -> list[dict[str, Any]]:
    """Time ours and the named peers. One row a contender and mode: `name`, `mode`, `images_per_s`, `parameters`, `text_tokens`, `batch`, `device`.

    What cannot run is said on stderr and left out: diffusers or a class of it that is not installed, a model that does not fit, no compiler.
    """
    library = _library()
    if library is None:
        return []
    device = best_device()
    batch = batch or (32 if device.type == "cpu" else 96)
    contenders = [ours(size, batch, device, lengths)]
    for name in names:
        try:
            contenders.append(ours(size, batch, device, lengths, OWN) if name == OWN else peer(name, library, size, batch, device))
        except (AttributeError, ImportError, TypeError) as error:  # an older or newer diffusers
            _say(f"{name} is left out: diffusers {library.__version__} has it not, or in another form ({str(error).splitlines()[0]})")
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            _say(f"{name} is left out: it does not fit into memory beside the others (fewer at a time: --peers {name})")
    if "compiled" in modes and not has_compiler():
        _say("compiled against compiled is left out: torch.compile needs a C++ compiler and Python's headers")
        modes = [mode for mode in modes if mode != "compiled"]
    rows = []
    with tqdm(total=len(modes) * (WARM + rounds) * len(contenders), unit="step", file=sys.stderr, leave=False) as bar:
        for mode in modes:
            if mode == "compiled":
                for contender in contenders:
                    contender.compile()
            for contender in _by_turns(contenders, batch, rounds, device, mode, bar):
                rate = batch / median(contender.seconds)
                rows.append({"name": contender.name, "mode": mode, "images_per_s": round(rate, 3), "parameters": contender.parameters,
                             "text_tokens": contender.text_tokens, "batch": batch, "device": str(device)})  # fmt: skip
    return rows


def _by_turns(contenders: list[Contender], batch: int, rounds: int, device: torch.device, mode: str, bar: Any) -> list[Contender]:
    """Steps of each by turns; gives those that could be timed."""
    alive = list(contenders)
    for contender in alive:
        contender.seconds = []
    for number in range(WARM + rounds):
        for contender in list(alive if number % 2 == 0 else reversed(alive)):
            bar.set_description(f"{contender.name}, {mode}")
            try:
                seconds = contender.timed_step(batch, device)
            except (RuntimeError, MemoryError) as error:  # too little memory, or what torch.compile cannot compile
                if contender.name == "ours" or (mode == "eager" and not is_out_of_memory(error)):
                    raise
                _say(f"{contender.name} is left out, {mode}: {str(error).splitlines()[0][:160]}")
                contender.optimizer.zero_grad()
                alive.remove(contender)
                continue
            if number >= WARM:
                contender.seconds.append(seconds)
            bar.update()
    return alive


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """{"pixart, eager": our rate over theirs, …}."""
    own = {row["mode"]: row["images_per_s"] for row in rows if row["name"] == "ours"}
    return {f"{row['name']}, {row['mode']}": round(own[row["mode"]] / row["images_per_s"], 3) for row in rows if row["name"] != "ours"}


def table(rows: list[dict[str, Any]]) -> str:
    """Rates and ratios in lines, and per mode the ratio to the best of the peers."""
    lines = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        here = [row for row in rows if row["mode"] == mode]
        own = next(row["images_per_s"] for row in here if row["name"] == "ours")
        for row in here:
            ratio = "" if row["name"] == "ours" else f", ours is {own / row['images_per_s']:.2f} times as fast"
            lines.append(
                f"{mode:9s} {row['name']:10s} {row['images_per_s']:9.3f} images/s  ({row['parameters'] / 1e6:.0f}M, captions of {row['text_tokens']}){ratio}"
            )
        best = max((row["images_per_s"] for row in here if row["name"] in PEERS), default=0.0)
        lines += [f"{mode:9s} against the best of them: {own / best:.2f}"] if best else []
    return "\n".join(lines)


def lengths_of(data: Path | None) -> dict[int, int] | np.ndarray:
    """Caption lengths to compare at: those of a prepared dataset, else those of the emoji captions."""
    return EMOJI_T5 if data is None else ImageTextDataset(data).token_lengths()


def _library() -> Any:
    try:
        import diffusers
    except ImportError:
        _say("the peers need diffusers, which is not installed: pip install -c constraints.txt diffusers")
        return None
    return diffusers


def _say(words: str) -> None:
    tqdm.write(f"peers: {words}", file=sys.stderr)
