"""Low-rank adapters (Hu et al., LoRA, 2106.09685) on every matrix of the blocks, by the peft library: `train --init MODEL --lora 8`.

Only the adapters train. Checkpoints hold them beside the weights they adapt, so that training goes on from there; whatever else loads a checkpoint
(sampling, evaluation, export, another `--init`) gets them merged, `W + B A`, and needs no peft.
"""

import torch
from torch import Tensor, nn

from flowt2i.errors import UserError

DOWN, UP, BASE = ".lora_A.default.weight", ".lora_B.default.weight", ".base_layer"  # as peft names them


def inject(model: nn.Module, rank: int) -> None:
    """Put adapters of this rank beside every linear layer of the blocks, in place; all else stops training. They begin as nothing (B = 0).

    UserError where peft is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("--lora needs peft: pip install -c constraints.txt -e '.[lora]', or leave it out to train all weights") from error
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "blocks." in name]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers), model)  # alpha = rank: what is added is B A, unscaled
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def has_adapters(model: nn.Module) -> bool:
    return any(name.endswith("lora_A") for name, _ in model.named_modules())


def merged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model with adapters as those of one without: `W + B A` [out, in] under W's own name. Others stay as they are."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith((DOWN, UP)):
            continue
        layer, base, rest = name.partition(BASE)
        if base and rest == ".weight" and layer + DOWN in tensors and layer + UP in tensors:
            tensor = torch.addmm(tensor, tensors[layer + UP], tensors[layer + DOWN])
        plain[layer + rest] = tensor
    return plain
