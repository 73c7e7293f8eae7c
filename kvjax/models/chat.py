"""Chat templates: the Jinja program of a checkpoint that turns messages into the text the model was tuned on."""

import datetime
import functools
import json

import jinja2
import jinja2.ext
import jinja2.sandbox


def render(template: str, messages: list[dict], *, add_generation_prompt: bool, **special_tokens: str | None) -> str:
    """Renders `template` in a sandbox, as transformers does; special tokens that are None stay undefined.

    Raises:
      ValueError: If the template does not parse, or refuses the messages.
    """
    known = {name: token for name, token in special_tokens.items() if token is not None}
    try:
        return _compile(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=add_generation_prompt, **known
        )
    except (jinja2.TemplateError, TypeError) as error:
        roles = [message["role"] for message in messages]
        raise ValueError(f"chat: the model's template does not take messages of the roles {roles}: {error}") from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is rendered as it stands."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    # jinja's own tojson escapes for HTML
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _refuse(message: str):
    raise jinja2.TemplateError(message)
