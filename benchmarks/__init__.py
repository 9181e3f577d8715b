"""What metricfold costs: every module that `python -m benchmarks` takes by name measures one subject.

imports, update, samples, log, axes, sketches    what our own code costs
waits, watch, on_jax                             metrics on devices, and inside of a model
peers                                            the same logs through other libraries
scale                                            more ranks than a machine has

Each has `measure(quick)`, which returns sections of the table. The rest serves them: `table` prints,
`timing` lets contenders take turns, `ranks` starts worlds (for the tests too), `workloads` says what
there is to log and `contenders` log it. Names that begin with no underscore are for other modules.
"""
