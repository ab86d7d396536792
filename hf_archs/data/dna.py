"""DNA for training and evaluation: FASTA files, a tokenizer, windows of a sequence, Markov models, bits per base.

Letters in shapes: b batch, l length.
"""

import gzip
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

BASES = "ACGTN"
# in HyenaDNA's order
SPECIAL_TOKENS = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")
FIRST_BASE = len(SPECIAL_TOKENS)  # the id of A; C, G, T and N follow
UNKNOWN = b"NRYSWKMBDHV-"  # IUPAC's codes for one of several bases, and gaps
VOCABULARY = FIRST_BASE + len(BASES)

# Escherichia coli 536, 4,938,920 bases, from Debian's package bowtie-examples
GENOME = Path("/usr/share/doc/bowtie/examples/genomes/NC_008253.fna.gz")
HOW_TO_GET_IT = (
    "get it on Debian or Ubuntu with 'apt-get download bowtie-examples && dpkg-deb -x bowtie-examples_*.deb genome', "
    f"and pass --data genome{GENOME}; any FASTA file will do"
)


def dna_tokenizer(
    add_sep: bool = False, model_max_length: int | None = None, add_bos: bool = False
) -> PreTrainedTokenizerFast:
    """One token for each character: A, C, G, T and N, in either case, are 7 to 11; any other character is ``[UNK]``, 6.

    White space, such as the line breaks of sequence files, is ignored. The ids are those of HyenaDNA's tokenizer
    (Nguyen et al. 2023): ``[CLS]`` 0, ``[SEP]`` (end of text) 1, ``[BOS]`` 2, ``[MASK]`` 3, ``[PAD]`` 4. Padding is on
    the left, as in HyenaDNA. `AutoTokenizer` loads the saved tokenizer without this library.

    Args:
        add_sep: end every sequence with ``[SEP]``, as HyenaDNA's tokenizer does.
        model_max_length: the longest text for ``truncation=True``; None for no limit.
        add_bos: begin every sequence with ``[BOS]``, as `Windows` does and HyenaDNA's tokenizer does not.
    """
    vocabulary = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *BASES))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    upper = [normalizers.Replace(base.lower(), base) for base in BASES]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s"), ""), *upper])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if add_sep or add_bos:
        begin, end = "[BOS] " if add_bos else "", " [SEP]" if add_sep else ""
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin}$A{end}",
            pair=f"{begin}$A{end} $B{end}",
            special_tokens=[(token, vocabulary[token]) for token in ("[BOS]", "[SEP]")],
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


def read_fasta(path: str | Path) -> np.ndarray:
    """Read the bases of a FASTA file, gzipped or not.

    Records are joined, with one unknown base between them.

    Returns:
        (bases,) uint8: 0 to 3 for A, C, G and T; 4 for unknown bases, which are N, gaps and IUPAC's codes for one of
        several bases.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if the file is not a FASTA file of DNA, or its compression is damaged.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"data is {str(path)!r}, which does not exist; {HOW_TO_GET_IT}")
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"data is {str(path)!r}, which is a damaged gzip file: {error}") from error
    if not content.lstrip().startswith(b">"):
        raise ValueError(f"data is {str(path)!r}, which is no FASTA file: it does not begin with '>'")
    lines = [b"N" if line.startswith(b">") else line.strip() for line in content.lstrip().splitlines()]
    letters = np.frombuffer(b"".join(lines[1:]).upper(), np.uint8)
    codes = np.full(256, 255, np.uint8)
    codes[list(UNKNOWN)] = 4
    for code, base in enumerate(b"ACGT"):
        codes[base] = code
    bases = codes[letters]
    if (bases == 255).any():
        wrong = chr(letters[int((bases == 255).argmax())])
        raise ValueError(f"data is {str(path)!r}, which holds {wrong!r}; allowed are A, C, G, T and {UNKNOWN.decode()}")
    return bases


def split(bases: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first nine tenths, for training, and the rest, for evaluation.

    Raises:
        ValueError: if there are fewer than a thousand bases.
    """
    if len(bases) < 1000:
        raise ValueError(f"the data has {len(bases)} bases; a thousand are the least to train on and to measure with")
    cut = len(bases) * 9 // 10
    return bases[:cut], bases[cut:]


class Windows(Dataset):
    """Windows at random places of both strands: ``[BOS]`` and ``length - 1`` bases, with labels.

    The second strand is the complement, read backwards; both are the genome.

    Args:
        bases: (bases,) uint8, from `read_fasta`.
        count: number of windows; window ``i`` is the same each time it is read.

    Raises:
        ValueError: if there are fewer bases than ``length``.
    """

    def __init__(self, bases: np.ndarray, length: int, count: int, seed: int):
        if len(bases) < length:
            raise ValueError(f"block is {length}; allowed are up to {len(bases)}, the bases to train on")
        self.bases, self.length, self.count, self.seed = bases, length, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = np.random.default_rng((self.seed, index))
        start = int(generator.integers(len(self.bases) - self.length + 2))
        window = self.bases[start : start + self.length - 1]
        if generator.integers(2):
            window = np.where(window < 4, 3 - window, 4)[::-1]
        ids = torch.from_numpy(window.astype(np.int64)) + FIRST_BASE
        labels = ids.masked_fill(ids == FIRST_BASE + 4, -100)
        bos = torch.tensor([SPECIAL_TOKENS.index("[BOS]")])
        return {"input_ids": torch.cat([bos, ids]), "labels": torch.cat([bos, labels])}


@torch.no_grad()
def bits_per_base(
    model: Any,
    bases: np.ndarray,
    length: int,
    batch_size: int = 4,
    progress: Callable[[int, int], object] | None = None,
) -> float:
    """The mean loss of a causal language model, in bits per known base; every window begins without context.

    Args:
        bases: (bases,) uint8.
        length: tokens of a window: ``[BOS]`` and ``length - 1`` bases; the last window may be shorter.
        progress: called after each batch with the number of windows measured, and of all.
    """
    was_training = model.training
    model.eval()
    ids = torch.from_numpy(bases.astype(np.int64)) + FIRST_BASE
    windows = list(ids.split(length - 1))
    count = len(windows)
    nats = 0.0
    while windows:
        rows = [row for row in windows[:batch_size] if len(row) == len(windows[0])]
        windows = windows[len(rows) :]
        targets = torch.stack(rows).to(model.device)  # (b, l)
        inputs = F.pad(targets, (1, 0), value=SPECIAL_TOKENS.index("[BOS]"))[:, :-1]
        logits = model(input_ids=inputs, use_cache=False).logits.float()
        targets = targets.masked_fill(targets == FIRST_BASE + 4, -100)
        nats += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        if progress is not None:
            progress(count - len(windows), count)
    model.train(was_training)
    return nats / math.log(2) / int((bases < 4).sum())


def markov_bits(train: np.ndarray, held_out: np.ndarray, order: int) -> float:
    """Bits per base of a Markov model whose next base depends on the ``order`` bases before it.

    One is added to every count.

    Args:
        train, held_out: (bases,) uint8. The first ``order`` bases of ``held_out``, which lack context, are left out.
    """

    def words(bases: np.ndarray) -> np.ndarray:
        """Each context and its next base as one number, if all its bases are known."""
        code = np.zeros(len(bases) - order, np.int64)
        known = np.ones(len(code), bool)
        for i in range(order + 1):
            letters = bases[i : len(bases) - order + i]
            code = code * 4 + letters
            known &= letters < 4
        return code[known]

    seen, counts = np.unique(words(train), return_counts=True)
    contexts, first = np.unique(seen >> 2, return_index=True)
    totals = np.add.reduceat(counts, first)
    asked = words(held_out)

    def look_up(table: np.ndarray, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        place = np.searchsorted(table, keys).clip(max=len(table) - 1)
        return np.where(table[place] == keys, values[place], 0)

    probability = (look_up(seen, counts, asked) + 1) / (look_up(contexts, totals, asked >> 2) + 4)
    return float(-np.log2(probability).mean())
