"""Small random BERTs of `transformers`, to compare with."""

import torch
import transformers

CLOSE = dict(rtol=0, atol=1e-4)


def random_config(seed: int) -> dict:
    """The fields of a small BERT's config.json. The head size is 3 to 9, never BERT's 64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    heads = draw(1, 5)
    return dict(
        vocab_size=draw(40, 200), hidden_size=heads * draw(3, 9), num_hidden_layers=draw(1, 3),
        num_attention_heads=heads, intermediate_size=draw(10, 70), max_position_embeddings=draw(20, 40),
        type_vocab_size=draw(2, 3), hidden_act=("gelu", "gelu_new", "relu", "silu")[seed % 4],
        layer_norm_eps=(1e-12, 1e-5)[seed % 2])


def reference_bert(seed: int, kind=transformers.BertForPreTraining):
    """A BERT of `transformers` in which every parameter, biases and LayerNorms too, is far from its initial value."""
    torch.manual_seed(seed)
    bert = kind(transformers.BertConfig(**random_config(seed), attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in bert.parameters():
            torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3)
    return bert


def random_inputs(config, seed: int = 0):
    """Token ids, token types and a padding mask, each (B,S), for rows of different lengths; the first is full."""
    torch.manual_seed(seed)
    b, s = 3, 17
    ids = torch.randint(config.vocab_size, (b, s))
    types = torch.randint(config.type_vocab_size, (b, s))
    mask = (torch.arange(s) < torch.tensor([[s], [9], [2]])).long()
    return ids, types, mask
