"""Let PyKEEN's evaluator judge scores: `python pykeen_metrics.py FILE.npz` prints its metrics as JSON.

A process of its own, because PyKEEN registers every optimizer class it finds and stumbles over TorchRec's.
The file holds hrt int64 [T, 3] and, per side, filtered float64 scores [n, T, E] of n models (NaN where filtered out)
and the true scores [n, T].
"""

import json
import sys
from collections.abc import Mapping

import numpy as np
import torch
from pykeen.evaluation import RankBasedEvaluator

METRICS = {
    "mrr": "inverse_harmonic_mean_rank",
    "hits@1": "hits_at_1",
    "hits@3": "hits_at_3",
    "hits@10": "hits_at_10",
    "mean_rank": "arithmetic_mean_rank",
}


def main() -> None:
    data = np.load(sys.argv[1])
    print(json.dumps([metrics(data, number) for number in range(len(data["head_scores"]))]))


def metrics(data: Mapping[str, np.ndarray], number: int) -> dict[str, dict[str, float]]:
    evaluator = RankBasedEvaluator()
    for side in ("head", "tail"):
        evaluator.process_scores_(
            hrt_batch=torch.from_numpy(data["hrt"]),
            target=side,
            scores=torch.from_numpy(data[f"{side}_scores"][number]),
            true_scores=torch.from_numpy(data[f"{side}_true"][number])[:, None],
        )
    # PyKEEN keeps ranks, whole or half numbers, as float32, and would average their reciprocals as such.
    for key, ranks in evaluator.ranks.items():
        evaluator.ranks[key] = [r.astype(np.float64) for r in ranks]
    results = evaluator.finalize()
    return {
        side: {ours: float(results.get_metric(f"{side}.realistic.{name}")) for ours, name in METRICS.items()}
        for side in ("both", "head", "tail")
    }


if __name__ == "__main__":
    main()
