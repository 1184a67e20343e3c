"""Fast twins of the plain scores: what every sub-model costs is read and computed once.

`scores` and `ranks` run on CPUs, compiled at first use for the machine they run on; `triton_scores` and
`triton_ranks` on GPUs. Both take the same arguments. `prefix.PrefixScan` is the plain twin in torch that tests
compare them with, and what runs where no kernel applies.
"""
