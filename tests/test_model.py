"""The BERT of model.py: equal to that of `transformers`."""

import dataclasses

import pytest
import torch
import transformers
from reference import CLOSE, random_config, random_inputs, reference_bert

from model import Bert, BertConfig
from support.checkpoint import load_model

IDS = torch.arange(20).reshape(2, 10)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_logits_hidden_states_and_scores_equal_transformers(tmp_path, seed, padding):
    theirs = reference_bert(seed)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path).eval()
    ids, types, mask = random_inputs(theirs.config, seed)
    mask = mask if padding else None
    queries, keys = [], []
    for layer in theirs.bert.encoder.layer:
        layer.attention.self.query.register_forward_hook(lambda module, args, result: queries.append(result))
        layer.attention.self.key.register_forward_hook(lambda module, args, result: keys.append(result))
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, token_type_ids=types, output_hidden_states=True,
                          output_attentions=True)
        positions = torch.randperm(ids.numel())[:11]
        got = ours(ids, positions, types, mask, want_scores=True)
        pooled = theirs.bert.pooler(expected.hidden_states[-1])

    torch.testing.assert_close(got.logits, expected.prediction_logits.flatten(0, 1)[positions], **CLOSE)
    torch.testing.assert_close(got.embedding, expected.hidden_states[0], **CLOSE)
    assert len(got.hidden) == len(got.scores) == theirs.config.num_hidden_layers
    for mine, other in zip(got.hidden, expected.hidden_states[1:], strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)
    torch.testing.assert_close(ours.pooled(got.hidden[-1]), pooled, **CLOSE)

    heads = theirs.config.num_attention_heads
    for mine, q, k, attention in zip(got.scores, queries, keys, expected.attentions, strict=True):
        q, k = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k))  # (B,H,S,K)
        per_head = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5  # (B,H,S,S)
        torch.testing.assert_close(mine, per_head.mean(1), **CLOSE)
        if not padding:  # these scores are really the ones that the softmax of transformers is given
            torch.testing.assert_close(per_head.softmax(-1), attention, **CLOSE)


def test_parameter_count_equals_transformers_with_the_tied_decoder_counted_once():
    theirs = reference_bert(2, transformers.BertForMaskedLM)
    assert Bert(BertConfig(**random_config(2)), pooler=False).parameter_count() == theirs.num_parameters()


def test_logits_and_scores_are_computed_only_on_request(checkpoint):
    bert = load_model(checkpoint).eval()
    out = bert(IDS)
    assert out.logits is None and out.scores == [None] * len(out.hidden)
    assert bert(IDS, torch.tensor([3])).logits.shape == (1, bert.config.vocab_size)


def test_token_types_default_to_zero(checkpoint):
    bert = load_model(checkpoint).eval()
    assert torch.equal(bert(IDS).hidden[-1], bert(IDS, None, torch.zeros_like(IDS)).hidden[-1])
    assert not torch.allclose(bert(IDS).hidden[-1], bert(IDS, None, torch.ones_like(IDS)).hidden[-1])


def test_padding_does_not_influence_other_tokens(checkpoint):
    bert = load_model(checkpoint).eval()
    other, mask = IDS.clone(), torch.ones(2, 10)
    other[:, 7:], mask[:, 7:] = 60, 0
    torch.testing.assert_close(bert(IDS, attention_mask=mask).hidden[-1][:, :7],
                               bert(other, attention_mask=mask).hidden[-1][:, :7])
    assert not torch.allclose(bert(IDS).hidden[-1][:, :7], bert(other).hidden[-1][:, :7])


def test_initial_weights_follow_bert():
    torch.manual_seed(0)
    for name, parameter in Bert(BertConfig(500, 64, 1, 4, 256)).named_parameters():
        if parameter.dim() == 2 and parameter.numel() > 10_000:
            assert abs(parameter.std().item() - 0.02) < 0.001, name
        elif parameter.dim() == 1:
            assert (parameter == name.endswith("LayerNorm.weight")).all(), name


def test_dropout_acts_on_hidden_states_and_on_attention_and_can_be_changed(checkpoint):
    bert = load_model(checkpoint).train()
    bert.set_dropout(0)
    assert torch.equal(bert(IDS).hidden[-1], bert(IDS).hidden[-1])
    assert bert.config.hidden_dropout_prob == bert.config.attention_probs_dropout_prob == 0.1
    bert.set_dropout(0.5)
    assert not torch.equal(bert(IDS).embedding, bert(IDS).embedding)
    for hidden, attention in ((0.5, 0.0), (0.0, 0.5)):
        config = dataclasses.replace(bert.config, hidden_dropout_prob=hidden, attention_probs_dropout_prob=attention)
        noisy = Bert(config).train()
        assert torch.equal(noisy(IDS).embedding, noisy(IDS).embedding) == (hidden == 0)
        assert not torch.equal(noisy(IDS).hidden[0], noisy(IDS).hidden[0])
