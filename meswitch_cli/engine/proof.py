"""A proof, before anything large is loaded, that the engine computes a base's family as transformers does.

A tiny random model of the base's own class, and an expert made up for it, answer a mixed batch through everything that
the engine is made of; plain transformers answers each request by itself. Nothing is served that has not come out equal.
"""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from meswitch_cli.engine.attention import NAME, register
from meswitch_cli.engine.bank_layout import bank_layout
from meswitch_cli.engine.banks import Banks
from meswitch_cli.engine.base_model import BaseModel, replace_layers
from meswitch_cli.engine.contract import BASE, Chunk, EngineError, GenerationRequest, Sampling
from meswitch_cli.engine.decoding import Decoding
from meswitch_cli.engine.expert import ServedModel
from meswitch_cli.engine.generation import Generation
from meswitch_cli.engine.one_by_one import OneByOne
from meswitch_cli.engine.plain_layers import replace_linears
from meswitch_cli.engine.sampler import Sampler
from meswitch_cli.engine.settings import EngineSettings
from meswitch_cli.engine.small import build_random, small_model, special_ids
from meswitch_cli.engine.synthetic import SyntheticExpert, held_value, synthetic_expert
from meswitch_cli.errors import CheckpointError, MeswitchError, reason_of
from meswitch_cli.model.architecture import architecture

EXPERT = "expert"
#: Where the expert lies; the slot before it stays empty.
SLOT, SLOTS = 1, 2
PAGE_SIZE = 8
#: Tokens of the prompts, in pages of the cache; the third and fourth fill more than one.
PROMPT_PAGES = (0.4, 0.9, 1.6, 2.7)
DECODED = 4
#: The most that log-probabilities may differ, over their standard deviation. On a CPU fp32 came out at 1e-5 and bf16 at
#: up to 0.26; a request that reads another's prompt differs by 4 and more.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.6, torch.float16: 0.6}
_SEED = 20


def prove(
    config: dict[str, Any], where: str, device: torch.device, dtype: torch.dtype, *, on_device: bool = False
) -> None:
    """Compare the engine with plain transformers on a small model of a config; once a process for each config.

    On a CPU in fp32, with the cache as the device has it: on a GPU some ten kernels would be compiled first, for
    shapes that are not served. `on_device`, on the device all the same, in `dtype`.

    Raises:
        EngineError: the family comes out otherwise, or cannot be run.
        CheckpointError: transformers cannot build the model, or it has weights of an unknown kind.
    """
    problem = _problem_of(config, where, device, dtype, on_device=on_device)
    if problem is not None:
        raise EngineError(f"{where}: the embedded engine does not serve {config.get('model_type')}: {problem}")


def why_one_by_one(config: dict[str, Any], where: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a base's family is computed one request at a time; None where it is in batches. As `prove`, for either.

    Raises:
        EngineError: the family comes out otherwise in both ways.
        CheckpointError: as `prove`.
    """
    problem = _problem_of(config, where, device, dtype)
    if problem is not None and (other := _problem_of(config, where, device, dtype, one_by_one=True)) is not None:
        raise EngineError(
            f"{where}: the embedded engine does not serve {config.get('model_type')}: {problem}; nor one request at a "
            f"time: {other}"
        )
    return problem


def _problem_of(
    config: dict[str, Any],
    where: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    one_by_one: bool = False,
    on_device: bool = False,
) -> str | None:
    entries = {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
    place = device if on_device else torch.device("cpu")
    computed = torch.float32 if place.type == "cpu" else dtype
    try:
        paged = device.type != "cpu" and not one_by_one
        return _problem(json.dumps(entries, sort_keys=True), place, computed, paged, one_by_one)
    except MeswitchError as error:
        raise type(error)(f"{where}: {error}") from error


@functools.lru_cache(maxsize=64)
def _problem(text: str, device: torch.device, dtype: torch.dtype, paged: bool, one_by_one: bool) -> str | None:
    """What is wrong with a family in this engine; None where nothing is."""
    with _undisturbed():
        small, plain = small_model(json.loads(text), dtype)
        try:
            described = architecture(small, "config.json")
            if paged and described.experts:
                return "it is a mixture of experts, which is served in batches on a CPU only"
            if one_by_one:
                served: _Served = _ServedOneByOne.of(plain, described, small, device, dtype, paged)
            else:
                served = _Served.of(plain, described, small, device, dtype, paged)
            requests = _requests(served.base.vocabulary, special_ids(small))
            together = served.answers(requests)
        except CheckpointError:
            raise
        except MeswitchError as error:
            return str(error).removeprefix("config.json: ")
        except Exception as error:  # whatever a family raises that the engine was not made for
            if isinstance(error, KeyError) and error.args == (NAME,):
                return "its attention is of its own kind, in whose place transformers takes no other"
            return _unforeseen(error)
        plains = {BASE: plain.to(device), EXPERT: _with_values(plain, served.expert).to(device)}
        expected = [(_stepwise if one_by_one else _expected)(plains[item.request.expert], item) for item in together]
        differences = [_difference(item, own) for item, own in zip(together, expected, strict=True)]
        worst = max(range(len(differences)), key=differences.__getitem__)
        if differences[worst] <= TOLERANCE[dtype]:
            return None
        whose = "the base" if requests[worst].expert == BASE else "an expert"
        apart = f"logits of {whose} differ by {differences[worst]:.2g} from plain transformers'"
        for request, answer, own in zip(requests, together, expected, strict=True):
            if _difference(answer, own, tokens=1) > TOLERANCE[dtype]:
                (alone,) = served.answers([request])
                if _difference(alone, own, tokens=1) <= TOLERANCE[dtype]:
                    return f"in a batch, requests see each other's prompts ({apart})"
        return apart


def _unforeseen(error: Exception) -> str:
    """What a family does that ends in an error nobody foresaw, and in which of its modules."""
    who, frame = "it", error.__traceback__
    while frame is not None:
        module = frame.tb_frame.f_locals.get("self")
        if isinstance(module, torch.nn.Module) and type(module).__module__.startswith("transformers.models."):
            who = f"its {type(module).__name__}"
        frame = frame.tb_next
    reason = reason_of(error).partition(". ")[0].rstrip(".")
    return f"{who} computes in a way that the engine was not made for ({type(error).__name__}: {reason})"


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave the process's random numbers, warnings and transformers' messages as they are."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def _with_values(plain: Any, expert: SyntheticExpert) -> Any:
    model = copy.deepcopy(plain)
    expert.put_into(model)
    return model


@dataclass
class _Answer:
    """What the engine gave: tokens, and the log-probabilities of all tokens at each, `[tokens, vocabulary]` fp32."""

    request: GenerationRequest
    tokens: list[int] = field(default_factory=list)
    rows: list[torch.Tensor] = field(default_factory=list)

    def take(self, chunk: Chunk) -> None:
        if chunk.error is not None:
            raise EngineError(chunk.error)
        self.tokens += chunk.tokens
        for item in chunk.logprobs:
            row = torch.full((1 + max(token for token, _ in item.top),), -torch.inf)
            row[[token for token, _ in item.top]] = torch.tensor([value for _, value in item.top])
            self.rows.append(row)


class _NoText:
    """The tokenizer of a model that nobody reads."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return ""


class _Unheard:
    """Hooks of a loop that somebody runs by hand."""

    def before_batch(self, processor: Any) -> None: ...
    def on_end(self, generation: Generation) -> None: ...
    def on_stop(self, error: BaseException | None) -> None: ...

    def on_failure(self, generation: Generation, error: Exception) -> None:
        raise error


class _Served:
    """A small model and its expert in the engine's own layers, banks, cache and scheduler, without its threads."""

    def __init__(self, base: BaseModel, expert: SyntheticExpert, paged: bool) -> None:
        self.base, self.expert, self.paged = base, expert, paged

    @classmethod
    def of(
        cls, plain: Any, described: Any, config: dict[str, Any], device: torch.device, dtype: torch.dtype, paged: bool
    ) -> _Served:
        base = cls._base(plain, described, config, device, dtype)
        expert = synthetic_expert(plain, described, base, dtype, torch.Generator().manual_seed(_SEED + 1))
        banks = Banks(base, bank_layout(base, [expert.manifest]), SLOTS)
        banks.load(SLOT, expert.manifest, expert.stored)
        banks.install()
        return cls(base, expert, paged)

    @staticmethod
    def _base(
        plain: Any, described: Any, config: dict[str, Any], device: torch.device, dtype: torch.dtype
    ) -> BaseModel:
        return replace_layers(_copied(plain, config, device, dtype, register()), described, "config.json")

    def answers(self, requests: Sequence[GenerationRequest]) -> list[_Answer]:
        """What the engine generates, prompts split over several batches, some beside others' continuations."""
        answers = [_Answer(request) for request in requests]
        generations = [_generation(answer, self.base.vocabulary) for answer in answers]
        longest = 8 * PAGE_SIZE
        settings = EngineSettings(
            base="",
            device=str(self.base.device),
            page_size=PAGE_SIZE,
            cache_tokens=8 * longest,
            max_batch_tokens=4 * PAGE_SIZE,
            max_running=len(PROMPT_PAGES),
        )
        with torch.inference_mode():
            self._generate(generations, settings, longest)
        return answers

    def _generate(self, generations: Sequence[Generation], settings: EngineSettings, longest: int) -> None:
        from meswitch_cli.engine.batching import make_manager

        manager = make_manager(self.base, settings, SLOTS, longest, _Unheard(), SLOT, self.paged or None)
        processor: Any = manager.batch_processor
        for generation in generations:
            processor.admit(generation)
        while not all(generation.finished for generation in generations):
            if not processor.prepare_next_batch():
                raise EngineError("requests are left that no batch takes")
            processor._generation_step(self.base.model)
            processor.update_batch()


class _ServedOneByOne(_Served):
    """The same, in transformers' own layers but for the linears, with a cache for each request."""

    @staticmethod
    def _base(
        plain: Any, described: Any, config: dict[str, Any], device: torch.device, dtype: torch.dtype
    ) -> BaseModel:
        def read(name: str) -> torch.Tensor:
            item = described.parameters[name]
            value: torch.Tensor = item.from_stored(held_value(plain, item))
            return value

        return replace_linears(_copied(plain, config, device, dtype), described, "config.json", read)

    def _generate(self, generations: Sequence[Generation], settings: EngineSettings, longest: int) -> None:
        loop = OneByOne(self.base, settings, SLOTS, longest, _Unheard())
        for generation in generations:
            loop.admit(generation)
        while loop.turn():
            pass


def _copied(
    plain: Any, config: dict[str, Any], device: torch.device, dtype: torch.dtype, attention: str | None = None
) -> Any:
    """The same model, on a device and in a type, with `attention` by transformers' name."""
    model = build_random(config, attention)
    model.load_state_dict(plain.state_dict())
    model.to(device)
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay in fp32, as in any model
        parameter.data = parameter.data.to(dtype)
    return model


def _generation(answer: _Answer, vocabulary: int) -> Generation:
    tokenizer: Any = _NoText()
    model = ServedModel(
        name=answer.request.expert,
        path=Path(),
        digest="" if answer.request.expert == BASE else EXPERT,
        tokenizer=tokenizer,
        vocabulary=vocabulary,
        end_ids=frozenset(),
    )
    generation = Generation(answer.request, model, Sampler(answer.request, model, 0, None), answer.take)
    generation.slot = -1 if answer.request.expert == BASE else SLOT
    return generation


def _requests(vocabulary: int, avoided: set[int]) -> list[GenerationRequest]:
    """Greedy requests of base and expert in turn, of lengths of their own."""
    generator = torch.Generator().manual_seed(_SEED + 2)
    allowed = torch.tensor([token for token in range(vocabulary // 16, vocabulary // 2) if token not in avoided])
    made = []
    for index, pages in enumerate(PROMPT_PAGES):
        drawn = torch.randint(len(allowed), (int(pages * PAGE_SIZE),), generator=generator)
        sampling = Sampling(temperature=0, max_tokens=DECODED, ignore_eos=True, logprobs=vocabulary)
        prompt = tuple(allowed[drawn].tolist())
        made.append(GenerationRequest(f"proof-{index}", (BASE, EXPERT)[index % 2], prompt, sampling))
    return made


def _expected(plain: Any, answer: _Answer) -> torch.Tensor:
    """Log-probabilities `[tokens, vocabulary]` by plain transformers, on the way that the engine's tokens took."""
    prompt = answer.request.prompt_tokens
    ids = torch.tensor([[*prompt, *answer.tokens[:-1]]], device=plain.device)
    logits = plain(ids, use_cache=False).logits[0, len(prompt) - 1 :]
    return torch.log_softmax(logits.float(), 1).cpu()


def _stepwise(plain: Any, answer: _Answer) -> torch.Tensor:
    """As `_expected`, by plain transformers with its own cache, a token at a time: some families differ by that."""
    prompt = answer.request.prompt_tokens
    decoding = Decoding(plain, prompt, len(prompt) + DECODED)
    rows = []
    for token in answer.tokens:
        rows.append(decoding.forward()[-1])
        decoding.push(token)
    return torch.log_softmax(torch.stack(rows).float(), 1).cpu()


def _difference(answer: _Answer, expected: torch.Tensor, tokens: int | None = None) -> float:
    """The largest difference of a log-probability, over the standard deviation of those expected, in the first
    `tokens`.

    Where the two agree, a chosen token is the likeliest, or ties with it as closely.
    """
    found, expected = torch.stack(answer.rows)[:tokens], expected[:tokens]
    if found.shape != expected.shape or not torch.isfinite(expected).all():
        return torch.inf
    missed = (expected.amax(1) - expected[torch.arange(len(expected)), answer.tokens[:tokens]]).max()
    difference = torch.maximum((found - expected).abs().max(), missed) / expected.std()
    return float(torch.nan_to_num(difference, nan=torch.inf))
