"""How models write calls of tools, and which way a chat template teaches its model."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

_NAME = "NAME"


@dataclass(frozen=True)
class CallSyntax:
    """A way to write calls. All of an answer's calls are `before call (between call)* after`, a call is
    `head arguments tail`, the arguments are a JSON object.

    Attributes:
        head: with `NAME` in the function's place.
        trigger: what begins calls, and nothing else; a prefix of the first call.
        markers: parts that may be special tokens of a vocabulary.
        several: whether an answer may hold more than one call.
        taught: whether the chat template itself tells the model of tools and of this syntax.
    """

    name: str
    trigger: str
    head: str
    tail: str
    before: str = ""
    between: str = ""
    after: str = ""
    markers: tuple[str, ...] = ()
    several: bool = True
    taught: bool = True

    def head_of(self, function: str) -> str:
        return self.head.replace(_NAME, function)


#: Hermes 2 and 3, Qwen 2.5 and 3.
HERMES = CallSyntax(
    name="hermes",
    trigger="<tool_call>",
    head=f'<tool_call>\n{{"name": "{_NAME}", "arguments": ',
    tail="}\n</tool_call>",
    between="\n",
    markers=("<tool_call>", "</tool_call>"),
)
#: Hermes' syntax for a model whose template knows of no tools: a system message of ours tells it.
TOLD = replace(HERMES, name="told", taught=False)
#: Llama 3.1 and later. Its template accepts one call a message.
LLAMA3 = CallSyntax("llama3", '{"name": "', f'{{"name": "{_NAME}", "parameters": ', "}", several=False)
#: Mistral up to its tokenizer's version 7, with a space behind the marker or without.
MISTRAL = CallSyntax(
    name="mistral",
    trigger="[TOOL_CALLS]",
    head=f'{{"name": "{_NAME}", "arguments": ',
    tail="}",
    before="[TOOL_CALLS][",
    between=", ",
    after="]",
    markers=("[TOOL_CALLS]",),
)
MISTRAL_SPACED = replace(MISTRAL, before="[TOOL_CALLS] [")
#: Mistral from version 11 on.
MISTRAL_ARGS = CallSyntax(
    "mistral", "[TOOL_CALLS]", f"[TOOL_CALLS]{_NAME}[ARGS]", "", markers=("[TOOL_CALLS]", "[ARGS]")
)


def syntax_of(template: str) -> CallSyntax:
    """The syntax that a chat template teaches; `TOLD` where it names no tools, or a syntax that is not known here."""
    if not re.search(r"\btools\b", template):
        return TOLD
    if "[TOOL_CALLS]" in template:
        if "[ARGS]" in template:
            return MISTRAL_ARGS
        return MISTRAL_SPACED if "[TOOL_CALLS] [" in template else MISTRAL
    if "<tool_call>" in template and "<function=" not in template and "arguments" in template:
        return HERMES
    if "<|start_header_id|>" in template and '"parameters": ' in template:
        return LLAMA3
    return TOLD
