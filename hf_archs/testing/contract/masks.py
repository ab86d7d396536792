"""Masks: every form that other libraries use is read, or refused by an error that names the shape or the value."""

from typing import Any

import pytest
import torch

from hf_archs.cache import ArchDynamicCache, ArchStaticCache
from hf_archs.registry import Architecture
from hf_archs.testing.contract.generation import generate, greedy
from hf_archs.testing.contract.models import (
    Contract,
    assert_all_close,
    assert_close,
    forward,
    gradients,
    lively,
    logits,
    tokens,
    total,
    weighed,
)

LENGTHS = (5, 1, 8)


def numbered() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, (2, 20), and the numbers of their documents, (2, 20), with 0 for pads.

    The first row has pads before, between and after the documents. The second row has documents whose numbers are not
    in order, and pads only at its end.
    """
    first = [0, 0, *[1] * 5, 2, 0, *[3] * 8, 0, 0, 0]
    second = [*[4] * 8, *[2] * 5, 7, *[0] * 6]
    numbers = torch.tensor([first, second])
    return tokens(2, 20), numbers


def follows_pairs(model: Any) -> bool:
    """Whether every layer accepts a mask of four dimensions."""
    mixers = [mixer for plan in model.config.layer_plans() for mixer in plan.mixers()]
    return all(entry.follows_pairs(config) for entry, config in mixers)


def apart(numbers: torch.Tensor) -> torch.Tensor:
    """The four-dimensional mask that is causal within documents, and in which pads see nothing."""
    same = (numbers[:, None, :, None] == numbers[:, None, None]) & (numbers != 0)[:, None, None]
    return same & torch.ones(same.shape[2:], dtype=torch.bool).tril()


class MaskContract(Contract):
    """Promises about the forms of ``attention_mask``."""

    @pytest.mark.parametrize("signal", ["numbers", "pairs"])
    def test_documents(self, model: Any, architecture: Architecture, signal: str) -> None:
        """Documents that the mask numbers, or a four-dimensional mask separates, have the logits and gradients that
        each has alone, in an encoder too.
        """
        if signal == "pairs" and not follows_pairs(model):
            return
        ids, numbers = numbered()
        mask = numbers if signal == "numbers" else apart(numbers)
        options = {"output_router_logits": False} if model.model.has_routers else {}
        encoder = lively(architecture.masked_lm_class, architecture.tiny_config())
        for reader in (model.double(), encoder.double()):
            mask = mask | mask.mT if signal == "pairs" and reader is encoder else mask
            packed = reader(ids, attention_mask=mask, **options).logits
            assert packed.isfinite().all()
            rows = [(i, numbers[i] == n) for i in range(2) for n in numbers[i].unique() if n]
            parts = [(packed[i, own], reader(ids[i, own][None], **options).logits[0]) for i, own in rows]
            for j, (found, expected) in enumerate(parts):
                assert_close(found, expected, f"document {j}", 1e-9)
            found, expected = (total(weighed(pair[k], j) for j, pair in enumerate(parts)) for k in range(2))
            assert_all_close(gradients(reader, found), gradients(reader, expected), "gradient", 1e-9)

    def test_the_cache_holds_the_last_numbered_document(self, model: Any) -> None:
        """A cache continues the last document, whatever its number: `generate` appends ones to the mask."""
        ids = tokens(1, 14)
        numbers = torch.tensor([[1] * 5 + [2] * 9])
        found = generate(model, ids, attention_mask=numbers, max_new_tokens=6)
        assert torch.equal(found[:, 14:], greedy(model, ids[:, 5:], 6)[:, 9:])
        cache = forward(model, ids[:, :8], attention_mask=numbers[:, :8], use_cache=True).cache
        found = logits(model, ids[:, 8:], attention_mask=numbers, cache=cache)
        assert_close(found, logits(model, ids[:, 5:])[:, 3:], "a cut within a document")

    def test_a_document_cannot_begin_after_a_cache(self, model: Any) -> None:
        ids, numbers = tokens(2, 9), torch.tensor([[1] * 9, [1] * 5 + [0] + [3] * 3])
        cache = model(ids[:, :5], attention_mask=numbers[:, :5], use_cache=True).cache
        with pytest.raises(
            ValueError, match=r"begins document 3 at the first new token of row 1, .* holds document 1;"
        ):
            model(ids[:, 5:], attention_mask=numbers, cache=cache)
        with pytest.raises(ValueError, match=r"prefill_chunk_size is 3, which may cut between two of them"):
            generate(model, ids, attention_mask=numbers, prefill_chunk_size=3)

    @pytest.mark.parametrize(
        ("mask", "words"),
        [
            (torch.ones(2, 4), r"has 4 columns for 6 new tokens; allowed are 6 or more"),
            (torch.ones(1, 6), r"has shape \(1, 6\); allowed are \(2, columns\)"),
            (torch.ones(6), r"has shape \(6,\); allowed are \(2, columns\)"),
            (torch.ones(2, 6, 6), r"has shape \(2, 6, 6\); allowed are \(2, columns\)"),
            (torch.tensor([[0.0] * 5 + [-torch.inf]] * 2), r"has the value -inf; allowed are 0 for pads, 1 for real"),
            (torch.tensor([[1.0] * 5 + [0.5]] * 2), r"has the value 0.5; allowed are 0 for pads, 1 for real"),
            (torch.tensor([[1] * 5 + [-1]] * 2), r"has the value -1; allowed are 0 for pads, 1 for real"),
            ([[1] * 6] * 2, r"is a list; allowed is a tensor"),
        ],
        ids=["short", "one row", "one dimension", "three dimensions", "additive", "halves", "negative", "list"],
    )
    def test_wrong_forms(self, model: Any, mask: Any, words: str) -> None:
        with pytest.raises(ValueError, match=f"attention_mask.* {words}"):
            model(tokens(2, 6), attention_mask=mask)

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_pairs(self, model: Any, implementation: str) -> None:
        """Four-dimensional masks work (bool, additive with infinity or the least value, one row for all) in one pass
        and in pieces, with every cache. If a layer cannot follow them, an error names the layer.
        """
        ids, mask = tokens(2, 13), torch.ones(2, 1, 13, 13, dtype=torch.bool).tril()
        if not follows_pairs(model):
            with pytest.raises(
                ValueError, match=r"and layer \d, a \w+, cannot follow it; allowed are masks of two dim"
            ):
                model(ids, attention_mask=mask)
            return
        model.set_attn_implementation(implementation)
        plain = logits(model, ids)
        assert_close(logits(model, ids, attention_mask=mask), plain, "all that is before")
        mask[:, :, 9:, :4] = False  # hide the first tokens from the last
        mask[1, :, 6, 2] = False
        expected = logits(model, ids, attention_mask=mask)
        assert (expected - plain)[:, :6].abs().max() == 0
        assert (expected - plain)[:, 9:].abs().max() > 1e-2
        added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        for form in (added, added.clamp(min=torch.finfo(torch.float32).min), added.double()):
            assert_close(logits(model, ids, attention_mask=form), expected, "additive")
        half = logits(model, ids, attention_mask=added.clamp(min=-1.0))  # a bias
        assert (half - expected).abs().max() > 1e-3 < (half - plain).abs().max()
        assert_close(logits(model, ids[:1], attention_mask=mask[:1]), expected[:1], "one row")
        one = torch.cat([logits(model, row[None], attention_mask=mask[:1]) for row in ids])
        assert_close(logits(model, ids, attention_mask=mask[:1]), one, "one mask for all rows")
        for static in (False, True):
            cache = ArchStaticCache(model.config, 20) if static else ArchDynamicCache(model.config)
            found = []
            for start, end in ((0, 4), (4, 5), (5, 10), (10, 11), (11, 13)):
                piece = mask[:, :, start:end, : 20 if static and start == 5 else end]
                if static and start == 5:  # one column for each place of the cache
                    piece = torch.nn.functional.pad(mask[:, :, start:end], (0, 7))
                found.append(logits(model, ids[:, start:end], attention_mask=piece, cache=cache))
            assert_close(torch.cat(found, 1), expected, "in pieces")

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_pairs_that_are_no_chain(self, model: Any, implementation: str) -> None:
        """Masks that are not causal chains: two answers to one prompt in one row, each with its own positions; and a
        prompt whose tokens all see each other."""
        if not follows_pairs(model):
            return
        model.set_attn_implementation(implementation)
        prompt, answers = tokens(1, 6), [tokens(1, n, seed=n) for n in (4, 5)]
        mask = torch.ones(15, 15, dtype=torch.bool).tril()
        mask[10:, 6:10] = False
        positions = torch.tensor([[*range(6), *range(6, 10), *range(6, 11)]])
        ids = torch.cat([prompt, *answers], 1)
        found = logits(model, ids, attention_mask=mask[None, None], position_ids=positions)
        for answer, part in zip(answers, found[:, 6:].split((4, 5), 1)):
            assert_close(part, logits(model, torch.cat([prompt, answer], 1))[:, 6:], "an answer")
        if model.config.layer_types == ["full_attention"] * model.config.num_hidden_layers:
            cache = ArchDynamicCache(model.config)
            pieces = [
                logits(model, ids[:, a:b], attention_mask=mask[None, None, a:b, :b], position_ids=p, cache=cache)
                for a, b, p in ((0, 8, positions[:, :8]), (8, 15, positions[:, 8:]))
            ]
            assert_close(torch.cat(pieces, 1), found, "in pieces")
        else:
            cache = model(ids[:, :8], use_cache=True).cache
            with pytest.raises(
                ValueError, match=r"with a window count the 8 tokens in the cache; allowed are 8 and th"
            ):
                model(ids[:, 8:9], attention_mask=mask[None, None, 8:9, :9], position_ids=positions[:, :1], cache=cache)
        mask[:6, :6] = True
        other = logits(model, ids, attention_mask=mask[None, None], position_ids=positions)
        assert (other - found)[:, 0].abs().max() > 1e-3, "the first token sees the prompt"

    def test_pairs_that_are_wrong(self, model: Any) -> None:
        if not follows_pairs(model):
            return
        ids, mask = tokens(2, 6), torch.ones(2, 1, 6, 6, dtype=torch.bool).tril()
        wrong = {
            r"has shape \(3, 1, 6, 6\); allowed are, of four dimensions, \(2 or 1, 1, 6, 6\)": mask[[0, 1, 0]],
            r"has shape \(2, 4, 6, 6\); allowed": mask.expand(-1, 4, -1, -1),
            r"has shape \(2, 1, 6, 5\); allowed": mask[..., :5],
            r"has dtype torch.int64; allowed are torch.bool": mask.long(),
            r"has the value 1.0; allowed are 0 for what is seen and negative": mask.float(),
        }
        for words, form in wrong.items():
            with pytest.raises(ValueError, match=f"attention_mask.* {words}"):
                model(ids, attention_mask=form)
        with pytest.raises(ValueError, match=r"seq_idx or cu_seq_lens_q was passed beside it; allowed is one"):
            model(ids, attention_mask=mask, seq_idx=torch.zeros_like(ids))
        with pytest.raises(ValueError, match=r"position_ids has shape \(2, 7\) beside .* allowed are \(2 or 1, 6\)"):
            model(ids, attention_mask=mask, position_ids=torch.zeros(2, 7, dtype=torch.long))
        cache = model(ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6]), use_cache=True).cache
        with pytest.raises(
            ValueError, match=r"of the 6 tokens in the cache some are pads or belong to other documents"
        ):
            model(ids[:, :1], attention_mask=torch.ones(2, 1, 1, 7, dtype=torch.bool), cache=cache)
        assert cache.get_seq_length() == 6, "a forward that is refused counts nothing"
