"""The tokenizer of the embedded world: one token per word, words separated by spaces."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rltoken.tiny.world import EOS, PAD, THINK, UNK, World, vocabulary

# A user message is closed by `=`; an assistant message is what follows `<think>`, without `<eos>`.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ message['content'] + ' = ' }}"
    f"{{%- elif message['role'] == 'assistant' -%}}{{{{ '{THINK} ' + message['content'] + ' {EOS} ' }}}}"
    "{%- else -%}{{ raise_exception('the tiny world knows the roles user and assistant only') }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    f"{{%- if add_generation_prompt -%}}{{{{ '{THINK}' }}}}{{%- endif -%}}"
)


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """The tokenizer of a world.

    `<pad>`, `<eos>` and `<unk>` are special. `<think>` and `</think>` are ordinary words, so that they survive decoding
    with `skip_special_tokens=True` and reward functions see them.

    Args:
        world: Gives the vocabulary.

    Returns:
        A left-padding tokenizer whose chat template ends in `<think>` when asked for a generation prompt.
    """
    ids = {word: index for index, word in enumerate(vocabulary(world))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
