"""The engine as a program has it: the same tokens as plain transformers, for any expert, in one batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
import torch
from engine.family import Family, tokenizer_of
from patience import PATIENCE

import meswitch_cli as meswitch
from meswitch_cli.engine.contract import EngineError, UnknownExpertError
from meswitch_cli.errors import ArtifactError, UsageError
from zoo.tiny import make_pair

SMALL = {"max_model_len": 128, "cache_tokens": 4096, "page_size": 8, "device": "cpu"}
#: Greedy, so that plain transformers can say what must come.
PLAIN = {"temperature": 0, "ignore_eos": True, "max_tokens": 6}


def _greedy(family: Family, expert: str, ids: list[int]) -> tuple[int, ...]:
    with torch.inference_mode():
        out = family.references[expert].generate(
            torch.tensor([ids]), max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    return tuple(out[0, len(ids) :].tolist())


def test_prompts_for_several_experts_go_in_one_batch(family: Family) -> None:
    prompts, names = ["what is 12", "def f(x)", "hello"], ["alpha", "beta", "base"]
    with meswitch.Engine(family.base, {name: family.artifacts[name] for name in ("alpha", "beta")}, **SMALL) as engine:
        done = engine.generate(prompts, expert=names, **PLAIN)
        for completion, prompt, name in zip(done, prompts, names, strict=True):
            folder = family.artifacts.get(name, family.base)
            ids = tokenizer_of(folder).encode(prompt)
            assert completion.tokens == _greedy(family, name, ids)
        one = engine.generate(prompts[1], expert="beta", **PLAIN)
        assert (one.text, one.tokens) == (done[1].text, done[1].tokens)
        assert set(engine.experts()) == {"alpha", "beta"}
        with pytest.raises(UnknownExpertError):
            engine.generate("x", expert="gamma")
        engine.load_expert("gamma", str(family.artifacts["gamma"]))
        ids = tokenizer_of(family.artifacts["gamma"]).apply_chat_template(
            [{"role": "user", "content": "hi"}], add_generation_prompt=True, return_dict=False
        )
        answer = engine.chat("hi", expert="gamma", **PLAIN)
        assert answer.tokens == _greedy(family, "gamma", ids)
        streamed = engine.stream([{"role": "user", "content": "hi"}], expert="gamma", **PLAIN)
        assert "".join(streamed) == answer.text
        engine.unload_expert("gamma")
        assert set(engine.experts()) == {"alpha", "beta"}
        for wrong, message in (({"temprature": 0}, "no such sampling"), ({"expert": ["alpha"] * 2}, "2 names for 1")):
            with pytest.raises(UsageError, match=message):
                engine.generate(["x"], **wrong)
        left = engine.stream("hello", expert="alpha", temperature=0, ignore_eos=True)
        next(left)
        left.close()  # what is left of it is cancelled: the next call is answered
        assert engine.generate("hello", **PLAIN).finish_reason == "length"
        assert len(engine.generate("hello", ignore_eos=True).tokens) > 100  # up to what the context leaves
    with pytest.raises(EngineError):
        engine.generate("x")


def test_an_experts_own_sampling_is_the_default(tmp_path: Path) -> None:
    base, expert = make_pair(tmp_path, dtype=torch.float32, relative_delta=0.2)
    (expert / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    artifact = meswitch.compress(base, expert, tmp_path / "art", bits=4)
    call = {"expert": "own", "ignore_eos": True, "max_tokens": 16}
    with meswitch.Engine(base, {"own": artifact}, **SMALL) as engine:
        greedy = engine.generate("hello", temperature=0, **call)
        assert engine.generate("hello", **call).tokens == greedy.tokens
        assert engine.generate("hello", temperature=None, **call).tokens == greedy.tokens
        assert engine.generate("hello", temperature=1, seed=1, **call).tokens != greedy.tokens
        chat = engine.chat("hello", temperature=0, **call)
        assert engine.chat("hello", **call).tokens == chat.tokens
        assert "".join(engine.stream("hello", **call)) == chat.text
        of_base = [engine.generate("hello", **(call | {"expert": "base", "seed": seed})).tokens for seed in (1, 2)]
        assert of_base[0] != of_base[1]


def test_what_cannot_be_served_is_refused_at_the_start(
    family: Family, tmp_path_factory: pytest.TempPathFactory
) -> None:
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(ArtifactError, match="not an artifact"):
        meswitch.Engine(family.base, {"x": empty}, **SMALL)
    with pytest.raises(UsageError, match="no such setting"):
        meswitch.Engine(family.base, slot=3)


def test_a_server_in_a_block(family: Family) -> None:
    opened = meswitch.open_artifact(family.artifacts["alpha"])
    with meswitch.serve(family.base, {"alpha": opened}, port=0, api_keys=("secret",), **SMALL) as server:
        body = {"model": "alpha", "prompt": "what is 12", "max_tokens": 6, "temperature": 0}
        url = f"{server.address}/v1/completions"
        assert httpx2.post(url, json=body, trust_env=False, timeout=PATIENCE).status_code == 401
        head = {"Authorization": "Bearer secret"}
        answer = httpx2.post(url, json=body, headers=head, trust_env=False, timeout=PATIENCE).json()
        assert answer["model"] == "alpha" and answer["usage"]["completion_tokens"] > 0
        assert server.warnings == ()
        with pytest.raises(meswitch.MeswitchError, match="choose another"):
            meswitch.serve(family.base, port=int(server.address.rpartition(":")[2]), **SMALL)
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{server.address}/health", trust_env=False)
    with pytest.raises(UsageError, match="no such setting: slot"):
        meswitch.serve(family.base, slot=3)


@pytest.mark.parametrize("call", ["Engine", "serve"])
def test_a_program_that_stops_nothing_ends(family: Family, call: str) -> None:
    settings = SMALL if call == "Engine" else SMALL | {"port": 0}
    program = f"import meswitch_cli as meswitch\nrunning = meswitch.{call}({str(family.base)!r}, **{settings})\n"
    use = "running.generate('x', max_tokens=2).text" if call == "Engine" else "running.address"
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"{program}print(bool({use}))"], capture_output=True, text=True, timeout=PATIENCE
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
    assert "Traceback" not in done.stderr and "Fatal" not in done.stderr
