"""DNA: reading of FASTA files, windows of both strands, Markov models by hand, bits per base."""

import gzip
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from hf_archs.data import dna

BOS, A, C, G, T, N = 2, 7, 8, 9, 10, 11


def bases(text):
    return np.array(["ACGTN".index(letter) for letter in text], np.uint8)


def test_a_fasta_file_plain_and_compressed(tmp_path):
    text = b">one first\nACGT\nacgn\n\n>two\r\nRTT\r\n"
    (tmp_path / "x.fa").write_bytes(text)
    (tmp_path / "x.fa.gz").write_bytes(gzip.compress(text))
    for name in ("x.fa", "x.fa.gz"):
        assert dna.read_fasta(tmp_path / name).tolist() == bases("ACGTACGNNNTT").tolist()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b">a\nACGTR\nGLU", "which holds 'L'; allowed are A, C, G, T and NRYSWKMBDHV-"),
        (b"ACGT", "no FASTA file: it does not begin with '>'"),
        (gzip.compress(b">a\nACGT", mtime=0)[:-9], "a damaged gzip file"),
        (None, "does not exist; get it on Debian or Ubuntu with 'apt-get download bowtie-examples"),
    ],
)
def test_what_cannot_be_read(tmp_path, content, said):
    path = tmp_path / "x.fa"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        dna.read_fasta(path)


def test_the_last_tenth_is_held_out():
    whole = bases("ACGT" * 300)
    train, held_out = dna.split(whole)
    assert (len(train), len(held_out)) == (1080, 120)
    assert np.array_equal(np.concatenate([train, held_out]), whole)
    with pytest.raises(ValueError, match="has 999 bases; a thousand"):
        dna.split(whole[:999])


def test_windows_are_of_either_strand():
    genome = bases("AACCGTNG" * 4)
    strands = ["".join("ACGTN"[b] for b in genome)]
    strands.append("".join({"A": "T", "C": "G", "G": "C", "T": "A", "N": "N"}[b] for b in reversed(strands[0])))
    seen = set()
    windows = dna.Windows(genome, 6, 200, seed=0)
    assert len(windows) == 200
    for window in (windows[i] for i in range(200)):
        ids, labels = window["input_ids"].tolist(), window["labels"].tolist()
        assert ids[0] == BOS
        assert labels[1:] == [-100 if i == N else i for i in ids[1:]]  # the first base is not predicted
        text = "".join("ACGTN"[i - A] for i in ids[1:])
        at = [strand.find(text) for strand in strands]
        assert max(at) >= 0
        seen |= {(k, place % 8) for k, place in enumerate(at) if place >= 0}
    assert len({k for k, _ in seen}) == 2
    assert torch.equal(windows[3]["input_ids"], dna.Windows(genome, 6, 9, seed=0)[3]["input_ids"])
    assert any(
        not torch.equal(windows[i]["input_ids"], dna.Windows(genome, 6, 9, seed=1)[i]["input_ids"]) for i in (0, 1, 2)
    )
    with pytest.raises(ValueError, match="block is 40; allowed are up to 32"):
        dna.Windows(genome, 40, 1, seed=0)


def test_markov_models_by_hand():
    train, held_out = bases("AACAACNAG"), bases("AACTAN")
    # order 1: A is followed by A, C, A, C and G, C by A; N is not counted
    # expected: A after A (2 + 1) / (5 + 4), C after A (2 + 1) / 9, T after C 1 / (1 + 4), A after T 1 / 4
    expected = -sum(map(math.log2, (3 / 9, 3 / 9, 1 / 5, 1 / 4))) / 4
    assert dna.markov_bits(train, held_out, 1) == pytest.approx(expected)
    # order 2: AA is followed by C twice, AC by A once; expected: C after AA, T after AC, A after CT
    expected = -sum(map(math.log2, (3 / 6, 1 / 5, 1 / 4))) / 3
    assert dna.markov_bits(train, held_out, 2) == pytest.approx(expected)


def test_bits_per_base_counts_every_known_base_once():
    """A model of the frequencies only; the last window is shorter, and N is not counted."""

    class Model(torch.nn.Module):
        device = torch.device("cpu")
        rows = []

        def forward(self, input_ids, use_cache):
            assert not use_cache
            assert (input_ids[:, 0] == BOS).all()
            self.rows += input_ids[:, 1:].tolist()
            logits = torch.full((*input_ids.shape, dna.VOCABULARY), -torch.inf)
            logits[..., [A, C, G, T]] = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
            logits[..., N] = -1e9
            return SimpleNamespace(logits=logits)

    model = Model()
    held_out = bases("AAACGTNAACC" * 3)
    told = []
    found = dna.bits_per_base(model, held_out, length=5, batch_size=3, progress=lambda *share: told.append(share))
    assert told == [(3, 9), (6, 9), (8, 9), (9, 9)]
    per_copy = 5 * 1 + 3 * 2 + 2 * 3
    assert found == pytest.approx(3 * per_copy / 30)
    assert [len(row) for row in model.rows] == [3] * 8 + [0]
    assert model.training


def test_the_tokenizer_loads_without_any_code(tmp_path):
    dna.dna_tokenizer(add_sep=True).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("acgTN\nX")["input_ids"] == [A, C, G, T, N, 6, 1]
    assert tokenizer.decode([A, C, G, T]) == "ACGT"
    assert dna.dna_tokenizer(add_bos=True)("AC")["input_ids"] == [BOS, A, C]
    assert dna.dna_tokenizer(add_bos=True, add_sep=True)("A", "C")["input_ids"] == [BOS, A, 1, C, 1]
    assert dna.dna_tokenizer()("AC")["input_ids"] == [A, C]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.padding_side) == (4, 2, "left")
