"""Training on pictures of several shapes: what each step sees, that a resume and ranks see the same, and drawing in these shapes."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_shapes import pictures

from flowt2i import Pipeline, shapes
from flowt2i.cli import main
from flowt2i.config import resolve
from flowt2i.data.options import PrepareOptions
from flowt2i.data.prepare import prepare
from flowt2i.errors import UserError
from flowt2i.evaluation.validation import validation_loss
from flowt2i.training import stream
from flowt2i.training.distributed import World
from flowt2i.training.fit_memory import _probe
from flowt2i.training.loop import Trainer, train
from flowt2i.verify_resume import losses

CPU = torch.device("cpu")
SIZES = [(120, 120), (120, 120), (200, 100), (96, 150), (120, 120), (200, 100), (300, 110)]
SHORT = ["--train.eval_every", "0", "--train.score_prompts", "0", "--sample.images", "2", "--sample.steps", "2", "--optim.schedule_steps", "12"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """61 pictures, about a fifth of them held out: squares, wide and tall ones, and a few so wide that they do not fill a batch."""
    folder = tmp_path_factory.mktemp("buckets")
    source = pictures(folder / "source", 61, SIZES)
    prepare(PrepareOptions(sources=[str(source)], out=folder / "data", buckets="auto", heldout=0.2, workers=1), progress=False)
    return folder / "data"


@pytest.fixture(scope="module")
def words(tiny) -> list[str]:
    return [*tiny, *SHORT]


@pytest.fixture(scope="module")
def model(data, words, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("run") / "wide"
    train(resolve("quickstart", [*words, "--train.steps", "4"]), data, run, progress=False)
    return run


# ---- the order of the world


def test_one_shape_is_the_stream_it_always_was():
    """These numbers were made before there were buckets."""
    assert stream.sample_indices(3, 5, 8, 21).tolist() == [3, 1, 7, 13, 18, 11, 4, 14]
    every = [stream.global_batch(7, step, 32, [np.arange(1000)]) for step in range(100)]
    assert hashlib.sha256(np.concatenate(every).tobytes()).hexdigest()[:16] == "9cf0c9a028f6befe"
    draw = stream.draw(0, 7, 4, (3, 2, 2), 0.5, True, CPU)
    found = [draw.noise.flatten()[5], draw.latent_noise.flatten()[3], draw.uniform[1], draw.choice[2]]
    assert np.allclose([float(x) for x in found], [1.508432, -1.172707, 0.78848, 0.786052], atol=1e-6)
    assert draw.dropped.tolist() == [False, False, False, True]


@pytest.mark.parametrize("counts", [(21, 40, 5), (3, 1, 2), (100, 0, 28), (1, 999)])
def test_every_bucket_is_visited_in_proportion_and_every_sample_as_often(counts):
    """A batch is of one bucket. After any epochs e a bucket of n samples has had floor(e n / batch) batches, also one smaller than a batch."""
    batch, total, epochs = 8, sum(counts), 64
    starts = np.cumsum([0, *counts])
    buckets = [np.arange(starts[k], starts[k + 1]) for k in range(len(counts))]
    steps = sum(epochs * count // batch for count in counts)
    visits, seen, numbers = np.zeros(len(counts), int), np.zeros(total, int), [[] for _ in counts]
    for step in range(steps):
        rows = stream.global_batch(5, step, batch, buckets)
        bucket, number = stream.bucket_of(5, step, batch, counts)
        assert len(rows) == batch and set(rows) <= set(buckets[bucket].tolist())
        visits[bucket] += 1
        numbers[bucket].append(number)
        np.add.at(seen, rows, 1)
    assert visits.tolist() == [epochs * count // batch for count in counts]
    assert all(found == list(range(len(found))) for found in numbers), "each bucket's batches one after the other"
    for rows, count, visited in zip(buckets, counts, visits):
        if count:
            assert seen[rows].max() - seen[rows].min() <= 1 and seen[rows].sum() == visited * batch


def test_buckets_are_mixed_within_an_epoch():
    order = [stream.bucket_of(0, step, 8, (400, 400))[0] for step in range(100)]
    assert 40 <= sum(order) <= 60 and sum(a != b for a, b in zip(order, order[1:])) > 25
    assert order != [stream.bucket_of(1, step, 8, (400, 400))[0] for step in range(100)]


def test_seek_is_at_once_and_equal_and_ranks_share_a_batch():
    buckets = [np.arange(30), np.arange(30, 45), np.arange(45, 48)]
    walked = list(zip(range(2000), stream.StepSampler(5, buckets, 12, 12, 0, 1, first_step=0)))
    for step in (7, 400, 1999):
        assert next(iter(stream.StepSampler(5, buckets, 12, 12, 0, 1, first_step=step))) == walked[step][1]
    far = next(iter(stream.StepSampler(5, buckets, 12, 12, 0, 1, first_step=10**7)))
    assert len(far) == 12
    for world, micro in ((2, 6), (2, 3), (4, 1)):
        parts = [stream.StepSampler(5, buckets, 12, micro, rank, world, first_step=400, last_step=401) for rank in range(world)]
        assert [row for part in parts for rows in part for row in rows] == walked[400][1]


# ---- training


def seen_by(config, data, run, monkeypatch, resume=None) -> list:
    """(step, samples, noise) of every global batch of a training."""
    seen: dict[int, list] = {}
    forward = Trainer.forward

    def noting(self, module, batch, draw, t, part):
        if batch.stored.requires_grad is False and module is self.wrapped and self.first <= self.step:
            rows = zip(batch.index.tolist(), draw.noise[part].flatten(1)[:, 0].tolist())
            seen.setdefault(self.step, []).append((part.start, tuple(batch.stored.shape[2:]), list(rows)))
        return forward(self, module, batch, draw, t, part)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "forward", noting)
        train(config, data, run, resume, progress=False)
    out = []
    for step, parts in sorted(seen.items()):
        assert len({shape for _, shape, _ in parts}) == 1, "a global batch is of one shape"
        out.append((step, parts[0][1], [row for _, _, rows in sorted(parts) for row in rows]))
    return out


def test_a_resume_and_other_micro_batches_see_the_same(data, words, tmp_path, monkeypatch):
    quick = [*words, "--train.dry_run", "false"]
    make = lambda steps, *more: resolve("quickstart", [*quick, "--train.steps", str(steps), *more])
    whole = seen_by(make(10), data, tmp_path / "whole", monkeypatch)
    small = seen_by(make(10, "--train.micro_batch", "2"), data, tmp_path / "small", monkeypatch)
    assert whole == small and len({shape for _, shape, _ in whole}) >= 3
    first = seen_by(make(4), data, tmp_path / "cut", monkeypatch)
    rest = seen_by(make(10), data, tmp_path / "cut", monkeypatch, "latest")
    assert first + rest == whole
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    ours, theirs = (load_file(sorted((tmp_path / name / "checkpoints").glob("step_*"))[-1] / "model.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_ranks_ddp_and_fsdp_see_the_same(data, words, tmp_path):
    """Two ranks, accumulation, activations checkpointed: the stream and the weights of one rank."""
    from test_ranks import ranks, same_weights, stream_of

    common = ["--config", "quickstart", "--data", str(data), *words, "--optim.name", "adamw", "--train.ema", "0.9", "--train.steps", "8"]
    jobs = [{"train": [*common, "--out", str(tmp_path / "one"), "--train.micro_batch", "4"]}]
    more = ["--train.micro_batch", "2", "--train.checkpoint_activations", "true"]
    both = [{"train": [*common, *more, "--out", str(tmp_path / how), "--train.parallel", how]} for how in ("ddp", "fsdp")]
    alone, _ = ranks(1, jobs, tmp_path / "alone")
    two, told = ranks(2, both, tmp_path / "two")
    assert [[job["status"] for job in rank] for rank in two] == [[0, 0], [0, 0]], told
    assert stream_of(alone, 0) == stream_of(two, 0) == stream_of(two, 1)
    for how in ("ddp", "fsdp"):
        newest = [sorted((tmp_path / name / "checkpoints").glob("step_*"))[-1] for name in ("one", how)]
        assert same_weights(*newest, 2e-5), how


@pytest.mark.slow
def test_compiled_blocks_take_every_shape_and_resume_alike(data, words, tmp_path):
    from flowt2i.training.compiling import has_compiler

    if not has_compiler():
        pytest.skip("no C++ compiler")
    quick = [*words, "--train.dry_run", "false", "--train.compile", "on"]
    make = lambda steps: resolve("quickstart", [*quick, "--train.steps", str(steps)])
    train(make(8), data, tmp_path / "whole", progress=False)
    train(make(3), data, tmp_path / "cut", progress=False)
    torch.compiler.reset()
    train(make(8), data, tmp_path / "cut", "latest", progress=False)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_the_memory_probe_takes_the_largest_shape(data, words, tmp_path):
    trainer = Trainer(resolve("quickstart", [*words, "--train.steps", "2"]), data, tmp_path / "run", progress=False)
    shapes_seen = []
    trainer.objective.register_forward_pre_hook(lambda module, inputs: shapes_seen.append(inputs[0].shape))
    _probe(trainer, 3)
    trainer.close()
    assert shapes_seen == [(3, 3, 88, 48)]


def test_a_part_of_the_data_has_the_shapes_of_that_part(data, words, tmp_path, monkeypatch):
    config = resolve("quickstart", [*words, "--train.steps", "6", "--data.subset", "5", "--train.dry_run", "false"])
    seen = seen_by(config, data, tmp_path / "run", monkeypatch)
    assert {row for _, _, rows in seen for row, _ in rows} <= set(range(5))


def test_validation_counts_every_heldout_picture_once():
    seen: list[int] = []

    def loss(rows, t, draw):
        assert draw.noise.shape[1:] == ((3, 4, 4) if rows[0] in (0, 3, 4) else (3, 8, 2))
        seen.extend(rows.tolist())
        return torch.from_numpy(rows).float()

    images = [(np.array([0, 3, 4]), (3, 4, 4)), (np.zeros(0, np.int64), (3, 2, 8)), (np.array([1, 2]), (3, 8, 2))]
    found = validation_loss(loss, images, 2, False, World(0, 1, CPU))
    assert sorted(seen) == [0, 1, 2, 3, 4] and found["loss"] == 2


def test_a_run_on_buckets_leaves_a_loss_and_a_preview(model):
    line = json.loads((model / "eval.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(line["validation"]["loss"]) and list((model / "samples").glob("*.png"))


def test_a_patch_that_does_not_fit_a_bucket_is_refused(data, words, tmp_path):
    with pytest.raises(UserError, match=r"model.patch 16 does not divide the 48x88 pictures.*such as 48x96 .--bucket-step 16"):
        Trainer(resolve("quickstart", [*words, "--model.patch", "16"]), data, tmp_path / "run", progress=False)


# ---- drawing


def test_a_model_draws_in_its_shapes_and_others(model):
    pipeline = Pipeline.from_pretrained(model, device="cpu")
    assert pipeline.sample("a picture").images.shape == (1, 64, 64, 3)
    for width, height in (*pipeline.description.sizes, (128, 32), (8, 8)):
        samples = pipeline.sample(["a picture", "another"], width=width, height=height, seed=3)
        assert samples.images.shape == (2, height, width, 3)
    told = pipeline.sample("a picture", width=88, height=48).pictures()[0]
    again = pipeline.redraw(told)
    assert again.settings["width"] == 88 and np.array_equal(again.images[0], np.asarray(told))
    assert "width" not in pipeline.sample("a picture", width=64, height=64).settings


@pytest.mark.parametrize(
    ("size", "told"),
    [
        ((90, 48), "90x48 pixels cannot be made: this model makes sides that are multiples of 8, such as 88x48"),
        ((4, 4), "such as 8x8"),
        ((0, 64), "such as 8x64"),
        ((8192, 64), "4096 a side at most"),
        ((64, None), "^width 64: give width and height, both"),
        ((64.0, 64), "both in whole pixels"),
    ],
)
def test_sizes_that_cannot_be_are_refused(model, size, told):
    with pytest.raises(UserError, match=told):
        Pipeline.from_pretrained(model, device="cpu").sample("a picture", width=size[0], height=size[1])


def test_a_picture_to_start_from_decides_the_shape(model, tmp_path):
    Image.new("RGB", (200, 100), (250, 0, 0)).save(tmp_path / "wide.png")
    mask = Image.new("L", (200, 100), 0)
    mask.paste(255, (0, 0, 60, 100))
    mask.save(tmp_path / "mask.png")
    pipeline = Pipeline.from_pretrained(model, device="cpu")
    samples = pipeline.sample("a picture", init=tmp_path / "wide.png", mask=tmp_path / "mask.png", steps=2)
    assert samples.images.shape == (1, 48, 88, 3)
    assert (samples.images[0, :, 40:] == (250, 0, 0)).all(), "outside the mask it stays"
    assert np.array_equal(pipeline.redraw(samples.pictures()[0]).images, samples.images)
    assert pipeline.sample("a picture", init=tmp_path / "wide.png", width=64, height=64).images.shape == (1, 64, 64, 3)
    square = pipeline.sample("a picture", init=tmp_path / "wide.png", width=64, height=64, steps=2)
    assert np.array_equal(pipeline.redraw(square.pictures()[0]).images, square.images)


def test_a_batch_of_given_seeds(model):
    pipeline = Pipeline.from_pretrained(model, device="cpu")
    both = pipeline.sample(["a", "b"], seeds=[7, 3]).images
    assert np.array_equal(both[1], pipeline.sample("b", seed=3).images[0])
    with pytest.raises(UserError, match="one for each prompt"):
        pipeline.sample(["a", "b"], seeds=[7])


def test_generate(model, tmp_path, one_line, capsys):
    out = tmp_path / "wide.png"
    assert main(["generate", "a picture", "--model", str(model), "--out", str(out), "--width", "104", "--height", "40"]) == 0
    with Image.open(out) as image:
        assert image.size == (104, 40)
        first = np.asarray(image)
    assert main(["generate", "--like", str(out), "--model", str(model), "--out", str(tmp_path / "again.png")]) == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again.png")), first)
    capsys.readouterr()
    assert main(["generate", "a picture", "--model", str(model), "--out", str(out), "--width", "100", "--height", "40"]) == 2
    assert "such as 96x40" in one_line()


def test_data_like_a_model_has_its_shapes(model, data, tmp_path):
    source = pictures(tmp_path / "own", 12, [(300, 110), (100, 100)])
    options = PrepareOptions.of(sources=[str(source)], like=str(model), out=tmp_path / "like", workers=1)
    prepare(options, progress=False)
    told = json.loads((tmp_path / "like/dataset.json").read_text())
    with pytest.raises(UserError, match="60x68 cannot be made: codec and patch make sides that are multiples of 8, such as 64x64"):
        wrong = PrepareOptions.of(sources=[str(source)], like=str(model), out=tmp_path / "wrong", buckets="60x68")
        prepare(wrong, progress=False)
    assert [shapes.name((b["width"], b["height"])) for b in told["buckets"]] == ["64x64", "104x40"]
