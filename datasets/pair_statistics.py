"""What kinds of pairs a run has trained on: counts of kinds and fallbacks, and mean scores, gathered from batches."""

from collections.abc import Mapping

import torch

from datasets.pairings import PAIR_KINDS, PairDraw


class PairStatistics:
    """Counts over batches of `PairedCropDataset`.

    `totals` is one float64 vector of sums, so that ranks are joined by summing it (`all_reduce`), and a checkpoint can
    keep it: [number of pairs, of fallbacks, number of each kind..., sum of scores of each kind...].
    """

    def __init__(self) -> None:
        self.totals = torch.zeros(2 + 2 * len(PAIR_KINDS), dtype=torch.float64)

    def add(self, batch: Mapping[str, torch.Tensor]) -> None:
        """Count a batch (or one sample): its "pair_kind", "is_fallback" and "score"."""
        num_kinds = len(PAIR_KINDS)
        kind = torch.atleast_1d(batch["pair_kind"]).cpu()
        score = torch.atleast_1d(batch["score"]).cpu().double()
        self.totals[0] += len(kind)
        self.totals[1] += batch["is_fallback"].sum().cpu()
        self.totals[2 : 2 + num_kinds] += torch.bincount(kind, minlength=num_kinds)
        self.totals[2 + num_kinds :].index_add_(0, kind, score)

    def add_draw(self, draw: PairDraw) -> None:
        """Count a pair that was drawn and not cut."""
        self.add(
            {
                "pair_kind": torch.tensor(PAIR_KINDS.index(draw.kind)),
                "is_fallback": torch.tensor(draw.is_fallback),
                "score": torch.tensor(draw.score),
            }
        )

    def summary(self) -> dict:
        """Plain values: num_pairs, num_fallback, share_fallback, and per kind met num_<kind> and mean_score_<kind>."""
        num_kinds = len(PAIR_KINDS)
        totals = self.totals.tolist()
        counts, scores = totals[2 : 2 + num_kinds], totals[2 + num_kinds :]
        facts = {
            "num_pairs": int(totals[0]),
            "num_fallback": int(totals[1]),
            "share_fallback": totals[1] / max(totals[0], 1.0),
        }
        for name, count, score in zip(PAIR_KINDS, counts, scores):
            if count:
                facts[f"num_{name}"] = int(count)
                facts[f"mean_score_{name}"] = score / count
        return facts
