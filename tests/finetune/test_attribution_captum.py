"""Our integrated gradients beside captum's, where captum's rule of quadrature can follow."""

import numpy as np
import pytest
import torch

from boldforge.finetune import AdapterConfig, AdhdDiagnosis, Classifier, load_backbone
from boldforge.finetune.attribution import class_score, gradients_through, integrated_gradients

captum = pytest.importorskip("captum.attr", reason="captum, a tool of developers, is not installed")


def test_they_agree_on_our_encoder(encoder, values_BTV):
    """Captum spaces its nodes for smooth integrands: the path starts at a frame of anatomy, not at one that is flat."""
    classifier = Classifier(load_backbone(encoder, "multiscale"), AdhdDiagnosis(), AdapterConfig(rank=2))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in classifier.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    score, clip = class_score(classifier), values_BTV[:1]
    frame_V = 0.5 * values_BTV[1, 0]
    with gradients_through(classifier):
        ours_V = integrated_gradients(score, clip, frame_V, steps=32, batch_size=16)[0]
        peer = captum.IntegratedGradients(score)
        theirs = peer.attribute(
            clip, frame_V.expand_as(clip), n_steps=64, method="gausslegendre", internal_batch_size=16
        )
    theirs_V = theirs[0].sum(dim=0).detach().numpy()
    scale = np.abs(theirs_V).max()
    assert scale > 0 and np.corrcoef(ours_V, theirs_V)[0, 1] > 0.999
    np.testing.assert_allclose(ours_V, theirs_V, atol=0.02 * scale)
    assert ours_V.sum() == pytest.approx(theirs_V.sum(), rel=0.01)


def test_from_a_flat_frame_ours_miss_less_of_the_change_than_as_many_nodes_of_captum_s(encoder, values_BTV):
    """The reason for code of our own."""
    classifier = Classifier(load_backbone(encoder, "multiscale"), AdhdDiagnosis(), AdapterConfig(rank=2))
    score, clip = class_score(classifier), values_BTV[:1]
    flat = torch.zeros_like(clip)
    with gradients_through(classifier):
        ours = integrated_gradients(score, clip, flat[0, 0], steps=24, batch_size=8).sum()
        theirs = float(captum.IntegratedGradients(score).attribute(clip, flat, n_steps=24, internal_batch_size=8).sum())
    with torch.no_grad():
        change = float(score(clip) - score(flat))
    assert abs(ours - change) < 0.5 * abs(theirs - change)
