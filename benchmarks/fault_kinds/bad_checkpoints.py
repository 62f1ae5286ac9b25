"""Bad checkpoints and weights: for resuming, starting from, extracting and embedding."""

import random
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.fault_kinds.attempt import DAMAGES, Attempt, Faults, Good
from benchmarks.fault_kinds.trial import differences
from engine.checkpoint import LATEST

Change = Callable[[dict, random.Random], object]  # a good checkpoint -> what is saved in its place
NO_TEXT = (None, 5, [], {}, 1.5)
NO_MAPPING = (None, 5, "text", [1, 2], torch.zeros(3))
NO_STEP = (None, "5", 1.5, -1, float("nan"), [1], torch.zeros(3))


def with_entry(name: str, values: tuple) -> Change:
    """Another value of an entry."""
    return lambda state, rng: state | {name: rng.choice(values)}


def without_entry(state: dict, rng: random.Random) -> dict:
    del state[rng.choice(["student", "teacher", "optimizer", "scaler", "step", "kind", "backbone", "preprocessing"])]
    return state


def in_weights(change: Callable[[dict, str, random.Random], None]) -> Change:
    """The student or the teacher with another tensor."""

    def apply(state: dict, rng: random.Random) -> dict:
        weights = state[rng.choice(["student", "teacher"])]
        names = [name for name in weights if name.startswith("backbone") and weights[name].is_floating_point()]
        change(weights, rng.choice(names), rng)
        return state

    return apply


def make_infinite(weights: dict, name: str, rng: random.Random) -> None:
    weights[name].view(-1)[rng.randrange(weights[name].numel())] = rng.choice((float("nan"), float("inf")))


def reshape(weights: dict, name: str, rng: random.Random) -> None:
    weights[name] = rng.choice((weights[name][..., None], weights[name].flatten()[:1].clone(), torch.zeros(0)))


def drop(weights: dict, name: str, rng: random.Random) -> None:
    del weights[name]


def rename(weights: dict, name: str, rng: random.Random) -> None:
    weights[f"foreign.{name}"] = weights.pop(name)


def make_text(weights: dict, name: str, rng: random.Random) -> None:
    weights[name] = rng.choice(("text", None, 5, [1.0]))


def break_optimizer(state: dict, rng: random.Random) -> dict:
    wrong = ({}, {"state": {}}, {"state": {}, "param_groups": []}, [], None, {"state": 5, "param_groups": 5})
    return state | {"optimizer": rng.choice(wrong)}


def make_moments_infinite(state: dict, rng: random.Random) -> dict:
    for slot in state["optimizer"]["state"].values():
        slot["exp_avg"].fill_(float("nan"))
    return state


CHANGES: dict[str, Change] = {
    "empty": lambda state, rng: {},
    "no mapping": lambda state, rng: rng.choice(NO_MAPPING),
    "an entry is missing": without_entry,
    "other kind": with_entry("kind", ("finetune", "sam_embed", "simsiam", "alicia", *NO_TEXT)),
    "student is no mapping": with_entry("student", NO_MAPPING),
    "teacher is no mapping": with_entry("teacher", NO_MAPPING),
    "step": with_entry("step", NO_STEP),
    "flags": with_entry("flags", NO_MAPPING),
    "backbone": with_entry("backbone", (*NO_MAPPING, {}, {"name": "vgg"}, {"name": 5, "feature_size": "x"})),
    "preprocessing": with_entry("preprocessing", (*NO_MAPPING, {}, {"roi": "x"}, {"roi": [1]}, {"roi": None})),
    "weights not finite": in_weights(make_infinite),
    "weights of another shape": in_weights(reshape),
    "weights are missing": in_weights(drop),
    "foreign names": in_weights(rename),
    "weights are no tensors": in_weights(make_text),
    "optimizer": break_optimizer,
    "moments not finite": make_moments_infinite,
    "scaler": with_entry("scaler", ({"scale": "x"}, 5, [1], {"a": 1})),
}


def resumed(good: Good, folder: Path, path: Path) -> Attempt:
    """main_ddp.py --resume: it must refuse what it needs, and end like the good one where it does not."""
    reference = good.folder / "resumed"
    if not reference.exists():
        good.call("main_ddp", *good.training_words(reference, epochs=2, resume=good.folder / "run" / LATEST))
    given = good.training_words(folder / "run", epochs=2, resume=path)

    def is_right(printed: str) -> bool:
        found = differences(folder / "run", reference, limit=100)
        return not [line for line in found if not line.startswith("log:")]

    return Attempt("main_ddp", given, (str(path),), is_right)


def extracted(good: Good, folder: Path, path: Path) -> Attempt:
    """extract_backbone_weights.py: the same tensors as from the good one, or a refusal."""
    reference = good.folder / "extracted.pth"
    if not reference.exists():
        good.call("extract_backbone_weights", str(good.folder / "run" / LATEST), str(reference))

    def is_right(printed: str) -> bool:
        ours, theirs = (torch.load(file, weights_only=True) for file in (folder / "out.pth", reference))
        return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    return Attempt("extract_backbone_weights", (str(path), str(folder / "out.pth")), (str(path),), is_right)


def checkpoint_fault(change: Change) -> Callable[[Good, Path, random.Random], Attempt]:
    """A checkpoint with something wrong in it, saved as a whole file."""

    def make(good: Good, folder: Path, rng: random.Random) -> Attempt:
        state = torch.load(good.folder / "run" / LATEST, weights_only=True)
        torch.save(change(state, rng), folder / "bad.pth")
        return rng.choice((resumed, extracted))(good, folder, folder / "bad.pth")

    return make


def damaged_checkpoint(
    damage: Callable[[bytes, random.Random], bytes],
) -> Callable[[Good, Path, random.Random], Attempt]:
    """A checkpoint whose file was damaged."""

    def make(good: Good, folder: Path, rng: random.Random) -> Attempt:
        (folder / "bad.pth").write_bytes(damage((good.folder / "run" / LATEST).read_bytes(), rng))
        return rng.choice((resumed, extracted))(good, folder, folder / "bad.pth")

    return make


# SAM's weights


def with_value(values: tuple, *names: str) -> Change:
    """Another value deep in a checkpoint."""

    def apply(state: dict, rng: random.Random) -> dict:
        part = state
        for name in names[:-1]:
            part = part[name]
        part[names[-1]] = rng.choice(values)
        return state

    return apply


def in_sam_weights(change: Callable[[dict, str, random.Random], None]) -> Change:
    def apply(state: dict, rng: random.Random) -> dict:
        weights = state["state_dict"]
        change(weights, rng.choice([name for name in weights if weights[name].is_floating_point()]), rng)
        return state

    return apply


SAM_CHANGES: dict[str, Change] = {
    "no mapping": lambda state, rng: rng.choice(NO_MAPPING),
    "other kind": with_value(("alice", *NO_TEXT), "kind"),
    "options": with_value(
        (*NO_MAPPING, {}, {"width": "x"}, {"width": -1}, {"wide": 8}, {"width": 16, "embed_dim": 8}), "options"
    ),
    "preprocessing": with_value((*NO_MAPPING, {"spacing": 2}, {"axcodes": "RAS"}), "preprocessing"),
    "spacing": with_value(
        (None, 5, "x", [2.0], [0, 0, 0], [2, 2, -2], [2, 2, float("nan")]), "preprocessing", "spacing_mm"
    ),
    "window": with_value((None, "x", float("nan"), 1e9), "preprocessing", "hu_min"),
    "weights not finite": in_sam_weights(make_infinite),
    "weights of another shape": in_sam_weights(reshape),
    "weights are missing": in_sam_weights(drop),
    "weights are no tensors": in_sam_weights(make_text),
}


def sam_fault(change: Change | None, damage: Callable[[bytes, random.Random], bytes] | None = None):
    """SAM's weights with something wrong, for generate_sam_embeddings.py."""

    def make(good: Good, folder: Path, rng: random.Random) -> Attempt:
        path = folder / "bad_sam.pth"
        if damage is None:
            torch.save(change(torch.load(good.folder / "sam.pth", weights_only=True), rng), path)
        else:
            path.write_bytes(damage((good.folder / "sam.pth").read_bytes(), rng))
        given = good.embedding_words(folder / "embeddings", checkpoint_file=path)

        def is_right(printed: str) -> bool:
            from sam_embed.embeddings.embedding_store import load_embedding

            ours, theirs = (load_embedding(at / "embeddings", "small0") for at in (folder, good.folder))
            return torch.equal(ours.fine, theirs.fine) and torch.equal(ours.coarse, theirs.coarse)

        return Attempt("scripts.generate_sam_embeddings", given, (str(path),), is_right)

    return make


FAULTS: Faults = {
    **{name: checkpoint_fault(change) for name, change in CHANGES.items()},
    **{name: damaged_checkpoint(damage) for name, damage in DAMAGES.items()},
    **{f"SAM: {name}": sam_fault(change) for name, change in SAM_CHANGES.items()},
    **{f"SAM: {name}": sam_fault(None, damage) for name, damage in DAMAGES.items()},
}
