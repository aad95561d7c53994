"""Models in the box: exported models that come with the package, found by their names, and used where nothing else is given.

    flowt2i/models/NAME/      as `flowt2i export` writes a model, with scores.json (benchmarks/pack_model.py puts it there)

What a model's manifest says of its files is proved when it is loaded, as of every exported model; listing the models reads no weights.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path

from flowt2i.errors import UserError
from flowt2i.exported import MARK, SCORES, Mark, read_mark, read_scores
from flowt2i.score import Score

BOX = Path(__file__).with_name("models")
FIRST = "scenes"  # taken before the others where none is named
LIMIT = 25_000_000  # bytes of the weights of all together: nearly all of what everyone downloads with the package
AGAIN = "install flowt2i again (in a checkout: git checkout flowt2i/models)"


@dataclass(frozen=True)
class Packaged:
    """What there is to know of a packaged model before it is loaded."""

    name: str
    path: Path
    bytes: int  # of its folder
    parameters: int | None
    image_size: int
    data: str  # what it was trained on
    licence: str
    score: Score | None  # the first one that was measured of it


def folders() -> list[Path]:
    """Of all packaged models, the one first that is taken where none is named."""
    found = [path for path in BOX.iterdir() if path.is_dir() and not path.name.startswith((".", "_"))] if BOX.is_dir() else []
    return sorted(found, key=lambda path: (path.name != FIRST, path.name))


def find(name: str) -> Path | None:
    """The folder of the packaged model of this name; None where there is none, or a file or folder here bears the name: paths win.

    UserError where it is there and no exported model.
    """
    if not name or Path(name).exists():
        return None
    return next((whole(folder) for folder in folders() if folder.name == name), None)


def hidden_by(path: Path) -> str:
    """What to add where a path that is no model bears the name of a packaged one; "" elsewhere."""
    hidden = str(path) == path.name and any(folder.name == path.name for folder in folders())
    return f" (it hides the packaged model {path.name!r}: rename it, or work elsewhere)" if hidden else ""


def weight_bytes(folder: Path) -> int:
    """Of a model's weights."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def nearly(path: Path) -> str:
    """What to add where a bare name is no model but nearly the name of a packaged one; "" elsewhere."""
    close = difflib.get_close_matches(str(path), [folder.name for folder in folders()], n=1) if str(path) == path.name else []
    return f" (did you mean {close[0]!r}?)" if close else ""


def default() -> Path | None:
    """The folder of the model that is taken where none is named; None where none came with this installation."""
    return next(map(whole, folders()), None)


def whole(folder: Path) -> Path:
    """The folder itself; UserError where it has not the mark of an exported model."""
    if not (folder / MARK).is_file():
        raise UserError(f"the packaged model {folder.name!r} is not whole ({MARK} is missing): {AGAIN}")
    return folder


def holds(path: Path) -> bool:
    """Does this lie in the package? Nothing is written there."""
    return path.resolve().is_relative_to(BOX.resolve())


def describe(folder: Path) -> Packaged:
    """What a packaged model says of itself. UserError where its files cannot be read."""
    from flowt2i.description import DatasetDescription

    mark: Mark | None = read_mark(whole(folder))
    assert mark is not None  # it is whole
    description = DatasetDescription.load(folder)
    scores = read_scores(folder / SCORES).scores if (folder / SCORES).exists() else []
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    parameters = mark.training.parameters
    return Packaged(folder.name, folder, size, parameters, description.codec.image_size, description.source, mark.licence, scores[0] if scores else None)
