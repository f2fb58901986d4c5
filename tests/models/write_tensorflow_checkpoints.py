"""Writes the checkpoints of `original_checkpoints` by TensorFlow itself, which the suite does not need.

    python tests/models/write_tensorflow_checkpoints.py FOLDER [KIND ...]

In an environment of its own, with `tensorflow-cpu` and `numpy` in it.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import original_checkpoints as original
import tensorflow as tf

v1 = tf.compat.v1


def _partitioned(name: str, array: np.ndarray, parts: int, axis: int) -> None:
    """A variable in parts, as training on parameter servers has them."""

    def part(shape: list[int], dtype: object = None, partition_info: object = None) -> object:
        offsets = partition_info.var_offset
        return tf.constant(array[tuple(slice(a, a + n) for a, n in zip(offsets, shape, strict=True))])

    cut = v1.fixed_size_partitioner(parts, axis)
    v1.get_variable(name, array.shape, tf.float32, part, partitioner=cut, use_resource=False)


def write(kind: str, folder: Path) -> None:
    """Writes one kind of checkpoint: every shard holds the variables of a device, as in training on several."""
    shards = original.SHARDS.get(kind, 1)
    with tf.Graph().as_default():
        for place, (name, array) in enumerate(original.values(kind).items()):
            with tf.device(f"/cpu:{place % shards}"):
                cut = original.parts(kind, name)
                if cut is None:
                    v1.get_variable(name, initializer=array, use_resource=False)
                else:
                    _partitioned(name, array, *cut)
                if kind in original.WITH_OPTIMISER:
                    for slot in ("adam_m", "adam_v"):
                        zeros = tf.zeros_initializer()
                        v1.get_variable(f"{name}/{slot}", array.shape, initializer=zeros, trainable=False)
        v1.train.get_or_create_global_step()
        with v1.Session(config=v1.ConfigProto(device_count={"CPU": shards})) as session:
            session.run(v1.global_variables_initializer())
            saver = v1.train.Saver(sharded=shards > 1)
            folder.mkdir(parents=True, exist_ok=True)
            saver.save(session, str(folder / original.PREFIXES[kind]), write_meta_graph=False, write_state=False)


if __name__ == "__main__":
    for kind in sys.argv[2:] or original.CONFIGS:
        write(kind, Path(sys.argv[1]) / kind)
