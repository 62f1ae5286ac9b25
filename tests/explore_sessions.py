"""Sessions of made-up patients: their embeddings are known, so that matches are exact and nothing is computed."""

from engine.explore.session import Scan, Session
from sam_embed.matching.follow import FollowOptions
from tests.sam_fakes import patient_embedding, patient_landmarks, patient_volume

OPTIONS = FollowOptions(consensus_mm=0, max_spread_mm=1e6)
LIVER = {seed: patient_landmarks(seed)["liver"].tolist() for seed in range(3)}


def embed(scan: Scan):
    return patient_embedding(int(scan.name.removeprefix("patient")))


def make_session(num: int = 2, is_embedded: bool = True, labels: dict | None = None, **more) -> Session:
    """Patients 0, 1, ...; `labels`: seed -> channels."""
    volumes = [patient_volume(seed) for seed in range(num)]
    scans = [Scan(volume.path, volume, (labels or {}).get(seed)) for seed, volume in enumerate(volumes)]
    session = Session(scans, embed, OPTIONS, **more)
    if is_embedded:
        for scan in session.scans:
            session.embed_scan(scan)
    return session
