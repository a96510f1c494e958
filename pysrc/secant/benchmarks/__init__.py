"""Measurements of the kernels against the best that a user could have without them; used by the demo, bench and CI.

`case` has the shapes: Case, Contender, Row, Bar. `families` are the cases, a file each, with their peers and bars.
`measure` checks and times them in turns (`timing`), `report` makes tables and JSON of the rows, `plot` and `roofline`
pictures; `machine` says on what. `peers` are directions without this library, `optimizers` and `digits` whole runs.
Runs on mini-batches: `training_tasks` has what is trained, `training_optimizers` by whom and at which rates,
`training_runs` a run and the file that keeps them.
"""
