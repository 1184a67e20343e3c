"""Fast twins of the plain scores: what every sub-model costs is read and computed once.

`cpu_pairs` and `cpu_ranks` run on CPUs, in C++ (`cpp/`) that `library` compiles at first use for the machine it runs
on; `triton_scores` and `triton_ranks` on GPUs. Functions of the same name take the same arguments. Their plain twin
is `prefix.PrefixScan`, in torch: tests compare them with it, and `runtime.kernels: torch` runs it instead. The
losses that belong to them lie in `medscale.loss`: `cpu_positives`, `cpu_corruptions`, `cpu_softmax`,
`triton_corruptions`.
"""
