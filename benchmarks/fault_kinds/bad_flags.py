"""Bad command lines: values of a wrong type or out of range, flags that contradict or that nobody knows."""

import importlib
import random
from collections.abc import Callable
from pathlib import Path

import jsonargparse

from benchmarks.fault_kinds.attempt import Attempt, Faults, Good
from benchmarks.results import words
from models.methods import METHODS

MAY_BE_NEGATIVE = ("--seed",)  # some commands take any whole number


def commands(good: Good, folder: Path) -> dict[str, tuple[str, ...]]:
    """Entry point -> words that work."""
    small, listed = good.folder / "small", good.folder / "list.json"
    return {
        "main_ddp": good.training_words(folder / "run"),
        "scripts.create_json": words(data_dir=small, output=folder / "made.json"),
        "scripts.prepare_volumes": good.storing_words(folder / "store", small, listed),
        "scripts.generate_sam_embeddings": good.embedding_words(folder / "embeddings"),
        "scripts.mine_pairs": good.mining_words(good.folder / "embeddings", output_dir=folder / "mined"),
        "scripts.import_embeddings": words(pickle_dir=small, embed_dir=folder / "embeddings", data_dir=small),
        "extract_backbone_weights": (str(good.folder / "run/checkpoint.pth"), str(folder / "out.pth")),
        "scripts.make_phantom_dataset": words(out_dir=folder / "phantoms", num_unlabelled=0, num_labelled=1),
        "scripts.train_sam": words(store_dir=good.corpus / "store", output_dir=folder / "sam", steps=1),
        "scripts.finetune_segmentation": words(data_dir=small, json_list=listed, output_dir=folder / "tuned"),
        "scripts.predict": (
            *(str(small / "small0.nii.gz"), str(folder / "out.nii.gz")),
            *("--checkpoint_file", str(good.folder / "run/checkpoint.pth")),
        ),
    }


def options_with(parser: jsonargparse.ArgumentParser, kinds: tuple[type, ...]) -> list[str]:
    """Flags of a parser whose value is one of these types."""
    found = []
    for action in parser._actions:
        kind = getattr(action, "type", None) or getattr(action, "_typehint", None)
        if isinstance(action, jsonargparse.ActionYesNo):
            kind = bool
        kinds_of = {kind, *getattr(kind, "__args__", ())}
        if action.option_strings and not action.choices and kinds_of & set(kinds) and str not in kinds_of:
            found.append(action.option_strings[0])
    return found


def parser_of(module: str, good: Good) -> jsonargparse.ArgumentParser:
    """The parser of an entry point."""
    return importlib.import_module(module).make_flags()


def one_flag(
    kinds: tuple[type, ...], values: tuple[str, ...], without: tuple[str, ...] = ()
) -> Callable[[Good, Path, random.Random], Attempt]:
    """Any entry point, one of its flags of these types, one of these values."""

    def make(good: Good, folder: Path, rng: random.Random) -> Attempt:
        given = commands(good, folder)
        module = rng.choice([name for name in given if options_with(parser_of(name, good), kinds)])
        flag = rng.choice([name for name in options_with(parser_of(module, good), kinds) if name not in without])
        return Attempt(module, (*given[module], f"{flag}={rng.choice(values)}"), (flag, flag.removeprefix("--")))

    return make


def unknown_flag(good: Good, folder: Path, rng: random.Random) -> Attempt:
    given = commands(good, folder)
    module = rng.choice(list(given))
    word = rng.choice(
        ("--no_such_flag", "--no_such_flag=1", "--batch-size=1", "--lern_rate=1", "-x", "extra_word", "--")
    )
    return Attempt(module, (*given[module], word), (word.split("=")[0], "unrecognized", "Unrecognized"))


def other_choice(good: Good, folder: Path, rng: random.Random) -> Attempt:
    """A word that is none of a flag's choices."""
    given = commands(good, folder)
    choices = {
        module: [a.option_strings[0] for a in parser_of(module, good)._actions if a.choices and a.option_strings]
        for module in given
    }
    module = rng.choice([name for name in given if choices[name]])
    flag = rng.choice(choices[module])
    return Attempt(module, (*given[module], f"{flag}={rng.choice(('nonsense', '', '5', 'None'))}"), (flag,))


def missing_flag(good: Good, folder: Path, rng: random.Random) -> Attempt:
    """A flag that is needed is not given."""
    given = commands(good, folder)
    module = rng.choice(
        [name for name, line in given.items() if any(word.endswith(("_dir", "_list")) for word in line)]
    )
    line = list(given[module])
    needed = {"main_ddp": ["--data_dir", "--json_list", "--output_dir"]}.get(module)
    flags = needed or [a.option_strings[0] for a in parser_of(module, good)._actions if a.required and a.option_strings]
    flags = [flag for flag in flags if flag in line] or ["--embed_dir"]
    at = line.index(rng.choice(flags)) if any(flag in line for flag in flags) else 0
    flag = line[at]
    del line[at : at + 2]
    return Attempt(module, tuple(line), (flag, flag.removeprefix("--"), "no volumes to read"))


def nowhere(good: Good, folder: Path, rng: random.Random) -> Attempt:
    """A path that is not there, or not what it should be."""
    given = commands(good, folder)
    module = rng.choice(list(given))
    line = list(given[module])
    inputs = ("--data_dir", "--json_list", "--checkpoint_file", "--embed_dir", "--pickle_dir")
    made = {"scripts.generate_sam_embeddings": "--embed_dir", "scripts.import_embeddings": "--embed_dir"}.get(module)
    places = [at + 1 for at, word in enumerate(line) if word in inputs and word != made]
    if module == "main_ddp":  # the flags of its default pairing need no table
        places = [at for at in places if line[at - 1] != "--embed_dir" or "sam" in line]
    if not line[0].startswith("--"):
        places.append(0)
    if not places:
        return unknown_flag(good, folder, rng)
    at = rng.choice(places)
    wrong = rng.choice(
        (str(folder / "nowhere"), "/dev/null", "", "/proc/self/mem", "a\0b".replace("\0", "?"), "~/nowhere")
    )
    flag, line[at] = line[at - 1], wrong
    return Attempt(module, tuple(line), (flag, flag.removeprefix("--"), wrong or flag))


def other_methods_flag(good: Good, folder: Path, rng: random.Random) -> Attempt:
    """A flag that only another method has."""
    from engine.flags import flag_names

    method, other = rng.sample(["alice", "simsiam", "caid"], 2)
    own = set(flag_names(METHODS[method].Options))
    names = [name for name in flag_names(METHODS[other].Options) if name not in own]
    name = rng.choice(names)
    return Attempt("main_ddp", (*good.training_words(folder / "run", method), f"--{name}=1"), (f"--{name}",))


CONTRADICTIONS: tuple[dict, ...] = (
    {"a_min": 100, "a_max": -100},
    {"min_lr": 1},
    {"use_fp16": "true", "precision": "bf16"},
    {"warmup_epochs": 5},
    {"pairing": "grid"},
    {"mask_block": 5},
    {"roi_x": 17},
    {"roi_z": 0},
    {"feature_size": 7},
    {"iou_range": (0.9, 0.1), "method": "simsiam"},
    {"iou_range": (2, 3), "method": "simsiam"},
    {"batch_size": 1, "method": "simsiam"},
    {"mask_ratio": 1.5},
    {"out_dim": 0},
    {"backbone": "resnet50_unet"},
    {"spacing_mm": 7},
    {"method": "nonsense"},
    {"device": "cuda"},
    {"steps_per_epoch": 10**12, "epochs": 10**12, "lr": 0},
)


def contradiction(good: Good, folder: Path, rng: random.Random) -> Attempt:
    """Flags that do not fit each other, or the data."""
    changed = dict(rng.choice(CONTRADICTIONS))
    method = changed.pop("method", "alice")
    if method == "nonsense":
        return Attempt("main_ddp", ("--method", method), ("--method",))
    names = tuple(f"--{name}" for name in changed)
    return Attempt("main_ddp", good.training_words(folder / "run", method, **changed), names)


def bad_config(good: Good, folder: Path, rng: random.Random) -> Attempt:
    """A recipe with something wrong."""
    texts = (
        *(
            "no_such_flag: 1\n",
            "lr: [1, 2]\n",
            "lr: abc\n",
            "epochs: 1.5\n",
            "- a\n- b\n",
            "just text\n",
            "lr: {a: 1}\n",
        ),
        *(
            "lr: 1\nlr: : 2\n",
            "\tlr: 1\n",
            "lr: *unknown\n",
            "caid_dim: 5\n",
            "use_checkpoint: maybe\n",
            "method: nonsense\n",
        ),
        *("config: other.yaml\n", "roi_z: null\n", "lr: .nan\n", "batch_size: -3\n"),
    )
    config = folder / "recipe.yaml"
    content = rng.choice((*(text.encode() for text in texts), b"\xff\xfe\0", b"lr: '\0'\n", b"a: " + b"[" * 50_000))
    config.write_bytes(content)
    key = content.split(b":")[0].decode(errors="replace").strip()
    line = good.training_words(folder / "run")
    line = [word for at, word in enumerate(line) if f"--{key}" not in (word, line[at - 1])]
    named = (f"--{key}", f"'{key}'", f'"{key}"')
    return Attempt("main_ddp", ("--config", str(config), *line), (str(config), "recipe.yaml", *named))


FAULTS: Faults = {
    "text for a number": one_flag((int, float), ("abc", "1,5", "1e", "0x10", "--", "True", "[1]", "{}")),
    "a fraction for a count": one_flag((int,), ("1.5", "1e-3", "nan", "inf")),
    "not a number": one_flag((float,), ("nan",)),
    "infinite": one_flag((float,), ("inf", "-inf", "1e400")),
    "nothing for a number": one_flag((int, float), ("",)),
    "below zero": one_flag((int,), ("-1", "-3", "-99999"), without=MAY_BE_NEGATIVE),
    "maybe": one_flag((bool,), ("maybe", "2", "")),
    "unknown flag": unknown_flag,
    "other choice": other_choice,
    "missing flag": missing_flag,
    "nowhere": nowhere,
    "another method's flag": other_methods_flag,
    "contradiction": contradiction,
    "recipe": bad_config,
}
