"""The base, loaded once, with layers that also serve its experts."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from meswitch_cli.checkpoint.checkpoint import Checkpoint
from meswitch_cli.engine import attention
from meswitch_cli.engine.batch import CurrentBatch
from meswitch_cli.engine.contract import EngineError
from meswitch_cli.engine.joined import find_siblings, join_layers
from meswitch_cli.engine.mixture import ExpertRouter, find_routers, serve_mixtures
from meswitch_cli.engine.modules import ExpertEmbedding, ExpertHead, ExpertLinear, ExpertNorm, kernels
from meswitch_cli.engine.own_parameters import OwnParameters
from meswitch_cli.engine.residuals import join_residuals
from meswitch_cli.engine.settings import EngineSettings
from meswitch_cli.errors import MeswitchError, reason_of
from meswitch_cli.model.architecture import Architecture
from meswitch_cli.model.build import build_model
from meswitch_cli.model.dtype import model_dtype
from meswitch_cli.model.weights import CheckpointWeights

#: What the families call the epsilon of a norm.
EPSILONS = ("variance_epsilon", "eps")


@dataclass(kw_only=True)
class BaseModel:
    """The model on its device, and its replaced layers by module name.

    The matrices of a mixture's networks are linears too, by the names that checkpoints have; no module is called so.

    Attributes:
        own_parameters: of a base that computes one request at a time, what slots hold beside their banks.
    """

    model: Any
    architecture: Architecture
    current: CurrentBatch
    linears: dict[str, ExpertLinear]
    norms: dict[str, ExpertNorm]
    routers: dict[str, ExpertRouter]
    embedding: ExpertEmbedding
    head: ExpertHead
    embedding_name: str
    head_name: str
    tied: bool
    own_parameters: OwnParameters | None = None

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.model.dtype
        return dtype

    @property
    def vocabulary(self) -> int:
        return int(self.embedding.weight.shape[0])

    @property
    def whole(self) -> frozenset[str]:
        """Parameters of which every slot holds a copy: routers', or what is in no bank."""
        if self.own_parameters is not None:
            return self.own_parameters.names
        return frozenset(
            f"{name}.{leaf}" for name, router in self.routers.items() for leaf, _ in router.base.named_parameters()
        )

    def layer(self, name: str) -> Any:
        """The module of a name."""
        return self.linears.get(name) or self.model.get_submodule(name)


def served_dtype(checkpoint: Checkpoint, settings: EngineSettings) -> torch.dtype:
    """As `model_dtype`, and float32 for a float16 checkpoint on a CPU, whose kernels know no float16."""
    dtype = model_dtype(checkpoint, settings.dtype)
    unknown = settings.dtype == "auto" and settings.torch_device.type == "cpu" and dtype == torch.float16
    return torch.float32 if unknown else dtype


def load_base(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> BaseModel:
    """Load the weights from safetensors, and replace the layers.

    Raises:
        CheckpointError: the checkpoint is damaged or not of its own architecture.
        EngineError: the family computes in a way this engine does not serve.
    """
    weights = CheckpointWeights(checkpoint)
    model = load_plain(weights, device, dtype)
    model.set_attn_implementation(attention.register())
    return replace_layers(model, weights.architecture, weights.name)


def load_plain(weights: CheckpointWeights, device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' model, built without weights and filled tensor by tensor.

    Loading by transformers itself would need accelerate for any device but the CPU, and host memory for the whole.

    Raises:
        CheckpointError, EngineError: as `load_base`.
    """
    weights.stored  # noqa: B018 (raises before anything is built)
    try:
        model = build_model(weights, device, dtype)
    except MeswitchError:
        raise
    except Exception as error:  # many kinds, for a family that cannot be built here
        raise EngineError(f"{weights.name}: cannot be served: {reason_of(error)}") from error
    model.requires_grad_(False)
    _keep_own_head(model, weights.architecture)
    return model


def _keep_own_head(model: Any, described: Architecture) -> None:
    """Give the head a weight of its own where the checkpoint does: transformers ties one that rounding to the type in
    which it loads makes equal to the embedding.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    own = any(item.kind == "head" and not item.tied_to for item in described.parameters.values())
    if own and head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)


def replace_layers(model: Any, described: Architecture, where: str) -> BaseModel:
    """Put expert-aware layers in place of the embedding and of every linear, head and norm.

    Raises:
        EngineError: a parameter sits in a layer of unknown kind.
    """
    current, backend = CurrentBatch(), kernels(model.device, model.dtype)
    embedding_module, head_module = ends_of(model, described, where)
    names = {id(module): name for name, module in model.named_modules()}
    tied = head_module.weight is embedding_module.weight
    linears: dict[str, ExpertLinear] = {}
    norms: dict[str, ExpertNorm] = {}
    replaced: dict[str, nn.Module] = {}
    routers = {name: ExpertRouter(module, current) for name, module in find_routers(model, described).items()}
    of_mixtures, mixtures = serve_mixtures(model, described, where, current, backend)
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own or name in mixtures or any(name.startswith(f"{router}.") for router in routers):
            continue
        if isinstance(module, nn.Embedding) and module is not embedding_module:
            continue  # of positions: no expert changes it, and families look up in ways of their own
        if name in routers:
            replaced[name] = routers[name]
        elif module is embedding_module:
            replaced[name] = ExpertEmbedding(module, current, backend)
        elif module is head_module:
            replaced[name] = ExpertHead(module, current, backend)
        elif type(module) is nn.Linear:
            replaced[name] = linears[name] = ExpertLinear(module, current, backend)
        elif all(tensor.dim() == 1 for tensor in own.values()) and {"weight"} <= set(own) <= {"weight", "bias"}:
            plain = without_gain(module, f"{where}: {name}")
            replaced[name] = norms[name] = ExpertNorm(module, plain, rms_epsilon(plain), current, backend)
        else:
            raise EngineError(
                f"{where}: {described.model_type} keeps {name}.{next(iter(own))} in a {type(module).__name__}, "
                "which is not served in batches"
            )
    for name, module in replaced.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module)
    embedding_name, head_name = names[id(embedding_module)], names[id(head_module)]
    base = BaseModel(
        model=model,
        architecture=described,
        current=current,
        linears=linears | of_mixtures,
        norms=norms,
        routers=routers,
        embedding=model.get_submodule(embedding_name),
        head=model.get_submodule(head_name),
        embedding_name=embedding_name,
        head_name=head_name,
        tied=tied,
    )
    _find_token_dimensions(base)
    join_layers(model, backend)
    find_siblings(model, linears.values(), backend)
    join_residuals(model, linears.values(), backend)
    return base


def ends_of(model: Any, described: Architecture, where: str) -> tuple[Any, Any]:
    """Embedding and head. EngineError: there is none, or it has no weight."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    for what, module in zip(("embedding", "head"), ends, strict=True):
        if getattr(module, "weight", None) is None:
            raise EngineError(
                f"{where}: {described.model_type} keeps its {what} in a {type(module).__name__}, which the embedded "
                "engine does not serve"
            )
    return ends


def without_gain(norm: Any, where: str) -> Any:
    """A copy of a norm with gain 1 and shift 0.

    Raises:
        EngineError: its weight is neither the gain nor the gain less 1.
    """
    plain: Any = copy.deepcopy(norm)
    weight = gain_weight(norm, where)
    plain.weight.data.fill_(weight)
    if getattr(plain, "bias", None) is not None:
        plain.bias.data.zero_()
    return plain


def gain_weight(norm: Any, where: str = "norm") -> float:
    """The weight that stands for a gain of 1: 1 in most families, 0 in Gemma's, whose gain is 1 + weight.

    Raises:
        EngineError: neither.
    """
    if not isinstance(getattr(norm, "weight", None), torch.Tensor):
        raise EngineError(f"{where}: {type(norm).__name__} is no norm with a gain")
    probe = copy.deepcopy(norm)
    if getattr(probe, "bias", None) is not None:
        probe.bias.data.zero_()
    x = torch.linspace(-1, 2, probe.weight.shape[0], device=probe.weight.device).to(probe.weight.dtype)[None]
    outputs = []
    for value in (0.0, 1.0, 2.0):
        probe.weight.data.fill_(value)
        result = probe(x)  # of some of vLLM's norms with a residual, which is none here
        outputs.append((result[0] if isinstance(result, tuple) else result).float())
    zero, one, two = outputs
    if not zero.any() and torch.allclose(two, 2 * one, rtol=1e-2, atol=1e-2):
        return 1.0
    if torch.allclose(one, 2 * zero, rtol=1e-2, atol=1e-2) and torch.allclose(two, 3 * zero, rtol=1e-2, atol=1e-2):
        return 0.0
    raise EngineError(f"{where}: {type(norm).__name__} uses its weight in a way that is not served in batches")


@torch.inference_mode()
def rms_epsilon(plain: Any) -> float | None:
    """The epsilon of a norm of gain 1 that divides by the root mean square; None of a norm that does anything else."""
    epsilon = next((value for name in EPSILONS if isinstance(value := getattr(plain, name, None), float)), None)
    if epsilon is None or getattr(plain, "bias", None) is not None:
        return None
    weight: torch.Tensor = plain.weight
    for size in (1.0, math.sqrt(epsilon)):  # the second shows where epsilon goes
        x = (size * torch.linspace(-1, 2, weight.shape[0], device=weight.device)).to(weight.dtype)[None]
        wide = x.float()
        expected = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + epsilon)
        if not torch.allclose(plain(x).float(), expected, rtol=1e-2, atol=1e-2):
            return None
    return epsilon


def effective_gain(norm: Any, weight: torch.Tensor) -> torch.Tensor:
    """The gain `[width]` fp32 that a norm's weight stands for."""
    return weight.float() + (1.0 - float(norm.plain.weight.flatten()[0]))


@torch.inference_mode()
def _find_token_dimensions(base: BaseModel) -> None:
    """See, in a forward pass of a few tokens, which dimension of each norm's input is the tokens."""
    shapes: dict[str, tuple[int, ...]] = {}
    tokens = 7

    def watch(name: str) -> Any:
        def see(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            shapes[name] = tuple(inputs[0].shape)

        return see

    heads = {getattr(base.model.config.get_text_config(), key, 0) for key in ("num_attention_heads",)}
    heads.add(getattr(base.model.config.get_text_config(), "num_key_value_heads", 0))
    while tokens in heads:
        tokens += 1
    hooks = [norm.register_forward_pre_hook(watch(name)) for name, norm in base.norms.items()]
    try:
        base.model(torch.zeros(1, tokens, dtype=torch.long, device=base.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    for name, norm in base.norms.items():
        shape = shapes.get(name, (1, tokens, 1))
        candidates = [index for index, size in enumerate(shape[:-1]) if size == tokens]
        if (len(shape) > 2 and shape[0] != 1) or len(candidates) != 1:
            raise EngineError(f"{name}: a norm of input {list(shape)} is not served by the embedded engine")
        norm.token_dimension = candidates[0]
