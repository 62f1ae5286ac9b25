"""Real CT through the steps between files and paired crops: store, embeddings, matching, mining, crops."""

import numpy as np
import pytest
import torch

from datasets.lists.data_list import Case
from datasets.samples.crops import CropOptions
from datasets.samples.dataset import CropDataset
from datasets.samples.pairings import PAIRINGS, PairingOptions
from datasets.store.volumes import VolumeStore, build_store
from sam_embed.case_source import CaseSource
from sam_embed.checkpoint import EmbedderInfo
from sam_embed.embeddings.corpus import embed_corpus
from sam_embed.embeddings.embedding_store import load_embedding
from sam_embed.matching.match import match_points
from sam_embed.matching.mine import MiningOptions
from sam_embed.matching.mine_corpus import mine_corpus
from sam_embed.network import AnatomicalEmbedder
from tests.shared import shared_file

NAMES = ("abdomen_pelvis_3mm", "chest_2mm", "upper_abdomen_5mm_a")
SPACING_MM = (5.0, 5.0, 5.0)


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A store of three scanners' CT, their embeddings by an untrained network, and the table mined from those."""
    folder = tmp_path_factory.mktemp("real")
    cases = [Case(name, shared_file("ct", f"{name}.nii.gz"), None) for name in NAMES]
    report = build_store(cases, folder / "store", SPACING_MM, progress=False)
    assert not report.failed
    store = VolumeStore(folder / "store")
    torch.manual_seed(0)
    network = AnatomicalEmbedder(width=16, embed_dim=16, norm="batch").eval()
    embed_corpus(network, EmbedderInfo(SPACING_MM), CaseSource(store.names, store.read), folder / "embeddings")
    options = MiningOptions(num_points=24, num_partners=2, min_score=-1.0)
    table = mine_corpus(folder / "embeddings", store.names, folder / "embeddings", options)
    return folder, store, table


def test_a_volume_matches_itself(real):
    folder, _, table = real
    for index, name in enumerate(table.case_names):
        embedding = load_embedding(folder / "embeddings", name)
        points = table.rows["query_mm"][table.rows["query_case"] == index].astype(np.float64)
        matches = match_points(embedding, embedding, points)
        errors = np.linalg.norm(matches.points_mm - points, axis=1)
        assert np.median(errors) < 5.0, (name, errors)  # half a fine voxel of 10 mm
        assert np.nanmin(matches.score) > 0.9


def test_mined_points_lie_in_bodies_and_volumes(real):
    _, store, table = real
    assert len(NAMES) * 24 <= len(table.rows) <= len(NAMES) * 24 * 2  # matches in air are dropped
    for row in table.rows[::7]:
        for side in ("query", "key"):
            name = table.case_names[int(row[f"{side}_case"])]
            volume = store.read(name)
            index = np.linalg.inv(volume.affine) @ np.append(row[f"{side}_mm"], 1.0)
            assert (index[:3] > -1).all() and (index[:3] < np.array(volume.array.shape)).all()
            near = tuple(slice(max(0, int(i) - 3), int(i) + 4) for i in index[:3])
            assert volume.array[near].max() > -700, f"{name}: only air around a mined point"


@pytest.mark.parametrize("pairing", ["sam", "iou", "random"])
def test_crops_of_real_ct_show_bodies(real, pairing):
    _, store, table = real
    options = PairingOptions(min_score=-1.0, max_cycle_mm=1e6)
    rule = PAIRINGS[pairing](store, store.names, (32, 32, 64), options, table)
    samples = CropDataset(store, rule, {}, CropOptions(), seed=1)
    for index in range(6):
        for number, crop in enumerate(samples[index]["crop"]):
            assert crop.shape == (1, 32, 32, 64) and torch.isfinite(crop).all()
            tissue = ((crop > 0.2) & (crop < 0.9)).float().mean()  # about -55 to 190 HU
            assert tissue > 0.03, f"{pairing} {index} crop {number}: {float(tissue):.3f} of the crop is soft tissue"
