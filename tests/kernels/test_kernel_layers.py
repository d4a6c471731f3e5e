"""The engine's layers on the Triton backend."""

import copy

import pytest
import torch

from meswitch_kernels import GainBank, available_backends
from meswitch_kernels.dispatch import backend_module

modules = pytest.importorskip("meswitch_cli.engine.modules")
llama = pytest.importorskip("transformers.models.llama.modeling_llama")
gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, EPSILON = 24, 1e-5


@pytest.fixture
def triton():
    if reason := available_backends()["triton"]:
        pytest.skip(reason)
    return backend_module("triton")


def expert_norm(kind, ones, dtype, triton):
    """A norm of random weights, whose plain copy has weight `ones`."""
    base = kind(WIDTH, eps=EPSILON).to(DEVICE, dtype).requires_grad_(False)
    base.weight.copy_(torch.randn(WIDTH, generator=torch.Generator().manual_seed(3)))
    plain = copy.deepcopy(base)
    plain.weight.fill_(ones)
    return modules.ExpertNorm(base, plain, EPSILON, modules.CurrentBatch(), triton)


def close(y, expected, dtype):
    torch.testing.assert_close(y, expected, rtol=2e-6 if dtype == torch.float32 else 2**-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "ones"), [(llama.LlamaRMSNorm, 1.0), (gemma.GemmaRMSNorm, 0.0)], ids=["llama", "gemma"]
)
@pytest.mark.parametrize("shape", [(1, 5), (1, 5, 3), (1, 3, 5)], ids=str)
def test_a_batch_of_the_base_takes_the_models_own_norm(kind, ones, dtype, shape, triton):
    norm = expert_norm(kind, ones, dtype, triton)
    x = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    norm.base.forward = None  # not called: one launch does it
    close(norm(x), kind.forward(norm.base, x), dtype)
    norm.base.weight.add_(1)  # a weight that is filled later is seen
    if ones:
        close(norm(x), kind.forward(norm.base, x), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(
    ("before", "after"), [((), ()), ((), (3,)), ((3,), ())], ids=["hidden", "heads", "heads-first"]
)
def test_every_token_has_its_experts_gain(before, after, tokens, dtype, triton):
    """Also where a token has several rows, one a head."""
    norm = expert_norm(llama.LlamaRMSNorm, 1.0, dtype, triton)
    norm.gains = GainBank(2, norm.base.weight)
    own = torch.randn(WIDTH, generator=torch.Generator().manual_seed(8)).to(DEVICE, dtype)
    norm.gains.load(1, own)
    norm.token_dimension = 1 + len(before)
    shape = (1, *before, tokens, *after, WIDTH)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    slots = torch.tensor([1, -1, 1, 1, -1][:tokens], dtype=torch.int32, device=DEVICE)
    norm.current.batch = modules.Batch(slots, slots, 2, triton)
    norm.plain.forward = None
    normed = llama.LlamaRMSNorm.forward(norm.plain, x)
    places = [1] * len(shape)
    places[norm.token_dimension] = tokens
    expected = torch.where((slots == 1).view(places), normed * own, normed * norm.base.weight)
    close(norm(x), expected, dtype)
