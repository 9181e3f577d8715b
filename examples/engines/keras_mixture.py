"""Keras 3, on any backend: the loss of each dataset, totals, evaluations, and a restart from its backup.

KERAS_BACKEND=torch python examples/engines/keras_mixture.py [folder]
KERAS_BACKEND=jax python examples/engines/keras_mixture.py [folder]
"""

import json
import sys
from pathlib import Path

import keras
import mixture
import numpy as np
from keras import ops
from mixture import EVERY, NAMES, PAD

from metricfold import JSONLSink, MetricsAggregator, MetricsLogger

LONGEST, EPOCHS = 40, 2


class DatasetLosses(keras.metrics.Metric):
    """Sums for each dataset, where the model computes; saved and loaded with its weights."""

    def __init__(self, datasets):
        super().__init__(name="dataset_losses")
        self.datasets, self.aggregator = datasets, MetricsAggregator()
        self.into = self.aggregator  # or that of the evaluation under way
        self.sums = self.add_variable((3, len(datasets)), initializer="zeros", name="sums")

    def update_state(self, losses, weights, dataset_ids):
        each = [ops.sum(losses * weights, 1), ops.sum(weights, 1), ops.ones_like(weights[:, 0])]
        of_datasets = ops.one_hot(dataset_ids, len(self.datasets))
        self.sums.assign_add(ops.matmul(ops.stack(each), of_datasets))

    def drain(self):
        """Hand over what has come in; one transfer."""
        sums = ops.convert_to_numpy(self.sums).astype(np.float64)
        self.sums.assign(np.zeros(self.sums.shape))
        for name, loss, tokens, samples in zip(self.datasets, *sums, strict=True):
            if samples:
                self.into.record("loss", loss / tokens, weight=tokens, dataset=name)
                self.into.record_all(
                    {"tokens_seen": tokens, "samples_seen": samples}, agg="sum", dataset=name
                )

    def reset_state(self):
        """Do nothing: Keras does it at each epoch, and drain() at each log."""

    def result(self):
        return {}  # nothing for Keras' own logs, which have the mean over batches

    def save_own_variables(self, store):
        self.drain()
        state = json.dumps(self.aggregator.state_dict())  # on every process
        store["metricfold"] = np.frombuffer(state.encode(), np.uint8)

    def load_own_variables(self, store):
        if "metricfold" in store:  # not in weights of a model without this metric
            self.aggregator.load_state_dict(json.loads(np.array(store["metricfold"]).tobytes()))


class MetricfoldCallback(keras.callbacks.Callback):
    """Logs every so many steps, and each evaluation by itself."""

    def __init__(self, logger, losses, every):
        super().__init__()
        self.logger, self.losses, self.every, self.step = logger, losses, every, 0
        self.evaluation = MetricsAggregator(name="evaluation")

    def on_train_begin(self, logs=None):  # after BackupAndRestore has loaded
        self.step = int(self.model.optimizer.iterations)
        self.logger.rewind(self.step)

    def on_train_batch_begin(self, batch, logs=None):
        self.first = batch

    def on_train_batch_end(self, batch, logs=None):
        before, self.step = self.step, self.step + batch - self.first + 1  # steps_per_execution
        if self.step // self.every > before // self.every:
            _ = self.model  # with JAX, brings the variables of the step under way
            self.losses.drain()
            self.logger.log(self.step, self.losses.aggregator, prefix="train")

    def on_test_begin(self, logs=None):
        self.losses.drain()
        self.evaluation.reset()
        self.losses.into = self.evaluation
        self.pause = self.losses.aggregator.pause()
        self.pause.__enter__()

    def on_test_end(self, logs=None):
        self.losses.drain()
        self.losses.into = self.losses.aggregator
        self.pause.__exit__(None, None, None)
        self.logger.log(self.step, self.evaluation, prefix="val")


class Model(keras.Model):
    def __init__(self):
        super().__init__()
        keras.utils.set_random_seed(0)
        self.embedding = keras.layers.Embedding(32, 16)
        self.head = keras.layers.Dense(32)
        self.losses_of = DatasetLosses(NAMES)

    def call(self, inputs):
        return self.head(self.embedding(inputs["tokens"]))

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        losses = keras.losses.sparse_categorical_crossentropy(y, y_pred, from_logits=True)
        self.losses_of.update_state(losses, sample_weight, x["dataset"])
        return super().compute_metrics(x, y, y_pred, sample_weight)


class Batches(keras.utils.PyDataset):
    """The same steps in each epoch; samples are padded to one length, and padding has weight 0."""

    def __init__(self, first):
        super().__init__()
        self.first = first

    def __len__(self):
        return EVERY

    def __getitem__(self, place):
        batch = mixture.batch_of(self.first + place, rank=1)
        missing = ((0, 0), (0, LONGEST - batch["labels"].shape[1]))
        labels = np.pad(batch["labels"].numpy(), missing, constant_values=PAD)
        tokens = np.pad(batch["inputs"].numpy(), missing)
        x = {"tokens": tokens, "dataset": batch["dataset"].numpy()}
        return x, np.maximum(labels, 0), (labels != PAD).astype("float32")


def train(folder, epochs):
    model = Model()
    model.compile(
        optimizer=keras.optimizers.SGD(0.5),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model(Batches(1)[0][0])  # builds it, for BackupAndRestore
    with MetricsLogger([JSONLSink(folder / "log.jsonl")]) as logger:
        callbacks = [
            keras.callbacks.BackupAndRestore(folder / "backup", delete_checkpoint=False),
            MetricfoldCallback(logger, model.losses_of, every=EVERY),
        ]
        history = model.fit(
            Batches(1), validation_data=Batches(5), epochs=epochs, callbacks=callbacks, verbose=0
        )
    return model, history.history


def truth_of(model):
    """Return what the batches of the evaluation say, each token taken once."""
    losses = {name: [] for name in ("all", *NAMES)}
    for x, labels, weights in (Batches(5)[place] for place in range(EVERY)):
        scores = ops.convert_to_numpy(model(x)).astype(np.float64)
        logs = (
            np.log(np.exp(scores).sum(-1))
            - np.take_along_axis(scores, labels[..., None], 2)[..., 0]
        )
        for of_sample, counts, place in zip(logs, weights > 0, x["dataset"], strict=True):
            for name in ("all", NAMES[place]):
                losses[name] += [of_sample[counts]]
    return {f"{name}/loss": np.concatenate(of).mean().item() for name, of in losses.items()} | {
        f"{name}/{key}": total
        for name, of in losses.items()
        for key, total in (("samples_seen", len(of)), ("tokens_seen", sum(map(len, of))))
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/keras")
    train(folder, epochs=1)
    model, history = train(folder, epochs=EPOCHS)  # as another process would go on
    truth = truth_of(model)
    ours = mixture.last_logged(folder / "log.jsonl", truth, prefix="val")
    print(mixture.table({"all/loss": history["val_loss"][-1]}, ours, truth))
