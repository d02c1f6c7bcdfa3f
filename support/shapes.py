"""The student's final shape, from the flags and the teacher's shape."""

from model import BertConfig
from prune import Shape
from support.errors import InputError


def target_shape(config: BertConfig, hidden_size: int, intermediate_size: int | None = None,
                 heads: int | None = None) -> Shape:
    """The student's final shape for a teacher `config`. Unless given, F is in proportion to D, and H is the largest
    number, from the teacher's down to half of it, that divides D into heads no wider than the teacher's, because
    `transformers` requires H * K = D. Raises InputError for a shape not below the teacher's or without such an H."""
    teacher_heads, widest = config.num_attention_heads, config.attention_head_size
    if intermediate_size is None:
        intermediate_size = max(1, round(config.intermediate_size * hidden_size / config.hidden_size))
    for name, value, largest in (("width", hidden_size, config.hidden_size - 1), ("heads", heads, teacher_heads),
                                 ("intermediate width", intermediate_size, config.intermediate_size)):
        if value is not None and not 0 < value <= largest:
            raise InputError(f"target {name} {value} must be from 1 to {largest} for this teacher")
    allowed = [heads] if heads else range(teacher_heads, (teacher_heads - 1) // 2, -1)
    possible = [count for count in allowed if hidden_size % count == 0 and hidden_size // count <= widest]
    if not possible:
        raise InputError(f"target width {hidden_size} cannot be divided into {' or '.join(map(str, allowed))} heads of "
                         f"at most {widest} dimensions: use a multiple of {teacher_heads}, or other --target-heads")
    return Shape(hidden_size, intermediate_size, possible[0], hidden_size // possible[0])
