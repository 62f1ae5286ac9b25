"""Bad data lists, given to prepare_volumes.py and to main_ddp.py."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path

from benchmarks.fault_kinds.attempt import DAMAGES, Attempt, Faults, Good
from benchmarks.results import words
from datasets.store.volumes import VolumeStore

Change = Callable[[dict, random.Random], object]  # a good list -> what is written in its place
NO_TEXT = (None, 5, 1.5, True, [], {}, ["a"], {"a": 1})
NO_PATH = (*NO_TEXT, "")


def in_entry(key: str, values: tuple) -> Change:
    """Another value in one entry."""

    def change(content: dict, rng: random.Random) -> dict:
        rng.choice(content["training"])[key] = rng.choice(values)
        return content

    return change


def in_section(values: tuple) -> Change:
    """Another training section."""
    return lambda content, rng: content | {"training": rng.choice(values)}


def without_image(content: dict, rng: random.Random) -> dict:
    del rng.choice(content["training"])["image"]
    return content


def twice(**changed: object) -> Change:
    """An entry stands there again, perhaps with other values."""
    return lambda content, rng: content | {"training": [*content["training"], content["training"][0] | changed]}


CHANGES: dict[str, Change] = {
    "not an object": lambda content, rng: rng.choice((content["training"], "training", 5, None, True)),
    "no training section": lambda content, rng: {"validation": content["training"]},
    "section of another name": lambda content, rng: {"train": content["training"]},
    "section is no list": in_section((None, 5, "a.nii.gz", {}, {"image": "a.nii.gz"}, True)),
    "section is empty": in_section(([],)),
    "nested too deep": lambda content, rng: content | {"training": {"training": content["training"]}},
    "list in the list": lambda content, rng: content | {"training": [content["training"]]},
    "entry is no object": in_section(tuple([value] for value in (None, 5, 1.5, True, []))),
    "entry without image": without_image,
    "image is no path": in_entry("image", NO_PATH),
    "image is missing": in_entry("image", ("nowhere.nii.gz", "../nowhere.nii.gz", "/nowhere/a.nii.gz", "small0", ".")),
    "image outside": in_entry(
        "image", ("../../../../../../../../etc/passwd", "/etc/passwd", "/dev/zero", "a\0b.nii.gz")
    ),
    "image is no CT": in_entry("image", ("list.json", "small0.nii.gz/x", "~", "a" * 5000 + ".nii.gz")),
    "name is no name": in_entry(
        "name", (5, 1.5, True, ["a"], {"a": 1}, "a/b", "../a", "/a", ".", "..", ".hidden", "a\0b")
    ),
    "name is too long": in_entry("name", ("a" * 300, "a" * 5000)),
    "name of a label": in_entry("name", ("a.label",)),
    "label is no path": in_entry("label", (5, 1.5, True, ["a"], {"a": 1})),
    "no name": in_entry("name", (None, "", [], {}, 0, False)),
    "label is missing": in_entry("label", ("nowhere.nii.gz", "list.json")),
    "group is no text": in_entry("group", (5, ["a"], {"a": 1}, None)),
    "one name, two images": lambda content, rng: (
        content | {"training": [entry | {"name": "same"} for entry in content["training"]]}
    ),
    "one entry twice": twice(),
    "one image, two names": twice(name="another"),
    "one entry in two sections": lambda content, rng: content | {"validation": content["training"][:1]},
    "validation is no list": lambda content, rng: content | {"validation": rng.choice((5, "a", {"image": "a"}, True))},
    "further keys": lambda content, rng: (
        content | {"training": [e | {"age": 5} for e in content["training"]], "x": None}
    ),
}
TEXTS: dict[str, Callable[[random.Random], bytes]] = {
    "nested without end": lambda rng: b'{"training": ' + b"[" * 200_000,
    "not UTF-8": lambda rng: b'{"training": ["\xff\xfe.nii.gz"]}',
    "a huge number": lambda rng: b'{"training": [' + b"9" * rng.choice((400, 10_000)) + b"]}",
    "a YAML list": lambda rng: b"training:\n- image: small0.nii.gz\n",
    "a CSV table": lambda rng: b"image,label\nsmall0.nii.gz,\n",
}


def list_attempt(good: Good, folder: Path, rng: random.Random, content: bytes) -> Attempt:
    """prepare_volumes.py with a new store, or main_ddp.py with a store in its folder."""
    path, data_dir = folder / "list.json", good.folder / "small"
    path.write_bytes(content)
    names = (str(path), "nowhere", "/etc/passwd", "/dev/zero", "a.label")
    if rng.random() < 0.5:
        given = good.storing_words(folder / "store", data_dir, path)
        return Attempt(
            "scripts.prepare_volumes",
            given,
            names,
            lambda printed: is_honoured(path, data_dir, folder / "store", printed),
        )
    given = good.training_words(
        folder / "run", "simsiam", data_dir=data_dir, json_list=path, store_dir=folder / "store", spacing_mm=2
    )
    return Attempt("main_ddp", given, names, lambda printed: is_honoured(path, data_dir, folder / "store", printed))


def is_honoured(path: Path, data_dir: Path, store_dir: Path, printed: str) -> bool:
    """Whether every entry is either stored from its own image, or left out by name."""
    try:
        content = json.loads(path.read_text())
        sections = [content["training"], content.get("validation", [])]
        entries = [{"image": e} if isinstance(e, str) else e for section in sections for e in section]
        images = [entry["image"] for entry in entries]
    except (ValueError, TypeError, KeyError, AttributeError):
        return False
    store = VolumeStore(store_dir)
    sources = {Path(store.record(name).source).resolve() for name in store.names}
    left_out = [line for line in printed.splitlines() if line.startswith(("left out", "failed"))]

    def is_named(entry: dict) -> bool:
        return any(str(entry.get(key)) in line for line in left_out for key in ("image", "name"))

    is_single = len(set(images[: len(sections[0])])) == len(sections[0])
    return is_single and all((data_dir / e["image"]).resolve() in sources or is_named(e) for e in entries)


def changed_list(change: Change) -> Callable[[Good, Path, random.Random], Attempt]:
    def make(good: Good, folder: Path, rng: random.Random) -> Attempt:
        content = copy.deepcopy(json.loads((good.folder / "list.json").read_text()))
        return list_attempt(good, folder, rng, json.dumps(change(content, rng)).encode())

    return make


def damaged_list(damage: Callable[[bytes, random.Random], bytes]) -> Callable[[Good, Path, random.Random], Attempt]:
    def make(good: Good, folder: Path, rng: random.Random) -> Attempt:
        return list_attempt(good, folder, rng, damage((good.folder / "list.json").read_bytes(), rng))

    return make


def listed_files(good: Good, folder: Path, rng: random.Random) -> Attempt:
    """A list of radiographs with something wrong, for create_json.py."""
    lines = ["chest0.png 0 1", "chest1.png 1 0"]
    wrong = ("", "chest0.png", "chest9.png", "no picture", "\0", "../../etc/passwd", "chest0.png\tchest1.png")
    lines.insert(rng.randrange(3), rng.choice(wrong))
    path = folder / "pictures.txt"
    path.write_text("\n".join(lines))
    given = words(data_dir=good.folder / "radiographs", list_file=path, output=folder / "list.json")

    def is_right(printed: str) -> bool:
        images = [entry["image"] for entry in json.loads((folder / "list.json").read_text())["training"]]
        missing = [line for line in lines if line and line.split()[0] not in images]
        return images == ["chest0.png", "chest1.png"] and all(line.split()[0] in printed for line in missing)

    return Attempt("scripts.create_json", given, (str(path), path.name), is_right)


FAULTS: Faults = {
    **{name: changed_list(change) for name, change in CHANGES.items()},
    **{name: damaged_list(lambda content, rng, text=text: text(rng)) for name, text in TEXTS.items()},
    **{name: damaged_list(damage) for name, damage in DAMAGES.items()},
    "a list file": listed_files,
}
