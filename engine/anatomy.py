"""SAM's vectors in pretraining: whether a run needs them, and the reader that its samples get them from."""

import json
from collections.abc import Sequence

from datasets.ct.images import CT
from datasets.lists.data_list import load_sections
from datasets.samples.anatomy import AnatomyPoints, AnatomyRequest
from datasets.store.format import check_kind, checksum_of
from datasets.store.volumes import VolumeStore
from engine import distributed
from engine.distributed import World
from engine.flags import options_of
from sam_embed.embeddings.body_coordinates import BodyCoordinates
from sam_embed.embeddings.opened import OpenedVectors, check_embeddings, num_channels, open_embeddings


def method_options(flags, Options: type):
    """A method's options; those of a dense term also get the size of SAM's vectors in --embed_dir.

    Raises:
        ValueError: a value out of range; a dense term without embeddings.
    """
    if not getattr(flags, "lambda4", 0):
        return options_of(flags, Options)
    if not flags.embed_dir:
        raise ValueError(
            f"--lambda4 {flags.lambda4:g} needs SAM's embeddings, and --embed_dir is not given. Make them with `python "
            f"scripts/generate_sam_embeddings.py --checkpoint_file SAM.pth --data_dir {flags.data_dir} --json_list "
            f"{flags.json_list} --embed_dir EMBED_DIR`, or set --lambda4 0"
        )
    cases = load_sections(flags.json_list, flags.data_dir, ("training", "validation"), must_exist=False)
    names = [case.name for case in cases]
    return options_of(flags, Options, vector_dim=num_channels(flags.embed_dir, names))


def open_anatomy(
    flags, request: AnatomyRequest | None, store: VolumeStore, sections: dict[str, Sequence[str]], world: World
) -> AnatomyPoints | None:
    """What draws points and reads vectors for the samples; every rank opens its share of the embeddings first.

    Args:
        request: of the method; None = it needs none.
        sections: "training" and "validation" -> their cases, those that the run samples from.

    Raises:
        ValueError: embeddings are missing, of several SAMs or of other volumes, or volumes are radiographs.
    """
    if request is None:
        return None
    check_kind(store.store_dir, CT)
    names = [name for section in sections.values() for name in section]
    weights = check_embeddings(flags.embed_dir, {name: store.record(name).identity for name in names})
    open_embeddings(flags.embed_dir, names[world.rank :: world.size], progress=world.is_main)
    distributed.wait_for_all(world)
    reader = OpenedVectors(flags.embed_dir, names)
    if request.num_coordinates:
        reader = BodyCoordinates(reader, sections["training"], request.num_coordinates)
        weights = f"{weights}:{reader.digest()}"
    return AnatomyPoints(reader, request, checksum_of(json.dumps(weights).encode()))
