"""The texts that the demo trains on, read without torch so that bad input is refused at once.

    texts = read_python_code()                 # functions, classes and methods
    texts = read_texts(Path("my/notes.txt"))   # paragraphs

A text is what the model sees as one sample: at most `MAX_BYTES_PER_TEXT` bytes, because a byte is
a token. Longer ones are cut into several.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

from metricfold.metric import is_name

__all__ = [
    "BUILT_IN",
    "MAX_BYTES_PER_TEXT",
    "DemoError",
    "Text",
    "read_python_code",
    "read_python_docs",
    "read_texts",
]

MAX_BYTES_PER_TEXT = 512
"""The model's context, in bytes."""

MAX_BYTES_PER_DATASET = 64 * 2**20
"""Where reading stops: every rank holds all texts in memory."""


class DemoError(Exception):
    """What was asked for cannot be done; the message is one sentence for the terminal."""


class Text(NamedTuple):
    """One sample: its text and what kind of text it is."""

    text: str
    kind: str


def read_python_docs() -> list[Text]:
    """Return the paragraphs of Python's language reference, as `pydoc` carries it."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise _unequipped("pydoc_data") from None
    return _samples(one for topic in topics.values() for one in _paragraphs(topic.split("\n")))


def read_python_code() -> list[Text]:
    """Return the functions, classes and methods of the standard library's top-level modules.

    A class is its head: what stands before its first method.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    sources = (path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
    texts = _samples(block for source in sources for block in _blocks(source))
    if not texts:
        raise _unequipped(f"its library's sources in {folder}")
    return texts


def _unequipped(lacking: str) -> DemoError:
    return DemoError(
        f"this Python comes without {lacking}, which the demo trains on: "
        "train on texts of your own with --data NAME=PATH"
    )


BUILT_IN: dict[str, Callable[[], list[Text]]] = {
    "python_docs": read_python_docs,
    "python_code": read_python_code,
}
"""The datasets that every Python brings along."""


def read_texts(path: Path) -> list[Text]:
    """Return the texts of a .txt file, a .jsonl file, or all such files below a folder.

    A .txt file gives its paragraphs, a .jsonl file the field ``text`` of each line (and its kind
    from the field ``kind``, if there is one). Raises `DemoError` when there is nothing to read.
    """
    try:
        texts = _samples(text for file in _files(path) for text in _READERS[file.suffix](file))
    except OSError as error:
        raise DemoError(
            f"{error.filename or path} cannot be read ({error.strerror}): check the path and its permissions"
        ) from error
    if not texts:
        raise DemoError(f"{path} holds no text: give a file or folder with text in it")
    return texts


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise DemoError(f"{path} does not exist: give a .txt file, a .jsonl file or a folder")
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    readable = [file for file in files if file.suffix in _READERS]
    if readable:
        return readable
    if path.is_dir():
        raise DemoError(f"{path} holds no .txt and no .jsonl file: give a folder with some")
    raise DemoError(
        f"{path} is neither a .txt file, a .jsonl file nor a folder: convert it to one of these"
    )


def _read_txt(path: Path) -> Iterator[Text]:
    return _paragraphs(_lines(path))


def _read_jsonl(path: Path) -> Iterator[Text]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = getattr(error, "msg", "it nests too deeply, or a number is too long")
            raise DemoError(
                f"{path} line {number} is not JSON ({why}): write one object a line, "
                'such as {"text": "…"}'
            ) from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise DemoError(
                f'{path} line {number} has no field "text" that holds a string: '
                'write one object a line, such as {"text": "…"}'
            )
        # JSON can spell half a surrogate pair, which no encoding can write.
        text = text.encode("utf-8", "replace").decode("utf-8")
        kind = record.get("kind")
        yield Text(text, kind if is_name(kind) else _kind_of_section(text))


_READERS: dict[str, Callable[[Path], Iterator[Text]]] = {".txt": _read_txt, ".jsonl": _read_jsonl}


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file: decoded one by one, so that an error can name its line."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DemoError(
                    f"{path} line {number} is not UTF-8 (byte {raw[error.start]:#04x} at column "
                    f"{error.start + 1}): convert the file to UTF-8"
                ) from error
            yield line.rstrip("\r\n")


def _paragraphs(lines: Iterable[str]) -> Iterator[Text]:
    for blank, block in groupby(lines, lambda line: not line.strip()):
        if not blank:
            paragraph = "\n".join(block)
            yield Text(paragraph, _kind_of_section(paragraph))


_KINDS_OF_SECTION = {
    "grammar": r"::=",
    "table": r"\A\s*\+[-=]+\+",
    "list": r"\A\s*([*-]|\d+\.)\s",
    "note": r"\A\s*(Note|Warning|See also|Changed in|New in|Added in|Deprecated)\b",
    "example": r"\A(\s{3,}|>>> )",
    "prose": "",
}


def _kind_of_section(paragraph: str) -> str:
    return next(kind for kind, like in _KINDS_OF_SECTION.items() if re.search(like, paragraph))


def _blocks(source: str) -> Iterator[Text]:
    lines = source.split("\n")  # not splitlines(): it also splits at form feeds, ast does not
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)

    def first(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
        return min(one.lineno for one in (node, *node.decorator_list)) - 1

    def block(start: int, end: int | None, kind: str) -> Text:
        return Text(dedent("\n".join(lines[start:end])), kind)

    for node in ast.parse(source).body:
        if isinstance(node, functions):
            yield block(first(node), node.end_lineno, "function")
        elif isinstance(node, ast.ClassDef):
            methods = [member for member in node.body if isinstance(member, functions)]
            yield block(first(node), first(methods[0]) if methods else node.end_lineno, "class")
            for method in methods:
                yield block(first(method), method.end_lineno, "method")


def _samples(texts: Iterable[Text]) -> list[Text]:
    """Cut texts to the model's context; leave out those too short to predict a byte from one."""
    samples: list[Text] = []
    size = 0
    for text, kind in texts:
        raw = text.strip("\r\n").encode()
        while len(raw) > 1 and size < MAX_BYTES_PER_DATASET:
            # A character on the edge goes to the next piece whole.
            piece = raw[:MAX_BYTES_PER_TEXT].decode("utf-8", "ignore")
            length = len(piece.encode())
            if piece.strip():
                samples.append(Text(piece, kind))
            raw = raw[length:]
            size += length
        if size >= MAX_BYTES_PER_DATASET:
            break
    return samples
