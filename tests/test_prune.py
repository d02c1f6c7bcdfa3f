"""Structure table, importance, schedule and pruning, against masked models, closed forms and sums by hand."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import prune
from distill import Distiller
from model import Bert, BertConfig, LayerNorm
from prune import Shape
from support.errors import InputError
from support.shapes import target_shape

CONFIG = dict(vocab_size=97, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
              max_position_embeddings=16, layer_norm_eps=1e-12)
BERT_BASE = BertConfig(30522, 768, 12, 12, 3072)
ALPHAS = dict.fromkeys(("mlm", "pred", "hidn", "emb", "attn"), 1.0)
IDS = torch.arange(30).reshape(2, 15) * 3 % 97
POSITIONS = torch.arange(30)


def random_bert(**changes) -> Bert:
    """A BERT in float64 in which every parameter, biases and LayerNorms too, is far from its initial value."""
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


def prune_to(bert: Bert, keep: dict[str, torch.Tensor], **sizes):
    """Prune to the units `keep`; sizes: the fields of the new Shape that differ from the old one."""
    prune.prune_units(bert, keep, Shape.of(bert.config)._replace(**sizes))


def random_units(model, new_shape: Shape) -> dict[str, torch.Tensor]:
    """Units to keep, chosen by random importance."""
    importance = {group: torch.rand(len(indices)) for group, indices in prune.teacher_indices(model).items()}
    return prune.choose_units(importance, Shape.of(getattr(model, "student", model).config), new_shape)


# ---- Pruning is exact ----------------------------------------------------------------------------------------


def test_pruning_feed_forward_neurons_equals_zeroing_them():
    bert = random_bert()
    masked = copy.deepcopy(bert)
    keep = {f"feed_forward.{i}": torch.randperm(40)[:23].sort().values for i in range(2)}
    for i, layer in enumerate(masked.bert.layers):
        pruned = [j for j in range(40) if j not in keep[f"feed_forward.{i}"]]
        layer.output.dense.weight.data[:, pruned] = 0
    prune_to(bert, keep, intermediate_size=23)
    assert bert.bert.layers[1].intermediate["dense"].weight.shape == (23, 24)
    assert_same(outputs(bert), outputs(masked))


def test_pruning_value_output_units_equals_zeroing_them():
    bert = random_bert()
    masked = copy.deepcopy(bert)
    keep = {"value_output.0": torch.tensor([0, 2, 7, 9, 12, 17, 18, 23]), "query_key.0": torch.arange(24),
            "value_output.1": torch.tensor([1, 3, 6, 8, 14, 16, 19, 20]), "query_key.1": torch.arange(24)}
    for i, layer in enumerate(masked.bert.layers):
        pruned = [j for j in range(24) if j not in keep[f"value_output.{i}"]]
        layer.attention["self"].value.weight.data[pruned] = 0
        layer.attention["self"].value.bias.data[pruned] = 0
    prune_to(bert, keep)
    assert bert.bert.layers[0].attention["output"].dense.weight.shape == (24, 8)
    assert_same(outputs(bert), outputs(masked))


def test_pruning_query_key_units_equals_zeroing_them_with_scores_divided_as_before():
    bert = random_bert()
    masked = copy.deepcopy(bert)
    keep = {f"query_key.{i}": torch.tensor([0, 5, 6, 7, 13, 16, 20, 23]) for i in range(2)}
    for layer in masked.bert.layers:
        pruned = [j for j in range(24) if j not in keep["query_key.0"]]
        layer.attention["self"].query.weight.data[pruned] = 0
        layer.attention["self"].query.bias.data[pruned] = 0
    prune_to(bert, keep, head_size=2)
    assert_same(outputs(bert), outputs(masked))
    scores, expected = (m(IDS, want_scores=True).scores for m in (bert, masked))
    assert_same(scores, expected)


def test_pruning_heads_equals_zeroing_them():
    bert = random_bert()
    masked = copy.deepcopy(bert)
    units = torch.tensor([h * 6 + k for h in (0, 3) for k in range(6)])
    for layer in masked.bert.layers:
        for h in (1, 2):
            layer.attention["output"].dense.weight.data[:, h * 6 : h * 6 + 6] = 0
    prune_to(bert, {f"{kind}.{i}": units for i in range(2) for kind in ("query_key", "value_output")}, num_heads=2)
    assert bert.config.attention_head_size == 6
    assert_same(outputs(bert), outputs(masked))


def test_pruning_hidden_units_equals_a_model_that_masks_them_everywhere(monkeypatch):
    """The reference keeps all tensors whole. Its LayerNorms normalise over the kept units and return zero elsewhere."""
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
    prune_to(bert, {"hidden": keep}, hidden_size=len(keep))
    assert_same(outputs(bert), [expected[0], *(x[..., keep] for x in expected[1:])])


def test_groups_may_be_pruned_together_or_one_by_one_in_any_order():
    bert = random_bert()
    new_shape = Shape(12, 17, 3, 4)
    keep = random_units(bert, new_shape)
    other = copy.deepcopy(bert)
    prune.prune_units(bert, keep, new_shape)
    for group in sorted(keep, reverse=True):
        prune_to(other, {group: keep[group]})
    for layer, reference in zip(other.bert.layers, bert.bert.layers, strict=True):
        layer.num_heads = 3
        layer.attention["self"].query.weight.data *= (4 / 6) ** 0.5
        layer.attention["self"].query.bias.data *= (4 / 6) ** 0.5
        assert layer.attention["self"].query.weight.shape == reference.attention["self"].query.weight.shape == (12, 12)
    assert_same(outputs(bert), outputs(other))


def test_unit_k_of_head_h_is_row_hK_plus_k_of_query_key_and_value_and_that_column_of_the_output():
    bert = random_bert()
    before = {name: p.detach().clone() for name, p in bert.named_parameters()}
    head, unit = 2, 4
    row = head * 6 + unit
    rest = [i for i in range(24) if i != row]
    prune_to(bert, {"query_key.1": torch.tensor(rest)})
    after = dict(bert.named_parameters())
    for name, old in before.items():
        if name.startswith("bert.encoder.layer.1.attention.self.") and ("query" in name or "key" in name):
            assert torch.equal(after[name], old[rest]), name
        else:
            assert torch.equal(after[name], old), name
    context = torch.zeros(1, 15, 24, dtype=torch.float64)
    context[..., row] = 1.0  # a value of this unit leaves through this column of W_o
    dense = bert.bert.layers[1].attention["output"].dense
    column = before["bert.encoder.layer.1.attention.output.dense.weight"][:, row]
    assert torch.equal(dense(context)[0, 0], column + dense.bias)


def test_heads_are_split_as_in_transformers():
    """Zeroing the K rows from h*K on makes the attention of head h in `transformers` uniform, and of no other head."""
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
def test_a_pruned_model_has_the_tensor_shapes_of_a_new_model_of_that_shape(hidden, intermediate, heads, size, pooler,
                                                                             head):
    distiller = Distiller(Bert(BertConfig(**CONFIG), pooler, head), ALPHAS)
    lineage, new_shape = prune.teacher_indices(distiller), Shape(hidden, intermediate, heads, size)
    prune.prune_units(distiller, random_units(distiller, new_shape), new_shape, None, (lineage,))
    narrow = dict(hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=heads,
                  attention_head_size=size)
    new = Bert(BertConfig(**CONFIG | narrow), pooler, head)
    assert distiller.student.config == new.config
    shapes = [{name: p.shape for name, p in bert.named_parameters()} for bert in (distiller.student, new)]
    assert shapes[0] == shapes[1]
    projections = [*distiller.hidden_projections, distiller.embedding_projection]
    assert [projection.weight.shape for projection in projections] == [(24, hidden)] * 3
    sizes = {"hidden": hidden, "feed_forward": intermediate, "query_key": heads * size, "value_output": heads * size}
    assert {group: len(v) for group, v in lineage.items()} == {group: sizes[group.split(".")[0]] for group in lineage}
    assert all((indices.diff() > 0).all() for indices in lineage.values())


@pytest.mark.parametrize("group", ["hidden", "feed_forward.0", "query_key.1", "value_output.1"])
def test_a_prune_keeps_the_given_units_in_the_given_order(group):
    bert, keep = random_bert(), torch.tensor([5, 0, 3])
    before = {name: p.detach() for name, p in bert.named_parameters()}
    axes = prune.tensor_axes(bert)
    prune_to(bert, {group: keep})
    for name, new in bert.named_parameters():
        old = before[name]
        for dimension, other in axes.get(name, {}).items():
            if other == group:
                old = torch.stack([old.select(dimension, i) for i in keep.tolist()], dimension)
        assert isinstance(new, torch.nn.Parameter) and new.requires_grad and torch.equal(new, old), name
        assert new.untyped_storage().nbytes() == 8 * new.numel(), name


def test_a_prune_keeps_frozen_parameters_frozen():
    bert = random_bert().requires_grad_(False)
    new_shape = Shape(12, 17, 3, 4)
    prune.prune_units(bert, random_units(bert, new_shape), new_shape)
    assert not any(p.requires_grad for p in bert.parameters())


# ---- Importance ----------------------------------------------------------------------------------------------


def test_the_structure_table_has_every_parameter_but_the_decoder_bias():
    distiller = Distiller(random_bert(), ALPHAS)
    names = {name for name, _ in distiller.named_parameters()}
    assert names - set(prune.tensor_axes(distiller)) == {"student.cls.predictions.bias"}


def test_sensitivity_takes_the_absolute_value_of_every_weight_before_the_sum():
    """By hand: neuron 0 has two weights of sensitivity +3 and -3 before the absolute value."""
    bert = random_bert(num_hidden_layers=1)
    for p in bert.parameters():
        p.grad = torch.zeros_like(p)
    rows = bert.bert.layers[0].intermediate["dense"]
    rows.weight.data[:2, :2] = torch.tensor([[1.0, -1.0], [0.5, 0.25]])
    rows.weight.grad[:2, :2] = torch.tensor([[3.0, 3.0], [2.0, -4.0]])
    rows.bias.data[0], rows.bias.grad[0] = 2.0, -0.25
    columns = bert.bert.layers[0].output.dense
    columns.weight.data[3, 1], columns.weight.grad[3, 1] = -1.5, 2.0
    statistics: dict = {}
    prune.accumulate_importance("sensitivity", statistics, bert, 0.5)
    average = prune.unit_importance("sensitivity", statistics, bert, 0)
    assert average["feed_forward.0"][:3].tolist() == [6.5, 2 + 3.0, 0.0]
    assert average["hidden"][:4].tolist() == [3 + 1.0, 3 + 1.0, 0.0, 3.0]  # its columns of W_1, its row of W_2
    for p in bert.parameters():
        p.grad *= 2
    prune.accumulate_importance("sensitivity", statistics, bert, 0.75)
    assert average["feed_forward.0"][:2].tolist() == [0.75 * 6.5 + 0.25 * 13, 0.75 * 5 + 0.25 * 10]


def test_sensitivity_of_the_tied_decoder_counts_once_with_the_gradients_of_both_uses():
    bert = random_bert()
    bert(IDS, POSITIONS).logits.square().mean().backward()
    statistics: dict = {}
    prune.accumulate_importance("sensitivity", statistics, bert, 0.0)
    average = statistics["sensitivity"]
    expected = 0.0
    for name, axes in prune.tensor_axes(bert).items():
        p = bert.get_parameter(name)
        if p.grad is None:
            continue
        for dimension, group in axes.items():
            if group == "hidden":
                values = (p * p.grad).abs()
                expected = expected + (values.sum(1 - dimension) if values.dim() == 2 else values)
    torch.testing.assert_close(average["hidden"], expected)
    words = bert.bert.embeddings.word_embeddings.weight
    assert words.grad[1].abs().sum() > 0  # token 1 is not in the input, so this gradient comes from the decoder


def test_platon_importance_is_average_sensitivity_times_average_uncertainty_of_every_weight():
    """By hand, for two steps: neuron 0 of the feed-forward layer has two weights and no others with a gradient."""
    bert = random_bert(num_hidden_layers=1)
    for p in bert.parameters():
        p.grad = torch.zeros_like(p)
    weight = bert.bert.layers[0].intermediate["dense"].weight
    weight.data[0, :2] = torch.tensor([1.0, -2.0])
    statistics: dict = {}
    for gradient in ([4.0, 1.0], [2.0, 5.0]):
        weight.grad[0, :2] = torch.tensor(gradient)
        prune.accumulate_importance("platon", statistics, bert, 0.5)
    expected = 0.0
    for sensitivities in ((4.0, 2.0), (2.0, 10.0)):  # |theta g| of each weight in both steps
        mean = uncertainty = 0.0
        for sensitivity in sensitivities:
            mean = 0.85 * mean + 0.15 * sensitivity
            uncertainty = 0.85 * uncertainty + 0.15 * abs(sensitivity - mean)
        expected += mean * uncertainty
    importance = prune.unit_importance("platon", statistics, bert, 0)
    torch.testing.assert_close(importance["feed_forward.0"][0].item(), expected)
    assert not importance["feed_forward.0"][1:].any()


@pytest.mark.parametrize("criterion", ["sensitivity", "platon", "magnitude"])
def test_importance_ignores_projections_and_the_pooler(criterion):
    """The projections are dropped at export and the pooler is not trained, so neither may decide what is kept."""
    importances = []
    for factor in (1.0, 100.0):
        distiller = Distiller(random_bert(), ALPHAS)
        distiller.student.bert.pooler.requires_grad_(False)
        for name, p in distiller.named_parameters():
            if "projection" in name or "pooler" in name:
                p.data *= factor
            p.grad = p.data.clone() if p.requires_grad else None
        statistics: dict = {}
        for _ in range(2):
            prune.accumulate_importance(criterion, statistics, distiller.student, 0.5)
            for p in distiller.parameters():
                p.grad = None if p.grad is None else 2 * p.grad
        importances.append(prune.unit_importance(criterion, statistics, distiller.student, 0))
    for group, values in importances[0].items():
        assert torch.equal(values, importances[1][group]) and values.all(), group


def test_platon_statistics_are_pruned_like_their_weights():
    bert, new_shape = random_bert(), Shape(12, 17, 3, 4)
    for p in bert.parameters():
        p.grad = torch.randn_like(p)
    statistics: dict = {}
    for _ in range(2):
        prune.accumulate_importance("platon", statistics, bert, 0.5)
    before = prune.unit_importance("platon", statistics, bert, 0)
    keep = random_units(bert, new_shape)
    prune.prune_units(bert, keep, new_shape, tensors=tuple(statistics.values()))
    for values in statistics.values():
        assert {name: v.shape for name, v in values.items()} == {name: p.shape for name, p in bert.named_parameters()}
    name = "bert.encoder.layer.1.intermediate.dense.bias"  # one entry per unit
    assert len(statistics["mean"][name]) == 17
    after = prune.unit_importance("platon", statistics, bert, 0)
    assert {group: len(v) for group, v in after.items()} == {group: len(keep[group]) for group in before}


def test_importance_by_magnitude_and_at_random():
    bert = random_bert(num_hidden_layers=1)
    magnitude = prune.unit_importance("magnitude", {}, bert, 0)
    layer = bert.bert.layers[0]
    by_hand = layer.intermediate["dense"].weight.abs().sum(1) + layer.intermediate["dense"].bias.abs()
    torch.testing.assert_close(magnitude["feed_forward.0"], by_hand + layer.output.dense.weight.abs().sum(0))
    random = [prune.unit_importance("random", {}, bert, seed)["hidden"] for seed in (3, 3, 4)]
    assert torch.equal(random[0], random[1]) and not torch.equal(random[0], random[2])
    assert set(magnitude) == {"hidden", "feed_forward.0", "query_key.0", "value_output.0"}


def test_heads_are_ranked_by_both_groups_and_units_within_their_head():
    shape, new_shape = Shape(24, 40, 4, 6), Shape(24, 40, 2, 2)
    qk, vo = torch.zeros(4, 6), torch.zeros(4, 6)
    qk[1, [5, 2]], vo[1, [0, 3]] = 1.0, 2.0  # head 1: 6 in all
    qk[3, [1, 4]], vo[3, [4, 1]] = 2.0, 0.5  # head 3: 5
    qk[0, :] = 0.5  # head 0: 3
    keep = prune.choose_units({"query_key.0": qk.flatten(), "value_output.0": vo.flatten()}, shape, new_shape)
    assert keep["query_key.0"].tolist() == [8, 11, 19, 22]
    assert keep["value_output.0"].tolist() == [6, 9, 19, 22]


def test_the_most_important_units_are_kept_in_ascending_order_and_whole_groups_are_absent():
    importance = {"hidden": torch.tensor([3.0, 1.0, 5.0, 4.0]), "feed_forward.0": torch.arange(8.0)}
    keep = prune.choose_units(importance, Shape(4, 8, 2, 2), Shape(3, 8, 2, 2))
    assert {group: kept.tolist() for group, kept in keep.items()} == {"hidden": [0, 2, 3]}


# ---- Target shape and schedule -------------------------------------------------------------------------------


@pytest.mark.parametrize("width, heads, size", [(384, 12, 32), (576, 12, 48), (240, 12, 20), (256, 8, 32), (224, 8, 28),
                                                (312, 12, 26)])
def test_default_shape_of_students_of_bert_base(width, heads, size):
    assert target_shape(BERT_BASE, width) == Shape(width, 4 * width, heads, size)


def test_given_heads_and_intermediate_size_are_taken():
    assert target_shape(BERT_BASE, 192, 1000, 3) == Shape(192, 1000, 3, 64)


@pytest.mark.parametrize("hidden, intermediate, heads, words", [
    (768, None, None, "must be from 1 to 767"), (0, None, None, "from 1 to 767"), (-3, None, None, "from 1 to"),
    (254, None, None, "use a multiple of 12"), (383, None, None, "12 or 11 or 10 or 9 or 8 or 7 or 6 heads"),
    (384, 3073, None, "from 1 to 3072"), (384, -5, None, "from 1 to 3072"),
    (384, None, 7, "into 7 heads"), (384, None, 13, "heads 13 must be from 1 to 12"), (384, None, 0, "from 1 to"),
    (384, None, 4, "at most 64")])
def test_impossible_target_shapes_are_refused(refused, hidden, intermediate, heads, words):
    with refused(words):
        target_shape(BERT_BASE, hidden, intermediate, heads)


def test_the_possible_widths_are_those_of_6_to_12_equal_heads_of_at_most_64_dimensions():
    """Every width below that of BERT-base. The multiple of 12 that an error advises is always possible."""
    possible = {w for w in range(1, 768) if any(w % h == 0 and w // h <= 64 for h in range(6, 13))}
    assert possible >= set(range(12, 768, 12))
    for width in range(1, 768):
        if width in possible:
            assert target_shape(BERT_BASE, width).hidden_size == width
        else:
            with pytest.raises(InputError, match="use a multiple of 12,"):
                target_shape(BERT_BASE, width)


@given(st.integers(0, 1000), st.floats(0, 1), st.floats(0, 1))
def test_the_schedule_is_the_closed_form_rounded_to_the_granularity(step, a, b):
    """r(t) = r_f + (1 - r_f) (1 - (t - t_i) / (t_f - t_i))^3, for any t_i <= t_f of a run of 1,000 steps."""
    start, end = sorted((1000 * a, 1000 * b))
    if step >= end:
        r = 0.5
    elif step < start:
        r = 1.0
    else:
        r = 0.5 + 0.5 * (1 - (step - start) / (end - start)) ** 3
    shape = prune.scheduled_shape(step, start, end, Shape(768, 3072, 12, 64), Shape(384, 1536, 12, 32), 8)
    assert abs(r * 768 - shape.hidden_size) <= 4 + 1e-6
    assert abs(r * 3072 - shape.intermediate_size) <= 16 + 1e-6
    assert abs(r * 64 - shape.head_size) <= 4 + 1e-6
    assert shape.hidden_size % 8 == 0 and shape.intermediate_size % 32 == 0 and shape.head_size % 8 == 0


@settings(max_examples=50)
@given(st.integers(1, 95), st.integers(1, 400), st.integers(1, 6), st.integers(1, 40), st.integers(1, 60))
def test_the_schedule_never_grows_and_ends_exactly_at_the_target(hidden, intermediate, heads, granularity, steps):
    teacher = Shape(96, 400, 6, 16)
    target = Shape(hidden, intermediate, heads, max(1, min(16, hidden // heads)))
    shapes = [prune.scheduled_shape(t, 0.1 * steps, 0.7 * steps, teacher, target, granularity)
              for t in range(steps + 1)]
    assert shapes[0] == teacher and shapes[-1] == target
    for before, after in zip(shapes, shapes[1:], strict=False):
        assert all(b >= a for b, a in zip(before, after, strict=True))


def test_a_granularity_of_all_that_is_pruned_prunes_it_at_once_where_half_of_it_is_due():
    teacher, target = Shape(768, 3072, 12, 64), Shape(240, 960, 12, 20)
    for granularity in (528, 1000):
        shapes = [prune.scheduled_shape(t, 0, 210, teacher, target, granularity) for t in range(210)]
        due = 210 * (1 - 0.5 ** (1 / 3))  # (1 - t / 210)^3 = 1/2
        assert shapes == [target if t > due else teacher for t in range(210)]


def test_the_schedule_prunes_whole_heads_first():
    teacher, target = Shape(768, 3072, 12, 64), Shape(256, 1024, 8, 32)
    shapes = [prune.scheduled_shape(t, 0, 700, teacher, target, 8) for t in range(1000)]
    assert all(shape.head_size == 64 or shape.num_heads == 8 for shape in shapes)
    assert {shape.num_heads for shape in shapes} == {12, 11, 10, 9, 8}
    for t, shape in enumerate(shapes):  # never more heads than hold the scheduled width H*K, and never fewer
        width = 256 + (768 - 256) * prune.fraction_to_prune(t, 0, 700)
        assert shape.num_heads == max(8, -(-width // 64))


def test_the_power_of_the_schedule():
    teacher, target = Shape(100, 400, 4, 25), Shape(20, 80, 4, 5)
    for power in (1, 2, 3):
        hidden_size = prune.scheduled_shape(25, 0, 100, teacher, target, 1, power).hidden_size
        assert hidden_size == round(20 + 80 * 0.75**power)


# ---- Optimizer, gradients and memory across a prune ----------------------------------------------------------


def rescale_scores(bert: Bert, factor: float):
    """Multiply the attention scores of every layer by `factor`: a hook that scales the keys."""
    for layer in bert.bert.layers:
        layer.attention["self"].key.register_forward_hook(lambda module, inputs, output: output * factor)


def train_step(bert, optimizer, seed=0):
    torch.manual_seed(seed)
    F.cross_entropy(bert(IDS, POSITIONS).logits, torch.randint(97, (30,))).backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(new_shape: Shape):
    """A BERT after three steps of AdamW, its optimizer, and units to keep for `new_shape`."""
    bert = random_bert()
    bert.bert.pooler.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in bert.parameters() if p.requires_grad], lr=1e-2, eps=1e-6)
    for seed in range(3):
        train_step(bert, optimizer, seed)
    return bert, optimizer, random_units(bert, new_shape)


def test_moments_are_sliced_like_their_weights_and_training_continues_as_with_a_new_narrow_model():
    new_shape = Shape(12, 17, 3, 4)
    bert, optimizer, keep = trained(new_shape)
    names = {p: name for name, p in bert.named_parameters()}
    before = {names[p]: {k: v.clone() for k, v in state.items()} for p, state in optimizer.state.items()}
    axes = prune.tensor_axes(bert)
    prune.prune_units(bert, keep, new_shape, optimizer)

    new = Bert(copy.deepcopy(bert.config)).double().eval()
    new.load_state_dict(bert.state_dict())
    new_optimizer = torch.optim.AdamW([p for n, p in new.named_parameters() if "pooler" not in n], lr=1e-2, eps=1e-6)
    assert {name for name, p in bert.named_parameters() if p in optimizer.state} == set(before)
    for name, state in before.items():
        parameter = bert.get_parameter(name)
        for moment in ("exp_avg", "exp_avg_sq"):
            expected = state[moment]
            for dimension, group in axes.get(name, {}).items():
                expected = expected.index_select(dimension, keep[group])
            if ".query." in name:  # see the next test
                expected = expected / (4 / 6) ** (0.5 if moment == "exp_avg" else 1)
            torch.testing.assert_close(optimizer.state[parameter][moment], expected, rtol=1e-12, atol=0, msg=name)
        new_optimizer.state[new.get_parameter(name)] = {k: v.clone() for k, v in optimizer.state[parameter].items()}
    for seed in (7, 8):
        train_step(bert, optimizer, seed)
        train_step(new, new_optimizer, seed)
    for name, p in new.named_parameters():
        assert torch.equal(p, bert.get_parameter(name)), name


def test_moments_of_the_rescaled_queries_are_those_of_a_model_that_was_always_scaled_so():
    """Without pruned units, a prune from K = 6 to K = 4 only changes the divisor of the scores and scales W_q. The
    function is the same before and after, so Adam must have the moments of a model trained with the scaled W_q."""
    bert = random_bert()
    scale = (4 / 6) ** 0.5
    scaled = copy.deepcopy(bert)
    optimizers = [torch.optim.AdamW([p for n, p in model.named_parameters() if "pooler" not in n], lr=0.0, eps=1e-6)
                  for model in (bert, scaled)]
    for layer in scaled.bert.layers:
        layer.attention["self"].query.weight.data *= scale
        layer.attention["self"].query.bias.data *= scale
    rescale_scores(scaled, 1 / scale)
    for seed in range(3):
        train_step(bert, optimizers[0], seed)
        train_step(scaled, optimizers[1], seed)
    keep = {f"query_key.{i}": torch.arange(24) for i in range(2)}
    prune.prune_units(bert, keep, Shape.of(bert.config)._replace(head_size=4), optimizers[0])
    for name, p in scaled.named_parameters():
        if ".query." in name:
            for moment in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(optimizers[0].state[bert.get_parameter(name)][moment],
                                           optimizers[1].state[p][moment], rtol=1e-9, atol=1e-15, msg=name)


def test_nothing_refers_to_a_full_size_tensor_after_a_prune():
    new_shape = Shape(12, 17, 3, 4)
    bert, optimizer, keep = trained(new_shape)
    pruned = set(prune.tensor_axes(bert))
    old = [weakref.ref(p) for name, p in bert.named_parameters() if name in pruned]
    old += [weakref.ref(v) for state in optimizer.state.values() for v in state.values() if v.dim() == 2]
    prune.prune_units(bert, keep, new_shape, optimizer)
    gc.collect()
    assert len(old) > len(pruned) and not [reference for reference in old if reference() is not None]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for name, p in bert.named_parameters() if "pooler" not in name}
    assert {id(p) for p in optimizer.state} == held


def test_a_loss_that_is_kept_over_a_prune_does_not_break_the_next_step():
    """autograd remembers the shape of a parameter for as long as a graph that used it lives."""
    new_shape = Shape(12, 17, 3, 4)
    bert, optimizer, keep = trained(new_shape)
    loss = bert(IDS, POSITIONS).logits.sum()
    prune.prune_units(bert, keep, new_shape, optimizer)
    train_step(bert, optimizer)
    assert bert.bert.embeddings.word_embeddings.weight.shape == (97, 12)
    loss.backward()  # the graph of the old sizes still works, too
