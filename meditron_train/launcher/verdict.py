"""What is wrong, and with whom: a node by its own facts and by how it compares with the others, or the whole run."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from meditron_train.launcher.node_check import NodeFacts, Problem

# Shares of the median below which a GPU node is bad. A healthy node stays within a few percent; a throttled GPU or a
# cable that fell back to half its lanes does not. CPUs are shared with others and are never judged by speed.
_LEAST_MATMUL_SHARE = 0.7
_LEAST_LINK_SHARE = 0.5
_LEAST_NODES_FOR_SPEED = 3  # of two, there is no telling which is at fault
_MOST_CLOCK_SKEW_S = 2.0


def problems_of_the_run(facts: Mapping[str, NodeFacts]) -> list[Problem]:
    """Problems that all nodes report, as the first one tells them: leaving nodes out would not help.

    Where one node alone has answered, they are what it sees of the run's files; the rest may well be its own.
    """
    if len(facts) == 1:
        return [problem for known in facts.values() for problem in known.file_problems]
    first, *others = facts.values()
    return [
        problem
        for problem in first.all_problems
        if all(any(map(problem.is_like, other.all_problems)) for other in others)
    ]


def bad_nodes(
    nodes: Sequence[str],
    facts: Mapping[str, NodeFacts],
    pair_gb_s: Mapping[str, float],
    clock_skew_s: Mapping[str, float],
) -> dict[str, str]:
    """Node → what is wrong with it, for every node that should not train.

    Args:
        nodes: all nodes of the job; facts: those that answered.
        pair_gb_s, clock_skew_s: what was measured between them, where it was.
    """
    found: dict[str, list[str]] = {node: [] for node in nodes}
    for node in nodes:
        found[node] += [one.text for one in facts[node].all_problems] if node in facts else ["no answer"]
    answered = [node for node in nodes if node in facts]
    if (
        len(answered) == 1 and len(nodes) > 2
    ):  # the one that collects the answers: rather that one than all others
        return {answered[0]: "; ".join((*found[answered[0]], "no other node reaches it"))}
    _compare_versions(answered, facts, found)
    _compare_gpus(answered, facts, found)
    gpu_nodes = [node for node in answered if facts[node].num_gpus]
    matmul = {node: speed for node in gpu_nodes if (speed := facts[node].matmul_tflops) is not None}
    _compare_speed(matmul, _LEAST_MATMUL_SHARE, "matrix products at", "TFLOP/s", found)
    local = {node: speed for node in gpu_nodes if (speed := facts[node].local_bandwidth_gb_s) is not None}
    _compare_speed(local, _LEAST_LINK_SHARE, "all-reduce over its GPUs at", "GB/s", found)
    links = {node: speed for node, speed in pair_gb_s.items() if node in gpu_nodes}
    _compare_speed(links, _LEAST_LINK_SHARE, "network at", "GB/s", found)
    for node, skew in clock_skew_s.items():
        if abs(skew) > _MOST_CLOCK_SKEW_S:
            found[node].append(f"its clock is {skew:+.1f} s off")
    return {node: "; ".join(problems) for node, problems in found.items() if problems}


def _compare_versions(
    answered: Sequence[str], facts: Mapping[str, NodeFacts], found: dict[str, list[str]]
) -> None:
    """Other software than on most nodes (with as many on each side: than on the first node)."""
    names = sorted({name for node in answered for name in facts[node].versions})
    for name in names:
        values = {node: facts[node].versions.get(name, "missing") for node in answered}
        usual, _ = Counter(values.values()).most_common(1)[0]
        for node, value in values.items():
            if value != usual:
                found[node].append(f"{name} is {value}, elsewhere {usual}")


def _compare_gpus(
    answered: Sequence[str], facts: Mapping[str, NodeFacts], found: dict[str, list[str]]
) -> None:
    counts = {node: (facts[node].num_gpus, facts[node].gpu) for node in answered}
    if not counts:
        return
    usual, _ = Counter(counts.values()).most_common(1)[0]
    for node, (number, name) in counts.items():
        if (number, name) != usual:
            found[node].append(f"{number} GPUs ({name}), elsewhere {usual[0]} ({usual[1]})")


def _compare_speed(
    speeds: Mapping[str, float], least_share: float, what: str, unit: str, found: dict[str, list[str]]
) -> None:
    if len(speeds) < _LEAST_NODES_FOR_SPEED:
        return
    usual = statistics.median(speeds.values())
    for node, speed in speeds.items():
        if speed < least_share * usual:
            found[node].append(f"{what} {speed:.1f} {unit}, elsewhere {usual:.1f}")
