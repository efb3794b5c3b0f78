"""`data.dataset` -> corpora: TFDS splits of text in ArrayRecord files, which need no TensorFlow to read.

Any TFDS name stands for itself; `python_stdlib`, `text:GLOB` and `jsonl:GLOB` are first written as TFDS datasets into
the cache, so that everything behind this module sees one kind of thing. Several sources joined by " + ", each with an
optional `WEIGHT*` in front, are a mixture. What surprises readers: preparing most of TFDS's own datasets needs
TensorFlow; a dataset prepared once, anywhere, in array_record format, does not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import pathlib
import re
from collections.abc import Iterator
from typing import Any, Literal

from etils import epath

from gptjax.config import DataConfig
from gptjax.data import local
from gptjax.data.cache import build_once, cache_root, fingerprint, fingerprint_files, note
from gptjax.errors import RunError, UsageError

_PART = re.compile(r"(?:(?P<weight>-?[0-9][0-9.eE-]*)\s*\*\s*)?(?P<name>.*)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """One split of one source, and its share of a mixture.

    folder: the prepared TFDS data. field: the feature that holds the text. num_bytes: about how much text.
    fingerprint: stands for the texts, in order.
    """

    name: str
    weight: float
    folder: str
    split: str
    field: str
    num_examples: int
    num_bytes: int
    fingerprint: str

    def pieces(self, start: int = 0, stop: int | None = None) -> Iterator[local.Piece]:
        """The texts of examples start..stop in order, long ones in pieces that end with a line.

        Raises UsageError, naming the example, for text that is not UTF-8.
        """
        source = _data_source(self.folder, self.split)
        for index in range(start, self.num_examples if stop is None else stop):
            try:
                example = source[index]
            except (RuntimeError, ValueError, IndexError) as e:  # ArrayRecord checks every record's hash
                raise RunError(f"{self.folder}: example {index} of {self.split} cannot be read: {e}") from e
            try:
                text = example[self.field].decode()
            except UnicodeDecodeError as e:
                where = f"{self.name}: example {index} of {self.split}"
                raise UsageError(f"{where}: {self.field} is not UTF-8: {e.reason} at byte {e.start}") from None
            continues = bool(example["continues"]) if "continues" in example else False
            for number, piece in enumerate(local.pieces(text)):
                yield piece, continues or number > 0


def open_corpora(config: DataConfig, split: Literal["train", "eval"]) -> list[Corpus]:
    """The parts of `data.dataset`, each at `data.train_split` or `data.eval_split`.

    Raises UsageError for a source, split or field that is not there or is empty.
    """
    instruction = config.train_split if split == "train" else config.eval_split
    return [_open(config, name, weight, instruction, split) for name, weight in parse_mixture(config.dataset)]


def split_texts(config: DataConfig, split: Literal["train", "eval"]) -> Iterator[str]:
    """The text of a split as it was before tokenising, in order; long documents in several pieces."""
    for corpus in open_corpora(config, split):
        for text, _ in corpus.pieces():
            yield text


def parse_mixture(dataset: str) -> list[tuple[str, float]]:
    """`0.7*A + 0.3*B` as [(A, 0.7), (B, 0.3)]; a part without a weight has weight 1."""
    parts = []
    for part in dataset.split(" + "):
        match = _PART.fullmatch(part.strip())
        assert match is not None
        try:
            weight = float(match["weight"] or 1)
        except ValueError:
            weight = 0.0
        if not match["name"].strip() or not weight > 0:
            raise UsageError(
                f"data.dataset={dataset!r}: {part.strip()!r} is no part of a mixture; "
                "valid: SOURCE or WEIGHT*SOURCE with a weight above 0, joined by ' + '"
            )
        parts.append((match["name"].strip(), weight))
    return parts


def _open(config: DataConfig, name: str, weight: float, instruction: str, split: str) -> Corpus:
    kind, _, rest = name.partition(":")
    if name == "python_stdlib":
        source = local.python_stdlib()
    elif kind == "text":
        source = local.text_files(rest)
    elif kind == "jsonl":
        source = local.jsonl_files(rest, config.text_field)
    else:
        source = None
    if source is None:
        builder = _tfds_builder(name, config)
        field = _text_field(builder, name, config.text_field)
        identity = [str(builder.info.full_name)]
    else:
        content = fingerprint([source.identity, fingerprint_files(cache_root(config), source.files)])
        builder = _local_builder(config, name, source, content)
        field = "text"
        identity = [content]
    try:
        info = builder.info.splits[instruction]
    except (ValueError, KeyError):
        raise UsageError(
            f"data.{split}_split={instruction!r}: {name} has no such split; valid: {', '.join(builder.info.splits)}, "
            "slices such as train[:90%], and sums such as validation+test"
        ) from None
    if not info.num_examples:
        raise UsageError(
            f"data.{split}_split={instruction!r}: {name} has no text there; valid: a split that is not empty"
        )
    if source is None:
        identity += [[path.name, path.stat().length] for path in map(epath.Path, info.filepaths)]
    return Corpus(
        name=name,
        weight=weight,
        folder=str(builder.data_path),
        split=instruction,
        field=field,
        num_examples=info.num_examples,
        num_bytes=_estimate_bytes(builder, info, instruction),
        fingerprint=fingerprint([identity, instruction, field]),
    )


def _local_builder(config: DataConfig, name: str, source: local.LocalSource, content: str) -> Any:
    """The TFDS builder of a local source, which is written on first use."""
    import tensorflow_datasets as tfds

    def build(folder: pathlib.Path) -> None:
        from gptjax.data import builder

        note(f"{name}: reading {len(source.files):,} files")
        builder.write(name, source.splits, folder)

    folder = cache_root(config) / "corpora" / content
    build_once(folder, build, lambda folder: None)
    return tfds.builder_from_directory(folder / "local_documents" / "1.0.0")


def _tfds_builder(name: str, config: DataConfig) -> Any:
    """The builder of a TFDS dataset that is prepared in array_record format."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import read_only_builder

    where = config.data_dir or str(tfds.core.constants.DATA_DIR)
    builder = None
    if re.match(r"\w+:\D", name):  # a collection of others, such as huggingface:NAME
        try:
            builder = tfds.builder(name, data_dir=where)
        except Exception as e:  # whatever its client raises when it finds no server or no such name
            raise UsageError(f"data.dataset={name!r}: TFDS cannot open it: {str(e).splitlines()[0]}") from e
    else:
        with contextlib.suppress(tfds.core.registered.DatasetNotFoundError, ValueError):
            builder = read_only_builder.builder_from_files(name, data_dir=where)
        base, known = re.split(r"[/:]", name)[0], tfds.list_builders(with_community_datasets=False)
        if builder is None and base not in known:
            near = difflib.get_close_matches(base, known, 1)
            raise UsageError(
                f"data.dataset={name!r}: no TFDS name, and nothing of that name under {where}; "
                + (f"did you mean {near[0]}? " if near else "")
                + "valid: a TFDS name, python_stdlib, text:GLOB or jsonl:GLOB"
            )
    if builder is None or not builder.is_prepared() or not _has_random_access(builder):
        raise UsageError(
            f"data.dataset={name!r}: not prepared in array_record format under {where}; prepare it once, in any "
            f"environment with TensorFlow: tfds build {name} --file_format=array_record --data_dir={where}"
        )
    return builder


def _has_random_access(builder: Any) -> bool:
    from tensorflow_datasets.core import file_adapters

    formats = builder.info.available_file_formats()
    return file_adapters.FileFormat.ARRAY_RECORD in formats


def _text_field(builder: Any, name: str, field: str) -> str:
    import tensorflow_datasets as tfds

    texts = [key for key, feature in builder.info.features.items() if isinstance(feature, tfds.features.Text)]
    if field in texts:
        return field
    if not field and ("text" in texts or len(texts) == 1):
        return "text" if "text" in texts else texts[0]
    problem = "several fields hold text" if not field and texts else "no such text field"
    raise UsageError(f"data.text_field={field!r}: {problem} in {name}; valid: {', '.join(texts) or 'none'}")


def _estimate_bytes(builder: Any, info: Any, instruction: str) -> int:
    """About how many bytes a split holds; TFDS knows it for whole ones, a slice's go by its examples."""
    if info.num_bytes:
        return info.num_bytes
    named = re.findall(r"\w+", instruction)
    whole = [split for name, split in builder.info.splits.items() if name in named]
    return max(1, sum(s.num_bytes for s in whole) * info.num_examples // sum(s.num_examples for s in whole))


@functools.lru_cache(maxsize=8)
def _data_source(folder: str, split: str) -> Any:
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(folder)
    return builder.as_data_source(split)
