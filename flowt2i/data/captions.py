"""From whatever stands where a caption should be to a clean one-line text, or a reason why there is none."""

import json
import re
import unicodedata
from typing import Any

from flowt2i.data.sample import CaptionFile, Dropped, RawSample

CAPTION_KEYS = ("prompt", "caption", "text")  # of a JSON object, first found wins
MAX_CAPTION_BYTES = 1 << 20  # of a caption file: beyond this it is no caption

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


def clean(text: str) -> str:
    """One line of printable text: control characters, lone surrogates and runs of blanks become one space."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return " ".join(_UNPRINTABLE.sub(" ", text).split())


def from_value(value: Any) -> str:
    """The caption in a JSON value or table cell: a text, the first text of a list, or one of CAPTION_KEYS of an object; '' if none."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, bytes):
        return clean(value.decode("utf-8", "replace"))
    if isinstance(value, list):
        return next((text for item in value if isinstance(item, str) and (text := clean(item))), "")
    if isinstance(value, dict):
        return next((text for key in CAPTION_KEYS if not isinstance(value.get(key), dict) and (text := from_value(value.get(key)))), "")
    return ""


def _from_file(file: CaptionFile) -> str:
    data = file.span.read(MAX_CAPTION_BYTES)
    if file.kind == "txt":
        return from_value(data)
    try:
        return from_value(json.loads(data))
    except RecursionError as error:  # thousands of nested brackets
        raise Dropped("bad json", "nested too deeply") from error
    except ValueError as error:
        raise Dropped("bad json", str(error)[:200]) from error


def read_caption(sample: RawSample, shortest: int = 1, longest: int = 1 << 30) -> str:
    """The sample's caption, cleaned; Dropped where there is none or its length in characters is outside the limits."""
    problem = Dropped("missing caption")
    for place in sample.captions:
        try:
            caption = _from_file(place) if isinstance(place, CaptionFile) else from_value(place)
        except Dropped as dropped:
            problem = dropped
            continue
        if not caption:
            continue
        if len(caption) < shortest:
            raise Dropped("caption too short", f"{len(caption)} characters")
        if len(caption) > longest:
            raise Dropped("caption too long", f"{len(caption)} characters")
        return caption
    raise problem
