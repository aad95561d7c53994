"""Time grids: ends kept, density where it should be, and what is refused."""

import pytest
import torch

from flowt2i.errors import UserError
from flowt2i.schedules import check_schedule, make_times, resample_times, searched, shift_times, times_from, uniform_times, written


def test_shifted_times_keep_their_ends_and_lie_nearer_the_noise():
    even = uniform_times(10).double()
    assert torch.equal(shift_times(even, 1.0), even)
    shifted = shift_times(even, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted[1:-1] < even[1:-1]).all()
    sigma = 1 - even  # the published form, in noise fractions
    assert torch.allclose(1 - shifted, 3 * sigma / (1 + 2 * sigma))


def test_resampling_keeps_ends_and_density():
    times = torch.tensor([0, 0.1, 0.4, 1.0], dtype=torch.float64)
    assert torch.allclose(resample_times(times, 3), times)
    assert torch.allclose(resample_times(times, 6)[::2], times)
    assert torch.allclose(resample_times(times, 1), torch.tensor([0, 1.0], dtype=torch.float64))


def test_the_rest_of_a_grid_starts_where_it_is_told_to():
    assert torch.allclose(times_from(uniform_times(4), 0.4), torch.tensor([0.4, 0.5, 0.75, 1]))
    assert torch.allclose(times_from(uniform_times(4), 0.5), torch.tensor([0.5, 0.75, 1]))
    assert torch.allclose(times_from(uniform_times(4), 0.999), torch.tensor([0.999, 1]))
    assert torch.allclose(times_from(uniform_times(4), 0.45), torch.tensor([0.45, 0.75, 1])), "a sliver goes with the next step"
    assert torch.allclose(times_from(uniform_times(4), 0.43), torch.tensor([0.43, 0.5, 0.75, 1]))
    assert times_from(uniform_times(4), 1 - 1e-7)[1:].tolist() == [1], "never empty"


@pytest.mark.parametrize("schedule, steps, shift", [("0,0.999998,1", 2, 0.01), ("0,0.999999,1", 1000, 0.01)])
def test_times_that_meet_in_single_precision_are_refused(schedule, steps, shift):
    with pytest.raises(UserError, match="too near"):
        make_times(schedule, steps, shift)


@pytest.mark.parametrize("shift", [0.01, 0.5, 1.0, 5.0, 100.0])
def test_a_thousand_steps_of_any_shift_increase(shift):
    times = make_times("uniform", 1000, shift)
    assert (times.diff() > 0).all() and times[0] == 0 and times[-1] == 1 and times.dtype == torch.float32


def test_written_and_named_schedules():
    assert torch.allclose(make_times("0,0.1,1", 2), torch.tensor([0, 0.1, 1]))
    assert len(make_times("0,0.1,1", 7)) == 8
    assert torch.allclose(make_times("uniform", 4, 2.0), shift_times(uniform_times(4), 2.0))
    for name, grids in searched().items():
        for steps, times in grids.items():
            assert len(times) == steps + 1 and written(",".join(map(str, times))) == list(times), name
        for steps in (1, 3, 8, 50):
            times = make_times(name, steps)
            assert len(times) == steps + 1 and times[0] == 0 and times[-1] == 1 and (times.diff() > 0).all()


@pytest.mark.parametrize("schedule", ["unifrom", "0,1,0.5", "0,0.5", "0.1,1", "0,nan,1", "0,a,1", "0,0,1", "0,0.9999999,1", ",", "0," + "0.5," * 2000 + "1"])
def test_bad_schedules_are_told_in_a_line(schedule):
    with pytest.raises(UserError) as caught:
        check_schedule(schedule)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250
