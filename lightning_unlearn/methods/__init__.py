"""Repair methods: each removes a backdoor from a model, in place, round by round."""

from lightning_unlearn.methods.activation_editing import ActivationGuidedEditing
from lightning_unlearn.methods.adversarial_pruning import AdversarialNeuronPruning
from lightning_unlearn.methods.alternation import Alternation
from lightning_unlearn.methods.attention_distillation import NeuralAttentionDistillation
from lightning_unlearn.methods.base import RepairMethod, RepairTask, Round, Stopwatch
from lightning_unlearn.methods.fine_pruning import FinePruning
from lightning_unlearn.methods.fine_tuning import FineTuning
from lightning_unlearn.methods.grad_prune import GradPrune
from lightning_unlearn.methods.implicit_unlearning import ImplicitBackdoorUnlearning
from lightning_unlearn.methods.inverted_masks import InvertedMaskSelection
from lightning_unlearn.methods.lipschitz_pruning import ChannelLipschitzPruning
from lightning_unlearn.methods.mask_prune import MaskPrune
from lightning_unlearn.methods.reconstructive_pruning import ReconstructiveNeuronPruning
from lightning_unlearn.methods.shared_adversarial import SharedAdversarialUnlearning
from lightning_unlearn.methods.sharpness_aware import SharpnessAwareFineTuning
from lightning_unlearn.methods.subject import Subject

__all__ = [
    "ActivationGuidedEditing",
    "AdversarialNeuronPruning",
    "Alternation",
    "ChannelLipschitzPruning",
    "FinePruning",
    "FineTuning",
    "GradPrune",
    "ImplicitBackdoorUnlearning",
    "InvertedMaskSelection",
    "MaskPrune",
    "NeuralAttentionDistillation",
    "ReconstructiveNeuronPruning",
    "RepairMethod",
    "RepairTask",
    "Round",
    "SharedAdversarialUnlearning",
    "SharpnessAwareFineTuning",
    "Stopwatch",
    "Subject",
]
