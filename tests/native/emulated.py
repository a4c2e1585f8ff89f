"""The CUDA kernels of packed attention compiled for the CPU (tests/native/emu), called by ctypes on numpy and torch.

Legend: T query tokens, S key/value tokens, N query heads, K key/value heads, D head size, P rows of rotation tables.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.native.reference import Packing

CSRC = Path(__file__).parents[2] / "csrc"
EMU = Path(__file__).parent / "emu"
FLAGS = ["-std=c++17", "-O2", "-march=native", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
FLAGS += ["-I", str(EMU.parent), "-I", str(CSRC / "cuda")]
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Heads(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("token_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
    ]


class AttentionProblem(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("num_queries", "num_keys", "num_heads", "num_kv_heads")),
        *((name, ctypes.c_int64) for name in ("head_dim", "num_documents")),
        ("cu_queries", ctypes.c_void_p),
        ("cu_keys", ctypes.c_void_p),
        ("window", ctypes.c_int64),
        ("softmax_scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "q_positions", "k_positions")),
    ]


class AttentionForward(ctypes.Structure):
    _fields_ = [
        ("problem", AttentionProblem),
        *((name, Heads) for name in ("q", "k", "v", "out")),
        ("lse", ctypes.c_void_p),
    ]


class AttentionBackward(ctypes.Structure):
    _fields_ = [
        ("problem", AttentionProblem),
        *((name, Heads) for name in ("q", "k", "v", "out", "grad_out", "dq", "dk", "dv")),
        ("lse", ctypes.c_void_p),
    ]


def compiler() -> str | None:
    """A C++ compiler, or None."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def build() -> Path:
    """Compile every kernel for the CPU; the library is kept in the temporary folder under a hash of its sources."""
    sources = sorted([*(CSRC / "cuda").glob("*.cu"), *EMU.glob("*.cpp")])
    everything = sorted(path for folder in (CSRC, EMU) for path in folder.rglob("*") if path.is_file())
    content = b"".join(path.name.encode() + path.read_bytes() for path in everything)
    key = hashlib.sha256(content + repr((CSRC, compiler(), FLAGS)).encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"meditron-train-emulated-{os.getuid()}-{key}.so"
    if library.exists():
        return library
    with tempfile.TemporaryDirectory(prefix="meditron-train-emulated-") as folder:

        def compile_one(source: Path) -> str:
            target = str(Path(folder) / f"{source.name}.o")
            _run([str(compiler()), *FLAGS, "-x", "c++", "-c", str(source), "-o", target])
            return target

        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_one, sources))
        linked = Path(folder) / library.name
        _run([str(compiler()), "-shared", *objects, "-o", str(linked)])
        shutil.copy(linked, f"{library}.{os.getpid()}")
        os.replace(f"{library}.{os.getpid()}", library)
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


@dataclass(frozen=True)
class Site:
    """A barrier or a wait in the kernels."""

    number: int
    file: str
    line: int
    kind: str


class Emulator:
    """One loaded library. `seed` draws the order of warps; `deferred` copies happen at their wait, not at once.

    `capability` is that of the device that kernels are chosen for: 8 (A100) or 9 (H100).
    """

    def __init__(self, capability: int = 8) -> None:
        library = self.library = ctypes.CDLL(str(build()))
        for way in ("forward", "backward"):
            getattr(library, f"meditron_cuda_attention_{way}_workspace").restype = ctypes.c_int64
            getattr(library, f"meditron_cuda_attention_{way}").restype = ctypes.c_char_p
        library.meditron_cuda_attention_unsupported.restype = ctypes.c_char_p
        library.meditron_emu_bank_conflicts.restype = ctypes.c_int64
        library.meditron_emu_site_file.restype = library.meditron_emu_site_kind.restype = ctypes.c_char_p
        self.capability = capability
        self.configure()

    def configure(self, *, seed: int = 0, deferred: bool = False, removed: Site | None = None) -> None:
        number = -1 if removed is None else removed.number
        self.library.meditron_emu_set_capability(self.capability)
        self.library.meditron_emu_configure(ctypes.c_uint64(seed), int(deferred), number)

    def sites(self) -> list[Site]:
        """Those that were met since the library was loaded."""
        return [
            Site(
                number,
                Path(self.library.meditron_emu_site_file(number).decode()).name,
                self.library.meditron_emu_site_line(number),
                self.library.meditron_emu_site_kind(number).decode(),
            )
            for number in range(self.library.meditron_emu_num_sites())
        ]

    def bank_conflicts(self) -> int:
        return self.library.meditron_emu_bank_conflicts()

    def unsupported(self, q: torch.Tensor, k: torch.Tensor, packing: Packing) -> str | None:
        reason = self.library.meditron_cuda_attention_unsupported(ctypes.byref(_problem(q, k, packing)[0]))
        return None if reason is None else reason.decode()

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, packing: Packing
    ) -> torch.Tensor:
        """Fills out [T, N, D]; returns lse fp32 [N, T].

        Raises RuntimeError with what the launcher or the emulator says.
        """
        problem, _keep_alive = _problem(q, k, packing)
        lse = torch.full((q.shape[1], q.shape[0]), torch.nan)
        given = AttentionForward(problem, *map(_heads, (q, k, v, out)), lse.data_ptr())
        self._call("forward", given, [q, k, v])
        return lse

    def backward(
        self,
        tensors: tuple[torch.Tensor, ...],
        lse: torch.Tensor,
        grads: tuple[torch.Tensor, ...],
        packing: Packing,
    ) -> None:
        """tensors: q, k, v, out, grad_out; grads: dq, dk, dv, filled."""
        problem, _keep_alive = _problem(*tensors[:2], packing)
        heads = map(_heads, (*tensors, *grads))
        given = AttentionBackward(problem, *heads, lse.data_ptr())
        self._call("backward", given, [*tensors, lse])

    def _call(self, way: str, given: ctypes.Structure, readable: list[torch.Tensor]) -> None:
        size = getattr(self.library, f"meditron_cuda_attention_{way}_workspace")(ctypes.byref(given))
        # Poisoned, and guarded behind its end.
        workspace = torch.full((size // 4 + 64,), torch.nan)
        address = workspace.data_ptr() + -workspace.data_ptr() % 16
        self.library.meditron_emu_allow_reads(None, ctypes.c_int64(-1))
        for tensor in [*readable, workspace]:
            if tensor.numel() > 0:
                span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
                num_bytes = ctypes.c_int64(span * tensor.element_size())
                self.library.meditron_emu_allow_reads(ctypes.c_void_p(tensor.data_ptr()), num_bytes)
        error = getattr(self.library, f"meditron_cuda_attention_{way}")(
            ctypes.byref(given), ctypes.c_void_p(address), None
        )
        if error is not None:
            raise RuntimeError(error.decode())
        used = (address - workspace.data_ptr() + size + 3) // 4
        assert workspace[used:].isnan().all(), "the workspace was written beyond its end"


def _heads(tensor: torch.Tensor) -> Heads:
    assert tensor.stride(2) == 1
    return Heads(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _problem(q: torch.Tensor, k: torch.Tensor, packing: Packing) -> tuple[AttentionProblem, object]:
    cu_queries = (ctypes.c_int64 * len(packing.cu_queries))(*packing.cu_queries)
    cu_keys = (ctypes.c_int64 * len(packing.cu_keys))(*packing.cu_keys)
    tables = (packing.cos, packing.sin, packing.q_positions, packing.k_positions)
    problem = AttentionProblem(
        CODES[q.dtype],
        *(q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2], len(packing.cu_queries) - 1),
        ctypes.addressof(cu_queries),
        ctypes.addressof(cu_keys),
        packing.window,
        q.shape[2] ** -0.5 if packing.softmax_scale is None else packing.softmax_scale,
        *(None if table is None else table.data_ptr() for table in tables),
    )
    return problem, (cu_queries, cu_keys)
