"""The text header of MetaImage files (.mha, .mhd), and whether their voxels are whole.

ITK's reader returns memory that nobody has written where a compressed file is cut or damaged; hence this check.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path

from datasets.ct.file_checks import CTReadError

MAX_LINES, MAX_LINE_BYTES = 1000, 10_000
CHUNK_BYTES = 2**16  # deflate makes at most a thousand times as much of it
ANY_ZLIB = 47  # window bits: zlib or gzip, as ITK takes both


@dataclass(frozen=True)
class MetaHeader:
    """A MetaImage header.

    Attributes:
        fields: the lines `key = value`.
        data_file: where the voxels are.
        offset: of their first byte.
    """

    fields: dict[str, str]
    data_file: Path
    offset: int


def read_header(path: str | Path) -> MetaHeader:
    """The header of a `.mha` or `.mhd` file.

    Raises:
        CTReadError: an unreadable file, no MetaImage header, or voxels that are not in one file.
    """
    path, fields = Path(path), {}
    try:
        with path.open("rb") as file:
            for _ in range(MAX_LINES):
                line = file.readline(MAX_LINE_BYTES)
                key, equals, value = line.decode("latin-1").partition("=")
                if not equals:
                    raise CTReadError(f"{path}: not a MetaImage file; its header has no line 'ElementDataFile = ...'")
                fields[key.strip()] = value.strip()
                if key.strip() == "ElementDataFile":
                    return MetaHeader(fields, *_place_of_voxels(path, fields, file.tell()))
    except OSError as error:
        raise CTReadError(f"{path}: cannot be read ({error.strerror or error})") from error
    raise CTReadError(f"{path}: not a MetaImage file; its header has no end")


def check_voxels(path: str | Path, num_bytes: int) -> None:
    """Check that a MetaImage file has all of its voxels.

    Args:
        path: `.mha` or `.mhd`.
        num_bytes: of the voxels, not compressed.

    Raises:
        CTReadError: as `read_header`; missing, truncated or damaged voxels; or voxels written as text.
    """
    header = read_header(path)
    if header.fields.get("BinaryData", "True").lower() == "false":
        raise CTReadError(f"{path}: its voxels are written as text (BinaryData = False); expected binary voxels")
    try:
        with header.data_file.open("rb") as file:
            file.seek(header.offset)
            if header.fields.get("CompressedData", "False").lower() == "true":
                received = _decompressed_bytes(file)
            else:
                received = header.data_file.stat().st_size - header.offset
    except zlib.error as error:
        raise CTReadError(f"{path}: truncated or damaged voxels in {header.data_file.name} ({error})") from error
    except OSError as error:
        raise CTReadError(f"{path}: {header.data_file} cannot be read ({error.strerror or error})") from error
    if received < num_bytes:
        raise CTReadError(
            f"{path}: truncated; its voxels need {num_bytes} bytes, {header.data_file.name} holds {received}"
        )


def _place_of_voxels(path: Path, fields: dict[str, str], header_bytes: int) -> tuple[Path, int]:
    """The file of the voxels and the offset of the first."""
    name = fields["ElementDataFile"]
    if name.upper() == "LOCAL":
        return path, header_bytes
    data_file = path.parent / name
    if not data_file.is_file():
        raise CTReadError(f"{path}: {data_file}, where its voxels should be, is no file (lists of files are not read)")
    try:
        return data_file, max(0, int(fields.get("HeaderSize", 0)))
    except ValueError as error:
        raise CTReadError(f"{path}: HeaderSize = {fields['HeaderSize']}, expected a number of bytes") from error


def _decompressed_bytes(file) -> int:
    """Bytes that a zlib stream unpacks to; zlib.error where it is damaged or ends early."""
    stream, num_bytes = zlib.decompressobj(ANY_ZLIB), 0
    while not stream.eof:
        packed = file.read(CHUNK_BYTES)
        if not packed:
            raise zlib.error("the compressed stream ends early")
        num_bytes += len(stream.decompress(packed))
    return num_bytes
