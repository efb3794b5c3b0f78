"""The TFDS builder of our own sources. It stands alone, since importing it costs the import of TFDS.

What surprises readers: examples keep their order (TFDS shuffles by default), and a long document is several examples,
each but the first marked as the continuation of the one before it.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import shutil
from collections.abc import Iterator, Mapping

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from gptjax.data.local import Split
from gptjax.errors import RunError, UsageError


class LocalDocuments(tfds.core.GeneratorBasedBuilder):
    """Documents from this machine as a TFDS dataset with the features `text` and `continues`."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, splits: Mapping[str, Split] | None = None, **kwargs):
        self._texts = splits or {}
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {"text": tfds.features.Text(), "continues": tfds.features.Scalar(np.bool_)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {name: self._generate_examples(split) for name, split in self._texts.items()}

    def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict]]:
        for index, (text, continues) in enumerate(split()):
            yield index, {"text": text, "continues": continues}


def write(source: str, splits: Mapping[str, Split], folder: pathlib.Path) -> None:
    """Writes the `splits` that hold any text as a TFDS dataset into `folder`, quietly.

    Raises UsageError if none does, RunError for a full disk.
    """
    splits = {name: split for name, split in splits.items() if next(split(), None)}  # TFDS cannot write an empty one
    if not splits:
        raise UsageError(f"data.dataset={source!r}: holds no text; valid: files that are not empty")
    tfds.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            LocalDocuments(splits=splits, data_dir=folder).download_and_prepare()
    except RuntimeError as e:  # what ArrayRecord makes of a full disk
        raise RunError(f"{source}: cannot be written to the cache: {e}") from e
    finally:
        logging.set_verbosity(level)
    shutil.rmtree(folder / "downloads")  # TFDS makes it for every dataset
