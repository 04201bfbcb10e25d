"""Chat templates: the texts of transformers, rendered where a template from others does no harm."""

import pytest

from experiments.data import templates
from experiments.trainer.options import ConfigError
from tests.experiments.data.test_answers import LLAMA2, LLAMA3, tokenizer_of

# In one template, most of what chat templates on the hub use of Jinja, and of what is added to it.
RICH = """{%- set ns = namespace(system='none', turns=0) %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {%- set ns.system = message.content | trim %}{% continue %}
    {%- endif %}
    {%- set ns.turns = ns.turns + 1 %}
    {{- '<|start|>' + message.role + '<|end|>' }}
    {%- if message.role == 'assistant' %}
        {% generation %}{{ message.content }}<|eot|>{% endgeneration %}
    {%- else %}
        {{- message | tojson(indent=1) }}
    {%- endif %}
    {% if loop.index > 7 %}{% break %}{% endif %}
{%- endfor %}
{{ ns.system }} {{ ns.turns }} {{ date_string }} {{ bos_token }}{{ eos_token }}
{%- if tools is not none or documents is not none %}tools{% endif %}
{%- if add_generation_prompt %}<|start|>assistant{% endif %}
"""
CHAT = [
    [
        {"role": "system", "content": " be <brief> "},
        {"role": "user", "content": 'Grüße, "数学" & 🙂\n'},
        {"role": "assistant", "content": "yes"},
    ],
    [{"role": "user", "content": str(i)} for i in range(9)],
]


@pytest.mark.parametrize("template", [RICH, LLAMA2, LLAMA3], ids=["rich", "llama2", "llama3"])
def test_texts_are_those_of_transformers(template):
    tokenizer = tokenizer_of(template)
    for generate in (False, True):
        expected = tokenizer.apply_chat_template(
            CHAT, tokenize=False, add_generation_prompt=generate, date_string="26 Jul 2024"
        )
        special = dict(tokenizer.special_tokens_map)
        assert templates.render(template, CHAT, special, generate=generate) == expected


def test_a_template_that_asks_for_today_gets_the_same_date_on_every_day():
    (text, _) = templates.render("{{ strftime_now('%d %b %Y') }}", CHAT, {}, generate=True)
    assert text == "26 Jul 2024"


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ATTACKS = {
    "does not end": (ENDLESS, "does not end, or takes too much memory"),
    "a power that does not end": ("{{ 9 ** (9 ** 9) }}", "does not end, or takes too much memory"),
    "memory": ("{{ 'a' * 10 ** 10 }}", "more than 512 MiB of memory"),
    "much text": ("{% for i in range(99999) %}{{ 'aaaaaaaa' }}{% endfor %}", "more than 1000"),
    "recursion": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
    "nesting": ("{{" + "(" * 10_000 + "1" + ")" * 10_000 + "}}", "RecursionError"),
    "a number of a million digits": ("{{ " + "9" * 10**6 + " }}", "4300 digits"),
    "internals": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "globals": ("{{ cycler.__init__.__globals__.os.popen('id') }}", "SecurityError"),
    "a namespace's class": ("{% set n = namespace(__class__=1) %}", "SecurityError"),
    "changing the messages": ("{{ messages.append(1) }}", "SecurityError"),
    "another file": ("{% include '/etc/passwd' %}", "no loader"),
    "no template": ("{% if", "TemplateSyntaxError"),
    "its own refusal": ("{{ raise_exception('only\n\tone turn') }}", "only one turn"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_template_that_does_harm_is_refused_in_one_line(attack, monkeypatch):
    template, message = ATTACKS[attack]
    # What does not end takes all of its time. The others end by themselves: starting a process and
    # reading a million digits took more than a second on a busy machine.
    if "does not end" in message:
        monkeypatch.setattr(templates, "_SECONDS", 1)
    with pytest.raises(ConfigError, match=message) as caught:
        templates.render(template, [[{"role": "user", "content": "a"}]], {}, generate=True)
    assert str(caught.value).startswith("`model`: its chat template cannot be rendered: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_template_that_waits_is_stopped_by_the_clock(monkeypatch):
    """The clock stops it after half a second, long before 5 s of processor time are used."""
    monkeypatch.setattr(templates, "_PATIENCE", 0.1)
    with pytest.raises(ConfigError, match=r"it did not end within 0\.5 s"):
        templates.render(ENDLESS, CHAT, {}, generate=True)
