"""The student's final shape, from the flags and the teacher's shape."""

from model import BertConfig
from prune import Shape
from support.errors import InputError


def possible_heads(hidden_size: int, config: BertConfig) -> list[int]:
    """The numbers of heads for a student of `hidden_size`, largest first, down to half of the teacher's. They divide
    the hidden size, because `transformers` requires H * K = D, into heads no wider than the teacher's."""
    teacher_heads = config.num_attention_heads
    return [heads for heads in range(teacher_heads, (teacher_heads - 1) // 2, -1)
            if hidden_size % heads == 0 and hidden_size // heads <= config.attention_head_size]


def target_shape(config: BertConfig, hidden_size: int, intermediate_size: int | None = None,
                 heads: int | None = None) -> Shape:
    """The student's final shape for a teacher `config`. F is in proportion to D and H is the largest possible number,
    unless they are given. Raises InputError for a shape that is not below the teacher's or has no possible heads."""
    if intermediate_size is None:
        intermediate_size = max(1, round(config.intermediate_size * hidden_size / config.hidden_size))
    for name, value, largest in (("width", hidden_size, config.hidden_size - 1),
                                 ("intermediate width", intermediate_size, config.intermediate_size),
                                 ("heads", heads, config.num_attention_heads)):
        if value is not None and not 0 < value <= largest:
            raise InputError(f"target {name} {value} must be from 1 to {largest} for this teacher")
    if heads is None:
        usable = [width for width in range(1, config.hidden_size) if possible_heads(width, config)]
        if hidden_size not in usable:
            nearest = sorted(usable, key=lambda width: abs(width - hidden_size))[:2]
            raise InputError(f"target width {hidden_size} cannot be divided into {-(-config.num_attention_heads // 2)} "
                             f"to {config.num_attention_heads} heads of at most {config.attention_head_size} "
                             f"dimensions: use width {' or '.join(map(str, sorted(nearest)))}, or set --target-heads")
        heads = possible_heads(hidden_size, config)[0]
    if hidden_size % heads or hidden_size // heads > config.attention_head_size:
        raise InputError(f"target heads {heads} do not divide width {hidden_size} into equal heads of at most "
                         f"{config.attention_head_size} dimensions, the teacher's")
    return Shape(hidden_size, intermediate_size, heads, hidden_size // heads)
