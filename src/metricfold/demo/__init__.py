"""A real training run to watch and to copy from: ``metricfold demo``.

Read `train` first: it is the loop. Around it stand the texts (`texts`), the order in which ranks
see them (`mixture`), the batches (`batches`), the network (`model`), the run's folder (`folder`),
the launcher (`launch`) and the final comparison with the data (`proof`).
"""
