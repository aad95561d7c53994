"""The result in words."""

from typing import Any

WAITING, OVERHEAD, GAIN = 0.02, 0.05, 0.05  # what is worth a word


def verdict(result: dict[str, Any]) -> str:
    """One sentence: what holds the training back most, and what to do about it; computed from the numbers alone."""
    loop, parts = result["loop"], result["milliseconds"]
    waiting = loop["waiting_for_data"] if loop else 0.0
    if waiting > WAITING:
        workers = loop["workers"]
        advice = f"raise --data.workers above {workers}" if workers else "read with processes of their own: --data.workers 2"
        return f"waiting on data {waiting:.0%} of the time: {advice}"
    gain = result["micro_batches"][str(result["fastest_micro_batch"])] / result["train_images_per_s"] - 1
    if gain > GAIN:
        return f"a micro-batch of {result['fastest_micro_batch']} is {gain:.0%} faster than {result['micro_batch']}: set --train.micro_batch"
    if loop and loop["of_bare_step"] < 1 - OVERHEAD:
        return (
            f"the loop reaches {loop['of_bare_step']:.0%} of the bare step though data is waited for {waiting:.1%} of the time: is something else running here?"
        )
    total = sum(parts.values())
    slowest = max(parts, key=parts.__getitem__)
    share = f"{result['share_of_ceiling']:.0%} of what bare matrix products reach here"
    return f"computing all the time, at {share}; the {slowest} takes {parts[slowest] / total:.0%} of a step"


def summary(result: dict[str, Any]) -> str:
    """The numbers in a few lines, the verdict last."""
    drawn, loop, parts = result["sampling"], result["loop"], result["milliseconds"]
    rates = ", ".join(f"{size}: {rate:.4g}" for size, rate in result["micro_batches"].items())
    lines = {
        "": [
            f"{result['preset']}, {result['parameters'] / 1e6:.1f}M parameters, captions of {result['text_tokens']:.1f} tokens",
            f"{result['device']}, {result['precision']}{', compiled' if result['compiled'] else ''}",
        ],
        "training": [
            f"{result['train_images_per_s']:.4g} images/s, {result['micro_batch']} at a time of {result['batch']}; {result['peak_memory_gib']:.1f} GiB",
            f"{result['model_tflops']:.3g} TFLOP/s ({result['gflop_per_image']:.3g} GFLOP an image), "
            f"{result['share_of_ceiling']:.0%} of the {result['ceiling_tflops']:.3g} of bare matrix products",
            "of a step: " + ", ".join(f"{name} {value / sum(parts.values()):.1%}" for name, value in parts.items()),
            f"images/s by micro-batch: {rates}; the largest that fits: {result['largest_micro_batch']} ({result['largest_how']})",
        ],
        "loop": [f"not measured: {result['loop_why']}"],
        "sampling": [
            f"{result['sample_images_per_s']:.4g} images/s in a batch of {drawn['batch']}, {drawn['one_picture_s']:.3g} s for one "
            f"({drawn['steps']} {drawn['solver']} steps, guidance {drawn['guidance']:g})",
            f"{drawn['times_fewer_seconds']:.3g} times (one: {drawn['times_fewer_seconds_one']:.3g} times) fewer seconds than 50 Euler steps",
        ],
        "verdict": [result["verdict"]],
    }
    if loop:
        lines["loop"] = [
            f"{loop['images_per_s']:.4g} images/s in a real training ({loop['steps']} steps of {loop['batch']}), {loop['of_bare_step']:.1%} of the bare step",
            f"waiting for data {loop['waiting_for_data']:.2%}; a checkpoint stops it for {loop['checkpoint_s']:.2g} s, {loop['checkpoint_share']:.2%} of a run",
        ]
    return "\n".join(f"{name if i == 0 else '':10s}{line}" for name, several in lines.items() for i, line in enumerate(several))
