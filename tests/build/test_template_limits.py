"""A chat template that loops or grows for ever is refused in a line; others are written as ever."""

import resource

import pytest
from messages import SIZES, assistant, coloured, encode, user
from tiny import CHATML
from transformers.utils import chat_template_utils

import vora
from vora.build import template_limits

GO = [{"role": "user", "content": "go"}]
LOOP = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
MACRO = "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}"


def grown(start, change):
    return f"{{% set ns = namespace(x={start}) %}}{{% for i in range(60) %}}{{% set ns.x = {change} %}}{{% endfor %}}"


@pytest.fixture
def hostile(llm_folder, monkeypatch):
    monkeypatch.setattr(template_limits, "MOST_STEPS", 200_000)
    processor = vora.VoraProcessor.from_llm(llm_folder, **SIZES)

    def render(template):
        return processor.set_template(template).apply_chat_template(GO)

    return render


@pytest.mark.parametrize(
    "template",
    [
        LOOP,
        "{% if messages[0].content == 'go' %}" + LOOP + "{% endif %}",  # for some conversations only
        "{% for a in range(100000) %}" + "a" * 100_000 + "{% endfor %}",
        "{% for a in range(100000) %}{{ 'a' * 100000 }}{% endfor %}",
        "{% set x %}" + "{% for a in range(99999) %}" + "a" * 9999 + "{% endfor %}{% endset %}",
        "{{ 'a' * 10**10 }}",
        "{% if false %}{{ 10**10**8 }}{% endif %}{{ 9**9**9 }}",
        "{% set x = 'ab' %}" + "{% set x = x ~ x %}" * 40,
        grown("'ab'", "ns.x + ns.x"),
        grown("['a']", "[ns.x, ns.x]") + "{{ ns.x }}",
        grown("{'a': 1}", "dict(a=ns.x, b=ns.x)") + "{{ ns.x | tojson }}",
        grown("namespace(a=1)", "namespace(a=ns.x, b=ns.x)") + "{{ ns.x }}",
        grown("99**99", "ns.x * ns.x"),
        *("{% set x = ('f' * 3000000) | int(0, 16) %}{{ x " + by + " (x // 9**9) }}" for by in ("%", "//", "*")),
        "{{ 'a'.center(10**10) }}",
        "{{ 'a' | center(1000000000) }}",
        "{% filter center(1000000000) %}a{% endfilter %}",
        "{{ [1] | map('center', 1000000000) | list }}",
        "{{ [1] | batch(1000000000, 'a') | list }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ " + "'a' | replace('a', 'aaaaaaaaaa')" + " | replace('a', 'aaaaaaaaaa')" * 12 + " }}",
        "{% set x = 'a' * 1000000 %}{{ ([x] * 1000) | join }}",
        "{{ ('a ' * 2000000) | title }}",  # filters and methods that make something of each character
        "{{ ('a' * 2000000) | sort | length }}",
        "{{ ('a' * 2000000) | list | length }}",
        "{{ 'a' * 2000000 | string | wordcount }}{{ ('<a>' * 2000000) | striptags }}",
        "{{ ('a ' * 2000000).split() | length }}{{ ('a ' * 2000000).split(' ') | length }}",
        "{{ ('a' * 100000).translate({97: 'b' * 10000}) | length }}",
        "{{ ''.join(['a' * 1000000] * 40) | length }}",
        "{{ (['a' * 1000000] * 40) | join | length }}",
        "{% set x = 'a' * 1000000 %}{% for i in range(100000) %}{% set y = x[1:] %}{% endfor %}",
        "{% set x = 'a' * 1000000 %}{% for i in range(100000) %}{% if 'b' in x %}{% endif %}{% endfor %}",
        MACRO,
        "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
        "{% for a in [range(100000)] recursive %}{{ loop(range(100000)) }}{% endfor %}",
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{#" + "a" * 2_000_000 + "#}",
    ],
)
def test_a_template_that_does_not_end_is_refused(hostile, template):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="chat template is refused, .*: set another one") as caught:
        hostile(template)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_a_template_that_takes_long_is_refused(hostile, monkeypatch):
    monkeypatch.setattr(template_limits, "MOST_SECONDS", 0.0)
    with pytest.raises(ValueError, match="takes longer than 0 seconds"):
        hostile("{% for a in range(10000) %}{% endfor %}")


@pytest.mark.parametrize(
    "template, cause",
    [
        ("{{ 1 + messages[0]['content'] }}", r"unsupported operand type\(s\) for \+: 'int' and 'str'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% include 'a' %}", "no loader for this environment specified"),
        ("{% import 'a' as b %}", "no loader for this environment specified"),
        ("{{ 1e308 ** 9 }}", ".*out of range.*"),
        ("{% macro m() %}{% endmacro %}{% call m() %}{% endcall %}", ".*special caller argument.*"),
        ("{{ '%d' % messages[0].content }}", "%d format: a real number is required, not str"),
        ("{{ '{'.format(1) }}", "Single '{' encountered in format string"),
        ("{% for a in [1] %}" * 25 + "{% endfor %}" * 25, "too many statically nested blocks.*"),
    ],
)
def test_what_python_raises_in_a_template_is_told_in_a_line(hostile, template, cause):
    with pytest.raises(ValueError, match=f"^The model's chat template does not take the conversation: {cause}$"):
        hostile(template)


def test_members_of_a_list_that_was_added_to_are_still_counted(hostile):
    many = "{% set ns = namespace(x=['a' * 10000]) %}{% for i in range(16) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
    assert hostile(many + "{{ ns.x | length }}") == str(2**16)
    for use in ("{{ ns.x }}", "{{ '%s' % ns.x }}", "{{ {}[ns.x].a }}", "{{ ns.x ~ '' }}", "{{ [ns.x] | length }}"):
        with pytest.raises(ValueError, match="more than 200,000 steps: .*, or shorten the conversation"):
            hostile(many + use)


FULL = (
    "{%- set ns = namespace(n=0, last='') -%}{%- macro say(m, k=1) -%}[{{ m['role'] | upper }}]{{ m.content | trim }}"
    "{%- endmacro %}{% for m in messages if m.role != 'tool' %}{% if loop.first and m['role'] == 'system' %}\n"
    "  {{- '<s>' + m.content.split('b')[-1] ~ loop.index0 }}{% continue %}{% endif %}\n{{ say(m) }}{{ '-' * 3 }}"
    "{%- set ns.n = ns.n + m.content | length %}{% set ns.last = m.content[::-1] %}{% if loop.last %}|{% endif %}"
    "{% endfor %}{{ ns.n }}{{ ns.last }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}"
    "{% generation %}{{ messages[-1] | tojson(indent=1) }}{% endgeneration %}{{ '%02d' % 7 }}{{ 'a{}'.format(1) }}"
    "{{ {'a': [1, (2, 3)]} }}{% if 'x' in messages[0] or none is none %}{% else %}E{% endif %}{{ bos_token }}"
    "{{ messages[0].replace is defined }}{% for k, v in messages[0].items() %}{{ k }}={{ v }}{% endfor %}\n"
)


@pytest.mark.parametrize("template", [FULL, CHATML])
def test_other_templates_are_written_as_ever(template):
    given = {"messages": [{"role": "system", "content": "abc"}, *GO, assistant(" yes ")], "bos_token": "<s>"}
    plain = chat_template_utils._compile_jinja_template(template)
    assert not isinstance(plain.environment, template_limits.LimitedEnvironment)  # outside nothing is limited
    with template_limits.template_limits():
        limited = chat_template_utils._compile_jinja_template(template)
        assert isinstance(limited.environment, template_limits.LimitedEnvironment)
        assert limited.render(**given) == plain.render(**given)


def test_long_texts_may_be_split_joined_and_trimmed(hostile):
    """As templates do with what an assistant thought, for texts of nearly a million characters."""
    text = "{% set x = 'ab ' * 300000 ~ '</think>' ~ 'yes' %}"
    use = "{{ x.split('</think>')[-1] }}{{ (x | trim).startswith('a') }}{{ [x, 'c'] | join('-') | length }}"
    assert hostile(text + use) == "yesTrue900013"


def test_a_processor_asks_with_images_and_a_long_history(processor):
    turns = [message for _ in range(100) for message in (*GO, assistant("yes"))]
    found = encode(processor, [*turns, user(coloured("red"), "what?")])
    assert (found["input_ids"] == processor.image_token_id).sum() == 9
    turns = [message for _ in range(200) for message in (user("word " * 2000), assistant("word " * 2000))]
    assert processor.apply_chat_template(turns[:-1]).count("word") == 399 * 2000
    text = processor.apply_chat_template([*GO, assistant("it is")], continue_final_message=True)
    assert text.endswith("it is")
