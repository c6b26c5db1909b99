"""Tier four: the examples run as printed, in a small setting."""

from __future__ import annotations

import gzip
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from terminal import run

EXAMPLES = Path(__file__).parents[1] / "examples"


def write_idx(path: Path, values: np.ndarray) -> None:
    content = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def idx_dir(tmp_path):
    """A data set in MNIST's format, some of it gzipped: one class is bright above, the other below."""
    folder = tmp_path / "idx"
    folder.mkdir()
    for part, ending, samples in (("train", ".gz", 200), ("t10k", "", 80)):
        labels = np.arange(samples, dtype=np.uint8) % 2
        images = np.zeros((samples, 28, 28), dtype=np.uint8)
        images[labels == 0, :14] = images[labels == 1, 14:] = 255
        write_idx(folder / f"{part}-images-idx3-ubyte{ending}", images)
        write_idx(folder / f"{part}-labels-idx1-ubyte{ending}", labels)
    return folder


def test_the_comparison_of_make_demo(tmp_path, idx_dir):
    command = [sys.executable, str(EXAMPLES / "compare.py"), "--epochs=2", f"--idx-dir={idx_dir}"]
    printed = run([*command, f"--output-dir={tmp_path}"], tmp_path)
    rows = {line.split("│")[1].strip(): line for line in printed.splitlines() if line.startswith("│")}
    assert {"DDP", "PowerSGD, rank 2"} <= set(rows)
    assert "1×" in rows["DDP"]
    assert (tmp_path / "comparison.png").stat().st_size > 10_000


def test_the_yaml_file(tmp_path):
    command = [sys.executable, str(EXAMPLES / "image_classification.py"), "fit"]
    options = ["--config", str(EXAMPLES / "image_classification.yaml"), "--trainer.fast_dev_run=true"]
    assert "PowerSGD compresses" in run([*command, *options], tmp_path)


def test_what_is_not_a_data_set_is_refused_by_name(tmp_path, idx_dir, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from image_classification import load_idx, read_idx

    train, val, test = load_idx(idx_dir)
    assert (len(train), len(val), len(test)) == (180, 20, 80)
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte\.gz.*dataset-fashion-mnist"):
        load_idx(tmp_path)
    for name, content in (("empty", b""), ("text", b"no idx file"), ("short", b"\0\0\x08\x01\0\0\0\x09")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="is not an idx file of bytes, or it is incomplete"):
            read_idx(tmp_path / name)
    (tmp_path / "damaged.gz").write_bytes(gzip.compress(bytes(range(256)))[:50])
    with pytest.raises(ValueError, match="is not a gzip file, or it is damaged"):
        read_idx(tmp_path / "damaged")
