"""Out of memory before step 0: smaller micro-batches, the same training."""

import json
import signal

import pytest
import torch

from flowt2i.cli import main
from flowt2i.config import resolve
from flowt2i.errors import UserError
from flowt2i.memory import is_out_of_memory
from flowt2i.training import checkpoint, distributed
from flowt2i.training import fit_memory as fitting
from flowt2i.training.distributed import World
from flowt2i.training.fit_memory import fit_memory, fitting_micro_batch
from flowt2i.training.loop import Stopped, Trainer, train


def tried(micro: int, share: int, most: int) -> list[int]:
    """The micro-batches that are tried where `most` images fit."""
    seen: list[int] = []
    assert fitting_micro_batch(micro, share, lambda n: seen.append(n) or n <= most) == seen[-1]
    return seen


def test_halved_until_it_fits_and_always_a_divisor():
    assert tried(96, 288, 1000) == [96]
    assert tried(96, 288, 30) == [96, 48, 24]
    assert tried(9, 27, 2) == [9, 3, 1]
    assert tried(7, 7, 3) == [7, 1]
    with pytest.raises(UserError, match="one image"):
        tried(8, 8, 0)


def test_every_allocators_words():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)")) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) and not is_out_of_memory(ValueError("out of memory"))
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)  # the real one, of the CPU
    assert is_out_of_memory(error.value)


def fit(run, data, words, most):
    """Train where no more than `most` images fit at a time; the losses and what became of the micro-batch."""
    trainer = Trainer(resolve("quickstart", words), data, run, progress=False)
    forward, sizes = trainer.objective.forward, []

    def limited(images, *rest):
        sizes.append(len(images))
        if len(images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(images, *rest)

    trainer.objective.forward = limited  # type: ignore[method-assign]
    fit_memory(trainer)
    assert sizes == [8, 4, 2][: len(sizes)] and all(p.grad is None for p in trainer.model.parameters())
    trainer.train()
    trainer.close()
    resolved = json.loads((run / "config.json").read_text())["resolved"]
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()], (resolved["micro_batch"], resolved["accumulation"])


def test_the_training_is_the_same(scenes_data, tiny, tmp_path):
    """A run that had to shrink equals, to the last bit, the one that asked for the small micro-batch at once; a probe that fits changes nothing."""
    words = [*tiny, "--train.steps", "3", "--train.eval_every", "0", "--train.eval_images", "2", "--train.score_prompts", "0", "--sample.images", "2"]
    with pytest.warns(UserWarning, match=r"micro-batch of 8: going on with 2 x 4 accumulation"):
        shrunk, sizes = fit(tmp_path / "shrunk", scenes_data, words, 2)
    trainer = Trainer(resolve("quickstart", [*words, "--train.micro_batch", "2"]), scenes_data, tmp_path / "small", progress=False)
    trainer.train()
    trainer.close()
    small = [json.loads(line)["loss"] for line in (tmp_path / "small" / "log.jsonl").read_text().splitlines()]
    assert sizes == (2, 4) and shrunk == small and len(small) == 3
    whole, sizes = fit(tmp_path / "whole", scenes_data, words, 8)
    trainer = Trainer(resolve("quickstart", words), scenes_data, tmp_path / "plain", progress=False)
    trainer.train()
    trainer.close()
    assert sizes == (8, 1) and whole == [json.loads(line)["loss"] for line in (tmp_path / "plain" / "log.jsonl").read_text().splitlines()]


def test_other_errors_are_not_taken_for_a_lack_of_memory(scenes_data, tiny, tmp_path):
    trainer = Trainer(resolve("quickstart", tiny), scenes_data, tmp_path / "run", progress=False)
    trainer.objective.forward = lambda *args: (_ for _ in ()).throw(RuntimeError("a bug"))  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="a bug"):
        fit_memory(trainer)
    trainer.close()


def short_at_first(monkeypatch, signalled=None):
    """The first trainer is sharded and meets a pass that does not fit; gives the times at which trainers were started, and what was done on the GPU."""
    ready, started, done = Trainer._make_ready, [], []

    def make_ready(self):
        started.append(self.started)
        if len(started) > 1:
            return ready(self)
        self.sharded, self.stop_signal = True, signalled
        monkeypatch.setattr(fitting, "_probe", lambda trainer, micro: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
        monkeypatch.setattr(fitting, "_fits_shares", lambda trainer, micro, fits: done.append("vote") or fits)
        self.world = World(0, 1, torch.device("cuda"))
        fit_memory(self)

    monkeypatch.setattr(Trainer, "_make_ready", make_ready)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("emptied"))
    return started, done


@pytest.mark.filterwarnings("ignore:out of memory")
def test_starting_again_forgets_neither_clock_nor_signal(scenes_data, tiny, tmp_path, monkeypatch):
    started, done = short_at_first(monkeypatch, signal.SIGTERM)
    with pytest.raises(Stopped, match=rf"by signal {signal.SIGTERM} at step 1"):
        train(resolve("quickstart", [*tiny, "--train.steps", "9"]), scenes_data, tmp_path / "run", progress=False)
    assert len(started) == 2 and started[0] == started[1]
    assert done == ["vote"]  # nothing that waits for the device, where a collective may be in flight


@pytest.mark.filterwarnings("ignore:out of memory")
def test_a_rank_that_is_lost_while_starting_again(scenes_data, tiny, tmp_path, monkeypatch):
    short_at_first(monkeypatch)
    monkeypatch.setattr(distributed, "_store", torch.distributed.HashStore())
    monkeypatch.setattr(distributed, "restart", lambda timeout_s: (_ for _ in ()).throw(torch.distributed.DistNetworkError("gone")))
    with pytest.raises(UserError, match="another rank was lost"):
        train(resolve("quickstart", [*tiny, "--train.steps", "9"]), scenes_data, tmp_path / "run", progress=False)


def test_later_than_the_start_it_is_one_line(scenes_data, tiny, tmp_path, monkeypatch, capsys):
    step = Trainer._step

    def short(self, *args):
        if self.step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return step(self, *args)

    monkeypatch.setattr(Trainer, "_step", short)
    words = ["--data", str(scenes_data), "--out", str(tmp_path / "run"), *tiny, "--train.steps", "3", "--train.checkpoint_every", "1"]
    assert main(["train", "--config", "quickstart", *words]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(told) == 1 and "Tried to allocate 2 GiB): free some" in told[0] and "--train.micro_batch" in told[0]
    assert checkpoint.damage(checkpoint.folder(tmp_path / "run", 1)) is None
