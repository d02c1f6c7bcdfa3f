"""A real model of full size, where there is one in ../shared."""

import torch
import transformers
from reference import CLOSE, random_inputs

from support.checkpoint import load_model


def test_real_teacher_equals_transformers(shared):
    ours = load_model(shared / "teacher").eval()
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(shared / "teacher").float().eval()
    ids, _, mask = random_inputs(ours.config)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, torch.arange(ids.numel()), None, mask).logits,
                                   theirs(ids, attention_mask=mask).logits.flatten(0, 1), **CLOSE)
