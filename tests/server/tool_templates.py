"""Chat templates that are short, and call tools as those of four families do."""

from __future__ import annotations

_TURN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
_END = (
    "{% if m.role == 'assistant' and not loop.last %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_NAMES = "{% for t in tools or [] %}({{ t.function.name }}){% endfor %}"
_CALL = "{% for c in m.tool_calls or [] %}"

HERMES = (
    f"{_NAMES}{_TURN}{_CALL}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    f"{_END}"
)
LLAMA = (
    f"{_NAMES}<|start_header_id|>{_TURN}"
    "{% if m.tool_calls and m.tool_calls | length > 1 %}{{ raise_exception('one call') }}{% endif %}"
    f'{_CALL}{{"name": "{{{{ c.function.name }}}}", '
    '"parameters": {{ c.function.arguments | tojson }}}{% endfor %}'
    f"{_END}"
)
MISTRAL = (
    f"{_NAMES}{_TURN}{{% if m.tool_calls %}}[TOOL_CALLS] [{_CALL}"
    "{% if c.id | length != 9 %}{{ raise_exception('nine letters') }}{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, "id": "{{ c.id }}"}'
    f"{{% if not loop.last %}}, {{% endif %}}{{% endfor %}}]{{% endif %}}{_END}"
)
MISTRAL_ARGS = (
    f"{_NAMES}{_TURN}{_CALL}[TOOL_CALLS]{{{{ c.function.name }}}}[ARGS]{{{{ c.function.arguments | tojson }}}}"
    f"{{% endfor %}}{_END}"
)

#: By the syntax's name and, where two share it, a number.
TEMPLATES = {"hermes": HERMES, "llama3": LLAMA, "mistral": MISTRAL, "mistral args": MISTRAL_ARGS}
