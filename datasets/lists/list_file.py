"""List files of radiographs: a line names a picture, and labels may follow it, as in the lists of ChestX-ray14.

    00000001_000.png 0 1 0 0          blanks, tabs or commas between
    left lung 7.png                   a name may hold blanks: it ends with .png

Labels of whole pictures are not kept: pretraining needs none.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

from datasets.lists.data_list import Case, DataListError, unique_names

LINE = re.compile(r"(?P<name>.+?\.png)(?:[\s,].*)?", re.IGNORECASE)


@dataclass
class ListedPictures:
    """What a list file names.

    Attributes:
        cases: the pictures that are there, in the list's order.
        missing: file -> why it is not, with its line.
        num_blank: empty lines.
    """

    cases: list[Case] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    num_blank: int = 0


def read_list_file(list_file: str | Path, data_dir: str | Path) -> ListedPictures:
    """The pictures that a list names, below `data_dir`.

    Raises:
        DataListError: an unreadable list, a line that names no .png file, a picture that stands twice, or no picture.
    """
    lines = _read_lines(Path(list_file))
    listed, line_of = ListedPictures(), {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line:
            listed.num_blank += 1
            continue
        found = LINE.fullmatch(line)
        if found is None:
            raise DataListError(f"{list_file}, line {number}: names no .png file: {line[:80]!r}")
        name = found["name"]
        if name in line_of:
            raise DataListError(f"{list_file}: {name} stands in line {line_of[name]} and again in line {number}")
        line_of[name] = number
    for name, case_name in zip(line_of, unique_names(list(line_of))):
        image = Path(data_dir) / name
        if image.is_file():
            listed.cases.append(Case(case_name, image))
        else:
            listed.missing[str(image)] = f"no such file (line {line_of[name]} of {list_file})"
    if not listed.cases:
        raise DataListError(
            f"{list_file}: none of its {len(line_of)} pictures is in {data_dir}; is --data_dir their folder?"
        )
    return listed


def _read_lines(list_file: Path) -> list[str]:
    try:
        return list_file.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise DataListError(f"{list_file}: cannot be read as a list file ({error})") from error
