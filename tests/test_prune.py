"""Structure table, sensitivity, schedule and cut, against masked models, closed forms and counts by hand."""

import copy
import gc
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import prune
from distill import Distiller
from model import Bert, BertConfig, InputError, LayerNorm
from prune import Widths

CONFIG = dict(vocab_size=97, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
              max_position_embeddings=16, layer_norm_eps=1e-12)
ALPHAS = dict.fromkeys(("mlm", "pred", "hidn", "emb", "attn"), 1.0)
IDS = torch.arange(30).reshape(2, 15) * 3 % 97
POSITIONS = torch.arange(30)


def random_bert(**changes) -> Bert:
    """A BERT in float64 whose every parameter, biases and LayerNorms too, is far from its initial value."""
    torch.manual_seed(1)
    bert = Bert(BertConfig(**CONFIG | changes)).double().eval()
    for p in bert.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.3)
    return bert


def outputs(bert: Bert) -> list[torch.Tensor]:
    out = bert(IDS, POSITIONS)
    return [out.logits, out.embedding, *out.hidden, bert.pooled(out.hidden[-1])]


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor]):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def cut(bert, keep, **widths):
    prune.cut(bert, keep, Widths.of(bert.config)._replace(**widths))


# --------------------------------------------------------------------------------------------- exactness of the cut


def test_feed_forward_cut_equals_zeroed_neurons():
    bert = random_bert()
    masked = copy.deepcopy(bert)
    keep = {f"feed_forward.{i}": torch.randperm(40)[:23].sort().values for i in range(2)}
    for i, layer in enumerate(masked.bert.layers):
        gone = [j for j in range(40) if j not in keep[f"feed_forward.{i}"]]
        layer.output.dense.weight.data[:, gone] = 0
    cut(bert, keep, intermediate=23)
    assert bert.bert.layers[1].intermediate["dense"].weight.shape == (23, 24)
    assert_same(outputs(bert), outputs(masked))


def test_value_output_cut_equals_zeroed_dimensions():
    bert = random_bert()
    masked = copy.deepcopy(bert)
    keep = {"value_output.0": torch.tensor([0, 2, 7, 9, 12, 17, 18, 23]), "query_key.0": torch.arange(24),
            "value_output.1": torch.tensor([1, 3, 6, 8, 14, 16, 19, 20]), "query_key.1": torch.arange(24)}
    for i, layer in enumerate(masked.bert.layers):
        gone = [j for j in range(24) if j not in keep[f"value_output.{i}"]]
        layer.attention["self"].value.weight.data[gone] = 0
        layer.attention["self"].value.bias.data[gone] = 0
    cut(bert, keep)
    assert bert.bert.layers[0].attention["output"].dense.weight.shape == (24, 8)
    assert_same(outputs(bert), outputs(masked))


def test_query_key_cut_equals_zeroed_dimensions_with_the_scores_scaled_as_before():
    bert = random_bert()
    masked = copy.deepcopy(bert)
    keep = {f"query_key.{i}": torch.tensor([0, 5, 6, 7, 13, 16, 20, 23]) for i in range(2)}
    for layer in masked.bert.layers:
        gone = [j for j in range(24) if j not in keep["query_key.0"]]
        layer.attention["self"].query.weight.data[gone] = 0
        layer.attention["self"].query.bias.data[gone] = 0
    cut(bert, keep, head_size=2)
    assert_same(outputs(bert), outputs(masked))
    scores, expected = (m(IDS, want_scores=True).scores for m in (bert, masked))
    assert_same(scores, expected)


def test_head_cut_equals_zeroed_heads():
    bert = random_bert()
    masked = copy.deepcopy(bert)
    heads = [0, 3]
    units = torch.tensor([h * 6 + k for h in heads for k in range(6)])
    for layer in masked.bert.layers:
        for h in (1, 2):
            layer.attention["output"].dense.weight.data[:, h * 6 : h * 6 + 6] = 0
    cut(bert, {f"{kind}.{i}": units for i in range(2) for kind in ("query_key", "value_output")}, heads=2)
    assert bert.config.attention_head_size == 6
    assert_same(outputs(bert), outputs(masked))


def test_hidden_cut_equals_a_model_masked_everywhere(monkeypatch):
    """The reference keeps every tensor whole; its LayerNorms see, normalise and return the kept dimensions alone."""
    bert = random_bert()
    masked = copy.deepcopy(bert)
    keep = torch.tensor([1, 2, 3, 5, 8, 11, 13, 17, 20, 21, 22])
    mask = torch.zeros(24, dtype=torch.float64).index_fill(0, keep, 1.0)

    def masked_layer_norm(self, x):
        mean = (x * mask).sum(-1, keepdim=True) / len(keep)
        variance = ((x - mean) ** 2 * mask).sum(-1, keepdim=True) / len(keep)
        return ((x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias) * mask

    with monkeypatch.context() as patch:
        patch.setattr(LayerNorm, "forward", masked_layer_norm)
        expected = outputs(masked)
    cut(bert, {"hidden": keep}, hidden=len(keep))
    assert_same(outputs(bert), [expected[0], *(x[..., keep] for x in expected[1:])])


def test_all_kinds_of_cuts_together_in_any_order():
    bert = random_bert()
    importance = {u: torch.rand(len(v)) for u, v in prune.new_lineage(bert).items()}
    new = Widths(12, 17, 3, 4)
    keep = prune.choose_units(importance, Widths.of(bert.config), new)
    other = copy.deepcopy(bert)
    prune.cut(bert, keep, new)
    for units in sorted(keep, reverse=True):
        cut(other, {units: keep[units]})
    for layer, reference in zip(other.bert.layers, bert.bert.layers, strict=True):
        layer.heads = 3
        layer.attention["self"].query.weight.data *= (4 / 6) ** 0.5
        layer.attention["self"].query.bias.data *= (4 / 6) ** 0.5
        assert layer.attention["self"].query.weight.shape == reference.attention["self"].query.weight.shape == (12, 12)
    assert_same(outputs(bert), outputs(other))


def test_one_known_dimension_hits_the_right_rows():
    """Heads lie one after the other: unit k of head h is row h*K + k of W_q, W_k, W_v and column h*K + k of W_o."""
    bert = random_bert()
    before = {name: p.detach().clone() for name, p in bert.named_parameters()}
    head, unit = 2, 4
    row = head * 6 + unit
    rest = [i for i in range(24) if i != row]
    prune.cut(bert, {"query_key.1": torch.tensor(rest)}, Widths.of(bert.config))
    after = dict(bert.named_parameters())
    for name, old in before.items():
        if name.startswith("bert.encoder.layer.1.attention.self.") and ("query" in name or "key" in name):
            assert torch.equal(after[name], old[rest]), name
        else:
            assert torch.equal(after[name], old), name
    context = torch.zeros(1, 15, 24, dtype=torch.float64)
    context[..., row] = 1.0  # a value at that place leaves through that column of W_o
    dense = bert.bert.layers[1].attention["output"].dense
    column = before["bert.encoder.layer.1.attention.output.dense.weight"][:, row]
    assert torch.equal(dense(context)[0, 0], column + dense.bias)


def test_the_heads_are_split_as_in_transformers():
    """Zeroing the K rows from h*K on silences head h of the standard library's attention, and no other."""
    from transformers import BertConfig as StandardConfig
    from transformers import BertModel

    standard = BertModel(StandardConfig(**CONFIG, attn_implementation="eager")).eval()
    layer = standard.encoder.layer[0].attention.self
    layer.query.weight.data[12:18] = 0
    layer.query.bias.data[12:18] = 0
    attention = standard(IDS, output_attentions=True).attentions[0]  # (B,H,S,S)
    uniform = (attention - 1 / 15).abs().amax((0, 2, 3)) < 1e-6
    assert uniform.tolist() == [False, False, True, False]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 24), st.integers(1, 40), st.integers(1, 4), st.integers(1, 6), st.booleans(), st.booleans())
def test_after_any_cut_every_tensor_has_the_shape_of_a_model_born_so(hidden, intermediate, heads, size, pooler, head):
    new = Widths(hidden, intermediate, heads, size)
    distiller = Distiller(Bert(BertConfig(**CONFIG), pooler, head), ALPHAS)
    importance = {u: torch.rand(len(v)) for u, v in prune.new_lineage(distiller).items()}
    lineage = prune.new_lineage(distiller)
    keep = prune.choose_units(importance, Widths.of(distiller.student.config), new)
    prune.cut(distiller, keep, new, None, (lineage,))
    narrow = dict(hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
                  attention_head_size=size)
    born = Bert(BertConfig(**CONFIG | narrow), pooler, head)
    assert distiller.student.config == born.config
    shapes = [{n: p.shape for n, p in bert.named_parameters()} for bert in (distiller.student, born)]
    assert shapes[0] == shapes[1]
    assert distiller.hidden_projection.weight.shape == distiller.embedding_projection.weight.shape == (24, hidden)
    sizes = {"hidden": hidden, "feed_forward": intermediate, "query_key": heads * size, "value_output": heads * size}
    assert {u: len(v) for u, v in lineage.items()} == {u: sizes[u.split(".")[0]] for u in lineage}
    assert all((v.diff() > 0).all() for v in lineage.values())


# ------------------------------------------------------------------------------------------------------ importance


def test_every_parameter_but_the_decoder_bias_is_in_the_table():
    distiller = Distiller(random_bert(), ALPHAS)
    names = {name for name, _ in distiller.named_parameters()}
    assert names - set(prune.tensor_axes(distiller)) == {"student.cls.predictions.bias"}


def test_sensitivity_by_hand_absolute_value_before_the_sum():
    """Neuron 0 has weights whose products with the gradients are +3 and -3: they cancel if summed first."""
    bert = random_bert(num_hidden_layers=1)
    for p in bert.parameters():
        p.grad = torch.zeros_like(p)
    rows = bert.bert.layers[0].intermediate["dense"]
    rows.weight.data[:2, :2] = torch.tensor([[1.0, -1.0], [0.5, 0.25]])
    rows.weight.grad[:2, :2] = torch.tensor([[3.0, 3.0], [2.0, -4.0]])
    rows.bias.data[0], rows.bias.grad[0] = 2.0, -0.25
    columns = bert.bert.layers[0].output.dense
    columns.weight.data[3, 1], columns.weight.grad[3, 1] = -1.5, 2.0
    average: dict[str, torch.Tensor] = {}
    prune.accumulate_sensitivity(average, bert, 0.5)
    assert average["feed_forward.0"][:3].tolist() == [6.5, 2 + 3.0, 0.0]
    assert average["hidden"][:4].tolist() == [3 + 1.0, 3 + 1.0, 0.0, 3.0]  # columns of FFN-in, row of FFN-out
    for p in bert.parameters():
        p.grad *= 2
    prune.accumulate_sensitivity(average, bert, 0.75)
    assert average["feed_forward.0"][:2].tolist() == [0.75 * 6.5 + 0.25 * 13, 0.75 * 5 + 0.25 * 10]


def test_sensitivity_counts_the_tied_decoder_once_with_both_of_its_gradients():
    bert = random_bert()
    logits = bert(IDS, POSITIONS).logits
    logits.square().mean().backward()
    average: dict[str, torch.Tensor] = {}
    prune.accumulate_sensitivity(average, bert, 0.0)
    total = sum((p * p.grad).abs().sum(1 - dim if p.dim() == 2 else ()) if p.dim() == 2 else (p * p.grad).abs()
                for name, axes in prune.tensor_axes(bert).items() for dim, units in axes.items() if units == "hidden"
                for p in [bert.get_parameter(name)] if p.grad is not None)
    torch.testing.assert_close(average["hidden"], total)
    word = bert.bert.embeddings.word_embeddings.weight
    assert word.grad[1].abs().sum() > 0  # token 1 is not in the input: this is the decoder's part


def test_heads_are_ranked_by_both_sets_and_units_within_their_head():
    now, new = Widths(24, 40, 4, 6), Widths(24, 40, 2, 2)
    qk, vo = torch.zeros(4, 6), torch.zeros(4, 6)
    qk[1, [5, 2]], vo[1, [0, 3]] = 1.0, 2.0  # head 1: 6 in all
    qk[3, [1, 4]], vo[3, [4, 1]] = 2.0, 0.5  # head 3: 5
    qk[0, :] = 0.5  # head 0: 3
    keep = prune.choose_units({"query_key.0": qk.flatten(), "value_output.0": vo.flatten()}, now, new)
    assert keep["query_key.0"].tolist() == [8, 11, 19, 22]
    assert keep["value_output.0"].tolist() == [6, 9, 19, 22]


def test_importance_by_magnitude_and_at_random():
    bert = random_bert(num_hidden_layers=1)
    magnitude = prune.unit_importance("magnitude", bert, {}, 0)
    layer = bert.bert.layers[0]
    by_hand = layer.intermediate["dense"].weight.abs().sum(1) + layer.intermediate["dense"].bias.abs()
    torch.testing.assert_close(magnitude["feed_forward.0"], by_hand + layer.output.dense.weight.abs().sum(0))
    random = [prune.unit_importance("random", bert, {}, seed)["hidden"] for seed in (3, 3, 4)]
    assert torch.equal(random[0], random[1]) and not torch.equal(random[0], random[2])
    assert set(magnitude) == {"hidden", "feed_forward.0", "query_key.0", "value_output.0"}


# ------------------------------------------------------------------------------------------------ widths, schedule


@pytest.mark.parametrize("width, heads, size", [(384, 12, 32), (576, 12, 48), (240, 12, 20), (256, 8, 32), (224, 8, 28),
                                                (312, 12, 26)])
def test_head_counts_of_bert_base(width, heads, size):
    config = BertConfig(30522, 768, 12, 12, 3072)
    assert prune.target_widths(config, width) == Widths(width, 4 * width, heads, size)


@pytest.mark.parametrize("hidden, intermediate, heads, words", [
    (768, None, None, "below the teacher's 768"), (0, None, None, "from 1 to 767"), (-3, None, None, "from 1 to"),
    (254, None, None, "take width 252 or 253"), (383, None, None, "take width 384 or 385"),
    (384, 3073, None, "teacher's 3072"),
    (384, -5, None, "teacher's 3072"), (384, None, 7, "do not divide"), (384, None, 13, "from 1 to the teacher's 12"),
    (384, None, 0, "from 1 to"), (384, None, 4, "at most 64"), (760, None, None, "take width 744 or 756")])
def test_widths_that_cannot_be(hidden, intermediate, heads, words):
    with pytest.raises(InputError, match=words) as error:
        prune.target_widths(BertConfig(30522, 768, 12, 12, 3072), hidden, intermediate, heads)
    assert "\n" not in str(error.value)


@given(st.integers(1, 767))
def test_the_widths_that_are_named_instead_are_the_nearest_two_that_work(width):
    config = BertConfig(30522, 768, 12, 12, 3072)
    usable = [w for w in range(1, 768) if any(w % h == 0 and w // h <= 64 for h in range(6, 13))]
    if width in usable:
        assert prune.target_widths(config, width).hidden == width
        return
    with pytest.raises(InputError) as error:
        prune.target_widths(config, width)
    named = [int(w) for w in re.search(r"take width (\d+) or (\d+),", str(error.value)).groups()]
    assert len(set(named)) == 2 and set(named) <= set(usable)
    assert not [w for w in usable if w not in named and abs(w - width) < max(abs(n - width) for n in named)]


def test_named_heads_and_feed_forward_width_are_taken():
    config = BertConfig(30522, 768, 12, 12, 3072)
    assert prune.target_widths(config, 192, 1000, 3) == Widths(192, 1000, 3, 64)


@given(st.integers(0, 1000), st.floats(0, 1), st.floats(0, 1))
def test_schedule_is_the_closed_form(step, a, b):
    """r(t) of METHOD's item 8, before rounding to grains, with t_i, t_f any two fractions of 1,000 steps."""
    start, end = sorted((1000 * a, 1000 * b))
    first, last = Widths(768, 3072, 12, 64), Widths(384, 1536, 12, 32)
    if step < start:
        r = 1.0
    elif step >= end:
        r = 0.5
    else:
        r = 0.5 + 0.5 * (1 - (step - start) / (end - start)) ** 3
    if step == start == end:
        r = 0.5
    widths = prune.scheduled_widths(step, start, end, first, last, 8)
    assert abs(r * 768 - widths.hidden) <= 4 + 1e-6
    assert abs(r * 3072 - widths.intermediate) <= 16 + 1e-6
    assert abs(r * 64 - widths.head_size) <= 1 + 1e-6
    assert widths.hidden % 8 == 0 and widths.intermediate % 32 == 0 and widths.head_size % 2 == 0


@settings(max_examples=50)
@given(st.integers(1, 95), st.integers(1, 400), st.integers(1, 6), st.integers(1, 40), st.integers(1, 60))
def test_path_is_monotone_and_ends_exactly_as_asked(hidden, intermediate, heads, granularity, steps):
    first = Widths(96, 400, 6, 16)
    last = Widths(hidden, intermediate, heads, max(1, min(16, hidden // heads)))
    path = [prune.scheduled_widths(t, 0.1 * steps, 0.7 * steps, first, last, granularity) for t in range(steps + 1)]
    assert path[0] == first and path[-1] == last
    for before, after in zip(path, path[1:], strict=False):
        assert all(b >= a for b, a in zip(before, after, strict=True))


def test_whole_heads_go_first():
    first, last = Widths(768, 3072, 12, 64), Widths(256, 1024, 8, 32)
    path = [prune.scheduled_widths(t, 0, 700, first, last, 8) for t in range(1000)]
    assert all(w.head_size == 64 or w.heads == 8 for w in path)
    assert {w.heads for w in path} == {12, 11, 10, 9, 8}


def test_the_power_of_the_schedule():
    first, last = Widths(100, 400, 4, 25), Widths(20, 80, 4, 5)
    for power in (1, 2, 3):
        hidden = prune.scheduled_widths(25, 0, 100, first, last, 1, power).hidden
        assert hidden == round(20 + 80 * 0.75**power)


CONFIG_768 = BertConfig(vocab_size=100, hidden_size=768, num_hidden_layers=2, num_attention_heads=12,
                        intermediate_size=3072)


def test_the_path_passes_through_every_snapshot():
    """Each of them is held for a step at least, nothing ever grows, and the end stays the same."""
    first, last = Widths.of(CONFIG_768), Widths(384, 1536, 8, 48)
    shapes = [prune.snapshot_widths(hidden, CONFIG_768, last) for hidden in (576, 512)]
    assert shapes == [Widths(576, 2304, 9, 64), Widths(512, 2048, 8, 64)]
    for steps in (7, 40, 1000):
        now, path = first, []
        for step in range(steps):
            now = prune.next_widths(now, prune.scheduled_widths(step, 0, 0.7 * steps, first, last, 8), shapes)
            path.append(now)
        assert set(shapes) <= set(path) and path[-1] == last
        for before, after in zip(path, path[1:], strict=False):
            assert all(b >= a for b, a in zip(before, after, strict=True))
    assert prune.next_widths(first, last, shapes) == shapes[0]  # all at once: a step for each
    assert prune.next_widths(shapes[0], last, shapes) == shapes[1]
    assert prune.next_widths(shapes[1], last, shapes) == last


def test_the_number_of_heads_lets_every_snapshot_pass():
    """384 has 12 heads by itself; 512 is on the way to 8 of them. The target among the snapshots is the student."""
    last, shapes = prune.family_widths(CONFIG_768, 384, None, None, [576, 512, 384])
    assert last == Widths(384, 1536, 8, 48) and shapes == [Widths(576, 2304, 9, 64), Widths(512, 2048, 8, 64)]
    assert prune.family_widths(CONFIG_768, 384, None, None, [576]) == (Widths(384, 1536, 12, 32), [
        Widths(576, 2304, 12, 48)])
    assert prune.family_widths(CONFIG_768, 384, None, None, []) == (Widths(384, 1536, 12, 32), [])


def test_snapshots_that_no_number_of_heads_fits(refused):
    with refused("--snapshots 577: no head count"):
        prune.family_widths(CONFIG_768, 384, None, None, [577])
    with refused("--snapshots 512: no head count from 12 to 12"):
        prune.family_widths(CONFIG_768, 384, None, 12, [512])


@pytest.mark.parametrize("hidden, heads, message", [
    (384, 12, "not between"), (768, 12, "not between"), (512, 12, "no head count from 12 to 12")])
def test_snapshots_that_are_not_on_the_way(hidden, heads, message, refused):
    last = prune.target_widths(CONFIG_768, 384, heads=heads)
    with refused(message):
        prune.snapshot_widths(hidden, CONFIG_768, last)


# ------------------------------------------------------------------------------------- the optimizer across a cut


def train_step(bert, optimizer, seed=0):
    torch.manual_seed(seed)
    target = torch.randint(97, (30,))
    F.cross_entropy(bert(IDS, POSITIONS).logits, target).backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(cut_to: Widths):
    bert = random_bert()
    bert.bert.pooler.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in bert.parameters() if p.requires_grad], lr=1e-2, eps=1e-6)
    for seed in range(3):
        train_step(bert, optimizer, seed)
    importance = {u: torch.rand(len(v)) for u, v in prune.new_lineage(bert).items()}
    return bert, optimizer, prune.choose_units(importance, Widths.of(bert.config), cut_to)


def test_moments_are_the_surviving_rows_and_the_next_step_is_that_of_an_optimizer_born_narrow():
    new = Widths(12, 17, 3, 4)
    bert, optimizer, keep = trained(new)
    names = {p: n for n, p in bert.named_parameters()}
    before = {names[p]: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
    axes = prune.tensor_axes(bert)
    prune.cut(bert, keep, new, optimizer)

    born = Bert(copy.deepcopy(bert.config)).double().eval()
    born.load_state_dict(bert.state_dict())
    fresh = torch.optim.AdamW([p for n, p in born.named_parameters() if "pooler" not in n], lr=1e-2, eps=1e-6)
    assert {n for p, n in ((p, n) for n, p in bert.named_parameters()) if p in optimizer.state} == set(before)
    for name, state in before.items():
        parameter = bert.get_parameter(name)
        for moment in ("exp_avg", "exp_avg_sq"):
            expected = state[moment]
            for dimension, units in axes.get(name, {}).items():
                expected = expected.index_select(dimension, keep[units])
            assert torch.equal(optimizer.state[parameter][moment], expected), (name, moment)
        fresh.state[born.get_parameter(name)] = {k: v.clone() for k, v in optimizer.state[parameter].items()}
    for seed in (7, 8):
        train_step(bert, optimizer, seed)
        train_step(born, fresh, seed)
    for name, p in born.named_parameters():
        assert torch.equal(p, bert.get_parameter(name)), name


def test_nothing_refers_to_a_full_size_tensor_after_a_cut():
    new = Widths(12, 17, 3, 4)
    bert, optimizer, keep = trained(new)
    cut_names = set(prune.tensor_axes(bert))
    old = [weakref.ref(p) for n, p in bert.named_parameters() if n in cut_names]
    old += [weakref.ref(v) for s in optimizer.state.values() for v in s.values() if v.dim() == 2]
    prune.cut(bert, keep, new, optimizer)
    gc.collect()
    assert len(old) > len(cut_names) and not [r for r in old if r() is not None]
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for n, p in bert.named_parameters() if "pooler" not in n}
    assert {id(p) for p in optimizer.state} == held


def test_a_loss_kept_over_a_cut_does_no_harm():
    """autograd remembers a parameter's shape while a graph that used it lives."""
    new = Widths(12, 17, 3, 4)
    bert, optimizer, keep = trained(new)
    kept = bert(IDS, POSITIONS).logits.sum()
    prune.cut(bert, keep, new, optimizer)
    train_step(bert, optimizer)
    assert kept.grad_fn is not None and bert.bert.embeddings.word_embeddings.weight.shape == (97, 12)


def test_gradients_are_cut_like_their_parameters():
    bert = random_bert()
    bert(IDS, POSITIONS).logits.square().mean().backward()
    before = bert.bert.embeddings.word_embeddings.weight.grad
    keep = torch.tensor([0, 4, 5, 9])
    cut(bert, {"hidden": keep}, hidden=4)
    assert torch.equal(bert.bert.embeddings.word_embeddings.weight.grad, before[:, keep])
