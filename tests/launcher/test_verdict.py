"""Which nodes are called bad, and which are not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from meditron_train.launcher.node_check import NodeFacts, Problem, ProblemKind
from meditron_train.launcher.verdict import bad_nodes, problems_of_the_run

NODES = ("a", "b", "c", "d")
GPU_NODE = NodeFacts(
    node="",
    num_gpus=8,
    gpu="H100",
    matmul_tflops=600.0,
    local_bandwidth_gb_s=400.0,
    versions={"torch": "2.13"},
)


def facts(**changed: dict) -> dict[str, NodeFacts]:
    return {node: replace(GPU_NODE, node=node, **changed.get(node, {})) for node in NODES}


def verdict(known: dict[str, NodeFacts], pairs=None, skew=None) -> dict[str, str]:
    return bad_nodes(NODES, known, pairs or dict.fromkeys(NODES, 40.0), skew or dict.fromkeys(NODES, 0.001))


def test_healthy_nodes_that_differ_a_little():
    known = facts(b={"matmul_tflops": 520.0}, c={"local_bandwidth_gb_s": 350.0})
    assert verdict(known, pairs={"a": 40.0, "b": 33.0, "c": 41.0, "d": 39.0}) == {}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"problems": (Problem(ProblemKind.GPU, "GPU 3: too hot"),)}, "GPU 3: too hot"),
        ({"file_problems": (Problem(ProblemKind.MISSING_FILE, "missing corpus.bin"),)}, "missing corpus.bin"),
        ({"versions": {"torch": "2.12"}}, "torch is 2.12, elsewhere 2.13"),
        ({"versions": {}}, "torch is missing, elsewhere 2.13"),
        ({"num_gpus": 7}, "7 GPUs (H100), elsewhere 8 (H100)"),
        ({"matmul_tflops": 300.0}, "matrix products at 300.0 TFLOP/s, elsewhere 600.0"),
        ({"local_bandwidth_gb_s": 100.0}, "all-reduce over its GPUs at 100.0 GB/s, elsewhere 400.0"),
    ],
)
def test_one_bad_node_is_named_with_its_reason(change, said):
    assert verdict(facts(c=change)) == {"c": said}


def test_a_node_that_does_not_answer():
    known = facts()
    del known["d"]
    assert verdict(known) == {"d": "no answer"}


def test_where_nobody_reaches_the_first_node_it_is_not_all_the_others():
    known = {"a": facts()["a"]}
    assert verdict(known) == {"a": "no other node reaches it"}
    assert bad_nodes(("a", "b"), known, {}, {}) == {"b": "no answer"}  # of two, nobody can say


FULL = Problem(ProblemKind.DISK_SPACE, "less than 5 GiB of disk are free at /runs")
SICK = Problem(ProblemKind.GPU, "GPU 3: too hot", "3 heat")
SHM, LESS_SHM = (
    Problem(ProblemKind.SHARED_MEMORY, f"{n} MiB of /dev/shm are free, 64 are needed") for n in (12, 11)
)


@pytest.mark.parametrize(
    ("by_node", "expected"),
    [
        ({"a": ((), (FULL,)), "b": ((SICK,), (FULL,)), "c": ((), (FULL,))}, [FULL]),
        ({"a": ((SICK,), ()), "b": ((SICK,), ())}, [SICK]),
        ({"a": ((), (FULL,)), "b": ((), ())}, []),
        ({"a": ((SICK,), (FULL,))}, [FULL]),  # alone: its GPU may be its own fault, the run's disk is not
        ({"a": ((), ()), "b": ((), ())}, []),
        ({"a": ((SHM,), ()), "b": ((LESS_SHM,), ())}, [SHM]),  # the same in other words
        (
            {"a": ((SICK,), ()), "b": ((replace(SICK, subject="4 heat"),), ())},
            [],
        ),  # the words alone are the same
    ],
)
def test_what_all_nodes_report_is_the_runs(by_node, expected):
    known = {
        node: replace(GPU_NODE, node=node, problems=problems, file_problems=file_problems)
        for node, (problems, file_problems) in by_node.items()
    }
    assert problems_of_the_run(known) == expected


def test_a_slow_link_and_a_wrong_clock():
    assert verdict(facts(), pairs={"a": 40.0, "b": 40.0, "c": 15.0, "d": 40.0}) == {
        "c": "network at 15.0 GB/s, elsewhere 40.0"
    }
    assert verdict(facts(), skew={"a": 0.0, "b": -7.5, "c": 0.0, "d": 0.0}) == {
        "b": "its clock is -7.5 s off"
    }


def test_of_two_nodes_neither_is_called_slow():
    known = {node: value for node, value in facts(b={"matmul_tflops": 100.0}).items() if node in "ab"}
    assert bad_nodes(("a", "b"), known, {}, {}) == {}


def test_cpus_are_not_judged_by_speed():
    known = {
        node: replace(value, num_gpus=0, gpu=None, matmul_tflops=0.01 if node == "a" else 1.0)
        for node, value in facts().items()
    }
    assert verdict(known, pairs={"a": 0.1, "b": 1.0, "c": 1.0, "d": 1.0}) == {}
