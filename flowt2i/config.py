"""Typed configuration and the table of presets.

Every field can be set from the command line as `--section.field value` (`--optim.lr 3e-4`) and is refused by name where it does
not exist or has the wrong type. What is fixed by the data (codec, text encoder, latent statistics) is not configured here:
`prepare` decides it and writes it into the data set's description.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import PydanticCustomError

from flowt2i import shapes
from flowt2i.errors import UserError, nearest
from flowt2i.schedules import check_schedule
from flowt2i.styles import BY_STYLES


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)


SolverName = Literal["euler", "heun", "midpoint", "rk4", "ab2", "ab4", "dopri5", "sde"]


class DataConfig(_Section):
    batch_size: int = Field(576, ge=1, description="effective batch: images an optimizer step, over all GPUs and accumulation steps")
    workers: int = Field(
        0,
        ge=0,
        description="loader processes a rank; 0 reads in the training process, which is enough up to tens of thousands of images a second",
    )
    subset: int = Field(0, ge=0, description="train on the first N training samples only (0: all); `overfit` uses it")
    flip: bool = Field(False, description="mirror images at random; wrong for captions that say left or right. Pixel codec only")
    codec: str = Field("any", description="refuse data prepared with another codec than this id; any: obey the data")
    text: str = Field("any", description="refuse data prepared with another text encoder than this id; any: obey the data")


class ModelConfig(_Section):
    block: Literal["modern", "seed"] = Field("modern", description="transformer block: see flowt2i/model.py")
    width: int = Field(768, ge=32, description="width of the image stream")
    depth: int = Field(12, ge=1, description="number of blocks")
    heads: int = Field(12, ge=1, description="attention heads; divides the width")
    mlp_ratio: float = Field(2.0, gt=0, description="MLP width over model width (for SwiGLU: at equal cost); 4 takes 1.4 times the time of 2 at width 768")
    time_width: int = Field(512, ge=16, description="width of the time embedding that feeds AdaLN")
    text_width: int = Field(512, ge=32, description="built-in caption encoder: its width")
    text_depth: int = Field(4, ge=0, description="built-in caption encoder: its number of blocks")
    text_window: int = Field(7, ge=0, description="built-in caption encoder: words that each word sees by their distance before each attention, odd; 0: none")
    pooled_text: bool = Field(True, description="modern block: add the mean caption feature to the time embedding")
    patch: int = Field(0, ge=0, description="side of a patch; 0: 8 for pixels, 1 for latents, so that 64x64 images make 64 tokens")
    bottleneck: int = Field(128, ge=0, description="pixels: width of a linear bottleneck in the patch embedding; 0: none")
    masks: int = Field(0, ge=0, le=64, description="pixels: a patch is also the sum of this many masks of one colour each, a help for flat pictures; 0: none")
    pixel_masks: int = Field(
        0,
        ge=0,
        le=64,
        description="pixels: so many masks more, whose values also depend on the noisy pixel under them (a small network for each patch); 0: none",
    )
    negatives: bool = Field(
        False,
        description="pixels: a picture darker than mid-grey is drawn as its negative, so that light on dark and dark on light are learned as one "
        "(nearest the noise the mean is taken out instead)",
    )
    positions: Literal["rope", "sincos", "learned"] = Field(
        "rope", description="image positions: fixed 2D sin-cos, with rotary ones in the attention besides (rope), or learned from scratch"
    )
    prediction: Literal["auto", "v", "x"] = Field("auto", description="what the network puts out: velocity or clean data; auto: v for latents, x for pixels")

    @property
    def target(self) -> Literal["v", "x"]:
        """The prediction of a resolved configuration."""
        assert self.prediction != "auto", "resolve the configuration first"
        return self.prediction

    def resolve(self, codec_kind: str, shape: tuple[int, int, int]) -> "ModelConfig":
        """Fill in what depends on the codec; UserError where sizes do not divide."""
        pixels = codec_kind == "pixels"
        patch = self.patch or (8 if pixels else 1)
        if shape[1] % patch or shape[2] % patch:
            divisor = max(d for d in range(1, patch + 1) if shape[1] % d == shape[2] % d == 0)
            choose = f"choose {divisor}, or " if 2 * divisor >= patch else ""  # a smaller one would cost many times as much
            near = lambda side: shapes.nearest_multiple(side, patch)
            whole, what = shapes.name((near(shape[2]), near(shape[1]))), "pictures" if pixels else "latents"
            raise UserError(f"model.patch {patch} does not divide the {shape[2]}x{shape[1]} {what}: {choose}prepare data that give {whole} {what}")
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise UserError(f"model.heads {self.heads} must divide model.width {self.width} into heads of even width")
        if self.width % 4 or (self.positions == "rope" and (self.width // self.heads) % 4):
            raise UserError(f"model.width {self.width} and the width of its {self.heads} heads must be multiples of 4")
        if self.text_width % max(1, self.text_width // 64) or self.text_width % 2:
            raise UserError(f"model.text_width {self.text_width} must be a multiple of 64, or an even number under 128")
        if self.text_window and self.text_window % 2 == 0:
            raise UserError(f"model.text_window {self.text_window} must be odd (as many words before as after), or 0")
        prediction = self.prediction if self.prediction != "auto" else ("x" if pixels else "v")
        only_pixels = {} if pixels else {"bottleneck": 0, "masks": 0, "pixel_masks": 0, "negatives": False}
        return self.model_copy(update={"patch": patch, "prediction": prediction, **only_pixels})


class FlowConfig(_Section):
    times: Literal["logit_normal", "uniform"] = Field("logit_normal", description="distribution of training times")
    logit_mean: float = Field(0.0, description="logit-normal times: mean (above 0: nearer the data)")
    logit_std: float = Field(1.0, gt=0, description="logit-normal times: standard deviation")
    uniform_share: float = Field(0.1, ge=0, le=1, description="logit-normal times: share of the batch whose times stay uniform")
    time_shift: float = Field(
        1.0, gt=0, description="training times: above 1 nearer the noise, as larger pictures want them; `train --init` sets it where a model grows"
    )
    caption_dropout: float = Field(0.1, ge=0, lt=1, description="share of captions replaced by the empty one, for guidance")
    part_dropout: float = Field(
        0.0, ge=0, lt=1, description="share of captions with commas of which only one side of a comma is kept, so that a name or a style alone is known too"
    )
    floor: float = Field(0.05, gt=0, lt=1, description="x-prediction: the loss divides by 1 - t, kept above this")
    edges: float = Field(
        0.0,
        ge=0,
        description="x-prediction: weight of the differences between neighbouring places of the error beside its squares: outlines are learned sooner",
    )
    perceptual: float = Field(
        0.0, ge=0, description="weight of a perceptual loss of the predicted picture (EfficientNet-lite1) beside the flow's; 0: none. Pixel codec only"
    )
    perceptual_size: int = Field(
        128,
        ge=0,
        description="pictures with a shorter side are enlarged to this for perceptual loss and match.weight: their network knows larger ones; 0: as they are",
    )
    perceptual_from: float = Field(0.3, ge=0, lt=1, description="the perceptual loss counts from this time on: nearer the noise no picture is decided yet")


class MatchConfig(_Section):
    weight: float = Field(
        0.0, ge=0, description="post-training (meant for --init): weight of how far what the model draws is from the training pictures as a whole, "
        "in the features of EfficientNet-lite1 (flowt2i/training/matching.py); 0: none. Pixel codec only",
    )  # fmt: skip
    images: int = Field(64, ge=8, description="pictures drawn for it each step, over all ranks")
    micro_batch: int = Field(8, ge=1, description="most of them that a rank draws at once: they take `live` times the memory of as many in training")
    live: int = Field(4, ge=1, description="the last steps of a drawing that its gradient goes through: each costs a training pass of memory and time")
    population: int = Field(2_048, ge=64, description="drawn pictures that are remembered for it; a run begins by drawing so many")
    expected: float = Field(0.5, ge=0, description="weight of the features that a caption lets expect beside that; 0: only the whole counts")
    by_style: bool = Field(True, description='where all captions are "SUBJECT, STYLE" of a few styles, the pictures of each style are compared by themselves')
    composed: float = Field(0.0, ge=0, le=1, description='share of pictures drawn of captions without a picture, composed from those that are "SUBJECT, STYLE"')


class OptimConfig(_Section):
    name: Literal["adamw", "muon"] = Field("adamw", description="muon: Muon on the matrices of the blocks, AdamW on the rest")
    lr: float = Field(5e-4, gt=0, description="maximum learning rate of AdamW")
    muon_lr: float = Field(3e-3, gt=0, description="maximum learning rate of Muon (scaled to AdamW's RMS)")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW: decay of the first moment")
    beta2: float = Field(0.99, ge=0, lt=1, description="AdamW: decay of the second moment")
    weight_decay: float = Field(0.01, ge=0, description="decoupled weight decay of matrices")
    clip: float = Field(1.0, ge=0, description="gradient norm is clipped to this; 0: never")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="after the warm-up; linear holds the maximum, then falls over the last `decay` share"
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="share of steps that warm up, linearly")
    warmup_from: float = Field(0.1, ge=0, le=1, description="learning rate at step 0, as a share of the maximum")
    final: float = Field(0.1, ge=0, le=1, description="learning rate at the end, as a share of the maximum")
    decay: float = Field(0.4, gt=0, le=1, description="schedule linear: the last share of steps over which it falls")
    schedule_steps: int = Field(
        0, ge=0, description="steps that warm-up and decay are laid out for; 0: train.steps. Given from the start, it makes a later extension exact"
    )


def seconds(duration: str) -> float:
    """Seconds of a duration such as 3h, 90m, 45s or 1h30m; infinite where it is empty."""
    if not duration:
        return float("inf")
    units = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", duration)
    total = sum(float(number or 0) * unit for number, unit in zip(units.groups(), (3600, 60, 1))) if units else 0.0
    if not total:
        raise PydanticCustomError("duration", "give a time such as 3h, 90m, 45s or 1h30m")
    return total


class TrainConfig(_Section):
    steps: int = Field(30_000, ge=0, description="optimizer steps; 0: until stopped")
    minutes: float = Field(0.0, ge=0, description="with a value: train this long; `steps` follows from the speed. --train.steps switches it off")
    micro_batch: int = Field(96, ge=0, description="most images a forward pass and rank (0: its whole share); accumulation follows from it")
    stop_after: str = Field("", description="wall-clock budget of this process, such as 3h, 90m or 45s: then save and stop with status 3; empty: none")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="several ranks: each holds the whole model (ddp), or a share of every tensor, for models past one card's memory (fsdp)"
    )
    seed: int = Field(0, ge=0, description="of data order, noise, times, dropout and initial weights")
    lora: int = Field(
        0, ge=0, description="with --init: train low-rank adapters of this rank only (peft), and leave the model's weights as they are; 0: all weights"
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="of the products, weights are always fp32; auto: bf16 where processor or GPU have units for it, else fp32"
    )
    checkpoint_activations: bool = Field(
        False, description="keep only what passes between blocks and compute the inside of each again in the backward pass: less memory, a third more work"
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto", description="torch.compile of blocks, output and loss; auto: where a compiler is found and the run is long enough to pay"
    )
    ema: float = Field(0.9999, ge=0, lt=1, description="decay of the averaged weights, warmed up as (1 + n) / (10 + n); 0: none")
    timeout_s: float = Field(600, gt=0, description="several ranks: seconds after which a rank that hears nothing of the others gives up")
    dry_run: bool = Field(
        True, description="a new run: a real step, a checkpoint and a picture before step 0 (a resume: a tiny file and a picture), and is there room"
    )
    log_every: int = Field(10, ge=1, description="steps between lines of log.jsonl")
    eval_every: int = Field(1_000, ge=0, description="steps between validation loss and sample grid; 0: at the end only")
    eval_share: float = Field(
        0.05, gt=0, le=1, description="most of the run's time that evaluations may take (a minute is free); one that would take more is put off; 1: none is"
    )
    eval_images: int = Field(512, ge=1, description="held-out images of the validation loss, at most")
    score_prompts: int = Field(64, ge=0, description="scenes data: prompts of the prompt-following score at each evaluation; 0: none")
    score_images: int = Field(
        64, ge=0, description="other data: pictures of the kernel distance (EfficientNet-lite0, where it is installed) at each evaluation; 0: none"
    )
    checkpoint_every: int = Field(1_000, ge=1, description="steps between checkpoints")
    keep_recent: int = Field(3, ge=1, description="newest checkpoints kept")
    keep_every: int = Field(10_000, ge=0, description="checkpoints at multiples of this are kept for good; 0: none")

    @field_validator("stop_after")
    @classmethod
    def _is_duration(cls, text: str) -> str:
        seconds(text)
        return text


class SampleConfig(_Section):
    steps: int = Field(50, ge=1, le=1000, description="solver steps")
    solver: SolverName = Field("euler", description="how the ODE is solved; dopri5: adaptive; sde: stochastic (docs/sampling.md)")
    schedule: str = Field("uniform", description="solver times: uniform, a searched grid by name, or the times themselves, such as 0,0.02,0.1,0.4,1")
    shift: float = Field(1.0, ge=0.01, le=100, description="solver times: above 1 steps are shorter next to the noise, where layout is decided")
    tolerance: float = Field(1e-3, ge=1e-8, le=1, description="solver dopri5: relative and absolute tolerance of a step")
    guidance: float = Field(3.0, ge=0, le=100, description="guidance scale; 1: none")
    guidance_rule: Literal["cfg", "zero-star", "mean-kept"] = Field(
        "cfg", description="plain classifier-free guidance, CFG-Zero*'s optimised scale, or plain but for the mean colour, which guidance leaves as it is"
    )
    guidance_rescale: float = Field(0.0, ge=0, le=1, description="share of the contrast added by guidance that is taken back")
    guidance_from: float = Field(0.0, ge=0, le=1, description="guidance from this time on (0: noise, 1: data)")
    guidance_until: float = Field(1.0, ge=0, le=1, description="guidance before this time only")
    analogy: float = Field(
        0.0, ge=0, le=1, description='of captions "SUBJECT, STYLE": how far a drawing begins by what is known of the subject in its other styles; '
        "0: not at all",
    )  # fmt: skip
    analogy_until: float = Field(0.1, ge=0, le=1, description="the beginning: before this time (0: noise, 1: data)")
    style_contrast: float = Field(
        0.0,
        ge=0,
        le=10,
        description='of captions "SUBJECT, STYLE": how much more a drawing has of what sets its style apart from the others; 0: as it is',
    )
    style_contrast_until: float = Field(0.3, ge=0, le=1, description="and that before this time (0: noise, 1: data)")
    styles: list[str] = Field([], description="the styles, as JSON: the last part of each caption, behind its last comma")
    zero_init: float = Field(0.0, ge=0, le=0.99, description="drawing begins at this time, with the noise as it is (CFG-Zero*: 0.04)")
    images: int = Field(16, ge=1, description="images in a preview grid")
    prompts: list[str] = Field([], description="prompts of the preview grid, as JSON; empty: captions from the held-out split")

    @field_validator("styles")
    @classmethod
    def _are_different(cls, styles: list[str]) -> list[str]:
        if len(set(styles)) < len(styles) or not all(style.strip() and ", " not in style for style in styles):
            raise PydanticCustomError("styles", "give different texts without a comma, each the last part of some captions")
        return styles

    @field_validator("schedule")
    @classmethod
    def _is_schedule(cls, name: str) -> str:
        try:
            check_schedule(name)
        except UserError as error:
            raise PydanticCustomError("schedule", "{told}", {"told": str(error)}) from error
        return name


class TrackConfig(_Section):
    use_wandb: bool = Field(False, description="log to Weights & Biases")
    wandb_project: str = Field("flowt2i", description="its project")
    wandb_mode: Literal["online", "offline"] = Field("online", description="offline writes a run folder to sync later")
    tensorboard: bool = Field(False, description="write TensorBoard events into RUN/tensorboard")


class Origin(_Section):
    """The model that a run began from (`train --init`): written down, never set by hand."""

    model: str  # as it was named
    weights: Literal["ema", "raw"]
    step: int | None  # of its own training; None where it does not say
    image_size: int
    patch: int
    latent_mean: tuple[float, ...]  # its normalisation, which stays in force whatever the new data measure
    latent_std: tuple[float, ...]

    @property
    def told(self) -> str:
        """ "runs/emoji (EMA weights, step 5,000, 64x64 pixels)"."""
        facts = ["EMA weights" if self.weights == "ema" else "raw weights", *([] if self.step is None else [f"step {self.step:,}"])]
        return f"{self.model} ({', '.join([*facts, f'{self.image_size}x{self.image_size} pixels'])})"


class Config(_Section):
    """One run, whole. `RUN/config.json` holds it."""

    preset: str = "custom"
    origin: Origin | None = None
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    flow: FlowConfig = FlowConfig()
    match: MatchConfig = MatchConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    track: TrackConfig = TrackConfig()


NOT_SECTIONS = ("preset", "origin")

# What each preset changes from the defaults above. The seed's own recipe stays at hand as `seed`: plain AdamW has torch's own decay of the second moment,
# and what was found for captions since is not the seed's.
SEED_RECIPE: dict[str, Any] = {
    "model": {"block": "seed", "mlp_ratio": 2.0, "positions": "learned", "prediction": "v", "bottleneck": 0, "text_window": 0},
    "flow": {"times": "uniform"},
    "optim": {"name": "adamw", "beta2": 0.999},
    "train": {"ema": 0.0},
}
PRESETS: dict[str, dict[str, Any]] = {
    "stability": {"train": {"steps": 30_000}},
    "overfit": {
        "data": {"batch_size": 288, "subset": 32},
        "flow": {"caption_dropout": 0.0},
        "train": {"steps": 5_000, "ema": 0.999},
        "sample": {"guidance": 1.0},
    },
    "hparam_tuning": {"data": {"batch_size": 288}, "train": {"steps": 5_000}},
    "debug": {"data": {"batch_size": 288}, "optim": {"schedule": "constant"}, "train": {"steps": 0, "log_every": 1}},
    # The MLP of short runs is narrow, which learned more of the same compute; of long ones nobody knows here (docs/experiments.md, "The MLP's width").
    "full_scale": {"model": {"mlp_ratio": 4.0}, "train": {"steps": 300_000, "keep_every": 25_000}},
    "quickstart": {
        "data": {"batch_size": 32},
        "model": {
            "width": 192, "depth": 6, "heads": 6, "time_width": 192, "text_width": 192, "text_depth": 2, "mlp_ratio": 3.0, "bottleneck": 64,
            "masks": 4, "pixel_masks": 4, "negatives": True,
        },
        "flow": {"logit_mean": -1.3, "floor": 0.4, "edges": 4.0},
        "optim": {"name": "muon", "lr": 1.5e-3, "muon_lr": 5e-3, "schedule": "linear", "final": 0.02, "decay": 0.5},
        "train": {"minutes": 13, "micro_batch": 0, "ema": 0.99, "eval_every": 0, "checkpoint_every": 500},
        "sample": {"steps": 10, "shift": 3.0, "guidance": 3.0, "guidance_rule": "mean-kept", "guidance_until": 0.3},
    },
    "seed": SEED_RECIPE,
}  # fmt: skip
# What `prepare --config PRESET` prepares for. The latent codec and T5 have to be downloaded once, the others need nothing.
PREPARATION = {name: {"codec": "pixels", "text": "builtin"} if name == "quickstart" else {"codec": "sd-vae-ft-mse", "text": "t5-small"} for name in PRESETS}


def resolve(preset: str | None, overrides: Sequence[str] = (), base: Config | None = None) -> Config:
    """A preset (or `base`) with `--section.field value` overrides applied; UserError names what does not fit."""
    if base is None:
        name = preset or "stability"
        if name not in PRESETS:
            raise UserError(f"no preset {name!r}{nearest(name, PRESETS)}")
        config = Config.model_validate({"preset": name, **PRESETS[name]})
    else:
        config = base.model_copy(deep=True)
    pairs = parse_overrides(overrides)
    for key, value in pairs:
        set_field(config, key, value)
    asked = {key for key, _ in pairs}
    for name in BY_STYLES:
        if getattr(config.sample, name) and len(config.sample.styles) < 2:
            raise UserError(f"sample.{name} compares styles: give at least two as --sample.styles, or leave it out")
    if "train.steps" in asked and "train.minutes" not in asked:
        config.train.minutes = 0.0  # a number of steps was asked for, so the preset's time no longer decides
    return config


def parse_overrides(words: Sequence[str]) -> list[tuple[str, str]]:
    """Split `--a.b value` and `--a.b=value` into pairs; a lone boolean `--a.b` is true."""
    pairs, i = [], 0
    while i < len(words):
        word = words[i]
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}: settings are given as --section.field value")
        key, equals, value = word[2:].partition("=")
        if equals:
            pairs.append((key, value))
        elif i + 1 < len(words) and not words[i + 1].startswith("--"):
            pairs.append((key, words[i + 1]))
            i += 1
        else:
            pairs.append((key, "true"))
        i += 1
    return pairs


def set_field(config: Config, key: str, text: str) -> None:
    """Set `section.field` from text, converted and checked by its type."""
    section_name, _, field = key.partition(".")
    sections = {name: getattr(config, name) for name in type(config).model_fields if name not in NOT_SECTIONS}
    known = [f"{name}.{f}" for name, section in sections.items() for f in type(section).model_fields]
    if key not in known:
        raise UserError(f"no setting --{key}{nearest(key, known)}")
    section = sections[section_name]
    value: Any = text
    if type(section).model_fields[field].annotation == list[str]:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"--{key} takes a JSON list of texts, such as '[\"a red circle\"]'") from error
    try:
        setattr(section, field, value)
    except ValidationError as error:
        raise UserError(f"--{key} {text!r}: {error.errors()[0]['msg'].lower()}") from error


# What models had before a field existed: their config.json does not say.
MODEL_BEFORE = {"text_window": 0}
PERCEPTUAL_BEFORE = {"perceptual_size": 0}  # of runs with a perceptual loss; to others it means nothing


def load_config(path: Path) -> Config:
    """Read a config.json written by a run; UserError names the field that this version does not know."""
    try:
        values = json.loads(Path(path).read_text())
        values.pop("resolved", None)  # what RUN/config.json adds for people
        if "model" in values:
            values["model"] = MODEL_BEFORE | values["model"]
        if values.get("flow", {}).get("perceptual"):
            values["flow"] = PERCEPTUAL_BEFORE | values["flow"]
        optim = values.get("optim", {})
        before_auto = "muon_lr" in optim and "muon_piece" not in optim and "match" not in values  # a whole configuration, older than both
        optim.pop("muon_piece", None)  # matrices in pieces for a while (docs/experiments.md): what such a run has learned can be drawn with and trained on
        if before_auto and values.get("train", {}).get("precision") == "bf16":
            values["train"] = values["train"] | {"precision": "auto"}  # it was the default then, and not asked for
        return Config.model_validate(values)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a configuration: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def describe_fields() -> str:
    """All settings with default and meaning, for `--help`."""
    lines = []
    for name in (n for n in Config.model_fields if n not in NOT_SECTIONS):
        for field, info in type(getattr(Config(), name)).model_fields.items():
            lines.append(f"  --{name}.{field} (default {json.dumps(info.default)})\n      {info.description}")
    return "\n".join(lines)
