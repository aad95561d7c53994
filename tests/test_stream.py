"""What a step sees is a function of (seed, step) alone."""

import numpy as np
import torch

from flowt2i.training import stream

CPU = torch.device("cpu")


def test_an_epoch_shows_every_sample_once_and_epochs_differ():
    seen = np.concatenate([stream.sample_indices(3, step, 7, 21) for step in range(6)])
    first, second = seen[:21], seen[21:]
    assert sorted(first) == sorted(second) == list(range(21))
    assert list(first) != list(second)


def test_batches_straddle_epochs_without_a_gap():
    seen = np.concatenate([stream.sample_indices(0, step, 8, 21) for step in range(21)])  # 8 epochs of 21
    for epoch in range(8):
        assert sorted(seen[epoch * 21 : (epoch + 1) * 21]) == list(range(21))


def test_seek_is_at_once_and_equal():
    walked = list(zip(range(50), stream.StepSampler(5, [np.arange(100)], 8, 8, 0, 1, first_step=0)))
    jumped = next(iter(stream.StepSampler(5, [np.arange(100)], 8, 8, 0, 1, first_step=40)))
    assert walked[40][1] == jumped


def test_ranks_and_micro_batches_share_one_global_batch():
    whole = stream.sample_indices(1, 6, 24, 1000)
    for world in (1, 2, 4):
        for micro in (24 // world, 24 // world // 2, 3):
            rows = [r for rank in range(world) for r in stream.micro_rows(24, micro, rank, world)]
            assert np.concatenate([whole[r] for r in rows]).tolist() == whole.tolist()
            batches = [stream.StepSampler(1, [np.arange(1000)], 24, micro, rank, world, first_step=6, last_step=7) for rank in range(world)]
            assert [i for sampler in batches for batch in sampler for i in batch] == whole.tolist()


def test_draws_repeat_and_steps_and_seeds_differ():
    a, b = (stream.draw(0, 7, 16, (3, 4, 4), 0.5, True, CPU) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    for other in (stream.draw(0, 8, 16, (3, 4, 4), 0.5, True, CPU), stream.draw(1, 7, 16, (3, 4, 4), 0.5, True, CPU)):
        assert not any(torch.equal(x, y) for x, y in zip(a, other))
    assert not torch.equal(a.noise, a.latent_noise)


def test_draws_have_their_distributions():
    draw = stream.draw(0, 0, 4096, (1, 2, 2), 0.1, False, CPU)
    assert abs(draw.noise.mean()) < 0.03 and abs(draw.noise.std() - 1) < 0.03
    assert abs(draw.dropped.float().mean() - 0.1) < 0.02 and abs(draw.flipped.float().mean() - 0.5) < 0.03
    gaps = draw.uniform.sort().values.double() - torch.arange(4096) / 4096
    assert gaps.min() > -1e-6 and gaps.max() < 1 / 4096 + 1e-6, "one time in each stratum"
    assert draw.latent_noise is None
