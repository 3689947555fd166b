"""Open the data files of a set as one sequence of records."""

import os
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from tove_llava.core.errors import ConfigError
from tove_llava.data.data_paths import data_paths
from tove_llava.data.readers import open_reader
from tove_llava.data.records import IMAGE_PLACEHOLDERS, Record, parse_record, place_images


class DataFiles:
    """The records of one or several data files, read when they are asked for.

    Args:
        path: see :func:`tove_llava.data.data_paths.data_paths`.
        image_placeholder: see :func:`tove_llava.data.records.place_images`.

    Attributes:
        weights: how often an epoch goes through the records of each file.

    Raises:
        DataError: a file is missing, damaged, empty, or of a format that no reader knows.
        ConfigError: a weight is not a positive number, or ``image_placeholder`` is unknown.
    """

    def __init__(self, path: str | os.PathLike[str], image_placeholder: str = "written") -> None:
        if image_placeholder not in IMAGE_PLACEHOLDERS:
            raise ConfigError(
                f"unknown image_placeholder {image_placeholder!r}; choose one of {', '.join(IMAGE_PLACEHOLDERS)}"
            )
        self.image_placeholder = image_placeholder
        entries = data_paths(path)
        self.files = [entry.path for entry in entries]
        self.weights = [entry.weight for entry in entries]
        self.readers = [open_reader(file) for file in self.files]
        self.starts = [0, *accumulate(map(len, self.readers))]

    def __len__(self) -> int:
        return self.starts[-1]

    def place(self, index: int) -> tuple[str, int]:
        """Return the file of a record, and its index there."""
        number = bisect_right(self.starts, index) - 1
        return str(self.files[number]), index - self.starts[number]

    def raw(self, index: int) -> Any:
        """Read a record as plain data."""
        number = bisect_right(self.starts, index) - 1
        return self.readers[number].row(index - self.starts[number])

    def __getitem__(self, index: int) -> Record:
        """Read and check a record; raise DataError for a fault."""
        return self.parse(self.raw(index), index)

    def parse(self, raw: Any, index: int) -> Record:
        """Check a record that was read."""
        file, number = self.place(index)
        record = parse_record(raw, number, file)
        return place_images(record) if self.image_placeholder == "first" else record

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))


def read_records(path: str | os.PathLike[str]) -> list[Any]:
    """Read all raw records of data files.

    Raises:
        DataError: a file is missing, empty, or damaged; the message names the line.
    """
    files = DataFiles(path)
    return [files.raw(index) for index in range(len(files))]


def load_records(path: str | os.PathLike[str]) -> list[Record]:
    """Read and check all records; the first fault raises :class:`DataError`."""
    return list(DataFiles(path))


def image_names(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield the file names of all images of the records.

    Raises:
        DataError: an image lies in the data file itself.
    """
    for record in DataFiles(path):
        yield from record.file_names()
