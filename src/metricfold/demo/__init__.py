"""A real training run to watch and to copy from: ``metricfold demo``.

Read `train` first: it is the loop, and `jax.train` is the same for JAX. Around them stand the texts
(`texts`), the order in which they are seen (`mixture`), the samples with their metrics and the
batches (`batches`), the network (`model`), the run's folder (`folder`), the launcher (`launch`), and
the final comparison with the data (`proof`).
"""
