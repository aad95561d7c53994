"""Faults 19 to 26 and their kin at the border of the data, each really injected. Units of the same: test_sources, test_images, test_prepare, test_workers."""

import json
import os
import pickle
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_images import BLUE, GREEN, RED, WHITE, corners, encode, png_header, quarters
from test_prepare import _kill_for_real, contents, make_tar, noise_png, refused, rows, run
from test_sources import pair, write_tar

from flowt2i.cli import main
from flowt2i.data.dataset import ImageTextDataset
from flowt2i.data.encode import Encoder
from flowt2i.errors import UserError

ROOT = Path(__file__).parents[1]


def flowt2i(*words: str | Path, **more) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "flowt2i", *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=240, **more)


def one_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit 2 and an error of one line that holds the words."""
    errors = [line for line in done.stderr.splitlines() if "error:" in line]
    assert done.returncode == 2 and len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(word in errors[0] for word in words), errors[0]


def dropped(folder: Path) -> dict[str, str]:
    """Key -> reason."""
    return {row["key"]: row["reason"] for row in map(json.loads, (folder / "dropped.jsonl").read_text().splitlines())}


def caption(text: str) -> bytes:
    return json.dumps({"prompt": text}).encode()


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


# ---- 19


@pytest.mark.slow
def test_fault_19_kill_9_twenty_times(tmp_path):
    _kill_for_real(tmp_path, kills=20, workers=2)


# ---- 20


def test_fault_20_tar_cut_at_any_member_boundary(tmp_path):
    whole = make_tar(tmp_path / "whole.tar", range(6)).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        offsets = [member.offset for member in tar.getmembers()]
    for number, offset in enumerate(offsets[2:], 2):
        (tmp_path / "cut.tar").write_bytes(whole[:offset])
        with tarfile.open(tmp_path / "cut.tar") as tar:
            assert len(tar.getmembers()) == number  # silently short
        report = run(tmp_path / "cut.tar", tmp_path / f"d{number}")
        assert report["kept"] == number // 2
        assert report["dropped"] == {"tar ends early": 1, **({"missing caption": 1} if number % 2 else {})}
    (tmp_path / "cut.tar").write_bytes(whole[: offsets[1]])
    assert "tar ends early: 1" in refused(tmp_path / "cut.tar", tmp_path / "none")


# ---- 21


def hostile_images() -> dict[str, bytes]:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    bomb = Image.new("L", (9500, 9500))  # 90 million real pixels: Pillow only warns
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * (200 << 20), 9))
    return {
        "bomb-that-warns": encode(bomb),
        "bomb": png_header(60_000, 60_000),
        "bomb-in-text": png_header(64, 64, text),
        "truncated": encode(quarters(), "JPEG")[:-400],
        "zero-byte": b"",
        "html": b"<html><body>404</body></html>",
        "line": encode(Image.new("RGB", (1, 4000), RED)),
    }


def odd_images() -> dict[str, bytes]:
    ramp = Image.fromarray(np.tile(np.linspace(0, 65535, 80).astype(np.uint16), (80, 1)))
    palette = quarters().quantize(8)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side: a viewer turns it
    frames = [quarters(), Image.new("RGB", (80, 80), BLUE)]
    return {
        "16-bit": encode(ramp),
        "animated": encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100),
        "cmyk": encode(quarters().convert("CMYK"), "JPEG", quality=95),
        "exif": encode(quarters().transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif.tobytes()),
        "palette": encode(palette, transparency=palette.getpixel((60, 60))),  # white shows through as white
        "large": encode(Image.new("L", (9400, 9400), 99)),  # 88 million pixels: allowed
    }


def test_fault_21_hostile_images(tmp_path):
    bad, odd = hostile_images(), odd_images()
    members = [m for key, data in {**bad, **odd}.items() for m in ((f"{key}.jpg", data), (f"{key}.json", caption(key)))]
    write_tar(tmp_path / "a.tar", members)
    code = """
import resource, sys
from flowt2i.cli import main
status = main(sys.argv[1:])
print("peak", max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))
sys.exit(status)
"""
    words = ["prepare", tmp_path / "a.tar", "--out", tmp_path / "d", "--heldout", "0", "--image-size", "32", "--workers", "1"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split("peak")[1]) < 2 << 20, done.stdout  # KiB
    assert dropped(tmp_path / "d") == {
        "bomb-that-warns": "too many pixels",
        "bomb": "too many pixels",
        "bomb-in-text": "undecodable image",
        "truncated": "undecodable image",
        "zero-byte": "undecodable image",
        "html": "undecodable image",
        "line": "too small",
    }
    report = json.loads((tmp_path / "d/report.json").read_text())
    assert report["dropped"] == Counter(dropped(tmp_path / "d").values()) and report["read"] == len(bad) + len(odd)
    dataset = ImageTextDataset(tmp_path / "d")
    pictures = {dataset.key(i): dataset.fetch([i]).stored[0].permute(1, 2, 0).numpy() for i in range(len(dataset))}
    assert set(pictures) == set(odd)
    row = pictures["16-bit"][10, :, 0].astype(int)
    assert row[0] < 8 and row[-1] > 247 and abs(row[16] - 130) < 8 and (pictures["large"] == 99).all()
    for key in ("animated", "cmyk", "exif", "palette"):
        for found, wanted in zip(corners(pictures[key]), (RED, GREEN, BLUE, WHITE)):
            assert np.abs(np.subtract(found, wanted)).max() <= 20, key


@pytest.mark.slow
def test_fault_21_memory_of_all_processes_together(tmp_path):
    import psutil

    big = [encode(Image.new(mode, (9400, 9400))) for mode in ("RGBA", "P", "I;16")]
    write_tar(tmp_path / "a.tar", [m for i in range(150) for m in ((f"{i}.png", big[i % 3] if i < 9 else noise_png(i)), (f"{i}.json", caption(str(i))))])
    words = ["prepare", tmp_path / "a.tar", "--out", tmp_path / "d", "--image-size", "16", "--workers", "3"]
    child = subprocess.Popen([sys.executable, "-m", "flowt2i", *map(str, words)], cwd=ROOT, stderr=subprocess.DEVNULL)
    peak = 0
    while child.poll() is None:
        total = 0
        for process in [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]:
            try:
                total += process.memory_full_info().uss
            except psutil.Error:
                pass
        peak = max(peak, total)
        time.sleep(0.02)
    assert child.returncode == 0 and peak < 2 << 30, f"{peak / 2**20:.0f} MiB"


# ---- 22


def test_fault_22_hostile_members(tmp_path):
    def special(kind: bytes, target: str = "") -> tarfile.TarInfo:
        info = tarfile.TarInfo()
        info.type, info.linkname = kind, target
        return info

    def pair(key: str, text: str = "") -> list:
        return [(f"{key}.png", noise_png(len(key) + len(text))), (f"{key}.json", caption(text or f"caption of {key}"))]

    (tmp_path / "in").mkdir()
    (tmp_path / "secret.txt").write_text("a secret")
    members: list = [
        *pair("../up"),
        *pair(str(tmp_path / "absolute")),
        ("link.jpg", special(tarfile.SYMTYPE, "../../secret.txt")),
        ("link.txt", special(tarfile.SYMTYPE, str(tmp_path / "secret.txt"))),
        ("hard.jpg", special(tarfile.LNKTYPE, "../up.jpg")),
        ("fifo.jpg", special(tarfile.FIFOTYPE)),
        ("device.jpg", special(tarfile.CHRTYPE)),
        *pair("twice", "the first"),
        *pair("twice", "adjacent"),
        *pair("between"),
        *pair("twice", "apart"),
        *pair("rest"),
    ]
    write_tar(tmp_path / "in/a.tar", members)
    before = sorted(tmp_path.rglob("*"))
    report = run(tmp_path / "in/a.tar", tmp_path / "in/../out", heldout=0)
    assert sorted(path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "out") and path != tmp_path / "out") == before
    assert {key: text for key, text, _ in rows(tmp_path / "out")} == {
        "../up": "caption of ../up",
        str(tmp_path / "absolute"): f"caption of {tmp_path / 'absolute'}",
        "twice": "the first",
        "between": "caption of between",
        "rest": "caption of rest",
    }
    assert report["dropped"] == {"not a regular file": 4, "duplicate key": 2}
    assert not any("secret" in line for line in (tmp_path / "out/dropped.jsonl").read_text().splitlines())


# ---- 23


def test_fault_23_hostile_captions(tmp_path):
    captions = {
        "missing": None,
        "empty": caption(""),
        "endless": caption("x" * 5000),
        "control": caption("a\x00red\x1b[31m\ncircle\u2028"),
        "surrogate": b'{"prompt": "half \\ud83d pair"}',
        "brackets": b"[" * 60_000,
        "nested": b'{"prompt":' * 60_000,
        "number": b'{"prompt": 1e999}',
        "not-utf8": b'{"prompt": "\xff\xfe"}',
        "good": caption("a good one"),
    }
    members: list = []
    for i, (key, data) in enumerate(captions.items()):
        members += [(f"{key}.png", noise_png(i)), *([(f"{key}.json", data)] if data is not None else [])]
    write_tar(tmp_path / "a.tar", members)
    run(tmp_path / "a.tar", tmp_path / "d", heldout=0)
    assert {key: text for key, text, _ in rows(tmp_path / "d")} == {"control": "a red [31m circle", "surrogate": "half pair", "good": "a good one"}
    assert dropped(tmp_path / "d") == {
        "missing": "missing caption",
        "empty": "missing caption",
        "endless": "caption too long",
        "brackets": "bad json",
        "nested": "bad json",
        "number": "missing caption",
        "not-utf8": "bad json",
    }


def test_fault_23_in_tables(tmp_path):
    texts = pa.array([b"good", b"\xff\xfe bad bytes", None, b"", b"x" * 5000, b"nul\x00byte"])
    table = pa.table({"image": [noise_png(i) for i in range(6)], "text": texts})
    pq.write_table(table, tmp_path / "binary.parquet")
    lying = pa.table({"image": table["image"], "text": pa.chunked_array([pa.Array.from_buffers(pa.string(), 6, texts.buffers())])})
    pq.write_table(lying, tmp_path / "text.parquet")  # says that it is UTF-8
    with pa.OSFile(str(tmp_path / "text.arrow"), "wb") as file, pa.ipc.new_file(file, lying.schema) as writer:
        writer.write_table(lying)
    for name in ("binary.parquet", "text.parquet", "text.arrow"):
        report = run(tmp_path / name, tmp_path / f"d-{name}", heldout=0)
        assert [text for _, text, _ in rows(tmp_path / f"d-{name}")] == ["good", "\ufffd\ufffd bad bytes", "nul byte"]
        assert report["dropped"] == {"missing caption": 2, "caption too long": 1}


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_flipped_bytes_in_tables_never_crash(kind, tmp_path):
    """In a process of its own: pyarrow believes offsets, and a crash would be the interpreter's."""
    code = """
import sys, numpy as np, pyarrow as pa, pyarrow.parquet as pq
from flowt2i.data.tables import TableShard
from flowt2i.errors import UserError
path = sys.argv[1]
table = pa.table({"image": [b"x" * 100] * 50, "text": [f"caption {i}" for i in range(50)]})
if path.endswith(".parquet"):
    pq.write_table(table, path)
else:
    with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
whole, random = open(path, "rb").read(), np.random.default_rng(0)
from pathlib import Path
for _ in range(200):
    data = bytearray(whole)
    for place in random.integers(0, len(data), 3):
        data[place] = random.integers(256)
    open(path, "wb").write(data)
    try:
        assert sum(1 for _ in TableShard(Path(path)).samples()) <= 51
    except UserError:
        pass
print("survived")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / f"a.{kind}")], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.stdout == "survived\n", done.stderr


# ---- 24


def test_fault_24_pickles_and_pipes_never_run(tmp_path):
    hacked = tmp_path / "hacked"
    evil = pickle.dumps(Evil(hacked))
    members: list = [(f"a.{suffix}", evil) for suffix in ("pkl", "pickle", "pyd", "pth", "pt", "npy", "npz", "cls", "json", "txt", "png")]
    write_tar(tmp_path / "a.tar", [*members, *pair("good"), ("b.jpg", noise_png(1)), ("b.txt", f"$(touch {hacked})".encode())])
    report = run(tmp_path / "a.tar", tmp_path / "d", heldout=0)
    assert report["kept"] == 2 and dropped(tmp_path / "d")["a"] in ("undecodable image", "bad json")
    for source in (f"pipe:touch {hacked}", f"pipe:cat {tmp_path}/a.tar; touch {hacked}"):
        assert main(["prepare", source, "--out", str(tmp_path / "e")]) == 2
        assert main(["prepare", str(tmp_path / "a.tar"), source, "--out", str(tmp_path / "e")]) == 2
    assert main(["prepare", f"{tmp_path}/a.tar | touch {hacked}", "--out", str(tmp_path / "e")]) == 2
    assert not hacked.exists() and not (tmp_path / "e").exists()


def test_pickled_nets_are_refused_in_one_line(tmp_path):
    make_tar(tmp_path / "a.tar", range(30))
    hacked = tmp_path / "hacked"
    evil = pickle.dumps(Evil(hacked))
    vae, text = tmp_path / "vae", tmp_path / "text"
    for folder, names in ((vae, ("diffusion_pytorch_model.bin", "diffusion_pytorch_model.pt")), (text, ("pytorch_model.bin", "model.pt", "tokenizer.pkl"))):
        folder.mkdir()
        for name in names:
            (folder / name).write_bytes(evil)
    (vae / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    (text / "config.json").write_text('{"model_type": "t5"}')
    common = ["prepare", tmp_path / "a.tar", "--out", tmp_path / "d"]
    one_line(flowt2i(*common, "--codec", vae), "pickled", "safetensors")
    one_line(flowt2i(*common, "--text", text), "pickled", "safetensors")
    for name in ("../../model.safetensors", "/etc/passwd", "model.bin"):  # an index that leads elsewhere
        (text / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
        assert "index of weights" in refused(tmp_path / "a.tar", tmp_path / "d", text=str(text))
    assert not hacked.exists()


# ---- 25


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    """A small real AutoencoderKL with random weights."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4, "block_out_channels": (8, 8, 8, 8)}
    AutoencoderKL(**blocks, latent_channels=4, norm_num_groups=4, layers_per_block=1).save_pretrained(folder, safe_serialization=True)
    return folder


def spoiled(vae: Path, target: Path, change) -> Path:
    shutil.copytree(vae, target)
    path = target / "diffusion_pytorch_model.safetensors"
    save_file({name: change(name, value) for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    return target


def test_fault_25_nan_or_constant_latents_are_refused(vae, tmp_path):
    make_tar(tmp_path / "a.tar", range(30))
    broken = {
        "nan": lambda name, value: torch.full_like(value, torch.nan) if name == "encoder.conv_out.weight" else value,
        "all nan": lambda name, value: torch.full_like(value, torch.nan),
        "zero": lambda name, value: torch.zeros_like(value),
        "blind": lambda name, value: torch.zeros_like(value) if name == "encoder.conv_in.weight" else value,  # differs in space, not by picture
    }
    for name, change in broken.items():
        folder = spoiled(vae, tmp_path / name, change)
        text = refused(tmp_path / "a.tar", tmp_path / "d", codec=str(folder), image_size=32)
        assert str(folder) in text and ("NaN" if "nan" in name else "constant" if name == "zero" else "same latents") in text
        assert not (tmp_path / "d/dataset.json").exists()
    assert run(tmp_path / "a.tar", tmp_path / "d", codec=str(vae), image_size=32)["kept"] == 30  # the same folder, with a good VAE


# ---- 26


@pytest.fixture(scope="module")
def with_vae(vae, tmp_path_factory) -> Path:
    """A folder with data/ made of scenes and vae/."""
    folder = tmp_path_factory.mktemp("prepared")
    shutil.copytree(vae, folder / "vae")
    run("scenes", folder / "data", count=60, heldout=0.1, codec=str(folder / "vae"), image_size=64, unit_rows=0)
    return folder


def edit(path: Path, *keys: str, value) -> None:
    root = json.loads(path.read_text())
    inner = root
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(root))


def swap_weights(folder: Path) -> None:
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    save_file({name: value * 1.001 for name, value in load_file(path).items()}, path, metadata={"format": "pt"})


def swap_tokenizer(folder: Path) -> None:
    path = folder / "data/tokenizer/tokenizer.json"
    model = json.loads(path.read_text())
    model["model"]["merges"] = model["model"]["merges"][:-1]
    path.write_text(json.dumps(model))


CHANGES = {
    "vae": (swap_weights, ["fingerprint"]),
    "vae scaling factor": (lambda folder: edit(folder / "vae/config.json", "scaling_factor", value=0.5), ["fingerprint"]),
    "scale": (lambda folder: edit(folder / "data/dataset.json", "latent_std", value=[0.18215] * 4), ["latent_std"]),
    "resolution": (lambda folder: edit(folder / "data/dataset.json", "codec", "image_size", value=128), ["codec.image_size"]),
    "tokenizer": (swap_tokenizer, ["tokenizer"]),
    "token limit": (lambda folder: edit(folder / "data/dataset.json", "text", "max_tokens", value=7), ["text.max_tokens"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_fault_26_changed_after_preparation(change, with_vae, tiny, tmp_path):
    """The VAE's own folder is changed in place, as an update would."""
    apply, words = CHANGES[change]
    backup = tmp_path / "backup"
    shutil.copytree(with_vae, backup)
    try:
        apply(with_vae)
        done = flowt2i("train", "--config", "stability", "--data", with_vae / "data", "--out", tmp_path / "run", *tiny, "--train.steps", "1")
        one_line(done, *words)
    finally:
        shutil.rmtree(with_vae)
        shutil.copytree(backup, with_vae)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.slow
def test_fault_26_unchanged_data_trains_and_other_data_is_refused_on_resume(with_vae, vae, tiny, tmp_path):
    common = ["train", "--config", "stability", "--out", tmp_path / "run", *tiny, "--train.eval_every", "0"]
    assert flowt2i(*common, "--data", with_vae / "data", "--train.steps", "1").returncode == 0
    run("scenes", tmp_path / "other", count=60, heldout=0.1, codec=str(vae), image_size=32, unit_rows=0)
    one_line(flowt2i(*common, "--data", tmp_path / "other", "--train.steps", "2", "--resume", "latest"), "differ in", "image_size")


# ---- a folder that somebody tampered with


def test_tampered_manifests_are_refused(tmp_path):
    make_tar(tmp_path / "a.tar", range(30))
    run(tmp_path / "a.tar", tmp_path / "whole", heldout=0.2)
    run(tmp_path / "a.tar", tmp_path / "begun", worker="0/2")
    outside = sorted(tmp_path.iterdir())

    def tampered(name: str, change, kind: str = "begun") -> str:
        folder = Path(shutil.copytree(tmp_path / kind, tmp_path / "t"))
        try:
            change(folder / name)
            if kind == "begun":
                return refused(tmp_path / "a.tar", folder, worker="1/2")
            if name == "report.json":
                assert main(["inspect", str(folder), "--out", str(tmp_path / "t/x.png")]) == 2
                return refused(tmp_path / "a.tar", folder, heldout=0.2)
            with pytest.raises(UserError) as caught:
                ImageTextDataset(folder)
            return str(caught.value)
        finally:
            shutil.rmtree(folder)

    record = sorted((tmp_path / "begun/units").glob("*.json"))[0].relative_to(tmp_path / "begun")
    for name in ("plan.json", "options.json", str(record)):
        for garbage in ("", "{", "[]", '"x"', "[" * 60_000, '{"a":' * 60_000):
            assert "broken" in tampered(name, lambda path, garbage=garbage: path.write_text(garbage)), name
    assert "broken" in tampered("plan.json", lambda path: edit(path, "groups", value=[-1, 2]))
    assert "broken" in tampered("plan.json", lambda path: edit(path, "file", value="../../x"))
    assert "source changed" in tampered("plan.json", lambda path: edit(path, "shards", value=["../../x"]))
    assert "name says" in tampered(str(record), lambda path: edit(path, "group", value=7))
    assert "name says" in tampered(str(record), lambda path: edit(path, "keys", value=["../../x"]))
    for value in ([], ["nan"] * 3, [0.0] * 3, [-1.0] * 3, [1.0] * 2):
        assert "latent_std" in tampered("dataset.json", lambda path, value=value: edit(path, "latent_std", value=value), "whole")
    assert "train_count" in tampered("dataset.json", lambda path: edit(path, "train_count", value=3), "whole")
    assert "codec.shape" in tampered("dataset.json", lambda path: edit(path, "codec", "shape", value=[3, 1 << 40, 1 << 40]), "whole")
    for garbage in ("{", "[" * 60_000, "[]"):
        assert "dataset.json" in tampered("dataset.json", lambda path, garbage=garbage: path.write_text(garbage), "whole")
        assert "report.json" in tampered("report.json", lambda path, garbage=garbage: path.write_text(garbage), "whole")
    assert sorted(tmp_path.iterdir()) == outside


def test_file_names_in_records_are_never_followed(tmp_path):
    """Names of files come from the plan's numbers; a record that names others is refused where it would be read."""
    from flowt2i.data.merge import merge

    make_tar(tmp_path / "a.tar", range(30))
    for i in range(2):
        run(tmp_path / "a.tar", tmp_path / f"part{i}", worker=f"{i}/2", heldout=0)
    record = sorted((tmp_path / "part0/units").glob("*.json"))[0]
    edit(record, "files", value={"../../x": "0" * 64})
    with pytest.raises(UserError, match="names a file"):
        merge([tmp_path / "part0", tmp_path / "part1"], tmp_path / "out", progress=False)
    shutil.copy(record, record.with_name("..-..-x.json"))  # a stranger among the records is not read
    edit(record, "files", value={})
    assert not (tmp_path / "x").exists()


def test_links_out_of_a_source_folder(tmp_path):
    """A folder from a stranger: `3.txt -> /etc/passwd` would make a caption of it."""
    folder, outside = tmp_path / "in", tmp_path / "outside"
    for place in (folder / "sub", outside):
        place.mkdir(parents=True)
    (outside / "secret.txt").write_text("a secret")
    (outside / "image.png").write_bytes(noise_png(0))
    for i in range(5):
        (folder / f"{i}.png").write_bytes(noise_png(i + 1))
        (folder / f"{i}.txt").write_text(f"caption {i}")
    (folder / "1.txt").unlink()
    (folder / "1.txt").symlink_to(outside / "secret.txt")
    (folder / "2.png").unlink()
    (folder / "2.png").symlink_to("../outside/image.png")
    (folder / "3.png").unlink()
    (folder / "3.png").symlink_to("0.png")  # a link inside is one's own business
    (folder / "sub/away").symlink_to(outside)
    (folder / "sub/metadata.jsonl").write_text('{"file_name": "away/image.png", "text": "through a linked folder"}\n')
    report = run(folder, tmp_path / "d", heldout=0)
    assert [text for _, text, _ in rows(tmp_path / "d")] == ["caption 0", "caption 3", "caption 4"]
    assert report["dropped"] == {"outside the folder": 3}
    assert "--follow-links" in (tmp_path / "d/dropped.jsonl").read_text() and "secret" not in (tmp_path / "d/dropped.jsonl").read_text()
    assert run(folder, tmp_path / "e", heldout=0, follow_links=True)["kept"] == 6


# ---- memory, disk, spelling


class Hungry:
    """A codec that has memory for `room` pictures at a time."""

    class spec:
        id, image_size = "hungry", 8

    def __init__(self, room: int, error: Exception) -> None:
        self.room, self.error, self.sizes = room, error, []

    def encode(self, images: torch.Tensor) -> np.ndarray:
        self.sizes.append(len(images))
        if len(images) > self.room:
            raise self.error
        return images.numpy()


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu", "python"])
def test_out_of_memory_shrinks_the_batch(error):
    pixels = np.arange(20 * 3, dtype=np.uint8).reshape(20, 3, 1, 1)
    codec = Hungry(4, error)
    encoder = Encoder(codec, 16)
    with pytest.warns(UserWarning, match="images at a time"):
        assert np.array_equal(encoder(pixels), pixels)
    assert codec.sizes == [16, 8, 4, 4, 4, 4, 4] and encoder.batch_size == 4
    with pytest.warns(UserWarning), pytest.raises(UserError, match="not enough memory for codec 'hungry' to encode one image"):
        Encoder(Hungry(0, error), 2)(pixels)
    with pytest.raises(RuntimeError, match="something else"):
        Encoder(Hungry(0, RuntimeError("something else")), 2)(pixels)


def test_a_real_shortage_of_memory_is_one_line(vae, tmp_path):
    """Address space so small that no picture of this size can be encoded."""
    make_tar(tmp_path / "a.tar", range(3))
    code = f"""
import resource, sys
import diffusers.models.autoencoders.autoencoder_kl, flowt2i.data.prepare, transformers
from flowt2i.cli import main
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (700 << 20),) * 2)
sys.exit(main(["prepare", {str(tmp_path / "a.tar")!r}, "--out", {str(tmp_path / "d")!r}, "--codec", {str(vae)!r}, "--image-size", "2048", "--workers", "1"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    one_line(done, "not enough memory", "--image-size")


def test_the_spelling_of_a_path_does_not_matter(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    make_tar(tmp_path / "in/a.tar", range(30))
    (tmp_path / "linked").symlink_to(tmp_path / "in")
    monkeypatch.chdir(tmp_path)
    first = run("in", tmp_path / "d")
    for spelling in ("in/", "./in", tmp_path / "in", f"{tmp_path}/in/", "linked", "../" + tmp_path.name + "/in"):
        assert run(spelling, tmp_path / "d") == first
    first = run("in/*.tar", tmp_path / "e")
    assert run(tmp_path / "in/*.tar", tmp_path / "e") == first
    make_tar(tmp_path / "b.tar", range(30))
    assert "sources=" in refused("b.tar", tmp_path / "d")


def test_a_full_disk(tmp_path):
    """A real file system of 64 MiB, filled up while a preparation runs; it goes on when there is room again."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no permission to mount a small file system")
    try:
        words = ["--image-size", "128", "--unit-rows", "40", "--workers", "1", "--count", "400"]
        filler = disk / "filler"
        filler.write_bytes(b"\0" * (30 << 20))  # 400 x 49 kB fit beside it, as far as the projection knows
        child = subprocess.Popen(
            [sys.executable, "-m", "flowt2i", "prepare", "scenes", "--out", str(disk / "d"), *words], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 120
        while not list((disk / "d/units").glob("*.json")) and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with filler.open("ab") as file:
            try:
                while True:
                    file.write(b"\0" * (1 << 16))
                    file.flush()
            except OSError:
                pass
        errors = child.communicate(timeout=120)[1]
        one_line(subprocess.CompletedProcess([], child.returncode, "", errors), "no space left to write", str(disk / "d"), "bytes")
        assert not list((disk / "d").rglob("*.tmp"))
        filler.unlink()
        assert flowt2i("prepare", "scenes", "--out", disk / "d", *words).returncode == 0
        assert flowt2i("prepare", "scenes", "--out", tmp_path / "clean", *words).returncode == 0
        assert contents(disk / "d") == contents(tmp_path / "clean")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_limit_on_the_size_of_files(tmp_path):
    make_tar(tmp_path / "a.tar", range(30))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    expected = run(tmp_path / "a.tar", tmp_path / "clean", image_size=64)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        text = refused(tmp_path / "a.tar", tmp_path / "d", image_size=64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "may not grow so large" in text and str(tmp_path / "d/train") in text and "bytes" in text
    assert run(tmp_path / "a.tar", tmp_path / "d", image_size=64)["kept"] == expected["kept"]
    assert contents(tmp_path / "d") == contents(tmp_path / "clean")


# ---- 14, the side of the data


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["killed", "stopped"])
def test_fault_14_data_worker(kind, scenes_data, tiny, tmp_path):
    import psutil

    words = [*tiny, "--train.steps", "1000000", "--train.eval_every", "0", "--data.workers", "2"]
    command = [sys.executable, "-m", "flowt2i", "train", "--config", "quickstart", "--data", str(scenes_data), "--out", str(tmp_path / "run"), *words]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    family: list = []
    try:
        log = tmp_path / "run/log.jsonl"
        deadline = time.monotonic() + 180
        while not (log.exists() and log.read_text().count("\n") > 5) and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        family = psutil.Process(child.pid).children(recursive=True)
        workers = [p for p in family if "spawn_main" in " ".join(p.cmdline())]
        assert len(workers) == 2, [p.cmdline() for p in family]
        workers[0].send_signal(signal.SIGKILL if kind == "killed" else signal.SIGSTOP)
        errors = child.communicate(timeout=150)[1]
        assert not psutil.wait_procs(family, timeout=20)[1], "orphans"
    finally:
        child.kill()
        for process in psutil.wait_procs(family, timeout=0)[1]:
            process.send_signal(signal.SIGCONT)  # leave nothing behind where the test fails
    one_line(subprocess.CompletedProcess([], child.returncode, "", errors), "killed" if kind == "killed" else "no batch came", "--resume latest")
