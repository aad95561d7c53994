#!/usr/bin/env python3
"""Puts the results under benchmarks/results/ into the tables of docs/speed.md, between its marks.

    flowt2i bench --peers --json | tail -1 > benchmarks/results/bench-quickstart-cpu.json
    python benchmarks/scale.py --out benchmarks/results/scale-cpu.json --plot docs/images/scale-cpu.png
    python benchmarks/speed_table.py            # or --check: say whether the page is up to date, change nothing

`bench-*.json` hold the last line of `flowt2i bench --json`, `scale-*.json` what benchmarks/scale.py writes; any number of each.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Results = list[dict[str, Any]]


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def where(result: dict[str, Any]) -> str:
    facts = result["machine"]
    return f"{result['device']} ({facts['date']}, torch {facts['torch']})"


def training(results: Results) -> str:
    head = ["machine", "preset", "images/s", "micro-batch (fastest, largest)", "TFLOP/s", "of the ceiling", "loop / bare step", "waiting for data", "memory"]
    rows = []
    for r in results:
        loop = r["loop"] or {}
        model = f"`{r['preset']}`, {r['parameters'] / 1e6:.1f}M, {r['precision']}{', compiled' if r['compiled'] else ''}"
        rows.append([
            where(r), model, f"{r['train_images_per_s']:.4g}",
            f"{r['micro_batch']} ({r['fastest_micro_batch']}, {r['largest_micro_batch']} {r['largest_how']})",
            f"{r['model_tflops']:.3g}", f"{r['share_of_ceiling']:.0%} of {r['ceiling_tflops']:.3g}", f"{loop['of_bare_step']:.1%}" if loop else "–",
            f"{loop['waiting_for_data']:.2%}" if loop else "–", f"{r['peak_memory_gib']:.1f} GiB",
        ])  # fmt: skip
    return table(head, rows)


def step(results: Results) -> str:
    names = list(results[0]["milliseconds"])
    rows = [[where(r), f"`{r['preset']}`", *(f"{r['milliseconds'][n] / sum(r['milliseconds'].values()):.1%}" for n in names)] for r in results]
    return table(["machine", "preset", *names], rows)


def sampling(results: Results) -> str:
    rows = []
    for r in results:
        s = r["sampling"]
        rows.append([
            where(r), f"`{r['preset']}`: {s['steps']} {s['solver']} steps, guidance {s['guidance']:g}", f"{s['one_picture_s']:.3g} s",
            f"{s['images_per_s']:.4g} (batch {s['batch']})", f"{s['euler50_one_picture_s']:.3g} s", f"{s['euler50_images_per_s']:.4g}",
            f"{s['times_fewer_seconds_one']:.2f}×, {s['times_fewer_seconds']:.2f}×",
        ])  # fmt: skip
    return table(["machine", "preset", "one picture", "images/s", "50 Euler steps: one", "images/s", "times fewer seconds: one, batch"], rows)


def peers(results: Results) -> str:
    rows = []
    for r in results:
        runs = r.get("peer_runs") or []
        for mode in dict.fromkeys(run["mode"] for run in runs):
            own = next(run for run in runs if run["mode"] == mode and run["name"] == "ours")
            rows.append([where(r), mode, "ours", f"{own['parameters'] / 1e6:.0f}M", own["batch"], own["text_tokens"], f"{own['images_per_s']:.2f}", ""])
            for run in runs:
                if run["mode"] == mode and run is not own:
                    ratio = f"{own['images_per_s'] / run['images_per_s']:.2f}×"
                    rows.append(
                        ["", mode, run["name"], f"{run['parameters'] / 1e6:.0f}M", run["batch"], run["text_tokens"], f"{run['images_per_s']:.2f}", ratio]
                    )
    return table(["machine", "mode", "transformer", "parameters", "batch", "caption width", "images/s", "ours / theirs"], rows) if rows else ""


def scale(results: Results) -> str:
    rows = []
    for r in results:
        for axis, points in r.get("axes", {}).items():
            for p in (point for point in points if "seconds" in point):
                share = p["tflop"] / p["seconds"] / r["ceiling_tflops"]
                measured = [f"{p['seconds']:.3g} s", f"{share:.0%}", f"{p['measured_gib']:.2f} GiB", f"{p['computed_gib']:.2f} GiB"]
                rows.append([where(r), f"{axis} {p[axis]}", f"{p['parameters'] / 1e6:.1f}M", f"{p['tflop']:.3g}", *measured])
    return table(["machine", "point", "parameters", "TFLOP a step", "a step", "of the ceiling", "peak, measured", "computed"], rows) if rows else ""


def fits(results: Results) -> str:
    rows = next((r["fits"] for r in reversed(results) if r.get("fits")), [])
    if not rows:
        return ""
    cards = [name for name in rows[0] if name.endswith(" GB")]
    lines = [[r["model"], r["tokens"], f"{r['state_gib']:.2f} GiB", f"{r['mib_an_image']:.1f} MiB", *(r[card] or "–" for card in cards)] for r in rows]
    return table(["model", "image tokens", "weights, gradients, AdamW, EMA", "an image", *(f"{card} (computed)" for card in cards)], lines)


def paths(results: Results) -> str:
    rows = []
    for r in results:
        found = {(p["tokens"], p["pixels"], p["checkpointing"]): p for p in r.get("paths", []) if "seconds" in p}
        for (tokens, pixels, checkpointing), p in found.items():
            plain = found.get((tokens, pixels, 0))
            model = f"{p['depth']} × {p['width']}, {'pixels' if pixels else 'latents'}, batch {p['batch']}"
            memory = [f"{p['measured_gib']:.2f} GiB", f"{p['computed_gib']:.2f} GiB"]
            how = "checkpointing" * checkpointing + (f": {p['seconds'] / plain['seconds']:.2f} × the seconds" if checkpointing and plain else "")
            rows.append([where(r), model, tokens, how, f"{p['tflop']:.3g}", f"{p['seconds']:.3g} s", *memory])
    return table(["machine", "model", "image tokens", "", "TFLOP a step", "a step", "peak, measured", "computed"], rows) if rows else ""


TABLES: dict[str, tuple[str, Callable[[Results], str]]] = {
    "training": ("bench", training), "step": ("bench", step), "sampling": ("bench", sampling), "peers": ("bench", peers), "scale": ("scale", scale),
    "paths": ("scale", paths), "fits": ("scale", fits),
}  # fmt: skip


def fill(page: str, folder: Path) -> str:
    """The page with its tables made anew. A table without results is an empty place between its marks."""
    for name, (kind, make) in TABLES.items():
        results = [json.loads(path.read_text()) for path in sorted(folder.glob(f"{kind}-*.json"))]
        text = make(results) if results else ""
        page, found = re.subn(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, text=text: m[1] + (text and text + "\n") + m[2], page, flags=re.S)
        if not found:
            raise SystemExit(f"the page has no place for the table {name!r}: <!-- {name} --> … <!-- end -->")
    return page


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "speed.md")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where the page is not up to date")
    args = parser.parse_args()
    before = args.page.read_text()
    after = fill(before, args.results)
    if args.check:
        print("up to date" if before == after else f"{args.page} is not up to date: python benchmarks/speed_table.py")
        return int(before != after)
    args.page.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
