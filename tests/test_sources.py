"""Sources: patterns, tars (whole, cut, corrupt, hostile), folders, tables, the hub, captions."""

import io
import json
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from flowt2i.data import tables
from flowt2i.data.captions import clean, read_caption
from flowt2i.data.sample import CaptionFile, Dropped, RawSample, Span
from flowt2i.data.sources import expand_braces, open_sources
from flowt2i.errors import UserError


def picture(colour: tuple[int, int, int] = (200, 30, 30), side: int = 40) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(file, "JPEG")
    return file.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes | tarfile.TarInfo]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            if isinstance(data, tarfile.TarInfo):
                data.name = name
                tar.addfile(data)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def pair(key: str, caption: str = "") -> list[tuple[str, bytes | tarfile.TarInfo]]:
    return [(f"{key}.jpg", picture()), (f"{key}.json", json.dumps({"prompt": caption or f"caption of {key}"}).encode())]


def read(*sources, **options) -> list[tuple[str, str]]:
    """(key, caption or reason in brackets) of all samples."""
    found = []
    for shard in open_sources([str(source) for source in sources], **options):
        for sample in shard.samples():
            try:
                if sample.reason:
                    raise Dropped(sample.reason)
                found.append((sample.key, read_caption(sample)))
            except Dropped as dropped:
                found.append((sample.key, f"[{dropped.reason}]"))
    return found


def message(*sources, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(*sources, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- names


def test_braces():
    assert expand_braces("a-{000..002}.tar") == ["a-000.tar", "a-001.tar", "a-002.tar"]
    assert expand_braces("{9..11}") == ["9", "10", "11"]
    assert expand_braces("{2..1}{a,b}") == ["2a", "2b", "1a", "1b"]
    assert expand_braces("plain") == ["plain"]


def test_each_shard_once_and_in_order(tmp_path):
    for name in "cab":
        write_tar(tmp_path / f"{name}.tar", pair(name))
    expected = [("a", "caption of a"), ("b", "caption of b"), ("c", "caption of c")]
    assert read(tmp_path) == expected
    assert read(tmp_path / "*.tar") == expected
    assert read(str(tmp_path) + "/{a,b,c}.tar") == expected
    assert read(tmp_path, tmp_path / "*.tar", tmp_path / "b.tar") == expected
    (tmp_path / "link.tar").symlink_to(tmp_path / "a.tar")
    assert read(tmp_path) == expected
    assert [key for key, _ in read(tmp_path / "b.tar", tmp_path / "a.tar")] == ["b", "a"]


def test_names_that_cannot_be_read(tmp_path):
    assert "never run" in message("pipe:cat secrets.tar")
    assert "URL" in message("https://example.com/a.tar")
    assert "no such file" in message(tmp_path / "missing.tar")
    assert "no such file" in message("./missing")
    assert "nothing matches" in message(tmp_path / "*.tar")
    write_tar(tmp_path / "a0.tar", pair("a"))
    assert "a1.tar" in message(str(tmp_path) + "/a{0..1}.tar")
    (tmp_path / "empty").mkdir()
    assert "holds no" in message(tmp_path / "empty")
    (tmp_path / "x.csv").write_text("a")
    assert "not a .tar" in message(tmp_path / "x.csv")
    assert "no source" in message()


def test_resuming_in_the_middle(tmp_path):
    write_tar(tmp_path / "a.tar", [member for i in range(5) for member in pair(f"{i}")])
    (shard,) = open_sources([str(tmp_path)])
    assert [sample.key for sample in shard.samples(3)] == ["3", "4"]
    assert shard.estimate() == 5


# ---- tars


def test_tar_pairs(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        [
            ("x/1.JPG", picture()),
            ("x/1.txt", "\ufefffrom a text file\r\n".encode()),
            ("2.webp", picture()),
            ("2.json", b'{"caption": "from caption"}'),
            ("3.png", picture()),
            ("3.json", b'{"other": 1}'),
            ("3.txt", b"from the text instead"),
            ("v1.5.jpg", picture()),
            ("v1.5.json", b'{"prompt": ["a list", "of two"]}'),
            ("ignored.npy", b"1"),
        ],
    )
    assert read(tmp_path / "a.tar") == [
        ("x/1", "from a text file"),
        ("2", "from caption"),
        ("3", "from the text instead"),
        ("v1.5", "a list"),
    ]


def test_pairs_apart_and_keys_twice(tmp_path):
    members = [*pair("a", "first"), *pair("a", "second"), ("b.json", b'{"prompt": "b"}'), *pair("c"), ("b.jpg", picture())]
    write_tar(tmp_path / "a.tar", members)
    assert read(tmp_path) == [("a", "first"), ("a", "[duplicate key]"), ("b", "b"), ("c", "caption of c")]


def test_incomplete_pairs(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.jpg", picture()), ("b.json", b'{"prompt": "b"}'), *pair("c")])
    assert read(tmp_path) == [("a", "[missing caption]"), ("b", "[missing image]"), ("c", "caption of c")]


def members_at(path: Path) -> list[int]:
    with tarfile.open(path) as tar:
        return [member.offset for member in tar.getmembers()]


def test_tar_cut_at_a_member_boundary_is_reported(tmp_path):
    """tarfile and webdataset read such a tar silently short."""
    path = write_tar(tmp_path / "a.tar", [member for i in range(4) for member in pair(f"{i}")])
    offsets = members_at(path)
    path.write_bytes(path.read_bytes()[: offsets[4]])
    assert read(path) == [("0", "caption of 0"), ("1", "caption of 1"), ("", "[tar ends early]")]
    path.write_bytes(path.read_bytes()[: offsets[3]])
    assert read(path) == [("0", "caption of 0"), ("1", "[missing caption]"), ("", "[tar ends early]")]


@pytest.mark.parametrize("extra", [1, 100, 512, 700])
def test_tar_cut_inside_a_member(tmp_path, extra):
    path = write_tar(tmp_path / "a.tar", [member for i in range(4) for member in pair(f"{i}")])
    path.write_bytes(path.read_bytes()[: members_at(path)[4] + extra])
    assert read(path)[:2] == [("0", "caption of 0"), ("1", "caption of 1")]
    assert read(path)[-1] == ("", "[tar ends early]")


def test_corrupt_tars(tmp_path):
    path = write_tar(tmp_path / "a.tar", [member for i in range(4) for member in pair(f"{i}")])
    data = bytearray(path.read_bytes())
    data[members_at(path)[4] + 148] ^= 0xFF  # the checksum of the fifth header
    path.write_bytes(data)
    assert read(path) == [("0", "caption of 0"), ("1", "caption of 1"), ("", "[corrupt tar]")]
    for content in (b"", b"\0" * 100, b"not a tar at all" * 100, b"\x1f\x8b" + b"\0" * 2000):
        path.write_bytes(content)
        assert [reason for _, reason in read(path)] in (["[corrupt tar]"], ["[tar ends early]"])


def test_joined_tars_are_reported(tmp_path):
    one = write_tar(tmp_path / "one.tar", pair("a")).read_bytes()
    (tmp_path / "two.tar").write_bytes(one + one)
    assert read(tmp_path / "two.tar") == [("a", "caption of a"), ("", "[data after the end of the tar]")]


def test_hostile_members(tmp_path):
    def special(kind: bytes, target: str = "") -> tarfile.TarInfo:
        info = tarfile.TarInfo()
        info.type, info.linkname = kind, target
        return info

    (tmp_path / "secret.txt").write_text("secret")
    inside = tmp_path / "in"
    inside.mkdir()
    write_tar(
        inside / "a.tar",
        [
            *pair("../up"),
            *pair("/tmp/absolute"),
            ("sym.jpg", special(tarfile.SYMTYPE, "/etc/passwd")),
            ("sym.txt", b"a link"),
            ("capt.jpg", picture()),
            ("capt.txt", special(tarfile.SYMTYPE, str(tmp_path / "secret.txt"))),
            ("hard.jpg", special(tarfile.LNKTYPE, "../up.jpg")),
            ("fifo.jpg", special(tarfile.FIFOTYPE)),
            ("device.jpg", special(tarfile.CHRTYPE)),
            ("bad.pkl", b"cos\nsystem\n(S'touch hacked'\ntR."),
            ("bad.jpg", picture()),
            ("bad.json", b'{"prompt": "beside a pickle"}'),
            *pair("line\nbreak\udcff"),
        ],
    )
    before = sorted(tmp_path.rglob("*"))
    found = dict(read(inside))
    assert found["../up"] == "caption of ../up" and found["/tmp/absolute"] == "caption of /tmp/absolute"
    for key in ("sym", "capt", "hard", "fifo", "device"):
        assert found[key] == "[not a regular file]"
    assert found["bad"] == "beside a pickle"
    assert "line?break?" in found
    assert sorted(tmp_path.rglob("*")) == before and not Path("hacked").exists()


def test_header_that_points_back(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*pair("a"), *pair("b")])
    data = bytearray(path.read_bytes())
    at = members_at(path)[2]
    data[at + 124 : at + 136] = b"\xff" * 10 + (65536 - 1536).to_bytes(2, "big")  # a size of -1536
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = f"{sum(data[at : at + 512]):06o}\0 ".encode()
    path.write_bytes(data)
    assert read(path)[0] == ("a", "caption of a")
    assert read(path)[-1][1] in ("[corrupt tar]", "[tar ends early]")


def test_thousands_of_extension_headers(tmp_path):
    info = tarfile.TarInfo("x" * 150)
    block = info.create_gnu_header(info.get_info(), "utf-8", "strict")[:1024]  # a GNU long name, without the member it names
    (tmp_path / "a.tar").write_bytes(block * 5000)
    assert [reason for _, reason in read(tmp_path)] in (["[corrupt tar]"], ["[tar ends early]"])


# ---- captions


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  two\n\twords\x00 ", "two words"),
        ("bad\ud800pair", "bad pair"),
        ("\ufeffmark", "mark"),
        ("caf\u0065\u0301", "café"),
        ("\x1b[31mred", "[31mred"),
        ("\u2028", ""),
        ("日本語 🙂", "日本語 🙂"),
    ],
)
def test_clean(text, cleaned):
    assert clean(text) == cleaned
    cleaned.encode()


def caption_of(data: bytes, tmp_path: Path, kind: str = "json", **limits) -> str:
    path = tmp_path / f"caption.{kind}"
    path.write_bytes(data)
    sample = RawSample("k", "s", b"", (CaptionFile(kind, Span(str(path))),))
    try:
        return read_caption(sample, **limits)
    except Dropped as dropped:
        return f"[{dropped.reason}]"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"prompt": "a\\ud83d\\ude42b"}', "a🙂b"),
        (b'{"prompt": "a\\ud83d b"}', "a b"),
        (b'{"prompt": ""}', "[missing caption]"),
        (b'{"prompt": null}', "[missing caption]"),
        (b'{"prompt": 5}', "[missing caption]"),
        (b'{"prompt": {"text": "x"}}', "[missing caption]"),
        (b'{"prompt": " ", "text": "instead"}', "instead"),
        (b'["a", "b"]', "a"),
        (b'"bare"', "bare"),
        (b"[" * 60_000, "[bad json]"),
        (b'{"a":' * 60_000, "[bad json]"),
        (b"{", "[bad json]"),
        (b"\xff\xfe\xfd", "[bad json]"),
        (b"", "[bad json]"),
        (b'{"prompt": "' + b"x" * (2 << 20) + b'"}', "[file too large]"),
    ],
)
def test_hostile_json(data, expected, tmp_path):
    assert caption_of(data, tmp_path) == expected


def test_caption_lengths(tmp_path):
    assert caption_of(b"x" * 5000, tmp_path, "txt", longest=2000) == "[caption too long]"
    assert caption_of(b"xx", tmp_path, "txt", shortest=3) == "[caption too short]"
    assert caption_of(b"\xff\xfehello", tmp_path, "txt") == "\ufffd\ufffdhello"
    assert caption_of(b" \n", tmp_path, "txt") == "[missing caption]"


# ---- folders


def test_folder_with_texts_beside(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.jpg", "a.png", "sub/c.JPEG", "alone.jpg"):
        (tmp_path / name).write_bytes(picture())
    (tmp_path / "b.txt").write_text("b text")
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "sub/c.json").write_text('{"prompt": "c text"}')
    assert read(tmp_path) == [
        ("a.png", "a text"),
        ("alone.jpg", "[missing caption]"),
        ("b.jpg", "b text"),
        ("sub/c.JPEG", "c text"),
    ]


def test_folder_with_metadata(tmp_path):
    outside = tmp_path / "outside.jpg"
    outside.write_bytes(picture())
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for name in ("1.jpg", "sub/2.jpg", "unlisted.jpg"):
        (folder / name).write_bytes(picture())
    os.mkfifo(folder / "pipe.jpg")
    rows = [
        {"file_name": "1.jpg", "text": "one"},
        {"file_name": "sub/2.jpg", "text": "two"},
        {"file_name": "gone.jpg", "text": "three"},
        {"file_name": "../outside.jpg", "text": "four"},
        {"file_name": str(outside), "text": "five"},
        {"file_name": "pipe.jpg", "text": "six"},
        {"text": "no name"},
        {"file_name": "1.jpg"},
    ]
    lines = [json.dumps(row) for row in rows] + ["{broken", "", "[" * 60_000]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert read(folder) == [
        ("1.jpg", "one"),
        ("sub/2.jpg", "two"),
        ("gone.jpg", "[missing image]"),
        ("../outside.jpg", "[outside the folder]"),
        (str(outside), "[outside the folder]"),
        ("pipe.jpg", "[missing image]"),
        ("metadata.jsonl:7", "[bad json]"),
        ("1.jpg", "[missing caption]"),
        ("metadata.jsonl:9", "[bad json]"),
        ("metadata.jsonl:11", "[bad json]"),
        ("unlisted.jpg", "[missing caption]"),
    ]


# ---- tables


def write_parquet(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


def test_parquet(tmp_path):
    images = [{"bytes": picture(), "path": "/etc/passwd"}] * 3 + [{"bytes": None, "path": "/etc/passwd"}, None]
    write_parquet(tmp_path / "a.parquet", image=images, text=["one", None, "three", "four", "five"])
    found = read(tmp_path)
    assert found == [
        ("a-00000000", "one"),
        ("a-00000001", "[missing caption]"),
        ("a-00000002", "three"),
        ("a-00000003", "[missing image]"),
        ("a-00000004", "[missing image]"),
    ]
    (shard,) = open_sources([str(tmp_path)])
    assert shard.estimate() == 5
    for start in range(6):
        assert [sample.key for sample in shard.samples(start)] == [key for key, _ in found[start:]]


def test_table_columns(tmp_path):
    write_parquet(tmp_path / "a.parquet", photograph=[picture()], words=["one"], key=["k1"])
    assert "no image column" in message(tmp_path)
    assert "did you mean 'words'" in message(tmp_path, image_column="photograph", text_column="word")
    assert read(tmp_path, image_column="photograph", text_column="words") == [("k1", "one")]


def test_broken_parquet(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", image=[picture()] * 100, text=[f"{i} words" for i in range(100)])
    path.write_bytes(path.read_bytes()[:-100])
    assert "cannot be read" in message(path)


def test_saved_datasets_folder(tmp_path):
    """What `datasets.Dataset.save_to_disk` leaves."""
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": picture(), "path": None}] * 3, "text": ["one", "two", "three"]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "d")
    assert [caption for _, caption in read(tmp_path / "d")] == ["one", "two", "three"]


# ---- the hub


def test_hub_id_offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in message("jackyhate/text-to-image-2M")


def test_hub_stream(tmp_path, monkeypatch):
    """The streaming path, with a local parquet file in place of the hub."""
    datasets = pytest.importorskip("datasets")
    write_parquet(tmp_path / "a.parquet", image=[{"bytes": picture(), "path": "x.jpg"}] * 4, text=["0", "1", "2", "3"])
    load = lambda id, split, files: datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), split=split, streaming=True)
    monkeypatch.setattr(tables, "open_hub", load)
    (shard,) = open_sources(["someone/something"])
    samples = list(shard.samples(1))
    assert [sample.captions[0] for sample in samples] == ["1", "2", "3"]
    assert samples[0].key == "someone-something-00000001" and samples[0].image == picture()
    assert shard.costly and shard.signature() == "someone/something:train:"


def test_hub_stream_of_webdataset(tmp_path, monkeypatch):
    """The layout of text-to-image-2M as `datasets` streams it: columns jpg, json and __key__."""
    datasets = pytest.importorskip("datasets")
    write_tar(tmp_path / "a.tar", [*pair("000"), *pair("001")])
    load = lambda id, split, files: datasets.load_dataset("webdataset", data_files=str(tmp_path / "a.tar"), split=split, streaming=True)
    monkeypatch.setattr(tables, "open_hub", load)
    assert read("jackyhate/text-to-image-2M") == [("000", "caption of 000"), ("001", "caption of 001")]


# ---- scenes


def test_scenes():
    found = read("scenes", count=100, heldout=0.04, seed=3)
    assert len(found) == 100
    assert found[0][0] == "scenes-3-00000000" and found[96][0] == "heldout-pair-3-00000000"
    assert found == read("scenes", count=100, heldout=0.04, seed=3) != read("scenes", count=100, heldout=0.04, seed=4)
