"""Small tokenizers with the special tokens and chat templates of the model families."""

import dataclasses
import json
import pathlib

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jaxrl.data.tokenizer import load_tokenizer

TEMPLATES = pathlib.Path(__file__).parent / "templates"
VOCAB_SIZE = 700


@dataclasses.dataclass(frozen=True)
class Family:
    """special: tokens of their own, the first eos. stops: those of generation_config.json. marks:
    (what of the template is replaced, by what) so that it marks what the assistant generates."""

    template: str
    special: tuple[str, ...]
    stops: tuple[str, ...]
    marks: tuple[tuple[str, str], ...]
    bos: str | None = None
    tools: bool = True
    thoughts: bool = False

    def source(self) -> str:
        return (TEMPLATES / f"{self.template}.jinja").read_text(encoding="utf-8")

    def marked(self) -> str:
        source = self.source()
        for old, new in self.marks:
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        return source


CHATML = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
LLAMA = (
    "<|eot_id|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
)
GLM = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>")
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

SMOLLM2_MARKS = (
    (
        "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}",
        "message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
    ),
)
LLAMA3_MARKS = (
    (
        "{{ content }}",
        "{% if message['role'] == 'assistant' %}"
        "{{ (bos_token if loop.first else '') + '<|start_header_id|>assistant' }}"
        "{{ '<|end_header_id|>\n\n' }}"
        "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ content }}{% endif %}",
    ),
)
LLAMA31_MARKS = (
    (
        """{{- header('assistant') + '{"name": "' + call.name + '", "parameters": ' -}}
        {{- call.arguments | tojson + '}<|eot_id|>' -}}""",
        """{{- header('assistant') -}}{%- generation -%}
        {{- '{"name": "' + call.name + '", "parameters": ' -}}
        {{- call.arguments | tojson + '}<|eot_id|>' -}}{%- endgeneration -%}""",
    ),
    (
        "{{- header(message.role) + message.content.strip() + '<|eot_id|>' -}}",
        "{{- header(message.role) -}}{%- if message.role == 'assistant' -%}{%- generation -%}"
        "{{- message.content.strip() + '<|eot_id|>' -}}{%- endgeneration -%}{%- else -%}"
        "{{- message.content.strip() + '<|eot_id|>' -}}{%- endif -%}",
    ),
)
# The header alone is the template's: the thought behind it is generated.
QWEN3_MARKS = (
    (
        "{%- if loop.index0 > ns.last_query_index %}",
        "{{- '<|im_start|>assistant\\n' }}{%- set last = loop.last %}"
        "{%- set current = loop.index0 > ns.last_query_index %}{%- generation %}"
        "{%- if current %}",
    ),
    (
        "{%- if loop.last or (not loop.last and reasoning_content) %}",
        "{%- if last or reasoning_content %}",
    ),
    (
        "{{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content",
        "{{- '<think>\\n' + reasoning_content",
    ),
    (
        """            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}""",
        """            {%- else %}{{- content }}{%- endif %}
        {%- else %}{{- content }}{%- endif %}""",
    ),
    (
        """{{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}""",
        """{{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}""",
    ),
)
AFTER_ASSISTANT = "{%- if not loop.first and loop.previtem.role == 'assistant' -%}"
GLM45_MARKS = (
    (
        """        {{- '<|assistant|>' -}}
        {%- if thought and loop.index0 > state.question -%}""",
        """        {{- '<|assistant|>' -}}{%- set current = loop.index0 > state.question -%}
        {%- generation -%}{%- if thought and current -%}""",
    ),
    (
        """            {{- '</tool_call>' -}}
        {%- endfor -%}""",
        """            {{- '</tool_call>' -}}
        {%- endfor -%}{%- endgeneration -%}""",
    ),
    # The token of the next role is generated: that the turn ends is up to the assistant.
    (
        "{{- '<|user|>\\n' + message.content -}}",
        AFTER_ASSISTANT + "{%- generation -%}{{- '<|user|>' -}}{%- endgeneration -%}{%- else -%}"
        "{{- '<|user|>' -}}{%- endif -%}{{- '\\n' + message.content -}}",
    ),
    (
        "{{- '<|observation|>' -}}",
        AFTER_ASSISTANT + "{%- generation -%}{{- '<|observation|>' -}}{%- endgeneration -%}"
        "{%- else -%}{{- '<|observation|>' -}}{%- endif -%}",
    ),
)

FAMILIES = {
    "smollm2": Family("smollm2", CHATML, ("<|im_end|>",), SMOLLM2_MARKS, tools=False),
    "qwen3": Family(
        "qwen3", CHATML + TAGS, ("<|im_end|>", "<|endoftext|>"), QWEN3_MARKS, thoughts=True
    ),
    "llama3": Family(
        "llama3", LLAMA, ("<|eot_id|>",), LLAMA3_MARKS, bos="<|begin_of_text|>", tools=False
    ),
    "llama31": Family(
        "llama31", LLAMA, ("<|eot_id|>", "<|eom_id|>"), LLAMA31_MARKS, bos="<|begin_of_text|>"
    ),
    "glm45": Family(
        "glm45",
        (*GLM, "<|observation|>", *TAGS),
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
        GLM45_MARKS,
        thoughts=True,
    ),
}


def write_tokenizer(folder: pathlib.Path, family: Family) -> pathlib.Path:
    """A byte-level BPE of 700 tokens or less as a checkpoint folder holds it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=680, initial_alphabet=alphabet, show_progress=False)
    texts = [family.source(), (TEMPLATES / "README.md").read_text(encoding="utf-8"), "a\n\n\nb\n\n"]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in family.special])
    hf = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=family.special[0],
        bos_token=family.bos,
        chat_template=family.source(),
    )
    hf.save_pretrained(folder)
    stops = [hf.convert_tokens_to_ids(stop) for stop in family.stops]
    config = json.dumps({"eos_token_id": stops if len(stops) > 1 else stops[0]})
    (folder / "generation_config.json").write_text(config, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def families():
    return FAMILIES


@pytest.fixture(scope="session")
def tokenizer_folders(tmp_path_factory):
    return {
        name: write_tokenizer(tmp_path_factory.mktemp(name), family)
        for name, family in FAMILIES.items()
    }


@pytest.fixture(scope="session")
def tokenizers(tokenizer_folders):
    """Of each family the tokenizer as the trainer loads it."""
    return {name: load_tokenizer(f, VOCAB_SIZE) for name, f in tokenizer_folders.items()}
