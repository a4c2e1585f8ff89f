"""Each redirect, seen from a caller inside megatron.core and from one outside.

The inside call is what megatron-core does somewhere; without the redirect it raises on a machine without a GPU (or, for
type names and random state, gives something else). The outside call shows that nobody else is affected.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest
import torch

from meditron_train import mcore
from meditron_train.mcore import cpu_redirects

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the redirects do nothing where CUDA is available"
)

CALLS = {
    "current_device": "torch.cuda.current_device()",
    "synchronize": "torch.cuda.synchronize()",
    "Tensor.cuda": "torch.ones(2).cuda()",
    "tensor": "torch.tensor([1.0], device='cuda')",
    "zeros": "torch.zeros(2, device='cuda')",
    "ones": "torch.ones(2, device='cuda:0')",
    "empty": "torch.empty(2, device=torch.device('cuda'))",
    "empty_like": "torch.empty_like(torch.ones(2), device='cuda')",
    "pin_memory": "torch.empty(2, pin_memory=True)",
    "get_rng_state": "torch.cuda.get_rng_state()",
    "random.get_rng_state": "torch.cuda.random.get_rng_state()",
}


def call(expression: str, module_name: str):
    """Evaluate in a module of that name; the redirects look at the name of the caller's module."""
    return eval(expression, {"torch": torch, "__name__": module_name})


@pytest.mark.parametrize("name", CALLS)
def test_works_inside_megatron_and_nowhere_else(name):
    call(CALLS[name], "megatron.core.optimizer.optimizer")
    with pytest.raises((RuntimeError, AssertionError)):
        call(CALLS[name], "somebody.else")


def test_tensors_land_on_the_cpu():
    for expression in ("torch.zeros(2, device='cuda')", "torch.ones(2).cuda()"):
        assert call(expression, "megatron.core.x").device.type == "cpu"
    assert call("torch.cuda.current_device()", "megatron.core.x") == torch.device("cpu")


def test_seeding_inside_megatron_seeds_the_only_generator():
    call("torch.cuda.manual_seed(5)", "megatron.core.tensor_parallel.random")
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))


def test_setting_the_state_inside_megatron_sets_the_only_generator():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    drawn = torch.rand(3)
    eval("torch.cuda.set_rng_state(state)", {"torch": torch, "state": state, "__name__": "megatron.core.x"})
    assert torch.equal(drawn, torch.rand(3))


def test_lazy_calls_run_at_once():
    ran = []
    eval(
        "torch.cuda._lazy_call(lambda: ran.append(1))",
        {"torch": torch, "ran": ran, "__name__": "megatron.core.x"},
    )
    assert ran == [1]


def test_the_cpu_generator_stands_for_the_default_cuda_generators():
    assert torch.cuda.default_generators[torch.device("cpu")] is torch.default_generator


def test_type_names_are_those_the_optimizers_know():
    assert call("torch.ones(1).type()", "megatron.core.optimizer.optimizer") == "torch.cuda.FloatTensor"
    assert call("torch.ones(1).type()", "somebody.else") == "torch.FloatTensor"
    assert (
        call("torch.ones(1).type(torch.float64).dtype", "megatron.core.optimizer.optimizer") == torch.float64
    )


def test_device_contexts_still_work():
    """`with torch.device(...)` collects the factories when first used: it must have seen the originals."""
    with torch.device("meta"):
        assert torch.zeros(2).is_meta and torch.empty(1).is_meta


def test_too_late_is_an_error_with_the_remedy(monkeypatch):
    """The package is imported again; megatron.core was imported before."""
    for name in [name for name in sys.modules if name.startswith("meditron_train.mcore")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(RuntimeError, match="import names of megatron-core from meditron_train.mcore only"):
        importlib.import_module("meditron_train.mcore.cpu_redirects")


def test_nothing_happens_where_cuda_is_available(monkeypatch):
    def redirected():
        factories = [getattr(torch, name) for name in cpu_redirects.FACTORIES]
        return [*factories, torch.cuda.current_device, torch.Tensor.cuda, torch.Tensor.type]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    spec = importlib.util.spec_from_file_location("redirects", cpu_redirects.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    before = redirected()
    module.apply()
    assert redirected() == before


@pytest.mark.parametrize("version", ["0.15.3", "0.17.0", "0.12.0rc1"])
def test_other_versions_are_refused_with_what_to_install(version):
    from meditron_train.errors import UserError

    with pytest.raises(
        UserError, match=rf"megatron-core {version} is installed.*pip install 'megatron-core>=0.16"
    ):
        mcore.check_version(version)


def test_the_installed_version_is_supported():
    assert mcore.check_version() == mcore.VERSION
