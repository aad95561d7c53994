"""Captions to token ids, and frozen text encoders.

Two tokenizers behind one class: `builtin`, learned from the captions and byte-level so that nothing is unknown, and that
of any Hugging Face encoder. Captions are cleaned in one place, `clean_caption`. The encoder that goes with `builtin` is
trained along with the model and lives there; `FrozenEncoder` is for pretrained ones and runs in fp32 or bf16, never fp16.
"""

import hashlib
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from flowt2i.data.captions import clean
from flowt2i.description import TextSpec, fingerprint_files
from flowt2i.errors import UserError
from flowt2i.pretrained import LOAD_ERRORS, find_pretrained, first_line, full_id, quiet, read_config, weight_files

PAD, END = "<pad>", "<end>"
SMALLEST_VOCAB = 256 + 2  # every byte, the pad and the end token
CHARS_PER_TOKEN = 16  # English has about 4: what lies beyond this many cannot fit, so it is cut before the tokenizer works on it
CHARS_AT_MOST = 1 << 16
# Encoders whose position table begins after the padding index, so that it is shorter than max_position_embeddings says.
OFFSET_POSITIONS = {"roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "longformer", "data2vec-text", "roberta-prelayernorm"}
# Where AutoModel would load more than the text encoder.
TEXT_CLASSES = {
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "mt5": "MT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
    "siglip": "SiglipTextModel",
    "siglip2": "Siglip2TextModel",
}


def clean_caption(text: str) -> str:
    """The caption as `prepare` cleans it (`data.captions.clean`), and never endless: the same for training and for prompts."""
    return clean(text[:CHARS_AT_MOST])


def learn_tokenizer(captions: Iterable[str], vocab_size: int = 4096) -> Any:
    """A byte-level BPE `tokenizers.Tokenizer` over lower-cased NFKC text: `<pad>` is 0, `<end>` 1 and closes every caption.

    The same captions give the same tokenizer. UserError if `vocab_size` has no room for all bytes.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    if vocab_size < SMALLEST_VOCAB:
        raise UserError(f"vocabulary of {vocab_size} is too small: the built-in tokenizer needs at least {SMALLEST_VOCAB}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[PAD, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=32,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_cleaned(captions), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return tokenizer


class CaptionTokenizer:
    """Captions to token ids: cleaned, ended by the end token, at most `spec.max_tokens` long, never empty.

    `truncated` counts the captions that were cut so far; each call that cut some warns once.
    """

    def __init__(self, spec: TextSpec, backend: Any, serialised: str | None = None):
        self.spec = spec
        self.truncated = 0
        self.backend = backend  # tokenizers.Tokenizer (builtin) or a transformers tokenizer (hf)
        self._serialised = serialised  # builtin: the very text that was fingerprinted

    def __call__(self, captions: Sequence[str]) -> list[list[int]]:
        limit = self.spec.max_tokens
        rows, cut = token_ids(self.backend, captions, limit)
        if cut:
            self.truncated += cut
            warnings.warn(f"{cut} of {len(rows)} captions cut to {limit} tokens", stacklevel=2)
        return rows

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without pad, end and other special tokens."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=True).strip()

    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer` needs into `folder/tokenizer/`."""
        target = Path(folder) / "tokenizer"
        target.mkdir(parents=True, exist_ok=True)
        if self._serialised is not None:
            (target / "tokenizer.json").write_text(self._serialised, encoding="utf-8")
        else:
            with quiet():
                self.backend.save_pretrained(str(target))


def make_tokenizer(id: str, *, captions: Iterable[str] = (), max_tokens: int = 128, vocab_size: int = 4096) -> CaptionTokenizer:
    """`builtin`: learned from `captions` (`vocab_size` is its upper limit). Otherwise that of a Hugging Face encoder, by id or folder.

    `spec.max_tokens` is `max_tokens` or the encoder's own limit, whichever is less (with a warning).
    UserError: unknown, unreachable, pickled or unusable encoder; a limit below 2 tokens.
    """
    if max_tokens < 2:
        raise UserError(f"max_tokens={max_tokens} leaves no room for a caption: use at least 2")
    if id == "builtin":
        serialised = learn_tokenizer(captions, vocab_size).to_str()
        return _builtin(serialised, max_tokens)
    folder = find_pretrained(id, stem="model", what="text encoder", instead="builtin", tokenizer=True)
    config, backend = _load_config(folder, id), _load_backend(folder, id)
    limit = _limit(config, backend)
    if max_tokens > limit:
        warnings.warn(f"text encoder {id!r} reads at most {limit} tokens: max_tokens is {limit}, not {max_tokens}", stacklevel=2)
    if len(backend) > config.vocab_size:
        sizes = f"the tokenizer has {len(backend)} tokens, the encoder embeds {config.vocab_size}"
        raise UserError(f"text encoder {id!r}: {sizes}: put the tokenizer files that belong to it into the folder")
    spec = TextSpec(
        kind="hf",
        id=full_id(id),
        fingerprint=_fingerprint(folder),
        max_tokens=min(max_tokens, limit),
        vocab_size=len(backend),
        dim=int(config.hidden_size),
        pad_id=backend.pad_token_id if backend.pad_token_id is not None else 0,
        null_tokens=tuple(_encode(backend, [""])[0]),
    )
    return CaptionTokenizer(spec, backend)


def load_tokenizer(spec: TextSpec, folder: Path) -> CaptionTokenizer:
    """The tokenizer saved in `folder/tokenizer/`; needs no network. UserError if it is missing or not the one of `spec`."""
    source = Path(folder) / "tokenizer"
    if not source.is_dir():
        raise UserError(f"{folder} has no tokenizer/ folder: copy it from the prepared data, or prepare the data again")
    if spec.kind == "builtin":
        try:
            loaded = _builtin((source / "tokenizer.json").read_text(encoding="utf-8"), spec.max_tokens)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{source}/tokenizer.json cannot be read ({first_line(error)}): copy it from the prepared data") from error
        same = loaded.spec.fingerprint == spec.fingerprint
    else:
        loaded = CaptionTokenizer(spec, _load_backend(source, str(source)))
        same = (len(loaded.backend), tuple(_encode(loaded.backend, [""])[0])) == (spec.vocab_size, spec.null_tokens)
    if not same:
        raise UserError(f"{source} is not the tokenizer the data was prepared with: copy it from there, or prepare the data again")
    return loaded


class FrozenEncoder(nn.Module):
    """A pretrained text encoder that is never trained: always in eval mode, without gradients."""

    def __init__(self, net: nn.Module, dim: int):
        super().__init__()
        self.net = net.eval().requires_grad_(False)
        self.dim = dim

    def train(self, mode: bool = True) -> Self:
        return super().train(False)  # dropout stays off whatever the model around it does

    @torch.no_grad()
    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """ids int64 [B, T], mask bool [B, T] (True: a real token) -> float32 [B, T, dim], zero where padded."""
        with torch.autocast(ids.device.type, enabled=False):  # the caller's autocast must not make it fp16
            features = self.net(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return features.float() * mask.unsqueeze(-1)


def load_encoder(spec: TextSpec, dtype: torch.dtype = torch.float32, id: str | None = None) -> FrozenEncoder:
    """The frozen encoder of `spec` (kind `hf`), from `spec.id` or the `id` given instead, in float32 or bfloat16.

    UserError: unreachable, pickled or broken weights; another net than the data was prepared with; fp16.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise UserError(f"text encoders run in float32 or bfloat16, not {dtype}: T5 overflows in fp16")
    if spec.kind != "hf":
        raise UserError(f"text encoder {spec.id!r} is trained along with the model: there is no frozen encoder to load")
    id = id or spec.id
    folder = find_pretrained(id, stem="model", what="text encoder", instead="builtin")
    found = _fingerprint(folder)
    if found != spec.fingerprint:
        raise UserError(
            f"text encoder {id!r} is not the one the data was prepared with (fingerprint {found[:12]}, not {spec.fingerprint[:12]}): "
            "pass the same encoder, or prepare the data again"
        )
    return FrozenEncoder(_load_net(folder, id, dtype), spec.dim)


def _cleaned(captions: Iterable[str]) -> Iterator[str]:
    for caption in captions:
        yield clean_caption(caption)


def _builtin(serialised: str, max_tokens: int) -> CaptionTokenizer:
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_str(serialised)
    except Exception as error:  # tokenizers raises bare Exception
        raise UserError(f"tokenizer.json is broken ({first_line(error)}): copy it from the prepared data") from error
    backend.encode_special_tokens = True  # "<end>" written in a caption is text, not the end
    spec = TextSpec(
        kind="builtin",
        fingerprint=hashlib.sha256(serialised.encode()).hexdigest(),
        max_tokens=max_tokens,
        vocab_size=backend.get_vocab_size(),
        pad_id=0,
        null_tokens=tuple(_encode(backend, [""])[0]),
    )
    return CaptionTokenizer(spec, backend, serialised)


def token_ids(backend: Any, captions: Sequence[str], limit: int) -> tuple[list[list[int]], int]:
    """Token ids of captions, cleaned, at most `limit` each, the last of them kept (it is the end); and how many captions were cut.

    Exports carry this function's text along (`export.carry`): what it needs is in this module, `data.captions` or the standard library.
    """
    texts = [clean_caption(caption) for caption in captions]
    rows = _encode(backend, [text[: CHARS_PER_TOKEN * limit] for text in texts])
    cut = sum(len(row) > limit or len(text) > CHARS_PER_TOKEN * limit for row, text in zip(rows, texts))
    return [row if len(row) <= limit else [*row[: limit - 1], row[-1]] for row in rows], cut


def _encode(backend: Any, texts: list[str]) -> list[list[int]]:
    """Token ids with the special tokens, untruncated; an end token is added where the tokenizer adds none."""
    if not texts:
        return []
    if hasattr(backend, "encode_batch_fast"):
        return [row.ids for row in backend.encode_batch_fast(texts)]
    # "</s>" written in a caption is text, not the end: broken up, since some vocabularies match it even as plain text
    special = re.compile("|".join(re.escape(token) for token in backend.all_special_tokens if len(token) > 2) or "(?!)")
    texts = [special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text) for text in texts]
    rows = backend(texts, add_special_tokens=True, truncation=False, padding=False, verbose=False)["input_ids"]
    ends = {i for i in (backend.eos_token_id, backend.sep_token_id) if i is not None}
    end = backend.eos_token_id if backend.eos_token_id is not None else backend.sep_token_id
    if end is None:
        end = backend.pad_token_id if backend.pad_token_id is not None else 0
    return [list(row) if row and row[-1] in ends else [*row, end] for row in rows]


def _fingerprint(folder: Path) -> str:
    return fingerprint_files([folder / "config.json", *weight_files(folder, "model")])


def _load_config(folder: Path, id: str) -> Any:
    """The config of the text part."""
    read_config(folder)
    with quiet():
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
            for part in ("encoder", "text_config"):  # T5Gemma and the like; CLIP, SigLIP
                config = getattr(config, part, None) or config
            if not (config.hidden_size and config.vocab_size):  # AttributeError: not a text model at all
                raise ValueError("no hidden_size or vocab_size")
        except LOAD_ERRORS as error:
            why = f"not a text encoder that transformers knows ({first_line(error)})"
            raise UserError(f"{id!r} is {why}: pass an encoder such as 't5-small', or use 'builtin'") from error
    return config


def _load_backend(folder: Path, id: str) -> Any:
    with quiet():
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        except LOAD_ERRORS as error:
            why = f"has no tokenizer that can be loaded ({first_line(error)})"
            raise UserError(f"text encoder {id!r} {why}: put its tokenizer files into the folder") from error


def _limit(config: Any, backend: Any) -> int:
    """Most tokens the encoder can read. (T5 has relative positions; its tokenizer states the limit it was trained with.)"""
    limits = [backend.model_max_length]  # a huge number where the tokenizer states none
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        offset = (config.pad_token_id or 0) + 1 if config.model_type in OFFSET_POSITIONS else 0
        limits.append(positions - offset)
    return int(min(limits))


def _load_net(folder: Path, id: str, dtype: torch.dtype) -> nn.Module:
    import transformers

    with quiet():
        try:
            kind = read_config(folder).get("model_type")
            loader = getattr(transformers, TEXT_CLASSES.get(str(kind), "AutoModel"))
            net, info = loader.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
            )
        except LOAD_ERRORS as error:
            raise UserError(f"text encoder {id!r} cannot be loaded ({first_line(error)}): fetch or save it again") from error
    missing = sorted(key for key in info["missing_keys"] if "pooler" not in key)  # a pooler is not used, and often not saved
    if missing:
        raise UserError(f"text encoder {id!r} lacks {len(missing)} weights (first: {missing[0]}): fetch or save it again")
    net = net.get_encoder() if net.config.is_encoder_decoder and hasattr(net, "get_encoder") and str(kind) not in TEXT_CLASSES else net
    if hasattr(net.config, "use_cache"):
        net.config.use_cache = False
    return net
