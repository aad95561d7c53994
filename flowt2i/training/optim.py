"""Optimizers and the learning-rate schedule."""

import math
from typing import Any

import torch
from torch import nn

from flowt2i.config import Config, OptimConfig
from flowt2i.training.muon import Muon
from flowt2i.training.parallel import share_like, whole


def schedule_steps(config: Config, steps: int) -> int:
    """Steps that the learning rate is laid out for, in a run of `steps` (0: not known, or endless); 0: endless."""
    return config.optim.schedule_steps or steps or (2_000 if config.train.minutes else 0)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Factor in [0, 1] on the maximum learning rates at a step (0-based) of `steps` (0: endless, no decay).

    Linear warm-up from `warmup_from` over the first `warmup` share, then: "cosine" to `final` at the last step; "linear" holds
    and falls to `final` over the last `decay` share; "constant" holds.
    """
    warm = max(1, round(config.warmup * (steps or 2_000)))
    if step < warm:
        return config.warmup_from + (1 - config.warmup_from) * step / warm
    if not steps or config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        done = min(1.0, (step - warm) / max(1, steps - 1 - warm))
        return config.final + (1 - config.final) * (1 + math.cos(math.pi * done)) / 2
    start = max(warm, round((1 - config.decay) * steps))
    done = min(1.0, max(0.0, (step - start) / max(1, steps - 1 - start)))
    return 1 - (1 - config.final) * done


class Optimizer:
    """One or two torch optimizers behind one face, with state named by parameter so that it can be saved as safetensors.

    Parameters are split in three: matrices of the blocks (Muon, where chosen), other matrices (decayed), and vectors, tables,
    norms and embeddings (never decayed). dtype: of Muon's products.
    """

    def __init__(self, config: OptimConfig, model: nn.Module, dtype: torch.dtype = torch.bfloat16):
        self.config = config
        self.names: dict[torch.Tensor, str] = {p: n for n, p in model.named_parameters() if p.requires_grad}
        matrices, decayed, plain = [], [], []
        for parameter, name in self.names.items():
            if parameter.ndim == 2 and "blocks." in name and not name.endswith("table"):
                matrices.append(parameter)
            elif parameter.ndim == 2 and not name.endswith(("table", "positions", "embedding.weight")):
                decayed.append(parameter)
            else:
                plain.append(parameter)
        muon = config.name == "muon"
        if not muon:
            decayed, matrices = matrices + decayed, []
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW([g for g in groups if g["params"]], lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
        ]
        if matrices:
            settings: dict[str, Any] = {"lr": config.muon_lr, "momentum": 0.95, "weight_decay": config.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
            self.parts.append(Muon(matrices, dtype, **settings))
        self.maximum = [config.lr, config.muon_lr]

    def step(self, factor: float) -> None:
        """Update with learning rates of `factor` times their maxima."""
        for part, maximum in zip(self.parts, self.maximum):
            for group in part.param_groups:
                group["lr"] = maximum * factor
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def forget(self) -> None:
        """Be as before the first step."""
        for part in self.parts:
            part.state.clear()

    def state(self) -> dict[str, torch.Tensor]:
        """State tensors under `parameter name/state name`."""
        out = {}
        for part in self.parts:
            for parameter, state in part.state.items():
                for key, value in state.items():
                    out[f"{self.names[parameter]}/{key}"] = value if torch.is_tensor(value) else torch.tensor(float(value))
        return out

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Restore exactly what `state` gave; KeyError or ValueError where it does not fit."""
        by_name = {name: parameter for parameter, name in self.names.items()}
        owner = {p: part for part in self.parts for group in part.param_groups for p in group["params"]}
        for full, tensor in tensors.items():
            name, _, key = full.rpartition("/")
            parameter = by_name[name]
            if key not in state_keys(owner[parameter]):
                raise KeyError(full)
            if tensor.shape != (torch.Size([]) if key == "step" else parameter.shape):
                raise ValueError(f"optimizer state {full} has shape {tuple(tensor.shape)}, the parameter {tuple(parameter.shape)}")
            on = tensor.device if key == "step" and parameter.device.type == "cpu" else parameter.device
            owner[parameter].state[parameter][key] = tensor.clone().to(on) if tensor.ndim == 0 else share_like(tensor.clone().to(on), parameter)
        for name, parameter in by_name.items():  # what is missing would silently start from zero
            for key in state_keys(owner[parameter]):
                if key not in owner[parameter].state[parameter]:
                    raise KeyError(f"{name}/{key} is missing")


def state_keys(part: torch.optim.Optimizer) -> tuple[str, ...]:
    """What an optimizer remembers of each parameter."""
    return ("momentum_buffer",) if isinstance(part, torch.optim.Muon) else ("step", "exp_avg", "exp_avg_sq")


def clip_gradients(model: nn.Module, limit: float) -> torch.Tensor:
    """Clip the global gradient norm to `limit` (0: not at all); returns the norm before clipping, a scalar tensor (no host sync).

    Of sharded gradients it is the norm of the whole, the same on every rank.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if limit:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm
