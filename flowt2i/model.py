"""The transformer: image patches attend to each other and to the caption, and are modulated by the time.

Two blocks, chosen by `ModelConfig.block`:

- `seed`: the architecture the project began from: LayerNorm, self-attention, then cross-attention to the caption, a GELU MLP for
  the image and another for the caption (which is updated from block to block), AdaLN of its own in every block (Peebles & Xie, DiT,
  2212.09748), learned positions.
- `modern`: RMSNorm, one attention in which image queries see image and caption keys, QK-norm (2302.05442), SwiGLU (2002.05202),
  one AdaLN shared by all blocks plus a table a block (PixArt-alpha, 2310.00426, sec. 2.3), fixed 2D sin-cos positions at
  unit scale and rotary ones in the attention. The caption is read, never updated: at 64 image tokens a second stream costs more than it gives.

Shapes: B images, N = (H/p)(W/p) image tokens, T caption tokens, S of a packed batch (`ragged.py`), d width, D width of the caption features.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowt2i.config import ModelConfig
from flowt2i.negatives import SIDES, mid_grey, mirrored, seen_from, shown, side_of
from flowt2i.positions import resize_table, rotation_2d, sincos_1d, sincos_2d
from flowt2i.ragged import Packing, pack, packing_of, unpack


def attend(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Tensor:
    """Softmax attention. q [B, h, N, e], k and v [B, h, M, e], key_bias [B, 1, 1, M] (0, or very negative where masked) or None -> [B, h, N, e].

    On a CPU the products are written out: at under a few hundred tokens the fused kernel's backward is the slower one there
    (`python benchmarks/attention.py` shows by how much), and `torch.compile` fuses what lies between the products.
    """
    if q.device.type != "cpu" or k.shape[2] > 512:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=None if key_bias is None else key_bias.to(q.dtype))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if key_bias is not None:
        scores = scores + key_bias.to(scores.dtype)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def mask_bias(mask: Tensor) -> Tensor:
    """Additive bias [B, 1, 1, T] from a mask [B, T] of real tokens; finite, so that a row without any token cannot make NaN."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -1e9)[:, None, None, :]


def rotate(x: Tensor, rotation: Tensor | None) -> Tensor:
    """Turn each pair (i, i + head / 2) of x [B, h, N, head] by its angle in rotation [2, N, head / 2]; None turns nothing."""
    if rotation is None:
        return x
    cosine, sine = rotation.to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cosine - b * sine, a * sine + b * cosine], -1)


def time_features(t: Tensor, width: int = 256) -> Tensor:
    """[B, width] features of times [B] in [0, 1] (stretched to [0, 1000], the range these frequencies are made for)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device, dtype=torch.float32) / (width // 2))
    angles = 1000 * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """AdaLN: `x (1 + scale) + shift` in one pass. x [B, N, d], shift and scale [B, 1, d]."""
    return torch.addcmul(shift, x, 1 + scale)


def add_gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """`x + gate y` in one pass. x and y [B, N, d], gate [B, 1, d]."""
    return torch.addcmul(x, gate, y)


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last axis whose weight follows the input's dtype (under autocast torch's own falls off its fused path)."""

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)


class SwiGLU(nn.Module):
    """`W2 (silu(W1 x) * W3 x)` (2002.05202); W1 and W3 lie in one matrix."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * value)


def gelu_mlp(width: int, ratio: float) -> nn.Sequential:
    hidden = int(width * ratio)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))


def swiglu_hidden(width: int, ratio: float) -> int:
    """Hidden width that makes SwiGLU as costly as a two-matrix MLP of this ratio, rounded to what matrix units like."""
    return max(32, round(width * ratio * 2 / 3 / 32) * 32)


class Attention(nn.Module):
    """Image queries over image keys and, where a caption is given, caption keys in the same softmax; QK-norm on request."""

    def __init__(self, width: int, heads: int, text: bool, qk_norm: bool, bias: bool):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.text_kv = nn.Linear(width, 2 * width, bias=bias) if text else None
        self.out = nn.Linear(width, width, bias=bias)
        head = width // heads
        self.q_norm = RMSNorm(head) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head) if qk_norm else nn.Identity()
        self.text_k_norm = RMSNorm(head) if qk_norm and text else nn.Identity()

    def forward(
        self, x: Tensor, text: Tensor | None = None, bias: Tensor | None = None, rotation: Tensor | None = None, packing: Packing | None = None
    ) -> Tensor:
        """x [B, N, d], text [B, T, d] (packed [S, d]), bias [B, 1, 1, keys], rotation as in `rotate` -> [B, N, d]; keys are the caption's, then the image's."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation)
        if self.text_kv is not None and text is not None:
            kv = self.text_kv(text)
            if packing is not None:
                kv = unpack(kv, packing, batch)
            text_k, text_v = kv.view(batch, kv.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
            k, v = torch.cat([self.text_k_norm(text_k), k], 2), torch.cat([text_v, v], 2)
        y = attend(q.to(v.dtype), k.to(v.dtype), v, bias)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class CrossAttention(nn.Module):
    """Image queries [B, N, d] over caption keys and values [B, T, D]."""

    def __init__(self, width: int, text_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.out = nn.Linear(width, width), nn.Linear(text_width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, bias: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q = self.q(x).view(batch, tokens, self.heads, -1).transpose(1, 2)
        k, v = self.kv(text).view(batch, text.shape[1], 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(attend(q, k, v, bias).transpose(1, 2).reshape(batch, tokens, width))


class ModernBlock(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        d = config.width
        self.norm1, self.norm2 = RMSNorm(d, elementwise_affine=False), RMSNorm(d, elementwise_affine=False)
        self.attention = Attention(d, config.heads, text=True, qk_norm=True, bias=False)
        self.mlp = SwiGLU(d, swiglu_hidden(d, config.mlp_ratio))
        self.table = nn.Parameter(torch.zeros(6, d))  # this block's own offset to the shared modulation

    def forward(
        self, x: Tensor, text: Tensor, text_bias: Tensor, time: Tensor, rotation: Tensor | None, packing: Packing | None = None
    ) -> tuple[Tensor, Tensor]:
        """x [B, N, d], text [B, T, d] (packed [S, d]), text_bias [B, 1, 1, T + N], time [B, 6, d]: the shared modulation."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (time + self.table).to(x.dtype).unsqueeze(2).unbind(1)
        x = add_gated(x, gate1, self.attention(modulate(self.norm1(x), shift1, scale1), text, text_bias, rotation, packing))
        x = add_gated(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))
        return x, text


class SeedBlock(nn.Module):
    def __init__(self, config: ModelConfig, text_width: int, last: bool):
        super().__init__()
        d = config.width
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(d, elementwise_affine=affine) for affine in (False, True, False))
        self.attention = Attention(d, config.heads, text=False, qk_norm=False, bias=True)
        self.cross = CrossAttention(d, text_width, config.heads)
        self.mlp = gelu_mlp(d, config.mlp_ratio)
        # Nothing reads the caption after the last block: updating it there would be weights that never learn.
        self.text_mlp = None if last else nn.Sequential(nn.LayerNorm(text_width), gelu_mlp(text_width, config.mlp_ratio))
        self.adaln = nn.Linear(config.time_width, 6 * d)

    def forward(self, x: Tensor, text: Tensor, text_bias: Tensor, time: Tensor, rotation: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, N, d], text [B, T, D], text_bias [B, 1, 1, T], time [B, time_width]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln(F.silu(time)).unsqueeze(1).chunk(6, -1)
        x = add_gated(x, gate1, self.attention(modulate(self.norm1(x), shift1, scale1), rotation=rotation))
        x = x + self.cross(self.norm2(x), text, text_bias)
        x = add_gated(x, gate2, self.mlp(modulate(self.norm3(x), shift2, scale2)))
        return x, text if self.text_mlp is None else text + self.text_mlp(text)


class Neighbours(nn.Module):
    """Depthwise convolution over a caption: each word also sees the `window` words about it, by their distance.

    Which noun stands before a preposition is learned at once with it and hardly at all without (docs/experiments.md, "Word order");
    Primer (2109.08668, sec. 4) and Conformer (2005.08100) mix neighbours for the same reason. Written as shifted products:
    `torch.compile` makes one loop of them, eight times as fast on a CPU as the convolution.
    """

    def __init__(self, width: int, window: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(window, 1, width) * 0.3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, width], mask [B, T, 1] (0: padding, which nobody sees) -> [B, T, width]."""
        window, tokens = self.weight.shape[0], x.shape[1]
        padded = F.pad(x * mask.to(x.dtype), (0, 0, window // 2, window // 2))
        y = x
        for i, weight in enumerate(self.weight.to(x.dtype)):
            y = y + padded[:, i : i + tokens] * weight
        return y


class CaptionBlock(nn.Module):
    """A pre-norm transformer block over caption tokens, after a look at their neighbours."""

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.neighbours = Neighbours(width, window) if window else None
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attention = Attention(width, heads, text=False, qk_norm=True, bias=False)
        self.mlp = SwiGLU(width, swiglu_hidden(width, 4))
        nn.init.zeros_(self.attention.out.weight)
        nn.init.zeros_(self.mlp.down.weight)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B, T, width], mask [B, T] of real tokens -> [B, T, width]."""
        if self.neighbours is not None:
            x = self.neighbours(x, mask.unsqueeze(-1))
        x = x + self.attention(self.norm1(x), None, mask_bias(mask))
        return x + self.mlp(self.norm2(x))


class CaptionEncoder(nn.Module):
    """The built-in text encoder: learned token embeddings and a small transformer, trained along with the model."""

    def __init__(self, vocab_size: int, width: int, depth: int, window: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.blocks = nn.ModuleList(CaptionBlock(width, max(1, width // 64), window) for _ in range(depth))
        self.norm = RMSNorm(width)
        nn.init.normal_(self.embedding.weight, std=1.0)  # as large as the positions, so that words differ from the first step

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids [B, T] int64, mask [B, T] bool -> features [B, T, width]."""
        positions = sincos_1d(torch.arange(ids.shape[1]), self.embedding.embedding_dim).to(ids.device)
        x = self.embedding(ids) + positions
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)


class FlowTransformer(nn.Module):
    """Predicts the velocity (or the clean data, see `flow.to_velocity`) of noisy latents under a caption and a time.

    shape: (C, H, W) of the latents it is trained at; `forward` takes any other H and W that the patch divides. text_dim: D of the frozen
    encoder's features, or 0 for the built-in encoder with `vocab_size` token ids. mean, std: by which its pixels are normalised, per channel;
    `model.negatives` asks for them. The output has the latents' shape. `config` must be resolved for the shape (`ModelConfig.resolve`).
    """

    checkpoint_activations = False  # keep only what passes between blocks, and compute the inside of each again in the backward pass
    grey: Tensor  # mid-grey [1, C, 1, 1] of normalised pixels
    positions: Tensor  # of its own grid: learned, or a buffer that is not saved
    rotation: Tensor | None

    def __init__(
        self, config: ModelConfig, shape: tuple[int, int, int], text_dim: int, vocab_size: int = 0,
        mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
    ):  # fmt: skip
        super().__init__()
        self.config, self.shape, self.patch = config, shape, config.patch
        channels, height, width = shape
        d, values = config.width, channels * config.patch**2
        self.rows, self.columns = height // config.patch, width // config.patch
        self.caption_encoder = None if text_dim else CaptionEncoder(vocab_size, config.text_width, config.text_depth, config.text_window)
        text_dim = text_dim or config.text_width

        if config.bottleneck and config.bottleneck < values:
            self.embed: nn.Module = nn.Sequential(nn.Linear(values, config.bottleneck, bias=False), nn.Linear(config.bottleneck, d))
        else:
            self.embed = nn.Linear(values, d)
        if config.positions == "learned":
            self.positions = nn.Parameter(torch.randn(self.rows * self.columns, d) * 0.02)
        else:
            self.register_buffer("positions", sincos_2d(self.rows, self.columns, d), persistent=False)
        self.register_buffer("rotation", rotation_2d(self.rows, self.columns, d // config.heads) if config.positions == "rope" else None, persistent=False)
        self._tables: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor | None]] = {}  # of other grids than its own
        if config.negatives:
            if mean is None or std is None:
                raise ValueError("model.negatives needs mean and std, by which the pixels are normalised, to know where mid-grey lies")
            self.side_table = nn.Parameter(torch.zeros(SIDES, config.time_width))  # tells the network what it is shown
            self.register_buffer("grey", mid_grey(mean, std).view(1, channels, 1, 1), persistent=False)
            self.seen_from = seen_from(height, width)  # of its own size, at any other too: it has learned no other
        self.seed = config.block == "seed"
        self.time = nn.Sequential(nn.Linear(256, config.time_width), nn.SiLU(), nn.Linear(config.time_width, config.time_width))
        if self.seed:
            self.text_embed: nn.Module = nn.Identity()
            self.blocks = nn.ModuleList(SeedBlock(config, text_dim, last=i == config.depth - 1) for i in range(config.depth))
            self.final_norm: nn.Module = nn.LayerNorm(d, elementwise_affine=False)
        else:
            self.text_embed = nn.Sequential(RMSNorm(text_dim), nn.Linear(text_dim, d))
            self.pooled = nn.Linear(text_dim, config.time_width) if config.pooled_text else None
            self.shared_adaln = nn.Linear(config.time_width, 6 * d)
            self.blocks = nn.ModuleList(ModernBlock(config) for _ in range(config.depth))
            self.final_norm = RMSNorm(d, elementwise_affine=False)
        self.final_adaln = nn.Linear(config.time_width, 2 * d)
        self.unembed = nn.Linear(d, values)
        if masks := config.masks + config.pixel_masks:
            self.masks, self.colours = nn.Linear(d, masks * config.patch**2), nn.Linear(d, masks * channels)
        if config.pixel_masks:
            self.slopes = nn.Linear(d, config.pixel_masks * channels)
        self._initialise()

    def _initialise(self) -> None:
        """Every residual branch and the output start at zero: the untrained network puts out zero (mid-grey's other side where `negatives` mirror that)."""
        zero = [self.unembed, self.final_adaln, *([self.colours] if hasattr(self, "colours") else [])]
        for block in self.blocks:
            if isinstance(block, SeedBlock):
                zero += [block.adaln, block.cross.out]
        if not self.seed:
            zero.append(self.shared_adaln)
            if self.pooled is not None:
                zero.append(self.pooled)
        for layer in zero:
            nn.init.zeros_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: `patches` compiled in place (`compiling.compile_training`) would go on with the weights of the original."""
        return {name: value for name, value in super().__getstate__().items() if name != "patches"}

    def encode_captions(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Built-in encoder only: token ids [B, T], mask [B, T] -> features [B, T, D]."""
        assert self.caption_encoder is not None, "this model reads the features of a frozen encoder"
        return self.caption_encoder(ids, mask)

    def tables(self, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Positions [N, d] and rotation [2, N, head / 2] (None: no rotary positions) of a grid of patches; its own lie ready."""
        if (rows, columns) == (self.rows, self.columns):
            return self.positions, self.rotation
        if self.config.positions == "learned":
            return resize_table(self.positions, (self.rows, self.columns), (rows, columns)), None
        key = (rows, columns, device)
        if key in self._tables:
            return self._tables[key]
        with torch.inference_mode(False):  # made while sampling, used in training
            d, rope = self.config.width, self.config.positions == "rope"
            made = sincos_2d(rows, columns, d).to(device), rotation_2d(rows, columns, d // self.config.heads).to(device) if rope else None
        if not torch.compiler.is_compiling():  # a tracer's tensors must not outlive it
            self._tables[key] = made
        return made

    def patchify(self, z: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, N, C p p]."""
        b, c, height, width = z.shape
        p = self.patch
        rows, columns = height // p, width // p
        return z.view(b, c, rows, p, columns, p).permute(0, 2, 4, 1, 3, 5).reshape(b, rows * columns, c * p * p)

    def unpatchify(self, x: Tensor, height: int, width: int) -> Tensor:
        """[B, N, C p p] -> [B, C, H, W]."""
        b, c, p = x.shape[0], self.shape[0], self.patch
        return x.view(b, height // p, width // p, c, p, p).permute(0, 3, 1, 4, 2, 5).reshape(b, c, height, width)

    def patches(self, x: Tensor, noisy: Tensor) -> Tensor:
        """Tokens [B, N, d], and the noisy patches under them, -> patches [B, N, C p p]: a linear layer, and the sum of masks [p p] of one colour each.

        A flat shape on a flat ground is one mask times the difference of two colours. A linear layer has to learn its outline for every pair of colours
        anew, light on dark apart from dark on light; a product learns it once (docs/experiments.md, "Masks and colours"). The first `masks` are linear in the
        token. The `pixel_masks` behind them also look at their pixel z [C], `tanh(m + w z)` with m and w linear in the token: on which side of an outline a
        noisy pixel lies is seen best at the pixel. So the token makes a network of one hidden layer for its patch (PixNerd's, 2507.23268, is deeper).
        """
        y = self.unembed(x)
        if not hasattr(self, "masks"):
            return y
        b, n, _ = x.shape
        masks, colours = self.masks(x).view(b, n, -1, 1, self.patch**2), self.colours(x).view(b, n, -1, self.shape[0], 1)
        if self.config.pixel_masks:
            pixels = noisy.view(b, n, 1, self.shape[0], -1).to(masks.dtype)
            looks = (self.slopes(x).view(b, n, -1, self.shape[0], 1) * pixels).sum(3, keepdim=True)
            linear = masks[:, :, : self.config.masks]
            masks = torch.cat([linear, torch.tanh(masks[:, :, self.config.masks :] + looks)], 2)
        return y + (masks * colours).sum(2).reshape(b, n, -1)

    def forward(self, z: Tensor, t: Tensor, text: Tensor, mask: Tensor, room: int = 0) -> Tensor:
        """z [B, C, H, W], t [B] in [0, 1], text [B, T, D], mask [B, T] (True: a real token) -> [B, C, H, W].

        room: S, at least as many tokens as are real in the whole batch (fewer is an index error): the modern block then spends no products on most of the
        padding (`ragged.py`). 0: captions stay padded.
        """
        height, width = z.shape[2:]
        positions, rotation = self.tables(height // self.patch, width // self.patch, z.device)
        time = self.time(time_features(t))
        if self.config.negatives:
            side = side_of(z, t, self.grey, self.seen_from)
            z = shown(z, t, self.grey, side)
            time = time + F.embedding(side, self.side_table).to(time.dtype)
        patches = self.patchify(z)
        x = self.embed(patches)
        x = x + positions.to(x.dtype)
        bias = mask_bias(mask)
        if self.seed:
            modulation = time
        else:
            if self.pooled is not None:
                weights = mask.to(text.dtype).unsqueeze(-1)
                time = time + self.pooled((text * weights).sum(1) / weights.sum(1).clamp_min(1))
            modulation = self.shared_adaln(F.silu(time)).view(z.shape[0], 6, -1)
            bias = F.pad(bias, (0, x.shape[1]))  # image keys are never masked
        packed = packing_of(mask, room) if room and not self.seed else None
        text = self.text_embed(text if packed is None else pack(text, packed))
        again = self.checkpoint_activations and torch.is_grad_enabled()
        for block in self.blocks:
            inputs = (x, text, bias, modulation, rotation, *([] if packed is None else [packed]))
            x, text = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False) if again else block(*inputs)
        shift, scale = self.final_adaln(F.silu(time)).unsqueeze(1).chunk(2, -1)
        out = self.unpatchify(self.patches(modulate(self.final_norm(x), shift, scale), patches), height, width)
        return mirrored(out, self.grey, side) if self.config.negatives else out


def count_parameters(model: FlowTransformer) -> dict[str, int]:
    """Trainable parameters by part, and their sum under "total"."""
    parts: dict[str, int] = {}
    names = {
        "attention": "self-attention", "cross": "cross-attention", "mlp": "image MLP", "text_mlp": "text MLP", "adaln": "AdaLN", "table": "AdaLN",
        "shared_adaln": "AdaLN", "final_adaln": "AdaLN", "time": "time embedding", "side_table": "time embedding", "pooled": "time embedding",
        "caption_encoder": "caption encoder",
        "embed": "patch embedding", "positions": "patch embedding", "unembed": "output", "masks": "output", "colours": "output", "slopes": "output",
        "text_embed": "text embedding",
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        words = name.split(".")
        word = words[2] if words[0] == "blocks" else words[0]
        part = "attention over the caption" if "text_kv" in name else names.get(word, "norms")
        parts[part] = parts.get(part, 0) + parameter.numel()
    return parts | {"total": sum(parts.values())}
