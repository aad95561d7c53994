"""`flowt2i bench`: the fields that others read, micro-batches, the loop, peers, the verdict; and what it says where something is missing."""

import json
import sys

import numpy as np
import pytest
import torch

from flowt2i.bench import ceiling, data, micro_batches, peers, run
from flowt2i.bench import step as bare
from flowt2i.bench.captions import EMOJI_T5, draw_lengths, padded_width
from flowt2i.bench.footprint import footprint, state_bytes
from flowt2i.bench.micro_batches import divisors, largest_that_fits, neighbours
from flowt2i.bench.run import bench
from flowt2i.bench.step import BareStep, describe
from flowt2i.bench.verdict import summary, verdict
from flowt2i.cli import main
from flowt2i.config import resolve
from flowt2i.errors import UserError

TINY = ["--model.width", "64", "--model.depth", "2", "--model.heads", "2", "--model.text_width", "64", "--model.text_depth", "1", "--model.time_width", "64",
        "--data.batch_size", "8", "--train.micro_batch", "4", "--train.compile", "off", "--sample.steps", "2"]  # fmt: skip
ALWAYS = {"train_images_per_s", "sample_images_per_s", "model_tflops", "ceiling_tflops", "peers", "verdict"}
CPU = torch.device("cpu")


PLENTY = 1e6  # seconds: tests do not depend on the machine's speed


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Few repetitions of small things: what is measured does not matter here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceiling, "matrix_rate", lambda n, k, m, dtype, device, seconds: 1.0)
        for name in ("fastest_of", "mean_of"):
            original = getattr(bare, name)
            patch.setattr(bare, name, lambda work, device, least=1, seconds=0.0, original=original: original(work, device, 1, 0.0))
        real = run.loop_rate
        patch.setattr(run, "loop_rate", lambda config, data, compiled, seconds: real(config, data, compiled, 0.0))
        patch.setattr(data, "COUNT", 40)
        patch.setattr(data, "T5_SMALL", data.T5_SMALL | {"num_layers": 1, "d_model": 64, "d_ff": 64})
        yield


@pytest.fixture(scope="module")
def result(scenes_data, quick):
    return bench(resolve("quickstart", TINY), scenes_data, seconds=PLENTY)


# ---- the whole -----------------------------------------------------------------------------------------------------------


def test_what_others_read(result):
    assert result.keys() >= ALWAYS and result["train_images_per_s"] > 0 and result["sample_images_per_s"] > 0 and result["peers"] == {}
    assert result["share_of_ceiling"] == pytest.approx(result["model_tflops"] / result["ceiling_tflops"], abs=1e-3)
    assert result["model_tflops"] == pytest.approx(result["train_images_per_s"] * result["gflop_per_image"] / 1e3, rel=0.05, abs=1e-3)
    assert set(result["milliseconds"]) == {"data", "noise", "forward", "backward", "optimizer", "ema"} and all(result["milliseconds"].values())
    assert set(result["micro_batches"]) == {"1", "2", "4", "8"} and str(result["fastest_micro_batch"]) in result["micro_batches"]
    assert result["largest_micro_batch"] == 8 and result["largest_how"] == "computed"
    assert result["sampling"]["times_fewer_seconds"] > 0 and {"cpu", "torch", "cores"} <= result["machine"].keys()
    json.dumps(result)


def test_a_real_training_ran(result):
    loop = result["loop"]
    assert loop["steps"] >= 2 and 0 <= loop["waiting_for_data"] < 1 and loop["checkpoint_s"] > 0
    assert loop["of_bare_step"] > 0 and loop["images_per_s"] > 0 and not result["loop_why"]


def test_told_in_words(result):
    text = summary(result)
    assert text.splitlines()[-1] == "verdict   " + result["verdict"] and "of the bare step" in text and "% of the" in text


def test_latents_without_a_dataset():
    """The stand-ins for VAE and T5 go the whole way: prepare, features of captions, a real training."""
    result = bench(resolve("stability", TINY), latents=True, seconds=PLENTY)
    assert result["loop"]["steps"] >= 2 and result["gflop_per_image"] > 0


def test_fixed_captions_leave_no_loop():
    result = bench(resolve("quickstart", TINY), text_tokens=5, seconds=0)
    assert result["loop"] is None and "--text-tokens" in result["loop_why"] and result["text_tokens"] == 5
    assert set(result["micro_batches"]) == {"4"}, "no time for others"
    assert "not measured" in summary(result)


def test_too_slow_for_a_loop(scenes_data):
    step = BareStep(resolve("quickstart", TINY), describe(False, 8), {8: 1}, CPU)
    got, why = run._loop(step.config, bare.ImageTextDataset(scenes_data), step, 4, 1e6, False, run.Budget(10))
    assert got is None and "--seconds" in why


# ---- micro-batches and memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0, 1, 7, 24, 96, 1000])
def test_the_largest_that_fits(most):
    tried = []
    found = largest_that_fits(divisors(96), lambda size: tried.append(size) or size <= most)
    assert found == max((size for size in divisors(96) if size <= most), default=0) and len(tried) <= 4


def test_neighbours():
    assert neighbours(96, 576, 576) == [48, 192, 24, 288]
    assert neighbours(96, 576, 96) == [48, 24] and neighbours(1, 7, 7) == []


def test_a_gpu_that_is_too_small(monkeypatch):
    step = BareStep(resolve("quickstart", TINY), describe(False, 8), {8: 1}, CPU)
    forward = step.objective.forward

    def limited(images, *rest):
        if len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(images, *rest)

    monkeypatch.setattr(step.objective, "forward", limited)
    assert [size for size in divisors(8) if step.fits(size)] == [1, 2]
    assert all(p.grad is None for p in step.model.parameters())
    monkeypatch.setattr(micro_batches, "footprint", lambda step: footprint(step)._replace(slope=1e18))
    monkeypatch.setattr(step.objective, "forward", forward)
    with pytest.raises(UserError, match="not even one image"):
        micro_batches.largest(step, 8)


def test_other_errors_are_no_lack_of_memory(monkeypatch):
    step = BareStep(resolve("quickstart", TINY), describe(False, 8), {8: 1}, CPU)
    monkeypatch.setattr(step.objective, "forward", lambda *inputs: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        step.fits(1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_bytes_are_exact(optimizer):
    config = resolve("quickstart", [*TINY, "--optim.name", optimizer])
    step = BareStep(config, describe(False, 8), {8: 1}, CPU)
    step.micro_step(2)
    step.optimizer.step(1e-6)
    tensors = [p for p in step.model.parameters()] + [p.grad for p in step.model.parameters() if p.grad is not None]
    tensors += [p for p in step.ema.model.parameters()] + [t for name, t in step.optimizer.state().items() if not name.endswith("/step")]
    assert state_bytes(step.model, optimizer == "muon", True) == sum(t.numel() * t.element_size() for t in tensors)


def test_activations_grow_with_the_batch():
    made = {depth: footprint(BareStep(resolve("quickstart", [*TINY, "--model.depth", str(depth)]), describe(False, 8), {8: 1}, CPU)) for depth in (1, 2, 3)}
    assert made[3].slope - made[2].slope == pytest.approx(made[2].slope - made[1].slope, rel=0.01), "each block keeps as much"
    most = made[2].largest(1e9)
    assert made[2].bytes(most) <= 0.9e9 < made[2].bytes(most + 1) and made[2].largest(0) == 0


# ---- captions, data --------------------------------------------------------------------------------------------------------


def test_caption_lengths():
    lengths = draw_lengths(20_000, EMOJI_T5)
    assert set(lengths) <= set(EMOJI_T5) and lengths.mean() == pytest.approx(12.2, abs=0.1) and sum(EMOJI_T5.values()) == 4989
    assert (draw_lengths(50, EMOJI_T5) == draw_lengths(50, EMOJI_T5)).all() and set(draw_lengths(9, np.array([4, 4]))) == {4}


def test_padding_is_trainings_own(scenes_data, tiny, tmp_path):
    from flowt2i.training.loop import Trainer

    trainer = Trainer(resolve("quickstart", tiny), scenes_data, tmp_path / "run", progress=False)
    batch = trainer.dataset.fetch(range(8))
    longest = int(batch.mask.sum(1).max())
    assert batch.ids.shape[1] == padded_width(longest, trainer.description.longest_caption, trainer.compiled)
    trainer.close()
    assert padded_width(40, 100, False) == 40 and padded_width(41, 100, False) == 48 and padded_width(41, 100, True) == 64


# ---- the verdict -----------------------------------------------------------------------------------------------------------


def test_verdicts(result):
    base = result | {"micro_batches": {"4": 10.0}, "fastest_micro_batch": 4, "train_images_per_s": 10.0}
    at = lambda waiting, reached=1.0, workers=0: {**result["loop"], "waiting_for_data": waiting, "of_bare_step": reached, "workers": workers}
    assert verdict(base | {"loop": at(0.38, 0.6, 2)}) == "waiting on data 38% of the time: raise --data.workers above 2"
    assert "--data.workers 2" in verdict(base | {"loop": at(0.38, 0.6)})
    assert "micro-batch of 8 is 20% faster" in verdict(base | {"loop": at(0.0), "micro_batches": {"4": 10.0, "8": 12.0}, "fastest_micro_batch": 8})
    assert "80% of the bare step" in verdict(base | {"loop": at(0.001, 0.8)})
    assert "computing all the time" in verdict(base | {"loop": at(0.0)}) and "computing" in verdict(base | {"loop": None})


# ---- peers -----------------------------------------------------------------------------------------------------------------

SMALL = peers.Size(width=64, depth=1, heads=2)


def test_every_peer_is_trained_beside_ours(monkeypatch):
    order = []
    timed = peers.Contender.timed_step
    monkeypatch.setattr(peers.Contender, "timed_step", lambda self, *rest: order.append(self.name) or timed(self, *rest))
    rows = peers.compare(list(peers.PEERS), batch=2, rounds=2, size=SMALL, modes=["eager"])
    assert [row["name"] for row in rows] == ["ours", "pixart", "prx", "sd3"] == order[:4] and order[4:8] == order[:4][::-1], "by turns"
    assert {row["text_tokens"] for row in rows if row["name"] != "ours"} == {128} and rows[0]["text_tokens"] == max(EMOJI_T5)
    ratios = peers.ratios(rows)
    assert ratios["sd3, eager"] == pytest.approx(rows[0]["images_per_s"] / rows[3]["images_per_s"], abs=1e-2)
    assert "against the best of them" in peers.table(rows)


def test_our_wider_preset_is_timed_but_is_no_peer():
    assert peers.chosen("all") == [peers.OWN, "pixart", "prx", "sd3"]
    rows = peers.compare([peers.OWN], batch=2, rounds=1, size=SMALL, modes=["eager"])
    assert [row["name"] for row in rows] == ["ours", peers.OWN] and rows[1]["parameters"] > rows[0]["parameters"]
    assert peers.ratios(rows).keys() == {f"{peers.OWN}, eager"} and "best" not in peers.table(rows)


def test_peers_learn():
    """Each step is a training step: the loss goes down on one batch."""
    import diffusers

    torch.manual_seed(0)
    for contender in [peers.ours(SMALL, 4, CPU, EMOJI_T5), *(peers.peer(name, diffusers, SMALL, 4, CPU) for name in peers.PEERS)]:
        data, noise, t = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.rand(4)
        contender.optimizer.param_groups[0]["lr"] = 3e-3
        losses = []
        for _ in range(12):
            loss = contender.loss(data, noise, t)
            loss.backward()
            contender.optimizer.step()
            contender.optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < 0.95 * losses[0], contender.name


def test_peers_that_are_not_there(monkeypatch, capsys):
    monkeypatch.setitem(peers.PEERS, "prx", lambda library, size: library.NoSuchTransformer)
    rows = peers.compare(["prx"], batch=2, rounds=1, size=SMALL, modes=["eager"])
    assert [row["name"] for row in rows] == ["ours"] and "prx is left out" in capsys.readouterr().err
    assert peers.ratios(rows) == {} and "ours" in peers.table(rows)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert peers.compare(["prx"]) == [] and "pip install" in capsys.readouterr().err
    assert peers.table([]) == ""


# ---- the command -----------------------------------------------------------------------------------------------------------


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(
        peers,
        "compare",
        lambda names, *rest, **more: [{"name": n, "mode": "eager", "images_per_s": 2.0, "parameters": 1, "text_tokens": 9} for n in ["ours", *names]],
    )
    words = ["bench", *TINY, "--text-tokens", "4", "--seconds", "1"]
    assert main([*words, "--peers", "prx", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["peers"] == {"prx, eager": 1.0} and told.keys() >= ALWAYS
    assert main(words) == 0 and "verdict" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--text-tokens", "0"], "at least 1"),
        (["--config", "quikstart"], "did you mean 'quickstart'"),
        (["--model.heads", "7", "--text-tokens", "4"], "must divide"),
        (["--peers", "pixart,sd4"], "no peer 'sd4'"),
        (["--peer-rounds", "3"], "belong to --peers"),
        (["--train.lora", "8"], "--train.lora"),
        (["--data", "nowhere"], "no dataset at nowhere"),
        (["--data", "nowhere", "--text-tokens", "4"], "leave --text-tokens"),
        (["--seconds", "0"], "--seconds"),
    ],
)
def test_mistakes_are_one_line(words, says, capsys):
    assert main(["bench", *words]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 1 and says in told[0]


def test_out_of_memory_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(run, "bench", lambda *rest: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")))
    assert main(["bench"]) == 2 and "--train.micro_batch" in capsys.readouterr().err
