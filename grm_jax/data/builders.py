"""Comparisons as TFDS datasets: array_record shards with random access, without TensorFlow.

JSON Lines files are read once, checked and written into shards, which any number of processes then
read by index. What was prepared is kept under a name that follows from the bytes of the files, so
that the same files are not prepared twice, and changed ones never pass for the old.

Importing this module imports tensorflow-datasets; `grm_jax.data` alone does not.
"""

import hashlib
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, final, overload

import tensorflow_datasets as tfds

from grm_jax.data.comparison import (
    BadRecord,
    Comparison,
    from_record,
    read_comparisons,
    to_record,
)
from grm_jax.data.output import to_line
from grm_jax.errors import UsageError

Files = Mapping[str, str | Path | Sequence[str | Path]]
"""The file or files of every split."""

VERSION = "1.0.0"
"""Version of the form that records are stored in."""

SHARD = 8192
"""Records in a shard."""

_CHUNK = 1024
_FORMAT = "array_record"


@final
@dataclass(frozen=True, kw_only=True)
class SkippedLine:
    """A line of a file that is no comparison and was left out.

    Attributes:
      split: The split it would have belonged to.
      file: The file.
      line: Line number, from 1.
      id: The record's own id where it could be read, else `line-N`.
      error: One line saying what is wrong.
    """

    split: str
    file: str
    line: int
    id: str
    error: str


@final
class StoredComparisons(Sequence[Comparison]):
    """A split of a prepared dataset: comparisons by index, read from the shards when asked for.

    Attributes:
      name: Name of the dataset and the split; other data never has the same.
    """

    def __init__(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        self.name = name
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Comparison: ...

    @overload
    def __getitem__(self, index: slice) -> list[Comparison]: ...

    def __getitem__(self, index: int | slice) -> Comparison | list[Comparison]:
        # A range knows slices, negative indices and when to raise an IndexError.
        found = range(len(self))[index]
        return self._read(found) if isinstance(found, int) else [self._read(i) for i in found]

    def _read(self, index: int) -> Comparison:
        return from_record(json.loads(self._records[index]["record"]))


@final
@dataclass(frozen=True, kw_only=True)
class PreparedComparisons:
    """A prepared dataset.

    Attributes:
      path: The folder of its shards, which `tfds.builder_from_directory` opens too.
      splits: The comparisons of every split, in the order of the files.
      skipped: The lines that are no comparisons, also if the dataset was prepared earlier.
    """

    path: Path
    splits: Mapping[str, StoredComparisons]
    skipped: tuple[SkippedLine, ...]


@final
class ComparisonBuilder(tfds.core.DatasetBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Builds a TFDS dataset out of JSON Lines files of comparisons.

    An example has one feature, `record`, the comparison as a line of JSON: `tf.Example` has neither
    64-bit floats nor free-form objects, so no other form brings every field back as it was.

    The stock generator-based builder keeps a split in memory and beyond 1 GB needs TensorFlow;
    here examples go to their shard one after the other.
    """

    VERSION = tfds.core.Version(VERSION)

    # Nothing is downloaded. Left alone, TFDS looks for checksums beside this module, and for that
    # imports a package that it does not require (tensorflow/datasets#11212).
    url_infos = None

    def __init__(self, *, files: Files, data_dir: str | Path, name: str = "comparisons") -> None:
        """Reads the files once to name the dataset after their content.

        Args:
          files: The file or files of every split.
          data_dir: The folder of all prepared datasets.
          name: First part of the dataset's name.

        Raises:
          UsageError: A file cannot be read, a split has no files, or a name is no name.
        """
        self._files = {split: _paths(split, paths) for split, paths in files.items()}
        if not self._files:
            raise UsageError("there is nothing to prepare; name the files of at least one split")
        for word in (name, *self._files):
            if not word.isidentifier() or word == "all":
                raise UsageError(f"{word!r} cannot name a dataset or split; use a plain word")
        self.name = f"{name}_{_fingerprint(self._files)}"
        super().__init__(data_dir=data_dir)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Conversations with the responses to judge and, if known, the best one.",
            features=tfds.features.FeaturesDict({"record": tfds.features.Text()}),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,
        )

    def _download_and_prepare(
        self,
        dl_manager: tfds.download.DownloadManager,
        download_config: tfds.download.DownloadConfig | None = None,
    ) -> None:
        # `self.info` names the folder to be; one made now names the temporary one to write into,
        # which is renamed when everything is in it.
        info = self._info()
        writer = tfds.core.SequentialWriter(info, SHARD, file_format=_FORMAT)
        writer.initialize_splits(list(self._files))
        skipped: list[SkippedLine] = []
        for split, paths in self._files.items():
            examples = _examples(split, paths, skipped)
            while chunk := list(islice(examples, _CHUNK)):
                writer.add_examples({split: chunk})
        writer.close_all()
        for split in self._files:
            if not info.splits[split].num_examples:
                raise UsageError(_nothing_in(split, skipped))
        self.info.set_splits(info.splits)
        self.info.metadata["skipped"] = [asdict(line) for line in skipped]

    def as_dataset(self, *args: object, **kwargs: object) -> None:
        """Raises a UsageError: what it would return is TensorFlow's."""
        raise UsageError("array_record shards are read by `as_data_source`, not by `as_dataset`")

    _as_dataset = as_dataset


def prepare_comparisons(
    files: Files, folder: str | Path, *, name: str = "comparisons"
) -> PreparedComparisons:
    """Turns JSON Lines files into a dataset with random access, unless that was done before.

    Lines that are no comparisons are left out, listed in the result, and counted in a warning of
    the log. Several processes may prepare the same files in the same folder: each writes its own
    temporary folder, and the first to finish provides for all.

    Args:
      files: For every split, say `train` and `test`, its file or files, plain or gzipped.
      folder: Where prepared datasets are kept.
      name: First part of the dataset's name; the second follows from the content of the files.

    Returns:
      The dataset.

    Raises:
      UsageError: A file cannot be read, a split has no comparison, or the folder is not writable.
    """
    builder = ComparisonBuilder(files=files, data_dir=Path(folder).expanduser(), name=name)
    try:
        # It prints that it downloads, which it does not, and standard output is for results.
        with redirect_stdout(io.StringIO()):
            builder.download_and_prepare(file_format=_FORMAT)
    except OSError as error:
        if not builder.is_prepared():
            raise UsageError(f"cannot write the dataset to {folder}: {error}") from error
    return open_comparisons(builder.data_dir)


def open_comparisons(path: str | Path) -> PreparedComparisons:
    """Opens a dataset that `prepare_comparisons` has left.

    Args:
      path: Its folder.

    Returns:
      The dataset.

    Raises:
      UsageError: There is no such dataset in the folder.
    """
    if not (Path(path) / "dataset_info.json").is_file():
        raise UsageError(f"{path} holds no prepared dataset; prepare one from JSON Lines files")
    builder = tfds.builder_from_directory(path)
    lines = builder.info.metadata.get("skipped", [])
    prepared = PreparedComparisons(
        path=Path(builder.data_dir),
        splits={
            split: StoredComparisons(f"{builder.name}/{split}", builder.as_data_source(split))
            for split in builder.info.splits
        },
        skipped=tuple(SkippedLine(**line) for line in lines),
    )
    if prepared.skipped:
        first = prepared.skipped[0]
        logging.getLogger(__name__).warning(
            "%s: %d lines were no comparisons and are left out; the first is line %d of %s: %s",
            builder.name,
            len(prepared.skipped),
            first.line,
            first.file,
            first.error,
        )
    return prepared


def _paths(split: str, paths: str | Path | Sequence[str | Path]) -> tuple[Path, ...]:
    several = (paths,) if isinstance(paths, str | Path) else paths
    if not several:
        raise UsageError(f"split {split} has no files; name at least one")
    return tuple(Path(path).expanduser() for path in several)


def _fingerprint(files: Mapping[str, Sequence[Path]]) -> str:
    """Sixteen hexadecimal digits that follow from the bytes of the files, in their order."""
    digest = hashlib.sha256(VERSION.encode())
    for split, paths in sorted(files.items()):
        digest.update(f"\n{split}".encode())
        for path in paths:
            try:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    return digest.hexdigest()[:16]


def _examples(
    split: str, paths: Sequence[Path], skipped: list[SkippedLine]
) -> Iterator[dict[str, str]]:
    """Yields the examples of a split, and adds what is none to `skipped`."""
    for path in paths:
        for item in read_comparisons(path):
            if isinstance(item, BadRecord):
                skipped.append(
                    SkippedLine(
                        split=split, file=str(path), line=item.line, id=item.id, error=item.error
                    )
                )
            else:
                yield {"record": to_line(to_record(item))}


def _nothing_in(split: str, skipped: Sequence[SkippedLine]) -> str:
    reasons = [line for line in skipped if line.split == split]
    if not reasons:
        return f"split {split} has no comparison; its files are empty"
    first = reasons[0]
    return (
        f"split {split} has no comparison; {len(reasons)} lines are none, the first is "
        f"line {first.line} of {first.file}: {first.error}"
    )
