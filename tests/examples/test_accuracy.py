"""Tier four: the accuracy study runs as printed, in a small setting, and its arithmetic is right."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from terminal import run

ACCURACY = Path(__file__).parents[2] / "examples" / "accuracy"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_study_and_its_report(tmp_path):
    (tmp_path / "words.txt").write_text("what was not sent is added in the next step. " * 2000)
    study = [*TORCHRUN, str(ACCURACY / "study.py"), "text", f"--data-dir={tmp_path}", f"--results={tmp_path}"]
    small = ["--steps=3", "--seeds", "5", "--accelerator=cpu", "--precision=32-true"]
    run([*study, *small, "--variants", "DDP", "rank 2, first tenth exact"], tmp_path)
    ddp, powersgd = lines(tmp_path / "text.jsonl")
    assert (ddp["variant"], powersgd["variant"], ddp["seed"]) == ("DDP", "rank 2, first tenth exact", 5)
    assert ddp["bytes_per_step"] == ddp["dense_bytes"] == powersgd["dense_bytes"]
    assert powersgd["bytes_per_step"] < ddp["bytes_per_step"] / 90
    assert 0 < ddp["bits_per_byte"] < 9

    # What was run already is not run again.
    run([*study, *small, "--variants", "DDP", "rank 4"], tmp_path)
    assert [line["variant"] for line in lines(tmp_path / "text.jsonl")[2:]] == ["rank 4"]

    printed = run([sys.executable, str(ACCURACY / "report.py"), f"--results={tmp_path}"], tmp_path)
    assert "rank 2, first tenth exact" in printed
    assert (tmp_path / "text.md").read_text().startswith("## Transformer on English text")
    assert (tmp_path / "accuracy.png").stat().st_size > 10_000


def test_a_wrong_call_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ACCURACY))
    import report
    import study

    def refused(program: ModuleType, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *arguments])
        with pytest.raises(SystemExit) as left:
            program.main()
        assert left.value.code not in (0, None)
        return f"{left.value.code} {capsys.readouterr().err}"

    call = ["text", f"--data-dir={tmp_path}"]
    assert "torchrun --standalone" in refused(study, *call)
    assert "'rank 3' is none of DDP, rank 1" in refused(study, *call, "--variants", "rank 3")
    other = {"variant": "DDP", "seed": 0, "bits_per_byte": 2.0, "bytes_per_step": 9, "steps": 3, "ranks": 2}
    mixed = [{"precision": "32-true", **other, "steps": steps} for steps in (3, 4)]
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in mixed))
    assert "runs that differ in 'steps'" in refused(report, f"--results={tmp_path / 'mixed'}")
    assert "no run of plain DDP" in refused(report, f"--results={tmp_path}")


def test_the_table_compares_runs_with_the_same_seed_and_precision(monkeypatch):
    monkeypatch.syspath_prepend(str(ACCURACY))
    from report import comparable, tabulate
    from tasks import TASKS

    about = {
        "steps": 9,
        "ranks": 2,
        "precision": "32",
        "cpu": "",
        "cores": 2,
        "python": "3",
        "torch": "2",
        "commit": "c",
    }
    values = {("DDP", 0): 90.0, ("DDP", 1): 92.0, ("rank 1", 0): 89.0, ("rank 1", 1): 91.5, ("rank 1", 2): 50.0}
    values |= {("rank 2", 0): None}
    sent = {"DDP": 1e6, "rank 1": 5e3, "rank 2": 1e4}
    keys = ("variant", "seed", "accuracy", "bytes_per_step", "steps", "ranks")
    runs = [
        {**about, **dict(zip(keys, (variant, seed, value, sent[variant], 9, 2), strict=True))}
        for (variant, seed), value in values.items()
    ]
    runs.append({**runs[2], "precision": "16", "accuracy": 10.0})
    table = tabulate("images", TASKS["images"], comparable(runs))
    assert "--seeds 0 1`" in table.note
    assert "precision: 32, commit: c." in table.note
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["DDP"] == ["1 MB", "", "91.00 ± 1.41", "", "2"]
    # The third seed has no run of plain DDP to be compared with, nor has the other precision.
    assert rows["rank 1"] == ["5 kB", "99.5 %", "90.25 ± 1.77", "-0.75 ± 0.25", "2"]
    assert rows["rank 2"] == ["10 kB", "99.0 %", "diverged", "", "1"]
