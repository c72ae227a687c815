"""Every op that is timed. A new one takes a module here and a line below."""

from ..registry import Op
from . import attention, contrast, head, masks, sequence, step, text

OPS: tuple[Op, ...] = (*masks.OPS, *contrast.OPS, *sequence.OPS, *head.OPS, *attention.OPS, *text.OPS, *step.OPS)
