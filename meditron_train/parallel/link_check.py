"""Do the nodes reach each other, and how fast? One process per node; no training, no model.

The first node keeps a table (TCPStore) that all others write to. A node that does not answer in time is left out; the
rest goes on without it, so that one bad node cannot hang the check.
"""

from __future__ import annotations

import json
import socket
import statistics
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Links:
    """What the nodes measured together, by rank of the node; empty where it was not measured.

    Attributes:
        bandwidth_gb_s: all-reduce over all nodes, bus bandwidth in GB/s (2(n-1)/n · bytes/s, as nccl-tests counts).
        best_pair_gb_s: of each node, the faster of its exchanges with two different neighbors.
        clock_skew_s: of each node, its clock minus the median clock.
        failure: why the measurement ended early, or None.
    """

    bandwidth_gb_s: float | None
    best_pair_gb_s: dict[int, float]
    clock_skew_s: dict[int, float]
    failure: str | None = None


def exchange_facts(
    rank: int, world_size: int, address: str, port: int, facts: dict[str, Any], *, fit: bool, timeout_s: float
) -> tuple[Any, dict[int, dict[str, Any]], list[int]]:
    """Exchange the facts of all ranks through rank 0.

    Args:
        rank, world_size: place of this process.
        address, port: where rank 0 keeps the table.
        facts: JSON-ready, of this rank.
        fit: whether this rank can go on.
        timeout_s: on rank 0, how long it waits for all the others together; on these, how long they wait for
            rank 0.

    Returns:
        (store, facts by rank on rank 0, ranks that go on to `measure_links`).

    Raises:
        RuntimeError: the first node, which keeps the table, cannot be reached (torch's own message).
    """
    deadline = time.monotonic() + timeout_s
    if rank != 0:
        _wait_for_server(address, port, deadline)
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address,
        port,
        None,
        rank == 0,
        timedelta(seconds=max(1.0, deadline - time.monotonic())),
        wait_for_workers=False,
    )
    store.set(f"facts/{rank}", json.dumps({"fit": fit, "facts": facts}))
    if rank != 0:
        return store, {}, json.loads(store.get("members"))
    answers: dict[int, dict[str, Any]] = {}
    for other in range(world_size):
        try:
            left = max(0.01, deadline - time.monotonic())
            store.wait([f"facts/{other}"], timedelta(seconds=left))
            answers[other] = json.loads(store.get(f"facts/{other}"))
        except RuntimeError:  # torch's DistStoreError: no answer
            continue
    members = [other for other in answers if answers[other]["fit"]]
    store.set("members", json.dumps(members))
    return store, {other: answer["facts"] for other, answer in answers.items()}, members


def _wait_for_server(address: str, port: int, deadline: float) -> None:
    """torch itself tries again at intervals that double, so it would come late to a first node that is late."""
    while True:
        left = max(0.1, deadline - time.monotonic())
        try:
            socket.create_connection((address, port), timeout=left).close()
            return
        except OSError as error:
            if time.monotonic() + 0.5 > deadline:
                raise RuntimeError(f"{address}:{port}: {error}") from None
        time.sleep(0.5)


def measure_links(store: Any, rank: int, members: list[int], *, on_gpu: bool, timeout_s: float) -> Links:
    """Bandwidth and clocks over the `members`, this rank among them; collective.

    A network that fails or is too slow is told in the result, not by an exception.
    """
    if len(members) < 2:
        return Links(None, {}, {})
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    place, size = members.index(rank), len(members)
    timeout = timedelta(seconds=timeout_s)
    try:
        if on_gpu:
            torch.cuda.set_device(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("links", store),  # type: ignore[attr-defined]
            rank=place,
            world_size=size,
            timeout=timeout,
        )
        skews = _clock_skews(size)
        num_bytes = 2**28 if on_gpu else 2**22
        bandwidth = _bandwidth_gb_s(device, num_bytes, None, size)
        pairs = _best_pairs(place, size, device, num_bytes)
        return Links(
            bandwidth,
            {members[i]: speed for i, speed in enumerate(pairs)},
            {members[i]: skew for i, skew in enumerate(skews)},
        )
    except RuntimeError as error:
        return Links(None, {}, {}, failure=str(error).splitlines()[0])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def farewell(store: Any, rank: int, answered: list[int], *, timeout_s: float) -> None:
    """Keep the table on the first node until every rank that has `answered` has read it, unfit ones too."""
    store.set(f"bye/{rank}", "1")
    if rank == 0:
        try:
            store.wait([f"bye/{other}" for other in answered], timedelta(seconds=timeout_s))
        except RuntimeError:
            return


def _clock_skews(size: int) -> list[float]:
    """Each node's clock minus the median, read right after a barrier: exact to about a network round trip."""
    dist.monitored_barrier(wait_all_ranks=True)  # names who is missing
    now = torch.tensor([time.time()], dtype=torch.float64)
    clocks = [torch.zeros_like(now) for _ in range(size)]
    dist.all_gather(clocks, now)
    middle = statistics.median(float(clock) for clock in clocks)
    return [float(clock) - middle for clock in clocks]


def _bandwidth_gb_s(device: torch.device, num_bytes: int, group: Any, size: int, repeats: int = 5) -> float:
    buffer = torch.ones(num_bytes // 4, device=device)
    dist.all_reduce(buffer, group=group)
    if float(buffer[0]) != size:
        raise RuntimeError(f"an all-reduce over {size} nodes gave {float(buffer[0])}")
    start = time.monotonic()
    for _ in range(repeats):
        dist.all_reduce(buffer, group=group)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 2 * (size - 1) / size * num_bytes * repeats / (time.monotonic() - start) / 1e9


def _best_pairs(place: int, size: int, device: torch.device, num_bytes: int) -> list[float]:
    """Pairs (0,1)(2,3)…, then (1,2)(3,4)…(last,0): a node slow in both is slow itself, not its neighbor."""
    best = 0.0
    for first in (0, 1):
        pairs = [(i, (i + 1) % size) for i in range(first, size - 1 + first, 2)]
        groups = [dist.new_group(list(pair)) for pair in pairs]  # every rank makes all of them
        for pair, group in zip(pairs, groups, strict=True):
            if place in pair:
                best = max(best, _bandwidth_gb_s(device, num_bytes, group, 2))
        dist.barrier()
    speeds = [torch.zeros(1, dtype=torch.float64) for _ in range(size)]
    dist.all_gather(speeds, torch.tensor([best], dtype=torch.float64))
    return [float(speed) for speed in speeds]
