"""A diffusers pipeline of our models. `flowt2i export --format diffusers` writes it as `pipeline.py` into the folder; it runs without flowt2i:

from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("DIR or owner/name", custom_pipeline="DIR or owner/name", trust_remote_code=True)
pipeline("a small red circle").images[0]
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flowt2i.guidance import by_rule
from flowt2i.text import token_ids


class FlowT2IPipeline(DiffusionPipeline):
    """Caption to picture by flow matching.

    text_encoder: None where the transformer has its own, trained along. vae: None where the flow runs on pixels. max_tokens: longest
    caption read; caption_tokens: captions are padded to this many (a picture must not depend on its neighbours). steps, guidance, guidance_interval,
    width, height: defaults. guidance_rule: "cfg", "zero-star" or "mean-kept".
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"  # type: ignore[assignment]
    _optional_components = ["text_encoder", "vae"]  # noqa: RUF012 (the name and form diffusers reads)
    transformer: Any  # set by register_modules
    scheduler: Any
    tokenizer: Any
    text_encoder: Any
    vae: Any

    def __init__(
        self,
        transformer: ModelMixin,
        scheduler: FlowMatchEulerDiscreteScheduler,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel | None = None,
        vae: AutoencoderKL | None = None,
        max_tokens: int = 128,
        caption_tokens: int = 128,
        steps: int = 50,
        guidance: float = 3.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rule: str = "cfg",
        width: int | None = None,
        height: int | None = None,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, tokenizer=tokenizer, text_encoder=text_encoder, vae=vae)
        self.register_to_config(max_tokens=max_tokens, caption_tokens=caption_tokens, steps=steps, guidance=guidance, guidance_interval=guidance_interval)
        self.register_to_config(guidance_rule=guidance_rule, width=width, height=height)

    def encode_prompt(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [B, T, D] and mask [B, T] of captions."""
        backend = self.tokenizer
        if self.text_encoder is None:
            backend = self.tokenizer.backend_tokenizer
            backend.encode_special_tokens = True  # "<end>" written in a caption is text, not the end
            if hook := getattr(self.transformer, "_hf_hook", None):  # of enable_model_cpu_offload, which waits for a call of `forward`
                hook.pre_forward(self.transformer)
        rows, _ = token_ids(backend, prompts, self.config["max_tokens"])
        width = max(self.config["caption_tokens"], *(len(row) for row in rows))
        pad = self.tokenizer.pad_token_id or 0
        device = self._execution_device
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows], device=device)
        if self.text_encoder is None:
            return self.transformer.encode_captions(ids, mask), mask
        features = self.text_encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return features.float() * mask.unsqueeze(-1), mask

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents [B, C, H, W] -> pictures [B, 3, height, width] in [0, 1]."""
        mean, std = (
            torch.tensor(v, device=latents.device).view(1, -1, 1, 1) for v in (self.transformer.config.latent_mean, self.transformer.config.latent_std)
        )
        raw = latents.float() * std + mean
        pixels = raw if self.vae is None else self.vae.decode(raw.to(self.vae.dtype)).sample.float()
        return (pixels.clamp(-1, 1) + 1) / 2

    def latent_shape(self, width: int | None, height: int | None) -> tuple[int, int, int]:
        """(C, H, W) of a picture of this size in pixels, None: as the transformer was trained. ValueError, naming the nearest, where it cannot be made."""
        channels, rows, columns = self.transformer.config.shape
        factor = 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)
        wide, high = width or columns * factor, height or rows * factor
        unit = factor * self.transformer.config.model["patch"]
        if wide % unit or high % unit or min(wide, high) < 1:
            near = [max(1, round(side / unit)) * unit for side in (wide, high)]
            raise ValueError(f"width {wide} and height {high} are not both positive multiples of {unit}: take {near[0]} and {near[1]}")
        return channels, high // factor, wide // factor

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw pictures.

        height, width: of the pictures, in pixels (None: the model's own); any that VAE and patches make, best those it was trained at.
        negative_prompt: what guidance leads away from, one for all prompts or one for each (None: the empty caption).
        generator: one, or one a picture (seed s as in flowt2i: `torch.Generator().manual_seed(s)`); latents: the noise [B, C, H, W] itself.
        guidance_scale g: `v = v_negative + g (v - v_negative)` (2207.12598, eq. 6), or as `guidance_rule` has it; 1: none. It acts at times
        from <= t < until of guidance_interval (2404.07724; None: the model's own); elsewhere the captions go through the network alone, in half the work.
        output_type: "pil", "np" ([B, H, W, 3] in [0, 1]), "pt" ([B, 3, H, W]) or "latent" (normalised). The scheduler's shift s takes sigma to
        `s sigma / (1 + (s - 1) sigma)`, which is flowt2i's `t / (t + s (1 - t))` with t = 1 - sigma: the same s.
        """
        steps = self.config["steps"] if num_inference_steps is None else num_inference_steps
        guidance = self.config["guidance"] if guidance_scale is None else guidance_scale
        first, last = guidance_interval or self.config["guidance_interval"]
        if steps < 1:
            raise ValueError(f"num_inference_steps {steps} must be at least 1")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type {output_type!r}: choose pil, np, pt or latent")
        asked = [prompt] if isinstance(prompt, str) else prompt
        unlike = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""] * len(asked)
        if len(unlike) != len(asked):
            raise ValueError(f"{len(unlike)} negative prompts for {len(asked)} prompts: give one for all, or one for each")
        prompts, unlike = ([p for p in texts for _ in range(num_images_per_prompt)] for texts in (asked, unlike))
        if not prompts:
            raise ValueError("no prompt: give at least one")
        shape = (len(prompts), *self.latent_shape(width or self.config["width"], height or self.config["height"]))
        if latents is not None and latents.shape != shape:
            raise ValueError(f"latents of shape {tuple(latents.shape)}: {len(prompts)} pictures of this model begin at {shape}")
        guided, device = guidance != 1, self._execution_device
        text, mask = self.encode_prompt([*prompts, *unlike] if guided else prompts)
        z = latents if latents is not None else randn_tensor(shape, generator, device, torch.float32)
        z = z.to(device, torch.float32)
        self.scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), device=device)
        times = [round(1 - sigma, 6) for sigma in self.scheduler.sigmas.tolist()]  # as they were meant: 0.7 in fp32 lies below 0.7
        for i, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            now = guided and first <= times[i] < last
            both = torch.cat([z, z]) if now else z
            velocity = self.transformer(both, timestep.expand(len(both)), text[: len(both)], mask[: len(both)], return_dict=False)[0]
            if now:
                wanted, unwanted = velocity.chunk(2)
                velocity = by_rule(self.config["guidance_rule"], wanted, unwanted, guidance)
            z = self.scheduler.step(velocity, timestep, z, return_dict=False)[0]
            if callback_on_step_end is not None:
                z = callback_on_step_end(self, i, timestep, {"latents": z}).get("latents", z)
        images: Any = z if output_type == "latent" else self.decode(z)
        if output_type in ("pil", "np"):
            images = images.permute(0, 2, 3, 1).cpu().numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
