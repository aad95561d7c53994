"""Settings, editing and metadata of drawings, on a tiny trained model and from the command line."""

import json
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from flowt2i import Pipeline, editing, flow
from flowt2i import settings as choices
from flowt2i.cli import main
from flowt2i.config import SampleConfig, SolverName, resolve
from flowt2i.drawing import given_picture
from flowt2i.errors import UserError
from flowt2i.pictures import read_settings, save_png
from flowt2i.solvers import EVALUATIONS, SOLVERS
from flowt2i.training import checkpoint
from flowt2i.training.compiling import has_compiler

PROMPT, OTHER = "a red circle", "three small blue stars on a white background"


@pytest.fixture(scope="module")
def pipeline(shaken):
    shaken.config.sample = SampleConfig()  # Euler's even steps: what a setting changes is told from what the preset's own would
    return shaken


@pytest.fixture(scope="module")
def weaker(tiny_run):
    return checkpoint.folder(tiny_run, min(checkpoint.list_steps(tiny_run)))


@pytest.fixture
def circle(tmp_path):
    """A picture to start from, larger than the model's, and a mask of its left half."""
    y, x = np.mgrid[:96, :96]
    pixels = np.full((96, 96, 3), (230, 220, 40), np.uint8)
    pixels[(y - 48) ** 2 + (x - 48) ** 2 < 900] = (20, 40, 200)
    Image.fromarray(pixels).save(tmp_path / "circle.png")
    Image.fromarray(np.where(x < 48, 255, 0).astype(np.uint8)).save(tmp_path / "left.png")
    return tmp_path / "circle.png", tmp_path / "left.png"


def test_the_configuration_knows_every_solver():
    assert set(get_args(SolverName)) == set(SOLVERS)
    with pytest.raises(UserError, match="'uniform'"):
        resolve("quickstart", ["--sample.schedule", "unifrom"])
    assert resolve("quickstart", ["--sample.schedule", "0,0.1,1", "--sample.solver", "ab2"]).sample.schedule == "0,0.1,1"


def differ(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_evaluations_are_counted_for_every_solver(pipeline, solver, guidance):
    calls, field = [], pipeline.field
    pipeline.field = lambda z, t, text, mask: calls.append((len(z), float(t))) or field(z, t, text, mask)
    try:
        samples = pipeline.sample([PROMPT, OTHER], steps=4, solver=solver, guidance=guidance, tolerance=0.05)
    finally:
        del pipeline.field
    assert round(sum(n for n, _ in calls) / 2) == samples.evaluations and max(t for _, t in calls) < 1
    if solver in EVALUATIONS:
        assert samples.evaluations == EVALUATIONS[solver](4) * int(guidance)
    if solver != "dopri5":
        assert {n for n, _ in calls} == {2 * int(guidance)}, "guidance in one batch"


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_picture_does_not_depend_on_its_batch(pipeline, solver):
    settings = {"steps": 4, "solver": solver, "tolerance": 0.05, "guidance": 2.0}
    together = pipeline.sample([PROMPT, OTHER], seed=3, **settings).images
    assert differ(together[1], pipeline.sample(OTHER, seed=4, **settings).images[0]) <= 4  # of 255: a network of random weights enlarges rounding
    assert differ(together[0], together[1]) > 10


def test_captions_are_encoded_once_a_batch(pipeline):
    calls, encode = [], pipeline.model.encode_captions
    pipeline.model.encode_captions = lambda ids, mask: calls.append(len(ids)) or encode(ids, mask)
    try:
        pipeline.sample([PROMPT, OTHER], steps=3, guidance=2.0)
        pipeline.sample([PROMPT, OTHER], steps=3, guidance=1.0)
    finally:
        del pipeline.model.encode_captions
    assert calls == [4, 2]


def test_an_interval_saves_evaluations(pipeline):
    times = {"steps": 4, "schedule": "0,0.1,0.4,0.7,1"}
    assert pipeline.sample(PROMPT, guidance=2.0, guidance_from=0.3, guidance_until=0.5, **times).evaluations == 5
    plain, empty = (pipeline.sample(PROMPT, guidance=g, guidance_from=f, **times).images for g, f in ((1.0, 0.0), (2.0, 0.9)))
    assert np.array_equal(plain, empty)


def test_each_kind_of_guidance_draws_something_else(pipeline, weaker):
    kinds = [{}, {"guidance_rule": "zero-star"}, {"guidance_rescale": 0.7}, {"negative": OTHER}, {"guide": weaker}, {"zero_init": 0.3}]
    drawn = [pipeline.sample(PROMPT, steps=4, guidance=4.0, **kind) for kind in kinds]
    assert all(differ(a.images, b.images) > 1 for i, a in enumerate(drawn) for b in drawn[:i])
    assert [s.evaluations for s in drawn] == [8, 8, 8, 8, 8, 6], "a guide costs an evaluation as the empty caption does"
    own = pipeline.sample(PROMPT, steps=4, guidance=4.0, guide=pipeline).images
    assert differ(own, pipeline.sample(PROMPT, steps=4, guidance=1.0).images) <= 1, "a model that guides itself changes nothing"


def test_the_negative_prompt_takes_the_place_of_the_empty_one(pipeline):
    same = pipeline.sample(PROMPT, steps=4, guidance=3.0, negative=PROMPT).images
    assert differ(same, pipeline.sample(PROMPT, steps=4, guidance=1.0).images) <= 1


def test_compiling_needs_a_compiler(tiny_run, monkeypatch):
    monkeypatch.setattr("flowt2i.pipeline.has_compiler", lambda: False)
    with pytest.raises(UserError, match="compiler"):
        Pipeline.from_pretrained(tiny_run, device="cpu").compile()


def test_on_a_gpu_the_whole_network_is_one_graph(tiny_run, monkeypatch):
    """CUDA graphs, which no test machine of ours runs: what is asked of `torch.compile`, that it gets the network in one piece, and that no output is kept."""
    asked = []
    monkeypatch.setattr("flowt2i.pipeline.has_compiler", lambda: True)
    pipeline, plain = (Pipeline.from_pretrained(tiny_run, device="cpu") for _ in range(2))
    for each in (pipeline, plain):  # as if it said velocities, which solvers keep as they are
        each.model.config = each.model.config.model_copy(update={"prediction": "v"})
    monkeypatch.setattr(type(pipeline.model), "compile", lambda model, **how: asked.append(how))
    device, pipeline.device = pipeline.device, torch.device("cuda")
    pipeline.compile()
    assert asked == [{"mode": "reduce-overhead"}]
    pipeline.device, forward, kept = device, torch.compile(pipeline.model.forward, fullgraph=True, backend="eager"), []

    def overwrites(*inputs):
        for output in kept:
            output.fill_(torch.nan)
        kept.append(forward(*inputs))
        return kept[-1]

    pipeline.model.forward = overwrites
    drawn, same = (p.sample(PROMPT, steps=4, solver="ab2", guidance=1.0).images for p in (pipeline, plain))  # guidance would make new tensors of the outputs
    assert len(kept) == 4 and np.array_equal(drawn, same)


@pytest.mark.slow
@pytest.mark.skipif(not has_compiler(), reason="no compiler")
def test_a_compiled_network_draws_the_same(tiny_run):
    eager, compiled = Pipeline.from_pretrained(tiny_run, device="cpu"), Pipeline.from_pretrained(tiny_run, device="cpu").compile()
    assert differ(compiled.sample(PROMPT, steps=3).images, eager.sample(PROMPT, steps=3).images) <= 2


class TestZeroInit:
    """Drawing begins at T with the noise as it is: the network is first asked at T, whatever the grid and the solver."""

    @pytest.mark.parametrize("solver", ["euler", "ab2", "heun", "rk4", "dopri5", "sde"])
    def test_the_way_begins_at_its_time(self, pipeline, solver):
        asked, field = [], pipeline.field
        pipeline.field = lambda z, t, text, mask: asked.append((float(t), z)) or field(z, t, text, mask)
        try:
            pipeline.sample(PROMPT, steps=8, solver=solver, tolerance=0.05, guidance=1.0, zero_init=0.04, seed=3)
        finally:
            del pipeline.field
        assert min(t for t, _ in asked) == pytest.approx(0.04) == asked[0][0]
        assert torch.equal(asked[0][1], pipeline.initial_noise([3]))

    def test_it_is_as_a_grid_that_begins_there(self, pipeline):
        nearly_zero = {"zero_init": 1e-7}  # as near as that because the shaken network leans hard on its time
        zero, plain = (pipeline.sample(PROMPT, steps=4, guidance=2.0, **settings).images for settings in (nearly_zero, {}))
        assert differ(zero, plain) <= 2, "a step that begins just before T does not stand still for its whole length"
        assert pipeline.sample(PROMPT, schedule="0,0.1,0.4,0.7,1", guidance=2.0, zero_init=0.05).evaluations == 8
        assert pipeline.sample(PROMPT, schedule="0,0.1,0.4,0.7,1", guidance=2.0, zero_init=0.09).evaluations == 6

    def test_what_is_kept_is_on_its_path_when_it_begins(self, pipeline, circle):
        asked, field = [], pipeline.field
        pipeline.field = lambda z, t, text, mask: asked.append((float(t), z)) or field(z, t, text, mask)
        try:
            pipeline.sample(PROMPT, steps=4, guidance=1.0, zero_init=0.3, strength=0.9, init=circle[0], mask=circle[1], seed=3)
        finally:
            del pipeline.field
        given = given_picture(pipeline, circle[0], 0.9, circle[1], [(64, 64)])
        noise, kept = pipeline.initial_noise([3]), (given.latents <= 0.5).expand(1, 3, -1, -1)
        t, z = asked[0]
        assert t == pytest.approx(0.3)
        assert torch.allclose(z[kept], editing.start_from(given.data, noise, 0.7)[kept], atol=1e-5)
        assert torch.allclose(z[~kept], editing.start_from(given.data, noise, 0.9)[~kept], atol=1e-5)


class TestWhichTimes:
    def test_the_models_own_shift_is_for_its_own_schedule(self):
        own = SampleConfig(shift=5.0, steps=8)
        used = lambda **given: tuple(choices.resolve(own, given)[name] for name in ("schedule", "steps", "shift"))
        assert used() == ("uniform", 8, 5.0) and used(steps=4) == ("uniform", 4, 5.0)
        assert used(schedule="quickstart") == ("quickstart", 8, 1.0) and used(schedule="quickstart", shift=2.0) == ("quickstart", 8, 2.0)
        assert used(schedule="0,0.1,0.4,1") == ("0,0.1,0.4,1", 3, 1.0) and used(schedule="0,0.1,0.4,1", steps=6)[1] == 6

    def test_a_written_schedule_of_the_configuration_says_its_steps(self):
        own = SampleConfig(schedule="0,0.1,0.4,1", shift=2.0)
        assert choices.resolve(own, {})["steps"] == 3 and choices.resolve(own, {})["shift"] == 2.0
        assert choices.resolve(own, {"steps": 7})["steps"] == 7 and choices.resolve(own, {"schedule": "uniform"})["steps"] == 50


class TestBetween:
    def test_slerp(self):
        g = torch.Generator().manual_seed(0)
        a, b = torch.randn(2, 3, 16, 16, generator=g), torch.randn(2, 3, 16, 16, generator=g)
        at = lambda share: editing.slerp(a, b, torch.full((2, 1, 1, 1), share))
        assert torch.allclose(at(0.0), a, atol=1e-6) and torch.allclose(at(1.0), b, atol=1e-6)
        lengths = [x.flatten(1).norm(dim=1) for x in (a, b, at(0.5))]
        assert torch.allclose(lengths[2], (lengths[0] + lengths[1]) / 2, rtol=0.05), "as long as noise is"
        assert torch.allclose(editing.slerp(a, a, torch.full((2, 1, 1, 1), 0.3)), a, atol=1e-5)
        a, b = (torch.nn.functional.normalize(x, dim=(1, 2, 3)) for x in (a, b))
        to_a, to_b = ((at(0.5) * x).sum((1, 2, 3)) for x in (a, b))
        assert torch.allclose(to_a, to_b, atol=1e-4), "halfway in angle"

    @pytest.mark.parametrize("solver", ["euler", "sde"])
    @pytest.mark.parametrize("way", [{"to": OTHER}, {"to_seed": 99}, {"to": OTHER, "to_seed": 99}])
    def test_a_way_begins_and_ends_where_it_should(self, pipeline, way, solver):
        drawn = pipeline.sample(PROMPT, steps=4, solver=solver, seed=5, num=3, **way)
        first = pipeline.sample(PROMPT, steps=4, solver=solver, seed=5).images[0]
        last = pipeline.sample(way.get("to", PROMPT), steps=4, solver=solver, seed=way.get("to_seed", 5)).images[0]
        assert differ(drawn.images[0], first) <= 1 and differ(drawn.images[2], last) <= 1
        assert differ(drawn.images[1], first) > 1 and differ(drawn.images[1], last) > 1
        assert drawn.evaluations == 4 * (3 if "to" in way else 2) and [b["mix"] for b in drawn.between] == [0, 0.5, 1]

    def test_variations_stay_near(self, pipeline):
        origin = pipeline.sample(PROMPT, steps=4, seed=5).images[0].astype(float)
        near, far = (pipeline.sample(PROMPT, steps=4, seed=5, num=3, variation=v) for v in (0.1, 0.9))
        assert near.seeds == [5, 5, 5] and len({b["to_seed"] for b in near.between}) == 3
        assert np.abs(near.images - origin).mean() < np.abs(far.images - origin).mean()
        assert differ(near.images[0], near.images[1]) > 1
        assert np.array_equal(pipeline.sample(PROMPT, steps=4, seed=5, variation=0.0).images[0], origin)


class TestFromAPicture:
    def test_little_strength_changes_little(self, pipeline, circle, monkeypatch):
        original, _ = editing.load_init(circle[0], None, [(64, 64)])
        monkeypatch.setattr(pipeline, "field", lambda z, *_: torch.zeros_like(z))  # what an untrained network thinks of the picture does not matter
        changes = [np.abs(pipeline.sample(PROMPT, steps=10, init=circle[0], strength=s).images[0] - original.astype(float)).mean() for s in (0.05, 0.4, 1.0)]
        assert changes == sorted(changes)
        assert changes[0] < 12
        monkeypatch.undo()
        fresh = pipeline.sample(PROMPT, steps=10).images
        assert differ(pipeline.sample(PROMPT, steps=10, init=circle[0], strength=1.0).images, fresh) <= 1

    def test_it_costs_its_share_of_the_steps(self, pipeline, circle):
        seen = []
        samples = pipeline.sample(PROMPT, steps=10, guidance=1.0, init=circle[0], strength=0.3, preview=lambda step, steps, images: seen.append((step, steps)))
        assert samples.evaluations == 3 and seen == [(1, 3), (2, 3), (3, 3)]

    @pytest.mark.parametrize("solver", sorted(set(SOLVERS) - {"sde"}))
    def test_what_is_kept_stays_on_its_path_at_every_step(self, solver):
        g = torch.Generator().manual_seed(0)
        data, noise = torch.randn(1, 3, 8, 8, generator=g).double(), torch.randn(2, 3, 8, 8, generator=g).double()
        mask = torch.zeros(1, 1, 8, 8)
        mask[..., :4] = 1
        field = editing.keep_outside(lambda z, t: torch.sin(5 * z + t), data, mask)
        seen = []
        times = torch.tensor([0.2, 0.3, 0.5, 0.9, 1.0], dtype=torch.float64)
        start = editing.start_from(data, noise, 0.8)
        end = SOLVERS[solver](field, start, times, lambda step, t, z, v: seen.append((t, z)))
        for t, z in seen:
            path = flow.interpolate(data.expand(2, -1, -1, -1), noise, t.expand(2))
            assert (torch.allclose(z[..., 4:], path[..., 4:], atol=1e-6) and not torch.allclose(z[..., :4], path[..., :4], atol=1e-3)) or t == times[0]
        assert torch.allclose(end[..., 4:], data[..., 4:].expand(2, -1, -1, -1), atol=1e-6)

    @pytest.mark.parametrize("solver", ["euler", "ab2", "sde"])
    def test_inpainting_keeps_the_dark_part_to_the_pixel(self, pipeline, circle, solver):
        original, mask = editing.load_init(*circle, [(64, 64)])
        samples = pipeline.sample(PROMPT, steps=6, solver=solver, init=circle[0], mask=circle[1])
        assert np.array_equal(samples.images[0][~mask], original[~mask]) and differ(samples.images[0][mask], original[mask]) > 10
        assert mask[:, :31].all() and not mask[:, 33:].any()

    def test_latents_are_drawn_anew_where_any_pixel_is(self):
        mask = torch.zeros(1, 1, 64, 64)
        mask[0, 0, 0, 9] = 1
        small = editing.shrink_mask(mask, (4, 8, 8))
        assert small.sum() == 1 and small[0, 0, 0, 1] == 1
        assert torch.equal(editing.shrink_mask(mask, (3, 64, 64)), mask)


@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "ab2", "schedule": "0,0.05,0.3,1", "guidance_rule": "zero-star", "guidance_from": 0.01, "guidance_until": 0.9},
        {"solver": "sde", "steps": 5, "guidance_rescale": 0.5, "negative": OTHER},
        {"steps": 3, "num": 3, "to": OTHER, "to_seed": 40},
        {"steps": 3, "num": 3, "variation": 0.3},
        {"steps": 5, "init": 0, "mask": 1},
        {"steps": 5, "init": 0, "strength": 0.5, "guide": True},
        {"solver": "dopri5", "tolerance": 0.02},
    ],
)
def test_the_same_picture_again_from_its_metadata(pipeline, weaker, circle, tmp_path, settings):
    places = {name: circle[settings[name]] for name in ("init", "mask") if name in settings} | ({"guide": weaker} if "guide" in settings else {})
    samples = pipeline.sample([PROMPT, OTHER], seed=11, **settings | places)
    picture = samples.pictures()[-1]
    save_png(picture, tmp_path / "a.png")
    again = pipeline.redraw(tmp_path / "a.png")
    assert differ(again.images[0], samples.images[-1]) <= 1
    told = read_settings(again.pictures()[0])
    assert told == read_settings(tmp_path / "a.png") and told["prompt"] == OTHER and told["weights"] == "EMA"
    for name, value in settings.items():
        assert name in (*places, "num", "variation") or told[name] == value


class TestOtherModels:
    """A picture tells which model drew it; another one draws something else, and says so."""

    def test_another_model_or_step_or_weights_is_told(self, pipeline, weaker, recwarn):
        picture = pipeline.sample(PROMPT, steps=2).pictures()[0]
        assert read_settings(picture)["step"] == 4
        pipeline.redraw(picture)
        assert not recwarn.list
        early = Pipeline.from_pretrained(weaker, device="cpu")
        with pytest.warns(UserWarning, match=r"drawn by tiny \(EMA weights, step 4\), and this is .*step 2\)") as told:
            early.redraw(picture)
        assert len(told) == 1 and "\n" not in str(told[0].message)
        with pytest.warns(UserWarning, match=r"drawn by a\?\?\[2Jb, and") as told:
            pipeline.redraw({"prompt": PROMPT, "seed": 0, "steps": 1, "model": "a\n\x1b[2Jb"})

    def test_like_takes_the_weights_of_the_picture(self, tiny_run, tmp_path, capsys):
        common = ["--model", str(tiny_run), "--json"]
        assert main(["generate", PROMPT, "--steps", "2", "--weights", "raw", "--out", str(tmp_path / "a.png"), *common]) == 0
        assert main(["generate", "--like", str(tmp_path / "a.png"), "--out", str(tmp_path / "b.png"), *common]) == 0
        assert "warning" not in capsys.readouterr().err
        assert np.array_equal(Image.open(tmp_path / "a.png"), Image.open(tmp_path / "b.png"))
        assert read_settings(tmp_path / "b.png")["weights"] == "raw"
        assert main(["generate", "--like", str(tmp_path / "a.png"), "--weights", "ema", "--out", str(tmp_path / "c.png"), *common]) == 0
        assert read_settings(tmp_path / "c.png")["weights"] == "EMA"

    def test_a_guide_is_loaded_and_compiled_as_the_model_is(self, tiny_run, weaker, monkeypatch):
        pipeline, asked = Pipeline.from_pretrained(tiny_run, device="cpu", codec="vae", text="t5"), []
        monkeypatch.setattr(Pipeline, "from_pretrained", lambda path, **options: asked.append(options) or Pipeline.__new__(Pipeline))
        monkeypatch.setattr(Pipeline, "compile", lambda self: asked.append("compiled") or self)
        pipeline._compiled = True
        with pytest.raises(AttributeError):  # nothing was loaded, so its description is missing
            pipeline._guide(weaker)
        assert asked == [{"device": torch.device("cpu"), "codec": "vae", "text": "t5"}, "compiled"]


@pytest.mark.parametrize(
    "told, what",
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x", "steps": 2.0}, "steps"),
        ({"prompt": "x", "seed": True}, "seed"),
        ({"prompt": "x", "guidance": "3"}, "guidance"),
        ({"prompt": "x", "guidance": 10**400}, "guidance"),
        ({"prompt": "x", "num": 10**9}, "num"),
        ({"prompt": "x", "preview": "x"}, "preview"),
        ({"prompt": "x", "init": ["a"]}, "init"),
        ({"prompt": "x", "init": "a\0b"}, "init"),
        ({"prompt": "x", "init": "a" * 5000}, "init"),
        ({"prompt": "x", "to_seed": 7, "mix": float("nan")}, "mix"),
        ({"prompts": ["x"]}, "sheet"),
    ],
)
def test_odd_settings_in_a_png_are_told_in_a_line(pipeline, tmp_path, told, what):
    picture = Image.new("RGB", (8, 8))
    picture.info["flowt2i"] = json.dumps(told)
    save_png(picture, tmp_path / "odd.png")
    with pytest.raises(UserError, match=what) as caught:
        pipeline.redraw(tmp_path / "odd.png")
    assert "\n" not in str(caught.value)


def test_pngs_made_to_harm_are_told_in_a_line(pipeline, tmp_path, monkeypatch):
    picture = Image.new("RGB", (8, 8))
    picture.info["flowt2i"] = "[" * 100_000
    save_png(picture, tmp_path / "deep.png")
    with pytest.raises(UserError, match="tells its settings"):
        pipeline.redraw(tmp_path / "deep.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(UserError, match="tells its settings"):
        read_settings(tmp_path / "deep.png")
    with pytest.raises(UserError, match="cannot read"):
        pipeline.sample(PROMPT, init="a\0b")


def test_a_mix_of_a_whole_number_is_a_number(pipeline):
    picture = {"prompt": PROMPT, "seed": 5, "to_seed": 99, "mix": 1, "steps": 2, "shift": 1}
    assert differ(pipeline.redraw(picture).images, pipeline.sample(PROMPT, seed=99, steps=2, shift=1.0).images) <= 1
    pipeline.sample(PROMPT, seed=5, to=OTHER, mix=1, steps=2)


def test_a_mask_fits_a_photograph_as_it_is_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (90, 60), "red").save(tmp_path / "photo.jpg", exif=exif)
    Image.new("L", (60, 90), 255).save(tmp_path / "mask.png")
    assert editing.load_init(tmp_path / "photo.jpg", tmp_path / "mask.png", [(32, 32)])[1].all()
    Image.new("L", (90, 60), 255).save(tmp_path / "mask.png")
    with pytest.raises(UserError, match="90x60 pixels and the picture 60x90"):
        editing.load_init(tmp_path / "photo.jpg", tmp_path / "mask.png", [(32, 32)])


def test_redrawing_needs_the_picture_it_began_with(pipeline, circle, tmp_path):
    picture = pipeline.sample(PROMPT, steps=3, init=circle[0], mask=circle[1]).pictures()[0]
    Image.new("RGB", (96, 96), "red").save(circle[0])
    with pytest.raises(UserError, match="used before"):
        pipeline.redraw(picture)
    circle[0].unlink()
    with pytest.raises(UserError, match="--init"):
        pipeline.redraw(picture)
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(UserError, match="tells its settings"):
        pipeline.redraw(tmp_path / "plain.png")


@pytest.mark.parametrize("solver", SOLVERS)
def test_previews_of_every_solver(pipeline, solver):
    seen = []
    pipeline.sample(PROMPT, steps=5, solver=solver, tolerance=0.05, preview=lambda step, steps, images: seen.append((step, steps)), preview_every=2)
    assert seen == [(1, 5), (3, 5), (5, 5)]


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"steps": True}, "steps"),
        ({"schedule": "unifrom"}, "'uniform'"),
        ({"schedule": "0,0.5,0.2,1"}, "increase"),
        ({"guidance_from": 0.6, "guidance_until": 0.4}, "interval"),
        ({"guidance_from": float("nan")}, "guidance from"),
        ({"guidance_rescale": 2.0}, "rescale"),
        ({"guidance_rule": "zero"}, "'zero-star'"),
        ({"zero_init": 1.0}, "zero init"),
        ({"shift": 0.001}, "shift"),
        ({"schedule": "0,0.999998,1", "shift": 0.01}, "too near"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"negative": "x", "guidance": 1.0}, "guidance"),
        ({"negative": 5}, "negative"),
        ({"variation": float("nan")}, "variation"),
        ({"variation": 0.5, "to": "x"}, "leave one out"),
        ({"mix": 0.5}, "to_seed"),
        ({"to": " "}, "empty"),
        ({"to_seed": -1}, "seed"),
        ({"strength": 0.5}, "init"),
        ({"sheduel": "uniform"}, "'schedule'"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_settings_out_of_range(pipeline, settings, told):
    with pytest.raises(UserError, match=told):
        pipeline.sample(PROMPT, **settings)


class TestCommandLine:
    def test_from_a_picture_and_again(self, tiny_run, circle, tmp_path, capsys):
        common = ["--model", str(tiny_run), "--steps", "3", "--json"]
        edits = ["--init", str(circle[0]), "--mask", str(circle[1]), "--guidance-interval", "0.1", "0.9", "--guidance-rule", "zero-star", "--solver", "ab2"]
        edits += ["--shift", "1"]
        assert main(["generate", PROMPT, "--out", str(tmp_path / "a.png"), *edits, *common]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["evaluations"] == 5 and result["guidance_from"] == 0.1 and result["mask"] == str(circle[1])
        assert main(["generate", "--like", str(tmp_path / "a.png"), "--out", str(tmp_path / "b.png"), "--model", str(tiny_run)]) == 0
        assert np.array_equal(Image.open(tmp_path / "a.png"), Image.open(tmp_path / "b.png"))
        assert main(["generate", "--like", str(tmp_path / "a.png"), "--out", str(tmp_path / "c.png"), "--guidance", "1", "--model", str(tiny_run)]) == 0
        assert json.loads(Image.open(tmp_path / "c.png").text["flowt2i"])["guidance"] == 1

    def test_a_way_as_a_sheet(self, tiny_run, tmp_path):
        words = ["generate", PROMPT, "--to", OTHER, "--num", "3", "--steps", "2", "--model", str(tiny_run), "--out", str(tmp_path / "way.png")]
        assert main(words) == 0
        assert [b["mix"] for b in json.loads(Image.open(tmp_path / "way.png").text["flowt2i"])["between"]] == [0, 0.5, 1]
        assert json.loads(Image.open(tmp_path / "way-001.png").text["flowt2i"])["mix"] == 0.5

    @pytest.mark.parametrize(
        "words, told",
        [
            (["x", "--steps", "-1"], "steps -1"),
            (["x", "--num", "1000000000"], "--num 1000000000"),
            (["x", "--steps", "nan"], "invalid int"),
            (["x", "--steps", "1000000000"], "steps 1000000000"),
            (["x", "--guidance", "inf"], "guidance inf"),
            (["x", "--guidance", "nan"], "guidance nan"),
            (["x", "--solver", "hein"], "'heun'"),
            (["x", "--schedule", "0,2,1"], "increase"),
            (["x", "--guidance-interval", "0.8", "0.2"], "empty"),
            (["x", "--guidance-interval", "0", "nan"], "nan"),
            (["x", "--init", "/nowhere.png"], "/nowhere.png"),
            (["x", "--init", "SMALL", "--mask", "MASK"], "same size"),
            (["x", "--init", "TEXT"], "not a picture"),
            (["x", "--init", "SMALL", "--strength", "0"], "strength"),
            (["x", "--init", "SMALL", "--strength", "inf"], "strength"),
            (["x", "--mask", "MASK"], "init"),
            (["x", "--guide", "/nowhere"], "no model at /nowhere"),
            (["x", "--like", "SMALL"], "--like"),
            (["--like", "SMALL"], "settings"),
            (["--like", "/nowhere.png"], "settings"),
            (["x", "--to-seed", "-3"], "seed"),
            (["x", "--variation", "2"], "variation"),
        ],
    )
    def test_mistakes_are_one_line_and_exit_2(self, words, told, tiny_run, circle, tmp_path, one_line):
        Image.new("RGB", (80, 80)).save(tmp_path / "small.png")
        (tmp_path / "text.txt").write_text("not a picture")
        places = {"SMALL": tmp_path / "small.png", "MASK": circle[1], "TEXT": tmp_path / "text.txt"}
        words = [str(places.get(w, w)) for w in words]
        try:
            status = main(["generate", *words, "--model", str(tiny_run), "--out", str(tmp_path / "o.png")])
        except SystemExit as stop:  # argparse's own
            status = stop.code
        assert status == 2 and told in one_line()

    def test_evaluate_tells_its_settings(self, tiny_run, weaker, capsys):
        words = ["evaluate", "--model", str(tiny_run), "--num", "4", "--steps", "2", "--solver", "ab2", "--guidance-rescale", "0.5", "--guide", str(weaker)]
        assert main([*words, "--json"]) == 0
        protocol = json.loads(capsys.readouterr().out.splitlines()[-1])["protocol"]
        assert "ab2 2 steps" in protocol and "guidance rescale 0.5" in protocol and f"guide {weaker.name}@" in protocol


def test_a_drawing_ends_at_the_next_evaluation_when_asked(pipeline):
    asked = []

    def alive():
        asked.append(0)
        if len(asked) == 6:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        pipeline.sample(PROMPT, steps=100, solver="rk4", alive=alive)
    assert len(asked) == 6
