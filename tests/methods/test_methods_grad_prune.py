from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from lightning_unlearn.evaluation import Evaluation
from lightning_unlearn.methods import FineTuning, GradPrune, RepairTask
from lightning_unlearn.repair import repair
from lightning_unlearn.triggers import PatchTrigger

NETS = ("preact", "vgg", "grouped", "plain", "group_norm")


class Scripted(RepairTask):
    """A task whose measurements on the validation part are written by hand."""

    def say(self, before, rounds):
        self.before = before
        self.script = list(rounds)
        return self

    def validate(self):
        return self.script.pop(0)


def measured(loss, acc=1.0):
    return Evaluation(acc=acc, asr=0.0, ra=0.0, loss=0.0, unlearning_loss=loss)


def mean_abs_gradients(net, images, labels):
    """By the formula, filter after filter, on a copy: {(layer, filter): mean |∂L_u/∂W|}."""
    net = copy.deepcopy(net).eval()
    F.cross_entropy(net(images), labels).backward()
    scores = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            for index in range(module.out_channels):
                gradient = module.weight.grad[index]
                scores[name, index] = gradient.abs().sum().item() / gradient.numel()
    return scores


def gradient_times_value(net, images, labels, norm_of):
    """Σ w·∂L/∂w over each filter's norm, or filter and bias, on a copy; ``norm_of`` was read off the net by hand."""
    net = copy.deepcopy(net).eval()
    F.cross_entropy(net(images), labels).backward()
    scores = {}
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            owner = net.get_submodule(norm_of[name]) if name in norm_of else module
            for index in range(module.out_channels):
                tensors = [owner.weight] if owner.bias is None else [owner.weight, owner.bias]
                scores[name, index] = sum((t.detach()[index] * t.grad[index]).sum().item() for t in tensors)
    return scores


def zero_filter(net, layer, index, norm_of):
    """What pruning is, on a copy."""
    net = copy.deepcopy(net).eval()
    for name in (layer, norm_of.get(layer)):
        if name is not None:
            for parameter in net.get_submodule(name).parameters():
                parameter.data[index] = 0
    return net


NORM_OF = {
    "vgg": {"0": "1", "4": "5"},
    "plain": {},
    "preact": {"1.conv1": "1.norm2", "2.conv1": "2.norm2", "0": "1.norm1"},
}


# The paper's score


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", NETS)
def test_the_largest_mean_gradient_of_all_layers_goes_first(make_net, make_clean, name, channels, seed):
    net = make_net(name, channels=channels, seed=seed)
    original = copy.deepcopy(net)
    result = repair(
        net,
        make_clean(25, channels=channels, seed=seed),
        trigger=PatchTrigger(target=0),
        samples_per_class=20,
        seed=0,
        method=GradPrune(score="mean_abs_grad", accuracy_drop=0.1, patience=10, finetune=False, max_rounds=1),
        force=True,
    )
    assert torch.bincount(result.scoring_labels).tolist() == [18] * 4
    scores = mean_abs_gradients(original, result.scoring_images, result.scoring_labels)
    assert len(scores) == result.mask.total
    assert len(result.rounds) == 1
    assert result.rounds[0].pruned == (max(scores, key=scores.get),)


def test_scores_are_laid_out_by_flat_index(make_net, make_clean, make_task):
    task = make_task(make_net("grouped"), make_clean(5), PatchTrigger())
    wanted = mean_abs_gradients(task.model, task.scoring.triggered, task.scoring.labels)
    scores = GradPrune().scores(task)
    assert scores.dtype == torch.float32
    assert {task.mask.locate(i): value for i, value in enumerate(scores.tolist())} == pytest.approx(wanted, rel=1e-4)


def test_what_an_earlier_repair_pruned_stays_so(make_net, make_clean, make_task):
    task = make_task(make_net("vgg"), make_clean(10), PatchTrigger(target=1))
    earlier = [task.mask.locate(0), task.mask.locate(6), task.mask.locate(8)]
    for pick in earlier:
        task.mask.prune([pick])
    task.before = replace(task.before, unlearning_loss=0.0)  # nothing is better, so that all rounds are taken back
    assert len(list(GradPrune(accuracy_drop=1.0, max_rounds=2, finetune=False).repair(task))) == 2
    assert sorted(task.mask.pruned) == sorted(earlier)


@pytest.mark.parametrize("name", NORM_OF)
def test_the_whole_search_by_hand(make_net, make_clean, make_task, name):
    task = make_task(make_net(name), make_clean(10), PatchTrigger(target=1), validation=3)
    net, wanted, best = copy.deepcopy(task.model), [], (task.before.unlearning_loss, task.model.state_dict(), 0)
    best = (best[0], copy.deepcopy(best[1]), 0)
    for number in range(1, 6):
        scores = mean_abs_gradients(net, task.scoring.triggered, task.scoring.labels)
        pick = max((key for key in scores if key not in wanted), key=scores.get)
        wanted.append(pick)
        net = zero_filter(net, *pick, NORM_OF[name])
        with torch.no_grad():
            loss = F.cross_entropy(net(task.validation.triggered), task.validation.labels).item()
        if loss < best[0]:
            best = (loss, copy.deepcopy(net.state_dict()), number)
    method = GradPrune(accuracy_drop=1.0, max_rounds=5, finetune=False)
    assert [done.pruned for done in method.repair(task)] == [(pick,) for pick in wanted]
    assert task.mask.pruned == tuple(wanted[: best[2]])
    assert all(torch.equal(tensor, best[1][key]) for key, tensor in task.model.state_dict().items())


@given(batch_size=st.integers(1, 90), seed=st.integers(0, 3), score=st.sampled_from(["mean_abs_grad", "taylor"]))
@settings(deadline=None, max_examples=10)
def test_the_size_of_batches_does_not_matter(make_net, make_clean, batch_size, seed, score):
    results = []
    for size in (batch_size, 1000):
        net = make_net("preact", seed=seed)
        method = GradPrune(score=score, accuracy_drop=1.0, max_rounds=3, finetune=False)
        trigger = PatchTrigger(target=2)
        results.append(repair(net, make_clean(20), trigger=trigger, method=method, batch_size=size, force=True))
    assert [done.pruned for done in results[0].rounds] == [done.pruned for done in results[1].rounds]
    for one, other in zip(results[0].rounds, results[1].rounds, strict=True):
        assert one.val_unlearning_loss == pytest.approx(other.val_unlearning_loss, rel=1e-4)


def test_no_filter_is_picked_twice_and_the_search_ends_with_the_last(hand_victim, make_task):
    task = make_task(hand_victim.net, hand_victim.clean, hand_victim.trigger)
    method = GradPrune(accuracy_drop=1.0, patience=1000, finetune=False)
    picks = [done.pruned[0] for done in method.repair(task)]
    assert sorted(picks) == [("0", index) for index in range(4)]
    assert picks[0] == ("0", 3)


@pytest.mark.parametrize("name", NETS)
def test_the_search_ends_when_no_gradient_is_left(make_net, make_clean, make_task, name):
    task = make_task(make_net(name), make_clean(6), PatchTrigger())
    task.before, task.validate = measured(1.0), lambda: measured(1.0)
    method = GradPrune(accuracy_drop=1.0, patience=1000, finetune=False)
    picks = [done.pruned[0] for done in method.repair(task)]
    assert len(set(picks)) == len(picks) <= task.mask.total
    for pick in picks:
        task.mask.prune([pick])
    scores = mean_abs_gradients(task.model, task.scoring.triggered, task.scoring.labels)
    assert all(value == 0 for key, value in scores.items() if key not in picks)


def test_gradients_of_pruned_filters_alone_do_not_go_on(make_clean, make_task):
    # Without norm and ReLU, the gradient of a pruned filter does not vanish; that of the other one always was zero.
    net = nn.Sequential(nn.Conv2d(1, 2, 8), nn.Flatten(), nn.Linear(2, 4))
    with torch.no_grad():
        net[2].weight[:, 1] = 0
    task = make_task(net, make_clean(6), PatchTrigger())
    task.validate = lambda: measured(1.0)
    method = GradPrune(accuracy_drop=1.0, patience=1000, finetune=False)
    assert [done.pruned for done in method.repair(task)] == [(("0", 0),)]


# When to stop, and what to keep


def picks_of(task, method):
    rounds = list(method.repair(task))
    assert task.script == []
    return [done.pruned[0] for done in rounds]


@pytest.fixture
def script(make_net, make_clean, make_task):
    task = make_task(make_net("preact"), make_clean(6), PatchTrigger(), kind=Scripted)
    task.original = copy.deepcopy(task.model)
    return task


def assert_kept(task, picks):
    """The model is the original with these filters pruned, and not a bit else."""
    wanted = task.original
    for pick in picks:
        wanted = zero_filter(wanted, *pick, NORM_OF["preact"])
    assert task.mask.pruned == tuple(picks)
    state = wanted.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in task.model.state_dict().items())


def test_patience(script):
    # The best round is the second; three rounds without a lower loss end the search. An equal loss is not lower.
    script.say(measured(5.0), [measured(loss) for loss in (4.0, 3.0, 3.5, 3.0, 3.1)])
    picks = picks_of(script, GradPrune(patience=3, finetune=False))
    assert len(set(picks)) == 5
    assert_kept(script, picks[:2])


def test_patience_starts_again_with_each_better_round(script):
    script.say(measured(5.0), [measured(loss) for loss in (6.0, 4.0, 4.5, 3.0, 3.5, 3.6)])
    picks = picks_of(script, GradPrune(patience=2, finetune=False))
    assert len(picks) == 6
    assert_kept(script, picks[:4])


def test_round_0_competes(script):
    script.say(measured(2.0), [measured(loss) for loss in (3.0, 2.0, 2.5)])
    assert len(picks_of(script, GradPrune(patience=3, finetune=False))) == 3
    assert_kept(script, [])


def test_accuracy_stops(script):
    # The third round has the lowest loss, but its accuracy fell by more than α.
    accuracies, losses = (1.0, 0.95, 0.85), (4.0, 3.0, 1.0)
    script.say(measured(5.0), [measured(loss, acc) for loss, acc in zip(losses, accuracies, strict=True)])
    picks = picks_of(script, GradPrune(accuracy_drop=0.1, finetune=False))
    assert len(picks) == 3
    assert_kept(script, picks[:2])


@pytest.mark.parametrize(("before", "after"), [(0.9, 0.8), (1.0, 0.9), (0.3, 0.2), (0.7, 0.6)])
def test_a_drop_by_exactly_alpha_stops(script, before, after):
    # Rates come as float32, where the difference may be a little less.
    before, after = torch.tensor([before, after]).tolist()
    script.say(measured(5.0, before), [measured(4.0, before), measured(1.0, after)])
    picks = picks_of(script, GradPrune(accuracy_drop=0.1, finetune=False))
    assert_kept(script, picks[:1])


def test_max_rounds(script):
    script.say(measured(5.0), [measured(4.0), measured(3.0)])
    picks = picks_of(script, GradPrune(max_rounds=2, finetune=False))
    assert_kept(script, picks)


def test_a_loss_that_is_no_number_is_not_lower(script):
    script.say(measured(5.0), [measured(4.0), measured(float("nan")), measured(4.5)])
    picks = picks_of(script, GradPrune(patience=2, finetune=False))
    assert_kept(script, picks[:1])


def test_accuracy_stops_a_real_search(hand_victim, make_task):
    # Without the backdoor's filter nothing is left to gain: the next pruned filter costs a third of the accuracy.
    task = make_task(hand_victim.net, hand_victim.clean, hand_victim.trigger)
    rounds = list(GradPrune(finetune=False).repair(task))
    assert [done.val_acc for done in rounds] == pytest.approx([1.0, 2 / 3])
    assert rounds[0].val_asr == 0
    assert task.mask.to_dict() == {"0": [3]}
    # Image, filter and linear layer are known: L_u is log(1 + 2·e^-4b) where 0.8 <= b <= 1 is the mean brightness.
    assert 0.036 <= rounds[0].val_unlearning_loss <= 0.079


@pytest.mark.parametrize("patience", [1, 2])
def test_patience_stops_a_real_search(hand_victim, make_task, patience):
    task = make_task(hand_victim.net, hand_victim.clean, hand_victim.trigger)
    rounds = list(GradPrune(accuracy_drop=1.0, patience=patience, finetune=False).repair(task))
    assert len(rounds) == 1 + patience
    assert task.mask.to_dict() == {"0": [3]}


# Variants


@pytest.mark.parametrize("clean_weight", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("name", NORM_OF)
def test_taylor_by_hand(make_net, make_clean, make_task, name, clean_weight):
    task = make_task(make_net(name), make_clean(8), PatchTrigger(target=1))
    falls = gradient_times_value(task.model, task.scoring.triggered, task.scoring.labels, NORM_OF[name])
    clean_falls = gradient_times_value(task.model, task.scoring.clean, task.scoring.labels, NORM_OF[name])
    wanted = {key: falls[key] - clean_weight * max(0.0, -clean_falls[key]) for key in falls}
    scores = GradPrune(score="taylor", clean_weight=clean_weight).scores(task)
    assert {task.mask.locate(i): value for i, value in enumerate(scores.tolist())} == pytest.approx(
        wanted, rel=1e-3, abs=1e-6
    )
    method = GradPrune(score="taylor", clean_weight=clean_weight, max_rounds=1, finetune=False)
    assert next(method.repair(task)).pruned == (max(wanted, key=wanted.get),)


def test_taylor_is_exact_to_first_order(make_net, make_clean, make_task):
    # Turning a channel down by a little lowers the loss by that little times its score.
    task = make_task(make_net("vgg").double(), make_clean(8), PatchTrigger(target=1))
    predicted = GradPrune(score="taylor").scores(task).tolist()
    little, real = 1e-5, []

    def loss(scales):
        with torch.no_grad(), task.mask.scaled(scales):
            return F.cross_entropy(task.model(task.scoring.triggered), task.scoring.labels).item()

    for index in range(task.mask.total):
        scales = torch.ones(task.mask.total, dtype=torch.float64)
        before = loss(scales)
        scales[index] -= little
        real.append((before - loss(scales)) / little)
    assert predicted == pytest.approx(real, rel=1e-2, abs=1e-4)


def losses_without(task, norm_of, clean_weight=0.0):
    """L_u + λ·L_clean over all scoring pairs, filter by filter, each on its own copy of the net."""
    losses = {}
    for index in range(task.mask.total):
        pick = task.mask.locate(index)
        net = zero_filter(task.model, *pick, norm_of)
        with torch.no_grad():
            loss = F.cross_entropy(net(task.scoring.triggered), task.scoring.labels)
            loss = loss + clean_weight * F.cross_entropy(net(task.scoring.clean), task.scoring.labels)
        losses[pick] = loss.item()
    return losses


@pytest.mark.parametrize(("score", "clean_weight"), [("mean_abs_grad", 0.0), ("taylor", 0.0), ("taylor", 3.0)])
@pytest.mark.parametrize("name", NORM_OF)
def test_look_ahead_takes_the_lowest_real_loss(make_net, make_clean, make_task, name, score, clean_weight):
    task = make_task(make_net(name, seed=1), make_clean(8), PatchTrigger(target=1))
    original = copy.deepcopy(task.model)
    losses = losses_without(task, NORM_OF[name], clean_weight)
    options = {"score": score, "clean_weight": clean_weight, "finetune": False, "max_rounds": 1}
    scores = GradPrune(**options).scores(task)
    for width in (1, 4, 1000):  # more than there are filters: all are tried
        tried = [task.mask.locate(index) for index in scores.argsort(descending=True).tolist()[:width]]
        search = GradPrune(look_ahead=width, look_ahead_images=1000, **options).repair(task)
        assert next(search).pruned == (min(tried, key=losses.get),)
        # What was tried and not taken is as it was.
        search.close()
        task.mask.undo(task.mask.steps)
        state = original.state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in task.model.state_dict().items())


def test_look_ahead_uses_as_many_images_as_told(make_net, make_clean, make_task):
    task = make_task(make_net("vgg"), make_clean(8), PatchTrigger())
    sizes = []
    inner = task.forward

    def forward(images):
        if not torch.is_grad_enabled():
            sizes.append(len(images))
        return inner(images)

    task.forward = forward
    next(GradPrune(look_ahead=3, look_ahead_images=10, finetune=False).repair(task))
    assert sizes == [20] * 3 + [8]  # clean and triggered; what is measured then is the validation part


def test_several_filters_a_round(make_net, make_clean, make_task):
    task = make_task(make_net("vgg"), make_clean(8), PatchTrigger())
    scores = mean_abs_gradients(task.model, task.scoring.triggered, task.scoring.labels)
    wanted = sorted(scores, key=scores.get, reverse=True)[:3]
    search = GradPrune(filters_per_round=3, finetune=False).repair(task)
    assert next(search).pruned == tuple(wanted)
    assert task.mask.pruned == tuple(wanted)


def test_several_filters_a_round_up_to_the_last(hand_victim, make_task):
    task = make_task(hand_victim.net, hand_victim.clean, hand_victim.trigger)
    task.validate = lambda: measured(1.0)
    method = GradPrune(filters_per_round=3, accuracy_drop=1.0, patience=10, finetune=False)
    rounds = [done.pruned for done in method.repair(task)]
    assert [len(pruned) for pruned in rounds] == [3, 1]


def test_several_of_those_looked_at(make_net, make_clean, make_task):
    task = make_task(make_net("vgg", seed=1), make_clean(8), PatchTrigger(target=1))
    losses = losses_without(task, NORM_OF["vgg"])
    search = GradPrune(filters_per_round=2, look_ahead=1000, look_ahead_images=1000, finetune=False).repair(task)
    assert next(search).pruned == tuple(sorted(losses, key=losses.get)[:2])


def test_finetuning_is_the_papers_unless_told_otherwise(make_net, make_clean, make_task):
    method = GradPrune(accuracy_drop=0.2)
    assert isinstance(method.finetune, FineTuning)
    assert (method.finetune.triggered, method.finetune.accuracy_drop) == (True, 0.2)
    own = FineTuning(triggered=False, max_epochs=2)
    assert GradPrune(finetune=own).finetune is own
    task = make_task(make_net("vgg"), make_clean(8), PatchTrigger())
    stages = [done.stage for done in GradPrune(max_rounds=3, accuracy_drop=1.0, finetune=own).repair(task)]
    assert stages == ["prune"] * 3 + ["finetune"] * 2


def test_finetuning_starts_from_the_best_round(script):
    script.say(measured(2.0), [measured(1.0), measured(3.0), *[measured(9.0)] * 2])
    method = GradPrune(max_rounds=2, finetune=FineTuning(triggered=True, patience=10, norms="frozen", max_epochs=1))
    rounds = list(method.repair(script))
    assert script.script == []
    assert_kept(script, rounds[0].pruned)  # the epoch made it worse


# Errors


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"score": "random"}, "^score: expected one of .*'mean_abs_grad', 'taylor'.*, but got 'random'"),
        ({"accuracy_drop": 0}, r"^accuracy_drop: expected a value in \(0, 1\], but got 0"),
        ({"accuracy_drop": 1.1}, r"^accuracy_drop: expected a value in \(0, 1\], but got 1.1"),
        ({"patience": 0}, "^patience: .* but got 0"),
        ({"max_rounds": 0}, "^max_rounds: .* but got 0"),
        ({"filters_per_round": 0}, "^filters_per_round: .* but got 0"),
        ({"clean_weight": -1.0, "score": "taylor"}, "^clean_weight: .* but got -1.0"),
        ({"clean_weight": 1.0}, "^clean_weight: 1.0 needs score='taylor'"),
        ({"look_ahead": -1}, "^look_ahead: expected 0, or at least filters_per_round"),
        ({"look_ahead": 2, "filters_per_round": 3}, r"^look_ahead: .* at least filters_per_round \(3\), but got 2"),
        ({"look_ahead_images": 0}, "^look_ahead_images: .* but got 0"),
    ],
)
def test_hyper_parameters(options, match):
    with pytest.raises(ValueError, match=match):
        GradPrune(**options)


def test_gradients_that_break_later_raise(make_net, make_clean, make_task):
    task = make_task(make_net("vgg"), make_clean(8), PatchTrigger())
    search = GradPrune(accuracy_drop=1.0, finetune=False).repair(task)
    next(search)
    with torch.no_grad():
        task.model[9].weight.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"^model: the gradients of the unlearning loss hold NaN or infinity"):
        next(search)
