"""Chat templates: what they may use, what they may not do, and which tools they take."""

import pytest

from tinsmith.api.chat.conversations import check_tools
from tinsmith.api.chat.templates import ChatTemplate, Message
from tinsmith.errors import UserError

SAID: list[Message] = [{"role": "user", "content": "<b> ü"}, {"role": "assistant", "content": "Yes "}]


def render(source: str, *, continues: bool = False, **options: object) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(SAID, continues=continues, options=options)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}{{ messages[0].content }}", "<s><b> ü"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "<b> ü"}'),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}", "assistant"),
        ("{% generation %}{{ messages[1].content }}{% endgeneration %}!", "Yes !"),
        ("a\n{% if true %}\n  {% endif %}\nb", "a\nb"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{{ enable_thinking is defined and enable_thinking }}", "True"),
    ],
)
def test_templates_have_what_they_are_written_for(source: str, text: str) -> None:
    assert render(source, enable_thinking=True) == text


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ nothing.at_all.here }}",
        "{{ 1 // 0 }}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_what_a_template_refuses_or_may_not_do_is_the_requests_error(source: str) -> None:
    with pytest.raises(UserError, match="does not take this conversation"):
        render(source)


def test_a_source_that_is_no_template_is_named() -> None:
    with pytest.raises(UserError, match="cannot be used"):
        ChatTemplate("{% for %}", {})


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "bos_token"])
def test_options_do_not_replace_what_the_server_sets(name: str) -> None:
    with pytest.raises(UserError, match=name):
        render("{{ messages }}", **{name: "mine"})


def test_a_conversation_that_goes_on_ends_with_its_last_words() -> None:
    source = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    assert render(source) == "[<b> ü][Yes ]>"
    assert render(source, continues=True) == "[<b> ü][Yes"
    with pytest.raises(UserError, match="changed by the template"):
        render("{{ messages[0].content }}", continues=True)


@pytest.mark.parametrize(
    ("source", "refused"),
    [
        ("{{ tools }}<tool_call>{}</tool_call>", None),
        ("{{ messages }}", "no place for"),
        ("{{ tools }}<|python_tag|>", "not parsed here"),
        ("{{ tools }}<tool_call><function=x></function></tool_call>", "not parsed here"),
    ],
)
def test_tools_are_refused_where_calls_could_not_be_read(source: str, refused: str | None) -> None:
    template = ChatTemplate(source, {})
    if refused is None:
        check_tools(template)
    else:
        with pytest.raises(UserError, match=refused):
            check_tools(template)
