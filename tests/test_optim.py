"""Optimizers, schedule and averaged weights."""

import pytest
import torch
from torch import nn

from flowt2i.config import OptimConfig
from flowt2i.training.ema import EMA
from flowt2i.training.muon import Muon, orthogonal
from flowt2i.training.optim import Optimizer, clip_gradients, learning_rate


def test_the_seeds_schedule():
    config = OptimConfig()
    steps = 1000
    assert learning_rate(config, 0, steps) == pytest.approx(0.1)
    assert learning_rate(config, 25, steps) == pytest.approx(0.55)
    assert learning_rate(config, 50, steps) == pytest.approx(1.0)
    assert learning_rate(config, 999, steps) == pytest.approx(0.1)
    falling = [learning_rate(config, s, steps) for s in range(50, 1000)]
    assert all(a >= b for a, b in zip(falling, falling[1:]))
    assert learning_rate(config, 10**9, 0) == 1.0, "an endless run holds its rate"


def test_linear_schedule_holds_then_falls():
    config = OptimConfig(schedule="linear", decay=0.4, final=0.0)
    assert learning_rate(config, 599, 1000) == 1.0
    assert learning_rate(config, 800, 1000) == pytest.approx(0.5, abs=0.01)
    assert learning_rate(config, 999, 1000) == pytest.approx(0.0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.table = nn.Parameter(torch.zeros(3, 8))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x).tanh()
        return x + self.table.sum(0)


def fit(optimizer, net, steps):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 6, generator=g)
    y = (x @ torch.randn(6, 8, generator=g)).tanh()
    for _ in range(steps):
        loss = (net(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(1.0)
    return loss.item()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_learns_and_resumes_exactly(name):
    torch.manual_seed(0)
    net = Net()
    optimizer = Optimizer(OptimConfig(name=name, lr=1e-2, muon_lr=1e-2), net)
    assert fit(optimizer, net, 1) > 5 * fit(optimizer, net, 200)
    other = Net()
    other.load_state_dict(net.state_dict())
    resumed = Optimizer(OptimConfig(name=name, lr=1e-2, muon_lr=1e-2), other)
    resumed.load_state(optimizer.state())
    fit(optimizer, net, 5), fit(resumed, other, 5)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), other.state_dict().values()))


def test_muon_takes_the_matrices_of_the_blocks_only():
    optimizer = Optimizer(OptimConfig(name="muon"), Net())
    muon = {optimizer.names[p] for group in optimizer.parts[1].param_groups for p in group["params"]}
    assert muon == {"blocks.0.weight", "blocks.1.weight"}


def test_muon_in_stacks_is_torchs_muon():
    shapes = [(8, 24), (24, 8), (24, 8), (16, 16), (8, 24)]  # wide and tall ones share a stack, square ones lie as they are
    g = torch.Generator().manual_seed(0)
    begun = [torch.randn(shape, generator=g) for shape in shapes]
    ours, theirs = ([nn.Parameter(start.clone()) for start in begun] for _ in range(2))
    settings = {"lr": 0.1, "momentum": 0.95, "weight_decay": 0.2, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for step in range(3):
        for index, (a, b) in enumerate(zip(ours, theirs)):
            a.grad = None if (step, index) == (1, 2) else torch.randn(a.shape, generator=g)  # one that was not used in this step
            b.grad = None if a.grad is None else a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for start, a, b in zip(begun, ours, theirs):
        moved = (b - start).norm()
        assert (a - b).norm() < 0.01 * moved, "to the rounding of bf16 products"
        assert torch.equal(optimizers[0].state[a]["momentum_buffer"], optimizers[1].state[b]["momentum_buffer"])


def test_orthogonal_brings_singular_values_near_one():
    g = torch.Generator().manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(3, 16, 48, generator=g).bfloat16(), (3.4445, -4.775, 2.0315), 5, 1e-7).float())
    assert values.min() > 0.6 and values.max() < 1.3, "Jordan et al. 2024: 0.7 to 1.2, to the rounding of bf16"


def test_state_of_another_shape_is_refused():
    net = Net()
    optimizer = Optimizer(OptimConfig(), net)
    with pytest.raises(ValueError, match=r"embed\.weight"):
        optimizer.load_state({"embed.weight/exp_avg": torch.zeros(2, 2)})


def test_clipping_reports_the_norm_before():
    net = Net()
    net(torch.randn(4, 6)).square().sum().backward()
    before = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
    assert torch.isclose(clip_gradients(net, 0.5), before)
    assert torch.isclose(torch.cat([p.grad.flatten() for p in net.parameters()]).norm(), torch.tensor(0.5), atol=1e-4)


def test_ema_warms_up_and_follows_its_formula():
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, 1.0)
    ema = EMA(net, 0.9)
    expected = 1.0
    for n in range(30):
        nn.init.constant_(net.weight, float(n))
        ema.update()
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    assert ema.model.weight.item() == pytest.approx(expected, rel=1e-5)
    assert ema.updates == 30 and not ema.model.weight.requires_grad
