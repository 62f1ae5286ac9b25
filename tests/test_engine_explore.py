"""What the explorer knows without HTTP: planes, places in other scans, similarity maps, labels carried on demand."""

import json

import numpy as np
import pytest

from datasets.ct.geometry import index_to_world
from datasets.ct.planes import cut_plane
from datasets.lists.label_classes import LabelClasses
from engine.explore.session import FAILED, GIVEN, NONE, READY, WAITING, NotReadyError, Scan
from sam_embed.matching.reference import Reference
from tests.explore_sessions import LIVER, make_session
from tests.sam_fakes import AFFINE, ORGANS, SHAPE, atlas_labels, dice, patient_embedding

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = LabelClasses((0, *ORGANS), ("background", "liver", "spleen"))


@pytest.fixture(scope="module")
def session():
    return make_session()


def test_planes_are_those_of_the_volume_and_no_others(session):
    for plane, last in (("axial", SHAPE[0] - 1), ("coronal", 3), ("sagittal", 0)):
        found = session.plane(1, plane, last)
        np.testing.assert_array_equal(found, cut_plane(session.scans[1].volume.array, plane, last))
        assert found.dtype == np.int16 and found.flags.c_contiguous
    for scan, plane, index in ((2, "axial", 0), (-1, "axial", 0), (0, "axial", SHAPE[0]), (0, "oblique", 0)):
        with pytest.raises(IndexError):
            session.plane(scan, plane, index)


def test_a_place_is_found_in_the_other_scan(session):
    found = session.match(0, 1, LIVER[0])
    np.testing.assert_allclose(found.points_mm[0], LIVER[1], atol=2)
    assert found.verdict[0] == "trusted" and found.score[0] > 0.95 and found.cycle_mm[0] < 4
    assert session.match(1, 0, LIVER[1]).points_mm[0] == pytest.approx(LIVER[0], abs=2)


def test_the_similarity_map_peaks_at_the_match_and_hides_the_lower_half(session):
    shown = session.similarity(0, 1, LIVER[0])
    assert shown.dtype == np.uint8 and shown.shape == SHAPE and shown.max() == 255
    peak = index_to_world(session.scans[1].embedding.fine_affine, np.argwhere(shown == 255).mean(axis=0))
    np.testing.assert_allclose(peak, LIVER[1], atol=8)
    assert (shown == 0).mean() == pytest.approx(0.5, abs=0.02)


def test_places_beside_the_patient_are_refused(session):
    for ask in (session.match, session.similarity):
        with pytest.raises(ValueError, match="outside of the patient, who fills x -?[0-9]+"):
            ask(0, 1, [0.0, 0.0, 900.0])


def test_nothing_is_found_before_scans_are_embedded_or_after_one_failed():
    session = make_session(is_embedded=False)
    assert [scan["state"] for scan in session.describe()["scans"]] == [WAITING, WAITING]
    assert session.plane(0, "axial", 0).shape == SHAPE[1:]  # images can be looked at all the same
    session.embed_scan(session.scans[0])
    with pytest.raises(NotReadyError, match="patient1 is not embedded: waiting"):
        session.match(0, 1, LIVER[0])

    def fails(scan: Scan):
        raise ValueError("--memory_mb 0: too little")

    session._embed = fails
    session.embed_scan(session.scans[1])
    described = session.describe()["scans"][1]
    assert described["state"] == FAILED and "map" not in described
    with pytest.raises(NotReadyError, match="patient1 is not embedded: --memory_mb 0: too little"):
        session.match(0, 1, LIVER[0])


def test_the_description_is_plain_and_its_affines_lead_to_world_mm(session):
    described = json.loads(json.dumps(session.describe()))
    scan = described["scans"][0]
    assert scan["state"] == READY and scan["labels"] == NONE and not scan["can_carry"]
    assert scan["shape"] == list(SHAPE) == scan["map"]["shape"] and described["classes"] == []
    np.testing.assert_allclose(scan["affine"], AFFINE)
    np.testing.assert_allclose(np.array(scan["inverse"]) @ AFFINE, np.eye(4), atol=1e-9)
    assert described["planes"]["coronal"] == {"cut": 1, "down": 0, "across": 2, "is_flipped": True}


def test_labels_of_one_scan_are_carried_to_the_other():
    given = CLASSES.to_classes(atlas_labels(0))
    session = make_session(labels={0: given}, classes=CLASSES)
    assert [scan["can_carry"] for scan in session.describe()["scans"]] == [False, True]
    np.testing.assert_array_equal(session.label_plane(0, "coronal", 12), cut_plane(given, "coronal", 12))
    with pytest.raises(NotReadyError, match="patient1 has no labels yet"):
        session.label_plane(1, "axial", 0)
    assert session.claim_carrying(1) and not session.claim_carrying(1)  # one at a time
    session.carry_to(1)
    truth = CLASSES.to_classes(atlas_labels(1))
    for channel in (1, 2):
        assert dice(session.scans[1].labels == channel, truth == channel) > 0.7  # of 8 mm voxels
    states = [scan["labels"] for scan in session.describe()["scans"]]
    assert states == [GIVEN, READY] and not session.claim_carrying(1)
    with pytest.raises(NotReadyError):
        session.claim_carrying(0)  # it has labels of its own


def test_labels_come_from_other_references_too_and_failures_are_told():
    reference = Reference(patient_embedding(2), atlas_labels(2), AFFINE)
    session = make_session(classes=CLASSES, references=[reference])
    session.claim_carrying(0)
    session.carry_to(0)
    assert set(np.unique(session.scans[0].labels)) == {0, 1, 2}
    broken = make_session(classes=CLASSES, references=[Reference(patient_embedding(2), np.zeros((2, 2)), AFFINE)])
    broken.claim_carrying(0)
    broken.carry_to(0)
    described = broken.describe()["scans"][0]
    assert described["labels"] == FAILED and "expected integers [D, H, W]" in described["error"]
    assert broken.claim_carrying(0)  # may be tried again


def test_labels_wait_until_their_scans_are_embedded():
    session = make_session(is_embedded=False, labels={0: CLASSES.to_classes(atlas_labels(0))}, classes=CLASSES)
    session.embed_scan(session.scans[1])
    with pytest.raises(NotReadyError, match="are all scans embedded"):
        session.claim_carrying(1)
