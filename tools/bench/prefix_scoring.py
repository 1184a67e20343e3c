"""One step's negatives by number of sub-models: scores, MED loss and gradients of 1,024 positives x 64 negatives.

usage: python tools/bench/prefix_scoring.py [--scorers ...] [--systems ...] [--sub-models ...] [--quick] [--json]

Measured is the time from queries [X, P, C] and rows [U, C] to the losses of all sub-models and the gradients of
queries and rows, which are added to a standing tensor; nothing is looked up or updated. Positives' own scores are
not in it. Systems:

- kernel: `corruption_terms` of medscale's kernels, C++ on a CPU and Triton on a GPU (timed by CUDA events);
- torch: the plain twin, `PrefixScan.scores`, `negative_losses` and autograd;
- torch.compile: the same arithmetic and loss compiled by the default backend, which gets it whole, without the
  slices and the recomputation that spare the plain twin memory; candidates' rows are gathered outside of it. Compiling
  takes minutes, so only the fewest and the most sub-models are measured; where it fails, `error` says how.

Negatives are fresh (64 for each positive, out of 33,000 rows), or shared by chunks of 32 positives (64 for each chunk,
out of 4,096 rows). `gb_per_s` counts the bytes that must move at least once: candidates' rows read, and as many
gradient rows written, per pair where negatives are fresh, per chunk where they are shared. `copy_gb_per_s` is what
copying 256 MiB reaches in the same process. Every scorer and number of threads has a process of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from measure import copy_bandwidth, in_own_process, median_milliseconds
from records import Record, options, parse, publish
from torch import Tensor
from workload import SCORERS, dims_of, model_of

from medscale.config import LossSection
from medscale.logs import log
from medscale.loss.bce import logits_of
from medscale.loss.fused import Kernels
from medscale.loss.med import dynamic_weights
from medscale.loss.negatives import BinaryConstants, negative_losses
from medscale.model.prefix import PrefixScan, prefix_scan
from medscale.model.rows import Rows, add_rows
from medscale.model.scoring import scorer_of

POSITIVES, NEGATIVES, UNITS = 1024, 64, 640
#: positives per chunk, and rows that candidates come from
SHARING = {"chunk32": (32, 4_096), "fresh": (1, 33_000)}
SYSTEMS = ("kernel", "torch", "torch.compile")


@dataclass(frozen=True)
class Step:
    """Random tensors of a step's size, and the constants of MED as it is by default."""

    scan: PrefixScan
    constants: BinaryConstants
    query_XPC: Tensor
    rows_UC: Tensor
    candidates_XK: Tensor
    keep_XPK: Tensor
    scale_XPC: Tensor | None
    w2: Tensor
    hard_weights_n: Tensor
    mutual_weights_n: Tensor

    def loss(self, scores_nXPK: Tensor) -> Tensor:
        """Return the plain loss of scores."""
        hard_n, mutual_n = negative_losses(self.constants, self.w2, scores_nXPK, self.keep_XPK)
        return (self.hard_weights_n * hard_n).sum() + (self.mutual_weights_n * mutual_n).sum()

    def least_bytes(self) -> int:
        """Return the bytes of the candidates' rows and of their gradients."""
        return 2 * self.candidates_XK.numel() * self.scan.num_columns * self.rows_UC.element_size()


def step_of(scorer_name: str, sub_models: int, sharing: str, device: torch.device) -> Step:
    """Draw a step."""
    torch.manual_seed(0)
    torch.set_default_device(device)
    dims = dims_of(sub_models, UNITS)
    scorer = scorer_of(model_of(scorer_name, dims))
    scan = prefix_scan(scorer, dims, device=device)
    per_chunk, num_rows = SHARING[sharing]
    chunks = POSITIVES // per_chunk
    # as in training: logits of a few units, not of hundreds
    size = 10 / UNITS if scorer.is_distance else UNITS ** (-1 / 4)
    return Step(
        scan=scan,
        constants=BinaryConstants(
            logits=logits_of(LossSection(), dims, is_distance=scorer.is_distance, device=device),
            evidence=tuple(range(sub_models)), taught=tuple(i > 0 for i in range(sub_models)), raw=False,
            over_batch=False, both=False,
        ),
        query_XPC=(size * torch.randn(chunks, per_chunk, scan.num_columns)).requires_grad_(),
        rows_UC=size * torch.randn(num_rows, scan.num_columns),
        candidates_XK=torch.randint(num_rows, (chunks, NEGATIVES)),
        keep_XPK=torch.ones(chunks, per_chunk, NEGATIVES, dtype=torch.bool),
        scale_XPC=torch.randn(chunks, per_chunk, scan.num_columns, requires_grad=True) if scorer.scale else None,
        w2=torch.tensor(1.0),
        hard_weights_n=dynamic_weights(torch.tensor(dims).float(), torch.tensor(1.0)),
        mutual_weights_n=torch.full((sub_models,), 1 / (POSITIVES * (1 + NEGATIVES))),
    )  # fmt: skip


def by_kernel(step: Step) -> Callable[[], object]:
    corruption_terms = Kernels(step.rows_UC.device).corruptions.corruption_terms
    row_gradients_UC = torch.zeros_like(step.rows_UC)
    return lambda: corruption_terms(
        step.scan.levels, step.constants, 1.0, step.query_XPC, step.rows_UC, step.candidates_XK, step.keep_XPK,
        step.scale_XPC, step.hard_weights_n, step.mutual_weights_n, row_gradients_UC,
    )  # fmt: skip


def by_torch(step: Step) -> Callable[[], object]:
    rows = Rows(step.rows_UC, add_rows)
    return lambda: step.loss(step.scan.scores(step.query_XPC, rows.take(step.candidates_XK), step.scale_XPC)).backward()


def by_compiler(step: Step) -> Callable[[], object]:
    torch.compiler.reset()  # else it would count as a recompilation of the case before, with shapes that vary
    rows, scan = Rows(step.rows_UC, add_rows), step.scan

    @torch.compile
    def loss(query_XPC: Tensor, candidates_XKC: Tensor, scale_XPC: Tensor | None) -> Tensor:
        if not scan.scorer.is_distance:
            return step.loss(torch.stack(scan.product_scores(query_XPC, candidates_XKC)))
        scale = query_XPC.new_ones((len(query_XPC), 1, 1)) if scale_XPC is None else scale_XPC
        return step.loss(scan._distance_scores(query_XPC, candidates_XKC, scale))

    return lambda: loss(step.query_XPC, rows.take(step.candidates_XK), step.scale_XPC).backward()


def records_of(scorer: str, systems: list[str], numbers: list[int], seconds: float, threads: int) -> list[Record]:
    """Measure one scorer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = {
        "scorer": scorer, "threads": threads, "batch": POSITIVES, "negatives": NEGATIVES, "units": UNITS,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
    }  # fmt: skip
    copied = round(copy_bandwidth(seconds, device), 3)
    return [
        {
            **facts, "sharing": sharing, "sub_models": number, "system": system,
            **figures_of(step_of(scorer, number, sharing, device), system, seconds), "copy_gb_per_s": copied,
        }
        for sharing in SHARING
        for number in numbers
        for system in systems
        if system != "torch.compile" or number in (min(numbers), max(numbers))
    ]  # fmt: skip


def figures_of(step: Step, system: str, seconds: float) -> dict[str, Any]:
    """Measure one system, or say why that is not possible."""
    build = {"kernel": by_kernel, "torch": by_torch, "torch.compile": by_compiler}[system]
    try:
        milliseconds = median_milliseconds(build(step), seconds, step.rows_UC.device)
    except Exception as error:  # a compiler may fail in any way, and the others' figures still stand
        if system != "torch.compile":
            raise
        return {"error": f"{type(error).__name__}: {error}"[:300]}
    return {"ms_per_step": round(milliseconds, 3), "gb_per_s": round(step.least_bytes() / 1e6 / milliseconds, 3)}


def main() -> None:
    parser = options(__doc__, threads=(1,) if torch.cuda.is_available() else (1, 2))
    parser.add_argument("--scorers", nargs="+", choices=SCORERS, default=SCORERS)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--sub-models", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each median")
    quick = {"scorers": ["transe", "complex"], "systems": ["kernel", "torch"], "sub_models": [1, 16], "seconds": 0.0}
    arguments = parse(parser, threads=[1], **quick)
    records = []
    for threads in arguments.threads:
        for scorer in arguments.scorers:
            log(f"{scorer}, {threads} threads")
            chosen = (arguments.systems, arguments.sub_models, arguments.seconds)
            records += in_own_process(threads, records_of, scorer, *chosen, threads)
    publish(arguments, records)


if __name__ == "__main__":
    main()
