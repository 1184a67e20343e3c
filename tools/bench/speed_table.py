"""Write the tables of committed speed results into README.md, between their two marks.

usage: python tools/bench/speed_table.py [--check]
"""

import json
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from readme import write_section

RESULTS = Path(__file__).with_name("results")

Record = dict[str, Any]
SHARED = {"chunk32": "shared by chunks of 32 positives", "fresh": "fresh for each positive"}


def records_of(name: str) -> list[Record]:
    records: list[Record] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["results"]
    return records


def table(headings: str, rows: Iterable[str]) -> Iterator[str]:
    """Yield a table; the first two columns are words, the others numbers."""
    yield f"| {headings} |"
    yield "|---|---|" + "---:|" * (headings.count("|") - 1)
    yield from (f"| {row} |" for row in rows)


def training() -> Iterator[str]:
    """Yield a row per scorer and way of sharing: triples/s of one model and of 64, on one core and on two."""
    records = records_of("training_step")
    for scorer, sharing in dict.fromkeys((r["scorer"], r["sharing"]) for r in records):
        cells = [f"`{scorer}`", SHARED[sharing]]
        for threads in sorted({r["threads"] for r in records}):
            case = (scorer, sharing, threads)
            one, many, cut = (r for r in records if (r["scorer"], r["sharing"], r["threads"]) == case)
            cells += [f"{1000 * r['batch'] / r['ms_per_step']:,.0f}" for r in (one, many)]
            cells += [f"{many['times_one']:.2f}", f"{cut['times_one']:.2f}"]
        one_core, two_cores = (
            next(r for r in records if (r["scorer"], r["sharing"], r["threads"], r["sub_models"], r["blocks"]) == case)
            for case in ((scorer, sharing, 1, 64, 1), (scorer, sharing, 2, 64, 1))
        )
        cells.append(f"{one_core['ms_per_step'] / two_cores['ms_per_step']:.2f}")
        yield " | ".join(cells)


def parts() -> Iterator[str]:
    """Yield a row per scorer and way of sharing: ms of each part of a step of 64 sub-models, on one core and on two."""
    records = [r for r in records_of("training_step") if (r["sub_models"], r["blocks"]) == (64, 1)]
    for scorer, sharing in dict.fromkeys((r["scorer"], r["sharing"]) for r in records):
        of = [r for r in records if (r["scorer"], r["sharing"]) == (scorer, sharing)]
        ms = [{part: share * 1000 * r["batch"] / r["triples_per_s"] for part, share in r["shares"].items()} for r in of]
        yield " | ".join(
            [f"`{scorer}`", SHARED[sharing], *(" / ".join(f"{m[part]:.1f}" for m in ms) for part in ms[0])]
        )


def bandwidth() -> str:
    """Return what a copy moves on one core and on two, and FBGEMM's look-up and update, in words."""
    of = {n: [r["copy_gb_per_s"] for r in records_of("prefix_scoring") if r["threads"] == n] for n in (1, 2)}
    one, two = (statistics.median(figures) for figures in of.values())
    r = next(r for r in records_of("training_step") if (r["scorer"], r["sharing"]) == ("transe", "fresh"))
    moved = {"look-up": 2, "update": 3}  # rows read and written; gradients read too
    gb_per_s = [
        f"{times * 4 * r['rows_per_step'] * r['units'] * r['triples_per_s'] / r['batch'] / r['shares'][part] / 1e9:.0f}"
        for part, times in moved.items()
    ]
    return (
        f"A copy moves {one:.0f} GB/s on one core and {two:.0f} on both; for TransE with fresh negatives the look-up "
        f"moves {gb_per_s[0]} GB/s on one core, and the update {gb_per_s[1]}."
    )


def compiled() -> Iterator[str]:
    """Yield a row per scorer and way of sharing: the negatives' part of a step by kernels and by torch.compile."""
    records = records_of("prefix_scoring_compile")
    for scorer, sharing in dict.fromkeys((r["scorer"], r["sharing"]) for r in records):
        of = {(r["system"], r["sub_models"]): r for r in records if (r["scorer"], r["sharing"]) == (scorer, sharing)}
        numbers = [f"{of[system, n]['ms_per_step']:,.0f}" for system in ("kernel", "torch.compile") for n in (1, 64)]
        yield " | ".join([f"`{scorer}`", SHARED[sharing], *numbers])


def scoring() -> Iterator[str]:
    """Yield a row per scorer and way of sharing: the negatives' part of a step alone, by kernels and by plain torch."""
    records = [r for r in records_of("prefix_scoring") if r["threads"] == 1]
    for scorer, sharing in dict.fromkeys((r["scorer"], r["sharing"]) for r in records):
        of = {(r["system"], r["sub_models"]): r for r in records if (r["scorer"], r["sharing"]) == (scorer, sharing)}
        numbers = [f"{of[system, n]['ms_per_step']:,.0f}" for system in ("kernel", "torch") for n in (1, 64)]
        many = of["kernel", 64]
        cells = [f"`{scorer}`", SHARED[sharing], *numbers, f"{many['gb_per_s']:.1f}", f"{many['copy_gb_per_s']:.0f}"]
        yield " | ".join(cells)


def peers() -> Iterator[str]:
    """Yield a row per scorer and system: triples/s and MRR after the same time."""
    records = records_of("peers")
    base = {r["scorer"]: r["triples_per_s"] for r in records if r["freed_memory"] == "returned"}
    for r in records:
        by_dim = r["mrr_by_dim"]
        mrr = [f"{by_dim[dim]:.3f}" if dim in by_dim else "" for dim in ("10", "100", "640")]
        name = "PyKEEN, one model" if r["system"] == "pykeen" else "medscale, 64 sub-models"
        if r["system"] == "pykeen" and r["freed_memory"] == "kept":
            name += ", with medscale's setting of the allocator"
        cells = [f"`{r['scorer']}`", f"{name}, negatives {SHARED[r['sharing']]}", f"{r['triples_per_s']:,.0f}"]
        yield " | ".join([*cells, f"{r['triples_per_s'] / base[r['scorer']]:.1f}", *mrr])


def ranking() -> Iterator[str]:
    """Yield a row per scorer and system."""
    for r in records_of("ranking"):
        words = "one model, plain matrix products" if r["system"] == "gemm" else f"{r['sub_models']} sub-models"
        yield f"`{r['scorer']}` | {words} | {r['seconds']:.1f} | {r['times_one']:.2f} | {r['peak_mib']:,.0f}"


def softmax() -> Iterator[str]:
    records = records_of("softmax")
    for one, two in zip(*([r for r in records if r["threads"] == threads] for threads in (1, 2)), strict=True):
        number, total = one["sub_models_per_step"], one["sub_models"]
        words = "one model, plain torch" if one["system"] == "gemm" else f"{number} sub-model{'s' * (number > 1)}"
        words += f" of {total}" if total != number else ""
        figures = (f"{r['ms_per_step']:,.0f} | {r['times_one']:.2f}" for r in (one, two))
        yield f"`{one['scorer']}` | {words} | {' | '.join(figures)}"


def preparing() -> Iterator[str]:
    """Yield a row per number of tasks."""
    for r in records_of("prepare_scale"):
        place = "in one process" if r["tasks"] == 1 else "a Ray cluster of this machine's own"
        yield f"{r['tasks']} | {place} | {r['seconds']:.0f} | {r['triples_per_s']:,.0f} | {r['peak_mib']:,.0f}"


def growing() -> Iterator[str]:
    """Yield a row per size of graph."""
    for r in records_of("skg_scale"):
        yield (
            f"{r['entities']:,} | {r['triples']:,} | {r['triples_per_s']:,.0f} | {r['times_smallest']:.2f} "
            f"| {r['peak_mib'] / 1024:.1f} | {r['grown_mib']:+.0f} | {r['epoch_s']:,.0f}"
        )


def whole_run() -> Iterator[str]:
    """Yield a row per stage of the full-size run."""
    for r in records_of("skg_run"):
        found = {
            "train": lambda r: (
                f"{r['steps']:,} steps at {r['triples_per_s']:,.0f} triples/s, the slowest stretch at "
                f"{r['slowest_per_s']:,.0f}; resident memory {r['grown_mib']:+.0f} MiB on the way; "
                f"{r['checkpoint_s']:.0f} s of it saving a checkpoint"
            ),
            "evaluate": lambda r: f"{r['queries']:,} queries among all entities, three sub-models",
            "export": lambda r: f"three tiers, {r['gb']:.1f} GB",
        }.get(r["stage"], lambda r: "generated, numbered, deduplicated, shuffled and written, in one process")(r)
        yield f"`{r['stage']}` | {found} | {r['seconds']:,.0f} | {r['peak_mib'] / 1024:.1f}"


def workers() -> Iterator[str]:
    """Yield a row per number of workers and batch."""
    words = {"one": "one worker", "strong": "two, the same batch", "weak": "two, twice the batch"}
    for r in records_of("scaling"):
        yield (
            f"{words[r['system']]} | {r['batch']:,} | {r['triples_per_s']:,.0f} | {r['times_one']:.2f} "
            f"| {r['communication']:.0%} | {r['mib_per_step']:.1f} | {r['planned_mib_per_step']:.1f} "
            f"| {r['peak_mib']:,.0f} | {r['planned_mib']:,.0f}"
        )


def splitting() -> Iterator[str]:
    """Yield a row per table and form."""
    words = {
        "full": "as the job says: float32, whole tiers, Parquet beside them", "delta": "the same, layout `delta`",
        "int8": "int8, Parquet decoded", "core": "float32 without Parquet", "hash": "shards by hash",
    }  # fmt: skip
    for r in records_of("split"):
        yield (
            f"{r['rows']:,} | {words[r['system']]} | {r['gb']:.2f} | {r['verify_s']:.1f} | {r['seconds']:.1f} "
            f"| {r['mb_per_s']:,.0f} | {r['disk_mb_per_s']:,.0f} | {r['peak_mib']:,.0f}"
        )


def reading() -> Iterator[str]:
    """Yield a row per number of readers."""
    for r in records_of("readers"):
        who = f"{r['readers']} reader actors" if r["readers"] else "the worker's own thread"
        yield f"{who} | {r['triples']:,} | {r['triples_per_s']:,.0f} | {r['peak_mib']:,.0f}"


def precisions() -> Iterator[str]:
    """Yield a row per job and tier: MRR of float32, what the other precisions keep of it, and bytes of a row."""
    records = [r for r in records_of("precision") if r["system"] == "precision"]
    for job, tier in dict.fromkeys((r["job"], r["tier"]) for r in records):
        of = {r["precision"]: r for r in records if (r["job"], r["tier"]) == (job, tier)}
        one = of["float32"]
        kept = [f"{r['share_of_float32']:.1%}{' *' if r['marked'] else ''}" for r in list(of.values())[1:]]
        sizes = [f"{r['bytes_per_entity']:,}" for r in of.values()]
        yield " | ".join([f"`{job}`, {one['scorer']}", f"{tier}, {one['units']}", f"{one['mrr']:.3f}", *kept, *sizes])


def formats() -> Iterator[str]:
    """Yield a row per tier and format of the largest graph."""
    records = [r for r in records_of("precision") if r["system"] == "format"]
    largest = max(r["entities"] for r in records)
    for r in records:
        if r["entities"] == largest:
            write = f"{r['write_s']:.2f}" if "write_s" in r else ""
            yield (
                f"{r['tier']}, {r['units']} | `{r['format']}` | {r['bytes'] / 1e6:.3f} | {write} | {r['open_s']:.3f} "
                f"| {r['top10_ms']:.2f} | {r['recall@10']:.3f}"
            )


def using(name: str = "runtime") -> Iterator[str]:
    """Yield a row per scorer, tier and precision: top-10 of single queries, by others, and in bulk."""
    records = [r for r in records_of(name) if "recall" not in r]
    cases = dict.fromkeys((r["scorer"], r["norm"], r["precision"], r["columns"]) for r in records)
    for case in cases:
        mine = [r for r in records if (r["scorer"], r["norm"], r["precision"], r["columns"]) == case]
        by = {(r["system"], r["what"]): r for r in mine}
        others = [by.get((system, "top_10")) for system in ("faiss", "usearch")]
        own, bulk = by["medscale", "top_10"], by["medscale", "bulk"]
        opened = [by["medscale", f"open, verify {word}"]["seconds"] for word in ("always", "never")]
        yield " | ".join([
            f"`{case[0]}` {case[1]}", case[2], str(case[3]), f"{own['p50_ms']:.0f}", f"{own['p99_ms']:.0f}",
            *(f"{other['p50_ms']:.0f}" if other else "" for other in others), f"{bulk['p50_ms']:.1f}",
            f"{by['medscale', 'look-ups by name']['lookups_per_s']:,}", f"{1000 * opened[0]:,.0f}",
            f"{1000 * opened[1]:,.0f}",
        ])  # fmt: skip


def cascading() -> Iterator[str]:
    """Yield a row per way to ask a chain of tiers."""
    for r in records_of("runtime"):
        if "recall" in r:
            pruned = " > ".join(f"{share:.1%}" for share in r.get("pruned", []))
            yield (
                f"{r['what']} | {pruned} | {r['p50_ms']:,.1f} | {r['p99_ms']:,.1f} | {r['speedup']:.1f} "
                f"| {r['recall']:.3f}"
            )


def measured() -> str:
    """Return which benches were measured when, and on what."""
    environments = {path.stem: json.loads(path.read_text())["environment"] for path in sorted(RESULTS.glob("*.json"))}
    by_date: dict[str, list[str]] = {}
    for name, environment in environments.items():
        by_date.setdefault(environment["date"], []).append(f"`{name}`")
    dates = "; ".join(f"{date}: {', '.join(names)}" for date, names in sorted(by_date.items()))
    return f"Measured {dates}; {', '.join(sorted({e['cpu'] for e in environments.values()}))}"


def section() -> str:
    """Return the section of the README."""
    rates = dict.fromkeys(f"{r['system']} {r['scorer']} {r['learning_rate']}" for r in records_of("peers"))
    peer = records_of("peers")[0]
    large = records_of("prepare_scale")[0]
    largest = max((r for r in records_of("precision") if r["system"] == "format"), key=lambda r: r["entities"])
    tier, chain = records_of("runtime")[0], records_of("runtime")[-1]
    mrr = ", ".join(f"{share:.3f}" for share in chain["mrr"].values())
    scale, full, pair = (records_of(name)[-1] for name in ("skg_scale", "skg_run", "scaling"))
    sizes = "one, 1 core | 64 | times one | in 3 tables | one, 2 cores | 64 | times one | in 3 tables | 2 cores / 1"
    return "\n".join([
        f"{measured()}, 2 cores, no GPU; 640 units, batches of 1,024 positives with 64 negatives "
        "each, on FB15k-237. `python tools/bench/NAME.py` measures anew what `tools/bench/results/NAME.json` holds.",
        "",
        "**Training** (`training_step`): triples/s of the whole step, look-up and update included, of one model of "
        "640 units and of 64 sub-models (10, 20, ..., 640), and the time of a step of 64 over that of one, all by "
        "medians; the same with the table cut at 10 and 100, as tiers of those sizes cut it: three updates for each "
        "row, whatever is trained.",
        "",
        *table(f"scorer | negatives | {sizes}", training()),
        "",
        "Where a step of 64 sub-models spends its time, in ms on one core / on two: waiting for its batch, looking "
        "rows up, the loss (queries, positives, autograd), the fused kernel of the negatives, guards, updates. Batches "
        "are drawn by another thread meanwhile, on the same cores. The kernel gains most by a second core; "
        f"FBGEMM's look-up and update gain next to nothing, and the loss less than the kernel. {bandwidth()}",
        "",
        *table("scorer | negatives | " + " | ".join(records_of("training_step")[0]["shares"]), parts()),
        "",
        "**The negatives alone** (`prefix_scoring`): ms for scores, MED loss and gradients of 1,024 x 64 negatives, by "
        "the kernels and by plain torch, one core; and the bytes of rows that 64 sub-models move, beside what a copy "
        "moves.",
        "",
        *table("scorer | negatives | one | 64 | one, torch | 64, torch | GB/s of 64 | of a copy", scoring()),
        "",
        "The same beside torch.compile, in a run of its own (`prefix_scoring_compile`: `prefix_scoring.py --systems "
        "kernel torch.compile --sub-models 1 64 --threads 1`), on one core while the other did other work:",
        "",
        *table("scorer | negatives | one | 64 | one, compiled | 64, compiled", compiled()),
        "",
        f"**Beside PyKEEN** (`peers`), in the same run, {peer['threads']} core(s) while the other did "
        f"other work, {peer['seconds']:.0f} seconds "
        f"of training for each: triples/s, times PyKEEN's, and MRR on {peer['triples_ranked']:,} validation triples "
        "(filtered, both sides, realistic ranks for ties, all entities) at 10, 100 and 640 units; for each the best of "
        f"the learning rates tried ({', '.join(rates)}). This is early in training: what counts is where each has got "
        "in the same time.",
        "",
        *table("scorer | system | triples/s | times PyKEEN | MRR @10 | @100 | @640", peers()),
        "",
        "**Ranking** (`ranking`): the full test split, both sides, all entities, filtered; 2 cores, random tables.",
        "",
        *table("scorer | ranked | seconds | times one | MiB above the tables", ranking()),
        "",
        "**Softmax over shared candidates** (`softmax`): 1,024 queries x 4,352 candidates. A sample of 8 out of 64 has "
        "levels of 10 units, whose products of matrices are slow for their size, most of all where a unit is one "
        "column (DistMult).",
        "",
        *table("scorer | trained | ms, 1 core | times one | ms, 2 cores | times one", softmax()),
        "",
        f"**Preparing** (`prepare_scale`): {large['triples']:,} generated triples of {large['entities']:,} entities "
        f"with string names, {large['threads']} cores, `graph.memory_mib: {large['memory_mib']}`; seconds of the whole "
        "command, and the most memory that all processes held together, Ray's own included. The machine did other work "
        "at the same time.",
        "",
        *table("tasks | where | seconds | triples/s | MiB", preparing()),
        "",
        "**Reading** (`readers`): triples read, shuffled and handed to a worker that only takes them, 2 cores, warm "
        "files; memory of the readers (of the whole worker where it reads for itself).",
        "",
        *table("read by | triples | triples/s | MiB", reading()),
        "",
        f"**Size** (`skg_scale`): `jobs/skg.yaml` (TransE, tiers of 10, 100 and 500 units, steps of "
        f"{scale['batch']:,} triples with 64 negatives shared by chunks of 32) on generated graphs, {scale['threads']} "
        "cores, one worker: training alone, its cost per triple over the smallest graph's, peak memory and what it "
        "grew by, time of an epoch.",
        "",
        *table("entities | triples | triples/s | cost | GiB | MiB grown | s per epoch", growing()),
        "",
        f"**The full size, stage by stage** (`skg_run`): the same job on {full['entities']:,} entities and 50,759,689 "
        "triples, one worker. Editors and compilers were at work beside it, so training was slower than in the table "
        "above.",
        "",
        *table("stage | what | seconds | GiB", whole_run()),
        "",
        "**Cutting tiers** (`split`): `medscale export` of tables of 500 columns into tiers of 10, 100 and 500, 2 "
        "cores; seconds to verify the checkpoint, then to write all tiers and make them durable, MB/s of that, what "
        "the same disk took of plain bytes just after, and the most memory of the process, libraries included.",
        "",
        *table("rows | written | GB | s to verify | s to write | MB/s | of the disk | MiB", splitting()),
        "",
        f"**Workers** (`scaling`): the same job on {pair['entities']:,} entities, workers of one core each on one "
        "machine, over gloo: communication is the share of a step in collective calls, MiB sent by the worker that "
        "sends most and peak MiB of the larger worker are beside what `medscale plan` says. Two workers on one machine "
        "are slower than one: rows cross between processes, and every worker looks up rows that another looks up too. "
        "They are for tables that one machine cannot hold.",
        "",
        *table(
            "workers | batch | triples/s | times one | communication | MiB sent | planned | MiB | planned", workers()
        ),
        "",
        "**Precisions** (`precision`): MRR of every tier on the full test split (both sides, filtered, all entities) at"
        " float32, what is left of it at the others (* loses more than 1%), and the bytes of an entity's row (numbers, "
        "scales and norms, without its name). `fb15k237_short` is `fb15k237` as it was then (10, 25, 50, 100 "
        "and 200 units, a learning rate of 0.1), stopped after 6 epochs; `qs_transe` is TransE (L1) on the graph of "
        "`quickstart`.",
        "",
        *table(
            "job | tier, units | MRR | float16 | int8 | int4 | bytes, float32 | float16 | int8 | int4", precisions()
        ),
        "",
        f"**Formats** (`precision`): every tier of `{largest['job']}`, {largest['entities']:,} entities, float32, on "
        f"{largest['threads']} core while the machine did other work: MB of the format's own files (`onnx` reads the "
        "tables of `safetensors`), seconds to write what is written afterwards and to open it (`safetensors`: all files"
        " hashed), ms of a query for the ten best tails, and how many of them are the true ones.",
        "",
        *table("tier, units | format | MB | s to write | s to open | ms per query | recall@10", formats()),
        "",
        f"**Using a tier** (`runtime`): exact top-10 among {tier['rows']:,} rows, {tier['threads']} cores: ms of "
        "single queries (median, 99th percentile; medians of faiss `IndexFlat` and usearch exact search on the same "
        "rows), ms per query where 256 share a scan, look-ups by name, ms to open with and without reading every file.",
        "",
        *table(
            "scorer | precision | columns | p50 | p99 | faiss | usearch | in bulk | look-ups/s | open, verified | open",
            using(),
        ),
        "",
        f"**Cascades** (`runtime`): top-10 of a trained chain, tiers {chain['tier']} of `{chain['scorer']}` on a "
        f"generated graph of {chain['rows']:,} entities (`jobs/skg.yaml`, eight epochs; test MRR {mrr}, filtered, both "
        "sides, all entities, a sample): rows ruled out before each larger tier, ms of single queries, times faster "
        "than the largest tier alone, recall.",
        "",
        *table("asked | ruled out | p50 | p99 | times faster | recall@10", cascading()),
    ])  # fmt: skip


if __name__ == "__main__":
    write_section("speed_table.py", section())
