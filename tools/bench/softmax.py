"""One step's softmax over shared candidates by number of sub-models: products of matrices, losses and gradients.

usage: python tools/bench/softmax.py [--scorers ...] [--quick] [--json]

Measured is the time from queries [Q, C] and candidates' rows [M, C] of a product scorer of 640 units to the loss and
its gradients by both, one answer per query, 1,024 queries against 4,352 candidates (a step of the shipped
jobs: the batch's own entities and 1,200 more). `times_one` is against the fastest way to train one model. Systems:

- gemm: one model in plain torch: one product, `cross_entropy`, and what autograd makes of it;
- kernel: `cpu_softmax` with 1 sub-model, 8, and a sample of 8 out of 64 that always holds the smallest and the largest;
  mutual learning between neighbours (in a sample: where neighbours of the full list meet).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import in_own_process, median_milliseconds
from records import Record, options, parse, publish
from workload import dims_of, model_of

from medscale.batches.queries import Targets
from medscale.loss.cpu_softmax import Softmax, product_log_probabilities
from medscale.model.kernels.cpu_pairs import add_rows
from medscale.model.prefix import prefix_scan
from medscale.model.rows import Rows
from medscale.model.scoring import scorer_of

QUERIES, CANDIDATES, UNITS = 1024, 4352, 640
SCORERS = ("complex", "simple", "distmult")
#: sub-models in all, and those of a step
STEPS = {"1": (1, [0]), "8": (8, list(range(8))), "8 of 64": (64, [0, 1, 14, 15, 36, 37, 62, 63])}


def by_gemm(columns: int) -> Callable[[], object]:
    query_QC, rows_MC, answers_Q = tensors(columns)
    rows_MC.requires_grad_()
    return lambda: F.cross_entropy(query_QC @ rows_MC.T, answers_Q).backward()


def by_kernel(scorer: str, number: int, chosen: list[int]) -> Callable[[], object]:
    dims = dims_of(number, UNITS)
    scan = prefix_scan(scorer_of(model_of(scorer, dims)), dims, None, chosen)
    query_QC, rows_MC, answers_Q = tensors(scan.num_columns)
    neighbours = tuple(m > 0 and chosen[m] == chosen[m - 1] + 1 for m in range(len(chosen)))
    softmax, targets = Softmax(scan, neighbours, both=False), Targets(torch.arange(QUERIES), answers_Q)
    rows = Rows(rows_MC, add_rows)

    def step() -> None:
        log_mT, divergence_m = product_log_probabilities(softmax, query_QC, rows, None, targets)
        (divergence_m.sum() - log_mT.mean(1).sum()).backward()

    return step


def tensors(columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw queries, candidates' rows, and each query's answer."""
    torch.manual_seed(0)
    query_QC = torch.randn(QUERIES, columns).div_(columns**0.5).requires_grad_()
    return query_QC, torch.randn(CANDIDATES, columns), torch.randint(CANDIDATES, (QUERIES,))


def records_of(scorer: str, seconds: float, threads: int) -> list[Record]:
    """Measure one scorer."""
    device = torch.device("cpu")
    columns = UNITS * scorer_of(model_of(scorer, (UNITS,))).unit_columns
    times = {("gemm", "1"): median_milliseconds(by_gemm(columns), seconds, device)}
    times |= {
        ("kernel", name): median_milliseconds(by_kernel(scorer, *step), seconds, device) for name, step in STEPS.items()
    }
    one = min(times["gemm", "1"], times["kernel", "1"])
    return [
        {
            "scorer": scorer, "system": system, "sub_models": STEPS[name][0],
            "sub_models_per_step": len(STEPS[name][1]), "threads": threads, "batch": QUERIES,
            "negatives": CANDIDATES - 1, "units": UNITS, "ms_per_step": round(milliseconds, 3),
            "times_one": round(milliseconds / one, 3),
        }
        for (system, name), milliseconds in times.items()
    ]  # fmt: skip


def main() -> None:
    parser = options(__doc__, threads=(1, 2))
    parser.add_argument("--scorers", nargs="+", choices=SCORERS, default=SCORERS)
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each median")
    arguments = parse(parser, threads=[1], scorers=["distmult"], seconds=0.0)
    records = []
    for threads in arguments.threads:
        for scorer in arguments.scorers:
            records += in_own_process(threads, records_of, scorer, arguments.seconds, threads)
    publish(arguments, records)


if __name__ == "__main__":
    main()
