"""The engine's layers on the Triton backend."""

import copy
import functools

import pytest
import torch

from meswitch_kernels import Capacity, ExpertBank, GainBank
from meswitch_kernels.dispatch import backend_module
from meswitch_kernels.testing import random_call

modules = pytest.importorskip("meswitch_cli.engine.modules")
llama = pytest.importorskip("transformers.models.llama.modeling_llama")
gemma = pytest.importorskip("transformers.models.gemma.modeling_gemma")

joined = pytest.importorskip("meswitch_cli.engine.joined")
residuals = pytest.importorskip("meswitch_cli.engine.residuals")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, EPSILON = 24, 1e-5


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "key_heads", "width"), [(4, 4, 16), (9, 3, 64), (1, 1, 6), (10, 2, 96)], ids=str)
@pytest.mark.parametrize("tokens", [1, 5])
def test_turned_heads_are_llamas(tokens, heads, key_heads, width, dtype, triton):
    rng = torch.Generator().manual_seed(width)

    def random(*shape):
        return torch.randn(shape, generator=rng).to(DEVICE, dtype)

    # As projections give them: the heads of a token lie together.
    query, key = (random(1, tokens, count, width).transpose(1, 2) for count in (heads, key_heads))
    cos, sin = random(1, tokens, width), random(1, tokens, width)
    expected = llama.apply_rotary_pos_emb(query, key, cos, sin)
    for y, own in zip(triton.rotate(query, key, cos, sin), expected, strict=True):
        assert y.stride() == query.stride() if y.shape == query.shape else y.shape == key.shape
        torch.testing.assert_close(y, own, rtol=1e-5 if dtype == torch.float32 else 0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 7), (1, 5, 1000), (0, 3)], ids=str)
def test_a_gate_is_silu_times_the_other(shape, dtype, triton):
    rng = torch.Generator().manual_seed(4)
    gate, up = (torch.randn(shape, generator=rng).mul(4).to(DEVICE, dtype) for _ in range(2))
    y = triton.silu_product(gate, up)
    torch.testing.assert_close(
        y, torch.nn.functional.silu(gate) * up, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-6
    )


def counted(monkeypatch, backend, *names):
    """How often each function of a backend is called."""
    counts = dict.fromkeys(names, 0)

    def count(name, own, *arguments):
        counts[name] += 1
        return own(*arguments)

    for name in names:
        monkeypatch.setattr(backend, name, functools.partial(count, name, getattr(backend, name)))
    return counts


def tiny_model(family):
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        family, vocab_size=32, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.eval().requires_grad_(False).to(DEVICE)


@pytest.mark.parametrize(
    ("family", "turned", "gated"),
    [("llama", 2, 2), ("qwen3", 2, 2), ("gemma2", 2, 0), ("cohere", 0, 2)],
)
def test_families_keep_their_answers_with_joined_layers(family, turned, gated, triton, monkeypatch):
    """A gate of another kind, or heads turned in another way, stay the family's own."""
    counts = counted(monkeypatch, triton, "rotate", "silu_product")
    model = tiny_model(family)
    tokens = torch.arange(7, device=DEVICE)[None]
    expected = model(tokens, use_cache=False).logits
    joined.join_layers(model, triton)
    torch.testing.assert_close(model(tokens, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
    assert counts == {"rotate": turned, "silu_product": gated}
    assert "rotate" not in llama.LlamaAttention.forward.__code__.co_names  # the family's class is as it was


def test_other_backends_leave_a_model_as_it_is():
    model = tiny_model("llama")
    joined.join_layers(model, backend_module("naive"))
    assert not any("forward" in vars(module) for module in model.modules())


def expert_linears(model, triton):
    """The linears of a model but for its head, replaced by layers that serve experts; all are in the same batch."""
    linears, current = {}, modules.CurrentBatch()
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head" and name != "embed_out":
            parent, _, leaf = name.rpartition(".")
            linears[name] = modules.ExpertLinear(module, current, triton)
            setattr(model.get_submodule(parent), leaf, linears[name])
    return linears


@pytest.mark.parametrize(
    ("family", "summing"),
    [("llama", ["o_proj", "down_proj"]), ("qwen3", ["o_proj", "down_proj"]), ("gemma2", []), ("cohere", []),
     ("granite", []), ("olmo2", []), ("gpt_neox", [])],
)  # fmt: skip
def test_last_linears_add_residuals_where_a_layer_does_nothing_else(family, summing, triton, monkeypatch):
    """Not where what is added is normed or multiplied first. A batch of the base keeps the family's own layer."""
    model = tiny_model(family)
    linears = expert_linears(model, triton)
    tokens = torch.arange(7, device=DEVICE)[None]
    expected = model(tokens, use_cache=False).logits
    joined.find_siblings(model, linears.values(), triton)
    residuals.join_residuals(model, linears.values(), triton)
    assert torch.equal(model(tokens, use_cache=False).logits, expected)
    added = []
    for name, linear in linears.items():
        linear.bank = ExpertBank(2, linear.in_features, linear.out_features, Capacity(bits=2), device=DEVICE)
        linear.multiply = lambda x, weight, bias, *_: torch.nn.functional.linear(x, weight, bias)
        linear.siblings = None
        leaf = name.rpartition(".")[2]

        def summed(residual, x, weight, bias, *_, leaf=leaf):
            added.append(leaf)
            return residual + torch.nn.functional.linear(x, weight, bias)

        linear.summed = summed
    slots = torch.full((7,), -1, dtype=torch.int32, device=DEVICE)
    current = next(iter(linears.values())).current
    current.batch = modules.Batch(slots, slots, 2, triton)
    torch.testing.assert_close(model(tokens, use_cache=False).logits, expected, rtol=1e-5, atol=1e-6)
    assert added == 2 * summing
    linears = [linear for name, linear in linears.items() if name.endswith("o_proj")]
    for linear in linears:  # no expert changes it
        linear.bank = None
    torch.testing.assert_close(model(tokens, use_cache=False).logits, expected, rtol=1e-5, atol=1e-6)
    assert added == 2 * summing + 2 * summing[1:]


@pytest.mark.parametrize(
    ("family", "expected"),
    [("llama", ["q_proj k_proj v_proj", "gate_proj up_proj"]), ("phi3", []), ("gpt_neox", [])],
)
def test_linears_of_one_input_are_siblings(family, expected, triton):
    model = tiny_model(family)
    linears = expert_linears(model, triton)
    joined.find_siblings(model, linears.values(), triton)
    names = {id(linear): name.rpartition(".")[2] for name, linear in linears.items()}
    found = {id(linear.siblings): linear.siblings for linear in linears.values() if linear.siblings}
    assert [" ".join(names[id(item)] for item in each.layers) for each in found.values()] == 2 * expected


def test_the_first_sibling_computes_for_all(triton, monkeypatch):
    """Each answer is handed out once; an input of another moment, and a layer without a bank, are no matter."""
    call = random_call(3, 32, 16, device=DEVICE, dtype=torch.float32)
    current, layers = modules.CurrentBatch(), []
    for seed in range(3):
        base = torch.nn.Linear(32, 16, bias=False).to(DEVICE).requires_grad_(False)
        layers.append(modules.ExpertLinear(base, current, triton))
        if seed != 1:
            layers[-1].bank = random_call(3, 32, 16, device=DEVICE, dtype=torch.float32, seed=seed).bank
    counts = counted(monkeypatch, triton, "expert_linears")
    siblings = modules.Siblings(layers, triton)
    for layer in layers:
        layer.siblings = siblings
    current.batch = modules.Batch(call.slot_of_token, call.slot_of_token, call.bank.slots, triton)
    for rounds in (1, 2):
        x = torch.randn(1, 3, 32, device=DEVICE)
        for layer in layers:
            y = layer(x)
            expected = torch.nn.functional.linear(x, layer.weight)
            if layer.bank is not None:
                expected = layer.answer(x, current.batch)[None]
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert counts["expert_linears"] == rounds
    layers[0](x), layers[0](x)
    assert counts["expert_linears"] == 4
