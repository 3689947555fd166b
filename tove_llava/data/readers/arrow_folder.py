"""Arrow: a folder that Hugging Face's ``save_to_disk`` wrote, or one file."""

from pathlib import Path
from typing import Any

import numpy as np

from tove_llava.core.errors import DataError
from tove_llava.core.files import read_json_object
from tove_llava.data.readers.base import READERS, Reader

_FILE_MAGIC = b"ARROW1"
_STREAM_MAGIC = b"\xff\xff\xff\xff"


class ArrowRows(Reader):
    """Rows of Arrow files that are mapped into memory; 100 bytes of memory for each batch of rows.

    An image's bytes are a buffer that is not read from the disk before they are used.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.arrow_files = self.find_files()
        self._open()

    def find_files(self) -> list[Path]:
        """List the Arrow files in the order of their rows."""
        return [self.path]

    def _open(self) -> None:
        self._batches = [batch for file in self.arrow_files for batch in _batches(file)]
        self._ends = np.cumsum([batch.num_rows for batch in self._batches], dtype=np.int64)
        schemas = {tuple(batch.schema.names) for batch in self._batches}
        if len(schemas) > 1:
            raise DataError(f"{self.path}: its files have different columns ({schemas}); make them alike")
        self._has_bytes = ["binary" in str(field.type) for field in self._batches[0].schema] if schemas else []

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_batches", "_ends", "_has_bytes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()  # mapped again, instead of copied

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def row(self, index: int) -> Any:
        number = int(np.searchsorted(self._ends, index, side="right"))
        batch = self._batches[number]
        within = index - (int(self._ends[number]) - batch.num_rows)
        columns = zip(batch.schema.names, batch.columns, self._has_bytes, strict=True)
        return {name: _plain(c[within]) if has_bytes else c[within].as_py() for name, c, has_bytes in columns}


@READERS.register_class("arrow_folder")
class ArrowFolder(ArrowRows):
    """A folder with ``state.json`` and the Arrow files that it names, or one Arrow file."""

    @classmethod
    def claims(cls, path: Path, head: bytes) -> bool:
        if path.is_dir():
            return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
        return head.startswith((_FILE_MAGIC, _STREAM_MAGIC))

    def find_files(self) -> list[Path]:
        if not self.path.is_dir():
            return [self.path]
        if (self.path / "dataset_dict.json").is_file():
            splits = read_json_object(self.path / "dataset_dict.json", DataError).get("splits", [])
            raise DataError(f"{self.path} holds several splits; give the folder of one: {', '.join(map(str, splits))}")
        named = read_json_object(self.path / "state.json", DataError).get("_data_files")
        try:
            files = [self.path / entry["filename"] for entry in named]  # type: ignore[union-attr]
        except (TypeError, KeyError):
            raise DataError(f"{self.path / 'state.json'} names no data files; save the data set again") from None
        for file in files:
            if not file.is_file():
                raise DataError(f"{file} is missing, which {self.path / 'state.json'} names; save the data set again")
        return files


def arrow(path: Path) -> Any:
    """Import pyarrow; name the file that needs it if it is not installed."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path} needs pyarrow: pip install 'tove-llava[data]'") from error
    return pyarrow


def _batches(file: Path) -> list[Any]:
    pa = arrow(file)
    try:
        with file.open("rb") as handle:
            is_stream = handle.read(len(_FILE_MAGIC)) != _FILE_MAGIC
        source = pa.memory_map(str(file))
        if is_stream:
            return list(pa.ipc.open_stream(source))
        reader = pa.ipc.open_file(source)
        return [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} is damaged or cut short ({error}); make it again") from error


def _plain(scalar: Any) -> Any:
    """Turn a value into plain data, but bytes into a buffer."""
    pa = arrow(Path())
    kind = scalar.type
    if not scalar.is_valid:
        return None
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return scalar.as_buffer()
    if pa.types.is_struct(kind):
        return {field.name: _plain(scalar[field.name]) for field in kind}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [_plain(value) for value in scalar.values]
    return scalar.as_py()
