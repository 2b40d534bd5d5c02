"""The chat template of tokenizers that are trained here."""

CHAT_TAGS = ("system", "user", "assistant", "end")
# <user>Hello<end><assistant>Hi<end>
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception('a role is system, user or assistant, not ' + message['role']) -}}
    {%- endif -%}
    {{- '<' + message['role'] + '>' + message['content'] + '<end>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<assistant>' -}}
{%- endif -%}
"""
