"""Tier four: the benchmarks run as printed, with `--quick`, and calculate what they say."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from terminal import run

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"
# By benchmark, what its table must show.
EXPECTED = {
    "step": [
        "no exchange",
        "all-reduce",
        "fp16 hook",
        "bf16 hook",
        "PyTorch's hook",
        "PowerSGD full",
        "PowerSGD alternating",
        "PowerGossip",
    ],
    "gossip": ["whole models", "rank 2"],
    "probe": ["no exchange", "all-reduce", "bf16 hook", "PowerSGD full, rank 2", "loopback"],
    "never_slower": ["auto ÷ the better", "loopback"],
    "machines": [
        "no exchange",
        "hybrid sharding",
        "hybrid sharding, bf16",
        "DDP, bf16 hook",
        "sharded, PowerSGD, rank 2",
        "rank 2, hierarchical",
    ],
    "kernel": ["bf16 ms", "256x256", "200 small layers"],
    "memory": [
        "bf16 hook",
        "PyTorch's hook",
        "PowerSGD full",
        "PowerSGD alternating",
        "PowerSGD full, bfloat16 errors",
    ],
    "scale": [
        "all-reduce",
        "bf16 hook",
        "PyTorch's hook, rank 2",
        "PowerSGD full, rank 2",
        "PowerSGD alternating, rank 2",
        "(model)",
    ],
}


@pytest.fixture(autouse=True)
def _benchmarks_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("benchmarks")


@pytest.fixture(scope="module")
def printed(output_dir) -> dict[str, str]:
    """What each benchmark prints. Two at a time: they spend most of their seconds on importing, in one thread each."""

    def start(name: str) -> str:
        command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", f"--output-dir={output_dir}"]
        return run(command, output_dir)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(EXPECTED, pool.map(start, EXPECTED), strict=True))


@pytest.mark.parametrize("name", EXPECTED)
def test_a_benchmark_leaves_table_samples_and_plot(name, printed, output_dir):
    table = (output_dir / f"{name}.md").read_text()
    for row in EXPECTED[name]:
        assert row in printed[name]
        assert row in table
    assert f"`python examples/benchmarks/{name}.py --quick" in table
    assert torch.__version__ in table
    content = json.loads((output_dir / f"{name}.json").read_text())
    assert content["machine"]["torch"] == torch.__version__
    assert content["settings"]["quick"] is True
    assert (output_dir / f"{name}.png").stat().st_size > 10_000


def test_the_steps_are_counted_and_paired(printed, output_dir):
    exchanges = {
        exchange["name"]: exchange
        for exchange in json.loads((output_dir / "step.json").read_text())["links"]["loopback"]["exchanges"]
    }
    dense = exchanges["all-reduce"]["sent_bytes"]
    assert exchanges["no exchange"]["sent_bytes"] == 0
    assert exchanges["fp16 hook"]["sent_bytes"] == exchanges["bf16 hook"]["sent_bytes"] == dense / 2
    assert exchanges["bf16 hook"]["all_reduces"] == exchanges["all-reduce"]["all_reduces"]
    assert exchanges["PowerSGD alternating, rank 2"]["sent_bytes"] < exchanges["PowerSGD full, rank 2"]["sent_bytes"]
    assert exchanges["PowerSGD full, rank 2"]["sent_bytes"] == exchanges["PyTorch's hook, rank 2"]["sent_bytes"]
    assert exchanges["PowerSGD full, rank 2"]["all_reduces"] == 2
    assert exchanges["PowerSGD alternating, rank 2"]["all_reduces"] == 1
    # Over the one link of two ranks goes one of two factors.
    assert exchanges["PowerGossip, rank 2"]["sent_bytes"] == exchanges["PowerSGD alternating, rank 2"]["sent_bytes"]
    assert exchanges["PowerGossip, rank 2"]["all_reduces"] == 0
    assert all(len(exchange[kind]) == 3 for exchange in exchanges.values() for kind in ("seconds", "cpu_seconds"))
    assert all(min(exchange["cpu_seconds"]) > 0 for exchange in exchanges.values())
    assert exchanges["no exchange"]["ratio_to_no_exchange"] == {"median": 1, "low": 1, "high": 1}


def test_a_step_of_gossip_sends_whole_models_or_factors(printed, output_dir):
    from workloads import NETWORKS

    whole, factors = json.loads((output_dir / "gossip.json").read_text())["links"]["loopback"]
    assert whole["sent_bytes"] == [NETWORKS["tiny"].gradient_bytes] * 4
    assert len(factors["seconds"]) == 4
    assert sum(factors["sent_bytes"]) < sum(whole["sent_bytes"]) / 2


def test_the_forecast_of_a_step_adds_the_exchange(printed, output_dir):
    link = json.loads((output_dir / "probe.json").read_text())["links"]["loopback"]
    none, dense, bf16, ours = link["steps"]
    step = float(np.median(none["seconds"]))
    assert none["forecast_seconds"] is None
    # DDP has at most all of its all-reduce after the forward pass and before the end, and at least that of a bucket.
    assert step < dense["forecast_seconds"] <= step + link["answer"]["all_reduce_seconds"] * 1.001
    assert bf16["forecast_seconds"] > step
    assert ours["forecast_seconds"] == pytest.approx(step + link["answer"]["options"][0]["powersgd_seconds"])
    assert all(len(contestant["seconds"]) == 3 for contestant in link["steps"])


def test_memory_is_that_of_the_error_buffers(printed, output_dir):
    network = json.loads((output_dir / "memory.json").read_text())["networks"][0]
    usage = {exchange["name"]: exchange for exchange in network["exchanges"]}
    plain, full = usage["all-reduce"], usage["PowerSGD full, rank 2"]
    assert plain["held"] == network["gradient_bytes"]
    assert 0.9 < (full["held"] - plain["held"]) / network["gradient_bytes"] < 1.2
    assert full["peak"] < usage["PyTorch's hook, rank 2"]["peak"]


def test_ratios_are_paired_by_round():
    from common import paired_difference, paired_ratio, spread

    # The machine slows down, and the ratio stays.
    reference = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    assert spread(reference).median == 4
    assert (spread(reference).low, spread(reference).high) == (2, 8)
    ratio = paired_ratio(3 * reference, reference)
    assert (ratio.median, ratio.low, ratio.high) == (3, 3, 3)
    assert paired_difference(reference + 1, reference).median == 1
    with pytest.raises(ValueError, match="4 samples cannot be paired with 5"):
        paired_ratio(reference[1:], reference)


def test_numbers_are_readable():
    from common import format_bytes, format_number

    assert [format_number(value) for value in (0, 0.5, 0.9999, 9.999, 99.96, -1234.5)] == [
        "0",
        "0.50",
        "1.00",
        "10.0",
        "100",
        "-1,234",
    ]
    assert [format_bytes(value) for value in (0, 1500, 75_700_000, 2e9)] == ["0 B", "1.5 kB", "75.7 MB", "2 GB"]


def test_the_ring_model_finds_its_constants():
    from scale import RingModel, fit_ring

    truth = RingModel(alpha=3e-5, beta=1.2e8)
    samples = [(world, size, truth.seconds(world, size, 1)) for world in (2, 4) for size in (10**3, 10**5, 10**7)]
    found = fit_ring(samples)
    assert found.alpha == pytest.approx(truth.alpha)
    assert found.beta == pytest.approx(truth.beta)
    assert truth.seconds(1, 10**6, 2) == 0


def test_the_networks_have_their_sizes():
    from workloads import NETWORKS

    parameters = {name: network.gradient_bytes // 4 for name, network in NETWORKS.items()}
    assert 18e6 < parameters["transformer"] < 19e6
    assert 11.1e6 < parameters["resnet18"] < 11.2e6
    assert 25.5e6 < parameters["resnet50"] < 25.6e6
    assert 124e6 < parameters["gpt2"] < 125e6
    assert 1.0e9 < parameters["1b"] < 1.02e9
    network = NETWORKS["resnet18"]
    assert network.build(torch.device("cpu"))(network.draw(torch.device("cpu"), seed=0)).shape == (4, 10)


def test_the_networks_for_a_gpu_take_their_inputs():
    from workloads import LanguageModel, Network, resnet50

    cpu = torch.device("cpu")
    language = Network("small", lambda: LanguageModel(64, 1, vocabulary=11, context=8), (2, 5), vocabulary=11)
    model, tokens = language.build(cpu), language.draw(cpu, seed=0)
    assert model(tokens).shape == (2, 5, 11)
    # What comes later changes nothing.
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 11
    torch.testing.assert_close(model(changed)[:, :-1], model(tokens)[:, :-1])
    assert resnet50(7, running_statistics=False)(torch.zeros(2, 3, 64, 64)).shape == (2, 7)


def test_pretended_ranks_change_nothing():
    from processes import pretend_ranks

    with pretend_ranks(2):
        assert dist.get_world_size() == 2
        tensor = torch.ones(3)
        assert dist.all_reduce(tensor, async_op=True).get_future().wait()[0] is not None
        assert torch.equal(tensor, torch.ones(3))


def test_the_bf16_hook_averages_in_bfloat16_on_a_cpu():
    from kernel import Bucket
    from processes import pretend_ranks
    from workloads import bf16_hook

    bucket = Bucket(0, [torch.nn.Parameter(torch.empty(100))], last=True)
    gradient = torch.randn(100)
    bucket.buffer().copy_(gradient)
    with pretend_ranks(2):  # which send nothing: half of the gradient is left
        assert bf16_hook(None, bucket).wait() is bucket.buffer()
    assert torch.equal(bucket.buffer(), (gradient.bfloat16() / 2).float())


def test_on_a_gpu_a_pretended_rank_hands_all_reduces_to_a_group_of_its_own():
    from processes import _InstantGroup

    group = _InstantGroup(0, 2, dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=60)))
    tensor = torch.ones(3)
    group.allreduce([tensor], dist.AllreduceOptions()).wait()
    assert torch.equal(tensor, torch.ones(3))
    assert group.size() == 2


def test_a_step_is_looked_at_from_all_sides():
    from contestants import ALL_REDUCE, Contestant
    from probes import probe_step, timed_hooks
    from processes import pretend_ranks
    from workloads import NETWORKS

    device, network = torch.device("cpu"), NETWORKS["tiny"]
    found = {}
    with pretend_ranks(2):
        for contestant in (ALL_REDUCE, Contestant("PyTorch's hook, batched", 2), Contestant("full", 2)):
            with timed_hooks() as seconds:
                step = contestant.attach(network.build(device))
            batch = network.draw(device, seed=0)
            found[contestant.family] = probe_step(partial(step, batch), step.module, seconds, 7, device)
            assert all(parameter.grad is None for parameter in step.module.parameters())
    assert found["all-reduce"].host_seconds == 0  # DDP's own, without Python
    for family in ("PyTorch's hook, batched", "full"):
        assert found[family].host_seconds > 0
    for probe in found.values():
        assert probe.launches == 0
        assert probe.tail_seconds > 0
        assert probe.held_bytes == 7


def test_a_table_says_what_a_step_asked_of_a_gpu():
    import step
    from contestants import NO_EXCHANGE, Contestant, Measurement
    from probes import Probe

    full = Contestant("full", 2)
    measured = Measurement({NO_EXCHANGE: [1.0], full: [1.5], step.ALL_REDUCE: [2.0]})
    measured.cpu_seconds = measured.seconds
    measured.sent_bytes = dict.fromkeys(measured.seconds, 1e3)
    measured.collectives = dict.fromkeys(measured.seconds, 1)
    measured.failures[Contestant("bf16 hook")] = "out of memory"
    none, ours = Probe(100, 0.5), Probe(130, 0.75, 0.125, 0.25, 2 * 10**6, 3 * 10**6)
    measured.probes = {NO_EXCHANGE: none, full: ours, step.ALL_REDUCE: none}
    table = step.tabulate("loopback", measured, argparse.Namespace(model="tiny", world_size=1))
    assert table.columns[-6:] == ["launches", "hook ms", "device ms", "tail ms", "held", "peak"]
    assert table.rows[1][-6:] == ["30.0", "125", "250", "250", "2 MB", "3 MB"]
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert table.rows[3][2] == "failed"
    assert "one GPU" in table.title
    assert "no network" in table.note
    assert step.to_json(measured, 1)["exchanges"][1]["probe"]["launches"] == 130


def test_without_a_gpu_all_that_needs_one_is_skipped_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    said = run([sys.executable, str(BENCHMARKS / "gpu.py"), f"--output-dir={tmp_path}"], tmp_path)
    assert "tests: skipped" in said
    for name in ("step_gpt2", "step_resnet50", "step_1b", "memory_gpt2", "kernel"):
        assert f"- {name}: skipped: torch {torch.__version__}" in said
    assert {path.name for path in tmp_path.iterdir()} == {"summary.md", "tests.log"}
    assert (tmp_path / "summary.md").read_text().splitlines()[-1] in said
    log = (tmp_path / "tests.log").read_text()
    assert "test_one_rank.py" in log
    assert "needs a GPU" in log
    assert "passed" not in log


def test_a_job_leaves_its_table_and_log_however_it_ends(tmp_path):
    from gpu import Job, run

    writes = (
        "import pathlib, sys; p = pathlib.Path(sys.argv[1].split('=')[1]); p.mkdir(); (p / 'step.md').write_text('t')"
    )
    assert run(Job("step_tiny", ("-c", writes), 1, "step"), tmp_path, 60) == "done"
    assert {path.name for path in tmp_path.iterdir()} == {"step_tiny.log", "step_tiny.md"}
    assert run(Job("bad", ("-c", "raise SystemExit(3)"), 1), tmp_path, 60) == "failed with exit code 3"
    assert run(Job("endless", ("-c", "input()"), 1), tmp_path, 0) == "ended after 0.0 minutes"


@pytest.mark.parametrize(("driver", "environment"), [("", ".venv"), ("/dev/nvidia0", ".venv-gpu")])
def test_make_gpu_installs_cuda_only_where_there_is_a_driver(driver, environment):
    root = Path(__file__).parents[2]
    command = ["make", "--dry-run", "--always-make", "gpu", f"NVIDIA={driver}", "GPU_INDEX=https://an.index/cu126"]
    said = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    assert f"{environment}/bin/python examples/benchmarks/gpu.py" in said
    assert ("--index-url https://an.index/cu126" in said) == bool(driver)


def test_a_failing_rank_is_reported():
    from processes import RankError, run_ranks

    with pytest.raises(RankError, match=r"(?s)Rank \d failed:.*TypeError"):
        run_ranks(len, 1, world_size=2, device="cpu", on_progress=print)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("step", ["--device=cuda"], "torch finds no CUDA device"),
        ("step", ["--world-size=1"], "one rank exchanges nothing"),
        ("step", ["--ranks", "0"], "0 is not positive"),
        ("probe", ["--world-size=1"], "one rank exchanges nothing"),
        ("gossip", ["--world-size=1"], "one rank has no neighbours"),
        ("scale", ["--sizes", "100x2"], "not a multiple of 64"),
        ("scale", ["--world-sizes", "1"], "Add 2"),
    ],
)
def test_what_cannot_be_is_refused_early(name, options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    with pytest.raises(SystemExit) as left:
        importlib.import_module(name).main()
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_a_link_that_cannot_be_had_is_skipped_or_ends_the_run(tmp_path, monkeypatch):
    import network
    import step

    def refuse():
        raise network.NetworkError("It takes the program `tc`.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(network, "_require_tools", refuse)
    monkeypatch.setattr(sys, "argv", ["step.py", "--quick", "--link", "1gbit", "100mbit"])
    with pytest.raises(SystemExit, match=r"(?s)No link could be measured.*1gbit.*100mbit.*the program `tc`"):
        step.main()


def test_without_tools_or_privileges_an_emulated_link_says_what_it_needs(monkeypatch):
    import network

    monkeypatch.setattr(shutil, "which", lambda tool, path: None)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with (
        pytest.raises(network.NetworkError, match=r"needs ip and tc and root's privileges.*iproute2.*CAP_NET_ADMIN"),
        network.emulated_network(2),
    ):
        pass


def test_namespaces_go_away_when_making_them_fails(monkeypatch):
    import network

    commands: list[tuple[str, ...]] = []

    def refuse_veth(command, **kwargs):
        commands.append(command)
        refused = "veth" in command
        return subprocess.CompletedProcess(command, int(refused), "", "Operation not permitted" if refused else "")

    monkeypatch.setattr(network, "_require_tools", lambda: None)
    monkeypatch.setattr(subprocess, "run", refuse_veth)
    with (
        pytest.raises(network.NetworkError, match=r"type veth.*failed: Operation not permitted"),
        network.emulated_network(2),
    ):
        pass
    prefix = f"powersgd-{os.getpid()}"
    assert commands[-3:] == [("ip", "netns", "delete", f"{prefix}-{end}") for end in ("0", "1", "switch")]


def measure_rate(rank) -> float:
    rank.limit_link()
    size = 2**22
    return size * 8e-6 / float(np.median(rank.all_reduce_seconds(size, repeats=3)))


def test_an_emulated_link_has_its_rate(namespaces):
    from processes import run_ranks

    rates = run_ranks(measure_rate, world_size=2, device="cpu", on_progress=print, namespaces=namespaces, megabits=200)
    assert all(140 < rate < 220 for rate in rates)
