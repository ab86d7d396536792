"""A tokenizer for DNA with the ids of HyenaDNA's, which `AutoTokenizer` loads without any code of ours."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

# the order is HyenaDNA's
_SPECIAL = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")
_BASES = "ACGTN"


def dna_tokenizer(add_sep: bool = False, model_max_length: int | None = None) -> PreTrainedTokenizerFast:
    """One token for each character: A, C, G, T and N, in either case, are 7 to 11; any other character is ``[UNK]``, 6.

    White space is passed over, as line breaks in sequence files are. The ids are those of HyenaDNA's tokenizer
    (Nguyen et al. 2023): ``[CLS]`` 0, ``[SEP]`` (end of text) 1, ``[BOS]`` 2, ``[MASK]`` 3, ``[PAD]`` 4. Pads stand on
    the left, as there.

    Args:
        add_sep: end every sequence with ``[SEP]``, as HyenaDNA's own does.
        model_max_length: the longest text for ``truncation=True``; None for no limit.
    """
    vocabulary = {token: i for i, token in enumerate((*_SPECIAL, *_BASES))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    upper = [normalizers.Replace(base.lower(), base) for base in _BASES]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s"), ""), *upper])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if add_sep:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A [SEP]", pair="$A [SEP] $B [SEP]", special_tokens=[("[SEP]", 1)]
        )
    limit = {} if model_max_length is None else {"model_max_length": model_max_length}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        cls_token="[CLS]",
        sep_token="[SEP]",
        bos_token="[BOS]",
        eos_token="[SEP]",
        mask_token="[MASK]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **limit,
    )
