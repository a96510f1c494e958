"""Measurements of the kernels against the best that a user could have without them; used by the demo, bench and CI.

`timing` takes the times, `machine` says on what, `peers` are the alternatives, `lbfgs` the cases and their checks,
`optimizers` and `digits` whole runs, `report` the tables and bars, `plot` the pictures. `blocks` and `blocks_report`
are the cases, peers, tables and bars of the small blocks.
"""
