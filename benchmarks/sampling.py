#!/usr/bin/env python3
"""Quality against evaluations, for solvers, schedules and guidance: a table and a plot.

    python benchmarks/sampling.py --model runs/quickstart --num 200 --out sampling.png
    python benchmarks/sampling.py --only solvers --num 100                  # solvers, schedules, guidance or the default alone
    python benchmarks/sampling.py --guide runs/quickstart/checkpoints/step_00001000 --only guidance

Every setting draws the same prompts from the same seeds, so differences are paired. `distance` is the root mean square difference (pixels in [0, 1]) to
the reference, 100 midpoint steps (200 evaluations, 400 with guidance). On the built-in scenes `right` is the share of pictures that show all the prompt
says, by the exact checker, with Wilson's 95% interval, and the last column the difference to 50 Euler steps with the 95% interval of a paired difference.
An evaluation is one captioned picture through the network, guidance's counted.
What is measured is kept in OUT.jsonl, line by line, with a fingerprint of the model's weights and settings and of the reference: the same command goes on
where it was stopped, and what another model drew is never mixed in.
"""

import argparse
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from flowt2i import Pipeline
from flowt2i.commands.common import newest_run
from flowt2i.evaluation.scenes import FIRST_SEED, wilson

SOLVERS: list[dict[str, Any]] = [
    *({"solver": "euler", "steps": n} for n in (4, 6, 8, 12, 16, 25, 50)),
    *({"solver": "ab2", "steps": n} for n in (4, 6, 8, 12, 16, 25)),
    *({"solver": "heun", "steps": n} for n in (3, 4, 6, 8, 13)),
    *({"solver": "midpoint", "steps": n} for n in (2, 3, 4, 6, 8)),
    *({"solver": "ab4", "steps": n} for n in (4, 6, 10)),
    *({"solver": "rk4", "steps": n} for n in (1, 2, 3, 4)),
    *({"solver": "sde", "steps": n} for n in (8, 16, 50)),
    *({"solver": "dopri5", "tolerance": t} for t in (0.1, 0.03)),
]
SCHEDULES: list[dict[str, Any]] = [
    *({"solver": s, "steps": 8, "shift": shift} for s in ("euler", "ab2", "sde") for shift in (0.5, 2.0, 3.0, 5.0, 8.0)),
    *({"solver": s, "steps": n, "shift": 5.0} for s, n in [("ab2", 4), ("ab2", 6), ("ab2", 12), ("ab2", 16), ("euler", 16), ("euler", 25), ("euler", 50)]),
    *({"solver": s, "steps": 4, "shift": 5.0} for s in ("heun", "midpoint", "ab4")),
]
DEFAULT: list[dict[str, Any]] = [{"solver": s, "steps": 8, "shift": 5.0} for s in ("euler", "ab2")]  # that of the preset `quickstart` first
GUIDANCE: list[dict[str, Any]] = [
    {"guidance": 1.0}, {"guidance": 2.0}, {"guidance": 4.0}, {"guidance": 5.0},
    {"guidance_rule": "zero-star"}, {"guidance_rule": "zero-star", "zero_init": 0.04}, *({"guidance_rescale": share} for share in (0.5, 0.7, 1.0)),
    {"guidance_from": 0.1}, {"guidance_from": 0.2}, {"guidance_until": 0.5}, {"guidance_until": 0.7}, {"guidance_from": 0.05, "guidance_until": 0.6},
]  # fmt: skip


def benchmark_prompts(pipeline: Pipeline, count: int) -> list[str]:
    """Scenes' own prompts, or the captions that came with the data, again and again."""
    if pipeline.description.is_scenes:
        from flowt2i.data import scenes

        return scenes.prompts(0, count, heldout=False)
    known = list(pipeline.description.prompts) or ["a picture"]
    return [known[i % len(known)] for i in range(count)]


def distances(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Root mean square difference of uint8 pictures [N, H, W, 3], of values in [0, 1]: [N]."""
    return np.sqrt(np.square((images.astype(np.float32) - reference) / 255).mean((1, 2, 3)))


def fingerprint(pipeline: Pipeline, **more: Any) -> str:
    """Of all that decides what is drawn: the weights, the model's own settings, and `more`."""
    digest = hashlib.sha256(json.dumps([pipeline.settings(), more], sort_keys=True).encode())
    for name, weight in sorted(pipeline.model.state_dict().items()):
        digest.update(name.encode() + weight.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()[:16]


def right(images: np.ndarray, prompts: list[str]) -> list[bool]:
    """Whether each picture shows all that its prompt says."""
    from flowt2i.data import scenes_check

    return [bool(scenes_check.check(image, prompt).all) for image, prompt in zip(images, prompts)]


def paired(a: list[bool], b: list[bool]) -> tuple[float, float]:
    """Mean of a - b and half its 95% interval (Agresti & Min 2005: the paired Wald interval with half a pair added to each cell)."""
    n = len(a) + 2
    up, down = (sum(x > y for x, y in zip(a, b)) + 0.5) / n, (sum(x < y for x, y in zip(a, b)) + 0.5) / n
    return up - down, 1.96 * math.sqrt((up + down - (up - down) ** 2) / n)


def label(settings: dict[str, Any]) -> str:
    return " ".join(str(v) if k in ("solver", "steps") else f"{k.removeprefix('guidance_')} {v}" for k, v in settings.items())


def settings_to_measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Each once, the 50 Euler steps that all are compared with first."""
    base = DEFAULT[0] | {name: value for name, value in (("solver", args.solver), ("steps", args.steps), ("shift", args.shift)) if value is not None}
    chosen: list[dict[str, Any]] = [{"solver": "euler", "steps": 50}]
    if args.only in (None, "solvers"):
        chosen += SOLVERS
    if args.only in (None, "schedules"):
        chosen += SCHEDULES + [{"solver": s, "steps": n, "schedule": name} for name in args.schedule for s in ("euler", "ab2") for n in (6, 8)]
    if args.only in (None, "default"):
        chosen += DEFAULT
    if args.only in (None, "guidance"):
        chosen += [base, *(base | g for g in GUIDANCE)]
        chosen += [base | {"guidance": g, "guide": str(args.guide)} for g in (1.5, 2.0, 3.0) if args.guide]
    return [s for i, s in enumerate(chosen) if s not in chosen[:i]]


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| setting | evaluations | distance | right | less 50 Euler steps |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda r: (r["evaluations"], r["label"])):
        score = f"{row['right']:.1%} [{row['low']:.1%}, {row['high']:.1%}]" if "right" in row else ""
        less = f"{100 * row['less']:+.1f} ± {100 * row['less_half']:.1f}" if "less" in row else ""
        lines.append(f"| {row['label']} | {row['evaluations']} | {row['distance']:.4f} | {score} | {less} |")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    has_score = "right" in rows[0]
    figure, axes = pyplot.subplots(1, 1 + has_score, figsize=(6.5 * (1 + has_score), 5), squeeze=False, layout="constrained")
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        told = {k: v for k, v in row["settings"].items() if k not in ("solver", "steps", "tolerance")}
        groups.setdefault(label({"solver": row["settings"]["solver"], **told}), []).append(row)
    colours = pyplot.colormaps["tab10"]
    lines = sorted((name for name, group in groups.items() if len(group) > 1), key=lambda name: -len(groups[name]))
    for axis, key, what in zip(axes[0], ("distance", "right"), ("distance to the reference", "pictures all right")):
        for i, name in enumerate(lines):
            group = sorted(groups[name], key=lambda r: r["evaluations"])
            axis.plot([r["evaluations"] for r in group], [r[key] for r in group], "o-", color=colours(i % 10), label=name, markersize=4, linewidth=1.3)
        alone = [group[0] for group in groups.values() if len(group) == 1]
        axis.plot([r["evaluations"] for r in alone], [r[key] for r in alone], "x", color="0.6", label="others (in the table)", markersize=5)
        axis.axvline(16, color="0.8", linewidth=1, zorder=0)
        axis.set(xscale="log", xlabel="evaluations a picture", ylabel=what, xticks=[4, 8, 16, 32, 64, 100], xticklabels=["4", "8", "16", "32", "64", "100"])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
        if key == "distance":
            axis.set_yscale("log")
    reference = next((r for r in rows if r["settings"] == {"solver": "euler", "steps": 50}), None)
    if has_score and reference:
        axes[0][1].axhspan(reference["low"], reference["high"], color="0.93", zorder=0, label="50 Euler steps, 95%")
        axes[0][1].axhline(reference["right"], color="0.5", linewidth=0.8, linestyle="--")
    axes[0][-1].legend(fontsize=8, frameon=False, loc="lower right" if has_score else "best")
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: the newest run")
    parser.add_argument("--num", type=int, default=200, help="prompts (default 200)")
    parser.add_argument("--only", choices=["solvers", "schedules", "guidance", "default"])
    parser.add_argument("--solver", help="of the comparison of guidance (default euler)")
    parser.add_argument("--steps", type=int, help="of the comparison of guidance (default 8)")
    parser.add_argument("--shift", type=float, help="of the comparison of guidance (default 5)")
    parser.add_argument("--guide", type=Path, help="a weaker checkpoint, for autoguidance")
    parser.add_argument("--schedule", nargs="*", default=[], help="searched schedules to compare")
    parser.add_argument("--reference", type=int, default=100, help="midpoint steps of the reference (default 100)")
    parser.add_argument("--out", type=Path, default=Path("sampling.png"), help="the plot; OUT.jsonl keeps what is measured")
    parser.add_argument("--device")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end")
    args = parser.parse_args()
    pipeline = Pipeline.from_pretrained(args.model or newest_run(), device=args.device)
    prompts = benchmark_prompts(pipeline, args.num)
    kept = args.out.with_suffix(".jsonl")
    lines = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    plain = fingerprint(pipeline, prompts=prompts, reference=args.reference)
    guided = plain + (fingerprint(Pipeline.from_pretrained(args.guide, device=args.device)) if args.guide else "")
    known = {(line["label"], line.get("key")): line for line in lines}
    far_file = args.out.with_name(f"{args.out.stem}-reference-{plain}.npy")
    if not far_file.exists():
        with tqdm(total=args.num, desc="reference", leave=False) as bar:
            far = pipeline.sample(prompts, steps=args.reference, solver="midpoint", schedule="uniform", shift=1.0, seed=FIRST_SEED, progress=bar.update).images
        np.save(far_file, far)
    reference = np.load(far_file)
    rows: list[dict[str, Any]] = []
    for settings in tqdm(settings_to_measure(args), desc="settings", leave=False):
        name, key = label(settings), guided if "guide" in settings else plain
        if (name, key) not in known:
            drawn = pipeline.sample(prompts, seed=FIRST_SEED, **{"shift": 1.0, "schedule": "uniform"} | settings)
            row = {"label": name, "key": key, "model": pipeline.name, "num": args.num, "settings": settings, "evaluations": drawn.evaluations}
            row |= {"distance": float(distances(drawn.images, reference).mean()), "seconds": round(drawn.seconds, 2)}
            if pipeline.description.is_scenes:
                hits = right(drawn.images, prompts)
                low, high = wilson(sum(hits), args.num)
                row |= {"right": sum(hits) / args.num, "low": low, "high": high, "hits": [int(h) for h in hits]}
            with kept.open("a") as file:
                file.write(json.dumps(row) + "\n")
            known[name, key] = row
        rows.append(known[name, key])
    for row in rows:
        if "hits" in row:
            row["less"], row["less_half"] = paired(row["hits"], rows[0]["hits"])
    print(table(rows))
    plot(rows, args.out, f"{Path(pipeline.name).name}: {args.num} prompts, guidance {pipeline.settings()['guidance']:g} unless said otherwise")
    if args.json:
        print(json.dumps({"plot": str(args.out), "rows": [{k: v for k, v in row.items() if k not in ("hits", "model")} for row in rows]}))


if __name__ == "__main__":
    main()
