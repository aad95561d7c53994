"""Guidance: making more of what sets a good prediction apart from a worse one. Pure functions round a velocity field.

All variants compare two velocities of the same point: `good` (under the caption) and `bad` (under the empty caption, under a negative
prompt, or of a weaker network under the same caption). A *rule* makes one of two; `guided` wraps it round a pair of fields.

Time runs from noise (t = 0) to data (t = 1); the papers' scale `w` is our `scale` where 1 means none (Kynkäänniemi et al., Karras et al.,
CFG-Zero*), and `w + 1` in Ho & Salimans.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flowt2i.solvers import Velocity

TextVelocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (z [B, C, H, W], t [], text [B, T, D], mask [B, T]) -> [B, C, H, W]
Captions = tuple[Tensor, Tensor]  # text [B, T, D], mask [B, T]
Branches = Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # (z, t) -> velocities under several captions
Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (good, bad, z, t) -> velocity


def conditional(field: TextVelocity, text: Tensor, mask: Tensor) -> Velocity:
    """The field under its captions alone: one network evaluation a call, no guidance."""
    return lambda z, t: field(z, t, text, mask)


def together(field: TextVelocity, *captions: Captions) -> Branches:
    """The field under several captions of each picture at once, all in one batch: N captions cost N evaluations and one call."""
    text, mask = torch.cat([c[0] for c in captions]), torch.cat([c[1] for c in captions])
    n = len(captions)
    return lambda z, t: field(z.repeat(n, 1, 1, 1), t, text, mask).chunk(n)


def guided(pair: Branches, rule: Rule) -> Velocity:
    """A rule applied to the two velocities of a pair, at every call."""

    def velocity(z: Tensor, t: Tensor) -> Tensor:
        good, bad = pair(z, t)
        return rule(good, bad, z, t)

    return velocity


def extrapolate(good: Tensor, bad: Tensor, scale: float) -> Tensor:
    """`bad + scale (good - bad)`: Ho & Salimans (2207.12598, eq. 6); with a weaker network as `bad`, autoguidance (Karras et al. 2406.02507, sec. 4)."""
    return bad + scale * (good - bad)


def zero_star(good: Tensor, bad: Tensor, scale: float) -> Tensor:
    """CFG-Zero*'s optimised scale (Fan et al. 2503.18886, sec. 4): `s bad + scale (good - s bad)` with `s = <good, bad> / |bad|^2`, per picture.

    s bad is the part of `good` that `bad` already says, so where both are poor early on their common error is not amplified.
    """
    good_flat, bad_flat = good.flatten(1), bad.flatten(1)
    s = (good_flat * bad_flat).sum(1) / bad_flat.square().sum(1).clamp_min(1e-8)
    return extrapolate(good, s.view(-1, 1, 1, 1) * bad, scale)


def mean_kept(good: Tensor, bad: Tensor, scale: float) -> Tensor:
    """`extrapolate`, but each channel's mean over a picture [B, C, 1, 1] stays `good`'s: guidance changes what is where, and not how bright it is at large.

    A caption that names a ground says most about the mean. Amplified, the first steps go past it (the more so, the less the empty caption knows yet), to
    darker than dark and to the other side of mid-grey, by which `model.negatives` goes.
    """
    velocity = extrapolate(good, bad, scale)
    return velocity + (good - velocity).mean((2, 3), keepdim=True)


def by_rule(name: str, good: Tensor, bad: Tensor, scale: float) -> Tensor:
    """The rule of this name, as settings say it."""
    return {"cfg": extrapolate, "zero-star": zero_star, "mean-kept": mean_kept}[name](good, bad, scale)


def rescale(velocity: Tensor, good: Tensor, z: Tensor, t: Tensor, share: float) -> Tensor:
    """Take back the contrast that guidance adds: Lin et al. (2305.08891, sec. 3.4, eq. 15 and 16), applied to the predicted data.

    The paper rescales the network's output to the deviation of the unguided one. A velocity of ours is `data - noise`, and most of its deviation
    is the noise's, so here `x = z + (1 - t) v` is what is rescaled, about its own mean (a flat picture keeps its brightness), per picture:
    `x' = mean + (x - mean) std(x_good) / std(x)`, then `share x' + (1 - share) x` is turned back into a velocity. share 0 changes nothing.
    """
    left = 1 - t
    x, x_good = z + left * velocity, z + left * good
    mean = x.mean((1, 2, 3), keepdim=True)
    ratio = x_good.std((1, 2, 3), keepdim=True) / x.std((1, 2, 3), keepdim=True).clamp_min(1e-8)
    return velocity + share * (ratio - 1) * (x - mean) / left


def on_interval(inside: Velocity, outside: Velocity, start: float, end: float) -> Velocity:
    """One field for `start <= t < end`, another elsewhere: guidance on an interval (Kynkäänniemi et al. 2404.07724, sec. 3, in our times).

    With the plain conditional field outside, a call there costs one evaluation instead of two.
    """
    return lambda z, t: inside(z, t) if start <= time_of(t) < end else outside(z, t)


def time_of(t: Tensor) -> float:
    """The time as it was meant: 0.7 in fp32 lies below 0.7."""
    return round(float(t), 6)


def analogous(good: Tensor, style: Tensor, others: Sequence[tuple[Tensor, Tensor]], share: float) -> Tensor:
    """`good + share (mean_s (subject in style s - style s) - (good - style))`: what a subject adds to a style, learned from its other styles.

    good: the velocity under "SUBJECT, STYLE"; style: under the style alone; others: under the same subject in each other style, and under that style
    alone. Differences of predictions under parts of captions, as in composed diffusion (Liu et al. 2206.01714, eq. 11); the analogy is ours.
    Near the noise, where layout and colours are decided, these are much alike in all styles, and a subject may have been seen in another one only.
    """
    elsewhere = torch.stack([subject - alone for subject, alone in others]).mean(0)
    return good + share * (elsewhere - (good - style))


def contrasted(good: Tensor, style: Tensor, others: Sequence[Tensor], weight: float) -> Tensor:
    """`good + weight (style - mean_s style s)`: more of what sets a style apart from the others, whatever the subject.

    good: the velocity under "SUBJECT, STYLE"; style: under the style alone; others: under each other style alone. A conjunction with the one and
    negations of the others, as in composed diffusion (Liu et al. 2206.01714, eq. 11 and 12).
    """
    return good + weight * (style - torch.stack(list(others)).mean(0))


def between(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Velocities under two prompts mixed, `(1 - share) first + share second` with share [B, 1, 1, 1].

    As if of the product `p_first^(1 - share) p_second^share` (composed diffusion, Liu et al. 2206.01714: conjunction); it is not that product's
    own flow, for a product and its noising do not commute. It changes smoothly from one prompt to the other whatever their lengths; at both ends it
    is the field of that prompt.
    """
    return torch.lerp(first, second, share)
