"""The built-in pictures are what their captions say, and the checker tells when a picture is not."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest

from flowt2i.data import scenes
from flowt2i.data.scenes import BACKGROUNDS, COLOURS, HELD_OUT, PHRASES, RELATIONS, SHAPES, SIZES, Scene, Thing
from flowt2i.data.scenes_check import check, look
from flowt2i.errors import UserError


def pairs_of(scene):
    return {(thing.colour, thing.shape) for thing in scene.things}


def rate(images_and_captions, atom="all"):
    """Share of the pictures in which an atom holds, among those whose caption states it."""
    verdicts = [getattr(check(image, text), atom) for image, text in images_and_captions]
    stated = [verdict for verdict in verdicts if verdict is not None]
    return sum(stated) / len(stated)


def to_uint8(image):
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def blurred(image, sigma):
    reach = np.arange(len(image))
    kernel = np.exp(-0.5 * ((reach[:, None] - reach) / sigma) ** 2)
    kernel /= kernel.sum(1, keepdims=True)
    return np.stack([kernel @ image[:, :, channel] @ kernel.T for channel in range(3)], axis=2)


def swapped_colours(scene):
    """The scene with the colours of its two things swapped, or of its only thing changed."""
    if len(scene.things) == 2:
        first, second = scene.things
        return replace(scene, things=(replace(first, colour=second.colour), replace(second, colour=first.colour)))
    names = list(COLOURS)
    thing = scene.things[0]
    return replace(scene, things=(replace(thing, colour=names[(names.index(thing.colour) + 3) % len(names)]),))


# ---------------------------------------------------------------- scenes and captions


def test_a_sample_depends_on_seed_and_index_alone():
    first, again = scenes.sample(3, 17), scenes.sample(3, 17)
    assert first[0].tobytes() == again[0].tobytes() and first[1] == again[1]
    assert first[0].shape == (64, 64, 3) and first[0].dtype == np.uint8
    assert scenes.sample(3, 17, size=96)[0].shape == (96, 96, 3)
    assert len({scenes.sample(seed, index)[0].tobytes() for seed in (0, 1) for index in range(100)}) == 200
    assert scenes.scene_at(0, 5) != scenes.scene_at(0, 5, heldout=True)


def test_scenes_stay_the_same_between_versions():
    assert [scenes.caption(scenes.scene_at(0, index)) for index in range(3)] == [
        "an image of four small yellow circles",
        "on a mint background, an image of a large yellow cross right of a large yellow circle",
        "an image of a large purple star",
    ]


def test_training_scenes_never_use_a_held_out_pair():
    assert not any(pairs_of(scenes.scene_at(0, index)) & HELD_OUT for index in range(5000))
    assert all(pairs_of(scenes.scene_at(0, index, heldout=True)) & HELD_OUT for index in range(1000))
    assert {colour for colour, _ in HELD_OUT} == set(COLOURS) and {shape for _, shape in HELD_OUT} == set(SHAPES)


def test_every_atom_and_phrasing_occurs():
    drawn = [scenes.scene_at(1, index) for index in range(6000)]
    things = [thing for scene in drawn for thing in scene.things]
    seen = {(t.colour, t.shape, t.size) for t in things}
    assert seen == {(c, s, z) for c, s, z in product(COLOURS, SHAPES, SIZES) if (c, s) not in HELD_OUT}
    assert {t.count for t in things} == {1, 2, 3, 4}
    assert {scene.background for scene in drawn} == set(BACKGROUNDS)
    assert {scene.relation for scene in drawn} == {None, *RELATIONS}
    kinds = Counter("relation" if s.relation else "one" if s.things[0].count == 1 else "many" for s in drawn)
    assert 0.37 < kinds["one"] / 6000 < 0.43 and 0.17 < kinds["many"] / 6000 < 0.23
    captions = [scenes.caption(scene) for scene in drawn]
    said = {(kind, phrase) for kind, pattern, phrase in _patterns() for text in _without_grounds(captions) if pattern.fullmatch(text)}
    assert said == {(kind, phrase) for kind, phrases in PHRASES.items() for phrase in phrases}
    assert all(any(ground.fullmatch(text) for text in captions) for ground in scenes._grounds())
    assert max(len(text.split()) for text in captions) <= 20


def _patterns():
    phrases = [phrase for phrases in PHRASES.values() for phrase in phrases]
    return [(kind, pattern, phrase) for (kind, pattern), phrase in zip(scenes._phrases(), phrases)]


def _without_grounds(captions):
    matches = [next((m for g in scenes._grounds() if (m := g.fullmatch(text))), None) for text in captions]
    return {match["x"] if match else text for match, text in zip(matches, captions)}


def test_captions_read_back():
    left_open = Counter()
    for index in range(4000):
        scene = scenes.scene_at(2, index, heldout=index % 4 == 0)
        read = scenes.parse(scenes.caption(scene))
        sizes = [thing.size for thing in read.things]
        assert read.relation == scene.relation and read.background in (None, scene.background)
        assert sizes in ([None] * len(sizes), [thing.size for thing in scene.things])
        assert [replace(thing, size=None) for thing in read.things] == [replace(thing, size=None) for thing in scene.things]
        left_open["size"] += sizes[0] is None
        left_open["background"] += read.background is None
    assert 800 < left_open["size"] < 1200 and 1400 < left_open["background"] < 1800


def test_reading_forgives_case_and_full_stop():
    assert scenes.parse("  A small RED star on a navy background. ") == Scene((Thing("star", "red", "small"),), None, "navy")


@pytest.mark.parametrize(
    "text, names",
    [
        ("a small red stra", "star"),
        ("", "try"),
        ("a red", "try"),
        ("five red stars", "five"),
        ("a red star on a red background", "try"),
        ("a ringed ring", "ring"),
    ],
)
def test_a_caption_outside_the_grammar_is_refused(text, names):
    with pytest.raises(UserError, match=names) as caught:
        scenes.parse(text)
    assert "\n" not in str(caught.value)


def test_prompts_are_not_the_training_scenes():
    asked = scenes.prompts(0, 300)
    assert asked == scenes.prompts(0, 300) and asked[:100] == scenes.prompts(0, 100)
    assert asked != [scenes.caption(scenes.scene_at(0, index)) for index in range(300)]
    assert not any(pairs_of(scenes.parse(text)) & HELD_OUT for text in asked)
    assert all(pairs_of(scenes.parse(text)) & HELD_OUT for text in scenes.prompts(0, 300, heldout=True))


def test_curated_prompts_show_everything_once():
    read = [scenes.parse(text) for text in scenes.curated_prompts()]
    things = [thing for scene in read for thing in scene.things]
    assert len(set(scenes.curated_prompts())) == 16
    assert {t.shape for t in things} == set(SHAPES) and {t.colour for t in things} == set(COLOURS)
    assert {t.count for t in things} == {1, 2, 3, 4}
    assert {scene.relation for scene in read} == {None, *RELATIONS} and {scene.background for scene in read} == set(BACKGROUNDS)
    assert not any(pairs_of(scene) & HELD_OUT for scene in read)
    assert all(check(scenes.render(replace(scene, seed=seed)), scene).all for scene in read for seed in range(5))


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(UserError, match="at least 16"):
        scenes.sample(0, 0, size=8)
    with pytest.raises(UserError, match="circle"):
        scenes.render(Scene((Thing("cirle", "red", "small"),)))


# ---------------------------------------------------------------- the checker on true pictures


def test_the_checker_agrees_with_true_pictures():
    assert rate(scenes.sample(4, index, heldout=index % 4 == 0) for index in range(1000)) >= 0.999


@pytest.mark.slow
def test_the_checker_agrees_with_ten_thousand_true_pictures():
    assert rate(scenes.sample(11, index, heldout=index % 4 == 0) for index in range(10_000)) >= 0.999


@pytest.mark.parametrize("size", [32, 48, 96, 128, 256])
def test_the_checker_agrees_at_other_sizes(size):
    assert rate(scenes.sample(4, index, size=size) for index in range(100)) >= 0.99


def test_the_checker_forgives_slight_faults():
    rng = np.random.default_rng(0)
    pictures = [scenes.sample(5, index, heldout=index % 4 == 0) for index in range(300)]
    faults = {
        "blur": lambda image: blurred(image, 0.7),
        "noise": lambda image: image + rng.normal(0, 8, image.shape),
        "colour": lambda image: image + rng.uniform(-12, 12, 3),
        "all three": lambda image: blurred(image, 0.7) + rng.normal(0, 8, image.shape) + rng.uniform(-10, 10, 3),
    }
    for name, fault in faults.items():
        assert rate((to_uint8(fault(image)), text) for image, text in pictures) >= 0.97, name


def test_every_atom_is_told_exactly():
    """On other scenes' pictures each verdict is what the two scenes say, for all pairs of single objects."""
    singles = [scene for index in range(500) if not (scene := scenes.scene_at(6, index)).relation and scene.things[0].count == 1][:150]
    for shown, asked in pairwise(singles):
        verdict = check(scenes.render(shown), asked)
        (thing,), (other,) = shown.things, asked.things
        assert verdict.shape == (thing.shape == other.shape) and verdict.colour == (thing.colour == other.colour)
        assert verdict.size == (thing.size == other.size) and verdict.background == (shown.background == asked.background)
        assert verdict.count and verdict.relation is None


# ---------------------------------------------------------------- the checker on wrong pictures


@pytest.fixture(scope="module")
def drawn():
    return [scenes.scene_at(7, index) for index in range(400)]


@pytest.fixture(scope="module")
def related(drawn):
    return [scene for scene in drawn if scene.relation]


def test_swapped_colours_are_wrong(drawn):
    told_apart = [scene for scene in drawn if len({thing.colour for thing in scene.things}) == len(scene.things)]
    wrong = [(scenes.render(swapped_colours(scene)), scenes.caption(scene)) for scene in told_apart]
    assert rate(wrong) <= 0.01
    assert rate(wrong, "count") >= 0.99 and rate(wrong, "background") >= 0.99


def test_swapped_relations_are_wrong(related):
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}
    wrong = [(scenes.render(replace(scene, relation=opposite[scene.relation])), scenes.caption(scene)) for scene in related]
    assert rate(wrong) <= 0.01 and rate(wrong, "relation") <= 0.01
    assert rate(wrong, "shape") >= 0.99 and rate(wrong, "colour") >= 0.99


def test_turned_relations_are_wrong(related):
    turned = {"left": "above", "right": "below", "above": "right", "below": "left"}
    wrong = [(scenes.render(replace(scene, relation=turned[scene.relation])), scenes.caption(scene)) for scene in related]
    assert rate(wrong) <= 0.01 and rate(wrong, "relation") <= 0.01


def test_a_relation_between_other_objects_does_not_count(related):
    for scene in related[:40]:
        image = scenes.render(replace(scene, things=(scene.things[1], scene.things[1])))
        assert check(image, scene).relation is False


def test_missing_and_extra_objects_are_wrong(drawn):
    fewer, more = [], []
    for scene in drawn:
        thing, text = scene.things[0], scenes.caption(scene)
        if scene.relation:
            fewer.append((scenes.render(replace(scene, things=(thing,), relation=None)), text))
        else:
            other = replace(thing, count=thing.count - 1) if thing.count > 1 else None
            bare = scenes.backdrop(scene.background, 64)
            fewer.append((scenes.render(replace(scene, things=(other,))) if other else bare, text))
            if thing.count < 4:
                more.append((scenes.render(replace(scene, things=(replace(thing, count=thing.count + 1),))), text))
    for wrong in (fewer, more):
        assert rate(wrong) <= 0.01 and rate(wrong, "count") <= 0.01


@pytest.mark.parametrize("attribute, values", [("shape", SHAPES), ("size", tuple(SIZES))])
def test_another_shape_or_size_is_wrong(drawn, attribute, values):
    wrong = []
    for scene in drawn:
        if getattr(scenes.parse(scenes.caption(scene)).things[0], attribute) is not None:
            thing = scene.things[0]
            value = values[(values.index(getattr(thing, attribute)) + 1) % len(values)]
            wrong.append((scenes.render(replace(scene, things=(replace(thing, **{attribute: value}), *scene.things[1:]))), scenes.caption(scene)))
    assert rate(wrong) <= 0.01 and rate(wrong, attribute) <= 0.01


def test_blur_and_noise_lower_the_score(drawn):
    rng = np.random.default_rng(0)
    true = [(scenes.render(scene), scenes.caption(scene)) for scene in drawn]
    by_blur = [rate((to_uint8(blurred(image, sigma)), text) for image, text in true) for sigma in (1.5, 2.5, 4)]
    assert by_blur[0] > by_blur[1] > by_blur[2] and by_blur[1] <= 0.5 and by_blur[2] <= 0.1
    for sigma in (25, 50):
        assert rate((to_uint8(image + rng.normal(0, sigma, image.shape)), text) for image, text in true) <= 0.01


@pytest.mark.parametrize("size", [(64, 64), (1, 1), (7, 200), (128, 128)])
def test_the_checker_reads_any_picture(size):
    rng = np.random.default_rng(0)
    smooth = np.stack(np.meshgrid(*(np.linspace(0, 255, n) for n in size), indexing="ij"), axis=2)
    pictures = [rng.integers(0, 256, (*size, 3)), rng.integers(0, 2, (*size, 3)) * 255, np.concatenate([smooth, smooth[:, :, :1]], axis=2)]
    pictures += [np.full((*size, 3), value) for value in (0, 127, 255)]
    for text in ("a red star", "four small blue rings on a navy background", "a red star above a blue ring"):
        assert not any(check(picture.astype(np.uint8), text).all for picture in pictures)


def test_the_checker_refuses_what_is_no_picture():
    for bad in (np.zeros((64, 64), np.uint8), np.zeros((64, 64, 3), np.float32), np.zeros((0, 64, 3), np.uint8)):
        with pytest.raises(UserError, match="uint8"):
            check(bad, "a red star")


def test_look_says_what_is_there():
    things = (Thing("ring", "pink", "large"), Thing("star", "blue", "small"))
    background, objects, clean = look(scenes.render(Scene(things, "above", "mint")))
    assert background == "mint" and clean
    assert [Thing(found.shape, found.colour, found.size) for found in objects] == list(things)
