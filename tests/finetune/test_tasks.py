import pytest
import torch

from boldforge.finetune.errors import FinetuneError
from boldforge.finetune.tasks import AdhdDiagnosis, get_task


def test_missing_diagnosis_is_none_and_an_unknown_code_is_an_error():
    task = get_task("adhd")
    assert task.label({"diagnosis": 1.0}) == 1
    assert task.label({"diagnosis": 0}) == 0
    assert task.label({"diagnosis": None}) is None
    assert task.label({"age": 9.5}) is None
    with pytest.raises(FinetuneError, match="'diagnosis' holds 3"):
        task.label({"diagnosis": 3})
    with pytest.raises(FinetuneError, match="expected one of: adhd"):
        get_task("horoscope")


def test_both_classes_have_the_same_say_in_the_loss():
    task = AdhdDiagnosis()
    labels = torch.tensor([0, 0, 0, 1])
    logits = torch.full((4, 1), 0.0, requires_grad=True)
    task.criterion(labels.tolist())(logits, labels).backward()
    # At even odds the three controls pull down exactly as hard as the one patient pulls up.
    assert logits.grad is not None
    assert logits.grad.sum().item() == pytest.approx(0, abs=1e-7)
