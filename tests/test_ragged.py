"""Captions packed without their padding: the same output and gradients, room that holds, and a training that uses it."""

import numpy as np
import pytest
import torch

from flowt2i import ragged
from flowt2i.config import resolve
from flowt2i.model import FlowTransformer
from flowt2i.ragged import Lengths, pack, packing_of, unpack
from flowt2i.training.loop import Trainer

LENGTHS = torch.tensor([9, 1, 3, 2, 5, 4])  # 24 tokens of 54
SMALL = ["--model.width", "64", "--model.depth", "2", "--model.heads", "4", "--model.time_width", "64"]


def model(block="modern"):
    config = resolve("stability", [*SMALL, "--model.block", block]).model.resolve("vae", (4, 8, 8))
    torch.manual_seed(0)
    made = FlowTransformer(config, (4, 8, 8), 32)
    for parameter in made.parameters():  # residual branches begin at zero, where all captions are alike
        torch.nn.init.normal_(parameter, std=0.1)
    return made


def inputs():
    torch.manual_seed(1)
    mask = torch.arange(9) < LENGTHS[:, None]
    return torch.randn(6, 4, 8, 8), torch.rand(6), torch.randn(6, 9, 32), mask


def output_and_gradients(net, room):
    net.zero_grad()
    out = net(*inputs(), room)
    out.square().mean().backward()
    return out.detach(), {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("room", [24, 31])
@pytest.mark.parametrize("again", [False, True])
def test_the_same_output_and_gradients_as_with_padding(room, again):
    net = model()
    out, gradients = output_and_gradients(net, 0)
    net.checkpoint_activations = again
    packed, theirs = output_and_gradients(net, room)
    assert torch.allclose(packed, out, rtol=0, atol=1e-6 * out.abs().max())
    for name, gradient in gradients.items():
        assert torch.allclose(theirs[name], gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max()), name


def test_the_captions_product_has_as_many_rows_as_there_is_room():
    net, rows = model(), []
    net.blocks[0].attention.text_kv.register_forward_hook(lambda module, given, out: rows.append(out.shape[:-1].numel()))
    net(*inputs())
    net(*inputs(), 24)
    assert rows == [54, 24]


def test_the_seed_block_pads():
    net = model("seed")
    assert torch.equal(net(*inputs(), 24), net(*inputs()))


def test_pack_and_unpack_are_inverse_where_tokens_are_real():
    mask = torch.arange(9) < LENGTHS[:, None]
    x = torch.randn(6, 9, 5, requires_grad=True)
    packing = packing_of(mask, 28)
    packed = pack(x, packing)
    assert packed.shape == (28, 5) and torch.equal(packed[:24], x[mask])
    back = unpack(packed, packing, 6)
    assert torch.equal(back[mask], x[mask])
    (back * mask.unsqueeze(-1)).sum().backward()
    assert torch.equal(x.grad, mask.unsqueeze(-1).expand_as(x).float())


def test_room_holds_nearly_every_batch_and_is_the_same_for_all():
    random = np.random.default_rng(0)
    lengths = random.integers(5, 129, 10_000)
    room = Lengths.of(lengths).room(32)
    sums = random.choice(lengths, (20_000, 32)).sum(1)
    assert sums.mean() < sums.max() <= room < 32 * 128 and room % 32 == 0


def test_room_only_where_it_fits_and_pays():
    mask = torch.arange(9) < LENGTHS[:, None]
    few = Lengths(4.0, 0.1)
    assert few.room(6) == 32 and few.room_for(mask) == 32
    assert few.room_for(mask, least=5) == 0  # captions that are dropped may become longer: 34 tokens
    assert Lengths(1.0, 0.0).room_for(torch.ones(2, 40, dtype=torch.bool)) == 0  # longer than usual
    assert Lengths(9.0, 0.0).room_for(mask) == 0  # nothing to leave out


def test_training_packs_and_learns_as_with_padding(scenes_data, tmp_path, monkeypatch):
    words = ["--train.steps", "2", "--data.batch_size", "16", "--train.precision", "fp32", *SMALL]
    rooms, weights = [], []
    monkeypatch.setattr(ragged, "WORTH", 1.1)
    forward = FlowTransformer.forward
    monkeypatch.setattr(FlowTransformer, "forward", lambda self, z, t, text, mask, room=0: (rooms.append(room), forward(self, z, t, text, mask, room))[1])
    for name in ("packed", "padded"):
        if name == "padded":
            monkeypatch.setattr(ragged, "WORTH", 0.0)
        trainer = Trainer(resolve("quickstart", words), scenes_data, tmp_path / name, progress=False)
        trainer.train()
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
        trainer.close()
    assert any(rooms[: len(rooms) // 2]) and not any(rooms[len(rooms) // 2 :])
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*weights))


def test_empty_captions_and_autocast():
    net, (z, t, text, _) = model(), inputs()
    for lengths in (torch.tensor([0, 5, 0, 1, 9, 2]), torch.zeros(6, dtype=torch.int64)):
        mask = torch.arange(9) < lengths[:, None]
        assert torch.allclose(net(z, t, text, mask, 32), net(z, t, text, mask), atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.allclose(net(z, t, text, mask, 32), net(z, t, text, mask), atol=2e-2)


def test_a_resumed_run_packs_as_an_uninterrupted_one(scenes_data, tmp_path):
    words = ["--data.batch_size", "16", "--train.precision", "fp32", "--train.compile", "off", "--optim.schedule_steps", "4", *SMALL]
    found = []
    for run, steps in (("whole", [4]), ("parts", [2, 4])):
        for number, end in enumerate(steps):
            config = resolve("quickstart", [*words, "--train.steps", str(end)])
            trainer = Trainer(config, scenes_data, tmp_path / run, "latest" if number else None, progress=False)
            assert trainer.lengths.room_for(trainer.dataset.fetch(range(16)).mask), "batches of 16 scenes are worth packing"
            trainer.train()
            found.append([p.detach().clone() for p in trainer.model.parameters()])
            trainer.close()
    assert all(torch.equal(a, b) for a, b in zip(found[0], found[2]))


def test_compiled_blocks_give_the_same():
    net = model()
    out, gradients = output_and_gradients(net, 24)
    for block in net.blocks:
        block.compile()
    packed, theirs = output_and_gradients(net, 24)
    padded, _ = output_and_gradients(net, 0)
    assert torch.allclose(packed, out, atol=1e-5) and torch.allclose(padded, out, atol=1e-5)
    for name, gradient in gradients.items():
        assert torch.allclose(theirs[name], gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max()), name
