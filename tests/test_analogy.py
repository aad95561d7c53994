"""Drawing a subject by analogy with its other styles, and more of its own: formulas in closed form, drawings of a tiny model, costs, what is left alone."""

import json

import numpy as np
import pytest
import torch

from flowt2i import Pipeline
from flowt2i.cli import apart, main
from flowt2i.config import SampleConfig, resolve
from flowt2i.description import DatasetDescription
from flowt2i.drawing import Noise
from flowt2i.errors import UserError
from flowt2i.evaluation.pictures import Drawing
from flowt2i.guidance import analogous, contrasted
from flowt2i.settings import telling
from flowt2i.styles import compared, parted
from flowt2i.training import start
from flowt2i.training.pace import of_a_picture

STYLES = ["flat style", "old style", "round style"]
STYLED, PLAIN = "a red circle, flat style", "a red circle"


@pytest.fixture(scope="module")
def pipeline(shaken):
    shaken.config.sample = SampleConfig(steps=4, styles=STYLES, analogy_until=0.3, style_contrast_until=0.6)
    return shaken


def test_where_subject_and_style_add_up_nothing_changes():
    g = torch.Generator().manual_seed(0)
    subject, *styles = torch.randn(4, 2, 3, 4, 4, generator=g).unbind()
    good, others = subject + styles[0], [(subject + style, style) for style in styles[1:]]
    for share in (0.0, 0.5, 1.0):
        assert torch.allclose(analogous(good, styles[0], others, share), good, atol=1e-6)


def test_what_a_subject_adds_is_learned_from_its_other_styles():
    """In numbers: it adds 1 to this style, 3 and 5 to the others."""
    style, others = torch.tensor(10.0), [(torch.tensor(23.0), torch.tensor(20.0)), (torch.tensor(35.0), torch.tensor(30.0))]
    found = [analogous(torch.tensor(11.0), style, others, share).item() for share in (0.0, 0.5, 1.0)]
    assert found == [11.0, 12.5, 14.0]


def test_contrast_adds_what_sets_a_style_apart():
    good, style, others = torch.tensor(10.0), torch.tensor(7.0), [torch.tensor(4.0), torch.tensor(6.0)]
    assert [contrasted(good, style, others, weight).item() for weight in (0.0, 0.5, 2.0)] == [10.0, 11.0, 14.0]
    assert contrasted(good, style, [style, style], 3.0) == good  # where styles do not matter nothing changes


def test_what_a_caption_is_compared_with():
    captions = [parted(caption) for caption in (STYLED, "a dog, big, old style", PLAIN, "a cat, other style")]
    assert [list(column) for column in zip(*compared(captions, STYLES))] == [
        ["flat style", "a red circle, old style", "old style", "a red circle, round style", "round style"],
        ["old style", "a dog, big, flat style", "flat style", "a dog, big, round style", "round style"],
        ["", PLAIN, "", PLAIN, ""],
        ["", "a cat, other style", "", "a cat, other style", ""],
    ]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_drawing_follows_the_formula_while_it_is_early(pipeline, guidance):
    """One Euler step after another from the same noise, by hand."""
    found = pipeline.sample(STYLED, seed=5, guidance=guidance, analogy=0.5, style_contrast=0.25)
    z, times = Noise([5], (3, 64, 64), pipeline.device)(), torch.linspace(0, 1, 5)
    with torch.inference_mode():
        text, mask = pipeline.encode([STYLED, "", "flat style", f"{PLAIN}, old style", "old style", f"{PLAIN}, round style", "round style"])
        for t, after in zip(times, times[1:]):
            good, empty, style, *told = pipeline.field(z.repeat(7, 1, 1, 1), t, text, mask).split(1)
            if t < 0.3:
                good = analogous(good, style, [(told[0], told[1]), (told[2], told[3])], 0.5)
            if t < 0.6:
                good = contrasted(good, style, [told[1], told[3]], 0.25)
            z = z + (after - t) * (empty + guidance * (good - empty))
    assert np.abs(pipeline.to_images(z).astype(int) - found.images.astype(int)).max() <= 1
    assert found.evaluations == 4 * int(guidance) + 2 * 5 + 3  # captions beside a picture's own: five in the first two steps, then three in one


def test_when_it_ends_is_told_where_it_acts(pipeline):
    off, on = (telling(pipeline.settings(style_contrast=weight)) for weight in (0.0, 0.5))
    assert "style_contrast_until" not in off and on["style_contrast_until"] == 0.6 and "analogy_until" not in on


def test_only_captions_in_a_style_are_changed_and_cost_more(pipeline):
    settings = {"seed": 5, "guidance": 2.0}
    plain, same = (pipeline.sample(PLAIN, analogy=share, **settings) for share in (0.0, 0.5))
    assert np.array_equal(plain.images, same.images) and plain.evaluations == same.evaluations == 8
    without, styled = (pipeline.sample(STYLED, analogy=share, **settings) for share in (0.0, 0.5))
    assert np.abs(without.images.astype(int) - styled.images.astype(int)).max() > 10
    both = pipeline.sample([STYLED, PLAIN], seeds=[5, 5], analogy=0.5, guidance=2.0).images
    for alone, beside in zip((styled, plain), both):  # a picture does not depend on its neighbours
        assert np.abs(alone.images[0].astype(int) - beside.astype(int)).max() <= 1
    apart = pipeline.sample([STYLED, PLAIN], seeds=[5, 5], style_contrast=1.0, guidance=2.0)
    assert np.abs(apart.images[0].astype(int) - without.images[0].astype(int)).max() > 10 and apart.evaluations == 8 + 3 * 3
    assert np.abs(apart.images[1].astype(int) - plain.images[0].astype(int)).max() <= 1
    over = pipeline.sample(STYLED, analogy=0.5, analogy_until=0.0, **settings)
    assert np.array_equal(over.images, without.images) and over.evaluations == 8


def test_between_two_prompts_each_has_its_own(pipeline):
    other = "a blue star, old style"
    ends = [pipeline.sample(prompt, seed=5, analogy=0.5).images for prompt in (STYLED, other)]
    for mix, end in zip((0.0, 1.0), ends):
        mixed = pipeline.sample(STYLED, seed=5, to=other, mix=mix, analogy=0.5).images
        assert np.abs(mixed.astype(int) - end.astype(int)).max() <= 1


def test_the_cost_of_a_picture_is_told_before_it_is_drawn(pipeline):
    sample = SampleConfig(steps=4, styles=STYLES, analogy=0.5, analogy_until=0.3, guidance=2.0)
    assert of_a_picture(sample, 4) == pipeline.sample(STYLED, analogy=0.5, guidance=2.0).evaluations
    both = sample.model_copy(update={"style_contrast": 0.5, "style_contrast_until": 0.6})
    assert of_a_picture(both, 4) == pipeline.sample(STYLED, analogy=0.5, style_contrast=0.5, guidance=2.0).evaluations
    assert of_a_picture(sample.model_copy(update={"analogy": 0.0}), 4) == 8


def test_pictures_say_it_and_are_drawn_again(pipeline, tmp_path):
    first = pipeline.sample(STYLED, seed=5, analogy=0.5, style_contrast=0.5)
    first.pictures()[0].save(tmp_path / "one.png")
    told = json.loads(first.pictures()[0].info["flowt2i"])
    assert told["analogy"] == 0.5 and told["analogy_until"] == 0.3 and told["style_contrast"] == 0.5 and told["style_contrast_until"] == 0.6
    assert np.array_equal(pipeline.redraw(told).images, first.images)
    older = {name: value for name, value in told.items() if not name.startswith(("analogy", "style_"))}
    own = pipeline.config.sample
    pipeline.config.sample = own.model_copy(update={"analogy": 0.5, "style_contrast": 0.5})  # the model's own by now, but not when that picture was drawn
    try:
        assert np.array_equal(pipeline.redraw(older).images, pipeline.sample(STYLED, seed=5, analogy=0.0, style_contrast=0.0).images)
        pipeline.config.sample = own.model_copy(update={"styles": []})  # another model
        assert np.array_equal(pipeline.redraw(told).images, pipeline.sample(STYLED, seed=5).images)
    finally:
        pipeline.config.sample = own


def test_a_model_that_goes_on_with_other_data_has_no_styles_until_it_is_told(tiny_run, scenes_data):
    found = start.find(tiny_run)
    found.config.sample.styles, found.config.sample.analogy, found.config.sample.style_contrast = STYLES, 0.5, 0.5
    data = DatasetDescription.load(scenes_data)
    same = start.configuration("tiny", found, data, []).sample
    assert (same.styles, same.analogy, same.style_contrast) == (STYLES, 0.5, 0.5)
    other = data.model_copy(update={"fingerprint": "0" * len(data.fingerprint)})
    without = start.configuration("tiny", found, other, []).sample
    assert (without.styles, without.analogy, without.style_contrast) == ([], 0, 0)
    asked = start.configuration("tiny", found, other, ["--sample.styles", json.dumps(STYLES), "--sample.analogy", "0.3"]).sample
    assert (asked.styles, asked.analogy) == (STYLES, 0.3)


def test_kept_pictures_are_of_their_styles(pipeline):
    prints = set()
    own = pipeline.config.sample
    for styles, share, weight in ((STYLES, 0.5, 0), (STYLES[:2], 0.5, 0), (STYLES, 0, 0.5), (STYLES[:2], 0, 0.5), (STYLES, 0, 0), (STYLES[:2], 0, 0)):
        pipeline.config.sample = own.model_copy(update={"styles": styles})
        prints.add(Drawing(pipeline, [STYLED], 0, {"analogy": share, "style_contrast": weight}).fingerprint())
    pipeline.config.sample = own
    assert len(prints) == 5  # without either styles do not matter


def test_settings_are_told_from_arguments():
    words = ["export", "--sample.guidance", "2", "runs/a", "--to", "x", "--flow.logit_mean", "-0.8", "--sample.steps=7", "runs/b", "--train.ema", "--json"]
    assert apart(words) == (
        ["export", "runs/a", "--to", "x", "runs/b", "--json"],
        ["--sample.guidance", "2", "--flow.logit_mean", "-0.8", "--sample.steps=7", "--train.ema"],
    )


def test_an_export_may_draw_otherwise(tiny_run, tmp_path, capsys):
    words = ["export", str(tiny_run), "--to", str(tmp_path / "out"), "--samples", "0"]
    assert main([*words, "--sample.styles", json.dumps(STYLES), "--sample.analogy", "0.5", "--sample.steps=7"]) == 0
    own = Pipeline.from_pretrained(tmp_path / "out", device="cpu").config.sample
    before = Pipeline.from_pretrained(tiny_run, device="cpu").config.sample
    assert own == before.model_copy(update={"styles": STYLES, "analogy": 0.5, "steps": 7})
    before_the_run = ["export", "--to", str(tmp_path / "first"), "--samples", "0", "--sample.guidance", "2", str(tiny_run)]
    assert main(before_the_run) == 0 and Pipeline.from_pretrained(tmp_path / "first", device="cpu").config.sample.guidance == 2
    capsys.readouterr()
    for stray, told in (
        (["--licence", "mit"], "unknown option --licence"),
        (["--model.width", "7"], "unknown option --model.width"),
        (["--sample.analogy", "0.5"], "names none"),
        (["--sample.stps", "5"], "no setting --sample.stps"),
        (["--format", "diffusers", "--sample.styles", json.dumps(STYLES), "--sample.style_contrast", "1"], "does not compare styles"),
        (["--format", "diffusers", "--sample.styles", json.dumps(STYLES), "--sample.analogy", "0.5"], "does not compare styles"),
    ):
        assert main([*words, "--force", *stray]) == 2 and told in capsys.readouterr().err
    assert Pipeline.from_pretrained(tmp_path / "out", device="cpu").config.sample == own  # nothing lost


def test_what_cannot_be_is_refused_in_one_line(pipeline, tiny_run, capsys):
    with pytest.raises(UserError, match=r"analogy 2\.0 is out of range"):
        pipeline.sample(STYLED, analogy=2.0)
    with pytest.raises(UserError, match="names none"):
        Pipeline.from_pretrained(tiny_run, device="cpu").sample(STYLED, analogy=0.5)
    with pytest.raises(UserError, match=r"style contrast 11.0 is out of range"):
        pipeline.sample(STYLED, style_contrast=11.0)
    for name in ("analogy", "style_contrast"):
        with pytest.raises(UserError, match="at least two as --sample"):
            resolve("quickstart", [f"--sample.{name}", "0.5"])
    for option in ("--analogy", "--style-contrast"):
        words = ["evaluate", "--images", str(tiny_run), "--data", str(tiny_run), "--metrics", "kid", option, "0.5"]
        assert main(words) == 2 and option in capsys.readouterr().err  # what would do nothing is refused
        assert main(["generate", STYLED, "--model", str(tiny_run), option, "0.5"]) == 2 and "names none" in capsys.readouterr().err
    for styles in ('["flat style", "flat style"]', '["flat, style", "old style"]', '[" "]'):
        with pytest.raises(UserError, match="different texts without a comma"):
            resolve("quickstart", ["--sample.styles", styles])
    assert resolve("quickstart", ["--sample.styles", json.dumps(STYLES), "--sample.analogy", "0.4"]).sample.styles == STYLES
    assert parted(STYLED).style in STYLES
