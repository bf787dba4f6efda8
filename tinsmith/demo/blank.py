"""Makes the untrained embedded model: a tokenizer learned from the corpus, a small configuration, seeded weights.

Writes a Hugging Face folder. The trained weights come later, through the API (`train_tiny`).
"""

import argparse
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tinsmith.demo.corpus import stream

VOCABULARY = 1280
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VISIBLE_TOKENS = ("<think>", "</think>")

# Words keep a following colon and digits stay alone, so that "User:" and "Assistant:" can be one token each and a
# reply such as " 142", blank line, "User:" costs five.
WORDS = r"'(?:s|t|re|ve|m|ll|d)| ?\p{L}+:?| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"

COMMON_WORDS = """\
the of and to in is that for it as was with be by on not he his but at are this have from or had an they which one you
were her all she there would their we him been has when who will more no if out so said what up its about into than
them can only other new some could time these two may then do first any my now such like our over man me even most made
after also did many before must through back years where much your way well down should because each just those people
mister how too little state good very make world still own see men work long get here between both life being under
never day same another know while last might us great old year off come since against go came right used take three
states himself few house use during without again place American around however home small found thought went say part
once general high upon school every don't does got united left number course war until always away something fact
though water less public put think almost hand enough far took head yet government system better set told nothing
night end why called eyes find going look asked later knew point next program city business give group toward
young days let room president side social given present several order national possible rather second face per among
form important often things looked early white case large big need four within felt children along saw best church
ever least power development light thing seemed family interest want members mind country area others done turned
although open god service certain kind problem began different door thus help sense means whole matter answer write
question word letter list text code language story email name following sentence explain describe example"""

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""


def make_blank(folder: Path, seed: int = 0) -> None:
    """Writes tokenizer, configuration and seeded random weights (bf16) into `folder`, created if missing."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _wrap(_learn_tokenizer(seed))
    _save_tokenizer(tokenizer, folder)
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(_configuration(tokenizer)).bfloat16()
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=[_id(tokenizer, "<|im_end|>"), _id(tokenizer, "<|endoftext|>")],
        pad_token_id=_id(tokenizer, "<|endoftext|>"),
        do_sample=True,
        temperature=1.0,
    )
    model.save_pretrained(folder)


def _save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Saves with the template inside tokenizer_config.json and a class name that older transformers know too."""
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2) + "\n")


def _configuration(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=None,
        eos_token_id=_id(tokenizer, "<|im_end|>"),
        pad_token_id=_id(tokenizer, "<|endoftext|>"),
        dtype="bfloat16",
    )


def _learn_tokenizer(seed: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(CONTROL_TOKENS) - len(VISIBLE_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in VISIBLE_TOKENS])
    if tokenizer.get_vocab_size() != VOCABULARY:
        raise ValueError(f"the corpus yields {tokenizer.get_vocab_size()} tokens; {VOCABULARY} are needed")
    return tokenizer


def _texts(seed: int) -> Iterator[str]:
    for pieces in islice(stream(seed), 1_000):
        yield from (piece.text for piece in pieces)
    yield from (f" {word}" for word in COMMON_WORDS.split())


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        chat_template=CHAT_TEMPLATE,
    )


def _id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    identity = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(identity, int)
    return identity


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_blank(arguments.folder, arguments.seed)
