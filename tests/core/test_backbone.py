"""The backbone: places of real tokens, bidirectional models, and refusals."""

import pytest
import torch
from torch import nn

import hf_archs
from hf_archs.layers.norm import ArchLayerNorm, ArchRMSNorm
from hf_archs.model.layout import Layout
from hf_archs.testing.contract.models import assert_close, lively, logits, tokens
from hf_archs.testing.contract.padding import KINDS, padded


@pytest.fixture(scope="module", params=["mamba", "mamba2"])
def architecture(request):
    return hf_archs.get_architecture(request.param)


@pytest.fixture(scope="module")
def model(architecture):
    return lively(architecture.causal_lm_class, architecture.tiny_config())


@pytest.fixture(scope="module")
def encoder(architecture):
    return lively(architecture.masked_lm_class, architecture.tiny_config())


class TestLayout:
    def test_real_tokens_first(self):
        mask = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
        seq_idx = torch.tensor([[7, 0, 7, 0, 1], [0, 1, 2, 3, 4], [5, 5, 5, 5, 5]])
        layout = Layout.build(mask, seq_idx)
        assert layout.order.tolist() == [[1, 3, 4, 0, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
        assert layout.restore.tolist() == [[3, 0, 4, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
        assert layout.lengths.tolist() == [3, 5, 0]
        assert layout.seq_idx.tolist() == [[0, 0, 1, 7, 7], [0, 1, 2, 3, 4], [5, 5, 5, 5, 5]]

    def test_nothing_to_do(self):
        assert Layout.build(None, None) == (None,) * 5

    def test_restore_undoes_order(self):
        mask = torch.rand(20, 33) < 0.6
        layout = Layout.build(mask, None)
        x = torch.arange(33).expand(20, -1)
        assert torch.equal(x.gather(1, layout.order).gather(1, layout.restore), x)
        assert torch.equal(mask.gather(1, layout.order), torch.arange(33) < layout.lengths[:, None])

    def test_mixers_see_trailing_pads_only(self, model):
        """Their outputs at pads are not added to the residual stream."""
        seen = []
        hook = model.model.layers[0].mixer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((args[0], kwargs["lengths"])), with_kwargs=True
        )
        outputs = []
        block = model.model.layers[0].register_forward_hook(lambda module, args, out: outputs.append((args[0], out)))
        ids, mask = padded([tokens(1, 6)[0], tokens(1, 4)[0]], "interior", 9)
        logits(model, ids, attention_mask=mask)
        hook.remove()
        block.remove()
        (hidden, lengths) = seen[0]
        assert lengths.tolist() == [6, 4]
        before, after = outputs[0]
        normed = model.model.layers[0].norm(before)
        assert torch.equal(hidden[0, :6], normed[0, mask[0].bool()])
        assert torch.equal(after[~mask.bool()], before[~mask.bool()])
        assert not torch.equal(after[mask.bool()], before[mask.bool()])


class TestBothDirections:
    def test_it_reads_both(self, encoder):
        """The first token changes the last output, and the last token the first output."""
        ids = tokens(1, 32)
        for place, seen in ((0, -1), (-1, 0)):
            other = ids.clone()
            other[0, place] = 3 + (ids[0, place] - 2) % 120
            assert (logits(encoder, other) - logits(encoder, ids))[0, seen].abs().max() > 1e-2

    def test_a_mirrored_text_is_read_the_same(self, encoder):
        """Both directions share one mixer, so a reversed text gives the reversed logits."""
        ids = tokens(2, 20)
        assert_close(logits(encoder, ids.flip(1)).flip(1), logits(encoder, ids), "mirrored")

    @pytest.mark.parametrize("kind", KINDS)
    def test_pads(self, encoder, kind):
        rows = [tokens(1, n, seed=n)[0] for n in (14, 5, 1)]
        ids, mask = padded(rows, kind if kind != "interior" else "left", 16)
        if kind == "interior":
            rows = rows[:2]
            ids, mask = padded(rows, kind, 16)
        found = logits(encoder, ids, attention_mask=mask)
        for i, row in enumerate(rows):
            assert_close(found[i, mask[i].bool()], logits(encoder, row[None])[0], f"row {i}")

    def test_documents(self, encoder):
        cut = (1, 9, 70, 4)
        rows = [tokens(1, n, seed=i)[0] for i, n in enumerate(cut)]
        ids = torch.cat(rows)[None]
        seq_idx = torch.repeat_interleave(torch.arange(4), torch.tensor(cut))[None]
        positions = torch.cat([torch.arange(n) for n in cut])[None]
        ends = torch.tensor([0, *cut]).cumsum(0).int()
        for signal in ({"seq_idx": seq_idx}, {"position_ids": positions}, {"cu_seq_lens_q": ends}):
            found = logits(encoder, ids, **signal)
            for part, row in zip(found[0].split(cut), rows):
                assert_close(part, logits(encoder, row[None])[0], f"{next(iter(signal))}, {row.numel()} tokens")

    def test_documents_and_pads(self, encoder):
        rows = [tokens(1, n, seed=n)[0] for n in (6, 9)]
        ids, mask = padded([torch.cat(rows)], "interior", 20)
        seq_idx = torch.zeros(1, 20, dtype=torch.int32)
        seq_idx[mask.bool()] = torch.tensor([0] * 6 + [1] * 9, dtype=torch.int32)
        found = logits(encoder, ids, attention_mask=mask, seq_idx=seq_idx)[mask.bool()]
        for part, row in zip(found.split((6, 9)), rows):
            assert_close(part, logits(encoder, row[None])[0], f"{row.numel()} tokens")

    def test_no_cache(self, architecture, encoder):
        assert encoder.model(tokens(1, 3), use_cache=True).past_key_values is None
        causal = architecture.causal_lm_class(architecture.tiny_config())
        cache = causal(tokens(1, 3), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="bidirectional model has no cache"):
            encoder.model(tokens(1, 3), past_key_values=cache)

    def test_a_causal_head_refuses(self, architecture):
        with pytest.raises(ValueError, match=r"bidirectional is True.*allowed is False"):
            architecture.causal_lm_class(architecture.tiny_config(bidirectional=True))

    def test_the_masked_head_does_not_change_the_callers_config(self, architecture):
        config = architecture.tiny_config()
        assert architecture.masked_lm_class(config).config.bidirectional
        assert not config.bidirectional
        architecture.causal_lm_class(config)


class TestModel:
    def test_ids_or_embeddings(self, model):
        ids = tokens(1, 5)
        embeddings = model.get_input_embeddings()(ids)
        assert torch.equal(logits(model, None, inputs_embeds=embeddings), logits(model, ids))
        for wrong in ({}, {"input_ids": ids, "inputs_embeds": embeddings}):
            with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
                model(**wrong)

    def test_a_mask_that_is_too_short(self, model):
        with pytest.raises(ValueError, match="attention_mask has 3 columns for 5 new tokens; allowed are 5 or more"):
            model(tokens(1, 5), attention_mask=torch.ones(1, 3))

    def test_logits_to_keep(self, model):
        ids = tokens(2, 9)
        whole = logits(model, ids)
        for keep, expected in ((1, whole[:, -1:]), (4, whole[:, -4:]), (torch.tensor([0, 3]), whole[:, [0, 3]])):
            assert_close(logits(model, ids, logits_to_keep=keep), expected, f"logits_to_keep={keep}")

    def test_tuples(self, model):
        ids = tokens(1, 4)
        with torch.no_grad():
            assert torch.equal(model(ids, return_dict=False)[0], model(ids).logits)

    def test_masks_of_attention_and_of_compiled_generation(self, model):
        """Of a dict of masks by layer type, the mask of the model's layer type is used, and others are ignored."""
        ids, mask = padded([tokens(1, 6)[0], tokens(1, 9)[0]], "left", 9)
        expected = logits(model, ids, attention_mask=mask)
        whole = torch.ones(2, 1, 9, 9, dtype=torch.bool)
        for others in ({}, {"full_attention": whole}):
            assert torch.equal(logits(model, ids, attention_mask={**others, "linear_attention": mask}), expected)
        plain = logits(model, ids)
        assert torch.equal(logits(model, ids, attention_mask={"linear_attention": None}), plain)
        with pytest.raises(ValueError, match=r"attention_mask has entries \['chunked'\]; allowed is one of linear_att"):
            logits(model, ids, attention_mask={"chunked": mask})

    def test_an_empty_text(self, model):
        """A row without a real token is no error and does not change other rows."""
        ids, mask = tokens(2, 5), torch.tensor([[0] * 5, [1] * 5])
        found = logits(model, ids, attention_mask=mask)
        assert found.isfinite().all()
        assert_close(found[1:], logits(model, ids[1:]), "the other row")

    def test_residual_stream(self, architecture):
        """With bf16 weights it is float32, or bf16 if the config says so."""
        for wide, dtype in ((True, torch.float32), (False, torch.bfloat16)):
            config = architecture.tiny_config(residual_in_fp32=wide)
            model = architecture.causal_lm_class(config).to(torch.bfloat16)
            with torch.no_grad():
                out = model(tokens(1, 4), output_hidden_states=True)
            assert out.logits.dtype == torch.bfloat16
            assert [hidden.dtype for hidden in out.hidden_states[1:-1]] == [dtype] * (config.num_hidden_layers - 1)

    def test_initial_scale_of_what_is_added(self, architecture):
        """Only the projections into the residual stream shrink with depth (GPT-2, section 2.3)."""
        stds = {}
        for depth, rescaled in ((1, True), (4, True), (4, False)):
            config = architecture.tiny_config(num_hidden_layers=depth, rescale_prenorm_residual=rescaled)
            model = architecture.model_class(config)
            mixer = model.layers[-1].mixer
            stds[depth, rescaled] = mixer.out_proj.weight.std().item()
            assert mixer.in_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert stds[4, True] == pytest.approx(0.02 / 2, rel=0.05)
        assert stds[1, True] == pytest.approx(0.02, rel=0.05)
        assert stds[4, False] == pytest.approx(0.02, rel=0.05)

    def test_resized_embeddings(self, architecture):
        model = lively(architecture.causal_lm_class, architecture.tiny_config())
        before = logits(model, tokens(1, 5))
        model.resize_token_embeddings(140, mean_resizing=False)
        assert model.config.vocab_size == 140
        assert torch.equal(logits(model, tokens(1, 5))[..., :128], before)
        assert isinstance(model.lm_head, nn.Linear)
        assert model.lm_head.weight is model.get_input_embeddings().weight


def test_layer_norm_and_embedding_multiplier_are_read(architecture):
    model = lively(architecture.model_class, architecture.tiny_config(norm_type="layer_norm", embedding_multiplier=8.0))
    torch.nn.init.ones_(model.norm.weight)
    torch.nn.init.zeros_(model.norm.bias)
    ids = tokens(1, 9)
    outputs = model(ids, output_hidden_states=True)
    embedded = torch.nn.functional.embedding(ids, model.embed_tokens.weight)
    assert torch.equal(outputs.hidden_states[0], 8 * embedded)
    # inputs_embeds equals the embedding's output, as in all models of transformers
    assert torch.equal(model(inputs_embeds=8 * embedded).last_hidden_state, outputs.last_hidden_state)
    assert outputs.last_hidden_state.mean(-1).abs().max() < 1e-6  # an RMSNorm does not remove the mean


@pytest.mark.parametrize("norm_type", ["rms_norm", "layer_norm"])
def test_a_norm_of_the_embeddings(architecture, norm_type):
    fields = {"norm_type": norm_type, "norm_eps": 0.1, "embedding_norm": True, "embedding_multiplier": 3.0}
    model = lively(architecture.model_class, architecture.tiny_config(**fields))
    ids = tokens(1, 9)
    embedded = 3 * torch.nn.functional.embedding(ids, model.embed_tokens.weight)
    if norm_type == "layer_norm":
        embedded = embedded - embedded.mean(-1, keepdim=True)
    normed = embedded / (embedded.square().mean(-1, keepdim=True) + 0.1).sqrt() * model.embed_norm.weight
    normed = normed + getattr(model.embed_norm, "bias", 0)
    for inputs in ({"input_ids": ids}, {"inputs_embeds": model.embed_tokens(ids)}):
        torch.testing.assert_close(model(**inputs, output_hidden_states=True).hidden_states[0], normed)
    assert architecture.model_class(architecture.tiny_config()).embed_norm is None


def test_a_layer_norm_keeps_its_input_alone():
    """Of everything of its input's size, for the backward; in half precision it is rounded before its weight."""
    norm = ArchLayerNorm(8)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, kept = torch.randn(5, 8, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = norm(x)
    assert {t.data_ptr() for t in kept if t.numel() == x.numel()} == {x.data_ptr()}
    assert torch.equal(y, torch.addcmul(norm.bias, norm.weight, nn.functional.layer_norm(x, (8,), eps=norm.eps)))
    norm.bfloat16()
    rounded = nn.functional.layer_norm(x, (8,), eps=norm.eps).bfloat16()
    assert torch.equal(norm(x), torch.addcmul(norm.bias, norm.weight, rounded))


def test_a_large_rms_norm_keeps_its_input_alone(monkeypatch):
    norm = ArchRMSNorm(8, 1e-6)
    torch.nn.init.uniform_(norm.weight)
    x = torch.randn(2, 5, 8, requires_grad=True)
    results, sizes = [], []
    for large in (2**18, 79):  # the input has 80 elements
        monkeypatch.setattr("hf_archs.kernels.rms_norm_gated.LARGE", large)
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            y = norm(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, norm.weight))))
        sizes.append(list({t.data_ptr(): t.numel() for t in saved if t.numel() >= 80}.values()))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    assert sizes == [[80, 80], [80]]
